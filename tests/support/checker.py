"""The offline checker: what was published, against what each stream holds. Nothing here asks the program's own reader,
but for opening what is sealed.

    gather()   reads every topic with a plain consumer, what is committed and all, and the streams as `tail` shows them
    check()    pure: says what is wrong with that

What must come of an input record is worked out here by hand, from the input topics in the order in which they lie.
"""

import asyncio
import ssl
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from schemas.catalog import CATALOG, INPUTS
from streams.config import Kafka
from tests.support.commands import PATIENCE_S
from tests.support.history import ADDRESS, CONTENTS, ID, NUMBER, WORD, Outcome, Sent, texts
from tests.support.records import _encodings

OUTPUTS = ("verdicts", "cleared", "content", "cdr.pii", "cdr.anonymous", "suppressions", "review", "quarantine")
ORDERED = ("verdicts", "cleared", "content", "cdr.pii", "review")
"""Streams in which the records of one input key stand in the order of the input."""
NAMED = ("verdicts", "cleared")
"""Streams in which a record's id may stand in the clear."""
KINDS = (
    "lost", "duplicated", "aborted but visible", "out of order", "clear", "without twin", "not committed",
    "not as published",
)  # fmt: skip
_MOST = 5
"""Lines of a kind that are shown; all are counted."""

Place = tuple[str, int]
"""Stream and partition."""


class Row(NamedTuple):
    """One message as a plain consumer reads it."""

    offset: int
    key: bytes
    headers: bytes
    value: bytes


class Evidence(NamedTuple):
    """Everything that is looked at, once all is quiet."""

    sent: list[Sent]
    committed: Mapping[Place, list[Row]]  # what a read-committed reader gets
    written: Mapping[Place, list[Row]]  # what a reader gets who asks for everything
    shown: Mapping[str, list[dict]]  # stream → the lines of `tail`, sealed parts opened
    positions: Mapping[Place, int]  # up to where the workers say they have read
    ends: Mapping[Place, int]


class Verdict(NamedTuple):
    """What was counted, and what is wrong: kind → how often, and a few examples without content."""

    counts: Counter[str]
    wrong: Counter[str]
    examples: list[str]

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {count}" for name, count in {**self.counts, **self.wrong}.items())
        return "\n".join([numbers, *self.examples])


# --- reading ------------------------------------------------------------------------------------------------------


def gather(settings: Kafka, partitions: int, sent: list[Sent], tail: Callable[..., list[dict]]) -> Evidence:
    """Return the evidence of one deployment. `tail`: as of `tests.support.commands.Place`, for opening what is sealed.

    Waits until no transaction is open any more.
    """
    committed, _ = asyncio.run(_read(settings, partitions, "read_committed"))
    written, ends = asyncio.run(_read(settings, partitions, "read_uncommitted"))
    positions = asyncio.run(_positions(settings, partitions))
    shown = {}
    for stream in OUTPUTS:
        options = () if CATALOG[stream].domain is None else ("--reveal", "--reason", "TEST-1")
        shown[stream] = tail(stream, *options)
    return Evidence(sent, committed, written, shown, positions, ends)


def _consumer(settings: Kafka, isolation: str, group: str | None = None) -> AIOKafkaConsumer:
    security: dict = {"security_protocol": "PLAINTEXT"}
    if settings.username is not None:
        security = {
            "security_protocol": "SASL_SSL",
            "ssl_context": ssl.create_default_context(cafile=str(settings.ca_path)),
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": settings.username,
            "sasl_plain_password": settings.password_path.read_text().strip(),
        }
    return AIOKafkaConsumer(
        bootstrap_servers=list(settings.servers), group_id=group, isolation_level=isolation,
        enable_auto_commit=False, auto_offset_reset="earliest", fetch_max_wait_ms=50, **security,
    )  # fmt: skip


def _places(settings: Kafka, partitions: int, streams: Iterable[str]) -> dict[TopicPartition, Place]:
    return {TopicPartition(settings.prefix + stream, p): (stream, p) for stream in streams for p in range(partitions)}


async def _read(settings: Kafka, partitions: int, isolation: str) -> tuple[dict[Place, list[Row]], dict[Place, int]]:
    """Return every message of every topic, read as asked for, and the ends (high watermarks) up to which it was."""
    places = _places(settings, partitions, (*INPUTS, *OUTPUTS))
    found: dict[Place, list[Row]] = {place: [] for place in places.values()}
    everything = _consumer(settings, "read_uncommitted")
    consumer = _consumer(settings, isolation)
    await everything.start()
    await consumer.start()
    try:
        ends = await everything.end_offsets(list(places))
        consumer.assign(list(places))
        await consumer.seek_to_beginning()
        for _ in range(int(PATIENCE_S / 0.2)):
            for topic, some in (await consumer.getmany(timeout_ms=200)).items():
                found[places[topic]] += map(_row, some)
            if all([await consumer.position(topic) >= end for topic, end in ends.items()]):
                return found, {places[topic]: end for topic, end in ends.items()}
        left = [places[topic] for topic, end in ends.items() if await consumer.position(topic) < end]
        raise AssertionError(f"a transaction is never decided: {left}")
    finally:
        await consumer.stop()
        await everything.stop()


def _row(message: ConsumerRecord) -> Row:
    headers = b" ".join(name.encode() + b"=" + value for name, value in message.headers)
    return Row(message.offset, message.key or b"", headers, message.value or b"")


async def _positions(settings: Kafka, partitions: int) -> dict[Place, int]:
    consumer = _consumer(settings, "read_committed", f"{settings.prefix}workers")
    await consumer.start()
    try:
        places = _places(settings, partitions, INPUTS)
        return {place: await consumer.committed(topic) or 0 for topic, place in places.items()}
    finally:
        await consumer.stop()


# --- judging ------------------------------------------------------------------------------------------------------


def check(evidence: Evidence) -> Verdict:
    """Return what is wrong with the evidence; pure."""
    verdict = Verdict(Counter(), Counter(dict.fromkeys(KINDS, 0)), [])
    inputs = {
        place: [_parsed(row.value) for row in evidence.committed.get(place, ())]
        for place in sorted(evidence.committed)
        if place[0] in INPUTS
    }
    wanted = _wanted(inputs)
    findings = [
        *_published(evidence.sent, inputs),
        *_once(wanted, evidence.shown),
        *_aborted(evidence),
        *_order(evidence.sent, inputs, evidence.shown),
        *_clear(evidence.written),
        *_twins(evidence.shown),
        *_committed(evidence),
        *_contents(wanted, evidence.shown),
    ]
    for kind, what in findings:
        verdict.wrong[kind] += 1
        if verdict.wrong[kind] <= _MOST:
            verdict.examples.append(f"{kind}: {what}")
    verdict.counts.update(
        published=sum(one.outcome is Outcome.DONE for one in evidence.sent),
        unknown=sum(one.outcome is Outcome.UNKNOWN for one in evidence.sent),
        committed=sum(
            row.offset < evidence.positions.get(place, 0)
            for place, rows in evidence.committed.items() if place[0] in INPUTS for row in rows
        ),
        outputs=sum(len(rows) for place, rows in evidence.committed.items() if place[0] in OUTPUTS),
        aborted=sum(map(len, evidence.written.values())) - sum(map(len, evidence.committed.values())),
    )  # fmt: skip
    return verdict


Finding = tuple[str, str]
"""Kind, and where; never a number or a content."""


class _Wanted(NamedTuple):
    """What the inputs, as they lie, must have become: stream → id of the record → how often, and what it says."""

    ids: dict[str, Counter[str]]
    verdicts: dict[str, tuple[str, str | None]]
    records: dict[str, dict]
    out: frozenset[str]


def _parsed(value: bytes) -> dict | bytes:
    fields = orjson.loads(value)
    return fields if "type" in fields else value


def _wanted(inputs: Mapping[Place, list[dict | bytes]]) -> _Wanted:
    ids: dict[str, Counter[str]] = {stream: Counter() for stream in OUTPUTS}
    verdicts, published, out = {}, {}, set()
    for rows in inputs.values():
        for record in rows:
            name = texts(record)
            if isinstance(record, bytes):
                ids["quarantine"][name] += 1
                continue
            published[name] = record
            person = record["recipient" if record["direction"] == "mt" else "sender"]
            if record["type"] == "request":
                refused = person in out
                verdicts[name] = ("refused", "opted_out") if refused else ("cleared", None)
                ids["verdicts"][name] += 1
                ids["cleared"][name] += not refused
            elif record["type"] == "preference":
                out.add(person)
                ids["suppressions"][f"preference sms {person}"] += 1
            else:
                ids["cdr.pii"][name] += 1
                ids["cdr.anonymous"][_bill(record)] += 1
                ids["content"][name] += any(field in record for field in CONTENTS)
                ids["review"][name] += record.get("content") == "please stop"
                if record.get("content") == "STOP":
                    out.add(person)
                    ids["suppressions"].update(f"keyword {channel} {person}" for channel in ("sms", "voice"))
    return _Wanted(ids, verdicts, published, frozenset(out))


def _bill(record: dict) -> str:
    """Return what billing sees of a CDR or of an anonymous record; the price is of one record alone."""
    units = record.get("billable_units")
    if "billable_s" in record:
        units = -(-record["billable_s"] // 60)
    price = record["price"]
    shape = (record["channel"], record["direction"], record.get("segments"), units, price["amount"], price["currency"])
    return " ".join(map(str, shape))


def _id(stream: str, line: dict) -> str:
    """Return what tells which input a line of `tail` came from."""
    value, fields = line["value"], line.get("reveal", {}).get("fields", {})
    if stream in NAMED:
        return value["record_id"]
    if stream == "cdr.anonymous":
        return _bill(value)
    if stream == "suppressions":
        return f"{value['reason']} {line['key'].split('|')[3]} {fields.get('number')}"
    return fields.get("record" if stream == "quarantine" else "record_id", "")


def _spoken(stream: str, name: str) -> str:
    """Return an id as it may be shown: none that is a number or a text."""
    return f"{stream}, {name}" if name.startswith(ID) else stream


def _published(sent: list[Sent], inputs: Mapping[Place, list[dict | bytes]]) -> Iterator[Finding]:
    """What a gateway was told is done is there once; what it does not know, at most once and whole; nothing else is."""
    there = Counter(texts(record) for rows in inputs.values() for record in rows)
    least = Counter(texts(one.record) for one in sent if one.outcome is Outcome.DONE)
    most = Counter(texts(one.record) for one in sent)
    for name in (least - there).elements():
        yield "lost", _spoken("input", name)
    for name in (there - most).elements():
        yield "duplicated", _spoken("input", name)
    torn: dict[int, set[bool]] = defaultdict(set)
    for one in sent:
        if one.outcome is Outcome.UNKNOWN:
            torn[one.chunk].add(texts(one.record) in there)
    for chunk, states in torn.items():
        if len(states) > 1:
            yield "lost", f"a part of chunk {chunk}"


def _once(wanted: _Wanted, shown: Mapping[str, list[dict]]) -> Iterator[Finding]:
    """Every input has become what it must, once."""
    for stream in OUTPUTS:
        there = Counter(_id(stream, line) for line in shown[stream] if not line["value"].get("second"))
        for name in (wanted.ids[stream] - there).elements():
            yield "lost", _spoken(stream, name)
        for name in (there - wanted.ids[stream]).elements():
            yield "duplicated", _spoken(stream, name)


def _aborted(evidence: Evidence) -> Iterator[Finding]:
    """The program shows what a read-committed reader gets: nothing that was aborted, and all of the rest."""
    for stream in OUTPUTS:
        shown = {(line["partition"], line["offset"]) for line in evidence.shown[stream]}
        rows = {(p, row.offset) for (of, p), some in evidence.committed.items() if of == stream for row in some}
        written = {(p, row.offset) for (of, p), some in evidence.written.items() if of == stream for row in some}
        for partition, offset in sorted(shown - rows):
            if (partition, offset) in written:
                yield "aborted but visible", f"{stream}/{partition}@{offset}"
        for partition, offset in sorted(rows - shown):
            yield "lost", f"{stream}/{partition}@{offset} is committed and not shown"
        for partition, offset in sorted(rows - written):
            yield "aborted but visible", f"{stream}/{partition}@{offset} is not even written"


def _order(
    sent: list[Sent], inputs: Mapping[Place, list[dict | bytes]], shown: Mapping[str, list[dict]]
) -> Iterator[Finding]:
    """Per input stream and key the inputs lie as they were published, and the outputs as the inputs."""
    keys: dict[str, tuple[str, str]] = {}
    turns: dict[str, int] = {}
    for (stream, _), rows in inputs.items():
        for turn, record in enumerate(rows):
            if isinstance(record, dict):
                person = record["recipient" if record["direction"] == "mt" else "sender"]
                keys[texts(record)] = (stream, person)
                turns[texts(record)] = turn
    yield from _sorted("input", (texts(one.record) for one in sent), keys, turns)
    for stream in ORDERED:
        lines = sorted(shown[stream], key=lambda line: (line["partition"], line["offset"]))
        yield from _sorted(stream, (_id(stream, line) for line in lines), keys, turns)


def _sorted(
    stream: str, names: Iterable[str], keys: Mapping[str, tuple[str, str]], turns: Mapping[str, int]
) -> Iterator[Finding]:
    last: dict[tuple[str, str], int] = defaultdict(lambda: -1)
    for name in names:
        if name in keys:
            if turns[name] < last[keys[name]]:
                yield "out of order", _spoken(stream, name)
            last[keys[name]] = max(turns[name], last[keys[name]])


def _clear(written: Mapping[Place, list[Row]]) -> Iterator[Finding]:
    """Nothing that must be sealed stands in the clear in any output, aborted ones too: as it is, in hex or base64."""
    marks = {mark: set(_encodings(mark.encode())) for mark in (WORD, NUMBER, ADDRESS)}
    for (stream, partition), rows in sorted(written.items()):
        if stream in INPUTS:
            continue
        forbidden = marks if stream in NAMED else {**marks, ID: set(_encodings(ID.encode()))}
        spellings = [spelling for some in forbidden.values() for spelling in some]
        whole = b"\n".join(part for row in rows for part in (row.key, row.headers, row.value))
        if not any(spelling in whole for spelling in spellings):
            continue
        for row in rows:
            text = b"\n".join((row.key, row.headers, row.value))
            if any(spelling in text for spelling in spellings):
                yield "clear", f"{stream}/{partition}@{row.offset}"


def _twins(shown: Mapping[str, list[dict]]) -> Iterator[Finding]:
    """The whole CDRs and the anonymous ones are of the same communications, and those with content have it."""
    whole = Counter(_bill(line["reveal"]["fields"]) for line in shown["cdr.pii"] if line["reveal"]["fields"])
    anonymous = Counter(_bill(line["value"]) for line in shown["cdr.anonymous"])
    for _ in (whole - anonymous).elements():
        yield "without twin", "cdr.pii has a record that cdr.anonymous has not"
    for _ in (anonymous - whole).elements():
        yield "without twin", "cdr.anonymous has a record that cdr.pii has not"
    said = Counter(_id("content", line) for line in shown["content"])
    for name in (said - Counter(_id("cdr.pii", line) for line in shown["cdr.pii"])).elements():
        yield "without twin", f"{_spoken('content', name)} has no CDR"


def _committed(evidence: Evidence) -> Iterator[Finding]:
    """The workers' offsets are behind the last input, and not behind the end."""
    for place, position in evidence.positions.items():
        for row in evidence.committed.get(place, ()):
            if row.offset >= position:
                yield "not committed", f"{place[0]}/{place[1]}@{row.offset}"
        if position > evidence.ends[place]:
            yield "not committed", f"{place[0]}/{place[1]}: the offset is behind the end"


def _contents(wanted: _Wanted, shown: Mapping[str, list[dict]]) -> Iterator[Finding]:
    """What opens says what was published, and verdicts are those that the order demands."""
    for line in shown["verdicts"]:
        value = line["value"]
        name = value["record_id"]
        if not value["second"] and wanted.verdicts.get(name) not in (None, (value["verdict"], value["reason"])):
            yield "not as published", _spoken("verdicts", name)
    for stream in OUTPUTS:
        for line in shown[stream]:
            if CATALOG[stream].domain is None:
                continue
            name, reveal = _id(stream, line), line["reveal"]
            published = wanted.records.get(name, {})
            if stream == "cleared" and published.get("recipient") in wanted.out:
                if (reveal["state"], reveal.get("reason")) != ("denied", "opted_out"):
                    yield "not as published", f"{_spoken(stream, name)} opens after an opt-out"
            elif reveal["state"] != "revealed" or reveal["withheld"]:
                yield "not as published", f"{_spoken(stream, name)} does not open: {reveal['state']}"
            elif stream in _FIELDS and _FIELDS[stream](published) not in ({}, reveal["fields"]):
                yield "not as published", _spoken(stream, name)


_FIELDS: Mapping[str, Callable[[dict], dict]] = {
    "cleared": lambda record: record,
    "cdr.pii": lambda record: {name: value for name, value in record.items() if name not in CONTENTS},
    "content": lambda record: {name: record[name] for name in ("record_id", *CONTENTS) if name in record},
}
"""Stream → the fields that must come out, of the record that went in."""
