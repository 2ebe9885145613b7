"""Plain networks that differ in one respect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from models.controls import CONTROLS_OF_ANALYTIC, ZeroSumConv2d, apply_control
from models.lenet import LeNet
from models.library import find_random_layers


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pretrained") / "squeezenet1_0.safetensors"
    save_file(models.create_model("squeezenet1_0", 3, 10, {}).state_dict(), file)
    return file


def create(pretrained: Any, control: Any) -> nn.Module:
    return models.create_model("squeezenet1_0", 3, 10, {}, None, control, pretrained=str(pretrained))


def test_random_and_permuted_change_the_first_convolution_alone(pretrained: Path) -> None:
    plain, random, permuted = (create(pretrained, control) for control in (None, "random", "permuted"))
    states = [model.state_dict() for model in (plain, random, permuted)]
    for name, weight in states[0].items():
        if not name.startswith("features.0."):
            assert torch.equal(weight, states[1][name])
            assert torch.equal(weight, states[2][name])
    filters, others, permuted_filters = (
        torch.cat([state["features.0.weight"].flatten(1), state["features.0.bias"][:, None]], 1) for state in states
    )
    assert not torch.isclose(filters, others).any(1).all()
    is_same = (filters[:, None] == permuted_filters).all(2)
    assert is_same.sum(0).eq(1).all()
    assert is_same.sum(1).eq(1).all()
    assert not is_same.diagonal().all()
    assert find_random_layers(random) == ["features.0"]
    assert find_random_layers(permuted) == []


def test_zero_sum_holds_after_training_and_is_differentiable() -> None:
    model = models.create_model("lenet", 1, 10, {}, None, "zero_sum")
    assert isinstance(model.conv1, ZeroSumConv2d)
    assert models.count_parameters(model) == models.count_parameters(LeNet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.conv1.weight.detach()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(4, 1, 28, 28)).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model.conv1.weight, before)
    torch.testing.assert_close(model.conv1.weight.sum((2, 3)), torch.zeros(6, 1), atol=1e-5, rtol=0)
    conv = ZeroSumConv2d(nn.Conv2d(2, 3, 3)).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(conv, {"free": w}, (x,)), conv.free)


def test_output_of_zero_sum_does_not_depend_on_brightness() -> None:
    conv = ZeroSumConv2d(nn.Conv2d(1, 4, 5))
    x = torch.rand(1, 1, 9, 9)
    torch.testing.assert_close(conv(x), conv(x + 10), atol=1e-4, rtol=0)


@pytest.mark.parametrize("control", ["random", "permuted"])
def test_controls_of_pretrained_kernels_need_them(control: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.control={control} needs a pretrained network"):
        models.create_model("lenet", 1, 10, {}, None, control)


def test_folded_has_the_start_of_an_analytic_network_and_is_plain() -> None:
    arrangement = {"conv1": "G3 P3", "conv2": "G24 Lg6 Lt6 Tf9 Ts3 P48"}
    torch.manual_seed(0)
    analytic = models.create_model("lenet", 1, 10, arrangement, {"amplitude": True})
    torch.manual_seed(0)
    folded = models.create_model("lenet", 1, 10, arrangement, {"amplitude": True}, "folded")
    assert models.count_parameters(folded) == models.count_parameters(LeNet())
    assert type(folded.conv1) is type(folded.conv2) is nn.Conv2d
    assert all(parameter.requires_grad for parameter in folded.parameters())
    x = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(folded(x), analytic(x))


@pytest.mark.parametrize("per", ["kernel", "filter"])
def test_shuffled_changes_the_shape_of_formulas_alone(per: str) -> None:
    arrangement = {"conv2": "G50% P50%"}
    torch.manual_seed(0)
    analytic = models.create_model("lenet", 1, 10, arrangement, {"per": per})
    torch.manual_seed(0)
    changed = models.create_model("lenet", 1, 10, arrangement, {"per": per}, "shuffled")
    assert type(changed.conv2) is nn.Conv2d
    assert torch.equal(changed.conv1.weight, analytic.conv1.weight)
    assert torch.equal(changed.conv2.bias, analytic.conv2.bias)
    is_formula = torch.tensor([kind == "G" for kind in analytic.conv2.slot_kinds])
    before, after = (analytic.conv2.view_slots(net.conv2.weight.detach()) for net in (analytic, changed))
    assert torch.equal(before[~is_formula], after[~is_formula])
    before, after = before[is_formula].flatten(-2), after[is_formula].flatten(-2)
    assert torch.linalg.matrix_rank(after[0].view(-1, 25)) == 1  # the kernels of a filter have one shape
    assert torch.equal(before.sort().values, after.sort().values)
    assert not torch.isclose(before, after).all(-1).any()


@pytest.mark.parametrize("control", CONTROLS_OF_ANALYTIC)
def test_controls_that_start_from_formulas_need_them(control: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.control={control} needs formulas to start from"):
        models.create_model("lenet", 1, 10, {}, None, control)


def test_analytic_networks_take_no_other_control() -> None:
    with pytest.raises(ValueError, match=r"model\.control=zero_sum is for plain networks; use model=lenet"):
        models.create_model("lenet", 1, 10, {"conv1": "G6"}, {}, "zero_sum")


@pytest.mark.parametrize(
    ("convolution", "message"),
    [("separable", r"not the 1 x 1 Conv2d conv1\.0"), ("gaussian_basis", "not the 5 x 5 GaussianBasisConv2d conv1")],
)
def test_zero_sum_refuses_what_it_would_change_otherwise(convolution: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create_model("lenet", 1, 10, {}, None, "zero_sum", convolution=convolution)
    with pytest.raises(ValueError, match="needs a network with convolutions"):
        apply_control(nn.Linear(2, 2), "zero_sum")
