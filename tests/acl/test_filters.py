"""Filter mosaics: one shape per output channel, with a gain per input channel, computed in two ways."""

import copy
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import acl
from acl import AnalyticConv2d, convert, fold, plot
from acl.kernels import FAMILIES, KINDS, analytic_kinds
from tests.arrangements import arrange_all_kinds

SHAPES = "G25% Lg25% Lt25% Ts25%"
GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 2},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "padding": (1, 2), "bias": False},
    {"padding": 2, "padding_mode": "reflect", "stride": (1, 2)},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate", "groups": 4},
    {"kernel_size": (3, 6), "padding": (1, 2)},
    {"placement": torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])},
    {"scale": "raw", "family": "extended"},
]


def make_filters(in_channels: int = 4, arrangement: str = SHAPES, **options: Any) -> AnalyticConv2d:
    arguments: dict[str, Any] = {"kernel_size": 5, "dtype": torch.float64, **options}
    return AnalyticConv2d(in_channels, 8, arrangement=arrangement, per="filter", **arguments)


def test_kernels_of_analytic_filter_are_gains_times_one_shape() -> None:
    layer = make_filters(3, "G4 P2 Ts2", placement=torch.randperm(8))
    weight, kinds = layer.weight.detach(), layer.slot_kinds
    for symbol in ("G", "Ts"):
        shapes = layer.compute_shapes(symbol)
        torch.testing.assert_close(shapes.square().mean((1, 2)), torch.ones(len(shapes), dtype=torch.float64))
        slots = layer.slots_of(symbol)
        expected = layer.gains_of(symbol)[..., None, None] * shapes[:, None]
        torch.testing.assert_close(weight[slots], expected)
        assert [kinds[slot] for slot in slots] == [symbol] * len(slots)
    assert torch.equal(weight[layer.slots_of("P")], layer.plain)


def test_parameters_are_akps_gains_and_plain_weights() -> None:
    layer = make_filters(3, "G4 P2 Ts2", bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 4 + 2 * 3 + 6 * 3 + 2 * 3 * 25
    assert str(layer.arrangement) == "G4 P2 Ts2" and make_filters(3, "P100%").gains is None


@pytest.mark.parametrize("arrangement", [*(f"{symbol}100%" for symbol in analytic_kinds()), SHAPES])
def test_initial_gains_preserve_variance(arrangement: str) -> None:
    layer = AnalyticConv2d(32, 64, 5, arrangement=arrangement, per="filter", bias=False)
    assert layer(torch.randn(4, 32, 32, 32)).var().item() == pytest.approx(1, abs=0.15)
    assert layer.gains.abs().max() <= math.sqrt(3 / (32 * 25)) and 0.4 < (layer.gains > 0).float().mean() < 0.6


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_factored_and_dense_computation_agree(geometry: dict[str, Any]) -> None:
    dense = make_filters(compute="dense", **geometry)
    factored = copy.deepcopy(dense)
    factored.options = make_filters(compute="factored", **geometry).options
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (dense, factored):
        output = layer(x)
        leaves = [x, *layer.parameters()]
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([output, *first, *second])
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(layer).eval()(x), output)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for folded in (factored.fold(), factored.fold(factored=True)):
        torch.testing.assert_close(folded(x), results[0][0], rtol=1e-10, atol=1e-10)
    assert [type(part) for part in factored.fold(factored=True)] == [nn.Conv2d, nn.Conv2d]


def test_factored_layer_under_autocast_is_close_and_keeps_dtype() -> None:
    layer = AnalyticConv2d(16, 32, 5, arrangement=SHAPES, per="filter", padding="same", compute="factored")
    x = torch.randn(2, 16, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.1)
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_filter_gradients_agree_with_finite_differences(family: str) -> None:
    layer = AnalyticConv2d(2, len(KINDS), 5, arrangement=arrange_all_kinds(), per="filter", family=family).double()
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(1, 2, 7, 7, dtype=torch.double)

    def compute_output(*parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(compute_output, values)


def test_cached_outputs_follow_changes_of_gains_and_akps() -> None:
    for compute in ("dense", "factored"):
        layer = make_filters(compute=compute).eval()
        x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
        with torch.no_grad():
            outputs = [layer(x)]
            layer.gains.data[0, 0] += 1
            outputs.append(layer(x))
            layer.set_akps("Lg", {"sigma": torch.full((2,), 1.7)})
            outputs.append(layer(x))
            layer.raw["G_theta"].data[1] += 1
            outputs.append(layer(x))
            torch.testing.assert_close(outputs[-1], copy.deepcopy(layer).train()(x))
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))


@pytest.mark.parametrize("compute", ["dense", "factored"])
def test_summary_counts_multiply_adds_of_flop_counter(compute: str) -> None:
    layer = AnalyticConv2d(16, 32, 5, arrangement="G100%", per="filter", padding=2, compute=compute, bias=False).eval()
    x = torch.randn(2, 16, 12, 12)
    with torch.no_grad():
        layer(x)  # fills the cache, so that only convolutions are counted
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert f"{counter.get_total_flops() // 2:,}" in acl.summary(layer, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": True}, "amplitude=True needs per='kernel'; a filter has a gain per input channel already"),
        ({"compute": "factored", "arrangement": "G50% P50%"}, "compute='factored' needs analytic filters only"),
        ({"arrangement": "G4 P3"}, r"arrangement 'G4 P3' has 7 filters, but the layer has 8$"),
        ({"arrangement": "G32"}, r"has 32 filters, but the layer has 8"),
    ],
)
def test_invalid_filter_mosaic_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_filters(**options)
    with pytest.raises(ValueError, match="compute='factored' needs per='filter'"):
        AnalyticConv2d(4, 8, 5, arrangement=SHAPES, compute="factored")
    with pytest.raises(ValueError, match="only a filter mosaic without plain filters can be factored"):
        AnalyticConv2d(4, 8, 5, arrangement=SHAPES).fold(factored=True)


def test_parametrized_gains_cannot_be_set() -> None:
    layer = make_filters()
    torch.nn.utils.parametrize.register_parametrization(layer, "gains", nn.Tanh())
    with pytest.raises(ValueError, match="gains is parametrized and cannot be set"):
        layer.set_gains("Lg", torch.ones(2, 4))


def test_gains_are_weights_of_the_optimizer() -> None:
    net = nn.Sequential(make_filters(), nn.BatchNorm2d(8))
    weights, biases, akps = acl.param_groups(net, lr=0.1, akp_lr_scale=3, weight_decay=0.01)
    assert weights["params"] == [net[0].gains] and weights["lr"] == 0.1 and weights["weight_decay"] == 0.01
    assert len(biases["params"]) == 3 and akps["lr"] == pytest.approx(0.3)
    frozen = make_filters(learn="none")
    assert frozen.gains.requires_grad and not any(p.requires_grad for p in frozen.raw.values())


def test_formula_lists_gains_of_filter() -> None:
    layer = make_filters(2, "Lg8")
    layer.set_akps("Lg", {"sigma": torch.full((8,), 1.5)})
    expression, *_, gains = layer.formula(3).split("; ")
    assert expression == "g*(L - mean(L))"
    scale = layer.scale_factors(layer.compute_kernels("Lg", layer.akps()["Lg"]))[3].item()
    expected = [f"{gain * scale:.3g}" for gain in layer.gains[3].tolist()]
    assert gains == f"g = [{', '.join(expected)}]"
    assert "; g = 9 gains from -" in make_filters(9, "Lg8").formula(0)
    assert make_filters(3, "P8").formula(0) == "3 x 5 x 5 free weights"


@pytest.mark.parametrize("degrees", [90, 33])
def test_rotated_filters_have_turned_outputs(degrees: float) -> None:
    layer = make_filters(3, "G4 Tf2 P2", kernel_size=9, padding=4, family="extended")
    with torch.no_grad():
        for symbol in ("G", "Tf"):
            layer.set_akps(symbol, {"sigma": torch.full((layer.arrangement.counts[symbol],), 1.5)})
        before = layer.weight.clone()
        norms = before.square().sum((2, 3))
        acl.rotate(layer, degrees)
        if degrees == 90:
            torch.testing.assert_close(layer.weight, torch.rot90(before, 1, (2, 3)), rtol=1e-6, atol=1e-7)
        analytic = [*layer.slots_of("G")]
        torch.testing.assert_close(layer.weight.square().sum((2, 3))[analytic], norms[analytic], rtol=0.1, atol=0)


def test_rescaled_filters_have_enlarged_outputs() -> None:
    layer = make_filters(3, "G4 Lg4", kernel_size=7, padding=3, bias=False)
    layer.set_akps("G", {"sigma": torch.full((4,), 1.2), "wavelength": torch.full((4,), 6.0)})
    layer.set_akps("Lg", {"sigma": torch.full((4,), 1.2)})
    x = nn.functional.interpolate(torch.randn(1, 3, 6, 6, dtype=torch.float64), (32, 32), mode="bicubic")
    with torch.no_grad():
        expected = nn.functional.interpolate(layer(x), scale_factor=2, mode="bicubic")
        enlarged = acl.rescale(layer, 2)(nn.functional.interpolate(x, scale_factor=2, mode="bicubic"))
    inner = (..., slice(16, -16), slice(16, -16))
    error = (enlarged - expected)[inner].square().sum() / expected[inner].square().sum()
    assert error < 0.02


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1, padding_mode="reflect")
    )


def test_converted_network_is_saved_loaded_and_folded(tmp_path: Path) -> None:
    net = convert(make_net(), "all", "G75% P25%", per="filter").eval()
    acl.save(net, tmp_path / "net.safetensors")
    x = torch.randn(1, 3, 12, 12)
    loaded = acl.load(make_net(), tmp_path / "net.safetensors").eval()
    assert loaded[0].options.per == "filter" and torch.equal(loaded(x), net(x))
    with pytest.raises(ValueError, match="arrangement is 'G24 P8' in the file, but 'G72 P24' in the model"):
        acl.load(convert(make_net(), "all", "G75% P25%"), tmp_path / "net.safetensors")
    torch.testing.assert_close(fold(copy.deepcopy(net))(x), net(x))


def test_fold_factors_the_layers_that_are_computed_factored() -> None:
    net = convert(make_net(), "all", "G100%", per="filter").eval()
    x = torch.randn(1, 3, 12, 12)
    expected = net(x)
    folded = fold(net, factored=True)
    assert type(folded[0]) is nn.Conv2d and [type(part) for part in folded[2]] == [nn.Conv2d, nn.Conv2d]
    torch.testing.assert_close(folded(x), expected)


def test_conversion_with_fit_recovers_filters() -> None:
    source = nn.Sequential(AnalyticConv2d(3, 12, 7, arrangement="G6 Lg2 Ts2 P2", per="filter", family="extended"))
    net = fold(copy.deepcopy(source))
    layer = convert(net, "all", "G6 Lg2 Ts2 P2", init="fit", per="filter", family="extended")[0]
    assert acl.output_error(source[0].weight, layer.weight) < 1e-3
    plain = layer.slots_of("P")
    assert torch.equal(layer.weight[plain], source[0].weight[plain])


def test_auto_keeps_filters_without_common_shape_plain() -> None:
    source = AnalyticConv2d(3, 6, 7, arrangement="G3 Lg1 P2", per="filter", bias=False)
    with torch.no_grad():
        source.plain.normal_()
    conv = source.fold()
    layer = convert(conv, "all", "auto", tolerance=0.02, per="filter")
    assert [kind == "P" for kind in layer.slot_kinds] == [False] * 4 + [True] * 2
    assert acl.output_error(source.weight, layer.weight) < 0.02


def test_attribution_removes_filters() -> None:
    net = nn.Sequential(
        AnalyticConv2d(1, 4, 3, arrangement="G2 P2", per="filter"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x, labels = torch.randn(64, 1, 8, 8), torch.randint(4, (64,))
    attribution = acl.explain.attribute(net, lambda: [(x, labels)], progress=False)
    for kept in (["G"], ["P"]):
        reduced = copy.deepcopy(net)
        removed = reduced[0].plain if kept == ["G"] else reduced[0].gains
        removed.data.zero_()
        correct = (reduced(x).argmax(1) == labels).sum().item()
        assert attribution.accuracy(kept) == 100 * correct / 64
    lost = acl.explain.leave_one_out(net, lambda: [(x, labels)], progress=False)["0"]
    assert lost.shape == (4,)
    reduced = copy.deepcopy(net)
    reduced[0].gains.data[1] = 0
    correct = [(n(x).argmax(1) == labels).sum().item() for n in (net, reduced)]
    assert lost[1].item() == pytest.approx(100 * (correct[0] - correct[1]) / 64)


@pytest.mark.parametrize("in_channels", [1, 3, 5])
def test_mosaic_has_one_tile_per_filter(in_channels: int) -> None:
    figure = plot.mosaic(make_filters(in_channels, "G4 Lg2 P2", dtype=torch.float32))
    assert [len(axes.patches) for axes in figure.axes] == [8]


def test_layers_that_share_their_weight_share_gains() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].weight = net[0].weight
    convert(net, "all", "G100%", per="filter")
    assert net[0].gains is net[1].gains
    before = net[0].weight.detach().clone()
    acl.rotate(net, 30)
    acl.rotate(net, -30)
    torch.testing.assert_close(net[0].weight, before, rtol=1e-4, atol=1e-5)
    folded = fold(net)
    assert folded[0].weight is folded[1].weight


@pytest.mark.parametrize("arrangement", ["G10% P90%", "G0 P4"])
def test_mosaic_whose_analytic_share_rounds_to_none_is_plain(arrangement: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = AnalyticConv2d(8, 4, 3, arrangement=arrangement, per="filter")
    x = torch.randn(1, 8, 6, 6)
    assert layer.arrangement.counts == {"P": 4} and layer.akps() == {}
    assert torch.equal(layer(x), fold(copy.deepcopy(layer))(x))
    assert layer.fold().weight.equal(layer.weight) and "P4" in repr(layer)


def test_factored_layer_runs_on_device_meta() -> None:
    layer = AnalyticConv2d(4, 8, 3, arrangement="G100%", per="filter", compute="factored", device="meta")
    assert layer(torch.empty(1, 4, 8, 8, device="meta")).shape == (1, 8, 6, 6)
