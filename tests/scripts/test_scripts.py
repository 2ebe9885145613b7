"""Each entry point once, as a user starts it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

Script = Callable[..., CompletedProcess[str]]


def test_train(tmp_path: Path, script: Script) -> None:
    arguments = ["model=ana_lenet", "arrangement.conv1=G6", "arrangement.conv2=G50%_P50%", "seed=3", "trainer.epochs=1"]
    done = script("train.py", *arguments, f"paths.runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["config"]["arrangement"] == {"conv1": "G6", "conv2": "G50%_P50%"}
    assert record["config"]["seed"] == 3 and f"test {record['test']['top1']:.2f}%" in done.stdout


def test_train_sweeps(tmp_path: Path, script: Script) -> None:
    sweep = ["-m", "hydra/launcher=cores", "arrangement.conv1=G6,G3_P3", "seed=0,1", "trainer.epochs=1"]
    done = script("train.py", *sweep, f"paths.runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text())["config"] for path in tmp_path.glob("*/record.json")]
    assert sorted((r["arrangement"]["conv1"], r["seed"]) for r in records) == [
        ("G3_P3", 0),
        ("G3_P3", 1),
        ("G6", 0),
        ("G6", 1),
    ]
    done = script("collect.py", f"runs={tmp_path}", f"file={tmp_path}/all.csv")
    assert done.stdout.strip() == f"{tmp_path}/all.csv: 4 runs", done.stderr
    frame = pd.read_csv(tmp_path / "all.csv")
    assert sorted(zip(frame["arrangement.conv1"], frame["seed"], strict=True))[0] == ("G3_P3", 0)
    assert {"test.top1", "parameters.conv", "optim.lr", "commit", "machine.device", "versions.torch"} <= set(frame)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train.py", ["arrangement.conv1=G5"], "error: arrangement 'G5' fills 5 of 6 kernels of conv1 (1 x 6)"),
        ("train.py", ["model=vgg"], "error: unknown model 'vgg'; known: alexnet, "),
        ("train.py", ["hydra/launcher=moon"], "error: unknown hydra/launcher 'moon'; known: "),
        (
            "train.py",
            ["arrangement=gabor", "trainer=ddp", "trainer.devices=4096"],
            "error: trainer.devices=4096 is more than",
        ),
        ("reproduce_table.py", ["trainer=ddp"], "error: a run of a table takes one device; start more workers"),
        ("wandb_workspace.py", [], "error: Missing mandatory value: entity"),
        ("wandb_workspace.py", ["entity=me"], "error: a workspace needs a W&B account"),
        ("collect.py", ["runs=[]"], "error: no finished run in"),
        ("reproduce_table.py", ["table=nope"], "error: unknown table 'nope'; known: cifar10, "),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    tmp_path: Path,
    script: Script,
    name: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    paths = (
        []
        if name in ("collect.py", "wandb_workspace.py")
        else [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    )
    done = script(name, *arguments, *paths)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_reproduce_table(tmp_path: Path, script: Script) -> None:
    paths = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    done = script("reproduce_table.py", *paths, "trainer.epochs=1", "trainer.batch_size=600")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 21
    assert (tmp_path / "results/tables/digits.md").read_text() in done.stdout


def test_two_processes_give_one_processes_result(tmp_path: Path, script: Script, command: Any) -> None:
    """In float64 to 1e-9, also where a batch does not divide evenly, and where they are killed midway; one writes."""
    arguments = ["arrangement=mosaic", "trainer.precision=64-true", "trainer.epochs=3", "trainer.batch_size=51"]
    arguments += ["data.shift=1", "trainer.accelerator=cpu"]
    results = []
    two = ["trainer=ddp", "trainer.devices=2", "trainer.checkpoint_minutes=1e-9"]
    for folder, more in (("one", []), ("two", two)):
        if more:
            killed = subprocess.Popen(
                command("train.py", *more, *arguments, f"paths.runs={tmp_path / folder}"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            while not list((tmp_path / folder).glob("*/checkpoint-before.pt")):
                assert killed.poll() is None
                time.sleep(0.01)
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
        done = script("train.py", *more, *arguments, f"paths.runs={tmp_path / folder}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test ") == 1
        (path,) = (tmp_path / folder).glob("*/record.json")
        rows = pd.read_csv(path.with_name("metrics.csv"))
        results.append((load_file(path.with_name("model.safetensors")), json.loads(path.read_text()), rows))
    (weights, record, rows), (other_weights, other_record, other_rows) = results
    assert record["id"] == other_record["id"]
    assert all(torch.allclose(weights[name], other_weights[name], rtol=0, atol=1e-9) for name in weights)
    assert record["test"]["top1"] == other_record["test"]["top1"]
    assert record["test"]["loss"] == pytest.approx(other_record["test"]["loss"], abs=1e-6)  # summed in float32
    pd.testing.assert_frame_equal(rows, other_rows, rtol=1e-5)
    assert list(rows["train_top1"]) == list(other_rows["train_top1"])
