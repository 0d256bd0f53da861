"""The demo's traffic: the same for the same seed, whenever it is made, and with everything in it that it promises."""

import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson
import pytest

from processors.pipeline import Inbox, Outcome, Pipeline
from processors.plan import Planner
from processors.screen.lists import FORMATS
from processors.screen.suppression import Suppressions, Tokens
from schemas.fields import normalise
from streams.cli.demo import RECORDS
from streams.demo.demo import policy
from streams.demo.traffic import (
    ACCOUNTS,
    BROKEN,
    COUNTRIES,
    KINDS,
    UNLISTED_ACCOUNT,
    VOICE_INCREMENT_S,
    Traffic,
    generate,
)
from tests.support.records import Lists

HOUR_S = 3600
DAY_S = 86_400
FEWER = 5000


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


NOON = at("2026-06-15T12:00")


@pytest.fixture(scope="module")
def traffic():
    return generate(RECORDS, 1, NOON)


@pytest.fixture(scope="module")
def records(traffic) -> list[dict[str, Any]]:
    found = []
    for value in traffic.values:
        try:
            found.append(orjson.loads(value))
        except orjson.JSONDecodeError:
            continue
    return found


def listed(made: Traffic) -> Lists:
    """A registry of the traffic's numbers that is never old."""
    return Lists(us_dnc=(2**40, {f"+1{line[:3]}{line[4:]}" for line in made.registry}))


def prepared(made: Traffic, now_s: int):
    pipeline = Pipeline(Planner(policy()), Tokens(1, b"k" * 32))
    return pipeline.prepare(Inbox("traffic", 0, 0, made.values), Suppressions(), listed(made), now_s)


@pytest.fixture(scope="module")
def outcomes(traffic) -> Counter[Outcome]:
    return Counter(prepared(traffic, NOON).outcomes)


@pytest.fixture(scope="module")
def here():
    return prepared(generate(FEWER, 1, NOON), NOON)


# --- the same, whenever ---------------------------------------------------------------------------------------


def test_same_seed_and_hour_make_the_same_traffic():
    assert generate(FEWER, 1, NOON) == generate(FEWER, 1, NOON)


def test_another_seed_makes_other_traffic():
    assert generate(500, 2, NOON).values != generate(500, 1, NOON).values


@pytest.mark.parametrize(
    "now_s",
    [
        at("2027-01-01T00:00"),
        at("2028-02-29T23:59:59"),
        at("2026-03-01T00:00:01"),
        at("2026-12-31T23:00"),
        at("2026-05-31T07:30"),
    ],
)
def test_same_seed_ends_in_the_same_counts_at_any_time(here, now_s):
    # Given the same seed at two times
    there = prepared(generate(FEWER, 1, now_s // HOUR_S * HOUR_S), now_s)
    # Then every outcome is as frequent, and so is what is kept of the CDRs
    assert Counter(here.outcomes) == Counter(there.outcomes)
    assert Counter(job.template.stream for job in here.cdrs) == Counter(job.template.stream for job in there.cdrs)
    assert len(here.overlay.changes) == len(there.overlay.changes)
    assert len(here.reviews) == len(there.reviews)


def test_an_hour_that_ends_during_the_run_changes_no_count(here):
    assert Counter(here.outcomes) == Counter(prepared(generate(FEWER, 1, NOON), NOON + 4000).outcomes)


# --- the mix --------------------------------------------------------------------------------------------------


def test_there_are_at_least_twenty_thousand_records_by_default(traffic):
    assert RECORDS >= 20_000
    assert len(traffic.values) == RECORDS == traffic.made.total()


def test_the_mix_has_the_shares_it_promises(traffic):
    assert sum(KINDS.values()) == pytest.approx(1)
    for kind, share in KINDS.items():
        assert traffic.made[kind] == pytest.approx(RECORDS * share, abs=len(KINDS))


@pytest.mark.parametrize("count", [1, 7, 99])
def test_few_records_are_as_many_as_asked_for(count):
    assert len(generate(count, 1, NOON).values) == count


def age_s(record: dict[str, Any]) -> float:
    return NOON - datetime.fromisoformat(record["occurred_at"]).timestamp()


def kind(name: str, **fields: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda one: one["type"] == name and all(one.get(field) == value for field, value in fields.items())


def inbound_text(text: str) -> Callable[[dict[str, Any]], bool]:
    return kind("cdr", direction="mo", channel="sms", content=text)


OWN = {number for account in ACCOUNTS.values() for number in account.own}
PRESENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"{purpose} SMS request": kind("request", channel="sms", purpose=purpose)
        for purpose in ("otp", "transactional", "marketing", "service")
    },
    **{f"{country} SMS CDR": kind("cdr", channel="sms", country=country) for country in COUNTRIES},
    **{f"account {name}": kind("cdr", account_id=name) for name in ACCOUNTS},
    **{
        f"{action} by preference, {scope}, {class_}": kind(
            "preference", action=action, scope=scope, **{"class": class_}
        )
        for action in ("opt_out", "opt_in")
        for scope, class_ in (("account", "all"), ("platform", "all"), ("campaign", "marketing"), ("sender", "service"))
    },
    **{f"inbound {text}": inbound_text(text) for text in ("STOP", "Stop.", "ARRET", "START", "please stop", "STOPP")},
    "ordinary answer": inbound_text("ok thanks"),
    "voice request": kind("request", channel="voice"),
    "call from an own number": lambda one: one["channel"] == "voice" and one["sender"] in OWN,
    "call between two people": lambda one: (
        one["type"] == "cdr"
        and one["channel"] == "voice"
        and one["sender"].startswith("+")
        and not {one["sender"], one["recipient"]} & OWN
    ),
    "call to an own number": kind("cdr", channel="voice", direction="mo"),
    "caller who withholds the number": kind("cdr", channel="voice", sender="anonymous"),
    "recording and transcript": lambda one: "recording_ref" in one and "transcript" in one,
    "client address": lambda one: "client_ip" in one,
    "location": lambda one: "location" in one,
    "display name": lambda one: "display_name" in one,
    "attributes": lambda one: "attributes" in one,
    "campaign": lambda one: "campaign_id" in one,
    "operator": lambda one: "mcc" in one and "mnc" in one,
    "several segments": lambda one: one.get("segments", 0) > 1,
    "child": lambda one: one.get("child"),
    "national number": lambda one: one.get("recipient", "").startswith("("),
    "10 days late": lambda one: 10 * DAY_S <= age_s(one) <= 12 * DAY_S,
    "14 months late": lambda one: 400 * DAY_S < age_s(one) < 640 * DAY_S,
    "11 years late": lambda one: age_s(one) > 4015 * DAY_S,
    "three days ahead": lambda one: age_s(one) < -3 * DAY_S,
    "unknown account": lambda one: one["account_id"] == UNLISTED_ACCOUNT,
}


@pytest.mark.parametrize("what", PRESENT)
def test_the_traffic_has(what, records):
    dated = [one for one in records if not one["occurred_at"].startswith("2026-02-30")]
    assert any(PRESENT[what](one) for one in dated)


def test_duplicate_ids_come_again_as_they_were(traffic):
    again = [value for value, count in Counter(traffic.values).items() if count > 1]
    assert len(again) > 20


def test_some_people_are_met_far_more_often_than_others(records):
    met = Counter(one["recipient"] for one in records if one["type"] == "request" and "recipient" in one)
    often = sum(count for _, count in met.most_common(len(met) // 10))
    assert often > 2 * met.total() / 10


@pytest.mark.parametrize(
    "reason",
    [
        *("opted_out", "on_registry", "child", "country_not_allowed"),
        *("personal_part_expired", "older_than_everything", "lifts_nothing"),
        *("not_json", "missing_field:recipient", "unknown_field", "unsupported_version", "too_far_ahead"),
        *("bad_value:price", "bad_value:occurred_at", "account_unknown"),
    ],
)
def test_some_records_end_as(reason, outcomes):
    assert sum(count for one, count in outcomes.items() if one.reason == reason) >= 20


def test_nothing_ends_in_a_way_that_nobody_meant(outcomes):
    assert {one.reason for one in outcomes} == {
        None, "opted_out", "on_registry", "child", "country_not_allowed", "personal_part_expired",
        "older_than_everything", "lifts_nothing", "not_json", "missing_field:recipient", "unknown_field",
        "unsupported_version", "too_far_ahead", "bad_value:price", "bad_value:occurred_at", "account_unknown",
    }  # fmt: skip


def test_every_broken_record_and_no_other_is_quarantined(traffic, outcomes):
    quarantined = sum(count for one, count in outcomes.items() if one.end == "quarantine")
    assert quarantined == traffic.made["broken"] >= 10 * len(BROKEN)


# --- what it must agree with ----------------------------------------------------------------------------------

FICTION = re.compile(
    r"\+1\d{3}55501\d\d|\+44(7700900\d{3}|2079460\d{3})|\+49(17139200\d\d|176040690\d\d|3023125\d{3})"
    r"|\+33(63998\d{4}|199000\d{3})|\+3400000\d{4}|\+550090000\d{4}|\+91000000\d{4}|\+650000\d{4}"
    r"|\+6149157\d{4}|\+25400000\d{4}"
)


def test_every_number_is_one_that_nobody_has(records):
    numbers = {one[field] for one in records for field in ("sender", "recipient") if one.get(field, "")[:1] == "+"}
    assert numbers
    assert [number for number in numbers if not FICTION.fullmatch(number)] == []


def test_a_national_number_is_read_as_the_same_person(records):
    national = [one for one in records if one["type"] == "request" and one.get("recipient", "")[:1] == "("]
    for one in national:
        assert FICTION.fullmatch(normalise(one["recipient"], one["country"]).value)
    assert national


def test_the_policy_lists_the_accounts_as_the_traffic_has_them():
    listed = {account.id: account for account in policy().listed}
    assert set(listed) == set(ACCOUNTS)
    assert policy().account(UNLISTED_ACCOUNT) is None
    for name, account in ACCOUNTS.items():
        assert set(account.own) == listed[name].own
        assert policy().increment_s(listed[name]) == VOICE_INCREMENT_S.get(name, 60)


def test_the_policy_shows_each_kind_of_instruction():
    accounts = policy().listed
    assert {policy().content_days(account) for account in accounts} == {30, 7, None}
    assert any(account.countries for account in accounts)
    assert any(policy().increment_s(account) == 1 for account in accounts)
    assert any(role.data_class == "content" and role.role == "controller" for one in accounts for role in one.role)
    assert policy().screening.quiet_hours is None


def test_prices_are_decimal_texts_and_follow_from_what_is_billed(records):
    seen = set()
    for one in records:
        if one["type"] != "cdr" or one["direction"] != "mt" or one["status"] == "rejected":
            continue
        operators = {(each.mcc, each.mnc): each for each in COUNTRIES[one["country"]].operators}
        operator = operators[one["mcc"], one["mnc"]]
        expected = operator.sms * one["segments"] if one["channel"] == "sms" else operator.second * one["billable_s"]
        assert Decimal(one["price"]["amount"]) == expected
        seen.add((one["country"], one["channel"], one["mnc"]))
    assert len(seen) > 30


def test_the_registry_lists_people_of_the_traffic(traffic, records):
    parts = FORMATS["us-dnc"].read(["\n".join(traffic.registry).encode()], "made")
    numbers = {f"+{number}" for part in parts for number in part.tolist()}
    assert len(numbers) == len(traffic.registry) > 50
    assert numbers & {one.get("recipient") for one in records}


def test_neither_traffic_nor_people_show_in_a_repr(traffic):
    assert repr(traffic) == f"Traffic({RECORDS})"
