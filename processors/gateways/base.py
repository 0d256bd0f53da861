"""What the gateway formats share: text, rows, instants, addresses, settings, and the finished record.

Rules of this file: a record that cannot be understood is `Poison` with a fixed reason code; a settings or
mapping file that cannot be used is `InputInvalid`, which names the key and says what is allowed. Neither
holds a word of the data, and library errors, which may, are cut off (`from None`). No I/O but the time zone
tables, at construction.
"""

import csv
import re
import tomllib
import types
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from zoneinfo import ZoneInfo

import msgspec
import orjson
import phonenumbers

from processors.decode import decode
from schemas.errors import InputInvalid, Poison
from schemas.fields import MAX_RECORD_BYTES, Kind, normalise

Encoding = Literal["utf-8", "latin-1", "cp1252"]
"""Supersets of ASCII only, so that files can be cut at line ends before they are decoded."""

WITHHELD = "anonymous"
"""The address written for an empty one; the schema takes it as nobody."""

_S = TypeVar("_S", bound=msgspec.Struct)


class Format(Protocol):
    """One gateway format: raw records in, inbound v1 JSON values out. Pure; one instance reads one file."""

    header_lines: int = 0
    """How many leading records are a header (0 or 1)."""
    quoted: bool = False
    """Whether records may span lines inside double quotes."""

    def header(self, raw: bytes) -> None:  # noqa: ARG002 — only formats with a header look at it
        """Take the header record, before the first `convert`. Raises InputInvalid if a column is missing."""
        return

    def convert(self, raw: bytes, line: int) -> list[bytes]:
        """Return the values of a raw record that begins at `line`; none for a blank one. Raises Poison."""
        ...


class Source(NamedTuple):
    """What the records of a file share: the account ("": each names its own) and the default region."""

    account_id: str
    region: str | None

    def address(self, text: str) -> str:
        """Return E.164 where the region makes a number of it, `WITHHELD` for nothing, else the text."""
        if not text:
            return WITHHELD
        if self.region is None:
            return text
        party = normalise(text, self.region)
        return party.value if party.kind is Kind.NUMBER else text


# --- rows ---------------------------------------------------------------------------------------------------


def text_of(raw: bytes, encoding: str) -> str:
    """Return the text of a raw record. Raises Poison: too_large, bad_encoding."""
    if len(raw) > MAX_RECORD_BYTES:
        raise Poison("too_large")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        raise Poison("bad_encoding") from None


def row_of(text: str, delimiter: str = ",", *, skip_initial_space: bool = False) -> list[str]:
    """Return the cells of a record whose cells may stand in double quotes. Raises Poison: quotes, columns."""
    if text.count('"') & 1:
        raise Poison("quotes")
    try:
        return next(csv.reader((text,), delimiter=delimiter, skipinitialspace=skip_initial_space))
    except csv.Error:
        raise Poison("columns") from None


def finished(record: dict[str, Any]) -> list[bytes]:
    """Return the JSON value of a record, alone in a list. Raises Poison if `decode` would not accept it."""
    value = orjson.dumps(record, option=orjson.OPT_UTC_Z)
    decode(value)
    return [value]


# --- instants -----------------------------------------------------------------------------------------------

_LOCAL = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}"
    r"(?:\.[0-9]{1,9})?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,9})?")
_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)
_PROBE = datetime(2026, 11, 21, 22, 33, 44, tzinfo=UTC)
LOCAL = "%Y-%m-%d %H:%M:%S"


def clock(layout: str, timezone: str) -> Callable[[str], datetime]:
    """Return the reader of instants of one layout: `epoch`, `epoch_ms`, `rfc3339` or a `strptime` layout.

    The reader returns UTC, and raises Poison("bad_time"). Local times are of the IANA zone `timezone`: one
    that happens twice (clocks put back) is the first, one that never happens is refused. A call takes about 1
    µs (epoch, `LOCAL` in UTC) to 10 µs (other layouts). Raises ValueError with what is allowed.
    """
    zone = _zone(timezone)
    parse = _parser(layout)

    def read(text: str) -> datetime:
        try:
            found = parse(text)
            if found.tzinfo is not None:
                return found if found.tzinfo is UTC else found.astimezone(UTC)
            if zone is UTC:
                return found.replace(tzinfo=UTC)
            instant = found.replace(tzinfo=zone).astimezone(UTC)
            exists = instant.astimezone(zone).replace(tzinfo=None) == found
        except (ValueError, OverflowError):
            raise Poison("bad_time") from None
        if not exists:
            raise Poison("bad_time")
        return instant

    return read


def _parser(layout: str) -> Callable[[str], datetime]:
    if layout == LOCAL:
        return lambda text: datetime.fromisoformat(_matched(_LOCAL, text))
    if layout == "rfc3339":
        return lambda text: datetime.fromisoformat(_matched(_RFC3339, text).upper())
    if layout in ("epoch", "epoch_ms"):
        unit = "seconds" if layout == "epoch" else "milliseconds"
        return lambda text: _EPOCH_START + timedelta(**{unit: float(_matched(_EPOCH, text))})
    try:
        back = datetime.strptime(_PROBE.strftime(layout), layout)  # noqa: DTZ007 — `clock` adds the zone
    except (ValueError, re.error):
        back = None
    if back is None or back.date() != _PROBE.date() or back.hour not in (0, _PROBE.hour) or "%Z" in layout:
        raise ValueError("must be epoch, epoch_ms, rfc3339 or a strptime layout with a whole date, no %Z")
    return lambda text: datetime.strptime(text, layout)  # noqa: DTZ007 — `clock` adds the zone


def _matched(shape: re.Pattern[str], text: str) -> str:
    if shape.fullmatch(text) is None:
        raise ValueError("another layout")
    return text


def _zone(name: str) -> Any:
    if name.upper() == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ValueError, KeyError, OSError):
        raise ValueError("must be an IANA time zone, like Europe/London") from None


# --- settings -----------------------------------------------------------------------------------------------


def toml(text: str, file: str) -> dict[str, Any]:
    """Return a TOML document. Raises InputInvalid with the place of the mistake."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at [a-z0-9 ,]+\)", str(error))
        raise InputInvalid(f"not valid TOML {place[0] if place else ''}".rstrip(), file=file) from None


def typed(kind: type[_S], value: Any, path: str, file: str) -> _S:
    """Return `value`, at `path` of a TOML document, as `kind`. Raises InputInvalid with the key."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        found = _mistake(kind, value, path)
        if found is None:
            expected, _, inner = str(error).partition(" - at `$")
            found = f"{path}{inner.rstrip('`')}".lstrip("."), expected
        raise bad_key(*found, file) from None


def bad_key(key: str, problem: str, file: str) -> InputInvalid:
    """Return the error about one key of a settings or mapping file."""
    return InputInvalid(f"{key}: {problem}" if key else problem, file=file)


def region_of(name: str | None, key: str, file: str) -> str | None:
    """Return a region that numbers can be read by. Raises InputInvalid."""
    if name is not None and name not in phonenumbers.SUPPORTED_REGIONS:
        raise bad_key(key, "must be a country code of two capital letters, like US", file)
    return name


def _mistake(kind: Any, value: Any, path: str) -> tuple[str, str] | None:
    """Return (key, problem) of the first unknown key, or value outside a fixed list; None if there is neither."""
    if get_origin(kind) is Annotated:
        return _mistake(get_args(kind)[0], value, path)
    inner: list[tuple[Any, Any, str]] = []
    if get_origin(kind) in (Union, types.UnionType):
        inner = [(option, value, path) for option in get_args(kind)]
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            return path, f"must be one of {', '.join(map(str, get_args(kind)))}"
    elif isinstance(value, list) and get_origin(kind) is tuple:
        inner = [(get_args(kind)[0], item, path) for item in value]
    elif isinstance(value, dict) and get_origin(kind) is dict:
        inner = [(get_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()]
    elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind, include_extras=True)
        names = dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
        for key, item in value.items():
            where = f"{path}.{key}".lstrip(".")
            if key not in names:
                return where, f"no such key; allowed: {', '.join(sorted(names))}"
            inner.append((hints[names[key]], item, where))
    return next((found for part in inner if (found := _mistake(*part)) is not None), None)
