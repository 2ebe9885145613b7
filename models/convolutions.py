"""Convolutions with fewer parameters that compete with analytic ones."""

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acl.computed_conv import ComputedConv2d
from acl.factored import convolve_depthwise

Convolution = Literal["separable", "separable_unit", "gaussian_basis"]


def scale_channels(channels: Sequence[int], width: float | None) -> list[int]:
    """Multiplies numbers of channels by a width; None stands for 1.

    Raises:
        ValueError: for a width that leaves no channel, or above 100.
    """
    width = 1 if width is None else width
    if round(min(channels) * width) < 1:
        raise ValueError(f"model.width={width} leaves no channel; it should be at least {1 / min(channels):.2g}")
    if width > 100:
        raise ValueError(f"model.width={width} is too large; it should be at most 100")
    return [round(n * width) for n in channels]


def create_convolution(
    kind: Convolution | None, in_channels: int, out_channels: int, kernel_size: int, padding: int, bias: bool
) -> nn.Module:
    """Creates a convolution: an nn.Conv2d, or one of the same inputs and outputs with fewer parameters.

    Args:
        kind: ``separable``: a 1 x 1 convolution, then a depthwise one, as of a filter mosaic with free kernels instead
            of formulas; ``separable_unit``: the same, with initial weights that preserve unit variance, as those of
            filter mosaics do; ``gaussian_basis``: see ``GaussianBasisConv2d``; None: nn.Conv2d.
        in_channels, out_channels, kernel_size, padding, bias: as for nn.Conv2d.
    """
    if kind in ("separable", "separable_unit"):
        depthwise = DepthwiseConv2d(
            out_channels, out_channels, kernel_size, padding=padding, groups=out_channels, bias=bias
        )
        pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        if kind == "separable_unit":
            for conv in (pointwise, depthwise):
                conv.weight.data *= math.sqrt(3)  # nn.Conv2d starts with a third of the variance
        return nn.Sequential(pointwise, depthwise)
    create = nn.Conv2d if kind is None else GaussianBasisConv2d
    return create(in_channels, out_channels, kernel_size, padding=padding, bias=bias)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that is computed like that of a filter mosaic: in float32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve_depthwise(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class GaussianBasisConv2d(ComputedConv2d):
    """A convolution whose kernels are learned combinations of the derivatives of a Gaussian up to the second order.

    The Gaussian's width is learned, one for the layer. Source: Jacobsen et al., Structured Receptive Fields in CNNs,
    CVPR 2016 (RFNN), where it is fixed. The arguments are those of nn.Conv2d with the same names.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=bias)
        self.coefficients = nn.Parameter(torch.empty(out_channels, in_channels, 6))
        bound = math.sqrt(3 / (6 * in_channels))  # preserves unit variance, since the basis functions have norm 1
        nn.init.uniform_(self.coefficients, -bound, bound)
        self.raw_sigma = nn.Parameter(torch.tensor([math.log(math.expm1(kernel_size / 5))]))

    def compute_basis(self) -> Tensor:
        """The derivatives of orders 0, 1 and 2 on the grid, each of norm 1, (6, kh, kw)."""
        sigma = F.softplus(self.raw_sigma)
        rows, columns = (torch.arange((1 - n) / 2, n / 2, device=sigma.device) / sigma for n in self.kernel_size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        polynomials = torch.stack([torch.ones_like(x), x, y, x * x - 1, x * y, y * y - 1])
        basis = polynomials * torch.exp(-(x * x + y * y) / 2)
        return basis / basis.square().sum((1, 2), keepdim=True).add(1e-12).sqrt()

    def _synthesize(self) -> Tensor:
        basis = self.compute_basis()  # in at least float32
        weight = torch.einsum("oib,bhw->oihw", self.coefficients.to(basis.dtype), basis)
        return weight.to(self._format.dtype)  # under autocast, it has 16 bits, and may be cached

    def _get_sources(self) -> tuple[Sequence[Tensor | None], Hashable]:
        return [self.coefficients, self.raw_sigma], ()
