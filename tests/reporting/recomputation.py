"""What the pages of claims should say about measurements and approximations, recomputed without reporting."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from acl.kernels import KINDS

Floats = NDArray[np.float64]
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Expected:
    """A mean, its standard error with degrees of freedom, and what its verdict compares it with."""

    mean: float
    error: float
    degrees: float
    threshold: float | None = 0.0
    margin: float | None = None

    def interval(self, confidence: float = 0.95) -> tuple[float, float, float]:
        half = stats.t.ppf((1 + confidence) / 2, self.degrees) * self.error if self.error else 0.0
        return self.mean, self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        if self.threshold is None:
            return ""
        _, low, high = self.interval(0.9)
        if self.margin is not None and -self.margin < low and high < self.margin:
            return "equivalent"
        _, low, high = self.interval()
        return "better" if low > self.threshold else "worse" if high < self.threshold else "undecided"


def expect_mean(values: Floats, threshold: float | None = 0.0, reference: float | None = None) -> Expected:
    """A mean over seeds or images; ``reference``: the accuracy in percent that a difference is relative to, or NaN."""
    n = len(values)
    margin = None if reference is None or threshold is None else compute_margin(reference)
    return Expected(values.mean(), values.std(ddof=1) / math.sqrt(n), n - 1, threshold, margin)


def compute_margin(reference: float) -> float:
    return 1.0 if math.isnan(reference) else min(1.0, (100 - reference) / 10)


def group_by_row(lines: Lines) -> dict[str, Lines]:
    """The lines of each row, by seed."""
    return {
        row: sorted((line for line in lines if line["row"] == row), key=lambda line: line["seed"])
        for row in dict.fromkeys(line["row"] for line in lines)
    }


def expect_shapley(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row(lines).items():
        for symbol in of_row[0]["values"]:
            values = np.array([line["values"][symbol] for line in of_row])
            threshold = None if symbol == "P" else 0.0
            yield f"Shapley value of {KINDS[symbol].name} in {row}", expect_mean(values, threshold, math.nan)


def expect_leave_one_out(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row([line for line in lines if line["values"]]).items():
        for way, removed in (("zero", "set to zero"), ("constant", "made constant")):
            losses = [line["values"][way] for line in of_row]
            for symbol in losses[0]:
                threshold = None if symbol == "P" else 0.0
                lost = np.array([by_kind[symbol]["kind"] for by_kind in losses])
                name = KINDS[symbol].name
                zeroed = [line["values"]["zero"][symbol]["kind"] for line in of_row]
                if way == "zero" or lost.tolist() != zeroed:
                    yield f"lost without {name} in {row}, its kernels {removed}", expect_mean(lost, threshold, math.nan)
                if way == "constant":
                    values = np.array([by_kind[symbol]["shapley"] for by_kind in losses])
                    yield (
                        f"Shapley value of {name} in {row}, removed kernels {removed}",
                        expect_mean(values, threshold, math.nan),
                    )
            counts = [[(loss["free"], loss["kernels"]) for loss in by_kind.values()] for by_kind in losses]
            shares = np.array([sum(f * k for f, k in pairs) / sum(k for _, k in pairs) for pairs in counts])
            yield f"kernels of {row} that cost nothing if one is {removed}", expect_mean(shares, None)


def expect_akp_travel(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row(lines).items():
        for name in of_row[0]["values"]:
            symbol, akp = name.split("/")
            what = f"distance traveled by {akp} of {KINDS[symbol].name} in {row}"
            travels = [line["values"][name] for line in of_row]
            if isinstance(travels[0], dict):
                shares = np.array([100 * travel["mean"] / travel["allowed"] for travel in travels])
                yield f"{what}, of what the optimizer allows", expect_mean(shares, None)
                yield what, expect_mean(np.array([travel["mean"] for travel in travels]), None)
            else:
                period = ", not modulo its period" if akp in ("theta", "psi") else ""
                yield f"{what}{period}", expect_mean(np.array(travels), None)


def expect_replaced_akps(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row([line for line in lines if line["values"]]).items():
        trained, initial, redrawn = (
            np.array([line["values"][akps] for line in of_row]) for akps in ("trained", "initial", "redrawn")
        )
        yield f"{row}: AKPs trained, against initial ones", expect_mean(trained - initial, 0.0, initial.mean())
        yield f"{row}: AKPs trained, against redrawn ones", expect_mean(trained - redrawn, None)


def expect_against(
    lines: Lines, references: list[str], title: str, compute: Callable[[Any], float], threshold: float | None = 0.0
) -> Iterator[tuple[str, Expected]]:
    values = {
        row: np.array([compute(line["values"]) for line in of_row]) for row, of_row in group_by_row(lines).items()
    }
    for reference in references:
        for row in values.keys() - set(references[: references.index(reference) + 1]):
            asked = None if row in references else threshold
            expected = expect_mean(values[row] - values[reference], asked, values[reference].mean())
            yield f"{row}, under {title}, against {reference}", expected


def expect_corruptions(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    names = [name for name in lines[0]["values"] if name != "none"]
    yield from expect_against(lines, references, "corruptions", lambda v: np.mean([v[name] for name in names]))
    for name in names:
        yield from expect_against(lines, references, name, lambda v, name=name: np.mean(v[name]), None)


def expect_attacks(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    compute = lambda v: np.mean([top1 for size, top1 in v.items() if size != "0"])  # noqa: E731
    yield from expect_against(lines, references, "attacks", compute)


def expect_transforms(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row([line for line in lines if line["values"]]).items():
        values = of_row[0]["values"]
        angles = [amount for amount in values["rotation"] if float(amount) < 90]
        low, high = min(map(float, angles)), max(map(float, angles))
        groups = {f"rotated by {low:g} to {high:g} degrees": ("rotation", angles)}
        groups |= {f"scaled by {float(amount):g}": ("scale", [amount]) for amount in values["scale"]}
        for title, (transform, amounts) in groups.items():

            def average(way: str, key: str, transform: str = transform, amounts: list[str] = amounts) -> Floats:
                return np.array(
                    [np.mean([line["values"][transform][a][way][key] for a in amounts]) for line in of_row]  # noqa: B023
                )

            if "closed form" not in values[transform][amounts[0]]:
                continue
            moved, prefix = average("closed form", "top1"), f"{row}, images {title}:"
            for way in values[transform][amounts[0]].keys() - {"closed form"}:
                kernels = "kernels resampled by splines" if way == "splines" else f"kernels {way}"
                other = average(way, "top1")
                expected = expect_mean(moved - other, 0.0, other.mean())
                yield f"{prefix} formulas moved, against {kernels}", expected
                errors = average(way, "error") - average("closed form", "error")
                yield f"{prefix} error of outputs, {kernels}, against formulas moved", expect_mean(errors)


def expect_approximations(lines: Lines, references: list[str]) -> Iterator[tuple[str, Expected]]:
    original, *others = lines
    for line in others:
        size = f"{line['numbers_per_kernel']:.1f} numbers per kernel"
        values = np.array(line["output_error_percent"])
        yield f"error of {line['layer']}'s outputs, {line['method']}, {size}", expect_mean(values, None)
    titles = {
        "probe_correct": "linear probe",
        "refitted_probe_correct": "refitted linear probe",
        "correct": "top-1 of 1,000 classes",
    }
    for key in titles.keys() & original.keys():
        for fit in others:
            peers = [line for line in others if line["numbers"] == fit["numbers_per_kernel"]]
            metric = fit["method"].partition(", ")[2]
            for peer in (original, *(line for line in peers if line["method"].partition(", ")[2] == metric)):
                top1 = 100 * np.array(peer[key])
                what = f"{fit['method']} with {fit['numbers_per_kernel']:.3g} numbers per kernel"
                against = "the original" if peer is original else peer["method"]
                expected = expect_mean(100 * np.array(fit[key]) - top1, 0.0, top1.mean())
                yield f"{titles[key]}, {what}, against {against}", expected


EVIDENCE = {
    "shapley": expect_shapley,
    "leave_one_out": expect_leave_one_out,
    "akp_travel": expect_akp_travel,
    "replaced_akps": expect_replaced_akps,
    "corruptions": expect_corruptions,
    "attacks": expect_attacks,
    "transforms": expect_transforms,
    "approximations": expect_approximations,
}
