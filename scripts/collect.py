"""Gathers finished runs in one CSV file, one row each: python scripts/collect.py runs=[runs,/data/runs] file=all.csv

Records that cannot be read are named on stderr and skipped.
"""

import sys
from glob import glob
from pathlib import Path

import pandas as pd
from pydantic.dataclasses import dataclass as validated_dataclass

from training.config import run_script
from training.errors import UsageError
from training.run_directory import read_record, write_atomic
from training.validation import STRICT, FilePath


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class CollectSettings:
    runs: str | list[str]
    file: FilePath


def main(settings: CollectSettings) -> None:
    patterns = [settings.runs] if isinstance(settings.runs, str) else settings.runs
    folders = [Path(name) for pattern in patterns for name in glob(pattern)]  # noqa: PTH207 - absolute patterns too
    paths = {path for folder in folders for path in (folder / "record.json", *folder.glob("*/record.json"))}
    records = []
    for path in sorted(path for path in paths if path.exists()):
        try:
            records.append(read_record(path))
        except UsageError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not records:
        raise UsageError(f"no finished run in {', '.join(patterns)}; set runs=[...] to folders of runs")
    frame = pd.json_normalize(records).rename(columns=lambda name: name.removeprefix("config."))
    # Columns that differ between the runs come first.
    frame = frame[sorted(frame.columns, key=lambda name: frame[name].astype(str).nunique() == 1)]
    write_atomic(settings.file, frame.to_csv(index=False))
    print(f"{settings.file}: {len(frame)} runs")


if __name__ == "__main__":
    run_script(main, "collect", CollectSettings)
