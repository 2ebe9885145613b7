"""Networks: plain ones, and the analytic networks (AnaNNs) made of them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from acl import AnalyticConv2d, convert
from models.four_layer import FourLayer
from models.lenet import LeNet

BACKBONES = {"lenet": LeNet, "four_layer": FourLayer}


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
        backbone: one of ``BACKBONES``.
        channels, classes: of the data.
        arrangement: convolution's name -> arrangement; those not named stay plain.
        layer: options of AnalyticConv2d for an AnaNN; None for a plain network.

    Raises:
        ValueError: an arrangement for a plain network or none for an AnaNN, or what ``acl.convert`` refuses.
    """
    model = BACKBONES[backbone](channels, classes, **options)
    if layer is None:
        if arrangement:
            raise ValueError(f"model={backbone} is plain and takes no arrangement; model=ana_{backbone} does")
        return model
    if not arrangement:
        raise ValueError(
            f"model=ana_{backbone} needs an arrangement: one of configs/arrangement, as in arrangement=mosaic, "
            "or one per layer, as in arrangement.conv1=G6"
        )
    return convert(model, arrangement, **layer)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters, frozen ones and biases included: (of all convolutions, of the whole model)."""
    convolutions = nn.ModuleList(m for m in model.modules() if isinstance(m, nn.Conv2d | AnalyticConv2d))
    return sum(p.numel() for p in convolutions.parameters()), sum(p.numel() for p in model.parameters())
