"""Images with labels, and data sets of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.errors import UsageError


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


def split_by_class(labels: Sequence[Any] | Tensor, problem: str, **options: float) -> tuple[list[int], list[int]]:
    """Splits images at random, with every class in proportion; returns indices in order.

    Args:
        labels: of the images.
        problem: the start of the error if this is not possible.
        options: those of scikit-learn's ``train_test_split``.
    """
    from sklearn.model_selection import train_test_split  # imported here because it takes over a second

    try:
        first, second = train_test_split(range(len(labels)), stratify=labels, **options)
    except ValueError as error:
        raise UsageError(f"{problem}: {error}") from error
    return sorted(first), sorted(second)
