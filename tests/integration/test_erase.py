"""Erasure, on real files: what is gone once it is acknowledged, what stays, and every race around it."""

import os
import pwd
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from schemas.sealed import take_apart
from streams.keys.ledger import Mark
from tests.support.commands import SHORT_LEASE, Place, ago, eventually, is_stopped, one_line
from tests.support.records import (
    DEFAULT_POLICY,
    OTHER,
    PERSON,
    found_in,
    haystack,
    preference,
    reply,
    sms_cdr,
    voice_cdr,
)

THIRD = "+14155550177"
ME = pwd.getpwuid(os.getuid()).pw_name
STOPS_ONCE_BEFORE_COMMIT = """
import os, signal
from streams.log.sqlite import SqliteConsumer
commit = SqliteConsumer.commit
async def late(self, *args):
    SqliteConsumer.commit = commit
    os.kill(os.getpid(), signal.SIGSTOP)
    await commit(self, *args)
SqliteConsumer.commit = late
"""
SLOW = """
import time
from processors.pipeline import Pipeline
prepare = Pipeline.prepare
def slow(self, *args):
    time.sleep(0.01)
    return prepare(self, *args)
Pipeline.prepare = slow
"""


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


@pytest.fixture
def known(place):
    """A deployment with a call to a person from a person, a text of theirs, and one of another account to them."""
    place.publish(
        voice_cdr(record_id="call", recipient=PERSON, sender=OTHER, occurred_at=ago(50)),
        reply("stop it", record_id="text", occurred_at=ago(40)),
        sms_cdr(record_id="beta", recipient=PERSON, account_id="beta", occurred_at=ago(30)),
        sms_cdr(record_id="third", recipient=THIRD, occurred_at=ago(20)),
    )
    assert place.work() == 4
    return place


def erase(place, *more, whom=PERSON):
    done = place.call("subject", "erase", whom, "--reason", "CASE-1", "--json", *more)
    assert done.status == 0, done.err
    return done.lines[0]


def shown(place, stream="cdr.pii"):
    """Return record id (or state, if it does not open) of every record of a stream, sorted."""
    lines = place.tail(stream, "--reveal", "--reason", "X")
    return sorted(line["reveal"]["fields"].get("record_id", line["reveal"]["state"]) for line in lines)


def publish_to(place, *names, **fields):
    place.publish(*(sms_cdr(record_id=name, recipient=PERSON, occurred_at=ago(10), **fields) for name in names))


# --- what is gone, and what is not -------------------------------------------------------------------------------


def test_what_was_sealed_before_opens_nowhere_and_what_comes_later_opens(known):
    done = erase(known)
    assert done["erased"] == 1
    assert shown(known) == ["destroyed", "destroyed", "destroyed", "third"]
    publish_to(known, "later")
    known.work()
    assert shown(known) == ["destroyed", "destroyed", "destroyed", "later", "third"]


def test_every_month_of_the_person_is_gone(known):
    publish_to(known, "now")
    known.publish(sms_cdr(record_id="old", recipient=PERSON, occurred_at=ago(70 * 86_400)))
    known.work()
    assert erase(known)["erased"] == 2
    assert shown(known) == ["destroyed"] * 5 + ["third"]


def test_who_is_the_other_party_is_gone_from_it_and_the_rest_opens(known):
    erase(known, whom=OTHER)
    (call,) = [
        line["reveal"]
        for line in known.tail("cdr.pii", "--reveal", "--reason", "X")
        if line["reveal"]["fields"]["record_id"] == "call"
    ]
    assert call["fields"]["recipient"] == PERSON
    assert "sender" not in call["fields"]
    assert "sender" in call["withheld"]


def test_the_platforms_erasure_leaves_what_it_processes_for_accounts(known):
    erase(known)
    assert shown(known, "content") == ["beta", "text", "third"]
    assert shown(known, "review") == ["text"]


def test_an_accounts_erasure_leaves_the_platforms_data_and_other_accounts(known):
    assert erase(known, "--account", "acme")["erased"] == 1
    assert shown(known, "content") == ["beta", "destroyed", "third"]
    assert shown(known, "review") == ["destroyed"]
    assert shown(known) == ["beta", "call", "text", "third"]


def test_the_opt_out_stands(known):
    known.publish(preference(recipient="ACME", occurred_at=ago(5)))
    known.work()
    erase(known)
    erase(known, "--account", "acme")
    assert known.call("optout", "check", PERSON, "--account", "acme", "--json").lines[0]["opted_out"]
    assert known.opened("suppressions") == [{"number": PERSON}]


def test_it_names_the_accounts_that_have_data_of_them(known):
    done = erase(known)
    assert done["notify"] == {"acme": None, "beta": None}
    said = known.call("subject", "erase", PERSON, "--reason", "CASE-1")
    assert ": acme, beta;" in said.err
    assert "opt-outs of this person stand" in said.out
    assert "quarantine" in said.out
    assert erase(known, "--account", "acme")["notify"] == {}


def test_it_says_until_when_an_older_copy_of_the_key_store_could_open_it(known):
    before = ago(-86_400)
    until = erase(known)["backups_until"]
    assert before <= until <= ago(-86_400)
    publish_to(known, "later")
    known.work()
    assert "an older copy" in known.call("subject", "erase", PERSON, "--reason", "X").out
    assert "an older copy" not in known.call("subject", "erase", PERSON, "--reason", "X").out


def test_erased_twice_and_never_known_are_acknowledged_with_nothing_destroyed(known):
    assert [erase(known)["erased"] for _ in range(2)] == [1, 0]
    unknown = known.call("subject", "erase", "+14155550166", "--reason", "CASE-2", "--json").lines[0]
    assert (unknown["erased"], unknown["notify"]) == (0, {})
    assert shown(known) == ["destroyed", "destroyed", "destroyed", "third"]


def test_a_number_in_national_form_is_read_as_the_accounts(place):
    place.policy(f'{DEFAULT_POLICY}\n[[account]]\nid = "acme"\ndefault_region = "DE"\n')
    place.publish(sms_cdr(record_id="x", account_id="acme", recipient="01511 2345678", occurred_at=ago()))
    place.work()
    assert erase(place, "--account", "acme", whom="01511 2345678")["erased"] == 1
    assert shown(place, "content") == ["destroyed"]


# --- what is noted -----------------------------------------------------------------------------------------------


def test_the_audit_names_what_is_destroyed_by_sid_before_it_is(known):
    sids = {
        part.sid for one in known.stored("cdr.pii") for part in take_apart(one.value).parts if part.group != "other"
    }
    erase(known)
    entries = [entry for entry in known.values("audit") if entry["action"].startswith("erase")]
    first, last = entries
    assert (first["action"], last["action"]) == ("erase", "erased")
    assert (first["role"], first["reason"], first["owner"]) == ("dpo", "CASE-1", "platform")
    assert len(first["destroyed"]["sids"]) == 1
    assert set(first["destroyed"]["sids"]) < sids
    assert last["destroyed"]["sids"] == []
    assert found_in(haystack(*(one.value for one in known.stored("audit"))), [PERSON, OTHER]) == []


def test_nothing_is_destroyed_if_it_cannot_be_noted_first(known):
    code = "from schemas.errors import LogFull\nfrom streams.keys.audit import Auditor\n"
    code += "async def full(*_, **__):\n    raise LogFull\nAuditor.write = full"
    assert "disk" in one_line(known.run("subject", "erase", PERSON, "--reason", "X", sabotage=code))
    assert shown(known) == ["beta", "call", "text", "third"]


def test_only_the_privacy_officer_may(known):
    for role, accounts in (("support", "*"), ("dpo", "acme")):
        (known.folder / "roles.toml").write_text(
            f'[[grant]]\nuser = "{ME}"\nrole = "{role}"\naccounts = ["{accounts}"]\n'
        )
        known.configure(**SHORT_LEASE, roles="roles.toml")
        assert "privacy officer" in one_line(known.call("subject", "erase", PERSON, "--reason", "X"))
    assert known.ends("audit") == 0


@pytest.mark.parametrize("account", ["platform", "a/b", ""])
def test_what_cannot_be_an_account_is_refused(known, account):
    one_line(known.call("subject", "erase", PERSON, "--reason", "X", "--account", account))
    assert known.ends("audit") == 0


# --- races and faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["SqlKeyStore.destroy_persons", "drained", "note"])
def test_one_that_was_killed_is_finished_by_running_it_again(known, step):
    code = "import os\nfrom streams.officer import erase\nfrom streams.keys.sql import SqlKeyStore\n"
    target = step if "." in step else f"erase.{step}"
    code += f"{target} = lambda *a, **k: os._exit(9)"
    assert known.run("subject", "erase", PERSON, "--reason", "X", sabotage=code).status == 9
    erase(known)
    assert shown(known) == ["destroyed", "destroyed", "destroyed", "third"]
    assert len(known.call("subject", "requests", "--all", "--json").lines) == 1


def test_while_workers_run_all_committed_before_is_gone_and_all_committed_after_the_acknowledgement_opens(place):
    # Given two workers and traffic to a person and others that does not stop
    place.configure(lease_s=4.0, batch_records=20)
    publish_to(place, "first")
    place.work()
    running = place.start("run", "--workers", 2, sabotage=SLOW)
    ended = threading.Event()
    published = []

    def feed():
        number = 0
        while not ended.is_set():
            few = [(f"r{number + i}", PERSON if i % 3 else f"+1415555{(number + i) % 10_000:04}") for i in range(30)]
            file = place.file(*(sms_cdr(record_id=name, recipient=to, occurred_at=ago(2)) for name, to in few))
            assert place.run("publish", file).status == 0
            published.extend(few)
            number += 30

    with ThreadPoolExecutor() as pool:
        feeding = pool.submit(feed)
        eventually(lambda: place.ends("cdr.pii") > 200, "traffic flows")
        # When the person is erased from another process
        before = ends_of(place)
        done = place.run("subject", "erase", PERSON, "--reason", "CASE-1")
        after = ends_of(place)
        assert done.status == 0, done.err
        # and traffic goes on
        eventually(lambda: place.ends("cdr.pii") > sum(after) + 100, "traffic goes on")
        ended.set()
        feeding.result()
    eventually(lambda: place.committed() == len(published) + 1, "all is committed")
    running.send_signal(signal.SIGTERM)
    assert place.ended(running).status == 0
    # Then what was there before is gone, what came after opens, and nothing is lost
    theirs = {name for name, to in published if to == PERSON} | {"first"}
    gone = opens = 0
    lines = place.tail("cdr.pii", "--reveal", "--reason", "X")
    for line in lines:
        state, fields = line["reveal"]["state"], line["reveal"]["fields"]
        assert state in ("revealed", "destroyed")
        assert fields.get("recipient") != PERSON or line["offset"] >= before[line["partition"]]
        if line["offset"] >= after[line["partition"]]:
            assert state == "revealed"
            opens += fields["recipient"] == PERSON
        gone += state == "destroyed"
    assert gone > 0
    assert opens > 0
    assert len(lines) == len(published) + 1
    seen = {line["reveal"]["fields"]["record_id"] for line in lines if line["reveal"]["fields"]}
    assert {name for name, to in published if to != PERSON} <= seen
    assert len(theirs) == gone + len(theirs & seen)


def ends_of(place):
    return place.within(lambda deployment: deployment.log.end_offsets("cdr.pii"))


def test_a_worker_that_was_stopped_is_waited_for_and_cannot_commit_under_a_dead_secret(place):
    # Given a worker stopped just before it commits what it has sealed under a secret that is known
    place.configure(lease_s=0.6, key_lease_s=5.0)
    publish_to(place, "first")
    place.work()
    publish_to(place, "second")
    stopped = place.start("run", "--until-idle", sabotage=STOPS_ONCE_BEFORE_COMMIT)
    eventually(lambda: is_stopped(stopped), "the worker is stopped")
    # When the person is erased
    done = place.call("subject", "erase", PERSON, "--reason", "CASE-1")
    # Then that waits until the worker's lease has run out, and says so
    assert done.status == 0, done.err
    assert f"-{stopped.pid} has taken note" in done.err
    assert done.err.count("waiting until") == 1
    assert place.key_leases() == []
    dead = {part.sid for one in place.stored("cdr.pii") for part in take_apart(one.value).parts}
    # and the worker, woken later, seals it anew
    os.kill(stopped.pid, signal.SIGCONT)
    assert place.ended(stopped).status == 0
    assert shown(place) == ["destroyed", "second"]
    assert shown(place, "content") == ["first", "second"]
    (later,) = [one for one in place.stored("cdr.pii") if take_apart(one.value).parts[0].sid not in dead]
    assert later.offset >= 0


def test_without_the_key_management_service_nothing_is_done_and_later_it_is(known):
    folder = known.folder / "streamveil-kms"
    shutil.move(folder, known.folder / "away")
    one_line(known.call("subject", "erase", PERSON, "--reason", "X"))
    shutil.move(known.folder / "away", folder)
    assert shown(known) == ["beta", "call", "text", "third"]
    erase(known)
    assert shown(known) == ["destroyed", "destroyed", "destroyed", "third"]


def test_if_the_key_management_service_fails_on_the_way_it_is_not_acknowledged_and_again_it_is(known):
    code = "from schemas.errors import KmsUnavailable\nfrom streams.keys.kms_local import LocalKms\n"
    code += "def away(*_):\n    raise KmsUnavailable\nLocalKms.raise_counter = away"
    done = known.run("subject", "erase", PERSON, "--reason", "X", sabotage=code)
    assert "give the command again" in one_line(done)
    assert done.out == ""
    erase(known)
    assert shown(known) == ["destroyed", "destroyed", "destroyed", "third"]


def test_two_at_once_both_acknowledge_and_destroy_once(known):
    processes = [known.start("subject", "erase", PERSON, "--reason", f"X{n}", "--json") for n in range(2)]
    done = [known.ended(process) for process in processes]
    assert [one.status for one in done] == [0, 0], done
    assert sum(one.lines[0]["erased"] for one in done) == 1
    assert shown(known) == ["destroyed", "destroyed", "destroyed", "third"]


# --- under a hold ------------------------------------------------------------------------------------------------


def refused(place, *more, whom=PERSON):
    before = shown(place)
    line = one_line(place.call("subject", "erase", whom, "--reason", "CASE-1", *more))
    assert "nothing was erased" in line
    assert shown(place) == before
    return line


def hold(place, noun, whom, *more):
    done = place.call(noun, "hold", whom, "--reason", "COURT-7", "--json", *more)
    assert done.status == 0, done.err
    return done.lines[0]["hold"]


def test_under_a_hold_of_the_person_it_is_refused_with_the_hold_named_and_the_request_stays_open(known):
    held = hold(known, "subject", PERSON)
    line = refused(known)
    assert held in line
    assert "COURT-7" in line
    (request,) = known.call("subject", "requests", "--json").lines
    assert (request["kind"], request["outcome"], request["closed_at"]) == ("erase", "refused:held", None)
    assert request["request"] in line
    # and once it is released, it is done
    assert known.call("subject", "release", PERSON, "--reason", "COURT-7").status == 0
    assert erase(known)["erased"] == 1


def test_a_hold_in_the_platforms_data_does_not_keep_an_account_from_erasing_its_own(known):
    hold(known, "subject", PERSON)
    assert erase(known, "--account", "acme")["erased"] == 1


def test_a_hold_of_somebody_else_is_in_nobodys_way(known):
    hold(known, "subject", THIRD)
    assert erase(known)["erased"] == 1


def test_what_is_held_of_somebody_they_spoke_to_is_kept_whole_first(known):
    # Given a call that came after the hold was made, which nothing has copied yet
    hold(known, "subject", PERSON)
    known.publish(voice_cdr(record_id="new", recipient=PERSON, sender=OTHER, occurred_at=ago(5)))
    known.work()
    erase(known, whom=OTHER)
    senders = {line["fields"]["record_id"]: line["fields"]["sender"] for line in opened(known, "held")}
    assert senders["new"] == senders["call"] == OTHER
    assert {line["fields"].get("sender") for line in opened(known, "cdr.pii")} == {PERSON, "ACME", None}


def test_the_holds_of_others_in_whose_copies_the_number_stays_are_named(known):
    # Given two people who spoke to each other, one of whom is under hold, and another hold of somebody else
    held = hold(known, "subject", PERSON)
    hold(known, "subject", THIRD)
    before = sorted(str(one) for one in opened(known, "held"))
    # When the other one is erased
    done = known.call("subject", "erase", OTHER, "--reason", "CASE-1", "--json")
    # Then the answer and the audit name that hold and no other, and the copy is as it was
    assert done.lines[0]["held"] == [{"hold": held, "reason": "COURT-7"}]
    (entry,) = [entry for entry in known.values("audit") if entry["action"] == "erased"]
    assert entry["held"] == [held]
    assert sorted(str(one) for one in opened(known, "held")) == before
    assert OTHER in "".join(before)


def test_the_acknowledgement_says_which_copies_keep_the_number(known):
    held = hold(known, "subject", PERSON)
    said = known.call("subject", "erase", OTHER, "--reason", "CASE-1").out
    assert f"copies under hold {held} (COURT-7)" in said
    assert "copies under hold" not in known.call("subject", "erase", THIRD, "--reason", "CASE-1").out


def test_a_hold_of_a_period_in_which_they_did_not_speak_keeps_nothing_of_them(known):
    hold(known, "subject", PERSON, "--to", ago(3 * 86_400)[:10])
    assert erase(known, whom=OTHER)["held"] == []


@pytest.mark.parametrize("verb", ["erase", "access", "export", "object", "restrict", "unrestrict", "rectify"])
def test_an_account_that_there_is_not_is_no_success(known, verb):
    more = ("--set", "location=x") if verb == "rectify" else ()
    line = one_line(known.call("subject", verb, PERSON, "--account", "acmee", "--reason", "X", *more))
    assert "no such account" in line
    assert "acmee" not in line
    assert known.ends("audit") == 0
    assert known.call("subject", "requests", "--all", "--json").lines == []


def test_an_account_that_the_policy_lists_needs_no_keys_and_one_with_keys_no_policy(known):
    known.policy(DEFAULT_POLICY.replace("any = true", "any = false") + '\n[[account]]\nid = "new"\n')
    assert erase(known, "--account", "new")["erased"] == 0
    assert erase(known, "--account", "acme")["erased"] == 1
    one_line(known.call("subject", "erase", PERSON, "--account", "newer", "--reason", "X"))


def opened(place, stream):
    return [line["reveal"] for line in place.tail(stream, "--reveal", "--reason", "X")]


@pytest.mark.parametrize("more", [(), ("--account", "beta")])
def test_under_a_hold_of_an_account_who_is_in_its_records_is_not_erased(known, more):
    held = hold(known, "account", "beta")
    assert held in refused(known, *more)
    assert erase(known, "--account", "acme")["erased"] == 1
    assert erase(known, whom=THIRD)["erased"] == 1


def test_a_hold_of_a_period_in_which_they_have_no_records_is_in_nobodys_way(known):
    hold(known, "account", "acme", "--to", ago(3 * 86_400)[:10])
    assert erase(known)["erased"] == 1


def test_a_hold_that_was_made_when_their_records_were_dead_is_in_nobodys_way(known):
    # Given a hold of an account from after the last instant of what it has of the person
    dead_s = max(
        datetime.fromisoformat(value["privacy"]["expires_at"]).timestamp()
        for stream in ("content", "review") for value in known.values(stream)
    )  # fmt: skip

    async def hold_at(deployment, at_s):
        deployment.store.ledger.add_mark(Mark("a" * 32, "hold", "acme", (), "COURT-7", int(at_s)), None)

    known.within(lambda deployment: hold_at(deployment, dead_s))
    assert erase(known, "--account", "acme")["erased"] == 1


def test_as_the_other_party_of_a_held_record_they_are_not_erased(known):
    hold(known, "account", "acme")
    refused(known, whom=OTHER)
