import pandas as pd
import pytest
from scipy import stats

from reporting.statistics import Interval, correct_p_values, interval_of_mean


def test_interval_of_difference_uses_common_seeds_only() -> None:
    interval = interval_of_mean(pd.Series({0: 2.0, 1: 5.0, 7: 90.0}) - pd.Series({1: 4.0, 0: 2.0, 8: 10.0}))
    expected = stats.ttest_rel([2.0, 5.0], [2.0, 4.0]).confidence_interval(0.95)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, *expected)) and interval.n == 2


def test_n_to_decide_is_first_number_at_which_interval_excludes_threshold() -> None:
    interval = interval_of_mean(pd.Series([0.0, 1.0, 3.5]))
    errors = {n: stats.t.ppf(0.975, n - 1) * pd.Series([0.0, 1.0, 3.5]).std() / n**0.5 for n in range(2, 100)}
    assert interval.n_to_decide(0.0) == min(n for n, error in errors.items() if error < 1.5)
    assert interval.n_to_decide(interval.high + 1) is None  # decided already
    assert Interval(0.75, -0.5, 2.0, 5).n_to_decide(0.0) is None


def test_p_value_is_that_of_t_test() -> None:
    values = [0.3, 1.0, 3.5]
    p_value = interval_of_mean(pd.Series(values)).p_value(-1.0)
    assert p_value == pytest.approx(stats.ttest_1samp(values, -1.0).pvalue)
    assert Interval(0.0, -1.0, 1.0, 5).p_value(-1.0) is None  # as of a bootstrap
    assert interval_of_mean(pd.Series([1.0, 1.0])).p_value(0.0) == 0.0
    assert interval_of_mean(pd.Series([0.0, 0.0])).p_value(0.0) == 1.0


def test_differences_that_cancel_up_to_rounding_have_no_effect() -> None:
    differences = [90.65 - 91.04, 90.62 - 91.24, 90.51 - 89.5]
    assert 0 < abs(sum(differences)) < 1e-12
    interval = interval_of_mean(pd.Series(differences))
    assert (interval.n_to_decide(0.0), interval.p_value(0.0)) == (None, 1.0)


def test_corrected_p_values_are_those_of_holm() -> None:
    assert correct_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_p_values([0.9, 0.8]) == [1.0, 1.0] and correct_p_values([]) == []
