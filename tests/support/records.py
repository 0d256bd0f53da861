"""Builders of inbound records, one run of the pipeline, opening what it sealed, and the spellings of a canary.

Everything is pure and comes from fixed seeds: the same test gives the same bytes on every machine.
"""

import hashlib
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import orjson
from hypothesis import HealthCheck, settings

import schemas
from processors.keyring import EpochKey, KeyRing, Needs, PersonSecret
from processors.pipeline import Inbox, Pipeline, Prepared
from processors.plan import Planner
from processors.screen.suppression import Suppressions, Tokens, View
from processors.screen.verdict import NOBODY
from processors.seal import Entropy
from schemas.catalog import CATALOG
from schemas.outbound import Message, Output
from schemas.policy import Policy, parse_policy
from schemas.sealed import KeyId, aad_head, key_info, open_box, record_key, take_apart

NOW_S = int(datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp())
AT = "2026-11-21T11:22:33Z"
HOUR = "2026-11-21T11:00:00Z"
PERSON, OTHER = "+4915112345678", "+14155550123"
DAY_S = 86_400
DEFAULT_POLICY = (Path(schemas.__file__).parent / "policies" / "default.toml").read_text()
LISTING_POLICY = DEFAULT_POLICY.replace("any = true", "any = false")
SEED = hashlib.sha256(b"tests").digest()
TOKENS = Tokens(1, SEED)
STREAM_OF = {row.domain.value: name for name, row in CATALOG.items() if row.domain is not None}


def examples(count):
    """Return the settings of a property: how many examples, and none of them on a clock."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- records ------------------------------------------------------------------------------------------------


def record(kind, **fields):
    """Return a minimal valid record as a dict, with fields changed, added, or (given as `...`) left out."""
    base = {
        "v": 1, "type": kind, "channel": "sms", "record_id": "rec-1", "account_id": "acme",
        "direction": "mt", "occurred_at": AT, "sender": "ACME", "recipient": PERSON,
    }  # fmt: skip
    return {name: value for name, value in {**base, **fields}.items() if value is not ...}


def sms_request(**fields):
    return record(
        "request", **{"channel": "sms", "purpose": "transactional", "content": "Your parcel is here", **fields}
    )


def voice_request(**fields):
    return record("request", **{"channel": "voice", "purpose": "service", **fields})


def sms_cdr(**fields):
    return record("cdr", **{"channel": "sms", "content": "Your parcel is here", "segments": 1, **fields})


def voice_cdr(**fields):
    return record("cdr", **{"channel": "voice", "duration_s": 61, "billable_s": 61, **fields})


def reply(text, **fields):
    """Return an inbound SMS of `PERSON` to the short code 12345."""
    return record("cdr", **{"direction": "mo", "sender": PERSON, "recipient": "12345", "content": text, **fields})


def preference(action="opt_out", **fields):
    return record(
        "preference", **{"direction": "mo", "sender": PERSON, "recipient": "ACME", "action": action, **fields}
    )


def raw(fields):
    """Return a record as the bytes a gateway would publish."""
    return fields if isinstance(fields, bytes) else orjson.dumps(fields)


# --- one run of the pipeline --------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def policy_of(extra="", *, default=DEFAULT_POLICY):
    """Return the default policy with TOML text added behind it."""
    return parse_policy(f"{default}\n{extra}", "test")


def account(name="acme", rules=""):
    """Return the TOML text of a listed account."""
    return f'[[account]]\nid = "{name}"\n{rules}\n'


class Listed(NamedTuple):
    """One registry of a test."""

    name: str
    as_of_s: int
    numbers: Collection[str]
    country: str = "US"

    @property
    def count(self):
        return len(self.numbers)

    def lists(self, number):
        return number in self.numbers


class Lists:
    """Registries of a test: name → (as of, numbers)."""

    def __init__(self, **lists):
        names = {name.replace("_", "-"): found for name, found in lists.items()}
        self._lists = {name: Listed(name, *found) for name, found in names.items()}

    def get(self, name):
        return self._lists.get(name)


def a_ring(needs: Needs, now_s=0):
    """Return a ring of keys that depend on nothing but what they are for, without those dead at `now_s`."""
    ring = KeyRing()
    for ref, (deadline_s, _) in needs.epochs.items():
        if deadline_s is None or deadline_s > now_s:
            ring.epochs[ref] = EpochKey(KeyId(*ref, 1), _bytes("epoch", *ref), deadline_s)
    for ref, deadline_s in needs.persons.items():
        if deadline_s is None or deadline_s > now_s:
            text = (ref.owner, ref.token.hex(), ref.month)
            ring.persons[ref] = PersonSecret(_bytes("sid", *text)[:16].hex(), _bytes("secret", *text))
    return ring


def _bytes(*parts):
    return hashlib.sha256("|".join(parts).encode()).digest()


class Run(NamedTuple):
    """What one batch became."""

    pipeline: Pipeline
    prepared: Prepared
    ring: KeyRing
    outputs: list[Output]

    @property
    def outcomes(self):
        return self.prepared.outcomes

    @property
    def streams(self):
        return {output.stream for output in self.outputs}

    def of(self, stream) -> list[Message]:
        """Return the messages of a stream, in order."""
        return [message for output in self.outputs if output.stream == stream for message in output.messages]

    def values(self, stream) -> list[dict]:
        """Return the values of a stream as they stand, parsed."""
        return [orjson.loads(message.value) for message in self.of(stream)]

    def opened(self, stream) -> list[dict[str, dict]]:
        """Return the values of a stream opened: group → fields."""
        return [
            {group: orjson.loads(text) for group, text in open_value(message.value, self.ring).items()}
            for message in self.of(stream)
        ]


def run(
    values,
    *,
    policy: Policy | None = None,
    view: View | None = None,
    registries=None,
    now_s=NOW_S,
    seed=SEED,
    classes=None,
    stream="traffic",
    partition=0,
    shuffle=True,
    partitions=4,
    exemptions=NOBODY,
) -> Run:
    """Return what the pipeline makes of the records (dicts or bytes), under keys of `a_ring`."""
    pipeline = Pipeline(Planner(policy or policy_of()), TOKENS, classes)
    inbox = Inbox(stream, partition, 0, [raw(value) for value in values])
    prepared = pipeline.prepare(inbox, view or Suppressions(), registries or Lists(), now_s, exemptions)
    ring = a_ring(prepared.needs, now_s)
    return Run(pipeline, prepared, ring, pipeline.complete(prepared, ring, Entropy(seed), partitions, shuffle=shuffle))


def outcome(value, **settings):
    """Return (end, reason) of one record alone, after seeing that it has exactly one outcome and no other trace."""
    done = run([value], **settings)
    (only,) = done.outcomes
    assert len(done.of("quarantine")) == (only.end == "quarantine")
    assert len(done.of("verdicts")) == (only.kind == "request" and only.end != "quarantine")
    assert len(done.of("cdr.anonymous")) == (only.kind == "cdr" and only.end == "emit")
    return str(only.end), only.reason


def open_value(value: bytes, ring: KeyRing, *, stream: str | None = None) -> dict[str, bytes]:
    """Return group → plaintext of a sealed value. Raises ValueError, or KeyError for a key not in the ring.

    `stream`: where it was found; None: where its key domain belongs.
    """
    sealed = take_apart(value)
    epochs = {str(epoch.id): epoch for epoch in ring.epochs.values()}
    secrets = {person.sid: person.secret for person in ring.persons.values()}
    opened = {}
    for part in sealed.parts:
        epoch = epochs[part.key]
        secret = _salt(part.sid) if part.sid not in secrets else secrets[part.sid]
        cipher = record_key(epoch.key, secret, key_info(epoch.id, sealed.account))
        head = aad_head(stream or STREAM_OF[epoch.id.domain], epoch.id.owner, sealed.account, part.group)
        opened[part.group] = open_box(cipher, head, part, sealed.envelope)
    return opened


def _salt(sid):
    if sid == "-":
        return b""
    if not sid.startswith("salt:"):
        raise KeyError("no such person")
    return bytes.fromhex(sid.removeprefix("salt:"))


# --- canaries -----------------------------------------------------------------------------------------------

_SEPARATORS = str.maketrans("", "", " -./()_\u00a0")


def spellings(text: str) -> frozenset[bytes]:
    """Return the ways in which a text could stand somewhere: as it is, reversed, other cases, encoded.

    A number is also looked for without `+` and without its country code; its separators are the haystack's.
    """
    forms = {text, text.lower(), text.upper(), *_number_forms(text)}
    forms |= {form[::-1] for form in forms}
    found: set[bytes] = set()
    for form in forms:
        for codec in ("utf-8", "utf-16-le", "utf-16-be"):
            found |= set(_encodings(form.encode(codec)))
        found |= {quote(form).encode(), quote(form, safe="").encode()}
        found.add("".join(f"\\u{ord(char):04x}" for char in form).encode())
    return frozenset(found)


def _number_forms(text: str) -> set[str]:
    if not (text.startswith("+") and text[1:].isdigit()):
        return set()
    country = "1" if text.startswith("+1") else text[1:3]  # the tests' numbers are of +1 and of two-digit countries
    return {text[1:], text[1 + len(country) :]}


def _encodings(data: bytes) -> Iterator[bytes]:
    yield data
    yield data.hex().encode()
    yield data.hex().upper().encode()
    yield "".join(f"%{byte:02X}" for byte in data).encode()
    yield "".join(f"%{byte:02x}" for byte in data).encode()
    for encode in (b64encode, urlsafe_b64encode):
        for before, skipped in ((0, 0), (1, 2), (2, 3)):  # the three ways in which it can lie in other bytes
            yield encode(bytes(before) + data)[skipped : (before + len(data)) * 8 // 6]


def haystack(*texts: bytes) -> bytes:
    """Return the bytes to search: as they are, and again without what may separate the digits of a number."""
    whole = b"\n".join(texts)
    return whole + b"\n" + whole.decode("utf-8", "replace").translate(_SEPARATORS).encode()


def found_in(hay: bytes, canaries: Iterable[str]) -> list[str]:
    """Return those of the canaries that stand in a haystack in some spelling."""
    return [text for text in canaries if any(spelling in hay for spelling in _cached(text))]


_cached = lru_cache(maxsize=1024)(spellings)


def everything(outputs: Iterable[Output]) -> list[bytes]:
    """Return all bytes that leave: values, keys, headers, timestamps."""
    return [
        part
        for output in outputs
        for message in output.messages
        for part in (
            message.value,
            message.key or b"",
            str(message.timestamp_ms).encode(),
            *(name.encode() + b"=" + value for name, value in message.headers),
        )
    ]
