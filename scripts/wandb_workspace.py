"""Makes a W&B workspace with panels that compare the rows of a table: python scripts/wandb_workspace.py entity=me"""

from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from omegaconf import DictConfig

from training.config import entry
from training.errors import UsageError


def workspace(cfg: DictConfig) -> ws.Workspace:
    """Runs grouped by table and row; curves over epochs, and accuracy against parameters."""
    curves: list[Any] = [
        wr.LinePlot(title=metric, x="epoch", y=[metric]) for metric in ("val_top1", "val_loss", "train_loss")
    ]
    results: list[Any] = [
        wr.ScatterPlot(
            title="test accuracy against convolution parameters",
            x=wr.SummaryMetric("parameters.conv"),
            y=wr.SummaryMetric("test.top1"),
            log_x=True,
        ),
        wr.BarPlot(title="test accuracy (%)", metrics=[wr.SummaryMetric("test.top1")]),
    ]
    return ws.Workspace(
        name=cfg.name,
        entity=cfg.entity,
        project=cfg.project,
        sections=[
            ws.Section(name="Results", panels=results, is_open=True),
            ws.Section(name="Training", panels=curves, is_open=True),
        ],
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Config("row")]),
    )


def main(cfg: DictConfig) -> None:
    made = workspace(cfg)
    if not wandb.login(prompt=False):
        raise UsageError("a workspace needs a W&B account: run `wandb login` first")
    made.save()
    print(made.url)


if __name__ == "__main__":
    entry(main, "wandb_workspace")
