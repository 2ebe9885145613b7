"""Files that are whole or not there, and folders that one process works in at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from training.errors import BusyError, UsageError

_MARK = ".unfinished-"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a temporary file beside ``path``, then moves it into place.

    Raises:
        UsageError: a full disk, no permission: what was at ``path`` is untouched.
    """
    temporary = path.with_name(f"{_MARK}{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder and works in it alone; a lock of a process that died is no lock.

    Raises:
        BusyError: another process works in it.
        UsageError: it cannot be made.
    """
    holder, lock = folder / "worker", FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        for left in folder.glob(f"{_MARK}*"):  # by a process that was killed as it wrote
            left.unlink()
    except Timeout as error:
        by = holder.read_text() if holder.exists() else "another process"
        raise BusyError(f"{folder} is being worked on by {by}; wait for it, or stop it") from error
    except OSError as error:
        raise UsageError(f"cannot work in {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def is_busy(folder: Path) -> bool:
    """Whether a process works in a folder."""
    if not (folder / "lock").exists():
        return False
    try:
        with FileLock(folder / "lock", timeout=0):
            return False
    except Timeout:
        return True
