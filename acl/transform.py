"""Moves trained analytic layers to other angles and scales of images, by changing the AKPs of their formulas."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acl.convert import replace_convolutions, require_analytic_layers
from acl.kernels import AMPLITUDE, KINDS
from acl.layer import AnalyticConv2d, get_convolution_arguments


@torch.no_grad()
def rotate(model: nn.Module, degrees: float) -> nn.Module:
    """Rotates the kernels of all analytic layers in place, counterclockwise about their window's center.

    The outputs of a layer on a rotated image are then the rotated outputs on the image, except near the borders and for
    what the pixel grid loses. Directions (``theta``) and center offsets (``x0``, ``y0``) of analytic kernels turn
    exactly; plain kernels are resampled with bicubic interpolation. A window keeps its size.

    Args:
        model: a network, or an analytic layer itself.
        degrees: counterclockwise, as the image is displayed.

    Returns:
        The model.

    Raises:
        ValueError: for a network without analytic layers, a layer whose dilation differs between height and width, so
            that its kernels are distorted in the image, or an angle that is not finite.
    """
    if not math.isfinite(degrees):
        raise ValueError(f"degrees must be finite, got {degrees}")
    layers = require_analytic_layers(model)
    for name, layer in layers.items():
        if layer.dilation[0] != layer.dilation[1]:
            raise ValueError(f"cannot rotate {name or 'the layer'}: its dilation {layer.dilation} distorts its kernels")
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    for layer in layers.values():
        for symbol, akps in layer.akps().items():
            turned = {}
            if "theta" in akps:
                turned["theta"] = akps["theta"] - angle  # theta turns from the x axis to the y axis, which points down
            if "x0" in akps:
                x0, y0 = akps["x0"], akps["y0"]
                turned |= {"x0": x0 * cos + y0 * sin, "y0": y0 * cos - x0 * sin}
            layer.set_akps(symbol, turned)
        if layer.plain is not None:
            y, x = _make_coordinates(layer.kernel_size)
            layer.plain.copy_(_resample(layer.plain, x * cos - y * sin, y * cos + x * sin))
    return model


@torch.no_grad()
def rescale(model: nn.Module, factor: float, multiply_stride: bool = False) -> nn.Module:
    """Replaces all analytic layers by layers for images that are ``factor`` times as large, in closed form.

    The outputs of a layer on an enlarged image are then the enlarged outputs on the image, except near the borders and
    for what the pixel grid loses. Every AKP in px is multiplied by the factor, but stays above its floor. Gains keep
    the size of the outputs, so the new layers have ``amplitude``. Plain kernels are resampled with bicubic
    interpolation. The new kernel size has the parity of the old one, and is not below ``factor`` times the old one. A
    kernel wider than its window is then cut off elsewhere; resampling, as of plain kernels, can be more precise.

    Args:
        model: a network, or an analytic layer itself.
        factor: above 0; 2 for images of twice the width and height.
        multiply_stride: multiply the strides too, so that the outputs keep their size and the layers that follow see
            features of the size that they were trained on.

    Returns:
        The model; if it is an analytic layer itself, the new layer.

    Raises:
        ValueError: for a network without analytic layers, a factor that is not positive and finite, a stride
            whose multiple is not whole, or layers converted from a subclass of nn.Conv2d.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be positive and finite, got {factor}")
    layers = require_analytic_layers(model)
    rescaled: dict[nn.Conv2d, AnalyticConv2d] = {
        layer: _rescale_layer(layer, name, factor, multiply_stride) for name, layer in layers.items()
    }
    return replace_convolutions(model, rescaled)


def _rescale_layer(layer: AnalyticConv2d, name: str, factor: float, multiply_stride: bool) -> AnalyticConv2d:
    if layer.host is not None:
        raise ValueError(f"{name} was converted from a {type(layer.host).__name__}, whose padding is not known")
    size = tuple(max(1, k + 2 * math.ceil(k * (factor - 1) / 2 - 1e-9)) for k in layer.kernel_size)
    strides = tuple(s * factor if multiply_stride else float(s) for s in layer.stride)
    if any(s != round(s) for s in strides):
        raise ValueError(f"{name} has stride {layer.stride}, and {factor:g} times that is not whole")
    padding: Any = layer.padding
    if not isinstance(padding, str):
        # A window's center stays on the same point of the image. With a multiplied stride, the first window also
        # starts at the scaled position of the first one.
        ratio = factor if multiply_stride else 1.0
        centers = [
            (d * (k - 1) + 1) / 2 - p for k, d, p in zip(layer.kernel_size, layer.dilation, padding, strict=True)
        ]
        extents = [d * (k - 1) + 1 for k, d in zip(size, layer.dilation, strict=True)]
        padding = tuple(
            max(0, math.floor(extent / 2 - ratio * center + 0.5))
            for extent, center in zip(extents, centers, strict=True)
        )
    geometry = {"kernel_size": size, "stride": tuple(map(round, strides)), "padding": padding}
    new = AnalyticConv2d(
        **get_convolution_arguments(layer) | geometry,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        arrangement=layer.arrangement,
        scale=layer.scale,
        amplitude=True,
        family=layer.family,
        profile=layer.profile,
        placement=layer.placement,
    )
    for symbol, akps in layer.akps().items():
        scaled = {
            akp.name: _scale_above_floor(akps[akp.name], factor if akp.unit == "px" else 1.0, akp.floor)
            for akp in KINDS[symbol].akps(layer.family)
        }
        new.set_akps(symbol, {**scaled, "amplitude": torch.ones_like(next(iter(scaled.values())))})
    y, x = _make_coordinates(new.kernel_size)
    old_kernels, new_kernels = layer.weight.flatten(0, 1), new.weight.flatten(0, 1)
    enlarged = _resample(old_kernels, x / factor, y / factor)
    for symbol in layer.akps():
        slots = layer.slots_of(symbol)
        energies = old_kernels[slots].square().sum((1, 2))
        responses = (new_kernels[slots] * enlarged[slots]).sum((1, 2))
        if factor >= 1:
            # The new kernel's response to an enlarged copy of the old kernel is that of the old kernel to itself.
            gains = torch.where(responses.abs() > 1e-12, energies / responses, 0)
        else:
            # A small window may hold too little of a kernel for that; k(x / f) / f^2 has 1 / f^2 of k's energy.
            new_norms = new_kernels[slots].square().sum((1, 2)).sqrt().clamp(min=1e-12)
            gains = responses.sign() * energies.sqrt() / new_norms / factor
        new.set_akps(symbol, {"amplitude": gains})
    if layer.plain is not None and new.plain is not None:
        new.plain.copy_(enlarged[layer.slots_of("P")] / factor**2)
    if layer.bias is not None and new.bias is not None:
        new.bias.copy_(layer.bias)
    trained = dict(layer.named_parameters())
    for key, parameter in new.named_parameters():
        # A gain that the layer did not have is trained if other AKPs of its kind are.
        kind_prefix = key.removesuffix(AMPLITUDE.name)
        sources = [trained[key]] if key in trained else [p for k, p in trained.items() if k.startswith(kind_prefix)]
        parameter.requires_grad_(any(source.requires_grad for source in sources))
    if layer.weight.is_contiguous(memory_format=torch.channels_last):
        new.to(memory_format=torch.channels_last)
    return new.train(layer.training)


def _scale_above_floor(values: Tensor, factor: float, floor: float | None) -> Tensor:
    return values * factor if floor is None else (values * factor).clamp(min=floor * 1.001)


def _make_coordinates(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The y and x of every pixel relative to the window's center, each (kh, kw), in px."""
    y, x = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size)
    return tuple(torch.meshgrid(y, x, indexing="ij"))  # type: ignore[return-value]


def _resample(kernels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Samples kernels (n, kh, kw) at positions x, y (new_kh, new_kw) in px from their center; 0 outside."""
    kh, kw = kernels.shape[-2:]
    grid = torch.stack([2 * x / kw, 2 * y / kh], -1).to(kernels)
    return F.grid_sample(kernels[None], grid[None], "bicubic", "zeros", align_corners=False)[0]
