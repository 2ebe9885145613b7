"""Which interpolation of kernels is the most precise: on Gabor kernels, whose moved values are known."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import acl
from acl import AnalyticConv2d
from acl.kernels import gabor
from evaluation.splines import rescale_by_splines, rotate_by_splines

COUNT, SIZE = 24, 13


def make_kernels(size: int = SIZE, scale: float = 1.0, degrees: float = 0.0) -> Tensor:
    """Gabor kernels that vanish at the border of their window, moved by their formulas."""
    generator = torch.Generator().manual_seed(0)
    theta, wavelength, psi = torch.rand(3, COUNT, dtype=torch.float64, generator=generator)
    akps = (math.pi * theta - math.radians(degrees), scale * (4 + 4 * wavelength), 2 * math.pi * psi)
    return gabor(*akps, torch.full((COUNT,), 1.5 * scale, dtype=torch.float64), (size, size)) / scale**2


def make_layer(kernels: Tensor) -> AnalyticConv2d:
    padding = kernels.shape[-1] // 2
    layer = AnalyticConv2d(1, COUNT, kernels.shape[-1], padding=padding, bias=False, arrangement="P100%")
    layer.double().plain.data.copy_(kernels)
    return layer


def compute_error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("degrees", [15.0, 30.0, 45.0])
def test_splines_rotate_kernels_more_precisely_than_cubic_convolution(degrees: float) -> None:
    expected = make_kernels(degrees=degrees)
    error, error_resampled = (
        compute_error(rotate(make_layer(make_kernels()), degrees).plain.detach(), expected)
        for rotate in (rotate_by_splines, acl.rotate)
    )
    assert error < 0.5 * error_resampled < 0.01


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_splines_enlarge_kernels_more_precisely_than_cubic_convolution(factor: float) -> None:
    splines, resampled = (
        rescale(make_layer(make_kernels()), factor).plain.detach() for rescale in (rescale_by_splines, acl.rescale)
    )
    expected = make_kernels(splines.shape[-1], factor)
    assert compute_error(splines, expected) < 0.5 * compute_error(resampled, expected) < 0.01


@pytest.mark.parametrize("degrees", [90.0, -180.0])
@pytest.mark.parametrize("size", [5, 6])
def test_splines_turn_by_right_angles_exactly(size: int, degrees: float) -> None:
    kernels = torch.randn(COUNT, size, size, dtype=torch.float64)
    turned = rotate_by_splines(make_layer(kernels), degrees).plain
    torch.testing.assert_close(turned.detach(), kernels.rot90(round(degrees / 90), (1, 2)))


@pytest.mark.parametrize(("stride", "size", "padding"), [(1, 6, 1), (2, 7, 3), (1, 7, 0)])
def test_splines_place_windows_where_acl_rescale_does(stride: int, size: int, padding: int) -> None:
    """On smooth kernels, both nearly agree, whatever the shift of the window."""
    layers = [
        AnalyticConv2d(1, COUNT, size, stride, padding, bias=False, arrangement="P100%", dtype=torch.float64)
        for _ in range(2)
    ]
    for layer in layers:
        layer.plain.data.copy_(make_kernels(size, 0.7))
    splines, resampled = rescale_by_splines(layers[0], 2.0), acl.rescale(layers[1], 2.0)
    assert splines.kernel_size == resampled.kernel_size and splines.padding == resampled.padding
    assert compute_error(splines.plain.detach(), resampled.plain.detach()) < 0.05


def test_smaller_images_need_antialiased_kernels() -> None:
    """On noise with the power 1 / f^2 of photographs, acl.rescale is as precise as PyTorch's antialiased resizing."""
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(COUNT, SIZE, SIZE, dtype=torch.float64, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(150)[:, None], torch.fft.rfftfreq(150)).clamp(min=1 / 150)
    noise = torch.randn(1, 1, 150, 150, dtype=torch.float64, generator=generator)
    image = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency)
    smaller, expected = (
        F.interpolate(x, (90, 90), mode="bicubic", antialias=True) for x in (image, make_layer(kernels)(image).detach())
    )
    padded = F.pad(kernels[:, None], (6,) * 4)  # 25 px become 15 px
    resized = F.interpolate(padded, (15, 15), mode="bicubic", antialias=True)[:, 0] / 0.6**2
    layers = {
        "resampled": acl.rescale(make_layer(kernels), 0.6),
        "resized": make_layer(resized),
        "splines": rescale_by_splines(make_layer(kernels), 0.6),
    }
    inner = (..., slice(12, -12), slice(12, -12))
    errors = {way: compute_error(layer(smaller)[inner].detach(), expected[inner]) for way, layer in layers.items()}
    assert errors["resampled"] < 1.5 * errors["resized"] < 0.05 and errors["splines"] > 5 * errors["resampled"]
