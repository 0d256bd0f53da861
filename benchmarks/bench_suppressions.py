"""Opt-outs of a country: size, look-ups, start and renewal of a snapshot of 50 million.

The snapshot comes from seeded random tokens through the writer that a merge uses; one entry a person, which is the worst
for buckets and filter. `--quick` takes 5 million.
"""

import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import SEED, SMOKE, report, results
from processors.screen.entries import BLOCKS, Meta, Snapshot, build
from processors.screen.suppression import Change, Rule, Suppressions, record_key
from schemas.catalog import partition_for
from schemas.outbound import Message, Output
from streams.log.sqlite import SqliteLog
from streams.state.entries import SUPPRESSIONS, EntryTail
from streams.state.gathering import gather
from streams.state.snapshots import Snapshots

QUICK = "--quick" in sys.argv
ROWS = 50_000 if SMOKE else 5_000_000 if QUICK else 50_000_000
CHANGED = 1_000 if SMOKE else 100_000
LOOKUPS = 2_000 if SMOKE else 200_000
STORE = "bench"
RULES = [
    Rule(scope, class_, channel, "person")
    for scope in ("platform", *(f"account:a{number}" for number in range(500)))
    for class_ in ("all", "marketing")
    for channel in ("sms", "voice")
]


def tokens_of(block: int) -> np.ndarray:
    """Return the tokens of a block, sorted; the same ones each time."""
    found = np.random.default_rng((SEED, block)).integers(0, 256, (ROWS // BLOCKS, 16), np.uint8)
    found[:, 0] = block
    return found[np.lexsort(found[:, ::-1].T)] if SMOKE else found[np.argsort(_high(found))]


def _high(tokens: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tokens[:, :8]).view(">u8").ravel().astype(np.uint64)


def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for block in range(BLOCKS):
        tokens = tokens_of(block)
        rng = np.random.default_rng((SEED, block, 1))
        at_s = rng.integers(1_600_000_000, 1_790_000_000, len(tokens)).astype(np.uint32)
        yield tokens, rng.integers(0, len(RULES), len(tokens)), at_s


def make(snapshots: Snapshots, log: SqliteLog) -> None:
    """Write the big snapshot, as one of an empty log."""
    snapshots.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    empty = (0,) * log.partitions
    meta = Meta(
        stream="suppressions", version=1, store=STORE, log=log.log_id, offsets=empty, witnesses=(None,) * len(empty)
    )
    snapshots.write("suppressions", 1, lambda write: build(blocks(), RULES, ROWS, meta, write))


def memory_mib(field: str) -> float:
    """Return a line of this process's memory: Pss is its share of what several have mapped."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return 0.0


# --- look-ups ---------------------------------------------------------------------------------------------------------


def per_lookup_us(get, tokens: list[bytes]) -> float:
    best = float("inf")
    for _ in range(1 if SMOKE else 3):
        begin = time.process_time()  # a machine that others use too takes nothing from it but its caches
        for token in tokens:
            get(token)
        best = min(best, (time.process_time() - begin) / len(tokens) * 1e6)
    return best


def lookups(snapshot: Snapshot) -> list[dict[str, object]]:
    """Return what a look-up costs, through the view that the workers use, against a dict and a binary search."""
    rng = random.Random(SEED)
    sampled = [tokens_of(block) for block in rng.sample(range(BLOCKS), 8)]
    people = [rng.choice(some).tobytes() for some in sampled for _ in range(LOOKUPS // 8)]
    rng.shuffle(people)
    strangers = [rng.randbytes(16) for _ in range(LOOKUPS)]
    empty, view = Suppressions(), Suppressions()
    view.adopt(snapshot)
    assert all(view.get(one) for one in people)
    assert sum(view.get(one) is not None for one in strangers) == 0
    passed = sum(
        snapshot.bits[(place := int.from_bytes(one[:4]) >> snapshot.shift) >> 3] >> (place & 7) & 1 for one in strangers
    )
    few = {one: {RULES[0]: None} for one in people[: LOOKUPS // 2]}
    column = np.sort(np.concatenate([_high(some) for some in sampled]))

    def searched(token: bytes) -> bool:
        high = np.uint64(int.from_bytes(token[:8]))
        at = int(np.searchsorted(column, high))
        return at < len(column) and bool(column[at] == high)

    nothing = per_lookup_us(empty.get, strangers)
    return [
        {"case": f"look-up among {ROWS:,}: nobody", "us": round(per_lookup_us(view.get, strangers), 3),
         "ended_at_the_filter_percent": round(100 - passed / len(strangers) * 100, 1),
         "without_a_snapshot_us": round(nothing, 3)},
        {"case": "the same without the filter", "us": round(per_lookup_us(snapshot.find, strangers), 3)},
        {"case": f"look-up among {ROWS:,}: a person with an entry", "us": round(per_lookup_us(view.get, people), 3)},
        {"case": f"look-up in a dict of {len(few):,} (the fastest there is, 300 bytes a person)",
         "nobody_us": round(per_lookup_us(few.get, strangers), 3), "us": round(per_lookup_us(few.get, people), 3)},
        {"case": f"numpy searchsorted among {len(column):,}",
         "nobody_us": round(per_lookup_us(searched, strangers), 3), "us": round(per_lookup_us(searched, people), 3)},
    ]  # fmt: skip


def dropped(path: Path) -> None:
    """Have the kernel forget a file."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


# --- a worker's side ----------------------------------------------------------------------------------------------------


def _child(*words: object) -> subprocess.Popen:
    flags = [flag for flag in ("--smoke", "--quick") if flag in sys.argv]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench_suppressions", *flags, *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ready(folder: Path) -> None:
    """As a worker does at its start: open the tail, catch up; then look people up, and say how much memory that takes."""
    before = memory_mib("Pss")
    log = SqliteLog.open(folder / "log.db")
    begin = time.perf_counter()
    tail = EntryTail(log, SUPPRESSIONS, 1, Snapshots(folder / "entries", STORE), told=lambda _: None)
    asyncio.run(tail.catch_up())
    ready_s = time.perf_counter() - begin
    rng = random.Random(os.getpid())
    for _ in range(LOOKUPS):
        tail.view.get(rng.randbytes(16))
    print(json.dumps({"ready_s": ready_s, "before": before}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"pss": memory_mib("Pss"), "rss": memory_mib("Rss")}), flush=True)


def renew(folder: Path) -> None:
    """As the child of a worker does: merge what came into the snapshot."""
    log = SqliteLog.open(folder / "log.db")
    begin = time.perf_counter()
    asyncio.run(gather(log, Snapshots(folder / "entries", STORE), SUPPRESSIONS, 1))
    took_s = time.perf_counter() - begin
    anonymous = memory_mib("Anonymous")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"took_s": took_s, "cpu_s": time.process_time(), "peak_rss": peak, "own": anonymous}), flush=True)


def memory(folder: Path, path: Path) -> list[dict[str, object]]:
    """Return how soon a worker is ready, cold and warm, and what one and two of them hold."""
    dropped(path)
    children = [_child("--worker", folder)]
    cold = json.loads(children[0].stdout.readline())
    children.append(_child("--worker", folder))
    warm = json.loads(children[1].stdout.readline())
    told = []
    for count in (2, 1):
        some = []
        for child in children[:count]:
            child.stdin.write("\n")
            child.stdin.flush()
            some.append(json.loads(child.stdout.readline()))
        told.append(some)
        gone = children.pop()
        gone.communicate()
    both, alone = told
    return [
        {"case": f"a worker is ready, {ROWS:,} entries, verified", "cold_s": round(cold["ready_s"], 2),
         "warm_s": round(warm["ready_s"], 2)},
        {"case": "memory of one worker and of two (PSS)", "one_mib": round(alone[0]["pss"]),
         "two_mib": round(sum(one["pss"] for one in both)), "process_alone_mib": round(cold["before"]),
         "file_bytes": path.stat().st_size, "bytes_an_entry": round(path.stat().st_size / ROWS, 2)},
    ]  # fmt: skip


async def changes(log: SqliteLog, count: int, first: int) -> None:
    """Append opt-outs of other people, and some of known ones, without their sealed part."""
    rng = random.Random(SEED + first)
    known = tokens_of(7)
    outputs: dict[int, list[Message]] = {}
    for number in range(count):
        token = rng.choice(known).tobytes() if number % 10 == 0 else rng.randbytes(16)
        change = Change(token, rng.choice(RULES), number % 20 > 0, 0, "", None)
        value = b'{"event_at":"2026-11-%02dT10:00:00Z","sealed":[]}' % (1 + number % 28)
        outputs.setdefault(partition_for(token, log.partitions), []).append(
            Message(0, record_key(1, change), (), value)
        )
    await log.append([Output("suppressions", *one) for one in outputs.items()])


def renewal(folder: Path, log: SqliteLog) -> list[dict[str, object]]:
    asyncio.run(changes(log, CHANGED, 0))
    tail = EntryTail(log, SUPPRESSIONS, 1, Snapshots(folder / "entries", STORE), told=lambda _: None)
    begin = time.perf_counter()
    asyncio.run(tail.catch_up())
    read_s = time.perf_counter() - begin
    child = _child("--renew", folder)
    told = json.loads(child.communicate()[0])
    path = folder / "entries" / "suppressions-1.entries"
    longest, began = 0.0, time.perf_counter()
    before = tail.view.snapshot
    while tail.view.snapshot is before and time.perf_counter() - began < 60:
        begin = time.perf_counter()
        asyncio.run(tail.catch_up())
        longest = max(longest, time.perf_counter() - begin)
        time.sleep(0.01)
    return [
        {"case": f"{CHANGED:,} changes over {ROWS:,}", "read_with_snapshot_s": round(read_s, 2),
         "merged_s": round(told["took_s"], 1), "merged_cpu_s": round(told["cpu_s"], 1), "peak_rss_mib": round(told["peak_rss"]),
         "of_that_not_the_files_mib": round(told["own"]), "longest_pause_of_a_worker_at_the_swap_ms": round(longest * 1e3),
         "file_bytes": path.stat().st_size, "left_in_the_tail": len(tail.view)},
    ]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory(dir=results()) as name:
        folder = Path(name)
        log = SqliteLog.open(folder / "log.db")
        snapshots = Snapshots(folder / "entries", STORE)
        begin = time.perf_counter()
        make(snapshots, log)
        path = snapshots.path("suppressions", 1)
        report([{"case": f"built {ROWS:,} entries (seeded)", "seconds": round(time.perf_counter() - begin, 1)}])
        snapshot = snapshots.open("suppressions", 1)
        report(lookups(snapshot))
        del snapshot
        report(memory(folder, path))
        report(renewal(folder, log))
        asyncio.run(log.close())
        path.unlink()


if __name__ == "__main__":
    for flag, work in (("--worker", ready), ("--renew", renew)):
        if flag in sys.argv:
            work(*map(Path, sys.argv[sys.argv.index(flag) + 1 :]))
            sys.exit(0)
    main()
