"""README.md: its code runs, and its tables are the generated ones."""

import re
from pathlib import Path

import pytest

from acl.kernels import KINDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_readme_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_readme_tables_equal_tables_in_results() -> None:
    blocks = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert blocks
    for name, block in blocks:
        results = (ROOT / "results" / "tables" / f"{name}.md").read_text()
        assert block.strip().startswith("| row |") and block.strip() in results


def test_readme_lists_every_kind_with_its_akps() -> None:
    for kind in KINDS.values():
        akps = ", ".join(akp.name for akp in kind.akps()) or "k x k weights"
        assert f"| `{kind.symbol}` | {akps} |" in README


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_readme_link_target_exists(link: str) -> None:
    assert (ROOT / link).exists()
