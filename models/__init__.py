"""Networks: plain ones, and the analytic networks (AnaNNs) made of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from acl import AnalyticConv2d, convert
from models.four_layer import FourLayer
from models.lenet import LeNet
from models.library import from_timm, from_torchvision

TORCHVISION = ("resnet18", "resnet50", "alexnet")
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "four_layer": FourLayer,
    **{name: partial(from_torchvision, name) for name in TORCHVISION},
}


def build(
    backbone: str,
    channels: int,
    classes: int,
    arrangement: Mapping[str, str],
    layer: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a network for images of ``channels`` channels and ``classes`` classes.

    Args:
        backbone: one of ``BACKBONES``, or ``timm/<name>``.
        channels, classes: of the data.
        arrangement: convolution's name -> arrangement; those not named stay plain.
        layer: options of ``acl.convert`` for an AnaNN; None for a plain network.
        options: the backbone's own: ``kernel_size`` of the four-layer network, ``pretrained`` of the libraries'.

    Raises:
        ValueError: an unknown backbone, an arrangement for a plain network or none for an AnaNN, or what the backbone
            or ``acl.convert`` refuses.
    """
    if backbone.startswith("timm/"):
        make: Callable[..., nn.Module] = partial(from_timm, backbone.removeprefix("timm/"))
    elif backbone in BACKBONES:
        make = BACKBONES[backbone]
    else:
        raise ValueError(f"unknown backbone '{backbone}'; known: {', '.join(BACKBONES)}, timm/<name>")
    short = backbone.split("/")[0]
    model = make(channels, classes, **options)
    if layer is None:
        if arrangement:
            raise ValueError(f"model={short} is plain and takes no arrangement; model=ana_{short} does")
        return model
    if not arrangement:
        raise ValueError(
            f"model=ana_{short} needs an arrangement: one of configs/arrangement, as in arrangement=mosaic, "
            "or one per layer, as in arrangement.conv1=G6"
        )
    return convert(model, arrangement, **layer)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters, frozen ones and biases included: (of all convolutions, of the whole model)."""
    convolutions = nn.ModuleList(m for m in model.modules() if isinstance(m, nn.Conv2d | AnalyticConv2d))
    return sum(p.numel() for p in convolutions.parameters()), sum(p.numel() for p in model.parameters())
