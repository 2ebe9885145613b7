"""Where a result comes from: machine, library versions, commit, and a digest of the sources."""

import functools
import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("acl", "models", "training")
"""The packages that determine the result of a run, with their subfolders."""
NOT_SOURCES = ("acl/explain.py", "acl/plot.py", "acl/transform.py", "training/cli.py", "training/loggers.py")
"""Their modules that no result depends on: they start scripts, log, draw, or act on trained networks."""


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describes the machine, versions, commit and sources that produce a result.

    Commit and sources are those at the first call of the process, since they can be edited while it runs.

    Args:
        device: the device that computes the result.
    """
    packages = ("torch", "torchvision", "lightning-fabric", "numpy", "scikit-learn", "pillow", "timm")
    return {
        "commit": _find_commit(),
        "sources": digest_sources(),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _describe_cpu(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


@functools.cache
def digest_sources() -> str:
    """12 hexadecimal digits: a hash of the source files of ``SOURCES`` without ``NOT_SOURCES``."""
    digest = hashlib.sha256()
    files = {path.relative_to(ROOT).as_posix() for package in SOURCES for path in (ROOT / package).rglob("*.py")}
    for name in sorted(files.difference(NOT_SOURCES)):
        content = (ROOT / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def digest_file(file: Path) -> str | None:
    """12 hexadecimal digits: a hash of a file; None if there is no such file."""
    if not file.is_file():
        return None
    stat = file.stat()
    return _digest_content(file, stat.st_size, stat.st_mtime_ns)


@functools.cache  # many runs share a file of pretrained weights
def _digest_content(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:12]


def find_changed_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names the inputs of a run that differ.

    Args:
        old, new: with ``data`` and ``pretrained`` as in records; a digest that is missing is unknown, not different.
    """
    digests = {
        "data": [(inputs.get("data") or {}).get("digest") for inputs in (old, new)],
        "pretrained weights": [inputs.get("pretrained") for inputs in (old, new)],
    }
    return [name for name, pair in digests.items() if None not in pair and pair[0] != pair[1]]


def _describe_cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _find_commit() -> str | None:
    """The checkout's commit, with -dirty if there are uncommitted changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        is_dirty = bool(git("status", "--porcelain", "--", ".", ":!results"))
        return git("rev-parse", "HEAD") + ("-dirty" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
