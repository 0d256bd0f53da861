"""Normalising without mercy: one person in every spelling, never two in one, and never an exception."""

import re
import unicodedata
from urllib.parse import quote

import phonenumbers
from hypothesis import assume, example, given
from hypothesis import strategies as st

from schemas import fields
from schemas.fields import Kind, normalise
from tests.support.records import examples

REGIONS = sorted(phonenumbers.SUPPORTED_REGIONS)
INVISIBLE = ["", "\u200b", "\u200e", "\u200f", "\u202a", "\u202c", "\u2060", "\u2066", "\ufeff", "\u00ad"]
DIGITS = ["0123456789", "０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "۰۱۲۳۴۵۶۷۸۹", "०१२३४५६७८९", "৭৮৯০১২৩৪৫৬", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗"]
DIGITS = [texts for texts in DIGITS if [unicodedata.decimal(char) for char in texts] == list(range(10))]
GAPS = [" ", "-", ".", "\u00a0", "\u2011", "/", "  ", "\u2212", "_"]


@st.composite
def people(draw):
    """A valid number of any region, with the region."""
    region = draw(st.sampled_from(REGIONS))
    kind = draw(st.sampled_from([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE]))
    example_number = phonenumbers.example_number_for_type(region, kind)
    assume(example_number is not None)
    national = phonenumbers.national_significant_number(example_number)
    changed = national[:-4] + f"{draw(st.integers(0, 9999)):04}"
    number = phonenumbers.parse(f"+{example_number.country_code}{changed}")
    assume(phonenumbers.is_valid_number(number))
    return number, region


@st.composite
def spellings(draw, number, region):
    """One way in which a gateway may write a number of which it knows the region."""
    e164 = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    written = draw(st.sampled_from(["plus", "plus", "zeros", "national", "international", "pluses", "bare"]))
    if written == "national":
        text = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)
        assume(sum(map(str.isdigit, text)) >= 7)  # fewer are a short code
        again = phonenumbers.parse(text, region)
        # the library itself does not read every national form back in every region that shares a code
        assume(again == number and phonenumbers.is_valid_number(again))
    elif written == "international":
        text = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.INTERNATIONAL)
    elif written == "zeros":
        text = "00" + e164[1:]
    elif written == "pluses":
        text = "+" + e164
    elif written == "bare" and len(e164) > 10:
        text = e164[1:]
        assume(normalise(text).value == e164)  # without + it may be read as national first
        region = None
    else:
        text = e164
    gap, digits = draw(st.sampled_from(GAPS)), draw(st.sampled_from(DIGITS))
    at = draw(st.integers(2, len(text) - 1))
    text = text[:at] + gap + text[at:]
    text = text.translate({48 + at: digit for at, digit in enumerate(digits)})
    hidden = draw(st.sampled_from(INVISIBLE))
    text = hidden + text + hidden + draw(st.sampled_from(["", "", " ext. 12", ",,123", "x7", " доб. 5"]))
    around = draw(st.sampled_from(["{}", "{}", " {}\t", "tel:{}", "sip:{}@gw.example.org", "sips:{};npdi=yes@x:5061",
                                   "Ann <sip:{}@x>", "tel:{};isub=1"]))  # fmt: skip
    if "sip" in around and draw(st.booleans()):
        text = quote(text)
    return around.format(text), region


@examples(1500)
@given(people(), st.data())
def test_one_person_is_one_party_in_every_spelling(person, data):
    number, region = person
    text, assumed = data.draw(spellings(number, region))
    e164 = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    assert normalise(e164).value == e164
    assert normalise(text, assumed) == normalise(e164)


@examples(600)
@given(people(), st.data())
def test_a_national_prefix_behind_the_calling_code_makes_no_second_person(person, data):
    number, _ = person
    metadata = phonenumbers.PhoneMetadata.metadata_for_region(phonenumbers.region_code_for_number(number))
    prefix = metadata.national_prefix
    assume(prefix and not number.italian_leading_zero)
    national = phonenumbers.national_significant_number(number)
    e164 = f"+{number.country_code}{national}"
    text = data.draw(st.sampled_from([f"+{number.country_code}{prefix}{national}",
                                      f"+{number.country_code} ({prefix}) {national}"]))  # fmt: skip
    parsed = phonenumbers.parse(text)
    assume(phonenumbers.is_valid_number(parsed))
    assert normalise(text).value == phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)
    if parsed == number:
        assert normalise(text).value == e164


@examples(600)
@given(people(), people())
def test_two_people_never_become_one(one, other):
    assume(one[0] != other[0])
    texts = [phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164) for number, _ in (one, other)]
    assert normalise(texts[0]) != normalise(texts[1])


ANY = st.text(max_size=40) | st.text(alphabet="+0123456789 ()-.@;:=,x#<>abcsiptel\u200e０٣", max_size=30)


@examples(3000)
@example("ann@bücher.example", None)
@example("Ann@BÜCHER.example", None)
@example("<", None)
@example("sip:@", None)
@example("sip:;@;", "DE")
@example("tel:", None)
@example("\u200b", None)
@example("+" * 300, "US")
@example("%", None)
@example("ß@ß.ß", None)
@example("İ", None)
@example("<<a>>", None)
@example("0@..", "AC")
@example("<S>", "AC")
@example("tel:<unknown>", None)
@given(ANY, st.sampled_from([*REGIONS, None, "ZZ", "001"]))
def test_normalising_never_raises_and_a_normal_form_is_its_own(text, region):
    party = normalise(text, region)
    assert isinstance(party.kind, Kind)
    again = normalise(party.value, region)
    assume(not {"<", ">"} & set(party.value))  # of no address: brackets within brackets
    assert again.value == party.value
    assert normalise(text, region) == party
    if party.kind is Kind.NUMBER:
        assert re.fullmatch(r"\+[1-9][0-9]{4,14}", party.value)
        assert again == party


@examples(300)
@given(st.text(max_size=20), st.sampled_from(["DE", "US", None]))
def test_what_was_asked_before_changes_no_answer(text, region):
    first = normalise(text, region)
    fields._recent.clear()
    fields._normalise_slowly.cache_clear()
    assert normalise(text, region) == first


def test_the_caches_are_bounded():
    for index in range(fields._RECENT + 10):
        normalise(f"+1415{index:07}")
    assert len(fields._recent) <= fields._RECENT
    assert fields._normalise_slowly.cache_info().maxsize == 16384
    assert len(fields._well_formed) <= 1000
