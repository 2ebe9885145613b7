"""Refines fits of kernels whose errors add up in the outputs of their filter."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from acl import kind_search
from acl.fit_result import Fit
from acl.kind_search import KindSearch

_LEARNING_RATE = 0.1
_RIDGE = 1e-6  # relative to kernels of unit energy


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
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
        optimizer = torch.optim.Adam(raw.values(), lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, kind_search.STEPS)
        for _ in range(kind_search.STEPS):
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
    own_errors = fit.compute_energies(fit.weight() - weight).tolist()
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
