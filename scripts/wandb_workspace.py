"""Creates a W&B workspace that compares the rows of a table: python scripts/wandb_workspace.py entity=me"""

from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from pydantic import ValidationError

from training.cli import run_script
from training.errors import UsageError
from training.loggers import report_refusals
from training.validation import strict_dataclass


@strict_dataclass
class WorkspaceSettings:
    entity: str
    project: str
    name: str


def create_workspace(settings: WorkspaceSettings) -> ws.Workspace:
    """Groups runs by table and row, and plots curves over epochs and accuracy against parameters."""
    top1, num_parameters = wr.SummaryMetric("test.top1"), wr.SummaryMetric("parameters.conv")
    title = "test accuracy against convolution parameters"
    panels: dict[str, list[Any]] = {
        "Results": [
            wr.ScatterPlot(title=title, x=num_parameters, y=top1, log_x=True),
            wr.BarPlot(title="test accuracy (%)", metrics=[top1]),
        ],
        "Training": [wr.LinePlot(title=y, x="epoch", y=[y]) for y in ("val_top1", "val_loss", "train_loss")],
    }
    return ws.Workspace(
        name=settings.name,
        entity=settings.entity,
        project=settings.project,
        sections=[ws.Section(name=name, panels=panels[name], is_open=True) for name in panels],
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Config("row")]),
    )


def main(settings: WorkspaceSettings) -> None:
    try:
        workspace = create_workspace(settings)
    except ValidationError as error:  # such as "Emojis are not allowed" for a name with "="
        raise UsageError(f"W&B does not accept name={settings.name}: {error.errors()[0]['msg']}") from error
    with report_refusals():
        if not wandb.login(prompt=False):
            raise UsageError("a workspace needs a W&B account: run `wandb login` first")
        workspace.save()
    print(workspace.url)


if __name__ == "__main__":
    run_script(main, "wandb_workspace", WorkspaceSettings)
