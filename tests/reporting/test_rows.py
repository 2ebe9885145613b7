import base64
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from models.controls import CONTROLS_OF_ANALYTIC
from reporting.rows import DIFFERENCE, Row, summarize
from reporting.statistics import interval_of_difference
from tests.reporting.helpers import make_record
from training.errors import UsageError
from training.record import Record


def test_summarize_gives_means_and_paired_intervals() -> None:
    plain = Row("plain", [], records=[make_record(s, v) for s, v in enumerate((90.0, 92.0, 97.0))])
    other = Row("other", [], records=[make_record(s, v, 25) for s, v in enumerate((91.5, 92.5, 98.0))])
    frame = summarize([plain, other])
    assert [*frame.columns[:5]] == ["row", "arrangement", "conv_params", "params", "conv_ratio"]
    assert [*frame.columns[5:]] == [
        "seeds",
        "top1_mean",
        "top1_std",
        *DIFFERENCE,
        "epochs",
        "reference",
        "interval_over",
    ]
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


def make_record_of_images(seed: int, bits: list[int], digest: str = "a", **changes: object) -> Record:
    packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
    data = {"digest": digest, "train": 1, "val": 1, "test": len(bits)}
    return make_record(seed, 100 * sum(bits) / len(bits), data=data, correct={"test": packed, "val": None}, **changes)


CORRECT = {
    "plain": [[1, 1, 0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 1, 1, 1, 0]],
    "Gabor": [[1, 0, 1, 1, 1, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 1, 1, 1]],
}


def test_arrangement_of_a_network_that_only_starts_with_formulas_is_plain() -> None:
    arrangement = {"conv1": "G6", "conv2": None}
    controls = (None, *CONTROLS_OF_ANALYTIC)
    configs = [{"arrangement": arrangement, "model": {"control": control}} for control in controls]
    rows = [Row(str(i), [], records=[make_record(0, 90.0, config=config)]) for i, config in enumerate(configs)]
    assert summarize(rows)["arrangement"].tolist() == ["conv1: G6", *["plain"] * len(CONTROLS_OF_ANALYTIC)]


def test_records_of_images_give_interval_over_seeds_and_images() -> None:
    rows = [
        Row(name, [], records=[make_record_of_images(seed, bits) for seed, bits in enumerate(correct)])
        for name, correct in CORRECT.items()
    ]
    frame = summarize(rows)
    assert frame["interval_over"].tolist() == ["", "3 seeds and 10 images"]
    plain, gabor = (np.array(correct) for correct in CORRECT.values())
    table = pd.DataFrame([100 * plain.mean(1), 100 * gabor.mean(1)], index=["plain", "Gabor"])
    expected = interval_of_difference(table, "Gabor", "plain", (gabor, plain))
    assert (frame["diff_mean"][1], frame["diff_ci95_low"][1]) == pytest.approx((expected.mean, expected.low))


@pytest.mark.parametrize("changes", [{"digest": "b"}, {"correct": None}, {"data": None}])
def test_records_without_common_images_give_interval_over_seeds_alone(changes: dict[str, object]) -> None:
    rows = [
        Row(name, [], records=[make_record_of_images(seed, bits) for seed, bits in enumerate(correct)])
        for name, correct in CORRECT.items()
    ]
    other = {"data": {**(rows[1].records[0].data or {}), **changes}} if "digest" in changes else changes
    rows[1].records[0] = rows[1].records[0].model_copy(update=other)
    assert summarize(rows)["interval_over"].tolist() == ["", "3 seeds"]


@pytest.mark.parametrize("bits", [base64.b64encode(b"abc").decode(), base64.b64encode(b"ab").decode(), "", "x"])
def test_bits_that_contradict_accuracy_are_refused(bits: str) -> None:
    record = make_record_of_images(0, CORRECT["plain"][0], row="plain")
    changed = record.model_copy(update={"correct": {"test": bits}})
    with pytest.raises(UsageError, match=r"row 'plain', seed 0: correct\.test contradicts its top1=70\.0"):
        summarize([Row("plain", [], records=[changed])])


def test_records_of_fewer_images_give_interval_over_seeds_alone() -> None:
    """The digest is of all images of the data set, of which ``data.max_images`` takes some."""
    rows = [
        Row(name, [], records=[make_record_of_images(seed, bits[:n]) for seed, bits in enumerate(correct)])
        for (name, correct), n in zip(CORRECT.items(), (10, 8), strict=True)
    ]
    assert summarize(rows)["interval_over"].tolist() == ["", "3 seeds"]


def test_only_rows_with_the_same_reference_share_variance() -> None:
    values = {"a": (90.0, 91.0, 90.2), "b": (89.0, 90.5, 89.9), "c": (91.0, 91.2, 90.1), "d": (90.5, 91.1, 90.7)}
    against = {"a": None, "b": None, "c": None, "d": "d"}
    rows = [Row(n, [], against[n], records=[make_record(s, v) for s, v in enumerate(values[n])]) for n in values]
    shared = "3 seeds (shared variance)"
    assert summarize(rows)["interval_over"].tolist() == ["", shared, shared, ""]
    assert summarize(rows, against="c")["interval_over"].tolist() == [shared, shared, "", "3 seeds"]
    assert summarize(rows, against="d")["interval_over"].tolist() == ["3 seeds", "3 seeds", "3 seeds", ""]
