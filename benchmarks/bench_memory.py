"""Resident memory of a worker after two million records, against that after the first tenth.

The records go through the real key store and cache, a third of them about people never seen before; the log is left
out, for its pages are the kernel's to keep.
"""

import os
import random
import tempfile
from pathlib import Path

from benchmarks.common import BATCH, SMOKE, Bench, batch, report, results, rss_mib
from processors.seal import Entropy
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.kms_local import LocalKms
from streams.keys.sqlite import SqliteKeyStore

TOTAL = 10 * BATCH if SMOKE else 2_000_000


def main() -> None:
    bench = Bench()
    rng = random.Random(1)
    with tempfile.TemporaryDirectory(dir=results()) as folder:
        kms = Path(folder) / "kms"
        store = SqliteKeyStore.open(
            Path(folder) / "data" / "keys.db",
            lambda store_id, create: (LocalKms.create if create else LocalKms.open)(kms, store_id),
        )
        lease = KeyLease(store, "bench")
        lease.renew()
        cache = KeyCache(store, lease)
        at_tenth = 0.0
        for done in range(0, TOTAL, BATCH):
            first = done // 3 if done % (3 * BATCH) == 0 else rng.randrange(max(1, done // 3 + 1))
            prepared = bench.prepare(batch("sms cdr", BATCH, first))
            if lease.due(bench.now_s):
                lease.renew()
            ring = cache.fetch(prepared.needs, bench.now_s)
            bench.pipeline.complete(prepared, ring, Entropy(os.urandom(32)), 4)
            if done + BATCH == TOTAL // 10:
                at_tenth = rss_mib()
        cache.close()
        store.close()
    end = rss_mib()
    report([{
        "case": f"resident memory after {TOTAL:,} records", "mib": round(end, 1),
        "baseline": "after the first tenth", "baseline_mib": round(at_tenth, 1),
        "growth_percent": round((end / at_tenth - 1) * 100, 1),
    }])  # fmt: skip


if __name__ == "__main__":
    main()
