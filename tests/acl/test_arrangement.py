import pytest
from hypothesis import given
from hypothesis import strategies as st

from acl import AnalyticConv2d, Arrangement
from acl.kernels import KINDS
from tests.arrangements import PAPER

counts_by_kind = st.lists(st.sampled_from(list(KINDS)), min_size=1, unique=True).flatmap(
    lambda symbols: st.fixed_dictionaries({symbol: st.integers(0, 500) for symbol in symbols})
)
slot_kind_lists = st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=60)


@given(counts_by_kind)
def test_parse_inverts_str(counts: dict[str, int]) -> None:
    text = " ".join(f"{symbol}{count}" for symbol, count in counts.items())
    assert str(Arrangement.parse(text)) == text
    assert Arrangement.parse(text.replace(" ", "_")) == Arrangement.parse(text)
    assert list(Arrangement.parse(text).counts.items()) == list(counts.items())


@given(
    st.lists(st.sampled_from(list(KINDS)), min_size=2, unique=True),
    st.lists(st.integers(0, 1000), min_size=len(KINDS) - 1, max_size=len(KINDS) - 1),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_fill_rounds_up_shares_of_largest_remainders(
    symbols: list[str], cuts: list[int], in_channels: int, out_channels: int
) -> None:
    edges = [0, *sorted(cuts[: len(symbols) - 1]), 1000]
    per_mille = {symbol: end - start for symbol, start, end in zip(symbols, edges, edges[1:], strict=False)}
    text = " ".join(f"{symbol}{value / 10}%" for symbol, value in per_mille.items())
    slots = in_channels * out_channels
    counts = Arrangement.parse(text).fill(in_channels, out_channels).counts
    assert sum(counts.values()) == slots
    rounded_up, rounded_down = [], []  # remainders of the shares
    for symbol, value in per_mille.items():
        floor, remainder = divmod(value * slots, 1000)
        assert counts.get(symbol, 0) - floor in (0, 1)
        (rounded_up if counts.get(symbol, 0) > floor else rounded_down).append(remainder)
    assert min(rounded_up, default=999) >= max(rounded_down, default=0)
    assert Arrangement.parse(str(Arrangement.parse(text))) == Arrangement.parse(text)


def test_fill_breaks_ties_of_remainders_in_the_order_written() -> None:
    assert str(Arrangement.parse("G25% Lg10% Lt10% Tf20% Ts10% P25%").fill(1, 32)) == "G8 Lg3 Lt3 Tf7 Ts3 P8"
    assert str(Arrangement.parse("G50% P50%").fill(1, 5)) == "G3 P2"
    assert str(Arrangement.parse("P50% G50%").fill(1, 5)) == "P3 G2"


def test_fill_keeps_paper_example_for_resnet_stem() -> None:
    arrangement = Arrangement.parse(PAPER)
    assert arrangement.fill(3, 64) == arrangement
    assert sum(arrangement.counts.values()) == 192


@given(counts_by_kind)
def test_kernel_ranges_split_kernels_in_order(counts: dict[str, int]) -> None:
    ranges = Arrangement.parse(" ".join(f"{symbol}{count}" for symbol, count in counts.items())).kernel_ranges
    assert list(ranges) == list(counts)
    assert [i for positions in ranges.values() for i in positions] == list(range(sum(counts.values())))
    assert {symbol: len(positions) for symbol, positions in ranges.items()} == counts


@given(slot_kind_lists)
def test_from_slot_kinds_inverts_slot_kinds_of_layer(slot_kinds: list[str]) -> None:
    arrangement, placement = Arrangement.from_slot_kinds(slot_kinds)
    layer = AnalyticConv2d(1, len(slot_kinds), 3, arrangement=arrangement, placement=placement)
    assert layer.slot_kinds == slot_kinds
    for symbol in KINDS:
        slots = [slot for slot, kind in enumerate(slot_kinds) if kind == symbol]
        assert arrangement.counts.get(symbol, 0) == len(slots)
        if slots:
            assert layer.slots_of(symbol) == slots


@given(slot_kind_lists)
def test_from_slot_kinds_needs_no_placement_in_registry_order(slot_kinds: list[str]) -> None:
    in_order = sorted(slot_kinds, key=list(KINDS).index)
    arrangement, placement = Arrangement.from_slot_kinds(in_order)
    assert placement is None
    assert list(arrangement.counts) == list(dict.fromkeys(in_order))
    same_arrangement, placement = Arrangement.from_slot_kinds(slot_kinds)
    assert same_arrangement == arrangement
    assert (placement is None) == (slot_kinds == in_order)
    if placement is not None:
        assert [in_order[i] for i in placement.tolist()] == slot_kinds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "X3 P3",
            r"unknown kind 'X'.*known: G \(Gabor\), Lg \(LoG\), Lt \(LoT\), Tf \(TGD 1st\), Ts .*, P \(Plain\)",
        ),
        ("g6", "unknown kind 'g'"),
        ("G3 P1 G2", "kind 'G' appears twice"),
        ("G-3 P9", "'G-3'.*must be a whole number of at least 0"),
        ("G2.5 P3.5", "'G2.5'.*must be a whole number"),
        ("G50% P40%", "add up to 90%, not 100%"),
        ("G33.3333333% P66.6666666%", r"add up to 99\.9999999\d*%, not 100%"),
        ("G150% P-50%", "'P-50%'"),
        ("G50% P3", "mixes counts and shares"),
        ("", "empty"),
        ("G", "'G'.*not a kind and a number"),
        ("6", "'6'.*not a kind and a number"),
        ("G1e3", "not a kind and a number"),
    ],
)
def test_parse_error_names_invalid_term(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arrangement.parse(text)


def test_fill_rejects_wrong_total() -> None:
    with pytest.raises(ValueError, match=r"'G5' has 5 kernels, but conv1 has 6 \(1 x 6\)"):
        Arrangement.parse("G5").fill(1, 6, "conv1")


def test_counts_reject_shares_and_auto() -> None:
    with pytest.raises(ValueError, match="in shares"):
        _ = Arrangement.parse("G100%").counts
    with pytest.raises(ValueError, match=r"'auto' works only with acl\.convert"):
        _ = Arrangement.parse("auto").counts


def test_tiny_share_is_written_as_it_is_read() -> None:
    assert str(Arrangement.parse("G0.00001% P99.99999%")) == "G0.00001% P99.99999%"


def test_warning_names_kinds_whose_share_rounds_to_none() -> None:
    with pytest.warns(UserWarning, match="conv1 gets no Lg and no P: the share of its 6 kernels rounds to 0"):
        assert str(Arrangement.parse("G92% Lg4% P4% Ts0%").fill(1, 6, "conv1")) == "G6"
