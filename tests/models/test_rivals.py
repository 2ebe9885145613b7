"""Approximations that compete with formulas: exactness, and the metrics whose error they minimize."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import acl
from models.rivals import quantize, truncate_svd

RIVALS = pytest.mark.parametrize("approximate", [truncate_svd, quantize])


def make_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_metric(name: str) -> acl.Metric:
    """A metric of kernels (3, 5, 5); ``data`` is measured on smooth random images."""
    images = make_weight(8, 3, 20, 20).cumsum(2).cumsum(3) + make_weight(8, 1, 20, 20, seed=1).cumsum(2)
    return acl.Metric.create(images if name == "data" else name, 3, (5, 5))


@RIVALS
@pytest.mark.parametrize("metric", ["images", "data"])
@pytest.mark.parametrize("numbers", [4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_error_in_own_metric_is_less_than_that_of_pixel_version(
    approximate: Callable[..., tuple[Tensor, float]], metric: str, numbers: int, seed: int
) -> None:
    weight, resolved = make_weight(16, 3, 5, 5, seed=seed), make_metric(metric)
    approximation, used = approximate(weight, numbers, resolved)
    of_pixels, used_by_pixels = approximate(weight, numbers)
    assert used == used_by_pixels and approximation.dtype == weight.dtype
    assert acl.output_error(weight, approximation, resolved) < acl.output_error(weight, of_pixels, resolved)
    assert acl.output_error(weight, of_pixels, "pixels") < acl.output_error(weight, approximation, "pixels")


@RIVALS
@pytest.mark.parametrize("metric", ["pixels", "images", "data"])
def test_svd_of_full_rank_and_codebook_of_all_kernels_are_exact(
    approximate: Callable[..., tuple[Tensor, float]], metric: str
) -> None:
    weight = make_weight(4, 3, 5, 5)
    torch.testing.assert_close(approximate(weight, 100, make_metric(metric))[0], weight, atol=1e-5, rtol=0)


def test_truncated_svd_is_the_best_matrix_of_its_rank() -> None:
    weight, metric = make_weight(16, 3, 5, 5).double(), make_metric("data")
    approximation, used = truncate_svd(weight, 4, metric)
    rows, rank = approximation.flatten(0, 1).flatten(1), round(used * 48 / (48 + 25))
    assert torch.linalg.matrix_rank(rows, rtol=1e-6) == rank
    u, s, vh = torch.linalg.svd(rows)
    left, right = u[:, :rank] * s[:rank], vh[:rank]
    error = acl.output_error(weight, approximation, metric)
    for seed in range(5):  # a changed factor keeps the rank
        of_left, of_right = (1e-3 * make_weight(*shape, seed=seed).double() for shape in (left.shape, right.shape))
        for changed in ((left + of_left) @ right, left @ (right + of_right)):
            assert acl.output_error(weight, changed.view_as(weight), metric) > error


def test_gains_of_codebook_are_the_best_of_each_filter() -> None:
    weight, metric = make_weight(16, 3, 5, 5).double(), make_metric("images")
    approximation, _ = quantize(weight, 4, metric)
    error = acl.output_error(weight, approximation, metric)
    for seed in range(5):
        changed = approximation * (1 + 1e-3 * make_weight(16, 3, 1, 1, seed=seed))
        assert acl.output_error(weight, changed, metric) > error


def test_codebook_finds_kernels_up_to_gain_and_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(2, 5, 5, generator=generator)
    gains = torch.randn(40, 1, 1, generator=generator)
    weight = (gains * entries.repeat(20, 1, 1)).view(8, 5, 5, 5)
    approximation, used = quantize(weight, 3)  # two entries
    assert used == 2 + 2 * 25 / 40
    torch.testing.assert_close(approximation, weight)


@RIVALS
def test_zero_kernels_stay_zero(approximate: Callable[..., tuple[Tensor, float]]) -> None:
    weight = make_weight(4, 3, 5, 5)
    weight[1] = 0
    approximation, _ = approximate(weight, 100, "images")
    torch.testing.assert_close(approximation, weight, atol=1e-5, rtol=0)
