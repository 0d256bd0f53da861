"""`open_batch`, the egress gateway's call, 1,000 requests a call, on the SQLite log and key store."""

import asyncio
import tempfile
import time

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.bench_log import config_in
from benchmarks.common import SMOKE, best_us, report, results
from benchmarks.flow import publish
from streams.deployment import Deployment
from streams.keys.reveal import State
from streams.worker.supervisor import run_one


async def opened(config) -> dict[str, object]:
    async with Deployment.open(config) as deployment:
        revealer = deployment.revealer()
        best, total, wall = 1e9, 0, 0.0
        for partition in range(deployment.log.partitions):
            at = 0
            while page := await deployment.log.read("cleared", partition, at, 1000):  # one page at a time, as a gateway
                at = page[-1].offset + 1
                start = time.perf_counter()
                results = await revealer.open_batch(page)
                took = time.perf_counter() - start
                if any(result.state is not State.REVEALED for result in results):
                    raise SystemExit("not every request opened")
                best = min(best, took / len(page))
                total += len(page)
                wall += took
    cipher, nonce = AESGCM(bytes(32)), bytes(12)
    sealed = cipher.encrypt(nonce, bytes(430), None)
    base, _ = best_us(lambda: [cipher.decrypt(nonce, sealed, None) for _ in range(1000)], 1000, seconds=1)
    return {
        "case": "open_batch", "records": total, "records_per_s": round(total / wall), "us": round(wall / total * 1e6, 2),
        "best_us": round(best * 1e6, 2), "baseline": "AES-256-GCM decrypt alone", "baseline_us": base,
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory(dir=results()) as folder:
        config = config_in(folder, "reveal")
        asyncio.run(publish(config, "sms request", 5_000, 4000 if SMOKE else 40_000))
        asyncio.run(run_one(config, until_idle=True))
        report([asyncio.run(opened(config))])


if __name__ == "__main__":
    main()
