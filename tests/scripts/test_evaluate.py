import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import acl
from evaluation.finished_run import FinishedRun, adapt_data, evaluate_run, load_data_as_trained, load_finished_run
from reporting.render import draw_confusions
from scripts.evaluate import EvaluateSettings, count_confusions, main
from tests.scripts.conftest import RunScript
from tests.training.configurations import compose_photo_run, compose_run
from tests.training.trees import write_imagefolder, write_mnist
from training.errors import UsageError
from training.loop import run
from training.settings import load_run_data, parse_run
from training.splits import Split

HERE = {"root": None, "cache": None}


def train_run(folder: Path, *overrides: str) -> Path:
    cfg = compose_run(folder, "trainer.epochs=1", "trainer.batch_size=200", *overrides)
    run(parse_run(cfg))
    return parse_run(cfg).directory.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return load_finished_run(train_run(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_evaluation_gives_recorded_numbers(tmp_path: Path, precision: str) -> None:
    path = train_run(tmp_path, f"trainer.precision={precision}")
    record = json.loads((path / "record.json").read_text())
    for file in (path, path / "model.safetensors"):
        finished = load_finished_run(file)
        data = load_data_as_trained(finished)
        assert {split: evaluate_run(finished, data, split) for split in ("val", "test")} == {
            "val": record["val"],
            "test": record["test"],
        }


def test_script_prints_result_next_to_recorded_one(finished: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    main(EvaluateSettings(run=finished.path, split="test", data=HERE))
    assert finished.record is not None
    assert finished.record.test is not None
    result = f"{finished.record.test.top1:.2f}%, loss {finished.record.test.loss:.6f}"
    assert capsys.readouterr().out == f"{finished.path}: test {result}, 360 images (recorded: {result})\n"


def test_other_data_are_normalized_as_those_of_training(
    finished: FinishedRun, tmp_path: Path, call_script: RunScript
) -> None:
    write_mnist(tmp_path)
    done = call_script("evaluate.py", f"run={finished.path}", "split=test", "data=mnist", f"data.root={tmp_path}")
    assert "300 images" in done.stdout and "recorded" not in done.stdout, done.stderr
    trained = load_run_data(finished.settings)
    brighter = replace(trained, mean=trained.mean + 9, std=2 * trained.std)
    adapted = adapt_data(brighter, finished)
    assert torch.equal(adapted.mean, trained.mean) and torch.equal(adapted.std, trained.std)


def test_confusion_matrix_has_accuracy_of_each_class(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "confusion.csv"
    main(EvaluateSettings(run=finished.path, split="test", data=HERE, confusion=file))
    frame = pd.read_csv(file, dtype={"class": str}).set_index("class")
    assert list(frame.index) == list(frame.columns[2:]) == [str(digit) for digit in range(10)]
    counts = frame.iloc[:, 2:].to_numpy()
    assert frame["images"].tolist() == counts.sum(1).tolist() and counts.sum() == 360
    assert frame["accuracy"].to_numpy() == pytest.approx(100 * counts.diagonal() / counts.sum(1), abs=0.01)
    assert f"test {100 * counts.trace() / 360:.2f}%" in capsys.readouterr().out
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"confusion=.*\.png is invalid: it should end in \.csv"):
        main(EvaluateSettings(run=finished.path, split="test", data=HERE, confusion=tmp_path / "confusion.png"))


def test_count_confusions_has_true_classes_in_lines() -> None:
    frame = count_confusions(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 2, 1]), ["a", "b", "c"])
    assert frame.to_csv(float_format="%.2f").splitlines() == [
        "class,accuracy,images,a,b,c",
        "a,33.33,3,1,0,2",
        "b,100.00,1,0,1,0",
        "c,,0,0,0,0",
    ]
    (axes, _) = draw_confusions(frame, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (33%)", "b (100%)", "c (no images)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]


def test_renamed_class_is_refused_by_name(tmp_path: Path) -> None:
    root = write_imagefolder(tmp_path / "photos", train=6, val=2, test=2)
    cfg = compose_photo_run(tmp_path, root)
    run(parse_run(cfg))
    for split in ("train", "val", "test"):
        (root / split / "class_0").rename(root / split / "zebra")
    path = parse_run(cfg).directory.path
    for file in (path, path / "model.safetensors"):
        with pytest.raises(UsageError, match=f"have other classes than {file}: unknown zebra; missing class_0"):
            main(EvaluateSettings(run=file, split="test", data={"root": str(root), "cache": str(tmp_path)}))


def test_labels_are_matched_by_name(finished: FinishedRun) -> None:
    data = load_run_data(finished.settings)
    order = torch.randperm(10)
    renumbered = replace(data.test, labels=order.argsort()[data.test.labels])
    other = replace(data, classes=[data.classes[label] for label in order], test=renumbered)
    assert finished.record is not None
    assert evaluate_run(finished, adapt_data(other, finished), "test") == finished.record.test.to_dict()


def test_weights_without_class_names_are_evaluated_as_before(
    finished: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.safetensors"
    info = acl.read_info(finished.path / "model.safetensors")["info"]
    del info["classes"]
    acl.save(finished.model, file, info)
    main(EvaluateSettings(run=file, split="test", data=HERE))
    assert finished.record is not None
    output = capsys.readouterr()
    assert f"test {finished.record.test.top1:.2f}%" in output.out
    assert output.err == f"{file} does not name its classes, so labels are compared by number\n"


@pytest.mark.parametrize("classes", [7, ["a"], [1] * 10, ["a"] * 10, {}])
def test_invalid_class_names_are_refused(finished: FinishedRun, tmp_path: Path, classes: object) -> None:
    file = tmp_path / "net.safetensors"
    info = acl.read_info(finished.path / "model.safetensors")["info"]
    acl.save(finished.model, file, {**info, "classes": classes})
    with pytest.raises(UsageError, match=f"{file} is damaged: its classes should be 10 different names"):
        load_finished_run(file)


def test_other_data_in_place_of_a_runs_own_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_imagefolder(tmp_path / "photos", train=6, val=2, test=2)
    cfg = compose_photo_run(tmp_path, root)
    run(parse_run(cfg))
    path = parse_run(cfg).directory.path
    main(EvaluateSettings(run=path, split="test", data=HERE))
    (root / "test/class_0/1.png").unlink()
    main(EvaluateSettings(run=path, split="test", data=HERE))
    assert capsys.readouterr().err == f"{path} was recorded with other data than these\n"


def test_data_of_another_format_are_rejected(finished: FinishedRun) -> None:
    data = load_run_data(finished.settings)
    train = Split(data.train.images.expand(-1, 3, -1, -1), data.train.labels)
    colored = replace(data, train=train, mean=data.mean.expand(1, 3, 1, 1), std=data.std.expand(1, 3, 1, 1))
    with pytest.raises(UsageError, match=r"the data do not fit .*: channels 3 instead of 1"):
        adapt_data(colored, finished)
    with pytest.raises(UsageError, match=r"the data do not fit .*: classes 7 instead of 10"):
        adapt_data(replace(data, classes=data.classes[:7]), replace(finished, classes=None))
