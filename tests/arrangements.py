"""Arrangements that several tests use."""

from fractions import Fraction

from acl import Arrangement
from acl.kernels import KINDS

PAPER = "G30 Lg15 Lt15 Tf30 Ts6 P96"
"""The paper's arrangement for the first layer of ResNet."""


def arrange_all_kinds() -> Arrangement:
    """Equal shares of every registered kind."""
    return Arrangement(tuple((symbol, Fraction(100, len(KINDS))) for symbol in KINDS), shares=True)
