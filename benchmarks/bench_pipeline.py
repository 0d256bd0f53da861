"""prepare + complete as a whole, secrets already fetched: people known (warm) and every person new."""

import os

import orjson

from benchmarks.common import BATCH, KINDS, Bench, batch, best_us, report
from processors.seal import Entropy


def main() -> None:
    rows = []
    for kind in KINDS:
        for people in ("warm", "all new"):
            bench = Bench()
            values = batch(kind, 1000 if people == "warm" else BATCH)
            ring = bench.ring(values)

            def fresh(ring=ring, bench=bench, people=people) -> None:
                if people == "all new":  # as after a fetch: secrets are there, nothing was derived from them yet
                    ring.ciphers.clear()
                    for circle in bench.pipeline.planner._circles.values():
                        circle.met.clear()

            def whole(bench=bench, values=values, ring=ring) -> None:
                bench.pipeline.complete(bench.prepare(values), ring, Entropy(os.urandom(32)), 4)

            whole()
            prepared = bench.prepare(values)
            us, median = best_us(whole, BATCH, seconds=6.0, fresh=fresh)
            rows.append({
                "case": f"{kind}, {people}",
                "us": us,
                "median_us": median,
                "records_per_s": round(1e6 / us),
                "prepare_us": best_us(lambda b=bench, v=values: b.prepare(v), BATCH)[0],
                "complete_us": best_us(
                    lambda b=bench, p=prepared, r=ring: b.pipeline.complete(p, r, Entropy(os.urandom(32)), 4),
                    BATCH, fresh=fresh,
                )[0],
                "baseline": "orjson loads and dumps",
                "baseline_us": best_us(lambda v=values: [orjson.dumps(orjson.loads(x)) for x in v], BATCH)[0],
                "bytes": sum(map(len, values)) // BATCH,
            })  # fmt: skip
    report(rows)


if __name__ == "__main__":
    main()
