from hypothesis import given
from hypothesis import strategies as st

from processors.screen.suppression import (
    MAX_AHEAD_S,
    Change,
    Overlay,
    Rule,
    Suppressions,
    Tokens,
    parse_key,
    record_key,
)
from tests.support.records import examples

TOKENS = Tokens(1, bytes(32))
NOW_S = 1000
RULES = st.builds(
    Rule,
    st.sampled_from(["platform", "account:a", "campaign:a:x|y:z"]),
    st.sampled_from(["all", "marketing"]),
    st.sampled_from(["sms", "voice"]),
    st.sampled_from(["person", "officer"]),
)
CHANGES = st.builds(
    lambda number, rule, out, event_s: Change(TOKENS.of(number), rule, out, event_s, number, None),
    st.sampled_from(["+1", "+2"]),
    RULES,
    st.booleans(),
    st.integers(0, NOW_S + 2 * MAX_AHEAD_S),
)


def states(view):
    return {token: {rule: state.out for rule, state in (view.get(token) or {}).items()} for token in (
        TOKENS.of("+1"), TOKENS.of("+2")
    )}  # fmt: skip


def model(changes):
    """Who is opted out, told in words: the last opt-out counts, unless a later opt-in is stamped later than all of
    the opt-outs it follows since the last lift."""
    out: dict = {}
    for change in changes:
        event_s = min(change.event_s, NOW_S + MAX_AHEAD_S)
        key = change.token, change.rule
        if change.out:
            out[key] = max(event_s, out.get(key, event_s))
        elif key in out and event_s > out[key]:
            del out[key]
    return set(out)


def opted_out(view):
    return {(token, rule) for token, rules in states(view).items() for rule, out in rules.items() if out}


@examples(100)
@given(st.lists(CHANGES, max_size=30))
def test_the_log_in_its_order_decides_who_is_opted_out(changes):
    overlay = Overlay(Suppressions())
    for change in changes:
        overlay.apply(change, NOW_S)
    assert opted_out(overlay) == model(changes)


@examples(100)
@given(st.lists(st.lists(CHANGES, max_size=8), max_size=5))
def test_batches_merged_one_by_one_a_view_read_from_the_log_and_one_long_batch_agree(batches):
    # Given batches, each folded over the view that the ones before it left
    merged, written = Suppressions(), []
    for batch in batches:
        overlay = Overlay(merged)
        for change in batch:
            overlay.apply(change, NOW_S)
        merged.merge(overlay)
        written += overlay.changes
    # When the log is read from its beginning, or all came as one batch
    read = Suppressions()
    for change in written:
        read.apply(change.token, change.rule, out=change.out, event_s=change.event_s)
    long = Overlay(Suppressions())
    for change in (change for batch in batches for change in batch):
        long.apply(change, NOW_S)
    # Then all three say the same, and reading back what was merged changes nothing
    assert opted_out(merged) == opted_out(read) == opted_out(long)
    for change in written:
        merged.apply(change.token, change.rule, out=change.out, event_s=change.event_s)
    assert opted_out(merged) == opted_out(read)


@examples(100)
@given(st.lists(CHANGES, max_size=30))
def test_compaction_to_the_newest_record_of_each_key_changes_nobodys_state(changes):
    # Given the records that a batch wrote
    overlay = Overlay(Suppressions())
    for change in changes:
        overlay.apply(change, NOW_S)
    # When the stream keeps only the newest record of each key, in order
    newest = {record_key(1, change): at for at, change in enumerate(overlay.changes)}
    kept = [change for at, change in enumerate(overlay.changes) if newest[record_key(1, change)] == at]
    # Then whoever reads it from its beginning knows the same people to be opted out
    read = Suppressions()
    for change in kept:
        read.apply(change.token, change.rule, out=change.out, event_s=change.event_s)
    assert opted_out(read) == opted_out(overlay)


@examples(100)
@given(st.binary(min_size=16, max_size=16), st.text(), st.integers(1, 10**6), st.booleans())
def test_a_key_is_read_as_it_is_written(token, campaign, version, out):
    rule = Rule(f"campaign:a:{campaign}".encode("utf-8", "replace").decode(), "all", "sms", "person")
    assert parse_key(record_key(version, Change(token, rule, out, 0, "", None))) == (version, token, rule, out)


@examples(100)
@given(st.lists(CHANGES, max_size=20))
def test_no_event_time_is_further_ahead_than_five_minutes(changes):
    overlay = Overlay(Suppressions())
    for change in changes:
        overlay.apply(change, NOW_S)
    assert all(noted.event_s <= NOW_S + MAX_AHEAD_S for noted in overlay.changes)
