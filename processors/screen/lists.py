"""Reads the files in which Do-Not-Call lists are given out (docs/registries.md): bytes → arrays of E.164 numbers.

Rules of this file: a line holds one number, or is blank; anything else is RegistryInvalid with file and line (from 1),
never with a word of the line. `_Lines.one` says what a line means. What is faster must agree with it, and leaves to it
each line that it does not know for certain. No I/O: bytes come in chunks of any size.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import phonenumbers

from processors.gateways.base import bad_key, region_of, toml, typed
from processors.screen.registry import MAX_DIGITS, MIN_DIGITS
from processors.screen.registry_build import Numbers
from schemas.errors import RegistryInvalid

_Bytes = npt.NDArray[np.uint8]
_Flags = npt.NDArray[np.bool_]
Read = Callable[[Iterable[bytes], str], Iterator[Numbers]]
"""(chunks of a file, what to call it) → its numbers. Raises RegistryInvalid at the first line that is broken."""

_POWERS = 10 ** np.arange(19, dtype=np.int64)
_NEWLINE, _RETURN, _ZERO = b"\n"[0], b"\r"[0], b"0"[0]
_BOM: Final = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_LONGEST: Final = 65_536
"""More bytes than this without a line end are no line."""
_FEW: Final = 16
"""So few lines of one length are read one by one."""

# --- mapping files ------------------------------------------------------------------------------------------

Position = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Digits = Annotated[int, msgspec.Meta(ge=1, le=MAX_DIGITS)]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a mapping file."""


class File(_Table, frozen=True, kw_only=True):
    """How the file is cut: `delimiter` divides a line into columns; without it a line has fixed positions."""

    header_lines: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    delimiter: str | None = None
    quote: bool = False


class Number(_Table, frozen=True, kw_only=True):
    """Where the number stands: `columns`, or `positions` from and to, all from 1; several are joined."""

    columns: tuple[Position, ...] = ()
    positions: tuple[tuple[Position, Position], ...] = ()
    padding: str = " "
    region: str | None = None
    lengths: tuple[Digits, ...] = ()
    international: bool = False


class Mapping(_Table, frozen=True, kw_only=True):
    """A mapping file: where in a line of a list its number stands, and how it is written."""

    number: Number
    file: File = File()


class ListFormat(msgspec.Struct, frozen=True):
    """How a list is read; `region`: whose national numbers it holds, None: numbers of any country."""

    read: Read
    region: str | None

    def calling_code(self) -> str | None:
        """Return the country calling code of the region, or None."""
        return None if self.region is None else str(phonenumbers.country_code_for_region(self.region))


def mapped(text: str, file: str) -> ListFormat:
    """Return the format that a mapping file describes. Raises InputInvalid with the key and what is allowed."""
    mapping = typed(Mapping, toml(text, file), "", file)
    cut, number = mapping.file, mapping.number
    if bool(number.columns) == bool(number.positions):
        raise bad_key("number", "name either columns or positions", file)
    if bool(number.columns) != (cut.delimiter is not None):
        raise bad_key("file.delimiter", "goes with number.columns, and only with them", file)
    if cut.delimiter is not None and not _one_byte(cut.delimiter, b'"\r\n'):
        raise bad_key("file.delimiter", "must be one ASCII character, no digit, quote or line end", file)
    if not _one_byte(number.padding, b'"\r\n'):
        raise bad_key("number.padding", "must be one ASCII character, no digit, quote or line end", file)
    if any(first > last for first, last in number.positions):
        raise bad_key("number.positions", "must go from a position to the same or a later one", file)
    if sum(last - first + 1 for first, last in number.positions) > len(_POWERS) - 1:
        raise bad_key("number.positions", f"take up to {len(_POWERS) - 1} characters", file)
    if number.international == (number.region is not None):
        raise bad_key("number", "name either region or international = true", file)
    if number.international and number.lengths:
        raise bad_key("number.lengths", "goes with region", file)
    region = region_of(number.region, "number.region", file)
    lines = _Lines(
        header_lines=cut.header_lines,
        delimiter=None if cut.delimiter is None else cut.delimiter.encode(),
        quote=cut.quote,
        columns=tuple(column - 1 for column in number.columns),
        positions=tuple((first - 1, last) for first, last in number.positions),
        padding=number.padding.encode(),
        plan=_Plan(region, number.lengths),
    )
    return ListFormat(lines.read, region)


def _one_byte(text: str, forbidden: bytes) -> bool:
    return len(text) == 1 and text.isascii() and not text.isdigit() and text.encode() not in forbidden


# --- numbers ------------------------------------------------------------------------------------------------


class _Plan:
    """What makes E.164 of the digits of a country's national numbers; without a region, of whole numbers.

    A national prefix is taken off: `0` always, where a country has it; any other only if the number is too long with
    it. A zero that is left at the start belongs to the number only in countries without a national prefix, as Italy.
    The lengths are those that the country has, unless the list says its own.
    """

    def __init__(self, region: str | None, lengths: Sequence[int] = ()) -> None:
        self.code, self.prefix = "", ""
        if region is None:
            lengths = range(MIN_DIGITS, MAX_DIGITS + 1)
        else:
            known: Any = phonenumbers.PhoneMetadata.metadata_for_region(region)
            self.code, self.prefix = str(known.country_code), known.national_prefix or ""
            lengths = lengths or known.general_desc.possible_length
        fitting = range(max(1, MIN_DIGITS - len(self.code)), MAX_DIGITS + 1 - len(self.code))
        self.lengths = frozenset(lengths).intersection(fitting)
        self.is_length = np.array([length in self.lengths for length in range(len(_POWERS))])
        self.leading_zero = bool(region) and not self.prefix

    def one(self, digits: bytes) -> int:
        """Return the number, or 0 if it is none."""
        prefix = self.prefix.encode()
        if prefix and digits.startswith(prefix):
            rest = len(digits) - len(prefix)
            if prefix == b"0" or (len(digits) not in self.lengths and rest in self.lengths):
                digits = digits[len(prefix) :]
        if len(digits) not in self.lengths or (digits.startswith(b"0") and not self.leading_zero):
            return 0
        return int(self.code.encode() + digits)

    def many(self, value: Numbers, length: Numbers) -> tuple[Numbers, _Flags]:
        """Return numbers of the values of so many digits, and which are right; the others may be too."""
        if self.prefix == "0":
            length = length - (value < _POWERS[length - 1])
        right = self.is_length[length]
        if not self.leading_zero:
            right &= value >= _POWERS[length - 1]
        return value + int(self.code or "0") * _POWERS[length], right


# --- lines --------------------------------------------------------------------------------------------------


class _Lines:
    """Lists of lines: the number is in `columns` behind delimiters, or in `positions` from and to.

    `padding` None: each part consists of digits only. Then `width` is that of every line, and `between` says what
    stands around the parts, as (position, character).
    """

    def __init__(
        self,
        *,
        plan: _Plan,
        header_lines: int = 0,
        delimiter: bytes | None = None,
        quote: bool = False,
        columns: tuple[int, ...] = (),
        positions: tuple[tuple[int, int], ...] = (),
        padding: bytes | None = None,
        between: tuple[tuple[int, bytes], ...] = (),
        width: int | None = None,
    ) -> None:
        self._plan = plan
        self._header_lines = header_lines
        self._delimiter = delimiter
        self._quote = quote
        self._columns = columns
        self._positions = positions
        self._padding = padding
        self._between = between
        self._width = width
        self._drop = _BLANK if padding is None else _BLANK + padding

    def read(self, chunks: Iterable[bytes], file: str) -> Iterator[Numbers]:
        """Yield the numbers."""
        line, skip = 1, self._header_lines
        for whole in _whole_lines(chunks):
            if not whole:
                raise RegistryInvalid("no list: a line has no end", file=file, line=line)
            block = whole
            while skip and block:
                block = block[block.index(b"\n") + 1 :]
                line, skip = line + 1, skip - 1
            if block:
                yield self._block(block, file, line)
                line += block.count(b"\n")

    def one(self, line: bytes) -> int:
        """Return the number in a line; 0: it is blank, -1: it is broken. The rule that all else agrees with."""
        text = line.rstrip(b"\r\n")
        if not text.strip(self._drop):
            return 0
        if len(text) < max((last for _, last in self._positions), default=0):
            return -1
        parts = self._cells(text) if self._delimiter else [text[first:last] for first, last in self._positions]
        if self._padding is None:
            exact = len(text) == self._width and all(text[at : at + 1] == byte for at, byte in self._between)
            if not exact:
                return -1
        else:
            parts = [part.strip(self._padding) for part in parts]
        digits = b"".join(parts)
        if self._plan.code == "":
            digits = digits[1:] if digits.startswith(b"+") else digits.removeprefix(b"00")
        elif not all(parts):
            return -1
        if not digits.isdigit():
            return -1
        return self._plan.one(digits) or -1

    def _cells(self, text: bytes) -> list[bytes]:
        """Return the cells of the number; none if one is lacking."""
        cells = text.split(self._delimiter)
        if self._quote and b'"' in text:
            cells = _quoted(text, self._delimiter or b",")
        return [cells[at] for at in self._columns] if max(self._columns) < len(cells) else [b""]

    def _block(self, block: bytes, file: str, line: int) -> Numbers:
        """Return the numbers of whole lines, of which `line` is the first."""
        data = np.frombuffer(block, np.uint8)
        width = block.index(b"\n") + 1
        rows = len(data) // width
        ends = data[width - 1 :: width]
        if rows * width == len(data) and block.count(b"\n") == rows and bool((ends == _NEWLINE).all()):
            numbers, right = self._alike(data.reshape(rows, width))
            if bool(right.all()):
                return numbers
            found, left = [numbers[right]], np.flatnonzero(~right)
            starts = left * width
            return self._with_others(found, block, starts, starts + width, left, file, line)
        stops = np.flatnonzero(data == _NEWLINE) + 1
        starts = np.concatenate((np.zeros(1, stops.dtype), stops[:-1]))
        widths = stops - starts
        found, apart = [], np.zeros(len(stops), np.bool_)
        for width in np.flatnonzero(np.bincount(widths)).tolist():
            alike = np.flatnonzero(widths == width)
            if len(alike) < _FEW:
                apart[alike] = True
                continue
            step = 1 + (1 << 22) // width
            for at in range(0, len(alike), step):
                some = alike[at : at + step]
                numbers, right = self._alike(data[starts[some][:, None] + np.arange(width)])
                found.append(numbers[right])
                apart[some[~right]] = True
        left = np.flatnonzero(apart)
        return self._with_others(found, block, starts[left], stops[left], left, file, line)

    def _with_others(
        self, found: list[Numbers], block: bytes, starts: Numbers, stops: Numbers, at: Numbers, file: str, line: int
    ) -> Numbers:
        """Return `found` and the numbers of the lines between starts and stops, read one by one."""
        others = []
        for start, stop, row in zip(starts.tolist(), stops.tolist(), at.tolist(), strict=True):
            number = self.one(block[start:stop])
            if number < 0:
                raise RegistryInvalid("not a line of this list", file=file, line=line + row)
            if number:
                others.append(number)
        return np.concatenate([*found, np.array(others, np.int64)])

    def _alike(self, lines: _Bytes) -> tuple[Numbers, _Flags]:
        """Return the numbers of lines of one length, with their ends, and which of them are sure."""
        rows, width = lines.shape
        first = lines[0].tobytes()
        right = np.ones(rows, np.bool_)
        text = len(first.rstrip(b"\r\n"))
        if text < width - 1:
            right &= (lines[:, text : width - 1] == _RETURN).all(axis=1)
        if self._width is not None and text != self._width:
            return np.zeros(rows, np.int64), np.zeros(rows, np.bool_)
        for at, byte in self._between:
            right &= lines[:, at] == byte[0]
        parts = list(self._positions)
        if self._delimiter:
            parts = self._cut(lines[:, :text], first[:text], right)
        if not parts or any(start >= stop or stop > text for start, stop in parts):
            return np.zeros(rows, np.int64), np.zeros(rows, np.bool_)
        value, length = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for start, stop in parts:
            value, length = self._part(lines, start, stop, value, length, right)
        right &= (length > 0) & (length <= MAX_DIGITS)
        numbers, fit = self._plan.many(value, np.clip(length, 1, MAX_DIGITS))
        return numbers, right & fit

    def _cut(self, lines: _Bytes, first: bytes, right: _Flags) -> list[tuple[int, int]]:
        """Return where the cells of the number stand in the first line; `right` stays where they do in others."""
        delimiter = (self._delimiter or b",")[0]
        template = np.frombuffer(first, np.uint8) == delimiter
        right &= ((lines == delimiter) == template).all(axis=1)
        if self._quote:
            right &= (lines != b'"'[0]).all(axis=1)
        edges = [-1, *np.flatnonzero(template).tolist(), len(first)]
        if max(self._columns) >= len(edges) - 1:
            return []
        return [(edges[at] + 1, edges[at + 1]) for at in self._columns]

    def _part(
        self, lines: _Bytes, start: int, stop: int, value: Numbers, length: Numbers, right: _Flags
    ) -> tuple[Numbers, Numbers]:
        """Return value and length with the digits of a part behind them."""
        if stop - start > len(_POWERS) - 1:
            right[:] = False
            return value, length
        columns = [lines[:, at] - np.uint8(_ZERO) for at in range(start, stop)]
        are = [column <= 9 for column in columns]
        all_digits = all(bool(each.all()) for each in are)
        if all_digits or self._padding is None:
            for column, each in zip(columns, are, strict=True):
                value = value * 10 + column
                if not all_digits:
                    right &= each
            return value, length + len(columns)
        padding = np.uint8((self._padding[0] - _ZERO) % 256)
        edges = are[0].astype(np.int8) + are[-1]
        for at, (column, each) in enumerate(zip(columns, are, strict=True)):
            right &= each | (column == padding)
            value = np.where(each, value * 10 + column, value)
            length = length + each
            if at:
                edges += each != are[at - 1]
        right &= edges == 2  # the digits of a part stand together, behind or before the padding
        return value, length


def _whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the chunks cut at line ends; the last line gets one if it has none. An empty one: a line does not end."""
    rest, first = b"", True
    for chunk in chunks:
        whole = rest + chunk
        if first and len(whole) < len(_BOM) and _BOM.startswith(whole):
            rest = whole
            continue
        if first:
            whole, first = whole.removeprefix(_BOM), False
        end = whole.rfind(b"\n") + 1
        if end:
            yield whole[:end]
        rest = whole[end:]
        if len(rest) > _LONGEST:
            yield b""
    if rest:
        yield rest + b"\n"


def _quoted(text: bytes, delimiter: bytes) -> list[bytes]:
    """Return the cells of a line whose cells may stand in double quotes; none if a quote is out of place."""
    rows = csv.reader((text.decode("latin-1"),), delimiter=delimiter.decode(), strict=True)
    try:
        return [cell.encode("latin-1") for cell in next(rows)]
    except csv.Error:
        return []


# --- the lists of the United States and of Canada -----------------------------------------------------------


def _area_and_number(region: str) -> _Lines:
    """Return the reader of lines `areacode,number`, of 3 and 7 digits."""
    return _Lines(plan=_Plan(region), positions=((0, 3), (4, 11)), between=((3, b","),), width=11)


_PHONES = re.compile(rb"(?:\s*+<ph\s++val\s*+=\s*+(?:'[0-9]{7}'|\"[0-9]{7}\")\s*+/>)++")
_SPACE = re.compile(rb"\s*+")
_AREA = re.compile(rb"<ac\s++val\s*+=\s*+(?:'([0-9]{3})'|\"([0-9]{3})\")\s*+>")
_AREA_END = re.compile(rb"</ac\s*+>")
_LIST = re.compile(rb"<list(?:\s[^<>]*+)?>")
_LIST_END = re.compile(rb"</list\s*+>")
_DECLARATION = re.compile(rb"<\?xml\s[^<>?]*+\?>")


class _Tags:
    """The Canadian list in XML: `ph` within `ac` within `list`. Nothing else is known, so neither entities nor DTD."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._line = 1
        self._code = int(_Plan("CA").code)
        self._area: int | None = None
        self._begun = self._open = self._closed = False

    def read(self, chunks: Iterable[bytes]) -> Iterator[Numbers]:
        """Yield the numbers."""
        rest = b""
        for chunk in chunks:
            whole = rest + chunk
            end = whole.rfind(b">") + 1
            yield from self._whole(whole[:end])
            rest = whole[end:]
            if len(rest) > _LONGEST:
                raise self._broken("no list: a tag has no end")
        yield from self._whole(rest)
        if self._area is not None or (self._open and not self._closed):
            raise self._broken("the file ends before the list does")

    def _whole(self, text: bytes) -> Iterator[Numbers]:
        at = 0
        while at < len(text):
            found = _PHONES.match(text, at) if self._area is not None else None
            if found is None:
                tag = _after(_SPACE.match(text, at), at)
                self._pass(text, at, tag)
                at = tag
                if at == len(text):
                    return
                found = self._tag(text, at)
            else:
                data = np.frombuffer(found[0], np.uint8) - np.uint8(_ZERO)
                digits = data[data <= 9].reshape(-1, 7).astype(np.int64)
                yield digits @ _POWERS[6::-1] + (self._code * 1000 + (self._area or 0)) * 10**7
            self._pass(text, at, found.end())
            at = found.end()

    def _tag(self, text: bytes, at: int) -> re.Match[bytes]:
        """Return the tag at a place, which is none of a number."""
        if self._closed:
            raise self._broken()
        if found := _AREA.match(text, at):
            if self._area is not None:
                raise self._broken()
            self._area = int(found[1] or found[2])
        elif found := _AREA_END.match(text, at):
            if self._area is None:
                raise self._broken()
            self._area = None
        elif self._area is not None:
            raise self._broken()
        elif found := _LIST.match(text, at):
            if self._begun:
                raise self._broken()
            self._begun, self._open = True, not found[0].endswith(b"/>")
        elif found := _LIST_END.match(text, at):
            if not self._begun:
                raise self._broken()
            self._closed = True
        else:
            found = _DECLARATION.match(text, at)
            if found is None or self._begun or self._line > 1:
                raise self._broken()
        return found

    def _pass(self, text: bytes, start: int, stop: int) -> None:
        self._line += text.count(b"\n", start, stop)

    def _broken(self, message: str = "not a line of this list") -> RegistryInvalid:
        return RegistryInvalid(message, file=self._file, line=self._line)


def _after(found: re.Match[bytes] | None, at: int) -> int:
    return at if found is None else found.end()


def _canadian(chunks: Iterable[bytes], file: str) -> Iterator[Numbers]:
    """Yield the numbers of the Canadian list, be it lines or XML, as its first character says."""
    several = iter(chunks)
    head = b""
    for chunk in several:
        head += chunk
        if head.removeprefix(_BOM).strip() and not _BOM.startswith(head):
            break
    bare = head.removeprefix(_BOM)
    if bare.lstrip().startswith(b"<"):
        return _Tags(file).read(_chain(bare, several))
    return _area_and_number("CA").read(_chain(head, several), file)


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


FORMATS: Final = {
    "us-dnc": ListFormat(_area_and_number("US").read, "US"),
    "ca-dncl": ListFormat(_canadian, "CA"),
}
"""Lists that are known by name; any other needs a mapping file."""
