"""A verdict on each claim of the paper, from committed records: results/CLAIMS.md and its figure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from acl.fit_result import Fit
from acl.kernels import KINDS
from reporting.measurements import read_measurements
from reporting.statistics import interval_of_mean, top1_by_seed
from reporting.table import read_results

COMPETITIVE = -1.0
"""The largest loss of accuracy, in points, that counts as competitive."""


@dataclass(frozen=True)
class Effect:
    """A number with its 95% interval, and the threshold that it must exceed if the claim holds."""

    data: str
    what: str
    unit: str
    mean: float
    low: float
    high: float
    n: int  # seeds, or kernels
    threshold: float | None  # None: a description, without a verdict
    source: str  # the file of its records, relative to results/
    ratio: float | None = None  # convolution parameters of the reference, divided by the row's

    @property
    def verdict(self) -> str:
        if self.threshold is None:
            return ""
        if self.low > self.threshold:
            return "holds"
        return "does not hold" if self.high < self.threshold else "undecided"

    @property
    def seeds_to_decide(self) -> int | None:
        """The number of seeds at which this mean and spread would give a verdict.

        None unless the effect is undecided and has an interval.
        """
        if self.verdict != "undecided" or self.threshold is None or self.mean == self.threshold or self.n < 2:
            return None
        return math.ceil(self.n * ((self.high - self.mean) / (self.mean - self.threshold)) ** 2)


@dataclass(frozen=True)
class Comparison:
    """Two rows of a table, whose accuracy is compared."""

    table: str
    row: str
    against: str
    threshold: float = COMPETITIVE


@dataclass(frozen=True)
class Claim:
    """A claim, and the records that bear on it."""

    name: str
    text: str
    source: str
    rule: str
    comparisons: tuple[Comparison, ...] = ()
    measurements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The name of a measurement -> the tables whose networks it was made on."""
    not_run: tuple[str, ...] = ()
    """What has not been measured, and what it would take."""


_PLAIN, _SCRATCH, _ALEXNET = "plain, pretrained", "plain, from scratch", "AlexNet, plain, from scratch"
_LENET_ROWS = ("all Gabor", "mosaic, no plain kernel", "mosaic, with amplitude", "half plain")
_FOUR_LAYER_ROWS = ("all Gabor", "all Gabor, with amplitude", "mosaic, no plain kernel", "half plain")
_PHOTOGRAPH_ROWS = {
    "exp1: Gabor, pretrained": _PLAIN,
    "exp1 fitted, with amplitude, pretrained": _PLAIN,
    "exp1 fitted, extended, with amplitude, pretrained": _PLAIN,
    "exp2: mosaic, no plain kernel, pretrained": _PLAIN,
    "exp3: the paper's, half plain, pretrained": _PLAIN,
    "exp3 fitted, pretrained": _PLAIN,
    "auto, extended, with amplitude, pretrained": _PLAIN,
    "exp3: the paper's, half plain, from scratch": _SCRATCH,
    "AlexNet, exp3, from scratch": _ALEXNET,
}
_FITTED = (
    ("exp1 fitted, with amplitude, pretrained", "exp1: Gabor, pretrained"),
    ("exp1 fitted, extended, with amplitude, pretrained", "exp1: Gabor, pretrained"),
    ("exp3 fitted, pretrained", "exp3: the paper's, half plain, pretrained"),
)

CLAIMS = (
    Claim(
        "C1",
        "Analytic networks are competitive in accuracy with far fewer parameters.",
        "the paper",
        f"The accuracy is competitive if the whole interval of the paired difference is above {COMPETITIVE:g} points.",
        (
            *(Comparison(table, row, "LeNet-5 plain") for table in ("mnist", "fashion_mnist") for row in _LENET_ROWS),
            *(Comparison("cifar10_jpeg", row, "four-layer plain 5 x 5") for row in _FOUR_LAYER_ROWS),
            *(Comparison("flowers17", row, against) for row, against in _PHOTOGRAPH_ROWS.items()),
            *(Comparison("imagenette", row, _PLAIN) for row, against in _PHOTOGRAPH_ROWS.items() if against == _PLAIN),
        ),
    ),
    Claim(
        "C2",
        "AKPs that learn adapt to the data.",
        "the paper",
        "Learned AKPs are better than AKPs that stay at their random initial values: the interval is above 0. The "
        "distances that AKPs travel during training have no verdict.",
        tuple(
            Comparison(table, "all Gabor", "all Gabor, frozen at random", 0.0)
            for table in ("mnist", "fashion_mnist", "cifar10_jpeg")
        ),
        {"akp_travel": ("flowers17",)},
    ),
    Claim(
        "C3",
        "Pretrained kernels are approximated by a few AKPs.",
        "the paper (figures 1 and 3)",
        "The fit explains more than 90% of the energy of the kernels, and networks that start from the fit are better "
        "than networks that start from random AKPs: the interval is above 0.",
        tuple(Comparison(table, *rows, 0.0) for table in ("flowers17", "imagenette") for rows in _FITTED),
    ),
    Claim(
        "C4",
        "Every kind of kernel contributes measurably.",
        "the paper",
        "The Shapley value of the kind, in points of validation accuracy, is above 0.",
        measurements={"shapley": ("flowers17",)},
    ),
    Claim(
        "C5",
        "The analytical formulation increases reliability.",
        "the paper",
        "Under corruptions, averaged over six corruptions and five severities, the analytic network is more accurate "
        "than the plain one: the interval is above 0.",
        measurements={"corruptions": ("flowers17",)},
        not_run=(
            "adversarial attacks (PGD)",
            "training on 1, 3, 10 and 30% of the images",
        ),
    ),
    Claim(
        "C6",
        "Analytic layers can be moved to other image scales and angles in closed form.",
        "ours",
        "The outputs have a smaller error than with kernels that are resampled.",
        not_run=("a comparison of `acl.rescale` and `acl.rotate` with resampled kernels on trained networks",),
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
    for comparison in claim.comparisons:
        file = results / "tables" / f"{comparison.table}.jsonl"
        if not file.exists():
            missing[f"`make reproduce-table TABLE={comparison.table}`"] = None
        elif effect := _compare(comparison, read_results(file)):
            effects.append(effect)
        else:
            missing[f"'{comparison.row}' against '{comparison.against}' in table {comparison.table}"] = None
    for name, tables in claim.measurements.items():
        for table in tables:
            file = results / "evidence" / f"{table}_{name}.jsonl"
            if file.exists():
                effects += _SUMMARIES[name](read_measurements(file), table, f"evidence/{file.name}")
            else:
                missing[f"`scripts/measure.py table={table} measurement={name}`"] = None
    fit_file = results / "approximation" / "resnet18_conv1.json"
    if claim.name == "C3" and fit_file.exists():
        effects.insert(0, _summarize_fit(fit_file))
    return effects, list(missing)


def _compare(comparison: Comparison, records: list[dict[str, Any]]) -> Effect | None:
    """The paired difference of two rows in test accuracy; None if the table has not both of them."""
    row, against = (
        [record for record in records if record["row"] == name] for name in (comparison.row, comparison.against)
    )
    if not row or not against:
        return None
    difference = (top1_by_seed(row) - top1_by_seed(against)).dropna()
    return Effect(
        comparison.table,
        f"{comparison.row}, against {comparison.against}",
        "points",
        *interval_of_mean(difference),
        len(difference),
        comparison.threshold,
        f"tables/{comparison.table}.md",
        against[0]["parameters"]["conv"] / row[0]["parameters"]["conv"],
    )


def _summarize_akp_travel(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    return [
        Effect(table, f"distance traveled by {akp} of {KINDS[symbol].name} in {row}", unit, *interval, n, None, source)
        for row, name, interval, n in _average_over_seeds(measurements)
        for symbol, akp in [name.split("/")]
        for unit in [_get_display_unit(symbol, akp)]
    ]


def _get_display_unit(symbol: str, akp_name: str) -> str:
    akps = KINDS[symbol].akps("extended", amplitude=True)
    return next(akp.unit for akp in akps if akp.name == akp_name).replace("rad", "degrees")


def _summarize_shapley(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    return [
        Effect(table, f"{KINDS[symbol].name} in {row}", "points", *interval, n, 0.0, source)
        for row, symbol, interval, n in _average_over_seeds(measurements)
    ]


def _summarize_corruptions(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    """The paired difference of each row from its plain row, in accuracy averaged over corruptions and severities."""
    accuracies: dict[str, dict[int, float]] = {}
    for line in measurements:
        by_corruption = [values for name, values in line["values"].items() if name != "none"]
        mean = sum(sum(values) / len(values) for values in by_corruption) / len(by_corruption)
        accuracies.setdefault(line["row"], {})[line["seed"]] = mean
    effects = []
    for row, against in _PHOTOGRAPH_ROWS.items():
        if row in accuracies and against in accuracies:
            difference = (pd.Series(accuracies[row]) - pd.Series(accuracies[against])).dropna()
            what = f"{row}, against {against}"
            effects.append(Effect(table, what, "points", *interval_of_mean(difference), len(difference), 0.0, source))
    return effects


def _average_over_seeds(
    measurements: list[dict[str, Any]],
) -> Iterable[tuple[str, str, tuple[float, float, float], int]]:
    """Yields each row and name of a value, with the mean over seeds, its interval and the number of seeds."""
    values = [(line["row"], name, value) for line in measurements for name, value in line["values"].items()]
    frame = pd.DataFrame(values, columns=["row", "name", "value"])
    for (row, name), group in frame.groupby(["row", "name"], sort=False):
        yield row, name, interval_of_mean(group["value"]), len(group)


_SUMMARIES = {
    "akp_travel": _summarize_akp_travel,
    "shapley": _summarize_shapley,
    "corruptions": _summarize_corruptions,
}


def _summarize_fit(file: Path) -> Effect:
    """The share of energy that the best fit explains, with a bootstrap interval over the kernels."""
    fit = Fit.from_json(file.read_text("utf-8"))
    pairs = [(k.r2 * e, e) for k, e in zip(fit.kernels, fit.energies, strict=True) if k.r2 is not None]
    explained, energy = (pd.Series(values) for values in zip(*pairs, strict=True))
    resampled = []
    for seed in range(1000):
        sample = explained.sample(frac=1, replace=True, random_state=seed).index
        resampled.append(100 * explained[sample].sum() / energy[sample].sum())
    low, high = pd.Series(resampled).quantile([0.025, 0.975])
    what = f"energy of ResNet-18's conv1 explained at {fit.num_parameters / len(fit.kernels):.1f} numbers per kernel"
    mean = 100 * explained.sum() / energy.sum()
    return Effect("ImageNet", what, "%", mean, low, high, len(pairs), 90.0, "approximation/resnet18_conv1.md")


def render_claims(effects_of: Mapping[str, tuple[list[Effect], list[str]]]) -> str:
    """Renders the page; ``effects_of`` maps the name of each claim to what ``collect_effects`` returns."""
    lines = [
        "# Claims and verdicts",
        "",
        "Written by `make claims` from the records in this folder. An effect *holds* if its whole 95% interval is "
        "above the claim's threshold, *does not hold* if the whole interval is below it, and is *undecided* otherwise. "
        "Intervals are t-intervals over paired seeds, except that of the fit, which is a bootstrap over kernels. They "
        "are not adjusted for the number of comparisons, so about 1 in 20 misses its true value. *To decide* is the "
        "number of seeds at which the same mean and spread would give a verdict.",
        "",
        "| claim | holds | does not hold | undecided |",
        "|---|---:|---:|---:|",
    ]
    for claim in CLAIMS:
        verdicts = [effect.verdict for effect in effects_of[claim.name][0]]
        counts = [str(verdicts.count(verdict)) for verdict in ("holds", "does not hold", "undecided")]
        lines.append(f"| [{claim.name}](#{claim.name.lower()}): {claim.text} | {' | '.join(counts)} |")
    lines += ["", "![Effects with their 95% intervals](claims.png)", ""]
    for claim in CLAIMS:
        effects, missing = effects_of[claim.name]
        lines += [f"## {claim.name}", "", f"**{claim.text}** Source: {claim.source}. {claim.rule}", ""]
        if effects:
            lines += [
                "| data | effect | plain / row | estimate | n | verdict | to decide |",
                "|---|---|---:|---:|---:|---|---|",
                *map(_format_effect, effects),
                "",
            ]
        lines += [f"- Not run: {item}." for item in (*missing, *claim.not_run)]
        lines += [""] if missing or claim.not_run else []
    return "\n".join(lines).rstrip() + "\n"


def _format_effect(effect: Effect) -> str:
    number = "{:+.2f}" if effect.unit == "points" else "{:.3g}"
    mean, low, high = (number.format(value) for value in (effect.mean, effect.low, effect.high))
    ratio = "" if effect.ratio is None else f"{effect.ratio:.2f}"
    to_decide = "" if effect.seeds_to_decide is None else f"about {effect.seeds_to_decide} seeds"
    return (
        f"| [{effect.data}]({effect.source}) | {effect.what} | {ratio} | {mean} [{low}, {high}] {effect.unit} "
        f"| {effect.n} | {effect.verdict} | {to_decide} |"
    )


def draw_effects(effects_of: Mapping[str, tuple[list[Effect], list[str]]]) -> Figure:
    """Draws all effects in points that have a verdict, one panel per claim."""
    panels = {
        claim: [effect for effect in effects if effect.unit == "points" and effect.threshold is not None]
        for claim, (effects, _) in effects_of.items()
    }
    panels = {claim: effects for claim, effects in panels.items() if effects}
    sizes = [len(effects) + 1.5 for effects in panels.values()]
    figure = Figure(figsize=(10, 0.24 * sum(sizes) + 0.5), layout="constrained")
    subplots = figure.subplots(len(panels), 1, height_ratios=sizes, squeeze=False)[:, 0]
    colors = {"holds": "tab:green", "does not hold": "tab:red", "undecided": "tab:gray"}
    for axes, (claim, effects) in zip(subplots, panels.items(), strict=True):
        for position, effect in enumerate(effects):
            error = [[effect.mean - effect.low], [effect.high - effect.mean]]
            axes.errorbar(effect.mean, -position, xerr=error, fmt="o", markersize=4, color=colors[effect.verdict])
            axes.plot([effect.threshold] * 2, [-position - 0.5, -position + 0.5], color="black", linewidth=0.8)
        axes.set_yticks([-i for i in range(len(effects))], [f"{e.data}: {e.what}" for e in effects], fontsize=7)
        axes.set_title(claim, loc="left", fontsize=9)
        axes.margins(y=0.5 / len(effects))
        axes.grid(axis="x", alpha=0.3)
    meanings = ", ".join(f"{color.removeprefix('tab:')}: {verdict}" for verdict, color in colors.items())
    figure.supxlabel(f"points of accuracy; black line: the claim's threshold; {meanings}", fontsize=9)
    return figure
