"""Fits analytic kernels to given ones: which kind, which AKPs and which gain come nearest."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from acl.arrangement import Arrangement
from acl.kernels import FAMILIES, KINDS, PROFILES, Kind
from acl.layer import AnalyticConv2d

ANALYTIC = tuple(symbol for symbol, kind in KINDS.items() if kind.function is not None)
_POOL = 8192  # random kernels of a kind that all targets are compared with first
_STARTS = 16  # the nearest of them, from which each target's fit sets out
_STEPS = 300
_RATE = 0.4
_AT_ONCE = 2**22  # pixels of kernels that are refined together


@dataclass(frozen=True)
class KernelFit:
    """One 2-D kernel as a formula, or as it was."""

    kind: str
    """Its symbol; ``P`` for a kernel that is kept as it was."""
    akps: Mapping[str, float]
    """Natural units (px, rad)."""
    gain: float
    """The kernel is gain times the formula of ``acl.kernels``, before any scaling."""
    r2: float | None
    """Share of the kernel's energy that the fit has; None for a zero or constant kernel, which has nothing to fit."""
    weights: tuple[float, ...] = ()
    """Of a plain kernel, row by row."""


@dataclass(frozen=True)
class Fit:
    """A layer's kernels as formulas, slot by slot (row-major over out channel, in channel of the group)."""

    shape: tuple[int, int, int, int]
    family: str
    profile: str
    energies: tuple[float, ...]
    """Sum of squares of each target kernel."""
    kernels: tuple[KernelFit, ...]
    """The best fit of each."""
    by_kind: Mapping[str, tuple[KernelFit, ...]]
    """The best fit of each with every kind that was tried."""

    @property
    def r2(self) -> float | None:
        """Energy-weighted R^2 of the kernels that have one; None where none has."""
        pairs = [(k.r2 * e, e) for k, e in zip(self.kernels, self.energies, strict=True) if k.r2 is not None]
        return sum(a for a, _ in pairs) / sum(e for _, e in pairs) if pairs else None

    @property
    def numbers(self) -> int:
        """How many numbers the kernels are given by: AKPs and a gain each, or the weights of a plain one."""
        return sum(len(k.weights) or len(k.akps) + 1 for k in self.kernels)

    @property
    def unfit(self) -> list[int]:
        """The slots of zero and constant kernels, which stay plain."""
        return [i for i, kernel in enumerate(self.kernels) if kernel.r2 is None]

    def choose(self, tolerance: float, target: Tensor) -> "Fit":
        """Each slot takes, of the kinds that miss at most ``tolerance`` of its energy, the one of fewest numbers.

        Where none does, the slot stays plain. More tolerance never gives more numbers or a higher R^2.

        Args:
            tolerance: 0 to 1; a kind will do where 1 - R^2 is at most this.
            target: the weight that was fitted, for the slots that stay plain.
        """
        check_tolerance(tolerance)
        kernels = []
        for slot, (best, kernel) in enumerate(zip(self.kernels, target.detach().flatten(0, 1), strict=True)):
            tried = [fits[slot] for fits in self.by_kind.values()]
            near = [fit for fit in tried if fit.r2 is not None and 1 - fit.r2 <= tolerance]
            if best.r2 is None:
                kernels.append(best)
            elif near:
                kernels.append(min(near, key=lambda fit: (len(fit.akps), -(fit.r2 or 0))))
            else:
                kernels.append(_plain(kernel, 1.0))
        return replace(self, kernels=tuple(kernels))

    def weight(self) -> Tensor:
        """(out, in / groups, kh, kw) float32: the formulas drawn."""
        return self.to_layer().weight.detach()

    def to_layer(self, *, groups: int = 1, **options: Any) -> AnalyticConv2d:
        """An AnalyticConv2d with these kernels, gains included (``amplitude=True``).

        Args:
            groups: the layer's; in channels are ``shape[1]`` times it.
            options: stride, padding, bias, ... as in nn.Conv2d; ``bias`` is False unless asked for.
        """
        out, inside, *size = self.shape
        kinds = [kernel.kind for kernel in self.kernels]
        layer = AnalyticConv2d(
            inside * groups,
            out,
            (size[0], size[1]),
            groups=groups,
            arrangement=counted(kinds),
            placement=placed(kinds),
            amplitude=True,
            family=self.family,
            profile=self.profile,
            **{"bias": False, **options},
        )
        adopt(layer, self.kernels)
        if layer.plain is not None:
            weights = torch.tensor([self.kernels[slot].weights for slot in layer.slots_of("P")])
            layer.plain.data.copy_(weights.view_as(layer.plain))
        return layer

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Fit":
        """What ``to_json`` wrote. Raises ValueError for text that is none of it."""

        def kernels(entries: Any) -> tuple[KernelFit, ...]:
            return tuple(KernelFit(**{**entry, "weights": tuple(entry["weights"])}) for entry in entries)

        try:
            values = json.loads(text)
            by_kind = {kind: kernels(entries) for kind, entries in values.pop("by_kind").items()}
            shape, energies = tuple(values.pop("shape")), tuple(values.pop("energies"))
            return cls(
                **{**values, "kernels": kernels(values["kernels"])}, shape=shape, energies=energies, by_kind=by_kind
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no fit in JSON: {error!r}") from error


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
    """Finds for each 2-D kernel the kind, AKPs and gain with the least squared error.

    The gain is linear, so it is eliminated (variable projection): what is maximised is the squared cosine between
    target and formula. Each target is compared with many random kernels of a kind, and the nearest are refined, all
    targets and starts in one batch, by Adam with a falling rate. The same seed gives the same fit.

    Args:
        weight: (out, in / groups, kh, kw).
        kinds: symbols of the kinds to try, as ``["G", "Ts"]``; all analytic ones by default.
        family: ``paper``, or ``extended`` with centre offset and Gabor's aspect ratio.
        profile: the TGD kernel function.
        fixed: AKPs of the extended family to hold, as ``{"gamma": 1.0}``.
        signed: only gains above 0, for layers without amplitude.
        seed: of the random kernels.
        progress: a bar on stderr, if that is a terminal.

    Raises:
        ValueError: a weight that is not 4-D or not finite, a kind that does not exist, an unknown family.

    Example:
        >>> fit = fit_kernels(torch.randn(4, 1, 5, 5), kinds=["G"], progress=False)
        >>> fit.kernels[0].kind, list(fit.kernels[0].akps)
        ('G', ['theta', 'wavelength', 'psi', 'sigma'])
    """
    symbols = list(ANALYTIC) if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    for symbol in symbols:
        if symbol not in ANALYTIC:
            raise ValueError(f"no analytic kind '{symbol}'; known: {', '.join(ANALYTIC)}")
    for option, value, known in (("family", family, FAMILIES), ("profile", profile, PROFILES)):
        if value not in known:
            raise ValueError(f"unknown {option} '{value}'; known: {', '.join(known)}")
    if weight.ndim != 4:
        raise ValueError(f"a weight to fit has 4 dimensions (out, in / groups, kh, kw), got {tuple(weight.shape)}")
    target = weight.detach().flatten(0, 1).to("cpu", torch.float32)
    if bad := (~target.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        where = divmod(bad[0], weight.shape[1])
        raise ValueError(f"{len(bad)} kernels of the weight are not finite, the first is that of channels {where}")
    flat = target.flatten(1).double()
    energies = flat.square().sum(1)
    varies = (flat.amax(1) - flat.amin(1)) > 1e-6 * flat.abs().amax(1)
    slots = varies.nonzero().flatten()
    chunk = max(1, _AT_ONCE // (_STARTS * flat.shape[1]))
    plain = [_plain(kernel, None) for kernel in target]
    by_kind: dict[str, tuple[KernelFit, ...]] = {}
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        tqdm(desc="fitting", total=len(symbols) * len(slots), unit="kernel", disable=None if progress else True) as bar,
    ):
        for symbol in symbols:
            torch.manual_seed(seed)
            search = _Search(KINDS[symbol], (weight.shape[2], weight.shape[3]), family, profile, fixed or {}, signed)
            fits = list(plain)
            for part in slots.split(chunk):
                for slot, fit in zip(part.tolist(), search(target[part].flatten(1)), strict=True):
                    fits[slot] = fit
                bar.update(len(part))
            by_kind[symbol] = tuple(fits)
    best = tuple(
        max(fits, key=lambda fit: -1.0 if fit.r2 is None else fit.r2) for fits in zip(*by_kind.values(), strict=True)
    )
    shape = (weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3])
    return Fit(shape, family, profile, tuple(energies.tolist()), best, by_kind)


class _Search:
    """Fits one kind. Targets are (k, pixels), results a KernelFit each."""

    def __init__(
        self, kind: Kind, size: tuple[int, int], family: str, profile: str, fixed: Mapping[str, float], signed: bool
    ) -> None:
        self.kind, self.size, self.signed = kind, size, signed
        self.options: dict[str, Any] = {"size": size, **({"profile": profile} if kind.profiled else {})}
        akps = kind.parameters(family)
        self.akps = [akp for akp in akps if akp.name not in fixed]
        self.fixed = {akp.name: torch.tensor(float(fixed[akp.name])) for akp in akps if akp.name in fixed}
        self.pool = torch.stack([akp.raw(akp.draw(_POOL, size)) for akp in self.akps])  # (akps, pool)

    def draw(self, raw: Tensor) -> Tensor:
        """Raw AKPs (akps, ...) -> kernels (..., pixels)."""
        assert self.kind.function is not None
        natural = {akp.name: akp.natural(row) for akp, row in zip(self.akps, raw, strict=True)}
        fixed = {name: value.to(raw.dtype).expand(raw.shape[1:]) for name, value in self.fixed.items()}
        return self.kind.function(**natural, **fixed, **self.options).flatten(-2)

    def score(self, kernels: Tensor, target: Tensor) -> Tensor:
        """Squared cosine of (..., pixels) and (..., pixels), with the sign of the gain if it has to be above 0."""
        dot = (kernels * target).sum(-1)
        cosine = dot * torch.rsqrt(kernels.square().sum(-1) + 1e-20)
        return cosine * cosine.abs() if self.signed else cosine.square()

    def __call__(self, target: Tensor) -> list[KernelFit]:
        unit = target / target.norm(dim=1, keepdim=True)
        with torch.no_grad():
            pool = self.draw(self.pool)
            cosines = unit @ (pool / pool.norm(dim=1, keepdim=True).clamp(min=1e-10)).T
            near = (cosines if self.signed else cosines.abs()).topk(min(_STARTS, _POOL), dim=1).indices.T
        raw = self.pool[:, near].clone().requires_grad_()  # (akps, starts, targets)
        optimizer = torch.optim.Adam([raw], lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            (-self.score(self.draw(raw), unit).sum()).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            raw = raw.detach()
            scores = self.score(self.draw(raw), unit)
            # Steps of a fit may end a little beside its start's optimum: the better of the two is taken.
            chosen = raw.gather(1, scores.argmax(0).expand(len(raw), 1, -1))[:, 0].double()
            kernels = self.draw(chosen)
            dot, energy = (kernels * target).sum(1), kernels.square().sum(1)
            gains = dot / energy.clamp(min=1e-20)
            r2 = (dot.square() / (energy.clamp(min=1e-20) * target.double().square().sum(1))).clamp(max=1)
            if self.signed:
                gains, r2 = gains.clamp(min=0), torch.where(dot > 0, r2, torch.zeros_like(r2))
        natural = {akp.name: akp.natural(row) for akp, row in zip(self.akps, chosen, strict=True)}
        natural |= {name: value.expand(len(target)) for name, value in self.fixed.items()}
        names = [akp.name for akp in self.kind.parameters("extended") if akp.name in natural]
        columns = {name: _wrapped(name, natural[name]).tolist() for name in names}
        return [
            KernelFit(self.kind.symbol, {name: columns[name][i] for name in names}, gain, fitted)
            for i, (gain, fitted) in enumerate(zip(gains.tolist(), r2.tolist(), strict=True))
        ]


def _wrapped(name: str, values: Tensor) -> Tensor:
    """Angles within one turn."""
    return values.remainder(2 * math.pi) if name in ("theta", "psi") else values


def _plain(kernel: Tensor, r2: float | None) -> KernelFit:
    return KernelFit("P", {}, 1.0, r2, tuple(kernel.flatten().tolist()))


def check_tolerance(tolerance: float | None) -> None:
    if tolerance is None or not 0 <= tolerance <= 1:
        raise ValueError(
            f"arrangement 'auto' needs a tolerance from 0 (all plain) to 1 (all analytic), got {tolerance}"
        )


def counted(kinds: Iterable[str]) -> Arrangement:
    """The arrangement of slots of these kinds, kinds in the registry's order."""
    listed = list(kinds)
    return Arrangement.parse(" ".join(f"{symbol}{listed.count(symbol)}" for symbol in KINDS if symbol in listed))


def placed(kinds: Iterable[str]) -> Tensor | None:
    """The ``placement`` that puts the kernels of ``counted`` into slots of these kinds; None if they are in order."""
    order = {symbol: i for i, symbol in enumerate(KINDS)}
    slots = sorted(range(len(listed := list(kinds))), key=lambda slot: order[listed[slot]])  # of each kernel
    placement = torch.empty(len(listed), dtype=torch.long)
    placement[torch.tensor(slots)] = torch.arange(len(listed))
    return None if slots == sorted(slots) else placement


@torch.no_grad()
def adopt(layer: AnalyticConv2d, kernels: Sequence[KernelFit]) -> None:
    """Gives a layer's analytic slots the AKPs, and with ``amplitude`` the gains, of these fits.

    A slot whose target had nothing to fit keeps its AKPs, with gain 0.
    """
    for symbol in layer.akps():
        kind = KINDS[symbol]
        assert kind.function is not None
        options: dict[str, Any] = {"size": layer.kernel_size, **({"profile": layer.profile} if kind.profiled else {})}
        slots = layer.slots_of(symbol)
        fitted = torch.tensor([i for i, slot in enumerate(slots) if kernels[slot].r2 is not None], dtype=torch.long)
        fits = [kernels[slots[i]] for i in fitted.tolist()]
        values = {
            akp.name: torch.tensor([fit.akps[akp.name] for fit in fits], dtype=torch.float64)
            for akp in kind.parameters(layer.family)
        }
        for akp in kind.parameters(layer.family):
            held = layer.raw[f"{symbol}_{akp.name}"]
            held[fitted] = akp.raw(values[akp.name]).to(held)
        if layer.amplitude:
            gains = torch.tensor([fit.gain for fit in fits], dtype=torch.float64)
            if layer.scale == "unit":
                norms = kind.function(**values, **options).flatten(1).norm(dim=1)
                gains = gains * norms * math.sqrt(layer.in_channels // layer.groups)
            held = layer.raw[f"{symbol}_amplitude"].zero_()
            held[fitted] = gains.to(held)
