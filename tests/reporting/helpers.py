"""Artificial records, and small tables of real runs."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import reporting.table
from reporting.settings import TableSettings
from reporting.table import Table
from training.config import compose, resolve
from training.record import Record, compute_run_id
from training.validation import construct


def make_record(
    seed: int, top1: float, conv: int = 100, config: dict[str, Any] | None = None, **changes: Any
) -> Record:
    """A run's record, with its validation result and its losses set to constants."""
    full_config = {"seed": seed, "model": {}, "arrangement": {}, "trainer": {"epochs": 3}, **(config or {})}
    values = {
        "format": 1,
        "id": compute_run_id(full_config),
        "config": full_config,
        "test": {"top1": top1, "loss": 0.5},
        "val": {"top1": 90.0, "loss": 0.5},
        "best_epoch": 3,
        "parameters": {"conv": conv, "total": 2 * conv},
        "seconds": 90.0,
        "commit": None,
        "machine": {"device": "CPU", "threads": 2},
        "versions": {"torch": "2.6"},
    }
    return construct(Record, {**values, **changes})


@cache
def _compose_table(name: str) -> dict[str, Any]:
    return resolve(compose([f"table={name}"], "reproduce_table"))["table"]


def load_settings(name: str, **changes: Any) -> TableSettings:
    """The settings of configs/table/<name>.yaml, with some of them replaced."""
    return construct(TableSettings, {**deepcopy(_compose_table(name)), **changes})


def create_table(folder: Path, *overrides: str, **changes: Any) -> Table:
    """The first two rows of the table ``digits``, with two seeds and one epoch; it writes only to ``folder``."""
    rows = load_settings("digits").rows[:2]
    settings = load_settings("digits", **{"rows": rows, "seeds": [0, 1], **changes})
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
    return Table("digits", settings, [*paths, "trainer.epochs=1", *overrides])


def forbid_calls(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes these functions of reporting.table raise an AssertionError."""

    def forbid(name: str) -> None:
        def fail(*_: Any) -> None:
            raise AssertionError(f"{name} must not be called")

        patch.setattr(reporting.table, name, fail)

    for name in names:
        forbid(name)
