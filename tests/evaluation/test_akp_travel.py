import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from acl.inspection import analytic_layers
from evaluation.akp_travel import compute_limits, measure_akp_travel
from evaluation.finished_run import FinishedRun, load_akp_history, load_finished_run
from evaluation.measurements import AkpTravel, Line
from models.library import find_random_layers
from training.config import compose
from training.loop import run as perform_run
from training.loop import snapshot_akps
from training.settings import load_run_data, parse_run

OPTIONS = ["arrangement.conv1=G3_Ts3", "trainer.epochs=2", "trainer.batch_size=64", "+data.max_images=256"]


def load_trained(folder: Path, *overrides: str) -> FinishedRun:
    cfg = compose([*OPTIONS, *overrides, "trainer.accelerator=cpu", f"paths.runs={folder}"])
    perform_run(parse_run(cfg))
    return load_finished_run(parse_run(cfg).directory.path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return load_trained(tmp_path_factory.mktemp("runs"), "model.layer.learn=[theta,psi,sigma,s]")


def measure_moved(run: FinishedRun, folder: Path, change: float) -> dict[str, Any]:
    """Measures a run whose AKPs moved by ``change`` until epoch 1, which is its best."""
    assert run.record is not None
    moved = replace(run, path=folder, record=run.record.model_copy(update={"best_epoch": 1}))
    trained = snapshot_akps(run.model)
    history = {name: torch.stack([values - change, values, values + 9]) for name, values in trained.items()}
    save_file(history, folder / "akps.safetensors")
    return measure_akp_travel(moved, load_run_data(run.settings))


def test_travel_is_distance_from_initial_value_to_best_epoch_modulo_period(tmp_path: Path, run: FinishedRun) -> None:
    small, large = (measure_moved(run, tmp_path, change) for change in (-0.5, 0.5 + 2 * math.pi))
    degrees = pytest.approx(math.degrees(0.5), rel=1e-4)
    for travel in (small, large):
        for akp in ("G/theta", "G/psi", "Ts/theta"):
            assert travel[akp]["mean"] == degrees
    assert small["G/wavelength"]["mean"] == pytest.approx(0.5, rel=1e-4)
    assert large["G/wavelength"]["mean"] == pytest.approx(0.5 + 2 * math.pi, rel=1e-4)
    half = measure_moved(run, tmp_path, math.pi)
    assert half["G/theta"]["mean"] == pytest.approx(180, abs=1e-2) and half["Ts/theta"]["mean"] < 1e-2


@pytest.mark.parametrize("overrides", [[], ["optim.schedule=cosine"], ["optim.gain_lr_scale=50"]])
def test_no_akp_travels_farther_than_allowed_and_frozen_ones_may_not(tmp_path: Path, overrides: list[str]) -> None:
    run = load_trained(tmp_path, "model.layer.learn=[theta,amplitude]", "model.layer.amplitude=true", *overrides)
    data = load_run_data(run.settings)
    travel, limits = measure_akp_travel(run, data), compute_limits(run, len(data.train))
    for name, history in load_akp_history(run).items():
        assert run.record is not None
        distance = float((history[run.record.best_epoch] - history[0]).abs().max())
        assert distance <= limits[name] + 1e-6 and (limits[name] > 0) == name.endswith(("theta", "amplitude"))
    assert travel["G/sigma"] == {"mean": 0, "allowed": 0}
    assert 0 < travel["G/theta"]["mean"] < travel["G/theta"]["allowed"] <= 180
    assert (limits["conv1/G/amplitude"] == pytest.approx(10 * limits["conv1/G/theta"])) == (
        "optim.gain_lr_scale=50" in overrides
    )


def test_allowed_distance_is_sum_of_learning_rates_up_to_best_epoch(run: FinishedRun) -> None:
    """A cosine schedule over all steps has half its peak on average."""
    assert run.record is not None
    cosine = replace(run.settings, optim=replace(run.settings.optim, schedule="cosine"))
    last = run.record.model_copy(update={"best_epoch": 2})
    limits = compute_limits(replace(run, settings=cosine, record=last), 64 * 50)
    peak = run.settings.optim.lr * run.settings.optim.akp_lr_scale
    assert limits["conv1/G/theta"] == pytest.approx(peak * 100 / 2, rel=0.02)
    assert limits["conv1/G/wavelength"] == 0


def test_pretrained_layers_have_their_own_limit(run: FinishedRun) -> None:
    assert run.record is not None and find_random_layers(run.model) is None
    limits = compute_limits(run, 640)
    settings = replace(run.settings, optim=replace(run.settings.optim, pretrained_lr_scale=0.25))
    run.model.random_layers = ["fc1"]  # type: ignore[assignment]
    try:
        pretrained_limits = compute_limits(replace(run, settings=settings), 640)
    finally:
        run.model.random_layers = None  # type: ignore[assignment]
    assert pretrained_limits == pytest.approx({name: 0.25 * limit for name, limit in limits.items()})


def test_sgd_sets_no_limit(run: FinishedRun) -> None:
    settings = replace(run.settings, optim=replace(run.settings.optim, name="sgd"))
    travel = measure_akp_travel(replace(run, settings=settings), load_run_data(run.settings))
    assert all(values["allowed"] is None for values in travel.values())


def test_measuring_leaves_network_unchanged(run: FinishedRun) -> None:
    before = {name: values.clone() for name, values in run.model.state_dict().items()}
    measure_akp_travel(run, load_run_data(run.settings))
    assert all(torch.equal(values, before[name]) for name, values in run.model.state_dict().items())
    assert len(analytic_layers(run.model)) == 1


def test_lines_with_and_without_allowed_distance_are_summarized() -> None:
    make_line = AkpTravel.make_line_type()
    values: list[dict[str, Any]] = [
        {"G/theta": 3.0},
        {"G/theta": {"mean": 5.0, "allowed": 50.0}},
        {"G/theta": {"mean": 7.0, "allowed": None}},
    ]
    lines = [make_line(row="mosaic", id="0" * 12, seed=seed, values=value) for seed, value in enumerate(values)]
    assert [line.values for line in lines] == values and isinstance(lines[0], Line)
    distance, share = AkpTravel.summarize(lines)
    pd.testing.assert_series_equal(distance.values, pd.Series([3.0, 5.0, 7.0]), check_names=False, check_index=False)
    assert share.values.to_dict() == {1: 10.0} and share.unit == "%" and share.threshold is None
