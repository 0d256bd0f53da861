import json
from base64 import b64decode, b64encode
from collections import Counter

import orjson
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from processors.decode import FIELDS, REASONS
from processors.keyring import EpochKey, EpochRef, KeyRing, PersonRef, PersonSecret
from processors.plan import Planner
from processors.screen import verdict
from processors.seal import Entropy, Sealer
from schemas.sealed import KeyId, split_envelope, take_apart
from tests.support.records import (
    NOW_S,
    OTHER,
    TOKENS,
    a_ring,
    examples,
    open_value,
    policy_of,
    preference,
    reply,
    run,
    sms_cdr,
    sms_request,
    voice_cdr,
    voice_request,
)

BASES = [sms_request(), voice_request(sender=OTHER), sms_cdr(), voice_cdr(sender=OTHER), reply("STOP"), preference()]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WORDS = st.sampled_from([
    "", "+4915112345678", "0151 12345678", "STOP", "START", "mo", "mt", "voice", "sms", "otp", "marketing", "request",
    "cdr", "preference", "2026-11-21T11:22:33Z", "0001-01-01T00:00:00Z", "2016-12-31T23:59:60Z", "opt_in", "\ud800",
    "2015-01-01T00:00:00Z", "campaign", "9999-12-31T23:59:59.999999-23:59", "x" * 2000, "platform", "\x00", "DE",
])  # fmt: skip


@st.composite
def nearly_records(draw):
    """A record with some of its fields replaced, added or dropped, or its bytes damaged."""
    fields = dict(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(sorted(FIELDS)) | st.text(max_size=5))
        if draw(st.booleans()):
            fields[name] = draw(WORDS | JSON)
        else:
            fields.pop(name, None)
    value = bytearray(json.dumps(fields).encode())
    if draw(st.integers(0, 3)) == 0 and value:
        at = draw(st.integers(0, len(value) - 1))
        value[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(value)


ANYTHING = st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()) | nearly_records()


@examples(200)
@given(st.lists(ANYTHING, max_size=6))
def test_any_bytes_end_in_exactly_one_counted_outcome(values):
    # Given anything at all
    done = run(values)
    # Then every input has one outcome, with a reason of the vocabulary
    assert len(done.outcomes) == len(values)
    known = {None, *REASONS, *verdict.REASONS, "personal_part_expired", "older_than_everything", "lifts_nothing"}
    assert {found.reason for found in done.outcomes} <= known - {"internal_error"}
    # And the outputs are exactly those that the outcomes say
    ends = Counter((found.kind, str(found.end), found.reason) for found in done.outcomes)
    emitted = Counter((found.kind, str(found.end)) for found in done.outcomes)
    assert len(done.of("verdicts")) == emitted["request", "emit"] + emitted["request", "refuse"]
    assert len(done.of("cleared")) == emitted["request", "emit"]
    assert len(done.of("cdr.anonymous")) == emitted["cdr", "emit"]
    assert len(done.of("cdr.pii")) == ends["cdr", "emit", None]
    assert len(done.of("quarantine")) == sum(str(found.end) == "quarantine" for found in done.outcomes)
    # And what could not be understood is kept whole, at its offset
    kept = {
        value["offset"]: open_value(message.value, done.ring)["record"]
        for value, message in zip(done.values("quarantine"), done.of("quarantine"), strict=True)
    }
    assert kept == {at: values[at] for at, found in enumerate(done.outcomes) if str(found.end) == "quarantine"}


@examples(60)
@given(st.lists(ANYTHING, min_size=1, max_size=5))
def test_the_outcome_of_a_record_does_not_depend_on_what_broken_records_stand_beside_it(values):
    assume(not any(b"STOP" in value or b"START" in value or b"preference" in value for value in values))
    assert run(values).outcomes == [found for value in values for found in run([value]).outcomes]


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
ID = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40)


@examples(80)
@given(
    record_id=ID.filter(lambda text: not any(char.isdigit() for char in text)),
    content=TEXT.filter(bool),
    texts=st.fixed_dictionaries(dict.fromkeys(("error_code", "campaign_id", "client_ip", "display_name"), TEXT)),
    location=TEXT,
    attributes=st.dictionaries(TEXT, TEXT, max_size=5),
    sender=TEXT,
)
def test_to_seal_and_then_to_open_is_the_identity(record_id, content, texts, location, attributes, sender):
    given_fields = {**texts, "location": location, "attributes": attributes, "sender": sender, "record_id": record_id}
    value = sms_cdr(**given_fields, content=content)
    request = sms_request(**given_fields, content=content)
    done = run([value, request])
    assume(all(str(found.end) == "emit" for found in done.outcomes))
    for stream, expected in (("cdr.pii", {n: v for n, v in value.items() if n != "content"}), ("cleared", request)):
        (groups,) = done.opened(stream)
        opened = {name: field for fields in groups.values() for name, field in fields.items()}
        assert opened == expected
    assert done.opened("content") == [{"content": {"record_id": record_id, "content": content}}]


PEOPLE = [None, PersonSecret("ab" * 16, b"s" * 32), PersonSecret("cd" * 16, b"t" * 32)]
EPOCH = EpochKey(KeyId("pii", "platform", "2026-11", 1), b"e" * 32, None)


@examples(150)
@given(
    st.lists(st.tuples(st.sampled_from(["primary", "other", "x"]), st.sampled_from(PEOPLE), st.binary(max_size=200)),
             min_size=1, max_size=3, unique_by=lambda part: part[0]),
    st.dictionaries(st.sampled_from(["a", "month", "z"]), TEXT),
    st.binary(min_size=32, max_size=32),
)  # fmt: skip
def test_any_plaintexts_sealed_together_open_to_themselves(parts, fields, seed):
    ring = KeyRing()
    ring.epochs = {EpochRef("pii", "platform", "2026-11"): EPOCH}
    ring.persons = {PersonRef("p", person.sid.encode(), "m"): person for person in PEOPLE if person is not None}
    head, tail = split_envelope({**fields, "account_id": "acme"})
    value = Sealer(ring, Entropy(seed), "cdr.pii", "acme", EPOCH).several(head, tail, parts)
    assert open_value(value, ring) == {group: text for group, _, text in parts}


# --- nothing but the very same opens ------------------------------------------------------------------------

DONE = run([
    sms_request(sender=OTHER), voice_cdr(sender=OTHER, transcript="hello"), sms_cdr(recipient=""), reply("STOP"),
    reply("please stop"), b"x",
])  # fmt: skip
SEALED = [
    (message.value, DONE.ring)
    for output in DONE.outputs
    for message in output.messages
    if b'"sealed":' in message.value
]


@examples(600)
@given(st.sampled_from(range(len(SEALED))), st.data())
def test_one_bit_changed_anywhere_in_a_value_and_it_does_not_open(index, data):
    # Given a sealed value of any stream
    value, ring = SEALED[index]
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    # When one bit of it changes: of a box, a sid, a key, a group or the clear envelope
    with pytest.raises((ValueError, KeyError)):  # Then it does not open
        open_value(bytes(changed), ring)


@pytest.mark.parametrize("index", range(len(SEALED)))
def test_every_bit_of_sids_keys_groups_and_the_ends_of_boxes_counts(index):
    value, ring = SEALED[index]
    assert open_value(value, ring)
    fields = orjson.loads(value)
    for part in fields["sealed"]:
        for text in (
            f'"group":"{part["group"]}"',
            f'"key":"{part["key"]}"',
            f'"sid":"{part["sid"]}"',
            part["box"][-8:],
        ):
            start = value.index(text.encode())
            for bit in range(8 * start, 8 * (start + len(text))):
                changed = bytearray(value)
                changed[bit // 8] ^= 1 << bit % 8
                with pytest.raises((ValueError, KeyError)):
                    open_value(bytes(changed), ring)


@examples(300)
@given(st.sampled_from(range(len(SEALED))), st.data())
def test_one_bit_changed_in_the_ciphertext_itself_and_it_does_not_open(index, data):
    value, ring = SEALED[index]
    fields = orjson.loads(value)
    part = data.draw(st.sampled_from(fields["sealed"]))
    box = bytearray(b64decode(part["box"]))
    bit = data.draw(st.integers(0, 8 * len(box) - 1))
    box[bit // 8] ^= 1 << bit % 8
    part["box"] = b64encode(box).decode()
    with pytest.raises(ValueError):
        open_value(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS), ring)


@examples(200)
@given(st.sampled_from(range(len(SEALED))), st.sampled_from(range(len(SEALED))), st.data())
def test_a_part_or_a_box_moved_to_any_other_value_does_not_open(source, target, data):
    assume(source != target)
    part = data.draw(st.sampled_from(orjson.loads(SEALED[source][0])["sealed"]))
    value, ring = SEALED[target]
    fields = orjson.loads(value)
    into = data.draw(st.integers(0, len(fields["sealed"]) - 1))
    fields["sealed"][into] = part if data.draw(st.booleans()) else {**fields["sealed"][into], "box": part["box"]}
    moved = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    assume(moved != SEALED[source][0])  # then it is the other value whole, which says inside which record it is
    with pytest.raises(ValueError):
        open_value(moved, ring)


# --- entropy ------------------------------------------------------------------------------------------------


def boxes(outputs):
    """The seal id and nonce of every box, in order."""
    return [
        (box[:16], box[16:28])
        for output in outputs
        for message in output.messages
        if b'"sealed":' in message.value
        for part in take_apart(message.value).parts
        for box in [b64decode(part.box)]
    ]


VALUES = st.lists(st.sampled_from([orjson.dumps(fields) for fields in BASES] + [b"x"]), min_size=1, max_size=8)


@examples(60)
@given(VALUES, st.binary(min_size=32, max_size=32))
def test_the_same_inputs_give_the_same_bytes(values, seed):
    done = run(values, seed=seed)
    assert run(values, seed=seed).outputs == done.outputs
    again = done.pipeline.complete(done.prepared, a_ring(done.prepared.needs), Entropy(seed), 4)
    assert again == done.outputs


@examples(60)
@given(VALUES, st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=4, unique=True))
def test_no_two_attempts_and_no_two_parts_ever_share_a_nonce(values, seeds):
    # Given one batch that is tried several times, with fresh entropy each time
    attempts = [boxes(run(values, seed=seed).outputs) for seed in seeds]
    # Then no nonce is ever used twice, and a seal id only by the parts of one value
    nonces = [nonce for attempt in attempts for _, nonce in attempt]
    assert len(set(nonces)) == len(nonces)
    for one in attempts:
        for other in attempts:
            if one is not other:
                assert not {seal for seal, _ in one} & {seal for seal, _ in other}


@examples(60)
@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4, unique=True), st.integers(1, 3000))
def test_the_draws_of_an_attempt_never_repeat(seeds, count):
    drawn = []
    for seed in seeds:
        entropy = Entropy(seed)
        drawn += [pair for pair, _ in zip(entropy.draws, range(count), strict=False)]
        drawn.append((entropy.salt, b""))
    assert len({seal for seal, _ in drawn}) == len(drawn)
    assert len({nonce for _, nonce in drawn}) == len(drawn) - len(seeds) + 1


@examples(100)
@given(st.lists(st.integers(), max_size=50), st.binary(min_size=32, max_size=32))
def test_a_shuffle_loses_and_adds_nothing(items, seed):
    assert sorted(Entropy(seed).shuffled(items)) == sorted(items)
    assert Entropy(seed).shuffled(items) == Entropy(seed).shuffled(items)


@examples(100)
@given(st.integers(1, 10**6), st.binary(min_size=32, max_size=32))
def test_a_number_is_drawn_below_its_bound(bound, seed):
    assert 0 <= Entropy(seed).below(bound) < bound


ADDRESSES = st.sampled_from([
    "ann@example.org", "Ann@Example.org", "sip:ann@example.org", "+4915112345678", "0151 12345678", "015112345678",
    "004915112345678", "(415) 555-0123", "+14155550123", "ACME", "acme", "12345", "", "anonymous", "+49151 12345678",
]) | st.text(max_size=12)  # fmt: skip


@examples(100)
@example([("ann@example.org", None), ("sip:ann@example.org", None)])
@given(st.lists(st.tuples(ADDRESSES, st.sampled_from(["DE", "US", None])), min_size=1, max_size=8))
def test_whom_a_planner_remembers_is_who_it_would_meet_anew(addresses):
    # Given a planner that has met others before, by its memory where it has one, as the pipeline asks it
    kept = Planner(policy_of())
    circle = kept.plan("acme", NOW_S).circle
    for raw, country in addresses:
        known = circle.met.get(raw) or kept.meet(kept.plan("acme", NOW_S), raw, country, TOKENS)
        # Then it is whom a planner meets that has met nobody
        fresh = Planner(policy_of())
        anew = fresh.meet(fresh.plan("acme", NOW_S), raw, country, TOKENS)
        for name in ("party", "digits", "token", "account", "platform"):
            assert getattr(known, name) == getattr(anew, name)
