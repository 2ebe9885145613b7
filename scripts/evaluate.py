"""Evaluates a trained network: python scripts/evaluate.py run=runs/<id> split=test data.root=/data"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass as validated_dataclass

from training.config import run_script
from training.data import Data
from training.errors import UsageError
from training.finished_run import DataLocation, FinishedRun, evaluate_run, load_finished_run
from training.runs import load_run_data, parse_data
from training.validation import STRICT, FilePath


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateSettings:
    run: FilePath
    split: Literal["train", "val", "test"]
    data: dict[str, Any]


def main(settings: EvaluateSettings) -> None:
    is_other_data = "name" in settings.data
    if not is_other_data and (unknown := settings.data.keys() - {"root", "cache"}):
        raise UsageError(f"unknown option data.{min(unknown)}; known without data=<name>: data.root, data.cache")
    location = None if is_other_data else DataLocation(root=settings.data["root"], cache=settings.data["cache"])
    run = load_finished_run(settings.run, location)
    run_settings = run.settings
    if is_other_data:
        options = {name: value for name, value in settings.data.items() if (name, value) != ("cache", None)}
        run_settings = replace(run_settings, data=parse_data(options))
    data = normalize_as_trained(load_run_data(run_settings), run)
    result = evaluate_run(run, data, settings.split)
    recorded = None if run.record is None or is_other_data else run.record.results.get(settings.split)
    note = f" (recorded: {recorded.top1:.2f}%, loss {recorded.loss:.6f})" if recorded else ""
    images = len(getattr(data, settings.split))
    print(f"{run.path}: {settings.split} {result['top1']:.2f}%, loss {result['loss']:.6f}, {images:,} images{note}")


def normalize_as_trained(data: Data, run: FinishedRun) -> Data:
    """Makes data yield the input that a network was trained on. Raises UsageError if the formats differ."""
    expected, given = run.input_format, data.input_format
    for name in ("channels", "height", "width", "classes"):
        trained, found = getattr(expected, name), getattr(given, name)
        if trained != found:
            raise UsageError(f"the data do not fit {run.path}: {name} {found} instead of {trained}")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (expected.mean, expected.std))
    return replace(data, mean=mean, std=std)


if __name__ == "__main__":
    run_script(main, "evaluate", EvaluateSettings, ("arrangement", "data"), text_keys=("run",))
