"""Properties of every kind of kernel, and of individual kinds, in float64."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from acl.kernels import AKP, AMPLITUDE, FAMILIES, KINDS, PROFILES, Kind, analytic_kinds, log, lot

SIZES = [(5, 5), (6, 6), (7, 7), (8, 8), (5, 9), (8, 5), (11, 11), (15, 15)]
OFFSETS = {"x0", "y0"}

# Properties of individual kinds, by symbol. A kind without any of them is not listed.
ZERO_SUM = ("Lg", "Lt", "Tf", "Ts")
PARITY = {"Lg": 1, "Lt": 1, "Tf": -1, "Ts": 1}
SECOND_DIFFERENCES = ("Lg", "Lt", "Ts")


def list_variants(symbols: Iterable[str]) -> list:
    """Test parameters (kind, profile), with every profile for kinds that take one."""
    variants = []
    for kind in (KINDS[symbol] for symbol in symbols):
        if kind.takes_profile:
            variants += [pytest.param(kind, profile, id=f"{kind.symbol}-{profile}") for profile in PROFILES]
        else:
            variants.append(pytest.param(kind, PROFILES[0], id=kind.symbol))
    return variants


EVERY_VARIANT = list_variants(analytic_kinds())
VARIANTS_WITH_THETA = list_variants(
    symbol for symbol, kind in analytic_kinds().items() if "theta" in {akp.name for akp in kind.akps()}
)
VARIANTS_WITH_OFFSETS = list_variants(
    symbol for symbol, kind in analytic_kinds().items() if {akp.name for akp in kind.extended_akps} >= OFFSETS
)


def sample_akps(kind: Kind, count: int, high: float = 6.0, family: str = "paper") -> dict[str, Tensor]:
    """AKPs from their whole range: widths from just above their floor, angles in all directions."""
    akps = {}
    for akp in kind.akps(family):
        if akp.floor is None:
            akps[akp.name] = (torch.rand(count, dtype=torch.double) - 0.5) * 4 * math.pi
        else:
            akps[akp.name] = akp.floor + 1e-3 + torch.rand(count, dtype=torch.double) * high
    return akps


def sample_initial_akps(kind: Kind, count: int, family: str = "paper") -> dict[str, Tensor]:
    """AKPs from the initial ranges of a 5 x 5 layer."""
    return {akp.name: akp.sample(count, (5, 5)).double() for akp in kind.akps(family)}


def make_grid(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.double) - (n - 1) / 2 for n in size), indexing="ij")
    return x, y


def make_rotated_grid(theta: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    x, y = make_grid(size)
    theta = theta[:, None, None]
    return x * theta.cos() + y * theta.sin(), y * theta.cos() - x * theta.sin()


def compute_response(kernel: Tensor, image: Tensor) -> Tensor:
    return (kernel * image).sum((-2, -1))


# Every kind


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [(5, 5), (1, 1), (4, 7)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), EVERY_VARIANT)
def test_kernel_shape_follows_akps_and_size(
    kind: Kind, profile: str, family: str, size: tuple[int, int], shape: tuple[int, ...]
) -> None:
    akps = {name: values.reshape(shape) for name, values in sample_akps(kind, math.prod(shape), family=family).items()}
    kernel = kind.synthesize(akps, size, profile)
    assert kernel.shape == (*shape, *size)
    assert kernel.dtype == torch.double


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), EVERY_VARIANT)
def test_broadcast_akps_give_kernels_of_expanded_akps(kind: Kind, profile: str, family: str) -> None:
    rows, columns = sample_akps(kind, 3, family=family), sample_akps(kind, 4, family=family)
    akps = {name: rows[name][:, None] if i % 2 else columns[name] for i, name in enumerate(rows)}
    expanded = dict(zip(akps, torch.broadcast_tensors(*akps.values()), strict=True))
    broadcast = kind.synthesize(akps, (5, 5), profile)
    assert torch.equal(broadcast, kind.synthesize(expanded, (5, 5), profile))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float, torch.double], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), EVERY_VARIANT)
def test_kernel_dtype_is_at_least_float32(kind: Kind, profile: str, family: str, dtype: torch.dtype) -> None:
    akps = {name: values.to(dtype) for name, values in sample_initial_akps(kind, 4, family).items()}
    kernel = kind.synthesize(akps, (5, 5), profile)
    assert kernel.dtype == torch.promote_types(dtype, torch.float32)
    converted = {name: values.to(kernel.dtype) for name, values in akps.items()}
    assert torch.equal(kernel, kind.synthesize(converted, (5, 5), profile))


@pytest.mark.parametrize("size", [(5, 5), (4, 6)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), EVERY_VARIANT)
def test_kernel_gradients_agree_with_finite_differences(
    kind: Kind, profile: str, family: str, size: tuple[int, int]
) -> None:
    akps = sample_initial_akps(kind, 3, family)
    if profile == "linear" and "s" in akps:
        akps["s"] += 1.0

    def synthesize(*values: Tensor) -> Tensor:
        return kind.synthesize(dict(zip(akps, values, strict=True)), size, profile)

    assert torch.autograd.gradcheck(synthesize, [values.requires_grad_() for values in akps.values()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), EVERY_VARIANT)
def test_extreme_akps_give_finite_kernels_and_gradients(kind: Kind, profile: str, family: str) -> None:
    """10,000 kernels of each kind at sizes 1 to 11, with AKPs stored raw as in a layer, from the floor to 1e6."""
    for k in range(1, 12):
        for size in [(k, k), (1, k), (k, 12 - k)]:
            raw = {}
            for akp in kind.akps(family):
                spread = torch.tensor([1e-3, 1.0, 10.0, 1e3, 1e6])[torch.randint(5, (310,))]
                raw[akp.name] = (torch.randn(310) * spread).requires_grad_()
            akps = {akp.name: akp.to_natural(raw[akp.name]) for akp in kind.akps(family)}
            kernel = kind.synthesize(akps, size, profile)
            assert kernel.isfinite().all()
            (kernel * torch.randn_like(kernel)).sum().backward()
            assert all(values.grad is not None and values.grad.isfinite().all() for values in raw.values())


@pytest.mark.parametrize("k", [4, 5, 8, 11])
@pytest.mark.parametrize(("kind", "profile"), VARIANTS_WITH_THETA)
def test_quarter_turn_of_theta_rotates_kernel(kind: Kind, profile: str, k: int) -> None:
    akps = sample_akps(kind, 200)
    kernel = kind.synthesize(akps, (k, k), profile)
    turned = kind.synthesize({**akps, "theta": akps["theta"] + math.pi / 2}, (k, k), profile)
    assert (turned - kernel.rot90(-1, (-2, -1))).abs().max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), EVERY_VARIANT)
def test_every_angle_has_its_smallest_period(kind: Kind, profile: str, family: str) -> None:
    akps = sample_initial_akps(kind, 50, family)
    kernel = kind.synthesize(akps, (5, 6), profile)
    for akp in kind.akps(family):
        assert (akp.period is not None) == (akp.unit == "rad")
        for change in (1, -2, 1 / 2, 1 / 3) if akp.period is not None else ():
            moved = kind.synthesize({**akps, akp.name: akps[akp.name] + change * akp.period}, (5, 6), profile)
            assert ((moved - kernel).abs().max() < 1e-12) == isinstance(change, int)


@pytest.mark.parametrize(("kind", "profile"), VARIANTS_WITH_OFFSETS)
def test_offset_by_whole_pixels_shifts_kernel(kind: Kind, profile: str) -> None:
    """If the kernel vanishes well inside the window, an offset of whole pixels shifts it."""
    akps = {
        akp.name: torch.full((1,), 0.8 if akp.floor is None else akp.floor + 0.5, dtype=torch.double)
        for akp in kind.akps()
    }
    if profile == "linear" and "s" in akps:
        akps["s"] += 1.0
    offset = {"x0": torch.full((1,), 3.0).double(), "y0": torch.full((1,), -2.0).double()}
    centered = kind.synthesize(akps, (41, 41), profile)
    shifted = kind.synthesize({**akps, **offset}, (41, 41), profile)
    assert (shifted - centered.roll((-2, 3), (-2, -1))).abs().max() < 1e-6
    assert centered.abs().max() > 1e-2


@pytest.mark.parametrize("size", [(5, 5), (6, 4)])
@pytest.mark.parametrize(("kind", "profile"), VARIANTS_WITH_OFFSETS)
def test_zero_offset_gives_paper_kernel(kind: Kind, profile: str, size: tuple[int, int]) -> None:
    akps = sample_akps(kind, 500)
    offset = dict.fromkeys(OFFSETS, torch.zeros(500, dtype=torch.double))
    centered = kind.synthesize(akps, size, profile)
    assert (kind.synthesize({**akps, **offset}, size, profile) - centered).abs().max() < 1e-12


@pytest.mark.parametrize(
    "akp",
    [
        pytest.param(akp, id=f"{kind.symbol}-{akp.name}")
        for kind in analytic_kinds().values()
        for akp in kind.akps("extended", amplitude=True)
    ],
)
def test_to_raw_inverts_to_natural(akp: AKP) -> None:
    values = akp.sample(1000, (7, 7)).double()
    low, high = akp.init_range(7)
    assert ((values >= low) & (values <= high)).all()
    assert (akp.to_natural(akp.to_raw(values)) - values).abs().max() < 1e-9
    if akp.floor is not None:
        assert akp.to_natural(torch.tensor(-1e9)) >= akp.floor
        with pytest.raises(ValueError, match=f"{akp.name} must be above {akp.floor:g}.*, got {akp.floor:g}"):
            akp.to_raw(torch.tensor(akp.floor))


@pytest.mark.parametrize("kind", analytic_kinds().values(), ids=lambda kind: kind.symbol)
def test_akps_include_those_of_family_and_amplitude(kind: Kind) -> None:
    assert kind.akps() == kind.paper_akps
    assert kind.akps("extended") == kind.paper_akps + kind.extended_akps
    assert kind.akps(amplitude=True) == (*kind.paper_akps, AMPLITUDE)


def test_analytic_kinds_are_kinds_with_formula() -> None:
    assert analytic_kinds() == {symbol: kind for symbol, kind in KINDS.items() if kind.is_analytic}


@pytest.mark.parametrize("symbol", [symbol for symbol in KINDS if symbol not in analytic_kinds()])
def test_kind_without_formula_has_no_akps_and_rejects_synthesize(symbol: str) -> None:
    kind = KINDS[symbol]
    assert kind.akps("extended", amplitude=True) == ()
    with pytest.raises(ValueError, match=rf"kind {symbol} \({kind.name}\) has no formula"):
        kind.synthesize({}, (5, 5))


def test_error_names_invalid_argument() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="unknown profile 'box'; known: exponential, gaussian, linear"):
        lot(one, size=(5, 5), profile="box")
    with pytest.raises(ValueError, match=r"at least \(1, 1\), got \(0, 5\)"):
        log(one, size=(0, 5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", analytic_kinds().values(), ids=lambda kind: kind.symbol)
def test_fake_and_inference_tensors_leave_later_gradients_unchanged(
    kind: Kind, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the functions keep between calls must not come from such a call."""
    akps = sample_initial_akps(kind, 3, family)

    def compute_gradients() -> tuple[Tensor, ...]:
        leaves = {name: values.clone().requires_grad_() for name, values in akps.items()}
        return torch.autograd.grad(kind.synthesize(leaves, (5, 4)).square().sum(), [*leaves.values()])

    expected = compute_gradients()
    for context in (torch.inference_mode, FakeTensorMode, lambda: FakeTensorMode(allow_non_fake_inputs=True)):
        monkeypatch.setattr("acl.kernels._grids", {})
        with context() as mode:
            is_fake = isinstance(mode, FakeTensorMode)
            values = {name: mode.from_tensor(v) if is_fake else v.clone() for name, v in akps.items()}
            kind.synthesize(values, (5, 4))
            if is_fake and mode.allow_non_fake_inputs:
                kind.synthesize(akps, (5, 4))
        assert all(map(torch.equal, compute_gradients(), expected))


def test_function_transform_in_first_call_leaves_later_kernels_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    sigma = torch.tensor(1.5)
    expected = log(sigma, size=(5, 5))
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian, torch.func.functionalize):
        monkeypatch.setattr("acl.kernels._grids", {})
        transform(lambda s: log(s, size=(5, 5)))(sigma)
        assert torch.equal(log(sigma, size=(5, 5)), expected)


# Individual kinds


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "profile"), list_variants(ZERO_SUM))
def test_kernel_sums_to_zero(kind: Kind, profile: str, family: str, size: tuple[int, int]) -> None:
    kernel = kind.synthesize(sample_akps(kind, 500, family=family), size, profile)
    assert kernel.sum((-2, -1)).abs().max() < 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "profile"), list_variants(PARITY))
def test_point_reflection_multiplies_kernel_by_parity(kind: Kind, profile: str, size: tuple[int, int]) -> None:
    kernel = kind.synthesize(sample_akps(kind, 500), size, profile)
    assert (kernel - PARITY[kind.symbol] * kernel.flip(-1, -2)).abs().max() < 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("profile", PROFILES)
def test_tgd1_response_to_ramp_along_theta_is_positive(profile: str, size: tuple[int, int]) -> None:
    akps = sample_akps(KINDS["Tf"], 500)
    kernel = KINDS["Tf"].synthesize(akps, size, profile)
    response = compute_response(kernel, make_rotated_grid(akps["theta"], size)[0])
    # By definition, the kernel is zero if a linear profile is too narrow to reach the nearest pixel.
    is_zero = (kernel == 0).all(-1).all(-1)
    can_be_zero = (akps["s"] < 0.5**0.5) & (profile == "linear")
    assert ((response > 0) | (is_zero & can_be_zero)).all()


@pytest.mark.parametrize("k", range(5, 16))
def test_tgd1_response_to_ramp_across_theta_is_small_if_well_sampled(k: int) -> None:
    size = (k, k)
    akps = {name: 1 + torch.rand(8000, dtype=torch.double) * (k / 4 - 1) for name in ("s", "sigma")}
    akps["theta"] = torch.rand(8000, dtype=torch.double) * 2 * math.pi
    kernel = KINDS["Tf"].synthesize(akps, size, "exponential")
    along, across = make_rotated_grid(akps["theta"], size)
    # At s = 1 px and sigma = k/4, a few angles reach 0.112 from k = 14 on (measured over 100,000 kernels).
    bound = 0.1 if k < 14 else 0.12
    assert (compute_response(kernel, across).abs() < bound * compute_response(kernel, along)).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "profile"), list_variants(SECOND_DIFFERENCES))
def test_second_difference_ignores_ramps(kind: Kind, profile: str, size: tuple[int, int]) -> None:
    kernel = kind.synthesize(sample_akps(kind, 500), size, profile)
    x, y = make_grid(size)
    for ramp in (x, y, 3 * x - 2 * y + 1):
        assert compute_response(kernel, ramp).abs().max() < 1e-11


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] % 2 and size[1] % 2])
@pytest.mark.parametrize("symbol", SECOND_DIFFERENCES)
def test_second_difference_response_to_parabola_is_positive(symbol: str, size: tuple[int, int]) -> None:
    akps = sample_akps(KINDS[symbol], 500)
    kernel = KINDS[symbol].synthesize(akps, size, "exponential")
    axes = [make_rotated_grid(akps["theta"], size)[0]] if "theta" in akps else make_grid(size)
    for axis in axes:
        assert (compute_response(kernel, axis**2) > 0).all()


@pytest.mark.parametrize(
    ("symbol", "profile", "akps", "size"),
    [
        ("Tf", "exponential", {"theta": 0.3, "s": 1.0, "sigma": 1.0}, (1, 1)),
        ("Ts", "exponential", {"theta": 0.3, "s": 1.0, "sigma": 1.0}, (1, 1)),
        ("Lt", "exponential", {"s": 1.0}, (1, 1)),
        ("Lg", "exponential", {"sigma": 1.0}, (1, 1)),
        ("Lt", "linear", {"s": 0.6}, (5, 5)),
        ("Ts", "linear", {"theta": 0.0, "s": 0.6, "sigma": 1.0}, (5, 5)),
    ],
)
def test_degenerate_kernel_is_zero_with_finite_gradients(
    symbol: str, profile: str, akps: dict[str, float], size: tuple[int, int]
) -> None:
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in akps.items()}
    kernel = KINDS[symbol].synthesize(tensors, size, profile)
    assert (kernel == 0).all()
    kernel.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in tensors.values())


# Reference implementations of the formulas, pixel by pixel

Akps = dict[str, float]
Size = tuple[int, int]


def tabulate(size: Size, function: Callable[[float, float], float]) -> np.ndarray:
    """The values of a function of the pixel's position (x, y)."""
    kh, kw = size
    return np.array([[function(j - (kw - 1) / 2, i - (kh - 1) / 2) for j in range(kw)] for i in range(kh)])


def rotate(x: float, y: float, theta: float) -> tuple[float, float]:
    return x * math.cos(theta) + y * math.sin(theta), -x * math.sin(theta) + y * math.cos(theta)


def evaluate_tri(t: float) -> float:
    return max(0.0, 1 - abs(t))


def evaluate_gaussian(t: float, sigma: float) -> float:
    return math.exp(-t * t / (2 * sigma * sigma))


def evaluate_profile(t: float, s: float, profile: str) -> float:
    if profile == "exponential":
        return math.exp(-t / s)
    return evaluate_gaussian(t, s) if profile == "gaussian" else max(0.0, 1 - t / s)


def compute_gabor(a: Akps, size: Size, profile: str) -> np.ndarray:
    def value(x: float, y: float) -> float:
        along, across = rotate(x, y, a["theta"])
        wave = math.cos(2 * math.pi * along / a["wavelength"] + a["psi"])
        return evaluate_gaussian(math.hypot(along, across), a["sigma"]) * wave

    return tabulate(size, value)


def compute_log(a: Akps, size: Size, profile: str) -> np.ndarray:
    def value(x: float, y: float) -> float:
        q = (x * x + y * y) / (2 * a["sigma"] ** 2)
        return (q - 1) * math.exp(-q)

    kernel = tabulate(size, value)
    return kernel - kernel.mean()


def compute_lot(a: Akps, size: Size, profile: str) -> np.ndarray:
    center = tabulate(size, lambda x, y: evaluate_tri(x) * evaluate_tri(y))
    around = tabulate(size, lambda x, y: evaluate_profile(math.hypot(x, y), a["s"], profile)) * (1 - center)
    return around / around.sum() - center / center.sum()


def compute_tgd1(a: Akps, size: Size, profile: str) -> np.ndarray:
    def value(x: float, y: float) -> float:
        along, across = rotate(x, y, a["theta"])
        step = min(1.0, max(-1.0, 2 * along))
        return step * evaluate_profile(abs(along), a["s"], profile) * evaluate_gaussian(across, a["sigma"])

    return tabulate(size, value)


def compute_tgd2(a: Akps, size: Size, profile: str) -> np.ndarray:
    def center_line(x: float, y: float) -> float:
        along, across = rotate(x, y, a["theta"])
        return evaluate_tri(along) * evaluate_gaussian(across, a["sigma"])

    def surroundings(x: float, y: float) -> float:
        along, across = rotate(x, y, a["theta"])
        smooth = evaluate_gaussian(across, a["sigma"])
        return evaluate_profile(abs(along), a["s"], profile) * (1 - evaluate_tri(along)) * smooth

    first, second = tabulate(size, surroundings), tabulate(size, center_line)
    return first / first.sum() - second / second.sum()


REFERENCES: dict[str, Callable[[Akps, Size, str], np.ndarray]] = {
    "G": compute_gabor,
    "Lg": compute_log,
    "Lt": compute_lot,
    "Tf": compute_tgd1,
    "Ts": compute_tgd2,
}


@pytest.mark.parametrize("size", [(5, 5), (6, 4), (7, 7), (1, 5)])
@pytest.mark.parametrize(("kind", "profile"), list_variants(REFERENCES))
def test_kernel_agrees_with_reference(kind: Kind, profile: str, size: Size) -> None:
    akps = sample_akps(kind, 20)
    if "s" in akps:
        akps["s"] += 1.0  # wide enough for every profile to reach a neighbor
    kernel = kind.synthesize(akps, size, profile)
    for n in range(20):
        expected = REFERENCES[kind.symbol]({name: value[n].item() for name, value in akps.items()}, size, profile)
        np.testing.assert_allclose(kernel[n].numpy(), expected, atol=1e-12)
