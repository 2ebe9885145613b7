"""Loads the trained networks of finished runs."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.utilities.seed import seed_everything
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import TypedDict

import acl
import models
from training.config import compose, format_error
from training.data import Data, InputFormat
from training.distributed import build_fabric
from training.errors import UsageError
from training.evaluate import predict
from training.provenance import find_changed_inputs
from training.run_directory import RunDirectory, read_record
from training.runs import RunSettings, create_network, load_run_data, parse_run

RECORDS = ("record.json", "*/record.json")
"""Where the records are in the folder of a run, or of many runs."""


class DataLocation(TypedDict):
    """Where a finished run's data are now; None: unchanged."""

    root: str | None
    cache: str | None


@dataclass(frozen=True)
class FinishedRun:
    path: Path  # the run's folder, or the file of its weights
    settings: RunSettings
    record: dict[str, Any] | None  # None: loaded from the file of its weights alone
    input_format: InputFormat
    model: nn.Module  # with the weights of its best epoch, in eval mode
    classes: list[str] | None = None  # names, by label; None: unknown


def serialize_weights(model: nn.Module, run_identity: Mapping[str, Any], data: Data) -> bytes:
    """Serializes a network with everything that ``load_finished_run`` needs to build it again."""
    info = {"config": dict(run_identity), "input_format": asdict(data.input_format), "classes": data.classes}
    return acl.serialize(model, info)


def resolve_run_path(path: Path) -> Path:
    """The folder of a run, which may be given as its id if it is in ``runs/``."""
    in_runs = Path("runs") / path
    return in_runs if not path.exists() and in_runs.exists() else path


def find_finished_runs(runs: str | list[str]) -> list[Path]:
    """Finds the folders of finished runs.

    Args:
        runs: folders of runs, or of single runs; globs are allowed.

    Raises:
        UsageError: if there are none.
    """
    patterns = [runs] if isinstance(runs, str) else runs
    folders = [Path(name) for pattern in patterns for name in glob(pattern)]  # noqa: PTH207 - absolute patterns too
    paths = {path.parent for folder in folders for name in RECORDS for path in folder.glob(name)}
    if not paths:
        raise UsageError(f"no finished run in {', '.join(patterns)}; set runs=[...] to folders of runs")
    return sorted(paths)


def read_run_folder(path: Path, data_location: DataLocation | None = None) -> tuple[RunSettings, dict[str, Any]]:
    """Reads the configuration and the record of a finished run.

    Raises:
        UsageError: for a folder without a finished run, or a file that is corrupt or belongs to another run.
    """
    for name, problem in (("config.yaml", "is not the folder of a run"), ("record.json", "is an unfinished run")):
        if not (path / name).exists():
            raise UsageError(f"{path} {problem}: it has no {name}")
    record = read_record(path / "record.json")
    settings = parse_run(_complete(_read_config(path / "config.yaml"), data_location))
    if record["config"] != settings.directory.identity:
        raise UsageError(f"{path / 'config.yaml'} and record.json disagree: they belong to different runs")
    return replace(settings, directory=RunDirectory(path.parent, record["config"])), record  # it may have been moved


def load_finished_run(path: Path, data_location: DataLocation | None = None) -> FinishedRun:
    """Loads a finished run with its trained network.

    Args:
        path: the run's folder, its id as in ``resolve_run_path``, or the file of its weights (``.safetensors``).
        data_location: where the data are now, if they moved.

    Raises:
        UsageError: for a folder without a finished run, or a file that is corrupt or belongs to another run.
    """
    path = resolve_run_path(path)
    if path.suffix == ".safetensors":
        weights, record = path, None
        info = _read_info(weights)
        if info is None:
            raise UsageError(f"{weights} was not written by a run: it does not say how its network is built")
        settings = parse_run(_complete(OmegaConf.create(info["config"]), data_location))
    else:
        settings, record = read_run_folder(path, data_location)
        weights = path / "model.safetensors"
        info = _read_info(weights)
        if info is None:
            return FinishedRun(path, settings, record, *_load_from_plain_file(settings, weights))
        if info["config"] != record["config"]:
            raise UsageError(f"{weights} and record.json disagree: they belong to different runs")
    input_format, classes = InputFormat(**info["input_format"]), info.get("classes")
    if classes is not None and (
        not isinstance(classes, list)
        or not all(isinstance(name, str) for name in classes)
        or not len(classes) == len(set(classes)) == input_format.classes
    ):
        raise UsageError(f"{weights} is corrupt: its classes should be {input_format.classes} different names")
    plain = {**settings.model, "arrangement": {}, "layer": None}
    for name in ("pretrained", "random_layers"):
        plain.pop(name, None)
    model = models.create_model(channels=input_format.channels, classes=input_format.classes, **plain)
    if settings.trainer.precision in ("64-true", "64"):
        model.double()
    try:
        acl.load(model, weights)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return FinishedRun(path, settings, record, input_format, model.eval(), classes)


def load_data_as_trained(run: FinishedRun, settings: RunSettings | None = None) -> Data:
    """Loads the data of a finished run, as ``adapt_data`` does; reports on stderr what has changed.

    Args:
        run: the finished run.
        settings: with other data; None: the run's own.
    """
    data = adapt_data(load_run_data(settings or run.settings), run)
    if settings is None and find_changed_inputs(run.record or {}, {"data": {"digest": data.digest}}):
        print(f"{run.path} was recorded with other data than these", file=sys.stderr)
    return data


def adapt_data(data: Data, run: FinishedRun) -> Data:
    """Makes data yield the input and the labels that a network was trained on.

    Raises:
        UsageError: if the formats or the names of the classes differ.
    """
    if run.classes is not None:
        trained, found = set(run.classes), set(data.classes)
        names = {"unknown": found - trained, "missing": trained - found}
        if any(names.values()):
            differences = "; ".join(f"{which} {', '.join(sorted(group))}" for which, group in names.items() if group)
            raise UsageError(f"the data have other classes than {run.path}: {differences}")
    expected, given = run.input_format, data.input_format
    for name in ("channels", "height", "width", "classes"):
        wanted, actual = getattr(expected, name), getattr(given, name)
        if wanted != actual:
            raise UsageError(f"the data do not fit {run.path}: {name} {actual} instead of {wanted}")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (expected.mean, expected.std))
    data = replace(data, mean=mean, std=std)
    if run.classes is not None and run.classes != data.classes:  # in another order
        labels = torch.tensor([run.classes.index(name) for name in data.classes])
        splits = {name: getattr(data, name) for name in ("train", "val", "test")}
        renumbered = {name: replace(split, labels=labels[split.labels]) for name, split in splits.items()}
        data = replace(data, classes=run.classes, **renumbered)
    return data


def build_run_fabric(run: FinishedRun) -> Fabric:
    """Builds Fabric for one device, with the precision of a run."""
    return build_fabric(replace(run.settings.trainer, strategy="auto", devices=1, nodes=1))


def evaluate_run(run: FinishedRun, data: Data, split: str) -> dict[str, float]:
    """Evaluates a run's network on a split, as ``predict_run`` does."""
    return predict_run(run, data, split)[0]


def predict_run(run: FinishedRun, data: Data, split: str) -> tuple[dict[str, float], Tensor]:
    """Runs ``predict`` on a split as ``prepare_run`` prepares it."""
    model, data, fabric = prepare_run(run, data)
    return predict(model, data, getattr(data, split), fabric)


def prepare_run(run: FinishedRun, data: Data) -> tuple[nn.Module, Data, Fabric]:
    """Moves a run's network and data to the device, with the precision and memory format that it was trained with."""
    fabric = build_run_fabric(run)
    if run.settings.trainer.channels_last:
        run.model.to(memory_format=torch.channels_last)
    return fabric.setup_module(run.model), data.to(fabric.device), fabric


def load_akp_history(run: FinishedRun) -> dict[str, Tensor]:
    """The AKPs before training and after each epoch; empty for a run without analytic layers."""
    file = run.path / "akps.safetensors"
    try:
        return load_file(file) if file.exists() else {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} is corrupt ({error}); move it away to continue without the AKP history") from error


def _read_info(weights: Path) -> dict[str, Any] | None:
    """What ``serialize_weights`` stored with the weights; None for a file of an earlier version."""
    try:
        with safe_open(weights, "pt") as content:
            if content.metadata() is None:
                return None
        info = acl.read_info(weights)["info"]
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{weights} is not a readable file of weights: {format_error(error)}") from error
    if not isinstance(info, dict) or not {"config", "input_format"} <= info.keys():
        raise UsageError(f"{weights} was not written by a run: it does not say how its network is built")
    return info


def _read_config(file: Path) -> DictConfig:
    try:
        config = OmegaConf.load(file)
        if isinstance(config, DictConfig) and isinstance(config.get("data"), DictConfig):
            return config
        problem = "it has no section data"
    except (OSError, UnicodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        problem = format_error(error)
    raise UsageError(f"{file} is not the configuration of a run: {problem}")


def _complete(saved: DictConfig, data_location: DataLocation | None) -> DictConfig:
    """Adds the options that a saved configuration lacks: those added since, and those that no result depends on."""
    current = compose([f"data={saved.data.get('name')}"])
    OmegaConf.set_struct(current, False)
    new_location = {name: value for name, value in (data_location or {}).items() if value is not None}
    cfg = OmegaConf.merge(current, saved, {"data": new_location})
    assert isinstance(cfg, DictConfig)
    if OmegaConf.is_missing(cfg.data, "root"):  # in a file of weights; only reading the data needs it
        cfg.data.root = None
    return cfg


def _load_from_plain_file(settings: RunSettings, weights: Path) -> tuple[InputFormat, nn.Module]:
    """Loads weights that earlier versions saved without a description; the data tell the format of the input."""
    data = load_run_data(settings)
    seed_everything(settings.seed, verbose=False)  # auto chooses kinds based on the initial weights
    if "pretrained" in settings.model and "auto" not in settings.model["arrangement"].values():
        settings = replace(settings, model={**settings.model, "pretrained": False})  # its file may be gone
    model = create_network(settings, data.channels, len(data.classes))
    try:
        # Earlier versions stored an empty parameter for layers without plain kernels.
        model.load_state_dict({name: tensor for name, tensor in load_file(weights).items() if tensor.numel()})
    except Exception as error:
        raise UsageError(f"{weights} does not fit the network of {weights.parent}: {format_error(error)}") from error
    return data.input_format, model.eval()
