# ruff: noqa: T201 — this is a command
"""`make chaos`: all schedules of faults, one seed after the other, for as long as is asked; prints a table.

python -m tests.chaos --minutes 30 [--seed S] [--only SCHEDULE …]
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

from tests.chaos.schedules import SCHEDULES, Clusters, execute
from tests.support.checker import KINDS

COUNTS = ("published", "unknown", "committed", "outputs", "aborted")
ENDS = ("killed", "fenced", "stopped")


def main() -> int:
    """Run schedules until the time is over; the exit status says whether something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="of the first round")
    parser.add_argument("--only", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    args = parser.parse_args()
    until = time.monotonic() + args.minutes * 60
    totals: dict[str, Counter] = defaultdict(Counter)
    wrong = []
    seed = args.seed
    with tempfile.TemporaryDirectory(prefix="streamveil-chaos-") as name, Clusters(Path(name)) as clusters:
        while not totals or time.monotonic() < until:
            for schedule in args.only:
                if totals[schedule] and time.monotonic() > until:
                    break
                folder = Path(name) / f"{schedule}-{seed}"
                folder.mkdir()
                try:
                    result = execute(SCHEDULES[schedule], seed, clusters, folder)
                except Exception:
                    traceback.print_exc()
                    totals[schedule]["failed"] += 1
                    wrong.append((schedule, seed))
                    continue
                totals[schedule].update(runs=1, **result.verdict.counts, **result.verdict.wrong, **result.ends)
                print(f"{schedule}, seed {seed}, {result.seconds:.0f} s: {result.verdict}", flush=True)
                if result.verdict.wrong.total():
                    wrong.append((schedule, seed))
            seed += 1
    columns = ("runs", *COUNTS, *ENDS, *KINDS, "failed")
    print("\n| schedule | " + " | ".join(columns) + " |\n|---" + "|---:" * len(columns) + "|")
    for schedule, counts in totals.items():
        print(f"| {schedule} | " + " | ".join(f"{counts[column]:,}" for column in columns) + " |")
    print(f"\nseeds {args.seed} to {seed - 1}")
    for schedule, seed in wrong:
        print(f"again: python -m tests.chaos --minutes 0 --seed {seed} --only {schedule}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
