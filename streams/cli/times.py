"""Instants as arguments: RFC 3339, or a date (its first UTC second), of the years 1970 to 8999."""

import re
from datetime import UTC, datetime
from typing import Final

from schemas.errors import InputInvalid

_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}([Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})?)?"
)
_END_S: Final = int(datetime(9000, 1, 1, tzinfo=UTC).timestamp())
"""What is counted from an instant, such as a deadline of some years, must be an instant too."""


def instant_s(text: str) -> int:
    """Return Unix seconds of an RFC 3339 instant or a date. Raises InputInvalid."""
    found = _INSTANT.fullmatch(text)
    try:
        parsed = datetime.fromisoformat(text.upper()) if found else None
    except ValueError:
        parsed = None
    if found is None or parsed is None:
        raise InputInvalid("a time is RFC 3339 (2026-11-21T14:00:00Z) or a date (2026-11-21)")
    if parsed.tzinfo is None:
        if found[1] is not None:
            raise InputInvalid("a time needs its offset, for example a final Z")
        parsed = parsed.replace(tzinfo=UTC)
    at_s = parsed.timestamp()  # no year 0 or 10000 comes of it, whatever the offset
    if not 0 <= at_s < _END_S:
        raise InputInvalid("a time is of the years 1970 to 8999")
    return int(at_s)
