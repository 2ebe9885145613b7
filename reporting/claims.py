"""A verdict on each claim of the paper, from committed records: results/CLAIMS.md and its figures."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cache, partial
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from evaluation.measurements import MEASUREMENTS, Measurement, read_measurements
from reporting.effects import (
    COMPETITIVE,
    Effect,
    compare_rows,
    summarize_approximations,
    summarize_fit,
    summarize_measurements,
)
from reporting.render import format_interval
from reporting.rows import read_results
from reporting.settings import find_plain_row
from reporting.statistics import Interval, correct_p_values
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
    comparisons: list[Comparison] = field(default_factory=list)
    threshold: float = COMPETITIVE
    """Of the comparisons, in points."""
    min_ratio: float = 0.0
    """Effects with a smaller ratio of parameters are counted separately: they bear on a part of the claim only."""
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
        UsageError: for a corrupt file.
    """
    effects: list[Effect] = []
    missing: dict[str, None] = {}
    for table, row, reference in claim.pairs:
        file = results / "tables" / f"{table}.jsonl"
        if not file.exists():
            missing[f"`make reproduce-table TABLE={table}`"] = None
        elif effect := compare_rows(table, row, reference, claim.threshold, read_results(file)):
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
    compared = [effect for effect in effects if effect.interval.n]
    missing |= {f"{e.what} ({e.data}): no seed in common": None for e in effects if not e.interval.n}
    return _correct_for_multiplicity(compared), list(missing)


def _check_measurements(measurement: type[Measurement], file: Path, table_file: Path, command: str) -> None:
    """Raises UsageError for a line that was measured on other weights than those of the table's run."""
    records = {(r.row, r.seed): r for r in read_results(table_file)} if table_file.exists() else {}
    for number, line in enumerate(read_measurements(file, measurement), 1):
        if (record := records.get((line.row, line.seed))) is not None and not line.is_of(record):
            raise UsageError(
                f"{file}, line {number}, was not measured on the run in {table_file}; {command} replaces it"
            )


def _summarize(summarize: Callable[[Path], list[Effect]], file: Path) -> list[Effect]:
    try:
        return summarize(file)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{file} is corrupt: {format_error(error) or type(error).__name__}") from error


def _correct_for_multiplicity(effects: list[Effect]) -> list[Effect]:
    tested = [(effect, effect.p_value) for effect in effects]
    corrected = iter(correct_p_values([p_value for _, p_value in tested if p_value is not None]))
    return [
        effect if p_value is None else replace(effect, corrected_p_value=next(corrected)) for effect, p_value in tested
    ]


def render_claims(effects_of: Mapping[str, tuple[list[Effect], list[str]]]) -> str:
    """Renders the page; ``effects_of`` maps the name of each claim to what ``collect_effects`` returns."""
    lines = [
        "# Claims and verdicts",
        "",
        "Written by `make claims` from the records in this folder. An effect *holds* if its whole 95% interval is "
        "above the claim's threshold, *does not hold* if the whole interval is below it, and is *undecided* otherwise. "
        f"Intervals are {Interval.method}s over paired seeds (or test images, if *n* says so), except that of the fit, "
        "which is a bootstrap over kernels. They are not adjusted for the number of comparisons, so about 1 in 20 "
        "misses its true value. **Bold** verdicts survive Holm's correction for all "
        f"{Interval.method}s of the claim that have a verdict. "
        "*To decide* is the number of seeds or images at which the same mean and spread would give a verdict.",
        "",
        "| claim | holds | does not hold | undecided |",
        "|---|---:|---:|---:|",
    ]
    for claim in load_claims():
        effects = effects_of[claim.name][0]
        below = [effect for effect in effects if effect.ratio is not None and effect.ratio < claim.min_ratio]
        others = [effect for effect in effects if effect not in below]
        lines.append(f"| [{claim.name}](#{claim.name.lower()}): {claim.text} | {_count_verdicts(others)} |")
        if below:
            text = f"{claim.name}, ratios of parameters below {claim.min_ratio:g}"
            lines.append(f"| {text} | {_count_verdicts(below)} |")
    lines.append("")
    for claim in load_claims():
        effects, missing = effects_of[claim.name]
        lines += [f"## {claim.name}", "", f"**{claim.text}** Source: {claim.source}. {claim.rule}", ""]
        if effects:
            lines += [
                "| data | effect | reference / row | estimate | n | verdict | to decide |",
                "|---|---|---:|---:|---:|---|---|",
                *map(_format_effect, effects),
                "",
            ]
        if any(effect.is_verdict_in_points for effect in effects):
            lines += [f"![Effects with their 95% intervals](claims/{claim.name}.png)", ""]
        lines += [f"- Not run: {item}." for item in missing]
        lines += [""] if missing else []
    return "\n".join(lines).rstrip() + "\n"


def _count_verdicts(effects: Sequence[Effect]) -> str:
    """The cells of the table of claims: verdicts, and in bold those that survive the correction."""
    cells = []
    for verdict in ("holds", "does not hold", "undecided"):
        matching = [effect for effect in effects if effect.verdict == verdict]
        num_surviving = sum(effect.survives_correction for effect in matching)
        cells.append(f"{len(matching)} (**{num_surviving}**)" if verdict != "undecided" else str(len(matching)))
    return " | ".join(cells)


def _format_effect(effect: Effect) -> str:
    interval, number = effect.interval, "+.2f" if effect.unit == "points" else ".3g"
    estimate = format_interval(interval.mean, interval.low, interval.high, number)
    ratio = "" if effect.ratio is None else f"{effect.ratio:.2f}"
    verdict = f"**{effect.verdict}**" if effect.survives_correction else effect.verdict
    n_to_decide = None if effect.threshold is None else interval.n_to_decide(effect.threshold)
    to_decide = "" if n_to_decide is None else f"about {n_to_decide:,} {effect.sampled}"
    return (
        f"| [{effect.data}]({effect.source}) | {effect.what} | {ratio} | {estimate} {effect.unit} "
        f"| {interval.n} {effect.sampled} | {verdict} | {to_decide} |"
    )


def draw_effects(claim: Claim, effects: Sequence[Effect]) -> Figure | None:
    """Draws a claim's effects in points of accuracy that have a verdict; None if there are none."""
    drawn = [effect for effect in effects if effect.is_verdict_in_points]
    if not drawn:
        return None
    figure = Figure(figsize=(10, 0.27 * len(drawn) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = {"holds": "tab:green", "does not hold": "tab:red", "undecided": "tab:gray"}
    for position, effect in enumerate(drawn):
        assert effect.threshold is not None
        interval = effect.interval
        error = [[interval.mean - interval.low], [interval.high - interval.mean]]
        color = colors[effect.verdict]
        fill = color if effect.survives_correction else "white"
        axes.errorbar(interval.mean, -position, xerr=error, fmt="o", markersize=4, color=color, markerfacecolor=fill)
        axes.plot([effect.threshold] * 2, [-position - 0.5, -position + 0.5], color="black", linewidth=0.8)
    labels = [textwrap.fill(f"{effect.data}: {effect.what}", 70) for effect in drawn]
    axes.set_yticks([-i for i in range(len(drawn))], labels, fontsize=7)
    axes.margins(y=0.5 / len(drawn))
    axes.grid(axis="x", alpha=0.3)
    meanings = ", ".join(f"{color.removeprefix('tab:')}: {verdict}" for verdict, color in colors.items())
    figure.suptitle(f"{claim.name}: {claim.text}", fontsize=10)
    notes = "black line: the claim's threshold; filled: survives the correction for all verdicts of the claim"
    figure.supxlabel(f"points of accuracy; {meanings}; {notes}", fontsize=8)
    return figure
