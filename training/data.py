"""Data sets as uint8 tensors; a batch is an index, and all else is computed batched on the device."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from training.errors import UsageError
from training.sets import SETS, Split

ON_DEVICE = 2**32
"""Bytes up to which a data set lives on the device; a larger one stays mapped from its file."""


@dataclass(frozen=True)
class Data:
    train: Split
    val: Split
    test: Split
    classes: int
    mean: Tensor  # (1, channels, 1, 1), of the training images unless the configuration has its own; 0 to 255
    std: Tensor

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device) -> "Data":
        names = ["mean", "std"]
        if sum(split.images.nbytes for split in (self.train, self.val, self.test)) <= ON_DEVICE:
            names += ["train", "val", "test"]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def normalise(self, images: Tensor) -> Tensor:
        """Images of 0 to 255 -> float32 of mean 0 and variance 1 over the training images."""
        return images.to(torch.float32, copy=True).sub_(self.mean).div_(self.std)


def load(cfg: DictConfig) -> Data:
    """Reads the data set that ``cfg`` (a ``configs/data`` entry) names.

    Raises:
        UsageError: files that are missing and cannot be downloaded, or that are corrupt; a split without a class.
    """
    if cfg.name not in SETS:
        raise UsageError(f"unknown data.name '{cfg.name}'; known: {', '.join(SETS)}")
    train, val, test = SETS[cfg.name](cfg)
    if cfg.get("mean") is None:
        mean, std = _moments(train.images)
    else:
        mean, std = (255 * torch.tensor(list(cfg[name])).view(1, -1, 1, 1) for name in ("mean", "std"))
    return Data(train, val, test, classes=int(train.labels.max()) + 1, mean=mean, std=std)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, each (1, channels, 1, 1); over evenly spaced images if they are many."""
    images = images[:: math.ceil(images.numel() / 2**28)]
    std, mean = torch.std_mean(images.contiguous().float(), dim=(0, 2, 3), keepdim=True)
    return mean, std


def batches(split: Split, size: int) -> Iterator[Split]:
    """The split in order, in batches of ``size``, the last one as it comes."""
    for i in range(0, len(split), size):
        yield Split(split.images[i : i + size], split.labels[i : i + size])


def augment(images: Tensor, cfg: DictConfig, generator: torch.Generator) -> Tensor:
    """Training images at random, each on its own: a resized crop, a shift (zeros come in), a mirroring.

    Args:
        images: (n, channels, height, width).
        cfg: ``crop`` (pixels of the result; absent: no crop) and ``min_area`` (the least share of the image that it
            shows), ``shift`` (up to so many pixels), ``flip`` (half of them).
        generator: on the CPU, so that any device sees the same.

    Returns:
        (n, channels, height, width), or ``crop`` x ``crop`` and float32.
    """
    n, channels, height, width = images.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1, 1, 1), generator=generator).to(images.device)

    if cfg.get("crop"):
        images = _resized_crop(images, cfg.crop, cfg.min_area, cfg.flip, generator)
        height = width = cfg.crop
    if shift := cfg.shift:
        rows = draw(2 * shift + 1) + torch.arange(height, device=images.device)[:, None]
        columns = draw(2 * shift + 1) + torch.arange(width, device=images.device)
        pixels = (rows * (width + 2 * shift) + columns).flatten(2).expand(n, channels, -1)
        images = F.pad(images, (shift,) * 4).flatten(2).gather(2, pixels).view_as(images)
    if cfg.flip and not cfg.get("crop"):
        images = torch.where(draw(2).bool(), images.flip(-1), images)
    return images


def _resized_crop(images: Tensor, size: int, min_area: float, flip: bool, generator: torch.Generator) -> Tensor:
    """A box of ``min_area`` to all of each image's area, 3:4 to 4:3, anywhere in it, scaled to ``size`` x ``size``.

    With ``flip`` half of them are mirrored, which here costs nothing.
    The distribution is that of torchvision's RandomResizedCrop, but for boxes that do not fit: they are made to.
    """
    area, aspect, x, y = torch.rand(4, len(images), generator=generator)
    area = min_area + (1 - min_area) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = x * (1 - width), y * (1 - height)
    if flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        x, width = torch.where(mirrored, x + width, x), torch.where(mirrored, -width, width)
    boxes = torch.stack([x, y, width, height], 1)
    return (_crops_one_by_one if images.device.type == "cpu" else _crops_at_once)(images, boxes, size)


def _crops_at_once(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """``boxes``: (n, 4), left, top, width and height as shares of the image's; of negative width, mirrored."""
    left, top, width, height = boxes.to(images.device).unbind(1)
    zero = torch.zeros_like(width)
    # In affine_grid's coordinates an image reaches from -1 to 1.
    rows = [width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _crops_one_by_one(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The same in whole pixels and uint8, for which a CPU has a quick way; it takes no batch of different boxes."""
    high, wide = images.shape[-2:]
    pixels = (boxes * torch.tensor([wide, high, wide, high])).round().int().tolist()
    crops = torch.empty(len(images), size, size, images.shape[1], dtype=images.dtype).permute(0, 3, 1, 2)

    workers = torch.get_num_threads()

    def crop(worker: int) -> None:
        for i in range(worker, len(images), workers):
            left, top, width, height = pixels[i]
            right = max(left, left + width)
            box = images[i : i + 1, :, top : top + max(height, 1), right - max(abs(width), 1) : right]
            box = box.flip(-1) if width < 0 else box
            crops[i] = F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(crop, range(workers)))
    return crops


def centre(images: Tensor, cfg: DictConfig) -> Tensor:
    """The centre of test images, as large as training crops are."""
    if not cfg.get("crop"):
        return images
    top, left = ((length - cfg.crop) // 2 for length in images.shape[-2:])
    return images[..., top : top + cfg.crop, left : left + cfg.crop]
