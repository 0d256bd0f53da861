"""`python -m benchmarks [--smoke] [--quick] [CASE…]`: runs the cases one after the other and writes results/NAME.json."""

import json
import subprocess
import sys
import time

from benchmarks.common import SMOKE, machine, results

CASES = ("stages", "pipeline", "keys", "log", "reveal", "memory", "campaign")
"""Without names these run; `kafka` is a matter of half an hour, `officer`, `screening` and `registry` of some minutes
and 4 to 12 GB of disk."""
ALL = (*CASES, "screening", "registry", "suppressions", "propagation", "officer", "kafka")


def main() -> int:
    flags = [name for name in sys.argv[1:] if name.startswith("-")]
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(CASES)
    unknown = sorted(set(chosen) - set(ALL))
    if unknown:
        print(f"no such case; cases are {', '.join(ALL)}", file=sys.stderr)
        return 2
    where = machine()
    print(json.dumps(where))
    rows = []
    for name in chosen:
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as case:
            for line in case.stdout or ():
                row = {"bench": name, **json.loads(line)}
                rows.append(row)
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        if case.returncode:
            return 1
    if SMOKE:
        print("smoke run: these figures are no measurement")
        return 0
    path = results() / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": where, "results": rows}, indent=1) + "\n")
    print(f"written: {path}")
    return 0


sys.exit(main())
