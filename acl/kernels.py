"""Analytic convolution kernels (ACKs) as pure functions, and the registry of their kinds.

A kernel is written down in one place: its function and its entry in ``KINDS``. Parser, layer, plots and tests
read the registry, so a further kind is one function and one entry.

Coordinates: rows i and columns j of a kh x kw grid sit at x = j - (kw-1)/2 to the right and y = i - (kh-1)/2
downward, in pixels. The oriented axes are x' = x cos(theta) + y sin(theta) and y' = -x sin(theta) + y cos(theta).

Every kernel function takes tensors of natural units (pixels, radians) that broadcast to one shape (...), returns
(..., kh, kw) before scaling and gain, computes in float32 at least, and is differentiable in every parameter.
``x0``, ``y0`` (centre offset, px) and Gabor's ``gamma`` (aspect ratio) make up the ``extended`` family; their
defaults give the ``paper`` family.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Profile = Literal["exponential", "gaussian", "linear"]
Family = Literal["paper", "extended"]
PROFILES: tuple[str, ...] = get_args(Profile)
FAMILIES: tuple[str, ...] = get_args(Family)


def _on_grid(size: tuple[int, int], *akps: Tensor | float, x0: Tensor | float, y0: Tensor | float) -> list[Tensor]:
    """The AKPs shaped (..., 1, 1), then x (..., 1, kw) and y (..., kh, 1) about the centre (x0, y0)."""
    kh, kw = size
    if kh < 1 or kw < 1:
        raise ValueError(f"a kernel's size is at least (1, 1), got {tuple(size)}")
    tensors = [a for a in (*akps, x0, y0) if isinstance(a, Tensor)]
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    device = tensors[0].device if tensors else None

    def expand(akp: Tensor | float) -> Tensor:
        return torch.as_tensor(akp, dtype=dtype, device=device)[..., None, None]

    x = torch.arange((1 - kw) / 2, (1 + kw) / 2, dtype=dtype, device=device)
    y = torch.arange((1 - kh) / 2, (1 + kh) / 2, dtype=dtype, device=device)[:, None]
    if not _centred(x0, y0):
        x, y = x - expand(x0), y - expand(y0)
    return [*map(expand, akps), x, y]


def _centred(x0: Tensor | float, y0: Tensor | float) -> bool:
    return not isinstance(x0, Tensor) and not isinstance(y0, Tensor) and x0 == y0 == 0


def _rotate(x: Tensor, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = torch.cos(theta), torch.sin(theta)
    return x * cos + y * sin, y * cos - x * sin


def _tri(t: Tensor) -> Tensor:
    """The impulse as a pixel grid sees it under linear interpolation."""
    return (1 - t.abs()).clamp(min=0)


def _gauss(t: Tensor, sigma: Tensor) -> Tensor:
    return torch.exp((t / sigma).square() * -0.5)


def _profile(t: Tensor, s: Tensor, profile: str) -> Tensor:
    """The TGD kernel function w(t; s): positive and decreasing in t >= 0."""
    if profile == "exponential":
        return torch.exp(-t / s)
    if profile == "gaussian":
        return _gauss(t, s)
    if profile == "linear":
        return (1 - t / s).clamp(min=0)
    raise ValueError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")


def _total(t: Tensor) -> Tensor:
    return t.sum((-2, -1), keepdim=True)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a / sum(a) - b / sum(b): zero-sum by construction; all zero, with zero gradient, where either sum vanishes."""
    total_a, total_b = _total(a), _total(b)
    tiny = torch.finfo(a.dtype).eps
    exists = (total_a > tiny) & (total_b > tiny)
    return a * (exists / total_a.clamp(min=tiny)) - b * (exists / total_b.clamp(min=tiny))


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
        gamma: aspect ratio of the envelope, 1 is round.
        x0: centre to the right of the grid's middle, px.
        y0: centre below the grid's middle, px.

    Returns:
        (..., kh, kw).

    Raises:
        ValueError: the size is below (1, 1).

    Example:
        >>> gabor(torch.zeros(30), torch.full((30,), 4.0), torch.zeros(30), torch.ones(30), size=(7, 7)).shape
        torch.Size([30, 7, 7])
    """
    theta, wavelength, psi, sigma, gamma, x, y = _on_grid(size, theta, wavelength, psi, sigma, gamma, x0=x0, y0=y0)
    along, across = _rotate(x, y, theta)
    envelope = torch.exp(((along / sigma).square() + (gamma * across / sigma).square()) * -0.5)
    return envelope * torch.cos(along * (2 * math.pi / wavelength) + psi)


def log(sigma: Tensor, size: tuple[int, int], x0: Tensor | float = 0.0, y0: Tensor | float = 0.0) -> Tensor:
    """Laplacian of Gaussian: (q - 1) exp(-q), q = r^2 / (2 sigma^2), minus its mean over the grid.

    Source: the field's textbook definition, up to a positive factor; negative at the centre, so that it answers
    positively to x^2 as the Laplacian does.

    Args:
        sigma: px, (...).
        size: (kh, kw).
        x0: centre to the right of the grid's middle, px.
        y0: centre below the grid's middle, px.

    Returns:
        (..., kh, kw), sum 0.

    Raises:
        ValueError: the size is below (1, 1).

    Example:
        >>> kernel = log(torch.tensor(1.0), size=(5, 5))
        >>> kernel.shape, bool(kernel[2, 2] < 0)
        (torch.Size([5, 5]), True)
    """
    sigma, x, y = _on_grid(size, sigma, x0=x0, y0=y0)
    q = ((x / sigma).square() + (y / sigma).square()) / 2
    kernel = (q - 1) * torch.exp(-q)
    return kernel - kernel.mean((-2, -1), keepdim=True)


def lot(
    s: Tensor,
    size: tuple[int, int],
    profile: str = "exponential",
    x0: Tensor | float = 0.0,
    y0: Tensor | float = 0.0,
) -> Tensor:
    """Laplacian of TGD: M / sum(M) - C with C = tri(x) tri(y) and M = w(r; s) (1 - C).

    Source: the isotropic second difference of the TGD theory (arXiv 2305.08098). C is divided by its sum too: that
    is 1 for a centred kernel, and keeps one that is off centre zero-sum.

    Args:
        s: width of the TGD kernel function w, px, (...).
        size: (kh, kw).
        profile: w, one of ``PROFILES``.
        x0: centre to the right of the grid's middle, px.
        y0: centre below the grid's middle, px.

    Returns:
        (..., kh, kw), sum 0; all zero where M vanishes (a 1 x 1 grid, or a linear profile narrower than a pixel).

    Raises:
        ValueError: the size is below (1, 1), or the profile is not known.

    Example:
        >>> lot(torch.ones(2, 3), size=(5, 7)).shape
        torch.Size([2, 3, 5, 7])
    """
    s, x, y = _on_grid(size, s, x0=x0, y0=y0)
    centre = _tri(x) * _tri(y)
    # The root's slope at r = 0 is infinite; 1e-12 px there makes it 0 and is lost to rounding everywhere else.
    r = torch.sqrt(x.square() + y.square() + 1e-24)
    return _difference(_profile(r, s, profile) * (1 - centre), centre)


def tgd1(
    theta: Tensor,
    s: Tensor,
    sigma: Tensor,
    size: tuple[int, int],
    profile: str = "exponential",
    x0: Tensor | float = 0.0,
    y0: Tensor | float = 0.0,
) -> Tensor:
    """TGD of 1st order: step(x') w(|x'|; s) n(y'; sigma), an oriented, smoothed difference.

    Source: the T operator in its orthogonal construction (arXiv 2305.08098, 2401.15287). step is the sign averaged
    over one pixel (ours: it makes the kernel continuous in theta). A kernel off centre is cut off unevenly by its
    window; its positive and negative halves are then scaled to weigh the same, so that it stays zero-sum.

    Args:
        theta: direction of the difference, rad, (...).
        s: width of the TGD kernel function w along the direction, px, (...).
        sigma: width of the smoothing across it, px, (...).
        size: (kh, kw).
        profile: w, one of ``PROFILES``.
        x0: centre to the right of the grid's middle, px.
        y0: centre below the grid's middle, px.

    Returns:
        (..., kh, kw), sum 0; all zero on a 1 x 1 grid, or where a half lies outside its window.

    Raises:
        ValueError: the size is below (1, 1), or the profile is not known.

    Example:
        >>> angle = torch.tensor([0.0, 0.5])
        >>> tgd1(angle, torch.ones(2), torch.ones(2), size=(5, 5)).shape
        torch.Size([2, 5, 5])
    """
    theta, s, sigma, x, y = _on_grid(size, theta, s, sigma, x0=x0, y0=y0)
    along, across = _rotate(x, y, theta)
    kernel = (2 * along).clamp(-1, 1) * _profile(along.abs(), s, profile) * _gauss(across, sigma)
    if _centred(x0, y0):
        return kernel
    rise, fall = kernel.clamp(min=0), (-kernel).clamp(min=0)
    return _difference(rise, fall) * (_total(rise) + _total(fall)) / 2


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

    D = tri(x') n(y'; sigma) is the middle, A = w(|x'|; s) (1 - tri(x')) n(y'; sigma) what lies around it.
    Source: the R operator in its orthogonal construction (arXiv 2305.08098, 2401.15287). tri is the impulse on a
    pixel grid (ours: it makes the kernel continuous in theta).

    Args:
        theta: direction of the difference, rad, (...).
        s: width of the TGD kernel function w along the direction, px, (...).
        sigma: width of the smoothing across it, px, (...).
        size: (kh, kw).
        profile: w, one of ``PROFILES``.
        x0: centre to the right of the grid's middle, px.
        y0: centre below the grid's middle, px.

    Returns:
        (..., kh, kw), sum 0; all zero where A or D vanishes.

    Raises:
        ValueError: the size is below (1, 1), or the profile is not known.

    Example:
        >>> tgd2(torch.zeros(6), torch.ones(6), torch.ones(6), size=(7, 7)).shape
        torch.Size([6, 7, 7])
    """
    theta, s, sigma, x, y = _on_grid(size, theta, s, sigma, x0=x0, y0=y0)
    along, across = _rotate(x, y, theta)
    smooth, impulse = _gauss(across, sigma), _tri(along)
    return _difference(_profile(along.abs(), s, profile) * (1 - impulse) * smooth, impulse * smooth)


@dataclass(frozen=True)
class AKP:
    """One analytic kernel parameter: how it is held, and where it starts.

    A parameter with a floor is held as floor + softplus(raw), so any raw value is in range; one without is free.
    """

    name: str
    unit: str  # "px", "rad" or "" for a plain number
    floor: float | None
    start: Callable[[int], tuple[float, float]]
    """Longer side of the kernel -> the range from which ``init="random"`` draws."""

    def natural(self, raw: Tensor) -> Tensor:
        """The value in its natural unit, same shape as ``raw``."""
        return raw if self.floor is None else self.floor + F.softplus(raw)

    def raw(self, natural: Tensor) -> Tensor:
        """Inverse of ``natural``. Raises ValueError for a value at or below the floor."""
        if self.floor is None:
            return natural
        above = natural - self.floor
        if not bool((above > 0).all()):
            raise ValueError(f"{self.name} is above {self.floor:g} {self.unit}, got {natural.min().item():g}".rstrip())
        return above + torch.log(-torch.expm1(-above))

    def draw(self, count: int, size: tuple[int, int]) -> Tensor:
        """``count`` starting values in natural units, uniform over ``start``."""
        return torch.empty(count, device="cpu").uniform_(*self.start(max(size)))


def _angle(name: str, turn: float) -> AKP:
    return AKP(name, "rad", None, lambda k: (0.0, turn))


def _width(name: str, low: float, high: float, least: float = 0.5) -> AKP:
    """A width in px that starts between ``low`` and ``high`` times the kernel's size, and above ``least``."""
    return AKP(name, "px", 0.3, lambda k: (max(least, low * k), max(1.5 * least, high * k)))


def _reach(low: float, high: float) -> AKP:
    """The width of a TGD kernel function; it starts above a pixel, below which a linear one reaches no neighbour."""
    return _width("s", low, high, least=1.1)


_OFFSET = tuple(AKP(name, "px", None, lambda k: (-k / 8, k / 8)) for name in ("x0", "y0"))

AMPLITUDE = AKP("amplitude", "", None, lambda k: (1.0, 1.0))
"""The gain that ``amplitude=True`` adds to every ACK."""


@dataclass(frozen=True)
class Kind:
    """One kind of 2-D kernel in a mosaic."""

    symbol: str  # as arrangements write it
    name: str
    colour: str  # of its outline in figures, as in the paper
    akps: tuple[AKP, ...]
    extended: tuple[AKP, ...] = ()  # what family="extended" adds
    function: Callable[..., Tensor] | None = None  # None: k*k free weights
    profiled: bool = False  # takes ``profile``
    terms: str = ""  # the formula, for ``text``

    def text(self, akps: Mapping[str, float], profile: str = "exponential") -> str:
        """The formula with its AKPs in numbers: px, and degrees for a direction."""

        def w(t: str) -> str:
            s = akps["s"]
            known = {
                "exponential": f"exp(-{t}/{s:.2f})",
                "gaussian": f"exp(-{t}^2/(2 * {s:.2f}^2))",
                "linear": f"max(0, 1 - {t}/{s:.2f})",
            }
            return known[profile]

        round_ = akps.get("gamma", 1.0) == 1.0
        radius = "r^2" if round_ else f"(x'^2 + {akps['gamma']:.2f}^2 y'^2)"
        profiles = {"w_r": w("r"), "w_x": w("|x'|")} if self.profiled else {}
        text = self.terms.format(**akps, **profiles, radius=radius)
        if "theta" in akps:
            text += f", theta = {math.degrees(akps['theta']):.0f} deg"
        if "x0" in akps:
            text += f", centre ({akps['x0']:.2f}, {akps['y0']:.2f})"
        return text

    def parameters(self, family: str = "paper", amplitude: bool = False) -> tuple[AKP, ...]:
        """The AKPs of one kernel of this kind; none for a plain kernel."""
        if self.function is None:
            return ()
        return self.akps + (self.extended if family == "extended" else ()) + ((AMPLITUDE,) if amplitude else ())


KINDS: dict[str, Kind] = {
    kind.symbol: kind
    for kind in (
        Kind(
            "G",
            "Gabor",
            "red",
            (
                _angle("theta", math.pi),
                AKP("wavelength", "px", 2.0, lambda k: (3.0, max(4.5, 1.5 * k))),
                _angle("psi", 2 * math.pi),
                _width("sigma", 0.15, 0.4),
            ),
            (AKP("gamma", "", 0.1, lambda k: (0.5, 1.5)), *_OFFSET),
            gabor,
            terms="exp(-{radius}/(2 * {sigma:.2f}^2)) * cos(2 pi x'/{wavelength:.2f} + {psi:.2f})",
        ),
        Kind(
            "Lg",
            "LoG",
            "purple",
            (_width("sigma", 0.1, 0.3),),
            _OFFSET,
            log,
            terms="((q - 1) * exp(-q) - mean), q = r^2/(2 * {sigma:.2f}^2)",
        ),
        Kind(
            "Lt",
            "LoT",
            "deeppink",
            (_reach(0.1, 0.4),),
            _OFFSET,
            lot,
            profiled=True,
            terms="(M/sum(M) - C/sum(C)), C = tri(x) tri(y), M = {w_r} * (1 - C)",
        ),
        Kind(
            "Tf",
            "TGD 1st",
            "blue",
            (_angle("theta", 2 * math.pi), _reach(0.1, 0.4), _width("sigma", 0.1, 0.4)),
            _OFFSET,
            tgd1,
            profiled=True,
            terms="step(x') * {w_x} * exp(-y'^2/(2 * {sigma:.2f}^2))",
        ),
        Kind(
            "Ts",
            "TGD 2nd",
            "green",
            (_angle("theta", math.pi), _reach(0.1, 0.4), _width("sigma", 0.1, 0.4)),
            _OFFSET,
            tgd2,
            profiled=True,
            terms="(A/sum(A) - D/sum(D)), D = tri(x') * n, A = {w_x} * (1 - tri(x')) * n, "
            "n = exp(-y'^2/(2 * {sigma:.2f}^2))",
        ),
        Kind("P", "Plain", "orange", ()),
    )
}
"""Every kind of kernel, by its symbol in an arrangement."""
