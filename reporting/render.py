"""Renders tables as Markdown, as LaTeX and as figures; draws confusion matrices."""

import math
import re
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from reporting.rows import DIFFERENCE, Row, list_references, summarize
from training.record import Machine, Record

NUM_FIRST_COLUMNS = 5
"""Columns before those of differences."""
SPLIT_NAMES = {"test": "test", "val": "validation"}


def format_cells(rows: Sequence[Row], also_against: str | None) -> pd.DataFrame:
    """Formats what a table shows: a line per row and a named column of text per column; arguments as below."""
    comparisons = [summarize(rows), *([summarize(rows, also_against)] if also_against else [])]
    references = [frame["reference"].tolist() for frame in comparisons]
    lines = []
    for i, line in enumerate(comparisons[0].itertuples()):
        top1 = f"{line.top1_mean:.2f}" + ("" if math.isnan(line.top1_std) else f" ± {line.top1_std:.2f}")
        differences = [
            "" if line.row == names[i] else format_interval(*frame.loc[i, DIFFERENCE])
            for names, frame in zip(references, comparisons, strict=True)
        ]
        counts = [record.parameters.conv for record in rows[i].records]  # auto chooses other kernels for every seed
        conv_params = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
        ratio = "" if math.isnan(line.conv_ratio) else f"{line.conv_ratio:.2f}"
        lines.append([line.row, line.arrangement, conv_params, ratio, top1, *differences])
    headings = [_title_difference(names) for names in references]
    arrangements = dict(zip(comparisons[0]["row"], comparisons[0]["arrangement"], strict=True))
    is_plain = all(arrangements[name] == "plain" for name in references[0])
    ratio_heading, accuracy = f"{'plain' if is_plain else 'reference'} / row", f"top-1 {SPLIT_NAMES[rows[0].split]} %"
    return pd.DataFrame(lines, columns=["row", "arrangement", "conv. parameters", ratio_heading, accuracy, *headings])


def _title_difference(references: Sequence[str]) -> str:
    """Names differences of a table's rows, given what each is compared with."""
    return f"points against {references[0] if len(set(references)) == 1 else 'the reference of the row'}"


def render_markdown(
    title: str, rows: Sequence[Row], also_against: str | None, search: str | None, commands: dict[str, list[str]]
) -> str:
    """Renders a table in Markdown, with the details of how it was produced.

    Args:
        title: the table's title.
        rows: the rows, with their records and chosen hyperparameters.
        also_against: the name of a row; adds a second column of differences, from this row.
        search: a sentence on how hyperparameters were chosen; None if they are fixed.
        commands: maps each row's name to the overrides of the command that reruns it.
    """
    cells = format_cells(rows, also_against)
    lines = [
        f"# {title}",
        "",
        f"| {' | '.join(cells.columns)} |",
        "|---|---|---:|---:|---:|" + "---:|" * (len(cells.columns) - NUM_FIRST_COLUMNS),
        *(f"| {' | '.join(line)} |" for line in cells.itertuples(index=False)),
    ]
    lines += ["", describe_statistics(rows, also_against), ""]
    if search is not None:
        lines += [search, "", "| row | chosen |", "|---|---|"]
        lines += [f"| {row.name} | {' '.join(f'`{word}`' for word in row.chosen or [])} |" for row in rows]
        lines.append("")
    lines += ["To rerun one seed of a row:", "", "```sh"]
    for row in rows:
        lines += [f"# {row.name}", shlex.join([".venv/bin/python", "scripts/train.py", *commands[row.name]])]
    lines += ["```", "", describe_runs([record for row in rows for record in row.records])]
    return "\n".join(lines) + "\n"


def render_latex(title: str, rows: Sequence[Row], also_against: str | None) -> str:
    r"""Renders the same table as a tabular in LaTeX, for ``\input``; needs the package booktabs. Arguments as above."""
    cells = format_cells(rows, also_against)
    measured = cells.columns[NUM_FIRST_COLUMNS - 1 :]
    text = cells.columns.difference(measured)
    tabular = (
        cells.style.hide(axis="index")
        .format(escape="latex", subset=list(text))
        .format(_to_math, subset=list(measured))
        .format_index(escape="latex", axis="columns")
        .to_latex(hrules=True, column_format="ll" + "r" * (len(cells.columns) - 2))
    )
    notes = [
        f"{title}. Written by scripts/reproduce_table.py; needs \\usepackage{{booktabs}}.",
        describe_statistics(rows, also_against),
        describe_runs([record for row in rows for record in row.records]),
    ]
    return "".join(f"% {' '.join(note.split())}\n" for note in notes) + tabular


def _to_math(cell: str) -> str:
    math_text = cell.replace("±", r"\pm").replace(" [", r"\ [")
    return f"${math_text}$" if cell else ""


def format_interval(mean: float, low: float, high: float, number: str = "+.2f") -> str:
    """Formats a mean, with its interval if there is one."""
    return f"{mean:{number}}" + ("" if math.isnan(low) else f" [{low:{number}}, {high:{number}}]")


def describe_statistics(rows: Sequence[Row], also_against: str | None) -> str:
    """Says what the numbers of a table mean; arguments as for ``render_markdown``."""
    test_use = {
        "test": "the test set is evaluated once, at the end of a run",
        "val": "the accuracy is of that epoch, on the same split; the test set is not used",
    }
    intervals = _describe_intervals(summarize(rows))
    if also_against and (others := _describe_intervals(summarize(rows, also_against))) != intervals:
        intervals += f"; those against *{also_against}*, {others}"
    return (
        f"Mean ± standard deviation over {_count_seeds(len(rows[0].records))}; differences are paired by seed, "
        f"{intervals}. The epoch is chosen on the validation split; {test_use[rows[0].split]}. "
        f"Convolution parameters include biases and frozen AKPs.{_describe_references(rows)}"
    )


def _describe_intervals(frame: pd.DataFrame) -> str:
    """Says what the intervals of the differences in ``summarize`` cover, and which share the variance over seeds."""
    compared = frame[(frame["interval_over"] != "") & (frame["seeds"] > 1)]
    if compared.empty:
        return "without intervals"
    has_images, is_shared = (compared["interval_over"].str.contains(word) for word in ("images", "shared"))
    sources = "seeds and images" if has_images.any() else "seeds alone"
    if has_images.any() and not has_images.all():
        sources += f" (seeds alone for {_list_names(compared['row'][~has_images])})"
    if is_shared.any():
        sources += ". The variance over seeds is the residual mean square of all similar rows with the same reference"
        if not is_shared.all():
            sources += f" (for {_list_names(compared['row'][~is_shared])}: of the two rows alone)"
    return f"with 95% t-intervals over {sources}"


def _list_names(names: Iterable[str]) -> str:
    return ", ".join(f"*{name}*" for name in names)


def _count_seeds(n: int) -> str:
    return f"{n} {'seed' if n == 1 else 'seeds'}"


def _describe_references(rows: Sequence[Row]) -> str:
    """Says which rows are compared with which, if not all with the same."""
    names_by_reference: dict[str, list[str]] = {}
    for name, reference in list_references(rows).items():
        if name != reference:
            names_by_reference.setdefault(reference, []).append(name)
    if len(names_by_reference) < 2:
        return ""
    parts = [f"*{reference}* for {_list_names(names)}" for reference, names in names_by_reference.items()]
    return f" References: {'; '.join(parts)}."


def describe_runs(records: Sequence[Record]) -> str:
    """Lists epochs, time, machines, commits and versions of the runs behind a table, in one line."""
    machines = sorted({describe_machine(r.machine) for r in records})
    commits = sorted({re.sub("^([0-9a-f]{12})[0-9a-f]*", r"\1", r.commit or "none") for r in records})
    numbers = {name: sorted({r.versions[name] for r in records if name in r.versions}) for name in records[0].versions}
    versions = ", ".join(f"{name} {' or '.join(values)}" for name, values in numbers.items())
    *fewer, most = map(str, sorted({r.epochs for r in records}))
    epochs = f"{', '.join(fewer)} or {most}" if fewer else most
    minutes = round(sum(r.seconds for r in records) / 60)
    return (
        f"{epochs} epochs per run; {minutes} {'minute' if minutes == 1 else 'minutes'} "
        f"for these runs on {'; '.join(machines)}; commit {', '.join(commits)}; {versions}."
    )


def describe_machine(machine: Machine) -> str:
    """Names a machine and its threads."""
    return f"{machine.device}, {machine.threads} {'thread' if machine.threads == 1 else 'threads'}"


def draw_table(frame: pd.DataFrame, title: str, split: str) -> Figure:
    """Draws the differences of a table's rows from their references.

    If rows differ from them in convolution parameters, it also draws errors against parameters.

    Args:
        frame: the result of ``summarize``.
        title: the table's title.
        split: the split that the accuracy is of, ``test`` or ``val``.
    """
    has_sizes = bool(((frame["conv_ratio"] - 1).abs() > 0.05).any())
    figure = Figure(figsize=(10 if has_sizes else 6, max(3.2, 0.3 * len(frame) + 1.6)), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(6, 5)) if has_sizes else [figure.subplots()]
    means = frame["diff_mean"]  # an interval is NaN for a single seed
    errors = [(means - frame["diff_ci95_low"]).fillna(0.0), (frame["diff_ci95_high"] - means).fillna(0.0)]
    deviations = frame["top1_std"].fillna(0.0)
    for i, line in enumerate(frame.itertuples()):
        style: dict[str, Any] = {"marker": "osD^vP*X"[i % 8], "color": f"C{i}", "markersize": 5, "capsize": 3}
        panels[0].errorbar(line.diff_mean, -i, xerr=[[error[i]] for error in errors], **style)
        if has_sizes:
            panels[1].errorbar(line.conv_params, 100 - line.top1_mean, yerr=deviations[i], **style)
    panels[0].set_yticks([-i for i in range(len(frame))], [textwrap.fill(row, 32) for row in frame["row"]], fontsize=8)
    panels[0].axvline(0.0, color="black", linewidth=0.8)
    label = f"{_title_difference(frame['reference'].tolist())} (95% interval)"
    if means.abs().max() > 5 * max(means.abs().median(), 1.0):  # a row far off would leave no room for the others
        low, high = (means - errors[0]).min(), (means + errors[1]).max()
        ticks = [tick for tick in (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50) if low <= tick <= max(high, 1.0)]
        panels[0].set_xscale("symlog", linthresh=1.0)
        panels[0].set_xlim(1.3 * low, max(1.3 * high, 1.0))
        panels[0].set_xticks(ticks, map(str, ticks))
        panels[0].tick_params(axis="x", which="minor", bottom=False)
        label += "\nlinear up to 1"
    else:
        panels[0].xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10)))
    panels[0].set_xlabel(label, fontsize=9)
    if has_sizes:
        _label_sizes(panels[1], frame, f"{SPLIT_NAMES[split]} error % (mean ± std)")
    for axes in panels:
        axes.grid(alpha=0.3)
    seeds = _count_seeds(frame["seeds"].max()).replace(" ", "\u00a0")  # no line break after the number
    figure.suptitle(textwrap.fill(f"{title}, {seeds}", 100 if has_sizes else 60), fontsize=11)
    return figure


def _label_sizes(axes: Axes, frame: pd.DataFrame, error: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(max(frame["conv_params"].min(), 1) / 1.5, max(frame["conv_params"].max(), 1) * 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        few = MaxNLocator(4, steps=(1, 2, 5, 10))  # LogLocator has too many ticks, or one, within a third of a decade
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 3 * low else few)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("convolution parameters")
    axes.set_ylabel(error, fontsize=9)


def draw_confusions(frame: pd.DataFrame, title: str) -> Figure:
    """Draws a confusion matrix as shares of each class.

    Args:
        frame: a line per class: its accuracy in percent, its images, and how many were predicted to be of each class.
        title: of the figure.
    """
    counts = frame.iloc[:, 2:].to_numpy()
    side = max(4.0, 0.25 * len(frame) + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the class", shrink=0.8)
    if len(frame) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j, i, count, ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 50 else "black"
                )
    accuracies = ["no images" if math.isnan(accuracy) else f"{accuracy:.0f}%" for accuracy in frame.iloc[:, 0]]
    labels = [f"{name} ({accuracy})" for name, accuracy in zip(frame.index, accuracies, strict=True)]
    axes.set_yticks(range(len(frame)), labels, fontsize=7)
    axes.set_xticks(range(len(frame)), frame.index, fontsize=7, rotation=90)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class (accuracy)")
    axes.set_title(title, fontsize=10)
    return figure
