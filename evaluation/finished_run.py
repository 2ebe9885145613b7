"""Loads the trained networks of finished runs."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
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
from training.loop import snapshot_akps
from training.provenance import digest_file, find_changed_inputs
from training.record import Record, read_record
from training.run_directory import RunDirectory
from training.settings import RunSettings, load_run_data, parse_run
from training.validation import construct

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
    record: Record | None  # None: loaded from the file of its weights alone
    input_format: InputFormat
    model: nn.Module  # with the weights of its best epoch, in eval mode
    classes: list[str] | None = None  # names, by label; None: unknown


def resolve_run_path(path: Path) -> Path:
    """The folder of a run, which may be given as its id if it is in ``runs/``."""
    in_runs = Path("runs") / path
    return in_runs if not path.exists() and in_runs.exists() else path


def find_finished_runs(runs: str | list[str]) -> list[Path]:
    """Finds the folders of finished runs.

    Args:
        runs: folders of runs, or of single runs; globs are allowed. A folder that is listed twice counts once.

    Raises:
        UsageError: if there are none.
    """
    patterns = [runs] if isinstance(runs, str) else runs
    # Functions of os.path, because those of Path raise for unknown users and absolute patterns.
    names = [os.path.expanduser(pattern) for pattern in patterns]  # noqa: PTH111
    folders = [Path(found) for name in names for found in ([name] if Path(name).is_dir() else glob(name))]  # noqa: PTH207
    paths = [path.parent for folder in folders for name in RECORDS for path in folder.glob(name)]
    if not paths:
        raise UsageError(f"no finished run in {', '.join(patterns)}; set runs=[...] to folders of runs")
    return sorted({path.resolve(): path for path in reversed(paths)}.values())


def read_run_folder(path: Path, data_location: DataLocation | None = None) -> tuple[RunSettings, Record]:
    """Reads the configuration and the record of a finished run.

    Raises:
        UsageError: for a folder without a finished run, or a file that is corrupt or belongs to another run.
    """
    if not path.exists():
        raise UsageError(f"there is no run {path}: it is neither a folder, nor a file, nor the id of a run in runs/")
    if not path.is_dir():
        raise UsageError(f"{path} is neither the folder of a run nor a file of weights (.safetensors)")
    for name, problem in (("config.yaml", "is not the folder of a run"), ("record.json", "is an unfinished run")):
        if not (path / name).exists():
            raise UsageError(f"{path} {problem}: it has no {name}")
    record = read_record(path / "record.json")
    config_file = path / "config.yaml"
    settings = _parse_saved(partial(OmegaConf.load, config_file), config_file, data_location)
    if record.config != settings.directory.identity:
        raise UsageError(f"{config_file} and record.json disagree: they belong to different runs")
    return replace(settings, directory=RunDirectory(path.parent, record.config)), record  # it may have been moved


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
        settings = _parse_saved(partial(OmegaConf.create, info["config"]), weights, data_location)
    else:
        settings, record = read_run_folder(path, data_location)
        weights = path / "model.safetensors"
        info = _read_info(weights)
        if info["config"] != record.config:
            raise UsageError(f"{weights} and record.json disagree: they belong to different runs")
        if record.weights is not None and record.weights != digest_file(weights):
            raise UsageError(f"{weights} is not the file that record.json stands for; delete {path} and train again")
    plain = {name: value for name, value in settings.model.items() if name not in ("pretrained", "random_layers")}
    plain |= {"arrangement": {}, "layer": None}
    if plain.get("control") != "zero_sum":
        plain["control"] = None  # the other controls change initial weights alone
    input_format: InputFormat = info["input_format"]
    try:
        model = models.create_model(channels=input_format.channels, classes=input_format.classes, **plain)
    except ValueError as error:
        raise UsageError(f"{weights} does not describe a network: {format_error(error)}") from error
    if settings.trainer.precision in ("64-true", "64"):
        model.double().register_forward_pre_hook(_cast_to_dtype_of_parameters)
    try:
        acl.load(model, weights)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if record is not None:
        model.random_layers = record.random_layers  # type: ignore[assignment] # as of the network before training
    return FinishedRun(path, settings, record, input_format, model.eval(), info.get("classes"))


def load_data_as_trained(run: FinishedRun, settings: RunSettings | None = None) -> Data:
    """Loads the data of a finished run, as ``adapt_data`` does; reports on stderr what has changed.

    Args:
        run: the finished run.
        settings: with other data; None: the run's own.
    """
    data = adapt_data(load_run_data(settings or run.settings), run)
    recorded = {} if run.record is None else run.record.to_dict()
    if settings is None and find_changed_inputs(recorded, {"data": {"digest": data.digest}}):
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
        history = load_file(file) if file.exists() else {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} is corrupt ({error}); move it away to continue without the AKP history") from error
    epochs = run.settings.trainer.epochs
    shapes = {name: (epochs + 1, *values.shape) for name, values in snapshot_akps(run.model).items()}
    for name in (shapes.keys() | history.keys()) if file.exists() else ():
        values = history.get(name, torch.empty(()))
        if values.shape != shapes.get(name) or not (values.is_floating_point() and values.isfinite().all()):
            expected = f"hold finite numbers {shapes[name]}" if name in shapes else "be absent"
            raise UsageError(f"{file} is not the AKP history of this run: {name} should {expected}")
    return history


def load_own_akp_history(run: FinishedRun) -> dict[str, Tensor]:
    """The AKPs before training and after each epoch; empty for a network without AKPs.

    Raises:
        UsageError: if the history is missing, or the AKPs of the best epoch are not those of the network.
    """
    assert run.record is not None
    history, trained, best = load_akp_history(run), snapshot_akps(run.model), run.record.best_epoch
    file = run.path / "akps.safetensors"
    if trained and not history:
        raise UsageError(f"{file} is missing; delete {run.path} and train again")
    # The network of a run with half precision may be rebuilt with full precision.
    tolerance = 0.02 if run.settings.trainer.precision in ("16-true", "bf16-true") else 1e-4
    for name, values in trained.items():
        if not torch.allclose(history[name][best].float(), values, rtol=tolerance, atol=tolerance):
            raise UsageError(f"{file} is of another run: its {name} at epoch {best} are not those of model.safetensors")
    return history


def _read_info(weights: Path) -> dict[str, Any]:
    """What ``serialize_weights`` stored with the weights, with valid ``input_format`` and ``classes``."""
    try:
        info = acl.read_info(weights)["info"]
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{weights} is not a readable file of weights: {format_error(error)}") from error
    if not isinstance(info, dict) or not all(isinstance(info.get(key), dict) for key in ("config", "input_format")):
        raise UsageError(f"{weights} was not written by a run: it does not say how its network is built")
    try:
        input_format = construct(InputFormat, info["input_format"], "input_format")
    except UsageError as error:
        raise UsageError(f"{weights} is damaged: {error}") from error
    classes = info.get("classes")
    if classes is not None and (
        not isinstance(classes, list)
        or not all(isinstance(name, str) for name in classes)
        or not len(classes) == len(set(classes)) == input_format.classes
    ):
        raise UsageError(f"{weights} is damaged: its classes should be {input_format.classes} different names")
    return {**info, "input_format": input_format}


def _parse_saved(load: Callable[[], Any], file: Path, data_location: DataLocation | None) -> RunSettings:
    """Validates a saved configuration, with the options that it lacks: new ones, and those that no result depends on.

    Raises:
        UsageError: if the configuration is damaged; it names ``file``, which holds it.
    """
    try:
        saved = load()
        if not isinstance(saved, DictConfig) or not isinstance(saved.get("data"), DictConfig):
            raise UsageError("it has no section data")
        current = compose([f"data={saved.data.get('name')}", "arrangement=plain"])
        OmegaConf.set_struct(current, False)
        del current["model"]  # its options are those of another network
        new_location = {name: value for name, value in (data_location or {}).items() if value is not None}
        cfg = OmegaConf.merge(current, saved, {"data": new_location})
        assert isinstance(cfg, DictConfig)
        if OmegaConf.is_missing(cfg.data, "root"):  # in a file of weights; only reading the data needs it
            cfg.data.root = None
        return parse_run(cfg)
    except Exception as error:  # OmegaConf and YAML raise errors of many types for damaged content
        raise UsageError(f"{file} does not hold the configuration of a run: {format_error(error)}") from error


def _cast_to_dtype_of_parameters(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook, because data are normalized to float32."""
    return tuple(x.to(next(model.parameters()).dtype) for x in inputs)
