"""Requests and their clocks, on real files: who must be told, what is overdue, and that no person stands in them."""

import json
import time

import pytest

from streams.officer import requests
from streams.officer.office import office
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import PERSON, sms_cdr

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


def noted(place, received_s, notify=(), outcome="refused:held"):
    """Return a request that came at some time, and how many are overdue now."""

    async def inside(deployment):
        found = requests.note(office(deployment), "access", "platform", "CASE-9", received_s, notify, outcome)
        return found, requests.overdue(deployment.store.ledger, int(time.time()))

    return place.within(inside)


def test_the_clocks_run_from_when_it_was_received(known):
    received = ago(3 * 3600)
    request = erase(known, "--received", received)
    assert request["received_at"] == received
    assert request["notice_due_at"] == ago(3 * 3600 - DAY_S)
    assert request["due_at"] == ago(3 * 3600 - 15 * DAY_S)


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
    soon, _ = noted(known, now_s - 60, ["acme"], "done")
    far, _ = noted(known, now_s)
    closed, _ = noted(known, now_s - 20 * DAY_S, outcome="done")
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
            made = requests.note(desk, "access", "platform", "CASE-9", int(time.time()), [], "refused:held")
            deployment.store.ledger.put_request(made._replace(id="0123456" + end * 25))

    known.within(inside)
    assert "more than one" in one_line(known.call("subject", "requests", "--told", "012345"))
    assert len(listed(known, "--close", "0123456a", "--outcome", "done")) == 1


def test_a_request_from_the_future_is_refused(known):
    assert "ahead of the clock" in one_line(
        known.call("subject", "erase", PERSON, "--reason", "CASE-1", "--received", ago(-3600))
    )
    assert known.values("audit") == []
