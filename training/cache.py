"""Images decoded once, into one memory-mapped file of uint8."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.errors import UsageError
from training.files import write_atomic

FORMAT = 2
CHUNK = 256
"""Images between notes of how far the cache is: what a killed process loses."""


def decoded(
    root: Path, paths: Sequence[Path], size: int, caches: Path, name: str, skip: bool = False
) -> tuple[Tensor, list[int]]:
    """The images of ``paths``, shorter side scaled to ``size`` pixels and cut square from the centre.

    They lie under ``caches``, keyed by where they come from and ``size``. A cache of other files (told by name, length
    and time), of another format, or cut short is made anew; one that was interrupted is gone on with.

    Args:
        root: the folder that ``paths`` lie under.
        name: of the data set, for people to know the cache by.
        skip: leave out images that cannot be decoded; else they are an error.

    Returns:
        (n, 3, size, size) uint8, channels last in memory, mapped from the file, and which of ``paths`` were left out.

    Raises:
        UsageError: an image that cannot be decoded, or a cache that cannot be written.
    """
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
    folder = caches / f"{name}-{size}px-{place}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # others wait for the one who decodes
            return _filled(folder, root, paths, size, skip)
    except OSError as error:
        raise UsageError(f"cannot keep decoded images in {folder}: {error.strerror or error}") from error


def _filled(folder: Path, root: Path, paths: Sequence[Path], size: int, skip: bool) -> tuple[Tensor, list[int]]:
    file, note = folder / "images.u8", folder / "cache.json"
    key, shape = _key(root, paths, size), (len(paths), size, size, 3)
    length = int(np.prod(shape))
    state = _read(note)
    if state.get("key") != key or not file.is_file() or file.stat().st_size != length:
        state = {"key": key, "done": 0, "skipped": []}
        with file.open("wb") as made:
            os.posix_fallocate(made.fileno(), 0, max(length, 1))  # a full disk is told now
            made.truncate(length)
    skipped: list[int] = list(state["skipped"])
    images = np.memmap(file, np.uint8, "r+", shape=shape)
    todo = range(state["done"], len(paths), CHUNK)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(
            desc="decoding", initial=state["done"], total=len(paths), unit="image", disable=None if todo else True
        ) as bar,
    ):
        for start in todo:
            part = paths[start : start + CHUNK]
            for i, result in enumerate(pool.map(lambda path: _decode(path, size), part), start):
                if isinstance(result, np.ndarray):
                    images[i - len(skipped)] = result
                elif skip:
                    skipped.append(i)
                else:
                    raise UsageError(
                        f"{paths[i]} cannot be decoded ({result}); mend or remove it, or leave such images out with "
                        "data.skip_undecodable=true"
                    )
            images.flush()
            state = {"key": key, "done": start + len(part), "skipped": skipped}
            write_atomic(note, json.dumps(state))
            bar.update(len(part))
    if skipped and not skip:
        raise UsageError(f"{paths[skipped[0]]} cannot be decoded; data.skip_undecodable=true leaves it out")
    if skipped:
        more = ", ..." if len(skipped) > 1 else ""
        print(f"left out {len(skipped)} images that cannot be decoded: {paths[skipped[0]]}{more}", file=sys.stderr)
    mapped = torch.from_file(str(file), shared=False, size=length, dtype=torch.uint8)
    return mapped.view(shape)[: len(paths) - len(skipped)].permute(0, 3, 1, 2), skipped


def _key(root: Path, paths: Sequence[Path], size: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {size}".encode())
    for path in paths:
        about = path.stat()
        digest.update(f"{path.relative_to(root)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read(note: Path) -> dict[str, Any]:
    try:
        state = json.loads(note.read_text())
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}


def _decode(path: Path, size: int) -> np.ndarray | str:
    """(size, size, 3) uint8, or why not."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # PIL's readers raise whatever a corrupt file makes of them
        return " ".join(str(error).split()) or type(error).__name__
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    return np.asarray(image)
