"""Makes the snapshot of a stream's entries from the one before and the log, in bounded memory."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from processors.screen.entries import Meta, Records, merge
from schemas.errors import LogBusy
from streams.log.protocol import Log
from streams.state.entries import PAGE, Kept, instant_reader, unreadable
from streams.state.snapshots import Snapshots, fits, witness

CHUNK: Final = 4_000_000
"""So many records are folded in at once: about 300 MB, and as much again while they are."""


async def gather(
    log: Log, snapshots: Snapshots, kept: Kept, version: int, *, chunk: int = CHUNK,
    pause: Callable[[], None] = lambda: None,
) -> bool:  # fmt: skip
    """Bring the snapshot up to all that is decided; return False if another process is at it. Blocks.

    Each `chunk` of records makes a whole snapshot: one that is stopped half-way has not worked for nothing. `pause` is
    called now and then, and may raise. Raises LogUnusable for a record that is no entry.
    """
    stream = kept.stream
    with snapshots.locked(stream, version) as mine:
        if not mine:
            return False
        ends = await log.stable_offsets(stream)
        old = snapshots.open(stream, version)
        if old is not None and not await fits(log, old.meta):
            old = None
        at = await log.begin_offsets(stream) if old is None else list(old.offsets)
        seen: list[tuple[int, str] | None] = [None] * len(at) if old is None else list(old.meta.witnesses)
        records, read_event = Records(version), instant_reader(kept.instant)

        def fold_in() -> None:
            nonlocal records
            meta = Meta(
                stream=stream, version=version, store=snapshots.store_id, log=log.log_id,
                offsets=tuple(at), witnesses=tuple(seen),
            )  # fmt: skip
            after_s = int(time.time()) if kept.ends else None
            snapshots.write(
                stream, version, lambda write: merge(old, records, meta, kept.fold, write, pause, after_s=after_s)
            )
            records = Records(version)

        for partition, end in enumerate(ends):
            while at[partition] < end:
                pause()
                page = [one for one in await log.read(stream, partition, at[partition], PAGE, end) if one.offset < end]
                for stored in page:
                    try:
                        records.add(stored.key or b"", partial(read_event, stored.value))
                    except ValueError:
                        raise unreadable(stored) from None
                if page:
                    seen[partition] = witness(page[-1])
                at[partition] = page[-1].offset + 1 if page else end
                if len(records) >= chunk:
                    fold_in()
                    old = snapshots.open(stream, version)
                    if old is None:  # without it the next one would lack what is in it
                        raise LogBusy("a snapshot that was just made is gone or damaged; it is made anew")
        if old is None or tuple(at) != old.offsets:
            fold_in()
    return True


def ends_with(parent: int) -> Callable[[], None]:
    """Return what ends this process once its parent has ended."""

    def look() -> None:
        if os.getppid() != parent:
            raise SystemExit(0)

    return look
