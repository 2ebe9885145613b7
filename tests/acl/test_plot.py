"""acl.plot: figures of analytic layers, of their training and of their contributions."""

import io
import math

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from acl import AnalyticConv2d
from acl.explain import Attribution
from acl.kernels import KINDS
from acl.plot import akp_trajectories, approximation, contributions, mosaic, to_pdf, to_png
from tests.arrangements import arrange_all_kinds


def list_visible_axes(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison]


@pytest.mark.parametrize(
    ("channels", "arrangement"),
    [(3, "G4 Lg2 Tf3 P6"), (1, "G2 Lg1 Lt1 P1"), (4, "Ts50% P50%"), (3, None), (4, None)],
    ids=["RGB", "gray", "four channels", "RGB, all kinds", "four channels, all kinds"],
)
def test_mosaic_outlines_every_slot_in_color_of_its_kind(channels: int, arrangement: str | None) -> None:
    layer = AnalyticConv2d(channels, 5, 5, arrangement=arrangement or arrange_all_kinds())
    figure = mosaic(layer, "title")
    outlines = [patch.get_edgecolor() for axes in figure.axes for patch in axes.patches if isinstance(patch, Rectangle)]
    assert outlines == [to_rgba(KINDS[symbol].color) for symbol in layer.slot_kinds]
    (legend,) = figure.legends
    present = [symbol for symbol, count in layer.arrangement.counts.items() if count]
    assert [text.get_text() for text in legend.get_texts()] == [KINDS[symbol].name for symbol in present]
    assert figure.get_suptitle() == "title"
    figure.savefig(io.BytesIO())


def make_history(layer: AnalyticConv2d) -> dict[str, Tensor]:
    """AKPs that grow by 1 in each of four epochs."""
    return {
        f"{symbol}/{name}": torch.stack([values.detach() + epoch for epoch in range(4)])
        for symbol, akps in layer.akps().items()
        for name, values in akps.items()
    }


@pytest.mark.parametrize(("family", "amplitude"), [("paper", False), ("extended", True)])
def test_akp_trajectories_draws_one_panel_per_akp_and_one_line_per_kernel(family: str, amplitude: bool) -> None:
    layer = AnalyticConv2d(3, 2 * len(KINDS), 5, arrangement=arrange_all_kinds(), family=family, amplitude=amplitude)
    history = make_history(layer)
    figure = akp_trajectories(layer, history)
    panels = list_visible_axes(figure)
    assert len(panels) == len(history)
    expected_titles = [
        f"{KINDS[symbol].name}: {akp.name}" + (f" ({akp.unit})" if akp.unit else "")
        for symbol in layer.akps()
        for akp in KINDS[symbol].akps(family, amplitude)
    ]
    assert [panel.get_title() for panel in panels] == expected_titles
    for panel, values in zip(panels, history.values(), strict=True):
        assert panel.get_xlabel() == "epoch"
        assert len(panel.lines) == values.shape[1]
        for line, trajectory in zip(panel.lines, values.T, strict=True):
            assert line.get_ydata().tolist() == trajectory.tolist()


def test_history_without_akps_of_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="the history has no AKPs of the layer"):
        akp_trajectories(AnalyticConv2d(1, 2, 3, arrangement="P2"), {})


def test_to_png_renders_figure() -> None:
    layer = AnalyticConv2d(1, 2, 3, arrangement="G2")
    assert to_png(akp_trajectories(layer, make_history(layer))).startswith(b"\x89PNG\r\n")


def test_contributions_draws_shapley_value_and_lost_accuracy_of_every_kind_present() -> None:
    present = tuple(symbol for symbol in KINDS if symbol != "Lt")
    correct = {frozenset(): 10, frozenset(present): 90}
    generator = torch.Generator().manual_seed(0)
    for kept in range(1, 2 ** len(present) - 1):
        subset = frozenset(symbol for i, symbol in enumerate(present) if kept >> i & 1)
        correct[subset] = int(torch.randint(10, 90, (), generator=generator))
    attribution = Attribution(present, correct, 2000, "zero")
    figure = contributions(attribution)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [KINDS[symbol].name for symbol in present]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "Shapley value",
        "lost by removing only this kind",
    ]
    assert axes.get_ylabel() == "points of top-1 accuracy"
    assert axes.get_title() == "0.50% without kernels, 4.50% with all (2,000 images)"
    shapley = attribution.shapley()
    bars = [bar for container in axes.containers for bar in container][: 2 * len(present)]
    for i, symbol in enumerate(present):
        lost = attribution.accuracy(present) - attribution.accuracy(set(present) - {symbol})
        assert [bar.get_height() for bar in bars[2 * i : 2 * i + 2]] == pytest.approx([shapley[symbol], lost])
        assert bars[2 * i].get_facecolor() == bars[2 * i + 1].get_edgecolor() == to_rgba(KINDS[symbol].color)
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_approximation_draws_kernels_formulas_and_residuals(channels: int) -> None:
    target = torch.randn(6, channels, 5, 7, generator=torch.Generator().manual_seed(0))
    figure = approximation(target, 0.5 * target, "conv1")
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["kernels", "formulas", "residuals"]
    assert figure.get_suptitle() == "conv1: R² 0.750; best 0.750 (top left) to worst 0.750"
    tiles = 6 if channels == 3 else 6 * channels
    columns = math.ceil(math.sqrt(tiles))
    canvases = [torch.tensor(panel.images[0].get_array()) for panel in panels]
    assert all(canvas.shape == (math.ceil(tiles / columns) * 6 - 1, columns * 8 - 1, 3) for canvas in canvases)
    torch.testing.assert_close(canvases[1], canvases[2])  # the fit is half of the kernel, and so is the residual
    figure.savefig(io.BytesIO())


def test_approximation_sorts_kernels_from_best_to_worst() -> None:
    target = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    fitted = torch.stack([0.5 * target[0], torch.zeros_like(target[1]), target[2]])
    figure = approximation(target, fitted)
    best, second, worst = (
        figure.axes[2].images[0].get_array()[top : top + 5, left : left + 5] for top, left in ((0, 0), (0, 6), (6, 0))
    )
    assert (best == 0.5).all()  # no residual: gray
    assert 0 < abs(second - 0.5).max() < abs(worst - 0.5).max() == 0.5
    assert figure.get_suptitle().endswith("best 1.000 (top left) to worst 0.000")


def test_to_pdf_gives_equal_bytes_for_equal_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AnalyticConv2d(1, 4, 5, arrangement="G100%")
    first = to_pdf(mosaic(layer))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # the date that matplotlib would write
    assert first == to_pdf(mosaic(layer)) and first.startswith(b"%PDF")
    assert b"/Type3" not in first
