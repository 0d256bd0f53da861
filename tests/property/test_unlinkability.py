"""Can the anonymous records be matched to their personal twins by anything but what they publish?

Each batch has 1,000 records that differ in one published attribute, the route, which serves as the truth only: no
matcher looks at it. Seeds are fixed, so the numbers are the same on every run.
"""

from base64 import b64decode
from collections import Counter
from functools import lru_cache
from itertools import pairwise

import orjson
import pytest

from tests.support.records import run, sms_cdr, voice_cdr

SIZE = 1000
BATCHES = 12


def route(n):
    return f"r{n // 100:02}-{n % 100:02}"  # all of one length


def records(batch):
    """A batch over one day, in the order of the day, with personal parts of very different lengths."""
    values = []
    for n in range(SIZE):
        second = n * 60 + batch
        at = f"2026-11-20T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z"
        common = {
            "record_id": f"id-{n % 10}{n // 10 % 10}{n // 100}", "occurred_at": at, "route": route(n),
            "recipient": f"+49151{(n * 7919 + batch) % 10**8:08}", "display_name": "x" * ((n * 37) % 200 + 1),
        }  # fmt: skip
        values.append(voice_cdr(**common) if n % 5 == 0 else sms_cdr(**common, content="y" * (n % 140 + 1)))
    return [orjson.dumps(value) for value in values]


@lru_cache(maxsize=4)
def batches(*, shuffle):
    """Per batch: the personal messages with the truth of each, and the anonymous ones with theirs."""
    found = []
    for batch in range(BATCHES):
        done = run(records(batch), seed=bytes([batch + 1]) * 32, shuffle=shuffle)
        personal = [(message, route(n)) for n, message in enumerate(done.of("cdr.pii"))]
        anonymous = [(message, orjson.loads(message.value)["route"]) for message in done.of("cdr.anonymous")]
        assert len(personal) == len(anonymous) == SIZE
        found.append((personal, anonymous))
    return found


def part(message):
    return orjson.loads(message.value)["sealed"][0]


def at_place(place, _):
    return place


def from_the_end(place, _):
    return -place


def by_timestamp(place, message):
    return message.timestamp_ms, place


def by_length(place, message):
    return len(message.value), place


def by_length_longest_first(place, message):
    return -len(message.value), place


def by_seal_id(_, message):
    return b64decode(part(message)["box"])[:16]


def by_nonce(_, message):
    return b64decode(part(message)["box"])[16:28]


def by_ciphertext(_, message):
    return b64decode(part(message)["box"])[28:]


def by_sid(place, message):
    return part(message)["sid"], place


def by_bytes(_, message):
    return message.value


MATCHERS = [  # how personal and anonymous records are put in order; then first goes with first, and so on
    (at_place, at_place),
    (at_place, from_the_end),
    (by_timestamp, by_timestamp),
    (by_length, by_length),
    (by_length, by_length_longest_first),
    (by_seal_id, at_place),
    (by_nonce, at_place),
    (by_ciphertext, at_place),
    (by_ciphertext, by_bytes),
    (by_sid, at_place),
    (by_bytes, at_place),
]
BLIND = [pair for pair in MATCHERS if pair[1] in (at_place, from_the_end)]
"""Those that see nothing of what an anonymous record publishes."""


def matches(personal, anonymous, by_personal, by_anonymous):
    """For how many personal records the matcher finds the right anonymous one."""
    left = sorted(enumerate(personal), key=lambda item: by_personal(item[0], item[1][0]))
    right = sorted(enumerate(anonymous), key=lambda item: by_anonymous(item[0], item[1][0]))
    return sum(a[1][1] == b[1][1] for a, b in zip(left, right, strict=True))


def near_chance(right, tries):
    """Within 3 standard errors: a random permutation of any size has one fixed point on average, variance one."""
    return abs(right - tries) <= 3 * tries**0.5


@pytest.mark.parametrize("matcher", BLIND, ids=lambda pair: f"{pair[0].__name__} to {pair[1].__name__}")
def test_no_matcher_finds_more_twins_than_chance(matcher):
    assert near_chance(sum(matches(*batch, *matcher) for batch in batches(shuffle=True)), BATCHES)


@pytest.mark.parametrize("matcher", MATCHERS, ids=lambda pair: f"{pair[0].__name__} to {pair[1].__name__}")
def test_among_records_that_publish_the_same_no_matcher_finds_more_than_chance(matcher):
    # Given a matcher that knows of each personal record what its twin publishes: hour and channel
    right = tries = 0
    for personal, anonymous in batches(shuffle=True):
        told = {truth: _published(message) for message, truth in anonymous}
        for attributes in set(told.values()):
            here, there = ([item for item in side if told[item[1]] == attributes] for side in (personal, anonymous))
            # When it matches those that share it
            right += matches(here, there, *matcher)
            tries += 1
    # Then it does so by chance
    assert tries > 20 * BATCHES
    assert near_chance(right, tries)


def _published(message):
    fields = orjson.loads(message.value)
    return fields["channel"], fields["occurred_at"]


@pytest.mark.parametrize("matcher", [(at_place, at_place), (by_timestamp, by_timestamp)])
def test_without_the_shuffle_the_same_matcher_finds_nearly_all(matcher):
    right = sum(matches(*batch, *matcher) for batch in batches(shuffle=False))
    assert right > 0.9 * SIZE * BATCHES


def test_neighbours_in_the_input_are_no_neighbours_in_the_output():
    # Given how often the next anonymous record is that of the next personal one: by chance about once a batch
    follow = 0
    for _, anonymous in batches(shuffle=True):
        truths = [truth for _, truth in anonymous]
        follow += sum(b == route(int(a[1:3]) * 100 + int(a[4:]) + 1) for a, b in pairwise(truths))
    assert near_chance(follow, BATCHES)


def test_every_record_goes_to_every_part_of_the_output_about_as_often():
    # Given the quarter of the output in which the records of each quarter of the input end
    counts = Counter()
    for _, anonymous in batches(shuffle=True):
        for at, (_, truth) in enumerate(anonymous):
            counts[(int(truth[1:3]) * 100 + int(truth[4:])) * 4 // SIZE, at * 4 // SIZE] += 1
    # Then each of the 16 pairs has a sixteenth of them, within 4 standard errors
    expected = SIZE * BATCHES / 16
    assert len(counts) == 16
    assert all(abs(count - expected) <= 4 * expected**0.5 for count in counts.values())


def test_no_two_attempts_mix_in_the_same_way():
    orders = {tuple(truth for _, truth in anonymous) for _, anonymous in batches(shuffle=True)}
    assert len(orders) == BATCHES


def test_nothing_of_a_personal_value_stands_in_an_anonymous_one():
    # Given the ids, boxes and key names of a batch
    personal, anonymous = batches(shuffle=True)[0]
    told = b"\n".join(message.value for message, _ in anonymous)
    for message, _ in personal:
        sealed = part(message)
        for text in (sealed["sid"], sealed["box"][:40], sealed["key"], sealed["box"][-40:]):
            assert text.encode() not in told
    assert {message.headers for message, _ in anonymous} == {
        (("role", b"controller"), ("class", b"anonymous"), ("policy", b"default/1"))
    }
    assert {message.key for message, _ in anonymous} == {None}
