import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.training.processes import in_child, start, wait
from training import cache
from training.cache import decoded
from training.errors import UsageError


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    return paths


def cached(paths: list[Path], size: int = 40, **options: Any) -> torch.Tensor:
    root = paths[0].parent
    return decoded(root, paths, size, root / "cache", "pictures", **options)[0]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from now on."""
    seen: list[Path] = []
    original = cache._decode
    monkeypatch.setattr(cache, "_decode", lambda path, size: (seen.append(path), original(path, size))[1])
    return seen


def test_the_centre_square_of_each_image(paths: list[Path]) -> None:
    images = cached(paths)
    assert images.shape == (20, 3, 40, 40) and images.dtype == torch.uint8
    for i, image in enumerate(images):
        assert torch.equal(image, torch.from_numpy(np.array(picture(i))[:, 10:50]).permute(2, 0, 1))


def test_scaling_is_torchvisions_resize_and_centre_crop(paths: list[Path]) -> None:
    wanted = v2.functional.center_crop(v2.functional.resize(picture(0), [16]), [16])
    difference = cached(paths, 16)[0].int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).int()
    assert difference.abs().max() <= 1


def test_grey_transparent_and_palette_images(tmp_path: Path) -> None:
    paths = []
    for mode in ("L", "RGBA", "P", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        picture(0).convert(mode).save(path)
        paths.append(path)
    assert cached(paths).shape == (4, 3, 40, 40)


def test_decoded_once(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached(paths)
    seen = counted(monkeypatch)
    assert torch.equal(cached(paths), first) and not seen


@pytest.mark.parametrize("damage", ["cut", "gone", "format", "note", "image"])
def test_a_cache_that_is_not_to_be_trusted_is_made_anew(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = cached(paths).clone()
    file = next(paths[0].parent.glob("cache/*/images.u8"))
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "gone":
        file.unlink()
    elif damage == "format":
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    elif damage == "note":
        (file.parent / "cache.json").write_text('{"key": ')
    else:
        picture(99).save(paths[3])
        os.utime(paths[3], (1, 1))
    seen = counted(monkeypatch)
    again = cached(paths)
    assert len(seen) == 20
    changed = [i for i in range(20) if not torch.equal(again[i], first[i])]
    assert changed == ([3] if damage == "image" else [])


def test_other_sizes_and_sources_are_other_caches(paths: list[Path], tmp_path: Path) -> None:
    cached(paths)
    cached(paths, 20)
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "cache").iterdir()) == ["20px", "40px"]


def test_an_interrupted_cache_goes_on(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 4)
    original = cache.write_atomic

    def killed() -> None:
        def kill_at_the_third(path: Path, content: str) -> None:
            original(path, content)
            if json.loads(content)["done"] == 12:
                os._exit(9)

        cache.write_atomic = kill_at_the_third
        cached(paths)

    assert in_child(killed) == 9
    seen = counted(monkeypatch)
    images = cached(paths)
    assert sorted(seen) == sorted(paths[12:])
    assert torch.equal(images[0], torch.from_numpy(np.array(picture(0))[:, 10:50]).permute(2, 0, 1))


def test_an_image_that_cannot_be_decoded(paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    whole = cached(paths).clone()
    content = paths[5].read_bytes()
    paths[5].write_bytes(content[: len(content) // 2])
    paths[17].write_bytes(b"")
    with pytest.raises(UsageError, match=r"5\.png cannot be decoded \(.*data.skip_undecodable=true") as error:
        cached(paths)
    assert "\n" not in str(error.value)
    root = paths[0].parent
    images, left_out = decoded(root, paths, 40, root / "cache", "pictures", skip=True)
    assert left_out == [5, 17]
    assert torch.equal(images, whole[[i for i in range(20) if i not in left_out]])
    assert f"left out 2 images that cannot be decoded: {paths[5]}, ..." in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"5\.png cannot be decoded"):  # left out before, and now not wanted to be
        cached(paths)


def test_two_processes_share_a_cache(paths: list[Path]) -> None:
    def slow() -> None:
        original = cache._decode
        cache._decode = lambda path, size: (time.sleep(0.05), original(path, size))[1]
        cached(paths)

    one, other = start(slow), start(slow)
    assert wait(one) == wait(other) == 0
    assert cached(paths).shape == (20, 3, 40, 40)


def test_a_cache_that_cannot_be_written(paths: list[Path]) -> None:
    (paths[0].parent / "cache").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot keep decoded images in .*cache"):
        cached(paths)
