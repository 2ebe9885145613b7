"""Files with an object of JSON in each line."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from training.errors import UsageError
from training.record import parse_json

T = TypeVar("T")


def to_json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


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
