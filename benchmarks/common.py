"""What the cases share: reference records, a throw-away pipeline, timing, and where and on what it ran."""

import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from processors.keyring import KeyRing
from processors.pipeline import Inbox, Pipeline
from processors.plan import Planner
from processors.screen.suppression import Suppressions, Tokens
from streams.config import read_policy
from streams.state.registries import Registries
from streams.worker.selftest import throwaway_ring

SEED = 20261121
BATCH = 2000
SMOKE = "--smoke" in sys.argv
ACCOUNTS = ("acme-retail", "northwind-bank", "globex-travel", "initech-health")
_TEXT = "Your parcel is on its way and will arrive on Tuesday between 9 and 12. Track it in the app."


def now_s() -> int:
    return int(time.time())


def _common(index: int, person: int, rng: random.Random) -> dict[str, object]:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s() - rng.randrange(3600)))
    return {
        "v": 1,
        "record_id": f"{rng.getrandbits(128):032x}",
        "account_id": ACCOUNTS[index % len(ACCOUNTS)],
        "direction": "mt",
        "occurred_at": f"{at}.{rng.randrange(1000):03}Z",
        "purpose": "transactional",
        "sender": "ACME",
        "recipient": f"+1415{person:07}",
        "country": "US",
        "mcc": "310",
        "mnc": rng.choice(("260", "410", "012")),
        "route": rng.choice(("direct-us-1", "direct-us-2", "wholesale-3")),
        "campaign_id": "cmp-autumn",
    }


def sms_cdr(index: int, person: int, rng: random.Random) -> bytes:
    """The reference SMS CDR, about 580 bytes."""
    fields = _common(index, person, rng) | {
        "type": "cdr", "channel": "sms", "status": "delivered", "error_code": "0",
        "price": {"amount": rng.choice(("0.0075", "0.0079", "0.0125")), "currency": "USD"},
        "segments": 1, "encoding": "gsm7", "content": _TEXT,
    }  # fmt: skip
    return json.dumps(fields, separators=(",", ":")).encode()


def sms_request(index: int, person: int, rng: random.Random) -> bytes:
    fields = _common(index, person, rng) | {"type": "request", "channel": "sms", "segments": 1, "content": _TEXT}
    return json.dumps(fields, separators=(",", ":")).encode()


def voice_cdr(index: int, person: int, rng: random.Random) -> bytes:
    seconds = rng.randrange(1, 600)
    fields = _common(index, person, rng) | {
        "type": "cdr", "channel": "voice", "status": "answered", "hangup_cause": "16",
        "sender": f"+1628{person:07}", "duration_s": seconds + 4, "billable_s": seconds,
        "price": {"amount": f"{-(-seconds // 60) * 0.0135:.4f}", "currency": "USD"},
    }  # fmt: skip
    return json.dumps(fields, separators=(",", ":")).encode()


KINDS = {"sms cdr": sms_cdr, "sms request": sms_request, "voice cdr": voice_cdr}


def batch(kind: str, people: int, first: int = 0, size: int = BATCH, start: int = 0) -> list[bytes]:
    """Return records number `start` and on of one kind, about `people` different people numbered from `first`."""
    rng = random.Random(SEED + first + start)
    return [KINDS[kind](index, first + index % people, rng) for index in range(start, start + size)]


class Bench:
    """A pipeline under the default policy with throw-away keys."""

    def __init__(self) -> None:
        policy, _ = read_policy("default", Path())
        self.pipeline = Pipeline(Planner(policy), Tokens(1, os.urandom(32)))
        self.view = Suppressions()
        self.registries = Registries(Path("/nonexistent"))
        self.now_s = now_s()

    def prepare(self, values: list[bytes]):
        return self.pipeline.prepare(Inbox("traffic.cdr", 0, 0, values), self.view, self.registries, self.now_s)

    def ring(self, values: list[bytes]) -> KeyRing:
        return throwaway_ring(self.prepare(values).needs)


def best_us(run: Callable[[], object], records: int, *, seconds: float = 3.0, fresh: Callable[[], None] | None = None):
    """Return the best time of repeated runs in microseconds per record, and the median."""
    times = []
    gc.collect()
    end = time.perf_counter() + (0.05 if SMOKE else seconds)
    while not times or time.perf_counter() < end:
        if fresh is not None:
            fresh()
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) / records * 1e6)
    times.sort()
    return round(times[0], 2), round(times[len(times) // 2], 2)


def results() -> Path:
    """Return the folder of results, which git ignores; cases work below it, on the disk of the checkout."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine() -> dict[str, object]:
    """Return where and on what this ran."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("cryptography", "msgspec", "orjson", "pybase64")},
        "smoke, no measurement": SMOKE,
    }


def report(rows: list[dict[str, object]]) -> None:
    """Print the rows of a case as JSON lines."""
    for row in rows:
        print(json.dumps(row), flush=True)
