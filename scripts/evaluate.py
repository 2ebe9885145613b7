"""Evaluates a trained network: python scripts/evaluate.py run=runs/<id> split=test data.root=/data"""

import sys
from dataclasses import replace
from typing import Any, Literal

from pydantic.dataclasses import dataclass as validated_dataclass

from training.config import run_script
from training.errors import UsageError
from training.finished_run import DataLocation, evaluate_run, load_data_as_trained, load_finished_run
from training.runs import parse_data
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
    if run.classes is None:
        print(f"{run.path} does not name its classes, so labels are compared by number", file=sys.stderr)
    other_settings = None
    if is_other_data:
        options = {name: value for name, value in settings.data.items() if (name, value) != ("cache", None)}
        other_settings = replace(run.settings, data=parse_data(options))
    data = load_data_as_trained(run, other_settings)
    result = evaluate_run(run, data, settings.split)
    recorded = None if run.record is None or is_other_data else run.record.get(settings.split)
    note = f" (recorded: {recorded['top1']:.2f}%, loss {recorded['loss']:.6f})" if recorded else ""
    images = len(getattr(data, settings.split))
    print(f"{run.path}: {settings.split} {result['top1']:.2f}%, loss {result['loss']:.6f}, {images:,} images{note}")


if __name__ == "__main__":
    run_script(main, "evaluate", EvaluateSettings, ("arrangement", "data"), text_keys=("run",))
