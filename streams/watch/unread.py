"""What waits in the input streams: records not committed yet, by whichever worker, and when the oldest arrived."""

from schemas.catalog import INPUTS
from streams.log.protocol import Consumer, Log

READS = 16
"""How many messages are read at most in one look, for their arrival. Where there are more partitions, an arrival that
was read earlier stands in: it is older, so the age errs on the high side."""


class Unread:
    """Looks into the inputs through the log and the consumer of one worker."""

    def __init__(self, log: Log, consumer: Consumer) -> None:
        self._log = log
        self._consumer = consumer
        self._arrivals: dict[tuple[str, int], tuple[int, float]] = {}  # place → offset, Unix s
        self._turn = 0

    async def look(self) -> dict[str, tuple[list[int], float | None]]:
        """Return stream → records not committed per partition, and the arrival (Unix s) of the oldest, if any.

        Blocks on the log. Raises what it raises.
        """
        found = {
            stream: (await self._consumer.committed_offsets(stream), await self._log.end_offsets(stream))
            for stream in INPUTS
        }
        lags = {
            stream: [max(0, end - offset) for offset, end in zip(*offsets, strict=True)]
            for stream, offsets in found.items()
        }
        waiting = {
            (stream, partition): found[stream][0][partition]
            for stream in INPUTS
            for partition, lag in enumerate(lags[stream])
            if lag
        }
        await self._arrived(waiting)
        oldest = {
            stream: min((arrival for (of, _), (_, arrival) in self._arrivals.items() if of == stream), default=None)
            for stream in INPUTS
        }
        return {stream: (lags[stream], oldest[stream]) for stream in INPUTS}

    async def _arrived(self, waiting: dict[tuple[str, int], int]) -> None:
        """Bring the arrivals of what waits up to date: `READS` of them, unknown ones first, the others in turns."""
        self._arrivals = {place: known for place, known in self._arrivals.items() if place in waiting}
        unknown = [place for place in waiting if place not in self._arrivals]
        moved = [place for place, (offset, _) in self._arrivals.items() if offset != waiting[place]]
        self._turn += READS
        turn = self._turn % len(moved) if moved else 0
        for place in (unknown + moved[turn:] + moved[:turn])[:READS]:
            for stored in await self._log.read(*place, waiting[place], 1):
                self._arrivals[place] = (waiting[place], stored.timestamp_ms / 1000)
