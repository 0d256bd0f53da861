"""End to end on the SQLite log and key store, one core: against the same log carrying the same bytes, unprocessed."""

import asyncio
import tempfile
import time
from argparse import Namespace

from benchmarks.common import SMOKE, report, results
from benchmarks.flow import pass_through, publish, sizes
from streams.config import Config, load
from streams.worker.supervisor import run_one

RECORDS = 1000 if SMOKE else 100_000
CASES = (("sms cdr", 5_000), ("sms request", 5_000), ("voice cdr", 5_000), ("sms cdr", 20_000))
"""Kind of record, and number of different people among the records; each is new once."""


def config_in(folder: str, name: str) -> Config:
    return load(Namespace(config="streamveil.toml", log=f"sqlite:///{folder}/{name}/log.db"))


def timed(run) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(run)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory(dir=results()) as folder:
        first = config_in(folder, "first")  # so that no case is charged with what is imported once
        asyncio.run(publish(first, "voice cdr", 100, 100))
        asyncio.run(run_one(first, until_idle=True))
        for number, (kind, people) in enumerate(CASES):
            full = config_in(folder, f"full-{number}")
            asyncio.run(publish(full, kind, people, RECORDS))
            wall, cpu = timed(run_one(full, until_idle=True))
            bare = config_in(folder, f"bare-{number}")
            asyncio.run(publish(bare, kind, people, RECORDS))
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
