"""Where metrics go beside metrics.csv."""

import io
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig
from torch import nn

from acl import AnalyticConv2d
from training.records import resolved, run_id


class Logger:
    """Logs nothing; the base of those that do."""

    def __enter__(self) -> "Logger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The run is over, done or not."""

    def start(self, epoch: int) -> None:
        """The run starts, or goes on after ``epoch`` epochs."""

    def log(self, row: dict[str, float]) -> None:
        """One epoch's metrics."""

    def finish(self, record: dict[str, Any]) -> None:
        """The run is recorded."""


class WandbLogger(Logger):
    """Weights & Biases; offline, in the run's folder, where there is no API key.

    A run is one W&B run, grouped by table and named by row and seed, and goes on under its own id when it is resumed.
    """

    def __init__(self, cfg: DictConfig, folder: Path, model: nn.Module) -> None:
        import wandb

        self.cfg = cfg
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, AnalyticConv2d)}
        self.run = wandb.init(
            project=cfg.logger.project,
            id=run_id(cfg),
            group=cfg.logger.group,
            name=cfg.logger.title or f"{cfg.data.name} seed {cfg.seed}",
            tags=[cfg.data.name, cfg.model.backbone, *cfg.logger.tags],
            config={**resolved(cfg), "row": cfg.logger.row},
            dir=str(folder),
            resume="allow",
            mode=None if wandb.login(prompt=False) else "offline",
            reinit="create_new",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.finish(exit_code=0 if kind is None else 1)

    def start(self, epoch: int) -> None:
        if epoch == 0:
            self.run.log(self._pictures(), step=0)

    def log(self, row: dict[str, float]) -> None:
        epoch = int(row["epoch"])
        last = epoch == self.cfg.trainer.epochs
        pictures = self._pictures() if last or epoch % self.cfg.logger.pictures_every == 0 else {}
        self.run.log({**row, **pictures}, step=epoch)

    def finish(self, record: dict[str, Any]) -> None:
        self.run.summary.update({key: value for key, value in record.items() if key != "config"})

    def _pictures(self) -> dict[str, Any]:
        """The mosaic of each analytic layer, and histograms of its AKPs in natural units."""
        import PIL.Image
        import wandb

        from acl.plot import mosaic, to_png

        pictures: dict[str, Any] = {}
        for name, layer in self.layers.items():
            pictures[f"{name}/mosaic"] = wandb.Image(PIL.Image.open(io.BytesIO(to_png(mosaic(layer, name)))))
            for symbol, akps in layer.akps().items():
                for akp, values in akps.items():
                    histogram = wandb.Histogram(values.detach().float().cpu().tolist())
                    pictures[f"{name}/{symbol}/{akp}"] = histogram
        return pictures


def open_logger(cfg: DictConfig, folder: Path, model: nn.Module) -> Logger:
    """The logger that ``cfg.logger`` names."""
    return WandbLogger(cfg, folder, model) if cfg.logger.name == "wandb" else Logger()
