"""The record of a finished run: its schema, and how it is read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from typing_extensions import TypedDict

from training.config import flatten
from training.errors import UsageError
from training.files import parse_json, read_bytes
from training.validation import Seed

RECORD_FORMAT = 1
Percent = Annotated[float, Field(ge=0, le=100)]


class Recorded(BaseModel):
    """An object of a file of results. Keys that this version does not know are kept."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    def to_dict(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """The values as they were read or given, without the optional ones that were not."""
        return self.model_dump(exclude_unset=True, exclude=exclude)


class Result(Recorded):
    """The result of a network on one split."""

    top1: Percent
    loss: float = Field(ge=0)


class NumParameters(Recorded):
    conv: int = Field(ge=0)
    total: int = Field(ge=0)


class Machine(Recorded):
    device: str
    threads: int = Field(ge=1)


class _RecordedTrainer(TypedDict):
    epochs: Annotated[int, Field(ge=1)]
    test: NotRequired[bool]


class _RecordedConfig(TypedDict):
    seed: Seed
    model: dict[str, Any]
    arrangement: dict[str, Any]
    trainer: _RecordedTrainer


def _keep(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Checks a value and keeps it as it is, with all of its keys in their order."""
    check(value)
    return value


class Record(Recorded):
    """The record of a finished run. Raises UsageError for values that contradict each other."""

    row: str | None = None
    """The row of the table whose records it is among."""
    format: int = Field(ge=1, le=RECORD_FORMAT)
    id: str
    config: Annotated[_RecordedConfig, WrapValidator(_keep)]
    """The part of the run's configuration that determines its result; the id is its hash."""
    test: Result | None
    """None: the run does not evaluate the test set."""
    val: Result
    best_epoch: int = Field(ge=1)
    parameters: NumParameters
    random_layers: list[str] | None = None
    seconds: float = Field(ge=0)
    commit: str | None
    sources: str | None = None
    """The digest of the code; None if other code resumed the run. This and the following are None in records of code
    that did not store them."""
    machine: Machine
    versions: dict[str, str]
    weights: str | None = None
    """The digest of model.safetensors."""
    classes: list[str] | None = None
    data: dict[str, str | int] | None = None
    """The digest of the data, and the number of images per split."""
    pretrained: str | None = None
    """The digest of the file of pretrained weights."""
    correct: dict[str, str | None] | None = None
    """Which images of a split were classified correctly, as packed bits in base64."""

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def epochs(self) -> int:
        return self.config["trainer"]["epochs"]

    @property
    def results(self) -> dict[str, Result]:
        """The results by split, without those that the run does not have."""
        return {"val": self.val} | ({} if self.test is None else {"test": self.test})

    @model_validator(mode="after")
    def _check_consistency(self) -> "Record":
        expected_id = compute_run_id(self.config)
        has_test, conv, total = self.test is not None, self.parameters.conv, self.parameters.total
        for is_consistent, message in (
            (self.id == expected_id, f"id={self.id} is not the hash of its config, {expected_id}"),
            (self.best_epoch <= self.epochs, f"best_epoch={self.best_epoch} exceeds its {self.epochs} epochs"),
            (conv <= total, f"parameters.conv={conv} exceeds parameters.total={total}"),
            (self.config["trainer"].get("test", has_test) == has_test, "test contradicts config.trainer.test"),
        ):
            if not is_consistent:
                raise UsageError(message)
        return self


def compute_run_id(identity: Mapping[str, Any]) -> str:
    """12 hexadecimal digits: a hash of the part of a configuration that determines a run's result."""
    text = json.dumps(identity, sort_keys=True)
    layers = list(flatten(identity.get("arrangement", {})))
    if layers != sorted(layers):  # a later rule overrides an earlier one, and AKPs are sampled in this order
        text += json.dumps(layers)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_record(file: Path) -> Record:
    """Reads the record of a finished run. Raises UsageError if the file is unreadable or not a record."""
    return parse_json(read_bytes(file), Record, "a record of a run", str(file))
