"""The result of a fit: KernelFit and Fit, their JSON, and how a layer takes them over."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from acl.arrangement import Arrangement
from acl.kernels import KINDS, Family, Profile
from acl.layer import AnalyticConv2d
from acl.metric import Metric
from acl.options import Per


@dataclass(frozen=True)
class KernelFit:
    """One 2-D kernel, or one filter, approximated by a formula or kept plain."""

    kind: str
    """The symbol of the kind; ``P`` for a kernel that is kept plain."""
    akps: Mapping[str, float]
    """The AKPs by name, in natural units (px, rad)."""
    gains: tuple[float, ...]
    """The kernel, or a filter's kernel of each input channel, is its gain times the formula in ``acl.kernels``, before
    any scaling; empty for a plain one."""
    r2: float | None
    """The share of the kernel's energy, in the metric of the fit, that it explains on its own; None for a zero or
    constant kernel (no fit)."""
    weights: tuple[float, ...] = ()
    """The weights of a plain kernel or filter, row by row; empty for an analytic one."""


@dataclass(frozen=True)
class Fit:
    """The fits of a layer's kernels, slot by slot (see ``acl.Arrangement``)."""

    shape: tuple[int, int, int, int]
    """(out, in / groups, kh, kw) of the target."""
    per: Per
    family: Family
    profile: Profile
    metric: Metric
    fixed: Mapping[str, float]
    """The AKPs that were held constant."""
    signed: bool
    """Whether only positive gains were allowed."""
    energies: tuple[float, ...] = ()
    """The energy of each target kernel in the metric."""
    kernels: tuple[KernelFit, ...] = ()
    """The selected fit of each target kernel: the best one, until ``choose`` selects another."""
    by_kind: Mapping[str, tuple[KernelFit, ...]] = field(default_factory=dict)
    """For each kind that was tried, its best fit to each target kernel alone."""

    @property
    def r2(self) -> float | None:
        """The energy-weighted R^2 over all kernels that have a fit, each on its own; None if there are none.

        ``acl.output_error`` also counts that errors of a filter's kernels can add up or cancel.
        """
        pairs = [(k.r2 * e, e) for k, e in zip(self.kernels, self.energies, strict=True) if k.r2 is not None]
        return sum(explained for explained, _ in pairs) / sum(energy for _, energy in pairs) if pairs else None

    @property
    def num_parameters(self) -> int:
        """The number of values that define the kernels: AKPs and gains of analytic ones, weights of plain ones."""
        return sum(len(k.weights) + len(k.akps) + len(k.gains) for k in self.kernels)

    @property
    def degenerate_slots(self) -> list[int]:
        """The slots of zero and constant kernels, which stay plain."""
        return [i for i, kernel in enumerate(self.kernels) if kernel.r2 is None]

    def compute_energies(self, weight: Tensor) -> Tensor:
        """The energy of the output of each slot's kernels alone in the metric of the fit, (slots,) float64."""
        if self.per == "filter":
            return self.metric.energies(weight)
        flat = weight.double().flatten(2)
        return ((flat @ self.metric.pixels * flat).sum(2) * self.metric.channels.diagonal()).flatten()

    def choose(self, tolerance: float, target: Tensor) -> "Fit":
        """Chooses for each slot the kind with the fewest AKPs that fits its kernel alone within ``tolerance``.

        A slot stays plain if no kind does, or none with fewer AKPs and gains than the kernel has weights. A larger
        tolerance never gives more parameters or a higher R^2. ``acl.refine_jointly`` can improve the result.

        Args:
            tolerance: 0 to 1; a kind qualifies if 1 - R^2, a share of the output's energy in the metric of the fit, is
                at most this.
            target: the weight that was fitted; plain slots copy their kernels from it.
        """
        check_tolerance(tolerance)
        kernels = []
        slots = target.detach().flatten(0, 1) if self.per == "kernel" else target.detach()
        for slot, (best, kernel) in enumerate(zip(self.kernels, slots, strict=True)):
            candidates = [fits[slot] for fits in self.by_kind.values()]
            qualified = [
                fit
                for fit in candidates
                if fit.r2 is not None and 1 - fit.r2 <= tolerance and len(fit.akps) + len(fit.gains) < kernel.numel()
            ]
            if best.r2 is None:
                kernels.append(best)
            elif qualified:
                kernels.append(min(qualified, key=lambda fit: (len(fit.akps), -(fit.r2 or 0))))
            else:
                kernels.append(make_plain_fit(kernel, 1.0))
        return replace(self, kernels=tuple(kernels))

    def weight(self) -> Tensor:
        """Synthesizes the fitted weight, (out, in / groups, kh, kw) float32."""
        return self.to_layer(dtype=torch.float32).weight.detach()

    def to_layer(self, *, groups: int = 1, **options: Any) -> AnalyticConv2d:
        """Creates an AnalyticConv2d with these kernels and their gains.

        Args:
            groups: as in nn.Conv2d; the layer has ``groups * shape[1]`` input channels.
            options: further arguments of AnalyticConv2d, such as stride and padding; ``bias`` defaults to False.
        """
        out_channels, in_channels, *size = self.shape
        arrangement, placement = Arrangement.from_slot_kinds([kernel.kind for kernel in self.kernels])
        layer = AnalyticConv2d(
            in_channels * groups,
            out_channels,
            (size[0], size[1]),
            groups=groups,
            arrangement=arrangement,
            placement=placement,
            per=self.per,
            amplitude=self.per == "kernel",
            family=self.family,
            profile=self.profile,
            **{"bias": False, **options},
        )
        apply_fits(layer, self.kernels)
        if layer.plain is not None:
            weights = torch.tensor([self.kernels[slot].weights for slot in layer.slots_of("P")])
            layer.plain.data.copy_(weights.view_as(layer.plain))
        return layer

    def to_json(self) -> str:
        """Serializes the fit, for ``from_json`` to read."""
        values = {item.name: getattr(self, item.name) for item in fields(self)} | {"metric": self.metric.to_json()}
        return json.dumps(values, default=asdict)

    @classmethod
    def from_json(cls, text: str) -> "Fit":
        """Reads the output of ``to_json``. Raises ValueError for any other text."""
        try:
            values = json.loads(text)
            by_kind = {symbol: _to_kernel_fits(entries) for symbol, entries in values.pop("by_kind").items()}
            kernels, (a, b, c, d) = _to_kernel_fits(values.pop("kernels")), values.pop("shape")
            metric, energies = Metric.from_json(values.pop("metric"), b, (c, d)), tuple(values.pop("energies"))
            fit = cls((a, b, c, d), metric=metric, energies=energies, kernels=kernels, by_kind=by_kind, **values)
            for name, fixed in fit.fixed.items():
                parse_fixed_akp(name, fixed, fit.by_kind, fit.family)
            if type(fit.signed) is not bool or (fit.signed and fit.per == "filter"):
                raise ValueError(f"signed={fit.signed}")
            for kernels in (fit.kernels, *fit.by_kind.values()):
                weight = replace(fit, kernels=kernels).weight()  # raises ValueError for what no layer can have
                for value in (fit.r2, *fit.energies, weight.sum().item()):
                    if not math.isfinite(value or 0.0):
                        raise ValueError("a number is not finite")
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"not a fit in JSON: {' '.join(repr(error).split())}") from error
        return fit


def _to_kernel_fits(entries: list[dict[str, Any]]) -> tuple[KernelFit, ...]:
    return tuple(KernelFit(**entry | {key: tuple(entry[key]) for key in ("gains", "weights")}) for entry in entries)


def parse_fixed_akp(name: str, value: float, symbols: Iterable[str], family: str) -> float:
    """The value of a fixed AKP as a number. Raises ValueError unless it is valid in all kinds that have the AKP."""
    akps = [akp for symbol in symbols for akp in KINDS[symbol].akps(family)]
    matching = [akp for akp in akps if akp.name == name]
    if not matching:
        raise ValueError(f"no AKP '{name}' to fix; known: {', '.join(dict.fromkeys(akp.name for akp in akps))}")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the fixed {name} must be a number, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"the fixed {name} must be finite, got {value}")
    for akp in matching:
        akp.to_raw(torch.tensor(number, dtype=torch.float64, device="cpu"))
    return number


def make_plain_fit(kernel: Tensor, r2: float | None) -> KernelFit:
    """Keeps a kernel, or a filter, plain."""
    return KernelFit("P", {}, (), r2, tuple(kernel.flatten().tolist()))


def check_tolerance(tolerance: float | None) -> None:
    """Raises ValueError unless the tolerance of ``auto`` is a number from 0 to 1."""
    if tolerance is None or not 0 <= tolerance <= 1:
        raise ValueError(
            f"arrangement 'auto' needs a tolerance from 0 (all plain) to 1 (all analytic), got {tolerance}"
        )


@torch.no_grad()
def apply_fits(layer: AnalyticConv2d, fits: Sequence[KernelFit]) -> None:
    """Sets a layer's AKPs, and its gains if it has some, from the fits, one per slot.

    A slot whose target was zero or constant keeps its AKPs; its gain, if any, is set to 0.
    """
    for symbol in layer.akps():
        slots = layer.slots_of(symbol)
        fitted_indices = torch.tensor(
            [i for i, slot in enumerate(slots) if fits[slot].r2 is not None], dtype=torch.long
        )
        kind_fits = [fits[slots[i]] for i in fitted_indices.tolist()]
        akps = {
            akp.name: torch.tensor([fit.akps[akp.name] for fit in kind_fits], dtype=torch.float64)
            for akp in KINDS[symbol].akps(layer.options.family)
        }
        layer.set_akps(symbol, akps, fitted_indices)
        if layer.options.amplitude or layer.gains is not None:
            num_channels = 1 if layer.gains is None else layer.gains.shape[1]
            factors = layer.scale_factors(layer.compute_kernels(symbol, akps)).flatten(1)
            gains = torch.zeros(len(slots), num_channels, dtype=torch.float64)
            fitted_gains = torch.tensor([fit.gains for fit in kind_fits], dtype=torch.float64)
            gains[fitted_indices] = fitted_gains.view(-1, num_channels) / factors
            layer.set_gains(symbol, gains)
