from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reporting.verification import compare_records, verify_table
from tests.reporting.helpers import create_table, make_record
from training.errors import UsageError
from training.record import Record

IMAGES = {"test": 1000, "val": 1000}  # an image is 0.1 points
TOP1 = (90.0, 91.0, 92.0)


def make_row(*top1: float, name: str = "a", first_seed: int = 0, **changes: Any) -> list[Record]:
    """The records of a row, by seed."""
    return [make_record(seed, value, row=name, **changes) for seed, value in enumerate(top1, first_seed)]


def compare(committed: list[Record], rerun: list[Record]) -> tuple[str, str]:
    (comparison,) = compare_records(committed, rerun, IMAGES)
    assert comparison.is_confirmed == (comparison.outcome in ("reproduced", "consistent"))
    return comparison.outcome, comparison.details


def test_equal_results_are_reproduced() -> None:
    assert compare(make_row(*TOP1), make_row(*TOP1)) == ("reproduced", "")


@pytest.mark.parametrize("split", ["test", "val"])
def test_other_loss_at_same_accuracy_is_consistent(split: str) -> None:
    rerun = make_row(*TOP1)
    result = getattr(rerun[0], split).model_copy(update={"loss": 0.5 + 1e-9})
    rerun[0] = rerun[0].model_copy(update={split: result})
    assert compare(make_row(*TOP1), rerun)[0] == "consistent"


@pytest.mark.parametrize(
    ("rerun", "outcome"),
    [
        ((90.1, 91.1, 92.1), "consistent"),  # one image each
        ((90.8, 90.3, 92.2), "consistent"),  # both directions, less than the spread over seeds
        ((90.8, 91.9, 92.8), "differs"),  # a small shift of all seeds
        ((10.0, 10.0, 10.0), "differs"),
        ((10.0, 80.0, 92.0), "differs"),  # so erratic that the paired interval includes 0
    ],
)
def test_outcome_weighs_shift_against_spread(rerun: tuple[float, ...], outcome: str) -> None:
    assert compare(make_row(*TOP1), make_row(*rerun))[0] == outcome


def test_shift_of_validation_accuracy_differs() -> None:
    rerun = make_row(*TOP1, val={"top1": 50.0, "loss": 0.5})
    outcome, details = compare(make_row(*TOP1), rerun)
    assert outcome == "differs" and "val -40.00 [-40.00, -40.00] points" in details


def test_single_seed_allows_one_image_only() -> None:
    assert compare(make_row(90.0), make_row(90.1))[0] == "consistent"
    assert compare(make_row(90.0), make_row(90.2)) == ("differs", "test +0.20 points; val +0.00 points")


def test_other_configuration_differs_whatever_its_results() -> None:
    outcome, details = compare(
        make_row(*TOP1, config={"optim": {"lr": 0.1}}), make_row(*TOP1, config={"optim": {"lr": 0.2, "k": 3}})
    )
    assert (outcome, details) == (
        "differs",
        "other configuration: optim.lr=0.2 instead of 0.1, optim.k=3 instead of none",
    )


def test_other_use_of_test_set_differs() -> None:
    committed = make_row(*TOP1, config={"trainer": {"epochs": 3, "test": False}}, test=None)
    outcome, details = compare(committed, make_row(*TOP1, config={"trainer": {"epochs": 3, "test": True}}))
    assert (outcome, details) == ("differs", "other configuration: trainer.test=True instead of False")


def test_missing_rows_and_seeds_are_incomplete() -> None:
    committed = [*make_row(90.0, 91.0), *make_row(90.0, name="b")]
    rerun = [*make_row(91.0, 92.0, first_seed=1), *make_row(90.0, name="c")]
    comparisons = compare_records(committed, rerun, IMAGES)
    assert [(c.row, c.outcome, c.details) for c in comparisons] == [
        ("a", "incomplete", "not rerun: seed 0; not committed: seed 2"),
        ("b", "incomplete", "not rerun: seed 0"),
        ("c", "incomplete", "not committed: seed 0"),
    ]


def test_rerun_that_differs_by_chance_is_usually_confirmed() -> None:
    random = np.random.default_rng(0)
    num_confirmed = 0
    for _ in range(40):
        values = random.normal(90, 0.5, (2, 7, 3))
        committed, rerun = ([r for i, row in enumerate(table) for r in make_row(*row, name=str(i))] for table in values)
        num_confirmed += all(c.is_confirmed for c in compare_records(committed, rerun, IMAGES))
    assert num_confirmed >= 36


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("evaluates_test", ["true", "false"])
def test_verify_table_reproduces_itself_and_notices_other_learning_rate(tmp_path: Path, evaluates_test: str) -> None:
    changes, overrides = {"seeds": [0]}, ("trainer.batch_size=600", f"trainer.test={evaluates_test}")
    table = create_table(tmp_path, *overrides, **changes)
    with pytest.raises(UsageError, match=r"there is no .*digits\.jsonl"):
        verify_table(table, tmp_path / "verify")
    table.reproduce()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "results/tables").iterdir()}
    written: dict[Path, int] = {}
    for _ in range(2):  # a finished verification does not stand for another
        comparisons = verify_table(table, tmp_path / "runs/it's verified")
        assert [(c.row, c.outcome) for c in comparisons] == [(row.name, "reproduced") for row in table.rows]
        records = (tmp_path / "runs/it's verified").glob("*/record.json")
        written, earlier = {file: file.stat().st_mtime_ns for file in records}, written
        assert len(written) == len(table.rows) and not written.items() & earlier.items()
    wrong = create_table(tmp_path, *overrides, "optim.lr=1e-5", **changes)
    for comparison in verify_table(wrong, tmp_path / "runs/it's verified"):
        assert comparison.outcome == "differs" and "optim.lr=1e-05 instead of 0.002" in comparison.details
    assert {path: path.stat().st_mtime_ns for path in files} == files
