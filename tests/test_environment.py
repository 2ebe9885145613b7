"""The lock, environment.yml and the packages' borders."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_the_lock_pins_every_package_exactly() -> None:
    lines = (ROOT / "requirements.lock").read_text().split()
    assert len(lines) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)


def test_conda_users_get_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == (ROOT / "requirements.lock").read_text().split()


def test_importing_acl_needs_torch_alone() -> None:
    code = (
        "import sys; import torch; before = set(sys.modules); import acl;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) <= {"acl", "torch"}


FLOORS = ["acl", "models", "training", "scripts"]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_import_runs_back_up(floor: str) -> None:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in (ROOT / floor).glob("*.py"):
        for package in re.findall(r"^\s*(?:from|import)\s+(\w+)", path.read_text(), re.MULTILINE):
            assert package not in above, path


def test_the_readmes_tables_are_the_results() -> None:
    blocks = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for name, block in blocks:
        results = (ROOT / "results" / "tables" / f"{name}.md").read_text()
        assert block.strip().startswith("| row |") and block.strip() in results


def test_the_readme_lists_every_kind() -> None:
    from acl.kernels import KINDS

    text = (ROOT / "README.md").read_text()
    for kind in KINDS.values():
        akps = ", ".join(akp.name for akp in kind.akps) or "k x k weights"
        assert f"| `{kind.symbol}` | {akps} |" in text
