import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from acl import AnalyticConv2d, akp_parameters, convert, kernels
from acl.kernels import FAMILIES, KINDS, PROFILES, analytic_kinds
from acl.layer import SCALES

MOSAIC = "G25% Lg10% Lt10% Tf20% Ts10% P25%"
PAPER = "G30 Lg15 Lt15 Tf30 Ts6 P96"


def arrange_all_kinds(slots: int) -> str:
    """An arrangement of every registered kind that splits the slots as evenly as possible."""
    count, rest = divmod(slots, len(KINDS))
    return " ".join(f"{symbol}{count + 1 if i < rest else count}" for i, symbol in enumerate(KINDS))


def make_layer(arrangement: str = MOSAIC, **options: Any) -> AnalyticConv2d:
    return AnalyticConv2d(4, 8, 5, arrangement=arrangement, **options)


def take_sgd_step(layer: AnalyticConv2d) -> None:
    layer(torch.randn(1, 4, 8, 8)).square().sum().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()


@pytest.fixture
def syntheses(monkeypatch: pytest.MonkeyPatch) -> list[AnalyticConv2d]:
    """Grows by one entry for each synthesis of a weight."""
    calls: list[AnalyticConv2d] = []
    synthesize = AnalyticConv2d._synthesize

    def count_and_synthesize(self: AnalyticConv2d) -> Tensor:
        calls.append(self)
        return synthesize(self)

    monkeypatch.setattr(AnalyticConv2d, "_synthesize", count_and_synthesize)
    return calls


# The layer as a convolution


@pytest.mark.parametrize(
    "signature",
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
def test_is_a_convolution_with_its_weight_over_the_whole_signature(signature: dict[str, Any]) -> None:
    arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": 5, **signature}
    analytic = AnalyticConv2d(**arguments, arrangement=MOSAIC)
    reference = nn.Conv2d(**arguments)
    with torch.no_grad():
        reference.weight.copy_(analytic.weight)
        if analytic.bias is not None:
            reference.bias.copy_(analytic.bias)
    x = torch.randn(2, 4, 16, 18, dtype=signature.get("dtype"))
    assert torch.equal(analytic(x), reference(x))
    assert torch.equal(analytic.fold()(x), reference(x))
    assert analytic(x[0]).shape == reference(x[0]).shape
    if signature.get("padding_mode", "zeros") == "zeros":
        passed = [signature.get("stride", 1), signature.get("padding", 0), signature.get("dilation", 1)]
        expected = F.conv2d(x, analytic.weight, analytic.bias, *passed, signature.get("groups", 1))
        assert torch.equal(analytic(x), expected)


def test_the_papers_example_has_4962_weights() -> None:
    analytic = AnalyticConv2d(3, 64, 7, stride=2, padding=3, bias=False, arrangement=PAPER)
    assert sum(p.numel() for p in analytic.parameters()) == 4962
    assert sum(p.numel() for p in nn.Conv2d(3, 64, 7, bias=False).parameters()) == 9408
    amplified = AnalyticConv2d(3, 64, 7, bias=False, arrangement=PAPER, amplitude=True)
    assert sum(p.numel() for p in amplified.parameters()) == 4962 + 96


def test_slots_are_filled_in_the_arrangements_order() -> None:
    """Kernels of the named kind at the slots that are theirs, also with plain ones in between."""
    analytic = AnalyticConv2d(2, 5, 5, arrangement="Lg3 P4 G2 Tf1", scale="raw", bias=False)
    akps = analytic.akps()
    slots = analytic.weight.flatten(0, 1)
    assert torch.equal(slots[:3], kernels.log(**akps["Lg"], size=(5, 5)))
    assert torch.equal(slots[3:7], analytic.plain)
    assert torch.equal(slots[7:9], kernels.gabor(**akps["G"], size=(5, 5)))
    assert torch.equal(slots[9:], kernels.tgd1(**akps["Tf"], size=(5, 5)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amplitude", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_parameter_moves_in_one_step_of_sgd(profile: str, amplitude: bool, family: str) -> None:
    analytic = layer(profile=profile, amplitude=amplitude, family=family, dtype=torch.double)
    before = {name: p.detach().clone() for name, p in analytic.named_parameters()}
    analytic(torch.randn(2, 4, 12, 12, dtype=torch.double)).square().mean().backward()
    torch.optim.SGD(analytic.parameters(), lr=0.1).step()
    for name, parameter in analytic.named_parameters():
        moved = parameter != before[name]
        # A linear profile that reaches the nearest ring of pixels alone has the same shape at any s.
        assert moved.any() if profile == "linear" and name.endswith("_s") else moved.all(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", ["unit", "raw"])
@pytest.mark.parametrize("profile", PROFILES)
def test_gradients(profile: str, scale: str, family: str) -> None:
    analytic = AnalyticConv2d(
        2, 3, 5, arrangement="G1 Lg1 Lt1 Tf1 Ts1 P1", profile=profile, scale=scale, family=family, amplitude=True
    ).double()
    names = [name for name, _ in analytic.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in analytic.parameters()]
    x = torch.randn(1, 2, 7, 7, dtype=torch.double)

    def output(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(analytic, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, values)


@pytest.mark.parametrize("arrangement", ["G100%", "Lg100%", "Lt100%", "Tf100%", "Ts100%", MOSAIC])
def test_unit_scale_keeps_the_variance(arrangement: str) -> None:
    """Unit-norm kernels over sqrt(C_in): white noise of variance 1 in, variance 1 out."""
    analytic = AnalyticConv2d(16, 32, 5, arrangement=arrangement, bias=False)
    if "P" in arrangement:
        nn.init.normal_(analytic.plain, std=1 / (16 * 25) ** 0.5)
    assert analytic(torch.randn(4, 16, 32, 32)).var().item() == pytest.approx(1, abs=0.1)


def test_akps_start_in_range_and_are_natural_units() -> None:
    analytic = layer(amplitude=True, family="extended")
    akps = analytic.akps()
    assert set(akps) == {"G", "Lg", "Lt", "Tf", "Ts"}
    for symbol, values in akps.items():
        parameters = KINDS[symbol].parameters("extended", amplitude=True)
        assert list(values) == [akp.name for akp in parameters]
        for akp in parameters:
            low, high = akp.start(5)
            assert values[akp.name].shape == (analytic.arrangement.counts[symbol],)
            assert (values[akp.name] >= low - 1e-5).all() and (values[akp.name] <= high + 1e-5).all()
    assert len(list(akp_parameters(nn.Sequential(analytic, nn.Conv2d(8, 8, 3))))) == len(analytic.raw)


@pytest.mark.parametrize(
    ("learn", "learning"),
    [
        ("all", {"theta", "wavelength", "psi", "sigma", "s"}),
        ("none", set()),
        (["theta", "s"], {"theta", "s"}),
        ("psi", {"psi"}),
    ],
)
def test_frozen_akps_stay(learn: Any, learning: set[str]) -> None:
    analytic = layer(learn=learn)
    before = {name: p.detach().clone() for name, p in analytic.named_parameters()}
    analytic(torch.randn(1, 4, 8, 8)).square().sum().backward()
    torch.optim.SGD([p for p in analytic.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in analytic.named_parameters():
        moves = name in ("plain", "bias") or name.split("_")[-1] in learning
        assert torch.equal(parameter, before[name]) != moves, name


def test_synthesised_once_per_forward_in_training_and_once_in_all_in_eval(syntheses: list[int]) -> None:
    analytic = layer()
    x = torch.randn(1, 4, 8, 8)
    analytic(x), analytic(x)
    assert len(syntheses) == 2
    analytic.eval()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            analytic(x), analytic(x)
    assert len(syntheses) == 3


def _step(a: AnalyticConv2d) -> None:
    a(torch.randn(1, 4, 8, 8)).square().sum().backward()
    torch.optim.SGD(a.parameters(), lr=0.1).step()


def _in_place(a: AnalyticConv2d) -> None:
    with torch.no_grad():
        a.raw["Lg_sigma"].add_(1)


CHANGES = {
    "optimiser step": _step,
    "in place": _in_place,
    "through .data": lambda a: a.raw["G_theta"].data.add_(1),
    "plain through .data": lambda a: a.plain.data.add_(1),
    "new .data": lambda a: setattr(a.raw["G_theta"], "data", a.raw["G_theta"].data + 1),
    "new parameter": lambda a: a.raw.__setitem__("Ts_s", nn.Parameter(a.raw["Ts_s"].detach() + 1)),
    "checkpoint": lambda a: a.load_state_dict(layer().state_dict()),
    "assigned checkpoint": lambda a: a.load_state_dict(layer().state_dict(), assign=True),
    "reset": lambda a: a.reset_parameters(),
    "dtype": lambda a: a.double(),
    "half": lambda a: a.to(torch.bfloat16),
    "memory format": lambda a: a.to(memory_format=torch.channels_last),
    "train and back": lambda a: (_step(a.train()), a.eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cached_weight_is_never_stale(change: str) -> None:
    analytic = layer().eval()
    _ = analytic.weight
    CHANGES[change](analytic)
    fresh = analytic._synthesise()
    assert torch.equal(analytic.weight, fresh)
    assert analytic.weight.dtype == fresh.dtype and analytic.weight.stride() == fresh.stride()


def test_gradients_flow_in_eval_too_and_as_often_as_asked() -> None:
    analytic = layer()
    x = torch.randn(1, 4, 8, 8)
    analytic(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in analytic.named_parameters()}
    analytic.eval()
    with torch.inference_mode():
        analytic(x)
    for _ in range(2):
        analytic.zero_grad()
        analytic(x).square().sum().backward()
        for name, parameter in analytic.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize("in_channels", [1, 4])
def test_the_weight_follows_the_modules_memory_format(in_channels: int) -> None:
    conv = nn.Conv2d(in_channels, 8, 5).to(memory_format=torch.channels_last)
    analytic = AnalyticConv2d(in_channels, 8, 5, arrangement=MOSAIC).to(memory_format=torch.channels_last)
    for module in (
        analytic,
        copy.deepcopy(analytic),
        copy.deepcopy(analytic).eval(),
        pickle.loads(pickle.dumps(analytic)),
    ):
        assert module.weight.stride() == conv.weight.stride()
    assert analytic.fold().weight.stride() == conv.weight.stride()
    assert (
        analytic.to(memory_format=torch.contiguous_format).weight.stride()
        == nn.Conv2d(in_channels, 8, 5).weight.stride()
    )


def test_copies_and_checkpoints_give_the_same_layer() -> None:
    analytic = layer(amplitude=True, family="extended").eval()
    x = torch.randn(1, 4, 8, 8)
    wanted = analytic(x)
    buffer = io.BytesIO()
    torch.save(analytic.state_dict(), buffer)
    buffer.seek(0)
    loaded = layer(amplitude=True, family="extended").eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, copy.deepcopy(analytic), pickle.loads(pickle.dumps(analytic))):
        assert torch.equal(other(x), wanted)
    assert not any("_format" in name for name in analytic.state_dict())


def test_autocast_synthesises_in_float32() -> None:
    analytic = layer()
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert analytic.weight.dtype == torch.float32
        assert torch.equal(analytic.weight, analytic._synthesise())
        assert analytic(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_a_half_precision_layer_is_the_float32_one_rounded(dtype: torch.dtype) -> None:
    analytic = layer().to(dtype)
    single = copy.deepcopy(analytic).float()
    assert torch.equal(analytic.weight, single.weight.to(dtype))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training: bool) -> None:
    analytic = layer().train(training)
    x = torch.randn(2, 4, 8, 8)
    compiled = torch.compile(analytic, fullgraph=True)
    torch.testing.assert_close(compiled(x), analytic(x))
    grads = []
    for module in (compiled, analytic):
        analytic.zero_grad()
        module(x).square().sum().backward()
        grads.append([p.grad.clone() for p in analytic.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        analytic.plain.add_(1)
    torch.testing.assert_close(compiled(x), analytic(x))


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict: bool) -> None:
    analytic = layer().eval()
    x = torch.randn(2, 4, 8, 8)
    _ = analytic(x)
    program = torch.export.export(analytic, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), analytic(x))
    assert "raw.G_theta" in program.state_dict


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_and_function_transforms(training: bool) -> None:
    analytic = layer().train(training)
    x = torch.randn(1, 4, 8, 8)
    _ = analytic(x)
    parameters = {name: p.detach() + 0.1 for name, p in analytic.named_parameters()}
    other = copy.deepcopy(analytic)
    other.load_state_dict(parameters)
    assert torch.equal(torch.func.functional_call(analytic, parameters, (x,)), other(x))
    grads = torch.func.grad(lambda p: torch.func.functional_call(analytic, p, (x,)).square().sum())(parameters)
    other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    both = {name: torch.stack([p, p + 0.1]) for name, p in parameters.items()}
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(analytic, p, (x,)))(both)
    torch.testing.assert_close(outputs[0], other(x))


def test_meta_device_and_materialising() -> None:
    with torch.device("meta"):
        assert layer().weight.is_meta
    analytic = layer(device="meta")
    assert analytic.weight.is_meta and analytic.eval().weight.is_meta
    analytic.to_empty(device="cpu")
    analytic.reset_parameters()
    assert analytic.weight.isfinite().all()


def test_a_layer_without_plain_kernels_has_no_empty_parameter() -> None:
    """Such a one would get no gradient, and distributed training waits for it."""
    analytic = layer("G100%")
    assert analytic.plain is None and all(p.numel() for p in analytic.parameters())
    analytic(torch.randn(1, 4, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in analytic.parameters())


def test_a_further_kind_is_one_function_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def disc(radius: Tensor, size: tuple[int, int]) -> Tensor:
        y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in size), indexing="ij")
        return torch.sigmoid(radius[..., None, None] - torch.hypot(x, y))

    radius = AKP("radius", "px", 0.5, lambda k: (1.0, k / 2))
    monkeypatch.setitem(KINDS, "D", Kind("D", "Disc", "black", (radius,), (), disc))
    analytic = layer("D50% P50%", learn="radius")
    assert analytic.akps()["D"]["radius"].shape == (16,)
    analytic(torch.randn(1, 4, 8, 8)).sum().backward()
    assert (analytic.raw["D_radius"].grad != 0).all()
    assert len(mosaic(analytic).axes) == 32


def test_a_folded_layer_is_free_of_acl() -> None:
    folded = layer(bias=False, dtype=torch.double).eval().fold()
    assert type(folded) is nn.Conv2d and folded.bias is None and not folded.training
    assert folded.weight.dtype == torch.double and isinstance(folded.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrangement": "G31"}, r"'G31' fills 31 of 32 kernels of the layer \(4 x 8\)"),
        ({"groups": 2, "arrangement": "G32"}, r"'G32' fills 32 of 16 kernels of the layer \(2 x 8\)"),
        ({"scale": "l2"}, "unknown scale 'l2'; known: unit, raw"),
        ({"family": "big"}, "unknown family 'big'; known: paper, extended"),
        ({"profile": "box"}, "unknown profile 'box'; known: exponential, gaussian, linear"),
        ({"learn": ["phi"]}, "unknown AKP 'phi' in learn; known: all, none, amplitude"),
        ({"groups": 3}, "divisible by groups"),
        ({"padding_mode": "mirror"}, "padding_mode"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**{"arrangement": MOSAIC, **options})


def test_repr_says_what_differs_from_the_defaults() -> None:
    text = layer(padding=2, amplitude=True, bias=False).extra_repr()
    assert "arrangement='G8 Lg3 Lt3 Tf7 Ts3 P8'" in text
    assert "padding=(2, 2), amplitude=True, bias=False" in text
