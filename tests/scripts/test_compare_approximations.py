import json
from pathlib import Path

import pytest
import torch

from models.rivals import quantize, truncate_svd
from scripts.compare_approximations import METHODS
from tests.scripts.conftest import RunScript


@pytest.mark.parametrize("numbers", [5, 7, 8])
@pytest.mark.parametrize("method", METHODS)
def test_approximation_has_at_least_as_many_numbers_and_less_error_than_zero_kernels(method: str, numbers: int) -> None:
    weight = torch.randn(16, 6, 7, 7, generator=torch.Generator().manual_seed(0))
    approximation, used = METHODS[method](weight, numbers)
    assert numbers <= used < numbers + 2 and approximation.shape == weight.shape
    assert (approximation - weight).square().sum() < weight.square().sum()


def test_svd_of_full_rank_and_codebook_of_all_kernels_are_exact() -> None:
    weight = torch.randn(4, 3, 5, 5)
    for approximate in (truncate_svd, quantize):
        torch.testing.assert_close(approximate(weight, 100)[0], weight, atol=1e-5, rtol=0)


def test_codebook_finds_kernels_up_to_gain_and_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(2, 5, 5, generator=generator)
    gains = torch.randn(40, 1, 1, generator=generator)
    weight = (gains * entries.repeat(20, 1, 1)).view(8, 5, 5, 5)
    approximation, used = quantize(weight, 3)  # two entries
    assert used == 2 + 2 * 25 / 40
    torch.testing.assert_close(approximation, weight)


def test_compare_approximations_writes_values_per_image(tmp_path: Path, call_script: RunScript) -> None:
    file = tmp_path / "approximations.jsonl"
    options = ['overrides=["data=digits","model=lenet"]', "features=conv2", f"file={file}"]
    done = call_script("compare_approximations.py", *options, "layer=conv2")
    assert done.returncode == 0, done.stderr
    original, *others = map(json.loads, file.read_text().splitlines())
    assert original["method"] == "original" and set(original["output_error_percent"]) == {0.0}
    assert original["probe_correct"] == original["refitted_probe_correct"]
    assert len(others) == 3 * len(METHODS)
    assert all(len(line["probe_correct"]) == len(line["output_error_percent"]) == 360 for line in others)
    assert all(sum(line["output_error_percent"]) > 0 for line in others)
    assert any(line["probe_correct"] != line["refitted_probe_correct"] for line in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layer=fc1"], "layer=fc1 is invalid: it is not a plain convolution of the network"),
        (
            ["layer=conv1", 'overrides=["data=digits","model=ana_lenet","arrangement.conv1=G6"]'],
            "layer=conv1 is invalid: it is not a plain convolution of the network",
        ),
        (["layer=conv2", "features=layer9"], "features=layer9 is invalid: it is not a layer of the network"),
        (["layer=conv2", "features=fc1"], "features=fc1 is invalid: its output has no height and width"),
        (["layer=conv2", "features=conv1"], "features=conv1 is invalid: it should come after layer=conv2"),
    ],
)
def test_invalid_layer_is_named(options: list[str], message: str, call_script: RunScript) -> None:
    defaults = [] if any("overrides" in option for option in options) else ['overrides=["data=digits","model=lenet"]']
    done = call_script("compare_approximations.py", *defaults, *options)
    assert (done.returncode, done.stderr.splitlines()) == (2, [f"error: {message}"])
