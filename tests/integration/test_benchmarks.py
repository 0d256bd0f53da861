"""The benchmarks run; what they measure is never asserted."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


CASES = (
    "stages",
    "pipeline",
    "log",
    "reveal",
    "memory",
    "registry",
    "campaign",
    "screening",
    "suppressions",
    "propagation",
    "officer",
    "kafka",
)


def test_every_benchmark_runs_and_a_smoke_run_says_that_it_measured_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke", *CASES],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case in CASES:
        assert f"bench={case} " in done.stdout
    assert "no measurement" in done.stdout.splitlines()[-1]
