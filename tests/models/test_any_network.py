"""Any network converts, trains, folds, and is then as it was."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import acl

ARRANGEMENT = "G25% Lg10% Lt10% Tf5% Ts5% P45%"
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
HANDFUL = ["resnet18", "alexnet", "mobilenet_v3_small"], ["tf_efficientnet_b0", "nf_regnet_b0", "vit_tiny_patch16_224"]
HUGE = 100_000_000


def slow_but(names: list[str], quick: list[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def there_and_back(make: Any, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make()
    if huge := sum(p.numel() for p in model.parameters()) > HUGE:
        model = model.to("meta")
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    acl.convert(model, "first", ARRANGEMENT)
    (layer,) = (module for module in model.modules() if isinstance(module, acl.AnalyticConv2d))
    if not huge:
        x = image(model, sizes)
        model.train()
        out = model(x)
        (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        model.eval()
        with torch.no_grad():
            wanted = model(x)
    assert acl.fold(model) is model
    assert [name for name, _ in model.named_parameters()] == names and list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    if not huge:
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def image(model: nn.Module, sizes: tuple[int, ...]) -> torch.Tensor:
    """The smallest of ``sizes`` that the network takes."""
    for size in sizes:
        x = torch.randn(2, 3, size, size)
        try:
            model.train()(x)
            return x
        except (RuntimeError, AssertionError, ValueError):
            if size == sizes[-1]:
                raise
    raise AssertionError


@pytest.mark.parametrize("name", slow_but(TORCHVISION, HANDFUL[0]))
def test_torchvision(name: str) -> None:
    there_and_back(lambda: torchvision.models.get_model(name, weights=None), (64, 128, 224, 299))


@pytest.mark.parametrize("name", slow_but(TIMM, HANDFUL[1]))
def test_timm(name: str) -> None:
    there_and_back(lambda: timm.create_model(name), (64, 128, 224, 240, 256, 299))
