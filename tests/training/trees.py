"""Writes small data sets in their official layouts. The color or gray value of an image depends on its class."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat


def write_image(path: Path, label: int, seed: int, width: int = 48, height: int = 40) -> None:
    """Writes an image of noise around the color of its class."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 40, (height, width, 3)) + np.array([(label * 37) % 200, (label * 91) % 200, 100])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def write_idx(path: Path, array: torch.Tensor) -> None:
    """Writes one file of uint8 in MNIST's IDX format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())


def write_mnist(root: Path, name: str = "MNIST", train: int = 5200, test: int = 300) -> Path:
    """Writes images whose pixels all equal 20 times their label. Returns the folder of the files."""
    raw = root / name / "raw"
    for split, n in (("train", train), ("t10k", test)):
        labels = torch.arange(n) % 10
        write_idx(raw / f"{split}-images-idx3-ubyte", (labels[:, None, None] * 20).expand(n, 28, 28))
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels)
    return raw


def write_flowers102(root: Path, classes: int = 3) -> Path:
    """Writes 4 training, 2 validation and 3 test images per class; training ids are listed in descending order."""
    folder = root / "flowers-102"
    n = 9 * classes
    labels = np.arange(n) % classes + 1
    for i, label in enumerate(labels, 1):
        write_image(folder / "jpg" / f"image_{i:05d}.jpg", label - 1, i)
    ids = np.arange(1, n + 1)
    splits = {"trnid": ids[: 4 * classes][::-1], "valid": ids[4 * classes : 6 * classes], "tstid": ids[6 * classes :]}
    savemat(folder / "setid.mat", {name: split[None] for name, split in splits.items()})
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    return folder


def write_food101(root: Path, classes: int = 3, train: int = 10, test: int = 4) -> Path:
    """Writes ``train`` training and ``test`` test images per class."""
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, count, start in (("train", train, 0), ("test", test, 1000)):
        names = {f"dish_{k}": [f"dish_{k}/{start + i}" for i in range(count)] for k in range(classes)}
        for k in range(classes):
            for i in range(count):
                write_image(folder / "images" / f"dish_{k}" / f"{start + i}.jpg", k, start + i)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(names))
    return folder


def write_imagefolder(root: Path, classes: int = 3, size: int = 40, **counts: int) -> Path:
    """Writes images of each class; ``counts`` gives their number per split, such as ``train=5, test=3``."""
    for split, count in counts.items():
        for k in range(classes):
            for i in range(count):
                write_image(root / split / f"class_{k}" / f"{i}.png", k, i, size, size)
    return root


def write_cifar10(root: Path, train: int = 1100, test: int = 50) -> Path:
    """Writes ``train`` images to each training file, ``test`` to the test file: red 20 times the label, green 7."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, n in (*((f"data_batch_{i}", train) for i in range(1, 6)), ("test_batch", test)):
        labels = np.arange(n) % 10
        data = np.repeat((labels * 20)[:, None], 3072, 1).astype(np.uint8)
        data[:, 1024:2048] = 7
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels.tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return folder
