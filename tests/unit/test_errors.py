"""What an error shows of the place that it names."""

import pytest

from schemas.errors import InputInvalid


@pytest.mark.parametrize(
    "name",
    ["+447700900123", "+44-7700-900123", "+44 7700 900123", "(020) 7946.0123", "447700900123.toml", "0171/2345678"],
)
def test_a_path_that_may_be_a_number_is_not_repeated(name):
    shown = str(InputInvalid("there is no such file", file=f"/srv/data/{name}"))
    assert shown.startswith("there is no such file (file=/srv/data/")
    assert "…" in shown
    for digits in ("7700", "900123", "7946", "2345678"):
        assert digits not in shown


@pytest.mark.parametrize(
    "place",
    ["/srv/2026-11/data-12/keys.db", "192.168.100.200:9092,10.120.130.140:9092", "https://10.120.130.140:8200"],
)
def test_any_other_place_is_shown_whole(place):
    assert str(InputInvalid("no", log=place, partition=12345678)) == f"no (log={place} partition=12345678)"
