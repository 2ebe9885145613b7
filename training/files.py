"""Files that are written atomically, and files of JSON."""

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from training.errors import UsageError
from training.validation import construct

T = TypeVar("T")
UNFINISHED = ".unfinished-"
"""Prefix of files that are being written."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes one file; see ``write_together``."""
    write_together({path: content})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Writes temporary files next to all files, then moves them into place.

    Symbolic links stay, and devices and pipes are written to directly.

    Raises:
        UsageError: if the disk is full or a folder is not writable; existing files are untouched.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path
            if path.is_file() or not path.exists():
                real = Path(os.path.realpath(path))
                target = temporaries[real] = real.with_name(
                    f"{UNFINISHED}{socket.gethostname()}-{os.getpid()}-{real.name}"
                )
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except OSError as error:
        for temporary in temporaries.values():
            with suppress(OSError):  # not there, or on a read-only file system
                temporary.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def read_bytes(file: Path) -> bytes:
    """Reads a file. Raises UsageError if it is unreadable."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error


def parse_json(content: bytes, factory: Callable[..., T], description: str, source: str) -> T:
    """Parses an object of JSON with ``construct``; errors say that ``source`` is not ``description``.

    Raises:
        UsageError: if the content is not such an object.
    """
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise UsageError("it is not a JSON object")
        return construct(factory, values)
    except (ValueError, RecursionError, UsageError) as error:
        raise UsageError(f"{source} is not {description}: {error}") from error


def to_json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_json_lines(file: Path, factory: Callable[..., T], description: str, name: Callable[[T], str]) -> list[T]:
    """Reads the objects of a file. Raises UsageError as ``parse_json_lines`` does."""
    return parse_json_lines(read_bytes(file), file, factory, description, name)


def parse_json_lines(
    content: bytes, file: Path, factory: Callable[..., T], description: str, name: Callable[[T], str]
) -> list[T]:
    """Parses the objects of a file, as ``parse_json`` does; ``name`` tells them from each other.

    Raises:
        UsageError: for a file without lines, and the first line that is invalid or repeats the name of another.
    """
    values: list[T] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        value = parse_json(line, factory, description, f"{file}, line {number},")
        if (first := lines.setdefault(name(value), number)) != number:
            raise UsageError(f"{file}, line {number}, repeats line {first}: {name(value)}; delete one of them")
        values.append(value)
    if not values:
        raise UsageError(f"{file} is empty")
    return values
