"""A writer with a transactional id: everything of a transaction, or nothing, and only by the newest writer of that id.

    fence()     the coordinator ends what an older writer left open, and refuses that writer from then on
    write()     partitions join the transaction → their records are written ┐
                the group joins it → its offsets are written                ┴→ check → commit

Rules of this file:
- What the coordinator answers decides. An answer that did not come is asked for again until the deadline; after it the
  writer is not used again before `fence`, which settles what was open: it is committed if that had been decided.
- A request that was repeated may arrive twice, the second time in a later transaction. So after it the writer fences.
- Records and offsets go their ways at the same time, offsets first. Brokers ask the coordinator about either; where the
  two questions meet, the first one's answer is "not available", and it is asked again.
- A writer that hears that a newer one exists raises Fenced, and is never used again. The coordinator says the same of a
  transaction that took longer than its time-out; a writer gives up before that.
- The protocol is that of KIP-98 as aiokafka's classes speak it. aiokafka's own producer is not used: it keeps a client
  for each transactional id and waits 20 ms between transactions (docs/adr/0006).
"""

import asyncio
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from aiokafka.client import CoordinationType
from aiokafka.protocol.api import Request, RequestStruct
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    EndTxnRequest,
    InitProducerIdRequest,
    TxnOffsetCommitRequest,
)
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from schemas.errors import Fenced, LogBusy, LogFull, LogUnusable
from schemas.outbound import Headers, Message
from streams.log.connection import MOVED, Code, Connection, Place, all_of, refusal

BATCH_BYTES: Final = 900_000
"""Messages of one partition go in batches of at most so much, below the brokers' default limit of 1 MiB; more if one
message alone has more."""
RECORD_BYTES: Final = 100
"""Allowed for the lengths around a record."""
_ALL_IN_SYNC: Final = -1
_PAUSES_S: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.05)
_SEQUENCES: Final = 2**31
_AGAIN: Final = MOVED | {
    Code.COORDINATOR_LOAD_IN_PROGRESS, Code.CONCURRENT_TRANSACTIONS, Code.REQUEST_TIMED_OUT, Code.NOT_ENOUGH_REPLICAS,
    Code.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
}  # fmt: skip


class Offsets(NamedTuple):
    """What a group is to have read: offset and a note per place, written with the transaction."""

    group: str
    positions: dict[Place, tuple[int, str]]


class Writer:
    """The one writer of a transactional id, until another one fences it."""

    def __init__(self, connection: Connection, transactional_id: str) -> None:
        """Take the id; nothing is asked of the brokers before `fence`."""
        self._connection = connection
        self._id = transactional_id
        self._timeout_ms = connection.settings.transaction_timeout_ms
        self._producer: int | None = None
        self._sequences: dict[Place, int] = {}
        self._deadline_s = 0.0
        self._unanswered = False
        self.epoch = -1
        self.in_doubt = False
        """Whether the last `write` that failed may be found committed."""

    @property
    def usable(self) -> bool:
        """Whether `write` may be called; after an error that left something open, only after `fence`."""
        return self._producer is not None

    async def fence(self) -> None:
        """Become the only writer of the id. What the writer before had not decided to commit is aborted.

        Raises LogBusy if the coordinator does not answer in time, and LogUnusable.
        """
        self._producer = None
        self._deadline_s = time.monotonic() + self._timeout_ms / 1000
        answer = await self._decided(lambda: InitProducerIdRequest(self._id, self._timeout_ms))
        self._producer, self.epoch = answer.producer_id, answer.producer_epoch
        self._sequences = {}

    async def write(
        self,
        messages: Mapping[Place, Sequence[Message]],
        offsets: Offsets | None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Write all messages and the offsets, or nothing; durable on return, and visible a moment after.

        `check` is called when nothing but the decision is left. If it raises, nothing becomes visible.
        Raises Fenced; LogBusy or LogUnusable, and then it may be that `fence` finds all of it committed.
        """
        if self._producer is None:
            raise ValueError("fence first")
        if not messages and offsets is None:
            return
        self.in_doubt = self._unanswered = False
        self._deadline_s = time.monotonic() + 0.8 * self._timeout_ms / 1000
        try:
            await self._fill(messages, offsets)
            objection = _objection(check)
            if objection is None:
                self.in_doubt = True
                await self._end(commit=True)
                self.in_doubt = False
            else:
                await self._end(commit=False)
        except Fenced:
            self._producer = None
            raise
        except BaseException:
            await self._give_up()
            raise
        if self._unanswered:  # what was repeated may come late: no later transaction may take it for its own
            self._producer = None
        if objection is not None:
            raise objection

    async def _give_up(self) -> None:
        """Abort what is open, if that can be done at once, so that readers need not wait for the time-out."""
        self._deadline_s = min(self._deadline_s, time.monotonic() + 1)
        with suppress(LogBusy, LogFull, LogUnusable, Fenced):
            await self._end(commit=False)
            self.in_doubt = False
        self._producer = None

    async def _fill(self, messages: Mapping[Place, Sequence[Message]], offsets: Offsets | None) -> None:
        packed = {place: list(self._packed(place, some)) for place, some in messages.items()}
        writing = [] if offsets is None else [self._write_offsets(offsets)]
        if packed:
            writing.append(self._write_records(packed))
        await all_of(writing)

    async def _write_records(self, packed: Mapping[Place, Sequence[bytearray]]) -> None:
        """Have the places join the transaction, and write one batch to each at a time: they must come in order."""
        topics: dict[str, list[int]] = {}
        for place in packed:
            topics.setdefault(place.topic, []).append(place.partition)
        await self._decided(
            lambda: AddPartitionsToTxnRequest(self._id, self._producer, self.epoch, list(topics.items()))
        )
        for number in range(max(map(len, packed.values()))):
            await self._produce({place: some[number] for place, some in packed.items() if number < len(some)})

    def _packed(self, place: Place, messages: Sequence[Message]) -> Iterator[bytearray]:
        """Yield record batches of up to `BATCH_BYTES` with their sequence numbers. About 0.8 µs a message."""
        lists: dict[int, list[tuple[str, bytes]]] = {}  # aiokafka wants headers in lists; few objects repeat
        start = 0
        while start < len(messages):
            sequence = self._sequences.get(place, 0)
            size = max(BATCH_BYTES, _size(messages[start]) + RECORD_BYTES)
            builder = DefaultRecordBatchBuilder(
                2, 0, is_transactional=1, producer_id=self._producer, producer_epoch=self.epoch,
                base_sequence=sequence, batch_size=size,
            )  # fmt: skip
            append = builder.append
            count = 0
            for message in messages[start:] if start else messages:
                headers = lists.get(id(message.headers))
                if headers is None:
                    headers = lists[id(message.headers)] = list(message.headers)
                if append(count, message.timestamp_ms, message.key, message.value, headers) is None:
                    break
                count += 1
            start += count
            self._sequences[place] = (sequence + count) % _SEQUENCES
            yield builder.build()

    async def _produce(self, pieces: dict[Place, bytearray]) -> None:
        """Write one record batch to each place; repeated until each is acknowledged by all replicas in sync."""
        left = pieces
        for pause_s in _pauses(self._deadline_s):
            try:
                by_leader = await self._connection.leaders(list(left))
            except LogBusy:
                await asyncio.sleep(max(pause_s, 0.02))
                continue
            done: set[Place] = set()
            await all_of([
                self._produced(node, {place: left[place] for place in mine}, done) for node, mine in by_leader.items()
            ])  # fmt: skip
            left = {place: piece for place, piece in left.items() if place not in done}
            if not left:
                return
            self._connection.stale()
            await asyncio.sleep(pause_s)  # a broker that asks the coordinator at this moment is done in one or two ms
        place = next(iter(left))
        raise LogBusy("the brokers take no records now", topic=place.topic, partition=place.partition)

    async def _produced(self, node: int, pieces: dict[Place, bytearray], done: set[Place]) -> None:
        """Write to the partitions that a broker leads, and add to `done` where it was acknowledged."""
        topics: dict[str, list[tuple[int, bytearray]]] = {}
        for place, piece in pieces.items():
            topics.setdefault(place.topic, []).append((place.partition, piece))
        request = Produce(self._id, self._left_ms(), list(topics.items()))
        try:
            answer = await self._connection.ask(node, request)
        except LogBusy:
            return
        for topic, parts in answer.topics:
            for partition, code, *_ in parts:
                if code in (Code.NONE, Code.DUPLICATE_SEQUENCE_NUMBER):
                    done.add(Place(topic, partition))
                else:
                    error = refusal(code, topic=topic, partition=partition)
                    if not isinstance(error, LogBusy) and code != Code.UNKNOWN_TOPIC_OR_PARTITION:
                        raise error

    async def _write_offsets(self, offsets: Offsets) -> None:
        """Have the group join the transaction, and write its offsets."""
        topics: dict[str, list[tuple[int, int, str]]] = {}
        for place, (offset, note) in offsets.positions.items():
            topics.setdefault(place.topic, []).append((place.partition, offset, note))

        def request() -> TxnOffsetCommitRequest:
            return TxnOffsetCommitRequest(self._id, offsets.group, self._producer, self.epoch, list(topics.items()))

        await self._decided(lambda: AddOffsetsToTxnRequest(self._id, self._producer, self.epoch, offsets.group))
        await self._decided(request, CoordinationType.GROUP, offsets.group)

    async def _end(self, *, commit: bool) -> None:
        await self._decided(lambda: EndTxnRequest(self._id, self._producer, self.epoch, commit))

    async def _decided(
        self, request: Callable[[], Any], kind: int = CoordinationType.TRANSACTION, key: str | None = None
    ) -> Any:
        """Ask a coordinator until it answers with a decision, or the deadline has come (LogBusy)."""
        key = self._id if key is None else key
        code, answers = Code.COORDINATOR_NOT_AVAILABLE, 0
        for pause_s in _pauses(self._deadline_s):
            try:
                async with asyncio.timeout(max(0.1, self._deadline_s - time.monotonic())):
                    answer = await self._connection.ask_coordinator(kind, key, request())
            except (LogBusy, TimeoutError):
                self._unanswered = True
                await asyncio.sleep(max(pause_s, 0.02))
                continue
            code = _first_code(answer)
            if code == Code.NONE:
                return answer
            answers += 1
            if code == Code.NOT_COORDINATOR or (code in MOVED and answers > 1):  # the first time it is asked again
                self._connection.moved(kind, key)
            if code not in _AGAIN:
                break
            await asyncio.sleep(pause_s)
        raise refusal(code)

    def _left_ms(self) -> int:
        return max(1, int((self._deadline_s - time.monotonic()) * 1000))


class _Pieces:
    """The bytes of a request, joined once: aiokafka adds a header before them, and then the size of both."""

    __slots__ = ("_headed", "_pieces")

    def __init__(self, pieces: Sequence[bytes | bytearray], *, headed: bool = False) -> None:
        self._pieces = pieces
        self._headed = headed

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def __radd__(self, before: bytes) -> "_Pieces | bytes":
        pieces = (before, *self._pieces)
        return b"".join(pieces) if self._headed else _Pieces(pieces, headed=True)


class _ProduceStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 0
    API_VERSION = 7
    RESPONSE_TYPE = ProduceResponse_v7
    SCHEMA = ProduceRequest_v7.SCHEMA

    def encode(self) -> _Pieces:
        """Return the same bytes as aiokafka's own request, which copies its record batches seven times."""
        transactional_id, replicas, timeout_ms, topics = (self.get_item(name) for name in self.SCHEMA.names)
        pieces = [_text(transactional_id), struct.pack(">hii", replicas, timeout_ms, len(topics))]
        for topic, parts in topics:
            pieces += (_text(topic), struct.pack(">i", len(parts)))
            for partition, records in parts:
                pieces += (struct.pack(">ii", partition, len(records)), records)
        return _Pieces(pieces)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">h", len(encoded)) + encoded


class Produce(Request[_ProduceStruct]):  # type: ignore[misc]
    """Write record batches to partitions of topics, acknowledged by all replicas in sync."""

    API_KEY = 0

    def __init__(
        self, transactional_id: str, timeout_ms: int, topics: list[tuple[str, list[tuple[int, bytearray]]]]
    ) -> None:
        self._transactional_id = transactional_id
        self._timeout_ms = timeout_ms
        self._topics = topics

    def build(self, request_struct_class: type[_ProduceStruct]) -> _ProduceStruct:
        """Return the request of a version."""
        return request_struct_class(self._transactional_id, _ALL_IN_SYNC, self._timeout_ms, self._topics)


def _first_code(answer: Any) -> int:
    """Return the error code of an answer; that of the first place in trouble, where it speaks of several."""
    if hasattr(answer, "error_code"):
        return int(answer.error_code)
    codes = [code for _, parts in answer.errors for _, code in parts]
    return next((code for code in codes if code and code != Code.OPERATION_NOT_ATTEMPTED), max(codes, default=0))


def _objection(check: Callable[[], None] | None) -> Exception | None:
    """Return what a check raises, if anything."""
    if check is not None:
        try:
            check()
        except Exception as error:
            return error
    return None


def _size(message: Message) -> int:
    headers: Headers = message.headers
    return len(message.value) + len(message.key or b"") + sum(len(name) + len(text) + 8 for name, text in headers)


def _pauses(deadline_s: float) -> Iterator[float]:
    """Yield pauses in seconds, longer each time, until the deadline; at least one."""
    tries = 0
    while not tries or time.monotonic() < deadline_s:
        yield _PAUSES_S[min(tries, len(_PAUSES_S) - 1)]
        tries += 1
