import hashlib
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.screen.registry import (
    DAY_S,
    PAGE_BYTES,
    BitmapBuilder,
    BitmapRegistry,
    age_s,
    freshness,
    parse_us,
)
from schemas.errors import RegistryInvalid

FIELDS = {
    "name": "us-dnc",
    "country": "US",
    "calling_code": "1",
    "as_of_s": 1_790_000_000,
    "loaded_at_s": 1_790_000_500,
}
INDEX_BYTES = 4_000_000


def bitmap(numbers, **fields):
    builder = BitmapBuilder()
    builder.add(numbers)
    header, chunks = builder.finish(**(FIELDS | fields))
    return header, b"".join(chunks)


def rebuilt(index, pages, **changes):
    """A file with a right checksum over whatever index and pages are given."""
    fields = {"name": "us-dnc", "country": "US", "calling_code": "1", "as_of": 1, "loaded_at": 2, "count": 1}
    rest = index + pages
    header = json.dumps(fields | {"sha256": hashlib.sha256(rest).hexdigest()} | changes).encode()
    return b"SVBITMAP" + struct.pack("<HI", 1, len(header)) + header + rest


national = st.integers(0, 10**10 - 1)
crowded = st.builds(
    lambda prefix, line: prefix * 10_000 + line, st.sampled_from([0, 212555, 999999]), st.integers(0, 9999)
)


@settings(max_examples=12, deadline=None)
@given(st.sets(national | crowded, min_size=1, max_size=300), st.sets(national | crowded, max_size=300))
def test_lookups_agree_with_a_set(listed, others):
    header, content = bitmap([*listed, *listed])
    registry = BitmapRegistry(memoryview(content))
    assert header.count == len(listed)
    for number in listed | others | {n ^ 1 for n in listed}:
        if number < 10**10:
            assert registry.lists(f"+1{number:010}") is (number in listed)


def test_the_first_and_last_bit_of_a_page_and_of_the_index_are_exact():
    numbers = [0, 9_999, 4_155_550_100, 9_999_990_000, 9_999_999_999]
    registry = BitmapRegistry(bitmap(numbers)[1])
    for number in numbers:
        assert registry.lists(f"+1{number:010}")
        assert not registry.lists(f"+1{(number + 7) % 10**10:010}")


@pytest.mark.parametrize(
    "number",
    [
        *("", "+", "+1", "4155550100", "14155550100", "+4155550100", "+14155550", "+141555501000", "+24155550100"),
        *("+1415_550100", "+1 415555010", "+1-155550100", "+1٠x55550100", "+7"),
    ],
)
def test_another_calling_code_length_or_form_is_not_listed(number):
    assert BitmapRegistry(bitmap([4_155_550_100, 155_550_100])[1]).lists(number) is False


def test_a_calling_code_of_two_digits_is_taken_off_whole():
    registry = BitmapRegistry(bitmap([9_876_543_210], calling_code="91", country="IN")[1])
    assert registry.lists("+919876543210")
    assert not registry.lists("+19876543210")


def test_a_bitmap_says_what_it_is_and_its_repr_shows_no_number():
    header, content = bitmap([4_155_550_100])
    registry = BitmapRegistry(content)
    assert (registry.name, registry.country, registry.as_of_s) == ("us-dnc", "US", 1_790_000_000)
    assert registry.header == header
    assert header.loaded_at == 1_790_000_500
    assert "415555" not in repr(registry)


def test_the_file_follows_the_grammar_of_the_module():
    # Given one number, written
    content = bitmap([4_155_550_100])[1]
    # Then an independent reader finds its bit where the grammar says, and no other
    magic, version, length = struct.unpack_from("<8sHI", content)
    header = json.loads(content[14 : 14 + length])
    rest = content[14 + length :]
    index = struct.unpack("<1000000I", rest[:INDEX_BYTES])
    assert (magic, version, len(rest)) == (b"SVBITMAP", 1, INDEX_BYTES + PAGE_BYTES)
    assert header.pop("sha256") == hashlib.sha256(rest).hexdigest()
    assert header == {
        "name": "us-dnc",
        "country": "US",
        "calling_code": "1",
        "count": 1,
        "as_of": 1_790_000_000,
        "loaded_at": 1_790_000_500,
    }
    assert [(prefix, page) for prefix, page in enumerate(index) if page] == [(415555, 1)]
    page = rest[INDEX_BYTES:]
    assert page[100 >> 3] == 1 << (100 & 7)
    assert sum(map(int.bit_count, page)) == 1


def test_an_empty_list_is_refused():
    with pytest.raises(RegistryInvalid, match="no number"):
        bitmap([])


@pytest.mark.parametrize("number", [-1, 10**10])
def test_a_number_of_another_length_cannot_be_added(number):
    with pytest.raises(ValueError, match="ten national digits"):
        BitmapBuilder().add([number])


SOUND = bitmap([4_155_550_100, 2_125_550_100])[1]
HEADER_END = 14 + struct.unpack_from("<I", SOUND, 10)[0]


@pytest.mark.parametrize("keep", [0, 5, 13, 14, 100, HEADER_END, HEADER_END + INDEX_BYTES, len(SOUND) - 1])
def test_a_truncated_bitmap_is_refused(keep):
    # One whole page missing is caught by the index, anything else by the size
    with pytest.raises(RegistryInvalid):
        BitmapRegistry(SOUND[:keep])
    with pytest.raises(RegistryInvalid):
        BitmapRegistry(SOUND[: len(SOUND) - PAGE_BYTES])


def test_a_longer_bitmap_is_refused():
    for extra in (b"\0", bytes(PAGE_BYTES)):
        with pytest.raises(RegistryInvalid):
            BitmapRegistry(SOUND + extra)


def test_wrong_magic_is_refused():
    with pytest.raises(RegistryInvalid, match="not a registry bitmap"):
        BitmapRegistry(b"X" + SOUND[1:])


def test_a_version_of_tomorrow_is_refused():
    with pytest.raises(RegistryInvalid, match="version 2"):
        BitmapRegistry(SOUND[:8] + b"\2\0" + SOUND[10:])


@pytest.mark.parametrize("header_length", [0, 1, 0xFFFFFFFF])
def test_a_wrong_header_length_is_refused(header_length):
    with pytest.raises(RegistryInvalid):
        BitmapRegistry(SOUND[:10] + struct.pack("<I", header_length) + SOUND[14:])


@pytest.mark.parametrize(
    "changes",
    [{"as_of": "x"}, {"calling_code": "0"}, {"calling_code": "x1"}, {"count": 0}, {"more": 1}, {"name": None}],
)
def test_a_damaged_header_is_refused(changes):
    index = struct.pack("<I", 1) + bytes(INDEX_BYTES - 4)
    assert BitmapRegistry(rebuilt(index, bytes(PAGE_BYTES)))
    with pytest.raises(RegistryInvalid, match="header"):
        BitmapRegistry(rebuilt(index, bytes(PAGE_BYTES), **changes))


def test_a_header_that_is_no_text_is_refused():
    with pytest.raises(RegistryInvalid, match="header"):
        BitmapRegistry(SOUND[:14] + b"\xff" * (HEADER_END - 14) + SOUND[HEADER_END:])


@pytest.mark.parametrize("pages", [(2,), (0,), (1, 1), (2, 1), (1, 3), (0xFFFFFFFF,)])
def test_an_index_out_of_range_or_out_of_order_is_refused(pages):
    # Given a right checksum, so that only the index can be what is wrong
    index = struct.pack(f"<{len(pages)}I", *pages)
    with pytest.raises(RegistryInvalid, match="index"):
        BitmapRegistry(rebuilt(index + bytes(INDEX_BYTES - len(index)), bytes(PAGE_BYTES) * len(pages)))


def test_one_changed_bit_is_refused():
    damaged = bytearray(SOUND)
    damaged[-7] ^= 1
    with pytest.raises(RegistryInvalid, match="checksum"):
        BitmapRegistry(damaged)


def test_every_refusal_says_what_to_do():
    for content in (b"", b"X" + SOUND[1:], SOUND[:-1], SOUND + bytes(PAGE_BYTES)):
        with pytest.raises(RegistryInvalid, match="load the registry again"):
            BitmapRegistry(content)


# --- the US list -------------------------------------------------------------------------------------------


def test_lines_of_area_code_and_number_are_read_with_either_line_end():
    lines = [b"415,5550100\n", b"\r\n", b"212,5550199\r\n", b"\n", b"  \n", b"201,0000000"]
    assert list(parse_us(lines, "list.txt")) == [4_155_550_100, 2_125_550_199, 2_010_000_000]


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"4155550100",
            b"415,555010",
            b"415,55501000",
            b"41,55501000",
            b"415;5550100",
            b"415,555-100",
            b" 415,5550100",
        ),
        *(b"415,5550100 ", b"area,number", b"4_5,5550100", b"\xff\xfe4,1", b"+15,5550100", "４15,5550100".encode()),
    ],
)
def test_any_other_line_is_refused_with_its_number_and_without_its_text(line):
    with pytest.raises(RegistryInvalid) as refused:
        list(parse_us([b"415,5550100\n", b"\n", line + b"\n"], "list.txt"))
    assert refused.value.where == {"file": "list.txt", "line": 3}
    assert "555" not in str(refused.value)


# --- age ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "state"),
    [(-DAY_S, "fresh"), (0, "fresh"), (31 * DAY_S, "fresh"), (31 * DAY_S + 1, "stale"), (400 * DAY_S, "stale")],
)
def test_a_list_is_stale_from_the_second_after_its_greatest_age(age, state):
    assert freshness(31, 1_790_000_000, 1_790_000_000 + age) == state


def test_an_age_is_never_below_zero():
    assert age_s(100, 90) == 0
    assert age_s(90, 100) == 10
