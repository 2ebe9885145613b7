"""Intervals, tests and verdicts: the place to change for another method (and then its description in the pages)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

# scipy.stats is imported where it is used, since the import takes most of a second.

Verdict = Literal["equivalent", "better", "worse", "undecided"]


@dataclass(frozen=True)
class Interval:
    """The mean of ``n`` values with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int
    sampled: str = "seeds"
    """What the interval covers: what ``n`` counts, and other sources of chance."""
    standard_error: float | None = None
    """Of the mean; None for a single value and for a bootstrap."""
    degrees: float = math.nan
    """The degrees of freedom of the standard error."""

    def p_value(self, threshold: float) -> float | None:
        """Of a two-sided t-test of the mean against the threshold; None without a standard error."""
        if self.standard_error is None:
            return None
        distance = abs(self.mean - threshold)
        return 2 * self._tail(distance if distance > 1e-9 else 0.0)  # differences that cancel leave rounding errors

    def equivalence_p_value(self, margin: float) -> float | None:
        """Of two one-sided t-tests that the mean lies within ``margin`` of 0; None without a standard error.

        It is below 5% if the 90% interval lies within the margin. Source: Schuirmann, A comparison of the two one-sided
        tests procedure and the power approach for assessing the equivalence of average bioavailability, 1987.
        """
        return None if self.standard_error is None else self._tail(margin - abs(self.mean))

    def _tail(self, distance: float) -> float:
        """The probability that a mean of 0 exceeds ``distance``."""
        if not self.standard_error:
            return 0.0 if distance > 0 else 0.5
        from scipy import stats

        return float(stats.t.sf(distance / self.standard_error, self.degrees))


def judge(interval: Interval, threshold: float = 0.0, margin: float | None = None) -> Verdict:
    """The verdict on a mean.

    Args:
        interval: the mean with its interval.
        threshold: what a ``better`` mean exceeds with its whole 95% interval, and a ``worse`` one falls short of.
        margin: a mean that is shown to lie within it of 0, at 5%, is ``equivalent``, even if also better or worse.
    """
    p_value = None if margin is None else interval.equivalence_p_value(margin)
    if p_value is not None and p_value < 0.05:
        return "equivalent"
    if interval.low > threshold:
        return "better"
    return "worse" if interval.high < threshold else "undecided"


def compute_margin(reference_top1: float | None) -> float:
    """The largest difference in accuracy that counts as equivalent, in points.

    It is 1 point or 10% of the reference's errors, whichever is smaller; 1 point if its accuracy in percent is unknown.
    """
    return 1.0 if reference_top1 is None else min(1.0, 0.1 * (100 - reference_top1))


def interval_of_mean(values: "pd.Series[Any]", confidence: float = 0.95, sampled: str = "seeds") -> Interval:
    """Mean and its t-interval, which is NaN for a single value.

    NaN values are skipped: the difference of two series has them at indices, such as seeds, that only one has.
    """
    values = values.dropna()
    mean, n = values.mean(), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n, sampled)
    return _make_interval(mean, n, sampled, _Variance(values.var() / n, n - 1), confidence)


@dataclass(frozen=True)
class _Variance:
    """Of a mean, with its degrees of freedom."""

    value: float
    degrees: float

    def half_width(self, confidence: float = 0.95) -> float:
        from scipy import stats

        return float(stats.t.ppf((1 + confidence) / 2, self.degrees)) * math.sqrt(self.value)


def _make_interval(mean: float, n: int, sampled: str, variance: _Variance, confidence: float = 0.95) -> Interval:
    half_width = variance.half_width(confidence)
    return Interval(mean, mean - half_width, mean + half_width, n, sampled, math.sqrt(variance.value), variance.degrees)


def interval_of_difference(
    accuracies: pd.DataFrame, row: str, reference: str, correct: tuple[NDArray[Any], NDArray[Any]] | None = None
) -> Interval:
    """The mean difference of two rows in accuracy, paired by seed, with its interval.

    The variance over seeds is the residual mean square of the two-way table rows x seeds, over the rows that
    ``select_similar`` finds if both are among them, otherwise over these two alone (the paired t-interval). If it is
    known which test images were correct, the interval also covers the choice of the images.

    Args:
        accuracies: in percent, a line per row and a column per seed; NaN where a run is missing. The first line is that
            of the row which the table compares the others with.
        row, reference: the rows to compare.
        correct: 0 or 1 for each seed that both have, and each image, (seeds, images), of the row and of the reference.
    """
    differences = (accuracies.loc[row] - accuracies.loc[reference]).dropna()
    if row == reference or len(differences) < 2:
        return interval_of_mean(differences)
    similar = select_similar(accuracies)
    is_shared = {row, reference} <= {*similar}
    values = accuracies.loc[similar if is_shared else [row, reference], differences.index]
    sampled = "seeds (shared variance)" if is_shared else "seeds"
    variance = _estimate_seed_variance(values.to_numpy())
    if correct is not None:
        by_image = 100 * (correct[0].astype(float) - correct[1])
        variance = _add_image_variance(variance, by_image)
        sampled += f" and {by_image.shape[1]:,} images"
    return _make_interval(differences.mean(), len(differences), sampled, variance)


SIMILAR_ERRORS = 2.0
"""Rows that share a variance have at most this many times more or fewer errors than the row they are compared with."""
SIMILAR_P_VALUE = 0.2
"""Rows do not share a variance if Bartlett's test finds theirs to differ at this level."""


def select_similar(accuracies: pd.DataFrame) -> list[str]:
    """Selects the rows that share one variance over seeds; none if fewer than three do.

    A pair of 3 to 5 seeds leaves 2 to 4 degrees of freedom, so intervals of equal rows differ several times in width.
    Rows with every seed and about as many errors as the first one share a variance unless Bartlett's test rejects: the
    spread of an accuracy follows its errors, and the level of the test is high because its power is low (Bancroft, On
    biases in estimation due to the use of preliminary tests of significance, 1944). Means do not depend on variances,
    so selecting by errors favors no narrow interval. Arguments as for ``interval_of_difference``.
    """
    complete = accuracies.dropna()
    if accuracies.shape[1] < 2 or accuracies.index[0] not in complete.index:
        return []
    errors = 100 - complete.mean(axis="columns")
    ratios = errors / errors.iloc[0]
    similar = complete[ratios.between(1 / SIMILAR_ERRORS, SIMILAR_ERRORS)]
    if len(similar) < 3 or (similar.var(axis="columns") < 1e-12).any():
        return []
    from scipy import stats

    p_value = stats.bartlett(*similar.to_numpy()).pvalue
    return list(similar.index) if p_value >= SIMILAR_P_VALUE else []


def _estimate_seed_variance(accuracies: NDArray[Any]) -> _Variance:
    """The variance of a difference of two rows, from the residuals of (rows, seeds)."""
    rows, seeds = accuracies.shape
    residuals = accuracies - accuracies.mean(0) - accuracies.mean(1, keepdims=True) + accuracies.mean()
    degrees = (rows - 1) * (seeds - 1)
    return _Variance(2 * float((residuals**2).sum()) / degrees / seeds, degrees)


def _add_image_variance(of_seeds: _Variance, differences: NDArray[Any]) -> _Variance:
    """The variance of the mean of (seeds, images) if both are random and crossed.

    With the mean squares of the two-way table, it is (MS_seeds + MS_images - MS_rest) / (seeds * images), whose first
    term is ``of_seeds``. The degrees of freedom are those of Satterthwaite, An approximate distribution of estimates of
    variance components, 1946. Where MS_rest exceeds one of the others, that source adds nothing, and the sum would have
    less than one degree of freedom: the interval is then that of one source. It is never narrower than that of seeds or
    images alone. The model is that of Owen, The pigeonhole bootstrap, 2007, whose bootstrap covers too little with 3 to
    5 seeds.
    """
    seeds, images = differences.shape
    by_image = differences.mean(0)
    residuals = differences - by_image - differences.mean(1, keepdims=True) + differences.mean()
    of_images = _Variance(by_image.var(ddof=1) / images, images - 1)
    degrees = (seeds - 1) * (images - 1)
    of_rest = _Variance(float((residuals**2).sum()) / degrees / differences.size, degrees)
    candidates = [of_seeds, of_images]
    if of_rest.value < min(of_seeds.value, of_images.value):
        total = of_seeds.value + of_images.value - of_rest.value
        spread = sum(part.value**2 / part.degrees for part in (of_seeds, of_images, of_rest))
        candidates.append(_Variance(total, total**2 / spread))
    return max(candidates, key=_Variance.half_width)


def interval_of_ratio(
    numerators: "pd.Series[Any]", denominators: "pd.Series[Any]", groups: "pd.Series[Any]", sampled: str
) -> Interval:
    """The ratio of two sums with its 95% interval, a bootstrap over groups of dependent values."""
    sums = pd.DataFrame({"numerator": numerators, "denominator": denominators}).groupby(groups).sum().to_numpy()
    samples = np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))
    resampled = sums[samples].sum(1)
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1], [0.025, 0.975])
    return Interval(numerators.sum() / denominators.sum(), float(low), float(high), len(sums), sampled)


def chance_difference(values: "pd.Series[Any]", groups: "pd.Series[Any]", n: int, confidence: float) -> float:
    """How far two means over ``n`` values differ by chance: half the interval of their difference.

    The variance is pooled over the groups, since the values of one group are few. NaN if every group has one value.
    """
    from scipy import stats

    degrees = len(values) - groups.nunique()
    if degrees == 0:
        return math.nan
    variance = (values - values.groupby(groups).transform("mean")).pow(2).sum() / degrees
    return float(stats.t.ppf((1 + confidence) / 2, degrees)) * math.sqrt(2 * variance / n)


def find_significant(p_values: Sequence[float | None]) -> list[bool]:
    """Which p-values stay below 5% under Holm's correction for all that are not None.

    The chance that any does is then at most 5% if no effect exists. Source: Holm, A simple sequentially rejective
    multiple test procedure, 1979.
    """
    known = pd.Series(p_values, dtype=float).dropna().sort_values()
    corrected = (known * np.arange(len(known), 0, -1)).cummax()
    return (corrected < 0.05).reindex(range(len(p_values)), fill_value=False).tolist()
