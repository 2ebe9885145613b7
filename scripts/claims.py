"""Writes results/CLAIMS.md and results/claims.png from the committed records: python scripts/claims.py"""

from pydantic.dataclasses import dataclass as validated_dataclass

from acl.plot import to_png
from reporting.claims import CLAIMS, collect_effects, draw_effects, render_claims
from training.config import run_script
from training.errors import UsageError
from training.run_directory import write_atomic
from training.validation import STRICT, FilePath


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class ClaimsSettings:
    results: FilePath


def main(settings: ClaimsSettings) -> None:
    effects_of = {claim.name: collect_effects(claim, settings.results) for claim in CLAIMS}
    if not any(effects for effects, _ in effects_of.values()):
        raise UsageError(f"results={settings.results} is invalid: the folder has no records in tables/ or evidence/")
    write_atomic(settings.results / "claims.png", to_png(draw_effects(effects_of)))
    write_atomic(settings.results / "CLAIMS.md", render_claims(effects_of))
    print(settings.results / "CLAIMS.md")


if __name__ == "__main__":
    run_script(main, "claims", ClaimsSettings)
