"""What several commands share: numbers from standard input, notes, tables, a progress bar."""

import argparse
import errno
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TextIO, TypeVar

import orjson

from schemas.errors import InputInvalid
from streams.config import load
from streams.files import open_file

if TYPE_CHECKING:
    from streams.deployment import Deployment

STDIN = "-"
_EXISTS = "FILE exists; name one that does not"
_MOST = 65_536
"""Bytes of standard input that are looked at where one line is expected."""


def number(argument: str, *, alone: bool = True) -> str:
    """Return a NUMBER argument, or for `-` the one line of standard input; a terminal is read up to its first.

    Raises InputInvalid if there is more than one line, for the others would be left out without a word; not `alone`:
    what follows is the caller's to read.
    """
    if argument != STDIN:
        return plain(argument).strip()
    source = stdin()
    text = source.readline(_MOST)
    if alone and not source.isatty():
        text += source.read(_MOST)
    lines = [line.strip() for line in text.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    if len(lines) > 1:
        raise InputInvalid("standard input has more than one line: give one number at a time")
    return lines[0] if lines else ""


def stdin() -> BinaryIO:
    """Return standard input. Raises InputInvalid if whoever started this closed it."""
    if sys.stdin is None:
        raise InputInvalid("standard input is closed, and - is to be read from it")
    return sys.stdin.buffer


def plain(text: str) -> str:
    """Return an argument with what was no UTF-8 in it replaced."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """Open a file or pipe to read, or standard input for `-`. Raises InputInvalid, which does not repeat the name."""
    if name == STDIN:
        yield stdin()
        return
    try:
        file = open_file(Path(name), pipe=True)
    except OSError as error:
        raise InputInvalid(f"FILE cannot be read: {error.strerror}") from None
    with file:
        yield file


@contextmanager
def new_file(name: str) -> Iterator[TextIO]:
    """Open a new file (0600), which is there once the block has ended; or standard output for `-`.

    Until then it is `FILE.part`. That goes on any error; of a process that was killed it stays. A FILE that is there,
    or comes meanwhile, is never touched. Raises InputInvalid.
    """
    if name == STDIN:
        yield sys.stdout
        return
    path, part = Path(name), f"{name}.part"
    try:
        if not path.name or name.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.lexists(path):
            raise InputInvalid(_EXISTS)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InputInvalid(
            "FILE.part exists: this FILE is being written, or whoever wrote it was killed; then delete FILE.part"
        ) from None
    except OSError as error:
        raise InputInvalid(f"FILE cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        _appear(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _appear(part: str, path: Path) -> None:
    """Give a file its name, which nobody else's has. Raises InputInvalid and OSError."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise InputInvalid(_EXISTS) from None
    except OSError:  # a file system without links: there somebody may take the name between these two lines
        if os.path.lexists(path):
            raise InputInvalid(_EXISTS) from None
        Path(part).rename(path)


class Followed(Protocol):
    """Entries of a stream, such as opt-outs, that are read to their end before they are asked or changed."""

    async def catch_up(self) -> None:
        """Read the stream to its end."""


_Followed = TypeVar("_Followed", bound=Followed)


@asynccontextmanager
async def caught_up(
    args: argparse.Namespace, make: "Callable[[Deployment], _Followed]", *, create: bool
) -> AsyncIterator[_Followed]:
    """Open the deployment, or with `create` make one, and give what is made of it, read to its end."""
    from streams.deployment import Deployment

    async with Deployment.open(load(args), create=create) as deployment:
        entries = make(deployment)
        await entries.catch_up()
        yield entries


def size_bytes(name: str) -> int | None:
    """Return a file's size in bytes, or None if it has none."""
    path = Path(name)
    return path.stat().st_size if path.is_file() else None


def say(text: str) -> None:
    """Print a note to standard error."""
    print(text, file=sys.stderr)


def print_json(value: object) -> None:
    """Print a value as one line."""
    print(orjson.dumps(value).decode())


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under titles, aligned; None as `-`."""
    cells = [tuple(titles), *(tuple("-" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield what to tell of work done; shown on standard error if that is a terminal. None: the total is not known."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(what), total=total or None)
        yield lambda done: progress.advance(task, done)


MAX_REPORTED = 100
"""Lines that were not understood are reported one by one up to here, then counted."""


@contextmanager
def skipping() -> Iterator[Callable[[int, str], None]]:
    """Yield what to tell of a line (from 1) and the column that was not understood; noted on standard error."""
    reported = 0

    def bad(line: int, column: str) -> None:
        nonlocal reported
        reported += 1
        if reported <= MAX_REPORTED:
            say(f"line {line}: {column} not understood; skipped")

    yield bad
    if reported > MAX_REPORTED:
        say(f"{reported - MAX_REPORTED:,} lines more not understood; skipped")
