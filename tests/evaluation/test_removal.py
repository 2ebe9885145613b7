from dataclasses import replace
from functools import partial

import pytest
import torch

from acl.explain import KERNEL_REPLACEMENTS, attribute, leave_one_out
from evaluation.finished_run import FinishedRun, load_finished_run
from evaluation.measurements import LeaveOneOut
from evaluation.removal import iterate_pairs, measure_removal
from training.config import compose
from training.loop import run as perform_run
from training.settings import load_run_data, parse_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    options = ["arrangement.conv1=G2_Tf2_P2", "trainer.epochs=4", "trainer.accelerator=cpu"]
    cfg = compose([*options, f"paths.runs={tmp_path_factory.mktemp('runs')}"])
    perform_run(parse_run(cfg))
    return load_finished_run(parse_run(cfg).directory.path)


def test_removal_is_measured_by_kind_and_by_kernel(run: FinishedRun) -> None:
    data = load_run_data(run.settings)
    values = measure_removal(run, data)
    assert list(values) == list(KERNEL_REPLACEMENTS)
    for replaced_by, by_kind in values.items():
        batches = partial(iterate_pairs, data, data.val)
        attribution = attribute(run.model, batches, replaced_by, progress=False)
        lost = leave_one_out(run.model, batches, replaced_by, progress=False)["conv1"]
        assert list(by_kind) == ["G", "Tf", "P"]
        for i, (symbol, loss) in enumerate(by_kind.items()):
            kernels = lost[2 * i : 2 * i + 2]
            assert loss["kernels"] == 2 and loss["kernel"] == pytest.approx(float(kernels.mean()))
            assert loss["kind"] == attribution.leave_one_out()[symbol]
            assert loss["shapley"] == attribution.shapley()[symbol]
            assert loss["free"] == 50 * sum(kernels <= 0)
    zero, constant = ({**values[replaced_by]["Tf"], "shapley": 0} for replaced_by in KERNEL_REPLACEMENTS)
    assert zero == constant  # Tf kernels sum to zero
    assert values["zero"]["G"] != values["constant"]["G"]


def test_large_networks_are_sampled(monkeypatch: pytest.MonkeyPatch, run: FinishedRun) -> None:
    data = load_run_data(run.settings)
    data = replace(data, val=data.val[:50])
    exact = measure_removal(run, data)["zero"]["P"]
    batches = partial(iterate_pairs, data, data.val)
    lost = leave_one_out(run.model, batches, progress=False, slots={"conv1": [4, 5]})["conv1"]
    monkeypatch.setattr("evaluation.removal.MAX_KERNELS", 1)
    sampled = measure_removal(run, data)["zero"]["P"]
    assert sampled["kernel"] in lost.tolist() and sampled["kernels"] == 2
    assert {**sampled, "kernel": 0, "free": 0} == {**exact, "kernel": 0, "free": 0}


def test_kernels_without_effect_are_free(run: FinishedRun) -> None:
    data = load_run_data(run.settings)
    plain = run.model.get_submodule("conv1").plain
    assert isinstance(plain, torch.Tensor)
    before = plain.detach().clone()
    try:
        plain.data.zero_()
        values = measure_removal(run, replace(data, val=data.val[:50]))
    finally:
        plain.data.copy_(before)
    for by_kind in values.values():
        assert by_kind["P"] == {"kernels": 2, "kind": 0, "shapley": 0, "kernel": 0, "free": 100}


def test_removal_of_network_without_kernels_is_empty(run: FinishedRun) -> None:
    assert measure_removal(replace(run, model=torch.nn.Identity()), load_run_data(run.settings)) == {}


def test_summary_has_a_verdict_per_kind_and_share_of_all_free_kernels() -> None:
    make_line = LeaveOneOut.make_line_type()
    loss = {"kind": 3.0, "shapley": 4.0, "kernel": 0.5}
    by_kind = {"G": {"kernels": 30, **loss, "free": 10.0}, "P": {"kernels": 10, **loss, "free": 50.0}}
    constant = {**by_kind, "G": {**by_kind["G"], "kind": 2.0}}
    lines = [
        make_line(row="mosaic", id="0" * 12, seed=seed, values={"zero": by_kind, "constant": constant})
        for seed in (0, 1)
    ]
    summaries = {summary.what: summary for summary in LeaveOneOut.summarize(lines)}
    lost = summaries.pop("lost without Gabor in mosaic, its kernels set to zero")
    assert lost.values.to_dict() == {0: 3.0, 1: 3.0} and lost.threshold == 0
    shapley = summaries.pop("Shapley value of Gabor in mosaic, removed kernels made constant")
    assert shapley.values.to_dict() == {0: 4.0, 1: 4.0}
    lost = summaries.pop("lost without Gabor in mosaic, its kernels made constant")
    assert lost.values.to_dict() == {0: 2.0, 1: 2.0}
    free = summaries.pop("kernels of mosaic that cost nothing if one is made constant")
    assert free.values.to_dict() == {0: 20.0, 1: 20.0} and free.threshold is None and free.unit == "%"
    assert set(summaries) == {  # not what is lost without plain kernels made constant, which equals that of zero
        "lost without Plain in mosaic, its kernels set to zero",
        "Shapley value of Plain in mosaic, removed kernels made constant",
        "kernels of mosaic that cost nothing if one is set to zero",
    }
