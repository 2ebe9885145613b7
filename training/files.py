"""Files that are whole or not there, and folders that one process works in at a time."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from training.errors import BusyError, UsageError

_MARK = ".unfinished-"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path beside ``path``, then moves that into place.

    Raises:
        UsageError: a full disk, no permission: what was at ``path`` is untouched.
    """
    temporary = path.with_name(f"{_MARK}{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder and works in it alone; a lock of a process that died is no lock.

    Raises:
        BusyError: another process works in it.
        UsageError: it cannot be made.
    """
    holder = folder / "worker"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            for left in folder.glob(f"{_MARK}*"):  # by a process that was killed as it wrote
                left.unlink()
            yield
    except Timeout as error:
        by = holder.read_text() if holder.exists() else "another process"
        raise BusyError(f"{folder} is being worked on by {by}; wait for it, or stop it") from error
    except OSError as error:
        raise UsageError(f"cannot work in {folder}: {error.strerror or error}") from error


def is_busy(folder: Path) -> bool:
    """Whether a process works in a folder."""
    if not (folder / "lock").exists():
        return False
    try:
        with FileLock(folder / "lock", timeout=0):
            return False
    except Timeout:
        return True
