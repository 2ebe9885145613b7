"""Readers for data sets in their official file layouts, and a registry of them."""

import functools
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated
from unicodedata import normalize
from urllib.error import URLError

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from PIL import Image
from pydantic import Field, ValidationError, validate_call
from scipy.io import loadmat
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

from training.errors import UsageError
from training.files import write_atomic
from training.image_cache import load_decoded_images
from training.validation import STRICT, Count, FilePath, Pixels

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Split:
    images: Tensor  # (n, channels, height, width) uint8
    labels: Tensor  # (n,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def sample(self, count: int) -> "Split":
        """The same ``count`` random images every time, in random order; all images if there are fewer."""
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count]]

    def to(self, device: torch.device) -> "Split":
        images, labels = self.images, self.labels
        if device.type == "cuda" and not images.is_cuda:  # pinned memory lets the copy overlap with computation
            images, labels = images.pin_memory(), labels.pin_memory()
        return Split(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))


Splits = tuple[Split, Split, Split]
"""The training, validation and test splits."""


@dataclass(frozen=True)
class Dataset:
    """A data set whose image files are listed, but not decoded yet."""

    classes: list[str]  # names, by label
    digest: str  # 12 hexadecimal digits: a hash of the splits, labels and pixels (of image files: names and sizes)
    load: Callable[[], Splits]


Listing = list[tuple[Path, str]]
"""Pairs of an image file and the name of its class."""
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats of image files in folders: those of photographs, of the many that Pillow opens."""
_MAY_DOWNLOAD = ContextVar("_MAY_DOWNLOAD", default=True)


@validate_call(config=STRICT)
def read_digits(root: FilePath) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, scaled from 8 x 8 to 28 x 28; a fixed fifth is the test set.

    ``root`` is not used: the images come with scikit-learn.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).round().to(torch.uint8)
    split = Split(images, torch.from_numpy(bunch.target).long())
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(1))
    return _split_validation(split[order[360:]], split[order[:360]], 200, [str(digit) for digit in range(10)])


_IDX_SPLITS = ("train", "t10k")
_IDX_PARTS = ("images-idx3", "labels-idx1")


@validate_call(config=STRICT)
def read_idx(dataset: type[datasets.MNIST], root: FilePath) -> Dataset:
    """A torchvision data set in MNIST's IDX format."""
    raw = root / dataset.__name__ / "raw"
    files = [_idx_path(raw, split, part) for split in _IDX_SPLITS for part in _IDX_PARTS]
    file_names = f"{' '.join(file.name for file in files)}, plain or as .gz"
    _unpack_idx(files)
    # torchvision parses what it downloads and fails on a corrupt file without naming it; _read_idx_split names it.
    _download_missing(dataset.__name__, raw, file_names, files, lambda: dataset(str(root), download=True))
    train, test = (_read_idx_split(raw, split) for split in _IDX_SPLITS)
    # MNIST's "0 - zero" becomes "0", as in digits, so that a network of one can be evaluated on the other.
    return _split_validation(train, test, 5000, [name.partition(" - ")[0] for name in dataset.classes])


def _unpack_idx(files: list[Path]) -> None:
    """Unpacks the .gz of each missing file; torchvision unpacks only those with the official checksum."""
    for file in files:
        packed = file.with_name(f"{file.name}.gz")
        if packed.exists() and not file.exists():
            try:
                write_atomic(file, gzip.decompress(packed.read_bytes()))
            except (EOFError, zlib.error, gzip.BadGzipFile):
                continue  # a download that was interrupted, which torchvision repeats


def _idx_path(raw: Path, split: str, part: str) -> Path:
    return raw / f"{split}-{part}-ubyte"


def _read_idx_split(raw: Path, split: str) -> Split:
    tensors = []
    for part, read in zip(_IDX_PARTS, (read_image_file, read_label_file), strict=True):
        path = _idx_path(raw, split, part)
        try:
            tensors.append(read(str(path)))
        except Exception as error:
            raise UsageError(f"{path} is corrupt or truncated; delete it and download it again") from error
    images, labels = tensors
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or not bool((labels < 10).all()):
        raise UsageError(
            f"{_idx_path(raw, split, _IDX_PARTS[0])} and its labels do not match: {len(images)} images of "
            f"{images.shape[1]} x {images.shape[2]}, {len(labels)} labels up to {int(labels.max())}; delete both and "
            "download them again"
        )
    return Split(images[:, None], labels)


@validate_call(config=STRICT)
def read_cifar10(root: FilePath) -> Dataset:
    """CIFAR-10 from its official Python files, whose checksums torchvision verifies before reading them."""
    folder = root / datasets.CIFAR10.base_folder
    files = [folder / name for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]
    file_names = f"{' '.join(file.name for file in files)} and batches.meta, from cifar-10-python.tar.gz"
    _download_missing("CIFAR-10", folder, file_names, files, lambda: datasets.CIFAR10(str(root), download=True))
    splits = []
    for train in (True, False):
        try:
            part = datasets.CIFAR10(str(root), train=train)
        except Exception as error:
            raise UsageError(
                f"a file in {folder} is corrupt or truncated; delete the folder and download it again"
            ) from error
        splits.append(Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)))
    return _split_validation(splits[0], splits[1], 5000, part.classes)


@validate_call(config=STRICT)
def read_flowers102(
    root: FilePath,
    cache: FilePath,
    title: str,
    size: Pixels,
    validation: Share,
    skip_undecodable: bool,
    max_images: Count | None = None,
) -> Dataset:
    """Oxford Flowers-102 with its official split: 1,020 / 1,020 / 6,149. ``validation`` is not used."""
    folder = root / "flowers-102"
    files = [folder / name for name in ("setid.mat", "imagelabels.mat", "jpg")]
    file_names = "jpg/ (from 102flowers.tgz), imagelabels.mat and setid.mat"
    _download_missing("Flowers-102", folder, file_names, files, lambda: datasets.Flowers102(root, download=True))
    try:
        labels = loadmat(files[1])["labels"].ravel()
        ids = [loadmat(files[0])[part].ravel() for part in ("trnid", "valid", "tstid")]
        listings = [[(folder / "jpg" / f"image_{i:05d}.jpg", f"{labels[i - 1]:03d}") for i in part] for part in ids]
    except Exception as error:
        raise UsageError(f"{files[0]} or {files[1].name} is corrupt; delete both and download them again") from error
    dataset = _read_image_files(folder, listings, cache, title, size, skip_undecodable, max_images)
    return replace(dataset, classes=[datasets.Flowers102.classes[int(label) - 1] for label in dataset.classes])


@validate_call(config=STRICT)
def read_food101(
    root: FilePath,
    cache: FilePath,
    title: str,
    size: Pixels,
    validation: Share,
    skip_undecodable: bool,
    max_images: Count | None = None,
) -> Dataset:
    """Food-101 with its official test split; ``validation`` is the share of each class's training images held out."""
    folder = root / "food-101"
    files = [folder / "meta" / "train.json", folder / "meta" / "test.json", folder / "images"]
    file_names = "images/ and meta/, from food-101.tar.gz"
    _download_missing("Food-101", folder, file_names, files, lambda: datasets.Food101(root, download=True))
    listings: list[Listing] = []
    for file in files[:2]:
        try:
            names = json.loads(file.read_text())
            listings.append(
                [(folder / "images" / f"{name}.jpg", label) for label in sorted(names) for name in sorted(names[label])]
            )
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{file} is corrupt or truncated; delete it and download it again") from error
    train, val = _split_listing(listings[0], validation)
    return _read_image_files(folder, [train, val, listings[1]], cache, title, size, skip_undecodable, max_images)


@validate_call(config=STRICT)
def read_imagefolder(
    root: FilePath,
    cache: FilePath,
    title: str,
    size: Pixels,
    validation: Share,
    skip_undecodable: bool,
    max_images: Count | None = None,
) -> Dataset:
    """The user's own images: <root>/train/<class>/*, <root>/test/<class>/* and optionally <root>/val/<class>/*.

    ``validation`` is the share of each class's training images to hold out if there is no val/.
    """
    listings: dict[str, Listing] = {}
    ignored: dict[str, list[Path]] = defaultdict(list)
    for part in ("train", "val", "test"):
        folder = root / part
        if not folder.is_dir():
            if part == "val":
                continue
            raise UsageError(f"no folder {folder}; data=imagefolder reads {root}/train/<class>/* and test/<class>/*")
        try:
            listings[part] = _list_images(folder, ignored)
        except OSError as error:
            raise UsageError(f"cannot list the files in {error.filename}: {error.strerror}") from error
    if ignored:
        counts = [f"{len(paths)} {reason}, such as {paths[0]}" for reason, paths in ignored.items()]
        rank_zero_only(print)(f"ignored files in {root}: {'; '.join(counts)}", file=sys.stderr)
    if "val" in listings:
        train, val = listings["train"], listings["val"]
    else:
        train, val = _split_listing(listings["train"], validation)
    return _read_image_files(root, [train, val, listings["test"]], cache, title, size, skip_undecodable, max_images)


def _list_images(folder: Path, ignored: dict[str, list[Path]]) -> Listing:
    """Lists the images in the class folders of a split, and adds all other files to ``ignored``, by reason."""
    extensions = sorted(
        suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS and name in Image.OPEN
    )
    listing: Listing = []
    real_folder = folder.resolve()
    for class_folder in sorted(folder.iterdir(), key=lambda path: _by_name(str(path))):
        if not class_folder.is_dir():
            ignored["outside the class folders"].append(class_folder)
            continue
        label, num_listed = normalize("NFC", class_folder.name), len(listing)
        for file in _list_files(class_folder, {real_folder, *real_folder.parents, *class_folder.resolve().parents}):
            path = Path(file)
            if f"{os.sep}." in file.removeprefix(str(folder)):
                ignored["hidden"].append(path)
            elif path.suffix.lower() not in extensions:
                ignored["without an image extension"].append(path)
            else:
                listing.append((path, label))
        if class_folder.name.startswith("."):
            continue
        if len(listing) == num_listed:
            raise UsageError(f"no images in {class_folder}; known: {' '.join(extensions)}")
        if label.encode(errors="replace") != os.fsencode(label):
            raise UsageError(f"the name of {class_folder} is not UTF-8; rename it")
    if not listing:
        raise UsageError(f"no images in {folder}/<class>/; known: {' '.join(extensions)}")
    return listing


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


def _split_validation(train: Split, test: Split, count: int, classes: list[str]) -> Dataset:
    """Holds out ``count`` images of an official training set for validation, always the same ones."""
    if len(train) <= count:
        raise UsageError(f"{len(train)} training images are too few to hold out {count} for validation")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    splits = train[order[count:]], train[order[:count]], test
    digest = hashlib.sha256()
    for tensor in (tensor for split in splits for tensor in (split.labels, split.images)):
        digest.update(tensor.contiguous().numpy().data)
    return Dataset(classes, digest.hexdigest()[:12], lambda: splits)


def _split_listing(listing: Listing, share: float) -> tuple[Listing, Listing]:
    """Holds out a share of each class for validation, always the same images."""
    from sklearn.model_selection import train_test_split  # imported here because it takes over a second

    labels = [label for _, label in listing]
    count = max(round(share * len(listing)), len(set(labels)))
    try:
        kept, held_out = train_test_split(range(len(listing)), test_size=count, stratify=labels, random_state=0)
    except ValueError as error:
        raise UsageError(
            f"cannot hold out {count} of {len(listing)} training images for validation: {error}"
        ) from error
    return [listing[i] for i in sorted(kept)], [listing[i] for i in sorted(held_out)]


def _download_missing(
    title: str, folder: Path, file_names: str, files: list[Path], download: Callable[[], object]
) -> None:
    """Downloads a data set with torchvision unless all its files exist.

    Raises:
        UsageError: if files are missing and cannot be downloaded; the message says which files to put where.
    """
    if all(file.exists() for file in files):
        return
    if not _MAY_DOWNLOAD.get():
        raise UsageError(f"{title} is not in {folder}")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        download()
    except Exception as error:  # no network, a full disk, or any error that a corrupt file causes
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if not all(file.exists() for file in files):
            reason = "" if isinstance(error, URLError | RuntimeError) else f" ({error})"
            raise UsageError(
                f"{title} is not in {folder} and could not be downloaded{reason}; put {file_names} there, "
                "or use data=digits, which needs no files"
            ) from error


def _read_image_files(
    root: Path,
    listings: list[Listing],
    cache: Path,
    title: str,
    size: int,
    skip_undecodable: bool,
    max_images: int | None,
) -> Dataset:
    """The data set of the training, validation and test listings; only ``max_images`` of each are decoded."""
    class_sets = [{label for _, label in listing} for listing in listings]
    classes = sorted(set.union(*class_sets))
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
        kept = [listing[:max_images] for listing in listings]
        paths = [path for listing in kept for path, _ in listing]
        cache_title = re.sub(r"[^\w-]+", "-", title).strip("-")
        images, skipped = load_decoded_images(root, paths, size, cache, cache_title, skip_undecodable)
        skipped_indices = set(skipped)
        splits, first_image, first_path = [], 0, 0
        for part, listing in zip(parts, kept, strict=True):
            labels_kept = [label for i, (_, label) in enumerate(listing, first_path) if i not in skipped_indices]
            # The splits are consecutive in the cache, so each is a view of it.
            view = images[first_image : first_image + len(labels_kept)]
            if lost := sorted({label for _, label in listing} - set(labels_kept)):
                raise UsageError(f"{root}: no {part} image of class '{lost[0]}' can be decoded")
            splits.append(Split(view, torch.tensor([classes.index(label) for label in labels_kept])))
            first_image, first_path = first_image + len(labels_kept), first_path + len(listing)
        return splits[0], splits[1], splits[2]

    return Dataset(classes, digest.hexdigest()[:12], decode)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": read_digits,
    "mnist": partial(read_idx, datasets.MNIST),
    "fashion_mnist": partial(read_idx, datasets.FashionMNIST),
    "cifar10": read_cifar10,
    "flowers102": read_flowers102,
    "food101": read_food101,
    "imagefolder": read_imagefolder,
}
"""Readers by ``data.name``. Each takes its options of ``configs/data/<name>.yaml`` as keyword arguments."""


@functools.cache
def digest_dataset(name: str, options: str) -> str | None:
    """The digest of a data set as it is now, without decoding image files; None if it cannot be read here.

    Computed once per process, since many runs share a data set.

    Args:
        name: one of ``DATASETS``.
        options: the reader's keyword arguments, in JSON.
    """
    token = _MAY_DOWNLOAD.set(False)
    try:
        return DATASETS[name](**json.loads(options)).digest
    except (OSError, UsageError, ValidationError):
        return None
    finally:
        _MAY_DOWNLOAD.reset(token)
