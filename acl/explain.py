"""Explains an analytic network: how much each kind of kernel, and each individual kernel, adds to its accuracy."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial, reduce
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from acl.inspection import eval_mode, get_input, refuse_patched_forward, require_analytic_layers
from acl.kernels import KINDS
from acl.layer import AnalyticConv2d

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""A function that starts a new pass over the data: batches of inputs to the model and their labels (n,)."""
Replacement = Literal["zero", "mean", "constant"]
"""What can stand for a removed kernel: see ``attribute``."""
KernelReplacement = Literal["zero", "constant"]
"""The same for ``leave_one_out``."""
REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)
KERNEL_REPLACEMENTS: tuple[KernelReplacement, ...] = get_args(KernelReplacement)


@dataclass(frozen=True)
class Attribution:
    """A network's accuracy for every subset of its kernel kinds, with the other kinds removed from all layers."""

    kinds: tuple[str, ...]
    """Symbols of the kinds present in the network."""
    correct: dict[frozenset[str], int]
    """For each subset of kinds to keep, the number of correctly classified images."""
    images: int
    """The number of images in the data."""
    replaced_by: Replacement
    """What stands for a removed kernel."""

    def accuracy(self, kept: Iterable[str]) -> float:
        """Top-1 accuracy in percent with only these kinds, such as ``["G", "P"]`` or ``"G"``.

        Kinds absent from the network have no effect. Raises ValueError for a symbol that is no kind.
        """
        kept = [kept] if isinstance(kept, str) else list(kept)
        if unknown := [symbol for symbol in kept if symbol not in KINDS]:
            raise ValueError(f"unknown kind '{unknown[0]}'; known: {', '.join(KINDS)}")
        return 100 * self.correct[frozenset(kept) & frozenset(self.kinds)] / self.images

    @property
    def drop(self) -> float:
        """The accuracy lost by removing all kinds, in percentage points."""
        return self.accuracy(KINDS) - self.accuracy(())

    def leave_one_out(self) -> dict[str, float]:
        """For each kind in the network, the accuracy lost by removing it alone, in percentage points."""
        return {kind: self.accuracy(KINDS) - self.accuracy(KINDS.keys() - {kind}) for kind in self.kinds}

    def shapley(self) -> dict[str, float]:
        """Computes each kind's exact Shapley value, in percentage points; the values add up to ``drop``.

        It is the kind's mean gain in accuracy, over all orders in which the kinds can be added. A kind absent from
        the network has value 0. Source: Shapley, A value for n-person games, 1953.
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
def attribute(model: nn.Module, batches: Batches, replace: Replacement = "zero", progress: bool = True) -> Attribution:
    """Measures a network's accuracy for every subset of its kernel kinds, with the others removed from all layers.

    This takes one pass over the data, in which the network processes each batch once per subset. A convolution is
    linear in its kernels, so the first analytic layer's output for each kind is computed once per batch and summed for
    each subset. The inputs of later layers depend on the subset; these layers convolve with the kernels of the kinds
    that are kept.

    Args:
        model: a network with at least one analytic layer.
        batches: starts a pass over the data.
        replace: what stands for a removed kernel: ``zero``, nothing; ``mean``, its mean output in the intact network,
            per output channel over all images and positions (which takes another pass); ``constant``, a kernel with the
            same sum whose weights are all equal, so that the response to a constant image remains.
        progress: show progress bars if stderr is a terminal.

    Raises:
        ValueError: for a network without analytic layers or with one whose forward pass is patched, no data, outputs or
            labels of other shapes, an unknown ``replace``, or ``mean`` for layers converted from a subclass of
            nn.Conv2d.
    """
    _check_replacement(replace, REPLACEMENTS)
    layers = _require_measurable_layers(model).values()
    kinds = tuple(symbol for symbol in KINDS if any(symbol in layer.slot_kinds for layer in layers))
    subsets = [frozenset(kept) for size in range(len(kinds) + 1) for kept in combinations(kinds, size)]
    correct = dict.fromkeys(subsets, 0)
    images = 0
    with eval_mode(model):
        parts = {layer: _split_by_kind(layer, kinds) for layer in layers}
        constants = {
            layer: {symbol: _flatten_kernels(part) for symbol, part in parts[layer].items()}
            for layer in (layers if replace == "constant" else ())
        }
        first = _find_first_layer(model, layers, batches)
        means = _compute_mean_outputs(model, parts, batches, progress) if replace == "mean" else {}
        bar = tqdm(desc=f"{len(subsets)} subsets", unit="image", disable=None if progress else True)
        for inputs, labels in batches():
            images += len(labels)
            first_outputs = _SubsetOutputs()
            for kept in subsets:
                overrides: dict[AnalyticConv2d, Callable[[Tensor], Tensor]] = {
                    layer: partial(
                        _compute_reduced_output,
                        layer,
                        parts[layer],
                        constants.get(layer, {}),
                        kept,
                        means.get(layer, {}),
                        first_outputs if layer is first else None,
                    )
                    for layer in layers
                }
                with _override_forward(overrides):
                    correct[kept] += _count_correct(model, inputs, labels)
            bar.update(len(labels))
        bar.close()
    if not images:
        raise ValueError("the data set is empty")
    return Attribution(kinds, correct, images, replace)


@torch.no_grad()
def leave_one_out(
    model: nn.Module,
    batches: Batches,
    replace: KernelReplacement = "zero",
    progress: bool = True,
    slots: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Measures the accuracy lost by removing each kernel of the analytic layers on its own.

    The network processes each batch once per slot.

    Args:
        model: a network with at least one analytic layer.
        batches: starts a pass over the data.
        replace: what stands for the removed kernel: ``zero`` or ``constant``, as for ``attribute``.
        progress: show progress bars if stderr is a terminal.
        slots: layer name -> the slots whose kernels are removed; None: all.

    Returns:
        Layer name -> (slots,) float64, in percentage points; negative if the network is better without the kernel, or
        without the filter in a filter mosaic.

    Raises:
        ValueError: for a network without analytic layers or with one whose forward pass is patched, no data, outputs or
            labels of other shapes, another ``replace``, or a name in ``slots`` that is none of an analytic layer.
        IndexError: for a slot that a layer does not have.
    """
    _check_replacement(replace, KERNEL_REPLACEMENTS)
    layers = _require_measurable_layers(model)
    for name, of_layer in (slots or {}).items():
        if name not in layers:
            raise ValueError(f"no analytic layer is named '{name}'; the network has: {', '.join(layers)}")
        for slot in of_layer:
            layers[name].get_kind_of_slot(slot)
    slots = {name: range(len(layer.slot_kinds)) for name, layer in layers.items()} if slots is None else slots
    correct_lost = {name: torch.zeros(len(of_layer), dtype=torch.float64) for name, of_layer in slots.items()}
    images = 0
    with eval_mode(model):
        for inputs, labels in batches():
            images += len(labels)
            correct = _count_correct(model, inputs, labels)
            bar = tqdm(
                desc=f"kernels, {images} images",
                total=sum(map(len, correct_lost.values())),
                disable=None if progress else True,
            )
            for name, of_layer in slots.items():
                layer = layers[name]
                all_slots = torch.arange(len(layer.slot_kinds))
                for i, slot in enumerate(of_layer):
                    weight = layer.select_slots(all_slots != slot)
                    if replace == "constant":
                        weight = weight + _flatten_kernels(layer.select_slots(all_slots == slot))
                    with _override_forward({layer: partial(layer.convolve, weight=weight, bias=layer.bias)}):
                        correct_lost[name][i] += correct - _count_correct(model, inputs, labels)
                    bar.update()
            bar.close()
    if not images:
        raise ValueError("the data set is empty")
    return {name: 100 * values / images for name, values in correct_lost.items()}


def _check_replacement(replace: str, known: Sequence[str]) -> None:
    if replace not in known:
        raise ValueError(f"unknown replace '{replace}'; known: {', '.join(known)}")


def _require_measurable_layers(model: nn.Module) -> dict[str, AnalyticConv2d]:
    layers = require_analytic_layers(model)
    for name, layer in layers.items():
        refuse_patched_forward(layer, f"cannot measure {name or 'the layer'}")
    return layers


def _flatten_kernels(weight: Tensor) -> Tensor:
    """Replaces each kernel of a weight (out, in / groups, kh, kw) by a constant one with the same sum."""
    return weight.mean((-2, -1), keepdim=True).expand_as(weight)


def _count_correct(model: nn.Module, inputs: Tensor, labels: Tensor) -> int:
    logits = model(inputs.clone())  # some networks edit their input in place
    if not isinstance(logits, Tensor) or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        got = f"of the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"a network must return logits (n, classes) for labels (n,), got {got} for labels {tuple(labels.shape)}"
        )
    return int((logits.argmax(1) == labels).sum())


@contextmanager
def _override_forward(overrides: Mapping[AnalyticConv2d, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replaces the forward passes of layers temporarily; hooks still run."""

    def take_input(forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        return forward(input)

    for layer, forward in overrides.items():
        layer.forward = partial(take_input, forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in overrides:
            del layer.forward


@contextmanager
def _register_pre_hooks(layers: Iterable[AnalyticConv2d], hook: Callable[..., None]) -> Iterator[None]:
    """Registers a forward pre-hook, which takes a layer and its input, temporarily."""
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: hook(layer, get_input(args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split_by_kind(layer: AnalyticConv2d, kinds: Iterable[str]) -> dict[str, Tensor]:
    """For each kind in the layer, the layer's weight with the kernels of all other kinds set to zero."""
    slot_kinds = layer.slot_kinds
    return {
        symbol: layer.select_slots(torch.tensor([kind == symbol for kind in slot_kinds]))
        for symbol in kinds
        if symbol in slot_kinds
    }


def _find_first_layer(model: nn.Module, layers: Iterable[AnalyticConv2d], batches: Batches) -> AnalyticConv2d | None:
    """Finds the first analytic layer to run; None unless it runs once per forward pass and is linear in its kernels."""
    calls: list[AnalyticConv2d] = []
    with _register_pre_hooks(layers, lambda layer, _: calls.append(layer)):
        inputs, _ = next(iter(batches()), (None, None))
        if inputs is not None:
            model(inputs[:1].clone())
    return calls[0] if calls and calls.count(calls[0]) == 1 and calls[0].host is None else None


@dataclass
class _SubsetOutputs:
    """A layer's outputs for one batch, for every subset of kinds.

    The kinds are split into two halves and the output for each subset of a half is stored. The output for any subset
    then takes one addition, and each kind is convolved only once.
    """

    halves: list[dict[frozenset[str], Tensor]] = field(default_factory=list)

    def get(
        self,
        layer: AnalyticConv2d,
        x: Tensor,
        parts: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        kept: frozenset[str],
    ) -> Tensor:
        symbols = list(parts)
        split = symbols[: len(symbols) // 2], symbols[len(symbols) // 2 :]
        if not self.halves:
            outputs = {symbol: layer.convolve(x, weight) for symbol, weight in parts.items()}
            removed = {symbol: layer.convolve(x, weight) for symbol, weight in constants.items()}
            zero = torch.zeros_like(outputs[symbols[0]])
            bias = zero if layer.bias is None else zero + layer.bias[:, None, None]
            for half, start in zip(split, (zero, bias), strict=True):
                subsets = [subset for size in range(len(half) + 1) for subset in combinations(half, size)]
                by_subset = {}
                for subset in subsets:
                    present = removed | {symbol: outputs[symbol] for symbol in subset}
                    by_subset[frozenset(subset)] = sum((present[symbol] for symbol in half if symbol in present), start)
                self.halves.append(by_subset)
        return self.halves[0][kept & frozenset(split[0])] + self.halves[1][kept & frozenset(split[1])]


def _compute_reduced_output(
    layer: AnalyticConv2d,
    parts: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    kept: frozenset[str],
    means: Mapping[str, Tensor],
    outputs: _SubsetOutputs | None,
    x: Tensor,
) -> Tensor:
    """Computes a layer's output with only the kept kinds, and with what stands for each removed kind.

    That is a weight in ``constants``, a mean output in ``means``, or nothing.
    """
    if outputs is not None:
        output = outputs.get(layer, x, parts, constants, kept)
    else:
        present = {symbol: part if symbol in kept else constants.get(symbol) for symbol, part in parts.items()}
        weights = [weight for weight in present.values() if weight is not None]
        weight = reduce(torch.add, weights) if weights else torch.zeros_like(layer.weight)
        output = layer.convolve(x, weight, layer.bias)
    for symbol, mean in means.items():
        if symbol not in kept:
            output = output + mean[:, None, None]
    return output


def _compute_mean_outputs(
    model: nn.Module, parts: Mapping[AnalyticConv2d, Mapping[str, Tensor]], batches: Batches, progress: bool
) -> dict[AnalyticConv2d, dict[str, Tensor]]:
    """Computes each kind's mean output per output channel, (out,), in the intact network."""
    if any(layer.host is not None for layer in parts):
        raise ValueError(
            "replace='mean' does not support layers converted from a subclass of nn.Conv2d; use replace='zero'"
        )
    sums = {
        layer: {symbol: torch.zeros(layer.out_channels, dtype=torch.float64) for symbol in by_kind}
        for layer, by_kind in parts.items()
    }
    counts = dict.fromkeys(parts, 0)

    def accumulate(layer: AnalyticConv2d, x: Tensor) -> None:
        for symbol, weight in parts[layer].items():
            output = layer.convolve(x, weight)
            output = output.cpu() if output.device.type == "mps" else output  # Apple's GPUs have no float64
            sums[layer][symbol] += output.double().sum((0, -2, -1)).cpu()
        counts[layer] += output.numel() // layer.out_channels

    with _register_pre_hooks(parts, accumulate):
        for inputs, _ in tqdm(batches(), desc="mean outputs", disable=None if progress else True):
            model(inputs.clone())
    return {
        layer: {symbol: (total / max(counts[layer], 1)).to(layer.weight) for symbol, total in by_kind.items()}
        for layer, by_kind in sums.items()
    }
