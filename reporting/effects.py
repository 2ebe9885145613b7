"""Effects with intervals, computed from the records of tables and measurements."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.special import ndtri, stdtr

from acl.fit_result import Fit
from acl.kernels import KINDS
from reporting.json_lines import read_json_lines
from reporting.measurements import read_measurements
from reporting.statistics import interval_of_mean, t_quantile, top1_by_seed

COMPETITIVE = -1.0
"""The largest loss of accuracy, in points, that counts as competitive."""
PLAIN_ROWS = {
    "mnist": "LeNet-5 plain",
    "fashion_mnist": "LeNet-5 plain",
    "cifar10_jpeg": "four-layer plain 5 x 5",
    "flowers17": "plain, pretrained",
    "imagenette": "plain, pretrained",
}
"""The row of a table that the measurements of its other rows are compared with."""


@dataclass(frozen=True)
class Effect:
    """A number with its 95% interval, and the threshold that it must exceed if the claim holds."""

    data: str
    what: str
    unit: str
    mean: float
    low: float
    high: float
    n: int
    threshold: float | None  # None: a description, without a verdict
    source: str  # the file of its records, relative to results/
    ratio: float | None = None  # convolution parameters of the reference, divided by the row's
    sampled: str = "seeds"  # what n counts
    standard_error: float | None = None  # of the mean; None for an interval that is not a t-interval
    corrected_p_value: float | None = None  # for all effects of the claim that have a p-value

    @property
    def verdict(self) -> str:
        if self.threshold is None:
            return ""
        if self.low > self.threshold:
            return "holds"
        return "does not hold" if self.high < self.threshold else "undecided"

    @property
    def survives_correction(self) -> bool:
        return self.corrected_p_value is not None and self.corrected_p_value < 0.05

    @property
    def is_verdict_in_points(self) -> bool:
        return self.unit == "points" and self.threshold is not None

    @property
    def num_to_decide(self) -> int | None:
        """The number of seeds (or what ``sampled`` says) at which this mean and spread would give a verdict.

        None unless the effect is undecided, has a t-interval and differs from the threshold.
        """
        distance = self._distance
        if self.verdict != "undecided" or self.standard_error is None or not distance:
            return None
        standard_deviation = self.standard_error * math.sqrt(self.n)
        n = max(self.n, math.ceil((float(ndtri(0.975)) * standard_deviation / distance) ** 2))
        while t_quantile(n) * standard_deviation / math.sqrt(n) >= distance:
            n += 1
        return n

    @property
    def p_value(self) -> float | None:
        """Of a two-sided t-test of the mean against the threshold; None without a threshold or a t-interval."""
        if self.threshold is None or self.standard_error is None:
            return None
        if not self.standard_error:
            return 0.0 if self._distance else 1.0
        return 2 * float(stdtr(self.n - 1, -self._distance / self.standard_error))

    @property
    def _distance(self) -> float:
        """Between the mean and the threshold; rounding errors, as of differences that cancel, count as 0."""
        distance = 0.0 if self.threshold is None else abs(self.mean - self.threshold)
        return distance if distance > 1e-9 else 0.0


@dataclass(frozen=True)
class PairedRows:
    """Two rows of a table, whose accuracies are compared by seed."""

    table: str
    row: str
    against: str
    threshold: float = COMPETITIVE


def compare_rows(pair: PairedRows, records: list[dict[str, Any]]) -> Effect | None:
    """The paired difference of two rows in test accuracy; None if the table lacks one, or the test set was not used."""
    row, against = ([record for record in records if record["row"] == name] for name in (pair.row, pair.against))
    if not row or not against or row[0]["test"] is None:
        return None
    return _make_effect(
        top1_by_seed(row) - top1_by_seed(against),
        pair.table,
        f"{pair.row}, against {pair.against}",
        pair.threshold,
        f"tables/{pair.table}.md",
        ratio=against[0]["parameters"]["conv"] / row[0]["parameters"]["conv"],
    )


def _make_effect(
    values: "pd.Series[Any]",
    data: str,
    what: str,
    threshold: float | None,
    source: str,
    unit: str = "points",
    ratio: float | None = None,
    sampled: str = "seeds",
) -> Effect:
    """The mean of values per seed (or what ``sampled`` says), with its interval; missing values are left out."""
    values = values.dropna()
    n = len(values)
    standard_error = values.std() / math.sqrt(n) if n > 1 else None
    return Effect(data, what, unit, *interval_of_mean(values), n, threshold, source, ratio, sampled, standard_error)


def _summarize_akp_travel(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    return [
        _make_effect(values, table, f"distance traveled by {akp} of {KINDS[symbol].name} in {row}", None, source, unit)
        for row, name, values in _group_by_row_and_name(measurements)
        for symbol, akp in [name.split("/")]
        for unit in [KINDS[symbol].get_unit(akp).replace("rad", "degrees")]
    ]


def _summarize_replaced_akps(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    """Trained AKPs against initial ones, and, without a verdict, against redrawn ones."""
    accuracies = {(row, akps): values for row, akps, values in _group_by_row_and_name(measurements)}
    return [
        _make_effect(
            accuracies[row, "trained"] - accuracies[row, akps],
            table,
            f"{row}: AKPs trained, against {akps} ones",
            threshold,
            source,
        )
        for row in dict.fromkeys(row for row, _ in accuracies)
        for akps, threshold in (("initial", 0.0), ("redrawn", None))
    ]


def _summarize_shapley(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    return [
        _make_effect(values, table, f"{KINDS[symbol].name} in {row}", 0.0, source)
        for row, symbol, values in _group_by_row_and_name(measurements)
    ]


def _summarize_corruptions(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    """The effect averaged over corruptions, which has the verdict, then of each corruption."""

    def average(values: dict[str, Any], names: Sequence[str]) -> float:
        return sum(sum(values[name]) / len(values[name]) for name in names) / len(names)

    names = [name for name in measurements[0]["values"] if name != "none"]
    groups: list[tuple[str, list[str], float | None]] = [("corruptions", names, 0.0)]
    groups += [(name, [name], None) for name in names]
    return [
        effect
        for title, members, threshold in groups
        for effect in _compare_with_plain(
            measurements, partial(average, names=members), f"under {title}", threshold, table, source
        )
    ]


def _summarize_attacks(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    def average(values: dict[str, float]) -> float:
        under_attack = [accuracy for size, accuracy in values.items() if size != "0"]
        return sum(under_attack) / len(under_attack)

    return _compare_with_plain(measurements, average, "under attacks", 0.0, table, source)


def _compare_with_plain(
    measurements: list[dict[str, Any]],
    score: Callable[[Any], float],
    condition: str,
    threshold: float | None,
    table: str,
    source: str,
) -> list[Effect]:
    """The paired difference of each row from its table's plain row."""
    scores: dict[str, dict[int, float]] = {}
    for line in measurements:
        scores.setdefault(line["row"], {})[line["seed"]] = score(line["values"])
    plain = scores.get(PLAIN_ROWS[table], {})
    return [
        _make_effect(
            pd.Series(by_seed) - pd.Series(plain),
            table,
            f"{row}, {condition}, against {PLAIN_ROWS[table]}",
            threshold,
            source,
        )
        for row, by_seed in scores.items()
        if row != PLAIN_ROWS[table] and by_seed.keys() & plain.keys()
    ]


def _summarize_transforms(measurements: list[dict[str, Any]], table: str, source: str) -> list[Effect]:
    """Compares formulas that are moved with kernels that are resampled, and with a network that is left unchanged."""
    frame = pd.DataFrame(
        [
            (line["row"], line["seed"], transform, float(amount), way, values["top1"], values["error"])
            for line in measurements
            for transform, by_amount in line["values"].items()
            for amount, ways in by_amount.items()
            for way, values in ways.items()
        ],
        columns=["row", "seed", "transform", "amount", "way", "top1", "error"],
    )
    effects = []
    for row, of_row in frame.groupby("row", sort=False):
        # At 90 degrees, moved and resampled kernels are the same: no pixel is interpolated.
        is_oblique = (of_row["transform"] == "rotation") & (of_row["amount"] < 90)
        angles = of_row["amount"][is_oblique]
        groups = {f"rotated by {angles.min():g} to {angles.max():g} degrees": is_oblique}
        for factor in sorted(of_row["amount"][of_row["transform"] == "scale"].unique()):
            groups[f"scaled by {factor:g}"] = (of_row["transform"] == "scale") & (of_row["amount"] == factor)
        for title, is_member in groups.items():
            means = of_row[is_member].groupby(["seed", "way"])[["top1", "error"]].mean().unstack()
            for way in ("resampled", "unchanged"):
                difference = means["top1", "closed form"] - means["top1", way]
                what = f"{row}, images {title}: formulas moved, against kernels {way}"
                effects.append(_make_effect(difference, table, what, 0.0, source))
            difference = means["error", "resampled"] - means["error", "closed form"]
            what = f"{row}, images {title}: error of outputs, kernels resampled, against formulas moved"
            effects.append(_make_effect(difference, table, what, 0.0, source, unit="%"))
    return effects


def _group_by_row_and_name(measurements: list[dict[str, Any]]) -> Iterable[tuple[str, str, "pd.Series[Any]"]]:
    """Yields each row and name of a value, with the values by seed."""
    values = [
        (line["row"], line["seed"], name, value) for line in measurements for name, value in line["values"].items()
    ]
    frame = pd.DataFrame(values, columns=["row", "seed", "name", "value"]).set_index("seed")
    for (row, name), group in frame.groupby(["row", "name"], sort=False):
        yield row, name, group["value"]


_SUMMARIES = {
    "akp_travel": _summarize_akp_travel,
    "replaced_akps": _summarize_replaced_akps,
    "shapley": _summarize_shapley,
    "corruptions": _summarize_corruptions,
    "attacks": _summarize_attacks,
    "transforms": _summarize_transforms,
}


def summarize_measurements(name: str, table: str, file: Path) -> list[Effect]:
    """The effects in a file of ``scripts/measure.py``; ``name`` is that of the measurement."""
    return _SUMMARIES[name](read_measurements(file), table, f"evidence/{file.name}")


def summarize_fit(file: Path) -> list[Effect]:
    """The share of energy that the best fit explains, with a bootstrap interval over the kernels."""
    fit = Fit.from_json(file.read_text("utf-8"))
    pairs = [(k.r2 * e, e) for k, e in zip(fit.kernels, fit.energies, strict=True) if k.r2 is not None]
    explained, energy = (pd.Series(values) for values in zip(*pairs, strict=True))
    resampled = []
    for seed in range(1000):
        sample = explained.sample(frac=1, replace=True, random_state=seed).index
        resampled.append(100 * explained[sample].sum() / energy[sample].sum())
    low, high = pd.Series(resampled).quantile([0.025, 0.975])
    numbers = fit.num_parameters / len(fit.kernels)
    what = f"energy of ResNet-18's conv1 explained, {fit.family} family, {numbers:.1f} numbers per kernel"
    mean = 100 * explained.sum() / energy.sum()
    source = f"approximation/{file.name}"
    return [Effect("ImageNet", what, "%", mean, low, high, len(pairs), 90.0, source, sampled="kernels")]


def summarize_approximations(file: Path) -> list[Effect]:
    """The effects of replacing a layer's kernels, from a file of ``scripts/compare_approximations.py``.

    Intervals are over test images.
    """
    keys = {"method", "numbers", "numbers_per_kernel", "output_error_percent", "overrides", "layer"}
    lines = read_json_lines(file, keys | {"probe_correct", "refitted_probe_correct"}, "an approximation")
    original, *approximations = lines
    data = next((word.removeprefix("data=") for word in original["overrides"] if word.startswith("data=")), "digits")
    source = f"evidence/{file.name}"
    effects = []
    for line in approximations:
        errors = pd.Series(line["output_error_percent"])
        numbers = f"{line['numbers_per_kernel']:.1f} numbers per kernel"
        what = f"error of {line['layer']}'s outputs, {line['method']}, {numbers}"
        effects.append(_make_effect(errors, data, what, None, source, unit="%", sampled="images"))
    for key, title in (("probe_correct", "linear probe"), ("refitted_probe_correct", "refitted linear probe")):
        correct = [(line, 100 * pd.Series(line[key]).astype(float)) for line in lines]
        fits = [(line, values) for line, values in correct if line["method"] == "Gabor fit"]
        for fit, values in fits:
            peers = [(line, v, 0.0) for line, v in correct[1:] if line["numbers"] == fit["numbers"] and line is not fit]
            for line, other_values, threshold in [(original, correct[0][1], COMPETITIVE), *peers]:
                other = "the original" if line is original else line["method"]
                what = f"{title}, Gabor fit with {fit['numbers']} numbers per kernel, against {other}"
                effect = _make_effect(values - other_values, data, what, threshold, source, sampled="images")
                effects.append(effect)
    return effects
