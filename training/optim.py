"""The loss, the optimizer and the learning-rate schedule of a run."""

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from acl import akp_parameters
from training.validation import STRICT


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimSettings:
    """The options of configs/optim."""

    name: Literal["adamw", "sgd"]
    lr: float = Field(gt=0)
    akp_lr_scale: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["onecycle", "cosine"]
    label_smoothing: float = Field(ge=0, lt=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of SGD


def build_criterion(settings: OptimSettings) -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Builds an optimizer with up to three groups: weights, with decay; biases and norms; AKPs, at their own rate."""
    akp_ids = {id(p) for p in akp_parameters(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    akps = [p for p in akp_parameters(model) if p.requires_grad]
    others = [p for p in trainable if id(p) not in akp_ids]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "lr": settings.lr, "weight_decay": 0.0},
        {"params": akps, "lr": settings.lr * settings.akp_lr_scale, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=settings.momentum, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, settings: OptimSettings, steps: int) -> LRScheduler:
    """Builds a schedule over ``steps`` optimizer steps that peaks at each group's learning rate."""
    if settings.schedule == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=steps, cycle_momentum=False)
    return CosineAnnealingLR(optimizer, steps)
