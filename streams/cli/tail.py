"""`streamveil tail`: a stream's records, sealed parts as they are unless they are revealed."""

import argparse
import asyncio
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from schemas.catalog import CATALOG, INPUTS
from schemas.errors import InputInvalid
from schemas.fields import NO_REASON, is_reason
from streams.config import load
from streams.deployment import Deployment, reading
from streams.keys.reveal import Revealed
from streams.log.protocol import Log, Stored

TOKENS = ("suppressions", "exemptions")
"""The streams whose keys hold tokens, which are personal data and shown to nobody."""
PAGE = 500
LAST = 10
FOLLOW_S = 0.5
_TOKEN = re.compile(r"[0-9a-f]{32}")


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `tail`."""
    tail = subparsers.add_parser("tail", help="show the records of a stream")
    tail.add_argument("stream", metavar="STREAM", choices=[name for name in CATALOG if name not in INPUTS],
                      help="one of: " + ", ".join(name for name in CATALOG if name not in INPUTS))  # fmt: skip
    tail.add_argument("--from-beginning", action="store_true", help="from the first record (default: the last 10)")
    tail.add_argument("--max", type=_count, metavar="N", help="at most N records")
    tail.add_argument("--follow", action="store_true", help="go on with what comes")
    tail.add_argument("--reveal", action="store_true", help="open what this user may open; logged to audit")
    tail.add_argument("--reason", metavar="REASON", help="why: a code or case reference, needed with --reveal")
    tail.add_argument("--json", action="store_true", help="one JSON object a line")
    tail.set_defaults(run=_run)


def _count(text: str) -> int:
    """Return a number of records, 1 or more. Raises ValueError."""
    if (count := int(text)) < 1:
        raise ValueError("at least 1")
    return count


def _run(args: argparse.Namespace) -> int:
    if args.reveal and not is_reason(args.reason or ""):
        raise InputInvalid(f"--reveal needs --reason: {NO_REASON}")
    asyncio.run(_show(args))
    return 0


async def _show(args: argparse.Namespace) -> None:
    config = load(args)
    if not args.reveal:  # keys are for whoever opens
        async with reading(config) as log:
            async for page in _pages(log, args):
                _print(page, [None] * len(page), args)
        return
    async with Deployment.open(config, create=False) as deployment:
        revealer = deployment.revealer()
        revealer.permit(args.stream)
        async for page in _pages(deployment.log, args):
            _print(page, await revealer.reveal(page, args.reason), args)


def _print(page: list[Stored], revealed: Sequence[Revealed | None], args: argparse.Namespace) -> None:
    """Write the records of a page, and what was opened of them, to standard output."""
    for stored, opened in zip(page, revealed, strict=True):
        line = _shown(stored, opened)
        option = None if args.json else orjson.OPT_INDENT_2
        sys.stdout.buffer.write(orjson.dumps(line, option=option) + b"\n")
    sys.stdout.buffer.flush()


async def _pages(log: Log, args: argparse.Namespace) -> AsyncIterator[list[Stored]]:
    """Yield the records asked for: up to the end seen at start, or with `--follow` for ever."""
    ends = await log.end_offsets(args.stream)
    begins = await log.begin_offsets(args.stream)
    left = args.max if args.max is not None else sys.maxsize
    at = list(begins)
    if not args.from_beginning:
        wanted = _shares(begins, ends, LAST if args.max is None else args.max)
        for partition, share in enumerate(wanted):
            at[partition] = await _newest(log, args.stream, partition, begins[partition], ends[partition], share)
    while left > 0:
        for partition, end in enumerate(ends):
            while at[partition] < end and left > 0:
                page = await log.read(args.stream, partition, at[partition], min(PAGE, left, end - at[partition]))
                if not page:
                    break
                at[partition] = page[-1].offset + 1
                left -= len(page)
                yield page
        if not args.follow:
            return
        await asyncio.sleep(FOLLOW_S)
        ends = await log.end_offsets(args.stream)


def _shares(begins: list[int], ends: list[int], wanted: int) -> list[int]:
    """Return how many of the newest `wanted` records each partition gives: as even a share of each as there is."""
    there = [end - begin for begin, end in zip(begins, ends, strict=True)]
    shares = [0] * len(there)
    for done, partition in enumerate(sorted(range(len(ends)), key=there.__getitem__)):
        shares[partition] = min(there[partition], -(-max(0, wanted) // (len(ends) - done)))
        wanted -= shares[partition]
    return shares


async def _newest(log: Log, stream: str, partition: int, begin: int, end: int, wanted: int) -> int:
    """Return the offset from which a partition has so many records before its end; not every offset has one."""
    back = wanted
    while back:
        start = at = max(begin, end - back)
        offsets: deque[int] = deque(maxlen=wanted)
        while at < end and (page := await log.read(stream, partition, at, min(PAGE, end - at))):
            offsets.extend(stored.offset for stored in page)
            at = page[-1].offset + 1
        if len(offsets) == wanted or start == begin:
            return offsets[0] if offsets else end
        back *= 4
    return end


def _shown(stored: Stored, opened: Revealed | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "stream": stored.stream,
        "partition": stored.partition,
        "offset": stored.offset,
        "timestamp": datetime.fromtimestamp(stored.timestamp_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "key": None if stored.key is None else stored.key.decode(errors="replace"),
        "headers": {name: value.decode(errors="replace") for name, value in stored.headers},
        "value": _value(stored.value),
    }
    if stored.stream in TOKENS:
        line["key"] = _TOKEN.sub("token", line["key"] or "")
        if line["value"] is not None:
            line["value"]["entry"] = line["key"]
    if opened is not None:
        line["reveal"] = {"state": opened.state.value, "fields": opened.fields, "withheld": list(opened.withheld)}
        if opened.reason is not None:
            line["reveal"]["reason"] = opened.reason
        if opened.corrections:
            line["reveal"]["corrections"] = list(opened.corrections)
    return line


def _value(value: bytes) -> dict[str, Any] | None:
    """Return a value as it is shown: None if it is damaged."""
    try:
        fields = orjson.loads(value)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
