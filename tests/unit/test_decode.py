import traceback
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import orjson
import pytest

from processors.decode import MAX_AHEAD_S, REASONS, decode, parties, timestamp
from schemas.errors import Poison
from schemas.fields import MAX_RECORD_BYTES
from schemas.inbound import Cdr, Preference, Request
from tests.support.records import (
    AT,
    LISTING_POLICY,
    NOW_S,
    OTHER,
    PERSON,
    account,
    outcome,
    policy_of,
    preference,
    raw,
    record,
    reply,
    run,
    sms_cdr,
    sms_request,
    voice_cdr,
    voice_request,
)

VALID = {
    "sms request": (sms_request(), Request),
    "voice request": (voice_request(), Request),
    "sms cdr": (sms_cdr(), Cdr),
    "voice cdr": (voice_cdr(), Cdr),
    "inbound sms": (reply("hello"), Cdr),
    "preference": (preference(), Preference),
}


def quarantined(value, **settings):
    """The reason for which a record is quarantined, having exactly one outcome."""
    end, reason = outcome(value, **settings)
    assert (end, reason in REASONS) == ("quarantine", True)
    return reason


def spliced(fields, tail):
    """A record with raw JSON bytes in it that no encoder would write."""
    return raw(fields)[:-1] + b"," + tail + b"}"


@pytest.mark.parametrize("name", VALID)
def test_a_valid_record_decodes_to_its_type(name):
    fields, kind = VALID[name]
    assert type(decode(raw(fields))) is kind


# --- not a record at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"", b" ", b"hello", b"\x00", b"\xff\xfe", b"{", b'"', b"nul", b"{]", b"\xef\xbb\xbf" + raw(sms_cdr()),
        raw(sms_cdr()) + b"x", raw(sms_cdr()) + raw(sms_cdr()), raw(sms_cdr()).replace(b'"', b"'"),
    ],
)  # fmt: skip
def test_what_is_not_json_is_quarantined_as_such(value):
    assert quarantined(value) == "not_json"


def test_a_record_truncated_anywhere_is_not_json():
    value = raw(voice_cdr(price={"amount": "0.05", "currency": "EUR"}))
    assert {quarantined(value[:size]) for size in range(0, len(value), 7)} == {"not_json"}
    assert quarantined(value[:-1]) == "not_json"


@pytest.mark.parametrize("value", [b"null", b"true", b"1", b'"text"', b"[]", b"[" + raw(sms_cdr()) + b"]"])
def test_json_that_is_no_object_is_quarantined_as_such(value):
    assert quarantined(value) == "not_an_object"


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"content":[', b'{"attributes":{"a":'])
def test_deep_nesting_is_quarantined_and_harms_nothing(opening):
    assert quarantined(opening * 50_000) == "not_json"
    for depth in (500, 5_000, 50_000):
        nested = b"[" * depth + b"]" * depth
        assert quarantined(nested) in ("not_an_object", "not_json")
        assert quarantined(spliced(sms_cdr(), b'"attributes":{"a":' + nested + b"}")) in REASONS


def test_a_record_of_two_megabytes_is_quarantined_whole_and_unread():
    value = raw(sms_cdr(content="x" * 2_000_000))
    done = run([value])
    assert (done.outcomes[0].kind, done.outcomes[0].reason) == ("unreadable", "too_large")
    (message,) = done.of("quarantine")
    assert len(message.value) > 2_000_000


def test_a_record_may_be_as_large_as_the_limit_and_not_one_byte_larger():
    room = MAX_RECORD_BYTES - len(raw(sms_cdr(content="")))
    assert outcome(sms_cdr(content="x" * room)) == ("emit", None)
    assert quarantined(sms_cdr(content="x" * (room + 1))) == "too_large"


# --- version, fields, values --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, -1, 1.0, 2**63, True, None, "1", "2", [], {}])
def test_another_version_is_not_supported(version):
    assert quarantined(sms_cdr(v=version)) == "unsupported_version"
    assert quarantined(sms_cdr(v=version, field_of_tomorrow=1)) == "unsupported_version"


@pytest.mark.parametrize("name", ["field_of_tomorrow", "Sender", "", "class_", "sealed", "privacy"])
def test_an_unknown_field_is_never_forwarded(name):
    assert quarantined(sms_cdr(**{name: "x"})) == "unknown_field"


def test_an_unknown_field_inside_the_price_is_never_forwarded():
    assert quarantined(sms_cdr(price={"amount": "1", "currency": "EUR", "note": "x"})) == "unknown_field"


def test_fields_of_other_record_types_are_unknown():
    assert quarantined(sms_cdr(action="opt_out")) == "unknown_field"
    assert quarantined(preference(content="STOP")) == "unknown_field"


COMMON = ("v", "type", "channel", "record_id", "account_id", "direction", "occurred_at", "sender", "recipient")


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *((build, name) for build in (sms_cdr, voice_cdr, sms_request, preference) for name in COMMON),
        (sms_request, "purpose"),
        (voice_request, "purpose"),
        (preference, "action"),
    ],
)
def test_a_missing_field_is_named(build, name):
    assert quarantined(build(**{name: ...})) == f"missing_field:{name}"


def test_a_preference_about_a_campaign_must_name_it():
    assert quarantined(preference(scope="campaign")) == "missing_field:campaign_id"
    assert quarantined(preference(scope="campaign", campaign_id="")) == "missing_field:campaign_id"
    assert outcome(preference(scope="campaign", campaign_id="spring")) == ("emit", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("type", "invoice"), ("type", None), ("type", 3),
        ("channel", "fax"), ("channel", None), ("direction", "in"), ("purpose", "spam"), ("purpose", ""),
        ("record_id", ""), ("record_id", "x" * 129), ("record_id", "a\nb"), ("record_id", "é"), ("record_id", 7),
        ("account_id", ""), ("account_id", "a b"), ("account_id", "x" * 65), ("account_id", "-a"),
        ("sender", None), ("sender", 4915112345678), ("recipient", ["+4915112345678"]), ("recipient", "x" * 321),
        ("country", "de"), ("country", "DEU"), ("mcc", "26"), ("mcc", 262), ("mnc", "1"), ("mnc", "1234"),
        ("route", "a" * 33), ("route", "a b"), ("route", ""), ("route", "Müller"), ("route", "call 555-123-4567"),
        ("status", "+4915112345678"), ("status", "4915112345678"), ("status", "5 5 5 1 2 3 4"), ("status", "a@b"),
        ("error_code", "x" * 129), ("campaign_id", "x" * 129), ("client_ip", "x" * 65), ("location", "x" * 1025),
        ("display_name", "x" * 257), ("child", "yes"), ("child", 1), ("content", 5), ("segments", -1),
        ("segments", 256), ("segments", 1.5), ("segments", "1"), ("encoding", "x" * 129),
        ("attributes", []), ("attributes", {"a": None}), ("attributes", {"a": {}}),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_by_its_field(name, value):
    assert quarantined(sms_cdr(**{name: value})) == f"bad_value:{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("duration_s", -1), ("duration_s", 604_801), ("duration_s", 1.5), ("billable_s", "60"), ("answered_at", "noon"),
     ("answered_at", "2026-11-21T11:22:33"), ("hangup_cause", 16), ("recording_ref", "x" * 2049), ("transcript", 1)],
)  # fmt: skip
def test_a_wrong_value_of_a_call_is_named_by_its_field(name, value):
    assert quarantined(voice_cdr(**{name: value})) == f"bad_value:{name}"


@pytest.mark.parametrize(("name", "value"), [("action", "maybe"), ("scope", "world"), ("class", "otp")])
def test_a_wrong_value_of_a_preference_is_named_by_its_field(name, value):
    assert quarantined(preference(**{name: value})) == f"bad_value:{name}"


@pytest.mark.parametrize(
    ("fields", "channel"),
    [
        ({"duration_s": 5}, "sms"), ({"billable_s": 0}, "sms"), ({"answered_at": AT}, "sms"),
        ({"hangup_cause": "busy"}, "sms"), ({"recording_ref": "r"}, "sms"), ({"transcript": ""}, "sms"),
        ({"content": "hi"}, "voice"), ({"content": ""}, "voice"), ({"segments": 0}, "voice"),
        ({"encoding": "gsm"}, "voice"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["cdr", "request"])
def test_a_field_of_the_other_channel_is_refused(fields, channel, kind):
    assert quarantined(record(kind, channel=channel, purpose="otp", **fields)) == "field_of_other_channel"


def test_a_request_cannot_be_inbound():
    assert quarantined(sms_request(direction="mo")) == "request_must_be_mt"


def test_ten_thousand_attributes_are_refused_and_sixty_four_are_not():
    assert quarantined(sms_cdr(attributes={f"key{n}": "x" for n in range(10_000)})) == "bad_value:attributes"
    assert quarantined(sms_cdr(attributes={f"key{n}": "x" for n in range(65)})) == "bad_value:attributes"
    assert outcome(sms_cdr(attributes={f"key{n}": "x" for n in range(64)})) == ("emit", None)


@pytest.mark.parametrize("name", ["sender", "recipient", "content", "display_name", "attributes"])
@pytest.mark.parametrize("surrogate", [b"\\ud800", b"\\udc00", b"\\udfff\\ud800", b"\xed\xa0\x80", b"\xed\xbf\xbf"])
def test_a_lone_surrogate_is_no_text_and_therefore_no_json(name, surrogate):
    text = b'"a' + surrogate + b'b"'
    tail = b'"attributes":{' + text + b':"x"}' if name == "attributes" else b'"%s":%s' % (name.encode(), text)
    assert quarantined(spliced(sms_cdr(**{name: ...}), tail)) == "not_json"


def test_the_last_of_two_equal_keys_counts_and_the_first_goes_nowhere():
    # Given a record that names two senders
    value = spliced(sms_cdr(sender="+4915100000001"), b'"sender":"+4915100000002"')
    # When it is processed
    done = run([value])
    # Then the first one stands nowhere, not even sealed
    (opened,) = done.opened("cdr.pii")
    assert opened["other"]["sender"] == "+4915100000002"
    assert b"+4915100000001" not in orjson.dumps(opened)


# --- instants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        "2026-02-30T10:00:00Z", "2025-02-29T10:00:00Z", "2026-13-01T10:00:00Z", "2026-00-10T10:00:00Z",
        "2026-11-31T10:00:00Z", "2026-11-21T24:00:00Z", "2026-11-21T10:60:00Z", "2026-11-21T10:00:61Z",
        "0000-01-01T00:00:00Z", "2026-11-21T10:00:00", "2026-11-21", "2026-11-21T10:00:00+25:00", "", "yesterday",
        "20261121T100000Z", 1_795_262_400, None, {}, "+2026-11-21T10:00:00Z", "12026-11-21T10:00:00Z",
    ],
)  # fmt: skip
def test_an_impossible_or_naive_instant_is_refused(at):
    assert quarantined(sms_cdr(occurred_at=at)) == "bad_value:occurred_at"


@pytest.mark.parametrize(
    ("at", "read_as"),
    [
        ("2026-06-30T23:59:60Z", "2026-06-30T23:59:59Z"),
        ("2026-06-30T23:59:60.999Z", "2026-06-30T23:59:59Z"),
        ("2016-12-31T23:59:60Z", "2016-12-31T23:59:59Z"),
        ("2026-06-30t18:59:60-05:00", "2026-06-30T23:59:59Z"),
        ("2026-07-01T01:59:60+02:00", "2026-06-30T23:59:59Z"),
    ],
)
def test_a_leap_second_where_leap_seconds_are_is_read_as_the_second_before(at, read_as):
    assert decode(raw(sms_cdr(occurred_at=at))).occurred_at == datetime.fromisoformat(read_as)


@pytest.mark.parametrize(
    "at",
    ["2026-06-29T23:59:60Z", "2026-03-31T23:59:60Z", "2026-06-30T22:59:60Z", "2026-06-30T23:58:60Z",
     "2026-06-30T23:59:60-05:00", "2026-06-31T23:59:60Z", "2026-12-31T23:59:61Z", "2026-06-30T23:59:60"],
)  # fmt: skip
def test_any_other_second_sixty_is_refused(at):
    assert quarantined(sms_cdr(occurred_at=at)) == "bad_value:occurred_at"


def test_two_leap_seconds_must_both_be_true():
    true, false = "2026-06-30T23:59:60Z", "2026-03-03T12:00:60Z"
    assert decode(raw(voice_cdr(occurred_at=true, answered_at=true))).answered_at.second == 59
    assert quarantined(voice_cdr(occurred_at=false, answered_at=true)) == "bad_value:occurred_at"
    assert quarantined(voice_cdr(occurred_at=true, answered_at=false)) in (
        "bad_value:answered_at",
        "bad_value:occurred_at",
    )


def test_a_leap_second_excuses_no_other_fault_and_leaves_the_price_exact():
    at = "2026-06-30T23:59:60Z"
    assert quarantined(sms_cdr(occurred_at=at, field_of_tomorrow=1)) == "unknown_field"
    assert quarantined(sms_cdr(occurred_at=at, sender=...)) == "missing_field:sender"
    value = spliced(sms_cdr(occurred_at=at), b'"price":{"amount":123456789.123456789,"currency":"EUR"}')
    assert decode(value).price.amount == "123456789.123456789"


def test_three_days_ahead_is_quarantined_and_two_are_not():
    def ahead(seconds):
        return sms_cdr(occurred_at=(datetime.fromtimestamp(NOW_S, UTC) + timedelta(seconds=seconds)).isoformat())

    assert quarantined(ahead(3 * 86_400)) == "too_far_ahead"
    assert quarantined(ahead(MAX_AHEAD_S + 1)) == "too_far_ahead"
    assert outcome(ahead(MAX_AHEAD_S)) == ("emit", None)
    assert outcome(ahead(-1)) == ("emit", None)


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "1582-10-10T00:00:00Z"])
def test_the_beginning_of_time_is_only_very_old(at):
    assert outcome(sms_cdr(occurred_at=at)) == ("expired", "older_than_everything")
    (opened,) = run([voice_cdr(answered_at=at)]).opened("cdr.pii")
    assert opened["primary"]["answered_at"] in ("0001-01-01T00:00:00Z", "1582-10-10T00:00:00Z")


@pytest.mark.parametrize("at", ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00"])
def test_the_end_of_time_is_only_far_ahead(at):
    assert quarantined(sms_cdr(occurred_at=at)) == "too_far_ahead"


def test_the_timestamp_is_whole_seconds_rounded_down():
    for text, second in (("2026-11-21T12:00:00.999999Z", NOW_S), ("1969-12-31T23:59:59.5Z", -1)):
        assert timestamp(decode(raw(sms_cdr(occurred_at=text))), NOW_S) == second


# --- money --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "amount",
    [
        b"-1", b'"-0.01"', b'"NaN"', b'"sNaN"', b'"-NaN"', b'"Infinity"', b'"-inf"', b"1e300", b'"1e999999999"',
        b'"1e-999999999"', b"1000000000", b'"0.0000000001"', b'"abc"', b'""', b"true", b"null", b"[]", b"{}",
        b'"1.000000000000000000000000000000015551234567"',
    ],
)  # fmt: skip
def test_a_price_that_is_negative_not_finite_or_out_of_range_is_refused(amount):
    value = spliced(sms_cdr(), b'"price":{"amount":' + amount + b',"currency":"EUR"}')
    assert quarantined(value) == "bad_value:price"


@pytest.mark.parametrize("amount", [b"NaN", b"Infinity", b"-Infinity", b"0x10", b"1,5", b"01", b".5"])
def test_a_price_that_json_does_not_know_is_no_json(amount):
    value = spliced(sms_cdr(), b'"price":{"amount":' + amount + b',"currency":"EUR"}')
    assert quarantined(value) == "not_json"


@pytest.mark.parametrize("currency", ["eur", "EURO", "", "E1R", 978, None])
def test_a_currency_is_three_capital_letters(currency):
    assert quarantined(sms_cdr(price={"amount": "1", "currency": currency})) == "bad_value:price"


def test_a_price_needs_both_its_fields():
    for price in ({"amount": "1"}, {"currency": "EUR"}, {}):
        assert quarantined(sms_cdr(price=price)) in ("bad_value:price", "bad_value", "missing_field:price")


# --- accounts, parties, ids ---------------------------------------------------------------------------------


def test_an_unlisted_account_is_quarantined_where_the_policy_lists_accounts():
    listing = policy_of(account("acme"), default=LISTING_POLICY)
    assert quarantined(sms_cdr(account_id="other"), policy=listing) == "account_unknown"
    assert quarantined(sms_request(account_id="other"), policy=listing) == "account_unknown"
    assert quarantined(preference(account_id="other"), policy=listing) == "account_unknown"
    assert outcome(sms_cdr(), policy=listing) == ("emit", None)


def test_no_account_may_be_the_platform():
    assert quarantined(sms_cdr(account_id="platform")) == "account_unknown"


@pytest.mark.parametrize(
    ("build", "direction"),
    [(sms_request, "mt"), *((build, way) for build in (sms_cdr, voice_cdr, preference) for way in ("mt", "mo"))],
)
def test_a_record_id_that_holds_a_number_is_quarantined(build, direction):
    sender = PERSON if build is preference else OTHER
    fields = {"direction": direction, "sender": sender, "recipient": PERSON}
    for number in {sender, PERSON}:
        assert quarantined(build(**fields, record_id=f"x{number[1:]}-7")) == "record_id_holds_number"
        assert quarantined(build(**fields, record_id=number)) == "record_id_holds_number"
    assert outcome(build(**fields, record_id="x-7"))[0] == "emit"


def test_a_record_id_that_holds_a_mail_address_is_quarantined():
    assert quarantined(sms_cdr(recipient="ann@example.org", record_id="for-ann@example.org")) == (
        "record_id_holds_number"
    )


class Named(NamedTuple):
    name: str
    digits: str = ""


@pytest.mark.parametrize(("direction", "primary", "other"), [("mt", PERSON, OTHER), ("mo", OTHER, PERSON)])
def test_the_primary_person_is_who_gets_an_outbound_and_who_sends_an_inbound(direction, primary, other):
    record = decode(raw(voice_cdr(direction=direction, sender=OTHER, recipient=PERSON)))
    assert parties(record, Named(OTHER), Named(PERSON)) == (Named(primary), Named(other))


def test_the_primary_person_of_a_preference_is_who_sends_it():
    found = parties(decode(raw(preference(direction="mt"))), Named("person"), Named("sender id"))
    assert found == (Named("person"), Named("sender id"))


# --- what an error shows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"purpose": "s3cret"}, {"s3cret": 1}, {"occurred_at": "s3cret"}, {"price": {"amount": "s3cret"}},
     {"type": "s3cret"}, {"attributes": {"s3cret": 1}}, {"channel": "s3cret"}, {"v": "s3cret"}],
)  # fmt: skip
def test_an_error_shows_nothing_of_the_record(fields):
    with pytest.raises(Poison) as caught:
        decode(raw(sms_cdr(**fields)))
    shown = [str(caught.value), repr(caught.value), str(caught.value.args), str(vars(caught.value))]
    shown += traceback.format_exception(caught.value)
    assert not [text for text in shown if "s3cret" in text]


def test_every_reason_is_a_code_without_anything_of_the_record():
    assert all(reason.replace("_", "").replace(":", "").isalpha() for reason in REASONS)
