"""Instants as arguments."""

import pytest

from schemas.errors import InputInvalid
from streams.cli.times import instant_s


@pytest.mark.parametrize(
    ("text", "at_s"),
    [
        ("1970-01-01", 0),
        ("2026-11-21", 1795219200),
        ("2026-11-21T14:00:00Z", 1795269600),
        ("2026-11-21t14:00:00z", 1795269600),
        ("2026-11-21 15:30:00.9+01:30", 1795269600),
        ("8999-12-31T23:59:59Z", 221845391999),
    ],
)
def test_an_instant_is_rfc_3339_or_a_date(text, at_s):
    assert instant_s(text) == at_s


@pytest.mark.parametrize(
    "text",
    [
        "", "2026-W01-1", "20261121", "2026-10-21T14", "2026-11-21T140000Z", "2026-11-21T14:00:00", "2026-325",
        "2026-02-30", "2026-11-21T25:00:00Z", "2026-11-21T14:00:00+0100", "２０２６-11-21", "now", "+447700900123",
        "2026-11-21T14:00:00Z\n",
    ],
)  # fmt: skip
def test_nothing_else_is_an_instant(text):
    with pytest.raises(InputInvalid, match="a time ") as raised:
        instant_s(text)
    assert not text or text not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "0001-01-01", "0001-01-01T00:00:00+14:00", "1969-12-31T23:59:59Z", "1970-01-01T00:00:00+00:01", "9000-01-01",
        "9999-12-31T23:59:59-14:00",
    ],
)  # fmt: skip
def test_an_instant_is_of_a_year_that_can_be_counted_from(text):
    with pytest.raises(InputInvalid, match="1970 to 8999"):
        instant_s(text)
