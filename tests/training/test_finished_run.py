import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.configurations import compose_run
from tests.training.trees import write_imagefolder
from training.errors import UsageError
from training.evaluate import evaluate
from training.finished_run import FinishedRun, load_finished_run, resolve_run_path
from training.loop import run
from training.record import read_record
from training.runs import load_run_data, open_run_directory, parse_run

SHORT = ("trainer.epochs=1", "trainer.batch_size=200")


def train_run(folder: Path, *overrides: str) -> Path:
    cfg = compose_run(folder, *SHORT, *overrides)
    run(cfg)
    return open_run_directory(cfg).path


@pytest.fixture(scope="module")
def finished_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run_path(finished_path: Path, tmp_path: Path) -> Path:
    """A finished run whose files a test may damage."""
    return Path(shutil.copytree(finished_path, tmp_path / finished_path.name))


def get_error(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        load_finished_run(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def has_weights(finished: FinishedRun, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in finished.model.state_dict().items())


def test_finished_run_has_settings_record_and_weights(finished_path: Path) -> None:
    finished = load_finished_run(finished_path)
    assert finished.path == finished_path and not finished.model.training
    assert finished.record == read_record(finished_path / "record.json")
    assert finished.settings.config == parse_run(compose_run(finished_path.parent, *SHORT)).config
    assert finished.settings.directory.path == finished_path
    assert finished.input_format == load_run_data(finished.settings).input_format
    assert has_weights(finished, load_file(finished_path / "model.safetensors"))


def test_finished_run_with_auto_arrangement_needs_neither_data_nor_initial_weights(tmp_path: Path) -> None:
    layer = ["model.layer.tolerance=0.5", "model.layer.amplitude=true"]
    path = train_run(tmp_path / "runs", "arrangement.conv2=auto", *layer, "seed=5")
    torch.manual_seed(99)
    finished = load_finished_run(path)
    assert len(set(finished.model.conv2.slot_kinds)) > 1
    assert finished.record is not None
    data = load_run_data(finished.settings)
    assert evaluate(finished.model, data, data.test)["top1"] == finished.record.test.top1


@pytest.mark.parametrize("overrides", [(), ("model=lenet", "arrangement=plain"), ("trainer.precision=64-true",)])
def test_weights_alone_describe_their_network(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    path = train_run(tmp_path / "runs", *overrides)
    file = Path(shutil.copy(path / "model.safetensors", tmp_path / "net.safetensors"))
    finished = load_finished_run(file)
    assert finished.record is None
    assert has_weights(finished, load_file(file))
    assert finished.settings.directory.identity == load_finished_run(path).settings.directory.identity


def save_as_earlier_versions_did(weights: dict[str, torch.Tensor], run_path: Path) -> None:
    """Replaces the weights of a run by a file without a description, and removes their digest from the record."""
    save_file(weights, run_path / "model.safetensors")
    record = json.loads((run_path / "record.json").read_text())
    del record["weights"]
    (run_path / "record.json").write_text(json.dumps(record))


def test_weights_that_record_does_not_stand_for_are_rejected(run_path: Path) -> None:
    weights = run_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # one bit of a weight
    weights.write_bytes(content)
    assert get_error(run_path).startswith(f"{weights} is not the file that record.json stands for")


def test_weights_without_description_load_with_their_data(run_path: Path) -> None:
    described = load_finished_run(run_path)
    weights = load_file(run_path / "model.safetensors")
    save_as_earlier_versions_did(weights, run_path)
    finished = load_finished_run(run_path)
    assert has_weights(finished, weights) and finished.input_format == described.input_format


def test_resolve_run_path_finds_id_in_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/0123456789ab").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_run_path(Path("0123456789ab")) == Path("runs/0123456789ab")
    assert resolve_run_path(Path("runs/0123456789ab")) == Path("runs/0123456789ab")
    assert resolve_run_path(Path("missing")) == Path("missing")


def test_folder_without_finished_run_is_rejected(tmp_path: Path) -> None:
    assert get_error(tmp_path) == f"{tmp_path} is not the folder of a run: it has no config.yaml"
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert get_error(tmp_path) == f"{tmp_path} is an unfinished run: it has no record.json"


@pytest.mark.parametrize("name", ["config.yaml", "record.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"seed: [", b"\xff\xfe\x00", b"[1, 2]", b"3", b"{}", b"half"])
def test_corrupt_file_of_a_run_is_named(run_path: Path, name: str, content: bytes) -> None:
    file = run_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == b"half" else content)
    assert str(file) in get_error(run_path)


def test_missing_weights_are_named(run_path: Path) -> None:
    (run_path / "model.safetensors").unlink()
    assert str(run_path / "model.safetensors") in get_error(run_path)


def test_files_of_different_runs_are_rejected(run_path: Path, tmp_path: Path) -> None:
    other = train_run(tmp_path / "runs", "seed=7")
    for name in ("config.yaml", "record.json", "model.safetensors"):
        content = (run_path / name).read_bytes()
        shutil.copy(other / name, run_path)
        assert "belong to different runs" in get_error(run_path)
        (run_path / name).write_bytes(content)


def test_weights_of_another_network_are_rejected(run_path: Path) -> None:
    weights = run_path / "model.safetensors"
    save_as_earlier_versions_did({"fc9.weight": torch.zeros(1)}, run_path)
    assert get_error(run_path).startswith(f"{weights} does not fit the network of {run_path}: ")


def test_weights_without_description_need_no_pretrained_file(tmp_path: Path) -> None:
    root = write_imagefolder(tmp_path / "photos", train=6, val=2, test=2)
    source = torchvision.models.resnet18(num_classes=3)
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    data = ["data=imagefolder", f"data.root={root}", f"data.cache={tmp_path}", "data.title=t", "data.size=32"]
    model = ["model=ana_resnet18", "arrangement=plain", "arrangement.conv1=G192", "model.pretrained="]
    model[-1] += str(tmp_path / "source.safetensors")
    path = train_run(tmp_path / "runs", *data, "data.crop=32", *model, "trainer.batch_size=6")
    weights = load_file(path / "model.safetensors")
    save_as_earlier_versions_did(weights, path)
    (tmp_path / "source.safetensors").unlink()
    assert has_weights(load_finished_run(path), weights)
