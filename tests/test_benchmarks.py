"""The benchmarks refuse options that they cannot work with."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_layer_benchmark_refuses_one_round() -> None:
    command = [sys.executable, "benchmarks/layer.py", "rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == "rounds=1: quartiles need at least 2 rounds\n"
