"""Where a run goes on after it was cut off: the last two checkpoints, each with a checksum."""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from training.files import write_atomic

LAST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"


def to_bytes(state: dict[str, Any]) -> bytes:
    """What ``torch.save`` would write; a full disk then meets a plain write, which says so."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint, and keeps the one before it. ``state`` holds tensors and plain values alone."""
    content = to_bytes(state)
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / BEFORE)
    write_atomic(folder / LAST, hashlib.sha256(content).digest() + content)


def load(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint that is whole, on the CPU; None where there is none. Says so where one is damaged."""
    for path in (folder / LAST, folder / BEFORE):
        if not path.exists():
            continue
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            state: dict[str, Any] = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
            return state
        print(f"{path} is damaged; going on from the checkpoint before it", file=sys.stderr)
    return None


def delete(folder: Path) -> None:
    for name in (LAST, BEFORE):
        (folder / name).unlink(missing_ok=True)
