import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torchvision

import reporting.table
from acl import Arrangement
from acl.kernels import analytic_kinds
from reporting.rows import read_results
from reporting.table import Table
from tests.reporting.helpers import create_table, forbid_calls, load_settings, make_record
from tests.training import trees
from tests.training.processes import run_in_child, start_process, wait_for
from training.config import CONFIGS, compose
from training.errors import UsageError
from training.files import write_atomic
from training.provenance import digest_sources
from training.record import Record
from training.settings import parse_run

pytestmark = pytest.mark.usefixtures("no_figures")  # those of the fixture ``searched_table`` are drawn
SEARCH = {"seed": 7, "candidates": [["optim.lr=0.0001"], ["optim.lr=0.02"]]}  # 1e-4 learns nothing in one epoch
OTHER_SOURCES = "0" * 12


@pytest.fixture(scope="module")
def searched_table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Table]:
    """The folder of a table with a search, and the table."""
    folder = tmp_path_factory.mktemp("searched")
    table = create_table(folder, search=SEARCH)
    table.reproduce()
    return folder, table


@pytest.fixture
def searched_table_copy(searched_table: tuple[Path, Table], tmp_path: Path) -> Path:
    return shutil.copytree(searched_table[0], tmp_path / "copy")


def read_json_lines(folder: Path, name: str = "digits.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results/tables" / name).read_text().splitlines()]


def read_records(folder: Path) -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/record.json"))}


def count_states(table: Table) -> dict[str, int]:
    return {state: len(titles) for state, titles in table.status().items()}


# Files


def test_reproduce_writes_table_and_figure_in_all_formats(searched_table: tuple[Path, Table]) -> None:
    folder, table = searched_table
    assert sorted(path.name for path in (folder / "results/tables").iterdir()) == [
        "digits.csv",
        "digits.jsonl",
        "digits.md",
        "digits.pdf",
        "digits.png",
        "digits.tex",
        "digits_search.jsonl",
    ]
    frame = pd.read_csv(folder / "results/tables/digits.csv").fillna({"interval_over": ""})
    pd.testing.assert_frame_equal(frame, reporting.table.summarize(table.rows), rtol=1e-4)
    lines = read_json_lines(folder)
    assert [(line["row"], line["config"]["seed"]) for line in lines] == [
        (row, seed) for row in ("LeNet-5 plain", "conv1 Gabor") for seed in (0, 1)
    ]
    assert all(line["config"]["optim"]["lr"] == 0.02 for line in lines)
    markdown = (folder / "results/tables/digits.md").read_text()
    assert "| conv1 Gabor | conv1: G6 | 2,446 | 1.05 |" in markdown and "`optim.lr=0.02`" in markdown
    assert (folder / "results/tables/digits.png").read_bytes().startswith(b"\x89PNG")


def test_table_of_another_recipe_is_not_overwritten(searched_table_copy: Path) -> None:
    file = searched_table_copy / "results/tables/digits.jsonl"
    create_table(searched_table_copy, search=SEARCH).check_written()
    with pytest.raises(
        UsageError, match=r"digits\.jsonl has 2 runs of another recipe, such as of row 'LeNet-5 plain';"
    ):
        create_table(searched_table_copy, search=SEARCH, seeds=[0, 2]).check_written()
    with pytest.raises(UsageError, match="has 4 runs of another recipe"):
        create_table(searched_table_copy).check_written()
    fewer = {"seed": 7, "candidates": SEARCH["candidates"][1:]}  # the chosen one, so that the seeds' runs stay
    with pytest.raises(UsageError, match=r"digits_search\.jsonl has 2 runs of another recipe"):
        create_table(searched_table_copy, search=fewer).check_written()
    file.unlink()
    create_table(searched_table_copy).check_written()


def test_search_does_not_evaluate_test_set(searched_table: tuple[Path, Table]) -> None:
    records = read_records(searched_table[0]).values()
    assert len(records) == 8
    assert [record["config"]["seed"] for record in records if record["test"] is None] == [7] * 4


def test_search_file_lists_every_trial_and_explains_choice(searched_table: tuple[Path, Table]) -> None:
    folder, table = searched_table
    trials = read_json_lines(folder, "digits_search.jsonl")
    assert [(trial["row"], trial["candidate"]) for trial in trials] == [
        (row.name, candidate) for row in table.rows for candidate in SEARCH["candidates"]
    ]
    for trial in trials:
        (override,) = trial["candidate"]
        assert override == f"optim.lr={trial['config']['optim']['lr']}"
        assert trial["config"]["seed"] == 7 and trial["test"] is None
    for row in table.rows:
        of_row = [trial for trial in trials if trial["row"] == row.name]
        best = max(of_row, key=lambda trial: (trial["val"]["top1"], -trial["val"]["loss"]))
        assert row.chosen == best["candidate"] == ["optim.lr=0.02"]
    assert "([all trials](digits_search.jsonl))" in (folder / "results/tables/digits.md").read_text()


def test_table_without_search_writes_no_search_file(tmp_path: Path) -> None:
    create_table(tmp_path, seeds=[0]).reproduce()
    assert not (tmp_path / "results/tables/digits_search.jsonl").exists()
    assert "all trials" not in (tmp_path / "results/tables/digits.md").read_text()


def test_load_results_restores_records_and_choices(
    searched_table: tuple[Path, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # draws the figures
    folder, table = searched_table
    shutil.copytree(folder / "results", tmp_path / "results")
    loaded = create_table(tmp_path, search=SEARCH)
    loaded.load_results()
    loaded.write()
    assert [row.chosen for row in loaded.rows] == [row.chosen for row in table.rows]
    for file in (folder / "results/tables").iterdir():
        if file.suffix != ".png":
            assert (tmp_path / "results/tables" / file.name).read_bytes() == file.read_bytes()


def test_load_results_rejects_missing_and_mismatched_records(searched_table_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no .*digits\.jsonl; reproduce the table first"):
        create_table(tmp_path / "nowhere", search=SEARCH).load_results()
    with pytest.raises(UsageError, match=r"digits\.jsonl has no complete row 'LeNet-5 plain' as configured in table"):
        create_table(searched_table_copy, "optim.weight_decay=0.5", search=SEARCH).load_results()


def make_line(seed: int, **changes: Any) -> bytes:
    """A line of a table's .jsonl file."""
    return json.dumps(make_record(seed, 90.0, **{"row": "LeNet-5 plain", **changes}).to_dict()).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r", line 2, is not a record of a run: "),
        (b"", r", line 2, is not a record of a run: "),
        (b"\xff", r", line 2, is not a record of a run: "),
        (make_line(1).replace(b"90.0", b"NaN", 1), r", line 2, is not a record of a run: test\.top1=nan is invalid"),
        (make_line(1).replace(b"90.0", b"250", 1), r", line 2, is not a record of a run: test\.top1=250 is invalid"),
        (make_line(1, row=None), r", line 2, names no row"),
        (make_line(1, test=None), r": only one of the lines 1 and 2 has a test result"),
        (make_line(0), r", line 2, repeats line 1: row 'LeNet-5 plain', seed 0; delete one of them"),
        (
            make_line(1, config={"trainer": {"epochs": 9}}),
            r", line 2, differs from line 1 of row 'LeNet-5 plain' in .*: trainer\.epochs=9 instead of 3",
        ),
        (
            make_line(1, data={"digest": "b"}, pretrained="c"),
            r", line 2, differs from line 1 of row 'LeNet-5 plain' .*: digest of data=b instead of a$",
        ),
    ],
)
def test_invalid_line_of_results_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    table = create_table(tmp_path)
    table.path.parent.mkdir(parents=True)
    lines = [make_line(0, data={"digest": "a"}), line, make_line(2)]
    table.path.with_suffix(".jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match=rf"digits\.jsonl{message}"):
        table.load_results()


def test_rows_of_mixed_code_are_announced_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"a": ("1", "2"), "b": ("1", "1"), "c": ("2", None)}
    lines = [make_line(i, row=row, sources=sources) for row, pair in rows.items() for i, sources in enumerate(pair)]
    file = tmp_path / "toy.jsonl"
    file.write_bytes(b"\n".join(lines))
    assert len(read_results(file)) == len(read_results(file)) == 6
    assert capsys.readouterr().err == f"{file}: rows whose runs were not all made with the same code: a, c\n"


def test_status_names_corrupt_record(tmp_path: Path) -> None:
    table = create_table(tmp_path)
    file = table.plan_runs()[0].directory.record_file
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(UsageError, match=f"{file} is not a record of a run"):
        table.status()


# Scheduling


def test_reproduce_reuses_records(searched_table_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = reporting.table.run

    def run_recorded(settings: Any) -> tuple[Record, bool]:
        record, is_new = original(settings)
        assert not is_new, "a recorded run was run again"
        return record, is_new

    monkeypatch.setattr(reporting.table, "run", run_recorded)
    before = {path: path.stat().st_mtime_ns for path in read_records(searched_table_copy)}
    create_table(searched_table_copy, search=SEARCH).reproduce()
    assert {path: path.stat().st_mtime_ns for path in read_records(searched_table_copy)} == before


def test_interrupted_table_keeps_whole_records_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = reporting.table.run, 0

    def run_interrupted(settings: Any) -> tuple[Record, bool]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(settings)

    monkeypatch.setattr(reporting.table, "run", run_interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_table(tmp_path).reproduce()
    assert len(read_records(tmp_path)) == 2
    assert not (tmp_path / "results").exists()
    assert len(create_table(tmp_path).reproduce()) == 2 and count == 7


def test_without_option_excludes_rows(tmp_path: Path) -> None:
    assert [row.name for row in create_table(tmp_path, without=["conv1 Gabor"]).rows] == ["LeNet-5 plain"]


def test_seed_of_a_table_is_rejected_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_calls(monkeypatch, "run")
    message = r"seed=3 has no effect on a table, which runs table\.seeds; use table\.seeds=\[3\]"
    with pytest.raises(UsageError, match=message):
        create_table(tmp_path, "seed=3").reproduce()


def test_table_without_test_split_lists_validation_accuracy(tmp_path: Path) -> None:
    frame = create_table(tmp_path, "trainer.test=false").reproduce()
    records = read_results(tmp_path / "results/tables/digits.jsonl")
    assert all(record.test is None for record in records)
    assert frame["top1_mean"][0] == pytest.approx(sum(record.val.top1 for record in records[:2]) / 2)
    assert "| top-1 validation % |" in (tmp_path / "results/tables/digits.md").read_text()


def test_row_on_another_split_is_rejected_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_calls(monkeypatch, "run")
    rows = load_settings("digits").rows[:2]
    rows[1]["overrides"].append("trainer.test=false")
    with pytest.raises(UsageError, match=r"row 'conv1 Gabor' has trainer\.test=false, unlike the first row"):
        create_table(tmp_path, rows=rows).reproduce()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": [{"name": "plain", "overrides": ["model=lenet"], "against": "nobody"}]},
            "row 'plain' is compared with 'nobody', which is not a row of this table",
        ),
        ({"also_against": "nobody"}, "also_against 'nobody' is not a row of this table"),
    ],
)
def test_comparison_with_unknown_row_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_table(tmp_path, **changes)


def test_invalid_row_is_rejected_before_first_run(tmp_path: Path) -> None:
    rows = [{"name": "plain", "overrides": ["model=lenet"]}, {"name": "bad", "overrides": ["arrangement.conv1=G5"]}]
    with pytest.raises(UsageError, match="'G5' has 5 kernels, but conv1 has 6"):
        create_table(tmp_path, rows=rows).reproduce()
    assert not (tmp_path / "runs").exists()


# Status


def test_init_and_status_load_no_data_and_build_no_model(
    searched_table: tuple[Path, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch, "load_run_data", "build_model")
    assert count_states(create_table(tmp_path, search=SEARCH)) == {"done": 0, "running": 0, "failed": 0, "left": 8}
    assert not any(tmp_path.iterdir())
    finished = create_table(searched_table[0], search=SEARCH)
    assert count_states(finished) == {"done": 8, "running": 0, "failed": 0, "left": 0}
    with pytest.raises(AssertionError, match="load_run_data must not be called"):
        finished.check_rows()  # needs data


def test_status_names_run_locked_by_another_worker(tmp_path: Path) -> None:
    table = create_table(tmp_path)
    planned = table.plan_runs()[1]
    with planned.directory.lock():
        assert run_in_child(lambda: check_running(tmp_path, planned.title)) == 0
    assert count_states(table) == {"done": 0, "running": 0, "failed": 0, "left": 4}


def check_running(folder: Path, title: str) -> None:
    assert create_table(folder).status()["running"] == [title]


# Workers and failures


def read_outcome(folder: Path) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """A table, its records and its trials; the time that they took is set to 0."""
    records, trials = (
        [{**line, "seconds": 0} for line in read_json_lines(folder, name)]
        for name in ("digits.jsonl", "digits_search.jsonl")
    )
    return (folder / "results/tables/digits.csv").read_text(), records, trials


def test_workers_share_table_and_killed_one_can_be_replaced(
    tmp_path: Path, searched_table: tuple[Path, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting.table, "POLL_SECONDS", 0.1)
    shared, log = tmp_path / "shared", tmp_path / "log"

    def work() -> None:
        original = reporting.table.run

        def run_and_log(settings: Any) -> tuple[Record, bool]:
            record, is_new = original(settings)
            if is_new:
                with log.open("a") as file:
                    file.write(record.id + "\n")
            return record, is_new

        reporting.table.run = run_and_log
        create_table(shared, search=SEARCH).reproduce()

    victim, other = start_process(work), start_process(work)
    while not read_records(shared):
        time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    assert wait_for(victim) == -signal.SIGKILL
    replacement = start_process(work)
    assert wait_for(other) == wait_for(replacement) == 0
    assert read_outcome(shared) == read_outcome(searched_table[0])
    ids = [path.parent.name for path in read_records(shared)]
    logged = log.read_text().split()
    assert len(ids) == 8 and len(logged) == len(set(logged)) and set(logged) <= set(ids)
    assert len(logged) >= 7  # the victim may have been killed between recording a run and logging it


def test_failed_run_is_reported_and_does_not_stop_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = reporting.table.run

    def run_or_fail(settings: Any) -> tuple[Record, bool]:
        if settings.seed == 0 and settings.model["layer"] is not None:
            raise RuntimeError("out of memory")
        return original(settings)

    monkeypatch.setattr(reporting.table, "run", run_or_fail)
    message = r"1 of 4 runs failed, 3 are done.*conv1 Gabor, seed 0: RuntimeError: out of memory"
    with pytest.raises(UsageError, match=message):
        create_table(tmp_path).reproduce()
    assert count_states(create_table(tmp_path)) == {"done": 3, "running": 0, "failed": 1, "left": 0}
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(reporting.table, "run", original)
    assert len(create_table(tmp_path).reproduce()) == 2
    assert not create_table(tmp_path).status()["failed"]


def test_failed_run_is_tried_once_even_if_the_clock_of_the_files_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[str] = []

    def fail(settings: Any) -> None:
        attempts.append(settings.directory.id)
        raise RuntimeError("out of memory")

    def write_in_the_past(path: Path, content: str) -> None:
        write_atomic(path, content)
        os.utime(path, (1, 1))

    monkeypatch.setattr(reporting.table, "run", fail)
    monkeypatch.setattr(reporting.table, "write_atomic", write_in_the_past)
    with pytest.raises(UsageError, match="4 of 4 runs failed"):
        create_table(tmp_path).reproduce()
    assert len(attempts) == len(set(attempts)) == 4


def test_search_ignores_failed_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = reporting.table.run

    def run_or_fail(settings: Any) -> tuple[Record, bool]:
        if settings.optim.lr == 0.02:
            raise UsageError("the loss is nan at step 3")
        return original(settings)

    monkeypatch.setattr(reporting.table, "run", run_or_fail)
    table = create_table(tmp_path, search={"seed": 7, "candidates": [["optim.lr=0.02"], ["optim.lr=0.01"]]})
    table.reproduce()
    assert [row.chosen for row in table.rows] == [["optim.lr=0.01"]] * 2
    trials = read_json_lines(tmp_path, "digits_search.jsonl")
    assert [trial["candidate"] for trial in trials] == [["optim.lr=0.01"]] * 2


# Records of other code


def make_outdated(path: Path, **changes: Any) -> None:
    """Edits a record as if other code had made it."""
    record = {**json.loads(path.read_text()), "sources": OTHER_SOURCES, **changes}
    path.write_text(json.dumps(record))


def test_describe_outdated_counts_records_of_other_and_unknown_code(searched_table_copy: Path) -> None:
    table = create_table(searched_table_copy, search=SEARCH)
    assert table.describe_outdated() is None
    first, second, *_ = read_records(searched_table_copy)
    make_outdated(first)
    record = json.loads(second.read_text())
    assert record.pop("sources") == digest_sources()
    second.write_text(json.dumps(record))  # as recorded before records had a digest
    assert table.describe_outdated() == "2 of 8 runs were recorded with other code"
    table.reproduce()
    assert table.describe_outdated() == "2 of 8 runs were recorded with other code"  # reused


def test_describe_outdated_names_what_changed(searched_table_copy: Path) -> None:
    first, second, *_ = read_records(searched_table_copy)
    make_outdated(first)
    make_outdated(second, data={"digest": "0123456789ab", "train": 1, "val": 1, "test": 1})
    table = create_table(searched_table_copy, search=SEARCH)
    assert table.describe_outdated() == "2 of 8 runs were recorded with other code or other data"


def test_fresh_reruns_outdated_records_only(searched_table: tuple[Path, Table], searched_table_copy: Path) -> None:
    records = read_records(searched_table_copy)
    outdated = next(path for path, record in records.items() if record["test"] is not None)
    make_outdated(outdated, test={"top1": 1.0, "loss": 9.0})
    untouched = {path: path.stat().st_mtime_ns for path in records if path != outdated}
    table = create_table(searched_table_copy, "fresh=true", search=SEARCH)
    table.reproduce()
    assert table.describe_outdated() is None
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert json.loads(outdated.read_text())["sources"] == digest_sources()
    (superseded,) = searched_table_copy.glob("runs/*/superseded-1/record.json")
    assert superseded.parents[1] == outdated.parent
    assert json.loads(superseded.read_text())["sources"] == OTHER_SOURCES
    csv = Path("results/tables/digits.csv")
    assert (searched_table_copy / csv).read_bytes() == (searched_table[0] / csv).read_bytes()


def test_fresh_chooses_among_rerun_trials(searched_table: tuple[Path, Table], searched_table_copy: Path) -> None:
    for path, record in read_records(searched_table_copy).items():
        if record["config"]["optim"]["lr"] == 0.0001:
            make_outdated(path, val={"top1": 100.0, "loss": 0.0})
    table = create_table(searched_table_copy, "fresh=true", search=SEARCH)
    table.reproduce()
    assert [row.chosen for row in table.rows] == [["optim.lr=0.02"]] * 2


def test_fresh_does_not_reuse_an_outdated_record_if_the_rerun_fails(
    searched_table_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(path for path, record in read_records(searched_table_copy).items() if record["test"] is not None)
    make_outdated(path)
    original = reporting.table.run

    def run_or_fail(settings: Any) -> tuple[Record, bool]:
        if settings.directory.path == path.parent:
            raise RuntimeError("out of memory")
        return original(settings)

    monkeypatch.setattr(reporting.table, "run", run_or_fail)
    with pytest.raises(UsageError, match="1 of 8 runs failed, 7 are done"):
        create_table(searched_table_copy, "fresh=true", search=SEARCH).reproduce()


# Tables of configs/table


@pytest.mark.parametrize(("name", "rows"), [("flowers102", [0, 4, 7]), ("food101", [0, 3])])
def test_table_of_large_images_is_reproduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: list[int]
) -> None:
    """Covers the image cache, cached pretrained weights, two steps, the test and the table, for plain and exp3."""
    getattr(trees, f"write_{name}")(tmp_path / "data")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "checkpoints" / weights)
    all_rows = load_settings(f"{name}_resnet18").rows
    assert [row.get("against") for row in all_rows] == [None] * 4 + ["plain, from scratch"] * 4
    settings = load_settings(f"{name}_resnet18", seeds=[0], search=None, rows=[all_rows[i] for i in rows])
    size = 6 if name == "flowers102" else 13
    small = [f"data.root={tmp_path}/data", f"data.cache={tmp_path}/cache", "data.size=36", "data.crop=32"]
    small += [f"trainer.batch_size={size}", "trainer.epochs=1", "trainer.compile=false", "trainer.accelerator=cpu"]
    paths = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    frame = Table(name, settings, [*small, *paths]).reproduce()
    exp3, plain = "first: G30 Lg15 Lt15 Tf30 Ts6 P96", ["plain"] * (len(rows) - 1)
    assert list(frame["arrangement"]) == [*plain, exp3]
    assert list(frame["conv_params"][0] - frame["conv_params"]) == [0] * len(plain) + [9408 - 4962]
    assert frame["top1_mean"].between(0, 100).all()
    weights_digest = hashlib.sha256((tmp_path / "checkpoints" / weights).read_bytes()).hexdigest()[:12]
    pretrained = [record.pretrained for record in read_results(tmp_path / f"results/tables/{name}.jsonl")]
    assert pretrained == [weights_digest if row < 4 else None for row in rows]
    assert len(next((tmp_path / "runs").glob("*/metrics.csv")).read_text().splitlines()) == 2
    text = (tmp_path / f"results/tables/{name}.md").read_text()
    others = "the reference of the row" if 4 in rows else "plain, pretrained"
    assert f"points against {others} |" in text and "resnet18" in text.splitlines()[0]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "table").glob("*.yaml")))
def test_every_table_composes(name: str) -> None:
    settings = load_settings(name)
    assert len(settings.rows) >= 2
    if not name.endswith("_kinds"):
        assert compose([*settings.overrides, *settings.rows[0]["overrides"]]).model.layer is None
    (data,) = [word for word in settings.overrides if word.startswith("data=")]
    data_name = compose([data]).data.name
    candidate = settings.search["candidates"][0] if settings.search else []
    for row in settings.rows[1::3]:
        run = parse_run(compose([*settings.overrides, *row["overrides"], *candidate]))
        assert run.data["name"] == data_name


@pytest.mark.parametrize("name", ["fashion_mnist_kinds", "flowers17_kinds"])
def test_slots_of_the_missing_kind_go_to_the_others_in_proportion(name: str) -> None:
    mosaic, *without = load_settings(name).rows
    full, *arrangements = (
        compose([*load_settings(name).overrides, *row["overrides"]]).arrangement for row in (mosaic, *without)
    )
    assert [row["name"] for row in without] == [f"without {kind.name}" for kind in analytic_kinds().values()]
    for symbol, arrangement in zip(analytic_kinds(), arrangements, strict=True):
        assert list(arrangement) == list(full)
        for layer, text in full.items():
            before, after = (Arrangement.parse(words).counts for words in (text, arrangement[layer]))
            total = sum(before.values())
            assert list(after) == [kind for kind in before if kind != symbol]
            assert sum(after.values()) == total
            for kind, count in after.items():
                assert abs(count - before[kind] * total / (total - before[symbol])) < 1


@pytest.mark.parametrize(
    ("name", "backbone"), [("flowers102_alexnet", "alexnet"), ("food101_resnet18", "resnet18"), ("food101", "resnet50")]
)
def test_rows_use_backbone_of_their_table(tmp_path: Path, name: str, backbone: str) -> None:
    table = Table(name, load_settings(name), [f"paths.results={tmp_path}"])
    assert len(table.rows) == 8 and backbone in table.settings.title
    for row in table.rows:
        models = [word for word in row.overrides if word.startswith("model=")]
        is_plain = row.name.startswith("plain")
        assert models[-1] == (f"model={backbone}" if is_plain else f"model=ana_{backbone}")
        assert set(models) <= {f"model={backbone}", f"model=ana_{backbone}"}
        assert not any(word.startswith("model.backbone") or "$" in word for word in row.overrides)
        model = compose(row.overrides).model
        assert model.backbone == backbone and (model.layer is None) == is_plain
