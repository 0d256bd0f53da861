"""The start-up self-test: proves on a sample, with throw-away keys, that what leaves under this policy is sealed.

Whether to seal is decided by configuration, never by the key service's answer; this shows that it was.
"""

import os

import orjson

from processors.keyring import EpochKey, KeyRing, Needs, PersonSecret
from processors.pipeline import Inbox, Pipeline
from processors.plan import Planner
from processors.retention import instant
from processors.screen.suppression import Suppressions, Tokens
from processors.screen.verdict import RegistryView
from processors.seal import ENTROPY_BYTES, Entropy
from schemas.errors import Fatal
from schemas.policy import Policy
from schemas.sealed import KeyId

_CANARIES = {
    "sender": "+15550190001",
    "recipient": "+15550190002",
    "display_name": "selftest-name-5f2c",
    "client_ip": "192.0.2.77",
    "location": "selftest-location-5f2c",
    "content": "selftest-content-5f2c",
}


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
