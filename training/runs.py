"""Turns configurations into validated settings, data and models, and loads finished runs."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning_fabric.utilities.seed import seed_everything
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, validate_call
from safetensors.torch import load_file
from torch import nn
from typing_extensions import TypedDict

import models
from training.config import flatten, format_error, identity, resolve
from training.data import Augmentation, Data, load_data
from training.distributed import TrainerSettings
from training.errors import UsageError
from training.loggers import LoggerSettings
from training.optim import OptimSettings
from training.run_directory import RunDirectory
from training.validation import STRICT, construct


@dataclass(frozen=True)
class RunSettings:
    """Everything that defines a run, validated, so that lower-level modules need no configuration."""

    config: dict[str, Any]  # the resolved configuration, for config.yaml and loggers
    directory: RunDirectory
    seed: int
    fresh: bool
    model: dict[str, Any]  # arguments of models.create_model
    data: dict[str, Any]  # arguments of load_data
    optim: OptimSettings
    trainer: TrainerSettings
    logger: LoggerSettings


def open_run_directory(cfg: DictConfig) -> RunDirectory:
    """The folder of the run that a configuration describes; nothing is written."""
    return RunDirectory(Path(cfg.paths.runs), identity(cfg))


def parse_run(cfg: DictConfig) -> RunSettings:
    """Validates a run's configuration (configs/train.yaml) and turns it into plain objects.

    Raises:
        UsageError: for the first invalid value.
    """
    config = resolve(cfg)
    augmentation_options = {f.name: config["data"][f.name] for f in fields(Augmentation) if f.name in config["data"]}
    augmentation = construct(Augmentation, augmentation_options, "data")
    data = {name: value for name, value in config["data"].items() if name not in augmentation_options}
    size = data.get("size")
    if augmentation.crop is not None and isinstance(size, int) and augmentation.crop > size:
        raise UsageError(f"data.crop={augmentation.crop} exceeds data.size={size}, the size of the images")
    arrangement = {name: text for name, text in flatten(config["arrangement"]).items() if text is not None}
    return RunSettings(
        config=config,
        directory=open_run_directory(cfg),
        **construct(_validate_run_options, {name: config[name] for name in ("seed", "fresh") if name in config}),
        model={**config["model"], "arrangement": arrangement},
        data={**data, "augmentation": augmentation},
        optim=construct(OptimSettings, config["optim"], "optim"),
        trainer=construct(TrainerSettings, config["trainer"], "trainer"),
        logger=construct(LoggerSettings, config["logger"], "logger"),
    )


@validate_call(config=STRICT)
def _validate_run_options(seed: Annotated[int, Field(ge=0, lt=2**32)], fresh: bool = False) -> dict[str, Any]:
    return {"seed": seed, "fresh": fresh}


def load_run_data(settings: RunSettings) -> Data:
    """Loads the data of a run onto the CPU; raises as ``load_data`` does."""
    memory_format = torch.channels_last if settings.trainer.channels_last else torch.contiguous_format
    return replace(construct(load_data, settings.data, "data"), memory_format=memory_format)


def build_model(settings: RunSettings, data: Data) -> nn.Module:
    """Builds the network of a run with its initial weights, in training mode.

    Raises:
        UsageError: for an arrangement that does not fit, weights that are unavailable, or images that the network
            does not accept.
    """
    try:
        model = models.create_model(channels=data.channels, classes=data.classes, **settings.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    batch = next(data.eval_batches(data.train[:1]))
    try:
        with torch.no_grad():
            model.eval()(batch.images)
    except Exception as error:
        size = " x ".join(map(str, batch.images.shape[1:]))
        backbone = settings.model["backbone"]
        raise UsageError(
            f"model.backbone={backbone} does not accept images of {size}: {format_error(error)}"
        ) from error
    return model.train()


class DataLocation(TypedDict):
    """Where a finished run's data are now; None: unchanged."""

    root: str | None
    cache: str | None


@dataclass(frozen=True)
class FinishedRun:
    path: Path
    settings: RunSettings
    record: dict[str, Any]
    data: Data
    model: nn.Module  # with the weights of its best epoch, in eval mode


def resolve_run_path(path: Path) -> Path:
    """The folder of a run, which may be given as its id if it is in ``runs/``."""
    in_runs = Path("runs") / path
    return in_runs if not path.exists() and in_runs.exists() else path


def load_finished_run(path: Path, data_location: DataLocation | None = None) -> FinishedRun:
    """Loads a finished run with its data and its trained network.

    Args:
        path: the run's folder, or its id as in ``resolve_run_path``.
        data_location: where the data are now, if they moved.

    Raises:
        UsageError: for a folder without a finished run, or missing data.
    """
    path = resolve_run_path(path)
    for name, problem in (("config.yaml", "is not the folder of a run"), ("record.json", "is an unfinished run")):
        if not (path / name).exists():
            raise UsageError(f"{path} {problem}: it has no {name}")
    new_locations = {name: value for name, value in (data_location or {}).items() if value is not None}
    try:
        cfg = OmegaConf.merge(OmegaConf.load(path / "config.yaml"), {"data": new_locations})
    except OmegaConfBaseException as error:
        raise UsageError(f"{path / 'config.yaml'} is not the configuration of a run: {format_error(error)}") from error
    assert isinstance(cfg, DictConfig)
    settings = parse_run(cfg)
    data = load_run_data(settings)
    seed_everything(settings.seed, verbose=False)  # auto chooses kinds based on the initial weights
    if "pretrained" in settings.model and "auto" not in settings.model["arrangement"].values():
        model = build_model(replace(settings, model={**settings.model, "pretrained": False}), data)
    else:
        model = build_model(settings, data)
    weights = path / "model.safetensors"
    try:
        # Earlier versions stored an empty parameter for layers without plain kernels.
        model.load_state_dict({name: tensor for name, tensor in load_file(weights).items() if tensor.numel()})
    except Exception as error:
        raise UsageError(f"{weights} does not fit the network of {path}: {format_error(error)}") from error
    return FinishedRun(path, settings, json.loads((path / "record.json").read_text()), data, model.eval())
