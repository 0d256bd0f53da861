"""Legal holds, on real files: what is kept, what is not, that nothing dies before, and that release destroys."""

import asyncio
import os
import pwd
import shutil
import sqlite3
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import orjson
import pytest

from processors.keyring import EpochRef
from schemas.errors import KeysUnusable, KmsUnavailable, StreamveilError
from schemas.fields import PLATFORM
from schemas.sealed import KeyId, take_apart
from streams.config import load
from streams.keys.ledger import AT_WILL
from streams.keys.opening import open_store
from streams.keys.sqlite import SqliteKeyStore
from streams.keys.store import Gone
from streams.officer import holds
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import DEFAULT_POLICY, OTHER, PERSON, found_in, haystack, reply, sms_cdr, voice_cdr

DAY_S = 86_400
THIRD = "+14155550177"
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def days_ago(days):
    """Return noon, UTC, of a day."""
    return f"{ago(days * DAY_S)[:10]}T12:00:00Z"


@pytest.fixture
def known(place):
    """A deployment in which a person was called, called somebody and wrote, and others did too."""
    place.publish(
        voice_cdr(record_id="called", recipient=PERSON, sender=OTHER, occurred_at=days_ago(3)),
        voice_cdr(record_id="calls", recipient=THIRD, sender=PERSON, occurred_at=days_ago(2)),
        reply("stop it", record_id="wrote", occurred_at=days_ago(1)),
        sms_cdr(record_id="beta", recipient=PERSON, account_id="beta", occurred_at=days_ago(1)),
        sms_cdr(record_id="others", recipient=THIRD, occurred_at=days_ago(1)),
    )
    assert place.work() == 5
    return place


def call(place, *words):
    done = place.call(*words, "--json")
    assert done.status == 0, done.err
    return done.lines[0]


def hold(place, *more, whom=PERSON, reason="CASE-1"):
    return call(place, "subject", "hold", whom, "--reason", reason, *more)


def hold_account(place, *more, account="acme", reason="CASE-1"):
    return call(place, "account", "hold", account, "--reason", reason, *more)


def release(place, *more, reason="CASE-1"):
    return call(place, "subject", "release", PERSON, "--reason", reason, *more)["released"]


def preserve(place, now_s=None):
    return place.within(lambda deployment: holds.preserve(deployment, now_s=now_s or int(time.time())))


def kept(place):
    """Return (stream, record id) of what opens in `held`, sorted."""
    return sorted(
        (line["value"]["stream"], line["reveal"]["fields"].get("record_id"))
        for line in place.tail("held", "--reveal", "--reason", "X")
        if line["reveal"]["state"] == "revealed"
    )


def states(place, stream):
    return {line["reveal"]["state"] for line in place.tail(stream, "--reveal", "--reason", "X")}


def die(place):
    """Let everything die that has a deadline, as a retention run does: epochs, days, their KEKs."""

    async def inside(deployment):
        store, far_s = deployment.store, int(time.time()) + 420 * DAY_S
        for key in store.status(far_s):
            if key.state == "due":
                store.destroy_epoch(EpochRef(key.domain, key.owner, key.epoch))
        for day in store.due_days(far_s):
            store.bury_day(day, far_s)

    place.within(inside)


# --- what is kept ------------------------------------------------------------------------------------------------


def test_a_hold_keeps_a_persons_records_and_those_they_are_the_other_party_of(known):
    made = hold(known)
    assert made["records"] == 4
    assert kept(known) == [("cdr.pii", name) for name in ("beta", "called", "calls", "wrote")]


def test_a_hold_of_the_platforms_data_leaves_the_accounts_content(known):
    hold(known)
    assert {value["stream"] for value in known.values("held")} == {"cdr.pii"}


def test_a_hold_of_an_accounts_data_of_a_person_keeps_content_and_near_misses_of_that_account(known):
    assert hold(known, "--account", "acme")["records"] == 2
    assert kept(known) == [("content", "wrote"), ("review", "wrote")]
    assert hold(known, "--account", "beta", reason="CASE-2")["records"] == 1
    assert kept(known) == [("content", "beta"), ("content", "wrote"), ("review", "wrote")]


def test_a_hold_of_an_account_keeps_all_of_it_and_of_no_other(known):
    hold_account(known)
    assert kept(known) == [
        *(("cdr.pii", name) for name in ("called", "calls", "others", "wrote")),
        *(("content", name) for name in ("others", "wrote")),
        ("review", "wrote"),
    ]


@pytest.mark.parametrize(
    ("period", "names"),
    [
        ((3, 2), ["called"]),
        ((2, None), ["calls", "others", "wrote"]),
        ((None, 2), ["called"]),
        ((None, 3), []),
        ((0, None), []),
    ],
)
def test_a_hold_of_a_period_keeps_that_period_by_whole_days(known, period, names):
    words = [
        word
        for option, days in zip(("--from", "--to"), period, strict=True)
        if days is not None
        for word in (option, days_ago(days)[:10])
    ]
    hold_account(known, *words)
    assert [name for stream, name in kept(known) if stream == "cdr.pii"] == names
    hold(known, *words, reason="CASE-2")
    assert [name for name in names if name != "others"] == sorted(
        line["reveal"]["fields"]["record_id"]
        for line in known.tail("held", "--reveal", "--reason", "X")
        if (line["value"]["stream"], line["value"]["hold"]) == ("cdr.pii", hold(known, *words, reason="CASE-2")["hold"])
        and line["value"]["account_id"] == "acme"
    )


def test_a_day_on_which_the_period_begins_or_ends_is_kept_whole(known):
    day = days_ago(2)[:10]
    hold_account(known, "--from", f"{day}T23:00:00Z", "--to", f"{day}T23:30:00Z")
    assert kept(known) == [("cdr.pii", "calls")]


def test_a_copy_says_everything_and_where_it_is_from(known):
    made = hold(known)
    stored = {(one.stream, one.partition, one.offset): one for one in known.stored("cdr.pii")}
    opened = {
        (line["stream"], line["partition"], line["offset"]): line["reveal"]["fields"]
        for line in known.tail("cdr.pii", "--reveal", "--reason", "X")
    }
    for line in known.tail("held", "--reveal", "--reason", "X"):
        value = line["value"]
        source = (value["stream"], value["partition"], value["offset"])
        assert line["reveal"]["fields"] == opened[source]
        assert line["partition"] == value["partition"]
        assert value["hold"] == made["hold"]
        assert value["day"] == orjson.loads(stored[source].value)["month"] + value["day"][7:]
        assert value["privacy"]["data_class"] == "held"
        assert value["privacy"]["expires_at"] is None
        (part,) = value["sealed"]
        assert (part["group"], part["key"], part["sid"]) == ("held", f"held/platform/{made['hold']}/1", "-")


def test_nothing_of_a_copy_stands_clear(known):
    hold(known)
    values = b"\n".join(one.value for one in known.stored("held"))
    assert found_in(haystack(values), [PERSON, OTHER, THIRD, "called", "stop it"]) == []


def test_a_held_record_opens_to_the_dpo_only(known):
    hold(known)
    (known.folder / "roles.toml").write_text(
        "".join(f'[[grant]]\nuser = "{ME}"\nrole = "{role}"\naccounts = ["*"]\n' for role in ("lawful", "operator"))
    )
    known.configure(**SHORT_LEASE, roles="roles.toml")
    assert "may not open this stream" in one_line(known.call("tail", "held", "--reveal", "--reason", "X"))


# --- nothing else survives ---------------------------------------------------------------------------------------


def test_of_a_month_in_which_ten_thousand_people_spoke_exactly_the_held_ones_records_outlive_it(place):
    # Given 10,000 people of whom one is under hold, each of whom speaks to some others
    people = [f"+1415{2_000_000 + number}" for number in range(10_000)]
    at = days_ago(0) if datetime.now(UTC).hour >= 12 else days_ago(1)
    pairs = [(people[number], people[(number * 7 + 1) % 10_000]) for number in range(10_000)]
    place.configure(**SHORT_LEASE, batch_records=5000)
    place.publish(
        *(
            sms_cdr(record_id=f"r{number}", sender=one, recipient=two, direction="mt", occurred_at=at)
            for number, (one, two) in enumerate(pairs)
        )
    )
    assert place.work() == 10_000
    held = people[1234]
    theirs = sorted(f"r{number}" for number, pair in enumerate(pairs) if held in pair)
    assert len(theirs) >= 2
    hold(place, whom=held)
    # When the month dies
    die(place)
    # Then exactly their records open, wherever one looks
    assert kept(place) == [("cdr.pii", name) for name in theirs]
    assert len(place.tail("held")) == len(theirs)
    for stream in ("cdr.pii", "content", "review", "cleared", "quarantine"):
        assert states(place, stream) <= {"destroyed"}
    assert place.ends("cdr.pii") == place.ends("content") == 10_000

    async def alive(deployment):
        store = deployment.store
        sids = {part.sid for one in place_records for part in take_apart(one.value).parts}
        return {found for found in store.open_persons(sids, int(time.time())).values() if not isinstance(found, Gone)}

    place_records = place.stored("cdr.pii") + place.stored("content")
    assert place.within(alive) == set()


def test_what_was_dead_when_the_hold_was_made_is_not_brought_back(place):
    # Given content that dies after a day, of which no job has buried the key yet
    place.policy(DEFAULT_POLICY.replace('keep = "30 days"', 'keep = "1 days"'))
    place.publish(
        sms_cdr(record_id="old", recipient=PERSON, occurred_at=days_ago(1)),
        sms_cdr(record_id="new", recipient=PERSON, occurred_at=days_ago(0) if datetime.now(UTC).hour >= 12 else ago()),
    )
    assert place.work() == 2
    later_s = max(
        datetime.fromisoformat(value["privacy"]["expires_at"]).timestamp() for value in place.values("content")
    )
    earlier_s = min(
        datetime.fromisoformat(value["privacy"]["expires_at"]).timestamp() for value in place.values("content")
    )
    assert earlier_s < later_s

    async def hold_at(deployment):  # as if the hold had been made in between
        mark = holds.Mark("a" * 32, "hold", "acme", (), "CASE-1", int(earlier_s))
        deployment.store.ledger.add_mark(mark, None)
        return await holds.preserve(deployment, now_s=int(later_s) + 5 * DAY_S)

    place.within(hold_at)
    assert [name for stream, name in kept(place) if stream == "content"] == ["new"]


def test_a_late_job_still_keeps_what_died_after_the_hold_was_made(known):
    hold(known)
    known.publish(sms_cdr(record_id="later", recipient=PERSON, occurred_at=ago()))
    known.work()
    assert preserve(known, int(time.time()) + 420 * DAY_S).records == 1
    assert ("cdr.pii", "later") in kept(known)


# --- once, and before anything dies ------------------------------------------------------------------------------


def test_a_record_is_copied_once_per_hold(known):
    assert hold(known)["records"] == 4
    assert [preserve(known).records for _ in range(2)] == [0, 0]
    assert hold(known)["records"] == 0  # the same hold again
    assert hold(known, reason="CASE-2")["records"] == 4
    assert len(known.tail("held")) == 8


def test_what_comes_after_the_hold_is_kept_in_the_next_run(known):
    hold(known)
    known.publish(
        sms_cdr(record_id="next", recipient=PERSON, occurred_at=ago()),
        sms_cdr(record_id="another month", recipient=PERSON, occurred_at=ago(40 * DAY_S)),
        sms_cdr(record_id="not theirs", recipient=THIRD, occurred_at=ago()),
    )
    known.work()
    assert preserve(known) == holds.Preserved(2, 1)
    assert {name for _, name in kept(known)} >= {"next", "another month"}
    assert ("cdr.pii", "not theirs") not in kept(known)


@pytest.mark.parametrize("step", ["_audit", "_open", "_compare"])
def test_one_that_was_killed_goes_on_without_copying_twice(known, step):
    code = "import os\nfrom streams.officer import holds\n"
    code += f"holds._Copier.{step} = lambda *a, **k: os._exit(9)"
    assert known.run("subject", "hold", PERSON, "--reason", "CASE-1", sabotage=code).status == 9
    preserve(known)
    places = [(value["stream"], value["partition"], value["offset"]) for value in known.values("held")]
    assert len(places) == len(set(places)) == 4


def test_a_record_that_does_not_open_stops_it_in_one_line(known):
    # Given a record that somebody has changed in the log
    hold(known)
    known.publish(sms_cdr(record_id="next", recipient=PERSON, occurred_at=ago()))
    known.work()
    changed = known.stored("cdr.pii")[0]

    async def spoil(stream, partition, offset, limit, until=0):
        return [
            one._replace(value=one.value.replace(b'"box":"', b'"box":"AAAA', 1)) for one in await read(
                stream, partition, offset, limit, until
            )
        ]  # fmt: skip

    async def inside(deployment):
        nonlocal read
        read = deployment.log.read
        deployment.log.read = spoil
        await holds.preserve(deployment, now_s=int(time.time()))

    read = None
    with pytest.raises(StreamveilError, match="nothing is destroyed before") as raised:
        known.within(inside)
    assert changed.value.decode() not in str(raised.value)
    assert known.within(lambda deployment: holds.preserve(deployment, now_s=int(time.time()))).records == 1


def test_a_copy_that_is_not_as_it_was_does_not_count(known):
    async def inside(deployment):
        append = deployment.log.append

        async def lost(outputs, bookmark=None):
            if outputs[0].stream != "held":
                await append(outputs, bookmark)

        deployment.log.append = lost
        await holds.preserve(deployment, now_s=int(time.time()))

    hold(known)
    known.publish(sms_cdr(record_id="next", recipient=PERSON, occurred_at=ago()))
    known.work()
    with pytest.raises(KeysUnusable, match="read back"):
        known.within(inside)
    assert preserve(known).records == 1


def test_a_hold_stands_even_if_copying_fails_and_the_next_run_does_it(known):
    code = "from schemas.errors import LogFull\nfrom streams.officer import holds\n"
    code += "async def full(*_):\n    raise LogFull\nholds._Copier._copy = full"
    done = known.run("subject", "hold", PERSON, "--reason", "CASE-1", sabotage=code)
    assert "disk of the log is full" in one_line(done)
    assert preserve(known) == holds.Preserved(4, 1)


def test_a_policy_without_a_rule_for_held_data_says_so_before_anything_is_held(known):
    known.policy(DEFAULT_POLICY.replace('data_class = "held"\nrole', 'data_class = "support"\nrole'))
    assert "no processing rule for held" in one_line(known.call("subject", "hold", PERSON, "--reason", "CASE-1"))
    assert known.ends("audit") == 0


def test_destroyed_records_are_skipped(known):
    assert known.call("subject", "erase", PERSON, "--reason", "CASE-0").status == 0
    known.publish(sms_cdr(record_id="after", recipient=PERSON, occurred_at=ago()))
    known.work()
    hold(known)
    assert kept(known) == [("cdr.pii", "after")]


def test_a_correction_is_kept_beside_what_it_corrects(known):
    known.publish(sms_cdr(record_id="there", recipient=PERSON, location="Bonn", occurred_at=ago()))
    known.work()
    done = known.call("subject", "rectify", PERSON, "--reason", "CASE-3", "--set", "location=Berlin")
    assert done.status == 0, done.err
    hold(known)
    copies = known.tail("held", "--reveal", "--reason", "X")
    corrections = [line for line in copies if "corrects" in line["value"]]
    assert corrections
    for line in corrections:
        value = line["value"]
        assert line["reveal"]["fields"]["location"] == "Berlin"
        assert (value["stream"], value["partition"], value["corrects"]) in {
            (one["value"]["stream"], one["value"]["partition"], one["value"]["offset"]) for one in copies
        }


# --- release -----------------------------------------------------------------------------------------------------


def test_release_destroys_the_copies_and_nothing_else(known):
    hold(known)
    assert release(known) == 1
    assert states(known, "held") == {"destroyed"}
    assert states(known, "cdr.pii") == {"revealed"}
    assert preserve(known) == holds.Preserved(0, 0)


def test_each_hold_is_released_on_its_own(known):
    first, second = hold(known), hold(known, reason="CASE-2")
    assert release(known, reason="CASE-2") == 1
    opens = {line["value"]["hold"]: line["reveal"]["state"] for line in known.tail("held", "--reveal", "--reason", "X")}
    assert opens == {first["hold"]: "revealed", second["hold"]: "destroyed"}


def test_of_several_holds_it_must_be_said_which(known):
    first, second = hold(known), hold(known, reason="CASE-2")
    line = one_line(known.call("subject", "release", PERSON, "--reason", "DONE-1"))
    assert first["hold"] in line
    assert second["hold"] in line
    assert release(known, "--hold", first["hold"][:8]) == 1
    assert [mark.id for mark in marks(known)] == [second["hold"]]
    one_line(known.call("subject", "release", PERSON, "--reason", "DONE-1", "--hold", "abc"))


@pytest.mark.parametrize("noun", ["subject", "account"])
def test_a_release_of_another_case_destroys_nothing_and_names_what_is_in_force(known, noun):
    # Given the only hold in force
    whom = PERSON if noun == "subject" else "acme"
    made = call(known, noun, "hold", whom, "--reason", "CASE-1")["hold"]
    # When it is released under the reference of another case
    line = one_line(known.call(noun, "release", whom, "--reason", "CASE-11"))
    # Then it stands, nothing is noted, and the answer says how to name it
    assert f"no hold of this case; in force: {made} (CASE-1); name it with --hold" in line
    assert [mark.id for mark in marks(known)] == [made]
    assert states(known, "held") == {"revealed"}
    assert "release" not in {entry["action"] for entry in known.values("audit")}
    # and named so, it is released under whatever reference
    assert call(known, noun, "release", whom, "--reason", "CASE-11", "--hold", made)["released"] == 1


def test_of_an_accounts_hold_that_is_the_only_one_no_reason_is_needed_and_its_case_is_noted(known):
    hold_account(known, reason="COURT-8")
    assert call(known, "account", "release", "acme")["released"] == 1
    assert [entry["reason"] for entry in known.values("audit") if entry["action"] == "release"] == ["COURT-8"]


def test_an_account_that_has_no_keys_but_calls_is_known(known):
    known.publish(voice_cdr(record_id="calling", recipient=THIRD, sender=OTHER, account_id="callers",
                            occurred_at=days_ago(1)))  # fmt: skip
    known.work()
    assert hold_account(known, account="callers")["records"] == 1


@pytest.mark.parametrize("verb", ["hold", "release"])
def test_an_account_that_there_is_not_is_no_success(known, verb):
    assert "no such account" in one_line(known.call("account", verb, "acmee"))
    assert "no such account" in one_line(
        known.call("subject", verb, PERSON, "--account", "acmee", "--reason", "CASE-1")
    )
    assert (marks(known), known.ends("audit")) == ([], 0)


def marks(place, *, ended=False):
    async def inside(deployment):
        return deployment.store.ledger.marks("hold", ended=ended)

    return place.within(inside)


def test_releasing_what_is_not_held_does_nothing(known):
    assert release(known) == 0
    assert known.ends("audit") == 0


def test_no_older_copy_of_the_key_store_opens_a_hold_that_was_released(known):
    # Given a backup made while the hold was in force
    made = hold(known)
    backup = known.folder / "backup"
    shutil.copytree(known.data, backup, ignore=lambda *_: ["log.db", "registries"])
    ref = KeyId("held", PLATFORM, made["hold"], 1)
    release(known)
    # When it is restored
    for path in backup.iterdir():
        if path.name.startswith("keys.db"):
            shutil.copy(path, known.data / path.name)
    for name in ("keys.db-wal", "keys.db-shm"):
        if not (backup / name).exists():
            (known.data / name).unlink(missing_ok=True)
    # Then it is refused, and even opened as it is gives no key
    assert "older" in one_line(known.call("tail", "held", "--reveal", "--reason", "X"))
    config = load(SimpleNamespace(config=str(known.config), log=known.url))
    store = open_store(config, outdated=True)
    try:
        found = store.open_epochs([ref], int(time.time()))
    except StreamveilError:
        found = {}
    finally:
        store.close()
    assert not [one for one in found.values() if not isinstance(one, Gone)]


def test_one_that_was_killed_is_finished_by_running_it_again(known):
    hold(known)
    code = "import os\nfrom streams.keys.ledger import SqlLedger\nSqlLedger.end_mark = lambda *a, **k: os._exit(9)"
    assert known.run("subject", "release", PERSON, "--reason", "CASE-1", sabotage=code).status == 9
    assert states(known, "held") == {"destroyed"}
    assert preserve(known).records == 0  # nothing is sealed under a key that is gone
    assert release(known) == 1
    assert marks(known) == []


def test_the_number_goes_with_the_mark_and_the_reference_stays(known):
    made = hold(known)
    release(known)
    (mark,) = marks(known, ended=True)
    assert (mark.id, mark.reason, mark.tokens) == (made["hold"], "CASE-1", ())
    assert mark.ended_s is not None

    async def inside(deployment):
        return deployment.store.ledger.number_of(made["hold"]), deployment.store.stale_days().get(AT_WILL)

    assert known.within(inside) == (None, None)


def test_an_account_is_released_like_a_person(known):
    hold_account(known)
    assert call(known, "account", "release", "acme", "--reason", "CASE-1")["released"] == 1
    assert states(known, "held") == {"destroyed"}
    assert call(known, "account", "release", "acme", "--reason", "CASE-1")["released"] == 0


# --- what is noted -----------------------------------------------------------------------------------------------


def test_the_audit_says_who_is_held_by_sid_and_every_record_that_was_opened_for_it(known):
    made = hold(known)
    release(known)
    entries = known.values("audit")
    first, *opened, last, done = [entry for entry in entries if entry.get("hold") == made["hold"]]
    assert (first["action"], first["reason"], first["owner"]) == ("hold", "CASE-1", "platform")
    assert {entry["action"] for entry in opened} == {"preserve"}
    assert done["action"] == "released"
    places = {(value["stream"], value["partition"], value["offset"]) for value in known.values("held")}
    assert {(entry["stream"], *place) for entry in opened for place in entry["records"]} == places
    assert set(first["sids"]) <= {sid for entry in opened for sid in entry["sids"]}
    assert (last["action"], last["destroyed"]["epochs"]) == ("release", [f"held/platform/{made['hold']}"])
    assert found_in(haystack(*(one.value for one in known.stored("audit"))), [PERSON, OTHER, THIRD]) == []


def test_nothing_is_opened_for_a_hold_if_that_cannot_be_noted(known):
    hold(known)
    known.publish(sms_cdr(record_id="next", recipient=PERSON, occurred_at=ago()))
    known.work()

    async def inside(deployment):
        deployment.auditor().write = refuse
        deployment.store.open_epochs = lambda *_: pytest.fail("opened")
        await holds.preserve(deployment, now_s=int(time.time()))

    async def refuse(*_, **__):
        raise sqlite3.OperationalError

    with pytest.raises(sqlite3.OperationalError):
        known.within(inside)


def test_a_period_that_ends_before_it_begins_is_refused(known):
    words = ("--from", days_ago(1), "--to", days_ago(2))
    assert "ends before it begins" in one_line(known.call("account", "hold", "acme", "--reason", "X", *words))


def test_of_an_accounts_holds_the_one_of_the_period_is_released_and_no_reason_is_needed(known):
    first, second = ("--from", days_ago(3)), ("--from", days_ago(2))
    for period in (first, second):
        known.call("account", "hold", "acme", *period)
    assert "several" in one_line(known.call("account", "release", "acme"))
    assert call(known, "account", "release", "acme", *first)["released"] == 1
    assert call(known, "account", "release", "acme", *first)["released"] == 0
    assert call(known, "account", "release", "acme")["released"] == 1


@pytest.mark.parametrize("account", ["platform", "a/b", ""])
def test_what_cannot_be_an_account_is_refused(known, account):
    one_line(known.call("account", "hold", account, "--reason", "X"))


def test_only_the_privacy_officer_may(known):
    (known.folder / "roles.toml").write_text(f'[[grant]]\nuser = "{ME}"\nrole = "dpo"\naccounts = ["acme"]\n')
    known.configure(**SHORT_LEASE, roles="roles.toml")
    for words in (("subject", "hold", PERSON), ("account", "hold", "acme"), ("account", "release", "acme")):
        assert "privacy officer" in one_line(known.call(*words, "--reason", "X"))
    assert known.ends("audit") == 0


# --- what came in the way of copying --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("subject", "hold", PERSON), ("account", "hold", "acme")], ids=("person", "account"))
def test_what_could_not_be_copied_before_its_day_is_copied_by_a_late_run(known, monkeypatch, words):
    # Given a hold whose copying failed, and that nothing was done until all it covers is past its day
    async def away(*_):
        raise KmsUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(holds._Copier, "run", away)
        assert known.call(*words, "--reason", "CASE-1").status == 1
    assert kept(known) == []
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 430 * 86_400)
    monkeypatch.setitem(SqliteKeyStore.open.__func__.__kwdefaults__, "clock", time.time)
    # When a retention run comes at last
    done = known.call("retention", "run", "--json")
    # Then what is held is copied first
    assert (done.status, done.lines[0]["held"] > 0, done.lines[0]["persons"] > 0) == (0, True, True), done.err
    assert kept(known) != []


def test_what_is_sealed_after_a_rotation_in_the_middle_of_a_run_is_copied_too(tmp_path, monkeypatch):
    place = Place(tmp_path, lease_s=0.6, key_lease_s=3)
    place.publish(voice_cdr(record_id="first", recipient=PERSON, sender=OTHER, occurred_at=days_ago(3)))
    assert place.work() == 1
    hold(place)
    find, once = holds._Copier._find_copies, []

    async def slowly(copier):
        await find(copier)
        if not once:
            once.append(copier)
            await asyncio.to_thread(rotate)

    def rotate():
        assert place.run("keys", "rotate", "token").status == 0
        later = voice_cdr(record_id="second", recipient=PERSON, sender=OTHER, occurred_at=days_ago(2))
        assert place.run("publish", place.file(later)).status == place.run("run", "--until-idle").status == 0

    monkeypatch.setattr(holds._Copier, "_find_copies", slowly)
    preserve(place)
    preserve(place)
    assert {name for _, name in kept(place)} == {"first", "second"}
    place.close()


def test_a_hold_in_force_whose_key_is_gone_stops_every_destruction(known):
    made = hold(known)
    known.within(lambda deployment: _done(deployment.store.destroy_epoch(EpochRef("held", "platform", made["hold"]))))
    known.publish(sms_cdr(record_id="next", recipient=PERSON, occurred_at=ago()))
    known.work()
    done = known.call("retention", "run", "--json")
    assert done.status == 1
    assert "make the hold again" in done.lines[0]["skipped"][0]["why"]


async def _done(_):
    pass
