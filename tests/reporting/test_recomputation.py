"""Recomputes every published interval from the committed records, with code of its own: it imports nothing from
reporting, whose errors it is to find.
"""

import base64
import csv
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy import stats

from tests.reporting.recomputation import EVIDENCE, Expected, Floats, Lines, compute_margin

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def read_lines(file: Path) -> Lines:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@cache
def read_table(name: str) -> tuple[dict[str, dict[int, Any]], dict[str, str]]:
    """The records of a table by row and seed, and the row that each row is compared with."""
    records: dict[str, dict[int, Any]] = {}
    for record in read_lines(RESULTS / "tables" / f"{name}.jsonl"):
        records.setdefault(record["row"], {})[record["config"]["seed"]] = record
    with (RESULTS / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return records, {line["row"]: line["reference"] for line in csv.DictReader(file)}


def unpack(record: dict[str, Any], split: str) -> NDArray[np.uint8] | None:
    packed = (record.get("correct") or {}).get(split)
    if packed is None:
        return None
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=record["data"][split])


def expect_difference(name: str, row: str, reference: str, split: str) -> Expected:
    """The difference of two rows of a table; the rows of a group may share one variance over seeds."""
    records, references = read_table(name)
    seeds = sorted(records[row])
    assert all(sorted(by_seed) == seeds for by_seed in records.values())  # as in every table that is committed
    top1 = {name: np.array([runs[seed][split]["top1"] for seed in seeds]) for name, runs in records.items()}
    differences = top1[row] - top1[reference]
    n, mean = len(seeds), differences.mean()
    variance, degrees = differences.var(ddof=1) / n, float(n - 1)
    leader = reference if reference in references.values() else references[reference]
    errors = 100 - top1[leader].mean()
    group = [name for name, other in references.items() if leader in (name, other)]
    group = [name for name in group if errors / 2 <= 100 - top1[name].mean() <= 2 * errors]
    if {row, reference} <= {*group} and len(group) > 2 and stats.bartlett(*(top1[name] for name in group))[1] >= 0.2:
        values = np.array([top1[name] for name in group])
        values = values - values.mean(0)
        values = values - values.mean(1)[:, None]
        degrees = (len(group) - 1) * (n - 1)
        variance = 2 * (values**2).sum() / degrees / n
    margin = compute_margin(top1[reference].mean())
    pairs = [(unpack(records[row][seed], split), unpack(records[reference][seed], split)) for seed in seeds]
    digests = {(records[name][seed].get("data") or {}).get("digest") for name in (row, reference) for seed in seeds}
    if len(digests) == 1 and all(bits is not None for pair in pairs for bits in pair):
        by_image = 100.0 * np.array([of_row.astype(int) - of_reference for of_row, of_reference in pairs])
        variance, degrees = add_images(variance, degrees, by_image)
    return Expected(mean, math.sqrt(variance), degrees, 0.0, margin)


def add_images(of_seeds: float, degrees: float, by_image: Floats) -> tuple[float, float]:
    """The two-way random-effects model without replication; the widest of it and of one source alone."""
    n, m = by_image.shape
    total = n * m * by_image.var()
    between_seeds, between_images = n * m * by_image.mean(1).var(), n * m * by_image.mean(0).var()
    of_images = between_images / (m - 1) / (n * m)
    of_rest = (total - between_seeds - between_images) / ((n - 1) * (m - 1)) / (n * m)
    variances = [(of_seeds, degrees), (of_images, float(m - 1))]
    both = of_seeds + of_images - of_rest
    if both > of_seeds and both > of_images:
        terms = of_seeds**2 / degrees + of_images**2 / (m - 1) + of_rest**2 / ((n - 1) * (m - 1))
        variances.append((both, both**2 / terms))
    return max(variances, key=lambda pair: stats.t.ppf(0.975, pair[1]) * math.sqrt(pair[0]))


def read_pages() -> Iterator[tuple[str, str, str, str, str]]:
    """Yields the source, data, effect, estimate and verdict of each row of the pages of claims."""
    row = re.compile(
        r"^\| \[(.+?)\]\(\.\./(.+?)\) \| (.+) \| [\d.]* \| (.+?) \| [\d,]+ .+? \| (.*?) ?\|$", re.MULTILINE
    )
    for page in sorted((RESULTS / "claims").glob("*.md")):
        for data, source, what, estimate, verdict in row.findall(page.read_text("utf-8")):
            yield source, data, what, estimate, verdict.strip("* ")


PAGES = list(read_pages())
NUMBER = r"[-+]?\d[\d.e+-]*"


def check_estimate(text: str, expected: tuple[float, float, float]) -> None:
    """Compares a mean and its interval with the numbers printed, up to their rounding."""
    printed = re.findall(NUMBER, text)[:3]
    assert len(printed) == 3, text
    for number, value in zip(printed, expected, strict=True):
        decimals = len(number.partition("e")[0].partition(".")[2])
        assert float(number) == pytest.approx(value, abs=0.51 * 10.0**-decimals), (text, expected)


def expect_row(source: str, what: str) -> Expected | None:
    """What a row of the pages of claims should say; None if this file cannot compute it."""
    folder, _, name = source.partition("/")
    if folder == "tables":
        table = name.removesuffix(".md")
        row, reference = next(
            (row, other)
            for row in read_table(table)[0]
            for other in read_table(table)[0]
            if f"{row}, against {other}" == what
        )
        return expect_difference(table, row, reference, "test")
    return expect_evidence(source)[what] if folder == "evidence" and find_measurement(source) else None


def find_measurement(source: str) -> str | None:
    return next((name for name in EVIDENCE if source.endswith(f"_{name}.jsonl")), None)


@cache
def expect_evidence(source: str) -> dict[str, Expected]:
    name = find_measurement(source)
    assert name is not None
    lines = read_lines(RESULTS / source)
    table = source.removeprefix("evidence/").removesuffix(f"_{name}.jsonl")
    has_page = (RESULTS / f"tables/{table}.csv").exists()
    return dict(EVIDENCE[name](lines, find_references(table) if has_page else []))


def find_references(table: str) -> list[str]:
    """The rows that each row of a table's page is compared with; the plain row comes first."""
    return [next(iter(read_table(table)[1])), *read_headings(table)[6:]]


def read_headings(table: str) -> list[str]:
    """The headings of a table's page; those of further references are reduced to the row's name."""
    lines = (RESULTS / "tables" / f"{table}.md").read_text("utf-8").splitlines()
    heading = next(text for text in lines if text.startswith("| row |"))
    return [title.removeprefix("points against ") for title in heading.strip("| ").split(" | ")]


@pytest.mark.parametrize("source", sorted({source for source, *_ in PAGES}))
def test_claims_equal_recomputed_ones(source: str) -> None:
    if source.startswith("approximation/"):
        check_fit(source)
        return
    for _, _, what, estimate, verdict in (row for row in PAGES if row[0] == source):
        expected = expect_row(source, what)
        if expected is None:
            pytest.fail(f"{source} holds a measurement that this file does not recompute")
        check_estimate(estimate, expected.interval())
        assert verdict == expected.verdict, what


def check_fit(source: str) -> None:
    """Compares the share of energy that a fit explains; a bootstrap of other random numbers differs slightly."""
    fit = json.loads((RESULTS / source).read_text("utf-8"))
    energies = np.array(fit["energies"]).reshape(fit["shape"][0], -1)
    explained = 100 * energies * np.array([kernel["r2"] or 0.0 for kernel in fit["kernels"]]).reshape(energies.shape)
    fitted = energies * np.array([kernel["r2"] is not None for kernel in fit["kernels"]]).reshape(energies.shape)
    samples = np.random.default_rng(1).integers(len(fitted), size=(20_000, len(fitted)))
    low, high = np.quantile(explained.sum(1)[samples].sum(1) / fitted.sum(1)[samples].sum(1), [0.025, 0.975])
    ((estimate, verdict),) = [(row[3], row[4]) for row in PAGES if row[0] == source]
    numbers = [float(number) for number in re.findall(NUMBER, estimate)]
    assert numbers[0] == pytest.approx(explained.sum() / fitted.sum(), abs=0.051)
    assert numbers[1:] == pytest.approx([low, high], abs=0.2)
    assert verdict == ("better" if low > 90 else "worse" if high < 90 else "undecided")


def test_overview_equals_recomputed_intervals() -> None:
    page = (RESULTS / "CLAIMS.md").read_text("utf-8")
    sources = {f"{data}: {what}": (source, what) for source, data, what, _, _ in PAGES}
    claims = [yaml.safe_load(file.read_text("utf-8")) for file in sorted((ROOT / "configs/claims").glob("*.yaml"))]
    for key, name in (item for claim in claims for item in claim["decisive"].items()):
        line = next(line for line in page.splitlines() if line.startswith(f"- {name}: "))
        source, what = sources[key]
        expected = expect_row(source, what)
        if expected is None:
            continue
        verdict, estimate, validation = re.fullmatch(
            r"- .*?: (?:\*\*)?(\w+)(?:\*\*)?, (.+?\]) .*?(?:on validation images (.*\]) points)?", line
        ).groups()  # type: ignore[union-attr]
        assert verdict == expected.verdict
        check_estimate(estimate, expected.interval())
        if validation is not None:
            row, _, reference = what.partition(", against ")
            check_estimate(validation, expect_difference(source[7:-3], row, reference, "val").interval())


@pytest.mark.parametrize("name", sorted(file.stem for file in (RESULTS / "tables").glob("*.csv")))
def test_table_equals_recomputed_one(name: str) -> None:
    records, references = read_table(name)
    split = "test" if next(iter(next(iter(records.values())).values()))["test"] else "val"
    with (RESULTS / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    page = (RESULTS / "tables" / f"{name}.md").read_text("utf-8").splitlines()
    assert [line["row"] for line in lines] == [*records]
    for line in lines:
        row = line["row"]
        top1 = np.array([record[split]["top1"] for record in records[row].values()])
        assert float(line["top1_mean"]) == pytest.approx(top1.mean(), rel=1e-5)
        assert float(line["top1_std"]) == pytest.approx(top1.std(ddof=1), rel=1e-5)
        others = [references[row], *read_headings(name)[6:]]
        intervals = [
            (0.0, 0.0, 0.0) if other == row else expect_difference(name, row, other, split).interval()
            for other in others
        ]
        printed = [float(line[key]) for key in ("diff_mean", "diff_ci95_low", "diff_ci95_high")]
        assert printed == pytest.approx(intervals[0], rel=1e-4, abs=1e-4)
        cells = next(text for text in page if text.startswith(f"| {row} |"))[1:-1].split(" | ")
        for cell, interval, other in zip(cells[5:], intervals, others, strict=True):
            if other == row:
                assert not cell.strip()
            else:
                check_estimate(cell, interval)
