"""Deadlines against an oracle that shares no code with them.

In UTC the oracle counts days by hand; in time zones it looks at the clock on the wall, instant by instant.
"""

from bisect import bisect_left
from datetime import UTC, date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors import retention
from processors.retention import Calendar, content_expires_s, deadline, instant
from schemas.policy import Retention, parse_policy
from streams.config import packs_available

DEFAULT = packs_available()["default"]
POLICY = parse_policy(DEFAULT, "default")
INF_4, INF_5 = POLICY.retention_of("traffic"), POLICY.retention_of("anonymous")
DAY_S = 86_400
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ZONES = [
    "UTC",
    "Europe/Berlin",
    "Asia/Kolkata",  # +05:30
    "Asia/Kathmandu",  # +05:45
    "Australia/Lord_Howe",  # half an hour of summer time
    "America/Sao_Paulo",  # summer time began at midnight
    "America/Asuncion",  # at midnight, on 1 October 2017 and 2023
    "Africa/Cairo",  # begins and ends at midnight
    "America/Havana",  # midnight came twice
    "Pacific/Kiritimati",  # +14:00
    "Etc/GMT+12",  # -12:00
]


# --- the oracle ---------------------------------------------------------------------------------------------


def leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def month_days(year, month):
    return (31, 29 if leap(year) else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1]


YEAR_STARTS = [0]
for _year in range(1970, 2460):
    YEAR_STARTS.append(YEAR_STARTS[-1] + (366 if leap(_year) else 365))


def day_number(year, month, day):
    """Days since 1970-01-01."""
    return YEAR_STARTS[year - 1970] + sum(month_days(year, m) for m in range(1, month)) + day - 1


def civil_days(first_year, last_year):
    """Every day, as (year, month, day, days since 1970-01-01)."""
    number = day_number(first_year, 1, 1)
    for year in range(first_year, last_year + 1):
        for month in range(1, 13):
            for day in range(1, month_days(year, month) + 1):
                yield year, month, day, number
                number += 1


def wall(ts, zone):
    return datetime.fromtimestamp(ts, zone).replace(tzinfo=None)


def first_instant_of(year, month, day, zone, step=60):
    """The first Unix second at which a clock of the zone shows that date or a later one, by looking."""
    target = datetime(year, month, day, tzinfo=UTC)
    guess = int((target - EPOCH).total_seconds())
    target = target.replace(tzinfo=None)
    return next(ts for ts in range(guess - 2 * DAY_S, guess + 2 * DAY_S, step) if wall(ts, zone) >= target)


def rule(keep, after, event="communication"):
    return Retention(data_class="traffic", keep=keep, after=after, event=event, clause="INF-4")


def at(ts):
    return EPOCH + timedelta(seconds=ts)


# --- the promises, in UTC -----------------------------------------------------------------------------------


def test_the_examples_of_the_clauses():
    occurred = datetime(2026, 11, 21, 14, 5, 9, tzinfo=UTC)
    assert deadline(INF_4, occurred, UTC) == datetime(2027, 12, 1, tzinfo=UTC)
    assert deadline(INF_5, occurred, UTC) == datetime(2037, 1, 1, tzinfo=UTC)


def test_inf_4_and_inf_5_are_right_on_every_day_of_400_years():
    for year, month, day, _ in civil_days(2000, 2399):
        occurred = date(year, month, day)
        assert INF_4.dead_on(occurred) == date(year + 1 + (month == 12), month % 12 + 1, 1)
        assert INF_5.dead_on(occurred) == date(year + 11, 1, 1)


def test_moments_are_right_over_400_years():
    calendar = Calendar(POLICY)
    for year, month, day, number in civil_days(2000, 2399):
        if number % 37 and (day, month) not in ((1, 1), (29, 2), (28, 2), (1, 3), (31, 12)):
            continue
        moment = calendar.moment(number * DAY_S + (0 if day == 1 else DAY_S - 1))
        assert moment.pii_expires_s == day_number(year + 1 + (month == 12), month % 12 + 1, 1) * DAY_S
        assert moment.anonymous_expires_s == day_number(year + 11, 1, 1) * DAY_S
        assert moment.month_end_s == day_number(year + (month == 12), month % 12 + 1, 1) * DAY_S
        assert (moment.day_epoch, moment.day_ms) == (f"{year}-{month:02}-{day:02}", number * DAY_S * 1000)


def test_both_ends_of_every_month_of_400_years_have_one_deadline():
    for year in range(2000, 2400):
        for month in range(1, 13):
            first = at(day_number(year, month, 1) * DAY_S)
            last = at(day_number(year, month, month_days(year, month)) * DAY_S + DAY_S - 1)
            expected = at(day_number(year + 1 + (month == 12), month % 12 + 1, 1) * DAY_S)
            assert deadline(INF_4, first, UTC) == deadline(INF_4, last, UTC) == expected


def test_the_last_instant_of_a_month_belongs_to_it_and_the_next_does_not():
    before = datetime(2026, 11, 30, 23, 59, 59, 999_999, tzinfo=UTC)
    assert deadline(INF_4, before, UTC) == datetime(2027, 12, 1, tzinfo=UTC)
    assert deadline(INF_4, datetime(2026, 12, 1, tzinfo=UTC), UTC) == datetime(2028, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("keep", "after", "start", "dead"),
    [
        ("20 days", "event", "2026-02-20T10:30:05", "2026-03-12T10:30:05"),
        ("20 days", "event", "2028-02-20T10:30:05", "2028-03-11T10:30:05"),
        ("1 month", "event", "2026-01-31T10:30:05", "2026-02-28T10:30:05"),
        ("1 month", "event", "2028-01-31T10:30:05", "2028-02-29T10:30:05"),
        ("25 months", "event", "2026-01-31T00:00:00", "2028-02-29T00:00:00"),
        ("1 year", "event", "2028-02-29T12:00:00", "2029-02-28T12:00:00"),
        ("4 years", "event", "2096-02-29T12:00:00", "2100-02-28T12:00:00"),
        ("3 years", "event", "2026-07-01T12:00:00", "2029-07-01T12:00:00"),
        ("1 month", "end of day", "2026-01-30T12:00:00", "2026-02-28T00:00:00"),
        ("1 month", "end of day", "2026-01-31T12:00:00", "2026-03-01T00:00:00"),
        ("1 day", "end of day", "2027-12-31T23:59:59", "2028-01-02T00:00:00"),
        ("10 days", "end of month", "2028-02-01T00:00:00", "2028-03-11T00:00:00"),
        ("1 month", "end of year", "2026-12-31T23:59:59", "2027-02-01T00:00:00"),
        ("60 days", "end of year", "2027-06-01T00:00:00", "2028-03-01T00:00:00"),
    ],
)
def test_periods_are_of_the_calendar(keep, after, start, dead):
    occurred = datetime.fromisoformat(start).replace(tzinfo=UTC)
    assert deadline(rule(keep, after), occurred, UTC) == datetime.fromisoformat(dead).replace(tzinfo=UTC)


def test_what_is_kept_until_lifted_has_no_deadline():
    assert deadline(rule("until lifted", "event"), datetime(2026, 1, 1, tzinfo=UTC), UTC) is None


@settings(deadline=None)
@given(st.integers(day_number(2000, 1, 1) * DAY_S, day_number(2399, 12, 31) * DAY_S), st.integers(1, 9999))
def test_days_after_an_event_are_days(ts, count):
    assert deadline(rule(f"{count} days", "event"), at(ts), UTC) == at(ts + count * DAY_S)


# --- time zones ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZONES)
def test_months_end_at_local_midnight_whatever_the_clocks_do(name):
    zone = ZoneInfo(name)
    for year, month in ((2011, 11), (2016, 9), (2022, 9), (2024, 2), (2026, 3), (2026, 12)):
        dead = first_instant_of(year + 1 + (month == 12), month % 12 + 1, 1, zone)
        first = first_instant_of(year, month, 1, zone)
        last = first_instant_of(year + (month == 12), month % 12 + 1, 1, zone) - 1
        assert deadline(INF_4, at(first), zone) == deadline(INF_4, at(last), zone) == at(dead)
        assert deadline(INF_4, at(first - 1), zone) < at(dead) < deadline(INF_4, at(last + 1), zone)


@pytest.mark.parametrize(
    ("name", "before", "dead"),
    [
        ("America/Asuncion", (2022, 9, 30), "2023-10-01T04:00:00"),  # 00:00 does not exist
        ("Asia/Kolkata", (2026, 11, 21), "2027-11-30T18:30:00"),
        ("Europe/Berlin", (2026, 11, 21), "2027-11-30T23:00:00"),
        ("Europe/Berlin", (2026, 6, 1), "2027-06-30T22:00:00"),
    ],
)
def test_inf_4_in_a_time_zone(name, before, dead):
    zone = ZoneInfo(name)
    occurred = datetime(*before, 12, tzinfo=zone)
    assert deadline(INF_4, occurred, zone) == datetime.fromisoformat(dead).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("America/Sao_Paulo", (2016, 10, 16)),  # midnight skipped
        ("Africa/Cairo", (2023, 4, 28)),  # midnight skipped
        ("Africa/Cairo", (2023, 10, 27)),  # the hour before midnight comes twice
        ("America/Havana", (2012, 11, 4)),  # the hour after midnight comes twice
        ("America/St_Johns", (2006, 10, 29)),  # back at 00:01, into the day before
        ("America/Toronto", (1919, 3, 31)),  # 23:30 to 00:30 skipped
        ("Pacific/Apia", (2011, 12, 30)),  # a whole day skipped
        ("Pacific/Apia", (2011, 12, 31)),
        ("Australia/Lord_Howe", (2026, 10, 4)),
    ],
)
def test_a_day_begins_at_the_first_instant_that_shows_it(name, day):
    zone = ZoneInfo(name)
    begins = first_instant_of(*day, zone)
    occurred = datetime(*day, 12, tzinfo=UTC) - timedelta(days=4)
    keep = date(*day).toordinal() - occurred.astimezone(zone).date().toordinal() - 1
    assert deadline(rule(f"{keep} days", "end of day"), occurred, zone) == at(begins)


def test_days_after_an_event_keep_the_local_time_across_a_change_of_clocks():
    zone = ZoneInfo("Europe/Berlin")
    occurred = datetime(2026, 3, 20, 9, 0, tzinfo=zone)
    assert deadline(rule("20 days", "event"), occurred, zone) == datetime(2026, 4, 9, 9, 0, tzinfo=zone)
    skipped = datetime(2026, 3, 28, 2, 30, tzinfo=zone)
    assert deadline(rule("1 day", "event"), skipped, zone) == datetime(2026, 3, 29, 1, 0, tzinfo=UTC)


keeps = st.builds(
    lambda count, unit: f"{count} {unit}", st.integers(1, 120), st.sampled_from(["days", "months", "years"])
)
afters = st.sampled_from(["end of day", "end of month", "end of year", "event"])
seconds = st.integers(day_number(1971, 1, 1) * DAY_S, day_number(2300, 1, 1) * DAY_S)


@settings(deadline=None)
@given(keeps, afters, seconds, st.integers(0, 400 * DAY_S), st.sampled_from(ZONES))
def test_what_happens_later_never_dies_earlier(keep, after, ts, later, name):
    zone = ZoneInfo(name)
    kept = rule(keep, after)
    slack = timedelta(hours=1 if after == "event" else 0)  # an hour that comes twice
    assert deadline(kept, at(ts), zone) <= deadline(kept, at(ts + later), zone) + slack


@settings(deadline=None)
@given(keeps, afters, seconds, st.sampled_from(ZONES))
def test_nothing_dies_before_its_period_nor_long_after(keep, after, ts, name):
    count, unit = keep.split()
    least, most = {"days": (1, 1), "months": (28, 31), "years": (365, 366)}[unit]
    slack = {"event": 0, "end of day": 1, "end of month": 31, "end of year": 366}[after]
    dead = deadline(rule(keep, after), at(ts), ZoneInfo(name))
    lived = (dead - at(ts)) / timedelta(days=1)
    assert int(count) * least - 3.2 <= lived <= int(count) * most + slack + 0.2


# --- the calendar of the hot path ---------------------------------------------------------------------------


def calendar_of(zone="UTC", coarse="hour"):
    text = DEFAULT.replace('timezone = "UTC"', f'timezone = "{zone}"').replace('time = "hour"', f'time = "{coarse}"')
    return Calendar(parse_policy(text, "p"))


def test_a_moment_names_hour_and_day_in_utc_and_the_month_in_the_policys_zone():
    ts = day_number(2026, 11, 30) * DAY_S + 23 * 3600 + 1234
    berlin, utc = calendar_of("Europe/Berlin").moment(ts), calendar_of().moment(ts)
    assert berlin[:3] == ("2026-11-30T23", "2026-11-30", "2026-12")
    assert utc[:3] == ("2026-11-30T23", "2026-11-30", "2026-11")
    assert utc.coarse == "2026-11-30T23:00:00Z"
    assert utc.coarse_ms == (ts - 1234) * 1000
    assert utc.day_ms == day_number(2026, 11, 30) * DAY_S * 1000
    assert utc.month_end_s == day_number(2026, 12, 1) * DAY_S
    assert berlin.month_end_s == day_number(2027, 1, 1) * DAY_S - 3600


def test_a_policy_may_coarsen_to_the_day():
    moment = calendar_of(coarse="day").moment(day_number(2026, 11, 30) * DAY_S + 80_000)
    assert moment.coarse == "2026-11-30T00:00:00Z"
    assert moment.coarse_ms == moment.day_ms
    assert moment.hour_epoch == "2026-11-30T22"


SHARED, COLD = ({name: calendar_of(name) for name in [*ZONES, "Africa/Monrovia"]} for _ in range(2))


@settings(deadline=None)
@given(st.lists(st.integers(-(2**33), 2**34), min_size=1, max_size=20), st.sampled_from(sorted(SHARED)))
def test_what_is_remembered_is_what_is_worked_out(instants, name):
    warm = SHARED[name]
    for ts in instants:
        assert warm.moment(ts) == COLD[name]._make(ts) == warm.moment(ts)


def test_a_month_that_begins_within_a_quarter_of_an_hour_is_exact_to_the_second():
    zone = ZoneInfo("Africa/Monrovia")  # -00:44:30 until 1972
    calendar = calendar_of("Africa/Monrovia")
    begins = first_instant_of(1971, 3, 1, zone, step=1)
    assert begins % 900
    slot = begins // 900 * 900
    months = [calendar.moment(ts).month_epoch for ts in (slot, begins - 1, begins, slot + 899, begins - 1)]
    assert months == ["1971-02", "1971-02", "1971-03", "1971-03", "1971-02"]


def test_memory_is_bounded():
    calendar = calendar_of()
    for slot in range(3 * retention.MAX_MOMENTS // 2):
        calendar.moment(slot * 900)
        assert len(calendar._moments) <= retention.MAX_MOMENTS


@settings(deadline=None)
@given(seconds, st.sampled_from(ZONES))
def test_the_month_of_a_moment_is_what_the_wall_says(ts, name):
    assert SHARED[name].moment(ts).month_epoch == wall(ts, ZoneInfo(name)).strftime("%Y-%m")


@settings(deadline=None)
@given(seconds, st.integers(1, 400), st.sampled_from(ZONES))
def test_a_persons_secret_of_an_account_outlives_everything_sealed_under_it(ts, days, name):
    calendar = SHARED[name]
    dead = calendar.account_secret_deadline_s(ts, days)
    assert dead >= content_expires_s(ts, days)
    review_s, transit_s = content_expires_s(ts, 30), (ts // 3600 + 25) * 3600
    assert dead >= calendar.account_secret_deadline_s(ts, None) >= max(review_s, transit_s)


@settings(deadline=None)
@given(seconds, st.integers(0, 31 * DAY_S), st.sampled_from(ZONES))
def test_a_persons_secret_has_one_deadline_a_month(ts, later, name):
    calendar = SHARED[name]
    first, second = calendar.moment(ts), calendar.moment(ts + later)
    deadlines = {calendar.account_secret_deadline_s(when, 45) for when in (ts, ts + later)}
    assert (len(deadlines) == 1) == (first.month_epoch == second.month_epoch)


def test_content_dies_at_utc_midnight_after_its_days():
    day = day_number(2026, 11, 21)
    for second in (0, DAY_S - 1):
        assert content_expires_s(day * DAY_S + second, 30) == day_number(2026, 12, 22) * DAY_S


@settings(deadline=None)
@given(st.integers(day_number(1970, 1, 1), day_number(2399, 12, 31)), st.integers(0, DAY_S - 1))
def test_an_instant_is_rfc_3339(number, second):
    year = bisect_left(YEAR_STARTS, number + 1) - 1 + 1970
    text = instant(number * DAY_S + second)
    left = number - YEAR_STARTS[year - 1970]
    month = 1
    while left >= month_days(year, month):
        left -= month_days(year, month)
        month += 1
    clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
    assert text == f"{year}-{month:02}-{left + 1:02}T{clock}Z"


@settings(deadline=None)
@given(st.integers(-(10**18), 10**18), st.sampled_from(sorted(SHARED)), st.integers(1, 9999))
def test_an_instant_beyond_the_calendar_is_clamped(ts, name, days):
    calendar = SHARED[name]
    moment = calendar.moment(ts)
    assert len(moment.coarse) == len(instant(ts)) == 20
    assert instant(content_expires_s(ts, days)).endswith("Z")
    assert calendar.account_secret_deadline_s(ts, days) > moment.month_end_s


def test_the_ends_of_time():
    assert instant(-(10**18)) == "0001-01-01T00:00:00Z"
    assert instant(10**18) == "9999-12-31T23:59:59Z"
    for name in ZONES:
        for offset in (-14, 14):
            shift = timezone(timedelta(hours=offset))
            for far in (datetime.min.replace(tzinfo=shift), datetime.max.replace(tzinfo=shift)):
                assert deadline(rule("9999 years", "end of year"), far, ZoneInfo(name)).year == 9999
