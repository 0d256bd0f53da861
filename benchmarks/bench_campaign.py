"""`screen --file`: a campaign's list, every number another person's, against the same list through `csv` alone."""

import asyncio
import csv
import io
import random
import sys
import tempfile
import time

from benchmarks.bench_log import config_in
from benchmarks.common import SEED, SMOKE, best_us, report, results
from streams.deployment import Deployment
from streams.screening import ADDED, Question, Screening

ROWS = 10_000 if SMOKE else 100_000 if "--quick" in sys.argv else 1_000_000
SLOW_ROWS = ROWS // 50
"""National spellings go through the phone-number library once each."""


def a_list(count: int, spelt: str, more: str) -> bytes:
    """Return a list of distinct American numbers; `spelt`: how a number of ten digits stands in it."""
    rng = random.Random(SEED)
    areas = (212, 312, 415, 602, 713, 808)
    numbers = rng.sample(range(2_000_000, 10_000_000), count)
    body = "".join(
        f"{spelt.format(f'{areas[at % len(areas)]}{number:07}')},Anna Smith,ref-{at}{more}\n"
        for at, number in enumerate(numbers)
    )
    return f"number,name,ref{',country,time_zone' if more else ''}\n{body}".encode()


def through_csv(data: bytes) -> None:
    """Read and write the same rows with as many cells more."""
    out = csv.writer(io.StringIO(newline=""))
    extra = ["cleared", "", "", "", ""]
    for row in csv.reader(io.TextIOWrapper(io.BytesIO(data), newline="")):
        out.writerow(row + extra)


async def screened(config) -> list[dict[str, object]]:
    rows = []
    async with Deployment.open(config) as deployment:
        for case, count, spelt, more, purpose in (
            ("E.164, marketing", ROWS, "+1{}", "", "marketing"),
            ("E.164, otp", ROWS, "+1{}", "", "otp"),
            ("E.164, marketing, with country and time zone", ROWS, "+1{}", ",US,America/Chicago", "marketing"),
            ("national, marketing", SLOW_ROWS, "{}", ",US,", "marketing"),
        ):
            data = a_list(count, spelt, more)
            base, _ = best_us(lambda data=data: through_csv(data), count, seconds=1)
            best = cpu = 1e9
            for _ in range(1 if SMOKE else 3):
                screening = Screening(deployment, Question("acme", "sms", purpose), int(time.time()))
                await screening.ready()
                begin, busy = time.perf_counter(), time.process_time()
                size = sum(map(len, screening.csv(io.BytesIO(data), lambda _: None)))
                best = min(best, time.perf_counter() - begin)
                cpu = min(cpu, time.process_time() - busy)
                if screening.counts.total() != count or size < len(data) + count * len(ADDED):
                    raise SystemExit("rows were lost")
            rows.append(
                {
                    "case": case, "rows": count, "rows_per_s": round(count / best), "us": round(best / count * 1e6, 2),
                    "cpu_us": round(cpu / count * 1e6, 2), "baseline": "csv alone", "baseline_us": base,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory(dir=results()) as folder:
        report(asyncio.run(screened(config_in(folder, "campaign"))))


if __name__ == "__main__":
    main()
