from datetime import UTC, datetime
from itertools import pairwise

import orjson
import pytest

from processors.keyring import EpochRef, KeyRing
from processors.pipeline import Inbox, Outcome, Pipeline
from processors.plan import Planner
from processors.screen.suppression import Rule, State, Suppressions
from processors.seal import Entropy
from schemas.catalog import CATALOG
from schemas.errors import KeysChanged
from tests.support.records import (
    AT,
    DAY_S,
    DEFAULT_POLICY,
    HOUR,
    NOW_S,
    OTHER,
    PERSON,
    SEED,
    TOKENS,
    Lists,
    a_ring,
    account,
    open_value,
    outcome,
    policy_of,
    preference,
    raw,
    reply,
    run,
    sms_cdr,
    sms_request,
    voice_cdr,
    voice_request,
)

EVERYTHING = [
    sms_request(), voice_request(sender=OTHER), sms_cdr(), voice_cdr(sender=OTHER, transcript="hello"), reply("STOP"),
    reply("please stop"), preference("opt_out", scope="sender"), sms_request(recipient=OTHER, purpose="marketing"),
    b"x",
]  # fmt: skip


def instant(text):
    return int(datetime.fromisoformat(text).timestamp())


def shape(seconds):
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sids(message):
    return [part["sid"] for part in orjson.loads(message.value)["sealed"]]


# --- one outcome each, and where each goes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "streams"),
    [
        (sms_request(), "request", {"verdicts", "cleared"}),
        (voice_request(), "request", {"verdicts", "cleared"}),
        (sms_request(recipient=""), "request", {"verdicts"}),
        (sms_cdr(), "cdr", {"cdr.pii", "cdr.anonymous", "content"}),
        (sms_cdr(content=...), "cdr", {"cdr.pii", "cdr.anonymous"}),
        (voice_cdr(), "cdr", {"cdr.pii", "cdr.anonymous"}),
        (voice_cdr(recording_ref="r"), "cdr", {"cdr.pii", "cdr.anonymous", "content"}),
        (reply("hello"), "cdr", {"cdr.pii", "cdr.anonymous", "content"}),
        (reply("STOP"), "cdr", {"cdr.pii", "cdr.anonymous", "content", "suppressions"}),
        (reply("please stop"), "cdr", {"cdr.pii", "cdr.anonymous", "content", "review"}),
        (preference(), "preference", {"suppressions"}),
        (preference("opt_in"), "preference", set()),
        (b"x", "unreadable", {"quarantine"}),
    ],
)
def test_each_record_ends_in_its_streams_and_no_other(value, kind, streams):
    done = run([value])
    assert done.streams == streams
    assert [found.kind for found in done.outcomes] == [kind]


def test_what_is_emitted_adds_up():
    done = run(EVERYTHING * 3)
    ends = [(str(found.end), found.kind) for found in done.outcomes]
    assert len(ends) == 3 * len(EVERYTHING)
    assert len(done.of("verdicts")) == ends.count(("emit", "request")) + ends.count(("refuse", "request"))
    assert len(done.of("cleared")) == ends.count(("emit", "request"))
    assert len(done.of("cdr.anonymous")) == len(done.of("cdr.pii")) == ends.count(("emit", "cdr"))
    assert len(done.of("quarantine")) == 3


def test_nothing_comes_of_nothing():
    done = run([])
    assert (done.outcomes, done.outputs, done.prepared.needs.epochs) == ([], [], {})


def test_duplicates_are_records_of_their_own():
    done = run([sms_cdr(), sms_cdr(), sms_request(), sms_request()])
    assert [str(found.end) for found in done.outcomes] == ["emit"] * 4
    for stream, count in (("cdr.pii", 2), ("content", 2), ("cdr.anonymous", 2), ("cleared", 2), ("verdicts", 2)):
        assert len(done.of(stream)) == count
    for stream in ("cdr.pii", "content", "cleared"):
        first, second = done.of(stream)
        assert first.value != second.value
        assert open_value(first.value, done.ring) == open_value(second.value, done.ring)


def test_outputs_go_to_the_partition_of_the_input_but_for_the_anonymous_and_the_suppressions():
    done = run(EVERYTHING, partition=2, partitions=64)
    for output in done.outputs:
        if output.stream not in ("cdr.anonymous", "suppressions"):
            assert output.partition == 2
        assert 0 <= output.partition < 64
    assert {output.stream for output in done.outputs} <= set(CATALOG)


def test_the_partition_of_the_anonymous_records_is_drawn_for_each_batch():
    drawn = {
        output.partition
        for seed in range(40)
        for output in run([sms_cdr()], seed=bytes([seed]) * 32).outputs
        if output.stream == "cdr.anonymous"
    }
    assert drawn == {0, 1, 2, 3}


def test_only_suppressions_have_a_key():
    done = run(EVERYTHING)
    for output in done.outputs:
        assert all((message.key is not None) == (output.stream == "suppressions") for message in output.messages)


def test_a_bug_of_ours_quarantines_one_record_and_no_more(monkeypatch):
    # Given a stage that breaks on one record
    monkeypatch.setattr("processors.screen.keywords.Keywords.match", lambda *_: 1 // 0)
    # When a batch holds it
    done = run([sms_cdr(), reply("hello"), sms_cdr()])
    # Then only that one is put away, whole, and nothing else of it is emitted
    assert [found.reason for found in done.outcomes] == [None, "internal_error", None]
    assert [len(done.of(stream)) for stream in ("cdr.pii", "content", "cdr.anonymous", "quarantine")] == [2, 2, 2, 1]


# --- whose data, under whose secret -------------------------------------------------------------------------


def test_two_people_on_a_call_are_two_parts_each_under_its_own_secret():
    # Given a call from one person to another
    done = run([voice_cdr(sender=OTHER, display_name="Ann", client_ip="192.0.2.1", location="here")])
    (message,) = done.of("cdr.pii")
    opened = done.opened("cdr.pii")[0]
    # Then the caller's own fields are apart from all others, and under another secret
    assert opened["other"] == {"type": "cdr", "v": 1, "sender": OTHER, "display_name": "Ann", "client_ip": "192.0.2.1"}
    assert opened["primary"]["recipient"] == PERSON
    assert set(opened["primary"]) & {"sender", "display_name", "client_ip"} == set()
    assert opened["primary"]["location"] == "here"
    primary, other = sids(message)
    assert primary != other
    # And with the other's secret gone, the primary's part still opens, and only that
    whole = orjson.loads(message.value)
    ring = KeyRing()
    ring.epochs = done.ring.epochs
    ring.persons = {ref: person for ref, person in done.ring.persons.items() if person.sid != other}
    with pytest.raises(KeyError):
        open_value(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS), ring)
    # And one person has one secret in both roles
    again = run([voice_cdr(sender=OTHER), voice_cdr(sender=PERSON, recipient=OTHER)])
    first, second = map(sids, again.of("cdr.pii"))
    assert first == second[::-1]


def test_the_other_party_of_an_inbound_call_is_its_recipient():
    opened = run([voice_cdr(direction="mo", sender=PERSON, recipient=OTHER, display_name="Ann")]).opened("cdr.pii")[0]
    assert opened["other"] == {"type": "cdr", "v": 1, "recipient": OTHER}
    assert (opened["primary"]["sender"], opened["primary"]["display_name"]) == (PERSON, "Ann")


def test_a_request_with_two_people_is_two_parts_as_well():
    done = run([sms_request(sender=OTHER)])
    assert done.opened("cleared")[0]["other"] == {"type": "request", "v": 1, "sender": OTHER}
    assert len(set(sids(done.of("cleared")[0]))) == 2


@pytest.mark.parametrize(
    ("fields", "persons"),
    [
        ({"sender": "ACME", "recipient": PERSON}, 1),
        ({"sender": "12345", "recipient": PERSON}, 1),
        ({"sender": "ann@example.org", "recipient": PERSON}, 2),
        ({"sender": "ACME", "recipient": "ann@example.org"}, 1),
        ({"sender": "ACME", "recipient": "sip:ann@example.org"}, 1),
        ({"sender": "ACME", "recipient": "somebody else here"}, 1),
        ({"sender": OTHER, "recipient": ""}, 1),
        ({"sender": "anonymous", "recipient": PERSON}, 1),
        ({"sender": "", "recipient": ""}, 0),
        ({"sender": "ACME", "recipient": "12345"}, 0),
        ({"sender": PERSON, "recipient": PERSON}, 1),
    ],
)
def test_a_person_is_whoever_a_human_may_stand_behind(fields, persons):
    done = run([sms_cdr(content=..., **fields)])
    assert len(done.prepared.needs.persons) == persons
    found = {sid for sid in sids(done.of("cdr.pii")[0]) if not sid.startswith("salt:")}
    assert len(found) == persons
    opened = {name: value for group in done.opened("cdr.pii")[0].values() for name, value in group.items()}
    assert (opened["sender"], opened["recipient"]) == (fields["sender"], fields["recipient"])


def test_an_accounts_own_number_is_no_person():
    policy = policy_of(account("acme", f'own_numbers = ["{OTHER}"]'))
    done = run([voice_cdr(sender=OTHER), voice_cdr(sender=OTHER, account_id="other")], policy=policy)
    own, foreign = done.of("cdr.pii")
    assert (len(sids(own)), len(sids(foreign))) == (1, 2)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("0049 151 12345678", {}), ("+49-151-1234-5678", {}), ("4915112345678", {}),
        ("0151 12345678", {"country": "DE"}), ("tel:+4915112345678", {}),
    ],
)  # fmt: skip
def test_a_number_that_can_be_fixed_is_the_same_person_and_is_kept_as_it_was_written(text, fields):
    done = run([sms_cdr(), sms_cdr(recipient=text, **fields)])
    clean, fixed = map(sids, done.of("cdr.pii"))
    assert clean == fixed
    assert done.opened("cdr.pii")[1]["primary"]["recipient"] == text


def test_a_national_number_is_read_as_of_the_accounts_region():
    policy = policy_of(account("acme", 'default_region = "DE"'))
    done = run([sms_cdr(), sms_cdr(recipient="0151 12345678", country="FR")], policy=policy)
    assert len({*map(tuple, map(sids, done.of("cdr.pii")))}) == 1


def test_one_person_has_one_secret_per_owner_and_month():
    # Given one person in two months, with two accounts
    values = [
        sms_cdr(account_id=name, occurred_at=at) for name in ("acme", "other") for at in (AT, "2026-10-31T23:59:59Z")
    ]
    done = run(values)
    pii, content = [sids(message)[0] for message in done.of("cdr.pii")], [sids(m)[0] for m in done.of("content")]
    # Then the platform knows one of them a month, and each account its own
    assert (pii[0], pii[1]) == (pii[2], pii[3])
    assert len({*pii, *content}) == 2 + 4
    owners = {(ref.owner, ref.month) for ref in done.prepared.needs.persons}
    assert owners == {(owner, month) for owner in ("platform", "acme", "other") for month in ("2026-11", "2026-10")}


# --- content ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["a", "\x00", "a\x00b", "😀👩\u200d👩\u200d👧", "שלום \u202eabc\u202c", "مرحبا", "\u2028\u2029", '"\\/\b',
     "x" * 5000, "\ufffe", "é" * 9, "\u0065\u0301", "\U0010ffff", " ", "\n", "null", "{}"],
)  # fmt: skip
def test_every_text_comes_back_as_it_was(text):
    done = run([sms_cdr(content=text, display_name=text[:256]), reply(text), sms_request(content=text)])
    assert [found.end for found in done.outcomes] == ["emit"] * 3
    assert [opened["content"]["content"] for opened in done.opened("content")] == [text, text]
    assert done.opened("cleared")[0]["primary"]["content"] == text
    assert done.opened("cdr.pii")[0]["primary"]["display_name"] == text[:256]
    assert "content" not in done.opened("cdr.pii")[0]["primary"]


@pytest.mark.parametrize("fields", [{"content": ""}, {"content": None}, {"content": ...}])
def test_empty_or_null_content_is_nothing_said(fields):
    done = run([sms_cdr(**fields), reply("", **{k: v for k, v in fields.items() if v is not ...})])
    assert not done.of("content")
    assert [found.end for found in done.outcomes] == ["emit", "emit"]
    assert len(done.of("cdr.anonymous")) == 2
    assert not done.of("suppressions")


def test_recording_and_transcript_are_content_of_the_account():
    done = run([voice_cdr(recording_ref="s3://rec", transcript="hello")])
    assert done.opened("content") == [
        {"content": {"record_id": "rec-1", "recording_ref": "s3://rec", "transcript": "hello"}}
    ]
    assert orjson.loads(done.of("content")[0].value)["sealed"][0]["key"] == "content/acme/2026-11-21/1"


def test_what_an_account_never_stores_is_stored_nowhere():
    # Given an account that has its content never stored
    policy = policy_of(account("acme", 'content = "never"'))
    # When its records come in, a near miss among them
    done = run([sms_cdr(content="s3cret"), reply("please stop s3cret"), sms_cdr(account_id="other")], policy=policy)
    # Then only the other account has content, and the near miss is for review without its text
    assert [value["account_id"] for value in done.values("content")] == ["other"]
    assert [sorted(opened["review"]) for opened in done.opened("review")] == [
        ["occurred_at", "recipient", "record_id", "sender"]
    ]
    for output in done.outputs:
        for message in output.messages:
            if b'"sealed":' in message.value:
                assert b"s3cret" not in b"".join(open_value(message.value, done.ring).values())


def test_content_is_kept_as_long_as_the_account_says():
    policy = policy_of(account("acme", 'content = "7 days"') + account("longer", 'content = "400 days"'))
    done = run([sms_cdr(account_id=name) for name in ("acme", "longer", "other")], policy=policy)
    ends = [value["privacy"]["expires_at"] for value in done.values("content")]
    assert ends == ["2026-11-29T00:00:00Z", "2027-12-27T00:00:00Z", "2026-12-22T00:00:00Z"]


# --- each part dies by its own deadline ---------------------------------------------------------------------


def at_age(text, now):
    return run([voice_cdr(occurred_at=text, transcript="hello")], now_s=instant(now))


def test_content_past_its_deadline_is_left_out():
    assert at_age("2026-11-21T23:59:59Z", "2026-12-21T23:59:59Z").streams == {"cdr.pii", "cdr.anonymous", "content"}
    assert at_age("2026-11-21T23:59:59Z", "2026-12-22T00:00:00Z").streams == {"cdr.pii", "cdr.anonymous"}


def test_older_than_twelve_months_only_the_anonymous_part_is_left():
    before = at_age("2026-11-21T11:22:33Z", "2027-11-30T23:59:59Z")
    after = at_age("2026-11-21T11:22:33Z", "2027-12-01T00:00:00Z")
    assert before.streams == {"cdr.pii", "cdr.anonymous"}
    assert after.streams == {"cdr.anonymous"}
    assert before.outcomes == [Outcome("cdr", "emit", None)]
    assert after.outcomes == [Outcome("cdr", "emit", "personal_part_expired")]
    assert after.values("cdr.anonymous") == before.values("cdr.anonymous")
    assert not after.prepared.needs.persons
    assert not after.prepared.needs.epochs


def test_older_than_ten_years_nothing_is_left_but_a_count():
    before = at_age("2026-11-21T11:22:33Z", "2036-12-31T23:59:59Z")
    after = at_age("2026-11-21T11:22:33Z", "2037-01-01T00:00:00Z")
    assert before.streams == {"cdr.anonymous"}
    assert (after.outputs, after.outcomes) == ([], [Outcome("cdr", "expired", "older_than_everything")])
    assert not after.prepared.needs.epochs


def test_a_keyword_counts_however_old_the_reply_unless_it_has_expired():
    assert "suppressions" in run([reply("STOP")], now_s=instant("2028-01-01T00:00:00Z")).streams
    assert not run([reply("STOP")], now_s=instant("2037-01-01T00:00:00Z")).outputs


def test_an_epoch_that_is_dead_in_the_ring_leaves_its_part_out():
    # Given a batch whose keys were asked for, but whose pii epoch died before they came
    done = run([sms_cdr(), voice_cdr(sender=OTHER, transcript="x")])
    ring = a_ring(done.prepared.needs)
    del ring.epochs[EpochRef("pii", "platform", "2026-11")]
    # When it is completed
    outputs = done.pipeline.complete(done.prepared, ring, Entropy(SEED), 1)
    # Then the rest is there, without the dead part
    assert {output.stream for output in outputs} == {"content", "cdr.anonymous"}
    ring.epochs.clear()
    outputs = done.pipeline.complete(done.prepared, ring, Entropy(SEED), 1)
    assert {output.stream for output in outputs} == {"cdr.anonymous"}


@pytest.mark.parametrize("stream", ["cleared", "quarantine", "suppressions"])
def test_without_a_key_that_cannot_be_dead_nothing_goes_out_at_all(stream):
    done = run([sms_request(), b"x", preference(), voice_request(sender=OTHER)])
    ring = a_ring(done.prepared.needs)
    ring.epochs = {ref: key for ref, key in ring.epochs.items() if ref.domain != CATALOG[stream].domain.value}
    with pytest.raises(KeysChanged, match="destroyed already"):
        done.pipeline.complete(done.prepared, ring, Entropy(SEED), 1)


def test_the_needs_hold_every_key_with_its_deadline_and_at_least_as_many_seals_as_are_made():
    done = run(EVERYTHING * 5)
    made = {}
    for output in done.outputs:
        for message in output.messages:
            for part in orjson.loads(message.value).get("sealed", ()):
                made[part["key"]] = made.get(part["key"], 0) + 1
    needs = {f"{'/'.join(ref)}/1": wanted for ref, wanted in done.prepared.needs.epochs.items()}
    assert set(made) == set(needs)
    for key, (_, count) in needs.items():
        assert made[key] <= count <= 2 * made[key] + 10
    assert {key.split("/")[0]: deadline for key, (deadline, _) in needs.items()} == {
        "transit": instant("2026-11-22T12:00:00Z"),
        "content": instant("2026-12-22T00:00:00Z"),
        "review": instant("2026-12-22T00:00:00Z"),
        "pii": instant("2027-12-01T00:00:00Z"),
        "quarantine": instant("2026-11-28T00:00:00Z"),
        "suppression": None,
    }


OVERRIDES = {
    "none": "",
    "traffic": [("traffic", "processor")],
    "content": [("content", "controller")],
    "both": [("traffic", "processor"), ("content", "controller")],
}


def overridden(overrides, content="30 days", since="2020-01-01"):
    rules = f'content = "{content}"\n' + "".join(agreement(*override, since) for override in overrides)
    return policy_of(account("acme", rules))


def agreement(data_class, role, since):
    head = f'[[account.role]]\ndata_class = "{data_class}"\nrole = "{role}"\n'
    return head + f'agreement = "MSA-17"\nfrom = {since}\nclause = "KAL-1"\n'


@pytest.mark.parametrize("content", ["7 days", "30 days", "900 days", "never"])
@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_no_part_outlives_the_secret_it_needs(overrides, content):
    # Given every agreement, every instruction, and records of every age
    policy = overridden(overrides, content)
    for days in (0, 20, 40, 100, 300, 370, 400, 800, 1000):
        at = shape(NOW_S - days * DAY_S)
        values = [voice_cdr(occurred_at=at, sender=OTHER, transcript="x"), reply("please stop", occurred_at=at)]
        prepared = run(values, policy=policy).prepared  # When they are sealed with what a store would still give out
        # Then nothing was missing: each person's secret is kept until the last epoch of its owner is dead
        for person, deadline_s in prepared.needs.persons.items():
            for epoch, (epoch_deadline_s, _) in prepared.needs.epochs.items():
                if epoch.owner == person.owner and person.month in epoch.epoch:
                    assert deadline_s >= epoch_deadline_s, (epoch.domain, days)


@pytest.mark.parametrize("order", [("acme", "other"), ("other", "acme")])
def test_a_secret_that_two_accounts_share_is_kept_for_the_longer_of_them(order):
    # Given one person, and an account whose content the platform controls and keeps for 900 days
    policy = overridden(OVERRIDES["content"], "900 days")
    # When both accounts have records of that person in one batch
    done = run([sms_cdr(account_id=name) for name in order], policy=policy)
    # Then the platform's secret is kept as long as that content, and the other account's only as long as its own
    deadlines = {ref.owner: deadline_s for ref, deadline_s in done.prepared.needs.persons.items()}
    assert deadlines["platform"] >= instant("2029-05-10T00:00:00Z")
    assert deadlines["other"] < instant("2027-02-01T00:00:00Z")


@pytest.mark.parametrize("content", [("processor", "controller"), ("controller", "processor")])
def test_an_agreement_that_begins_between_a_request_and_its_verdict_harms_nothing(content):
    # Given that who owns content changes at midnight, and that the account owns its traffic data
    before, after = content
    rules = agreement("traffic", "processor", "2020-01-01")
    rules += agreement("content", before, "2020-01-01\nuntil = 2026-11-21") + agreement("content", after, "2026-11-21")
    # When a request of yesterday is cleared today
    done = run(
        [sms_request(occurred_at="2026-11-20T23:59:59Z", sender=OTHER)],
        policy=policy_of(account("acme", rules)),
        now_s=instant("2026-11-21T00:10:00Z"),
    )
    # Then it is sealed under the owner of today
    assert done.opened("cleared")[0]["other"]["sender"] == OTHER
    owner = done.values("cleared")[0]["sealed"][0]["key"].split("/")[1]
    assert owner == ("platform" if after == "controller" else "acme")


# --- what every output says of itself -----------------------------------------------------------------------

TAGS = {
    "role", "controller", "processor", "legal_basis", "purposes", "data_class", "policy", "jurisdiction", "transfer",
    "expires_at",
}  # fmt: skip
EXPIRES = {
    "verdicts": "2026-11-28T00:00:00Z",
    "cleared": "2026-11-22T12:00:00Z",
    "content": "2026-12-22T00:00:00Z",
    "cdr.pii": "2027-12-01T00:00:00Z",
    "cdr.anonymous": "2037-01-01T00:00:00Z",
    "review": "2026-12-22T00:00:00Z",
    "quarantine": "2026-11-28T00:00:00Z",
    "suppressions": None,
}


def test_every_output_value_has_a_complete_privacy_object_and_headers_that_agree():
    done = run(EVERYTHING)
    assert done.streams == set(EXPIRES)
    for stream, expires_at in EXPIRES.items():
        for message, value in zip(done.of(stream), done.values(stream), strict=True):
            privacy = value["privacy"]
            assert set(privacy) == TAGS | ({"anonymous_from"} if stream == "cdr.anonymous" else set())
            assert privacy["data_class"] == CATALOG[stream].data_class
            assert privacy["policy"] == "default/1"
            assert privacy["expires_at"] == expires_at
            assert privacy["purposes"]
            assert privacy["transfer"].startswith("scc-module-")
            assert privacy["role"] == ("processor" if privacy["processor"] else "controller")
            assert dict(message.headers) == {
                "role": privacy["role"].encode(), "class": privacy["data_class"].encode(), "policy": b"default/1",
            }  # fmt: skip


def test_an_anonymous_record_may_be_called_so_when_its_twin_is_dead():
    done = run([sms_cdr()])
    (anonymous,), (pii,) = done.values("cdr.anonymous"), done.values("cdr.pii")
    assert anonymous["privacy"]["anonymous_from"] == pii["privacy"]["expires_at"] == "2027-12-01T00:00:00Z"


@pytest.mark.parametrize(
    ("overrides", "pii", "content"),
    [("none", "platform", "acme"), ("traffic", "acme", "acme"), ("content", "platform", "platform"),
     ("both", "acme", "platform")],
)  # fmt: skip
def test_an_agreement_moves_the_keys_and_the_tags_with_the_role(overrides, pii, content):
    # Given an account with an agreement on a data class (KAL-1)
    policy = overridden(OVERRIDES[overrides])
    # When its records are sealed
    done = run([sms_cdr(), sms_request(), reply("please stop")], policy=policy)
    # Then the keys belong to whoever controls the data, and the tags say so
    for stream, owner in (("cdr.pii", pii), ("content", content), ("cleared", content), ("review", content)):
        for message, value in zip(done.of(stream), done.values(stream), strict=True):
            assert value["sealed"][0]["key"].split("/")[1] == owner
            assert value["privacy"]["controller"] == owner
            role = "controller" if owner == "platform" else "processor"
            assert value["privacy"]["role"] == role
            assert value["privacy"]["processor"] == (None if owner == "platform" else "platform")
            assert dict(message.headers)["role"] == role.encode()
            assert open_value(message.value, done.ring)


# --- the anonymous record -----------------------------------------------------------------------------------

ANONYMOUS_FIELDS = {
    "v", "account_id", "channel", "direction", "purpose", "status", "segments", "billable_units", "country", "mcc",
    "mnc", "route", "price", "occurred_at", "privacy",
}  # fmt: skip
BILLED = {
    "purpose": "otp", "country": "DE", "mcc": "262", "mnc": "07", "route": "gold-1", "status": "DELIVRD",
    "price": {"amount": "0.07100", "currency": "EUR"},
}  # fmt: skip


def one_after_the_other(pipeline, batches):
    """The anonymous values of each batch, in its order, all by one pipeline."""
    found = []
    for number, values in enumerate(batches):
        inbox = Inbox("traffic.cdr", 0, 100 * number, [raw(value) for value in values])
        prepared = pipeline.prepare(inbox, Suppressions(), Lists(), NOW_S)
        outputs = pipeline.complete(prepared, a_ring(prepared.needs), Entropy(SEED), 4, shuffle=False)
        found.append([one.value for output in outputs if output.stream == "cdr.anonymous" for one in output.messages])
    return found


def test_what_batches_have_in_common_is_rendered_once_and_nothing_else_is():
    # Given records that differ in one of the things that an anonymous record says: hour, account, a billed value
    differing = [
        sms_cdr(), sms_cdr(occurred_at="2026-11-21T10:59:59Z"), sms_cdr(occurred_at="2026-10-21T11:22:33Z"),
        sms_cdr(account_id="other"), *(sms_cdr(**{name: value}) for name, value in BILLED.items()), voice_cdr(),
    ]  # fmt: skip
    # When one pipeline has them in the second batch after it had the first of them, and again in the third
    pipeline = Pipeline(Planner(policy_of()), TOKENS)
    _, *later = one_after_the_other(pipeline, [differing[:1], differing, differing])
    # Then each reads as it does in a batch alone
    alone = [run([value]).of("cdr.anonymous")[0].value for value in differing]
    assert later == [alone, alone]
    assert len(set(alone)) == len(alone) == len(pipeline.rendered)


def test_only_so_many_anonymous_records_are_kept_for_the_next_ones(monkeypatch):
    monkeypatch.setattr("processors.pipeline.MAX_RENDERED", 3)
    pipeline = Pipeline(Planner(policy_of()), TOKENS)
    values = [sms_cdr(price={"amount": str(number), "currency": "EUR"}) for number in range(10)]
    (found,) = one_after_the_other(pipeline, [values])
    assert [orjson.loads(value)["price"]["amount"] for value in found] == [str(number) for number in range(10)]
    assert 0 < len(pipeline.rendered) <= 3


@pytest.mark.parametrize("value", [sms_cdr(), voice_cdr(), reply("hello"), sms_cdr(**BILLED), voice_cdr(sender=OTHER)])
def test_an_anonymous_record_has_exactly_its_fields_a_coarse_timestamp_and_no_key(value):
    (message,) = run([value]).of("cdr.anonymous")
    fields = orjson.loads(message.value)
    assert set(fields) == ANONYMOUS_FIELDS
    assert fields["occurred_at"] == HOUR
    assert message.timestamp_ms == instant(HOUR) * 1000
    assert message.key is None
    assert {name for name, _ in message.headers} == {"role", "class", "policy"}


def test_billing_can_charge_every_record_from_the_anonymous_one_alone():
    sms, voice = run([sms_cdr(**BILLED, segments=3), voice_cdr(**BILLED)], shuffle=False).values("cdr.anonymous")
    for fields in (sms, voice):
        assert {name: fields[name] for name in BILLED if name != "price"} == {
            name: value for name, value in BILLED.items() if name != "price"
        }
        assert fields["price"] == {"amount": "0.071", "currency": "EUR"}
        assert (fields["account_id"], fields["direction"]) == ("acme", "mt")
    assert (sms["channel"], sms["segments"], sms["billable_units"]) == ("sms", 3, None)
    assert (voice["channel"], voice["segments"], voice["billable_units"]) == ("voice", None, 2)


@pytest.mark.parametrize(
    ("fields", "increment", "units"),
    [
        ({"billable_s": 0}, 60, 0), ({"billable_s": 1}, 60, 1), ({"billable_s": 60}, 60, 1),
        ({"billable_s": 61}, 60, 2), ({"billable_s": 61}, 1, 61), ({"billable_s": 61}, 6, 11),
        ({"billable_s": 604_800}, 3600, 168), ({"duration_s": 90, "billable_s": 30}, 60, 1),
        ({"duration_s": 90, "billable_s": ...}, 60, 2),
        ({"duration_s": ..., "billable_s": ...}, 60, None),
    ],
)  # fmt: skip
def test_a_calls_length_is_told_in_started_increments_of_its_account(fields, increment, units):
    policy = policy_of(account("acme", f"voice_increment_s = {increment}"))
    (value,) = run([voice_cdr(**fields)], policy=policy).values("cdr.anonymous")
    assert value["billable_units"] == units


@pytest.mark.parametrize(
    "amount", ["0", "0.000000001", "123456789.123456789", "999999999.999999999", "0.1", "100", "3.30"]
)
@pytest.mark.parametrize("form", ["text", "number"])
def test_a_price_is_exact(amount, form):
    value = (
        orjson.dumps(sms_cdr())[:-1]
        + b',"price":{"amount":%s,"currency":"USD"}}' % (f'"{amount}"' if form == "text" else amount).encode()
    )
    done = run([value])
    told = done.values("cdr.anonymous")[0]["price"]["amount"]
    assert told == (amount.rstrip("0").rstrip(".") if "." in amount else amount)


def test_the_time_is_as_coarse_as_the_policy_says():
    policy = policy_of(default=DEFAULT_POLICY.replace('time = "hour"', 'time = "day"'))
    (message,) = run([sms_cdr()], policy=policy).of("cdr.anonymous")
    assert orjson.loads(message.value)["occurred_at"] == "2026-11-21T00:00:00Z"
    assert message.timestamp_ms == instant("2026-11-21T00:00:00Z") * 1000


@pytest.mark.parametrize("ending", ["end of year", "end of day"])
@pytest.mark.parametrize(("zone", "coarse"), [("Asia/Kolkata", "hour"), ("America/New_York", "day"), ("UTC", "hour")])
def test_a_deadline_is_that_of_the_record_even_where_a_month_ends_within_a_coarse_instant(zone, coarse, ending):
    # Given records every 20 minutes around the end of the year, in the policy's time zone
    text = DEFAULT_POLICY.replace('timezone = "UTC"', f'timezone = "{zone}"').replace(
        'time = "hour"', f'time = "{coarse}"'
    )
    text = text.replace('after = "end of year"', f'after = "{ending}"')
    instants = [shape(instant("2026-12-31T04:00:00Z") + n * 2000) for n in range(60)]
    settings = {"policy": policy_of(default=text), "now_s": instant("2027-01-03T00:00:00Z"), "shuffle": False}
    # When they are one batch
    together = run([sms_cdr(occurred_at=at) for at in instants], **settings)
    alone = [run([sms_cdr(occurred_at=at)], **settings) for at in instants]
    # Then each has the deadlines and the keys that it has alone
    for stream in ("cdr.anonymous", "cdr.pii", "content"):
        for one, value in zip(alone, together.values(stream), strict=True):
            (other,) = one.values(stream)
            assert value["privacy"] == other["privacy"]
            assert [part["key"] for part in value.get("sealed", ())] == [
                part["key"] for part in other.get("sealed", ())
            ]
    assert len({value["privacy"]["expires_at"] for value in together.values("cdr.anonymous")}) >= 2
    assert len({value["month"] for value in together.values("cdr.pii")}) == 2


def test_two_records_of_one_hour_that_billing_cannot_tell_apart_are_the_same_bytes():
    values = [
        sms_cdr(occurred_at=f"2026-11-21T11:{n:02}:{n:02}Z", recipient=f"+49151123456{n:02}", content=f"text {n}",
                record_id=f"r{n}", error_code=str(n), campaign_id=str(n), location=str(n), attributes={"n": str(n)})
        for n in range(60)
    ]  # fmt: skip
    done = run(values)
    assert len(set(done.of("cdr.anonymous"))) == 1
    assert len({message.value for message in done.of("cdr.pii")}) == 60


def test_the_personal_record_says_no_more_of_the_time_than_the_day_outside_its_box():
    for stream in ("cdr.pii", "content", "review"):
        (message,) = run([reply("please stop")]).of(stream)
        assert message.timestamp_ms == instant("2026-11-21T00:00:00Z") * 1000
        clear = orjson.loads(message.value)
        del clear["sealed"]
        del clear["privacy"]
        assert clear == {
            "v": 1,
            "account_id": "acme",
            **({"month": "2026-11"} if stream == "cdr.pii" else {"day": "2026-11-21"}),
        }


def test_all_instants_in_outputs_are_rfc_3339_utc_to_the_second():
    at, answered = "2026-11-21T13:22:33.987654+02:00", "2026-11-21T06:22:40.5-05:00"
    done = run(
        [voice_cdr(occurred_at=at, answered_at=answered), sms_request(occurred_at=at), reply("STOP", occurred_at=at)]
    )
    call = done.opened("cdr.pii")[0]["primary"]
    assert (call["occurred_at"], call["answered_at"]) == (AT, "2026-11-21T11:22:40Z")
    assert done.opened("cleared")[0]["primary"]["occurred_at"] == AT
    assert {value["event_at"] for value in done.values("suppressions")} == {AT}


# --- the same bytes, and never the same nonce ---------------------------------------------------------------


def test_the_same_batch_view_keys_time_and_entropy_give_the_same_bytes():
    assert run(EVERYTHING).outputs == run(EVERYTHING).outputs


def test_completing_twice_from_one_seed_gives_the_same_bytes():
    done = run(EVERYTHING)
    for _ in range(2):
        assert done.pipeline.complete(done.prepared, a_ring(done.prepared.needs), Entropy(SEED), 4) == done.outputs


def test_a_pipeline_keeps_nothing_of_a_batch_that_another_would_show():
    # Given a pipeline that has seen other batches
    pipeline = Pipeline(Planner(policy_of()), TOKENS)
    for values in ([sms_cdr(recipient=OTHER)], [reply("STOP")], [b"x"], [orjson.dumps(v) for v in EVERYTHING[:-1]]):
        inbox = Inbox("traffic", 0, 0, [v if isinstance(v, bytes) else orjson.dumps(v) for v in values])
        prepared = pipeline.prepare(inbox, Suppressions(), Lists(), NOW_S - 7 * DAY_S)
        pipeline.complete(prepared, a_ring(prepared.needs), Entropy(bytes(32)), 4)
    # When it sees this one
    fresh = run(EVERYTHING)
    prepared = pipeline.prepare(fresh.prepared.inbox, Suppressions(), Lists(), NOW_S)
    # Then it gives what a new pipeline gives
    assert pipeline.complete(prepared, a_ring(prepared.needs), Entropy(SEED), 4) == fresh.outputs


def test_the_order_within_a_stream_is_that_of_the_input_but_for_the_anonymous_one():
    values = [sms_cdr(record_id=f"r{n}", route=f"r{n}") for n in range(100)]
    done = run(values)
    ids = [opened["primary"]["record_id"] for opened in done.opened("cdr.pii")]
    assert ids == [f"r{n}" for n in range(100)]
    routes = [value["route"] for value in done.values("cdr.anonymous")]
    assert sorted(routes) == sorted(ids)
    assert routes != ids
    unmixed = run(values, shuffle=False)
    assert [value["route"] for value in unmixed.values("cdr.anonymous")] == ids
    assert unmixed.of("cdr.pii") == done.of("cdr.pii")


def test_entropy_takes_a_whole_seed_only():
    for size in (0, 31, 33):
        with pytest.raises(ValueError, match="32 bytes"):
            Entropy(bytes(size))


def test_the_draws_of_one_attempt_never_repeat_and_are_not_those_of_another_purpose():
    entropy = Entropy(SEED)
    seals, nonces = zip(*(next(entropy.draws) for _ in range(5000)), strict=True)
    assert len({*seals}) == len({*nonces}) == 5000
    assert {len(seal) for seal in seals} == {16}
    assert {len(nonce) for nonce in nonces} == {12}
    assert all(a != b for a, b in pairwise(nonces))
    assert entropy.salt not in seals
    assert next(Entropy(SEED).draws) == (seals[0], nonces[0])
    assert next(Entropy(bytes(32)).draws) != (seals[0], nonces[0])


def test_a_shuffle_gives_every_order_about_as_often():
    # Given 6,000 shuffles of three things: each of the 6 orders is expected 1,000 times, standard error 29
    entropy = Entropy(SEED)
    counts = {}
    for _ in range(6000):
        order = tuple(entropy.shuffled("abc"))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4 * 29 for count in counts.values())


# --- what is shown of a batch -------------------------------------------------------------------------------


def test_what_a_batch_shows_of_itself_holds_nothing_of_a_record():
    value = voice_cdr(sender="+14155550111", transcript="s3cret", display_name="s3cret", record_id="s3cret")
    done = run([value, sms_request(content="s3cret"), reply("please stop s3cret"), preference(), b"s3cret"])
    prepared = done.prepared
    shown = repr([
        prepared, prepared.inbox, prepared.outcomes, prepared.needs, prepared.overlay, prepared.overlay.changes,
        prepared.cdrs, prepared.requests, prepared.reviews, prepared.quarantined, done.outputs, done.ring,
        done.pipeline, TOKENS, prepared.overlay.changed,
    ])  # fmt: skip
    shown += repr([vars(item) if hasattr(item, "__dict__") else item for item in (*prepared.cdrs, *prepared.requests)])
    for secret in ("s3cret", PERSON[1:], "4155550111"):
        assert secret not in shown


def test_an_outcome_is_a_kind_an_end_and_a_code():
    for found in run(EVERYTHING).outcomes:
        assert found.kind in ("request", "cdr", "preference", "unreadable")
        assert found.reason is None or found.reason.replace("_", "").replace(":", "").isalpha()
    assert outcome(preference("opt_in")) == ("emit", "lifts_nothing")


def test_a_quarantined_record_names_its_own_offset_where_offsets_have_gaps():
    pipeline = Pipeline(Planner(policy_of()), TOKENS)
    for offsets, found in ((None, [10, 11]), ([10, 17], [10, 17])):
        prepared = pipeline.prepare(Inbox("traffic", 3, 10, [b"x", b"y"], offsets), Suppressions(), Lists(), NOW_S)
        outputs = pipeline.complete(prepared, a_ring(prepared.needs), Entropy(bytes(32)), 4)
        quarantined = [orjson.loads(one.value) for output in outputs for one in output.messages]
        assert [one["offset"] for one in quarantined] == found


class _Snapshot:
    """Entries that do not change, of one token."""

    bits, shift, offsets = b"\xff", 29, (0,)

    def __init__(self, token=None):
        self.token = token

    def find(self, token):
        return {Rule("platform", "all", "sms", "person"): State(out=True, event_s=1)} if token == self.token else None


def test_an_opt_out_counts_whatever_was_known_of_the_person_before():
    pipeline, view, token = Pipeline(Planner(policy_of()), TOKENS), Suppressions(), TOKENS.of(PERSON)

    def reasons(*values):
        inbox = Inbox("traffic", 0, 0, [orjson.dumps(value) for value in values])
        return [one.reason for one in pipeline.prepare(inbox, view, Lists(), NOW_S).outcomes]

    def nobody():
        view.adopt(_Snapshot())
        assert reasons(sms_request()) == [None]

    # Given somebody of whom it is known that they have opted out of nothing
    nobody()
    # Then it counts in the batch itself,
    assert reasons(sms_request(), reply("STOP"), sms_request()) == [None, None, "opted_out"]
    # from the stream,
    assert reasons(sms_request()) == [None]
    view.apply(token, Rule("platform", "all", "sms", "person"), out=True, event_s=1, place=(0, 5))
    assert reasons(sms_request()) == ["opted_out"]
    # from another snapshot,
    view = Suppressions()
    nobody()
    view.adopt(_Snapshot(token))
    assert reasons(sms_request()) == ["opted_out"]
    # and in another view
    nobody()
    view = Suppressions()
    view.apply(token, Rule("platform", "all", "sms", "person"), out=True, event_s=1)
    assert reasons(sms_request()) == ["opted_out"]
