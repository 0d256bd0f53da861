"""What the cases with a log share: publishing reference records, and passing bytes through it unprocessed."""

import os
import time
from collections.abc import Callable, Sequence

from benchmarks.common import batch
from schemas.catalog import partition_for
from schemas.outbound import Message, Output
from streams.config import Config
from streams.deployment import open_log

OUTPUTS = ("verdicts", "cleared", "content", "cdr.pii", "cdr.anonymous")
HEADERS = (("role", b"controller"), ("class", b"traffic"), ("policy", b"default/1"))


async def publish(config: Config, kind: str, people: int, records: int, seed: int = 0) -> None:
    """Publish records about so many people, who are different ones for another `seed`."""
    log = await open_log(config)
    stream = "traffic" if kind == "sms request" else "traffic.cdr"
    for first in range(0, records, 10_000):
        by_partition: dict[int, list[Message]] = {}
        for index, value in enumerate(batch(kind, people, seed, min(10_000, records - first), first)):
            key = b"%d" % ((first + index) % people)
            partition = partition_for(key, log.partitions)
            by_partition.setdefault(partition, []).append(Message(int(time.time() * 1000), key, (), value))
        await log.append([Output(stream, partition, messages) for partition, messages in by_partition.items()])
    await log.close()


async def pass_through(
    config: Config, outputs_of: dict[str, int], on_batch: Callable[[Sequence[Message]], None] = lambda _: None
) -> None:
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
            Output(stream, found.partition, [Message(0, None, HEADERS, value) for _ in found.messages])
            for stream, value in filler.items()
        ]
        await consumer.commit(found, outputs, lambda: None)
        on_batch(found.messages)
    await consumer.forget_consumed()
    await consumer.close()
    await log.close()


async def sizes(config: Config) -> dict[str, int]:
    """Return the streams that a run wrote to, with the size of a value."""
    log = await open_log(config)
    found = {}
    for stream in OUTPUTS:
        for partition in range(log.partitions):
            page = await log.read(stream, partition, 0, 1)
            if page:
                found[stream] = len(page[0].value)
    await log.close()
    return found
