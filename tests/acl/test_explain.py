"""acl.explain: contributions of kinds and of individual kernels, compared with brute force on folded networks."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, combinations, permutations

import pytest
import torch
from torch import Tensor, nn

import acl
from acl.explain import REPLACEMENTS, Batches, attribute, leave_one_out
from acl.inspection import require_analytic_layers
from acl.kernels import KINDS
from tests.arrangements import arrange_all_kinds

BATCH_SIZES = (40, 23)
IMAGES = sum(BATCH_SIZES)


def make_network(*arrangements: acl.Arrangement | str) -> nn.Module:
    """A small classifier whose first and second convolution, 24 kernels each, take these arrangements."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(300, 4)
    )
    for name, arrangement in zip(("0", "3"), arrangements, strict=False):
        acl.convert(model, name, arrangement)
    return model.train()


class KeywordConv(nn.Module):
    """Calls its convolution as ``conv(input=x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = acl.AnalyticConv2d(3, 4, 5, arrangement="G50% Lg50%", per="filter", compute="factored")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=x).mean((2, 3))


def test_input_may_be_given_by_name() -> None:
    model = KeywordConv()
    positional = nn.Sequential(model.conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for replace in ("zero", "mean"):
        expected = attribute(positional, iterate_batches, replace, progress=False)
        assert attribute(model, iterate_batches, replace, progress=False).correct == expected.correct
    lost = leave_one_out(model, iterate_batches, progress=False)["conv"]
    assert torch.equal(lost, leave_one_out(positional, iterate_batches, progress=False)["0"])
    x = torch.randn(1, 3, 16, 16)
    assert acl.summary(model, x).split()[-1] == acl.summary(positional, x).split()[-1]


def iterate_batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for n in BATCH_SIZES:
        yield torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def list_subsets(kinds: Iterable[str]) -> list[frozenset[str]]:
    symbols = list(kinds)
    sizes = range(len(symbols) + 1)
    return [frozenset(kept) for kept in chain.from_iterable(combinations(symbols, size) for size in sizes)]


def count_correct(model: nn.Module) -> int:
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in iterate_batches())


def replace_by_hand(model: nn.Module, kept: Iterable[str], replace: str) -> nn.Module:
    """A folded copy in which each kernel of another kind is 0, or constant with the same sum."""
    layers = acl.analytic_layers(model)
    folded = make_network(*(layer.arrangement for layer in layers.values()))
    folded.load_state_dict(model.state_dict())
    acl.fold(folded).eval()
    for name, layer in layers.items():
        weight = folded.get_submodule(name).weight.data
        for slot, kind in enumerate(layer.slot_kinds):
            if kind not in kept:
                kernel = weight[divmod(slot, weight.shape[1])]
                kernel.fill_(kernel.sum() / kernel.numel() if replace == "constant" else 0)
    return folded


@pytest.mark.parametrize("replace", ["zero", "constant"])
@pytest.mark.parametrize(
    "make_arrangements",
    [lambda: (arrange_all_kinds(),), lambda: (arrange_all_kinds(), "G8 Lg8 P8"), lambda: ("Ts10 P14", "G8 Lg8 P8")],
    ids=["one layer", "two layers", "different kinds per layer"],
)
def test_accuracy_of_every_subset_matches_brute_force(
    make_arrangements: Callable[[], tuple[acl.Arrangement | str, ...]], replace: str
) -> None:
    model = make_network(*make_arrangements())
    result = attribute(model, iterate_batches, replace, progress=False)
    present = [s for s in KINDS if any(s in layer.slot_kinds for layer in acl.analytic_layers(model).values())]
    assert result.kinds == tuple(present) and result.images == IMAGES
    all_kinds = frozenset(present)
    expected = {kept: count_correct(replace_by_hand(model, kept, replace)) for kept in list_subsets(present)}
    assert result.correct == expected
    lost = {kind: 100 * (expected[all_kinds] - expected[all_kinds - {kind}]) / IMAGES for kind in present}
    assert result.leave_one_out() == pytest.approx(lost)
    assert model.training and not any("forward" in vars(module) for module in model.modules())


class Rectified(nn.Conv2d):
    """A subclass whose output is not linear in its kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


@pytest.mark.parametrize("replace", ["zero", "constant"])
@pytest.mark.parametrize("kind_of_layer", ["shared", "subclass"])
def test_accuracy_of_subsets_matches_brute_force_for_unusual_layers(kind_of_layer: str, replace: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1) if kind_of_layer == "shared" else Rectified(3, 3, 3, padding=1)
    layers = [conv, nn.ReLU(), conv] if kind_of_layer == "shared" else [conv, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    acl.convert(model, "all", "G5 P4")
    result = attribute(model, iterate_batches, replace, progress=False)
    weight, slot_kinds = model[0].weight.detach(), model[0].slot_kinds
    acl.fold(model.eval())
    for kept, correct in result.correct.items():
        is_kept = torch.tensor([kind in kept for kind in slot_kinds]).view(3, 3, 1, 1)
        removed = weight.mean((2, 3), keepdim=True) if replace == "constant" else 0.0
        model[0].weight.data.copy_(torch.where(is_kept, weight, removed))
        assert correct == count_correct(model), kept


def test_shapley_values_are_means_over_all_orders_and_sum_to_drop() -> None:
    result = attribute(make_network(arrange_all_kinds(), "G8 Lg8 P8"), iterate_batches, progress=False)
    values = result.shapley()
    assert result.drop == result.accuracy(KINDS) - result.accuracy([]) != 0
    assert abs(sum(values.values()) - result.drop) < 1e-12
    gains = dict.fromkeys(KINDS, 0.0)
    for order in permutations(KINDS):
        for i, kind in enumerate(order):
            gains[kind] += result.accuracy(order[: i + 1]) - result.accuracy(order[:i])
    orders = math.factorial(len(KINDS))
    assert all(math.isclose(values[kind], gains[kind] / orders, abs_tol=1e-9) for kind in KINDS)


def test_shapley_value_of_absent_kind_is_zero() -> None:
    values = attribute(make_network("G12 P12"), iterate_batches, progress=False).shapley()
    assert set(values) == set(KINDS)
    assert {kind for kind, value in values.items() if value == 0} >= set(KINDS) - {"G", "P"}


def test_mean_replacement_keeps_accuracy_on_constant_images() -> None:
    """On constant images, every kernel outputs its mean, so removing it changes nothing."""
    model = make_network(arrange_all_kinds())

    def iterate_constant_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for n in BATCH_SIZES:
            yield torch.ones(n, 3, 16, 16), torch.arange(n) % 4

    constant = attribute(model, iterate_constant_batches, replace="mean", progress=False)
    assert len(set(constant.correct.values())) == 1
    varied = attribute(model, iterate_batches, replace="mean", progress=False)
    zeroed = attribute(model, iterate_batches, progress=False)
    intact = frozenset(varied.kinds)
    assert varied.correct[intact] == zeroed.correct[intact]
    assert len(set(varied.correct.values())) > 1


@pytest.mark.parametrize("replace", ["zero", "constant"])
def test_outputs_are_those_of_network_whose_kernels_are_replaced_by_hand(replace: str) -> None:
    model = make_network(arrange_all_kinds(), "G8 Lg8 P8")
    outputs: list[Tensor] = []
    model[-1].register_forward_hook(lambda *args: outputs.append(args[-1]))
    attribute(model, iterate_batches, replace, progress=False)
    images, _ = next(iterate_batches())
    for kept, output in zip(list_subsets(KINDS), outputs[1:], strict=False):  # the first pass finds the first layer
        torch.testing.assert_close(output, replace_by_hand(model, kept, replace)(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arrangements", [("G12 P12",), ("G12 P12", "G8 Lg8 P8")])
def test_removing_constant_kernels_changes_nothing_if_constants_replace_them(arrangements: tuple[str, ...]) -> None:
    model = make_network(*arrangements)
    akps = {"theta": 0.0, "psi": 0.0, "wavelength": 1e6, "sigma": 1e6}  # a constant kernel
    for layer in acl.analytic_layers(model).values():
        layer.set_akps("G", {name: torch.full((layer.arrangement.counts["G"],), value) for name, value in akps.items()})
        layer.plain.data.copy_(layer.plain.data[:, :1, :1].expand_as(layer.plain))
    lost = leave_one_out(model, iterate_batches, "constant", progress=False)
    for name, layer in acl.analytic_layers(model).items():
        is_constant = torch.tensor([kind in ("G", "P") for kind in layer.slot_kinds])
        assert not lost[name][is_constant].any()
    result = attribute(model, iterate_batches, "constant", progress=False)
    assert result.leave_one_out()["G"] == result.leave_one_out()["P"] == 0
    assert any(values.any() for values in leave_one_out(model, iterate_batches, progress=False).values())


def test_constant_replaces_kernels_that_sum_to_zero_by_zero() -> None:
    model = make_network("Lg6 Lt6 Tf6 Ts6")
    results = [attribute(model, iterate_batches, replace, progress=False) for replace in ("zero", "constant")]
    assert results[0].correct == results[1].correct


def test_first_layer_convolves_once_per_kind_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_network(arrange_all_kinds())
    calls = []
    convolve = acl.AnalyticConv2d.convolve

    def count_and_convolve(self: acl.AnalyticConv2d, *args: Tensor, **options: Tensor) -> Tensor:
        calls.append(self)
        return convolve(self, *args, **options)

    monkeypatch.setattr(acl.AnalyticConv2d, "convolve", count_and_convolve)
    attribute(model, iterate_batches, progress=False)
    assert len(calls) == len(KINDS) * len(BATCH_SIZES) + 1  # one more call finds out which layer runs first


@pytest.mark.parametrize("replace", ["zero", "constant"])
def test_leave_one_out_matches_brute_force(replace: str) -> None:
    model = make_network("G12 P12", "P24")
    lost = leave_one_out(model, iterate_batches, replace, progress=False)
    assert {name: len(values) for name, values in lost.items()} == {"0": 24, "3": 24}
    intact = count_correct(replace_by_hand(model, KINDS, replace))
    for name, slot in (("0", 0), ("0", 17), ("3", 5)):
        folded = acl.fold(make_network("G12 P12", "P24")).eval()
        weight = folded.get_submodule(name).weight.data
        kernel = weight[divmod(slot, weight.shape[1])]
        kernel.fill_(kernel.mean() if replace == "constant" else 0)
        assert lost[name][slot].item() == pytest.approx(100 * (intact - count_correct(folded)) / IMAGES)
    assert model.training and not any("forward" in vars(module) for module in model.modules())


def iterate_no_batches() -> Iterator[tuple[Tensor, Tensor]]:
    return iter(())


@pytest.mark.parametrize(
    ("arrangements", "batches", "options", "message"),
    [
        ((), iterate_batches, {}, "the network has no analytic layer"),
        (("G100%",), iterate_no_batches, {}, "the data set is empty"),
        (("G100%",), iterate_batches, {"replace": "noise"}, "unknown replace 'noise'; known: zero, mean, constant"),
    ],
    ids=["no analytic layer", "no data", "unknown replace"],
)
def test_attribute_rejects_invalid_arguments(
    arrangements: tuple[str, ...], batches: Batches, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(make_network(*arrangements), batches, progress=False, **options)


@pytest.mark.parametrize("measure", [attribute, leave_one_out])
def test_outputs_and_labels_of_other_shapes_are_rejected(measure: Callable[..., object]) -> None:
    def with_columns() -> Iterator[tuple[Tensor, Tensor]]:
        return ((inputs, labels[:, None]) for inputs, labels in iterate_batches())

    class TwoHeads(nn.Sequential):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002 - nn.Sequential's name
            logits = super().forward(input)
            return logits, logits

    model, message = make_network("G100%"), r"a network must return logits \(n, classes\) for labels \(n,\), got "
    with pytest.raises(ValueError, match=message + r"of the shape \(\d+, \d+\) for labels \(\d+, 1\)"):
        measure(model, with_columns, progress=False)
    with pytest.raises(ValueError, match=message + "a tuple"):
        measure(TwoHeads(*model), iterate_batches, progress=False)


def test_leave_one_out_rejects_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="the network has no analytic layer"):
        leave_one_out(make_network(), iterate_batches, progress=False)
    with pytest.raises(ValueError, match="the data set is empty"):
        leave_one_out(make_network("G100%"), iterate_no_batches, progress=False)
    with pytest.raises(ValueError, match="unknown replace 'mean'; known: zero, constant"):
        leave_one_out(make_network("G100%"), iterate_batches, "mean", progress=False)
    with pytest.raises(ValueError, match="no analytic layer is named 'conv1'; the network has: 0"):
        leave_one_out(make_network("G100%"), iterate_batches, progress=False, slots={"conv1": [0]})
    with pytest.raises(IndexError, match="slot 24 is out of range; the layer has slots 0 to 23"):
        leave_one_out(make_network("G100%"), iterate_batches, progress=False, slots={"0": [0, 24]})


def test_accuracy_takes_one_symbol_or_several() -> None:
    result = attribute(make_network("G12 Lg12"), iterate_batches, progress=False)
    assert result.accuracy("Lg") == result.accuracy(["Lg"]) != result.accuracy([])
    with pytest.raises(ValueError, match="unknown kind 'LG'; known: G, Lg"):
        result.accuracy(["LG"])


def test_compiled_network_has_the_contributions_and_multiply_adds_of_eager_one() -> None:
    model = make_network("G12 P12", "G12 Lg12").eval()
    x = next(iterate_batches())[0]
    expected = [attribute(model, iterate_batches, replace, progress=False) for replace in REPLACEMENTS]
    single, summary = leave_one_out(model, iterate_batches, progress=False), acl.summary(model, x)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert [attribute(model, iterate_batches, replace, progress=False) for replace in REPLACEMENTS] == expected
    assert acl.summary(model, x) == summary
    for name, values in leave_one_out(model, iterate_batches, progress=False).items():
        assert torch.equal(values, single[name])


def test_require_analytic_layers_returns_them_or_raises() -> None:
    model = make_network("G100%")
    assert require_analytic_layers(model) == acl.analytic_layers(model) != {}
    with pytest.raises(ValueError, match="the network has no analytic layer"):
        require_analytic_layers(acl.fold(model))


@pytest.mark.parametrize("num_passes", [0, 1])  # the first pass only finds the first analytic layer
@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_attribute_leaves_no_hooks_if_network_fails(replace: str, num_passes: int) -> None:
    layer = acl.AnalyticConv2d(1, 2, 3, arrangement="G100%")
    inputs = iter([torch.zeros(1, 1, 8, 8)] * num_passes + [torch.zeros(1, 3, 8, 8)])
    with pytest.raises(RuntimeError, match="channels"):
        attribute(nn.Sequential(layer), lambda: [(next(inputs), torch.zeros(1))], replace, progress=False)
    assert not layer._forward_pre_hooks


class Center(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.4) if self.in_place else x - 0.4


def test_network_that_edits_its_input_is_measured_right() -> None:
    layers = make_network("G100%")
    in_place, copying = (nn.Sequential(Center(value), *layers) for value in (True, False))
    lost = [leave_one_out(model, iterate_batches, progress=False)["1"] for model in (in_place, copying)]
    assert torch.equal(*lost)
    for replace in REPLACEMENTS:
        attributions = [attribute(model, iterate_batches, replace, progress=False) for model in (in_place, copying)]
        assert attributions[0].correct == attributions[1].correct


def test_patched_forward_pass_is_refused_and_kept() -> None:
    model = make_network("G100%")
    forward = model[0].forward
    patched = model[0].forward = lambda x: 2 * forward(x)
    for measure in (attribute, leave_one_out):
        with pytest.raises(ValueError, match="cannot measure 0: its forward pass is patched"):
            measure(model, iterate_batches, progress=False)
    assert model[0].forward is patched
