"""The schedules of faults, each on a real broker: what breaks, when, and what has to hold all the same.

A `Site` is one deployment on a cluster of its tests: two workers and a gateway at work, which a schedule breaks things
around. Then all is mended, the workers come to the end of the input, and the checker looks at everything.
"""

import asyncio
import operator
import random
import secrets
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from deploy.kafka.broker import Cluster
from schemas.errors import Retriable
from streams.log.connection import REQUEST_TIMEOUT_MS, Connection
from tests.support.checker import Verdict, check, gather
from tests.support.commands import PATIENCE_S, Place, eventually, is_stopped
from tests.support.history import Gateway, Outcome, Sent, records
from tests.support.kafka import SETTINGS, config_file, settings
from tests.support.proxy import Proxy

PARTITIONS = 3
SHORT, DEFAULT, PATIENT = (2.0, 4000), (10.0, 10_000), (2.0, 30_000)
"""Seconds of a lease and milliseconds of a transaction: so that much happens in a short time; as by default; and so
that the only broker is back before it takes a transaction for dead (docs/faults.md, what is not covered)."""
BATCH = 60
MISSED = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
"""So soon the others do without a broker that is gone."""
_ENDS = {0: "stopped", -signal.SIGKILL: "killed", -signal.SIGTERM: "stopped while it started"}
FENCED = "Another worker took this partition over"
DISK_BYTES = 320 * 1024 * 1024

_STRUCK = """
import os, signal
from streams.log.fencing import Writer
from streams.log.kafka import KafkaConsumer, KafkaLog

left = {left}

def strike():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.{signal})

def struck(owner, name, after):
    method = getattr(owner, name)
    async def run(*args, **options):
        if not after:
            strike()
        found = await method(*args, **options)
        if after:
            strike()
        return found
    setattr(owner, name, run)

struck({owner}, {name!r}, {after})
"""
"""Strikes the process with a signal at the n-th time that it comes to a point of its work."""

BEFORE_COMMIT = ("Writer", "_fill", False)
COMMIT_POINTS = (
    BEFORE_COMMIT,
    ("Writer", "_produce", False),
    ("Writer", "_produce", True),
    ("Writer", "_write_offsets", True),
    ("Writer", "_end", False),
    ("Writer", "_end", True),
)
POINTS = (
    ("KafkaConsumer", "poll", False),
    ("Writer", "fence", True),
    ("KafkaConsumer", "commit", True),
    *COMMIT_POINTS,
)
STALL_POINTS = (("Writer", "_write_offsets", False), ("Writer", "_produce", False), ("Writer", "_end", False))
GATEWAY_POINTS = (
    ("KafkaLog", "append", True),
    ("Writer", "_fill", False),
    ("Writer", "_end", False),
    ("Writer", "_end", True),
)
_SMALL_CHUNKS = "import streams.publish\nstreams.publish.CHUNK_RECORDS = 30\n"


def struck(point: tuple[str, str, bool], left: int, number: signal.Signals = signal.SIGKILL) -> str:
    """Return the sabotage that strikes a worker at a point, the n-th time it comes there."""
    owner, name, after = point
    return _STRUCK.format(owner=owner, name=name, after=after, left=left, signal=number.name)


class Clusters:
    """The brokers of the schedules, each started when it is first asked for; as a context, all are stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._found: dict[int, Cluster] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, nodes: int) -> Cluster:
        """Return the cluster with so many nodes; every node runs."""
        if nodes not in self._found:
            folder = self._folder / f"kafka-{nodes}"
            cluster = Cluster(folder, nodes=nodes, settings=SETTINGS | MISSED, proxied=True, quick=True)
            self._found[nodes] = self._stack.enter_context(cluster)
        self._found[nodes].start()
        return self._found[nodes]


class Site(Place):
    """One deployment under a prefix of its own: its workers, which are kept running, and its gateway."""

    def __init__(self, folder: Path, cluster: Cluster, seed: int, times: tuple[float, int]) -> None:
        self.cluster = cluster
        lease_s, self._transaction_ms = times
        self.prefix = f"c{secrets.token_hex(5)}."
        super().__init__(folder, lease_s=lease_s, batch_records=BATCH, partitions=PARTITIONS)
        self.url = cluster.url
        self.seed = seed
        self.chance = random.Random(seed)
        self.settings = settings(cluster, self.prefix, transaction_timeout_ms=self._transaction_ms)
        self.workers: list[subprocess.Popen | None] = [None, None]
        self.ends: Counter[str] = Counter()
        """How workers ended: `killed`, `fenced`, `stopped`."""
        self.sent: list[Sent] = []
        self._gateway: Gateway | None = None
        self._settled = False
        self._consumer = self._new_consumer()
        eventually(lambda: self.call("streams", "apply").status == 0, "the streams")

    def configure(self, **options: object) -> None:
        """Write the configuration anew."""
        given = {"data": '"data"', "key_lease_s": max(30, 2 * self._transaction_ms / 1000), **options}
        head = "".join(f"{name} = {value}\n" for name, value in given.items())
        tail = f"transaction_timeout_ms = {self._transaction_ms}\ncommit_every_ms = 10"
        config_file(self.folder, self.cluster, self.prefix, head, tail)

    # --- its workers

    def worker(self, slot: int, sabotage: str | None = None) -> subprocess.Popen:
        """Start a worker in a slot that is free."""
        assert self.workers[slot] is None
        self.workers[slot] = self.start("run", sabotage=sabotage)
        return self.workers[slot]

    def kill(self, slot: int) -> None:
        """Kill -9 a worker."""
        worker = self.workers[slot]
        if worker is not None:
            worker.kill()
            self.gone(slot)

    def gone(self, slot: int) -> str:
        """Wait for the end of a worker, and return how it ended; all but what we did to it is being fenced."""
        worker = self.workers[slot]
        done = self.ended(worker)
        self.workers[slot] = None
        how = _ENDS.get(done.status, "fenced")
        assert how != "fenced" or (done.status == 1 and FENCED in done.err), (done.status, done.err)
        self.ends[how] += 1
        return how

    def tend(self) -> None:
        """Start a worker wherever there is none, or none any more."""
        for slot, worker in enumerate(self.workers):
            if worker is not None and worker.poll() is not None:
                self.gone(slot)
            if self.workers[slot] is None:
                self.worker(slot)

    def work(self, seconds: float) -> None:
        """Let all work for a while, and keep the workers running."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.tend()
            time.sleep(0.02)

    def progress(self, *, tended: bool = True) -> None:
        """Wait until more is committed of every partition of `traffic`: each of them has a worker."""
        before: list[int] | None = None

        def gone_on() -> bool:
            nonlocal before
            if tended:
                self.tend()
            now = self._positions()
            before = before or now
            return now is not None and all(map(operator.gt, now, before))

        eventually(gone_on, "progress")

    def _positions(self) -> list[int] | None:
        """Return what the workers have committed of `traffic`, per partition; None while the brokers are away."""
        asked = [TopicPartition(f"{self.prefix}traffic", partition) for partition in range(PARTITIONS)]
        try:
            return [one.offset for one in self._consumer.committed(asked, timeout=5)]
        except KafkaException:  # a new one next time, which knows nothing of brokers that moved
            self._consumer.close()
            self._consumer = self._new_consumer()
            return None

    def _new_consumer(self) -> Consumer:
        return Consumer(self.cluster.client() | {"group.id": f"{self.prefix}workers"})

    def members(self) -> list[int]:
        """Return how many partitions each member of the workers' group has."""
        group = f"{self.prefix}workers"
        admin = AdminClient(self.cluster.client())  # kept by a name: what it does ends with it
        found = admin.describe_consumer_groups([group])[group].result(PATIENCE_S).members
        return [len(one.assignment.topic_partitions) for one in found]

    # --- its gateways

    def publishing(self) -> None:
        """Begin to publish, until the faults are over."""
        self._gateway = Gateway(self.settings, PARTITIONS, self.seed)

    def interrupted_publish(self) -> None:
        """Publish a file by the command line, killed in the middle of it twice, and gone on with."""
        stream = records(self.seed, name="f", first_person=90, people=10)
        published = [next(stream) for _ in range(600)]
        file = self.file(*published)
        for _ in range(2):
            sabotage = struck(self.chance.choice(GATEWAY_POINTS), self.chance.randint(2, 8))
            process = self.start("publish", file, sabotage=_SMALL_CHUNKS + sabotage)
            eventually(lambda one=process: self.tend() or one.poll(), "the end of a gateway")
            assert process.returncode == -signal.SIGKILL, self.told(process)
        done = self.run("publish", file)
        assert done.status == 0, done.err
        assert "resuming at line" in done.err
        self.sent += [Sent(record, Outcome.DONE, -1) for record in published]

    # --- the end

    def settle(self) -> None:
        """Stop publishing, have the workers come to the end of the input, and stop them; once."""
        if self._settled:
            return
        self._settled = True
        if self._gateway is not None:
            self.sent += self._gateway.finish()
        eventually(self._all_read, "the end of the input")
        for slot, worker in enumerate(self.workers):
            worker.terminate()
            assert self.gone(slot) != "killed"

    def _all_read(self) -> bool:
        self.tend()
        time.sleep(0.2)
        with suppress(Retriable):
            return self.within(lambda deployment: deployment.log.consumer("judge").at_end())
        return False

    def close(self) -> None:
        """Kill what is still running."""
        super().close()
        self._consumer.close()

    def judge(self) -> Verdict:
        """Return what the checker says."""
        return check(gather(self.settings, PARTITIONS, self.sent, self.tail))


# --- the schedules ------------------------------------------------------------------------------------------------


def worker_killed(site: Site) -> None:
    """Workers are killed -9 at any point of their work, and so is a gateway, which goes on with its file."""
    site.publishing()
    site.tend()
    site.progress()
    site.kill(0)
    site.worker(0, struck(site.chance.choice(POINTS), site.chance.randint(1, 20)))
    site.interrupted_publish()
    site.kill(1)
    site.progress()


def killed_twice(site: Site) -> None:
    """A worker is killed, started again, and killed again within a second or two; then both at once."""
    site.publishing()
    site.tend()
    site.progress()
    for _ in range(2):
        site.kill(0)
        site.worker(0)
        time.sleep(0.4 + 1.2 * site.chance.random())
        site.kill(0)
        site.work(1 + site.chance.random())
    site.kill(0)
    site.kill(1)
    site.tend()
    site.progress()


def killed_in_commit(site: Site) -> None:
    """Workers are killed in the middle of a transaction: nothing, some or all of it written, decided or not."""
    site.publishing()
    site.tend()
    site.progress()
    points = site.chance.sample(COMMIT_POINTS, 3)
    for turn, point in enumerate(points):
        site.kill(turn % 2)
        site.worker(turn % 2, struck(point, site.chance.randint(1, 4)))
        eventually(lambda slot=turn % 2: site.workers[slot].poll() is not None, "the point in the commit")
        site.gone(turn % 2)
        site.tend()


def zombie(site: Site) -> None:
    """A worker stops (SIGSTOP) past its session time-out, in the middle of a commit too, and then goes on (SIGCONT)."""
    asleep(site, BEFORE_COMMIT, site.chance.choice(COMMIT_POINTS), None)


def asleep(site: Site, *points: tuple[str, str, bool] | None, more: str = "") -> None:
    """Have a worker sleep at each of these points of its work, or anywhere (None). `more`: sabotage of all workers."""
    site.publishing()
    site.worker(0, more or None)
    for point in points:
        if site.workers[1] is not None:
            site.kill(1)
        sleeper = site.worker(1, more + (struck(point, site.chance.randint(2, 4), signal.SIGSTOP) if point else ""))
        if point is None:
            site.progress()
            site.work(2 * site.chance.random())
            sleeper.send_signal(signal.SIGSTOP)
        eventually(lambda one=sleeper: is_stopped(one), "a worker that sleeps")
        site.progress()  # of all partitions: they belong to the other worker by now
        sleeper.send_signal(signal.SIGCONT)
        site.work(0.5)
    site.progress()


def handed_over(site: Site) -> None:
    """A worker is told to end (SIGTERM): it ends well, and the other one has its partitions before any time-out."""
    site.publishing()
    site.tend()
    site.progress()
    eventually(lambda: len(site.members()) == 2 and all(site.members()), "two workers with partitions")
    slot = site.chance.randrange(2)
    site.workers[slot].terminate()
    assert site.gone(slot) == "stopped"
    assert len(site.members()) == 1  # it has left, and is not waited for
    site.progress(tended=False)
    assert site.ends == {"stopped": 1}


def broker_killed(site: Site) -> None:
    """A broker is killed -9 and started again at once, and then another one."""
    site.publishing()
    site.tend()
    site.progress()
    for node in site.chance.sample(range(3), 2):
        site.cluster.kill(node)
        site.work(site.chance.random())
        site.cluster.start_node(node)
        site.progress()


def one_of_three_away(site: Site) -> None:
    """One of three brokers is killed -9 and stays away; the work goes on meanwhile, and comes to its end."""
    site.publishing()
    site.tend()
    site.progress()
    away = site.chance.randrange(3)
    site.cluster.kill(away)
    site.work(2 + site.chance.random())
    site.progress()
    site.settle()
    site.cluster.start_node(away)


def coordinator_moved(site: Site) -> None:
    """The broker that coordinates the group of workers is killed, then the one of a partition's transactions."""
    site.publishing()
    site.tend()
    site.progress()
    for kind, key in ((0, f"{site.prefix}workers"), (1, f"{site.prefix}workers.traffic.0")):
        before = asyncio.run(_coordinator(site, kind, key))
        site.cluster.kill(before)
        site.work(1 + site.chance.random())
        site.progress()
        assert asyncio.run(_coordinator(site, kind, key)) != before
        site.cluster.start_node(before)


async def _coordinator(site: Site, kind: int, key: str) -> int:
    connection = Connection(site.settings)
    try:
        return await connection.coordinator(kind, key)
    finally:
        await connection.close()


def network_cut(site: Site) -> None:
    """Nothing passes between workers and broker for longer than they wait for an answer; what was sent comes later."""
    with _behind_proxy(site) as network:
        network.cut()
        site.work(REQUEST_TIMEOUT_MS / 1000 + site.chance.random())
        network.heal(late_s=0.4)
        site.progress()
        site.settle()


def network_stalled(site: Site) -> None:
    """In the middle of a commit some connections stall, and new ones do not: requests come late, and after others."""
    with _behind_proxy(site) as network:
        site.kill(0)
        worker = site.worker(0, struck(site.chance.choice(STALL_POINTS), site.chance.randint(2, 5), signal.SIGSTOP))
        eventually(lambda: is_stopped(worker), "a worker in the middle of a commit")
        network.stall_some()
        worker.send_signal(signal.SIGCONT)
        site.work(REQUEST_TIMEOUT_MS / 1000 + 0.3 + 0.5 * site.chance.random())
        network.heal(late_s=0.4)
        site.progress()
        site.settle()


def network_slow(site: Site) -> None:
    """Everything between workers and broker takes its time, more than the heartbeat of the group at times."""
    with _behind_proxy(site) as network:
        network.slow(0.02 + 0.2 * site.chance.random())
        site.work(3)
        site.progress()
        network.heal()
        site.settle()


def network_torn(site: Site) -> None:
    """All connections of the workers are reset, again and again."""
    with _behind_proxy(site) as network:
        torn = 0
        for _ in range(12):
            site.work(0.1 + 0.6 * site.chance.random())
            torn += network.tear()
        assert torn > 12
        site.progress()
        site.settle()


@contextmanager
def _behind_proxy(site: Site) -> Iterator[Proxy]:
    """Have the workers reach the broker through a proxy; the gateway goes straight to it."""
    ports = site.cluster.ports[0]
    with Proxy(ports.proxy, ports.behind_proxy, site.chance) as network:
        site.url = f"kafka://127.0.0.1:{ports.proxy}"
        site.publishing()
        site.tend()
        site.progress()
        assert network.passed_bytes
        yield network
    site.url = site.cluster.url


def disk_full(site: Site) -> None:
    """The broker's disk is full, and the broker ends or refuses; then there is space again, and it is started again."""
    site.publishing()
    site.tend()
    site.progress()
    filler = site.cluster.folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    assert not shutil.disk_usage(site.cluster.folder).free
    site.work(4 + site.chance.random())
    filler.unlink()
    site.cluster.kill(0)
    site.cluster.start_node(0)
    site.progress()


def keys_locked(site: Site) -> None:
    """Another process holds the key store's lock for seconds; new people turn up meanwhile."""
    site.publishing()
    site.tend()
    site.progress()
    with closing(sqlite3.connect(site.data / "keys.db", isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN EXCLUSIVE")
        site.work(SHORT[0] + 2 * site.chance.random())
        other.execute("ROLLBACK")
    site.progress()
    site.settle()
    assert site.ends == {"stopped": 2}


class Schedule(NamedTuple):
    """One schedule: what it does, and where."""

    run: Callable[[Site], None]
    nodes: int = 1
    times: tuple[float, int] = SHORT
    own_disk: bool = False


SCHEDULES = {
    schedule.run.__name__: schedule
    for schedule in (
        Schedule(worker_killed),
        Schedule(killed_twice),
        Schedule(killed_in_commit),
        Schedule(zombie),
        Schedule(handed_over, times=DEFAULT),
        Schedule(broker_killed, nodes=3),
        Schedule(one_of_three_away, nodes=3),
        Schedule(coordinator_moved, nodes=3),
        Schedule(network_cut),
        Schedule(network_stalled, times=DEFAULT),
        Schedule(network_slow),
        Schedule(network_torn),
        Schedule(disk_full, times=PATIENT, own_disk=True),
        Schedule(keys_locked),
    )
}


class Result(NamedTuple):
    """What came of one run of a schedule."""

    verdict: Verdict
    ends: Counter[str]  # of workers
    seconds: float


def execute(schedule: Schedule, seed: int, clusters: Clusters, folder: Path) -> Result:
    """Run a schedule in an empty folder, and return what the checker says. Blocks for 10 to 30 s."""
    began_s = time.monotonic()
    with ExitStack() as stack:
        if schedule.own_disk:
            disk = stack.enter_context(small_disk(folder / "disk"))
            broker = Cluster(disk / "kafka", settings=SETTINGS, quick=True)
            cluster = stack.enter_context(broker)
        else:
            cluster = clusters.of(schedule.nodes)
        site = stack.enter_context(closing(Site(folder, cluster, seed, schedule.times)))
        schedule.run(site)
        site.settle()
        return Result(site.judge(), site.ends, time.monotonic() - began_s)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Yield a folder on a disk of its own that is soon full. Needs the right to mount: run it as root."""
    folder.mkdir(parents=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "streamveil-chaos", str(folder)]
    done = subprocess.run(mounting, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"a small disk cannot be mounted, which takes root: {done.stderr.strip()}"
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
