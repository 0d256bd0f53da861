"""What gateways published while things broke, and what they were told: records, and a `Gateway` that remembers.

An answer that does not come is no answer: a chunk whose append ran into a time-out counts as unknown. It may be in the
input streams, once and whole, or not. A chunk that the log refuses is published again.
"""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import orjson

from schemas.errors import LogUnusable, Retriable
from schemas.outbound import Message, Output
from streams.config import Kafka
from streams.log.kafka import KafkaLog
from streams.publish import route
from tests.support.commands import PATIENCE_S, ago
from tests.support.records import preference, raw, reply, sms_cdr, sms_request, voice_cdr

WORD, NUMBER, ADDRESS, ID = "zq-canary", "141555501", "192.0.2.77", "zqrecord-"
"""Marks: of every free text, number, network address and record id of these records."""
PEOPLE = 90
CHUNK = 30
PAUSE_S = 0.15
BROKEN = 0.01
CONTENTS = ("content", "recording_ref", "transcript")


class Outcome(StrEnum):
    """What a gateway knows of a record that it published."""

    DONE = "done"
    UNKNOWN = "unknown"


class Sent(NamedTuple):
    """A record (bytes: one that no worker can read), what its gateway was told of it, and in which chunk it was."""

    record: dict | bytes
    outcome: Outcome
    chunk: int


def records(seed: int, *, name: str = "g", first_person: int = 0, people: int = PEOPLE) -> Iterator[dict | bytes]:
    """Yield records without end, of every kind, about people who turn up one after the other; marked everywhere."""
    chance = random.Random(f"{seed} {name}")
    n = 0
    while True:
        n += 1
        known = min(people, 10 + n // 12)
        person, other = (f"+{NUMBER}{first_person + chance.randrange(known):02}" for _ in range(2))
        yield _record(chance, f"{ID}{name}-{n:06}", n, person, other)


def _record(chance: random.Random, record_id: str, n: int, person: str, other: str) -> dict | bytes:
    common = {
        "record_id": record_id, "occurred_at": ago(), "price": {"amount": f"{n}.01", "currency": "EUR"},
        "client_ip": ADDRESS, "location": f"{WORD} place", "display_name": f"{WORD} name", "error_code": f"{WORD}-code",
        "campaign_id": f"{WORD}-campaign", "attributes": {"note": f"{WORD} note"},
    }  # fmt: skip
    kind = chance.random()
    if kind < 0.45:
        return sms_request(recipient=person, content=f"{WORD} words {n}", **common)
    if kind < 0.60:
        return sms_cdr(recipient=person, content=f"{WORD} said {n}", encoding=f"{WORD}-set", **common)
    if kind < 0.75:
        said = {"recording_ref": f"{WORD}/{n}.wav", "transcript": f"{WORD} spoke {n}", "hangup_cause": f"{WORD}-cause"}
        return voice_cdr(recipient=person, sender=other, billable_s=n % 900, answered_at=ago(), **said, **common)
    if kind < 1 - 2 * BROKEN:
        text = chance.choices(("STOP", "please stop", f"{WORD} reply {n}"), (1, 2, 30))[0]
        return reply(text, sender=person, **common)
    if kind < 1 - BROKEN:
        return preference(sender=person, **common)
    return orjson.dumps({"broken": f"{WORD} {record_id}"})


def texts(record: dict | bytes) -> str:
    """Return what tells a record from all others: its id, or all of it."""
    return record.decode() if isinstance(record, bytes) else record["record_id"]


class Gateway:
    """Publishes chunks in a thread of its own, one after the other, until `finish`."""

    def __init__(self, settings: Kafka, partitions: int, seed: int) -> None:
        """Take where to publish; starts at once."""
        self.sent: list[Sent] = []
        self.refused = 0
        self._records = records(seed)
        self._finished = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(settings, partitions), daemon=True)
        self._thread.start()

    def finish(self) -> list[Sent]:
        """Return what was published, when the chunk under way is decided or unknown."""
        self._finished.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the gateway could never publish again"
        for failed in self._failed:
            raise failed
        return self.sent

    def _run(self, settings: Kafka, partitions: int) -> None:
        try:
            asyncio.run(self._publish(settings, partitions))
        except BaseException as error:
            self._failed.append(error)

    async def _publish(self, settings: Kafka, partitions: int) -> None:
        log = KafkaLog(settings, partitions=partitions, lease_s=10)
        try:
            while not self._finished.is_set():
                chunk = [next(self._records) for _ in range(CHUNK)]
                outcome = await self._append(log, chunk)
                self.sent += [Sent(record, outcome, len(self.sent) // CHUNK) for record in chunk]
                await asyncio.sleep(PAUSE_S)
        finally:
            await log.close()

    async def _append(self, log: KafkaLog, chunk: list[dict | bytes]) -> Outcome:
        """Publish a chunk, again as long as the log says that nothing was written."""
        chunks: dict[tuple[str, int], list[Message]] = {}
        for value in map(raw, chunk):
            to = route(value)
            message = Message(time.time_ns() // 1_000_000, to.key, (), value)
            chunks.setdefault((to.stream, to.partition(value, log.partitions)), []).append(message)
        outputs = [Output(*place, messages) for place, messages in chunks.items()]
        while True:
            try:
                await log.append(outputs)
            except Retriable:
                self.refused += 1
                await asyncio.sleep(PAUSE_S)
            except LogUnusable:
                return Outcome.UNKNOWN
            else:
                return Outcome.DONE
