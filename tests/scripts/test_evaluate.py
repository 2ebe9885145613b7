import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.evaluate import EvaluateSettings, main, normalize_as_trained
from tests.scripts.conftest import RunScript
from tests.training.configurations import compose_run
from tests.training.trees import write_mnist
from training.datasets import Split
from training.errors import UsageError
from training.finished_run import FinishedRun, evaluate_run, load_finished_run
from training.loop import run
from training.runs import load_run_data, open_run_directory

HERE = {"root": None, "cache": None}


def train_run(folder: Path, *overrides: str) -> Path:
    cfg = compose_run(folder, "trainer.epochs=1", "trainer.batch_size=200", *overrides)
    run(cfg)
    return open_run_directory(cfg).path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return load_finished_run(train_run(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_evaluation_gives_recorded_numbers(tmp_path: Path, precision: str) -> None:
    path = train_run(tmp_path, f"trainer.precision={precision}")
    record = json.loads((path / "record.json").read_text())
    for file in (path, path / "model.safetensors"):
        finished = load_finished_run(file)
        data = normalize_as_trained(load_run_data(finished.settings), finished)
        assert {split: evaluate_run(finished, data, split) for split in ("val", "test")} == {
            "val": record["val"],
            "test": record["test"],
        }


def test_script_prints_result_next_to_recorded_one(finished: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    main(EvaluateSettings(run=finished.path, split="test", data=HERE))
    assert finished.record is not None
    result = f"{finished.record['test']['top1']:.2f}%, loss {finished.record['test']['loss']:.6f}"
    assert capsys.readouterr().out == f"{finished.path}: test {result}, 360 images (recorded: {result})\n"


def test_other_data_are_normalized_as_those_of_training(
    finished: FinishedRun, tmp_path: Path, call_script: RunScript
) -> None:
    write_mnist(tmp_path)
    done = call_script("evaluate.py", f"run={finished.path}", "split=test", "data=mnist", f"data.root={tmp_path}")
    assert "300 images" in done.stdout and "recorded" not in done.stdout, done.stderr
    trained = load_run_data(finished.settings)
    brighter = replace(trained, mean=trained.mean + 9, std=2 * trained.std)
    adapted = normalize_as_trained(brighter, finished)
    assert torch.equal(adapted.mean, trained.mean) and torch.equal(adapted.std, trained.std)


def test_data_of_another_format_are_rejected(finished: FinishedRun) -> None:
    data = load_run_data(finished.settings)
    train = Split(data.train.images.expand(-1, 3, -1, -1), data.train.labels)
    colored = replace(data, train=train, mean=data.mean.expand(1, 3, 1, 1), std=data.std.expand(1, 3, 1, 1))
    with pytest.raises(UsageError, match=r"the data do not fit .*: channels 3 instead of 1"):
        normalize_as_trained(colored, finished)
    with pytest.raises(UsageError, match=r"the data do not fit .*: classes 7 instead of 10"):
        normalize_as_trained(replace(data, classes=7), finished)
