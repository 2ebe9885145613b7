"""Explains an analytic network: what its kinds of kernels, and single ones, do for its accuracy; and its formulas."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial, reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from acl.kernels import KINDS
from acl.layer import AnalyticConv2d

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives the data anew at each call: inputs as the model takes them, and labels (n,)."""
Sums = list[dict[frozenset[str], Tensor]]
REPLACEMENTS = ("zero", "mean")


@dataclass(frozen=True)
class Attribution:
    """Accuracies of a network with kinds of kernels removed from all its analytic layers."""

    kinds: tuple[str, ...]
    """Symbols of the kinds that the network has."""
    correct: dict[frozenset[str], int]
    """Kinds that were kept -> images told right."""
    images: int
    replaced_by: str

    def accuracy(self, kept: Iterable[str]) -> float:
        """Top-1 in per cent with these kinds alone; kinds that the network has not make no difference."""
        return 100 * self.correct[frozenset(kept) & frozenset(self.kinds)] / self.images

    @property
    def drop(self) -> float:
        """Points of accuracy that all kinds together make."""
        return self.accuracy(KINDS) - self.accuracy(())

    def shapley(self) -> dict[str, float]:
        """Each kind's exact Shapley value, in points of accuracy; they add up to ``drop``.

        The mean, over all orders in which the kinds could join, of what a kind adds as it does. A kind that the
        network has not adds nothing. Source: Shapley, A value for n-person games, 1953.
        """
        n = len(self.kinds)
        values = dict.fromkeys(KINDS, 0.0)
        for kind in self.kinds:
            others = [other for other in self.kinds if other != kind]
            total = Fraction(0)
            for size in range(n):
                weight = Fraction(math.factorial(size) * math.factorial(n - size - 1), math.factorial(n))
                for kept in map(frozenset, combinations(others, size)):
                    total += weight * (self.correct[kept | {kind}] - self.correct[kept])
            values[kind] = float(100 * total / self.images)
        return values


@torch.no_grad()
def attribute(model: nn.Module, batches: Batches, replace: str = "zero", progress: bool = True) -> Attribution:
    """The accuracy of a network for every subset of its kinds of kernels, with the others removed from all layers.

    In one pass over the data. A convolution is linear in its kernels, so the first analytic layer's answer to each
    kind is computed once per batch and added up for each subset; later layers see inputs that differ by subset, and
    convolve those with the kernels of the kept kinds.

    Args:
        model: with at least one analytic layer.
        replace: ``zero``: a removed kernel answers nothing; ``mean``: each output channel keeps the mean, over all
            images and positions, of what the removed kernels answered in the whole network (a pass of its own).

    Raises:
        ValueError: a network without an analytic layer, no data, an unknown ``replace``.
    """
    if replace not in REPLACEMENTS:
        raise ValueError(f"unknown replace '{replace}'; known: {', '.join(REPLACEMENTS)}")
    layers = analytic_layers(model)
    kinds = tuple(symbol for symbol in KINDS if any(symbol in layer.slot_kinds for layer in layers.values()))
    subsets = [frozenset(kept) for size in range(len(kinds) + 1) for kept in combinations(kinds, size)]
    correct = dict.fromkeys(subsets, 0)
    images = 0
    with _evaluating(model):
        first = _first(model, layers.values(), batches)
        parts = {layer: _by_kind(layer, kinds) for layer in layers.values()}
        means = _mean_answers(model, parts, batches, progress) if replace == "mean" else None
        bar = tqdm(desc=f"{len(subsets)} subsets", unit="image", disable=None if progress else True)
        for inputs, labels in batches():
            images += len(labels)
            sums: Sums = []
            for kept in subsets:
                with _answering(_masked(parts, kept, means, first, sums)):
                    correct[kept] += int((model(inputs).argmax(1) == labels).sum())
            bar.update(len(labels))
        bar.close()
    if not images:
        raise ValueError("there are no data to explain the network by")
    return Attribution(kinds, correct, images, replace)


@torch.no_grad()
def leave_one_out(model: nn.Module, batches: Batches, progress: bool = True) -> dict[str, Tensor]:
    """What the accuracy loses without a single kernel, in points, for every slot of every analytic layer.

    Returns:
        Layer's name -> (slots,) float64; below 0 where the network is better without.

    Raises:
        ValueError: a network without an analytic layer, no data.
    """
    layers = analytic_layers(model)
    held = {name: layer.weight.detach() for name, layer in layers.items()}
    lost = {name: torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.float64) for name, weight in held.items()}
    images = 0
    with _evaluating(model):
        for inputs, labels in batches():
            images += len(labels)
            whole = int((model(inputs).argmax(1) == labels).sum())
            bar = tqdm(
                desc=f"kernels, {images} images", total=sum(map(len, lost.values())), disable=None if progress else True
            )
            for name, layer in layers.items():
                for slot in range(len(lost[name])):
                    weight = held[name].clone()
                    weight[divmod(slot, weight.shape[1])] = 0
                    with _answering({layer: partial(layer.convolve, weight=weight)}):
                        lost[name][slot] += whole - int((model(inputs).argmax(1) == labels).sum())
                    bar.update()
            bar.close()
    if not images:
        raise ValueError("there are no data to explain the network by")
    return {name: 100 * values / images for name, values in lost.items()}


@torch.no_grad()
def formula(layer: AnalyticConv2d, slot: int) -> str:
    """A slot's kernel as it enters the weight, in numbers, as in ``0.21 * exp(-r^2/(2 * 1.83^2)) * cos(...)``."""
    symbol = layer.slot_kinds[slot]
    kind = KINDS[symbol]
    if kind.function is None:
        return f"{layer.kernel_size[0]} x {layer.kernel_size[1]} free weights"
    i = layer.slots_of(symbol).index(slot)
    values = {name: float(akp[i]) for name, akp in layer.akps()[symbol].items()}
    options: dict[str, Any] = {"profile": layer.profile} if kind.profiled else {}
    bare = {name: torch.tensor(value) for name, value in values.items() if name != "amplitude"}
    kernel = kind.function(**bare, size=layer.kernel_size, **options)
    drawn = layer.weight.detach().flatten(0, 1)[slot].to(kernel)
    gain = float((drawn * kernel).sum() / kernel.square().sum().clamp(min=1e-20))
    return f"{gain:.3g} * {kind.text(values, layer.profile)}"


def analytic_layers(model: nn.Module) -> dict[str, AnalyticConv2d]:
    """By name, in the model's order. Raises ValueError where there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AnalyticConv2d)}
    if not layers:
        raise ValueError("the network has no analytic layer to explain")
    return layers


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _answering(answers: dict[AnalyticConv2d, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Lets layers answer otherwise than they do."""
    for layer, answer in answers.items():
        vars(layer)["forward"] = answer
    try:
        yield
    finally:
        for layer in answers:
            del vars(layer)["forward"]


def _by_kind(layer: AnalyticConv2d, kinds: Iterable[str]) -> dict[str, Tensor]:
    """The layer's weight with the kernels of all kinds but one at zero, for each that it has."""
    weight, held = layer.weight.detach(), layer.slot_kinds
    parts = {}
    for symbol in kinds:
        if symbol in held:
            mask = torch.tensor([kind == symbol for kind in held], device=weight.device).view(weight.shape[:2])
            parts[symbol] = weight * mask[..., None, None]
    return parts


def _first(model: nn.Module, layers: Iterable[AnalyticConv2d], batches: Batches) -> AnalyticConv2d | None:
    """The analytic layer that runs first, if its input and its answers are those of one call and linear in kernels."""
    calls: list[AnalyticConv2d] = []
    handles = [layer.register_forward_pre_hook(lambda layer, _: calls.append(layer)) for layer in layers]
    inputs, _ = next(iter(batches()), (None, None))
    if inputs is not None:
        model(inputs[:1])
    for handle in handles:
        handle.remove()
    return calls[0] if calls and calls.count(calls[0]) == 1 and calls[0].host is None else None


def _masked(
    parts: dict[AnalyticConv2d, dict[str, Tensor]],
    kept: frozenset[str],
    means: dict[AnalyticConv2d, dict[str, Tensor]] | None,
    first: AnalyticConv2d | None,
    sums: Sums,
) -> dict[AnalyticConv2d, Callable[[Tensor], Tensor]]:
    """How layers answer with the kernels of the kept kinds; ``sums`` holds those of the first to this batch."""

    def answer(layer: AnalyticConv2d, x: Tensor) -> Tensor:
        own = parts[layer]
        if layer is first:
            out = _added(layer, x, own, kept, sums)
        else:
            weights = list(own.values())
            out = layer.convolve(x, _total([own[symbol] for symbol in own if symbol in kept], weights[0]))
        for symbol in own if means else ():
            if means and symbol not in kept:
                out = out + means[layer][symbol][:, None, None]
        return out

    return {layer: partial(answer, layer) for layer in parts}


def _added(layer: AnalyticConv2d, x: Tensor, own: dict[str, Tensor], kept: frozenset[str], sums: Sums) -> Tensor:
    """The layer's answer with some kinds: a sum of two, for one half of its kinds and for the other.

    So 64 subsets take one addition each, of 16 tensors that are held, and each kind's convolution is done once.
    """
    symbols = list(own)
    halves = symbols[: len(symbols) // 2], symbols[len(symbols) // 2 :]
    if not sums:
        single = {symbol: layer.convolve(x, weight, bias=False) for symbol, weight in own.items()}
        nothing = torch.zeros_like(single[symbols[0]])
        bias = nothing if layer.bias is None else nothing + layer.bias[:, None, None]
        for half, start in zip(halves, (nothing, bias), strict=True):
            subsets = [some for size in range(len(half) + 1) for some in combinations(half, size)]
            sums.append({frozenset(some): sum((single[symbol] for symbol in some), start) for some in subsets})
    return sums[0][kept & frozenset(halves[0])] + sums[1][kept & frozenset(halves[1])]


def _total(tensors: list[Tensor], like: Tensor) -> Tensor:
    return reduce(torch.add, tensors) if tensors else torch.zeros_like(like)


def _mean_answers(
    model: nn.Module, parts: dict[AnalyticConv2d, dict[str, Tensor]], batches: Batches, progress: bool
) -> dict[AnalyticConv2d, dict[str, Tensor]]:
    """Each kind's mean answer per output channel in the whole network, (out,)."""
    if any(layer.host is not None for layer in parts):
        raise ValueError("replace='mean' needs layers that convolve as nn.Conv2d does; replace='zero' needs nothing")
    sums = {
        layer: {symbol: torch.zeros(layer.out_channels, dtype=torch.float64) for symbol in own}
        for layer, own in parts.items()
    }
    counts = dict.fromkeys(parts, 0)

    def note(layer: AnalyticConv2d, inputs: tuple[Tensor, ...]) -> None:
        for symbol, weight in parts[layer].items():
            answer = layer.convolve(inputs[0], weight, bias=False)
            sums[layer][symbol] += answer.double().sum((0, -2, -1)).cpu()
        counts[layer] += answer.numel() // layer.out_channels

    handles = [layer.register_forward_pre_hook(note) for layer in parts]
    for inputs, _ in tqdm(batches(), desc="mean answers", disable=None if progress else True):
        model(inputs)
    for handle in handles:
        handle.remove()
    return {
        layer: {s: (total / max(counts[layer], 1)).to(layer.weight) for s, total in own.items()}
        for layer, own in sums.items()
    }
