"""An epoch of large images fed for training: our cache against decoding each time, in turn, as a ratio.

    python benchmarks/decode.py [data=imagefolder data.title=mine data.root=/data]

Both give normalised random resized crops of 224 pixels in batches of 64, mirrored at random; no network is trained, so
that the feeding alone is compared. Without a root the images are 1,024 JPEGs of 640 x 480 cut out of scikit-learn's two
sample photographs. Decoding into the cache, once, is timed apart.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from training import data as datasets
from training.config import compose
from training.loop import prepare

ROUNDS = 5
WORKERS = (0, 2)
SIZE = 64


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        overrides = sys.argv[1:] or [
            "data=imagefolder",
            "data.title=photographs",
            f"data.root={photographs(Path(folder))}",
        ]
        cfg = compose(["data=imagefolder", *overrides, f"data.cache={folder}/cache"])
        started = time.perf_counter()
        data = datasets.load(cfg.data)
        once = time.perf_counter() - started
        feeds = {"ours": ours(cfg, data), **{f"DataLoader, {n} workers": usual(cfg, data, n) for n in WORKERS}}
        rates: dict[str, list[float]] = {name: [] for name in feeds}
        for _ in tqdm(range(ROUNDS), desc="rounds", disable=None):
            for name, feed in feeds.items():
                started = time.perf_counter()
                count = sum(len(labels) for _, labels in feed())
                rates[name].append((time.perf_counter() - started) / count)
    print(f"{ROUNDS} epochs of {len(data.train)} images, in turn, {torch.get_num_threads()} threads, batches of {SIZE}")
    print("time an image, relative to ours:")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["ours"], strict=True)]
        print(f"  {name:24} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    everything = len(data.train) + len(data.val) + len(data.test)
    print(f"  {'decoding, once':24} {once / everything / statistics.median(rates['ours']):5.2f}")


def photographs(root: Path) -> Path:
    """Cuts of two photographs, as JPEG files in an image folder."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for split, count in (("train", 1024), ("val", 8), ("test", 8)):
        for i in range(count):
            left, top = rng.uniform(0, 100, 2)
            box = (left, top, left + 520, top + 320)
            path = root / split / f"{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photos[i % 2].resize((640, 480), Image.Resampling.BICUBIC, box).save(path, quality=90)
    return root


Feed = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def ours(cfg: DictConfig, data: datasets.Data) -> Feed:
    def feed() -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(data.train), generator=generator)
        for i in range(0, len(order) - SIZE + 1, SIZE):
            batch = data.train[order[i : i + SIZE]]
            yield prepare(datasets.augment(batch.images, cfg.data, generator), data, cfg), batch.labels

    return feed


def usual(cfg: DictConfig, data: datasets.Data, workers: int) -> Feed:
    steps = [v2.RandomResizedCrop(cfg.data.crop, (cfg.data.min_area, 1.0)), v2.RandomHorizontalFlip(), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean.flatten() / 255, data.std.flatten() / 255)]
    images = ImageFolder(Path(cfg.data.root) / "train", v2.Compose(steps))
    return lambda: DataLoader(images, SIZE, shuffle=True, drop_last=True, num_workers=workers)


if __name__ == "__main__":
    main()
