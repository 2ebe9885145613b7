"""Dependencies, packaging, and the imports between packages."""

import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.sources import PACKAGES, ROOT, list_imports, list_modules

PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    "darwin": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix"},
    "win32": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
}
"""Environment markers of the platforms that requirements.lock covers."""
LOCK = (ROOT / "requirements.lock").read_text()
PINS = [Requirement(line) for line in LOCK.splitlines() if not line.lstrip().startswith("#")]


def list_pins(platform: str) -> list[tuple[str, str]]:
    """The (name, version) pairs that pip installs from requirements.lock on a platform."""
    selected = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(PLATFORMS[platform])]
    return [(canonicalize_name(pin.name), str(pin.specifier).removeprefix("==")) for pin in selected]


def list_unfulfilled(requirements: list[str], platform: str) -> list[str]:
    """The requirements, without those of extras, that requirements.lock does not fulfill on a platform."""
    pins = dict(list_pins(platform))
    unfulfilled = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({**PLATFORMS[platform], "extra": ""}):
            pin = pins.get(canonicalize_name(requirement.name))
            if pin is None or not requirement.specifier.contains(pin, prereleases=True):
                unfulfilled.append(f"{requirement} (locked: {pin})")
    return unfulfilled


def test_requirements_lock_says_how_it_is_made() -> None:
    assert re.match(r"#.*\n# +make lock\n", LOCK)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_requirements_lock_pins_each_package_once(platform: str) -> None:
    names = [name for name, _ in list_pins(platform)]
    assert len(names) > 50 and len(set(names)) == len(names)
    assert all(re.fullmatch("==[A-Za-z0-9.!]+", str(pin.specifier)) and not pin.url for pin in PINS)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_requirements_lock_fulfills_pyproject(platform: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert not list_unfulfilled(
        [requirement for requirement in direct if not requirement.startswith("anann[")], platform
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_requirements_lock_fulfills_requirements_of_its_packages(platform: str) -> None:
    installed = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    for name, _ in list_pins(platform):
        if name in installed:  # the metadata of packages for other platforms are not at hand
            assert not list_unfulfilled(importlib.metadata.requires(name) or [], platform), name


def test_requirements_lock_has_cuda_on_linux_only() -> None:
    for platform in PLATFORMS:
        assert any(name.startswith("nvidia-") for name, _ in list_pins(platform)) == (platform == "linux")


def test_conda_environment_installs_requirements_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"pip": ["-r requirements.lock"]} in environment["dependencies"]


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
