"""Writes results/CLAIMS.md, the pages and figures in results/claims/, and README's first table, results/headline.md,
from the committed records: python scripts/claims.py
"""

from pathlib import Path

from matplotlib.figure import Figure

from acl.plot import to_png
from reporting.approximations import draw_approximations, read_approximations
from reporting.claim_pages import draw_effects, render_claim, render_overview
from reporting.claims import Claim, collect_effects, load_claims
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
    headline = render_headline(settings.headline, settings.results)
    claims = [(claim, *collect_effects(claim, settings.results)) for claim in load_claims()]
    if not any(effects for _, effects, _ in claims):
        raise UsageError(
            f"results={settings.results} is invalid: the folder has no records in tables/ or evidence/ that a claim of "
            "configs/claims uses"
        )
    for claim, effects, missing in claims:
        folder = settings.results / "claims"
        approximations = draw_all_approximations(claim, settings.results)
        write_atomic(folder / f"{claim.name}.md", render_claim(claim, effects, missing, list(approximations)))
        for name, figure in {f"{claim.name}.png": draw_effects(claim, effects), **approximations}.items():
            if figure is not None:
                write_atomic(folder / name, to_png(figure))
    untested = {
        what: f"make reproduce-table TABLE={table}"
        for what, table in settings.untested.items()
        if not (settings.results / "tables" / f"{table}.jsonl").exists()
    }
    evidence = [(claim, effects) for claim, effects, _ in claims]
    write_atomic(settings.results / "CLAIMS.md", render_overview(evidence, untested))
    write_atomic(settings.results / "headline.md", headline)
    print(settings.results / "CLAIMS.md")


def draw_all_approximations(claim: Claim, results: Path) -> dict[str, Figure]:
    """Draws each file of approximations without training that a claim names, if it has accuracies."""
    paths = [results / path for path, script in claim.files.items() if script == "compare_approximations"]
    figures = {path.stem: draw_approximations(read_approximations(path)) for path in paths if path.exists()}
    return {f"{claim.name}_{stem}.png": figure for stem, figure in figures.items() if figure is not None}


if __name__ == "__main__":
    run_script(main, "claims", ClaimsSettings)
