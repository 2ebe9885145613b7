"""acl.fit: kinds, AKPs and gains fitted to given kernels, and conversion with init="fit" and arrangement "auto"."""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import acl
from acl import AnalyticConv2d, Fit, Metric, convert, fit_kernels
from acl.fit_result import KernelFit
from acl.kernels import KINDS, analytic_kinds
from acl.metric import METRICS

PER_KIND = 6
"""Kernels of each analytic kind in ``make_convolution()``; a multiple of its 3 input channels."""
PIXELS = 7 * 7


@pytest.fixture
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the search, for tests that do not depend on the quality of the fit."""
    monkeypatch.setattr("acl.kind_search.STEPS", 5)


def sample_kernels(symbol: str, count: int, seed: int, family: str = "paper") -> Tensor:
    """(count, 1, 7, 7): kernels with random AKPs and gains."""
    torch.manual_seed(seed)
    kind = KINDS[symbol]
    kernels = kind.synthesize({akp.name: akp.sample(count, (7, 7)) for akp in kind.akps(family)}, (7, 7))
    return (kernels * torch.randn(count, 1, 1))[:, None]


def repeat_kinds(count: int) -> list[str]:
    """The symbol of each analytic kind, ``count`` times."""
    return [symbol for symbol in analytic_kinds() for _ in range(count)]


def compute_residuals(weight: Tensor, target: Tensor, metric: str) -> Tensor:
    """(slots,): the share of each target kernel's energy that the weight misses, in a metric."""
    kernels = [k.detach().flatten(0, 1)[:, None] for k in (target - weight, target)]
    error, energy = (Metric.create(metric, 1, tuple(target.shape[2:])).energies(k) for k in kernels)
    return error / energy


def test_fit_recovers_sampled_kernels() -> None:
    kinds = repeat_kinds(8)
    weight = torch.cat([sample_kernels(symbol, 8, 1) for symbol in analytic_kinds()])
    fit = fit_kernels(weight, progress=False)
    assert sum(kernel.r2 >= 0.999 for kernel in fit.kernels) >= 0.99 * len(kinds)
    torch.testing.assert_close(fit.weight(), weight, rtol=0, atol=0.05 * weight.abs().max().item())
    noisy = weight + 0.01 * weight.square().mean((1, 2, 3), keepdim=True).sqrt() * torch.randn_like(weight)
    fit = fit_kernels(noisy, progress=False)
    pairs = list(zip(fit.kernels, kinds, strict=True))
    at_least_as_good = [k.kind == kind or k.r2 >= fit.by_kind[kind][i].r2 for i, (k, kind) in enumerate(pairs)]
    assert sum(at_least_as_good) >= 0.95 * len(kinds)
    assert sum(kernel.kind == kind for kernel, kind in pairs) >= 0.95 * len(kinds)


def test_fit_recovers_sampled_extended_gabors() -> None:
    fit = fit_kernels(sample_kernels("G", 40, 2, "extended"), ["G"], "extended", progress=False)
    assert sum(kernel.r2 >= 0.999 for kernel in fit.kernels) >= 0.95 * 40


def test_more_kinds_or_akps_fit_at_least_as_well() -> None:
    torch.manual_seed(0)
    weight = nn.functional.interpolate(torch.randn(4, 2, 4, 4), (7, 7), mode="bilinear")
    options: dict[str, Any] = {"metric": "pixels", "progress": False}
    gabor = fit_kernels(weight, ["G"], **options)
    best = fit_kernels(weight, **options)
    isotropic = fit_kernels(weight, ["G"], "extended", fixed={"gamma": 1.0}, **options)
    extended = fit_kernels(weight, ["G"], "extended", **options)
    assert gabor.r2 <= best.r2
    assert gabor.r2 <= isotropic.r2 + 1e-3 and isotropic.r2 <= extended.r2 + 1e-3
    assert all(kernel.akps["gamma"] == 1.0 for kernel in isotropic.kernels)
    assert set(best.by_kind) == set(analytic_kinds()) and best.by_kind["G"] == gabor.kernels


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", acl.kernels.FAMILIES)
def test_r2_matches_fitted_weight(family: str, metric: str, channels: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(4, channels, 5, 5)
    fit = fit_kernels(weight, family=family, metric=metric, progress=False)
    residuals = compute_residuals(fit.weight(), weight, metric)
    r2 = torch.tensor([k.r2 for k in fit.kernels], dtype=torch.float64)
    torch.testing.assert_close(1 - residuals, r2, rtol=0, atol=1e-4)
    if channels == 2:  # errors of kernels are uncorrelated
        assert fit.r2 == pytest.approx(1 - acl.output_error(weight, fit.weight(), metric), abs=1e-4)


@pytest.mark.usefixtures("quick_search")
def test_fit_is_deterministic_and_keeps_global_random_state() -> None:
    weight = sample_kernels("Ts", 4, 3)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = fit_kernels(weight, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert fit_kernels(weight, progress=False) == first


@pytest.mark.usefixtures("quick_search")
def test_fit_does_not_depend_on_mode_or_default_dtype() -> None:
    weight = torch.cat([torch.randn(2, 2, 3, 3), torch.ones(1, 2, 3, 3)])
    expected = fit_kernels(weight, progress=False)
    expected_weight = expected.weight()
    with torch.inference_mode():
        assert fit_kernels(weight.clone(), progress=False) == expected
        assert torch.equal(expected.weight(), expected_weight)
    with torch.no_grad():
        assert fit_kernels(nn.Parameter(weight), progress=False) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert fit_kernels(weight, progress=False) == expected
        assert expected.weight().dtype == torch.float32 and torch.equal(expected.weight(), expected_weight)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("quick_search")
def test_kind_whose_akps_are_all_fixed_gets_only_gains() -> None:
    torch.manual_seed(0)
    fit = fit_kernels(torch.randn(2, 3, 5, 5), ["Lg"], fixed={"sigma": 1.0}, progress=False)
    assert [kernel.akps for kernel in fit.kernels] == [{"sigma": 1.0}] * 6
    assert len({kernel.gains for kernel in fit.kernels}) == 6


def test_fit_is_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 5, 5)
    expected = fit_kernels(weight, ["G"], progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert fit_kernels(weight, ["G"], progress=False).to_json() == expected.to_json()


def test_filters_cannot_have_positive_gains_alone() -> None:
    with pytest.raises(ValueError, match="signed=True needs per='kernel'"):
        fit_kernels(torch.randn(2, 3, 5, 5), ["G"], per="filter", signed=True, progress=False)


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("exponent", [-146, -139, -83, 100, 125])
def test_scale_of_kernel_changes_only_the_gain(exponent: int, signed: bool) -> None:
    factor = 2.0**exponent
    tiny = (torch.randn(2, 2, 3, 3).double() * factor).float()  # rounded to few bits if float32 is denormal there
    weight = (tiny.double() / factor).float()
    expected = fit_kernels(weight, signed=signed, progress=False)
    fit = fit_kernels(tiny, signed=signed, progress=False)
    for scaled, kernel in zip(fit.kernels, expected.kernels, strict=True):
        assert (scaled.kind, scaled.akps, scaled.r2) == (kernel.kind, kernel.akps, kernel.r2)
        ((gain,), (expected_gain,)) = scaled.gains, kernel.gains
        assert gain == expected_gain * factor and math.isfinite(gain)
    assert fit.r2 == pytest.approx(expected.r2, rel=1e-12) and 0 < fit.r2 <= 1
    assert Fit.from_json(fit.to_json()) == fit


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("factor", [1e-25, 1e-42, 1e30])
def test_tiny_and_huge_kernels_are_recovered(factor: float) -> None:
    weight = sample_kernels("Lg", 3, 9).sign() * sample_kernels("Lg", 3, 9).abs().clamp(min=1e-2)
    fit = fit_kernels(weight * factor, ["Lg"], progress=False)
    expected = fit_kernels(weight, ["Lg"], progress=False)
    assert [k.r2 for k in fit.kernels] == pytest.approx([k.r2 for k in expected.kernels], abs=0.02)
    assert fit.weight().isfinite().all()


def test_all_akps_fixed_fits_only_the_gain() -> None:
    sigma = torch.tensor([1.25], dtype=torch.float64)
    target = KINDS["Lg"].synthesize({"sigma": sigma}, (5, 5))[:, None].float() * -3
    (kernel,) = fit_kernels(target, ["Lg"], fixed={"sigma": 1.25}, progress=False).kernels
    assert kernel.akps == {"sigma": 1.25}
    assert kernel.gains == pytest.approx([-3]) and kernel.r2 == pytest.approx(1)


@pytest.mark.usefixtures("quick_search")
def test_akp_is_fixed_in_the_kinds_that_have_it() -> None:
    fit = fit_kernels(torch.randn(1, 2, 3, 3), fixed={"theta": 0.1}, progress=False)
    fixed = {symbol: {kernel.akps.get("theta") for kernel in kernels} for symbol, kernels in fit.by_kind.items()}
    for symbol, kind in analytic_kinds().items():
        assert fixed[symbol] == ({0.1} if "theta" in [akp.name for akp in kind.akps()] else {None})


@pytest.mark.usefixtures("quick_search")
def test_json_round_trip_restores_fit() -> None:
    weight = torch.cat([sample_kernels("G", 3, 4), torch.zeros(1, 1, 7, 7)])
    fit = fit_kernels(weight, progress=False)
    assert Fit.from_json(fit.to_json()) == fit


def make_fit() -> Fit:
    """A fit of one plain, one degenerate and two analytic kernels, made up so that no search is needed."""
    plain = KernelFit("P", {}, (), 1.0, (0.5, -1.0, 2.0, 0.25))
    constant = KernelFit("P", {}, (), None, (1.0, 1.0, 1.0, 1.0))
    log = KernelFit("Lg", {"sigma": 1.5}, (-2.0,), 0.5)
    edge = KernelFit("Tf", {"theta": 0.5, "s": 1.0, "sigma": 0.75}, (1e-30,), 0.0)
    by_kind = {"Lg": (log, constant, log, log), "Tf": (edge, constant, edge, edge)}
    metric = Metric.create(torch.eye(8), 2, (2, 2))
    options = ("kernel", "paper", "linear", metric, {"theta": 0.5}, False)
    return Fit((2, 2, 2, 2), *options, (1.0, 4.0, 0.0, 2.0), (log, constant, edge, plain), by_kind)


def list_nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(node for key, child in items for node in list_nodes(child, (*path, key)))]


VALUES = json.loads(make_fit().to_json())
REPLACEMENTS = [None, True, "x", "1", -1, 10**400, math.nan, math.inf, [], ["P"], {}, {"G": 1}]


def change_json(path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> str:
    """The JSON of ``make_fit()``; ``change`` gets the container at the end of the path, and the last key."""
    values = [copy.deepcopy(VALUES)]
    container: Any = values
    for key in (0, *path[:-1]) if path else ():
        container = container[key]
    change(container, path[-1] if path else 0)
    return json.dumps(values[0])


def test_json_of_made_up_fit_is_valid() -> None:
    assert Fit.from_json(make_fit().to_json()) == make_fit()


@pytest.mark.parametrize(
    "text", ["", "1", "null", "[]", '{"shape": 3}', "[" * 10**5, '{"shape":' * 10**5, None, b"\xff"]
)
def test_from_json_rejects_text_that_is_not_a_fit(text: str) -> None:
    with pytest.raises(ValueError, match="not a fit in JSON") as error:
        Fit.from_json(text)
    assert "\n" not in str(error.value)


def test_from_json_returns_usable_fit_or_names_problem() -> None:
    nodes = list_nodes(VALUES)[1:]
    changes = [change_json(path, lambda container, key: container.__delitem__(key)) for path in nodes]
    for k, path in enumerate(nodes):  # each place gets a few of the values, and each value a few of the places
        for replacement in REPLACEMENTS[k % 4 :: 4]:
            changes.append(change_json(path, lambda container, key, new=replacement: container.__setitem__(key, new)))
    for text in changes:
        try:
            fit = Fit.from_json(text)
        except ValueError as error:
            assert str(error).startswith("not a fit in JSON") and "\n" not in str(error)
        else:
            assert fit.weight().isfinite().all() and math.isfinite(fit.r2 or 0.0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kernels", 0, "akps", "sigma"), 0.3),
        (("kernels", 0, "kind"), "G"),
        (("by_kind", "Lg", 0, "kind"), "Tf"),
        (("shape",), [4, 4, 2, 2]),
        (("shape", 0), 2.0),
        (("family",), "extended"),
        (("fixed",), 3),
        (("fixed",), {"sigma": "wide"}),
        (("fixed",), {"width": 1.0}),
        (("signed",), "no"),
    ],
    ids=str,
)
def test_from_json_rejects_value_that_contradicts_the_rest(path: tuple[Any, ...], value: Any) -> None:
    def replace(container: Any, key: Any) -> None:
        container[key] = value

    with pytest.raises(ValueError, match="not a fit in JSON"):
        Fit.from_json(change_json(path, replace))


def test_zero_and_constant_kernels_are_degenerate() -> None:
    weight = sample_kernels("Lg", 4, 5)
    weight[1], weight[2] = 0, 0.3
    fit = fit_kernels(weight, ["Lg"], progress=False)
    assert fit.degenerate_slots == [1, 2] and [fit.kernels[i].r2 for i in fit.degenerate_slots] == [None, None]
    assert fit.r2 == pytest.approx(1, abs=1e-4) and math.isfinite(fit.r2)
    torch.testing.assert_close(fit.weight()[1:3], weight[1:3])
    assert fit.num_parameters == 2 * PIXELS + sum(len(fit.kernels[i].akps) + 1 for i in (0, 3))
    assert fit_kernels(torch.zeros(2, 1, 3, 3), progress=False).r2 is None
    assert fit_kernels(torch.ones(2, 1, 1, 1), progress=False).degenerate_slots == [0, 1]


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(3, 3), {}, r"4 dimensions \(out, in / groups, kh, kw\), got \(3, 3\)"),
        (torch.ones(2, 1, 0, 3), {}, r"at least 1 x 1, got the shape \(2, 1, 0, 3\)"),
        (
            torch.full((2, 2, 3, 3), math.nan),
            {},
            r"non-finite values in 4 of 4 kernels; the first is weight\[0, 0\]",
        ),
        (torch.randn(1, 1, 3, 3), {"kinds": "P"}, "no analytic kind 'P'"),
        (torch.randn(1, 1, 3, 3), {"family": "big"}, "unknown family 'big'; known: paper, extended"),
        (torch.randn(1, 1, 3, 3), {"profile": "box"}, "unknown profile 'box'"),
        (torch.randn(1, 1, 3, 3), {"kinds": []}, "no kinds to fit; known: G, "),
        (
            torch.randn(1, 1, 3, 3),
            {"kinds": "G", "fixed": {"foo": 1}},
            "no AKP 'foo' to fix; known: theta, wavelength, psi, sigma$",
        ),
        (torch.randn(1, 1, 3, 3), {"fixed": {"gamma": 1}}, "no AKP 'gamma' to fix; known: theta"),
        (
            torch.randn(1, 1, 3, 3),
            {"family": "extended", "fixed": {"gamma": 0.1}},
            "gamma must be above 0.1, got 0.1",
        ),
        (torch.randn(1, 1, 3, 3), {"fixed": {"sigma": -2}}, "sigma must be above 0.3 px, got -2"),
        (torch.randn(1, 1, 3, 3), {"fixed": {"theta": math.nan}}, "the fixed theta must be finite, got nan"),
        (torch.randn(1, 1, 3, 3), {"fixed": {"sigma": math.inf}}, "the fixed sigma must be finite, got inf"),
        (torch.randn(1, 1, 3, 3), {"fixed": {"sigma": "wide"}}, "the fixed sigma must be a number, got 'wide'"),
    ],
)
def test_fit_rejects_invalid_arguments(weight: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_kernels(weight, **options)


def test_fit_lists_analytic_kinds_if_kind_is_unknown() -> None:
    known = ", ".join(analytic_kinds())
    with pytest.raises(ValueError, match=re.escape(f"no analytic kind 'X1'; known: {known}")):
        fit_kernels(torch.randn(1, 1, 3, 3), ["G", "X1"])


@pytest.mark.usefixtures("quick_search")
def test_to_layer_accepts_convolution_options_and_trains() -> None:
    fit = fit_kernels(sample_kernels("Tf", 6, 6), progress=False)
    layer = fit.to_layer(groups=2, stride=2, bias=True)
    assert isinstance(layer, AnalyticConv2d) and layer(torch.randn(1, 2, 15, 15)).shape == (1, 6, 5, 5)
    layer(torch.randn(1, 2, 15, 15)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def make_convolution(order: Tensor | None = None) -> nn.Sequential:
    """A convolution whose kernels are sampled from every analytic kind; ``order`` gives the kernel of each slot."""
    kernels = torch.cat([sample_kernels(symbol, PER_KIND, 8) for symbol in analytic_kinds()])
    out_channels = len(kernels) // 3
    model = nn.Sequential(nn.Conv2d(3, out_channels, 7))
    model[0].weight.data.copy_((kernels if order is None else kernels[order]).view(out_channels, 3, 7, 7))
    return model


def test_init_fit_recovers_replaced_kernels() -> None:
    model = make_convolution()
    target = model[0].weight.clone()
    arrangement = " ".join(f"{symbol}{PER_KIND}" for symbol in analytic_kinds())
    convert(model, "first", arrangement, init="fit", amplitude=True)
    torch.testing.assert_close(model[0].weight, target, rtol=0, atol=0.02)


def test_init_fit_without_amplitude_recovers_shape_and_keeps_plain_kernels() -> None:
    model = make_convolution()
    target = model[0].weight.clone()
    analytic = list(analytic_kinds())[:3]
    plain_count = PER_KIND * (len(analytic_kinds()) - len(analytic))
    arrangement = " ".join([*(f"{symbol}{PER_KIND}" for symbol in analytic), f"P{plain_count}"])
    with pytest.warns(match=rf"the gains of {3 * PER_KIND} fitted kernels are dropped.*; amplitude=True keeps them"):
        layer = convert(model, "first", arrangement, init="fit")[0]
    cosine = nn.functional.cosine_similarity(layer.weight.flatten(2), target.flatten(2), dim=2).flatten()
    gabors = layer.slots_of("G")  # a change of phase gives a Gabor kernel either sign, so a positive gain suffices
    assert len(gabors) == PER_KIND and (cosine[gabors] > 0.99).all()
    plain = layer.slots_of("P")
    assert len(plain) == plain_count and torch.equal(layer.weight.flatten(0, 1)[plain], target.flatten(0, 1)[plain])


@pytest.mark.usefixtures("quick_search")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {"init": "fit", "amplitude": True},
        {"init": "fit", "per": "filter"},
        {"init": "random"},
        {"init": "fit", "arrangement": "P100%"},
        {"init": "random", "arrangement": "auto", "tolerance": 1.0},
    ],
    ids=str,
)
def test_convert_does_not_warn_if_it_drops_no_gain(options: dict[str, Any]) -> None:
    convert(nn.Conv2d(1, 2, 3), "all", **{"arrangement": "G100%", **options})


@pytest.mark.usefixtures("quick_search")
def test_init_fit_with_amplitude_keeps_zero_kernel_zero() -> None:
    model = make_convolution()
    model[0].weight.data[0] = 0
    convert(model, "first", "G100%", init="fit", amplitude=True)
    assert (model[0].weight[0] == 0).all() and (model[0].weight[1] != 0).any()


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("amplitude", [False, True])
def test_init_fit_rejects_constant_kernels_and_leaves_model_unchanged(amplitude: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1))
    message = "cannot fit 1: the kernel of slot 0 is constant, as all 1 x 1 kernels are"
    with pytest.raises(ValueError, match=message):
        convert(model, "all", "G100%", init="fit", amplitude=amplitude)
    assert acl.analytic_layers(model) == {}
    with nullcontext() if amplitude else pytest.warns(match="the gains of 2 fitted kernels are dropped"):
        convert(model, "all", "auto", tolerance=1.0, amplitude=amplitude)
    assert model[1].slot_kinds == ["P"] * 4


@pytest.mark.usefixtures("quick_search")
def test_choose_never_takes_a_formula_with_as_many_parameters_as_weights() -> None:
    weight = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    fit = fit_kernels(weight, progress=False)
    sizes = [fit.choose(tolerance, weight).num_parameters for tolerance in (0.0, 0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == weight.numel() > sizes[-1]


@pytest.mark.usefixtures("quick_search")
def test_auto_saves_more_parameters_as_tolerance_grows() -> None:
    sizes, errors = [], []
    shape = make_convolution()[0].weight.shape
    slots, out_channels = shape[0] * shape[1], shape[0]
    torch.manual_seed(2)
    noise = 0.3 * torch.randn(shape)
    for tolerance in (0.0, 0.2, 1.0):
        model = make_convolution()
        scale = model[0].weight.data.flatten(2).norm(dim=2) / 7
        model[0].weight.data += noise * scale[..., None, None]
        target = model[0].weight.clone()
        convert(model, "first", "auto", tolerance=tolerance, metric="pixels", amplitude=True)
        residuals = compute_residuals(model[0].weight, target, "pixels")
        assert residuals.max() <= tolerance + 1e-4
        sizes.append(sum(p.numel() for p in model.parameters()))
        errors.append(residuals.sum().item())
    fewest_akps = min(len(kind.akps(amplitude=True)) for kind in analytic_kinds().values())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == slots * PIXELS + out_channels and sizes[-1] == slots * fewest_akps + out_channels
    assert errors == sorted(errors) and errors[0] == 0


@pytest.fixture(scope="module")
def fit_of_every_kind() -> Fit:
    return fit_kernels(make_convolution()[0].weight, progress=False)


@pytest.mark.parametrize("tolerance", [0.01, 0.5])
def test_choose_takes_fewest_akps_within_tolerance(fit_of_every_kind: Fit, tolerance: float) -> None:
    chosen = fit_of_every_kind.choose(tolerance, make_convolution()[0].weight).kernels
    for slot, (sampled_kind, kernel) in enumerate(zip(repeat_kinds(PER_KIND), chosen, strict=True)):
        qualified = [fits[slot] for fits in fit_of_every_kind.by_kind.values() if 1 - fits[slot].r2 <= tolerance]
        assert sampled_kind in [candidate.kind for candidate in qualified]
        fewest_akps = min(len(candidate.akps) for candidate in qualified)
        smallest = [candidate for candidate in qualified if len(candidate.akps) == fewest_akps]
        assert kernel == max(smallest, key=lambda candidate: candidate.r2)


def test_auto_placement_survives_state_dict_and_fold(fit_of_every_kind: Fit) -> None:
    chosen = fit_of_every_kind.choose(0.01, make_convolution()[0].weight).kernels
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    model = make_convolution(order)
    target = model[0].weight.clone()
    layer = convert(model, "first", "auto", tolerance=0.01, amplitude=True)[0]
    torch.testing.assert_close(layer.weight, target, rtol=0, atol=0.02)
    assert layer.placement is not None
    assert layer.slot_kinds == [chosen[i].kind for i in order.tolist()]
    for symbol in layer.arrangement.counts:
        assert layer.slots_of(symbol) == [slot for slot, kind in enumerate(layer.slot_kinds) if kind == symbol]
    other = copy.deepcopy(model)
    other[0].reset_parameters()
    assert not torch.equal(other[0].weight, layer.weight)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, layer.weight)
    assert torch.equal(acl.fold(other)[0].weight, layer.weight)


def test_auto_requires_valid_tolerance() -> None:
    with pytest.raises(ValueError, match=r"needs a tolerance from 0 \(all plain\) to 1 \(all analytic\), got None"):
        convert(make_convolution(), "first", "auto")
    with pytest.raises(ValueError, match=r"'auto' needs a tolerance from 0 .* to 1 .*, got 2"):
        convert(make_convolution(), "first", "auto", tolerance=2)


def test_layer_rejects_auto_arrangement() -> None:
    with pytest.raises(ValueError, match=r"arrangement 'auto' works only with acl\.convert"):
        AnalyticConv2d(3, 10, 7, arrangement="auto")


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (3, 0, 5, 5), (3, 3, 0, 5)])
def test_weight_without_kernels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"must have kernels of at least 1 x 1, got the shape {shape}")):
        fit_kernels(torch.randn(shape), progress=False)


def test_comparison_with_pool_is_done_in_parts_of_limited_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 1, 3, 3)
    expected = fit_kernels(weight, ["Lg"], progress=False)
    sizes: list[int] = []
    topk = torch.Tensor.topk
    monkeypatch.setattr("acl.kind_search._ROWS_PER_COMPARISON", 3)
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda t, *args, **options: sizes.append(len(t)) or topk(t, *args, **options)
    )
    fit = fit_kernels(weight, ["Lg"], progress=False)
    assert sizes == [3, 3, 2]
    assert [kernel.r2 for kernel in fit.kernels] == pytest.approx([kernel.r2 for kernel in expected.kernels])


def make_filters(count: int, channels: int, seed: int = 3) -> Tensor:
    """(5 count, channels, 7, 7): filters with random AKPs of every analytic kind, and a random gain per channel."""
    shapes = torch.cat([sample_kernels(symbol, count, seed) for symbol in analytic_kinds()])
    return shapes * torch.randn(len(shapes), channels, 1, 1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_recovers_sampled_filters(metric: str, channels: int) -> None:
    weight = make_filters(4, channels)
    fit = fit_kernels(weight, per="filter", metric=metric, progress=False)
    r2 = torch.tensor([kernel.r2 for kernel in fit.kernels])
    assert (r2 > 0.999).float().mean() >= 0.95 and all(len(kernel.gains) == channels for kernel in fit.kernels)
    assert fit.r2 == pytest.approx(1 - acl.output_error(weight, fit.weight(), metric), abs=1e-4)
    assert Fit.from_json(fit.to_json()) == fit


@pytest.mark.usefixtures("quick_search")
def test_gains_of_filter_minimize_output_error() -> None:
    weight = torch.randn(3, 3, 5, 5)
    layer = fit_kernels(weight, ["G"], per="filter", progress=False).to_layer(dtype=torch.float64)
    error = acl.output_error(weight, layer.weight)
    for row, channel in [(0, 0), (1, 2), (2, 1)]:
        for change in (-1e-3, 1e-3):
            changed = copy.deepcopy(layer)
            changed.gains.data[row, channel] += change
            assert acl.output_error(weight, changed.weight) > error


@pytest.mark.usefixtures("quick_search")
def test_output_error_is_that_of_outputs() -> None:
    images = torch.nn.functional.interpolate(torch.randn(8, 3, 8, 8), (24, 24), mode="bilinear")
    conv = nn.Conv2d(3, 4, 5, bias=False)
    approximation = fit_kernels(conv.weight, ["Lg"], progress=False).weight()
    expected, output = conv(images), nn.functional.conv2d(images, approximation)
    relative = ((output - expected).square().sum() / expected.square().sum()).item()
    assert acl.output_error(conv.weight, approximation, images) == pytest.approx(relative, rel=1e-4)


def test_fit_in_metric_of_images_has_smaller_output_error_than_fit_to_pixels() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 48, 48).cumsum(2).cumsum(3) + 0.3 * torch.randn(8, 3, 48, 48).cumsum(2).cumsum(3)
    weight = torch.randn(6, 3, 5, 5)
    for per in ("kernel", "filter"):
        errors = {}
        for metric in ("pixels", "images", images):
            fitted = fit_kernels(weight, ["G"], per=per, metric=metric, progress=False).weight()
            errors[metric if isinstance(metric, str) else "data"] = acl.output_error(weight, fitted, images)
        assert errors["images"] < 0.5 * errors["pixels"] and errors["data"] < 0.5 * errors["pixels"]


@pytest.mark.usefixtures("quick_search")
def test_refining_filters_never_increases_output_error_and_keeps_other_kernels() -> None:
    weight = torch.randn(4, 3, 5, 5)
    fit = fit_kernels(weight, metric="images", progress=False)
    alone = dataclasses.replace(fit, kernels=fit.choose(0.7, weight).kernels)
    assert len({kernel.kind for kernel in alone.kernels}) > 1
    refined = acl.refine_jointly(alone, weight)
    energies = [fit.metric.energies(weight - a.weight()) for a in (alone, refined)]
    assert (energies[1] <= energies[0] * (1 + 1e-5)).all() and energies[1].sum() < 0.99 * energies[0].sum()
    for before, after in zip(alone.kernels, refined.kernels, strict=True):
        assert (before.kind, before.weights) == (after.kind, after.weights)


@pytest.mark.usefixtures("quick_search")
def test_refining_can_be_left_for_later() -> None:
    weight = torch.randn(2, 3, 5, 5)
    refined, alone = (fit_kernels(weight, ["G", "Ts"], refine=refine, progress=False) for refine in (True, False))
    assert refined.by_kind == alone.by_kind and refined.kernels != alone.kernels
    assert acl.refine_jointly(alone, weight).kernels == refined.kernels


@pytest.mark.usefixtures("quick_search")
def test_fixed_akp_stays_fixed_when_filters_are_refined() -> None:
    fit = fit_kernels(torch.randn(2, 3, 5, 5), ["G"], "extended", fixed={"gamma": 1.0}, progress=False)
    assert all(kernel.akps["gamma"] == 1.0 for kernel in fit.kernels)


@pytest.mark.usefixtures("quick_search")
def test_kinds_can_be_given_for_each_slot() -> None:
    weight = torch.randn(2, 2, 5, 5)
    fit = fit_kernels(weight, [["G"], [], ["Lg", "Lt"], ["Ts"]], progress=False)
    kinds = [kernel.kind for kernel in fit.kernels]
    assert kinds[0] == "G" and kinds[1] == "P" and kinds[2] in ("Lg", "Lt") and kinds[3] == "Ts"
    assert torch.equal(fit.weight()[0, 1], weight[0, 1]) and fit.degenerate_slots == []
    with pytest.raises(ValueError, match="kinds must be given for 4 slots, got 1"):
        fit_kernels(weight, [["G"]], progress=False)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("image", "unknown metric 'image'; known: images, pixels, or a tensor"),
        (torch.randn(2, 4, 9, 9), r"batch of images \(n, 2, h, w\).* moments \(18, 18\).* got \(2, 4, 9, 9\)"),
        (torch.eye(9), r"got \(9, 9\)"),
        (torch.full((18, 18), math.nan), "a metric must be finite and not zero"),
        (torch.zeros(1, 2, 9, 9), "a metric must be finite and not zero"),
        (torch.diag(torch.tensor([-1.0, *[1.0] * 17])), "a metric must be positive semidefinite"),
        (Metric.create("images", 3, (3, 3)), "the metric is of 3 channels and 9 pixels, but the kernels have 2 and 9"),
    ],
)
def test_invalid_metric_is_named(metric: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_kernels(torch.randn(1, 2, 3, 3), metric=metric, progress=False)


@pytest.mark.parametrize("metric", ["images", "inputs"])
def test_fit_of_dilated_layer_minimizes_error_of_its_outputs(metric: str) -> None:
    frequencies = torch.fft.fftfreq(64)
    amplitudes = (frequencies[:, None] ** 2 + frequencies**2 + 1 / 64**2).rsqrt()
    images = torch.fft.ifft2(torch.fft.fft2(torch.randn(16, 1, 64, 64)) * amplitudes).real
    conv = nn.Conv2d(1, 8, 5, dilation=4, bias=False)
    chosen: Any = images if metric == "inputs" else metric
    errors = []
    for used in (chosen, "pixels"):
        layer = convert(copy.deepcopy(conv), "first", "G100%", init="fit", amplitude=True, metric=used)
        error = (layer(images) - conv(images)).square().sum() / conv(images).square().sum()
        errors.append(error.item())
        reported = acl.output_error(conv.weight, layer.weight, images, conv.dilation)
        assert reported == pytest.approx(error.item(), rel=1e-3)
    assert errors[0] < errors[1]


def test_moments_of_dilated_images_are_those_of_every_other_pixel() -> None:
    dense, dilated = Metric.create("images", 3, (5, 7)), Metric.create("images", 3, (3, 4), (2, 2))
    kept = dense.pixels.view(5, 7, 5, 7)[::2, ::2, ::2, ::2].reshape(12, 12)
    torch.testing.assert_close(dilated.pixels, kept, rtol=1e-12, atol=0)
    assert Metric.from_json(dilated.to_json(), 3, (3, 4)) == dilated != Metric.create("images", 3, (3, 4))
    assert Metric.create("images", 3, (1, 1), (2, 2)) == Metric.create("images", 3, (1, 1))
    assert Metric.create("images", 1, (3, 3), (200, 1)).pixels.isfinite().all()  # wider than the images
    with pytest.raises(ValueError, match="of at least the kernel's size"):
        Metric.create(torch.randn(2, 1, 8, 8), 1, (5, 5), (2, 2))


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("options", [{}, {"per": "filter"}, {"signed": True}])
def test_inputs_without_energy_in_a_channel_or_direction_have_finite_errors(options: dict[str, Any]) -> None:
    dead = torch.randn(4, 3, 9, 9).relu()
    dead[:, 2] = 0
    edges = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(2, 3, 3, 3)
    for inputs in (dead, torch.ones(4, 3, 9, 9)):  # constant inputs have no edges
        fit = fit_kernels(edges, ["G"], metric=inputs, progress=False, **options)
        assert fit.weight().isfinite().all() and fit.r2 <= 1 + 1e-9
        assert all(kernel.r2 is not None and kernel.r2 <= 1 + 1e-9 for kernel in fit.kernels)


def test_image_metric_is_power_spectrum_of_images() -> None:
    metric = Metric.create("images", 3, (5, 3))
    assert torch.allclose(metric.pixels, metric.pixels.T) and torch.linalg.eigvalsh(metric.pixels).min() > 0
    assert torch.linalg.eigvalsh(metric.channels).min() > 0 and metric.is_coupled
    mean, edge = torch.full((3, 5, 3), 1 / 15), torch.zeros(3, 5, 3)
    edge[:, :, 0], edge[:, :, 2] = -1, 1
    # The mean of an image has most of its power.
    assert metric.energies(mean / mean.norm()) > 10 * metric.energies(edge / edge.norm())


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize(
    "images",
    [torch.ones(2, 3, 8, 8), torch.randn(1, 3, 5, 5), torch.randn(2, 3, 8, 8) * torch.eye(3)[0, :, None, None]],
)
def test_metric_of_few_or_constant_images_can_be_fitted(images: Tensor) -> None:
    for per in ("kernel", "filter"):
        fit = fit_kernels(torch.randn(2, 3, 5, 5), ["G"], per=per, metric=images, progress=False)
        assert fit.weight().isfinite().all()


@pytest.mark.parametrize("symbol", ["Lt", "Ts"])
@pytest.mark.parametrize("profile", ["linear", "exponential"])
def test_fit_is_never_worse_than_its_start(symbol: str, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(60, 1, 5, 5)
    fitted = acl.fit_kernels(weight, [symbol], metric="pixels", profile=profile).kernels
    monkeypatch.setattr("acl.kind_search.STEPS", 0)
    starts = acl.fit_kernels(weight, [symbol], metric="pixels", profile=profile).kernels
    for kernel, start in zip(fitted, starts, strict=True):
        assert kernel.r2 is not None and start.r2 is not None
        assert kernel.r2 > start.r2 - 1e-5


@pytest.mark.parametrize("shape", [(4, 1, 5, 5), (3, 5, 5), ()])
def test_output_error_refuses_approximation_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"the approximation has the shape {shape}, the weight (4, 3, 5, 5)")
    ):
        acl.output_error(torch.randn(4, 3, 5, 5), torch.randn(shape))
