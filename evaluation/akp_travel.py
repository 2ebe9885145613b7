"""How far AKPs move during training, and how far the optimizer lets them move."""

import copy
import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from acl.inspection import analytic_layers
from acl.kernels import KINDS
from evaluation.finished_run import FinishedRun, load_own_akp_history
from training.data import Data
from training.optim import build_optimizer, build_schedule

NonNegative = Annotated[float, Field(ge=0)]


class Travel(TypedDict):
    """Distances of one AKP of one kind, in px or degrees (or without a unit, as the AKP)."""

    mean: NonNegative
    """Mean over the network of the distance between the values before training and at the best epoch."""
    allowed: NonNegative | None
    """Mean over the network of the largest distance that the optimizer allows; None if it sets no limit."""


def measure_akp_travel(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Measures the distance that AKPs travel, modulo the period of those that have one.

    The distance that the optimizer allows is the sum of an AKP's learning rates over all steps up to the best epoch,
    and at most half a period. It assumes that no step of AdamW is longer than the learning rate, which holds unless
    gradients are rare and large (Kingma and Ba, Adam, ICLR 2015, section 2.1: up to 3.2 times as long if a gradient
    follows on zeros alone). Widths are stored as an inverse softplus, so they move at most as far as what is stored.
    SGD sets no limit, because its steps grow with the gradient.

    Returns:
        ``<kind>/<akp>`` -> ``Travel``; empty for a network without AKPs.

    Raises:
        UsageError: as ``load_own_akp_history`` does.
    """
    assert run.record is not None
    history, limits = load_own_akp_history(run), compute_limits(run, len(data.train))
    distances: dict[str, list[Tensor]] = {}
    allowed: dict[str, list[Tensor]] = {}
    for name, values in history.items():
        symbol, akp_name = name.split("/")[-2:]
        akp = KINDS[symbol].find_akp(akp_name)
        distance = (values[run.record.best_epoch] - values[0]).double().abs()
        limit = torch.full_like(distance, limits[name])
        if akp.period is not None:
            distance = torch.minimum(distance % akp.period, -distance % akp.period)
            limit = limit.clamp(max=akp.period / 2)
        factor = 180 / math.pi if akp.unit == "rad" else 1.0
        distances.setdefault(f"{symbol}/{akp_name}", []).append(factor * distance)
        allowed.setdefault(f"{symbol}/{akp_name}", []).append(factor * limit)
    is_limited = run.settings.optim.name == "adamw"
    return {
        name: {
            "mean": float(torch.cat(parts).mean()),
            "allowed": float(torch.cat(allowed[name]).mean()) if is_limited else None,
        }
        for name, parts in distances.items()
    }


def compute_limits(run: FinishedRun, num_images: int) -> dict[str, float]:
    """Sums the learning rates of every AKP over all steps up to the best epoch; 0 for AKPs that are not trained.

    Args:
        run: a run with its record.
        num_images: the number of training images.

    Returns:
        ``<layer>/<kind>/<akp>``, as in akps.safetensors -> sum.
    """
    assert run.record is not None
    settings = run.settings
    steps_per_epoch = num_images // settings.trainer.batch_size
    model = copy.deepcopy(run.model)  # without gradients, so that the optimizer's steps change nothing
    optimizer = build_optimizer(model, settings.optim)
    schedule = build_schedule(optimizer, settings.optim, steps_per_epoch * settings.trainer.epochs)
    sums = [0.0 for _ in optimizer.param_groups]
    for _ in range(steps_per_epoch * run.record.best_epoch):
        sums = [total + group["lr"] for total, group in zip(sums, optimizer.param_groups, strict=True)]
        optimizer.step()
        schedule.step()
    sum_of = {p: total for total, group in zip(sums, optimizer.param_groups, strict=True) for p in group["params"]}
    return {
        f"{name}/{symbol}/{akp}": sum_of.get(layer.raw[f"{symbol}_{akp}"], 0.0)
        for name, layer in analytic_layers(model).items()
        for symbol, akps in layer.akps().items()
        for akp in akps
    }
