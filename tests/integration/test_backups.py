"""Restored backups of the key store: it says so, is brought up to date, and nothing that was destroyed opens (CAL-12).

Backups are made as an operator makes them (`.backup` of SQLite), of a deployment that goes on meanwhile.
"""

import contextlib
import shutil
import sqlite3
import time

import pytest

from processors.keyring import EpochRef
from processors.screen.suppression import Tokens
from schemas.errors import KeysUnusable, KmsRefuses
from schemas.fields import PLATFORM
from schemas.sealed import KeyId
from streams.keys.kms_local import LocalKms
from streams.officer import holds, offboard
from streams.officer.erase import erase
from streams.officer.office import office
from streams.officer.reconcile import reconcile
from streams.officer.restrict import restrict, unrestrict
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import sms_cdr

PERSON, OTHER, THIRD = "+4915112345678", "+14155550123", "+14155550199"
RESTORED = (
    "the key store is older than the last destruction: it was restored from a backup; run: streamveil keys reconcile"
)


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    made.publish(
        *(
            sms_cdr(record_id=f"c-{at}", recipient=number, content="Your parcel is here", occurred_at=ago())
            for at, number in enumerate((PERSON, OTHER, THIRD))
        )
    )
    assert made.work() == 3
    yield made
    made.close()


def backup(place, name="keys.db"):
    """Return a backup of a file of the deployment, made by SQLite's own means while others may use it."""
    copy = place.aside / f"backup-{time.monotonic_ns()}.db"
    with (
        contextlib.closing(sqlite3.connect(place.data / name)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    copy.chmod(0o600)
    return copy


def restore(place, copy, name="keys.db"):
    for path in place.data.glob(f"{name}*"):
        path.unlink()
    shutil.copy(copy, place.data / name)
    (place.data / name).chmod(0o600)


def opened(place, stream="cdr.pii"):
    """Return record id or content → what came of opening it, by person, as the command line shows it."""
    lines = place.tail(stream, "--reveal", "--reason", "TEST-1")
    return [line["reveal"]["state"] for line in lines]


def states(place):
    """Return number → state of the person's personal record; numbers whose record does not open are left out."""
    found = {}
    for line in place.tail("cdr.pii", "--reveal", "--reason", "TEST-1"):
        if line["reveal"]["state"] == "revealed":
            found[line["reveal"]["fields"]["recipient"]] = "revealed"
    return sorted(found)


def erased(place, number):
    async def erases(deployment):
        def nobody(_):
            pass

        return await erase(office(deployment), number, None, "CASE-1", int(time.time()), nobody, nobody)

    return place.within(erases)


def shredded(place):
    """Destroy the content of today, as an account's end would."""

    async def shred(deployment):
        ref = EpochRef("content", "acme", time.strftime("%Y-%m-%d", time.gmtime(time.time() - 30)))
        await deployment.auditor().write("destroy", destroyed={"epochs": ["/".join(ref)]})
        deployment.store.destroy_epoch(ref)
        await deployment.auditor().write("later")

    place.within(shred)


def refused(place):
    """See that every command says the same, in one line, that nothing opens, and that nothing is sealed."""
    for words in (("keys", "status"), ("optout", "check", PERSON), ("run", "--until-idle"), ("keys", "rotate"),
                  ("tail", "cdr.pii", "--from-beginning", "--reveal", "--reason", "R")):  # fmt: skip
        assert RESTORED in one_line(place.call(*words)), words


def reconciled(place, *more):
    done = place.call("keys", "reconcile", "--json", *more)
    assert done.status == 0, done.err
    return done.lines[0]


def around(place, check):
    """Return what `check(store)` returns of a store that is opened whether or not it is outdated."""

    async def inside(deployment):
        return check(deployment.store)

    return place.within(inside, create=False, outdated=True)


# --- an erasure --------------------------------------------------------------------------------------------------


def test_restored_from_before_an_erasure_the_erased_person_does_not_open_and_the_others_do(place):
    copy = backup(place)
    assert erased(place, PERSON).secrets == 1
    assert states(place) == sorted([OTHER, THIRD])
    # When
    restore(place, copy)
    # Then
    refused(place)
    done = reconciled(place)
    assert (done["sids"], done["missing"]) == (1, [])
    assert states(place) == sorted([OTHER, THIRD])
    assert sorted(opened(place)) == ["destroyed", "revealed", "revealed"]
    assert place.call("keys", "status").status == 0
    # and it goes on: a later communication with the person opens
    place.publish(sms_cdr(record_id="c-9", recipient=PERSON, content="later", occurred_at=ago()))
    assert place.work() == 1
    assert states(place) == sorted([PERSON, OTHER, THIRD])
    # and again is no harm
    assert reconciled(place)["sids"] == 1
    assert states(place) == sorted([PERSON, OTHER, THIRD])


def test_on_another_machine_it_is_the_same(place, tmp_path):
    copy = backup(place)
    erased(place, PERSON)
    # Given the log, the backup, and the key management service, elsewhere
    elsewhere = Place(tmp_path / "elsewhere")
    shutil.copytree(place.data, elsewhere.data, ignore=shutil.ignore_patterns("keys.db*"))
    shutil.copytree(place.folder / "streamveil-kms", elsewhere.folder / "streamveil-kms")
    restore(elsewhere, copy)
    # Then
    refused(elsewhere)
    reconciled(elsewhere)
    assert states(elsewhere) == sorted([OTHER, THIRD])


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()


def test_without_the_counter_nothing_opens(place):
    copy = backup(place)
    erased(place, PERSON)
    restore(place, copy)
    for path in (place.folder / "streamveil-kms").glob("*.counter"):
        path.unlink()
    assert "counter" in one_line(place.call("keys", "status"))
    assert "counter" in one_line(place.call("keys", "reconcile"))


def test_after_the_rewrap_not_even_who_gets_around_the_check_opens_anything(place):
    copy = backup(place)
    (sid,) = around(place, lambda store: known(store, PERSON))
    erased(place, PERSON)
    assert place.call("retention", "run", "--rewrap").status == 0
    assert "no backup opens anything that was destroyed" in place.call("keys", "status").out
    restore(place, copy)

    def attempt(store):
        with pytest.raises(KmsRefuses):
            store.open_persons([sid], int(time.time()))

    around(place, attempt)
    refused(place)
    # and it is not brought up to date by accident, for the others under that day are lost too
    assert "opens no more: the backup is from before a re-wrap" in one_line(place.call("keys", "reconcile"))
    refused(place)
    assert reconciled(place, "--yes")["sids"] == 1
    assert states(place) == []
    assert len(place.opened("content")) == 3


def known(store, number):
    """Return the sids of a person in the platform's data."""
    return [
        one.sid for one in store.persons_of([Tokens(*store.token_keys().current).of(number)]) if one.owner == PLATFORM
    ]


def test_until_the_rewrap_the_windows_are_printed(place):
    assert "no backup opens anything that was destroyed" in place.call("keys", "status").out
    erased(place, PERSON)
    done = place.call("keys", "status")
    assert "backups from before" in done.out
    (summary,) = [line["summary"] for line in place.call("keys", "status", "--json").lines if "summary" in line]
    assert (summary["rewrap_window_s"], summary["kms_waiting_period_s"]) == (24 * 3600, 0)
    assert len(summary["backups_open"]) == 1
    assert summary["keks"] <= summary["most_destruction_days"]


# --- a month's death ---------------------------------------------------------------------------------------------


def test_restored_from_before_a_months_death_nothing_of_it_opens_even_around_the_check(place):
    copy = backup(place)
    years, months = divmod(time.gmtime().tm_mon + 12, 12)
    ahead = f"{time.gmtime().tm_year + years}-{months + 1:02}-01T00:00:00Z"  # 12 months after the end of this one
    done = place.call("keys", "destroy-due", "--now", ahead, "--yes", "--json")
    assert done.status == 0, done.err
    assert done.lines[0]["epochs"] >= 2
    assert states(place) == []
    restore(place, copy)
    refused(place)
    month = time.strftime("%Y-%m", time.gmtime())

    def attempt(store):
        (key,) = [key for key in store.status(0) if key.domain == "pii"]
        assert (key.epoch, key.state) == (month, "alive")
        with pytest.raises(KmsRefuses):
            store.open_epochs([KeyId("pii", PLATFORM, month, 1)], int(time.time()))

    around(place, attempt)
    reconciled(place)
    assert states(place) == []
    assert set(opened(place)) == {"destroyed"}


# --- holds and restrictions --------------------------------------------------------------------------------------


def nothing(_):
    pass


def held(place, number, reason="CASE-7"):
    async def hold(deployment):
        desk = office(deployment)
        return await holds.hold_person(desk, desk.person(number), PLATFORM, reason, (None, None), nothing)

    return place.within(hold)


def released(place):
    async def release(deployment):
        desk = office(deployment)
        return await holds.release_person(desk, desk.person(PERSON), PLATFORM, "CASE-7", None)

    return place.within(release)


def test_restored_from_before_the_release_of_a_hold_its_copies_do_not_open(place):
    assert held(place, PERSON).records == 1
    assert opened(place, "held") == ["revealed"]
    copy = backup(place)
    assert released(place) == 1
    assert opened(place, "held") == ["destroyed"]
    restore(place, copy)
    refused(place)
    reconciled(place)
    assert opened(place, "held") == ["destroyed"]
    # and all else does, and may be held again
    assert states(place) == sorted([PERSON, OTHER, THIRD])
    assert held(place, OTHER).records == 1
    assert sorted(opened(place, "held")) == ["destroyed", "revealed"]


def test_restored_from_before_the_release_of_another_hold_a_hold_is_made_again_or_given_up_for_good(place):
    assert held(place, OTHER, "CASE-9").records == held(place, PERSON).records == 1
    copy = backup(place)
    assert released(place) == 1
    restore(place, copy)
    assert "9999-12-31 opens no more" in one_line(place.call("keys", "reconcile"))
    done = place.call("keys", "reconcile", "--yes")
    assert done.status == 0
    assert "CASE-9" in done.err
    assert opened(place, "held") == ["destroyed", "destroyed"]
    assert held(place, OTHER, "CASE-9").records == 1
    assert sorted(opened(place, "held")) == ["destroyed", "destroyed", "revealed"]


def test_what_was_made_and_ended_since_is_told_and_ended(place):
    async def restricted(deployment, number):
        return await restrict(office(deployment), number, None, "CASE-2", int(time.time()))

    place.within(lambda deployment: restricted(deployment, OTHER))
    copy = backup(place)

    async def since(deployment):
        desk = office(deployment)
        await unrestrict(desk, OTHER, None, "CASE-3", int(time.time()))
        await restrict(desk, THIRD, None, "CASE-4", int(time.time()))
        await holds.hold_person(desk, desk.person(PERSON), PLATFORM, "CASE-5", (None, None), nothing)
        await offboard.offboard(deployment, "leaves", int(time.time()) + 86_400, int(time.time()))
        await offboard.offboard(deployment, "stays", int(time.time()) + 86_400, int(time.time()))
        await offboard.cancel(deployment, "stays")
        deployment.store.destroy_epoch(EpochRef("content", "nobody", "2026-01-01"))
        await deployment.auditor().write("later")

    place.within(since)
    restore(place, copy)
    refused(place)
    done = place.call("keys", "reconcile")
    assert done.status == 0
    assert "1 holds and restrictions ended" in done.out
    assert [line.split()[5] for line in done.err.splitlines() if "make it again" in line] == ["restriction", "hold"]
    assert ["CASE-4" in done.err, "CASE-5" in done.err] == [True, True]

    async def kept(deployment):
        return deployment.store.ledger.marks("restriction"), [one.account for one in offboard.schedule(deployment)]

    assert place.within(kept) == ([], ["leaves"])


def restricted(place, number, reason):
    async def restricts(deployment):
        return await restrict(office(deployment), number, None, reason, int(time.time()))

    return place.within(restricts)


def under_restriction(place, number):
    async def asks(deployment):
        return len(deployment.store.restricted(known(deployment.store, number)))

    return place.within(asks)


def test_a_restriction_whose_number_is_lost_stays_in_force_and_is_to_be_made_again_before_a_rotation(place):
    # Given a restriction, and a backup from before all that people end was re-wrapped
    assert restricted(place, OTHER, "CASE-2").marks == 1
    assert held(place, PERSON).records == 1
    copy = backup(place)
    assert released(place) == 1
    restore(place, copy)
    # When
    done = place.call("keys", "reconcile")
    # Then
    assert done.status == 0, done.err
    assert "1 holds and restrictions ended" in done.out  # the one that was released
    assert "CASE-2, is in force, but its number is lost: make it again" in done.err
    assert under_restriction(place, OTHER) == 1
    assert "case CASE-2" in one_line(place.call("keys", "rotate", "token"))
    # and again says the same
    assert [one["reason"] for one in reconciled(place)["nameless"]] == ["CASE-2"]
    # When it is made again
    assert restricted(place, OTHER, "CASE-2").marks == 0
    assert reconciled(place)["nameless"] == []
    (sid,) = around(place, lambda store: known(store, OTHER))
    assert place.call("keys", "rotate", "token").status == 0
    assert around(place, lambda store: store.restricted([sid])) == {sid}
    # and a later communication, under a new secret, is restricted too
    place.publish(sms_cdr(record_id="c-9", recipient=OTHER, occurred_at=ago()))
    assert place.work() == 1
    assert under_restriction(place, OTHER) == 1


def test_holds_whose_copies_are_lost_go_on_and_copy_anew_what_lives(place):
    # Given holds of an account and of a person, and a backup from before their copies were re-wrapped
    async def hold_account(deployment):
        return await holds.hold_account(office(deployment), "acme", "CASE-5", (None, None), nothing)

    assert place.within(hold_account).records == 6
    assert held(place, OTHER, "CASE-9").records == 1
    assert held(place, PERSON).records == 1
    copy = backup(place)
    assert released(place) == 1
    restore(place, copy)
    # When what is lost is given up
    done = reconciled(place, "--yes")
    # Then both stay in force, as others that are told, and the next run copies what they cover
    assert len(done["successors"]) == 2
    assert [one["reason"] for one in done["nameless"]] == ["CASE-9"]

    async def in_force(deployment):
        return sorted((mark.reason, mark.id) for mark in deployment.store.ledger.marks("hold"))

    marks = place.within(in_force)
    assert [reason for reason, _ in marks] == ["CASE-5", "CASE-9"]
    assert sorted(done["successors"]) == sorted(mark_id for _, mark_id in marks)
    assert set(opened(place, "held")) == {"destroyed"}
    assert place.call("retention", "run").status == 0
    assert sorted(opened(place, "held"))[-7:] == ["revealed"] * 7
    # and all of it again does no harm
    assert reconciled(place)["successors"] == []
    assert place.within(in_force) == marks
    entries = [one["value"] for one in place.tail("audit") if one["value"].get("instead_of")]
    assert sorted(one["hold"] for one in entries) == sorted(done["successors"])


def test_killed_between_a_hold_and_its_successor_neither_is_lost(place, monkeypatch):
    kept = held(place, OTHER, "CASE-9")
    assert kept.records == held(place, PERSON).records == 1
    copy = backup(place)
    assert released(place) == 1
    restore(place, copy)

    async def broken(deployment):
        end_mark = deployment.store.ledger.end_mark

        def killed(mark_id, at_s):
            if mark_id == kept.mark.id:
                raise KeyboardInterrupt
            end_mark(mark_id, at_s)

        monkeypatch.setattr(deployment.store.ledger, "end_mark", killed)
        with pytest.raises(KeyboardInterrupt):
            await reconcile(deployment, int(time.time()), incomplete=True)

    for _ in range(2):
        place.within(broken, create=False, outdated=True)
    (successor,) = reconciled(place, "--yes")["successors"]

    async def in_force(deployment):
        return [mark.id for mark in deployment.store.ledger.marks("hold")]

    assert place.within(in_force) == [successor]


def test_what_is_given_up_is_named_for_nothing_is_sealed_under_it_again(place):
    # Given a backup from before the re-wrap of the month's day
    copy = backup(place)
    erased(place, PERSON)
    assert place.call("retention", "run", "--rewrap").status == 0
    restore(place, copy)
    # When
    done = place.call("keys", "reconcile", "--yes")
    # Then
    assert done.status == 0, done.err
    assert f"given up: pii/{time.strftime('%Y-%m', time.gmtime())}. " in done.err
    place.publish(sms_cdr(record_id="c-9", recipient=OTHER, content="later", occurred_at=ago()))
    assert place.work() == 1
    assert states(place) == []


# --- what is not enough to go by ---------------------------------------------------------------------------------


def offboarded(place):
    assert place.call("account", "offboard", "acme", "--terminated", ago()).status == 0


def destroyed_due(place):
    ahead = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60 * 86_400))
    assert place.call("keys", "destroy-due", "--now", ahead, "--yes").status == 0


def unrestricted(place):
    async def ends(deployment):
        desk = office(deployment)
        await restrict(desk, OTHER, None, "CASE-2", int(time.time()))
        await unrestrict(desk, OTHER, None, "CASE-3", int(time.time()))

    place.within(ends)


@pytest.mark.parametrize(
    "destroys",
    [lambda place: erased(place, PERSON), offboarded, destroyed_due, unrestricted],
    ids=("erased", "offboarded", "destroyed_due", "unrestricted"),
)
def test_a_whole_log_is_known_as_whole_whatever_was_destroyed_last(place, destroys):
    copy = backup(place)
    destroys(place)
    restore(place, copy)
    refused(place)
    reconciled(place)


def test_a_lost_counter_is_taken_from_the_audit_stream_on_the_operators_word(place):
    copy = backup(place)
    erased(place, PERSON)
    (counter,) = (place.folder / "streamveil-kms").glob("*.counter")
    counter.unlink()
    # Nothing opens, and no key is destroyed: a new counter would forget what was
    assert "counter" in one_line(place.call("keys", "status"))
    (kek, *_) = (place.folder / "streamveil-kms").glob("*.kek")
    kms = LocalKms.open(counter.parent, counter.name.split(".")[0])
    with pytest.raises(KeysUnusable, match="counter is lost"):
        kms.destroy(kek.name.split(".", 1)[1].removesuffix(".kek"))
    assert kek.exists()
    assert not counter.exists()
    restore(place, copy)
    line = one_line(place.call("keys", "reconcile"))
    assert "nothing was done; restore the counter, or go on with what the stream names: --yes" in line
    assert not counter.exists()
    # When
    assert reconciled(place, "--yes")["sids"] == 1
    # Then
    assert states(place) == sorted([OTHER, THIRD])
    assert place.call("keys", "status").status == 0


def test_a_log_that_was_brought_back_too_does_not_tell_what_was_destroyed(place):
    copies = {name: backup(place, name) for name in ("log.db", "keys.db")}
    erased(place, PERSON)
    for name, copy in copies.items():
        restore(place, copy, name)
    refused(place)
    line = one_line(place.call("keys", "reconcile"))
    assert "was the log brought back by a backup too? Nothing was done" in line
    refused(place)
    # it is the operator's word then
    assert reconciled(place, "--yes")["sids"] == 0
    assert states(place) == sorted([PERSON, OTHER, THIRD])
    assert place.tail("audit")[-4]["value"]["action"] in ("reconcile", "reconciled", "reveal")


def test_an_audit_stream_that_was_edited_is_not_gone_by(place):
    copy = backup(place)
    erased(place, PERSON)
    restore(place, copy)
    with contextlib.closing(sqlite3.connect(place.log_path)) as db, db:  # the erasure is cut out
        rows = db.execute("SELECT rowid, body FROM rows WHERE stream = 'audit' ORDER BY next_offset").fetchall()
        edited = [(rowid, bytes(body)) for rowid, body in rows if b'"erase"' in bytes(body)]
        assert len(edited) == 1
        rowid, body = edited[0]
        db.execute(
            "UPDATE rows SET body = ? WHERE rowid = ?",
            (body.replace(b'"reason":"CASE-1"', b'"reason":"CASE-2"'), rowid),
        )
    line = one_line(place.call("keys", "reconcile"))
    assert "the audit stream is not whole (changed_entry" in line
    refused(place)
    # and one that is no entry at all is never gone by
    with contextlib.closing(sqlite3.connect(place.log_path)) as db, db:
        db.execute("UPDATE rows SET body = ? WHERE rowid = ?", (body.replace(b'{"v":1,', b'["v",1,'), rowid))
    for more in ((), ("--yes",)):
        assert "cannot be read, so it cannot be told what was destroyed" in one_line(
            place.call("keys", "reconcile", *more)
        )
    refused(place)


@pytest.mark.parametrize("step", ["destroy_sids", "destroy_epoch", "catch_up"])
def test_killed_half_way_it_stays_closed_and_is_finished_by_running_it_again(place, step):
    copy = backup(place)
    erased(place, PERSON)
    shredded(place)
    restore(place, copy)

    async def broken(deployment):
        def killed(*_):
            raise KeyboardInterrupt

        setattr(deployment.store, step, killed)
        with pytest.raises(KeyboardInterrupt):
            await reconcile(deployment, int(time.time()))

    place.within(broken, create=False, outdated=True)
    refused(place)
    refused(place)
    done = reconciled(place)
    assert (done["sids"], done["epochs"]) == (1, step != "catch_up")
    assert states(place) == sorted([OTHER, THIRD])
    assert set(opened(place, "content")) == {"destroyed"}


# --- rotations since ---------------------------------------------------------------------------------------------


def test_opt_outs_stand_though_the_backup_has_not_the_token_key_that_they_are_under(place):
    assert place.call("optout", "add", PERSON, "--account", "acme", "--reason", "CASE-1").status == 0
    copy = backup(place)
    assert place.call("keys", "rotate", "token").status == 0
    assert place.call("optout", "add", OTHER, "--account", "acme", "--sender", "ACME").status == 0
    assert (
        place.call(
            "optout",
            "remove",
            PERSON,
            "--account",
            "acme",
        ).status
        == 0
    )
    assert place.call("optout", "add", PERSON, "--channel", "sms").status == 0
    restore(place, copy)
    refused(place)
    done = reconciled(place)
    assert done["opt_outs"] == 3
    (summary,) = [line["summary"] for line in place.call("keys", "status", "--json").lines if "summary" in line]
    assert summary["token_key"] == 3
    found = {}
    for number in (PERSON, OTHER, THIRD):
        (line,) = place.call("optout", "check", number, "--json").lines
        found[number] = sorted((entry["scope"], entry["channel"]) for entry in line["entries"])
    assert found == {PERSON: [("platform", "sms")], OTHER: [("sender:acme:…", "sms"), ("sender:acme:…", "voice")],
                     THIRD: []}  # fmt: skip
    assert reconciled(place)["opt_outs"] == 0


def test_a_backup_from_during_a_rotation_has_the_key_and_is_only_switched(place):
    assert place.call("optout", "add", PERSON, "--account", "acme").status == 0

    async def add_key(deployment):
        deployment.store.add_token_key()

    place.within(add_key)
    copy = backup(place)
    assert place.call("keys", "rotate", "token").status == 0
    restore(place, copy)
    assert reconciled(place)["opt_outs"] == 0
    (line,) = place.call("optout", "check", PERSON, "--json").lines
    assert line["opted_out"] is True


def test_the_root_key_may_have_been_rotated_since(place):
    copy = backup(place)
    assert place.call("keys", "rotate", "root").status == 0
    restore(place, copy)
    done = place.call("keys", "status")
    assert done.status == 0, done.err
    assert states(place) == sorted([PERSON, OTHER, THIRD])


# --- what is left on disk ----------------------------------------------------------------------------------------


def test_no_file_holds_a_destroyed_key_afterwards(place):
    # Given the wrapped keys of a person, of an epoch, and all of them, as they lie on disk
    with contextlib.closing(sqlite3.connect(place.data / "keys.db")) as db:
        tables = [
            name
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'persons_%' AND type = 'table'")
        ]
        (table,) = tables
        rows = {sid.hex(): wrapped for sid, wrapped in db.execute(f"SELECT sid, wrapped FROM {table}")}
        epochs = {row[0]: row[1] for row in db.execute("SELECT domain, wrapped FROM epoch_keys")}
    (sid,) = around(place, lambda store: known(store, PERSON))
    assert found_on_disk(place, rows[sid])
    # When
    erased(place, PERSON)
    shredded(place)
    # Then
    assert not found_on_disk(place, rows[sid])
    assert not found_on_disk(place, epochs["content"])
    assert found_on_disk(place, epochs["pii"])
    # and after all are wrapped anew nothing of before is there
    assert place.call("keys", "rotate").status == 0
    assert not any(found_on_disk(place, wrapped) for wrapped in (*rows.values(), *epochs.values()))


def found_on_disk(place, wrapped):
    return [path for path in place.files() if wrapped in path.read_bytes()]
