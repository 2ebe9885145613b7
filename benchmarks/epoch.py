"""Time of an epoch of LeNet-5 on MNIST with torchvision's transforms in a DataLoader, relative to our batches.

    python benchmarks/epoch.py data.root=/data

The two alternate. Both train the same model with the same optimizer, the MNIST table's batch size and as many images;
only the way the images reach the model differs. They are timed with normalization alone, and with the MNIST table's
augmentation (shifts by up to a pixel) as well.
"""

import sys
from functools import partial

import torch
from timing import Feed, Task, make_feeds, print_ratios, time_alternately
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from training.config import compose
from training.data import Data
from training.optim import build_optimizer
from training.settings import build_model, load_run_data, parse_run

ROUNDS = 5


def main() -> None:
    for shift in (0, 1):
        overrides = ["data=mnist", "model=lenet", "trainer.batch_size=256", *sys.argv[1:], f"data.shift={shift}"]
        settings = parse_run(compose(overrides))
        data, size = load_run_data(settings), settings.trainer.batch_size
        tasks: dict[str, Task] = {}
        for name, feed in make_feeds(data, size, read_mnist(data, settings.data["root"])).items():
            model = build_model(settings, data).to(memory_format=data.memory_format)
            tasks[name] = partial(train, model, build_optimizer(model, settings.optim), feed)
        seconds, _ = time_alternately(tasks, ROUNDS)
        title = "normalized" if shift == 0 else "normalized and shifted by up to a pixel"
        print(f"{title}; {ROUNDS} epochs each, {torch.get_num_threads()} threads, batches of {size}; relative to ours:")
        for name, values in seconds.items():
            print_ratios(name, values, seconds["ours"])


def read_mnist(data: Data, root: str) -> Subset[tuple[Tensor, Tensor]]:
    """As many training images as ``data`` has, transformed like them."""
    steps: list[nn.Module | object] = [transforms.RandomCrop(28, padding=1)] if data.augmentation.shift else []
    steps += [transforms.ToTensor(), transforms.Normalize(data.mean.flatten() / 255, data.std.flatten() / 255)]
    return Subset(MNIST(root, transform=transforms.Compose(steps)), range(len(data.train)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, feed: Feed, _: int) -> None:
    for images, labels in feed():
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
