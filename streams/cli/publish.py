"""`streamveil publish`: gateway files into the traffic streams."""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import orjson

from processors.gateways import FORMATS, guess_format
from schemas.errors import InputInvalid
from streams.config import load

MAX_REPORTED = 100
"""Lines that could not be parsed are reported one by one up to here, then counted."""


def add(subparsers: Any) -> None:
    """Register `publish`."""
    noun = subparsers.add_parser("publish", help="publish gateway files; a killed run is gone on with by the next")
    noun.add_argument("files", metavar="FILE", nargs="+", help="a file, or - for standard input")
    noun.add_argument("--format", choices=FORMATS, help="default: by the file's name")
    noun.add_argument("--map", type=Path, metavar="FILE", help="mapping file of the format mapped")
    noun.add_argument("--restart", action="store_true", help="from the beginning, whatever a killed run published")
    noun.add_argument("--json", action="store_true", help="one JSON object a file")
    noun.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from streams.publish import STDIN, Source

    mapping = None if args.map is None else _text(args.map)
    sources = []
    for name in args.files:
        format_name = args.format or guess_format(name, mapping is not None)
        sources.append(Source(name, format_name, mapping, str(args.map or format_name)))
        sources[-1].open_format()
        if name != STDIN and not os.access(name, os.R_OK):
            raise InputInvalid("there is no such file, or it may not be read; nothing was published", file=name)
    asyncio.run(_publish(args, sources))
    return 0


async def _publish(args: argparse.Namespace, sources: list[Any]) -> None:
    from streams.cli.progress import bar
    from streams.deployment import open_log
    from streams.publish import Progress, publish

    log = await open_log(load(args))
    try:
        for source in sources:
            unparsed = _Unparsed(source.name)
            with bar(source.name, _size(source.name)) as advance:
                progress = Progress(advance, lambda text, name=source.name: _say(f"{name}: {text}"), unparsed.tell)
                try:
                    counts = await publish(log, source, progress, restart=args.restart)
                finally:
                    unparsed.end()
            if args.json:
                print(orjson.dumps(counts._asdict()).decode(), flush=True)
            else:
                rest = ", ".join(f"{count:,} {kind}" for kind, count in counts._asdict().items()
                                 if kind in _KINDS and count)  # fmt: skip
                _say(f"{counts.file}: {counts.published:,} published" + (f": {rest}" if rest else ""))
    finally:
        await log.close()


_KINDS = ("requests", "cdrs", "preferences", "unrecognised", "opaque")


class _Unparsed:
    """Reports the lines of one file that could not be parsed, by number; the line itself is never shown."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0

    def tell(self, line: int, reason: str) -> None:
        self._count += 1
        if self._count <= MAX_REPORTED:
            _say(f"{self._name}:{line}: {reason}; published as opaque for quarantine")

    def end(self) -> None:
        if self._count > MAX_REPORTED:
            _say(f"{self._name}: {self._count - MAX_REPORTED:,} more lines published as opaque for quarantine")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputInvalid("the mapping file cannot be read", file=str(path)) from None


def _size(name: str) -> int | None:
    path = Path(name)
    return path.stat().st_size if path.is_file() else None
