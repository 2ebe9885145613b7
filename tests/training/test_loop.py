import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from training import loop
from training.config import compose
from training.data import load
from training.errors import UsageError
from training.loop import build, build_optimizer, build_schedule, evaluate, run
from training.records import identity, recorded, run_folder, run_id

SMALL = ["arrangement=mosaic", "trainer.epochs=2", "trainer.accelerator=cpu"]


def config(folder: Path, *overrides: str) -> DictConfig:
    return compose([*SMALL, f"paths.runs={folder}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[DictConfig, dict[str, Any]]:
    cfg = config(tmp_path_factory.mktemp("runs"), "trainer.epochs=3", "trainer.batch_size=32")
    record, here = run(cfg)
    assert here
    return cfg, record


def test_a_run_learns_and_leaves_its_files(finished: tuple[DictConfig, dict[str, Any]]) -> None:
    cfg, record = finished
    assert record["test"]["top1"] > 60 and record["val"]["top1"] > 60
    assert record["parameters"] == {"conv": 310, "total": 59444}
    folder = run_folder(cfg)
    assert sorted(p.name for p in folder.iterdir()) == [
        "akps.safetensors",
        "config.yaml",
        "lock",
        "metrics.csv",
        "model.safetensors",
        "optimizer.pt",
        "record.json",
        "worker",
    ]
    assert json.loads((folder / "record.json").read_text()) == record
    assert run_id(OmegaConf.load(folder / "config.yaml")) == run_id(cfg) == record["id"]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    best = rows[record["best_epoch"] - 1]
    assert float(best["val_top1"]) == record["val"]["top1"] == max(float(row["val_top1"]) for row in rows)


def test_the_paths_of_akps_end_where_the_weights_are(finished: tuple[DictConfig, dict[str, Any]]) -> None:
    cfg, record = finished
    paths = load_file(run_folder(cfg) / "akps.safetensors")
    model = loop.finished(run_folder(cfg))[2]
    for name, values in loop.akps_of(model).items():
        assert paths[name].shape == (4, len(values))  # the start and three epochs
        assert torch.equal(paths[name][record["best_epoch"]], values) and not torch.equal(paths[name][0], values)


def test_the_kept_weights_are_those_that_were_tested(finished: tuple[DictConfig, dict[str, Any]]) -> None:
    cfg, record = finished
    data = load(cfg.data)
    model = build(cfg, data)
    model.load_state_dict(load_file(run_folder(cfg) / "model.safetensors"))
    assert evaluate(model, data.test, data, cfg)["top1"] == record["test"]["top1"]
    optimizer = build_optimizer(model, cfg)
    optimizer.load_state_dict(torch.load(run_folder(cfg) / "optimizer.pt", weights_only=True))
    assert next(iter(optimizer.state.values()))["exp_avg"].abs().sum() > 0


def test_a_recorded_run_is_not_run_again(finished: tuple[DictConfig, dict[str, Any]], monkeypatch: Any) -> None:
    cfg, record = finished
    monkeypatch.setattr(loop, "build", lambda *_: pytest.fail("ran again"))
    elsewhere = cfg.copy()
    elsewhere.data.root = "somewhere/else"
    elsewhere.logger = {"name": "none"}
    assert run(elsewhere) == (record, False)


def test_a_seed_gives_the_same_run_and_another_another(tmp_path: Path) -> None:
    def trained(folder: str, seed: int) -> tuple[dict[str, Any], str]:
        cfg = config(tmp_path / folder, f"seed={seed}", "data.shift=1", "data.flip=true")
        record, _ = run(cfg)
        return load_file(run_folder(cfg) / "model.safetensors"), record["id"]

    (a, id_a), (b, id_b), (c, id_c) = trained("a", 1), trained("b", 1), trained("c", 2)
    assert id_a == id_b != id_c
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc1.weight"], c["fc1.weight"])


def test_akps_have_a_learning_rate_of_their_own_and_no_decay() -> None:
    cfg = compose([*SMALL, "optim.lr=0.001", "optim.akp_lr_scale=7", "optim.weight_decay=0.1"])
    model = build(cfg, load(cfg.data))
    groups = build_optimizer(model, cfg).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.001, 0.1), (0.001, 0), (pytest.approx(0.007), 0)]
    assert sum(p.numel() for p in groups[2]["params"]) == 288
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    frozen = compose([*SMALL, "model.layer.learn=none"])
    assert len(build_optimizer(build(frozen, load(cfg.data)), frozen).param_groups) == 2


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_schedules_end_near_zero_for_every_group(optim: str, schedule: str) -> None:
    cfg = compose([*SMALL, f"optim={optim}", f"optim.schedule={schedule}"])
    optimizer = build_optimizer(build(cfg, load(cfg.data)), cfg)
    schedule_ = build_schedule(optimizer, cfg, 20)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule_.step()
    peaks = [max(column) for column in zip(*rates, strict=True)]
    assert peaks[2] == pytest.approx(cfg.optim.akp_lr_scale * peaks[0])
    assert all(rate < 0.02 * peak for rate, peak in zip(rates[-1], peaks, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch: the first one's checkpoint stays, and there is no record."""
    cfg = config(tmp_path)
    original, steps = loop.prepare, len(load(cfg.data).train) // cfg.trainer.batch_size
    calls: list[int] = []

    def poisoned(*args: Any) -> torch.Tensor:
        calls.append(1)
        images = original(*args)
        return images * float("nan") if len(calls) == steps + 1 + 4 else images  # one batch validates the first epoch

    monkeypatch.setattr(loop, "prepare", poisoned)
    with pytest.raises(UsageError, match=rf"the loss is nan at step {steps + 4} \(epoch 2\); the last good checkpoint"):
        run(cfg)
    assert recorded(cfg) is None
    assert all(t.isfinite().all() for t in load_file(run_folder(cfg) / "model.safetensors").values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arrangement.conv1=G5"], r"'G5' fills 5 of 6 kernels of conv1 \(1 x 6\)"),
        (["arrangement.conv3=G5"], r"no convolution is named 'conv3'; there are: conv1 \(5 x 5\), conv2"),
        (["trainer.batch_size=5000"], "nothing to train.*trainer.batch_size=5000, 1237 training images"),
        (["trainer.epochs=0"], "trainer.epochs=0 is not a whole number of at least 1"),
        (["optim.lr=fast"], "optim.lr=fast is not a number above 0"),
        (["seed=-1"], "seed=-1"),
        (["model.layer.profile=box"], "unknown profile 'box'"),
        (["trainer.accelerator=abacus"], "trainer: .*abacus"),
        (["data.shift=0.5"], "data.shift=0.5 is not"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(config(tmp_path / "runs", *overrides))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no record of a run"),
        ("{", "no record of a run"),
        ('{"format": 99, "config": {}}', "has format 99, this version reads up to 1"),
        ('{"format": 1, "config": {}}', "of another configuration"),
    ],
)
def test_a_record_that_is_not_this_runs_is_left_alone(tmp_path: Path, content: str, message: str) -> None:
    cfg = config(tmp_path)
    path = run_folder(cfg) / "record.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        run(cfg)
    assert path.read_text() == content


def test_identity_leaves_out_what_does_not_change_the_result(tmp_path: Path) -> None:
    base = config(tmp_path)
    assert run_id(base) == run_id(config(tmp_path / "b", "data.root=/x", "logger=wandb", "trainer.accelerator=auto"))
    assert (
        len({run_id(config(tmp_path, o)) for o in ("seed=1", "optim.lr=0.1", "arrangement.conv1=G6", "data.shift=1")})
        == 4
    )
    assert "paths" not in identity(base)


def test_a_finished_run_of_chosen_kinds_comes_back(tmp_path: Path) -> None:
    options = ["arrangement.conv2=auto", "model.layer.tolerance=0.5", "model.layer.amplitude=true", "trainer.epochs=1"]
    cfg = compose([*options, "trainer.accelerator=cpu", f"paths.runs={tmp_path}", "seed=5"])
    record, _ = run(cfg)
    torch.manual_seed(99)
    _, data, model = loop.finished(run_folder(cfg))
    assert len(set(model.conv2.slot_kinds)) > 1
    assert evaluate(model, data.test, data, cfg)["top1"] == record["test"]["top1"]
