import hashlib

import pytest

from processors.screen.suppression import (
    MAX_AHEAD_S,
    Change,
    Overlay,
    Rule,
    State,
    Suppressions,
    Tokens,
    covering_scopes,
    fold,
    hidden,
    parse_key,
    record_key,
    retokened,
    scope_id,
)
from tests.support.records import OTHER, PERSON, SEED, TOKENS

RULE = Rule("account:acme", "all", "sms", "person")
TOKEN = TOKENS.of(PERSON)


def change(*, out=True, event_s=100, rule=RULE, number=PERSON):
    return Change(TOKENS.of(number), rule, out, event_s, number, "keyword")


# --- folding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "out", "event_s", "after"),
    [
        (None, True, 5, State(True, 5)),
        (None, False, 5, None),
        (State(True, 5), True, 4, State(True, 5)),
        (State(True, 5), True, 9, State(True, 9)),
        (State(True, 5), False, 4, State(True, 5)),
        (State(True, 5), False, 5, State(True, 5)),
        (State(True, 5), False, 6, State(False, 6)),
        (State(False, 5), False, 9, State(False, 5)),
        (State(False, 5), True, 4, State(True, 4)),
        (State(False, 5), True, 9, State(True, 9)),
    ],
)
def test_an_opt_out_always_counts_and_an_opt_in_only_if_it_is_later(before, out, event_s, after):
    assert fold(before, out=out, event_s=event_s) == after


def test_a_view_folds_what_it_reads_and_keeps_entries_apart():
    view = Suppressions()
    assert view.get(TOKEN) is None
    view.apply(TOKEN, RULE, out=False, event_s=1)
    assert view.get(TOKEN) is None
    assert len(view) == 0
    view.apply(TOKEN, RULE, out=True, event_s=1)
    view.apply(TOKEN, RULE._replace(channel="voice"), out=True, event_s=2)
    view.apply(TOKEN, RULE, out=False, event_s=3)
    assert view.get(TOKEN) == {RULE: State(False, 3), RULE._replace(channel="voice"): State(True, 2)}
    assert len(view) == 1


# --- the overlay of one batch -------------------------------------------------------------------------------


def test_an_overlay_shows_its_own_changes_over_the_view_and_never_writes_to_it():
    view = Suppressions()
    view.apply(TOKEN, RULE, out=True, event_s=1)
    overlay = Overlay(view)
    assert overlay.get(TOKEN) == view.get(TOKEN)
    assert overlay.apply(change(out=False, event_s=2), 1000)
    assert overlay.apply(change(number=OTHER), 1000)
    assert overlay.get(TOKEN) == {RULE: State(False, 2)}
    assert view.get(TOKEN) == {RULE: State(True, 1)}
    assert view.get(TOKENS.of(OTHER)) is None


def test_an_opt_out_is_always_noted_and_an_opt_in_only_where_it_counts():
    overlay = Overlay(Suppressions())
    assert not overlay.apply(change(out=False), 1000)
    assert overlay.apply(change(event_s=50), 1000)
    assert overlay.apply(change(event_s=40), 1000)
    assert not overlay.apply(change(out=False, event_s=50), 1000)
    assert overlay.apply(change(out=False, event_s=51), 1000)
    assert not overlay.apply(change(out=False, event_s=52), 1000)
    assert [(noted.out, noted.event_s) for noted in overlay.changes] == [(True, 50), (True, 50), (False, 51)]


def test_event_times_more_than_five_minutes_ahead_are_clamped():
    overlay = Overlay(Suppressions())
    overlay.apply(change(event_s=10**9), 1000)
    assert overlay.changes[0].event_s == 1000 + MAX_AHEAD_S == 1300
    overlay.apply(change(event_s=1299, rule=RULE._replace(channel="voice")), 1000)
    assert overlay.changes[1].event_s == 1299


def test_merging_an_overlay_is_reading_its_changes_and_reading_them_after_changes_nothing():
    overlay = Overlay(Suppressions())
    for item in (change(event_s=5), change(out=False, event_s=6), change(number=OTHER), change(event_s=7)):
        overlay.apply(item, 1000)
    merged, read = Suppressions(), Suppressions()
    merged.merge(overlay)
    for view in (read, merged):
        for item in overlay.changes:
            view.apply(item.token, item.rule, out=item.out, event_s=item.event_s)
    assert merged.get(TOKEN) == read.get(TOKEN) == {RULE: State(True, 7)}


# --- tokens, scopes, keys -----------------------------------------------------------------------------------


def test_a_token_is_a_keyed_hash_of_16_bytes():
    assert TOKENS.of(PERSON) == TOKENS.of(PERSON) == Tokens(1, SEED).of(PERSON)
    assert len({TOKENS.of(PERSON), TOKENS.of(OTHER), Tokens(1, bytes(32)).of(PERSON)}) == 3
    assert len(TOKENS.of("")) == 16
    assert repr(TOKENS) == "Tokens(1)"


def test_a_token_is_blake2b_with_the_key_of_the_store():
    assert TOKENS.of("\u00e9") == hashlib.blake2b("\u00e9".encode(), key=SEED, digest_size=16).digest()


@pytest.mark.parametrize(
    ("scope", "text"),
    [("platform", "platform"), ("account", "account:acme"), ("sender", f"sender:acme:{TOKENS.of('ACME').hex()}"),
     ("campaign", f"campaign:acme:~{TOKENS.of('a:b|c').hex()}")],
)  # fmt: skip
def test_a_scope_names_all_that_it_is_about(scope, text):
    assert scope_id(scope, "acme", "ACME", "a:b|c", TOKENS) == text


@pytest.mark.parametrize(
    "scope", ["platform", "account:acme", "campaign:acme:x", "campaign:acme:a|b|c|d|out", "campaign:a:ü 1"]
)
@pytest.mark.parametrize("out", [True, False])
def test_a_record_key_is_read_as_it_is_written(scope, out):
    rule = Rule(scope, "service", "voice", "officer")
    key = record_key(7, change(out=out, rule=rule))
    assert parse_key(key) == (7, TOKEN, rule, out)


def test_an_opt_in_has_another_key_than_the_opt_out_it_lifts():
    assert len({record_key(1, change(out=out)) for out in (True, False)}) == 2


@pytest.mark.parametrize(
    "key",
    [b"", b"x", b"1.00|a|b|c|d", b"1.00|a|b|c|d|maybe", b"1.zz|a|b|c|d|out", b"x.00|a|b|c|d|out", b"100|a|b|c|d|out",
     b"1.00|a|b|c|out", b"\xff"],
)  # fmt: skip
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError):
        parse_key(key)


def test_what_is_shown_holds_neither_number_nor_token_nor_scope():
    overlay = Overlay(Suppressions())
    overlay.apply(change(rule=RULE._replace(scope="campaign:acme:s3cret")), 1000)
    shown = repr([overlay, overlay.changes, *overlay.changed.values(), overlay.changes[0].rule])
    for secret in (PERSON[1:], TOKEN.hex(), "s3cret"):
        assert secret not in shown


@pytest.mark.parametrize("campaign", ["4915112345678", "Ann Example +49 151 12345678", "a|b", "line\nbreak"])
def test_a_campaign_that_is_no_code_is_named_by_its_token(campaign):
    tokens = Tokens(1, b"k" * 32)
    named = scope_id("campaign", "acme", "", campaign, tokens)
    assert campaign not in named
    assert named == scope_id("campaign", "acme", "", named.removeprefix("campaign:acme:"), tokens)
    assert named in covering_scopes("acme", "ACME", campaign, tokens)
    assert scope_id("campaign", "acme", "", "autumn-1", tokens) == "campaign:acme:autumn-1"


# --- another token key --------------------------------------------------------------------------------------

NEXT = Tokens(2, bytes(range(32)))


@pytest.mark.parametrize(
    ("scope", "sender", "campaign"),
    [
        ("platform", "ACME", "spring"),
        ("account", "ACME", "spring"),
        ("sender", "ACME", None),
        ("sender", "+4915112345678", "spring"),
        ("sender", "", None),
        ("campaign", "ACME", "spring"),
        ("campaign", "ACME", "spring sale: 50 %"),
        ("campaign", "ACME", "~" + "0" * 32),
        ("campaign", "ACME", "~" + "0" * 31),
    ],
)
def test_a_scope_is_the_same_under_another_token_key_if_what_it_hides_is_known(scope, sender, campaign):
    full = scope_id(scope, "acme", sender, campaign, TOKENS)
    named = hidden(full, sender, campaign)
    assert retokened(full, named, NEXT) == (scope_id(scope, "acme", sender, campaign, NEXT), False)


def test_only_what_a_scope_names_by_its_token_is_hidden():
    assert hidden("platform", "ACME", "spring") is None
    assert hidden("account:acme", "ACME", "spring") is None
    assert hidden("campaign:acme:spring", "ACME", "spring") is None
    assert hidden(f"sender:acme:{'0' * 32}", "ACME", "spring") == "ACME"
    assert hidden(f"campaign:acme:~{'0' * 32}", "ACME", "a b") == "a b"


@pytest.mark.parametrize("kind", ["sender", "campaign"])
def test_a_scope_gets_wider_where_what_it_hides_is_not_known(kind):
    full = scope_id(kind, "acme", "ACME", "a b", TOKENS)
    assert retokened(full, None, NEXT) == ("account:acme", True)
