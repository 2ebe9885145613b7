"""The rows of a table: their records, as read from its file, and their summary."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from reporting.statistics import interval_of_mean
from training.config import flatten
from training.errors import UsageError
from training.files import parse_json_lines, read_bytes
from training.record import Record

DIFFERENCE = ["diff_mean", "diff_ci95_low", "diff_ci95_high"]


@dataclass
class Row:
    """One row of a table: a configuration without the seed and without the hyperparameters chosen by a search."""

    name: str
    overrides: list[str]
    against: str | None = None
    """The name of the row it is compared with; None: the first row."""
    chosen: list[str] | None = None
    """Overrides with the chosen hyperparameters; None until the search is done."""
    records: list[Record] = field(default_factory=list)
    """One per seed."""

    @property
    def split(self) -> str:
        """The split whose accuracy is listed: ``test``, or ``val`` if the runs do not evaluate the test set."""
        return "test" if self.records[0].test else "val"


def summarize(rows: Sequence[Row], against: str | None = None) -> pd.DataFrame:
    """Computes one line per row; numbers of parameters are means over its runs.

    Accuracies are in percent. Differences are in points, paired by seed, with a 95% interval.

    Args:
        rows: the rows, with their records.
        against: the name of the row to compare all rows with; None: the row that each row names.

    Raises:
        UsageError: for a row without records, or without a seed that its reference has.
    """
    by_name = {row.name: row for row in rows}
    lines: list[dict[str, Any]] = []
    for row in rows:
        if not row.records:
            raise UsageError(f"row '{row.name}' has no finished run")
        reference = by_name[against or row.against or rows[0].name]
        top1 = top1_by_seed(row.records, row.split)
        difference = interval_of_mean(top1 - top1_by_seed(reference.records, row.split))
        if not difference.n:
            raise UsageError(f"rows '{row.name}' and '{reference.name}' have no seed in common")
        arrangement = row.records[0].config["arrangement"]
        lines.append(
            {
                "row": row.name,
                "arrangement": "; ".join(f"{k}: {v}" for k, v in arrangement.items() if v) or "plain",
                "conv_params": round(mean_num_parameters(row.records)),
                "params": round(mean_num_parameters(row.records, "total")),
                "conv_ratio": compute_conv_ratio(reference.records, row.records),
                "seeds": len(top1),
                "top1_mean": top1.mean(),
                "top1_std": top1.std(),
                **dict(zip(DIFFERENCE, (difference.mean, difference.low, difference.high), strict=True)),
                "epochs": row.records[0].epochs,
            }
        )
    return pd.DataFrame(lines)


def top1_by_seed(records: Sequence[Record], split: str = "test") -> "pd.Series[Any]":
    return pd.Series({record.seed: record.results[split].top1 for record in records}, dtype=float)


def mean_num_parameters(records: Sequence[Record], name: str = "conv") -> float:
    """The mean over runs, since ``auto`` chooses other kernels for every seed."""
    return sum(getattr(record.parameters, name) for record in records) / len(records)


def compute_conv_ratio(reference: Sequence[Record], records: Sequence[Record]) -> float | None:
    """How many times more convolution parameters the reference has; None if the others have none."""
    mean = mean_num_parameters(records)
    return mean_num_parameters(reference) / mean if mean else None


def read_results(file: Path) -> Sequence[Record]:
    """Reads the records of a table, each with the name of its row, from its .jsonl file.

    Says on stderr, once, if other code made some of a row's records than the rest.

    Raises:
        UsageError: if there is no such file, for a line that is not the record of a run with its row or repeats the row
            and seed of another, and if only some runs have a test result, or a row's runs differ in more than the seed.
    """
    if not file.exists():
        raise UsageError(f"there is no {file}; reproduce the table first")
    return _parse_results(file, read_bytes(file))


@functools.cache
def _parse_results(file: Path, content: bytes) -> Sequence[Record]:
    records = parse_json_lines(
        content, file, Record, "a record of a run", lambda record: f"row '{record.row}', seed {record.seed}"
    )
    first_of_row: dict[str, tuple[int, Record]] = {}
    mixed_rows: dict[str, None] = {}
    for number, record in enumerate(records, 1):
        if record.row is None:
            raise UsageError(f"{file}, line {number}, names no row")
        if (record.test is None) != (records[0].test is None):
            raise UsageError(f"{file}: only one of the lines 1 and {number} has a test result")
        first_number, first = first_of_row.setdefault(record.row, (number, record))
        if changes := [change for change in describe_changes(first, record) if not change.startswith("seed=")]:
            raise UsageError(
                f"{file}, line {number}, differs from line {first_number} of row '{record.row}' in more than the seed: "
                f"{', '.join(changes)}"
            )
        if record.sources != first.sources:
            mixed_rows[record.row] = None
    if mixed_rows:
        print(f"{file}: rows whose runs were not all made with the same code: {', '.join(mixed_rows)}", file=sys.stderr)
    return records


def describe_changes(before: Record, after: Record) -> list[str]:
    """Lists what differs in the configuration and the digests of two records, with its new and old values."""
    old, new = (
        {**flatten(r.config), "digest of data": r.data and r.data.get("digest"), "digest of pretrained": r.pretrained}
        for r in (before, after)
    )
    is_unknown = {key for key in old if key.startswith("digest") and None in (old[key], new[key])}
    return [
        f"{key}={new.get(key, 'none')} instead of {old.get(key, 'none')}"
        for key in old | new
        if key not in is_unknown and new.get(key, "none") != old.get(key, "none")
    ]
