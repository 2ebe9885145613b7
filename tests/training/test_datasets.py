import errno
import gzip
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from torchvision import datasets

from tests.training.trees import (
    write_cifar10,
    write_flowers102,
    write_food101,
    write_image,
    write_imagefolder,
    write_mnist,
)
from training.config import compose
from training.data import Data
from training.errors import UsageError
from training.image_folders import list_images
from training.settings import load_run_data, parse_run


def load(name: str, root: Path, *overrides: str) -> Data:
    """Loads the data set that these command-line options select."""
    options = [f"data={name}", f"data.root={root}"]
    if name in ("flowers102", "food101", "imagefolder"):
        options += [f"data.cache={root}/cache", "data.size=32", "data.crop=24"]
    if name == "imagefolder":
        options.append("data.title=mine")
    return load_run_data(parse_run(compose([*options, *overrides])))


def list_split_sizes(data: Data) -> list[int]:
    return [len(split) for split in (data.train, data.val, data.test)]


def labels_match_colors(data: Data) -> bool:
    """Whether the mean color of each image is closest to that of its class."""
    splits = (data.train, data.val, data.test)
    colors = torch.cat([split.images.float().mean((2, 3)) for split in splits])
    labels = torch.cat([split.labels for split in splits])
    class_colors = torch.stack([colors[labels == k].mean(0) for k in range(len(data.classes))])
    return torch.equal(torch.cdist(colors, class_colors).argmin(1), labels)


def accept_any_checksum(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(f"{module}.check_integrity", lambda path, md5=None: Path(path).is_file())


def test_digits_need_no_files(tmp_path: Path) -> None:
    data = load("digits", tmp_path / "missing")
    assert list_split_sizes(data) == [1237, 200, 360] and not (tmp_path / "missing").exists()
    assert data.train.images.shape[1:] == (1, 28, 28) and data.train.images.dtype == torch.uint8
    assert data.train.images.max() > 240


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", [str(digit) for digit in range(10)]),
        ("mnist", [str(digit) for digit in range(10)]),
        ("fashion_mnist", datasets.FashionMNIST.classes),
        ("cifar10", [str(label) for label in range(10)]),  # as in batches.meta
        ("flowers102", ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]),
        ("food101", ["dish_0", "dish_1", "dish_2"]),
        ("imagefolder", ["class_0", "class_1", "class_2"]),
    ],
)
def test_every_reader_names_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]
) -> None:
    accept_any_checksum(monkeypatch, "torchvision.datasets.cifar")
    write_mnist(tmp_path, "FashionMNIST" if name == "fashion_mnist" else "MNIST")
    write_cifar10(tmp_path)
    write_flowers102(tmp_path)
    write_food101(tmp_path)
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    data = load(name, tmp_path)
    assert data.classes == expected and data.train.labels.max() == len(expected) - 1


@pytest.mark.parametrize(("file", "offset"), [("train-images-idx3-ubyte", -1), ("t10k-labels-idx1-ubyte", -2)])
def test_digest_of_arrays_changes_with_pixels_and_labels(tmp_path: Path, file: str, offset: int) -> None:
    path = write_mnist(tmp_path) / file
    digest = load("mnist", tmp_path).digest
    assert load("mnist", tmp_path).digest == digest
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    assert load("mnist", tmp_path).digest != digest


def test_digits_splits_are_disjoint_and_fixed(tmp_path: Path) -> None:
    data = load("digits", tmp_path)
    images = torch.cat([data.train.images, data.val.images, data.test.images]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert torch.equal(load("digits", tmp_path).val.images, data.val.images)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files_are_read(tmp_path: Path, name: str, folder: str) -> None:
    write_mnist(tmp_path, folder)
    data = load(name, tmp_path)
    assert list_split_sizes(data) == [200, 5000, 300]
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.images[:, 0, 3, 5], (split.labels * 20).to(torch.uint8))


def test_compressed_idx_files_are_read(tmp_path: Path) -> None:
    for path in list(write_mnist(tmp_path).iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert len(load("mnist", tmp_path).test) == 300


def test_truncated_idx_archive_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(content)[:-20])
    path.unlink()
    monkeypatch.setattr(datasets.MNIST, "download", lambda _: path.write_bytes(content))
    assert len(load("mnist", tmp_path).test) == 300


@pytest.mark.parametrize("damage", ["truncated", "empty", "wrong magic"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_corrupt_idx_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    path = write_mnist(tmp_path) / file
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-100], "empty": b"", "wrong magic": b"\xff" * 16 + content[16:]}[damage])
    with pytest.raises(UsageError, match=rf"{file} is corrupt or truncated"):
        load("mnist", tmp_path)


def test_idx_label_out_of_range_raises_usage_error(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(UsageError, match=r"t10k-images.*do not match: 300 images of 28 x 28, 300 labels up to 11"):
        load("mnist", tmp_path)


def test_flowers102_has_official_splits(tmp_path: Path) -> None:
    write_flowers102(tmp_path)
    data = load("flowers102", tmp_path)
    assert (
        list_split_sizes(data) == [12, 6, 9] and len(data.classes) == 3 and data.train.images.shape[1:] == (3, 32, 32)
    )
    assert labels_match_colors(data)
    assert data.mean.flatten().tolist() == pytest.approx([255 * v for v in (0.485, 0.456, 0.406)])


def test_food101_holds_out_a_tenth_of_each_class(tmp_path: Path) -> None:
    write_food101(tmp_path)
    data = load("food101", tmp_path)
    assert list_split_sizes(data) == [27, 3, 12] and labels_match_colors(data)
    assert data.val.labels.bincount().tolist() == [1, 1, 1]


def test_imagefolder_with_validation_folder_uses_it(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    data = load("imagefolder", tmp_path)
    assert list_split_sizes(data) == [15, 6, 9] and labels_match_colors(data)


def test_imagefolder_without_validation_folder_holds_out_fixed_share(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=10, test=3)
    data = load("imagefolder", tmp_path, "data.validation=0.2")
    assert list_split_sizes(data) == [24, 6, 9] and data.val.labels.bincount().tolist() == [2, 2, 2]
    assert labels_match_colors(data)
    assert torch.equal(load("imagefolder", tmp_path, "data.validation=0.2").val.images, data.val.images)


def test_imagefolder_without_mean_is_normalized_by_training_images(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=10, test=3)
    data = load("imagefolder", tmp_path, "data.mean=null", "data.std=null")
    normalized = data.normalize(data.train.images)
    assert normalized.mean().item() == pytest.approx(0, abs=1e-4)
    assert normalized.std().item() == pytest.approx(1, abs=1e-2)


def test_undecodable_images_are_skipped_with_their_labels(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    for name in ("train/class_0/1.png", "train/class_2/4.png", "test/class_1/0.png"):
        (tmp_path / name).write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"train/class_0/1.png cannot be decoded"):
        load("imagefolder", tmp_path)
    data = load("imagefolder", tmp_path, "data.skip_undecodable=true")
    assert list_split_sizes(data) == [13, 6, 8] and labels_match_colors(data)


def test_cifar10_official_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    accept_any_checksum(monkeypatch, "torchvision.datasets.cifar")
    data = load("cifar10", tmp_path)
    assert list_split_sizes(data) == [500, 5000, 50] and data.train.images.shape[1:] == (3, 32, 32)
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.images[:, 0, 3, 5], (split.labels * 20).to(torch.uint8))
        assert (split.images[:, 1] == 7).all()


def test_cifar10_with_wrong_checksum_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    monkeypatch.setattr("pickle.load", lambda *args, **options: pytest.fail("unpickled a file with a wrong checksum"))
    with pytest.raises(UsageError, match=r"a file in .*cifar-10-batches-py is corrupt or truncated"):
        load("cifar10", tmp_path)


def test_truncated_cifar10_file_raises_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (write_cifar10(tmp_path) / "test_batch").write_bytes(b"truncated")
    accept_any_checksum(monkeypatch, "torchvision.datasets.cifar")
    with pytest.raises(UsageError, match=r"a file in .*cifar-10-batches-py is corrupt or truncated"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "dataset", "method", "folder", "needed"),
    [
        ("mnist", datasets.MNIST, "download", "MNIST/raw", "t10k-labels-idx1-ubyte"),
        ("cifar10", datasets.CIFAR10, "download", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ("flowers102", datasets.Flowers102, "download", "flowers-102", "setid.mat"),
        ("food101", datasets.Food101, "_download", "food-101", "food-101.tar.gz"),
    ],
)
def test_missing_files_without_network_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dataset: type, method: str, folder: str, needed: str
) -> None:
    def fail_to_download(self: object) -> None:
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(dataset, method, fail_to_download)
    root = tmp_path / "data"
    message = rf"is not in {root}/{folder} and could not be downloaded; put .*{needed}.* there, or use data=digits"
    with pytest.raises(UsageError, match=message) as error:
        load(name, root)
    assert "\n" not in str(error.value)
    assert not root.exists()


def test_split_that_lacks_a_class_is_rejected_before_decoding(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    shutil.rmtree(tmp_path / "val/class_1")
    with pytest.raises(UsageError, match="the validation split lacks 1 of 3 classes, such as 'class_1'"):
        load("imagefolder", tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [[], ["notes.txt"], [".hidden.png", ".hidden/0.png"]])
def test_class_folder_without_images_is_named(tmp_path: Path, content: list[str]) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    for split in ("train", "val", "test"):
        (tmp_path / split / "class_9").mkdir()
        for name in content:
            write_image(tmp_path / "image.png", 0, 0)
            path = tmp_path / split / "class_9" / name
            path.parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / "image.png", path)
    with pytest.raises(UsageError, match=r"no images in .*/train/class_9; known: .*\.jpg .*\.png .*\.webp"):
        load("imagefolder", tmp_path)


def test_class_that_no_image_is_decoded_of_is_named(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    for path in (tmp_path / "test/class_1").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"no test image of class 'class_1' can be decoded"):
        load("imagefolder", tmp_path, "data.skip_undecodable=true")


@pytest.mark.parametrize("suffix", ["jfif", "gif", "avif", "jpe", "jp2", "PNG", "Tiff"])
def test_class_of_images_with_rare_extension_is_read(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    for path in tmp_path.glob("*/class_1/*"):
        with Image.open(path) as image:
            image.save(path.with_suffix(f".{suffix}"))
        if suffix != "PNG":
            path.unlink()
    data = load("imagefolder", tmp_path)
    assert len(data.classes) == 3 and len(data.test) >= 9 and labels_match_colors(data)


def test_ignored_files_are_counted_once_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    shutil.copytree(tmp_path / "val/class_0", tmp_path / "train/class_0/.ipynb_checkpoints")
    shutil.copytree(tmp_path / "val/class_0", tmp_path / "train/.ipynb_checkpoints")
    for name in ("train/class_1/._0.png", "test/class_1/.DS_Store", "test/class_2/0.heic", "val/labels.csv"):
        (tmp_path / name).write_bytes(b"")
    data = load("imagefolder", tmp_path)
    assert list_split_sizes(data) == [15, 6, 9] and len(data.classes) == 3 and labels_match_colors(data)
    line = (
        rf"ignored files in {tmp_path}: 6 hidden, such as {tmp_path}/train/.*; 1 outside the class folders, such as "
        rf"{tmp_path}/val/labels.csv; 1 without an image extension, such as {tmp_path}/test/class_2/0.heic\n"
    )
    assert re.fullmatch(line, capsys.readouterr().err)


def test_nothing_is_reported_if_no_file_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("imagefolder", write_imagefolder(tmp_path, train=5, val=2, test=3))
    assert capsys.readouterr().err == ""


def test_linked_folders_are_read_without_loops(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    write_imagefolder(tmp_path / "elsewhere", more=4)
    (tmp_path / "train/class_0/more").symlink_to(tmp_path / "elsewhere/more/class_0")
    (tmp_path / "train/class_0/again").symlink_to(tmp_path / "elsewhere/more/class_0")
    (tmp_path / "train/class_0/loop").symlink_to("loop")
    (tmp_path / "train/class_1/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/class_1/self").symlink_to(".")
    shutil.rmtree(tmp_path / "train/class_2")
    (tmp_path / "train/class_2").symlink_to(tmp_path / "elsewhere/more/class_2")
    data = load("imagefolder", tmp_path)
    assert data.train.labels.bincount().tolist() == [9, 5, 4] and labels_match_colors(data)


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Bäume") for form in ("NFC", "NFD"))
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    for split, name in (("train", composed), ("val", decomposed), ("test", decomposed)):
        (tmp_path / split / "class_0").rename(tmp_path / split / name)
    data = load("imagefolder", tmp_path)
    assert len(data.classes) == 3 and list_split_sizes(data) == [15, 6, 9] and labels_match_colors(data)


def test_order_of_images_does_not_depend_on_how_letters_are_composed(tmp_path: Path) -> None:
    labels = []
    for form in ("NFC", "NFD"):
        root = write_imagefolder(tmp_path / form, train=2, val=1, test=1)
        for k, name in enumerate(("é", "f", "e")):
            (root / "train/class_0" / unicodedata.normalize(form, f"{name}.png")).write_bytes(
                (root / f"train/class_{k}/0.png").read_bytes()
            )
        labels.append(load("imagefolder", root).train.images)
    assert torch.equal(*labels)


def test_ordinary_tree_is_listed_in_order_of_paths(tmp_path: Path) -> None:
    """Held-out images, and so the results of existing runs, depend on this order."""
    names = ["a/b/1.png", "a.png", "a/b.png", "a-b/1.png", "B.png", "_1.png", "10.png", "2.png", "é.png"]
    paths = [tmp_path / label / name for label in ("b", "B c", "10", "9") for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list_images(tmp_path, {}) == [(path, path.relative_to(tmp_path).parts[0]) for path in sorted(paths)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    (tmp_path / "train/class_0/0.png").rename(tmp_path / "train/class_0" / os.fsdecode(b"\xe4.png"))
    assert list_split_sizes(load("imagefolder", tmp_path)) == [15, 6, 9]
    (tmp_path / "train/class_0").rename(tmp_path / "train" / os.fsdecode(b"class_\xe4"))
    with pytest.raises(UsageError, match=r"the name of .* is not UTF-8; rename it"):
        load("imagefolder", tmp_path)


def test_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagefolder(tmp_path, train=5, val=2, test=3)
    scan = os.scandir

    def refuse(path: Path | str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "class_1":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot list the files in .*/train/class_1: Permission denied"):
        load("imagefolder", tmp_path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: write_imagefolder(root, train=2), r"no folder .*/test; data=imagefolder reads"),
        (lambda root: (root / "train").mkdir(), r"no images in .*/train/<class>/"),
        (lambda root: write_imagefolder(root, train=1, test=1), r"cannot hold out 3 of 3 training images"),
    ],
    ids=["no test folder", "no images", "too few images"],
)
def test_incomplete_imagefolder_raises_usage_error(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path)
    with pytest.raises(UsageError, match=message):
        load("imagefolder", tmp_path)


@pytest.mark.parametrize(
    ("write", "name", "file"),
    [
        (write_flowers102, "flowers102", "setid.mat"),
        (write_flowers102, "flowers102", "imagelabels.mat"),
        (write_food101, "food101", "meta/test.json"),
    ],
)
def test_corrupt_listing_is_named(tmp_path: Path, write: Callable[[Path], Path], name: str, file: str) -> None:
    path = write(tmp_path) / file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UsageError, match=rf"{path.name}.* is corrupt"):
        load(name, tmp_path)


def test_listed_image_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (write_food101(tmp_path) / "images/dish_1/3.jpg").unlink()
    with pytest.raises(UsageError, match=r"dish_1/3.jpg is listed but does not exist"):
        load("food101", tmp_path)
