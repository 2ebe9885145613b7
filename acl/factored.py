"""Filter mosaics computed as a 1 x 1 convolution with the gains, then a depthwise convolution with the shapes."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acl.computed_conv import get_convolution_arguments
from acl.slots import SlottedConv2d

_MIN_CHANNELS = 32
"""From this many input channels on, two convolutions were faster on a CPU, with channels_last, in every case of
results/benchmarks/factored.md."""


def can_be_factored(layer: SlottedConv2d) -> bool:
    """Whether a layer is a filter mosaic without plain filters, and not converted from a subclass of nn.Conv2d."""
    return layer.gains is not None and layer.plain is None and layer.host is None


def is_factored(layer: SlottedConv2d, device: torch.device) -> bool:
    """Whether a layer computes its outputs on a device as two convolutions."""
    if not can_be_factored(layer) or layer.options.compute == "dense":
        return False
    return layer.options.compute == "factored" or (
        device.type == "cpu"
        and layer.in_channels // layer.groups >= _MIN_CHANNELS
        and math.prod(layer.stride) == 1
        and min(layer.kernel_size) > 1
    )


def get_pointwise_weight(layer: SlottedConv2d) -> Tensor:
    """The gains of a layer as the weight of a 1 x 1 convolution, (out, in / groups, 1, 1)."""
    assert layer.gains is not None
    gains = layer.gains if layer.placement is None else layer.gains[layer.placement.to(layer.gains.device)]
    return gains[:, :, None, None]


def convolve_factored(layer: SlottedConv2d, x: Tensor, shapes: Tensor) -> Tensor:
    """The output of a layer with the shapes (out, 1, kh, kw)."""
    hidden = F.conv2d(x, get_pointwise_weight(layer), groups=layer.groups)
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        hidden, padding = F.pad(hidden, layer._reversed_padding_repeated_twice, layer.padding_mode), 0
    return convolve_depthwise(hidden, shapes, layer.bias, layer.stride, padding, layer.dilation)


def convolve_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """A depthwise convolution in float32, or in float64, also under autocast: in 16 bits, its backward pass is slow.

    Args and result as for ``torch.nn.functional.conv2d``, with the weight (channels, 1, kh, kw) and the dtype of ``x``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    is_available = torch.amp.is_autocast_available(x.device.type)  # not on the device "meta"
    with torch.autocast(x.device.type, enabled=False) if is_available else nullcontext():
        output = F.conv2d(x.to(dtype), weight.to(dtype), bias, stride, padding, dilation, len(weight))
    return output.to(x.dtype)


def fold_factored(layer: SlottedConv2d, synthesize_shapes: Callable[[], Tensor]) -> nn.Sequential:
    """Creates the two convolutions of a layer. Raises ValueError unless it can be factored."""
    if not can_be_factored(layer):
        raise ValueError("only a filter mosaic without plain filters can be factored, and no subclass of nn.Conv2d")
    assert layer.gains is not None
    pointwise = nn.Conv2d(layer.in_channels, layer.out_channels, 1, groups=layer.groups, bias=False, device="meta")
    arguments = get_convolution_arguments(layer) | {"in_channels": layer.out_channels, "groups": layer.out_channels}
    depthwise = nn.Conv2d(**arguments, device="meta")
    pointwise.weight = nn.Parameter(get_pointwise_weight(layer).detach().clone(), layer.gains.requires_grad)
    depthwise.weight = nn.Parameter(synthesize_shapes().detach(), any(p.requires_grad for p in layer.raw.parameters()))
    if layer.bias is not None:
        depthwise.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    is_channels_last = layer._format.stride(1) == 1
    folded = nn.Sequential(pointwise, depthwise).train(layer.training)
    return folded.to(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)
