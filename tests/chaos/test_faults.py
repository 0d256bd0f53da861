"""Every schedule of faults on real brokers, and the offline checker finds nothing wrong. `make chaos` runs them longer.

Then what fencing and transactions are for is broken on purpose, and the checker finds that.
"""

import asyncio
import os
import sys
import time
import uuid

import pytest
from aiokafka.client import ConnectionGroup

from schemas.outbound import Message
from streams.log.connection import Connection, Place
from streams.log.fencing import Offsets, Writer
from streams.log.kafka import KafkaLog
from tests.chaos.schedules import BEFORE_COMMIT, SCHEDULES, Clusters, Schedule, asleep, execute, struck
from tests.support.commands import eventually
from tests.support.kafka import make_topics, settings
from tests.support.proxy import Proxy

SEED = int(os.environ.get("STREAMVEIL_CHAOS_SEED", "20261122"))


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    with Clusters(tmp_path_factory.mktemp("chaos")) as found:
        yield found


@pytest.mark.parametrize("name", sorted(SCHEDULES, key=lambda name: SCHEDULES[name].nodes))
def test_nothing_is_lost_doubled_or_leaked(name, clusters, tmp_path):
    sys.stdout.write(f"STREAMVEIL_CHAOS_SEED={SEED}\n")  # shown when it fails; runs it again
    # Given two workers and a gateway at work, when the schedule breaks things around them
    verdict = execute(SCHEDULES[name], SEED, clusters, tmp_path).verdict
    # then everything published is there once, in order, whole and sealed
    assert verdict.counts["committed"] >= verdict.counts["published"] > 100, str(verdict)
    assert verdict.counts["outputs"] > verdict.counts["committed"], str(verdict)
    assert not verdict.wrong.total(), str(verdict)


# --- broken on purpose ------------------------------------------------------------------------------------------

UNFENCED = """
import secrets
from streams.log import fencing
named, pauses = fencing.Writer.__init__, fencing._pauses
fencing.Writer.__init__ = lambda self, connection, name: named(self, connection, name + secrets.token_hex(4))
fencing._pauses = lambda deadline_s: pauses(float("inf"))
"""
"""Every writer has a transactional id of its own, so nobody fences anybody; and none gives up because it slept long."""
OFFSETS_FIRST = """
import secrets
from streams.log.fencing import Writer
write = Writer.write
async def apart(self, messages, offsets, check=None):
    other = Writer(self._connection, "apart" + secrets.token_hex(8))
    await other.fence()
    await write(other, {}, offsets)
    await write(self, messages, None, check)
Writer.write = apart
"""
"""Offsets are committed before the records, in a transaction of their own."""


def found_out(schedule, kind, clusters, folder):
    """See that the checker finds this wrong in one of three runs: what is broken need not bite each time."""
    for number in range(3):
        place = folder / str(number)
        place.mkdir()
        verdict = execute(schedule, SEED + number, clusters, place).verdict
        if verdict.wrong[kind]:
            return
    raise AssertionError(str(verdict))


def test_workers_that_do_not_fence_are_found_out(clusters, tmp_path):
    unfenced = Schedule(lambda site: asleep(site, BEFORE_COMMIT, more=UNFENCED))
    found_out(unfenced, "duplicated", clusters, tmp_path)


def test_offsets_that_are_committed_apart_are_found_out(clusters, tmp_path):
    def dies_between(site):
        site.publishing()
        worker = site.worker(0, struck(("Writer", "_produce", False), 5) + OFFSETS_FIRST)
        eventually(lambda: worker.poll() is not None, "its end between the two")
        assert site.gone(0) == "killed"
        site.tend()
        site.progress()

    found_out(Schedule(dies_between), "lost", clusters, tmp_path)


# --- requests that come late --------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["_end", "_write_offsets"])
def test_a_request_that_was_repeated_and_comes_late_touches_no_later_transaction(late, clusters):
    cluster, prefix = clusters.of(1), f"l{uuid.uuid4().hex[:8]}."
    make_topics(cluster, prefix, 1, {})
    asyncio.run(_late(cluster, prefix, late))


async def _late(cluster, prefix, late):
    ports = cluster.ports[0]
    direct = settings(cluster, prefix, transaction_timeout_ms=10_000)
    output, source = Place(f"{prefix}verdicts", 0), Place(f"{prefix}traffic", 0)
    group = f"{prefix}workers"
    with Proxy(ports.proxy, ports.behind_proxy) as network:
        connection = Connection(direct._replace(servers=(f"127.0.0.1:{ports.proxy}",)))
        writer = Writer(connection, f"{prefix}workers.traffic.0")

        async def write(text, offset):
            message = Message(time.time_ns() // 1_000_000, None, (), text)
            await writer.write({output: [message]}, Offsets(group, {source: (offset, "")}))

        async def visible():
            log = KafkaLog(direct, partitions=1, lease_s=10)
            found = [one.value for one in await log.read("verdicts", 0, 0, 10)]
            await log.close()
            return found

        await writer.fence()
        await write(b"first", 1)
        # Given a request of a transaction that got no answer, was repeated on a new connection, and then was done
        asked, ended = getattr(writer, late), writer._end

        async def unanswered(*args, **options):
            client = await connection.client()
            network.stall({
                one._writer.get_extra_info("sockname")[1]
                for (_, group), one in client._conns.items() if group is ConnectionGroup.COORDINATION
            })  # fmt: skip
            await asked(*args, **options)

        setattr(writer, late, unanswered)
        await write(b"second", 2)
        setattr(writer, late, asked)
        if not writer.usable:
            await writer.fence()
        # when it comes after all, in the middle of the next transaction
        seen = []

        async def decided(**options):
            network.heal()
            await asyncio.sleep(0.5)
            seen.extend(await visible())
            await ended(**options)

        writer._end = decided
        await write(b"third", 3)
        # then it decides nothing of it, and its offset does not take the place of the newer one
        assert seen == [b"first", b"second"]
        assert await visible() == [b"first", b"second", b"third"]
        assert (await connection.committed(group, [source]))[source][0] == 3
        await connection.close()
