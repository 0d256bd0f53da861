"""Opening what was sealed, on real files: what opens, what does not and why, to whom, and what is noted of it."""

import asyncio
import json
import os
import pwd
import secrets
import shutil
import time
from datetime import datetime
from types import SimpleNamespace

import orjson
import pytest

from processors.keyring import EpochRef
from processors.retention import instant
from schemas.errors import InputInvalid, KeysBusy, LogBusy, RevealDenied, TokensChange
from schemas.fields import PLATFORM, normalise
from schemas.outbound import Message, Output
from schemas.sealed import KeyId, aad_head, key_frame, key_info, open_box, record_key, seal_box, take_apart
from streams.keys.audit import Auditor
from streams.keys.ledger import Mark
from streams.keys.reveal import Revealer, State
from streams.keys.roles import Grant, Principal, principal
from streams.log.sqlite import SqliteLog
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import DEFAULT_POLICY, OTHER, PERSON, preference, reply, sms_cdr, sms_request, voice_cdr

SEALED = ("cleared", "content", "cdr.pii", "suppressions", "review", "quarantine")
DPO = Principal("tester", (Grant("tester", "dpo", ("*",)),))
CODES = {"twilio": 21610, "telnyx": 40300, "plivo": 200, "vonage": 9, "sinch": 257, "infobip": 2050}
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


@pytest.fixture
def full(place):
    """A deployment with something in every stream: one record each, but for the CDRs that come with an inbound text."""
    now = ago()
    place.publish(
        sms_request(record_id="q1", recipient=PERSON, occurred_at=now),
        voice_cdr(record_id="v1", recipient=PERSON, sender=OTHER, client_ip="192.0.2.7", occurred_at=now),
        reply("stop it", record_id="m1", sender=OTHER, occurred_at=now),
        preference(record_id="p1", sender="+14155550199", occurred_at=now),
        b"not json",
    )
    assert place.work() == 5
    return place


def revealer(deployment, who=DPO, clock=time.time):
    """Return what opens records for somebody."""
    auditor = Auditor(deployment.log, deployment.store.ledger, deployment.planner, who.name, clock)
    return Revealer(deployment.log, deployment.store, deployment.planner, who, auditor, clock)


def opened(place, stream, *, clock=None, who=DPO, change=None, reason="CASE-1", before=None):
    """Return what comes of opening all messages of a stream; `before` is done to the key store first."""

    async def inside(deployment):
        if before is not None:
            before(deployment)
        messages = await everything(deployment.log, stream)
        return await revealer(deployment, who, clock or time.time).reveal(
            change(messages) if change else messages, reason
        )

    return place.within(inside)


async def everything(log, stream):
    ends = await log.end_offsets(stream)
    return [one for p, end in enumerate(ends) for one in await log.read(stream, p, 0, end)]


def states(results):
    return [str(one.state) for one in results]


def instant_s(text):
    return datetime.fromisoformat(text).timestamp()


def token(deployment, number):
    return deployment.tokens.of(normalise(number).value)


# --- revealed ----------------------------------------------------------------------------------------------------


def test_what_was_sealed_opens_as_it_was(full):
    (cleared,) = full.opened("cleared")
    assert (cleared["recipient"], cleared["content"]) == (PERSON, "Your parcel is here")
    call, text = sorted(full.opened("cdr.pii"), key=lambda one: one["record_id"], reverse=True)
    assert (call["sender"], call["recipient"], call["client_ip"], call["duration_s"]) == (
        OTHER, PERSON, "192.0.2.7", 61
    )  # fmt: skip
    assert (text["sender"], text["recipient"]) == (OTHER, "12345")
    assert [one["content"] for one in full.opened("content")] == ["stop it"]
    assert [one["content"] for one in full.opened("review")] == ["stop it"]
    assert full.opened("suppressions") == [{"number": "+14155550199"}]
    assert full.opened("quarantine") == [{"record": "not json"}]


def test_a_stream_with_nothing_sealed_has_nothing_to_open_and_is_not_noted(full):
    for stream in ("verdicts", "cdr.anonymous", "audit"):
        shown = full.tail(stream, "--reveal", "--reason", "CASE-1")
        assert [line["reveal"] for line in shown] == [{"state": "revealed", "fields": {}, "withheld": []}] * len(shown)
    assert full.ends("audit") == 0


# --- destroyed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["content", "cdr.pii", "review", "quarantine", "cleared"])
def test_past_its_deadline_by_the_clock_it_is_destroyed_whether_or_not_a_job_ran(full, stream):
    deadline_s = min(instant_s(value["privacy"]["expires_at"]) for value in full.values(stream))
    last = set(states(opened(full, stream, clock=lambda: deadline_s - 1)))
    assert last == ({"denied"} if stream == "cleared" else {"revealed"})  # too late to be sent, but not dead
    dead = opened(full, stream, clock=lambda: deadline_s)
    assert set(states(dead)) == {"destroyed"}
    assert {(str(one.fields), one.withheld) for one in dead} == {("{}", ())}


def test_of_one_epoch_each_record_dies_at_its_own_instant(place):
    # Given two texts of one day, one of them from after the account had asked for a shorter life
    noon = f"{ago(86_400)[:10]}T12:00:00Z"
    for record_id, keep in (("long", "30 days"), ("short", "7 days")):
        place.configure(**SHORT_LEASE)
        place.policy(DEFAULT_POLICY.replace('keep = "30 days"', f'keep = "{keep}"'))
        place.publish(sms_cdr(record_id=record_id, occurred_at=noon))
        assert place.work() == 1
    assert len({value["sealed"][0]["key"] for value in place.values("content")}) == 1
    # Then in between one is alive and the other is not, whatever the key's own life
    short_s = min(instant_s(value["privacy"]["expires_at"]) for value in place.values("content"))
    before, after = (opened(place, "content", clock=lambda at=at: at) for at in (short_s - 1, short_s))
    assert states(before) == ["revealed", "revealed"]
    assert sorted(states(after)) == ["destroyed", "revealed"]
    assert [one.fields["record_id"] for one in after if one.fields] == ["long"]


def test_an_opt_out_has_no_deadline(full):
    assert states(opened(full, "suppressions", clock=lambda: instant_s("2099-01-01T00:00:00Z"))) == ["revealed"]


def test_an_epoch_that_was_destroyed_takes_its_records_with_it_and_no_others(full):
    month = full.values("cdr.pii")[0]["month"]

    def destroy(deployment):
        deployment.store.destroy_epoch(EpochRef("pii", PLATFORM, month))

    assert states(opened(full, "cdr.pii", before=destroy)) == ["destroyed"] * 2
    assert {one["reveal"]["state"] for one in full.tail("cdr.pii", "--reveal", "--reason", "X")} == {"destroyed"}
    for stream in SEALED:
        assert set(states(opened(full, stream))) == {"destroyed" if stream == "cdr.pii" else "revealed"}, stream


def test_a_person_destroyed_at_the_platform_is_gone_from_its_data_and_not_from_the_accounts(full):
    def destroy(deployment):
        deployment.store.destroy_persons(PLATFORM, [token(deployment, OTHER)])

    # OTHER is alone in the text and the other party of PERSON's call
    results = {one.fields.get("record_id"): one for one in opened(full, "cdr.pii", before=destroy)}
    assert set(results) == {"v1", None}
    assert results[None].state is State.DESTROYED
    call = results["v1"]
    assert call.state is State.REVEALED
    assert set(call.withheld) == {"sender", "client_ip", "display_name"}
    assert call.fields["recipient"] == PERSON
    assert not set(call.withheld) & set(call.fields)
    assert OTHER not in str(call.fields)
    # what the account has stays the account's
    assert states(opened(full, "content")) == states(opened(full, "review")) == ["revealed"]


def test_the_record_of_a_person_who_was_destroyed_does_not_open_for_the_sake_of_the_other(full):
    def destroy(deployment):
        deployment.store.destroy_persons(PLATFORM, [token(deployment, PERSON)])

    assert sorted(states(opened(full, "cdr.pii", before=destroy))) == ["destroyed", "revealed"]
    (text,) = (one for one in opened(full, "cdr.pii") if one.fields)
    assert text.fields["record_id"] == "m1"


def test_an_account_destroys_a_person_in_its_own_data_only(full):
    def destroy(deployment):
        deployment.store.destroy_persons("acme", [token(deployment, OTHER)])

    assert states(opened(full, "content", before=destroy)) == ["destroyed"]
    assert states(opened(full, "review")) == ["destroyed"]
    assert states(opened(full, "cdr.pii")) == ["revealed"] * 2
    assert states(opened(full, "suppressions")) == ["revealed"]


def test_a_later_communication_with_an_erased_person_opens_and_the_earlier_stays_gone(full):
    async def destroy(deployment):
        deployment.store.destroy_persons(PLATFORM, [token(deployment, PERSON)])

    full.within(destroy)
    full.publish(sms_cdr(record_id="later", recipient=PERSON, occurred_at=ago()))
    assert full.work() == 1
    results = opened(full, "cdr.pii")
    assert sorted(states(results)) == ["destroyed", "revealed", "revealed"]
    assert {one.fields.get("record_id") for one in results} == {None, "m1", "later"}


# --- absent, corrupt ---------------------------------------------------------------------------------------------


def test_with_another_key_store_everything_is_absent(full, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = Place(tmp_path / "elsewhere")
    assert other.work() == 0
    for path in full.data.glob("log*"):
        shutil.copy(path, other.data)
    for stream in SEALED:
        assert set(states(opened(other, stream))) == {"absent"}, stream
    assert {line["reveal"]["state"] for line in other.tail("cdr.pii", "--reveal", "--reason", "X")} == {"absent"}


@pytest.mark.parametrize("stream", SEALED)
def test_whichever_bit_is_changed_nothing_opens(full, stream):
    def flipped(messages):
        value = messages[0].value
        return [
            messages[0]._replace(value=bytes(value[:at]) + bytes([value[at] ^ bit]) + value[at + 1 :])
            for at in range(len(value))
            for bit in (1, 32, 128)
        ]

    results = opened(full, stream, change=flipped)
    assert len(results) > 1000
    assert not [one for one in results if one.state is State.REVEALED or one.fields]
    # inside the box it is corrupt; elsewhere the key or the person named may be another, or the deadline past
    in_box = [at for at in range(len(results) // 3) if _in_box(full, stream, at)]
    assert in_box
    assert {results[3 * at].state for at in in_box} == {State.CORRUPT}


def _in_box(place, stream, at, cache={}):  # noqa: B006 — read once a deployment
    key = (place.folder, stream)
    if key not in cache:
        cache[key] = place.stored(stream)[0].value.decode()
    value = cache[key]
    begin = value.index('"box":"') + 7
    return begin <= at < value.index('"', begin)


def test_a_bit_changed_in_the_file_is_seen_through_the_command_line(full):
    (stored,) = full.stored("content")
    box = json.loads(stored.value)["sealed"][0]["box"].encode()
    content = full.log_path.read_bytes()
    assert content.count(box) == 1
    other = bytes([box[40] ^ 1 if chr(box[40] ^ 1).isalnum() else box[40] ^ 2])
    full.log_path.write_bytes(content.replace(box, box[:40] + other + box[41:]))
    (line,) = full.tail("content", "--reveal", "--reason", "X")
    assert line["reveal"] == {"state": "corrupt", "fields": {}, "withheld": []}


def moves(full):
    """Return name → messages that were put together from parts of true ones."""
    first, second = full.stored("cdr.pii")[:2]
    (content,) = full.stored("content")

    def value(stored):
        return json.loads(stored.value)

    def made(stored, **changes):
        return stored._replace(value=json.dumps({**value(stored), **changes}, sort_keys=True).encode())

    return {
        "value in another stream": content._replace(stream="cdr.pii"),
        "value in another stream of the same domain's shape": first._replace(stream="content"),
        "record in review": content._replace(stream="review"),
        "a box in another record": made(first, sealed=[
            {**part, "box": value(second)["sealed"][0]["box"]} for part in value(first)["sealed"][:1]
        ]),
        "parts of two records": made(first, sealed=[*value(first)["sealed"], *value(second)["sealed"]]),
        "another account": made(content, account_id="other"),
        "another day": made(content, day="2020-01-01"),
        "a longer life": made(content, privacy={**value(content)["privacy"], "expires_at": "2099-01-01T00:00:00Z"}),
        "no sealed part": made(first, sealed=[]),
        "one part of two": made(_of_two(first, second), sealed=value(_of_two(first, second))["sealed"][:1]),
        "parts the other way round": made(
            _of_two(first, second), sealed=value(_of_two(first, second))["sealed"][::-1]
        ),
        "no JSON": first._replace(value=b"\x00"),
        "nothing": first._replace(value=b""),
        "another shape": first._replace(value=b'{"v":1,"sealed":"x"}'),
    }  # fmt: skip


def _of_two(*stored):
    return next(one for one in stored if len(json.loads(one.value)["sealed"]) == 2)


def test_a_value_moved_to_another_record_account_stream_or_epoch_is_corrupt(full):
    for what, message in moves(full).items():
        (result,) = opened(full, "cdr.pii", change=lambda _, one=message: [one])
        assert (result.state, result.fields, result.withheld) == (State.CORRUPT, {}, ()), what


# --- denied ------------------------------------------------------------------------------------------------------


def roles(place, *grants):
    place.configure(roles="roles.toml", **SHORT_LEASE)
    tables = "".join(
        f'[[grant]]\nuser = "{user}"\nrole = "{role}"\naccounts = {json.dumps(accounts)}\n'
        for user, role, accounts in grants
    )
    (place.folder / "roles.toml").write_text(tables)


def test_without_a_roles_file_the_owner_of_the_key_store_may_open_everything_and_nobody_else_anything(
    full, monkeypatch
):
    assert principal(None, full.data / "keys.db").may_open("cdr.pii", "acme")
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    stranger = principal(None, full.data / "keys.db")
    assert not any(stranger.may_open(stream, None) for stream in SEALED)
    with pytest.raises(RevealDenied):
        opened(full, "cdr.pii", who=stranger)
    assert full.ends("audit") == 0


SOMEBODY_ELSE = """
import os
from streams.cli.main import parser
parser()
os.setuid(65534)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_of_the_machine_gets_one_line_and_nothing_else(full):
    done = full.run("tail", "cdr.pii", "--reveal", "--reason", "X", sabotage=SOMEBODY_ELSE)
    assert done.out == ""
    one_line(done)


def test_a_roles_file_denies_what_it_does_not_grant(full):
    roles(full, ("somebody-else", "dpo", ["*"]), (ME, "billing", ["*"]))
    for stream in SEALED:
        done = full.call("tail", stream, "--reveal", "--reason", "X", "--json")
        assert "may not open this stream; ask for a grant" in one_line(done)
        assert done.out == ""
    assert full.ends("audit") == 0


def test_a_grant_opens_the_accounts_it_names_and_no_others(full):
    full.publish(sms_cdr(record_id="z1", account_id="zeta", recipient=PERSON, occurred_at=ago()))
    full.work()
    roles(full, (ME, "support", ["acme"]))
    shown = full.tail("cdr.pii", "--reveal", "--reason", "X")
    by_account = {}
    for line in shown:
        by_account.setdefault(line["value"]["account_id"], []).append(line["reveal"])
    assert {one["state"] for one in by_account["acme"]} == {"revealed"}
    assert by_account["zeta"] == [
        {"state": "denied", "fields": {}, "withheld": [], "reason": "not_granted_for_account"}
    ]
    assert "may not open this stream" in one_line(full.call("tail", "content", "--reveal", "--reason", "X"))
    # what was denied is counted, and its people are not named
    entries = full.values("audit")
    assert {entry["role"] for entry in entries} == {"support"}
    assert sum(entry["denied"] for entry in entries) == 1
    sids = {part["sid"] for line in shown for part in line["value"]["sealed"] if line["value"]["account_id"] == "acme"}
    assert {sid for entry in entries for sid in entry["sids"]} == sids


@pytest.mark.parametrize(
    "text", ['[[grant]]\nuser = "x"', "nonsense", '[[grant]]\nuser = "x"\nrole = "king"\naccounts = ["*"]', None]
)
def test_a_roles_file_that_cannot_be_understood_opens_nothing(full, text):
    full.configure(roles="roles.toml", **SHORT_LEASE)
    if text is not None:
        (full.folder / "roles.toml").write_text(text)
    done = full.call("tail", "cdr.pii", "--reveal", "--reason", "X")
    assert "the roles file" in one_line(done)
    assert done.out == ""


# --- what is noted -----------------------------------------------------------------------------------------------


def test_the_audit_says_who_opened_what_when_and_why_by_sid_and_holds_no_number(full):
    shown = full.tail("cdr.pii", "--reveal", "--reason", "CASE-7/a_b")
    lines = full.tail("audit")
    for line in lines:
        entry = line["value"]
        wanted = {"v": 1, "action": "reveal", "principal": ME, "role": "dpo", "stream": "cdr.pii",
                  "reason": "CASE-7/a_b", "denied": 0}  # fmt: skip
        assert wanted.items() <= entry.items()
        assert set(entry) == {*wanted, "at", "records", "sids", "privacy", "sequence", "writer", "seq", "prev"}
        assert entry["privacy"]["data_class"] == "audit"
        assert instant_s(ago(60)) <= instant_s(entry["at"]) <= instant_s(ago(-60))
        assert line["key"] is None
    assert sorted(place for line in lines for place in line["value"]["records"]) == sorted(
        [one["partition"], one["offset"]] for one in shown
    )
    assert {sid for line in lines for sid in line["value"]["sids"]} == {
        part["sid"] for one in shown for part in one["value"]["sealed"]
    }
    text = json.dumps(lines)
    assert not any(number[1:] in text or number[-7:] in text for number in (PERSON, OTHER))


def test_the_entry_is_committed_before_a_key_is_fetched(full):
    seen = []

    def watch(deployment):
        store, log_path = deployment.store, full.log_path
        open_epochs = store.open_epochs

        def watched(*args):
            seen.append(full.row("SELECT count(*) FROM rows WHERE stream = 'audit'"))
            return open_epochs(*args)

        assert log_path.exists()
        store.open_epochs = watched

    assert states(opened(full, "cdr.pii", before=watch)) == ["revealed"] * 2
    assert seen == [(1,)]


NO_ROOM_TO_NOTE = """
from schemas.errors import LogFull
from streams.log.sqlite import SqliteLog
async def append(*_):
    raise LogFull
SqliteLog.append = append
"""


def test_nothing_opens_if_it_cannot_be_noted(full):
    touched = []

    def break_log(deployment):
        async def append(*_):
            raise LogBusy

        deployment.log.append = append
        deployment.store.open_epochs = deployment.store.open_persons = lambda *_: touched.append(1)

    with pytest.raises(LogBusy):
        opened(full, "cdr.pii", before=break_log)
    assert touched == []
    # and through the command line
    done = full.run("tail", "cdr.pii", "--reveal", "--reason", "X", "--json", sabotage=NO_ROOM_TO_NOTE)
    assert done.out == ""
    assert "The disk of the log is full" in one_line(done)


def test_nothing_opens_if_the_head_of_the_chain_cannot_be_kept(full):
    touched = []

    def break_ledger(deployment):
        def put_head(_):
            raise KeysBusy

        deployment.store.ledger.put_head = put_head
        deployment.store.open_epochs = deployment.store.open_persons = lambda *_: touched.append(1)

    with pytest.raises(KeysBusy):
        opened(full, "cdr.pii", before=break_ledger)
    assert touched == []


@pytest.mark.parametrize("reason", ["", "two words", "x" * 41, "Ünicode", "a.b", "a\n", f"case {PERSON}", PERSON])
def test_a_reason_is_a_code_or_case_reference(full, reason):
    with pytest.raises(InputInvalid, match="code or case reference") as refused:
        opened(full, "cdr.pii", reason=reason)
    assert PERSON not in str(refused.value)
    done = full.call("tail", "cdr.pii", "--reveal", "--reason", reason)
    assert done.out == ""
    assert PERSON[1:] not in one_line(done)
    assert full.ends("audit") == 0


def test_the_audit_of_one_person_can_be_told_from_that_of_another(full):
    """INF-13: the entries of a person are found by their sids."""
    full.tail("cdr.pii", "--reveal", "--reason", "A")
    full.tail("content", "--reveal", "--reason", "B")
    by_reason = {"A": set(), "B": set()}
    for entry in full.values("audit"):
        by_reason[entry["reason"]] |= set(entry["sids"])
    call = next(value for value in full.values("cdr.pii") if len(value["sealed"]) == 2)
    persons_sid = next(part["sid"] for part in call["sealed"] if part["group"] == "primary")
    assert persons_sid in by_reason["A"]
    assert persons_sid not in by_reason["B"]


# --- restricted: for the privacy officer only (REG-1) --------------------------------------------------------------


def restrict(deployment, number, owner=PLATFORM):
    store = deployment.store
    mark = Mark(secrets.token_hex(16), "restriction", owner, (token(deployment, number),), "CASE-4", int(time.time()))
    store.ledger.add_mark(mark, number)
    return mark


SUPPORT = Principal("desk", (Grant("desk", "support", ("*",)),))


def test_a_restricted_record_opens_for_the_dpo_only(full):
    mark = []
    results = opened(full, "cdr.pii", who=SUPPORT, before=lambda one: mark.append(restrict(one, PERSON)))
    by_state = {one.state: one for one in results}
    assert set(by_state) == {State.DENIED, State.REVEALED}
    assert (by_state[State.DENIED].reason, by_state[State.DENIED].fields) == ("restricted", {})
    assert by_state[State.REVEALED].fields["record_id"] == "m1"
    # their secrets were not fetched in its name: the entry counts it and does not name them
    entries = [entry for entry in full.values("audit") if entry["principal"] == "desk"]
    assert sum(entry["denied"] for entry in entries) == 1
    call = next(value for value in full.values("cdr.pii") if len(value["sealed"]) == 2)
    sids = {part["group"]: part["sid"] for part in call["sealed"]}
    assert [sid for entry in entries for sid in entry["sids"]] == [sids["other"]]  # who is alone in the text
    # the officer sees it, and everybody again once it has ended
    assert states(opened(full, "cdr.pii")) == ["revealed"] * 2
    ended = opened(full, "cdr.pii", who=SUPPORT, before=lambda one: one.store.ledger.end_mark(mark[0].id, 1))
    assert states(ended) == ["revealed"] * 2


def test_a_dpo_of_other_accounts_is_none_for_this_one(full):
    who = Principal("half", (Grant("half", "dpo", ("zeta",)), Grant("half", "support", ("*",))))
    results = opened(full, "cdr.pii", who=who, before=lambda one: restrict(one, PERSON))
    assert {one.reason for one in results} == {None, "restricted"}


def test_restricted_by_the_platform_is_not_restricted_by_the_account(full):
    account = Principal("acme-1", (Grant("acme-1", "account", ("acme",)),))
    assert states(opened(full, "content", who=account, before=lambda one: restrict(one, OTHER))) == ["revealed"]
    results = opened(full, "content", who=account, before=lambda one: restrict(one, OTHER, "acme"))
    assert [(one.state, one.reason) for one in results] == [(State.DENIED, "restricted")]


def test_what_was_cleared_for_a_restricted_person_is_not_sent_and_a_second_verdict_says_so(full):
    egress = Principal("egress-1", (Grant("egress-1", "egress", ("*",)),))
    (result,) = batch(full, who=egress, before=lambda one: restrict(one, PERSON, "acme"))
    assert (result.state, result.fields, result.reason) == (State.DENIED, {}, "restricted")
    (second,) = second_verdicts(full)
    assert (second["record_id"], second["reason"], second["clause"]) == ("q1", "restricted", "REG-1")


# --- corrections: beside the record, which stays as it is (INF-11) -------------------------------------------------


def sealed_beside(deployment, stored, group, clear, plaintext):
    """Return a record for the place of another, sealed under its keys: one part, and these clear fields.

    `plaintext` None: that one's.
    """
    sealed, now_s = take_apart(stored.value), int(time.time())
    part = sealed.parts[0]
    key_id = KeyId.parse(part.key)
    epoch = deployment.store.open_epochs({key_id}, now_s)[key_id]
    secret = deployment.store.open_persons({part.sid}, now_s)[part.sid].secret
    value = clear | {"v": 1, "sealed": [{"group": group, "key": part.key, "sid": part.sid}]}
    cipher = record_key(epoch.key, secret, key_info(key_id, value["account_id"]))
    head = aad_head(stored.stream, key_id.owner, value["account_id"], group)
    if plaintext is None:
        plaintext = open_box(cipher, head, part, sealed.envelope)
    envelope = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    box = seal_box(cipher, head, part.sid.encode(), key_frame(part.key), envelope, plaintext, os.urandom(28))
    value["sealed"][0]["box"] = box.decode()
    message = Message(stored.timestamp_ms, None, stored.headers, orjson.dumps(value, option=orjson.OPT_SORT_KEYS))
    return Output(stored.stream, stored.partition, [message])


def correct(deployment, stored, fields, **changes):
    """Return a correction of a record; `changes` are made to its envelope."""
    told = take_apart(stored.value).fields
    clear = {name: told[name] for name in ("account_id", "month", "privacy") if name in told}
    clear |= {"corrects": stored.offset} | changes
    return sealed_beside(deployment, stored, "correction", clear, orjson.dumps(fields))


def corrected(place, *corrections, **changes):
    """Correct PERSON's call, and return its place."""

    async def inside(deployment):
        call = next(one for one in await everything(deployment.log, "cdr.pii") if one.value.count(b'"box"') == 2)
        for fields in corrections:
            at = (await deployment.log.end_offsets("cdr.pii"))[call.partition]
            await deployment.log.append([correct(deployment, call, fields, **changes)])
            deployment.store.ledger.add_correction("cdr.pii", call.partition, call.offset, at)
        return call.partition, call.offset

    return place.within(inside)


def test_corrections_are_shown_beside_the_record_which_is_as_it_was(full):
    place = corrected(full, {"location": "Leeds"}, {"location": "York"})
    shown = {(line["partition"], line["offset"]): line for line in full.tail("cdr.pii", "--reveal", "--reason", "X")}
    call = shown[place]["reveal"]
    assert call["fields"]["record_id"] == "v1"
    assert "location" not in call["fields"]
    assert call["corrections"] == [{"location": "Leeds"}, {"location": "York"}]
    # a correction is a record too, and says whose it is
    of_them = [line for line in shown.values() if line["value"].get("corrects") == place[1]]
    assert [line["reveal"]["fields"] for line in of_them] == [{"location": "Leeds"}, {"location": "York"}]
    assert sum("corrections" in line["reveal"] for line in shown.values()) == 1


def test_the_corrections_of_a_record_are_noted_with_it(full):
    partition, offset = corrected(full, {"location": "Leeds"})

    def only_it(messages):
        return [one for one in messages if (one.partition, one.offset) == (partition, offset)]

    (result,) = opened(full, "cdr.pii", change=only_it)
    assert result.corrections == ({"location": "Leeds"},)
    noted = [place for entry in full.values("audit") for place in entry["records"]]
    correction = next(line for line in full.tail("cdr.pii") if line["value"].get("corrects") == offset)
    assert noted == [[partition, offset], [partition, correction["offset"]]]


@pytest.mark.parametrize(
    ("changes", "state"), [({"corrects": 999}, "corrupt"), ({"account_id": "zeta"}, "corrupt"), ({}, "revealed")]
)
def test_a_correction_that_does_not_open_says_so_and_the_record_still_shows(full, changes, state):
    place = corrected(full, {"location": "Leeds"}, **changes)
    (line,) = (
        one for one in full.tail("cdr.pii", "--reveal", "--reason", "X") if (one["partition"], one["offset"]) == place
    )
    assert line["reveal"]["state"] == "revealed"
    assert line["reveal"]["fields"]["record_id"] == "v1"
    assert line["reveal"]["corrections"] == [{"location": "Leeds"} if state == "revealed" else {"not_opened": state}]


def test_a_correction_that_is_not_there_any_more_says_so_too(full):
    async def inside(deployment):
        call = next(one for one in await everything(deployment.log, "cdr.pii") if one.value.count(b'"box"') == 2)
        deployment.store.ledger.add_correction("cdr.pii", call.partition, call.offset, 10_000)

    full.within(inside)
    (result,) = (one for one in opened(full, "cdr.pii") if one.corrections)
    assert result.corrections == ({"not_opened": "corrupt"},)
    assert result.state is State.REVEALED


def test_a_correction_dies_with_its_person(full):
    corrected(full, {"location": "Leeds"})

    def destroy(deployment):
        deployment.store.destroy_persons(PLATFORM, [token(deployment, PERSON)])

    results = opened(full, "cdr.pii", before=destroy)
    assert sorted(states(results)) == ["destroyed", "destroyed", "revealed"]
    assert "Leeds" not in str([one.fields for one in results] + [one.corrections for one in results])


# --- the egress gateway's call -----------------------------------------------------------------------------------


def batch(place, *, clock=None, who=DPO, stream="cleared", before=None):
    async def inside(deployment):
        if before is not None:
            before(deployment)
        messages = await everything(deployment.log, stream)
        return await revealer(deployment, who, clock or time.time).open_batch(messages)

    return place.within(inside)


def second_verdicts(place):
    return [value for value in place.values("verdicts") if value["second"]]


@pytest.mark.parametrize(("purpose", "minutes"), [("marketing", 15), ("otp", 10), ("transactional", 60)])
def test_a_cleared_request_opens_until_its_not_after_and_not_a_second_longer(place, purpose, minutes):
    place.publish(sms_request(record_id="q1", purpose=purpose, occurred_at=ago()))
    place.work()
    (verdict,) = place.values("verdicts")
    (cleared,) = place.values("cleared")
    assert cleared["not_after"] == verdict["not_after"]
    until_s = instant_s(cleared["not_after"])
    assert until_s - instant_s(verdict["decided_at"]) == minutes * 60
    # When it is opened in time
    (result,) = batch(place, clock=lambda: until_s)
    assert (result.state, result.fields["recipient"], result.reason) == (State.REVEALED, PERSON, None)
    assert second_verdicts(place) == []
    # and when it is not
    (result,) = batch(place, clock=lambda: until_s + 1)
    assert (result.state, result.fields, result.reason) == (State.DENIED, {}, "too_late")
    (second,) = second_verdicts(place)
    wanted = {"record_id": "q1", "account_id": "acme", "verdict": "refused", "reason": "too_late", "codes": {},
              "purpose": purpose, "channel": "sms", "second": True, "not_after": None}  # fmt: skip
    assert wanted.items() <= second.items()
    assert instant_s(second["decided_at"]) == until_s + 1
    assert {entry["action"] for entry in place.values("audit")} == {"open_batch"}


def test_no_policy_lets_marketing_wait_for_longer_than_a_quarter_of_an_hour(place):
    place.policy(DEFAULT_POLICY.replace("marketing = 15", "marketing = 16"))
    assert "15" in one_line(place.call("run", "--until-idle"))


@pytest.mark.parametrize(
    ("scope", "denied"),
    [
        ((), {"q1", "q2", "q3", "q4"}),
        (("--account", "acme"), {"q1", "q2", "q3"}),
        (("--account", "acme", "--sender", "+12025550111"), {"q2"}),
        (("--account", "acme", "--campaign", "spring"), {"q3"}),
        (("--account", "acme", "--class", "marketing"), {"q1"}),
        (("--account", "acme", "--channel", "voice"), set()),
    ],
)
def test_who_opted_out_after_the_verdict_is_not_written_to(place, scope, denied):
    # Given four requests that were cleared
    common = {"recipient": PERSON, "occurred_at": ago()}
    place.publish(
        sms_request(record_id="q1", purpose="marketing", **common),
        sms_request(record_id="q2", sender="1 (202) 555-0111", country="US", **common),
        sms_request(record_id="q3", campaign_id="spring", **common),
        sms_request(record_id="q4", account_id="other", **common),
        sms_request(record_id="q5", **common | {"recipient": OTHER}),
    )
    place.work()
    assert set(place.verdicts().values()) == {("cleared", None)}
    # When the person opts out before they are sent
    assert place.call("optout", "add", PERSON, *scope).status == 0
    results = batch(place)
    # Then what the opt-out forbids is denied, and a second verdict says so with the codes that gateways know
    ids = [value["record_id"] for value in place.values("cleared")]
    by_id = dict(zip(ids, results, strict=True))
    assert {one for one, result in by_id.items() if result.state is State.DENIED} == denied
    assert {result.reason for result in results if result.state is State.DENIED} <= {"opted_out"}
    assert all(result.fields for one, result in by_id.items() if one not in denied)
    seconds = second_verdicts(place)
    assert {one["record_id"] for one in seconds} == denied
    assert all((one["verdict"], one["reason"], one["codes"]) == ("refused", "opted_out", CODES) for one in seconds)
    assert all(one["clause"] == "KAL-5" for one in seconds)


def test_an_officers_block_denies_too_and_says_whose_it_is(place):
    place.publish(sms_request(record_id="q1", occurred_at=ago()))
    place.work()
    place.call("optout", "add", PERSON, "--authority", "officer", "--reason", "CASE-9")
    (result,) = batch(place)
    assert (result.state, result.reason) == (State.DENIED, "blocked_by_officer")


def test_an_opt_out_that_was_lifted_denies_nothing(place):
    place.publish(sms_request(record_id="q1", occurred_at=ago()))
    place.work()
    place.call("optout", "add", PERSON)
    place.call("optout", "remove", PERSON)
    assert states(batch(place)) == ["revealed"]


def exempted(place, record_id="q1", **clear):
    """Have marketing to OTHER cleared, and once more by an exemption, as the envelope says; `clear`: more of that."""
    place.publish(sms_request(record_id="plain", purpose="marketing", recipient=OTHER, occurred_at=ago()))
    place.work()
    (plain,) = (one for one in place.stored("cleared") if take_apart(one.value).fields["record_id"] == "plain")
    told = {**take_apart(plain.value).fields, "record_id": record_id, "exemption": "purchase", **clear}

    async def append(deployment):
        await deployment.log.append([sealed_beside(deployment, plain, "primary", told, None)])

    place.within(append)


GIVE = ("exemption", "add", OTHER, "--evidence", "ORDER-7", "--given", f"{ago(86_400)[:10]}", "--account")
TAKE = ("exemption", "remove", OTHER, "--account")


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        ((), None),
        (((*TAKE, "acme"),), "exemption_ended"),
        (((*TAKE, "acme", "--channel", "voice"),), None),
        (((*TAKE, "acme", "--channel", "sms"),), "exemption_ended"),
        (((*GIVE, "acme", "--kind", "inquiry"), (*TAKE, "acme", "--kind", "purchase")), None),
        (((*GIVE, "other", "--kind", "consent"), (*TAKE, "acme")), "exemption_ended"),
        (((*TAKE, "acme"), (*GIVE, "acme", "--kind", "purchase")), None),
        (((*TAKE, "acme"), ("optout", "add", OTHER)), "opted_out"),
        (((*TAKE, "acme"), ("optout", "add", OTHER, "--account", "other")), "exemption_ended"),
        ((("keys", "rotate", "token"),), None),
        ((("keys", "rotate", "token"), (*TAKE, "acme")), "exemption_ended"),
        ((("subject", "erase", PERSON, "--account", "acme", "--reason", "CASE-1"),), None),
    ],
)
def test_what_was_cleared_by_an_exemption_is_not_sent_once_none_is_in_force(place, commands, reason):
    # Given two requests to one person, of which one was cleared by an exemption only
    assert place.call(*GIVE, "acme", "--kind", "purchase").status == 0
    exempted(place)
    # When, before they are sent, something becomes of it
    for words in commands:
        done = place.call(*words)
        assert done.status == 0, done.err
    found = dict(zip([one["record_id"] for one in place.values("cleared")], batch(place), strict=True))
    # Then the one is denied with a second verdict, if there is no exemption in force any more, and the other is not
    assert found["q1"].reason == reason
    assert found["plain"].reason == (reason if reason == "opted_out" else None)
    assert bool(found["q1"].fields) == (reason is None)
    denied = {one["record_id"]: (one["verdict"], one["reason"], one["clause"]) for one in second_verdicts(place)}
    wanted = {} if reason is None else {"q1": ("refused", reason, "CAL-3" if reason == "exemption_ended" else "KAL-5")}
    assert {name: told for name, told in denied.items() if name == "q1"} == wanted


def test_an_exemption_under_a_token_key_that_is_new_since_the_last_batch_counts(place):
    assert place.call(*GIVE, "acme", "--kind", "purchase").status == 0
    exempted(place)

    async def inside(deployment):
        messages, gateway = await everything(deployment.log, "cleared"), revealer(deployment)
        assert states(await gateway.open_batch(messages)) == ["revealed"] * 2
        done = await asyncio.to_thread(place.run, "keys", "rotate", "token")
        assert done.status == 0, done.err
        return await gateway.open_batch(messages)

    assert states(place.within(inside)) == ["revealed"] * 2


def test_an_exemption_counts_to_its_last_second_at_the_moment_of_sending(place):
    ends_s = int(time.time()) + 600
    words = (*GIVE, "acme", "--kind", "consent", "--until", instant(ends_s))
    assert place.call(*words).status == 0
    exempted(place, not_after=instant(ends_s + 60), exemption="consent")
    for clock_s, reason in ((ends_s - 1, None), (ends_s, "exemption_ended")):
        results = batch(place, clock=lambda at=clock_s: at)
        ids = [one["record_id"] for one in place.values("cleared")]
        assert dict(zip(ids, results, strict=True))["q1"].reason == reason


def test_who_is_nobody_any_more_has_no_exemption(place):
    # Given an exemption, and a policy that makes the number the account's own afterwards
    assert place.call(*GIVE, "acme", "--kind", "purchase").status == 0
    exempted(place)
    place.policy(DEFAULT_POLICY + f'[[account]]\nid = "acme"\nown_numbers = ["{OTHER}"]\nclause = "INF-2"\n')
    assert sorted(str(one.reason) for one in batch(place)) == ["None", "exemption_ended"]


def blind_to(hidden, read=SqliteLog.end_offsets):
    """Return an `end_offsets` that cannot see one stream."""

    async def blind(self, stream):
        if stream == hidden:
            raise LogBusy
        return await read(self, stream)

    return blind


def test_exemptions_are_read_where_a_verdict_rested_on_one_and_nothing_opens_without_them(place, monkeypatch):
    assert place.call(*GIVE, "acme", "--kind", "purchase").status == 0
    place.publish(sms_request(record_id="q0", recipient=PERSON, occurred_at=ago()))
    place.work()
    with monkeypatch.context() as patched:
        patched.setattr(SqliteLog, "end_offsets", blind_to("exemptions"))
        assert states(batch(place)) == ["revealed"]
    exempted(place)
    noted = place.ends("audit")
    with monkeypatch.context() as patched:
        patched.setattr(SqliteLog, "end_offsets", blind_to("exemptions"))
        with pytest.raises(LogBusy):
            batch(place)
    assert place.ends("audit") == noted


def test_an_accounts_own_number_is_no_person_and_cannot_opt_out_of_its_account(place):
    place.policy(DEFAULT_POLICY + f'[[account]]\nid = "acme"\nown_numbers = ["{PERSON}"]\nclause = "INF-2"\n')
    place.publish(sms_request(record_id="q1", occurred_at=ago()), sms_request(record_id="q2", account_id="other"))
    place.publish(sms_request(record_id="q3", account_id="other", occurred_at=ago()))
    place.work()
    place.call("optout", "add", PERSON)
    results = dict(zip([one["record_id"] for one in place.values("cleared")], batch(place), strict=True))
    assert results["q1"].state is State.REVEALED
    assert results["q3"].reason == "opted_out"


def test_open_batch_is_for_the_cleared_stream_and_for_who_may_open_it(full):
    with pytest.raises(InputInvalid, match="cleared only"):
        batch(full, stream="cdr.pii")
    with pytest.raises(RevealDenied):
        batch(full, who=Principal("x", (Grant("x", "support", ("*",)),)))
    (result,) = batch(full, who=Principal("x", (Grant("x", "egress", ("other",)),)))
    assert (result.state, result.reason) == (State.DENIED, "not_granted_for_account")
    assert second_verdicts(full) == []
    (result,) = batch(full, who=Principal("x", (Grant("x", "egress", ("acme",)),)))
    assert result.state is State.REVEALED


def test_of_nothing_comes_nothing(place):
    place.publish(b"not json")
    place.work()
    assert batch(place) == []
    assert opened(place, "cdr.pii") == []
    assert place.ends("audit") == 0


def test_while_the_suppressions_cannot_be_read_nothing_is_opened(full, monkeypatch):
    monkeypatch.setattr(SqliteLog, "end_offsets", blind_to("suppressions"))
    with pytest.raises(LogBusy):
        batch(full)
    monkeypatch.undo()
    assert full.ends("audit") == 0


def test_while_the_token_key_changes_nothing_is_sent_and_afterwards_opt_outs_count_again(full):
    async def inside(deployment):
        messages, store = await everything(deployment.log, "cleared"), deployment.store
        gateway = revealer(deployment)
        # Given a gateway that has sent before
        assert states(await gateway.open_batch(messages)) == ["revealed"]
        # When the token key is rotated
        store.add_token_key()
        store.hold_tokens(2)
        with pytest.raises(TokensChange):
            await gateway.open_batch(messages)
        store.switch_tokens(2)
        # Then it goes on with the new one
        assert states(await gateway.open_batch(messages)) == ["revealed"]

    full.within(inside)
    assert full.call("optout", "add", PERSON).status == 0
    (result,) = batch(full)
    assert result.reason == "opted_out"


def test_an_opt_out_under_a_token_key_that_is_new_since_the_last_batch_is_seen(full):
    async def inside(deployment):
        messages, store = await everything(deployment.log, "cleared"), deployment.store
        gateway = revealer(deployment)
        assert states(await gateway.open_batch(messages)) == ["revealed"]
        store.add_token_key()
        store.hold_tokens(2)
        store.switch_tokens(2)
        done = await asyncio.to_thread(full.run, "optout", "add", PERSON)
        assert done.status == 0, done.err
        return await gateway.open_batch(messages)

    (result,) = full.within(inside)
    assert (result.state, result.reason) == (State.DENIED, "opted_out")


def test_what_became_too_late_while_its_opening_was_noted_is_not_sent(place):
    place.publish(sms_request(record_id="q1", purpose="otp", occurred_at=ago()))
    place.work()
    until_s = instant_s(place.values("cleared")[0]["not_after"])

    async def inside(deployment):
        clock = [until_s]
        gateway = revealer(deployment, clock=lambda: clock[0])
        note = gateway._auditor.write

        async def slowly(*what, **told):
            await note(*what, **told)
            clock[0] += 1

        gateway._auditor.write = slowly
        return await gateway.open_batch(await everything(deployment.log, "cleared"))

    (result,) = place.within(inside)
    assert (result.state, result.reason) == (State.DENIED, "too_late")


def test_of_two_calls_at_once_one_reads_the_opt_outs_after_the_other(full, monkeypatch):
    read, reading, most = SqliteLog.end_offsets, [], []

    async def slowly(self, stream):
        if stream == "suppressions":
            reading.append(stream)
            most.append(len(reading))
            await asyncio.sleep(0.01)
            reading.pop()
        return await read(self, stream)

    async def inside(deployment):
        messages, gateway = await everything(deployment.log, "cleared"), revealer(deployment)
        monkeypatch.setattr(SqliteLog, "end_offsets", slowly)
        return await asyncio.gather(*(gateway.open_batch(messages) for _ in range(2)))

    assert [states(one) for one in full.within(inside)] == [["revealed"]] * 2
    assert set(most) == {1}


def test_a_call_under_way_keeps_the_opt_outs_it_has_read_while_another_turns_to_a_new_token_key(full):
    assert full.call("optout", "add", PERSON).status == 0

    async def inside(deployment):
        messages, gateway = await everything(deployment.log, "cleared"), revealer(deployment)
        note = gateway._auditor.write

        async def turned(*what, **told):
            await note(*what, **told)
            gateway._tail.follow(2)

        gateway._auditor.write = turned
        return await gateway.open_batch(messages)

    (result,) = full.within(inside)
    assert (result.state, result.reason) == (State.DENIED, "opted_out")


def test_what_was_opened_shows_nothing_of_itself(full):
    results = opened(full, "cdr.pii")
    assert {repr(one) for one in results} == {"Revealed(revealed)"}
    assert asyncio.iscoroutinefunction(Revealer.open_batch)
    assert PERSON not in repr(SimpleNamespace(results=results))
