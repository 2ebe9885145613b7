"""docs/explorer.html in a browser, which is started once: its formulas, arrangements and files are those of ``acl``."""

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as serialize_tensors
from torch import Tensor, nn
from torch.nn import functional as F

import acl
from acl import AnalyticConv2d, Arrangement, Fit, Metric
from acl.fit_result import KernelFit, make_plain_fit
from acl.kernels import FAMILIES, KINDS, PROFILES, analytic_kinds
from acl.plot import get_slot_kernels
from models.lenet import LeNet
from tests.browser import needs_chromium, run_in_browser
from training.loop import snapshot_akps

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "explorer.html").read_text(encoding="utf-8")
SIZES = ((7, 7), (4, 6), (5, 3), (1, 1))
KERNELS_PER_LAYER = 6
WEIGHTS = sorted((ROOT / "results" / "weights").glob("*.safetensors"))
FITS = sorted((ROOT / "results" / "approximation").glob("*.json"))
LAYERS = {
    "placed": {"arrangement": Arrangement.parse("G5 Lt4 P3"), "placement": torch.arange(12).flip(0), "amplitude": True},
    "filters": {
        "arrangement": "Ts1 P1 G2",
        "per": "filter",
        "family": "extended",
        "placement": torch.tensor([2, 0, 3, 1]),
    },
    "grouped": {"arrangement": "Tf50% Lg50%", "groups": 3, "scale": "raw", "profile": "linear", "out_channels": 6},
    "module.gaussian": {"arrangement": "Ts12", "profile": "gaussian"},
}
DTYPES = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
ARRANGEMENTS = [
    ("G30 Lg15 Lt15 Tf30 Ts6 P96", 3, 64, "kernel"),
    ("G30_Lg15_Lt15_Tf30_Ts6_P96", 3, 64, "kernel"),
    ("P2 G+1", 3, 1, "kernel"),
    ("G0 P3.0", 3, 1, "kernel"),
    ("G50% P50%", 6, 16, "kernel"),
    ("Ts33.3% G33.3% P33.4%", 2, 5, "kernel"),
    ("Lg12.5% G87.5%", 7, 9, "filter"),
    ("G30% Lg30% P40%", 1, 1, "kernel"),
    ("", 3, 64, "kernel"),
    ("  ", 3, 64, "kernel"),
    ("auto", 3, 64, "kernel"),
    ("G30", 3, 64, "kernel"),
    ("G30 P_100", 3, 64, "kernel"),
    ("G200", 3, 64, "filter"),
    ("G30 X162", 3, 64, "kernel"),
    ("g192", 3, 64, "kernel"),
    ("toString192", 3, 64, "kernel"),
    ("G96 G96", 3, 64, "kernel"),
    ("G-1 P193", 3, 64, "kernel"),
    ("G1.5 P190.5", 3, 64, "kernel"),
    ("G-5% P105%", 3, 64, "kernel"),
    ("G50% P96", 3, 64, "kernel"),
    ("G50% P40%", 3, 64, "kernel"),
    ("G33.3% P66.6%", 3, 64, "kernel"),
    ("G1e2", 3, 64, "kernel"),
    ("30G", 3, 64, "kernel"),
    ("G99999999999999999999", 3, 64, "kernel"),
]
COUNTED = [  # arrangement, per, family, amplitude
    ("G30 Lg15 Lt15 Tf30 Ts6 P96", "kernel", "paper", False),
    ("G50% Tf25% P25%", "kernel", "extended", True),
    ("G50% Tf25% P25%", "filter", "extended", False),
    ("G50% Ts50%", "filter", "paper", False),
]


def make_layer(
    kind: str, family: str, profile: str, scale: str, size: tuple[int, int], amplitude: bool
) -> AnalyticConv2d:
    """A layer of kernels of one kind whose AKPs are also far from their initial ranges."""
    arrangement, count = f"{kind}{KERNELS_PER_LAYER}", KERNELS_PER_LAYER
    options: Any = {"family": family, "profile": profile, "scale": scale, "amplitude": amplitude}
    layer = AnalyticConv2d(3, count // 3, size, arrangement=arrangement, dtype=torch.float64, **options)
    akps = {}
    for akp in KINDS[kind].akps(family, amplitude):
        low, high = akp.init_range(max(size))
        values = torch.empty(count, dtype=torch.float64).uniform_(2 * low - high - 1, 2 * high - low + 1)
        akps[akp.name] = values if akp.floor is None else akp.floor + 0.01 + (values - akp.floor).abs()
    layer.set_akps(kind, akps)
    return layer


def describe_kernel(layer: AnalyticConv2d, kind: str, index: int) -> dict[str, Any]:
    options = {name: getattr(layer.options, name) for name in ("family", "profile", "scale", "per")}
    channels, akps = layer.in_channels // layer.groups, layer.akps()[kind]
    gains = {"gains": layer.gains_of(kind)[index].tolist()} if layer.options.per == "filter" else {}
    values = {name: akp[index].item() for name, akp in akps.items()}
    return {"kind": kind, "akps": values, "size": layer.kernel_size, "channels": channels, **options, **gains}


@pytest.fixture(scope="module")
def layers() -> list[tuple[str, AnalyticConv2d]]:
    torch.manual_seed(0)
    return [
        (kind, make_layer(kind, *options, amplitude=i % 2 == 0))
        for kind, item in analytic_kinds().items()
        for i, options in enumerate(
            itertools.product(FAMILIES, PROFILES if item.takes_profile else PROFILES[:1], ("unit", "raw"), SIZES)
        )
    ]


def make_network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, options in LAYERS.items():
        shape: dict[str, Any] = {"in_channels": 3, "out_channels": 4, "kernel_size": 5}
        parent, _, child = name.rpartition(".")
        layer = AnalyticConv2d(**shape | options)
        net.add_module(parent or child, nn.ModuleDict({child: layer}) if parent else layer)
    net.add_module("plain", nn.Conv2d(3, 2, 3))
    return net.to(dtype)


def make_fit() -> Fit:
    """A fit of filters, with a plain one."""
    torch.manual_seed(0)
    akps = {"theta": 1.0, "wavelength": 4.0, "psi": 0.5, "sigma": 1.5}
    fits = (
        KernelFit("G", akps, (0.5, -2.0), 0.9),
        make_plain_fit(torch.randn(2, 5, 5), 1.0),
        KernelFit("Lg", {"sigma": 1.0}, (1.0, 3.0), 0.8),
    )
    metric = Metric.create("images", 2, (5, 5))
    return Fit((3, 2, 5, 5), "filter", "paper", "exponential", metric, {}, False, (1.0, 2.0, 3.0), fits, {"G": fits})


def make_damaged_files() -> dict[str, tuple[bytes, str]]:
    """Files by name, with what is wrong with them."""
    layer = AnalyticConv2d(1, 2, 3, arrangement="G2")
    content = acl.serialize(layer)
    layer.raw["G_psi"].data[1] = torch.nan
    return {
        "text.txt": (b"hello, world", "it is not in the safetensors format, or incomplete"),
        "short.safetensors": (b"12345", "it is not in the safetensors format, or incomplete"),
        "cut.safetensors": (content[:-4], "tensor 'raw.G_wavelength' lies outside the file"),
        "renamed.safetensors": (
            content.replace(b"raw.G_psi", b"raw.G_phi"),
            "tensor 'raw.G_psi' is missing or of another size",
        ),
        "newer.safetensors": (
            content.replace(b'\\"format\\": 1', b'\\"format\\": 2'),
            "its format is 2, and this page reads format 1",
        ),
        "wrong.safetensors": (
            content.replace(b"G2", b"G3"),
            "arrangement 'G3' has 3 kernels, but the layer has 2 (1 x 2)",
        ),
        "undefined.safetensors": (acl.serialize(layer), "tensor 'raw.G_psi' has values that are not finite"),
        "linear.safetensors": (
            acl.serialize(nn.Linear(2, 3)),
            "it has no convolution with kernels of more than one pixel",
        ),
        "text.json": (b"{", "acl did not write it ("),
        "other.json": (b"{}", "acl did not write it ("),
    }


def make_original() -> Tensor:
    """A weight that a committed fit can approximate: its kernels have the energies of the fit's targets."""
    fit = Fit.from_json(FITS[0].read_text())
    kernels = torch.arange(1.0, 9409).view(192, 7, 7)
    return (
        kernels / kernels.flatten(1).norm(dim=1)[:, None, None] * torch.tensor(fit.energies).sqrt()[:, None, None]
    ).view(fit.shape)


def encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def make_history(net: nn.Module) -> bytes:
    """AKPs over three epochs, the second of which is the network's."""
    return serialize_tensors({k: torch.stack([v + 0.25, v, v + 0.1]) for k, v in snapshot_akps(net).items()})


SCRIPT = Path(__file__).with_name("explorer.js").read_text(encoding="utf-8")
HASHES = {
    "size=7x7": "unknown kind ''; known: G, Lg, Lt, Tf, Ts, P",
    "kind=Lg": "sigma needs 1 finite numbers",
    "kind=Lg&sigma=x": "sigma needs 1 finite numbers",
    "kind=Lg&sigma=0.3": "sigma must be above 0.3 px, got 0.3",
    "kind=Lg&sigma=1&size=7": "size '7' must be rows x columns, as in 7x7",
    "kind=Lg&sigma=1&size=7x99": "size '7x99' must be from 1 to 63",
    "kind=P&weights=1,2": "weights needs 49 finite numbers",
    "kind=Lt&s=1&profile=cubic": "unknown profile 'cubic'; known: exponential, gaussian, linear",
}
COPIED = [
    ("F32.safetensors", "placed", 11),
    ("F32.safetensors", "filters", 1),
    ("F32.safetensors", "module.gaussian", 5),
    ("resnet18_conv1.json", "fit", 100),
    ("resnet18_conv1_paper.json", "fit", 191),
    ("filters.json", "fit", 2),
]
IMAGE = torch.linspace(-1, 2, 99, dtype=torch.float64).square().sin().view(9, 11)
START = {
    "kind": "Tf",
    "akps": {"theta": 1.25, "s": 2, "sigma": 0.75},
    "size": [9, 5],
    "profile": "linear",
    "scale": "raw",
}


@pytest.fixture(scope="module")
def outputs(layers: list[tuple[str, AnalyticConv2d]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    files = {path.name: path.read_bytes() for path in (*WEIGHTS, *FITS)}
    files |= {f"{name}.safetensors": acl.serialize(make_network(dtype)) for name, dtype in DTYPES.items()}
    files["filters.json"] = make_fit().to_json().encode()
    kernels = [describe_kernel(layer, kind, i) for kind, layer in layers for i in range(KERNELS_PER_LAYER)]
    network = make_network(torch.float32)
    inputs = {
        "kernels": kernels,
        "arrangements": ARRANGEMENTS,
        "counted": COUNTED,
        "image": IMAGE.tolist(),
        "damaged": {name: encode(content) for name, (content, _) in make_damaged_files().items()},
        "files": {name: encode(content) for name, content in files.items()},
        "copied": COPIED,
        "own": [*kernels[::100], describe_kernel(network.filters, "G", 1)],
        "history": encode(make_history(network)),
        "foreign": encode(make_history(make_network(torch.float32).requires_grad_(False).apply(resample))),
        "foreignOriginal": encode(serialize_tensors({"conv1.weight": torch.ones(64, 3, 7, 7)})),
        "original": encode(serialize_tensors({"conv1.weight": make_original()})),
        "hashes": list(HASHES),
    }
    script = f"const inputs = {json.dumps(inputs)};\n{SCRIPT}"
    url_hash = "#kind=Tf&theta=1.25&s=2&sigma=0.75&size=9x5&profile=linear&scale=raw"
    return json.loads(run_in_browser(PAGE, script, tmp_path_factory.mktemp("browser"), url_hash, width=500))


def resample(module: nn.Module) -> None:
    if isinstance(module, AnalyticConv2d):
        module.sample_akps()


def find_layers(net: nn.Module) -> dict[str, Tensor]:
    """The kernels of a network's convolutions in the order in which the page lists them, analytic ones first."""
    convs = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    ordered = sorted(convs, key=lambda name: not isinstance(convs[name], AnalyticConv2d))
    return {
        name: get_slot_kernels(conv) if isinstance(conv, AnalyticConv2d) else conv.weight.detach().flatten(0, 1)
        for name, conv in ((name, convs[name]) for name in ordered)
    }


def assert_same_layers(actual: list[tuple[str, Any]], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert sorted(name for name, _ in actual) == sorted(expected)
    for name, kernels in actual:
        values = torch.tensor(kernels).view_as(expected[name])
        torch.testing.assert_close(values, expected[name].float(), rtol=0, atol=tolerance, msg=name)


def test_page_forbids_requests_and_has_no_external_part() -> None:
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'' in PAGE
    assert not re.search(r"""\ssrc=|@import|url\(|<link(?! rel="icon" href="data:,")""", PAGE)


@needs_chromium
def test_kinds_are_those_of_python(outputs: dict[str, Any]) -> None:
    def describe(akps: Any) -> list[Any]:
        return [
            {"name": akp.name, "unit": akp.unit, "floor": akp.floor, "ranges": [akp.init_range(k) for k in (1, 5, 11)]}
            for akp in akps
        ]

    for (symbol, kind), (actual_symbol, actual) in zip(KINDS.items(), outputs["kinds"].items(), strict=True):
        assert (symbol, kind.name, kind.color) == (actual_symbol, actual["name"], actual["color"])
        assert kind.takes_profile == actual.get("takesProfile", False)
        assert kind.formula_template == actual.get("formula", "")
        assert kind.extended_template == actual.get("extendedFormula", "")
        for own, other in ((kind.paper_akps, actual["akps"]), (kind.extended_akps, actual["extendedAkps"])):
            assert json.loads(json.dumps(describe(own))) == other


@needs_chromium
def test_kernels_equal_those_of_python(layers: list[tuple[str, AnalyticConv2d]], outputs: dict[str, Any]) -> None:
    assert len(outputs["kernels"]) >= 500
    for key in ("kernels", "shared"):
        actual = iter(outputs[key])
        for kind, layer in layers:
            expected = layer.weight.detach().flatten(0, 1)
            values = torch.tensor([next(actual) for _ in range(KERNELS_PER_LAYER)], dtype=torch.float64)
            scale = expected.abs().max().item()
            torch.testing.assert_close(values.view_as(expected), expected, rtol=0, atol=1e-9 * max(1, scale), msg=kind)


@needs_chromium
def test_formulas_equal_those_of_python(layers: list[tuple[str, AnalyticConv2d]], outputs: dict[str, Any]) -> None:
    expected = [layer.formula(i) for _, layer in layers for i in range(KERNELS_PER_LAYER)]
    assert outputs["formulas"] == expected


@needs_chromium
def test_arrangements_are_filled_and_refused_as_in_python(outputs: dict[str, Any]) -> None:
    for (text, channels, out, per), actual in zip(ARRANGEMENTS, outputs["arrangements"], strict=True):
        try:
            expected: Any = [[*item] for item in Arrangement.parse(text).fill(channels, out, per=per).counts.items()]
        except ValueError as error:
            expected = str(error)
        assert actual == expected
    assert sum(isinstance(actual, str) for actual in outputs["arrangements"]) >= 12


@needs_chromium
def test_parameters_and_multiply_adds_are_those_of_a_layer(outputs: dict[str, Any]) -> None:
    for (text, per, family, amplitude), actual in zip(COUNTED, outputs["counts"], strict=True):
        options: Any = {"arrangement": text, "per": per, "family": family, "amplitude": amplitude}
        layer = AnalyticConv2d(3, 64, 7, padding=3, bias=False, **options)
        assert actual["parameters"] == sum(p.numel() for p in layer.parameters())
        assert actual["plainParameters"] == layer.weight.numel()
        inputs = torch.zeros(1, 3, 9, 9)
        assert f"{actual['multiplyAdds']:,}" == acl.summary(layer, inputs).split()[-1]
        is_factorable = per == "filter" and "P" not in layer.arrangement.counts
        assert (actual["factored"] is not None) == is_factorable
        if is_factorable:
            factored = AnalyticConv2d(3, 64, 7, padding=3, compute="factored", **options)
            assert f"{actual['factored']:,}" == acl.summary(factored, inputs).split()[-1]


@needs_chromium
def test_responses_and_spectrum_equal_those_of_torch(outputs: dict[str, Any]) -> None:
    for values, kernel in zip(outputs["responses"], outputs["kernels"], strict=False):
        size = next(size for size in SIZES if size[0] * size[1] == len(kernel))
        weight = torch.tensor(kernel, dtype=torch.float64).view(1, 1, *size)
        (top, bottom), (left, right) = (((k - 1) // 2, k // 2) for k in size)
        padded = F.pad(IMAGE[None, None], (left, right, top, bottom), mode="replicate")
        expected = F.conv2d(padded, weight)
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64).view_as(expected), expected, rtol=0, atol=1e-4
        )
    frequencies = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64)
    rows, columns = (torch.exp(-2j * torch.pi * torch.outer(frequencies, torch.arange(n))) for n in IMAGE.shape)
    spectrum = (rows @ IMAGE.to(rows.dtype) @ columns.T).abs()
    torch.testing.assert_close(torch.tensor(outputs["spectrum"], dtype=torch.float64).view(9, 9), spectrum)


@needs_chromium
def test_weights_of_every_dtype_give_the_kernels_of_the_network(outputs: dict[str, Any]) -> None:
    for name, dtype in DTYPES.items():
        expected = find_layers(make_network(dtype).float())
        assert_same_layers(outputs["files"][f"{name}.safetensors"], expected)


@needs_chromium
@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_committed_weights_show_their_mosaics(outputs: dict[str, Any], path: Path) -> None:
    assert_same_layers(outputs["files"][path.name], find_layers(acl.load(LeNet(), path)))


@needs_chromium
def test_fits_give_their_kernels(outputs: dict[str, Any]) -> None:
    for name, fit in {
        **{path.name: Fit.from_json(path.read_text()) for path in FITS},
        "filters.json": make_fit(),
    }.items():
        assert_same_layers(outputs["files"][name], {"fit": get_slot_kernels(fit.to_layer())})


@needs_chromium
def test_damaged_files_are_refused_by_name_in_one_line(outputs: dict[str, Any]) -> None:
    for (name, (_, reason)), message in zip(make_damaged_files().items(), outputs["damaged"], strict=True):
        assert message.startswith(f"cannot read {name}: {reason}") and "\n" not in message


@needs_chromium
def test_copied_python_sets_the_kernel_that_is_shown(
    outputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in FITS:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "filters.json").write_text(make_fit().to_json())
    cases = [*zip(COPIED, outputs["copied"], strict=True), *((("", "", 0), copied) for copied in outputs["own"])]
    for (_, _, slot), copied in cases:
        variables: dict[str, Any] = {"net": make_network(torch.float32)}
        exec(copied["python"], variables)
        kernel = get_slot_kernels(variables["layer"])[slot]
        values = torch.tensor(copied["values"], dtype=torch.float32).view_as(kernel)
        torch.testing.assert_close(values, kernel, rtol=1e-5, atol=1e-5)


@needs_chromium
def test_address_holds_the_kernel(outputs: dict[str, Any]) -> None:
    assert outputs["initial"] == outputs["initial"] | START
    assert outputs["address"].startswith("#kind=G&size=5x5&family=extended")
    assert all(f"&{name}={value}" in outputs["address"] for name, value in outputs["addressed"]["akps"].items())
    assert outputs["hashErrors"] == list(HASHES.values())


@needs_chromium
def test_history_shows_the_kernel_before_training(outputs: dict[str, Any]) -> None:
    note, changes, values = outputs["changes"]
    layer = make_network(torch.float32).get_submodule("placed")
    before = {name: akp[:1] + 0.25 for name, akp in layer.akps()["G"].items()}
    layer.set_akps("G", before, torch.tensor([0]))
    assert note == "F32.safetensors; epoch 1 of 2 in akps.safetensors"
    assert re.search(r"AKPbefore trainingherechange.*amplitude[\d.]+1-0.25$", changes)
    kernel = get_slot_kernels(layer)[11]
    torch.testing.assert_close(torch.tensor(values).view_as(kernel), kernel, rtol=0, atol=1e-5)
    assert outputs["foreign"] == "F32.safetensors; no epoch of other/akps.safetensors has these AKPs"


@needs_chromium
def test_original_of_a_fitted_kernel_is_beside_it(outputs: dict[str, Any]) -> None:
    title, values = outputs["original"]
    assert title == "conv1 in original.safetensors"
    torch.testing.assert_close(torch.tensor(values).view(7, 7), make_original().view(192, 7, 7)[5])


@needs_chromium
def test_controls_are_labeled_and_refuse_values_below_the_floor(outputs: dict[str, Any]) -> None:
    assert outputs["unlabeled"] == []
    assert outputs["tooLow"] == ["sigma must be above 0.3 px, got 0.2", 1]
    assert outputs["switched"]["kind"] == "Tf" and outputs["switched"]["akps"]["sigma"] == 1
    assert outputs["focused"] == "Gabor, output 1, input 0" and outputs["tabStops"] == 1


@needs_chromium
def test_page_fits_a_narrow_window(outputs: dict[str, Any]) -> None:
    assert outputs["overflow"] <= 0
