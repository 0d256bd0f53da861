"""What can go wrong around a worker: one clear line, nothing leaks, and nothing is lost once it is mended."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import contextmanager

import pytest

from schemas.fields import PLATFORM
from streams.keys.kms_local import LocalKms
from tests.support.commands import SHORT_LEASE, Place, ago, eventually, one_line
from tests.support.records import DEFAULT_POLICY, LISTING_POLICY, PERSON, account, sms_cdr, sms_request, voice_cdr

WORDS = "words that are nobody's business"
LEASE_S = 2.5
LEAKS = (PERSON[1:], PERSON[-9:], WORDS, "Traceback")


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def records(count=20, prefix="r"):
    """Return as many requests as CDRs."""
    common = {"recipient": PERSON, "content": WORDS, "occurred_at": ago()}
    return [
        make(record_id=f"{prefix}{name}{n}", **common)
        for n in range(count)
        for name, make in (("q", sms_request), ("c", sms_cdr))
    ]


def counts(place):
    return {stream: place.ends(stream) for stream in ("verdicts", "cleared", "cdr.pii", "cdr.anonymous", "content")}


def all_done(place, count=20):
    """See that everything that was published has ended once, and opens."""
    assert counts(place) == dict.fromkeys(("verdicts", "cleared", "cdr.pii", "cdr.anonymous", "content"), count)
    assert {one["content"] for one in place.opened("content")} == {WORDS}
    return True


def clear_line(done, *, saying):
    line = one_line(done)
    assert saying in line
    assert not [leak for leak in LEAKS if leak in line]
    return line


# --- the root key ------------------------------------------------------------------------------------------------


def kms(place):
    return place.folder / "streamveil-kms"


def missing(place):
    shutil.move(kms(place), place.folder / "kept")
    return lambda: shutil.move(place.folder / "kept", kms(place))


def missing_file(place):
    (root,) = kms(place).glob("*.root")
    root.rename(place.folder / "kept")
    return lambda: (place.folder / "kept").rename(root)


def open_to_others(place):
    (root,) = kms(place).glob("*.root")
    root.chmod(0o644)
    return lambda: root.chmod(0o600)


def open_folder(place):
    kms(place).chmod(0o755)
    return lambda: kms(place).chmod(0o700)


def wrong(place):
    (root,) = kms(place).glob("*.root")
    content = root.read_bytes()
    LocalKms.create(other := place.folder / "other-kms", root.stem)
    root.write_bytes((other / root.name).read_bytes())
    return lambda: root.write_bytes(content)


def cut_short(place):
    (root,) = kms(place).glob("*.root")
    content = root.read_bytes()
    root.write_bytes(content[:-1])
    return lambda: root.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "saying"),
    [
        (missing, "root key missing beside an existing key store; restore it"),
        (missing_file, "root key missing beside an existing key store; restore it"),
        (open_to_others, "open to other users; run: chmod 600"),
        (open_folder, "open to other users; run: chmod 700"),
        (wrong, "or its root key is not; restore the right one"),
        (cut_short, "root key damaged; restore it"),
    ],
)
def test_without_its_root_key_nothing_runs_and_with_it_everything_does(place, spoil, saying):
    place.publish(*records(10, "a"))
    place.work()
    place.publish(*records(10, "b"))
    mend = spoil(place)
    before = place.committed()
    for words in (("run", "--until-idle"), ("tail", "cdr.pii", "--reveal", "--reason", "X"), ("optout", "add", PERSON)):
        done = place.call(*words)
        clear_line(done, saying=saying)
        assert done.out == ""
    assert place.committed() == before
    assert not list(kms(place).glob("*.root")) or spoil not in (missing, missing_file)  # none was made in its place
    mend()
    assert place.work() == 20
    assert all_done(place)


# --- locked ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(place, name):
    """Hold the write lock of a file, as another process would."""
    db = sqlite3.connect(place.data / name, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.execute("ROLLBACK")
        db.close()


def waiting(place, process):
    """Return the line that says what a worker waits for, once there is one."""
    eventually(lambda: "\n" in place.told(process), "a line")
    line = place.told(process).splitlines()[0]
    assert not [leak for leak in LEAKS if leak in line]
    return line


@pytest.mark.parametrize(
    ("name", "saying"),
    [("keys.db", "The key store is locked by another process"), ("log.db", "The log is locked by another process")],
)
def test_a_worker_waits_for_who_holds_a_file_and_finishes(place, name, saying):
    place.publish(*records(10, "a"))
    place.work()
    place.publish(*records(10, "b"))
    with locked(place, name):
        running = place.start("run", "--until-idle")
        assert f"streamveil: waiting: {saying}" in waiting(place, running)
        assert place.committed() == 20
    assert place.ended(running).status == 0
    assert all_done(place)


@pytest.mark.parametrize("name", ["keys.db", "log.db"])
def test_workers_in_the_middle_of_their_work_wait_too_and_none_is_fenced(place, name):
    # Given two workers, and a lock for longer than their leases
    place.configure(lease_s=LEASE_S)
    running = place.start("run", "--workers", 2)
    holders = "SELECT count(DISTINCT worker_id), min(expires_at) FROM leases"
    eventually(lambda: place.log_path.exists() and place.row(holders)[0] == 2, "both work")
    with locked(place, name):
        first_end = place.row(holders)[1]
        place.publish(*records(20))
        assert "streamveil: waiting: " in waiting(place, running)
        eventually(lambda: time.time() > first_end + 0.1, "their leases would be over")
        if name == "keys.db":  # then they are kept meanwhile
            assert place.row(holders)[0] == 2
            assert place.row(holders)[1] > first_end
    eventually(lambda: place.committed() == 40, "all is committed")
    running.send_signal(signal.SIGTERM)
    done = place.ended(running)
    assert done.status == 0, done.err
    assert not [leak for leak in LEAKS if leak in done.err]
    assert all_done(place)


def test_a_worker_that_waits_can_be_stopped(place):
    place.publish(*records(1))
    place.work()
    with locked(place, "keys.db"):
        running = place.start("run")
        waiting(place, running)
        running.send_signal(signal.SIGTERM)
        assert place.ended(running).status == 0


# --- corrupt -----------------------------------------------------------------------------------------------------


def spoiled(path, at, size=2000):
    content = bytearray(path.read_bytes())
    begin = int(len(content) * at)
    content[begin : begin + size] = bytes(byte ^ 0x5A for byte in content[begin : begin + size])
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["log.db", "log-traffic.db", "keys.db"])
@pytest.mark.parametrize("how", ["head", "start", "middle", "end", "cut", "text", "empty"])
def test_a_damaged_file_is_told_in_one_line_and_a_backup_mends_it(place, name, how):
    # Given a deployment with a backup
    place.publish(*records(10, "a"))
    place.work()
    place.publish(*records(10, "b"))
    path = place.data / name
    backup = path.read_bytes()
    # When a file is damaged
    if how == "cut":
        path.write_bytes(backup[: len(backup) // 2])
    elif how == "text":
        path.write_bytes(f"call {PERSON}, {WORDS}".encode() * 500)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        spoiled(path, {"head": 0, "start": 0.02, "middle": 0.5, "end": 0.9}[how], 20_000)
    done = place.call("run", "--until-idle")
    # Then either it was no place that matters here, or a line says what to do; no more
    if done.status != 0:
        clear_line(done, saying=f"file={path}" if "log" in name else "")
        assert any(word in done.err for word in ("restore", "check", "put it back", "put the right one"))
        assert "internal error" not in done.err
        path.write_bytes(backup)
        assert place.work() == 20
    assert not [leak for leak in LEAKS if leak in done.err]
    if name != "log.db" or done.status != 0:
        assert all_done(place)


def test_whichever_bytes_are_damaged_it_is_never_a_traceback_nor_a_bug(place):
    # Given a deployment, of which a copy is damaged again and again
    place.publish(*records(10, "a"), b"bad")
    place.work()
    place.publish(*records(10, "b"))
    chance = random.Random(20261121)
    for _ in range(20):
        name = chance.choice(("log.db", "log-traffic.db", "keys.db"))
        path = place.data / name
        content = bytearray(backup := path.read_bytes())
        for _ in range(chance.choice((1, 3, 20))):
            at, size = chance.randrange(len(content)), chance.choice((1, 4, 100, 4096))
            content[at : at + size] = chance.randbytes(len(content[at : at + size]))
        kept = {other: other.read_bytes() for other in place.data.iterdir() if other.is_file()}
        path.write_bytes(content)
        for words in (
            ("tail", "cdr.pii", "--reveal", "--reason", "X"), ("tail", "verdicts", "--json"), ("quarantine", "list"),
            ("keys", "status"), ("run", "--until-idle"),
        ):  # fmt: skip
            done = place.call(*words)
            assert done.status in (0, 1)
            assert not [leak for leak in (*LEAKS, "internal error") if leak in done.err], (name, words)
        for other, was in kept.items():
            other.write_bytes(was)
            other.chmod(0o600)
        path.write_bytes(backup)
    assert place.work() == 20


def test_a_lost_key_store_is_not_replaced_by_a_new_one(place):
    place.publish(*records(10, "a"))
    place.work()
    place.publish(*records(10, "b"))
    (place.data / "keys.db").rename(place.folder / "kept")
    clear_line(place.call("run", "--until-idle"), saying="restore it from its backup")
    assert not (place.data / "keys.db").exists()
    (place.folder / "kept").rename(place.data / "keys.db")
    assert place.work() == 20
    assert all_done(place)


# --- no room -----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder, size):
    """Mount a disk of its own at a folder; it grows when asked."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False, capture_output=True
    )
    if made.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("this system lets nobody mount a small disk")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_worker_waits_for_room_on_the_disk_and_goes_on(tmp_path):
    # Given more to do than the disk has room for
    with small_disk(tmp_path / "disk", "3m") as grow:
        place = Place(tmp_path / "disk", batch_records=200, **SHORT_LEASE)
        place.aside = tmp_path
        place.publish(*records(500))
        running = place.start("run", "--until-idle")
        assert "streamveil: waiting: The disk of the " in waiting(place, running)
        assert place.committed() < 1000
        assert running.poll() is None
        # When there is room
        grow("64m")
        done = place.ended(running)
        # Then it has finished, and each record ended once
        assert done.status == 0, done.err
        assert done.records == 1000
        assert not [leak for leak in LEAKS if leak in done.err]
        assert all_done(place, 500)


@pytest.mark.parametrize("left", range(0, 60, 12))
def test_wherever_the_disk_runs_full_it_is_one_line_and_the_next_run_does_it_all(tmp_path, left):
    # Given a disk with so many pages left at the start
    with small_disk(tmp_path / "disk", "64m") as grow:
        place = Place(tmp_path / "disk", **SHORT_LEASE)
        place.aside = tmp_path
        place.publish(*records(20))
        used = shutil.disk_usage(place.folder).used
        grow(used + left * 4096)
        running = place.start("run", "--until-idle")
        line = waiting(place, running)
        assert line.startswith("streamveil: waiting: The disk of the "), line
        assert "is full; free some space" in line
        running.send_signal(signal.SIGTERM)
        assert place.ended(running).status in (0, 1)
        grow("64m")
        assert place.work() == 40
        assert all_done(place)


def test_publishing_to_a_full_disk_is_one_line_and_is_gone_on_with(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as grow:
        place = Place(tmp_path / "disk", **SHORT_LEASE)
        place.aside = tmp_path
        file = place.file(*records(2500))
        done = place.run("publish", file)
        assert done.status == 1
        assert "The disk of the log is full; free some space" in done.err
        assert not [leak for leak in LEAKS if leak in done.err]
        grow("64m")
        assert place.call("publish", file).status == 0
        assert place.work() == 5000


@pytest.mark.parametrize(("store", "saying"), [("_main", "The disk of the log"), ("keys", "The disk of the key store")])
def test_a_store_that_may_not_grow_is_waited_for(place, store, saying):
    """The same without a disk of its own: SQLite is told that there is no page left."""
    people = [one | {"recipient": f"+1415555{n:04}"} for n, one in enumerate(records(600))]
    place.publish(*people)
    full = {
        "_main": """
from streams.log.sqlite import SqliteConsumer
poll = SqliteConsumer.poll
async def limited(self, *args):
    self._main.db.execute(f"PRAGMA max_page_count = {limit()}")
    return await poll(self, *args)
SqliteConsumer.poll = limited
""",
        "keys": """
from streams.keys.sqlite import SqliteKeyStore
fetch = SqliteKeyStore.fetch
def limited(self, *args):
    self._db.execute(f"PRAGMA max_page_count = {limit()}")
    return fetch(self, *args)
SqliteKeyStore.fetch = limited
""",
    }[store]
    grown = place.folder / "grown"
    head = f"from pathlib import Path\ndef limit():\n    return 10**6 if Path({str(grown)!r}).exists() else 1\n"
    running = place.start("run", "--until-idle", sabotage=head + full)
    assert f"streamveil: waiting: {saying} is full" in waiting(place, running)
    grown.touch()
    done = place.ended(running)
    assert (done.status, done.records) == (0, 1200)
    assert all_done(place, 600)


# --- keys that change under a batch ------------------------------------------------------------------------------

SLEEPS_BEFORE_ITS_FIRST_COMMIT = """
import time
from streams.log.sqlite import SqliteConsumer
commit = SqliteConsumer.commit
async def late(self, *args):
    SqliteConsumer.commit = commit
    time.sleep(0.7)
    await commit(self, *args)
SqliteConsumer.commit = late
"""
SLOW_GUARD = """
import time
from pathlib import Path
from streams.keys.cache import KeyCache
guard = KeyCache.guard
def late(self, *margin):
    KeyCache.guard = guard
    check = guard(self, *margin)
    Path({flag!r}).touch()
    while not Path({go!r}).exists():
        time.sleep(0.01)
    self._lease.renew()
    return check
KeyCache.guard = late
"""


def test_a_batch_whose_key_lease_ran_out_before_its_commit_is_prepared_anew(place):
    place.configure(key_lease_s=0.5, **SHORT_LEASE)
    place.publish(*records(20))
    done = place.run("run", "--until-idle", sabotage=SLEEPS_BEFORE_ITS_FIRST_COMMIT)
    assert (done.status, done.records) == (0, 40)
    assert done.err.startswith("streamveil: waiting: The key lease ran out before the commit;")
    assert all_done(place)


def test_what_was_sealed_before_a_person_was_destroyed_is_not_committed_after(place):
    # Given a batch that is sealed, and not yet committed when its person is destroyed and the worker hears of it
    place.publish(sms_cdr(record_id="c1", recipient=PERSON, occurred_at=ago()))
    flag, go = place.folder / "sealed", place.folder / "go"
    running = place.start("run", "--until-idle", sabotage=SLOW_GUARD.format(flag=str(flag), go=str(go)))
    eventually(flag.exists, "it is sealed")

    async def destroy(deployment):
        deployment.store.destroy_persons(PLATFORM, [deployment.tokens.of(PERSON)])

    place.within(destroy)
    go.touch()
    # Then it is sealed anew, under a new secret
    done = place.ended(running)
    assert (done.status, done.records) == (0, 1)
    assert "A key was destroyed, or passed its deadline, while the batch was under way." in done.err
    assert [one["record_id"] for one in place.opened("cdr.pii")] == ["c1"]


# --- bugs, policies, accounts ------------------------------------------------------------------------------------


def test_a_bug_that_one_record_meets_quarantines_that_record_and_the_rest_goes_on(place):
    place.publish(*records(5), voice_cdr(record_id="the-one", recipient=PERSON, transcript=WORDS, occurred_at=ago()))
    bug = """
from processors.pipeline import _Preparation
cdr = _Preparation._cdr
def buggy(self, record, *args):
    if record.record_id == "the-one":
        raise KeyError(record.recipient, record.transcript)
    return cdr(self, record, *args)
_Preparation._cdr = buggy
"""
    done = place.run("run", "--until-idle", sabotage=bug)
    assert (done.status, done.records) == (0, 11)
    assert "1 quarantine internal_error" in done.err
    assert not [leak for leak in LEAKS if leak in done.err]
    assert all_done(place, 5)
    (entry,) = place.call("quarantine", "list", "--json").lines
    assert (entry["reason"], entry["state"]) == ("internal_error", "open")
    # and once the bug is mended, it is replayed
    assert place.call("quarantine", "replay", "--all", "--reason", "FIXED-1").status == 0
    assert place.work() == 1
    assert "the-one" in {one["record_id"] for one in place.opened("cdr.pii")}


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        (("any = true", "any = false"), "no account is served"),
        (('keep = "30 days"', 'keep = "a while"'), "content is kept"),
        (("version = 1", "version = 7"), "version"),
        (("[coarsening]", "[coarsening]\ncolour = 1"), "colour"),
        (('event = "communication"', 'event = "relationship_end"'), "communication"),
        (("[platform]", "["), "line"),
    ],
)
def test_a_contradictory_policy_is_one_line_with_its_place_and_nothing_runs(place, change, saying):
    place.publish(*records(5))
    good = DEFAULT_POLICY
    place.policy(good.replace(*change, 1))
    line = clear_line(place.call("run", "--until-idle"), saying=saying)
    assert "line" in line
    assert str(place.folder / "policy.toml") in line
    assert place.committed() == 0
    (place.folder / "policy.toml").write_text(good)
    assert place.work() == 10


def test_an_agreement_twice_for_the_same_days_is_refused(place):
    role = """
[[account.role]]
data_class = "content"
role = "controller"
agreement = "{}"
from = 2023-01-01
clause = "KAL-1"
"""
    place.policy(LISTING_POLICY + account() + role.format("A 1") + role.format("A 2"))
    clear_line(place.call("run", "--until-idle"), saying="two agreements on content for the same days")


def test_under_a_listing_policy_an_unknown_account_is_quarantined_and_can_be_replayed(place):
    place.policy(LISTING_POLICY + account())
    stranger = {"recipient": PERSON, "account_id": "stranger", "occurred_at": ago()}
    place.publish(*records(3), sms_request(record_id="s1", **stranger), sms_cdr(record_id="s2", **stranger))
    done = place.call("run", "--until-idle")
    assert (done.status, done.records) == (0, 8)
    assert "2 quarantine account_unknown" in done.err
    assert all_done(place, 3)
    # When the account is listed
    with (place.folder / "policy.toml").open("a") as file:
        file.write(account("stranger"))
    place.call("quarantine", "replay", "--all", "--reason", "LISTED")
    assert place.work() == 2
    assert place.verdicts()["s1"] == ("cleared", None)
    assert "s2" in {one["record_id"] for one in place.opened("cdr.pii")}


def test_a_damaged_registry_ends_the_worker_and_nothing_is_cleared_meanwhile(place):
    numbers = place.folder / "list.txt"
    numbers.write_text("415,5550100\n")
    assert place.call("registry", "load", "us-dnc", numbers).status == 0
    place.publish(*records(5))
    (bitmap,) = (place.data / "registries").glob("*.bitmap")
    content = bitmap.read_bytes()
    bitmap.write_bytes(content[: len(content) // 2])
    clear_line(place.call("run", "--until-idle"), saying="load the registry again")
    assert place.committed() == 0
    bitmap.write_bytes(content)
    assert place.work() == 10


def test_the_self_test_stops_a_worker_whose_policy_would_let_something_out(place):
    place.publish(*records(2))
    leak = """
import processors.pipeline as p
from schemas.fields import PrivacyClass
of = p.classes_of
p.classes_of = lambda *structs: of(*structs) | {"location": PrivacyClass.BILLING}
"""
    done = place.run("run", "--until-idle", sabotage=leak)
    clear_line(done, saying="self-test failed: location")
    assert place.committed() == 0
    assert place.work() == 4


def test_a_record_of_two_megabytes_does_not_stop_the_others(place):
    place.publish(*records(2), sms_cdr(record_id="big", content="x" * 2_000_000, occurred_at=ago()))
    done = place.call("run", "--until-idle")
    assert "1 quarantine too_large" in done.err
    assert all_done(place, 2)
    assert [len(one["record"]) > 2_000_000 for one in place.opened("quarantine")] == [True]


def test_a_log_that_may_not_be_written_is_one_line(place):
    place.publish(*records(2))
    read_only = """
import sqlite3
connect = sqlite3.connect
def read_only(*args, **options):
    db = connect(*args, **options)
    db.execute("PRAGMA query_only=ON")
    return db
sqlite3.connect = read_only
"""
    clear_line(place.run("run", "--until-idle", sabotage=read_only), saying="cannot be written")
    assert place.work() == 4
