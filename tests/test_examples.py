"""The examples and the entry point of torch.hub run as their texts say."""

import json
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from tests.sources import ROOT


def read_percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_minimal_learns_digits(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/minimal.py"))
    assert read_percentages(capsys.readouterr().out)[-1] > 95


def test_fit_in_metric_of_images_keeps_more_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/fit_pretrained.py"))
    trained, pixels, images, per_filter = read_percentages(capsys.readouterr().out)
    assert trained > 97 and trained > images > pixels and images > per_filter > 90


def test_timm_network_converts_and_trains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_timm.py", "--random"])
    runpy.run_path(str(ROOT / "examples/convert_timm.py"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[0] > losses[-1]


def test_timm_example_without_network_names_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_timm.py"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="cannot download the weights of resnet10t; --random needs no network"):
        runpy.run_path(str(ROOT / "examples/convert_timm.py"))


def test_code_of_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    notebook = json.loads((ROOT / "examples/explore.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))
    exec(compile(code, "explore.ipynb", "exec"), {"display": lambda figure: None})


def test_hub_gives_trained_networks() -> None:
    net = torch.hub.load(str(ROOT), "analenet", source="local", weights="mnist_gabor")
    assert net.conv1.arrangement.counts == {"G": 6} and not net.training
    assert not torch.hub.load(str(ROOT), "analenet", source="local", weights=None).training
    with pytest.raises(ValueError, match=r"no weights 'mnist'; known: digits_gabor, digits_half_plain, "):
        torch.hub.load(str(ROOT), "analenet", source="local", weights="mnist")
