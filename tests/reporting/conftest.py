import pytest

import reporting.table


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes tables without their figures, which take most of the time of writing."""
    for name in ("draw_table", "to_png", "to_pdf"):
        monkeypatch.setattr(reporting.table, name, lambda *_: b"")
