"""Runs that share the decoded images of a data set do not disturb each other."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tests.training.processes import run_in_child, start_process, wait_for
from tests.training.trees import write_imagefolder
from training.config import compose
from training.loop import run
from training.settings import parse_run


def compose_image_run(folder: Path, validation: float) -> DictConfig:
    data = ["data=imagefolder", f"data.root={folder / 'photos'}", f"data.cache={folder / 'cache'}", "data.title=t"]
    data += ["data.size=28", "data.crop=null", "data.mean=null", "data.std=null", f"data.validation={validation}"]
    trainer = ["trainer.epochs=20", "trainer.batch_size=2", "trainer.accelerator=cpu"]
    return compose(["model=lenet", *data, *trainer, "optim.lr=1e-4", f"paths.runs={folder / 'runs'}"])


def read_result(cfg: DictConfig) -> dict[str, Any]:
    path = parse_run(cfg).directory.path
    record = json.loads((path / "record.json").read_text())
    return {"val": record["val"], "test": record["test"], "weights": (path / "model.safetensors").read_bytes()}


def wait_until_training(cfg: DictConfig) -> None:
    deadline = time.monotonic() + 60
    while not (parse_run(cfg).directory.path / "metrics.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_run_and_deleted_images_leave_other_runs_unchanged(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "photos", train=20, test=4)
    expected = []
    for validation in (0.1, 0.3):
        cfg = compose_image_run(tmp_path, validation)
        assert run_in_child(lambda cfg=cfg: run(parse_run(cfg))) == 0  # type: ignore[misc]
        expected.append(read_result(cfg))
        shutil.rmtree(tmp_path / "runs")
        shutil.rmtree(tmp_path / "cache")
    first, second = compose_image_run(tmp_path, 0.1), compose_image_run(tmp_path, 0.3)
    first_process = start_process(lambda: run(parse_run(first)))
    killed_process = start_process(lambda: run(parse_run(second)))
    wait_until_training(second)
    os.kill(killed_process, signal.SIGKILL)
    assert wait_for(killed_process) == -signal.SIGKILL
    (parse_run(second).directory.path / "metrics.csv").unlink()
    second_process = start_process(lambda: run(parse_run(second)))
    wait_until_training(first)
    wait_until_training(second)
    shutil.rmtree(tmp_path / "photos")
    assert wait_for(first_process) == wait_for(second_process) == 0
    assert [read_result(first), read_result(second)] == expected
