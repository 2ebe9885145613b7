from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.configurations import compose_run
from tests.training.trees import write_imagefolder
from training.config import compose
from training.errors import UsageError
from training.loop import run
from training.settings import build_model, load_run_data, parse_run
from training.splits import Split


def test_built_model_is_in_training_mode_and_depends_on_seed(tmp_path: Path) -> None:
    settings = parse_run(compose_run(tmp_path))
    data = load_run_data(settings)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model(settings, data))
    first, same, other = (model.state_dict() for model in models)
    assert models[0].training
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_images_that_network_does_not_accept_are_rejected() -> None:
    settings = parse_run(compose(["model=lenet"]))
    data = load_run_data(settings)
    small = replace(data, train=Split(data.train.images[..., :20, :20], data.train.labels))
    with pytest.raises(UsageError, match=r"model.backbone=lenet does not accept images of 1 x 20 x 20: ") as error:
        build_model(settings, small)
    assert "\n" not in str(error.value)


def test_seed_of_run_draws_its_share_of_training_images() -> None:
    first, same, other = (
        load_run_data(parse_run(compose(["data.train_share=0.1", f"seed={seed}"]))).train for seed in (1, 1, 2)
    )
    assert torch.equal(first.images, same.images) and not torch.equal(first.images, other.images)


def test_invalid_share_of_training_images_is_named() -> None:
    with pytest.raises(UsageError, match=r"data\.train_share=1\.5 is invalid: it should be less than 1"):
        load_run_data(parse_run(compose(["data.train_share=1.5"])))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+foo=1", "unknown option foo=1"),
        ("+model.foo=1", "unknown option model.foo=1"),
        ("+model.channels=3", "unknown option model.channels=3"),
        ("+model.layer.foo=1", "unknown option model.layer.foo=1"),
        (
            "++model.layer={per: filter, amplitude: true}",
            "model.layer: amplitude=True needs per='kernel'; a filter has a gain per input channel already",
        ),
        ("model.layer.learn=foo", "model.layer: unknown AKP 'foo' in learn; known: all, none, "),
        ("model.layer=3", "model.layer=3 is invalid: it should be null or a section of options"),
        ("model.layer.amplitude=maybe", "model.layer.amplitude=maybe is invalid: it should be a valid boolean"),
        ("model.layer.learn=3", "model.layer.learn=3 is invalid: it should be a valid string or iterable"),
        ("model.layer.tolerance=2", "model.layer.tolerance=2 is invalid: it should be less than or equal to 1"),
        ("model.layer.tolerance=0.1", "model.layer.tolerance=0.1 needs the arrangement auto"),
        ("model.layer.metric=images", "model.layer.metric=images needs a fit: set model.layer.init=fit"),
        ("model.backbone=null", "model.backbone=null is invalid: it should be the name of a network"),
        ("model.backbone=vgg", "model.backbone=vgg is invalid: unknown backbone 'vgg'; known: lenet, "),
        ("arrangement.conv1=6", "arrangement.conv1=6 is invalid: '6' in arrangement '6' is not a kind and a number"),
        ("paths.runs=null", "paths.runs=null is invalid: it should be the path of a file or folder"),
        ("paths=null", "paths=null is invalid: it should be a section of options"),
        ("optim=3", "optim=3 is invalid: choose one of adamw, sgd"),
        ("trainer.accelerator=tpu", "trainer.accelerator=tpu is invalid: it should be 'auto', 'cpu', 'gpu', "),
        ("trainer.strategy=deepspeed", "trainer.strategy=deepspeed is invalid: it should be 'auto', 'ddp' or "),
        ("seed=-1", "seed=-1 is invalid: it should be greater than or equal to 0"),
        ("debug=yes", "debug=yes is invalid: it should be 'smoke'"),
    ],
)
def test_invalid_option_of_a_run_is_named(override: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_run(compose(["arrangement=mosaic", override]))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("kernel_size", ["-3", "4", "0", "3.0", "abc", "null"])
def test_invalid_option_of_a_backbone_is_named(kernel_size: str, tmp_path: Path) -> None:
    cfg = compose(["model=four_layer", f"model.kernel_size={kernel_size}"])
    with pytest.raises(UsageError, match=rf"^model.kernel_size={kernel_size} "):
        build_model(parse_run(cfg), load_run_data(parse_run(cfg)))


def test_smoke_run_takes_two_steps_and_leaves_nothing(tmp_path: Path) -> None:
    cfg = compose_run(tmp_path / "runs", "debug=smoke", "trainer.epochs=100", "logger=wandb")
    settings = parse_run(cfg)
    data = load_run_data(settings)
    assert len(data.train) == 2 * settings.trainer.batch_size and settings.trainer.epochs == 1
    assert len(data.classes) == 10
    run(parse_run(cfg))
    assert not list(tmp_path.iterdir())


def test_smoke_run_decodes_only_its_images(tmp_path: Path) -> None:
    root = write_imagefolder(tmp_path / "photos", train=20, val=20, test=20)
    options = [f"data.root={root}", "data.title=t", "data.size=32", "data.crop=28", f"data.cache={tmp_path / 'cache'}"]
    cfg = compose(["data=imagefolder", "model=resnet18", *options, "data.train_share=0.3", "debug=smoke"])
    data = load_run_data(parse_run(cfg))
    assert len(data.train) == len(data.val) == len(data.test) == 8 and len(data.classes) == 3
    assert not (tmp_path / "cache").exists()
