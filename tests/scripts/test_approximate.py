from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pandas as pd
import pytest
import timm
import torch

import acl

Script = Callable[..., CompletedProcess[str]]


def test_a_file_of_kernels(tmp_path: Path, script: Script) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(np.float32)
    weight[1, 1] = 0
    np.save(tmp_path / "conv.npy", weight)
    done = script("approximate.py", f"source={tmp_path}/conv.npy", f"folder={tmp_path}/out", "tolerances=[0.2,0.6,1]")
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "out/conv.csv").set_index("setting")
    assert len(frame) == 13 and (frame["r2"] <= 1).all()
    assert (
        frame["numbers"]["Gabor, amplitude"] == 11 * 5 + 25
        and frame["numbers"]["Gabor, paper: shape alone"] == 11 * 4 + 25
    )
    assert frame["numbers"]["Gabor, amplitude and offset"] == 11 * 7 + 25
    auto = frame[frame.index.str.startswith("auto, amplitude,")]
    assert auto["numbers"].is_monotonic_decreasing and auto["r2"].is_monotonic_decreasing
    assert "P" in auto["kinds"].iloc[0]
    fit = acl.Fit.from_json((tmp_path / "out/conv.json").read_text())
    assert fit.shape == (4, 3, 5, 5) and fit.unfit == [4]
    assert "1 kernels are zero or constant and stay plain" in done.stdout
    assert (tmp_path / "out/conv.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_networks_layer(tmp_path: Path, script: Script) -> None:
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.pth")
    arguments = ["source=timm/mobilenetv3_small_050", f"weights={tmp_path}/weights.pth", f"folder={tmp_path}"]
    done = script("approximate.py", *arguments, "layer=blocks.0.0.conv_dw", "tolerances=[]")
    assert done.returncode == 0, done.stderr
    assert "# Kernels of timm-mobilenetv3_small_050-blocks-0-0-conv_dw as formulas" in done.stdout
    done = script("approximate.py", *arguments, "layer=conv9")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: no convolution is named 'conv9'; there are: conv_stem,"
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), "a weight to fit has 4 dimensions (out, in / groups, kh, kw), got (2, 3)"),
        (np.full((1, 1, 3, 3), np.nan), "1 kernels of the weight are not finite, the first is that of channels (0, 0)"),
        (np.zeros((2, 1, 3, 3)), "all 2 kernels of conv are zero or constant: there is nothing to fit"),
    ],
)
def test_kernels_that_are_none(tmp_path: Path, script: Script, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "conv.npy", array)
    done = script("approximate.py", f"source={tmp_path}/conv.npy", f"folder={tmp_path}/out")
    assert (done.returncode, done.stderr.strip()) == (2, f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_none(tmp_path: Path, script: Script) -> None:
    done = script("approximate.py", "source=lenet", f"folder={tmp_path}/out")
    assert done.returncode == 2 and done.stderr.startswith("error: source=lenet is neither a network (resnet18, ")
