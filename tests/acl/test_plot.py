import io

import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from acl import AnalyticConv2d
from acl.kernels import KINDS
from acl.plot import mosaic


@pytest.mark.parametrize(("channels", "arrangement"), [(3, "G4 Lg2 Tf3 P6"), (1, "G2 Lg1 Lt1 P1"), (4, "Ts50% P50%")])
def test_every_slot_is_outlined_in_its_kinds_colour(channels: int, arrangement: str) -> None:
    layer = AnalyticConv2d(channels, 5, 5, arrangement=arrangement)
    figure = mosaic(layer, "title")
    outlines = [patch.get_edgecolor() for axis in figure.axes for patch in axis.patches if isinstance(patch, Rectangle)]
    wanted = [to_rgba(KINDS[symbol].colour) for symbol, n in layer.arrangement.counts.items() for _ in range(n)]
    assert outlines == wanted
    figure.savefig(io.BytesIO())
