"""Gathers finished runs in one CSV, a row each: python scripts/collect.py runs=[runs,/elsewhere/runs] file=all.csv"""

import json
from glob import glob
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from training.config import entry
from training.errors import UsageError
from training.files import write_atomic


def main(cfg: DictConfig) -> None:
    patterns = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    folders = [Path(name) for pattern in patterns for name in glob(pattern)]  # noqa: PTH207 - absolute ones too
    paths = {path for folder in folders for path in (folder / "record.json", *folder.glob("*/record.json"))}
    records = [json.loads(path.read_text()) for path in sorted(paths) if path.exists()]
    if not records:
        raise UsageError(f"no finished run in {', '.join(patterns)}; runs=[...] names folders of runs")
    frame = pd.json_normalize(records).rename(columns=lambda name: name.removeprefix("config."))
    # What differs between the runs first, so that it is seen.
    frame = frame[sorted(frame.columns, key=lambda name: frame[name].astype(str).nunique() == 1)]
    write_atomic(Path(cfg.file), frame.to_csv(index=False))
    print(f"{cfg.file}: {len(frame)} runs")


if __name__ == "__main__":
    entry(main, "collect")
