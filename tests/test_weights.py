"""The trained networks in results/weights: they load without anything else and give their recorded numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.finished_run import evaluate_run, load_finished_run
from tests.sources import ROOT
from training.provenance import digest_file
from training.settings import load_run_data

FOLDER = ROOT / "results/weights"
RECORDS: dict[str, dict[str, Any]] = {
    record["file"]: record for record in map(json.loads, (FOLDER / "records.jsonl").read_text("utf-8").splitlines())
}


def test_every_file_has_its_record_and_its_line_in_the_table() -> None:
    assert sorted(RECORDS) == sorted(path.name for path in FOLDER.glob("*.safetensors"))
    text = (FOLDER / "README.md").read_text("utf-8")
    for file, record in RECORDS.items():
        cells = f"{record['parameters']['conv']:,} | {record['test']['top1']:.2f} |\n"
        assert any(f"`{Path(file).stem}`" in line and f"{line}\n".endswith(cells) for line in text.splitlines())


def test_page_is_that_of_the_weights() -> None:
    record = RECORDS["mnist_half_plain.safetensors"]
    page = (ROOT / "results/explanation/mnist_half_plain.html").read_text("utf-8")
    assert record["weights"] == digest_file(FOLDER / record["file"])
    assert f"AnaNN: run {record['id']}" in page and f"commit {record['commit']}" in page
    assert f"test {record['test']['top1']:.2f}%, validation\n    {record['val']['top1']:.2f}%" in page


@pytest.mark.parametrize("file", sorted(RECORDS))
def test_file_describes_the_network_of_its_record(file: str) -> None:
    finished = load_finished_run(FOLDER / file)
    assert finished.settings.directory.identity == RECORDS[file]["config"]


@pytest.mark.parametrize("file", [file for file in sorted(RECORDS) if file.startswith("digits")])
def test_network_gives_its_recorded_accuracy(file: str) -> None:
    finished = load_finished_run(FOLDER / file)
    result = evaluate_run(finished, load_run_data(finished.settings), "test")
    assert result["top1"] == RECORDS[file]["test"]["top1"]
    assert result["loss"] == pytest.approx(RECORDS[file]["test"]["loss"], rel=1e-5)
