"""Canaries: a unique value in every field of every kind of record, found exactly where the table says and nowhere else.

The table is written by hand from DESIGN.md; nothing here asks the product where a field belongs. Each place a field
can be in has a letter. Two checks use it: `misplaced` reads the outputs, opened, and compares; `leaked` searches the
bytes that leave for every spelling of what may not stand there in the clear.
"""

import base64
import hashlib
import traceback
from datetime import datetime

import orjson
import pytest

from processors.decode import decode
from processors.pipeline import End
from schemas.errors import Poison
from schemas.fields import PrivacyClass, classes_of
from schemas.inbound import Cdr, Preference, Request
from tests.support.records import (
    Run,
    everything,
    found_in,
    haystack,
    open_value,
    record,
    run,
    spellings,
)

PLACES = {
    "a": "cdr.anonymous",
    "p": "cdr.pii/primary",
    "o": "cdr.pii/other",
    "e": "cdr.pii",
    "c": "content/content",
    "f": "content",
    "P": "cleared/primary",
    "O": "cleared/other",
    "E": "cleared",
    "v": "verdicts",
    "n": "suppressions/number",
    "s": "suppressions",
    "r": "review/review",
    "q": "review",
}
"""Letter → a stream's clear bytes (value, key, headers), or one of its sealed parts."""

TABLE = {
    # field: (class, of an outbound CDR, of an inbound CDR, of a request, of a preference)
    "v": ("shape", None, None, None, None),  # as constant as the grammar: every value has one of its own
    "action": ("shape", None, None, None, "s"),
    "scope": ("shape", None, None, None, None),  # stands in the entry's name
    "class_": ("shape", None, None, None, None),  # stands in the entry's name
    "account_id": ("account", "apef", "apef", "PEv", "s"),
    "channel": ("billing", "ap", "ap", "PEv", ""),
    "direction": ("billing", "ap", "ap", "P", ""),
    "purpose": ("billing", "ap", "ap", "PEv", ""),
    "country": ("billing", "ap", "ap", "P", ""),
    "mcc": ("billing", "ap", "ap", "P", ""),
    "mnc": ("billing", "ap", "ap", "P", ""),
    "route": ("billing", "ap", "ap", "P", ""),
    "status": ("billing", "ap", "ap", "P", ""),
    "segments": ("billing", "ap", "ap", "P", None),
    "price": ("price", "ap", "ap", "P", ""),
    "record_id": ("identifier", "pc", "pc", "PEv", ""),
    "campaign_id": ("identifier", "p", "p", "P", ""),
    "occurred_at": ("time", "p", "p", "P", "s"),
    "answered_at": ("time", "p", "p", "P", None),
    "duration_s": ("duration", "p", "p", "P", None),
    "billable_s": ("duration", "p", "p", "P", None),
    "error_code": ("traffic", "p", "p", "P", ""),
    "encoding": ("traffic", "p", "p", "P", None),
    "hangup_cause": ("traffic", "p", "p", "P", None),
    "sender": ("sender", "o", "p", "O", "n"),
    "display_name": ("sender", "o", "p", "O", ""),
    "client_ip": ("sender", "o", "p", "O", ""),
    "recipient": ("recipient", "p", "o", "P", "n"),  # of a preference: the sender that its scope is about
    "location": ("person", "p", "p", "P", ""),
    "child": ("person", "p", "p", "P", ""),
    "time_zone": ("person", None, None, "P", None),
    "attributes": ("person", "p", "p", "P", ""),
    "content": ("content", "c", "c", "P", None),
    "recording_ref": ("content", "c", "c", "P", None),
    "transcript": ("content", "c", "c", "P", None),
}
ZONES = ("America/Boise", "Asia/Kathmandu", "Pacific/Chatham", "Africa/Nairobi")
COLUMN = {("cdr", "mt"): 1, ("cdr", "mo"): 2, ("request", "mt"): 3, ("preference", "mo"): 4}
REVIEWED = {"record_id", "occurred_at", "sender", "recipient", "country", "campaign_id", "content"}
"""Fields of an inbound text that is nearly a keyword: they stand in the sealed part of `review` as well."""

CASES = [
    ("cdr", "sms", "mt", "two"), ("cdr", "sms", "mo", "two"), ("cdr", "voice", "mt", "two"),
    ("cdr", "voice", "mo", "two"), ("cdr", "sms", "mt", "one"), ("cdr", "sms", "mo", "one"),
    ("cdr", "voice", "mt", "one"), ("cdr", "voice", "mo", "one"), ("cdr", "sms", "mo", "near"),
    ("request", "sms", "mt", "two"), ("request", "voice", "mt", "two"), ("request", "sms", "mt", "one"),
    ("request", "voice", "mt", "one"), ("preference", "sms", "mo", "one"), ("preference", "voice", "mo", "two"),
]  # fmt: skip
"""Type, channel, direction, and how many persons are on it; `near`: one, whose text is nearly a keyword."""


def planted(case):
    """A record with all the fields that its type and channel can have, every value of it unique to it."""
    kind, channel, direction, persons = case
    n = CASES.index(case) + 1
    tag = "".join(chr(ord("a") + int(digit, 16)) for digit in hashlib.sha256("/".join(case).encode()).hexdigest()[:9])
    person, other = f"+49151{37_000_000 + 1111 * n}", f"+1415555{2000 + 137 * n}"
    if persons != "two":
        other = f"Shop{tag[:7]}"
    fields = {
        "account_id": f"acct-{tag}", "record_id": f"rid-{tag}", "occurred_at": f"2026-11-21T10:{10 + n}:37Z",
        "sender": person if direction == "mo" else other, "recipient": other if direction == "mo" else person,
        "country": "DE" if direction == "mt" else "AT", "mcc": f"{200 + n}", "mnc": f"{10 + n}",
        "route": f"route-{tag}", "status": f"status-{tag}", "error_code": f"error-{tag}",
        "price": {"amount": f"0.0{n}7531", "currency": "EUR"},
        "campaign_id": f"campaign-{tag}", "client_ip": f"203.0.113.{100 + n}", "location": f"Straße {tag}",
        "display_name": f"Zoë {tag}", "child": True, "attributes": {f"key-{tag}": f"value-{tag}"}, "purpose": "otp",
    }  # fmt: skip
    if kind == "request":
        fields["time_zone"] = ZONES[n % len(ZONES)]
    if kind == "preference":
        fields |= {"action": "opt_out", "scope": "sender", "class": "service"}
    elif channel == "sms":
        text = f"stop {tag}" if persons == "near" else f"Geheim: {tag} 😀"
        fields |= {"content": text, "segments": 100 + n, "encoding": f"encoding-{tag}"}
    else:
        fields |= {
            "answered_at": f"2026-11-21T10:{10 + n}:49Z", "duration_s": 86_000 + 7 * n, "billable_s": 61_000 + 7 * n,
            "hangup_cause": f"cause-{tag}", "recording_ref": f"s3://{tag}.wav", "transcript": f"Gesagt: {tag}",
        }  # fmt: skip
    return record(kind, channel=channel, direction=direction, **fields)


PLANTED = {case: planted(case) for case in CASES}


def expected(case, field):
    """The names of the places in which the table has a field of a record."""
    kind, _, direction, persons = case
    letters = TABLE[field][COLUMN[kind, direction]]
    if persons != "two":  # nobody else is on it: what would be apart stands with the rest
        letters = letters.replace("o", "p").replace("O", "P")
    if persons == "near" and field in REVIEWED:
        letters += "r"
    if persons == "near" and field == "account_id":
        letters += "q"
    return {PLACES[letter] for letter in letters}


# --- where each field is ------------------------------------------------------------------------------------


def places(done: Run):
    """What stands in each place: the clear side of each stream, and each sealed part, as parsed JSON."""
    found = {}
    for output in done.outputs:
        for message in output.messages:
            value = orjson.loads(message.value)
            if "sealed" in value:
                for group, text in open_value(message.value, done.ring).items():
                    found.setdefault(f"{output.stream}/{group}", []).append(orjson.loads(text))
                del value["sealed"]
            del value["privacy"]
            clear = {"value": value, "key": (message.key or b"").decode(), "headers": dict(message.headers)}
            found.setdefault(output.stream, []).append(clear)
    return found


def holds(place, name, value):
    """Whether a parsed place holds a field: under its name, or, where its value is unique, under any."""
    unique = len(value) >= 8 if isinstance(value, str) else isinstance(value, int) and value > 50_000
    if isinstance(place, dict):
        return (name in place and place[name] == value) or any(
            holds(inner, name, value) or (unique and inner_name == value) for inner_name, inner in place.items()
        )
    if isinstance(place, list):
        return any(holds(inner, name, value) for inner in place)
    return unique and (value in place if isinstance(place, str) and isinstance(value, str) else place == value)


def misplaced(classes=None):
    """Say of every field that is not exactly where the table has it; with the product's classes: of none."""
    deviations = []
    for case, fields in PLANTED.items():
        try:
            done = run([fields], classes=classes)
        except Exception as error:
            deviations.append((case, type(error).__name__))
            continue
        if done.outcomes[0].end is not End.EMIT:
            deviations.append((case, done.outcomes[0].reason))
            continue
        found = places(done)
        for name, value in fields.items():
            field = {"class": "class_"}.get(name, name)
            if name == "type" or TABLE[field][COLUMN[case[0], case[2]]] is None:
                continue
            here = {place for place, parsed in found.items() if holds(parsed, name, value)}
            if here != expected(case, field):
                deviations.append((case, name, here ^ expected(case, field)))
    return deviations


def test_every_field_is_exactly_where_the_table_says():
    assert misplaced() == []


def test_every_field_of_every_type_is_in_the_table_with_its_class():
    found = {name: privacy.value for name, privacy in classes_of(Request, Cdr, Preference).items()}
    assert found == {name: row[0] for name, row in TABLE.items()}


def test_every_field_is_planted_in_every_type_that_has_it():
    for kind in (Cdr, Request, Preference):
        names = {name for case, fields in PLANTED.items() if case[0] == kind.__name__.lower() for name in fields}
        assert names - {"type"} == set(kind.__struct_encode_fields__)


def test_every_place_is_reached():
    reached = set().union(*(places(run([fields])) for fields in PLANTED.values()))
    assert set(PLACES.values()) <= reached


GROUPS = [{"account", "billing", "price"}, {"sender"}, {"recipient"}, {"content"}]
"""Classes that send a field of a CDR to one and the same places. All others seal it with the whole record."""


def group_of(privacy):
    return next((at for at, group in enumerate(GROUPS) if privacy in group), None)


@pytest.mark.parametrize("field", TABLE)
def test_changing_the_class_of_any_one_field_is_found_out(field):
    classes = classes_of(Request, Cdr, Preference)
    told_apart_by_outputs = TABLE[field][1] is not None  # a CDR has it, and it is no constant
    for privacy in PrivacyClass:
        if privacy is classes[field]:
            continue
        changed = {**classes, field: privacy}
        # the table's own column of classes finds every change …
        assert {name: found.value for name, found in changed.items()} != {name: row[0] for name, row in TABLE.items()}
        # … and what it does to the outputs is found wherever it does anything
        if told_apart_by_outputs and group_of(privacy.value) != group_of(TABLE[field][0]):
            assert misplaced(changed), f"{field} as {privacy.value}"
        elif not told_apart_by_outputs and TABLE[field][3] is not None and privacy is PrivacyClass.SENDER:
            assert misplaced(changed), f"{field}, of requests only, as {privacy.value}"
        else:
            assert misplaced(changed) == []


# --- billing, and what is coarse ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "cdr"])
def test_what_billing_needs_is_in_the_anonymous_record_and_what_is_exact_is_not(case):
    fields = PLANTED[case]
    (told,) = run([fields]).values("cdr.anonymous")
    needed = ("account_id", "channel", "direction", "purpose", "status", "country", "mcc", "mnc", "route", "price")
    for name in (*needed, *(["segments"] if case[1] == "sms" else [])):
        assert told[name] == fields[name]
    assert told["occurred_at"] == "2026-11-21T10:00:00Z"
    assert told["billable_units"] == (-(-fields["billable_s"] // 60) if case[1] == "voice" else None)
    exact = int(datetime.fromisoformat(fields["occurred_at"]).timestamp())
    for number in (exact, exact * 1000, fields.get("duration_s"), fields.get("billable_s")):
        assert number is None or not holds(told, "", number)


# --- nothing in any spelling --------------------------------------------------------------------------------


def texts_of(fields, *, but=()):
    """The canaries of a record that are long enough to be looked for in any spelling, by field."""
    found = {}
    for name, value in fields.items():
        if name in but or name in ("type", "v", "channel", "direction", "purpose", "country", "mcc", "mnc"):
            continue
        if name == "attributes":
            found |= {f"{name} key": next(iter(value)), f"{name} value": next(iter(value.values()))}
        elif name in ("occurred_at", "answered_at"):
            at = datetime.fromisoformat(value)
            found |= {name: value[10:19], f"{name} s": str(int(at.timestamp()))}
        elif isinstance(value, str) and name not in ("action", "scope", "class"):
            found[name] = value
    return found


def clear_fields(case, stream):
    """The fields that the table lets stand in the clear in a stream."""
    return {
        field
        for field, row in TABLE.items()
        if row[COLUMN[case[0], case[2]]] is not None and stream in expected(case, field)
    }


def leaked(done, case, fields):
    """Name the canaries that stand somewhere in the clear where the table does not have them, in any spelling."""
    found = []
    for output in done.outputs:
        hay = haystack(*everything([output]))
        wanted = texts_of(fields, but=clear_fields(case, output.stream))
        found += [(output.stream, name) for name, text in wanted.items() if found_in(hay, [text])]
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_no_canary_leaves_in_the_clear_in_any_spelling(case):
    fields = PLANTED[case]
    assert leaked(run([fields]), case, fields) == []


def test_no_canary_leaves_in_the_clear_when_records_of_all_kinds_share_a_batch():
    # Given one batch of everything, in which also later records meet earlier opt-outs
    done = run([*PLANTED.values(), *PLANTED.values()])
    # Then no record's canaries stand in another record's clear side either
    for case, fields in PLANTED.items():
        assert leaked(done, case, fields) == []


BROKEN = {
    "unknown field": lambda fields: orjson.dumps({**fields, "extra": fields["location"]}),
    "missing field": lambda fields: orjson.dumps(
        {name: value for name, value in fields.items() if name != "direction"}
    ),
    "truncated": lambda fields: orjson.dumps(fields)[:-2],
    "wrong version": lambda fields: orjson.dumps({**fields, "v": 2}),
    "personal value in a code": lambda fields: orjson.dumps({**fields, "route": fields["location"]}),
    "number in a code": lambda fields: orjson.dumps({**fields, "status": fields["recipient"] + fields["sender"]}),
    "text for an enumeration": lambda fields: orjson.dumps({**fields, "purpose": fields["location"]}),
    "text for a number": lambda fields: orjson.dumps({**fields, "segments": fields["location"], "duration_s": "x"}),
    "text for an instant": lambda fields: orjson.dumps({**fields, "occurred_at": fields["location"]}),
    "text for a type": lambda fields: orjson.dumps({**fields, "type": fields["location"]}),
    "text for an account": lambda fields: orjson.dumps({**fields, "account_id": fields["location"]}),
    "text for a price": lambda fields: orjson.dumps(
        {**fields, "price": {"amount": fields["location"], "currency": "EUR"}}
    ),
    "far ahead": lambda fields: orjson.dumps({**fields, "occurred_at": "2027-01-01T00:00:00Z"}),
    "a number in the id": lambda fields: orjson.dumps({**fields, "record_id": fields["sender"] + fields["recipient"]}),
    "an attribute that is no text": lambda fields: orjson.dumps({**fields, "attributes": {fields["location"]: [1]}}),
    "two records in one": lambda fields: orjson.dumps(fields) * 2,
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[9], CASES[14]], ids="-".join)
def test_what_is_quarantined_shows_nothing_of_itself_to_anybody(case, fault):
    # Given a record full of canaries that cannot be understood
    value = BROKEN[fault](PLANTED[case])
    done = run([value])
    # When it is quarantined
    (outcome,) = done.outcomes
    assert outcome.end is End.QUARANTINE
    assert done.streams == {"quarantine"}
    assert open_value(done.of("quarantine")[0].value, done.ring) == {"record": value}
    # Then nothing of it stands in the clear, in what the batch shows of itself, or in an error
    shown = haystack(*everything(done.outputs), *map(str.encode, said(done, value)))
    assert found_in(shown, texts_of(PLANTED[case]).values()) == []


def said(done, value):
    """Everything a batch, its parts and the error of a record say of themselves."""
    prepared = done.prepared
    yield from map(
        repr, (prepared, done.pipeline, done.ring, done.outputs, done.outcomes, prepared.inbox, prepared.needs)
    )
    for items in (prepared.cdrs, prepared.requests, prepared.reviews, prepared.quarantined, prepared.overlay.changes):
        yield from (f"{item!r} {item!s}" for item in items)
    try:
        yield repr(decode(value))
    except Poison as error:
        yield from (repr(error), str(error), repr(error.args), repr(vars(error)), *traceback.format_exception(error))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_outcomes_needs_and_whatever_a_batch_shows_of_itself_hold_no_canary(case):
    fields = PLANTED[case]
    done = run([fields])
    shown = haystack(*map(str.encode, said(done, orjson.dumps(fields))))
    assert found_in(shown, texts_of(fields, but={"account_id"}).values()) == []


# --- the checks find what they look for ---------------------------------------------------------------------

HIDDEN = {
    "raw": lambda text: text.encode(),
    "hex": lambda text: text.encode().hex().encode(),
    "HEX": lambda text: text.encode().hex().upper().encode(),
    "utf-16-le": lambda text: text.encode("utf-16-le"),
    "utf-16-be": lambda text: text.encode("utf-16-be"),
    "hex of utf-16": lambda text: text.encode("utf-16-be").hex().encode(),
    "reversed": lambda text: text[::-1].encode(),
    "upper": lambda text: text.upper().encode(),
    "percent": lambda text: "".join(f"%{byte:02X}" for byte in text.encode()).encode(),
    "json escapes": lambda text: "".join(f"\\u{ord(char):04x}" for char in text).encode(),
}


@pytest.mark.parametrize("way", HIDDEN)
@pytest.mark.parametrize("text", ["+4915137001111", "Straße-qwertz", "203.0.113.101"])
def test_a_canary_is_found_however_it_is_hidden(text, way):
    assert found_in(haystack(b"before" + HIDDEN[way](text) + b"after"), [text]) == [text]
    assert found_in(haystack(b"before" + HIDDEN[way]("something else") + b"after"), [text]) == []


@pytest.mark.parametrize("text", ["+4915137001111", "Straße-qwertz", "203.0.113.101"])
def test_a_canary_is_found_in_base64_wherever_it_begins(text):
    for before in range(7):
        for codec in ("utf-8", "utf-16-le"):
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                hidden = encode(b"\xfb\xff\xfe"[:before] * 3 + b"x" * before + text.encode(codec) + b"yz")
                assert found_in(haystack(hidden), [text]) == [text]


@pytest.mark.parametrize(
    "written",
    ["004915137001111", "4915137001111", "015137001111", "0151 3700 1111", "+49 151 37001111", "+49-151-3700-1111",
     "+49 (0) 151/3700.1111", "15137001111", "1111007315194"],
)  # fmt: skip
def test_a_number_is_found_however_it_is_written(written):
    assert found_in(haystack(b"x " + written.encode() + b" y"), ["+4915137001111"]) == ["+4915137001111"]


def test_spellings_are_many_and_none_is_short():
    for fields in PLANTED.values():
        for text in texts_of(fields).values():
            found = spellings(text)
            assert len(found) > 30
            assert min(map(len, found)) >= 7
