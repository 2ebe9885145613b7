"""The page of a run (explain.py) and its network as ONNX (export.py)."""

import json
import re
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import acl
from acl.kernels import KINDS
from evaluation import run_page
from evaluation.finished_run import load_finished_run
from tests.browser import needs_chromium, run_in_browser
from tests.scripts.conftest import RunScript
from training.config import compose
from training.loop import run, snapshot_akps
from training.settings import build_model, load_run_data, parse_run

MISSING = "it is neither a folder, nor a file, nor the id of a run in runs/"


def train_run(folder: Path, *overrides: str) -> Path:
    """Trains for two epochs and returns the folder of the run."""
    cfg = compose([*overrides, "trainer.epochs=2", "trainer.accelerator=cpu", f"paths.runs={folder}"])
    run(parse_run(cfg))
    return parse_run(cfg).directory.path


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs"), "arrangement=half_plain")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, run_script: RunScript) -> Path:
    """The page of a run with one kernel of each kind; drawing more takes seconds."""
    arrangement = " ".join(f"{symbol}1" for symbol in KINDS)
    run_path = train_run(tmp_path_factory.mktemp("runs"), f"arrangement.conv1={arrangement}")
    done = run_script("explain.py", f"run={run_path}", "images=12", "replace=[zero,mean,constant]")
    assert done.returncode == 0, done.stderr
    zero, _, _, file = done.stdout.splitlines()
    assert re.match(
        r"all kernels of the analytic layers set to zero: accuracy falls by \S+ points \(Shapley .*: G", zero
    )
    assert file == str(run_path / "report.html")
    return run_path / "report.html"


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("explain.py", ["file={run}/record.html"], "record.json of the run would be lost"),
        ("explain.py", ["file={run}/metrics.csv"], "it is a file of a run, which would be lost"),
        ("export.py", ["file={run}/model.safetensors"], "it is a file of a run, which would be lost"),
        ("evaluate.py", ["confusion={run}/metrics.csv"], "it is a file of a run, which would be lost"),
    ],
)
def test_files_of_the_run_are_not_overwritten(
    run_path: Path, call_script: RunScript, script: str, options: list[str], message: str
) -> None:
    files = {file: file.read_bytes() for file in run_path.iterdir() if file.is_file()}
    done = call_script(script, f"run={run_path}", *(option.format(run=run_path) for option in options))
    assert done.returncode == 2 and message in done.stderr
    assert {file: file.read_bytes() for file in run_path.iterdir() if file.is_file()} == files


def test_page_is_self_contained_and_shows_every_kernel(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text) and "http" not in text and "@import" not in text
    assert text.count("data-panel=") == 6
    kinds = json.loads(page.with_suffix(".json").read_text())["kinds"]
    assert list(kinds) == ["zero", "mean", "constant"]
    for numbers in kinds.values():
        assert sum(numbers["shapley"].values()) == pytest.approx(numbers["drop"], abs=1e-12)
        assert len(numbers["top1_with"]) == 64 and numbers["images"] == 12
    for words in (
        "before training",
        "after training",
        "Parameters during training",
        "Removed kernels output their",
        "Constant kernels",
    ):
        assert words in text
    number = r"-?[0-9.e+-]+"
    gabor = (
        rf"{number}\*\(exp\(-\(x'\^2 \+ y'\^2\)/\(2\*{number}\^2\)\)\*cos\(2\*pi\*x'/{number} \+ {number}\)\); theta = "
    )
    assert re.search(f'data-formula="{gabor}{number} deg"', text.replace("&#39;", "'"))


def test_page_of_some_images_takes_random_ones(
    run_path: Path, call_script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[int] = []

    def spy(model: torch.nn.Module, batches: acl.explain.Batches, mode: str) -> acl.explain.Attribution:
        labels.extend(label for _, batch in batches() for label in batch.tolist())
        return attribute(model, batches, mode)

    attribute = acl.explain.attribute
    monkeypatch.setattr(acl.explain, "attribute", spy)
    done = call_script("explain.py", f"run={run_path}", "images=20", "single=false", "replace=[zero]")
    assert done.returncode == 0, done.stderr
    val = load_run_data(load_finished_run(run_path).settings).val
    assert labels == val.sample(20).labels.tolist() != val.labels[:20].tolist()


def test_recorded_akps_start_at_initial_akps_of_run(run_path: Path) -> None:
    finished = load_finished_run(run_path)
    torch.manual_seed(finished.settings.seed)
    initial = snapshot_akps(build_model(finished.settings, load_run_data(finished.settings)))
    history = load_file(run_path / "akps.safetensors")
    assert all(torch.equal(history[name][0], values) for name, values in initial.items())
    trained = snapshot_akps(finished.model)
    assert initial.keys() == trained.keys() == history.keys()
    assert not all(torch.equal(initial[name], values) for name, values in trained.items())


@needs_chromium
def test_page_in_browser_shows_formula_of_tapped_kernel_and_opens_it(page: Path, tmp_path: Path) -> None:
    script = """
        document.querySelectorAll(".tiles button")[0].click();
        const formula = panel.formula.textContent;
        const slider = document.querySelector("#explore input[type=range]");
        slider.value = Number(slider.max);
        slider.dispatchEvent(new Event("input"));
        return [about.innerText, dialog.open, formula, panel.formula.textContent, panel.changes.textContent].join("|");
    """
    about, is_open, formula, moved, changes = run_in_browser(page.read_text(), script, tmp_path, width=390).split("|")
    assert "conv1, input channel 0, output channel 0: Gabor" in about and "points lost" in about
    assert formula in about and "cos(2*pi*x'/" in formula
    assert is_open == "true" and "theta = 360 deg" in moved and "AKPbefore training" in changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], f"error: there is no run nowhere: {MISSING}"),
        (["run=123456789012"], f"error: there is no run 123456789012: {MISSING}"),
        (["run=2280193e9171"], f"error: there is no run 2280193e9171: {MISSING}"),
        (["run=README.md"], "error: README.md is neither the folder of a run nor a file of weights (.safetensors)"),
        (["replace=[noise]"], "error: replace.0=noise is invalid: it should be 'zero', 'mean' or 'constant'"),
        (["split=validation"], "error: split=validation is invalid: it should be 'train', 'val' or 'test'"),
        (["images=0"], "error: images=0 is invalid: it should be greater than or equal to 1"),
    ],
)
def test_explain_rejects_invalid_options(
    run_path: Path, call_script: RunScript, arguments: list[str], message: str
) -> None:
    done = call_script("explain.py", f"run={run_path}", *arguments)
    assert (done.returncode, done.stderr.strip()) == (2, message)


def test_explain_rejects_plain_and_unfinished_runs(tmp_path: Path, run_path: Path, call_script: RunScript) -> None:
    plain = train_run(tmp_path, "model=lenet", "trainer.batch_size=600")
    done = call_script("explain.py", f"run={plain}")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        f"error: {plain}: the network has no analytic layer",
    )
    unfinished = shutil.copytree(run_path, tmp_path / "unfinished")
    (unfinished / "record.json").unlink()
    done = call_script("explain.py", f"run={unfinished}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {unfinished} is an unfinished run: it has no record.json")
    assert done.stderr.count("\n") == 1


def test_exported_network_gives_logits_of_run(run_path: Path, tmp_path: Path, call_script: RunScript) -> None:
    done = call_script("export.py", f"run={run_path}", f"file={tmp_path}/net.onnx", "fold=false")
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    finished = load_finished_run(run_path)
    data = load_run_data(finished.settings)
    images = data.normalize(data.test.images[:7])
    with torch.no_grad():
        expected = finished.model(images)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_page_of_record_without_versions_says_unknown_and_shows_strongest_kernels_of_large_layer(
    run_path: Path, tmp_path: Path, call_script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_page, "MAX_KERNELS", 50)  # conv1 has 6 kernels, conv2 96
    path = Path(shutil.copytree(run_path, tmp_path / run_path.name))
    record = json.loads((path / "record.json").read_text())
    (path / "record.json").write_text(json.dumps({**record, "versions": {}}))
    done = call_script("explain.py", f"run={path}", "split=null")
    assert done.returncode == 0, done.stderr
    text = (path / "report.html").read_text()
    assert "torch unknown" in text and text.count("data-panel=") == 6 + 50


def test_run_in_double_precision_is_explained_and_exported(tmp_path: Path, call_script: RunScript) -> None:
    path = train_run(tmp_path / "runs", "arrangement.conv1=G6", "trainer.precision=64-true")
    done = call_script("explain.py", f"run={path}", "images=5", "single=false")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        finished = load_finished_run(path)
        data = load_run_data(finished.settings)
        images = data.normalize(data.test.images[:7])
        expected = finished.model(images.double())
        assert expected.dtype == torch.double and torch.equal(finished.model(images), expected)
    done = call_script("export.py", f"run={path}", f"file={tmp_path}/net.onnx")
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected.float(), rtol=0, atol=1e-4)


def test_export_refuses_network_whose_logits_are_not_finite(
    run_path: Path, tmp_path: Path, call_script: RunScript
) -> None:
    copy = Path(shutil.copytree(run_path, tmp_path / run_path.name))
    weights = copy / "model.safetensors"
    finished = load_finished_run(copy)
    next(finished.model.parameters()).data[0] = torch.nan
    acl.save(finished.model, weights, acl.read_info(weights)["info"])
    record = json.loads((copy / "record.json").read_text())
    del record["weights"]  # their digest
    (copy / "record.json").write_text(json.dumps(record))
    done = call_script("export.py", f"run={copy}", f"file={tmp_path}/net.onnx")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ONNX Runtime's logits differ from torch's by nan; nothing was written")
    assert not (tmp_path / "net.onnx").exists()
