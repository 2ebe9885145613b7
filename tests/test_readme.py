"""README.md and docs/: their code runs, their links lead somewhere, and the tables are the generated ones."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from acl.kernels import KINDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCKS = [
    pytest.param(block, id=f"{page.stem} {i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
LINKS = sorted({(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())})


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acl.kind_search.STEPS", 20)  # none depends on the quality of a fit
    exec(compile(block, "README.md", "exec"), {})


def test_tables_of_results_equal_generated_ones() -> None:
    page = (ROOT / "docs/results.md").read_text()
    blocks = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert len(blocks) > 4
    for name, block in blocks:
        results = (ROOT / "results" / "tables" / f"{name}.md").read_text()
        assert block.strip().startswith("| row |") and block.strip() in results


def test_headline_of_readme_equals_generated_one() -> None:
    (block,) = re.findall(r"<!-- headline -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert block == (ROOT / "results/headline.md").read_text() and len(block.splitlines()) <= 10


def test_readme_is_short_and_starts_with_code() -> None:
    lines = README.splitlines()
    assert len(lines) <= 160 and lines.index("```python") < 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_intervals_in_prose_are_published_ones(page: Path) -> None:
    generated = "\n".join(file.read_text() for file in (ROOT / "results").rglob("*.md"))
    intervals = re.findall(r"\[[+-]\d+\.\d+,\s+[+-]\d+\.\d+\]", page.read_text())
    assert [text for text in intervals if " ".join(text.split()) not in generated] == []


def test_readme_lists_every_kind_with_its_akps() -> None:
    for kind in KINDS.values():
        akps = ", ".join(akp.name for akp in kind.akps()) or "k x k weights"
        assert f"| `{kind.symbol}` | {akps} |" in README


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_link_target_exists(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


def test_output_errors_in_documentation_are_the_recorded_ones() -> None:
    lines = (ROOT / "results/evidence/flowers17_approximations_images.jsonl").read_text().splitlines()
    errors: dict[str, list[float]] = {}
    for line in map(json.loads, lines):
        values = line["output_error_percent"]
        errors.setdefault(f"{line['numbers_per_kernel']:.3g}", []).append(sum(values) / len(values))
    table = r"^\| (?:a Gabor|the same|truncated SVD|codebook)(?!.*±).*"
    rows = re.findall(table, (ROOT / "docs/acl.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        numbers, *cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        recorded = [f"{value:.2f}" for value in errors[f"{float(numbers):.3g}"]]
        assert set(cells) <= set(recorded)


def test_accuracies_in_documentation_are_the_recorded_ones() -> None:
    records = (ROOT / "results/evidence/imagenette_squeezenet_approximations.jsonl").read_text().splitlines()
    original, *lines = map(json.loads, records)
    recorded: dict[str, dict[str, str]] = {}
    for line in lines:
        metric = line["method"].partition(", ")[2] or "pixels"
        differences = 100 * (np.array(line["correct"]) - np.array(original["correct"], dtype=float))
        half_width = 1.96 * differences.std(ddof=1) / len(differences) ** 0.5
        by_metric = recorded.setdefault(f"{line['numbers_per_kernel']:.3g}", {})
        by_metric[metric] = f"{differences.mean():+.2f} ± {half_width:.2f}"
    rows = re.findall(r"^\| .*±.*", (ROOT / "docs/acl.md").read_text(), re.MULTILINE)
    assert len(rows) == len(recorded) == 9
    for row in rows:
        numbers, *cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        assert cells == [recorded[numbers][metric] for metric in ("pixels", "images", "patches")]
