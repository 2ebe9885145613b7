"""Convolutions with fewer parameters that compete with analytic ones."""

from typing import Any

import pytest
import torch
from torch import nn

import models
from models.convolutions import GaussianBasisConv2d, create_convolution
from models.four_layer import FourLayer
from models.lenet import LeNet


@pytest.mark.parametrize(
    ("options", "layer", "count"),
    [
        ({"convolution": "separable"}, None, 35_520),
        ({"convolution": "gaussian_basis"}, None, 160_320 + 4),
        ({"width": 0.2}, None, 75 * 6 + 25 * (6 * 13 + 13 * 26 + 26 * 26)),
        ({}, {"per": "filter"}, 28_128),
    ],
    ids=str,
)
def test_four_layer_network_has_expected_convolution_parameters(
    options: dict[str, Any], layer: dict[str, Any] | None, count: int
) -> None:
    arrangement = {} if layer is None else {"all": "G100%"}
    model = models.create_model("four_layer", 3, 10, arrangement, layer, **options)
    assert models.count_parameters(model)[0] == count
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(
    ("convolution", "expected"), [("separable", 1 / 9), ("separable_unit", 1), ("gaussian_basis", 1)]
)
def test_rivals_start_with_known_variance(convolution: Any, expected: float) -> None:
    torch.manual_seed(0)
    outputs = [create_convolution(convolution, 32, 64, 5, 2, False)(torch.randn(8, 32, 16, 16)) for _ in range(4)]
    assert torch.stack(outputs)[..., 2:-2, 2:-2].var().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("convolution", ["separable", "separable_unit", "gaussian_basis"])
def test_lenet_trains_with_other_convolutions(convolution: Any) -> None:
    model = LeNet(convolution=convolution)
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_depthwise_convolution_is_exact_under_autocast() -> None:
    pointwise, depthwise = create_convolution("separable", 8, 16, 5, 2, True).children()
    x = torch.randn(2, 16, 9, 9, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise(x)
        assert pointwise(torch.randn(2, 8, 9, 9)).dtype == torch.bfloat16
    assert torch.equal(y, depthwise(x.float()).bfloat16())
    depthwise.bfloat16()(x).sum().backward()
    assert depthwise.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("create", "width"), [(FourLayer, 0.01), (LeNet, 0.05)])
def test_width_without_channels_is_refused(create: Any, width: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.width={width} leaves no channel; it should be at least 0\."):
        create(width=width)


@pytest.mark.parametrize("create", [FourLayer, LeNet])
def test_large_width_is_refused(create: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.width=1000 is too large; it should be at most 100"):
        create(width=1000)


def test_gaussian_basis_has_derivatives_of_gaussian() -> None:
    conv = GaussianBasisConv2d(2, 3, 15, padding=7, bias=False).double()
    basis = conv.compute_basis().detach()
    torch.testing.assert_close(basis.square().sum((1, 2)), torch.ones(6, dtype=torch.float64))
    gaussian, dx, dy, dxx, dxy, dyy = basis
    for derivative, source, dim in ((dx, gaussian, 1), (dy, gaussian, 0), (dxx, dx, 1), (dxy, dx, 0), (dyy, dy, 0)):
        (difference,) = torch.gradient(source, dim=dim)
        cosine = nn.functional.cosine_similarity(difference.flatten(), derivative.flatten(), 0)
        assert cosine.abs() > 0.97


def test_gaussian_basis_is_differentiable_and_cached_in_eval_mode() -> None:
    conv = GaussianBasisConv2d(2, 3, 5, padding=2, bias=True).double()
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    names, values = zip(*[(n, p.detach().clone().requires_grad_()) for n, p in conv.named_parameters()], strict=True)

    def compute(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(compute, values)
    conv.eval()
    with torch.no_grad():
        before = conv(x)
        conv.raw_sigma.add_(0.5)
        assert not torch.allclose(conv(x), before)
        torch.testing.assert_close(conv(x), conv.fold()(x))


def test_gaussian_basis_cached_under_autocast_is_used_without_it() -> None:
    layer, x = GaussianBasisConv2d(3, 4, 5, 2, True).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer(x).dtype == torch.float32


def test_gaussian_basis_follows_dtype_of_an_assigned_state() -> None:
    source, layer = (GaussianBasisConv2d(3, 4, 5, 2, True).eval() for _ in range(2))
    layer.load_state_dict(source.bfloat16().state_dict(), assign=True)
    x = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)
    assert torch.equal(layer(x), source(x))
