"""The arrangement of a mosaic: how many 2-D kernels of each kind a layer contains."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

from acl.kernels import KINDS
from acl.options import Per

_TERM = re.compile(r"([A-Za-z]+)([+-]?[0-9]*\.?[0-9]+)(%?)")


@dataclass(frozen=True)
class Arrangement:
    """The number of 2-D kernels of each kind in a layer, in the order in which they fill the layer's slots.

    A slot is the position of one 2-D kernel in the weight. Slots are filled row-major over (output channel, input
    channel of the group). In a filter mosaic (``per="filter"``, ours), a slot is an output channel instead.

    An arrangement is written as counts, as in ``G30 Lg15 Lt15 Tf30 Ts6 P96`` (the paper's notation), or as shares of
    a layer of any size, as in ``G50% P50%`` (ours). A count is a number of slots.

    With ``auto``, ``acl.convert`` chooses the kind of each slot by fitting the kernels that it replaces.

    Example:
        >>> arrangement = Arrangement.parse("G30_Lg15_Lt15_Tf30_Ts6_P96")
        >>> str(arrangement), arrangement.counts["Tf"]
        ('G30 Lg15 Lt15 Tf30 Ts6 P96', 30)
        >>> str(Arrangement.parse("G50% P50%").fill(6, 16))
        'G48 P48'
    """

    terms: tuple[tuple[str, Fraction], ...]
    """The symbol of each kind, with its count or percentage."""
    shares: bool = False
    """Whether the terms are percentages of the layer rather than counts."""
    auto: bool = False
    """Whether ``acl.convert`` chooses the kinds; there are then no terms."""

    @classmethod
    def parse(cls, text: str) -> "Arrangement":
        """Parses an arrangement; spaces or underscores separate the terms.

        Raises:
            ValueError: for an unknown or repeated kind, a count that is not a whole number of at least 0, a mix of
                counts and shares, shares that do not add up to 100%, or text that cannot be parsed.
        """
        words = str(text).replace("_", " ").split()
        if not words:
            raise ValueError("the arrangement is empty; write, for example, 'G30 P66' or 'G50% P50%'")
        if words == ["auto"]:
            return cls((), auto=True)
        terms: dict[str, Fraction] = {}
        signs: set[str] = set()
        for word in words:
            match = _TERM.fullmatch(word)
            if match is None:
                raise ValueError(f"'{word}' in arrangement '{text}' is not a kind and a number, as in G30 or G50%")
            symbol, number, sign = match.groups()
            value = Fraction(number)
            if symbol not in KINDS:
                known = ", ".join(f"{kind.symbol} ({kind.name})" for kind in KINDS.values())
                raise ValueError(f"unknown kind '{symbol}' in arrangement '{text}'; known: {known}")
            if symbol in terms:
                raise ValueError(f"kind '{symbol}' appears twice in arrangement '{text}'")
            if value < 0 or (not sign and value.denominator != 1):
                raise ValueError(f"'{word}' in arrangement '{text}': the count must be a whole number of at least 0")
            terms[symbol] = value
            signs.add(sign)
        if len(signs) > 1:
            raise ValueError(f"arrangement '{text}' mixes counts and shares (%)")
        shares = signs == {"%"}
        total = sum(terms.values())
        if shares and total != 100:
            raise ValueError(f"the shares of arrangement '{text}' add up to {float(total):.17g}%, not 100%")
        return cls(tuple(terms.items()), shares)

    @classmethod
    def coerce(cls, value: "Arrangement | str") -> "Arrangement":
        """Parses text and returns an arrangement as it is. Raises TypeError for anything else."""
        if not isinstance(value, (str, cls)):
            raise TypeError(f"an arrangement is text, such as 'G50% P50%', or an acl.Arrangement, got {value!r}")
        return cls.parse(value) if isinstance(value, str) else value

    @classmethod
    def from_slot_kinds(cls, slot_kinds: Sequence[str]) -> tuple["Arrangement", Tensor | None]:
        """Creates the arrangement and ``placement`` of a layer from the kind in each slot.

        Args:
            slot_kinds: the symbol of the kind in each slot.

        Returns:
            The counts, with kinds in the registry's order, and the ``placement`` (slots,) that AnalyticConv2d needs
            to put the kernels into their slots, or None if they are already in order.
        """
        rank_of_kind = {symbol: i for i, symbol in enumerate(KINDS)}
        ranks = torch.tensor([rank_of_kind[symbol] for symbol in slot_kinds])
        counts = tuple((symbol, Fraction(list(slot_kinds).count(symbol))) for symbol in KINDS if symbol in slot_kinds)
        slot_of_kernel = ranks.argsort(stable=True)
        is_ordered = bool((ranks.diff() >= 0).all())
        return cls(counts), None if is_ordered else slot_of_kernel.argsort()

    def __str__(self) -> str:
        if self.auto:
            return "auto"
        percent = "%" if self.shares else ""
        return " ".join(f"{symbol}{_format_number(value)}{percent}" for symbol, value in self.terms)

    @property
    def counts(self) -> dict[str, int]:
        """The number of kernels of each kind, in order. Raises ValueError for ``auto`` and shares (see ``fill``)."""
        if self.auto:
            raise ValueError(
                "arrangement 'auto' works only with acl.convert, which fits the kernels of an existing layer"
            )
        if self.shares:
            raise ValueError(f"arrangement '{self}' is given in shares; call fill() to convert them to counts")
        return {symbol: int(value) for symbol, value in self.terms}

    @property
    def kernel_ranges(self) -> dict[str, range]:
        """For each kind, the range of its kernels' indices in the arrangement's order."""
        ranges, start = {}, 0
        for symbol, count in self.counts.items():
            ranges[symbol] = range(start, start + count)
            start += count
        return ranges

    def fill(self, in_channels: int, out_channels: int, layer: str = "the layer", per: Per = "kernel") -> "Arrangement":
        """Returns this arrangement as counts: of the in_channels (per group) x out_channels kernels, or of the filters.

        Shares are rounded with the largest-remainder method, so that they fill the layer exactly. A warning names kinds
        whose share rounds to none. The result has only kinds with kernels.

        Raises:
            ValueError: if the counts do not add up to the layer's number of kernels or filters. The message names
                ``layer``.
        """
        num_slots = in_channels * out_channels if per == "kernel" else out_channels
        if not self.shares:
            total = sum(self.counts.values())
            if total != num_slots:
                size = f" ({in_channels} x {out_channels})" if per == "kernel" else ""
                raise ValueError(f"arrangement '{self}' has {total} {per}s, but {layer} has {num_slots}{size}")
            return self._without_empty_terms()
        exact_counts = [value * num_slots / 100 for _, value in self.terms]
        counts = [int(value) for value in exact_counts]
        by_remainder = sorted(range(len(exact_counts)), key=lambda i: counts[i] - exact_counts[i])
        for i in by_remainder[: num_slots - sum(counts)]:
            counts[i] += 1
        if lost := [symbol for (symbol, value), n in zip(self.terms, counts, strict=True) if value and not n]:
            reason = f"the share of its {num_slots} {per}s rounds to 0"
            warnings.warn(f"{layer} gets no {' and no '.join(lost)}: {reason}", stacklevel=2)
        terms = tuple((symbol, Fraction(n)) for (symbol, _), n in zip(self.terms, counts, strict=True))
        return Arrangement(terms)._without_empty_terms()

    def _without_empty_terms(self) -> "Arrangement":
        """This arrangement without kinds of no kernel; unchanged if no kind has any."""
        return Arrangement(tuple(term for term in self.terms if term[1]) or self.terms)


def encode_placement(placement: Tensor) -> Tensor:
    """The bits of a placement, (slots, bits) bool, which averages and casts of equal state dicts keep."""
    num_bits = max(1, (len(placement) - 1).bit_length())
    return (placement[:, None] >> torch.arange(num_bits, device=placement.device)) % 2 == 1


def decode_placement(bits: Tensor) -> Tensor:
    """The placement (slots,) of ``encode_placement``. Raises ValueError for a tensor that cannot be one."""
    if bits.ndim != 2 or bits.shape[1] > 62:
        raise ValueError(f"the bits of a placement must be (slots, bits), got {tuple(bits.shape)}")
    return ((bits > 0.5).long() << torch.arange(bits.shape[1], device=bits.device)).sum(1)


def _format_number(value: Fraction) -> str:
    """Formats a number without trailing zeros: 30, 33.3."""
    return str(value.numerator) if value.denominator == 1 else format(Decimal(str(float(value))), "f")
