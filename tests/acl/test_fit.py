"""acl.fit: kinds, AKPs and gains fitted to given kernels, and conversion with init="fit" and arrangement "auto"."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

import acl
from acl import AnalyticConv2d, Fit, convert, fit_kernels
from acl.kernels import KINDS, analytic_kinds

PER_KIND = 6
"""Kernels of each analytic kind in ``make_convolution()``; a multiple of its 3 input channels."""
PIXELS = 7 * 7


def sample_kernels(symbol: str, count: int, seed: int, family: str = "paper") -> Tensor:
    """(count, 1, 7, 7): kernels with random AKPs and gains."""
    torch.manual_seed(seed)
    kind = KINDS[symbol]
    kernels = kind.synthesize({akp.name: akp.sample(count, (7, 7)) for akp in kind.akps(family)}, (7, 7))
    return (kernels * torch.randn(count, 1, 1))[:, None]


def repeat_kinds(count: int) -> list[str]:
    """The symbol of each analytic kind, ``count`` times."""
    return [symbol for symbol in analytic_kinds() for _ in range(count)]


def compute_residuals(weight: Tensor, target: Tensor) -> Tensor:
    """(out, in / groups): the share of each target kernel's energy that the weight misses."""
    return (target - weight).square().sum((2, 3)) / target.square().sum((2, 3))


def test_fit_recovers_sampled_kernels() -> None:
    kinds = repeat_kinds(20)
    weight = torch.cat([sample_kernels(symbol, 20, 1) for symbol in analytic_kinds()])
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
    weight = nn.functional.interpolate(torch.randn(8, 3, 4, 4), (7, 7), mode="bilinear")
    gabor = fit_kernels(weight, ["G"], progress=False)
    best = fit_kernels(weight, progress=False)
    isotropic = fit_kernels(weight, ["G"], "extended", fixed={"gamma": 1.0}, progress=False)
    extended = fit_kernels(weight, ["G"], "extended", progress=False)
    assert gabor.r2 <= best.r2
    assert gabor.r2 <= isotropic.r2 + 1e-3 and isotropic.r2 <= extended.r2 + 1e-3
    assert all(kernel.akps["gamma"] == 1.0 for kernel in isotropic.kernels)
    assert set(best.by_kind) == set(analytic_kinds()) and best.by_kind["G"] == gabor.kernels


@pytest.mark.parametrize("family", acl.kernels.FAMILIES)
def test_r2_matches_fitted_weight(family: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(4, 2, 5, 5)
    fit = fit_kernels(weight, family=family, progress=False)
    r2 = 1 - compute_residuals(fit.weight(), weight).flatten()
    torch.testing.assert_close(r2, torch.tensor([k.r2 for k in fit.kernels]), rtol=0, atol=1e-4)
    total = 1 - ((weight - fit.weight()).square().sum() / weight.square().sum()).item()
    assert fit.r2 == pytest.approx(total, abs=1e-4)


def test_fit_is_deterministic_and_keeps_global_random_state() -> None:
    weight = sample_kernels("Ts", 4, 3)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = fit_kernels(weight, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert fit_kernels(weight, progress=False) == first


def test_json_round_trip_restores_fit() -> None:
    weight = torch.cat([sample_kernels("G", 3, 4), torch.zeros(1, 1, 7, 7)])
    fit = fit_kernels(weight, progress=False)
    assert Fit.from_json(fit.to_json()) == fit


@pytest.mark.parametrize("text", ["", "[]", '{"shape": 3}'])
def test_from_json_rejects_text_that_is_not_a_fit(text: str) -> None:
    with pytest.raises(ValueError, match="not a fit in JSON"):
        Fit.from_json(text)


def test_zero_and_constant_kernels_are_degenerate() -> None:
    weight = sample_kernels("Lg", 4, 5)
    weight[1], weight[2] = 0, 0.3
    fit = fit_kernels(weight, progress=False)
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
        (
            torch.full((2, 2, 3, 3), math.nan),
            {},
            r"non-finite values in 4 of 4 kernels; the first is weight\[0, 0\]",
        ),
        (torch.randn(1, 1, 3, 3), {"kinds": "P"}, "no analytic kind 'P'"),
        (torch.randn(1, 1, 3, 3), {"family": "big"}, "unknown family 'big'; known: paper, extended"),
        (torch.randn(1, 1, 3, 3), {"profile": "box"}, "unknown profile 'box'"),
    ],
    ids=["2-D weight", "not finite", "plain kind", "family", "profile"],
)
def test_fit_rejects_invalid_arguments(weight: Tensor, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_kernels(weight, **options)


def test_fit_lists_analytic_kinds_if_kind_is_unknown() -> None:
    known = ", ".join(analytic_kinds())
    with pytest.raises(ValueError, match=re.escape(f"no analytic kind 'X1'; known: {known}")):
        fit_kernels(torch.randn(1, 1, 3, 3), ["G", "X1"])


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
    layer = convert(model, "first", arrangement, init="fit")[0]
    cosine = nn.functional.cosine_similarity(layer.weight.flatten(2), target.flatten(2), dim=2).flatten()
    gabors = layer.slots_of("G")  # a change of phase gives a Gabor kernel either sign, so a positive gain suffices
    assert len(gabors) == PER_KIND and (cosine[gabors] > 0.99).all()
    plain = layer.slots_of("P")
    assert len(plain) == plain_count and torch.equal(layer.weight.flatten(0, 1)[plain], target.flatten(0, 1)[plain])


def test_init_fit_with_amplitude_keeps_zero_kernel_zero() -> None:
    model = make_convolution()
    model[0].weight.data[0] = 0
    convert(model, "first", "G100%", init="fit", amplitude=True)
    assert (model[0].weight[0] == 0).all() and (model[0].weight[1] != 0).any()


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
        convert(model, "first", "auto", tolerance=tolerance, amplitude=True)
        residuals = compute_residuals(model[0].weight, target)
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
    other = convert(make_convolution(order), "first", "auto", tolerance=0.01, amplitude=True, init="random")
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
