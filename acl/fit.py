"""Fits formulas to given kernels: finds the kind, the AKPs and the gain with the smallest squared error."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from acl.fit_result import Fit, KernelFit, make_plain_fit
from acl.kernels import AKP, FAMILIES, PROFILES, Family, Kind, Profile, analytic_kinds

_POOL_SIZE = 8192  # random kernels of each kind, compared with every target to find starting points
_STARTS = 16  # starting points per target: the nearest kernels of the pool
_STEPS = 300
_LEARNING_RATE = 0.4
_PIXELS_PER_BATCH = 2**22
_TARGETS_PER_COMPARISON = 4096  # compared with the pool at a time, to limit memory


@torch.inference_mode(False)  # the search needs gradients, whatever the mode of the caller
@torch.enable_grad()
def fit_kernels(
    weight: Tensor,
    kinds: Iterable[str] | None = None,
    family: Family = "paper",
    *,
    profile: Profile = "exponential",
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
        weight: (out, in / groups, kh, kw); evaluated in float32.
        kinds: symbols of the kinds to try, such as ``["G", "Ts"]``; all analytic kinds by default.
        family: ``paper``, or ``extended`` with center offsets and Gabor's aspect ratio.
        profile: the TGD kernel function.
        fixed: AKPs to hold constant in the kinds that have them, in natural units, such as ``{"gamma": 1.0}``.
        signed: allow only positive gains, as in layers without ``amplitude``.
        seed: seeds the random kernels.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: for a weight that is not 4-D, has empty kernels or is not finite, an unknown kind, family or
            profile, or a fixed AKP that none of the kinds has or whose value is out of its range.

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
    if not symbols:
        raise ValueError(f"no kinds to fit; known: {', '.join(known_kinds)}")
    akps = [akp for symbol in symbols for akp in known_kinds[symbol].akps(family)]
    fixed_akps = {name: _parse_fixed_akp(name, value, akps) for name, value in (fixed or {}).items()}
    if weight.ndim != 4:
        raise ValueError(f"the weight must have 4 dimensions (out, in / groups, kh, kw), got {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"the weight must have kernels of at least 1 x 1, got the shape {tuple(weight.shape)}")
    target = weight.detach().flatten(0, 1).to("cpu", torch.float32).clone()  # a clone is no inference tensor
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
    degenerate = [make_plain_fit(kernel, None) for kernel in target]
    size = (weight.shape[2], weight.shape[3])
    by_kind: dict[str, tuple[KernelFit, ...]] = {}
    total = len(symbols) * len(slots)
    with tqdm(desc="fitting", total=total, unit="kernel", disable=None if progress else True) as bar:
        for symbol in symbols:
            search = _KindSearch(known_kinds[symbol], size, family, profile, fixed_akps, signed, seed)
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
        self,
        kind: Kind,
        size: tuple[int, int],
        family: str,
        profile: str,
        fixed: Mapping[str, Tensor],
        signed: bool,
        seed: int,
    ) -> None:
        self.kind, self.size, self.profile, self.signed = kind, size, profile, signed
        akps = kind.akps(family)
        self.free_akps = [akp for akp in akps if akp.name not in fixed]
        self.fixed = {akp.name: fixed[akp.name] for akp in akps if akp.name in fixed}
        # Not akp.sample, so that the pool depends neither on the default dtype nor on the global random state.
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.empty(len(self.free_akps), _POOL_SIZE, dtype=torch.float32, device="cpu")
        for akp, row in zip(self.free_akps, self.pool, strict=True):
            row.copy_(akp.to_raw(row.uniform_(*akp.init_range(max(size)), generator=generator)))

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
        # Divided by a power of two, which is exact, so that no kernel is too small or too large for float32.
        peak = target.double().abs().amax(1, keepdim=True)
        power = peak / torch.frexp(peak).mantissa
        target = (target.double() / power).float()
        unit = target / target.norm(dim=1, keepdim=True)
        with torch.no_grad():
            pool = self.synthesize(self.pool)
            pool /= pool.norm(dim=1, keepdim=True).clamp(min=1e-10)
            cosines = (targets @ pool.T for targets in unit.split(_TARGETS_PER_COMPARISON))
            nearest = torch.cat([(c if self.signed else c.abs()).topk(_STARTS, dim=1).indices for c in cosines]).T
        raw = self.pool[:, nearest].clone().requires_grad_()  # (akps, starts, targets)
        optimizer = torch.optim.Adam([raw], lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS if self.free_akps else 0):
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
            gains = power[:, 0] * dot / energy.clamp(min=1e-20)
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


def _parse_fixed_akp(name: str, value: float, akps: Iterable[AKP]) -> Tensor:
    """Converts the value of a fixed AKP to float64. Raises ValueError unless it is valid in all kinds that have it."""
    matching = [akp for akp in akps if akp.name == name]
    if not matching:
        raise ValueError(f"no AKP '{name}' to fix; known: {', '.join(dict.fromkeys(akp.name for akp in akps))}")
    try:
        number = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the fixed {name} must be a number, got {value!r}") from error
    if not number.isfinite():
        raise ValueError(f"the fixed {name} must be finite, got {value}")
    for akp in matching:
        akp.to_raw(number)
    return number
