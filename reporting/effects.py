"""Effects with intervals, computed from the records of tables and measurements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field
from scipy.special import ndtri, stdtr

from acl.fit_result import Fit
from evaluation.measurements import Measurement, read_measurements
from reporting.settings import find_plain_row
from reporting.statistics import compute_conv_ratio, interval_of_mean, t_quantile, top1_by_seed
from training.errors import UsageError
from training.files import parse_json_lines, read_bytes
from training.record import Record, Recorded

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
    against: str | None = None
    """None: the table's plain row."""
    threshold: float = COMPETITIVE

    @property
    def reference(self) -> str:
        return self.against or find_plain_row(self.table)


def compare_rows(pair: PairedRows, records: Sequence[Record]) -> Effect | None:
    """The paired difference of two rows in test accuracy; None if the table lacks one, or the test set was not used."""
    row, against = ([record for record in records if record.row == name] for name in (pair.row, pair.reference))
    if not row or not against or row[0].test is None:
        return None
    return _make_effect(
        top1_by_seed(row) - top1_by_seed(against),
        pair.table,
        f"{pair.row}, against {pair.reference}",
        pair.threshold,
        f"tables/{pair.table}.md",
        ratio=compute_conv_ratio(against, row),
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
    """The mean of values per seed (or what ``sampled`` says), with its interval; NaN, of unshared seeds, is skipped."""
    values = values.dropna()
    n = len(values)
    standard_error = values.std() / math.sqrt(n) if n > 1 else None
    return Effect(data, what, unit, *interval_of_mean(values), n, threshold, source, ratio, sampled, standard_error)


def summarize_measurements(measurement: type[Measurement], table: str, file: Path) -> list[Effect]:
    """The effects in a file of ``scripts/measure.py``."""
    summaries = list(measurement.summarize(read_measurements(file, measurement)))
    if measurement.is_against_plain:
        plain, nothing = find_plain_row(table), pd.Series(dtype=float)
        references = {summary.what: summary.values for summary in summaries if summary.row == plain}
        summaries = [
            replace(s, what=f"{s.row}, {s.what}, against {plain}", values=s.values - references.get(s.what, nothing))
            for s in summaries
            if s.row != plain
        ]
    return [_make_effect(s.values, table, s.what, s.threshold, f"evidence/{file.name}", s.unit) for s in summaries]


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


class Approximation(Recorded):
    """A line of ``scripts/compare_approximations.py``; its lists have an entry per test image."""

    method: str
    numbers: int
    numbers_per_kernel: float
    overrides: list[str]
    layer: str
    output_error_percent: list[Annotated[float, Field(ge=0)]]
    probe_correct: list[bool]
    refitted_probe_correct: list[bool]


def summarize_approximations(file: Path) -> list[Effect]:
    """The effects of replacing a layer's kernels, from a file of ``scripts/compare_approximations.py``.

    Intervals are over test images.
    """
    lines = parse_json_lines(
        read_bytes(file),
        file,
        Approximation,
        "an approximation",
        lambda line: f"{line.method}, {line.numbers} numbers per kernel",
    )
    lists = [(line.output_error_percent, line.probe_correct, line.refitted_probe_correct) for line in lines]
    if len({len(values) for of_line in lists for values in of_line}) > 1:
        raise UsageError(f"{file} is corrupt: its lists differ in length")
    original, *approximations = lines
    data = next((word.removeprefix("data=") for word in original.overrides if word.startswith("data=")), "digits")
    source = f"evidence/{file.name}"
    effects = []
    for line in approximations:
        errors = pd.Series(line.output_error_percent)
        numbers = f"{line.numbers_per_kernel:.1f} numbers per kernel"
        what = f"error of {line.layer}'s outputs, {line.method}, {numbers}"
        effects.append(_make_effect(errors, data, what, None, source, unit="%", sampled="images"))
    for key, title in (("probe_correct", "linear probe"), ("refitted_probe_correct", "refitted linear probe")):
        correct = [(line, 100 * pd.Series(getattr(line, key)).astype(float)) for line in lines]
        fits = [(line, values) for line, values in correct if line.method == "Gabor fit"]
        for fit, values in fits:
            peers = [(line, v, 0.0) for line, v in correct[1:] if line.numbers == fit.numbers and line is not fit]
            for line, other_values, threshold in [(original, correct[0][1], COMPETITIVE), *peers]:
                other = "the original" if line is original else line.method
                what = f"{title}, Gabor fit with {fit.numbers} numbers per kernel, against {other}"
                effect = _make_effect(values - other_values, data, what, threshold, source, sampled="images")
                effects.append(effect)
    return effects
