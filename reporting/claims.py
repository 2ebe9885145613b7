"""A verdict on each claim of the paper, from committed records: results/CLAIMS.md and its figures."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from reporting.effects import (
    COMPETITIVE,
    Effect,
    PairedRows,
    compare_rows,
    summarize_approximations,
    summarize_fit,
    summarize_measurements,
)
from reporting.measurements import (
    AkpTravel,
    Attacks,
    Corruptions,
    Measurement,
    ReplacedAkps,
    Shapley,
    Transforms,
    read_measurements,
)
from reporting.statistics import Interval, correct_p_values
from reporting.table import read_results
from training.config import format_error
from training.errors import UsageError


@dataclass(frozen=True)
class Claim:
    """A claim, and the records that bear on it."""

    name: str
    text: str
    source: str
    rule: str
    pairs: tuple[PairedRows, ...] = ()
    measurements: Mapping[type[Measurement], tuple[str, ...]] = field(default_factory=dict)
    """A measurement -> the tables whose networks it was made on."""
    files: Mapping[str, tuple[Callable[[Path], list[Effect]], str]] = field(default_factory=dict)
    """Another file of records, relative to ``results/`` -> what summarizes it, and the script that writes it."""
    min_ratio: float = 0.0
    """Effects with a smaller ratio of parameters are counted separately: they bear on a part of the claim only."""


_LENET_TABLES = ("mnist", "fashion_mnist")
_LENET_ROWS = ("all Gabor", "mosaic, no plain kernel", "mosaic, with amplitude", "half plain")
_FOUR_LAYER_ROWS = (
    "all Gabor",
    "all Gabor, with amplitude",
    "mosaic, no plain kernel",
    "mosaic, with amplitude",
    "half plain",
)
_PHOTOGRAPH_ROWS: dict[str, str | None] = {
    "exp1: Gabor, pretrained": None,
    "exp1 fitted, with amplitude, pretrained": None,
    "exp1 fitted, extended, with amplitude, pretrained": None,
    "exp2: mosaic, no plain kernel, pretrained": None,
    "exp3: the paper's, half plain, pretrained": None,
    "exp3 fitted, pretrained": None,
    "auto, extended, with amplitude, pretrained": None,
    "exp3: the paper's, half plain, from scratch": "plain, from scratch",
    "AlexNet, exp3, from scratch": "AlexNet, plain, from scratch",
}
_FITTED_GABOR = "exp1 fitted, with amplitude, pretrained"
_FITTED_EXTENDED = "exp1 fitted, extended, with amplitude, pretrained"
_FITTED = (
    (_FITTED_GABOR, "exp1: Gabor, pretrained"),
    (_FITTED_EXTENDED, "exp1: Gabor, pretrained"),
    ("exp3 fitted, pretrained", "exp3: the paper's, half plain, pretrained"),
)

CLAIMS = (
    Claim(
        "C1",
        "Analytic networks are competitive in accuracy with far fewer parameters.",
        "the paper",
        f"The accuracy is competitive if the whole interval of the paired difference is above {COMPETITIVE:g} points. "
        "*Reference / row* says how many times fewer convolution parameters the whole network has.",
        (
            *(PairedRows(table, row) for table in _LENET_TABLES for row in _LENET_ROWS),
            *(PairedRows("fashion_mnist_shares", f"{share}% plain", "100% plain") for share in (75, 50, 25, 0)),
            *(PairedRows("cifar10_jpeg", row) for row in _FOUR_LAYER_ROWS),
            PairedRows("cifar10_jpeg", "mosaic, with amplitude", "all Gabor, with amplitude"),
            *(PairedRows("flowers17", row, against) for row, against in _PHOTOGRAPH_ROWS.items()),
            *(PairedRows("imagenette", row) for row, against in _PHOTOGRAPH_ROWS.items() if against is None),
        ),
        min_ratio=2.0,
    ),
    Claim(
        "C2",
        "AKPs that learn adapt to the data.",
        "the paper",
        "Learned AKPs are better than random AKPs that are not trained; trained networks are less accurate on "
        "the validation split, which also chose their epoch, if all AKPs are set back to their initial values, and "
        "nothing else changes; and more AKPs are better than fewer: the interval is above 0. There is no verdict on "
        "the distances that AKPs travel during training, nor on redrawn AKPs: what is lost with them shows how far the "
        "other layers depend on the kernels, even on kernels that training hardly changed.",
        (
            *(
                PairedRows(table, "all Gabor", "all Gabor, frozen at random", 0.0)
                for table in (*_LENET_TABLES, "cifar10_jpeg")
            ),
            *(
                PairedRows(table, "mosaic, with amplitude", "mosaic, no plain kernel", 0.0)
                for table in (*_LENET_TABLES, "cifar10_jpeg")
            ),
            PairedRows("cifar10_jpeg", "all Gabor, with amplitude", "all Gabor", 0.0),
            PairedRows("flowers17", _FITTED_EXTENDED, _FITTED_GABOR, 0.0),
        ),
        {
            ReplacedAkps: ("fashion_mnist", "flowers17_choices", "imagenette"),
            AkpTravel: ("flowers17", "flowers17_choices"),
        },
    ),
    Claim(
        "C3",
        "Pretrained kernels are approximated by a few AKPs.",
        "the paper (figures 1 and 3)",
        "The fit explains more than 90% of the energy of the kernels; networks that start from the fit are better than "
        "networks that start from random AKPs (the interval is above 0); and without training, linear probes on layer3 "
        f"of a network whose conv1 is replaced by its fit are above {COMPETITIVE:g} points of the original, and better "
        "than with a truncated SVD or a codebook of at least as many numbers.",
        tuple(PairedRows(table, *rows, 0.0) for table in ("flowers17", "imagenette") for rows in _FITTED),
        files={
            "approximation/resnet18_conv1_paper.json": (summarize_fit, "approximate.py"),
            "approximation/resnet18_conv1.json": (summarize_fit, "approximate.py"),
            "evidence/flowers17_approximations.jsonl": (summarize_approximations, "compare_approximations.py"),
        },
    ),
    Claim(
        "C4",
        "Every kind of kernel contributes measurably.",
        "the paper",
        "The Shapley value of the kind, in points of validation accuracy, is above 0.",
        measurements={Shapley: ("fashion_mnist", "flowers17")},
    ),
    Claim(
        "C5",
        "The analytical formulation increases reliability.",
        "the paper",
        "The analytic network is more accurate than the plain one under corruptions, averaged over six corruptions and "
        "five severities; under attacks (PGD), averaged over four sizes; and if it is trained on few images: the "
        "interval is above 0.",
        tuple(
            PairedRows("fashion_mnist_few", f"{row}, {share}%", f"plain, {share}%", 0.0)
            for row in ("all Gabor", "mosaic", "half plain")
            for share in (1, 3, 10, 30)
        ),
        measurements={Corruptions: ("fashion_mnist", "flowers17"), Attacks: ("fashion_mnist", "flowers17")},
    ),
    Claim(
        "C6",
        "Analytic layers can be moved to other image scales and angles in closed form.",
        "ours",
        "On rotated and rescaled images, a network whose formulas are moved is more accurate than one whose kernels "
        "are resampled, and than one that is left unchanged, and the outputs of its first analytic layer have a "
        "smaller error: the interval is above 0.",
        measurements={Transforms: ("cifar10_jpeg_choices", "flowers17")},
    ),
)


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
    for pair in claim.pairs:
        file = results / "tables" / f"{pair.table}.jsonl"
        if not file.exists():
            missing[f"`make reproduce-table TABLE={pair.table}`"] = None
        elif effect := compare_rows(pair, read_results(file)):
            effects.append(effect)
        else:
            missing[f"'{pair.row}' against '{pair.reference}' in table {pair.table}"] = None
    for measurement, tables in claim.measurements.items():
        for table in tables:
            file = results / "evidence" / f"{table}_{measurement.name}.jsonl"
            command = f"`scripts/measure.py table={table} measurement={measurement.name}`"
            if file.exists():
                _check_measurements(measurement, file, results / "tables" / f"{table}.jsonl", command)
                effects += _summarize(partial(summarize_measurements, measurement, table), file)
            else:
                missing[command] = None
    for path, (summarize, script) in claim.files.items():
        if (results / path).exists():
            effects += _summarize(summarize, results / path)
        else:
            missing[f"`scripts/{script}`"] = None
    missing |= {
        f"{effect.what} ({effect.data}): no seed in common": None for effect in effects if not effect.interval.n
    }
    return _correct_for_multiplicity([effect for effect in effects if effect.interval.n]), list(missing)


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
    for claim in CLAIMS:
        effects = effects_of[claim.name][0]
        below = [effect for effect in effects if effect.ratio is not None and effect.ratio < claim.min_ratio]
        others = [effect for effect in effects if effect not in below]
        lines.append(f"| [{claim.name}](#{claim.name.lower()}): {claim.text} | {_count_verdicts(others)} |")
        if below:
            text = f"{claim.name}, ratios of parameters below {claim.min_ratio:g}"
            lines.append(f"| {text} | {_count_verdicts(below)} |")
    lines.append("")
    for claim in CLAIMS:
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
    number = "{:+.2f}" if effect.unit == "points" else "{:.3g}"
    mean, low, high = (
        number.format(value) for value in (effect.interval.mean, effect.interval.low, effect.interval.high)
    )
    interval = "" if math.isnan(effect.interval.low) else f" [{low}, {high}]"  # of a single seed
    ratio = "" if effect.ratio is None else f"{effect.ratio:.2f}"
    verdict = f"**{effect.verdict}**" if effect.survives_correction else effect.verdict
    n_to_decide = None if effect.threshold is None else effect.interval.n_to_decide(effect.threshold)
    to_decide = "" if n_to_decide is None else f"about {n_to_decide:,} {effect.sampled}"
    return (
        f"| [{effect.data}]({effect.source}) | {effect.what} | {ratio} | {mean}{interval} {effect.unit} "
        f"| {effect.interval.n} {effect.sampled} | {verdict} | {to_decide} |"
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
