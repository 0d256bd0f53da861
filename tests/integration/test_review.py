"""Near-miss opt-outs on the command line: what waits, what a decision does, and who may take it."""

import getpass
import time
from datetime import UTC, datetime, timedelta

import pytest

from schemas.outbound import Message, Output
from streams.state.reviews import OpenReviews
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import DEFAULT_POLICY, OTHER, PERSON, reply, sms_cdr, sms_request

ME = getpass.getuser()
NEAR = "pls stop this"
DAY_S = 86_400


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def near(place, text=NEAR, **fields):
    """Have one more near miss, and return its place as the list shows it."""
    before = {one["place"] for one in listed(place)} if place.log_path.exists() else set()
    place.publish(reply(text, **{"occurred_at": ago(), **fields}))
    place.work()
    (new,) = {one["place"] for one in listed(place)} - before
    return new


def listed(place, *words):
    done = place.call("review", "list", "--json", *words)
    assert done.status == 0, done.err
    return done.lines


def decide(place, spot, choice, reason="CASE-1", **more):
    return place.call("review", "decide", spot, choice, "--reason", reason, **more)


def screen(place, number=PERSON, purpose="transactional", channel="sms", account="acme"):
    words = ("--account", account, "--channel", channel, "--purpose", purpose)
    (answer,) = place.call("screen", number, *words).lines
    return answer["reason"]


def grant(place, role, accounts='["*"]'):
    place.configure(roles="roles.toml", **SHORT_LEASE)
    (place.folder / "roles.toml").write_text(f'[[grant]]\nuser = "{ME}"\nrole = "{role}"\naccounts = {accounts}\n')


# --- what waits -----------------------------------------------------------------------------------------------------


def test_what_is_undecided_is_listed_with_its_clock_and_without_anything_of_the_person(place):
    spot = near(place)
    (one,) = listed(place)
    today = datetime.now(UTC).date()
    assert (one["place"], one["account"], one["day"], one["state"]) == (spot, "acme", str(today), "undecided")
    assert (one["overdue"], "text" in one) == (False, False)
    due = datetime.fromisoformat(one["due_at"])
    assert due > datetime.now(UTC) + timedelta(days=11)
    assert 11 <= one["days_left"] <= 14
    table = place.call("review", "list")
    for shown in (table.out, str(listed(place))):
        assert PERSON[-6:] not in shown
        assert "stop" not in shown
    assert spot in table.out
    assert place.values("audit") == []


def test_the_oldest_is_listed_first(place):
    days = {near(place, occurred_at=ago(days * DAY_S)): days for days in (2, 5, 0)}
    assert [days[one["place"]] for one in listed(place)] == [5, 2, 0]


def test_the_text_is_shown_to_whoever_may_open_it_for_a_reason_and_that_is_logged(place):
    near(place, "stop \x1b[2J it")
    assert "needs --reason" in one_line(place.call("review", "list", "--reveal"))
    (one,) = listed(place, "--reveal", "--reason", "CASE-7")
    assert (one["text"], one["reveal"]) == ("stop \x1b[2J it", "revealed")
    assert PERSON[-6:] not in str(one)
    (entry,) = place.values("audit")
    assert (entry["action"], entry["stream"], entry["reason"], len(entry["sids"])) == ("reveal", "review", "CASE-7", 1)
    # and what would move the terminal's cursor does not reach it
    table = place.call("review", "list", "--reveal", "--reason", "CASE-7").out
    assert "stop ·[2J it" in table
    assert "\x1b" not in table
    grant(place, "support")
    assert "may open and decide" in one_line(place.call("review", "list", "--reveal", "--reason", "CASE-7"))


def test_a_text_that_is_never_stored_is_not_shown_and_can_be_decided_all_the_same(place):
    place.policy(f'{DEFAULT_POLICY}\n[[account]]\nid = "acme"\ncontent = "never"\nclause = "INF-2"\n')
    spot = near(place)
    assert listed(place, "--reveal", "--reason", "C-1")[0]["text"] is None
    assert decide(place, spot, "opt-out").status == 0
    assert screen(place) == "opted_out"


# --- opt-out and dismiss --------------------------------------------------------------------------------------------


def test_an_opt_out_does_what_the_keyword_would_have_done(place):
    # Given a near miss, and the same person's STOP to another account, a little later
    at = ago(600)
    spot = near(place, occurred_at=at)
    place.publish(reply("STOP", account_id="other", record_id="r-2", occurred_at=at))
    place.work()
    assert screen(place) is None
    # When it is decided
    done = decide(place, spot, "opt-out")
    assert (done.status, done.out) == (0, "opted out: 1\n")
    # Then both are the same but for the account
    entries = [(one["entry"], one["event_at"], one["reason"], one["action"]) for one in place.values("suppressions")]
    theirs = sorted(one for one in entries if "other" in one[0])
    assert len(theirs) == 2
    assert sorted(one for one in entries if "acme" in one[0]) == sorted(
        (entry.replace("other", "acme"), *rest) for entry, *rest in theirs
    )
    assert [screen(place, channel=channel) for channel in ("sms", "voice")] == ["opted_out"] * 2
    # And it is off the list
    assert listed(place) == []
    (whole,) = listed(place, "--all")
    assert (whole["place"], whole["state"], whole["days_left"]) == (spot, "opted_out", None)


def test_an_opt_out_beats_what_the_person_asked_for_meanwhile(place):
    spot = near(place, occurred_at=ago(600))
    place.publish(reply("STOP", occurred_at=ago(500), record_id="r-2"))
    place.publish(reply("START", occurred_at=ago(400), record_id="r-3"))
    place.work()
    assert screen(place) is None
    decide(place, spot, "opt-out")
    assert screen(place) == "opted_out"


def test_a_number_in_national_form_is_opted_out_as_the_same_person(place):
    spot = near(place, sender="0151 12345678", country="DE")
    assert decide(place, spot, "opt-out").status == 0
    assert screen(place) == "opted_out"


def test_an_opt_out_is_that_of_the_policy_of_its_day(place):
    # Given a policy whose keyword stops marketing by one sender, and that revokes all from a past day on in one country
    keyword = DEFAULT_POLICY.replace('scope = "account"\nclass = "all"', 'scope = "sender"\nclass = "marketing"')
    assert keyword != DEFAULT_POLICY
    place.policy(keyword.replace("from = 2027-01-31", "from = 2020-01-31"))
    german, american = near(place), near(place, sender=OTHER, record_id="us")
    # When both are opted out
    for spot in (german, american):
        assert decide(place, spot, "opt-out").status == 0
    # Then the one revoked what the keyword says, the other everything
    scopes = {
        one["entry"].split("|")[1].split(":")[0] + one["entry"].split("|")[2] for one in place.values("suppressions")
    }
    assert scopes == {"sendermarketing", "accountall"}
    assert (screen(place), screen(place, OTHER)) == (None, "opted_out")


def test_a_dismissal_changes_nothing_for_the_person(place):
    spot = near(place)
    done = decide(place, spot, "dismiss")
    assert (done.status, done.out) == (0, "dismissed: 1\n")
    assert (listed(place), place.ends("suppressions"), screen(place)) == ([], 0, None)
    assert listed(place, "--all")[0]["state"] == "dismissed"


def test_a_decision_stands_in_the_audit_without_the_person_and_in_review_without_content(place):
    spots = [near(place), near(place, sender=OTHER, record_id="r-2")]
    decide(place, spots[0], "opt-out", "CASE-1")
    decide(place, spots[1], "dismiss", "CASE-2")
    opened, *entries = place.values("audit")
    assert (opened["action"], len(opened["sids"])) == ("reveal", 1)
    for entry, decision, spot, reason in zip(
        entries, ("opted_out", "dismissed"), spots, ("CASE-1", "CASE-2"), strict=True
    ):
        where = [int(part) for part in spot.split("/")]
        assert (entry["action"], entry["role"], entry["reason"]) == ("review_decide", "dpo", reason)
        assert (entry["decision"], entry["stream"], entry["records"], entry["count"]) == (
            decision,
            "review",
            [where],
            1,
        )
        assert "sids" not in entry
    resolutions = [one for one in place.values("review") if "resolves" in one]
    assert [(one["action"], one["reason"], one["sealed"]) for one in resolutions] in (
        [("opted_out", "CASE-1", []), ("dismissed", "CASE-2", [])],
        [("dismissed", "CASE-2", []), ("opted_out", "CASE-1", [])],
    )
    assert all(set(one) == {"action", "reason", "resolves", "sealed", "v", "privacy"} for one in resolutions)


def test_many_are_decided_from_standard_input(place):
    spots = [near(place, sender=f"+4915112345{number}", record_id=f"r-{number}") for number in range(100, 104)]
    done = decide(place, "-", "opt-out", data="\n".join([*spots[:3], "", spots[0]]).encode())
    assert (done.status, done.out, done.err) == (0, "opted out: 3\n", "")
    assert [one["place"] for one in listed(place)] == spots[3:]
    assert [screen(place, f"+4915112345{number}") for number in range(100, 104)] == ["opted_out"] * 3 + [None]
    assert len(place.values("suppressions")) == 6


def test_of_two_of_one_person_the_later_time_stands_in_whatever_order_they_are_decided(place):
    at = {name: ago(seconds) for name, seconds in (("later", 100), ("earlier", 900))}
    spots = [near(place, record_id=name, occurred_at=when) for name, when in at.items()]
    assert decide(place, "-", "opt-out", data="\n".join(spots).encode()).status == 0
    found = [one["event_at"] for one in place.values("suppressions")]
    assert found == [at["later"]] * 4


@pytest.mark.parametrize("spot", ["0", "0/x", "4/0/1", "١/٢", "-1/0", "9/0", "0/77", PERSON])
def test_a_place_where_nothing_waits_is_an_error_and_nothing_is_done(place, spot):
    near(place)
    done = decide(place, "-", "opt-out", data=spot.encode())
    assert PERSON[-6:] not in one_line(done)
    assert len(listed(place)) == 1
    assert [place.ends(stream) for stream in ("suppressions", "audit")] == [0, 0]


def test_what_was_decided_is_not_decided_again(place):
    spot = near(place)
    decide(place, spot, "dismiss")
    assert "nothing undecided lies there" in one_line(decide(place, spot, "opt-out"))
    assert screen(place) is None


@pytest.mark.parametrize(
    "where", ["streams.optout.KeyCache.guard", "streams.review.Review._resolve"], ids=["before", "between"]
)
def test_a_run_that_was_killed_leaves_it_on_the_list_and_deciding_again_does_no_harm(place, where):
    spot = near(place)
    module, _, name = where.rpartition(".")
    holder, _, cls = module.rpartition(".")
    code = f"import os, {holder}\n{module}.{name} = lambda *a, **k: os._exit(9)" if cls else ""
    assert place.run("review", "decide", spot, "opt-out", "--reason", "C-1", sabotage=code).status == 9
    assert [one["place"] for one in listed(place)] == [spot]
    once = {one["entry"]: one["event_at"] for one in place.values("suppressions")}
    assert len(once) == (2 if "_resolve" in where else 0)
    assert decide(place, spot, "opt-out").status == 0
    again = {one["entry"]: one["event_at"] for one in place.values("suppressions")}
    assert len(again) == 2
    assert once in ({}, again)
    assert (listed(place), screen(place)) == ([], "opted_out")


# --- who ------------------------------------------------------------------------------------------------------------


def test_only_an_operator_or_the_privacy_officer_decides_and_for_the_accounts_that_are_theirs(place):
    spot = near(place)
    for role, accounts in (("support", '["*"]'), ("worker", '["*"]'), ("operator", '["bank"]')):
        grant(place, role, accounts)
        for choice in ("opt-out", "dismiss"):
            assert "only an operator or the privacy officer" in one_line(decide(place, spot, choice))
    assert [place.ends(stream) for stream in ("suppressions", "audit")] == [0, 0]
    for role in ("operator", "dpo"):
        grant(place, role, '["acme"]')
        assert decide(place, spot, "opt-out").status == 0
        assert place.values("audit")[-1]["role"] == role
        spot = near(place, record_id=f"r-{role}") if role == "operator" else None


def test_a_near_miss_of_an_erased_person_can_only_be_dismissed(place):
    spot = near(place)
    assert place.call("subject", "erase", PERSON, "--account", "acme", "--reason", "C-1").status == 0
    assert "destroyed" in one_line(decide(place, spot, "opt-out"))
    assert len(listed(place)) == 1
    assert decide(place, spot, "dismiss").status == 0
    assert listed(place) == []


def test_of_many_those_that_cannot_be_opt_outs_are_left_and_named(place):
    spots = [near(place), near(place, sender=OTHER, record_id="r-2")]
    assert place.call("subject", "erase", PERSON, "--account", "acme", "--reason", "C-1").status == 0
    done = decide(place, "-", "opt-out", data="\n".join(spots).encode())
    assert (done.status, done.out) == (0, "opted out: 1\n")
    assert done.err == f"{spots[0]} cannot be an opt-out (destroyed); dismiss it\n"
    assert [one["place"] for one in listed(place)] == spots[:1]


def test_a_sender_who_is_no_person_any_more_is_left(place):
    spot = near(place)
    place.policy(f'{DEFAULT_POLICY}\n[[account]]\nid = "acme"\nown_numbers = ["{PERSON}"]\nclause = "INF-2"\n')
    assert "by the policy of now" in one_line(decide(place, spot, "opt-out"))
    assert len(listed(place)) == 1


# --- beside everything else -----------------------------------------------------------------------------------------


def test_a_decision_is_in_nobodys_way(place):
    # Given near misses of two people, one decided
    spots = [near(place), near(place, sender=OTHER, record_id="r-2")]
    decide(place, spots[0], "opt-out")
    # Then who looks into the stream, holds, answers, erases and destroys goes on
    for words in (
        ("tail", "review", "--from-beginning", "--reveal", "--reason", "C-1", "--json"),
        ("account", "hold", "acme", "--reason", "C-2"),
        ("account", "release", "acme", "--reason", "C-2"),
        ("subject", "access", PERSON, "--account", "acme", "--reason", "C-3", "--json"),
        ("subject", "hold", OTHER, "--account", "acme", "--reason", "C-4"),
        ("subject", "erase", PERSON, "--account", "acme", "--reason", "C-5"),
        ("retention", "run", "--json"),
        ("evidence", "report", "--from", ago(DAY_S), "--to", ago(0), "--out", place.folder / "report"),
        ("evidence", "verify", place.folder / "report"),
        ("keys", "rotate", "token"),
    ):
        done = place.call(*words)
        assert done.status == 0, (words, done.err)
    assert [one["place"] for one in listed(place)] == spots[1:]
    assert screen(place) == "opted_out"


def test_what_was_never_decided_is_cut_off_when_it_dies(place):
    near(place, occurred_at=ago(29 * DAY_S))
    spot = near(place, record_id="r-2")
    decide(place, spot, "dismiss")
    done = place.call(
        "retention", "run", "--now", f"{datetime.now(UTC).date() + timedelta(days=40)}", "--yes", "--json"
    )
    assert done.status == 0, done.err
    assert listed(place, "--all") == []


def test_a_record_that_cannot_be_read_is_said_and_counts_as_overdue(place):
    near(place)

    async def spoil(deployment):
        await deployment.log.append([Output("review", 1, [Message(0, None, (), b'{"day":"x"}')])])
        reviews = OpenReviews(deployment.log)
        await reviews.catch_up()
        return reviews.clocks(time.time())

    assert place.within(spoil) == (1, 0, 1)
    assert "cannot be read" in one_line(place.call("review", "list"))


def test_requests_to_the_person_go_on_until_it_is_decided(place):
    spot = near(place)
    for name in ("before", "after"):
        place.publish(sms_request(record_id=name, occurred_at=ago(), purpose="service"), sms_cdr(record_id=f"c-{name}"))
        place.work()
        decide(place, spot, "opt-out")
    assert {one["record_id"]: one["reason"] for one in place.values("verdicts")} == {
        "before": None,
        "after": "opted_out",
    }
