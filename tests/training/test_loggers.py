"""What W&B has written, read back from its own offline files."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.config import compose
from training.loop import run
from training.tables import Table

BLOCK, HEADER = 32768, 7


def records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of fragments: checksum, length, type) of protobufs."""
    from wandb.proto import wandb_internal_pb2

    content, position, whole, found = path.read_bytes(), HEADER, b"", []
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last fragment
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def nested(items: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        node = result
        for key in path:
            node = node.setdefault(key, {})
        node[last] = json.loads(item.value_json)
    return result


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"config": {}, "history": [], "summary": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            result["run"] = record.run
            result["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            result["history"].append(nested(record.history.item))
        elif kind == "summary":
            result["summary"] |= nested(record.summary.update)
    return result


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_tables_runs_are_runs_of_wandb_each(tmp_path: Path) -> None:
    cfg = compose(["table=digits"], "reproduce_table").table
    cfg.rows = [cfg.rows[0], cfg.rows[3]]
    cfg.seeds = [0, 1]
    paths = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    table = Table(
        "digits", cfg, [*paths, "logger=wandb", "logger.tags=[mine]", "trainer.epochs=2", "trainer.batch_size=200"]
    )
    table.reproduce()
    logs = [read(path) for path in (tmp_path / "runs").glob("*/wandb/offline-run-*/*.wandb")]
    assert len(logs) == 4 == len({log["run"].run_id for log in logs})
    for log in logs:
        folder = tmp_path / "runs" / log["run"].run_id
        record = json.loads((folder / "record.json").read_text())
        mosaic = record["config"]["model"]["layer"] is not None
        row = "mosaic, no plain kernel" if mosaic else "LeNet-5 plain"
        assert log["run"].run_group == "digits"
        assert log["run"].display_name == f"{row}, seed {record['config']['seed']}"
        assert log["config"]["row"] == row
        assert set(log["run"].tags) == {"digits", "lenet", "mine"}
        assert log["config"]["optim"] == record["config"]["optim"] and log["config"]["seed"] == record["config"]["seed"]
        epochs = {int(row["_step"]): row for row in log["history"]}
        assert [epochs[n]["epoch"] for n in (1, 2)] == [1, 2]
        assert {"train_loss", "train_top1", "val_loss", "val_top1", "lr"} <= set(epochs[1])
        assert log["summary"]["test"] == record["test"] and log["summary"]["parameters"] == record["parameters"]
        if mosaic:
            for step in (0, 2):
                assert epochs[step]["conv1/mosaic"]["_type"] == "image-file"
                widths = epochs[step]["conv2/Tf/sigma"]
                assert widths["_type"] == "histogram" and sum(widths["values"]) == 32
                assert min(widths["bins"]) > 0.3  # pixels, not raw values
            assert "conv1/mosaic" not in epochs[1]
            assert len(list(folder.glob("wandb/offline-run-*/files/media/images/conv1/mosaic_*.png"))) == 2


def test_a_resumed_run_goes_on_under_its_own_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import loop

    cfg = compose(["arrangement=mosaic", "logger=wandb", "trainer.epochs=2", f"paths.runs={tmp_path}"])
    original, calls = loop.evaluate, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    record, _ = run(cfg)
    logs = [read(path) for path in sorted(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))]
    assert [log["run"].run_id for log in logs] == [record["id"]] * 2
    assert [[int(row["_step"]) for row in log["history"]] for log in logs] == [[0, 1], [2]]
