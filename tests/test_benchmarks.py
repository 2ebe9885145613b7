"""The benchmarks refuse options that they cannot work with."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("layer.py", "rounds=1", "rounds=1 is invalid: it should be a number of at least 2"),
        ("factored.py", "rounds=x", "rounds=x is invalid: it should be a number of at least 2"),
        ("layer.py", "quick", "unknown argument quick; known: folder=..., rounds=..."),
    ],
)
def test_benchmark_refuses_invalid_argument(script: str, argument: str, message: str) -> None:
    command = [sys.executable, f"benchmarks/{script}", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == f"error: {message}\n"
