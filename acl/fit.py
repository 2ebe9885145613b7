"""Fits formulas to given kernels: finds the kind, the AKPs and the gain with the smallest squared error."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from acl.fit_result import Fit, KernelFit, make_plain_fit, parse_fixed_akp
from acl.kernels import Family, Profile, analytic_kinds
from acl.kind_search import KindSearch
from acl.metric import Metric
from acl.options import LayerOptions, Per
from acl.refine import refine_jointly


@torch.inference_mode(False)  # the search needs gradients and its precision, whatever the mode of the caller
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
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
    refine: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Finds the kind, AKPs and gains that approximate each 2-D kernel, or each filter, with the smallest error.

    The gains are linear and therefore eliminated (variable projection): the fit maximizes the share of the target's
    energy that the formula explains. Each target is compared with many random kernels of a kind. Adam with a decaying
    learning rate refines the nearest ones, for many targets in one batch. If errors of a filter's kernels can add up
    in the metric, ``refine`` then refines the kernels of each filter together. The same seed gives the same fit.

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
        refine: refine the kernels of each filter together, which ``Fit.by_kind`` does not depend on.
        seed: seeds the random kernels.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError: for a weight that is not 4-D, has empty kernels or is not finite, an unknown kind, family, profile
            or metric, ``signed`` fits of filters, or a fixed AKP that none of the kinds has or whose value is out of
            its range.

    Example:
        >>> fit = fit_kernels(torch.randn(4, 1, 5, 5), kinds=["G"], progress=False)
        >>> fit.kernels[0].kind, list(fit.kernels[0].akps)
        ('G', ['theta', 'wavelength', 'psi', 'sigma'])
    """
    LayerOptions(per=per, family=family, profile=profile)  # raises ValueError for an unknown one
    if signed and per == "filter":
        raise ValueError("signed=True needs per='kernel'; the gains of a filter have either sign")
    target = _check_weight(weight)
    out_channels, in_channels, *size = target.shape
    slots = target.flatten(0, 1)[:, None] if per == "kernel" else target
    candidates = _list_candidates(kinds, len(slots))
    symbols = [symbol for symbol in analytic_kinds() if any(symbol in names for names in candidates)]
    fixed = {name: parse_fixed_akp(name, value, symbols, family) for name, value in (fixed or {}).items()}
    resolved = Metric.create(metric, in_channels, (size[0], size[1]))
    fit = Fit((out_channels, in_channels, size[0], size[1]), per, family, profile, resolved, fixed, signed)
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
    fit = replace(fit, energies=tuple(fit.compute_energies(target).tolist()), kernels=best, by_kind=by_kind)
    return refine_jointly(fit, target) if refine else fit


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
