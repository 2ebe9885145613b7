import math

import pandas as pd
import pytest
from scipy import stats

from reporting.rows import DIFFERENCE, Row, summarize
from tests.reporting.helpers import make_record
from training.errors import UsageError


def test_summarize_gives_means_and_paired_intervals() -> None:
    plain = Row("plain", [], records=[make_record(s, v) for s, v in enumerate((90.0, 92.0, 97.0))])
    other = Row("other", [], records=[make_record(s, v, 25) for s, v in enumerate((91.5, 92.5, 98.0))])
    frame = summarize([plain, other])
    assert [*frame.columns[:5]] == ["row", "arrangement", "conv_params", "params", "conv_ratio"]
    assert [*frame.columns[5:]] == ["seeds", "top1_mean", "top1_std", *DIFFERENCE, "epochs"]
    assert frame["diff_mean"][0] == frame["diff_ci95_low"][0] == frame["diff_ci95_high"][0] == 0
    line = frame.iloc[1]
    assert (line["conv_ratio"], line["seeds"], line["epochs"], line["params"]) == (4.0, 3, 3, 50)
    low, high = stats.ttest_rel([91.5, 92.5, 98.0], [90.0, 92.0, 97.0]).confidence_interval(0.95)
    assert (line["diff_mean"], line["diff_ci95_low"], line["diff_ci95_high"]) == pytest.approx((1.0, low, high))
    assert line["top1_mean"] == pytest.approx(94.0)
    assert line["top1_std"] == pytest.approx(pd.Series([91.5, 92.5, 98.0]).std())


def test_summarize_single_seed_has_no_spread() -> None:
    frame = summarize([Row("plain", [], records=[make_record(0, 90.0)])])
    assert math.isnan(frame["top1_std"][0]) and math.isnan(frame["diff_ci95_low"][0])


def test_summarize_compares_each_row_with_the_row_it_names() -> None:
    rows = [
        Row(name, [], against, records=[make_record(0, top1)])
        for name, against, top1 in (("a", None, 90), ("b", "b", 50), ("c", "b", 53))
    ]
    assert list(summarize(rows)["diff_mean"]) == [0, 0, 3]
    assert list(summarize(rows, against="c")["diff_mean"]) == [37, -3, 0]


def test_summarize_rejects_row_without_records() -> None:
    with pytest.raises(UsageError, match="row 'empty' has no finished run"):
        summarize([Row("empty", [])])


def test_summarize_rejects_rows_without_common_seed() -> None:
    rows = [Row(name, [], records=[make_record(seed, 90.0)]) for seed, name in enumerate(("plain", "other"))]
    with pytest.raises(UsageError, match="rows 'other' and 'plain' have no seed in common"):
        summarize(rows)
