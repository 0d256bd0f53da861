"""A watched `streamveil run`: sums over its workers, readiness, what it leaves behind, and that nobody is in it."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections import Counter
from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from processors.pipeline import Pipeline
from schemas import errors
from schemas.catalog import INPUTS
from schemas.errors import Action, Fenced, InputInvalid, LogBusy, LogUnusable
from schemas.outbound import Message, Output
from streams.config import load
from streams.log.sqlite import SqliteConsumer, SqliteLog
from streams.state.entries import SUPPRESSIONS
from streams.state.gathering import gather
from streams.state.reviews import SOON_S, OpenReviews, clock
from streams.state.snapshots import Snapshots
from streams.watch.metrics import Metrics
from streams.watch.unread import READS, Unread
from streams.watch.watch import denied
from streams.worker import supervisor
from streams.worker import worker as worker_module
from tests.property.test_canary_pure import PLANTED, texts_of
from tests.support.commands import Place, ago, eventually, one_line
from tests.support.prometheus import free_port
from tests.support.records import found_in, haystack, reply, sms_cdr, sms_request

PATHS = ("/metrics", "/healthz", "/readyz")


class Watched(Place):
    """A deployment whose workers are watched."""

    def __init__(self, folder, **settings):
        self.port = free_port()
        super().__init__(folder, **settings)

    def configure(self, **settings):
        super().configure(**{"lease_s": 4.0, **settings})
        with self.config.open("a") as file:
            file.write(f'[watch]\nlisten = "127.0.0.1:{self.port}"\n')

    def ask(self, path):
        """Return status and body; status None as long as nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.read().decode()
        except OSError:
            return None, ""

    def ready(self):
        return self.ask("/readyz") == (200, "ok\n")

    def samples(self):
        """Return (name, labels) → value of what `/metrics` says."""
        status, text = self.ask("/metrics")
        assert status == 200, text
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def total(self, name):
        """Return the sum of all series of a metric."""
        return sum(number for (found, *_), number in self.samples().items() if found == name)

    @property
    def folders(self):
        return list((self.data / "watch").glob("*"))


@pytest.fixture
def place(tmp_path):
    made = Watched(tmp_path)
    yield made
    made.close()


def request(number, **fields):
    person = f"+1415555{number % 10_000:04}"
    return sms_request(**{"record_id": f"r{number}", "recipient": person, "occurred_at": ago(), **fields})


def cdr(number):
    return sms_cdr(record_id=f"c{number}", recipient=f"+1415555{number % 10_000:04}", occurred_at=ago())


# --- several processes, one endpoint ------------------------------------------------------------------------------


def test_the_sums_over_all_workers_are_what_was_committed(place):
    # Given two workers that are ready
    running = place.start("run", "--workers", 2)
    eventually(place.ready, "all is ready")
    assert place.total("streamveil_workers") == place.total("streamveil_workers_wanted") == 2
    # When they share traffic, in two goes
    place.publish(*map(request, range(200)), *map(cdr, range(100)))
    eventually(lambda: place.committed() == 300, "the first go is committed")
    place.publish(request(1, recipient=""), b"no record", *map(request, range(300, 350)))
    eventually(lambda: place.committed() == 352, "the second go is committed")
    # Then the counts are right, and so are those of sealed values
    eventually(lambda: place.total("streamveil_records_total") == 352, "all is counted")
    found = place.samples()
    ends = Counter()
    for (name, *labels), number in found.items():
        if name == "streamveil_records_total":
            ends[dict(labels)["type"], dict(labels)["outcome"], dict(labels)["reason"]] += number
    assert {end: number for end, number in ends.items() if number} == {
        ("request", "emit", ""): 250, ("cdr", "emit", ""): 100, ("request", "refuse", "no_recipient"): 1,
        ("unreadable", "quarantine", "not_json"): 1,
    }  # fmt: skip
    assert found["streamveil_sealed_values_total", ("stream", "cdr.pii")] == place.ends("cdr.pii") == 100
    assert found["streamveil_sealed_values_total", ("stream", "cleared")] == place.ends("cleared") == 250
    assert place.total("streamveil_clear_inputs_total") == 352
    assert place.total("streamveil_arrival_to_commit_seconds_count") == 352
    for stage in ("prepare", "fetch", "complete", "commit"):
        assert found["streamveil_stage_seconds_count", ("stage", stage)] == place.total("streamveil_batches_total")
    assert place.total("streamveil_unsealed_values_total") == 0
    assert place.total("streamveil_seal_checks_total") >= place.total("streamveil_batches_total") > 0
    assert found["streamveil_kms_calls_total", ("operation", "wrap"), ("outcome", "ok")] > 0
    # Then the folder is private while they run, and gone when they end
    assert [folder.stat().st_mode & 0o777 for folder in (place.data, place.data / "watch", *place.folders)] == [
        0o700
    ] * 3
    running.send_signal(signal.SIGTERM)
    done = place.ended(running)
    assert (done.status, done.records) == (0, 352)
    assert place.folders == []


def test_a_single_worker_is_served_too_and_without_a_configuration_nobody_listens(place):
    place.publish(request(1))
    running = place.start("run")
    eventually(place.ready, "the worker is ready")
    eventually(lambda: place.total("streamveil_records_total") == 1, "the record is counted")
    assert place.ask("/healthz") == (200, "ok\n")
    assert place.ask("/metrics?name=x")[0] == 200
    assert place.ask("/")[0] == place.ask("/metrics/../etc/passwd")[0] == 404
    running.send_signal(signal.SIGTERM)
    assert place.ended(running).status == 0
    # When it is not to be watched
    Place.configure(place)
    place.publish(request(2))
    assert place.work() == 1
    assert place.ask("/healthz") == (None, "")


def test_no_answer_sets_a_cookie_or_says_what_serves_it(place):
    running = place.start("run")
    eventually(place.ready, "the worker is ready")
    for path in PATHS:
        with urllib.request.urlopen(f"http://127.0.0.1:{place.port}{path}") as answer:
            assert set(answer.headers) <= {"Server", "Date", "Content-Type", "Content-Length", "Cache-Control"}
            assert answer.headers["Server"].strip() == "streamveil"
    running.send_signal(signal.SIGINT)
    assert place.ended(running).status == 0


def test_an_address_in_use_is_an_error_of_one_line(place):
    place.start("run")
    eventually(place.ready, "the first is ready")
    assert "listen cannot be listened on" in one_line(place.run("run"))


@pytest.mark.parametrize("address", ["9464", ":9464", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1", "a b:1", ""])
def test_an_address_that_is_none_is_refused(place, address):
    place.config.write_text(f'[watch]\nlisten = "{address}"\n')
    with pytest.raises(InputInvalid, match="HOST:PORT"):
        load(Namespace(config=str(place.config), log=place.url))


def test_what_a_killed_run_left_behind_is_removed_by_the_next(place):
    # Given a run that was killed, with its worker
    running = place.start("run")
    eventually(place.ready, "the worker is ready")
    (left,) = place.folders
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert left.exists()
    foreign = left.with_name(f"another-machine.{running.pid}.abc")
    foreign.mkdir()
    # When the next one starts / Then it has only its own folder, and another machine's is let be
    place.start("run")
    eventually(place.ready, "the next is ready")
    assert not left.exists()
    assert foreign in place.folders
    assert len(place.folders) == 2


def test_denied_openings_of_other_processes_are_seen(place):
    place.start("run")
    eventually(place.ready, "the worker is ready")
    denied(place.data / "watch", {"not_granted": 3})
    assert place.samples()["streamveil_openings_denied_total", ("reason", "not_granted")] == 3


# --- readiness ----------------------------------------------------------------------------------------------------

IMPATIENT = """
import streams.watch.http as http
http.LATE_S, http.STUCK_S = 0.8, 1.6
"""


def test_a_worker_that_hangs_is_alive_but_not_ready_until_it_wakes(place):
    # Given two workers, one of which is suspended
    place.start("run", "--workers", 2, sabotage=IMPATIENT)
    eventually(place.ready, "all is ready")
    (folder,) = place.folders
    pid = min(int(file.stem.rpartition("_")[2]) for file in folder.glob("gauge_livemin_*.db"))
    os.kill(pid, signal.SIGSTOP)
    # Then its log, its opt-outs and at last its work are late
    eventually(lambda: place.ask("/readyz") == (503, "log suppressions stuck\n"), "it is not ready")
    assert place.ask("/healthz") == (200, "ok\n")
    # When it wakes in time / Then all is ready again, unless somebody took its partitions over
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: place.ready() or place.ask("/healthz")[0] is None, "it is ready again, or has ended")


def test_a_worker_that_cannot_get_at_its_keys_is_missing_and_waits(place):
    # Given a key store that somebody else holds locked
    place.publish(request(1))
    place.configure(lease_s=0.6)
    done = place.run("run", "--until-idle")
    assert done.status == 0
    with contextlib.closing(sqlite3.connect(place.data / "keys.db", isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        running = place.start("run", sabotage=IMPATIENT)
        eventually(lambda: place.ask("/readyz")[1].startswith("workers "), "the worker does not come up")
        eventually(lambda: place.total("streamveil_retries_total") > 0, "its waiting is counted")
        assert place.samples()["streamveil_retries_total", ("error", "KeysBusy")] > 0
        assert running.poll() is None
    eventually(place.ready, "it comes up when the store is free")


# --- in one process: errors, and what waits -----------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """The registry of every worker that this process runs from now on."""
    made = CollectorRegistry()
    metrics = Metrics(made)
    monkeypatch.setattr(supervisor, "_watch", lambda _config: metrics)
    monkeypatch.setattr("streams.cli.run.load", lambda args: load(args)._replace(watch=None))
    return made


def counted(registry, name, **labels):
    return registry.get_sample_value(f"streamveil_{name}_total", labels)


def failing(monkeypatch, times, error):
    """Have the next commits fail."""
    commit, left = SqliteConsumer.commit, [error] * times

    async def fails(self, *args):
        if left:
            raise left.pop()
        await commit(self, *args)

    monkeypatch.setattr(SqliteConsumer, "commit", fails)


def test_batches_that_wait_are_counted_by_error_and_their_records_once(place, registry, monkeypatch):
    place.publish(*map(request, range(3)))
    failing(monkeypatch, 3, LogBusy())
    assert place.work() == 3
    assert counted(registry, "retries", error="LogBusy") == 3
    assert counted(registry, "retries", error="KeysBusy") == 0
    assert counted(registry, "records", type="request", outcome="emit", reason="") == 3


def test_what_a_batch_needs_is_counted_as_found_in_memory_or_not(place, registry, monkeypatch):
    def looked_up(kind):
        return tuple(counted(registry, "key_lookups", kind=kind, outcome=outcome) for outcome in ("hit", "miss"))

    # Given a request to somebody, whom a worker that begins does not know
    place.publish(request(1))
    assert place.work() == 1
    assert (looked_up("persons"), looked_up("epochs")) == ((0, 1), (0, 1))
    # When a batch is done again, by a worker that has fetched what it takes the first time
    place.publish(request(1))
    failing(monkeypatch, 1, LogBusy())
    assert place.work() == 1
    # Then all of it was in memory
    assert (looked_up("persons"), looked_up("epochs")) == ((1, 1), (1, 1))


def test_the_snapshots_that_a_worker_uses_are_told(place, registry, monkeypatch):
    # Given a snapshot of an opt-out, and another opt-out since
    assert place.call("optout", "add", "+14155550100").status == 0

    async def snapshot(deployment):
        kept = Snapshots(deployment.config.entries_dir, deployment.store.store_id)
        return await gather(deployment.log, kept, SUPPRESSIONS, 1)

    assert place.within(snapshot)
    (made,) = place.data.glob("entries/*.entries")
    assert place.call("optout", "add", "+14155550101").status == 0
    # When a worker has read both
    monkeypatch.setattr(worker_module, "LOOK_EVERY_S", 0.0)
    place.publish(*map(request, range(3)))
    assert place.work() == 3

    # Then it tells when the one was written, and how many people it holds beside it
    def told(name, stream):
        return registry.get_sample_value(f"streamveil_snapshot_{name}", {"stream": stream})

    assert told("timestamp_seconds", "suppressions") == pytest.approx(made.stat().st_mtime, abs=1e-3)
    assert told("changed_people", "suppressions") == 1
    assert (told("timestamp_seconds", "exemptions"), told("changed_people", "exemptions")) == (0, 0)


def test_a_worker_that_is_fenced_is_counted_and_ends(place, registry, monkeypatch):
    place.publish(request(1))
    failing(monkeypatch, 1, Fenced())
    assert place.call("run", "--until-idle").status == 1
    assert counted(registry, "fenced") == 1
    assert counted(registry, "batches", stream="traffic") == 0


def test_the_table_of_errors_decides_whether_a_worker_waits_or_ends(place, registry, monkeypatch):
    # Given a table that says to end for what is waited for now, and the other way round
    place.publish(request(1))
    failing(monkeypatch, 1, LogBusy())
    monkeypatch.setattr(errors, "ACTIONS", {errors.Retriable: Action.END, errors.Fatal: Action.WAIT})
    assert place.call("run", "--until-idle").status == 1
    failing(monkeypatch, 2, InputInvalid("for now"))
    assert place.work() == 1
    assert counted(registry, "retries", error="InputInvalid") == 2


def test_what_would_leave_in_the_clear_is_held_back_and_counted_until_it_is_mended(place, registry, monkeypatch):
    # Given a program that leaves the number in the envelope of what it seals
    place.publish(cdr(1))
    complete, done = Pipeline.complete, []

    def leaking(message):
        value = message.value.replace(b'"month":', b'"recipient":"+1","month":')
        return Message(message.timestamp_ms, message.key, message.headers, value)

    def clear(self, *args, **options):
        outputs = complete(self, *args, **options)
        if len(done) == 4:
            return outputs
        done.append(1)
        return [Output(one.stream, one.partition, list(map(leaking, one.messages))) for one in outputs]

    monkeypatch.setattr(Pipeline, "complete", clear)
    monkeypatch.setattr(supervisor, "selftest", lambda *_: None)
    assert place.work() == 1
    # Then nothing of it was committed, each try was counted, and the record went out once, sealed
    assert counted(registry, "unsealed_values", stream="cdr.pii") == counted(registry, "retries", error="Unsealed") == 4
    assert [set(value) for value in place.values("cdr.pii")] == [{"account_id", "month", "privacy", "sealed", "v"}]


def test_what_waits_is_known_by_partition_with_the_arrival_of_the_oldest(place):
    async def looked():
        log = SqliteLog.open(place.log_path, partitions=2, lease_s=10)
        consumers = log.consumer("a"), log.consumer("b")
        unread = Unread(log, consumers[0])
        assert await unread.look() == dict.fromkeys(INPUTS, ([0, 0], None))
        # Given records of different ages in both streams
        for stream, partition, ages in (("traffic", 0, (5, 4, 3)), ("traffic", 1, (9,)), ("traffic.cdr", 1, (7, 2))):
            for age in ages:
                await log.append([Output(stream, partition, [Message(1_000_000 - age * 1000, b"k", (), b"v")])])
        assert await unread.look() == {"traffic": ([3, 1], 991.0), "traffic.cdr": ([0, 2], 993.0)}
        # When this worker commits / Then it knows at once
        batches = [await consumers[0].poll(2, 0) for _ in range(1)]
        await consumers[0].commit(batches[0], [], lambda: None)
        assert await unread.look() == {"traffic": ([1, 1], 991.0), "traffic.cdr": ([0, 2], 993.0)}
        # When all but one is committed elsewhere, and deleted / Then it is known too
        await consumers[0].close()
        for _ in range(2):
            batch = await consumers[1].poll(2, 0)
            await consumers[1].commit(batch, [], lambda: None)
        await consumers[1].forget_consumed()
        left = await unread.look()
        assert sum(lag for lags, _ in left.values() for lag in lags) == 2
        assert left["traffic.cdr"] == ([0, 2], 993.0)
        assert left["traffic"] == ([0, 0], None)
        await log.close()

    place.data.mkdir()
    asyncio.run(looked())


def test_reads_for_the_age_of_what_waits_are_bounded():
    class Log:
        partitions = 40
        reads = 0

        async def end_offsets(self, _stream):
            return [100] * 40

        async def read(self, _stream, partition, offset, _limit):
            self.reads += 1
            return [type("Stored", (), {"timestamp_ms": 1000 * (offset + partition)})]

    class Consumer:
        offset = 10

        async def committed_offsets(self, stream):
            return [self.offset if stream == "traffic" else 100] * 40

    async def looked():
        log, consumer = Log(), Consumer()
        unread = Unread(log, consumer)
        for look in range(1, 4):
            found = await unread.look()
            assert found["traffic"] == ([90] * 40, 10.0)
            assert found["traffic.cdr"] == ([0] * 40, None)
            assert log.reads == min(40, look * READS)
        # When nothing moves / Then nothing is read again
        await unread.look()
        assert log.reads == 40
        # When it does / Then the arrivals follow in turns
        consumer.offset = 50
        for _ in range(4):
            found = await unread.look()
        assert found["traffic"] == ([50] * 40, 50.0)

    asyncio.run(looked())


def test_lag_and_age_reach_the_metrics_while_a_batch_is_under_way(place, registry, monkeypatch):
    # Given a worker that looks each time
    monkeypatch.setattr(worker_module, "LOOK_EVERY_S", 0.0)
    place.publish(*map(cdr, range(8)))
    seen = []
    process = worker_module.Worker._process

    async def looking(self, batch):
        places = [{"stream": "traffic.cdr", "partition": str(partition)} for partition in range(4)]
        seen.append(sum(registry.get_sample_value("streamveil_lag_records", one) for one in places))
        await process(self, batch)
        seen.append(len(batch.messages))

    monkeypatch.setattr(worker_module.Worker, "_process", looking)
    assert place.work() == 8
    # Then it told how much was left before each batch
    lags, sizes = seen[::2], seen[1::2]
    assert lags == [8 - sum(sizes[:at]) for at in range(len(sizes))]
    assert registry.get_sample_value("streamveil_key_cache_entries", {"kind": "persons"}) > 0


def _is_due_soon(days):
    """Return whether what came so many days ago is due within two days, whatever day of the week it is."""
    due_s = clock("acme", ago(days * 86_400 + 60)[:10], "8999-01-01T00:00:00Z").due_s
    return time.time() + 600 < due_s < time.time() + SOON_S


def test_near_misses_and_do_not_call_lists_reach_the_metrics(place, registry):
    # Given near misses, one overdue, one due soon, one decided, and one list that is loaded
    ages_days = {"late": 20, "soon": next(filter(_is_due_soon, range(9, 15))), "new": 0, "done": 1}
    for name, days in ages_days.items():
        place.publish(reply("pls stop this", record_id=name, occurred_at=ago(days * 86_400 + 60)))
        place.work()
        if name == "done":
            newest = place.call("review", "list", "--json").lines[-2]
            assert place.call("review", "decide", newest["place"], "dismiss", "--reason", "C-1").status == 0
    (place.folder / "us.txt").write_text("212,5550100\n")
    words = ("registry", "load", "us-dnc", place.folder / "us.txt", "--as-of", "2026-11-01T00:00:00Z")
    assert place.call(*words).status == 0
    # When a worker looks
    place.work()
    # Then it tells all of it, and that it has looked
    found = {name: registry.get_sample_value(f"streamveil_reviews_{name}") for name in
             ("undecided", "due_soon", "overdue", "died_undecided")}  # fmt: skip
    assert found == {"undecided": 3, "due_soon": 1, "overdue": 1, "died_undecided": 0}
    assert registry.get_sample_value("streamveil_reviews_seen_timestamp_seconds") > time.time() - 60
    dates = {name: registry.get_sample_value("streamveil_registry_as_of_timestamp_seconds", {"registry": name})
             for name in ("us-dnc", "uk-tps")}  # fmt: skip
    assert dates == {"us-dnc": datetime(2026, 11, 1, tzinfo=UTC).timestamp(), "uk-tps": 0}
    assert registry.get_sample_value("streamveil_registry_max_age_seconds", {"registry": "uk-tps"}) == 28 * 86_400


def test_a_worker_goes_on_when_near_misses_cannot_be_looked_at(place, registry, monkeypatch):
    before_s = registry.get_sample_value("streamveil_reviews_seen_timestamp_seconds")

    async def fails(_):
        raise LogUnusable("not yours to read", stream="review")

    monkeypatch.setattr(OpenReviews, "catch_up", fails)
    place.publish(request(1))
    assert place.work() == 1
    assert registry.get_sample_value("streamveil_reviews_seen_timestamp_seconds") == before_s


# --- nobody is in it ----------------------------------------------------------------------------------------------


def test_no_canary_is_in_any_metric_or_answer_in_any_spelling(place):
    # Given records with a value of its own in every field, accounts and ids too, and texts that are no record
    strays = ["Zebrafinch0417", "+14155557777", "zebra.finch@example.org"]
    broken = [f"{strays[0]} {strays[1]}".encode(), request(1, unknown=strays[2]), request(2, route=strays[0] * 3)]
    place.publish(*PLANTED.values(), *broken)
    running = place.start("run", "--workers", 2)
    eventually(lambda: place.committed() == len(PLANTED) + len(broken), "all is committed")
    eventually(lambda: place.total("streamveil_records_total") == len(PLANTED) + len(broken), "all is counted")
    # When everything is read that is served, and what the workers write it into
    (folder,) = place.folders
    shown = [place.ask(path)[1].encode() for path in PATHS] + [file.read_bytes() for file in folder.iterdir()]
    running.send_signal(signal.SIGTERM)
    assert place.ended(running).status == 0
    # Then there is something to see, of every kind of record, and no canary in it
    kinds = set()
    for line in shown[0].decode().splitlines():
        if line.startswith("streamveil_records_total") and not line.endswith(" 0.0"):
            kinds.add(line.partition('type="')[2].partition('"')[0])
    assert kinds == {"request", "cdr", "preference", "unreadable"}
    hay = haystack(*shown)
    for fields in PLANTED.values():
        assert found_in(hay, texts_of(fields).values()) == []
    assert found_in(hay, strays) == []
