"""The truths of the five kinds, in float64, and their behaviour at the edges."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from acl import kernels
from acl.kernels import AMPLITUDE, FAMILIES, KINDS, PROFILES, Kind

ANALYTIC = [kind for kind in KINDS.values() if kind.function is not None]
# (kind, profile): a profile only where the kind takes one
VARIANTS = [(kind, profile) for kind in ANALYTIC for profile in (PROFILES if kind.profiled else PROFILES[:1])]
IDS = [f"{kind.symbol}-{profile}" if kind.profiled else kind.symbol for kind, profile in VARIANTS]
SIZES = [(5, 5), (6, 6), (7, 7), (8, 8), (5, 9), (8, 5), (11, 11), (15, 15)]


def draw(kind: Kind, count: int, high: float = 6.0, family: str = "paper") -> dict[str, Tensor]:
    """AKPs anywhere in range: widths from just above their floor, angles all round."""
    akps = {}
    for akp in kind.parameters(family):
        if akp.floor is None:
            akps[akp.name] = (torch.rand(count, dtype=torch.double) - 0.5) * 4 * math.pi
        else:
            akps[akp.name] = akp.floor + 1e-3 + torch.rand(count, dtype=torch.double) * high
    return akps


def synthesise(kind: Kind, profile: str, akps: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    assert kind.function is not None
    return kind.function(**akps, size=size, **({"profile": profile} if kind.profiled else {}))


def grid(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.double) - (n - 1) / 2 for n in size), indexing="ij")
    return x, y


def response(kernel: Tensor, image: Tensor) -> Tensor:
    return (kernel * image).sum((-2, -1))


def along(akps: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    x, y = grid(size)
    theta = akps["theta"][:, None, None]
    return x * theta.cos() + y * theta.sin(), y * theta.cos() - x * theta.sin()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), [v for v in VARIANTS if v[0].symbol != "G"], ids=IDS[1:])
def test_sums_to_zero(kind: Kind, profile: str, family: str, size: tuple[int, int]) -> None:
    kernel = synthesise(kind, profile, draw(kind, 500, family=family), size)
    assert kernel.sum((-2, -1)).abs().max() < 1e-12
    assert kernel.shape == (500, *size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "profile"), [v for v in VARIANTS if v[0].symbol != "G"], ids=IDS[1:])
def test_parity_under_point_reflection(kind: Kind, profile: str, size: tuple[int, int]) -> None:
    kernel = synthesise(kind, profile, draw(kind, 500), size)
    reflected = kernel.flip(-1, -2)
    assert (kernel - (-reflected if kind.symbol == "Tf" else reflected)).abs().max() < 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("profile", PROFILES)
def test_tgd1_answers_to_a_rise_along_its_direction(profile: str, size: tuple[int, int]) -> None:
    akps = draw(KINDS["Tf"], 500)
    kernel = synthesise(KINDS["Tf"], profile, akps, size)
    answer = response(kernel, along(akps, size)[0])
    # A linear profile narrower than the way to the nearest pixel leaves an all-zero kernel, by definition.
    vanished = (
        (kernel == 0).all(-1).all(-1) & (akps["s"] < 0.5**0.5) if profile == "linear" else torch.zeros(500).bool()
    )
    assert ((answer > 0) | vanished).all()


@pytest.mark.parametrize("k", range(5, 16))
def test_a_well_sampled_tgd1_hardly_answers_across(k: int) -> None:
    size = (k, k)
    akps = {name: 1 + torch.rand(8000, dtype=torch.double) * (k / 4 - 1) for name in ("s", "sigma")}
    akps["theta"] = torch.rand(8000, dtype=torch.double) * 2 * math.pi
    kernel = synthesise(KINDS["Tf"], "exponential", akps, size)
    ramp, across = along(akps, size)
    # In the corner s = 1 px, sigma = k/4 a rare angle reaches 0.112 from k = 14 on (of 100,000 draws).
    bound = 0.1 if k < 14 else 0.12
    assert (response(kernel, across).abs() < bound * response(kernel, ramp)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "profile"), [v for v in VARIANTS if v[0].symbol in ("Lg", "Lt", "Ts")], ids=str)
def test_second_differences(kind: Kind, profile: str, size: tuple[int, int]) -> None:
    akps = draw(kind, 500)
    kernel = synthesise(kind, profile, akps, size)
    x, y = grid(size)
    for ramp in (x, y, 3 * x - 2 * y + 1):
        assert response(kernel, ramp).abs().max() < 1e-11
    if size[0] % 2 and size[1] % 2 and profile == "exponential":
        for parabola in [along(akps, size)[0] ** 2] if kind.symbol == "Ts" else [x**2, y**2]:
            assert (response(kernel, parabola) > 0).all()


@pytest.mark.parametrize("k", [4, 5, 8, 11])
@pytest.mark.parametrize(("kind", "profile"), [v for v in VARIANTS if "theta" in [a.name for a in v[0].akps]], ids=str)
def test_a_quarter_turn_of_theta_is_a_quarter_turn_of_the_array(kind: Kind, profile: str, k: int) -> None:
    akps = draw(kind, 200)
    kernel = synthesise(kind, profile, akps, (k, k))
    turned = synthesise(kind, profile, {**akps, "theta": akps["theta"] + math.pi / 2}, (k, k))
    assert (turned - kernel.rot90(-1, (-2, -1))).abs().max() < 1e-10


def _reference(symbol: str, a: dict[str, float], size: tuple[int, int], profile: str) -> np.ndarray:
    """The table of formulas, written down a second time, pixel by pixel."""
    kh, kw = size

    def tri(t: float) -> float:
        return max(0.0, 1 - abs(t))

    def w(t: float) -> float:
        s = a["s"]
        return {
            "exponential": math.exp(-t / s),
            "gaussian": math.exp(-t * t / (2 * s * s)),
            "linear": max(0.0, 1 - t / s),
        }[profile]

    first, second = np.zeros(size), np.zeros(size)
    for i in range(kh):
        for j in range(kw):
            x, y = j - (kw - 1) / 2, i - (kh - 1) / 2
            r = math.hypot(x, y)
            theta = a.get("theta", 0.0)
            u = x * math.cos(theta) + y * math.sin(theta)
            v = -x * math.sin(theta) + y * math.cos(theta)
            n = math.exp(-v * v / (2 * a["sigma"] ** 2)) if "sigma" in a else 1.0
            if symbol == "G":
                wave = math.cos(2 * math.pi * u / a["wavelength"] + a["psi"])
                first[i, j] = math.exp(-(u * u + v * v) / (2 * a["sigma"] ** 2)) * wave
            elif symbol == "Lg":
                q = r * r / (2 * a["sigma"] ** 2)
                first[i, j] = (q - 1) * math.exp(-q)
            elif symbol == "Lt":
                second[i, j] = tri(x) * tri(y)
                first[i, j] = w(r) * (1 - second[i, j])
            elif symbol == "Tf":
                first[i, j] = min(1.0, max(-1.0, 2 * u)) * w(abs(u)) * n
            else:
                second[i, j] = tri(u) * n
                first[i, j] = w(abs(u)) * (1 - tri(u)) * n
    if symbol == "Lg":
        return first - first.mean()
    if symbol in ("Lt", "Ts"):
        return first / first.sum() - second / second.sum()
    return first


@pytest.mark.parametrize("size", [(5, 5), (6, 4), (7, 7), (1, 5)])
@pytest.mark.parametrize(("kind", "profile"), VARIANTS, ids=IDS)
def test_agrees_with_the_formula(kind: Kind, profile: str, size: tuple[int, int]) -> None:
    akps = draw(kind, 20)
    if "s" in akps:
        akps["s"] += 1.0  # wide enough for every profile to reach a neighbour
    kernel = synthesise(kind, profile, akps, size)
    for n in range(20):
        wanted = _reference(kind.symbol, {name: value[n].item() for name, value in akps.items()}, size, profile)
        np.testing.assert_allclose(kernel[n].numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 5), (4, 6)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), VARIANTS, ids=IDS)
def test_gradients(kind: Kind, profile: str, family: str, size: tuple[int, int]) -> None:
    names = [akp.name for akp in kind.parameters(family)]
    start = {}
    for akp in kind.parameters(family):
        low, high = akp.start(5)
        start[akp.name] = low + torch.rand(3, dtype=torch.double) * (high - low)
    if profile == "linear":
        start["s"] += 1.0

    def function(*values: Tensor) -> Tensor:
        return synthesise(kind, profile, dict(zip(names, values, strict=True)), size)

    assert torch.autograd.gradcheck(function, [start[name].requires_grad_() for name in names])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), VARIANTS, ids=IDS)
def test_extreme_values_stay_finite(kind: Kind, profile: str, family: str) -> None:
    """10,000 AKPs per kind, held raw as a layer holds them, from the floor to far out, at sizes 1 to 11."""
    for k in range(1, 12):
        for size in [(k, k), (1, k), (k, 12 - k)]:
            raws = {}
            for akp in kind.parameters(family):
                spread = torch.tensor([1e-3, 1.0, 10.0, 1e3, 1e6])[torch.randint(5, (310,))]
                raws[akp.name] = (torch.randn(310) * spread).requires_grad_()
            akps = {akp.name: akp.natural(raws[akp.name]) for akp in kind.parameters(family)}
            kernel = synthesise(kind, profile, akps, size)
            assert kernel.isfinite().all()
            (kernel * torch.randn_like(kernel)).sum().backward()
            assert all(raw.grad is not None and raw.grad.isfinite().all() for raw in raws.values())


@pytest.mark.parametrize(
    ("kind", "profile", "akps", "size"),
    [
        ("Tf", "exponential", {"theta": 0.3, "s": 1.0, "sigma": 1.0}, (1, 1)),
        ("Ts", "exponential", {"theta": 0.3, "s": 1.0, "sigma": 1.0}, (1, 1)),
        ("Lt", "exponential", {"s": 1.0}, (1, 1)),
        ("Lg", "exponential", {"sigma": 1.0}, (1, 1)),
        ("Lt", "linear", {"s": 0.6}, (5, 5)),
        ("Ts", "linear", {"theta": 0.0, "s": 0.6, "sigma": 1.0}, (5, 5)),
    ],
)
def test_degenerate_kernels_are_zero_with_finite_gradients(
    kind: str, profile: str, akps: dict[str, float], size: tuple[int, int]
) -> None:
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in akps.items()}
    kernel = synthesise(KINDS[kind], profile, tensors, size)
    assert (kernel == 0).all()
    kernel.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize(("kind", "profile"), VARIANTS, ids=IDS)
def test_the_extended_family_moves_a_kernel_by_whole_pixels(kind: Kind, profile: str) -> None:
    """Far from the window's edge, an offset of whole pixels is the kernel moved."""
    akps = {name: 0.8 + 0 * value for name, value in draw(kind, 1, family="paper").items()}
    if profile == "linear":
        akps["s"] += 1.0
    if kind.symbol == "G":
        akps["wavelength"] += 3.0
    size = (41, 41)
    still = synthesise(kind, profile, akps, size)
    offset = {"x0": torch.full((1,), 3.0).double(), "y0": torch.full((1,), -2.0).double()}
    moved = synthesise(kind, profile, {**akps, **offset}, size)
    assert (moved - still.roll((-2, 3), (-2, -1))).abs().max() < 1e-6


@pytest.mark.parametrize(
    "akp", [akp for kind in ANALYTIC for akp in (*kind.parameters("extended"), AMPLITUDE)], ids=str
)
def test_raw_and_natural_are_inverse(akp: kernels.AKP) -> None:
    values = akp.draw(1000, (7, 7)).double()
    low, high = akp.start(7)
    assert ((values >= low) & (values <= high)).all()
    assert (akp.natural(akp.raw(values)) - values).abs().max() < 1e-9
    if akp.floor is not None:
        assert akp.natural(torch.tensor(-1e9)) >= akp.floor
        with pytest.raises(ValueError, match=f"{akp.name} is above {akp.floor:g}"):
            akp.raw(torch.tensor(akp.floor))


def test_half_precision_parameters_are_computed_in_float32() -> None:
    theta = torch.rand(4, dtype=torch.bfloat16)
    width = torch.ones(4, dtype=torch.bfloat16)
    assert kernels.tgd1(theta, width, width, size=(5, 5)).dtype == torch.float32


def test_bad_arguments_are_named() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="unknown profile 'box'; known: exponential, gaussian, linear"):
        kernels.lot(one, size=(5, 5), profile="box")
    with pytest.raises(ValueError, match=r"at least \(1, 1\), got \(0, 5\)"):
        kernels.log(one, size=(0, 5))
