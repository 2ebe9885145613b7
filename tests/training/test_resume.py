"""A run that is killed goes on, and ends as one that never was."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from tests.training.processes import in_child
from training import checkpoint, files, loop
from training.config import compose
from training.errors import BusyError, UsageError
from training.files import alone_in, write_atomic
from training.loop import run
from training.records import recorded, run_folder

SMALL = ["arrangement=mosaic", "trainer.epochs=2", "trainer.batch_size=8", "data.shift=1", "trainer.accelerator=cpu"]


def config(folder: Path, *overrides: str) -> DictConfig:
    # A checkpoint at every look at the loss, so within epochs too.
    return compose([*SMALL, f"paths.runs={folder}", "trainer.checkpoint_minutes=1e-9", *overrides])


def kill_at(patch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """The process dies as it calls module.name for the given time."""
    original, calls = getattr(module, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    patch.setattr(module, name, deadly)


def outcome(cfg: DictConfig) -> tuple[bytes, bytes, dict[str, Any]]:
    folder = run_folder(cfg)
    record = json.loads((folder / "record.json").read_text())
    del record["seconds"]
    return (folder / "model.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes(), record


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, dict[str, Any]]:
    cfg = config(tmp_path_factory.mktemp("uncut"))
    assert in_child(lambda: run(cfg)) == 0
    assert not list(run_folder(cfg).glob("checkpoint*"))  # of no use once there is a record
    return outcome(cfg)


def test_killed_at_steps_and_writes_alike(tmp_path: Path, uncut: tuple[bytes, bytes, dict[str, Any]]) -> None:
    cfg = config(tmp_path)
    chance = random.Random(0)
    places = [(loop, "prepare", 60), (Path, "replace", 4), (Path, "write_bytes", 2), (loop.datasets, "load", 1)]
    for module, name, last in places * 2:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, module, name, chance.randint(1, last))
            assert in_child(lambda: run(cfg)) == -signal.SIGKILL
    assert checkpoint.load(run_folder(cfg)) is not None
    assert in_child(lambda: run(cfg)) == 0
    assert outcome(cfg) == uncut
    assert not list(run_folder(cfg).glob(".unfinished*"))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, uncut: tuple[bytes, bytes, dict[str, Any]], damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, loop, "prepare", 155 + 80)
        assert in_child(lambda: run(cfg)) == -signal.SIGKILL
    path = run_folder(cfg) / checkpoint.LAST
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": bytes(content[:-1000]), "bit": bytes(content), "empty": b""}[damage])
    assert in_child(lambda: run(cfg)) == 0
    assert f"{path} is damaged; going on from the checkpoint before it" in capfd.readouterr().err
    assert outcome(cfg) == uncut


def test_a_folder_is_one_workers(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with alone_in(run_folder(cfg)):
        message = rf"{run_folder(cfg)} is being worked on by process {os.getpid()} on"

        def refused() -> None:
            with pytest.raises(BusyError, match=message):
                run(cfg)

        assert in_child(refused) == 0
    assert recorded(cfg) is None


def test_a_checkpoint_of_another_configuration_is_left_alone(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    checkpoint.save(run_folder(cfg), {"config": {}})
    with pytest.raises(UsageError, match="checkpoint of another configuration"):
        run(cfg)
    assert checkpoint.load(run_folder(cfg)) == {"config": {}}


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def full(target: Path, content: bytes) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match=rf"cannot write {path}: No space left on device"):
        write_atomic(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    cfg = config(tmp_path / "runs")
    with pytest.raises(UsageError, match=r"cannot work in .*runs.*: (Not a directory|File exists)"):
        run(cfg)


def test_unfinished_files_of_the_dead_are_cleared(tmp_path: Path) -> None:
    (tmp_path / f"{files._MARK}elsewhere-1-x").write_text("half")
    with alone_in(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "worker"]
