"""Pictures of analytic layers. Needs matplotlib (``pip install anann[plot]``)."""

import io
import math
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from acl.kernels import KINDS

if TYPE_CHECKING:
    from acl.layer import AnalyticConv2d


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
    kinds = [symbol for symbol, count in layer.arrangement.counts.items() for _ in range(count)]
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
