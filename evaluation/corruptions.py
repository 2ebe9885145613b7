"""Common corruptions of images, each at severities 1 to 5."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SEVERITIES = range(1, 6)


def add_noise(images: Tensor, severity: int) -> Tensor:
    """Gaussian noise, with the standard deviations of ImageNet-C."""
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(severity))
    return _to_uint8(images + 255 * sigma * noise)


def blur(images: Tensor, severity: int) -> Tensor:
    """Gaussian blur with a standard deviation of 1% to 4% of the width of the images."""
    sigma = (0.01, 0.015, 0.02, 0.03, 0.04)[severity - 1] * images.shape[-1]
    return F.gaussian_blur(images, 2 * max(1, round(3 * sigma)) + 1, sigma)


def reduce_contrast(images: Tensor, severity: int) -> Tensor:
    """Pulls each image toward its mean color, by the factors of ImageNet-C."""
    factor = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = images.float().mean((-2, -1), keepdim=True)
    return _to_uint8(mean + factor * (images - mean))


def brighten(images: Tensor, severity: int) -> Tensor:
    """Adds the brightness of ImageNet-C, here to every channel."""
    return _to_uint8(images.float() + 255 * (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1])


def rotate(images: Tensor, severity: int) -> Tensor:
    """Rotates counterclockwise by 10 to 50 degrees about the center; the corners become black."""
    return F.rotate(images, 10.0 * severity, F.InterpolationMode.BILINEAR)


def occlude(images: Tensor, severity: int) -> Tensor:
    """Covers 5% to 40% of each image with a gray square at a random position."""
    share = (0.05, 0.1, 0.2, 0.3, 0.4)[severity - 1]
    height, width = images.shape[-2:]
    side = round((share * height * width) ** 0.5)
    generator = torch.Generator().manual_seed(severity)
    top, left = (
        torch.randint(max(1, length - side + 1), (len(images), 1, 1, 1), generator=generator)
        for length in (height, width)
    )
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    is_covered = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return images.masked_fill(is_covered, 128)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": add_noise,
    "blur": blur,
    "contrast": reduce_contrast,
    "brightness": brighten,
    "rotation": rotate,
    "occlusion": occlude,
}
"""Each takes uint8 images (n, channels, height, width) on the CPU and a severity, and returns images of the same shape.

Random numbers depend only on the severity, so that all networks see the same images. Source of the values where said:
ImageNet-C (Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
ICLR 2019); the others are ours.
"""


def _to_uint8(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)
