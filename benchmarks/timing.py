"""Times tasks that alternate, so that other work on the machine and a drift of its speed affect all of them alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from training.data import Data

WORKERS = (0, 2)
"""Processes of the DataLoaders to compare with."""
Task = Callable[[int], object]
"""Takes the number of the round."""
Seconds = dict[str, list[float]]
Feed = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts an epoch of images, ready for the network, and labels."""


def time_alternately(tasks: Mapping[str, Task], rounds: int, title: str = "rounds") -> tuple[Seconds, Seconds]:
    """Runs every task once per round, in an order that is reversed in every other round.

    Returns:
        For each task, its wall time and its processor time in each round.
    """
    wall: Seconds = {name: [] for name in tasks}
    processor: Seconds = {name: [] for name in tasks}
    for number in tqdm(range(rounds), desc=title, leave=False, disable=None):
        for name in list(tasks)[:: -1 if number % 2 else 1]:
            started = time.perf_counter(), time.process_time()
            tasks[name](number)
            wall[name].append(time.perf_counter() - started[0])
            processor[name].append(time.process_time() - started[1])
    return wall, processor


def compute_ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, reference, strict=True)]


def format_ratios(ratios: Sequence[float], digits: int = 2) -> str:
    """The median, the smallest and the largest of some ratios."""
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return f"{median:5.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def feed_from_memory(data: Data, batch_size: int) -> Feed:
    """Our batches: shuffled, augmented and normalized."""

    def feed() -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(data.train), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = data.train[order[start : start + batch_size]]
            yield data.normalize(data.augmentation(batch.images, generator)), batch.labels

    return feed
