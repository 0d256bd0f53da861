"""Any delimited file through a small TOML mapping file (docs/mapping-files.md): cells → fields of inbound v1.

Everything is compiled before the first row: a mapped field becomes a reader of the row, which returns the
value, or None to leave the field out. What may be mapped is derived from `schemas.inbound`. A mapping that
could never give a valid record is refused at once, with its key.
"""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, timedelta
from decimal import ROUND_CEILING, Decimal
from hashlib import blake2b
from typing import Annotated, Any, Literal

import msgspec
import orjson

from processors.decode import decode
from processors.gateways.base import (
    LOCAL,
    Encoding,
    Format,
    Source,
    bad_key,
    clock,
    finished,
    region_of,
    row_of,
    text_of,
    toml,
    typed,
)
from schemas.errors import Poison
from schemas.fields import canonical_amount
from schemas.inbound import SMS_FIELDS, VOICE_FIELDS, Cdr, Channel, Instant, Preference, Request

Read = Callable[[Sequence[str], int], Any]
"""(cells of the row, its line number) → value of the field, or None to leave it out. Raises Poison."""

Column = Annotated[str, msgspec.Meta(min_length=1)]
Index = Callable[[str], int]
"""Name of a column → its place in the row."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the mapping file."""


# --- kinds of fields ----------------------------------------------------------------------------------------


class _Field(_Table, frozen=True, kw_only=True):
    """The table of a mapped field; `only` leaves it out on the other channel.

    `reader` returns the reader of the field, with the places of its columns; raises ValueError with what is
    allowed.
    """

    only: Channel | None = None

    def reader(self, at: Index) -> Read:
        raise NotImplementedError  # abstract: each kind of field has its own


class Text(_Field, frozen=True, kw_only=True):
    """A text: a column, or several joined (left out unless all have one); `values` replaces whole cells."""

    column: Column | None = None
    columns: tuple[Column, ...] = ()
    join: str = ","
    values: dict[str, str] | None = None

    def reader(self, at: Index) -> Read:
        """Return the reader."""
        places = [at(name) for name in ((self.column,) if self.column else self.columns)]
        if (self.column is None) == (not self.columns):
            raise ValueError("name either column or columns")
        if len(places) > 1:
            return lambda row, _: self.join.join(cells) if all(cells := [row[i] for i in places]) else None
        place, values = places[0], self.values
        if values is None:
            return lambda row, _: row[place] or None

        def replaced(row: Sequence[str], _: int) -> str:
            try:
                return values[row[place].strip()]
            except KeyError:
                raise Poison("bad_value") from None

        return replaced


class Identity(_Field, frozen=True, kw_only=True):
    """A record id: a column, or the line number; behind `prefix`."""

    column: Column | None = None
    line: bool = False
    prefix: str = ""

    def reader(self, at: Index) -> Read:
        """Return the reader."""
        if (self.column is None) != self.line:
            raise ValueError("name either column, or line = true")
        prefix = self.prefix
        if self.column is None:
            return lambda _, line: f"{prefix}{line}"
        place = at(self.column)
        return lambda row, _: prefix + row[place] if row[place] else None


class Time(_Field, frozen=True, kw_only=True):
    """An instant; `timezone` is that of local times."""

    column: Column
    layout: str = LOCAL
    timezone: str = "UTC"

    def reader(self, at: Index) -> Read:
        """Return the reader."""
        place, read = at(self.column), clock(self.layout, self.timezone)
        return lambda row, _: read(text) if (text := row[place].strip()) else None


class Duration(_Field, frozen=True, kw_only=True):
    """Whole seconds; a part of a second counts as one. Negative ones are refused, or taken as none."""

    column: Column
    unit: Literal["s", "ms", "min", "hh:mm:ss"] = "s"
    negative: Literal["refuse", "zero"] = "refuse"

    def reader(self, at: Index) -> Read:
        """Return the reader."""
        place, read = at(self.column), _hh_mm_ss if self.unit == "hh:mm:ss" else _scaled(_UNITS[self.unit])
        if self.negative == "refuse":
            return lambda row, _: read(text) if (text := row[place].strip()) else None

        def from_zero(row: Sequence[str], _: int) -> int | None:
            text = row[place].strip()
            return (0 * read(text[1:]) if text[:1] == "-" else read(text)) if text else None

        return from_zero


class Count(_Field, frozen=True, kw_only=True):
    """A whole number."""

    column: Column

    def reader(self, at: Index) -> Read:
        """Return the reader."""
        place, read = at(self.column), _scaled(Decimal(1))
        return lambda row, _: read(text) if (text := row[place].strip()) else None


class Flag(_Field, frozen=True, kw_only=True):
    """Yes or no; any cell in neither list is refused."""

    column: Column
    true: tuple[str, ...] = ("true",)
    false: tuple[str, ...] = ("false", "")

    def reader(self, at: Index) -> Read:
        """Return the reader."""
        place, known = at(self.column), dict.fromkeys(self.false, False) | dict.fromkeys(self.true, True)

        def read(row: Sequence[str], _: int) -> bool:
            try:
                return known[row[place].strip()]
            except KeyError:
                raise Poison("bad_value") from None

        return read


class Amount(_Field, frozen=True, kw_only=True):
    """A price: the column of the decimal amount, and the currency of the whole file."""

    amount: Column
    currency: str

    def reader(self, at: Index) -> Read:
        """Return the reader."""
        if not re.fullmatch(r"[A-Z]{3}", self.currency):
            raise ValueError("currency must be three capital letters, like EUR")
        place, currency = at(self.amount), self.currency

        def read(row: Sequence[str], _: int) -> dict[str, str] | None:
            text = row[place].strip()
            if not text:
                return None
            amount = canonical_amount(text) if _DECIMAL.fullmatch(text) else None
            if amount is None:
                raise Poison("bad_number")
            return {"amount": amount, "currency": currency}

        return read


_KINDS: dict[str, type[_Field]] = {
    "record_id": Identity,
    "occurred_at": Time,
    "answered_at": Time,
    "duration_s": Duration,
    "billable_s": Duration,
    "segments": Count,
    "child": Flag,
    "price": Amount,
}
"""Field → what its table may say; every other field is a `Text`, and `attributes` a table of columns."""

_DECIMAL = re.compile(r"[0-9]{1,12}(?:\.[0-9]{0,12})?")
_HH_MM_SS = re.compile(r"([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])")
_UNITS = {"s": Decimal(1), "ms": Decimal("0.001"), "min": Decimal(60)}


def _scaled(factor: Decimal) -> Callable[[str], int]:
    """Return the reader of numbers that multiplies, and rounds up to a whole."""

    def read(text: str) -> int:
        if _DECIMAL.fullmatch(text) is None:
            raise Poison("bad_number")
        if factor == 1 and "." not in text:
            return int(text)
        return int((Decimal(text) * factor).to_integral_value(ROUND_CEILING))

    return read


def _hh_mm_ss(text: str) -> int:
    found = _HH_MM_SS.fullmatch(text)
    if found is None:
        raise Poison("bad_number")
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])


# --- the mapping file ---------------------------------------------------------------------------------------


class File(_Table, frozen=True, kw_only=True):
    """How the file is cut: `header` says that its first record names the columns, else `columns` does."""

    delimiter: str = ","
    header: bool = True
    columns: tuple[Column, ...] = ()
    quote: bool = True
    encoding: Encoding = "utf-8"
    skip_initial_space: bool = False


class Generated(_Table, frozen=True, kw_only=True):
    """A number made from seed and line number, where the file has none: `prefix` and `digits` more digits."""

    field: Literal["sender", "recipient"]
    prefix: Annotated[str, msgspec.Meta(pattern=r"^\+[1-9][0-9]{0,12}$")]
    digits: Annotated[int, msgspec.Meta(ge=1, le=9)]
    seed: int = 0

    def number(self, line: int) -> str:
        """Return the number of a line; the same whenever the file is read."""
        digest = blake2b(f"{self.seed}:{self.field}:{line}".encode(), digest_size=8).digest()
        return f"{self.prefix}{int.from_bytes(digest, 'big') % 10**self.digits:0{self.digits}}"


class Parties(_Table, frozen=True, kw_only=True):
    """For files of one subscriber: the other person's column, and the subscriber's own number."""

    person: Column
    own: str


class Numbers(_Table, frozen=True, kw_only=True):
    """How numbers are read: the region of national ones, and where those come from that no column has."""

    region: str | None = None
    generated: Generated | tuple[Generated, ...] = ()
    parties: Parties | None = None


class Times(_Table, frozen=True, kw_only=True):
    """Whole days added to every time of the file; or the one time of files without any."""

    shift_days: Annotated[int, msgspec.Meta(ge=-1_000_000, le=1_000_000)] = 0
    date: Instant | None = None


class Mapping(_Table, frozen=True, kw_only=True):
    """The whole file; `constants` and `fields` are checked against the record type."""

    file: File = File()
    constants: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    numbers: Numbers = Numbers()
    time: Times = Times()


_RECORDS: dict[str, type[Request | Cdr | Preference]] = {
    "cdr": Cdr,
    "request": Request,
    "preference": Preference,
}
_NO_CONSTANTS = {"v", "record_id", "occurred_at", "answered_at", "price", "attributes"}
_FORMS = {
    "account_id": "must be 1 to 64 letters, digits, _ . -",
    "country": "must be two capital letters, like US",
    "mcc": "must be three digits",
    "mnc": "must be two or three digits",
    "route": "must be a code of at most 40 characters",
    "status": "must be a code of at most 40 characters",
}


class MappedCsv(Format):
    """Reads one file as its mapping says. About 10 µs a row, more where numbers must be read by region."""

    def __init__(self, mapping: str, file: str) -> None:
        """Take the text of the mapping file. Raises InputInvalid."""
        self._file_name = file
        known = self._mapping = typed(Mapping, toml(mapping, file), "", file)
        self.quoted, self.header_lines = known.file.quote, int(known.file.header)
        kind = known.constants.get("type", "cdr")
        if kind not in _RECORDS:
            raise self._bad("constants.type", f"must be one of {', '.join(sorted(_RECORDS))}")
        self._constants: dict[str, Any] = {"v": 1, "type": kind} | known.constants
        if known.time.date is not None:
            self._constants["occurred_at"] = known.time.date.astimezone(UTC)
        if known.numbers.parties is not None:
            self._constants["sender"] = known.numbers.parties.own
        region = region_of(known.numbers.region, "numbers.region", file)
        self._source = Source(str(known.constants.get("account_id", "")), region)
        made = known.numbers.generated
        self._generated: dict[str, Generated] = {
            one.field: one for one in ((made,) if isinstance(made, Generated) else made)
        }
        self._check_file(known.file)
        self._fields = self._check_fields(_RECORDS[kind])
        self._check_constants(_RECORDS[kind])
        self._check_whole(_RECORDS[kind])
        self._steps = self._compiled(lambda _: 0)
        self._width = -1
        if not known.file.header:
            self._set_columns(known.file.columns)

    def header(self, raw: bytes) -> None:
        """Take the header record. Raises InputInvalid if a mapped column is not there, or is there twice."""
        try:
            names = self._row(raw)
        except Poison as error:
            raise self._bad("file", f"the header of the data file cannot be read ({error.reason})") from None
        self._set_columns([name.strip() for name in names])

    def convert(self, raw: bytes, line: int) -> list[bytes]:
        """Return the record of a row, nothing for a blank one. Raises Poison."""
        if not raw.strip():
            return []
        row = self._row(raw)
        if len(row) != self._width:
            raise Poison("columns")
        record = self._constants.copy()
        for name, only, read in self._steps:
            if only is None or record.get("channel") == only:
                value = read(row, line)
                if value is not None:
                    record[name] = value
        parties = self._mapping.numbers.parties
        if parties is not None and record.get("direction") == "mo":
            record["sender"], record["recipient"] = record["recipient"], parties.own
        return finished(record)

    def _row(self, raw: bytes) -> list[str]:
        file = self._mapping.file
        text = text_of(raw, file.encoding)
        if file.quote:
            return row_of(text, file.delimiter, skip_initial_space=file.skip_initial_space)
        cells = text.split(file.delimiter)
        return [cell.lstrip(" ") for cell in cells] if file.skip_initial_space else cells

    def _bad(self, key: str, problem: str) -> Exception:
        return bad_key(key, problem, self._file_name)

    # --- checks, all before the first row

    def _check_file(self, file: File) -> None:
        if len(file.delimiter) != 1 or not file.delimiter.isascii() or file.delimiter in '\0"\r\n':
            raise self._bad("file.delimiter", "must be one ASCII character, not a quote or a line end")
        if file.skip_initial_space and file.delimiter == " ":
            raise self._bad("file.skip_initial_space", "not with a space as the delimiter")
        if file.header == bool(file.columns):
            raise self._bad("file.columns", "must name the columns if header = false, and only then")

    def _check_fields(self, struct: type[Request | Cdr | Preference]) -> dict[str, _Field]:
        allowed = set(struct.__struct_encode_fields__) - {"v"}
        fields: dict[str, _Field] = {}
        for name, value in self._mapping.fields.items():
            if name not in allowed:
                raise self._bad(f"fields.{name}", f"no such field; allowed: {', '.join(sorted(allowed))}")
            if name == "attributes":
                self._attributes(value)
                continue
            given = {"column": value} if isinstance(value, str) else value
            fields[name] = typed(_KINDS.get(name, Text), given, f"fields.{name}", self._file_name)
        return fields

    def _attributes(self, value: Any) -> dict[str, str]:
        try:
            return msgspec.convert(value, dict[str, Column])
        except msgspec.ValidationError:
            raise self._bad("fields.attributes", "must be a table of attribute = column") from None

    def _check_constants(self, struct: type[Request | Cdr | Preference]) -> None:
        allowed = (set(struct.__struct_encode_fields__) | {"type"}) - _NO_CONSTANTS
        for name in self._mapping.constants:
            if name not in allowed:
                raise self._bad(f"constants.{name}", f"not possible; allowed: {', '.join(sorted(allowed))}")
        channel = "voice" if set(VOICE_FIELDS) & set(self._mapping.constants) else "sms"
        sample: dict[str, Any] = {
            "v": 1, "record_id": "-", "account_id": "a", "channel": channel, "direction": "mt",
            "occurred_at": "2026-01-01T00:00:00Z", "sender": "", "recipient": "",
        }  # fmt: skip
        sample |= {"purpose": "service"} | ({"action": "opt_out", "campaign_id": "-"} if struct is Preference else {})
        sample |= self._mapping.constants
        sample.pop("type", None)
        typed(struct, sample, "constants", self._file_name)
        try:
            decode(orjson.dumps(sample | {"type": self._constants["type"]}))
        except Poison as error:
            name = error.reason.partition(":")[2]
            key = f"constants.{name}" if name else "constants"
            raise self._bad(key, _FORMS.get(name, f"never a valid record ({error.reason})")) from None

    def _check_whole(self, struct: type[Request | Cdr | Preference]) -> None:
        """Raise InputInvalid if a field comes from two places, or from none though needed, or never can."""
        known = self._mapping
        fields, constants = set(known.fields), set(known.constants)
        for name in sorted(fields & constants):
            raise self._bad(f"fields.{name}", "is also in [constants]; state it once")
        for name in sorted(constants & set(self._generated)):
            raise self._bad(f"numbers.generated.{name}", "is also in [constants]; state it once")
        both = {"sender", "recipient"}
        if known.numbers.parties is not None:
            for name in sorted(both & (fields | constants | set(self._generated))):
                raise self._bad("numbers.parties", f"gives the {name} too; state it once")
        if known.time.date is not None and ("occurred_at" in fields or known.time.shift_days):
            raise self._bad("time.date", "only for files without times; not with fields.occurred_at or shift_days")
        given = fields | constants | set(self._generated) | (both if known.numbers.parties else set())
        given |= {"v"} | ({"occurred_at"} if known.time.date else set())
        for field in msgspec.structs.fields(struct):
            if field.required and field.encode_name not in given:
                raise self._bad(field.encode_name, "is missing; state it in [constants] or [fields]")
        channel = known.constants.get("channel")
        for name, spec in self._fields.items():
            if spec.only is None and name in {"sms": VOICE_FIELDS, "voice": SMS_FIELDS}.get(str(channel), ()):
                raise self._bad(f"fields.{name}", f"not possible with channel = {channel}")

    # --- from mapping to readers

    def _set_columns(self, columns: Sequence[str]) -> None:
        def at(name: str) -> int:
            if columns.count(name) != 1:
                raise ValueError(f"the data file has {'two columns' if name in columns else 'no column'} {name!r}")
            return columns.index(name)

        self._steps, self._width = self._compiled(at), len(columns)

    def _compiled(self, at: Index) -> list[tuple[str, Channel | None, Read]]:
        """Return the steps of a row, channel and direction first. Raises InputInvalid."""
        known, address = self._mapping, self._source.address
        steps: list[tuple[str, Channel | None, Read]] = []

        def add(name: str, only: Channel | None, reader: Callable[[Index], Read], key: str) -> None:
            try:
                steps.append((name, only, reader(at)))
            except ValueError as error:
                raise self._bad(key, str(error)) from None

        for name, spec in sorted(self._fields.items(), key=lambda item: item[0] not in ("channel", "direction")):
            add(name, spec.only, spec.reader, f"fields.{name}")
            if name in ("sender", "recipient"):
                steps[-1] = name, spec.only, _address(steps[-1][2], address, self._generated.get(name))
            elif isinstance(spec, Time) and known.time.shift_days:
                steps[-1] = name, spec.only, _shifted(steps[-1][2], timedelta(days=known.time.shift_days))
        for name, made in self._generated.items():
            if name not in self._fields:
                steps.append((name, None, _made(made)))
        if (parties := known.numbers.parties) is not None:
            add("recipient", None, Text(column=parties.person).reader, "numbers.parties.person")
            steps[-1] = "recipient", None, _address(steps[-1][2], address, None)
        if "attributes" in known.fields:
            add("attributes", None, _table(self._attributes(known.fields["attributes"])), "fields.attributes")
        return steps


def _address(read: Read, address: Callable[[str], str], made: Generated | None) -> Read:
    if made is None:
        return lambda row, line: address(read(row, line) or "")
    return lambda row, line: address(text) if (text := read(row, line)) else made.number(line)


def _made(made: Generated) -> Read:
    return lambda _, line: made.number(line)


def _shifted(read: Read, shift: timedelta) -> Read:
    def shifted(row: Sequence[str], line: int) -> Any:
        found = read(row, line)
        try:
            return None if found is None else found + shift
        except OverflowError:
            raise Poison("bad_time") from None

    return shifted


def _table(names: dict[str, str]) -> Callable[[Index], Read]:
    def reader(at: Index) -> Read:
        places = [(name, at(column)) for name, column in names.items()]
        return lambda row, _: {name: row[place] for name, place in places if row[place]} or None

    return reader
