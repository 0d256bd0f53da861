"""What digits say: region, premium rate, emergency."""

import phonenumbers
import pytest

from processors.screen.destination import ANYWHERE, place_of, place_of_number
from schemas.fields import normalise

ALL_OF_PLUS_1 = frozenset(phonenumbers.COUNTRY_CODE_TO_REGION_CODE[1])


def forbidden(text, country=None):
    return place_of(normalise(text, country), country).forbidden


# --- whose number it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "regions"),
    [
        ("+14155550123", {"US"}), ("+14165550123", {"CA"}), ("+18765291234", {"JM"}), ("+17872345678", {"PR"}),
        ("+442079460958", {"GB"}), ("+441481960194", {"GG"}), ("+447781123456", {"GG"}), ("+447797123456", {"JE"}),
        ("+79123456789", {"RU"}), ("+77012345678", {"KZ"}), ("+390669812345", {"VA"}), ("+390612345678", {"IT"}),
        ("+4915112345678", {"DE"}), ("+6581234567", {"SG"}), ("+35818123456", {"AX"}),
    ],
)  # fmt: skip
def test_the_digits_of_a_number_say_whose_it_is(number, regions):
    assert place_of_number(number).regions == regions


@pytest.mark.parametrize("number", ["+18005550123", "+15005550006", "+10000000000", "+1415555012", "+12125"])
def test_a_number_under_a_shared_code_that_says_nothing_may_be_anywhere_there(number):
    assert place_of_number(number) == (False, ALL_OF_PLUS_1)


@pytest.mark.parametrize("number", ["+80012345678", "+88216123456", "+99912345678", "+0", "+", "", "x"])
def test_a_number_of_no_country_has_no_region(number):
    assert place_of_number(number) == ANYWHERE


def test_the_region_is_what_the_library_says_of_every_example():
    checked = 0
    for region in phonenumbers.SUPPORTED_REGIONS:
        for kind in (phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.MOBILE):
            example = phonenumbers.example_number_for_type(region, kind)
            if example is not None:
                number = phonenumbers.format_number(example, phonenumbers.PhoneNumberFormat.E164)
                place = place_of_number(number)
                assert phonenumbers.region_code_for_number(example) in place.regions
                assert len(place.regions) == 1
                assert not place.forbidden, region
                checked += 1
    assert checked > 400


# --- never -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["+1 900 555 0199", "+19005550199", "+1900555019", "+190055501999", "+1 911 555 0199", "+44 9", "+44 909 879 0000",
     "+449098790000", "+44909879", "+49 900 1 123456", "+4990011234567890", "+979 1 2345 6789", "+33 897 123 456"],
)  # fmt: skip
def test_premium_rates_are_never_a_destination(text):
    number = "".join(char for char in text if char in "+0123456789")
    assert place_of_number(number).forbidden


def test_what_the_library_calls_premium_is_never_a_destination_in_any_region():
    checked = 0
    for region in phonenumbers.SUPPORTED_REGIONS:
        example = phonenumbers.example_number_for_type(region, phonenumbers.PhoneNumberType.PREMIUM_RATE)
        if example is None:
            continue
        assert phonenumbers.number_type(example) == phonenumbers.PhoneNumberType.PREMIUM_RATE
        number = phonenumbers.format_number(example, phonenumbers.PhoneNumberFormat.E164)
        assert place_of_number(number).forbidden, region
        national = phonenumbers.format_number(example, phonenumbers.PhoneNumberFormat.NATIONAL)
        if phonenumbers.is_valid_number_for_region(example, region) and len(number) > 8:
            assert forbidden(national, region), region
        checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("text", "country"),
    [
        ("911", None), ("112", None), ("999", None), ("000", None), ("911", "DE"), ("110", "DE"), ("9-1-1", "US"),
        ("９１１", None), ("٩١١", None), ("+911", None), ("+112", None), ("+1 911", None), ("+1911", "US"),
        ("1911", "US"), ("+44 999", None), ("44999", "GB"), ("0044999", None), ("00 44 999", None),
        ("+49 (0) 112", None), ("+49112", "DE"), ("tel:911", None), ("tel:112;phone-context=+49", None),
        ("sip:911@example.org", None), ("sip:+1911@example.org", None), ("sip:999@x;user=phone", "GB"),
        ("tel:+1-911", None), ("+61 000", None), ("911#", None), ("*911", None), ("911,1", None), ("911x5", None),
        ("911 ext. 7", None), ("911;ext=1", "US"), ("“112”", None), ("(+1) 911,,2", None), ("999/Front desk", "GB"),
    ],
)  # fmt: skip
def test_emergency_numbers_are_never_a_destination_in_any_spelling(text, country):
    assert forbidden(text, country)


def test_the_emergency_numbers_of_every_region_are_never_a_destination_there():
    checked = 0
    for region in phonenumbers.SUPPORTED_REGIONS:
        metadata = phonenumbers.PhoneMetadata.short_metadata_for_region(region)
        if metadata is None or metadata.emergency is None or not metadata.emergency.example_number:
            continue
        digits = metadata.emergency.example_number
        assert forbidden(digits, region), region
        assert len(digits) > 3 or forbidden(digits), region
        code = phonenumbers.country_code_for_region(region)
        assert len(digits) > 3 or forbidden(f"+{code} {digits}"), region
        checked += 1
    assert checked > 200


@pytest.mark.parametrize(
    ("text", "country"),
    [
        ("24273", "US"), ("12345", None), ("91100", "US"), ("60333", "GB"), ("44999", "US"), ("1911", None),
        ("ACME", None), ("", None), ("ann@example.org", None), ("911@example.org", None), ("sip:ann911@x.org", None),
        ("911ACME", None), ("ACME 911", None), ("911xbox", None), ("12345#", None),
        ("+14155550123", None), ("a" * 300, None), ("+9990", None),
    ],
)  # fmt: skip
def test_what_is_neither_may_be_sent_to(text, country):
    assert not forbidden(text, country)


def test_a_short_number_at_a_premium_rate_is_no_destination_in_its_country():
    checked = 0
    for region in phonenumbers.SUPPORTED_REGIONS:
        metadata = phonenumbers.PhoneMetadata.short_metadata_for_region(region)
        example = metadata and metadata.premium_rate and metadata.premium_rate.example_number
        if example and len(example) <= 6:
            assert forbidden(example, region), region
            checked += 1
    assert checked > 30
