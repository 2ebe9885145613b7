"""Tables: rows to runs, and the records of those runs to means, intervals and a figure."""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from omegaconf import DictConfig
from scipy import stats
from tqdm import tqdm

from training import data as datasets
from training.config import check, compose
from training.errors import UsageError
from training.files import write_atomic
from training.loop import build, run
from training.records import recorded

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

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


@dataclass
class Row:
    """One row of a table: a configuration, but for its seed and the hyperparameters that its search chooses."""

    name: str
    overrides: list[str]
    chosen: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def config(self, *overrides: str) -> DictConfig:
        return compose([*self.overrides, *self.chosen, *overrides])


class Table:
    """What ``configs/table/<name>.yaml`` says; ``overrides`` are the user's and come last.

    Raises:
        UsageError: a row that cannot be run, before any is.
    """

    def __init__(self, name: str, cfg: DictConfig, overrides: list[str]) -> None:
        self.name = name
        self.cfg = cfg
        self.overrides = overrides
        self.rows = [Row(row.name, [*cfg.overrides, *row.overrides, *overrides]) for row in cfg.rows]
        data = None
        for row in self.rows:
            example = row.config()
            check(example)
            data = data or datasets.load(example.data)
            build(example, data.channels, data.classes)
        self.results = Path(example.paths.results) / "tables"

    def runs(self) -> Iterator[tuple[str, DictConfig]]:
        """Every run, with a line that says which; a row's search comes before its seeds, which need its outcome."""
        for row in self.rows:
            if self.cfg.search is not None:
                for i in range(len(self.cfg.search.candidates)):
                    yield f"{row.name}, search {i + 1}/{len(self.cfg.search.candidates)}", self._trial(row, i)
                row.chosen = list(self.cfg.search.candidates[self._best(row)])
            for seed in self.cfg.seeds:
                yield f"{row.name}, seed {seed}", row.config(f"seed={seed}")

    def __len__(self) -> int:
        trials = 0 if self.cfg.search is None else len(self.cfg.search.candidates)
        return len(self.rows) * (trials + len(self.cfg.seeds))

    def _trial(self, row: Row, index: int) -> DictConfig:
        search = self.cfg.search
        return row.config(*search.candidates[index], f"seed={search.seed}", "trainer.test=false")

    def _best(self, row: Row) -> int:
        """The candidate of the best validation accuracy, ties by validation loss."""
        records = [recorded(self._trial(row, i)) for i in range(len(self.cfg.search.candidates))]
        return max(range(len(records)), key=lambda i: _rank(records[i]))

    def reproduce(self) -> pd.DataFrame:
        """Does the runs that are not recorded yet, and writes the table from the records of all."""
        progress = tqdm(self.runs(), total=len(self), desc=self.name, unit="run", disable=None)
        for number, (title, cfg) in enumerate(progress, 1):
            progress.set_postfix_str(title)
            before = recorded(cfg) is not None
            record = run(cfg)
            measured, top1 = ("test", record["test"]) if record["test"] else ("validation", record["val"])
            note = "recorded before" if before else f"{record['seconds']:.0f} s"
            progress.write(f"[{number}/{len(self)}] {title}: {measured} {top1['top1']:.2f}% ({note})")
        for row in self.rows:
            found = [recorded(row.config(f"seed={seed}")) for seed in self.cfg.seeds]
            row.records = [record for record in found if record is not None]
        return self.write()

    def write(self) -> pd.DataFrame:
        """results/tables/<name>.csv, .md, .png and .jsonl, the records that they stand on."""
        frame = summary(self.rows)
        records = [{"row": row.name, **record} for row in self.rows for record in row.records]
        path = self.results / self.name
        write_atomic(path.with_suffix(".csv"), lambda p: frame.to_csv(p, index=False, float_format="%.6g"))
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomic(path.with_suffix(".jsonl"), lambda p: p.write_text(lines))
        write_atomic(path.with_suffix(".md"), lambda p: p.write_text(self.markdown(frame)))
        write_atomic(path.with_suffix(".png"), lambda p: figure(frame, self.cfg.title).savefig(p, dpi=150))
        plt.close("all")
        return frame

    def markdown(self, frame: pd.DataFrame) -> str:
        """The table for people, with how it came about."""
        text = io.StringIO()
        plain = frame["row"][0]
        text.write(f"# {self.cfg.title}\n\n")
        text.write(f"| row | arrangement | conv. parameters | plain / row | top-1 test % | points against {plain} |")
        text.write("\n|---|---|---:|---:|---:|---:|\n")
        for row in frame.itertuples():
            top1 = f"{row.top1_mean:.2f}" + ("" if math.isnan(row.top1_std) else f" ± {row.top1_std:.2f}")
            difference = f"{row.diff_mean:+.2f}"
            if not math.isnan(row.diff_ci95_low):
                difference += f" [{row.diff_ci95_low:+.2f}, {row.diff_ci95_high:+.2f}]"
            text.write(
                f"| {row.row} | {row.arrangement} | {row.conv_params:,} | {row.conv_ratio:.2f} | {top1} | "
                f"{'' if row.row == plain else difference} |\n"
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
                text.write(f"| {chosen.name} | {' '.join(f'`{word}`' for word in chosen.chosen)} |\n")
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


def _rank(record: dict[str, Any] | None) -> tuple[float, float]:
    assert record is not None, "a search's runs come before its outcome"
    return record["val"]["top1"], -record["val"]["loss"]


def summary(rows: list[Row]) -> pd.DataFrame:
    """The columns ``COLUMNS``: accuracies in per cent, differences in points against the first row, paired by seed."""
    plain = rows[0]
    base = {record["config"]["seed"]: record["test"]["top1"] for record in plain.records}
    lines: list[dict[str, Any]] = []
    for row in rows:
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


def figure(frame: pd.DataFrame, title: str) -> Any:
    """Accuracy (mean and standard deviation over seeds) against convolution parameters."""
    fig, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
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
    fig.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return fig
