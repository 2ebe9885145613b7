"""Writes results/CLAIMS.md and the figures in results/claims/ from the committed records: python scripts/claims.py"""

from acl.plot import to_png
from reporting.claims import collect_effects, draw_effects, load_claims, render_claims
from training.cli import run_script
from training.errors import UsageError
from training.files import write_atomic
from training.validation import FilePath, strict_dataclass


@strict_dataclass
class ClaimsSettings:
    results: FilePath


def main(settings: ClaimsSettings) -> None:
    effects_of = {claim.name: collect_effects(claim, settings.results) for claim in load_claims()}
    if not any(effects for effects, _ in effects_of.values()):
        raise UsageError(f"results={settings.results} is invalid: the folder has no records in tables/ or evidence/")
    for claim in load_claims():
        figure = draw_effects(claim, effects_of[claim.name][0])
        if figure is not None:
            write_atomic(settings.results / "claims" / f"{claim.name}.png", to_png(figure))
    write_atomic(settings.results / "CLAIMS.md", render_claims(effects_of))
    print(settings.results / "CLAIMS.md")


if __name__ == "__main__":
    run_script(main, "claims", ClaimsSettings)
