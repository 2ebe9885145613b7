import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from scipy import stats

from tests.training import trees
from tests.training.processes import in_child, start, wait
from training import tables
from training.config import CONFIGS, check, compose
from training.errors import UsageError
from training.tables import COLUMNS, Row, Table, summary


def record(seed: int, top1: float, conv: int = 100) -> dict[str, Any]:
    config = {"seed": seed, "arrangement": {}, "trainer": {"epochs": 3}}
    return {"config": config, "test": {"top1": top1}, "parameters": {"conv": conv, "total": 2 * conv}}


def test_means_and_intervals_paired_by_seed() -> None:
    plain = Row("plain", [], records=[record(s, v) for s, v in enumerate((90.0, 92.0, 97.0))])
    other = Row("other", [], records=[record(s, v, 25) for s, v in enumerate((91.5, 92.5, 98.0))])
    frame = summary([plain, other])
    assert list(frame.columns) == COLUMNS
    assert frame["diff_mean"][0] == frame["diff_ci95_low"][0] == frame["diff_ci95_high"][0] == 0
    row = frame.iloc[1]
    assert (row["conv_ratio"], row["seeds"], row["epochs"], row["params"]) == (4.0, 3, 3, 50)
    low, high = stats.ttest_rel([91.5, 92.5, 98.0], [90.0, 92.0, 97.0]).confidence_interval(0.95)
    assert (row["diff_mean"], row["diff_ci95_low"], row["diff_ci95_high"]) == pytest.approx((1.0, low, high))
    assert row["top1_std"] == pytest.approx(pd.Series([91.5, 92.5, 98.0]).std())


def test_one_seed_has_no_spread() -> None:
    frame = summary([Row("plain", [], records=[record(0, 90.0)])])
    assert math.isnan(frame["top1_std"][0]) and math.isnan(frame["diff_ci95_low"][0])


def table(folder: Path, *overrides: str, **changes: Any) -> Table:
    cfg = compose(["table=digits"], "reproduce_table").table
    cfg.rows = cfg.rows[:2]
    cfg.seeds = [0, 1]
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
    return Table("digits", cfg, [*paths, "trainer.epochs=1", *overrides])


def test_a_table_from_runs_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"seed": 7, "candidates": [["optim.lr=0.02"], ["optim.lr=0.0001"]]}
    first = table(tmp_path, search=search)
    frame = first.reproduce()
    assert [path.name for path in sorted((tmp_path / "results/tables").iterdir())] == [
        "digits.csv",
        "digits.jsonl",
        "digits.md",
        "digits.png",
    ]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results/tables/digits.csv"), frame, rtol=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "results/tables/digits.jsonl").read_text().splitlines()]
    assert [(line["row"], line["config"]["seed"]) for line in lines] == [
        (row, seed) for row in ("LeNet-5 plain", "conv1 Gabor") for seed in (0, 1)
    ]
    assert all(line["config"]["optim"]["lr"] == 0.02 for line in lines)  # 1e-4 learns nothing in one epoch
    markdown = (tmp_path / "results/tables/digits.md").read_text()
    assert "| conv1 Gabor | conv1: G6 | 2,446 | 1.05 |" in markdown and "`optim.lr=0.02`" in markdown
    records = sorted((tmp_path / "runs").glob("*/record.json"))
    assert len(records) == 8
    untested = [path for path in records if json.loads(path.read_text())["test"] is None]
    assert len(untested) == 4  # a search reads no test set

    original = tables.run
    monkeypatch.setattr(tables, "run", lambda cfg: original(cfg) if tables.recorded(cfg) else pytest.fail("ran again"))
    before = {path: path.stat().st_mtime_ns for path in records}
    table(tmp_path, search=search).reproduce()
    assert {path: path.stat().st_mtime_ns for path in records} == before


def test_an_interrupted_table_leaves_only_whole_records_and_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    original, count = tables.run, 0

    def interrupted(cfg: Any) -> tuple[dict[str, Any], bool]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(cfg)

    monkeypatch.setattr(tables, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path).reproduce()
    assert len([json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/record.json")]) == 2
    assert not (tmp_path / "results").exists()
    assert len(table(tmp_path).reproduce()) == 2 and count == 7


def outcome(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """A table and its records, without the seconds that they took."""
    lines = (folder / "results/tables/digits.jsonl").read_text().splitlines()
    return (folder / "results/tables/digits.csv").read_text(), [{**json.loads(line), "seconds": 0} for line in lines]


def test_workers_share_a_table_and_a_killed_one_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"seed": 7, "candidates": [["optim.lr=0.02"], ["optim.lr=0.0001"]]}
    monkeypatch.setattr(tables, "WAIT", 0.1)
    assert in_child(lambda: table(tmp_path / "lone", search=search).reproduce()) == 0
    log = tmp_path / "log"

    def work() -> None:
        original = tables.run

        def logged(cfg: Any) -> tuple[dict[str, Any], bool]:
            record, here = original(cfg)
            if here:
                with log.open("a") as file:
                    file.write(record["id"] + "\n")
            return record, here

        tables.run = logged
        table(tmp_path / "many", search=search).reproduce()

    victim, other = start(work), start(work)
    while not list((tmp_path / "many/runs").glob("*/record.json")):
        time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    assert wait(victim) == -signal.SIGKILL
    again = start(work)
    assert wait(other) == wait(again) == 0
    assert outcome(tmp_path / "many") == outcome(tmp_path / "lone")
    ids = [path.parent.name for path in (tmp_path / "many/runs").glob("*/record.json")]
    done = log.read_text().split()
    assert len(ids) == 8 and len(done) == len(set(done)) and set(done) <= set(ids)
    assert len(done) >= 7  # the killed one may have recorded a run and not said so


def test_a_failed_run_is_reported_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tables.run

    def failing(cfg: Any) -> tuple[dict[str, Any], bool]:
        if cfg.seed == 0 and cfg.model.layer is not None:
            raise RuntimeError("out of memory")
        return original(cfg)

    monkeypatch.setattr(tables, "run", failing)
    with pytest.raises(
        UsageError, match=r"1 of 4 runs failed, 3 are done.*conv1 Gabor, seed 0: RuntimeError: out of memory"
    ):
        table(tmp_path).reproduce()
    status = table(tmp_path).status()
    assert {state: len(titles) for state, titles in status.items()} == {"done": 3, "running": 0, "failed": 1, "left": 0}
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(tables, "run", original)
    assert len(table(tmp_path).reproduce()) == 2
    assert not table(tmp_path).status()["failed"]


def test_a_search_does_without_a_candidate_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tables.run

    def failing(cfg: Any) -> tuple[dict[str, Any], bool]:
        if cfg.optim.lr == 0.02:
            raise UsageError("the loss is nan at step 3")
        return original(cfg)

    monkeypatch.setattr(tables, "run", failing)
    search = {"seed": 7, "candidates": [["optim.lr=0.02"], ["optim.lr=0.01"]]}
    first = table(tmp_path, search=search)
    first.reproduce()
    assert [row.chosen for row in first.rows] == [["optim.lr=0.01"]] * 2


def test_status_of_a_table_not_begun(tmp_path: Path) -> None:
    search = {"seed": 7, "candidates": [["optim.lr=0.02"], ["optim.lr=0.01"]]}
    status = table(tmp_path, search=search).status()
    assert {state: len(titles) for state, titles in status.items()} == {"done": 0, "running": 0, "failed": 0, "left": 8}
    assert not any(tmp_path.iterdir())


def test_a_bad_row_is_refused_before_the_first_run(tmp_path: Path) -> None:
    rows = [{"name": "plain", "overrides": ["model=lenet"]}, {"name": "bad", "overrides": ["arrangement.conv1=G5"]}]
    with pytest.raises(UsageError, match="'G5' fills 5 of 6 kernels of conv1"):
        table(tmp_path, rows=rows)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "rows"), [("flowers102", [0, 3, 4, 7]), ("food101", [4, 7])])
def test_large_images_from_tree_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: list[int]
) -> None:
    """Cache, pretrained weights from the library's cache, two steps, test, table: plain and exp3."""
    getattr(trees, name)(tmp_path / "data")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "checkpoints" / weights)
    cfg = compose([f"table={name}_resnet18"], "reproduce_table").table
    assert [row.get("against") for row in cfg.rows] == [None] * 4 + ["plain, from scratch"] * 4
    cfg.seeds, cfg.search, cfg.rows = [0], None, [cfg.rows[i] for i in rows]
    size = 6 if name == "flowers102" else 13
    small = [f"data.root={tmp_path}/data", f"data.cache={tmp_path}/cache", "data.size=36", "data.crop=32"]
    small += [f"trainer.batch_size={size}", "trainer.epochs=1", "trainer.compile=false", "trainer.accelerator=cpu"]
    paths = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    frame = Table(name, cfg, [*small, *paths]).reproduce()
    assert list(frame["arrangement"]) == ["plain", "first: G30 Lg15 Lt15 Tf30 Ts6 P96"] * (len(rows) // 2)
    assert list(frame["conv_params"][0] - frame["conv_params"]) == [0, 9408 - 4962] * (len(rows) // 2)
    assert frame["top1_mean"].between(0, 100).all()
    assert len(next((tmp_path / "runs").glob("*/metrics.csv")).read_text().splitlines()) == 2
    text = (tmp_path / f"results/tables/{name}.md").read_text()
    others = "plain, pretrained or plain, from scratch" if 0 in rows else "plain, from scratch"
    assert f"points against {others} |" in text and "resnet18" in text.splitlines()[0]


def test_a_row_against_one_that_is_not_there(tmp_path: Path) -> None:
    rows = [{"name": "plain", "overrides": ["model=lenet"], "against": "nobody"}]
    with pytest.raises(UsageError, match="row 'plain' is against 'nobody', which is no row of this table"):
        table(tmp_path, rows=rows)


def test_a_table_may_do_without_rows_that_it_shares(tmp_path: Path) -> None:
    assert [row.name for row in table(tmp_path, without=["conv1 Gabor"]).rows] == ["LeNet-5 plain"]


def test_a_second_comparison(tmp_path: Path) -> None:
    made = table(tmp_path, also_against="conv1 Gabor", search=None)
    plain, other = made.rows
    for row, values in ((plain, (90.0, 92.0)), (other, (91.0, 94.0))):
        row.records = [
            {**record(s, v), "machine": {"device": "a", "threads": 2}, "commit": None, "versions": {}, "seconds": 1.0}
            for s, v in enumerate(values)
        ]
    lines = made.markdown(summary(made.rows)).splitlines()
    assert lines[2].endswith("| points against LeNet-5 plain | points against conv1 Gabor |")
    assert lines[4].endswith("|  | -1.50 [-7.85, +4.85] |") and lines[5].endswith("| +1.50 [-4.85, +7.85] |  |")
    with pytest.raises(UsageError, match="also_against 'nobody' is no row of this table"):
        table(tmp_path, also_against="nobody")


def test_rows_are_compared_with_the_row_they_name() -> None:
    first, second, third = (
        Row(n, [], a, records=[record(0, t)]) for n, a, t in (("a", None, 90), ("b", "b", 50), ("c", "b", 53))
    )
    assert list(summary([first, second, third])["diff_mean"]) == [0, 0, 3]


TABLES = sorted(path.stem for path in (CONFIGS / "table").glob("*.yaml"))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_can_be_composed(name: str) -> None:
    cfg = compose([f"table={name}"], "reproduce_table").table
    assert len(cfg.rows) >= 7 and compose([*cfg.overrides, *cfg.rows[0].overrides]).model.layer is None
    for row in cfg.rows[1::3]:
        for candidate in cfg.search.candidates[:1] if cfg.search else [[]]:
            composed = compose([*cfg.overrides, *row.overrides, *candidate])
            check(composed)
            assert composed.data.name in (name.split("_")[0], name, "imagefolder")
