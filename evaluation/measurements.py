"""What is measured on the trained networks of a table, beyond the accuracy in their records."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pandas as pd
import torch
from filelock import FileLock
from pydantic import Field, create_model
from torch import Tensor
from typing_extensions import TypedDict

from acl.explain import KernelReplacement, attribute
from acl.inspection import analytic_layers
from acl.kernels import KINDS
from evaluation.akp_travel import NonNegative, Travel, measure_akp_travel
from evaluation.attacks import measure_attacks
from evaluation.corruptions import CORRUPTIONS, SEVERITIES
from evaluation.finished_run import FinishedRun, evaluate_run, load_own_akp_history
from evaluation.removal import Loss, iterate_pairs, measure_removal
from evaluation.transforms import measure_transforms
from training.config import flatten
from training.data import Data
from training.errors import UsageError
from training.files import read_json_lines, to_json_lines, write_atomic
from training.provenance import digest_file
from training.record import Percent, Record, Recorded
from training.splits import Split
from training.validation import Seed


class Line(Recorded):
    """The values of a measurement on one run, in a file of ``results/evidence``."""

    row: str
    id: str
    seed: Seed
    values: Any
    weights: str | None = None
    """The digest of model.safetensors; this and the following are None in lines of code that did not store them."""
    akps: str | None = None
    """The digest of akps.safetensors, if it was used."""

    def is_of(self, record: Record) -> bool:
        """Whether the line was measured on the weights that a record stands for, as far as is known."""
        return self.id == record.id and record.weights in (None, self.weights)


@dataclass(frozen=True)
class Summary:
    """Values of one row that have a mean and an interval."""

    row: str
    what: str
    values: "pd.Series[Any]"
    """By seed."""
    threshold: float | None
    """None: a description, without a verdict."""
    unit: str = "points"
    reference_top1: float | None = None
    """The accuracy in percent that a difference in accuracy is relative to, if it is known."""


class Measurement:
    """Something that is measured on a trained network. A new measurement is a subclass, and an entry in the claims."""

    name: ClassVar[str]
    values: ClassVar[Any]
    """The type of what ``measure`` returns."""
    uses_akp_history: ClassVar[bool] = False
    is_against_plain: ClassVar[bool] = False
    """Whether summaries are compared with those of the table's plain row."""

    @classmethod
    def make_line_type(cls) -> type[Line]:
        return create_model("Line", __base__=Line, values=(cls.values, ...))

    @staticmethod
    def measure(run: FinishedRun, data: Data) -> dict[str, Any]:
        """What is written to ``results/evidence``; empty if it does not apply to the network."""
        raise NotImplementedError

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        raise NotImplementedError


class AkpTravel(Measurement):
    """The mean distance of AKPs at the best epoch from their initial values, and that which the optimizer allows."""

    name = "akp_travel"
    values = dict[str, Travel | NonNegative]  # lines of earlier versions hold the mean alone, not modulo the period
    uses_akp_history = True
    measure = staticmethod(measure_akp_travel)

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        for row, name, values in _group_by_row_and_name(lines):
            symbol, akp = name.split("/")
            unit = KINDS[symbol].find_akp(akp).unit.replace("rad", "degrees")
            what = f"distance traveled by {akp} of {KINDS[symbol].name} in {row}"
            if unit == "degrees" and not all(isinstance(value, dict) for value in values):
                what += ", not modulo its period"
            means = values.map(lambda value: value["mean"] if isinstance(value, dict) else value)
            yield Summary(row, what, means.astype(float), None, unit)
            shares = {
                seed: 100 * value["mean"] / value["allowed"]
                for seed, value in values.items()
                if isinstance(value, dict) and value["allowed"]
            }
            if shares:
                yield Summary(row, f"{what}, of what the optimizer allows", pd.Series(shares), None, "%")


class ReplacedAkps(Measurement):
    """Validation accuracy with all AKPs of the network replaced, and everything else as trained.

    Source: Zhang, Bengio and Singer, Are All Layers Created Equal?, JMLR 2022.
    """

    name = "replaced_akps"
    values = dict[str, Percent]
    uses_akp_history = True

    @staticmethod
    def measure(run: FinishedRun, data: Data) -> dict[str, Any]:
        """Returns the accuracy with ``trained`` AKPs, ``initial`` ones (before training) and ``redrawn`` ones."""
        history = load_own_akp_history(run)
        if not history:
            return {}
        initial, redrawn = copy.deepcopy(run.model), copy.deepcopy(run.model)
        for name, layer in analytic_layers(initial).items():
            for symbol, akps in layer.akps().items():
                layer.set_akps(symbol, {akp: history[f"{name}/{symbol}/{akp}"][0] for akp in akps})
        torch.manual_seed(int(run.settings.directory.id, 16))  # not the seed that the initial AKPs were drawn with
        for layer in analytic_layers(redrawn).values():
            layer.sample_akps()
        models = {"trained": run.model, "initial": initial, "redrawn": redrawn}
        return {akps: evaluate_run(replace(run, model=model), data, "val")["top1"] for akps, model in models.items()}

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        """Compares trained AKPs with initial ones, and, without a verdict, with redrawn ones."""
        accuracies = {(row, akps): values for row, akps, values in _group_by_row_and_name(lines)}
        for row in dict.fromkeys(row for row, _ in accuracies):
            for akps, threshold in (("initial", 0.0), ("redrawn", None)):
                difference = accuracies[row, "trained"] - accuracies[row, akps]
                top1 = accuracies[row, akps].mean()
                yield Summary(
                    row, f"{row}: AKPs trained, against {akps} ones", difference, threshold, reference_top1=top1
                )


class Shapley(Measurement):
    """The Shapley value of each kind of kernel in points of validation accuracy, with removed kernels set to zero."""

    name = "shapley"
    values = dict[str, Annotated[float, Field(ge=-100, le=100)]]

    @staticmethod
    def measure(run: FinishedRun, data: Data) -> dict[str, Any]:
        if not analytic_layers(run.model):
            return {}
        attribution = attribute(run.model, partial(iterate_pairs, data, data.val))
        values = attribution.shapley()
        return {symbol: values[symbol] for symbol in attribution.kinds}

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        """What each kind adds; without a verdict for plain kernels, which no claim is about."""
        for row, symbol, values in _group_by_row_and_name(lines):
            threshold = 0.0 if KINDS[symbol].is_analytic else None
            yield Summary(row, f"Shapley value of {KINDS[symbol].name} in {row}", values, threshold)


class LeaveOneOut(Measurement):
    """Validation accuracy lost without a kind of kernel and without single kernels, set to zero or made constant."""

    name = "leave_one_out"
    values = dict[KernelReplacement, dict[str, Loss]]
    measure = staticmethod(measure_removal)

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        """What each kind adds, with a verdict (``Shapley`` has the values for zero), and the share of free kernels.

        A constant kernel of the same sum as one that sums to zero is zero, so there what is lost is listed once.
        """
        frame = pd.DataFrame(
            [
                (line.row, line.seed, replaced_by, symbol, *loss.values())
                for line in lines
                for replaced_by, by_kind in line.values.items()
                for symbol, loss in by_kind.items()
            ],
            columns=["row", "seed", "replaced_by", "symbol", *Loss.__annotations__],
        )
        zeroed = frame[frame.replaced_by == "zero"].set_index("seed").groupby(["row", "symbol"])["kind"]
        lost_with_zero = dict(iter(zeroed))
        for (row, replaced_by), group in frame.groupby(["row", "replaced_by"], sort=False):
            removed = "set to zero" if replaced_by == "zero" else "made constant"
            for symbol, of_kind in group.set_index("seed").groupby("symbol", sort=False):
                kind = KINDS[str(symbol)]
                threshold = 0.0 if kind.is_analytic else None
                if replaced_by == "zero" or not of_kind["kind"].equals(lost_with_zero[row, symbol]):
                    what = f"lost without {kind.name} in {row}, its kernels {removed}"
                    yield Summary(row, what, of_kind["kind"], threshold)
                if replaced_by != "zero":
                    what = f"Shapley value of {kind.name} in {row}, removed kernels {removed}"
                    yield Summary(row, what, of_kind["shapley"], threshold)
            counts = group.assign(free=group["free"] * group["kernels"]).groupby("seed")[["free", "kernels"]].sum()
            what = f"kernels of {row} that cost nothing if one is {removed}"
            yield Summary(row, what, counts["free"] / counts["kernels"], None, "%")


class Corruptions(Measurement):
    """Test accuracy for every corruption at every severity."""

    name = "corruptions"
    values = dict[str, Percent | Annotated[list[Percent], Field(min_length=1)]]
    is_against_plain = True

    @staticmethod
    def measure(run: FinishedRun, data: Data) -> dict[str, Any]:
        """Returns corruption -> accuracies from severity 1 to 5; ``none`` -> accuracy on the images as they are."""

        def compute_accuracy(images: Tensor) -> float:
            return evaluate_run(run, replace(data, test=Split(images, data.test.labels)), "test")["top1"]

        accuracies: dict[str, Any] = {"none": compute_accuracy(data.test.images)}
        for name, corrupt in CORRUPTIONS.items():
            accuracies[name] = [compute_accuracy(corrupt(data.test.images, severity)) for severity in SEVERITIES]
        return accuracies

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        """The accuracy averaged over corruptions, which has the verdict, then under each corruption."""
        _check_conditions(
            tuple((name, len(values)) for name, values in line.values.items() if name != "none") for line in lines
        )
        names = [name for name in lines[0].values if name != "none"]
        groups: list[tuple[str, list[str], float | None]] = [("corruptions", names, 0.0)]
        groups += [(name, [name], None) for name in names]
        for title, members, threshold in groups:
            for row, by_seed in _group_by_row(lines):
                means = {
                    seed: sum(sum(values[name]) / len(values[name]) for name in members) / len(members)
                    for seed, values in by_seed.items()
                }
                yield Summary(row, f"under {title}", pd.Series(means), threshold)


class Attacks(Measurement):
    """Test accuracy under projected gradient descent."""

    name = "attacks"
    values = dict[str, Percent]
    is_against_plain = True
    measure = staticmethod(measure_attacks)

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        _check_conditions(tuple(line.values) for line in lines)
        for row, by_seed in _group_by_row(lines):
            means = {
                seed: sum(values[size] for size in values if size != "0") / (len(values) - 1)
                for seed, values in by_seed.items()
            }
            yield Summary(row, "under attacks", pd.Series(means), 0.0)


class _MovedResult(TypedDict):
    top1: Percent
    error: NonNegative


class Transforms(Measurement):
    """Accuracy on rotated and rescaled images, with the network's formulas moved alike."""

    name = "transforms"
    values = dict[str, dict[str, dict[str, _MovedResult]]]
    measure = staticmethod(measure_transforms)

    @staticmethod
    def summarize(lines: Sequence[Line]) -> Iterable[Summary]:
        """Compares formulas that are moved with kernels resampled in two ways, and with a network left unchanged."""
        frame = pd.DataFrame(
            [
                (line.row, line.seed, transform, float(amount), way, values["top1"], values["error"])
                for line in lines
                for transform, by_amount in line.values.items()
                for amount, ways in by_amount.items()
                for way, values in ways.items()
            ],
            columns=["row", "seed", "transform", "amount", "way", "top1", "error"],
        )
        for row, of_row in frame.groupby("row", sort=False):
            # At 90 degrees, moved and resampled kernels are the same: no pixel is interpolated.
            is_oblique = (of_row["transform"] == "rotation") & (of_row["amount"] < 90)
            angles = of_row["amount"][is_oblique]
            groups = {f"rotated by {angles.min():g} to {angles.max():g} degrees": is_oblique}
            for factor in sorted(of_row["amount"][of_row["transform"] == "scale"].unique()):
                groups[f"scaled by {factor:g}"] = (of_row["transform"] == "scale") & (of_row["amount"] == factor)
            for title, is_member in groups.items():
                if "closed form" not in set(of_row["way"][is_member]):  # the formulas were too fine
                    continue
                means = of_row[is_member].groupby(["seed", "way"])[["top1", "error"]].mean().unstack()
                prefix = f"{row}, images {title}:"
                names = {"resampled": "resampled", "splines": "resampled by splines", "unchanged": "unchanged"}
                names = {way: name for way, name in names.items() if way in means["top1"]}
                for way, name in names.items():
                    top1 = means["top1", way]
                    difference = (means["top1", "closed form"] - top1).dropna()
                    what = f"{prefix} formulas moved, against kernels {name}"
                    yield Summary(row, what, difference, 0.0, reference_top1=top1.mean())
                for way in [way for way in names if way != "unchanged"]:
                    difference = means["error", way] - means["error", "closed form"]
                    what = f"{prefix} error of outputs, kernels {names[way]}, against formulas moved"
                    yield Summary(row, what, difference.dropna(), 0.0, "%")


MEASUREMENTS = {measurement.name: measurement for measurement in Measurement.__subclasses__()}


def _check_conditions(conditions: Iterable[tuple[object, ...]]) -> None:
    """Raises ValueError unless all lines were measured under the same conditions, whose mean is thus comparable."""
    if len(different := list(dict.fromkeys(conditions))) > 1:
        raise ValueError(f"lines have different conditions, {different[0]} and {different[1]}; measure them again")


def _group_by_row(lines: Sequence[Line]) -> Iterable[tuple[str, dict[int, Any]]]:
    """Yields each row with its values by seed."""
    for row in dict.fromkeys(line.row for line in lines):
        yield row, {line.seed: line.values for line in lines if line.row == row}


def _group_by_row_and_name(lines: Sequence[Line]) -> Iterable[tuple[str, str, "pd.Series[Any]"]]:
    """Yields each row and name of a value, with the values by seed."""
    values = [(line.row, line.seed, name, value) for line in lines for name, value in line.values.items()]
    frame = pd.DataFrame(values, columns=["row", "seed", "name", "value"]).set_index("seed")
    for (row, name), group in frame.groupby(["row", "name"], sort=False):
        yield row, name, group["value"]


def read_measurements(file: Path, measurement: type[Measurement]) -> list[Line]:
    """Reads a file of ``scripts/measure.py``, if there is one. Raises UsageError as ``read_json_lines`` does."""
    if not file.exists():
        return []
    return read_json_lines(
        file,
        measurement.make_line_type(),
        f"a measurement of {measurement.name}",
        lambda line: f"row '{line.row}', seed {line.seed}",
    )


def write_measurement(file: Path, measurement: type[Measurement], line: Line) -> None:
    """Adds a line to a file, or replaces that of the same row and seed; other processes may do so at the same time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            lines = read_measurements(file, measurement)
            by_run = {(other.row, other.seed): other for other in lines} | {(line.row, line.seed): line}
            write_atomic(file, to_json_lines(other.to_dict() for other in by_run.values()))
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}") from error


def is_current(line: Line, record: Record, path: Path) -> bool:
    """Whether a line still stands for the run in the folder ``path``, as far as is known."""
    if not line.values and line.weights is None and any(flatten(record.config["arrangement"]).values()):
        return False  # earlier versions recorded a missing akps.safetensors as a network without AKPs
    digests = ((line.weights, "model.safetensors"), (line.akps, "akps.safetensors"))
    return line.is_of(record) and all(
        digest is None or digest_file(path / name) in (None, digest) for digest, name in digests
    )
