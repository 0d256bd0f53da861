"""On a real broker: passing through, the full pipeline, fixed rates to saturation, commit intervals, opt-outs, memory.

`python -m benchmarks.bench_kafka [--smoke] [PART…]`, parts: cost, rates, commit, propagation, memory. The broker, the worker and
what makes the load share one machine, so the wall times say what this machine can do; CPU per record is the client's
alone (user and system time of the worker's process, all threads).
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from benchmarks.bench_propagation import propagation
from benchmarks.common import KINDS, SEED, SMOKE, report, results, rss_mib
from benchmarks.flow import pass_through, publish, sizes
from deploy.kafka.broker import Cluster
from schemas.catalog import partition_for
from streams.config import Config, load
from streams.log.provision import apply
from streams.worker.supervisor import run_one

PARTS = ("cost", "rates", "commit", "propagation", "memory")
RECORDS = 4000 if SMOKE else 100_000
SECONDS = 1 if SMOKE else 20
RATES = (500,) if SMOKE else (5_000, 10_000, 15_000, 18_000, 20_000, 25_000, 30_000, 35_000)
COMMIT_EVERY_MS = (20,) if SMOKE else (0, 5, 20, 50, 100, 200)
MEMORY_RECORDS = 4_000 if SMOKE else 10_000_000
PEOPLE = 5_000
CHUNKS = 2 if SMOKE else 20
COSTS = (
    ("sms request", PEOPLE), ("sms request", RECORDS), ("sms cdr", PEOPLE), ("sms cdr", RECORDS), ("voice cdr", PEOPLE),
)  # fmt: skip


def deployment(folder: str, cluster: Cluster, name: str, **kafka: object) -> Config:
    """Return the configuration of a deployment of its own, with its streams made."""
    path = Path(folder) / name / "streamveil.toml"
    path.parent.mkdir()
    more = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"prefix": f"{name}.", **kafka}.items())
    path.write_text(cluster.config_toml() + more)
    config = load(Namespace(config=str(path), log=None))
    apply(config)
    return config


class Meter:
    """Wall and CPU time from the end of the first batch to that of the last, and the records between."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, int]] = []

    def __call__(self, outcomes) -> None:
        self.marks.append((time.perf_counter(), time.process_time(), len(outcomes)))

    @property
    def figures(self) -> dict[str, float]:
        (wall, cpu, _), *_, (wall_end, cpu_end, _) = self.marks
        records = sum(count for _, _, count in self.marks[1:])
        return {
            "records_per_s": round(records / (wall_end - wall)),
            "us": round((wall_end - wall) / records * 1e6, 2),
            "cpu_us": round((cpu_end - cpu) / records * 1e6, 2),
            "batches": len(self.marks),
        }


def cost(folder: str, cluster: Cluster) -> None:
    """Requests and CDRs apart, people known and all new, each against passing the same bytes through."""
    for number, (kind, people) in enumerate(COSTS[2:3] if SMOKE else COSTS):
        full = deployment(folder, cluster, f"full{number}")
        if people != RECORDS:  # known: their secrets are in the store; the process reads each once
            asyncio.run(publish(full, kind, people, people))
            asyncio.run(run_one(full, until_idle=True))
        asyncio.run(publish(full, kind, people, RECORDS))
        meter = Meter()
        asyncio.run(run_one(full, until_idle=True, on_batch=meter))
        bare = deployment(folder, cluster, f"bare{number}")
        asyncio.run(publish(bare, kind, people, RECORDS))
        bare_meter = Meter()
        asyncio.run(pass_through(bare, asyncio.run(sizes(full)), bare_meter))
        figures, passed = meter.figures, bare_meter.figures
        report([{
            "case": f"{kind}, {'all new' if people == RECORDS else f'{people:,} known people'}",
            **figures,
            "baseline": "passing the same outputs through",
            "baseline_records_per_s": passed["records_per_s"],
            "baseline_us": passed["us"],
            "baseline_cpu_us": passed["cpu_us"],
            "of_baseline_rate": f"{figures['records_per_s'] / passed['records_per_s']:.0%}",
        }])  # fmt: skip


# --- fixed rates --------------------------------------------------------------------------------------------


async def load_at(config: Config, rate: int, seconds: float) -> dict[str, object]:
    """Publish requests at a rate, and see how long each verdict takes from the moment its request was sent.

    Requests go in batches of 10 ms; the time of a verdict is when a `read_committed` reader has it.
    """
    servers = ",".join(config.kafka.servers)
    topic, verdicts = f"{config.kafka.prefix}traffic", f"{config.kafka.prefix}verdicts"
    producer = AIOKafkaProducer(bootstrap_servers=servers, max_batch_size=1_000_000, acks="all")
    consumer = AIOKafkaConsumer(
        bootstrap_servers=servers, isolation_level="read_committed", auto_offset_reset="earliest",
        max_partition_fetch_bytes=4_000_000, fetch_max_wait_ms=10,
    )  # fmt: skip
    await producer.start()
    await consumer.start()
    places = [TopicPartition(verdicts, partition) for partition in range(config.partitions)]
    consumer.assign(places)
    await consumer.seek_to_end(*places)
    for place in places:
        await consumer.position(place)
    every_s, rng = 0.01, random.Random(SEED)
    pool = [KINDS["sms request"](index, index % PEOPLE, rng) for index in range(20_000)]
    keys = [b"%d" % (index % PEOPLE) for index in range(len(pool))]
    homes = [partition_for(key, config.partitions) for key in keys]
    sent_at: dict[bytes, float] = {}
    took: list[float] = []
    total = int(rate * seconds)
    sent = 0

    async def send() -> None:
        nonlocal sent
        began = time.perf_counter()
        while sent < total:
            due = min(total, int((time.perf_counter() - began + every_s) * rate))
            builders = {}
            for number in range(sent, due):
                at = number % len(pool)
                builder = builders.get(homes[at])
                if builder is None:
                    builder = builders[homes[at]] = producer.create_batch()
                mark = b"%016x" % number
                sent_at[mark] = time.perf_counter()
                value = pool[at].replace(_record_id(pool[at]), mark * 2, 1)
                if builder.append(timestamp=None, key=keys[at], value=value) is None:
                    raise RuntimeError("a batch of the load is too small")
            sent = due
            for partition, builder in builders.items():
                await producer.send_batch(builder, topic, partition=partition)
            await asyncio.sleep(every_s)

    async def receive() -> None:
        last = time.perf_counter()
        while len(took) < total and time.perf_counter() - last < 20:
            found = await consumer.getmany(timeout_ms=100)
            now = time.perf_counter()
            for messages in found.values():
                last = now
                for message in messages:
                    start = message.value.index(b'"record_id":"') + 13
                    took.append(now - sent_at.pop(message.value[start : start + 16]))

    await asyncio.gather(send(), receive())
    await producer.stop()
    await consumer.stop()
    took = took[len(took) // 5 :]  # the first fifth warms up
    took.sort()
    return {
        "rate": rate,
        "verdicts": f"{len(took) * 5 // 4} of {total}",
        "p50_ms": round(took[len(took) // 2] * 1000, 1),
        "p99_ms": round(took[int(len(took) * 0.99)] * 1000, 1),
    }


def _record_id(value: bytes) -> bytes:
    start = value.index(b'"record_id":"') + 13
    return value[start : start + 32]


def at_rate(config: Config, rate: int, seconds: float) -> dict[str, object]:
    """Run a worker in a process of its own, load it, and return what came of it, with the worker's CPU."""
    command = [
        sys.executable,
        "-m",
        "streams.cli",
        "run",
        "--config",
        str(config.keys_path.parent.parent / "streamveil.toml"),
    ]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asyncio.run(load_at(config, 500, 1 if SMOKE else 4))  # until it has joined
        before = cpu_s(worker.pid)
        row = asyncio.run(load_at(config, rate, seconds))
        row["cpu_us"] = round((cpu_s(worker.pid) - before) / (rate * seconds) * 1e6, 1)
    finally:
        worker.terminate()
        worker.wait()
    return row


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rates(folder: str, cluster: Cluster) -> None:
    """Requests at fixed rates until the worker falls behind."""
    config = deployment(folder, cluster, "rates")
    for rate in RATES:
        row = at_rate(config, rate, SECONDS)
        report([{"case": "sms request at a fixed rate", **row}])
        if row["p99_ms"] > 2000:
            break


def commit(folder: str, cluster: Cluster) -> None:
    """The same rate with other values of `commit_every_ms`."""
    for every_ms in COMMIT_EVERY_MS:
        config = deployment(folder, cluster, f"commit{every_ms}", commit_every_ms=every_ms)
        for rate in RATES[:2]:
            row = at_rate(config, rate, SECONDS / 2)
            report([{"case": "sms request", "commit_every_ms": every_ms, **row}])


def opt_outs(folder: str, cluster: Cluster) -> None:
    """How soon an opt-out counts at two busy workers."""
    deployment(folder, cluster, "propagation")
    report(propagation(Path(folder) / "propagation" / "streamveil.toml"))


# --- memory -------------------------------------------------------------------------------------------------


def memory(folder: str, cluster: Cluster) -> None:
    """Resident memory of a worker after ten million records, against that after the first tenth; topics are bounded."""
    config = deployment(folder, cluster, "memory")
    bound(config, {"retention.bytes": str(256 << 20), "segment.bytes": str(32 << 20)})
    done, at_tenth = 0, 0.0

    def count(outcomes) -> None:
        nonlocal done, at_tenth
        done += len(outcomes)
        if not at_tenth and done >= MEMORY_RECORDS // 10:
            at_tenth = rss_mib()

    chunk = MEMORY_RECORDS // CHUNKS
    while done < MEMORY_RECORDS:
        publisher = [
            sys.executable,
            "-c",
            _PUBLISH.format(chunk=chunk, people=PEOPLE),
            str(config.keys_path.parent.parent),
        ]
        subprocess.run(publisher, check=True)
        asyncio.run(run_one(config, until_idle=True, on_batch=count))
    end = rss_mib()
    report([{
        "case": f"resident memory after {done:,} records", "mib": round(end, 1),
        "baseline": "after the first tenth", "baseline_mib": round(at_tenth, 1),
        "growth_percent": round((end / at_tenth - 1) * 100, 1),
    }])  # fmt: skip


_PUBLISH = """
import asyncio, sys
from argparse import Namespace
from benchmarks.flow import publish
from streams.config import load
asyncio.run(publish(load(Namespace(config=sys.argv[1] + "/streamveil.toml", log=None)), "sms request", {people}, {chunk}))
"""


def bound(config: Config, settings: dict[str, str]) -> None:
    """Bound all topics of a deployment by size."""
    admin = AdminClient({"bootstrap.servers": ",".join(config.kafka.servers)})
    topics = [name for name in admin.list_topics().topics if name.startswith(config.kafka.prefix)]
    asked = [
        ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()
        ])
        for topic in topics
    ]  # fmt: skip
    for done in admin.incremental_alter_configs(asked).values():
        done.result()


def main() -> None:
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(PARTS)
    parts: dict[str, Callable[[str, Cluster], None]] = {
        "cost": cost, "rates": rates, "commit": commit, "propagation": opt_outs, "memory": memory,
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(dir=results()) as folder,
        Cluster(Path(folder) / "broker", secured=False) as cluster,
    ):
        report([{"case": "broker", "version": cluster.version, "nodes": 1, "profile": "plaintext"}])
        for name in chosen:
            parts[name](folder, cluster)


if __name__ == "__main__":
    main()
