"""The sealed format under fire: whatever bytes stand in a log, they open as they were sealed, or not at all."""

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.catalog import CATALOG
from schemas.sealed import KeyId, take_apart
from streams.keys.reveal import Revealed, State, open_sealed
from tests.golden.test_exemplars import GOLDEN, OUTPUTS

EPOCHS = {
    KeyId(domain, owner, epoch, version): type("Epoch", (), {"key": bytes.fromhex(key)})
    for domain, owner, epoch, version, key, _ in GOLDEN["epochs"]
}
PERSONS = {sid: type("Person", (), {"secret": bytes.fromhex(secret)}) for *_, sid, secret in GOLDEN["persons"]}
NOW = "2026-11-21T12:00:00Z"
SEALED = [(stream, one["value"].encode()) for stream, one in OUTPUTS if CATALOG[stream].domain is not None]


def opened(stream, value) -> Revealed | None:
    """Return what comes of a value under all keys of the exemplars; None: it is no sealed value."""
    try:
        sealed = take_apart(value)
    except ValueError:
        return None
    return open_sealed(stream, sealed, EPOCHS, PERSONS, NOW)


FIELDS = {(stream, value): opened(stream, value).fields for stream, value in SEALED}


def test_every_exemplar_opens_here():
    assert len(SEALED) > 10
    assert {opened(*one).state for one in SEALED} == {State.REVEALED}
    assert all(FIELDS.values())


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(name for name, row in CATALOG.items() if row.domain)), st.binary(max_size=400))
def test_bytes_that_are_no_sealed_value_are_none(stream, value):
    assert opened(stream, value) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEALED), st.data())
def test_a_value_of_which_a_field_was_changed_opens_as_it_was_or_not_at_all(one, data):
    stream, value = one
    fields = orjson.loads(value)
    part = data.draw(st.sampled_from(fields["sealed"]))
    where = data.draw(st.sampled_from([fields, fields["privacy"], part]))
    name = data.draw(st.sampled_from(sorted(where)))
    changed = data.draw(_JSON)
    if data.draw(st.booleans()):
        del where[name]
    else:
        where[name] = changed
    try:
        damaged = orjson.dumps(fields)
    except (TypeError, ValueError):  # a number that JSON does not have
        return
    found = opened(stream, damaged)
    if found is not None and found.state is State.REVEALED:
        assert found.fields == FIELDS[one]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEALED), st.data())
def test_a_value_with_bytes_changed_cut_or_put_in_opens_as_it_was_or_not_at_all(one, data):
    stream, value = one
    at = data.draw(st.integers(0, len(value) - 1))
    size = data.draw(st.integers(0, 40))
    damaged = value[:at] + data.draw(st.binary(max_size=40)) + value[at + size :]
    found = opened(stream, damaged)
    if found is not None and found.state is State.REVEALED:
        assert found.fields == FIELDS[one]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SEALED), st.sampled_from(SEALED))
def test_parts_of_another_value_fit_as_that_whole_value_only_and_in_its_stream(one, other):
    stream, value = one
    fields, others = orjson.loads(value), orjson.loads(other[1])
    if one == other:
        return
    found = opened(other[0], value)
    assert other[0] == stream or found is None or found.state is not State.REVEALED
    fields["sealed"] = others["sealed"]
    found = opened(stream, orjson.dumps(fields))
    if found is not None and found.state is State.REVEALED:  # the envelopes are the same: it is the other value
        assert (stream, found.fields) == (other[0], FIELDS[other])
