"""Converts any network into an analytic network (AnaNN) and back."""

import re
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, Unpack, get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from acl.arrangement import Arrangement
from acl.computed_conv import get_convolution_arguments
from acl.factored import is_factored
from acl.fit import fit_kernels
from acl.fit_result import Fit, apply_fits, check_tolerance
from acl.inspection import analytic_layers, find_plain_convolutions, refuse_patched_forward
from acl.kernels import KINDS
from acl.layer import AnalyticConv2d
from acl.metric import Metric, check_metric_name
from acl.options import LayerKeywords, LayerOptions
from acl.refine import refine_jointly

Init = Literal["random", "fit"]
INITS: tuple[str, ...] = get_args(Init)
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
"""Where nn.Module stores the hooks that run in a forward or backward pass."""


def convert(
    model: nn.Module,
    layers: str | Iterable[str] | Mapping[str, Arrangement | str],
    arrangement: Arrangement | str | None = None,
    init: str | None = None,
    tolerance: float | None = None,
    metric: str | torch.Tensor = "images",
    **options: Unpack[LayerKeywords],
) -> nn.Module:
    """Replaces convolutions of a model with analytic ones, in place.

    Plain kernels and biases are copied from the original layers. AKPs are sampled at random, as in the paper, or
    fitted to the original kernels. Device, dtype, memory format, training mode and hooks are kept. A subclass of
    nn.Conv2d keeps its own forward pass (such as the padding of timm's Conv2dSame). Convolutions that share their
    weight then share AKPs and plain kernels.

    Args:
        model: any network.
        layers: layer names as in ``model.named_modules()``, glob patterns, or rules: ``first``, ``all``, or a minimum
            kernel size such as ``k>=5``. Alternatively, a mapping from any of these to an arrangement; if several
            entries match a layer, the last one wins.
        arrangement: the arrangement of every matched layer; not used if ``layers`` is a mapping. With ``auto``, each
            slot gets the kind with the fewest AKPs that fits its kernel within ``tolerance``, or stays plain.
        init: ``random`` samples the AKPs; ``fit`` fits AKPs and gains to the original kernels. Defaults to ``fit``
            for ``auto``, else to ``random``. Without ``amplitude``, ``fit`` drops the gains of kernels, with a warning.
        tolerance: the largest share of the energy of a kernel's output that ``auto`` may leave unexplained, from 0 (all
            plain) to 1 (all analytic). It is that of a kernel's own fit; if the chosen kernels of a filter are then
            refined together, single ones can exceed it.
        metric: what ``fit`` and ``auto`` take as the error of a kernel; see ``acl.fit_kernels``.
        options: the fields of ``acl.LayerOptions``.

    Returns:
        The model, or the new layer if the model is a single convolution.

    Raises:
        ValueError: for a name that matches no convolution, a layer that cannot be converted or that shares its weight
            or bias with a module that is not converted likewise, constant kernels (as all 1 x 1 kernels are) that
            ``fit`` cannot fit, kernels of at most 2 x 2 pixels that would be 0, 1 x 1 kernels without gains, which AKPs
            could not change, an AKP in ``learn`` that none of the layers has, a tolerance without ``auto``, or
            arguments that AnalyticConv2d rejects. The model is then unchanged.
        TypeError: for an unknown option, or an arrangement that is neither text nor an ``Arrangement``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> convert(net, {"all": "P100%", "first": "G50% P50%"})[0].arrangement.counts
        {'G': 12, 'P': 12}
        >>> from acl import summary
        >>> print(summary(net))
        layer  arrangement  parameters before  after
        0      G12 P12                    608    356
        2      P64                        584    584
        total                           1,192    940
    """
    if init not in (None, *INITS):
        raise ValueError(f"unknown init '{init}'; known: {', '.join(INITS)}")
    if isinstance(layers, Mapping):
        arrangement_by_pattern = dict(layers)
    elif arrangement is None:
        raise ValueError(
            "convert needs an arrangement, such as 'G50% P50%', unless layers is a mapping to arrangements"
        )
    else:
        arrangement_by_pattern = dict.fromkeys([layers] if isinstance(layers, str) else layers, arrangement)
    resolved = LayerOptions.from_keywords(options)
    if tolerance is not None:
        check_tolerance(tolerance)
    if isinstance(metric, str):
        check_metric_name(metric)
    convolutions = find_plain_convolutions(model)
    arrangements: dict[str, Arrangement] = {}
    for pattern, value in arrangement_by_pattern.items():
        for name in _match_layers(pattern, convolutions, model):
            conv = convolutions[name]
            check_convertible(conv, name or "the layer")
            parsed = Arrangement.coerce(value)
            if parsed.auto:
                check_tolerance(tolerance)
                arrangements[name] = parsed
            else:
                in_channels = conv.in_channels // conv.groups
                where = name or "the layer"
                arrangements[name] = parsed.fill(in_channels, conv.out_channels, where, resolved.per)
    if tolerance is not None and not any(parsed.auto for parsed in arrangements.values()):
        raise ValueError(f"tolerance={tolerance} needs the arrangement 'auto'")
    replacements = {
        convolutions[name]: _to_analytic(
            convolutions[name], name or "the layer", parsed, init, tolerance, metric, resolved
        )
        for name, parsed in arrangements.items()
    }
    available = {key.split("_", 1)[1] for layer in replacements.values() for key in layer.raw}
    if resolved.learn != "all" and (absent := resolved.learned_akps - available):
        raise ValueError(f"learn names '{min(absent)}', an AKP that no converted layer has; known: {sorted(available)}")
    converted = replace_convolutions(model, replacements)
    has_gains = resolved.per == "filter" or resolved.amplitude
    fitted = [name for name, parsed in arrangements.items() if init == "fit" or (init is None and parsed.auto)]
    kinds = [symbol for name in fitted for symbol in replacements[convolutions[name]].slot_kinds]
    if not has_gains and (count := sum(KINDS[symbol].is_analytic for symbol in kinds)):
        warnings.warn(
            f"the gains of {count:,} fitted kernels are dropped, which changes the outputs; amplitude=True keeps them",
            stacklevel=2,
        )
    return converted


def fold(model: nn.Module, factored: bool = False) -> nn.Module:
    """Replaces the analytic convolutions of a model with plain ones of the same weight, in place.

    Parameters regain the names they had before ``convert``, and the model no longer depends on acl. Hooks are kept.
    Layers that share all AKPs and plain kernels share their weight afterward.

    Args:
        model: a network, or an analytic layer itself.
        factored: replace filter mosaics that are computed as two convolutions on CPUs by these two.

    Returns:
        The model, or the new convolution if the model is a single analytic convolution.

    Raises:
        ValueError: for a layer that is pruned, or whose forward pass is patched. The model is then unchanged.

    Example:
        >>> net = nn.Sequential(AnalyticConv2d(3, 8, 5, arrangement="G24"))
        >>> [name for name, _ in fold(net).named_parameters()]
        ['0.weight', '0.bias']
    """
    cpu = torch.device("cpu")
    layers = analytic_layers(model)
    for name, layer in layers.items():
        refuse_patched_forward(layer, f"cannot fold {name or 'the layer'}")
        if any(isinstance(hook, BasePruningMethod) for hook in layer._forward_pre_hooks.values()):
            raise ValueError(f"cannot fold {name or 'the layer'}: it is pruned; call torch.nn.utils.prune.remove first")
    replacements = {layer: layer.fold(factored and is_factored(layer, cpu)) for layer in layers.values()}
    folded: dict[Any, Any] = {}
    for layer, new in replacements.items():
        first = folded.setdefault((*layer.raw.parameters(), layer.plain, layer.gains), new)
        # One of two layers with the same kernels can be a single convolution and the other one factored.
        for conv, first_conv in zip(_list_convolutions(new), _list_convolutions(first), strict=False):
            is_same_shape = conv.weight.shape == first_conv.weight.shape
            if is_same_shape and (conv.weight.is_meta or torch.equal(conv.weight, first_conv.weight)):
                conv.weight = first_conv.weight
        if layer.bias is not None:
            last = _list_convolutions(new)[-1]
            last.bias = folded.setdefault(layer.bias, last).bias
        _move_hooks(layer, new)
    return _replace_modules(model, replacements)


def _list_convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


def check_convertible(conv: nn.Conv2d, name: str) -> None:
    """Raises ValueError, which names the layer, if an analytic layer cannot replace the convolution."""
    if is_lazy(conv.weight) or conv._parameters.get("weight") is None:
        raise ValueError(
            f"cannot convert {name} ({type(conv).__name__}): its weight is either uninitialized (lazy) or "
            "computed from other parameters (as by weight_norm); initialize it or remove the parametrization"
        )
    if conv.bias is not None and conv._parameters.get("bias") is None:
        raise ValueError(f"cannot convert {name}: its bias is parametrized or pruned; make it permanent first")
    if not conv.weight.is_floating_point():
        raise ValueError(f"cannot convert {name}: its weight is {conv.weight.dtype}, not floating-point")
    refuse_patched_forward(conv, f"cannot convert {name}")
    if hasattr(conv, "weight_fake_quant"):
        raise ValueError(f"cannot convert {name}: it is prepared for quantization; convert the model before that")


@torch.no_grad()
def create_analytic(
    conv: nn.Conv2d,
    arrangement: Arrangement | str,
    placement: torch.Tensor | None = None,
    **options: Unpack[LayerKeywords],
) -> AnalyticConv2d:
    """Creates the analytic layer that replaces a convolution; it has its plain kernels and bias, and random AKPs."""
    factory: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    layer = AnalyticConv2d(
        **get_convolution_arguments(conv), **factory, arrangement=arrangement, placement=placement, **options
    )
    if layer.plain is not None:
        layer.plain.copy_(layer.view_slots(conv.weight)[layer.slots_of("P")]).requires_grad_(conv.weight.requires_grad)
    if layer.gains is not None:
        layer.gains.requires_grad_(conv.weight.requires_grad)
    if layer.bias is not None and conv.bias is not None:
        layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
    _, in_channels, _, width = conv.weight.shape
    if conv.weight.stride()[1:] == (1, width * in_channels, in_channels):  # is_contiguous() takes 1 channel for both
        layer.to(memory_format=torch.channels_last)
    return layer.train(conv.training)


def replace_convolutions(model: nn.Module, layers: Mapping[nn.Conv2d, AnalyticConv2d]) -> nn.Module:
    """Replaces convolutions by analytic layers wherever they occur in the model, and returns the new root module.

    An instance of a subclass of nn.Conv2d becomes the layer's host. Hooks are moved to the layer. Raises ValueError as
    ``share_parameters`` does; the model is then unchanged.
    """
    share_parameters(model, layers)
    for conv, layer in layers.items():
        if type(conv) not in (nn.Conv2d, AnalyticConv2d):
            if layer.options.compute == "factored":
                raise ValueError(f"compute='factored' cannot convert a {type(conv).__name__}, a subclass of nn.Conv2d")
            layer.host = conv
            conv.weight = conv.bias = None  # type: ignore[assignment]
        _move_hooks(conv, layer)
    return _replace_modules(model, layers)


def share_parameters(model: nn.Module, layers: Mapping[nn.Conv2d, AnalyticConv2d]) -> None:
    """Lets new layers share their parameters if the convolutions that they replace share their weight or bias.

    Raises:
        ValueError: if a convolution shares its weight or bias with a module that is not replaced likewise.
    """
    holders: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((module, key, f"{name}.{key}"))
    for shared in holders.values():
        modules, keys, names = zip(*shared, strict=True)
        new: list[Any] = [layers.get(module) for module in modules]
        if not any(new) or len(new) == 1:
            continue
        structures = {layer and (layer.arrangement, *layer.slot_kinds) for layer in new}
        if len(set(keys)) > 1 or None in new or (keys[0] == "weight" and len(structures) > 1):
            raise ValueError(f"{' and '.join(names)} are one parameter; convert all of them alike, or none")
        for layer in new[1:]:
            if keys[0] == "weight":
                layer.raw, layer.plain, layer.gains = new[0].raw, new[0].plain, new[0].gains
            else:
                setattr(layer, keys[0], getattr(new[0], keys[0]))


def _match_layers(pattern: str, convolutions: Mapping[str, nn.Conv2d], model: nn.Module) -> list[str]:
    """The convolutions that a name, glob pattern or rule matches; a layer's name takes precedence over a rule."""
    names = [pattern] if pattern in convolutions else [name for name in convolutions if fnmatchcase(name, pattern)]
    if not names and pattern == "first":
        names = list(convolutions)[:1]
        first_analytic = next(iter(analytic_layers(model)), None)
        order = [name for name, _ in model.named_modules()]
        if first_analytic is not None and (not names or order.index(first_analytic) < order.index(names[0])):
            raise ValueError(
                f"the first convolution, {first_analytic or 'the model itself'}, is already analytic; "
                "acl.fold makes it plain again"
            )
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
    known = ", ".join(f"{name} ({' x '.join(map(str, conv.kernel_size))})" for name, conv in convolutions.items())
    raise ValueError(f"no convolution is named '{pattern}'; the model has: {known or 'none'}; rules: first, all, k>=n")


def _to_analytic(
    conv: nn.Conv2d,
    name: str,
    arrangement: Arrangement,
    init: str | None,
    tolerance: float | None,
    metric: str | torch.Tensor,
    options: LayerOptions,
) -> AnalyticConv2d:
    """Creates the analytic layer that replaces a convolution, with its AKPs sampled or fitted; errors name it."""

    def fit_outputs(kinds: list[list[str]] | None = None) -> Fit:
        size, dilation = ((pair[0], pair[1]) for pair in (conv.kernel_size, conv.dilation))
        return fit_kernels(
            conv.weight,
            kinds,
            options.family,
            per=options.per,
            metric=Metric.create(metric, conv.weight.shape[1], size, dilation),
            profile=options.profile,
            signed=options.per == "kernel" and not options.amplitude,
            refine=not arrangement.auto,  # only once the kinds are chosen
        )

    if arrangement.auto:
        assert tolerance is not None
        fit = refine_jointly(fit_outputs().choose(tolerance, conv.weight), conv.weight)
        auto_arrangement, placement = Arrangement.from_slot_kinds([kernel.kind for kernel in fit.kernels])
        layer = create_analytic(conv, auto_arrangement, placement, **vars(options))
    else:
        layer = create_analytic(conv, arrangement, **vars(options))
        if zero := _find_zero_kinds(layer):
            size = " x ".join(map(str, layer.kernel_size))
            raise ValueError(
                f"cannot convert {name}: its {size} kernels of {' and '.join(zero)} would be 0; leave them plain, or "
                "convert only larger kernels, as the rule k>=3 does"
            )
        if init != "fit":
            if _has_constant_kernels(layer):
                raise ValueError(
                    f"cannot convert {name}: whatever their AKPs, its 1 x 1 kernels would be a constant or its "
                    "negative; leave them plain, or use amplitude=True"
                )
            return layer
        kinds = [[symbol] if KINDS[symbol].is_analytic else [] for symbol in layer.slot_kinds]
        fit = fit_outputs(kinds)
        for slot, kernel in enumerate(fit.kernels):
            if kernel.r2 is None and any(kernel.weights):
                raise ValueError(
                    f"cannot fit {name}: the kernel of slot {slot} is constant, as all 1 x 1 kernels are; "
                    "leave the layer plain, or use arrangement='auto' or init='random'"
                )
    if init != "random":
        apply_fits(layer, fit.kernels)
    return layer


def _find_zero_kinds(layer: AnalyticConv2d) -> list[str]:
    """The kinds of a layer whose kernels are 0, because all of its pixels have the same distance to the center."""
    if max(layer.kernel_size) > 2 or layer._format.is_meta:
        return []
    return [symbol for symbol in layer.akps() if layer.compute_shapes(symbol).abs().max() < 1e-6]


def _has_constant_kernels(layer: AnalyticConv2d) -> bool:
    """Whether analytic kernels of a layer have a single pixel, of which normalization leaves the sign."""
    has_gains = layer.gains is not None or layer.options.amplitude
    return layer.kernel_size == (1, 1) and layer.options.scale == "unit" and not has_gains and bool(layer.akps())


def _replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> nn.Module:
    """Replaces modules wherever they occur in the model, and returns the new root module."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements and name:
            model.set_submodule(name, replacements[module])
    return replacements.get(model, model)


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the forward and backward hooks of a module to another, and leaves the source without hooks."""
    unhooked = nn.Module()
    for attribute in _HOOK_ATTRIBUTES:  # move the dictionaries themselves, so that existing handles work
        setattr(target, attribute, getattr(source, attribute))
        setattr(source, attribute, getattr(unhooked, attribute))
