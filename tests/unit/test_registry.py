import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.screen import registry_build
from processors.screen.registry import DAY_S, PAGE_BYTES, RegistryFile, age_s, freshness
from processors.screen.registry_build import RegistryBuilder
from schemas.errors import RegistryInvalid

FIELDS = {"name": "us-dnc", "country": "US", "as_of_s": 1_790_000_000, "loaded_at_s": 1_790_000_500}
DENSE = [14_155_550_000 + line for line in range(1000)]
SPARSE = [14_155_550_100, 442_071_234_567, 6_591_234_567]


def array(numbers):
    return np.array(list(numbers), np.int64)


def built(*parts, base=None, **fields):
    builder = RegistryBuilder(base)
    for part in parts:
        builder.add(array(part))
    found = builder.finish(**(FIELDS | fields))
    return found.header, b"".join(found.chunks())


def numbers_of(registry):
    return {number for part in RegistryBuilder(registry).numbers() for number in part.tolist()}


whole = st.integers(10**6, 10**15 - 1)
crowded = st.builds(lambda page, line: page * 10_000 + line, st.sampled_from([1_415_555, 120]), st.integers(0, 9999))
filled = st.builds(
    lambda page: range(page * 10_000, page * 10_000 + 700), st.sampled_from([1_415_555, 1_415_600, 6_591])
)
lists = st.tuples(st.sets(whole | crowded, max_size=200), st.lists(filled, max_size=2)).map(
    lambda made: made[0].union(*made[1])
)


# --- what is listed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 300, 1 << 18])
@settings(max_examples=60, deadline=None)
@given(listed=lists.filter(bool), others=st.sets(whole | crowded, max_size=300), data=st.data())
def test_lookups_agree_with_a_set_in_either_encoding(limit, listed, others, data):
    # Given a list in any order, with repeats, in parts / When it passes from waiting to pages now, later or never
    order = data.draw(st.permutations(sorted(listed)))
    before = registry_build._WAITING_LIMIT
    registry_build._WAITING_LIMIT = limit
    try:
        header, content = built(order[:50], order, order[::3])
    finally:
        registry_build._WAITING_LIMIT = before
    registry = RegistryFile(memoryview(content))
    # Then
    assert header.count == registry.count == len(listed)
    for number in listed | others | {number ^ 1 for number in listed}:
        if number < 10**15:
            assert registry.lists(f"+{number}") is (number in listed)
    assert numbers_of(registry) == listed
    # And the same numbers always give the same bytes, whatever way they came
    assert built(sorted(listed))[1] == content


@settings(max_examples=60, deadline=None)
@given(listed=lists.filter(bool), removed=lists, added=lists)
def test_removing_and_adding_agree_with_a_set(listed, removed, added):
    base = RegistryFile(built(listed)[1])
    builder = RegistryBuilder(base)
    builder.remove(array(sorted(removed)))
    assert builder.count() == len(listed - removed)
    builder.add(array(added))
    expected = (listed - removed) | added
    assert builder.count() == len(expected)
    assert {number for part in builder.numbers() for number in part.tolist()} == expected
    if expected:
        content = b"".join(builder.finish(**FIELDS).chunks())
        assert content == built(expected)[1]
    assert numbers_of(base) == listed  # which is not changed


def test_numbers_far_apart_leave_the_pages_again(monkeypatch):
    # Given pages, and then a number so far away that an index up to it would be absurd
    monkeypatch.setattr(registry_build, "_WAITING_LIMIT", 1)
    header, content = built(DENSE, [19_999_999_999, 11_000_000_000], [999_999_999_999_999, 100_000_000_000_000])
    registry = RegistryFile(content)
    assert header.count == len(DENSE) + 4
    assert registry.encoding == "buckets"
    assert all(registry.lists(f"+{number}") for number in (*DENSE, 999_999_999_999_999, 100_000_000_000_000))
    assert not registry.lists("+999999999999998")


def test_the_first_and_last_number_of_a_page_and_of_each_length_are_exact():
    numbers = [int("1" + "0" * digits) for digits in range(6, 15)] + [int("9" * digits) for digits in range(7, 16)]
    numbers += [14_155_550_000, 14_155_559_999]
    registry = RegistryFile(built(numbers)[1])
    for number in numbers:
        assert registry.lists(f"+{number}")
        assert not registry.lists(f"+{number ^ 2}")
    pages = RegistryFile(built(range(14_155_550_000, 14_155_560_000))[1])
    assert pages.encoding == "pages"
    for number, listed in ((14_155_549_999, False), (14_155_550_000, True), (14_155_559_999, True)):
        assert pages.lists(f"+{number}") is listed
    assert not pages.lists("+14155560000")


def test_a_list_takes_the_encoding_that_is_smaller():
    assert RegistryFile(built(DENSE)[1]).encoding == "pages"
    assert len(built(DENSE)[1]) < 2 * PAGE_BYTES
    assert RegistryFile(built(SPARSE)[1]).encoding == "buckets"
    assert len(built(SPARSE)[1]) < 512
    scattered = np.random.default_rng(1).integers(10_000_000_000, 19_999_999_999, 100_000)
    assert len(built(scattered)[1]) < 7 * 100_000


@pytest.mark.parametrize("numbers", [DENSE, SPARSE])
@pytest.mark.parametrize(
    "number",
    [
        *("", "+", "+1", "4155550100", "14155550100", "+4155550100", "+14155550", "+141555501000", "+24155550100"),
        *("+1415_550100", "+1 415555010", "+1-155550100", "+1٠x55550100", "+7", "+014155550100", "-14155550100"),
        *("+²", "+14155550100\0", "ACME", "a" * 5000, "+" + "9" * 400, "++14155550100", "1_4155550100x"),
    ],
)
def test_another_length_or_form_is_not_listed(numbers, number):
    assert RegistryFile(built(numbers)[1]).lists(number) is False


def test_a_registry_says_what_it_is_and_its_repr_shows_no_number():
    header, content = built([*DENSE, 442_071_234_567])
    registry = RegistryFile(content)
    assert (registry.name, registry.country, registry.as_of_s) == ("us-dnc", "US", 1_790_000_000)
    assert registry.header == header
    assert (header.loaded_at, registry.count, registry.size_bytes) == (1_790_000_500, 1001, len(content))
    assert "415555" not in repr(registry) + repr(header)


def test_an_empty_list_is_refused():
    with pytest.raises(RegistryInvalid, match="no number"):
        built([])
    builder = RegistryBuilder(RegistryFile(built(DENSE)[1]))
    builder.remove(array(DENSE))
    with pytest.raises(RegistryInvalid, match="no number"):
        builder.finish(**FIELDS)


@pytest.mark.parametrize("number", [-1, 0, 999_999, 10**15, -14_155_550_100])
def test_a_number_of_another_length_cannot_be_added_or_removed(number):
    for act in (RegistryBuilder().add, RegistryBuilder().remove, RegistryBuilder(RegistryFile(built(DENSE)[1])).remove):
        with pytest.raises(ValueError, match="7 to 15 digits"):
            act(array([14_155_550_100, number]))


def test_pages_that_became_empty_are_not_written():
    builder = RegistryBuilder(RegistryFile(built(DENSE, [number + 10_000 for number in DENSE])[1]))
    builder.remove(array(DENSE))
    content = b"".join(builder.finish(**FIELDS).chunks())
    assert content == built([number + 10_000 for number in DENSE])[1]


# --- the grammar, read by hand ------------------------------------------------------------------------------


def parts(content):
    magic, version, length, digest = struct.unpack_from("<8sHI32s", content)
    header = json.loads(content[46 : 46 + length])
    start = -(-(46 + length) // 8) * 8
    assert not any(content[46 + length : start])
    return magic, version, digest, header, content[start:]


def rebuilt(header, body, *, version=2, length=None):
    """A file with a right checksum over whatever header and body are given."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    rest = encoded + bytes(-(46 + len(encoded)) % 8) + body
    digest = hashlib.sha256(rest).digest()
    return struct.pack("<8sHI32s", b"SVBITMAP", version, len(encoded) if length is None else length, digest) + rest


def test_pages_follow_the_grammar_of_the_module():
    content = built(DENSE, [14_155_560_007], [442_071_000_000 + line for line in range(1000)])[1]
    magic, version, digest, header, body = parts(content)
    assert (magic, version, digest) == (b"SVBITMAP", 2, hashlib.sha256(content[46:]).digest())
    assert header == {
        "name": "us-dnc", "country": "US", "as_of": 1_790_000_000, "loaded_at": 1_790_000_500, "count": 2001,
        "pages": [{"digits": 11, "first": 1_415_555, "size": 2}, {"digits": 12, "first": 44_207_100, "size": 1}],
    }  # fmt: skip
    assert struct.unpack_from("<3I", body) == (1, 2, 3)
    pages = body[12:]
    assert len(pages) == 3 * 1250
    assert pages[:1250] == b"\xff" * 125 + bytes(1125)
    assert pages[1250:2500] == bytes([1 << 7]) + bytes(1249)


def test_buckets_follow_the_grammar_of_the_module():
    numbers = [14_155_550_100, 6_591_234_567, 442_071_234_567, 14_155_550_102]
    header, body = parts(built(numbers)[1])[3:]
    assert header["buckets"] == {"size": 3, "width": 8}
    starts = struct.unpack_from("<4I", body)
    quotients = struct.unpack_from("<4Q", body, 16)
    found = {
        quotient * 3 + bucket for bucket in range(3) for quotient in quotients[starts[bucket] : starts[bucket + 1]]
    }
    assert len(body) == 48
    assert found == set(numbers)


def test_many_numbers_have_quotients_of_four_bytes():
    header = parts(built(range(14_155_550_000, 19_999_999_999, 1_000_000))[1])[3]
    assert header["buckets"]["width"] == 4


# --- what is refused ----------------------------------------------------------------------------------------

SOUND = {"pages": built(DENSE, [14_155_570_000])[1], "buckets": built(SPARSE)[1]}
HEADER = {"name": "us-dnc", "country": "US", "as_of": 1, "loaded_at": 2, "count": 1}
RANGE = {"digits": 11, "first": 1_415_555, "size": 1}
ONE_PAGE = struct.pack("<I", 1) + b"\1" + bytes(PAGE_BYTES - 1)
ONE_BUCKET = struct.pack("<2IQ", 0, 1, 14_155_550_000)


def test_what_the_next_tests_break_is_sound():
    assert RegistryFile(rebuilt(HEADER | {"pages": [RANGE]}, ONE_PAGE)).lists("+14155550000")
    assert RegistryFile(rebuilt(HEADER | {"buckets": {"size": 1, "width": 8}}, ONE_BUCKET)).lists("+14155550000")


@pytest.mark.parametrize("encoding", SOUND)
def test_a_registry_that_is_cut_or_longer_is_refused_and_says_what_to_do(encoding):
    content = SOUND[encoding]
    for damaged in (*(content[:keep] for keep in (0, 5, 45, 46, 100, len(content) - 1)), content + b"\0",
                    content + bytes(PAGE_BYTES)):  # fmt: skip
        with pytest.raises(RegistryInvalid, match="load the registry again"):
            RegistryFile(damaged)


@pytest.mark.parametrize("encoding", SOUND)
def test_one_changed_bit_anywhere_is_refused(encoding):
    content = SOUND[encoding]
    for at in (*range(min(len(content), 400)), *range(400, len(content), 97), len(content) - 1):
        damaged = bytearray(content)
        damaged[at] ^= 1
        with pytest.raises(RegistryInvalid, match="load the registry again"):
            RegistryFile(damaged)


def test_wrong_magic_and_other_versions_are_refused():
    content = SOUND["pages"]
    with pytest.raises(RegistryInvalid, match="not a registry file"):
        RegistryFile(b"X" + content[1:])
    for version in (1, 3):
        with pytest.raises(RegistryInvalid, match=f"version {version} .*load the registry again"):
            RegistryFile(content[:8] + bytes([version, 0]) + content[10:])


@pytest.mark.parametrize(
    "changes",
    [
        *({"as_of": "x"}, {"count": 0}, {"count": 2**32}, {"more": 1}, {"name": None}, {"pages": None}),
        *({"buckets": {"size": 1, "width": 8}}, {"pages": [RANGE | {"digits": 6}]}),
        *({"pages": [RANGE | {"digits": 16}]}, {"pages": [RANGE | {"first": 999_999}]}, {"pages": [RANGE, RANGE]}),
        *({"pages": [RANGE | {"first": 10_000_000}]}, {"pages": [RANGE | {"size": 0}]}),
    ],
)  # fmt: skip
def test_a_wrong_header_is_refused(changes):
    with pytest.raises(RegistryInvalid, match=r"damaged (header|index)"):
        RegistryFile(rebuilt(HEADER | {"pages": [RANGE]} | changes, ONE_PAGE))


def test_a_header_that_is_no_json_or_of_a_wrong_length_is_refused():
    encoded = json.dumps(HEADER | {"pages": [RANGE]}).encode()
    for length in (0, 1, len(encoded) - 1, 0xFFFFFFFF):
        with pytest.raises(RegistryInvalid, match="header"):
            RegistryFile(rebuilt(encoded, ONE_PAGE, length=length))
    with pytest.raises(RegistryInvalid, match="header"):
        RegistryFile(rebuilt(b"\xff" * 40, ONE_PAGE))


@pytest.mark.parametrize("index", [(2,), (0,), (1, 1), (2, 1), (1, 3), (0xFFFFFFFF,), ()])
def test_an_index_out_of_range_or_out_of_order_is_refused(index):
    # Given a right checksum, so that only the index can be what is wrong
    ranges = [RANGE | {"size": max(1, len(index))}]
    body = struct.pack(f"<{len(index)}I", *index) + bytes(PAGE_BYTES) * len(index)
    with pytest.raises(RegistryInvalid, match="index"):
        RegistryFile(rebuilt(HEADER | {"pages": ranges}, body))


@pytest.mark.parametrize(
    ("starts", "quotients"),
    [((0, 2), (1, 2)), ((1, 1), (1,)), ((0, 0), (1,)), ((0, 1), ()), ((0,), (1,)), ((0, 2, 1), (1,))],
)
def test_buckets_out_of_range_or_out_of_order_are_refused(starts, quotients):
    size = max(1, len(starts) - 1)
    body = struct.pack(f"<{len(starts)}I", *starts) + bytes(len(starts) % 2 * 4)
    body += struct.pack(f"<{len(quotients)}Q", *quotients)
    with pytest.raises(RegistryInvalid, match="index"):
        RegistryFile(rebuilt(HEADER | {"buckets": {"size": size, "width": 8}}, body))


# --- age ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "state"),
    [(-DAY_S, "fresh"), (0, "fresh"), (31 * DAY_S, "fresh"), (31 * DAY_S + 1, "stale"), (400 * DAY_S, "stale")],
)
def test_a_list_is_stale_from_the_second_after_its_greatest_age(age, state):
    assert freshness(31, 1_790_000_000, 1_790_000_000 + age) == state


def test_an_age_is_never_below_zero():
    assert age_s(100, 90) == 0
    assert age_s(90, 100) == 10
