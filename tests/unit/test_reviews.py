"""The clock of near misses, and what is undecided, from the clear envelopes of the stream."""

import asyncio
from datetime import UTC, date, datetime, timedelta

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from processors.retention import instant
from schemas.errors import LogUnusable
from streams.log.protocol import Stored
from streams.state.reviews import BUSINESS_DAYS, SOON_S, Near, OpenReviews, Place, business_days_after, clock
from tests.support.records import examples

DAY_S = 86_400
DAY = "2026-11-20"  # a Friday
DIES = "2026-12-21T00:00:00Z"
DUE_S = int(datetime(2026, 12, 5, tzinfo=UTC).timestamp())


def near_miss(day=DAY, expires_at=DIES, account="acme"):
    fields = {
        "account_id": account,
        "day": day,
        "privacy": {"expires_at": expires_at},
        "sealed": [{"box": "x"}],
        "v": 1,
    }
    return orjson.dumps(fields)


def resolution(partition, offset, action="dismissed"):
    place = {"partition": partition, "offset": offset}
    fields = {
        "action": action,
        "privacy": {"expires_at": DIES},
        "reason": "C-1",
        "resolves": place,
        "sealed": [],
        "v": 1,
    }
    return orjson.dumps(fields)


class Written:
    """A log that holds these values of `review`; the offsets before `begin` are cut off."""

    def __init__(self, *partitions, begin=0):
        self.partitions = partitions
        self.begin = begin
        self.stable = None

    async def begin_offsets(self, stream):
        assert stream == "review"
        return [self.begin] * len(self.partitions)

    async def stable_offsets(self, _):
        return self.stable or [len(values) for values in self.partitions]

    async def read(self, stream, partition, offset, limit):
        found = list(enumerate(self.partitions[partition]))[offset : offset + min(limit, 3)]
        return [Stored(stream, partition, at, 0, None, (), value) for at, value in found]


def followed(log, **options):
    reviews = OpenReviews(log, **options)
    asyncio.run(reviews.catch_up())
    return reviews


# --- the clock ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("day", "last"),
    [
        ("2026-11-20", "2026-12-04"),  # Friday to Friday; Thanksgiving counts
        ("2026-11-21", "2026-12-04"),  # Saturday
        ("2026-11-22", "2026-12-04"),  # Sunday
        ("2026-11-23", "2026-12-07"),  # Monday to Monday
        ("2026-12-24", "2027-01-07"),  # Christmas and New Year count
    ],
)
def test_a_near_miss_is_due_at_the_end_of_the_tenth_business_day(day, last):
    found = clock("acme", day, "2027-12-21T00:00:00Z")
    assert instant(found.due_s - 1) == f"{last}T23:59:59Z"


@given(day=st.dates(date(2000, 1, 1), date(2090, 1, 1)))
@examples(200)
def test_business_days_are_counted_one_by_one(day):
    last = business_days_after(day, BUSINESS_DAYS)
    between = [day + timedelta(days=n) for n in range(1, (last - day).days + 1)]
    assert sum(one.weekday() < 5 for one in between) == BUSINESS_DAYS
    assert last.weekday() < 5
    # never later than a count that leaves public holidays out
    assert (last - day).days <= 14


def test_where_it_dies_before_it_is_due_the_day_before_it_dies():
    assert clock("a", DAY, "2026-12-06T00:00:00Z").due_s == DUE_S
    for dies in ("2026-12-05T00:00:00Z", "2026-11-24T00:00:00Z", "2026-11-22T00:00:00Z"):
        found = clock("a", DAY, dies)
        assert found.due_s == found.expires_s - DAY_S
        assert instant(found.expires_s) == dies


# --- what is undecided ----------------------------------------------------------------------------------------------


def test_what_is_resolved_is_undecided_no_more():
    log = Written([near_miss() for _ in range(7)] + [resolution(0, 2), resolution(0, 5, "opted_out"), resolution(0, 5)])
    reviews = followed(log)
    assert sorted(one.place.offset for one in reviews) == [0, 1, 3, 4, 6]
    assert reviews.get(Place(0, 2)) is None
    assert reviews.get(Place(0, 3)) == Near(Place(0, 3), clock("acme", DAY, DIES))
    assert [reviews.get(Place(*place)) for place in ((1, 0), (0, 7), (0, 99))] == [None] * 3
    whole = {one.place.offset: one.decision for one in followed(log, keep_decided=True)}
    assert whole == {0: None, 1: None, 2: "dismissed", 3: None, 4: None, 5: "opted_out", 6: None}


def test_it_goes_on_from_where_it_was_and_reads_nothing_that_is_undecided_in_the_log():
    log = Written([near_miss()] * 5)
    log.stable = [2]
    reviews = OpenReviews(log)
    asyncio.run(reviews.catch_up())
    assert len(list(reviews)) >= 2
    log.partitions[0].append(resolution(0, 0))
    log.stable = None
    asyncio.run(reviews.catch_up())
    assert sorted(one.place.offset for one in reviews) == [1, 2, 3, 4]
    asyncio.run(reviews.catch_up())
    assert len(list(reviews)) == 4


def test_what_is_overdue_due_soon_and_dead_is_told_by_the_clock():
    log = Written([near_miss(), near_miss(day="2026-11-23"), near_miss(day="2026-12-01"), near_miss(day="2026-12-01")])
    reviews = followed(log)
    assert reviews.clocks(DUE_S - SOON_S - 1) == (4, 0, 0)
    assert reviews.clocks(DUE_S - SOON_S) == (4, 1, 0)
    assert reviews.clocks(DUE_S - 1) == (4, 1, 0)
    assert reviews.clocks(DUE_S) == (4, 0, 1)
    assert reviews.clocks(DUE_S + DAY_S) == (4, 1, 1)
    dies_s = int(datetime(2026, 12, 21, tzinfo=UTC).timestamp())
    reviews.forget_dead(dies_s - 1)
    assert (reviews.died(dies_s - 1), len(list(reviews))) == (0, 4)
    reviews.forget_dead(dies_s)
    assert (reviews.clocks(dies_s), reviews.died(dies_s), reviews.died(dies_s + DAY_S - 1)) == ((0, 0, 0), 4, 4)
    assert reviews.died(dies_s + DAY_S) == 0


@pytest.mark.parametrize(
    "value",
    [
        b"", b"no record", b"{}", b'{"privacy":{"expires_at":null},"day":"2026-11-20"}',
        near_miss(day="2026-13-01"), near_miss(expires_at="soon"), resolution(0, "x"), resolution(77, 0),
    ],
)  # fmt: skip
def test_what_cannot_be_read_counts_as_overdue_and_is_named(value):
    log = Written([near_miss()], [near_miss(), value, near_miss()])
    reviews = followed(log)
    assert reviews.clocks(0) == (3, 0, 1)
    with pytest.raises(LogUnusable) as raised:
        reviews.readable()
    assert (raised.value.where["partition"], raised.value.where["offset"]) == (1, 1)
    # until it is cut off the log
    log.begin = 2
    asyncio.run(reviews.catch_up())
    reviews.readable()
    assert reviews.clocks(0).overdue == 0
