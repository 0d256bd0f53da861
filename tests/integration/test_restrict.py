"""Objection and restriction, on real files: to whom records open, what refuses marketing, and what ends it."""

import os
import pwd

import pytest

from streams.keys.reveal import Revealer
from streams.keys.roles import Grant, Principal
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import OTHER, PERSON, found_in, haystack, preference, reply, sms_cdr, voice_cdr

SUPPORT = Principal("agent", (Grant("agent", "support", ("*",)),))
ME = pwd.getpwuid(os.getuid()).pw_name
THIRD = "+14155550177"


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


@pytest.fixture
def known(place):
    """A deployment with a CDR to a person from a person, one to that other person, and one of another account."""
    place.publish(
        voice_cdr(record_id="c1", recipient=PERSON, sender=OTHER, occurred_at=ago()),
        sms_cdr(record_id="c2", recipient=THIRD, occurred_at=ago()),
        sms_cdr(record_id="c3", recipient=PERSON, account_id="beta", occurred_at=ago()),
    )
    assert place.work() == 3
    return place


def subject(place, verb, *more, whom=PERSON, reason="CASE-1"):
    done = place.call("subject", verb, whom, "--reason", reason, "--json", *more)
    assert done.status == 0, done.err
    return done.lines[0]


def seen_by(place, who, stream="cdr.pii"):
    """Return (state, reason) of the records of a stream to a principal."""

    async def inside(deployment):
        log = deployment.log
        ends = await log.end_offsets(stream)
        messages = [one for p, end in enumerate(ends) for one in await log.read(stream, p, 0, end)]
        revealer = Revealer(log, deployment.store, deployment.planner, who, deployment.auditor())
        return [(str(one.state), one.reason) for one in await revealer.reveal(messages, "X")]

    return sorted(place.within(inside), key=str)


def screened(place, purpose="marketing", account="acme", whom=PERSON):
    done = place.call("screen", whom, "--account", account, "--channel", "sms", "--purpose", purpose, "--json")
    assert done.status == 0, done.err
    return done.lines[0]["verdict"], done.lines[0]["reason"]


REFUSED = ("refused", "blocked_by_officer")
CLEARED = ("cleared", None)
DENIED, OPEN = ("denied", "restricted"), ("revealed", None)


# --- objection ---------------------------------------------------------------------------------------------------


def test_who_objects_is_never_marketed_to_by_any_account(known):
    assert subject(known, "object")["opt_outs"] == 2
    assert screened(known) == screened(known, account="beta") == REFUSED
    assert screened(known, "transactional") == CLEARED
    assert screened(known, whom=OTHER) == CLEARED


def test_who_objects_to_one_account_is_marketed_to_by_others(known):
    subject(known, "object", "--account", "acme")
    assert (screened(known), screened(known, account="beta")) == (REFUSED, CLEARED)


def test_no_keyword_and_no_form_lifts_an_objection(known):
    subject(known, "object")
    known.publish(
        reply("START", occurred_at=ago(-1)),
        *(preference("opt_in", occurred_at=ago(-1), scope=scope, **{"class": "marketing"})
          for scope in ("platform", "account")),
    )  # fmt: skip
    assert known.work() == 3
    assert screened(known) == REFUSED


def test_objecting_twice_writes_once(known):
    assert [subject(known, "object")["opt_outs"] for _ in range(2)] == [2, 0]


def test_somebody_unknown_may_object_too(known):
    assert subject(known, "object", whom="+14155550166")["opt_outs"] == 2
    assert screened(known, whom="+14155550166") == REFUSED


# --- restriction -------------------------------------------------------------------------------------------------


def test_a_restricted_record_opens_for_the_dpo_only(known):
    assert seen_by(known, SUPPORT) == [OPEN] * 3
    subject(known, "restrict")
    assert seen_by(known, SUPPORT) == [DENIED, DENIED, OPEN]
    assert len(known.opened("cdr.pii")) == 3


def test_a_record_in_which_a_restricted_person_is_the_other_party_is_restricted(known):
    subject(known, "restrict", whom=OTHER)
    assert seen_by(known, SUPPORT) == [DENIED, OPEN, OPEN]


def test_marketing_to_a_restricted_person_is_refused_and_nothing_else(known):
    subject(known, "restrict")
    assert screened(known) == screened(known, account="beta") == REFUSED
    assert screened(known, "otp") == CLEARED


def test_what_is_sealed_later_is_restricted_too_in_another_month_as_well(known):
    subject(known, "restrict")
    known.publish(
        sms_cdr(record_id="c4", recipient=PERSON, occurred_at=ago()),
        sms_cdr(record_id="c5", recipient=PERSON, occurred_at=ago(40 * 86_400)),
    )
    assert known.work() == 2
    assert seen_by(known, SUPPORT) == [DENIED] * 4 + [OPEN]


def test_a_restriction_in_an_accounts_data_leaves_the_platforms_and_other_accounts(known):
    before = seen_by(known, Principal("acme", (Grant("acme", "account", ("acme", "beta")),)), "content")
    assert before == [OPEN] * 2
    subject(known, "restrict", "--account", "beta")
    assert seen_by(known, SUPPORT) == [OPEN] * 3
    after = seen_by(known, Principal("acme", (Grant("acme", "account", ("acme", "beta")),)), "content")
    assert after == [DENIED, OPEN]
    assert (screened(known), screened(known, account="beta")) == (CLEARED, REFUSED)


def test_restricting_twice_is_one_restriction(known):
    first, second = subject(known, "restrict"), subject(known, "restrict", reason="CASE-2")
    assert (first["marks"], first["opt_outs"], second["marks"], second["opt_outs"]) == (1, 2, 0, 0)
    assert subject(known, "unrestrict")["marks"] == 1
    assert seen_by(known, SUPPORT) == [OPEN] * 3


def test_one_that_was_killed_is_finished_by_running_it_again(known):
    code = "import os\nfrom streams.officer import restrict\nrestrict._refuse_marketing = lambda *a, **k: os._exit(9)"
    assert known.run("subject", "restrict", PERSON, "--reason", "CASE-1", sabotage=code).status == 9
    assert (seen_by(known, SUPPORT), screened(known)) == ([DENIED, DENIED, OPEN], CLEARED)
    assert subject(known, "restrict")["opt_outs"] == 2
    assert screened(known) == REFUSED
    code = code.replace("_refuse_marketing", "_note")
    assert known.run("subject", "unrestrict", PERSON, "--reason", "CASE-1", sabotage=code).status == 9
    assert (seen_by(known, SUPPORT), screened(known)) == ([OPEN] * 3, CLEARED)


# --- the end of it -----------------------------------------------------------------------------------------------


def test_its_end_ends_both(known):
    subject(known, "restrict")
    ended = subject(known, "unrestrict")
    assert (ended["marks"], ended["opt_outs"]) == (1, 2)
    assert seen_by(known, SUPPORT) == [OPEN] * 3
    assert screened(known) == CLEARED
    assert subject(known, "unrestrict")["marks"] == 0


@pytest.mark.parametrize("order", [("object", "restrict"), ("restrict", "object")])
def test_an_objection_outlives_a_restriction_whichever_came_first(known, order):
    for verb in order:  # in one case, so that the reason does not tell them apart
        subject(known, verb)
    assert subject(known, "unrestrict")["opt_outs"] == 0
    assert seen_by(known, SUPPORT) == [OPEN] * 3
    assert screened(known) == REFUSED


@pytest.mark.parametrize("before", [True, False])
def test_an_officers_opt_out_given_by_hand_outlives_it_too(known, before):
    by_hand = ("optout", "add", PERSON, "--class", "marketing", "--channel", "sms", "--authority", "officer")
    if before:
        assert known.call(*by_hand).status == 0
    subject(known, "restrict")
    if not before:
        assert known.call(*by_hand).status == 0
    assert subject(known, "unrestrict")["opt_outs"] == 1
    assert screened(known) == REFUSED


def test_the_end_of_one_restriction_leaves_the_other(known):
    subject(known, "restrict")
    subject(known, "restrict", "--account", "acme")
    subject(known, "unrestrict")
    assert (screened(known), screened(known, account="beta")) == (REFUSED, CLEARED)
    subject(known, "unrestrict", "--account", "acme")
    assert screened(known) == CLEARED


def test_an_opt_out_of_the_person_stands_after_it(known):
    known.publish(reply("STOP", occurred_at=ago(60)))
    known.work()
    subject(known, "restrict")
    subject(known, "unrestrict")
    assert screened(known) == ("refused", "opted_out")


# --- who, and what is noted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["object", "restrict", "unrestrict"])
def test_only_the_privacy_officer_may(known, verb):
    (known.folder / "roles.toml").write_text(f'[[grant]]\nuser = "{ME}"\nrole = "support"\naccounts = ["*"]\n')
    known.configure(**SHORT_LEASE, roles="roles.toml")
    assert "privacy officer" in one_line(known.call("subject", verb, PERSON, "--reason", "CASE-1"))
    assert known.ends("audit") == 0


@pytest.mark.parametrize("verb", ["object", "restrict", "unrestrict"])
def test_the_audit_names_the_person_by_sid_and_before_anything_is_done(known, verb):
    if verb == "unrestrict":
        subject(known, "restrict")
    code = "import os\nfrom streams.officer import restrict\nfrom streams.keys.sqlite import SqliteKeyStore\n"
    code += "restrict._refuse_marketing = restrict._lift = lambda *a, **k: os._exit(9)"
    assert known.run("subject", verb, PERSON, "--reason", "CASE-7", sabotage=code).status == 9
    entry = known.values("audit")[-1]
    assert (entry["action"], entry["reason"], entry["role"], entry["owner"]) == (verb, "CASE-7", "dpo", "platform")
    assert len(entry["sids"]) == 1


def test_no_number_stands_anywhere_it_was_not_before(known):
    subject(known, "restrict")
    subject(known, "object", whom=THIRD)
    files = [path.read_bytes() for path in known.files() if not path.name.startswith("log-traffic")]
    assert found_in(haystack(*files), [PERSON, THIRD]) == []


@pytest.mark.parametrize("verb", ["object", "restrict", "unrestrict", "erase", "hold", "release"])
def test_a_malformed_number_is_one_line_that_does_not_repeat_it(known, verb):
    for wrong in ("12", "5551234a", "ACME"):
        line = one_line(known.call("subject", verb, wrong, "--reason", "CASE-1"))
        assert "nobody's" in line
        assert wrong not in line
    assert known.ends("audit") == 0


@pytest.mark.parametrize("verb", ["object", "restrict", "unrestrict", "erase", "hold", "release"])
def test_a_reason_is_no_free_text_and_no_number(known, verb):
    for wrong in ("he called us", "x" * 41, PERSON.lstrip("+")):
        line = one_line(known.call("subject", verb, PERSON, "--reason", wrong))
        assert "case reference" in line
        assert wrong not in line
    assert known.ends("audit") == 0


@pytest.mark.parametrize("verb", ["object", "restrict", "unrestrict", "erase", "hold", "release"])
def test_the_number_may_come_from_standard_input(known, verb):
    done = known.call("subject", verb, "-", "--reason", "CASE-1", data=PERSON.encode() + b"\n")
    assert done.status == 0, done.err
