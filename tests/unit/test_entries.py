"""The snapshot of a stream's entries: what it holds, how it is looked up, and what is no snapshot."""

import random

import pytest

from processors.screen.entries import HEAD_BYTES, MAGIC, Damaged, Meta, Records, Snapshot, merge
from processors.screen.suppression import Change, Overlay, Rule, State, Suppressions, fold, latest, record_key

META = Meta(stream="suppressions", version=1, store="s", log="l", offsets=(7, 9), witnesses=((6, "ab"), None))
SMS = Rule("platform", "all", "sms", "person")
VOICE = SMS._replace(channel="voice")
OURS = Rule("campaign:acme:a|b~ü", "marketing", "sms", "officer")


def records(*entries, version=1):
    found = Records(version)
    for token, rule, out, event_s in entries:
        assert found.add(record_key(version, Change(token, rule, out, event_s, "", None)), lambda at=event_s: at)
    return found


def written(old, new, how=fold, meta=META):
    parts = []
    head, _ = merge(old, new, meta, how, lambda data: parts.append(bytes(data)))
    return head + b"".join(parts)


def snapshot(*entries, old=None, how=fold):
    made = Snapshot(memoryview(written(old, records(*entries), how)))
    made.check()
    return made


def token(number, length=16):
    return random.Random(number).randbytes(length)


# --- what it holds ------------------------------------------------------------------------------------------


def test_an_empty_one_has_nobody():
    made = snapshot()
    assert len(made) == 0
    assert made.get(token(1)) is None


def test_whoever_is_in_it_is_found_with_all_entries_and_nobody_else_is():
    made = snapshot((token(1), SMS, True, 5), (token(2), VOICE, True, 6), (token(1), OURS, True, 7))
    assert made.get(token(1)) == {SMS: State(True, 5), OURS: State(True, 7)}
    assert made.get(token(2)) == {VOICE: State(True, 6)}
    assert all(made.get(token(number)) is None for number in range(3, 500))
    assert (made.meta.offsets, made.meta.witnesses) == ((7, 9), ((6, "ab"), None))


def test_whole_tokens_are_compared():
    almost = [token(1)[:at] + bytes([token(1)[at] ^ 1]) + token(1)[at + 1 :] for at in range(16)]
    made = snapshot((token(1), SMS, True, 5), *((other, VOICE, True, at) for at, other in enumerate(almost[8:])))
    assert made.get(token(1)) == {SMS: State(True, 5)}
    assert all(made.find(other) is None for other in almost[:8])
    assert all(made.get(other) == {VOICE: State(True, at)} for at, other in enumerate(almost[8:]))


def test_a_token_is_not_found_across_the_border_of_two_rows():
    # Given neighbours in a bucket whose bytes, one behind the other, spell a third token
    shared, row = b"\x01", 15 + 2 + 4
    first, second = shared + bytes(15), shared + b"\xff" * 15
    made = snapshot((first, SMS, True, 0), (second, SMS, True, 0))
    rows = made._rows.tobytes()
    assert len(rows) == 2 * row
    for at in range(1, row):
        spelt = shared + rows[at : at + 15]
        assert spelt in (first, second) or made.find(spelt) is None


@pytest.mark.parametrize("people", [1, 4_095, 5_000])
def test_every_width_of_a_bucket_finds_the_same_people(people):
    rng = random.Random(people)
    everybody = {rng.randbytes(16): rng.randrange(2**32) for _ in range(people)}
    made = snapshot(*((one, SMS, True, at) for one, at in everybody.items()))
    assert made.meta.lead == (1 if people < 4096 else 2)
    assert all(made.get(one) == {SMS: State(True, at)} for one, at in everybody.items())
    strangers = [rng.randbytes(16) for _ in range(2000)]
    assert all(made.get(one) is None for one in strangers)
    assert sum(made.bits[(place := int.from_bytes(one[:4]) >> made.shift) >> 3] >> (place & 7) & 1
               for one in strangers) < 400  # fmt: skip


def test_more_rules_than_two_bytes_can_number_are_kept_apart():
    rules = [Rule(f"campaign:acme:c{number}", "all", "sms", "person") for number in range(70_000)]
    made = snapshot(*((token(number % 900), rule, True, number) for number, rule in enumerate(rules)))
    assert made.meta.rule_bytes == 4
    assert made.get(token(5)) == {rules[at]: State(True, at) for at in range(5, 70_000, 900)}


@pytest.mark.parametrize("event_s", [-62_135_596_800, -1, 0, 2**32 - 1, 2**32, 253_402_300_799])
def test_an_event_time_is_exact_however_far_it_is(event_s):
    made = snapshot((token(1), SMS, True, event_s), (token(1), VOICE, True, 5))
    assert made.get(token(1)) == {SMS: State(True, event_s), VOICE: State(True, 5)}
    assert snapshot((token(2), SMS, True, 1), old=made).get(token(1)) == made.get(token(1))


def test_a_row_says_where_an_entry_is():
    made = snapshot((token(1), SMS, True, 5), (token(1), VOICE, True, 5), (token(2), SMS, True, 5))
    rows = [made.row_of(token(1), SMS), made.row_of(token(1), VOICE), made.row_of(token(2), SMS)]
    assert sorted(rows) == [0, 1, 2]
    assert made.row_of(token(2), VOICE) is None
    assert made.row_of(token(3), SMS) is None


# --- merging ------------------------------------------------------------------------------------------------


def test_what_is_lifted_goes_and_its_rule_with_it():
    old = snapshot((token(1), SMS, True, 5), (token(1), OURS, True, 5), (token(2), VOICE, True, 5))
    new = snapshot((token(1), OURS, False, 6), (token(2), VOICE, False, 5), old=old)
    assert new.get(token(1)) == {SMS: State(True, 5)}
    assert new.get(token(2)) == {VOICE: State(True, 5)}
    newer = snapshot(old=new)
    assert newer.meta.rules == 2
    assert newer.get(token(1)) == new.get(token(1))


def test_a_rule_of_many_people_moves_with_its_number():
    old = snapshot((token(1), OURS, True, 5), (token(2), SMS, True, 6), (token(3), VOICE, True, 7))
    new = snapshot((token(9), VOICE, True, 1), old=snapshot((token(1), OURS, False, 9), old=old))
    assert new.get(token(1)) is None
    assert new.get(token(2)) == {SMS: State(True, 6)}
    assert new.get(token(3)) == {VOICE: State(True, 7)}
    assert new.get(token(9)) == {VOICE: State(True, 1)}


def test_tokens_that_begin_alike_stay_apart_in_every_merge():
    alike = [bytes(15) + bytes([last]) for last in range(6)] + [bytes(8) + b"\xff" * 8]
    old = snapshot(*((one, SMS, True, at) for at, one in enumerate(alike[::2])))
    middle = snapshot(*((one, VOICE, True, at) for at, one in enumerate(alike)), (alike[0], SMS, False, 9), old=old)
    new = snapshot((alike[1], OURS, True, 7), (alike[2], VOICE, False, 8), old=middle)
    assert new.get(alike[0]) == {VOICE: State(True, 0)}
    assert new.get(alike[1]) == {VOICE: State(True, 1), OURS: State(True, 7)}
    assert new.get(alike[2]) == {SMS: State(True, 1)}
    assert new.get(alike[3]) == {VOICE: State(True, 3)}
    assert new.get(alike[4]) == {SMS: State(True, 2), VOICE: State(True, 4)}
    assert new.get(alike[5]) == {VOICE: State(True, 5)}
    assert new.get(alike[6]) == {SMS: State(True, 3), VOICE: State(True, 6)}


def test_exemptions_fold_by_the_last_word():
    old = snapshot((token(1), SMS, True, 9), (token(2), SMS, True, 9), how=latest)
    new = snapshot((token(1), SMS, True, 4), (token(2), SMS, False, 0), old=old, how=latest)
    assert new.get(token(1)) == {SMS: State(True, 4)}
    assert new.get(token(2)) is None


def test_records_of_another_token_key_are_passed_over_and_what_is_no_record_is_refused():
    found = records((token(1), SMS, True, 5))

    def never():
        raise AssertionError("not asked")

    assert not found.add(record_key(2, Change(token(2), SMS, True, 5, "", None)), never)
    assert len(found) == 1
    good = record_key(1, Change(token(1), SMS, True, 5, "", None))
    for bad in (
        b"",
        b"x",
        good[2:],
        good.replace(b"|out", b"|maybe"),
        good[:10] + good[12:],
        good[:4] + b"  " + good[6:],
    ):
        with pytest.raises(ValueError):
            found.add(bad, lambda: 5)
    assert len(found) == 1
    assert len(found.tokens) == 16


# --- what is no snapshot ------------------------------------------------------------------------------------


WHOLE = written(None, records((token(1), SMS, True, 5), (token(2), VOICE, True, 6)))


@pytest.mark.parametrize("length", [0, 100, HEAD_BYTES, len(WHOLE) - 1])
def test_one_that_is_cut_short_is_refused(length):
    with pytest.raises(Damaged):
        Snapshot(memoryview(WHOLE[:length]))


def test_one_without_its_head_is_refused():
    with pytest.raises(Damaged):
        Snapshot(memoryview(bytes(HEAD_BYTES) + WHOLE[HEAD_BYTES:]))


def test_a_bit_that_is_wrong_anywhere_is_found():
    for at in [*range(56), *range(HEAD_BYTES, len(WHOLE), 97), len(WHOLE) - 1]:
        damaged = bytearray(WHOLE)
        damaged[at] ^= 4
        with pytest.raises(Damaged):
            Snapshot(memoryview(bytes(damaged))).check()


def test_one_of_another_format_is_refused():
    with pytest.raises(Damaged):
        Snapshot(memoryview(WHOLE.replace(MAGIC, MAGIC[:-1] + b"\x02", 1)))


# --- under a tail -------------------------------------------------------------------------------------------


def test_whoever_has_not_changed_after_a_snapshot_is_let_go_and_stays_who_they_were():
    view = Suppressions()
    view.apply(token(1), SMS, out=True, event_s=5, place=(0, 6))
    view.apply(token(2), SMS, out=True, event_s=5, place=(0, 7))
    view.apply(token(3), SMS, out=True, event_s=5, place=(1, 8))
    made = snapshot(*((token(number), SMS, True, 5) for number in (1, 2, 3)))
    view.adopt(made)
    assert len(view) == 1
    assert all(view.get(token(number)) == {SMS: State(True, 5)} for number in (1, 2, 3))


def test_whoever_was_merged_and_not_read_back_stays_in_the_tail():
    view = Suppressions()
    overlay = Overlay(view)
    overlay.apply(Change(token(1), SMS, True, 50, "", None), 100)
    view.merge(overlay)
    view.adopt(snapshot((token(2), SMS, True, 5)))
    assert view.get(token(1)) == {SMS: State(True, 50)}
    # When it has been read back, the next snapshot takes it over
    view.apply(token(1), SMS, out=True, event_s=50, place=(0, 3))
    view.adopt(snapshot((token(1), SMS, True, 50)))
    assert len(view) == 0
    assert view.get(token(1)) == {SMS: State(True, 50)}


def test_a_change_takes_all_entries_of_the_person_along():
    view = Suppressions()
    view.adopt(snapshot((token(1), SMS, True, 5), (token(1), VOICE, True, 5)))
    view.apply(token(1), SMS, out=False, event_s=6, place=(0, 7))
    assert view.get(token(1)) == {SMS: State(False, 6), VOICE: State(True, 5)}
    view.apply(token(2), SMS, out=False, event_s=6, place=(0, 8))
    assert view.get(token(2)) is None
    assert len(view) == 1


def test_a_record_that_changes_nothing_takes_no_memory():
    view = Suppressions()
    view.adopt(snapshot((token(1), SMS, True, 5)))
    view.apply(token(1), SMS, out=True, event_s=4, place=(0, 7))
    view.apply(token(1), SMS, out=False, event_s=5, place=(0, 8))
    assert len(view) == 0
    assert view.get(token(1)) == {SMS: State(True, 5)}


def test_what_is_shown_tells_nothing():
    assert token(1).hex() not in repr([snapshot((token(1), OURS, True, 5)), records()])
    assert "acme" not in repr(snapshot((token(1), OURS, True, 5)))
