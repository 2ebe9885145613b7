"""An epoch of LeNet-5 on MNIST: our batches against torchvision's DataLoader and transforms, in turn, as a ratio.

    python benchmarks/epoch.py data.root=/data

Both train the same model with the same optimiser and batch size on the same training images; only the feeding differs.
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

from training import data as datasets
from training.config import compose
from training.loop import build, build_optimizer, prepare

ROUNDS = 5
WORKERS = (0, 2)


def main() -> None:
    cfg = compose(["data=mnist", "model=lenet", "trainer.batch_size=128", *sys.argv[1:]])
    size = cfg.trainer.batch_size
    data = datasets.load(cfg.data)
    mean, std = float(data.mean) / 255, float(data.std) / 255
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,), (std,))])
    images = Subset(MNIST(cfg.data.root, transform=usual), range(len(data.train)))

    def ours() -> Iterable[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(data.train))
        for i in range(0, len(order) - size + 1, size):
            batch = data.train[order[i : i + size]]
            yield prepare(batch.images, data, cfg), batch.labels

    def loader(workers: int) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
        return lambda: DataLoader(images, size, shuffle=True, drop_last=True, num_workers=workers)

    feeds = {"ours": ours, **{f"DataLoader, {n} workers": loader(n) for n in WORKERS}}
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in tqdm(range(ROUNDS), desc="rounds", disable=None):
        for name, feed in feeds.items():
            model = build(cfg, data.channels, data.classes)
            if cfg.trainer.channels_last:
                model.to(memory_format=torch.channels_last)
            started = time.perf_counter()
            epoch(model, build_optimizer(model, cfg), feed())
            seconds[name].append(time.perf_counter() - started)
    print(
        f"{ROUNDS} epochs each, in turn, {torch.get_num_threads()} threads; time relative to ours, median (min to max)"
    )
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["ours"], strict=True)]
        print(f"{name:24} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
