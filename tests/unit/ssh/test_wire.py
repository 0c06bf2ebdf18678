"""RFC 4251's types: what is written reads back, what is cut off or padded is refused, and nothing else is raised."""

from __future__ import annotations

from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadFormat
from signer.ssh.wire import Reader, mpint, string, uint32, uint64

READS = ["byte", "uint32", "uint64", "string", "text", "mpint", "expect_end"]


@given(st.binary(), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(min_value=0))
def test_what_is_written_reads_back(data: bytes, small: int, large: int, number: int) -> None:
    reader = Reader(string(data) + uint32(small) + uint64(large) + mpint(number))
    assert (reader.string(), reader.uint32(), reader.uint64(), reader.mpint()) == (data, small, large, number)
    reader.expect_end()


@given(st.lists(st.binary(max_size=8), max_size=5), st.binary(max_size=6), st.integers(0, 7))
def test_many_strings_are_read_as_one_after_the_other(parts: list[bytes], rest: bytes, count: int) -> None:
    data = b"".join(map(string, parts)) + rest
    one, many, encoded = Reader(data), Reader(data), Reader(data)
    try:
        wanted = [one.string() for _ in range(count)]
    except BadFormat:
        for read in (many.strings, encoded.encoded_strings):
            with pytest.raises(BadFormat):
                read(count)
        return
    assert many.strings(count) == wanted
    assert encoded.encoded_strings(count) == b"".join(map(string, wanted))
    assert one.at_end() == many.at_end() == encoded.at_end()


@given(st.binary(max_size=16))
def test_numbers_are_read_as_one_after_the_other(data: bytes) -> None:
    one, both = Reader(data), Reader(data)
    if len(data) < 12:
        with pytest.raises(BadFormat):
            both.numbers(Struct(">QI"))
    else:
        assert both.numbers(Struct(">QI")) == (one.uint64(), one.uint32())
        assert one.at_end() == both.at_end()


@given(st.binary(max_size=64), st.lists(st.sampled_from(READS)))
def test_no_bytes_raise_anything_but_bad_format(data: bytes, reads: list[str]) -> None:
    reader = Reader(data)
    try:
        for read in reads:
            getattr(reader, read)()
    except BadFormat:
        return
    assert all(read != "expect_end" for read in reads) or reader.at_end() or not reads


@pytest.mark.parametrize(
    "number,written",
    [  # RFC 4251 section 5
        (0, "00000000"),
        (0x9A378F9B2E332A7, "0000000809a378f9b2e332a7"),
        (0x80, "000000020080"),
        (0x7F, "000000017f"),
    ],
)
def test_mpints_are_those_of_the_rfc(number: int, written: str) -> None:
    assert mpint(number).hex() == written
    assert Reader(bytes.fromhex(written)).mpint() == number


@pytest.mark.parametrize("raw", ["80", "ff00", "00", "007f", "0000"])
def test_a_negative_or_padded_number_is_refused(raw: str) -> None:
    with pytest.raises(BadFormat, match="negative|leading zeros"):  # noqa: RUF043
        Reader(string(bytes.fromhex(raw))).mpint()


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_string_that_ends_early_is_refused(cut: int) -> None:
    with pytest.raises(BadFormat, match="ends before"):
        Reader(string(b"abcd")[:-cut]).string()


def test_a_length_beyond_the_data_is_refused_without_reading_it() -> None:
    with pytest.raises(BadFormat):
        Reader(b"\xff\xff\xff\xff" + b"a" * 100).string()


def test_what_follows_the_last_value_is_refused() -> None:
    reader = Reader(uint32(1) + b"x")
    reader.uint32()
    with pytest.raises(BadFormat, match="after the last"):
        reader.expect_end()


def test_text_must_be_utf_8() -> None:
    with pytest.raises(BadFormat, match="UTF-8"):
        Reader(string(b"\xff")).text()
