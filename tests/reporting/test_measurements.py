import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acl.explain import attribute
from reporting.measurements import (
    ATTACK_SIZES,
    MEASUREMENTS,
    iterate_pairs,
    measure_akp_travel,
    measure_attacks,
    measure_corruptions,
    measure_replaced_akps,
    measure_shapley,
)
from reporting.transforms import ROTATIONS, SCALES, measure_transforms
from training.config import compose
from training.corruptions import CORRUPTIONS
from training.data import Data
from training.datasets import Split
from training.errors import UsageError
from training.finished_run import FinishedRun, evaluate_run, load_akp_history, load_finished_run
from training.loop import run as perform_run
from training.loop import snapshot_akps
from training.runs import load_run_data, open_run_directory


def load_trained(folder: Path, *overrides: str) -> FinishedRun:
    cfg = compose([*overrides, "trainer.accelerator=cpu", f"paths.runs={folder}"])
    perform_run(cfg)
    return load_finished_run(open_run_directory(cfg).path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("runs")
    return load_trained(folder, "model=ana_four_layer", "arrangement.all=G50%_P50%", "trainer.epochs=2")


@pytest.fixture(scope="module")
def double_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    options = ["model=ana_four_layer", "arrangement.all=G50%_P50%", "trainer.epochs=1", "trainer.batch_size=16"]
    options += ["trainer.precision=64-true", "+data.max_images=16"]
    return load_trained(tmp_path_factory.mktemp("runs"), *options)


def test_transforms_compare_three_ways(run: FinishedRun) -> None:
    values = measure_transforms(run, load_run_data(run.settings))
    assert [*values["rotation"], *values["scale"]] == [f"{value:g}" for value in (*ROTATIONS, *SCALES)]
    right_angle = values["rotation"]["90"]
    assert right_angle["closed form"]["top1"] == right_angle["resampled"]["top1"]
    assert right_angle["closed form"]["error"] < 1e-3 < right_angle["unchanged"]["error"]
    for degrees, ways in values["rotation"].items():
        assert ways["closed form"]["error"] < ways["unchanged"]["error"]
        assert (degrees == "90") == (
            ways["closed form"]["error"] == pytest.approx(ways["resampled"]["error"], abs=1e-3)
        )
    for factor, ways in values["scale"].items():
        assert ways["closed form"]["error"] != ways["resampled"]["error"]
        assert float(factor) < 1 or ways["closed form"]["error"] < ways["unchanged"]["error"]


def test_akp_travel_is_mean_distance_from_initial_value_to_best_epoch(tmp_path: Path, run: FinishedRun) -> None:
    history = {name: torch.zeros(3, len(values)) for name, values in snapshot_akps(run.model).items()}
    history["conv1/G/theta"][1], history["conv2/G/wavelength"][:2] = 0.5, torch.tensor([[3.0], [2.0]])
    save_file(
        {name: values.index_fill(0, torch.tensor([2]), 9.0) for name, values in history.items()},
        tmp_path / "akps.safetensors",
    )
    made_up = replace(run, path=tmp_path, record={"best_epoch": 1})
    num_kernels = {layer: len(history[f"{layer}/G/theta"][0]) for layer in ("conv1", "conv2", "conv3", "conv4")}
    shares = {layer: number / sum(num_kernels.values()) for layer, number in num_kernels.items()}
    expected = dict.fromkeys((f"G/{name}" for name in ("psi", "sigma", "theta", "wavelength")), 0.0)
    expected |= {"G/theta": math.degrees(0.5) * shares["conv1"], "G/wavelength": shares["conv2"]}
    assert measure_akp_travel(made_up, load_run_data(run.settings)) == pytest.approx(expected)


def test_replaced_akps_change_nothing_but_akps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_trained(tmp_path, "arrangement=half_plain", "trainer.epochs=2")
    networks: list[nn.Module] = []

    def evaluate_and_keep(run: FinishedRun, data: Data, split: str) -> dict[str, float]:
        networks.append(run.model)
        return evaluate_run(run, data, split)

    monkeypatch.setattr("reporting.measurements.evaluate_run", evaluate_and_keep)
    accuracies = measure_replaced_akps(run, load_run_data(run.settings))
    assert run.record is not None and accuracies["trained"] == run.record["val"]["top1"]
    assert list(accuracies) == ["trained", "initial", "redrawn"]

    history = load_akp_history(run)
    trained, initial, redrawn = (snapshot_akps(network) for network in networks)
    assert history
    for name, values in history.items():
        torch.testing.assert_close(initial[name], values[0])
        assert not torch.equal(trained[name], values[0])
        for other in (values[0], trained[name]):
            assert not torch.isclose(redrawn[name], other).any()
    for network in networks[1:]:
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, run.model.get_parameter(name)) == (".raw." not in name)


def test_replaced_akps_of_plain_network_are_empty(tmp_path: Path) -> None:
    run = load_trained(tmp_path, "model=lenet", "arrangement=plain", "trainer.epochs=1")
    assert measure_replaced_akps(run, load_run_data(run.settings)) == {}


def test_shapley_values_are_of_validation_images(run: FinishedRun) -> None:
    data = load_run_data(run.settings)
    attribution = attribute(run.model, partial(iterate_pairs, data, data.val), progress=False)
    assert attribution.images == len(data.val)
    assert measure_shapley(run, data) == {symbol: attribution.shapley()[symbol] for symbol in ("G", "P")}


def test_corruptions_are_measured_at_each_severity(run: FinishedRun) -> None:
    data = load_run_data(run.settings)
    values = measure_corruptions(run, data)
    assert run.record is not None and values["none"] == run.record["test"]["top1"]
    assert list(values) == ["none", *CORRUPTIONS]
    for severity in (1, 5):
        images = CORRUPTIONS["noise"](data.test.images, severity)
        corrupted = replace(data, test=Split(images, data.test.labels))
        assert values["noise"][severity - 1] == evaluate_run(run, corrupted, "test")["top1"]


def test_transforms_reject_network_of_one_image_size(tmp_path: Path) -> None:
    run = load_trained(tmp_path, "arrangement=gabor", "trainer.epochs=1")
    with pytest.raises(UsageError, match="the network takes images of one size only"):
        measure_transforms(run, load_run_data(run.settings))


def test_transforms_of_plain_network_are_empty(tmp_path: Path) -> None:
    run = load_trained(tmp_path, "model=lenet", "arrangement=plain", "trainer.epochs=1")
    assert measure_transforms(run, load_run_data(run.settings)) == {}


def test_larger_attack_is_at_least_as_harmful(tmp_path: Path) -> None:
    run = load_trained(tmp_path, "arrangement=gabor", "trainer.epochs=2")
    assert run.record is not None
    accuracies = measure_attacks(run, load_run_data(run.settings))
    assert list(accuracies) == ["0", *(f"{size:g}" for size in ATTACK_SIZES)]
    assert accuracies["0"] == pytest.approx(run.record["test"]["top1"])
    assert sorted(accuracies.values(), reverse=True) == list(accuracies.values()) and accuracies["4"] < accuracies["0"]


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_run_in_double_precision_is_measured(double_run: FinishedRun, measure: Callable[..., dict[str, Any]]) -> None:
    assert measure(double_run, load_run_data(double_run.settings))
