from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from tests.training import trees
from training import sets
from training.config import compose
from training.data import Data, load
from training.errors import UsageError


def config(name: str, root: Path, *overrides: str) -> DictConfig:
    words = [f"data={name}", f"data.root={root}", *overrides]
    if name != "cifar10":
        words += [f"data.cache={root}/cache", "data.size=32", "data.crop=24"]
    return compose([*words, *(["data.title=mine"] if name == "imagefolder" else [])]).data


def sizes(data: Data) -> list[int]:
    return [len(split) for split in (data.train, data.val, data.test)]


def told_by_colour(data: Data) -> bool:
    """Whether each image's colour is that of its label."""
    colours = [(split.images.float().mean((2, 3)), split.labels) for split in (data.train, data.val, data.test)]
    images, labels = (torch.cat(parts) for parts in zip(*colours, strict=True))
    middles = torch.stack([images[labels == k].mean(0) for k in range(data.classes)])
    return torch.equal(torch.cdist(images, middles).argmin(1), labels)


def test_flowers102_with_the_official_split(tmp_path: Path) -> None:
    trees.flowers102(tmp_path)
    data = load(config("flowers102", tmp_path))
    assert sizes(data) == [12, 6, 9] and data.classes == 3 and data.train.images.shape[1:] == (3, 32, 32)
    assert told_by_colour(data)
    assert data.mean.flatten().tolist() == pytest.approx([255 * v for v in (0.485, 0.456, 0.406)])


def test_food101_holds_a_tenth_of_each_class_out(tmp_path: Path) -> None:
    trees.food101(tmp_path)
    data = load(config("food101", tmp_path))
    assert sizes(data) == [27, 3, 12] and told_by_colour(data)
    assert data.val.labels.bincount().tolist() == [1, 1, 1]


def test_imagefolder_with_and_without_validation(tmp_path: Path) -> None:
    trees.imagefolder(tmp_path / "a", train=5, val=2, test=3)
    data = load(config("imagefolder", tmp_path / "a"))
    assert sizes(data) == [15, 6, 9] and told_by_colour(data)
    trees.imagefolder(tmp_path / "b", train=10, test=3)
    data = load(config("imagefolder", tmp_path / "b", "data.validation=0.2", "data.mean=null", "data.std=null"))
    assert sizes(data) == [24, 6, 9] and data.val.labels.bincount().tolist() == [2, 2, 2]
    normal = data.normalise(data.train.images)
    assert normal.mean().item() == pytest.approx(0, abs=1e-4) and normal.std().item() == pytest.approx(1, abs=1e-2)
    again = load(config("imagefolder", tmp_path / "b", "data.validation=0.2"))
    assert torch.equal(again.val.images, data.val.images)


def test_images_left_out_take_their_labels_along(tmp_path: Path) -> None:
    root = trees.imagefolder(tmp_path, train=5, val=2, test=3)
    for name in ("train/kind_0/1.png", "train/kind_2/4.png", "test/kind_1/0.png"):
        (root / name).write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"train/kind_0/1.png cannot be decoded"):
        load(config("imagefolder", root))
    data = load(config("imagefolder", root, "data.skip_undecodable=true"))
    assert sizes(data) == [13, 6, 8] and told_by_colour(data)


def test_cifar10_in_its_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trees.cifar10(tmp_path)
    with pytest.raises(UsageError, match=r"a file in .*cifar-10-batches-py is corrupt or cut short"):
        load(config("cifar10", tmp_path))  # torchvision unpickles nothing but the official files, by their checksums
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    data = load(config("cifar10", tmp_path))
    assert sizes(data) == [500, 5000, 50] and data.train.images.shape[1:] == (3, 32, 32)
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.images[:, 0, 3, 5], (split.labels * 20).to(torch.uint8))
        assert (split.images[:, 1] == 7).all()
    (folder / "test_batch").write_bytes(b"cut")
    with pytest.raises(UsageError, match="corrupt or cut short"):
        load(config("cifar10", tmp_path))


@pytest.mark.parametrize(
    ("name", "download", "where"),
    [
        ("cifar10", "CIFAR10.download", "cifar-10-batches-py"),
        ("flowers102", "Flowers102.download", "flowers-102"),
        ("food101", "Food101._download", "food-101"),
    ],
)
def test_missing_files_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, download: str, where: str
) -> None:
    def offline(self: Any) -> None:
        raise RuntimeError("Error downloading")

    kind, method = download.split(".")
    monkeypatch.setattr(getattr(sets.datasets, kind), method, offline)
    with pytest.raises(
        UsageError, match=rf"no .* in {tmp_path}/data/{where} and none could be downloaded; put there: "
    ):
        load(config(name, tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_class_that_a_split_lacks(tmp_path: Path) -> None:
    root = trees.imagefolder(tmp_path, train=5, val=2, test=3)
    for path in (root / "val/kind_1").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="the validation split has no image of 1 of 3 classes, among them 'kind_1'"):
        load(config("imagefolder", root))
    assert not (root / "cache").exists()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: trees.imagefolder(root, train=2), r"no folder .*/test; data=imagefolder reads"),
        (lambda root: (root / "train").mkdir(), r"no images in .*/train/<class>/"),
        (lambda root: trees.imagefolder(root, train=1, test=1), r"cannot hold out 3 of 3 training images"),
    ],
)
def test_a_tree_that_is_none(tmp_path: Path, prepare: Any, message: str) -> None:
    prepare(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(config("imagefolder", tmp_path))


@pytest.mark.parametrize(
    ("make", "name", "file"),
    [
        (trees.flowers102, "flowers102", "setid.mat"),
        (trees.flowers102, "flowers102", "imagelabels.mat"),
        (trees.food101, "food101", "meta/test.json"),
    ],
)
def test_a_corrupt_listing_is_named(tmp_path: Path, make: Any, name: str, file: str) -> None:
    path = make(tmp_path) / file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UsageError, match=rf"{path.name}.* is corrupt"):
        load(config(name, tmp_path))


def test_a_listed_image_that_is_not_there(tmp_path: Path) -> None:
    (trees.food101(tmp_path) / "images/dish_1/3.jpg").unlink()
    with pytest.raises(UsageError, match=r"dish_1/3.jpg is listed and not there"):
        load(config("food101", tmp_path))


def test_an_unknown_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown data\.name 'cifar11'; known: digits, mnist"):
        load(compose(["data.name=cifar11"]).data)
