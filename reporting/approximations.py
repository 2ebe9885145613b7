"""The records of ``scripts/compare_approximations.py``, and their figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field

from reporting.statistics import interval_of_mean
from training.errors import UsageError
from training.files import read_json_lines
from training.record import Recorded

Correct = list[Annotated[int, Field(ge=0, le=1)]]


class Approximation(Recorded):
    """A line of ``scripts/compare_approximations.py``; its lists have an entry per test image."""

    method: str
    numbers: int
    numbers_per_kernel: float
    overrides: list[str]
    layer: str
    output_error_percent: list[Annotated[float, Field(ge=0)]]
    probe_correct: list[bool] | None = None
    refitted_probe_correct: list[bool] | None = None
    correct: Correct | None = None

    @property
    def data(self) -> str:
        return next((word.removeprefix("data=") for word in self.overrides if word.startswith("data=")), "digits")

    @property
    def metric(self) -> str:
        return self.method.partition(", ")[2]

    @property
    def is_fit(self) -> bool:
        return self.method.startswith("Gabor fit")


CORRECT = {
    "probe_correct": "linear probe",
    "refitted_probe_correct": "refitted linear probe",
    "correct": "top-1 of 1,000 classes",
}
"""Lists of which images were classified correctly -> by what."""

COLORS = {"": "C3", "images": "C0", "patches": "C2"}
"""The color of each metric; a method whose name has none minimizes the error of pixels."""
MARKERS = "osv^DPX*"
"""Of the methods, in alphabetical order."""


def read_approximations(file: Path) -> list[Approximation]:
    """Reads the approximations of a layer, the original first. Raises UsageError for a corrupt file."""
    lines = read_json_lines(
        file,
        Approximation,
        "an approximation",
        lambda line: f"{line.method}, {line.numbers} numbers per kernel",
    )
    lists = [getattr(line, key) for line in lines for key in ("output_error_percent", *CORRECT)]
    if len({len(values) for values in lists if values is not None}) > 1:
        raise UsageError(f"{file} is corrupt: its lists differ in length")
    return lines


def draw_approximations(lines: Sequence[Approximation]) -> Figure | None:
    """Draws accuracy without training against numbers per kernel; None if the network was not evaluated.

    Args:
        lines: as ``read_approximations`` returns them.
    """
    original, *approximations = lines
    titles = {key: title for key, title in CORRECT.items() if getattr(original, key) is not None}
    if not titles:
        return None
    methods = sorted({line.method.partition(", ")[0] for line in approximations})
    figure = Figure(figsize=(5.5 * len(titles), 4.2), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        top1 = {id(line): 100 * pd.Series(getattr(line, key)).astype(float) for line in lines}
        axes.axhline(top1[id(original)].mean(), color="black", linewidth=0.8, label="original kernels")
        for line in sorted(approximations, key=lambda line: line.method):
            method = line.method.partition(", ")[0]
            interval = interval_of_mean(top1[id(line)] - top1[id(original)], sampled="images")
            axes.errorbar(
                line.numbers_per_kernel,
                top1[id(line)].mean(),
                yerr=(interval.high - interval.low) / 2,
                color=COLORS[line.metric],
                marker=MARKERS[methods.index(method)],
                linestyle="none",
                capsize=3,
                label=f"{method}, {line.metric or 'pixels'}",
            )
        axes.set_xlabel(f"numbers per kernel, of {original.numbers} (95% intervals of the difference)")
        axes.set_ylabel(f"{title}, %")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{original.layer} replaced without training, on {original.data}", fontsize=10)
    handles = {label: handle for handle, label in zip(*figure.axes[0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure
