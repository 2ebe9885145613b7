import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command() -> Callable[..., list[str]]:
    """The command line of a script."""
    return lambda name, *arguments: [sys.executable, str(ROOT / "scripts" / name), *arguments]


@pytest.fixture
def script(command: Callable[..., list[str]]) -> Script:
    """Runs a script to its end."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(name, *arguments), capture_output=True, text=True, check=False)

    return run
