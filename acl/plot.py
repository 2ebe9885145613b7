"""Figures of analytic layers. Needs matplotlib (``pip install anann[plot]``)."""

import io
import math
from collections.abc import Mapping

import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from acl.explain import Attribution
from acl.kernels import KINDS
from acl.layer import AnalyticConv2d

_RED_BLUE = colormaps["RdBu_r"]
_MAX_TRAJECTORIES = 200
_MOSAIC_GAP = 2
"""Pixels of kernels between the tiles of a mosaic."""


def to_png(figure: Figure) -> bytes:
    """Encodes a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def to_pdf(figure: Figure) -> bytes:
    """Encodes a figure as a PDF file without a date, so that equal figures give equal files."""
    buffer = io.BytesIO()
    with rc_context({"pdf.fonttype": 42}):  # publishers reject the default, Type 3 fonts
        figure.savefig(buffer, format="pdf", dpi=120, metadata={"CreationDate": None})
    return buffer.getvalue()


@torch.no_grad()
def mosaic(layer: AnalyticConv2d, title: str | None = None) -> Figure:
    """Plots a layer's kernels, outlined in the colors of their kinds as in the paper.

    A layer with three input channels is drawn as in the paper: one RGB tile per output channel (gray is 0), with
    the colors of its three kernels' kinds alternating in the outline. Any other layer is drawn with one tile per
    kernel, or per filter its kernel of most energy (blue is negative, red is positive). Each tile is scaled separately.

    Args:
        layer: the layer to draw.
        title: the figure's title.
    """
    weight = layer.weight.detach().float().cpu()
    slot_kinds = layer.slot_kinds
    is_rgb = weight.shape[1] == 3
    tiles = weight.permute(0, 2, 3, 1) if is_rgb else get_slot_kernels(layer)
    tiles = tiles / tiles.flatten(1).abs().amax(1).clamp(min=1e-12).reshape(-1, *[1] * (tiles.ndim - 1))
    pixels = tiles / 2 + 0.5 if is_rgb else torch.from_numpy(_RED_BLUE(tiles.numpy() / 2 + 0.5))[..., :3]
    kinds_per_tile = len(slot_kinds) // len(tiles)
    has_row_per_filter = len(tiles) > len(weight)
    columns = weight.shape[1] if has_row_per_filter else math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    tile_size = max(0.35, min(0.7, 8 / max(rows, columns)))
    figure = Figure(figsize=(max(4.0, columns * tile_size), rows * tile_size + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    height, width = tiles.shape[1:3]
    axes.imshow(_arrange_tiles(pixels, columns, _MOSAIC_GAP).numpy(), interpolation="nearest")
    for i in range(len(tiles)):
        corner = (i % columns * (width + _MOSAIC_GAP) - 0.5, i // columns * (height + _MOSAIC_GAP) - 0.5)
        _draw_outline(axes, corner, width, height, slot_kinds[i * kinds_per_tile : (i + 1) * kinds_per_tile])
    present = [KINDS[symbol] for symbol, count in layer.arrangement.counts.items() if count]
    handles = [Patch(facecolor="none", edgecolor=kind.color, linewidth=2, label=kind.name) for kind in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def get_slot_kernels(layer: AnalyticConv2d) -> Tensor:
    """The kernel of each slot, (slots, kh, kw) float32; of a filter, its kernel of most energy."""
    weight = layer.weight.detach().float().cpu()
    if layer.options.per == "kernel":
        return weight.flatten(0, 1)
    return weight[torch.arange(len(weight)), weight.square().sum((2, 3)).argmax(1)]


def _arrange_tiles(tiles: Tensor, columns: int, gap: int) -> Tensor:
    """Draws RGB tiles (n, h, w, 3) from 0 to 1 in one image, in rows, with white gaps between them."""
    rows, (height, width) = math.ceil(len(tiles) / columns), tiles.shape[1:3]
    canvas = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def _draw_outline(axes: Axes, corner: tuple[float, float], width: int, height: int, symbols: list[str]) -> None:
    """Outlines a tile in the colors of its kinds; several kinds alternate as dashes."""
    for i, symbol in enumerate(symbols):
        linestyle = "solid" if len(set(symbols)) == 1 else (4 * i, (4, 4 * (len(symbols) - 1)))
        color = KINDS[symbol].color
        axes.add_patch(
            Rectangle(
                corner, width, height, fill=False, edgecolor=color, linewidth=2, linestyle=linestyle, clip_on=False
            )
        )


def contributions(attribution: Attribution) -> Figure:
    """Plots each kind's contribution to the accuracy: its Shapley value, and the accuracy lost by removing only it."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    values, lost = attribution.shapley(), attribution.leave_one_out()
    for i, symbol in enumerate(attribution.kinds):
        bars = axes.bar(i - 0.2, values[symbol], 0.4, color=KINDS[symbol].color)
        axes.bar_label(bars, fmt="%+.2f", padding=2)
        axes.bar(i + 0.2, lost[symbol], 0.4, color="none", edgecolor=KINDS[symbol].color, hatch="///")
    axes.bar(0, 0, color="gray", label="Shapley value")
    axes.bar(0, 0, color="none", edgecolor="gray", hatch="///", label="lost by removing only this kind")
    axes.set_xticks(range(len(attribution.kinds)), [KINDS[symbol].name for symbol in attribution.kinds])
    axes.set_ylabel("points of top-1 accuracy")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    axes.set_title(
        f"{attribution.accuracy(()):.2f}% without kernels, {attribution.accuracy(KINDS):.2f}% with all "
        f"({attribution.images:,} images)",
        fontsize=10,
    )
    return figure


def akp_trajectories(layer: AnalyticConv2d, history: Mapping[str, Tensor]) -> Figure:
    """Plots a layer's AKPs over training: per kind and AKP, one line per kernel and the first and last histograms.

    Args:
        layer: the layer that was trained.
        history: "<symbol>/<akp>" -> (times, count) in natural units; the first row holds the initial values.
    """
    panels = {
        symbol: [akp for akp in KINDS[symbol].akps("extended", amplitude=True) if f"{symbol}/{akp.name}" in history]
        for symbol in layer.akps()
    }
    panels = {symbol: akps for symbol, akps in panels.items() if akps}
    if not panels:
        raise ValueError("the history has no AKPs of the layer")
    columns = max(map(len, panels.values()))
    figure = Figure(figsize=(3 * columns, 2.3 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for row, (symbol, akps) in zip(grid, panels.items(), strict=True):
        kind = KINDS[symbol]
        for axis, akp in zip(row, akps, strict=False):
            values = history[f"{symbol}/{akp.name}"].detach().float().cpu()
            axis.set_axis_on()
            axis.plot(values[:, :_MAX_TRAJECTORIES].numpy(), color=kind.color, alpha=0.4, linewidth=0.8)
            histogram = axis.inset_axes((1.02, 0, 0.25, 1), sharey=axis)
            for time, color, style in ((0, "gray", "step"), (-1, kind.color, "stepfilled")):
                histogram.hist(
                    values[time].numpy(), bins=15, orientation="horizontal", histtype=style, color=color, alpha=0.6
                )
            histogram.set_axis_off()
            axis.set_title(f"{kind.name}: {akp.name}" + (f" ({akp.unit})" if akp.unit else ""), fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("epoch", fontsize=7)
    return figure


@torch.no_grad()
def approximation(target: Tensor, fitted: Tensor, title: str | None = None) -> Figure:
    """Plots kernels, the formulas fitted to them and the residuals side by side, sorted from best to worst fit.

    Kernels with three input channels are drawn as RGB tiles, one per output channel (gray is 0); others as one tile per
    kernel (blue is negative, red is positive). A tile has the same scale in all three panels.

    Args:
        target, fitted: (out, in / groups, kh, kw).
        title: a prefix for the figure's title, which states R^2.
    """
    target, fitted = target.detach().float().cpu(), fitted.detach().float().cpu()
    is_rgb = target.shape[1] == 3
    panels = [w if is_rgb else w.flatten(0, 1)[:, None] for w in (target, fitted, target - fitted)]
    energy = panels[0].square().sum((1, 2, 3))
    r2 = 1 - panels[2].square().sum((1, 2, 3)) / energy.clamp(min=1e-20)
    order = r2.argsort(descending=True)
    scale = panels[0].abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    columns = math.ceil(math.sqrt(len(order)))
    rows = math.ceil(len(order) / columns)
    height, width = target.shape[2:]
    figure = Figure(figsize=(12, 4.4 * rows * height / (columns * width) + 0.5), layout="constrained")
    for axis, panel, name in zip(figure.subplots(1, 3), panels, ("kernels", "formulas", "residuals"), strict=True):
        tiles = (panel / scale).clamp(-1, 1)[order] / 2 + 0.5
        pixels = tiles.permute(0, 2, 3, 1) if is_rgb else torch.from_numpy(_RED_BLUE(tiles[:, 0].numpy()))[..., :3]
        canvas = _arrange_tiles(pixels, columns, 1)
        axis.imshow(canvas.numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(name)
    total = 1 - panels[2].square().sum() / energy.sum().clamp(min=1e-20)
    prefix = f"{title}: " if title else ""
    figure.suptitle(f"{prefix}R² {total:.3f}; best {r2.max():.3f} (top left) to worst {r2.min():.3f}")
    return figure
