from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import models
from acl import akp_parameters
from training.config import compose
from training.errors import UsageError
from training.optim import OptimSettings, build_criterion, build_optimizer, build_schedule
from training.settings import build_model, load_run_data, parse_run


def build_model_and_settings(*overrides: str) -> tuple[nn.Module, OptimSettings]:
    settings = parse_run(compose(["arrangement=mosaic", *overrides]))
    return build_model(settings, load_run_data(settings)), settings.optim


def test_akps_have_own_learning_rate_and_no_weight_decay() -> None:
    options = ["optim.lr=0.001", "optim.akp_lr_scale=7", "optim.weight_decay=0.1"]
    model, settings = build_model_and_settings(*options)
    groups = build_optimizer(model, settings).param_groups
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    assert rates == [(0.001, 0.1), (0.001, 0), (pytest.approx(0.007), 0)]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim <= 1 for p in groups[1]["params"])
    assert sum(p.numel() for p in groups[2]["params"]) == 288  # AKPs of the mosaic
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_groups_are_those_of_earlier_checkpoints() -> None:
    model, settings = build_model_and_settings("model.layer.amplitude=true")
    akp_ids = {id(p) for p in akp_parameters(model)}
    others = [p for p in model.parameters() if id(p) not in akp_ids]
    expected = [[p for p in others if p.ndim > 1], [p for p in others if p.ndim <= 1], list(akp_parameters(model))]
    groups = build_optimizer(model, settings).param_groups
    assert [list(map(id, group["params"])) for group in groups] == [list(map(id, params)) for params in expected]


def test_gains_have_own_learning_rate_if_it_is_set() -> None:
    options = ["model.layer.amplitude=true", "optim.lr=0.001", "optim.akp_lr_scale=7", "optim.gain_lr_scale=2"]
    model, settings = build_model_and_settings(*options)
    groups = build_optimizer(model, settings).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.001, 0.001, 0.007, 0.002])
    assert sum(p.numel() for p in groups[3]["params"]) == 102  # kernels of the mosaic
    with pytest.raises(UsageError, match=r"optim\.gain_lr_scale=0\.0 is invalid: it should be greater than 0"):
        build_model_and_settings("optim.gain_lr_scale=0.0")


def test_pretrained_layers_have_own_learning_rate_if_it_is_set(tmp_path: Path) -> None:
    source = models.create_model("resnet18", 3, 5, {})
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    options = {"pretrained": str(tmp_path / "net.safetensors")}
    model = models.create_model("resnet18", 3, 7, {"first": "G96 P96"}, {"amplitude": True}, **options)
    settings = parse_run(compose(["optim.lr=0.001", "optim.pretrained_lr_scale=0.3", "optim.akp_lr_scale=5"])).optim
    groups = build_optimizer(model, settings).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert {rates[id(p)] for p in model.fc.parameters()} == {0.001}
    assert {rates[id(p)] for p in akp_parameters(model)} == {0.001 * 5 * 0.3}
    assert {rates[id(p)] for p in model.layer4.parameters()} == {0.001 * 0.3}


def test_learning_rate_of_pretrained_layers_needs_a_pretrained_network() -> None:
    with pytest.raises(UsageError, match=r"optim.pretrained_lr_scale=0.3 needs a pretrained network"):
        build_optimizer(*build_model_and_settings("optim.pretrained_lr_scale=0.3"))


def test_frozen_akps_have_no_parameter_group() -> None:
    model, settings = build_model_and_settings("model.layer.learn=none")
    groups = build_optimizer(model, settings).param_groups
    assert len(groups) == 2
    assert all(p.requires_grad for group in groups for p in group["params"])


@pytest.mark.parametrize("schedule_name", ["onecycle", "cosine"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_learning_rates_of_all_groups_end_near_zero(name: str, schedule_name: str) -> None:
    model, settings = build_model_and_settings(f"optim={name}", f"optim.schedule={schedule_name}")
    optimizer = build_optimizer(model, settings)
    schedule = build_schedule(optimizer, settings, 20)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    peaks = [max(column) for column in zip(*rates, strict=True)]
    assert peaks[0] == pytest.approx(settings.lr)
    assert peaks[2] == pytest.approx(settings.akp_lr_scale * peaks[0])
    assert all(rate < 0.02 * peak for rate, peak in zip(rates[-1], peaks, strict=True))


def test_schedule_of_one_step_is_refused() -> None:
    model, settings = build_model_and_settings()
    with pytest.raises(UsageError, match=r"optim\.schedule=onecycle needs more than one step, and the run has one"):
        build_schedule(build_optimizer(model, settings), settings, 1)


@pytest.mark.parametrize(("name", "optimizer_class"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_name_selects_optimizer(name: str, optimizer_class: type[torch.optim.Optimizer]) -> None:
    model, settings = build_model_and_settings(f"optim={name}")
    optimizer = build_optimizer(model, settings)
    assert type(optimizer) is optimizer_class
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {settings.momentum}


def test_criterion_smooths_labels() -> None:
    _, settings = build_model_and_settings("optim.label_smoothing=0.1")
    logits, labels = torch.randn(8, 10), torch.arange(8)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(build_criterion(settings)(logits, labels), expected)
    assert not torch.allclose(expected, F.cross_entropy(logits, labels))
