"""Turns sections of a configuration into validated objects; invalid values become one-line errors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from training.errors import UsageError

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
"""For pydantic dataclasses and ``validate_call``: no type conversion, no unknown options, only finite numbers."""
Count = Annotated[int, Field(ge=1)]
FilePath = Annotated[Path, Field(strict=False)]  # given as a string


def construct(factory: Callable[..., T], options: Mapping[str, Any], section: str = "") -> T:
    """Calls a validating factory with the options of a configuration section.

    Raises:
        UsageError: for an unknown, missing or invalid option; the message names its key, its value and what is valid.
    """
    try:
        return factory(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, [*filter(None, [section]), *problem["loc"]]))
        value = format_value(problem["input"])
        if problem["type"].startswith("unexpected"):
            message = f"unknown option {key}={value}"
        elif problem["type"].startswith("missing"):
            message = f"{key} is missing"
        else:
            message = f"{key}={value} is invalid: it {problem['msg'].removeprefix('Input ')}"
        raise UsageError(message) from error


def format_value(value: object) -> str:
    """Formats a value as on the command line, in one line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), " ".join(str(value).split()))
