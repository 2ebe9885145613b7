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


def expect_shapley(lines: Lines, plain: str) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row(lines).items():
        for symbol in of_row[0]["values"]:
            values = np.array([line["values"][symbol] for line in of_row])
            threshold = None if symbol == "P" else 0.0
            yield f"{KINDS[symbol].name} in {row}", expect_mean(values, threshold, math.nan)


def expect_akp_travel(lines: Lines, plain: str) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row(lines).items():
        for name in of_row[0]["values"]:
            symbol, akp = name.split("/")
            values = np.array([line["values"][name] for line in of_row])
            period = ", not modulo its period" if akp in ("theta", "psi") else ""
            yield f"distance traveled by {akp} of {KINDS[symbol].name} in {row}{period}", expect_mean(values, None)


def expect_replaced_akps(lines: Lines, plain: str) -> Iterator[tuple[str, Expected]]:
    for row, of_row in group_by_row([line for line in lines if line["values"]]).items():
        trained, initial, redrawn = (
            np.array([line["values"][akps] for line in of_row]) for akps in ("trained", "initial", "redrawn")
        )
        yield f"{row}: AKPs trained, against initial ones", expect_mean(trained - initial, 0.0, initial.mean())
        yield f"{row}: AKPs trained, against redrawn ones", expect_mean(trained - redrawn, None)


def expect_against_plain(
    lines: Lines, plain: str, title: str, compute: Callable[[Any], float], threshold: float | None = 0.0
) -> Iterator[tuple[str, Expected]]:
    values = {
        row: np.array([compute(line["values"]) for line in of_row]) for row, of_row in group_by_row(lines).items()
    }
    for row in values.keys() - {plain}:
        expected = expect_mean(values[row] - values[plain], threshold, values[plain].mean())
        yield f"{row}, under {title}, against {plain}", expected


def expect_corruptions(lines: Lines, plain: str) -> Iterator[tuple[str, Expected]]:
    names = [name for name in lines[0]["values"] if name != "none"]
    yield from expect_against_plain(lines, plain, "corruptions", lambda v: np.mean([v[name] for name in names]))
    for name in names:
        yield from expect_against_plain(lines, plain, name, lambda v, name=name: np.mean(v[name]), None)


def expect_attacks(lines: Lines, plain: str) -> Iterator[tuple[str, Expected]]:
    compute = lambda v: np.mean([top1 for size, top1 in v.items() if size != "0"])  # noqa: E731
    yield from expect_against_plain(lines, plain, "attacks", compute)


def expect_transforms(lines: Lines, plain: str) -> Iterator[tuple[str, Expected]]:
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
            for way in ("resampled", "unchanged"):
                other = average(way, "top1")
                expected = expect_mean(moved - other, 0.0, other.mean())
                yield f"{prefix} formulas moved, against kernels {way}", expected
            errors = average("resampled", "error") - average("closed form", "error")
            yield f"{prefix} error of outputs, kernels resampled, against formulas moved", expect_mean(errors)


def expect_approximations(lines: Lines, plain: str) -> Iterator[tuple[str, Expected]]:
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
    "akp_travel": expect_akp_travel,
    "replaced_akps": expect_replaced_akps,
    "corruptions": expect_corruptions,
    "attacks": expect_attacks,
    "transforms": expect_transforms,
    "approximations": expect_approximations,
}
