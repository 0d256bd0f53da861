"""Reads a whole stream in bounded memory and picks out records by what stands clear in them.

Rules of this file: what picks a record looks at its bytes only, for a scan reads millions that nobody wants. It may
take a record too many, so whoever uses it looks again with `take_apart`; it never misses one, for a sealed value has
one way to be written (schemas/sealed.py).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence

import orjson

from processors.retention import DAY_S
from schemas.errors import LogBusy
from streams.log.protocol import Log, Stored

PAGE = 5000
"""Records read at once: a few MB."""
UNDECIDED_S = 30.0
"""So long a scan waits for whoever has written and not committed yet: longer than brokers let them."""
_LOOK_S = 0.05
_SID_KEY = b'"sid":"'
_SID_CHARS = 32

Wanted = Callable[[Stored], bool]


async def scan(
    log: Log,
    stream: str,
    wanted: Wanted,
    *,
    begins: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    page_records: int = PAGE,
    advance: Callable[[int], None] = lambda _: None,
) -> AsyncIterator[list[Stored]]:
    """Yield the wanted records, a page or less at a time, partition by partition, each in log order.

    From `begins` (default: the first there are) to `ends` (default: those seen at the start, once they are
    `decided`), one per partition. `advance` is told of records read, and in the end of all between begin and end.
    Blocks. Raises LogBusy and LogUnusable: a scan that could not see everything never ends as if it had.
    """
    first = await log.begin_offsets(stream)
    if begins is not None:
        first = [max(pair) for pair in zip(first, begins, strict=True)]
    last = await decided(log, stream) if ends is None else ends
    for partition, (begin, end) in enumerate(zip(first, last, strict=True)):
        at = begin
        while at < end:
            page = await log.read(stream, partition, at, min(page_records, end - at), end)
            following = page[-1].offset + 1 if page else end  # the rest is no message
            while page and page[-1].offset >= end:
                page.pop()
            found = [stored for stored in page if wanted(stored)]
            if found:
                yield found
            advance(min(following, end) - at)
            at = following


async def decided(log: Log, stream: str) -> list[int]:
    """Return the ends of a stream once all before them is committed or never will be. Blocks. Raises LogBusy."""
    ends = await log.end_offsets(stream)
    deadline_s = time.monotonic() + UNDECIDED_S
    while any(offset < end for offset, end in zip(await log.stable_offsets(stream), ends, strict=True)):
        if time.monotonic() > deadline_s:
            raise LogBusy("something was written and stays uncommitted", stream=stream)
        await asyncio.sleep(_LOOK_S)
    return ends


def everything(_: Stored) -> bool:
    """Want every record."""
    return True


def naming(sids: Collection[str]) -> Wanted:
    """Return what wants the records with a part under one of these sids; about 0.5 µs a record."""
    known = frozenset(sid.encode() for sid in sids)

    def wanted(stored: Stored) -> bool:
        value = stored.value
        at = value.rfind(_SID_KEY)  # the last part's is near the end
        while at >= 0:
            start = at + len(_SID_KEY)
            if value[start : start + _SID_CHARS] in known:
                return True
            at = value.rfind(_SID_KEY, 0, at)
        return False

    return wanted


def of_account(account: str, from_s: int | None = None, to_s: int | None = None) -> Wanted:
    """Return what wants an account's records of communications from `from_s` to before `to_s` (Unix s; None: no bound).

    By the log's timestamp, which is the UTC day of a communication: the day on which a bound falls is taken whole.
    """
    named = b'"account_id":' + orjson.dumps(account)
    from_ms = None if from_s is None else from_s // DAY_S * DAY_S * 1000
    to_ms = None if to_s is None else to_s * 1000

    def wanted(stored: Stored) -> bool:
        at_ms = stored.timestamp_ms
        if (from_ms is not None and at_ms < from_ms) or (to_ms is not None and at_ms >= to_ms):
            return False
        return named in stored.value

    return wanted
