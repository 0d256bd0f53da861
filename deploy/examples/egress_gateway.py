"""An egress gateway in small: opens what was cleared, sends it at once, and remembers how far it came.

    python deploy/examples/egress_gateway.py --log sqlite:///streamveil-data/log.db --until-idle

What to take from it for a gateway of your own:
- `open_batch` decides at the last moment. What it reveals may be sent now; what it denies must not be sent, and the
  second verdict that says so is in `verdicts` already. So nothing revealed is kept, queued or logged.
- The position is saved after a page was sent. Killed in between, the gateway opens that page again. Pass partition
  and offset to your carrier as an idempotency key, if it takes one.
- The role `egress` is needed; without a roles file the owner of the key store may do everything.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from schemas.errors import InputInvalid, Retriable, StreamveilError
from streams.config import load
from streams.deployment import Deployment
from streams.keys.reveal import Revealer, State
from streams.log.protocol import Log

STREAM = "cleared"
PAGE = 1000
WAIT_S = 0.5


class Positions:
    """The next offset of each partition, in a file (0600) that is replaced whole."""

    def __init__(self, path: Path) -> None:
        """Read the file; a missing one is the beginning. Raises InputInvalid."""
        self._path = path
        self._next: dict[int, int] = {}
        try:
            self._next = {int(partition): int(at) for partition, at in orjson.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, AttributeError):
            raise InputInvalid("the positions cannot be read; move the file away", file=str(path)) from None

    def of(self, partition: int) -> int:
        """Return the next offset of a partition."""
        return self._next.get(partition, 0)

    def save(self, partition: int, offset: int) -> None:
        """Move a partition to `offset`, durable on return."""
        self._next[partition] = offset
        draft = self._path.with_name(f".{self._path.name}.new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(orjson.dumps({str(one): at for one, at in self._next.items()}))
            file.flush()
            os.fsync(descriptor)
        draft.replace(self._path)


class Gateway:
    """Takes cleared requests page by page; `counts` says what came of them."""

    def __init__(self, log: Log, revealer: Revealer, positions: Positions) -> None:
        """Take an open log, the library that opens, and the positions."""
        self.counts: Counter[str] = Counter()
        self.stopping = asyncio.Event()
        self._log = log
        self._revealer = revealer
        self._positions = positions

    async def run(self, *, until_idle: bool) -> None:
        """Send until told to stop or, with `until_idle`, until there is nothing left; waits out what is Retriable."""
        while not self.stopping.is_set():
            try:
                if await self._round():
                    continue
            except Retriable as error:
                print(f"egress: waiting: {error}", file=sys.stderr)
            else:
                if until_idle:
                    return
            await self._pause()

    async def _round(self) -> int:
        """Take one page of each partition and return how many requests that was."""
        taken = 0
        for partition, begin in enumerate(await self._log.begin_offsets(STREAM)):
            at = max(begin, self._positions.of(partition))
            page = await self._log.read(STREAM, partition, at, PAGE)
            if not page or self.stopping.is_set():
                continue
            for result in await self._revealer.open_batch(page):
                if result.state is State.REVEALED:
                    self.send(result.fields)
                else:  # too late, opted out since, or its key is gone: it must not be sent
                    self.counts[result.reason or result.state.value] += 1
            self._positions.save(partition, page[-1].offset + 1)
            taken += len(page)
        return taken

    def send(self, request: Mapping[str, Any]) -> None:
        """Hand one request to the carrier. Here: count it; your client's call stands in its place."""
        self.counts[f"sent, {request['channel']}"] += 1

    async def _pause(self) -> None:
        try:
            await asyncio.wait_for(self.stopping.wait(), WAIT_S)
        except TimeoutError:
            return


async def serve(args: argparse.Namespace) -> Counter[str]:
    """Run a gateway on the configured deployment and return what it counted."""
    config = load(args)
    positions = Positions(args.positions or config.folder / "egress-positions.json")
    async with Deployment.open(config, create=False) as deployment:
        gateway = Gateway(deployment.log, deployment.revealer(), positions)
        for stop in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(stop, gateway.stopping.set)
        await gateway.run(until_idle=args.until_idle)
    return gateway.counts


def main() -> int:
    """Run from the command line: 0, or 1 with one line for an error."""
    parser = argparse.ArgumentParser(description="Open cleared requests and send each one at once.")
    parser.add_argument("--config", default="streamveil.toml", metavar="FILE")
    parser.add_argument("--log", metavar="URL", help="sqlite:///PATH")
    parser.add_argument("--positions", type=Path, metavar="FILE", help="default: beside the log")
    parser.add_argument("--until-idle", action="store_true", help="end when there is nothing left")
    try:
        counts = asyncio.run(serve(parser.parse_args()))
    except StreamveilError as error:
        print(f"egress: {error}", file=sys.stderr)
        return 1
    for what, count in sorted(counts.items()):
        print(f"{count:>10,} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
