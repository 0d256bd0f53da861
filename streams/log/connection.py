"""One process's connection to the brokers of a Kafka cluster: requests, and what their errors mean here.

Rules of this file:
- Requests go through aiokafka's client and protocol classes; nothing of it keeps state about consuming or producing.
- An answer is a code of the protocol. `refusal` turns a code into an error of the program, by one table: what passes
  by itself is LogBusy, what an operator must mend is LogUnusable, what says that another writer took over is Fenced.
- Every call has a deadline; an answer that does not come is not known, never "no".
"""

import asyncio
import functools
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, ParamSpec, Protocol, TypeVar

from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.conn import create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.admin import DeleteRecordsRequest
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields
from aiokafka.record.control_record import ABORT_MARKER, ControlRecord
from aiokafka.record.memory_records import MemoryRecords

from schemas.errors import Fenced, LogBusy, LogFull, LogUnusable, StreamveilError
from schemas.outbound import Headers, Message
from streams.config import Kafka
from streams.secretfile import read_secret

REQUEST_TIMEOUT_MS: Final = 4000
METADATA_TRIES: Final = 50
RETRY_S: Final = 0.05
PATIENCE_S: Final = 3.0
CLOSE_S: Final = 3.0
FETCH_BYTES: Final = 2_000_000
"""Of one partition in one answer; a bigger record comes alone."""

EARLIEST: Final = -2
LATEST: Final = -1
_COMMITTED: Final = 1  # isolation level: what was aborted or may still be is not shown
_EVERYTHING: Final = 0

_P = ParamSpec("_P")
_R = TypeVar("_R")

_aiokafka_logger = logging.getLogger("aiokafka")
_aiokafka_logger.addHandler(logging.NullHandler())  # what matters is raised from here
_aiokafka_logger.propagate = False


class Place(NamedTuple):
    """A partition of a topic; aiokafka takes it for one of its own."""

    topic: str
    partition: int


class Code:
    """Error codes of the protocol that mean something special here; their names are Kafka's."""

    NONE = 0
    OFFSET_OUT_OF_RANGE = 1
    UNKNOWN_TOPIC_OR_PARTITION = 3
    REQUEST_TIMED_OUT = 7
    MESSAGE_TOO_LARGE = 10
    COORDINATOR_LOAD_IN_PROGRESS = 14
    COORDINATOR_NOT_AVAILABLE = 15
    NOT_COORDINATOR = 16
    NOT_ENOUGH_REPLICAS = 19
    NOT_ENOUGH_REPLICAS_AFTER_APPEND = 20
    INVALID_TIMESTAMP = 32
    UNSUPPORTED_VERSION = 35
    DUPLICATE_SEQUENCE_NUMBER = 46
    INVALID_PRODUCER_EPOCH = 47
    INVALID_PRODUCER_ID_MAPPING = 49
    CONCURRENT_TRANSACTIONS = 51
    OPERATION_NOT_ATTEMPTED = 55  # of the others, when one is refused
    KAFKA_STORAGE_ERROR = 56
    UNSTABLE_OFFSET_COMMIT = 88
    PRODUCER_FENCED = 90


FENCED: Final = frozenset({Code.INVALID_PRODUCER_EPOCH, Code.PRODUCER_FENCED})
MOVED: Final = frozenset({Code.COORDINATOR_NOT_AVAILABLE, Code.NOT_COORDINATOR})
_FORBIDDEN = (
    "the brokers do not allow this to the user of [kafka]: use the right one, or run `streamveil streams apply`"
)
_MISSING = "a stream does not exist on the brokers: run `streamveil streams apply` first"
_UNUSABLE: Final[Mapping[int, str]] = {
    Code.UNKNOWN_TOPIC_OR_PARTITION: _MISSING,
    Code.MESSAGE_TOO_LARGE: "a record is larger than its topic allows: run `streamveil streams apply`",
    18: "a batch is larger than a segment of its topic: run `streamveil streams apply`",
    26: "the brokers refuse `lease_s` as session time-out: choose one that their group.*.session.timeout.ms allow",
    29: _FORBIDDEN,
    30: _FORBIDDEN,
    31: _FORBIDDEN,
    Code.INVALID_TIMESTAMP: "a topic refuses the time of a record: run `streamveil streams apply`",
    Code.UNSUPPORTED_VERSION: "the brokers do not speak this version of the protocol: use Apache Kafka 4",
    50: "the brokers refuse `transaction_timeout_ms`: choose less than their transaction.max.timeout.ms",
    53: _FORBIDDEN,
}


def refusal(code: int, **where: str | int) -> StreamveilError:
    """Return the error that a code of the protocol, which is not 0, stands for."""
    if code in FENCED:
        return Fenced(None, **where)
    if code in _UNUSABLE:
        return LogUnusable(_UNUSABLE[code], **where)
    if code == Code.INVALID_PRODUCER_ID_MAPPING:  # after transactional.id.expiration.ms without a transaction
        return LogBusy("the brokers have forgotten this writer, which was silent for long; it begins anew", **where)
    if code == Code.KAFKA_STORAGE_ERROR:
        return LogFull("a disk of the brokers is full or fails: free some space", code=code, **where)
    return LogBusy("the brokers cannot do this now", code=code, **where)


def patient(ask: Callable[_P, Awaitable[_R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """Return a call that asks again for up to `PATIENCE_S` while the brokers are busy: leaders move, and come back."""

    @functools.wraps(ask)
    async def asked(*args: _P.args, **options: _P.kwargs) -> _R:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await ask(*args, **options)
            except LogBusy:
                if time.monotonic() > deadline_s:
                    raise
            await asyncio.sleep(RETRY_S)

    return asked


class Fetched(NamedTuple):
    """What one answer says of one partition from an offset on: committed messages, and where it stands."""

    messages: list[Message]
    offsets: list[int]  # of the messages; they rise, with gaps where transactions ended
    next_offset: int  # where to go on: behind the messages, or behind what is no message
    high_watermark: int
    last_stable: int  # all before it is decided; equal to `high_watermark` if no transaction is open


class _Answer(Protocol):
    """Any response of the protocol."""

    def __getattr__(self, name: str) -> Any: ...


class _OffsetFetchResponse(Response):  # type: ignore[misc]
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class _OffsetFetchStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 9
    API_VERSION = 7
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _OffsetFetchResponse
    SCHEMA = Schema(
        ("group", CompactString("utf-8")),
        (
            "topics",
            CompactArray(("name", CompactString("utf-8")), ("partitions", CompactArray(Int32)), ("tags", TaggedFields)),
        ),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class _OffsetFetch(Request[_OffsetFetchStruct]):  # type: ignore[misc]
    """OffsetFetch of KIP-447, which aiokafka lacks: an offset that a transaction may yet move is not told."""

    API_KEY = 9

    def __init__(self, group: str, topics: dict[str, list[int]], *, stable: bool) -> None:
        asked: list[object] = [(topic, partitions, {}) for topic, partitions in topics.items()]
        self._fields: tuple[object, ...] = (group, asked, stable, {})

    def build(self, struct: type[_OffsetFetchStruct]) -> _OffsetFetchStruct:
        return struct(*self._fields)


class Connection:
    """A lazily opened connection, used from one event loop."""

    def __init__(self, settings: Kafka) -> None:
        """Take the settings; nothing is read or connected yet."""
        self.settings = settings
        self._client: AIOKafkaClient | None = None
        self._opening = asyncio.Lock()
        self._coordinators: dict[tuple[int, str], int] = {}
        self._partitions: dict[str, int] = {}

    # --- opening and closing ------------------------------------------------------------------------------------

    async def client(self) -> AIOKafkaClient:
        """Return the client, connected. Raises LogBusy or LogUnusable."""
        async with self._opening:
            if self._client is None:
                self._client = await self.another(REQUEST_TIMEOUT_MS)
            return self._client

    async def another(self, request_timeout_ms: int) -> AIOKafkaClient:
        """Return a new client, connected, which the caller closes. Raises LogBusy or LogUnusable."""
        options = self._security()
        client = AIOKafkaClient(
            bootstrap_servers=list(self.settings.servers),
            client_id="streamveil",
            request_timeout_ms=request_timeout_ms,
            retry_backoff_ms=int(RETRY_S * 1000),
            **options,
        )
        try:
            await client.bootstrap()
        except KafkaError:
            await closed(client)
            raise await self._why_not(options) from None
        return client

    def _security(self) -> dict[str, Any]:
        settings = self.settings
        if settings.username is None:
            return {"security_protocol": "PLAINTEXT"}
        return {
            "security_protocol": "SASL_SSL",
            "ssl_context": tls_context(settings),
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": settings.username,
            "sasl_plain_password": password(settings),
        }

    async def _why_not(self, options: dict[str, Any]) -> StreamveilError:
        """Try each broker once more, and return the reason that an operator needs."""
        servers = ",".join(self.settings.servers)
        found: StreamveilError = LogBusy("no broker answers: are they running, and is the address right?", log=servers)
        for server in self.settings.servers:
            host, port = server.rsplit(":", 1)
            try:
                connection = await create_conn(host.strip("[]"), int(port), request_timeout_ms=5000, **options)
            except ssl.SSLError as error:
                why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
                return LogUnusable(f"the brokers' TLS certificate is not accepted: {why}; check ca_file", log=server)
            except (AuthenticationFailedError, SaslAuthenticationFailed, UnsupportedSaslMechanismError):
                return LogUnusable("the brokers refuse user and password of [kafka]: check password_file", log=server)
            except (OSError, KafkaError, TimeoutError):
                continue
            connection.close()
            found = LogBusy("the brokers answered only now; trying again", log=servers)
        return found

    async def close(self) -> None:
        """Close all connections; idempotent."""
        if self._client is not None:
            client, self._client = self._client, None
            await closed(client)

    # --- where things are ---------------------------------------------------------------------------------------

    async def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has. Raises LogUnusable if there is no such topic for this user."""
        known = self._partitions.get(topic)
        if known is not None:
            return known
        client = await self.client()
        await client.add_topic(topic)
        for _ in range(METADATA_TRIES):
            found = client.cluster.partitions_for_topic(topic)
            if found:
                self._partitions[topic] = len(found)
                return len(found)
            if topic in client.cluster.unauthorized_topics:
                raise LogUnusable(_FORBIDDEN, topic=topic)
            if not await client.force_metadata_update():
                raise LogBusy("no broker answers", topic=topic)
            await asyncio.sleep(RETRY_S / 2)
        raise LogUnusable(_MISSING, topic=topic)

    async def leaders(self, places: Sequence[Place]) -> dict[int, list[Place]]:
        """Return the places by the broker that leads them. Raises LogBusy where there is no leader now."""
        client = await self.client()
        found: dict[int, list[Place]] = {}
        for place in places:
            if place.topic not in self._partitions:
                await self.partitions(place.topic)
            leader = client.cluster.leader_for_partition(place)
            if leader is None or leader < 0:
                self.stale()
                raise LogBusy("a partition has no leader now", topic=place.topic, partition=place.partition)
            found.setdefault(leader, []).append(place)
        return found

    def stale(self) -> None:
        """Say that what is known of leaders may be out of date; it is read anew in the background."""
        if self._client is not None:
            self._client.force_metadata_update()

    @patient
    async def coordinator(self, kind: int, key: str) -> int:
        """Return the broker that coordinates a group or transactional id."""
        known = self._coordinators.get((kind, key))
        if known is not None:
            return known
        client = await self.client()
        try:
            node = await client.coordinator_lookup(kind, key)
        except (KafkaError, AssertionError, KeyError, OSError, TimeoutError) as error:
            raise refusal(getattr(error, "errno", None) or Code.COORDINATOR_NOT_AVAILABLE) from None
        self._coordinators[kind, key] = node
        return int(node)

    def moved(self, kind: int, key: str) -> None:
        """Say that a coordinator is not there any more."""
        self._coordinators.pop((kind, key), None)
        self.stale()

    async def ask(self, node: int, request: Any, group: ConnectionGroup = ConnectionGroup.DEFAULT) -> _Answer:
        """Send a request and return the answer. Raises LogBusy if none came; then it is not known what happened.

        Raises LogUnusable if the broker takes no version of the request that is spoken here; then it was not sent.
        """
        client = await self.client()
        try:
            answer: _Answer = await client.send(node, request, group=group)
        except (KafkaError, KeyError, OSError, TimeoutError):  # KeyError: the connection was closed meanwhile
            self.stale()
            raise LogBusy("a broker does not answer", broker=node) from None
        except NotImplementedError:  # so aiokafka says that it and the broker have no version in common
            raise refusal(Code.UNSUPPORTED_VERSION, broker=node) from None
        return answer

    async def ask_coordinator(self, kind: int, key: str, request: Any) -> _Answer:
        """Send a request to the coordinator of a key. Raises LogBusy; the coordinator is looked up anew then."""
        node = await self.coordinator(kind, key)
        try:
            return await self.ask(node, request, ConnectionGroup.COORDINATION)
        except LogBusy:
            self.moved(kind, key)
            raise

    # --- reading ------------------------------------------------------------------------------------------------

    @patient
    async def offsets(self, topic: str, timestamp: int, *, stable: bool = False) -> list[int]:
        """Return, per partition, the EARLIEST offset or the LATEST: the high watermark, or the last stable offset."""
        partitions = await self.partitions(topic)
        places = [Place(topic, partition) for partition in range(partitions)]
        found = [0] * partitions

        async def ask(node: int, mine: list[Place]) -> None:
            asked = [(topic, [(place.partition, timestamp) for place in mine])]
            answer = await self.ask(node, OffsetRequest(-1, _COMMITTED if stable else _EVERYTHING, asked))
            for _, parts in answer.topics:
                for partition, code, _, offset in parts:
                    self._check(code, topic, partition)
                    found[partition] = offset

        await all_of([ask(node, mine) for node, mine in (await self.leaders(places)).items()])
        return found

    async def committed(
        self, group: str, places: Sequence[Place], *, stable: bool = True
    ) -> dict[Place, tuple[int, str]]:
        """Return the offset and its note that a group committed, per place; -1 where it never did.

        Raises LogBusy while a transaction is open that may move one of them, but if `stable` is off.
        """
        topics: dict[str, list[int]] = {}
        for place in places:
            topics.setdefault(place.topic, []).append(place.partition)
        answer = await self.ask_coordinator(CoordinationType.GROUP, group, _OffsetFetch(group, topics, stable=stable))
        if answer.error_code in MOVED:
            self.moved(CoordinationType.GROUP, group)
        found = {}
        code = answer.error_code
        for topic, parts, _ in answer.topics:
            for partition, offset, _, note, part_code, _ in parts:
                code = code or part_code
                found[Place(topic, partition)] = (offset, note or "")
        if code:
            raise refusal(code)
        return found

    async def fetch(self, node: int, wanted: Sequence[tuple[Place, int]], wait_ms: int) -> dict[Place, Fetched]:
        """Return committed messages from one broker, from an offset on, per place; waits for the first to come.

        Raises OffsetGone where a partition does not have the offset, LogBusy, LogUnusable.
        """
        topics: dict[str, list[tuple[int, int, int]]] = {}
        for place, offset in wanted:
            topics.setdefault(place.topic, []).append((place.partition, offset, FETCH_BYTES))
        request = FetchRequest(wait_ms, 1, 4 * FETCH_BYTES, _COMMITTED, list(topics.items()))
        answer = await self.ask(node, request)
        starts = dict(wanted)
        found = {}
        for topic, parts in answer.topics:
            for partition, code, high_watermark, last_stable, _, aborted, *_, records in parts:
                place = Place(topic, partition)
                if code == Code.OFFSET_OUT_OF_RANGE:
                    raise OffsetGone(place)
                self._check(code, topic, partition)
                try:
                    messages, offsets, next_offset = _unpacked(records, aborted, starts[place])
                except (KafkaError, ValueError, RuntimeError, AssertionError):
                    raise LogUnusable(
                        "records cannot be read: are they damaged, or compressed in a way that is not installed?",
                        topic=topic, partition=partition, offset=starts[place],
                    ) from None  # fmt: skip
                found[place] = Fetched(messages, offsets, next_offset, high_watermark, last_stable)
        return found

    @patient
    async def delete(self, wanted: Mapping[Place, int]) -> None:
        """Have the brokers delete what lies before an offset, per place. Raises LogBusy or LogUnusable; idempotent."""

        async def ask(node: int, mine: list[Place]) -> None:
            topics: dict[str, list[tuple[int, int]]] = {}
            for place in mine:
                topics.setdefault(place.topic, []).append((place.partition, wanted[place]))
            answer = await self.ask(node, DeleteRecordsRequest(list(topics.items()), REQUEST_TIMEOUT_MS))
            for found in answer.topics:
                for part in found[1]:  # partition, its new beginning, code
                    self._check(part[2], found[0], part[0])

        await all_of([ask(node, mine) for node, mine in (await self.leaders(list(wanted))).items()])

    def _check(self, code: int, topic: str, partition: int) -> None:
        if code:
            self.stale()
            raise refusal(code, topic=topic, partition=partition)


async def closed(client: AIOKafkaClient) -> None:
    """Close a client; a connection to a broker that is gone is not waited for longer than `CLOSE_S`."""
    with suppress(TimeoutError):
        await asyncio.wait_for(client.close(), CLOSE_S)


async def all_of(awaitables: Sequence[Awaitable[None]]) -> None:
    """Wait for all; raise the first error, Fenced before others, when none is under way any more."""
    if len(awaitables) == 1:  # without a task, which takes two more turns of the loop
        await awaitables[0]
        return
    found = await asyncio.gather(*awaitables, return_exceptions=True)
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        raise next((one for one in errors if isinstance(one, Fenced)), errors[0])


class OffsetGone(Exception):
    """An offset is before the first that the partition still has, or behind its end."""

    def __init__(self, place: Place) -> None:
        """Take the place."""
        super().__init__()
        self.place = place


def _unpacked(
    records: bytes, aborted: Sequence[tuple[int, int]] | None, start: int
) -> tuple[list[Message], list[int], int]:
    """Return the committed messages of an answer with their offsets, and where to go on.

    `aborted`: producer and first offset of each aborted transaction in it. A transaction that was aborted hides what
    its producer wrote from that offset to its marker. Raises LogUnusable if the bytes are damaged.
    """
    messages: list[Message] = []
    offsets: list[int] = []
    pending = sorted(aborted or (), key=lambda one: one[1], reverse=True)
    hidden: set[int] = set()
    headers: dict[tuple[tuple[str, bytes], ...], Headers] = {}
    pages = MemoryRecords(records)
    while pages.has_next():
        page = pages.next_batch()
        if not page.validate_crc():
            raise LogUnusable("the brokers sent a record that is damaged: check their disks")
        if page.next_offset <= start:
            continue
        while pending and pending[-1][1] <= page.base_offset:
            hidden.add(pending.pop()[0])
        if page.is_control_batch:
            if page.producer_id in hidden and _is_abort(page):
                hidden.discard(page.producer_id)
        elif not (page.is_transactional and page.producer_id in hidden):
            for record in page:
                if record.offset >= start:
                    found = record.headers
                    if found:
                        as_tuple = tuple(found)
                        kept = headers.setdefault(as_tuple, as_tuple)
                    else:
                        kept = ()
                    messages.append(Message(record.timestamp, record.key, kept, record.value or b""))
                    offsets.append(record.offset)
        start = page.next_offset
    return messages, offsets, start


def _is_abort(page: Any) -> bool:
    return any(ControlRecord.parse(record.key) == ABORT_MARKER for record in page)


def tls_context(settings: Kafka) -> ssl.SSLContext:
    """Return what verifies the brokers. Raises LogUnusable if the file of the authorities cannot be used."""
    try:
        return ssl.create_default_context(cafile=str(settings.ca_path) if settings.ca_path else None)
    except (OSError, ssl.SSLError):
        raise LogUnusable(
            "ca_file cannot be read as PEM certificates: check [kafka] ca_file", file=str(settings.ca_path)
        ) from None


def password(settings: Kafka) -> str:
    """Return the password of the user; its file must be its owner's alone. Raises LogUnusable."""
    return read_secret(settings.password_path or Path(), "the brokers' password", LogUnusable)
