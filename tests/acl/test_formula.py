"""The printed formulas, evaluated on the grid and compared with the kernels."""

import math
from collections import ChainMap
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from acl import AnalyticConv2d, Arrangement
from acl.kernels import AMPLITUDE, FAMILIES, KINDS, PROFILES, analytic_kinds
from acl.options import Scale


class Formula(dict[str, Any]):
    """The names in a printed formula, with their values on a kh x kw grid.

    The text is ``expression; definition; ...``. A definition gives a name (``q = ...``), a function
    (``w(t) = ...``), the angle (``theta = 30 deg``) or the center (``center = (x0, y0)``).
    """

    def __init__(self, text: str, size: tuple[int, int]) -> None:
        self.expression, *definitions = text.split("; ")
        self.definitions = dict(definition.split(" = ") for definition in definitions)
        angle = self.definitions.pop("theta", "0 deg")
        assert angle.endswith(" deg")
        theta = math.radians(float(angle.removesuffix(" deg")))
        x0, y0 = (float(value) for value in self.definitions.pop("center", "(0, 0)").strip("()").split(", "))
        y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.double) - (n - 1) / 2 for n in size), indexing="ij")
        x, y = x - x0, y - y0
        super().__init__(
            x=x,
            y=y,
            x_rotated=x * math.cos(theta) + y * math.sin(theta),
            y_rotated=y * math.cos(theta) - x * math.sin(theta),
            pi=math.pi,
            exp=torch.exp,
            cos=torch.cos,
            sqrt=torch.sqrt,
            abs=torch.abs,
            sum=torch.sum,
            mean=torch.mean,
            max=lambda bound, t: t.clamp(min=bound),
            tri=lambda t: (1 - t.abs()).clamp(min=0),
            step=lambda t: (2 * t).clamp(-1, 1),
        )

    def __missing__(self, name: str) -> Tensor | Callable[[Tensor], Tensor]:
        if name in self.definitions:
            return self.evaluate(self.definitions[name])
        if f"{name}(t)" in self.definitions:
            return lambda t: self.evaluate(self.definitions[f"{name}(t)"], t=t)
        raise KeyError(name)

    def evaluate(self, expression: str, **arguments: Tensor) -> Tensor:
        python = expression.replace("x'", "x_rotated").replace("y'", "y_rotated").replace("^", "**")
        return eval(python, {"__builtins__": {}}, ChainMap(arguments, self))


def evaluate_formula(text: str, size: tuple[int, int]) -> Tensor:
    """The kernel (kh, kw) that the text of ``AnalyticConv2d.formula`` describes."""
    formula = Formula(text, size)
    return formula.evaluate(formula.expression)


def make_layer(kernel_size: int | tuple[int, int] = 7, **options: Any) -> AnalyticConv2d:
    """Four kernels of every kind in float64, with random gains if the layer has ``amplitude``."""
    arrangement = " ".join(f"{symbol}4" for symbol in KINDS)
    layer = AnalyticConv2d(
        2, 2 * len(KINDS), kernel_size, **{"arrangement": arrangement, "dtype": torch.double, **options}
    )
    if layer.options.amplitude:
        for symbol in layer.akps():
            layer.set_akps(symbol, {AMPLITUDE.name: torch.randn(4)})
    return layer


def list_kernels(layer: AnalyticConv2d) -> list[tuple[int, Tensor]]:
    """The layer's analytic kernels by slot."""
    kernels = layer.weight.detach().flatten(0, 1)
    return [(slot, kernels[slot]) for slot, symbol in enumerate(layer.slot_kinds) if KINDS[symbol].is_analytic]


@pytest.mark.parametrize("kernel_size", [(7, 7), (5, 6)], ids=str)
@pytest.mark.parametrize("amplitude", [False, True])
@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("profile", PROFILES)
def test_formula_evaluates_to_kernel(
    profile: str, family: str, scale: str, amplitude: bool, kernel_size: tuple[int, int]
) -> None:
    layer = make_layer(kernel_size, profile=profile, family=family, scale=scale, amplitude=amplitude)
    for slot, kernel in list_kernels(layer):
        text = layer.formula(slot, digits=12)
        error = (evaluate_formula(text, kernel_size) - kernel).abs().max()
        assert error < 1e-9 * max(1, kernel.abs().max()), text
        assert kernel.abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_formula_with_default_digits_is_within_five_percent(family: str) -> None:
    layer = make_layer(family=family, amplitude=True)
    for slot, kernel in list_kernels(layer):
        error = (evaluate_formula(layer.formula(slot), (7, 7)) - kernel).abs().max()
        assert error < 0.05 * kernel.abs().max(), layer.formula(slot)


@pytest.mark.parametrize("family", FAMILIES)
def test_formula_follows_placement(family: str) -> None:
    layer = make_layer(family=family, placement=torch.randperm(4 * len(KINDS)))
    assert layer.slot_kinds != make_layer().slot_kinds
    for slot, kernel in list_kernels(layer):
        assert (evaluate_formula(layer.formula(slot, digits=12), (7, 7)) - kernel).abs().max() < 1e-9


def test_formula_is_independent_of_dtype_and_mode() -> None:
    layer = make_layer(family="extended", amplitude=True)
    texts = [layer.formula(slot) for slot, _ in list_kernels(layer)]
    assert [layer.float().eval().formula(slot) for slot, _ in list_kernels(layer)] == texts


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symbol", analytic_kinds())
def test_formula_defines_angle_center_and_profile_only_if_kernel_has_them(
    symbol: str, family: str, profile: str
) -> None:
    layer = AnalyticConv2d(1, 1, 5, arrangement=f"{symbol}1", family=family, profile=profile)
    text, akps = layer.formula(0), layer.akps()[symbol]
    assert ("; theta = " in text and " deg" in text) == ("theta" in akps)
    assert ("; center = (" in text) == ("x0" in akps)
    assert ("; w(t) = " in text) == KINDS[symbol].takes_profile
    assert "{" not in text and "}" not in text


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("symbol", analytic_kinds())
def test_kind_formula_describes_kernel_before_scaling(symbol: str, profile: str) -> None:
    kind = KINDS[symbol]
    akps = {akp.name: akp.sample(1, (7, 7)).double() for akp in kind.akps("extended")}
    text = kind.formula({name: value.item() for name, value in akps.items()}, profile, digits=12)
    assert (evaluate_formula(text, (7, 7)) - kind.synthesize(akps, (7, 7), profile)[0]).abs().max() < 1e-9


def test_formula_of_gabor_kernel_reads_as_documented() -> None:
    layer = AnalyticConv2d(1, 1, 7, arrangement="G1", scale="raw", amplitude=True)
    akps = {"theta": math.radians(30), "wavelength": 4.1, "psi": 0.5, "sigma": 1.83, "amplitude": 0.21}
    layer.set_akps("G", {name: torch.tensor([value]) for name, value in akps.items()})
    expected = "0.21*(exp(-(x'^2 + y'^2)/(2*1.83^2))*cos(2*pi*x'/4.1 + 0.5)); theta = 30 deg"
    assert layer.formula(0) == expected


def test_formula_of_plain_kernel_states_its_size() -> None:
    layer = AnalyticConv2d(2, 3, (7, 5), arrangement="P2 G4")
    assert layer.formula(0) == "7 x 5 free weights"
    assert AnalyticConv2d(2, 3, 7, arrangement=Arrangement.parse("G5 P1")).formula(5) == "7 x 7 free weights"


@pytest.mark.parametrize("slot", [-1, 12])
def test_formula_names_slot_out_of_range(slot: int) -> None:
    layer = AnalyticConv2d(3, 4, 5, arrangement="G12")
    with pytest.raises(IndexError, match=f"slot {slot} is out of range; the layer has slots 0 to 11"):
        layer.formula(slot)
