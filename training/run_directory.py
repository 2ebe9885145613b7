"""The folder of one run: its id, lock, record, checkpoints and files, all written atomically."""

import hashlib
import io
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from training.errors import BusyError, UsageError
from training.files import UNFINISHED, write_atomic
from training.record import Record, compute_run_id, read_record


def serialize(state: dict[str, Any]) -> bytes:
    """Runs ``torch.save`` in memory, so that a full disk raises a clear error later, in ``write_atomic``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class RunDirectory:
    """The folder ``<runs>/<id>`` of one run.

    Args:
        runs: the folder of all runs.
        identity: the part of the run's configuration that determines its result; the id is its hash.
    """

    def __init__(self, runs: Path, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.id = compute_run_id(identity)
        self.path = runs / self.id
        self.record_file = self.path / "record.json"
        self.failure_file = self.path / "failed.txt"
        """The traceback, if the run failed while reproducing a table."""
        self.checkpoint_files = (self.path / "checkpoint.pt", self.path / "checkpoint-before.pt")
        """The last checkpoint and the one before it."""

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a file of the run; raises as ``write_atomic`` does."""
        write_atomic(self.path / name, content)

    def verify(self, digests: Mapping[str, str]) -> None:
        """Raises UsageError unless each file, by name, still has the SHA-256 digest that it was written with."""
        for name, digest in digests.items():
            file = self.path / name
            if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                problem = "was modified" if file.exists() else "is missing"
                raise UsageError(f"{file} {problem}; delete {self.path} and run the same command to train again")

    def load_record(self) -> Record | None:
        """Loads the record of the finished run; None if there is none.

        Raises:
            UsageError: if the record is unreadable, has a newer format or belongs to another configuration.
        """
        if not self.record_file.exists():
            return None
        try:
            record = read_record(self.record_file)
        except UsageError as error:
            raise UsageError(f"{error}; move it away to run this configuration") from error
        if record.config != self.identity:
            raise UsageError(f"{self.record_file} belongs to another configuration; move it away to run this one")
        return record

    def write_record(self, record: Record) -> None:
        self.write(self.record_file.name, json.dumps(record.to_dict(), indent=1) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and locks it for this process; a process that dies releases its lock.

        Raises:
            BusyError: if another process holds the lock.
            UsageError: if the folder cannot be created.
        """
        holder_file, lock = self.path / "worker", FileLock(self.path / "lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            holder_file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            for leftover in self.path.glob(f"{UNFINISHED}*"):  # of a process that was killed while writing
                leftover.unlink()
        except Timeout as error:
            holder = holder_file.read_text() if holder_file.exists() else "another process"
            raise BusyError(f"{self.path} is in use by {holder}; wait for it or stop it") from error
        except OSError as error:
            raise UsageError(f"cannot use {self.path}: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        """Whether a process is working on the run."""
        if not (self.path / "lock").exists():
            return False
        try:
            with FileLock(self.path / "lock", timeout=0):
                return False
        except Timeout:
            return True

    def set_aside(self) -> None:
        """Moves the files of an earlier run into a subfolder ``superseded-<n>``; needs the lock."""
        suffixes = [path.name.removeprefix("superseded-") for path in self.path.glob("superseded-*")]
        numbers = [int(suffix) for suffix in suffixes if suffix.isdecimal()]
        target = self.path / f"superseded-{1 + max(numbers, default=0)}"
        target.mkdir()
        for file in self.path.iterdir():
            if file.name not in ("lock", "worker") and not file.name.startswith("superseded-"):
                file.rename(target / file.name)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint of tensors and plain values with its checksum, and keeps the previous one."""
        content = serialize(state)
        last, previous = self.checkpoint_files
        if last.exists():
            last.replace(previous)
        write_atomic(last, hashlib.sha256(content).digest() + content)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Loads the last intact checkpoint onto the CPU; None if there is none. Reports a damaged one on stderr.

        Raises:
            UsageError: if the checkpoint belongs to another configuration.
        """
        last, previous = self.checkpoint_files
        for file in self.checkpoint_files:
            if not file.exists():
                continue
            content = file.read_bytes()
            if hashlib.sha256(content[32:]).digest() != content[:32]:
                has_previous = file == last and previous.exists()
                remedy = "trying the checkpoint before it" if has_previous else "training starts again"
                print(f"{file} is damaged; {remedy}", file=sys.stderr)
                continue
            state: dict[str, Any] = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
            if state["config"] != self.identity:
                raise UsageError(f"{file} belongs to another configuration; move it away to run this one")
            return state
        return None

    def delete_checkpoints(self) -> None:
        for file in self.checkpoint_files:
            file.unlink(missing_ok=True)
