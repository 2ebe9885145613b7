"""Means over seeds and paired intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from scipy.special import stdtrit

from training.errors import UsageError
from training.record import Record

DIFFERENCE = ["diff_mean", "diff_ci95_low", "diff_ci95_high"]
COLUMNS = [
    "row",
    "arrangement",
    "conv_params",
    "params",
    "conv_ratio",
    "seeds",
    "top1_mean",
    "top1_std",
    *DIFFERENCE,
    "epochs",
]


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
    """Computes the columns ``COLUMNS``, one line per row; numbers of parameters are means over its runs.

    Accuracies are in percent. Differences are in points, paired by seed, with a 95% t-interval.

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
        mean, low, high = paired_difference(top1, top1_by_seed(reference.records, row.split))
        if math.isnan(mean):
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
                "diff_mean": mean,
                "diff_ci95_low": low,
                "diff_ci95_high": high,
                "epochs": row.records[0].epochs,
            }
        )
    return pd.DataFrame(lines, columns=COLUMNS)


def paired_difference(
    values: "pd.Series[Any]", reference: "pd.Series[Any]", confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean difference and its t-interval, over the seeds that both have; for a single seed, the interval is NaN."""
    return interval_of_mean((values - reference).dropna(), confidence)


def interval_of_mean(values: "pd.Series[Any]", confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and its t-interval; for a single value, the interval is NaN."""
    n = len(values)
    half_width = t_quantile(n, confidence) * values.std() / math.sqrt(n) if n > 1 else math.nan
    mean = values.mean()
    return mean, mean - half_width, mean + half_width


def t_quantile(n: int, confidence: float = 0.95) -> float:
    """The half width of the t-interval of a mean of ``n`` values, in standard errors."""
    return float(stdtrit(n - 1, (1 + confidence) / 2))


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm's correction, so that the chance of any p-value below 0.05 is at most 5% if no effect exists.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def top1_by_seed(records: Sequence[Record], split: str = "test") -> "pd.Series[Any]":
    return pd.Series({record.seed: record.results[split].top1 for record in records}, dtype=float)


def mean_num_parameters(records: Sequence[Record], name: str = "conv") -> float:
    """The mean over runs, since ``auto`` chooses other kernels for every seed."""
    return sum(getattr(record.parameters, name) for record in records) / len(records)


def compute_conv_ratio(reference: Sequence[Record], records: Sequence[Record]) -> float | None:
    """How many times more convolution parameters the reference has; None if the others have none."""
    mean = mean_num_parameters(records)
    return mean_num_parameters(reference) / mean if mean else None
