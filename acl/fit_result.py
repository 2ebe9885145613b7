"""The result of a fit: KernelFit and Fit, their JSON, and how a layer takes them over."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from acl.arrangement import Arrangement
from acl.kernels import FAMILIES, KINDS, PROFILES, Family, Profile, analytic_kinds
from acl.layer import AnalyticConv2d


@dataclass(frozen=True)
class KernelFit:
    """One 2-D kernel, approximated by a formula or kept plain."""

    kind: str
    """The symbol of the kind; ``P`` for a kernel that is kept plain."""
    akps: Mapping[str, float]
    """The AKPs by name, in natural units (px, rad)."""
    gain: float
    """The kernel is this factor times the formula in ``acl.kernels``, before any scaling."""
    r2: float | None
    """The fraction of the kernel's energy that the fit explains; None for a zero or constant kernel (no fit)."""
    weights: tuple[float, ...] = ()
    """The weights of a plain kernel, row by row; empty for an analytic kernel."""


@dataclass(frozen=True)
class Fit:
    """The fits of a layer's kernels, slot by slot (row-major over output channel, input channel of the group)."""

    shape: tuple[int, int, int, int]
    """(out, in / groups, kh, kw) of the target."""
    family: Family
    profile: Profile
    energies: tuple[float, ...]
    """The sum of squares of each target kernel."""
    kernels: tuple[KernelFit, ...]
    """The selected fit of each target kernel: the best one, until ``choose`` selects another."""
    by_kind: Mapping[str, tuple[KernelFit, ...]]
    """For each kind that was tried, its best fit to each target kernel."""

    @property
    def r2(self) -> float | None:
        """The energy-weighted R^2 over all kernels that have a fit; None if there are none."""
        pairs = [(k.r2 * e, e) for k, e in zip(self.kernels, self.energies, strict=True) if k.r2 is not None]
        return sum(explained for explained, _ in pairs) / sum(energy for _, energy in pairs) if pairs else None

    @property
    def num_parameters(self) -> int:
        """The number of values that define the kernels: AKPs and gain of analytic ones, weights of plain ones."""
        return sum(len(k.weights) or len(k.akps) + 1 for k in self.kernels)

    @property
    def degenerate_slots(self) -> list[int]:
        """The slots of zero and constant kernels, which stay plain."""
        return [i for i, kernel in enumerate(self.kernels) if kernel.r2 is None]

    def choose(self, tolerance: float, target: Tensor) -> "Fit":
        """Chooses for each slot the kind with the fewest AKPs that fits its kernel within ``tolerance``.

        A slot stays plain if no kind does, or none with fewer AKPs (plus a gain) than the kernel has weights. A larger
        tolerance never gives more parameters or a higher R^2.

        Args:
            tolerance: 0 to 1; a kind qualifies if 1 - R^2 is at most this.
            target: the weight that was fitted; plain slots copy their kernels from it.
        """
        check_tolerance(tolerance)
        kernels = []
        for slot, (best, kernel) in enumerate(zip(self.kernels, target.detach().flatten(0, 1), strict=True)):
            candidates = [fits[slot] for fits in self.by_kind.values()]
            qualified = [
                fit
                for fit in candidates
                if fit.r2 is not None and 1 - fit.r2 <= tolerance and len(fit.akps) + 1 < kernel.numel()
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
        """Creates an AnalyticConv2d with these kernels and their gains (``amplitude=True``).

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
            amplitude=True,
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
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Fit":
        """Reads the output of ``to_json``. Raises ValueError for any other text."""
        try:
            values = json.loads(text)
            family, profile = values["family"], values["profile"]
            _require(family in FAMILIES and profile in PROFILES, "unknown family or profile")
            _require(values.keys() == {field.name for field in fields(cls)}, "wrong fields")
            shape = values["shape"]
            _require(len(shape) == 4 and all(type(n) is int and n > 0 for n in shape), "invalid shape")
            by_kind = values["by_kind"]
            _require(by_kind.keys() <= analytic_kinds().keys() and len(by_kind) > 0, "unknown or no kinds")
            fit = cls(
                shape=(shape[0], shape[1], shape[2], shape[3]),
                family=family,
                profile=profile,
                energies=_parse_numbers(values["energies"]),
                kernels=_parse_kernels(values["kernels"], {*by_kind, "P"}, family, shape),
                by_kind={
                    kind: _parse_kernels(entries, {kind, "P"}, family, shape) for kind, entries in by_kind.items()
                },
            )
            _require(len(fit.energies) == shape[0] * shape[1] and min(fit.energies) >= 0, "wrong energies")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a fit in JSON: {error!r}") from error
        return fit


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _parse_numbers(values: Any) -> tuple[float, ...]:
    """Converts a list of finite numbers from JSON."""
    _require(type(values) is list and all(type(value) in (int, float) for value in values), "not a list of numbers")
    numbers = tuple(map(float, values))
    _require(all(map(math.isfinite, numbers)), "a number is not finite")
    return numbers


def _parse_kernels(entries: Any, kinds: set[str], family: str, shape: Sequence[int]) -> tuple[KernelFit, ...]:
    """Converts the fits of all slots from JSON; each is of one of the kinds."""
    _require(type(entries) is list and len(entries) == shape[0] * shape[1], "not one fit per slot")
    return tuple(_parse_kernel(entry, kinds, family, shape[2] * shape[3]) for entry in entries)


def _parse_kernel(entry: Any, kinds: set[str], family: str, pixels: int) -> KernelFit:
    _require(entry.keys() == {field.name for field in fields(KernelFit)}, "wrong fields of a kernel")
    symbol, r2 = entry["kind"], entry["r2"]
    _require(symbol in kinds, f"kind {symbol!r} is not one of {', '.join(sorted(kinds))}")
    kind = KINDS[symbol]
    floors = {akp.name: -math.inf if akp.floor is None else akp.floor for akp in kind.akps(family)}
    _require(entry["akps"].keys() == floors.keys(), f"wrong AKPs of {symbol}")
    akps = dict(zip(entry["akps"], _parse_numbers([*entry["akps"].values()]), strict=True))
    _require(all(akps[name] > floor for name, floor in floors.items()), f"an AKP of {symbol} is out of range")
    weights = _parse_numbers(entry["weights"])
    _require(len(weights) == (0 if kind.is_analytic else pixels), f"wrong number of weights of {symbol}")
    _require(r2 is not None or not kind.is_analytic, f"no R^2 of {symbol}")
    (gain,) = _parse_numbers([entry["gain"]])
    if r2 is not None:
        (r2,) = _parse_numbers([r2])
        _require(0 <= r2 <= 1, f"R^2 of {symbol} is not between 0 and 1")
    return KernelFit(symbol, akps, gain, r2, weights)


def make_plain_fit(kernel: Tensor, r2: float | None) -> KernelFit:
    """Keeps a kernel (kh, kw) plain."""
    return KernelFit("P", {}, 1.0, r2, tuple(kernel.flatten().tolist()))


def check_tolerance(tolerance: float | None) -> None:
    """Raises ValueError unless the tolerance of ``auto`` is a number from 0 to 1."""
    if tolerance is None or not 0 <= tolerance <= 1:
        raise ValueError(
            f"arrangement 'auto' needs a tolerance from 0 (all plain) to 1 (all analytic), got {tolerance}"
        )


@torch.no_grad()
def apply_fits(layer: AnalyticConv2d, fits: Sequence[KernelFit]) -> None:
    """Sets a layer's AKPs, and its gains if it has ``amplitude``, from the fits, one per slot.

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
        if layer.options.amplitude:
            gains = torch.tensor([fit.gain for fit in kind_fits], dtype=torch.float64)
            kernels = layer.compute_kernels(symbol, akps)
            amplitudes = torch.zeros(len(slots), dtype=torch.float64)
            amplitudes[fitted_indices] = gains / layer.scale_factors(kernels).flatten()
            layer.set_akps(symbol, {"amplitude": amplitudes})
