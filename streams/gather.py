"""`python -m streams.gather`: the child of a process that found that a newer snapshot of its entries is wanted.

It reads what to do from its standard input, works at a low priority, and ends with its parent.
"""

import asyncio
import os
import pickle
import signal
import sys
from typing import Final

from schemas.errors import StreamveilError
from streams.config import Config
from streams.deployment import open_log
from streams.state.entries import KEPT
from streams.state.gathering import ends_with, gather
from streams.state.snapshots import Snapshots

NICE: Final = 10


def main() -> int:
    """Do what standard input says; one line on standard error if it cannot be done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this one
    os.nice(NICE)
    config, store_id, stream, version, parent = pickle.load(sys.stdin.buffer)  # noqa: S301 — our own parent's
    try:
        asyncio.run(_gather(config, Snapshots(config.entries_dir, store_id), stream, version, parent))
    except StreamveilError as error:
        sys.stderr.write(f"streamveil: gathering {stream}: {error}\n")
        return 1
    return 0


async def _gather(config: Config, snapshots: Snapshots, stream: str, version: int, parent: int) -> None:
    log = await open_log(config)
    try:
        await gather(log, snapshots, KEPT[stream], version, pause=ends_with(parent))
    finally:
        await log.close()


if __name__ == "__main__":
    sys.exit(main())
