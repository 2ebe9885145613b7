"""acl.convert: converting a network into an analytic network and back, and listing its layers."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

import acl
from acl import AnalyticConv2d, akp_parameters, analytic_layers, convert, fold, param_groups, summary
from acl.convert import _HOOK_ATTRIBUTES
from tests.arrangements import PAPER


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False))
    )


def list_parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_convert_copies_plain_kernels_and_bias_from_replaced_layer() -> None:
    model = make_network()
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    assert convert(model, "0", "G5 P10 Lg9") is model
    layer = model[0]
    assert isinstance(layer, AnalyticConv2d) and layer.stride == (2, 2)
    assert torch.equal(layer.weight.flatten(0, 1)[5:15], weight.flatten(0, 1)[5:15])
    assert torch.equal(layer.bias, bias)


def test_convert_to_all_plain_kernels_keeps_output() -> None:
    model = make_network()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert torch.equal(convert(model, "*", "P100%")(x), expected)
    assert list(analytic_layers(model)) == ["0", "1.1"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (({"0": "G24", "1.1": "P16"},), ["0", "1.1"]),
        ((["0", "1.1"], "G100%"), ["0", "1.1"]),
        (("1.1", "G100%"), ["1.1"]),
        (("1.*", "G100%"), ["1.1"]),
    ],
    ids=["mapping", "list", "name", "glob"],
)
def test_convert_selects_layers_by_name(arguments: tuple[Any, ...], expected: list[str]) -> None:
    model = convert(make_network(), *arguments)
    assert list(analytic_layers(model)) == expected
    assert all(isinstance(model.get_submodule(name), nn.Conv2d) for name in ("0", "1.1"))


def test_convert_keeps_dtype_mode_and_memory_format() -> None:
    model = make_network().double().eval().to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    layer = convert(model, "0", "G50% P50%", amplitude=True)[0]
    assert layer.weight.dtype == torch.double and not layer.training and layer.options.amplitude
    assert layer.weight.stride() == strides


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [{"in_channels": 1}, {"in_channels": 8, "groups": 8}, {"in_channels": 4, "kernel_size": 1}, {"in_channels": 3}],
)
def test_converted_and_folded_layers_give_outputs_of_the_same_layout(
    options: dict[str, Any], memory_format: torch.memory_format
) -> None:
    conv = nn.Conv2d(**{"out_channels": 8, "kernel_size": 3, **options}).to(memory_format=memory_format)
    x = torch.randn(2, conv.in_channels, 9, 9)
    strides = conv.weight.stride(), conv(x).stride()
    layer = convert(copy.deepcopy(conv), "first", "G100%", amplitude=True)
    assert (layer.weight.stride(), layer(x).stride()) == strides
    folded = fold(layer)
    assert (folded.weight.stride(), folded(x).stride()) == strides


def test_name_of_a_layer_with_brackets_is_no_pattern() -> None:
    model = nn.ModuleDict({"conv[1]": nn.Conv2d(1, 2, 3), "conv1": nn.Conv2d(1, 2, 3)})
    assert list(analytic_layers(convert(model, "conv[1]", "G2"))) == ["conv[1]"]


@pytest.mark.parametrize("per", ["kernel", "filter"])
@pytest.mark.parametrize("init", ["random", "fit"])
def test_kernels_of_1_x_1_that_would_be_zero_are_refused(per: Any, init: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1))
    message = "cannot convert 1: its 1 x 1 kernels of Lg and Tf would be 0"
    with pytest.raises(ValueError, match=message):
        convert(model, "all", "G25% Lg25% Tf25% P25%", init, per=per)
    assert analytic_layers(model) == {}


def test_kernels_of_1_x_1_that_cannot_change_are_refused() -> None:
    def create() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1))

    message = "cannot convert 1: whatever their AKPs, its 1 x 1 kernels would be a constant or its negative; leave"
    with pytest.raises(ValueError, match=message):
        convert(create(), "all", "G50% P50%")
    for options in ({"amplitude": True}, {"per": "filter"}, {"scale": "raw"}):
        convert(create(), "all", "G50% P50%", **options)
    assert analytic_layers(convert(create(), {"all": "P100%", "k>=3": "Lg100%"})).keys() == {"0", "1"}


def test_convert_leaves_model_unchanged_on_error() -> None:
    model = make_network()
    with pytest.raises(
        ValueError,
        match=r"no convolution is named 'conv1'; the model has: 0 \(5 x 5\), 1\.1 \(3 x 3\); rules: first, all, k>=n",
    ):
        convert(model, ["0", "conv1"], "G100%")
    with pytest.raises(ValueError, match=r"'G5' has 5 kernels, but 1\.1 has 16 \(2 x 8\)"):
        convert(model, {"0": "G24", "1.1": "G5"})
    with pytest.raises(ValueError, match="needs an arrangement"):
        convert(model, "0")
    with pytest.raises(TypeError, match=r"an arrangement is text, .* or an acl\.Arrangement, got \['G24'\]"):
        convert(model, "0", ["G24"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown argument 'amplitud'; the options .* are scale, per, amplitude,"):
        convert(model, "0", "G24", amplitud=True)  # type: ignore[call-arg]
    assert analytic_layers(model) == {}


class StandardizedConv2d(nn.Conv2d):
    """A convolution with its own forward pass and an extra parameter, like timm's ScaledStdConv2d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 2.0))
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gain * self.scale * (self.weight - self.weight.mean((1, 2, 3), keepdim=True))
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("bias", [True, False])
def test_convert_keeps_forward_pass_of_subclass(bias: bool) -> None:
    model = nn.Sequential(StandardizedConv2d(3, 8, 5, bias=bias), nn.ReLU())
    names = list_parameter_names(model)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    assert torch.equal(convert(model, "0", "P100%")(x), expected)
    fold(model)
    assert type(model[0]) is StandardizedConv2d and list_parameter_names(model) == names
    convert(model, "0", "G50% P50%")(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    expected = model(x)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), expected)
    torch.testing.assert_close(fold(model)(x), expected)
    assert list(model.state_dict()) == names


def test_convert_selects_layers_by_rule() -> None:
    def list_converted_names(*arguments: Any) -> list[str]:
        model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (3, 5)), nn.Conv2d(4, 4, 7))
        return list(analytic_layers(convert(model, *arguments)))

    assert list_converted_names("first", "G100%") == ["0"]
    assert list_converted_names("all", "P100%") == ["0", "1", "2", "3"]
    assert list_converted_names("k>=4", "G100%") == ["0", "3"]
    assert list_converted_names({"k>=7": "G100%", "1": "P100%"}) == ["1", "3"]
    with pytest.raises(ValueError, match=r"no convolution is named 'k>=9'; the model has: 0 \(5 x 5\), 1 \(1 x 1\)"):
        list_converted_names("k>=9", "G100%")


def test_layer_name_takes_precedence_over_rule() -> None:
    model = nn.ModuleDict({"other": nn.Conv2d(1, 1, 3), "first": nn.Conv2d(1, 1, 3)})
    convert(model, "first", "G1")
    assert list(analytic_layers(model)) == ["first"]


def test_last_matching_arrangement_wins() -> None:
    model = convert(make_network(), {"all": "G100%", "first": "P100%"})
    assert [str(layer.arrangement) for layer in analytic_layers(model).values()] == ["P24", "G16"]


@pytest.mark.parametrize("pattern", ["all", "*", "k>=1"])
def test_rules_skip_layers_that_are_already_analytic(pattern: str) -> None:
    model = convert(make_network(), "0", "G100%")
    layer = model[0]
    assert isinstance(layer, nn.Conv2d)
    convert(model, pattern, "P100%")
    assert model[0] is layer and str(layer.arrangement) == "G24"
    assert list(analytic_layers(model)) == ["0", "1.1"]
    with pytest.raises(ValueError, match=re.escape(f"no convolution is named '{pattern}'; the model has: none")):
        convert(model, pattern, "P100%")


def test_rules_skip_convolution_inside_analytic_layer() -> None:
    model = convert(nn.Sequential(StandardizedConv2d(3, 8, 5), nn.Conv2d(8, 8, 3)), "first", "G100%")
    host = model[0].host
    assert isinstance(host, StandardizedConv2d)
    convert(model, "all", "P100%")
    assert model[0].host is host and list(analytic_layers(model)) == ["0", "1"]


def test_analytic_layers_lists_named_modules_in_order() -> None:
    model = make_network()
    assert analytic_layers(model) == {}
    convert(model, "all", "G100%")
    expected = [(name, module) for name, module in model.named_modules() if isinstance(module, AnalyticConv2d)]
    assert [name for name, _ in expected] == ["0", "1.1"]
    assert list(analytic_layers(model).items()) == expected
    assert analytic_layers(model[0]) == {"": model[0]}


def test_hook_attributes_are_those_of_nn_module() -> None:
    attributes = vars(nn.Module())
    expected = {name for name in attributes if "hook" in name and ("forward" in name or "backward" in name)}
    assert set(_HOOK_ATTRIBUTES) == expected and len(_HOOK_ATTRIBUTES) == len(expected)


def test_convert_and_fold_keep_hooks() -> None:
    model, calls = make_network(), []
    handles = [
        model[0].register_forward_hook(lambda *_: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    changes: list[Callable[[nn.Module], nn.Module]] = [lambda model: convert(model, "first", "G100%"), fold]
    for change in changes:
        calls.clear()
        change(model)(x).sum().backward()
        assert calls == ["pre", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(calls) == 3


def test_hooks_of_subclass_run_once() -> None:
    model, calls = nn.Sequential(StandardizedConv2d(3, 8, 5)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    convert(model, "0", "G100%")(torch.randn(1, 3, 9, 9))
    assert calls == [1]


def test_shared_layer_stays_shared() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    names = list_parameter_names(model)
    convert(model, "first", "G100%")
    assert model[0] is model[2] and analytic_layers(model) == {"0": model[0]}
    fold(model)
    assert model[0] is model[2] and list_parameter_names(model) == names


def test_convert_and_fold_accept_single_convolution() -> None:
    layer = convert(nn.Conv2d(3, 8, 5), "first", "G100%")
    assert isinstance(layer, AnalyticConv2d)
    assert type(fold(layer)) is nn.Conv2d


def test_converted_frozen_layer_trains_only_its_akps() -> None:
    conv = nn.Conv2d(6, 6, 3, groups=6).requires_grad_(False)
    layer = convert(nn.Sequential(conv), "0", "G3 P3")[0]
    assert layer.weight.shape == (6, 1, 3, 3)
    assert not layer.plain.requires_grad and not layer.bias.requires_grad and layer.raw["G_theta"].requires_grad


def test_summary_counts_parameters_before_and_after() -> None:
    model = make_network()
    before = [count_parameters(conv) for conv in (model[0], model[1][1])]
    convert(model, {"0": "G12 P12", "1.1": "Lg50% P50%"}, amplitude=True)
    after = [count_parameters(layer) for layer in (model[0], model[1][1])]
    before, after = [*before, sum(before)], [*after, sum(after)]
    lines = [line.split() for line in summary(model).splitlines()[1:]]
    assert [[int(n) for n in line[-2:]] for line in lines] == [list(pair) for pair in zip(before, after, strict=True)]
    assert lines[0][:3] == ["0", "G12", "P12"] and lines[2][0] == "total"


def test_totals_of_summary_count_shared_parameters_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    model[1].weight = model[0].weight
    before = sum(p.numel() for p in model.parameters())
    convert(model, "all", "G2 P2")
    assert summary(model).split()[-3:] == ["total", str(before), str(sum(p.numel() for p in model.parameters()))]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "0 is a ConvTranspose2d; only a 2-D convolution"),
        (nn.Sequential(nn.Conv1d(3, 3, 3)), "0 is a Conv1d; only a 2-D convolution"),
        (nn.Sequential(nn.Linear(3, 3)), "no convolution is named '0'; the model has: none"),
        (nn.Sequential(nn.LazyConv2d(3, 3)), r"cannot convert 0 \(LazyConv2d\): its weight is"),
        (nn.Sequential(weight_norm(nn.Conv2d(3, 3, 3))), r"cannot convert 0 \(.*Conv2d\): its weight is"),
        (nn.Sequential(AnalyticConv2d(3, 3, 3, arrangement="G9")), "0 is already analytic; acl.fold"),
    ],
    ids=["transposed", "1-D", "linear", "lazy", "weight norm", "analytic"],
)
def test_convert_rejects_layer_that_it_cannot_replace(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(model, "0", "G100%")


def prune_bias(conv: nn.Conv2d) -> nn.Conv2d:
    return prune.l1_unstructured(conv, "bias", 1)


def parametrize_bias(conv: nn.Conv2d) -> nn.Conv2d:
    parametrize.register_parametrization(conv, "bias", nn.Identity())
    return conv


def patch_forward(conv: nn.Conv2d) -> nn.Conv2d:
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)  # type: ignore[method-assign]
    return conv


def patch_convolution(conv: nn.Conv2d) -> nn.Conv2d:
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1)  # type: ignore[method-assign]
    return conv


def prepare_for_quantization(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight_fake_quant = nn.Identity()
    return conv


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prune_bias, "cannot convert 0: its bias is parametrized or pruned"),
        (parametrize_bias, "cannot convert 0"),
        (patch_forward, "cannot convert 0: its forward pass is patched"),
        (patch_convolution, "cannot convert 0: its forward pass is patched"),
        (prepare_for_quantization, "cannot convert 0: it is prepared for quantization"),
    ],
)
def test_convert_rejects_changed_layer_and_leaves_it_working(
    change: Callable[[nn.Conv2d], nn.Conv2d], message: str
) -> None:
    model = nn.Sequential(change(nn.Conv2d(3, 4, 3)))
    x = torch.randn(1, 3, 5, 5)
    expected, names = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        convert(model, "0", "G100%")
    assert torch.equal(model(x), expected) and list(model.state_dict()) == names


def test_rule_first_means_first_convolution_even_if_it_is_analytic() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    convert(model, "first", "G100%")
    with pytest.raises(ValueError, match="the first convolution, 0, is already analytic"):
        convert(model, "first", "G100%")
    assert not isinstance(model[1], AnalyticConv2d)


def test_learn_can_be_an_iterator() -> None:
    model = convert(make_network(), "all", "G100%", learn=(name for name in ["theta"]))
    for layer in analytic_layers(model).values():
        assert [key for key, parameter in layer.raw.items() if parameter.requires_grad] == ["G_theta"]


def test_error_about_model_that_is_a_convolution_names_no_layer() -> None:
    analytic = convert(nn.Conv2d(1, 2, 3), "first", "G100%")
    with pytest.raises(ValueError, match="the first convolution, the model itself, is already analytic"):
        convert(analytic, "first", "G100%")
    with pytest.raises(ValueError, match="has 5 kernels, but the layer has 2"):
        convert(nn.Conv2d(1, 2, 3), "first", "G5")


def test_convert_rejects_complex_weights() -> None:
    with pytest.raises(ValueError, match=r"cannot convert 0: its weight is torch.complex64, not floating-point"):
        convert(nn.Sequential(nn.Conv2d(1, 2, 3, dtype=torch.complex64)), "first", "G100%")


def test_rules_skip_host_of_model_that_is_a_layer() -> None:
    class Padded(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match="no convolution is named 'all'; the model has: none"):
        convert(convert(Padded(1, 2, 3), "first", "G100%"), "all", "G100%")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "bogus"}, "unknown metric 'bogus'; known: images, pixels"),
        ({"tolerance": 17.0}, "needs a tolerance from 0 .* to 1 .*, got 17"),
    ],
)
def test_options_of_fits_are_checked_without_a_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(nn.Conv2d(3, 8, 5), "first", "G100%", **options)


def test_convert_rejects_unknown_init() -> None:
    with pytest.raises(ValueError, match="unknown init 'xavier'; known: random"):
        convert(make_network(), "first", "G100%", init="xavier")


@pytest.mark.parametrize(
    ("conv", "before", "after"),
    [(nn.Conv2d(3, 64, 7, bias=False), 9408, 4962), (nn.Conv2d(3, 64, 11), 23296, 11938)],
    ids=["ResNet", "AlexNet"],
)
def test_paper_arrangement_has_expected_parameter_count(conv: nn.Module, before: int, after: int) -> None:
    assert count_parameters(conv) == before
    assert count_parameters(convert(conv, "first", PAPER)) == after


def list_group_ids(groups: list[dict[str, Any]]) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in groups]


def test_param_groups_separate_weights_biases_akps_and_gains() -> None:
    model = nn.Sequential(
        convert(make_network(), "0", "G12 P12", amplitude=True), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    )
    layer, plain = model[0][0], model[0][1][1]
    gains, akps = [layer.raw["G_amplitude"]], [p for key, p in layer.raw.items() if key != "G_amplitude"]
    groups = param_groups(model, 0.1, akp_lr_scale=3.0, gain_lr_scale=2.0, weight_decay=0.5)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.1, 0.5),
        (0.1, 0),
        (pytest.approx(0.3), 0),
        (pytest.approx(0.2), 0),
    ]
    weights = [layer.plain, plain.weight, model[2].weight]
    vectors = [layer.bias, model[1].weight, model[1].bias, model[2].bias]
    expected = [list(map(id, group)) for group in (weights, vectors, akps, gains)]
    assert list_group_ids(groups) == expected
    joined = param_groups(model, 0.1, akp_lr_scale=3.0, weight_decay=0.5)
    assert list_group_ids(joined) == [*expected[:2], [id(p) for p in akp_parameters(model)]]


@pytest.mark.parametrize("gain_lr_scale", [None, 1.0])
def test_param_groups_hold_each_trainable_parameter_once(gain_lr_scale: float | None) -> None:
    model = convert(nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(3))), "all", "G2 P2", amplitude=True)
    model[1].raw["G_theta"] = model[0].raw["G_theta"]
    model[1].raw["G_amplitude"] = model[0].raw["G_amplitude"]
    model[1].bias = model[0].bias
    model[2].raw.requires_grad_(False)
    model[2].plain.requires_grad_(False)
    groups = param_groups(nn.Sequential(*model, model[0]), 0.1, gain_lr_scale=gain_lr_scale)
    ids = [i for group in list_group_ids(groups) for i in group]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.SGD(groups)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizer_with_param_groups_steps_as_one_with_rates_by_hand(make: type[torch.optim.Optimizer]) -> None:
    models = [convert(nn.Sequential(nn.Conv2d(2, 4, 3)), "0", "G4 P4") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    layer, x = models[1][0], torch.randn(1, 2, 5, 5)
    by_hand = [
        {"params": [layer.plain], "weight_decay": 0.3},
        {"params": [layer.bias], "weight_decay": 0.0},
        {"params": list(layer.raw.values()), "lr": 0.01 * 5.0, "weight_decay": 0.0},
    ]
    optimizers = [make(param_groups(models[0], 0.01, weight_decay=0.3)), make(by_hand, lr=0.01)]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_param_groups_leaves_out_empty_groups() -> None:
    assert param_groups(nn.ReLU(), 0.1) == []
    frozen = convert(nn.Sequential(nn.Conv2d(3, 2, 3, bias=False)), "0", "G6", learn="none")
    assert param_groups(frozen, 0.1) == []
    (group,) = param_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert group["lr"] == 0.1


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"akp_lr_scale": -2}, {"gain_lr_scale": float("nan")}])
def test_param_groups_rejects_invalid_numbers(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got {value}"):
        param_groups(nn.Linear(2, 2), **{"lr": 0.1, **options})


@pytest.mark.parametrize("learn", ["s", ["theta", "s"]])
def test_learned_akp_that_no_layer_has_is_rejected(learn: str | list[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match=r"learn names 's', an AKP that no converted layer has; known: \['psi', 'sig"):
        convert(net, "all", "G100%", learn=learn)
    assert type(net[0]) is nn.Conv2d
    convert(net, {"0": "G6", "1": "Lt4"}, learn=learn)
    assert net[1].raw["Lt_s"].requires_grad and not net[0].raw["G_sigma"].requires_grad


class TwoScales(nn.Module):
    """Two convolutions with one weight and one bias, and a third of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=2, dilation=2)
        self.coarse.weight, self.coarse.bias = self.fine.weight, self.fine.bias
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.fine(x) + self.coarse(x))


@pytest.mark.filterwarnings("ignore:the gains of")
@pytest.mark.parametrize(
    ("arrangement", "options"), [("G50% P50%", {}), ("G8", {"init": "fit"}), ("auto", {"tolerance": 0.5})], ids=str
)
def test_convolutions_that_share_a_weight_still_share_it(
    arrangement: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acl.kind_search.STEPS", 2)
    model = acl.convert(TwoScales(), ["fine", "coarse"], arrangement, **options)
    assert len(list(model.parameters())) == len(set(model.fine.parameters())) + 2
    model(torch.randn(1, 2, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(model.fine.weight, model.coarse.weight)
    acl.save(model, tmp_path / "tied.safetensors")
    loaded = acl.load(TwoScales(), tmp_path / "tied.safetensors")
    assert set(loaded.fine.parameters()) == set(loaded.coarse.parameters())
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(loaded(x), model(x))
    folded = acl.fold(model)
    assert folded.coarse.weight is folded.fine.weight and folded.coarse.bias is folded.fine.bias
    torch.testing.assert_close(folded(x), loaded(x))


def test_conversion_that_would_untie_a_weight_is_refused() -> None:
    model = TwoScales()
    for layers in ("fine", {"fine": "G8", "coarse": "P8"}):
        with pytest.raises(ValueError, match=r"fine.weight and coarse.weight are one parameter; convert all of them"):
            acl.convert(model, layers, "G8")
    assert not acl.analytic_layers(model) and model.coarse.weight is model.fine.weight


def test_normalization_layers_are_not_decayed_and_lazy_layers_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm((4, 6, 6)), nn.GroupNorm(2, 4))
    decayed, others = acl.param_groups(model, 1e-3, weight_decay=0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)] and len(others["params"]) == 5
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet; run a forward pass first"):
        acl.param_groups(nn.Sequential(nn.Conv2d(2, 4, 3), nn.LazyConv2d(4, 3)), 1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_summary_counts_multiply_adds_like_flop_counter(training: bool) -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.BatchNorm2d(8), shared, shared).train(training)
    acl.convert(model, "all", "G50% P50%")
    inputs, state = torch.randn(2, 3, 20, 22), copy.deepcopy(model.state_dict())
    with FlopCounterMode(display=False) as counter:
        model.eval()(inputs)
    table = acl.summary(model.train(training), inputs)
    counts = [int(line.split()[-1].replace(",", "")) for line in table.splitlines()[1:]]
    assert table.splitlines()[0].endswith("after  multiply-adds")
    assert 2 * sum(counts[:-1]) == 2 * counts[-1] == counter.get_total_flops()
    assert model.training == training and all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("per", ["kernel", "filter"])
def test_network_without_values_converts_and_folds(per: Any) -> None:
    with torch.device("meta"):
        first, second = nn.Conv2d(3, 6, 5), nn.Conv2d(3, 6, 5)
    second.weight = first.weight
    net = acl.fold(acl.convert(nn.Sequential(first, second), "all", "G50% P50%", per=per))
    assert net[0].weight.is_meta and net[0].weight is net[1].weight


@pytest.mark.parametrize("size", [1, 2, (1, 2), (2, 1)])
@pytest.mark.parametrize("symbol", ["Lg", "Lt"])
def test_kinds_without_kernels_of_this_size_are_refused(size: Any, symbol: str) -> None:
    for amplitude, init in ((False, "random"), (True, "fit")):
        model = nn.Sequential(nn.Conv2d(8, 16, size))
        with pytest.raises(ValueError, match=rf"of {symbol} would be 0; .* as the rule k>=3 does"):
            acl.convert(model, "0", f"{symbol}100%", amplitude=amplitude, init=init)


def test_fold_refuses_patched_forward_pass() -> None:
    model = nn.Sequential(AnalyticConv2d(1, 6, 3, arrangement="G6"))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match="cannot fold 0: its forward pass is patched"):
        acl.fold(model)


@pytest.mark.parametrize("name", ["plain", "gains", "bias"])
def test_fold_refuses_pruned_layer(name: str) -> None:
    model = nn.Sequential(AnalyticConv2d(3, 8, 5, arrangement="G50% P50%", per="filter"))
    prune.l1_unstructured(model[0], name, 0.5)
    with pytest.raises(ValueError, match=r"cannot fold 0: it is pruned; call torch\.nn\.utils\.prune\.remove first"):
        acl.fold(model)
    expected = model(x := torch.randn(1, 3, 9, 9))
    prune.remove(model[0], name)
    torch.testing.assert_close(acl.fold(model)(x), expected)


def test_fold_of_shared_kernels_in_another_form_keeps_outputs() -> None:
    first, second = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3, stride=2)
    second.weight = first.weight
    model = acl.convert(nn.Sequential(first, second), "all", "G100%", per="filter").eval()
    x = torch.randn(1, 32, 9, 9)
    expected = model(x)
    torch.testing.assert_close(acl.fold(model, factored=True)(x), expected, atol=1e-4, rtol=1e-4)


def test_fold_keeps_weight_frozen_beside_trained_parameter_of_subclass() -> None:
    class Scaled(nn.Conv2d):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.gain = nn.Parameter(torch.ones(1))

    model = nn.Sequential(Scaled(1, 4, 3))
    model[0].weight.requires_grad_(False)
    acl.fold(acl.convert(model, "0", "G50% P50%", learn="none"))
    assert {name: p.requires_grad for name, p in model.named_parameters() if "bias" not in name} == {
        "0.weight": False,
        "0.gain": True,
    }


def test_tolerance_without_auto_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tolerance=0\.1 needs the arrangement 'auto'"):
        acl.convert(nn.Sequential(nn.Conv2d(3, 8, 5)), "0", "G100%", tolerance=0.1)
