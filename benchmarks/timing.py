"""Times tasks that alternate, so that other work on the machine and a drift of its speed affect all of them alike."""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.data import Data

WORKERS = (0, 2)
"""Processes of the DataLoaders to compare with."""
Task = Callable[[int], object]
"""Takes the number of the round."""
Seconds = dict[str, list[float]]
Feed = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts an epoch of images, ready for the network, and labels."""


def parse_arguments(**defaults: str) -> dict[str, str]:
    """Reads arguments such as rounds=7. Exits with one line for an unknown one, and for fewer than 2 rounds."""
    options = dict(defaults)
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name not in defaults or not value:
            sys.exit(f"error: unknown argument {argument}; known: {', '.join(f'{name}=...' for name in defaults)}")
        options[name] = value
    if not (rounds := options.get("rounds", "2")).isdecimal() or int(rounds) < 2:
        sys.exit(f"error: rounds={rounds} is invalid: it should be a number of at least 2")
    return options


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


def print_ratios(name: str, seconds: Sequence[float], reference: Sequence[float]) -> None:
    """Prints the median, the smallest and the largest ratio."""
    ratios = compute_ratios(seconds, reference)
    print(f"  {name:26} {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def make_feeds(data: Data, batch_size: int, peer: Dataset[tuple[Tensor, Tensor]]) -> dict[str, Feed]:
    """Our batches, shuffled, augmented and normalized; and those of DataLoaders of a data set that does the same."""

    def feed_ours() -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(data.train), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = data.train[order[start : start + batch_size]]
            yield data.normalize(data.augmentation(batch.images, generator)), batch.labels

    loaders = {
        f"DataLoader, {n} workers": partial(DataLoader, peer, batch_size, shuffle=True, drop_last=True, num_workers=n)
        for n in WORKERS
    }
    return {"ours": feed_ours, **loaders}
