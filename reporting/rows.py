"""The rows of a table, and their summary."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from reporting.statistics import interval_of_mean
from training.errors import UsageError
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
