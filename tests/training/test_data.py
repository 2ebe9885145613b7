import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional as F

from training import sets
from training.data import _crops_at_once, _crops_one_by_one, augment, batches, centre, load
from training.errors import UsageError


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = header + array.to(torch.uint8).numpy().tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_mnist(root: Path, name: str = "MNIST", train: int = 5200, test: int = 300) -> Path:
    """A small tree in the official layout: images whose pixels all hold their label."""
    raw = root / name / "raw"
    for split, n in (("train", train), ("t10k", test)):
        labels = torch.arange(n) % 10
        write_idx(raw / f"{split}-images-idx3-ubyte", (labels[:, None, None] * 20).expand(n, 28, 28))
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels)
    return raw


def config(name: str = "digits", root: Path = Path("data"), **changes: Any) -> DictConfig:
    return OmegaConf.create({"name": name, "root": str(root), "shift": 0, "flip": False, **changes})


def test_digits_need_no_files(tmp_path: Path) -> None:
    data = load(config("digits", tmp_path / "none"))
    assert [len(split) for split in (data.train, data.val, data.test)] == [1237, 200, 360]
    assert data.train.images.shape[1:] == (1, 28, 28) and data.train.images.dtype == torch.uint8
    assert data.train.images.max() > 240
    everything = torch.cat([data.train.images, data.val.images, data.test.images]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)  # no image in two splits
    again = load(config("digits", tmp_path / "none"))
    assert torch.equal(again.val.images, data.val.images)
    normal = data.normalise(data.train.images)
    assert normal.mean().item() == pytest.approx(0, abs=1e-4) and normal.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_the_official_layout(tmp_path: Path, name: str, folder: str) -> None:
    write_mnist(tmp_path, folder)
    data = load(config(name, tmp_path))
    assert [len(split) for split in (data.train, data.val, data.test)] == [200, 5000, 300]
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.images[:, 0, 3, 5], (split.labels * 20).to(torch.uint8))


def test_missing_files_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(sets.datasets.MNIST, "download", offline)
    with pytest.raises(UsageError) as error:
        load(config("mnist", tmp_path / "data"))
    text = str(error.value)
    assert str(tmp_path / "data" / "MNIST" / "raw") in text and "t10k-labels-idx1-ubyte" in text
    assert "data=digits needs no files" in text and "\n" not in text
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "magic"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_corrupt_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    path = write_mnist(tmp_path) / file
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "empty": b"", "magic": b"\xff" * 16 + content[16:]}[damage])
    with pytest.raises(UsageError, match=rf"{file} is corrupt or cut short"):
        load(config("mnist", tmp_path))


def test_labels_that_cannot_be(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(UsageError, match=r"t10k-images.*do not fit: 300 images of 28 x 28, 300 labels up to 11"):
        load(config("mnist", tmp_path))


def test_files_may_be_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision unpacks what lies in raw/, once its checksum is the official one."""
    raw = write_mnist(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5=None: Path(path).is_file())
    for path in list(raw.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert len(load(config("mnist", tmp_path)).test) == 300


def test_batches_cover_the_split_in_order(tmp_path: Path) -> None:
    split = load(config("digits", tmp_path)).val
    parts = list(batches(split, 90))
    assert [len(part) for part in parts] == [90, 90, 20]
    assert torch.equal(torch.cat([part.images for part in parts]), split.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), split.labels)


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    images = torch.randint(1, 255, (64, 3, 8, 8), dtype=torch.uint8)
    moved = augment(images, config(shift=2), torch.Generator().manual_seed(0))
    shifts = set()
    for before, after in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        found = [(r, c) for r in range(5) for c in range(5) if torch.equal(padded[:, r : r + 8, c : c + 8], after)]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 15
    mirrored = augment(images, config(flip=True), torch.Generator().manual_seed(0))
    same = (mirrored == images).flatten(1).all(1)
    assert 16 < same.sum() < 48 and torch.equal(mirrored[~same], images[~same].flip(-1))
    assert torch.equal(augment(images, config(), torch.Generator()), images)


def test_resized_crops_are_boxes_of_their_own_image() -> None:
    """Images whose pixels hold their coordinates tell which box a crop shows."""
    n, side = 400, 64
    ramp = (torch.arange(side) + 0.5) * 3
    images = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)]).expand(n, 2, side, side)
    cfg = config(crop=32, min_area=0.25)
    crops = augment(images, cfg, torch.Generator().manual_seed(0)) / 3
    assert crops.shape == (n, 2, 32, 32)
    x, y = crops[:, 0], crops[:, 1]
    assert (x - x[:, :1]).abs().max() < 1e-3 and (y - y[:, :, :1]).abs().max() < 1e-3  # no skew
    inner = slice(2, -2)  # the outermost pixels repeat the border
    width = (x[:, 0, inner][:, -1] - x[:, 0, inner][:, 0]) / 27 * 32
    height = (y[:, inner, 0][:, -1] - y[:, inner, 0][:, 0]) / 27 * 32
    assert width.max() <= side + 0.5 and height.max() <= side + 0.5 and crops.min() >= 0 and crops.max() <= side
    area, aspect = width * height / side**2, width / height
    assert 0.24 < area.min() < 0.3 and 0.9 < area.max() <= 1.01 and aspect.min() > 0.74 and aspect.max() < 1.35
    assert abs(area.mean() - 0.625) < 0.05
    left = x[:, 0, 16] - width / 2
    assert left.min() < 1 and (left / (side - width).clamp(min=1)).max() > 0.95


def test_the_centre_is_as_large_as_crops() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(centre(images, config(crop=32)), images) and torch.equal(centre(images, config()), images)
    assert torch.equal(centre(images, config(crop=20)), images[:, :, 6:26, 6:26])


def test_large_sets_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(config())
    monkeypatch.setattr("training.data.ON_DEVICE", 1000)
    assert data.to(torch.device("meta")).train.images.device.type == "cpu"
    monkeypatch.setattr("training.data.ON_DEVICE", 2**30)
    assert data.to(torch.device("meta")).train.images.device.type == "meta"


def test_crops_one_by_one_are_those_at_once() -> None:
    smooth = F.interpolate(torch.rand(6, 3, 4, 4) * 255, (64, 64), mode="bicubic").clamp(0, 255).to(torch.uint8)
    boxes = torch.tensor(
        [[0, 0, 1, 1], [8, 16, 32, 16], [0, 32, 64, 32], [1, 2, 60, 50], [40, 40, 24, 24], [5, 0, 9, 64]]
    )
    boxes = boxes / torch.tensor([[1.0]] + [[64.0]] * 5)
    boxes = torch.cat([boxes, boxes + boxes[:, 2:3] * torch.tensor([1, 0, -2, 0])])  # and mirrored
    smooth = smooth.repeat(2, 1, 1, 1)
    quick, batched = (crops(smooth, boxes, 32).float() for crops in (_crops_one_by_one, _crops_at_once))
    assert (quick - batched).abs().mean() < 1.5 and (quick - batched).abs().max() < 40
    assert torch.equal(quick[6:], quick[:6].flip(-1))


def test_half_of_the_crops_are_mirrored() -> None:
    ramp = torch.arange(64.0).expand(400, 1, 64, 64)
    crops = augment(ramp, config(crop=32, min_area=0.5, flip=True), torch.Generator().manual_seed(0))
    assert 160 < (crops[:, 0, 0, 0] > crops[:, 0, 0, -1]).sum() < 240
