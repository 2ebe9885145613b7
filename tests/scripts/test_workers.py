"""Several workers of reproduce_table.py, in shells and in Slurm jobs. Takes minutes: pytest -m "slow or slurm" """

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.conftest import Command, RunScript

EPOCHS = "trainer.epochs=3"

Arguments = Callable[[str], list[str]]
Outcome = tuple[str, list[dict[str, Any]]]
"""The CSV and the records of a table."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def table_arguments(folder: Path) -> Arguments:
    """Gives the arguments of a table that is written to a subfolder."""
    return lambda name: [EPOCHS, f"paths.runs={folder}/{name}/runs", f"paths.results={folder}/{name}/results"]


@pytest.fixture
def single_worker_outcome(folder: Path, run_script: RunScript, table_arguments: Arguments) -> Outcome:
    """The table that a single worker reproduces."""
    if not (folder / "single/results").exists():
        done = run_script("reproduce_table.py", *table_arguments("single"))
        assert done.returncode == 0, done.stderr
    return read_outcome(folder / "single")


def read_outcome(folder: Path) -> Outcome:
    """A table and its records, without the seconds that they took."""
    lines = (folder / "results/tables/digits.jsonl").read_text().splitlines()
    return (folder / "results/tables/digits.csv").read_text(), [{**json.loads(line), "seconds": 0} for line in lines]


def wait_for_records(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(list(folder.glob("runs/*/record.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_in_shells_share_table(
    folder: Path,
    script_command: Command,
    table_arguments: Arguments,
    single_worker_outcome: Outcome,
    workers: int,
) -> None:
    """One worker is killed midway and replaced; no run is trained twice."""
    name = f"{workers}"
    command = script_command("reproduce_table.py", *table_arguments(name))
    logs = [(folder / f"{name}-{i}.log").open("w+") for i in range(workers + 1)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # keeps what a killed worker has printed
    processes = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for log in logs[:workers]]
    wait_for_records(folder / name, 6)
    processes[0].kill()
    processes[0].wait()
    processes[0] = subprocess.Popen(command, stdout=logs[workers], stderr=logs[workers], env=environment)
    assert [process.wait() for process in processes] == [0] * workers
    assert read_outcome(folder / name) == single_worker_outcome
    logged: list[str] = []
    for log in logs:
        log.seek(0)
        logged += re.findall(r"\] (.*): test .*\(\d+ s\)", log.read())
    assert len(logged) == len(set(logged))
    assert len(logged) >= 20  # the killed worker may have recorded a run and not printed it
    assert len(list((folder / name).glob("runs/*/record.json"))) == 21


@pytest.fixture
def list_slurm_jobs() -> Iterator[Callable[[], list[str]]]:
    """Lists the ids of the Slurm jobs that the test has started; cancels those that remain at its end."""
    if shutil.which("sbatch") is None:
        pytest.skip("needs sbatch")

    def list_new_jobs() -> list[str]:
        listed = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%A"], capture_output=True, text=True, check=True)
        return [job for job in listed.stdout.split() if job not in existing]

    existing: list[str] = []
    existing = list_new_jobs()
    yield list_new_jobs
    if left := list_new_jobs():
        subprocess.run(["scancel", *left], check=True)


@pytest.mark.slurm
def test_sweep_runs_through_slurm(
    tmp_path: Path, run_script: RunScript, list_slurm_jobs: Callable[[], list[str]]
) -> None:
    sweep = ["-m", "hydra/launcher=slurm", "arrangement=gabor,mosaic", "seed=0,1", EPOCHS, f"paths.runs={tmp_path}"]
    done = run_script("train.py", *sweep)
    assert done.returncode == 0, done.stderr
    done = run_script("collect.py", f"runs={tmp_path}", f"file={tmp_path}/all.csv")
    assert done.stdout.strip() == f"{tmp_path}/all.csv: 4 runs"


@pytest.mark.slurm
def test_slurm_jobs_share_table(
    folder: Path,
    script_command: Command,
    table_arguments: Arguments,
    single_worker_outcome: Outcome,
    list_slurm_jobs: Callable[[], list[str]],
) -> None:
    """One of two jobs is canceled midway; submitting the same command again completes the table."""
    command = script_command(
        "reproduce_table.py", "-m", "hydra/launcher=slurm", "worker=0,1", *table_arguments("slurm")
    )
    with (folder / "slurm.log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for_records(folder / "slurm", 4)
        subprocess.run(["scancel", "--signal=KILL", list_slurm_jobs()[0]], check=True)
        second = subprocess.Popen(command, stdout=log, stderr=log)
        assert second.wait() == 0
        first.kill()  # without Slurm's accounting, submitit waits forever for the canceled job
        first.wait()
    assert read_outcome(folder / "slurm") == single_worker_outcome
    assert len(list((folder / "slurm").glob("runs/*/record.json"))) == 21
