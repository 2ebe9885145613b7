"""train.py killed at 20 random moments of one run, against a run never cut. Minutes: pytest -m slow"""

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

KILLS = 20


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_the_run_never_cut(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    """At any time after the start, as data load, in the loop, and just as a checkpoint is being written."""

    def train(folder: str) -> list[str]:
        run = ["arrangement=half_plain", "data.shift=1", "trainer.epochs=60", "trainer.batch_size=8"]
        return command("train.py", *run, "trainer.checkpoint_minutes=1e-9", f"paths.runs={tmp_path / folder}")

    subprocess.run(train("uncut"), check=True, capture_output=True)
    (uncut,) = [path.parent for path in (tmp_path / "uncut").glob("*/record.json")]
    folder = tmp_path / "cut" / uncut.name
    chance, where = random.Random(0), []
    for number in range(KILLS):
        process = subprocess.Popen(train("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        if number % 2:  # somewhen: imports, data, the loop
            time.sleep(chance.uniform(2, 9))
        else:  # from some moment of the loop on, at the next sight of a checkpoint half written
            while not (folder / "worker").exists() or (folder / "worker").stat().st_mtime < time.time() - 1:
                if time.monotonic() - started > 12:
                    break
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))
            until = time.monotonic() + 5
            while not list(folder.glob(".unfinished-*checkpoint*")) and time.monotonic() < until:
                pass
        assert process.poll() is None, f"it ended before kill {number + 1}; make the run longer"
        process.kill()
        process.wait()
        where.append("writing" if list(folder.glob(".unfinished-*")) else "else")
    done = subprocess.run(train("cut"), check=True, capture_output=True, text=True)
    print(where, done.stdout)
    assert "writing" in where
    assert (folder / "model.safetensors").read_bytes() == (uncut / "model.safetensors").read_bytes()
    assert (folder / "metrics.csv").read_bytes() == (uncut / "metrics.csv").read_bytes()
    records = [json.loads((path / "record.json").read_text()) for path in (folder, uncut)]
    assert [{**record, "seconds": 0} for record in records] == [{**records[0], "seconds": 0}] * 2
