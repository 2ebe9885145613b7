"""Networks of torchvision and timm convert, train, and fold back to their original architecture."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import timm
import torch
import torchvision
from torch import nn

import acl
from acl.options import Per
from tests.arrangements import arrange_all_kinds

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
TIMM = [
    "resnet18",
    "resnetv2_50x1_bit",
    "nf_regnet_b0",
    "eca_nfnet_l0",
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "tf_mixnet_s",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_minimal_100",
    "convnext_atto",
    "convnextv2_atto",
    "densenet121",
    "dpn48b",
    "dla34",
    "hrnet_w18_small",
    "inception_v3",
    "regnetx_002",
    "res2net50_14w_8s",
    "resnest14d",
    "rexnet_100",
    "selecsls42",
    "skresnet18",
    "vgg11",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "coat_lite_tiny",
    "levit_128s",
    "ghostnet_050",
    "repvgg_a0",
    "xception41",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "poolformer_s12",
    "cait_xxs24_224",
    "gernet_s",
    "lcnet_050",
    "mobileone_s0",
    "fastvit_t8",
    "efficientformer_l1",
    "cspresnet50",
    "visformer_tiny",
    "pit_ti_224",
    "crossvit_tiny_240",
    "halonet26t",
    "xcit_nano_12_p16_224",
]
QUICK_TORCHVISION = ["resnet18", "alexnet", "mobilenet_v3_small"]
QUICK_TIMM = ["tf_efficientnet_b0", "nf_regnet_b0", "vit_tiny_patch16_224"]
MAX_PARAMETERS_TO_TRAIN = 100_000_000
"""Larger networks are converted and folded on the meta device, without a forward pass."""


def mark_slow(names: list[str], quick: list[str]) -> list[Any]:
    """The names as parameters of a test, marked as slow unless they are quick."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check_round_trip(create: Callable[[], nn.Module], image_sizes: tuple[int, ...], per: Per) -> None:
    """Converts the first convolution, trains for one step, folds, and compares with the original network."""
    model = create()
    is_huge = sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS_TO_TRAIN
    if is_huge:
        model = model.to("meta")
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    acl.convert(model, "first", arrange_all_kinds(), per=per)
    (layer,) = acl.analytic_layers(model).values()
    if not is_huge:
        x = find_image(model, image_sizes)
        model.train()
        output = model(x)
        (output if isinstance(output, torch.Tensor) else output[0]).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        model.eval()
        with torch.no_grad():
            expected = model(x)
    assert acl.fold(model) is model
    assert [name for name, _ in model.named_parameters()] == names and list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    if not is_huge:
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def find_image(model: nn.Module, sizes: tuple[int, ...]) -> torch.Tensor:
    """Images of the smallest of ``sizes`` that the network accepts."""
    for size in sizes:
        x = torch.randn(2, 3, size, size)
        try:
            model.train()(x)
            return x
        except (RuntimeError, AssertionError, ValueError):
            if size == sizes[-1]:
                raise
    raise AssertionError


@pytest.mark.parametrize("name", mark_slow(TORCHVISION, QUICK_TORCHVISION))
@pytest.mark.parametrize("per", get_args(Per))
def test_torchvision_network_survives_convert_train_and_fold(name: str, per: Per) -> None:
    check_round_trip(lambda: torchvision.models.get_model(name, weights=None), (64, 128, 224, 299), per)


@pytest.mark.parametrize("name", mark_slow(TIMM, QUICK_TIMM))
@pytest.mark.parametrize("per", get_args(Per))
def test_timm_network_survives_convert_train_and_fold(name: str, per: Per) -> None:
    check_round_trip(lambda: timm.create_model(name), (64, 128, 224, 240, 256, 299), per)
