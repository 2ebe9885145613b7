"""Time of an epoch of LeNet-5 on MNIST with torchvision's transforms in a DataLoader, relative to our batches.

    python benchmarks/epoch.py data.root=/data

The two alternate. Both train the same model with the same optimizer, the MNIST table's batch size and as many images;
only the way the images reach the model differs. They are timed with normalization alone, and with the MNIST table's
augmentation (shifts by up to a pixel) as well.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST
from tqdm import tqdm

from training.config import compose
from training.data import Data
from training.optim import build_optimizer
from training.settings import RunSettings, build_model, load_run_data, parse_run

ROUNDS = 5
WORKERS = (0, 2)

Feed = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def main() -> None:
    for shift in (0, 1):
        overrides = ["data=mnist", "model=lenet", "trainer.batch_size=256", *sys.argv[1:], f"data.shift={shift}"]
        settings = parse_run(compose(overrides))
        ratios = measure_ratios(settings)
        title = "normalized" if shift == 0 else "normalized and shifted by up to a pixel"
        size = settings.trainer.batch_size
        print(f"{title}; {ROUNDS} epochs each, {torch.get_num_threads()} threads, batches of {size}; relative to ours:")
        for name, values in ratios.items():
            print(f"  {name:24} {statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})")


def measure_ratios(settings: RunSettings) -> dict[str, list[float]]:
    """Measures the time of each way to feed the model relative to ours, one ratio per round."""
    data, size = load_run_data(settings), settings.trainer.batch_size
    root = settings.data["root"]
    feeds = {"ours": feed_from_memory(data, size)}
    feeds |= {f"DataLoader, {n} workers": feed_from_loader(data, root, size, n) for n in WORKERS}
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in tqdm(range(ROUNDS), desc="rounds", disable=None):
        for name, feed in feeds.items():
            model = build_model(settings, data).to(memory_format=data.memory_format)
            optimizer = build_optimizer(model, settings.optim)
            started = time.perf_counter()
            train(model, optimizer, feed())
            seconds[name].append(time.perf_counter() - started)
    return {name: [a / b for a, b in zip(values, seconds["ours"], strict=True)] for name, values in seconds.items()}


def feed_from_memory(data: Data, size: int) -> Feed:
    def feed() -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(data.train), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            batch = data.train[order[start : start + size]]
            yield data.normalize(data.augmentation(batch.images, generator)), batch.labels

    return feed


def feed_from_loader(data: Data, root: str, size: int, workers: int) -> Feed:
    steps: list[nn.Module | object] = [transforms.RandomCrop(28, padding=1)] if data.augmentation.shift else []
    steps += [transforms.ToTensor(), transforms.Normalize(data.mean.flatten() / 255, data.std.flatten() / 255)]
    images = Subset(MNIST(root, transform=transforms.Compose(steps)), range(len(data.train)))
    return lambda: DataLoader(images, size, shuffle=True, drop_last=True, num_workers=workers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
