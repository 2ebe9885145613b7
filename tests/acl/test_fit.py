import math

import pytest
import torch
from torch import nn

import acl
from acl import AnalyticConv2d, Fit, convert, fit_kernels
from acl.fit import ANALYTIC
from acl.kernels import KINDS


def planted(symbol: str, count: int, seed: int, family: str = "paper") -> torch.Tensor:
    """(count, 1, 7, 7): kernels of random AKPs and gain."""
    torch.manual_seed(seed)
    kind = KINDS[symbol]
    kernels = kind.function(**{akp.name: akp.draw(count, (7, 7)) for akp in kind.parameters(family)}, size=(7, 7))
    return (kernels * torch.randn(count, 1, 1))[:, None]


def test_planted_kernels_are_found() -> None:
    weight = torch.cat([planted(symbol, 20, 1) for symbol in ANALYTIC])
    fit = fit_kernels(weight, progress=False)
    assert sum(kernel.r2 >= 0.999 for kernel in fit.kernels) >= 0.99 * 100
    torch.testing.assert_close(fit.weight(), weight, rtol=0, atol=0.05 * weight.abs().max().item())
    kinds = [symbol for symbol in ANALYTIC for _ in range(20)]
    noisy = weight + 0.01 * weight.square().mean((1, 2, 3), keepdim=True).sqrt() * torch.randn_like(weight)
    fit = fit_kernels(noisy, progress=False)
    named = [
        k.kind == kind or k.r2 >= fit.by_kind[kind][i].r2
        for i, (k, kind) in enumerate(zip(fit.kernels, kinds, strict=True))
    ]
    assert sum(named) >= 0.95 * 100
    assert sum(k.kind == kind for k, kind in zip(fit.kernels, kinds, strict=True)) >= 0.95 * 100


def test_planted_extended_gabors_are_found() -> None:
    fit = fit_kernels(planted("G", 40, 2, "extended"), ["G"], "extended", progress=False)
    assert sum(kernel.r2 >= 0.999 for kernel in fit.kernels) >= 0.95 * 40


def test_more_freedom_never_fits_worse() -> None:
    torch.manual_seed(0)
    weight = nn.functional.interpolate(torch.randn(8, 3, 4, 4), (7, 7), mode="bilinear")
    gabor = fit_kernels(weight, ["G"], progress=False)
    best = fit_kernels(weight, progress=False)
    offset = fit_kernels(weight, ["G"], "extended", fixed={"gamma": 1.0}, progress=False)
    extended = fit_kernels(weight, ["G"], "extended", progress=False)
    assert gabor.r2 <= best.r2 and gabor.r2 <= offset.r2 + 1e-3 and offset.r2 <= extended.r2 + 1e-3
    assert all(kernel.akps["gamma"] == 1.0 for kernel in offset.kernels)
    assert best.by_kind["G"] == gabor.kernels


def test_r2_is_that_of_the_weights_drawn() -> None:
    torch.manual_seed(1)
    weight = torch.randn(4, 2, 5, 5)
    for family in ("paper", "extended"):
        fit = fit_kernels(weight, family=family, progress=False)
        left = (weight - fit.weight()).square().sum((2, 3)) / weight.square().sum((2, 3))
        torch.testing.assert_close(1 - left.flatten(), torch.tensor([k.r2 for k in fit.kernels]), rtol=0, atol=1e-4)
        assert fit.r2 == pytest.approx(
            1 - ((weight - fit.weight()).square().sum() / weight.square().sum()).item(), abs=1e-4
        )


def test_the_same_seed_gives_the_same_fit_and_leaves_random_numbers_alone() -> None:
    weight = planted("Ts", 4, 3)
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    first = fit_kernels(weight, progress=False)
    assert torch.equal(torch.rand(1), wanted)
    assert fit_kernels(weight, progress=False) == first


def test_json_there_and_back() -> None:
    weight = torch.cat([planted("G", 3, 4), torch.zeros(1, 1, 7, 7)])
    fit = fit_kernels(weight, progress=False)
    assert Fit.from_json(fit.to_json()) == fit
    for text in ("", "[]", '{"shape": 3}'):
        with pytest.raises(ValueError, match="this is no fit in JSON"):
            Fit.from_json(text)


def test_zero_and_constant_kernels_are_said_to_be_unfit() -> None:
    weight = planted("Lg", 4, 5)
    weight[1], weight[2] = 0, 0.3
    fit = fit_kernels(weight, progress=False)
    assert fit.unfit == [1, 2] and [fit.kernels[i].r2 for i in fit.unfit] == [None, None]
    assert fit.r2 == pytest.approx(1, abs=1e-4) and math.isfinite(fit.r2)
    torch.testing.assert_close(fit.weight()[1:3], weight[1:3])
    assert fit_kernels(torch.zeros(2, 1, 3, 3), progress=False).r2 is None
    assert fit_kernels(torch.ones(2, 1, 1, 1), progress=False).unfit == [0, 1]


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(3, 3), {}, r"4 dimensions \(out, in / groups, kh, kw\), got \(3, 3\)"),
        (
            torch.full((2, 2, 3, 3), math.nan),
            {},
            r"4 kernels of the weight are not finite, the first is that of channels \(0, 0\)",
        ),
        (torch.randn(1, 1, 3, 3), {"kinds": ["G", "X"]}, "no analytic kind 'X'; known: G, Lg, Lt, Tf, Ts"),
        (torch.randn(1, 1, 3, 3), {"kinds": "P"}, "no analytic kind 'P'"),
        (torch.randn(1, 1, 3, 3), {"family": "big"}, "unknown family 'big'; known: paper, extended"),
        (torch.randn(1, 1, 3, 3), {"profile": "box"}, "unknown profile 'box'"),
    ],
)
def test_what_cannot_be_fitted(weight: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_kernels(weight, **options)


def test_a_fitted_layer_is_any_layer() -> None:
    fit = fit_kernels(planted("Tf", 6, 6), progress=False)
    layer = fit.to_layer(groups=2, stride=2, bias=True)
    assert isinstance(layer, AnalyticConv2d) and layer(torch.randn(1, 2, 15, 15)).shape == (1, 6, 5, 5)
    layer(torch.randn(1, 2, 15, 15)).sum().backward()


def pretrained() -> nn.Sequential:
    weight = torch.cat([planted(symbol, 6, 8) for symbol in ANALYTIC])  # 30 kernels
    model = nn.Sequential(nn.Conv2d(3, 10, 7))
    model[0].weight.data.copy_(weight.view(10, 3, 7, 7))
    return model


def test_convert_fits_the_kernels_it_replaces() -> None:
    model = pretrained()
    wanted = model[0].weight.clone()
    convert(model, "first", "G6 Lg6 Lt6 Tf6 Ts6", init="fit", amplitude=True)
    torch.testing.assert_close(model[0].weight, wanted, rtol=0, atol=0.02)
    shape = convert(pretrained(), "first", "G6 Lg6 Lt6 P12", init="fit")[0]  # no amplitude: the shape alone
    cosine = nn.functional.cosine_similarity(shape.weight.flatten(2), wanted.flatten(2), dim=2).flatten()
    assert (cosine[:6] > 0.99).all() and torch.equal(shape.weight.flatten(0, 1)[18:], wanted.flatten(0, 1)[18:])


def test_a_zero_kernel_stays_zero_where_it_can() -> None:
    model = pretrained()
    model[0].weight.data[0] = 0
    convert(model, "first", "G100%", init="fit", amplitude=True)
    assert (model[0].weight[0] == 0).all() and (model[0].weight[1] != 0).any()


def test_auto_chooses_kinds_and_is_monotone() -> None:
    sizes, errors = [], []
    torch.manual_seed(2)
    noise = 0.3 * torch.randn(10, 3, 7, 7)
    for tolerance in (0.0, 0.2, 1.0):
        model = pretrained()
        scale = model[0].weight.data.flatten(2).norm(dim=2) / 7
        model[0].weight.data += noise * scale[..., None, None]
        wanted = model[0].weight.clone()
        convert(model, "first", "auto", tolerance=tolerance, amplitude=True)
        left = (model[0].weight - wanted).square().sum((2, 3)) / wanted.square().sum((2, 3))
        assert left.max() <= tolerance + 1e-4
        sizes.append(sum(p.numel() for p in model.parameters()))
        errors.append(left.sum().item())
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 30 * 49 + 10 and sizes[-1] < 30 * 5 + 10
    assert errors == sorted(errors) and errors[0] == 0


def test_a_placed_layer_survives_saving_folding_and_copies() -> None:
    layer = convert(pretrained(), "first", "auto", tolerance=0.01, amplitude=True)[0]
    assert layer.slot_kinds[:6] == ["G"] * 6
    shuffled = nn.Sequential(nn.Conv2d(3, 10, 7))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled[0].weight.data.copy_(pretrained()[0].weight.data.flatten(0, 1)[order].view(10, 3, 7, 7))
    wanted = shuffled[0].weight.clone()
    convert(shuffled, "first", "auto", tolerance=0.01, amplitude=True)
    torch.testing.assert_close(shuffled[0].weight, wanted, rtol=0, atol=0.02)
    kinds = [ANALYTIC[i // 6] for i in order.tolist()]
    assert shuffled[0].slot_kinds == kinds
    assert [shuffled[0].slot_kinds[slot] for slot in shuffled[0].slots_of("Tf")] == ["Tf"] * 6
    other = nn.Sequential(nn.Conv2d(3, 10, 7))
    other[0].weight.data.copy_(wanted)
    convert(other, "first", "auto", tolerance=0.01, amplitude=True, init="random")
    other.load_state_dict(shuffled.state_dict())
    assert torch.equal(other[0].weight, shuffled[0].weight)
    assert torch.equal(acl.fold(other)[0].weight, shuffled[0].weight)


def test_auto_asks_for_a_tolerance() -> None:
    with pytest.raises(ValueError, match="arrangement 'auto' needs a tolerance"):
        convert(pretrained(), "first", "auto")
    with pytest.raises(ValueError, match=r"a tolerance from 0 \(all plain\) to 1 \(all analytic\), got 2"):
        convert(pretrained(), "first", "auto", tolerance=2)
    with pytest.raises(ValueError, match="arrangement 'auto' needs kernels to choose by"):
        AnalyticConv2d(3, 10, 7, arrangement="auto")
    with pytest.raises(ValueError, match="placement is no permutation of the layer's 4 slots"):
        AnalyticConv2d(2, 2, 3, arrangement="G4", placement=torch.tensor([0, 1, 2, 2]))


def test_another_placement_is_another_weight_in_eval_too() -> None:
    layer = AnalyticConv2d(2, 3, 5, arrangement="G3 P3", placement=torch.arange(6)).eval()
    before = layer.weight.detach().clone()
    layer.load_state_dict({**layer.state_dict(), "placement": torch.arange(5, -1, -1)})
    assert torch.equal(layer.weight.flatten(0, 1), before.flatten(0, 1).flip(0))
