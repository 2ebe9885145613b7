"""The benchmarks refuse options that they cannot work with."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_layer_benchmark_refuses_one_round() -> None:
    command = [sys.executable, "benchmarks/layer.py", "rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == "error: rounds=1 is invalid: it should be a number of at least 2\n"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rounds=x", "rounds=x is invalid: it should be a number of at least 2"),
        ("quick", "unknown argument quick; known: folder=..., rounds=..."),
        ("round=7", "unknown argument round=7; known: folder=..., rounds=..."),
    ],
)
def test_invalid_argument_is_refused(monkeypatch: pytest.MonkeyPatch, argument: str, message: str) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from timing import parse_arguments  # of benchmarks/, which is no package

    monkeypatch.setattr(sys, "argv", ["layer.py", "folder=out", argument])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        parse_arguments(folder="results/benchmarks", rounds="15")
    monkeypatch.setattr(sys, "argv", ["layer.py", "folder=out"])
    assert parse_arguments(folder="results/benchmarks", rounds="15") == {"folder": "out", "rounds": "15"}
