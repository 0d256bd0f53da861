"""Instants as arguments: RFC 3339, or a date (its first UTC second)."""

from datetime import UTC, datetime

from schemas.errors import InputInvalid


def instant_s(text: str) -> int:
    """Return Unix seconds of an RFC 3339 instant or a date. Raises InputInvalid."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise InputInvalid("a time is RFC 3339 (2026-11-21T14:00:00Z) or a date (2026-11-21)") from None
    if parsed.tzinfo is None:
        if len(text) != len("2026-11-21"):
            raise InputInvalid("a time needs its offset, for example a final Z")
        parsed = parsed.replace(tzinfo=UTC)
    return int(parsed.timestamp())
