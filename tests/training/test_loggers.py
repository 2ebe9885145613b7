"""Logs of Weights & Biases, read from its offline files."""

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reporting.settings import TableSettings
from reporting.table import Table
from scripts import train, upload_runs
from scripts.upload_runs import UploadSettings
from training import loop
from training.config import compose, resolve
from training.errors import UsageError
from training.loop import run
from training.settings import parse_run
from training.validation import construct

BLOCK, HEADER = 32768, 7  # bytes
WHOLE, LAST = 1, 4
"""The types of fragments that end a record."""


def read_records(path: Path) -> list[Any]:
    """The records of a .wandb file: protobufs in LevelDB's log format.

    The file consists of blocks, and the blocks of fragments: checksum, length, type and content.
    """
    from wandb.proto import wandb_internal_pb2

    content, position, parts, records = path.read_bytes(), HEADER, b"", []
    while position + HEADER <= len(content):
        remaining = BLOCK - position % BLOCK
        if remaining < HEADER:  # padding
            position += remaining
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        fragment_type = content[position + 6]
        if position + HEADER + length > len(content):  # not written completely
            break
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if fragment_type in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def unflatten(items: Any) -> dict[str, Any]:
    """The values of W&B's items as nested dictionaries."""
    result: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        node = result
        for key in path:
            node = node.setdefault(key, {})
        node[last] = json.loads(item.value_json)
    return result


def read_finished_records(path: Path, timeout: float = 60) -> list[Any]:
    """The records of a finished run. W&B's own process may write the last ones after ``finish`` has returned."""
    deadline = time.monotonic() + timeout
    while True:
        records = read_records(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < deadline, f"{path} has no exit record"
        time.sleep(0.1)


def read_log(path: Path) -> dict[str, Any]:
    """The run, configuration, history and summary of a finished run in a .wandb file."""
    log: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "artifacts": []}
    for record in read_finished_records(path):
        record_type = record.WhichOneof("record_type")
        if record_type == "run":
            log["run"] = record.run
            log["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record_type == "history":
            log["history"].append(unflatten(record.history.item))
        elif record_type == "summary":
            log["summary"] |= unflatten(record.summary.update)
        elif record_type == "request" and record.request.HasField("log_artifact"):
            log["artifacts"].append(record.request.log_artifact.artifact)
        elif record_type == "artifact":
            log["artifacts"].append(record.artifact)
    return log


def read_weights(log: dict[str, Any]) -> dict[str, int]:
    """The names and sizes of the files in a log's only artifact, the weights of the run."""
    (artifact,) = log["artifacts"]
    assert (artifact.type, artifact.name) == ("model", log["run"].run_id)
    return {entry.path: entry.size for entry in artifact.manifest.contents}


@pytest.fixture(autouse=True)
def _remove_wandb_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.setup()  # reads WANDB_MODE only once, so before a test sets it
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))  # for copies of artifacts


def test_each_table_run_is_one_wandb_run(tmp_path: Path) -> None:
    cfg = compose(["table=digits"], "reproduce_table").table
    cfg.rows = [cfg.rows[0], cfg.rows[3]]
    cfg.seeds = [1]
    paths = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    options = ["logger=wandb", "logger.tags=[mine]", "trainer.epochs=2", "trainer.batch_size=200"]
    Table("digits", construct(TableSettings, resolve(cfg), "table"), [*paths, *options]).reproduce()
    logs = [read_log(path) for path in (tmp_path / "runs").glob("*/wandb/offline-run-*/*.wandb")]
    assert len(logs) == 2 == len({log["run"].run_id for log in logs})
    for log in logs:
        folder = tmp_path / "runs" / log["run"].run_id
        record = json.loads((folder / "record.json").read_text())
        is_mosaic = record["config"]["model"]["layer"] is not None
        row = "mosaic, no plain kernel" if is_mosaic else "LeNet-5 plain"
        assert log["run"].run_group == "digits"
        assert log["run"].display_name == f"{row}, seed {record['config']['seed']}"
        assert log["config"]["row"] == row
        assert set(log["run"].tags) == {"digits", "lenet", "mine"}
        assert read_weights(log) == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
        assert record["config"]["optim"].items() <= log["config"]["optim"].items()
        assert log["config"]["seed"] == record["config"]["seed"]
        steps = {int(entry["_step"]): entry for entry in log["history"]}
        assert [steps[epoch]["epoch"] for epoch in (1, 2)] == [1, 2]
        assert {"train_loss", "train_top1", "val_loss", "val_top1", "lr"} <= set(steps[1])
        assert log["summary"]["test"] == record["test"] and log["summary"]["parameters"] == record["parameters"]
        if is_mosaic:
            for epoch in (0, 2):  # the first and the last
                assert steps[epoch]["conv1/mosaic"]["_type"] == "image-file"
                sigmas = steps[epoch]["conv2/Tf/sigma"]
                assert sigmas["_type"] == "histogram" and sum(sigmas["values"]) == 32
                assert min(sigmas["bins"]) > 0.3  # pixels, not raw values
            assert "conv1/mosaic" not in steps[1]
            assert len(list(folder.glob("wandb/offline-run-*/files/media/images/conv1/mosaic_*.png"))) == 2
    (log,) = [read_log(path) for path in (tmp_path / "runs/wandb").glob("offline-run-*/*.wandb")]
    assert (log["run"].run_id, log["run"].run_group) == ("table-digits", "digits")
    assert log["summary"]["table"]["nrows"] == 2 and log["summary"]["figure"]["_type"] == "image-file"


def test_resumed_run_keeps_wandb_id_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["arrangement=mosaic", "logger=wandb", "trainer.epochs=2", f"paths.runs={tmp_path}"])
    original, calls = loop.predict, 0

    def interrupt_second_call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loop, "predict", interrupt_second_call)
    with pytest.raises(KeyboardInterrupt):
        run(parse_run(cfg))
    record, _ = run(parse_run(cfg))
    logs = [read_log(path) for path in sorted(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))]
    assert [log["run"].run_id for log in logs] == [record.id] * 2
    assert [[int(entry["_step"]) for entry in log["history"]] for log in logs] == [[0, 1], [2]]


def test_recorded_run_is_logged_again_with_metrics_and_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a W&B sweep that proposes a known configuration, and as ``upload_runs.py`` does."""
    overrides = ["model=lenet", "trainer.epochs=2", "trainer.batch_size=600"]
    record, _ = run(parse_run(compose([*overrides, f"paths.runs={tmp_path / 'old'}"])))
    (tmp_path / "old").rename(tmp_path / "moved")
    (metrics_file,) = (tmp_path / "moved").glob("*/metrics.csv")
    pd.read_csv(metrics_file).assign(val_top1=0.0).to_csv(metrics_file, index=False)  # the last epoch is worse
    upload_runs.main(
        UploadSettings(runs=[str(tmp_path / "moved")], logger={"name": "wandb", "project": "mine", "entity": "us"})
    )
    assert capsys.readouterr().out.endswith("1 runs logged to W&B project mine\n")
    (path,) = (tmp_path / "moved").glob("*/wandb/offline-run-*/*.wandb")
    log = read_log(path)
    assert (log["run"].run_id, log["run"].project, log["run"].entity) == (record.id, "mine", "us")
    assert read_weights(log) == {"model.safetensors": (path.parents[2] / "model.safetensors").stat().st_size}
    assert [entry["epoch"] for entry in log["history"]] == [1, 2]
    assert record.test is not None and log["summary"]["test"] == record.test.to_dict()
    assert log["summary"]["val_top1"] == record.val.top1  # of the best epoch, which W&B's sweeps should compare


def test_sweep_logs_run_that_is_recorded_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["model=lenet", "trainer.epochs=1", "trainer.batch_size=600", f"paths.runs={tmp_path}"]
    accuracy = train.main(compose(overrides))
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    logged: list[Any] = []
    monkeypatch.setattr(train, "log_recorded_run", lambda *args: logged.append(args))
    assert train.main(compose([*overrides, "logger=wandb"])) == accuracy
    assert len(logged) == 1 and logged[0][-1].val.top1 == accuracy


def test_runs_that_cannot_be_read_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "0123456789ab"
    folder.mkdir()
    (folder / "record.json").write_text("{")
    with pytest.raises(UsageError, match="no run could be read"):
        upload_runs.main(UploadSettings(runs=str(tmp_path), logger={"name": "wandb"}))
    assert capsys.readouterr().err == f"skipped: {folder} is not the folder of a run: it has no config.yaml\n"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (
            f"logger.tags=[ok,{'x' * 70}]",
            "run_tags: Tag 'xxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxx' is 70 characters",
        ),
        ("logger.tags=[ok,'']", "run_tags: Tag at index 1 is empty"),
        ("logger.project=a/b", "Invalid project name 'a/b': cannot contain characters"),
    ],
)
def test_options_that_wandb_refuses_are_reported_before_data_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, reason: str
) -> None:
    monkeypatch.setattr(loop, "load_run_data", None)
    with pytest.raises(UsageError) as error:
        run(parse_run(compose(["model=lenet", "logger=wandb", option, f"paths.runs={tmp_path / 'runs'}"])))
    assert str(error.value).startswith(f"W&B error: {reason}") and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_unreachable_wandb_is_reported_before_data_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**_: Any) -> bool:
        raise wandb.errors.AuthenticationError("Failed to authenticate:\nno route to host")

    monkeypatch.setattr(wandb, "login", fail)
    monkeypatch.setattr(loop, "load_run_data", None)
    message = "W&B error: Failed to authenticate: no route to host; set WANDB_MODE=offline to log "
    with pytest.raises(UsageError, match=f"^{message}without a connection$"):
        run(parse_run(compose(["model=lenet", "logger=wandb", f"paths.runs={tmp_path / 'runs'}"])))
    with pytest.raises(UsageError, match=f"^{message}"):
        settings = construct(TableSettings, resolve(compose(["table=digits"], "reproduce_table").table), "table")
        Table("digits", settings, ["logger=wandb", f"paths.runs={tmp_path / 'runs'}"]).reproduce()
    assert not (tmp_path / "runs").exists()


def test_unknown_mode_of_environment_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(UsageError, match=r"^W&B error: mode: Input should be 'online', 'offline'"):
        run(parse_run(compose(["model=lenet", "logger=wandb", f"paths.runs={tmp_path / 'runs'}"])))


def test_mode_of_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = ["model=lenet", "trainer.epochs=1", "trainer.batch_size=600", "logger=wandb"]
    run(parse_run(compose([*options, f"paths.runs={tmp_path / 'runs'}"])))
    (record,) = (tmp_path / "runs").glob("*/record.json")
    assert not (record.parent / "wandb").exists()
    assert not [file for file in (tmp_path / "wandb_data").rglob("*") if file.is_file()]  # no copies of the weights


def test_run_with_damaged_metrics_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for seed in (0, 1):
        options = ["model=lenet", "trainer.epochs=2", "trainer.batch_size=600", "data.train_share=0.5", f"seed={seed}"]
        run(parse_run(compose([*options, f"paths.runs={tmp_path}"])))
    file = min(tmp_path.glob("*/metrics.csv"))  # the first run; the second one is intact
    header, first, second = file.read_text().splitlines()
    for lines in (
        [header.replace("epoch", "time"), first, second],
        [header, f"nan{first[1:]}", second],
        [header, second],
        [header, first, first],
        [header, f"{first},9", second],
        [header],
        [],
    ):
        file.write_text("\n".join(lines))
        capsys.readouterr()
        upload_runs.main(UploadSettings(runs=str(tmp_path), logger={"name": "wandb"}))
        done = capsys.readouterr()
        assert done.out.endswith("1 runs logged to W&B project anann\n"), lines
        (skipped,) = [line for line in done.err.splitlines() if line.startswith("skipped")]
        assert str(file) in skipped
