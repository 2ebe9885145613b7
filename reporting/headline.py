"""The first table of README.md: what became analytic, how many parameters that saved, and what it cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

import models
from acl import analytic_layers
from reporting.effects import Effect, compare_rows
from reporting.render import format_interval
from reporting.rows import mean_num_parameters, read_results
from reporting.settings import load_table_settings
from training.errors import UsageError
from training.record import Record

_COLUMNS = ("network", "data", "analytic", "parameters there", "times fewer", "accuracy, in points", "verdict")


class HeadlineRow(TypedDict):
    """A row of a table of configs/table, as the headline words it; it is compared as that table compares it."""

    table: str
    row: str
    network: str
    data: str
    analytic: str


def render_headline(rows: Sequence[HeadlineRow], results: Path) -> str:
    """Renders the rows whose tables have records, in Markdown.

    Args:
        rows: the rows in order.
        results: the folder with ``tables/``.

    Raises:
        UsageError: for a row that its table does not have.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---:|---:|---:|---|"]
    for row in rows:
        file = results / "tables" / f"{row['table']}.jsonl"
        if not file.exists():
            continue
        records = read_results(file)
        reference = load_table_settings(row["table"]).references.get(row["row"], "")
        effect = compare_rows(row["table"], row["row"], reference, records)
        if effect is None:
            raise UsageError(f"the headline names the row '{row['row']}', which {file} does not have")
        before, after = ([record for record in records if record.row == name] for name in (reference, row["row"]))
        lines.append(_format_row(row, effect, before, after))
    return "\n".join(lines) + "\n"


def _format_row(row: HeadlineRow, effect: Effect, before: Sequence[Record], after: Sequence[Record]) -> str:
    num_before = _count_replaced_weights(after[0], before[0].parameters.conv)
    num_after = num_before - mean_num_parameters(before) + mean_num_parameters(after)
    interval = effect.interval
    cells = (
        row["network"],
        row["data"],
        row["analytic"],
        f"{num_before:,} → {num_after:,.0f}",
        f"{num_before / num_after:.1f}",
        format_interval(interval.mean, interval.low, interval.high, "+.2f"),
        effect.verdict,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _count_replaced_weights(record: Record, num_plain: int) -> int:
    """The weights of a plain network's convolutions that are analytic in a run.

    Args:
        record: of the run.
        num_plain: the parameters of the plain network's convolutions.
    """
    config: Mapping[str, Any] = record.config
    options = {name: value for name, value in config["model"].items() if name in ("kernel_size", "width")}
    backbone, names = config["model"]["backbone"], [name for name, text in config["arrangement"].items() if text]
    num_classes = len(record.classes) if record.classes else 2  # SqueezeNet's classifier is a convolution
    for channels in (1, 3):
        try:
            plain = models.create_model(backbone, channels, num_classes, {}, **options)
        except ValueError:  # most networks take images of three channels only
            continue
        if models.count_parameters(plain)[0] == num_plain:
            model = models.create_model(backbone, channels, num_classes, dict.fromkeys(names, "P100%"), {}, **options)
            return sum(layer.weight.numel() for layer in analytic_layers(model).values())
    raise UsageError(f"run {record.id}: its {backbone} does not have {num_plain:,} convolution parameters")
