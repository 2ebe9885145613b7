"""A run's report: one HTML file that needs no network, with its kernels, their formulas and what they do."""

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from acl import AnalyticConv2d, plot
from acl.explain import Attribution, analytic_layers, formula
from acl.kernels import KINDS

SHOWN = 600
"""Kernels of a layer that the report shows one by one, those of most energy first; more would make it too large."""
TEMPLATE = Path(__file__).with_name("report.html")


def report(
    record: Mapping[str, Any],
    model: nn.Module,
    start: nn.Module | None,
    paths: Mapping[str, Tensor],
    attributions: Mapping[str, Attribution],
    lost: Mapping[str, Tensor] | None,
    split: str,
) -> str:
    """The HTML of a finished run.

    Args:
        record: the run's.
        model: trained.
        start: as it was before training; None where that is not known.
        paths: AKPs over epochs, as in the run's akps.safetensors; empty where there are none.
        attributions: how removed kernels were replaced -> the attribution.
        lost: layer -> points lost without each single kernel, if that was measured.
        split: the images that ``attributions`` and ``lost`` are about.
    """
    starts = analytic_layers(start) if start is not None else {}
    layers = []
    for name, layer in tqdm(analytic_layers(model).items(), desc="drawing", unit="layer", disable=None):
        history = {key.removeprefix(f"{name}/"): values for key, values in paths.items() if key.startswith(f"{name}/")}
        small = layer.weight.shape[0] * layer.weight.shape[1] <= SHOWN
        layers.append(
            {
                "name": name,
                "arrangement": str(layer.arrangement),
                "size": f"{layer.kernel_size[0]} x {layer.kernel_size[1]}",
                "parameters": sum(p.numel() for p in layer.parameters()),
                "before": picture(plot.mosaic(starts[name])) if small and name in starts else None,
                "after": picture(plot.mosaic(layer)) if small else None,
                "paths": picture(plot.paths(layer, history)) if history else None,
                "kernels": list(kernels(layer, None if lost is None else lost[name])),
                "slots": layer.weight.shape[0] * layer.weight.shape[1],
            }
        )
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, autoescape=True)
    return environment.get_template(TEMPLATE.name).render(
        record=record,
        layers=layers,
        kinds=[KINDS[symbol] for symbol in KINDS],
        contributions={how: picture(plot.contributions(a)) for how, a in attributions.items()},
        split=split,
    )


def kernels(layer: AnalyticConv2d, lost: Tensor | None) -> Iterator[dict[str, Any]]:
    """What there is to say of each kernel, those of most energy first where they are too many to show."""
    weight = layer.weight.detach().float().cpu().flatten(0, 1)
    energy = weight.square().sum((1, 2))
    slots = range(len(weight)) if len(weight) <= SHOWN else energy.argsort(descending=True)[:SHOWN].tolist()
    akps = {symbol: (layer.slots_of(symbol), values) for symbol, values in layer.akps().items()}
    inside = layer.weight.shape[1]
    for slot in slots:
        symbol = layer.slot_kinds[slot]
        values = {}
        if symbol in akps:
            i = akps[symbol][0].index(slot)
            units = {akp.name: akp.unit for akp in KINDS[symbol].parameters("extended", True)}
            values = {name: f"{akp[i].item():.3f} {units[name]}".strip() for name, akp in akps[symbol][1].items()}
        yield {
            "out": slot // inside,
            "in": slot % inside,
            "kind": KINDS[symbol],
            "formula": formula(layer, slot),
            "akps": ", ".join(f"{name} {value}" for name, value in values.items()),
            "lost": None if lost is None else f"{lost[slot]:+.2f}",
            "image": tile(weight[slot]),
        }


def tile(kernel: Tensor) -> str:
    """A kernel as a small picture: blue is negative, red positive, white 0."""
    scaled = kernel / kernel.abs().max().clamp(min=1e-12) / 2 + 0.5
    pixels = (colormaps["RdBu_r"](scaled.numpy())[..., :3] * 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return _data(buffer.getvalue())


def picture(figure: Figure) -> str:
    return _data(plot.to_png(figure))


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
