"""Waits until no process can commit any more what it sealed before a destruction."""

import asyncio
from collections.abc import Callable

from streams.keys.store import KeyStore

_LOOK_S = 0.1


def unheard(_: list[str]) -> None:
    """Tell nobody."""


async def drained(store: KeyStore, sequence: int, *, on_wait: Callable[[list[str]], None] = unheard) -> None:
    """Wait until every key lease alive has taken note of `sequence`, or has run out: the lease protocol.

    On return whatever was sealed with keys from before is committed, or never will be; what the log is still writing
    at that moment is behind one more durable append. Waits no longer than the longest lease (`key_lease_s`), for a
    process that renews its lease takes note. `on_wait` is told the processes waited for (host-pid-start) whenever
    they become others. Raises what the store raises; calling again goes on.
    """
    told: list[str] = []
    while behind := sorted(process for process, seen in store.leases().items() if seen < sequence):
        if behind != told:
            told = behind
            on_wait(behind)
        await asyncio.sleep(_LOOK_S)
