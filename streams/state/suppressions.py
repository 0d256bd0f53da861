"""The suppressions of this process, kept up to the `suppressions` stream's high watermark."""

from datetime import datetime

import orjson

from processors.screen.suppression import Suppressions, parse_key
from schemas.errors import LogUnusable
from streams.log.protocol import Log

STREAM = "suppressions"
_PAGE = 5000


class SuppressionTail:
    """Reads the stream from its beginning and then its tail into `view`; log order within a partition decides."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._next: list[int] | None = None
        self.view = Suppressions()

    async def catch_up(self) -> int:
        """Fold in everything up to the high watermark seen at the call; return the number of records. Blocks on I/O.

        Raises LogBusy if the stream cannot be seen now: whoever clears must not go on then. A record that is no
        suppression raises LogUnusable, for the view would be incomplete without it.
        """
        if self._next is None:
            self._next = await self._log.begin_offsets(STREAM)
        count = 0
        for partition, end in enumerate(await self._log.end_offsets(STREAM)):
            while self._next[partition] < end:
                page = await self._log.read(STREAM, partition, self._next[partition], _PAGE)
                if not page:
                    break
                for stored in page:
                    self._apply(stored.key, stored.value, partition, stored.offset)
                self._next[partition] = page[-1].offset + 1
                count += len(page)
        return count

    def _apply(self, key: bytes | None, value: bytes, partition: int, offset: int) -> None:
        try:
            _, token, rule, out = parse_key(key or b"")
            event_s = int(datetime.fromisoformat(orjson.loads(value)["event_at"]).timestamp())
        except (ValueError, KeyError, TypeError):
            raise LogUnusable(
                "a record of the suppressions stream cannot be read; nothing is cleared without it",
                stream=STREAM, partition=partition, offset=offset,
            ) from None  # fmt: skip
        self.view.apply(token, rule, out=out, event_s=event_s)
