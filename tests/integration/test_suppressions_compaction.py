"""The rules of opt-outs on a real broker that compacts the stream meanwhile: who is opted out never changes by that."""

import asyncio
import functools
import random
import time

import pytest

from processors.screen.suppression import MAX_AHEAD_S, Change, Overlay, Rule, record_key
from schemas.catalog import partition_for
from schemas.outbound import Message, Output
from streams.log.kafka import KafkaLog
from streams.state.entries import SUPPRESSIONS, EntryTail
from streams.state.gathering import gather
from streams.state.snapshots import Snapshots
from tests.support.commands import PATIENCE_S
from tests.support.kafka import make_topics
from tests.support.records import TOKENS

NOW_S = 1_795_000_000
NUMBERS = [f"+4915112345{number:03}" for number in range(8)]
RULES = [
    Rule(scope, class_, channel, authority)
    for scope in ("platform", "account:acme", f"sender:acme:{'0' * 32}", "campaign:acme:spring")
    for class_ in ("all", "marketing")
    for channel in ("sms", "voice")
    for authority in ("person", "officer")
]
COMPACTING = {
    "cleanup.policy": "compact",
    "min.cleanable.dirty.ratio": "0.001",
    "max.compaction.lag.ms": "200",
    "segment.ms": "200",
    "retention.ms": "-1",
}


def run(test):
    @functools.wraps(test)
    def wrapped(**fixtures):
        asyncio.run(test(**fixtures))

    return wrapped


class Histories:
    """A random history, written as workers write it, and what the rules say of it in words."""

    def __init__(self, log, seed):
        self.log = log
        self.chance = random.Random(seed)
        self.tail = EntryTail(log, SUPPRESSIONS, 1)
        self.model = {}
        self.written = 0

    def _change(self):
        chance = self.chance
        rule = RULES[0] if chance.random() < 0.4 else chance.choice(RULES)
        number = chance.choice(NUMBERS)
        event_s = NOW_S + chance.choice([0, -5, 5, chance.randrange(-900, 900), 10**6])
        return Change(TOKENS.of(number), rule, chance.random() < 0.55, event_s, number, None)

    async def batch(self):
        await self.tail.catch_up()
        overlay = Overlay(self.tail.view)
        for _ in range(self.chance.randrange(1, 12)):
            change = self._change()
            overlay.apply(change, NOW_S)
            event_s, entry = min(change.event_s, NOW_S + MAX_AHEAD_S), (change.token, change.rule)
            if change.out:
                self.model[entry] = max(event_s, self.model.get(entry, event_s))
            elif entry in self.model and event_s > self.model[entry]:
                del self.model[entry]
        outputs = {}
        for change in overlay.changes:
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(change.event_s))
            message = Message(int(time.time() * 1000), record_key(1, change), (), b'{"event_at":"%s"}' % at.encode())
            outputs.setdefault(partition_for(change.token, 2), []).append(message)
        await self.log.append([Output("suppressions", *one) for one in outputs.items()])
        self.tail.view.merge(overlay)
        self.written += len(overlay.changes)

    async def kept_by_the_broker(self):
        begins, ends = await self.log.begin_offsets("suppressions"), await self.log.end_offsets("suppressions")
        return sum([
            len(await self.log.read("suppressions", partition, begin, 100_000, end))
            for partition, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ])  # fmt: skip

    async def until_compacted(self):
        """Write on until the broker has removed most of what newer records have taken the place of."""
        deadline_s = time.monotonic() + PATIENCE_S
        while await self.kept_by_the_broker() > self.written * 2 // 3:
            assert time.monotonic() < deadline_s, "the broker compacts nothing"
            await asyncio.sleep(0.3)
            await self.batch()  # what is written last lies in a segment that is not compacted: another one begins

    def standing(self, tail):
        return {
            (token, rule): state.event_s
            for token in map(TOKENS.of, NUMBERS)
            for rule, state in (tail.view.get(token) or {}).items()
            if state.out
        }


@pytest.fixture
def topics(broker, kafka):
    """Return the configuration of a log whose topics are there and compacted without delay."""
    make_topics(broker, kafka.prefix, 2, COMPACTING)
    return kafka


@run
async def test_who_is_opted_out_is_what_the_rules_say_however_the_broker_compacts(topics, tmp_path):
    log = KafkaLog(topics, partitions=2, lease_s=10.0)
    snapshots = Snapshots(tmp_path / "entries", "store")
    history = Histories(log, 20261122)
    follower = EntryTail(log, SUPPRESSIONS, 1, snapshots)

    async def agreed():
        plain, late = EntryTail(log, SUPPRESSIONS, 1), EntryTail(log, SUPPRESSIONS, 1, snapshots)
        for tail in (history.tail, follower, plain, late):
            await tail.catch_up()
            assert history.standing(tail) == history.model
        return late

    try:
        for _ in range(3):
            # Given some history, some of it after a snapshot
            for _ in range(12):
                await history.batch()
            await agreed()
            assert await gather(log, snapshots, SUPPRESSIONS, 1)
            for _ in range(6):
                await history.batch()
            before = await agreed()
            assert before.view.snapshot is not None
            # When the broker has removed records / Then everybody says the same, with and without a snapshot
            await history.until_compacted()
            follower._look_s = 0.0
            await agreed()
        assert await history.kept_by_the_broker() < history.written
        assert follower.view.snapshot is not None
    finally:
        snapshots.close()
        await log.close()
