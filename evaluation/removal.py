"""What a trained network loses without its kernels: without a kind of kernel, and without single kernels."""

import random
from collections.abc import Iterator
from functools import partial
from statistics import mean
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from acl.explain import KERNEL_REPLACEMENTS, attribute, leave_one_out
from acl.inspection import analytic_layers
from evaluation.finished_run import FinishedRun
from training.data import Data
from training.record import Percent
from training.splits import Split
from training.validation import Count

MAX_KERNELS = 200
"""Kernels of each kind that are removed one by one; of kinds with more, random ones."""
Points = Annotated[float, Field(ge=-100, le=100)]


class Loss(TypedDict):
    """What a network loses without kernels of one kind, in points of validation accuracy."""

    kernels: Count
    """The number of kernels of the kind in the network, or of filters in filter mosaics."""
    kind: Points
    """Lost without all of them."""
    shapley: Points
    """Their Shapley value."""
    kernel: Points
    """Lost without one of them, on average over up to ``MAX_KERNELS``."""
    free: Percent
    """The share of these that cost nothing: without one of them, at least as many images are correctly classified. A
    kernel of no effect can cost an image by chance, and an effect on less than one image is not seen."""


def iterate_pairs(data: Data, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the images and labels of a split for ``acl.explain``, which keeps up to 16 outputs per batch."""
    for batch in data.eval_batches(split, max_pixels=2**20, max_size=500):
        yield batch.images, batch.labels


def measure_removal(run: FinishedRun, data: Data) -> dict[str, Any]:
    """Measures what a network loses without kinds of kernels, and without single kernels.

    The network processes each validation image twice per subset of kinds, and twice per kernel
    that is removed on its own.

    Returns:
        One of ``acl.explain.KERNEL_REPLACEMENTS`` -> symbol of the kind -> ``Loss``; empty for a network without
        analytic layers.
    """
    layers = analytic_layers(run.model)
    if not layers:
        return {}
    batches = partial(iterate_pairs, data, data.val)
    by_kind: dict[str, list[tuple[str, int]]] = {}  # layer and slot of each kernel
    for name, layer in layers.items():
        for slot, symbol in enumerate(layer.slot_kinds):
            by_kind.setdefault(symbol, []).append((name, slot))
    generator = random.Random(run.settings.seed)
    samples = {symbol: generator.sample(kernels, min(len(kernels), MAX_KERNELS)) for symbol, kernels in by_kind.items()}
    removed = [kernel for kernels in samples.values() for kernel in kernels]
    slots = {name: [slot for layer, slot in removed if layer == name] for name in layers}
    values: dict[str, Any] = {}
    for replace in KERNEL_REPLACEMENTS:
        attribution = attribute(run.model, batches, replace)
        lost_kinds, shapley = attribution.leave_one_out(), attribution.shapley()
        lost_by_layer = leave_one_out(run.model, batches, replace, slots=slots)
        lost = {(name, slot): float(lost_by_layer[name][i]) for name in slots for i, slot in enumerate(slots[name])}
        values[replace] = {
            symbol: {
                "kernels": len(by_kind[symbol]),
                "kind": lost_kinds[symbol],
                "shapley": shapley[symbol],
                "kernel": mean(lost[kernel] for kernel in samples[symbol]),
                "free": 100 * mean(lost[kernel] <= 0 for kernel in samples[symbol]),
            }
            for symbol in attribution.kinds
        }
    return values
