"""train.py, killed at 20 random moments, gives the result of an uninterrupted run. Takes minutes: pytest -m slow"""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.scripts.conftest import Command

KILLS = 20


@pytest.mark.slow
def test_run_killed_twenty_times_equals_uninterrupted_run(tmp_path: Path, script_command: Command) -> None:
    """Kills at any time after the start: during imports, data loading, training, and the writing of a checkpoint."""

    def train(folder: str) -> list[str]:
        run = ["arrangement=half_plain", "data.shift=1", "trainer.epochs=60", "trainer.batch_size=8"]
        return script_command("train.py", *run, "trainer.checkpoint_minutes=1e-9", f"paths.runs={tmp_path / folder}")

    subprocess.run(train("uninterrupted"), check=True, capture_output=True)
    (uninterrupted,) = [path.parent for path in (tmp_path / "uninterrupted").glob("*/record.json")]
    folder = tmp_path / "killed" / uninterrupted.name
    generator, moments = random.Random(0), []
    for number in range(KILLS):
        process = subprocess.Popen(train("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        if number % 2:  # at any time: imports, data, the loop
            time.sleep(generator.uniform(2, 9))
        else:  # in the loop, when a partly written checkpoint appears
            while not (folder / "worker").exists() or (folder / "worker").stat().st_mtime < time.time() - 1:
                if time.monotonic() - started > 12:
                    break
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 1))
            deadline = time.monotonic() + 5
            while not list(folder.glob(".unfinished-*checkpoint*")) and time.monotonic() < deadline:
                pass
        assert process.poll() is None, f"the run ended before kill {number + 1}; make it longer"
        process.kill()
        process.wait()
        moments.append("writing" if list(folder.glob(".unfinished-*")) else "other")
    done = subprocess.run(train("killed"), check=True, capture_output=True, text=True)
    print(moments, done.stdout)
    assert "writing" in moments
    assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    assert (folder / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()
    record, expected = (json.loads((path / "record.json").read_text()) for path in (folder, uninterrupted))
    assert {**record, "seconds": 0} == {**expected, "seconds": 0}
