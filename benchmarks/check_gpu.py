"""What a user of a new GPU runs first: tests on it, costs, and the time of a table with several workers.

    python benchmarks/check_gpu.py [folder=results/benchmarks] [data=data]

Writes <name of the GPU>.md. Without a GPU, it says so and does nothing.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import parse_arguments

from training.files import write_atomic
from training.provenance import describe_environment

ROOT = Path(__file__).parents[1]
WORKERS = (1, 4, 8)
TABLE = ["table=mnist", "table.search=null", "table.seeds=[0,1]", "trainer.epochs=2"]


def main() -> None:
    options = parse_arguments(folder="results/benchmarks", data="data")
    if not torch.cuda.is_available():
        print("check-gpu was skipped: torch finds no CUDA device")
        return
    folder, data = Path(options["folder"]), options["data"]
    environment = describe_environment(torch.device("cuda"))
    name = environment["machine"]["device"]
    with tempfile.TemporaryDirectory() as temporary:
        tests = run_python("-m", "pytest", "-m", "gpu", "-p", "no:xdist", "tests/test_gpu.py")
        benchmarks = [measure(script, Path(temporary)) for script in ("layer", "factored")]
        workers = [time_table(count, Path(temporary) / str(count), data) for count in WORKERS]
    lines = [
        f"# {name}",
        "",
        f"Commit {environment['commit']}; torch {environment['versions']['torch']}.",
        "",
        "## Tests",
        "",
        f"{tests.stdout.strip().splitlines()[-1].strip('= ')}",
        *(f"- {line}" for line in tests.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))),
        *(f"\n#{text}" for text in benchmarks),
        "## MNIST table, 14 runs of 2 epochs",
        "",
        "| workers | seconds |",
        "|---:|---:|",
        *(f"| {count} | {seconds} |" for count, seconds in zip(WORKERS, workers, strict=True)),
    ]
    text = "\n".join(lines) + "\n"
    write_atomic(folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.md", text)
    print(text)
    sys.exit(tests.returncode)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def measure(script: str, folder: Path) -> str:
    """Runs a benchmark and returns its report, or the last line of its error."""
    done = run_python(f"benchmarks/{script}.py", f"folder={folder}", "rounds=5")
    return done.stdout if done.returncode == 0 else f" {script}\n\nFailed: {done.stderr.strip().splitlines()[-1]}\n"


def time_table(workers: int, folder: Path, data: str) -> str:
    """The seconds that workers need for the table together, or the last line of an error."""
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results", f"data.root={data}"]
    command = [sys.executable, "scripts/reproduce_table.py", *TABLE, *paths]
    started = time.perf_counter()
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    errors = [process.communicate()[1] for process in processes]
    seconds = time.perf_counter() - started
    failed = [error for process, error in zip(processes, errors, strict=True) if process.returncode]
    return failed[0].strip().splitlines()[-1] if failed else f"{seconds:.0f}"


if __name__ == "__main__":
    main()
