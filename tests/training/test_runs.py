from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.configurations import compose_run
from training.config import compose
from training.datasets import Split
from training.errors import UsageError
from training.evaluate import evaluate
from training.loop import run
from training.runs import (
    build_model,
    load_finished_run,
    load_run_data,
    open_run_directory,
    parse_run,
    resolve_run_path,
)


def test_finished_run_with_auto_arrangement_has_chosen_kinds(tmp_path: Path) -> None:
    layer = ["trainer.epochs=1", "model.layer.tolerance=0.5", "model.layer.amplitude=true"]
    cfg = compose_run(tmp_path, "arrangement.conv2=auto", *layer, "seed=5")
    record, _ = run(cfg)
    torch.manual_seed(99)
    finished = load_finished_run(open_run_directory(cfg).path)
    assert not finished.model.training
    assert len(set(finished.model.conv2.slot_kinds)) > 1
    assert evaluate(finished.model, finished.data, finished.data.test)["top1"] == record["test"]["top1"]


def test_finished_run_has_settings_record_and_weights(tmp_path: Path) -> None:
    cfg = compose_run(tmp_path, "trainer.epochs=1", "trainer.batch_size=200")
    record, _ = run(cfg)
    finished = load_finished_run(open_run_directory(cfg).path)
    assert finished.record == record and finished.path == open_run_directory(cfg).path
    assert finished.settings.config == parse_run(cfg).config
    assert finished.settings.directory.path == finished.path
    weights = load_file(finished.path / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in finished.model.state_dict().items())


def test_folder_without_finished_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{tmp_path} is not the folder of a run: it has no config.yaml"):
        load_finished_run(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UsageError, match=rf"{tmp_path} is an unfinished run: it has no record.json"):
        load_finished_run(tmp_path)


def test_weights_of_another_network_are_rejected(tmp_path: Path) -> None:
    cfg = compose_run(tmp_path, "trainer.epochs=1", "trainer.batch_size=200")
    run(cfg)
    weights = open_run_directory(cfg).path / "model.safetensors"
    save_file({"fc9.weight": torch.zeros(1)}, weights)
    with pytest.raises(UsageError, match=rf"{weights} does not fit the network of {weights.parent}: ") as error:
        load_finished_run(weights.parent)
    assert "\n" not in str(error.value)


def test_resolve_run_path_finds_id_in_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/0123456789ab").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_run_path(Path("0123456789ab")) == Path("runs/0123456789ab")
    assert resolve_run_path(Path("runs/0123456789ab")) == Path("runs/0123456789ab")
    assert resolve_run_path(Path("missing")) == Path("missing")


def test_built_model_is_in_training_mode_and_depends_on_seed(tmp_path: Path) -> None:
    settings = parse_run(compose_run(tmp_path))
    data = load_run_data(settings)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model(settings, data))
    first, same, other = (model.state_dict() for model in models)
    assert models[0].training
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_images_that_network_does_not_accept_are_rejected() -> None:
    settings = parse_run(compose(["model=lenet"]))
    data = load_run_data(settings)
    small = replace(data, train=Split(data.train.images[..., :20, :20], data.train.labels))
    with pytest.raises(UsageError, match=r"model.backbone=lenet does not accept images of 1 x 20 x 20: ") as error:
        build_model(settings, small)
    assert "\n" not in str(error.value)
