"""The settings of a table."""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import field
from typing import Any, NotRequired

from typing_extensions import TypedDict

from training.config import compose, get_key, resolve
from training.errors import UsageError
from training.validation import Seed, construct, strict_dataclass


class RowSettings(TypedDict):
    name: str
    overrides: list[str]
    against: NotRequired[str | None]


class Search(TypedDict):
    seed: Seed
    candidates: list[list[str]]


@strict_dataclass
class TableSettings:
    """The contents of ``configs/table/<name>.yaml``.

    Raises:
        UsageError: if nothing is left to run, if a name or a seed is repeated, for the name of a row that does not
            exist, or if an override sets the seed.
    """

    title: str
    rows: list[RowSettings]
    overrides: list[str]
    """Overrides for every run."""
    seeds: list[Seed]
    search: Search | None = None
    """Candidate hyperparameters, tried for every row with one seed; None: the hyperparameters are fixed."""
    without: list[str] = field(default_factory=list)
    """Names of rows to leave out."""
    also_against: str | None = None
    """The name of a row; adds a second column of differences, from this row."""
    plain: str | None = None
    """The name of the row that measurements of robustness compare all rows with."""
    backbone: str | None = None
    """Used by interpolations in the overrides."""

    @property
    def candidates(self) -> list[list[str]]:
        return [] if self.search is None else self.search["candidates"]

    @property
    def kept_rows(self) -> list[RowSettings]:
        return [row for row in self.rows if row["name"] not in self.without]

    @property
    def references(self) -> dict[str, str]:
        """The row that each row is compared with."""
        return {row["name"]: row.get("against") or self.kept_rows[0]["name"] for row in self.kept_rows}

    def __post_init__(self) -> None:
        _check_values("rows", [row["name"] for row in self.rows])
        _check_values("seeds", self.seeds)
        if self.search is not None and not self.candidates:
            raise UsageError("table.search.candidates=[] is invalid: list at least one, or set table.search=null")
        names = [row["name"] for row in self.rows]
        for name in self.without:
            if name not in names:
                raise UsageError(f"table.without has '{name}', which is not a row of this table; its rows: {names}")
        kept_names = [row["name"] for row in self.kept_rows]
        if not kept_names:
            raise UsageError(f"table.without={self.without} leaves no row")
        for row in self.kept_rows:
            if self.references[row["name"]] not in kept_names:
                raise UsageError(
                    f"row '{row['name']}' is compared with '{row.get('against')}', which is not a row of this table"
                )
        if self.also_against not in (None, *kept_names):
            raise UsageError(f"also_against '{self.also_against}' is not a row of this table")
        groups = [self.overrides, *(row["overrides"] for row in self.rows), *self.candidates]
        if override := next((word for words in groups for word in words if is_seed(word)), None):
            raise UsageError(f"the table's override {override} has no effect; list the seeds in table.seeds")


@functools.cache
def load_table_settings(table: str) -> TableSettings:
    """Loads the settings of a table of configs/table."""
    return construct(TableSettings, resolve(compose([f"table={table}"], "reproduce_table"))["table"], "table")


def find_plain_row(table: str) -> str:
    """The plain row of a table of configs/table. Raises UsageError if it names none of its rows."""
    settings = load_table_settings(table)
    if settings.plain not in (names := [row["name"] for row in settings.rows]):
        raise UsageError(
            f"configs/table/{table}.yaml has plain={settings.plain}, which should be one of its rows: {names}"
        )
    return settings.plain


def is_seed(override: str) -> bool:
    """Whether an override such as ``seed=3`` sets the seed of a run."""
    return get_key(override) == "seed"


def _check_values(key: str, values: Iterable[Any]) -> None:
    counts = Counter(values)
    if not counts:
        raise UsageError(f"table.{key}=[] is invalid: list at least one")
    value, count = counts.most_common(1)[0]
    if count > 1:
        raise UsageError(f"table.{key} has '{value}' {count} times; list it once")
