import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import acl
from acl import AnalyticConv2d
from acl.kernels import KINDS, analytic_kinds
from tests.arrangements import arrange_all_kinds

ALL_KINDS = arrange_all_kinds()
DIRECTED_KINDS = [s for s, kind in KINDS.items() if not kind.is_analytic or "theta" in [a.name for a in kind.akps()]]


def make_layer(arrangement: acl.Arrangement | str, size: int = 7, **options: object) -> AnalyticConv2d:
    torch.manual_seed(0)
    return AnalyticConv2d(2, 12, size, arrangement=arrangement, dtype=torch.float64, **options)  # type: ignore[arg-type]


def make_smooth_image(pixels: int) -> Tensor:
    """Waves of at least 12 px at 48 pixels, sampled at any resolution, (1, 2, pixels, pixels)."""
    u = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
    y, x = torch.meshgrid(u, u, indexing="ij")
    waves = [torch.sin(2 * torch.pi * (a * x + b * y) + c) for a, b, c in ((2, 1, 0.3), (-1, 3, 1.1))]
    return torch.stack([waves[0] + x, waves[1] - y * x])[None]


def compute_relative_error(output: Tensor, expected: Tensor, border: int) -> float:
    inner = (..., slice(border, -border), slice(border, -border))
    return ((output[inner] - expected[inner]).norm() / expected[inner].norm()).item()


@pytest.mark.parametrize("family", ["paper", "extended"])
@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize("symbol", KINDS)
def test_rotation_by_90_degrees_rotates_every_kernel_and_output(symbol: str, size: int, family: str) -> None:
    layer = make_layer(f"{symbol}100%", size, family=family)
    image = torch.randn(1, 2, 20, 20, dtype=torch.float64)
    weight, output = layer.weight.detach(), layer(image).detach()
    assert acl.rotate(layer, 90.0) is layer
    torch.testing.assert_close(layer.weight, torch.rot90(weight, 1, (2, 3)), atol=1e-10, rtol=0)
    torch.testing.assert_close(layer(torch.rot90(image, 1, (2, 3))), torch.rot90(output, 1, (2, 3)), atol=1e-9, rtol=0)


def turn(images: Tensor, degrees: float) -> Tensor:
    """Rotates images counterclockwise with bicubic interpolation."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=images.dtype))
    matrix = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]], dtype=images.dtype)
    grid = F.affine_grid(matrix[None], list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bicubic", align_corners=False)


@pytest.mark.parametrize("degrees", [-60.0, 30.0, 45.0])
@pytest.mark.parametrize("symbol", DIRECTED_KINDS)
def test_rotation_by_any_angle_rotates_outputs(symbol: str, degrees: float) -> None:
    layer = make_layer(f"{symbol}100%", 9, padding=4)
    if layer.plain is not None:  # white noise cannot be resampled
        layer.plain.data.copy_(make_layer("G100%", 9).weight.flatten(0, 1))
    image = make_smooth_image(96)
    expected, unrotated = turn(layer(image), degrees), layer(turn(image, degrees))
    rotated = acl.rotate(layer, degrees)(turn(image, degrees))
    error, error_before = (compute_relative_error(output, expected, 32) for output in (rotated, unrotated))
    assert error < 0.65 * error_before, (error, error_before)


def test_rotation_back_restores_akps() -> None:
    layer = make_layer(ALL_KINDS, family="extended")
    before = {symbol: dict(akps) for symbol, akps in layer.akps().items()}
    acl.rotate(acl.rotate(layer, 33.0), -33.0)
    torch.testing.assert_close({symbol: dict(akps) for symbol, akps in layer.akps().items()}, before)


@pytest.mark.parametrize("amplitude", [False, True])
@pytest.mark.parametrize("scale", ["unit", "raw"])
def test_rescaling_by_one_keeps_every_kernel(scale: str, amplitude: bool) -> None:
    layer = make_layer(ALL_KINDS, scale=scale, amplitude=amplitude, family="extended", padding=3, stride=2)
    if amplitude:
        for symbol in layer.akps():
            layer.raw[f"{symbol}_amplitude"].data.uniform_(-2, 2)
    rescaled = acl.rescale(layer, 1.0)
    assert isinstance(rescaled, AnalyticConv2d) and rescaled is not layer
    assert (rescaled.kernel_size, rescaled.stride, rescaled.padding) == ((7, 7), (2, 2), (3, 3))
    torch.testing.assert_close(rescaled.weight, layer.weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("symbol", analytic_kinds())
def test_outputs_on_larger_image_are_larger_outputs(symbol: str, factor: float) -> None:
    layer = make_layer(f"{symbol}100%", 9, padding=4)
    pixels = round(48 * factor)
    rescaled = acl.rescale(make_layer(f"{symbol}100%", 9, padding=4), factor)
    output, expected = rescaled(make_smooth_image(pixels)), layer(make_smooth_image(48))
    assert output.shape[-1] == pixels
    expected = F.interpolate(expected, (pixels, pixels), mode="bicubic")
    unscaled = layer(make_smooth_image(pixels))
    error, error_before = (compute_relative_error(values, expected, 16) for values in (output, unscaled))
    assert error < 0.5 * error_before, (error, error_before)


@pytest.mark.parametrize("symbol", analytic_kinds())
def test_kernels_of_half_the_size_keep_their_energy_density(symbol: str) -> None:
    layer = make_layer(f"{symbol}100%", 5)
    energies = layer.weight.square().sum((2, 3))
    torch.testing.assert_close(acl.rescale(layer, 0.5).weight.square().sum((2, 3)), 4 * energies)


@pytest.mark.parametrize(("factor", "limit"), [(0.5, 0.5), (1.5, 0.25), (2.0, 0.25)])
def test_multiplied_stride_keeps_outputs(factor: float, limit: float) -> None:
    options = {"padding": 3, "stride": 2, "bias": False}
    torch.manual_seed(0)
    model = nn.Sequential(make_layer("G50% P50%", 7, **options), nn.ReLU())
    image, scaled_image = make_smooth_image(96), make_smooth_image(round(96 * factor))
    expected = model(image)
    assert acl.rescale(model, factor, multiply_stride=True) is model
    assert model[0].stride == (round(2 * factor),) * 2
    output = model(scaled_image)
    assert abs(output.shape[-1] - expected.shape[-1]) <= 1
    n = min(output.shape[-1], expected.shape[-1])
    assert compute_relative_error(output[..., :n, :n], expected[..., :n, :n], 8) < limit


def test_rescaled_akps_stay_above_their_floors_and_keep_their_options() -> None:
    options = {"scale": "raw", "family": "extended", "profile": "linear", "dilation": 2, "padding_mode": "reflect"}
    layer = make_layer(ALL_KINDS, learn=("theta",), placement=torch.randperm(24), **options).eval()
    layer.to(memory_format=torch.channels_last)
    rescaled = acl.rescale(layer, 0.25)
    assert isinstance(rescaled, AnalyticConv2d)
    assert rescaled.kernel_size == (3, 3) and not rescaled.training and rescaled.slot_kinds == layer.slot_kinds
    for name in (*options, "groups", "in_channels", "out_channels", "stride"):
        assert getattr(rescaled, name) == getattr(layer, name)
    for symbol, akps in rescaled.akps().items():
        floors = {akp.name: akp.floor for akp in KINDS[symbol].akps("extended") if akp.floor is not None}
        assert all((akps[name] > floor).all() for name, floor in floors.items())
    assert rescaled.weight.isfinite().all()
    assert rescaled.weight.is_contiguous(memory_format=torch.channels_last)
    for key, parameter in layer.raw.items():
        assert rescaled.raw[key].requires_grad == parameter.requires_grad


def test_layer_with_akp_at_its_floor_is_rescaled() -> None:
    layer = make_layer("G100%", family="extended")
    layer.raw["G_gamma"].data.fill_(-200)  # as training can leave it
    rescaled = acl.rescale(layer, 2.0)
    assert isinstance(rescaled, AnalyticConv2d) and rescaled.weight.isfinite().all()


def test_rescaled_frozen_layer_stays_frozen() -> None:
    layer = make_layer("G50% P50%", learn="none").requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in acl.rescale(layer, 2.0).parameters())
    assert all(parameter.requires_grad for parameter in acl.rescale(make_layer("G50% P50%"), 2.0).parameters())


def test_rotate_refuses_unequal_dilation_and_leaves_network_unchanged() -> None:
    model = nn.Sequential(make_layer("Tf100%"), make_layer("Tf100%", dilation=(1, 2)))
    theta = model[0].akps()["Tf"]["theta"].clone()
    with pytest.raises(ValueError, match=r"cannot rotate 1: its dilation \(1, 2\) distorts"):
        acl.rotate(model, 30.0)
    assert torch.equal(model[0].akps()["Tf"]["theta"], theta)


@pytest.mark.parametrize("function", [acl.rotate, acl.rescale])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_invalid_angle_or_factor_is_refused(function, value: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=rf"finite, got {value}"):
        function(make_layer("G100%"), value)
    with pytest.raises(ValueError, match="no analytic layer"):
        function(nn.Conv2d(1, 1, 3), 1.0)


def test_rescale_refuses_layer_of_unknown_padding() -> None:
    class Padded(nn.Conv2d):
        pass

    model = acl.convert(nn.Sequential(Padded(1, 2, 3)), "first", "G100%")
    with pytest.raises(ValueError, match="0 was converted from a Padded, whose padding is not known"):
        acl.rescale(model, 2.0)


def test_stride_that_would_not_be_whole_is_refused() -> None:
    model = nn.Sequential(make_layer("G100%"))
    with pytest.raises(ValueError, match=r"0 has stride \(1, 1\), and 1.5 times that is not whole"):
        acl.rescale(model, 1.5, multiply_stride=True)
    with pytest.raises(ValueError, match="factor must be positive and finite, got 0"):
        acl.rescale(model, 0)
