"""Evaluates a trained network: python scripts/evaluate.py run=runs/<id> split=test data.root=/data"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from acl.plot import to_png
from evaluation.finished_run import DataLocation, load_data_as_trained, load_finished_run, predict_run
from reporting.render import draw_confusions
from training.cli import run_script
from training.errors import UsageError
from training.files import write_together
from training.settings import parse_data
from training.validation import FilePath, OutputFile, strict_dataclass


@strict_dataclass
class EvaluateSettings:
    run: FilePath
    split: Literal["train", "val", "test"]
    data: dict[str, Any]
    confusion: OutputFile | None = None


def main(settings: EvaluateSettings) -> None:
    if settings.confusion is not None and settings.confusion.suffix != ".csv":
        raise UsageError(
            f"confusion={settings.confusion} is invalid: it should end in .csv; the figure is put beside it"
        )
    is_other_data = "name" in settings.data
    if not is_other_data and (unknown := settings.data.keys() - {"root", "cache"}):
        raise UsageError(f"unknown option data.{min(unknown)}; known without data=<name>: data.root, data.cache")
    location = None if is_other_data else DataLocation(root=settings.data["root"], cache=settings.data["cache"])
    run = load_finished_run(settings.run, location)
    if run.classes is None:
        print(f"{run.path} does not name its classes, so labels are compared by number", file=sys.stderr)
    other_settings = None
    if is_other_data:
        options = {name: value for name, value in settings.data.items() if (name, value) != ("cache", None)}
        other_settings = replace(run.settings, data=parse_data(options))
    data = load_data_as_trained(run, other_settings)
    result, predictions = predict_run(run, data, settings.split)
    if settings.confusion is not None:
        frame = count_confusions(getattr(data, settings.split).labels, predictions, data.classes)
        figure = draw_confusions(frame, f"{run.path.name}, {settings.split}")
        contents: dict[Path, str | bytes] = {
            settings.confusion: frame.to_csv(float_format="%.2f"),
            settings.confusion.with_suffix(".png"): to_png(figure),
        }
        write_together(contents)
    recorded = None if run.record is None or is_other_data else run.record.results.get(settings.split)
    note = f" (recorded: {recorded.top1:.2f}%, loss {recorded.loss:.6f})" if recorded else ""
    images = len(getattr(data, settings.split))
    print(f"{run.path}: {settings.split} {result['top1']:.2f}%, loss {result['loss']:.6f}, {images:,} images{note}")


def count_confusions(labels: Tensor, predictions: Tensor, classes: list[str]) -> pd.DataFrame:
    """Counts the predictions for each class: a line per class, with its accuracy (percent) and its images."""
    n = len(classes)
    counts = torch.bincount(n * labels + predictions, minlength=n * n).view(n, n)
    frame = pd.DataFrame(counts.numpy(), pd.Index(classes, name="class"), classes)
    frame.insert(0, "images", counts.sum(1).numpy(), allow_duplicates=True)
    frame.insert(0, "accuracy", (100 * counts.diag() / counts.sum(1)).numpy(), allow_duplicates=True)
    return frame


if __name__ == "__main__":
    run_script(main, "evaluate", EvaluateSettings, ("arrangement", "data"))
