"""One smoke test per entry point; the test files named after entry points have the others.

Most run a script in the process of the tests, which saves its imports; some run it as users do.
"""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from lightning_fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from safetensors.torch import load_file

from scripts import collect, train
from scripts.collect import CollectSettings
from tests.scripts.conftest import ROOT, RunScript
from tests.training.configurations import compose_photo_run
from tests.training.processes import start_process, wait_for
from tests.training.trees import write_image, write_imagefolder, write_mnist
from training.config import compose
from training.errors import UsageError
from training.loop import run
from training.settings import parse_run

OTHER_ROWS = json.dumps(
    ["all Gabor", "mosaic, no plain kernel", "mosaic, with amplitude", "half plain", "all Gabor, frozen at random"]
)
"""All rows of the table ``digits`` but LeNet-5 plain and conv1 Gabor."""


def test_train_records_configuration_and_test_accuracy(tmp_path: Path, call_script: RunScript) -> None:
    arguments = ["model=ana_lenet", "arrangement.conv1=G6", "arrangement.conv2=G50%_P50%", "seed=3", "trainer.epochs=1"]
    done = call_script("train.py", *arguments, f"paths.runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["config"]["arrangement"] == {"conv1": "G6", "conv2": "G50%_P50%"}
    assert record["config"]["seed"] == 3 and f"test {record['test']['top1']:.2f}%" in done.stdout


def test_train_reports_whether_result_is_new_reused_or_outdated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["model=lenet", "trainer.epochs=1", "trainer.batch_size=600", f"paths.runs={tmp_path}"]
    cfg = compose(overrides)
    train.main(cfg)
    (path,) = tmp_path.glob("*/record.json")
    assert capsys.readouterr().out.startswith(f"{path.parent}: test ")
    train.main(cfg)
    assert capsys.readouterr().out.startswith(f"{path.parent} (recorded before): test ")
    path.write_text(json.dumps({**json.loads(path.read_text()), "sources": "0" * 12}))
    train.main(cfg)
    reused = f"{path.parent} (recorded before, with other code; fresh=true reruns it): test "
    assert capsys.readouterr().out.startswith(reused)
    train.main(compose([*overrides, "fresh=true"]))
    assert capsys.readouterr().out.startswith(f"{path.parent}: test ")
    assert (path.parent / "superseded-1/record.json").exists()


def test_train_reports_result_of_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_imagefolder(tmp_path / "photos", train=6, val=2, test=2)
    cfg = compose_photo_run(tmp_path, root)
    train.main(cfg)
    (path,) = (tmp_path / "runs").iterdir()
    assert capsys.readouterr().out.startswith(f"{path}: test ")
    write_image(root / "train/class_3/0.png", 3, 0)
    for split in ("val", "test"):
        shutil.copytree(root / "train/class_3", root / split / "class_3")
    train.main(cfg)
    assert capsys.readouterr().out.startswith(f"{path} (recorded before, with other data; fresh=true reruns it): test ")
    cfg.fresh = True
    train.main(cfg)
    assert capsys.readouterr().out.startswith(f"{path}: test ")


def test_collect_lists_every_run_of_sweep(
    tmp_path: Path, call_script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "hydra/launcher=cores", "arrangement.conv1=G6,G3_P3", "seed=0,1", "trainer.epochs=1"]
    done = call_script("train.py", *sweep, "trainer.batch_size=600", 'paths.runs="~"')
    get_reusable_executor().shutdown()  # its processes would wait for further runs
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sweeps").is_dir() and not (tmp_path / "~").exists()
    records = [json.loads(path.read_text())["config"] for path in tmp_path.glob("*/record.json")]
    assert sorted((r["arrangement"]["conv1"], r["seed"]) for r in records) == [
        ("G3_P3", 0),
        ("G3_P3", 1),
        ("G6", 0),
        ("G6", 1),
    ]
    done = call_script("collect.py", f"runs={tmp_path}", f"file={tmp_path}/all.csv")
    assert done.stdout.strip() == f"{tmp_path}/all.csv: 4 runs", done.stderr
    frame = pd.read_csv(tmp_path / "all.csv")
    assert sorted(zip(frame["arrangement.conv1"], frame["seed"], strict=True))[0] == ("G3_P3", 0)
    assert {"test.top1", "parameters.conv", "optim.lr", "commit", "machine.device", "versions.torch"} <= set(frame)
    equal = [name for name in frame if frame[name].nunique(dropna=False) == 1]
    assert {"arrangement.conv1", "seed"}.isdisjoint(equal) and list(frame)[-len(equal) :] == equal


def test_collect_skips_corrupt_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cut", "folder", "whole"):
        (tmp_path / name).mkdir()
    line = (ROOT / "results/tables/digits.jsonl").read_text().splitlines()[0]
    (tmp_path / "cut/record.json").write_text(line[:100])
    (tmp_path / "folder/record.json").mkdir()
    settings = CollectSettings(runs=str(tmp_path), file=tmp_path / "all.csv")
    with pytest.raises(UsageError, match="no record could be read"):
        collect.main(settings)
    (tmp_path / "whole/record.json").write_text(line)
    capsys.readouterr()
    collect.main(settings)
    done = capsys.readouterr()
    assert done.out == f"{tmp_path}/all.csv: 1 runs\n" and len(pd.read_csv(tmp_path / "all.csv")) == 1
    assert [line.split(" is ")[0] for line in done.err.splitlines()] == [
        f"skipped: {tmp_path}/cut/record.json",
        f"skipped: cannot read {tmp_path}/folder/record.json: Is a directory",
    ]


def test_mosaic_draws_layer(tmp_path: Path, run_script: RunScript) -> None:
    file = tmp_path / "mosaic.png"
    done = run_script("mosaic.py", "mosaic=G50%_P50%", "out_channels=8", f"file={file}")
    assert (done.returncode, done.stdout.strip()) == (0, str(file)), done.stderr
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
def test_wandb_workspace_groups_runs_by_table_and_row() -> None:
    from scripts.wandb_workspace import WorkspaceSettings, create_workspace  # its import warns

    workspace = create_workspace(WorkspaceSettings(entity="me", project="anann", name="Rows"))
    assert (workspace.entity, workspace.project, workspace.name) == ("me", "anann", "Rows")
    assert [section.name for section in workspace.sections] == ["Results", "Training"]
    assert [key.name for key in workspace.runset_settings.groupby] == ["Group", "row"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train.py", ["arrangement.conv1=G5"], "error: arrangement 'G5' has 5 kernels, but conv1 has 6 (1 x 6)"),
        ("train.py", ["model=vgg"], "error: unknown model 'vgg'; known: alexnet, "),
        ("train.py", ["hydra/launcher=moon"], "error: unknown hydra/launcher 'moon'; known: "),
        (
            "train.py",
            ["arrangement=gabor", "trainer=ddp", "trainer.devices=4096"],
            "error: trainer.devices=4096 exceeds the",
        ),
        ("reproduce_table.py", ["trainer=ddp"], "error: a run of a table uses one device; start more workers"),
        ("reproduce_table.py", ["--verify", "--render"], "error: --render and --verify cannot be combined"),
        ("reproduce_table.py", ["--verify", "debug=smoke"], "error: debug=smoke records nothing, so --verify has"),
        ("wandb_workspace.py", [], "error: entity is missing"),
        ("approximate.py", [], "error: source is missing"),
        ("explain.py", [], "error: run is missing"),
        ("wandb_workspace.py", ["entity=me"], "error: a workspace needs a W&B account"),
        ("collect.py", ["runs=[]"], "error: no finished run in"),
        ("reproduce_table.py", ["table=nope"], "error: unknown table 'nope'; known: cifar10, "),
        ("reproduce_table.py", ["--render"], "error: there is no "),
        ("reproduce_table.py", ["--verify"], "error: there is no "),
        ("reproduce_table.py", ["++table.without=[nix]"], "error: table.without has 'nix', which is not a row"),
        (
            "mosaic.py",
            ["mosaic=G100%", "in_channels=64", "out_channels=64", "kernel_size=4096"],
            "error: a layer of 68,719,476,736 weights is too large for a figure; at most 10,000,000",
        ),
        ("mosaic.py", ["mosaic=G5"], "error: arrangement 'G5' has 5 kernels, but the layer has 192 (3 x 64)"),
    ],
)
def test_invalid_input_gives_one_line_and_exit_status_2(
    tmp_path: Path,
    call_script: RunScript,
    name: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if name in ("train.py", "reproduce_table.py"):
        paths = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    else:
        paths = [f"file={tmp_path}/file"] if name in ("collect.py", "mosaic.py") else []
    done = call_script(name, *arguments, *paths)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_reproduce_table_writes_table_and_reports_outdated_runs(tmp_path: Path, call_script: RunScript) -> None:
    arguments = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    arguments += ["table.seeds=[0]", "trainer.epochs=1", "trainer.batch_size=600", f"+table.without={OTHER_ROWS}"]
    done = call_script("reproduce_table.py", *arguments)
    assert done.returncode == 0, done.stderr
    records = list((tmp_path / "runs").glob("*/record.json"))
    assert len(records) == 2
    assert (tmp_path / "results/tables/digits.md").read_text() in done.stdout
    assert "recorded with other code" not in done.stdout

    record = json.loads(records[0].read_text())
    records[0].write_text(json.dumps({**record, "sources": "0" * 12}))
    done = call_script("reproduce_table.py", "--status", *arguments)
    assert done.stdout.splitlines() == [
        "digits: 2 done, 0 running, 0 failed, 0 left",
        "1 of 2 runs were recorded with other code; fresh=true reruns them",
    ]
    done = call_script("reproduce_table.py", *arguments)
    assert done.stdout.endswith("1 of 2 runs were recorded with other code; fresh=true reruns them\n"), done.stderr
    done = call_script("reproduce_table.py", *arguments, "fresh=true")
    assert done.returncode == 0 and "recorded with other code" not in done.stdout, done.stderr
    assert json.loads(records[0].read_text())["sources"] == record["sources"]
    assert (records[0].parent / "superseded-1/record.json").exists()


def test_reproduce_table_renders_committed_records_without_runs(
    tmp_path: Path, run_script: RunScript, call_script: RunScript
) -> None:
    committed, folder = ROOT / "results/tables", tmp_path / "results/tables"
    folder.mkdir(parents=True)
    shutil.copy(committed / "digits.jsonl", folder)
    for name in ("digits.md", "digits.png"):
        (folder / name).write_text("old")
    done = run_script(
        "reproduce_table.py", "--render", f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(folder / "digits.md")), done.stderr
    for name in ("digits.csv", "digits.jsonl"):
        assert (folder / name).read_bytes() == (committed / name).read_bytes()
    assert "| conv1 Gabor | conv1: G6 | 2,446 | 1.05 |" in (folder / "digits.md").read_text()
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    done = call_script(
        "reproduce_table.py",
        "--render",
        "+table.without=[half plain]",
        f"paths.runs={tmp_path}/runs",
        f"paths.results={tmp_path}/results",
    )
    assert done.returncode == 2 and "has 3 runs of another recipe, such as of row 'half plain'" in done.stderr
    assert (folder / "digits.jsonl").read_bytes() == (committed / "digits.jsonl").read_bytes()
    assert not (tmp_path / "runs").exists()


def run_rank(cfg: DictConfig, rank: int, port: int) -> None:
    """Performs the part of one process in a run, as if ``torchrun`` had started it."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank_zero_only.rank = rank
    run(parse_run(cfg))


def test_two_processes_give_result_of_one(tmp_path: Path, run_script: RunScript, call_script: RunScript) -> None:
    """Weights agree to 1e-9 in float64, with uneven batches and after both processes were killed; only one prints."""
    arguments = ["arrangement=mosaic", "trainer.precision=64-true", "trainer.epochs=2", "trainer.batch_size=11"]
    arguments += ["data.shift=1", "data.train_share=0.25", "trainer.accelerator=cpu"]
    results = []
    two_processes = ["trainer=ddp", "trainer.devices=2"]
    for folder, options, start in (("one", [], call_script), ("two", two_processes, run_script)):
        if options:
            cfg = compose([*options, *arguments, f"paths.runs={tmp_path / folder}", "trainer.checkpoint_minutes=1e-9"])
            port = find_free_network_port()
            killed = [start_process(partial(run_rank, cfg, rank, port)) for rank in (0, 1)]
            while not list((tmp_path / folder).glob("*/checkpoint.pt")):  # written within the first epoch
                assert not any(os.waitpid(child, os.WNOHANG)[0] for child in killed)
                time.sleep(0.01)
            for child in killed:
                os.kill(child, signal.SIGKILL)
            assert wait_for(killed[0]) == -signal.SIGKILL
            wait_for(killed[1])  # it fails by itself if it notices first that the other one is gone
        done = start("train.py", *options, *arguments, f"paths.runs={tmp_path / folder}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test ") == 1
        (path,) = (tmp_path / folder).glob("*/record.json")
        metrics = pd.read_csv(path.with_name("metrics.csv"))
        results.append((load_file(path.with_name("model.safetensors")), json.loads(path.read_text()), metrics))
    (weights, record, metrics), (other_weights, other_record, other_metrics) = results
    assert record["id"] == other_record["id"]
    assert all(torch.allclose(weights[name], other_weights[name], rtol=0, atol=1e-9) for name in weights)
    assert record["test"]["top1"] == other_record["test"]["top1"]
    assert record["test"]["loss"] == pytest.approx(other_record["test"]["loss"], abs=1e-6)  # summed in float32
    pd.testing.assert_frame_equal(metrics, other_metrics, rtol=1e-5)
    assert list(metrics["train_top1"]) == list(other_metrics["train_top1"])


def test_measure_reads_data_that_moved(tmp_path: Path, call_script: RunScript) -> None:
    write_mnist(tmp_path / "data", train=5040, test=20)
    rows = '[{name: plain, overrides: ["model=lenet"]}]'
    table = ["table=mnist", f"table.rows={rows}", "table.seeds=[0]", "table.search=null"]
    table += ["trainer.epochs=1", "trainer.batch_size=20", f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}"]
    assert call_script("reproduce_table.py", *table, f"data.root={tmp_path}/data").returncode == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    done = call_script("measure.py", *table, "measurement=corruptions", f"data.root={tmp_path}/moved")
    assert done.returncode == 0, done.stderr


def test_measure_adds_one_line_per_run_and_skips_measured_runs(tmp_path: Path, call_script: RunScript) -> None:
    table = ["table=digits", f"+table.without={OTHER_ROWS}", "table.seeds=[0]", "trainer.epochs=1"]
    table += [
        "trainer.batch_size=8",
        "+data.max_images=16",
        f"paths.runs={tmp_path}/runs",
        f"paths.results={tmp_path}/results",
    ]
    done = call_script("measure.py", *table, "measurement=shapley")
    assert done.returncode == 2 and "has no finished run" in done.stderr
    assert call_script("reproduce_table.py", *table).returncode == 0
    for measurement in ("akp_travel", "corruptions"):
        file = tmp_path / f"results/evidence/digits_{measurement}.jsonl"
        one_row = call_script("measure.py", *table, f"measurement={measurement}", "only=[conv1 Gabor]")
        assert one_row.returncode == 0, one_row.stderr
        first_line = file.read_text()
        assert call_script("measure.py", *table, f"measurement={measurement}").returncode == 0
        lines = file.read_text().splitlines(keepends=True)
        assert lines[0] == first_line
        assert [json.loads(line)["row"] for line in lines] == ["conv1 Gabor", "LeNet-5 plain"]
    values = {line["row"]: line["values"] for line in map(json.loads, lines)}
    for digest in ({"weights": "0" * 12}, {}):  # of weights before the run was trained again; none, of earlier versions
        stale = {
            "row": "LeNet-5 plain",
            "id": json.loads(lines[1])["id"],
            "seed": 0,
            "values": {"none": 75.0},
            **digest,
        }
        file.write_text(json.dumps(stale) + "\n" + lines[0])
        assert call_script("measure.py", *table, f"measurement={measurement}").returncode == 0
        replaced, kept = file.read_text().splitlines(keepends=True)
        assert json.loads(replaced)["values"] == values["LeNet-5 plain"] and kept == lines[0]
    recorded = file.read_text()
    assert call_script("reproduce_table.py", *table, "optim.lr=0.5", f"paths.results={tmp_path}/other").returncode == 0
    done = call_script("measure.py", *table, "optim.lr=0.5", f"measurement={measurement}")
    assert done.returncode == 2 and "has row 'LeNet-5 plain', seed 0, of another recipe" in done.stderr
    assert file.read_text() == recorded
    records = map(json.loads, (tmp_path / "results/tables/digits.jsonl").read_text().splitlines())
    for record in records:
        assert values[record["row"]]["none"] == record["test"]["top1"]


def test_claims_writes_page_and_figures(tmp_path: Path, call_script: RunScript) -> None:
    for name in ("tables", "evidence", "approximation"):
        shutil.copytree(ROOT / "results" / name, tmp_path / name)
    (tmp_path / "tables/cifar10.jsonl").touch()  # so that this table is no longer untested
    done = call_script("claims.py", f"results={tmp_path}")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "claims").iterdir()}
    assert names == {path.name for path in (ROOT / "results/claims").iterdir()} != set()
    for page in ("CLAIMS.md", *(f"claims/{name}" for name in names if name.endswith(".md"))):
        committed = (ROOT / "results" / page).read_text("utf-8")
        expected = committed.replace(
            "- official CIFAR-10, which was not at hand: `make reproduce-table TABLE=cifar10`\n", ""
        )
        assert (tmp_path / page).read_text("utf-8") == expected


def test_verify_exits_with_status_of_comparison(tmp_path: Path, call_script: RunScript) -> None:
    table = ["table=digits", "table.seeds=[0]", "trainer.epochs=1", "trainer.batch_size=600"]
    table += [
        f"paths.runs={tmp_path}/runs",
        f"paths.results={tmp_path}",
        """table.rows=[{name: plain, overrides: ["model=lenet"]}]""",
    ]
    assert call_script("reproduce_table.py", *table).returncode == 0
    assert call_script("reproduce_table.py", *table, "--verify").returncode == 0
    file = tmp_path / "tables/digits.jsonl"
    record = json.loads(file.read_text())
    record["test"]["top1"] += 50
    file.write_text(json.dumps(record) + "\n")
    done = call_script("reproduce_table.py", *table, "--verify")
    assert done.returncode == 1 and "plain: differs, test -50.00 points" in done.stdout


def test_claims_refuses_folder_without_records(tmp_path: Path, call_script: RunScript) -> None:
    done = call_script("claims.py", f"results={tmp_path}")
    assert done.returncode == 2 and "has no records" in done.stderr and not list(tmp_path.iterdir())
