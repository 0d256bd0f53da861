"""What is undecided in `review`: near-miss opt-outs, each with a clock, by their clear envelopes only.

Rules of this file:
- An opt-out is honoured within 10 business days (47 CFR 64.1200(a)(10)): Monday to Friday. Public holidays count as
  business days, so the date is the statute's or an earlier one, in whatever country.
- The clock begins with the UTC day of the message. It runs out before the near miss itself is destroyed.
- Nothing is opened here. What cannot be read counts as overdue, for it may be somebody's opt-out.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Final, Literal, NamedTuple

import msgspec

from processors.retention import DAY_S
from schemas.errors import LogUnusable
from streams.log.protocol import Log, Stored
from streams.watch.watch import Reviews

STREAM: Final = "review"
BUSINESS_DAYS: Final = 10
SOON_S: Final = 2 * DAY_S
"""What is due within so long is told apart from what has time."""
_PAGE: Final = 5000
_WEEK: Final = 5

Decision = Literal["opted_out", "dismissed"]


class Place(NamedTuple):
    """Where a record lies in `review`."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}/{self.offset}"


class Clock(NamedTuple):
    """What all near misses of an account and day have in common. `due_s`, `expires_s`: Unix s.

    From `due_s` on they are overdue, from `expires_s` on they do not open any more.
    """

    account: str
    day: str  # UTC, of the message
    due_s: int
    expires_s: int


class Near(NamedTuple):
    """A near miss: where it lies, its clock, and what was decided; None: nothing yet."""

    place: Place
    clock: Clock
    decision: Decision | None = None


class _Privacy(msgspec.Struct, frozen=True, gc=False):
    expires_at: str


class _Place(msgspec.Struct, frozen=True, gc=False):
    partition: int
    offset: int


class _Envelope(msgspec.Struct, frozen=True, gc=False):
    privacy: _Privacy
    account_id: str = ""
    day: str = ""
    resolves: _Place | None = None
    action: str = ""


_decode = msgspec.json.Decoder(_Envelope).decode


class OpenReviews:
    """Reads the stream from its beginning and then its tail, and keeps what nobody has decided: 0.1 kB each."""

    def __init__(self, log: Log, *, keep_decided: bool = False) -> None:
        """Take the log. `keep_decided`: know also what was decided, for as long as it lies there."""
        self._log = log
        self._next: list[int] = []
        self._open: list[dict[int, Clock]] = []  # by partition: offset → clock
        self._counts: Counter[Clock] = Counter()  # of the same
        self._unreadable: set[Place] = set()
        self._died: Counter[int] = Counter()  # by when
        self._decided: list[Near] | None = [] if keep_decided else None

    async def catch_up(self) -> None:
        """Read what is committed. Blocks. Raises what the log raises."""
        begins = await self._log.begin_offsets(STREAM)
        ends = await self._log.stable_offsets(STREAM)
        if not self._next:
            self._next = [0] * len(begins)
            self._open = [{} for _ in begins]
        for partition, begin in enumerate(begins):
            at, end = max(begin, self._next[partition]), ends[partition]
            while at < end:
                page = await self._log.read(STREAM, partition, at, _PAGE)
                for stored in page:
                    self._fold(stored)
                at = page[-1].offset + 1 if page else end  # the rest is no message
                self._next[partition] = at
                await asyncio.sleep(0)  # whoever works beside this has a turn
            self._next[partition] = at
            self._unreadable = {one for one in self._unreadable if one.partition != partition or one.offset >= begin}

    def _fold(self, stored: Stored) -> None:
        try:
            found = _decode(stored.value)
            resolved = found.resolves
            if resolved is None:
                made = clock(found.account_id, found.day, found.privacy.expires_at)
                self._open[stored.partition][stored.offset] = made
                self._counts[made] += 1
                return
            decided = self._open[resolved.partition].pop(resolved.offset, None)
        except (msgspec.MsgspecError, ValueError, IndexError):
            self._unreadable.add(Place(stored.partition, stored.offset))
            return
        if decided is None:
            return
        self._counts[decided] -= 1
        if self._decided is not None:
            place = Place(resolved.partition, resolved.offset)
            decision: Decision = "opted_out" if found.action == "opted_out" else "dismissed"
            self._decided.append(Near(place, decided, decision))

    def readable(self) -> None:
        """Return if all could be read. Raises LogUnusable, which names the first that could not."""
        if self._unreadable:
            raise LogUnusable(
                "a record of the review stream cannot be read; restore the log from a backup",
                stream=STREAM, **min(self._unreadable)._asdict(),
            )  # fmt: skip

    def __iter__(self) -> Iterator[Near]:
        """Yield what is undecided, and what was decided if that is kept, in no order."""
        yield from self._decided or ()
        for partition, here in enumerate(self._open):
            for offset, found in here.items():
                yield Near(Place(partition, offset), found)

    def get(self, place: Place) -> Near | None:
        """Return the undecided near miss that lies there."""
        found = self._open[place.partition].get(place.offset) if 0 <= place.partition < len(self._open) else None
        return None if found is None else Near(place, found)

    def forget_dead(self, now_s: float) -> None:
        """Forget what is destroyed by now; it is counted as died."""
        dead = {found: count for found, count in self._counts.items() if found.expires_s <= now_s}
        for found, count in dead.items():
            self._died[found.expires_s] += count
            del self._counts[found]
        if dead:
            self._open = [{at: found for at, found in here.items() if found not in dead} for here in self._open]

    def died(self, now_s: float) -> int:
        """Return how many that were forgotten had died undecided in the 24 hours before."""
        self._died = Counter({at_s: count for at_s, count in self._died.items() if at_s > now_s - DAY_S})
        return self._died.total()

    def clocks(self, now_s: float) -> Reviews:
        """Return how many are undecided, and how many of these are overdue or due soon."""
        late = sum(count for found, count in self._counts.items() if found.due_s <= now_s)
        soon = sum(count for found, count in self._counts.items() if now_s < found.due_s <= now_s + SOON_S)
        return Reviews(self._counts.total(), soon, late + len(self._unreadable))


@lru_cache(maxsize=4096)
def clock(account: str, day: str, expires_at: str) -> Clock:
    """Return the clock of an account's near misses of a UTC day. Raises ValueError if day or instant is none.

    Due at the end of the 10th business day after the day; a day before they die if that is sooner.
    """
    expires_s = int(datetime.fromisoformat(expires_at).timestamp())
    after = business_days_after(date.fromisoformat(day), BUSINESS_DAYS) + timedelta(days=1)
    due_s = int(datetime(after.year, after.month, after.day, tzinfo=UTC).timestamp())
    return Clock(account, day, min(due_s, expires_s - DAY_S), expires_s)


def business_days_after(day: date, count: int) -> date:
    """Return the `count`-th business day, Monday to Friday, after a day."""
    while count:
        day += timedelta(days=1)
        count -= day.weekday() < _WEEK
    return day
