"""Image files in folders of classes: how they are listed, split and decoded."""

import hashlib
import itertools
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from PIL import Image
from pydantic import Field

from training.errors import UsageError
from training.image_cache import load_decoded_images
from training.splits import Dataset, Split, Splits, split_by_class
from training.validation import Count, FilePath, Pixels, strict_dataclass

Share = Annotated[float, Field(gt=0, lt=1)]
Listing = list[tuple[Path, str]]
"""Pairs of an image file and the name of its class."""
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats of image files in folders: those of photographs, of the many that Pillow opens."""


@strict_dataclass
class ImageFiles:
    """The options of a data set of image files."""

    root: FilePath
    cache: FilePath
    """The folder of all decoded images."""
    title: str
    size: Pixels
    """Of the decoded images."""
    validation: Share
    """The share of each class's training images to hold out, if there is no other validation split."""
    skip_undecodable: bool
    max_images: Count | None = None
    """How many images of each split to decode; None: all."""

    def hold_out(self, listing: Listing) -> tuple[Listing, Listing]:
        """Holds out the share ``validation`` of each class, always the same images; returns training and validation."""
        labels = [label for _, label in listing]
        count = max(round(self.validation * len(listing)), len(set(labels)))
        problem = f"cannot hold out {count} of {len(listing)} training images for validation"
        kept, held_out = split_by_class(labels, problem, test_size=count, random_state=0)
        return [listing[i] for i in kept], [listing[i] for i in held_out]

    def read(self, root: Path, listings: list[Listing]) -> Dataset:
        """The data set of the training, validation and test listings; ``root`` contains their files."""
        class_sets = [{label for _, label in listing} for listing in listings]
        classes = sorted(set.union(*class_sets))
        if len(classes) == 1:
            raise UsageError(
                f"{root}: all images are of one class, '{classes[0]}'; each class needs a folder of its own"
            )
        parts = ("training", "validation", "test")
        for part, labels in zip(parts, class_sets, strict=True):
            if missing := [label for label in classes if label not in labels]:
                raise UsageError(
                    f"{root}: the {part} split lacks {len(missing)} of {len(classes)} classes, such as '{missing[0]}'; "
                    "each split needs images of every class"
                )
        digest = hashlib.sha256()
        for number, listing in enumerate(listings):
            for path, label in listing:
                if not path.is_file():
                    raise UsageError(f"{path} is listed but does not exist; download the data set again")
                name, num_bytes = normalize("NFC", path.relative_to(root).as_posix()), path.stat().st_size
                digest.update(os.fsencode(f"{number} {name} {label} {num_bytes}\n"))

        def decode() -> Splits:
            kept = [listing[: self.max_images] for listing in listings]
            paths = [path for listing in kept for path, _ in listing]
            title = re.sub(r"[^\w-]+", "-", self.title).strip("-")
            images, skipped = load_decoded_images(root, paths, self.size, self.cache, title, self.skip_undecodable)
            indices, skipped_indices = itertools.count(), set(skipped)
            labels = [[label for _, label in listing if next(indices) not in skipped_indices] for listing in kept]
            for part, listing, decoded in zip(parts, kept, labels, strict=True):
                if lost := sorted({label for _, label in listing}.difference(decoded)):
                    raise UsageError(f"{root}: no {part} image of class '{lost[0]}' can be decoded")
            # The splits are consecutive in the cache, so each is a view of it.
            views = images.split([len(decoded) for decoded in labels])
            numbers = (torch.tensor([classes.index(label) for label in decoded]) for decoded in labels)
            train, val, test = map(Split, views, numbers)
            return train, val, test

        return Dataset(classes, digest.hexdigest()[:12], decode)


def read_imagefolder(files: ImageFiles) -> Dataset:
    """The user's own images: <root>/train/<class>/*, <root>/test/<class>/* and optionally <root>/val/<class>/*."""
    listings: dict[str, Listing] = {}
    ignored: dict[str, list[Path]] = defaultdict(list)
    for part in ("train", "val", "test"):
        folder = files.root / part
        if not folder.is_dir():
            if part == "val":
                continue
            raise UsageError(
                f"no folder {folder}; data=imagefolder reads {files.root}/train/<class>/* and test/<class>/*"
            )
        try:
            listings[part] = list_images(folder, ignored)
        except OSError as error:
            raise UsageError(f"cannot list the files in {error.filename}: {error.strerror}") from error
    report_ignored(files.root, ignored)
    if "val" in listings:
        train, val = listings["train"], listings["val"]
    else:
        train, val = files.hold_out(listings["train"])
    return files.read(files.root, [train, val, listings["test"]])


def list_images(folder: Path, ignored: dict[str, list[Path]]) -> Listing:
    """Lists the images in the class folders of a split, and adds all other files to ``ignored``, by reason."""
    listing: Listing = []
    for class_folder in sorted(folder.iterdir(), key=lambda path: _by_name(str(path))):
        if not class_folder.is_dir():
            ignored["outside the class folders"].append(class_folder)
            continue
        label = normalize("NFC", class_folder.name)
        paths = list_image_files(class_folder, folder, ignored)
        listing += [(path, label) for path in paths]
        if class_folder.name.startswith("."):
            continue
        if not paths:
            raise UsageError(f"no images in {class_folder}; known: {' '.join(_list_extensions())}")
        if label.encode(errors="replace") != os.fsencode(label):
            raise UsageError(f"the name of {class_folder} is not UTF-8; rename it")
    if not listing:
        raise UsageError(f"no images in {folder}/<class>/; known: {' '.join(_list_extensions())}")
    return listing


def list_image_files(folder: Path, root: Path, ignored: dict[str, list[Path]]) -> list[Path]:
    """Lists the images below a folder by name, and adds all other files to ``ignored``, by reason.

    Args:
        folder: ``root`` or a folder in it. Links are followed, but not to ``root`` and the folders above it.
        root: what is hidden below it is ignored.
        ignored: reason -> files.
    """
    visited = {*root.resolve().parents, *folder.resolve().parents, *([root.resolve()] if folder != root else [])}
    extensions, paths = _list_extensions(), []
    for file in _list_files(folder, visited):
        path = Path(file)
        if f"{os.sep}." in file.removeprefix(str(root)):
            ignored["hidden"].append(path)
        elif path.suffix.lower() not in extensions:
            ignored["without an image extension"].append(path)
        else:
            paths.append(path)
    return paths


def report_ignored(root: Path, ignored: dict[str, list[Path]]) -> None:
    """Says on stderr how many files are ignored, and why."""
    if ignored:
        counts = [f"{len(paths)} {reason}, such as {paths[0]}" for reason, paths in ignored.items()]
        rank_zero_only(print)(f"ignored files in {root}: {'; '.join(counts)}", file=sys.stderr)


def _list_extensions() -> list[str]:
    known = Image.registered_extensions().items()
    return sorted(suffix for suffix, name in known if name in IMAGE_FORMATS and name in Image.OPEN)


def _list_files(folder: Path, visited: set[Path]) -> list[str]:
    """Lists the files below a folder by name. Follows links, but enters no folder in ``visited`` and none twice."""

    def fail(error: OSError) -> None:
        raise error

    files: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real_parent := Path(parent).resolve()) in visited:
            folders.clear()
        else:
            visited.add(real_parent)
            folders.sort(key=_by_name)
            files += [f"{parent}{os.sep}{name}" for name in names]
    return sorted(files, key=_by_name)


def _by_name(path: str) -> tuple[str, str]:
    """A sort key that orders paths part by part, and equally on file systems that decompose letters (NFD)."""
    return os.path.normcase(normalize("NFC", path)).replace(os.sep, "\0"), path
