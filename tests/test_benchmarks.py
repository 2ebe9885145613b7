"""The benchmarks refuse options that they cannot work with."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rounds=1", "rounds=1 is invalid: it should be a number of at least 2"),
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
