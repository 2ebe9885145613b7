import pytest
import torch
from torch import nn

from acl import AnalyticConv2d, convert


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False))
    )


def test_plain_kernels_and_biases_come_from_the_slots_they_replace() -> None:
    model = net()
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    assert convert(model, "0", "G5 P10 Lg9") is model
    layer = model[0]
    assert isinstance(layer, AnalyticConv2d) and layer.stride == (2, 2)
    assert torch.equal(layer.weight.flatten(0, 1)[5:15], weight.flatten(0, 1)[5:15])
    assert torch.equal(layer.bias, bias)


def test_all_plain_is_the_same_network() -> None:
    model = net()
    x = torch.randn(2, 3, 16, 16)
    wanted = model(x)
    assert torch.equal(convert(model, "*", "P100%")(x), wanted)
    assert all(isinstance(model.get_submodule(name), AnalyticConv2d) for name in ("0", "1.1"))


def test_layers_by_mapping_name_list_and_glob() -> None:
    assert isinstance(convert(net(), {"0": "G24", "1.1": "P16"})[0], AnalyticConv2d)
    assert isinstance(convert(net(), ["0", "1.1"], "G100%")[1][1], AnalyticConv2d)
    only = convert(net(), "1.*", "G100%")
    assert isinstance(only[0], nn.Conv2d) and isinstance(only[1][1], AnalyticConv2d)


def test_dtype_mode_and_memory_format_are_kept() -> None:
    model = net().double().eval().to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    layer = convert(model, "0", "G50% P50%", amplitude=True)[0]
    assert layer.weight.dtype == torch.double and not layer.training and layer.amplitude
    assert layer.weight.stride() == strides


def test_refusals_leave_the_model_as_it_was() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"no convolution is named 'conv1'; there are: 0 \(5 x 5\), 1\.1 \(3 x 3\)"):
        convert(model, ["0", "conv1"], "G100%")
    with pytest.raises(ValueError, match=r"'G5' fills 5 of 16 kernels of 1\.1 \(2 x 8\)"):
        convert(model, {"0": "G24", "1.1": "G5"})
    with pytest.raises(ValueError, match="needs an arrangement"):
        convert(model, "0")
    assert not any(isinstance(module, AnalyticConv2d) for module in model.modules())
