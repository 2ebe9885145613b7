import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from training.config import compose
from training.errors import UsageError
from training.loop import akps_of, build, finished, run
from training.records import run_folder

Script = Callable[..., CompletedProcess[str]]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def trained(folder: Path, *overrides: str) -> Path:
    cfg = compose([*overrides, "trainer.epochs=2", "trainer.accelerator=cpu", f"paths.runs={folder}"])
    run(cfg)
    return run_folder(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), "arrangement=half_plain")


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    command = [Path(__file__).parents[2] / "scripts/explain.py", f"run={folder}", "images=60"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    return folder / "report.html"


def test_the_page_needs_nothing_else_and_has_every_kernel(page: Path, folder: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text) and "http" not in text and "@import" not in text
    assert text.count("<button") == 6 + 96
    kinds = json.loads(page.with_suffix(".json").read_text())["kinds"]
    for numbers in kinds.values():
        assert sum(numbers["shapley"].values()) == pytest.approx(numbers["drop"], abs=1e-12)
        assert len(numbers["top1_with"]) == 64 and numbers["images"] == 60
    for word in ("before training", "after training", "Parameters over training", "Removed kernels answer their"):
        assert word in text
    assert re.search(
        r'data-formula="-?[0-9.e+-]+ \* exp\(-r\^2/\(2 \* [0-9.]+\^2\)\) \* cos\(2 pi x&#39;/[0-9.]+ \+ ', text
    )


def test_before_training_is_where_the_run_began(folder: Path) -> None:
    cfg, data, model = finished(folder)
    torch.manual_seed(cfg.seed)
    start = akps_of(build(cfg, data))
    paths = load_file(folder / "akps.safetensors")
    assert all(torch.equal(paths[name][0], values) for name, values in start.items())
    assert not all(torch.equal(start[name], values) for name, values in akps_of(model).items())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    """No error on the console, no request but for the page, and a tapped kernel tells its formula."""
    tapped = tmp_path / "tapped.html"
    tap = "<script>document.querySelectorAll('.tiles button')[7].click()</script>"
    tapped.write_text(page.read_text().replace("</body>", f"{tap}</body>"))
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    options += " --disable-sync --no-first-run --enable-logging=stderr --dump-dom"
    own = [f"--user-data-dir={tmp_path}/profile", f"--log-net-log={tmp_path}/net.json", "--window-size=390,800"]
    done = subprocess.run(
        [str(CHROMIUM), *options.split(), *own, tapped.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    about = done.stdout.partition('<div id="about"')[2]
    assert "conv2, channel 1 to 0: Gabor" in about and "cos(2 pi x'/" in about and "points lost" in about
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"([a-z]+:[^"]*)"', (tmp_path / "net.json").read_text()))
    assert not {url for url in asked if url.startswith("http") and "google" not in url}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], "error: nowhere is no folder of a run: it has no config.yaml"),
        (["replace=[noise]"], "error: replace=noise is none of zero, mean"),
    ],
)
def test_bad_input(folder: Path, script: Script, arguments: list[str], message: str) -> None:
    done = script("explain.py", f"run={folder}", *arguments)
    assert (done.returncode, done.stderr.strip()) == (2, message)


def test_runs_that_have_nothing_to_explain(tmp_path: Path, folder: Path, script: Script) -> None:
    plain = trained(tmp_path, "model=lenet")
    done = script("explain.py", f"run={plain}")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        f"error: {plain}: the network has no analytic layer to explain",
    )
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "record.json").unlink()
    with pytest.raises(UsageError, match=f"{unfinished} has a run that is not finished: it has no record.json"):
        finished(unfinished)


def test_export(folder: Path, tmp_path: Path, script: Script) -> None:
    done = script("export.py", f"run={folder}", f"file={tmp_path}/net.onnx", "fold=false")
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    _, data, model = finished(folder)
    images = data.normalise(data.test.images[:7])
    with torch.no_grad():
        wanted = model(images)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=1e-4)
