"""Decode: bytes → a validated record with its parties, or Poison with a fixed reason code.

The reasons are the vocabulary of `REASONS`; none carries anything of the record but the name of a field of ours.
"""

import json
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import msgspec
import orjson

from schemas.errors import Poison
from schemas.fields import (
    MAX_RECORD_BYTES,
    canonical_amount,
    classes_of,
    is_account,
    is_code,
    is_record_id,
    is_time_zone,
    values_of,
)
from schemas.inbound import CODE_FIELDS, SMS_FIELDS, VOICE_FIELDS, Cdr, Inbound, Preference, Request

FIELDS = frozenset(classes_of(Request, Cdr, Preference)) - {"class_"} | {"type", "class"}
MAX_AHEAD_S = 48 * 3600
"""A record whose `occurred_at` is further ahead is quarantined."""

REASONS = frozenset(
    {
        "too_large",
        "not_json",
        "not_an_object",
        "unsupported_version",
        "unknown_field",
        "too_far_ahead",
        "account_unknown",
        "field_of_other_channel",
        "record_id_holds_number",
        "request_must_be_mt",
        "internal_error",
    }
    | {f"missing_field:{name}" for name in FIELDS}
    | {f"bad_value:{name}" for name in FIELDS}
    | {"bad_value"}
)

_CLEAR = values_of(("country", "mcc", "mnc", "route", "status", "price"))
_SMS_ONLY, _VOICE_ONLY = values_of(SMS_FIELDS), values_of(VOICE_FIELDS)
_NO_SMS, _NO_VOICE = (None,) * len(SMS_FIELDS), (None,) * len(VOICE_FIELDS)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_decoder: msgspec.json.Decoder[Inbound] = msgspec.json.Decoder(Inbound)
_PATH = re.compile(r"at `\$\.([a-z_]+)")
_MISSING = re.compile(r"missing required field `([a-z_]+)`")
_LEAP_SECOND = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d):60(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
_COUNTRY, _MCC, _MNC, _CURRENCY = (re.compile(p) for p in ("[A-Z]{2}", "[0-9]{3}", "[0-9]{2,3}", "[A-Z]{3}"))


class HasDigits(Protocol):
    """Somebody at one end of a communication; `digits`: what a record id must not spell out, or nothing."""

    digits: str


_End = TypeVar("_End", bound=HasDigits)


class _Digits(str):
    """A JSON number with a fraction, as it is written."""

    __slots__ = ()


def decode(value: bytes) -> Inbound:
    """Return the validated record. Raises Poison. About 2 µs for a usual record."""
    record = decode_shape(value)
    check_clear(record)
    return record


def decode_shape(value: bytes) -> Inbound:
    """Return the record with all checked but the values that may stand in the clear (`check_clear`). Raises Poison."""
    if len(value) > MAX_RECORD_BYTES:
        raise Poison("too_large")
    try:
        record = _decoder.decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        record = _decode_lenient(value, error)
    if not is_record_id(record.record_id):
        raise Poison("bad_value:record_id")
    if not is_account(record.account_id):
        raise Poison("bad_value:account_id")
    if type(record) is Preference:
        if record.scope == "campaign" and not record.campaign_id:
            raise Poison("missing_field:campaign_id")
        return record
    if record.channel == "sms":
        if _VOICE_ONLY(record) != _NO_VOICE:
            raise Poison("field_of_other_channel")
    elif _SMS_ONLY(record) != _NO_SMS:
        raise Poison("field_of_other_channel")
    if type(record) is Request:
        if record.direction == "mo":
            raise Poison("request_must_be_mt")
        if record.time_zone is not None and not is_time_zone(record.time_zone):
            raise Poison("bad_value:time_zone")
    return record


def check_clear(record: Inbound) -> None:
    """Raise Poison if one of the values that may stand in the clear is not what it must be."""
    wrong = _first_wrong(_CLEAR(record))
    if wrong is not None:
        raise Poison(wrong)


def parties(record: Inbound, sender: _End, recipient: _End) -> tuple[_End, _End]:
    """Return primary person and other party: recipient and sender of `mt`, sender and recipient of `mo`.

    Raises Poison if the record id spells out one of their numbers: ids stand in the clear in verdicts.
    """
    record_id = record.record_id
    if (recipient.digits and recipient.digits in record_id) or (sender.digits and sender.digits in record_id):
        raise Poison("record_id_holds_number")
    if record.direction == "mt" and type(record) is not Preference:
        return recipient, sender
    return sender, recipient


def timestamp(record: Inbound, now_s: float) -> int:
    """Return `occurred_at` in whole Unix seconds. Raises Poison if it is more than 48 hours ahead of `now_s`."""
    since = record.occurred_at - _EPOCH
    ts = since.days * 86_400 + since.seconds
    if ts > now_s + MAX_AHEAD_S:
        raise Poison("too_far_ahead")
    return ts


@lru_cache(maxsize=8192)
def _first_wrong(clear: tuple[Any, ...]) -> str | None:
    """Return the reason for the first wrong one of the values that may stand in the clear; memoised: there are few."""
    country, mcc, mnc, route, status, price = clear
    for name, text, shape in (("country", country, _COUNTRY), ("mcc", mcc, _MCC), ("mnc", mnc, _MNC)):
        if text is not None and not shape.fullmatch(text):
            return f"bad_value:{name}"
    for name, text in zip(CODE_FIELDS, (route, status), strict=True):
        if text is not None and not is_code(text):
            return f"bad_value:{name}"
    if price is not None and (canonical_amount(price.amount) is None or not _CURRENCY.fullmatch(price.currency)):
        return "bad_value:price"
    return None


def _decode_lenient(value: bytes, error: Exception) -> Inbound:
    """Return a record whose only faults have one meaning; else raise Poison.

    These are a true leap second, which is read as the second before, and a price amount written as a JSON number,
    which is read as the digits it is written with.
    """
    try:
        fields = json.loads(value, parse_float=_Digits)
        orjson.loads(value)  # the stricter parser: no NaN, no lone surrogates
    except (ValueError, RecursionError):
        raise Poison("not_json") from None
    if not isinstance(fields, dict):
        raise Poison("not_an_object")
    changed = False
    for name in ("occurred_at", "answered_at"):
        found = _LEAP_SECOND.fullmatch(text) if isinstance(text := fields.get(name), str) else None
        if found is not None and _is_last_minute(plain := f"{found[1]}:59{found[3]}"):
            fields[name] = plain
            changed = True
    price = fields.get("price")
    if isinstance(price, dict) and type(amount := price.get("amount")) in (_Digits, int):
        fields["price"] = {**price, "amount": str(amount)}
        changed = True
    if changed:
        try:
            return _decoder.decode(orjson.dumps(fields, option=orjson.OPT_PASSTHROUGH_SUBCLASS))
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError) as again:
            error = again
    raise Poison(_reason(error, fields)) from None


def _is_last_minute(text: str) -> bool:
    """Return whether an instant is in the last UTC minute of a June or December, where leap seconds are."""
    try:
        utc = datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        return False
    return (utc.month, utc.day, utc.hour, utc.minute) in ((6, 30, 23, 59), (12, 31, 23, 59))


def _reason(error: Exception, fields: dict[str, object]) -> str:
    """Return the reason code of a failed decode; the library's message may hold values and is never shown."""
    if fields.get("v", 1) != 1 or isinstance(fields.get("v"), bool):
        return "unsupported_version"
    message = str(error)
    if "unknown field" in message:
        return "unknown_field"
    missing = _MISSING.search(message)
    if missing is not None and missing[1] in FIELDS:
        return f"missing_field:{missing[1]}"
    path = _PATH.search(message)
    if path is not None and path[1] in FIELDS:
        return f"bad_value:{path[1]}"
    return "bad_value"
