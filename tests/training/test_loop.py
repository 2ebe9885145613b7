import base64
import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from evaluation.finished_run import load_finished_run
from tests.training.configurations import compose_photo_run, compose_run
from tests.training.trees import write_image, write_imagefolder, write_mnist
from training import datasets, image_folders, loop
from training.config import identity, resolve
from training.data import Augmentation
from training.datasets import digest_dataset
from training.errors import UsageError
from training.evaluate import predict
from training.image_folders import ImageFiles
from training.loop import run, snapshot_akps
from training.optim import build_optimizer
from training.provenance import describe_environment, digest_sources
from training.record import NumParameters, Record, compute_run_id
from training.run_directory import RunDirectory
from training.settings import build_model, digest_pretrained, find_changes, load_run_data, parse_run
from training.validation import construct


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DictConfig, Record]:
    cfg = compose_run(tmp_path_factory.mktemp("runs"), "trainer.epochs=3", "trainer.batch_size=32")
    record, is_new = run(parse_run(cfg))
    assert is_new
    return cfg, record


@pytest.fixture
def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a run builds a model."""
    monkeypatch.setattr(loop, "build_model", lambda *_: pytest.fail("the run was repeated"))


@pytest.fixture
def finished_run_copy(tmp_path: Path, finished_run: tuple[DictConfig, Record]) -> tuple[DictConfig, Record]:
    """The finished run in a folder that a test may change."""
    cfg, record = finished_run
    shutil.copytree(cfg.paths.runs, tmp_path / "runs")
    copy = cfg.copy()
    copy.paths.runs = str(tmp_path / "runs")
    return copy, record


def test_run_learns_and_writes_its_files(finished_run: tuple[DictConfig, Record]) -> None:
    cfg, record = finished_run
    assert record.test is not None and record.test.top1 > 60 and record.val.top1 > 60
    assert record.parameters == NumParameters(conv=310, total=59444)
    folder = parse_run(cfg).directory.path
    assert sorted(path.name for path in folder.iterdir()) == [
        "akps.safetensors",
        "config.yaml",
        "lock",
        "metrics.csv",
        "model.safetensors",
        "optimizer.pt",
        "record.json",
        "worker",
    ]
    assert json.loads((folder / "record.json").read_text()) == record.to_dict()
    written_config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(written_config, DictConfig)
    assert compute_run_id(identity(resolve(written_config))) == parse_run(cfg).directory.id == record.id
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    best = rows[record.best_epoch - 1]
    assert float(best["val_top1"]) == record.val.top1 == max(float(row["val_top1"]) for row in rows)


def test_record_contains_source_digest(finished_run: tuple[DictConfig, Record]) -> None:
    assert finished_run[1].sources == digest_sources()


def test_akp_trajectories_contain_akps_of_saved_weights(finished_run: tuple[DictConfig, Record]) -> None:
    cfg, record = finished_run
    folder = parse_run(cfg).directory.path
    trajectories = load_file(folder / "akps.safetensors")
    akps = snapshot_akps(load_finished_run(folder).model)
    assert trajectories.keys() == akps.keys()
    for name, values in akps.items():
        assert trajectories[name].shape == (4, len(values))  # before training and after each of three epochs
        assert torch.equal(trajectories[name][record.best_epoch], values)
        assert not torch.equal(trajectories[name][0], values)


def test_saved_weights_reproduce_recorded_test_accuracy(finished_run: tuple[DictConfig, Record]) -> None:
    cfg, record = finished_run
    settings = parse_run(cfg)
    data = load_run_data(settings)
    model = build_model(settings, data)
    model.load_state_dict(load_file(settings.directory.path / "model.safetensors"))
    assert predict(model, data, data.test)[0]["top1"] == record.test.top1


def test_saved_optimizer_state_loads(finished_run: tuple[DictConfig, Record]) -> None:
    settings = parse_run(finished_run[0])
    optimizer = build_optimizer(build_model(settings, load_run_data(settings)), settings.optim)
    optimizer.load_state_dict(torch.load(settings.directory.path / "optimizer.pt", weights_only=True))
    assert next(iter(optimizer.state.values()))["exp_avg"].abs().sum() > 0


@pytest.mark.usefixtures("forbid_training")
def test_recorded_run_is_not_repeated(finished_run: tuple[DictConfig, Record]) -> None:
    cfg, record = finished_run
    same_run = cfg.copy()
    same_run.data.root = "somewhere/else"
    same_run.logger = {"name": "none"}
    assert run(parse_run(same_run)) == (record, False)


def replace_source_digest(cfg: DictConfig, sources: str | None) -> Record:
    """Rewrites a run's record as if other code had written it; None: code that recorded no digest."""
    directory = parse_run(cfg).directory
    record = directory.load_record()
    assert record is not None
    values = record.to_dict(exclude={"sources"})
    record = Record(**values) if sources is None else Record(**values, sources=sources)
    directory.write_record(record)
    return record


@pytest.mark.parametrize("sources", ["0123456789ab", None])
def test_fresh_repeats_run_of_other_code(finished_run_copy: tuple[DictConfig, Record], sources: str | None) -> None:
    cfg, _ = finished_run_copy
    old_record = replace_source_digest(cfg, sources)
    folder = parse_run(cfg).directory.path
    old_files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("lock", "worker")}
    cfg.fresh = True
    record, is_new = run(parse_run(cfg))
    assert is_new and record.sources == digest_sources()
    assert record.id == old_record.id and record.test == old_record.test
    assert parse_run(cfg).directory.load_record() == record
    superseded = folder / "superseded-1"
    assert {path.name: path.read_bytes() for path in superseded.iterdir()} == old_files
    assert json.loads(old_files["record.json"]) == old_record.to_dict()
    assert {path.name for path in folder.iterdir()} == {*old_files, "lock", "worker", "superseded-1"}
    assert run(parse_run(cfg)) == (record, False)


@pytest.mark.usefixtures("forbid_training")
def test_fresh_keeps_run_of_same_code(finished_run_copy: tuple[DictConfig, Record]) -> None:
    cfg, record = finished_run_copy
    cfg.fresh = True
    assert run(parse_run(cfg)) == (record, False)
    assert not list(parse_run(cfg).directory.path.glob("superseded-*"))


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("sources", ["0123456789ab", None])
def test_run_of_other_code_is_reused_without_fresh(
    finished_run_copy: tuple[DictConfig, Record], sources: str | None
) -> None:
    cfg, _ = finished_run_copy
    record = replace_source_digest(cfg, sources)
    assert run(parse_run(cfg)) == (record, False)


def test_seed_determines_run(tmp_path: Path) -> None:
    def train_with_seed(folder: str, seed: int) -> tuple[dict[str, torch.Tensor], str]:
        cfg = compose_run(tmp_path / folder, f"seed={seed}", "data.shift=1", "data.flip=true")
        record, _ = run(parse_run(cfg))
        return load_file(parse_run(cfg).directory.path / "model.safetensors"), record.id

    weights, run_id = train_with_seed("first", 1)
    same_weights, same_id = train_with_seed("second", 1)
    other_weights, other_id = train_with_seed("third", 2)
    assert run_id == same_id != other_id
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert not torch.equal(weights["fc1.weight"], other_weights["fc1.weight"])


def test_nonfinite_loss_stops_run_and_keeps_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss becomes NaN in the second epoch: the checkpoint of the first one is kept, and there is no record."""
    cfg = compose_run(tmp_path)
    settings = parse_run(cfg)
    original, calls = Augmentation.__call__, 0
    steps = len(load_run_data(settings).train) // settings.trainer.batch_size

    def return_nan_once(self: Augmentation, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        augmented = original(self, images, generator)
        return augmented * float("nan") if calls == steps + 4 else augmented

    monkeypatch.setattr(Augmentation, "__call__", return_nan_once)
    with pytest.raises(UsageError, match=rf"the loss is nan at step {steps + 4} \(epoch 2\); the last good checkpoint"):
        run(parse_run(cfg))
    assert settings.directory.load_record() is None
    assert settings.directory.load_checkpoint() is not None
    weights = load_file(settings.directory.path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_run_without_working_compiler_trains_eagerly_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    options = ["arrangement=mosaic", "trainer.epochs=1"]
    record, _ = run(parse_run(compose_run(tmp_path / "compiled", *options, "trainer.compile=true")))
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if "compile" in line] == [
        "torch.compile does not work here, so the network is not compiled: "
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: ('no-such-compiler',)"
    ]
    eager, _ = run(parse_run(compose_run(tmp_path / "eager", *options)))
    assert record.test == eager.test


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arrangement.conv1=G5"], r"'G5' has 5 kernels, but conv1 has 6 \(1 x 6\)"),
        (["arrangement.conv3=G5"], r"no convolution is named 'conv3'; .*conv1 \(5 x 5\), conv2"),
        (["trainer.batch_size=5000"], r"trainer.batch_size=5000 must be .* the number of training images \(1237\)"),
        (["optim.lr=fast"], "optim.lr=fast is invalid: it should be a valid number"),
        (["model.layer.profile=box"], "model.layer.profile=box is invalid"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed needs a GPU; use bf16-mixed on a CPU"),
        (["+data.crop=29"], "data.crop=29 exceeds the size of the images, 28 x 28"),
    ],
)
def test_invalid_option_is_rejected_before_anything_is_written(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(parse_run(compose_run(tmp_path / "runs", *overrides)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("is_fast", [True, False])
def test_bf16_on_a_cpu_without_instructions_for_it_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_fast: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_fast)
    monkeypatch.setattr(loop, "train", lambda *_: None)
    loop.report_slow_bf16.cache_clear()
    for seed in (0, 1):
        run(parse_run(compose_run(tmp_path / "runs", "trainer.precision=bf16-mixed", f"seed={seed}")))
    loop.report_slow_bf16.cache_clear()
    assert capsys.readouterr().err.count("trainer.precision=bf16-mixed: this CPU has no instructions") == (not is_fast)


def test_environment_is_described_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []

    def describe(device: torch.device) -> dict[str, Any]:
        assert not (tmp_path / "runs").exists(), "training has begun"
        devices.append(device)
        return describe_environment(device)

    monkeypatch.setattr(loop, "describe_environment", describe)
    record, _ = run(parse_run(compose_run(tmp_path / "runs", "trainer.epochs=1")))
    assert devices == [torch.device("cpu")] and record.sources == digest_sources()


def test_batch_norm_over_processes_without_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch normalization over 2 processes needs GPUs"):
        run(parse_run(compose_run(tmp_path / "runs", "model=four_layer", "arrangement=plain", "trainer=ddp")))
    assert not (tmp_path / "runs").exists()


def test_checkpoint_holds_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints: list[set[str]] = []
    monkeypatch.setattr(RunDirectory, "save_checkpoint", lambda _, state: checkpoints.append(set(state)))
    run(parse_run(compose_run(tmp_path / "runs", "trainer.epochs=1")))
    assert all({"model", "optimizer", "schedule", "precision"} <= keys for keys in checkpoints) and checkpoints


def test_every_epoch_trains_on_each_image_at_most_once_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose_run(tmp_path, "trainer.batch_size=32")
    images = load_run_data(parse_run(cfg)).train.images
    index_of = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    seen: list[int] = []

    def record_batch(_: Augmentation, batch: torch.Tensor, __: torch.Generator) -> torch.Tensor:
        seen.extend(index_of[image.numpy().tobytes()] for image in batch)
        return batch

    monkeypatch.setattr(Augmentation, "__call__", record_batch)
    run(parse_run(cfg))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == len(images) // 32 * 32 and len(set(first)) >= 0.99 * len(first)  # a few images are duplicates
    assert first != sorted(first) and first != second


def test_best_epoch_has_lower_loss_if_accuracies_are_equal() -> None:
    epochs = [{"val_top1": top1, "val_loss": loss} for top1, loss in ((90.0, 0.2), (91.0, 0.5), (91.0, 0.4))]
    assert max(epochs, key=loop._score) == epochs[2]


# Data and pretrained weights


def list_changes(cfg: DictConfig) -> list[str]:
    """What a new process would announce for a recorded run."""
    digest_dataset.cache_clear()
    record = parse_run(cfg).directory.load_record()
    assert record is not None
    return find_changes(parse_run(cfg), record)


def test_record_names_classes_and_describes_data(finished_run: tuple[DictConfig, Record]) -> None:
    cfg, record = finished_run
    assert record.classes == [str(digit) for digit in range(10)] and record.pretrained is None
    assert record.data == {"digest": load_run_data(parse_run(cfg)).digest, "train": 1237, "val": 200, "test": 360}
    assert {"pillow", "timm"} <= record.versions.keys() and list_changes(cfg) == []


def test_record_holds_correctly_classified_images(finished_run: tuple[DictConfig, Record]) -> None:
    cfg, record = finished_run
    settings = parse_run(cfg)
    data, model = load_run_data(settings), load_finished_run(settings.directory.path).model
    for name in ("val", "test"):
        split = getattr(data, name)
        bits = np.unpackbits(np.frombuffer(base64.b64decode(record.correct[name]), np.uint8), count=len(split))
        with torch.no_grad():
            correct = model(data.normalize(split.images)).argmax(1) == split.labels
        assert bits.tolist() == correct.int().tolist() and 100 * bits.mean() == pytest.approx(record.results[name].top1)


def test_run_without_test_has_no_bits_of_test_images(tmp_path: Path) -> None:
    record, _ = run(parse_run(compose_run(tmp_path, "trainer.epochs=1", "trainer.test=false")))
    assert record.correct["test"] is None and len(base64.b64decode(record.correct["val"])) == 200 / 8


@pytest.fixture
def photo_run(tmp_path: Path) -> tuple[DictConfig, Path]:
    """A finished run of LeNet on image files, and their folder."""
    root = write_imagefolder(tmp_path / "photos", train=6, val=2, test=2)
    cfg = compose_photo_run(tmp_path, root)
    run(parse_run(cfg))
    return cfg, root


def add_images(root: Path) -> None:
    for i in range(4):
        write_image(root / "train/class_1" / f"new_{i}.png", 1, i, 40, 40)


def add_class(root: Path) -> None:
    for split in ("train", "val", "test"):
        write_image(root / split / "class_3/0.png", 3, 0, 40, 40)


def edit_image(root: Path) -> None:
    write_image(root / "test/class_1/1.png", 1, 99, 41, 40)


def rename_class(root: Path) -> None:
    for split in ("train", "val", "test"):
        (root / split / "class_0").rename(root / split / "zebra")


def relabel_image(root: Path) -> None:
    (root / "train/class_0/0.png").rename(root / "train/class_1/9.png")


def move_image_to_training(root: Path) -> None:
    (root / "val/class_0/0.png").rename(root / "train/class_0/9.png")


@pytest.mark.parametrize(
    "change", [add_images, add_class, edit_image, rename_class, relabel_image, move_image_to_training]
)
def test_changed_image_files_are_announced_and_fresh_reruns(photo_run: tuple[DictConfig, Path], change: Any) -> None:
    cfg, root = photo_run
    assert list_changes(cfg) == []
    change(root)
    assert list_changes(cfg) == ["data"]
    assert not run(parse_run(cfg))[1]
    cfg.fresh = True
    record, is_new = run(parse_run(cfg))
    assert is_new and list_changes(cfg) == []
    assert record.data["train"] == len(list((root / "train").rglob("*.png")))


def test_finished_run_lists_but_does_not_decode_images(
    photo_run: tuple[DictConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, root = photo_run
    monkeypatch.setattr(image_folders, "load_decoded_images", lambda *_: pytest.fail("images were decoded"))
    for file in root.rglob("*.png"):
        os.utime(file, (1, 1))  # as a copy on another machine
    assert list_changes(cfg) == []
    shutil.rmtree(root)
    assert list_changes(cfg) == [] and not run(parse_run(cfg))[1]  # unknown


def test_recorded_run_does_not_download_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_mnist(tmp_path / "data")
    cfg = compose_run(tmp_path / "runs", "data=mnist", f"data.root={tmp_path}/data", "trainer.epochs=2")
    run(parse_run(cfg))
    assert list_changes(cfg) == []
    shutil.rmtree(raw)
    monkeypatch.setattr(datasets.datasets.MNIST, "download", lambda _: pytest.fail("data were downloaded"))
    assert list_changes(cfg) == []


def test_data_digest_is_computed_once(photo_run: tuple[DictConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, _ = photo_run
    assert list_changes(cfg) == []
    monkeypatch.setattr(ImageFiles, "read", lambda *_: pytest.fail("images were listed again"))
    record = parse_run(cfg).directory.load_record()
    assert record is not None and find_changes(parse_run(cfg), record) == []


def test_record_without_inputs_is_not_outdated(photo_run: tuple[DictConfig, Path]) -> None:
    cfg, root = photo_run
    directory = parse_run(cfg).directory
    record = directory.load_record()
    assert record is not None
    values = record.to_dict(exclude={"data", "pretrained", "correct"})
    directory.write_record(construct(Record, values))
    add_images(root)
    assert list_changes(cfg) == []


def test_other_content_of_pretrained_file_is_announced(photo_run: tuple[DictConfig, Path], tmp_path: Path) -> None:
    cfg, root = photo_run
    record, file = parse_run(cfg).directory.load_record(), tmp_path / "source.pth"
    assert record is not None
    pretrained = compose_photo_run(tmp_path, root, "model=resnet18", f"model.pretrained={file}")
    file.write_bytes(b"weights")
    record = record.model_copy(update={"pretrained": digest_pretrained(parse_run(pretrained))})
    assert record.pretrained == "9a129038d9a0" and find_changes(parse_run(pretrained), record) == []
    file.write_bytes(b"others")
    assert find_changes(parse_run(pretrained), record) == ["pretrained weights"]
    file.unlink()
    assert find_changes(parse_run(pretrained), record) == []


def test_pretrained_file_in_home_folder_has_a_digest(
    photo_run: tuple[DictConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = photo_run
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "source.pth").write_bytes(b"weights")
    cfg = compose_photo_run(tmp_path, root, "model=resnet18", "model.pretrained='~/source.pth'")
    assert digest_pretrained(parse_run(cfg)) == "9a129038d9a0"


def test_last_learning_rate_is_that_of_the_last_step(finished_run: tuple[DictConfig, Record]) -> None:
    cfg, _ = finished_run
    with (parse_run(cfg).directory.path / "metrics.csv").open() as file:
        rates = [float(line["lr"]) for line in csv.DictReader(file)]
    assert rates[-1] < 1e-5 * cfg.optim.lr


@pytest.mark.parametrize("change", [add_images, move_image_to_training])
def test_unfinished_run_is_not_resumed_on_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    root = write_imagefolder(tmp_path / "photos", train=6, val=4, test=2)
    cfg = compose_photo_run(tmp_path, root)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(parse_run(cfg))
    change(root)
    folder = parse_run(cfg).directory.path
    message = f"the unfinished run in {folder} has used other data; restore them to resume it, or delete this folder to"
    with pytest.raises(UsageError, match=message):
        run(parse_run(cfg))
    shutil.rmtree(folder)
    assert run(parse_run(cfg))[1]
