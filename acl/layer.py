"""AnalyticConv2d: a convolution whose weight is a mosaic of analytic and plain kernels."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from acl.arrangement import Arrangement
from acl.computed_conv import COMPUTED_WEIGHT
from acl.factored import convolve_factored, fold_factored, is_factored
from acl.kernels import AKP, AMPLITUDE, KINDS
from acl.options import LayerKeywords, LayerOptions
from acl.slots import SlottedConv2d


class AnalyticConv2d(SlottedConv2d):
    """An nn.Conv2d whose weight is synthesized from an arrangement of analytic convolution kernels (ACKs).

    The weight has one slot per 2-D kernel. The arrangement fills the slots in order, row-major over (output channel,
    input channel of the group). Each analytic kernel is computed from a few learned parameters (AKPs); each plain
    kernel (``P``) has k x k free weights.

    With ``per="filter"``, a slot is an output channel. The kernels of an analytic filter have one shape, computed from
    its AKPs, and a gain per input channel of the group: W[o, i] = gains[o, i] K(AKPs[o]). A plain filter has all its
    weights. Without plain filters, the layer is a 1 x 1 convolution, then a depthwise one, and can be computed as such.

    Source: Cui et al., arXiv 2407.06087. The options and ``placement`` are ours.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in nn.Conv2d.
        arrangement: text such as ``G30 Lg15 Lt15 Tf30 Ts6 P96`` or ``G50% P50%``, or an ``Arrangement``.
        placement: (slots,) int64, for each slot the index of its kernel in the arrangement's order; in order if None.
        options: the fields of ``acl.LayerOptions``.

    Shape:
        Input (N, in_channels, H, W) or (in_channels, H, W); output as for nn.Conv2d.

    Raises:
        ValueError: for an arrangement that cannot be parsed or does not fill the layer, an unknown option, or
            arguments that nn.Conv2d rejects.
        TypeError: for an unknown option, or without an arrangement that is text or an ``Arrangement``.

    AKPs are evaluated in at least float32; the result is cast to the layer's dtype. ``acl.computed_conv`` decides when
    the weight is cached.

    ``weight`` is computed, so an in-place edit of it (``nn.init.zeros_(layer.weight)``, ``layer.weight.data.clamp_()``)
    edits a temporary tensor and has no effect on the layer. Use ``set_akps``, ``plain``, ``gains``, ``sample_akps`` or
    ``reset_parameters`` instead.

    ``placement`` is structure, like the arrangement: averages, casts and ``load_state_dict`` do not change it. The
    state dict holds it as ``placement_bits``, (slots, bits) bool, to refuse the state of another placement.

    Example:
        >>> layer = AnalyticConv2d(3, 64, 7, stride=2, padding=3, arrangement="G30 Lg15 Lt15 Tf30 Ts6 P96", bias=False)
        >>> layer.weight.shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([64, 3, 7, 7]), 4962)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        arrangement: Arrangement | str | None = None,
        placement: Tensor | None = None,
        **options: Unpack[LayerKeywords],
    ) -> None:
        if arrangement is None:  # as for PEFT's LoRA, which creates convolutions of the type of a layer
            raise TypeError(f"AnalyticConv2d needs an arrangement, such as 'G50% P50%'; {COMPUTED_WEIGHT}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **factory
        )
        self.options = LayerOptions.from_keywords(options)
        self._fill_slots(Arrangement.coerce(arrangement), placement)
        self.raw = nn.ParameterDict(
            {
                f"{symbol}_{akp.name}": nn.Parameter(torch.empty(count, **factory))
                for symbol, count in self.arrangement.counts.items()
                for akp in self._get_akps(symbol)
            }
        )
        plain_count = self.arrangement.counts.get("P", 0)
        if plain_count and self.options.compute == "factored":
            raise ValueError("compute='factored' needs analytic filters only; plain filters have no common shape")
        gain_count = len(self.slot_kinds) - plain_count if self.options.per == "filter" else 0
        channels = in_channels // groups
        plain_shape = self.kernel_size if self.options.per == "kernel" else (channels, *self.kernel_size)
        self.plain = nn.Parameter(torch.empty(plain_count, *plain_shape, **factory)) if plain_count else None
        self.gains = nn.Parameter(torch.empty(gain_count, channels, **factory)) if gain_count else None
        for key, parameter in self.raw.items():
            parameter.requires_grad_(key.split("_", 1)[1] in self.options.learned_akps)
        self.reset_parameters()

    def _get_akps(self, symbol: str) -> tuple[AKP, ...]:
        return KINDS[symbol].akps(self.options.family, self.options.amplitude)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Samples the AKPs from their initial ranges, and plain kernels and bias as nn.Conv2d does.

        The gains of filters are uniform, of variance 1 / (in_channels / groups * kh * kw): with ``scale="unit"``, an
        input of unit variance then has outputs of about unit variance.
        """
        if "raw" not in self._modules:
            return  # nn.Conv2d's constructor calls this before the AKPs exist
        self.sample_akps()
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for parameter in (self.plain, self.bias):
            if parameter is not None:
                parameter.uniform_(-bound, bound)
        if self.gains is not None:
            bound = math.sqrt(3 / max(1, fan_in))
            self.gains.uniform_(-bound, bound)

    @torch.no_grad()
    def sample_akps(self) -> None:
        """Samples the AKPs from their initial ranges."""
        for symbol, count in self.arrangement.counts.items():
            for akp in self._get_akps(symbol):
                values = akp.to_raw(akp.sample(count, self.kernel_size))
                self._get_stored(f"{symbol}_{akp.name}").copy_(values)

    def _get_stored(self, key: str) -> nn.Parameter:
        """The parameter of a stored AKP. Raises ValueError if it is parametrized, since it is then computed."""
        if (parameter := self.raw._parameters.get(key)) is None:
            raise ValueError(f"{key} is parametrized and cannot be set; remove its parametrization first")
        return parameter

    def akps(self) -> dict[str, dict[str, Tensor]]:
        """The AKPs in natural units (px, rad), by kind and name, each (count,) in slot order; differentiable."""
        dtype = torch.promote_types(self._format.dtype, torch.float32)
        return {
            symbol: {
                akp.name: akp.to_natural(self.raw[f"{symbol}_{akp.name}"].to(dtype)) for akp in self._get_akps(symbol)
            }
            for symbol in self.arrangement.counts
            if KINDS[symbol].is_analytic
        }

    @torch.no_grad()
    def set_akps(self, symbol: str, akps: Mapping[str, Tensor], index: Tensor | slice = slice(None)) -> None:
        """Sets AKPs of one kind from values in natural units (px, rad).

        Args:
            symbol: the symbol of the kind.
            akps: AKP name -> values, of the shape that ``index`` selects.
            index: which of the kind's kernels to set; all by default.

        Raises:
            ValueError: for an AKP that the layer does not have or that is parametrized, values of another shape, or a
                value that is not finite or at or below an AKP's floor. The layer is then unchanged.
        """
        known = {f"{symbol}_{akp.name}": akp for akp in self._get_akps(symbol)} if symbol in self.akps() else {}
        if unknown := [name for name in akps if f"{symbol}_{name}" not in known]:
            raise ValueError(f"the layer has no AKP {symbol}_{unknown[0]}; it has: {', '.join(self.raw)}")
        raw = {key: akp.to_raw(akps[akp.name]) for key, akp in known.items() if akp.name in akps}
        for key, values in raw.items():
            if values.shape != (shape := self._get_stored(key)[index].shape):
                raise ValueError(f"{key} needs values of the shape {tuple(shape)}, got {tuple(values.shape)}")
            if not (is_finite := values.to(self.raw[key].dtype).isfinite()).all():
                value, dtype = values[~is_finite][0].item(), self.raw[key].dtype
                raise ValueError(f"{key} needs finite values of {dtype}, got {value}")
        for key, values in raw.items():
            self.raw[key][index] = values.to(self.raw[key])

    @torch.no_grad()
    def add_amplitude(self) -> None:
        """Gives each ACK a gain of 1 as an additional AKP, unless the layer has gains already.

        The gains of a kind are trained if any of its AKPs are.
        """
        if self.options.amplitude or self.options.per == "filter":
            return
        stored = {key: self._get_stored(key) for key in self.raw}
        self.options = replace(self.options, amplitude=True)
        for symbol in self.arrangement.counts:
            akps = [parameter for key, parameter in stored.items() if key.startswith(f"{symbol}_")]
            if akps:
                is_trained = any(parameter.requires_grad for parameter in akps)
                stored[f"{symbol}_{AMPLITUDE.name}"] = nn.Parameter(torch.ones_like(akps[0]), is_trained)
        keys = [f"{symbol}_{akp.name}" for symbol in self.arrangement.counts for akp in self._get_akps(symbol)]
        self.raw = nn.ParameterDict({key: stored[key] for key in keys})

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters from which the weight is synthesized: stored AKPs, plain kernels, gains of filters."""
        return [*self.raw.values(), *(p for p in (self.plain, self.gains) if p is not None)]

    def compute_kernels(self, symbol: str, akps: Mapping[str, Tensor]) -> Tensor:
        """Kernels (..., kh, kw) of a kind, from AKPs (...) in natural units, before scaling and gain."""
        return KINDS[symbol].synthesize(akps, self.kernel_size, self.options.profile)

    def compute_shapes(self, symbol: str) -> Tensor:
        """The scaled kernels (count, kh, kw) of an analytic kind without their gains, in float64."""
        akps = {name: values.double() for name, values in self.akps()[symbol].items() if name != AMPLITUDE.name}
        kernels = self.compute_kernels(symbol, akps)
        return kernels * self.scale_factors(kernels)

    def gains_of(self, symbol: str) -> Tensor:
        """The gains (count, channels) of an analytic kind: of filters for each input channel, of kernels for one."""
        if self.gains is not None:
            return self.gains[self.gain_rows(symbol)]
        akps = self.akps()[symbol]
        return akps.get(AMPLITUDE.name, torch.ones_like(next(iter(akps.values()))))[:, None]

    @torch.no_grad()
    def set_gains(self, symbol: str, gains: Tensor) -> None:
        """Sets the gains (count, channels) of an analytic kind.

        Raises:
            ValueError: for kernels without gains, gains of another shape, or parametrized gains.
        """
        shape = tuple(self.gains_of(symbol).shape)
        if tuple(gains.shape) != shape:
            raise ValueError(f"the gains of {symbol} have the shape {tuple(gains.shape)} instead of {shape}")
        if self.gains is not None:
            if "gains" not in self._parameters:
                raise ValueError("gains is parametrized and cannot be set; remove its parametrization first")
            self.gains[self.gain_rows(symbol)] = gains.to(self.gains)
        else:
            self.set_akps(symbol, {AMPLITUDE.name: gains[:, 0]})

    def scale_factors(self, kernels: Tensor) -> Tensor:
        """The factors (count, 1, 1) by which ``scale`` multiplies analytic kernels (count, kh, kw)."""
        if self.options.scale == "raw":
            return kernels.new_ones(len(kernels), 1, 1)
        return self._compute_unit_scale(kernels, (-2, -1))

    def _compute_unit_scale(self, kernels: Tensor, pixel_dims: tuple[int, int]) -> Tensor:
        if self.options.per == "filter":  # gains then have the scale of weights
            return torch.rsqrt((kernels * kernels).mean(pixel_dims, keepdim=True) + 1e-12)
        fan_in = self.in_channels // self.groups
        return torch.rsqrt((kernels * kernels).sum(pixel_dims, keepdim=True) * fan_in + 1e-12)

    def _synthesize_analytic(self) -> Tensor | None:
        """The scaled analytic kernels in the arrangement's order, pixels first: (kh, kw, count); None if none."""
        akps = self.akps()
        gains = [values.pop("amplitude") for values in akps.values()] if self.options.amplitude else []
        kernels = [self.compute_kernels(symbol, values) for symbol, values in akps.items()]
        # Kernels are views of tensors with the pixels first (see acl.kernels._Grid), and stay so until the end.
        kernels = [kernel.permute(1, 2, 0) for kernel in kernels]
        if not kernels:
            return None
        weight = torch.cat(kernels, -1) if len(kernels) > 1 else kernels[0]
        factors = [self._compute_unit_scale(weight, (0, 1))] if self.options.scale == "unit" else []
        if gains:
            factors.append(torch.cat(gains))
        return weight * reduce(torch.mul, factors) if factors else weight

    def _synthesize(self) -> Tensor:
        weight = self._synthesize_analytic()  # pixels first, as all that follows
        if weight is not None and self.gains is not None:
            weight = weight[..., None] * self.gains
        weight = None if weight is None else weight.to(self._format.dtype)
        if self.plain is not None:
            plain = self.plain.movedim((-2, -1), (0, 1))
            start = self.arrangement.kernel_ranges["P"].start
            weight = plain if weight is None else torch.cat([weight[:, :, :start], plain, weight[:, :, start:]], 2)
        assert weight is not None
        if self.placement is not None:
            # Much faster than weight[:, :, self.placement], above all in the backward pass.
            weight = weight.flatten(0, 1).index_select(1, self.placement.to(weight.device))
        weight = weight.reshape(*self.kernel_size, self.out_channels, -1).permute(2, 3, 0, 1)
        # torch.func.vmap supports no query of the memory format itself
        is_channels_last = self._format.stride(1) == 1
        return weight.clone(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)

    def _synthesize_shapes(self) -> Tensor:
        """The shapes of filters as the weight of a depthwise convolution, (out, 1, kh, kw)."""
        shapes = self._synthesize_analytic()
        assert shapes is not None
        if self.placement is not None:
            shapes = shapes.flatten(0, 1).index_select(1, self.placement.to(shapes.device)).view_as(shapes)
        return shapes.permute(2, 0, 1)[:, None].to(self._format.dtype).contiguous()

    def _forward(self, x: Tensor) -> Tensor:
        if not is_factored(self, x.device):
            return super()._forward(x)
        return convolve_factored(self, x, self._read_cache_or_compute(self._synthesize_shapes))

    def fold(self, factored: bool = False) -> nn.Conv2d | nn.Sequential:  # type: ignore[override]
        """Creates an nn.Conv2d with the same weight, bias, device, dtype, memory format and training mode.

        Its weight is frozen if everything that it is computed from is.

        Args:
            factored: create a 1 x 1 convolution and a depthwise one instead, which need fewer operations.

        Raises:
            ValueError: for ``factored`` and a layer that is not a filter mosaic without plain filters, or that was
                converted from a subclass of nn.Conv2d.
        """
        return fold_factored(self, self._synthesize_shapes) if factored else super().fold()

    def _get_sources(self) -> tuple[Sequence[Tensor | None], Hashable]:
        # raw.values() is several times slower. Parametrized and replicated AKPs are not among the parameters of raw.
        raw: list[Any] = list(self.raw._parameters.values())
        raw += [None] * (len(self.raw) - len(raw))
        return [*raw, *(p for p in (self.plain, self.gains) if p is not None)], self.options

    @torch.no_grad()
    def formula(self, slot: int, digits: int = 3) -> str:
        """Formats a slot's kernel as text, with the values of its gain and its AKPs.

        Args:
            slot: row-major over (output channel, input channel of the group); in a filter mosaic, the output channel.
            digits: significant digits of each number.

        Returns:
            For example, ``0.21*(exp(-(x'^2 + y'^2)/(2*1.83^2))*cos(2*pi*x'/4.1 + 0.5)); theta = 30 deg``; see
            ``acl.kernels.Kind.formula`` for the notation. For a plain kernel, ``7 x 7 free weights``. A filter has the
            list of its gains, or their range if there are more than four.

        Raises:
            IndexError: for a slot that the layer does not have.
        """
        symbol = self.get_kind_of_slot(slot)
        kind = KINDS[symbol]
        if not kind.is_analytic:
            assert self.plain is not None
            return f"{' x '.join(map(str, self.plain.shape[1:]))} free weights"
        i = self.slots_of(symbol).index(slot)
        akps = {name: values[i : i + 1] for name, values in self.akps()[symbol].items()}
        akps.pop(AMPLITUDE.name, None)
        gains = (self.gains_of(symbol)[i] * self.scale_factors(self.compute_kernels(symbol, akps)).flatten()).tolist()
        numbers = [f"{gain:.{digits}g}" for gain in (gains if len(gains) <= 4 else (min(gains), max(gains)))]
        text = kind.formula({name: value.item() for name, value in akps.items()}, self.options.profile, digits)
        expression, separator, definitions = text.partition("; ")
        if self.gains is None:
            return f"{numbers[0]}*({expression}){separator}{definitions}"
        gain_text = f"[{', '.join(numbers)}]" if len(gains) <= 4 else f"{len(gains)} gains from {' to '.join(numbers)}"
        return f"g*({expression}){separator}{definitions}; g = {gain_text}"

    def extra_repr(self) -> str:
        default = LayerOptions()
        options = [f"{k}={v!r}" for k, v in vars(self.options).items() if k != "learn" and v != getattr(default, k)]
        return ", ".join([super().extra_repr(), f"arrangement='{self.arrangement}'", *options])
