"""Files of entries, page by page; and what stands in the clear beside an entry does not say whose it is."""

import gc

import pytest

from schemas.fields import normalise
from streams.rows import pages, spells_out

COLUMNS = ("number", "account")
FILE = [b"\xef\xbb\xbfaccount, Number\n", b"acme,+1\n", b"\n", b" ,+2\r\n", b"acme\n", b"acme,+\xff\n", b"acme,+3"]


def read(size, told=None):
    """Return the pages of the file, `told` of how far each is read."""
    advance = (lambda _: None) if told is None else told.append
    return [[(line.number, line.given) for line in page] for page in pages(FILE, COLUMNS, ("number",), size, advance)]


def test_a_line_has_its_number_in_the_file_whatever_the_page_and_what_is_none_says_so():
    lines = [
        (2, {"account": "acme", "number": "+1"}),
        (4, {"number": "+2"}),
        (5, None),
        (6, None),
        (7, {"account": "acme", "number": "+3"}),
    ]
    assert read(2) == [lines[:1], lines[1:3], lines[3:]]
    assert read(100) == [lines]


def test_bytes_are_told_once_what_was_in_them_is_done():
    told: list[int] = []
    walk = pages(FILE, COLUMNS, ("number",), 2, told.append)
    next(walk)
    assert sum(told) == len(FILE[0])
    next(walk)
    assert sum(told) == sum(map(len, FILE[:3]))
    list(walk)
    assert sum(told) == sum(map(len, FILE))


def test_what_a_page_leaves_in_memory_is_not_looked_through_again_until_the_file_ends():
    walk = pages(FILE, COLUMNS, ("number",), 2, lambda _: None)
    next(walk)
    assert gc.get_freeze_count() == 0
    next(walk)
    assert gc.get_freeze_count() > 0
    walk.close()
    assert gc.get_freeze_count() == 0


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
