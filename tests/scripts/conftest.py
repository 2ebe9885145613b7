import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Command = Callable[..., list[str]]
RunScript = Callable[..., subprocess.CompletedProcess[str]]


def skip_mode(patch: pytest.MonkeyPatch) -> None:
    """Keeps Hydra from composing a script's configuration once more, only to see whether it sets ``hydra.mode``."""
    patch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)


@pytest.fixture(scope="session")
def script_command() -> Command:
    """Returns the command line that runs a script with arguments."""
    return lambda name, *arguments: [sys.executable, str(ROOT / "scripts" / name), *arguments]


@pytest.fixture(scope="session")
def run_script(script_command: Command) -> RunScript:
    """Runs a script and waits until it ends; the result has the exit status, stdout and stderr."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HYDRA_FULL_ERROR": "0"}  # scripts that ran in this process set it
        return subprocess.run(script_command(name, *arguments), capture_output=True, text=True, check=False, env=env)

    return run


@pytest.fixture
def call_script(monkeypatch: pytest.MonkeyPatch) -> RunScript:
    """Runs a script as ``run_script`` does, but in the process of the tests, which saves the seconds of its imports."""

    def call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        file, status, stdout, stderr = str(ROOT / "scripts" / name), 0, io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
            skip_mode(patch)
            patch.setattr(sys, "argv", [file, *arguments])
            patch.setenv("HYDRA_FULL_ERROR", "0")  # scripts set it
            try:
                runpy.run_path(file, run_name="__main__")
            except SystemExit as error:
                status = int(error.code or 0)
        return subprocess.CompletedProcess(sys.argv, status, stdout.getvalue(), stderr.getvalue())

    return call
