"""Dependencies, packaging, and the imports between packages."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.sources import PACKAGES, ROOT, list_imports, list_modules


def test_requirements_lock_pins_each_package_once() -> None:
    lines = (ROOT / "requirements.lock").read_text().split()
    assert len(lines) > 50
    assert len({re.sub("[-_.]+", "-", line.partition("==")[0].lower()) for line in lines}) == len(lines)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)


def test_conda_environment_equals_requirements_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == (ROOT / "requirements.lock").read_text().split()


def test_importing_acl_loads_only_torch_and_safetensors() -> None:
    code = (
        "import sys; import torch; before = set(sys.modules); import acl;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(result.stdout.split()) <= {"acl", "safetensors", "torch"}


def test_distribution_contains_only_acl() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["acl*"]
    assert setuptools["package-data"] == {"acl": ["py.typed"]}
    assert (ROOT / "acl" / "py.typed").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_packages_before_it(package: str) -> None:
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    for path in list_modules(package):
        imported = {module.split(".")[0] for module, _ in list_imports(path)}
        assert imported.isdisjoint([*later, "tests", "benchmarks"]), path


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_no_private_name_is_imported_from_another_module(package: str) -> None:
    for path in list_modules(package):
        private = [
            f"{module}.{name}".rstrip(".")
            for module, name in list_imports(path)
            if module.split(".")[0] in PACKAGES and any(part.startswith("_") for part in [*module.split("."), name])
        ]
        assert not private, f"{path} imports {', '.join(private)}"
