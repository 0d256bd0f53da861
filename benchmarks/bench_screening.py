"""Screening at national scale: the whole pipeline with no lists, small lists, and those of a country, in one run.

A process for each, and one more without lists (what differs between two equal ones is noise). They take turns, each
through the same batches: marketing SMS requests to people in the United States who are on no list, so that every
request is cleared and sealed in all of them and only looking up differs. A figure is the least time that a batch took
in any turn, averaged over the batches, in microseconds of processor time a record; what lists add is the difference to
the mean of the two processes without.
Then: memory of one and of two processes that hold everything, and a registry swapped under this traffic.
"""

import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import IO

import numpy as np

from benchmarks.common import ACCOUNTS, BATCH, SEED, SMOKE, report, results, sms_request
from benchmarks.lists import us_numbers
from processors.pipeline import End, Inbox, Pipeline
from processors.plan import Planner
from processors.screen.destination import place_of_number
from processors.screen.entries import BLOCKS, TOKEN_BYTES, Meta, Snapshot, build
from processors.screen.keywords import Keywords
from processors.screen.registry_build import RegistryBuilder
from processors.screen.suppression import Rule, Suppressions, Tokens
from processors.seal import Entropy
from schemas.languages import languages
from streams.config import read_policy
from streams.state.registries import SUFFIX, Registries
from streams.worker.selftest import throwaway_ring

QUICK = "--quick" in sys.argv
SHARE = 10_000 if SMOKE else 50 if QUICK else 1
NUMBERS, ENTRIES, SMALL = 258_500_000 // SHARE, 50_000_000 // SHARE, 1000
TURNS = 1 if SMOKE else 25
KNOWN = 200 if SMOKE else 5000
NEW = 200 if SMOKE else 20 * BATCH
PHASE_S = 0.2 if SMOKE else 10.0
"""How long traffic runs before a swap, and goes on after it."""
CASES = ("none", "small", "full", "none again")
TOKENS = Tokens(1, bytes(range(32)))
LISTED, FREED = "+14155550101", "+14155550102"
"""On the list before the swap only, and after it only; both have a request in every batch of that traffic."""
OPTED_OUT = "+14155550103"


# --- lists --------------------------------------------------------------------------------------------------


def us_list(count: int) -> tuple[RegistryBuilder, list[int]]:
    """Collect a list of so many numbers, LISTED and not FREED among them; return also some exchanges that are in it."""
    builder, exchanges, left = RegistryBuilder(), [int(LISTED) // 10_000], count - 1
    for numbers in us_numbers(count + 2):
        wanted = numbers[(numbers != int(LISTED)) & (numbers != int(FREED))][:left]
        if len(wanted):
            builder.add(wanted)
            exchanges += np.unique(wanted // 10_000)[::5].tolist()
            left -= len(wanted)
    builder.add(np.array([int(LISTED)], np.int64))
    return builder, exchanges


def write_registry(folder: Path, builder: RegistryBuilder, as_of_s: int) -> tuple[int, int]:
    """Write a registry file, and return how many numbers and bytes it has."""
    folder.mkdir(parents=True, exist_ok=True)
    built = builder.finish(name="us-dnc", country="US", as_of_s=as_of_s, loaded_at_s=as_of_s)
    path = folder / f"us-dnc{SUFFIX}"
    with path.open("wb") as out:
        out.writelines(built.chunks())
    path.chmod(0o600)
    return built.header.count, path.stat().st_size


def write_entries(path: Path, count: int, rng: np.random.Generator) -> int:
    """Write a snapshot of so many people's opt-outs, one each, OPTED_OUT's among them; return its bytes."""
    table = [Rule("account:acme-retail", "all", "sms", "person")]
    table += [
        Rule(f"account:account-{one}", "all", channel, "person") for one in range(2000) for channel in ("sms", "voice")
    ]
    known = TOKENS.of(OPTED_OUT)

    def blocks():
        for block in range(BLOCKS):
            size = count // BLOCKS + (block < count % BLOCKS) - (block == known[0])
            tokens = rng.integers(0, 256, (size, TOKEN_BYTES), np.uint8)
            tokens[:, 0] = block
            numbers = rng.integers(1, len(table), size)
            if block == known[0]:
                tokens = np.vstack((tokens, np.frombuffer(known, np.uint8)))
                numbers = np.append(numbers, 0)
            order = np.argsort(np.ascontiguousarray(tokens).view(f"S{TOKEN_BYTES}").ravel(), kind="stable")
            yield (
                tokens[order],
                numbers[order],
                rng.integers(1_700_000_000, 1_760_000_000, len(tokens)).astype(np.uint32),
            )

    meta = Meta(stream="suppressions", version=1, store="bench", log="", offsets=(0,), witnesses=(None,))
    with path.open("wb") as out:
        out.seek(4096)
        head, _ = build(blocks(), table, count, meta, out.write)
        out.seek(0)
        out.write(head)
    path.chmod(0o600)
    return path.stat().st_size


def clean_people(folder: Path, exchanges: list[int], count: int) -> list[str]:
    """Return numbers of the United States, listed in neither registry, in exchanges that are in the full one."""
    lists = [
        found.lists for case in ("small", "full") if (found := Registries(folder / case).get("us-dnc")) is not None
    ]
    ours = [one for one in exchanges if place_of_number(f"+{one}0123") == (False, frozenset({"US"}))]
    rng, found = random.Random(SEED), {}
    while len(found) < count:
        number = f"+{rng.choice(ours)}{rng.randrange(10_000):04}"
        if not any(one(number) for one in lists):
            found[number] = None
    return list(found)


# --- one process that holds lists ---------------------------------------------------------------------------


class Holder:
    """A pipeline with its lists, told by lines of JSON what to do."""

    def __init__(self, folder: Path, case: str) -> None:
        policy, _ = read_policy("default", Path())
        self.planners = {"known": Planner(policy), "new": Planner(policy)}
        self.pipelines = {kind: Pipeline(planner, TOKENS) for kind, planner in self.planners.items()}
        self.registries = Registries(folder / case)
        self.view = Suppressions()
        entries = folder / case / "entries"
        if entries.exists():
            with entries.open("rb") as file:
                self.map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            snapshot = Snapshot(self.map)
            snapshot.check()
            self.view.adopt(snapshot)
        told = json.loads((folder / "people.json").read_text())
        self.now_s = told["now_s"]
        known, new = told["people"][:KNOWN], told["people"][KNOWN : KNOWN + NEW]
        self.batches = {"known": batches(known, 2 * KNOWN), "new": batches(new, NEW)}
        self.rings = {
            kind: [throwaway_ring(self.prepare(kind, batch).needs) for batch in found]
            for kind, found in self.batches.items()
        }
        self.extra = [request(0, number) for number in (LISTED, FREED, OPTED_OUT)]

    def prepare(self, kind: str, batch: list[bytes]):
        return self.pipelines[kind].prepare(Inbox("traffic", 0, 0, batch), self.view, self.registries, self.now_s)

    def turn(self) -> dict[str, list[float]]:
        """Go through every batch once; return the processor time of each, in µs a record."""
        taken: dict[str, list[float]] = {}
        for kind, found in self.batches.items():
            for batch, ring in zip(found, self.rings[kind], strict=True):
                if kind == "new":  # as after a fetch: secrets are there, nothing else is known of anybody
                    ring.ciphers.clear()
                    for circle in self.planners[kind]._circles.values():
                        circle.met.clear()
                begin = time.process_time()
                prepared = self.prepare(kind, batch)
                self.pipelines[kind].complete(prepared, ring, Entropy(os.urandom(32)), 4)
                taken.setdefault(kind, []).append((time.process_time() - begin) / len(batch) * 1e6)
                if any(outcome.end is not End.EMIT for outcome in prepared.outcomes):
                    raise SystemExit("a request was not cleared: the cases would not do the same work")
        return taken

    def reasons(self) -> list[str | None]:
        """Return what becomes of LISTED, FREED and OPTED_OUT."""
        return [outcome.reason for outcome in self.prepare("known", self.extra).outcomes]

    def traffic(self) -> dict[str, object]:
        """Work as a worker does while a registry is swapped, until PHASE_S after the new one answers."""
        batch = self.batches["known"][0] + self.extra
        inbox, nothing = Inbox("traffic", 0, 0, batch), Registries(Path("/nonexistent"))
        ring = throwaway_ring(self.pipelines["known"].prepare(inbox, Suppressions(), nothing, self.now_s).needs)
        before, after = ["on_registry", None], [None, "on_registry"]
        taken: list[tuple[float, bool]] = []
        wrong, swapped_s, begun_s = 0, 0.0, time.monotonic()
        while time.monotonic() < (swapped_s or begun_s + 600) + PHASE_S:
            begin = time.perf_counter()
            self.registries.refresh(time.monotonic())
            prepared = self.prepare("known", batch)
            self.pipelines["known"].complete(prepared, ring, Entropy(os.urandom(32)), 4)
            taken.append(((time.perf_counter() - begin) * 1000, bool(swapped_s)))
            said = [outcome.reason for outcome in prepared.outcomes[-3:-1]]
            wrong += said != before if not swapped_s and said != after else said != after
            if said == after and not swapped_s:
                swapped_s = time.monotonic()
                say({"swapped_at": time.time()})
            if len(taken) == 1:
                say("running")
        return {
            "batches": len(taken), "wrong": wrong,
            "median_ms": round(median(ms for ms, _ in taken), 2),
            "longest_until_in_force_ms": round(max(ms for ms, late in taken if not late), 2),
            "longest_afterwards_ms": round(max(ms for ms, late in taken if late), 2),
        }  # fmt: skip


def request(index: int, number: str) -> bytes:
    """Return a marketing SMS request; the same for the same arguments, but for its instant."""
    made = json.loads(sms_request(0, 0, random.Random(SEED + index)))
    made |= {"recipient": number, "purpose": "marketing", "account_id": ACCOUNTS[0]}
    return json.dumps(made, separators=(",", ":")).encode()


def batches(people: list[str], count: int) -> list[list[bytes]]:
    return [
        [request(index, people[index % len(people)]) for index in range(first, min(first + BATCH, count))]
        for first in range(0, count, BATCH)
    ]


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def hold(folder: Path, case: str) -> None:
    holder = Holder(folder, case)
    say("ready")
    for line in sys.stdin:
        say(getattr(holder, line.strip())())


# --- the run ------------------------------------------------------------------------------------------------


class Child:
    """A process that holds lists."""

    def __init__(self, folder: Path, case: str) -> None:
        flags = [flag for flag in sys.argv[1:] if flag.startswith("--")]
        command = [sys.executable, "-m", "benchmarks.bench_screening", *flags, "--hold", str(folder), case]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hear()

    def hear(self):
        out: IO[str] | None = self.process.stdout
        line = out.readline() if out else ""
        if not line:
            raise SystemExit("a process of the benchmark ended; its error is above")
        return json.loads(line)

    def tell(self, what: str) -> None:
        if self.process.stdin:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()

    def ask(self, what: str):
        self.tell(what)
        return self.hear()

    def pss_mib(self) -> dict[str, float]:
        """Return the proportional set size: own memory, and the share of mapped files."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss")}
        return {"own": sizes["Pss_Anon"], "files": sizes["Pss_File"] + sizes.get("Pss_Shmem", 0.0)}

    def end(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def make_lists(folder: Path, now_s: int) -> list[dict[str, object]]:
    """Write the lists of every case and the people; and a later version of the full registry in `later`."""
    rng, rows = np.random.default_rng(SEED), []
    for case, numbers, entries in (("small", SMALL, SMALL), ("full", NUMBERS, ENTRIES)):
        begin = time.perf_counter()
        builder, exchanges = us_list(numbers)
        count, size = write_registry(folder / case, builder, now_s - 86_400)
        rows.append({"case": f"made: {case} registry", "numbers": count, "mib": round(size / 2**20, 1),
                     "seconds": round(time.perf_counter() - begin, 1)})  # fmt: skip
        if case == "full":
            builder.remove(np.array([int(LISTED)], np.int64))
            builder.add(np.array([int(FREED)], np.int64))
            write_registry(folder / "later", builder, now_s - 3600)
        del builder
        begin = time.perf_counter()
        size = write_entries(folder / case / "entries", entries, rng)
        rows.append({"case": f"made: {case} suppressions", "entries": entries, "mib": round(size / 2**20, 1),
                     "seconds": round(time.perf_counter() - begin, 1)})  # fmt: skip
    for case in ("none", "none again"):
        (folder / case).mkdir()
    people = clean_people(folder, exchanges, KNOWN + NEW)
    (folder / "people.json").write_text(json.dumps({"now_s": now_s, "people": people}))
    return rows


def costs(children: dict[str, Child]) -> list[dict[str, object]]:
    """Let the cases take turns, and return what a record costs in each, and what lists add."""
    turns: dict[str, list[dict[str, list[float]]]] = {case: [] for case in children}
    order = list(children)
    for _ in range(TURNS):
        for case in order:
            turns[case].append(children[case].ask("turn"))
        order.append(order.pop(0))
    rows = []
    for kind, people in (("known", f"{KNOWN:,} known people"), ("new", "all new people")):
        least = {
            case: [min(each) for each in zip(*(turn[kind] for turn in found), strict=True)]
            for case, found in turns.items()
        }
        base = [mean(pair) for pair in zip(least["none"], least["none again"], strict=True)]
        for case, found in least.items():
            every = [us for turn in turns[case] for us in turn[kind]]
            added = mean(us - none for us, none in zip(found, base, strict=True))
            rows.append({"case": f"{people}, lists: {case}", "us": round(mean(found), 2),
                         "median_us": round(median(every), 2), "records_per_s": round(1e6 / mean(found)),
                         "added_us": round(added, 2)})  # fmt: skip
    return rows


def memory(children: dict[str, Child], folder: Path) -> list[dict[str, object]]:
    """Return the resident memory of one process that holds everything, and of two: mapped files, and what each has."""
    plain = children["none"].pss_mib()
    rows = []
    alone = children["full"].pss_mib()
    second = Child(folder, "full")
    second.ask("turn")
    both = [children["full"].pss_mib(), second.pss_mib()]
    second.end()
    for name, found in (("one process", [alone]), ("two processes", both)):
        rows.append({
            "case": f"memory of lists, {name}",
            "mapped_mib": round(sum(one["files"] for one in found), 1),
            "own_mib": [round(one["own"], 1) for one in found],
            "baseline": "a process without lists",
            "baseline_mapped_mib": round(plain["files"], 1),
            "baseline_own_mib": round(plain["own"], 1),
        })  # fmt: skip
    return rows


def swap(child: Child, folder: Path) -> dict[str, object]:
    """Swap the registry under traffic, and return how long batches took and whether a verdict was wrong."""
    child.tell("traffic")
    child.hear()
    time.sleep(PHASE_S)
    at_s = time.time()
    (folder / "later" / f"us-dnc{SUFFIX}").replace(folder / "full" / f"us-dnc{SUFFIX}")
    in_force_s = child.hear()["swapped_at"] - at_s
    return {"case": f"registry swapped under traffic, batches of {BATCH + 3:,}", "seconds_to_in_force": round(in_force_s, 2),
            **child.hear()}  # fmt: skip


def keywords() -> list[dict[str, object]]:
    """Return the time of reading an inbound text, beside that of folding it."""
    rng = random.Random(SEED)
    words = ["see", "you", "at", "the", "station", "can", "stop", "for", "a", "drink", "or", "call", "me", "home", "ok"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 25))) for _ in range(5000)]
    rows = []
    for name, found in (("English", Keywords()), ("all languages", Keywords(languages()))):
        taken = {}
        for part, run in (("us", lambda: [found.match(text) for text in texts]),
                          ("baseline_us", lambda: [text.casefold().split() for text in texts])):  # fmt: skip
            times = []
            for _ in range(2 if SMOKE else 30):
                begin = time.process_time()
                run()
                times.append(time.process_time() - begin)
            taken[part] = round(min(times) / len(texts) * 1e6, 2)
        rows.append({"case": f"keywords of a text, {name}", **taken, "baseline": "fold and split"})
    return rows


def main() -> None:
    if "--hold" in sys.argv:
        folder, case = sys.argv[sys.argv.index("--hold") + 1 :][:2]
        hold(Path(folder), case)
        return
    scale = "smoke" if SMOKE else f"1/{SHARE} of full scale, nothing extrapolated" if QUICK else "full scale"
    with tempfile.TemporaryDirectory(dir=results()) as name:
        folder = Path(name)
        report([{**row, "scale": scale} for row in make_lists(folder, int(time.time()))])
        children = {case: Child(folder, case) for case in CASES}
        said = {case: child.ask("reasons") for case, child in children.items()}
        listed = ["on_registry", None, "opted_out"]
        if said != {"none": [None] * 3, "small": listed, "full": listed, "none again": [None] * 3}:
            raise SystemExit(f"the lists do not say what they should: {said}")
        report(costs(children))
        report(memory(children, folder))
        report([swap(children["full"], folder)])
        for child in children.values():
            child.end()
    report(keywords())


if __name__ == "__main__":
    main()
