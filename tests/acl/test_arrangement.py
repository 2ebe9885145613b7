import pytest
from hypothesis import given
from hypothesis import strategies as st

from acl import Arrangement
from acl.kernels import KINDS

PAPER = "G30 Lg15 Lt15 Tf30 Ts6 P96"

terms = st.lists(st.sampled_from(list(KINDS)), min_size=1, unique=True).flatmap(
    lambda symbols: st.tuples(
        st.just(symbols), st.lists(st.integers(0, 500), min_size=len(symbols), max_size=len(symbols))
    )
)


@given(terms)
def test_printing_and_parsing_are_inverse(drawn: tuple[list[str], list[int]]) -> None:
    text = " ".join(f"{symbol}{count}" for symbol, count in zip(*drawn, strict=True))
    assert str(Arrangement.parse(text)) == text
    assert Arrangement.parse(text.replace(" ", "_")) == Arrangement.parse(text)
    assert list(Arrangement.parse(text).counts.items()) == list(zip(*drawn, strict=True))


@given(
    st.lists(st.sampled_from(list(KINDS)), min_size=2, max_size=2, unique=True),
    st.integers(0, 1000),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_shares_fill_any_layer_and_are_off_by_less_than_one(
    symbols: list[str], mille: int, inside: int, out: int
) -> None:
    shares = {symbols[0]: mille / 10, symbols[1]: (1000 - mille) / 10}
    text = " ".join(f"{symbol}{share}%" for symbol, share in shares.items())
    counts = Arrangement.parse(text).fill(inside, out).counts
    assert sum(counts.values()) == inside * out
    assert all(abs(counts[symbol] - share * inside * out / 100) < 1 for symbol, share in shares.items())
    assert Arrangement.parse(str(Arrangement.parse(text))) == Arrangement.parse(text)


def test_the_papers_example_fills_a_resnets_first_layer() -> None:
    arrangement = Arrangement.parse(PAPER)
    assert arrangement.fill(3, 64) == arrangement
    assert sum(arrangement.counts.values()) == 192


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "X3 P3",
            r"unknown kind 'X'.*known: G \(Gabor\), Lg \(LoG\), Lt \(LoT\), Tf \(TGD 1st\), Ts .*, P \(Plain\)",
        ),
        ("g6", "unknown kind 'g'"),
        ("G3 P1 G2", "'G' stands twice"),
        ("G-3 P9", "'G-3'.*not a whole number of at least 0"),
        ("G2.5 P3.5", "'G2.5'.*not a whole number"),
        ("G50% P40%", "add up to 90%, not 100%"),
        ("G150% P-50%", "'P-50%'"),
        ("G50% P3", "mixes counts and shares"),
        ("", "empty"),
        ("G", "'G'.*not a kind and a number"),
        ("6", "'6'.*not a kind and a number"),
        ("G1e3", "not a kind and a number"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arrangement.parse(text)


def test_counts_that_do_not_fill_a_layer() -> None:
    with pytest.raises(ValueError, match=r"'G5' fills 5 of 6 kernels of conv1 \(1 x 6\)"):
        Arrangement.parse("G5").fill(1, 6, "conv1")
    with pytest.raises(ValueError, match="in shares"):
        _ = Arrangement.parse("G100%").counts
