import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats

from reporting.statistics import (
    Interval,
    compute_margin,
    find_significant,
    interval_of_difference,
    interval_of_mean,
    interval_of_ratio,
    judge,
    select_similar,
)


def make_table(*rows: list[float]) -> pd.DataFrame:
    return pd.DataFrame(rows, index=[*"abcdefgh"][: len(rows)])


def test_interval_of_difference_uses_common_seeds_only() -> None:
    interval = interval_of_mean(pd.Series({0: 2.0, 1: 5.0, 7: 90.0}) - pd.Series({1: 4.0, 0: 2.0, 8: 10.0}))
    expected = stats.ttest_rel([2.0, 5.0], [2.0, 4.0]).confidence_interval(0.95)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, *expected)) and interval.n == 2
    table = pd.DataFrame({0: [2.0, 2.0], 1: [5.0, 4.0], 7: [90.0, np.nan]}, index=["a", "b"])
    same = interval_of_difference(table, "a", "b")
    assert (same.low, same.high, same.n, same.degrees) == pytest.approx((interval.low, interval.high, 2, 1))


def test_p_value_is_that_of_t_test() -> None:
    values = [0.3, 1.0, 3.5]
    p_value = interval_of_mean(pd.Series(values)).p_value(-1.0)
    assert p_value == pytest.approx(stats.ttest_1samp(values, -1.0).pvalue)
    assert Interval(0.0, -1.0, 1.0, 5).p_value(-1.0) is None  # as of a bootstrap
    assert interval_of_mean(pd.Series([1.0, 1.0])).p_value(0.0) == 0.0
    assert interval_of_mean(pd.Series([0.0, 0.0])).p_value(0.0) == 1.0


def test_equivalence_is_that_of_two_one_sided_tests() -> None:
    values = [0.3, 0.1, -0.5, 0.2]
    interval = interval_of_mean(pd.Series(values))
    sides = (stats.ttest_1samp(values, side, alternative=which) for side, which in ((-0.6, "greater"), (0.6, "less")))
    assert interval.equivalence_p_value(0.6) == pytest.approx(max(side.pvalue for side in sides))
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    bound = max(-low, high)
    assert judge(interval, margin=1.01 * bound) == "equivalent"
    assert judge(interval, margin=0.99 * bound) == "undecided"
    assert interval_of_mean(pd.Series([0.1])).equivalence_p_value(1.0) is None


def test_differences_that_cancel_up_to_rounding_have_no_effect() -> None:
    differences = [90.65 - 91.04, 90.62 - 91.24, 90.51 - 89.5]
    assert 0 < abs(sum(differences)) < 1e-12
    assert interval_of_mean(pd.Series(differences)).p_value(0.0) == 1.0


def test_margin_is_smaller_of_point_and_tenth_of_errors() -> None:
    assert [compute_margin(top1) for top1 in (None, 50.0, 95.0, 99.35)] == pytest.approx([1.0, 1.0, 0.5, 0.065])


def test_shared_variance_is_residual_mean_square_of_table() -> None:
    table = make_table([90.0, 91.0, 90.2], [89.0, 90.5, 89.9], [91.0, 91.2, 90.1])
    assert select_similar(table) == ["a", "b", "c"]
    interval = interval_of_difference(table, "b", "a")
    residuals = table.sub(table.mean(axis=1), axis=0) - table.mean() + table.to_numpy().mean()
    mean_square = (residuals**2).to_numpy().sum() / (2 * 2)
    assert interval.standard_error == pytest.approx((2 * mean_square / 3) ** 0.5)
    assert (interval.degrees, interval.sampled) == (4, "seeds (shared variance)")
    assert interval.high - interval.mean == pytest.approx(stats.t.ppf(0.975, 4) * (2 * mean_square / 3) ** 0.5)


def test_row_with_more_than_twice_the_errors_keeps_its_own_variance() -> None:
    table = make_table([90.0, 91.0, 90.2], [89.0, 90.5, 89.9], [91.0, 91.2, 90.1], [70.0, 75.0, 71.0])
    assert select_similar(table) == ["a", "b", "c"]
    assert interval_of_difference(table, "d", "a").sampled == "seeds"
    low, high = stats.ttest_rel(table.loc["d"], table.loc["a"]).confidence_interval(0.95)
    interval = interval_of_difference(table, "d", "a")
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_rows_whose_variances_differ_share_none() -> None:
    table = make_table([90.0, 90.1, 90.2, 90.1], [89.0, 89.1, 88.9, 89.0], [91.0, 85.0, 93.0, 88.0])
    assert select_similar(table) == []
    assert select_similar(table.iloc[:2]) == []  # a pair
    assert select_similar(table.iloc[:, :1]) == []  # a single seed
    assert select_similar(make_table([90.0, 90.0], [91.0, 91.0], [89.0, 88.0])) == []  # no variance


@pytest.mark.parametrize("deviations", [(1, 1, 1, 1, 1, 1), (1, 0.5, 2, 1.5, 0.7, 1)])
def test_shared_variance_covers_truth_with_narrower_intervals(deviations: tuple[float, ...]) -> None:
    generator, trials = np.random.default_rng(0), 80
    covered, widths, own_widths = 0, [], []
    for _ in range(trials):
        noise = generator.normal(size=(6, 3)) * np.array(deviations)[:, None] + generator.normal(size=3)
        table = pd.DataFrame(90 + noise, index=[*"abcdef"])
        for row in table.index[1:]:
            shared, own = (interval_of_difference(rows, row, "a") for rows in (table, table.loc[["a", row]]))
            covered += shared.low <= 0 <= shared.high
            widths.append(shared.high - shared.low)
            own_widths.append(own.high - own.low)
    assert 0.92 < covered / trials / 5 < 0.98
    assert np.mean(widths) < 0.85 * np.mean(own_widths)


def test_shared_variance_covers_row_that_varies_more_less_often() -> None:
    """As the pages of the claims say; a stricter test of equal variances would notice hardly more such rows."""
    generator, trials, covered = np.random.default_rng(1), 400, 0
    for _ in range(trials):
        noise = generator.normal(size=(8, 5)) * np.array([1.0] * 7 + [2.5])[:, None] + generator.normal(size=5)
        interval = interval_of_difference(pd.DataFrame(90 + noise, index=[*"abcdefgh"]), "h", "a")
        covered += interval.low <= 0 <= interval.high
    assert 0.82 < covered / trials < 0.9


def draw_correct(
    generator: np.random.Generator, seeds: int, spread: float
) -> tuple[NDArray[np.bool], NDArray[np.bool]]:
    """Which of 200 images two equally good networks classify correctly, (seeds, images) each; ``spread``: of seeds."""
    difficulty = generator.normal(size=(1, 200))
    correct = []
    for _ in range(2):
        margins = 0.9 * difficulty + 0.44 * generator.normal(size=(1, 200)) + 0.3 * generator.normal(size=(seeds, 200))
        correct.append(margins + spread * generator.normal(size=(seeds, 1)) > -0.8)
    return correct[0], correct[1]


def bootstrap(generator: np.random.Generator, difference: NDArray[np.floating]) -> tuple[float, float]:
    """The 95% interval of the mean of (seeds, images) if both are resampled."""
    of_seeds, of_images = (generator.multinomial(n, np.ones(n) / n, size=100) / n for n in difference.shape)
    low, high = np.quantile(((of_seeds @ difference) * of_images).sum(1), [0.025, 0.975])
    return low, high


def measure_coverage(seeds: int, spread: float) -> dict[str, float]:
    """How often each interval includes the true difference, which is 0."""
    generator, trials = np.random.default_rng(seeds), 250
    hits = dict.fromkeys(("seeds and images", "seeds", "bootstrap"), 0)
    for _ in range(trials):
        correct = draw_correct(generator, seeds, spread)
        table = pd.DataFrame([100 * of_row.mean(1) for of_row in correct], index=["a", "b"])
        intervals = [interval_of_difference(table, "a", "b", bits) for bits in (correct, None)]
        bounds = [(interval.low, interval.high) for interval in intervals]
        bounds.append(bootstrap(generator, correct[0].astype(float) - correct[1]))
        for method, (low, high) in zip(hits, bounds, strict=True):
            hits[method] += low <= 0 <= high
    return {method: count / trials for method, count in hits.items()}


@pytest.mark.parametrize("seeds", [3, 5])
def test_interval_over_seeds_and_images_covers_truth_where_others_do_not(seeds: int) -> None:
    few, many = (measure_coverage(seeds, spread) for spread in (0.0, 0.4))  # little and much variance over seeds
    for rates in (few, many):
        assert 0.9 < rates["seeds and images"] < 0.99
    assert few["seeds"] < 0.88 and many["bootstrap"] < 0.88


def test_interval_over_seeds_and_images_has_mean_squares_of_two_way_table() -> None:
    generator = np.random.default_rng(0)
    correct = draw_correct(generator, 8, 0.1)
    table = pd.DataFrame([100 * of_row.mean(1) for of_row in correct], index=["a", "b"])
    interval = interval_of_difference(table, "a", "b", correct)
    difference = 100 * (correct[0].astype(float) - correct[1])
    by_seed, by_image, mean = difference.mean(1), difference.mean(0), difference.mean()
    of_seeds = 200 * ((by_seed - mean) ** 2).sum() / 7
    of_images = 8 * ((by_image - mean) ** 2).sum() / 199
    rest = ((difference - by_seed[:, None] - by_image + mean) ** 2).sum() / (7 * 199)
    assert interval.standard_error is not None
    assert interval.standard_error**2 == pytest.approx((of_seeds + of_images - rest) / (8 * 200))
    degrees = (of_seeds + of_images - rest) ** 2 / (of_seeds**2 / 7 + of_images**2 / 199 + rest**2 / (7 * 199))
    assert interval.degrees == pytest.approx(degrees) and interval.sampled == "seeds and 200 images"


def test_interval_of_equal_rows_is_not_wider_than_one_source_of_chance_explains() -> None:
    generator = np.random.default_rng(25)
    right = generator.beta(2, 0.5, 1000)
    correct = (generator.random((3, 1000)) < right, generator.random((3, 1000)) < right)
    table = pd.DataFrame([100 * of_row.mean(1) for of_row in correct], index=["a", "b"])
    interval = interval_of_difference(table, "a", "b", correct)
    assert interval.high - interval.low < 2 * 2 * 100 * (2 * 0.2 * 0.8 / 3000) ** 0.5  # twice that of 3,000 images each


def test_images_never_narrow_variance() -> None:
    difference = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])  # every image depends on the seed alone
    table = pd.DataFrame([25.0 * np.ones(3), np.zeros(3)], index=["a", "b"])
    interval = interval_of_difference(table, "a", "b", (difference, np.zeros((3, 4))))
    assert interval.standard_error == pytest.approx((100 * difference).mean(0).std(ddof=1) / 2)


def test_bootstrap_of_dependent_values_is_wider() -> None:
    generator = np.random.default_rng(0)
    values = pd.Series(np.repeat(generator.random(30), 3))
    ones, groups = pd.Series(np.ones(90)), pd.Series(np.arange(90) // 3)
    grouped, alone = (interval_of_ratio(values, ones, by, "groups") for by in (groups, pd.Series(np.arange(90))))
    assert grouped.mean == alone.mean == pytest.approx(values.mean()) and grouped.n == 30
    assert 1.4 < (grouped.high - grouped.low) / (alone.high - alone.low) < 2.1  # sqrt(3)


def test_corrected_p_values_are_those_of_holm() -> None:
    assert find_significant([0.01, 0.04, None, 0.03, 0.005]) == [True, False, False, False, True]
    assert find_significant([0.02, 0.02, 0.02]) == [False] * 3 and find_significant([]) == []
