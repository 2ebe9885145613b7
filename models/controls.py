"""Controls: plain networks that differ in one respect, to tell what formulas are good for."""

from typing import Literal

import torch
from torch import Tensor, nn

from acl import AnalyticConv2d, analytic_layers, fold
from acl.computed_conv import ComputedConv2d, get_convolution_arguments
from acl.kernels import KINDS
from models.library import find_random_layers

Control = Literal["random", "permuted", "zero_sum", "folded", "shuffled"]
CONTROLS_OF_ANALYTIC = ("folded", "shuffled")
"""The controls that turn an AnaNN into a plain network; the others change plain networks."""


def apply_control(model: nn.Module, control: Control) -> None:
    """Turns a network into a control in place.

    Args:
        model: the network, whose layers are defined in the order of their use: an AnaNN for ``CONTROLS_OF_ANALYTIC``,
            plain for the others.
        control: ``random``: a pretrained network's first convolution has random weights instead, which learn at the
            rate of all random layers; ``permuted``: it has its pretrained filters in a random order, so that the next
            layer finds none where it expects it; ``zero_sum``: each of its kernels sums to zero, during training too;
            ``folded``: an AnaNN becomes plain, and starts with the same weights; ``shuffled``: like ``folded``, with
            the pixels of each formula's kernel in a random order, which keeps its norm, sum and values, but not its
            shape.

    Raises:
        ValueError: for a network without convolutions, for ``random`` and ``permuted`` with a network that is not
            pretrained, and for ``zero_sum`` with a first convolution of another type than nn.Conv2d, or of 1 x 1.
    """
    if control in CONTROLS_OF_ANALYTIC:
        layers = analytic_layers(model)
        fold(model)
        if control == "shuffled":
            for name, layer in layers.items():
                _shuffle_formulas(layer, model.get_parameter(f"{name}.weight").data)
        return
    name, conv = next(((n, module) for n, module in model.named_modules() if isinstance(module, nn.Conv2d)), ("", None))
    if conv is None:
        raise ValueError(f"model.control={control} needs a network with convolutions")
    if control == "zero_sum":
        if type(conv) is not nn.Conv2d or max(conv.kernel_size) == 1:
            size = " x ".join(map(str, conv.kernel_size))
            raise ValueError(f"model.control=zero_sum needs an nn.Conv2d, not the {size} {type(conv).__name__} {name}")
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, ZeroSumConv2d(conv))
        return
    random_layers = find_random_layers(model)
    if random_layers is None:
        raise ValueError(f"model.control={control} needs a pretrained network; set model.pretrained")
    if control == "random":
        conv.reset_parameters()
        random_layers.append(name)
    else:
        order = torch.randperm(conv.out_channels)
        for parameter in conv.parameters():
            parameter.data = parameter.data[order]


def _shuffle_formulas(layer: AnalyticConv2d, weight: Tensor) -> None:
    """Shuffles the pixels of each formula in a weight of a layer's shape, in place; those of a filter in one order."""
    kernels = layer.view_slots(weight.contiguous())
    pixels = kernels.flatten(-2)
    order = torch.rand(len(pixels), *[1] * (pixels.ndim - 2), pixels.shape[-1]).argsort(-1)
    is_formula = torch.tensor([KINDS[symbol].is_analytic for symbol in layer.slot_kinds])
    is_formula = is_formula.view(-1, *[1] * (pixels.ndim - 1))
    shuffled = torch.where(is_formula, pixels.gather(-1, order.expand_as(pixels)), pixels)
    weight.copy_(shuffled.view_as(weight))


class ZeroSumConv2d(ComputedConv2d):
    """A convolution whose kernels each sum to zero: the weight is a free one, less the mean of each kernel.

    Args:
        conv: the convolution to start from, whose bias is taken over.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(**get_convolution_arguments(conv))
        self.free = nn.Parameter(conv.weight.detach().clone())
        self.bias = conv.bias

    def _synthesize(self) -> Tensor:
        return self.free - self.free.mean((2, 3), keepdim=True)

    def _get_sources(self) -> tuple[list[Tensor | None], tuple[()]]:
        return [self.free], ()
