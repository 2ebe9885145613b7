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
def test_lenet_counts(arrangement: dict[str, str], amplitude: bool, conv: int, total: int) -> None:
    layer = {**OPTIONS, "amplitude": amplitude} if arrangement else None
    model = models.build("lenet", 1, 10, arrangement, layer)
    assert models.count_parameters(model) == (conv, total)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_a_plain_network_and_its_annan_share_all_that_is_not_analytic() -> None:
    """Rows of a table are paired by seed."""
    torch.manual_seed(3)
    plain = models.build("lenet", 1, 10, {})
    torch.manual_seed(3)
    analytic = models.build("lenet", 1, 10, {"conv2": "G48 P48"}, OPTIONS)
    assert torch.equal(analytic.fc1.weight, plain.fc1.weight)
    assert torch.equal(analytic.conv2.weight.flatten(0, 1)[48:], plain.conv2.weight.flatten(0, 1)[48:])


def test_arrangement_and_model_have_to_agree() -> None:
    with pytest.raises(ValueError, match="model=lenet is plain and takes no arrangement; model=ana_lenet does"):
        models.build("lenet", 1, 10, {"conv1": "G6"})
    with pytest.raises(ValueError, match="model=ana_lenet needs an arrangement"):
        models.build("lenet", 1, 10, {}, OPTIONS)
    with pytest.raises(ValueError, match=r"no convolution is named 'conv3'; there are: conv1 \(5 x 5\), conv2"):
        models.build("lenet", 1, 10, {"conv3": "G6"}, OPTIONS)


def test_four_layer_counts() -> None:
    plain = 25 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 128)
    rest = 2 * (32 + 64 + 128 + 128) + 128 * 10 + 10
    assert models.count_parameters(models.build("four_layer", 3, 10, {})) == (plain, plain + rest)
    small = models.build("four_layer", 3, 10, {}, kernel_size=3)
    assert models.count_parameters(small)[0] == plain // 25 * 9
    gabor = models.build("four_layer", 3, 10, {"all": "G100%"}, {"amplitude": True})
    assert models.count_parameters(gabor)[0] == plain // 25 * 5
    for model in (small, gabor):
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"model.kernel_size=4 is even"):
        models.build("four_layer", 3, 10, {}, kernel_size=4)
