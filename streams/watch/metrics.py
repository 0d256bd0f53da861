"""Every metric there is, in one table; `python -m streams.watch.metrics` prints docs/metrics.md from it.

Rules of this file:
- A metric is a row of the table. Labels take values of closed sets: streams, reason codes, stages, the policy's lists;
  never an account, a number, an id, a token or anything else of a record. A series of a closed set is there from the
  start, as 0: else Prometheus would not see the first thing that goes wrong.
- Everything is counted once a batch, never once a record.
- A gauge of an instant holds Unix seconds; how long ago that is, Prometheus and `/readyz` ask their own clock. So
  it goes on growing for a worker that hangs.
- Workers write into files of one folder (prometheus-client's multi-process mode, chosen by the environment variable
  `FOLDER_VARIABLE` before this module is imported); the process that serves `/metrics` adds them up. Without the
  variable a `Metrics` object keeps all in memory, under its own registry.
"""

import fcntl
import os
import time
from bisect import bisect_left
from collections import Counter as CounterOf
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from processors.decode import REASONS as QUARANTINED
from processors.keyring import KeyRing
from processors.pipeline import End
from processors.screen.verdict import REASONS as REFUSED
from schemas.catalog import CATALOG, INPUTS
from schemas.errors import Retriable
from streams.keys.store import Kms
from streams.watch.watch import Moment, Overdue, RegistrySeen, Reviews, Stages, Watch, Work

_STAGE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ARRIVAL_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600, 21_600, 86_400)
_SEALED = tuple(name for name, row in CATALOG.items() if row.domain is not None)
_OUTPUTS = tuple(name for name, row in CATALOG.items() if "worker" in row.writers)
_ENTRIES = ("suppressions", "exemptions")
_KMS_CALLS = ("wrap", "unwrap", "destroy", "names", "rotate_root", "counter", "raise_counter")
_KINDS = ("request", "cdr", "preference")
_T = TypeVar("_T", bound=MetricWrapperBase)

Kind = Literal["counter", "gauge", "histogram"]
Mode = Literal["livesum", "livemin", "livemax", "livemostrecent", "max"]
"""How a gauge of several workers becomes one; dead workers count for nothing, but in `max`."""


class Row(NamedTuple):
    """One metric. `series`: the label values there are from the start, all of them unless `open` says what more."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    series: tuple[tuple[str, ...], ...] = ()
    open: str = ""
    buckets: tuple[float, ...] = ()
    mode: Mode = "livemostrecent"


def _each(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


def _endings() -> Iterator[tuple[str, str, str]]:
    """Yield how a record of each type may end."""
    yield from ((kind, End.EMIT.value, "") for kind in _KINDS)
    yield "cdr", End.EMIT.value, "personal_part_expired"
    yield "preference", End.EMIT.value, "lifts_nothing"
    yield "cdr", End.EXPIRED.value, "older_than_everything"
    yield from (("request", End.REFUSE.value, reason) for reason in REFUSED)
    yield from product((*_KINDS, "unreadable"), (End.QUARANTINE.value,), sorted(QUARANTINED))


def _waits() -> list[str]:
    """Return the names of the errors that a batch waits for."""
    return [error.__name__ for error in Retriable.__subclasses__() if error.__module__ == Retriable.__module__]


DENIALS = (
    "not_granted", "not_granted_for_account", "restricted", "too_late", "opted_out", "blocked_by_officer",
    "exemption_ended", "account_unknown",
)  # fmt: skip
"""Why something sealed was not opened. `not_granted`: the principal may not open the stream at all."""

RECORDS = Row("streamveil_records_total", "counter", "records",
              "Input records that were committed, each exactly once, by how it ended.",
              ("type", "outcome", "reason"), tuple(_endings()))  # fmt: skip
BATCHES = Row("streamveil_batches_total", "counter", "batches",
              "Batches that were committed, by input stream.", ("stream",), _each(INPUTS))  # fmt: skip
RETRIES = Row("streamveil_retries_total", "counter", "attempts",
              "Times that a worker could not go on for now: the batch waits and is prepared anew.",
              ("error",), _each(_waits()))  # fmt: skip
FENCED = Row("streamveil_fenced_total", "counter", "workers",
             "Workers that ended because another had taken a partition over.")  # fmt: skip
STAGES = Row("streamveil_stage_seconds", "histogram", "seconds a batch",
             "Time of one stage of a committed batch; fetch is that of keys and secrets.",
             ("stage",), _each(Stages._fields), buckets=_STAGE_BUCKETS_S)  # fmt: skip
ARRIVAL = Row("streamveil_arrival_to_commit_seconds", "histogram", "seconds a record",
              "Time from a record's arrival (its log timestamp in the input) to its commit.",
              ("stream",), _each(INPUTS), buckets=_ARRIVAL_BUCKETS_S)  # fmt: skip
LAG = Row("streamveil_lag_records", "gauge", "records",
          "Records of an input partition that are not committed yet.",
          ("stream", "partition"), open="partition: from 0; looked at every 5 s")  # fmt: skip
OLDEST = Row("streamveil_oldest_unread_timestamp_seconds", "gauge", "Unix seconds",
             "Arrival of the oldest record that is not committed yet; where there is none, the time of the look.",
             ("stream",), _each(INPUTS))  # fmt: skip
CLEAR = Row("streamveil_clear_inputs_total", "counter", "records",
            "Clear records taken in and committed, by input stream.", ("stream",), _each(INPUTS))  # fmt: skip
SEALED = Row("streamveil_sealed_values_total", "counter", "records",
             "Sealed values written, by stream.", ("stream",), _each(_SEALED))  # fmt: skip
CHECKED = Row("streamveil_seal_checks_total", "counter", "values",
              "Values that were looked at just before the commit: sealed where they must be, nothing else clear.",
              ("stream",), _each(_OUTPUTS))  # fmt: skip
UNSEALED = Row("streamveil_unsealed_values_total", "counter", "values",
               "Values that failed this check; their batches were not committed. Must be 0.",
               ("stream",), _each(_OUTPUTS))  # fmt: skip
KEY_LOOKUPS = Row("streamveil_key_lookups_total", "counter", "keys",
                  "Keys and secrets that batches took: hit in memory, or miss: asked of the key store.",
                  ("kind", "outcome"), tuple(product(("epochs", "persons"), ("hit", "miss"))))  # fmt: skip
KEY_CACHE = Row("streamveil_key_cache_entries", "gauge", "keys",
                "Keys, secrets and derived ciphers in the memory of all workers.",
                ("kind",), _each(("epochs", "persons", "ciphers")), mode="livesum")  # fmt: skip
KMS = Row("streamveil_kms_calls_total", "counter", "calls",
          "Calls of the key management service: ok, retriable (they are tried again) or failed.",
          ("operation", "outcome"),
          tuple(product(_KMS_CALLS, ("ok", "retriable", "failed"))))  # fmt: skip
BEHIND = Row("streamveil_suppressions_behind_records", "gauge", "records",
             "Records of suppressions that are written and could not be read; nothing is cleared meanwhile.",
             mode="livemax")  # fmt: skip
SNAPSHOT_DATE = Row("streamveil_snapshot_timestamp_seconds", "gauge", "Unix seconds",
                    "When the snapshot of a stream's entries that a worker uses was written, as the worker with the"
                    " oldest has it; 0: it uses none.",
                    ("stream",), _each(_ENTRIES), mode="livemin")  # fmt: skip
SNAPSHOT_CHANGED = Row("streamveil_snapshot_changed_people", "gauge", "people",
                       "People whose entries have changed since that snapshot, and whom the worker holds in memory.",
                       ("stream",), _each(_ENTRIES), mode="livemax")  # fmt: skip
UNFIT = Row("streamveil_registries_unfit", "gauge", "registries",
            "Registries of the policy that are required and missing, or too old: marketing to their countries is"
            " refused.", mode="livemax")  # fmt: skip
REGISTRY_DATE = Row("streamveil_registry_as_of_timestamp_seconds", "gauge", "Unix seconds",
                    "The list's own date, as the worker with the oldest has it; 0: not loaded.",
                    ("registry",), open="registry: those that the policy names", mode="livemin")  # fmt: skip
REGISTRY_MAX_AGE = Row("streamveil_registry_max_age_seconds", "gauge", "seconds",
                       "Marketing to its country is refused once a list is older than this.",
                       ("registry",), open="registry: as above", mode="livemin")  # fmt: skip
REGISTRY_REQUIRED = Row("streamveil_registry_required", "gauge", "1",
                        "1: while the list is not loaded, marketing to its country is refused. 0: it is not screened.",
                        ("registry",), open="registry: as above", mode="livemax")  # fmt: skip
REGISTRY_DAMAGED = Row("streamveil_registry_damaged", "gauge", "1",
                       "1: a file of the list is damaged; the one loaded before serves, if there is one.",
                       ("registry",), open="registry: as above", mode="livemax")  # fmt: skip
DENIED = Row("streamveil_openings_denied_total", "counter", "records",
             "Sealed records that were not opened for who asked; not_granted counts calls.",
             ("reason",), _each(DENIALS))  # fmt: skip
OVERDUE = Row("streamveil_destructions_overdue", "gauge", "destructions",
              "Epoch keys and days that should have been destroyed more than 15 minutes ago and are still there.",
              mode="livemax")  # fmt: skip
OLDEST_DUE = Row("streamveil_oldest_destruction_due_timestamp_seconds", "gauge", "Unix seconds",
                 "Instant of the oldest destruction that is to be done; where there is none, the time of the look.",
                 mode="livemin")  # fmt: skip
REQUESTS_OVERDUE = Row("streamveil_requests_overdue", "gauge", "requests",
                       "People's requests that are not done in 15 days, or whose accounts were not told in 24 hours.",
                       mode="livemax")  # fmt: skip
REVIEWS = Row("streamveil_reviews_undecided", "gauge", "near misses",
              "Near-miss opt-outs that nobody has decided.", mode="livemax")  # fmt: skip
REVIEWS_SOON = Row("streamveil_reviews_due_soon", "gauge", "near misses",
                   "Of these, those that are due within two days.", mode="livemax")  # fmt: skip
REVIEWS_OVERDUE = Row("streamveil_reviews_overdue", "gauge", "near misses",
                      "Those whose 10 business days are over, or that cannot be read.", mode="livemax")  # fmt: skip
REVIEWS_DIED = Row("streamveil_reviews_died_undecided", "gauge", "near misses",
                   "Near-miss opt-outs that died undecided in the last 24 hours.", mode="livemax")  # fmt: skip
REVIEWS_SEEN = Row("streamveil_reviews_seen_timestamp_seconds", "gauge", "Unix seconds",
                   "When the slowest worker last looked at near misses. Before the first time: its start.",
                   mode="livemin")  # fmt: skip
KEKS = Row("streamveil_keks", "gauge", "keys", "Key-encryption keys that the key management service has.",
           mode="livemax")  # fmt: skip
RETENTION = Row("streamveil_retention_runs_total", "counter", "runs",
                "Retention runs that `run` started; partial: something was left to a user with the rights for it.",
                ("outcome",), _each(("done", "partial", "failed")))  # fmt: skip
UP = Row("streamveil_workers", "gauge", "workers", "Workers that have passed their self-test and work.",
         mode="livesum")  # fmt: skip
WANTED = Row("streamveil_workers_wanted", "gauge", "workers", "Workers that `run` was asked for.")
BUILD = Row("streamveil_build_info", "gauge", "1", "The version at work.",
            ("version",), open="version: of the distribution")  # fmt: skip
MOMENTS = {
    Moment.POLLED: "When the slowest worker last had an answer from the log.",
    Moment.CAUGHT_UP: "When the slowest worker last had read suppressions to its end.",
    Moment.LEASE_RENEWED: "When the slowest worker last renewed its key lease.",
    Moment.PROGRESS: "When the slowest worker last committed a batch, or found none to do.",
}
INSTANTS = {
    moment: Row(f"streamveil_{moment}_timestamp_seconds", "gauge", "Unix seconds",
                f"{meaning} Before the first time: its start.", mode="livemin")
    for moment, meaning in MOMENTS.items()
}  # fmt: skip

TABLE = (
    RECORDS, BATCHES, RETRIES, FENCED, STAGES, ARRIVAL, LAG, OLDEST, CLEAR, SEALED, CHECKED, UNSEALED, KEY_LOOKUPS,
    KEY_CACHE, KMS, BEHIND, SNAPSHOT_DATE, SNAPSHOT_CHANGED, UNFIT, REGISTRY_DATE, REGISTRY_MAX_AGE, REGISTRY_REQUIRED,
    REGISTRY_DAMAGED, DENIED, OVERDUE, OLDEST_DUE, REQUESTS_OVERDUE, REVIEWS, REVIEWS_SOON, REVIEWS_OVERDUE,
    REVIEWS_DIED, REVIEWS_SEEN, KEKS, RETENTION, UP, WANTED, BUILD,
    *INSTANTS.values(),
)  # fmt: skip
"""The table of all metrics."""


class _Histogram(Histogram):
    """A histogram that takes a whole batch at once."""

    def add_ages(self, since_ms: Sequence[int], now_ms: float) -> None:
        """Observe the time from each of `since_ms`, sorted, to now; what is ahead of the clock counts as 0."""
        done = 0
        for bucket, bound_s in zip(self._buckets, self._upper_bounds, strict=True):
            upto = len(since_ms) - bisect_left(since_ms, now_ms - bound_s * 1000)
            if upto > done:
                bucket.inc(upto - done)
                done = upto
        past = bisect_left(since_ms, now_ms)
        self._sum.inc((past * now_ms - sum(since_ms[:past])) / 1000)


class _Series(dict[tuple[str, ...], _T]):
    """The series of one metric by label values, those of its row from the start; without labels: one, under ()."""

    def __init__(self, metric: _T, row: Row) -> None:
        self._metric = metric
        super().__init__()
        for values in row.series or ([] if row.labels else [()]):
            self[values]

    def __missing__(self, values: tuple[str, ...]) -> _T:
        found = self[values] = self._metric.labels(*values) if values else self._metric
        return found


class Metrics(Watch):
    """The metrics of one worker. Not thread-safe but for being read; no call blocks."""

    on = True

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()

        def counter(row: Row) -> _Series[Counter]:
            return _Series(Counter(row.name, row.meaning, row.labels, registry=registry), row)

        def gauge(row: Row) -> _Series[Gauge]:
            made = Gauge(row.name, row.meaning, row.labels, registry=registry, multiprocess_mode=row.mode)
            return _Series(made, row)

        def histogram(row: Row) -> _Series[_Histogram]:
            made = _Histogram(row.name, row.meaning, row.labels, registry=registry, buckets=row.buckets)
            return _Series(made, row)

        self._records = counter(RECORDS)
        self._batches = counter(BATCHES)
        self._retries = counter(RETRIES)
        self._fenced = counter(FENCED)
        self._stages = histogram(STAGES)
        self._arrival = histogram(ARRIVAL)
        self._lag = gauge(LAG)
        self._oldest = gauge(OLDEST)
        self._clear = counter(CLEAR)
        self._sealed = counter(SEALED)
        self._checked = counter(CHECKED)
        self._unsealed = counter(UNSEALED)
        self._lookups = counter(KEY_LOOKUPS)
        self._cache = gauge(KEY_CACHE)
        self._kms = counter(KMS)
        self._behind = gauge(BEHIND)
        self._snapshots = (gauge(SNAPSHOT_DATE), gauge(SNAPSHOT_CHANGED))
        self._unfit = gauge(UNFIT)
        self._overdue = gauge(OVERDUE)
        self._oldest_due = gauge(OLDEST_DUE)
        self._requests = gauge(REQUESTS_OVERDUE)
        self._registries = (
            gauge(REGISTRY_DATE), gauge(REGISTRY_MAX_AGE), gauge(REGISTRY_REQUIRED), gauge(REGISTRY_DAMAGED),
        )  # fmt: skip
        self._reviews = (gauge(REVIEWS), gauge(REVIEWS_SOON), gauge(REVIEWS_OVERDUE), gauge(REVIEWS_DIED))
        self._reviews_seen = gauge(REVIEWS_SEEN)
        self._keks = gauge(KEKS)
        self._up = gauge(UP)
        self._instants = {moment: gauge(row) for moment, row in INSTANTS.items()}
        for moment in Moment:
            self.reached(moment)
        self._oldest_due[()].set(time.time())
        self._reviews_seen[()].set(time.time())
        for stream in INPUTS:
            self._oldest[stream,].set(time.time())

    def up(self) -> None:
        """Take note that the worker has passed its self-test and starts to work."""
        self._up[()].set(1)

    def reached(self, moment: Moment) -> None:
        """Take note that a moment was reached now."""
        self._instants[moment][()].set(time.time())
        if moment is Moment.CAUGHT_UP:
            self._behind[()].set(0)

    def committed(self, work: Work) -> None:
        """Count a batch that was committed now."""
        stream = work.batch.stream
        for outcome, count in work.outcomes.items():
            self._records[outcome.kind, outcome.end.value, outcome.reason or ""].inc(count)
        self._batches[stream,].inc()
        self._clear[stream,].inc(len(work.batch.messages))
        for stage, seconds in zip(Stages._fields, work.stages_s, strict=True):
            self._stages[stage,].observe(seconds)
        arrivals_ms = [message.timestamp_ms for message in work.batch.messages]
        arrivals_ms.sort()
        self._arrival[stream,].add_ages(arrivals_ms, time.time() * 1000)
        for output in work.outputs:
            if (output.stream,) in self._sealed:
                self._sealed[output.stream,].inc(len(output.messages))
        for kind, asked, missed in zip(("epochs", "persons"), work.asked, work.missed, strict=True):
            self._lookups[kind, "hit"].inc(asked - missed)
            self._lookups[kind, "miss"].inc(missed)

    def checked(self, streams: Sequence[str], unsealed: Mapping[str, int]) -> None:
        """Count the outputs whose seal was checked, by stream, and those that lack it."""
        for stream in streams:
            self._checked[stream,].inc()
        for stream, count in unsealed.items():
            self._unsealed[stream,].inc(count)

    def waits(self, error: Exception) -> None:
        """Count a batch that waits because of an error."""
        self._retries[type(error).__name__,].inc()

    def fenced(self) -> None:
        """Count a worker that ends because another took over."""
        self._fenced[()].inc()

    def unread(self, stream: str, lags: Sequence[int], oldest_s: float | None) -> None:
        """Take note of the records not committed yet, per partition, and the oldest one's arrival (Unix s)."""
        for partition, lag in enumerate(lags):
            self._lag[stream, str(partition)].set(lag)
        self._oldest[stream,].set(time.time() if oldest_s is None else oldest_s)

    def behind(self, records: int) -> None:
        """Take note of how many records of `suppressions` could not be read."""
        self._behind[()].set(records)

    def snapshot(self, stream: str, written_s: float | None, changed: int) -> None:
        """Take note of when the snapshot in use of a stream was written (Unix s), and how many have changed since."""
        date, people = self._snapshots
        date[stream,].set(written_s or 0)
        people[stream,].set(changed)

    def unfit(self, registries: int) -> None:
        """Take note of how many registries that the policy asks for are missing or too old."""
        self._unfit[()].set(registries)

    def registries(self, seen: Sequence[RegistrySeen]) -> None:
        """Take note of the registries that the policy asks for."""
        dates, ages, required, damaged = self._registries
        for one in seen:
            dates[one.name,].set(one.as_of_s or 0)
            ages[one.name,].set(one.max_age_s)
            required[one.name,].set(one.required)
            damaged[one.name,].set(one.damaged)

    def keeps(self, ring: KeyRing) -> None:
        """Take note of how many keys are in memory."""
        self._cache["epochs",].set(len(ring.epochs))
        self._cache["persons",].set(len(ring.persons))
        self._cache["ciphers",].set(sum(map(len, ring.ciphers.values())))

    def overdue(self, found: Overdue) -> None:
        """Take note of what should have been done by now, and how many key-encryption keys there are."""
        self._overdue[()].set(found.destructions)
        self._oldest_due[()].set(time.time() if found.oldest_s is None else found.oldest_s)
        self._requests[()].set(found.requests)
        self._keks[()].set(found.keks)

    def reviews(self, found: Reviews, died: int) -> None:
        """Take note of the near-miss opt-outs that wait for a decision, looked at now.

        `died`: how many died undecided in the last 24 hours.
        """
        for gauge, count in zip(self._reviews, (*found, died), strict=True):
            gauge[()].set(count)
        self._reviews_seen[()].set(time.time())

    def of_kms(self, kms: Kms) -> Kms:
        """Return the key management service, its calls counted."""
        return _CountedKms(kms, self._kms)


class _CountedKms:
    """A key management service whose calls are counted; all else of it is as it was."""

    def __init__(self, kms: Kms, calls: Mapping[tuple[str, ...], Counter]) -> None:
        self._of = kms
        self._calls = calls

    @property
    def calls(self) -> int:
        """Requests that went to the service."""
        return self._of.calls

    @property
    def check(self) -> bytes:
        """What names the root of trust."""
        return self._of.check

    @property
    def waiting_period_s(self) -> int:
        """So long the service can undo a deletion."""
        return self._of.waiting_period_s

    @property
    def has_root(self) -> bool:
        """Whether `rotate_root` is this service's to do."""
        return self._of.has_root

    def trusts(self, check: bytes) -> bool:
        """Return whether `check` names this service."""
        return self._of.trusts(check)

    @contextmanager
    def _counted(self, operation: str) -> Iterator[None]:
        outcome = "failed"
        try:
            yield
            outcome = "ok"
        except Retriable:
            outcome = "retriable"
            raise
        finally:
            self._calls[operation, outcome].inc()

    def wrap(self, name: str, plaintext: bytes) -> bytes:
        """Return the plaintext wrapped under a KEK."""
        with self._counted("wrap"):
            return self._of.wrap(name, plaintext)

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """Return what was wrapped."""
        with self._counted("unwrap"):
            return self._of.unwrap(name, wrapped)

    def destroy(self, name: str) -> None:
        """Delete a KEK for good."""
        with self._counted("destroy"):
            self._of.destroy(name)

    def names(self) -> list[str]:
        """Return the names of the KEKs there are, in order."""
        with self._counted("names"):
            return self._of.names()

    def last_destroyed(self, day: str) -> int:
        """Return the highest generation of a day that was destroyed."""
        with self._counted("last_destroyed"):
            return self._of.last_destroyed(day)

    def rotate_root(self) -> None:
        """Replace what the KEKs are wrapped by."""
        with self._counted("rotate_root"):
            self._of.rotate_root()

    def counter(self) -> int:
        """Return the destruction counter."""
        with self._counted("counter"):
            return self._of.counter()

    def raise_counter(self, value: int) -> None:
        """Raise the counter to at least `value`."""
        with self._counted("raise_counter"):
            self._of.raise_counter(value)

    def close(self) -> None:
        """Free what is held."""
        self._of.close()


# --- denied openings: by any process on this machine that opens something ----------------------------------------

_OPENINGS = "counter_openings.db"


def count_denied(watched: Path, reasons: Mapping[str, int]) -> None:
    """Add sealed records that were not opened to the metrics of every `run`; see `streams.watch.watch.denied`."""
    for folder in watched.glob("*/"):
        with suppress(OSError):  # its process ended this moment, or is another user's
            _add_denied(folder, reasons)


def _add_denied(folder: Path, reasons: Mapping[str, int]) -> None:
    """Add to the file of denied openings in a folder that exists; one process at a time."""
    descriptor = os.open(folder / "openings.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        values: Any = MmapedDict(str(folder / _OPENINGS))  # type: ignore[no-untyped-call]
        for reason, count in reasons.items():
            key = mmap_key(DENIED.name.removesuffix("_total"), DENIED.name, ["reason"], [reason], DENIED.meaning)
            values.write_value(key, values.read_value(key)[0] + count, 0.0)
        values.close()
    finally:
        os.close(descriptor)


# --- the process that serves them --------------------------------------------------------------------------------


class Known(Collector):
    """What is known without any worker: how many there should be, the version, and how retention runs ended."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.retention: CounterOf[str] = CounterOf()

    def collect(self) -> Iterator[Metric]:
        """Yield it."""
        yield GaugeMetricFamily(WANTED.name, WANTED.meaning, self._workers)
        build = GaugeMetricFamily(BUILD.name, BUILD.meaning, labels=BUILD.labels)
        build.add_metric([version("streamveil")], 1)
        yield build
        runs = CounterMetricFamily(RETENTION.name, RETENTION.meaning, labels=RETENTION.labels)
        for values in RETENTION.series:
            runs.add_metric(list(values), self.retention[values[0]])
        yield runs


def served_registry(folder: Path, known: Known) -> CollectorRegistry:
    """Return the metrics of all workers that write into a folder, and those that are known without any."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    registry.register(known)
    _add_denied(folder, dict.fromkeys(DENIALS, 0))
    return registry


# --- docs/metrics.md ---------------------------------------------------------------------------------------------

_HEAD = """# Metrics

Printed by `python -m streams.watch.metrics` from the table in `streams/watch/metrics.py`; what is served on `/metrics`
when `[watch] listen` is set. Alerts on them: [runbook](runbook.md). No label holds anything of a record.

Counters and gauges are those of all workers of one `streamveil run`. A gauge of an instant (`…_timestamp_seconds`)
holds Unix seconds: `time() - …` is how long ago it was.

| metric | kind | unit | labels | meaning |
|---|---|---|---|---|
"""
_SHOWN = 20
"""So many values of a label are listed; of more, the number is."""


def documentation() -> str:
    """Return docs/metrics.md."""
    return _HEAD + "".join(
        f"| `{row.name}` | {row.kind} | {row.unit} | {_labels(row)} | {row.meaning} |\n" for row in TABLE
    )


def _labels(row: Row) -> str:
    if row.open and not row.series:
        return "; ".join(
            [*(f"`{label}`" for label in row.labels[:-1]), f"`{row.labels[-1]}`" + row.open[row.open.index(":") :]]
        )
    texts = []
    for at, label in enumerate(row.labels):
        values = dict.fromkeys(values[at] for values in row.series)
        shown = ", ".join(value or "none" for value in values) if len(values) <= _SHOWN else f"{len(values)} codes"
        texts.append(f"`{label}`: {shown}")
    return "; ".join(texts) or "–"


if __name__ == "__main__":
    print(documentation(), end="")  # noqa: T201 — this is what it is run for
