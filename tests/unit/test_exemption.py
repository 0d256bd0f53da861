"""Exemptions as pure values: how long one may last where, what its record says, and which key it is under."""

from datetime import UTC, datetime

import orjson
import pytest

from processors.exemption import KINDS, STREAM, Exemption, exempting, longest_s, months_later_s, withdrawing
from processors.keyring import EpochKey, EpochRef, KeyRing, PersonSecret
from processors.plan import Planner
from processors.screen.suppression import Change, Rule, parse_key, record_key
from processors.seal import Entropy, Sealer
from schemas.catalog import CATALOG, EXEMPT_HOURS
from schemas.errors import PolicyInvalid
from schemas.policy import parse_policy
from schemas.sealed import KeyId, take_apart
from streams.officer.retention import _expired
from tests.support import records as r

POLICY = parse_policy(r.DEFAULT_POLICY, "default")
US, CA, DE, JAMAICA = "+14155550123", "+14165550123", "+4915112345678", "+18765550123"
TOLL_FREE, NOWHERE = "+18005550123", "+9991234567"
CONSENT_ONLY = r.DEFAULT_POLICY.replace("inquiry_months = 3", "inquiry_months = 0")


def s(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def entry(token=bytes(16), kind="consent", channel="sms"):
    return record_key(1, Change(token, Rule("account:acme", kind, channel, "account"), True, 0, "", None))


def exemption(**fields):
    return Exemption(**{
        "entry": entry(), "account": "acme", "kind": "consent", "given_s": s("2026-11-01"),
        "expires_s": s("2027-11-01"), "evidence": "FORM-7", "token": bytes(16), "number": US, **fields,
    })  # fmt: skip


def written(one, policy=POLICY, now_s=r.NOW_S):
    """Return the message of an exemption, and the ring that opens it."""
    template = Planner(policy).until(STREAM, one.account, now_s, one.expires_s)
    ring = KeyRing()
    epoch = ring.epochs[template.ref] = EpochKey(KeyId(*template.ref, 1), bytes(32), template.deadline_s)
    secret = PersonSecret("ab" * 16, b"s" * 32)
    ring.persons["it"] = secret
    sealer = Sealer(ring, Entropy(r.SEED), STREAM, one.account, epoch)
    return exempting(template, sealer, secret, one, now_s), ring


# --- how long -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind", "until"),
    [
        (US, "purchase", "2028-05-15T12:00:00"),
        (US, "inquiry", "2027-02-15T12:00:00"),
        (CA, "purchase", "2028-05-15T12:00:00"),
        (CA, "inquiry", "2027-05-15T12:00:00"),
        (US, "consent", "2031-11-15T12:00:00"),
        (DE, "consent", "2031-11-15T12:00:00"),
        (DE, "purchase", None),
        (JAMAICA, "purchase", None),
    ],
)
def test_a_purchase_and_an_inquiry_last_as_long_as_the_numbers_country_lets_them(number, kind, until):
    given_s = s("2026-11-15T12:00:00")
    assert longest_s(POLICY, kind, number, given_s) == (until and s(until))


def test_where_the_digits_do_not_tell_the_country_every_one_must_let_it():
    # Given a number that may be of any country of calling code 1 / Then only a consent counts
    assert [longest_s(POLICY, kind, TOLL_FREE, r.NOW_S) is None for kind in KINDS] == [False, True, True]
    assert [longest_s(POLICY, kind, NOWHERE, r.NOW_S) is None for kind in KINDS] == [False, True, True]


def test_no_months_are_no_exemption():
    assert longest_s(parse_policy(CONSENT_ONLY, "p"), "inquiry", US, r.NOW_S) is None
    assert longest_s(parse_policy(CONSENT_ONLY, "p"), "inquiry", CA, r.NOW_S) is not None


def test_months_end_on_a_day_that_there_is():
    assert months_later_s(s("2026-08-31T23:59:59"), 18) == s("2028-02-29T23:59:59")
    assert months_later_s(s("2026-11-30"), 3) == s("2027-02-28")


def test_no_broker_drops_an_exemption_before_its_key_dies():
    # Given the longest exemption there can be, in every month / Then the topic keeps it to the end of its last month
    planner = Planner(POLICY)
    for month in range(1, 13):
        given_s = s(f"2027-{month:02}-28T23:59:59")
        ends_s = longest_s(POLICY, "consent", US, given_s)
        deadline_s = planner.until(STREAM, "acme", given_s, ends_s).deadline_s
        assert ends_s <= deadline_s <= given_s + EXEMPT_HOURS * 3600
    assert CATALOG[STREAM].max_hours == EXEMPT_HOURS
    assert not CATALOG[STREAM].compacted


# --- its key and its record -----------------------------------------------------------------------------------


def test_the_key_is_the_accounts_and_of_the_month_in_which_the_exemption_ends():
    planner = Planner(POLICY)
    in_november = planner.until(STREAM, "acme", r.NOW_S, s("2027-11-30T12:00:00"))
    assert in_november.ref == EpochRef("exemption", "acme", "2027-11")
    assert in_november.deadline_s == s("2027-12-01")
    # what ends at the very midnight has ended with the month before
    assert planner.until(STREAM, "acme", r.NOW_S, s("2027-12-01")).ref.epoch == "2027-11"
    assert planner.until(STREAM, "acme", r.NOW_S, s("2027-12-01") + 1).ref.epoch == "2027-12"


def test_a_policy_without_a_rule_for_contact_lists_has_no_exemptions_and_all_else():
    rule = r.DEFAULT_POLICY[r.DEFAULT_POLICY.index('[[processing]]\ndata_class = "contact_list"') :]
    policy = parse_policy(r.DEFAULT_POLICY.replace(rule[: rule.index("[content]")], ""), "p")
    planner = Planner(policy)
    with pytest.raises(PolicyInvalid, match="no processing rule for contact_list; add one"):
        planner.until(STREAM, "acme", r.NOW_S, r.NOW_S + 1)
    assert planner.plan("acme", r.NOW_S) is not None
    assert planner.output("suppressions", "acme", r.NOW_S).ref is not None


def test_the_number_stands_in_the_sealed_part_only():
    message, ring = written(exemption())
    assert not r.found_in(r.haystack(message.value, message.key), [US])
    assert r.open_value(message.value, ring) == {"number": orjson.dumps({"number": US})}


def test_a_record_says_whose_it_is_what_it_rests_on_and_until_when():
    message, _ = written(exemption())
    sealed = take_apart(message.value)
    assert {name: sealed.fields[name] for name in sealed.fields.keys() - {"privacy", "sealed", "v"}} == {
        "account_id": "acme", "action": "exempt", "entry": message.key.decode(), "evidence": "FORM-7",
        "expires_at": "2027-11-01T00:00:00Z", "given_at": "2026-11-01T00:00:00Z", "kind": "consent",
    }  # fmt: skip
    privacy = sealed.fields["privacy"]
    assert (privacy["role"], privacy["controller"], privacy["data_class"]) == ("processor", "acme", "contact_list")
    assert privacy["expires_at"] == "2027-11-01T00:00:00Z"
    assert sealed.account == "acme"
    assert message.timestamp_ms == r.NOW_S * 1000


def test_a_withdrawal_repeats_what_it_withdraws_seals_nothing_and_is_the_next_record_of_its_entry():
    message, _ = written(exemption())
    fields = orjson.loads(message.value)
    gone = withdrawing(message.key, fields, message.headers, "T-1", r.NOW_S + 5)
    told = orjson.loads(gone.value)
    assert (told["action"], told["reason"], told["sealed"], told["entry"]) == (
        "withdrawn",
        "T-1",
        [],
        gone.key.decode(),
    )
    for name in ("account_id", "evidence", "expires_at", "given_at", "kind", "privacy"):
        assert told[name] == fields[name]
    assert parse_key(gone.key) == (*parse_key(message.key)[:3], False)
    assert (gone.headers, gone.timestamp_ms) == (message.headers, (r.NOW_S + 5) * 1000)


def test_a_record_is_dead_with_its_month_not_when_the_exemption_ends():
    message, _ = written(exemption(expires_s=s("2027-11-10")))
    assert not _expired(message.value, b"2027-11-30T23:59:59Z")
    assert _expired(message.value, b"2027-12-01T00:00:00Z")


def test_nothing_of_a_person_is_in_a_repr():
    assert repr(exemption()) == "Exemption()"
