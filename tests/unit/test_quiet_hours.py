from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import phonenumbers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phonenumbers.timezone import time_zones_for_number

from processors.screen import quiet_hours
from processors.screen.quiet_hours import QuietHours, zones_for
from schemas.errors import PolicyInvalid

NEW_YORK, LOS_ANGELES, TOLL_FREE, INDIA, NEPAL = (
    "+12125550100",
    "+14155550100",
    "+18005550100",
    "+919876543210",
    "+9779812345678",
)
NIGHT = (time(21), time(8))


def at(text, zone="UTC"):
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp())


def wall_is_quiet(zone, at_s, start, end):
    """The rule itself, on the clock on the wall."""
    local = datetime.fromtimestamp(at_s, ZoneInfo(zone)).time()
    return start <= local < end if start < end else local >= start or local < end


# --- where a number may be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "zones"),
    [
        (NEW_YORK, ("America/New_York",)),
        (LOS_ANGELES, ("America/Los_Angeles",)),
        ("+18085550100", ("Pacific/Honolulu",)),
        (INDIA, ("Asia/Calcutta",)),
        (NEPAL, ("Asia/Katmandu",)),
        ("+5511912345678", ("America/Sao_Paulo",)),
        ("+80012345678", ()),  # an international toll-free number is nowhere
        ("+88216123456", ()),
        ("+99912345678", ()),
        ("+", ()),
        ("", ()),
    ],
)
def test_zones_come_from_the_longest_known_prefix(number, zones):
    assert zones_for(number) == zones


def test_an_area_code_across_zones_gives_all_of_them():
    # Given an exchange of Idaho that the data do not place more exactly
    assert set(zones_for("+12080000000")) == {"America/Boise", "America/Denver", "America/Los_Angeles"}


def test_a_toll_free_number_may_be_anywhere_in_the_plan():
    assert {"America/New_York", "Pacific/Honolulu", "Pacific/Guam"} <= set(zones_for(TOLL_FREE))


def test_a_mobile_abroad_may_be_anywhere_in_its_country():
    assert {"Australia/Perth", "Australia/Sydney"} <= set(zones_for("+61412345678"))
    assert {"Europe/Moscow", "Asia/Kamchatka"} <= set(zones_for("+79123456789"))


def test_no_zone_that_the_library_would_name_is_left_out():
    checked = 0
    for region in phonenumbers.SUPPORTED_REGIONS:
        for kind in (phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.MOBILE):
            example = phonenumbers.example_number_for_type(region, kind)
            if example is None or example.country_code == 1:  # +1 mobiles of one island: the area code says which
                continue
            number = phonenumbers.format_number(example, phonenumbers.PhoneNumberFormat.E164)
            assert set(time_zones_for_number(example)) <= set(zones_for(number)) | {"Etc/Unknown"}, region
            checked += 1
    assert checked > 300


# --- when it is quiet --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "quiet"),
    [
        ("2026-11-21T20:59:59", False),
        ("2026-11-21T21:00:00", True),
        ("2026-11-21T23:59:59", True),
        ("2026-11-22T00:00:00", True),
        ("2026-11-22T07:59:59", True),
        ("2026-11-22T08:00:00", False),
    ],
)
def test_a_range_across_midnight_starts_and_ends_to_the_second(local, quiet):
    now = at(local, "America/New_York")
    assert QuietHours(*NIGHT, now).state(zones_for(NEW_YORK))[0] is quiet


def test_a_range_within_one_day_is_understood():
    noon = (time(12), time(14))
    assert QuietHours(*noon, at("2026-11-21T13:00", "America/New_York")).state(zones_for(NEW_YORK))[0]
    assert not QuietHours(*noon, at("2026-11-21T14:00", "America/New_York")).state(zones_for(NEW_YORK))[0]


def test_the_next_start_and_the_end_are_local_instants():
    now = at("2026-11-21T15:00", "America/New_York")
    assert QuietHours(*NIGHT, now).state(zones_for(NEW_YORK)) == (False, at("2026-11-21T21:00", "America/New_York"))
    assert QuietHours(*NIGHT, now).ends_s(zones_for(NEW_YORK)) == now
    now = at("2026-11-21T22:00", "America/New_York")
    assert QuietHours(*NIGHT, now).state(zones_for(NEW_YORK)) == (True, now)
    assert QuietHours(*NIGHT, now).ends_s(zones_for(NEW_YORK)) == at("2026-11-22T08:00", "America/New_York")


@pytest.mark.parametrize(
    ("number", "utc"),
    [(INDIA, "2026-11-21T15:30"), (NEPAL, "2026-11-21T15:15")],  # 21:00 at +05:30 and at +05:45
)
def test_zones_of_half_and_quarter_hours_are_exact(number, utc):
    now = at(utc)
    assert QuietHours(*NIGHT, now - 1).state(zones_for(number)) == (False, now)
    assert QuietHours(*NIGHT, now).state(zones_for(number))[0]


def test_a_number_of_many_zones_is_quiet_if_any_of_them_is():
    # Given noon in New York, when it is 02:00 the next day in Guam
    quiet = QuietHours(*NIGHT, at("2026-11-21T12:00", "America/New_York"))
    assert quiet.state(zones_for(TOLL_FREE))[0]
    assert not quiet.state(zones_for(NEW_YORK))[0]
    # Then it may be reached again when it is day in Guam, and still in Newfoundland
    end = quiet.ends_s(zones_for(TOLL_FREE))
    assert end == at("2026-11-22T08:00", "Pacific/Guam")
    assert QuietHours(*NIGHT, end).state(zones_for(TOLL_FREE)) == (
        False,
        at("2026-11-22T21:00", "America/St_Johns") - 86_400,
    )


def test_the_earliest_start_of_several_zones_counts():
    now = at("2026-11-21T23:30")
    starts = QuietHours(*NIGHT, now).state(zones_for(TOLL_FREE))[1]
    assert starts == min(
        at(f"{day}T21:00", zone)
        for day in ("2026-11-21", "2026-11-22")
        for zone in zones_for(TOLL_FREE)
        if at(f"{day}T21:00", zone) >= now
    )


@pytest.mark.parametrize("number", ["+80012345678", "+99912345678", "", "x"])
def test_a_number_that_may_be_anywhere_is_always_quiet(number):
    for hour in range(24):
        now = at("2026-11-21T00:00") + hour * 3600
        quiet = QuietHours(*NIGHT, now)
        assert quiet.state(zones_for(number)) == (True, now)
        assert quiet.ends_s(zones_for(number)) is None


def test_zones_never_all_awake_at_once_have_no_end():
    quiet = QuietHours(time(9), time(8), at("2026-11-21T12:00"))
    assert quiet.ends_s(zones_for(TOLL_FREE)) is None
    assert quiet.ends_s(zones_for(NEW_YORK)) == at("2026-11-21T08:00", "America/New_York")


@pytest.mark.parametrize("name", ["Nowhere/Atlantis", "America", "", "../UTC", "/etc/passwd", "x\x00y", "Etc/Unknown"])
def test_a_zone_that_this_computer_does_not_know_is_quiet(name):
    now = at("2026-11-21T17:00")
    assert not QuietHours(*NIGHT, now).state(("America/New_York",))[0]
    assert QuietHours(*NIGHT, now).state(("America/New_York", name)) == (True, now)
    assert QuietHours(*NIGHT, now).ends_s(("America/New_York", name)) is None


def test_the_same_time_for_start_and_end_is_refused():
    with pytest.raises(PolicyInvalid):
        QuietHours(time(8), time(8), 0)


def test_zones_are_worked_out_once_a_set(monkeypatch):
    quiet = QuietHours(*NIGHT, at("2026-11-21T17:00"))
    first = quiet.state(zones_for(NEW_YORK))
    monkeypatch.setattr(quiet_hours, "_load", None)
    assert quiet.state(zones_for("+12125550199")) == first


# --- when the clocks change --------------------------------------------------------------------------------


def test_spring_forward_moves_the_start_with_the_wall_clock():
    # Given the evening before 8 March 2026, when 02:00 becomes 03:00 in New York
    assert QuietHours(time(4), time(5), at("2026-03-07T23:00", "America/New_York")).state(zones_for(NEW_YORK))[1] == at(
        "2026-03-08T08:00"  # 04:00 summer time
    )
    # Then a start inside the missing hour is the instant of the change
    assert QuietHours(time(2, 30), time(5), at("2026-03-07T23:00", "America/New_York")).state(zones_for(NEW_YORK)) == (
        False,
        at("2026-03-08T07:00"),
    )


def test_an_hour_that_does_not_exist_is_never_quiet():
    starts = QuietHours(time(2), time(3), at("2026-03-07T23:00", "America/New_York")).state(zones_for(NEW_YORK))[1]
    assert starts == at("2026-03-09T06:00")  # 02:00 the day after


def test_fall_back_makes_a_range_in_the_doubled_hour_quiet_twice():
    # Given 1 November 2026, when 02:00 becomes 01:00 in New York, and quiet hours from 01:00 to 01:30
    first = at("2026-11-01T05:00")
    between = at("2026-11-01T05:45")
    quiet = (time(1), time(1, 30))
    assert QuietHours(*quiet, first - 60).state(zones_for(NEW_YORK)) == (False, first)
    assert QuietHours(*quiet, between).state(zones_for(NEW_YORK)) == (False, at("2026-11-01T06:00"))
    assert QuietHours(*quiet, at("2026-11-01T06:10")).state(zones_for(NEW_YORK))[0]


def test_fall_back_reopens_a_range_that_had_ended():
    # Quiet until 01:30; at 02:00 it is 01:00 again
    assert QuietHours(time(21), time(1, 30), at("2026-11-01T05:45")).state(zones_for(NEW_YORK)) == (
        False,
        at("2026-11-01T06:00"),
    )


LONDON, LORD_HOWE_COUNTRY = "+442079460000", "+61412345678"
CHANGES = [
    at("2026-03-08T07:00"),
    at("2026-11-01T06:00"),
    at("2026-03-29T01:00"),
    at("2026-10-25T01:00"),
    at("2026-10-03T15:30"),
]


@settings(deadline=None, max_examples=60)
@given(
    number=st.sampled_from([NEW_YORK, LONDON, INDIA, NEPAL, LORD_HOWE_COUNTRY, "+12080000000"]),
    now=st.sampled_from(CHANGES).flatmap(lambda s: st.integers(-1440, 1440).map(lambda m: s + 60 * m)),
    start=st.integers(0, 95),
    length=st.integers(1, 95),
)
def test_state_and_end_agree_with_a_walk_by_minutes(number, now, start, length):
    # Given any range in quarter hours, around the days when clocks change
    begin, end = (
        (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=15 * q)).time() for q in (start, start + length)
    )

    def quiet_at(at_s):
        return any(wall_is_quiet(zone, at_s, begin, end) for zone in zones_for(number))

    quiet = QuietHours(begin, end, now)
    # Then every quarter of an hour tells the same as the wall clock
    is_quiet, starts = quiet.state(zones_for(number))
    assert is_quiet is quiet_at(now)
    grid = range(now - now % 900 + 900, now + 50 * 3600, 900)
    assert starts == (now if is_quiet else next(s for s in grid if quiet_at(s)))
    expected_end = now if not is_quiet else next((s for s in grid if not quiet_at(s)), None)
    if expected_end is not None and expected_end < now + 47 * 3600:
        assert quiet.ends_s(zones_for(number)) == expected_end
