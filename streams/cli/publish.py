"""`streamveil publish`: gateway files into the traffic streams."""

import argparse
import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from processors.gateways import FORMATS, guess_format
from schemas.errors import InputInvalid
from streams.cli.common import STDIN, bar, print_json, say, size_bytes
from streams.config import load
from streams.files import read_text

if TYPE_CHECKING:
    from streams.publish import Counts, Source

MAX_REPORTED = 100
"""Lines that could not be parsed are reported one by one up to here, then counted."""


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `publish`."""
    noun = subparsers.add_parser("publish", help="publish gateway files; what was interrupted is gone on with")
    noun.add_argument("files", metavar="FILE", nargs="+", help="a file, or - for standard input")
    noun.add_argument("--format", choices=FORMATS, help="default: by the file's name")
    noun.add_argument("--map", metavar="FILE", help="mapping of the format mapped, or settings of an asterisk one")
    noun.add_argument("--restart", action="store_true", help="from the first line, whatever was published before")
    noun.add_argument("--json", action="store_true", help="one JSON object a file")
    noun.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    asyncio.run(_publish(args, _sources(args)))
    return 0


def _sources(args: argparse.Namespace) -> "list[Source]":
    """Return what is to be published, all of it checked before anything is."""
    from streams.publish import Source

    for at, name in enumerate(args.files, 1):
        if name != STDIN and not Path(name).exists():
            raise InputInvalid(f"there is no such file: FILE {at} of {len(args.files)}; nothing was published")
    mapping = None if args.map is None else _text(args.map)
    sources = []
    for name in args.files:
        format_name = args.format or guess_format(name, mapping is not None)
        sources.append(Source(name, format_name, mapping, name if args.map is None else args.map))
        sources[-1].open_format()
    return sources


async def _publish(args: argparse.Namespace, sources: "list[Source]") -> None:
    from streams.deployment import open_log
    from streams.publish import Progress, publish

    log = await open_log(load(args))
    try:
        for source in sources:
            unparsed = _Unparsed(source.name)
            with bar(source.name, size_bytes(source.name)) as advance:
                progress = Progress(advance, partial(_note, source.name), unparsed.tell)
                try:
                    counts = await publish(log, source, progress, restart=args.restart)
                finally:
                    unparsed.end()
            if args.json:
                print_json(counts._asdict())
            else:
                say(_summary(counts))
    finally:
        await log.close()


class _Unparsed:
    """Reports the lines of one file that could not be parsed, by number; the line itself is never shown."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0

    def tell(self, line: int, reason: str) -> None:
        self._count += 1
        if self._count <= MAX_REPORTED:
            say(f"{self._name}:{line}: {reason}; published as opaque for quarantine")

    def end(self) -> None:
        if self._count > MAX_REPORTED:
            more = self._count - MAX_REPORTED
            say(f"{self._name}: {more:,} lines more could not be parsed; published as opaque for quarantine")


def _summary(counts: "Counts") -> str:
    kinds = ("requests", "cdrs", "preferences", "unrecognised", "opaque")
    parts = [f"{count:,} {kind}" for kind in kinds if (count := getattr(counts, kind))]
    return f"{counts.file}: {counts.published:,} published" + (f" ({', '.join(parts)})" if parts else "")


def _note(name: str, text: str) -> None:
    say(f"{name}: {text}")


def _text(name: str) -> str:
    try:
        return read_text(Path(name), pipe=True)
    except (OSError, UnicodeDecodeError):
        raise InputInvalid("the mapping file of --map cannot be read") from None
