"""Where the images of each data set come from, in its official layout, and which are for what."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from omegaconf import DictConfig
from scipy.io import loadmat
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_image_file, read_label_file

from training.cache import decoded
from training.errors import UsageError


@dataclass(frozen=True)
class Split:
    images: Tensor  # (n, channels, height, width) uint8
    labels: Tensor  # (n,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        images, labels = self.images, self.labels
        if device.type == "cuda" and not images.is_cuda:  # so that the copy runs beside what the device is at
            images, labels = images.pin_memory(), labels.pin_memory()
        return Split(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))


Splits = tuple[Split, Split, Split]
"""For training, validation and test."""
Listing = list[tuple[Path, str]]
"""Image files and the names of their classes."""


def _carved(train: Split, test: Split, validation: int) -> Splits:
    """Takes ``validation`` images out of an official training set, always the same ones."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train[order[validation:]], train[order[:validation]], test


def _digits(cfg: DictConfig) -> Splits:
    """scikit-learn's bundled 1,797 handwritten digits, 8 x 8, scaled to 28 x 28; a fixed fifth is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).round().to(torch.uint8)
    everything = Split(images, torch.from_numpy(bunch.target).long())
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(1))
    return _carved(everything[order[360:]], everything[order[:360]], 200)


def _idx(dataset: type[datasets.MNIST]) -> Callable[[DictConfig], Splits]:
    """A reader of a torchvision data set in MNIST's IDX format."""

    def read(cfg: DictConfig) -> Splits:
        root = Path(cfg.root)
        raw = root / dataset.__name__ / "raw"
        files = [_idx_file(raw, split, part) for split in _IDX_SPLITS for part in _IDX_PARTS]
        wanted = f"{' '.join(file.name for file in files)}, as they are or as .gz"
        # torchvision reads what it downloads, and so trips over a corrupt file, which is looked for by name below.
        _download(dataset.__name__, raw, wanted, files, lambda: dataset(str(root), download=True))
        train, test = (_read_idx(raw, split) for split in _IDX_SPLITS)
        return _carved(train, test, 5000)

    return read


_IDX_SPLITS = ("train", "t10k")
_IDX_PARTS = ("images-idx3", "labels-idx1")


def _idx_file(raw: Path, split: str, part: str) -> Path:
    return raw / f"{split}-{part}-ubyte"


def _read_idx(raw: Path, split: str) -> Split:
    tensors = []
    for part, read in zip(_IDX_PARTS, (read_image_file, read_label_file), strict=True):
        path = _idx_file(raw, split, part)
        try:
            tensors.append(read(str(path)))
        except Exception as error:
            raise UsageError(f"{path} is corrupt or cut short; delete it and get it anew") from error
    images, labels = tensors
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or not bool((labels < 10).all()):
        raise UsageError(
            f"{_idx_file(raw, split, _IDX_PARTS[0])} and its labels do not fit: {len(images)} images of "
            f"{images.shape[1]} x {images.shape[2]}, {len(labels)} labels up to {int(labels.max())}"
        )
    return Split(images[:, None], labels)


def _download(name: str, folder: Path, wanted: str, needed: list[Path], download: Callable[[], object]) -> None:
    """Has torchvision download a data set unless all that is needed is there.

    Raises:
        UsageError: it is not, and could not be downloaded.
    """
    if all(path.exists() for path in needed):
        return
    parents = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        download()
    except Exception as error:  # no network, no space, or whatever a corrupt file makes of it
        for path in parents:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if not all(path.exists() for path in needed):
            reason = "" if isinstance(error, URLError | RuntimeError) else f" ({error})"
            raise UsageError(
                f"no {name} in {folder} and none could be downloaded{reason}; put there: {wanted}; "
                "data=digits needs no files"
            ) from error


def _cifar10(cfg: DictConfig) -> Splits:
    """CIFAR-10 in its official Python files, whose checksums torchvision verifies before it reads them."""
    root = Path(cfg.root)
    folder = root / datasets.CIFAR10.base_folder
    files = [folder / name for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]
    wanted = f"{' '.join(file.name for file in files)} and batches.meta, of cifar-10-python.tar.gz"
    _download("CIFAR-10", folder, wanted, files, lambda: datasets.CIFAR10(str(root), download=True))
    splits = []
    for train in (True, False):
        try:
            read = datasets.CIFAR10(str(root), train=train)
        except Exception as error:
            raise UsageError(
                f"a file in {folder} is corrupt or cut short; delete the folder and get it anew"
            ) from error
        splits.append(Split(torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets)))
    return _carved(splits[0], splits[1], 5000)


def _flowers102(cfg: DictConfig) -> Splits:
    """Oxford Flowers-102 with its official split: 1,020 / 1,020 / 6,149."""
    folder = Path(cfg.root) / "flowers-102"
    files = [folder / name for name in ("setid.mat", "imagelabels.mat", "jpg")]
    wanted = "jpg/ (of 102flowers.tgz), imagelabels.mat and setid.mat"
    _download("Flowers-102", folder, wanted, files, lambda: datasets.Flowers102(cfg.root, download=True))
    try:
        labels = loadmat(files[1])["labels"].ravel()
        parts = [loadmat(files[0])[part].ravel() for part in ("trnid", "valid", "tstid")]
        train, val, test = (
            [(folder / "jpg" / f"image_{i:05d}.jpg", f"{labels[i - 1]:03d}") for i in part] for part in parts
        )
    except Exception as error:
        raise UsageError(f"{files[0]} or {files[1].name} is corrupt: delete both and get them anew") from error
    return _from_files(cfg, folder, train, val, test)


def _food101(cfg: DictConfig) -> Splits:
    """Food-101 with its official split; the validation images come out of each class's training images."""
    folder = Path(cfg.root) / "food-101"
    files = [folder / "meta" / "train.json", folder / "meta" / "test.json", folder / "images"]
    wanted = "images/ and meta/, of food-101.tar.gz"
    _download("Food-101", folder, wanted, files, lambda: datasets.Food101(cfg.root, download=True))
    listings: list[Listing] = []
    for file in files[:2]:
        try:
            listed = json.loads(file.read_text())
            listings.append(
                [(folder / "images" / f"{name}.jpg", kind) for kind in sorted(listed) for name in sorted(listed[kind])]
            )
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{file} is corrupt or cut short; delete it and get it anew") from error
    train, val = _held_out(listings[0], cfg.validation)
    return _from_files(cfg, folder, train, val, listings[1])


def _imagefolder(cfg: DictConfig) -> Splits:
    """Anyone's images: <root>/train/<class>/*, test/<class>/* and, where there is one, val/<class>/*."""
    root = Path(cfg.root)
    listings: dict[str, Listing] = {}
    for part in ("train", "val", "test"):
        folder = root / part
        if not folder.is_dir():
            if part == "val":
                continue
            raise UsageError(f"no folder {folder}; data=imagefolder reads {root}/train/<class>/* and test/<class>/*")
        listings[part] = [
            (path, kind.name)
            for kind in sorted(folder.iterdir())
            if kind.is_dir()
            for path in sorted(kind.rglob("*"))
            if path.suffix.lower() in IMG_EXTENSIONS
        ]
        if not listings[part]:
            raise UsageError(f"no images in {folder}/<class>/; known: {' '.join(IMG_EXTENSIONS)}")
    train, val = listings["train"], listings.get("val")
    if val is None:
        train, val = _held_out(train, cfg.validation)
    return _from_files(cfg, root, train, val, listings["test"])


def _held_out(listing: Listing, share: float) -> tuple[Listing, Listing]:
    """Takes a share of each class out of a listing, always the same."""
    from sklearn.model_selection import train_test_split  # here alone: it takes over a second

    kinds = [kind for _, kind in listing]
    count = max(round(share * len(listing)), len(set(kinds)))
    try:
        kept, held = train_test_split(range(len(listing)), test_size=count, stratify=kinds, random_state=0)
    except ValueError as error:
        raise UsageError(f"cannot hold out {count} of {len(listing)} training images of each class: {error}") from error
    return [listing[i] for i in sorted(kept)], [listing[i] for i in sorted(held)]


def _from_files(cfg: DictConfig, root: Path, *listings: Listing) -> Splits:
    names = [{kind for _, kind in listing} for listing in listings]
    kinds = sorted(set.union(*names))
    for part, there in zip(("training", "validation", "test"), names, strict=True):
        if missing := [kind for kind in kinds if kind not in there]:
            raise UsageError(
                f"{root}: the {part} split has no image of {len(missing)} of {len(kinds)} classes, among them "
                f"'{missing[0]}'; each split needs all"
            )
    everything = [entry for listing in listings for entry in listing]
    for path, _ in everything:
        if not path.is_file():
            raise UsageError(f"{path} is listed and not there; get the data set anew")
    name = re.sub(r"[^\w-]+", "-", cfg.get("title", cfg.name)).strip("-")
    paths = [path for path, _ in everything]
    images, skipped = decoded(root, paths, cfg.size, Path(cfg.cache), name, cfg.skip_undecodable)
    # Splits lie one after the other in the cache, so that each is a view of it.
    splits, start, left_out = [], 0, set(skipped)
    first = 0
    for listing in listings:
        kept = [kind for i, (_, kind) in enumerate(listing, first) if i not in left_out]
        splits.append(Split(images[start : start + len(kept)], torch.tensor([kinds.index(kind) for kind in kept])))
        start, first = start + len(kept), first + len(listing)
    return splits[0], splits[1], splits[2]


SETS: dict[str, Callable[[DictConfig], Splits]] = {
    "digits": _digits,
    "mnist": _idx(datasets.MNIST),
    "fashion_mnist": _idx(datasets.FashionMNIST),
    "cifar10": _cifar10,
    "flowers102": _flowers102,
    "food101": _food101,
    "imagefolder": _imagefolder,
}
