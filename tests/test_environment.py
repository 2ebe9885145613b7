"""Dependencies, packaging, the layers of packages, and what README repeats from the code and the results."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FLOORS = ["acl", "models", "training", "reporting", "scripts"]
"""The packages; each imports only those before it."""


def list_modules(package: str) -> list[Path]:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules, package
    return modules


def list_imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of each name that a file imports, wherever the import stands; the name of a module is empty."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            imports += [(node.module, alias.name) for alias in node.names]
    return imports


def test_lock_pins_every_package_to_one_version() -> None:
    lines = (ROOT / "requirements.lock").read_text().split()
    assert len(lines) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)


def test_conda_environment_equals_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == (ROOT / "requirements.lock").read_text().split()


def test_importing_acl_loads_only_torch() -> None:
    code = (
        "import sys; import torch; before = set(sys.modules); import acl;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(result.stdout.split()) <= {"acl", "torch"}


def test_distribution_contains_only_acl() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["acl*"]
    assert setuptools["package-data"] == {"acl": ["py.typed"]}
    assert (ROOT / "acl" / "py.typed").exists()


@pytest.mark.parametrize("floor", FLOORS)
def test_package_imports_only_lower_floors(floor: str) -> None:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in list_modules(floor):
        imported = {module.split(".")[0] for module, _ in list_imports(path)}
        assert imported.isdisjoint([*above, "tests", "benchmarks"]), path


@pytest.mark.parametrize("package", [*FLOORS, "benchmarks"])
def test_no_private_name_is_imported_from_another_module(package: str) -> None:
    for path in list_modules(package):
        private = [
            f"{module}.{name}".rstrip(".")
            for module, name in list_imports(path)
            if module.split(".")[0] in FLOORS and any(part.startswith("_") for part in [*module.split("."), name])
        ]
        assert not private, f"{path} imports {', '.join(private)}"
