from typing import Any

import pytest

from reporting import settings
from reporting.settings import find_plain_row
from tests.reporting.helpers import load_settings
from training.errors import UsageError

ROW = {"name": "a", "overrides": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, r"^table\.rows=\[\] is invalid: list at least one$"),
        ({"seeds": []}, r"^table\.seeds=\[\] is invalid: list at least one$"),
        ({"rows": [ROW, ROW]}, r"^table\.rows has 'a' 2 times; list it once$"),
        ({"seeds": [0, 1, 0]}, r"^table\.seeds has '0' 2 times; list it once$"),
        (
            {"without": ["nix"]},
            r"^table\.without has 'nix', which is not a row of this table; its rows: \['LeNet-5 plain'",
        ),
        ({"rows": [ROW], "without": ["a"]}, r"^table\.without=\['a'\] leaves no row$"),
        (
            {"search": {"seed": 0, "candidates": []}},
            r"^table\.search\.candidates=\[\] is invalid: .*table\.search=null$",
        ),
        ({"overrides": ["seed=3"]}, r"^the table's override seed=3 has no effect; list the seeds in table\.seeds$"),
        ({"rows": [{"name": "a", "overrides": ["seed=3"]}]}, "override seed=3 has no effect"),
        ({"search": {"seed": 0, "candidates": [["optim.lr=0.1", "++seed=3"]]}}, r"override \+\+seed=3 has no effect"),
    ],
)
def test_invalid_settings_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_settings("digits", **changes)


@pytest.mark.parametrize("plain", [None, "nix"])
def test_plain_row_is_one_of_the_rows(monkeypatch: pytest.MonkeyPatch, plain: str | None) -> None:
    assert find_plain_row("digits") == "LeNet-5 plain"
    monkeypatch.setattr(settings, "load_table_settings", lambda table: load_settings(table, plain=plain))
    with pytest.raises(UsageError, match=rf"^configs/table/digits\.yaml has plain={plain}, which should be one of its"):
        find_plain_row("digits")
