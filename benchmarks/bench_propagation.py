"""How soon an opt-out counts at every worker: two of them have more CDRs to do than they can.

On SQLite here, and on a broker as the part `propagation` of bench_kafka.
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
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks.common import SMOKE, report, results
from benchmarks.flow import publish
from processors.screen.suppression import Suppressions
from schemas.catalog import partition_for
from schemas.errors import Retriable
from schemas.outbound import Message, Output
from streams.config import load
from streams.deployment import Deployment
from streams.log.protocol import Log
from streams.optout import Entry, OptOuts
from streams.worker.supervisor import run_one

SAMPLES = 4 if SMOKE else 300
BACKLOG = 4_000 if SMOKE else 200_000


def busy(config: Path, told: Path) -> None:
    """A worker that notes when it knows of an opt-out, and when it last committed a batch without that.

    In between it may wait for something else, and clears nothing.
    """
    apply, merge = Suppressions.apply, Suppressions.merge
    seen: set[bytes] = set()
    last_s = 0.0

    def noting(self, token, *args, **more):
        apply(self, token, *args, **more)
        if token not in seen:
            seen.add(token)
            out.write(f"knows {token.hex()} {time.time()} {last_s}\n")

    def committed(self, overlay):
        nonlocal last_s
        merge(self, overlay)
        last_s = time.time()
        for token in overlay.changed:
            if token not in seen:
                seen.add(token)
                out.write(f"committed {token.hex()} {last_s} {last_s}\n")

    Suppressions.apply, Suppressions.merge = noting, committed
    with told.open("w", buffering=1) as out:
        asyncio.run(run_one(load(Namespace(config=str(config), log=None)), until_idle=False))


def _busy(path: Path, told: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.bench_propagation", "--busy", str(path), str(told)])


def propagation(path: Path) -> list[dict[str, object]]:
    """Return how long after its acknowledgement every worker knows an opt-out, while all have more than enough to do.

    `path`: the configuration of a deployment that nobody has used yet.
    """
    config = load(Namespace(config=str(path), log=None))
    told = [path.parent / f"worker-{number}" for number in (1, 2)]
    delays: dict[str, list[tuple[float, float]]] = {"add": [], "STOP": []}

    async def run() -> None:
        async with Deployment.open(config) as deployment:
            opt_outs = OptOuts(deployment)
            await publish(config, "sms cdr", 50_000, BACKLOG)
            workers = [_busy(path, one) for one in told]
            try:
                await _until(lambda: all(one.exists() for one in told))
                consumer = deployment.log.consumer("looks")
                asked: dict[str, tuple[str, float]] = {}
                people = iter(range(10**9))
                while len(asked) < SAMPLES:
                    ends = sum(await deployment.log.end_offsets("traffic.cdr"))
                    with suppress(Retriable):  # brokers that make the group's coordinator
                        if ends - sum(await consumer.committed_offsets("traffic.cdr")) < BACKLOG / 2:
                            await publish(config, "sms cdr", 50_000, BACKLOG)
                    number = f"+49151{next(people):08}"
                    token = deployment.tokens.of(number).hex()
                    if len(asked) % 2:
                        await opt_outs.catch_up()
                        await opt_outs.add([Entry(number)], int(time.time()))
                        asked[token] = ("add", time.time())
                    else:
                        asked[token] = ("STOP", 0.0)
                        await _stop(deployment.log, number)
                    await asyncio.sleep(0.05 + random.random() * 0.1)
                await _until(lambda: _missing(told, asked) == 0)
            finally:
                for worker in workers:
                    worker.terminate()
                    worker.wait()
        for token, (how, acknowledged_s) in asked.items():
            lines = [line.split() for one in told for line in one.read_text().splitlines() if token in line]
            since_s = acknowledged_s or min(float(at) for what, _, at, _ in lines if what == "committed")
            others = [(float(at), float(last)) for what, _, at, last in lines if what == "knows"]
            delays[how].append(
                (max([0.0, *(last - since_s for _, last in others)]), max([0.0, *(at - since_s for at, _ in others)]))
            )

    asyncio.run(run())
    rows = []
    for what, found in (("acknowledgement (optout add)", delays["add"]), ("commit (STOP)", delays["STOP"])):
        last, known = (np.array(column) * 1e3 for column in zip(*found, strict=True))
        rows.append({
            "case": f"an opt-out counts at every one of 2 busy workers, from its {what}", "samples": len(found),
            "last_batch_without_it_p50_ms": round(float(np.percentile(last, 50))),
            "last_batch_without_it_p99_ms": round(float(np.percentile(last, 99))),
            "known_p50_ms": round(float(np.percentile(known, 50))),
            "known_p99_ms": round(float(np.percentile(known, 99))), "known_max_ms": round(known.max()),
            "load": round(os.getloadavg()[0], 1),
        })  # fmt: skip
    return rows


async def _stop(log: Log, number: str) -> None:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    value = json.dumps({
        "v": 1, "type": "cdr", "record_id": f"stop-{os.urandom(6).hex()}", "account_id": "acme-retail", "direction": "mo", "channel": "sms",
        "occurred_at": at, "sender": number, "recipient": "12345", "content": "STOP",
    })  # fmt: skip
    message = Message(int(time.time() * 1000), number.encode(), (), value.encode())
    await log.append([Output("traffic", partition_for(number.encode(), log.partitions), [message])])


def _missing(told: list[Path], asked: dict[str, tuple[str, float]]) -> int:
    known = [{line.split()[1] for line in one.read_text().splitlines() if line.count(" ") == 3} for one in told]
    return sum(token not in one for token in asked for one in known)


async def _until(is_so) -> None:
    deadline_s = time.monotonic() + 120
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError("the workers do not answer")
        await asyncio.sleep(0.1)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=results()) as folder:
        path = Path(folder) / "streamveil.toml"
        path.write_text('log = "sqlite:///data/log.db"\n')
        report(propagation(path))


if __name__ == "__main__":
    if "--busy" in sys.argv:
        busy(*map(Path, sys.argv[sys.argv.index("--busy") + 1 :]))
    else:
        main()
