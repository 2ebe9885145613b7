"""Searches for the AKPs and gains of one kind of kernel that approximate given kernels best."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from acl.fit_result import Fit, KernelFit
from acl.kernels import KINDS

STEPS = 300
_POOL_SIZE = 8192  # random kernels of each kind, compared with every target to find starting points
_STARTS = 16  # starting points per target: the nearest kernels of the pool
_LEARNING_RATE = 0.4
_ROUNDING = 1e-5  # of scores, which are computed in float32
_PIXELS_PER_BATCH = 2**22
_ROWS_PER_COMPARISON = 4096  # channels of targets compared with the pool at a time, to limit memory


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
        raw = torch.empty(len(self.free_akps), len(fits), dtype=torch.float64)
        for row, akp in zip(raw, self.free_akps, strict=True):
            row.copy_(akp.to_raw(torch.tensor([fit.akps[akp.name] for fit in fits], dtype=torch.float64)))
        return raw

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
            starts = self.find_starts(unit)
        raw = starts.clone().requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS if self.free_akps else 0):
            optimizer.zero_grad()
            (-self.score(self.whiten(self.synthesize(raw)), unit).sum()).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            scores, start_scores = (self.score(self.whiten(self.synthesize(akps)), unit) for akps in (raw, starts))
            is_worse = scores < start_scores - _ROUNDING  # a large step can lead to where all kernels are 0
            raw = torch.where(is_worse, starts, raw)
            best = torch.where(is_worse, start_scores, scores).argmax(0).expand(len(raw), 1, -1)
            chosen = raw.gather(1, best)[:, 0].double()
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


def _wrap_angle(values: Tensor) -> Tensor:
    """Maps angles to [0, 2 pi)."""
    return values.remainder(2 * math.pi)
