import html
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acl import AnalyticConv2d
from acl.plot import get_slot_kernels
from evaluation.run_page import render_run_page
from tests.browser import needs_chromium, run_in_browser
from tests.reporting.helpers import make_record


def test_page_escapes_names() -> None:
    layer_name, title = "<script>alert(1)</script>", "a & <b> \"c\" 'd'"
    model = nn.Sequential()
    model.add_module(layer_name, AnalyticConv2d(1, 2, 3, arrangement="G100%"))
    config = {"model": {"backbone": title}, "data": {"name": title, "title": title}}
    machine, versions = {"device": title, "threads": 1}, {"torch": title}
    record = make_record(0, 90.0, config=config, commit=title, machine=machine, versions=versions)
    page = render_run_page(record, model, model, {}, {}, None, title)
    escaped = "a &amp; &lt;b&gt; &#34;c&#34; &#39;d&#39;"
    assert page.count(escaped) >= 5 and title not in page and "<b>" not in page
    assert "Layer &lt;script&gt;alert(1)&lt;/script&gt;" in page and layer_name not in page
    assert 'data-title="&lt;script&gt;alert(1)&lt;/script&gt;, input channel 0' in page


def test_kernels_before_training_have_the_gains_of_then() -> None:
    torch.manual_seed(0)
    before = AnalyticConv2d(2, 4, 5, arrangement="G100%", per="filter")
    after = AnalyticConv2d(2, 4, 5, arrangement="G100%", per="filter")
    history = {f"conv/G/{akp}": values[None] for akp, values in before.akps()["G"].items()}
    record = make_record(0, 90.0, config={"model": {"backbone": "lenet"}, "data": {"name": "digits"}})

    def read_originals(initial: nn.Module | None) -> list[dict[str, Any]]:
        page = render_run_page(record, nn.ModuleDict({"conv": after}), initial, history, {}, None, None)
        panels = [json.loads(html.unescape(text)) for text in re.findall(r'data-panel="([^"]*)"', page)]
        return [panel["context"].get("original") for panel in panels]

    for index, original in enumerate(read_originals(nn.ModuleDict({"conv": before}))):
        gains = torch.tensor(original["kernel"]["gains"])
        torch.testing.assert_close(gains, before.gains_of("G")[index].detach(), rtol=1e-4, atol=1e-6)
    assert read_originals(None) == [None] * 4


@needs_chromium
def test_kernel_panel_of_page_holds_the_kernels_of_the_network(tmp_path: Path) -> None:
    layers = {
        "filters": AnalyticConv2d(2, 4, 5, arrangement="Ts1 P1 G2", per="filter", family="extended"),
        "kernels": AnalyticConv2d(
            2, 2, (3, 4), arrangement="Lt2 P1 Tf1", amplitude=True, profile="gaussian", scale="raw"
        ),
    }
    record = make_record(0, 90.0, config={"model": {"backbone": "lenet"}, "data": {"name": "digits"}})
    page = render_run_page(record, nn.ModuleDict(layers), None, {}, {}, None, None)
    script = """
        const buttons = [...document.querySelectorAll(".tiles button")];
        const kernels = buttons.map(button => JSON.parse(button.dataset.panel).kernel);
        return JSON.stringify(kernels.map(kernel => [formatFormula(kernel), [...computeKernel(kernel).values]]));
    """
    shown = iter(json.loads(run_in_browser(page, script, tmp_path)))
    for layer in layers.values():
        for slot, kernel in enumerate(get_slot_kernels(layer)):
            formula, values = next(shown)
            assert formula == layer.formula(slot)
            torch.testing.assert_close(torch.tensor(values).view_as(kernel), kernel, rtol=1e-4, atol=1e-5)
