"""`streamveil keys`: what it shows, destroys and refuses, and what a store or a key service out of order does."""

import contextlib
import json
import shutil
import sqlite3
import time

import pytest

from tests.support.commands import SHORT_LEASE, Place, ago, eventually, one_line
from tests.support.records import sms_cdr, sms_request

PERSON, OTHER = "+4915112345678", "+14155550123"


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def at(days):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + days * 86_400))


def fill(place, first=0, count=3):
    place.publish(
        *(
            sms_cdr(record_id=f"c-{n}", recipient=f"+1415555{n:04}", content="Your parcel is here", occurred_at=ago())
            for n in range(first, first + count)
        )
    )
    assert place.work() == count


def summary(place):
    *_, last = place.call("keys", "status", "--json").lines
    return last["summary"]


# --- status ------------------------------------------------------------------------------------------------------


def test_status_tells_how_many_keys_there_are_and_how_many_there_may_be(place):
    fill(place)
    done = place.call("keys", "status")
    assert done.status == 0
    found = summary(place)
    assert found["keks"] == len(found["destruction_days"]) <= found["most_destruction_days"]
    assert (found["token_key"], found["other_token_keys"], found["token_rotation"]) == (1, [], False)
    assert (found["sequence"], found["counter"], found["lost_keks"]) == (0, 0, [])
    for text in (
        f"{found['keks']} key-encryption keys alive", f"at most {found['most_destruction_days']} days",
        "24 h at most", "can undo a deletion for 0 h", "no backup opens anything that was destroyed",
    ):  # fmt: skip
        assert text in done.out


def test_the_days_that_keys_are_under_are_among_those_that_the_policy_can_make(place):
    from argparse import Namespace

    from streams.config import load
    from streams.officer.upkeep import destruction_days

    late = [at(-days) for days in (0, 1, 29, 31, 60, 200, 360)]
    place.publish(
        *(sms_cdr(record_id=f"c-{n}", recipient=PERSON, occurred_at=when) for n, when in enumerate(late)),
        sms_request(record_id="r-1", recipient=OTHER, occurred_at=ago()),
        b"no record",
    )
    place.work()
    possible = destruction_days(load(Namespace(config=str(place.config), log=place.url)).policy, int(time.time()))
    days = set(summary(place)["destruction_days"])
    assert len(days) > 6
    assert days <= possible


# --- rotation ----------------------------------------------------------------------------------------------------


def test_every_part_is_rotated_under_workers_and_nothing_is_lost(place):
    running = place.start("run", "--workers", 2)
    sent = 0
    for part in (("root",), ("wrapping",), ("token",), (), ("wrapping", "root")):
        place.publish(
            *(
                sms_cdr(record_id=f"c-{sent + n}", recipient=f"+1415555{n:04}", content="x", occurred_at=ago())
                for n in range(40)
            )
        )
        sent += 40
        done = place.call("keys", "rotate", *part)
        assert done.status == 0, done.err
        assert "take a new backup" in done.err
    eventually(lambda: place.committed() == sent, "all is committed")
    running.terminate()
    assert place.ended(running).status == 0
    assert len(place.opened("cdr.pii")) == len(place.opened("content")) == sent
    assert summary(place)["token_key"] == 3
    names = [one["value"]["action"] for one in place.tail("audit")]
    assert names.count("rotate") == names.count("rotated") == 5


def test_after_a_rotation_of_the_wrapping_keys_each_day_has_one_key_and_a_copy_from_before_opens_nothing(place):
    fill(place)
    before = summary(place)
    copy = place.folder / "copy.db"
    with (
        contextlib.closing(sqlite3.connect(place.data / "keys.db")) as a,
        contextlib.closing(sqlite3.connect(copy)) as b,
    ):
        a.backup(b)
    copy.chmod(0o600)
    assert place.call("keys", "rotate", "wrapping").status == 0
    after = summary(place)
    assert (after["keks"], after["destruction_days"]) == (before["keks"], before["destruction_days"])
    assert len(place.opened("cdr.pii")) == 3
    for path in place.data.glob("keys.db*"):
        path.unlink()
    shutil.copy(copy, place.data / "keys.db")
    assert "restored from a backup" in one_line(place.call("keys", "status"))
    assert one_line(place.call("keys", "reconcile"))
    assert "restored from a backup" in one_line(
        place.call("tail", "cdr.pii", "--from-beginning", "--reveal", "--reason", "R")
    )


def test_only_root_wrapping_and_token_are_rotated(place):
    fill(place)
    assert "any of root, wrapping, token" in one_line(place.call("keys", "rotate", "everything"))
    assert summary(place)["sequence"] == 0


# --- destroy-due -------------------------------------------------------------------------------------------------


def test_ahead_of_the_clock_it_only_says_what_would_go_and_with_yes_it_goes(place):
    fill(place)
    done = place.call("keys", "destroy-due", "--now", at(40), "--json")
    assert (done.status, done.lines[0]["dry"]) == (0, True)
    assert done.lines[0]["epochs"] >= 1
    assert len(place.opened("content")) == 3
    again = place.call("keys", "destroy-due", "--now", at(40), "--yes", "--json")
    assert {**again.lines[0], "dry": True, "persons": 0, "now": None} == {**done.lines[0], "now": None}
    assert {one["reveal"]["state"] for one in place.tail("content", "--reveal", "--reason", "R")} == {"destroyed"}
    assert len(place.opened("cdr.pii")) == 3
    assert place.call("keys", "destroy-due", "--json").lines[0]["epochs"] == 0
    (destroyed,) = [one["value"]["destroyed"] for one in place.tail("audit") if "destroyed" in one["value"]]
    assert any(name.startswith("content/acme/") for name in destroyed["epochs"])


def test_a_now_that_is_past_or_too_far_ahead_destroys_nothing(place):
    fill(place)
    before = place.call("keys", "status").out
    for now, more in ((at(-2), ()), (at(-2), ("--yes",)), (at(430), ("--yes",)), ("yesterday", ()), (PERSON, ())):
        line = one_line(place.call("keys", "destroy-due", "--now", now, *more))
        assert PERSON[1:] not in line
    assert place.call("keys", "status").out == before


def test_nothing_is_due_before_its_instant(place):
    fill(place)
    (due,) = place.call("keys", "destroy-due", "--json").lines
    assert due == {"now": due["now"], "dry": False, "epochs": 0, "persons": 0, "days": []}
    assert len(place.opened("content")) == 3


# --- out of order ------------------------------------------------------------------------------------------------

READ_ONLY = """
import sqlite3
connect = sqlite3.connect
def read_only(path, *args, **options):
    db = connect(path, *args, **options)
    if "keys.db" in str(path):
        db.execute("PRAGMA query_only=ON")
    return db
sqlite3.connect = read_only
"""
FULL = """
from streams.keys.sqlite import SqliteKeyStore
begun = SqliteKeyStore._begun
def limited(self, mode):
    self._db.execute("PRAGMA max_page_count = 1")
    return begun(self, mode)
SqliteKeyStore._begun = limited
"""


@pytest.mark.parametrize("words", [("rotate",), ("destroy-due", "--now", "AHEAD", "--yes")])
def test_a_store_that_may_not_be_written_is_one_line_and_nothing_is_lost(place, words):
    fill(place)
    words = [at(40) if word == "AHEAD" else word for word in words]
    line = one_line(place.run("keys", *words, sabotage=READ_ONLY))
    assert "key store" in line
    assert len(place.opened("cdr.pii")) == 3
    assert place.call("keys", *words).status == 0
    assert len(place.opened("cdr.pii")) == 3


def test_a_store_that_may_not_grow_still_destroys(place):
    """What is destroyed is overwritten where it lies."""
    fill(place)
    done = place.run("keys", "destroy-due", "--now", at(40), "--yes", sabotage=FULL)
    assert done.status in (0, 1)
    assert done.status == 0 or "The disk of the key store is full" in done.err
    assert place.call("keys", "destroy-due", "--now", at(40), "--yes").status == 0
    assert {one["reveal"]["state"] for one in place.tail("content", "--reveal", "--reason", "R")} == {"destroyed"}


def change(place, statement):
    with contextlib.closing(sqlite3.connect(place.data / "keys.db")) as db, db:
        db.execute(statement)


@pytest.mark.parametrize(
    ("statement", "saying"),
    [
        ("UPDATE meta SET value = '99' WHERE name = 'schema'", "another version"),
        ("DROP TABLE stale", "key store"),
        ("DROP TABLE marks", "key store"),
        ("ALTER TABLE epoch_keys RENAME COLUMN kek TO day", "key store"),
    ],
)
def test_a_store_of_a_newer_version_or_half_migrated_is_one_line_and_nothing_runs(place, statement, saying):
    fill(place)
    before = place.ends("cdr.pii")
    change(place, statement)
    place.publish(sms_cdr(record_id="c-9", recipient=PERSON, occurred_at=ago()))
    for words in (("keys", "status"), ("keys", "rotate"), ("keys", "reconcile"), ("run", "--until-idle")):
        line = one_line(place.run(*words))
        assert saying in line, words
        assert "internal error" not in line
    with contextlib.closing(sqlite3.connect(place.log_path)) as db:
        (end,) = db.execute("SELECT sum(next_offset) FROM ends WHERE stream = 'cdr.pii'").fetchone()
    assert end == before


def test_a_key_deleted_behind_our_back_stops_sealing_loses_nothing_and_is_gone_on_with_when_it_is_back(place):
    # Given the key that all of a month's records are under is gone
    fill(place)
    (pii,) = [one for one in place.call("keys", "status", "--json").lines if one.get("domain") == "pii"]
    keks = sorted((place.folder / "streamveil-kms").glob("*.kek"))
    (kek,) = [path for path in keks if pii["deadline"] and path.name.split(".")[1] == day_before(pii["deadline"])]
    content = kek.read_bytes()
    kek.unlink()
    # When
    place.publish(sms_cdr(record_id="c-9", recipient=PERSON, content="x", occurred_at=ago()))
    running = place.start("run", "--until-idle")
    eventually(lambda: "streamveil: waiting: " in place.told(running), "it waits")
    time.sleep(0.5)
    assert running.poll() is None
    assert place.committed() == 3
    done = place.call("keys", "status")
    assert f"key-encryption key {kek.name.split('.')[1]} is gone" in done.out
    assert "key-encryption key" in one_line(
        place.call("tail", "cdr.pii", "--from-beginning", "--reveal", "--reason", "R")
    )
    # Then it goes on once it is back, without a restart
    kek.write_bytes(content)
    kek.chmod(0o600)
    done = place.ended(running)
    assert (done.status, done.records) == (0, 1)
    assert len(place.opened("cdr.pii")) == 4


def day_before(deadline):
    seconds = time.mktime(time.strptime(deadline, "%Y-%m-%dT%H:%M:%SZ")) - 1
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def test_output_for_programs_is_json_alone(place):
    fill(place)
    for words in (("status",), ("rotate",), ("destroy-due",), ("reconcile",)):
        done = place.call("keys", *words, "--json")
        assert done.status == 0, done.err
        assert all(json.loads(line) for line in done.out.splitlines())
