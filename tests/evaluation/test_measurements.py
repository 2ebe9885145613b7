from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

import acl
from acl import AnalyticConv2d
from acl.explain import attribute
from evaluation.attacks import ATTACK_SIZES
from evaluation.corruptions import CORRUPTIONS
from evaluation.finished_run import FinishedRun, evaluate_run, load_akp_history, load_finished_run
from evaluation.measurements import (
    MEASUREMENTS,
    AkpTravel,
    Attacks,
    Corruptions,
    Line,
    Measurement,
    ReplacedAkps,
    Shapley,
    Transforms,
    is_current,
    read_measurements,
    write_measurement,
)
from evaluation.removal import iterate_pairs
from evaluation.transforms import ROTATIONS, SCALES, compare_outputs, resize_by
from training.config import compose
from training.data import Data
from training.errors import UsageError
from training.loop import run as perform_run
from training.loop import snapshot_akps
from training.provenance import digest_file
from training.settings import load_run_data, parse_run
from training.splits import Split

FILES = {"weights": "model", "akps": "akps"}


def load_trained(folder: Path, *overrides: str) -> FinishedRun:
    cfg = compose([*overrides, "trainer.accelerator=cpu", f"paths.runs={folder}"])
    perform_run(parse_run(cfg))
    return load_finished_run(parse_run(cfg).directory.path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("runs")
    return load_trained(folder, "model=ana_four_layer", "arrangement.all=G50%_P50%", "trainer.epochs=2")


@pytest.fixture(scope="module")
def gabor_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return load_trained(tmp_path_factory.mktemp("runs"), "arrangement=gabor", "trainer.epochs=2")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("runs")
    return load_trained(folder, "model=lenet", "arrangement=plain", "trainer.epochs=1", "trainer.batch_size=600")


@pytest.fixture(scope="module")
def double_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    options = ["model=ana_four_layer", "arrangement.all=G50%_P50%", "trainer.epochs=1", "trainer.batch_size=2"]
    options += ["trainer.precision=64-true", "+data.max_images=4"]
    return load_trained(tmp_path_factory.mktemp("runs"), *options)


def test_transforms_compare_four_ways(run: FinishedRun) -> None:
    data = load_run_data(run.settings)
    values = Transforms.measure(run, replace(data, test=data.test[:20]))
    assert [*values["rotation"], *values["scale"]] == [f"{value:g}" for value in (*ROTATIONS, *SCALES)]
    right_angle = values["rotation"]["90"]
    assert right_angle["closed form"]["top1"] == right_angle["resampled"]["top1"]
    assert right_angle["closed form"]["error"] < 1e-3 < right_angle["unchanged"]["error"]
    for degrees, ways in values["rotation"].items():
        assert ways["closed form"]["error"] < ways["unchanged"]["error"]
        for way in ("resampled", "splines"):
            assert (degrees == "90") == (ways["closed form"]["error"] == pytest.approx(ways[way]["error"], abs=1e-3))
    for factor, ways in values["scale"].items():
        assert ways["resampled"]["error"] < ways["unchanged"]["error"]
        if float(factor) < 1:
            assert list(ways) == ["resampled", "unchanged"]  # the network's formulas are too fine for smaller images
        else:
            assert ways["closed form"]["error"] < ways["unchanged"]["error"]
            assert ways["splines"]["error"] < ways["unchanged"]["error"]


@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 2, 3), (7, 2, 0), (11, 4, 2), (6, 1, 3), (8, 2, 3)])
def test_outputs_are_compared_where_they_belong_whatever_the_padding(size: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    layer = AnalyticConv2d(3, 8, size, stride, padding, arrangement="G100%")
    layer.set_akps("G", {"sigma": torch.full((24,), 2.0), "wavelength": torch.full((24,), 8.0)})
    features = resize(torch.randn(2, 3, 16, 16), [96, 96], InterpolationMode.BICUBIC)
    enlarge = partial(resize_by, factor=2)
    errors = compare_outputs({"closed form": layer}, features, {"closed form": partial(acl.rescale, factor=2)}, enlarge)
    assert errors["closed form"] < 1 < errors["unchanged"]


@pytest.mark.parametrize(
    ("measurement", "values", "fewer"),
    [
        ("attacks", {"0": 90.0, "1": 80.0, "4": 20.0}, {"0": 90.0, "1": 80.0}),
        ("corruptions", {"none": 90.0, "noise": [80.0, 40.0]}, {"none": 90.0, "noise": [80.0]}),
    ],
)
def test_means_over_different_conditions_are_refused(
    measurement: str, values: dict[str, Any], fewer: dict[str, Any]
) -> None:
    line = MEASUREMENTS[measurement].make_line_type()
    lines = [
        line(row="plain", id="0" * 12, seed=0, values=values),
        line(row="all Gabor", id="1" * 12, seed=0, values=fewer),
    ]
    assert len(list(MEASUREMENTS[measurement].summarize(lines[:1])))
    with pytest.raises(ValueError, match="lines have different conditions"):
        list(MEASUREMENTS[measurement].summarize(lines))


def test_transforms_are_compared_with_each_way_that_a_line_has() -> None:
    """Lines of earlier versions have no splines."""
    old = {"closed form": {"top1": 60.0, "error": 3.0}, "resampled": {"top1": 50.0, "error": 5.0}}
    old |= {"unchanged": {"top1": 40.0, "error": 9.0}}
    new = old | {"splines": {"top1": 55.0, "error": 2.0}}
    make_line = Transforms.make_line_type()

    def summarize(*ways: dict[str, Any]) -> dict[str, dict[int, float]]:
        values = [{"rotation": {"15": way}, "scale": {"2": way}} for way in ways]
        lines = [make_line(row="a", id="0" * 12, seed=seed, values=value) for seed, value in enumerate(values)]
        prefix = "a, images scaled by 2: "
        summaries = {summary.what: summary.values.to_dict() for summary in Transforms.summarize(lines)}
        return {what.removeprefix(prefix): value for what, value in summaries.items() if what.startswith(prefix)}

    expected = {
        "formulas moved, against kernels resampled": {0: 10.0, 1: 10.0},
        "formulas moved, against kernels unchanged": {0: 20.0, 1: 20.0},
        "error of outputs, kernels resampled, against formulas moved": {0: 2.0, 1: 2.0},
    }
    assert summarize(old, old) == expected
    splines = {
        "formulas moved, against kernels resampled by splines": {1: 5.0},
        "error of outputs, kernels resampled by splines, against formulas moved": {1: -1.0},
    }
    assert summarize(old, new) == expected | splines


@pytest.mark.parametrize("measurement", [AkpTravel, ReplacedAkps])
def test_akp_history_that_is_not_of_the_network_is_refused(
    tmp_path: Path, run: FinishedRun, measurement: type[Measurement]
) -> None:
    file, data = tmp_path / "akps.safetensors", load_run_data(run.settings)
    history = load_akp_history(run)
    other_run = replace(run, path=tmp_path)
    with pytest.raises(UsageError, match=rf"{file} is missing; delete {tmp_path} and train again"):
        measurement.measure(other_run, data)
    name = next(iter(history))
    for change in (
        {name: history[name] + 0.01},  # as of another seed
        {name: history[name][:-1]},
        {name: history[name][:, :-1]},
        {"conv9/G/theta": history[name]},
    ):
        save_file({key: values.clone() for key, values in {**history, **change}.items()}, file)
        with pytest.raises(UsageError, match=rf"{file} is (of another run: its|not the AKP history.*:) {min(change)}"):
            measurement.measure(other_run, data)


def test_writers_keep_lines_of_each_other_and_replace_their_own(tmp_path: Path) -> None:
    file = tmp_path / "evidence/toy_shapley.jsonl"

    def write(seed: int, value: float) -> None:
        write_measurement(file, Shapley, Line(row="mosaic", id="0" * 12, seed=seed, values={"G": value}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8), [1.0] * 8))
    write(3, 2.0)
    values = {line.seed: line.values["G"] for line in read_measurements(file, Shapley)}
    assert values == {seed: 2.0 if seed == 3 else 1.0 for seed in range(8)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"id": "0" * 12}, False),
        ({"weights": "0" * 12}, False),
        ({"akps": "0" * 12}, False),
        ({"weights": None, "values": {}}, False),  # earlier versions recorded a missing akps.safetensors like this
    ],
)
@pytest.mark.parametrize("has_digest", [True, False])
def test_line_is_current_unless_its_run_changed(
    run: FinishedRun, changes: dict[str, Any], expected: bool, has_digest: bool
) -> None:
    assert run.record is not None and run.record.weights is not None
    record = run.record if has_digest else run.record.model_copy(update={"weights": None})
    digests = {name: digest_file(run.path / f"{file}.safetensors") for name, file in FILES.items()}
    line = Line(**{"row": "a", "id": record.id, "seed": 0, "values": {"G": 1.0}, **digests, **changes})
    assert is_current(line, record, run.path) is expected


def test_line_of_deleted_weights_is_current(tmp_path: Path, run: FinishedRun) -> None:
    assert run.record is not None
    line = Line(row="a", id=run.record.id, seed=0, values={"G": 1.0}, weights=run.record.weights)
    assert is_current(line, run.record, tmp_path)


def test_line_without_digest_is_current_if_record_has_none(run: FinishedRun) -> None:
    assert run.record is not None
    line = Line(row="a", id=run.record.id, seed=0, values={"G": 1.0})
    assert not is_current(line, run.record, run.path)
    assert is_current(line, run.record.model_copy(update={"weights": None}), run.path)


def test_replaced_akps_change_nothing_but_akps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_trained(tmp_path, "arrangement=half_plain", "trainer.epochs=2")
    networks: list[nn.Module] = []

    def evaluate_and_keep(run: FinishedRun, data: Data, split: str) -> dict[str, float]:
        networks.append(run.model)
        return evaluate_run(run, data, split)

    monkeypatch.setattr("evaluation.measurements.evaluate_run", evaluate_and_keep)
    accuracies = ReplacedAkps.measure(run, load_run_data(run.settings))
    assert run.record is not None and accuracies["trained"] == run.record.val.top1
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


@pytest.mark.parametrize("measurement", [ReplacedAkps, Transforms])
def test_measurement_of_plain_network_is_empty(plain_run: FinishedRun, measurement: type[Measurement]) -> None:
    assert measurement.measure(plain_run, load_run_data(plain_run.settings)) == {}


def test_shapley_values_are_of_validation_images(run: FinishedRun) -> None:
    data = load_run_data(run.settings)
    attribution = attribute(run.model, partial(iterate_pairs, data, data.val), progress=False)
    assert attribution.images == len(data.val)
    assert Shapley.measure(run, data) == {symbol: attribution.shapley()[symbol] for symbol in ("G", "P")}


def test_corruptions_are_measured_at_each_severity(gabor_run: FinishedRun) -> None:
    data = load_run_data(gabor_run.settings)
    values = Corruptions.measure(gabor_run, data)
    record = gabor_run.record
    assert record is not None and record.test is not None and values["none"] == record.test.top1
    assert list(values) == ["none", *CORRUPTIONS]
    for severity in (1, 5):
        images = CORRUPTIONS["noise"](data.test.images, severity)
        corrupted = replace(data, test=Split(images, data.test.labels))
        assert values["noise"][severity - 1] == evaluate_run(gabor_run, corrupted, "test")["top1"]


def test_transforms_reject_network_of_one_image_size(gabor_run: FinishedRun) -> None:
    with pytest.raises(UsageError, match="the network takes images of one size only"):
        Transforms.measure(gabor_run, load_run_data(gabor_run.settings))


def test_larger_attack_is_at_least_as_harmful(gabor_run: FinishedRun) -> None:
    data = load_run_data(gabor_run.settings)
    data = replace(data, test=data.test[:100])
    accuracies = Attacks.measure(gabor_run, data)
    assert list(accuracies) == ["0", *(f"{size:g}" for size in ATTACK_SIZES)]
    assert accuracies["0"] == pytest.approx(evaluate_run(gabor_run, data, "test")["top1"])
    assert sorted(accuracies.values(), reverse=True) == list(accuracies.values()) and accuracies["4"] < accuracies["0"]


@pytest.mark.parametrize("measurement", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_run_in_double_precision_is_measured(
    double_run: FinishedRun, measurement: type[Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.removal.MAX_KERNELS", 2)
    assert measurement.measure(double_run, load_run_data(double_run.settings))
