"""Retention runs on real files: what is due dies, the logs are cut, a run that was killed is finished by the next."""

import asyncio
import signal
import sys
import time
from datetime import UTC, datetime

import orjson
import pytest

from processors.keyring import EpochRef, Needs
from processors.retention import instant
from processors.screen.suppression import parse_key
from schemas.catalog import CATALOG, INPUTS
from schemas.errors import KeysBusy, LogBusy
from schemas.fields import normalise
from schemas.outbound import Message, Output
from schemas.policy import Period
from streams.keys.ledger import Mark
from streams.keys.sqlite import SqliteKeyStore
from streams.log.sqlite import SqliteLog
from streams.officer import holds, retention
from streams.watch.overdue import overdue
from streams.worker.supervisor import _retention_run
from tests.support.audit import edit_audit
from tests.support.commands import PATIENCE_S, SHORT_LEASE, Place, ago, eventually, one_line
from tests.support.records import DAY_S, PERSON, preference, reply, sms_cdr, sms_request, voice_cdr

SEALED = ("cleared", "content", "cdr.pii", "review", "quarantine")
KEPT = ("cdr.anonymous", "suppressions", "audit", "held")
"""What does not die within 13 months."""
NO_JOB = "\n[retention]\nscheduled = false\n"


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


@pytest.fixture
def full(place):
    """A deployment with something in every stream."""
    now = ago()
    place.publish(
        sms_request(record_id="q1", recipient=PERSON, occurred_at=now),
        voice_cdr(record_id="v1", recipient=PERSON, occurred_at=now),
        sms_cdr(record_id="c1", recipient=PERSON, occurred_at=now),
        reply("stop it", record_id="m1", occurred_at=now),
        preference(record_id="p1", sender="+14155550199", occurred_at=now),
        b"not json",
    )
    assert place.work() == 6
    return place


def in_months(months):
    day = Period(months, "months").after(datetime.now(UTC).date())
    return f"{day.isoformat()}T00:00:00Z"


def ran(place, *more):
    done = place.call("retention", "run", "--json", *more)
    assert done.status == 0, done.err
    (report,) = done.lines
    return report


def entries(place, action):
    return [value for value in place.values("audit") if value["action"] == action]


def keys(place):
    done = place.call("keys", "status", "--json")
    assert done.status == 0, done.err
    return {(one["domain"], one["owner"], one["epoch"]): one["state"] for one in done.lines if "domain" in one}


def begins(place, stream):
    return place.within(lambda deployment: deployment.log.begin_offsets(stream))


def ends(place, stream):
    return place.within(lambda deployment: deployment.log.end_offsets(stream))


# --- what is due ----------------------------------------------------------------------------------------------------


def test_where_nothing_is_due_nothing_is_done_and_one_entry_a_day_says_so(full):
    first, second = ran(full), ran(full)
    for report in (first, second):
        assert (report["epochs"], report["persons"], report["days"], report["cut"]) == (0, 0, [], [])
        assert (report["dry"], report["skipped"], report["failed"]) == (False, [], False)
    assert len(entries(full, "retention")) == 1
    assert set(keys(full).values()) == {"alive"}


def test_ahead_of_the_clock_a_run_says_what_would_go_and_touches_nothing(full):
    before, there = keys(full), {name: full.stored(name) for name in CATALOG if name not in INPUTS}
    report = ran(full, "--now", in_months(13))
    assert report["dry"]
    assert report["epochs"] == sum(domain not in ("suppression", "held") for domain, _, _ in before) > 4
    assert {one["stream"] for one in report["cut"]} == {*SEALED, "verdicts", "billing.deltas"} - {
        name for name in ("billing.deltas",) if not there[name]
    }
    assert keys(full) == before
    assert {name: full.stored(name) for name in there} == there


def test_what_is_due_dies_with_its_keys_and_its_records_and_the_rest_stays(full):
    numbers, old = {name: len(full.stored(name)) for name in KEPT}, keys(full)
    at = in_months(13)

    report = ran(full, "--now", at, "--yes")

    # Then every key with a deadline is gone, and so are the records under it
    assert not report["dry"]
    assert report["epochs"] == sum(domain not in ("suppression", "held") for domain, _, _ in old)
    assert report["persons"] > 0
    states = keys(full)
    assert {state for (domain, _, _), state in states.items() if domain not in ("suppression", "held")} == {"destroyed"}
    assert states["suppression", "platform", "-"] == "alive"
    for stream in (*SEALED, "verdicts"):
        assert full.stored(stream) == []
        assert begins(full, stream) == ends(full, stream) != [0, 0, 0, 0]
    # Then what lives on is all there, and opens
    for stream in ("cdr.anonymous", "suppressions", "held"):
        assert len(full.stored(stream)) == numbers[stream]
    assert full.opened("suppressions") == [{"number": "+14155550199"}]
    # Then what was destroyed stands in audit, before the counts
    named = [name for one in entries(full, "destroy") for name in one.get("destroyed", {}).get("epochs", ())]
    assert sorted(named) == sorted("/".join(ref) for ref in old if ref[0] not in ("suppression", "held"))
    (told,) = entries(full, "retention")
    assert (told["epochs"], told["days"], told["failed"]) == (report["epochs"], report["days"], False)
    assert told["cut"]["cdr.pii"] == 2 + 1
    # Then a run of now has nothing left to do
    assert ran(full)["epochs"] == 0


def test_the_table_says_the_same_as_the_object(full):
    at = in_months(13)
    report, shown = ran(full, "--now", at), full.call("retention", "run", "--now", at)
    assert shown.status == 0
    assert shown.out.startswith(f"Dry run: what would go as of {at}; nothing did.\n")
    for one in report["cut"]:
        assert f"stream {one['stream']}" in shown.out
    assert f"{report['epochs']:,}" in shown.out


@pytest.mark.parametrize("more", [(), ("--yes",)])
def test_an_instant_behind_the_clock_is_refused(full, more):
    assert "behind the clock" in one_line(full.call("retention", "run", "--now", ago(3600), *more))
    assert full.call("retention", "run", "--now", ago(5), *more).status == 0


def test_more_than_thirteen_months_ahead_nothing_is_destroyed(full):
    before = keys(full)
    later = instant(int(datetime.fromisoformat(in_months(13)).timestamp()) + DAY_S)
    assert "13 months" in one_line(full.call("retention", "run", "--now", later, "--yes"))
    assert keys(full) == before
    assert ran(full, "--now", later)["dry"]


def test_ahead_of_the_clock_only_the_local_key_service_is_destroyed_under(full):
    with full.config.open("a") as file:
        file.write('\n[vault]\naddress = "https://127.0.0.1:1"\ntoken_file = "token"\n')
    assert "local-file" in one_line(full.call("retention", "run", "--now", in_months(1), "--yes"))


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_moved_by_a_day_brings_nothing_back(full, monkeypatch, days):
    # Given a run by a clock that is a day off, and then by the right one again
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + days * DAY_S)
    monkeypatch.setattr(SqliteKeyStore, "_now_s", lambda _: time.time())  # it is of the same machine
    moved = ran(full)
    monkeypatch.undo()
    dead = {ref for ref, state in keys(full).items() if state == "destroyed"}
    assert bool(dead) == bool(moved["epochs"]) == (days > 0)
    assert {domain for domain, _, _ in dead} <= {"transit"}
    # Then what died stays dead, what lives opens, and the pipeline goes on
    ran(full)
    full.publish(sms_cdr(record_id="c2", occurred_at=ago(0)))
    assert full.work() == 1
    states = keys(full)
    assert {states[ref] for ref in dead} <= {"destroyed"}
    assert len(full.opened("cdr.pii")) == 4


def test_a_machine_whose_clock_is_ahead_of_the_store_s_destroys_nothing_early(full, monkeypatch):
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + DAY_S)
    report = ran(full)
    monkeypatch.undo()
    assert (report["epochs"], report["days"], report["cut"]) == (0, [], [])
    assert {state for _, state in keys(full).items()} == {"alive"}
    assert len(full.opened("cdr.pii")) == 3


def test_an_older_token_key_that_cannot_be_looked_at_now_stops_no_run(full, monkeypatch):
    def busy(_):
        raise KeysBusy

    monkeypatch.setattr("streams.officer.rotation.drop_old_tokens", busy)
    assert [one["what"] for one in ran(full)["skipped"]] == ["token keys"]


def test_what_cannot_be_cleared_under_a_key_that_a_clock_ahead_destroyed_waits_for_the_next(full):
    # Given that the transit keys of this hour and the next were destroyed before their time
    def destroy(deployment):
        now_s = int(time.time())
        owner = next(key.owner for key in deployment.store.status(now_s) if key.domain == "transit")
        for at_s in (now_s, now_s + 3600):
            ref = EpochRef("transit", owner, instant(at_s)[:13])
            deployment.store.fetch(Needs({ref: (now_s + 2 * DAY_S, 1)}, {}), now_s)
            deployment.store.destroy_epoch(ref)

    full.within(lambda deployment: _returned(destroy(deployment)))
    full.publish(sms_request(record_id="q2", occurred_at=ago(0)))
    process = full.start("run", "--until-idle")
    eventually(lambda: "waiting: the key for what is new is destroyed" in full.told(process), "the line")
    process.send_signal(signal.SIGTERM)
    assert full.ended(process).status == 0
    assert full.committed() == 6


def test_after_a_rehearsal_ahead_of_the_clock_the_deployment_goes_on_with_new_keys(full):
    # Given that a year was destroyed before its time
    ran(full, "--now", in_months(13), "--yes")
    assert full.opened("cdr.pii") == []
    # When there is a communication of this month, whose key is dead, and an opt-out
    full.publish(sms_cdr(record_id="c2", occurred_at=ago(0)), preference(occurred_at=ago(0)))
    # Then nothing waits, and what is dead is not made again
    before = full.ends("cdr.pii"), full.ends("cdr.anonymous"), full.ends("suppressions")
    assert full.work() == 2
    after = full.ends("cdr.pii"), full.ends("cdr.anonymous"), full.ends("suppressions")
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 1, 1]
    # And what is minted since, of a day that was buried, is alive until it is buried again
    assert not ran(full)["failed"]
    assert ran(full)["persons"] == 0


def test_a_run_says_that_the_audit_log_was_altered_and_destroys_what_is_due_all_the_same(full):
    ran(full, "--now", in_months(13), "--yes")
    edit_audit(full, lambda values: values[1:])
    done = full.call("retention", "run", "--json")
    assert done.status == 1
    (report,) = done.lines
    assert [one["why"] for one in report["skipped"] if one["what"] == "audit"]
    assert "findings" in report["skipped"][0]["why"]


# --- killed, twice at once, refused ---------------------------------------------------------------------------------

KILLS = {
    "before anything is destroyed": "import streams.keys.sql as m; C = m.SqlKeyStore; name = 'bury_day'; after = False",
    "after the first day": "import streams.keys.sql as m; C = m.SqlKeyStore; name = 'bury_day'; after = True",
    "before the first cut": "import streams.log.sqlite as m; C = m._File; name = 'drop'; after = False",
    "after the first cut": "import streams.log.sqlite as m; C = m._File; name = 'drop'; after = True",
    "before it is told": "import streams.keys.ledger as m; C = m.SqlLedger; name = 'set_progress'; after = False",
}
_DIE = """
{where}
import os
real = getattr(C, name)
def deadly(*args, **options):
    if after: real(*args, **options)
    os._exit(9)
setattr(C, name, deadly)
"""


@pytest.mark.parametrize("where", KILLS)
def test_a_run_that_was_killed_is_finished_by_the_next(full, where):
    at = in_months(13)
    wanted = ran(full, "--now", at)
    killed = full.run("retention", "run", "--now", at, "--yes", sabotage=_DIE.format(where=KILLS[where]))
    assert killed.status == 9, killed.err

    report = ran(full, "--now", at, "--yes")

    assert not report["failed"]
    assert {state for (domain, *_), state in keys(full).items() if domain != "suppression"} == {"destroyed"}
    for one in wanted["cut"]:
        assert full.stored(one["stream"]) == []
    named = [name for one in entries(full, "destroy") for name in one.get("destroyed", {}).get("epochs", ())]
    assert len(set(named)) == wanted["epochs"]


def test_two_runs_at_once_do_what_one_does(full):
    at = in_months(13)
    wanted = ran(full, "--now", at)
    both = [full.start("retention", "run", "--json", "--now", at, "--yes") for _ in range(2)]
    for process in both:
        done = full.ended(process)
        assert done.status == 0, done.err
    assert {state for (domain, *_), state in keys(full).items() if domain != "suppression"} == {"destroyed"}
    for one in wanted["cut"]:
        assert full.stored(one["stream"]) == []


def test_nothing_dies_while_what_is_under_hold_cannot_be_kept(full, monkeypatch):
    before = keys(full)

    async def cannot(*_, **__):
        raise LogBusy("the disk sleeps")

    monkeypatch.setattr(holds, "preserve", cannot)
    done = full.call("retention", "run", "--json", "--now", in_months(13), "--yes")
    (report,) = done.lines
    assert (done.status, report["failed"], report["epochs"], report["cut"]) == (1, True, 0, [])
    (skipped,) = report["skipped"]
    assert "the disk sleeps" in skipped["why"]
    assert keys(full) == before
    assert [one["failed"] for one in entries(full, "retention")] == [True]


def test_nothing_is_destroyed_if_it_cannot_be_written_down_first(full, monkeypatch):
    before = keys(full)

    async def cannot(*_, **__):
        raise LogBusy("the disk sleeps")

    monkeypatch.setattr("streams.keys.audit.Auditor.write", cannot)
    assert "the disk sleeps" in one_line(full.call("retention", "run", "--now", in_months(13), "--yes"))
    monkeypatch.undo()
    assert keys(full) == before


# --- re-wrap --------------------------------------------------------------------------------------------------------


def test_what_was_destroyed_early_is_rewrapped_before_its_window_ends(full):
    async def forget(deployment):
        token = deployment.tokens.of(normalise(PERSON).value)
        deployment.store.destroy_persons("platform", [token])
        return deployment.store.stale_days()

    stale = full.within(forget)
    assert stale
    # Then the window of a day is not over yet, but asked for it is done at once
    assert ran(full)["rewrapped"] == {}
    assert ran(full, "--rewrap")["rewrapped"].keys() == stale.keys()
    assert full.within(lambda deployment: _returned(deployment.store.stale_days())) == {}
    assert ran(full, "--rewrap")["rewrapped"] == {}
    full.publish(sms_cdr(record_id="c2", recipient="+14155550123", occurred_at=ago(0)))
    assert full.work() == 1
    # Then shortly before the window ends it is done without being asked
    full.within(lambda deployment: _returned(_destroy_other(deployment)))
    later = instant(int(time.time()) + DAY_S - 1200)
    assert ran(full, "--now", later)["rewrapped"]


async def _returned(value):
    return value


def _destroy_other(deployment):
    (sid, *_) = next(deployment.store.sids_of("platform"))
    deployment.store.destroy_sids([sid])


# --- which records are dead -----------------------------------------------------------------------------------------


def value_of(expires_at, **fields):
    return orjson.dumps({**fields, "privacy": {"expires_at": expires_at, "role": "controller"}})


NOW_S = 1_800_000_000
PAST, NOW, FUTURE = instant(NOW_S - 1), instant(NOW_S), instant(NOW_S + 1)


@pytest.mark.parametrize(
    ("value", "dead"),
    [
        (value_of(PAST), True),
        (value_of(NOW), True),
        (value_of(FUTURE), False),
        (value_of(None), False),
        (value_of("soon"), False),
        (b"not json", False),
        (b"", False),
        (b'{"privacy":{"expires_at":"2000-01-01', False),
        (value_of(PAST, record_id='"expires_at":"2999-01-01T00:00:00Z"'), True),
        (value_of(FUTURE, record_id='"expires_at":"2000-01-01T00:00:00Z"'), False),
        (value_of(FUTURE, aside={"expires_at": PAST}), False),
        (value_of(PAST, aside={"expires_at": FUTURE}), True),
        (value_of(None, aside={"expires_at": PAST}, more={"expires_at": PAST}), False),
    ],
)
def test_a_record_is_dead_from_its_own_instant_on_and_live_in_doubt(value, dead):
    assert retention._expired(value, NOW.encode()) == dead


def cut(tmp_path, values, *, dry=False, every=None, monkeypatch=None):
    """Return what is left of a partition of `content`, a row each, and the report, after a cut."""
    if every is not None:
        monkeypatch.setattr(retention, "CUT_EVERY", every)
        monkeypatch.setattr(retention, "PAGE", 2)

    async def inside():
        log = SqliteLog.open(tmp_path / "log.db", partitions=2)
        for value in values:
            await log.append([Output("content", 1, [Message(0, None, (), value)])])
        dead = retention._dead(None, "content", NOW_S)
        found = await retention._cut(log, "content", dead, dry, lambda _: None)
        left = [stored.value for stored in await log.read("content", 1, 0, 100)]
        await log.close()
        return left, found

    return asyncio.run(inside())


def test_a_stream_is_cut_to_its_first_live_record_and_no_further(tmp_path):
    values = [value_of(PAST), value_of(NOW), value_of(FUTURE), value_of(PAST)]
    left, found = cut(tmp_path, values)
    assert left == values[2:]
    assert (found.begins, found.ends, found.records) == ((0, 0), (0, 2), 2)


def test_a_dry_cut_says_how_far_and_cuts_nothing(tmp_path):
    values = [value_of(PAST)] * 3
    left, found = cut(tmp_path, values, dry=True)
    assert left == values
    assert found.records == 3


def test_a_long_cut_is_made_in_steps(tmp_path, monkeypatch):
    steps = []
    real = SqliteLog.cut

    async def seen(self, stream, offsets):
        steps.append(offsets)
        return await real(self, stream, offsets)

    monkeypatch.setattr(SqliteLog, "cut", seen)
    values = [*[value_of(PAST)] * 9, value_of(FUTURE)]
    left, found = cut(tmp_path, values, every=4, monkeypatch=monkeypatch)
    assert left == values[9:]
    assert steps == [[0, 4], [0, 8], [0, 9]]
    assert found.records == 9


# --- opt-outs -------------------------------------------------------------------------------------------------------


def test_an_opt_out_that_a_newer_record_replaced_is_cut_off_and_the_newest_stands(place, monkeypatch):
    # Given an opt-out given again and again, and others behind it
    for number in ("+447700900001", "+447700900001", "+447700900001", "+447700900002"):
        assert place.call("optout", "add", number, "--channel", "sms").status == 0
    before = len(place.stored("suppressions"))
    assert before == 4

    report = ran(place)

    left = [stored.key for stored in place.stored("suppressions")]
    assert len(set(left)) == 2
    assert len(left) == before - sum(one["records"] for one in report["cut"]) < before
    for number in ("+447700900001", "+447700900002"):
        assert "sms" in place.call("optout", "check", number).out
    # Then it is looked at once a day
    monkeypatch.setattr(retention, "_first_standing", None)
    assert ran(place)["cut"] == []


def first_standing(tmp_path, records, version=1, *, candidates=100_000, monkeypatch):
    """Return the first offset that counts, of records of one partition: (token version, token's number, end)."""
    monkeypatch.setattr(retention, "CANDIDATES", candidates)
    monkeypatch.setattr(retention, "PAGE", 2)
    keys = [f"{number}.{token:032x}|platform|all|sms|person|{end}".encode() for number, token, end in records]
    assert all(parse_key(key) for key in keys)

    async def inside():
        log = SqliteLog.open(tmp_path / "log.db", partitions=1)
        for key in keys:
            await log.append([Output("suppressions", 0, [Message(0, key, (), b"{}")])])
        found = await retention._first_standing(log, 0, 0, len(keys), version)
        await log.close()
        return found

    return asyncio.run(inside())


@pytest.mark.parametrize(
    ("records", "first"),
    [
        ([], 0),
        ([(1, 7, "out")], 0),
        ([(1, 7, "out"), (1, 7, "out")], 1),
        ([(1, 7, "out"), (1, 7, "in"), (1, 8, "out")], 0),  # a lift is a record of its own
        ([(1, 7, "out"), (1, 8, "out"), (1, 7, "out")], 1),
        ([(1, 7, "out"), (1, 8, "out"), (1, 7, "out"), (1, 8, "out")], 2),
        ([(0, 7, "out"), (0, 8, "out"), (1, 9, "out"), (0, 9, "out")], 2),  # of a token key that was replaced
        ([(0, 7, "out"), (0, 8, "out")], 2),
        ([(2, 7, "out"), (1, 8, "out")], 0),  # of one that waits
    ],
)
def test_of_opt_outs_the_first_counts_that_nothing_newer_replaces(tmp_path, monkeypatch, records, first):
    assert first_standing(tmp_path, records, monkeypatch=monkeypatch) == first


def test_only_so_many_opt_outs_are_looked_at_but_against_all_that_follow(tmp_path, monkeypatch):
    # Given four entries that are all replaced later / Then a day takes the first two of them
    records = [(1, token, "out") for token in (1, 2, 3, 4, 1, 2, 3, 4)]
    assert first_standing(tmp_path, records, candidates=2, monkeypatch=monkeypatch) == 2


# --- what is overdue ------------------------------------------------------------------------------------------------


def test_what_is_not_destroyed_a_quarter_of_an_hour_after_its_instant_is_overdue(full):
    def look(now_s):
        return full.within(lambda deployment: _returned(overdue(deployment.store, now_s)))

    deadline_s = min(
        int(datetime.fromisoformat(one["deadline"]).timestamp())
        for one in full.call("keys", "status", "--json").lines
        if one.get("deadline")
    )
    alive = look(int(time.time()))
    assert (alive.destructions, alive.oldest_s, alive.requests) == (0, None, 0)
    assert alive.keks > 3
    due, late = look(deadline_s), look(deadline_s + 901)
    assert (due.destructions, due.oldest_s) == (0, deadline_s)
    assert late.destructions > 0
    assert late.oldest_s == deadline_s
    # Then a run settles that
    ran(full, "--now", instant(deadline_s + 901), "--yes")
    settled = look(deadline_s + 901)
    assert (settled.destructions, settled.oldest_s) == (0, None)


# --- on schedule ----------------------------------------------------------------------------------------------------


def runs(place):
    return len(entries(place, "retention")) if place.log_path.exists() and place.ends("audit") else 0


@pytest.mark.parametrize("workers", [1, 2])
def test_beside_the_workers_retention_runs(full, workers):
    process = full.start("run", "--workers", workers)
    eventually(lambda: runs(full), "a retention run")
    process.send_signal(signal.SIGTERM)
    done = full.ended(process)
    assert done.status == 0
    assert "retention" not in done.err


def test_no_retention_runs_where_it_is_turned_off_or_for_who_works_until_idle(full):
    with full.config.open("a") as file:
        file.write(NO_JOB)
    process = full.start("run", sabotage="import streams.worker.supervisor as s; s._START_S = 0.0")
    full.publish(sms_cdr(record_id="c2", occurred_at=ago(0)))
    eventually(lambda: full.committed() == 7, "the work")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert full.ended(process).status == 0
    assert runs(full) == 0


def test_a_retention_run_that_fails_is_one_line_and_the_workers_go_on(full):
    broken = "import sys, streams.worker.supervisor as s; s._START_S = 0.0; sys.executable = '/bin/false'"
    process = full.start("run", sabotage=broken)
    eventually(lambda: "retention run:" in full.told(process), "the line")
    full.publish(sms_cdr(record_id="c2", occurred_at=ago(0)))
    eventually(lambda: full.committed() == 7, "the work")
    process.send_signal(signal.SIGTERM)
    done = full.ended(process)
    assert done.status == 0
    assert done.err.count("retention run:") == 1


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ('print(\'{"skipped": [], "failed": false}\')', ("done", "")),
        ('print(\'{"skipped": [{"what": "held", "why": "not cut"}], "failed": false}\')', ("partial", "")),
        ('print(\'{"skipped": [{"what": "a", "why": "b"}], "failed": true}\')', ("failed", "a: b")),
        ('sys.exit("streamveil: The key store is busy")', ("failed", "The key store is busy")),
        ("os.kill(os.getpid(), 9)", ("failed", "it was killed")),
    ],
)
def test_how_a_run_ended_is_told(code, ended):
    assert asyncio.run(_retention_run([sys.executable, "-c", f"import os, sys; {code}"])) == ended


def test_a_run_is_ended_with_the_process_that_started_it():
    async def cancelled():
        task = asyncio.create_task(_retention_run([sys.executable, "-c", "import time; time.sleep(600)"]))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began_s = time.monotonic()
    asyncio.run(cancelled())
    assert time.monotonic() - began_s < PATIENCE_S


def test_the_released_copies_of_a_hold_are_cut_off(full):
    mark_id = "ab" * 16

    async def inside(deployment):
        ledger = deployment.store.ledger
        ledger.add_mark(Mark(mark_id, "hold", "acme", (), "CASE-1", int(time.time())), None)
        values = [value_of(None, hold=mark_id), value_of(None, hold="cd" * 16)]
        for value in values:
            await deployment.log.append([Output("held", 0, [Message(0, None, (), value)])])
        before = await retention._cut_all(deployment, int(time.time()), True, lambda _: None)
        deployment.store.destroy_epoch(EpochRef("held", "platform", mark_id))
        ledger.end_mark(mark_id, int(time.time()))
        after = await retention._cut_all(deployment, int(time.time()), False, lambda _: None)
        left = [stored.value for stored in await deployment.log.read("held", 0, 0, 10)]
        return before[0], after[0], left == values[1:]

    before, after, is_right = full.within(inside)
    assert [cut.stream for cut in before] == []
    assert [(cut.stream, cut.records) for cut in after] == [("held", 1)]
    assert is_right
