"""acl.save and acl.load: files that restore analytic layers, and refuse models that they do not match."""

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import acl
from acl import AnalyticConv2d, convert
from acl.kernels import FAMILIES, KINDS, PROFILES, analytic_kinds
from acl.options import Scale
from tests.arrangements import arrange_all_kinds


class ScaledConv2d(nn.Conv2d):
    """A convolution with a forward pass and a parameter of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


def make_network(dtype: torch.dtype | None = None, convolution: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(
        convolution(4, 8, 5, stride=2, padding=2, groups=2),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False, padding_mode="reflect", padding=1)),
    ).to(dtype)


def make_input(dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(2, 4, 12, 12, dtype=dtype)


def assert_same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    assert all(torch.equal(state[key], other_state[key]) for key in state)
    assert torch.equal(model.eval()(x), other.eval()(x))


def set_metadata(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the description of the layers in a file."""
    description = acl.read_info(file)
    changed = change(description)
    save_file(load_file(file), file, {"acl": json.dumps(description if changed is None else changed)})


options = st.fixed_dictionaries(
    {
        "scale": st.sampled_from(get_args(Scale)),
        "amplitude": st.booleans(),
        "family": st.sampled_from(FAMILIES),
        "profile": st.sampled_from(PROFILES),
        "learn": st.sampled_from(["all", "none"]),
    }
)


@st.composite
def arrangements(draw: st.DrawFn, slots: int) -> str:
    """Counts of random kinds in random order that fill a layer."""
    symbols = draw(st.permutations(list(KINDS)))[: draw(st.integers(1, len(KINDS)))]
    cuts = sorted(draw(st.lists(st.integers(0, slots), min_size=len(symbols) - 1, max_size=len(symbols) - 1)))
    counts = [end - start for start, end in zip([0, *cuts], [*cuts, slots], strict=True)]
    return " ".join(f"{symbol}{count}" for symbol, count in zip(symbols, counts, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrangements(16),
    arrangements(48),
    options,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
def test_load_restores_saved_network(
    tmp_path: Path, first: str, second: str, options: dict[str, Any], dtype: torch.dtype, freezes_theta: bool
) -> None:
    file, x = tmp_path / "net.safetensors", make_input(dtype)
    model = convert(make_network(dtype), {"0": first, "2.1": second}, **options)
    for layer in acl.analytic_layers(model).values():
        for key, akp in layer.raw.items():
            akp.requires_grad_(akp.requires_grad and not (freezes_theta and key.endswith("theta")))
    acl.save(model, file)
    plain = make_network(dtype)
    loaded = acl.load(plain, file)
    assert loaded is plain
    assert_same(model, loaded, x)
    for layer, other in zip(acl.analytic_layers(model).values(), acl.analytic_layers(loaded).values(), strict=True):
        assert repr(layer) == repr(other)
        assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in other.parameters()]
    assert acl.serialize(loaded) == file.read_bytes()
    converted = convert(make_network(dtype), {"0": first, "2.1": second}, **options)
    assert_same(model, acl.load(converted, file), x)


def test_file_holds_plain_state_dict(tmp_path: Path) -> None:
    model = convert(make_network(), "all", arrange_all_kinds())
    acl.save(model, tmp_path / "net.safetensors", {"epochs": 3})
    state = load_file(tmp_path / "net.safetensors")
    expected = model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_read_info_returns_info_and_specifications(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    acl.save(convert(make_network(), "2.1", "G24 P24", amplitude=True), file, {"epochs": 3, "names": ["a", None]})
    description = acl.read_info(file)
    assert description["info"] == {"epochs": 3, "names": ["a", None]}
    assert list(description["layers"]) == ["2.1"]
    layer = description["layers"]["2.1"]
    assert layer["arrangement"] == "G24 P24" and layer["amplitude"] is True and layer["kernel_size"] == [3, 3]


def test_equal_models_give_equal_bytes() -> None:
    model = convert(make_network(), "all", "G50% P50%")
    contents = {acl.serialize(m, {"b": 1, "a": 2}) for m in (model, copy.deepcopy(model))}
    contents.add(acl.serialize(model.to(memory_format=torch.channels_last), {"a": 2, "b": 1}))
    assert len(contents) == 1
    model[0].options = replace(model[0].options, scale="raw")
    assert acl.serialize(model, {"a": 2, "b": 1}) not in contents


def test_placement_chosen_by_auto_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.safetensors"
    model = make_network()
    gabors = AnalyticConv2d(1, 8, 5, arrangement="G8").weight.detach().flatten(0, 1)
    model[0].weight.data.flatten(0, 1)[::2] = gabors
    monkeypatch.setattr("acl.kind_search.STEPS", 10)
    convert(model, "0", "auto", tolerance=0.1, amplitude=True)
    assert model[0].placement is not None and "P" in model[0].slot_kinds and "G" in model[0].slot_kinds
    acl.save(model, file)
    loaded = acl.load(make_network(), file)
    assert loaded[0].slot_kinds == model[0].slot_kinds
    assert_same(model, loaded, make_input())
    with pytest.raises(ValueError, match="layer '0': has_placement is True in the file, but False in the model"):
        acl.load(convert(make_network(), "0", str(model[0].arrangement), amplitude=True), file)


@pytest.mark.parametrize("make_tied", [True, False])
def test_shared_layer_is_restored_in_shared_and_in_separate_layers(tmp_path: Path, make_tied: bool) -> None:
    def make(is_tied: bool) -> nn.Sequential:
        conv = nn.Conv2d(3, 3, 3, padding=1)
        return nn.Sequential(conv, nn.ReLU(), conv if is_tied else nn.Conv2d(3, 3, 3, padding=1))

    file = tmp_path / "net.safetensors"
    model = convert(make(True), "first", "G4 P5")
    acl.save(model, file)
    loaded = acl.load(make(make_tied), file)
    assert (loaded[0] is loaded[2]) == make_tied
    assert_same(model, loaded, torch.randn(1, 3, 8, 8))


def test_different_values_cannot_be_loaded_into_one_tensor(tmp_path: Path) -> None:
    acl.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "net.safetensors")
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' are one tensor in the model, but differ"):
        acl.load(nn.Sequential(linear, linear), tmp_path / "net.safetensors")


def test_tied_parameters_are_restored(tmp_path: Path) -> None:
    model = convert(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)), "all", "G2 P2")
    model[1].raw["G_theta"] = model[0].raw["G_theta"]
    model[2].bias = model[0].bias
    acl.save(model, tmp_path / "net.safetensors")
    plain = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    assert_same(model, acl.load(plain, tmp_path / "net.safetensors"), torch.randn(1, 2, 9, 9))


@pytest.mark.parametrize("host", ["timm", "own parameter"])
def test_subclass_of_convolution_keeps_its_forward_pass(tmp_path: Path, host: str) -> None:
    from timm.layers import Conv2dSame

    def make() -> nn.Sequential:
        return make_network(convolution=Conv2dSame if host == "timm" else ScaledConv2d)

    file = tmp_path / "net.safetensors"
    model = convert(make(), "0", "G8 P8")
    acl.save(model, file)
    loaded = acl.load(make(), file)
    assert type(loaded[0].host) is type(model[0].host) and type(loaded[0].host) is not nn.Conv2d
    assert_same(model, loaded, make_input())
    with pytest.raises(ValueError, match=r"layer '0': class is '.*' in the file, but 'Conv2d' in the model"):
        acl.load(make_network(), file)


def test_single_layer_is_restored(tmp_path: Path) -> None:
    layer = AnalyticConv2d(3, 4, 5, arrangement="G6 Tf6", stride=(1, 2), padding="valid")
    acl.save(layer, tmp_path / "layer.safetensors")
    loaded = acl.load(nn.Conv2d(3, 4, 5, stride=(1, 2), padding="valid"), tmp_path / "layer.safetensors")
    assert isinstance(loaded, AnalyticConv2d)
    assert_same(layer, loaded, torch.randn(1, 3, 9, 9))


def test_load_keeps_mode_memory_format_frozen_parameters_and_hooks(tmp_path: Path) -> None:
    acl.save(convert(make_network(), "all", "G50% P50%"), tmp_path / "net.safetensors")
    model, calls = make_network().eval().to(memory_format=torch.channels_last), []
    model[0].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    acl.load(model, tmp_path / "net.safetensors")(make_input())
    assert calls == [1] and not model[0].training
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].plain.requires_grad and model[2][1].plain.requires_grad


def test_plain_network_is_saved_and_loaded(tmp_path: Path) -> None:
    model, other = make_network(), make_network()
    acl.save(model, tmp_path / "net.safetensors")
    assert_same(model, acl.load(other, tmp_path / "net.safetensors"), make_input())


def test_analytic_model_keeps_its_choice_of_trained_akps(tmp_path: Path) -> None:
    acl.save(convert(make_network(), "0", "G16"), tmp_path / "net.safetensors")
    model = acl.load(convert(make_network(), "0", "G16", learn="none"), tmp_path / "net.safetensors")
    assert not any(p.requires_grad for p in acl.akp_parameters(model))


def make_changed_network(index: int, layer: nn.Module) -> nn.Sequential:
    model = make_network()
    model[index] = layer
    return model


MISMATCHES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "stride": (
        lambda: make_changed_network(0, nn.Conv2d(4, 8, 5, stride=1, padding=2, groups=2)),
        r"layer '0': stride is [2, 2] in the file, but [1, 1] in the model",
    ),
    "channels": (
        lambda: make_changed_network(0, nn.Conv2d(3, 8, 5)),
        "layer '0': in_channels is 4 in the file, but 3 in the model",
    ),
    "bias": (
        lambda: make_changed_network(0, nn.Conv2d(4, 8, 5, stride=2, padding=2, groups=2, bias=False)),
        "layer '0': bias is True in the file, but False in the model",
    ),
    "no convolution": (
        lambda: make_changed_network(0, nn.Linear(3, 3)),
        "layer '0' is a convolution in the file, but of type Linear in the model",
    ),
    "no layer": (lambda: nn.Sequential(nn.Flatten()), "is a convolution in the file, but"),
    "other order": (
        lambda: convert(make_network(), "0", "P8 G8"),
        "layer '0': arrangement is 'G8 P8' in the file, but 'P8 G8' in the model",
    ),
    "scale": (lambda: convert(make_network(), "0", "G8 P8", scale="raw"), "scale is 'unit' in the file, but 'raw'"),
    "profile": (
        lambda: convert(make_network(), "0", "G8 P8", profile="linear"),
        "profile is 'exponential' in the file",
    ),
    "amplitude": (lambda: convert(make_network(), "0", "G8 P8", amplitude=True), "amplitude is False in the file"),
    "analytic only in the model": (
        lambda: convert(make_network(), {"0": "G8 P8", "2.1": "G48"}),
        "layer '2.1' is plain or missing in the file, but analytic in the model",
    ),
    "shape": (
        lambda: make_changed_network(1, nn.BatchNorm2d(5)),
        "tensor '1.weight' is (8,) in the file, but (5,) in the model",
    ),
    "missing tensor": (
        lambda: nn.Sequential(*make_network(), nn.Linear(2, 2)),
        "has no tensor '3.weight'",
    ),
    "unknown tensor": (lambda: make_network()[:2], "has a tensor '2.1.weight', but the model has none"),
    "parametrized": (
        lambda: make_changed_network(
            0, nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 5, stride=2, padding=2, groups=2))
        ),
        "layer '0': class is 'Conv2d' in the file",
    ),
    "meta": (lambda: make_network().to("meta"), "is on the meta device; call to_empty"),
}


@pytest.mark.parametrize(("make_model", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_load_refuses_model_that_does_not_match_and_leaves_it_unchanged(
    tmp_path: Path, make_model: Callable[[], nn.Module], message: str
) -> None:
    file = tmp_path / "net.safetensors"
    acl.save(convert(make_network(), "0", "G8 P8"), file)
    model = make_model()
    modules, tensors = list(model.modules()), dict(model.state_dict(keep_vars=True))
    values = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        acl.load(model, file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert list(map(id, model.modules())) == list(map(id, modules))
    after = model.state_dict(keep_vars=True)
    assert after.keys() == tensors.keys() and all(after[key] is tensors[key] for key in tensors)
    assert all(tensor.is_meta or torch.equal(tensor, values[key]) for key, tensor in after.items())


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    file, model = tmp_path / "layer.safetensors", nn.Conv2d(1, 2, 3)
    content = acl.serialize(AnalyticConv2d(1, 2, 3, arrangement="G2"))
    for length in [*range(0, len(content), 37), len(content) - 1]:
        file.write_bytes(content[:length])
        for read in (lambda: acl.load(model, file), lambda: acl.read_info(file)):
            with pytest.raises(ValueError, match="cannot read") as error:
                read()
            assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_file_of_torch_save_is_refused(tmp_path: Path) -> None:
    torch.save(make_network().state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: it is no complete safetensors file, as acl\.save writes"):
        acl.load(make_network(), tmp_path / "net.pth")


def test_file_without_description_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    save_file(make_network().state_dict(), file)
    with pytest.raises(ValueError, match=r"net\.safetensors does not describe its layers; .* load_state_dict"):
        acl.load(make_network(), file)
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match=f"cannot read {path}"):
            acl.read_info(path)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda description: [],
    "number": lambda description: 1,
    "no layers": lambda description: description.pop("layers") and None,
    "list of layers": lambda description: description.update(layers=[1]),
    "no specification": lambda description: description["layers"].update({"0": None}),
    "newer format": lambda description: description.update(format=2),
    **{
        f"{field} {value!r}": lambda description, field=field, value=value: description["layers"]["0"].update(
            {field: value}
        )
        for field in ("arrangement", "scale", "amplitude", "family", "learn", "has_placement", "stride", "class", "new")
        for value in (None, 7, "x", ["G_x"], {})
    },
    "auto": lambda description: description["layers"]["0"].update(arrangement="auto"),
    "shares": lambda description: description["layers"]["0"].update(arrangement="G50% P50%"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_description_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file, model = tmp_path / "net.safetensors", make_network()
    acl.save(convert(make_network(), "0", "G8 P8"), file)
    set_metadata(file, change)
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        acl.load(model, file)
    assert "\n" not in str(error.value) and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("placement", [torch.zeros(9), torch.zeros(9, dtype=torch.long), torch.arange(3), None])
def test_invalid_placement_is_refused(tmp_path: Path, placement: Tensor | None) -> None:
    file = tmp_path / "layer.safetensors"
    layer = AnalyticConv2d(3, 3, 3, arrangement="G9", placement=torch.arange(9).flip(0))
    acl.save(layer, file)
    state = load_file(file)
    del state["placement_bits"]
    if placement is not None:
        state["placement_bits"] = placement
    save_file(state, file, {"acl": json.dumps(acl.read_info(file))})
    for model in (nn.Conv2d(3, 3, 3), copy.deepcopy(layer)):
        with pytest.raises(ValueError, match="placement"):
            acl.load(model, file)


class NetworkWithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"step": 1}


def test_save_rejects_what_the_format_cannot_hold(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    for info in ({1}, float("nan"), {"model": nn.Identity()}):
        with pytest.raises(ValueError, match="info must consist of what JSON can express"):
            acl.save(make_network(), file, info)
    with pytest.raises(ValueError, match="cannot save _extra_state: it is a dict, not a tensor"):
        acl.save(NetworkWithExtraState(1, 1), file)
    for model in (nn.LazyLinear(1), nn.Linear(1, 1, device="meta")):
        with pytest.raises(ValueError, match="cannot save weight: it has no values yet"):
            acl.save(model, file)
    assert not file.exists()


def test_failed_write_keeps_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.safetensors"
    acl.save(make_network(), file)
    content = file.read_bytes()

    def fill_disk(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match="no space left"):
        acl.save(make_network(), file)
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]


def test_every_kind_survives_save_and_load(tmp_path: Path) -> None:
    slots = 2 * len(analytic_kinds())
    layer = AnalyticConv2d(2, slots // 2, 5, arrangement=" ".join(f"{symbol}2" for symbol in analytic_kinds()))
    acl.save(layer, tmp_path / "layer.safetensors")
    assert_same(layer, acl.load(nn.Conv2d(2, slots // 2, 5), tmp_path / "layer.safetensors"), torch.randn(1, 2, 9, 9))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("arrangement", ["P9", "G9"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, AveragedModel], ids=lambda wrap: wrap.__name__)
def test_file_of_wrapped_model_is_loaded(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], arrangement: str, nested: bool
) -> None:
    model = acl.convert(nn.Conv2d(3, 3, 3), "all", arrangement)
    if nested:
        model = nn.Sequential(model)
    acl.save(wrap(nn.DataParallel(model) if nested else model), tmp_path / "wrapped.safetensors")
    plain = nn.Conv2d(3, 3, 3)
    loaded = acl.load(nn.Sequential(plain) if nested else plain, tmp_path / "wrapped.safetensors")
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(loaded(x), model(x))


def test_sparse_tensor_cannot_be_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match="cannot save mask: it is sparse"):
        acl.save(model, tmp_path / "sparse.safetensors")


def test_save_writes_into_pipe_and_to_target_of_symlink(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    link, target, pipe = tmp_path / "link", tmp_path / "folder/target", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to("folder/target")
    acl.save(model, link)
    assert link.is_symlink() and target.read_bytes() == acl.serialize(model) and not target.is_symlink()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    acl.save(model, pipe)
    assert os.read(reader, 10**5) == acl.serialize(model) and pipe.is_fifo()
    os.close(reader)
    assert {path.name for path in tmp_path.rglob("*")} == {"link", "folder", "target", "pipe"}


def test_save_to_read_only_folder_names_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    def fail_to_remove(*_: object, **__: object) -> None:
        raise OSError(30, "cannot remove")

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(Path, "unlink", fail_to_remove)
    with pytest.raises(OSError, match="Read-only file system"):
        acl.save(nn.Conv2d(1, 2, 3), tmp_path / "file")


@pytest.mark.parametrize("arrangement", ["G4 P4", "G8", "P8"])
@pytest.mark.parametrize("per", ["kernel", "filter"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layer_follows_dtype_and_device_of_an_assigned_state(arrangement: str, per: Any, device: str) -> None:
    channels = 2 if per == "kernel" else 8
    options: dict[str, Any] = {"arrangement": arrangement, "per": per, "bias": False}
    source = AnalyticConv2d(1 if per == "filter" else 4, channels, 3, **options).to(torch.bfloat16).eval()
    layer = AnalyticConv2d(source.in_channels, channels, 3, device=device, **options).eval()
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, source.in_channels, 6, 6, dtype=torch.bfloat16)
    assert torch.equal(layer(x), source(x)) and layer.weight.dtype == torch.bfloat16
    assert layer.to("cpu").float().weight.dtype == torch.float32
