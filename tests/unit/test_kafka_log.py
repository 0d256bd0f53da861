"""The log on Kafka against brokers that answer late, twice, or from behind: what real ones do not on demand."""

import asyncio

import pytest

from schemas.errors import LogBusy, LogUnusable
from schemas.outbound import Message
from streams.config import Kafka
from streams.log import kafka as kafka_module
from streams.log.connection import Connection, Fetched, OffsetGone, Place, _unpacked
from streams.log.fencing import Produce
from streams.log.kafka import KafkaLog, _Partition

SETTINGS = Kafka(("127.0.0.1:1",), None, None, None, "", 1, 1, 0, 10_000)
PLACE = Place("traffic", 0)


def fetched(*offsets, next_offset=None, high_watermark=None, last_stable=None):
    """Return an answer with messages at these offsets."""
    end = next_offset if next_offset is not None else (offsets[-1] + 1 if offsets else 0)
    watermark = end if high_watermark is None else high_watermark
    some = [Message(0, None, (), b"%d" % offset) for offset in offsets]
    return Fetched(some, list(offsets), end, watermark, watermark if last_stable is None else last_stable)


class Brokers:
    """Stands in for the connection: gives the answers it was told, one for each fetch."""

    def __init__(self, *answers):
        self.settings = SETTINGS
        self.answers = list(answers)

    async def partitions(self, _topic):
        return 4

    async def leaders(self, places):
        return {1: list(places)}

    async def offsets(self, _topic, _timestamp, stable=False):
        return [0 if not stable else 1] * 4

    async def fetch(self, _node, wanted, _wait_ms):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return {wanted[0][0]: answer}


def log_on(*answers):
    log = KafkaLog(SETTINGS, partitions=4, lease_s=1)
    log.connection = Brokers(*answers)
    return log


def test_an_answer_that_comes_after_another_to_the_same_question_is_not_taken_twice():
    async def run():
        consumer = log_on(fetched(0, 1, 2), fetched(0, 1, 2)).consumer("w")
        consumer._held[PLACE] = _Partition(None, 0)
        await asyncio.gather(*[consumer._fetch_from(1, [PLACE], 0) for _ in range(2)])
        return consumer._held[PLACE]

    held = asyncio.run(run())
    assert held.offsets == [0, 1, 2]
    assert [message.value for message in held.messages] == [b"0", b"1", b"2"]


def test_an_offset_that_is_gone_does_not_bring_a_partition_back_that_was_handed_over():
    async def run():
        consumer = log_on(OffsetGone(PLACE)).consumer("w")
        consumer._held[PLACE] = _Partition(None, 0)
        fetching = asyncio.create_task(consumer._fetch_from(1, [PLACE], 0))
        await asyncio.sleep(0)
        del consumer._held[PLACE]
        await fetching
        return consumer._held

    assert asyncio.run(run()) == {}


def test_a_leader_that_is_behind_the_end_that_was_seen_does_not_make_a_reader_skip_anything(monkeypatch):
    monkeypatch.setattr(kafka_module, "UNDECIDED_S", 0.02)
    behind = fetched(next_offset=5, high_watermark=5)

    async def run(until):
        return await log_on(behind).read("suppressions", 0, 5, 10, until)

    assert asyncio.run(run(0)) == []
    with pytest.raises(LogBusy, match="not all that was written"):
        asyncio.run(run(9))


def test_an_offset_that_the_leader_does_not_have_yet_is_not_taken_for_the_end(monkeypatch):
    monkeypatch.setattr(kafka_module, "UNDECIDED_S", 0.02)

    async def run():
        return await log_on(OffsetGone(PLACE)).read("suppressions", 0, 5, 10, 9)

    with pytest.raises(LogBusy):
        asyncio.run(run())


def test_a_batch_ends_before_the_message_that_is_left_and_goes_on_there():
    class Writer:
        epoch = 3

    held = _Partition(Writer, 10)
    held.add(fetched(10, 12, 17, next_offset=19), 1.0)
    first = held.batch(PLACE, "traffic", 2)
    assert (first.offset, first.next_offset, list(first.offsets), first.lease) == (10, 17, [10, 12], 3)
    held.add(fetched(20, next_offset=22), 2.0)  # while it is under way
    held.done(first, 3.0)
    rest = held.batch(PLACE, "traffic", 10)
    assert (rest.offset, rest.next_offset, list(rest.offsets)) == (17, 22, [17, 20])


def test_records_that_cannot_be_read_are_said_to_be_in_one_line():
    class Answer:
        topics = (("traffic", [(0, 0, 9, 9, 0, None, -1, b"\0" * 60 + b"\2" + b"x" * 40)]),)

    async def run():
        connection = Connection(SETTINGS)

        async def ask(_node, _request):
            return Answer

        connection.ask = ask
        await connection.fetch(1, [(PLACE, 0)], 0)

    with pytest.raises(LogUnusable, match="records cannot be read") as said:
        asyncio.run(run())
    assert "\n" not in str(said.value)
    assert _unpacked(b"", None, 7) == ([], [], 7)


def test_a_broker_that_takes_no_version_that_is_spoken_here_is_said_to_be_the_wrong_one():
    class Client:
        async def send(self, _node, request, **_):
            request.prepare({0: (8, 13)})

    connection = Connection(SETTINGS)
    connection._client = Client()
    with pytest.raises(LogUnusable, match="use Apache Kafka 4"):
        asyncio.run(connection.ask(1, Produce("id", 1000, [])))
