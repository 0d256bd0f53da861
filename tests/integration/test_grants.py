"""Who may do what on the command line, where a roles file says so, and what the audit says of it."""

import getpass
import time

import pytest

from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import PERSON, sms_cdr

ME = getpass.getuser()
OTHER = "+14155550109"
NOT_THE_OFFICER = "only the privacy officer (role dpo for all accounts) may do this"


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    made.publish(sms_cdr(record_id="c-1", recipient=OTHER, content="x", occurred_at=ago()), b"no record", b"nor this")
    made.work()
    yield made
    made.close()


def grant(place, role, accounts='["*"]', user=ME):
    place.configure(roles="roles.toml", **SHORT_LEASE)
    (place.folder / "roles.toml").write_text(f'[[grant]]\nuser = "{user}"\nrole = "{role}"\naccounts = {accounts}\n')


def audited(place):
    return [(entry["action"], entry["role"], entry["reason"]) for entry in place.values("audit")]


def ahead(days=40):
    return time.strftime("%Y-%m-%d", time.gmtime(time.time() + days * 86_400))


def state(place):
    """Return what a refusal must leave as it is."""
    streams = ("suppressions", "quarantine", "audit")
    (*_, last) = place.call("keys", "status", "--json").lines
    return [place.ends(stream) for stream in streams], last["summary"]["sequence"], last["summary"]["token_key"]


# --- what cannot be undone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "rotate"),
        ("keys", "rotate", "token"),
        ("keys", "reconcile"),
        ("keys", "reconcile", "--yes"),
        ("keys", "destroy-due", "--now", ahead(), "--yes"),
        ("retention", "run", "--now", ahead(), "--yes"),
        ("optout", "add", PERSON, "--authority", "officer"),
        ("optout", "remove", PERSON, "--authority", "officer"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("role", "accounts"), [("worker", '["*"]'), ("dpo", '["acme"]'), ("operator", '["*"]')])
def test_only_the_privacy_officer_may_do_what_cannot_be_undone(place, words, role, accounts):
    before = state(place)
    grant(place, role, accounts)
    done = place.call(*words)
    assert (done.status, done.out) == (1, "")
    assert NOT_THE_OFFICER in one_line(done)
    assert state(place) == before


def test_whoever_has_the_role_for_all_accounts_does_all_of_it(place):
    grant(place, "dpo")
    for words in (
        ("optout", "add", PERSON, "--authority", "officer"),
        ("optout", "remove", PERSON, "--authority", "officer"),
        ("keys", "rotate"),
        ("keys", "destroy-due", "--now", ahead(), "--yes"),
        ("retention", "run", "--now", ahead(), "--yes"),
    ):
        done = place.call(*words)
        assert done.status == 0, (words, done.err)


def test_what_is_due_by_the_clock_anybody_may_destroy_and_anybody_may_ask_what_would_go(place):
    grant(place, "worker")
    for words in (
        ("retention", "run"),
        ("keys", "destroy-due"),
        ("retention", "run", "--now", ahead()),
        ("keys", "destroy-due", "--now", ahead()),
    ):
        done = place.call(*words, "--json")
        assert done.status == 0, (words, done.err)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_each_block_and_its_lift_stand_in_the_audit_without_the_person(place):
    block = ("--account", "acme", "--class", "marketing", "--authority", "officer")
    place.call("optout", "add", PERSON, *block, "--reason", "CASE-1")
    place.call("optout", "remove", PERSON, *block, "--channel", "sms", "--reason", "CASE-2")
    place.call("optout", "remove", PERSON, *block, "--channel", "sms", "--reason", "CASE-2")
    assert audited(place) == [("block", "dpo", "CASE-1"), ("unblock", "dpo", "CASE-2")]
    made, lifted = place.values("audit")
    assert (made["stream"], made["count"], lifted["count"]) == ("suppressions", 2, 1)
    one = {"scope": "account", "class": "marketing", "count": 1}
    assert made["entries"] == [{**one, "channel": "sms"}, {**one, "channel": "voice"}]
    assert lifted["entries"] == [{**one, "channel": "sms"}]
    assert "acme" not in str(made["entries"])


def test_what_a_person_asked_for_takes_no_grant_and_no_audit_entry(place):
    grant(place, "worker")
    assert place.call("optout", "add", PERSON).status == 0
    assert place.call("optout", "remove", PERSON).status == 0
    assert audited(place) == []


def test_a_file_with_blocks_is_for_the_privacy_officer(place):
    file = place.folder / "in.csv"
    file.write_text(f"number,authority,reason\n{PERSON},person,C-1\n{OTHER},officer,C-2\n")
    grant(place, "worker")
    assert NOT_THE_OFFICER in one_line(place.call("optout", "import", file))
    assert place.ends("suppressions") == 0
    grant(place, "dpo")
    assert place.call("optout", "import", file, "--json").lines == [{"lines": 2, "written": 4, "bad": 0}]
    (entry,) = place.values("audit")
    assert (entry["action"], entry["reason"], entry["count"]) == ("block", "C-2", 2)


# --- quarantine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["discard", "replay"])
def test_quarantine_is_resolved_by_who_may_open_it_and_stands_in_the_audit(place, verb):
    before = state(place)
    for role in ("worker", "support"):
        grant(place, role)
        assert "only an operator or the privacy officer" in one_line(
            place.call("quarantine", verb, "--all", "--reason", "FIX-2")
        )
        assert state(place) == before
    first = place.call("quarantine", "list", "--json").lines[0]
    one = ("--partition", first["partition"], "--offset", first["offset"])
    for role, choice in (("operator", one), ("dpo", ("--all",))):
        grant(place, role)
        assert place.call("quarantine", verb, *choice, "--reason", "FIX-2").status == 0
        entry = next(one for one in place.values("audit") if (one["action"], one["role"]) == (verb, role))
        assert (entry["reason"], entry["stream"], entry["count"]) == ("FIX-2", "quarantine", len(entry["records"]))
        if role == "operator":
            assert entry["records"] == [[first["partition"], first["offset"]]]


# --- opening ---------------------------------------------------------------------------------------------------------


def test_who_may_not_open_a_stream_is_told_so_even_if_it_is_empty(place):
    grant(place, "support")
    assert place.ends("held") == 0
    done = place.call("tail", "held", "--reveal", "--reason", "R")
    assert "may not open this stream" in one_line(done)
    grant(place, "dpo")
    assert place.call("tail", "held", "--reveal", "--reason", "R").status == 0


@pytest.mark.parametrize("reason", ["14155550101", "0044-7700-900123", "2026/117", "_1415_5550101"])
def test_a_number_is_no_reason_anywhere(place, reason):
    for words in (
        ("tail", "cdr.pii", "--reveal"),
        ("quarantine", "discard", "--all"),
        ("quarantine", "replay", "--all"),
        ("optout", "add", OTHER),
        ("optout", "export", "-"),
    ):
        done = place.call(*words, "--reason", reason)
        assert "no number alone" in one_line(done)
        assert reason not in done.out + done.err
    assert audited(place) == []
    for good in ("CASE-2026-117", "INC0012345", "TICKET-1234567", "12-34"):
        assert place.call("tail", "cdr.pii", "--reveal", "--reason", good).status == 0
