import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import acl
from acl import AnalyticConv2d
from acl.kernels import AKP, KINDS, Kind, Role, analytic_kinds
from tests.arrangements import arrange_all_kinds

ALL_KINDS = arrange_all_kinds()
DIRECTED_KINDS = [
    s for s, kind in KINDS.items() if not kind.is_analytic or "direction" in [akp.role for akp in kind.akps()]
]


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
    restored = {symbol: dict(akps) for symbol, akps in layer.akps().items()}
    for akps in restored.values():
        gains = akps.pop("amplitude")
        torch.testing.assert_close(gains, torch.ones_like(gains))
    torch.testing.assert_close(restored, before)


def test_rotated_kernel_of_unit_scale_keeps_its_gain() -> None:
    """The norm of a formula on the pixel grid depends on its angle; its response to a rotated image must not."""
    layer = make_layer("Ts100%", 9, padding=4)
    image = make_smooth_image(96)
    expected, moved = turn(layer(image), 45.0), turn(image, 45.0)
    renormalized = make_layer("Ts100%", 9, padding=4)
    renormalized.set_akps("Ts", {"theta": layer.akps()["Ts"]["theta"] - torch.pi / 4})
    error, error_if_renormalized = (
        compute_relative_error(turned(moved), expected, 32) for turned in (acl.rotate(layer, 45.0), renormalized)
    )
    assert error**2 < 0.6 * error_if_renormalized**2, (error, error_if_renormalized)
    assert layer.options.amplitude and layer.raw["Ts_amplitude"].requires_grad
    copy = AnalyticConv2d(2, 12, 9, padding=4, arrangement="Ts100%", amplitude=True, dtype=torch.float64)
    assert list(copy.state_dict()) == list(layer.state_dict())


def test_rotation_turns_shared_parameters_once() -> None:
    alone = nn.Sequential(make_layer("Tf6 P18", family="extended"))
    layers = [make_layer("Tf6 P18", family="extended") for _ in range(3)]
    layers[1].raw = layers[0].raw
    for key in layers[0].raw:
        layers[2].raw[key] = layers[0].raw[key]
    for layer in layers[1:]:
        layer.plain = layers[0].plain
    acl.rotate(nn.Sequential(*layers, layers[0]), 50.0)
    acl.rotate(alone, 50.0)
    for layer in layers:
        torch.testing.assert_close(layer.weight, alone[0].weight)


@pytest.mark.parametrize("change", [lambda net: acl.rotate(net, 90.0), lambda net: acl.rescale(net, 2.0)])
def test_plain_convolutions_that_stay_as_they_are_are_named(change: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(make_layer("G100%"), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5)).double()
    with pytest.warns(UserWarning, match="plain convolutions are not (rotated|rescaled): 2 and 1 more; "):
        change(net)
    acl.convert(net, "k>=2", "P100%")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(net)


def test_rotation_of_layers_that_share_half_a_center_is_refused() -> None:
    layers = [make_layer("Tf24", family="extended") for _ in range(2)]
    layers[1].raw["Tf_x0"] = layers[0].raw["Tf_x0"]
    layers[1].raw["Tf_y0"].data.add_(1)
    before = [layer.weight.detach() for layer in layers]
    with pytest.raises(ValueError, match="cannot rotate 1: it shares Tf_x0, but not all AKPs that turn"):
        acl.rotate(nn.Sequential(*layers), 50.0)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def make_ramp_kind(role: Role | None) -> Kind:
    """A kind whose direction is called phi."""

    def ramp(phi: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size)
        return columns * phi.cos()[..., None, None] + rows[:, None] * phi.sin()[..., None, None]

    return Kind("R", "Ramp", "black", (AKP("phi", "rad", None, lambda k: (0.1, 3.0), role),), function=ramp)


def test_rotation_follows_role_of_direction_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "R", make_ramp_kind("direction"))
    layer = make_layer("R100%")
    weight = layer.weight.detach()
    torch.testing.assert_close(acl.rotate(layer, 90.0).weight, torch.rot90(weight, 1, (2, 3)))


def test_rotation_refuses_kind_with_a_direction_but_without_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "R", make_ramp_kind(None))
    model = nn.Sequential(make_layer("G100%"), make_layer("R100%"))
    theta = model[0].akps()["G"]["theta"].clone()
    with pytest.raises(ValueError, match="cannot rotate 1: Ramp has a direction, but no AKP with that role"):
        acl.rotate(model, 30.0)
    assert torch.equal(model[0].akps()["G"]["theta"], theta)


@pytest.mark.parametrize(("unit", "role"), [("px", None), ("px", "direction"), ("rad", "length"), ("", "center_x")])
def test_akp_in_px_needs_the_role_of_a_length(unit: str, role: Role | None) -> None:
    with pytest.raises(ValueError, match=f"cannot have the role {role}"):
        AKP("radius", unit, 0.5, lambda k: (1.0, 2.0), role)


@pytest.mark.parametrize("move", [lambda layer: acl.rotate(layer, 30.0), lambda layer: acl.rescale(layer, 1.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_plain_kernels_of_half_precision_are_resampled_precisely(dtype: torch.dtype, move) -> None:  # type: ignore[no-untyped-def]
    layer = make_layer("P100%").to(dtype)
    expected = move(make_layer("P100%").to(dtype).double()).weight.to(dtype)
    assert torch.equal(move(layer).weight, expected)


def test_parametrized_and_pruned_layers_are_not_moved() -> None:
    parametrized, pruned = make_layer("G12 P12"), make_layer("G12 P12")
    parametrize.register_parametrization(parametrized, "plain", nn.Identity())
    prune.l1_unstructured(pruned, "plain", 0.2)
    for layer in (parametrized, pruned):
        with pytest.raises(ValueError, match="cannot rotate the layer: its kernels are parametrized or pruned"):
            acl.rotate(layer, 30.0)
        with pytest.raises(ValueError, match="cannot rescale the layer: its kernels are parametrized or pruned"):
            acl.rescale(layer, 2.0)


def test_layers_that_share_kernels_share_the_gains_that_a_rotation_adds() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 5, padding=2), nn.Conv2d(2, 2, 5, padding=4, dilation=2))
    model[1].weight = model[0].weight
    acl.rotate(acl.convert(model, "all", "G100%"), 30.0)
    assert model[0].raw is model[1].raw and "G_amplitude" in model[0].raw
    assert torch.equal(model[0].weight, model[1].weight)
    assert acl.fold(model)[0].weight is model[1].weight


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


@pytest.mark.parametrize("padding", [0, "valid", 1, 3, "same"])
@pytest.mark.parametrize("size", [7, 6])
def test_outputs_on_larger_image_are_not_shifted(size: int, padding: int | str) -> None:
    layer = make_layer("G100%", size, padding=padding)
    layer.set_akps("G", {"sigma": torch.full((24,), 1.1), "wavelength": torch.full((24,), 6.0)})
    output, rescaled = layer(make_smooth_image(48)), acl.rescale(layer, 2.0)(make_smooth_image(96))
    border = (48 - output.shape[-1]) // 2 + 8  # each output still sees the center of its window
    expected = F.interpolate(output, scale_factor=2.0, mode="bicubic")
    n = min(expected.shape[-1], rescaled.shape[-1])
    assert compute_relative_error(rescaled[..., :n, :n], expected[..., :n, :n], 2 * border) < 0.05


def test_even_windows_with_padding_same_cannot_multiply_their_stride() -> None:
    odd, even = (make_layer("G100%", size, padding="same") for size in (5, 4))
    assert acl.rescale(odd, 2.0, multiply_stride=True)(make_smooth_image(64)).shape[-2:] == (32, 32)
    with pytest.raises(ValueError, match=r"the layer has padding='same' and an even window"):
        acl.rescale(even, 2.0, multiply_stride=True)


def test_padding_valid_is_padding_0() -> None:
    image = make_smooth_image(64)
    outputs = [acl.rescale(make_layer("P100%", padding=padding), 1.5)(image) for padding in (0, "valid")]
    assert torch.equal(*outputs)


def make_natural_image(pixels: int) -> Tensor:
    """Noise with the spectrum of photographs, amplitude 1 / frequency, (1, 2, pixels, pixels)."""
    noise = torch.fft.rfft2(torch.randn(1, 2, pixels, pixels, dtype=torch.float64, generator=torch.manual_seed(0)))
    fy, fx = torch.fft.fftfreq(pixels)[:, None], torch.fft.rfftfreq(pixels)
    return torch.fft.irfft2(noise / (fy**2 + fx**2).sqrt().clamp(min=1 / pixels))


@pytest.mark.parametrize("factor", [0.5, 0.6, 0.75])
def test_plain_kernels_for_smaller_image_are_antialiased(factor: float) -> None:
    """Random kernels, which a smaller image cannot show entirely, lose only what the image loses."""
    layer = make_layer("P100%", 7, padding=3, bias=False)
    image = make_natural_image(120)
    smaller, expected = (
        F.interpolate(images, scale_factor=factor, mode="bicubic", antialias=True) for images in (image, layer(image))
    )
    error = compute_relative_error(acl.rescale(layer, factor)(smaller), expected, 12)
    assert error < 0.5 * compute_relative_error(layer(smaller), expected, 12) and error**2 < 0.03


@pytest.mark.parametrize("symbol", ["G", "Lg"])
def test_well_sampled_formulas_for_smaller_image_are_exact(symbol: str) -> None:
    layer = make_layer(f"{symbol}100%", 25, padding=12, bias=False)
    layer.set_akps(symbol, {"sigma": torch.full((24,), 3.5)})
    if symbol == "G":
        layer.set_akps(symbol, {"wavelength": torch.full((24,), 12.0)})
    output = acl.rescale(layer, 0.5)(make_smooth_image(48))
    expected = F.interpolate(layer(make_smooth_image(96)), (48, 48), mode="bicubic", antialias=True)
    assert compute_relative_error(output, expected, 8) < 0.05


def test_formulas_too_fine_for_smaller_image_are_refused() -> None:
    layer = make_layer("G100%", 7)
    layer.set_akps("G", {"wavelength": torch.full((24,), 2.2), "sigma": torch.full((24,), 1.0)})
    model = nn.Sequential(make_layer("Lg100%", 15), layer)
    model[0].set_akps("Lg", {"sigma": torch.full((24,), 2.5)})
    with pytest.raises(ValueError, match=r"1: its formulas are too fine .* 0\.5 times the size and would miss \d+%"):
        acl.rescale(model, 0.5)
    assert model[1] is layer and model[0].kernel_size == (15, 15)


@pytest.mark.parametrize(("factor", "limit"), [(0.5, 0.5), (1.5, 0.25), (2.0, 0.25)])
def test_multiplied_stride_keeps_outputs(factor: float, limit: float) -> None:
    options = {"padding": 3, "stride": 2, "bias": False}
    torch.manual_seed(0)
    model = nn.Sequential(make_layer("G50% P50%" if factor > 1 else "P100%", 7, **options), nn.ReLU())
    image, scaled_image = make_smooth_image(96), make_smooth_image(round(96 * factor))
    expected = model(image)
    assert acl.rescale(model, factor, multiply_stride=True) is model
    assert model[0].stride == (round(2 * factor),) * 2
    output = model(scaled_image)
    assert abs(output.shape[-1] - expected.shape[-1]) <= 1
    n = min(output.shape[-1], expected.shape[-1])
    assert compute_relative_error(output[..., :n, :n], expected[..., :n, :n], 8) < limit


def test_rescaled_akps_stay_above_their_floors_and_keep_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acl.transform._MAX_ERROR", float("inf"))
    options = {"scale": "raw", "family": "extended", "profile": "linear", "learn": ("theta",)}
    geometry = {"dilation": 2, "padding_mode": "reflect"}
    layer = make_layer(ALL_KINDS, placement=torch.randperm(24), **options, **geometry).eval()
    layer.to(memory_format=torch.channels_last)
    rescaled = acl.rescale(layer, 0.25)
    assert isinstance(rescaled, AnalyticConv2d)
    assert rescaled.kernel_size == (3, 3) and not rescaled.training and rescaled.slot_kinds == layer.slot_kinds
    assert rescaled.options == acl.LayerOptions(amplitude=True, **options)
    for name in (*geometry, "groups", "in_channels", "out_channels", "stride"):
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


def test_rotate_refuses_unequal_stride() -> None:
    with pytest.raises(ValueError, match=r"cannot rotate the layer: its stride \(2, 1\) distorts"):
        acl.rotate(make_layer("G100%", stride=(2, 1)), 30.0)


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


def test_rescale_refuses_layers_that_share_akps() -> None:
    layers = [make_layer("G100%") for _ in range(2)]
    layers[1].raw["G_theta"] = layers[0].raw["G_theta"]
    with pytest.raises(ValueError, match="cannot rescale 1: it shares AKPs or plain kernels with 0"):
        acl.rescale(nn.Sequential(*layers), 2.0)


def test_stride_that_would_not_be_whole_is_refused() -> None:
    model = nn.Sequential(make_layer("G100%"))
    with pytest.raises(ValueError, match=r"0 has stride \(1, 1\), and 1.5 times that is not whole"):
        acl.rescale(model, 1.5, multiply_stride=True)
    with pytest.raises(ValueError, match="factor must be positive and finite, got 0"):
        acl.rescale(model, 0)


def test_rotate_refuses_akps_shared_by_kernels_of_other_sizes() -> None:
    small, large = (AnalyticConv2d(1, 4, size, arrangement="Ts4") for size in (5, 9))
    large.raw = small.raw
    model = nn.ModuleList([small, large])
    before = [layer.weight for layer in (small, large)]
    with pytest.raises(ValueError, match="cannot rotate 1: it shares its AKPs with a layer that needs other gains"):
        acl.rotate(model, 40.0)
    assert all(map(torch.equal, before, [layer.weight for layer in (small, large)]))
