"""Pictures of analytic layers. Needs matplotlib (``pip install anann[plot]``)."""

import io
import math
from typing import TYPE_CHECKING

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from acl.kernels import KINDS

if TYPE_CHECKING:
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
