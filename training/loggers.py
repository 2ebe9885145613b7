"""Where metrics go beside metrics.csv."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from training.records import resolved, run_id


class Logger:
    """Logs nothing; the base of those that do."""

    def log(self, row: dict[str, float]) -> None:
        """One epoch's metrics."""

    def close(self, record: dict[str, Any]) -> None:
        """The run is done."""


class WandbLogger(Logger):
    """Weights & Biases; offline, in the run's folder, where there is no API key."""

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        import wandb

        self.run = wandb.init(
            project=cfg.logger.project,
            id=run_id(cfg),
            config=resolved(cfg),
            dir=str(folder),
            mode=None if wandb.login(prompt=False) else "offline",
            reinit="create_new",
        )

    def log(self, row: dict[str, float]) -> None:
        self.run.log(row, step=int(row["epoch"]))

    def close(self, record: dict[str, Any]) -> None:
        self.run.summary.update({key: record[key] for key in ("test", "val", "best_epoch", "parameters", "seconds")})
        self.run.finish()


def open_logger(cfg: DictConfig, folder: Path) -> Logger:
    """The logger that ``cfg.logger`` names."""
    return {"none": lambda *_: Logger(), "wandb": WandbLogger}[cfg.logger.name](cfg, folder)
