"""Each entry point once, as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments], capture_output=True, text=True, check=False
    )


def test_train(tmp_path: Path) -> None:
    arguments = ["model=ana_lenet", "arrangement.conv1=G6", "arrangement.conv2=G50%_P50%", "seed=3", "trainer.epochs=1"]
    done = script("train.py", *arguments, f"paths.runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["config"]["arrangement"] == {"conv1": "G6", "conv2": "G50%_P50%"}
    assert record["config"]["seed"] == 3 and f"test {record['test']['top1']:.2f}%" in done.stdout


def test_train_sweeps(tmp_path: Path) -> None:
    sweep = ["-m", "arrangement.conv1=G6,G3_P3", "seed=0,1", "trainer.epochs=1", f"paths.runs={tmp_path}"]
    done = script("train.py", *sweep)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text())["config"] for path in tmp_path.glob("*/record.json")]
    assert sorted((r["arrangement"]["conv1"], r["seed"]) for r in records) == [
        ("G3_P3", 0),
        ("G3_P3", 1),
        ("G6", 0),
        ("G6", 1),
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train.py", ["arrangement.conv1=G5"], "error: arrangement 'G5' fills 5 of 6 kernels of conv1 (1 x 6)"),
        ("train.py", ["model=vgg"], "error: unknown model 'vgg'; known: ana_lenet, lenet"),
        ("reproduce_table.py", ["table=nope"], "error: unknown table 'nope'; known: digits, fashion_mnist, mnist"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path: Path, name: str, arguments: list[str], message: str) -> None:
    runs = tmp_path / "runs"
    done = script(name, *arguments, f"paths.runs={runs}", f"paths.results={tmp_path}/results")
    assert (done.returncode, done.stderr.strip(), done.stdout) == (2, message, "")
    assert not any(tmp_path.iterdir())


def test_reproduce_table(tmp_path: Path) -> None:
    paths = [f"paths.runs={tmp_path}/runs", f"paths.results={tmp_path}/results"]
    done = script("reproduce_table.py", *paths, "trainer.epochs=1", "trainer.batch_size=600")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 21
    assert (tmp_path / "results/tables/digits.md").read_text() in done.stdout
