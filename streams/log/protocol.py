"""What a log is: streams of messages in partitions, consumed exactly once. Two implementations, one contract suite.

Every call may block on the disk or the network; each says what success means. All raise `LogBusy` or `LogFull`
(Retriable: nothing has happened, call again; after `Consumer.commit`, poll again) and `LogUnusable` (Fatal).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from schemas.outbound import Headers, Message, Output

__all__ = ["Batch", "Bookmark", "Consumer", "Headers", "Log", "Message", "Output", "Stored"]


class Stored(NamedTuple):
    """One committed message with its place. Offsets count from 0 within a partition, without gaps on SQLite."""

    stream: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    headers: Headers
    value: bytes

    def __repr__(self) -> str:
        return f"Stored({self.stream}/{self.partition}@{self.offset})"


class Batch(NamedTuple):
    """Consecutive messages of ONE input partition, and the lease under which they may be committed."""

    stream: str
    partition: int
    offset: int  # of the first message
    next_offset: int  # to commit
    lease: int  # epoch of the partition lease
    messages: Sequence[Message]
    offsets: Sequence[int]  # of the messages; without gaps on SQLite


class Bookmark(NamedTuple):
    """How far a file has been published: byte position, line number, and a digest of all before it."""

    position: int
    line: int
    digest: str


class Log(Protocol):
    """The log of one deployment."""

    partitions: int
    """Partitions of every stream, fixed at creation."""

    @property
    def log_id(self) -> str:
        """An id that no other log has, or "" where there is none."""

    async def append(self, outputs: Sequence[Output], bookmark: tuple[str, Bookmark | None] | None = None) -> None:
        """Write all outputs, and the named bookmark (None deletes it), or nothing; durable on return."""

    async def bookmark(self, name: str) -> Bookmark | None:
        """Return a bookmark that was written with `append`, if any."""

    async def read(self, stream: str, partition: int, offset: int, limit: int, until: int = 0) -> list[Stored]:
        """Return up to `limit` committed messages from `offset` on, in order; empty at the end.

        Raises LogBusy if something before `until`, an end that was seen, cannot be seen now.
        """

    async def begin_offsets(self, stream: str) -> list[int]:
        """Return the first offset that can still be read, per partition."""

    async def end_offsets(self, stream: str) -> list[int]:
        """Return the offset after the last written message (the high watermark), per partition."""

    async def stable_offsets(self, stream: str) -> list[int]:
        """Return, per partition, the offset before which all is decided: committed, or never to be seen.

        Less than `end_offsets` while somebody who has written has not committed yet; never so on SQLite.
        """

    async def cut(self, stream: str, offsets: Sequence[int]) -> list[int]:
        """Delete what lies before these offsets, one per partition, and return the new `begin_offsets`.

        What is deleted is read by nobody any more. Whole batches only on SQLite: less than asked for may go. Never
        an input stream: ValueError. Idempotent; an offset before the beginning is no error.
        """

    def consumer(self, worker_id: str) -> "Consumer":
        """Return a consumer of the input streams; consumers of one log share the partitions among themselves."""

    async def close(self) -> None:
        """Free what is held; idempotent."""


class Consumer(Protocol):
    """One worker's side of the exactly-once contract."""

    async def poll(self, max_records: int, timeout_s: float) -> Batch | None:
        """Return the next batch of one input partition, `traffic` before `traffic.cdr`, or None after the time-out.

        A batch that was polled and not committed comes again. Partitions are claimed and renewed here; a batch's
        lease is lost once another consumer claimed its partition.
        """

    async def commit(self, batch: Batch, outputs: Sequence[Output], check: Callable[[], None]) -> None:
        """Write all outputs and the batch's offsets, or nothing; durable on return, and visible to whoever reads after.

        `check` is called at the last moment at which nothing is visible yet; if it raises, nothing is written.
        Raises Fenced when the lease was lost or the batch is not the next one.
        """

    async def committed_offsets(self, stream: str) -> list[int]:
        """Return the next offset to be committed of an input stream, per partition, by whichever worker."""

    async def at_end(self) -> bool:
        """Return whether everything written to the input streams so far is committed, by whichever worker."""

    async def forget_consumed(self) -> int:
        """Delete clear input that is committed, so that no file holds it; return the number of messages deleted."""

    async def close(self) -> None:
        """Give the partitions back at once; idempotent."""
