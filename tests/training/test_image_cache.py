import colorsys
import errno
import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import v2

from tests.training.processes import run_in_child, start_process, wait_for
from training import image_cache
from training.errors import UsageError
from training.image_cache import load_decoded_images


def make_image(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def crop_center_square(image: Image.Image) -> torch.Tensor:
    """The center 40 x 40 pixels of a 60 x 40 image."""
    return torch.from_numpy(np.array(image)[:, 10:50]).permute(2, 0, 1)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for i, path in enumerate(paths):
        make_image(i).save(path)
    return paths


def load(paths: list[Path], size: int = 40, **options: Any) -> tuple[torch.Tensor, list[int]]:
    root = paths[0].parent
    return load_decoded_images(root, paths, size, root / "cache", "images", **options)


def load_images(paths: list[Path], size: int = 40) -> torch.Tensor:
    return load(paths, size)[0]


def record_decoded_paths(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list to which every file decoded from now on is appended."""
    decoded: list[Path] = []
    decode = image_cache._decode

    def record_and_decode(path: Path, size: int) -> np.ndarray | str:
        decoded.append(path)
        return decode(path, size)

    monkeypatch.setattr(image_cache, "_decode", record_and_decode)
    return decoded


def test_images_are_center_squares(paths: list[Path]) -> None:
    images = load_images(paths)
    assert images.shape == (20, 3, 40, 40) and images.dtype == torch.uint8
    for i, image in enumerate(images):
        assert torch.equal(image, crop_center_square(make_image(i)))


def test_scaling_matches_torchvision_resize_and_center_crop(paths: list[Path]) -> None:
    expected = v2.functional.center_crop(v2.functional.resize(make_image(0), [16]), [16])
    difference = load_images(paths, 16)[0].int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_other_color_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    make_image(0).convert(mode).save(path)
    with Image.open(path) as image:
        expected = crop_center_square(image.convert("RGB"))
    assert torch.equal(load_images([path])[0], expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_gray_ramp_keeps_its_mean(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "ramp.tif"
    ramp = np.linspace(0, 1 if dtype is np.float32 else 65535, 40).astype(dtype)
    Image.fromarray(ramp[None].repeat(40, 0)).save(path)
    image = load_images([path])[0].float()
    assert image.mean().item() == pytest.approx(127.5, abs=0.5) and len(image.unique()) == 40


@pytest.mark.parametrize("values", [[0, 255], [-1, 65535], [0, 65536], [0.0, 1.1], [-0.1, 1.0], [0.0, math.nan]])
def test_unknown_range_of_values_is_an_error(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "unknown.tif"
    Image.fromarray(np.array([values], np.int32 if isinstance(values[0], int) else np.float32)).save(path)
    with pytest.raises(
        UsageError, match=r"unknown.tif cannot be decoded \(.*whose white is unknown; save it with 8 or 16 "
    ):
        load([path])


def test_drawing_on_transparent_page_is_black_on_white(tmp_path: Path) -> None:
    path = tmp_path / "drawing.png"
    drawing = np.zeros((40, 40, 4), np.uint8)
    drawing[10:20, 5:30, 3] = 255
    Image.fromarray(drawing).save(path)
    assert torch.equal(load_images([path])[0], torch.from_numpy(255 - drawing[..., 3]).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["HSV", "RGBa", "RGBX", "I;16N"])
def test_modes_of_no_file_become_rgb(mode: str) -> None:
    """Pillow may open files in them some day."""
    content = {"HSV": (120, 200, 90), "RGBa": (10, 20, 30, 90), "RGBX": (10, 20, 30, 90), "I;16N": (0, 128)}[mode]
    expected = {"HSV": [19, 90, 77], "RGBa": [175, 185, 195], "RGBX": [10, 20, 30], "I;16N": [128, 128, 128]}[mode]
    if mode == "HSV":
        expected = [round(255 * value) for value in colorsys.hsv_to_rgb(*(value / 255 for value in content))]
    pixel = np.asarray(image_cache._convert_to_rgb(Image.frombytes(mode, (1, 1), bytes(content))))[0, 0]
    assert np.abs(pixel - np.array(expected)).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_image_is_turned_upright_before_it_is_cropped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"portrait.{suffix}"
    portrait = Image.linear_gradient("L").resize((40, 80)).convert("RGB")  # from black at the top to white
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    portrait.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    rows = load_images([path])[0].float().mean((0, 2))
    expected = torch.from_numpy(np.array(portrait)[20:60, 0, 0]).float()
    assert (rows - expected).abs().max() < 4  # JPEG and WebP are lossy


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"II*\0"])
def test_image_with_damaged_exif_is_read(tmp_path: Path, exif: bytes) -> None:
    for suffix in ("jpg", "png", "webp"):
        make_image(0).save(tmp_path / f"0.{suffix}", exif=exif)
    images = load_images([tmp_path / f"0.{suffix}" for suffix in ("png", "jpg", "webp")])
    assert torch.equal(images[0], crop_center_square(make_image(0)))


def test_images_are_decoded_once(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_images(paths)
    decoded = record_decoded_paths(monkeypatch)
    assert torch.equal(load_images(paths), first) and not decoded


@pytest.mark.parametrize(
    "damage", ["truncated images", "missing images", "other format", "truncated progress", "changed image"]
)
def test_invalid_cache_is_rebuilt(paths: list[Path], monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    first = load_images(paths).clone()
    file = next(paths[0].parent.glob("cache/*/images-*.u8"))
    if damage == "truncated images":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "missing images":
        file.unlink()
    elif damage == "other format":
        monkeypatch.setattr(image_cache, "FORMAT", image_cache.FORMAT + 1)
    elif damage == "truncated progress":
        file.with_suffix(".json").write_text('{"key": ')
    else:
        make_image(99).save(paths[3])
        os.utime(paths[3], (1, 1))
    decoded = record_decoded_paths(monkeypatch)
    second = load_images(paths)
    assert sorted(decoded) == sorted(paths)
    changed = [i for i in range(20) if not torch.equal(second[i], first[i])]
    assert changed == ([3] if damage == "changed image" else [])


def test_complete_cache_is_never_modified(paths: list[Path]) -> None:
    """Other processes may have mapped it."""
    images = load_images(paths)
    expected = images.clone()
    for path in paths[:5]:
        path.unlink()
    make_image(99).save(paths[6])
    fewer = load_images(paths[5:])
    assert torch.equal(images, expected)
    assert torch.equal(fewer[0], expected[5]) and not torch.equal(fewer[1], expected[6])


def test_caches_of_different_images_coexist(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    some, others = load_images(paths[:12]).clone(), load_images(paths[6:]).clone()
    decoded = record_decoded_paths(monkeypatch)
    assert torch.equal(load_images(paths[:12]), some) and torch.equal(load_images(paths[6:]), others) and not decoded


def test_images_that_change_while_decoded_are_rejected(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decode = image_cache._decode

    def decode_and_change(path: Path, size: int) -> np.ndarray | str:
        os.utime(paths[0], (1, 1))
        return decode(path, size)

    monkeypatch.setattr(image_cache, "_decode", decode_and_change)
    with pytest.raises(UsageError, match="changed while they were decoded; try again"):
        load_images(paths)


def test_pixels_decoded_by_earlier_code_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.png"
    Image.new("RGBA", (40, 40)).save(path)
    with monkeypatch.context() as earlier:
        earlier.setattr(image_cache, "FORMAT", 2)
        earlier.setattr(image_cache, "_decode", lambda path, size: np.asarray(Image.open(path).convert("RGB")))
        assert load_images([path]).max() == 0
    assert load_images([path]).min() == 255


def test_each_size_has_its_own_cache(paths: list[Path], tmp_path: Path) -> None:
    load_images(paths)
    load_images(paths, 20)
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "cache").iterdir()) == ["20px", "40px"]


def test_each_root_has_its_own_cache(tmp_path: Path) -> None:
    images = []
    for seed, name in enumerate(("a", "b")):
        path = tmp_path / name / "0.png"
        path.parent.mkdir()
        make_image(seed).save(path)
        images.append(load_decoded_images(path.parent, [path], 40, tmp_path / "cache", "images")[0])
    assert len(list((tmp_path / "cache").iterdir())) == 2 and not torch.equal(*images)


def test_interrupted_cache_is_resumed(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "CHUNK", 4)
    write_atomic = image_cache.write_atomic

    def load_until_killed() -> None:
        def kill_at_third_chunk(path: Path, content: str) -> None:
            write_atomic(path, content)
            if json.loads(content)["done"] == 12:
                os._exit(9)

        image_cache.write_atomic = kill_at_third_chunk
        load_images(paths)

    assert run_in_child(load_until_killed) == 9
    decoded = record_decoded_paths(monkeypatch)
    images = load_images(paths)
    assert sorted(decoded) == sorted(paths[12:])
    for i, image in enumerate(images):
        assert torch.equal(image, crop_center_square(make_image(i)))


@pytest.fixture
def damaged_images(paths: list[Path]) -> tuple[list[Path], torch.Tensor]:
    """The paths, of which 5 and 17 now hold undecodable images, and all images as decoded before the damage."""
    intact = load_images(paths).clone()
    content = paths[5].read_bytes()
    paths[5].write_bytes(content[: len(content) // 2])
    paths[17].write_bytes(b"")
    return paths, intact


def test_complete_cache_is_read_without_writing(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_images(paths).clone()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for target in ("training.image_cache.FileLock", "pathlib.Path.mkdir", "training.image_cache.write_atomic"):
        monkeypatch.setattr(target, refuse)
    assert torch.equal(load_images(paths), expected)


def test_undecodable_image_raises_one_line_error(damaged_images: tuple[list[Path], torch.Tensor]) -> None:
    with pytest.raises(UsageError, match=r"5\.png cannot be decoded \(.*data.skip_undecodable=true") as error:
        load(damaged_images[0])
    assert "\n" not in str(error.value)


def test_undecodable_images_are_skipped_on_request(
    damaged_images: tuple[list[Path], torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    paths, intact = damaged_images
    images, skipped = load(paths, skip_undecodable=True)
    assert skipped == [5, 17]
    assert torch.equal(images, intact[[i for i in range(20) if i not in skipped]])
    assert f"left out 2 images that cannot be decoded: {paths[5]}, ..." in capsys.readouterr().err


def test_cache_with_skipped_images_raises_when_skipping_is_off(damaged_images: tuple[list[Path], torch.Tensor]) -> None:
    load(damaged_images[0], skip_undecodable=True)
    with pytest.raises(UsageError, match=r"5\.png cannot be decoded"):
        load(damaged_images[0])


def test_concurrent_processes_decode_each_image_once(paths: list[Path], tmp_path: Path) -> None:
    log = tmp_path / "decoded.txt"

    def load_slowly() -> None:
        decode = image_cache._decode

        def log_and_decode(path: Path, size: int) -> np.ndarray | str:
            time.sleep(0.05)
            with log.open("a") as file:
                file.write(f"{path.name}\n")
            return decode(path, size)

        image_cache._decode = log_and_decode
        load_images(paths)

    children = [start_process(load_slowly), start_process(load_slowly)]
    assert [wait_for(child) for child in children] == [0, 0]
    assert sorted(log.read_text().split()) == sorted(path.name for path in paths)
    assert load_images(paths).shape == (20, 3, 40, 40)


@pytest.mark.parametrize("platform", ["linux", "others"])
def test_full_disk_raises_usage_error_before_decoding(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if platform == "linux":
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * 40 * 40 * 3 - 1))
    decoded = record_decoded_paths(monkeypatch)
    with pytest.raises(UsageError, match=r"cannot store decoded images in .*: No space left on device"):
        load(paths)
    assert not decoded


def test_cache_works_without_posix_fallocate(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # macOS and Windows
    assert torch.equal(load_images(paths)[19], crop_center_square(make_image(19)))


def test_unwritable_cache_raises_usage_error(paths: list[Path]) -> None:
    (paths[0].parent / "cache").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot store decoded images in .*cache"):
        load(paths)
