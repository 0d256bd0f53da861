"""The demo's run: generate, publish, run a worker until idle, and account for every record from what the log holds.

Rules of this file: what is counted is read back from the log and the key store, and compared with what was
published and what the worker reported. A summary holds counts, codes and instants; nothing of any record.
"""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import orjson

from processors.decode import decode_shape
from processors.pipeline import End, Outcome
from processors.retention import instant
from schemas.catalog import CATALOG, INPUTS, Stream
from schemas.errors import InputInvalid, Poison
from schemas.outbound import Message, Output
from schemas.policy import Policy, parse_policy
from streams.config import KAFKA, Config, Kafka
from streams.demo.traffic import HOUR_S, Traffic, generate
from streams.demo.traffic import KINDS as KINDS_MADE
from streams.deployment import Deployment, open_log
from streams.keys.store import KeyStatus
from streams.log.protocol import Log, Stored
from streams.publish import CHUNK_RECORDS, route
from streams.state import registries
from streams.worker.supervisor import run_one

FOLDER: Final = Path("streamveil-demo")
MARKER: Final = ".streamveil-demo"
CONFIG_FILE: Final = "streamveil.toml"
UNREADABLE: Final = "unreadable"
KINDS: Final = ("request", "cdr", "preference", UNREADABLE)
"""What a record is to the pipeline, as in `Outcome.kind`."""
OUTPUTS: Final = tuple(name for name in CATALOG if name not in INPUTS)

_POLICY_FILE = "policy.toml"
_CONFIG = """\
# Written by `streamveil demo`, and anew at each run of it.
log = "sqlite:///data/log.db"
policy = "policy.toml"
"""
_PAGE = 5000
_REGISTRY = "us-dnc"

Phase = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Whom to tell: (what is being done, of how many records) → a context that takes how many more are done."""


class Ends(msgspec.Struct, frozen=True):
    """How the records of one kind ended; `came_in` is counted before the worker sees them."""

    kind: str
    came_in: int
    emit: int
    refuse: int
    quarantine: int
    expired: int


class Refusal(msgspec.Struct, frozen=True):
    """One reason for refusals, with its clause and the codes that gateways know."""

    reason: str
    clause: str
    count: int
    codes: dict[str, int]


class Death(msgspec.Struct, frozen=True):
    """When what a stream holds dies: instants in RFC 3339, None: not before it is lifted."""

    stream: str
    data_class: str
    records: int
    soonest: str | None
    latest: str | None
    keys: int | None  # epoch keys whose destruction is its death; None: it is not sealed, and is cut from the log
    rule: str


class Check(msgspec.Struct, frozen=True):
    """Two counts that must be the same."""

    rule: str
    expected: int
    found: int

    @property
    def holds(self) -> bool:
        """Whether they are."""
        return self.expected == self.found


class Speed(msgspec.Struct, frozen=True):
    """How long a phase took, and how many records a second that is."""

    seconds: float
    records_per_s: int


class Summary(msgspec.Struct, frozen=True):
    """What a run came to."""

    records: int
    seed: int
    made: dict[str, int]
    ends: list[Ends]
    anonymous_only: int  # CDRs so late that only the anonymous part was still to be kept
    refused: list[Refusal]
    quarantined: dict[str, int]
    deaths: list[Death]
    speed: dict[str, Speed]
    checks: list[Check]
    adds_up: bool
    files: dict[str, str]


# --- where it runs ------------------------------------------------------------------------------------------


def policy() -> Policy:
    """Return the demo's policy."""
    return parse_policy(_policy_text(), f"demo {_POLICY_FILE}")


def _policy_text() -> str:
    return (resources.files("streams.demo") / _POLICY_FILE).read_text(encoding="utf-8")


def make_folder(folder: Path = FOLDER) -> Path:
    """Make the demo's folder anew, with configuration and policy, and return the configuration's path.

    Raises InputInvalid if there is one that no demo has made, and it stays as it is.
    """
    try:
        if folder.is_symlink() or (folder.exists() and not (folder / MARKER).is_file()):
            raise InputInvalid("this was not made by a demo and stays as it is; move it away", path=str(folder))
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
        (folder / MARKER).write_text("made by streamveil demo, which deletes this folder when it runs again\n")
        (folder / CONFIG_FILE).write_text(_CONFIG, encoding="utf-8")
        (folder / _POLICY_FILE).write_text(_policy_text(), encoding="utf-8")
    except OSError as error:
        raise InputInvalid(f"the demo's folder cannot be made: {error.strerror}", path=str(folder)) from None
    return folder / CONFIG_FILE


async def _refuse_used(config: Config, log: Log) -> None:
    """Raise InputInvalid if the deployment holds anything: the summary would not add up, or a real list be replaced."""
    used = [stream for stream in CATALOG if any(await log.end_offsets(stream))]
    if used or registries.Registries(config.registries_dir).names():
        raise InputInvalid("there are records or registries here already; give the demo a log of its own")


# --- the run ------------------------------------------------------------------------------------------------


async def run(config: Config, records: int, seed: int, now_s: int, phase: Phase) -> Summary:
    """Run the demo in a deployment that is still empty, and return its summary. Blocks; raises what its parts raise.

    On Kafka the streams have to be there. Same seed and same hour of `now_s`, same traffic.
    """
    speed: dict[str, Speed] = {}
    traffic = generate(records, seed, now_s // HOUR_S * HOUR_S)
    log = await open_log(config)
    try:
        await _refuse_used(config, log)
        _load_registry(config, traffic, now_s)
        with _timed(speed, "publish", records), phase("publishing", records) as advance:
            await _publish(log, traffic.values, advance)
    finally:
        await log.close()
    with _timed(speed, "run", records), phase("running", records) as advance:
        outcomes = await run_one(config, until_idle=True, on_batch=lambda batch: advance(len(batch)))
    async with Deployment.open(config, create=False) as deployment:
        found = _Found(deployment.log, keeps_input=config.kafka is not None)
        await found.read()
        keys = deployment.store.status(int(time.time()))
    ends = _ends(traffic, outcomes)
    checks = list(_checks(traffic, ends, outcomes, found))
    return Summary(
        records=records,
        seed=seed,
        made={kind: traffic.made[kind] for kind in KINDS_MADE},
        ends=ends,
        anonymous_only=_count(outcomes, "cdr", End.EMIT, "personal_part_expired"),
        refused=[
            Refusal(one.reason, one.clause, count, orjson.loads(one.codes))
            for one, count in found.refused.most_common()
        ],
        quarantined=dict(found.quarantined.most_common()),
        deaths=list(_deaths(config.policy, found, keys)),
        speed=speed,
        checks=checks,
        adds_up=all(check.holds for check in checks),
        files={
            "log": str(config.log_path) if config.kafka is None else _place(config.kafka),
            "key store": str(config.keys_path),
            "key management service": str(config.kms_dir),
            "registries": str(config.registries_dir),
        },
    )


def _place(kafka: Kafka) -> str:
    return f"{KAFKA}{','.join(kafka.servers)}, topics {kafka.prefix}*"


@contextmanager
def _timed(speed: dict[str, Speed], name: str, records: int) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    speed[name] = Speed(round(seconds, 2), round(records / seconds))


def _load_registry(config: Config, traffic: Traffic, now_s: int) -> None:
    rule = next(rule for rule in policy().screening.registry if rule.name == _REGISTRY)
    with tempfile.TemporaryDirectory(prefix="streamveil-demo-") as folder:
        file = Path(folder) / f"{_REGISTRY}.txt"
        file.write_text("".join(f"{line}\n" for line in traffic.registry), encoding="ascii")
        registries.load(
            config.registries_dir,
            rule.name,
            [file],
            registries.Terms(country=rule.country, calling_code=rule.calling_code, as_of_s=now_s, now_s=now_s),
        )


async def _publish(log: Log, values: list[bytes], advance: Callable[[int], None]) -> None:
    for start in range(0, len(values), CHUNK_RECORDS):
        chunk = values[start : start + CHUNK_RECORDS]
        now_ms = time.time_ns() // 1_000_000
        places: dict[tuple[str, int], list[Message]] = {}
        for value in chunk:
            to = route(value)
            place = (to.stream, to.partition(value, log.partitions))
            places.setdefault(place, []).append(Message(now_ms, to.key, (), value))
        await log.append([Output(*place, messages) for place, messages in places.items()])
        advance(len(chunk))


# --- what the log holds afterwards --------------------------------------------------------------------------


class _Refused(NamedTuple):
    reason: str
    clause: str
    codes: bytes  # JSON object


class _Span(NamedTuple):
    soonest: str
    latest: str


class _Found:
    """Counts of what stands in the streams."""

    def __init__(self, log: Log, *, keeps_input: bool) -> None:
        self._log = log
        self._keeps_input = keeps_input  # until its retention has passed; otherwise what is committed is gone
        self.records: Counter[str] = Counter()
        self.published = self.left = 0
        self.cleared = 0
        self.refused: Counter[_Refused] = Counter()
        self.quarantined: Counter[str] = Counter()
        self.spans: dict[str, _Span] = {}

    async def read(self) -> None:
        """Read every stream through. About 5 µs a record."""
        for stream in INPUTS:
            left = sum([len(page) async for page in self._pages(stream)])
            self.published += sum(await self._log.begin_offsets(stream)) + left
            self.left += left
        if self._keeps_input and await self._at_end():
            self.left = 0
        for stream in OUTPUTS:
            async for page in self._pages(stream):
                self._count(stream, [orjson.loads(stored.value) for stored in page])

    async def _at_end(self) -> bool:
        consumer = self._log.consumer("demo")
        try:
            return await consumer.at_end()
        finally:
            await consumer.close()

    async def _pages(self, stream: str) -> AsyncIterator[list[Stored]]:
        for partition, at in enumerate(await self._log.begin_offsets(stream)):
            offset = at
            while page := await self._log.read(stream, partition, offset, _PAGE):
                yield page
                offset = page[-1].offset + 1

    def _count(self, stream: str, values: list[dict[str, Any]]) -> None:
        self.records[stream] += len(values)
        deadlines = [at for value in values if (at := value["privacy"]["expires_at"])]
        if deadlines:
            known = self.spans.get(stream, _Span(deadlines[0], deadlines[0]))
            self.spans[stream] = _Span(min(known.soonest, *deadlines), max(known.latest, *deadlines))
        if stream == "verdicts":
            refused = [value for value in values if value["verdict"] == "refused"]
            self.cleared += len(values) - len(refused)
            self.refused.update(_Refused(one["reason"], one["clause"], orjson.dumps(one["codes"])) for one in refused)
        elif stream == "quarantine":
            self.quarantined.update(value["reason"] for value in values)


def _count(outcomes: Counter[Outcome], kind: str, end: End, reason: str | None = None) -> int:
    """Return how many records of a kind ended so; for any reason, or for this one."""
    return sum(
        count for one, count in outcomes.items() if one.kind == kind and one.end is end and reason in (None, one.reason)
    )


def _ends(traffic: Traffic, outcomes: Counter[Outcome]) -> list[Ends]:
    came_in = Counter(_kind(value) for value in traffic.values)
    return [Ends(kind, came_in[kind], *(_count(outcomes, kind, end) for end in End)) for kind in KINDS]


def _kind(value: bytes) -> str:
    try:
        return str(decode_shape(value).__struct_config__.tag)
    except Poison:
        return UNREADABLE


def _checks(traffic: Traffic, ends: list[Ends], outcomes: Counter[Outcome], found: _Found) -> Iterator[Check]:
    """Yield every pair of counts that must be the same; what came in first, then what the log holds."""
    by_kind = {end.kind: end for end in ends}
    requests, cdrs = by_kind["request"], by_kind["cdr"]
    reasons = Counter({one.reason: count for one, count in outcomes.items() if one.end is End.REFUSE})
    said: Counter[str | None] = Counter({one.reason: count for one, count in found.refused.items()})
    held = found.records
    yield Check("made = published", len(traffic.values), found.published)
    yield Check("published = ended", len(traffic.values), outcomes.total())
    for end in ends:
        yield Check(f"{end.kind}: came in = ended", end.came_in, end.emit + end.refuse + end.quarantine + end.expired)
    yield Check("clear traffic left = none", 0, found.left)
    yield Check("met a fault of the program = none", 0, found.quarantined["internal_error"])
    yield Check("requests cleared or refused = verdicts", requests.emit + requests.refuse, held["verdicts"])
    yield Check("requests cleared = verdicts that clear", requests.emit, found.cleared)
    yield Check("requests cleared = records in cleared", requests.emit, held["cleared"])
    yield Check("requests refused, by reason = verdicts that refuse", reasons.total(), (reasons & said).total())
    yield Check("CDRs emitted = records in cdr.anonymous", cdrs.emit, held["cdr.anonymous"])
    late = _count(outcomes, "cdr", End.EMIT, "personal_part_expired")
    yield Check("CDRs emitted but the late ones = records in cdr.pii", cdrs.emit - late, held["cdr.pii"])
    yield Check("quarantined = records in quarantine", sum(end.quarantine for end in ends), held["quarantine"])


def compare(summary: Summary, other: Summary) -> Iterator[Check]:
    """Yield every count of how records ended, and of records in each stream: as in the other run, and in this one."""
    counts, others = _counts(summary), _counts(other)
    for what in sorted({*counts, *others}):
        yield Check(what, others[what], counts[what])


def _counts(summary: Summary) -> Counter[str]:
    counts = Counter({f"{kind} made": count for kind, count in summary.made.items()})
    for end in summary.ends:
        came_and_went = msgspec.to_builtins(end)
        counts.update({f"{end.kind} {how}": count for how, count in came_and_went.items() if how != "kind"})
    counts["emitted without the personal part"] = summary.anonymous_only
    counts.update({f"refused {one.reason}": one.count for one in summary.refused})
    counts.update({f"quarantined {reason}": count for reason, count in summary.quarantined.items()})
    counts.update({f"records in {one.stream}": one.records for one in summary.deaths})
    return counts


# --- what dies when -----------------------------------------------------------------------------------------


def _deaths(policy: Policy, found: _Found, keys: list[KeyStatus]) -> Iterator[Death]:
    for name in OUTPUTS:
        if not found.records[name]:
            continue
        row, span = CATALOG[name], found.spans.get(name)
        epochs = [one for one in keys if row.domain is not None and one.domain == row.domain]
        deadlines = [one.deadline_s for one in epochs if one.deadline_s is not None]
        yield Death(
            stream=name,
            data_class=row.data_class,
            records=found.records[name],
            soonest=instant(min(deadlines)) if deadlines else span and span.soonest,
            latest=instant(max(deadlines)) if deadlines else span and span.latest,
            keys=None if row.domain is None else len(epochs),
            rule=_rule(policy, row),
        )


def _rule(policy: Policy, row: Stream) -> str:
    """Return in a few words why a stream lives as long as it does, and the clause."""
    if row.max_hours is not None:
        return f"at most {row.max_hours} hours" if row.max_hours < 72 else f"at most {row.max_hours // 24} days"
    if row.data_class == "content":
        return f"as the account instructs ({policy.content.clause})"
    rule = policy.retention_of(row.data_class)
    if rule is None:
        return "-"
    return f"{rule.keep} after {rule.after} ({rule.clause})" if rule.period else f"{rule.keep} ({rule.clause})"
