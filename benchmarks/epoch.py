"""An epoch of LeNet-5 on MNIST: our batches against torchvision's DataLoader and transforms, in turn, as a ratio.

    python benchmarks/epoch.py data.root=/data

Both train the same model with the same optimiser and the MNIST table's batch size on as many images; only the feeding
differs. Measured twice: images that are normalised alone, and with the MNIST table's augmentation (moved by up to a
pixel) besides.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST
from tqdm import tqdm

from training import data as datasets
from training.config import compose
from training.loop import build, build_optimizer, prepare

ROUNDS = 5
WORKERS = (0, 2)

Feed = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def main() -> None:
    cfg = compose(["data=mnist", "model=lenet", "trainer.batch_size=256", *sys.argv[1:]])
    data = datasets.load(cfg.data)
    print(f"{ROUNDS} epochs each, in turn, {torch.get_num_threads()} threads, batches of {cfg.trainer.batch_size}")
    for shift in (0, 1):
        cfg.data.shift = shift
        ratios = compare(cfg, data)
        print("normalised" if shift == 0 else "normalised and moved by up to a pixel", "(time relative to ours):")
        for name, values in ratios.items():
            print(f"  {name:24} {statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})")


def compare(cfg: DictConfig, data: datasets.Data) -> dict[str, list[float]]:
    """Each feed's seconds over those of ours, round by round."""
    feeds = {"ours": ours(cfg, data), **{f"DataLoader, {n} workers": usual(cfg, data, n) for n in WORKERS}}
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in tqdm(range(ROUNDS), desc="rounds", disable=None):
        for name, feed in feeds.items():
            model = build(cfg, data)
            if cfg.trainer.channels_last:
                model.to(memory_format=torch.channels_last)
            optimizer = build_optimizer(model, cfg)
            started = time.perf_counter()
            epoch(model, optimizer, feed())
            seconds[name].append(time.perf_counter() - started)
    return {name: [a / b for a, b in zip(values, seconds["ours"], strict=True)] for name, values in seconds.items()}


def ours(cfg: DictConfig, data: datasets.Data) -> Feed:
    def feed() -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(data.train), generator=generator)
        for i in range(0, len(order) - cfg.trainer.batch_size + 1, cfg.trainer.batch_size):
            batch = data.train[order[i : i + cfg.trainer.batch_size]]
            yield prepare(datasets.augment(batch.images, cfg.data, generator), data, cfg), batch.labels

    return feed


def usual(cfg: DictConfig, data: datasets.Data, workers: int) -> Feed:
    steps: list[nn.Module | object] = [transforms.RandomCrop(28, padding=1)] if cfg.data.shift else []
    steps += [transforms.ToTensor(), transforms.Normalize(data.mean.flatten() / 255, data.std.flatten() / 255)]
    images = Subset(MNIST(cfg.data.root, transform=transforms.Compose(steps)), range(len(data.train)))
    return lambda: DataLoader(images, cfg.trainer.batch_size, shuffle=True, drop_last=True, num_workers=workers)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
