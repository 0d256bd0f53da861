"""Do-Not-Call registries (REG-2, CAL-3): the protocol, and an exact set of numbers that is read where it lies.

Grammar of a registry file, version 2. Integers are little-endian; a number is E.164 without `+`, 7 to 15 digits:

    magic     8 bytes   "SVBITMAP"
    version   2 bytes   2
    length    4 bytes   of the header
    sha256    32 bytes  of everything that follows, header and all
    header    JSON object: name, country, as_of and loaded_at (Unix seconds), count, and one of
                pages    [{digits, first, size}, …]: which index entries there are, by the digits of a number
                buckets  {size, width}
    zeros     up to the next multiple of 8
    body      as the header says

`pages`, for lists that fill their number ranges: 1.25 KB for each 10,000 numbers of which one is listed.

    index     4 bytes for each page that might be, range after range, as `pages` says: the page's number from 1, or 0
    pages     n × 1,250 bytes, numbered in the order of the index: bit (d & 7) of byte (d >> 3) says whether the number
              is listed whose last four digits are d

`buckets`, for all others: about 6 bytes a number.

    starts    4 bytes × (size + 1), then zeros up to the next multiple of 8: where in `quotients` each bucket starts
    quotients width bytes × count: number // size, ascending in the bucket that number % size is

`processors/screen/registry_build.py` takes what is smaller. There are no false positives. No I/O here: a buffer is
given, usually a memory-mapped file. An error never holds a number.
"""

import hashlib
import sys
from bisect import bisect_left
from collections.abc import Callable
from struct import Struct
from typing import Annotated, Final, Literal, Protocol

import msgspec
import numpy as np

from schemas.errors import RegistryInvalid

MAGIC: Final = b"SVBITMAP"
VERSION: Final = 2
MIN_DIGITS: Final = 7
MAX_DIGITS: Final = 15
PAGE_NUMBERS: Final = 10_000
PAGE_BYTES: Final = PAGE_NUMBERS // 8
DAY_S: Final = 86_400

PREAMBLE: Final = Struct("<8sHI32s")
HASHED_FROM: Final = PREAMBLE.size
ENTRY_BYTES: Final = 4
MOST: Final = 2**32 - 1
"""Numbers, pages and buckets are counted in 4 bytes."""
_AGAIN = "load the registry again"

Readable = bytes | bytearray | memoryview
Freshness = Literal["fresh", "stale"]
Encoding = Literal["pages", "buckets"]


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

    @property
    def count(self) -> int:
        """How many numbers are listed."""

    def lists(self, number: str) -> bool:
        """Return whether an E.164 number is listed; exact. Never raises, never blocks; well under 1 µs."""


class RegistryView(Protocol):
    """The registries in force."""

    def get(self, name: str) -> Registry | None:
        """Return a registry, or None if it is not loaded. Never blocks; what was returned stays valid after a swap."""


def age_s(as_of_s: int, now_s: float) -> float:
    """Return how old a list is in seconds; never below 0."""
    return max(0, now_s - as_of_s)


def freshness(max_age_days: int, as_of_s: int, now_s: float) -> Freshness:
    """Return whether a list may be used: fresh up to and including `max_age_days` (REG-2: 31), then stale."""
    return "fresh" if age_s(as_of_s, now_s) <= max_age_days * DAY_S else "stale"


# --- the file -----------------------------------------------------------------------------------------------


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the header."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Range(_Part, frozen=True, kw_only=True):
    """Index entries of numbers of `digits` digits: `size` pages, from the one of the numbers `first` × 10,000 on."""

    digits: Annotated[int, msgspec.Meta(ge=MIN_DIGITS, le=MAX_DIGITS)]
    first: Annotated[int, msgspec.Meta(ge=0, le=10**11)]
    size: Annotated[int, msgspec.Meta(ge=1, le=10**11)]


class Buckets(_Part, frozen=True, kw_only=True):
    """How many buckets there are, and how many bytes a quotient takes."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MOST)]
    width: Literal[4, 8]


class Header(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What a registry file says about itself; instants in Unix seconds. Either `pages` or `buckets` is there."""

    name: str
    country: str
    as_of: int
    loaded_at: int
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST)]
    pages: tuple[Range, ...] | None = None
    buckets: Buckets | None = None


class RegistryFile:
    """A registry in a buffer, which it keeps alive. Opening reads all of it once, to verify it.

    Raises RegistryInvalid if the buffer is not a whole and sound registry file. That read lets other threads run.
    """

    __slots__ = ("_body", "_buffer", "header", "lists", "size_bytes")

    lists: Callable[[str], bool]
    """Return whether an E.164 number is listed. What is no E.164 number is not. Never raises; 0.3 to 0.4 µs."""

    def __init__(self, buffer: Readable) -> None:
        """Take the whole file."""
        self._buffer = view = memoryview(buffer)
        self.size_bytes = len(view)
        if sys.byteorder != "little":  # as numpy and memoryview.cast read it
            raise RegistryInvalid("registry files are read on little-endian machines only")
        if len(view) < PREAMBLE.size:
            raise RegistryInvalid(f"truncated; {_AGAIN}")
        magic, version, length, digest = PREAMBLE.unpack_from(view)
        if magic != MAGIC:
            raise RegistryInvalid(f"not a registry file; {_AGAIN}")
        if version != VERSION:
            raise RegistryInvalid(f"registry file version {version} is not {VERSION}; {_AGAIN}")
        if hashlib.sha256(view[HASHED_FROM:]).digest() != digest:
            raise RegistryInvalid(f"damaged: the checksum differs; {_AGAIN}")
        try:
            self.header = msgspec.json.decode(view[HASHED_FROM : HASHED_FROM + length], type=Header)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise RegistryInvalid(f"damaged header; {_AGAIN}") from None
        self._body = padded(HASHED_FROM + length)
        body = self.body
        ranges, buckets = self.header.pages, self.header.buckets
        if ranges is not None and buckets is None:
            self.lists = _look_into_pages(ranges, *pages_of(body, ranges))
        elif buckets is not None and ranges is None:
            self.lists = _look_into_buckets(buckets, *buckets_of(body, self.header.count, buckets))
        else:
            raise RegistryInvalid(f"damaged header; {_AGAIN}")

    def __repr__(self) -> str:
        return f"RegistryFile({self.name}, {self.header.count} numbers)"

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

    @property
    def count(self) -> int:
        """How many numbers are listed."""
        return self.header.count

    @property
    def encoding(self) -> Encoding:
        """How the numbers are written."""
        return "buckets" if self.header.pages is None else "pages"

    @property
    def body(self) -> memoryview:
        """What follows the header."""
        return self._buffer[self._body :]


def least_page(digits: int) -> int:
    """Return the page of the least number of so many digits."""
    return int(10 ** (digits - 1)) // PAGE_NUMBERS


def padded(size: int) -> int:
    """Return the next multiple of 8."""
    return -(-size // 8) * 8


def pages_of(body: memoryview, ranges: tuple[Range, ...]) -> tuple[memoryview, memoryview]:
    """Return index and pages. Raises RegistryInvalid unless every page is there, and used once, in order."""
    entries = sum(one.size for one in ranges)
    sound = all(least_page(one.digits) <= one.first <= least_page(one.digits + 1) - one.size for one in ranges)
    if not sound or [one.digits for one in ranges] != sorted({one.digits for one in ranges}):
        raise RegistryInvalid(f"damaged header; {_AGAIN}")
    index, pages = body[: entries * ENTRY_BYTES], body[entries * ENTRY_BYTES :]
    count, odd_bytes = divmod(len(pages), PAGE_BYTES)
    if odd_bytes or len(index) != entries * ENTRY_BYTES:
        raise RegistryInvalid(f"damaged index; {_AGAIN}")
    used = np.frombuffer(index, np.uint32)
    used = used[used != 0]
    if len(used) != count or not np.array_equal(used, np.arange(1, count + 1, dtype=np.uint32)):
        raise RegistryInvalid(f"damaged index; {_AGAIN}")
    return index.cast("I"), pages


def _look_into_pages(ranges: tuple[Range, ...], index: memoryview, pages: memoryview) -> Callable[[str], bool]:
    """Return the look-up. The length of the text chooses the range, so that `+` and each leading digit count."""
    at, of_length = 0, {}
    for one in ranges:
        of_length[one.digits + 1] = (one.first, one.size, index[at : at + one.size])
        at += one.size
    range_of, nothing = of_length.get, (0, 0, index)

    def lists(number: str) -> bool:
        try:
            value = int(number)
        except ValueError:
            return False
        first, size, entries = range_of(len(number), nothing)
        at = value // 10_000 - first
        if 0 <= at < size:
            page = entries[at]
            if page:
                value %= 10_000
                return pages[page * 1250 + (value >> 3) - 1250] >> (value & 7) & 1 == 1
        return False

    return lists


def buckets_of(body: memoryview, count: int, buckets: Buckets) -> tuple[memoryview, memoryview]:
    """Return starts and quotients. Raises RegistryInvalid unless the starts ascend from 0 to the count."""
    until = (buckets.size + 1) * ENTRY_BYTES
    starts, quotients = body[:until], body[padded(until) :]
    if len(starts) != until or len(quotients) != count * buckets.width:
        raise RegistryInvalid(f"damaged index; {_AGAIN}")
    found = np.frombuffer(starts, np.uint32)
    if found[0] != 0 or found[-1] != count or (found[1:] < found[:-1]).any():
        raise RegistryInvalid(f"damaged index; {_AGAIN}")
    return starts.cast("I"), quotients.cast("I" if buckets.width == ENTRY_BYTES else "Q")


def _look_into_buckets(buckets: Buckets, starts: memoryview, quotients: memoryview) -> Callable[[str], bool]:
    """Return the look-up. The length of the text bounds the number, so that `+` and each leading digit count."""
    size = buckets.size
    bounds_of = {digits + 1: (10 ** (digits - 1), 10**digits) for digits in range(MIN_DIGITS, MAX_DIGITS + 1)}.get
    nothing = (1, 0)

    def lists(number: str) -> bool:
        try:
            value = int(number)
        except ValueError:
            return False
        low, high = bounds_of(len(number), nothing)
        if not low <= value < high:
            return False
        quotient, bucket = divmod(value, size)
        end = starts[bucket + 1]
        at = bisect_left(quotients, quotient, starts[bucket], end)
        return at < end and quotients[at] == quotient

    return lists
