"""Gathers finished runs in one CSV file, one row each: python scripts/collect.py runs=[runs,/data/runs] file=all.csv

Records that cannot be read are named on stderr and skipped.
"""

import sys

import pandas as pd

from evaluation.finished_run import find_finished_runs
from training.cli import run_script
from training.errors import UsageError
from training.files import write_atomic
from training.record import read_record
from training.validation import OutputFile, strict_dataclass


@strict_dataclass
class CollectSettings:
    runs: str | list[str]
    file: OutputFile


def main(settings: CollectSettings) -> None:
    records = []
    for path in find_finished_runs(settings.runs):
        try:
            records.append(read_record(path / "record.json").to_dict(exclude={"correct"}))
        except UsageError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not records:
        raise UsageError("no record could be read")
    frame = pd.json_normalize(records).rename(columns=lambda name: name.removeprefix("config."))
    # Columns that differ between the runs come first.
    frame = frame[sorted(frame.columns, key=lambda name: frame[name].astype(str).nunique(dropna=False) == 1)]
    write_atomic(settings.file, frame.to_csv(index=False))
    print(f"{settings.file}: {len(frame)} runs")


if __name__ == "__main__":
    run_script(main, "collect", CollectSettings)
