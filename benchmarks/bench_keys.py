"""The key store: SQLite, PostgreSQL on loopback with TLS, and none (keys made in memory); and what a lease costs.

`cpu_us` is the processor time of this process and of the server's together: on a machine where other work runs it is
what counts. One process asks at a time, so on two idle cores wall and processor time are nearly the same.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.common import BATCH, SEED, SMOKE, Bench, batch, report, results
from processors.keyring import KeyRing, Needs, PersonRef
from processors.seal import Entropy
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.postgres import PostgresKeyStore
from streams.keys.sqlite import SqliteKeyStore
from streams.keys.store import KeyStore
from streams.worker.selftest import throwaway_ring
from tests.support.keys import local_kms
from tests.support.postgres import Server, new_server

PEOPLE = 4_000 if SMOKE else 100_000
SIZES = (2_000,) if SMOKE else (2_000, 5_000, 10_000)
BATCHES = 2 if SMOKE else 50
RENEWALS = 10 if SMOKE else 1_000
ROUNDS = 1 if SMOKE else 3
DAY = 86_400


class Clock:
    """Wall and processor time since it was made, a server's processes included."""

    def __init__(self, server: Server | None) -> None:
        self._server = server
        self._wall_s, self._cpu_s = time.perf_counter(), self._cpu()

    def _cpu(self) -> float:
        ticks = 0
        for pid in self._server.pids() if self._server else ():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                ticks += int(fields[11]) + int(fields[12])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")

    def us(self, count: int) -> tuple[float, float]:
        """Return wall and processor time in microseconds each."""
        return (time.perf_counter() - self._wall_s) / count * 1e6, (self._cpu() - self._cpu_s) / count * 1e6


@contextlib.contextmanager
def stores() -> Iterator[dict[str, tuple[KeyStore | None, Server | None]]]:
    """Make the three of them, each empty."""
    with tempfile.TemporaryDirectory(dir=results()) as name, new_server(shared_buffers="256MB") as server:
        folder = Path(name)
        sqlite = SqliteKeyStore.open(folder / "data" / "keys.db", local_kms(folder / "kms"))
        postgres = PostgresKeyStore.open(server.new_database(folder), local_kms(folder / "kms"))
        try:
            yield {"none": (None, None), "sqlite": (sqlite, None), "postgres": (postgres, server)}
        finally:
            sqlite.close()
            postgres.close()


def row(case: str, store: str, took: list[tuple[float, float]], **more: object) -> dict[str, object]:
    wall_us, cpu_us = min(took, key=lambda one: one[0])[0], min(took, key=lambda one: one[1])[1]
    return {
        "case": case, "store": store, **more, "us": round(wall_us, 2), "cpu_us": round(cpu_us, 2),
        "per_s": round(1e6 / wall_us), "per_cpu_s": round(1e6 / max(cpu_us, 1e-9)), "load": os.getloadavg()[0],
    }  # fmt: skip


def people(store: KeyStore, server: Server | None, name: str) -> Iterator[dict[str, object]]:
    """Measure `fetch` of people who are all new, and of the same when they are known."""
    now_s = int(time.time())
    month = time.strftime("%Y-%m", time.gmtime(now_s))
    for size in SIZES:
        made, known = [], []
        for _ in range(ROUNDS):
            needs = [
                Needs({}, {PersonRef("platform", os.urandom(16), month): now_s + 300 * DAY for _ in range(size)})
                for _ in range(PEOPLE // size)
            ]
            for took in (made, known):
                clock = Clock(server)
                for need in needs:
                    store.fetch(need, now_s)
                took.append(clock.us(PEOPLE))
        yield row("fetch, all new", name, made, batch=size)
        yield row("fetch, all known", name, known, batch=size)


def sealing(store: KeyStore | None, server: Server | None, name: str) -> Iterator[dict[str, object]]:
    """Measure prepare, fetch and complete of SMS CDRs, of people all new or the same 5,000 again and again."""
    first = SEED % 1000
    for case, persons in (("seal, all new", BATCH * BATCHES), ("seal, 5,000 people", min(5_000, BATCH * BATCHES))):
        took = []
        for _ in range(ROUNDS):
            first += BATCH * BATCHES  # nobody is met twice
            bench = Bench()
            batches = [batch("sms cdr", persons, first, BATCH, number * BATCH) for number in range(BATCHES)]
            fetch = _fetch(store, bench)
            clock = Clock(server)
            for values in batches:
                prepared = bench.prepare(values)
                bench.pipeline.complete(prepared, fetch(prepared.needs), Entropy(os.urandom(32)), 4)
            took.append(clock.us(BATCH * BATCHES))
        yield row(case, name, took, batch=BATCH)


def _fetch(store: KeyStore | None, bench: Bench) -> Callable[[Needs], KeyRing]:
    if store is None:
        ring = KeyRing()

        def fetch(needs: Needs) -> KeyRing:
            lacking = Needs(
                {ref: need for ref, need in needs.epochs.items() if ref not in ring.epochs},
                {ref: need for ref, need in needs.persons.items() if ref not in ring.persons},
            )
            fresh = throwaway_ring(lacking)
            ring.epochs.update(fresh.epochs)
            ring.persons.update(fresh.persons)
            return ring

        return fetch
    lease = KeyLease(store, "bench")
    lease.renew()
    cache = KeyCache(store, lease)
    return lambda needs: cache.fetch(needs, bench.now_s)


def lease(store: KeyStore, server: Server | None, name: str) -> Iterator[dict[str, object]]:
    """Measure a renewal, which is once a second, and the guard, which is once a commit."""
    held = KeyLease(store, "bench")
    held.renew()
    clock = Clock(server)
    for _ in range(RENEWALS):
        held.renew()
    yield row("lease, renewal", name, [clock.us(RENEWALS)])
    check = KeyCache(store, held).guard()
    clock = Clock(server)
    for _ in range(RENEWALS * 100):
        check()
    yield row("lease, guard", name, [clock.us(RENEWALS * 100)])


def main() -> None:
    with stores() as opened:
        for name, (store, server) in opened.items():
            report(list(sealing(store, server, name)))
            if store is not None:
                report([*people(store, server, name), *lease(store, server, name)])


if __name__ == "__main__":
    main()
