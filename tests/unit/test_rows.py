"""What stands in the clear beside an entry does not say whose it is."""

import pytest

from schemas.fields import normalise
from streams.rows import spells_out


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("+12015550123", "12015550123"),
        ("+12015550123", "CALL-2015550123"),
        ("+12015550123", "x201-555_0123/2"),
        ("+442079460018", "T02079460018"),
        ("+442079460018", "20/7946/0018a"),
        ("+9991234567", "X9991234567"),  # of no known country
        ("ann@example.org", "ANN@example.org"),
    ],
)
def test_a_number_is_spelled_out_with_or_without_its_country_and_whatever_stands_between(number, text):
    assert spells_out(text, normalise(number))


@pytest.mark.parametrize("text", ["", "ORDER-7", "CASE-5550123", "acme", "x201-555-0124"])
def test_what_shares_a_few_digits_does_not(text):
    assert not spells_out(text, normalise("+12015550123"))
