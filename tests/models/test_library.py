"""Networks of torchvision and timm: parameter counts, pretrained weights and their errors."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import acl
import models
from models.library import find_imagenet_labels, find_random_layers, load_weights, read_kernels

OPTIONS = {"scale": "unit"}


@pytest.mark.parametrize(
    ("arrangement", "conv1"), [("G192", 768), ("G64 Lg32 Lt16 Tf64 Ts16", 544), ("G30 Lg15 Lt15 Tf30 Ts6 P96", 4962)]
)
def test_resnet50_first_layer_has_expected_parameter_count(arrangement: str, conv1: int) -> None:
    plain = models.create_model("resnet50", 3, 102, {})
    analytic = models.create_model("resnet50", 3, 102, {"first": arrangement}, OPTIONS)
    assert sum(p.numel() for p in plain.conv1.parameters()) == 9408
    assert sum(p.numel() for p in analytic.conv1.parameters()) == conv1
    difference = np.subtract(models.count_parameters(plain), models.count_parameters(analytic))
    assert list(difference) == [9408 - conv1] * 2


def test_alexnet_first_layer_has_expected_parameter_count() -> None:
    analytic = models.create_model("alexnet", 3, 10, {"first": "G30 Lg15 Lt15 Tf30 Ts6 P96"}, OPTIONS)
    assert sum(p.numel() for p in analytic.features[0].parameters()) == 258 + 96 * 121 + 64


def test_timm_network_takes_any_number_of_channels_and_classes() -> None:
    model = models.create_model("timm/mobilenetv3_small_050", 1, 7, {"first": "G100%"}, OPTIONS)
    assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 7)


def test_unknown_timm_model_lists_similar_names() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'resnet51'; similar names: resnet"):
        models.create_model("timm/resnet51", 3, 7, {})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_pretrained_weights_load_from_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    source = torchvision.models.resnet18(num_classes=5)
    state = source.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, file)
    same = models.create_model("resnet18", 3, 5, {}, pretrained=str(file))
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), state.values(), strict=True))
    other = models.create_model("resnet18", 3, 10, {"first": "G96 P96"}, OPTIONS, pretrained=str(file))
    assert other.fc.weight.shape == (10, 512)
    assert torch.equal(other.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(other.conv1.weight[32:], source.conv1.weight[32:])
    with pytest.raises(
        ValueError, match=rf"{file} does not match the architecture of AlexNet: features.0.weight is missing"
    ):
        models.create_model("alexnet", 3, 5, {}, pretrained=str(file))
    with pytest.raises(
        ValueError, match=r"does not match the architecture of ResNet: layer1.0.conv1.weight is \(64, 64, 3, 3\), not"
    ):
        models.create_model("resnet50", 3, 5, {}, pretrained=str(file))


def make_small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def add_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()}


CHECKPOINTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "plain": lambda state, other: state,
    "module": lambda state, other: add_prefix(state, "module."),
    "_orig_mod": lambda state, other: add_prefix(state, "_orig_mod."),
    "compiled DDP": lambda state, other: add_prefix(state, "_orig_mod.module."),
    "DDP of compiled": lambda state, other: {"model": add_prefix(state, "module._orig_mod."), "epoch": 3},
    "model": lambda state, other: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "state_dict": lambda state, other: {"state_dict": add_prefix(state, "module."), "args": Namespace(lr=0.1)},
    "state_dict_ema": lambda state, other: {"state_dict": other, "state_dict_ema": state, "metric": 0.5},
    "model_ema": lambda state, other: {
        "model": other,
        "model_ema": {"n_averaged": torch.tensor(5), **add_prefix(state, "module.")},
    },
    "no averaged weights": lambda state, other: {"state_dict": state, "state_dict_ema": None},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("wrap", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_training_checkpoint_loads(
    tmp_path: Path, wrap: Callable[[dict[str, Any], dict[str, Any]], Any], suffix: str
) -> None:
    file, model, source = tmp_path / f"checkpoint{suffix}", make_small_network(), make_small_network()
    torch.save(wrap(source.state_dict(), make_small_network().state_dict()), file)
    load_weights(model, file)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_checkpoint_loads(tmp_path: Path, prefix: str) -> None:
    file, model, source = tmp_path / "net.safetensors", make_small_network(), make_small_network()
    save_file(add_prefix(source.state_dict(), prefix), file)
    load_weights(model, file)
    assert torch.equal(model[0].weight, source[0].weight)


def test_plain_network_written_by_acl_save_loads(tmp_path: Path) -> None:
    model, source = make_small_network(), make_small_network()
    acl.save(source, tmp_path / "net.safetensors", {"epochs": 3})
    load_weights(model, tmp_path / "net.safetensors")
    assert torch.equal(model[0].weight, source[0].weight)


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, {"net": {}}, [1], 5, {"state_dict": [1]}, {"model": {"a": {}}}], ids=str
)
def test_checkpoint_without_state_dict_is_rejected(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"cannot read weights from .*net\.pth: ") as error:
        load_weights(make_small_network(), tmp_path / "net.pth")
    assert "\n" not in str(error.value)


def test_npy_file_loads_into_first_convolution_of_its_shape(tmp_path: Path) -> None:
    file = tmp_path / "conv1.npy"
    weight = np.random.default_rng(0).normal(size=(64, 3, 7, 7)).astype(np.float32)
    np.save(file, weight)
    model = models.create_model("resnet18", 3, 5, {}, pretrained=str(file))
    assert torch.equal(model.conv1.weight, torch.from_numpy(weight))
    np.save(file, weight[:, :2])
    with pytest.raises(ValueError, match=r"no convolution has the shape \(64, 2, 7, 7\) of .*: conv1 \(64, 3, 7, 7\)"):
        models.create_model("resnet18", 3, 5, {}, pretrained=str(file))


def test_home_folder_in_path_of_weights_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "conv1.npy", np.ones((4, 3, 7, 7)))
    assert read_kernels(Path("~/conv1.npy")).shape == (4, 3, 7, 7)


def test_read_kernels_returns_float32_tensor(tmp_path: Path) -> None:
    file = tmp_path / "conv1.npy"
    weight = np.random.default_rng(0).normal(size=(4, 3, 7, 7))
    np.save(file, weight)
    assert torch.equal(read_kernels(file), torch.from_numpy(weight).float())
    with pytest.raises(ValueError, match=r"cannot read weights from none\.npy: there is no such file"):
        read_kernels(Path("none.npy"))


class FileOnUnpickling:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_unreadable_weights_are_rejected_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": FileOnUnpickling()}, "pickled.pth")
    np.save("pickled.npy", np.array([FileOnUnpickling()], dtype=object), allow_pickle=True)
    Path("truncated.safetensors").write_bytes(b"\0" * 20)
    for name in ("pickled.pth", "pickled.npy", "truncated.safetensors"):
        with pytest.raises(ValueError, match=f"cannot read weights from {name}") as error:
            models.create_model("resnet18", 3, 5, {}, pretrained=name)
        assert "\n" not in str(error.value)
    assert not Path("ran").exists()
    with pytest.raises(ValueError, match=r"cannot read weights from none\.pth: there is no such file"):
        models.create_model("resnet18", 3, 5, {}, pretrained="none.pth")
    with pytest.raises(
        ValueError, match=r"cannot read weights from 'conv1\.txt': its name must end in \.npy, \.safetensors"
    ):
        models.create_model("resnet18", 3, 5, {}, pretrained="conv1.txt")


def write_weights_without(tmp_path: Path, *layers: str, classes: int = 10) -> tuple[Path, dict[str, torch.Tensor]]:
    state = torchvision.models.resnet18(num_classes=classes).state_dict()
    state = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in layers}
    save_file(state, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors", state


def test_layers_that_file_lacks_start_at_random_on_request(tmp_path: Path) -> None:
    file, state = write_weights_without(tmp_path, "layer4", "fc")
    with pytest.raises(ValueError, match=r"layer4.0.conv1.weight is missing"):
        models.create_model("resnet18", 3, 7, {}, pretrained=str(file))
    options = {"pretrained": str(file), "random_layers": ["layer4", "fc"]}
    networks = [models.create_model("resnet18", 3, 7, {"first": "G96 P96"}, OPTIONS, **options) for _ in range(2)]
    assert all(torch.equal(networks[0].state_dict()[name], state[name]) for name in state if name != "conv1.weight")
    assert not torch.equal(networks[0].layer4[0].conv1.weight, networks[1].layer4[0].conv1.weight)
    assert find_random_layers(networks[0]) == ["layer4", "fc"]


@pytest.mark.parametrize(
    ("random_layers", "message"),
    [
        (["layer5"], "ResNet has no layer 'layer5' with weights; it has conv1, bn1, layer1, "),
        (["relu"], "ResNet has no layer 'relu' with weights"),
        (
            ["layer4", "fc", "layer3"],
            "has weights for layer3, which is listed as a layer that it lacks",
        ),
        (["fc"], "layer4.0.conv1.weight is missing"),
    ],
)
def test_wrong_random_layers_are_rejected(tmp_path: Path, random_layers: list[str], message: str) -> None:
    file, _ = write_weights_without(tmp_path, "layer4", "fc")
    with pytest.raises(ValueError, match=message):
        models.create_model("resnet18", 3, 7, {}, pretrained=str(file), random_layers=random_layers)


def test_random_layers_need_weights_from_a_file() -> None:
    with pytest.raises(ValueError, match=r"model.random_layers=\['fc'\] needs model.pretrained=<path>"):
        models.create_model("resnet18", 3, 7, {}, random_layers=["fc"])


def test_random_layers_of_other_networks(tmp_path: Path) -> None:
    assert find_random_layers(models.create_model("resnet18", 3, 10, {})) is None
    file, _ = write_weights_without(tmp_path)
    assert find_random_layers(models.create_model("resnet18", 3, 10, {}, pretrained=str(file))) == []
    assert find_random_layers(models.create_model("resnet18", 3, 7, {}, pretrained=str(file))) == ["fc"]
    np.save(tmp_path / "conv1.npy", np.zeros((64, 3, 7, 7), np.float32))
    model = models.create_model("resnet18", 3, 7, {}, pretrained=str(tmp_path / "conv1.npy"))
    assert find_random_layers(model) == ["bn1", "layer1", "layer2", "layer3", "layer4", "fc"]


def test_last_convolution_with_other_classes_is_random(tmp_path: Path) -> None:
    file, source = tmp_path / "net.safetensors", torchvision.models.squeezenet1_0(num_classes=9)
    save_file(source.state_dict(), file)
    same = models.create_model("squeezenet1_0", 3, 9, {}, pretrained=str(file))
    assert find_random_layers(same) == []
    assert torch.equal(same.classifier[1].weight, source.classifier[1].weight)
    other = models.create_model("squeezenet1_0", 3, 7, {"first": "G96 P192"}, OPTIONS, pretrained=str(file))
    assert find_random_layers(other) == ["classifier.1"]
    assert torch.equal(other.features[3].squeeze.weight, source.features[3].squeeze.weight)
    assert other.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_last_convolution_of_another_kernel_size_is_rejected(tmp_path: Path) -> None:
    state = torchvision.models.squeezenet1_0(num_classes=7).state_dict()
    state["classifier.1.weight"] = torch.zeros(7, 512, 3, 3)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"classifier.1.weight is \(7, 512, 3, 3\), not \(7, 512, 1, 1\)"):
        models.create_model("squeezenet1_0", 3, 7, {}, pretrained=str(tmp_path / "net.safetensors"))


def test_labels_of_imagenet_are_found_by_id_and_by_name() -> None:
    assert find_imagenet_labels(["n03888257", "tench", "crane bird", "n01440764"]) == [701, 0, 134, 0]
    with pytest.raises(ValueError, match=r"class 'daisies' is none of ImageNet's"):
        find_imagenet_labels(["daisy", "daisies"])


def test_layers_beside_convolution_of_npy_file_are_random(tmp_path: Path) -> None:
    np.save(tmp_path / "conv1.npy", np.zeros((64, 3, 11, 11), np.float32))
    options: dict[str, Any] = {"pretrained": str(tmp_path / "conv1.npy")}
    model = models.create_model("alexnet", 3, 7, {}, **options)
    expected = ["features.3", "features.6", "features.8", "features.10", "classifier"]
    assert find_random_layers(model) == expected
    with pytest.raises(ValueError, match=r"conv1.npy holds one convolution's weight, so model.random_layers must be"):
        models.create_model("alexnet", 3, 7, {}, random_layers=["classifier"], **options)


def test_failed_download_error_names_file_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", raise_offline)
    with pytest.raises(ValueError) as error:
        models.create_model("resnet50", 3, 5, {}, pretrained=True)
    assert f"put resnet50-11ad3fa6.pth into {tmp_path}/checkpoints" in str(error.value)
    monkeypatch.setattr(timm, "create_model", raise_offline)
    with pytest.raises(
        ValueError, match=r"cannot load pretrained resnet18: .*timm/resnet18 on the Hugging Face hub.*\(OSError\)"
    ):
        models.create_model("timm/resnet18", 3, 5, {}, pretrained=True)


def test_torchvision_weights_load_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = torchvision.models.resnet18()
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / name)
    model = models.create_model("resnet18", 3, 5, {}, pretrained=True)
    assert torch.equal(model.conv1.weight, source.conv1.weight) and model.fc.weight.shape == (5, 512)


def test_torchvision_network_rejects_grayscale_images() -> None:
    with pytest.raises(ValueError, match="resnet18 takes images with 3 channels, not 1"):
        models.create_model("resnet18", 1, 10, {})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1j, 1e300])
def test_weights_that_are_not_finite_real_numbers_are_rejected(tmp_path: Path, value: complex) -> None:
    state = make_small_network().state_dict()
    dtype = torch.complex128 if isinstance(value, complex) else torch.float64
    state["0.weight"] = state["0.weight"].to(dtype)
    state["0.weight"][0, 0, 0, 1] = value
    torch.save(state, tmp_path / "net.pth")
    np.save(tmp_path / "net.npy", state["0.weight"].numpy())
    problem = "complex numbers" if isinstance(value, complex) else "numbers that are not finite in float32"
    for name, where in (("net.pth", "0.weight has "), ("net.npy", "it has ")):
        model = make_small_network()
        before = model[0].weight.clone()
        with pytest.raises(ValueError, match=f"cannot read weights from .*{name}: {where}{problem}") as error:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(error.value) and torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match=problem):
        read_kernels(tmp_path / "net.npy")


def test_checkpoint_with_other_objects_is_rejected_by_their_name(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    torch.save({"state_dict": make_small_network().state_dict(), "accuracy": np.float64(0.5)}, file)
    with pytest.raises(ValueError) as error:
        load_weights(make_small_network(), file)
    assert str(error.value).startswith(f"cannot read weights from {file}: weights_only=True blocked loading")
    assert "multiarray.scalar" in str(error.value) and str(error.value).endswith(". Save the state dict alone.")


def test_long_reason_for_unreadable_weights_is_cut_between_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("word " * 100)

    monkeypatch.setattr(np, "load", fail)
    (tmp_path / "net.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r": word( word)+ \.\.\.$"):
        read_kernels(tmp_path / "net.npy")
