"""Reruns a table and compares it with its committed records."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from hydra.core.override_parser.types import Quote, QuotedString

from reporting.render import format_interval
from reporting.rows import describe_changes, read_results, top1_by_seed
from reporting.statistics import Interval, chance_difference, interval_of_mean
from reporting.table import Table
from training.record import Record
from training.settings import load_run_data

ERROR_RATE = 0.05
"""The probability that any row of a rerun that differs only by chance is reported to differ."""

Records = Sequence[Record]
Outcome = Literal["reproduced", "consistent", "differs", "incomplete"]


@dataclass(frozen=True)
class RowVerification:
    """How the rerun of a row compares with its committed records; see ``compare_records``."""

    row: str
    outcome: Outcome
    details: str

    @property
    def is_confirmed(self) -> bool:
        return self.outcome in ("reproduced", "consistent")


def verify_table(table: Table, folder: Path) -> list[RowVerification]:
    """Reruns a table in a folder of its own and compares it with the table's .jsonl file, row by row.

    An interrupted verification is resumed; after a finished one, all runs are performed again. Runs that other code has
    recorded in ``folder`` are run again, too.

    Args:
        table: the table; its own files are only read.
        folder: the folder of the new runs and of the table made from them.

    Raises:
        UsageError: as ``read_results`` and ``Table.reproduce`` do.
    """
    committed = read_results(table.path.with_suffix(".jsonl"))
    quoted = [QuotedString(str(path), Quote.single).with_quotes() for path in (folder, folder / "results")]
    overrides = [f"paths.runs={quoted[0]}", f"paths.results={quoted[1]}", "fresh=true"]
    earlier, rerun = (Table(table.name, table.settings, [*table.user_overrides, *overrides]) for _ in range(2))
    earlier_runs = earlier.plan_runs()
    if all(planned.load_record() is not None for planned in earlier_runs):
        for planned in earlier_runs:
            shutil.rmtree(planned.directory.path)
    rerun.reproduce()
    settings = rerun.plan_runs()[0].settings
    data = load_run_data(settings)
    splits = {"test": data.test, "val": data.val} if settings.trainer.test else {"val": data.val}
    num_images = {name: len(split) for name, split in splits.items()}
    return compare_records(committed, read_results(rerun.path.with_suffix(".jsonl")), num_images)


def compare_records(committed: Records, rerun: Records, num_images: Mapping[str, int]) -> list[RowVerification]:
    """Compares records by row and seed.

    A row is

    - *reproduced* if the results of all its seeds are equal;
    - *consistent* if its mean accuracies differ by at most one image, or by no more than chance explains, as when
      another machine rounds differently. That is, the interval of the differences, paired by seed, includes 0, and
      the mean difference is no larger than between means over other seeds. The first condition notices a small shift of
      all seeds; the second a rerun so erratic that its interval includes anything. All intervals together cover 95%
      (Bonferroni);
    - *differs* if it is neither, or if its configuration differs, whatever its results;
    - *incomplete* if one of the two sets lacks some of its runs.

    Args:
        committed, rerun: records of finished runs, each with the name of its row.
        num_images: the number of images of each split to compare.
    """
    old, new = ({(record.row or "", record.seed): record for record in group} for group in (committed, rerun))
    rows = list(dict.fromkeys(row for row, _ in (*old, *new)))
    confidence = 1 - ERROR_RATE / (2 * len(num_images) * len(rows))  # two intervals per split and row
    comparisons = []
    for row in rows:
        common = sorted(key for key in old.keys() & new.keys() if key[0] == row)
        befores, afters = [old[key] for key in common], [new[key] for key in common]
        outcome: Outcome = "reproduced"
        details = []
        # Without the same trainer.test, only one of the two has a test result.
        splits = [split for split in num_images if all(split in record.results for record in (*befores, *afters))]
        if any(b.results[split] != a.results[split] for b, a in zip(befores, afters, strict=True) for split in splits):
            outcome = "consistent"
            for split in splits:
                top1 = pd.DataFrame([(record.row, record.results[split].top1) for record in committed])
                limit = chance_difference(top1[1], top1[0], len(common), confidence)
                difference = interval_of_mean(top1_by_seed(afters, split) - top1_by_seed(befores, split), confidence)
                details.append(f"{split} {_describe_difference(difference, limit)}")
                if not _is_explained(difference, limit, num_images[split]):
                    outcome = "differs"
        for problem, missing in (("not rerun", old.keys() - new.keys()), ("not committed", new.keys() - old.keys())):
            seeds = ", ".join(str(seed) for name, seed in sorted(missing) if name == row)
            if seeds:
                outcome = "differs" if outcome == "differs" else "incomplete"
                details.append(f"{problem}: seed {seeds}")
        changes = [change for b, a in zip(befores, afters, strict=True) for change in describe_changes(b, a)]
        if changes:
            outcome = "differs"
            details.append(f"other configuration: {', '.join(dict.fromkeys(changes))}")
        comparisons.append(RowVerification(row, outcome, "; ".join(details)))
    return comparisons


def _describe_difference(difference: Interval, limit: float) -> str:
    chance = "" if math.isnan(limit) else f" (chance alone: ±{limit:.2f})"
    return f"{format_interval(difference.mean, difference.low, difference.high)} points{chance}"


def _is_explained(difference: Interval, limit: float, num_images: int) -> bool:
    """Whether a difference of mean accuracies is that of an image at most, or one that chance explains."""
    is_rounding = abs(difference.mean) <= 100 / num_images * (1 + 1e-9)
    return is_rounding or (difference.low <= 0 <= difference.high and abs(difference.mean) <= limit)
