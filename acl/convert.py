"""Makes an analytic network (AnaNN) of any network: chosen convolutions become analytic ones."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from acl.arrangement import Arrangement
from acl.layer import AnalyticConv2d


def convert(
    model: nn.Module,
    layers: str | Iterable[str] | Mapping[str, Arrangement | str],
    arrangement: Arrangement | str | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces convolutions of a model, in place, by analytic ones.

    Plain kernels and biases come from the slots they replace; AKPs are drawn at random, as in the paper. Device,
    dtype, memory format and train mode are kept.

    Args:
        model: any network.
        layers: names as in ``model.named_modules()``, or globs of them; or a mapping from such to an arrangement each.
        arrangement: the one for all of ``layers``, where these are no mapping.
        options: ``scale``, ``amplitude``, ``family``, ``profile`` and ``learn`` of AnalyticConv2d.

    Returns:
        The model.

    Raises:
        ValueError: a name that matches no convolution (lists those there are), or what AnalyticConv2d refuses; the
            model is then as it was.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> convert(net, {"0": "G50% P50%"})[0].arrangement.counts
        {'G': 12, 'P': 12}
    """
    if isinstance(layers, Mapping):
        wanted = dict(layers)
    else:
        if arrangement is None:
            raise ValueError("convert needs an arrangement, as in 'G50% P50%', where layers is no mapping to one each")
        wanted = dict.fromkeys([layers] if isinstance(layers, str) else layers, arrangement)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    replacements: dict[str, AnalyticConv2d] = {}
    for pattern, given in wanted.items():
        names = [name for name in convolutions if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"no convolution is named '{pattern}'; there are: {', '.join(convolutions)}")
        for name in names:
            conv = convolutions[name]
            parsed = Arrangement.parse(given) if isinstance(given, str) else given
            filled = parsed.fill(conv.in_channels // conv.groups, conv.out_channels, name)
            replacements[name] = _analytic(conv, filled, options)
    for name, layer in replacements.items():
        model.set_submodule(name, layer)
    return model


@torch.no_grad()
def _analytic(conv: nn.Conv2d, arrangement: Arrangement, options: dict[str, Any]) -> AnalyticConv2d:
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
        **options,
    )
    slot = 0
    for symbol, count in arrangement.counts.items():
        if symbol == "P" and layer.plain is not None:
            layer.plain.copy_(conv.weight.flatten(0, 1)[slot : slot + count])
        slot += count
    if layer.bias is not None and conv.bias is not None:
        layer.bias.copy_(conv.bias)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        layer.to(memory_format=torch.channels_last)
    return layer.train(conv.training)
