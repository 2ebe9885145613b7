import math
from collections.abc import Iterator
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor, nn

import acl
from acl.explain import analytic_layers, attribute, formula, leave_one_out
from acl.kernels import KINDS

ALL = "G6 Lg3 Lt3 Tf3 Ts3 P6"


def network(*arrangements: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(300, 4)
    )
    for name, arrangement in zip(("0", "3"), arrangements, strict=False):
        acl.convert(model, name, arrangement)
    return model.train()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for n in (40, 23):
        yield torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def brute_force(model: nn.Module, kept: set[str]) -> int:
    """Images told right with the other kinds' kernels set to 0 in a folded copy."""
    plain = network(*(str(layer.arrangement) for layer in analytic_layers(model).values()))
    plain.load_state_dict(model.state_dict())
    masks = {name: layer.slot_kinds for name, layer in analytic_layers(plain).items()}
    acl.fold(plain).eval()
    for name, kinds in masks.items():
        weight = plain.get_submodule(name).weight.data
        weight.mul_(torch.tensor([kind in kept for kind in kinds]).view(weight.shape[:2])[..., None, None])
    return sum(int((plain(x).argmax(1) == y).sum()) for x, y in batches())


@pytest.mark.parametrize("arrangements", [(ALL,), (ALL, "G8 Lg8 P8"), ("Ts10 P14", "G8 Lg8 P8")])
def test_every_subset_is_that_of_brute_force(arrangements: tuple[str, ...]) -> None:
    model = network(*arrangements)
    result = attribute(model, batches, progress=False)
    present = [s for s in KINDS if any(s in layer.slot_kinds for layer in analytic_layers(model).values())]
    assert result.kinds == tuple(present) and len(result.correct) == 2 ** len(present) and result.images == 63
    for size in range(len(present) + 1):
        for kept in combinations(present, size):
            assert result.correct[frozenset(kept)] == brute_force(model, set(kept))
    assert model.training and not any("forward" in vars(module) for module in model.modules())


def test_shapley_values_add_up_and_are_the_mean_over_all_orders() -> None:
    result = attribute(network(ALL, "G8 Lg8 P8"), batches, progress=False)
    values = result.shapley()
    assert result.drop == result.accuracy(KINDS) - result.accuracy([]) != 0
    assert abs(sum(values.values()) - result.drop) < 1e-12
    wanted = dict.fromkeys(KINDS, 0.0)
    for order in permutations(KINDS):
        for i, kind in enumerate(order):
            wanted[kind] += result.accuracy(order[: i + 1]) - result.accuracy(order[:i])
    assert all(math.isclose(values[k], wanted[k] / 720, abs_tol=1e-9) for k in KINDS)


def test_a_kind_that_is_not_there_adds_nothing() -> None:
    values = attribute(network("G12 P12"), batches, progress=False).shapley()
    assert {kind for kind, value in values.items() if value == 0} >= {"Lg", "Lt", "Tf", "Ts"}


def test_mean_answers_keep_what_is_constant() -> None:
    """Constant images: every kernel answers its mean, so that removing it changes nothing."""
    model = network(ALL)

    def constant() -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.ones(30, 3, 16, 16), torch.arange(30) % 4

    result = attribute(model, constant, replace="mean", progress=False)
    assert len(set(result.correct.values())) == 1
    varied = attribute(model, batches, replace="mean", progress=False)
    assert (
        varied.correct[frozenset(varied.kinds)]
        == attribute(model, batches, progress=False).correct[frozenset(varied.kinds)]
    )
    assert len(set(varied.correct.values())) > 1


def test_the_first_layers_answers_are_computed_once_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(ALL)
    calls = []
    original = acl.AnalyticConv2d.convolve

    def counted(self: acl.AnalyticConv2d, *args: object, **options: object) -> Tensor:
        calls.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(acl.AnalyticConv2d, "convolve", counted)
    attribute(model, batches, progress=False)
    assert len(calls) == 6 * 2 + 1  # six kinds in each of two batches, and one image to see which layer is first


def test_leave_one_out_is_brute_force() -> None:
    model = network("G12 P12", "P24")
    lost = leave_one_out(model, batches, progress=False)
    assert {name: len(values) for name, values in lost.items()} == {"0": 24, "3": 24}
    whole = brute_force(model, set(KINDS))
    for name, slot in (("0", 0), ("0", 17), ("3", 5)):
        plain = acl.fold(network("G12 P12", "P24")).eval()
        weight = plain.get_submodule(name).weight.data
        weight[divmod(slot, weight.shape[1])] = 0
        right = sum(int((plain(x).argmax(1) == y).sum()) for x, y in batches())
        assert lost[name][slot].item() == pytest.approx(100 * (whole - right) / 63)
    assert model.training


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 3)), batches, {}, "the network has no analytic layer to explain"),
        (network(ALL), lambda: iter(()), {}, "there are no data to explain the network by"),
        (network(ALL), batches, {"replace": "noise"}, "unknown replace 'noise'; known: zero, mean"),
    ],
)
def test_what_cannot_be_explained(model: nn.Module, data: object, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(model, data, progress=False, **options)


NAMES = {"exp": math.exp, "cos": math.cos, "pi": math.pi}


@pytest.mark.parametrize("family", ["paper", "extended"])
def test_a_gabors_formula_gives_its_kernel(family: str) -> None:
    torch.manual_seed(3)
    layer = acl.AnalyticConv2d(2, 3, 7, arrangement="P2 G4", amplitude=True, family=family)
    assert formula(layer, 0) == "7 x 7 free weights"
    text = formula(layer, 3)
    body, _, rest = text.partition(", theta = ")
    theta = math.radians(float(rest.split(" deg")[0]))
    x0, y0 = (float(v) for v in rest.split("centre (")[1].rstrip(")").split(", ")) if family == "extended" else (0, 0)
    body = (
        body.replace("2 pi x'", "2*pi*xr")
        .replace("x'", "xr")
        .replace(" y'", "*yr")
        .replace("y'", "yr")
        .replace("^", "**")
    )
    drawn = torch.empty(7, 7)
    for i in range(7):
        for j in range(7):
            x, y = j - 3 - x0, i - 3 - y0
            xr, yr = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
            drawn[i, j] = eval(body, {**NAMES, "xr": xr, "yr": yr, "r": math.hypot(x, y)})
    kernel = layer.weight.detach().flatten(0, 1)[3]
    assert (drawn - kernel).abs().max() < 0.05 * kernel.abs().max()


def test_every_kind_has_a_formula_for_every_profile() -> None:
    for profile in acl.kernels.PROFILES:
        layer = acl.AnalyticConv2d(1, 6, 5, arrangement="G1 Lg1 Lt1 Tf1 Ts1 P1", profile=profile, family="extended")
        for slot, symbol in enumerate(layer.slot_kinds[:5]):
            text = formula(layer, slot)
            assert "centre (" in text and "{" not in text and ("theta" in text) == ("theta" in layer.akps()[symbol])
