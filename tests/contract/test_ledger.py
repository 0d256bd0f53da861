"""What the ledger of every key store promises (streams/keys/ledger.py)."""

import pytest

from schemas.fields import PLATFORM
from streams.keys.ledger import Head, Mark, Request
from tests.support.keys import NOW

TOKENS = (b"a" * 16, b"b" * 16)
RESTRICTION = Mark("1" * 32, "restriction", PLATFORM, TOKENS, "CASE-1", NOW)
HOLD = Mark("2" * 32, "hold", "acme", (), "CASE-2", NOW + 1, NOW - 10, NOW + 10)
REQUEST = Request("3" * 32, "erase", PLATFORM, "CASE-3", NOW, NOW + 86_400, NOW + 15 * 86_400, {"acme": None, "b": NOW})


@pytest.fixture
def ledger(deployment):
    return deployment.open().ledger


def test_marks_are_found_by_kind_oldest_first_by_every_instance(deployment, ledger):
    later = RESTRICTION._replace(id="0" * 32, at_s=NOW + 5, tokens=TOKENS[:1])
    for mark, number in ((later, None), (RESTRICTION, "+14155550101"), (HOLD, None)):
        ledger.add_mark(mark, number)
    other = deployment.open().ledger
    assert other.marks("restriction") == [RESTRICTION, later]
    assert other.marks("hold") == [HOLD]
    assert other.number_of(RESTRICTION.id) == "+14155550101"
    assert other.number_of(HOLD.id) is None


def test_a_mark_added_twice_is_one(ledger):
    for _ in range(2):
        ledger.add_mark(RESTRICTION, "+14155550101")
    assert ledger.marks("restriction") == [RESTRICTION]


def test_an_ended_mark_keeps_neither_tokens_nor_number_and_stays_for_evidence(deployment, ledger):
    ledger.add_mark(RESTRICTION, "+14155550101")
    for at_s in (NOW + 7, NOW + 9):
        ledger.end_mark(RESTRICTION.id, at_s)
    other = deployment.open().ledger
    assert other.marks("restriction") == []
    assert other.marks("restriction", ended=True) == [RESTRICTION._replace(tokens=(), ended_s=NOW + 7)]
    assert other.number_of(RESTRICTION.id) is None
    assert deployment.run("SELECT * FROM mark_tokens") == []
    ledger.retoken(RESTRICTION.id, TOKENS)
    assert deployment.run("SELECT * FROM mark_tokens") == []


def test_all_marks_include_those_in_force(ledger):
    ledger.add_mark(HOLD, None)
    ledger.add_mark(HOLD._replace(id="4" * 32, at_s=NOW + 2), None)
    ledger.end_mark(HOLD.id, NOW + 3)
    assert [mark.ended_s for mark in ledger.marks("hold", ended=True)] == [NOW + 3, None]


def test_a_mark_gets_the_tokens_of_all_keys_in_their_order(deployment, ledger):
    ledger.add_mark(RESTRICTION, "+14155550101")
    for tokens in ((b"z" * 16, *TOKENS), (b"c" * 16,)):
        ledger.retoken(RESTRICTION.id, tokens)
        assert deployment.open().ledger.marks("restriction") == [RESTRICTION._replace(tokens=tokens)]


def test_no_number_stands_in_the_tables(deployment, ledger):
    ledger.add_mark(RESTRICTION, "+14155550101")
    for table in ("marks", "mark_tokens", "secrets"):
        assert "14155550101" not in str(deployment.run(f"SELECT * FROM {table}"))
    assert "14155550101" not in repr(ledger.marks("restriction"))
    assert "aaaa" not in repr(ledger.marks("restriction"))


def test_requests_are_listed_by_due_time_until_they_are_closed(deployment, ledger):
    sooner = REQUEST._replace(id="9" * 32, kind="access", due_s=NOW + 5)
    for request in (REQUEST, sooner):
        ledger.put_request(request)
    other = deployment.open().ledger
    assert other.requests() == [sooner, REQUEST]
    done = REQUEST._replace(notify={"acme": NOW + 1, "b": NOW}, closed_s=NOW + 2, outcome="done")
    other.put_request(done)
    assert ledger.requests() == [sooner]
    assert ledger.requests(closed=True) == [sooner, done]


def test_corrections_are_found_by_the_place_of_the_record_oldest_first(deployment, ledger):
    for at_offset in (900, 30, 30):
        ledger.add_correction("cdr.pii", 1, 7, at_offset)
    ledger.add_correction("cdr.pii", 2, 7, 8)
    ledger.add_correction("content", 1, 7, 9)
    other = deployment.open().ledger
    places = [(1, place) for place in range(1000)]
    assert other.corrections("cdr.pii", places) == {(1, 7): [30, 900]}
    assert other.corrections("cdr.pii", [(2, 7), (1, 7)]) == {(1, 7): [30, 900], (2, 7): [8]}
    assert other.corrections("cdr.pii", []) == other.corrections("held", places) == {}


def test_how_far_a_job_got_is_kept_and_forgotten_by_prefix(deployment, ledger):
    for name, value in (("hold/1/0", 5), ("hold/1/1", 6), ("hold/1/0", 2**40), ("hold_1/0", 1), ("access/1", 7)):
        ledger.set_progress(name, value)
    other = deployment.open().ledger
    assert [other.progress(name) for name in ("hold/1/0", "hold/1/1", "nothing")] == [2**40, 6, None]
    other.drop_progress("hold/1/")
    found = [ledger.progress(name) for name in ("hold/1/0", "hold/1/1", "hold_1/0", "access/1")]
    assert found == [None, None, 1, 7]


def test_an_older_head_never_replaces_a_newer_one(deployment, ledger):
    newer, older = Head("writer-b", 7, "f" * 64, NOW), Head("writer-b", 6, "e" * 64, NOW + 9)
    first = Head("writer-a", 1, "d" * 64, NOW)
    for head in (newer, older, first, newer._replace(digest="0" * 64)):
        ledger.put_head(head)
    assert deployment.open().ledger.heads() == [first, newer]


def test_a_head_is_dropped_only_while_it_is_still_the_last(ledger):
    ledger.put_head(Head("writer", 7, "f" * 64, NOW))
    ledger.drop_head("writer", 6)
    assert len(ledger.heads()) == 1
    ledger.drop_head("writer", 7)
    assert ledger.heads() == []
