"""Scanning a stream: nothing missed, nothing twice, a page at a time, and what is wanted by its bytes alone."""

import asyncio

import orjson
import pytest

from processors.keyring import EpochRef, Needs, PersonRef
from processors.seal import Entropy, Sealer
from schemas.errors import LogBusy
from schemas.outbound import Message, Output
from schemas.sealed import split_envelope, take_apart
from streams.log.protocol import Stored
from streams.log.sqlite import SqliteLog
from streams.officer import scan as module
from streams.officer.scan import everything, naming, of_account, scan
from tests.support.records import SEED, a_ring

STREAM = "cdr.pii"
DAY_MS = 86_400_000
REF = EpochRef("pii", "platform", "2026-11")
ONE, TWO, THREE = (PersonRef("platform", bytes([number]) * 16, "2026-11") for number in (1, 2, 3))
RING = a_ring(Needs({REF: (None, 1)}, dict.fromkeys((ONE, TWO, THREE), 1)))


@pytest.fixture
def log(tmp_path):
    made = SqliteLog.open(tmp_path / "log.db", partitions=3)
    yield made
    asyncio.run(made.close())


def filled(log, *counts):
    """Append records numbered from 0 to each partition; a few appends each."""

    async def fill():
        for partition, count in enumerate(counts):
            for begin in range(0, count, 7):
                values = [b"%d" % number for number in range(begin, min(begin + 7, count))]
                await log.append([Output(STREAM, partition, [Message(0, None, (), value) for value in values])])

    asyncio.run(fill())


def scanned(log, wanted=everything, stream=STREAM, **options):
    async def inside():
        return [page async for page in scan(log, stream, wanted, **options)]

    return asyncio.run(inside())


def places(pages):
    return [(stored.partition, int(stored.value)) for page in pages for stored in page]


def stored(value, at_ms=0):
    return Stored(STREAM, 0, 0, at_ms, None, (), value)


def sealed(*people, account="acme", **clear):
    """Return a real sealed value with a part for each person; None: for nobody."""
    sealer = Sealer(RING, Entropy(SEED), STREAM, account, RING.epochs[REF])
    head, tail = split_envelope({"account_id": account, "month": "2026-11", "privacy": {}, **clear})
    groups = ("primary", "other", "third")
    parts = [(group, one and RING.persons[one], b"{}") for group, one in zip(groups, people, strict=False)]
    return sealer.several(head, tail, parts)


def sid(person):
    return RING.persons[person].sid


def test_a_scan_sees_each_record_once_in_order_and_a_page_at_a_time(log):
    filled(log, 23, 0, 9)
    advanced = []
    # When
    pages = scanned(log, page_records=5, advance=advanced.append)
    # Then
    assert {len(page) for page in pages} == {5, 4, 3}
    found = places(pages)
    assert found == [(0, number) for number in range(23)] + [(2, number) for number in range(9)]
    assert sum(advanced) == 32
    assert max(advanced) <= 5


def test_what_comes_during_a_scan_is_not_part_of_it(log):
    filled(log, 3)

    async def inside():
        seen = []
        async for page in scan(log, STREAM, everything):
            seen += page
            await log.append([Output(STREAM, one, [Message(0, None, (), b"late")]) for one in (0, 2)])
        return seen

    assert [one.value for one in asyncio.run(inside())] == [b"0", b"1", b"2"]


def test_a_scan_keeps_to_the_bounds_given_and_to_what_is_still_there(log):
    filled(log, 20, 20, 20)
    assert asyncio.run(log.cut(STREAM, [0, 7, 0])) == [0, 7, 0]
    # When
    found = places(scanned(log, begins=[4, 2, 99], ends=[6, 9, 20]))
    # Then
    assert found == [(0, 4), (0, 5), (1, 7), (1, 8)]


def test_a_page_with_nothing_wanted_in_it_is_not_yielded_but_counted(log):
    filled(log, 30)
    advanced = []
    assert scanned(log, lambda one: one.value == b"29", advance=advanced.append)[0][0].offset == 29
    assert scanned(log, lambda _: False, advance=advanced.append) == []
    assert sum(advanced) == 60


class Gaps:
    """A log whose partition ends with marks that no reader is shown, as those of transactions are on Kafka."""

    partitions = 1

    def __init__(self, *stable):
        self.stable = iter(stable)

    async def begin_offsets(self, _):
        return [0]

    async def end_offsets(self, _):
        return [10]

    async def stable_offsets(self, _):
        return [next(self.stable)]

    async def read(self, stream, partition, offset, limit, until=0):
        assert until == 10  # else a log that cannot see all of it would not say so
        return [Stored(stream, partition, at, 0, None, (), b"%d" % at) for at in (2, 5) if at >= offset][:limit]


def test_offsets_without_a_record_are_passed_over():
    advanced = []
    assert places(scanned(Gaps(10), advance=advanced.append)) == [(0, 2), (0, 5)]
    assert sum(advanced) == 10


def test_a_scan_waits_for_who_has_written_and_not_committed(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_S", 0)
    assert places(scanned(Gaps(0, 4, 10))) == [(0, 2), (0, 5)]
    # and does not wait where it is told how far to go
    assert places(scanned(Gaps(), ends=[10])) == [(0, 2), (0, 5)]


def test_a_scan_that_cannot_see_everything_says_so(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_S", 0)
    monkeypatch.setattr(module, "UNDECIDED_S", 0)
    with pytest.raises(LogBusy):
        scanned(Gaps(*[9] * 1000))


# --- what is wanted -----------------------------------------------------------------------------------------------


def test_a_record_is_named_by_any_of_its_parts():
    wanted = naming({sid(ONE), sid(TWO)})
    assert wanted(stored(sealed(ONE)))
    assert wanted(stored(sealed(THREE, TWO)))
    assert wanted(stored(sealed(ONE, THREE)))
    assert wanted(stored(sealed(TWO, THREE, THREE)))
    assert not wanted(stored(sealed(THREE)))
    assert not wanted(stored(sealed(None)))
    assert not naming(())(stored(sealed(ONE)))


def test_what_names_a_person_elsewhere_than_as_a_sid_is_not_theirs():
    value = orjson.loads(sealed(THREE))
    value["sealed"][0]["group"] = sid(ONE)
    assert not naming({sid(ONE)})(stored(orjson.dumps(value)))
    assert not naming({sid(ONE)})(stored(b'"sid":"'))
    assert not naming({sid(ONE)})(stored(b""))


def test_what_is_named_is_what_taking_apart_finds():
    wanted = naming({sid(TWO)})
    for people in ((ONE,), (TWO,), (None, TWO), (ONE, TWO), (TWO, ONE), (THREE, ONE), (None, None)):
        value = sealed(*people)
        assert wanted(stored(value)) == any(part.sid == sid(TWO) for part in take_apart(value).parts)


def test_an_accounts_records_are_wanted_of_whole_days():
    noon_s = 100 * 86_400 + 43_200
    wanted = of_account("acme", noon_s, noon_s + 86_400)
    value = sealed(ONE)
    days = {day: wanted(stored(value, day * DAY_MS)) for day in (99, 100, 101, 102)}
    assert days == {99: False, 100: True, 101: True, 102: False}
    # an end at midnight is the end of the day before
    assert not of_account("acme", None, 100 * 86_400)(stored(value, 100 * DAY_MS))
    assert of_account("acme")(stored(value, -1))


def test_another_account_is_not_wanted_even_if_its_name_begins_alike():
    wanted = of_account("acme")
    for other in ("acme2", "acm", "xacme", "ACME"):
        assert not wanted(stored(sealed(ONE, account=other)))
    # a text that spells an account out is escaped
    assert not wanted(stored(sealed(ONE, account="other", record_id='"account_id":"acme"')))
