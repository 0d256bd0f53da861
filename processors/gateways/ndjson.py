"""ndjson: one inbound v1 record a line, passed through byte for byte; workers validate it."""

import orjson

from processors.gateways.base import Format
from schemas.errors import Poison
from schemas.fields import MAX_RECORD_BYTES


class Ndjson(Format):
    """The format of gateways that speak inbound v1."""

    def convert(self, raw: bytes, line: int) -> list[bytes]:  # noqa: ARG002 — the protocol has it
        """Return the record as it is, nothing for a blank line. Raises Poison: too_large, not_json."""
        if len(raw) > MAX_RECORD_BYTES:
            raise Poison("too_large")
        if not raw.strip():
            return []
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise Poison("not_json") from None
        if not isinstance(record, dict):
            raise Poison("not_json")
        return [raw]
