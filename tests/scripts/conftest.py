import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Command = Callable[..., list[str]]
RunScript = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script_command() -> Command:
    """Returns the command line that runs a script with arguments."""
    return lambda name, *arguments: [sys.executable, str(ROOT / "scripts" / name), *arguments]


@pytest.fixture
def run_script(script_command: Command) -> RunScript:
    """Runs a script and waits until it ends; the result has the exit status, stdout and stderr."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(script_command(name, *arguments), capture_output=True, text=True, check=False)

    return run
