from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from training.data import (
    Augmentation,
    Data,
    crop_images_in_one_batch,
    crop_images_in_threads,
    iterate_batches,
    load_data,
)
from training.datasets import DATASETS
from training.errors import UsageError
from training.splits import Dataset, Split


def make_augmentation(**options: Any) -> Augmentation:
    return Augmentation(**{"shift": 0, "flip": False, **options})


def load_digits(**options: Any) -> Data:
    return load_data(name="digits", augmentation=make_augmentation(), root="data", **options)


def make_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_digits()


def test_train_share_keeps_share_of_each_class_drawn_by_seed(digits: Data) -> None:
    few = load_digits(train_share=0.1, share_seed=1)
    expected = digits.train.labels.bincount() / 10
    assert (few.train.labels.bincount() - expected).abs().max() <= 1
    assert torch.equal(few.val.images, digits.val.images) and torch.equal(few.test.images, digits.test.images)
    assert torch.equal(load_digits(train_share=0.1, share_seed=1).train.images, few.train.images)
    assert not torch.equal(load_digits(train_share=0.1, share_seed=2).train.images, few.train.images)
    assert torch.allclose(few.mean, few.train.images.float().mean())


def test_train_share_without_image_of_a_class_is_rejected() -> None:
    with pytest.raises(UsageError, match=r"data\.train_share=0\.001 of \d+ training images is not possible"):
        load_digits(train_share=0.001)


def test_normalized_training_images_have_mean_zero_and_variance_one(digits: Data) -> None:
    normalized = digits.normalize(digits.train.images)
    assert normalized.dtype == torch.float32
    assert normalized.mean().item() == pytest.approx(0, abs=1e-4)
    assert normalized.std().item() == pytest.approx(1, abs=1e-4)


def test_given_mean_and_std_refer_to_pixels_from_0_to_1(digits: Data) -> None:
    data = load_data(name="digits", augmentation=make_augmentation(), root="data", mean=[0.5], std=[0.25])
    expected = (digits.train.images.float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(data.normalize(data.train.images), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_gives_memory_format_of_data_and_leaves_input_unchanged(
    digits: Data, memory_format: torch.memory_format
) -> None:
    data = replace(digits, memory_format=memory_format)
    for images in (torch.rand(4, 3, 8, 8) * 255, torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)):
        before = images.clone()
        assert data.normalize(images).is_contiguous(memory_format=memory_format)
        assert torch.equal(images, before)


def test_unknown_data_set_raises_usage_error() -> None:
    with pytest.raises(UsageError, match=r"unknown data\.name 'cifar11'; known: digits, mnist"):
        load_data(name="cifar11", augmentation=make_augmentation(), root="data")


def test_batches_cover_split_in_order(digits: Data) -> None:
    batches = list(iterate_batches(digits.val, 90))
    assert [len(batch) for batch in batches] == [90, 90, 20]
    assert torch.equal(torch.cat([batch.images for batch in batches]), digits.val.images)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), digits.val.labels)


def test_eval_batches_are_cropped_and_normalized(digits: Data) -> None:
    data = replace(digits, augmentation=make_augmentation(crop=20))
    batches = list(data.eval_batches(data.val, max_size=90))
    assert [len(batch) for batch in batches] == [90, 90, 20]
    expected = data.normalize(data.val.images[:, :, 4:24, 4:24])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), data.val.labels)


@pytest.mark.parametrize(
    ("max_pixels", "max_size", "sizes"), [(20 * 20 * 80, 1000, [80, 80, 40]), (2**24, 150, [150, 50]), (1, 1000, [1])]
)
def test_eval_batches_have_at_most_max_pixels_and_max_size(
    digits: Data, max_pixels: int, max_size: int, sizes: list[int]
) -> None:
    data = replace(digits, augmentation=make_augmentation(crop=20))
    batches = data.eval_batches(data.val, max_pixels, max_size)
    assert [len(next(batches)) for _ in sizes] == sizes


def test_eval_batches_of_empty_split_are_empty(digits: Data) -> None:
    assert list(digits.eval_batches(Split(digits.val.images[:0], digits.val.labels[:0]))) == []


def test_large_data_set_stays_on_cpu(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.MAX_BYTES_ON_DEVICE", 1000)
    data = digits.to(torch.device("meta"))
    assert data.train.images.device.type == "cpu" and data.mean.device.type == "meta"
    assert next(data.eval_batches(data.val)).images.device.type == "meta"
    monkeypatch.setattr("training.data.MAX_BYTES_ON_DEVICE", 2**30)
    assert digits.to(torch.device("meta")).train.images.device.type == "meta"


def test_no_augmentation_leaves_images_unchanged() -> None:
    images = torch.randint(1, 255, (64, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(make_augmentation()(images, torch.Generator()), images)


def test_shift_moves_each_image_independently() -> None:
    images = torch.randint(1, 255, (64, 3, 8, 8), dtype=torch.uint8)
    shifted = make_augmentation(shift=2)(images, make_generator())
    shifts = set()
    for before, after in zip(images, shifted, strict=True):
        padded = F.pad(before, (2, 2, 2, 2))
        matches = [(r, c) for r in range(5) for c in range(5) if torch.equal(padded[:, r : r + 8, c : c + 8], after)]
        assert len(matches) == 1
        shifts |= set(matches)
    assert len(shifts) > 15


def test_flip_mirrors_half_of_the_images() -> None:
    images = torch.randint(1, 255, (64, 3, 8, 8), dtype=torch.uint8)
    flipped = make_augmentation(flip=True)(images, make_generator())
    unchanged = (flipped == images).flatten(1).all(1)
    assert 16 < unchanged.sum() < 48 and torch.equal(flipped[~unchanged], images[~unchanged].flip(-1))


def test_random_crops_are_boxes_of_their_own_image() -> None:
    """The pixels of these images hold their coordinates, so a crop shows the position and size of its box."""
    n, side = 400, 64
    ramp = (torch.arange(side) + 0.5) * 3
    images = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)]).expand(n, 2, side, side)
    crops = make_augmentation(crop=32, min_area=0.25)(images, make_generator()) / 3
    assert crops.shape == (n, 2, 32, 32)
    x, y = crops[:, 0], crops[:, 1]
    assert (x - x[:, :1]).abs().max() < 1e-3 and (y - y[:, :, :1]).abs().max() < 1e-3  # no skew
    inner = slice(2, -2)  # the outermost pixels repeat the border
    width = (x[:, 0, inner][:, -1] - x[:, 0, inner][:, 0]) / 27 * 32  # 27 steps between 28 pixels
    height = (y[:, inner, 0][:, -1] - y[:, inner, 0][:, 0]) / 27 * 32
    assert width.max() <= side + 0.5 and height.max() <= side + 0.5 and crops.min() >= 0 and crops.max() <= side
    area, aspect = width * height / side**2, width / height
    assert 0.24 < area.min() < 0.3 and 0.9 < area.max() <= 1.01 and aspect.min() > 0.74 and aspect.max() < 1.35
    assert abs(area.mean() - 0.625) < 0.05
    left = x[:, 0, 16] - width / 2
    assert left.min() < 1 and (left / (side - width).clamp(min=1)).max() > 0.95


def test_half_of_the_random_crops_are_mirrored() -> None:
    ramp = torch.arange(64.0).expand(400, 1, 64, 64)
    crops = make_augmentation(crop=32, min_area=0.5, flip=True)(ramp, make_generator())
    assert 160 < (crops[:, 0, 0, 0] > crops[:, 0, 0, -1]).sum() < 240


@pytest.mark.parametrize("options", [{"shift": 2}, {"flip": True}, {"crop": 16, "min_area": 0.25, "flip": True}])
def test_augmentation_depends_on_generator_only(options: dict[str, Any]) -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    augment = make_augmentation(**options)
    first = augment(images, make_generator())
    torch.rand(1)
    assert torch.equal(augment(images, make_generator()), first)
    assert not torch.equal(augment(images, torch.Generator().manual_seed(1)), first)


def test_center_crop_has_size_of_training_crops() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(make_augmentation().center_crop(images), images)
    assert torch.equal(make_augmentation(crop=32).center_crop(images), images)
    assert torch.equal(make_augmentation(crop=20).center_crop(images), images[:, :, 6:26, 6:26])


def test_crops_in_threads_match_crops_in_one_batch() -> None:
    smooth = F.interpolate(torch.rand(6, 3, 4, 4) * 255, (64, 64), mode="bicubic").clamp(0, 255).to(torch.uint8)
    boxes = torch.tensor(
        [[0, 0, 64, 64], [8, 16, 32, 16], [0, 32, 64, 32], [1, 2, 60, 50], [40, 40, 24, 24], [5, 0, 9, 64]]
    )
    boxes = boxes / 64
    mirrored = boxes + boxes[:, 2:3] * torch.tensor([1, 0, -2, 0])  # a negative width mirrors the box
    images, boxes = smooth.repeat(2, 1, 1, 1), torch.cat([boxes, mirrored])
    threaded, batched = (crop(images, boxes, 32).float() for crop in (crop_images_in_threads, crop_images_in_one_batch))
    assert (threaded - batched).abs().mean() < 1.5 and (threaded - batched).abs().max() < 40
    assert torch.equal(threaded[6:], threaded[:6].flip(-1))


def load_constant_images(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Data:
    images = torch.cat([torch.full((4, 1, 2, 2), 7), torch.arange(16).view(4, 1, 2, 2)], 1).to(torch.uint8)
    split = Split(images, torch.arange(4))
    dataset = Dataset([str(label) for label in range(4)], "0123456789ab", lambda: (split, split, split))
    monkeypatch.setitem(DATASETS, "constant", lambda: dataset)
    return load_data("constant", make_augmentation(), **options)


def test_constant_channel_becomes_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_constant_images(monkeypatch)
    normalized = data.normalize(data.train.images)
    assert bool(normalized.isfinite().all()) and not bool(normalized[:, 0].any())
    assert bool(normalized[:, 1].any())


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5], [0.5]), ([0.5, 0.5], None), (None, [1.0, 1.0]), ([0.5, 0.5], [0.5, 0.0]), ([125.0, 125.0], [50.0, 50.0])],
)
def test_moments_that_do_not_fit_the_channels_are_rejected(
    monkeypatch: pytest.MonkeyPatch, mean: list[float] | None, std: list[float] | None
) -> None:
    with pytest.raises(UsageError, match=r"data\.mean=.* and data\.std=.* are invalid: both should be null, or lists"):
        load_constant_images(monkeypatch, mean=mean, std=std)
