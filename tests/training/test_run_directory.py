import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.configurations import compose_run
from tests.training.processes import run_in_child
from training.errors import BusyError, UsageError
from training.files import UNFINISHED, write_atomic, write_together
from training.loop import run
from training.record import Record, compute_run_id, read_record
from training.run_directory import RunDirectory, serialize
from training.settings import parse_run


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs", {"seed": 0})


CONFIG: dict[str, Any] = {"seed": 0, "model": {}, "arrangement": {}, "trainer": {"epochs": 1}}
RECORD = {
    "format": 1,
    "id": compute_run_id(CONFIG),
    "config": CONFIG,
    "test": {"top1": 99.5, "loss": 0.01},
    "val": {"top1": 99, "loss": 0.02},
    "best_epoch": 1,
    "parameters": {"conv": 100, "total": 200},
    "seconds": 1.5,
    "commit": None,
    "machine": {"device": "CPU", "threads": 2, "system": "Linux"},
    "versions": {"torch": "2.6"},
}


# Identity


def test_run_id_does_not_depend_on_order_of_sections() -> None:
    assert compute_run_id({"seed": 0, "data": {"name": "digits"}}) == "04b9f0707ff1"
    assert compute_run_id({"data": {"name": "digits"}, "seed": 0}) == "04b9f0707ff1"
    assert compute_run_id({"seed": 1, "data": {"name": "digits"}}) != "04b9f0707ff1"


# Records


def test_record_is_loaded_as_written(tmp_path: Path) -> None:
    directory, record = RunDirectory(tmp_path, CONFIG), Record(**RECORD)
    assert directory.load_record() is None
    directory.write_record(record)
    assert directory.load_record() == record and json.loads(directory.record_file.read_text()) == RECORD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a record of a run: Expecting value"),
        (json.dumps(RECORD).encode()[:-20], "is not a record of a run: "),
        (b"\xff\xfe\x00", "is not a record of a run: "),
        (b"[1]", "is not a record of a run: it is not a JSON object"),
        (b"[" * 100_000, "is not a record of a run: "),
        ({"format": "1"}, "is not a record of a run: format='1' is invalid: it should be a valid integer"),
        ({"config": []}, r"is not a record of a run: config=\[\] is invalid: it should be a valid dictionary"),
        ({"val": {"top1": "99", "loss": 1.0}}, r"is not a record of a run: val\.top1='99' is invalid"),
        ({"test": {"top1": 99.5}}, r"is not a record of a run: test\.loss is missing"),
        ({"machine": {"device": "CPU"}}, r"is not a record of a run: machine\.threads is missing"),
        ({"id": "0" * 12}, "is not a record of a run: id=000000000000 is not the hash of its config, [0-9a-f]{12}"),
        ({"test": {"top1": 250.0, "loss": 1.0}}, r"is not a record of a run: test\.top1=250\.0 is invalid"),
        ({"test": {"top1": -1.0, "loss": 1.0}}, r"is not a record of a run: test\.top1=-1\.0 is invalid"),
        ({"test": {"top1": math.inf, "loss": 1.0}}, r"is not a record of a run: test\.top1=inf is invalid"),
        ({"val": {"top1": math.nan, "loss": 1.0}}, r"is not a record of a run: val\.top1=nan is invalid"),
        ({"val": {"top1": 90.0, "loss": -1.0}}, r"is not a record of a run: val\.loss=-1\.0 is invalid"),
        ({"best_epoch": 2}, "is not a record of a run: best_epoch=2 exceeds its 1 epochs"),
        ({"parameters": {"conv": 300, "total": 200}}, r"is not a record of a run: parameters\.conv=300 exceeds"),
        ({"seconds": math.nan}, "is not a record of a run: seconds=nan is invalid"),
        ({"weights": 1}, "is not a record of a run: weights=1 is invalid"),
        (None, "Is a directory"),
    ],
)
def test_read_record_names_file_and_problem(
    tmp_path: Path, content: bytes | dict[str, object] | None, message: str
) -> None:
    file = tmp_path / "record.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(RECORD | content).encode())
    with pytest.raises(UsageError, match=rf"{file}:? {message}") as error:
        read_record(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a record of a run"),
        ("{", "is not a record of a run"),
        (
            '{"format": 99, "config": {}}',
            "is not a record of a run: format=99 is invalid: it should be less than or equal to 1",
        ),
        (json.dumps(RECORD), "belongs to another configuration"),
    ],
)
def test_invalid_record_is_rejected_and_kept(tmp_path: Path, content: str, message: str) -> None:
    cfg = compose_run(tmp_path)
    record_file = parse_run(cfg).directory.record_file
    record_file.parent.mkdir()
    record_file.write_text(content)
    with pytest.raises(UsageError, match=rf"{record_file} {message}"):
        run(parse_run(cfg))
    assert record_file.read_text() == content


def test_set_aside_overwrites_no_earlier_folder(directory: RunDirectory) -> None:
    with directory.lock():
        for name in ("superseded-3/record.json", "superseded-by-hand/record.json", "record.json"):
            directory.write(name, name)
        directory.set_aside()
    assert (directory.path / "superseded-3/record.json").read_text() == "superseded-3/record.json"
    assert (directory.path / "superseded-4/record.json").read_text() == "record.json"


def test_set_aside_moves_files_into_numbered_folders(directory: RunDirectory) -> None:
    with directory.lock():
        for number in (1, 2):
            directory.write("record.json", f"record {number}")
            directory.write("wandb/log", f"log {number}")
            directory.set_aside()
            assert directory.is_locked()
    names = ["lock", "superseded-1", "superseded-2", "worker"]
    assert sorted(path.name for path in directory.path.iterdir()) == names
    for number in (1, 2):
        superseded = directory.path / f"superseded-{number}"
        assert sorted(path.name for path in superseded.iterdir()) == ["record.json", "wandb"]
        assert (superseded / "record.json").read_text() == f"record {number}"
        assert (superseded / "wandb/log").read_text() == f"log {number}"


# Locks


def test_run_lock_excludes_second_worker(tmp_path: Path) -> None:
    cfg = compose_run(tmp_path)
    directory = parse_run(cfg).directory

    def expect_busy() -> None:
        with pytest.raises(BusyError, match=rf"{directory.path} is in use by process {os.getppid()} on"):
            run(parse_run(cfg))

    with directory.lock():
        assert run_in_child(expect_busy) == 0
    assert directory.load_record() is None


def test_is_locked_while_process_holds_lock(directory: RunDirectory) -> None:
    def expect_locked(expected: bool) -> None:
        assert directory.is_locked() is expected

    assert not directory.is_locked() and not directory.path.exists()
    with directory.lock():
        assert run_in_child(lambda: expect_locked(True)) == 0
    assert run_in_child(lambda: expect_locked(False)) == 0
    assert not directory.is_locked()


def test_lock_of_killed_process_is_released(directory: RunDirectory) -> None:
    def die_with_lock() -> None:
        with directory.lock():
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(die_with_lock) == -signal.SIGKILL
    assert not directory.is_locked()
    with directory.lock():
        assert (directory.path / "worker").read_text().startswith(f"process {os.getpid()} on ")


def test_lock_deletes_unfinished_files_of_killed_process(directory: RunDirectory) -> None:
    directory.path.mkdir(parents=True)
    (directory.path / f"{UNFINISHED}host-1-x").write_text("half")
    with directory.lock():
        assert sorted(path.name for path in directory.path.iterdir()) == ["lock", "worker"]


def test_folder_that_cannot_be_created_raises_usage_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot use .*runs.*: (Not a directory|File exists)"):
        run(parse_run(compose_run(tmp_path / "runs")))


# Files


def test_full_disk_raises_usage_error_and_keeps_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write_half(target: Path, content: bytes) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(UsageError, match=rf"cannot write {path}: No space left on device"):
        write_atomic(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_write_atomic_creates_folders_and_replaces_file(tmp_path: Path) -> None:
    path = tmp_path / "a/b/file"
    write_atomic(path, "text")
    write_atomic(path, b"bytes")
    assert path.read_bytes() == b"bytes" and list(path.parent.iterdir()) == [path]


def test_read_only_folder_raises_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(UsageError, match=rf"cannot write {tmp_path}/file: Read-only file system"):
        write_atomic(tmp_path / "file", "text")


def test_write_atomic_writes_into_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "text")
    assert os.read(reader, 10) == b"text" and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    os.close(reader)


@pytest.mark.parametrize("is_new", [True, False])
def test_write_atomic_writes_to_target_of_symlink(tmp_path: Path, is_new: bool) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder/target"
    link.symlink_to("folder/target")
    if not is_new:
        target.write_text("before")
    write_atomic(link, "after")
    assert link.is_symlink() and target.read_text() == "after" and not target.is_symlink()
    assert list(target.parent.iterdir()) == [target]


def test_files_written_together_stay_as_they_were_if_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: "1", second: b"2"})
    write_bytes = Path.write_bytes

    def fail_for_second(path: Path, content: bytes) -> int:
        if path.name.endswith(second.name):
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail_for_second)
    with pytest.raises(UsageError, match=f"cannot write {second}: No space left on device"):
        write_together({first: "3", second: "4"})
    assert (first.read_text(), second.read_text()) == ("1", "2") and len(list(tmp_path.iterdir())) == 2


# Checkpoints


def test_load_checkpoint_returns_newest_of_last_two(directory: RunDirectory) -> None:
    assert directory.load_checkpoint() is None
    for step in (1, 2, 3):
        directory.save_checkpoint({"config": {"seed": 0}, "step": step, "losses": torch.full((2,), float(step))})
    loaded = directory.load_checkpoint()
    assert loaded is not None and loaded["step"] == 3 and torch.equal(loaded["losses"], torch.tensor([3.0, 3.0]))
    last, before = directory.checkpoint_files
    before.replace(last)
    loaded = directory.load_checkpoint()
    assert loaded is not None and loaded["step"] == 2
    directory.delete_checkpoints()
    assert directory.load_checkpoint() is None and not list(directory.path.iterdir())


def test_damaged_checkpoints_are_reported_and_skipped(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        directory.save_checkpoint({"config": {"seed": 0}, "step": step})
    remedies = ("trying the checkpoint before it", "training starts again")
    for path, expected_step, remedy in zip(directory.checkpoint_files, (1, None), remedies, strict=True):
        path.write_bytes(path.read_bytes()[:-1])
        loaded = directory.load_checkpoint()
        assert (loaded and loaded["step"]) == expected_step
        assert f"{path} is damaged; {remedy}" in capsys.readouterr().err


def test_checkpoint_of_another_configuration_is_rejected_and_kept(tmp_path: Path) -> None:
    cfg = compose_run(tmp_path)
    directory = parse_run(cfg).directory
    directory.save_checkpoint({"config": {}})
    file = directory.checkpoint_files[0]
    content = file.read_bytes()
    with pytest.raises(UsageError, match=rf"{file} belongs to another configuration"):
        run(parse_run(cfg))
    assert file.read_bytes() == content and content.endswith(serialize({"config": {}}))
