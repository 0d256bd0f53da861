"""`streamveil run` on real files: stopped, killed, woken too late, several at once; and no clear traffic stays."""

import json
import os
import re
import signal
import sqlite3
import time
from collections import Counter

import pytest

from tests.support.commands import SHORT_LEASE, Place, ago, eventually, is_stopped, one_line
from tests.support.records import reply, sms_cdr, sms_request, voice_cdr

LONG_LEASE = {"lease_s": 4.0}
SLOW = """
import time
from processors.pipeline import Pipeline
prepare = Pipeline.prepare
def slow(self, *args):
    time.sleep(0.02)
    return prepare(self, *args)
Pipeline.prepare = slow
"""
STOPS_BEFORE_COMMIT = """
import os, signal
from streams.log.sqlite import SqliteConsumer
commit = SqliteConsumer.commit
async def late(self, *args):
    os.kill(os.getpid(), signal.SIGSTOP)
    await commit(self, *args)
SqliteConsumer.commit = late
"""
STOPS_BETWEEN_BATCHES = """
import os, signal
from pathlib import Path
from streams.log.sqlite import SqliteConsumer
poll = SqliteConsumer.poll
async def late(self, *args):
    if Path({flag!r}).exists():
        SqliteConsumer.poll = poll
        os.kill(os.getpid(), signal.SIGSTOP)
    return await poll(self, *args)
SqliteConsumer.poll = late
"""
STOPS_IN_COMMIT = """
import os, signal
from streams.keys.cache import KeyCache
guard = KeyCache.guard
def late(self, *margin):
    check = guard(self, *margin)
    def stopped():
        os.kill(os.getpid(), signal.SIGSTOP)
        KeyCache.guard = guard
        check()
    return stopped
KeyCache.guard = late
"""


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def request(number, **fields):
    person = f"+1415555{number % 10_000:04}"
    common = {"record_id": f"r{number}", "recipient": person, "occurred_at": ago(), "content": f"text {number}"}
    return sms_request(**{**common, **fields})


def cdr(number, **fields):
    common = {"record_id": f"c{number}", "recipient": f"+1415555{number % 10_000:04}", "occurred_at": ago()}
    return sms_cdr(**{**common, **fields})


def ids(place, stream="verdicts"):
    return Counter(value["record_id"] for value in place.values(stream))


# --- to the end of the input -------------------------------------------------------------------------------------


def test_on_an_empty_deployment_it_ends_at_once_and_well(place):
    done = place.run("run", "--until-idle")
    assert (done.status, done.out, done.err) == (0, "", "streamveil: 0 records\n")


def test_it_says_how_the_records_ended(place):
    place.publish(request(1), request(2, recipient=""), cdr(3), b"not json", cdr(4, occurred_at="2001-01-01T00:00:00Z"))
    done = place.run("run", "--until-idle")
    told = {" ".join(line.split()) for line in done.err.splitlines()}
    assert told == {
        "streamveil: 5 records", "2 emit", "1 refuse no_recipient", "1 quarantine not_json",
        "1 expired older_than_everything",
    }  # fmt: skip


def test_what_is_committed_gets_no_second_outcome_from_a_restart(place):
    place.publish(*map(request, range(5)), *map(cdr, range(5)))
    assert place.work() == 10
    before = {stream: place.stored(stream) for stream in ("verdicts", "cleared", "cdr.pii", "cdr.anonymous", "content")}
    assert [place.work(), place.work()] == [0, 0]
    assert {stream: place.stored(stream) for stream in before} == before


def test_several_workers_share_the_partitions(place):
    place.configure(**LONG_LEASE)
    # Given two workers in balance
    running = place.start("run", "--workers", 2)
    shares = (
        "SELECT group_concat(n) FROM (SELECT count(*) AS n FROM leases WHERE worker_id NOT NULL GROUP BY worker_id)"
    )
    eventually(lambda: place.log_path.exists() and place.row(shares) == ("2,2",), "two partitions each")
    # When there is traffic in every partition
    place.publish(*map(request, range(200)))
    eventually(lambda: place.committed() == 200, "all is committed")
    running.send_signal(signal.SIGTERM)
    # Then both have done some of it
    done = place.ended(running)
    assert done.status == 0
    counts = [int(count) for count in re.findall(r"streamveil: (\d+) records", done.err)]
    assert sum(counts) == 200
    assert all(counts)
    assert len(counts) == 2
    assert ids(place) == Counter(f"r{number}" for number in range(200))


def test_several_workers_until_idle_do_everything_once(place):
    place.configure(**LONG_LEASE)
    place.publish(*map(request, range(300)), *map(cdr, range(300)))
    done = place.run("run", "--workers", 2, "--until-idle")
    assert (done.status, done.records) == (0, 600)
    assert ids(place) == Counter(f"r{number}" for number in range(300))
    assert place.ends("cdr.pii") == place.ends("cdr.anonymous") == 300


def test_a_worker_of_several_that_fails_stops_the_others_in_one_line_of_its_own(place):
    # Given a policy that only the children come to see
    place.publish(request(1))
    place.policy("version = 1\n")
    done = place.run("run", "--workers", 2)
    assert done.status == 1
    assert "Traceback" not in done.err


def test_many_publish_run_and_tail_at_once(place):
    place.configure(**LONG_LEASE)
    # Given three gateways, two workers and two readers on one deployment that nobody has made yet
    files = [place.file(*[request(part * 100 + n) for n in range(100)]) for part in range(3)]
    workers = place.start("run", "--workers", 2)
    gateways = [place.start("publish", file) for file in files]
    eventually(place.log_path.exists, "a log")
    outputs = [place.folder / "verdicts.out", place.folder / "cleared.out"]
    tails = []
    for path in outputs:
        with path.open("wb") as out:
            tails.append(place.start("tail", path.stem, "--from-beginning", "--follow", "--json", out=out))
    # When all of it is through
    assert [place.ended(one).status for one in gateways] == [0, 0, 0]
    eventually(lambda: place.committed() == 300, "all is committed")
    eventually(lambda: all(path.read_bytes().count(b"\n") == 300 for path in outputs), "all is shown")
    for process in (*tails, workers):
        process.send_signal(signal.SIGINT)
    # Then each reader has seen each record once, and everybody ends without a word of trouble
    for path in outputs:
        seen = [json.loads(line)["value"]["record_id"] for line in path.read_text().splitlines()]
        assert Counter(seen) == Counter(f"r{number}" for number in range(300))
    assert [place.ended(one).status for one in tails] == [130, 130]
    done = place.ended(workers)
    assert (done.status, done.records) == (0, 300)
    assert "Traceback" not in done.err


# --- stopped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_ends_well_and_the_next_goes_on_where_it_was(place, stop):
    # Given a worker in the middle of a file
    place.configure(batch_records=10, **SHORT_LEASE)
    place.publish(*map(request, range(1000)))
    first = place.start("run", sabotage=SLOW)
    eventually(lambda: place.committed() > 0, "a batch is committed")
    # When it is told to stop
    first.send_signal(stop)
    done = place.ended(first)
    # Then it ends well, and what it did is committed, no more and no less
    assert done.status == 0
    assert "Traceback" not in done.err
    assert 0 < done.records < 1000
    assert place.committed() == done.records == place.ends("verdicts")
    # and has given its partitions back, so that nobody waits for its lease
    assert place.row("SELECT count(*) FROM leases WHERE worker_id NOT NULL") == (0,)
    assert place.work() == 1000 - done.records
    assert ids(place) == Counter(f"r{number}" for number in range(1000))


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_while_it_starts_it_ends_well_too(place, workers):
    place.publish(request(1))
    running = place.start("run", "--workers", workers)
    eventually((place.data / "keys.db").exists, "it has begun to start")
    running.send_signal(signal.SIGTERM)
    done = place.ended(running)
    assert done.status == 0
    assert "Traceback" not in done.err
    assert place.work() + done.records == 1
    assert place.verdicts() == {"r1": ("cleared", None)}


# --- zombies -----------------------------------------------------------------------------------------------------


def test_a_zombie_is_fenced_and_repeats_nothing(place):
    # Given a worker that falls asleep with a batch in its hands
    place.publish(*map(request, range(50)), *map(cdr, range(50)))
    zombie = place.start("run", sabotage=STOPS_BEFORE_COMMIT)
    eventually(lambda: is_stopped(zombie), "it sleeps")
    # When another takes over and does it all, and the first wakes up
    assert place.work() == 100
    zombie.send_signal(signal.SIGCONT)
    # Then it ends with one line, and nothing of what it held is there twice
    line = one_line(place.ended(zombie))
    assert "Another worker took this partition over; this one must end." in line
    assert ids(place) == Counter(f"r{number}" for number in range(50))
    assert place.ends("cleared") == place.ends("cdr.pii") == place.ends("cdr.anonymous") == 50
    assert place.work() == 0


def test_a_zombie_that_wakes_between_batches_goes_on_with_what_is_free(place):
    place.publish(request(1))
    flag = place.folder / "sleep"
    zombie = place.start("run", sabotage=STOPS_BETWEEN_BATCHES.format(flag=str(flag)))
    eventually(lambda: place.committed() == 1, "it works")
    flag.touch()
    eventually(lambda: is_stopped(zombie), "it sleeps")
    place.publish(*map(request, range(2, 52)))
    assert place.work() == 50
    zombie.send_signal(signal.SIGCONT)
    place.publish(*map(request, range(52, 102)))
    eventually(lambda: place.committed() == 101, "it works again")
    zombie.send_signal(signal.SIGTERM)
    assert place.ended(zombie)[0] == 0
    assert ids(place) == Counter(f"r{number}" for number in range(1, 102))


def test_a_worker_that_sleeps_inside_its_commit_is_waited_for_and_not_fenced(place):
    # Given a worker asleep with the log locked
    place.configure(lease_s=1.5)
    place.publish(*map(request, range(50)))
    sleeper = place.start("run", "--until-idle", sabotage=STOPS_IN_COMMIT)
    eventually(lambda: is_stopped(sleeper), "it sleeps")
    other = place.start("run", "--until-idle")
    time.sleep(2)
    # When it wakes after its lease
    sleeper.send_signal(signal.SIGCONT)
    # Then its commit stands, and the other does the rest
    first, second = place.ended(sleeper), place.ended(other)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert first.records > 0
    assert first.records + second.records == 50
    assert ids(place) == Counter(f"r{number}" for number in range(50))


# --- clear traffic -----------------------------------------------------------------------------------------------


def planted(start=0, count=40):
    """Return records and the bytes of them that must not stay."""
    records, canaries = [], []
    for number in range(start, start + count):
        person, other = f"+1415777{number:04}", f"+1415888{number:04}"
        records += [
            request(number) | {"recipient": person, "content": f"content-canary-{number}-q"},
            reply(f"content-canary-{number}-r", record_id=f"m{number}", sender=person, occurred_at=ago()),
            voice_cdr(record_id=f"v{number}", recipient=person, sender=other, occurred_at=ago()),
            f"opaque-canary-{number}-{person}".encode(),
        ]
        canaries += [person[1:], other[1:], f"content-canary-{number}", f"opaque-canary-{number}"]
    return records, [canary.encode() for canary in canaries]


DIES_IN_APPEND = """
import os, signal
from streams.log import sqlite
insert = sqlite._File.insert
left = 4
def dying(self, output):
    global left
    self.db.execute("PRAGMA cache_size = 1")
    insert(self, output)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
sqlite._File.insert = dying
"""
DIES_BEHIND_COMMIT = """
import os, signal
from streams.log.sqlite import SqliteConsumer
commit = SqliteConsumer.commit
async def dying(self, *args):
    await commit(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
SqliteConsumer.commit = dying
"""


def still_in(place, canaries):
    """Return the files of the deployment that hold one of them; a file may go while it is looked for."""
    found = []
    for path in place.files():
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        if any(canary in content for canary in canaries):
            found.append(path.name)
    return found


def test_when_run_until_idle_ends_no_file_holds_a_byte_of_clear_traffic(place):
    records, canaries = planted()
    place.publish(*records)
    assert still_in(place, canaries) == ["log-traffic.db"]
    # a gateway that stays connected keeps the WAL from being deleted
    gateway = sqlite3.connect(place.data / "log-traffic.db")
    gateway.execute("SELECT count(*) FROM rows").fetchone()
    assert place.run("run", "--until-idle").status == 0
    assert (place.data / "log-traffic.db-wal").exists()
    assert still_in(place, canaries) == []
    gateway.close()


def test_while_a_worker_runs_clear_traffic_is_gone_within_its_bound(place):
    # Given a worker that goes on, and traffic that it has committed
    running = place.start("run")
    records, canaries = planted()
    place.publish(*records)
    eventually(lambda: place.committed() == len(records), "all is committed")
    committed = time.monotonic()
    # Then 60 s later it is nowhere, WAL and shared memory included, though nothing else happens
    eventually(lambda: not still_in(place, canaries), "clear traffic is gone")
    assert time.monotonic() - committed < 60
    assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    assert place.ended(running).status == 0


def test_what_killed_processes_left_is_gone_after_the_next_run(place):
    # Given a gateway killed inside an append, of which a part has reached the disk, and a worker behind a commit
    records, canaries = planted()
    more, more_canaries = planted(100)
    place.publish(*records)
    file = place.file(*more)
    assert place.run("publish", file, sabotage=DIES_IN_APPEND).status == -signal.SIGKILL
    assert still_in(place, more_canaries) == ["log-traffic.db-wal"]
    assert place.run("run", sabotage=DIES_BEHIND_COMMIT).status == -signal.SIGKILL
    assert 0 < place.committed() < len(records)
    assert still_in(place, canaries)
    # When
    assert place.run("run", "--until-idle").status == 0
    # Then
    assert still_in(place, canaries + more_canaries) == []
    # and what the killed gateway had not published is published by the next
    assert place.run("publish", file).status == 0
    assert place.work() == len(more)


def test_a_reader_in_the_way_is_waited_for(place):
    # Given somebody who reads the file of clear traffic
    records, canaries = planted()
    place.publish(*records)
    reader = sqlite3.connect(place.data / "log-traffic.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM rows").fetchone()
    running = place.start("run", "--until-idle")
    eventually(lambda: place.committed() == len(records), "all is committed")
    time.sleep(2)
    # Then the worker does not end before the reader has
    assert running.poll() is None
    reader.execute("ROLLBACK")
    assert place.ended(running).status == 0
    assert still_in(place, canaries) == []
    reader.close()


def test_every_file_is_private(place):
    umask = os.umask(0)
    try:
        place.publish(request(1))
        place.run("run", "--until-idle")
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in place.files()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (place.data, place.folder / "streamveil-kms")} == {0o700}
