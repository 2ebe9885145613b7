import copy
import importlib
import io
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import acl
from acl import AnalyticConv2d, Arrangement, akp_parameters, convert, kernels
from acl.kernels import FAMILIES, KINDS, PROFILES, analytic_kinds
from acl.options import LayerKeywords, Per, Scale
from tests.arrangements import PAPER, arrange_all_kinds

replication = importlib.import_module("torch.nn.parallel.replicate")  # its package has a function of the same name
MOSAIC = "G25% Lg10% Lt10% Tf20% Ts10% P25%"


def make_layer(arrangement: str | Arrangement = MOSAIC, **options: Any) -> AnalyticConv2d:
    return AnalyticConv2d(4, 8, 5, arrangement=arrangement, **options)


def take_sgd_step(layer: AnalyticConv2d) -> None:
    layer(torch.randn(1, 4, 8, 8)).square().sum().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()


@pytest.fixture
def syntheses(monkeypatch: pytest.MonkeyPatch) -> list[AnalyticConv2d]:
    """A list that grows by one layer each time a layer synthesizes its weight."""
    calls: list[AnalyticConv2d] = []
    synthesize = AnalyticConv2d._synthesize

    def count_and_synthesize(self: AnalyticConv2d) -> Tensor:
        calls.append(self)
        return synthesize(self)

    monkeypatch.setattr(AnalyticConv2d, "_synthesize", count_and_synthesize)
    return calls


# The layer as a convolution


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (1, 2), "padding": (2, 1)},
        {"padding": "same"},
        {"padding": "valid", "dilation": 2},
        {"dilation": (1, 2), "padding": 3},
        {"groups": 4, "bias": False},
        {"groups": 2},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": "same", "padding_mode": "reflect", "dilation": 2},
        {"kernel_size": (3, 6), "padding": (1, 2)},
        {"kernel_size": (1, 1)},
        {"dtype": torch.double},
    ],
    ids=str,
)
@pytest.mark.parametrize("per", get_args(Per))
def test_output_equals_conv2d_with_same_weight(options: dict[str, Any], per: str) -> None:
    arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": 5, **options}
    layer = AnalyticConv2d(**arguments, arrangement=MOSAIC, per=per)
    conv = nn.Conv2d(**arguments)
    with torch.no_grad():
        conv.weight.copy_(layer.weight)
        if layer.bias is not None:
            conv.bias.copy_(layer.bias)
    x = torch.randn(2, 4, 16, 18, dtype=options.get("dtype"))
    assert torch.equal(layer(x), conv(x))
    assert torch.equal(layer.fold()(x), conv(x))
    assert layer(x[0]).shape == conv(x[0]).shape
    if options.get("padding_mode", "zeros") == "zeros":
        geometry = [options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1)]
        expected = F.conv2d(x, layer.weight, layer.bias, *geometry, options.get("groups", 1))
        assert torch.equal(layer(x), expected)


def test_layer_is_conv2d_without_weight_parameter() -> None:
    layer = make_layer()
    assert isinstance(layer, nn.Conv2d)
    assert "weight" not in dict(layer.named_parameters()) and "weight" not in layer.state_dict()
    assert layer.weight.shape == nn.Conv2d(4, 8, 5).weight.shape
    with pytest.raises(TypeError, match=r"acl.fold\(model\)"):
        layer.weight = nn.Parameter(torch.zeros(8, 4, 5, 5))


def test_keywords_of_layer_are_the_fields_of_its_options() -> None:
    assert LayerKeywords.__annotations__ == {field.name: field.type for field in fields(acl.LayerOptions)}


def test_repr_adds_arrangement_and_options_to_conv2d_repr() -> None:
    options = {"padding": 2, "groups": 2, "bias": False}
    conv_repr = nn.Conv2d(4, 8, 5, **options).extra_repr()
    layer = make_layer("G25% P75%", **options)
    assert layer.extra_repr() == f"{conv_repr}, arrangement='G4 P12'"
    layer = make_layer("G25% P75%", **options, amplitude=True, scale="raw", family="extended", profile="linear")
    assert layer.extra_repr() == (
        f"{conv_repr}, arrangement='G4 P12', scale='raw', amplitude=True, family='extended', profile='linear'"
    )


@pytest.mark.parametrize(
    "initialize",
    [nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.zeros_, nn.init.trunc_normal_, nn.init.dirac_],
    ids=lambda initialize: initialize.__name__,
)
def test_conv2d_initializer_leaves_weight_unchanged(initialize: Callable[[Tensor], Tensor]) -> None:
    """Initializers written for nn.Conv2d neither raise nor overwrite the AKPs."""

    def initialize_conv(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            initialize(module.weight)
            nn.init.zeros_(module.bias)

    model = nn.Sequential(make_layer(), nn.ReLU(), nn.Conv2d(8, 8, 3))
    before = model[0].weight.detach().clone()
    model.apply(initialize_conv)
    assert torch.equal(model[0].weight, before)
    assert not model[0].bias.any()
    take_sgd_step(model[0])
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 2}, {"groups": 2, "bias": False}], ids=str)
def test_flops_equal_conv2d_flops(options: dict[str, Any], training: bool) -> None:
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    counts = []
    for module in (make_layer(**options), nn.Conv2d(4, 8, 5, **options)):
        with FlopCounterMode(display=False) as counter:
            output = module.train(training)(x)
            if training:
                output.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("traced_in_training", [True, False])
def test_fx_trace_gives_equal_outputs_in_train_and_eval_mode(traced_in_training: bool) -> None:
    model = nn.Sequential(
        make_layer(padding=2), nn.BatchNorm2d(8), nn.ReLU(), AnalyticConv2d(8, 4, 3, arrangement=MOSAIC, amplitude=True)
    )
    traced = torch.fx.symbolic_trace(model.train(traced_in_training))
    x = torch.randn(2, 4, 12, 12)
    for training in (True, False):
        assert torch.equal(traced.train(training)(x), model.train(training)(x))
    grads = []
    for module in (traced.train(), model.train()):
        module.zero_grad()
        module(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in module.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])
    take_sgd_step(model[0])
    for training in (True, False):
        assert torch.equal(traced.train(training)(x), model.train(training)(x))


def test_removing_unused_modules_of_a_trace_keeps_the_layer() -> None:
    model = nn.Sequential(make_layer(), nn.ReLU())
    x = torch.randn(1, 4, 8, 8)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    traced.delete_all_unused_submodules()
    assert torch.equal(traced(x), expected) and torch.equal(model(x), expected)


WEIGHT_TOOLS: dict[str, Callable[[AnalyticConv2d], Any]] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "fusion": lambda layer: fuse_conv_bn_eval(layer, nn.BatchNorm2d(8).eval()),
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "low-rank adapter": lambda layer: type(layer)(4, 2, layer.kernel_size, bias=False),  # as PEFT's LoRA creates it
    "scripting": torch.jit.script,
    "scripting a network": lambda layer: torch.jit.script(nn.Sequential(layer)),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("tool", WEIGHT_TOOLS)
def test_tool_that_needs_a_stored_weight_says_fold_first(tool: str) -> None:
    layer = make_layer().eval()
    names, output = list(dict(layer.named_parameters())), layer(torch.ones(1, 4, 8, 8))
    with pytest.raises((TypeError, KeyError), match=r"acl.fold\(model\) makes its analytic layers plain"):
        WEIGHT_TOOLS[tool](layer)
    assert list(dict(layer.named_parameters())) == names and torch.equal(layer(torch.ones(1, 4, 8, 8)), output)


def test_feature_extractor_finds_analytic_layers_of_resnet() -> None:
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    model = convert(resnet18(weights=None), {"conv1": MOSAIC, "layer1.*": "Ts25% P75%"})
    extractor = create_feature_extractor(model, ["conv1", "layer1"])
    outputs: dict[str, Tensor] = {}
    for name in ("conv1", "layer1"):
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    x = torch.randn(2, 3, 32, 32)
    for training in (True, False):
        features = extractor.train(training)(x)
        model.train(training)(x)
        assert list(features) == ["conv1", "layer1"]
        assert all(torch.equal(features[name], outputs[name]) for name in features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrangement": "G31"}, r"'G31' has 31 kernels, but the layer has 32 \(4 x 8\)"),
        ({"groups": 2, "arrangement": "G32"}, r"'G32' has 32 kernels, but the layer has 16 \(2 x 8\)"),
        ({"scale": "l2"}, "unknown scale 'l2'; known: unit, raw"),
        ({"family": "big"}, "unknown family 'big'; known: paper, extended"),
        ({"profile": "box"}, "unknown profile 'box'; known: exponential, gaussian, linear"),
        ({"learn": ["phi"]}, "unknown AKP 'phi' in learn; known: all, none, amplitude"),
        ({"placement": torch.tensor([0, 0])}, "placement must be a permutation of the layer's 32 slots"),
        ({"placement": torch.arange(32).clamp(max=30)}, "placement must be a permutation of the layer's 32 slots"),
        ({"groups": 3}, "divisible by groups"),
        ({"padding_mode": "mirror"}, "padding_mode"),
    ],
)
def test_error_names_invalid_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**{"arrangement": MOSAIC, **options})


def test_error_names_argument_of_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'amplitud'; the options .* are scale, per, amplitude,"):
        make_layer(arrangement=MOSAIC, amplitud=True)
    with pytest.raises(TypeError, match=r"an arrangement is text, .*, got 32"):
        make_layer(arrangement=32)


# The weight and its parameters


def test_paper_example_has_4962_parameters() -> None:
    layer = AnalyticConv2d(3, 64, 7, stride=2, padding=3, bias=False, arrangement=PAPER)
    assert sum(p.numel() for p in layer.parameters()) == 4962
    assert sum(p.numel() for p in nn.Conv2d(3, 64, 7, bias=False).parameters()) == 9408
    with_gains = AnalyticConv2d(3, 64, 7, bias=False, arrangement=PAPER, amplitude=True)
    assert sum(p.numel() for p in with_gains.parameters()) == 4962 + 96


def test_slots_are_filled_in_order_of_arrangement() -> None:
    """Even if plain kernels stand between analytic ones."""
    layer = AnalyticConv2d(2, 5, 5, arrangement="Lg3 P4 G2 Tf1", scale="raw", bias=False)
    akps = layer.akps()
    slots = layer.weight.flatten(0, 1)
    assert torch.equal(slots[:3], kernels.log(**akps["Lg"], size=(5, 5)))
    assert torch.equal(slots[3:7], layer.plain)
    assert torch.equal(slots[7:9], kernels.gabor(**akps["G"], size=(5, 5)))
    assert torch.equal(slots[9:], kernels.tgd1(**akps["Tf"], size=(5, 5)))


def test_layer_without_plain_kernels_has_no_empty_parameter() -> None:
    """An empty parameter gets no gradient, and distributed training would wait for it."""
    layer = make_layer("G100%")
    assert layer.plain is None and all(p.numel() for p in layer.parameters())
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_weight_parameters_are_akps_then_plain_kernels() -> None:
    layer = make_layer(amplitude=True)
    expected = [*layer.raw.values(), layer.plain]
    assert all(map(torch.equal, layer.weight_parameters(), expected))
    assert {*map(id, layer.weight_parameters())} == {*map(id, layer.parameters())} - {id(layer.bias)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amplitude", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_sgd_step_changes_every_parameter(profile: str, amplitude: bool, family: str) -> None:
    layer = make_layer(arrange_all_kinds(), profile=profile, amplitude=amplitude, family=family, dtype=torch.double)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer(torch.randn(2, 4, 12, 12, dtype=torch.double)).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    for name, parameter in layer.named_parameters():
        changed = parameter != before[name]
        # A linear profile that reaches only the nearest ring of pixels gives the same shape for every s.
        assert changed.any() if profile == "linear" and name.endswith("_s") else changed.all(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("profile", PROFILES)
def test_layer_gradients_agree_with_finite_differences(profile: str, scale: str, family: str) -> None:
    out_channels = math.ceil(len(KINDS) / 2)
    arrangement = arrange_all_kinds()
    layer = AnalyticConv2d(
        2, out_channels, 5, arrangement=arrangement, profile=profile, scale=scale, family=family, amplitude=True
    ).double()
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(1, 2, 7, 7, dtype=torch.double)

    def compute_output(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(compute_output, values)


@pytest.mark.parametrize(
    "arrangement", [*(f"{symbol}100%" for symbol in analytic_kinds()), arrange_all_kinds()], ids=str
)
def test_unit_scale_preserves_variance(arrangement: str | Arrangement) -> None:
    """Kernels of norm 1 / sqrt(C_in) map white noise of variance 1 to outputs of variance 1."""
    layer = AnalyticConv2d(16, 32, 5, arrangement=arrangement, bias=False)
    if layer.plain is not None:
        nn.init.normal_(layer.plain, std=1 / (16 * 25) ** 0.5)
    assert layer(torch.randn(4, 16, 32, 32)).var().item() == pytest.approx(1, abs=0.1)


def test_unit_scale_factors_give_squared_norm_of_one_over_input_channels() -> None:
    analytic = torch.randn(3, 5, 5)
    layer = make_layer(groups=2)
    norms = (analytic * layer.scale_factors(analytic)).square().sum((-2, -1))
    torch.testing.assert_close(norms, torch.full((3,), 1 / 2))
    assert torch.equal(make_layer(scale="raw").scale_factors(analytic), torch.ones(3, 1, 1))


def test_initial_akps_are_within_init_range() -> None:
    layer = make_layer(arrange_all_kinds(), amplitude=True, family="extended")
    akps = layer.akps()
    assert set(akps) == set(analytic_kinds())
    for symbol, values in akps.items():
        expected = KINDS[symbol].akps("extended", amplitude=True)
        assert list(values) == [akp.name for akp in expected]
        for akp in expected:
            low, high = akp.init_range(5)
            assert values[akp.name].shape == (layer.arrangement.counts[symbol],)
            assert (values[akp.name] >= low - 1e-5).all() and (values[akp.name] <= high + 1e-5).all()


def test_akp_parameters_are_those_of_analytic_layers() -> None:
    layers = [make_layer(), make_layer(amplitude=True)]
    expected = [id(p) for layer in layers for p in layer.raw.values()]
    assert [id(p) for p in akp_parameters(nn.Sequential(layers[0], nn.Conv2d(8, 4, 3), layers[1]))] == expected


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("symbol", analytic_kinds())
def test_set_akps_inverts_akps(symbol: str, placed: bool) -> None:
    options: dict[str, Any] = {"amplitude": True, "family": "extended", "dtype": torch.double}
    options["placement"] = torch.randperm(32) if placed else None
    layer, source = make_layer(arrange_all_kinds(), **options), make_layer(arrange_all_kinds(), **options)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.set_akps(symbol, source.akps()[symbol])
    for name, values in layer.akps()[symbol].items():
        torch.testing.assert_close(values, source.akps()[symbol][name], rtol=1e-9, atol=1e-9)
    for slot in layer.slots_of(symbol):
        kernel, expected = layer.weight.flatten(0, 1)[slot], source.weight.flatten(0, 1)[slot]
        torch.testing.assert_close(kernel, expected, rtol=1e-7, atol=1e-9)
    for name, parameter in layer.named_parameters():
        is_set = name.startswith(f"raw.{symbol}_") and not name.endswith("_amplitude")  # every gain starts at 1
        assert torch.equal(parameter, before[name]) != is_set, name
        assert parameter.requires_grad


def test_set_akps_sets_only_given_akps_at_index() -> None:
    layer = make_layer("G8 P24")
    before = {name: values.clone() for name, values in layer.akps()["G"].items()}
    layer.set_akps("G", {"wavelength": torch.tensor([4.0, 5.0])}, torch.tensor([6, 1]))
    expected = before["wavelength"].index_put((torch.tensor([6, 1]),), torch.tensor([4.0, 5.0]))
    torch.testing.assert_close(layer.akps()["G"]["wavelength"], expected)
    layer.set_akps("G", {"psi": torch.tensor([-1.0, 9.0])}, slice(2, 4))
    assert layer.akps()["G"]["psi"][2:4].tolist() == [-1, 9]
    for name in ("theta", "sigma"):
        assert torch.equal(layer.akps()["G"][name], before[name])


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (symbol, akp.name)
        for symbol, kind in analytic_kinds().items()
        for akp in kind.akps("extended")
        if akp.floor is not None
    ],
)
def test_set_akps_rejects_value_at_floor(symbol: str, name: str) -> None:
    layer = make_layer(f"{symbol}2 P30", family="extended")
    before = layer.akps()[symbol][name].clone()
    floor = next(akp.floor for akp in KINDS[symbol].akps("extended") if akp.name == name)
    for value in (floor, floor - 1):
        with pytest.raises(ValueError, match=f"{name} must be above {floor:g}.*, got {value:g}"):
            layer.set_akps(symbol, {name: torch.tensor([floor + 1, value], dtype=torch.double)})
    assert torch.equal(layer.akps()[symbol][name], before)


@pytest.mark.parametrize(
    ("akps", "message"),
    [
        ({"theta": torch.ones(2), "sigma": torch.ones(3)}, r"G_sigma needs values of the shape \(2,\), got \(3,\)"),
        (
            {"sigma": torch.ones(2), "theta": torch.tensor([1.0, math.nan])},
            "G_theta needs finite values of torch.float32, got nan",
        ),
    ],
)
def test_set_akps_rejects_values_and_leaves_layer_unchanged(akps: dict[str, torch.Tensor], message: str) -> None:
    layer = make_layer("G2 P30")
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        layer.set_akps("G", akps)
    assert torch.equal(layer.weight, weight)


def test_set_akps_rejects_value_that_overflows() -> None:
    layer = AnalyticConv2d(1, 2, 5, arrangement="G100%").half()
    with pytest.raises(ValueError, match=r"G_theta needs finite values of torch.float16, got 100000"):
        layer.set_akps("G", {"theta": torch.tensor([1.0, 1e5])})
    assert layer.weight.isfinite().all()


def test_amplitude_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="amplitude must be True or False, got 'no'"):
        AnalyticConv2d(1, 2, 5, arrangement="G100%", amplitude="no")  # type: ignore[arg-type]


def test_set_akps_rejects_unknown_name() -> None:
    with pytest.raises(ValueError, match="the layer has no AKP G_gamma; it has: G_psi, G_sigma, G_theta, "):
        make_layer("G2 P30").set_akps("G", {"gamma": torch.ones(2)})
    with pytest.raises(ValueError, match="the layer has no AKP Tf_theta"):
        make_layer("G2 P30").set_akps("Tf", {"theta": torch.ones(2)})


def test_folded_frozen_layer_stays_frozen() -> None:
    assert not any(p.requires_grad for p in make_layer("G8 P24").requires_grad_(False).fold().parameters())
    assert all(p.requires_grad for p in make_layer("G8 P24", learn="none").fold().parameters())


@pytest.mark.parametrize(
    ("learn", "learned"),
    [
        ("all", {"theta", "wavelength", "psi", "sigma", "s"}),
        ("none", set()),
        (["theta", "s"], {"theta", "s"}),
        ("psi", {"psi"}),
    ],
)
def test_only_learned_akps_change(learn: Any, learned: set[str]) -> None:
    layer = make_layer(learn=learn)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    take_sgd_step(layer)
    for name, parameter in layer.named_parameters():
        is_learned = name in ("plain", "bias") or name.split("_")[-1] in learned
        assert torch.equal(parameter, before[name]) != is_learned, name


# The cached weight


def test_weight_is_synthesized_per_forward_with_gradients_and_once_without(syntheses: list[AnalyticConv2d]) -> None:
    layer = make_layer()
    x = torch.randn(1, 4, 8, 8)
    layer(x), layer(x)
    assert len(syntheses) == 2
    layer.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            layer(x), layer(x)
    assert len(syntheses) == 3
    layer(x), layer(x)
    assert len(syntheses) == 5
    layer.requires_grad_(False)
    layer(x)
    assert len(syntheses) == 5


def test_edit_of_returned_weight_leaves_eval_layer_unchanged() -> None:
    layer = make_layer().eval()
    with torch.no_grad():
        expected = layer.weight.clone()
        nn.init.zeros_(layer.weight)
        layer.weight.data.add_(1)
        assert torch.equal(layer.weight, expected)


def test_edit_of_weight_by_host_leaves_eval_layer_unchanged() -> None:
    class InPlaceConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.mul_(2)
            return super().forward(x)

    layer = convert(InPlaceConv(4, 8, 5), "all", MOSAIC).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))


def take_fused_step(layer: AnalyticConv2d) -> None:
    """A fused optimizer leaves the version counters of parameters as they are."""
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def add_in_place(layer: AnalyticConv2d) -> None:
    with torch.no_grad():
        layer.raw["Lg_sigma"].add_(1)


CHANGES: dict[str, Callable[[AnalyticConv2d], Any]] = {
    "optimizer step": take_sgd_step,
    "fused optimizer step": take_fused_step,
    "in place": add_in_place,
    "through .data": lambda layer: layer.raw["G_theta"].data.add_(1),
    "plain through .data": lambda layer: layer.plain.data.add_(1),
    "new .data": lambda layer: setattr(layer.raw["G_theta"], "data", layer.raw["G_theta"].data + 1),
    "new parameter": lambda layer: layer.raw.__setitem__("Ts_s", nn.Parameter(layer.raw["Ts_s"].detach() + 1)),
    "set_akps": lambda layer: layer.set_akps("Lg", {"sigma": torch.full((3,), 0.9)}),
    "state dict": lambda layer: layer.load_state_dict(make_layer().state_dict()),
    "assigned state dict": lambda layer: layer.load_state_dict(make_layer().state_dict(), assign=True),
    "reset": lambda layer: layer.reset_parameters(),
    "scale": lambda layer: setattr(layer, "options", replace(layer.options, scale="raw")),
    "profile": lambda layer: setattr(layer, "options", replace(layer.options, profile="linear")),
    "dtype": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "memory format": lambda layer: layer.to(memory_format=torch.channels_last),
    "step in training mode": lambda layer: (take_sgd_step(layer.train()), layer.eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cached_weight_follows_change(change: str) -> None:
    layer = make_layer().eval()
    before = layer.weight.detach().clone(memory_format=torch.preserve_format)
    CHANGES[change](layer)
    expected = layer._synthesize()
    assert torch.equal(layer.weight, expected)
    assert layer.weight.dtype == expected.dtype and layer.weight.stride() == expected.stride()
    assert (
        layer.weight.dtype != before.dtype
        or layer.weight.stride() != before.stride()
        or not torch.equal(layer.weight, before)
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_placement_permutes_weight_and_gradients(memory_format: torch.memory_format) -> None:
    placement = torch.randperm(32)
    placed = make_layer(amplitude=True, placement=placement).to(memory_format=memory_format)
    ordered = make_layer(amplitude=True).to(memory_format=memory_format)
    ordered.load_state_dict({k: v for k, v in placed.state_dict().items() if k != "placement_bits"})
    assert torch.equal(placed.weight.flatten(0, 1), ordered.weight.flatten(0, 1)[placement])
    grad = torch.randn(32, 5, 5)
    (placed.weight.flatten(0, 1) * grad[placement]).sum().backward()
    (ordered.weight.flatten(0, 1) * grad).sum().backward()
    for parameter, expected in zip(placed.weight_parameters(), ordered.weight_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


class Shift(nn.Module):
    """A parametrization that computes an AKP from a parameter of its own."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw + 0.5


ALL_GABOR_AKPS = ["G_theta", "G_wavelength", "G_psi", "G_sigma"]


@pytest.mark.parametrize(
    ("arrangement", "keys"),
    [
        ("G32", ["G_theta"]),
        ("G32", ALL_GABOR_AKPS),
        ("G16 P16", ["G_theta"]),
        ("G16 P16", ["plain"]),
        ("G16 P16", [*ALL_GABOR_AKPS, "plain"]),
    ],
    ids=str,
)
def test_parametrized_parameters_determine_weight_in_eval_mode(arrangement: str, keys: list[str]) -> None:
    layer, expected = make_layer(arrangement), make_layer(arrangement)
    expected.load_state_dict(layer.state_dict())
    for key in keys:
        parametrize.register_parametrization(layer if key == "plain" else layer.raw, key, Shift())
        expected.get_parameter(key if key == "plain" else f"raw.{key}").data.add_(0.5)
    with torch.no_grad():
        for module in (layer, expected):
            module.eval()(torch.randn(1, 4, 8, 8))
        assert torch.equal(layer.weight, expected.weight)
        layer.load_state_dict({key: value + 1 for key, value in layer.state_dict().items()})
        expected.load_state_dict({key: value + 1 for key, value in expected.state_dict().items()})
        torch.testing.assert_close(layer.weight, expected.weight)


def test_parametrized_akps_keep_their_learning_rate_and_cannot_be_set() -> None:
    layer = make_layer("G16 P16", amplitude=True)
    for key in ("G_theta", "G_amplitude"):
        parametrize.register_parametrization(layer.raw, key, Shift())
    groups = acl.param_groups(layer, 1.0, akp_lr_scale=5.0, gain_lr_scale=7.0)
    assert {group["lr"]: len(group["params"]) for group in groups} == {1.0: 1, 5.0: 4, 7.0: 1}
    for change in (lambda: layer.set_akps("G", {"theta": torch.zeros(16)}), layer.reset_parameters):
        with pytest.raises(ValueError, match="G_theta is parametrized and cannot be set"):
            change()


def replicate_on_cpu(model: nn.Module) -> nn.Module:
    """A replica as DataParallel makes them, which has tensors in place of parameters."""
    with mock.patch.multiple(
        replication,
        _get_device_index=lambda device, optional: device,
        _broadcast_coalesced_reshape=lambda tensors, devices, detach: [[tensor.detach() for tensor in tensors]],
    ):
        return replication.replicate(model, [torch.device("cpu")], detach=True)[0]


@pytest.mark.parametrize("arrangement", ["G32", MOSAIC])
def test_replicas_in_eval_mode_give_equal_outputs(arrangement: str) -> None:
    layer = make_layer(arrangement, bias=False).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(replicate_on_cpu(layer)(x), layer(x))


# Structure is not state


def make_network(variant: str) -> nn.Sequential:
    options: dict[str, Any] = {
        "amplitude": {"amplitude": True},
        "extended": {"family": "extended"},
        "placed": {"placement": torch.randperm(4096)},
        "filters": {"per": "filter"},
    }.get(variant, {})
    channels = 64 if variant == "placed" else 8  # averages move few of few kernels
    first = AnalyticConv2d(channels, channels, 3, padding=1, arrangement=MOSAIC, **options)
    second = first if variant == "shared" else AnalyticConv2d(channels, channels, 3, arrangement="G50% P50%", padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(channels), second).eval()


def update_ema(ema: nn.Module, model: nn.Module) -> nn.Module:
    ema.update(model)  # type: ignore[operator]
    return ema.ema if hasattr(ema, "ema") else ema.module


def average_in_torch(model: nn.Module, **options: Any) -> nn.Module:
    averaged = AveragedModel(model, use_buffers=True, **options)
    for _ in range(3):
        averaged.update_parameters(model)
    return averaged.module


def load_changed_state(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    loaded = copy.deepcopy(model)
    loaded.load_state_dict({key: change(value) for key, value in model.state_dict().items()})
    return loaded


CONSERVED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "timm ModelEma": lambda model: update_ema(timm.utils.ModelEma(model, 0.9), model),
    "timm ModelEmaV2": lambda model: update_ema(timm.utils.ModelEmaV2(model, 0.9), model),
    "timm ModelEmaV3": lambda model: update_ema(timm.utils.ModelEmaV3(model, 0.9), model),
    **{
        f"EMA {decay}": lambda model, decay=decay: average_in_torch(model, avg_fn=get_ema_avg_fn(decay))
        for decay in (0.9, 0.99, 0.999, 0.9999)
    },
    "multi EMA": lambda model: average_in_torch(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "SWA": average_in_torch,
    "interpolated state dict": lambda model: load_changed_state(model, lambda t: 0.9 * t + 0.1 * t),
    "double state dict": lambda model: load_changed_state(model, Tensor.double),
    "double and back": lambda model: copy.deepcopy(model).double().float(),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "replica": replicate_on_cpu,
}


@pytest.mark.parametrize("variant", ["plain", "amplitude", "extended", "placed", "shared", "filters"])
@pytest.mark.parametrize("conserve", CONSERVED)
def test_averages_casts_and_replicas_of_equal_networks_keep_outputs(
    variant: str, conserve: str, tmp_path: Path
) -> None:
    model = make_network(variant)
    x = torch.randn(1, model[0].in_channels, 6, 6)
    with torch.no_grad():
        expected = model(x)
        result = CONSERVED[conserve](model)
        torch.testing.assert_close(result.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert result[0].slot_kinds == model[0].slot_kinds
    if conserve != "replica":
        acl.save(result, tmp_path / "net.safetensors")
        loaded = acl.load(copy.deepcopy(model), tmp_path / "net.safetensors")
        assert loaded[0].slot_kinds == model[0].slot_kinds


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("of_state_dict", [True, False])
def test_half_precision_keeps_placement(dtype: torch.dtype, of_state_dict: bool) -> None:
    model = make_network("placed")
    if of_state_dict:
        result = load_changed_state(model, lambda tensor: tensor.to(dtype))
    else:
        result = copy.deepcopy(model).to(dtype)
    assert torch.equal(result[0].placement, model[0].placement)


def test_state_dict_of_other_placement_is_refused() -> None:
    layer = AnalyticConv2d(2, 3, 5, arrangement="G3 P3", placement=torch.arange(6)).eval()
    other = AnalyticConv2d(2, 3, 5, arrangement="G3 P3", placement=torch.arange(6).flip(0))
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"0\.placement_bits: the state dict places its kernels in other slots"):
        nn.Sequential(layer).load_state_dict(nn.Sequential(other).state_dict())
    ordered = AnalyticConv2d(2, 3, 5, arrangement="G3 P3")
    with pytest.raises(RuntimeError, match=r"Missing key.*placement_bits"):
        layer.load_state_dict(ordered.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*placement_bits"):
        ordered.load_state_dict(layer.state_dict())
    assert layer.load_state_dict({}, strict=False).missing_keys
    layer.load_state_dict(other.state_dict() | {"placement_bits": layer.state_dict()["placement_bits"]})
    assert layer.slot_kinds == ["G", "G", "G", "P", "P", "P"]
    assert not torch.equal(layer.weight, before)


def test_eval_mode_gives_same_gradients_in_every_backward() -> None:
    layer = make_layer()
    x = torch.randn(1, 4, 8, 8)
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.eval()
    with torch.inference_mode():
        layer(x)
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


VARIANTS: dict[str, dict[str, Any]] = {
    "plain options": {},
    "amplitude": {"amplitude": True},
    "extended": {"family": "extended"},
    "placement": {"placement": torch.randperm(8, generator=torch.Generator().manual_seed(0))},
    "filters": {"per": "filter", "arrangement": "G1 Lg1 Ts1 P1", "placement": torch.tensor([2, 0, 3, 1])},
    "factored": {"per": "filter", "arrangement": "G1 Lt1 Tf2", "compute": "factored"},
}


def make_small_layer(variant: str, training: bool) -> AnalyticConv2d:
    options = {"arrangement": "G2 Lg1 Lt1 Tf1 Ts1 P2", **VARIANTS[variant]}
    layer = AnalyticConv2d(2, 4, 5, dtype=torch.double, **options)
    layer.train(training)
    with torch.no_grad():
        layer(torch.randn(1, 2, 6, 6, dtype=torch.double))  # fills the cache in eval mode
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_match_finite_differences(variant: str, training: bool) -> None:
    layer = make_small_layer(variant, training)
    x = torch.randn(1, 2, 6, 6, dtype=torch.double)
    parameters = list(layer.parameters())

    def compute_gradient() -> torch.Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(layer(x).square().sum(), parameters, create_graph=True)]
        )

    gradient = compute_gradient()
    direction = [torch.randn_like(p) for p in parameters]
    dot = gradient @ torch.cat([d.flatten() for d in direction])
    product = torch.cat([h.flatten() for h in torch.autograd.grad(dot, parameters)])
    step = 1e-6
    gradients = []
    for sign in (1, -2):  # to +step, then to -step
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        gradients.append(compute_gradient().detach())
    torch.testing.assert_close(product, (gradients[0] - gradients[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_function_transforms_work_in_both_modes(variant: str, training: bool) -> None:
    layer = make_small_layer(variant, training)
    x = torch.randn(3, 1, 2, 6, 6, dtype=torch.double)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(image) for image in x]))
    (jacobian,) = torch.func.jacrev(layer, argnums=(0,))(x[0])
    _, tangent = torch.func.jvp(layer, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, (jacobian * x[1]).sum((-4, -3, -2, -1)))
    parameters, buffers = torch.func.stack_module_state([layer, copy.deepcopy(layer)])
    outputs = torch.func.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), (x[0],)))(parameters, buffers)
    torch.testing.assert_close(outputs[1], layer(x[0]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["plain options", "factored"])
def test_jit_trace_gives_equal_outputs(variant: str, training: bool) -> None:
    layer = make_small_layer(variant, training)
    x = torch.randn(1, 2, 6, 6, dtype=torch.double)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))


# Copies, dtypes, devices and memory formats


@pytest.mark.parametrize("in_channels", [1, 4])
def test_weight_follows_memory_format_of_module(in_channels: int) -> None:
    conv = nn.Conv2d(in_channels, 8, 5).to(memory_format=torch.channels_last)
    layer = AnalyticConv2d(in_channels, 8, 5, arrangement=MOSAIC).to(memory_format=torch.channels_last)
    for module in (layer, copy.deepcopy(layer), copy.deepcopy(layer).eval(), pickle.loads(pickle.dumps(layer))):
        assert module.weight.stride() == conv.weight.stride()
    assert layer.fold().weight.stride() == conv.weight.stride()
    contiguous = nn.Conv2d(in_channels, 8, 5)
    assert layer.to(memory_format=torch.contiguous_format).weight.stride() == contiguous.weight.stride()


def test_copies_and_state_dicts_give_same_outputs() -> None:
    layer = make_layer(amplitude=True, family="extended").eval()
    x = torch.randn(1, 4, 8, 8)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make_layer(amplitude=True, family="extended").eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    assert not any("_format" in name for name in layer.state_dict())


def test_autocast_synthesizes_weight_in_float32() -> None:
    layer = make_layer()
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, layer._synthesize())
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_half_precision_weight_is_rounded_float32_weight(dtype: torch.dtype) -> None:
    layer = make_layer().to(dtype)
    in_float32 = copy.deepcopy(layer).float()
    assert torch.equal(layer.weight, in_float32.weight.to(dtype))


def test_meta_layer_can_be_materialized() -> None:
    with torch.device("meta"):
        assert make_layer().weight.is_meta
    layer = make_layer(device="meta")
    assert layer.weight.is_meta and layer.eval().weight.is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.weight.isfinite().all()


def test_folded_layer_is_plain_conv2d() -> None:
    folded = make_layer(bias=False, dtype=torch.double).eval().fold()
    assert type(folded) is nn.Conv2d and folded.bias is None and not folded.training
    assert folded.weight.dtype == torch.double and isinstance(folded.weight, nn.Parameter)


# Compilation, export and function transforms


@pytest.mark.parametrize(
    ("training", "options"), [(True, {}), (False, {"arrangement": "G8", "per": "filter", "compute": "factored"})]
)
def test_layer_compiles_to_one_graph(training: bool, options: dict[str, Any]) -> None:
    layer = make_layer(**options).train(training)
    x = torch.randn(2, 4, 8, 8)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    grads = []
    for module in (compiled, layer):
        layer.zero_grad()
        module(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        list(layer.parameters())[-1].add_(1)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("strict", "options"),
    [(True, {}), (False, {}), (True, {"arrangement": "G8", "per": "filter", "compute": "factored"})],
)
def test_exported_program_gives_same_outputs(strict: bool, options: dict[str, Any]) -> None:
    layer = make_layer(**options).eval()
    x = torch.randn(2, 4, 8, 8)
    _ = layer(x)
    program = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), layer(x))
    assert "raw.G_theta" in program.state_dict


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_grad_and_vmap_use_given_parameters(training: bool) -> None:
    layer = make_layer().train(training)
    x = torch.randn(1, 4, 8, 8)
    _ = layer(x)
    parameters = {name: p.detach() + 0.1 for name, p in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict(parameters)
    assert torch.equal(torch.func.functional_call(layer, parameters, (x,)), other(x))
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    stacked = {name: torch.stack([p, p + 0.1]) for name, p in parameters.items()}
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
    torch.testing.assert_close(outputs[0], other(x))


def test_shared_akps_are_listed_once() -> None:
    layers = [nn.Conv2d(4, 4, 3) for _ in range(2)]
    layers[1].weight = layers[0].weight
    parameters = list(acl.akp_parameters(acl.convert(nn.Sequential(*layers), "all", "G100%")))
    assert len(parameters) == len(set(parameters)) == 4


def test_formula_is_computed_on_device_of_layer() -> None:
    layer = AnalyticConv2d(3, 4, 5, arrangement="G12")
    expected = layer.formula(0)
    with torch.device("meta"):
        assert layer.formula(0) == expected


@pytest.mark.parametrize(
    ("options", "wrong"), [({"per": "filter"}, (4, 1)), ({"amplitude": True}, (12, 5)), ({"amplitude": True}, (12,))]
)
def test_gains_of_another_shape_are_refused(options: dict[str, Any], wrong: tuple[int, ...]) -> None:
    layer = AnalyticConv2d(3, 4, 5, arrangement="G100%", **options)
    shape = tuple(layer.gains_of("G").shape)
    with pytest.raises(ValueError, match=f"{re.escape(str(wrong))} instead of {re.escape(str(shape))}"):
        layer.set_gains("G", torch.ones(wrong))
    layer.set_gains("G", torch.full(shape, 2.0))
    assert torch.equal(layer.gains_of("G"), torch.full(shape, 2.0))


def test_load_with_assign_takes_dtype_from_what_the_weight_is_computed_from() -> None:
    class Counting(nn.Conv2d):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

    model = acl.convert(nn.Sequential(Counting(1, 4, 3)), "0", "G100%")
    state = dict(sorted(model.state_dict().items()))  # as safetensors returns it
    state["0.bias"] = state["0.bias"].double()
    assert list(state)[:2] == ["0.bias", "0.host.count"]
    expected = model[0].weight
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model[0].weight, expected, rtol=0, atol=0)
