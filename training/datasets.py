"""Readers for data sets in their official file layouts, and a registry of them."""

import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.error import URLError

import torch
from pydantic import ValidationError, validate_call
from scipy.io import loadmat
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

from training.errors import UsageError
from training.files import write_atomic
from training.image_folders import ImageFiles, Listing, read_imagefolder
from training.splits import Dataset, Split
from training.validation import STRICT, FilePath

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


@validate_call(config=STRICT)
def read_idx(dataset: type[datasets.MNIST], root: FilePath) -> Dataset:
    """A torchvision data set in MNIST's IDX format."""
    raw = root / dataset.__name__ / "raw"
    files = [raw / f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]
    file_names = f"{' '.join(file.name for file in files)}, plain or as .gz"
    _unpack_idx(files)
    # torchvision parses what it downloads and fails on a corrupt file without naming it; _read_idx_split names it.
    _download_missing(dataset.__name__, raw, file_names, files, lambda: dataset(str(root), download=True))
    train, test = _read_idx_split(*files[:2]), _read_idx_split(*files[2:])
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


def _read_idx_split(images_file: Path, labels_file: Path) -> Split:
    tensors = []
    for path, read in ((images_file, read_image_file), (labels_file, read_label_file)):
        try:
            tensors.append(read(str(path)))
        except Exception as error:
            raise UsageError(f"{path} is corrupt or truncated; delete it and download it again") from error
    images, labels = tensors
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or not bool((labels < 10).all()):
        raise UsageError(
            f"{images_file} and its labels do not match: {len(images)} images of "
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


def read_flowers102(files: ImageFiles) -> Dataset:
    """Oxford Flowers-102 with its official split: 1,020 / 1,020 / 6,149."""
    folder = files.root / "flowers-102"
    parts = [folder / name for name in ("setid.mat", "imagelabels.mat", "jpg")]
    file_names = "jpg/ (from 102flowers.tgz), imagelabels.mat and setid.mat"
    _download_missing("Flowers-102", folder, file_names, parts, lambda: datasets.Flowers102(files.root, download=True))
    try:
        labels = loadmat(parts[1])["labels"].ravel()
        ids = [loadmat(parts[0])[name].ravel() for name in ("trnid", "valid", "tstid")]
        listings = [[(folder / "jpg" / f"image_{i:05d}.jpg", f"{labels[i - 1]:03d}") for i in part] for part in ids]
    except Exception as error:
        raise UsageError(f"{parts[0]} or {parts[1].name} is corrupt; delete both and download them again") from error
    dataset = files.read(folder, listings)
    return replace(dataset, classes=[datasets.Flowers102.classes[int(label) - 1] for label in dataset.classes])


def read_food101(files: ImageFiles) -> Dataset:
    """Food-101 with its official test split."""
    folder = files.root / "food-101"
    parts = [folder / "meta" / "train.json", folder / "meta" / "test.json", folder / "images"]
    file_names = "images/ and meta/, from food-101.tar.gz"
    _download_missing("Food-101", folder, file_names, parts, lambda: datasets.Food101(files.root, download=True))
    listings: list[Listing] = []
    for file in parts[:2]:
        try:
            names = json.loads(file.read_text())
            listings.append(
                [(folder / "images" / f"{name}.jpg", label) for label in sorted(names) for name in sorted(names[label])]
            )
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{file} is corrupt or truncated; delete it and download it again") from error
    train, val = files.hold_out(listings[0])
    return files.read(folder, [train, val, listings[1]])


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


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": read_digits,
    "mnist": partial(read_idx, datasets.MNIST),
    "fashion_mnist": partial(read_idx, datasets.FashionMNIST),
    "cifar10": read_cifar10,
    "flowers102": lambda **options: read_flowers102(ImageFiles(**options)),
    "food101": lambda **options: read_food101(ImageFiles(**options)),
    "imagefolder": lambda **options: read_imagefolder(ImageFiles(**options)),
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
