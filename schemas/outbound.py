"""What leaves the pipeline: messages for partitions of streams. The values' shapes are in docs/streams.md."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

Headers = tuple[tuple[str, bytes], ...]


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message to write: log timestamp in Unix milliseconds, key, headers, value."""

    timestamp_ms: int
    key: bytes | None
    headers: Headers
    value: bytes

    def __repr__(self) -> str:
        return f"Message({len(self.value)} bytes)"


class Output(NamedTuple):
    """Messages for one partition of one stream, in order."""

    stream: str
    partition: int
    messages: Sequence[Message]
