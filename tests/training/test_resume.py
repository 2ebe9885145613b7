"""An interrupted run is resumed and gives the same result as one that never stopped."""

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from omegaconf import DictConfig

from tests.training.configurations import compose_run
from tests.training.processes import run_in_child
from training import loop
from training.checkpoint import Checkpointer, TrainState
from training.data import Augmentation, Data
from training.distributed import CUDA_STATE_BYTES
from training.errors import UsageError
from training.loop import run
from training.provenance import digest_sources
from training.record import Record
from training.run_directory import RunDirectory
from training.settings import parse_run
from training.validation import construct

STEPS = 618 // 8
"""Steps per epoch."""

Outcome = tuple[bytes, bytes, dict[str, Any]]
"""Weights, metrics and record."""


def compose_checkpointed_run(runs: Path, *overrides: str) -> DictConfig:
    """A run that saves a checkpoint at every check of the loss, and so also within epochs."""
    options = ["trainer.batch_size=8", "data.train_share=0.5", "data.shift=1", "trainer.checkpoint_minutes=1e-9"]
    return compose_run(runs, *options, *overrides)


def kill_at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """Makes the process kill itself at the given call of ``owner.name``."""
    original, calls = getattr(owner, name), 0

    def count_and_kill(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    patch.setattr(owner, name, count_and_kill)


def run_until_killed(cfg: DictConfig, owner: Any, name: str, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at_call(patch, owner, name, number)
        assert run_in_child(lambda: run(parse_run(cfg))) == -signal.SIGKILL


def read_outcome(cfg: DictConfig) -> Outcome:
    folder = parse_run(cfg).directory.path
    record = json.loads((folder / "record.json").read_text())
    del record["seconds"]
    return (folder / "model.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes(), record


@pytest.fixture(scope="module")
def uninterrupted_outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    cfg = compose_checkpointed_run(tmp_path_factory.mktemp("uninterrupted"))
    assert run_in_child(lambda: run(parse_run(cfg))) == 0
    assert not list(parse_run(cfg).directory.path.glob("checkpoint*"))  # a finished run needs none
    return read_outcome(cfg)


def test_run_killed_anywhere_is_resumed_with_same_result(tmp_path: Path, uninterrupted_outcome: Outcome) -> None:
    cfg = compose_checkpointed_run(tmp_path)
    generator = random.Random(0)
    kill_points = [(Data, "normalize", 60), (Path, "replace", 4), (Path, "write_bytes", 2), (loop, "load_run_data", 1)]
    for owner, name, last in kill_points * 2:
        run_until_killed(cfg, owner, name, generator.randint(1, last))
    assert parse_run(cfg).directory.load_checkpoint() is not None
    assert run_in_child(lambda: run(parse_run(cfg))) == 0
    assert read_outcome(cfg) == uninterrupted_outcome
    assert not list(parse_run(cfg).directory.path.glob(".unfinished*"))


def copy_run(cfg: DictConfig, runs: Path) -> DictConfig:
    """Copies a run to another folder of runs, where a test may change it."""
    shutil.copytree(cfg.paths.runs, runs, dirs_exist_ok=True)
    copy = cfg.copy()
    copy.paths.runs = str(runs)
    return copy


@pytest.fixture(scope="module")
def run_killed_in_second_epoch(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    cfg = compose_checkpointed_run(tmp_path_factory.mktemp("second_epoch"))
    run_until_killed(cfg, Augmentation, "__call__", STEPS + 60)
    return cfg


@pytest.fixture(scope="module")
def run_killed_after_last_epoch(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    cfg = compose_checkpointed_run(tmp_path_factory.mktemp("last_epoch"))
    run_until_killed(cfg, loop, "predict", 3)  # twice on validation images, then on test images
    return cfg


def test_run_resumed_by_other_code_names_none(
    run_killed_in_second_epoch: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    cfg = copy_run(run_killed_in_second_epoch, tmp_path)
    monkeypatch.setattr("training.provenance.digest_sources", lambda: "other")
    assert run_in_child(lambda: run(parse_run(cfg))) == 0
    record = read_outcome(cfg)[2]
    assert record["sources"] is None and record["commit"] is None
    assert "was begun with other code, so its record will name none" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty"])
def test_damaged_checkpoint_falls_back_to_previous_one(
    tmp_path: Path,
    run_killed_in_second_epoch: DictConfig,
    uninterrupted_outcome: Outcome,
    damage: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cfg = copy_run(run_killed_in_second_epoch, tmp_path)
    path = parse_run(cfg).directory.checkpoint_files[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": bytes(content[:-1000]), "flipped bit": bytes(content), "empty": b""}[damage])
    assert run_in_child(lambda: run(parse_run(cfg))) == 0
    assert f"{path} is damaged; trying the checkpoint before it" in capfd.readouterr().err
    assert read_outcome(cfg) == uninterrupted_outcome


def test_old_checkpoint_without_newer_fields_is_resumed_with_same_result(
    tmp_path: Path, uninterrupted_outcome: Outcome
) -> None:
    """The removed fields are not needed at the start of an epoch."""
    cfg = compose_checkpointed_run(tmp_path)
    run_until_killed(cfg, Augmentation, "__call__", STEPS + 10)
    directory = parse_run(cfg).directory
    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None and (checkpoint["epoch"], checkpoint["step"]) == (1, 0)
    del checkpoint["seconds"], checkpoint["generator"]
    directory.save_checkpoint(checkpoint)

    def resume() -> None:
        original, calls = Augmentation.__call__, 0

        def count_steps(*args: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return original(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Augmentation, "__call__", count_steps)
            _, is_new = run(parse_run(cfg))
        assert is_new and calls == STEPS  # the second epoch only

    assert run_in_child(resume) == 0
    assert read_outcome(cfg) == uninterrupted_outcome


FIELDS_WITH_DEFAULTS = [field.name for field in dataclasses.fields(TrainState) if field.name not in ("losses", "hits")]


@pytest.mark.parametrize("missing", FIELDS_WITH_DEFAULTS)
def test_field_missing_from_checkpoint_keeps_its_default(tmp_path: Path, missing: str) -> None:
    fabric, directory = Fabric(accelerator="cpu", devices=1), RunDirectory(tmp_path, {"seed": 0})
    state = TrainState(
        losses=torch.tensor([1.0, 2.0]),
        hits=torch.tensor(3),
        epoch=4,
        step=1,
        history=[{"epoch": 4}],
        best={"epoch": 4},
        akps=[{"conv1/G/sigma": torch.tensor(1.5)}],
    )
    Checkpointer(fabric, directory, minutes=5).save(state)
    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    del checkpoint[missing]
    directory.save_checkpoint(checkpoint)
    default = TrainState(losses=torch.zeros(2), hits=torch.tensor(0))
    restored = TrainState(losses=torch.zeros(2), hits=torch.tensor(0))
    assert Checkpointer(fabric, directory, minutes=5).restore(restored)
    for field in dataclasses.fields(TrainState):
        actual, expected = (
            getattr(restored, field.name),
            getattr(default if field.name == missing else state, field.name),
        )
        if isinstance(expected, torch.Tensor):
            assert torch.equal(actual, expected)
        else:
            assert actual == expected


@pytest.mark.parametrize(
    ("new", "changed"),
    [
        ({"data": {"digest": "a"}, "pretrained": "c"}, "pretrained weights"),
        ({"data": {"digest": "c"}, "pretrained": "c"}, "data and other pretrained weights"),
        ({"data": {"digest": "a"}, "pretrained": None}, None),  # the file is gone
        ({"data": {"digest": "a"}, "pretrained": "b"}, None),
    ],
)
def test_checkpoint_of_other_inputs_is_not_restored(tmp_path: Path, new: dict[str, Any], changed: str | None) -> None:
    fabric, directory = Fabric(accelerator="cpu", devices=1), RunDirectory(tmp_path, {"seed": 0})
    old = {"data": {"digest": "a", "train": 3}, "pretrained": "b"}
    checkpointer = Checkpointer(fabric, directory, minutes=5)
    checkpointer.save(TrainState(losses=torch.zeros(2), hits=torch.tensor(0), inputs=old))
    state = TrainState(losses=torch.zeros(2), hits=torch.tensor(0), inputs=new)
    if changed is None:
        assert checkpointer.restore(state) and state.inputs == old
    else:
        with pytest.raises(
            UsageError, match=f"the unfinished run in {directory.path} has used other {changed}; restore"
        ):
            checkpointer.restore(state)


def test_restored_akp_snapshots_stay_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots of later epochs are on the CPU too, and are stacked with them."""
    fabric, directory = Fabric(accelerator="cpu", devices=1), RunDirectory(tmp_path, {"seed": 0})
    state = TrainState(losses=torch.zeros(2), hits=torch.tensor(0), akps=[{"conv1/G/sigma": torch.ones(3)}])
    Checkpointer(fabric, directory, minutes=5).save(state)
    monkeypatch.setattr(fabric, "to_device", lambda tensor: tensor.to("meta"))
    assert Checkpointer(fabric, directory, minutes=5).restore(state)
    assert state.losses.is_meta and torch.equal(state.akps[0]["conv1/G/sigma"], torch.ones(3))


def test_loss_scale_of_half_precision_is_restored(tmp_path: Path) -> None:
    def make_checkpointer(initial_scale: float) -> Checkpointer:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", initial_scale))
        fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
        return Checkpointer(fabric, RunDirectory(tmp_path, {"seed": 0}), 5, precision=fabric.strategy.precision)

    state = TrainState(losses=torch.zeros(2), hits=torch.tensor(0))
    make_checkpointer(8.0).save(state)
    resumed = make_checkpointer(2.0)
    assert resumed.restore(state)
    assert resumed.parts["precision"].state_dict()["scale"] == 8.0


def test_run_started_on_another_kind_of_device_raises_one_line_error(
    tmp_path: Path, run_killed_in_second_epoch: DictConfig
) -> None:
    cfg = copy_run(run_killed_in_second_epoch, tmp_path)
    directory = parse_run(cfg).directory
    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    checkpoint["random"] = torch.zeros(1, CUDA_STATE_BYTES, dtype=torch.uint8)
    directory.save_checkpoint(checkpoint)
    with pytest.raises(UsageError, match="the checkpoint was written on a GPU; resume the run on a GPU"):
        run(parse_run(cfg))


def test_interrupted_fresh_run_is_resumed_and_superseded_once(tmp_path: Path, uninterrupted_outcome: Outcome) -> None:
    cfg = compose_checkpointed_run(tmp_path, "fresh=true")
    directory = parse_run(cfg).directory
    directory.write_record(construct(Record, {**uninterrupted_outcome[2], "sources": "0123456789ab", "seconds": 1.0}))
    run_until_killed(cfg, Augmentation, "__call__", STEPS + 10)
    assert directory.load_record() is None and directory.load_checkpoint() is not None
    assert run_in_child(lambda: run(parse_run(cfg))) == 0
    assert read_outcome(cfg) == uninterrupted_outcome and uninterrupted_outcome[2]["sources"] == digest_sources()
    assert [path.name for path in directory.path.glob("superseded-*")] == ["superseded-1"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_damaged_best_weights_stop_the_resumed_run_with_one_line(
    tmp_path: Path, run_killed_after_last_epoch: DictConfig, name: str, damage: str
) -> None:
    """Without a test of these files, the run would report another test result."""
    cfg = copy_run(run_killed_after_last_epoch, tmp_path)
    file = parse_run(cfg).directory.path / name
    damage_file(file, damage)
    with pytest.raises(UsageError, match=rf"{file} (is missing|was modified); delete .* to train again") as error:
        run(parse_run(cfg))
    assert "\n" not in str(error.value) and parse_run(cfg).directory.load_record() is None


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "akps.safetensors"])
def test_other_damaged_files_are_written_again_by_the_resumed_run(
    tmp_path: Path, run_killed_after_last_epoch: DictConfig, name: str
) -> None:
    cfg = copy_run(run_killed_after_last_epoch, tmp_path)
    file = parse_run(cfg).directory.path / name
    expected = file.read_bytes().replace(run_killed_after_last_epoch.paths.runs.encode(), str(tmp_path).encode())
    damage_file(file, "flipped")
    assert run_in_child(lambda: run(parse_run(cfg))) == 0
    assert file.read_bytes() == expected


def damage_file(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped" and content:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-10] if damage == "truncated" else b"")


def check_damaged_runs(folder: Path, cases: int, seed: int, expected: Outcome) -> None:
    """Kills a run at random and damages a random file of it; it is resumed with the same result, or with one line."""
    generator = random.Random(seed)
    for case in range(cases):
        cfg = compose_checkpointed_run(folder / str(case))
        run_until_killed(cfg, Augmentation, "__call__", generator.randint(2, 2 * STEPS))
        files = sorted(file for file in parse_run(cfg).directory.path.rglob("*") if file.is_file())
        file, damage = generator.choice(files), generator.choice(["missing", "empty", "truncated", "flipped"])
        damage_file(file, damage)
        try:
            assert run_in_child(lambda cfg=cfg: run_or_write_error(cfg, folder / "error")) == 0  # type: ignore[misc]
            if (folder / "error").exists():
                message = (folder / "error").read_text()
                assert str(parse_run(cfg).directory.path) in message and "\n" not in message
                (folder / "error").unlink()
            else:
                assert read_outcome(cfg) == expected
        except AssertionError as error:
            raise AssertionError(f"{file.name} {damage}") from error


def run_or_write_error(cfg: DictConfig, file: Path) -> None:
    try:
        run(parse_run(cfg))
    except UsageError as error:
        file.write_text(str(error))


def test_damage_after_a_kill_gives_same_result_or_one_line(tmp_path: Path, uninterrupted_outcome: Outcome) -> None:
    check_damaged_runs(tmp_path, 2, 0, uninterrupted_outcome)


@pytest.mark.slow
def test_damage_after_twenty_kills_gives_same_result_or_one_line(
    tmp_path: Path, uninterrupted_outcome: Outcome
) -> None:
    check_damaged_runs(tmp_path, 20, 1, uninterrupted_outcome)
