"""Proofs that what leaves is sealed: at start-up with throw-away keys, and just before each commit on a sample.

Whether to seal is decided by configuration, never by the key service's answer; this shows that it was.
"""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import compress

import orjson
from pybase64 import b64decode

from processors.keyring import EpochKey, KeyRing, Needs, PersonSecret
from processors.pipeline import Inbox, Pipeline
from processors.plan import Planner
from processors.retention import instant
from processors.screen.registry import RegistryView
from processors.screen.suppression import Suppressions, Tokens
from processors.seal import ENTROPY_BYTES, Entropy
from schemas.catalog import CATALOG
from schemas.errors import Fatal, Unsealed
from schemas.outbound import Output
from schemas.policy import Policy
from schemas.sealed import NONCE_BYTES, PAD_BYTES, SEAL_ID_BYTES, KeyId
from streams.watch.watch import Watch

_CANARIES = {
    "sender": "+15550190001",
    "recipient": "+15550190002",
    "display_name": "selftest-name-5f2c",
    "client_ip": "192.0.2.77",
    "location": "selftest-location-5f2c",
    "content": "selftest-content-5f2c",
}

_ENVELOPE = frozenset({"privacy", "v"})
_ACCOUNTS = _ENVELOPE | {"account_id"}
_CLEAR = {
    "verdicts": _ACCOUNTS | {"record_id", "channel", "purpose", "verdict", "reason", "clause", "codes", "decided_at",
                             "not_after", "defer_until", "second", "exemption", "confirmation"},
    "cleared": _ACCOUNTS | {"record_id", "channel", "purpose", "not_after", "exemption"},
    "content": _ACCOUNTS | {"day"},
    "cdr.pii": _ACCOUNTS | {"month"},
    "cdr.anonymous": _ACCOUNTS | {"channel", "direction", "purpose", "country", "mcc", "mnc", "route", "status",
                                  "segments", "price", "billable_units", "occurred_at"},
    "suppressions": _ACCOUNTS | {"action", "entry", "event_at", "reason"},
    "review": _ACCOUNTS | {"day"},
    "quarantine": _ENVELOPE | {"reason", "stream", "partition", "offset"},
}  # fmt: skip
"""Stream → the names that may stand in the clear in its values. Written by hand; nothing here asks the pipeline."""
_PART = {"box", "group", "key", "sid"}
_BOX_BYTES = SEAL_ID_BYTES + NONCE_BYTES + PAD_BYTES + 16  # of the shortest: one block of padding, and the tag


def check_leaving(outputs: Sequence[Output], watch: Watch) -> None:
    """Look at one value of each output, the last, just before the commit. Raises Unsealed; tells `watch`.

    The same batch gives the same answer each time, so what was found once is not let through by trying again.
    """
    values = [(output.stream, output.messages[-1].value) for output in outputs if output.messages]
    wrong = [not _may_leave(stream, value) for stream, value in values]
    unsealed = Counter(stream for stream, _ in compress(values, wrong))
    watch.checked([stream for stream, _ in values], unsealed)
    if unsealed:
        raise Unsealed(stream=min(unsealed))


def _may_leave(stream: str, value: bytes) -> bool:
    """Return whether nothing stands in the clear but what may, and the rest is ciphertext under the right domain."""
    row, allowed = CATALOG.get(stream), _CLEAR.get(stream)
    if row is None or allowed is None:
        return False
    try:
        fields = orjson.loads(value)
        if row.domain is None:
            return set(fields) <= allowed
        return set(fields) - {"sealed"} <= allowed and all(
            part.keys() == _PART
            and part["key"].startswith(f"{row.domain}/")
            and len(b64decode(part["box"], validate=True)) >= _BOX_BYTES
            for part in fields["sealed"] or [{}]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def selftest(policy: Policy, registries: RegistryView, now_s: int) -> None:
    """Run a request, a CDR and an unreadable record through the pipeline. Raises Fatal if anything leaves clear."""
    account = "selftest" if policy.accounts.any else policy.listed[0].id
    base = {
        "v": 1, "channel": "sms", "record_id": "selftest", "account_id": account, "direction": "mt",
        "occurred_at": instant(now_s), **_CANARIES,
    }  # fmt: skip
    values = [
        orjson.dumps({**base, "type": "request", "purpose": "transactional"}),
        orjson.dumps({**base, "type": "cdr"}),
        orjson.dumps(base),
    ]
    pipeline = Pipeline(Planner(policy), Tokens(1, os.urandom(32)))
    prepared = pipeline.prepare(Inbox("traffic", 0, 0, values), Suppressions(), registries, now_s)
    outputs = pipeline.complete(prepared, throwaway_ring(prepared.needs), Entropy(os.urandom(ENTROPY_BYTES)), 1)
    leaving = b"".join(message.value + (message.key or b"") for output in outputs for message in output.messages)
    leaked = [name for name, text in _CANARIES.items() if text.lstrip("+").encode() in leaving]
    if leaked or not leaving:
        raise Fatal(f"self-test failed: {', '.join(leaked) or 'nothing'} left in the clear; no record was touched")


def throwaway_ring(needs: Needs) -> KeyRing:
    """Return a ring with fresh random keys for all that is needed; nothing sealed under them opens later."""
    ring = KeyRing()
    for ref, (deadline_s, _) in needs.epochs.items():
        ring.epochs[ref] = EpochKey(KeyId(*ref, 1), os.urandom(32), deadline_s)
    for person in needs.persons:
        ring.persons[person] = PersonSecret(os.urandom(16).hex(), os.urandom(32))
    return ring
