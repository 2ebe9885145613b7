"""Decodes images once, into one memory-mapped uint8 file."""

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.ExifTags import Base
from torch import Tensor
from tqdm import tqdm

from training.errors import UsageError
from training.files import UNFINISHED, write_atomic

FORMAT = 3
CHUNK = 256
"""Images between updates of the progress file; a killed process loses the work on at most this many."""
_REMEDY = "repair or remove it; a new run leaves out such images with data.skip_undecodable=true"


def load_decoded_images(
    root: Path, paths: Sequence[Path], size: int, cache: Path, title: str, skip_undecodable: bool = False
) -> tuple[Tensor, list[int]]:
    """Loads the images of ``paths``, resized to ``size`` pixels on the shorter side and center-cropped to a square.

    They are stored under ``cache``, in a folder for their ``root`` and ``size``, with one file per set of images (by
    name, length and modification time). A complete file is never modified, since other processes may have mapped it.
    Interrupted decoding resumes.

    Args:
        root: the folder that contains ``paths``.
        paths: image files.
        size: of the decoded images, in pixels.
        cache: the folder of all caches.
        title: of the data set; part of the folder's name.
        skip_undecodable: leave out images that cannot be decoded instead of raising an error.

    Returns:
        (n, 3, size, size) uint8, channels last, memory-mapped; and the indices of the images left out.

    Raises:
        UsageError: for an image that cannot be decoded, or a cache that cannot be written.
    """
    root_digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
    folder = cache / f"{title}-{size}px-{root_digest}"
    try:
        key = _compute_cache_key(root, paths, size)
        complete = _find_decoded(folder, key, paths, size)  # without the lock, for a cache that can only be read
        if complete is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{key[:16]}.lock"):  # other processes wait for the one that decodes
                complete = _find_decoded(folder, key, paths, size)
                complete = complete or _decode_all(folder, key, root, paths, size, skip_undecodable)
        images_file, skipped = complete
    except OSError as error:
        raise UsageError(f"cannot store decoded images in {folder}: {error.strerror or error}") from error
    if skipped and not skip_undecodable:
        raise UsageError(f"{paths[skipped[0]]} cannot be decoded; {_REMEDY}")
    if skipped:
        more = ", ..." if len(skipped) > 1 else ""
        print(f"left out {len(skipped)} images that cannot be decoded: {paths[skipped[0]]}{more}", file=sys.stderr)
    shape = (len(paths), size, size, 3)
    mapped = torch.from_file(str(images_file), shared=False, size=math.prod(shape), dtype=torch.uint8)
    return mapped.view(shape)[: len(paths) - len(skipped)].permute(0, 3, 1, 2), skipped


def _name_files(folder: Path, key: str) -> tuple[Path, Path]:
    """The file of the decoded images, and that of the progress."""
    return folder / f"images-{key[:16]}.u8", folder / f"images-{key[:16]}.json"


def _find_decoded(folder: Path, key: str, paths: Sequence[Path], size: int) -> tuple[Path, list[int]] | None:
    """The complete file of the decoded images and the indices of those that cannot be decoded; None without one."""
    images_file, progress_file = _name_files(folder, key)
    progress = _read_progress(progress_file)
    is_complete = images_file.is_file() and images_file.stat().st_size == len(paths) * size * size * 3
    if is_complete and progress.get("key") == key and progress["done"] == len(paths):
        return images_file, progress["skipped"]
    return None


def _decode_all(
    folder: Path, key: str, root: Path, paths: Sequence[Path], size: int, skip_undecodable: bool
) -> tuple[Path, list[int]]:
    """Decodes the images, or goes on where another process stopped; returns what ``_find_decoded`` does."""
    images_file, progress_file = _name_files(folder, key)
    progress = _read_progress(progress_file)
    num_bytes = len(paths) * size * size * 3
    unfinished_file = folder / f"{UNFINISHED}{images_file.name}"
    if progress.get("key") != key or not unfinished_file.is_file() or unfinished_file.stat().st_size != num_bytes:
        progress = {"key": key, "done": 0, "skipped": []}
        with unfinished_file.open("wb") as file:
            _allocate(file, num_bytes)
    skipped: list[int] = list(progress["skipped"])
    images = np.memmap(unfinished_file, np.uint8, "r+", shape=(len(paths), size, size, 3))
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc="decoding", initial=progress["done"], total=len(paths), unit="image", disable=None) as progress_bar,
    ):
        for start in range(progress["done"], len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            for i, decoded in enumerate(pool.map(lambda path: _decode(path, size), chunk), start):
                if isinstance(decoded, np.ndarray):
                    images[i - len(skipped)] = decoded
                elif skip_undecodable:
                    skipped.append(i)
                else:
                    raise UsageError(f"{paths[i]} cannot be decoded ({decoded}); {_REMEDY}")
            images.flush()
            write_atomic(progress_file, json.dumps({"key": key, "done": start + len(chunk), "skipped": skipped}))
            progress_bar.update(len(chunk))
    if _compute_cache_key(root, paths, size) != key:
        raise UsageError(f"images in {root} changed while they were decoded; try again")
    del images  # Windows cannot move a mapped file
    unfinished_file.replace(images_file)
    return images_file, skipped


def _allocate(file: BinaryIO, num_bytes: int) -> None:
    """Gives a new file its size. A full disk raises OSError now; midway, a write to the mapped file would crash."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
    elif shutil.disk_usage(file.name).free < num_bytes:  # macOS and Windows
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file.truncate(num_bytes)


def _compute_cache_key(root: Path, paths: Sequence[Path], size: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {size}".encode())
    for path in paths:
        stat = path.stat()
        digest.update(os.fsencode(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n"))
    return digest.hexdigest()


def _read_progress(file: Path) -> dict[str, Any]:
    try:
        progress = json.loads(file.read_text())
        return progress if isinstance(progress, dict) else {}
    except (OSError, ValueError):
        return {}


def _decode(path: Path, size: int) -> np.ndarray | str:
    """Returns a (size, size, 3) uint8 array, or the reason why the image cannot be decoded."""
    try:
        with Image.open(path) as opened:
            image = _convert_to_rgb(opened)
    except Exception as error:  # PIL raises many types of errors for corrupt files
        return " ".join(str(error).split()) or type(error).__name__
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    return np.asarray(image)


def _convert_to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    """Converts an image of any mode and depth to upright 8-bit RGB, on white where it is transparent.

    Raises:
        ValueError: for an image whose range of values is unknown, or that Pillow decodes wrongly.
    """
    tags: Any = getattr(image, "tag_v2", {})
    key = image.info.get("transparency")
    bits, is_compressed = max(tags.get(Base.BitsPerSample, (16,))), tags.get(Base.Compression, 1) != 1
    if (
        (bits < 32 and 2 in tags.get(Base.SampleFormat, ()))  # signed
        or (bits > 8 and tags.get(Base.PlanarConfiguration) == 2 and not is_compressed)
        or (bits > 16 and tags.prefix == b"MM" and is_compressed)
    ):
        raise ValueError("unusual kind of TIFF; save it with unsigned integers, little-endian, in one plane")
    rawmode = image.tile[0][3] if image.format == "PNG" else None
    if key is not None and rawmode == "RGB;16B":
        raise ValueError("16-bit transparent color; save it with an alpha channel")
    if key is not None and rawmode in ("L;2", "L;4"):  # Pillow scales the pixels, but not the transparent value
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]
    image.load()
    if image.mode[0] in "IF":
        values = np.asarray(image)
        low, high, white = values.min(), values.max(), 1 if image.mode == "F" else 2 ** min(bits, 16) - 1
        if not 0 <= low <= high <= white or (image.mode == "I" and bits == 32 and 0 < high < 256):
            raise ValueError(
                f"{values.dtype} values from {low:g} to {high:g}, whose white is unknown; save it with 8 or 16 bits, "
                "or as floating-point numbers from 0 to 1"
            )
        if tags and not tags.get(Base.PhotometricInterpretation):  # zero is white
            values = white - values
        gray = np.where(values == key, 255, np.rint(values * (255 / white)))
        rgb = Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), straight.convert("RGBA")).convert("RGB")
    elif image.mode == "LAB":  # convert("RGB") interpolates in a coarse table, with errors of up to 30 gray levels
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.buildTransform(lab, srgb, "LAB", "RGB", flags=ImageCms.Flags.NOOPTIMIZE).apply(image)
    else:
        rgb = image.convert("RGB")
    rgb.info.clear()  # damaged EXIF data are no reason to leave out an image
    with suppress(Exception):
        rgb.getexif()[Base.Orientation] = image.getexif()[Base.Orientation]
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb
