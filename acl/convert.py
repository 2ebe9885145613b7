"""Makes an analytic network (AnaNN) of any network, and a plain one of it again."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from acl.arrangement import Arrangement
from acl.fit import KernelFit, adopt, check_tolerance, counted, fit_kernels, placed
from acl.layer import AnalyticConv2d

INITS = ("random", "fit")
_HOOKS = [name for name in vars(nn.Module()) if "hook" in name and re.search("forward|backward", name)]


def convert(
    model: nn.Module,
    layers: str | Iterable[str] | Mapping[str, Arrangement | str],
    arrangement: Arrangement | str | None = None,
    init: str | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces convolutions of a model, in place, by analytic ones.

    Plain kernels and biases come from the slots they replace; AKPs are drawn at random, as in the paper, or fitted to
    the kernels they replace. Device, dtype, memory format, train mode and hooks are kept. A subclass of nn.Conv2d goes
    on convolving in its own way (as timm's Conv2dSame pads, and StdConv2d standardises the weight).

    Args:
        model: any network.
        layers: names as in ``model.named_modules()``, globs of them, or rules: ``first`` and ``all`` convolutions, or
            those of a kernel size of at least some, as in ``k>=5``; or a mapping from such to an arrangement each,
            where the last that names a layer counts.
        arrangement: the one for all of ``layers``, where these are no mapping. ``auto``: each slot takes, of the kinds
            that fit its kernel within ``tolerance``, the one of fewest AKPs, and stays plain where none does.
        init: ``random``, or ``fit``: AKPs and gains fitted to the kernels that are replaced. By default ``random``, and
            ``fit`` for ``auto``. Without ``amplitude`` a fitted kernel has the shape alone, not the size.
        tolerance: share of a kernel's energy that ``auto`` may miss, 0 (all plain) to 1 (all analytic).
        options: ``scale``, ``amplitude``, ``family``, ``profile`` and ``learn`` of AnalyticConv2d.

    Returns:
        The model; the layer itself, where the model is a single convolution.

    Raises:
        ValueError: a name that matches no convolution (lists those there are) or one that cannot be analytic, or what
            AnalyticConv2d refuses; the model is then as it was.

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
        wanted = dict(layers)
    else:
        if arrangement is None:
            raise ValueError("convert needs an arrangement, as in 'G50% P50%', where layers is no mapping to one each")
        wanted = dict.fromkeys([layers] if isinstance(layers, str) else layers, arrangement)
    convolutions = _convolutions(model)
    arrangements: dict[str, Arrangement] = {}
    for pattern, given in wanted.items():
        for name in _named(pattern, convolutions, model):
            conv = convolutions[name]
            if is_lazy(conv.weight) or conv._parameters.get("weight") is None:
                raise ValueError(
                    f"{name} has no weight of its own to replace ({type(conv).__name__}: it is made later, or computed "
                    "from others, as by weight_norm); give it one first"
                )
            parsed = Arrangement.parse(given) if isinstance(given, str) else given
            if parsed.auto:
                check_tolerance(tolerance)
                arrangements[name] = parsed
            else:
                arrangements[name] = parsed.fill(conv.in_channels // conv.groups, conv.out_channels, name)
    replacements = {
        convolutions[name]: _analytic(convolutions[name], parsed, init, tolerance, options)
        for name, parsed in arrangements.items()
    }
    for conv, layer in replacements.items():
        if type(conv) is not nn.Conv2d:
            layer.host = conv
            conv.weight = conv.bias = None  # type: ignore[assignment]
        _move_hooks(conv, layer)
    return _replaced(model, replacements)


def fold(model: nn.Module) -> nn.Module:
    """Replaces the analytic convolutions of a model, in place, by the plain ones of the same weight.

    Parameters have the names that they had before ``convert``; nothing of acl is left. Hooks are kept.

    Returns:
        The model; the nn.Conv2d itself, where the model is a single analytic convolution.

    Example:
        >>> net = nn.Sequential(AnalyticConv2d(3, 8, 5, arrangement="G24"))
        >>> [name for name, _ in fold(net).named_parameters()]
        ['0.weight', '0.bias']
    """
    analytic = [module for module in model.modules() if isinstance(module, AnalyticConv2d)]
    replacements = {layer: layer.fold() for layer in analytic}
    for layer, conv in replacements.items():
        _move_hooks(layer, conv)
    return _replaced(model, replacements)


def summary(model: nn.Module) -> str:
    """A table of a model's analytic layers: arrangement, and parameters against those of the plain layer."""
    rows = [("layer", "arrangement", "parameters before", "after")]
    for name, layer in model.named_modules():
        if isinstance(layer, AnalyticConv2d):
            after = sum(p.numel() for p in layer.parameters())
            analytic = sum(p.numel() for p in layer._sources())
            before = (
                after - analytic + sum(layer.arrangement.counts.values()) * layer.kernel_size[0] * layer.kernel_size[1]
            )
            rows.append((name, str(layer.arrangement), f"{before:,}", f"{after:,}"))
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{row[0]:{a}}  {row[1]:{b}}  {row[2]:>{c}}  {row[3]:>{d}}" for row in rows)


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """By name, without those inside of analytic layers."""
    analytic = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AnalyticConv2d))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not name.startswith(analytic)
    }


def _named(pattern: str, convolutions: Mapping[str, nn.Conv2d], model: nn.Module) -> list[str]:
    """The convolutions that a name, glob or rule means; a layer's own name comes before a rule."""
    names = [name for name in convolutions if fnmatchcase(name, pattern)]
    if not names and pattern in ("first", "all"):
        names = list(convolutions)[: 1 if pattern == "first" else None]
    elif not names and (rule := re.fullmatch(r"k\s*>=\s*(\d+)", pattern)):
        names = [name for name, conv in convolutions.items() if min(conv.kernel_size) >= int(rule[1])]
    if names:
        return names
    there = dict(model.named_modules()).get(pattern)
    if isinstance(there, AnalyticConv2d):
        raise ValueError(f"{pattern} is analytic already; acl.fold makes it plain again")
    if isinstance(there, _ConvNd):
        raise ValueError(f"{pattern} is a {type(there).__name__}; only a 2-D convolution (nn.Conv2d) can be analytic")
    listed = ", ".join(f"{name} ({conv.kernel_size[0]} x {conv.kernel_size[1]})" for name, conv in convolutions.items())
    raise ValueError(f"no convolution is named '{pattern}'; there are: {listed or 'none'}")


@torch.no_grad()
def _analytic(
    conv: nn.Conv2d, arrangement: Arrangement, init: str | None, tolerance: float | None, options: dict[str, Any]
) -> AnalyticConv2d:
    fitting: dict[str, Any] = {
        "family": options.get("family", "paper"),
        "profile": options.get("profile", "exponential"),
    }
    fitting["signed"] = not options.get("amplitude", False)
    placement: torch.Tensor | None = None
    fits: list[KernelFit] | None = None
    if arrangement.auto:
        assert tolerance is not None
        fits = list(fit_kernels(conv.weight, **fitting).choose(tolerance, conv.weight).kernels)
        arrangement, placement = counted(fit.kind for fit in fits), placed(fit.kind for fit in fits)
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
            for slot, fit in zip(slots, fit_kernels(kernels[slots, None], [symbol], **fitting).kernels, strict=True):
                fits[slot] = fit
    if fits is not None and init != "random":
        adopt(layer, fits)
    if layer.bias is not None and conv.bias is not None:
        layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        layer.to(memory_format=torch.channels_last)
    return layer.train(conv.training)


def _replaced(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> nn.Module:
    """Puts a layer in the place of another, wherever in the model that is."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements and name:
            model.set_submodule(name, replacements[module])
    return replacements.get(model, model)


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    for name in _HOOKS:  # the very same dictionaries, so that a handle's remove() works on
        setattr(target, name, getattr(source, name))
        setattr(source, name, getattr(nn.Module(), name))
