"""The loss, the optimizer and the learning-rate schedule of a run."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from acl import param_groups
from models.library import find_random_layers
from training.errors import UsageError
from training.validation import strict_dataclass


@strict_dataclass
class OptimSettings:
    """The options of configs/optim."""

    name: Literal["adamw", "sgd"]
    lr: float = Field(gt=0)
    akp_lr_scale: float = Field(gt=0)
    gain_lr_scale: float | None = Field(default=None, gt=0)
    pretrained_lr_scale: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["onecycle", "cosine"]
    label_smoothing: float = Field(ge=0, lt=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of SGD


def build_criterion(settings: OptimSettings) -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Builds an optimizer with the groups of ``acl.param_groups``; pretrained layers can have their own learning rate.

    Raises:
        UsageError: for ``pretrained_lr_scale`` with a network that is not pretrained.
    """
    groups = param_groups(model, settings.lr, settings.akp_lr_scale, settings.gain_lr_scale, settings.weight_decay)
    if settings.pretrained_lr_scale is not None:
        groups = _separate_pretrained(groups, model, settings.pretrained_lr_scale)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=settings.momentum, fused=True)


def _separate_pretrained(groups: list[dict[str, Any]], model: nn.Module, lr_scale: float) -> list[dict[str, Any]]:
    random_layers = find_random_layers(model)
    if random_layers is None:
        raise UsageError(f"optim.pretrained_lr_scale={lr_scale} needs a pretrained network; set model.pretrained")
    random = {id(p) for name in random_layers for p in model.get_submodule(name).parameters()}
    separated = [
        {**group, "lr": group["lr"] * scale, "params": [p for p in group["params"] if (id(p) in random) == is_random]}
        for group in groups
        for is_random, scale in ((True, 1.0), (False, lr_scale))
    ]
    return [group for group in separated if group["params"]]


def build_schedule(optimizer: torch.optim.Optimizer, settings: OptimSettings, steps: int) -> LRScheduler:
    """Builds a schedule over ``steps`` optimizer steps that peaks at each group's learning rate.

    Raises:
        UsageError: for one step, in which ``onecycle`` would train at its lowest rate.
    """
    if settings.schedule == "onecycle":
        if steps == 1:
            raise UsageError(
                "optim.schedule=onecycle needs more than one step, and the run has one: set a larger trainer.epochs or "
                "a smaller trainer.batch_size"
            )
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=steps, cycle_momentum=False)
    return CosineAnnealingLR(optimizer, steps)
