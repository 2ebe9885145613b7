import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from acl import AnalyticConv2d, convert, fold, summary


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False))
    )


def test_plain_kernels_and_biases_come_from_the_slots_they_replace() -> None:
    model = net()
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    assert convert(model, "0", "G5 P10 Lg9") is model
    layer = model[0]
    assert isinstance(layer, AnalyticConv2d) and layer.stride == (2, 2)
    assert torch.equal(layer.weight.flatten(0, 1)[5:15], weight.flatten(0, 1)[5:15])
    assert torch.equal(layer.bias, bias)


def test_all_plain_is_the_same_network() -> None:
    model = net()
    x = torch.randn(2, 3, 16, 16)
    wanted = model(x)
    assert torch.equal(convert(model, "*", "P100%")(x), wanted)
    assert all(isinstance(model.get_submodule(name), AnalyticConv2d) for name in ("0", "1.1"))


def test_layers_by_mapping_name_list_and_glob() -> None:
    assert isinstance(convert(net(), {"0": "G24", "1.1": "P16"})[0], AnalyticConv2d)
    assert isinstance(convert(net(), ["0", "1.1"], "G100%")[1][1], AnalyticConv2d)
    only = convert(net(), "1.*", "G100%")
    assert isinstance(only[0], nn.Conv2d) and isinstance(only[1][1], AnalyticConv2d)


def test_dtype_mode_and_memory_format_are_kept() -> None:
    model = net().double().eval().to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    layer = convert(model, "0", "G50% P50%", amplitude=True)[0]
    assert layer.weight.dtype == torch.double and not layer.training and layer.amplitude
    assert layer.weight.stride() == strides


def test_refusals_leave_the_model_as_it_was() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"no convolution is named 'conv1'; there are: 0 \(5 x 5\), 1\.1 \(3 x 3\)"):
        convert(model, ["0", "conv1"], "G100%")
    with pytest.raises(ValueError, match=r"'G5' fills 5 of 16 kernels of 1\.1 \(2 x 8\)"):
        convert(model, {"0": "G24", "1.1": "G5"})
    with pytest.raises(ValueError, match="needs an arrangement"):
        convert(model, "0")
    assert not any(isinstance(module, AnalyticConv2d) for module in model.modules())


class Standardised(nn.Conv2d):
    """A convolution with a way of its own, and a parameter, as timm's StdConv2d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 2.0))
        self.scale = 0.5  # a name that AnalyticConv2d has too

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gain * self.scale * (self.weight - self.weight.mean((1, 2, 3), keepdim=True))
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_goes_on_in_its_own_way(bias: bool) -> None:
    model = nn.Sequential(Standardised(3, 8, 5, bias=bias), nn.ReLU())
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(2, 3, 9, 9)
    wanted = model(x)
    assert torch.equal(convert(model, "0", "P100%")(x), wanted)
    fold(model)
    assert type(model[0]) is Standardised and [name for name, _ in model.named_parameters()] == names
    convert(model, "0", "G50% P50%")(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    wanted = model(x)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), wanted)
    torch.testing.assert_close(fold(model)(x), wanted)
    assert list(model.state_dict()) == names


def test_rules() -> None:
    def analytic(*layers: Any) -> list[str]:
        model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (3, 5)), nn.Conv2d(4, 4, 7))
        return [name for name, m in convert(model, *layers).named_modules() if isinstance(m, AnalyticConv2d)]

    assert analytic("first", "G100%") == ["0"]
    assert analytic("all", "G100%") == ["0", "1", "2", "3"]
    assert analytic("k>=4", "G100%") == ["0", "3"]
    assert analytic({"k>=7": "G100%", "1": "P100%"}) == ["1", "3"]
    with pytest.raises(ValueError, match=r"no convolution is named 'k>=9'; there are: 0 \(5 x 5\), 1 \(1 x 1\)"):
        analytic("k>=9", "G100%")


def test_a_layer_named_as_a_rule_is_that_layer() -> None:
    model = nn.ModuleDict({"other": nn.Conv2d(1, 1, 3), "first": nn.Conv2d(1, 1, 3)})
    convert(model, "first", "G1")
    assert isinstance(model["first"], AnalyticConv2d) and not isinstance(model["other"], AnalyticConv2d)


def test_the_last_arrangement_that_names_a_layer_counts() -> None:
    model = convert(net(), {"all": "G100%", "first": "P100%"})
    assert [str(model.get_submodule(name).arrangement) for name in ("0", "1.1")] == ["P24", "G16"]


def test_hooks_are_kept_there_and_back() -> None:
    model, calls = net(), []
    handles = [
        model[0].register_forward_hook(lambda *_: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda m, a, k: calls.append("pre"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    for change in (lambda m: convert(m, "first", "G100%"), fold):
        calls.clear()
        change(model)(x).sum().backward()
        assert calls == ["pre", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(calls) == 3


def test_hooks_of_a_subclass_run_once() -> None:
    model, calls = nn.Sequential(Standardised(3, 8, 5)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    convert(model, "0", "G100%")(torch.randn(1, 3, 9, 9))
    assert calls == [1]


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    names = [name for name, _ in model.named_parameters()]
    convert(model, "first", "G100%")
    assert model[0] is model[2] and isinstance(model[0], AnalyticConv2d)
    fold(model)
    assert model[0] is model[2] and [name for name, _ in model.named_parameters()] == names


def test_a_single_convolution_is_a_model_too() -> None:
    layer = convert(nn.Conv2d(3, 8, 5), "first", "G100%")
    assert isinstance(layer, AnalyticConv2d)
    assert type(fold(layer)) is nn.Conv2d


def test_depthwise_and_frozen() -> None:
    conv = nn.Conv2d(6, 6, 3, groups=6).requires_grad_(False)
    layer = convert(nn.Sequential(conv), "0", "G3 P3")[0]
    assert layer.weight.shape == (6, 1, 3, 3)
    assert not layer.plain.requires_grad and not layer.bias.requires_grad and layer.raw["G_theta"].requires_grad


def test_summary_counts_before_and_after() -> None:
    model = net()
    before = [sum(p.numel() for p in conv.parameters()) for conv in (model[0], model[1][1])]
    convert(model, {"0": "G12 P12", "1.1": "Lg50% P50%"}, amplitude=True)
    after = [sum(p.numel() for p in layer.parameters()) for layer in (model[0], model[1][1])]
    lines = [line.split() for line in summary(model).splitlines()[1:]]
    assert [[int(n) for n in line[-2:]] for line in lines] == [list(pair) for pair in zip(before, after, strict=True)]
    assert lines[0][:3] == ["0", "G12", "P12"]


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "0", "0 is a ConvTranspose2d; only a 2-D convolution"),
        (nn.Sequential(nn.Conv1d(3, 3, 3)), "0", "0 is a Conv1d; only a 2-D convolution"),
        (nn.Sequential(nn.Linear(3, 3)), "0", "no convolution is named '0'; there are: none"),
        (nn.Sequential(nn.LazyConv2d(3, 3)), "0", "0 has no weight of its own to replace"),
        (nn.Sequential(weight_norm(nn.Conv2d(3, 3, 3))), "0", "0 has no weight of its own to replace"),
        (nn.Sequential(AnalyticConv2d(3, 3, 3, arrangement="G9")), "0", "0 is analytic already; acl.fold"),
    ],
)
def test_what_cannot_be_analytic(model: nn.Module, layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(model, layer, "G100%")


def test_an_unknown_init() -> None:
    with pytest.raises(ValueError, match="unknown init 'xavier'; known: random"):
        convert(net(), "first", "G100%", init="xavier")


@pytest.mark.parametrize(
    ("conv", "before", "after"),
    [(nn.Conv2d(3, 64, 7, bias=False), 9408, 4962), (nn.Conv2d(3, 64, 11), 23296, 11938)],
    ids=["ResNet", "AlexNet"],
)
def test_the_papers_arrangement_in_numbers(conv: nn.Module, before: int, after: int) -> None:
    assert sum(p.numel() for p in conv.parameters()) == before
    layer = convert(conv, "first", "G30 Lg15 Lt15 Tf30 Ts6 P96")
    assert sum(p.numel() for p in layer.parameters()) == after
