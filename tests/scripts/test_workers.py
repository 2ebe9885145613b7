"""Several reproduce_table.py at once, in shells and through Slurm. Minutes: pytest -m "slow or slurm"."""

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

EPOCHS = "trainer.epochs=3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def arguments(folder: Path) -> Callable[[str], list[str]]:
    return lambda name: [EPOCHS, f"paths.runs={folder}/{name}/runs", f"paths.results={folder}/{name}/results"]


@pytest.fixture
def lone(folder: Path, script: Any, arguments: Any) -> tuple[str, list[dict[str, Any]]]:
    """The table of one worker."""
    if not (folder / "lone/results").exists():
        done = script("reproduce_table.py", *arguments("lone"))
        assert done.returncode == 0, done.stderr
    return outcome(folder / "lone")


def outcome(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    lines = (folder / "results/tables/digits.jsonl").read_text().splitlines()
    return (folder / "results/tables/digits.csv").read_text(), [{**json.loads(line), "seconds": 0} for line in lines]


def wait_for_records(folder: Path, count: int) -> None:
    until = time.monotonic() + 300
    while len(list(folder.glob("runs/*/record.json"))) < count:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_in_shells(folder: Path, command: Any, arguments: Any, lone: Any, workers: int) -> None:
    name = f"{workers}"
    start = command("reproduce_table.py", *arguments(name))
    logs = [(folder / f"{name}-{i}.log").open("w+") for i in range(workers + 1)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a killed worker said is in its log
    processes = [subprocess.Popen(start, stdout=log, stderr=log, env=environment) for log in logs[:workers]]
    wait_for_records(folder / name, 6)
    processes[0].kill()
    processes[0].wait()
    processes[0] = subprocess.Popen(start, stdout=logs[workers], stderr=logs[workers], env=environment)
    assert [process.wait() for process in processes] == [0] * workers
    assert outcome(folder / name) == lone
    done: list[str] = []
    for log in logs:
        log.seek(0)
        done += re.findall(r"\] (.*): test .*\(\d+ s\)", log.read())
    assert len(done) == len(set(done)) and len(done) >= 20  # the killed one may have recorded a run and not said so
    assert len(list((folder / name).glob("runs/*/record.json"))) == 21


@pytest.fixture
def jobs() -> Iterator[Callable[[], list[str]]]:
    """The numbers of the jobs that the test has in Slurm now; those left at its end are cancelled."""
    if shutil.which("sbatch") is None:
        pytest.skip("no sbatch")

    def mine() -> list[str]:
        listed = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%A"], capture_output=True, text=True, check=True)
        return [job for job in listed.stdout.split() if job not in before]

    before: list[str] = []
    before = mine()
    yield mine
    if left := mine():
        subprocess.run(["scancel", *left], check=True)


@pytest.mark.slurm
def test_a_sweep_through_slurm(tmp_path: Path, script: Any, jobs: Any) -> None:
    sweep = ["-m", "hydra/launcher=slurm", "arrangement=gabor,mosaic", "seed=0,1", EPOCHS, f"paths.runs={tmp_path}"]
    done = script("train.py", *sweep)
    assert done.returncode == 0, done.stderr
    done = script("collect.py", f"runs={tmp_path}", f"file={tmp_path}/all.csv")
    assert done.stdout.strip() == f"{tmp_path}/all.csv: 4 runs"


@pytest.mark.slurm
def test_a_table_through_slurm(folder: Path, command: Any, arguments: Any, lone: Any, jobs: Any) -> None:
    """Two jobs share it; one is cancelled midway, and the same command sent again does the rest."""
    start = command("reproduce_table.py", "-m", "hydra/launcher=slurm", "worker=0,1", *arguments("slurm"))
    with (folder / "slurm.log").open("w") as log:
        first = subprocess.Popen(start, stdout=log, stderr=log)
        wait_for_records(folder / "slurm", 4)
        subprocess.run(["scancel", "--signal=KILL", jobs()[0]], check=True)
        again = subprocess.Popen(start, stdout=log, stderr=log)
        assert again.wait() == 0
        first.kill()  # without Slurm's accounting, submitit waits for the cancelled job for ever
        first.wait()
    assert outcome(folder / "slurm") == lone
    assert len(list((folder / "slurm").glob("runs/*/record.json"))) == 21
