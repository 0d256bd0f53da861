"""`streamveil screen` and the workers are one function, whatever the case; and what it says of itself is in order."""

from datetime import datetime
from itertools import pairwise

import orjson
from hypothesis import given
from hypothesis import strategies as st

from processors.pipeline import Inbox, Pipeline
from processors.plan import Planner
from processors.screen.suppression import Rule, Suppressions, covering_scopes, latest
from processors.screen.verdict import EXEMPT, REASONS, Screen, Subject
from schemas.fields import normalise
from schemas.policy import CLAUSES
from tests.support.records import (
    DAY_S,
    DEFAULT_POLICY,
    NOW_S,
    TOKENS,
    Lists,
    account,
    examples,
    policy_of,
    raw,
    sms_request,
    voice_request,
)

ORDER = (
    "request_age", "recipient", "destination", "country_allow_list", "child", "recipient_normalised", "suppression",
    "registry", "quiet_hours",
)  # fmt: skip
REFUSALS = {
    "request_age": {"request_expired"}, "recipient": {"no_recipient"}, "destination": {"destination_forbidden"},
    "country_allow_list": {"country_not_allowed"}, "child": {"child"},
    "recipient_normalised": {"recipient_not_normalised"}, "suppression": {"opted_out", "blocked_by_officer"},
    "registry": {"registry_missing", "registry_too_old", "on_registry"}, "quiet_hours": {"quiet_hours"},
}  # fmt: skip
QUIET = '[screening.quiet_hours]\nstart = "{}"\nend = "{}"\ncountries = ["US", "GB"]\nclause = "REG-3"\n'
POLICIES = [
    policy_of(),
    policy_of(account("acme", 'countries = ["US", "CA"]') + QUIET.format("21:00", "08:00")),
    policy_of(account("acme", 'countries = ["US"]\ndefault_region = "US"\nown_numbers = ["+14155550199"]')),
    policy_of(QUIET.format("03:00", "21:00"), default=DEFAULT_POLICY.replace("required = false", "required = true")),
    policy_of(QUIET.format("12:00", "11:00")),
]
RECIPIENTS = [
    "+14155550123", "+14155550124", "(415) 555-0123", "+14165550123", "+18005550123", "+19005550199", "+442079460958",
    "020 7946 0958", "+6581234567", "+4915112345678", "+80012345678", "911", "12345", "ACME", "ann@example.org", "",
    "+14155550199", "0151 12345678", "sip:+14155550123@example.org", "x y z 1234567",
]  # fmt: skip
PEOPLE = [normalise(text, "US").value for text in RECIPIENTS]
SENDERS = ["ACME", "12345", "+14155550100"]
NUMBERS = [number for number in PEOPLE if number.startswith("+")]


@st.composite
def requests(draw, recipients=RECIPIENTS):
    build = draw(st.sampled_from([sms_request, voice_request]))
    optional = {
        "country": draw(st.sampled_from([..., "US", "CA", "GB", "DE"])),
        "child": draw(st.sampled_from([..., True, False])),
        "campaign_id": draw(st.sampled_from([..., "spring", "a b"])),
        "time_zone": draw(st.sampled_from([..., ..., "America/New_York", "Asia/Tokyo", "Europe/London"])),
    }
    return build(
        recipient=draw(st.sampled_from(recipients)),
        sender=draw(st.sampled_from(SENDERS)),
        purpose=draw(st.sampled_from(["marketing", "marketing", "transactional", "otp", "service"])),
        account_id=draw(st.sampled_from(["acme", "other"])),
        **optional,
    )


@st.composite
def views(draw):
    view = Suppressions()
    for _ in range(draw(st.integers(0, 6))):
        account_id = draw(st.sampled_from(["acme", "other"]))
        scopes = covering_scopes(account_id, draw(st.sampled_from(SENDERS)), draw(st.sampled_from(["spring", "a b"])),
                                 TOKENS)  # fmt: skip
        rule = Rule(
            draw(st.sampled_from(scopes)),
            draw(st.sampled_from(["all", "marketing", "service"])),
            draw(st.sampled_from(["sms", "voice"])),
            draw(st.sampled_from(["person", "person", "officer"])),
        )
        event_s = NOW_S - draw(st.sampled_from([-200, 0, 300, 301, DAY_S]))
        view.apply(TOKENS.of(draw(st.sampled_from(PEOPLE))), rule, out=draw(st.booleans()), event_s=event_s)
    return view


@st.composite
def exemptions(draw):
    view = Suppressions(latest)
    for _ in range(draw(st.integers(0, 6))):
        rule = Rule(
            f"account:{draw(st.sampled_from(['acme', 'other']))}",
            draw(st.sampled_from(["consent", "purchase", "inquiry"])),
            draw(st.sampled_from(["sms", "voice"])),
            "account",
        )
        until_s = NOW_S + draw(st.sampled_from([-DAY_S, 0, 1, DAY_S, 60 * DAY_S]))
        view.apply(TOKENS.of(draw(st.sampled_from(PEOPLE))), rule, out=draw(st.booleans()), event_s=until_s)
    return view


@st.composite
def registries(draw):
    names = draw(st.sets(st.sampled_from(["us-dnc", "ca-dncl", "uk-tps", "sg-dnc-voice", "sg-dnc-text"])))
    return Lists(**{
        name: (NOW_S - draw(st.integers(0, 40)) * DAY_S, draw(st.sets(st.sampled_from(NUMBERS), max_size=8)))
        for name in names
    })  # fmt: skip


def seconds():
    return st.sampled_from([NOW_S, NOW_S, NOW_S + 7 * 3600, NOW_S + 15 * 3600, NOW_S + DAY_S, NOW_S + 30 * DAY_S])


def subject_of(request, policy):
    """The subject of a request as the command line makes one: by itself, with nothing remembered."""
    who = policy.account(request["account_id"])
    region = who.default_region or request.get("country")
    party = normalise(request["recipient"], region)
    sender = normalise(request["sender"], region).value
    known = party.is_person and party.value not in who.own
    subject = Subject(
        account_id=who.id,
        party=party,
        token=TOKENS.of(party.value) if known else None,
        channel=request["channel"],
        purpose=request["purpose"],
        country=request.get("country"),
        child=request.get("child") is True,
        requested_s=int(datetime.fromisoformat(request["occurred_at"]).timestamp()),
        scopes=covering_scopes(who.id, sender, request.get("campaign_id"), TOKENS),
        time_zone=request.get("time_zone"),
    )
    return subject, who


def told(answer, decided):
    """Whether a verdict as it was written is the verdict."""
    shown = {name: answer[name] for name in ("reason", "clause")}
    assert shown == {"reason": decided.reason, "clause": decided.clause}
    assert answer["codes"] == (decided.codes or {})
    assert answer.get("exemption") == decided.exemption
    assert answer.get("confirmation", False) is decided.confirmation
    for name, at_s in (("not_after", decided.not_after_s), ("defer_until", decided.defer_until_s)):
        assert (answer[name] is None) == (at_s is None)


@st.composite
def batches(draw):
    """A few batches about few people, so that they are met again."""
    few = draw(st.lists(st.sampled_from(RECIPIENTS), min_size=1, max_size=3))
    values = st.lists(requests(few), min_size=1, max_size=4)
    return draw(st.lists(st.tuples(values, views(), registries(), exemptions(), seconds()), min_size=1, max_size=3))


@examples(500)
@given(st.sampled_from(POLICIES), batches())
def test_the_pipeline_and_the_explained_verdict_are_one_function(policy, met):
    # Given one pipeline, with all it remembers, that meets the same people again and again
    pipeline = Pipeline(Planner(policy), TOKENS)
    for values, view, lists, exempt, now_s in met:
        inbox = Inbox("traffic", 0, 0, [raw(value) for value in values])
        # When a batch is prepared after lists were swapped, entries came and time went by
        prepared = pipeline.prepare(inbox, view, lists, now_s, exempt)
        answers = [orjson.loads(message.value) for message in prepared.verdicts]
        # Then each verdict is that of a screen made for this one question, with or without a trace
        for value, answer in zip(values, answers, strict=True):
            subject, who = subject_of(value, policy)
            trace = []
            decided = Screen(policy, lists, view, exempt, now_s).verdict(subject, who, trace)
            assert decided == Screen(policy, lists, view, exempt, now_s).verdict(subject, who)
            told(answer, decided)
            explained(decided, trace)


def explained(decided, trace):
    """Whether what was asked is in order, ends with the refusal if there is one, and cites known clauses."""
    places = [ORDER.index(asked.rule.partition(" ")[0]) for asked in trace]
    assert all(one < other or ORDER[one] == ORDER[other] == "registry" for one, other in pairwise(places))
    assert {asked.clause for asked in trace} <= CLAUSES
    refused = [asked for asked in trace if asked.outcome == "refuse"]
    if decided.reason is None:
        assert not refused
        assert [asked.rule for asked in trace][:3] == list(ORDER[:3])
    else:
        assert refused == trace[-1:]
        assert refused[0].clause == decided.clause
        assert decided.reason in REFUSALS[refused[0].rule.partition(" ")[0]]
    lifted = {asked.outcome for asked in trace if asked.outcome.startswith(EXEMPT)}
    assert lifted <= {f"{EXEMPT}{kind}" for kind in ("consent", "purchase", "inquiry")}
    assert len(lifted) <= 1
    if decided.reason is None:
        assert lifted == ({f"{EXEMPT}{decided.exemption}"} if decided.exemption else set())


def test_every_reason_belongs_to_one_rule_in_their_order():
    listed = [reason for rule in ORDER for reason in REASONS if reason in REFUSALS[rule]]
    assert listed == list(REASONS)


@examples(300)
@given(st.sampled_from(POLICIES), requests(), views(), registries(), exemptions(), seconds())
def test_an_exemption_changes_a_verdict_only_where_a_list_or_the_hour_refused(
    policy, value, view, lists, exempt, now_s
):
    subject, who = subject_of(value, policy)
    without = Screen(policy, lists, view, Suppressions(), now_s).verdict(subject, who)
    found = Screen(policy, lists, view, exempt, now_s).verdict(subject, who)
    if without.reason not in REFUSALS["registry"] | REFUSALS["quiet_hours"]:
        assert found == without
    elif found.reason is None:
        assert found.exemption is not None


@examples(300)
@given(st.sampled_from(POLICIES), requests(), views(), registries(), exemptions(), seconds())
def test_an_opt_out_is_decided_without_asking_any_list(policy, value, view, lists, exempt, now_s):
    subject, who = subject_of(value, policy)
    found = Screen(policy, lists, view, exempt, now_s).verdict(subject, who)
    if found.reason in REFUSALS["suppression"]:
        everywhere = Lists(**{name.replace("-", "_"): (now_s, set()) for name in ("us-dnc", "uk-tps", "sg-dnc-text")})
        assert Screen(policy, everywhere, view, exempt, now_s).verdict(subject, who) == found
