"""The suppressions of this process, kept up to the `suppressions` stream's high watermark.

During a rotation of the token key the stream holds every entry under both keys; each has a view of its own.
"""

import asyncio
import time
from datetime import datetime

import orjson

from processors.screen.suppression import Suppressions, parse_key
from schemas.errors import LogBusy, LogUnusable
from streams.log.protocol import Log

STREAM = "suppressions"
_PAGE = 5000
UNDECIDED_S = 0.5
"""So long a catch-up waits for whoever has written opt-outs and not committed them yet."""
_LOOK_S = 0.005


class SuppressionTail:
    """Reads the stream from its beginning and then its tail into `view`; log order within a partition decides."""

    def __init__(self, log: Log, version: int) -> None:
        """Take the token key version whose entries `view` is to show; older ones are passed over."""
        self._log = log
        self._next: list[int] | None = None
        self._views = {version: Suppressions()}
        self._version = version
        self.view = self._views[version]

    def follow(self, version: int) -> None:
        """Show the entries of a newer token key from now on, and forget those of older ones. What was read counts."""
        self._views = {known: view for known, view in self._views.items() if known >= version}
        self._version = version
        self.view = self._views.setdefault(version, Suppressions())

    async def catch_up(self) -> int:
        """Fold in everything up to the high watermark seen at the call; return the number of records. Blocks on I/O.

        What is written and not committed counts: it may be an opt-out. Raises LogBusy if it stays undecided, or the
        stream cannot be seen: whoever clears must not go on then. A record that is no suppression raises LogUnusable,
        for the view would be incomplete without it.
        """
        if self._next is None:
            self._next = await self._log.begin_offsets(STREAM)
        ends = await self._log.end_offsets(STREAM)
        if ends == self._next:
            return 0
        await self._decided(ends)
        count = 0
        for partition, end in enumerate(ends):
            while self._next[partition] < end:
                page = await self._log.read(STREAM, partition, self._next[partition], _PAGE, end)
                for stored in page:
                    self._apply(stored.key, stored.value, partition, stored.offset)
                self._next[partition] = page[-1].offset + 1 if page else end  # the rest is no message
                count += len(page)
        return count

    async def _decided(self, ends: list[int]) -> None:
        """Wait until all before `ends` is committed or aborted. Raises LogBusy."""
        deadline_s = time.monotonic() + UNDECIDED_S
        while True:
            stable = await self._log.stable_offsets(STREAM)
            if all(offset >= end for offset, end in zip(stable, ends, strict=True)):
                return
            if time.monotonic() > deadline_s:
                raise LogBusy(
                    "opt-outs were written and not committed; nothing is cleared before they are", stream=STREAM
                )
            await asyncio.sleep(_LOOK_S)

    def _apply(self, key: bytes | None, value: bytes, partition: int, offset: int) -> None:
        try:
            version, token, rule, out = parse_key(key or b"")
            event_s = int(datetime.fromisoformat(orjson.loads(value)["event_at"]).timestamp())
        except (ValueError, KeyError, TypeError):
            raise LogUnusable(
                "a record of the suppressions stream cannot be read; nothing is cleared without it",
                stream=STREAM, partition=partition, offset=offset,
            ) from None  # fmt: skip
        if version >= self._version:
            self._views.setdefault(version, Suppressions()).apply(token, rule, out=out, event_s=event_s)
