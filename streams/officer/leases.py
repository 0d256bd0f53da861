"""Key leases of officers' work: waiting until others' have run out, and one for each step of a token rotation."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from schemas.errors import TokensChange
from streams.deployment import Deployment
from streams.keys.cache import KeyCache
from streams.keys.store import KeyStore

ROTATED: Final = "another process has rotated the token key meanwhile; what it did stands"

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


@contextmanager
def rotating(deployment: Deployment, current: int, *, changing: bool) -> Iterator[KeyCache]:
    """Yield the keys to write with under a lease of their own, for which another rotation's hold waits.

    `current`, `changing`: how the token keys were when what is to be written was read; what was read before a hold is
    not written after it. Raises TokensChange if they have changed.
    """
    keys, _ = deployment.keys(rotating=True)
    try:
        found = deployment.store.token_keys()
        if found.current.version != current or found.changing is not changing:
            raise TokensChange(ROTATED)
        yield keys
    finally:
        keys.close()
