"""Fits formulas to given kernels: finds the kind, the AKPs and the gain with the smallest squared error."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from acl.fit_result import Fit, KernelFit, make_plain_fit
from acl.kernels import FAMILIES, KINDS, PROFILES, Family, Profile, analytic_kinds
from acl.metric import Metric
from acl.options import Per

_POOL_SIZE = 8192  # random kernels of each kind, compared with every target to find starting points
_STARTS = 16  # starting points per target: the nearest kernels of the pool
_STEPS = 300
_LEARNING_RATE = 0.4
_PIXELS_PER_BATCH = 2**22
_ROWS_PER_COMPARISON = 4096  # channels of targets compared with the pool at a time, to limit memory
_JOINT_LEARNING_RATE = 0.1
_RIDGE = 1e-6  # relative to kernels of unit energy


@torch.inference_mode(False)  # the search needs gradients, whatever the mode of the caller
@torch.enable_grad()
def fit_kernels(
    weight: Tensor,
    kinds: Iterable[str] | Sequence[Collection[str]] | None = None,
    family: Family = "paper",
    *,
    per: Per = "kernel",
    metric: str | Tensor | Metric = "images",
    profile: Profile = "exponential",
    fixed: Mapping[str, float] | None = None,
    signed: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Finds the kind, AKPs and gains that approximate each 2-D kernel, or each filter, with the smallest error.

    The gains are linear and therefore eliminated (variable projection): the fit maximizes the share of the target's
    energy that the formula explains. Each target is compared with many random kernels of a kind. Adam with a decaying
    learning rate refines the nearest ones, for many targets in one batch. If errors of a filter's kernels can add up
    in the metric, the kernels of each filter are then refined together. The same seed gives the same fit.

    Args:
        weight: (out, in / groups, kh, kw); evaluated in float32.
        kinds: symbols of the kinds to try, such as ``["G", "Ts"]``, or such a list for each slot, where an empty one
            keeps the slot plain; all analytic kinds by default.
        family: ``paper``, or ``extended`` with center offsets and Gabor's aspect ratio.
        per: ``kernel``, or ``filter`` for one shape per output channel and a gain per input channel.
        metric: what counts as error: that of the layer's outputs on ``images``, or on a batch of inputs or patches with
            given second moments, or that of the kernels' ``pixels``; see ``acl.metric.Metric.create``.
        profile: the TGD kernel function.
        fixed: AKPs to hold constant in the kinds that have them, in natural units, such as ``{"gamma": 1.0}``.
        signed: allow only positive gains, as in layers without ``amplitude``; kernels are then not refined together.
        seed: seeds the random kernels.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: for a weight that is not 4-D, has empty kernels or is not finite, an unknown kind, family, profile
            or metric, or a fixed AKP that none of the kinds has or whose value is out of its range.

    Example:
        >>> fit = fit_kernels(torch.randn(4, 1, 5, 5), kinds=["G"], progress=False)
        >>> fit.kernels[0].kind, list(fit.kernels[0].akps)
        ('G', ['theta', 'wavelength', 'psi', 'sigma'])
    """
    for option, value, known in (
        ("family", family, FAMILIES),
        ("profile", profile, PROFILES),
        ("per", per, get_args(Per)),
    ):
        if value not in known:
            raise ValueError(f"unknown {option} '{value}'; known: {', '.join(known)}")
    target = _check_weight(weight)
    out_channels, in_channels, *size = target.shape
    slots = target.flatten(0, 1)[:, None] if per == "kernel" else target
    candidates = _list_candidates(kinds, len(slots))
    symbols = [symbol for symbol in analytic_kinds() if any(symbol in names for names in candidates)]
    fixed = {name: _parse_fixed_akp(name, value, symbols, family) for name, value in (fixed or {}).items()}
    resolved = Metric.create(metric, in_channels, (size[0], size[1]))
    fit = Fit(
        (out_channels, in_channels, size[0], size[1]), per, family, profile, resolved, fixed, signed and per == "kernel"
    )
    flat = slots.flatten(1)
    varies = (flat.amax(1) - flat.amin(1)) > 1e-6 * flat.abs().amax(1)
    by_kind: dict[str, tuple[KernelFit, ...]] = {}
    total = sum(len(names) for names, is_fitted in zip(candidates, varies.tolist(), strict=True) if is_fitted)
    with tqdm(desc="fitting", total=total, unit=per, disable=None if progress else True) as bar:
        for symbol in symbols:
            search = KindSearch(fit, symbol, seed)
            fits = [make_plain_fit(kernel, None) for kernel in slots]
            has_kind = torch.tensor([symbol in names for names in candidates])
            for batch in (varies & has_kind).nonzero().flatten().split(search.targets_per_batch):
                for slot, kernel_fit in zip(batch.tolist(), search.fit(slots[batch].flatten(2)), strict=True):
                    fits[slot] = kernel_fit
                bar.update(len(batch))
            by_kind[symbol] = tuple(fits)
    plain = [make_plain_fit(kernel, None if names else 1.0) for kernel, names in zip(slots, candidates, strict=True)]
    best = tuple(
        max(fits, key=lambda fit: -1.0 if fit.r2 is None else fit.r2)
        for fits in zip(*by_kind.values(), plain, strict=True)
    )
    fit = replace(fit, energies=tuple(_compute_slot_energies(fit, slots).tolist()), kernels=best, by_kind=by_kind)
    return refine_jointly(fit, target)


def _check_weight(weight: Tensor) -> Tensor:
    """The weight in float32 on the CPU. Raises ValueError for one that cannot be fitted."""
    if weight.ndim != 4:
        raise ValueError(f"the weight must have 4 dimensions (out, in / groups, kh, kw), got {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"the weight must have kernels of at least 1 x 1, got the shape {tuple(weight.shape)}")
    target = weight.detach().to("cpu", torch.float32).clone()  # a clone is no inference tensor
    if non_finite := (~target.isfinite().flatten(2).all(2)).nonzero().tolist():
        raise ValueError(
            f"the weight has non-finite values in {len(non_finite)} of {target.shape[0] * target.shape[1]} kernels; "
            f"the first is weight{non_finite[0]}"
        )
    return target


def _list_candidates(kinds: Iterable[str] | Sequence[Collection[str]] | None, num_slots: int) -> list[Collection[str]]:
    """The kinds to try for each slot. Raises ValueError for an unknown kind, or none at all."""
    known = analytic_kinds()
    entries = list(known) if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    if not entries:
        raise ValueError(f"no kinds to fit; known: {', '.join(known)}")
    symbols = [entry for entry in entries if isinstance(entry, str)]
    candidates: list[Any] = [symbols] * num_slots if symbols else entries
    if len(candidates) != num_slots:
        raise ValueError(f"kinds must be given for {num_slots} slots, got {len(candidates)}")
    for names in candidates:
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no analytic kind '{unknown[0]}'; known: {', '.join(known)}")
    return candidates


def _compute_slot_energies(fit: Fit, kernels: Tensor) -> Tensor:
    """The energy of the output of each slot's kernels (slots, channels, kh, kw) alone, (slots,) float64."""
    if fit.per == "filter":
        return fit.metric.energies(kernels)
    flat = kernels.double().flatten(1)
    energies = (flat @ fit.metric.pixels * flat).sum(1).view(fit.shape[:2])
    return (energies * fit.metric.channels.diagonal()).flatten()


class KindSearch:
    """Searches for the AKPs and gains of one kind of kernel that fit each target best."""

    def __init__(self, fit: Fit, symbol: str, seed: int = 0) -> None:
        self.kind, self.size, self.profile, self.signed = KINDS[symbol], fit.shape[2:], fit.profile, fit.signed
        self.metric, self.root = fit.metric, fit.metric.root
        # A kernel alone has no other channel.
        self.channels = fit.metric.channels if fit.per == "filter" else torch.ones(1, 1, dtype=torch.float64)
        self.channel_root = fit.metric.channel_root if fit.per == "filter" else self.channels
        akps = self.kind.akps(fit.family)
        self.free_akps = [akp for akp in akps if akp.name not in fit.fixed]
        self.fixed = {a.name: torch.tensor(fit.fixed[a.name], dtype=torch.float64) for a in akps if a.name in fit.fixed}
        # Not akp.sample, so that the pool depends neither on the default dtype nor on the global random state.
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.empty(len(self.free_akps), _POOL_SIZE, dtype=torch.float32, device="cpu")
        for akp, row in zip(self.free_akps, self.pool, strict=True):
            row.copy_(akp.to_raw(row.uniform_(*akp.init_range(max(self.size)), generator=generator)))

    @property
    def targets_per_batch(self) -> int:
        """The targets to fit at a time, to limit memory."""
        num_channels, num_pixels = len(self.channels), self.size[0] * self.size[1]
        return max(1, _PIXELS_PER_BATCH // (_STARTS * max(num_pixels, num_channels)))

    def synthesize(self, raw: Tensor) -> Tensor:
        """Raw AKPs (akps, ...) -> kernels (..., pixels)."""
        akps = {akp.name: akp.to_natural(row) for akp, row in zip(self.free_akps, raw, strict=True)}
        akps |= {name: value.to(raw.dtype).expand(raw.shape[1:]) for name, value in self.fixed.items()}
        return self.kind.synthesize(akps, self.size, self.profile).flatten(-2)

    def whiten(self, kernels: Tensor) -> Tensor:
        """Kernels (..., pixels) whose squared error is the error in the metric."""
        return kernels if self.root is None else kernels @ self.root.to(kernels.dtype)

    def to_raw(self, fits: Sequence[KernelFit]) -> Tensor:
        """The free AKPs of fits, as stored, (akps, fits) float64."""
        values = torch.tensor([[fit.akps[akp.name] for fit in fits] for akp in self.free_akps], dtype=torch.float64)
        return torch.stack([akp.to_raw(row) for akp, row in zip(self.free_akps, values, strict=True)])

    def to_akps(self, raw: Tensor) -> list[dict[str, float]]:
        """The AKPs in natural units of each column of ``raw`` (akps, fits)."""
        values = {
            akp.name: _wrap_angle(akp.to_natural(row)) if akp.unit == "rad" else akp.to_natural(row)
            for akp, row in zip(self.free_akps, raw, strict=True)
        }
        values |= {name: value.expand(raw.shape[1]) for name, value in self.fixed.items()}
        columns = {akp.name: values[akp.name].tolist() for akp in self.kind.akps("extended") if akp.name in values}
        return [{name: column[i] for name, column in columns.items()} for i in range(raw.shape[1])]

    def score(self, kernels: Tensor, target: Tensor) -> Tensor:
        """The explained share of targets of unit energy (targets, channels, pixels), by kernels (n, targets, pixels).

        It is negative for a negative gain if ``signed``.
        """
        dots = (kernels.transpose(0, 1) @ target.mT).transpose(0, 1)
        cosines = dots * torch.rsqrt(kernels.square().sum(-1, keepdim=True) + 1e-20)
        return (cosines * cosines.abs() if self.signed else cosines.square()).sum(-1)

    def find_starts(self, target: Tensor) -> Tensor:
        """The raw AKPs of the kernels of the pool that are nearest to each target, (akps, starts, targets)."""
        pool = self.whiten(self.synthesize(self.pool))
        pool /= pool.norm(dim=1, keepdim=True).clamp(min=1e-10)
        nearest = []
        for part in target.split(max(1, _ROWS_PER_COMPARISON // target.shape[1])):
            cosines = part @ pool.T
            scores = cosines[:, 0] if self.signed else cosines.square().sum(1)
            nearest.append(scores.topk(_STARTS, dim=1).indices)
        return self.pool[:, torch.cat(nearest).T].clone()

    def fit(self, target: Tensor) -> list[KernelFit]:
        """Finds the best fit to each target, (targets, channels, pixels)."""
        # Divided by a power of two, which is exact, so that no kernel is too small or too large for float32.
        peak = target.double().abs().amax((1, 2), keepdim=True)
        power = peak / torch.frexp(peak).mantissa
        whitened = self.whiten(target.double() / power)
        unit = (self.channel_root.T @ whitened).float()
        unit = unit / unit.flatten(1).norm(dim=1)[:, None, None]
        with torch.no_grad():
            raw = self.find_starts(unit)
        raw.requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS if self.free_akps else 0):
            optimizer.zero_grad()
            (-self.score(self.whiten(self.synthesize(raw)), unit).sum()).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            raw = raw.detach()
            best_start = self.score(self.whiten(self.synthesize(raw)), unit).argmax(0).expand(len(raw), 1, -1)
            chosen = raw.gather(1, best_start)[:, 0].double()
            kernels = self.whiten(self.synthesize(chosen))[:, None]
            dots, energy = (kernels * whitened).sum(2), kernels.square().sum(2).clamp(min=1e-20)
            gains = dots / energy
            total = (self.channels @ whitened * whitened).sum((1, 2))
            r2 = ((dots @ self.channels * dots).sum(1) / (energy[:, 0] * total)).clamp(max=1)
            if self.signed:
                gains, r2 = gains.clamp(min=0), torch.where(dots[:, 0] > 0, r2, torch.zeros_like(r2))
            gains = gains * power[:, 0]
        return [
            KernelFit(self.kind.symbol, akps, tuple(kernel_gains), kernel_r2)
            for akps, kernel_gains, kernel_r2 in zip(self.to_akps(chosen), gains.tolist(), r2.tolist(), strict=True)
        ]


@torch.inference_mode(False)
@torch.enable_grad()
def refine_jointly(fit: Fit, weight: Tensor) -> Fit:
    """Refines the selected kernels of each filter together, if their errors can add up in the metric of the fit.

    A filter keeps its AKPs if other ones do not reduce its error. Fits of filters, and fits of kernels without gains of
    their own (``signed``), are returned unchanged.

    Args:
        fit: a fit of ``fit_kernels``, or what ``Fit.choose`` selects from it.
        weight: the weight that was fitted.
    """
    indices = {
        symbol: torch.tensor([i for i, kernel in enumerate(fit.kernels) if kernel.akps and kernel.kind == symbol])
        for symbol in dict.fromkeys(kernel.kind for kernel in fit.kernels if kernel.akps)
    }
    if fit.per == "filter" or fit.signed or not fit.metric.is_coupled or not indices:
        return fit
    weight = weight.detach().cpu().double()
    joint = _JointFit(fit, indices, weight)
    initial = {
        symbol: search.to_raw([fit.kernels[i] for i in indices[symbol]]) for symbol, search in joint.searches.items()
    }
    raw = {symbol: values.float().requires_grad_() for symbol, values in initial.items()}
    if any(values.numel() for values in raw.values()):  # otherwise all AKPs are fixed
        optimizer = torch.optim.Adam(raw.values(), lr=_JOINT_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            joint.solve(raw)[1].sum().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        refined = {symbol: values.double() for symbol, values in raw.items()}
        (gains, errors), (refined_gains, refined_errors) = joint.solve(initial), joint.solve(refined)
        is_better = (refined_errors < errors)[:, None].expand(fit.shape[:2]).flatten()
        gains = torch.where(is_better, refined_gains, gains)
    kernels = list(fit.kernels)
    for symbol, search in joint.searches.items():
        slots = indices[symbol]
        akps = search.to_akps(torch.where(is_better[slots], refined[symbol], initial[symbol]))
        for slot, kernel_akps, gain in zip(slots.tolist(), akps, gains[slots].tolist(), strict=True):
            kernels[slot] = replace(kernels[slot], akps=kernel_akps, gains=(gain,))
    fit = replace(fit, kernels=tuple(kernels))
    own_errors = _compute_slot_energies(fit, (fit.weight() - weight).flatten(0, 1)[:, None]).tolist()
    for slot in torch.cat(list(indices.values())).tolist():
        kernels[slot] = replace(kernels[slot], r2=1 - own_errors[slot] / fit.energies[slot])
    return replace(fit, kernels=tuple(kernels))


class _JointFit:
    """The best gains of all kernels of a filter together, and the filter's error, for given AKPs."""

    def __init__(self, fit: Fit, indices: Mapping[str, Tensor], weight: Tensor) -> None:
        self.channels, self.slots = fit.metric.channels, torch.cat(list(indices.values()))
        self.searches = {symbol: KindSearch(fit, symbol) for symbol in indices}
        self.shape = fit.shape[:2]
        is_fitted = torch.zeros(self.shape).flatten().index_fill(0, self.slots, 1).view(*self.shape, 1)
        target = weight.flatten(2) * is_fitted  # plain kernels have no error
        self.peak = target.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)
        self.target = next(iter(self.searches.values())).whiten(target / self.peak)
        self.energies = self.compute_energies(self.target).clamp(min=1e-30)

    def compute_energies(self, filters: Tensor) -> Tensor:
        """The energy of whitened filters (out, in, pixels), (out,)."""
        return (self.channels.to(filters) @ filters * filters).sum((1, 2))

    def solve(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The gain of each slot, and the error of each filter relative to its energy."""
        kernels = torch.cat([search.whiten(search.synthesize(raw[symbol])) for symbol, search in self.searches.items()])
        norms = kernels.norm(dim=1, keepdim=True).clamp(min=1e-10)
        target, channels = self.target.to(kernels), self.channels.to(kernels)
        units = torch.zeros_like(target).flatten(0, 1).index_copy(0, self.slots, kernels / norms).view_as(target)
        gram, products = units @ units.mT * channels, (units @ target.mT * channels).sum(2)
        # The ridge makes the gains of nearly equal kernels, and those of slots without a kernel, unique.
        unit_gains = torch.linalg.solve(gram + _RIDGE * torch.eye(len(channels)).to(gram), products)
        errors = self.compute_energies(units * unit_gains[..., None] - target) / self.energies.to(kernels)
        gains = (unit_gains * self.peak[:, 0].to(kernels)).flatten()
        return gains.index_copy(0, self.slots, gains[self.slots] / norms[:, 0]), errors


def _wrap_angle(values: Tensor) -> Tensor:
    """Maps angles to [0, 2 pi)."""
    return values.remainder(2 * math.pi)


def _parse_fixed_akp(name: str, value: float, symbols: Iterable[str], family: str) -> float:
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
