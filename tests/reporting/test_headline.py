"""README's first table."""

import pytest

from reporting.headline import HeadlineRow, render_headline
from reporting.rows import mean_num_parameters, read_results
from tests.sources import ROOT
from training.errors import UsageError

RESULTS = ROOT / "results"


def make_row(table: str, row: str) -> HeadlineRow:
    return {"table": table, "row": row, "network": "a network", "data": "images", "analytic": "a part"}


def test_parameters_are_those_of_the_analytic_part() -> None:
    gabor = "exp1: Gabor, pretrained"
    first_layer, whole = render_headline(
        [make_row("flowers17", gabor), make_row("mnist", "all Gabor")], RESULTS
    ).splitlines()[2:]
    assert f"| {64 * 3 * 49:,} → {64 * 3 * 4} | 12.2 |" in first_layer
    assert f"| {6 * 25 + 96 * 25:,} → {4 * (6 + 96)} | 6.2 |" in whole
    biases = 22
    records = [record for record in read_results(RESULTS / "tables/mnist.jsonl") if record.row == "all Gabor"]
    assert mean_num_parameters(records) == 4 * (6 + 96) + biases


def test_only_tables_with_records_appear() -> None:
    assert len(render_headline([make_row("cifar10", "all Gabor")], RESULTS).splitlines()) == 2


def test_unknown_row_is_refused() -> None:
    with pytest.raises(UsageError, match="the headline names the row 'all Haar', which"):
        render_headline([make_row("mnist", "all Haar")], RESULTS)
