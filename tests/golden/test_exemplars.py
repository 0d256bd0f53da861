"""Frozen exemplars: what version 1 wrote once must open and parse for ever, and the same inputs give the same bytes.

`exemplars_v1.json` holds inputs, policy, keys, entropy and every byte that came of them, with what each sealed value
says. No test writes it. A new wire format is a new version with a file of its own, made once by
`python -m tests.golden.test_exemplars exemplars_vN.json`, which never overwrites one; the old one stays and still
opens.
"""

import hashlib
import sys
from pathlib import Path

import orjson
import pytest

from processors.keyring import EpochKey, EpochRef, KeyRing, PersonRef, PersonSecret
from processors.pipeline import Inbox, Pipeline
from processors.plan import Planner
from processors.screen.suppression import Suppressions, Tokens, parse_key
from processors.seal import Entropy
from schemas.catalog import CATALOG
from schemas.policy import parse_policy
from schemas.sealed import KeyId, take_apart
from tests.support import records as r

FOLDER = Path(__file__).parent
GOLDEN = orjson.loads((FOLDER / "exemplars_v1.json").read_bytes()) if __name__ != "__main__" else {}
OUTPUTS = [
    (output["stream"], message)
    for output in GOLDEN.get("outputs", ())
    for message in output["messages"]
]  # fmt: skip


def pipeline_of(golden):
    policy = parse_policy(golden["policy"], "golden")
    return Pipeline(Planner(policy), Tokens(golden["token_version"], bytes.fromhex(golden["token_key"])))


def prepared_by(pipeline, golden):
    inbox = Inbox(golden["stream"], golden["partition"], golden["offset"], [v.encode() for v in golden["values"]])
    return pipeline.prepare(inbox, Suppressions(), r.Lists(), golden["now_s"])


def ring_of(golden):
    ring = KeyRing()
    for domain, owner, epoch, version, key, deadline_s in golden["epochs"]:
        key_id = KeyId(domain, owner, epoch, version)
        ring.epochs[EpochRef(domain, owner, epoch)] = EpochKey(key_id, bytes.fromhex(key), deadline_s)
    for owner, token, month, sid, secret in golden["persons"]:
        ring.persons[PersonRef(owner, bytes.fromhex(token), month)] = PersonSecret(sid, bytes.fromhex(secret))
    return ring


def as_json(outputs):
    return [
        {
            "stream": output.stream,
            "partition": output.partition,
            "messages": [
                {
                    "timestamp_ms": message.timestamp_ms,
                    "key": None if message.key is None else message.key.decode(),
                    "headers": [[name, value.decode()] for name, value in message.headers],
                    "value": message.value.decode(),
                }
                for message in output.messages
            ],
        }
        for output in outputs
    ]


def opened(value, ring):
    return {group: text.decode() for group, text in r.open_value(value.encode(), ring).items()}


def is_sealed(message):
    return '"sealed":' in message["value"]


# --- the tests ----------------------------------------------------------------------------------------------


def test_the_frozen_inputs_still_give_the_frozen_bytes():
    pipeline = pipeline_of(GOLDEN)
    prepared = prepared_by(pipeline, GOLDEN)
    entropy = Entropy(bytes.fromhex(GOLDEN["seed"]))
    outputs = pipeline.complete(prepared, ring_of(GOLDEN), entropy, GOLDEN["partitions"])
    assert as_json(outputs) == GOLDEN["outputs"]
    assert [[found.kind, str(found.end), found.reason] for found in prepared.outcomes] == GOLDEN["outcomes"]


def test_the_frozen_needs_are_still_asked_for():
    needs = prepared_by(pipeline_of(GOLDEN), GOLDEN).needs
    ring = ring_of(GOLDEN)
    assert set(needs.epochs) == set(ring.epochs)
    assert set(needs.persons) == set(ring.persons)
    assert {ref: deadline_s for ref, (deadline_s, _) in needs.epochs.items()} == {
        ref: epoch.deadline_s for ref, epoch in ring.epochs.items()
    }


@pytest.mark.parametrize("at", [at for at, (_, message) in enumerate(OUTPUTS) if is_sealed(message)])
def test_every_frozen_sealed_value_still_opens_to_what_it_said(at):
    stream, message = OUTPUTS[at]
    ring = ring_of(GOLDEN)
    assert opened(message["value"], ring) == message_opened(at)
    assert r.open_value(message["value"].encode(), ring, stream=stream)
    assert take_apart(message["value"].encode()).account == (orjson.loads(message["value"]).get("account_id") or "")


def message_opened(at):
    return GOLDEN["opened"][str(at)]


@pytest.mark.parametrize("at", range(len(OUTPUTS)))
def test_every_frozen_value_is_one_json_object_of_version_1_with_its_tags(at):
    stream, message = OUTPUTS[at]
    value = orjson.loads(message["value"])
    assert value["v"] == 1
    assert value["privacy"]["data_class"] == CATALOG[stream].data_class
    if stream == "suppressions":
        assert parse_key(message["key"].encode())[0] == GOLDEN["token_version"]


def test_there_is_an_exemplar_of_every_stream_that_the_pipeline_writes():
    streams = {stream for stream, _ in OUTPUTS}
    assert streams == {
        "verdicts", "cleared", "content", "cdr.pii", "cdr.anonymous", "suppressions", "review", "quarantine"
    }  # fmt: skip
    groups = {group for found in GOLDEN["opened"].values() for group in found}
    assert groups == {"primary", "other", "content", "number", "review", "record"}
    assert {value for _, value, _ in GOLDEN["outcomes"]} == {"emit", "refuse", "quarantine", "expired"}


# --- making a file, once ------------------------------------------------------------------------------------


def freeze(name):
    """Write a new file of exemplars; fails if there is one of that name."""

    def key(*parts):
        return hashlib.sha256("|".join(("golden", *parts)).encode()).digest()

    full = {
        "country": "DE", "mcc": "262", "mnc": "07", "route": "gold-1", "status": "DELIVRD", "error_code": "000",
        "price": {"amount": "0.0710", "currency": "EUR"}, "campaign_id": "spring", "client_ip": "192.0.2.7",
        "location": "Straße 1", "display_name": "Zoë", "child": False, "attributes": {"ticket": "T-1"},
    }  # fmt: skip
    call = {
        "answered_at": "2026-11-21T11:22:35Z",
        "hangup_cause": "normal",
        "recording_ref": "rec/1",
        "transcript": "Hallo",
    }
    values = [
        r.sms_request(**full, record_id="q-1", segments=2, encoding="ucs2"),
        r.voice_request(record_id="q-2", sender=r.OTHER, purpose="marketing"),
        r.sms_request(record_id="q-3", recipient=""),
        r.sms_cdr(**full, purpose="otp", record_id="c-1", encoding="gsm"),
        r.voice_cdr(**full, **call, record_id="c-2", sender=r.OTHER),
        r.voice_cdr(**call, record_id="c-3", direction="mo", sender=r.PERSON, recipient=r.OTHER),
        r.sms_cdr(record_id="c-4", sender="", recipient="12345", content="an nobody"),
        r.sms_cdr(record_id="c-5", occurred_at="2024-02-29T23:59:59Z"),
        r.sms_cdr(record_id="c-6", occurred_at="2014-02-28T23:59:59Z"),
        r.reply("Bitte stop", record_id="c-7"),
        r.reply("STOP", record_id="c-8"),
        r.sms_request(record_id="q-4"),
        r.reply("START", record_id="c-9", occurred_at="2026-11-21T11:30:00Z"),
        r.preference(record_id="p-1", scope="campaign", campaign_id="spring", **{"class": "marketing"}, sender=r.OTHER),
        r.preference(record_id="p-2", scope="platform", channel="voice", sender="ann@example.org"),
        b"not a record",
        r.sms_cdr(record_id="c-10", account_id="secretive"),
        r.sms_cdr(record_id="c-11", account_id="partner"),
    ]
    accounts = r.account("secretive", 'content = "never"')
    accounts += r.account(
        "partner",
        'jurisdiction = "CH"\n[[account.role]]\ndata_class = "traffic"\nrole = "processor"\n'
        'agreement = "MSA-17"\nfrom = 2026-01-01\nclause = "KAL-1"',
    )
    golden = {
        "policy": f"{r.DEFAULT_POLICY}\n{accounts}", "token_version": 3, "token_key": key("token").hex(),
        "seed": key("seed").hex(), "stream": "traffic", "partition": 2, "offset": 1000, "partitions": 4,
        "now_s": r.NOW_S, "values": [r.raw(value).decode() for value in values],
    }  # fmt: skip
    pipeline = pipeline_of(golden)
    prepared = prepared_by(pipeline, golden)
    golden["epochs"] = [[*ref, 1, key("epoch", *ref).hex(), until] for ref, (until, _) in prepared.needs.epochs.items()]
    golden["persons"] = [
        [ref.owner, ref.token.hex(), ref.month, key("sid", ref.owner, ref.token.hex(), ref.month)[:16].hex(),
         key("secret", ref.owner, ref.token.hex(), ref.month).hex()]
        for ref in prepared.needs.persons
    ]  # fmt: skip
    golden["outcomes"] = [[found.kind, str(found.end), found.reason] for found in prepared.outcomes]
    ring = ring_of(golden)
    golden["outputs"] = as_json(pipeline.complete(prepared, ring, Entropy(bytes.fromhex(golden["seed"])), 4))
    messages = [message for output in golden["outputs"] for message in output["messages"]]
    golden["opened"] = {str(at): opened(m["value"], ring) for at, m in enumerate(messages) if is_sealed(m)}
    with (FOLDER / name).open("xb") as file:
        file.write(orjson.dumps(golden, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    freeze(sys.argv[1])
