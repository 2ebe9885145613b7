"""Turns the rows of a table into runs, which any number of workers share."""

import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from acl.plot import to_pdf, to_png
from reporting.render import draw_table, render_latex, render_markdown
from reporting.rows import Row, read_results, summarize
from reporting.settings import Search, TableSettings, is_seed
from training.config import compose, get_key, is_in_identity, resolve
from training.errors import BusyError, UsageError
from training.files import read_json_lines, to_json_lines, write_atomic, write_together
from training.loggers import check_logger, log_table
from training.loop import load_valid_record, run
from training.record import Record
from training.run_directory import RunDirectory
from training.settings import RunSettings, build_model, create_smoke_folder, find_changes, load_run_data, parse_run
from training.validation import construct

RUN_KEY_ROOTS = ("arrangement", "data", "model", "optim", "trainer", "logger")
"""The ``new_key_roots`` of scripts: data sets have keys of their own, which are known only once a row is composed."""
POLL_SECONDS = 1.0
"""Time between checks whether other workers have finished their runs."""


@dataclass(frozen=True)
class PlannedRun:
    title: str
    settings: RunSettings

    @property
    def directory(self) -> RunDirectory:
        return self.settings.directory

    def load_record(self) -> Record | None:
        return load_valid_record(self.settings)

    @property
    def last_failure_line(self) -> str:
        lines = self.directory.failure_file.read_text("utf-8").strip().splitlines()
        return lines[-1].removeprefix("training.errors.UsageError: ")


class Table:
    """A table and its runs. Any number of processes may reproduce it; each run is locked by one of them.

    Args:
        name: the name of the table and of its files.
        settings: the table's settings.
        overrides: the user's overrides, which come last.

    Raises:
        UsageError: if the user's overrides set the seed.
    """

    def __init__(self, name: str, settings: TableSettings, overrides: list[str]) -> None:
        self.name = name
        self.settings = settings
        self.user_overrides = overrides
        if override := next(filter(is_seed, overrides), None):
            value = override.partition("=")[2]
            raise UsageError(f"{override} has no effect on a table, which runs table.seeds; use table.seeds=[{value}]")
        self.rows = [
            Row(row["name"], [*settings.overrides, *row["overrides"], *overrides], row.get("against"))
            for row in settings.kept_rows
        ]
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._planned: dict[tuple[str, int, tuple[str, ...]], PlannedRun] = {}
        paths = parse_run(self._compose(self.rows[0])).paths
        self.path = paths.results / "tables" / name
        # Failures are recognized by their files, not by time, since clocks of workers and file systems may differ.
        self._earlier_failures = {file: file.stat().st_mtime_ns for file in paths.runs.glob("*/failed.txt")}

    def __len__(self) -> int:
        return len(self.rows) * (len(self.settings.candidates) + len(self.settings.seeds))

    def _compose(self, row: Row, *overrides: str) -> DictConfig:
        key = (*row.overrides, *overrides)
        if key not in self._composed:
            self._composed[key] = compose(list(key))
        return self._composed[key]

    def _plan(self, row: Row, title: str, seed: int, *overrides: str) -> PlannedRun:
        key = (f"{row.name}, {title}", seed, overrides)
        if key not in self._planned:
            cfg = self._compose(row, *overrides).copy()
            cfg.seed = seed  # after composing, which is slow, so that the seeds of a row share one composition
            if cfg.logger.name == "wandb":
                cfg.logger.update(group=self.name, row=row.name, title=key[0])
            self._planned[key] = PlannedRun(key[0], parse_run(cfg))
        return self._planned[key]

    def _plan_trials(self, row: Row) -> list[PlannedRun]:
        if self.settings.search is None:
            return []
        seed, n = self.settings.search["seed"], len(self.settings.candidates)
        return [
            self._plan(row, f"search {i}/{n}", seed, *candidate, "trainer.test=false")
            for i, candidate in enumerate(self.settings.candidates, 1)
        ]

    def _plan_seeds(self, row: Row) -> list[PlannedRun]:
        return [self._plan(row, f"seed {seed}", seed, *(row.chosen or [])) for seed in self.settings.seeds]

    def plan_runs(self) -> list[PlannedRun]:
        """Lists the runs known so far: seed runs are listed once the row's search has chosen a candidate."""
        planned: list[PlannedRun] = []
        for row in self.rows:
            planned += self._plan_trials(row)
            if row.chosen is None:
                row.chosen = self._choose_candidate(row)
            if row.chosen is not None:
                planned += self._plan_seeds(row)
        return planned

    def find_finished_runs(self) -> Iterator[tuple[str, PlannedRun]]:
        """Yields each finished run of a seed, with its row."""
        self.plan_runs()  # chooses the candidate of each row
        for row in self.rows:
            for planned in self._plan_seeds(row) if row.chosen is not None else ():
                if planned.load_record() is not None:
                    yield row.name, planned

    def _choose_candidate(self, row: Row) -> list[str] | None:
        """Chooses the candidate with the best validation accuracy, ties broken by validation loss.

        Returns None while a trial is missing, and if all trials failed.
        """
        if not self.settings.candidates:
            return []
        scores: list[tuple[float, float, int]] = []
        for index, trial in enumerate(self._plan_trials(row)):
            record = trial.load_record()
            if record is not None:
                scores.append((record.val.top1, -record.val.loss, -index))
            elif not self._has_failed(trial):
                return None
        return self.settings.candidates[-max(scores)[2]] if scores else None

    def _has_failed(self, planned: PlannedRun) -> bool:
        """Whether a worker's attempt failed since this worker started; earlier failures are retried."""
        file = planned.directory.failure_file
        return file.exists() and file.stat().st_mtime_ns != self._earlier_failures.get(file)

    def check_rows(self) -> None:
        """Validates every row and builds its model, before any run. Raises UsageError for the first invalid row."""
        data = None
        evaluates_test = parse_run(self._compose(self.rows[0])).trainer.test
        for row in self.rows:
            settings = parse_run(self._compose(row))
            if settings.trainer.devices * settings.trainer.nodes > 1:
                raise UsageError(
                    "a run of a table uses one device; start more workers (the same command again) to use more devices"
                )
            if settings.trainer.test != evaluates_test:
                raise UsageError(
                    f"row '{row.name}' has trainer.test={str(settings.trainer.test).lower()}, unlike the first row; a "
                    "table lists results on the test split or on the validation split, not on both"
                )
            if data is None:
                check_logger(settings.logger)
                data = load_run_data(settings)
            build_model(settings, data)

    def check_written(self) -> None:
        """Raises UsageError if the table's own .jsonl files have runs that writing the table would lose."""
        chosen = [replace(row, chosen=c) for row in self.rows for c in self.settings.candidates or [[]]]
        written = {self.path.with_suffix(".jsonl"): [planned for row in chosen for planned in self._plan_seeds(row)]}
        if self.settings.search is not None:
            written[self._search_file] = [planned for row in self.rows for planned in self._plan_trials(row)]
        for file, runs in written.items():
            ids = {planned.directory.id for planned in runs}
            lines = _read_recorded(file) if file.exists() else []
            if lost := [line for line in lines if line.get("id") not in ids]:
                raise UsageError(
                    f"{file} has {len(lost)} runs of another recipe, such as of row '{lost[0].get('row')}'; "
                    "move it away, or write this table elsewhere with paths.results=<folder>"
                )

    def status(self) -> dict[str, list[str]]:
        """Lists the runs that are done, running, failed (with the last line of the error) or left to do."""
        status: dict[str, list[str]] = {"done": [], "running": [], "failed": [], "left": []}
        for planned in self.plan_runs():
            if planned.load_record() is not None:
                status["done"].append(planned.title)
            elif planned.directory.is_locked():
                status["running"].append(planned.title)
            elif planned.directory.failure_file.exists():
                status["failed"].append(f"{planned.title}: {planned.last_failure_line}")
            else:
                status["left"].append(planned.title)
        num_undecided = len(self) - sum(map(len, status.values()))
        status["left"] += ["a seed of a row whose search is not finished"] * num_undecided
        return status

    def describe_outdated(self) -> str | None:
        """Counts the runs recorded with other code, data or pretrained weights than the current ones; None: none."""
        recorded = [
            find_changes(planned.settings, record)
            for planned in self.plan_runs()
            if (record := planned.directory.load_record()) is not None
        ]
        outdated = [changes for changes in recorded if changes]
        what = " or other ".join(dict.fromkeys(name for changes in outdated for name in changes))
        return f"{len(outdated)} of {len(recorded)} runs were recorded with other {what}" if outdated else None

    def reproduce(self) -> pd.DataFrame:
        """Performs the runs that are not recorded, waits for those of other workers, and writes the table.

        Raises:
            UsageError: if a row is invalid; or, once all other runs are done, if runs failed in this or another worker.
                The table is then not written.
        """
        self.check_rows()
        with tqdm(total=len(self), desc=self.name, unit="run", disable=None) as progress:
            self._perform_runs(progress)
        for row in self.rows:
            records = [planned.load_record() for planned in self._plan_seeds(row)]
            row.records = [record for record in records if record is not None]
        # A search may skip a failed candidate, but a row needs all of its seeds.
        if any(row.chosen is None or len(row.records) < len(self.settings.seeds) for row in self.rows):
            status = self.status()
            raise UsageError(
                f"{len(status['failed'])} of {len(self)} runs failed, {len(status['done'])} are done; the same command "
                f"retries the failed runs: {'; '.join(status['failed'])}"
            )
        self._write_trials()
        frame, settings = self.write(), parse_run(self._compose(self.rows[0]))
        log_table(settings.logger, self.name, frame, self.path.with_suffix(".png"), settings.paths.runs)
        return frame

    def _perform_runs(self, progress: tqdm) -> None:
        """Performs or awaits every run, until each is recorded or has failed."""
        finished: set[str] = set()
        while True:
            is_waiting = made_progress = False
            for planned in self.plan_runs():
                if planned.title in finished or self._has_failed(planned):
                    continue
                progress.set_postfix_str(planned.title)
                try:
                    record, is_new = run(planned.settings)
                except BusyError:
                    is_waiting = True
                    continue
                except Exception:
                    write_atomic(planned.directory.failure_file, traceback.format_exc())
                    progress.write(f"{planned.title}: failed: {planned.last_failure_line}")
                else:
                    planned.directory.failure_file.unlink(missing_ok=True)
                    finished.add(planned.title)
                    progress.update()
                    split, result = ("test", record.test) if record.test else ("validation", record.val)
                    note = f"{record.seconds:.0f} s" if is_new else "recorded before"
                    counter = f"[{len(finished)}/{len(self)}]"
                    progress.write(f"{counter} {planned.title}: {split} {result.top1:.2f}% ({note})")
                made_progress = True
            if not made_progress:
                if not is_waiting:
                    return
                time.sleep(POLL_SECONDS)

    @property
    def _search_file(self) -> Path:
        return self.path.with_name(f"{self.name}_search.jsonl")

    def _describe_search(self) -> str | None:
        if self.settings.search is None:
            return None
        n, seed = len(self.settings.candidates), self.settings.search["seed"]
        link = f" ([all trials]({self._search_file.name}))" if self._search_file.exists() else ""
        return (
            f"Hyperparameters: each row tries the same {n} candidates, at full length, once (seed {seed}), and takes "
            f"the one with the best validation accuracy{link}."
        )

    def _write_trials(self) -> None:
        """Writes the records of the search trials."""
        trials = [
            {"row": row.name, "candidate": candidate, **record.to_dict()}
            for row in self.rows
            for candidate, trial in zip(self.settings.candidates, self._plan_trials(row), strict=True)
            if (record := trial.load_record()) is not None
        ]
        if trials:
            write_atomic(self._search_file, to_json_lines(trials))

    def load_results(self) -> None:
        """Loads the records from the table's own .jsonl file instead of from run folders.

        Raises:
            UsageError: if it was written for another configuration; and as ``read_results`` does.
        """
        file = self.path.with_suffix(".jsonl")
        entries = read_results(file)
        for row in self.rows:
            row.records = [entry for entry in entries if entry.row == row.name]
            ids = {record.id for record in row.records}
            candidates = (replace(row, chosen=candidate) for candidate in self.settings.candidates or [[]])
            matching = (c.chosen for c in candidates if {p.directory.id for p in self._plan_seeds(c)} == ids)
            row.chosen = next(matching, None)
            if row.chosen is None:
                raise UsageError(f"{file} has no complete row '{row.name}' as configured in table {self.name}")

    def write(self) -> pd.DataFrame:
        """Writes <name>.csv, .md, .tex, .png, .pdf and .jsonl (the records)."""
        frame = summarize(self.rows)
        local_overrides = {word for word in self.user_overrides if not is_in_identity(word)}  # such as local paths
        seed = f"seed={self.settings.seeds[0]}"
        commands = {
            row.name: [word for word in (*row.overrides, *(row.chosen or []), seed) if word not in local_overrides]
            for row in self.rows
        }
        records = [{"row": row.name, **record.to_dict()} for row in self.rows for record in row.records]
        title, also_against = self.settings.title, self.settings.also_against
        figure = draw_table(frame, title, self.rows[0].split)
        contents: dict[str, str | bytes] = {
            ".csv": frame.to_csv(index=False, float_format="%.6g"),
            ".jsonl": to_json_lines(records),
            ".md": render_markdown(title, self.rows, also_against, self._describe_search(), commands),
            ".tex": render_latex(title, self.rows, also_against),
            ".png": to_png(figure),
            ".pdf": to_pdf(figure),
        }
        write_together({self.path.with_suffix(suffix): content for suffix, content in contents.items()})
        return frame


def _read_recorded(file: Path) -> list[dict[str, Any]]:
    """The records of a file of a table, which older code may have written, so they are not validated."""
    return read_json_lines(file, dict[str, Any], "the record of a run", json.dumps)


def open_table(cfg: DictConfig, *script_keys: str) -> Table:
    """Creates the table that a script's command line names; the user's other overrides apply to each of its runs.

    Args:
        cfg: configs/reproduce_table.yaml, or a configuration that extends it.
        script_keys: keys that are options of the script, not of runs, apart from ``table`` and ``worker``.

    Raises:
        UsageError: for invalid settings of the table.
    """
    hydra = HydraConfig.get()
    words = [word.removeprefix("++") for word in hydra.overrides.task]
    own_keys = {"table", "worker", *script_keys}
    run_overrides = [word for word in words if get_key(word).partition(".")[0] not in own_keys]
    settings = construct(TableSettings, resolve(cfg)["table"], "table")
    if cfg.debug is not None:  # one run of each row, and one trial of its search
        search = settings.search and Search(**{**settings.search, "candidates": settings.search["candidates"][:1]})
        settings = replace(settings, seeds=settings.seeds[:1], search=search)
        run_overrides.append(f"paths.results={create_smoke_folder()}")
    return Table(hydra.runtime.choices["table"], settings, run_overrides)
