"""Every schedule of faults on real brokers; the offline checker finds nothing wrong. `make chaos` runs them for long."""

import os
import sys

import pytest

from tests.chaos.schedules import SCHEDULES, SHORT, Clusters, Schedule, execute, run, zombie
from tests.support.checker import KINDS

SEED = int(os.environ.get("STREAMVEIL_CHAOS_SEED", "20261122"))

UNFENCED = """
import secrets
from streams.log.fencing import Writer
named = Writer.__init__
Writer.__init__ = lambda self, connection, name: named(self, connection, name + secrets.token_hex(4))
"""
"""Every process writes under a transactional id of its own, so nobody fences anybody."""
OFFSETS_APART = """
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
RECORDS_FIRST = OFFSETS_APART.replace(
    "    await write(other, {}, offsets)\n    await write(self, messages, None, check)\n",
    "    await write(self, messages, None, check)\n    await write(other, {}, offsets)\n",
)
"""Offsets are committed after the records, in a transaction of their own."""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    with Clusters(tmp_path_factory.mktemp("chaos")) as found:
        yield found


@pytest.mark.parametrize("name", sorted(SCHEDULES, key=lambda name: SCHEDULES[name].nodes))
def test_after(name, clusters, tmp_path):
    sys.stdout.write(f"STREAMVEIL_CHAOS_SEED={SEED}\n")  # shown when it fails; runs it again
    # Given two workers and a gateway at work; when the schedule breaks things
    verdict = execute(name, SEED, clusters, tmp_path).verdict
    # then everything published is there once, in order, and sealed
    sys.stdout.write(f"{verdict}\n")
    assert verdict.counts["published"] > 300
    assert verdict.counts["outputs"] > verdict.counts["committed"] >= verdict.counts["published"]
    assert not verdict.wrong.total(), str(verdict)


# --- the checker finds what is broken on purpose ------------------------------------------------------------------


def broken(sabotage):
    """Return a schedule in which both workers are broken, and one of them sleeps before a commit, or dies in it."""

    def schedule(site):
        zombie(site, sabotage)

    return Schedule(schedule, times=SHORT)


def test_workers_that_do_not_fence_are_found_out(clusters, tmp_path):
    verdict = run(broken(UNFENCED), SEED, clusters, tmp_path).verdict
    assert verdict.wrong["duplicated"], str(verdict)


def test_offsets_that_are_committed_apart_are_found_out(clusters, tmp_path):
    pass
