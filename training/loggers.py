"""Experiment trackers, which log metrics in addition to metrics.csv."""

import csv
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError
from torch import nn

from acl import analytic_layers
from training.errors import UsageError
from training.record import Record
from training.run_directory import RunDirectory
from training.validation import strict_dataclass

if TYPE_CHECKING:
    import pandas as pd


@strict_dataclass
class LoggerSettings:
    """The options of configs/logger."""

    name: Literal["none", "wandb"]
    project: str = Field(default="anann", min_length=1)
    entity: str | None = None
    group: str | None = None
    row: str | None = None
    title: str | None = None
    tags: list[str] = Field(default_factory=list)
    pictures_every: int = Field(default=5, ge=1)


class Logger:
    """Logs nothing; the base class of loggers. Leaving its context ends the log, whether the run finished or not."""

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def start(self, epoch: int) -> None:
        """Called before training; ``epoch`` is the number of epochs that an interrupted run has completed."""

    def log(self, metrics: dict[str, float]) -> None:
        """Logs the metrics of one epoch."""

    def finish(self, record: Record) -> None:
        """Logs the record of the finished run."""


@contextmanager
def report_refusals() -> Iterator[None]:
    """Turns errors of W&B into one line."""
    import wandb

    try:
        yield
    except (wandb.Error, ValidationError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, ValidationError):
            reason = f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        elif isinstance(error, wandb.errors.CommError):
            reason += "; set WANDB_MODE=offline to log without a connection"
        raise UsageError(f"W&B error: {reason}") from error


def _choose_mode() -> Any:
    """The mode of the environment or of ``wandb offline``; otherwise online, or offline without an API key."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    return mode if mode != "online" or wandb.login(prompt=False) else "offline"


def check_logger(settings: LoggerSettings) -> None:
    """Raises UsageError if W&B refuses the options or the API key, or cannot be reached, before a run does any work."""
    if settings.name == "wandb":
        import wandb

        with report_refusals():
            wandb.Settings(project=settings.project, run_tags=tuple(settings.tags), mode=_choose_mode())


class WandbLogger(Logger):
    """Logs to Weights & Biases, or offline in the run's folder if there is no API key.

    Each run is one W&B run, grouped by table and named by row and seed; a resumed run keeps its id.
    """

    def __init__(
        self, settings: LoggerSettings, directory: RunDirectory, config: dict[str, Any], model: nn.Module
    ) -> None:
        import wandb

        self.directory, self.layers = directory, analytic_layers(model)
        self.epochs = config["trainer"]["epochs"]
        self.pictures_every = settings.pictures_every
        data_name = config["data"]["name"]
        with report_refusals():
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                id=directory.id,
                group=settings.group,
                name=settings.title or f"{data_name} seed {config['seed']}",
                tags=[*settings.tags, data_name, config["model"]["backbone"]],
                config={**config, "row": settings.row},
                dir=str(directory.path),
                resume="allow",
                mode=_choose_mode(),
                reinit="create_new",
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.run.finish(exit_code=0 if kind is None else 1)

    def start(self, epoch: int) -> None:
        if epoch == 0:
            self.run.log(self._draw_layers(), step=0)

    def log(self, metrics: dict[str, float]) -> None:
        epoch = int(metrics["epoch"])
        draws_layers = epoch == self.epochs or epoch % self.pictures_every == 0
        # Committed, because W&B would put the last epoch's metrics into the summary after ``finish``.
        self.run.log({**metrics, **(self._draw_layers() if draws_layers else {})}, step=epoch, commit=True)

    def finish(self, record: Record) -> None:
        import wandb

        # W&B sweeps compare the summary's val_top1, which would be that of the last epoch, not of the best one.
        self.run.summary.update({**record.to_dict(exclude={"config", "correct"}), "val_top1": record.val.top1})
        weights = self.directory.path / "model.safetensors"
        if self.run.disabled:
            return  # W&B would leave a copy of the weights behind
        if not weights.exists():
            print(f"{weights} is missing, so W&B gets the metrics without the weights", file=sys.stderr)
            return
        artifact = wandb.Artifact(self.directory.id, "model")
        artifact.add_file(str(weights), skip_cache=True)
        self.run.log_artifact(artifact)

    def _draw_layers(self) -> dict[str, Any]:
        """The mosaic of each analytic layer, and histograms of its AKPs in natural units."""
        import PIL.Image
        import wandb

        from acl.plot import mosaic, to_png

        pictures: dict[str, Any] = {}
        for name, layer in self.layers.items():
            pictures[f"{name}/mosaic"] = wandb.Image(PIL.Image.open(io.BytesIO(to_png(mosaic(layer, name)))))
            for symbol, akps in layer.akps().items():
                for akp, values in akps.items():
                    pictures[f"{name}/{symbol}/{akp}"] = wandb.Histogram(values.detach().float().cpu().tolist())
        return pictures


def open_logger(settings: LoggerSettings, directory: RunDirectory, config: dict[str, Any], model: nn.Module) -> Logger:
    """Opens the logger of a run.

    Args:
        settings: which logger, and its options.
        directory: the folder of the run.
        config: the run's resolved configuration.
        model: the network, whose analytic layers are drawn.
    """
    return WandbLogger(settings, directory, config, model) if settings.name == "wandb" else Logger()


def log_recorded_run(settings: LoggerSettings, directory: RunDirectory, config: dict[str, Any], record: Record) -> None:
    """Logs a run that is recorded already: its metrics of each epoch, and its record.

    Raises:
        UsageError: if its metrics.csv is missing or corrupt, or W&B refuses the run.
    """
    history_file = directory.path / "metrics.csv"
    try:
        lines = csv.DictReader(history_file.read_text("utf-8").splitlines())
        history = [{key: float(value) for key, value in line.items()} for line in lines]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UsageError(f"cannot read the metrics in {history_file}: {error}") from error
    epochs = config["trainer"]["epochs"]
    if [metrics.get("epoch") for metrics in history] != list(range(1, epochs + 1)):
        raise UsageError(f"{history_file} is damaged: its column epoch should count from 1 to {epochs}")
    no_layers = nn.Module()  # the network of each epoch is no longer available to be drawn
    with open_logger(settings, directory, config, no_layers) as logger:
        for metrics in history:
            logger.log(metrics)
        logger.finish(record)


def log_table(settings: LoggerSettings, name: str, table: "pd.DataFrame", figure: Path, folder: Path) -> None:
    """Logs a finished table and its figure (a PNG file), as a run in the group of the table's runs."""
    if settings.name != "wandb":
        return
    import PIL.Image
    import wandb

    with (
        report_refusals(),
        wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=f"table-{name}",
            group=name,
            name=f"{name}: table",
            job_type="table",
            tags=settings.tags,
            dir=str(folder),
            resume="allow",
            mode=_choose_mode(),
            reinit="create_new",
        ) as run,
    ):
        run.log({"table": wandb.Table(dataframe=table), "figure": wandb.Image(PIL.Image.open(figure))})
