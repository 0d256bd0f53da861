"""Rotation of the token key on real files: nobody's opt-out is lost, narrowed or brought back, and no worker stops."""

import asyncio
import csv
import os
import signal
import time
from collections import Counter

import pytest

from processors.keyring import EpochRef, Needs, PersonRef
from processors.screen.suppression import State
from schemas.errors import KeysBusy, TokensChange
from schemas.fields import PLATFORM
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.ledger import Mark
from streams.keys.store import Gone
from streams.officer.leases import drained
from streams.officer.rotation import SWITCH, Copy, drop_old_tokens, rotate_tokens
from streams.optout import STREAM, Entry, OptOuts
from streams.worker.worker import Worker
from tests.support.commands import SHORT_LEASE, Place, ago, eventually, is_stopped, one_line
from tests.support.records import preference, reply, sms_request

PERSON, OTHER, THIRD = "+4915112345678", "+14155550123", "+14155550199"
SPRING = "spring sale: 50 %"


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def add(place, number, *more):
    assert place.call("optout", "add", number, *more).status == 0


def rotate(place, *parts):
    done = place.call("keys", "rotate", *(parts or ("token",)), "--json")
    assert done.status == 0, done.err
    return done.lines[0]


def exported(place, name="out.csv"):
    """Return the opt-outs that stand, as an export has them, without the tokens of senders and campaigns."""
    path = place.folder / name
    path.unlink(missing_ok=True)
    done = place.call("optout", "export", path, "--reason", "TEST-1")
    assert done.status == 0, done.err
    rows = list(csv.DictReader(path.read_text().splitlines()))
    for row in rows:
        for column in ("sender", "campaign"):
            if row[column].startswith("token:"):
                row[column] = "token"
    return sorted(tuple(row.values()) for row in rows)


def screened(place, number, **asked):
    asked = {"account": "acme", "channel": "sms", "purpose": "marketing", **asked}
    done = place.call("screen", number, *(word for name, value in asked.items() for word in (f"--{name}", value)))
    assert done.status == 0, done.err
    return done.lines[0]["reason"]


def entries(place):
    """Return the actions of the audit stream, in order."""
    return [one["value"]["action"] for one in place.tail("audit")]


def states(place):
    """Return the states of all entries under the current token key, by number where an export knows it."""

    async def view(deployment):
        tail = deployment.suppressions()
        await tail.catch_up()
        return {number: dict(tail.view.get(deployment.tokens.of(number)) or {}) for number in (PERSON, OTHER, THIRD)}

    return place.within(view)


# --- what stands afterwards --------------------------------------------------------------------------------------


def test_every_opt_out_stands_afterwards_as_it_stood_before_and_no_other_does(place):
    # Given opt-outs of every scope, class, channel and authority, by workers and by hand, and some that were lifted
    campaign = {"scope": "campaign", "campaign_id": SPRING, "class": "marketing"}
    place.publish(
        preference(record_id="p-1", scope="sender", sender=PERSON, recipient="ACME", occurred_at=ago(900)),
        preference(record_id="p-2", **campaign, sender=PERSON, occurred_at=ago(800)),
        preference(record_id="p-3", scope="campaign", campaign_id="autumn", sender=OTHER, occurred_at=ago(700)),
        preference(record_id="p-4", scope="platform", channel="voice", sender=OTHER, occurred_at=ago(600)),
        preference(record_id="p-5", scope="account", sender=THIRD, occurred_at=ago(500)),
        preference("opt_in", record_id="p-6", scope="account", sender=THIRD, occurred_at=ago(400)),
        reply("STOP", record_id="c-1", occurred_at=ago(300)),
    )
    assert place.work() == 7
    add(place, PERSON, "--authority", "officer", "--reason", "CASE/1")
    add(place, OTHER, "--account", "acme", "--sender", "+4930123456", "--channel", "sms")
    add(place, THIRD, "--account", "acme", "--class", "service", "--reason", "FIRST-1")
    add(place, THIRD, "--account", "acme", "--class", "service", "--reason", "SECOND-2")
    before, stood = exported(place), states(place)
    # When
    done = rotate(place)
    # Then
    assert (done["token"]["version"], done["token"]["widened"]) == (2, 0)
    assert exported(place) == before
    after = states(place)
    assert {number: outs(found) for number, found in after.items()} == {
        number: outs(found) for number, found in stood.items()
    }
    assert screened(place, OTHER, sender="+4930123456") == "opted_out"
    assert screened(place, OTHER, sender="OTHER") is None
    assert screened(place, THIRD) is None
    assert screened(place, THIRD, purpose="service") == "opted_out"
    # and again: the sender behind a token goes on being known
    rotate(place)
    assert exported(place) == before
    assert screened(place, OTHER, sender="+4930123456") == "opted_out"


def outs(found):
    """Return what stands: rules without the tokens in them, with event times."""
    return Counter(
        (rule._replace(scope=":".join(rule.scope.split(":")[: 2 if ":" in rule.scope else 1])), state.event_s)
        for rule, state in found.items()
        if state.out
    )


def test_nothing_is_kept_under_the_old_token(place):
    add(place, PERSON, "--account", "acme")
    old = {key.split("|")[0] for key in keys_of(place)}
    rotate(place)
    new = {key.split("|")[0] for key in keys_of(place)} - old
    assert {key.split(".")[0] for key in new} == {"2"}
    assert not {key.split(".")[1] for key in new} & {key.split(".")[1] for key in old}


def keys_of(place):
    return [stored.key.decode() for stored in place.stored(STREAM)]


@pytest.mark.parametrize("scope", [("--sender", "ACME"), ("--campaign", SPRING)])
def test_an_entry_whose_sender_or_campaign_is_not_known_gets_wider_and_never_lost(place, scope):
    # Given an entry as earlier versions wrote it, and as an import of an export writes it: the token is all there is
    imported(place, PERSON, *scope)
    # When
    done = rotate(place)
    # Then
    assert done["token"]["widened"] == 2
    for sender in ("ACME", "OTHER"):
        assert screened(place, PERSON, sender=sender) == "opted_out"
    assert screened(place, PERSON, account="other") is None
    (scopes,) = {tuple(row[1:4]) for row in exported(place)}
    assert scopes == ("acme", "", "")
    # and it is lifted as any other of the account
    assert place.call("optout", "remove", PERSON, "--account", "acme").status == 0
    assert screened(place, PERSON) is None


def test_what_got_wider_is_not_lifted_by_a_lift_of_what_it_was_or_of_the_account_before_the_switch(place):
    # Given entries of a sender whose name is not known, one of the account, and the first copy
    imported(place, PERSON, "--sender", "ACME")
    imported(place, OTHER, "--sender", "ACME")
    add(place, PERSON, "--account", "acme")

    async def half(deployment):
        return await Copy(deployment, 1, deployment.store.add_token_key()).run()

    assert place.within(half)[1] == 4
    # When both are lifted before the switch
    for number, scope in ((PERSON, ()), (OTHER, ("--sender", "ACME"))):
        assert place.call("optout", "remove", number, "--account", "acme", *scope).out.startswith("lifted")
    rotate(place)
    # Then the wider ones stand
    assert [screened(place, number, sender="ACME") for number in (PERSON, OTHER)] == ["opted_out"] * 2


def imported(place, number, *scope):
    """Opt a person out as an import does: of a sender or campaign of which the token is all there is."""
    add(place, number, "--account", "acme", *scope)
    path = place.folder / f"export-{number}.csv"
    assert place.call("optout", "export", path, "--reason", "MOVE-1").status == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *(line for line in lines if line.startswith(number))]))
    assert place.call("optout", "remove", number, "--account", "acme", *scope).status == 0
    time.sleep(1.1)
    assert place.call("optout", "import", path, "--json").lines[0]["written"] == 2


def test_an_export_from_before_is_not_understood_for_senders_and_is_for_all_else(place):
    add(place, PERSON, "--account", "acme", "--sender", "ACME")
    add(place, OTHER)
    path = place.folder / "export.csv"
    assert place.call("optout", "export", path, "--reason", "MOVE-1").status == 0
    rotate(place)
    done = place.call("optout", "import", path, "--json")
    assert done.lines == [{"lines": 4, "written": 2, "bad": 2}]
    assert "sender not understood" in done.err


# --- what comes meanwhile ----------------------------------------------------------------------------------------


def test_what_is_given_and_lifted_while_it_runs_is_taken_over(place):
    # Given the first copy is made
    add(place, PERSON, "--account", "acme", "--channel", "sms")
    add(place, OTHER, "--account", "acme", "--channel", "sms")

    async def half(deployment):
        key = deployment.store.add_token_key()
        return await Copy(deployment, 1, key).run()

    assert place.within(half) == (2, 0)
    # When opt-outs are lifted, given again with another reason and time, and new ones come
    assert place.call("optout", "remove", PERSON, "--account", "acme", "--channel", "sms").status == 0
    assert place.call("optout", "remove", OTHER, "--account", "acme", "--channel", "sms").status == 0
    give(place, Entry(OTHER, "acme", channel="sms", reason="AGAIN-1", event_at="2026-01-01T00:00:00Z"))
    add(place, THIRD, "--account", "acme", "--channel", "sms", "--reason", "NEW-1")
    assert screened(place, PERSON) is None
    before = exported(place)
    rotate(place)
    # Then
    assert exported(place) == before
    assert screened(place, PERSON) is None
    assert [screened(place, number) for number in (OTHER, THIRD)] == ["opted_out"] * 2
    (state,) = states(place)[OTHER].values()
    assert state == State(out=True, event_s=1767225600)
    # and once more, the same way
    assert place.call("optout", "remove", OTHER, "--account", "acme", "--channel", "sms").status == 0
    assert screened(place, OTHER) is None


def give(place, entry):
    async def gives(deployment):
        opt_outs = OptOuts(deployment)
        await opt_outs.catch_up()
        await opt_outs.add([entry], int(time.time()))

    place.within(gives)


STEPS = ("add_token_key", "hold_tokens", "switch_tokens")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_it_is_finished_by_running_it_again(place, monkeypatch, step, after):
    add(place, PERSON, "--account", "acme", "--reason", "CASE-1")
    add(place, OTHER, "--sender", "ACME", "--account", "acme")
    before = exported(place)
    real = {}

    def killed(self, *args):
        if after:
            real[step](self, *args)
        raise KeyboardInterrupt

    async def broken(deployment):
        store = type(deployment.store)
        real[step] = getattr(store, step)
        with monkeypatch.context() as patch:
            patch.setattr(store, step, killed)
            with pytest.raises(KeyboardInterrupt):
                await rotate_tokens(deployment)
        return deployment.store.token_keys()

    keys = place.within(broken)
    assert keys.changing is ((step, after) in {("hold_tokens", True), ("switch_tokens", False)})
    # Then nothing is lost if nobody goes on, and it is finished if somebody does
    if keys.changing:
        assert "the token key is being rotated" in place.call("keys", "status").out
        assert "The token key is being rotated" in one_line(place.call("optout", "check", PERSON))
    else:
        assert exported(place) == before
    version = rotate(place)["token"]["version"]
    assert exported(place) == before
    assert version == (3 if (step, after) == ("switch_tokens", True) else 2)


def test_while_it_waits_for_the_switch_nothing_is_screened_opted_out_or_sealed(place):
    add(place, PERSON)
    place.publish(sms_request(record_id="r-1", recipient=PERSON, purpose="marketing", occurred_at=ago()))

    async def hold(deployment):
        deployment.store.add_token_key()
        deployment.store.hold_tokens(2)

    place.within(hold)
    before = len(place.stored(STREAM))
    for words in (
        ("optout", "add", OTHER), ("optout", "check", PERSON), ("optout", "remove", PERSON),
        ("screen", PERSON, "--account", "acme", "--channel", "sms", "--purpose", "otp"),
    ):  # fmt: skip
        line = one_line(place.call(*words))
        assert "The token key is being rotated; nothing is cleared until that is through." in line
    assert len(place.stored(STREAM)) == before
    # and a worker waits, loses nothing, and goes on by itself
    running = place.start("run", "--until-idle")
    eventually(lambda: "waiting: The token key is being rotated" in place.told(running), "it waits")
    rotate(place)
    done = place.ended(running)
    assert (done.status, done.records) == (0, 1)
    assert place.verdicts() == {"r-1": ("refused", "opted_out")}


# --- workers -----------------------------------------------------------------------------------------------------


def test_workers_go_on_and_act_on_every_opt_out_before_during_and_after(place):
    # Given people opted out, and workers under traffic to them and to others
    people = [f"+1415555{at:04}" for at in range(100, 160)]
    path = place.folder / "in.csv"
    path.write_text("number,account\n" + "".join(f"{number},acme\n" for number in people[:20]))
    assert place.call("optout", "import", path).status == 0
    running = place.start("run", "--workers", 2)
    sent = 0

    def wave(numbers):
        nonlocal sent
        requests = [
            sms_request(record_id=f"r-{sent + at}", recipient=number, purpose="marketing", occurred_at=ago())
            for at, number in enumerate(numbers)
        ]
        sent += len(requests)
        place.publish(*requests)

    wave(people)
    for at, number in enumerate(people[20:40]):  # they reply STOP while it is rotated, once and once more
        place.publish(reply("STOP", record_id=f"s-{at}", sender=number, account_id="acme", occurred_at=ago(5)))
        if at in (7, 15):
            rotate(place)
        wave([number, people[at], people[-1 - at]])
    eventually(lambda: place.committed() == sent + 20, "all is committed")
    wave(people)
    eventually(lambda: place.committed() == sent + 20, "all is committed")
    running.send_signal(signal.SIGTERM)
    assert place.ended(running).status == 0
    # Then each has one verdict, and it is the right one
    verdicts = place.verdicts()
    assert len(verdicts) == sent
    last = [verdicts[f"r-{sent - 60 + at}"][1] for at in range(60)]
    assert last == ["opted_out"] * 40 + [None] * 20
    first = [verdicts[f"r-{at}"][1] for at in range(60)]
    assert first == ["opted_out"] * 20 + [None] * 40
    middle = [[verdicts[f"r-{60 + 3 * at + person}"][1] for person in range(3)] for at in range(20)]
    assert middle == [["opted_out", "opted_out", None]] * 20


STOPS_BEFORE_COMMIT = """
import os, signal
from streams.log.sqlite import SqliteConsumer
commit = SqliteConsumer.commit
async def late(self, *args):
    SqliteConsumer.commit = commit
    os.kill(os.getpid(), signal.SIGSTOP)
    await commit(self, *args)
SqliteConsumer.commit = late
"""


def test_a_stopped_worker_is_waited_for_until_its_lease_runs_out_and_commits_nothing_under_the_old_key(place):
    # Given a worker that is stopped with a STOP sealed under the old token key, and not committed
    place.configure(key_lease_s=5.0, lease_s=60.0)
    place.publish(reply("STOP", record_id="c-1", sender=PERSON, account_id="acme", occurred_at=ago()))
    running = place.start("run", "--until-idle", sabotage=STOPS_BEFORE_COMMIT)
    eventually(lambda: is_stopped(running), "it is stopped")
    # When
    done = place.call("keys", "rotate", "token")
    # Then it is waited for, by name, until its lease has run out
    assert done.status == 0, done.err
    assert f"-{running.pid}-" in done.err
    assert place.key_leases() == []
    os.kill(running.pid, signal.SIGCONT)
    assert place.ended(running).status == 0
    assert {key.split(".")[0] for key in keys_of(place)} == {"2"}
    assert screened(place, PERSON) == "opted_out"


def test_an_egress_gateway_that_goes_on_opens_nothing_meanwhile_and_sees_every_opt_out_afterwards(place):
    # Given a gateway at work
    place.publish(*(sms_request(record_id=f"r-{at}", recipient=OTHER, occurred_at=ago()) for at in range(3)))
    place.work()

    async def gateway(deployment):
        revealer = deployment.revealer()
        pages = [await deployment.log.read("cleared", partition, 0, 10) for partition in range(4)]
        page = [stored for some in pages for stored in some]
        found = [(await revealer.open_batch(page[:1]))[0]]
        deployment.store.add_token_key()
        deployment.store.hold_tokens(2)
        with pytest.raises(TokensChange):
            await revealer.open_batch(page[1:2])
        await rotate_tokens(deployment)
        found += await revealer.open_batch(page[1:2])
        deployment.refresh_tokens()
        opt_outs = OptOuts(deployment)
        await opt_outs.catch_up()
        await opt_outs.add([Entry(OTHER)], int(time.time()))
        found += await revealer.open_batch(page[2:])
        return [(one.state.value, one.reason) for one in found]

    assert place.within(gateway) == [("revealed", None), ("revealed", None), ("denied", "opted_out")]


# --- people ------------------------------------------------------------------------------------------------------


def known(deployment, number, month="2026-11"):
    """Return the sid of a person for a month, made if need be, under the current token key."""
    ref = PersonRef(PLATFORM, deployment.tokens.of(number), month)
    now_s = int(time.time())
    epoch = EpochRef("pii", PLATFORM, month)
    needs = Needs({epoch: (now_s + 9_000_000, 1)}, {ref: now_s + 9_000_000})
    return deployment.store.fetch(needs, now_s).persons[ref].sid


def test_restrictions_and_holds_follow_the_person(place, monkeypatch):
    async def mark(deployment):
        number, token = PERSON, deployment.tokens.of(PERSON)
        ledger = deployment.store.ledger
        ledger.add_mark(Mark("a" * 32, "restriction", PLATFORM, (token,), "CASE-1", 1), number)
        ledger.add_mark(Mark("b" * 32, "hold", "acme", (), "CASE-2", 1), None)
        return known(deployment, number)

    old = place.within(mark)
    seen = []

    async def watched(deployment):
        switch, ledger = deployment.store.switch_tokens, deployment.store.ledger

        def switching(version):
            seen.append(len(ledger.marks("restriction")[0].tokens))
            return switch(version)

        monkeypatch.setattr(deployment.store, "switch_tokens", switching)
        await rotate_tokens(deployment)

    place.within(watched)
    assert seen == [2]  # before the switch: there is no moment without

    async def restricted(deployment):
        new = known(deployment, PERSON)
        assert new != old
        other = known(deployment, OTHER)
        marks = deployment.store.ledger.marks("restriction")
        return deployment.store.restricted([old, new, other]) - {old, new}, marks[0].id, len(marks[0].tokens)

    assert place.within(restricted) == (set(), "a" * 32, 2)


def test_an_old_token_key_goes_once_nobody_is_known_under_it(place):
    add(place, PERSON)

    async def meet(deployment):
        return known(deployment, PERSON), deployment.tokens.of(PERSON)

    sid, token = place.within(meet)
    assert rotate(place)["destroyed"] == []

    async def dropped(deployment):
        return await drop_old_tokens(deployment), [key.version for key in deployment.store.token_keys().others]

    assert place.within(dropped) == ([], [1])

    async def erase(deployment):
        deployment.store.destroy_persons(PLATFORM, [token])
        return deployment.store.open_persons([sid], 0)[sid]

    assert place.within(erase) is Gone.DESTROYED
    assert place.within(dropped) == ([1], [])
    assert "destroy_token_key" in entries(place)
    assert screened(place, PERSON) == "opted_out"


# --- fail closed -------------------------------------------------------------------------------------------------


def test_the_audit_stream_says_what_was_done_and_the_switch_stands_in_it_before_it_is_made(place, monkeypatch):
    add(place, PERSON)
    seen = []
    monkeypatch.setattr("streams.officer.rotation.retoken_marks", lambda _: None)

    async def watched(deployment):
        switch = deployment.store.switch_tokens

        def switching(version):
            seen.append(deployment.store.token_keys().current.version)
            return switch(version)

        monkeypatch.setattr(deployment.store, "switch_tokens", switching)
        await rotate_tokens(deployment)

    place.within(watched)
    assert seen == [1]
    found = entries(place)
    assert found[0] == "reveal"
    assert [one for one in found if one != "reveal"] == ["token_hold", SWITCH, "token_rotated"]
    assert not any(PERSON[1:] in str(one) for one in place.tail("audit"))


def test_an_opt_out_that_does_not_open_keeps_the_key_as_it_is(place):
    add(place, PERSON)
    add(place, OTHER)

    async def lose(deployment):
        deployment.store.destroy_epoch(EpochRef("suppression", PLATFORM, "-"))

    place.within(lose)
    line = one_line(place.call("keys", "rotate", "token"))
    assert "an opt-out does not open (destroyed), and would be lost; the token key stays" in line
    assert place.within(version) == (1, False)
    assert screened(place, PERSON) == "opted_out"


async def version(deployment):
    keys = deployment.store.token_keys()
    return keys.current.version, keys.changing


def test_who_opened_the_store_before_a_rotation_writes_and_screens_nothing_under_the_old_key(place):
    add(place, PERSON)

    async def late(deployment):
        opt_outs = OptOuts(deployment)
        await opt_outs.catch_up()
        await rotate_tokens(deployment)
        for call in (opt_outs.catch_up(), opt_outs.add([Entry(OTHER)], int(time.time()))):
            with pytest.raises(TokensChange):
                await call
        assert deployment.refresh_tokens().tokens.version == 2

    place.within(late)
    assert screened(place, OTHER) is None


def test_another_rotation_at_the_same_time_ends_with_one_line_and_does_no_harm(place):
    add(place, PERSON)

    async def twice(deployment):
        first = Copy(deployment, 1, deployment.store.add_token_key())
        await first.run()
        real = deployment.store.token_keys

        def raced():
            deployment.store.token_keys = real
            keys = real()
            deployment.store.hold_tokens(2)
            deployment.store.switch_tokens(2)
            return keys

        deployment.store.token_keys = raced
        with pytest.raises(TokensChange):
            await rotate_tokens(deployment)

    place.within(twice)
    assert screened(place, PERSON) == "opted_out"


def test_a_slower_rotation_lifts_nothing_that_was_given_after_a_faster_one(place, monkeypatch):
    # Given so many opt-outs that a rotation makes a second pass, and a person opted out
    path = place.folder / "in.csv"
    path.write_text("number,event_at\n" + "".join(f"+49151{at:08d},2026-01-01\n" for at in range(1100)))
    assert place.call("optout", "import", path).status == 0
    add(place, PERSON, "--account", "acme")
    first_pass, overtaken = Copy.run, []

    def overtake():  # the person opts in, all of another rotation goes by, and the person opts out again
        assert place.run("optout", "remove", PERSON, "--account", "acme").status == 0
        assert place.run("keys", "rotate", "token").status == 0
        time.sleep(1.1)
        assert place.run("optout", "add", PERSON, "--account", "acme").status == 0

    async def slow(self, *advance):
        done = await first_pass(self, *advance)
        if not overtaken:
            overtaken.append(True)
            await asyncio.to_thread(overtake)
        return done

    monkeypatch.setattr(Copy, "run", slow)
    # When the slower one goes on
    line = one_line(place.call("keys", "rotate", "token"))
    # Then
    assert "another process has rotated the token key meanwhile" in line
    assert screened(place, PERSON) == "opted_out"
    assert place.within(version) == (2, False)


def test_what_a_copy_read_before_a_hold_is_not_written_after_it(place):
    add(place, PERSON)

    async def late(deployment):
        copy = Copy(deployment, 1, deployment.store.add_token_key())
        read = copy._changes

        async def held(wanted):
            found = await read(wanted)
            deployment.store.hold_tokens(2)
            return found

        copy._changes = held
        before = await deployment.log.end_offsets(STREAM)
        with pytest.raises(TokensChange):
            await copy.run()
        assert await deployment.log.end_offsets(STREAM) == before

    place.within(late)


def test_a_worker_whose_lease_was_renewed_by_half_does_not_miss_the_hold(place):
    # Given a worker at work, and a rotation that holds
    place.publish(preference(record_id="p-1", scope="account", sender=OTHER, occurred_at=ago(900)))
    assert place.work() == 1

    async def rotated(deployment):
        store, log = deployment.store, deployment.log
        ahead = [0.0]
        lease = KeyLease(store, "w-1", clock=lambda: time.time() + ahead[0])
        worker = Worker(
            log, log.consumer("w-1"), deployment.pipeline, KeyCache(store, lease), lease, deployment.registries(),
            deployment.suppressions(), deployment.exemptions(), refresh=deployment.refresh_tokens, batch_records=100,
        )  # fmt: skip
        await worker._step(0.05)
        copy = Copy(deployment, 1, store.add_token_key())
        await copy.run()
        sequence = store.hold_tokens(2)
        # When the second half of the next renewal fails, and the one after does not
        renew_lease, calls = store.renew_lease, []

        def busy(*asked):
            calls.append(asked)
            if len(calls) == 2:
                raise KeysBusy
            return renew_lease(*asked)

        store.renew_lease = busy
        ahead[0] += 2
        with pytest.raises(KeysBusy):
            await worker._step(0.05)
        ahead[0] += 2
        place_opt_out = preference(record_id="p-2", scope="account", sender=PERSON, occurred_at=ago(5))
        await asyncio.to_thread(place.publish, place_opt_out)
        # Then it clears nothing until the switch, and an opt-out that comes then is not lost
        for _ in range(3):
            with pytest.raises(TokensChange):
                await worker._step(0.2)
        assert not worker.outcomes
        await drained(store, sequence)
        await copy.run()
        store.switch_tokens(2)
        for _ in range(3):
            ahead[0] += 2
            await worker._step(0.2)
        assert worker.outcomes.total() == 1
        await worker._consumer.close()
        lease.drop()

    place.within(rotated)
    assert [screened(place, number) for number in (PERSON, OTHER)] == ["opted_out"] * 2


def test_while_the_number_of_a_mark_is_lost_no_token_key_is_rotated_or_destroyed(place):
    async def mark(deployment):
        token = deployment.tokens.of(PERSON)
        deployment.store.ledger.add_mark(Mark("a" * 32, "restriction", PLATFORM, (token,), "CASE-1", 1), None)
        deployment.store.ledger.add_mark(Mark("b" * 32, "hold", "acme", (), "CASE-2", 1), None)
        return known(deployment, PERSON)

    sid = place.within(mark)
    line = one_line(place.call("keys", "rotate", "token"))
    assert f"restriction {'a' * 32} (case CASE-1)" in line
    assert "CASE-2" not in line
    assert place.within(version) == (1, False)
    # When it is made again, it is the same one
    done = place.call("subject", "restrict", PERSON, "--reason", "CASE-1")
    assert done.status == 0, done.err
    rotate(place)

    async def restricted(deployment):
        sids = {sid, known(deployment, PERSON)}
        return len(deployment.store.restricted(sids)), [one.id for one in deployment.store.ledger.marks("restriction")]

    assert place.within(restricted) == (2, ["a" * 32])
