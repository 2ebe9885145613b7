"""AnalyticConv2d: a convolution whose weight is a mosaic of analytic and plain kernels."""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from acl.arrangement import Arrangement
from acl.kernels import AKP, FAMILIES, KINDS, PROFILES

SCALES = ("unit", "raw")


class AnalyticConv2d(nn.Module):
    """nn.Conv2d with a weight synthesised from an arrangement of analytic convolution kernels (ACKs).

    The weight's 2-D kernels ("slots") are filled in the arrangement's order, row-major over (out channel, in channel
    of the group). Each analytic one is drawn from a few learned parameters (AKPs), each plain one (``P``) is k x k
    free weights. Source: Cui et al., arXiv 2407.06087; ``scale``, ``amplitude``, ``family`` and ``learn`` are ours.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in nn.Conv2d.
        arrangement: text as in ``G30 Lg15 Lt15 Tf30 Ts6 P96`` or ``G50% P50%``, or an ``Arrangement``.
        scale: ``unit`` divides each ACK by its L2 norm and by sqrt(in_channels / groups), so that unit variance in
            gives about unit variance out; ``raw`` leaves the formula as it stands.
        amplitude: one more AKP per ACK, its gain.
        family: ``paper``, or ``extended``: a centre offset for every ACK and an aspect ratio for Gabor.
        profile: the TGD kernel function: ``exponential``, ``gaussian`` or ``linear``.
        learn: which AKPs learn: ``"all"``, ``"none"``, or their names, as in ``("theta", "sigma")``.
        placement: for each slot, which of the kernels in the arrangement's order is in it, (slots,); None: in order.

    Shape:
        Input (N, in_channels, H, W) or (in_channels, H, W), output as nn.Conv2d's.

    Raises:
        ValueError: an arrangement that cannot be read or does not fill the layer, an unknown option, or what
            nn.Conv2d refuses.

    The weight is synthesised once per forward in training, and in eval once until a parameter changes. Angles and
    widths are computed in float32 at least, then cast to the layer's dtype.

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
        arrangement: Arrangement | str,
        scale: str = "unit",
        amplitude: bool = False,
        family: str = "paper",
        profile: str = "exponential",
        learn: str | Iterable[str] = "all",
        placement: Tensor | None = None,
    ) -> None:
        super().__init__()
        # nn.Conv2d checks and normalises the arguments they share, at no cost on the meta device.
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta"
        )
        _check("scale", scale, SCALES)
        _check("family", family, FAMILIES)
        _check("profile", profile, PROFILES)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = _pair(kernel_size)
        self.stride: tuple[int, int] = _pair(stride)
        self.padding: str | tuple[int, int] = padding if isinstance(padding, str) else _pair(padding)
        self.dilation: tuple[int, int] = _pair(dilation)
        self.groups = groups
        self.padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = padding_mode
        self.scale = scale
        self.amplitude = amplitude
        self.family = family
        self.profile = profile
        if isinstance(arrangement, str):
            arrangement = Arrangement.parse(arrangement)
        self.arrangement = arrangement.fill(in_channels // groups, out_channels)
        self._edges: list[int] = conv._reversed_padding_repeated_twice

        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.raw = nn.ParameterDict(
            {
                f"{symbol}_{akp.name}": nn.Parameter(torch.empty(count, **kwargs))
                for symbol, count in self.arrangement.counts.items()
                for akp in self._akps_of(symbol)
            }
        )
        """The AKPs as they are held, named ``<symbol>_<akp>``; ``akps()`` gives them in natural units."""
        plain = self.arrangement.counts.get("P", 0)
        self.plain = nn.Parameter(torch.empty(plain, *self.kernel_size, **kwargs)) if plain else None
        """The plain kernels in slot order, (count, kh, kw); None where there are none."""
        self.bias = nn.Parameter(torch.empty(out_channels, **kwargs)) if bias else None
        self.placement: Tensor | None
        if placement is not None and sorted(placement.tolist()) != list(range(in_channels // groups * out_channels)):
            raise ValueError(f"placement is no permutation of the layer's {in_channels // groups * out_channels} slots")
        self.register_buffer("placement", None if placement is None else placement.to(device))
        # Module.to() gives every 4-D tensor its memory format: this one tells which format the weight is to have.
        self._format: Tensor
        self.register_buffer("_format", torch.zeros(1, 2, 2, 2, **kwargs), persistent=False)
        self.host: nn.Conv2d | None = None
        """The convolution that this layer replaced and convolves as, where that is of a subclass of nn.Conv2d."""
        self._cache: tuple[tuple[Any, ...], list[Tensor], Tensor] | None = None
        self._freeze(learn)
        self.reset_parameters()

    def _akps_of(self, symbol: str) -> tuple[AKP, ...]:
        return KINDS[symbol].parameters(self.family, self.amplitude)

    def _freeze(self, learn: str | Iterable[str]) -> None:
        names = {name.split("_", 1)[1] for name in self.raw}
        known = {akp.name for kind in KINDS.values() for akp in kind.parameters("extended", True)}
        learning = {"all": names, "none": set()}.get(learn, {learn}) if isinstance(learn, str) else set(learn)
        if unknown := learning - known:
            raise ValueError(f"unknown AKP '{min(unknown)}' in learn; known: all, none, {', '.join(sorted(known))}")
        for name, parameter in self.raw.items():
            parameter.requires_grad_(name.split("_", 1)[1] in learning)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the AKPs over their useful ranges for this kernel size, plain kernels and bias as nn.Conv2d does."""
        for symbol, count in self.arrangement.counts.items():
            for akp in self._akps_of(symbol):
                self.raw[f"{symbol}_{akp.name}"].copy_(akp.raw(akp.draw(count, self.kernel_size)))
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for parameter in (self.plain, self.bias):
            if parameter is not None:
                parameter.uniform_(-bound, bound)

    def akps(self) -> dict[str, dict[str, Tensor]]:
        """The AKPs in natural units (px, rad), per kind and name, each (count,), in slot order; differentiable."""
        dtype = torch.promote_types(self._format.dtype, torch.float32)
        return {
            symbol: {akp.name: akp.natural(self.raw[f"{symbol}_{akp.name}"].to(dtype)) for akp in self._akps_of(symbol)}
            for symbol in self.arrangement.counts
            if KINDS[symbol].function is not None
        }

    @property
    def slot_kinds(self) -> list[str]:
        """The symbol of the kind in each slot, row-major over (out channel, in channel of the group)."""
        kinds = [symbol for symbol, count in self.arrangement.counts.items() for _ in range(count)]
        return kinds if self.placement is None else [kinds[i] for i in self.placement.tolist()]

    def slots_of(self, symbol: str) -> list[int]:
        """The slots of a kind's kernels, in the order of its parameters."""
        counts = self.arrangement.counts
        before = sum(count for other, count in counts.items() if list(counts).index(other) < list(counts).index(symbol))
        slots = list(range(sum(counts.values()))) if self.placement is None else self.placement.argsort().tolist()
        return slots[before : before + counts[symbol]]

    def _sources(self) -> list[Tensor]:
        """The parameters that the weight is made of."""
        return [*self.raw.values(), *([] if self.plain is None else [self.plain])]

    def _synthesise(self) -> Tensor:
        tiles, gains = [], []
        for symbol, akps in self.akps().items():
            kind = KINDS[symbol]
            assert kind.function is not None
            if self.amplitude:
                gains.append(akps.pop("amplitude"))
            options = {"profile": self.profile} if kind.profiled else {}
            tiles.append(kind.function(**akps, size=self.kernel_size, **options))
        if tiles:
            weight = torch.cat(tiles)
            if self.scale == "unit":
                energy = weight.square().sum((-2, -1), keepdim=True) * (self.in_channels // self.groups)
                weight = weight * torch.rsqrt(energy + 1e-12)
            if gains:
                weight = weight * torch.cat(gains)[:, None, None]
            weight = weight.to(self._format.dtype)
            if self.plain is not None:
                counts = self.arrangement.counts
                before = sum(list(counts.values())[: list(counts).index("P")])
                weight = torch.cat([weight[:before], self.plain, weight[before:]])
        else:
            assert self.plain is not None
            weight = self.plain
        if self.placement is not None:
            weight = weight[self.placement]
        weight = weight.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        if self._format.is_contiguous(memory_format=torch.channels_last):
            # clone, not contiguous(): that leaves a weight with one in channel as it is, and the convolution slow.
            weight = weight.clone(memory_format=torch.channels_last)
        return weight

    @property
    def weight(self) -> Tensor:
        """(out_channels, in_channels / groups, kh, kw): the mosaic, differentiable in every AKP and plain kernel."""
        parameters = self._sources()
        cached = not (self.training or torch.compiler.is_compiling() or self._format.is_meta)
        # Tensors in the place of parameters (functional_call, torch.func, fake and distributed ones) are not compared.
        if not (cached and all(type(p) is nn.Parameter for p in parameters)):
            return self._synthesise()
        # Compared by value: an in-place edit through .data leaves no other trace, and a stale weight is a wrong answer.
        key = (self._format.device, self._format.dtype, self._format.stride(), self.scale, self.profile)
        held = parameters if self.placement is None else [*parameters, self.placement]
        hit = self._cache
        if hit is None or hit[0] != key or not all(map(torch.equal, hit[1], held)):
            with torch.inference_mode(False), torch.no_grad():
                hit = (key, [tensor.detach().clone() for tensor in held], self._synthesise())
            self._cache = hit
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return _Synthesised.apply(hit[2], self, *parameters)
        return hit[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight)

    def convolve(self, x: Tensor, weight: Tensor, bias: bool = True) -> Tensor:
        """What the layer would answer with another weight of its shape, with or without its bias."""
        own = self.bias if bias else None
        if self.host is not None:
            return functional_call(
                self.host, {"weight": weight} if own is None else {"weight": weight, "bias": own}, (x,)
            )
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._edges, mode=self.padding_mode), (0, 0)
        return F.conv2d(x, weight, own, self.stride, padding, self.dilation, self.groups)

    def fold(self) -> nn.Conv2d:
        """An nn.Conv2d with the same weight, bias, device, dtype, memory format and mode, free of acl."""
        if self.host is not None:
            conv = copy.deepcopy(self.host)
        else:
            conv = nn.Conv2d(
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                self.bias is not None,
                self.padding_mode,
                "meta",
            )
        conv.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv.train(self.training)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts.append(f"arrangement='{self.arrangement}'")
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        defaults |= {"scale": "unit", "amplitude": False, "family": "paper", "profile": "exponential"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}


class _Synthesised(torch.autograd.Function):
    """Gives a cached weight, and synthesises it anew only when a gradient is asked of it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: AnalyticConv2d, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*parameters)
        return weight.detach()  # a view would forget the strides of a single channel

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if a parameter was changed in place since, as autograd does for any layer
        parameters = ctx.layer._sources()
        wanted = [p for p in parameters if p.requires_grad]
        with torch.enable_grad():
            weight = ctx.layer._synthesise()
        grads = iter(torch.autograd.grad(weight, wanted, grad, allow_unused=True))
        return None, None, *(next(grads) if p.requires_grad else None for p in parameters)


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {option} '{value}'; known: {', '.join(known)}")


def akp_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The AKPs of every analytic layer in a model, as held: they want a learning rate of their own.

    Example:
        >>> layer = AnalyticConv2d(1, 6, 5, arrangement="G6")
        >>> [p.numel() for p in akp_parameters(layer)]
        [6, 6, 6, 6]
    """
    for module in model.modules():
        if isinstance(module, AnalyticConv2d):
            yield from module.raw.values()
