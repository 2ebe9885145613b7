"""The HTML page of one run: its kernels, their formulas and their contributions, in one self-contained file."""

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from acl import AnalyticConv2d, analytic_layers, plot
from acl.explain import Attribution, Replacement
from acl.kernels import KINDS
from training.record import Record

MAX_KERNELS = 600
"""The most kernels of a layer that the page shows one by one; of larger layers, those with the most energy."""
TEMPLATE = Path(__file__).with_name("run_page.html")
_EXPLORER = Path(__file__).parents[1] / "docs" / "explorer.html"


def render_run_page(
    record: Record,
    model: nn.Module,
    initial_model: nn.Module | None,
    akp_history: Mapping[str, Tensor],
    attributions: Mapping[Replacement, Attribution],
    lost: Mapping[str, Tensor] | None,
    split: str | None,
) -> str:
    """Renders the HTML page of a finished run.

    Args:
        record: the run's record.
        model: the trained network.
        initial_model: the network before training; None if it is not available.
        akp_history: AKPs over epochs, as in the run's akps.safetensors; empty if there is no such file.
        attributions: maps what stands for removed kernels to the attribution.
        lost: maps layer names to the points lost without each single kernel; None if these were not measured.
        split: describes the images used for ``attributions`` and ``lost``; None if there are none.
    """
    initial_layers = analytic_layers(initial_model) if initial_model is not None else {}
    layers = []
    for name, layer in tqdm(analytic_layers(model).items(), desc="drawing", unit="layer", disable=None):
        prefix = f"{name}/"
        history = {key.removeprefix(prefix): akps for key, akps in akp_history.items() if key.startswith(prefix)}
        slots = len(layer.slot_kinds)
        has_mosaic = slots <= MAX_KERNELS
        layers.append(
            {
                "name": name,
                "arrangement": str(layer.arrangement),
                "size": f"{layer.kernel_size[0]} x {layer.kernel_size[1]}",
                "parameters": sum(p.numel() for p in layer.parameters()),
                "before": _embed(plot.mosaic(initial_layers[name])) if has_mosaic and name in initial_layers else None,
                "after": _embed(plot.mosaic(layer)) if has_mosaic else None,
                "trajectories": _embed(plot.akp_trajectories(layer, history)) if history else None,
                "kernels": list(
                    _describe_kernels(
                        name, layer, initial_layers.get(name), history, None if lost is None else lost[name]
                    )
                ),
                "slots": slots,
            }
        )
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, autoescape=True)
    return environment.get_template(TEMPLATE.name).render(
        record=record,
        layers=layers,
        kernel_panel=_read_kernel_panel(),
        kinds=list(KINDS.values()),
        contributions={mode: _embed(plot.contributions(attribution)) for mode, attribution in attributions.items()},
        split=split,
    )


def _read_kernel_panel() -> str:
    """The style and the script of the explorer's kernel panel."""
    _, begin, rest = _EXPLORER.read_text(encoding="utf-8").partition("<!-- kernel panel")
    panel, end, _ = rest.partition("<!-- end of the kernel panel -->")
    assert begin and end
    return begin + panel + end


def _describe_kernels(
    name: str,
    layer: AnalyticConv2d,
    initial: AnalyticConv2d | None,
    history: Mapping[str, Tensor],
    lost: Tensor | None,
) -> Iterator[dict[str, Any]]:
    """Yields what the page shows of each kernel."""
    kernels = plot.get_slot_kernels(layer)
    slots_by_energy = kernels.square().sum((1, 2)).argsort(descending=True)
    slots = range(len(kernels)) if len(kernels) <= MAX_KERNELS else slots_by_energy[:MAX_KERNELS].tolist()
    slot_kinds, slots_per_filter = layer.slot_kinds, len(layer.slot_kinds) // layer.out_channels
    slots_and_akps = {symbol: (layer.slots_of(symbol), akps) for symbol, akps in layer.akps().items()}
    for slot in slots:
        kind = KINDS[slot_kinds[slot]]
        kernel = _describe_for_panel(layer, kind.symbol)
        context: dict[str, Any] = {}
        if kind.is_analytic:
            kind_slots, akps = slots_and_akps[kind.symbol]
            index = kind_slots.index(slot)
            kernel["akps"] = {akp: values[index].item() for akp, values in akps.items()}
            if layer.gains is not None:
                kernel["gains"] = _round(layer.gains_of(kind.symbol)[index])
            context["source"] = {"python": f"layer = net.get_submodule({json.dumps(name)})", "index": index}
            if history and (layer.gains is None or initial is not None):  # gains have no history
                before: dict[str, Any] = {
                    "akps": {akp: history[f"{kind.symbol}/{akp}"][0, index].item() for akp in akps}
                }
                if initial is not None and initial.gains is not None:
                    before["gains"] = _round(initial.gains_of(kind.symbol)[index])
                context["original"] = {"title": "before training", "kernel": kernel | before}
        else:
            kernel["weights"] = _round(kernels[slot].flatten())
        akp_texts = (f"{akp} {value:.3f} {kind.find_akp(akp).unit}".strip() for akp, value in kernel["akps"].items())
        yield {
            "out": slot // slots_per_filter,
            "in": slot % slots_per_filter if layer.options.per == "kernel" else "all",
            "kind": kind,
            "formula": layer.formula(slot),
            "akps": ", ".join(akp_texts),
            "lost": None if lost is None else f"{lost[slot]:+.2f}",
            "image": _draw_tile(kernels[slot]),
            "panel": {"kernel": kernel, "context": context},
        }


def _describe_for_panel(layer: AnalyticConv2d, symbol: str) -> dict[str, Any]:
    """What the explorer's kernel panel reads of any kernel of a kind."""
    options = {name: getattr(layer.options, name) for name in ("family", "profile", "scale", "per")}
    channels = layer.in_channels // layer.groups
    return {"kind": symbol, "akps": {}, "size": list(layer.kernel_size), "channels": channels, **options}


def _round(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _draw_tile(kernel: Tensor) -> str:
    """Draws a kernel as a small image: blue is negative, red is positive, white is 0."""
    scaled = kernel / kernel.abs().max().clamp(min=1e-12) / 2 + 0.5
    pixels = (colormaps["RdBu_r"](scaled.numpy())[..., :3] * 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return _to_data_url(buffer.getvalue())


def _embed(figure: Figure) -> str:
    return _to_data_url(plot.to_png(figure))


def _to_data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
