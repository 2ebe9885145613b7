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
from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import make_feeds, print_ratios, time_alternately
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from training.config import compose
from training.data import Data
from training.settings import load_run_data, parse_run

ROUNDS = 5
BATCH_SIZE = 64


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        overrides = sys.argv[1:] or ["data.title=photographs", f"data.root={write_photographs(Path(folder))}"]
        cfg = compose(["data=imagefolder", *overrides, f"data.cache={folder}/cache"])
        started = time.perf_counter()
        data = load_run_data(parse_run(cfg))
        fill_seconds = time.perf_counter() - started
        feeds = make_feeds(data, BATCH_SIZE, read_files(Path(cfg.data.root) / "train", data))
        tasks = {name: lambda _, feed=feed: deque(feed(), maxlen=0) for name, feed in feeds.items()}
        seconds, _ = time_alternately(tasks, ROUNDS)
    print(f"{ROUNDS} epochs of {len(data.train)} images, {torch.get_num_threads()} threads, batches of {BATCH_SIZE}")
    print("time per image relative to ours:")
    for name, values in seconds.items():
        print_ratios(name, values, seconds["ours"])
    fill_seconds_per_image = fill_seconds / (len(data.train) + len(data.val) + len(data.test))
    seconds_per_image = statistics.median(seconds["ours"]) / (len(data.train) // BATCH_SIZE * BATCH_SIZE)
    print(f"  {'filling the cache, once':26} {fill_seconds_per_image / seconds_per_image:.3f}")


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


def read_files(folder: Path, data: Data) -> ImageFolder:
    """Image files, decoded and transformed as our images are."""
    crop, min_area = data.augmentation.crop, data.augmentation.min_area
    assert crop is not None and min_area is not None
    steps = [v2.RandomResizedCrop(crop, (min_area, 1.0)), v2.RandomHorizontalFlip(), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean.flatten() / 255, data.std.flatten() / 255)]
    return ImageFolder(folder, v2.Compose(steps))


if __name__ == "__main__":
    main()
