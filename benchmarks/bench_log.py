"""End to end on the SQLite log and key store, one core: against the same log carrying the same bytes, unprocessed."""

import asyncio
import os
import tempfile
import time
from argparse import Namespace

from benchmarks.common import SMOKE, batch, report, results
from schemas.catalog import partition_for
from schemas.outbound import Message, Output
from streams.config import Config, load
from streams.deployment import open_log
from streams.worker.supervisor import run_one

RECORDS = 4000 if SMOKE else 100_000
CASES = (("sms cdr", 5_000), ("sms request", 5_000), ("voice cdr", 5_000), ("sms cdr", 20_000))
"""Kind of record, and number of different people among the records; each is new once."""


def config_in(folder: str, name: str) -> Config:
    return load(Namespace(config="streamveil.toml", log=f"sqlite:///{folder}/{name}/log.db"))


async def publish(config: Config, kind: str, people: int) -> None:
    log = await open_log(config)
    stream = "traffic" if kind == "sms request" else "traffic.cdr"
    for first in range(0, RECORDS, 10_000):
        by_partition: dict[int, list[Message]] = {}
        for index, value in enumerate(batch(kind, people, 0, min(10_000, RECORDS), first)):
            key = b"%d" % ((first + index) % people)
            partition = partition_for(key, log.partitions)
            by_partition.setdefault(partition, []).append(Message(int(time.time() * 1000), key, (), value))
        await log.append([Output(stream, partition, messages) for partition, messages in by_partition.items()])
    await log.close()


async def pass_through(config: Config, outputs_of: dict[str, int]) -> None:
    """Poll and commit with the same number and size of outputs, and no processing."""
    log = await open_log(config)
    consumer = log.consumer("pass-through")
    filler = {stream: os.urandom(size // 2).hex().encode() for stream, size in outputs_of.items()}
    while True:
        found = await consumer.poll(config.batch_records, 0.05)
        if found is None:
            if await consumer.at_end():
                break
            continue
        outputs = [
            Output(stream, found.partition, [Message(0, None, (("role", b"x"),), value) for _ in found.messages])
            for stream, value in filler.items()
        ]
        await consumer.commit(found, outputs, lambda: None)
    await consumer.forget_consumed()
    await consumer.close()
    await log.close()


async def sizes(config: Config) -> dict[str, int]:
    """Return the streams that a run wrote to, with the size of a value."""
    log = await open_log(config)
    found = {}
    for stream in ("verdicts", "cleared", "content", "cdr.pii", "cdr.anonymous"):
        for partition in range(log.partitions):
            page = await log.read(stream, partition, 0, 1)
            if page:
                found[stream] = len(page[0].value)
    await log.close()
    return found


def timed(run) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(run)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory(dir=results()) as folder:
        for number, (kind, people) in enumerate(CASES):
            full = config_in(folder, f"full-{number}")
            asyncio.run(publish(full, kind, people))
            wall, cpu = timed(run_one(full, until_idle=True))
            bare = config_in(folder, f"bare-{number}")
            asyncio.run(publish(bare, kind, people))
            bare_wall, bare_cpu = timed(pass_through(bare, asyncio.run(sizes(full))))
            rows.append({
                "case": f"{kind}, end to end",
                "people": people,
                "records": RECORDS,
                "records_per_s": round(RECORDS / wall),
                "us": round(wall / RECORDS * 1e6, 2),
                "cpu_us": round(cpu / RECORDS * 1e6, 2),
                "baseline": "the log alone, same outputs",
                "baseline_us": round(bare_wall / RECORDS * 1e6, 2),
                "baseline_cpu_us": round(bare_cpu / RECORDS * 1e6, 2),
            })  # fmt: skip
    report(rows)


if __name__ == "__main__":
    main()
