"""Turns configurations into validated settings, data and models."""

import atexit
import functools
import inspect
import json
import os
import tempfile
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field
from torch import nn

import models
from acl import Arrangement, LayerOptions
from acl.convert import Init
from acl.metric import MetricName
from models.controls import apply_control
from models.library import find_torchvision_weights
from training.config import flatten, format_error, identity, resolve
from training.data import Augmentation, Data, load_data
from training.datasets import digest_dataset
from training.errors import UsageError
from training.loggers import LoggerSettings
from training.optim import OptimSettings
from training.provenance import digest_file, digest_sources, find_changed_inputs
from training.record import Record
from training.run_directory import RunDirectory
from training.validation import Count, FilePath, Seed, check_arguments, construct, format_value, strict_dataclass


@strict_dataclass
class RunOptions:
    """The options outside the sections."""

    seed: Seed
    fresh: bool = False
    debug: Literal["smoke"] | None = None


@strict_dataclass
class PathSettings:
    """The options of the section ``paths``."""

    runs: FilePath
    results: FilePath


@strict_dataclass
class LayerSettings(LayerOptions):
    """The options of configs/model/layer, which ``acl.convert`` takes."""

    init: Init | None = None
    tolerance: float | None = Field(default=None, ge=0, le=1)
    metric: MetricName | None = None


Precision = Literal["16-mixed", "16-true", "bf16-mixed", "bf16-true", "32-true", "64-true", "16", "bf16", "32", "64"]
"""Those of Lightning Fabric that need no other library; the last four are short for 16-mixed, bf16-mixed and so on."""


@strict_dataclass
class TrainerSettings:
    """The options of configs/trainer: the length of a run, its devices and their precision."""

    epochs: Count
    batch_size: Count
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
    devices: Count
    nodes: Count
    precision: Precision
    deterministic: bool
    channels_last: bool
    compile: bool
    test: bool
    checkpoint_minutes: float = Field(gt=0)


@dataclass(frozen=True)
class RunSettings:
    """Everything that defines a run, validated, so that lower-level modules need no configuration."""

    config: dict[str, Any]  # the resolved configuration, for config.yaml and loggers
    paths: PathSettings
    directory: RunDirectory
    seed: int
    fresh: bool
    model: dict[str, Any]  # arguments of models.create_model
    data: dict[str, Any]  # arguments of load_data
    optim: OptimSettings
    trainer: TrainerSettings
    logger: LoggerSettings


SMOKE_BATCH = 4
"""The images of each of the two steps of ``debug=smoke``."""
SECTIONS = ("paths", "data", "model", "arrangement", "optim", "trainer", "logger")


@functools.cache
def create_smoke_folder() -> Path:
    """A temporary folder for everything that ``debug=smoke`` writes; it is deleted when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="anann-smoke-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def parse_run(cfg: DictConfig) -> RunSettings:
    """Validates a run's configuration (configs/train.yaml) and turns it into plain objects.

    Raises:
        UsageError: for the first invalid value.
    """
    config = resolve(cfg)
    for name in SECTIONS:
        if not isinstance(section := config.get(name), dict):
            raise UsageError(f"{name}={format_value(section)} is invalid: it should be a section of options")
    options = construct(RunOptions, {name: value for name, value in config.items() if name not in SECTIONS})
    paths = construct(PathSettings, config["paths"], "paths")
    runs = paths.runs if options.debug is None else create_smoke_folder()  # where the run is; nothing is written yet
    settings = RunSettings(
        config=config,
        paths=paths,
        directory=RunDirectory(runs, identity(config)),
        seed=options.seed,
        fresh=options.fresh,
        model=_parse_model(config["model"], _parse_arrangement(config["arrangement"])),
        data=parse_data(config["data"]),
        optim=construct(OptimSettings, config["optim"], "optim"),
        trainer=construct(TrainerSettings, config["trainer"], "trainer"),
        logger=construct(LoggerSettings, config["logger"], "logger"),
    )
    return settings if options.debug is None else _shrink(settings)


def _shrink(settings: RunSettings) -> RunSettings:
    """Reduces a run to two steps on a handful of images, on one device, not compiled and not logged."""
    data: dict[str, Any] = {**settings.data, "max_images": 2 * SMOKE_BATCH, "train_share": None}
    if "cache" in data:
        data["cache"] = str(create_smoke_folder())
    trainer = replace(
        settings.trainer, epochs=1, batch_size=SMOKE_BATCH, compile=False, strategy="auto", devices=1, nodes=1
    )
    return replace(settings, data=data, trainer=trainer, logger=LoggerSettings(name="none"))


def parse_data(section: dict[str, Any]) -> dict[str, Any]:
    """Turns the section ``data`` of a configuration into the arguments of ``load_data``."""
    augmentation_names = {field.name for field in fields(Augmentation)}
    augmentation_options = {name: value for name, value in section.items() if name in augmentation_names}
    augmentation = construct(Augmentation, augmentation_options, "data")
    options = {name: value for name, value in section.items() if name not in augmentation_names}
    size = options.get("size")
    if augmentation.crop is not None and isinstance(size, int) and augmentation.crop > size:
        raise UsageError(f"data.crop={augmentation.crop} exceeds data.size={size}, the size of the images")
    return {**options, "augmentation": augmentation}


def _parse_model(section: dict[str, Any], arrangement: dict[str, str]) -> dict[str, Any]:
    backbone, layer, control = (section.get(name) for name in ("backbone", "layer", "control"))
    if not isinstance(backbone, str):
        raise UsageError(f"model.backbone={format_value(backbone)} is invalid: it should be the name of a network")
    options = {name: value for name, value in section.items() if name not in ("backbone", "layer", "control")}
    try:
        constructor = models.find_backbone(backbone)
    except ValueError as error:
        raise UsageError(f"model.backbone={backbone} is invalid: {error}") from error
    channels = classes = 1  # the data determine them
    check_arguments(partial(constructor, channels, classes), options, "model")
    if control is not None:
        check_arguments(partial(apply_control, nn.Module()), {"control": control}, "model")
    if layer is not None:
        if not isinstance(layer, dict):
            raise UsageError(f"model.layer={format_value(layer)} is invalid: it should be null or a section of options")
        known = {field.name for field in fields(LayerSettings)}
        given = {name: value for name, value in layer.items() if value is not None or name not in known}
        construct(LayerSettings, given, "model.layer")
        is_auto = any(Arrangement.parse(text).auto for text in arrangement.values())
        if layer.get("tolerance") is not None and not is_auto:
            raise UsageError(f"model.layer.tolerance={layer['tolerance']} needs the arrangement auto")
        if layer.get("metric") is not None and layer.get("init") != "fit" and not is_auto:
            raise UsageError(f"model.layer.metric={layer['metric']} needs a fit: set model.layer.init=fit")
    return {**section, "arrangement": arrangement}


def _parse_arrangement(section: dict[str, Any]) -> dict[str, str]:
    texts = {name: text for name, text in flatten(section).items() if text is not None}
    for name, text in texts.items():
        try:
            Arrangement.parse(text)
        except (TypeError, ValueError) as error:
            raise UsageError(f"arrangement.{name}={format_value(text)} is invalid: {error}") from error
    return texts


def load_run_data(settings: RunSettings) -> Data:
    """Loads the data of a run onto the CPU; raises as ``load_data`` does."""
    memory_format = torch.channels_last if settings.trainer.channels_last else torch.contiguous_format
    options = {"share_seed": settings.seed, **settings.data}
    return replace(construct(load_data, options, "data"), memory_format=memory_format)


def find_changes(settings: RunSettings, record: Record) -> list[str]:
    """Names what has changed since a run was recorded: its code, data or pretrained weights.

    Inputs that are not on this machine, or that an old record does not describe, have not changed.
    """
    changes = [] if record.sources == digest_sources() else ["code"]
    if record.data is not None:
        name = settings.data["name"]
        reader_options = settings.data.keys() - inspect.signature(load_data).parameters.keys()
        options = json.dumps({key: settings.data[key] for key in sorted(reader_options)})
        inputs = {"data": {"digest": digest_dataset(name, options)}, "pretrained": digest_pretrained(settings)}
        changes += find_changed_inputs(record.to_dict(), inputs)
    return changes


def describe_inputs(settings: RunSettings, data: Data) -> dict[str, Any]:
    """Describes what a run is trained on, for its record and its checkpoints."""
    sizes = {name: len(getattr(data, name)) for name in ("train", "val", "test")}
    return {"data": {"digest": data.digest, **sizes}, "pretrained": digest_pretrained(settings)}


def digest_pretrained(settings: RunSettings) -> str | None:
    """A hash of the file of pretrained weights; None without one, if it is missing, and for timm's own weights."""
    backbone, pretrained = settings.model["backbone"], settings.model.get("pretrained", False)
    if pretrained is True and backbone in models.TORCHVISION:
        pretrained = str(find_torchvision_weights(backbone))
    if not isinstance(pretrained, str):
        return None
    return digest_file(Path(os.path.expanduser(pretrained)))  # noqa: PTH111 - as models.library does


def create_network(settings: RunSettings, channels: int, classes: int) -> nn.Module:
    """Creates the network of a run with its initial weights.

    Raises:
        UsageError: for an arrangement that does not fit, or weights that are unavailable.
    """
    try:
        return models.create_model(channels=channels, classes=classes, **settings.model)
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_model(settings: RunSettings, data: Data) -> nn.Module:
    """Creates the network of a run for its data, in training mode.

    Raises:
        UsageError: as ``create_network`` does, and for images that the network does not accept.
    """
    model = create_network(settings, data.channels, len(data.classes))
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
