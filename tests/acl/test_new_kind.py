"""A new kind of kernel needs only a function and an entry in ``KINDS``; every feature then supports it."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import acl
from acl import AnalyticConv2d, Arrangement
from acl.explain import attribute, leave_one_out
from acl.kernels import AKP, KINDS, PROFILES, Kind, analytic_kinds
from acl.plot import akp_trajectories, mosaic
from tests.acl.test_formula import evaluate_formula


def split_disc(
    theta: Tensor,
    radius: Tensor,
    size: tuple[int, int],
    x0: Tensor | float = 0.0,
    y0: Tensor | float = 0.0,
) -> Tensor:
    """A disc with a soft edge, positive on one side and negative on the other."""
    dtype = torch.promote_types(radius.dtype, torch.float32)
    rows, columns = (torch.arange(n, dtype=dtype) - (n - 1) / 2 for n in size)
    theta, radius, x0, y0 = (torch.as_tensor(akp).to(dtype)[..., None, None] for akp in (theta, radius, x0, y0))
    x, y = columns - x0, rows[:, None] - y0
    along = x * torch.cos(theta) + y * torch.sin(theta)
    return along * torch.sigmoid(radius - torch.sqrt(x.square() + y.square() + 1e-24))


DISC = Kind(
    symbol="D",
    name="Disc",
    color="black",
    paper_akps=(
        AKP("theta", "rad", None, lambda k: (0.0, 2 * math.pi), "direction"),
        AKP("radius", "px", 0.5, lambda k: (1.0, max(2.0, k / 3)), "length"),
    ),
    extended_akps=(
        AKP("x0", "px", None, lambda k: (-k / 8, k / 8), "center_x"),
        AKP("y0", "px", None, lambda k: (-k / 8, k / 8), "center_y"),
    ),
    function=split_disc,
    formula_template="x'/(1 + exp(sqrt(x^2 + y^2) - {radius}))",
)
RADII = torch.linspace(1, 2, 6)


@pytest.fixture(autouse=True)
def register_disc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "D", DISC)


def make_disc_conv() -> nn.Conv2d:
    """A convolution with six disc kernels and two random ones."""
    conv = nn.Conv2d(2, 4, 5, padding=2)
    akps = {"theta": torch.linspace(0, 5, 6), "radius": RADII}
    with torch.no_grad():
        conv.weight.flatten(0, 1)[:6] = 0.3 * split_disc(**akps, size=(5, 5))
    return conv


def test_arrangement_parses_new_kind() -> None:
    assert Arrangement.parse("D6 P2").counts == {"D": 6, "P": 2}
    assert str(Arrangement.parse("D75% P25%").fill(2, 8)) == "D12 P4"
    assert list(analytic_kinds())[-1] == "D"
    with pytest.raises(ValueError, match=r"unknown kind 'X'.*D \(Disc\)"):
        Arrangement.parse("X6")


@pytest.mark.parametrize("family", ["paper", "extended"])
def test_layer_of_new_kind_trains_evaluates_and_folds(family: str) -> None:
    layer = AnalyticConv2d(4, 8, 5, arrangement="D50% P50%", family=family, amplitude=True)
    assert list(layer.akps()["D"]) == [akp.name for akp in DISC.akps(family, amplitude=True)]
    assert all(values.shape == (16,) for values in layer.akps()["D"].values())
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    x = torch.randn(2, 4, 8, 8)
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert all((p != before[name]).all() for name, p in layer.named_parameters())
    expected = layer(x)
    torch.testing.assert_close(layer.eval()(x), expected)
    torch.testing.assert_close(layer.fold()(x), expected)


def test_layer_learns_only_named_akp_of_new_kind() -> None:
    layer = AnalyticConv2d(4, 8, 5, arrangement="D50% P50%", learn="radius")
    layer(torch.randn(1, 4, 8, 8)).square().sum().backward()
    assert (layer.raw["D_radius"].grad != 0).all()
    assert layer.raw["D_theta"].grad is None


@pytest.mark.parametrize("family", ["paper", "extended"])
def test_fit_recovers_kernels_of_new_kind(family: str) -> None:
    weight = make_disc_conv().weight.detach()[:3]
    fit = acl.fit_kernels(weight, ["D"], family, progress=False)
    assert all(kernel.kind == "D" and kernel.r2 > 0.9999 for kernel in fit.kernels)
    assert (fit.weight() - weight).abs().max() < 1e-2
    if family == "paper":
        for kernel, radius in zip(fit.kernels, RADII.tolist(), strict=True):
            assert kernel.akps["radius"] == pytest.approx(radius, abs=1e-2)
            assert abs(kernel.gains[0]) == pytest.approx(0.3, abs=1e-2)
    assert acl.Fit.from_json(fit.to_json()) == fit


def test_fit_tries_new_kind_by_default() -> None:
    fit = acl.fit_kernels(make_disc_conv().weight[:2], progress=False)
    assert set(fit.by_kind) == set(analytic_kinds())
    assert [kernel.kind for kernel in fit.kernels] == ["D"] * 4


def test_convert_with_fit_keeps_output_of_new_kind() -> None:
    conv = make_disc_conv()
    x = torch.randn(2, 2, 12, 12)
    expected = conv(x)
    layer = acl.convert(conv, "all", "D6 P2", init="fit", amplitude=True)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-2)


def test_convert_with_auto_chooses_new_kind() -> None:
    conv = make_disc_conv()
    x = torch.randn(2, 2, 12, 12)
    expected = conv(x)
    layer = acl.convert(conv, "all", "auto", tolerance=1e-3, amplitude=True)
    assert layer.slot_kinds == ["D"] * 6 + ["P"] * 2
    assert str(layer.arrangement) == "P2 D6"
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-2)


def test_plots_draw_new_kind() -> None:
    layer = AnalyticConv2d(4, 8, 5, arrangement="D50% P50%")
    figure = mosaic(layer)
    assert len(figure.axes[0].patches) == 32
    assert "Disc" in [text.get_text() for text in figure.legends[0].get_texts()]
    history = {f"D/{name}": torch.stack([v, v + 1]).detach() for name, v in layer.akps()["D"].items()}
    titles = [axis.get_title() for axis in akp_trajectories(layer, history).axes]
    assert "Disc: radius (px)" in titles and "Disc: theta (rad)" in titles


@pytest.mark.parametrize("profile", PROFILES)
def test_formula_evaluates_to_kernel_of_new_kind(profile: str) -> None:
    layer = AnalyticConv2d(
        1, 3, (7, 6), arrangement="D3", family="extended", profile=profile, amplitude=True, dtype=torch.double
    )
    for slot, kernel in enumerate(layer.weight.detach().flatten(0, 1)):
        text = layer.formula(slot, digits=12)
        assert "; theta = " in text and "; center = (" in text and "w(t)" not in text
        assert (evaluate_formula(text, (7, 6)) - kernel).abs().max() < 1e-9


def test_explain_attributes_accuracy_to_new_kind() -> None:
    layer = AnalyticConv2d(1, 6, 5, arrangement="D50% G50%")
    model = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))
    images = torch.randn(50, 1, 12, 12)

    def iterate_batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield images, model.eval()(images).argmax(1)

    result = attribute(model, iterate_batches, progress=False)
    assert result.kinds == ("G", "D")
    assert result.accuracy(["G", "D"]) == 100
    values = result.shapley()
    assert values["D"] + values["G"] == pytest.approx(result.drop)
    with torch.no_grad():
        without_disc = layer.weight * torch.tensor([symbol != "D" for symbol in layer.slot_kinds]).view(6, 1, 1, 1)
        remaining = model[1:](layer.convolve(images, without_disc, layer.bias)).argmax(1)
    assert result.accuracy(["G"]) == pytest.approx(100 * (remaining == model(images).argmax(1)).double().mean().item())
    assert leave_one_out(model, iterate_batches, progress=False)["0"].shape == (6,)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_contains_new_kind(strict: bool) -> None:
    layer = AnalyticConv2d(4, 8, 5, arrangement="D50% P50%", family="extended").eval()
    x = torch.randn(2, 4, 8, 8)
    program = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), layer(x))
    assert "raw.D_radius" in program.state_dict
