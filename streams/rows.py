"""Files of entries: CSV with a header, one entry a line.

What is not understood is told by line and column; what stood there is never repeated.
"""

import csv
import gc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Final, NamedTuple

import phonenumbers

from schemas.errors import InputInvalid
from schemas.fields import Kind, Party

LINE: Final = "line"
"""The column that a line has wrong which is not one of CSV, or has not as many cells as the header."""
NOT_A_LINE: Final = "the line is not one of CSV with as many cells as the header"
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d))?")
MIN_DIGITS: Final = 7
"""Fewer are nobody's number."""
_SEPARATORS = re.compile(r"[\s().\-/_]+")
_END_S: Final = int(datetime(9000, 1, 1, tzinfo=UTC).timestamp())


class RowInvalid(InputInvalid):
    """An entry is not valid; `column` says where."""

    def __init__(self, column: str, words: str) -> None:
        """Take the column, and what may stand in it."""
        self.column = column
        super().__init__(words)


class Loaded(NamedTuple):
    """What came of a file: lines read that are not blank, entries written, lines not understood."""

    lines: int
    written: int
    bad: int


class Line(NamedTuple):
    """A line of a file, from 1, and its cells that are not empty by column; None: it is not understood."""

    number: int
    given: dict[str, str] | None

    def __repr__(self) -> str:
        return f"Line({self.number})"


def pages(
    lines: Iterable[bytes], columns: Sequence[str], needed: Sequence[str], size: int, advance: Callable[[int], None]
) -> Iterator[list[Line]]:
    """Yield the lines of a CSV file that are not blank, `size` or less at a time; `advance` is told of bytes read.

    The first line must name its columns: those needed, and any others of `columns`. Raises InputInvalid otherwise. What
    there is by the end of a page is kept from the garbage collector until the last: what a file of millions leaves in
    memory lives long, and looking through it again and again takes a fifth of the time.
    """
    source = iter(lines)
    first = next(source, b"")
    names = _header(first.removeprefix(b"\xef\xbb\xbf"), columns, needed)
    advance(len(first))
    number = 1
    try:
        while chunk := list(islice(source, size)):
            apart = (_line(at, raw, names) for at, raw in enumerate(chunk, number + 1))
            found = [line for line in apart if line is not None]
            number += len(chunk)
            yield found
            advance(sum(map(len, chunk)))
            gc.freeze()
    finally:
        gc.unfreeze()


def _line(number: int, raw: bytes, names: Sequence[str]) -> Line | None:
    """Return a line taken apart; None if it is blank."""
    if not raw.strip():
        return None
    cells = _cells(raw)
    if cells is None or len(cells) != len(names):
        return Line(number, None)
    return Line(number, {name: text for name, cell in zip(names, cells, strict=True) if (text := cell.strip())})


def _header(line: bytes, columns: Sequence[str], needed: Sequence[str]) -> list[str]:
    names = [cell.strip().lower() for cell in _cells(line) or ()]
    if not set(needed) <= set(names) <= set(columns) or len(set(names)) < len(names):
        rest = [name for name in columns if name not in needed]
        raise InputInvalid(f"the first line must name the columns: {', '.join(needed)}, and any of {', '.join(rest)}")
    return names


def _cells(line: bytes) -> list[str] | None:
    """Return the cells of one line. No cell spans lines, so that a stray quote cannot swallow the rest of a file."""
    try:
        return next(csv.reader((line.decode().rstrip("\r\n"),), strict=True), [])
    except (UnicodeDecodeError, csv.Error):
        return None


def instant_s(text: str) -> int:
    """Return the Unix seconds of an RFC 3339 instant or a date (its first UTC second), of 1970 to 8999.

    Raises ValueError for anything else.
    """
    if not _INSTANT.fullmatch(text):
        raise ValueError("another layout")
    at = datetime.fromisoformat(text.upper())
    at_s = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    if not 0 <= at_s < _END_S:  # what is counted from it must be an instant too
        raise ValueError("another age")
    return int(at_s)


def spells_out(text: str, party: Party) -> bool:
    """Return whether a text that stands in the clear spells out the person's number, national or whole, or address."""
    if party.kind is not Kind.NUMBER:
        value = party.value.lstrip("+")
        return len(value) >= MIN_DIGITS and value in text.lower()
    digits = _SEPARATORS.sub("", text)
    return party.value[-MIN_DIGITS:] in digits and (national(party.value) or party.value[1:]) in digits


def national(number: str) -> str | None:
    """Return the digits of an E.164 number without its country code; None: of no known country, or too few."""
    try:
        digits = phonenumbers.national_significant_number(phonenumbers.parse(number))
    except phonenumbers.NumberParseException:
        return None
    return digits if len(digits) >= MIN_DIGITS else None
