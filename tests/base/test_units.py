"""Sizes as people write them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.base.errors import UsageError
from edgemoe.base.units import format_bytes, format_seconds, parse_bytes

EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
amounts = st.integers(1, 10**6)
letters = st.sampled_from(sorted(EXPONENTS))
prefixes = st.sampled_from("kmgt")


@st.composite
def in_any_case(draw: st.DrawFn, text: str) -> str:
    return "".join(draw(st.sampled_from((c.lower(), c.upper()))) for c in text)


@given(amounts, letters, st.data())
def test_units_without_i_are_powers_of_1000_in_any_case(amount: int, letter: str, data: st.DataObject) -> None:
    assert parse_bytes(f"{amount}{data.draw(in_any_case(letter + 'b'))}") == amount * 1000 ** EXPONENTS[letter]


@given(amounts, prefixes, st.sampled_from(("i", "ib")), st.data())
def test_units_with_i_are_powers_of_1024_in_any_case(amount: int, letter: str, suffix: str, data: st.DataObject) -> None:
    assert parse_bytes(f"{amount}{data.draw(in_any_case(letter + suffix))}") == amount * 1024 ** EXPONENTS[letter]


@given(st.integers(0, 10**4), st.integers(1, 999), prefixes, st.sampled_from((("b", 1000), ("ib", 1024), ("", 1000))))
def test_fractions_are_exact_and_cut_to_whole_bytes(whole: int, thousandths: int, letter: str, unit: tuple[str, int]) -> None:
    suffix, base = unit
    exact = (whole + Fraction(thousandths, 1000)) * base ** EXPONENTS[letter]
    assert parse_bytes(f"{whole}.{thousandths:03d}{letter}{suffix}") == int(exact)


@given(amounts, prefixes)
def test_spaces_around_number_and_unit_do_not_matter(amount: int, letter: str) -> None:
    assert parse_bytes(f"  {amount} {letter}B ") == parse_bytes(f"{amount}{letter}B")


@pytest.mark.parametrize(
    ("text", "size"),
    [("128GB", 128 * 10**9), ("119.2GiB", 127990025420), ("123456B", 123456), ("64Gi", 2**36), (".5k", 500), ("24g", 24 * 10**9)],
)
def test_documented_spellings(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(0, 10**15) | st.decimals(0, 10**9, places=2).map(str))
def test_a_number_without_a_unit_is_refused_with_what_to_write(number: object) -> None:
    with pytest.raises(UsageError, match="no unit") as caught:
        parse_bytes(str(number))
    assert f"{number}GB" in caught.value.hint and f"{number}GiB" in caught.value.hint


@given(st.sampled_from(("0B", "0GB", "0.0MiB", "0.4B", "0.0000001k")))
def test_zero_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not positive"):
        parse_bytes(text)


@given(amounts, prefixes)
def test_negative_sizes_are_refused(amount: int, letter: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_bytes(f"-{amount}{letter}B")


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "1.2.3GB", "1e9B", "1,5GB", "1GBps", "1iB", "1bB", "1PB", "0x10B", "٣GB", "1_000B", "nanB", "infGB", "1GB 2GB", "."],
)
def test_known_garbage_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_or_a_usage_error_with_a_hint(text: str) -> None:
    try:
        assert parse_bytes(text) > 0
    except UsageError as error:
        assert error.hint


@given(st.integers(0, 10**15))
def test_what_is_printed_reads_back_within_its_rounding(size: int) -> None:
    if size >= 1000:
        decimal, binary = format_bytes(size).removesuffix(")").split(" (")
        assert parse_bytes(decimal) == pytest.approx(size, rel=0.006)
        assert parse_bytes(binary) == pytest.approx(size, rel=0.006)
    elif size:
        assert parse_bytes(format_bytes(size)) == size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (8, "8.0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
