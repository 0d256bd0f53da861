"""Quiet hours at the recipient's location (REG-3), by the time zones that a number's first digits allow.

Where the account says where a person is, that one zone takes their place (`Screen`).

Where a country's numbers, mobiles included, belong to areas, a number may be in any zone of its area;
elsewhere in any zone of its country; where nothing is known, it is always quiet. Quiet is what the clock on
the wall says: `start` ≤ local time < `end`, which may lie across midnight. Zone rules are Python's IANA data.
"""

from datetime import datetime, time, tzinfo
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from phonenumbers.tzdata import TIMEZONE_DATA

from schemas.errors import PolicyInvalid

NORTH_AMERICA: Final = "1"
AREA_COUNTRIES: Final = frozenset({NORTH_AMERICA, "52", "54", "55", "62", "86"})
"""Calling codes whose mobile numbers carry area codes; elsewhere a mobile number does not say where it is."""

_AREA_ENDS: Final = {
    code: sorted({len(p) + 1 for p in TIMEZONE_DATA if p.startswith(code) and p != code}, reverse=True)
    for code in AREA_COUNTRIES
}
"""Calling code to the places at which an area's prefix may end in an E.164 number, the longest first."""

DAY_S: Final = 86_400
COMMON_END_S: Final = 2 * DAY_S
"""How far ahead an instant that is quiet in no zone is looked for."""


def zones_for(number: str) -> tuple[str, ...]:
    """Return the IANA zones in which an E.164 number may be; empty if nothing is known. Under 1 µs."""
    for code_end in (2, 3, 4):
        code = number[1:code_end]
        zones = TIMEZONE_DATA.get(code)
        if zones is not None:
            break
    else:
        return ()
    for end in _AREA_ENDS.get(code, ()):
        area = TIMEZONE_DATA.get(number[1:end])
        if area is not None:
            return area
    return (code == NORTH_AMERICA and _area_zones(number[1:5])) or zones


@lru_cache(maxsize=1024)
def _area_zones(area: str) -> tuple[str, ...]:
    """Return the zones of an area code whose exchanges are listed one by one, for an exchange that is not."""
    return tuple(
        sorted({zone for prefix in TIMEZONE_DATA if prefix.startswith(area) for zone in TIMEZONE_DATA[prefix]})
    )


class QuietHours:
    """Quiet hours from `start` to `end` local time, seen at `now_s` (Unix s). Zones are asked once."""

    __slots__ = ("_end", "_length", "_now_s", "_start", "_states")

    def __init__(self, start: time, end: time, now_s: int) -> None:
        """Take local times to the second. Raises PolicyInvalid if they are the same."""
        self._start, self._end = _second_of_day(start), _second_of_day(end)
        self._length = (self._end - self._start) % DAY_S
        if not self._length:
            raise PolicyInvalid("quiet hours must not start and end at one time")
        self._now_s = now_s
        self._states: dict[tuple[str, ...], tuple[bool, int]] = {}

    def state(self, zones: tuple[str, ...]) -> tuple[bool, int]:
        """Return whether it is quiet now in any of the zones, and the first quiet instant from now on.

        In Unix seconds; now itself when it is quiet. Without a zone, or with one that is not known, it always is.
        """
        state = self._states.get(zones)
        if state is None:
            known = _load(zones)
            start_s = min((self._first(zone, self._now_s, quiet=True) for zone in known), default=self._now_s)
            state = self._states[zones] = (start_s == self._now_s, start_s)
        return state

    def ends_s(self, names: tuple[str, ...]) -> int | None:
        """Return the first instant from now on (Unix s) that is quiet in none of the zones.

        None if there is none within two days, or no zone is known. Not memoised: µs a zone.
        """
        zones = _load(names)
        at_s = self._now_s
        while zones and at_s <= self._now_s + COMMON_END_S:
            later_s = max(self._first(zone, at_s, quiet=False) for zone in zones)
            if later_s == at_s:
                return at_s
            at_s = later_s
        return None

    def _first(self, zone: tzinfo, at_s: int, *, quiet: bool) -> int:
        """Return the first instant from `at_s` on at which it is quiet in a zone, or is not."""
        offset = _offset_s(zone, at_s)
        local = (at_s + offset) % DAY_S
        if ((local - self._start) % DAY_S < self._length) is quiet:
            return at_s
        then_s = at_s + ((self._start if quiet else self._end) - local) % DAY_S
        if _offset_s(zone, then_s) == offset:
            return then_s
        return self._first(zone, _clock_change_s(zone, at_s, then_s), quiet=quiet)  # the clocks change before


def _second_of_day(local: time) -> int:
    return local.hour * 3600 + local.minute * 60 + local.second


def _offset_s(zone: tzinfo, at_s: int) -> int:
    offset = datetime.fromtimestamp(at_s, zone).utcoffset()
    return 0 if offset is None else offset.days * DAY_S + offset.seconds


def _clock_change_s(zone: tzinfo, before_s: int, after_s: int) -> int:
    """Return the first instant of the offset at `after_s`, which differs from that at `before_s`."""
    old = _offset_s(zone, before_s)
    while after_s - before_s > 1:
        middle_s = (before_s + after_s) // 2
        if _offset_s(zone, middle_s) == old:
            before_s = middle_s
        else:
            after_s = middle_s
    return after_s


@lru_cache(maxsize=1024)
def _load(names: tuple[str, ...]) -> tuple[ZoneInfo, ...]:
    """Return the zones named, or none at all if this computer does not know one of them."""
    try:
        return tuple(map(ZoneInfo, names))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return ()
