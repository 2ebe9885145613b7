"""Approximations of kernels that compete with formulas: a truncated SVD and a codebook.

Each function takes kernels (out, in / groups, kh, kw), how many numbers a kernel gets at least, and the metric of the
error, as ``acl.Metric.create`` does. It returns the approximation and how many numbers a kernel got.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from acl.metric import Metric

CODEBOOK_STARTS, CODEBOOK_STEPS = 10, 100
_RIDGE = 1e-12  # relative to codebook entries of unit energy


def truncate_svd(weight: Tensor, numbers: int, metric: str | Tensor | Metric = "pixels") -> tuple[Tensor, float]:
    """Approximates the matrix whose rows are the kernels by the product of two thinner ones, with the smallest error.

    The roots of the metric multiply this matrix from both sides, which keeps its rank, so that the error in the metric
    becomes a squared error.
    """
    whitened, pixel_root, channel_root = _whiten(weight, metric)
    rows = (channel_root.T @ whitened).flatten(0, 1)
    rank = min(math.ceil(numbers * len(rows) / sum(rows.shape)), *rows.shape)
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    truncated = ((u[:, :rank] * s[:rank]) @ vh[:rank]).view_as(whitened)
    approximation = torch.linalg.solve_triangular(channel_root.T, _unwhiten(truncated, pixel_root), upper=True)
    return approximation.to(weight.dtype).view_as(weight), rank * sum(rows.shape) / len(rows)


def quantize(weight: Tensor, numbers: int, metric: str | Tensor | Metric = "pixels") -> tuple[Tensor, float]:
    """Replaces each kernel by an entry of a codebook times a gain of either sign.

    This is k-means for lines through the origin instead of points, known as gain-shape vector quantization (Sabin and
    Gray, 1984), with the error of each kernel alone. The gains of all kernels of a filter then minimize the error of
    the filter. The index of the entry and the gain count as two numbers of the kernel.
    """
    whitened, pixel_root, channel_root = _whiten(weight, metric)
    rows = whitened.flatten(0, 1)
    size = min(max(1, math.ceil((numbers - 2) * len(rows) / rows.shape[1])), len(rows))
    codebook = max(
        (_train_codebook(rows, size, seed) for seed in range(CODEBOOK_STARTS)),
        key=lambda codebook: (rows @ codebook.T).square().amax(1).sum(),
    )
    units = codebook[(rows @ codebook.T).abs().argmax(1)].view_as(whitened)
    channels = channel_root @ channel_root.T
    gram, products = units @ units.mT * channels, (units @ whitened.mT * channels).sum(2)
    # The ridge makes the gain of an entry that is zero unique.
    gains = torch.linalg.solve(gram + _RIDGE * torch.eye(len(channels)).to(gram), products)
    approximation = _unwhiten(gains[..., None] * units, pixel_root)
    return approximation.to(weight.dtype).view_as(weight), 2 + codebook.numel() / len(rows)


def _whiten(weight: Tensor, metric: str | Tensor | Metric) -> tuple[Tensor, Tensor | None, Tensor]:
    """The kernels (out, in, pixels) whose squared error is the error in the metric's pixels, and its two roots."""
    resolved = Metric.create(metric, weight.shape[1], (weight.shape[2], weight.shape[3]))
    flat = weight.flatten(2)
    if resolved.root is None:
        return flat, None, torch.eye(weight.shape[1]).to(flat)
    return flat.double() @ resolved.root, resolved.root, resolved.channel_root


def _unwhiten(kernels: Tensor, pixel_root: Tensor | None) -> Tensor:
    if pixel_root is None:
        return kernels
    return torch.linalg.solve_triangular(pixel_root, kernels, upper=False, left=False)


def _train_codebook(rows: Tensor, size: int, seed: int) -> Tensor:
    """Finds ``size`` unit vectors, (size, pixels), starting from random kernels; those of more energy are likelier."""
    generator = torch.Generator().manual_seed(seed)
    codebook = F.normalize(rows[rows.square().sum(1).clamp(min=1e-12).multinomial(size, generator=generator)])
    index = None
    for _ in range(CODEBOOK_STEPS):
        previous, index = index, (rows @ codebook.T).abs().argmax(1)
        if previous is not None and torch.equal(index, previous):
            break
        for i in index.unique().tolist():
            codebook[i] = torch.linalg.svd(rows[index == i], full_matrices=False).Vh[0]
    return codebook
