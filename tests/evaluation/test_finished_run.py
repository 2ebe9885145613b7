import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import acl
import models
from evaluation.finished_run import (
    FinishedRun,
    find_finished_runs,
    load_akp_history,
    load_finished_run,
    resolve_run_path,
)
from models.controls import ZeroSumConv2d
from tests.training.configurations import compose_run
from tests.training.trees import write_imagefolder
from training.errors import UsageError
from training.evaluate import predict
from training.loop import run
from training.record import read_record
from training.settings import load_run_data, parse_run

SHORT = ("trainer.epochs=1", "trainer.batch_size=200")


def train_run(folder: Path, *overrides: str) -> Path:
    cfg = compose_run(folder, *SHORT, *overrides)
    run(parse_run(cfg))
    return parse_run(cfg).directory.path


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


@pytest.mark.parametrize("control", ["random", "permuted", "zero_sum"])
def test_finished_run_of_a_control_needs_no_pretrained_weights(tmp_path: Path, control: str) -> None:
    pretrained = tmp_path / "squeezenet.safetensors"
    save_file(models.create_model("squeezenet1_0", 3, 3, {}).state_dict(), pretrained)
    images = write_imagefolder(tmp_path / "images", train=2, val=1, test=1)
    options = ["data=imagefolder", "data.title=toy", f"data.root={images}", f"data.cache={tmp_path}/cache"]
    options += ["data.size=36", "data.crop=32", "model=squeezenet1_0", "arrangement=plain", "trainer.batch_size=3"]
    options += [f"model.pretrained={pretrained}", f"model.control={control}"]
    path = train_run(tmp_path, *options)
    pretrained.unlink()
    finished = load_finished_run(path)
    assert has_weights(finished, load_file(path / "model.safetensors"))
    assert isinstance(finished.model.get_submodule("features.0"), ZeroSumConv2d) == (control == "zero_sum")


def test_finished_folded_run_is_plain(tmp_path: Path) -> None:
    path = train_run(tmp_path, "model=ana_lenet", "model.control=folded", "arrangement=mosaic")
    finished = load_finished_run(path)
    assert has_weights(finished, load_file(path / "model.safetensors"))
    assert not acl.analytic_layers(finished.model)


def test_finished_run_with_auto_arrangement_needs_neither_data_nor_initial_weights(tmp_path: Path) -> None:
    layer = ["model.layer.tolerance=0.5", "model.layer.amplitude=true"]
    path = train_run(tmp_path / "runs", "arrangement.conv2=auto", *layer, "seed=5")
    torch.manual_seed(99)
    finished = load_finished_run(path)
    assert len(set(finished.model.conv2.slot_kinds)) > 1
    assert finished.record is not None
    data = load_run_data(finished.settings)
    assert predict(finished.model, data, data.test)[0]["top1"] == finished.record.test.top1


@pytest.mark.parametrize("overrides", [(), ("model=lenet", "arrangement=plain"), ("trainer.precision=64-true",)])
def test_weights_alone_describe_their_network(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    path = train_run(tmp_path / "runs", *overrides)
    file = Path(shutil.copy(path / "model.safetensors", tmp_path / "net.safetensors"))
    finished = load_finished_run(file)
    assert finished.record is None
    assert has_weights(finished, load_file(file))
    assert finished.settings.directory.identity == load_finished_run(path).settings.directory.identity


def test_weights_that_record_does_not_stand_for_are_rejected(run_path: Path) -> None:
    weights = run_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # one bit of a weight
    weights.write_bytes(content)
    assert get_error(run_path).startswith(f"{weights} is not the file that record.json stands for")


def test_resolve_run_path_finds_id_in_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/0123456789ab").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_run_path(Path("0123456789ab")) == Path("runs/0123456789ab")
    assert resolve_run_path(Path("runs/0123456789ab")) == Path("runs/0123456789ab")
    assert resolve_run_path(Path("missing")) == Path("missing")


def test_home_folder_in_globs_of_runs_is_expanded(
    finished_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(finished_path.parent))
    assert find_finished_runs("~") == find_finished_runs(["~/*"]) == [finished_path]
    assert parse_run(compose_run(Path("'~'"), *SHORT)).directory.path == finished_path


def test_folder_of_runs_is_taken_literally_and_once(
    finished_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(finished_path, tmp_path / "runs[1]" / finished_path.name))
    monkeypatch.chdir(tmp_path)
    assert find_finished_runs(["runs[1]", "./runs[1]", str(path)]) == [Path("runs[1]", path.name)]


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


MISSING = object()
NONSENSE = [MISSING, None, True, "", "text", -1, 0, 0.5, 10**12, 1e300, math.nan, [], [1], {}, {"a": 1}]


def list_key_paths(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The keys and indices that lead to each value in nested dictionaries and lists."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from list_key_paths(child, (*path, key))


def replace_value(node: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy of nested dictionaries and lists with one value replaced or removed."""
    first, *rest = path
    items = dict(node) if isinstance(node, dict) else list(node)
    if rest:
        items[first] = replace_value(items[first], tuple(rest), value)
    elif value is MISSING:
        del items[first]
    else:
        items[first] = value
    return items


def write_info(file: Path, info: Any) -> None:
    """Replaces what a file of weights says about its network."""
    description = {**acl.read_info(file), "info": info}
    save_file(load_file(file), file, {"acl": json.dumps(description)})


def test_nonsense_in_input_format_of_weights_is_refused(run_path: Path) -> None:
    file = Path(shutil.move(run_path / "model.safetensors", run_path.parent))
    info = acl.read_info(file)["info"]
    valid = [("mean", [1]), ("std", [1]), *(("mean", 0, value) for value in (-1, 0, 0.5, 10**12))]
    valid += [("std", 0, value) for value in (0.5, 10**12)]
    for path in list_key_paths(info["input_format"], ("input_format",)):
        for value in NONSENSE:
            if (*path[1:], value) not in valid:
                write_info(file, replace_value(info, path, value))
                assert get_error(file).startswith(f"{file} "), (path, value)


def test_nonsense_in_info_of_weights_is_refused(run_path: Path) -> None:
    file = Path(shutil.move(run_path / "model.safetensors", run_path.parent))
    info = acl.read_info(file)["info"]
    for path in ((), ("config",)):
        for value in NONSENSE:
            write_info(file, replace_value({"": info}, ("", *path), value).get(""))
            assert get_error(file).startswith(f"{file} "), (path, value)


@pytest.mark.parametrize("value", [None, 3, "text", [], [1], {"a": 1}], ids=str)
@pytest.mark.parametrize("section", ["data", "model", "arrangement"])
def test_nonsense_in_saved_configuration_is_refused(run_path: Path, section: str, value: Any) -> None:
    file = Path(shutil.copy(run_path / "model.safetensors", run_path.parent))
    info = acl.read_info(file)["info"]
    write_info(file, replace_value(info, ("config", section), value))
    config = yaml.safe_load((run_path / "config.yaml").read_text())
    (run_path / "config.yaml").write_text(yaml.safe_dump({**config, section: value}))
    for path, damaged in ((file, file), (run_path, run_path / "config.yaml")):
        assert get_error(path).startswith(f"{damaged} ")


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("model",), {"backbone": "timm/nope", "layer": None}, "timm has no model 'nope'"),
        (("model", "kernel_size"), 5, "unknown option model.kernel_size=5"),
        (("trainer", "precision"), "8-bit", "trainer.precision=8-bit is invalid"),
        (("seed",), "${nope}", "Interpolation key 'nope' not found"),
        (("arrangement", "conv1"), "G", "arrangement.conv1=G is invalid"),
    ],
)
def test_configuration_that_does_not_describe_network_is_refused(
    run_path: Path, path: tuple[str, ...], value: Any, problem: str
) -> None:
    file = Path(shutil.move(run_path / "model.safetensors", run_path.parent))
    info = acl.read_info(file)["info"]
    if path[0] == "model" and len(path) > 1:
        info["config"]["model"].setdefault(path[1], None)
    write_info(file, replace_value(info, ("config", *path), value))
    message = get_error(file)
    assert message.startswith(f"{file} ") and problem in message


def test_recursive_alias_in_configuration_is_refused(run_path: Path) -> None:
    with (run_path / "config.yaml").open("a") as file:
        file.write("again: &again {again: *again}\n")
    assert get_error(run_path).startswith(f"{run_path / 'config.yaml'} ")


@pytest.mark.parametrize("best_epoch", [-1, 0, 2, 999])
def test_best_epoch_that_run_does_not_have_is_refused(run_path: Path, best_epoch: int) -> None:
    record = json.loads((run_path / "record.json").read_text())
    (run_path / "record.json").write_text(json.dumps({**record, "best_epoch": best_epoch}))
    assert get_error(run_path).startswith(
        f"{run_path / 'record.json'} is not a record of a run: best_epoch={best_epoch} "
    )


History = dict[str, Tensor]


@pytest.mark.parametrize(
    "damage",
    [
        lambda history: {},
        lambda history: {"x": torch.zeros(2, 1)},
        lambda history: {**history, "conv9/G/theta": torch.zeros(2, 1)},
        lambda history: {f"conv9{name}": values for name, values in history.items()},
        lambda history: dict(list(history.items())[1:]),
        lambda history: {name: values[:1] for name, values in history.items()},
        lambda history: {name: values[:, :-1] for name, values in history.items()},
        lambda history: {name: values[..., None] for name, values in history.items()},
        lambda history: {name: values[0] for name, values in history.items()},
        lambda history: {name: values.new_tensor(0.0) for name, values in history.items()},
        lambda history: {name: values * math.nan for name, values in history.items()},
        lambda history: {name: values / 0 for name, values in history.items()},
        lambda history: {name: values.long() for name, values in history.items()},
        lambda history: {name: values.to(torch.complex64) for name, values in history.items()},
    ],
)
def test_akp_history_that_does_not_fit_network_is_refused(run_path: Path, damage: Callable[[History], History]) -> None:
    finished, file = load_finished_run(run_path), run_path / "akps.safetensors"
    save_file({name: values.contiguous() for name, values in damage(load_akp_history(finished)).items()}, file)
    with pytest.raises(UsageError, match=rf"^{file} is not the AKP history of this run: ") as error:
        load_akp_history(finished)
    assert "\n" not in str(error.value)


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
