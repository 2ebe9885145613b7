"""Intervals and tests: the place to change for another method (and then the prose about it in reporting/claims.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

# scipy.stats is imported where it is used, since the import takes most of a second.


@dataclass(frozen=True)
class Interval:
    """The mean of ``n`` values with its interval."""

    mean: float
    low: float
    high: float
    n: int
    standard_error: float | None = None
    """Of the mean; None for a single value and for methods that do not assume a t-distribution."""
    method: str = "t-interval"

    def p_value(self, threshold: float) -> float | None:
        """Of a two-sided t-test of the mean against the threshold; None without a standard error."""
        if self.standard_error is None:
            return None
        if not self.standard_error:
            return 0.0 if self._distance(threshold) else 1.0
        from scipy import stats

        return 2 * float(stats.t.sf(self._distance(threshold) / self.standard_error, self.n - 1))

    def n_to_decide(self, threshold: float) -> int | None:
        """The number of values at which an interval with this mean and spread would exclude the threshold.

        None if this one does, if the mean equals the threshold, and without a standard error.
        """
        from scipy import stats

        distance = self._distance(threshold)
        if self.standard_error is None or not distance or not self.low <= threshold <= self.high:
            return None
        deviations = distance / self.standard_error / math.sqrt(self.n)
        n = max(self.n, math.ceil((float(stats.norm.ppf(0.975)) / deviations) ** 2))
        while stats.t.ppf(0.975, n - 1) >= deviations * math.sqrt(n):
            n += 1
        return n

    def _distance(self, threshold: float) -> float:
        """Between mean and threshold; rounding errors, as of differences that cancel, count as 0."""
        distance = abs(self.mean - threshold)
        return distance if distance > 1e-9 else 0.0


def interval_of_mean(values: "pd.Series[Any]", confidence: float = 0.95) -> Interval:
    """Mean and its interval, which is NaN for a single value.

    NaN values are skipped: the difference of two series has them at indices, such as seeds, that only one has.
    """
    from scipy import stats

    values = values.dropna()
    mean, n = values.mean(), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half_width = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * values.sem()
    return Interval(mean, mean - half_width, mean + half_width, n, values.sem())


def interval_of_ratio(numerators: "pd.Series[Any]", denominators: "pd.Series[Any]") -> Interval:
    """The ratio of two sums with its 95% interval, a bootstrap over pairs of values."""
    samples = [numerators.sample(frac=1, replace=True, random_state=seed).index for seed in range(1000)]
    ratios = pd.Series([numerators[sample].sum() / denominators[sample].sum() for sample in samples])
    low, high = ratios.quantile([0.025, 0.975])
    return Interval(numerators.sum() / denominators.sum(), low, high, len(numerators), method="bootstrap")


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


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm's correction, so that the chance of any p-value below 0.05 is at most 5% if no effect exists.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    ascending = pd.Series(p_values, dtype=float).sort_values()
    corrected = (ascending * np.arange(len(ascending), 0, -1)).clip(upper=1.0).cummax()
    return corrected.sort_index().tolist()
