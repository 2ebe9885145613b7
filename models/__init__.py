"""Plain networks, and the analytic networks (AnaNNs) converted from them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from acl import convert
from models.controls import CONTROLS_OF_ANALYTIC, Control, apply_control
from models.four_layer import FourLayer
from models.lenet import LeNet
from models.library import create_from_timm, create_from_torchvision

TORCHVISION = ("resnet18", "resnet50", "alexnet", "squeezenet1_0")
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "four_layer": FourLayer,
    **{name: partial(create_from_torchvision, name) for name in TORCHVISION},
}
"""Backbone name -> constructor, which takes the data's ``channels`` and ``classes``, and options of its own."""


def find_backbone(name: str) -> Callable[..., nn.Module]:
    """The constructor of a backbone: one of ``BACKBONES``, or ``timm/<name>``.

    Raises:
        ValueError: for an unknown backbone.
    """
    if name.startswith("timm/"):
        return partial(create_from_timm, name.removeprefix("timm/"))
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone '{name}'; known: {', '.join(BACKBONES)}, timm/<name>")
    return BACKBONES[name]


def create_model(
    backbone: str,
    channels: int,
    classes: int,
    arrangement: Mapping[str, str],
    layer: Mapping[str, Any] | None = None,
    control: Control | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a network for images with ``channels`` channels and ``classes`` classes.

    Args:
        backbone: one of ``BACKBONES``, or ``timm/<name>``.
        channels, classes: the numbers of image channels and classes.
        arrangement: convolution name -> arrangement; convolutions without one stay plain.
        layer: options of ``acl.convert`` for an AnaNN, where None stands for the default; None for a plain network.
        control: makes the network a control (see ``models.controls``).
        options: options of the backbone, such as ``kernel_size`` (four_layer) or ``pretrained`` (torchvision and timm).

    Raises:
        ValueError: for an unknown backbone, an arrangement for a plain network, no arrangement for an AnaNN, a control
            that needs an AnaNN or a plain network instead, or arguments that the backbone, the control or
            ``acl.convert`` rejects.
    """
    create = find_backbone(backbone)
    config_name = backbone.split("/")[0]
    model = create(channels, classes, **options)
    if layer is None:
        if arrangement:
            raise ValueError(f"model={config_name} is plain and takes no arrangement; use model=ana_{config_name}")
        if control in CONTROLS_OF_ANALYTIC:
            raise ValueError(f"model.control={control} needs formulas to start from; use model=ana_{config_name}")
    else:
        if control not in (None, *CONTROLS_OF_ANALYTIC):
            raise ValueError(f"model.control={control} is for plain networks; use model={config_name}")
        if not arrangement:
            raise ValueError(
                f"model=ana_{config_name} needs an arrangement: one of configs/arrangement, such as "
                "arrangement=mosaic, or one per layer, such as arrangement.conv1=G6"
            )
        # An option without a value has its default, but fits recorded without a metric are fits to pixels.
        layer_options = {"metric": "pixels"} | {name: value for name, value in layer.items() if value is not None}
        model = convert(model, arrangement, **layer_options)
    if control is not None:
        apply_control(model, control)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts the parameters, including frozen ones and biases: (in all convolutions, in the whole model)."""
    convolutions = nn.ModuleList(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return sum(p.numel() for p in convolutions.parameters()), sum(p.numel() for p in model.parameters())
