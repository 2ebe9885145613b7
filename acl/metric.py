"""Metrics of approximated kernels: how much an error of a kernel changes a layer's output on images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

MetricName = Literal["images", "pixels"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
_COLOR_CORRELATION = 0.9
_IMAGE_SIZE = 224
_IMAGES_PER_BATCH = 64
_RIDGE = 1e-9  # relative to the mean second moment


def check_metric_name(metric: str) -> None:
    """Raises ValueError for an unknown name of a metric."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric '{metric}'; known: {', '.join(METRICS)}, or a tensor")


@dataclass(frozen=True, eq=False)
class Metric:
    """The second moments of image patches, as a product of one factor for channels and one for pixels.

    If all kernels of a filter change by d, its output changes by d^T C d in the mean square, with C the second moments
    (uncentered covariance) of the patches that it sees. C = channels (x) pixels makes this cheap to minimize. With
    identities, d^T C d is the squared error over pixels. Ours.
    """

    name: str
    """``images``, ``pixels``, ``data`` if it was measured, or ``dilated images``."""
    channels: Tensor = field(repr=False)
    """(in / groups, in / groups) float64."""
    pixels: Tensor = field(repr=False)
    """(kh kw, kh kw) float64."""

    @classmethod
    def create(
        cls,
        metric: "str | Tensor | Metric",
        in_channels: int,
        size: tuple[int, int],
        dilation: tuple[int, int] = (1, 1),
    ) -> "Metric":
        """Creates the metric of kernels of a size.

        Args:
            metric: ``images``: the power of images falls as 1 / f^2, and RGB channels are correlated by 0.9, while any
                other number of channels is taken as uncorrelated. ``pixels``: the squared error over pixels. A tensor:
                a batch of inputs of the layer (n, in / groups, h, w), or the second moments of their patches (m, m)
                with m = in / groups * kh * kw in the order of the weight, which are approximated by the nearest
                product.
            in_channels: the input channels of a filter (in / groups).
            size: (kh, kw).
            dilation: the distances of a kernel's pixels in its inputs.

        Raises:
            ValueError: for an unknown metric, or a tensor of another shape, or that is not finite, or has no energy.
        """
        num_pixels = size[0] * size[1]
        if isinstance(metric, Metric):
            metric.check_size(in_channels, num_pixels)
            return metric
        if isinstance(metric, Tensor):
            return cls("data", *_factorize(_measure_moments(metric, in_channels, size, dilation), in_channels))
        check_metric_name(metric)
        channels = torch.eye(in_channels, dtype=torch.float64)
        if metric == "pixels":
            return cls(metric, channels, torch.eye(num_pixels, dtype=torch.float64))
        if in_channels == 3:
            channels = _COLOR_CORRELATION + (1 - _COLOR_CORRELATION) * channels
        is_dilated = any(d > 1 and n > 1 for d, n in zip(dilation, size, strict=True))
        return cls("dilated images" if is_dilated else metric, channels, _compute_image_moments(size, dilation))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Metric) and self.to_json() == other.to_json() and len(self.pixels) == len(other.pixels)

    def check_size(self, in_channels: int, num_pixels: int) -> None:
        """Raises ValueError unless the metric is of kernels of this size."""
        if (len(self.channels), len(self.pixels)) != (in_channels, num_pixels):
            raise ValueError(
                f"the metric is of {len(self.channels)} channels and {len(self.pixels)} pixels, but the kernels have "
                f"{in_channels} and {num_pixels}"
            )

    @property
    def root(self) -> Tensor | None:
        """The Cholesky factor of ``pixels``: kernels times it have the metric as squared error; None for identity."""
        return None if self.name == "pixels" else _factor(self.pixels)

    @property
    def channel_root(self) -> Tensor:
        """The Cholesky factor of ``channels``."""
        return _factor(self.channels)

    @property
    def is_coupled(self) -> bool:
        """Whether errors of one filter's kernels can add up or cancel."""
        return bool(self.channels.count_nonzero() > len(self.channels))

    def energies(self, kernels: Tensor) -> Tensor:
        """The energy of the outputs of filters (..., channels, kh, kw), or of errors of filters, (...) float64."""
        flat = kernels.double().flatten(-2)
        return (self.channels @ flat @ self.pixels * flat).sum((-2, -1))

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads: the name, and the matrices of measured moments."""
        if self.name in METRICS:
            return {"name": self.name}
        return {"name": self.name, "channels": self.channels.tolist(), "pixels": self.pixels.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], in_channels: int, size: tuple[int, int]) -> "Metric":
        """Reads the output of ``to_json``. Raises ValueError for a metric of other kernels."""
        if values["name"] in METRICS:
            return cls.create(values["name"], in_channels, size)
        matrices = [torch.tensor(values[key], dtype=torch.float64) for key in ("channels", "pixels")]
        metric = cls(str(values["name"]), *matrices)
        metric.check_size(in_channels, size[0] * size[1])
        return metric


def output_error(
    weight: Tensor,
    approximation: Tensor,
    metric: str | Tensor | Metric = "images",
    dilation: int | tuple[int, int] = 1,
) -> float:
    """The energy of the error of a layer's output relative to that of the output, if its weight is approximated.

    Args:
        weight, approximation: (out, in / groups, kh, kw).
        metric: as for ``Metric.create``, but the second moments of a tensor are used as they are. With ``pixels``, this
            is 1 - R^2.
        dilation: of the layer.

    Raises:
        ValueError: for a weight of zeros, an approximation of another shape, or a metric of other kernels.
    """
    if not weight.any():
        raise ValueError("the weight is zero, so there is no error relative to it")
    if approximation.shape != weight.shape:
        raise ValueError(
            f"the approximation has the shape {tuple(approximation.shape)}, the weight {tuple(weight.shape)}"
        )
    dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
    size = (weight.shape[2], weight.shape[3])
    weight, error = weight.detach().cpu().double(), (weight - approximation).detach().cpu().double()
    if isinstance(metric, Tensor):
        moments = _measure_moments(metric, weight.shape[1], size, dilation)
        energies = [(kernels.flatten(1) @ moments * kernels.flatten(1)).sum() for kernels in (error, weight)]
    else:
        resolved = Metric.create(metric, weight.shape[1], size, dilation)
        energies = [resolved.energies(kernels).sum() for kernels in (error, weight)]
    return float(energies[0] / energies[1])


def _factor(moments: Tensor) -> Tensor:
    for ridge in (_RIDGE, 1e-6, 1e-4):  # the larger ones for moments of rounded or few values
        factor, info = torch.linalg.cholesky_ex(_add_ridge(moments, ridge))
        if not info:
            return factor
    raise ValueError(f"the second moments of {len(moments)} values are not positive semidefinite")


def _compute_extents(size: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    """The height and the width of a kernel's window, in pixels of its inputs."""
    return [d * (n - 1) + 1 for d, n in zip(dilation, size, strict=True)]


def _compute_image_moments(size: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """The correlations of the pixels of images whose power falls as 1 / f^2, also at the frequency 0 of their size."""
    image_size = max(_IMAGE_SIZE, 2 * max(_compute_extents(size, dilation)))
    frequencies = torch.fft.fftfreq(image_size, dtype=torch.float64)
    squares = frequencies[:, None].square() + frequencies.square()
    squares[0, 0] = frequencies[1] ** 2
    correlations = torch.fft.ifft2(1 / squares).real
    places = (d * torch.arange(n) for d, n in zip(dilation, size, strict=True))
    rows, columns = (index.flatten() for index in torch.meshgrid(*places, indexing="ij"))
    return correlations[rows[:, None] - rows, columns[:, None] - columns] / correlations[0, 0]


def _measure_moments(values: Tensor, in_channels: int, size: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """The second moments of the patches of a batch of inputs; a matrix of second moments is returned as it is."""
    length = in_channels * size[0] * size[1]
    values = values.detach().cpu()
    height, width = _compute_extents(size, dilation)
    has_patches = values.ndim == 4 and values.shape[2] >= height and values.shape[3] >= width and len(values)
    if has_patches and values.shape[1] == in_channels:
        moments = torch.zeros(length, length, dtype=torch.float64)
        for batch in values.split(_IMAGES_PER_BATCH):
            patches = F.unfold(batch.double(), size, dilation).movedim(1, 0).flatten(1)
            moments += patches @ patches.T / patches.shape[1] * len(batch) / len(values)
    elif values.shape == (length, length):
        moments = (values.double() + values.double().T) / 2
    else:
        raise ValueError(
            f"a metric must be a batch of images (n, {in_channels}, h, w) of at least the kernel's size, or the second "
            f"moments ({length}, {length}) of their patches, got {tuple(values.shape)}"
        )
    if not moments.isfinite().all() or not moments.trace() > 0:
        raise ValueError("a metric must be finite and not zero")
    if torch.linalg.eigvalsh(moments).min() < -1e-6 * moments.trace():
        raise ValueError("a metric must be positive semidefinite, as second moments are")
    return moments


def _factorize(moments: Tensor, in_channels: int) -> tuple[Tensor, Tensor]:
    """The factors of the nearest Kronecker product (Van Loan and Pitsianis, 1993), both symmetric."""
    num_pixels = len(moments) // in_channels
    blocks = moments.view(in_channels, num_pixels, in_channels, num_pixels).transpose(1, 2).reshape(in_channels**2, -1)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    sign = torch.sign(u[:, 0].view(in_channels, -1).trace())
    channels, pixels = sign * s[0] * u[:, 0].view(in_channels, -1), sign * vh[0].view(num_pixels, -1)
    return _add_ridge(channels, _RIDGE), _add_ridge(pixels, _RIDGE)  # so that errors that no input shows count, too


def _add_ridge(moments: Tensor, ridge: float) -> Tensor:
    return moments + ridge * (moments.trace() / len(moments) * torch.eye(len(moments), dtype=moments.dtype))
