"""Converts any network into an analytic network (AnaNN) and back, and inspects the analytic layers of a model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from acl.arrangement import Arrangement
from acl.fit import KernelFit, apply_fits, check_tolerance, fit_kernels
from acl.layer import AnalyticConv2d

INITS = ("random", "fit")
_HOOK_ATTRIBUTES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""Where nn.Module keeps the hooks that run with a forward or backward pass."""


def convert(
    model: nn.Module,
    layers: str | Iterable[str] | Mapping[str, Arrangement | str],
    arrangement: Arrangement | str | None = None,
    init: str | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces convolutions of a model, in place, by analytic ones.

    Plain kernels and biases are copied from the slots they replace. AKPs are sampled at random, as in the paper, or
    fitted to the kernels they replace. Device, dtype, memory format, training mode and hooks are kept. A subclass of
    nn.Conv2d keeps its own forward pass (such as the padding of timm's Conv2dSame).

    Args:
        model: any network.
        layers: names as in ``model.named_modules()``, globs of them, or rules: ``first`` or ``all`` convolutions, or
            those of a minimum kernel size, as in ``k>=5``. Or a mapping from these to one arrangement each, where the
            last entry that matches a layer wins.
        arrangement: the arrangement for all ``layers``, unless they are a mapping. ``auto``: each slot takes the kind
            with the fewest AKPs among those that fit its kernel within ``tolerance``, and stays plain if none does.
        init: ``random``, or ``fit``: AKPs and gains fitted to the kernels being replaced. Defaults to ``random``, and
            to ``fit`` for ``auto``. Without ``amplitude``, a fitted kernel has the target's shape but not its norm.
        tolerance: the share of a kernel's energy that ``auto`` may miss, from 0 (all plain) to 1 (all analytic).
        options: ``scale``, ``amplitude``, ``family``, ``profile`` and ``learn`` of AnalyticConv2d.

    Returns:
        The model, or the new layer if the model is a single convolution.

    Raises:
        ValueError: for a name that matches no convolution (the message lists them), a layer that cannot be analytic,
            or arguments that AnalyticConv2d rejects. The model is then unchanged.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> convert(net, {"all": "P100%", "first": "G50% P50%"})[0].arrangement.counts
        {'G': 12, 'P': 12}
        >>> print(summary(net))
        layer  arrangement  parameters before  after
        0      G12 P12                    608    356
        2      P64                        584    584
    """
    if init not in (None, *INITS):
        raise ValueError(f"unknown init '{init}'; known: {', '.join(INITS)}")
    if isinstance(layers, Mapping):
        requested = dict(layers)
    elif arrangement is None:
        raise ValueError("convert needs an arrangement, such as 'G50% P50%', unless layers maps to one each")
    else:
        requested = dict.fromkeys([layers] if isinstance(layers, str) else layers, arrangement)
    convolutions = _plain_convolutions(model)
    arrangements: dict[str, Arrangement] = {}
    for pattern, given in requested.items():
        for name in _match(pattern, convolutions, model):
            conv = convolutions[name]
            if is_lazy(conv.weight) or conv._parameters.get("weight") is None:
                raise ValueError(
                    f"{name} has no weight of its own to replace ({type(conv).__name__}: the weight is lazy, or is "
                    "computed from other parameters, as by weight_norm); materialize or remove that first"
                )
            parsed = Arrangement.parse(given) if isinstance(given, str) else given
            if parsed.auto:
                check_tolerance(tolerance)
                arrangements[name] = parsed
            else:
                arrangements[name] = parsed.fill(conv.in_channels // conv.groups, conv.out_channels, name)
    replacements = {
        convolutions[name]: _to_analytic(convolutions[name], parsed, init, tolerance, options)
        for name, parsed in arrangements.items()
    }
    for conv, layer in replacements.items():
        if type(conv) is not nn.Conv2d:
            layer.host = conv
            conv.weight = conv.bias = None  # type: ignore[assignment]
        _move_hooks(conv, layer)
    return _replace_modules(model, replacements)


def fold(model: nn.Module) -> nn.Module:
    """Replaces the analytic convolutions of a model, in place, by plain ones with the same weight.

    Parameters get back the names they had before ``convert``; nothing of acl remains. Hooks are kept.

    Returns:
        The model, or the nn.Conv2d itself if the model is a single analytic convolution.

    Example:
        >>> net = nn.Sequential(AnalyticConv2d(3, 8, 5, arrangement="G24"))
        >>> [name for name, _ in fold(net).named_parameters()]
        ['0.weight', '0.bias']
    """
    replacements = {layer: layer.fold() for layer in analytic_layers(model).values()}
    for layer, conv in replacements.items():
        _move_hooks(layer, conv)
    return _replace_modules(model, replacements)


def summary(model: nn.Module) -> str:
    """A table of a model's analytic layers: arrangement, and parameters compared with the plain layer's."""
    rows = [("layer", "arrangement", "parameters before", "after")]
    for name, layer in analytic_layers(model).items():
        after = sum(p.numel() for p in layer.parameters())
        kept = after - sum(p.numel() for p in layer.weight_parameters())
        before = kept + layer.weight.numel()
        rows.append((name, str(layer.arrangement), f"{before:,}", f"{after:,}"))
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{row[0]:{a}}  {row[1]:{b}}  {row[2]:>{c}}  {row[3]:>{d}}" for row in rows)


def analytic_layers(model: nn.Module) -> dict[str, AnalyticConv2d]:
    """The analytic layers of a model by name, in the order of ``model.named_modules()``; a shared layer once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AnalyticConv2d)}


def akp_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The stored AKPs of every analytic layer in a model, which need a learning rate of their own.

    Example:
        >>> layer = AnalyticConv2d(1, 6, 5, arrangement="G6")
        >>> [p.numel() for p in akp_parameters(layer)]
        [6, 6, 6, 6]
    """
    for layer in analytic_layers(model).values():
        yield from layer.raw.values()


def _plain_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that are not analytic, by name; those inside an analytic layer are its own."""
    inside_analytic = tuple(f"{name}." for name in analytic_layers(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and not isinstance(module, AnalyticConv2d)
        and not name.startswith(inside_analytic)
    }


def _match(pattern: str, convolutions: Mapping[str, nn.Conv2d], model: nn.Module) -> list[str]:
    """The convolutions that a name, glob or rule refers to; a layer's own name takes precedence over a rule."""
    names = [name for name in convolutions if fnmatchcase(name, pattern)]
    if not names and pattern == "first":
        names = list(convolutions)[:1]
    elif not names and pattern == "all":
        names = list(convolutions)
    elif not names and (rule := re.fullmatch(r"k\s*>=\s*(\d+)", pattern)):
        names = [name for name, conv in convolutions.items() if min(conv.kernel_size) >= int(rule[1])]
    if names:
        return names
    module = dict(model.named_modules()).get(pattern)
    if isinstance(module, AnalyticConv2d):
        raise ValueError(f"{pattern} is already analytic; acl.fold makes it plain again")
    if isinstance(module, _ConvNd):
        raise ValueError(f"{pattern} is a {type(module).__name__}; only a 2-D convolution (nn.Conv2d) can be analytic")
    listed = ", ".join(f"{name} ({conv.kernel_size[0]} x {conv.kernel_size[1]})" for name, conv in convolutions.items())
    raise ValueError(f"no convolution is named '{pattern}'; the model has: {listed or 'none'}")


@torch.no_grad()
def _to_analytic(
    conv: nn.Conv2d, arrangement: Arrangement, init: str | None, tolerance: float | None, options: dict[str, Any]
) -> AnalyticConv2d:
    fit_options: dict[str, Any] = {
        "family": options.get("family", "paper"),
        "profile": options.get("profile", "exponential"),
        "signed": not options.get("amplitude", False),
    }
    placement: torch.Tensor | None = None
    fits: list[KernelFit] | None = None
    if arrangement.auto:
        assert tolerance is not None
        fits = list(fit_kernels(conv.weight, **fit_options).choose(tolerance, conv.weight).kernels)
        arrangement, placement = Arrangement.from_slot_kinds([fit.kind for fit in fits])
    layer = AnalyticConv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
        (conv.dilation[0], conv.dilation[1]),
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        conv.weight.device,
        conv.weight.dtype,
        arrangement=arrangement,
        placement=placement,
        **options,
    )
    kernels = conv.weight.flatten(0, 1)
    if layer.plain is not None:
        layer.plain.copy_(kernels[layer.slots_of("P")]).requires_grad_(conv.weight.requires_grad)
    if fits is None and init == "fit":
        fits = [KernelFit("P", {}, 1.0, None)] * len(kernels)
        for symbol in layer.akps():
            slots = layer.slots_of(symbol)
            kind_fits = fit_kernels(kernels[slots, None], [symbol], **fit_options).kernels
            for slot, fit in zip(slots, kind_fits, strict=True):
                fits[slot] = fit
    if fits is not None and init != "random":
        apply_fits(layer, fits)
    if layer.bias is not None and conv.bias is not None:
        layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        layer.to(memory_format=torch.channels_last)
    return layer.train(conv.training)


def _replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> nn.Module:
    """Replaces modules wherever they occur in the model."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements and name:
            model.set_submodule(name, replacements[module])
    return replacements.get(model, model)


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    unhooked = nn.Module()
    for attribute in _HOOK_ATTRIBUTES:  # the same dictionaries, so that the remove() of existing handles still works
        setattr(target, attribute, getattr(source, attribute))
        setattr(source, attribute, getattr(unhooked, attribute))
