"""What is refused, in which order, with which reason and codes; and how opt-outs act within and across batches."""

import re
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import orjson
import pytest

from processors.pipeline import Inbox, Outcome, Pipeline
from processors.plan import Planner
from processors.screen.revocation import keyword_rules
from processors.screen.suppression import Rule, Suppressions, latest, parse_key, scope_id
from processors.screen.verdict import GATEWAY_CODES, NOBODY, REASONS, Asked, Screen, Subject
from schemas.fields import Kind, Party, normalise
from tests.support.records import (
    AT,
    DEFAULT_POLICY,
    NOW_S,
    OTHER,
    PERSON,
    TOKENS,
    Lists,
    account,
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

PREMIUM = "+19005550199"
US, TORONTO, TOLL_FREE = "+14155550123", "+14165550123", "+18005550123"
DAY_S = 86_400
PURPOSES = ("marketing", "transactional", "otp", "service")
BLOCKS = {"all": PURPOSES, "marketing": ("marketing",), "service": ("service", "transactional")}
QUIET = '[screening.quiet_hours]\nstart = "21:00"\nend = "08:00"\ncountries = ["US"]\nclause = "REG-3"\n'


def instant(text):
    return int(datetime.fromisoformat(text).timestamp())


def shape(seconds):
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def decided(value, **settings):
    """The verdict on one request, after seeing that its outcome and the `cleared` stream agree with it."""
    done = run([value], **settings)
    (found,) = done.values("verdicts")
    assert (found["verdict"] == "cleared") == (found["reason"] is None) == (len(done.of("cleared")) == 1)
    assert done.outcomes == [Outcome("request", "emit" if found["reason"] is None else "refuse", found["reason"])]
    return found


def reason(value, **settings):
    return decided(value, **settings)["reason"]


def entry(*, number=PERSON, scope="account:acme", class_="all", channel="sms", authority="person", out=True, event_s=0):
    """A view in which one number has one entry."""
    view = Suppressions()
    view.apply(TOKENS.of(number), Rule(scope, class_, channel, authority), out=out, event_s=event_s)
    return view


def marketing(**fields):
    return sms_request(**{"purpose": "marketing", **fields})


# --- the order of the rules ---------------------------------------------------------------------------------

ORDER = (
    "request_expired", "destination_forbidden", "country_not_allowed", "child", "opted_out", "blocked_by_officer",
    "registry_too_old", "on_registry", "quiet_hours",
)  # fmt: skip


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_of_several_reasons_the_first_rule_in_order_decides(first):
    # Given a marketing request at night that breaks this rule and every later one
    broken, night = ORDER[first:], instant("2026-11-21T09:00:00Z")
    view = Suppressions()
    for name, authority in (("opted_out", "person"), ("blocked_by_officer", "officer")):
        if name in broken:
            view.apply(TOKENS.of(US), Rule("account:acme", "all", "sms", authority), out=True, event_s=0)
    request = marketing(
        recipient=PREMIUM if "destination_forbidden" in broken else US,
        country="FR" if "country_not_allowed" in broken else "US",
        child="child" in broken,
        occurred_at="2026-11-19T00:00:00Z" if "request_expired" in broken else shape(night),
    )
    lists = Lists(us_dnc=(night - 32 * DAY_S * ("registry_too_old" in broken), {US} if "on_registry" in broken else ()))
    policy = policy_of(account("acme", 'countries = ["US"]') + QUIET)
    # When it is screened, then that rule is the reason
    assert reason(request, policy=policy, view=view, registries=lists, now_s=night) == ORDER[first]


def test_the_reasons_are_listed_in_the_order_of_the_rules():
    assert [name for name in REASONS if name in ORDER] == list(ORDER)


def test_the_page_about_verdicts_lists_the_rules_and_reasons_in_their_order():
    page = (Path(__file__).parents[2] / "docs" / "screening.md").read_text()
    table = page.partition("| rule |")[2].partition("\n\n")[0]
    named = dict.fromkeys(re.findall(r"`([a-z_]+)`", table))  # some rules are called as their reason is
    assert [name for name in named if name in REASONS] == list(REASONS)


def test_every_rule_asked_can_be_listed_with_its_clause():
    policy = policy_of(account("acme", 'countries = ["US"]') + QUIET)
    noon = instant("2026-11-21T20:00:00Z")
    party = normalise(US)
    subject = Subject("acme", party, TOKENS.of(US), "sms", "marketing", "US", False, noon, ("platform",))
    screen = Screen(policy, Lists(us_dnc=(noon, set())), Suppressions(), NOBODY, noon)
    trace = []
    found = screen.verdict(subject, policy.account("acme"), trace)
    assert found.cleared
    assert trace == [
        Asked("request_age", "INF-3", "pass"),
        Asked("recipient", "CAL-2", "pass"),
        Asked("destination", "CAL-11", "pass"),
        Asked("country_allow_list", "CAL-11", "pass"),
        Asked("child", "REG-5", "pass"),
        Asked("recipient_normalised", "CAL-3", "pass"),
        Asked("suppression", "KAL-5", "pass"),
        Asked("registry us-dnc", "REG-2", "pass"),
        Asked("quiet_hours", "REG-3", "pass"),
    ]
    assert screen.verdict(subject, policy.account("acme")) == found


# --- the verdict --------------------------------------------------------------------------------------------


def test_a_verdict_has_exactly_its_fields():
    fields = {"v", "record_id", "account_id", "channel", "purpose", "verdict", "reason", "clause", "codes",
              "decided_at", "not_after", "defer_until", "second", "privacy"}  # fmt: skip
    for view in (Suppressions(), entry()):
        done = run([sms_request(record_id="x-1")], view=view)
        (message,) = done.of("verdicts")
        found = orjson.loads(message.value)
        assert set(found) == fields
        assert (found["v"], found["record_id"], found["account_id"]) == (1, "x-1", "acme")
        assert (found["channel"], found["purpose"], found["second"]) == ("sms", "transactional", False)
        assert found["decided_at"] == shape(NOW_S)
        assert message.timestamp_ms == NOW_S * 1000


def test_a_refusal_for_an_opt_out_carries_the_codes_that_gateways_know():
    codes = {"twilio": 21610, "telnyx": 40300, "plivo": 200, "vonage": 9, "sinch": 257, "infobip": 2050}
    assert codes == GATEWAY_CODES
    assert decided(sms_request(), view=entry())["codes"] == codes
    assert decided(sms_request(), view=entry(authority="officer"))["codes"] == codes
    assert decided(marketing(recipient=US), registries=Lists(us_dnc=(NOW_S, {US})))["codes"] == codes


def test_other_verdicts_carry_no_codes():
    assert decided(sms_request())["codes"] == {}
    assert decided(marketing(child=True))["codes"] == {}
    assert decided(sms_request(recipient=""))["codes"] == {}


@pytest.mark.parametrize("record_id", ['"', "\\", '"}],"', "a b", "~!@#$%^&*()", "x" * 128])
def test_any_record_id_stands_in_verdict_and_envelope_as_it_is(record_id):
    done = run([sms_request(record_id=record_id), sms_request(record_id="next")])
    assert [value["record_id"] for value in done.values("verdicts")] == [record_id, "next"]
    assert [value["record_id"] for value in done.values("cleared")] == [record_id, "next"]
    assert [opened["primary"]["record_id"] for opened in done.opened("cleared")] == [record_id, "next"]


# --- each rule ----------------------------------------------------------------------------------------------


def test_a_request_older_than_24_hours_is_refused():
    for purpose in PURPOSES:
        assert reason(sms_request(purpose=purpose, occurred_at=shape(NOW_S - DAY_S))) is None
        assert reason(sms_request(purpose=purpose, occurred_at=shape(NOW_S - DAY_S - 1))) == "request_expired"


def test_a_request_of_any_age_is_refused_and_never_an_error():
    for at in ("0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z", "2014-05-05T05:05:05Z"):
        assert reason(sms_request(occurred_at=at)) == "request_expired"


@pytest.mark.parametrize("recipient", ["", "anonymous", " "])
def test_a_request_to_nobody_is_refused(recipient):
    assert reason(sms_request(recipient=recipient)) == "no_recipient"


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"country": "DE"}, True), ({"country": "US"}, False), ({"country": "AT"}, True),
        ({"recipient": "+4915112345678"}, True), ({"recipient": "+436641234567"}, True), ({"recipient": US}, False),
        ({"recipient": "+33612345678"}, False), ({"recipient": "12345"}, False),
        ({"recipient": "12345", "country": "DE"}, True),
        ({"recipient": "ann@example.org"}, False), ({"recipient": US, "country": "DE"}, False),
        ({"recipient": PERSON, "country": "US"}, False), ({"recipient": "+80012345678", "country": "DE"}, False),
    ],
)  # fmt: skip
def test_only_countries_of_the_allow_list_are_served(fields, allowed):
    policy = policy_of(account("acme", 'countries = ["DE", "AT"]'))
    for purpose in ("transactional", "otp", "service"):
        found = reason(sms_request(purpose=purpose, **fields), policy=policy)
        assert found == (None if allowed else "country_not_allowed")
    assert (reason(marketing(**fields), policy=policy) == "country_not_allowed") is not allowed
    assert reason(sms_request(account_id="other", **fields), policy=policy) is None


def test_a_country_that_shares_its_code_is_allowed_only_with_all_who_share_it():
    only = policy_of(account("acme", 'countries = ["US"]'))
    assert reason(sms_request(recipient=TOLL_FREE), policy=only) == "country_not_allowed"
    assert reason(sms_request(recipient=TOLL_FREE, country="US"), policy=only) is None
    assert reason(sms_request(recipient=TOLL_FREE, country="DE"), policy=only) == "country_not_allowed"
    assert reason(sms_request(recipient=US), policy=only) is None
    assert reason(sms_request(recipient=TORONTO, country="US"), policy=only) == "country_not_allowed"


def test_a_child_is_never_marketed_to_and_still_gets_the_rest():
    for build, purpose in product((sms_request, voice_request), PURPOSES):
        expected = "child" if purpose == "marketing" else None
        assert reason(build(purpose=purpose, child=True)) == expected
        assert reason(build(purpose=purpose, child=False)) is None


@pytest.mark.parametrize("recipient", ["somebody over there", "12345", "ACME", "123456789"])
def test_marketing_to_what_is_no_number_and_no_address_is_refused(recipient):
    for purpose in PURPOSES:
        expected = "recipient_not_normalised" if purpose == "marketing" else None
        assert reason(sms_request(purpose=purpose, recipient=recipient)) == expected


@pytest.mark.parametrize("recipient", [PERSON, "ann@example.org", "sip:ann@example.org", "0049 151 12345678"])
def test_marketing_to_a_number_or_an_address_is_not(recipient):
    assert reason(marketing(recipient=recipient)) is None


SCOPES = {
    "platform": ("platform", lambda _: True),
    "account": ("account:acme", lambda request: request["account_id"] == "acme"),
    "sender": (
        f"sender:acme:{TOKENS.of('ACME').hex()}",
        lambda request: request["sender"] == "ACME" and request["account_id"] == "acme",
    ),
    "campaign": (
        "campaign:acme:spring",
        lambda request: request.get("campaign_id") == "spring" and request["account_id"] == "acme",
    ),
}
REQUESTS = [
    {"account_id": name, "sender": sender, **campaign}
    for name, sender, campaign in product(
        ("acme", "other"), ("ACME", "SHOP"), ({}, {"campaign_id": "spring"}, {"campaign_id": "autumn"})
    )
]


@pytest.mark.parametrize("authority", ["person", "officer"])
@pytest.mark.parametrize("scope", SCOPES)
def test_an_opt_out_blocks_its_scope_and_nothing_beyond(scope, authority):
    text, covers = SCOPES[scope]
    view = entry(scope=text, authority=authority)
    word = "opted_out" if authority == "person" else "blocked_by_officer"
    for fields in REQUESTS:
        assert reason(sms_request(**fields), view=view) == (word if covers(fields) else None)


@pytest.mark.parametrize("class_", BLOCKS)
@pytest.mark.parametrize("channel", ["sms", "voice"])
def test_an_opt_out_blocks_the_purposes_of_its_class_on_its_channel(class_, channel):
    view = entry(class_=class_, channel=channel)
    for build, purpose in product((sms_request, voice_request), PURPOSES):
        blocked = purpose in BLOCKS[class_] and build is {"sms": sms_request, "voice": voice_request}[channel]
        assert reason(build(purpose=purpose), view=view) == ("opted_out" if blocked else None)


def test_what_an_opt_out_of_class_all_blocks_is_policy():
    policy = policy_of(default=DEFAULT_POLICY.replace(
        'all = ["marketing", "transactional", "otp", "service"]', 'all = ["marketing", "transactional"]'
    ))  # fmt: skip
    for purpose in PURPOSES:
        blocked = purpose in ("marketing", "transactional")
        assert reason(sms_request(purpose=purpose), view=entry(), policy=policy) == ("opted_out" if blocked else None)


def test_an_opt_out_is_of_one_person():
    assert reason(sms_request(recipient=OTHER), view=entry()) is None
    assert reason(sms_request(recipient="0049 151 12345678"), view=entry()) == "opted_out"
    assert reason(sms_request(recipient="0151 12345678", country="DE"), view=entry()) == "opted_out"


def test_a_persons_opt_out_comes_before_an_officers_block():
    view = entry(authority="officer")
    view.apply(TOKENS.of(PERSON), Rule("platform", "all", "sms", "person"), out=True, event_s=0)
    assert reason(sms_request(), view=view) == "opted_out"


def test_a_lifted_opt_out_blocks_nothing_and_a_lift_of_one_entry_no_other():
    view = entry(event_s=10)
    view.apply(TOKENS.of(PERSON), Rule("platform", "all", "sms", "officer"), out=True, event_s=10)
    rule = Rule("account:acme", "all", "sms", "person")
    view.apply(TOKENS.of(PERSON), rule, out=False, event_s=11)
    assert reason(sms_request(), view=view) == "blocked_by_officer"
    view.apply(TOKENS.of(PERSON), Rule("platform", "all", "sms", "officer"), out=False, event_s=11)
    assert reason(sms_request(), view=view) is None


# --- registries ---------------------------------------------------------------------------------------------


def test_a_listed_number_is_not_marketed_to_and_still_gets_the_rest():
    lists = Lists(us_dnc=(NOW_S, {US}))
    for build, purpose in product((sms_request, voice_request), PURPOSES):
        expected = "on_registry" if purpose == "marketing" else None
        assert reason(build(purpose=purpose, recipient=US), registries=lists) == expected
        assert reason(build(purpose=purpose, recipient=PERSON), registries=lists) is None
    assert reason(marketing(recipient="(415) 555-0123", country="US"), registries=lists) == "on_registry"


def test_a_registry_is_asked_about_its_own_country_only():
    lists = Lists(us_dnc=(NOW_S, {US}))
    lists = Lists(us_dnc=(NOW_S, {US, TORONTO, TOLL_FREE}))
    assert reason(marketing(recipient=TORONTO, country="CA"), registries=lists) is None
    assert reason(marketing(recipient=TORONTO), registries=lists) is None
    # But a wrong country in the record never takes a number off a list, nor does a number that may be anywhere
    for country in ("US", "CA", "DE", None):
        assert reason(marketing(recipient=US, country=country), registries=lists) == "on_registry"
        assert reason(marketing(recipient=TOLL_FREE, country=country), registries=lists) == "on_registry"
    assert reason(marketing(recipient=TORONTO, country="US"), registries=lists) == "on_registry"


def test_a_registry_of_31_days_is_used_and_an_older_one_refuses_all_marketing_to_its_country():
    for age, expected in ((0, None), (31 * DAY_S, None), (31 * DAY_S + 1, "registry_too_old"), (-5 * DAY_S, None)):
        lists = Lists(us_dnc=(NOW_S - age, set()))
        assert reason(marketing(recipient=US), registries=lists) == expected
        assert reason(marketing(recipient=PERSON), registries=lists) is None
        assert reason(sms_request(recipient=US), registries=lists) is None


def test_a_registry_that_is_not_loaded_refuses_only_where_the_policy_requires_it():
    required = policy_of(default=DEFAULT_POLICY.replace("required = false", "required = true"))
    assert reason(marketing(recipient=US)) is None
    assert reason(marketing(recipient=US), policy=required) == "registry_missing"
    assert reason(marketing(recipient=PERSON), policy=required) is None
    assert reason(sms_request(recipient=US), policy=required) is None


def test_a_registry_of_one_channel_is_not_asked_on_the_other():
    policy = policy_of(default=DEFAULT_POLICY.replace('channels = ["sms", "voice"]\nmax', 'channels = ["voice"]\nmax'))
    lists = Lists(us_dnc=(NOW_S, {US}))
    assert reason(marketing(recipient=US), registries=lists, policy=policy) is None
    assert reason(voice_request(recipient=US, purpose="marketing"), registries=lists, policy=policy) == "on_registry"


def test_a_list_that_is_swapped_gets_old_or_goes_is_seen_by_a_pipeline_that_has_met_everybody():
    # Given one pipeline that meets the same two people again and again
    pipeline = Pipeline(Planner(policy_of()), TOKENS)
    day = NOW_S + DAY_S // 4
    empty, full = Lists(us_dnc=(NOW_S, set())), Lists(us_dnc=(NOW_S, {US}))
    asked = [
        (empty, NOW_S, None), (full, NOW_S, "on_registry"), (full, day, "on_registry"), (empty, day, None),
        (Lists(us_dnc=(NOW_S - 31 * DAY_S, set())), NOW_S, None),
        (Lists(us_dnc=(NOW_S - 31 * DAY_S, set())), NOW_S + 1, "registry_too_old"),
        (Lists(), NOW_S, None), (full, NOW_S, "on_registry"), (Lists(), NOW_S, None),
    ]  # fmt: skip
    for lists, now_s, expected in asked:
        values = [
            marketing(recipient=US),
            marketing(recipient=PERSON),
            voice_request(recipient=US, purpose="marketing"),
        ]
        inbox = Inbox("traffic", 0, 0, [raw(value) for value in values])
        prepared = pipeline.prepare(inbox, Suppressions(), lists, now_s)
        assert [found.reason for found in prepared.outcomes] == [expected, None, expected]


def test_the_same_swap_is_seen_where_a_list_only_gets_old():
    pipeline = Pipeline(Planner(policy_of()), TOKENS)
    lists = Lists(us_dnc=(NOW_S - 31 * DAY_S, set()))
    for now_s, expected in ((NOW_S, None), (NOW_S + 1, "registry_too_old"), (NOW_S, None)):
        prepared = pipeline.prepare(
            Inbox("traffic", 0, 0, [raw(marketing(recipient=US))]), Suppressions(), lists, now_s
        )
        assert [found.reason for found in prepared.outcomes] == [expected]


def test_one_person_in_records_of_two_countries_and_channels_gets_the_verdict_of_each():
    lists = Lists(us_dnc=(NOW_S, {TORONTO}))
    build = {"sms": sms_request, "voice": voice_request}
    values = [
        build[channel](recipient=TORONTO, purpose="marketing", country=country)
        for country, channel in (("CA", "sms"), ("US", "sms"), ("CA", "sms"), ("CA", "voice"), ("US", "voice"))
    ]
    found = [value["reason"] for value in run(values, registries=lists).values("verdicts")]
    assert found == [None, "on_registry", None, None, "on_registry"]


# --- quiet hours and not_after ------------------------------------------------------------------------------


def test_marketing_in_quiet_hours_is_refused_until_they_end():
    # Given a number in California, where it is 1 in the morning
    night = instant("2026-11-21T09:00:00Z")
    policy = policy_of(QUIET)
    found = decided(marketing(recipient=US, country="US"), policy=policy, now_s=night)
    assert (found["reason"], found["clause"]) == ("quiet_hours", "REG-3")
    assert found["defer_until"] == "2026-11-21T16:00:00Z"
    assert found["not_after"] is None
    # Then what is no marketing, or goes elsewhere, may go
    assert reason(sms_request(recipient=US), policy=policy, now_s=night) is None
    assert reason(marketing(recipient=PERSON), policy=policy, now_s=night) is None
    assert reason(marketing(recipient=US), now_s=night) is None


@pytest.mark.parametrize(
    ("purpose", "minutes"), [("marketing", 15), ("transactional", 60), ("otp", 10), ("service", 60)]
)
def test_a_cleared_request_may_be_sent_for_as_long_as_the_policy_says(purpose, minutes):
    done = run([sms_request(purpose=purpose)])
    until = shape(NOW_S + minutes * 60)
    assert done.values("verdicts")[0]["not_after"] == done.values("cleared")[0]["not_after"] == until


def test_marketing_is_never_sent_past_the_start_of_quiet_hours():
    policy = policy_of(QUIET)
    evening = instant("2026-11-22T04:50:00Z")  # 20:50 in California
    found = decided(marketing(recipient=US, country="US", occurred_at=shape(evening)), policy=policy, now_s=evening)
    assert found["not_after"] == "2026-11-22T05:00:00Z"
    earlier = evening - 600
    found = decided(marketing(recipient=US, country="US", occurred_at=shape(earlier)), policy=policy, now_s=earlier)
    assert found["not_after"] == shape(earlier + 15 * 60)
    found = decided(sms_request(recipient=US, occurred_at=shape(evening)), policy=policy, now_s=evening)
    assert found["not_after"] == shape(evening + 3600)


@pytest.mark.parametrize(
    ("zone", "expected"),
    [
        (None, "quiet_hours"),
        ("America/New_York", None),
        ("Europe/Berlin", None),
        ("America/Los_Angeles", "quiet_hours"),
    ],
)
def test_where_the_account_says_a_person_is_takes_the_place_of_what_the_number_says(zone, expected):
    # Given a number of California, where it is 05:30, when it is 08:30 in New York
    at = instant("2026-11-21T13:30:00Z")
    request = marketing(recipient=US, occurred_at=shape(at), **({} if zone is None else {"time_zone": zone}))
    assert reason(request, policy=policy_of(QUIET), now_s=at) == expected


def test_the_account_s_time_zone_moves_not_after_and_defer_until_and_makes_no_country_exempt():
    policy = policy_of(QUIET)
    at = instant("2026-11-22T01:50:00Z")  # 20:50 in New York
    request = marketing(recipient=US, occurred_at=shape(at), time_zone="America/New_York")
    assert decided(request, policy=policy, now_s=at)["not_after"] == "2026-11-22T02:00:00Z"
    found = decided(request, policy=policy, now_s=at + 600)
    assert (found["reason"], found["defer_until"]) == ("quiet_hours", "2026-11-22T13:00:00Z")


def test_a_time_zone_helps_where_the_number_says_nothing():
    at = instant("2026-11-21T17:00:00Z")
    policy = policy_of(QUIET)
    mail = {"recipient": "ann@example.org", "country": "US", "occurred_at": shape(at)}
    assert decided(marketing(**mail), policy=policy, now_s=at)["reason"] == "quiet_hours"
    assert reason(marketing(**mail, time_zone="America/Chicago"), policy=policy, now_s=at) is None


@pytest.mark.parametrize("zone", ["Mars/Olympus", "america/new_york", "EST5", "", "../UTC", "localtime", "right/UTC"])
def test_a_request_with_an_unknown_time_zone_is_quarantined(zone):
    assert run([marketing(time_zone=zone)]).outcomes == [Outcome("unreadable", "quarantine", "bad_value:time_zone")]


def test_a_time_zone_is_personal_and_leaves_only_sealed():
    done = run([sms_request(time_zone="Pacific/Chatham")])
    assert not any(b"Chatham" in message.value for output in done.outputs for message in output.messages)
    assert done.opened("cleared")[0]["primary"]["time_zone"] == "Pacific/Chatham"


def test_a_wrong_country_in_the_record_takes_nobody_out_of_quiet_hours():
    night = instant("2026-11-21T09:00:00Z")
    policy = policy_of(QUIET)
    for country in ("US", "DE", None):
        request = marketing(recipient=US, country=country, occurred_at=shape(night))
        assert reason(request, policy=policy, now_s=night) == "quiet_hours"
    assert reason(marketing(recipient=TORONTO, occurred_at=shape(night)), policy=policy, now_s=night) is None
    assert reason(marketing(recipient=TOLL_FREE, occurred_at=shape(night)), policy=policy, now_s=night) == "quiet_hours"


# --- never a destination ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipient", "country"), [(PREMIUM, None), ("911", "US"), ("+1 911", None), ("999", "GB"),
                                                    ("(900) 555-0199", "US"), ("+44 909 879 0000", "GB")])  # fmt: skip
@pytest.mark.parametrize("purpose", PURPOSES)
def test_premium_and_emergency_numbers_are_refused_whatever_for(recipient, country, purpose):
    for build in (sms_request, voice_request):
        found = decided(build(recipient=recipient, country=country, purpose=purpose))
        assert (found["reason"], found["clause"], found["codes"]) == ("destination_forbidden", "CAL-11", {})


# --- exemptions ---------------------------------------------------------------------------------------------


def exempt(kind="consent", *, number=US, account_id="acme", channel="sms", until_s=NOW_S + DAY_S, out=True):
    """A view in which one account has one exemption for one number."""
    view = Suppressions(latest)
    rule = Rule(f"account:{account_id}", kind, channel, "account")
    view.apply(TOKENS.of(number), rule, out=out, event_s=until_s)
    return view


REQUIRED = policy_of(default=DEFAULT_POLICY.replace("required = false", "required = true"))
AGAINST = [
    (Lists(us_dnc=(NOW_S, {US})), policy_of(), "on_registry"),
    (Lists(us_dnc=(NOW_S - 32 * DAY_S, set())), policy_of(), "registry_too_old"),
    (Lists(), REQUIRED, "registry_missing"),
    (Lists(), policy_of(QUIET.replace("21:00", "03:00").replace("08:00", "09:00")), "quiet_hours"),
]


@pytest.mark.parametrize(("lists", "policy", "refused"), AGAINST)
@pytest.mark.parametrize("kind", ["consent", "purchase", "inquiry"])
def test_an_exemption_lifts_registries_and_quiet_hours_and_the_verdict_names_it(lists, policy, refused, kind):
    settings = {"policy": policy, "registries": lists}
    assert reason(marketing(recipient=US), **settings) == refused
    found = decided(marketing(recipient=US), exemptions=exempt(kind), **settings)
    assert (found["verdict"], found["exemption"]) == ("cleared", kind)


@pytest.mark.parametrize(
    "other",
    [{"number": TORONTO}, {"account_id": "other"}, {"channel": "voice"}, {"until_s": NOW_S}, {"out": False},
     {"kind": "hope"}],
)  # fmt: skip
def test_an_exemption_of_others_or_out_of_force_lifts_nothing(other):
    lists = Lists(us_dnc=(NOW_S, {US}))
    assert reason(marketing(recipient=US), registries=lists, exemptions=exempt(**other)) == "on_registry"
    assert reason(marketing(recipient=US), registries=lists, exemptions=exempt(until_s=NOW_S + 1)) is None


def test_an_exemption_that_nothing_needed_is_not_named():
    found = decided(marketing(recipient=US), exemptions=exempt(), registries=Lists(us_dnc=(NOW_S, set())))
    assert "exemption" not in found


@pytest.mark.parametrize(("authority", "refused"), [("person", "opted_out"), ("officer", "blocked_by_officer")])
def test_an_opt_out_beats_an_exemption(authority, refused):
    view = entry(number=US, authority=authority)
    lists = Lists(us_dnc=(NOW_S, {US}))
    assert reason(marketing(recipient=US), view=view, registries=lists, exemptions=exempt()) == refused


@pytest.mark.parametrize(
    ("fields", "rules", "refused"),
    [({"child": True}, "", "child"), ({}, 'countries = ["CA"]', "country_not_allowed"),
     ({"occurred_at": "2026-11-19T00:00:00Z"}, "", "request_expired"),
     ({"recipient": PREMIUM}, "", "destination_forbidden")],
)  # fmt: skip
def test_an_exemption_lifts_nothing_else(fields, rules, refused):
    policy = policy_of(account("acme", rules))
    number = fields.get("recipient", US)
    view = exempt(number=number)
    assert reason(marketing(**{"recipient": US, **fields}), policy=policy, exemptions=view) == refused


def test_the_rules_after_a_lifted_one_are_asked_all_the_same():
    night = instant("2026-11-21T09:00:00Z")
    policy = policy_of(QUIET)
    subject = Subject("acme", normalise(US), TOKENS.of(US), "sms", "marketing", "US", False, night, ("platform",))
    lists = Lists(us_dnc=(night, {US}))
    trace = []
    screen = Screen(policy, lists, Suppressions(), exempt("inquiry", until_s=night + 1), night)
    assert screen.verdict(subject, policy.account("acme"), trace).exemption == "inquiry"
    assert [tuple(asked) for asked in trace[-2:]] == [
        ("registry us-dnc", "REG-2", "exempt: inquiry"),
        ("quiet_hours", "REG-3", "exempt: inquiry"),
    ]


def test_of_several_exemptions_consent_is_named_first():
    view = exempt("inquiry")
    for kind in ("purchase", "consent"):
        view.apply(TOKENS.of(US), Rule("account:acme", kind, "sms", "account"), out=True, event_s=NOW_S + 1)
    found = decided(marketing(recipient=US), registries=Lists(us_dnc=(NOW_S, {US})), exemptions=view)
    assert found["exemption"] == "consent"


@pytest.mark.parametrize(("lists", "policy", "refused"), AGAINST)
def test_what_an_exemption_lets_through_may_be_sent_only_while_one_is_in_force(lists, policy, refused):
    # Given two in force, the longer of which ends before marketing would have to be sent
    view = exempt("purchase", until_s=NOW_S + 100)
    view.apply(TOKENS.of(US), Rule("account:acme", "consent", "sms", "account"), out=True, event_s=NOW_S + 50)
    settings = {"policy": policy, "registries": lists, "exemptions": view}
    found = decided(marketing(recipient=US), **settings)
    assert (found["exemption"], instant(found["not_after"])) == ("consent", NOW_S + 99), refused
    # What needs none may be sent for as long as ever
    assert instant(decided(sms_request(recipient=US), **settings)["not_after"]) == NOW_S + 3600


# --- the one confirmation of an opt-out ---------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "flag"), [(0, True), (300, True), (301, False), (-300, True), (86_400, False)])
def test_an_opt_out_of_the_last_five_minutes_may_be_confirmed(age_s, flag):
    found = decided(sms_request(), view=entry(event_s=NOW_S - age_s))
    assert found["reason"] == "opted_out"
    assert found.get("confirmation", False) is flag


def test_a_stop_may_be_confirmed_from_the_next_record_on():
    done = run([reply("STOP", occurred_at=shape(NOW_S - 10)), sms_request(purpose="service")])
    assert done.values("verdicts")[0]["confirmation"] is True


@pytest.mark.parametrize("authority", ["officer", "both"])
def test_an_officers_block_may_not_be_confirmed(authority):
    view = entry(authority="officer", event_s=NOW_S)
    if authority == "both":
        view.apply(TOKENS.of(PERSON), Rule("account:acme", "all", "sms", "person"), out=True, event_s=NOW_S)
    assert "confirmation" not in decided(sms_request(), view=view)


def test_a_confirmation_is_a_text():
    view = entry(channel="voice", event_s=NOW_S)
    found = decided(voice_request(), view=view)
    assert found["reason"] == "opted_out"
    assert "confirmation" not in found


def test_only_an_opt_out_that_covers_the_request_counts_for_its_confirmation():
    view = entry(event_s=NOW_S - 4000)
    view.apply(TOKENS.of(PERSON), Rule("account:other", "all", "sms", "person"), out=True, event_s=NOW_S)
    view.apply(TOKENS.of(PERSON), Rule("account:acme", "marketing", "sms", "person"), out=True, event_s=NOW_S)
    assert "confirmation" not in decided(sms_request(), view=view)
    assert decided(marketing(), view=view)["confirmation"] is True


def test_verdicts_of_one_batch_that_differ_in_confirmation_or_exemption_only_are_told_apart():
    view = entry(event_s=NOW_S)
    view.apply(TOKENS.of(OTHER), Rule("account:acme", "all", "sms", "person"), out=True, event_s=0)
    done = run([sms_request(), sms_request(recipient=OTHER), sms_request()], view=view)
    assert [value.get("confirmation", False) for value in done.values("verdicts")] == [True, False, True]
    exempted = exempt("consent")
    second = "+14155550124"
    exempted.apply(TOKENS.of(second), Rule("account:acme", "purchase", "sms", "account"), out=True, event_s=NOW_S + 1)
    values = [marketing(recipient=number) for number in (US, second, "+14155550125")]
    lists = Lists(us_dnc=(NOW_S, {US, second}))
    found = run(values, registries=lists, exemptions=exempted).values("verdicts")
    assert [value.get("exemption") for value in found] == ["consent", "purchase", None]


# --- from the revoke-all date on ----------------------------------------------------------------------------

NARROW = DEFAULT_POLICY.replace(
    'scope = "account"\nclass = "all"\nchannels = ["sms", "voice"]',
    'scope = "sender"\nclass = "marketing"\nchannels = ["sms"]',
)
THE_DAY = instant("2027-01-31T00:00:00Z")


def rules_of(done):
    return {parse_key(message.key)[2] for message in done.of("suppressions")}


@pytest.mark.parametrize(
    ("sender", "at_s", "everything"),
    [
        (US, THE_DAY - 1, False), (US, THE_DAY, True), (US, THE_DAY + 40 * DAY_S, True),
        (PERSON, THE_DAY, False), (TORONTO, THE_DAY, False), (TOLL_FREE, THE_DAY, True),
        (TOLL_FREE, THE_DAY - 1, False),
        ("ann@example.org", THE_DAY, True), ("+88216123456", THE_DAY, True),
    ],
)  # fmt: skip
def test_from_the_date_on_a_keyword_revokes_everything_of_the_account(sender, at_s, everything):
    narrow = Rule(f"sender:acme:{TOKENS.of('12345').hex()}", "marketing", "sms", "person")
    whole = {Rule("account:acme", "all", channel, "person") for channel in ("sms", "voice")}
    stop = reply("STOP", sender=sender, occurred_at=shape(at_s))
    done = run([stop], policy=policy_of(default=NARROW), now_s=at_s)
    assert rules_of(done) == {narrow} | (whole if everything else set())


def test_the_date_is_that_of_the_message_in_the_policy_s_time_zone():
    policy = policy_of(default=NARROW.replace('timezone = "UTC"', 'timezone = "America/New_York"'))
    for at_s, entries in ((THE_DAY + 5 * 3600 - 1, 1), (THE_DAY + 5 * 3600, 3)):
        stop = reply("STOP", sender=US, occurred_at=shape(at_s))
        assert len(rules_of(run([stop], policy=policy, now_s=at_s + 3 * DAY_S))) == entries


def test_a_start_after_the_date_lifts_what_a_stop_made_before_it_and_after_it():
    policy = policy_of(default=NARROW)
    for stopped_s in (THE_DAY - 60, THE_DAY + 60):
        done = run(
            [reply("STOP", sender=US, occurred_at=shape(stopped_s)),
             marketing(recipient=US, sender="12345", occurred_at=shape(stopped_s)),
             reply("START", sender=US, occurred_at=shape(THE_DAY + 3600)),
             marketing(recipient=US, sender="12345", occurred_at=shape(THE_DAY + 3600))],
            policy=policy, now_s=THE_DAY + 3700,
        )  # fmt: skip
        assert [value["reason"] for value in done.values("verdicts")] == ["opted_out", None]


@pytest.mark.parametrize("scope", ["sender", "campaign", "account", "platform"])
@pytest.mark.parametrize("class_", ["all", "marketing", "service"])
@pytest.mark.parametrize("channels", [("sms",), ("voice",), ("sms", "voice")])
@pytest.mark.parametrize("at_s", [THE_DAY - 1, THE_DAY])
def test_revoking_everything_is_never_narrower_than_the_policy_s_rule(scope, class_, channels, at_s):
    default = DEFAULT_POLICY.replace(
        'scope = "account"\nclass = "all"\nchannels = ["sms", "voice"]',
        f'scope = "{scope}"\nclass = "{class_}"\nchannels = {list(channels)}'.replace("'", '"'),
    )
    rules = keyword_rules(policy_of(default=default), normalise(US), at_s, "acme", "12345", "spring", TOKENS)
    plain = scope_id(scope, "acme", "12345", "spring", TOKENS)
    assert {Rule(plain, class_, channel, "person") for channel in channels} <= set(rules)
    whole = {Rule("account:acme", "all", channel, "person") for channel in ("sms", "voice")}
    assert (whole <= set(rules)) == (at_s >= THE_DAY or (scope, class_, len(channels)) == ("account", "all", 2))
    assert len(set(rules)) == len(rules)


@pytest.mark.parametrize("at_s", [-(2**40), 0, 2**40])
def test_a_keyword_of_any_instant_has_a_date(at_s):
    for zone in ("UTC", "Pacific/Kiritimati", "Etc/GMT+12"):
        policy = policy_of(default=NARROW.replace('timezone = "UTC"', f'timezone = "{zone}"'))
        assert len(keyword_rules(policy, normalise(US), at_s, "acme", "1", None, TOKENS)) == (3 if at_s > 0 else 1)


# --- keywords, within a batch and beyond --------------------------------------------------------------------


def test_a_stop_acts_from_the_next_record_on():
    done = run([sms_request(), reply("STOP"), sms_request(), voice_request(), sms_request(recipient=OTHER)])
    assert [value["reason"] for value in done.values("verdicts")] == [None, "opted_out", "opted_out", None]


def test_a_stop_acts_in_the_next_batch_once_its_own_is_merged():
    view = Suppressions()
    first = run([reply("STOP")], view=view)
    assert reason(sms_request(), view=view) is None
    view.merge(first.prepared.overlay)
    assert reason(sms_request(), view=view) == "opted_out"


def test_preparing_a_batch_changes_no_view():
    view = entry(class_="marketing")
    before = {PERSON: dict(view.get(TOKENS.of(PERSON)))}
    run([reply("STOP"), preference("opt_in", **{"class": "marketing"}), reply("STOP", sender=OTHER)], view=view)
    assert {PERSON: dict(view.get(TOKENS.of(PERSON)))} == before
    assert view.get(TOKENS.of(OTHER)) is None


@pytest.mark.parametrize(
    "text",
    ["STOP", "stop", " Stop. ", "ＳＴＯＰ", "STOP ALL", "unsubscribe", "Arrêt", "ARRET", "opt-out", "TD", "END!"],
)
def test_a_keyword_opts_out_of_all_on_both_channels_at_account_scope(text):
    done = run([reply(text)])
    entries = [parse_key(message.key) for message in done.of("suppressions")]
    assert [(rule, out) for _, _, rule, out in entries] == [
        (Rule("account:acme", "all", channel, "person"), True) for channel in ("sms", "voice")
    ]
    assert {token for _, token, _, _ in entries} == {TOKENS.of(PERSON)}
    assert [value["reason"] for value in done.values("suppressions")] == ["keyword"] * 2
    assert [opened["number"] for opened in done.opened("suppressions")] == [{"number": PERSON}] * 2


def test_what_a_keyword_does_is_policy():
    policy = policy_of(default=DEFAULT_POLICY.replace(
        'scope = "account"\nclass = "all"\nchannels = ["sms", "voice"]',
        'scope = "sender"\nclass = "marketing"\nchannels = ["sms"]',
    ))  # fmt: skip
    (message,) = run([reply("STOP")], policy=policy).of("suppressions")
    assert parse_key(message.key)[2] == Rule(f"sender:acme:{TOKENS.of('12345').hex()}", "marketing", "sms", "person")


@pytest.mark.parametrize("text", ["please stop", "STOP it", "stopp", "SOTP", "I want to unsubscribe"])
def test_a_near_miss_goes_to_review_and_changes_no_verdict(text):
    done = run([reply(text), sms_request(), marketing()])
    assert [value["reason"] for value in done.values("verdicts")] == [None, None]
    assert not done.of("suppressions")
    assert done.opened("review") == [
        {"review": {"record_id": "rec-1", "occurred_at": AT, "sender": PERSON, "recipient": "12345", "content": text}}
    ]


@pytest.mark.parametrize(
    "text", ["hello", "YES", "GO", "the bus stop is at the corner of the street, walk there and wait", ""]
)
def test_any_other_text_does_nothing(text):
    done = run([reply(text)], view=entry())
    assert not {"suppressions", "review"} & done.streams


def test_only_inbound_sms_of_a_person_is_read_for_keywords():
    outbound = sms_cdr(content="STOP")
    request = sms_request(content="STOP")
    call = voice_cdr(direction="mo", sender=PERSON, transcript="STOP")
    nobody = reply("STOP", sender="anonymous")
    short = reply("STOP", sender="12345", recipient="54321")
    assert "suppressions" not in run([outbound, request, call, nobody, short]).streams


def test_a_stop_without_a_stored_text_still_counts():
    policy = policy_of(account("acme", 'content = "never"'))
    done = run([reply("STOP")], policy=policy)
    assert "content" not in done.streams
    assert len(done.of("suppressions")) == 2


def later(seconds):
    return shape(instant(AT) + seconds)


def test_a_start_lifts_the_same_entry_and_no_other():
    # Given a person who stopped one account, and is blocked at the platform by an officer elsewhere
    view = Suppressions()
    for account_id in ("acme", "other"):
        view.merge(run([reply("STOP", account_id=account_id)], view=view).prepared.overlay)
    view.apply(TOKENS.of(PERSON), Rule("account:acme", "marketing", "sms", "person"), out=True, event_s=0)
    # When the person starts the one again
    done = run(
        [reply("START", occurred_at=later(60)), sms_request(), marketing(), sms_request(account_id="other")], view=view
    )
    # Then that account may write again, but for what was opted out of by itself; the other may not
    assert [value["reason"] for value in done.values("verdicts")] == [None, "opted_out", "opted_out"]
    assert [orjson.loads(message.value)["action"] for message in done.of("suppressions")] == ["opt_in"] * 2


@pytest.mark.parametrize(("seconds", "lifted"), [(1, True), (0, False), (-1, False), (-3600, False)])
def test_a_start_lifts_only_if_it_is_later_by_event_time(seconds, lifted):
    done = run([reply("STOP"), reply("START", occurred_at=later(seconds)), sms_request()])
    assert done.values("verdicts")[0]["reason"] == (None if lifted else "opted_out")
    assert len(done.of("suppressions")) == (4 if lifted else 2)


def test_a_start_lifts_only_if_it_is_later_in_the_log_too():
    done = run([reply("START", occurred_at=later(60)), reply("STOP"), sms_request()])
    assert done.values("verdicts")[0]["reason"] == "opted_out"
    assert len(done.of("suppressions")) == 2


def test_a_start_never_lifts_an_officers_block():
    view = entry(authority="officer")
    done = run([reply("START"), preference("opt_in"), sms_request()], view=view)
    assert done.values("verdicts")[0]["reason"] == "blocked_by_officer"


def test_an_event_far_ahead_is_clamped_so_that_it_can_be_lifted():
    # Given a STOP stamped a day ahead of the clock
    done = run([reply("STOP", occurred_at=shape(NOW_S + DAY_S))])
    # Then it counts as five minutes ahead, and no opt-in can be stamped further ahead either
    assert {value["event_at"] for value in done.values("suppressions")} == {shape(NOW_S + 300)}
    ahead = shape(NOW_S + DAY_S)
    again = reply("STOP", occurred_at=shape(NOW_S + 10))
    done = run(
        [reply("STOP"), reply("START", occurred_at=ahead), again, reply("START", occurred_at=ahead), sms_request()]
    )
    assert done.values("verdicts")[0]["reason"] is None


# --- preferences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["platform", "account", "sender", "campaign"])
@pytest.mark.parametrize("class_", ["all", "marketing", "service"])
@pytest.mark.parametrize("channel", ["sms", "voice"])
def test_a_preference_is_of_exactly_its_scope_class_and_channel(scope, class_, channel):
    done = run([preference(scope=scope, channel=channel, campaign_id="spring", **{"class": class_})])
    (message,) = done.of("suppressions")
    version, token, rule, out = parse_key(message.key)
    texts = {"platform": "platform", "account": "account:acme", "campaign": "campaign:acme:spring"}
    assert rule == Rule(texts.get(scope, f"sender:acme:{TOKENS.of('ACME').hex()}"), class_, channel, "person")
    assert (version, token, out) == (1, TOKENS.of(PERSON), True)
    assert done.values("suppressions")[0]["reason"] == "preference"


def test_a_preference_acts_from_the_next_record_on_and_can_be_lifted_later():
    done = run([preference(), sms_request(), preference("opt_in", occurred_at=later(1)), sms_request()])
    assert [value["reason"] for value in done.values("verdicts")] == ["opted_out", None]


def test_an_opt_in_without_an_opt_out_lifts_nothing_and_is_no_record():
    done = run([preference("opt_in"), reply("START")])
    assert not done.of("suppressions")
    assert done.outcomes[0] == Outcome("preference", "emit", "lifts_nothing")


def test_an_opt_out_is_always_recorded_even_twice():
    done = run([preference(), preference(), preference(occurred_at=later(-60))])
    assert len(done.of("suppressions")) == 3
    assert {value["event_at"] for value in done.values("suppressions")} == {AT}


@pytest.mark.parametrize("sender", ["ACME", "12345", "anonymous", ""])
def test_a_preference_of_nobody_is_quarantined(sender):
    assert run([preference(sender=sender)]).outcomes == [Outcome("preference", "quarantine", "bad_value:sender")]


def test_the_senders_own_number_in_a_scope_is_a_token_and_never_the_number():
    done = run([preference(scope="sender", recipient=OTHER), sms_request(sender=OTHER), sms_request(sender="ACME")])
    assert [value["reason"] for value in done.values("verdicts")] == ["opted_out", None]
    (message,) = done.of("suppressions")
    assert OTHER[1:].encode() not in message.value + message.key
    # and it is the same sender however the number is written
    done = run([preference(scope="sender", recipient="001 415-555-0123"), sms_request(sender=OTHER)])
    assert done.values("verdicts")[0]["reason"] == "opted_out"


def test_an_opted_out_person_is_kept_in_the_entry_sealed_with_no_secret_of_the_person():
    done = run([preference()])
    (value,) = done.values("suppressions")
    (part,) = value["sealed"]
    assert (part["sid"], part["key"]) == ("-", "suppression/platform/-/1")
    assert not done.prepared.needs.persons
    assert value["entry"].encode() == done.of("suppressions")[0].key


def test_a_subject_and_a_party_show_nothing():
    shown = repr(Subject("acme", Party(Kind.NUMBER, PERSON, True), b"t" * 16, "sms", "otp", None, False, 0, ()))
    assert shown == "Subject(sms, otp)"
