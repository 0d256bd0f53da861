"""Frozen exemplars of exemptions and their withdrawal.

`exemptions_v1.json` was made once by `python -m tests.golden.test_exemptions exemptions_v1.json`; no test writes it.
"""

import hashlib
import sys
from pathlib import Path

import orjson
import pytest

from processors.exemption import STREAM, Exemption, exempting, withdrawing
from processors.keyring import EpochKey, KeyRing, PersonSecret
from processors.plan import Planner
from processors.screen.suppression import Tokens, parse_key
from processors.seal import Entropy, Sealer
from schemas.policy import parse_policy
from schemas.sealed import KeyId, take_apart
from streams.exemptions import key_of
from tests.support import records as r

FOLDER = Path(__file__).parent
GOLDEN = orjson.loads((FOLDER / "exemptions_v1.json").read_bytes()) if __name__ != "__main__" else {}
AT = range(len(GOLDEN.get("given", ())))


def ring_of(golden):
    ring = KeyRing()
    for domain, owner, epoch, version, key, deadline_s in golden["epochs"]:
        key_id = KeyId(domain, owner, epoch, version)
        ring.epochs[domain, owner, epoch] = EpochKey(key_id, bytes.fromhex(key), deadline_s)
    ring.persons["person"] = PersonSecret(golden["sid"], bytes.fromhex(golden["secret"]))
    return ring


def messages(golden, ring):
    """Return each exemption's message with that of its withdrawal."""
    planner = Planner(parse_policy(golden["policy"], "golden"))
    tokens = Tokens(golden["token_version"], bytes.fromhex(golden["token_key"]))
    entropy, now_s = Entropy(bytes.fromhex(golden["seed"])), golden["now_s"]
    for account, kind, channel, given_s, expires_s, evidence, number in golden["given"]:
        token = tokens.of(number)
        key = key_of(tokens.version, token, account, kind, channel)
        one = Exemption(key, account, kind, given_s, expires_s, evidence, token, number)
        template = planner.until(STREAM, account, now_s, expires_s)
        epoch = ring.epochs.get(tuple(template.ref))
        if epoch is None:  # only while the file is made
            secret = hashlib.sha256(f"golden|{template.ref}".encode()).digest()
            epoch = ring.epochs[tuple(template.ref)] = EpochKey(KeyId(*template.ref, 1), secret, template.deadline_s)
        assert epoch.deadline_s == template.deadline_s
        sealer = Sealer(ring, entropy, STREAM, account, epoch)
        given = exempting(template, sealer, ring.persons["person"], one, now_s)
        yield given, withdrawing(given.key, orjson.loads(given.value), given.headers, "CASE-1", now_s + 60)


def as_json(message):
    return {
        "timestamp_ms": message.timestamp_ms,
        "key": message.key.decode(),
        "headers": [[name, value.decode()] for name, value in message.headers],
        "value": message.value.decode(),
    }


def test_the_frozen_inputs_still_give_the_frozen_bytes():
    made = [[as_json(one) for one in pair] for pair in messages(GOLDEN, ring_of(GOLDEN))]
    assert made == GOLDEN["messages"]


@pytest.mark.parametrize("at", AT)
def test_every_frozen_exemption_still_opens_to_its_number(at):
    exempt, withdrawn = GOLDEN["messages"][at]
    number = GOLDEN["given"][at][-1]
    assert r.open_value(exempt["value"].encode(), ring_of(GOLDEN)) == {"number": orjson.dumps({"number": number})}
    assert number not in exempt["value"] + exempt["key"] + withdrawn["value"] + withdrawn["key"]


@pytest.mark.parametrize("at", AT)
def test_every_frozen_key_still_says_whose_exemption_it_is(at):
    account, kind, channel, *_ = GOLDEN["given"][at]
    exempt, withdrawn = GOLDEN["messages"][at]
    version, _, rule, out = parse_key(exempt["key"].encode())
    assert (version, tuple(rule), out) == (
        GOLDEN["token_version"],
        (f"account:{account}", kind, channel, "account"),
        True,
    )
    assert parse_key(withdrawn["key"].encode())[2:] == (rule, False)
    assert take_apart(withdrawn["value"].encode()).parts == ()


def freeze(name):
    """Write a new file of exemplars; fails if there is one of that name."""
    golden = {
        "policy": r.DEFAULT_POLICY, "token_version": 3, "token_key": hashlib.sha256(b"golden|token").hexdigest(),
        "seed": hashlib.sha256(b"golden|exemptions").hexdigest(), "now_s": r.NOW_S,
        "sid": hashlib.sha256(b"golden|sid").hexdigest()[:32], "secret": hashlib.sha256(b"golden|secret").hexdigest(),
        "given": [
            ["acme", "purchase", "sms", r.NOW_S - 86_400, 1_840_000_000, "ORDER-7", r.OTHER],
            ["acme", "inquiry", "voice", r.NOW_S - 3600, 1_803_000_000, "TICKET/9", r.OTHER],
            ["harbor-bank", "consent", "sms", r.NOW_S, 1_893_456_000, "FORM_1", r.PERSON],
        ],
        "epochs": [],
    }  # fmt: skip
    ring = ring_of(golden)
    golden["messages"] = [[as_json(one) for one in pair] for pair in messages(golden, ring)]
    golden["epochs"] = [[*one.id, one.key.hex(), one.deadline_s] for one in ring.epochs.values()]
    with (FOLDER / name).open("xb") as file:
        file.write(orjson.dumps(golden, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    freeze(sys.argv[1])
