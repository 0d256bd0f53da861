from typing import Annotated, get_args

import msgspec
import pytest

from schemas.fields import (
    NOBODY,
    PERSONAL_KINDS,
    Classified,
    Kind,
    Party,
    PrivacyClass,
    canonical_amount,
    classes_of,
    field_class,
    is_account,
    is_code,
    is_reason,
    is_record_id,
    normalise,
)
from schemas.inbound import CODE_FIELDS, SMS_FIELDS, VOICE_FIELDS, Cdr, Communication, Preference, Price, Request

# --- privacy classes ----------------------------------------------------------------------------------------


def test_a_field_without_a_class_cannot_be_defined():
    for annotation in (str, Annotated[str, "text"], Annotated[str, msgspec.Meta(max_length=5)]):
        with pytest.raises(TypeError, match="has no privacy class"):
            type("Bad", (Classified,), {"__annotations__": {"name": annotation}})


def test_one_field_has_one_class_over_all_record_types():
    class One(Classified):
        name: Annotated[str, field_class(PrivacyClass.PERSON)]

    class Two(Classified):
        name: Annotated[str, field_class(PrivacyClass.CONTENT)]

    assert classes_of(One) == {"name": PrivacyClass.PERSON}
    with pytest.raises(TypeError, match="two privacy classes"):
        classes_of(One, Two)


def test_every_field_of_every_record_type_has_a_class():
    names = {name for kind in (Request, Cdr, Preference) for name in kind.__struct_fields__}
    assert set(classes_of(Request, Cdr, Preference)) == names


def test_the_fields_of_a_channel_and_the_codes_are_fields_of_a_communication():
    assert set(SMS_FIELDS) | set(VOICE_FIELDS) == set(Communication.__annotations__)
    assert set(CODE_FIELDS) < set(Communication.__struct_fields__)


def test_what_a_record_shows_of_itself_is_its_type():
    record = msgspec.convert(
        {"v": 1, "type": "cdr", "channel": "sms", "record_id": "r", "account_id": "a", "direction": "mt",
         "occurred_at": "2026-11-21T00:00:00Z", "sender": "s3cret", "recipient": "s3cret", "content": "s3cret"},
        Cdr,
    )  # fmt: skip
    assert (repr(record), str(record)) == ("Cdr()", "Cdr()")
    assert repr(normalise("+4915112345678")) == "Party(number)"


# --- codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "DELIVRD", "route-7", "a:b/c.d_e-f", "0", "123456", "12-34-56", "x" * 32])
def test_a_code_may_stand_in_the_clear(text):
    assert is_code(text)


@pytest.mark.parametrize(
    "text",
    ["", " a", "-a", "x" * 33, "route 7", "a ", "a\n", "é", "a,b", "a+b", "a@b", "(1)", "1234567", "x1234567",
     "123-4567", "1 2 3 4 5 6 7", "1.2.3.4.5.6.7", "12/34:56_7", "1 - 234567", "a\x00", "٣"],
)  # fmt: skip
def test_what_could_hold_a_number_or_a_text_is_no_code(text):
    assert not is_code(text)


@pytest.mark.parametrize(
    "text", ["a", "egress", "CASE-2026-117", "TICKET-1234567", "INC0012345", "CASE-7/a_b", "123456", "12-34", "x" * 40]
)
def test_a_code_or_case_reference_is_a_reason(text):
    assert is_reason(text)


@pytest.mark.parametrize(
    "text",
    ["", "he asked", "a\n", "é", "x" * 41, "+14155550101", "14155550101", "0044-7700-900123", "1/4/1/5/5/5/5",
     "_1415_555__0101_", "2026-117", "1" * 40, "1234567\n", "٣"],
)  # fmt: skip
def test_free_text_and_what_may_be_a_number_are_no_reason(text):
    assert not is_reason(text)


@pytest.mark.parametrize("text", ["a", "A.b_c-d", "0", "x" * 64, "4915112345678"])
def test_an_account_id(text):
    assert is_account(text)


@pytest.mark.parametrize("text", ["", "-a", ".a", "x" * 65, "a b", "a/b", "a|b", "a:b", "é", "a\n"])
def test_no_account_id(text):
    assert not is_account(text)


def test_a_record_id_is_printable_ascii():
    assert all(map(is_record_id, ("a", " ", '"\\', "x" * 128)))
    assert not any(map(is_record_id, ("", "x" * 129, "\n", "a\x7f", "é", "a\n", "\ud800")))


# --- parties ------------------------------------------------------------------------------------------------

SAME_PERSON = [
    "+4915112345678", " +4915112345678 ", "+49 151 12345678", "+49-151-12345678",
    "004915112345678", "0049 151 12345678", "4915112345678", "49 151 1234 5678", "+49.151.12345678",
    "\uff0b\uff14\uff19\uff11\uff15\uff11\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18", "tel:+4915112345678",
    "sip:+4915112345678@example.org", "sips:+4915112345678;user=phone@example.org", "\u200e+4915112345678\u200f",
    "+004915112345678", "+49\u00a0151\u00a012345678", "+49\u2011151\u201112345678", "+4915112345678 ext. 12",
    "+49 (0)151 12345678", "+4915112345678,,123",
    "+49015112345678", "++49 151 12345678", "+ 49 (151) 123 45 678", "+49[151]12345678", "+49_151_12345678",
    "+4915112345678x12", "+4915112345678 extension 12", "+4915112345678#7", "+4915112345678;ext=12",
    "\u202a+49 151 12345678\u202c", "\u2066+49\u200b15112345678\u2069", "\ufeff+4915112345678", "+49\u00ad15112345678",
    "\u2795491511234\u202f5678", "+49\u2212151\u221212345678",
    "+\u0664\u0669\u0661\u0665\u0661\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668",
    "+4\ufe0f\u20e39\ufe0f\u20e315112345678", "tel:+49-151-12345678", "TEL:+4915112345678;isub=12345",
    "tel:0151-12345678;phone-context=+49", "tel:15112345678;phone-context=+49", "tel:%2B4915112345678",
    "sip:%2B4915112345678@example.org", "sip:+4915112345678;phone-context=+49@x.org;user=phone",
    "sip:0151%2012345678;phone-context=+49@x.org:5061;transport=tls?subject=x",
    "SIPS:004915112345678@[2001:db8::1]:5061",
    '"Ann" <sip:+4915112345678@example.org>;tag=1', "<tel:+4915112345678>", "Ann <+49 151 12345678>",
]  # fmt: skip


@pytest.mark.parametrize("text", SAME_PERSON)
def test_one_number_however_written_is_one_person(text):
    assert normalise(text) == Party(Kind.NUMBER, "+4915112345678", True)


@pytest.mark.parametrize(
    ("text", "region", "value"),
    [
        ("0151 12345678", "DE", "+4915112345678"),
        ("(415) 555-0123", "US", "+14155550123"),
        ("415.555.0123", "US", "+14155550123"),
        ("020 7946 0958", "GB", "+442079460958"),
        ("+4915112345678", "US", "+4915112345678"),
        ("0044 20 7946 0958", "DE", "+442079460958"),
        ("06 12 34 56 78", "FR", "+33612345678"),
        ("\uff10\uff11\uff15\uff11 12345678", "DE", "+4915112345678"),
        ("011 49 151 12345678", "US", "+4915112345678"),
        ("1 (415) 555-0123 x9", "US", "+14155550123"),
        ("8 (912) 345-67-89", "RU", "+79123456789"),
        ("06 698 12345", "IT", "+390669812345"),
        ("+39 06 698 12345", None, "+390669812345"),
        ("+34 (0) 612 345 678", None, "+34612345678"),
        ("+44 (0)20 7946 0958", "US", "+442079460958"),
        ("tel:7042;phone-context=+1-415-555", None, "+14155557042"),
    ],
)
def test_a_national_number_is_read_as_of_its_region(text, region, value):
    assert normalise(text, region) == Party(Kind.NUMBER, value, True)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("ACME", Kind.ALPHANUMERIC, "ACME"),
        ("Shop 24/7", Kind.ALPHANUMERIC, "Shop 24/7"),
        ("12345", Kind.SHORT_CODE, "12345"),
        ("7", Kind.SHORT_CODE, "7"),
        ("Ann@Example.ORG", Kind.EMAIL, "ann@example.org"),
        ("mailto:Ann@Example.ORG", Kind.EMAIL, "ann@example.org"),
        ("Ann Lee <Ann@example.org>", Kind.EMAIL, "ann@example.org"),
        ("ann@example.org.", Kind.EMAIL, "ann@example.org"),
        ("ann@B\u00dcCHER.example", Kind.EMAIL, "ann@xn--bcher-kva.example"),
        ("ann@bu\u0308cher\u3002example", Kind.EMAIL, "ann@xn--bcher-kva.example"),
        ("ann@XN--bcher-KVA.example", Kind.EMAIL, "ann@xn--bcher-kva.example"),
        ("ann@stra\u00dfe.example", Kind.EMAIL, "ann@xn--strae-oqa.example"),
        ("ann@strasse.example", Kind.EMAIL, "ann@strasse.example"),
        ("ann+news@example.org", Kind.EMAIL, "ann+news@example.org"),
        ("\u200eann@example.org\u200f", Kind.EMAIL, "ann@example.org"),
        ("sip:ann@example.org:5060;transport=udp", Kind.SIP, "ann@example.org"),
        ("sip:ann:secret@Example.org?x=y", Kind.SIP, "ann@example.org"),
        ("sip:1001@pbx.example", Kind.SIP, "1001@pbx.example"),
        ("sip:pbx.example", Kind.SIP, "pbx.example"),
        ("tel:911", Kind.SHORT_CODE, "911"),
        ("9-1-1", Kind.SHORT_CODE, "911"),
        ("\u0661\u0662\u0663\u0664\u0665", Kind.SHORT_CODE, "12345"),
        ("+1 911", Kind.UNKNOWN, "+1911"),
        ("0151 12345678", Kind.UNKNOWN, "015112345678"),
        ("1800FLOWERS", Kind.ALPHANUMERIC, "1800FLOWERS"),
        ("1-800-FLOWERS", Kind.UNKNOWN, "1-800-flowers"),
        ("AC\u200bME", Kind.ALPHANUMERIC, "ACME"),
        ("sip:Ann@example.org", Kind.SIP, "ann@example.org"),
        ("a name of somebody", Kind.UNKNOWN, "a name of somebody"),
        ("Ärzte", Kind.UNKNOWN, "ärzte"),
        ("123456789", Kind.UNKNOWN, "123456789"),
        ("+" + "9" * 20, Kind.UNKNOWN, "+" + "9" * 20),
        ("a\x00b", Kind.UNKNOWN, "a\x00b"),
        ("😀", Kind.UNKNOWN, "😀"),
        ("A1234567", Kind.UNKNOWN, "a1234567"),
    ],
)
def test_what_is_no_number_has_its_kind(text, kind, value):
    assert normalise(text) == Party(kind, value, kind in PERSONAL_KINDS)


@pytest.mark.parametrize(
    "text", ["", " ", "\t", "anonymous", "Anonymous", "RESTRICTED", "<unknown>", "unavailable", "s"]
)
def test_nobody_is_nobody(text):
    assert normalise(text) == NOBODY
    assert not NOBODY.is_person


def test_persons_are_behind_numbers_addresses_and_the_unknown():
    assert {Kind.NUMBER, Kind.EMAIL, Kind.SIP, Kind.UNKNOWN} == PERSONAL_KINDS


# --- money --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "0"), ("0.00", "0"), ("000", "0"), ("1.50", "1.5"), ("100", "100"), ("000000100", "100"),
        ("0.000000001", "0.000000001"), ("123456789.123456789", "123456789.123456789"),
        ("999999999.999999999", "999999999.999999999"), ("1.000000000", "1"), ("10.10", "10.1"),
    ],
)  # fmt: skip
def test_an_amount_is_written_in_one_way(amount, text):
    assert canonical_amount(amount) == text


@pytest.mark.parametrize(
    "amount",
    ["-1", "-0", "+1", "NaN", "sNaN", "Infinity", "1e9", "1E+8", "0e-9999999", "1e-999999999", "1000000000",
     "0.0000000001", "1.0000000001", "1." + "0" * 40 + "15551234567", "1" + "0" * 40, "", " 1", "1\n", ".5", "1.",
     "1,5", "1_0", "0x1", "٣", "1.5.2"],
)  # fmt: skip
def test_an_amount_that_is_out_of_range_or_could_carry_more_than_money_is_none(amount):
    assert canonical_amount(amount) is None


def test_money_is_never_a_float():
    kinds = get_args(Price.__annotations__["amount"])
    assert kinds[0] is str
