"""Effects with intervals and verdicts, computed from the records of tables and measurements."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from acl.fit_result import Fit
from evaluation.measurements import Measurement, Summary, read_measurements
from reporting.approximations import CORRECT, read_approximations
from reporting.rows import compare, compute_conv_ratio, top1_by_seed
from reporting.settings import find_plain_row, load_table_settings
from reporting.statistics import (
    Interval,
    Verdict,
    compute_margin,
    interval_of_mean,
    interval_of_ratio,
    judge,
)
from training.record import Record


@dataclass(frozen=True)
class Effect:
    """A mean with its 95% interval, and what it must exceed to be better."""

    data: str
    what: str
    unit: str
    interval: Interval
    source: str  # the file of its records, relative to results/
    threshold: float | None = 0.0  # None: a description, without a verdict
    margin: float | None = None  # of equivalence, in points; None for effects that are no difference in accuracy
    ratio: float | None = None  # convolution parameters of the reference, divided by the row's
    on_validation: Interval | None = None  # the same difference on the validation split
    survives_correction: bool = False

    @property
    def key(self) -> str:
        """What ``decisive`` in configs/claims calls it."""
        return f"{self.data}: {self.what}"

    @property
    def verdict(self) -> Verdict | None:
        return None if self.threshold is None else judge(self.interval, self.threshold, self.margin)

    @property
    def p_value_of_difference(self) -> float | None:
        return None if self.threshold is None else self.interval.p_value(self.threshold)

    @property
    def p_value_of_equivalence(self) -> float | None:
        return None if self.margin is None else self.interval.equivalence_p_value(self.margin)


def compare_rows(table: str, row: str, reference: str, records: Sequence[Record]) -> Effect | None:
    """The difference of two rows in test accuracy, paired by seed; None if one is missing or has no test results.

    Args:
        table: the name of the table.
        row, reference: the names of the two rows.
        records: of all rows of the table.
    """
    by_row: dict[str, list[Record]] = {}
    for record in records:
        by_row.setdefault(record.row or "", []).append(record)
    if not {row, reference} <= by_row.keys() or by_row[row][0].test is None:
        return None
    references = load_table_settings(table).references
    on_test, on_validation = (compare(by_row, row, reference, references, split) for split in ("test", "val"))
    return Effect(
        table,
        f"{row}, against {reference}",
        "points",
        on_test,
        f"tables/{table}.md",
        margin=compute_margin(top1_by_seed(by_row[reference]).mean()),
        ratio=compute_conv_ratio(by_row[reference], by_row[row]),
        on_validation=on_validation,
    )


def summarize_measurements(measurement: type[Measurement], table: str, file: Path) -> list[Effect]:
    """The effects in a file of ``scripts/measure.py``."""
    summaries = list(measurement.summarize(read_measurements(file, measurement)))
    if measurement.is_against_plain:
        references = list(filter(None, (find_plain_row(table), load_table_settings(table).also_against)))
        summaries = list(_subtract(summaries, references))
    return [
        Effect(
            table,
            s.what,
            s.unit,
            interval_of_mean(s.values),
            f"evidence/{file.name}",
            s.threshold,
            margin=compute_margin(s.reference_top1) if s.unit == "points" and s.threshold is not None else None,
        )
        for s in summaries
    ]


def _subtract(summaries: Sequence[Summary], references: Sequence[str]) -> Iterator[Summary]:
    """Yields the differences of the other rows from each reference, by what was measured.

    A reference is compared with those before it, without threshold: it has no formulas for a claim to hold of.
    """
    for index, reference in enumerate(references):
        values_of_reference = {summary.what: summary.values for summary in summaries if summary.row == reference}
        for summary in summaries:
            if summary.row in references[: index + 1]:
                continue
            values = values_of_reference.get(summary.what, pd.Series(dtype=float))
            yield replace(
                summary,
                what=f"{summary.row}, {summary.what}, against {reference}",
                values=summary.values - values,
                reference_top1=float(values.mean()),
                threshold=None if summary.row in references else summary.threshold,
            )


def summarize_fit(file: Path) -> list[Effect]:
    """The share of energy that the best fit explains.

    The interval is a bootstrap over filters, since the kernels of a filter resemble one another.
    """
    fit = Fit.from_json(file.read_text("utf-8"))
    kernels_per_filter = len(fit.kernels) // fit.shape[0]
    pairs = [
        (100 * kernel.r2 * energy, energy, slot // kernels_per_filter)
        for slot, (kernel, energy) in enumerate(zip(fit.kernels, fit.energies, strict=True))
        if kernel.r2 is not None
    ]
    explained, energies, filters = (pd.Series(values) for values in zip(*pairs, strict=True))
    numbers = fit.num_parameters / len(fit.kernels)
    what = f"energy of ResNet-18's conv1 explained, {fit.family} family, {numbers:.1f} numbers per kernel"
    interval = interval_of_ratio(explained, energies, filters, "filters")
    return [Effect("ImageNet", what, "%", interval, f"approximation/{file.name}", threshold=90.0)]


def summarize_approximations(file: Path) -> list[Effect]:
    """The effects of replacing a layer's kernels, from a file of ``scripts/compare_approximations.py``.

    Fits are compared with the original, and with other approximations by as many numbers that minimize the same error.
    Intervals are over test images.
    """
    lines = read_approximations(file)
    original, *approximations = lines
    source = f"evidence/{file.name}"
    effects = []
    for line in approximations:
        what = f"error of {line.layer}'s outputs, {line.method}, {line.numbers_per_kernel:.1f} numbers per kernel"
        interval = interval_of_mean(pd.Series(line.output_error_percent), sampled="images")
        effects.append(Effect(original.data, what, "%", interval, source, threshold=None))
    for key, title in CORRECT.items():
        correct = {id(line): 100 * pd.Series(values).astype(float) for line in lines if (values := getattr(line, key))}
        for fit in (line for line in approximations if line.is_fit and id(line) in correct):
            peers = [line for line in approximations if not line.is_fit and line.numbers == fit.numbers_per_kernel]
            for peer in (original, *(peer for peer in peers if peer.metric == fit.metric and id(peer) in correct)):
                against = "the original" if peer is original else peer.method
                what = f"{title}, {fit.method} with {fit.numbers_per_kernel:.3g} numbers per kernel, against {against}"
                interval = interval_of_mean(correct[id(fit)] - correct[id(peer)], sampled="images")
                margin = compute_margin(correct[id(peer)].mean())
                effects.append(Effect(original.data, what, "points", interval, source, margin=margin))
    return effects
