"""Image data sets as uint8 tensors, which are indexed, augmented and normalized in batches on the device."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field, validate_call
from torch import Tensor
from torch.nn import functional as F

from training.datasets import DATASETS
from training.errors import UsageError
from training.image_folders import Share
from training.splits import Split, split_by_class
from training.validation import STRICT, Count, Pixels, Seed, construct, format_value, strict_dataclass

MAX_BYTES_ON_DEVICE = 2**32
"""Larger data sets stay in main memory or memory-mapped."""
EVAL_PIXELS = 2**24
"""Maximum number of pixels in an evaluation batch."""
FLOAT32 = torch.finfo(torch.float32)


@strict_dataclass
class Augmentation:
    """Random augmentation of training images, and the center crop of test images to the same size."""

    shift: int = Field(ge=0, le=16)
    """Images are shifted by up to this many pixels; zeros fill the border."""
    flip: bool
    """Each image is mirrored with probability 1/2."""
    crop: int | None = Field(default=None, ge=1)
    """The size in pixels of random resized crops; None: no crop."""
    min_area: float | None = Field(default=None, gt=0, le=1)
    """The smallest share of the image's area that a crop covers."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments each image independently.

        Args:
            images: (n, channels, height, width).
            generator: on the CPU, so that the random numbers do not depend on the device.

        Returns:
            (n, channels, height, width); with ``crop``, (n, channels, crop, crop), float32 if the images are on a GPU.
        """
        n, channels, height, width = images.shape

        def randint_per_image(high: int) -> Tensor:
            return torch.randint(high, (n, 1, 1, 1), generator=generator).to(images.device)

        if self.crop is not None:
            images = _random_resized_crop(images, self.crop, self.min_area or 1.0, self.flip, generator)
            height = width = self.crop
        if shift := self.shift:
            rows = randint_per_image(2 * shift + 1) + torch.arange(height, device=images.device)[:, None]
            columns = randint_per_image(2 * shift + 1) + torch.arange(width, device=images.device)
            pixels = (rows * (width + 2 * shift) + columns).flatten(2).expand(n, channels, -1)
            images = F.pad(images, (shift,) * 4).flatten(2).gather(2, pixels).view_as(images)
        if self.flip and self.crop is None:
            images = torch.where(randint_per_image(2).bool(), images.flip(-1), images)
        return images

    def center_crop(self, images: Tensor) -> Tensor:
        """Crops the center of test images to the size of training crops."""
        if self.crop is None:
            return images
        top, left = ((length - self.crop) // 2 for length in images.shape[-2:])
        return images[..., top : top + self.crop, left : left + self.crop]


@strict_dataclass
class InputFormat:
    """The images that a network takes, and their classes."""

    channels: Annotated[int, Field(ge=1, le=2**16)]
    height: Pixels
    width: Pixels
    classes: Annotated[int, Field(ge=1, le=2**16)]
    mean: list[Annotated[float, Field(ge=FLOAT32.min, le=FLOAT32.max)]]  # per channel, in pixel values from 0 to 255
    std: list[Annotated[float, Field(ge=FLOAT32.tiny, le=FLOAT32.max)]]

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"should have {self.channels} means and standard deviations, one per channel")


@dataclass(frozen=True)
class Data:
    """A data set, and how its images become network input."""

    train: Split
    val: Split
    test: Split
    classes: list[str]  # names, by label
    digest: str  # of the data set, as in ``Dataset``
    mean: Tensor  # (1, channels, 1, 1), in pixel values from 0 to 255
    std: Tensor
    augmentation: Augmentation
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def input_format(self) -> InputFormat:
        shape = self.augmentation.center_crop(self.train.images[:1]).shape[1:]
        moments = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return InputFormat(channels=shape[0], height=shape[1], width=shape[2], classes=len(self.classes), **moments)

    def to(self, device: torch.device) -> "Data":
        names = ["mean", "std"]
        if sum(split.images.nbytes for split in (self.train, self.val, self.test)) <= MAX_BYTES_ON_DEVICE:
            names += ["train", "val", "test"]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def normalize(self, images: Tensor) -> Tensor:
        """Converts images (values from 0 to 255) to float32 network input, standardized by ``mean`` and ``std``."""
        normalized = images.to(torch.float32, copy=True).sub_(self.mean).div_(self.std)
        return normalized.contiguous(memory_format=self.memory_format)

    def eval_batches(self, split: Split, max_pixels: int = EVAL_PIXELS, max_size: int = 1000) -> Iterator[Split]:
        """Yields a split in order, in center-cropped and normalized batches on the device."""
        pixels_per_image = self.augmentation.center_crop(split.images[:1])[0, 0].numel() if len(split) else 1
        for batch in iterate_batches(split, max(1, min(max_size, max_pixels // pixels_per_image))):
            batch = batch.to(self.mean.device)
            yield Split(self.normalize(self.augmentation.center_crop(batch.images)), batch.labels)


@validate_call(config=STRICT)
def load_data(
    name: str,
    augmentation: Augmentation,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    max_images: Count | None = None,
    train_share: Share | None = None,
    share_seed: Seed = 0,
    **options: Any,
) -> Data:
    """Reads a data set.

    Args:
        name: one of ``DATASETS``.
        augmentation: for the training images.
        mean, std: per channel, for pixel values from 0 to 1; None: computed from the training images.
        max_images: of each split; None: all.
        train_share: the share of the training images to keep, with the same share of each class; None: all.
        share_seed: chooses the training images that are kept.
        options: the reader's keyword arguments.

    Raises:
        UsageError: for an invalid option, missing files that cannot be downloaded, corrupt files, or a split that
            lacks a class.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown data.name '{name}'; known: {', '.join(DATASETS)}")
    if "cache" in options and max_images is not None:  # a reader of image files decodes no more than it returns
        options["max_images"] = max_images
    dataset = construct(DATASETS[name], options, "data")
    train, val, test = dataset.load()
    channels, *size = train.images.shape[1:]
    if augmentation.crop is not None and augmentation.crop > min(size):
        raise UsageError(f"data.crop={augmentation.crop} exceeds the size of the images, {size[0]} x {size[1]}")
    if train_share is not None:
        problem = f"data.train_share={train_share} of {len(train)} training images is not possible"
        kept, _ = split_by_class(train.labels, problem, train_size=train_share, random_state=share_seed)
        train = train[torch.tensor(kept)]
    if mean is None and std is None:
        mean_tensor, std_tensor = _compute_moments(train.images)
    elif (
        mean is None
        or std is None
        or not len(mean) == len(std) == channels
        or not (0 <= min(mean) <= max(mean) <= 1 and 0 < min(std) <= max(std) <= 1)
    ):
        raise UsageError(
            f"data.mean={format_value(mean)} and data.std={format_value(std)} are invalid: both should be null, or "
            f"lists of {channels} numbers, one per channel, from 0 to 1, with a positive standard deviation"
        )
    else:
        mean_tensor, std_tensor = (255 * torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    train, val, test = (split[:max_images] for split in (train, val, test))
    return Data(train, val, test, dataset.classes, dataset.digest, mean_tensor, std_tensor, augmentation)


def _compute_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, each (1, channels, 1, 1); from a subset if there are many images."""
    images = images[:: math.ceil(images.numel() / 2**28)]
    std, mean = torch.std_mean(images.contiguous().float(), dim=(0, 2, 3), keepdim=True)
    return mean, std.where(std > 0, 1)  # a constant channel becomes 0


def iterate_batches(split: Split, size: int) -> Iterator[Split]:
    """Yields the split in order, in batches of ``size``; the last one may be smaller."""
    for start in range(0, len(split), size):
        yield split[start : start + size]


def _random_resized_crop(images: Tensor, size: int, min_area: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Crops a random box of each image and scales it to ``size`` x ``size``; ``flip`` mirrors half of them.

    A box covers at least ``min_area`` of the image, at an aspect ratio from 3:4 to 4:3. The distribution is that of
    torchvision's RandomResizedCrop, except that boxes that do not fit are clipped.
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
    if images.device.type == "cpu":
        return crop_images_in_threads(images, boxes, size)
    return crop_images_in_one_batch(images, boxes, size)


def crop_images_in_one_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops one box of each image and scales it to ``size`` x ``size``, in float32 and one batched GPU operation.

    Args:
        images: (n, channels, height, width).
        boxes: (n, 4), left, top, width and height as shares of the image size; a negative width mirrors the box.
        size: of the crops, in pixels.
    """
    left, top, width, height = boxes.to(images.device).unbind(1)
    zero = torch.zeros_like(width)
    # In the coordinates of affine_grid, an image extends from -1 to 1.
    theta = [width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1]
    grid = F.affine_grid(torch.stack(theta, 1).view(-1, 2, 3), [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def crop_images_in_threads(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Like ``crop_images_in_one_batch``, but in whole pixels and uint8, for which CPUs have a fast path."""
    image_height, image_width = images.shape[-2:]
    pixel_boxes = (boxes * torch.tensor([image_width, image_height, image_width, image_height])).round().int().tolist()
    crops = torch.empty(len(images), size, size, images.shape[1], dtype=images.dtype).permute(0, 3, 1, 2)
    threads = torch.get_num_threads()

    def crop_every_nth(first: int) -> None:
        for i in range(first, len(images), threads):
            left, top, width, height = pixel_boxes[i]
            right = max(left, left + width)
            box = images[i : i + 1, :, top : top + max(height, 1), right - max(abs(width), 1) : right]
            box = box.flip(-1) if width < 0 else box
            crops[i] = F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(crop_every_nth, range(threads)))
    return crops
