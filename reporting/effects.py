"""Effects with intervals, computed from the records of tables and measurements."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import Field

from acl.fit_result import Fit
from evaluation.measurements import Measurement, read_measurements
from reporting.rows import compute_conv_ratio, top1_by_seed
from reporting.settings import find_plain_row
from reporting.statistics import Interval, interval_of_mean, interval_of_ratio
from training.errors import UsageError
from training.files import parse_json_lines, read_bytes
from training.record import Record, Recorded

COMPETITIVE = -1.0
"""The largest loss of accuracy, in points, that counts as competitive."""


@dataclass(frozen=True)
class Effect:
    """A mean with its 95% interval, and the threshold that it must exceed if the claim holds."""

    data: str
    what: str
    unit: str
    interval: Interval
    threshold: float | None  # None: a description, without a verdict
    source: str  # the file of its records, relative to results/
    ratio: float | None = None  # convolution parameters of the reference, divided by the row's
    sampled: str = "seeds"  # what n counts
    corrected_p_value: float | None = None  # for all effects of the claim that have a p-value

    @property
    def verdict(self) -> str:
        if self.threshold is None:
            return ""
        if self.interval.low > self.threshold:
            return "holds"
        return "does not hold" if self.interval.high < self.threshold else "undecided"

    @property
    def p_value(self) -> float | None:
        return None if self.threshold is None else self.interval.p_value(self.threshold)

    @property
    def survives_correction(self) -> bool:
        return self.corrected_p_value is not None and self.corrected_p_value < 0.05

    @property
    def is_verdict_in_points(self) -> bool:
        return self.unit == "points" and self.threshold is not None


def compare_rows(table: str, row: str, reference: str, threshold: float, records: Sequence[Record]) -> Effect | None:
    """The difference of two rows in test accuracy, paired by seed; None if one is missing or has no test results."""
    of_row, others = ([record for record in records if record.row == name] for name in (row, reference))
    if not of_row or not others or of_row[0].test is None:
        return None
    difference = interval_of_mean(top1_by_seed(of_row) - top1_by_seed(others))
    what, ratio = f"{row}, against {reference}", compute_conv_ratio(others, of_row)
    return Effect(table, what, "points", difference, threshold, f"tables/{table}.md", ratio)


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
    source = f"evidence/{file.name}"
    return [Effect(table, s.what, s.unit, interval_of_mean(s.values), s.threshold, source) for s in summaries]


def summarize_fit(file: Path) -> list[Effect]:
    """The share of energy that the best fit explains, with a bootstrap interval over the kernels."""
    fit = Fit.from_json(file.read_text("utf-8"))
    pairs = [(100 * k.r2 * e, e) for k, e in zip(fit.kernels, fit.energies, strict=True) if k.r2 is not None]
    explained, energy = (pd.Series(values) for values in zip(*pairs, strict=True))
    numbers = fit.num_parameters / len(fit.kernels)
    what = f"energy of ResNet-18's conv1 explained, {fit.family} family, {numbers:.1f} numbers per kernel"
    source = f"approximation/{file.name}"
    return [Effect("ImageNet", what, "%", interval_of_ratio(explained, energy), 90.0, source, sampled="kernels")]


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
    make_effect = partial(Effect, data, source=f"evidence/{file.name}", sampled="images")
    effects = []
    for line in approximations:
        what = f"error of {line.layer}'s outputs, {line.method}, {line.numbers_per_kernel:.1f} numbers per kernel"
        effects.append(make_effect(what, "%", interval_of_mean(pd.Series(line.output_error_percent)), None))
    for key, title in (("probe_correct", "linear probe"), ("refitted_probe_correct", "refitted linear probe")):
        correct = [(line, 100 * pd.Series(getattr(line, key)).astype(float)) for line in lines]
        for fit, values in correct:
            if fit.method != "Gabor fit":
                continue
            for peer, peer_values in correct:
                if peer is not original and (peer is fit or peer.numbers != fit.numbers):
                    continue
                name, threshold = ("the original", COMPETITIVE) if peer is original else (peer.method, 0.0)
                what = f"{title}, Gabor fit with {fit.numbers} numbers per kernel, against {name}"
                effects.append(make_effect(what, "points", interval_of_mean(values - peer_values), threshold))
    return effects
