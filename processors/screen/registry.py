"""Do-Not-Call registries (REG-2, CAL-3): the protocol, and an exact bitmap that is read where it lies.

Grammar of a bitmap file, version 1; integers are little-endian:

    magic     8 bytes  "SVBITMAP"
    version   2 bytes  1
    length    4 bytes  of the header
    header    JSON object: name, country, calling_code, as_of and loaded_at (Unix seconds), count,
              sha256 (of the rest)
    index     10^6 × 4 bytes  by the first six of ten national digits: page number from 1, or 0 for no page
    pages     n × 1,250 bytes  bit (d & 7) of byte (d >> 3) says whether the last four digits d are listed

Pages are numbered in the order of the index, each used once. There are no false positives. No I/O here: a
buffer is given, usually a memory-mapped file. An error names a file and a line number, never a line.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Annotated, Final, Literal, Protocol

import msgspec

from schemas.errors import RegistryInvalid

MAGIC: Final = b"SVBITMAP"
VERSION: Final = 1
NATIONAL_DIGITS: Final = 10
PREFIXES: Final = 10**6
PAGE_NUMBERS: Final = 10_000
PAGE_BYTES: Final = PAGE_NUMBERS // 8
DAY_S: Final = 86_400

_PREAMBLE = Struct("<8sHI")
_PAGE_NUMBER = Struct("<I")
_INDEX_BYTES = PREFIXES * _PAGE_NUMBER.size

Readable = bytes | bytearray | memoryview
Freshness = Literal["fresh", "stale"]


class Registry(Protocol):
    """A list of numbers that asked not to be called or texted."""

    @property
    def name(self) -> str:
        """The name under which a policy speaks of it."""

    @property
    def country(self) -> str:
        """Whose list it is: ISO 3166-1 alpha-2."""

    @property
    def as_of_s(self) -> int:
        """The list's own date, in Unix seconds; its age counts from here."""

    def lists(self, number: str) -> bool:
        """Return whether an E.164 number is listed; exact. Never raises."""


def age_s(as_of_s: int, now_s: int) -> int:
    """Return how old a list is in seconds; never below 0."""
    return max(0, now_s - as_of_s)


def freshness(max_age_days: int, as_of_s: int, now_s: int) -> Freshness:
    """Return whether a list may be used: fresh up to and including `max_age_days` (REG-2: 31), then stale."""
    return "fresh" if age_s(as_of_s, now_s) <= max_age_days * DAY_S else "stale"


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bitmap file says about itself; instants in Unix seconds, `sha256` in hex digits."""

    name: str
    country: str
    calling_code: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,3}$")]
    as_of: int
    loaded_at: int
    count: Annotated[int, msgspec.Meta(ge=1)]
    sha256: str


class BitmapRegistry:
    """A registry in a buffer, which it keeps alive. Opening reads all of it once, to verify it.

    Raises RegistryInvalid if the buffer is not a whole and sound bitmap file.
    """

    __slots__ = ("_buffer", "_index", "_pages", "_prefix", "header")

    def __init__(self, buffer: Readable) -> None:
        """Take the whole file; at least 4 MB."""
        self._buffer = view = memoryview(buffer)
        if len(view) < _PREAMBLE.size:
            raise RegistryInvalid("truncated; load the registry again")
        magic, version, length = _PREAMBLE.unpack_from(view)
        if magic != MAGIC:
            raise RegistryInvalid("not a registry bitmap; load the registry again")
        if version != VERSION:
            raise RegistryInvalid(f"bitmap version {version} is not {VERSION}; load the registry again")
        self._index = _PREAMBLE.size + length
        first_page = self._index + _INDEX_BYTES
        pages, odd_bytes = divmod(len(view) - first_page, PAGE_BYTES)
        if pages < 0 or odd_bytes:
            raise RegistryInvalid("truncated; load the registry again")
        try:
            self.header = msgspec.json.decode(view[_PREAMBLE.size : self._index], type=Header)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise RegistryInvalid("bitmap header is damaged; load the registry again") from None
        index = array("I", view[self._index : first_page].tobytes())
        if sys.byteorder == "big":
            index.byteswap()
        if list(filter(None, index)) != list(range(1, pages + 1)):
            raise RegistryInvalid("bitmap index is damaged; load the registry again")
        if hashlib.sha256(view[self._index :]).hexdigest() != self.header.sha256:
            raise RegistryInvalid("bitmap is damaged: its checksum differs; load the registry again")
        self._pages = first_page - PAGE_BYTES
        self._prefix = "+" + self.header.calling_code

    def __repr__(self) -> str:
        return f"BitmapRegistry({self.name}, {self.header.count} numbers)"

    @property
    def name(self) -> str:
        """The name under which a policy speaks of it."""
        return self.header.name

    @property
    def country(self) -> str:
        """Whose list it is: ISO 3166-1 alpha-2."""
        return self.header.country

    @property
    def as_of_s(self) -> int:
        """The list's own date, in Unix seconds."""
        return self.header.as_of

    def lists(self, number: str) -> bool:
        """Return whether an E.164 number is listed; False for another calling code or length. Under 1 µs."""
        national = number[len(self._prefix) :]
        if len(national) != NATIONAL_DIGITS or not (number.startswith(self._prefix) and national.isdecimal()):
            return False
        prefix, line = divmod(int(national), PAGE_NUMBERS)
        (page,) = _PAGE_NUMBER.unpack_from(self._buffer, self._index + prefix * _PAGE_NUMBER.size)
        return bool(page and self._buffer[self._pages + page * PAGE_BYTES + (line >> 3)] >> (line & 7) & 1)


class BitmapBuilder:
    """Collects national numbers into pages: up to 1,250 bytes of memory per area code and exchange in use."""

    __slots__ = ("_pages",)

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def add(self, numbers: Iterable[int]) -> None:
        """Add numbers of ten national digits, in any order, repeats allowed. Raises ValueError for others."""
        pages = self._pages
        for number in numbers:
            prefix, line = divmod(number, PAGE_NUMBERS)
            if not 0 <= prefix < PREFIXES:
                raise ValueError("not a number of ten national digits")
            page = pages.get(prefix)
            if page is None:
                page = pages[prefix] = bytearray(PAGE_BYTES)
            page[line >> 3] |= 1 << (line & 7)

    def finish(
        self, *, name: str, country: str, calling_code: str, as_of_s: int, loaded_at_s: int
    ) -> tuple[Header, list[bytes | bytearray]]:
        """Return the header and the file in chunks. Raises RegistryInvalid if there is no number at all."""
        if not self._pages:
            raise RegistryInvalid("the list holds no number; give the whole list")
        index, pages = bytearray(_INDEX_BYTES), []
        for number, (prefix, page) in enumerate(sorted(self._pages.items()), 1):
            _PAGE_NUMBER.pack_into(index, prefix * _PAGE_NUMBER.size, number)
            pages.append(page)
        digest = hashlib.sha256(index)
        for page in pages:
            digest.update(page)
        header = Header(
            name=name,
            country=country,
            calling_code=calling_code,
            as_of=as_of_s,
            loaded_at=loaded_at_s,
            count=sum(int.from_bytes(page, "little").bit_count() for page in pages),
            sha256=digest.hexdigest(),
        )
        encoded = msgspec.json.encode(header)
        return header, [_PREAMBLE.pack(MAGIC, VERSION, len(encoded)), encoded, index, *pages]


def parse_us(lines: Iterable[bytes], file: str) -> Iterator[int]:
    r"""Yield the national numbers of the US list's format: lines `areacode,number` of 3 and 7 digits.

    Lines end in \n or \r\n. Blank lines are skipped. Raises RegistryInvalid with `file` and the line's
    number, counted from 1.
    """
    for line_number, line in enumerate(lines, 1):
        text = line.rstrip(b"\r\n")
        digits = text[:3] + text[4:]
        if len(text) == 11 and text[3:4] == b"," and digits.isdigit():
            yield int(digits)
        elif text.strip():
            raise RegistryInvalid("expected areacode,number: 3 and 7 digits", file=file, line=line_number)
