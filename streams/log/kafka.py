"""The log on Apache Kafka: a stream is a topic, a commit one transaction per batch of one input partition.

Rules of this file:
- At assignment a consumer fences first, then reads the committed offset, then reads from there. Who had the partition
  before can commit nothing from then on, so the offset cannot move any more.
- Partition p of both input streams goes to the same worker. A batch under way keeps its partitions for a while when
  they are asked for (`HANDOVER_S`), so that joining and leaving workers make nobody's work void.
- A write whose outcome is not known is not guessed: the writer is not used again, and the next fence settles it.
- Bookmarks of publishing are offsets of a consumer group of their own, written in the transaction of their records;
  offsets of a stream that whoever publishes may read (`BOOKMARKED`), which the brokers demand.
- Consumed input stays until `retention.ms` of its topic: `forget_consumed` has nothing to do.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import KafkaError
from aiokafka.protocol.group import LeaveGroupRequest

from schemas.catalog import BOOKMARKED, CATALOG, INPUTS
from schemas.errors import Fenced, LogBusy, LogUnusable, Retriable
from streams.config import Kafka
from streams.log.connection import (
    EARLIEST,
    LATEST,
    Connection,
    Fetched,
    OffsetGone,
    Place,
    all_of,
    closed,
    patient,
    refusal,
)
from streams.log.fencing import Offsets, Writer
from streams.log.protocol import Batch, Bookmark, Message, Output, Stored

IDLE_FETCH_MS: Final = 50
"""How long the brokers hold an answer while there is nothing to read."""
UNDECIDED_S: Final = 0.5
HANDOVER_S: Final = 10.0
_REBALANCE_S: Final = 15.0
_STUCK_S: Final = 300.0
"""A worker that polls nothing for so long is taken out of the group."""
_JOIN_TIMEOUT_MS: Final = int(2 * _REBALANCE_S * 1000)
_LEAVE_S: Final = 3.0
_LOOK_S: Final = 0.005
_MARKS: Final = 100
"""More than so many offsets behind is lag, whether or not they are messages."""


class KafkaLog:
    """The streams of one deployment on a Kafka cluster; see `streams.log.protocol.Log`."""

    log_id = ""

    def __init__(self, settings: Kafka, *, partitions: int, lease_s: float) -> None:
        """Take the settings; connects at the first call, and finds out then whether the streams are as stated."""
        self.partitions = partitions
        self.settings = settings
        self.lease_s = lease_s
        self.connection = Connection(settings)
        self._writers: dict[str, Writer] = {}
        self._writing = asyncio.Lock()
        self._append_id = f"{settings.prefix}append.{settings.username or 'anybody'}.{secrets.token_hex(8)}"
        self._checked: set[str] = set()
        self._rest: tuple[Place, int, Fetched] | None = None
        self._consumers: list[KafkaConsumer] = []

    async def topic(self, stream: str) -> str:
        """Return a stream's topic. Raises LogUnusable if the brokers have none, or one with other partitions."""
        topic = self.settings.prefix + stream
        if topic not in self._checked:
            found = await self.connection.partitions(topic)
            if found != self.partitions:
                raise LogUnusable(
                    f"a stream has {found} partitions on the brokers: set `partitions` to that", stream=stream
                )
            self._checked.add(topic)
        return topic

    # --- writing ------------------------------------------------------------------------------------------------

    async def append(self, outputs: Sequence[Output], bookmark: tuple[str, Bookmark | None] | None = None) -> None:
        """Write all outputs, and the named bookmark (None deletes it), or nothing; durable on return.

        Raises LogBusy if nothing was written. When the brokers stop answering in the middle of the decision it is
        not known, and raises LogUnusable.
        """
        if len({output.stream in INPUTS for output in outputs} | ({True} if bookmark else set())) > 1:
            raise ValueError("input streams and bookmarks are not appended together with other streams")
        messages = await self.placed(outputs)
        offsets, writer_id = None, self._append_id
        if bookmark is not None:
            name, mark = bookmark
            writer_id, offsets = self._publish_id(name), await self._bookmark_offsets(name, mark)
        async with self._writing:
            writer = self._writers.setdefault(writer_id, Writer(self.connection, writer_id))
            for tries_left in (1, 0):  # a writer that was silent for long is forgotten, and begins anew
                if not writer.usable:
                    await writer.fence()
                try:
                    await writer.write(messages, offsets)
                    break
                except LogBusy as error:
                    if writer.in_doubt:
                        raise LogUnusable(
                            "the brokers did not say whether the last write was done: look before you repeat it"
                        ) from error
                    if not tries_left:
                        raise
            with suppress(LogBusy):  # it is written, whatever this says; the next one fences again
                await writer.fence()  # not before all partitions show what was committed

    async def placed(self, outputs: Sequence[Output]) -> dict[Place, list[Message]]:
        """Return the messages by topic and partition. Raises ValueError for a stream or partition that there is not."""
        found: dict[Place, list[Message]] = {}
        for output in outputs:
            if output.stream not in CATALOG or not 0 <= output.partition < self.partitions:
                raise ValueError(f"there is no partition {output.partition} of {output.stream}")
            if output.messages:
                found.setdefault(Place(await self.topic(output.stream), output.partition), []).extend(output.messages)
        return found

    def _publish_id(self, name: str) -> str:
        return f"{self.settings.prefix}publish.{name}"

    async def _bookmark_place(self) -> Place:
        return Place(await self.topic(BOOKMARKED), 0)

    async def _bookmark_offsets(self, name: str, mark: Bookmark | None) -> Offsets:
        position = (0, "") if mark is None else (mark.position, f"{mark.line} {mark.digest}")
        return Offsets(self._publish_id(name), {await self._bookmark_place(): position})

    async def bookmark(self, name: str) -> Bookmark | None:
        """Return a bookmark that was written with `append`, if any.

        A writer that was killed in the middle is fenced if it does not come to its end by itself.
        """
        writer_id, place = self._publish_id(name), await self._bookmark_place()
        try:
            found = await patient(self.connection.committed)(writer_id, [place])
        except LogBusy:
            async with self._writing:
                await self._writers.setdefault(writer_id, Writer(self.connection, writer_id)).fence()
            found = await self.connection.committed(writer_id, [place])
        position, note = found[place]
        if not note:
            return None
        line, _, digest = note.partition(" ")
        return Bookmark(position, int(line), digest)

    # --- reading ------------------------------------------------------------------------------------------------

    async def read(self, stream: str, partition: int, offset: int, limit: int, until: int = 0) -> list[Stored]:
        """Return up to `limit` committed messages from `offset` on, in order; empty at the end.

        What is decided becomes visible a moment after: waits up to `UNDECIDED_S` for what was written before the call.
        Raises LogBusy if not all before `until` is decided then, or not seen by the broker that is asked.
        """
        place = Place(await self.topic(stream), partition)
        taken: list[Stored] = []
        written = None  # up to here, when this was called
        deadline_s = time.monotonic() + UNDECIDED_S
        while len(taken) < limit:
            found = await self._page(place, offset)
            if found.next_offset == offset:
                written = max(until, found.high_watermark) if written is None else written
                if found.last_stable >= written:
                    break
                if time.monotonic() > deadline_s:
                    if found.last_stable < until:
                        raise LogBusy("not all that was written can be read yet", stream=stream, partition=partition)
                    break
                await asyncio.sleep(_LOOK_S)
                continue
            room = limit - len(taken)
            some = zip(found.offsets[:room], found.messages[:room], strict=True)
            taken += [
                Stored(stream, partition, at, one.timestamp_ms, one.key, one.headers, one.value) for at, one in some
            ]
            offset = found.next_offset
            if len(found.messages) > room:  # whoever reads on begins here
                at = found.offsets[room]
                rest = Fetched(found.messages[room:], found.offsets[room:], *found[2:])
                self._rest = (place, at, rest)
        return taken

    async def _page(self, place: Place, offset: int) -> Fetched:
        if self._rest is not None and self._rest[0] == place and self._rest[1] == offset:
            return self._rest[2]
        for node in await self.connection.leaders([place]):
            try:
                return (await self.connection.fetch(node, [(place, offset)], 0))[place]
            except OffsetGone:
                begin = (await self.connection.offsets(place.topic, EARLIEST))[place.partition]
                return Fetched([], [], max(begin, offset), 0, 0)
        raise LogBusy

    async def begin_offsets(self, stream: str) -> list[int]:
        """Return the first offset that can still be read, per partition."""
        return await self.connection.offsets(await self.topic(stream), EARLIEST)

    async def end_offsets(self, stream: str) -> list[int]:
        """Return the offset after the last written message (the high watermark), per partition."""
        return await self.connection.offsets(await self.topic(stream), LATEST)

    async def stable_offsets(self, stream: str) -> list[int]:
        """Return the offset before which everything is committed or will never be (last stable), per partition."""
        return await self.connection.offsets(await self.topic(stream), LATEST, stable=True)

    async def cut(self, stream: str, offsets: Sequence[int]) -> list[int]:
        """Delete what lies before these offsets, one per partition, and return the new `begin_offsets`.

        The brokers delete the files of a segment once all of it is before the beginning. They compact `suppressions`
        by themselves, and nothing is cut there. Raises LogUnusable if the user of `[kafka]` lacks the right.
        """
        if stream in INPUTS:
            raise ValueError("an input stream is cut by those who consume it")
        topic, begins = await self.topic(stream), await self.begin_offsets(stream)
        asked = {Place(topic, partition): offset for partition, offset in enumerate(offsets)}
        more = {place: offset for place, offset in asked.items() if offset > begins[place.partition]}
        if not more or CATALOG[stream].compacted:
            return begins
        await self.connection.delete(more)
        self._rest = None
        return await self.begin_offsets(stream)

    # --- consuming ----------------------------------------------------------------------------------------------

    def consumer(self, worker_id: str) -> "KafkaConsumer":
        """Return a consumer of the input streams; of two with the same id, the newer takes the older one's place."""
        self._consumers.append(KafkaConsumer(self, worker_id))
        return self._consumers[-1]

    async def close(self) -> None:
        """Free what is held; idempotent."""
        for consumer in self._consumers:
            await consumer.close()
        await self.connection.close()


class _Partition:
    """An input partition that this consumer holds: its writer, what was read of it, and where it stands."""

    __slots__ = ("fetched", "messages", "offset", "offsets", "since_s", "writer")

    def __init__(self, writer: Writer, offset: int) -> None:
        self.writer = writer
        self.offset = offset  # committed
        self.fetched = offset  # where the next fetch begins
        self.messages: list[Message] = []
        self.offsets: list[int] = []
        self.since_s = 0.0  # when the first of the messages was read

    def add(self, found: Fetched, now_s: float) -> None:
        if found.messages:
            if not self.messages:
                self.since_s = now_s
            self.messages += found.messages
            self.offsets += found.offsets
        self.fetched = found.next_offset

    def batch(self, place: Place, stream: str, max_records: int) -> Batch:
        """Return the first messages as a batch; they stay here until it is committed."""
        messages, offsets = self.messages[:max_records], self.offsets[:max_records]
        whole = len(messages) == len(self.messages)
        next_offset = self.fetched if whole else self.offsets[max_records]
        return Batch(stream, place.partition, self.offset, next_offset, self.writer.epoch, messages, offsets)

    def done(self, batch: Batch, now_s: float) -> None:
        """Forget what was committed."""
        del self.messages[: len(batch.messages)], self.offsets[: len(batch.messages)]
        self.offset = batch.next_offset
        self.since_s = now_s


class KafkaConsumer:
    """One worker's side of the exactly-once contract; see `streams.log.protocol.Consumer`."""

    def __init__(self, log: KafkaLog, worker_id: str) -> None:
        """Take the log; the group is joined at the first `poll`."""
        self._log = log
        self._connection = log.connection
        self._settings = log.settings
        self._worker_id = worker_id
        self.group = f"{log.settings.prefix}workers"
        self._streams: dict[str, str] = {}  # topic → stream, in the order of polling
        self._membership: _Membership | None = None
        self._held: dict[Place, _Partition | None] = {}  # None: assigned, not fenced yet
        self._outstanding: tuple[Place, Batch] | None = None
        self._quiet = asyncio.Event()  # no batch is under way
        self._quiet.set()
        self._last: dict[str, int] = {}
        self._closed = False
        self.missed = 0
        """Messages that the brokers deleted unread, as far as this consumer knows."""

    async def poll(self, max_records: int, timeout_s: float) -> Batch | None:
        """Return the next batch of one input partition, `traffic` first, or None after the time-out.

        The first message of a batch waits for more for up to `commit_every_ms`. A batch that was polled and not
        committed comes again. Raises ValueError after `close`, LogBusy, LogUnusable.
        """
        if self._closed:
            raise ValueError("the consumer is closed")
        deadline_s = time.monotonic() + timeout_s
        if self._membership is None:
            self._membership = await self._joined()
        try:
            self._membership.polled()
        except LogBusy:
            await self._join_anew()
            raise
        if self._outstanding is not None:
            await asyncio.sleep(_LOOK_S)  # let the heartbeat through
            return self._outstanding[1]
        while True:
            await self._open_assigned()
            left_s = deadline_s - time.monotonic()
            place = await self._waiting_place(max_records, left_s)
            if place is not None:
                return self._served(place, max_records)
            if deadline_s <= time.monotonic():
                return None

    async def _join_anew(self) -> None:
        """Leave the group; the next poll joins it again."""
        membership, self._membership = self._membership, None
        self._let_go()
        if membership is not None:
            await membership.leave()

    def _served(self, place: Place, max_records: int) -> Batch:
        held = self._held[place]
        if held is None:
            raise LogBusy("a partition was handed over")
        stream = self._streams[place.topic]
        batch = held.batch(place, stream, max_records)
        self._outstanding = (place, batch)
        self._quiet.clear()
        self._last[place.topic] = place.partition
        return batch

    async def _joined(self) -> "_Membership":
        self._streams = {await self._log.topic(stream): stream for stream in INPUTS}
        return await _Membership.join(self, list(self._streams), self._worker_id, self._log.lease_s)

    async def _open_assigned(self) -> None:
        """Fence the partitions that were assigned, and find out where to go on."""
        new = [place for place, held in self._held.items() if held is None]
        if not new:
            return
        writers = [
            Writer(self._connection, f"{self.group}.{self._streams[place.topic]}.{place.partition}") for place in new
        ]
        await all_of([writer.fence() for writer in writers])
        committed = await patient(self._connection.committed)(self.group, new)
        begins = {topic: await self._connection.offsets(topic, EARLIEST) for topic in {place.topic for place in new}}
        for place, writer in zip(new, writers, strict=True):
            if place in self._held:  # it may have been taken away meanwhile
                begin, offset = begins[place.topic][place.partition], committed[place][0]
                if 0 <= offset < begin:
                    self.missed += begin - offset
                self._held[place] = _Partition(writer, max(begin, offset))

    async def _waiting_place(self, max_records: int, left_s: float) -> Place | None:
        """Read what there is, and return the place whose batch is due, `traffic` first and in turn; None: none yet."""
        now_s = time.monotonic()
        due = self._due(max_records, now_s)
        waits_s = [held.since_s + self._settings.commit_every_ms / 1000 - now_s for held in self._with_messages()]
        if due is None and waits_s:  # let the batch fill
            await asyncio.sleep(max(0.0, min(*waits_s, left_s)))
        await self._fetch(max_records, 0 if waits_s else max(0, min(IDLE_FETCH_MS, int(left_s * 1000))))
        return self._due(max_records, time.monotonic())

    def _with_messages(self) -> list[_Partition]:
        return [held for held in self._held.values() if held is not None and held.messages]

    def _due(self, max_records: int, now_s: float) -> Place | None:
        oldest_s = now_s - self._settings.commit_every_ms / 1000
        for topic in self._streams:
            last = self._last.get(topic, -1)
            due = [
                place
                for place, held in self._held.items()
                if held is not None
                and place.topic == topic
                and (len(held.messages) >= max_records or (held.messages and held.since_s <= oldest_s))
            ]
            if due:
                return min(due, key=lambda place: (place.partition <= last, place.partition))
        return None

    async def _fetch(self, max_records: int, wait_ms: int) -> None:
        """Read on where fewer than a batch's messages are at hand; waits up to `wait_ms` if there is nothing."""
        wanted = [place for place, held in self._held.items() if held is not None and len(held.messages) < max_records]
        if not wanted:
            await asyncio.sleep(wait_ms / 1000)
            return
        by_leader = await self._connection.leaders(wanted)
        wait_ms = wait_ms if len(by_leader) == 1 else min(wait_ms, IDLE_FETCH_MS // 5)
        await all_of([self._fetch_from(node, places, wait_ms) for node, places in by_leader.items()])

    async def _fetch_from(self, node: int, places: list[Place], wait_ms: int) -> None:
        before = {place: held for place in places if (held := self._held.get(place)) is not None}
        wanted = [(place, held.fetched) for place, held in before.items()]
        try:
            found = await self._connection.fetch(node, wanted, wait_ms)
        except OffsetGone as gone:
            if self._held.get(gone.place) is before[gone.place]:
                self._held[gone.place] = None  # opened anew, at the first offset that there is
            return
        now_s = time.monotonic()
        for place, offset in wanted:
            held = before[place]
            if self._held.get(place) is held and held.fetched == offset and place in found:
                held.add(found[place], now_s)

    async def commit(self, batch: Batch, outputs: Sequence[Output], check: Callable[[], None]) -> None:
        """Write all outputs and the batch's offsets, or nothing; durable on return, and visible to whoever reads after.

        `check` is called at the last moment before the commit; if it raises, nothing is written. Raises Fenced when
        the partition belongs to another consumer or the batch is not the next one, and LogBusy when the brokers did
        not answer: then the batch comes again, if it was not committed.
        """
        messages = await self._log.placed(outputs)
        if any(output.stream in INPUTS for output in outputs):
            raise ValueError("an input stream is no output")
        place = Place(f"{self._settings.prefix}{batch.stream}", batch.partition)
        held = self._held.get(place)
        if held is None and not self._closed:
            raise LogBusy("a partition was handed over before its batch was done", partition=batch.partition)
        if held is None or (held.writer.epoch, held.offset) != (batch.lease, batch.offset):
            raise Fenced(stream=batch.stream, partition=batch.partition, offset=batch.offset)
        offsets = Offsets(self.group, {place: (batch.next_offset, "")})
        try:
            await held.writer.write(messages, offsets, check)
        except Retriable:
            if not held.writer.usable:
                self._settle(place)
            raise
        except Fenced:
            await self._end()
            raise Fenced(stream=batch.stream, partition=batch.partition, offset=batch.offset) from None
        held.done(batch, time.monotonic())
        self._over()
        if not held.writer.usable:
            self._settle(place)

    def _settle(self, place: Place) -> None:
        """Have a partition opened anew: whether its last batch was committed is for the brokers to say."""
        if place in self._held:
            self._held[place] = None
        self._over()

    def _over(self) -> None:
        """Take note that no batch is under way any more."""
        self._outstanding = None
        self._quiet.set()

    def _let_go(self) -> None:
        """Forget all partitions, and the batch under way."""
        self._held = {}
        self._over()

    async def committed_offsets(self, stream: str) -> list[int]:
        """Return the next offset to be committed of an input stream, per partition, by whichever worker.

        Where nothing but marks of transactions is left, that is the end.
        """
        return await self._committed(stream, await self._log.end_offsets(stream), stable=False)

    async def _committed(self, stream: str, ends: list[int], *, stable: bool) -> list[int]:
        topic = await self._log.topic(stream)
        places = [Place(topic, partition) for partition in range(self._log.partitions)]
        committed = await self._connection.committed(self.group, places, stable=stable)
        begins = await self._log.begin_offsets(stream)
        found = [max(begin, committed[place][0]) for begin, place in zip(begins, places, strict=True)]
        for place, end in zip(places, ends, strict=True):
            offset = found[place.partition]
            near = stable or end - offset <= _MARKS
            if offset < end and near and await self._nothing_before(place, offset, end):
                found[place.partition] = end
        return found

    async def at_end(self) -> bool:
        """Return whether everything written to the input streams so far is committed, by whichever worker.

        What is decided shows a moment after: waits for it up to `UNDECIDED_S`.
        """
        deadline_s = time.monotonic() + UNDECIDED_S
        for stream in INPUTS:
            ends = await self._log.end_offsets(stream)
            while True:
                try:
                    committed = await self._committed(stream, ends, stable=True)
                    break
                except LogBusy:
                    if time.monotonic() > deadline_s:
                        return False
                await asyncio.sleep(_LOOK_S)
            if any(offset < end for offset, end in zip(committed, ends, strict=True)):
                return False
        return True

    async def _nothing_before(self, place: Place, offset: int, end: int) -> bool:
        """Return whether from an offset to an end there are only marks of transactions, and none is open."""
        while offset < end:
            for node in await self._connection.leaders([place]):
                try:
                    found = (await self._connection.fetch(node, [(place, offset)], 0))[place]
                except OffsetGone:
                    return False
                if found.messages or found.next_offset == offset:
                    return False
                offset = found.next_offset
        return True

    async def forget_consumed(self) -> int:
        """Return 0: the brokers delete input when its `retention.ms` has passed, at most 24 hours after it came."""
        return 0

    async def close(self) -> None:
        """Give the partitions back at once; idempotent."""
        if not self._closed:
            await self._end()

    async def _end(self) -> None:
        self._closed = True
        self._let_go()
        if self._membership is not None:
            await self._membership.leave()

    # --- the group's calls --------------------------------------------------------------------------------------

    async def hand_over(self) -> None:
        """Give all partitions up, when no batch is under way any more or the group will wait no longer."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._quiet.wait(), HANDOVER_S)
        self._let_go()

    def take_over(self, places: Iterable[Place]) -> None:
        """Take partitions that the group assigned; they are fenced at the next poll."""
        self._held = dict.fromkeys(sorted(places), None)


class _Membership(ConsumerRebalanceListener):  # type: ignore[misc]
    """Membership in the group of workers: aiokafka's coordinator, without its fetcher.

    Static (KIP-345): a worker that was killed and is back within the session time-out gets its partitions at once.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._client: AIOKafkaClient
        self._coordinator: GroupCoordinator
        self._subscription = SubscriptionState()
        self._leaving = False

    @classmethod
    async def join(cls, consumer: KafkaConsumer, topics: list[str], worker_id: str, lease_s: float) -> "_Membership":
        """Return the membership; joining goes on in the background."""
        self = cls(consumer)
        self._client = await consumer._connection.another(_JOIN_TIMEOUT_MS)  # noqa: SLF001 — two halves
        self._client.set_topics(topics)
        self._subscription.subscribe(topics=set(topics), listener=self)
        self._subscription.register_fetch_waiters(())  # there is no fetcher; errors of the group go through here
        self._coordinator = GroupCoordinator(
            self._client,
            self._subscription,
            group_id=consumer.group,
            group_instance_id=worker_id,
            session_timeout_ms=int(lease_s * 1000),
            heartbeat_interval_ms=max(100, int(lease_s * 1000 / 5)),
            rebalance_timeout_ms=int(_REBALANCE_S * 1000),
            max_poll_interval_ms=int(_STUCK_S * 1000),
            enable_auto_commit=False,
            assignors=(RangePartitionAssignor,),
        )
        return self

    def polled(self) -> None:
        """Say that the worker is not stuck. Raises what the group's coordinator said. LogBusy, LogUnusable."""
        with self._subscription.fetch_context():
            pass
        try:
            self._coordinator.check_errors()
        except KafkaError as error:
            raise refusal(getattr(error, "errno", -1)) from None
        except (Exception, asyncio.CancelledError):  # of a task of aiokafka's that ended; not of this one
            raise LogBusy("membership in the group of workers was lost") from None

    async def on_partitions_revoked(self, revoked: set[Place]) -> None:
        if revoked:
            await self._consumer.hand_over()
        if self._leaving:  # not back into the group: `leave` cancels this
            await asyncio.get_running_loop().create_future()

    def on_partitions_assigned(self, assigned: set[Place]) -> None:
        self._consumer.take_over(assigned)

    async def leave(self) -> None:
        """Leave the group, so that the others need not wait for the session time-out. Never raises."""
        self._leaving = True
        coordinator = self._coordinator
        node, member = coordinator.coordinator_id, coordinator.member_id
        with suppress(Exception):  # whatever its tasks ended with
            await asyncio.wait_for(coordinator.close(), _LEAVE_S)
        coordinator.reset_generation()  # ends the heartbeat
        with suppress(Exception):  # if this fails, the session runs out
            if node is not None and member:
                request = LeaveGroupRequest(coordinator.group_id, member)
                leaving = self._client.send(node, request, group=ConnectionGroup.COORDINATION)
                await asyncio.wait_for(leaving, _LEAVE_S)
        await closed(self._client)
