"""Finds the analytic layers of a model, and its parameters and operations."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from acl.factored import is_factored
from acl.kernels import AMPLITUDE
from acl.layer import AnalyticConv2d

_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def analytic_layers(model: nn.Module) -> dict[str, AnalyticConv2d]:
    """The analytic layers of a model by name, in the order of ``model.named_modules()``, each shared layer once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AnalyticConv2d)}


def find_plain_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a model that are not analytic, by name, except the hosts inside analytic layers."""
    inside_analytic = tuple(f"{name}." if name else "" for name in analytic_layers(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and not isinstance(module, AnalyticConv2d)
        and not name.startswith(inside_analytic)
    }


def require_analytic_layers(model: nn.Module) -> dict[str, AnalyticConv2d]:
    """The analytic layers of a model by name. Raises ValueError if there are none."""
    layers = analytic_layers(model)
    if not layers:
        raise ValueError("the network has no analytic layer")
    return layers


def refuse_patched_forward(conv: nn.Module, problem: str) -> None:
    """Raises ValueError with the message ``problem: ...`` if a convolution's own forward pass replaces its class's."""
    if {"forward", "_conv_forward"} & vars(conv).keys():
        raise ValueError(f"{problem}: its forward pass is patched, which would be lost; use a subclass")


def akp_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields each stored AKP of the analytic layers in a model once; AKPs need their own learning rate.

    Example:
        >>> layer = AnalyticConv2d(1, 6, 5, arrangement="G6")
        >>> [p.numel() for p in akp_parameters(layer)]
        [6, 6, 6, 6]
    """
    # parameters() includes those of parametrizations; layers can share AKPs
    yield from dict.fromkeys(akp for layer in analytic_layers(model).values() for akp in layer.raw.parameters())


def param_groups(
    model: nn.Module,
    lr: float,
    akp_lr_scale: float = 5.0,
    gain_lr_scale: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups a model's trainable parameters for any optimizer of torch; each parameter is in one group.

    Args:
        model: any network, analytic or plain.
        lr: the learning rate of weights, biases and normalization layers.
        akp_lr_scale: the AKPs' learning rate as a multiple of ``lr``.
        gain_lr_scale: the same for gains (the AKPs of ``amplitude``); None: they are in the group of the other AKPs.
        weight_decay: of weights, but not of AKPs, biases and normalization layers.

    Returns:
        The groups of weights, of biases and normalization layers, of AKPs, and of gains, without the empty ones.
        A schedule must keep their rates apart: ``OneCycleLR(optimizer, [g["lr"] for g in groups], ...)``, since a
        single ``max_lr`` gives all groups the same rate.

    Raises:
        ValueError: for a negative or undefined (NaN) number, or parameters without a shape yet (lazy layers).

    Example:
        >>> net = nn.Sequential(AnalyticConv2d(3, 8, 5, arrangement="G12 P12"), nn.BatchNorm2d(8))
        >>> groups = param_groups(net, lr=1e-3, weight_decay=0.01)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(1, 0.001, 0.01), (3, 0.001, 0.0), (4, 0.005, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    gain_scale = akp_lr_scale if gain_lr_scale is None else gain_lr_scale
    numbers = {"lr": lr, "akp_lr_scale": akp_lr_scale, "gain_lr_scale": gain_scale, "weight_decay": weight_decay}
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    gain_ids: set[int] = set()
    if gain_lr_scale is not None:
        raw = [item for layer in analytic_layers(model).values() for item in layer.raw.named_parameters()]
        gain_ids = {id(parameter) for key, parameter in raw if f"_{AMPLITUDE.name}" in key}
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(f"{lazy[0]} has no shape yet; run a forward pass first, which initializes lazy layers")
    akps = {id(p): p for p in akp_parameters(model) if p.requires_grad}  # by id, because layers can share AKPs
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in akps]
    norms = {id(p) for module in model.modules() if isinstance(module, _NORMALIZATIONS) for p in module.parameters()}
    decayed = {id(p) for p in others if p.ndim > 1} - norms
    groups = [
        {"params": [p for p in others if id(p) in decayed], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in others if id(p) not in decayed], "lr": lr, "weight_decay": 0.0},
        {"params": [p for i, p in akps.items() if i not in gain_ids], "lr": lr * akp_lr_scale, "weight_decay": 0.0},
        {"params": [p for i, p in akps.items() if i in gain_ids], "lr": lr * gain_scale, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def summary(model: nn.Module, inputs: torch.Tensor | None = None) -> str:
    """Formats a table of a model's analytic layers: arrangement, and parameter counts before and after conversion.

    Several layers have a last line with totals, in which shared parameters count once.

    Args:
        model: any network.
        inputs: a batch of inputs; adds the multiply-adds of each layer's convolutions for it, in eval mode. They do not
            include the synthesis of the weight, which is cached.
    """
    multiply_adds = {} if inputs is None else _count_multiply_adds(model, inputs)
    rows: list[tuple[str, ...]] = [("layer", "arrangement", "parameters before", "after", "multiply-adds")]
    layers = analytic_layers(model)
    changes: dict[Any, int] = {}  # of each weight, which layers can share
    for name, layer in layers.items():
        after = sum(p.numel() for p in layer.parameters())
        other = after - sum(p.numel() for p in layer.weight_parameters())
        before = other + layer.weight.numel()
        rows.append((name, str(layer.arrangement), f"{before:,}", f"{after:,}", f"{multiply_adds.get(layer, 0):,}"))
        changes[*layer.raw.parameters(), layer.plain, layer.gains] = after - before
    if len(layers) > 1:
        after = sum(p.numel() for p in nn.ModuleList(layers.values()).parameters())
        total = after - sum(changes.values()), after, sum(multiply_adds.values())
        rows.append(("total", "", *(f"{number:,}" for number in total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    num_columns = len(widths) - (inputs is None)
    return "\n".join(
        "  ".join(f"{cell:{'<>'[i > 1]}{widths[i]}}" for i, cell in enumerate(row[:num_columns])) for row in rows
    )


def get_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The input of a convolution that was called with these arguments, ``conv(x)`` or ``conv(input=x)``."""
    tensor: torch.Tensor = args[0] if args else kwargs["input"]
    return tensor


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, without compiled code, which skips hooks; then restores the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _count_multiply_adds(model: nn.Module, inputs: torch.Tensor) -> dict[nn.Module, int]:
    counts: dict[nn.Module, int] = {}

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        assert isinstance(layer, AnalyticConv2d)
        channels, taps = layer.in_channels // layer.groups, math.prod(layer.kernel_size)
        multiply_adds = output.numel() * channels * taps
        if is_factored(layer, output.device):
            pixels = get_input(args, kwargs).numel() // layer.groups
            multiply_adds = pixels * layer.out_channels + output.numel() * taps
        counts[layer] = counts.get(layer, 0) + multiply_adds

    layers = analytic_layers(model).values()
    handles = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers]
    try:
        with eval_mode(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts
