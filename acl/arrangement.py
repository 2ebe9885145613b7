"""The notation of a mosaic: how many of a layer's 2-D kernels are of which kind."""

import re
from dataclasses import dataclass
from fractions import Fraction

from acl.kernels import KINDS

_TERM = re.compile(r"([A-Za-z]+)([+-]?[0-9]*\.?[0-9]+)(%?)")


@dataclass(frozen=True)
class Arrangement:
    """How many kernels ("slots") of a layer are of which kind, in the order in which they fill it.

    Counts as in ``G30 Lg15 Lt15 Tf30 Ts6 P96`` (the paper's notation) or shares of a layer of any size as in
    ``G50% P50%`` (ours). A count is of 2-D kernels, not of output channels. Slots are filled row-major over
    (out channel, in channel of the group), in the order written.

    Example:
        >>> arrangement = Arrangement.parse("G30_Lg15_Lt15_Tf30_Ts6_P96")
        >>> str(arrangement), arrangement.counts["Tf"]
        ('G30 Lg15 Lt15 Tf30 Ts6 P96', 30)
        >>> str(Arrangement.parse("G50% P50%").fill(6, 16))
        'G48 P48'

    ``auto`` leaves the choice to a fit of the kernels that are replaced (``acl.convert``).
    """

    terms: tuple[tuple[str, Fraction], ...]
    shares: bool = False
    """True: the numbers are per cent of the layer; False: whole numbers of kernels."""
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> "Arrangement":
        """Reads an arrangement; terms are separated by spaces or underscores.

        Raises:
            ValueError: an unknown or repeated kind, a count that is not whole or below 0, counts mixed with shares,
                shares that do not add up to 100%, or text that is no arrangement.
        """
        words = str(text).replace("_", " ").split()
        if not words:
            raise ValueError("an arrangement is empty; write for example 'G30 P66' or 'G50% P50%'")
        if words == ["auto"]:
            return cls((), auto=True)
        terms: list[tuple[str, Fraction]] = []
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
            if symbol in dict(terms):
                raise ValueError(f"kind '{symbol}' stands twice in arrangement '{text}'")
            if value < 0 or (not sign and value.denominator != 1):
                raise ValueError(f"'{word}' in arrangement '{text}' is not a whole number of at least 0")
            terms.append((symbol, value))
            signs.add(sign)
        if len(signs) > 1:
            raise ValueError(f"arrangement '{text}' mixes counts and shares (%)")
        shares = signs == {"%"}
        total = sum(value for _, value in terms)
        if shares and total != 100:
            raise ValueError(f"the shares of arrangement '{text}' add up to {float(total):g}%, not 100%")
        return cls(tuple(terms), shares)

    def __str__(self) -> str:
        if self.auto:
            return "auto"
        return " ".join(f"{symbol}{_plain(value)}{'%' if self.shares else ''}" for symbol, value in self.terms)

    @property
    def counts(self) -> dict[str, int]:
        """Kernels per kind, in slot order. Raises ValueError for shares, which first need a layer to ``fill``."""
        if self.auto:
            raise ValueError("arrangement 'auto' needs kernels to choose by: acl.convert has those that it replaces")
        if self.shares:
            raise ValueError(f"arrangement '{self}' is in shares; fill() turns them into counts")
        return {symbol: int(value) for symbol, value in self.terms}

    def fill(self, in_channels: int, out_channels: int, layer: str = "the layer") -> "Arrangement":
        """This arrangement in counts for a layer of in_channels (of a group) x out_channels kernels.

        Shares are rounded by largest remainder, so that they fill the layer exactly.

        Raises:
            ValueError: the counts do not add up to the layer's kernels; ``layer`` names it in the message.
        """
        kernels = in_channels * out_channels
        if not self.shares:
            total = sum(self.counts.values())
            if total != kernels:
                raise ValueError(
                    f"arrangement '{self}' fills {total} of {kernels} kernels of {layer} "
                    f"({in_channels} x {out_channels})"
                )
            return self
        exact = [value * kernels / 100 for _, value in self.terms]
        counts = [int(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: kernels - sum(counts)]:
            counts[i] += 1
        return Arrangement(tuple((symbol, Fraction(n)) for (symbol, _), n in zip(self.terms, counts, strict=True)))


def _plain(value: Fraction) -> str:
    """A decimal as a person writes it: 30, 33.3."""
    return str(value.numerator) if value.denominator == 1 else str(float(value))
