"""The entries of one stream as this process knows them: a snapshot of the machine, and the stream's tail over it.

Rules of this file:
- Complete or not at all: who asks for a view has read the stream to the high watermark seen at the call, or gets an
  error. While a first snapshot is made nothing is cleared.
- A snapshot is taken over between two batches, when all in it has been read: nobody's entries change by that.
- Memory is bounded: whoever has changed since the snapshot is in it, 100,000 people or so; past `MOST` nothing is read
  before there is a newer one.
- Each token key has its own snapshot. The records of a newer key are passed over until it is followed; where they are
  many, its snapshot is made meanwhile.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime
from functools import cache, lru_cache
from typing import Final, NamedTuple

import msgspec

from processors.screen.entries import Snapshot
from processors.screen.suppression import Fold, Rule, Suppressions, fold, latest, parse_key
from schemas.errors import Gathering, LogBusy, LogFull, LogUnusable
from streams.files import Stamp
from streams.log.protocol import Log, Stored
from streams.state.snapshots import LOOK_S, Snapshots, fits

PAGE: Final = 5000
UNDECIDED_S: Final = 0.5
"""So long a catch-up waits for whoever has written entries and not committed them yet."""
MANY: Final = 100_000
"""A newer snapshot is made once so many people have changed since the last."""
MOST: Final = 400_000
"""No more people than these are held over a snapshot, and no more records read for want of one."""
_LOOK_S: Final = 0.005
_WAIT_S: Final = 0.1


class Kept(NamedTuple):
    """A stream of entries, the field of its clear envelope that a state holds, and how a record changes a state."""

    stream: str
    instant: str  # RFC 3339
    fold: Fold
    ends: bool = False  # whether an entry says nothing any more once its instant has come


SUPPRESSIONS: Final = Kept("suppressions", "event_at", fold)
EXEMPTIONS: Final = Kept("exemptions", "expires_at", latest, ends=True)
KEPT: Final = {kept.stream: kept for kept in (SUPPRESSIONS, EXEMPTIONS)}


class EntryTail:
    """Keeps `view` up to the stream's high watermark; log order within a partition decides."""

    def __init__(
        self,
        log: Log,
        kept: Kept,
        version: int,
        snapshots: Snapshots | None = None,
        *,
        told: Callable[[str], None] | None = None,
    ) -> None:
        """Take the token key version whose entries `view` is to show; nothing is read yet.

        Without `snapshots` all of the stream is read into memory. With `told` a call waits for a snapshot that is being
        made, and says so once; without, it raises.
        """
        self._log = log
        self._kept = kept
        self._snapshots = snapshots
        self._told = told
        self._begin(version)

    def _begin(self, version: int) -> None:
        self._version = version
        self._next: list[int] | None = None  # None: nothing is read yet
        self._newer: Counter[int] = Counter()  # records seen of newer token keys
        self._known: Snapshot | None = None  # the newest that is fit
        self._stamp: Stamp | None = None  # of the file that was looked at last
        self._opening: tuple[Stamp | None, Future[Snapshot | None]] | None = None
        self._look_s = 0.0
        self._has_told = False
        self.view = Suppressions(self._kept.fold)
        self.snapshot_s: float | None = None
        """When the snapshot that `view` looks people up in was written (Unix s); None: it has none."""

    @property
    def stream(self) -> str:
        """The stream that is read."""
        return self._kept.stream

    def follow(self, version: int) -> None:
        """Show the entries of another token key from the next `catch_up` on; those of older ones go."""
        if version != self._version:
            self._begin(version)

    async def catch_up(self, within_s: float = math.inf) -> int:
        """Fold in everything up to the high watermark seen at the call; return the number of records. Blocks on I/O.

        What is written and not committed counts: it may be an opt-out. Raises LogBusy if it stays undecided, or the
        stream cannot be seen: whoever clears must not go on then; and Gathering, a LogBusy too, while a snapshot is
        made without which there would be too much to read. After `within_s` of reading it raises LogBusy too, and goes
        on at the next call. A record that is no entry raises LogUnusable, for the view would be incomplete without it.
        """
        while True:
            try:
                return await self._catch_up(within_s)
            except Gathering as error:
                if self._told is None:
                    raise
                if not self._has_told:
                    self._has_told = True
                    self._told(str(error))
            await asyncio.sleep(_WAIT_S)

    async def _catch_up(self, within_s: float) -> int:
        snapshots = self._snapshots
        if self._next is None:
            self._next = await self._first()
        elif snapshots is not None and time.monotonic() >= self._look_s:
            self._look_s = time.monotonic() + LOOK_S
            await self._renew(snapshots, self._next)
        ends = await self._log.end_offsets(self.stream)
        if ends == self._next:
            return 0
        if any(end < at for end, at in zip(ends, self._next, strict=True)):
            self._begin(self._version)
            raise LogBusy("the stream has lost its end since it was read; it is read anew", stream=self.stream)
        await self._decided(ends)
        count, deadline_s = 0, time.monotonic() + within_s
        for partition, end in enumerate(ends):
            while self._next[partition] < end:
                page = await self._log.read(self.stream, partition, self._next[partition], PAGE, end)
                for stored in page:
                    self._apply(stored)
                self._next[partition] = page[-1].offset + 1 if page else end  # the rest is no message
                count += len(page)
                if snapshots is not None and len(self.view) > MOST:
                    self._begin(self._version)
                    return count + await self._catch_up(within_s)  # Gathering, if there is none newer
                if time.monotonic() > deadline_s and any(at < end for at, end in zip(self._next, ends, strict=True)):
                    raise LogBusy("the stream is being read; nothing is cleared before that", stream=self.stream)
        if snapshots is not None and len(self.view) > MANY:
            with suppress(LogFull):
                snapshots.gather(self.stream, self._version)
        return count

    async def _decided(self, ends: list[int]) -> None:
        """Wait until all before `ends` is committed or aborted. Raises LogBusy."""
        deadline_s = time.monotonic() + UNDECIDED_S
        while True:
            stable = await self._log.stable_offsets(self.stream)
            if all(offset >= end for offset, end in zip(stable, ends, strict=True)):
                return
            if time.monotonic() > deadline_s:
                raise LogBusy(
                    "opt-outs were written and not committed; nothing is cleared before they are", stream=self.stream
                )
            await asyncio.sleep(_LOOK_S)

    def _apply(self, stored: Stored) -> None:
        try:
            version, token, rule, out = parse_key(stored.key or b"")
            event_s = instant_reader(self._kept.instant)(stored.value)
        except ValueError:
            raise unreadable(stored) from None
        if version == self._version:
            self.view.apply(token, _once(rule), out=out, event_s=event_s, place=(stored.partition, stored.offset))
        elif version > self._version and self._snapshots is not None:
            self._newer[version] += 1
            if self._newer[version] > MANY:
                self._newer[version] = 0
                with suppress(LogFull):
                    self._snapshots.gather(self.stream, version)

    # --- snapshots --------------------------------------------------------------------------------------------

    async def _first(self) -> list[int]:
        """Return where to begin to read: behind a snapshot, if there is one. Raises Gathering."""
        begins = await self._log.begin_offsets(self.stream)
        snapshots = self._snapshots
        if snapshots is None:
            return begins
        snapshots.discard_before(self.stream, self._version)
        snapshot = await self._newest(snapshots, wait=True)
        if snapshot is not None:
            begins = list(snapshot.offsets)
        if sum(await self._log.end_offsets(self.stream)) - sum(begins) > MOST:
            snapshots.gather(self.stream, self._version)
            raise Gathering(stream=self.stream)
        if snapshot is not None:
            self._adopt(snapshot)
        return begins

    async def _renew(self, snapshots: Snapshots, reached: list[int]) -> None:
        """Take over a newer snapshot, once there is one, it is verified, and all in it has been read.

        One that was begun anew goes less far at first: who has changed since would be in neither.
        """
        snapshot, before = await self._newest(snapshots, wait=False), self.view.snapshot
        if snapshot is None or snapshot is before:
            return
        if before is not None and any(at < had for at, had in zip(snapshot.offsets, before.offsets, strict=True)):
            return
        if all(offset <= at for offset, at in zip(snapshot.offsets, reached, strict=True)):
            self._adopt(snapshot)

    def _adopt(self, snapshot: Snapshot) -> None:
        """Look people up in the newest snapshot from now on."""
        self.view.adopt(snapshot)
        self.snapshot_s = None if self._stamp is None else self._stamp[1] / 1e9

    async def _newest(self, snapshots: Snapshots, *, wait: bool) -> Snapshot | None:
        """Return the newest snapshot that is whole and of this log; one that is not goes.

        With `wait` raises Gathering if verifying takes long; without, it is the one before until that is through.
        """
        if self._opening is None:
            stamp = snapshots.stamp(self.stream, self._version)
            if stamp == self._stamp:
                return self._known
            self._opening = (stamp, snapshots.opening(self.stream, self._version))
        stamp, opening = self._opening
        deadline_s = time.monotonic() + UNDECIDED_S
        while not opening.done():
            if not wait:
                return self._known
            if time.monotonic() > deadline_s:
                raise Gathering("a snapshot is being verified; nothing is cleared before that", stream=self.stream)
            await asyncio.sleep(_LOOK_S)
        found = opening.result()
        if found is not None and not await fits(self._log, found.meta):  # if that raises, it is asked again
            found = None
            if snapshots.stamp(self.stream, self._version) == stamp:
                snapshots.discard(self.stream, self._version)
        self._stamp, self._opening, self._known = None if found is None else stamp, None, found
        return found


@cache
def instant_reader(field: str) -> Callable[[bytes], int]:
    """Return what reads an instant of a record's clear envelope, in Unix seconds. It raises ValueError."""
    decode = msgspec.json.Decoder(msgspec.defstruct("Envelope", [(field, str)])).decode

    def read(value: bytes) -> int:
        try:
            return _unix_s(getattr(decode(value), field))
        except msgspec.MsgspecError:
            raise ValueError("not an envelope") from None

    return read


@lru_cache(65_536)
def _once(rule: Rule) -> Rule:
    """Return a rule equal to this one: many have the same, and it is held once."""
    return rule


@lru_cache(65_536)
def _unix_s(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def unreadable(stored: Stored) -> LogUnusable:
    """Return the error for a record that is no entry."""
    return LogUnusable(
        f"a record of the {stored.stream} stream cannot be read; nothing is cleared without it",
        stream=stored.stream, partition=stored.partition, offset=stored.offset,
    )  # fmt: skip
