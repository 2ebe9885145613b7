"""Moves trained analytic layers to other angles and scales of images, by changing the AKPs of their formulas."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from acl.convert import replace_convolutions
from acl.inspection import find_plain_convolutions, require_analytic_layers
from acl.kernels import AKP, AMPLITUDE, KINDS, LENGTH_ROLES, Kind
from acl.layer import AnalyticConv2d

_MAX_ERROR = 0.02
"""The share of the energy of reduced kernels that formulas may miss."""


class UnsuitableFormulasError(ValueError):
    """The formulas of a layer are too fine for the pixels of smaller images."""


@torch.no_grad()
def rotate(model: nn.Module, degrees: float) -> nn.Module:
    """Rotates the kernels of all analytic layers in place, counterclockwise about their window's center.

    The outputs of a layer on a rotated image are then the rotated outputs on the image, except near the borders and for
    what the pixel grid loses. AKPs with the role of a direction or a center turn exactly; plain kernels are resampled
    with bicubic interpolation. A window keeps its size. What layers share is turned once. Plain convolutions keep their
    direction, with a warning.

    With ``scale="unit"``, kernels keep the factors that normalized them, since the norm of a formula on the pixel grid
    depends on its angle. Layers whose factors would change get ``amplitude`` for this.

    Args:
        model: a network, or an analytic layer itself.
        degrees: counterclockwise, as the image is displayed.

    Returns:
        The model.

    Raises:
        ValueError: for a network without analytic layers, a layer whose dilation or stride differs between height and
            width, so that kernels, or those of later layers, are distorted in the image, a kind of kernel that has a
            direction but no AKP with that role, parametrized or pruned kernels, layers that share only some of the AKPs
            that turn or that need other gains then, or an angle that is not finite. The model is then unchanged.
    """
    if not math.isfinite(degrees):
        raise ValueError(f"degrees must be finite, got {degrees}")
    layers = require_analytic_layers(model)
    turned: dict[nn.Parameter, Tensor] = {}  # every parameter that turns -> its new value
    # The factors that kernels without gains need, by kind, of the AKPs of each layer, which layers can share
    gains: dict[nn.ParameterDict, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        where = name or "the layer"
        if layer.dilation[0] != layer.dilation[1]:
            raise ValueError(f"cannot rotate {where}: its dilation {layer.dilation} distorts its kernels")
        if layer.stride[0] != layer.stride[1]:
            raise ValueError(f"cannot rotate {where}: its stride {layer.stride} distorts its outputs")
        _check_stored(layer, f"cannot rotate {where}")
        for symbol, akps in layer.akps().items():
            kind = KINDS[symbol]
            new = _turn_akps(kind, akps, math.radians(degrees))
            if not any(akp.role == "direction" for akp in kind.akps()) and not _is_isotropic(
                kind, layer.options.profile
            ):
                raise ValueError(f"cannot rotate {where}: {kind.name} has a direction, but no AKP with that role")
            ratios = _compare_scale_factors(layer, symbol, akps, new)
            if layer.gains is not None:
                rows = layer.gain_rows(symbol)
                turned.setdefault(layer.gains, layer.gains.clone())[rows] = layer.gains[rows] * ratios[:, None]
            elif layer.options.amplitude:
                new["amplitude"] = akps["amplitude"] * ratios
            elif not torch.allclose(gains.setdefault(layer.raw, {}).setdefault(symbol, ratios), ratios):
                raise ValueError(f"cannot rotate {where}: it shares its AKPs with a layer that needs other gains")
            for key, values in new.items():
                parameter = layer.raw[f"{symbol}_{key}"]
                if not torch.allclose(turned.setdefault(parameter, values), values):
                    raise ValueError(f"cannot rotate {where}: it shares {symbol}_{key}, but not all AKPs that turn")
        if layer.plain is not None:
            turned[layer.plain] = _turn_kernels(layer.plain, math.radians(degrees))
    for parameter, values in turned.items():
        parameter.copy_(values)  # AKPs that turn have no floor, so they are stored in natural units
    new_raw: dict[nn.ParameterDict, nn.ParameterDict] = {}  # by the old one
    for layer in layers.values():
        old_raw, ratios_by_kind = layer.raw, gains.get(layer.raw, {})
        if all(torch.allclose(ratios, torch.ones_like(ratios), rtol=1e-6) for ratios in ratios_by_kind.values()):
            continue
        layer.add_amplitude()
        layer.raw = new_raw.setdefault(old_raw, layer.raw)
        for symbol, ratios in ratios_by_kind.items():
            layer.set_akps(symbol, {"amplitude": ratios})
    _warn_of_plain_convolutions(model, "rotated")
    return model


def _check_stored(layer: AnalyticConv2d, problem: str) -> None:
    """Raises ValueError with the message ``problem: ...`` if kernels are computed from other parameters."""
    is_pruned = any(getattr(layer, name) is not None and name not in layer._parameters for name in ("plain", "gains"))
    if is_pruned or parametrize.is_parametrized(layer.raw) or parametrize.is_parametrized(layer):
        raise ValueError(f"{problem}: its kernels are parametrized or pruned; make that permanent first")


def _warn_of_plain_convolutions(model: nn.Module, change: str) -> None:
    names = [name for name, conv in find_plain_convolutions(model).items() if max(conv.kernel_size) > 1]
    if names:
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
        hint = "acl.convert(model, 'all', 'P100%') makes them analytic"
        warnings.warn(f"plain convolutions are not {change}: {where}; {hint}", stacklevel=3)


def _turn_akps(kind: Kind, akps: Mapping[str, Tensor], angle: float) -> dict[str, Tensor]:
    """The new values of the AKPs that change when kernels turn counterclockwise by an angle in rad."""
    names = {akp.role: akp.name for akp in kind.akps("extended") if akp.name in akps}
    turned = {}
    if (direction := names.get("direction")) is not None:
        turned[direction] = akps[direction] - angle  # directions turn from the x axis to the y axis, which points down
    if "center_x" in names:
        x, y = akps[names["center_x"]], akps[names["center_y"]]
        turned[names["center_x"]] = x * math.cos(angle) + y * math.sin(angle)
        turned[names["center_y"]] = y * math.cos(angle) - x * math.sin(angle)
    return turned


def _is_isotropic(kind: Kind, profile: str) -> bool:
    """Whether a typical kernel has one value at all 12 pixels that are 5 px away from its center."""
    akps = {akp.name: torch.tensor(sum(akp.init_range(11)) / 2, dtype=torch.float64) for akp in kind.akps()}
    kernel = kind.synthesize(akps, (11, 11), profile)
    offsets = [(x, y) for x in range(-5, 6) for y in range(-5, 6) if x * x + y * y == 25]
    values = torch.stack([kernel[5 + y, 5 + x] for x, y in offsets])
    return bool((values.amax() - values.amin()) <= 1e-6 * kernel.abs().amax())


def _compare_scale_factors(
    layer: AnalyticConv2d, symbol: str, akps: Mapping[str, Tensor], turned: Mapping[str, Tensor]
) -> Tensor:
    """The scale factors of a layer's kernels of a kind, relative to those after they turn, (count,)."""
    shapes = {name: values for name, values in akps.items() if name != AMPLITUDE.name}
    kernels = [layer.compute_kernels(symbol, values) for values in (shapes, {**shapes, **turned})]
    before, after = (layer.scale_factors(kernel).flatten() for kernel in kernels)
    is_degenerate = torch.stack(kernels).square().sum((2, 3)).amin(0) < 1e-9
    return (before / after).masked_fill(is_degenerate, 1.0)


def _turn_kernels(kernels: Tensor, angle: float) -> Tensor:
    """Rotates kernels (..., kh, kw) counterclockwise by an angle in rad, with bicubic interpolation; 0 outside."""
    kh, kw = kernels.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (kh, kw)), indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    grid = torch.stack([2 * (x * cos - y * sin) / kw, 2 * (y * cos + x * sin) / kh], -1).to(kernels.device)
    planes = kernels.double().reshape(1, -1, kh, kw)
    return F.grid_sample(planes, grid[None], "bicubic", "zeros", align_corners=False).view(kernels.shape)


@torch.no_grad()
def rescale(model: nn.Module, factor: float, multiply_stride: bool = False) -> nn.Module:
    """Replaces all analytic layers by layers for images that are ``factor`` times as large, in closed form.

    The outputs of a layer on an enlarged image are then the enlarged outputs on the image, except near the borders and
    for what the pixel grid loses. AKPs with the role of a length or a center are multiplied by the factor, but stay
    above their floor. Gains keep the size of the outputs, so the new layers have ``amplitude``. Plain kernels are
    resampled with bicubic interpolation, with antialiasing if the factor is below 1.

    Kernel size and padding are chosen so that every window keeps its place in the image, to half a pixel where whole
    numbers cannot do better; the window is at least ``factor`` times as large. A kernel wider than its window is then
    cut off elsewhere; resampling, as of plain kernels, can be more precise.

    Args:
        model: a network, or an analytic layer itself.
        factor: above 0; 2 for images of twice the width and height.
        multiply_stride: multiply the strides too, so that the outputs keep their size (to a pixel, if the factor is
            below 1) and the layers that follow see features of the size that they were trained on.

    Returns:
        The model; if it is an analytic layer itself, the new layer. Without ``multiply_stride``, a warning says which
        plain convolutions keep their scale.

    Raises:
        ValueError: for a network without analytic layers, a factor that is not positive and finite, a stride whose
            multiple is not whole or padding="same" of even windows with ``multiply_stride``, parametrized or pruned
            kernels, layers converted from a subclass of nn.Conv2d, layers that share AKPs or plain kernels, or formulas
            that are too fine for the pixels of a smaller image (``UnsuitableFormulasError``). The model is then
            unchanged.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be positive and finite, got {factor}")
    layers = require_analytic_layers(model)
    owners: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        for parameter in layer.weight_parameters():
            if owners.setdefault(parameter, name) != name:
                raise ValueError(f"cannot rescale {name}: it shares AKPs or plain kernels with {owners[parameter]}")
    rescaled: dict[nn.Conv2d, AnalyticConv2d] = {
        layer: _rescale_layer(layer, name or "the layer", factor, multiply_stride) for name, layer in layers.items()
    }
    if not multiply_stride:
        _warn_of_plain_convolutions(model, "rescaled")
    return replace_convolutions(model, rescaled)


@dataclass(frozen=True)
class RescaledAxis:
    """A rescaled layer's geometry along one axis of the image."""

    kernel_size: int
    stride: int
    padding: int
    shift: float
    """How far the point that must be the window's center is from its center, in taps of the kernel."""


def _rescale_axis(
    kernel_size: int, stride: int, padding: int, dilation: int, factor: float, multiply_stride: bool
) -> RescaledAxis:
    # Output i sees the image around i * stride + center. An enlarged image needs i * new_stride + new_center: with a
    # multiplied stride at the enlarged point, otherwise so that the outputs are an enlarged image of the old ones.
    center = (dilation * (kernel_size - 1) + 1) / 2 - padding
    new_stride = round(stride * factor) if multiply_stride else stride
    new_center = factor * center + (0 if multiply_stride else (1 - factor) * stride / 2)
    smallest = max(1, math.ceil(factor * kernel_size - 1e-9))
    candidates = []
    for size in range(smallest, smallest + stride + 2):
        exact = (dilation * (size - 1) + 1) / 2 - new_center
        new_padding = max(0, math.floor(exact + 0.5))
        parity_changes = (size - kernel_size) % 2 == 1
        candidates.append((round(abs(new_padding - exact), 6), parity_changes, size, new_padding, new_padding - exact))
    _, _, size, new_padding, shift = min(candidates)
    return RescaledAxis(size, new_stride, new_padding, shift / dilation)


def rescale_axes(layer: AnalyticConv2d, factor: float, multiply_stride: bool) -> list[RescaledAxis]:
    """The vertical and the horizontal geometry of a layer that is rescaled as by ``rescale``."""
    paddings = layer._reversed_padding_repeated_twice[2::-2]  # at the top and on the left, in numbers
    return [
        _rescale_axis(*lengths, factor, multiply_stride)
        for lengths in zip(layer.kernel_size, layer.stride, paddings, layer.dilation, strict=True)
    ]


def _rescale_layer(layer: AnalyticConv2d, where: str, factor: float, multiply_stride: bool) -> AnalyticConv2d:
    _check_stored(layer, f"cannot rescale {where}")
    if layer.host is not None:
        raise ValueError(f"{where} was converted from a {type(layer.host).__name__}, whose padding is not known")
    if multiply_stride and any(s * factor != round(s * factor) for s in layer.stride):
        raise ValueError(f"{where} has stride {layer.stride}, and {factor:g} times that is not whole")
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if multiply_stride and (left, top) != (right, bottom):
        raise ValueError(f"{where} has padding='same' and an even window, so its outputs could not keep their size")
    axes = rescale_axes(layer, factor, multiply_stride)
    new = _copy_with_geometry(layer, axes)
    if layer.plain is not None:
        plain = _resample(layer.plain, layer.kernel_size, axes, factor)
        new.plain = nn.Parameter(plain.to(layer.plain), layer.plain.requires_grad)
    missed = total = 0.0
    for symbol in layer.akps():
        shapes = layer.compute_shapes(symbol)
        targets = _resample(shapes, layer.kernel_size, axes, factor)
        for akp in KINDS[symbol].akps(layer.options.family):
            new.set_akps(symbol, {akp.name: _scale_akp(akp, layer.akps()[symbol][akp.name], factor, axes)})
        new_shapes = new.compute_shapes(symbol)
        responses, energies = (new_shapes * targets).sum((1, 2)), new_shapes.square().sum((1, 2))
        if factor >= 1:  # the response to an enlarged copy of the old shape is that of the old shape to itself
            responses, energies = shapes.square().sum((1, 2)), factor**2 * responses
        ratios = torch.where(energies.abs() > 1e-12, responses / energies, 0)
        new.set_gains(symbol, new.gains_of(symbol) * ratios[:, None])
        weights = layer.gains_of(symbol).double().square().sum(1)[:, None, None]
        missed += float((weights * (ratios[:, None, None] * new_shapes - targets).square()).sum())
        total += float((weights * targets.square()).sum())
    if factor < 1 and missed > _MAX_ERROR * total:
        raise UnsuitableFormulasError(
            f"{where}: its formulas are too fine for the pixels of images at {factor:g} times the size and would miss "
            f"{missed / total:.0%} of its kernels' energy; fold the layer, convert it with 'P100%' and rescale that, "
            "which resamples the kernels with antialiasing"
        )
    return new


def _copy_with_geometry(layer: AnalyticConv2d, axes: Sequence[RescaledAxis]) -> AnalyticConv2d:
    """A copy of the layer that has gains, and the kernel size, stride and padding of a rescaled layer."""
    new = copy.deepcopy(layer)
    new.add_amplitude()
    new.kernel_size = (axes[0].kernel_size, axes[1].kernel_size)
    new.stride = (axes[0].stride, axes[1].stride)
    set_padding(new, (axes[0].padding, axes[1].padding))
    return new


def set_padding(layer: nn.Conv2d, padding: tuple[int, int]) -> None:
    """Sets the padding at both sides of the height and of the width, in zeros, reflections and so on."""
    layer.padding = padding
    layer._reversed_padding_repeated_twice = [n for n in reversed(padding) for _ in range(2)]


def _resample(kernels: Tensor, kernel_size: tuple[int, int], axes: Sequence[RescaledAxis], factor: float) -> Tensor:
    """Resamples kernels (..., kh, kw) to the size of a rescaled layer, in float64."""
    rows, columns = (
        _make_resampling(size, axis, factor).to(kernels.device) for size, axis in zip(kernel_size, axes, strict=True)
    )
    return rows @ kernels.double() @ columns.T


def _scale_akp(akp: AKP, values: Tensor, factor: float, axes: Sequence[RescaledAxis]) -> Tensor:
    if akp.role in LENGTH_ROLES:
        values = values * factor
    if akp.role in ("center_x", "center_y"):
        values = values + axes[akp.role == "center_x"].shift
    return values if akp.floor is None else values.clamp(min=akp.floor * 1.001)


def _make_resampling(old_size: int, axis: RescaledAxis, factor: float) -> Tensor:
    """The matrix (new taps, old taps) that resamples a kernel along one axis.

    An enlarged image is interpolated with cubic convolution (Keys, 1981), so a kernel for it must be, too; a reduced
    image is averaged, and so must a kernel: that is the transpose.
    """
    old, new = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (old_size, axis.kernel_size))
    distances = ((new - axis.shift)[:, None] - factor * old).abs() / max(factor, 1.0)
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    return torch.where(distances <= 1, near, torch.where(distances < 2, far, 0)) / max(factor, 1.0)
