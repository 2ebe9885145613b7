"""What is kept of a run: its identity, its record, and where they lie."""

import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from training.errors import UsageError
from training.files import write_atomic

FORMAT = 1
ROOT = Path(__file__).resolve().parents[1]
# What does not change a run's result is no part of its identity.
_OUTSIDE = (
    ("paths",),
    ("logger",),
    ("data", "root"),
    ("data", "cache"),
    *(
        ("trainer", key)
        for key in ("accelerator", "strategy", "devices", "nodes", "deterministic", "compile", "checkpoint_minutes")
    ),
)


# Options that came later; at null they change nothing, so runs of before keep their identity.
_LATER = (("model", "layer", "init"), ("model", "layer", "tolerance"))


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, as written to config.yaml."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The part of the resolved configuration that a run's result depends on."""
    values = resolved(cfg)
    for *path, last in _OUTSIDE:
        node = values
        for key in path:
            node = node.get(key, {})
        node.pop(last, None)
    for *path, last in _LATER:
        node = values
        for key in path:
            node = node.get(key) or {}
        if node.get(last, 0) is None:
            del node[last]
    return values


def run_id(cfg: DictConfig) -> str:
    """12 hexadecimal digits: a hash of ``identity``."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:12]


def run_folder(cfg: DictConfig) -> Path:
    """Where a run's working files lie: ``paths.runs``/<id>."""
    return Path(cfg.paths.runs) / run_id(cfg)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def recorded(cfg: DictConfig) -> dict[str, Any] | None:
    """The record of a finished run of this configuration, if there is one.

    Raises:
        UsageError: a record that cannot be read, of another configuration, or of a newer format.
    """
    path = run_folder(cfg) / "record.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        found, config = int(record["format"]), record["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no record of a run ({error}); move it away to run this configuration") from error
    if found > FORMAT:
        raise UsageError(f"{path} has format {found}, this version reads up to {FORMAT}; use a newer version")
    if config != identity(cfg):
        raise UsageError(f"{path} is of another configuration; move it away to run this one")
    return record


def environment() -> dict[str, Any]:
    """The machine, versions and commit that a result came from."""
    names = ("torch", "torchvision", "lightning-fabric", "numpy", "scikit-learn")
    cuda = torch.cuda.is_available()
    return {
        "commit": _commit(),
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else _cpu(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with -dirty where the code differs from it; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
