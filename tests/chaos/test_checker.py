"""The checker of the faults against what is wrong on purpose: it finds each kind, and nothing where all is well."""

import base64
import copy
from itertools import islice

import pytest

from schemas.catalog import CATALOG, INPUTS
from streams.publish import route
from tests.support.checker import OUTPUTS, Evidence, Row, check
from tests.support.commands import Place
from tests.support.history import ADDRESS, ID, NUMBER, WORD, Outcome, Sent, records, texts
from tests.support.records import raw

PARTITIONS = 4
COUNT = 400


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the evidence of a run in which nothing went wrong."""
    place = Place(tmp_path_factory.mktemp("checker"))
    published = list(islice(records(5), COUNT))
    place.publish(*published)
    assert place.work() == COUNT
    committed = {(stream, partition): [] for stream in (*INPUTS, *OUTPUTS) for partition in range(PARTITIONS)}
    for record in published:
        to = route(raw(record))
        rows = committed[to.stream, to.partition(raw(record), PARTITIONS)]
        rows.append(Row(len(rows), to.key or b"", b"", raw(record)))
    shown = {}
    for stream in OUTPUTS:
        for one in place.stored(stream):
            committed[stream, one.partition].append(Row(one.offset, one.key or b"", b"", one.value))
        shown[stream] = place.tail(stream, *(("--reveal", "--reason", "T-1") if CATALOG[stream].domain else ()))
    place.close()
    ends = {place: len(rows) for place, rows in committed.items()}
    positions = {place: end for place, end in ends.items() if place[0] in INPUTS}
    sent = [Sent(record, Outcome.DONE, at // 30) for at, record in enumerate(published)]
    return Evidence(sent, committed, copy.deepcopy(committed), shown, positions, ends)


@pytest.fixture
def evidence(whole):
    return copy.deepcopy(whole)


def rows_of(evidence, stream):
    """Return a partition of a stream that has several rows: its place."""
    return max(
        (place for place in evidence.committed if place[0] == stream), key=lambda at: len(evidence.committed[at])
    )


def row_gone(evidence, stream):
    """Take a row out of a stream, wherever it is seen."""
    line = evidence.shown[stream].pop()
    place = (stream, line["partition"])
    for some in (evidence.committed, evidence.written):
        some[place][:] = [row for row in some[place] if row.offset != line["offset"]]


def row_twice(evidence, stream):
    """Have a row of a stream a second time."""
    line = copy.deepcopy(evidence.shown[stream][0])
    place, line["offset"] = (stream, line["partition"]), 10_000
    evidence.shown[stream].append(line)
    for some in (evidence.committed, evidence.written):
        some[place].append(some[place][0]._replace(offset=10_000))


def input_gone(evidence):
    """Have a gateway be told that something is there, which nobody ever saw."""
    evidence.sent.append(Sent({**evidence.sent[0].record, "record_id": f"{ID}never"}, Outcome.DONE, 99))


def torn(evidence):
    """Have only a part of a chunk whose outcome is unknown."""
    some = [one for one in evidence.sent if one.chunk == 3]
    evidence.sent[:] = [one._replace(outcome=Outcome.UNKNOWN) if one.chunk == 3 else one for one in evidence.sent]
    evidence.sent.append(Sent({**some[0].record, "record_id": f"{ID}never"}, Outcome.UNKNOWN, 3))


def aborted(evidence):
    """Show what a read-committed reader does not get."""
    evidence.committed[rows_of(evidence, "quarantine")].pop()


def exchanged(evidence, stream):
    """Let two records of one key change places."""
    keys = {texts(one.record): route(raw(one.record)) for one in evidence.sent}
    lines = evidence.shown[stream]
    for at, first in enumerate(lines):
        for second in lines[at + 1 :]:
            names = [
                (one["reveal"]["fields"] if stream != "verdicts" else one["value"])["record_id"]
                for one in (first, second)
            ]
            if first["partition"] == second["partition"] and len({keys[name][:2] for name in names}) == 1:
                first["offset"], second["offset"] = second["offset"], first["offset"]
                return
    raise AssertionError("no key has two records")


def leaked(evidence, stream, text, *, committed=True):
    """Let something stand in a row of a stream."""
    place = rows_of(evidence, stream)
    for some in (evidence.committed, evidence.written) if committed else (evidence.written,):
        some[place][0] = some[place][0]._replace(value=some[place][0].value + text)


def moved(evidence, by):
    """Have the workers' offsets elsewhere."""
    place = rows_of(evidence, "traffic")
    evidence.positions[place] += by


def says(evidence, stream, **fields):
    """Have a record of a stream say something else."""
    next(line for line in evidence.shown[stream] if line["reveal"]["fields"])["reveal"]["fields"].update(fields)


def decided(evidence, verdict):
    line = next(line for line in evidence.shown["verdicts"] if line["value"]["verdict"] != verdict)
    line["value"]["verdict"] = verdict


def opens(evidence):
    """Have a cleared request open although its person has opted out since."""
    next(line for line in evidence.shown["cleared"] if line["reveal"]["state"] == "denied")["reveal"]["state"] = (
        "revealed"
    )


NUMBER_BYTES = f"+{NUMBER}17".encode()
WRONG = {
    "a verdict is gone": (lambda e: row_gone(e, "verdicts"), {"lost"}),
    "a suppression is gone": (lambda e: row_gone(e, "suppressions"), {"lost"}),
    "a CDR is gone": (lambda e: row_gone(e, "cdr.pii"), {"lost", "without twin"}),
    "an anonymous CDR is gone": (lambda e: row_gone(e, "cdr.anonymous"), {"lost", "without twin"}),
    "an input is gone": (input_gone, {"lost"}),
    "a chunk is torn": (torn, {"lost"}),
    "a cleared request is there twice": (lambda e: row_twice(e, "cleared"), {"duplicated", "out of order"}),
    "a quarantined record is there twice": (lambda e: row_twice(e, "quarantine"), {"duplicated"}),
    "an anonymous CDR is there twice": (lambda e: row_twice(e, "cdr.anonymous"), {"duplicated", "without twin"}),
    "an input is there twice": (lambda e: e.sent.pop(), {"duplicated"}),
    "an aborted record is shown": (aborted, {"aborted but visible"}),
    "a committed record is not shown": (lambda e: e.shown["review"].pop(), {"lost"}),
    "two verdicts change places": (lambda e: exchanged(e, "verdicts"), {"out of order"}),
    "two CDRs change places": (lambda e: exchanged(e, "cdr.pii"), {"out of order"}),
    "two inputs change places": (lambda e: e.sent.reverse(), {"out of order"}),
    "a number stands clear": (lambda e: leaked(e, "cleared", NUMBER_BYTES), {"clear"}),
    "a number stands in base64": (lambda e: leaked(e, "verdicts", base64.b64encode(b"x" + NUMBER_BYTES)), {"clear"}),
    "a number stands in hex": (lambda e: leaked(e, "suppressions", NUMBER_BYTES.hex().encode()), {"clear"}),
    "a text stands clear": (lambda e: leaked(e, "content", WORD.encode()), {"clear"}),
    "an address stands clear": (lambda e: leaked(e, "cdr.pii", ADDRESS.encode()), {"clear"}),
    "a record id stands in an anonymous CDR": (lambda e: leaked(e, "cdr.anonymous", ID.encode()), {"clear"}),
    "a number stands in what was aborted": (
        lambda e: leaked(e, "review", NUMBER_BYTES, committed=False), {"clear"},
    ),
    "an offset is behind": (lambda e: moved(e, -1), {"not committed"}),
    "an offset is ahead of the end": (lambda e: moved(e, 1), {"not committed"}),
    "a content is another": (lambda e: says(e, "content", content="something else"), {"not as published"}),
    "a CDR is another": (lambda e: says(e, "cdr.pii", status="lost"), {"not as published"}),
    "an opt-out is not heeded": (lambda e: decided(e, "cleared"), {"not as published"}),
    "a request is refused for nothing": (lambda e: decided(e, "refused"), {"not as published"}),
    "a request opens after an opt-out": (opens, {"not as published"}),
}  # fmt: skip


def test_nothing_is_wrong_where_nothing_is(whole):
    verdict = check(whole)
    assert not verdict.wrong.total(), str(verdict)
    assert verdict.counts["published"] == verdict.counts["committed"] == COUNT
    assert all(whole.shown.values())  # of every stream there is something to look at


@pytest.mark.parametrize("name", WRONG)
def test_it_is_found_that(name, evidence):
    change, kinds = WRONG[name]
    change(evidence)
    verdict = check(evidence)
    assert set(+verdict.wrong) == kinds, str(verdict)
    assert not any(mark in line for line in verdict.examples for mark in (NUMBER, WORD, ADDRESS))


@pytest.mark.parametrize("there", [True, False])
def test_a_chunk_of_unknown_outcome_may_be_there_or_not(there, evidence):
    if there:
        evidence.sent[:] = [one._replace(outcome=Outcome.UNKNOWN) if one.chunk == 2 else one for one in evidence.sent]
    else:
        record = {**evidence.sent[0].record, "record_id": f"{ID}never"}
        evidence.sent.append(Sent(record, Outcome.UNKNOWN, 99))
    verdict = check(evidence)
    assert verdict.counts["unknown"] == (30 if there else 1)
    assert not verdict.wrong.total(), str(verdict)
