import itertools

import pytest
import torch
from torch import Tensor

from evaluation.corruptions import CORRUPTIONS, SEVERITIES


@pytest.fixture
def images() -> Tensor:
    """Smooth color images, (4, 3, 32, 40)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 4, 5, generator=generator) * 200 + 20
    return torch.nn.functional.interpolate(coarse, (32, 40), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_keeps_format_and_input_and_repeats(name: str, images: Tensor) -> None:
    before = images.clone()
    for severity in SEVERITIES:
        corrupted = CORRUPTIONS[name](images, severity)
        assert corrupted.shape == images.shape and corrupted.dtype == torch.uint8
        assert torch.equal(corrupted, CORRUPTIONS[name](images, severity))
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_grows_with_severity(name: str, images: Tensor) -> None:
    distances = [(CORRUPTIONS[name](images, s).float() - images.float()).abs().mean() for s in SEVERITIES]
    assert distances[0] > 0
    assert all(weaker < stronger for weaker, stronger in itertools.pairwise(distances))


@pytest.mark.parametrize("channels", [1, 3])
def test_occlusion_covers_its_share_of_every_channel(channels: int) -> None:
    images = torch.zeros(8, channels, 40, 40, dtype=torch.uint8)
    for severity, share in zip(SEVERITIES, (0.05, 0.1, 0.2, 0.3, 0.4), strict=True):
        is_covered = CORRUPTIONS["occlusion"](images, severity) == 128
        assert is_covered.float().mean().item() == pytest.approx(share, abs=0.02)
        assert torch.equal(is_covered.all(1), is_covered.any(1))


def test_contrast_keeps_mean_color(images: Tensor) -> None:
    for severity in SEVERITIES:
        corrupted = CORRUPTIONS["contrast"](images, severity)
        torch.testing.assert_close(corrupted.float().mean((-2, -1)), images.float().mean((-2, -1)), atol=0.6, rtol=0)


def test_rotation_is_counterclockwise() -> None:
    images = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    images[0, 0, 20, 35] = 255  # to the right of the center
    row, column = divmod(int(CORRUPTIONS["rotation"](images, 5).flatten().argmax()), 41)
    assert row < 20 < column
