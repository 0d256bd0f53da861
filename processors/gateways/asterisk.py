"""Asterisk call records: `Master.csv` of cdr_csv, and the sample layout of cdr_custom (caller first).

cdr_csv has no header. It writes 16 columns, then the unique id and the user field where `loguniqueid` and
`loguserfield` are on, then peer account, linked id and sequence together where `newcdrcolumns` is on: 16 to
21 columns. cdr_custom's sample writes 19, or 18 before there was a sequence. Texts stand in double quotes, an
inner quote is doubled; a time that never came is empty; times are local unless `usegmtime` is on.
"""

import re
from hashlib import blake2b
from typing import Literal

import msgspec

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
from schemas.fields import is_account, is_code, is_record_id
from schemas.inbound import Direction

_MASTER = (
    "accountcode", "src", "dst", "dcontext", "clid", "channel", "dstchannel", "lastapp", "lastdata",
    "start", "answer", "end", "duration", "billsec", "disposition", "amaflags",
)  # fmt: skip
_CUSTOM = (
    "clid", "src", "dst", "dcontext", "channel", "dstchannel", "lastapp", "lastdata",
    "start", "answer", "end", "duration", "billsec", "disposition", "amaflags",
    "accountcode", "uniqueid", "userfield",
)  # fmt: skip
_NEWER = ("peeraccount", "linkedid", "sequence")

MASTER_LAYOUTS = {
    len(_MASTER + more): _MASTER + more
    for more in (
        (), ("uniqueid",), ("uniqueid", "userfield"),
        _NEWER, ("uniqueid", *_NEWER), ("uniqueid", "userfield", *_NEWER),
    )
}  # fmt: skip
"""Number of columns → names. 17 and 20 have a unique id or a user field: told apart by what it looks like."""
CUSTOM_LAYOUTS = {len(_CUSTOM): _CUSTOM, len(_CUSTOM) + 1: (*_CUSTOM, "sequence")}

STATUSES = {
    "ANSWERED": "answered",
    "NO ANSWER": "no_answer",
    "BUSY": "busy",
    "FAILED": "failed",
    "CONGESTION": "congestion",
    "UNKNOWN": "unknown",
}
_ATTRIBUTES = (
    "accountcode", "dcontext", "channel", "dstchannel", "lastapp", "lastdata", "amaflags", "userfield",
    "peeraccount", "linkedid", "sequence",
)  # fmt: skip
_UNIQUE_ID = re.compile(r"(?:[^\s,\"]{1,64}-)?[0-9]{9,11}\.[0-9]{1,10}")
_CALLER_ID = re.compile(r'\s*"?(.*?)"?\s*<[^<>]*>"?\s*', re.DOTALL)
_SECONDS = re.compile(r"([0-9]{1,9})(?:\.[0-9]+)?")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optional settings file. `columns`: what follows the 16 columns of `Master.csv`, if unusual."""

    account_id: str | None = None  # default: the accountcode column, else "asterisk"
    timezone: str = "UTC"
    encoding: Encoding = "utf-8"
    columns: tuple[Literal["uniqueid", "userfield", "peeraccount", "linkedid", "sequence"], ...] | None = None
    default_region: str | None = None
    direction: Direction = "mt"
    directions: dict[str, Direction] = {}  # by dcontext
    route: str | None = None  # a constant, or "dcontext"


class Asterisk(Format):
    """Reads one row of `Master.csv` (or of cdr_custom's sample layout) as a voice CDR. About 10 µs a row."""

    quoted = True

    def __init__(self, settings: str | None, file: str, *, custom: bool) -> None:
        """Take the text of the settings file, if any. Raises InputInvalid."""
        known = self._settings = typed(Settings, toml(settings or "", file), "", file)
        if known.account_id is not None and not is_account(known.account_id):
            raise bad_key("account_id", "must be 1 to 64 letters, digits, _ . -", file)
        if known.route is not None and not is_code(known.route):
            raise bad_key("route", 'must be "dcontext" or a code of at most 40 characters', file)
        if custom and known.columns is not None:
            raise bad_key("columns", "only with --format asterisk; use a mapping file for another layout", file)
        self._source = Source(known.account_id or "", region_of(known.default_region, "default_region", file))
        self._layouts = CUSTOM_LAYOUTS if custom else MASTER_LAYOUTS
        self._guess = not custom and known.columns is None
        if known.columns is not None:
            self._layouts = {len(_MASTER) + len(known.columns): (*_MASTER, *known.columns)}
        try:
            self._clock = clock(LOCAL, known.timezone)
        except ValueError as error:
            raise bad_key("timezone", str(error), file) from None

    def convert(self, raw: bytes, line: int) -> list[bytes]:  # noqa: ARG002 — the protocol has it
        """Return the CDR of a row, nothing for a blank one. Raises Poison."""
        if not raw.strip():
            return []
        row = row_of(text_of(raw, self._settings.encoding))
        names = self._layouts.get(len(row))
        if names is None:
            raise Poison("columns")
        cdr = dict(zip(names, row, strict=True))
        unique_id = cdr.get("uniqueid", "")
        if self._guess and unique_id and "userfield" not in cdr and not _UNIQUE_ID.fullmatch(unique_id):
            cdr["userfield"], unique_id = unique_id, ""
        if not is_record_id(unique_id):
            unique_id = f"asterisk-{blake2b(raw, digest_size=12).hexdigest()}"
        status = STATUSES.get(cdr["disposition"])
        if status is None:
            raise Poison("bad_status")
        settings, source = self._settings, self._source
        record = {
            "v": 1,
            "type": "cdr",
            "channel": "voice",
            "record_id": unique_id,
            "account_id": source.account_id or cdr.pop("accountcode") or "asterisk",
            "direction": settings.directions.get(cdr["dcontext"], settings.direction),
            "occurred_at": self._clock(cdr["start"]),
            "sender": source.address(cdr["src"]),
            "recipient": source.address(cdr["dst"]),
            "status": status,
            "duration_s": _seconds(cdr["duration"]),
            "billable_s": _seconds(cdr["billsec"]),
        }
        if cdr["answer"]:
            record["answered_at"] = self._clock(cdr["answer"])
        if settings.route is not None:
            record["route"] = cdr.pop("dcontext") if settings.route == "dcontext" else settings.route
        name = _caller_name(cdr["clid"])
        if name and name != cdr["src"]:
            record["display_name"] = name
        attributes = {key: cdr[key] for key in _ATTRIBUTES if cdr.get(key)}
        if attributes:
            record["attributes"] = attributes
        return finished(record)


def _seconds(text: str) -> int:
    """Return whole seconds as Asterisk counts them: a fraction (high-resolution layouts) is cut off."""
    found = _SECONDS.fullmatch(text)
    if found is None:
        raise Poison("bad_number")
    return int(found[1])


def _caller_name(caller_id: str) -> str:
    """Return the name of `"Name" <number>`, or the whole where there is no number."""
    found = _CALLER_ID.fullmatch(caller_id)
    return (found[1] if found else caller_id.strip('"')).strip()
