"""Approximations of kernels that compete with formulas: a truncated SVD and a codebook.

Each function takes kernels (out, in / groups, kh, kw) and how many numbers a kernel gets at least. It returns the
approximation and how many numbers a kernel got.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CODEBOOK_STARTS, CODEBOOK_STEPS = 10, 100


def truncate_svd(weight: Tensor, numbers: int) -> tuple[Tensor, float]:
    """Approximates the matrix whose rows are the kernels by the product of two thinner ones."""
    rows = weight.flatten(0, 1).flatten(1)
    rank = min(math.ceil(numbers * len(rows) / sum(rows.shape)), *rows.shape)
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).view_as(weight), rank * sum(rows.shape) / len(rows)


def quantize(weight: Tensor, numbers: int) -> tuple[Tensor, float]:
    """Replaces each kernel by an entry of a codebook times a gain of either sign, with the smallest squared error.

    This is k-means for lines through the origin instead of points, known as gain-shape vector quantization (Sabin and
    Gray, 1984). The index of the entry and the gain count as two numbers of the kernel.
    """
    rows = weight.flatten(0, 1).flatten(1)
    size = min(max(1, math.ceil((numbers - 2) * len(rows) / rows.shape[1])), len(rows))
    codebook = max(
        (_train_codebook(rows, size, seed) for seed in range(CODEBOOK_STARTS)),
        key=lambda codebook: (rows @ codebook.T).square().amax(1).sum(),
    )
    products = rows @ codebook.T
    index = products.abs().argmax(1, keepdim=True)
    return (products.gather(1, index) * codebook[index[:, 0]]).view_as(weight), 2 + codebook.numel() / len(rows)


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
