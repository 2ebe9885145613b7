"""The claims of configs/claims, and the effects that bear on each."""

from collections.abc import Callable, Iterator
from dataclasses import field, replace
from functools import cache, partial
from pathlib import Path

import yaml
from typing_extensions import TypedDict

from evaluation.measurements import MEASUREMENTS, Measurement, read_measurements
from reporting.effects import (
    Effect,
    compare_rows,
    summarize_approximations,
    summarize_fit,
    summarize_measurements,
)
from reporting.rows import read_results
from reporting.settings import find_plain_row
from reporting.statistics import find_significant
from training.config import CONFIGS, format_error
from training.errors import UsageError
from training.validation import construct, strict_dataclass

SUMMARIES = {"approximate": summarize_fit, "compare_approximations": summarize_approximations}
"""The script that writes a file of records -> what summarizes the file."""


class Comparison(TypedDict):
    """Rows that are compared with others in each of some tables."""

    tables: list[str]
    rows: list[str] | dict[str, str]
    """Rows compared with the plain row of their table; or each row -> the row that it is compared with."""


@strict_dataclass
class Claim:
    """A claim, and the records that bear on it: the contents of ``configs/claims/<name>.yaml``."""

    name: str
    text: str
    source: str
    rule: str
    caveat: str
    decisive: dict[str, str]
    """The key of an effect -> its short name. They are on the first page, and are chosen by what the claim says."""
    comparisons: list[Comparison] = field(default_factory=list)
    measurements: dict[str, list[str]] = field(default_factory=dict)
    """The name of a measurement -> the tables whose networks it was made on."""
    files: dict[str, str] = field(default_factory=dict)
    """Another file of records, relative to ``results/`` -> the script that writes it, of ``SUMMARIES``."""

    def __post_init__(self) -> None:
        for what, names, known in (
            ("measurement", self.measurements, MEASUREMENTS),
            ("script", self.files.values(), SUMMARIES),
        ):
            if unknown := [name for name in names if name not in known]:
                raise UsageError(f"claim {self.name} names the {what} '{unknown[0]}'; known: {', '.join(known)}")

    @property
    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """The table, row and reference of each comparison."""
        for comparison in self.comparisons:
            rows = comparison["rows"]
            for table in comparison["tables"]:
                for row in rows:
                    yield table, row, rows[row] if isinstance(rows, dict) else find_plain_row(table)


@cache
def load_claims() -> list[Claim]:
    """Loads the claims of configs/claims. Raises UsageError for an invalid one."""
    return [
        construct(Claim, {"name": file.stem, **yaml.safe_load(file.read_text("utf-8"))}, f"claims/{file.stem}")
        for file in sorted((CONFIGS / "claims").glob("*.yaml"))
    ]


def collect_effects(claim: Claim, results: Path) -> tuple[list[Effect], list[str]]:
    """Computes the effects that bear on a claim.

    Args:
        claim: the claim.
        results: the folder with ``tables/``, ``evidence/`` and ``approximation/``.

    Returns:
        The effects, and what is missing: commands that make missing files of records, and missing rows.

    Raises:
        UsageError: for a corrupt file, and if nothing is missing but a decisive comparison.
    """
    effects: list[Effect] = []
    missing: dict[str, None] = {}
    for table, row, reference in claim.pairs:
        file = results / "tables" / f"{table}.jsonl"
        if not file.exists():
            missing[f"`make reproduce-table TABLE={table}`"] = None
        elif effect := compare_rows(table, row, reference, read_results(file)):
            effects.append(effect)
        else:
            missing[f"'{row}' against '{reference}' in table {table}"] = None
    for name, tables in claim.measurements.items():
        measurement = MEASUREMENTS[name]
        for table in tables:
            file = results / "evidence" / f"{table}_{name}.jsonl"
            command = f"`scripts/measure.py table={table} measurement={name}`"
            if file.exists():
                _check_measurements(measurement, file, results / "tables" / f"{table}.jsonl", command)
                effects += _summarize(partial(summarize_measurements, measurement, table), file)
            else:
                missing[command] = None
    for path, script in claim.files.items():
        if (results / path).exists():
            effects += _summarize(SUMMARIES[script], results / path)
        else:
            missing[f"`scripts/{script}.py`"] = None
    keys = {effect.key for effect in effects}
    if not missing and (unknown := [key for key in claim.decisive if key not in keys]):
        raise UsageError(f"claim {claim.name}: its decisive '{unknown[0]}' is none of its comparisons")
    compared = [effect for effect in effects if effect.interval.n]
    missing |= {f"{e.what} ({e.data}): no seed in common": None for e in effects if not e.interval.n}
    return _correct_for_multiplicity(compared), list(missing)


def _check_measurements(measurement: type[Measurement], file: Path, table_file: Path, command: str) -> None:
    """Raises UsageError for a line that was not measured on the weights of a run of the table, if there is a table."""
    if not table_file.exists():
        return
    records = {(r.row, r.seed): r for r in read_results(table_file)}
    for number, line in enumerate(read_measurements(file, measurement), 1):
        record = records.get((line.row, line.seed))
        if record is None:
            raise UsageError(
                f"{file}, line {number}: {table_file} has no row '{line.row}' with seed {line.seed}; delete the line"
            )
        if not line.is_of(record):
            raise UsageError(f"{file}, line {number}, was not measured on a run in {table_file}; {command} replaces it")


def _summarize(summarize: Callable[[Path], list[Effect]], file: Path) -> list[Effect]:
    try:
        return summarize(file)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{file} is corrupt: {format_error(error) or type(error).__name__}") from error


def _correct_for_multiplicity(effects: list[Effect]) -> list[Effect]:
    """Marks the verdicts that survive Holm's correction for all tests of the claim of the same hypothesis."""
    of_difference = find_significant([effect.p_value_of_difference for effect in effects])
    of_equivalence = find_significant([effect.p_value_of_equivalence for effect in effects])
    return [
        replace(effect, survives_correction=equivalent if effect.verdict == "equivalent" else different)
        for effect, different, equivalent in zip(effects, of_difference, of_equivalence, strict=True)
    ]
