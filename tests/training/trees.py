"""Small data sets in the official layouts; an image tells its class by its colour."""

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def image(path: Path, kind: int, seed: int, width: int = 48, height: int = 40) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 40, (height, width, 3)) + np.array([(kind * 37) % 200, (kind * 91) % 200, 100])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def flowers102(root: Path, classes: int = 3) -> Path:
    """Of each class 4 images to train on, 2 for validation and 3 to test, in no order."""
    folder = root / "flowers-102"
    n = 9 * classes
    labels = np.arange(n) % classes + 1
    for i, label in enumerate(labels, 1):
        image(folder / "jpg" / f"image_{i:05d}.jpg", label - 1, i)
    ids = np.arange(1, n + 1)
    cuts = {"trnid": ids[: 4 * classes][::-1], "valid": ids[4 * classes : 6 * classes], "tstid": ids[6 * classes :]}
    savemat(folder / "setid.mat", {name: part[None] for name, part in cuts.items()})
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    return folder


def food101(root: Path, classes: int = 3, train: int = 10, test: int = 4) -> Path:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, count, start in (("train", train, 0), ("test", test, 1000)):
        listed = {f"dish_{k}": [f"dish_{k}/{start + i}" for i in range(count)] for k in range(classes)}
        for k in range(classes):
            for i in range(count):
                image(folder / "images" / f"dish_{k}" / f"{start + i}.jpg", k, start + i)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
    return folder


def imagefolder(root: Path, classes: int = 3, size: int = 40, **counts: int) -> Path:
    for split, count in counts.items():
        for k in range(classes):
            for i in range(count):
                image(root / split / f"kind_{k}" / f"{i}.png", k, i, size, size)
    return root


def cifar10(root: Path, train: int = 1100, test: int = 50) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, n in (*((f"data_batch_{i}", train) for i in range(1, 6)), ("test_batch", test)):
        labels = np.arange(n) % 10
        data = np.repeat((labels * 20)[:, None], 3072, 1).astype(np.uint8)
        data[:, 1024:2048] = 7
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels.tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return folder
