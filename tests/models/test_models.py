"""Networks defined in this repository, plain and analytic: parameter counts and errors."""

import pytest
import torch

import models

OPTIONS = {"scale": "unit", "amplitude": False}


@pytest.mark.parametrize(
    ("arrangement", "amplitude", "conv", "total"),
    [
        ({}, False, 2572, 61706),
        ({"conv1": "G6"}, False, 2446, 61580),
        ({"conv1": "G6", "conv2": "G96"}, False, 430, 59564),
        ({"conv1": "G2 Lg1 Lt1 Tf1 Ts1", "conv2": "G32 Lg16 Lt8 Tf32 Ts8"}, False, 310, 59444),
        ({"conv1": "G2 Lg1 Lt1 Tf1 Ts1", "conv2": "G32 Lg16 Lt8 Tf32 Ts8"}, True, 412, 59546),
        ({"conv1": "G1 Lg1 Tf1 P3", "conv2": "G24 Lg6 Lt6 Tf9 Ts3 P48"}, False, 1449, 60583),
    ],
)
def test_lenet_has_expected_parameter_counts(
    arrangement: dict[str, str], amplitude: bool, conv: int, total: int
) -> None:
    layer = {**OPTIONS, "amplitude": amplitude} if arrangement else None
    model = models.create_model("lenet", 1, 10, arrangement, layer)
    assert models.count_parameters(model) == (conv, total)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_plain_and_analytic_network_share_initial_weights_outside_analytic_kernels() -> None:
    """So that runs of a table with equal seeds can be compared in pairs."""
    torch.manual_seed(3)
    plain = models.create_model("lenet", 1, 10, {})
    torch.manual_seed(3)
    analytic = models.create_model("lenet", 1, 10, {"conv2": "G48 P48"}, OPTIONS)
    assert torch.equal(analytic.fc1.weight, plain.fc1.weight)
    assert torch.equal(analytic.conv2.weight.flatten(0, 1)[48:], plain.conv2.weight.flatten(0, 1)[48:])


def test_create_model_rejects_arrangement_that_contradicts_model() -> None:
    with pytest.raises(ValueError, match="model=lenet is plain and takes no arrangement; use model=ana_lenet"):
        models.create_model("lenet", 1, 10, {"conv1": "G6"})
    with pytest.raises(ValueError, match="model=ana_lenet needs an arrangement"):
        models.create_model("lenet", 1, 10, {}, OPTIONS)
    with pytest.raises(ValueError, match=r"no convolution is named 'conv3'; the model has: conv1 \(5 x 5\), conv2"):
        models.create_model("lenet", 1, 10, {"conv3": "G6"}, OPTIONS)


def test_create_model_rejects_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg'; known: lenet, .*, timm/<name>"):
        models.create_model("vgg", 3, 7, {})


def test_four_layer_has_expected_parameter_counts() -> None:
    plain = 25 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 128)
    rest = 2 * (32 + 64 + 128 + 128) + 128 * 10 + 10
    assert models.count_parameters(models.create_model("four_layer", 3, 10, {})) == (plain, plain + rest)
    small = models.create_model("four_layer", 3, 10, {}, kernel_size=3)
    assert models.count_parameters(small)[0] == plain // 25 * 9
    gabor = models.create_model("four_layer", 3, 10, {"all": "G100%"}, {"amplitude": True})
    assert models.count_parameters(gabor)[0] == plain // 25 * 5
    for model in (small, gabor):
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("kernel_size", [4, -1, 1_000_001])
def test_four_layer_rejects_kernel_size(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=rf"model.kernel_size={kernel_size} must be odd, .* and between 1 and 99"):
        models.create_model("four_layer", 3, 10, {}, kernel_size=kernel_size)
