"""`python -m benchmarks [--smoke] [CASE…]`: runs the cases one after the other and writes results/NAME.json."""

import json
import subprocess
import sys
import time

from benchmarks.common import SMOKE, machine, results

CASES = ("stages", "pipeline", "log", "reveal", "memory")


def main() -> int:
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(CASES)
    unknown = sorted(set(chosen) - set(CASES))
    if unknown:
        print(f"no such case; cases are {', '.join(CASES)}", file=sys.stderr)
        return 2
    where = machine()
    print(json.dumps(where))
    rows = []
    for name in chosen:
        command = [sys.executable, "-m", f"benchmarks.bench_{name}"] + (["--smoke"] if SMOKE else [])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        for line in done.stdout.splitlines():
            row = {"bench": name, **json.loads(line)}
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if SMOKE:
        print("smoke run: these figures are no measurement")
        return 0
    path = results() / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": where, "results": rows}, indent=1) + "\n")
    print(f"written: {path}")
    return 0


sys.exit(main())
