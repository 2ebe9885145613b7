"""Fits formulas to given kernels: finds the kind, the AKPs and the gain with the smallest squared error."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from acl.arrangement import Arrangement
from acl.kernels import FAMILIES, KINDS, PROFILES, Kind, analytic_kinds
from acl.layer import AnalyticConv2d

_POOL_SIZE = 8192  # random kernels of each kind, compared with every target to find starting points
_STARTS = 16  # starting points per target: the nearest kernels of the pool
_STEPS = 300
_LEARNING_RATE = 0.4
_PIXELS_PER_BATCH = 2**22


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
    family: str
    profile: str
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

        If no kind does, the slot stays plain. A larger tolerance never gives more parameters or a higher R^2.

        Args:
            tolerance: 0 to 1; a kind qualifies if 1 - R^2 is at most this.
            target: the weight that was fitted; plain slots copy their kernels from it.
        """
        check_tolerance(tolerance)
        kernels = []
        for slot, (best, kernel) in enumerate(zip(self.kernels, target.detach().flatten(0, 1), strict=True)):
            candidates = [fits[slot] for fits in self.by_kind.values()]
            qualified = [fit for fit in candidates if fit.r2 is not None and 1 - fit.r2 <= tolerance]
            if best.r2 is None:
                kernels.append(best)
            elif qualified:
                kernels.append(min(qualified, key=lambda fit: (len(fit.akps), -(fit.r2 or 0))))
            else:
                kernels.append(_make_plain_fit(kernel, 1.0))
        return replace(self, kernels=tuple(kernels))

    def weight(self) -> Tensor:
        """Synthesizes the fitted weight, (out, in / groups, kh, kw) float32."""
        return self.to_layer().weight.detach()

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

        def parse_kernels(entries: Any) -> tuple[KernelFit, ...]:
            return tuple(KernelFit(**{**entry, "weights": tuple(entry["weights"])}) for entry in entries)

        try:
            values = json.loads(text)
            return cls(
                shape=tuple(values["shape"]),
                family=values["family"],
                profile=values["profile"],
                energies=tuple(values["energies"]),
                kernels=parse_kernels(values["kernels"]),
                by_kind={kind: parse_kernels(entries) for kind, entries in values["by_kind"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a fit in JSON: {error!r}") from error


def fit_kernels(
    weight: Tensor,
    kinds: Iterable[str] | None = None,
    family: str = "paper",
    *,
    profile: str = "exponential",
    fixed: Mapping[str, float] | None = None,
    signed: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Finds the kind, AKPs and gain with the smallest squared error for each 2-D kernel.

    The gain is linear and therefore eliminated (variable projection): the fit maximizes the squared cosine similarity
    of target and formula. Each target is compared with many random kernels of a kind. Adam with a decaying learning
    rate refines the nearest ones, for many targets in one batch. The same seed gives the same fit.

    Args:
        weight: (out, in / groups, kh, kw).
        kinds: symbols of the kinds to try, such as ``["G", "Ts"]``; all analytic kinds by default.
        family: ``paper``, or ``extended`` with center offsets and Gabor's aspect ratio.
        profile: the TGD kernel function.
        fixed: AKPs of the extended family to hold constant, such as ``{"gamma": 1.0}``.
        signed: allow only positive gains, as in layers without ``amplitude``.
        seed: seeds the random kernels.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: for a weight that is not 4-D or not finite, or an unknown kind, family or profile.

    Example:
        >>> fit = fit_kernels(torch.randn(4, 1, 5, 5), kinds=["G"], progress=False)
        >>> fit.kernels[0].kind, list(fit.kernels[0].akps)
        ('G', ['theta', 'wavelength', 'psi', 'sigma'])
    """
    known_kinds = analytic_kinds()
    symbols = list(known_kinds) if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    for symbol in symbols:
        if symbol not in known_kinds:
            raise ValueError(f"no analytic kind '{symbol}'; known: {', '.join(known_kinds)}")
    for option, value, known in (("family", family, FAMILIES), ("profile", profile, PROFILES)):
        if value not in known:
            raise ValueError(f"unknown {option} '{value}'; known: {', '.join(known)}")
    if weight.ndim != 4:
        raise ValueError(f"the weight must have 4 dimensions (out, in / groups, kh, kw), got {tuple(weight.shape)}")
    target = weight.detach().flatten(0, 1).to("cpu", torch.float32)
    if non_finite := (~target.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        out_channel, in_channel = divmod(non_finite[0], weight.shape[1])
        raise ValueError(
            f"the weight has non-finite values in {len(non_finite)} of {len(target)} kernels; "
            f"the first is weight[{out_channel}, {in_channel}]"
        )
    flat = target.flatten(1).double()
    energies = flat.square().sum(1)
    varies = (flat.amax(1) - flat.amin(1)) > 1e-6 * flat.abs().amax(1)
    slots = varies.nonzero().flatten()
    slots_per_batch = max(1, _PIXELS_PER_BATCH // (_STARTS * flat.shape[1]))
    degenerate = [_make_plain_fit(kernel, None) for kernel in target]
    size = (weight.shape[2], weight.shape[3])
    by_kind: dict[str, tuple[KernelFit, ...]] = {}
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        tqdm(desc="fitting", total=len(symbols) * len(slots), unit="kernel", disable=None if progress else True) as bar,
    ):
        for symbol in symbols:
            torch.manual_seed(seed)
            search = _KindSearch(known_kinds[symbol], size, family, profile, fixed or {}, signed)
            fits = list(degenerate)
            for batch in slots.split(slots_per_batch):
                for slot, fit in zip(batch.tolist(), search.fit(target[batch].flatten(1)), strict=True):
                    fits[slot] = fit
                bar.update(len(batch))
            by_kind[symbol] = tuple(fits)
    best = tuple(
        max(fits, key=lambda fit: -1.0 if fit.r2 is None else fit.r2) for fits in zip(*by_kind.values(), strict=True)
    )
    return Fit((weight.shape[0], weight.shape[1], *size), family, profile, tuple(energies.tolist()), best, by_kind)


class _KindSearch:
    """Searches for the AKPs and gain of one kind of kernel that fit each target best."""

    def __init__(
        self, kind: Kind, size: tuple[int, int], family: str, profile: str, fixed: Mapping[str, float], signed: bool
    ) -> None:
        self.kind, self.size, self.profile, self.signed = kind, size, profile, signed
        akps = kind.akps(family)
        self.free_akps = [akp for akp in akps if akp.name not in fixed]
        self.fixed = {akp.name: torch.tensor(float(fixed[akp.name])) for akp in akps if akp.name in fixed}
        self.pool = torch.stack([akp.to_raw(akp.sample(_POOL_SIZE, size)) for akp in self.free_akps])  # (akps, pool)

    def synthesize(self, raw: Tensor) -> Tensor:
        """Raw AKPs (akps, ...) -> kernels (..., pixels)."""
        akps = {akp.name: akp.to_natural(row) for akp, row in zip(self.free_akps, raw, strict=True)}
        akps |= {name: value.to(raw.dtype).expand(raw.shape[1:]) for name, value in self.fixed.items()}
        return self.kind.synthesize(akps, self.size, self.profile).flatten(-2)

    def score(self, kernels: Tensor, target: Tensor) -> Tensor:
        """The squared cosine similarity over pixels, the last dimension; negative for a negative gain if ``signed``."""
        dot = (kernels * target).sum(-1)
        cosine = dot * torch.rsqrt(kernels.square().sum(-1) + 1e-20)
        return cosine * cosine.abs() if self.signed else cosine.square()

    def fit(self, target: Tensor) -> list[KernelFit]:
        """Finds the best fit to each target, (targets, pixels)."""
        unit = target / target.norm(dim=1, keepdim=True)
        with torch.no_grad():
            pool = self.synthesize(self.pool)
            cosines = unit @ (pool / pool.norm(dim=1, keepdim=True).clamp(min=1e-10)).T
            nearest = (cosines if self.signed else cosines.abs()).topk(min(_STARTS, _POOL_SIZE), dim=1).indices.T
        raw = self.pool[:, nearest].clone().requires_grad_()  # (akps, starts, targets)
        optimizer = torch.optim.Adam([raw], lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            (-self.score(self.synthesize(raw), unit).sum()).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            raw = raw.detach()
            scores = self.score(self.synthesize(raw), unit)
            best_start = scores.argmax(0).expand(len(raw), 1, -1)
            chosen = raw.gather(1, best_start)[:, 0].double()
            kernels = self.synthesize(chosen)
            dot, energy = (kernels * target).sum(1), kernels.square().sum(1)
            gains = dot / energy.clamp(min=1e-20)
            r2 = (dot.square() / (energy.clamp(min=1e-20) * target.double().square().sum(1))).clamp(max=1)
            if self.signed:
                gains, r2 = gains.clamp(min=0), torch.where(dot > 0, r2, torch.zeros_like(r2))
        akp_values = {
            akp.name: _wrap_angle(akp.to_natural(row)) if akp.unit == "rad" else akp.to_natural(row)
            for akp, row in zip(self.free_akps, chosen, strict=True)
        }
        akp_values |= {name: value.expand(len(target)) for name, value in self.fixed.items()}
        ordered = [akp.name for akp in self.kind.akps("extended") if akp.name in akp_values]
        columns = {name: akp_values[name].tolist() for name in ordered}
        return [
            KernelFit(self.kind.symbol, {name: column[i] for name, column in columns.items()}, gain, kernel_r2)
            for i, (gain, kernel_r2) in enumerate(zip(gains.tolist(), r2.tolist(), strict=True))
        ]


def _wrap_angle(values: Tensor) -> Tensor:
    """Maps angles to [0, 2 pi)."""
    return values.remainder(2 * math.pi)


def _make_plain_fit(kernel: Tensor, r2: float | None) -> KernelFit:
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
            for akp in KINDS[symbol].akps(layer.family)
        }
        layer.set_akps(symbol, akps, fitted_indices)
        if layer.amplitude:
            gains = torch.tensor([fit.gain for fit in kind_fits], dtype=torch.float64)
            kernels = KINDS[symbol].synthesize(akps, layer.kernel_size, layer.profile)
            amplitudes = torch.zeros(len(slots), dtype=torch.float64)
            amplitudes[fitted_indices] = gains / layer.scale_factors(kernels).flatten()
            layer.set_akps(symbol, {"amplitude": amplitudes})
