import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.sources import PACKAGES, ROOT
from training import provenance
from training.provenance import NOT_SOURCES, SOURCES, describe_environment, digest_sources


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with one module in each package, which replaces the project's."""
    for package in SOURCES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def compute_digest() -> str:
    return digest_sources.__wrapped__()  # not the cached value


@pytest.mark.parametrize("package", SOURCES)
def test_digest_changes_with_module_of_each_package(root: Path, package: str) -> None:
    path, before = root / package / "module.py", compute_digest()
    assert re.fullmatch("[0-9a-f]{12}", before)
    path.write_text("x = 2\n")
    assert compute_digest() != before
    path.write_text("x = 1\n")
    assert compute_digest() == before


def test_digest_changes_when_module_is_added_renamed_or_moved(root: Path) -> None:
    digests = [compute_digest()]
    (root / "acl/other.py").write_text("y = 1\n")
    digests.append(compute_digest())
    (root / "acl/other.py").rename(root / "acl/another.py")
    digests.append(compute_digest())
    (root / "acl/another.py").rename(root / "models/another.py")
    digests.append(compute_digest())
    assert len(set(digests)) == len(digests)


def test_digest_changes_when_code_moves_between_modules(root: Path) -> None:
    (root / "acl/a.py").write_text("x = 1\ny = 2\n")
    (root / "acl/b.py").write_text("z = 3\n")
    before = compute_digest()
    (root / "acl/a.py").write_text("x = 1\n")
    (root / "acl/b.py").write_text("y = 2\nz = 3\n")
    assert compute_digest() != before


def test_digest_ignores_files_that_do_not_determine_results(root: Path) -> None:
    before = compute_digest()
    (root / "acl/py.typed").touch()
    (root / "acl/__pycache__").mkdir()
    (root / "acl/__pycache__/module.pyc").write_bytes(b"compiled")
    (root / "reporting").mkdir()
    (root / "reporting/table.py").write_text("z = 1\n")
    assert compute_digest() == before


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's packages, which replaces the project."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "file", [*NOT_SOURCES, "evaluation/corruptions.py", "evaluation/run_page.py", "reporting/table.py"]
)
def test_digest_ignores_module_that_no_result_depends_on(checkout: Path, file: str) -> None:
    before, content = compute_digest(), (checkout / file).read_text()
    (checkout / file).write_text(content + "\nx = 1\n")
    assert compute_digest() == before


@pytest.mark.parametrize("file", ["acl/kernels.py", "training/loop.py", "models/families/resnet.py"])
def test_digest_changes_with_module_that_determines_results(checkout: Path, file: str) -> None:
    (checkout / file).parent.mkdir(exist_ok=True)
    before = compute_digest()
    with (checkout / file).open("a") as source:
        source.write("\nx = 1\n")
    assert compute_digest() != before


def test_environment_contains_digest_and_versions() -> None:
    environment = describe_environment(torch.device("cpu"))
    assert environment["sources"] == digest_sources() == compute_digest()
    assert {"python", "torch", "torchvision", "numpy"} <= set(environment["versions"])
    assert environment["machine"]["threads"] >= 1 and environment["machine"]["device"]


def test_commit_is_none_outside_checkout(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    assert provenance._find_commit.__wrapped__() is None  # not the cached value


@pytest.mark.parametrize("name", [".venv", "data", "runs"])
def test_commit_is_not_dirty_if_folder_is_link_to_another_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(ROOT / ".gitignore", checkout)
    commit = ["commit", "--quiet", "--message", "."]
    for command in (["init", "--quiet"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", *commit]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / name).symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setattr(provenance, "ROOT", checkout)
    found = provenance._find_commit.__wrapped__()  # not the cached value
    assert re.fullmatch("[0-9a-f]{40}", str(found))


def test_device_is_the_one_that_computes_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert describe_environment(torch.device("cpu"))["machine"]["device"] != "a GPU"
    assert describe_environment(torch.device("cuda"))["machine"]["device"] == "a GPU"
