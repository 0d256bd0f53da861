"""Builds registry files (processors/screen/registry.py) out of arrays of numbers, hundreds of millions if need be.

Numbers are whole E.164 numbers of 7 to 15 digits, in any order, repeats allowed. They lie in pages, or wait as they
are for as long as pages would take more memory. No Python object is made for a number.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from processors.screen.registry import (
    ENTRY_BYTES,
    HASHED_FROM,
    MAGIC,
    MAX_DIGITS,
    MIN_DIGITS,
    MOST,
    PAGE_BYTES,
    PAGE_NUMBERS,
    PREAMBLE,
    VERSION,
    Buckets,
    Header,
    Range,
    Readable,
    RegistryFile,
    buckets_of,
    padded,
    pages_of,
)
from schemas.errors import RegistryInvalid

Numbers = npt.NDArray[np.int64]
"""E.164 numbers without `+`, as whole numbers."""
_Entries = npt.NDArray[np.uint32]

_POWERS = 10 ** np.arange(MAX_DIGITS + 1, dtype=np.int64)
_CHUNK_PAGES = 4096
_WAITING_LIMIT = 1 << 18
"""So many numbers (2 MB) wait before it is asked whether pages would do."""
_SPAN_LIMIT = 20_000_000
"""Numbers further apart than so many pages (80 MB of index) are not put into pages while more may come."""


class Built(NamedTuple):
    """A registry file: its header, and its bytes in chunks, which can be had more than once."""

    header: Header
    preamble: bytes
    body: "_Body"

    def chunks(self) -> Iterator[Readable]:
        """Yield the file from its first byte to its last."""
        yield self.preamble
        yield from self.body.chunks()


class _Pages:
    """The pages of numbers of one length: `slots` says for each from `first` on where its bits lie, from 1, or 0."""

    __slots__ = ("first", "slots")

    def __init__(self, first: int, slots: _Entries) -> None:
        self.first = first
        self.slots = slots

    def span(self, low: int, high: int) -> int:
        """Return how many entries there would be with the pages from `low` to `high` among them."""
        return max(high + 1, self.first + len(self.slots)) - min(low, self.first)

    def reach(self, low: int, high: int) -> None:
        """Make entries for the pages from `low` to `high`."""
        size = self.span(low, high)
        if size != len(self.slots):
            first, wider = min(low, self.first), np.zeros(size, np.uint32)
            wider[self.first - first : self.first - first + len(self.slots)] = self.slots
            self.first, self.slots = first, wider


class RegistryBuilder:
    """Collects numbers: takes as much memory as the pages of the file, or 32 bytes a number where those would be more.

    Raises RegistryInvalid as `RegistryFile` if `base` is not sound.
    """

    def __init__(self, base: RegistryFile | None = None) -> None:
        """Start with a copy of the numbers of `base`."""
        self._waiting: list[Numbers] = []
        self._count_waiting = 0
        self._in_order = False
        self._limit = _WAITING_LIMIT
        self._ranges: dict[int, _Pages] | None = None  # None: all wait
        self._bits = np.zeros(0, np.uint8)
        self._used = 0
        if base is not None:
            self._copy(base)

    def _copy(self, base: RegistryFile) -> None:
        buckets, ranges = base.header.buckets, base.header.pages
        if buckets is not None:
            starts, quotients = buckets_of(base.body, base.count, buckets)
            lengths = np.asarray(np.diff(np.array(starts, np.int64)), np.int64)
            bucket = np.repeat(np.arange(buckets.size, dtype=np.int64), lengths)
            self._wait(np.array(quotients, np.int64) * buckets.size + bucket)
        elif ranges is not None:
            index, pages = pages_of(base.body, ranges)
            entries = np.array(index, np.uint32)
            ends = np.cumsum([one.size for one in ranges])[:-1]
            parts = zip(ranges, np.split(entries, ends), strict=True)
            self._ranges = {one.digits: _Pages(one.first, part) for one, part in parts}
            self._bits, self._used = np.array(pages, np.uint8), len(pages) // PAGE_BYTES

    # --- numbers in and out

    def add(self, numbers: Numbers) -> None:
        """Add numbers. Raises ValueError if one has not 7 to 15 digits; then none is added."""
        for digits, part in _by_digits(numbers):
            if self._ranges is not None:
                page = part // PAGE_NUMBERS
                low, high = int(page.min()), int(page.max())
                known = self._ranges.get(digits)
                if (high - low + 1 if known is None else known.span(low, high)) <= _SPAN_LIMIT:
                    self._set(self._ranges, digits, part, page)
                    continue
                self._spread()
            self._wait(part)
            if self._count_waiting >= self._limit:
                waiting = self._settled()
                if _pages_bytes(waiting) <= 4 * waiting.nbytes:
                    self._fold(waiting)

    def remove(self, numbers: Numbers) -> None:
        """Remove numbers; one that is not there is passed over. Raises ValueError as `add`."""
        parts = list(_by_digits(numbers))
        if self._ranges is None:
            waiting = self._settled()
            kept = np.ones(len(waiting), np.bool_)
            at = np.searchsorted(waiting, numbers)
            at, numbers = at[at < len(waiting)], numbers[at < len(waiting)]
            kept[at[waiting[at] == numbers]] = False
            self._waiting, self._count_waiting = [waiting[kept]], int(kept.sum())
            return
        for digits, part in parts:
            known = self._ranges.get(digits)
            if known is None:
                continue
            page = part // PAGE_NUMBERS
            entry, rest = page - known.first, part - page * PAGE_NUMBERS
            here = (entry >= 0) & (entry < len(known.slots))
            entry, rest = entry[here], rest[here]
            slots = known.slots[entry]
            at, mask = _places(slots[slots != 0], rest[slots != 0])
            np.bitwise_and.at(self._bits, at, ~mask)

    def numbers(self) -> Iterator[Numbers]:
        """Yield all numbers, each once."""
        if self._ranges is None:
            yield self._settled()
        for digits in sorted(self._ranges or {}):
            yield from self._paged(digits)

    def count(self) -> int:
        """Return how many different numbers there are. Takes 0.1 s for 250 million."""
        if self._ranges is None:
            return len(self._settled())
        step = _CHUNK_PAGES * PAGE_BYTES
        used = self._bits[: self._used * PAGE_BYTES]
        return sum(int(np.bitwise_count(used[at : at + step]).sum(dtype=np.int64)) for at in range(0, len(used), step))

    def _wait(self, numbers: Numbers) -> None:
        self._waiting.append(numbers)
        self._in_order = False
        self._count_waiting += len(numbers)

    def _settled(self) -> Numbers:
        """Return what waits, ascending, each once."""
        if self._in_order and len(self._waiting) == 1:
            return self._waiting[0]
        whole = _once(np.concatenate(self._waiting)) if self._waiting else np.zeros(0, np.int64)
        self._in_order = True
        self._waiting, self._count_waiting = [whole], len(whole)
        self._limit = max(_WAITING_LIMIT, 2 * len(whole))
        return whole

    def _fold(self, waiting: Numbers) -> None:
        """Put what waited into pages."""
        self._waiting, self._count_waiting, self._ranges = [], 0, {}
        for digits, part in _by_digits(waiting):
            self._set(self._ranges, digits, part, part // PAGE_NUMBERS)

    def _spread(self) -> None:
        """Take everything out of the pages again: it waits."""
        parts = list(self.numbers())
        self._ranges, self._bits, self._used = None, np.zeros(0, np.uint8), 0
        self._waiting, self._count_waiting, self._in_order = parts, sum(map(len, parts)), False
        self._settled()

    def _paged(self, digits: int) -> Iterator[Numbers]:
        """Yield the numbers in pages of one length, ascending."""
        known = (self._ranges or {})[digits]
        used = np.flatnonzero(known.slots)
        bits = self._bits[: self._used * PAGE_BYTES].reshape(-1, PAGE_BYTES)
        for at in range(0, len(used), _CHUNK_PAGES):
            entry = used[at : at + _CHUNK_PAGES]
            ones = np.unpackbits(bits[known.slots[entry] - 1], axis=1, bitorder="little")
            page, rest = np.nonzero(ones)
            yield (entry[page] + known.first) * PAGE_NUMBERS + rest

    def _set(self, ranges: dict[int, _Pages], digits: int, numbers: Numbers, page: Numbers) -> None:
        low, high = int(page.min()), int(page.max())
        known = ranges.get(digits)
        if known is None:
            known = ranges[digits] = _Pages(low, np.zeros(high - low + 1, np.uint32))
        known.reach(low, high)
        entry = page - known.first
        lacking = entry[known.slots[entry] == 0]
        if len(lacking):
            known.slots[lacking] = MOST  # a mark, for they are in any order, and more than once
            new = np.flatnonzero(known.slots == MOST)
            known.slots[new] = np.arange(self._used + 1, self._used + len(new) + 1, dtype=np.uint32)
            self._used += len(new)
            if self._used * PAGE_BYTES > len(self._bits):
                wider = np.zeros(max(self._used * PAGE_BYTES, len(self._bits) * 3 // 2), np.uint8)
                wider[: len(self._bits)] = self._bits
                self._bits = wider
        at, mask = _places(known.slots[entry], numbers - page * PAGE_NUMBERS)
        np.bitwise_or.at(self._bits, at, mask)

    # --- the file

    def finish(self, *, name: str, country: str, as_of_s: int, loaded_at_s: int) -> Built:
        """Return the file, in the smaller encoding. Raises RegistryInvalid if there is no number at all."""
        count = self.count()
        if not count:
            raise RegistryInvalid("the list would hold no number; give the whole list")
        if count >= MOST:
            raise RegistryInvalid("the list holds more numbers than there are telephones")
        body = self._smaller(count)
        header = Header(
            name=name,
            country=country,
            as_of=as_of_s,
            loaded_at=loaded_at_s,
            count=count,
            pages=body.ranges if isinstance(body, _PagesBody) else None,
            buckets=body.buckets if isinstance(body, _BucketsBody) else None,
        )
        encoded = msgspec.json.encode(header)
        start = encoded.ljust(padded(HASHED_FROM + len(encoded)) - HASHED_FROM, b"\0")
        digest = hashlib.sha256(start)
        for chunk in body.chunks():
            digest.update(chunk)
        preamble = PREAMBLE.pack(MAGIC, VERSION, len(encoded), digest.digest())
        return Built(header, preamble + start, body)

    def _smaller(self, count: int) -> "_Body":
        if self._ranges is None:
            waiting = self._settled()
            if _buckets_bytes(count, int(waiting[-1])) < _pages_bytes(waiting):
                return _BucketsBody(waiting)
            self._fold(waiting)
        ranges = self._ranges or {}
        body = _PagesBody(ranges, self._bits)
        greatest = max((one.first + one.size) * PAGE_NUMBERS for one in body.ranges)
        if _buckets_bytes(count, greatest) >= body.size_bytes:
            return body
        self._spread()
        return _BucketsBody(self._settled())


class _PagesBody:
    """Index and pages, without pages that hold nothing."""

    def __init__(self, ranges: dict[int, _Pages], bits: npt.NDArray[np.uint8]) -> None:
        kept, found = [], []
        self._bits = bits[: len(bits) // PAGE_BYTES * PAGE_BYTES].reshape(-1, PAGE_BYTES)
        slots = 0
        for digits in sorted(ranges):
            one = ranges[digits]
            used = np.flatnonzero(one.slots)
            order = one.slots[used] - 1
            steps = range(0, len(order), _CHUNK_PAGES)
            full = [self._bits[order[at : at + _CHUNK_PAGES]].any(axis=1) for at in steps]
            holds = np.concatenate(full) if full else np.zeros(0, np.bool_)
            used, order = used[holds], order[holds]
            if not len(used):
                continue
            low, size = int(used[0]), int(used[-1] - used[0]) + 1
            index = np.zeros(size, np.uint32)
            index[used - low] = np.arange(slots + 1, slots + len(used) + 1, dtype=np.uint32)
            slots += len(used)
            found.append(Range(digits=digits, first=one.first + low, size=size))
            kept.append((index, order))
        self.ranges = tuple(found)
        self._index = [index for index, _ in kept]
        self._order = np.concatenate([order for _, order in kept])
        self.size_bytes = sum(one.nbytes for one in self._index) + slots * PAGE_BYTES

    def chunks(self) -> Iterator[Readable]:
        for index in self._index:
            yield index.data
        for at in range(0, len(self._order), _CHUNK_PAGES):
            yield self._bits[self._order[at : at + _CHUNK_PAGES]].data.cast("B")


class _BucketsBody:
    """Starts and quotients."""

    def __init__(self, numbers: Numbers) -> None:
        size = _bucket_count(len(numbers))
        width = _width(int(numbers[-1]), size)
        quotients, bucket = np.divmod(numbers, size)
        order = np.argsort(bucket, kind="stable")  # the numbers ascend, and so do the quotients of a bucket
        self._quotients = quotients[order].astype(np.uint32 if width == ENTRY_BYTES else np.uint64)
        self._starts = np.zeros(padded((size + 1) * ENTRY_BYTES) // ENTRY_BYTES, np.uint32)
        self._starts[1 : size + 1] = np.cumsum(np.bincount(bucket, minlength=size))
        self.buckets = Buckets(size=size, width=width)

    def chunks(self) -> Iterator[Readable]:
        yield self._starts.data
        yield self._quotients.data


_Body = _PagesBody | _BucketsBody


def _once(numbers: Numbers) -> Numbers:
    """Return the numbers, ascending, each once; np.unique hashes, at twenty times the price."""
    ascending = np.sort(numbers)
    new = np.ones(len(ascending), np.bool_)
    new[1:] = ascending[1:] != ascending[:-1]
    return ascending[new]


def _by_digits(numbers: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Yield the numbers of each length there is. Raises ValueError, before the first, if one is too short or long."""
    if not len(numbers):
        return
    least, most = int(numbers.min()), int(numbers.max())
    if least < _POWERS[MIN_DIGITS - 1] or most >= _POWERS[MAX_DIGITS]:
        raise ValueError("numbers have 7 to 15 digits")
    lengths = range(len(str(least)), len(str(most)) + 1)
    for digits in lengths:
        part = numbers
        if len(lengths) > 1:
            part = numbers[(numbers >= _POWERS[digits - 1]) & (numbers < _POWERS[digits])]
        if len(part):
            yield digits, part


def _places(slots: _Entries, rest: Numbers) -> tuple[Numbers, npt.NDArray[np.uint8]]:
    """Return for each number the byte of the pages, and the bit in it."""
    at = (slots.astype(np.int64) - 1) * PAGE_BYTES + (rest >> 3)
    return at, np.left_shift(1, rest & 7).astype(np.uint8)


def _pages_bytes(numbers: Numbers) -> int:
    """Return how much index and pages of ascending numbers would take."""
    total = 0
    for _, part in _by_digits(numbers):
        page = part // PAGE_NUMBERS
        total += (int(page[-1] - page[0]) + 1) * ENTRY_BYTES
        total += (int(np.count_nonzero(np.diff(page))) + 1) * PAGE_BYTES
    return total


def _bucket_count(count: int) -> int:
    """Return how many buckets so many numbers have: about two in each, and prime to 10, so that they spread."""
    size = count // 2 | 1
    return size if size == 1 or size % 5 else size + 2


def _width(greatest: int, size: int) -> Literal[4, 8]:
    return 4 if greatest // size <= MOST else 8


def _buckets_bytes(count: int, greatest: int) -> int:
    """Return how much starts and quotients would take."""
    size = _bucket_count(count)
    return (size + 1) * ENTRY_BYTES + count * _width(greatest, size)
