"""Files with an object of JSON in each line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.errors import UsageError


def to_json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_json_lines(file: Path, keys: set[str], description: str) -> list[dict[str, Any]]:
    """Reads a file of objects that have at least ``keys``; errors call them ``description``.

    Raises:
        UsageError: if the file cannot be read or has no lines, or for the first line that is not JSON or lacks a key.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{file}, line {number}, is not JSON: {error}") from error
        if not isinstance(value, dict) or not keys <= value.keys():
            raise UsageError(f"{file}, line {number}, is not {description}: it needs {', '.join(sorted(keys))}")
        values.append(value)
    if not values:
        raise UsageError(f"{file} is empty")
    return values
