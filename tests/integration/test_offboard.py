"""An account whose agreement has ended: its keys die on schedule (CAL-7), nobody else's do, on real files."""

import time

import pytest

from processors.retention import instant
from schemas.errors import LogBusy
from streams.officer import holds
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import DAY_S, DEFAULT_POLICY, OTHER, PERSON, reply, sms_cdr, sms_request

LEAVING, STAYING = "acme", "northwind"
BY_AGREEMENT = """
[[account.role]]
data_class = "traffic"
role = "processor"
agreement = "DPA-7"
from = 2020-01-01
clause = "KAL-1"
"""


@pytest.fixture
def place(tmp_path):
    """Two accounts whose CDRs are keyed by them, with content, a near miss and a request each."""
    made = Place(tmp_path, **SHORT_LEASE)
    now = ago()
    made.policy(
        DEFAULT_POLICY + "".join(f'\n[[account]]\nid = "{name}"\n{BY_AGREEMENT}' for name in (LEAVING, STAYING))
    )
    for name in (LEAVING, STAYING, "third"):
        made.publish(
            sms_cdr(record_id=f"c-{name}", account_id=name, recipient=PERSON, occurred_at=now),
            reply("stop it", record_id=f"m-{name}", account_id=name, sender=OTHER, occurred_at=now),
            sms_request(record_id=f"q-{name}", account_id=name, recipient=PERSON, occurred_at=now),
        )
    assert made.work() == 9
    yield made
    made.close()


def offboard(place, *words):
    done = place.call("account", "offboard", *words, "--json")
    assert done.status == 0, done.err
    return done.lines


def keys(place, owner):
    done = place.call("keys", "status", "--json")
    found = [one for one in done.lines if one.get("owner") == owner]
    return {
        domain: {one["state"] for one in found if one["domain"] == domain} for domain in {f["domain"] for f in found}
    }


def run_at(place, at_s, *more):
    done = place.call(
        "retention", "run", "--json", *more, *(() if at_s is None else ("--now", instant(int(at_s)), "--yes"))
    )
    assert done.status == 0, done.err
    return done.lines[0]


def states(place, stream):
    """Return account → how its records of a stream open."""
    found = {}
    for line in place.tail(stream, "--reveal", "--reason", "TEST-1"):
        found.setdefault(line["value"]["account_id"], set()).add(line["reveal"]["state"])
    return found


def persons(place, owner):
    async def count(deployment):
        return sum(len(sids) for sids in deployment.store.sids_of(owner))

    return place.within(count)


def test_at_the_termination_content_dies_and_twenty_days_later_the_numbers(place):
    # Given an agreement that ended a minute ago
    ended_s = time.time() - 60
    (row,) = offboard(place, LEAVING, "--terminated", instant(int(ended_s)))
    assert (row["account"], row["epochs"]) == (LEAVING, 2)
    # Then content and near misses are dead at once, CDRs open yet, and other accounts notice nothing
    assert keys(place, LEAVING) == {
        "content": {"destroyed"},
        "review": {"destroyed"},
        "pii": {"alive"},
        "transit": {"alive"},
    }
    assert states(place, "content") == {LEAVING: {"destroyed"}, STAYING: {"revealed"}, "third": {"revealed"}}
    assert states(place, "cdr.pii") == {LEAVING: {"revealed"}, STAYING: {"revealed"}, "third": {"revealed"}}
    assert persons(place, LEAVING) > 0
    # Then a day before the end nothing more has died, and after it all that it owned has, by the scheduled run
    assert run_at(place, ended_s + 19 * DAY_S)["offboarded"] == []
    assert run_at(place, ended_s + 20 * DAY_S + 1)["offboarded"] == [LEAVING]
    assert states(place, "cdr.pii") == {LEAVING: {"destroyed"}, STAYING: {"revealed"}, "third": {"revealed"}}
    assert persons(place, LEAVING) == 0
    assert persons(place, STAYING) > 0
    assert run_at(place, ended_s + 20 * DAY_S + 60)["offboarded"] == []
    # Then what was destroyed stands in audit, people by sid
    entries = [value for value in place.values("audit") if value.get("why") == "offboarded"]
    named = [name for one in entries for name in one["destroyed"].get("epochs", ())]
    assert {name.split("/")[1] for name in named} == {LEAVING}
    assert sum(len(one["destroyed"].get("sids", ())) for one in entries) > 0


def test_a_termination_to_come_is_a_schedule_that_can_be_changed_and_cancelled(place):
    soon = instant(int(time.time()) + DAY_S)
    (row,) = offboard(place, LEAVING, "--terminated", soon)
    assert (row["terminated_at"], row["epochs"], row["persons"]) == (soon, 0, 0)
    assert run_at(place, None)["offboarded"] == []
    later = instant(int(time.time()) + 2 * DAY_S)
    offboard(place, LEAVING, "--terminated", later)
    assert [(one["account"], one["terminated_at"]) for one in offboard(place)] == [(LEAVING, later)]
    assert place.call("account", "offboard", LEAVING, "--cancel").out == f"{LEAVING} stays\n"
    assert offboard(place) == []
    assert place.call("account", "offboard", LEAVING, "--cancel").out == f"{LEAVING} was not leaving\n"
    assert offboard(place, LEAVING, "--cancel") == [{"account": LEAVING, "cancelled": False}]
    offboard(place, LEAVING, "--terminated", later)
    assert offboard(place, LEAVING, "--cancel") == [{"account": LEAVING, "cancelled": True}]
    assert run_at(place, time.time() + 3 * DAY_S, "--rewrap")["offboarded"] == []


def test_what_is_sealed_for_an_account_that_left_dies_at_the_next_look(place):
    offboard(place, LEAVING, "--terminated", instant(int(time.time()) - 30 * DAY_S))
    assert persons(place, LEAVING) == 0
    # When a CDR of two days ago comes late
    place.publish(sms_cdr(record_id="late", account_id=LEAVING, recipient=PERSON, occurred_at=ago(2 * DAY_S)))
    assert place.work() == 1
    assert "alive" in keys(place, LEAVING)["content"]
    assert run_at(place, None)["offboarded"] == [LEAVING]
    assert keys(place, LEAVING)["content"] == {"destroyed"}
    assert persons(place, LEAVING) == 0


def test_secrets_of_people_that_late_traffic_brings_die_at_the_next_look_whatever_they_sealed(place):
    offboard(place, LEAVING, "--terminated", instant(int(time.time()) - 30 * DAY_S))
    run_at(place, None)
    # When requests come, whose keys are not waited for: they die within a day by themselves
    place.publish(sms_request(record_id="q2", account_id=LEAVING, recipient=OTHER, occurred_at=ago(0)))
    assert place.work() == 1
    assert {"alive"} == keys(place, LEAVING)["transit"]
    assert persons(place, LEAVING) > 0
    # Then
    assert run_at(place, None)["offboarded"] == [LEAVING]
    assert persons(place, LEAVING) == 0
    assert run_at(place, None)["offboarded"] == []


def test_traffic_of_an_account_that_left_stops_no_worker(place):
    offboard(place, LEAVING, "--terminated", instant(int(time.time()) - 30 * DAY_S))
    now = ago(0)
    place.publish(
        sms_request(record_id="q2", account_id=LEAVING, occurred_at=now),
        sms_cdr(record_id="c2", account_id=LEAVING, occurred_at=now),
        reply("stop it", record_id="m2", account_id=LEAVING, occurred_at=now),
    )
    assert place.work() == 3


def test_a_dry_look_destroys_and_schedules_nothing(place):
    before = keys(place, LEAVING)
    (row,) = offboard(place, LEAVING, "--terminated", instant(int(time.time()) - 30 * DAY_S), "--dry")
    assert row["dry"]
    assert row["epochs"] == 3
    assert row["persons"] > 0
    assert keys(place, LEAVING) == before
    assert offboard(place) == []


def test_nothing_dies_while_what_is_under_hold_cannot_be_kept_and_the_schedule_stands(place, monkeypatch):
    before = keys(place, LEAVING)

    async def cannot(*_, **__):
        raise LogBusy("the disk sleeps")

    monkeypatch.setattr(holds, "preserve", cannot)
    done = place.call("account", "offboard", LEAVING, "--terminated", ago())
    assert "the disk sleeps" in one_line(done)
    assert keys(place, LEAVING) == before
    monkeypatch.undo()
    assert run_at(place, None)["offboarded"] == [LEAVING]


def test_under_a_hold_of_the_account_its_records_are_kept_first(place):
    held = place.call("account", "hold", LEAVING, "--reason", "CASE-1", "--json")
    assert held.status == 0, held.err
    offboard(place, LEAVING, "--terminated", instant(int(time.time()) - 30 * DAY_S))
    assert states(place, "cdr.pii")[LEAVING] == {"destroyed"}
    assert states(place, "held") == {LEAVING: {"revealed"}}


@pytest.mark.parametrize(
    "words",
    [
        (LEAVING,),
        ("--terminated", "2026-01-01"),
        ("platform", "--terminated", "2026-01-01"),
        ("not an account", "--terminated", "2026-01-01"),
        ("acmee", "--terminated", "2026-01-01"),
        ("acmee", "--terminated", "2026-01-01", "--dry"),
        ("acmee", "--cancel"),
        (LEAVING, "--terminated", "yesterday"),
        (LEAVING, "--terminated", "1969-12-31"),
    ],
)
def test_what_is_no_account_or_no_time_is_refused(place, words):
    one_line(place.call("account", "offboard", *words))
    assert offboard(place) == []
