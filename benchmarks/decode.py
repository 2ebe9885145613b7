"""Time to load an epoch of large images, decoding the files in each epoch, relative to our image cache.

    python benchmarks/decode.py [data=imagefolder data.title=mine data.root=/data]

The two alternate, without training. Both yield normalized random resized crops of 224 pixels in batches of 64, flipped
at random. Without arguments, the images are 1,024 JPEG files of 640 x 480, cut from scikit-learn's two sample
photographs. The single pass that fills the cache is timed separately.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from training.config import compose
from training.data import Data
from training.settings import load_run_data, parse_run

ROUNDS = 5
WORKERS = (0, 2)
BATCH_SIZE = 64

Feed = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        overrides = sys.argv[1:] or ["data.title=photographs", f"data.root={write_photographs(Path(folder))}"]
        cfg = compose(["data=imagefolder", *overrides, f"data.cache={folder}/cache"])
        started = time.perf_counter()
        data = load_run_data(parse_run(cfg))
        fill_seconds = time.perf_counter() - started
        feeds = {"ours": feed_from_cache(data)}
        feeds |= {f"DataLoader, {n} workers": feed_from_files(Path(cfg.data.root) / "train", data, n) for n in WORKERS}
        seconds: dict[str, list[float]] = {name: [] for name in feeds}
        for _ in tqdm(range(ROUNDS), desc="rounds", disable=None):
            for name, feed in feeds.items():
                started = time.perf_counter()
                images = sum(len(labels) for _, labels in feed())
                seconds[name].append((time.perf_counter() - started) / images)
    print(f"{ROUNDS} epochs of {len(data.train)} images, {torch.get_num_threads()} threads, batches of {BATCH_SIZE}")
    print("time per image relative to ours:")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["ours"], strict=True)]
        print(f"  {name:24} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    total = len(data.train) + len(data.val) + len(data.test)
    print(f"  {'filling the cache, once':24} {fill_seconds / total / statistics.median(seconds['ours']):5.2f}")


def write_photographs(root: Path) -> Path:
    """Writes crops of two photographs as JPEG files in the layout of an image folder."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for split, count in (("train", 1024), ("val", 8), ("test", 8)):
        for i in range(count):
            left, top = rng.uniform(0, 100, 2)
            box = (left, top, left + 520, top + 320)
            path = root / split / f"{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photographs[i % 2].resize((640, 480), Image.Resampling.BICUBIC, box).save(path, quality=90)
    return root


def feed_from_cache(data: Data) -> Feed:
    def feed() -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(data.train), generator=generator)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = data.train[order[start : start + BATCH_SIZE]]
            yield data.normalize(data.augmentation(batch.images, generator)), batch.labels

    return feed


def feed_from_files(folder: Path, data: Data, workers: int) -> Feed:
    crop, min_area = data.augmentation.crop, data.augmentation.min_area
    assert crop is not None and min_area is not None
    steps = [v2.RandomResizedCrop(crop, (min_area, 1.0)), v2.RandomHorizontalFlip(), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean.flatten() / 255, data.std.flatten() / 255)]
    images = ImageFolder(folder, v2.Compose(steps))
    return lambda: DataLoader(images, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=workers)


if __name__ == "__main__":
    main()
