"""When data dies: deadlines of retention rules, and what the clock says of one communication, memoised.

Rules of this file: instants are whole Unix seconds or aware datetimes in UTC; a deadline is the first instant
at which the data is dead. Key epochs of hours and days are UTC; months, years and the dates of rules are of
the policy's time zone. Nothing raises for an instant outside the years 1 to 9999: it is clamped.
"""

from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import lru_cache
from typing import NamedTuple

from schemas.policy import Policy, Retention

DAY_S = 86_400
SLOT_S = 900
"""Hours and days of every time zone of today begin at a quarter of an hour."""
MAX_MOMENTS = 4096
PERSON_DAYS = 31
"""Days after the month that an account keeps a person's secret at least: transit takes 1, review 30."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_FIRST_S = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH) // _SECOND
_LAST_S = (datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - _EPOCH) // _SECOND


class Moment(NamedTuple):
    """What the clock says of a communication: names of its key epochs, its coarse time, and its deadlines.

    `coarse` is RFC 3339 at the precision of the policy; `_ms` and `_s` are Unix milliseconds and seconds.
    """

    hour_epoch: str  # 2026-11-21T14, UTC
    day_epoch: str  # 2026-11-21, UTC
    month_epoch: str  # 2026-11, in the policy's time zone
    coarse: str
    coarse_ms: int
    day_ms: int
    month_end_s: int
    pii_expires_s: int
    anonymous_expires_s: int


def deadline(rule: Retention, at: datetime, zone: tzinfo) -> datetime | None:
    """Return the first instant, in UTC, at which data of an event at `at` is dead; None: until lifted.

    INF-4: 2026-11-21 → 2027-12-01T00:00Z; INF-5: 2026 → 2037-01-01T00:00Z (both in UTC). `at` is aware; its
    fraction of a second is dropped. A local midnight that a change of clocks skips is the instant of the
    change; one that comes twice is the first.
    """
    dead_s = _deadline_s(rule, _local((at - _EPOCH) // _SECOND, zone), zone)
    return None if dead_s is None else _EPOCH + timedelta(seconds=dead_s)


def content_expires_s(ts: int, keep_days: int) -> int:
    """Return when content of Unix second `ts` dies: UTC midnight, `keep_days` after its day (INF-2)."""
    return (ts // DAY_S + keep_days + 1) * DAY_S


@lru_cache(maxsize=4096)
def instant(ts: int) -> str:
    """Return Unix second `ts` as RFC 3339 in UTC, `YYYY-MM-DDTHH:MM:SSZ`."""
    return _utc(ts).isoformat()[:19] + "Z"


class Calendar:
    """The calendar of one policy, for the hot path: one moment is worked out for each quarter of an hour."""

    __slots__ = ("_anonymous", "_by_day", "_moments", "_policy", "_traffic", "_zone")

    def __init__(self, policy: Policy) -> None:
        traffic, anonymous = policy.retention_of("traffic"), policy.retention_of("anonymous")
        if traffic is None or anonymous is None:
            raise ValueError("not a policy made by parse_policy: it lacks a retention rule")
        self._policy = policy
        self._traffic = traffic
        self._anonymous = anonymous
        self._zone = policy.zone
        self._by_day = policy.coarsening.time == "day"
        self._moments: dict[int, Moment] = {}

    def moment(self, ts: int) -> Moment:
        """Return the moment of Unix second `ts`; about 0.1 µs when it is known."""
        found = self._moments.get(ts // SLOT_S)
        return self._new(ts) if found is None else found

    def created_deadline_s(self, data_class: str, ts: int) -> int | None:
        """Return from when a record of a class made at Unix second `ts` is dead; None: no rule says when."""
        rule = self._policy.retention_of(data_class)
        return None if rule is None else _deadline_s(rule, _local(ts, self._zone), self._zone)

    def account_secret_deadline_s(self, ts: int, content_days: int | None) -> int:
        """Return from when an account's secret of a person, for the month of Unix second `ts`, is not needed any more.

        By then all content of that month is dead, and whatever is sealed for transit and review; `content_days`
        None: content is never stored.
        """
        return self.moment(ts).month_end_s + (max(content_days or 0, PERSON_DAYS) + 1) * DAY_S

    def _new(self, ts: int) -> Moment:
        slot = ts // SLOT_S
        moment = self._make(slot * SLOT_S)
        if moment != self._make(slot * SLOT_S + SLOT_S - 1):
            return self._make(ts)  # the odd offsets of long ago: a day begins within the slot
        if len(self._moments) >= MAX_MOMENTS:
            self._moments.clear()
        self._moments[slot] = moment
        return moment

    def _make(self, ts: int) -> Moment:
        at, local = _utc(ts), _local(ts, self._zone)
        text = at.isoformat()
        coarse_at = at.replace(hour=0 if self._by_day else at.hour, minute=0, second=0)
        month_end_s = _first_s(datetime.combine(_next_month(local.date()), time()), self._zone)
        return Moment(
            hour_epoch=text[:13],
            day_epoch=text[:10],
            month_epoch=local.isoformat()[:7],
            coarse=coarse_at.isoformat()[:19] + "Z",
            coarse_ms=_seconds(coarse_at) * 1000,
            day_ms=_seconds(at) // DAY_S * DAY_S * 1000,
            month_end_s=month_end_s,
            pii_expires_s=_ending(self._traffic, local, self._zone),
            anonymous_expires_s=_ending(self._anonymous, local, self._zone),
        )


def _utc(ts: int) -> datetime:
    return _EPOCH + timedelta(seconds=min(max(ts, _FIRST_S), _LAST_S))


def _seconds(at: datetime) -> int:
    return (at - _EPOCH) // _SECOND


def _local(ts: int, zone: tzinfo) -> datetime:
    """Return the local time of an instant, naive; a day off either end of time, to hold every offset."""
    return _utc(min(max(ts, _FIRST_S + DAY_S), _LAST_S - DAY_S)).astimezone(zone).replace(tzinfo=None)


def _first_s(wall: datetime, zone: tzinfo) -> int:
    """Return the first Unix second at which clocks of the zone show `wall` or, where they skip it, later."""
    wall = min(max(wall, datetime(1, 1, 3)), datetime(9999, 12, 29))  # noqa: DTZ001 — local times are naive here
    early, late = (_seconds(wall.replace(tzinfo=zone, fold=fold)) for fold in (1, 0))
    while early < late:  # only where clocks skip it: fold 1 lies before the change, fold 0 at or after it
        middle = (early + late) // 2
        if _local(middle, zone) >= wall:
            late = middle
        else:
            early = middle + 1
    return late


def _next_month(day: date) -> date:
    first = day.replace(day=1)
    if first.month < 12:
        return first.replace(month=first.month + 1)
    return date.max if first.year == date.max.year else date(first.year + 1, 1, 1)


def _deadline_s(rule: Retention, local: datetime, zone: tzinfo) -> int | None:
    dead_on = rule.dead_on(local.date())
    if dead_on is None:
        return None
    return _first_s(datetime.combine(dead_on, local.time() if rule.after == "event" else time()), zone)


def _ending(rule: Retention, local: datetime, zone: tzinfo) -> int:
    """Return the deadline of a rule that has one."""
    dead_s = _deadline_s(rule, local, zone)
    return _LAST_S if dead_s is None else dead_s
