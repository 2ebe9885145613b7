"""Writes results/CLAIMS.md, the pages and figures in results/claims/, and README's first table, results/headline.md,
from the committed records: python scripts/claims.py
"""

from acl.plot import to_png
from reporting.claim_pages import draw_effects, render_claim, render_overview
from reporting.claims import collect_effects, load_claims
from reporting.headline import HeadlineRow, render_headline
from training.cli import run_script
from training.errors import UsageError
from training.files import write_atomic
from training.validation import FilePath, strict_dataclass


@strict_dataclass
class ClaimsSettings:
    results: FilePath
    untested: dict[str, str]
    headline: list[HeadlineRow]


def main(settings: ClaimsSettings) -> None:
    claims = [(claim, *collect_effects(claim, settings.results)) for claim in load_claims()]
    if not any(effects for _, effects, _ in claims):
        raise UsageError(f"results={settings.results} is invalid: the folder has no records in tables/ or evidence/")
    for claim, effects, missing in claims:
        path = settings.results / "claims" / claim.name
        write_atomic(path.with_suffix(".md"), render_claim(claim, effects, missing))
        figure = draw_effects(claim, effects)
        if figure is not None:
            write_atomic(path.with_suffix(".png"), to_png(figure))
    untested = {
        what: f"make reproduce-table TABLE={table}"
        for what, table in settings.untested.items()
        if not (settings.results / "tables" / f"{table}.jsonl").exists()
    }
    evidence = [(claim, effects) for claim, effects, _ in claims]
    write_atomic(settings.results / "CLAIMS.md", render_overview(evidence, untested))
    write_atomic(settings.results / "headline.md", render_headline(settings.headline, settings.results))
    print(settings.results / "CLAIMS.md")


if __name__ == "__main__":
    run_script(main, "claims", ClaimsSettings)
