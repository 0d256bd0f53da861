"""Officers' work over a long log: real sealed values, made once and appended again and again. `--quick`: a tenth of it."""

import asyncio
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.bench_log import config_in
from benchmarks.common import SMOKE, report, results, rss_mib
from benchmarks.flow import publish
from processors.retention import DAY_S
from schemas.catalog import CATALOG
from schemas.outbound import Message, Output
from streams.config import Config
from streams.deployment import Deployment
from streams.officer import retention
from streams.officer.access import Report
from streams.officer.office import office
from streams.officer.scan import everything, scan
from streams.worker.supervisor import run_one

RECORDS = 20_000 if SMOKE else 1_000_000 if "--quick" in sys.argv else 10_000_000
MADE = 10_000 if SMOKE else 100_000
PEOPLE = 5_000 if SMOKE else 50_000
SOMEBODY = "+14150000007"
_AT_ONCE = 10_000


def alone(work: Callable[..., dict[str, object]], *args: object) -> dict[str, object]:
    """Return what a case gives in a process of its own, with the most memory that the process ever had."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, work, args).result()


def _measured(work: Callable[..., dict[str, object]], args: tuple[object, ...]) -> dict[str, object]:
    begin_mib = rss_mib()
    found = work(*args)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "mib_before": round(begin_mib), "mib_at_most": round(peak_mib)}


def fill(config: Config, records: int) -> dict[str, object]:
    """Seal `MADE` CDRs of `PEOPLE` people, and append those of `cdr.pii` again until it has `records`."""
    asyncio.run(publish(config, "sms cdr", PEOPLE, MADE))
    asyncio.run(run_one(config, until_idle=True))
    return asyncio.run(_multiply(config, records))


async def _multiply(config: Config, records: int) -> dict[str, object]:
    begin = time.perf_counter()
    async with Deployment.open(config) as deployment:
        log = deployment.log
        found = [stored async for page in scan(log, "cdr.pii", everything) for stored in page]
        messages = [Message(one.timestamp_ms, one.key, one.headers, one.value) for one in found]
        there = len(messages)
        while there < records:
            for at in range(0, len(messages), _AT_ONCE):
                few = messages[at : at + _AT_ONCE][: records - there]
                if few:
                    await log.append([Output("cdr.pii", at // _AT_ONCE % log.partitions, few)])
                    there += len(few)
    size = sum(path.stat().st_size for path in config.folder.glob("log.db*"))
    return {"records": there, "gib": round(size / 2**30, 2), "seconds": round(time.perf_counter() - begin, 1)}


# --- access -------------------------------------------------------------------------------------------------------


def access(config: Config) -> dict[str, object]:
    """Report on one person, of whom there are as many records as of any other."""
    return asyncio.run(_access(config))


async def _access(config: Config) -> dict[str, object]:
    async with Deployment.open(config) as deployment:
        made = Report(
            office(deployment), SOMEBODY, account=None, reason="BENCH-1", kind="access", now_s=int(time.time())
        )
        total = await made.size()
        begin, cpu, shown = time.perf_counter(), time.process_time(), 0
        async for item in made.items():
            shown += item.section == "record"
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if not shown:
        raise SystemExit("nothing was found")
    return {
        "case": "access", "records": total, "shown": shown, "seconds": round(wall, 1),
        "records_per_s": round(total / wall), "us": round(wall / total * 1e6, 2), "cpu_us": round(cpu / total * 1e6, 2),
    }  # fmt: skip


def read(config: Config) -> dict[str, object]:
    """Read the same streams, and look at nothing."""
    return asyncio.run(_read(config))


async def _read(config: Config) -> dict[str, object]:
    async with Deployment.open(config) as deployment:
        begin, total = time.perf_counter(), []
        for stream in CATALOG:
            if not stream.startswith("traffic"):
                async for _ in scan(deployment.log, stream, lambda _: False, advance=total.append):
                    pass
        wall = time.perf_counter() - begin
    return {"records": sum(total), "us": round(wall / sum(total) * 1e6, 2)}


# --- retention ----------------------------------------------------------------------------------------------------


def retire(config: Config) -> dict[str, object]:
    """Destroy everything as of 13 months ahead, and cut the log; before that, only say what would go."""
    return asyncio.run(_retire(config))


async def _retire(config: Config) -> dict[str, object]:
    clock_s = int(time.time())
    at_s, _ = retention.moment(config, clock_s + 395 * DAY_S, clock_s, yes=True)
    async with Deployment.open(config) as deployment:
        begin = time.perf_counter()
        would = await retention.run(deployment, at_s, dry=True)
        dry = time.perf_counter() - begin
        begin, cpu = time.perf_counter(), time.process_time()
        did = await retention.run(deployment, at_s, dry=False)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    records = sum(cut.records for cut in did.cuts)
    if did.failed or records != sum(cut.records for cut in would.cuts):
        raise SystemExit("not all was cut")
    return {
        "case": "retention", "records": records, "persons": did.died.persons, "seconds": round(wall, 1),
        "records_per_s": round(records / wall), "us": round(wall / records * 1e6, 2),
        "cpu_us": round(cpu / records * 1e6, 2), "baseline": "the same, dry", "baseline_us": round(dry / records * 1e6, 2),
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory(dir=results()) as folder:
        config = config_in(folder, "officer")
        filled = alone(fill, config, RECORDS)
        row = alone(access, config)
        bare = alone(read, config)
        retired = alone(retire, config)
        report([
            {**row, "log_gib": filled["gib"], "baseline": "reading alone", "baseline_us": bare["us"]},
            {**retired, "log_gib": filled["gib"]},
        ])  # fmt: skip


if __name__ == "__main__":
    main()
