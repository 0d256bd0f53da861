"""The writer of a transaction against brokers that answer as they are told: what real ones do not on demand."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from aiokafka.conn import AIOKafkaConnection
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    EndTxnRequest,
    InitProducerIdRequest,
    TxnOffsetCommitRequest,
)
from aiokafka.record.memory_records import MemoryRecords

from schemas.errors import Fenced, KeysChanged, LogBusy, LogFull, LogUnusable
from schemas.outbound import Message
from streams.log import fencing
from streams.log.connection import Code, Place
from streams.log.fencing import BATCH_BYTES, Offsets, Produce, Writer

PLACE, OTHER = Place("verdicts", 0), Place("cdr.pii", 1)
READ = Offsets("workers", {Place("traffic", 0): (7, "")})
LOST = "lost"
"""Instead of an answer: it was done, and nobody hears of it."""
UNHEARD = "unheard"
"""Instead of an answer: it was not done."""
STEPS = (AddPartitionsToTxnRequest, AddOffsetsToTxnRequest, TxnOffsetCommitRequest, Produce, EndTxnRequest)


class Brokers:
    """Answers every request with code 0 but those for which it was told another; keeps what was committed."""

    def __init__(self, timeout_ms=2000):
        self.settings = SimpleNamespace(transaction_timeout_ms=timeout_ms)
        self.told = {}  # request class → answers still to give
        self.asked = []
        self.epoch = -1
        self.open, self.committed, self.aborted = [], [], 0
        self.calls = Counter()

    def will(self, request, *answers):
        self.told[request] = list(answers)

    async def ask_coordinator(self, _kind, _key, request):
        return self._answer(request)

    async def ask(self, _node, request):
        return self._answer(request)

    async def leaders(self, places):
        return {1: list(places)}

    def stale(self):
        self.calls["stale"] += 1

    def moved(self, _kind, _key):
        self.calls["moved"] += 1

    def _answer(self, request):
        self.asked.append(type(request))
        left = self.told.get(type(request))
        told = left.pop(0) if left else Code.NONE
        if told == UNHEARD:
            raise LogBusy
        code = Code.NONE if told == LOST else told
        if code == Code.NONE:
            self._do(request)
        if told == LOST:
            raise LogBusy
        if isinstance(request, InitProducerIdRequest):
            return SimpleNamespace(error_code=code, producer_id=9, producer_epoch=self.epoch)
        if isinstance(request, Produce):
            parts = [(topic, [(at, code, 0, 0, 0) for at, _ in some]) for topic, some in request._topics]
            return SimpleNamespace(topics=parts)
        if isinstance(request, (AddPartitionsToTxnRequest, TxnOffsetCommitRequest)):
            return SimpleNamespace(errors=[("topic", [(0, Code.NONE), (1, code)])])
        return SimpleNamespace(error_code=code)

    def _do(self, request):
        if isinstance(request, InitProducerIdRequest):
            self.epoch += 1
            self.open = []
        elif isinstance(request, Produce):
            for topic, some in request._topics:
                for partition, data in some:
                    self.open += [(Place(topic, partition), *one) for one in unpacked(data)]
        elif isinstance(request, TxnOffsetCommitRequest):
            self.open.append(("offsets", request._group_id, request._topics))
        elif isinstance(request, EndTxnRequest):
            if request._transaction_result:
                self.committed += self.open
            else:
                self.aborted += 1
            self.open = []


def unpacked(data):
    """Return sequence number, producer, epoch and value of each record."""
    pages = MemoryRecords(bytes(data))
    while pages.has_next():
        page = pages.next_batch()
        assert page.validate_crc()
        for at, record in enumerate(page):
            yield page.base_sequence + at, page.producer_id, page.producer_epoch, record.value


def messages(*values):
    return [Message(1_700_000_000_000, None, (("role", b"x"),), value) for value in values]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(fencing, "_PAUSES_S", (0.0,))


def written(brokers, *writes, fence=True):
    """Run writes by one writer, and return it."""

    async def run():
        writer = Writer(brokers, "workers.traffic.0")
        if fence:
            await writer.fence()
        for write in writes:
            await writer.write(*write)
        return writer

    return asyncio.run(run())


def values(brokers):
    return [one[-1] for one in brokers.committed if one[0] != "offsets"]


def test_messages_and_offsets_are_committed_together():
    brokers = Brokers()

    written(brokers, ({PLACE: messages(b"a", b"b"), OTHER: messages(b"c")}, READ))

    assert sorted(values(brokers)) == [b"a", b"b", b"c"]
    assert ("offsets", "workers", [("traffic", [(0, 7, "")])]) in brokers.committed
    assert brokers.asked[-1] is EndTxnRequest


def test_nothing_is_asked_of_the_brokers_for_nothing():
    brokers = Brokers()

    written(brokers, ({}, None))

    assert brokers.asked == [InitProducerIdRequest]


def test_a_writer_that_was_not_fenced_in_does_not_write():
    with pytest.raises(ValueError, match="fence first"):
        written(Brokers(), ({PLACE: messages(b"a")}, READ), fence=False)


def test_sequence_numbers_go_on_over_transactions_and_begin_anew_after_a_fence():
    brokers = Brokers()

    async def run():
        writer = Writer(brokers, "id")
        await writer.fence()
        await writer.write({PLACE: messages(b"a", b"b")}, None)
        await writer.write({PLACE: messages(b"c")}, None)
        await writer.fence()
        await writer.write({PLACE: messages(b"d")}, None)

    asyncio.run(run())

    assert [(sequence, epoch) for _, sequence, _, epoch, _ in brokers.committed] == [(0, 0), (1, 0), (2, 0), (0, 1)]


def test_more_than_a_batch_holds_goes_in_several_in_order():
    brokers = Brokers()
    some = [bytes([number]) * (BATCH_BYTES // 4) for number in range(10)]

    written(brokers, ({PLACE: messages(*some)}, None))

    assert values(brokers) == some
    assert brokers.asked.count(Produce) > 2


def test_a_message_above_the_size_of_a_batch_goes_alone():
    brokers = Brokers()
    big = b"x" * (2 * BATCH_BYTES)

    written(brokers, ({PLACE: messages(b"a", big, b"b")}, None))

    assert values(brokers) == [b"a", big, b"b"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("code", [Code.INVALID_PRODUCER_EPOCH, Code.PRODUCER_FENCED])
def test_whoever_hears_of_a_newer_writer_at_any_step_is_fenced_and_writes_no_more(step, code):
    brokers = Brokers()
    brokers.will(step, code)

    async def run():
        writer = Writer(brokers, "id")
        await writer.fence()
        with pytest.raises(Fenced):
            await writer.write({PLACE: messages(b"a")}, READ)
        assert not writer.usable
        with pytest.raises(ValueError, match="fence first"):
            await writer.write({PLACE: messages(b"a")}, READ)

    asyncio.run(run())
    assert brokers.committed == []


def test_a_writer_that_was_forgotten_after_a_long_silence_begins_anew():
    brokers = Brokers()
    brokers.will(AddPartitionsToTxnRequest, Code.INVALID_PRODUCER_ID_MAPPING)

    async def run():
        writer = Writer(brokers, "id")
        await writer.fence()
        with pytest.raises(LogBusy, match="forgotten"):
            await writer.write({PLACE: messages(b"a")}, READ)
        assert not writer.usable
        assert not writer.in_doubt
        await writer.fence()
        await writer.write({PLACE: messages(b"a")}, READ)

    asyncio.run(run())
    assert values(brokers) == [b"a"]


@pytest.mark.parametrize("step", [one for one in STEPS if one is not Produce])
@pytest.mark.parametrize(
    "answer",
    [Code.CONCURRENT_TRANSACTIONS, Code.COORDINATOR_NOT_AVAILABLE, Code.NOT_COORDINATOR, LOST, UNHEARD],
)
def test_what_passes_by_itself_is_asked_again(step, answer):
    brokers = Brokers()
    brokers.will(step, answer, answer)

    written(brokers, ({PLACE: messages(b"a")}, READ))

    assert set(values(brokers)) == {b"a"}
    assert brokers.asked.count(step) == 3


@pytest.mark.parametrize(
    ("answers", "looked_up"),
    [
        ([Code.COORDINATOR_NOT_AVAILABLE], 0),  # so it says too when it was interrupted: there is no need to look it up
        ([Code.COORDINATOR_NOT_AVAILABLE] * 2, 1),
        ([Code.NOT_COORDINATOR], 1),
        ([Code.CONCURRENT_TRANSACTIONS] * 3, 0),
    ],
)
def test_a_coordinator_is_looked_up_anew_when_it_is_another_one_or_not_available_twice(answers, looked_up):
    brokers = Brokers()
    brokers.will(TxnOffsetCommitRequest, *answers)

    written(brokers, ({PLACE: messages(b"a")}, READ))

    assert set(values(brokers)) == {b"a"}
    assert brokers.calls["moved"] == looked_up


class Waiting(Brokers):
    """Answers a request of one kind when others were asked, and not before."""

    def __init__(self, held, until):
        super().__init__(timeout_ms=60_000)
        self.held, self.until = held, Counter(until)
        self.come = asyncio.Event()

    async def ask_coordinator(self, _kind, _key, request):
        return await self._after(request)

    async def ask(self, _node, request):
        return await self._after(request)

    async def _after(self, request):
        answer = self._answer(request)
        if Counter(self.asked) >= self.until:
            self.come.set()
        if isinstance(request, self.held):
            await asyncio.wait_for(self.come.wait(), 5)
        return answer


@pytest.mark.parametrize(
    ("held", "until"),
    [
        (AddOffsetsToTxnRequest, [Produce, Produce, Produce]),
        (AddPartitionsToTxnRequest, [TxnOffsetCommitRequest]),
    ],
)
def test_records_and_offsets_do_not_wait_for_each_other(held, until):
    some = [bytes([number]) * (BATCH_BYTES // 2) for number in range(3)]

    async def run():
        brokers = Waiting(held, until)
        writer = Writer(brokers, "id")
        await writer.fence()
        await writer.write({PLACE: messages(*some)}, READ)
        return brokers

    brokers = asyncio.run(run())

    assert values(brokers) == some
    assert brokers.asked[-1] is EndTxnRequest


@pytest.mark.parametrize("refused", STEPS[:-1])
def test_what_is_refused_on_one_way_is_aborted_on_both(refused):
    brokers = Brokers()
    brokers.will(refused, 29)

    with pytest.raises(LogUnusable):
        written(brokers, ({PLACE: messages(b"a")}, READ))

    assert (brokers.committed, brokers.aborted) == ([], 1)
    assert brokers.asked[-1] is EndTxnRequest


@pytest.mark.parametrize(
    ("fenced", "refused"),
    [(AddPartitionsToTxnRequest, AddOffsetsToTxnRequest), (AddOffsetsToTxnRequest, AddPartitionsToTxnRequest)],
)
def test_whoever_is_fenced_on_one_way_hears_it_whatever_is_said_on_the_other(fenced, refused):
    brokers = Brokers()
    brokers.will(fenced, Code.PRODUCER_FENCED)
    brokers.will(refused, 29)

    with pytest.raises(Fenced):
        written(brokers, ({PLACE: messages(b"a")}, READ))

    assert brokers.committed == []
    assert EndTxnRequest not in brokers.asked


def test_a_request_with_records_has_the_bytes_of_aiokafkas_own():
    several, large = [(0, bytearray(b"one")), (3, bytearray(b"two"))], [(1, bytearray(b"x" * 70_000))]
    topics = [("verdicts", several), ("cdr.pii", large)]

    async def sent(request):
        connection, wire = AIOKafkaConnection("nowhere", 1), []
        connection._versions = {Produce.API_KEY: (3, 13)}
        connection._writer = SimpleNamespace(write=wire.append)
        connection.send(request).close()  # the answer is not waited for
        connection._writer = None
        return wire

    ours = asyncio.run(sent(Produce("workers.traffic.0", 4000, topics)))
    theirs = asyncio.run(sent(ProduceRequest("workers.traffic.0", -1, 4000, topics)))

    assert ours == theirs
    assert type(ours[0]) is bytes


@pytest.mark.parametrize("answer", [6, Code.REQUEST_TIMED_OUT, Code.NOT_ENOUGH_REPLICAS, UNHEARD])
def test_records_are_sent_again_with_the_same_sequence_until_they_are_taken(answer):
    brokers = Brokers()
    brokers.will(Produce, answer, answer)

    written(brokers, ({PLACE: messages(b"a", b"b")}, READ))

    assert [(one[1], one[-1]) for one in brokers.committed if one[0] != "offsets"] == [(0, b"a"), (1, b"b")]


def test_records_that_the_broker_has_already_are_not_an_error():
    brokers = Brokers()
    brokers.will(Produce, LOST, Code.DUPLICATE_SEQUENCE_NUMBER)

    written(brokers, ({PLACE: messages(b"a")}, READ))

    assert values(brokers) == [b"a"]


@pytest.mark.parametrize(
    ("code", "error"),
    [(code, LogUnusable) for code in (29, 53, Code.MESSAGE_TOO_LARGE, Code.INVALID_TIMESTAMP)],
)
def test_what_an_operator_must_mend_ends_the_transaction_at_once(code, error):
    brokers = Brokers()
    brokers.will(Produce, code)

    with pytest.raises(error):
        written(brokers, ({PLACE: messages(b"a")}, READ))

    assert (brokers.committed, brokers.aborted) == ([], 1)


@pytest.mark.parametrize("step", STEPS)
def test_when_the_time_is_over_the_writer_gives_up_and_must_fence_again(step):
    brokers = Brokers(timeout_ms=50)
    brokers.will(step, *[UNHEARD] * 100_000)

    async def run():
        writer = Writer(brokers, "id")
        await writer.fence()
        with pytest.raises(LogBusy):
            await writer.write({PLACE: messages(b"a")}, READ)
        return writer

    writer = asyncio.run(run())
    assert not writer.usable
    assert brokers.committed == []
    assert writer.in_doubt is (step is EndTxnRequest)


def test_a_full_disk_of_the_brokers_is_said_as_it_is():
    brokers = Brokers(timeout_ms=50)
    brokers.will(EndTxnRequest, Code.KAFKA_STORAGE_ERROR)

    with pytest.raises(LogFull):
        written(brokers, ({PLACE: messages(b"a")}, READ))


def test_a_check_that_objects_aborts_and_the_writer_goes_on():
    brokers = Brokers()

    def objects():
        assert Produce in brokers.asked, "checked before everything was written"
        assert EndTxnRequest not in brokers.asked
        raise KeysChanged

    async def run():
        writer = Writer(brokers, "id")
        await writer.fence()
        with pytest.raises(KeysChanged):
            await writer.write({PLACE: messages(b"a")}, READ, objects)
        await writer.write({PLACE: messages(b"b")}, READ)

    asyncio.run(run())
    assert values(brokers) == [b"b"]
    assert brokers.aborted == 1


def test_a_commit_whose_answer_was_lost_is_not_done_twice():
    brokers = Brokers()
    brokers.will(EndTxnRequest, LOST)

    writer = written(brokers, ({PLACE: messages(b"a")}, READ))

    assert values(brokers) == [b"a"]
    assert not writer.in_doubt
    assert not writer.usable, "the request that got no answer may arrive in the next transaction"


def test_a_message_that_cannot_be_packed_writes_nothing():
    brokers = Brokers()

    with pytest.raises(TypeError):
        written(brokers, ({PLACE: [*messages(b"a"), Message(0, None, (), "text")]}, READ))

    assert brokers.committed == []
    assert Produce not in brokers.asked
