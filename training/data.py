"""Data sets as uint8 tensors on the device; a batch is an index, and all else is computed batched on the device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

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
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    train: Split
    val: Split
    test: Split
    classes: int
    mean: Tensor  # (1, channels, 1, 1), of the training images, 0 to 255
    std: Tensor

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device) -> "Data":
        moved = {name: getattr(self, name).to(device) for name in ("train", "val", "test", "mean", "std")}
        return replace(self, **moved)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images -> float32 of mean 0 and variance 1 over the training images."""
        return images.float().sub_(self.mean).div_(self.std)


def load(cfg: DictConfig) -> Data:
    """Reads the data set that ``cfg`` (a ``configs/data`` entry) names, and takes its validation split out of train.

    Raises:
        UsageError: files that are missing and cannot be downloaded, or that are corrupt.
    """
    train, test, validation = _SETS[cfg.name](Path(cfg.root))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    val, train = train[order[:validation]], train[order[validation:]]
    std, mean = torch.std_mean(train.images.float(), dim=(0, 2, 3), keepdim=True)
    return Data(train, val, test, classes=10, mean=mean, std=std)


def _digits(root: Path) -> tuple[Split, Split, int]:
    """scikit-learn's bundled 1,797 handwritten digits, 8 x 8, scaled to 28 x 28; a fixed fifth is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).round().to(torch.uint8)
    everything = Split(images, torch.from_numpy(bunch.target).long())
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(1))
    return everything[order[360:]], everything[order[:360]], 200


def _idx(dataset: type[datasets.MNIST]) -> Callable[[Path], tuple[Split, Split, int]]:
    """A reader of a torchvision data set in MNIST's IDX format."""

    def read(root: Path) -> tuple[Split, Split, int]:
        raw = root / dataset.__name__ / "raw"
        there = raw.exists()
        try:
            # It reads what it downloads, and so trips over a corrupt file, which is looked for by name below.
            dataset(str(root), download=True)
        except (URLError, OSError, RuntimeError) as error:
            for folder in () if there else (raw, raw.parent, root):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            if not all(_idx_file(raw, split, part).is_file() for split in _IDX_SPLITS for part in _IDX_PARTS):
                names = " ".join(_idx_file(raw, split, part).name for split in _IDX_SPLITS for part in _IDX_PARTS)
                raise UsageError(
                    f"no {dataset.__name__} in {raw} and none could be downloaded; put these files there, as they are "
                    f"or as .gz: {names}; data=digits needs no files"
                ) from error
        except Exception:  # noqa: S110 - whatever a corrupt file makes of it
            pass
        train, test = (_read_idx(raw, split) for split in _IDX_SPLITS)
        return train, test, 5000

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


_SETS: dict[str, Callable[[Path], tuple[Split, Split, int]]] = {
    "digits": _digits,
    "mnist": _idx(datasets.MNIST),
    "fashion_mnist": _idx(datasets.FashionMNIST),
}
"""Each gives the official training and test set (train still holds the validation images) and the validation's size."""


def batches(split: Split, size: int) -> Iterator[Split]:
    """The split in order, in batches of ``size``, the last one as it comes."""
    for i in range(0, len(split), size):
        yield Split(split.images[i : i + size], split.labels[i : i + size])


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Moves each image by up to ``shift`` pixels (zeros come in) and mirrors half of them, drawn from a CPU generator.

    Args:
        images: (n, channels, height, width).
    """
    n, channels, height, width = images.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1, 1, 1), generator=generator).to(images.device)

    if shift:
        rows = draw(2 * shift + 1) + torch.arange(height, device=images.device)[:, None]
        columns = draw(2 * shift + 1) + torch.arange(width, device=images.device)
        pixels = (rows * (width + 2 * shift) + columns).flatten(2).expand(n, channels, -1)
        images = F.pad(images, (shift,) * 4).flatten(2).gather(2, pixels).view_as(images)
    if flip:
        images = torch.where(draw(2).bool(), images.flip(-1), images)
    return images
