"""Tables: rows to runs, and the records of those runs to means, intervals and a figure."""

import io
import json
import math
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from omegaconf import DictConfig
from scipy import stats
from tqdm import tqdm

from acl.plot import to_png
from training import data as datasets
from training.config import check, compose
from training.errors import BusyError, UsageError
from training.files import is_busy, write_atomic
from training.loop import build, run
from training.records import recorded, run_folder

COLUMNS = [
    "row",
    "arrangement",
    "conv_params",
    "params",
    "conv_ratio",
    "seeds",
    "top1_mean",
    "top1_std",
    "diff_mean",
    "diff_ci95_low",
    "diff_ci95_high",
    "epochs",
]


WAIT = 1.0
"""Seconds between looks at runs that other workers are at."""


@dataclass
class Row:
    """One row of a table: a configuration, but for its seed and the hyperparameters that its search chooses."""

    name: str
    overrides: list[str]
    against: str | None = None  # the row that it is compared with; None: the first
    chosen: list[str] | None = None
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    title: str
    cfg: DictConfig

    @property
    def folder(self) -> Path:
        return run_folder(self.cfg)

    @property
    def failure(self) -> Path:
        """Where the trace of a run that failed is kept."""
        return self.folder / "failed.txt"

    @property
    def last_line(self) -> str:
        return self.failure.read_text().strip().splitlines()[-1].removeprefix("training.errors.UsageError: ")


class Table:
    """What ``configs/table/<name>.yaml`` says; ``overrides`` are the user's and come last.

    Any number of processes may reproduce one table: they share its runs by a lock each, and any of them writes it.

    Raises:
        UsageError: a row that cannot be run, before any is.
    """

    def __init__(self, name: str, cfg: DictConfig, overrides: list[str]) -> None:
        self.name = name
        self.cfg = cfg
        self.started = time.time()
        self.rows = [
            Row(row.name, [*cfg.overrides, *row.overrides, *overrides], row.get("against"))
            for row in cfg.rows
            if row.name not in cfg.get("without", ())
        ]
        for row in self.rows:
            if row.against not in (None, *(other.name for other in self.rows)):
                raise UsageError(f"row '{row.name}' is against '{row.against}', which is no row of this table")
        if cfg.get("also_against") not in (None, *(row.name for row in self.rows)):
            raise UsageError(f"also_against '{cfg.also_against}' is no row of this table")
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        data = None
        for row in self.rows:
            example = self._compose(row)
            check(example)
            if example.trainer.devices * example.trainer.nodes > 1:
                raise UsageError(
                    "a run of a table takes one device; start more workers (the same command again) to use more"
                )
            data = data or datasets.load(example.data)
            build(example, data)
        self.results = Path(example.paths.results) / "tables"

    def __len__(self) -> int:
        return len(self.rows) * (len(self._candidates) + len(self.cfg.seeds))

    @property
    def _candidates(self) -> list[list[str]]:
        return [] if self.cfg.search is None else [list(candidate) for candidate in self.cfg.search.candidates]

    def _compose(self, row: Row, *overrides: str) -> DictConfig:
        words = (*row.overrides, *overrides)
        if words not in self._composed:
            self._composed[words] = compose(list(words))
        return self._composed[words]

    def _run(self, row: Row, title: str, *overrides: str) -> Run:
        cfg = self._compose(row, *overrides).copy()
        if cfg.logger.name == "wandb":
            cfg.logger.group = self.name
            cfg.logger.row = row.name
            cfg.logger.title = f"{row.name}, {title}"
        return Run(f"{row.name}, {title}", cfg)

    def _trials(self, row: Row) -> list[Run]:
        n = len(self._candidates)
        return [
            self._run(row, f"search {i}/{n}", *candidate, f"seed={self.cfg.search.seed}", "trainer.test=false")
            for i, candidate in enumerate(self._candidates, 1)
        ]

    def _seeds(self, row: Row) -> list[Run]:
        return [self._run(row, f"seed {seed}", *(row.chosen or []), f"seed={seed}") for seed in self.cfg.seeds]

    def runs(self) -> list[Run]:
        """The runs that are known by now: a row's seeds are once its search is done, and failed for no candidate."""
        known: list[Run] = []
        for row in self.rows:
            known += self._trials(row)
            row.chosen = row.chosen if row.chosen is not None else self._choose(row)
            if row.chosen is not None:
                known += self._seeds(row)
        return known

    def _choose(self, row: Row) -> list[str] | None:
        """The candidate of the best validation accuracy, ties by validation loss; None while a trial is to be done.

        A candidate whose trial failed is not chosen; where all did, none is.
        """
        if not self._candidates:
            return []
        scores: list[tuple[float, float, int]] = []
        for number, trial in enumerate(self._trials(row)):
            record = recorded(trial.cfg)
            if record is not None:
                scores.append((record["val"]["top1"], -record["val"]["loss"], -number))
            elif not self._has_failed(trial):
                return None
        return self._candidates[-max(scores)[2]] if scores else None

    def _has_failed(self, one: Run) -> bool:
        """At this worker or another; what failed before this one started is tried again."""
        return one.failure.exists() and one.failure.stat().st_mtime > self.started

    def status(self) -> dict[str, list[str]]:
        """The titles of the runs that are done, running, failed (with the last line) and left."""
        status: dict[str, list[str]] = {"done": [], "running": [], "failed": [], "left": []}
        for one in self.runs():
            if recorded(one.cfg) is not None:
                status["done"].append(one.title)
            elif is_busy(one.folder):
                status["running"].append(one.title)
            elif one.failure.exists():
                status["failed"].append(f"{one.title}: {one.last_line}")
            else:
                status["left"].append(one.title)
        waiting = len(self) - sum(map(len, status.values()))
        status["left"] += ["a seed of a row whose search is not done"] * waiting
        return status

    def reproduce(self) -> pd.DataFrame:
        """Does the runs that are neither recorded nor another worker's, waits for those, and writes the table.

        Raises:
            UsageError: runs failed, here or at another worker; all others are done, and the table is not written.
        """
        bar = tqdm(total=len(self), desc=self.name, unit="run", disable=None)
        seen: set[str] = set()
        while True:
            waiting, worked = False, False
            for one in self.runs():
                if one.title in seen or self._has_failed(one):
                    continue
                bar.set_postfix_str(one.title)
                try:
                    result, here = run(one.cfg)
                except BusyError:
                    waiting = True
                    continue
                except Exception:
                    worked = True
                    write_atomic(one.failure, traceback.format_exc())
                    bar.write(f"{one.title}: failed: {one.last_line}")
                    continue
                one.failure.unlink(missing_ok=True)
                worked = True
                seen.add(one.title)
                bar.update()
                measured, top1 = ("test", result["test"]) if result["test"] else ("validation", result["val"])
                note = f"{result['seconds']:.0f} s" if here else "recorded before"
                bar.write(f"[{len(seen)}/{len(self)}] {one.title}: {measured} {top1['top1']:.2f}% ({note})")
            if not waiting and not worked:
                break
            if not worked:
                time.sleep(WAIT)
        bar.close()
        for row in self.rows:
            row.records = [record for one in self._seeds(row) if (record := recorded(one.cfg)) is not None]
        # A search does without a candidate that failed; a row does not without a seed.
        if any(row.chosen is None or len(row.records) < len(self.cfg.seeds) for row in self.rows):
            status = self.status()
            raise UsageError(
                f"{len(status['failed'])} of {len(self)} runs failed, {len(status['done'])} are done; the same command "
                f"tries them again: {'; '.join(status['failed'])}"
            )
        return self.write()

    def write(self) -> pd.DataFrame:
        """results/tables/<name>.csv, .md, .png and .jsonl, the records that they stand on."""
        frame = summary(self.rows)
        records = [{"row": row.name, **record} for row in self.rows for record in row.records]
        path = self.results / self.name
        write_atomic(path.with_suffix(".csv"), frame.to_csv(index=False, float_format="%.6g"))
        write_atomic(path.with_suffix(".jsonl"), "".join(json.dumps(record) + "\n" for record in records))
        write_atomic(path.with_suffix(".md"), self.markdown(frame))
        write_atomic(path.with_suffix(".png"), to_png(figure(frame, self.cfg.title)))
        return frame

    def markdown(self, frame: pd.DataFrame) -> str:
        """The table for people, with how it came about."""
        text = io.StringIO()
        others = [[row.against or self.rows[0].name for row in self.rows]]
        if also := self.cfg.get("also_against"):
            others.append([also] * len(self.rows))
        frames = [
            summary([replace(row, against=o) for row, o in zip(self.rows, other, strict=True)]) for other in others
        ]
        headings = [f"points against {' or '.join(dict.fromkeys(other))}" for other in others]
        text.write(f"# {self.cfg.title}\n\n")
        text.write(f"| row | arrangement | conv. parameters | plain / row | top-1 test % | {' | '.join(headings)} |\n")
        text.write("|---|---|---:|---:|---:|" + "---:|" * len(others) + "\n")
        for i, row in enumerate(frame.itertuples()):
            top1 = f"{row.top1_mean:.2f}" + ("" if math.isnan(row.top1_std) else f" ± {row.top1_std:.2f}")
            differences = [
                "" if row.row == other[i] else difference(compared.iloc[i])
                for other, compared in zip(others, frames, strict=True)
            ]
            text.write(
                f"| {row.row} | {row.arrangement} | {row.conv_params:,} | {row.conv_ratio:.2f} | {top1} | "
                f"{' | '.join(differences)} |\n"
            )
        seeds = len(self.cfg.seeds)
        text.write(
            f"\nMean ± standard deviation over {seeds} seed{'s' * (seeds != 1)}; differences are paired by seed, with "
            "their 95% t-interval. The epoch is chosen on the validation split; the test set is read once, at the end "
            "of a run. Convolution parameters count biases and frozen AKPs.\n"
        )
        if self.cfg.search is not None:
            search = self.cfg.search
            text.write(
                f"\nHyperparameters: each row tries the same {len(search.candidates)} candidates, at full length, once "
                f"(seed {search.seed}), and takes the one of best validation accuracy.\n\n| row | chosen |\n|---|---|\n"
            )
            for chosen in self.rows:
                text.write(f"| {chosen.name} | {' '.join(f'`{word}`' for word in chosen.chosen or [])} |\n")
        record = self.rows[0].records[0]
        everything = [r for row in self.rows for r in row.records]
        machines = sorted({f"{r['machine']['device']}, {r['machine']['threads']} threads" for r in everything})
        commits = sorted(
            {(r["commit"] or "none")[:12] + "-dirty" * str(r["commit"]).endswith("-dirty") for r in everything}
        )
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        text.write(
            f"\n{record['config']['trainer']['epochs']} epochs a run; {sum(r['seconds'] for r in everything) / 60:.0f} "
            f"minutes for the rows' runs on {'; '.join(machines)}; commit {', '.join(commits)}; {versions}.\n"
        )
        return text.getvalue()


def difference(row: "pd.Series[Any]") -> str:
    """A row's difference in words, with its interval where there is one."""
    text = f"{row['diff_mean']:+.2f}"
    if not math.isnan(row["diff_ci95_low"]):
        text += f" [{row['diff_ci95_low']:+.2f}, {row['diff_ci95_high']:+.2f}]"
    return text


def summary(rows: list[Row]) -> pd.DataFrame:
    """The columns ``COLUMNS``: accuracies in per cent, differences in points, paired by seed."""
    by_name = {row.name: row for row in rows}
    lines: list[dict[str, Any]] = []
    for row in rows:
        plain = by_name[row.against or rows[0].name]
        base = {record["config"]["seed"]: record["test"]["top1"] for record in plain.records}
        if not row.records:
            raise UsageError(f"row '{row.name}' has no finished run")
        top1 = pd.Series({record["config"]["seed"]: record["test"]["top1"] for record in row.records})
        difference = (top1 - pd.Series(base)).dropna()
        n = len(difference)
        half = stats.t.ppf(0.975, n - 1) * difference.std() / math.sqrt(n) if n > 1 else math.nan
        record = row.records[0]
        arrangement = record["config"]["arrangement"]
        lines.append(
            {
                "row": row.name,
                "arrangement": "; ".join(f"{k}: {v}" for k, v in arrangement.items() if v) or "plain",
                "conv_params": record["parameters"]["conv"],
                "params": record["parameters"]["total"],
                "conv_ratio": plain.records[0]["parameters"]["conv"] / record["parameters"]["conv"],
                "seeds": len(top1),
                "top1_mean": top1.mean(),
                "top1_std": top1.std(),
                "diff_mean": difference.mean(),
                "diff_ci95_low": difference.mean() - half,
                "diff_ci95_high": difference.mean() + half,
                "epochs": record["config"]["trainer"]["epochs"],
            }
        )
    return pd.DataFrame(lines, columns=COLUMNS)


def figure(frame: pd.DataFrame, title: str) -> Figure:
    """Accuracy (mean and standard deviation over seeds) against convolution parameters."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.subplots()
    for i, row in enumerate(frame.itertuples()):
        error = 0.0 if math.isnan(row.top1_std) else row.top1_std
        same = int((frame["conv_params"][:i] == row.conv_params).sum())
        axes.errorbar(
            row.conv_params * 1.04**same,  # rows of as many parameters stand side by side
            row.top1_mean,
            yerr=error,
            fmt="osD^vP*X"[i % 8],
            color=f"C{i}",
            capsize=3,
            label=row.row,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("convolution parameters")
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    axes.set_title(f"{title}: mean ± standard deviation, {frame['seeds'].max()} seeds")
    axes.grid(alpha=0.3)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return drawn
