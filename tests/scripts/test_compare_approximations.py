import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import acl
from acl.metric import METRICS
from scripts.compare_approximations import FILTER_AKPS, METHODS
from tests.scripts.conftest import RunScript

CLASSES = ("n01440764", "parachute")
"""The WordNet id of ImageNet's class 0, and the name of class 701."""


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("numbers", [5, 7, 8])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "Gabor fit per filter"])
def test_approximation_has_at_least_as_many_numbers_and_less_error_than_zero_kernels(
    method: str, numbers: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acl.kind_search.STEPS", 20)
    weight = torch.randn(16, 6, 7, 7, generator=torch.Generator().manual_seed(0))
    approximation, used = METHODS[method](weight, numbers, acl.Metric.create(metric, 6, (7, 7)))
    assert numbers <= used < numbers + 2 and approximation.shape == weight.shape
    assert acl.output_error(weight, approximation, metric) < 1


@pytest.mark.parametrize("num_akps", FILTER_AKPS)
def test_fit_per_filter_has_one_shape_and_a_gain_per_kernel(num_akps: int) -> None:
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    approximation, used = METHODS["Gabor fit per filter"](weight, num_akps + 3, acl.Metric.create("images", 3, (5, 5)))
    assert used == (num_akps + 3) / 3
    assert all(torch.linalg.matrix_rank(kernels.flatten(1), rtol=1e-4) == 1 for kernels in approximation)


def test_compare_approximations_writes_values_per_image(tmp_path: Path, call_script: RunScript) -> None:
    file = tmp_path / "approximations.jsonl"
    options = ['overrides=["data=digits","model=lenet"]', "features=conv2", f"file={file}"]
    done = call_script("compare_approximations.py", *options, "layer=conv2")
    assert done.returncode == 0, done.stderr
    original, *others = map(json.loads, file.read_text().splitlines())
    assert original["method"] == "original" and set(original["output_error_percent"]) == {0.0}
    assert original["probe_correct"] == original["refitted_probe_correct"]
    assert [line["method"] for line in others] == 3 * ["Gabor fit", "truncated SVD", "codebook"]
    assert all(len(line["probe_correct"]) == len(line["output_error_percent"]) == 360 for line in others)
    assert all(sum(line["output_error_percent"]) > 0 for line in others)
    assert any(line["probe_correct"] != line["refitted_probe_correct"] for line in others)


def test_random_layer_is_that_of_the_seed(tmp_path: Path, call_script: RunScript) -> None:
    options = ["layer=conv1", "features=null", "metrics=[pixels]", "numbers=[5]", "methods=[truncated SVD]"]
    contents = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        overrides = f'overrides=["data=digits","model=lenet","seed={seed}"]'
        done = call_script("compare_approximations.py", overrides, *options, f"file={tmp_path}/{name}.jsonl")
        assert done.returncode == 0, done.stderr
        contents.append([json.loads(line)["explained_percent"] for line in (tmp_path / f"{name}.jsonl").open()])
    assert contents[0] == contents[1] != contents[2]


@pytest.fixture
def imagenet_options(tmp_path: Path) -> list[str]:
    """Images of two of ImageNet's classes, and a SqueezeNet with random weights that tells them."""
    values = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(128 * label, 128 * (label + 1), (32, 32, 3), generator=values, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_0().state_dict()
    state["classifier.1.weight"].zero_()
    state["classifier.1.bias"].zero_()[701] = 1  # every image is taken for a parachute
    save_file(state, tmp_path / "net.safetensors")
    data = f'"data=imagefolder","data.title=two","data.root={tmp_path}/images","data.size=32","data.crop=32"'
    model = f'"model=squeezenet1_0","model.pretrained={tmp_path}/net.safetensors"'
    overrides = f'overrides=[{data},"data.validation=0.25","data.cache={tmp_path}/cache",{model}]'
    return [overrides, "layer=features.0", "features=null", "classes=imagenet", f"file={tmp_path}/lines.jsonl"]


def test_network_with_classes_of_imagenet_classifies_images_itself(
    tmp_path: Path, call_script: RunScript, imagenet_options: list[str]
) -> None:
    options = ["methods=[truncated SVD]", "metrics=[pixels,images,patches]", *imagenet_options]
    done = call_script("compare_approximations.py", *options)
    assert done.returncode == 0, done.stderr
    lines = list(map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines()))
    names = ("truncated SVD", "truncated SVD, images", "truncated SVD, patches")
    assert [(line["method"], line["numbers"]) for line in lines] == [
        ("original", 49),
        *((name, numbers) for numbers in (5, 7, 8) for name in names),
    ]
    assert all(line["correct"] == [0] * 4 + [1] * 4 and line["classes"] == "imagenet" for line in lines)
    assert "probe_correct" not in lines[0] and "top-1 50.00%" in done.stdout
    errors = {line["method"]: sum(line["output_error_percent"]) for line in lines if line["numbers"] == 5}
    assert errors["truncated SVD, patches"] < errors["truncated SVD"]


def test_comparison_keeps_approximations_that_it_does_not_measure(
    tmp_path: Path, call_script: RunScript, imagenet_options: list[str]
) -> None:
    file, options = tmp_path / "lines.jsonl", ["methods=[truncated SVD]", "numbers=[5,8]", *imagenet_options]
    assert call_script("compare_approximations.py", *options).returncode == 0
    lines: list[dict[str, Any]] = list(map(json.loads, file.read_text().splitlines()))
    file.write_text("".join(json.dumps({**line, "kept": True}) + "\n" for line in lines))
    options[1] = "numbers=[5]"
    for resume, kept in (("true", [True] * 3), ("false", [False, False, True])):
        assert call_script("compare_approximations.py", *options, f"resume={resume}").returncode == 0
        written = list(map(json.loads, file.read_text().splitlines()))
        assert [line["numbers"] for line in written] == [49, 5, 8]
        assert ["kept" in line for line in written] == kept
    lines[1]["layer"] = "features.3"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(text)
    for resume in ("true", "false"):
        done = call_script("compare_approximations.py", *options, f"resume={resume}")
        assert done.returncode == 2 and "has approximations with other layer; set file=<another file>" in done.stderr
    assert file.read_text() == text


def test_classes_that_imagenet_or_the_weights_lack_are_named(
    tmp_path: Path, call_script: RunScript, imagenet_options: list[str]
) -> None:
    overrides = imagenet_options[0]
    for pretrained, layers in (
        ("false", "all layers are"),
        (str(tmp_path / "two.safetensors"), "classifier.1 would be"),
    ):
        save_file(torchvision.models.squeezenet1_0(num_classes=2).state_dict(), tmp_path / "two.safetensors")
        other = overrides.replace(str(tmp_path / "net.safetensors"), pretrained)
        done = call_script("compare_approximations.py", other, *imagenet_options[1:])
        message = "it needs pretrained weights with ImageNet's 1000 classes, but"
        assert done.stderr.splitlines()[-1] == f"error: classes=imagenet is invalid: {message} {layers} random"
    for split in ("train", "test"):
        (tmp_path / "images" / split / "parachute").rename(tmp_path / "images" / split / "dodo")
    done = call_script("compare_approximations.py", *imagenet_options)
    assert done.stderr.splitlines()[-1].startswith(
        "error: classes=imagenet is invalid: class 'dodo' is none of ImageNet's"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layer=fc1"], "layer=fc1 is invalid: it is not a plain convolution of the network"),
        (
            ["layer=conv1", 'overrides=["data=digits","model=ana_lenet","arrangement.conv1=G6"]'],
            "layer=conv1 is invalid: it is not a plain convolution of the network",
        ),
        (["layer=conv2", "features=layer9"], "features=layer9 is invalid: it is not a layer of the network"),
        (["layer=conv2", "features=fc1"], "features=fc1 is invalid: its output has no height and width"),
        (["layer=conv2", "features=conv1"], "features=conv1 is invalid: it should come after layer=conv2"),
    ],
)
def test_invalid_layer_is_named(tmp_path: Path, options: list[str], message: str, call_script: RunScript) -> None:
    defaults = [] if any("overrides" in option for option in options) else ['overrides=["data=digits","model=lenet"]']
    done = call_script("compare_approximations.py", *defaults, *options, f"file={tmp_path}/lines.jsonl")
    assert (done.returncode, done.stderr.splitlines()) == (2, [f"error: {message}"])
