"""Gateway files into the traffic streams, each record once even if the process is killed and started again.

Rules of this file:
- A chunk of records and the file's bookmark are one append. So what a killed run had published is known to the
  byte, and the next run goes on behind it, if the bytes before it are still the same. A finished file has no
  bookmark: published again, its records are new records.
- What a format cannot parse is published as raw bytes, so that workers seal it into quarantine. Whoever calls is
  told the line's number and a reason code, never the line.
- Only the log is opened: a gateway's host needs no key.
"""

import fcntl
import hashlib
import os
import select
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from processors.gateways import Format, open_format, split_records
from schemas.catalog import TRAFFIC, TRAFFIC_CDR, partition_for
from schemas.errors import InputInvalid, Poison
from schemas.fields import normalise
from schemas.outbound import Message, Output
from streams.log.protocol import Bookmark, Log

STDIN: Final = "-"
CHUNK_RECORDS: Final = 2000
CHUNK_BYTES: Final = 8_000_000
"""A chunk is appended when either is reached."""
MAX_LINE_BYTES: Final = 4_000_000
"""A longer line is published in pieces, each of them unreadable; so no log needs to take more."""
_READ_BYTES: Final = 1 << 18
_KINDS = ("request", "cdr", "preference")


# --- where a record goes ------------------------------------------------------------------------------------


class _Routing(msgspec.Struct, frozen=True):
    """The fields of an inbound record that say where it goes; others are not looked at."""

    type: str = ""
    direction: str = ""
    sender: str = ""
    recipient: str = ""
    country: str | None = None


_decode = msgspec.json.Decoder(_Routing).decode


class Route(NamedTuple):
    """Where a record goes: input stream, key (the person's number, UTF-8; None: no person), and its type."""

    stream: str
    key: bytes | None
    kind: str  # request, cdr, preference; "" where it cannot be told

    def __repr__(self) -> str:
        return f"Route({self.stream})"

    def partition(self, value: bytes, partitions: int) -> int:
        """Return the partition: by key, or by the bytes of a record that has none."""
        return partition_for(value if self.key is None else self.key, partitions)


def route(value: bytes) -> Route:
    """Return where an inbound record goes; what is no record goes to `traffic` without a key. About 1.5 µs."""
    try:
        found = _decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return OPAQUE
    kind = found.type if found.type in _KINDS else ""
    outbound = found.direction == "mt" and kind != "preference"
    person = normalise(found.recipient if outbound else found.sender, found.country).value
    key = person.encode("utf-8", "surrogatepass") or None
    return Route(TRAFFIC_CDR if outbound and kind == "cdr" else TRAFFIC, key, kind)


OPAQUE: Final = Route(TRAFFIC, None, "")
"""Where bytes go that no format could parse."""


# --- a file -------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of an open file with their ends; counts what it gave out: bytes, line ends, and their digest."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._ready: deque[bytes] = deque()
        self._rest = b""
        self._digest = hashlib.sha256()
        self.position = 0
        self.ends = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._ready:
            self._read()
        line = self._ready.popleft()
        self.position += len(line)
        self.ends += line.endswith(b"\n")
        self._digest.update(line)
        return line

    def _block(self, size: int) -> bytes:
        try:
            return os.read(self._descriptor, size)
        except OSError as error:
            raise InputInvalid(f"cannot be read: {error.strerror}", file=self._name) from None

    def _read(self) -> None:
        block = self._block(_READ_BYTES)
        if not block and not self._rest:
            raise StopIteration
        *lines, self._rest = (self._rest + block).split(b"\n")
        self._ready.extend([line + b"\n" for line in lines])
        if self._rest and (not block or len(self._rest) >= MAX_LINE_BYTES):
            self._ready.append(self._rest)
            self._rest = b""

    def skip(self, bookmark: Bookmark) -> bool:
        """Go on behind a bookmark, at the beginning of a file; return whether all before it is as it was."""
        left = bookmark.position
        while left and (block := self._block(min(left, _READ_BYTES))):
            self._digest.update(block)
            self.ends += block.count(b"\n")
            left -= len(block)
        self.position = bookmark.position - left
        return not left and self.bookmark().digest == bookmark.digest

    def bookmark(self) -> Bookmark:
        """Return how far this is: bytes given out, number of the next line, digest of all so far."""
        return Bookmark(self.position, self.ends + 1, self._digest.hexdigest())

    def would_block(self) -> bool:
        """Return whether the next line has not arrived yet; never for a file on disk."""
        return not self._ready and not select.select([self._descriptor], [], [], 0)[0]


class Source(NamedTuple):
    """A file to publish: its name as given (`-`: standard input), its format, and the mapping with its name."""

    name: str
    format_name: str
    mapping: str | None
    mapping_name: str

    def open_format(self) -> Format:
        """Return a new converter. Raises InputInvalid."""
        return open_format(self.format_name, self.mapping, self.mapping_name)

    @property
    def bookmark_name(self) -> str:
        """What the file's bookmark is called: the same file read in the same way."""
        parts = (os.path.abspath(self.name), self.format_name, self.mapping or "")  # noqa: PTH100 — of a name
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()

    @contextmanager
    def opened(self) -> Iterator[tuple[int, bool]]:
        """Open it, for one process at a time, and give its descriptor and whether it is a file on disk.

        Raises InputInvalid.
        """
        if self.name == STDIN:
            if sys.stdin is None:
                raise InputInvalid("standard input is closed, and - is to be read from it")
            yield sys.stdin.fileno(), False
            return
        try:
            file = Path(self.name).open("rb", buffering=0)  # noqa: SIM115 — closed below
        except OSError as error:
            raise InputInvalid(f"cannot be read: {error.strerror}", file=self.name) from None
        with closing(file):
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            if regular:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputInvalid("this file is being published by another process", file=self.name) from None
            yield file.fileno(), regular


class Counts(NamedTuple):
    """What one run published of one file; `published` is the sum of the five after it."""

    file: str
    resumed_at_line: int | None
    published: int
    requests: int
    cdrs: int
    preferences: int
    unrecognised: int  # JSON objects of no known type: workers quarantine them
    opaque: int  # could not be parsed: workers quarantine them


class Progress(NamedTuple):
    """Whom to tell: of bytes done, of a note about the file, and of a line (number, reason) that was not parsed."""

    advance: Callable[[int], None]
    note: Callable[[str], None]
    unparsed: Callable[[int, str], None]


async def publish(log: Log, source: Source, progress: Progress, *, restart: bool = False) -> Counts:
    """Publish a file, from where a killed run stopped unless `restart`, and return what this run published.

    Blocks (disk). Raises InputInvalid if it cannot be read, or is not what a killed run had read, and what the log
    raises; then what was appended stays, and a file on disk is gone on with by the next run.
    """
    with source.opened() as (descriptor, regular):
        run = _Publishing(log, source, progress, descriptor, resumable=regular)
        try:
            return await run.run(restart=restart)
        except BaseException:
            if run.appended_line > 1:
                progress.note(f"stopped; everything before line {run.appended_line} is published")
            raise


class _Publishing:
    """One run over one file."""

    def __init__(self, log: Log, source: Source, progress: Progress, descriptor: int, *, resumable: bool) -> None:
        self._log = log
        self._source = source
        self._progress = progress
        self._descriptor = descriptor
        self._bookmark_name = source.bookmark_name if resumable else None
        self._lines = _Lines(descriptor, source.name)
        self._counts = dict.fromkeys((*_KINDS, "", "opaque"), 0)
        self._chunks: dict[tuple[str, int], list[Message]] = {}
        self._records = self._bytes = self._advanced = 0
        self.appended_line = 0

    async def run(self, *, restart: bool) -> Counts:
        """Publish what is left of the file."""
        converter = self._source.open_format()
        bookmark = None
        if self._bookmark_name is not None and not restart:
            bookmark = await self._log.bookmark(self._bookmark_name)
        if bookmark is not None:
            self._resume(converter, bookmark)
        at = self._lines.bookmark()
        records = split_records(self._lines, quoted=converter.quoted, line=at.line, position=at.position)
        headers_left = 0 if bookmark is not None else converter.header_lines
        for line, _, raw in records:
            if headers_left:
                headers_left -= 1
                converter.header(raw)
                continue
            self._take(converter, raw, line)
            full = self._records >= CHUNK_RECORDS or self._bytes >= CHUNK_BYTES
            if full or self._lines.would_block():
                await self._append(self._lines.bookmark())
        await self._append(None)
        kinds = self._counts
        return Counts(
            file=self._source.name,
            resumed_at_line=bookmark.line if bookmark is not None else None,
            published=sum(kinds.values()),
            requests=kinds["request"],
            cdrs=kinds["cdr"],
            preferences=kinds["preference"],
            unrecognised=kinds[""],
            opaque=kinds["opaque"],
        )

    def _resume(self, converter: Format, bookmark: Bookmark) -> None:
        """Read the header again, and go on behind the bookmark. Raises InputInvalid if the file has changed."""
        if converter.header_lines:
            for _, _, raw in split_records(_Lines(self._descriptor, self._source.name), quoted=converter.quoted):
                converter.header(raw)
                break
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        if not self._lines.skip(bookmark):
            raise InputInvalid(
                "the file has changed since publishing it was interrupted: publish it under another name, "
                "or all of it again with --restart",
                file=self._source.name,
            )
        self._progress.note(f"resuming at line {bookmark.line}")

    def _take(self, converter: Format, raw: bytes, line: int) -> None:
        try:
            values = converter.convert(raw, line)
        except Poison as poison:
            self._progress.unparsed(line, poison.reason)
            self._add(raw, OPAQUE, "opaque")
            return
        for value in values:
            to = route(value)
            self._add(value, to, to.kind)

    def _add(self, value: bytes, to: Route, kind: str) -> None:
        place = (to.stream, to.partition(value, self._log.partitions))
        self._chunks.setdefault(place, []).append(Message(_now_ms(), to.key, (), value))
        self._counts[kind] += 1
        self._records += 1
        self._bytes += len(value)

    async def _append(self, bookmark: Bookmark | None) -> None:
        """Append what was taken; None: the file is finished, and its bookmark goes."""
        outputs = [Output(stream, partition, messages) for (stream, partition), messages in self._chunks.items()]
        if self._bookmark_name is not None:
            await self._log.append(outputs, (self._bookmark_name, bookmark))
        elif outputs:
            await self._log.append(outputs)
        self._chunks = {}
        self._records = self._bytes = 0
        self._progress.advance(self._lines.position - self._advanced)
        self._advanced = self._lines.position
        self.appended_line = self._lines.ends + 1


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
