from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch

import acl
from scripts import approximate
from scripts.approximate import ApproximateSettings
from tests.scripts.conftest import RunScript
from training.config import compose, resolve
from training.errors import UsageError
from training.validation import construct


def test_approximate_fits_kernels_of_file(
    tmp_path: Path, call_script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acl.kind_search.STEPS", 30)
    weight = np.random.default_rng(0).normal(size=(2, 2, 5, 5)).astype(np.float32)
    weight[1, 1] = 0
    np.save(tmp_path / "conv.npy", weight)
    options = [f"folder={tmp_path}/out", "tolerances=[0.2,0.6,1]"]
    done = call_script("approximate.py", f"source={tmp_path}/conv.npy", *options)
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "out/conv.csv").set_index("setting")
    assert len(frame) == 20 and (frame["r2"] <= 1).all() and (frame["worst_r2"] <= frame["r2"]).all()
    assert frame["output_error"]["images: Gabor, amplitude"] < frame["output_error"]["Gabor, amplitude"]
    assert frame["numbers"]["Gabor per filter"] == 2 * (4 + 2)
    assert frame["numbers"]["Gabor, amplitude"] == 3 * 5 + 25
    assert frame["numbers"]["Gabor, paper: shape alone"] == 3 * 4 + 25
    assert frame["numbers"]["Gabor, amplitude and offset"] == 3 * 7 + 25
    auto = frame[frame.index.str.startswith("auto, amplitude,")]
    assert auto["numbers"].is_monotonic_decreasing and auto["r2"].is_monotonic_decreasing
    assert "P" in auto["kinds"].iloc[0]
    fit = acl.Fit.from_json((tmp_path / "out/conv.json").read_text())
    assert fit.shape == (2, 2, 5, 5) and fit.degenerate_slots == [3]
    assert "Zero or constant kernels, which stay plain: 1." in done.stdout
    assert (tmp_path / "out/conv.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/conv.pdf").read_bytes().startswith(b"%PDF")


def save_kernels(file: Path, scale: float = 1.0) -> Path:
    file.parent.mkdir(exist_ok=True)
    np.save(file, scale * np.random.default_rng(0).normal(size=(2, 1, 3, 3)).astype(np.float32))
    return file


def approximate_file(source: Path, folder: Path, *overrides: str) -> None:
    """Runs the script's task in this process."""
    options = resolve(compose([f"source={source}", f"folder={folder}", *overrides], "approximate"))
    approximate.main(construct(ApproximateSettings, options))


@pytest.fixture
def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits the kind with the fewest parameters only."""
    titles = (approximate.PAPER, approximate.BEST)
    monkeypatch.setattr(approximate, "FITS", {title: {"kinds": ["Lg"]} for title in titles})


@pytest.mark.usefixtures("quick_fits")
def test_names_with_dots_keep_their_own_outputs(tmp_path: Path) -> None:
    for name in ("conv.v1", "conv.v2"):
        approximate_file(save_kernels(tmp_path / f"{name}.npy"), tmp_path / "out", "tolerances=0.1")
    suffixes = (".csv", ".json", ".md", ".pdf", ".png", "_paper.json")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"conv.v{i}{s}" for i in (1, 2) for s in suffixes
    ]
    text = (tmp_path / "out/conv.v2.md").read_text()
    assert "(conv.v2.png)" in text and text.count("tolerance 0.1 |") == 2  # one number is a list of one


@pytest.mark.usefixtures("quick_fits")
def test_outputs_of_other_kernels_of_same_name_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Path("conv.npy"), Path("../b/conv.npy")
    save_kernels(tmp_path / "a/conv.npy")
    save_kernels(tmp_path / "b/conv.npy", 2.0)
    monkeypatch.chdir(tmp_path / "a")
    approximate_file(first, tmp_path / "out")
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match=rf"out/conv\.md describes {first}, .*; set folder=<another folder>, or move"):
        approximate_file(second, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UsageError, match=rf"describes {first}, .*; set folder="):
        approximate_file(first, tmp_path / "out")  # other kernels in a file of the same relative name
    monkeypatch.chdir(tmp_path / "a")
    assert {path: path.read_bytes() for path in files} == files
    with pytest.raises(UsageError, match=rf"describes {first}, .*; set folder="):
        approximate_file(first, tmp_path / "out", "profile=linear")
    approximate_file(first.resolve(), tmp_path / "out")  # the same kernels again


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tolerances=[0.1,2]"], r"tolerances\.1=2 is invalid: it should be less than or equal to 1"),
        (["tolerances=x"], r"tolerances\.0=x is invalid: it should be a valid number"),
    ],
)
def test_invalid_tolerance_is_rejected(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        approximate_file(tmp_path / "conv.npy", tmp_path, *overrides)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"text", None])
def test_corrupt_npy_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = save_kernels(tmp_path / "conv.npy")
    file.write_bytes(file.read_bytes()[:-5] if content is None else content)
    with pytest.raises(UsageError, match=f"cannot read weights from {file}: ") as error:
        approximate_file(file, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_approximate_fits_layer_of_network(tmp_path: Path, run_script: RunScript) -> None:
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.pth")
    arguments = ["source=timm/mobilenetv3_small_050", f"weights={tmp_path}/weights.pth", f"folder={tmp_path}"]
    done = run_script("approximate.py", *arguments, "layer=blocks.0.0.conv_dw", "tolerances=[]")
    assert done.returncode == 0, done.stderr
    assert "# Kernels of timm-mobilenetv3_small_050-blocks-0-0-conv_dw as formulas" in done.stdout
    done = run_script("approximate.py", *arguments, "layer=conv9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no convolution is named 'conv9'; the model has: conv_stem,")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), "the weight must have 4 dimensions (out, in / groups, kh, kw), got (2, 3)"),
        (
            np.full((1, 1, 3, 3), np.nan),
            "cannot read weights from {folder}/conv.npy: it has numbers that are not finite in float32",
        ),
        (np.zeros((2, 1, 3, 3)), "all 2 kernels of conv are zero or constant: there is nothing to fit"),
    ],
)
def test_approximate_rejects_invalid_kernels(
    tmp_path: Path, call_script: RunScript, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "conv.npy", array)
    done = call_script("approximate.py", f"source={tmp_path}/conv.npy", f"folder={tmp_path}/out")
    assert (done.returncode, done.stderr.strip()) == (2, f"error: {message.replace('{folder}', str(tmp_path))}")
    assert not (tmp_path / "out").exists()


def test_approximate_rejects_unknown_source(tmp_path: Path, call_script: RunScript) -> None:
    done = call_script("approximate.py", "source=lenet", f"folder={tmp_path}/out")
    assert done.returncode == 2 and done.stderr.startswith("error: source=lenet is neither a network (resnet18, ")
