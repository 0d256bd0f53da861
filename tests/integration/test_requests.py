"""Requests and their clocks, on real files: who must be told, what is overdue, and that no person stands in them."""

import json
import time
from datetime import datetime

import pytest

from processors.retention import instant
from streams.officer import requests
from streams.officer.office import office
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import OTHER, PERSON, sms_cdr

DAY_S = 86_400


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


@pytest.fixture
def known(place):
    """A deployment that two accounts have data of a person in."""
    place.publish(
        sms_cdr(record_id="c1", recipient=PERSON, occurred_at=ago()),
        sms_cdr(record_id="c2", recipient=PERSON, account_id="beta", occurred_at=ago()),
    )
    assert place.work() == 2
    return place


def listed(place, *more):
    done = place.call("subject", "requests", "--json", *more)
    assert done.status == 0, done.err
    return done.lines


def erase(place, *more):
    done = place.call("subject", "erase", PERSON, "--reason", "CASE-1", "--json", *more)
    assert done.status == 0, done.err
    return done.lines[0]


def noted(place, received_s, notify=(), outcome="refused:held", reason="CASE-9", kind="access", whom=PERSON):
    """Return a request that came at some time, and how many are overdue now."""

    async def inside(deployment):
        desk = office(deployment)
        found = requests.note(desk, kind, desk.person(whom), "platform", reason, received_s, notify, outcome)
        return found, requests.overdue(deployment.store.ledger, int(time.time()))

    return place.within(inside)


def test_the_clocks_run_from_when_it_was_received(known):
    received = ago(3 * 3600)
    request = erase(known, "--received", received)
    assert request["received_at"] == received
    received_s = int(datetime.fromisoformat(received).timestamp())
    assert request["notice_due_at"] == instant(received_s + DAY_S)
    assert request["due_at"] == instant(received_s + 15 * DAY_S)


def test_it_is_open_until_every_account_is_told(known):
    # Given an erasure that is done
    request = erase(known)["request"]
    (open_,) = listed(known)
    assert (open_["request"], open_["outcome"], open_["closed_at"]) == (request, "done", None)
    assert open_["notify"] == {"acme": None, "beta": None}
    # When one account is told, and then the rest
    (half,) = listed(known, "--told", request[:6], "--account", "acme")
    assert (half["closed_at"], half["notify"]["beta"]) == (None, None)
    assert half["notify"]["acme"] is not None
    (whole,) = listed(known, "--told", request)
    # Then it is closed, and shown only where closed ones are asked for
    assert whole["closed_at"] is not None
    assert listed(known) == []
    assert [one["request"] for one in listed(known, "--all")] == [request]


def test_one_with_nobody_to_tell_is_closed_once_it_is_done(place):
    place.publish(sms_cdr(recipient="+14155550100", occurred_at=ago()))
    place.work()
    assert erase(place)["closed_at"] is not None
    assert listed(place) == []


@pytest.mark.parametrize(
    ("age_s", "notify", "outcome", "is_overdue"),
    [
        (DAY_S - 60, ["acme"], "done", False),
        (DAY_S, ["acme"], "done", True),
        (DAY_S, [], "refused:held", False),
        (15 * DAY_S - 60, [], "refused:held", False),
        (15 * DAY_S, [], "refused:held", True),
        (99 * DAY_S, [], "done", False),
    ],
)
def test_it_is_overdue_from_the_instant_of_its_clock(known, age_s, notify, outcome, is_overdue):
    _, overdue = noted(known, int(time.time()) - age_s, notify, outcome)
    assert overdue == is_overdue
    assert [one["overdue"] for one in listed(known, "--all")] == [is_overdue]
    shown = known.call("subject", "requests").out
    assert ("OVERDUE" in shown) == is_overdue


def test_the_soonest_due_comes_first_and_closed_ones_last(known):
    now_s = int(time.time())
    late, _ = noted(known, now_s - 14 * DAY_S)
    soon, _ = noted(known, now_s - 60, ["acme"], "done", "CASE-10")
    far, _ = noted(known, now_s, reason="CASE-11")
    closed, _ = noted(known, now_s - 20 * DAY_S, outcome="done", reason="CASE-12")
    assert [one["request"] for one in listed(known, "--all")] == [soon.id, late.id, far.id, closed.id]


def test_one_that_was_refused_is_closed_by_hand(known):
    request, _ = noted(known, int(time.time()), ["acme"])
    (still,) = listed(known, "--close", request.id[:8], "--outcome", "refused")
    assert (still["outcome"], still["closed_at"]) == ("refused", None)  # an account is to be told
    (closed,) = listed(known, "--told", request.id[:8])
    assert closed["closed_at"] is not None


def test_what_an_officer_notes_is_in_the_audit(known):
    request, _ = noted(known, int(time.time()), ["acme"])
    listed(known, "--told", request.id, "--account", "acme")
    listed(known, "--close", request.id, "--outcome", "refused")
    told, close = known.values("audit")
    assert (told["action"], told["request"], told["accounts"], told["reason"]) == (
        "told", request.id, ["acme"], "CASE-9"
    )  # fmt: skip
    assert (close["action"], close["request"], close["outcome"]) == ("close", request.id, "refused")


def test_a_request_names_no_person(known):
    erase(known)
    shown = json.dumps(listed(known, "--all")) + known.call("subject", "requests", "--all").out
    assert PERSON.lstrip("+") not in shown
    sids = [part["sid"] for value in known.values("cdr.pii") for part in value["sealed"]]
    assert not [sid for sid in sids if sid in shown]


@pytest.mark.parametrize(
    "words",
    [
        ("--told", "zzzzzz"),
        ("--told", "abcde"),
        ("--told", "0" * 32),
        ("--close", "0" * 32, "--outcome", "done"),
        ("--close", "0" * 32),
        ("--outcome", "done"),
        ("--account", "acme"),
    ],
)
def test_what_names_no_open_request_is_one_line(known, words):
    one_line(known.call("subject", "requests", *words))


def test_an_account_that_is_not_to_be_told_is_refused(known):
    request, _ = noted(known, int(time.time()), ["acme"])
    assert "none of those to be told" in one_line(
        known.call("subject", "requests", "--told", request.id, "--account", "beta")
    )


def test_two_requests_that_begin_alike_are_not_mistaken_for_each_other(known):
    async def inside(deployment):
        desk = office(deployment)
        for end in "ab":
            person = desk.person(PERSON)
            made = requests.note(desk, "access", person, "platform", "CASE-9", int(time.time()), [], "refused:held")
            deployment.store.ledger.put_request(made._replace(id="0123456" + end * 25))

    known.within(inside)
    assert "more than one" in one_line(known.call("subject", "requests", "--told", "012345"))
    assert len(listed(known, "--close", "0123456a", "--outcome", "done")) == 1


def test_what_is_asked_again_goes_on_with_the_open_request_of_its_case(known):
    # Given a request that was refused, and of which one account was told
    now_s = int(time.time())
    first, _ = noted(known, now_s - 3600, ["acme"], kind="erase")
    listed(known, "--told", first.id)
    # When it is asked for again, now to the end and with one more account
    again, _ = noted(known, now_s, ["acme", "beta"], "done", kind="erase")
    # Then it is the same one, its clocks run on, and who was told stays told
    assert (again.id, again.received_s, again.due_s) == (first.id, first.received_s, first.due_s)
    assert (again.outcome, again.untold) == ("done", ["beta"])
    assert len(listed(known, "--all")) == 1
    # and one that came earlier has the clocks run from then
    assert noted(known, now_s - 7200, ["beta"], "done", kind="erase")[0].notice_due_s == now_s - 7200 + DAY_S


@pytest.mark.parametrize("other", [{"reason": "CASE-10"}, {"kind": "erase"}])
def test_another_case_and_another_kind_are_other_requests(known, other):
    first, _ = noted(known, int(time.time()))
    assert noted(known, int(time.time()), **other)[0].id != first.id


def test_another_persons_request_of_the_same_case_does_not_end_the_first_ones(known):
    now_s = int(time.time())
    first, _ = noted(known, now_s, outcome="refused:held", kind="erase")
    second, _ = noted(known, now_s, outcome="done", kind="erase", whom=OTHER)
    assert first.id != second.id
    assert [one["request"] for one in listed(known)] == [first.id]


def test_one_that_is_closed_does_not_go_on(known):
    first, _ = noted(known, int(time.time()), outcome="done")
    assert first.closed_s is not None
    assert noted(known, int(time.time()))[0].id != first.id


@pytest.mark.parametrize("kind", ["access", "export"])
def test_to_look_again_in_a_case_whose_accounts_were_asked_opens_no_clock(known, kind):
    now_s = int(time.time())
    noted(known, now_s, ["acme"], "done", kind="erase")
    looked, _ = noted(known, now_s, ["acme"], "done", kind=kind)
    assert (looked.notify, looked.closed_s is not None) == ({}, True)
    # but an account that nobody asked yet is to be told, and an erasure is told to all
    assert noted(known, now_s, ["acme", "beta"], "done", kind=kind)[0].untold == ["beta"]
    assert noted(known, now_s, ["acme"], "done", kind="object")[0].untold == ["acme"]


def test_one_letter_from_access_to_erasure_is_two_requests(known):
    for verb in ("access", "access", "export", "erase", "access"):
        assert known.call("subject", verb, PERSON, "--reason", "CASE-1", "--json").status == 0
    assert sorted(one["kind"] for one in listed(known)) == ["access", "erase"]


def test_a_request_of_more_than_a_year_ago_is_refused(known):
    words = ("subject", "erase", PERSON, "--reason", "CASE-1", "--received")
    assert "more than a year ago" in one_line(known.call(*words, ago(367 * DAY_S)))
    assert known.values("audit") == []
    assert known.call(*words, ago(364 * DAY_S)).status == 0


@pytest.mark.parametrize(
    "reason",
    [PERSON[1:], PERSON[2:], f"TEL{PERSON[2:]}", f"T-{PERSON[2:5]}-{PERSON[5:8]}_{PERSON[8:]}", "0015551234567"],
)
def test_a_reason_that_is_or_holds_a_number_is_refused(known, reason):
    line = one_line(known.call("subject", "erase", PERSON, "--reason", reason))
    assert "case reference" in line
    assert reason not in line
    assert known.values("audit") == []


@pytest.mark.parametrize("reason", ["CASE-2026-117", "INC0012345", "117"])
def test_a_case_number_is_a_reason(known, reason):
    assert known.call("subject", "erase", PERSON, "--reason", reason).status == 0


def test_a_request_from_the_future_is_refused(known):
    assert "ahead of the clock" in one_line(
        known.call("subject", "erase", PERSON, "--reason", "CASE-1", "--received", ago(-3600))
    )
    assert known.values("audit") == []
