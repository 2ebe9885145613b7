"""The options of an analytic layer, which determine its kernels and what it learns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from acl.kernels import KINDS, Family, Profile

Scale = Literal["unit", "raw"]
Per = Literal["kernel", "filter"]
Compute = Literal["auto", "dense", "factored"]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The options of an ``AnalyticConv2d``; all but ``profile`` are ours.

    Raises:
        ValueError: for an unknown value, an AKP in ``learn`` that no kind has, or options that exclude each other.
    """

    scale: Scale = "unit"
    """``unit`` divides each ACK by its L2 norm and by sqrt(in_channels / groups), so that the layer roughly preserves
    unit variance, and the shape of a filter by its root mean square, so that its gains have the scale of weights;
    ``raw`` uses the formula's values unchanged."""
    per: Per = "kernel"
    """What has AKPs of its own: each 2-D ``kernel``, as in the paper, or each ``filter`` (output channel), whose
    kernels are one shape times a gain per input channel."""
    amplitude: bool = False
    """Whether each ACK has its gain as an additional AKP; filters have gains without it."""
    family: Family = "paper"
    """``extended`` adds a center offset to every ACK and an aspect ratio to Gabor."""
    profile: Profile = "exponential"
    """The TGD kernel function."""
    learn: str | Iterable[str] = "all"
    """The AKPs that are trained at first: ``all``, ``none``, or their names, such as ``("theta", "sigma")``."""
    compute: Compute = "auto"
    """How a filter mosaic without plain filters is computed: ``dense``, with the synthesized weight; ``factored``, as a
    1 x 1 convolution with the gains and a depthwise convolution with the shapes; ``auto`` takes the faster one."""

    def __post_init__(self) -> None:
        for field in fields(LayerOptions):
            value = getattr(self, field.name)
            if (known := get_args(field.type)) and isinstance(known[0], str) and value not in known:
                raise ValueError(f"unknown {field.name} '{value}'; known: {', '.join(known)}")
        if not isinstance(self.amplitude, bool):
            raise ValueError(f"amplitude must be True or False, got {self.amplitude!r}")
        if self.per == "filter" and self.amplitude:
            raise ValueError("amplitude=True needs per='kernel'; a filter has a gain per input channel already")
        if self.per == "kernel" and self.compute == "factored":
            raise ValueError("compute='factored' needs per='filter'; the kernels of a filter have no common shape")
        if not isinstance(self.learn, str):
            object.__setattr__(self, "learn", tuple(self.learn))
        if unknown := self.learned_akps - _list_akps():
            raise ValueError(
                f"unknown AKP '{min(unknown)}' in learn; known: all, none, {', '.join(sorted(_list_akps()))}"
            )

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> "LayerOptions":
        """Creates the options from keyword arguments. Raises TypeError for an unknown one."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in keywords if name not in known]:
            raise TypeError(f"unknown argument '{unknown[0]}'; the options of an analytic layer are {', '.join(known)}")
        return cls(**keywords)

    @property
    def learned_akps(self) -> set[str]:
        """The names of the AKPs that ``learn`` selects."""
        if isinstance(self.learn, str):
            return {"all": _list_akps(), "none": set()}.get(self.learn, {self.learn})
        return set(self.learn)


class LayerKeywords(TypedDict, total=False):
    """The fields of ``LayerOptions`` as keyword arguments, for type checkers and editors."""

    scale: Scale
    per: Per
    amplitude: bool
    family: Family
    profile: Profile
    learn: str | Iterable[str]
    compute: Compute


def _list_akps() -> set[str]:
    return {akp.name for kind in KINDS.values() for akp in kind.akps("extended", amplitude=True)}
