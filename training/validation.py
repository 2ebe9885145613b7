"""Turns sections of a configuration into validated objects; invalid values become one-line errors."""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic.dataclasses import dataclass as validated_dataclass
from pydantic_core import ArgsKwargs

from training.errors import UsageError

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
"""For pydantic dataclasses and ``validate_call``: no type conversion, no unknown options, only finite numbers."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, field))
def strict_dataclass(cls: type[T]) -> type[T]:
    """A class decorator for settings: frozen fields, given by keyword, that are validated as ``STRICT`` says."""
    decorate: Any = validated_dataclass(frozen=True, kw_only=True, config=STRICT)
    validated: type[T] = decorate(cls)
    return validated


def _check_is_path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise ValueError("should be the path of a file or folder")
    return os.path.expanduser(value)  # noqa: PTH111 - Path.expanduser raises RuntimeError for an unknown user


def _check_is_no_folder(path: Path) -> Path:
    if path.is_dir():
        raise ValueError("is a folder; it should be the path of a file")
    return path


def is_file_of_run(path: Path) -> bool:
    """Whether a path is that of a file that a finished run cannot do without."""
    return path.name in RUN_FILES and (path.parent / "record.json").exists()


def _check_is_no_file_of_run(path: Path) -> Path:
    if is_file_of_run(path):
        raise ValueError("is a file of a run, which would be lost; it should be another path")
    return path


RUN_FILES = ("record.json", "config.yaml", "metrics.csv", "model.safetensors", "akps.safetensors", "optimizer.pt")
Count = Annotated[int, Field(ge=1, lt=2**31)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_check_is_path)]  # given as a string
OutputFile = Annotated[FilePath, AfterValidator(_check_is_no_folder), AfterValidator(_check_is_no_file_of_run)]


def construct(factory: Callable[..., T], options: Mapping[str, Any], section: str = "") -> T:
    """Calls a validating factory with the options of a configuration section.

    Raises:
        UsageError: for an unknown, missing or invalid option; the message names its key, its value and what is valid.
    """
    try:
        return factory(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        path = _locate(problem["loc"], options)
        key = ".".join(map(str, [*filter(None, [section]), *path]))
        value = format_value(problem["input"])
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            message = f"unknown option {key}={value}"
        elif problem["type"].startswith("missing"):
            message = f"{key} is missing"
        elif not path and isinstance(problem["input"], ArgsKwargs):  # options that are valid one by one
            message = f"{key}: {problem['msg'].removeprefix('Value error, ')}"
        else:
            # One problem for each type that the option accepts.
            same_key = [other for other in error.errors() if _locate(other["loc"], options) == path]
            reasons = [other["msg"].removeprefix("Input ").removeprefix("Value error, ") for other in same_key]
            message = (
                f"{key}={value} is invalid: it {' or '.join(dict.fromkeys(reasons)).replace(' or should be ', ' or ')}"
            )
        raise UsageError(message) from error


def _locate(location: tuple[int | str, ...], options: Mapping[str, Any]) -> list[int | str]:
    """The keys and indices of an invalid value: pydantic's location without the names of alternative types."""
    path: list[int | str] = []
    value: Any = options
    for part in location:
        if isinstance(value, Mapping) or isinstance(part, int):
            path.append(part)
            value = value.get(part) if isinstance(value, Mapping) else value
    return path


def check_arguments(function: Callable[..., object], options: Mapping[str, Any], section: str) -> None:
    """Validates options against the annotated keyword parameters of a function, without calling it.

    Raises:
        UsageError: as ``construct`` does.
    """
    fields: dict[str, Any] = {
        parameter.name: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    }
    construct(create_model("Options", __config__=STRICT, **fields), options, section)


def format_value(value: object) -> str:
    """Formats a value as on the command line, in one line; text that looks like another type is in quotes."""
    text = " ".join(str(value).split())
    if not isinstance(value, str):
        return {"None": "null", "True": "true", "False": "false"}.get(text, text)
    if text.lower() not in ("", "null", "true", "false"):
        try:
            float(text)
        except ValueError:
            return text
    return f"'{text}'"
