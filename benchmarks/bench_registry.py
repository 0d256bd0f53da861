"""A Do-Not-Call list of national size: load rate, size, memory of one and of two processes, look-ups, swap.

The list is the one of `benchmarks/lists.py`: 258.5 million numbers, a fiftieth with `--quick`. Each part is a process
of its own. Baselines: a Python set (of as many numbers as fit) and a sorted numpy array, in the same run.
"""

import json
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.common import SEED, SMOKE, report, results
from benchmarks.lists import US_NUMBERS, us_numbers, write_us
from streams.state.registries import SUFFIX, Registries, Terms, change, load

QUICK = "--quick" in sys.argv
COUNT = 20_000 if SMOKE else US_NUMBERS // 50 if QUICK else US_NUMBERS
SET_MOST = 10_000_000
LOOKUPS = 2_000 if SMOKE else 100_000
REPEATS = 3 if SMOKE else 15
TERMS = Terms(country="US", calling_code="1", now_s=1_790_000_500, as_of_s=1_790_000_000)


def pss_mib(only: str) -> tuple[float, float]:
    """Return proportional and resident MiB of this process that belong to mapped files of one name."""
    pss = rss = 0
    counted = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            counted = only in line
        elif counted and words[0] == "Pss:":
            pss += int(words[1])
        elif counted and words[0] == "Rss:":
            rss += int(words[1])
    return round(pss / 1024, 1), round(rss / 1024, 1)


def least_ns(run, count: int) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return round(min(times) / count * 1e9)


def asked(count: int, rng: random.Random, numbers: np.ndarray) -> list[str]:
    """Return half listed numbers, half others of the same exchanges."""
    chosen = numbers[rng.sample(range(len(numbers)), min(len(numbers), count // 2))]
    return [f"+{number}" for number in chosen.tolist()] + [f"+{number ^ 1}" for number in chosen.tolist()]


# --- parts, each in a process of its own ---------------------------------------------------------------------


def part_load(folder: Path) -> dict:
    """Load the text; peak memory is that of the loading process."""
    begin, cpu = time.perf_counter(), time.process_time()
    header = load(folder / "registries", "us-dnc", [folder / "list.txt"], TERMS)
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    size = (folder / "registries" / f"us-dnc{SUFFIX}").stat().st_size
    return {
        "numbers": header.count, "seconds": round(seconds, 1), "million_per_s": round(header.count / seconds / 1e6, 2),
        "million_per_cpu_s": round(header.count / cpu_s / 1e6, 2), "file_mb": round(size / 1e6, 1),
        "encoding": "pages" if header.pages else "buckets",
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }  # fmt: skip


def part_change(folder: Path) -> dict:
    """Apply a change list of a thousandth of the numbers."""
    some = np.concatenate([numbers[::1000] for numbers in us_numbers(COUNT, SEED)])
    lines = "".join(f"{str(number)[1:4]},{str(number)[4:]}\n" for number in some.tolist())
    (folder / "delete.txt").write_text(lines)
    begin = time.perf_counter()
    done = change(folder / "registries", "us-dnc", add=[], delete=[folder / "delete.txt"], terms=TERMS)
    return {"deleted": done.deleted, "seconds": round(time.perf_counter() - begin, 2)}


def part_hold(folder: Path) -> None:
    """Open the registry, say so, and measure memory when told to."""
    registries = Registries(folder / "registries")
    assert registries.get("us-dnc") is not None
    for _ in sys.stdin:
        pss, rss = pss_mib(SUFFIX)
        print(json.dumps({"pss_mib": pss, "rss_mib": rss}), flush=True)


def part_lookups(folder: Path) -> list[dict]:
    """Look-ups on warm memory, against a set and a sorted array; then with the file out of the page cache."""
    begin = time.perf_counter()
    registries = Registries(folder / "registries")
    open_s = time.perf_counter() - begin
    lists = registries.get("us-dnc").lists
    rng = random.Random(SEED)
    sample = np.concatenate([numbers[::50] for numbers in us_numbers(COUNT, SEED)])
    few, many = asked(500, rng, sample), asked(LOOKUPS, rng, sample)
    rows = [{"case": "open and verify", "seconds": round(open_s, 2)}]
    members = set(few)
    for name, numbers in (("few numbers, in the processor's caches", few), ("many numbers", many)):
        rows.append({
            "case": f"look-up, {name}", "ns": least_ns(lambda: [lists(number) for number in numbers], len(numbers)),
            "int_alone_ns": least_ns(lambda: [int(number) for number in numbers], len(numbers)),
            "set_ns": least_ns(lambda: [number in members for number in numbers], len(numbers)),
        })  # fmt: skip
    listed = np.concatenate(list(us_numbers(min(COUNT, SET_MOST), SEED)))
    big = {f"+{number}" for number in listed.tolist()}
    there = asked(LOOKUPS, rng, listed)
    rows.append({
        "case": f"baselines of {len(big):,} numbers", "set_ns": least_ns(lambda: [one in big for one in there], len(there)),
        "searchsorted_ns": least_ns(
            lambda: [listed[min(np.searchsorted(listed, int(one)), len(listed) - 1)] == int(one) for one in there[:2000]], 2000
        ),
        "set_bytes_a_number": round((sys.getsizeof(big) + 61 * len(big)) / len(big)),
    })  # fmt: skip
    file = folder / "registries" / f"us-dnc{SUFFIX}"
    del registries, lists
    big.clear()
    os.sync()
    descriptor = os.open(file, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    from processors.screen.registry import RegistryFile  # noqa: PLC0415

    view = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    lists = RegistryFile(view).lists
    view.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    cold = many[: len(many) // 10 : 7]
    times = []
    for number in cold:
        begin = time.perf_counter_ns()
        lists(number)
        times.append(time.perf_counter_ns() - begin)
    times.sort()
    rows.append({
        "case": "look-up, file not in memory", "median_us": times[len(times) // 2] / 1000,
        "p99_us": times[len(times) * 99 // 100] / 1000, "greatest_us": times[-1] / 1000,
    })  # fmt: skip
    return rows


def part_swap(folder: Path) -> dict:
    """Look numbers up without a break while another version is loaded by another process and swapped in."""
    registries = Registries(folder / "registries")
    number = f"+{next(us_numbers(COUNT, SEED))[1]}"
    (folder / "one.txt").write_text(f"{number[2:5]},{number[5:]}\n")
    before = registries.get("us-dnc")
    assert before.lists(number)
    worst = {"before": 0.0, "while": 0.0}
    swapped_s = written_s = None
    loader = threading.Thread(target=lambda: subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_registry", "part", "delete_one", str(folder), *sys.argv[4:]],
        check=True, stdout=subprocess.DEVNULL))  # fmt: skip
    phase, last, begin, checks = "before", time.perf_counter(), time.perf_counter(), 0
    file = folder / "registries" / f"us-dnc{SUFFIX}"
    inode = file.stat().st_ino
    while True:
        registries.refresh(time.monotonic())
        found = registries.get("us-dnc")
        for _ in range(1000):
            found.lists(number)
        now = time.perf_counter()
        worst[phase] = max(worst[phase], now - last)
        last, checks = now, checks + 1
        if phase == "before" and now - begin > (0.2 if SMOKE else 5):
            phase = "while"
            loader.start()
        if written_s is None and phase == "while" and file.stat().st_ino != inode:
            written_s = now
        assert found.lists(number) == (found is before)
        if found is not before and swapped_s is None:
            swapped_s = now
        if swapped_s is not None and now - swapped_s > (0.2 if SMOKE else 3):
            break
    loader.join()
    return {
        "case": "swap under look-ups", "written_to_serving_s": round(swapped_s - written_s, 2), "rounds": checks,
        "worst_1000_lookups_before_ms": round(worst["before"] * 1000, 2),
        "worst_1000_lookups_while_ms": round(worst["while"] * 1000, 2),
    }  # fmt: skip


def part_delete_one(folder: Path) -> dict:
    change(folder / "registries", "us-dnc", add=[], delete=[folder / "one.txt"], terms=TERMS)
    return {}


# --- the run -------------------------------------------------------------------------------------------------


def run(part: str, folder: Path):
    flags = [flag for flag in sys.argv[1:] if flag.startswith("--")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_registry", "part", part, str(folder), *flags],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def held(folder: Path, processes: int) -> dict:
    flags = [flag for flag in sys.argv[1:] if flag.startswith("--")]
    command = [sys.executable, "-m", "benchmarks.bench_registry", "part", "hold", str(folder), *flags]
    several = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for _ in range(2):  # the first time shows that all have opened it
        rows = []
        for one in several:
            one.stdin.write("\n")
            one.stdin.flush()
            rows.append(json.loads(one.stdout.readline()))
    for one in several:
        one.communicate()
    return {
        "case": f"memory of the list, processes: {processes}", "together_mib": round(sum(row["pss_mib"] for row in rows), 1),
        "each_resident_mib": rows[0]["rss_mib"],
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory(dir=results()) as name:
        folder = Path(name)
        begin = time.perf_counter()
        size = write_us(folder / "list.txt", COUNT, SEED)
        made = {
            "case": "made",
            "numbers": COUNT,
            "text_gb": round(size / 1e9, 2),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        report([made, {"case": "load", **run("load", folder)}])
        (folder / "list.txt").unlink()
        report([held(folder, 1), held(folder, 2)])
        report([{"case": "change list", **run("change", folder)}])
        report([{"case": "look-ups", **row} if "case" not in row else row for row in run("lookups", folder)])
        report([run("swap", folder)])


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] == "part":
        found = globals()[f"part_{sys.argv[2]}"](Path(sys.argv[3]))
        if found is not None:
            print(json.dumps(found))
    else:
        main()
