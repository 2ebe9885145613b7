from pathlib import Path

import pytest

from reporting.measurements import ATTACK_SIZES, measure_attacks
from reporting.transforms import ROTATIONS, SCALES, measure_transforms
from training.config import compose
from training.errors import UsageError
from training.finished_run import FinishedRun, load_finished_run
from training.loop import run as perform_run
from training.runs import load_run_data, open_run_directory


def load_trained(folder: Path, *overrides: str) -> FinishedRun:
    cfg = compose([*overrides, "trainer.accelerator=cpu", f"paths.runs={folder}"])
    perform_run(cfg)
    return load_finished_run(open_run_directory(cfg).path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("runs")
    return load_trained(folder, "model=ana_four_layer", "arrangement.all=G50%_P50%", "trainer.epochs=2")


def test_transforms_compare_three_ways(run: FinishedRun) -> None:
    values = measure_transforms(run, load_run_data(run.settings))
    assert [*values["rotation"], *values["scale"]] == [f"{value:g}" for value in (*ROTATIONS, *SCALES)]
    right_angle = values["rotation"]["90"]
    assert right_angle["closed form"]["top1"] == right_angle["resampled"]["top1"]
    assert right_angle["closed form"]["error"] < 1e-3 < right_angle["unchanged"]["error"]
    for ways in values["rotation"].values():
        assert ways["closed form"]["error"] < ways["unchanged"]["error"]


def test_transforms_reject_network_of_one_image_size(tmp_path: Path) -> None:
    run = load_trained(tmp_path, "arrangement=gabor", "trainer.epochs=1")
    with pytest.raises(UsageError, match="the network takes images of one size only"):
        measure_transforms(run, load_run_data(run.settings))


def test_transforms_of_plain_network_are_empty(tmp_path: Path) -> None:
    run = load_trained(tmp_path, "model=lenet", "arrangement=plain", "trainer.epochs=1")
    assert measure_transforms(run, load_run_data(run.settings)) == {}


def test_larger_attack_is_at_least_as_harmful(run: FinishedRun) -> None:
    assert run.record is not None
    accuracies = measure_attacks(run, load_run_data(run.settings))
    assert list(accuracies) == ["0", *(f"{size:g}" for size in ATTACK_SIZES)]
    assert accuracies["0"] == pytest.approx(run.record["test"]["top1"])
    assert sorted(accuracies.values(), reverse=True) == list(accuracies.values()) and accuracies["4"] < accuracies["0"]
