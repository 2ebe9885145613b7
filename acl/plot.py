"""Pictures of analytic layers. Needs matplotlib (``pip install anann[plot]``)."""

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from acl.kernels import KINDS

if TYPE_CHECKING:
    from acl.explain import Attribution
    from acl.layer import AnalyticConv2d


_RED_BLUE = colormaps["RdBu_r"]


def to_png(figure: Figure) -> bytes:
    """The picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


@torch.no_grad()
def mosaic(layer: "AnalyticConv2d", title: str | None = None) -> Figure:
    """A layer's kernels with their kinds as outlines, in the paper's colours.

    A layer of three input channels is drawn as the paper draws it, one RGB tile an output channel (grey is 0), its
    outline shared by the kinds of its three slots; any other one slot by slot (blue is negative, red positive), a row
    an output channel. Each tile has a scale of its own.

    Args:
        layer: the layer to draw.
        title: above the tiles.

    Returns:
        The figure, to show or save; it belongs to no window.
    """
    weight = layer.weight.detach().float().cpu()
    kinds = layer.slot_kinds
    colour = weight.shape[1] == 3
    if colour:
        tiles = weight.permute(0, 2, 3, 1)
        labels = [kinds[3 * i : 3 * i + 3] for i in range(len(tiles))]
        columns = math.ceil(math.sqrt(len(tiles)))
    else:
        tiles = weight.flatten(0, 1)
        labels = [[kind] for kind in kinds]
        columns = weight.shape[1] if weight.shape[1] > 1 else math.ceil(math.sqrt(len(tiles)))
    tiles = tiles / tiles.flatten(1).abs().amax(1).clamp(min=1e-12).reshape(-1, *[1] * (tiles.ndim - 1))
    rows = math.ceil(len(tiles) / columns)
    scale = max(0.35, min(0.7, 8 / max(rows, columns)))
    figure = Figure(figsize=(max(4.0, columns * scale), rows * scale + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, tile, label in zip(axes, tiles, labels, strict=False):
        if colour:
            axis.imshow((tile / 2 + 0.5).numpy())
        else:
            axis.imshow(tile.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        height, width = tile.shape[:2]
        for i, symbol in enumerate(label):
            # Kinds that share a tile share its outline as dashes in turn.
            dashes = "solid" if len(set(label)) == 1 else (4 * i, (4, 4 * (len(label) - 1)))
            axis.add_patch(
                Rectangle(
                    (-0.5, -0.5),
                    width,
                    height,
                    fill=False,
                    edgecolor=KINDS[symbol].colour,
                    linewidth=2.5,
                    linestyle=dashes,
                    clip_on=False,
                )
            )
    present = [KINDS[symbol] for symbol, count in layer.arrangement.counts.items() if count]
    handles = [Patch(facecolor="none", edgecolor=kind.colour, linewidth=2, label=kind.name) for kind in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def contributions(attribution: "Attribution") -> Figure:
    """What each kind of kernel does for the accuracy, in points: Shapley values, and what is lost without it alone."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    whole, values = attribution.accuracy(KINDS), attribution.shapley()
    for i, symbol in enumerate(attribution.kinds):
        lost = whole - attribution.accuracy(set(KINDS) - {symbol})
        bars = axes.bar(i - 0.2, values[symbol], 0.4, color=KINDS[symbol].colour)
        axes.bar_label(bars, fmt="%+.2f", padding=2)
        axes.bar(i + 0.2, lost, 0.4, color="none", edgecolor=KINDS[symbol].colour, hatch="///")
    axes.bar(0, 0, color="grey", label="share of the whole (Shapley value)")
    axes.bar(0, 0, color="none", edgecolor="grey", hatch="///", label="lost without this kind alone")
    axes.set_xticks(range(len(attribution.kinds)), [KINDS[symbol].name for symbol in attribution.kinds])
    axes.set_ylabel("points of top-1 accuracy")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    axes.set_title(
        f"{attribution.accuracy(()):.2f}% without kernels, {whole:.2f}% with all ({attribution.images:,} images)",
        fontsize=10,
    )
    return figure


def paths(layer: "AnalyticConv2d", history: Mapping[str, Tensor]) -> Figure:
    """How a layer's AKPs moved: one panel an AKP and kind, a line a kernel, and their distribution at both ends.

    Args:
        history: "<symbol>/<akp>" -> (times, count), natural units; the first time is the start.
    """
    names = [name for name in history if name.split("/")[0] in layer.akps()]
    kinds = list(dict.fromkeys(name.split("/")[0] for name in names))
    columns = max(sum(name.startswith(f"{symbol}/") for name in names) for symbol in kinds)
    figure = Figure(figsize=(3 * columns, 2.3 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for row, symbol in enumerate(kinds):
        akps = {akp.name: akp for akp in KINDS[symbol].parameters("extended", True)}
        for axis, name in zip(grid[row], [n for n in names if n.startswith(f"{symbol}/")], strict=False):
            values, akp = history[name].float().cpu(), akps[name.split("/")[1]]
            axis.set_axis_on()
            axis.plot(values[:, :200].numpy(), color=KINDS[symbol].colour, alpha=0.4, linewidth=0.8)
            beside = axis.inset_axes((1.02, 0, 0.25, 1), sharey=axis)
            for time, style in ((0, "step"), (-1, "stepfilled")):
                beside.hist(
                    values[time].numpy(),
                    bins=15,
                    orientation="horizontal",
                    histtype=style,
                    color=KINDS[symbol].colour if time else "grey",
                    alpha=0.6,
                )
            beside.set_axis_off()
            axis.set_title(f"{KINDS[symbol].name}: {akp.name}" + (f" ({akp.unit})" if akp.unit else ""), fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("epoch", fontsize=7)
    return figure


@torch.no_grad()
def approximation(target: Tensor, fitted: Tensor, title: str | None = None) -> Figure:
    """Kernels, the formulas fitted to them, and what is left, side by side, best to worst.

    Kernels of three input channels are drawn as RGB tiles, an output channel each (grey is 0), others one by one (blue
    is negative, red positive). A tile has one scale in all three panels.

    Args:
        target, fitted: (out, in / groups, kh, kw).
    """
    target, fitted = target.detach().float().cpu(), fitted.detach().float().cpu()
    colour = target.shape[1] == 3
    tiles = [w if colour else w.flatten(0, 1)[:, None] for w in (target, fitted, target - fitted)]
    energy = tiles[0].square().sum((1, 2, 3))
    r2 = 1 - tiles[2].square().sum((1, 2, 3)) / energy.clamp(min=1e-20)
    order = r2.argsort(descending=True)
    scale = tiles[0].abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    columns = math.ceil(math.sqrt(len(order)))
    height, width = target.shape[2:]
    rows = math.ceil(len(order) / columns)
    figure = Figure(figsize=(12, 4.4 * rows * height / (columns * width) + 0.5), layout="constrained")
    for axis, panel, name in zip(figure.subplots(1, 3), tiles, ("kernels", "formulas", "residuals"), strict=True):
        # One picture of all tiles, with a white line between them.
        canvas = torch.ones(rows * (height + 1), columns * (width + 1), 3)
        for place, i in enumerate(order.tolist()):
            tile = (panel[i] / scale[i]).clamp(-1, 1)
            picture = (
                (tile.permute(1, 2, 0) + 1) / 2 if colour else torch.from_numpy(_RED_BLUE(tile[0].numpy() / 2 + 0.5))
            )
            top, left = place // columns * (height + 1), place % columns * (width + 1)
            canvas[top : top + height, left : left + width] = picture[..., :3]
        axis.imshow(canvas.numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(name)
    whole = 1 - tiles[2].square().sum() / energy.sum().clamp(min=1e-20)
    figure.suptitle(
        f"{title + ': ' if title else ''}R² {whole:.3f}; best {r2.max():.3f} (top left) to worst {r2.min():.3f}"
    )
    return figure
