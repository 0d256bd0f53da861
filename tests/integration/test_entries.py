"""Snapshots and tails on a real log: made by a child, taken over while work goes on, and refused when in doubt."""

import asyncio
import os
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from processors.screen.suppression import Change, Rule, State, record_key
from schemas.catalog import partition_for
from schemas.errors import Gathering, LogBusy, LogFull, LogUnusable
from schemas.outbound import Message, Output
from streams.log.sqlite import SqliteLog
from streams.state import entries, gathering, snapshots
from streams.state.entries import EXEMPTIONS, SUPPRESSIONS, EntryTail
from streams.state.gathering import gather
from streams.state.snapshots import Snapshots, fits
from tests.support.commands import SHORT_LEASE, Place, ago, eventually
from tests.support.records import TOKENS, preference, sms_request

SMS = Rule("platform", "all", "sms", "person")
VOICE = SMS._replace(channel="voice")
INSTANTS = {"suppressions": "event_at", "exemptions": "expires_at"}


def token(number):
    return TOKENS.of(f"+49151{number:08}")


@pytest.fixture
def log(tmp_path):
    opened = SqliteLog.open(tmp_path / "log.db", partitions=2)
    yield opened
    asyncio.run(opened.close())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "entries"


@pytest.fixture
def kept(folder):
    """Return the snapshots of a folder, which nobody makes by himself, and note which are asked for."""
    made = Snapshots(folder, "store")
    made.asked = []
    made.gather = lambda stream, version: made.asked.append((stream, version))
    yield made
    made.close()


def write(log, *changes, version=1, stream="suppressions"):
    """Append records: (number of the person, rule, out, event time)."""
    for number, rule, out, event_s in changes:
        change = Change(token(number), rule, out, event_s, "", None)
        at = f"1970-01-01T{event_s // 3600:02}:{event_s // 60 % 60:02}:{event_s % 60:02}Z"
        value = b'{"privacy":{"expires_at":"2000-01-01T00:00:00Z"},"%s":"%s"}' % (
            INSTANTS[stream].encode(),
            at.encode(),
        )
        message = Message(0, record_key(version, change), (), value)
        asyncio.run(log.append([Output(stream, partition_for(change.token, log.partitions), [message])]))


def out(*numbers, event_s=5):
    return [(number, SMS, True, event_s) for number in numbers]


def make(log, kept, what=SUPPRESSIONS, version=1, **options):
    return asyncio.run(gather(log, kept, what, version, **options))


def tail_of(log, kept, what=SUPPRESSIONS, version=1, **options):
    tail = EntryTail(log, what, version, kept, **options)
    asyncio.run(tail.catch_up())
    return tail


def settled(tail, is_so):
    """Catch up, at the pace of looks for a newer snapshot, until something is so."""

    def look():
        tail._look_s = 0.0
        asyncio.run(tail.catch_up())
        return is_so()

    eventually(look, "the newer snapshot")


# --- a snapshot and its tail ----------------------------------------------------------------------------------


def test_a_tail_over_a_snapshot_reads_only_what_came_after_it(log, kept):
    write(log, *out(1, 2, 3))
    assert make(log, kept)
    write(log, (1, SMS, False, 6), (4, SMS, True, 7))
    tail = EntryTail(log, SUPPRESSIONS, 1, kept)
    assert asyncio.run(tail.catch_up()) == 2
    assert tail.view.get(token(1)) == {SMS: State(False, 6)}
    assert tail.view.get(token(2)) == {SMS: State(True, 5)}
    assert tail.view.get(token(4)) == {SMS: State(True, 7)}
    assert tail.view.get(token(5)) is None
    assert len(tail.view) == 2


def test_a_rule_that_many_have_is_held_once(log, kept):
    write(log, *out(1, 2))
    view = tail_of(log, kept).view
    (first,), (second,) = view.get(token(1)), view.get(token(2))
    assert first is second


def test_exemptions_are_kept_by_the_instant_at_which_they_end_and_until_then(log, kept, monkeypatch):
    rule = Rule("account:acme", "consent", "sms", "account")
    write(log, (1, rule, True, 900), (1, rule, True, 300), (2, rule, True, 9), (2, rule, False, 9), stream="exemptions")
    write(log, (3, rule, True, 100), (4, rule, True, 101), stream="exemptions")
    assert tail_of(log, None, EXEMPTIONS).view.get(token(1)) == {rule: State(True, 300)}

    def made_at(now_s):
        with monkeypatch.context() as patch:
            patch.setattr(gathering, "time", SimpleNamespace(time=lambda: now_s))
            make(log, kept, EXEMPTIONS)
        view = tail_of(log, kept, EXEMPTIONS).view
        return {number: found for number in range(1, 6) if (found := view.get(token(number))) is not None}

    # What has ended at the very second is not kept
    assert made_at(100) == {1: {rule: State(True, 300)}, 4: {rule: State(True, 101)}}
    # When one is added much later / Then what has ended since goes, whoever it was of
    write(log, (5, rule, True, 400), stream="exemptions")
    assert made_at(299) == {1: {rule: State(True, 300)}, 5: {rule: State(True, 400)}}
    # An opt-out never ends
    write(log, *out(1))
    make(log, kept)
    assert tail_of(log, kept).view.get(token(1)) == {SMS: State(True, 5)}


def test_a_newer_snapshot_is_taken_over_and_nobody_changes_by_that(log, kept):
    # Given a tail without a snapshot, and one that is made then
    write(log, *out(*range(20)))
    tail = tail_of(log, kept)
    assert tail.snapshot_s is None
    write(log, (1, SMS, False, 6))
    make(log, kept)
    os.utime(kept.path("suppressions", 1), (5_000, 5_000))
    write(log, (2, SMS, False, 6))
    before = None
    asyncio.run(tail.catch_up())
    before = {number: tail.view.get(token(number)) for number in range(22)}
    assert len(tail.view) == 20
    # When it is there / Then only what came after it is in memory, and all stand as they stood
    settled(tail, lambda: tail.view.snapshot is not None)
    assert len(tail.view) == 1
    assert tail.snapshot_s == 5_000
    stood = {number: found for number, found in before.items() if number != 1}
    assert {number: tail.view.get(token(number)) for number in stood} == stood
    assert tail.view.get(token(1)) is None  # lifted: as if it had never been
    # When there is another one
    make(log, kept)
    settled(tail, lambda: len(tail.view) == 0)
    assert tail.snapshot_s == kept.path("suppressions", 1).stat().st_mtime_ns / 1e9
    assert tail.view.get(token(2)) is None
    assert tail.view.get(token(3)) == {SMS: State(True, 5)}
    # and under another token key there is none
    tail.follow(2)
    assert tail.snapshot_s is None


def test_a_snapshot_that_is_ahead_of_what_was_read_is_not_taken_over_before_that(log, kept):
    write(log, *out(1))
    tail = tail_of(log, kept)
    write(log, *out(2))
    make(log, kept)
    opened = kept.open("suppressions", 1)
    assert any(at > read for at, read in zip(opened.offsets, tail._next, strict=True))
    asyncio.run(tail._renew(kept, tail._next))
    eventually(lambda: tail._opening is None or tail._opening[1].done(), "verified")
    asyncio.run(tail._renew(kept, tail._next))
    assert tail.view.snapshot is None
    settled(tail, lambda: tail.view.snapshot is not None)
    assert tail.view.get(token(2)) == {SMS: State(True, 5)}


def test_the_snapshot_of_many_chunks_is_that_of_one(log, kept, tmp_path):
    write(log, *out(*range(30)), *out(*range(0, 30, 3), event_s=9), *((n, SMS, False, 7) for n in range(30)))
    assert make(log, kept, chunk=7)
    other = Snapshots(tmp_path / "other", "store")
    assert make(log, other)
    one, many = other.open("suppressions", 1), kept.open("suppressions", 1)
    assert one.offsets == many.offsets
    assert one.meta.witnesses == many.meta.witnesses
    for number in range(30):
        assert one.get(token(number)) == many.get(token(number)) == ({SMS: State(True, 9)} if number % 3 == 0 else None)


def test_a_snapshot_begun_anew_is_not_taken_over_before_it_goes_as_far_as_the_one_in_use(log, kept, monkeypatch):
    # Given a tail over a whole snapshot, whose file went, and of the next one only the first chunk so far
    write(log, *out(*range(12)))
    make(log, kept)
    tail = tail_of(log, kept)
    assert len(tail.view) == 0
    kept.discard("suppressions", 1)
    with monkeypatch.context() as patch:
        put, written = kept.write, []

        def once(*what):
            if written:
                raise LogBusy("killed")
            put(*what)
            written.append(what)

        patch.setattr(kept, "write", once)
        with pytest.raises(LogBusy):
            make(log, kept, chunk=3)
    assert sum(kept.open("suppressions", 1).offsets) < 12
    # When the tail has seen it / Then everybody stands as before
    settled(tail, lambda: tail._known is not None and tail._known is not tail.view.snapshot)
    tail._look_s = 0.0
    asyncio.run(tail.catch_up())
    assert all(tail.view.get(token(number)) == {SMS: State(True, 5)} for number in range(12))
    # When the rest is there / Then it is taken over
    make(log, kept)
    settled(tail, lambda: tail._known is tail.view.snapshot)
    assert all(tail.view.get(token(number)) == {SMS: State(True, 5)} for number in range(12))


def test_what_a_log_has_cut_off_is_still_in_the_snapshot(log, kept):
    write(log, *out(1))
    make(log, kept)
    write(log, *out(1, event_s=9))
    asyncio.run(log.cut("suppressions", asyncio.run(log.begin_offsets("suppressions"))))
    partition = partition_for(token(1), 2)
    asyncio.run(log.cut("suppressions", [1 if partition == one else 0 for one in (0, 1)]))
    assert tail_of(log, kept).view.get(token(1)) == {SMS: State(True, 9)}


# --- in doubt nothing is cleared --------------------------------------------------------------------------------


def test_the_files_are_private_and_appear_whole(log, kept, folder):
    os.umask(os.umask(0o022))
    write(log, *out(1))
    make(log, kept)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert names == {"suppressions-1.entries": 0o600, ".suppressions-1.lock": 0o600}


def test_one_that_fails_half_way_leaves_the_one_before(log, kept, folder):
    write(log, *out(1))
    make(log, kept)
    before = (folder / "suppressions-1.entries").read_bytes()
    write(log, *out(2))

    calls = []

    def dies():
        calls.append(1)
        if len(calls) > 40:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        make(log, kept, pause=dies)
    assert (folder / "suppressions-1.entries").read_bytes() == before
    assert [path.name for path in folder.glob("*.new")] == []
    assert tail_of(log, kept).view.get(token(2)) == {SMS: State(True, 5)}


def test_a_snapshot_that_goes_while_the_next_is_made_on_it_is_not_left_out(log, kept, folder):
    write(log, *out(*range(9)))

    def erases():
        (folder / "suppressions-1.entries").unlink(missing_ok=True)

    rename = Path.replace

    def gone(self, target):
        rename(self, target)
        erases()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", gone)
        with pytest.raises(LogBusy, match="made anew"):
            make(log, kept, chunk=2)
    assert all(tail_of(log, kept).view.get(token(number)) == {SMS: State(True, 5)} for number in range(9))


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "store", "version", "stream"])
def test_a_snapshot_that_is_damaged_or_of_something_else_goes_and_all_is_read_from_the_log(log, kept, folder, damage):
    write(log, *out(1))
    make(log, kept)
    path = folder / "suppressions-1.entries"
    data = path.read_bytes()
    if damage == "bit":
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "store":
        make(log, Snapshots(folder.parent / "other", "another"))
        path.write_bytes((folder.parent / "other" / path.name).read_bytes())
    else:
        other = folder / ("suppressions-2.entries" if damage == "version" else "exemptions-1.entries")
        path.rename(other)
        path = other
    what = EXEMPTIONS if damage == "stream" else SUPPRESSIONS
    version = 2 if damage == "version" else 1
    tail = tail_of(log, kept, what, version)
    assert tail.view.snapshot is None
    assert not path.exists()
    if what is SUPPRESSIONS and version == 1:
        assert tail.view.get(token(1)) == {SMS: State(True, 5)}


def test_a_snapshot_of_another_log_is_not_used(log, kept, tmp_path):
    write(log, *out(1))
    make(log, kept)
    other = SqliteLog.open(tmp_path / "elsewhere" / "log.db", partitions=2)
    meta = kept.open("suppressions", 1).meta
    write(other, *out(1))
    assert not asyncio.run(fits(other, meta))  # though the record is the same
    write(other, *out(2))
    view = tail_of(other, kept).view
    assert view.snapshot is None
    assert view.get(token(2)) == {SMS: State(True, 5)}
    asyncio.run(other.close())


def test_a_snapshot_ahead_of_a_log_that_was_put_back_is_not_used(log, kept, tmp_path):
    # Given a snapshot, and a log that is put back to before it
    write(log, *out(1))
    backup = tmp_path / "backup" / "log.db"
    backup.parent.mkdir()
    for name in ("log.db", "log-traffic.db"):
        subprocess.run(
            [sys.executable, "-c", "import sqlite3,sys; a,b=map(sqlite3.connect, sys.argv[1:]); a.backup(b)",
             str(tmp_path / name), str(backup.with_name(name))], check=True,
        )  # fmt: skip
        backup.with_name(name).chmod(0o600)
    write(log, *out(2, 3))
    make(log, kept)
    meta = kept.open("suppressions", 1).meta
    restored = SqliteLog.open(backup, partitions=2)
    assert restored.log_id == log.log_id
    assert not asyncio.run(fits(restored, meta))
    # When it has grown past the snapshot by other opt-outs / Then it is still not that log
    write(restored, *out(*range(10, 20)))
    assert all(
        end >= at for end, at in zip(asyncio.run(restored.end_offsets("suppressions")), meta.offsets, strict=True)
    )
    view = tail_of(restored, kept).view
    assert view.get(token(2)) is None
    assert view.get(token(15)) == {SMS: State(True, 5)}
    asyncio.run(restored.close())


def test_a_snapshot_that_could_not_be_compared_with_the_log_is_compared_before_it_is_used(
    log, kept, tmp_path, monkeypatch
):
    # Given the snapshot of another log, and a log that is busy just then
    write(log, *out(1))
    make(log, kept)
    other = SqliteLog.open(tmp_path / "elsewhere" / "log.db", partitions=2)
    write(other, *out(2, 3))
    tail = EntryTail(other, SUPPRESSIONS, 1, kept)

    async def busy(*_):
        raise LogBusy("now")

    with monkeypatch.context() as patch:
        patch.setattr(SqliteLog, "end_offsets", busy)
        with pytest.raises(LogBusy):
            asyncio.run(tail.catch_up())
    # When it answers again
    asyncio.run(tail.catch_up())
    assert tail.view.snapshot is None
    assert tail.view.get(token(1)) is None
    assert tail.view.get(token(2)) == {SMS: State(True, 5)}
    asyncio.run(other.close())


def test_a_process_that_cannot_map_a_snapshot_now_leaves_it_to_others_and_tries_again(log, kept, monkeypatch):
    write(log, *out(1))
    make(log, kept)

    def full(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots.mmap, "mmap", full)
        tail = tail_of(log, kept)
        assert tail.view.snapshot is None
        assert tail.view.get(token(1)) == {SMS: State(True, 5)}
    settled(tail, lambda: tail.view.snapshot is not None)


def test_a_stream_that_was_put_back_under_a_tail_is_read_anew(log, kept, tmp_path):
    # Given a tail that has read more than there is now
    write(log, *out(1, 2, 3, 4))
    tail = tail_of(log, kept)
    other = SqliteLog.open(tmp_path / "elsewhere" / "log.db", partitions=2)
    tail._log = other
    write(other, *out(5))
    # When / Then
    with pytest.raises(LogBusy, match="lost its end"):
        asyncio.run(tail.catch_up())
    asyncio.run(tail.catch_up())
    assert tail.view.get(token(5)) == {SMS: State(True, 5)}
    assert tail.view.get(token(1)) is None
    asyncio.run(other.close())


def test_a_computer_on_which_no_snapshot_can_be_made_is_waited_for(log, folder, monkeypatch):
    folder.write_text("no folder")
    made = Snapshots(folder, "store", lambda *_: pytest.fail("not started"))
    monkeypatch.setattr(entries, "MOST", 1)
    write(log, *out(1, 2))
    with pytest.raises(LogFull, match="no snapshot can be made: File exists"):
        asyncio.run(EntryTail(log, SUPPRESSIONS, 1, made).catch_up())
    folder.unlink()

    def refused(*_):
        raise OSError(11, "Resource temporarily unavailable")

    with pytest.raises(LogFull, match="no process can be started"):
        Snapshots(folder, "store", refused).gather("suppressions", 1)
    # As long as there is little to read, it goes without
    monkeypatch.setattr(entries, "MOST", 10)
    monkeypatch.setattr(entries, "MANY", 1)
    tail = EntryTail(log, SUPPRESSIONS, 1, Snapshots(folder, "store", refused))
    assert asyncio.run(tail.catch_up()) == 2
    assert tail.view.get(token(2)) == {SMS: State(True, 5)}


def test_who_must_not_read_long_reads_on_at_the_next_call_and_sees_nothing_before(log, kept, monkeypatch):
    monkeypatch.setattr(entries, "PAGE", 2)
    write(log, *out(*range(8)))
    tail = EntryTail(log, SUPPRESSIONS, 1, kept)
    for _ in range(2):
        with pytest.raises(LogBusy, match="being read"):
            asyncio.run(tail.catch_up(within_s=0.0))
    for _ in range(3):
        with suppress(LogBusy):
            asyncio.run(tail.catch_up(within_s=0.0))
    assert asyncio.run(tail.catch_up()) == 0
    assert all(tail.view.get(token(number)) == {SMS: State(True, 5)} for number in range(8))


def test_while_there_is_too_much_to_read_nothing_is_served_and_a_snapshot_is_asked_for(log, kept, monkeypatch):
    monkeypatch.setattr(entries, "MOST", 5)
    write(log, *out(*range(9)))
    tail = EntryTail(log, SUPPRESSIONS, 1, kept)
    for _ in range(2):
        with pytest.raises(Gathering, match="nothing is cleared before it is there"):
            asyncio.run(tail.catch_up())
        assert len(tail.view) == 0
    assert kept.asked == [("suppressions", 1)] * 2
    make(log, kept)
    assert asyncio.run(tail.catch_up()) == 0
    assert tail.view.get(token(8)) == {SMS: State(True, 5)}


def test_a_tail_that_outgrows_its_memory_begins_anew_with_a_snapshot(log, kept, monkeypatch):
    monkeypatch.setattr(entries, "MOST", 5)
    monkeypatch.setattr(entries, "PAGE", 2)
    tail = tail_of(log, kept)
    write(log, *out(*range(30)))
    with pytest.raises(Gathering):
        asyncio.run(tail.catch_up())
    make(log, kept)
    asyncio.run(tail.catch_up())
    assert all(tail.view.get(token(number)) == {SMS: State(True, 5)} for number in range(30))
    assert len(tail.view) == 0


def test_a_tail_that_outgrows_its_memory_goes_on_at_once_if_there_is_a_newer_snapshot(log, kept, monkeypatch):
    monkeypatch.setattr(entries, "MOST", 5)
    monkeypatch.setattr(entries, "PAGE", 2)
    tail = tail_of(log, kept)
    write(log, *out(*range(30)))
    make(log, kept)
    tail._look_s = float("inf")  # it has not looked since
    asyncio.run(tail.catch_up())
    assert all(tail.view.get(token(number)) == {SMS: State(True, 5)} for number in range(30))
    assert len(tail.view) == 0


def test_a_tail_that_has_grown_asks_for_a_newer_snapshot_and_goes_on(log, kept, monkeypatch):
    monkeypatch.setattr(entries, "MANY", 3)
    write(log, *out(*range(3)))
    tail = tail_of(log, kept)
    assert kept.asked == []
    write(log, *out(3))
    asyncio.run(tail.catch_up())
    assert kept.asked == [("suppressions", 1)]
    assert tail.view.get(token(3)) == {SMS: State(True, 5)}


def test_whoever_waits_is_told_once(log, kept, monkeypatch):
    monkeypatch.setattr(entries, "MOST", 5)
    monkeypatch.setattr(entries, "_WAIT_S", 0.001)
    write(log, *out(*range(9)))
    said, rounds = [], []

    def made():
        asyncio.run(gather(SqliteLog.open(log._main.path), kept, SUPPRESSIONS, 1))

    def asked(*_):
        rounds.append(1)
        if len(rounds) == 3:
            maker = threading.Thread(target=made)
            maker.start()
            maker.join()

    kept.gather = asked
    tail = EntryTail(log, SUPPRESSIONS, 1, kept, told=said.append)
    asyncio.run(tail.catch_up())
    assert tail.view.get(token(8)) == {SMS: State(True, 5)}
    assert len(said) == 1
    assert "being gathered" in said[0]


@pytest.mark.parametrize("value", [b"", b"{}", b'{"event_at":5}', b'{"event_at":"yesterday"}', b"[]"])
def test_a_record_that_cannot_be_read_is_no_snapshot_and_no_view(log, kept, folder, value):
    message = Message(0, record_key(1, Change(token(1), SMS, True, 5, "", None)), (), value)
    asyncio.run(log.append([Output("suppressions", 0, [message])]))
    with pytest.raises(LogUnusable):
        tail_of(log, kept)
    with pytest.raises(LogUnusable):
        make(log, kept)
    assert not (folder / "suppressions-1.entries").exists()


# --- one maker, and another token key ---------------------------------------------------------------------------


def test_two_do_not_make_one_at_once(log, kept):
    with kept.locked("suppressions", 1) as mine:
        assert mine
        assert not make(log, kept)
        with kept.locked("suppressions", 2) as other:
            assert other
    assert make(log, kept)


def test_a_child_is_started_once_and_not_again_at_once(folder, monkeypatch):
    started = []

    class Child:
        status = None

        def poll(self):
            return self.status

        def terminate(self):
            self.status = -15

        def wait(self):
            return self.status

    def start(*what):
        started.append(what)
        return Child()

    made = Snapshots(folder, "store", start)
    with made.locked("suppressions", 1):
        made.gather("suppressions", 1)
        assert started == []
    for _ in range(3):
        made.gather("suppressions", 1)
    assert started == [("suppressions", 1)]
    Child.status = 0
    made.gather("suppressions", 1)
    assert len(started) == 1
    monkeypatch.setattr(snapshots, "AGAIN_S", 0.0)
    made.gather("suppressions", 1)
    assert len(started) == 2
    # Nor does it work on for a token key that is left
    Child.status = None
    made.gather("exemptions", 1)
    made.discard_before("suppressions", 1)
    assert [child.status for child in made._children.values()] == [None, None]
    made.discard_before("suppressions", 2)
    assert [child.status for child in made._children.values()] == [-15, None]
    made.close()


def test_another_token_key_has_its_own_snapshot_and_the_old_one_goes(log, kept, folder, monkeypatch):
    monkeypatch.setattr(entries, "MANY", 2)
    write(log, *out(1, 2))
    make(log, kept)
    tail = tail_of(log, kept)
    write(log, *out(4, 5, 6), version=2)
    asyncio.run(tail.catch_up())
    assert kept.asked == [("suppressions", 2)]
    assert tail.view.get(token(4)) is None
    make(log, kept, version=2)
    tail.follow(2)
    asyncio.run(tail.catch_up())
    assert tail.view.get(token(1)) is None
    assert tail.view.get(token(4)) == {SMS: State(True, 5)}
    assert tail.view.snapshot is not None
    assert sorted(path.name for path in folder.glob("*.entries")) == ["suppressions-2.entries"]
    tail.follow(2)
    assert tail._next is not None
    # Whoever begins later removes what was made late, or left half-way
    for name in ("suppressions-1.entries", ".suppressions-1.entries.new", ".suppressions-2.entries.new"):
        (folder / name).write_bytes(b"late")
    (folder / "exemptions-1.entries").write_bytes(b"of another stream")
    tail_of(log, kept, version=2)
    assert sorted(path.name for path in folder.glob("*entries*")) == [
        ".suppressions-2.entries.new", "exemptions-1.entries", "suppressions-2.entries",
    ]  # fmt: skip


# --- through the program ----------------------------------------------------------------------------------------

FEW = """
from streams.state import entries
entries.MANY, entries.MOST = 3, 6
"""


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def test_a_worker_has_a_snapshot_made_by_a_child_and_clears_nothing_before_it_is_there(place):
    # Given more opt-outs than a worker reads by itself, and requests to them and to others
    numbers = [f"+4915112345{number:03}" for number in range(10)]
    lines = "number\n" + "".join(f"{number}\n" for number in numbers)
    (place.folder / "list.csv").write_text(lines)
    assert place.call("optout", "import", place.folder / "list.csv").status == 0
    place.publish(*(
        sms_request(record_id=f"r-{at}", recipient=number, purpose="marketing", occurred_at=ago())
        for at, number in enumerate([*numbers, "+4915199999999"])
    ))  # fmt: skip
    # When
    done = place.run("run", "--until-idle", sabotage=FEW)
    # Then
    assert done.status == 0, done.err
    assert "waiting: the entries of a stream are being gathered" in done.err.lower()
    verdicts = place.verdicts()
    assert {verdicts[f"r-{at}"][1] for at in range(10)} == {"opted_out"}
    assert verdicts["r-10"][1] != "opted_out"
    found = place.data / "entries" / "suppressions-1.entries"
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    # And the command line uses it, and what came after it
    assert place.run("optout", "remove", numbers[0], sabotage=FEW).status == 0
    assert place.run("optout", "check", numbers[0], sabotage=FEW).out == "not opted out\n"
    assert place.run("optout", "check", numbers[1], sabotage=FEW).out != "not opted out\n"
    # And a folder that was erased is made anew
    found.unlink()
    done = place.run("optout", "check", numbers[1], sabotage=FEW)
    assert "not opted out" not in done.out
    assert done.status == 0
    assert "being gathered" in done.err
    assert found.exists()


SLOW = """
from streams.state import entries
from streams.worker import worker
entries.PAGE, worker.READ_S = 1, 0.0
"""


def test_a_worker_that_has_much_to_read_polls_in_between_and_clears_nothing_before_it_is_through(place):
    numbers = [f"+4915112345{number:03}" for number in range(3)]
    for number in numbers:
        assert place.call("optout", "add", number).status == 0
    place.publish(*(
        sms_request(record_id=f"r-{at}", recipient=number, purpose="marketing", occurred_at=ago())
        for at, number in enumerate(numbers)
    ))  # fmt: skip
    done = place.run("run", "--until-idle", sabotage=SLOW)
    assert done.status == 0, done.err
    assert "waiting: the stream is being read; nothing is cleared before that" in done.err
    assert place.verdicts() == {f"r-{at}": ("refused", "opted_out") for at in range(3)}


BLIND = """
import os
from schemas.errors import LogBusy
from streams.log.sqlite import SqliteLog
ends = SqliteLog.end_offsets
async def blind(self, stream):
    if stream == "suppressions" and os.path.exists({path!r}):
        raise LogBusy("cannot be seen")
    return await ends(self, stream)
SqliteLog.end_offsets = blind
"""


def test_a_worker_that_cannot_see_the_opt_outs_clears_nothing_says_so_and_goes_on_afterwards(place):
    # Given a worker at work that suddenly cannot see the stream
    place.publish(sms_request(record_id="before", occurred_at=ago()))
    blind = place.folder / "blind"
    worker = place.start("run", sabotage=BLIND.format(path=str(blind)))
    eventually(place.committed, "the first verdict")
    blind.touch()
    place.publish(
        preference(record_id="stop", sender="+4915100000001", scope="platform", occurred_at=ago()),
        sms_request(record_id="during", recipient="+4915100000001", purpose="marketing", occurred_at=ago()),
    )
    eventually(lambda: "waiting: cannot be seen" in place.told(worker), "it says what it waits for")
    assert place.committed() == 1
    assert set(place.verdicts()) == {"before"}
    # When it can be seen again
    blind.unlink()
    # Then it goes on, and the opt-out counts
    eventually(lambda: place.committed() == 3, "the rest")
    assert place.verdicts()["during"] == ("refused", "opted_out")
    assert worker.poll() is None


def test_an_error_of_gathering_is_one_to_wait_for():
    assert issubclass(Gathering, LogBusy)
