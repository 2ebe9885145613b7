"""Analytic convolution kernels (ACKs) as pure functions, and the registry of kernel kinds.

Each kernel is defined in one place: its function and its entry in ``KINDS``. The parser, the layer, the fit, the
plots, the printed formulas and the tests all read the registry, so adding a kind takes one function and one entry.

Coordinates: rows i and columns j of a kh x kw grid sit at x = j - (kw-1)/2 (to the right) and y = i - (kh-1)/2
(downward), in pixels. The oriented axes are x' = x cos(theta) + y sin(theta) and y' = -x sin(theta) + y cos(theta).

Every kernel function takes tensors in natural units (pixels, radians) that broadcast to one shape (...), returns
kernels (..., kh, kw) before scaling and gain, computes in at least float32, and is differentiable in every parameter.
``x0`` and ``y0`` (center offset, px) and Gabor's ``gamma`` (aspect ratio) form the ``extended`` family; their
defaults give the ``paper`` family.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Profile = Literal["exponential", "gaussian", "linear"]
Family = Literal["paper", "extended"]
Role = Literal["direction", "center_x", "center_y", "length"]
LENGTH_ROLES = ("center_x", "center_y", "length")
"""The roles of AKPs in px."""
PROFILES: tuple[str, ...] = get_args(Profile)
FAMILIES: tuple[str, ...] = get_args(Family)


class _Grid:
    """Pixel coordinates relative to the centers of kernels.

    The dimensions of the grid come before those of the AKPs (...), unlike in the kernels that are returned. Elementwise
    operations then vectorize over the kernels, and an AKP broadcasts without a view.

    ``x`` is (1, kw, ...), ``y`` is (kh, 1, ...), and ``axes`` (2, 1, 1, ...) are the angles of the x and the y axis.
    The properties (kh, kw, ...) are computed when they are first read; not by functools.cached_property, whose lock
    torch.compile does not support on Python 3.11.
    """

    def __init__(self, x: Tensor, y: Tensor, axes: Tensor) -> None:
        self.x, self.y, self.axes = x, y, axes
        self._r2: Tensor | None = None
        self._r: Tensor | None = None
        self._impulse: Tensor | None = None

    @property
    def r2(self) -> Tensor:
        """The squared distance to the center."""
        if self._r2 is None:
            self._r2 = self.x * self.x + self.y * self.y
        return self._r2

    @property
    def r(self) -> Tensor:
        """The distance to the center."""
        if self._r is None:
            # The square root has an infinite slope at r = 0. Adding (1e-12 px)^2 makes the slope 0 there and
            # is lost to rounding elsewhere.
            self._r = torch.sqrt(self.r2 + 1e-24)
        return self._r

    @property
    def impulse(self) -> Tensor:
        """tri(x) tri(y)."""
        if self._impulse is None:
            self._impulse = _tri(self.x) * _tri(self.y)
        return self._impulse


_grids: dict[tuple[Any, ...], _Grid] = {}


def _prepare(
    size: tuple[int, int], *akps: Tensor | float, x0: Tensor | float, y0: Tensor | float
) -> tuple[_Grid, list[Any]]:
    """Returns the grid around the center (x0, y0), and the AKPs in the dtype in which kernels are computed."""
    kh, kw = size
    if kh < 1 or kw < 1:
        raise ValueError(f"a kernel size must be at least (1, 1), got {tuple(size)}")
    tensors = [akp for akp in (*akps, x0, y0) if isinstance(akp, Tensor)]
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors} - {torch.float32}, torch.float32)
    key = (kh, kw, max(t.ndim for t in tensors), dtype, tensors[0].device)
    # Tensors of other types only stand for tensors, for example in an export, and so would a grid made among them.
    is_real = not torch.compiler.is_compiling() and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
    grid = _grids.get(key) if is_real else None
    if grid is None:
        grid = _make_grid(*key)
        if is_real and type(grid.x) is Tensor:
            if grid.x.is_cuda:
                torch.cuda.synchronize(grid.x.device)  # other streams may use the grid
            _grids[key] = grid
    if not _is_centered(x0, y0):
        grid = _Grid(grid.x - x0, grid.y - y0, grid.axes)
    return grid, [akp.to(dtype) if isinstance(akp, Tensor) else akp for akp in akps]


def _make_grid(kh: int, kw: int, ndim: int, dtype: torch.dtype, device: torch.device) -> _Grid:
    with torch.inference_mode(False):  # a grid made in inference mode could not be saved for a backward pass
        x = torch.arange((1 - kw) / 2, (1 + kw) / 2, dtype=dtype, device=device).view(1, kw, *[1] * ndim)
        y = torch.arange((1 - kh) / 2, (1 + kh) / 2, dtype=dtype, device=device).view(kh, 1, *[1] * ndim)
        axes = torch.arange(2, dtype=dtype, device=device).view(2, 1, 1, *[1] * ndim) * (math.pi / 2)
        grid = _Grid(x, y, axes)
        _ = grid.r2, grid.r, grid.impulse
    return grid


def _is_centered(x0: Tensor | float, y0: Tensor | float) -> bool:
    return not isinstance(x0, Tensor) and not isinstance(y0, Tensor) and x0 == y0 == 0


def _move_pixels_last(kernels: Tensor) -> Tensor:
    """(kh, kw, ...) -> (..., kh, kw), a view."""
    return kernels.permute(*range(2, kernels.ndim), 0, 1)


def _rotate(grid: _Grid, theta: Tensor) -> tuple[Tensor, ...]:
    """Returns the oriented coordinates x' and y'."""
    directions = theta + grid.axes
    return (grid.x * torch.cos(directions) + grid.y * torch.sin(directions)).unbind()


def _tri(t: Tensor) -> Tensor:
    """The triangle function: a unit impulse on the pixel grid, linearly interpolated."""
    return torch.relu(1 - t.abs())


def _gauss(squared_distance: Tensor, sigma: Tensor) -> Tensor:
    return torch.exp(squared_distance * (-0.5 * sigma.pow(-2)))


def _evaluate_profile(t: Tensor, s: Tensor, profile: str) -> Tensor:
    """The TGD kernel function w(t; s) of a distance t >= 0, with w(0; s) = 1."""
    if profile == "exponential":
        return torch.exp(t * -s.reciprocal())
    if profile == "gaussian":
        return _gauss(t * t, s)
    if profile == "linear":
        return torch.relu(1 - t / s)
    raise ValueError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")


def _sum_over_grid(t: Tensor) -> Tensor:
    return t.sum((0, 1), keepdim=True)


def _subtract_normalized(a: Tensor, b: Tensor) -> Tensor:
    """a / sum(a) - b / sum(b): zero-sum by construction. All zero, with zero gradient, if either sum vanishes."""
    total_a, total_b = _sum_over_grid(a), _sum_over_grid(b)
    vanishes = torch.minimum(total_a, total_b) <= torch.finfo(a.dtype).eps
    factor_a, factor_b = (total.masked_fill(vanishes, math.inf).reciprocal() for total in (total_a, total_b))
    return a * factor_a - b * factor_b


def gabor(
    theta: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    sigma: Tensor,
    size: tuple[int, int],
    gamma: Tensor | float = 1.0,
    x0: Tensor | float = 0.0,
    y0: Tensor | float = 0.0,
) -> Tensor:
    """Gabor kernel: exp(-(x'^2 + gamma^2 y'^2) / (2 sigma^2)) cos(2 pi x' / wavelength + psi).

    Source: the four AKPs of GaborNet (arXiv 1904.13204), as in the ACL paper; gamma, x0 and y0 are ours.

    Args:
        theta: direction of the wave, rad, (...).
        wavelength: px, at least 2 (Nyquist), (...).
        psi: phase, rad, (...).
        sigma: width of the envelope, px, (...).
        size: (kh, kw).
        gamma: aspect ratio of the envelope; 1 is circular.
        x0: horizontal offset of the center, positive to the right, px.
        y0: vertical offset of the center, positive downward, px.

    Returns:
        (..., kh, kw).

    Raises:
        ValueError: if the size is below (1, 1).

    Example:
        >>> gabor(torch.zeros(30), torch.full((30,), 4.0), torch.zeros(30), torch.ones(30), size=(7, 7)).shape
        torch.Size([30, 7, 7])
    """
    grid, (theta, wavelength, psi, sigma, gamma) = _prepare(size, theta, wavelength, psi, sigma, gamma, x0=x0, y0=y0)
    frequency = 2 * math.pi / wavelength
    cos, sin = torch.cos(theta), torch.sin(theta)
    phase = grid.x * (frequency * cos) + (grid.y * (frequency * sin) + psi)
    r2 = grid.r2  # x'^2 + y'^2
    if isinstance(gamma, Tensor) or gamma != 1:
        along, across = _rotate(grid, theta)
        r2 = along * along + (gamma * across).square()
    return _move_pixels_last(_gauss(r2, sigma) * torch.cos(phase))


def log(sigma: Tensor, size: tuple[int, int], x0: Tensor | float = 0.0, y0: Tensor | float = 0.0) -> Tensor:
    """Laplacian of Gaussian: (q - 1) exp(-q), q = r^2 / (2 sigma^2), minus its mean over the grid.

    Source: the textbook definition, up to a positive factor. The kernel is negative at the center, so its response
    to x^2 is positive, like that of the Laplacian.

    Args:
        sigma: px, (...).
        size: (kh, kw).
        x0: horizontal offset of the center, positive to the right, px.
        y0: vertical offset of the center, positive downward, px.

    Returns:
        (..., kh, kw), sum 0.

    Raises:
        ValueError: if the size is below (1, 1).

    Example:
        >>> kernel = log(torch.tensor(1.0), size=(5, 5))
        >>> kernel.shape, bool(kernel[2, 2] < 0)
        (torch.Size([5, 5]), True)
    """
    grid, (sigma,) = _prepare(size, sigma, x0=x0, y0=y0)
    exponent = grid.r2 * (-0.5 * sigma.pow(-2))  # -q
    kernel = (-1 - exponent) * torch.exp(exponent)
    return _move_pixels_last(kernel - kernel.mean((0, 1), keepdim=True))


def lot(
    s: Tensor,
    size: tuple[int, int],
    profile: str = "exponential",
    x0: Tensor | float = 0.0,
    y0: Tensor | float = 0.0,
) -> Tensor:
    """Laplacian of TGD: M / sum(M) - C with C = tri(x) tri(y) and M = w(r; s) (1 - C).

    Source: the isotropic second difference of the TGD theory (arXiv 2305.08098). The code also divides C by its sum:
    the sum is 1 for a centered kernel, and the division keeps an off-center kernel zero-sum.

    Args:
        s: width of the TGD kernel function w, px, (...).
        size: (kh, kw).
        profile: the function w, one of ``PROFILES``.
        x0: horizontal offset of the center, positive to the right, px.
        y0: vertical offset of the center, positive downward, px.

    Returns:
        (..., kh, kw), sum 0; all zero if M vanishes (a 1 x 1 grid, or a linear profile narrower than a pixel).

    Raises:
        ValueError: if the size is below (1, 1) or the profile is unknown.

    Example:
        >>> lot(torch.ones(2, 3), size=(5, 7)).shape
        torch.Size([2, 3, 5, 7])
    """
    grid, (s,) = _prepare(size, s, x0=x0, y0=y0)
    around = _evaluate_profile(grid.r, s, profile) * (1 - grid.impulse)
    return _move_pixels_last(_subtract_normalized(around, grid.impulse))


def tgd1(
    theta: Tensor,
    s: Tensor,
    sigma: Tensor,
    size: tuple[int, int],
    profile: str = "exponential",
    x0: Tensor | float = 0.0,
    y0: Tensor | float = 0.0,
) -> Tensor:
    """TGD of 1st order: step(x') w(|x'|; s) n(y'; sigma), an oriented, smoothed first difference.

    Source: the T operator in its orthogonal construction (arXiv 2305.08098, 2401.15287). step is the sign function
    averaged over one pixel (ours: it makes the kernel continuous in theta). The grid truncates an off-center
    kernel unevenly, so its positive and negative halves are rescaled to equal sums, which keeps it zero-sum.

    Args:
        theta: direction of the difference, rad, (...).
        s: width of the TGD kernel function w along the direction, px, (...).
        sigma: width of the smoothing across it, px, (...).
        size: (kh, kw).
        profile: the function w, one of ``PROFILES``.
        x0: horizontal offset of the center, positive to the right, px.
        y0: vertical offset of the center, positive downward, px.

    Returns:
        (..., kh, kw), sum 0; all zero on a 1 x 1 grid or if one half lies outside the grid.

    Raises:
        ValueError: if the size is below (1, 1) or the profile is unknown.

    Example:
        >>> angle = torch.tensor([0.0, 0.5])
        >>> tgd1(angle, torch.ones(2), torch.ones(2), size=(5, 5)).shape
        torch.Size([2, 5, 5])
    """
    grid, (theta, s, sigma) = _prepare(size, theta, s, sigma, x0=x0, y0=y0)
    along, across = _rotate(grid, theta)
    kernel = F.hardtanh(2 * along) * _evaluate_profile(along.abs(), s, profile) * _gauss(across * across, sigma)
    if not _is_centered(x0, y0):
        rise, fall = torch.relu(kernel), torch.relu(-kernel)
        kernel = _subtract_normalized(rise, fall) * (_sum_over_grid(kernel.abs()) / 2)
    return _move_pixels_last(kernel)


def tgd2(
    theta: Tensor,
    s: Tensor,
    sigma: Tensor,
    size: tuple[int, int],
    profile: str = "exponential",
    x0: Tensor | float = 0.0,
    y0: Tensor | float = 0.0,
) -> Tensor:
    """TGD of 2nd order: A / sum(A) - D / sum(D).

    D = tri(x') n(y'; sigma) is the center line, and A = w(|x'|; s) (1 - tri(x')) n(y'; sigma) surrounds it.
    Source: the R operator in its orthogonal construction (arXiv 2305.08098, 2401.15287). tri is the impulse on a
    pixel grid (ours: it makes the kernel continuous in theta).

    Args:
        theta: direction of the difference, rad, (...).
        s: width of the TGD kernel function w along the direction, px, (...).
        sigma: width of the smoothing across it, px, (...).
        size: (kh, kw).
        profile: the function w, one of ``PROFILES``.
        x0: horizontal offset of the center, positive to the right, px.
        y0: vertical offset of the center, positive downward, px.

    Returns:
        (..., kh, kw), sum 0; all zero if A or D vanishes.

    Raises:
        ValueError: if the size is below (1, 1) or the profile is unknown.

    Example:
        >>> tgd2(torch.zeros(6), torch.ones(6), torch.ones(6), size=(7, 7)).shape
        torch.Size([6, 7, 7])
    """
    grid, (theta, s, sigma) = _prepare(size, theta, s, sigma, x0=x0, y0=y0)
    along, across = _rotate(grid, theta)
    smooth = _gauss(across * across, sigma)
    center = _tri(along) * smooth
    around = _evaluate_profile(along.abs(), s, profile) * (smooth - center)
    return _move_pixels_last(_subtract_normalized(around, center))


@dataclass(frozen=True)
class AKP:
    """One analytic kernel parameter: its unit, its range and its initialization.

    A parameter with a floor is stored as raw = softplus^-1(value - floor), so any raw value maps into the valid range.
    A parameter without a floor is stored unchanged.
    """

    name: str
    """As the kernel function names the argument."""
    unit: str
    """``px``, ``rad``, or empty for a dimensionless number."""
    floor: float | None
    """Exclusive lower bound in the natural unit; None if the parameter is unbounded."""
    init_range: Callable[[int], tuple[float, float]]
    """Maps the longer side of the kernel to the range that ``init="random"`` samples from."""
    role: Role | None = None
    """What it is in the plane, for ``acl.rotate`` and ``acl.rescale``; every AKP in px has a role."""
    period: float | None = None
    """The smallest change of this AKP alone that leaves every kernel unchanged; None if there is none."""

    def __post_init__(self) -> None:
        if (self.unit == "px") != (self.role in LENGTH_ROLES):
            raise ValueError(f"{self.name}, in {self.unit or 'no unit'}, cannot have the role {self.role}")

    def to_natural(self, raw: Tensor) -> Tensor:
        """Converts stored values to the natural unit; same shape."""
        return raw if self.floor is None else self.floor + F.softplus(raw)

    def to_raw(self, natural: Tensor) -> Tensor:
        """Inverse of ``to_natural``. Raises ValueError for a value at or below the floor."""
        if self.floor is None:
            return natural
        above = natural - self.floor
        if not bool((above > 0).all()):
            raise ValueError(
                f"{self.name} must be above {self.floor:g} {self.unit}".rstrip() + f", got {natural.min().item():g}"
            )
        return above + torch.log(-torch.expm1(-above))

    def sample(self, count: int, size: tuple[int, int]) -> Tensor:
        """Samples ``count`` initial values in the natural unit, uniformly over ``init_range``."""
        return torch.empty(count, device="cpu").uniform_(*self.init_range(max(size)))


def _make_angle(name: str, period: float, role: Role | None = "direction", init_high: float | None = None) -> AKP:
    """An angle, initialized between 0 and ``init_high``, by default the period."""
    return AKP(name, "rad", None, lambda k: (0.0, period if init_high is None else init_high), role, period)


def _make_width(name: str, low: float, high: float, minimum: float = 0.5) -> AKP:
    """A width in px, initialized between ``low`` and ``high`` times the kernel size, and to at least ``minimum``."""
    return AKP(name, "px", 0.3, lambda k: (max(minimum, low * k), max(1.5 * minimum, high * k)), "length")


def _make_tgd_width(low: float, high: float) -> AKP:
    """The width s of a TGD kernel function, initialized above 1 px: a narrower linear profile is 0 at all neighbors."""
    return _make_width("s", low, high, minimum=1.1)


_OFFSETS = (
    AKP("x0", "px", None, lambda k: (-k / 8, k / 8), "center_x"),
    AKP("y0", "px", None, lambda k: (-k / 8, k / 8), "center_y"),
)

AMPLITUDE = AKP("amplitude", "", None, lambda k: (1.0, 1.0))
"""The gain that ``amplitude=True`` adds to every ACK."""

_PROFILE_FORMULAS = {
    "exponential": "exp(-t/{s})",
    "gaussian": "exp(-t^2/(2*{s}^2))",
    "linear": "max(0, 1 - t/{s})",
}


@dataclass(frozen=True)
class Kind:
    """One kind of 2-D kernel in a mosaic."""

    symbol: str
    """As written in an arrangement."""
    name: str
    """As shown in figures and messages."""
    color: str
    """Outline color in figures, as in the paper."""
    paper_akps: tuple[AKP, ...] = ()
    extended_akps: tuple[AKP, ...] = ()
    """The AKPs that ``family="extended"`` adds."""
    function: Callable[..., Tensor] | None = None
    """Takes the AKPs and ``size`` (and ``profile``) as keyword arguments; None for a plain kernel."""
    takes_profile: bool = False
    """Whether the formula contains the TGD kernel function."""
    formula_template: str = ""
    """The expression, then its definitions, separated by semicolons; ``{name}`` stands for an AKP's value."""
    extended_template: str = ""
    """The template of ``family="extended"``, if it differs."""

    @property
    def is_analytic(self) -> bool:
        """Whether a formula gives the kernel; False for plain kernels."""
        return self.function is not None

    def akps(self, family: str = "paper", amplitude: bool = False) -> tuple[AKP, ...]:
        """The AKPs of one kernel of this kind; none for a plain kernel."""
        if not self.is_analytic:
            return ()
        extended = self.extended_akps if family == "extended" else ()
        return self.paper_akps + extended + ((AMPLITUDE,) if amplitude else ())

    def find_akp(self, name: str) -> AKP:
        """One of the AKPs of any family, or the amplitude, by name. Raises KeyError for an unknown name."""
        return {akp.name: akp for akp in self.akps("extended", amplitude=True)}[name]

    def synthesize(self, akps: Mapping[str, Tensor], size: tuple[int, int], profile: str = "exponential") -> Tensor:
        """Computes kernels (..., kh, kw) from AKPs (...) in natural units, before scaling and gain.

        Raises:
            ValueError: if the kind is plain, the size is below (1, 1) or the profile is unknown.
        """
        if self.function is None:
            raise ValueError(f"kind {self.symbol} ({self.name}) has no formula to synthesize a kernel from")
        if self.takes_profile:
            return self.function(**akps, size=size, profile=profile)
        return self.function(**akps, size=size)

    def formula(self, akps: Mapping[str, float], profile: str = "exponential", digits: int = 3) -> str:
        """Formats the kernel as text, with numbers in place of the AKPs: an expression, then its definitions.

        ``sum`` and ``mean`` run over the grid; ``tri(t) = max(0, 1 - |t|)`` and ``step(t) = min(1, max(-1, 2t))``;
        x' and y' are the coordinates rotated by theta about the center.

        Args:
            akps: values in natural units (px, rad), of the paper or the extended family.
            profile: the TGD kernel function.
            digits: significant digits of each number.

        Example:
            >>> KINDS["Lg"].formula({"sigma": 1.5})
            'L - mean(L); L = (q - 1)*exp(-q); q = (x^2 + y^2)/(2*1.5^2)'
        """
        values = {name: f"{value:.{digits}g}" for name, value in akps.items()}
        is_extended = any(akp.name in akps for akp in self.extended_akps)
        parts = [(is_extended and self.extended_template) or self.formula_template]
        if self.takes_profile:
            parts.append(f"w(t) = {_PROFILE_FORMULAS[profile]}")
        names = {akp.role: akp.name for akp in self.akps("extended") if akp.name in akps}
        if (direction := names.get("direction")) is not None:
            parts.append(f"{direction} = {math.degrees(akps[direction]):.{digits}g} deg")
        if "center_x" in names:
            parts.append(f"center = ({{{names['center_x']}}}, {{{names['center_y']}}})")
        return "; ".join(parts).format(**values)


KINDS: dict[str, Kind] = {
    kind.symbol: kind
    for kind in (
        Kind(
            symbol="G",
            name="Gabor",
            color="red",
            paper_akps=(
                _make_angle("theta", 2 * math.pi, init_high=math.pi),  # theta + pi is theta with -psi
                AKP("wavelength", "px", 2.0, lambda k: (3.0, max(4.5, 1.5 * k)), "length"),
                _make_angle("psi", 2 * math.pi, role=None),
                _make_width("sigma", 0.15, 0.4),
            ),
            extended_akps=(AKP("gamma", "", 0.1, lambda k: (0.5, 1.5)), *_OFFSETS),
            function=gabor,
            formula_template="exp(-(x'^2 + y'^2)/(2*{sigma}^2))*cos(2*pi*x'/{wavelength} + {psi})",
            extended_template="exp(-(x'^2 + ({gamma}*y')^2)/(2*{sigma}^2))*cos(2*pi*x'/{wavelength} + {psi})",
        ),
        Kind(
            symbol="Lg",
            name="LoG",
            color="purple",
            paper_akps=(_make_width("sigma", 0.1, 0.3),),
            extended_akps=_OFFSETS,
            function=log,
            formula_template="L - mean(L); L = (q - 1)*exp(-q); q = (x^2 + y^2)/(2*{sigma}^2)",
        ),
        Kind(
            symbol="Lt",
            name="LoT",
            color="deeppink",
            paper_akps=(_make_tgd_width(0.1, 0.4),),
            extended_akps=_OFFSETS,
            function=lot,
            takes_profile=True,
            formula_template="M/sum(M) - C/sum(C); M = w(sqrt(x^2 + y^2))*(1 - C); C = tri(x)*tri(y)",
        ),
        Kind(
            symbol="Tf",
            name="TGD 1st",
            color="blue",
            paper_akps=(_make_angle("theta", 2 * math.pi), _make_tgd_width(0.1, 0.4), _make_width("sigma", 0.1, 0.4)),
            extended_akps=_OFFSETS,
            function=tgd1,
            takes_profile=True,
            formula_template="step(x')*w(abs(x'))*n(y'); n(t) = exp(-t^2/(2*{sigma}^2))",
            extended_template="(U/sum(U) - V/sum(V))*(sum(U) + sum(V))/2; U = max(0, T); V = max(0, -T); "
            "T = step(x')*w(abs(x'))*n(y'); n(t) = exp(-t^2/(2*{sigma}^2))",
        ),
        Kind(
            symbol="Ts",
            name="TGD 2nd",
            color="green",
            paper_akps=(_make_angle("theta", math.pi), _make_tgd_width(0.1, 0.4), _make_width("sigma", 0.1, 0.4)),
            extended_akps=_OFFSETS,
            function=tgd2,
            takes_profile=True,
            formula_template="A/sum(A) - D/sum(D); A = w(abs(x'))*(1 - tri(x'))*n(y'); D = tri(x')*n(y'); "
            "n(t) = exp(-t^2/(2*{sigma}^2))",
        ),
        Kind(symbol="P", name="Plain", color="orange"),
    )
}
"""Every kind of kernel, by its symbol in an arrangement."""


def analytic_kinds() -> dict[str, Kind]:
    """The registered kinds that have a formula, by symbol."""
    return {symbol: kind for symbol, kind in KINDS.items() if kind.is_analytic}
