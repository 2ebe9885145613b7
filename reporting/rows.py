"""The rows of a table: their records, as read from its file, and their summary."""

import base64
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.controls import CONTROLS_OF_ANALYTIC
from reporting.statistics import Interval, interval_of_difference
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


def list_references(rows: Sequence[Row]) -> dict[str, str]:
    """The row that each row of a table is compared with, by name."""
    return {row.name: row.against or rows[0].name for row in rows}


def summarize(rows: Sequence[Row], against: str | None = None) -> pd.DataFrame:
    """Computes one line per row; numbers of parameters are means over its runs.

    Accuracies are in percent. Differences are in points, paired by seed, with a 95% interval of ``compare``.

    Args:
        rows: the rows, with their records.
        against: the name of the row to compare all rows with; None: the row that each row names.

    Raises:
        UsageError: for a row without records, or without a seed that its reference has.
    """
    if empty := next((row for row in rows if not row.records), None):
        raise UsageError(f"row '{empty.name}' has no finished run")
    records, references = {row.name: row.records for row in rows}, list_references(rows)
    lines: list[dict[str, Any]] = []
    for row in rows:
        reference = against or references[row.name]
        top1 = top1_by_seed(row.records, row.split)
        difference = compare(records, row.name, reference, references, row.split)
        if not difference.n:
            raise UsageError(f"rows '{row.name}' and '{reference}' have no seed in common")
        lines.append(
            {
                "row": row.name,
                "arrangement": _describe_arrangement(row.records[0]),
                "conv_params": round(mean_num_parameters(row.records)),
                "params": round(mean_num_parameters(row.records, "total")),
                "conv_ratio": compute_conv_ratio(records[reference], row.records),
                "seeds": len(top1),
                "top1_mean": top1.mean(),
                "top1_std": top1.std(),
                **dict(zip(DIFFERENCE, (difference.mean, difference.low, difference.high), strict=True)),
                "epochs": row.records[0].epochs,
                "reference": reference,
                "interval_over": "" if row.name == reference else f"{difference.n} {difference.sampled}",
            }
        )
    return pd.DataFrame(lines)


def _describe_arrangement(record: Record) -> str:
    if record.config["model"].get("control") in CONTROLS_OF_ANALYTIC:  # the formulas are those of its start
        return "plain"
    return "; ".join(f"{k}: {v}" for k, v in record.config["arrangement"].items() if v) or "plain"


def compare(
    records: Mapping[str, Sequence[Record]], row: str, reference: str, references: Mapping[str, str], split: str
) -> Interval:
    """The difference of two rows of a table in accuracy, as ``interval_of_difference`` defines it.

    Args:
        records: the records of each row.
        row, reference: the names of the two rows.
        references: the row that the table compares each row with. Rows compared with the same row may share a variance.
        split: ``test`` or ``val``.
    """
    first = reference if reference in references.values() else references.get(reference, reference)
    group = [first, *(name for name, other in references.items() if other == first != name)]
    names = [name for name in group if name in records] if {row, reference} <= {*group} else [reference, row]
    accuracies = pd.DataFrame({name: top1_by_seed(records[name], split) for name in names}).T
    by_seed = [{record.seed: record for record in records[name]} for name in (row, reference)]
    seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
    bits = [[_unpack_correct(records_of[seed], split) for seed in seeds] for records_of in by_seed]
    digests = {(records_of[seed].data or {}).get("digest") for records_of in by_seed for seed in seeds}
    num_images = {None if of_run is None else len(of_run) for of_row in bits for of_run in of_row}
    if len(digests) != 1 or len(num_images) != 1 or None in num_images:
        return interval_of_difference(accuracies, row, reference)
    return interval_of_difference(accuracies, row, reference, (np.array(bits[0]), np.array(bits[1])))


def _unpack_correct(record: Record, split: str) -> NDArray[np.uint8] | None:
    """Which images of a split were classified correctly, 0 or 1; None if the record does not say.

    Raises:
        UsageError: if they contradict the accuracy.
    """
    packed, size = (record.correct or {}).get(split), (record.data or {}).get(split)
    if packed is None or not isinstance(size, int):
        return None
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8))
    except ValueError:  # not base64
        bits = np.array([], np.uint8)
    top1 = record.results[split].top1
    if not size <= len(bits) < size + 8 or abs(100 * bits[:size].mean() - top1) > 1e-3:
        raise UsageError(f"row '{record.row}', seed {record.seed}: correct.{split} contradicts its top1={top1}")
    return bits[:size]


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
