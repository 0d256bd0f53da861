"""Frozen exemplars of opt-outs whose scope names a sender or a campaign by its token: both stand in the sealed part.

`scopes_v1.json` was made once by `python -m tests.golden.test_scopes scopes_v1.json`; no test writes it. The entries
of `exemplars_v1.json` have no such part, and still open.
"""

import hashlib
import sys
from pathlib import Path

import orjson
import pytest

from processors.seal import Entropy
from tests.golden.test_exemplars import as_json, is_sealed, opened, pipeline_of, prepared_by, ring_of
from tests.support import records as r

FOLDER = Path(__file__).parent
GOLDEN = orjson.loads((FOLDER / "scopes_v1.json").read_bytes()) if __name__ != "__main__" else {}
MESSAGES = [
    message for out in GOLDEN.get("outputs", ()) if out["stream"] == "suppressions" for message in out["messages"]
]


def test_the_frozen_inputs_still_give_the_frozen_bytes():
    pipeline = pipeline_of(GOLDEN)
    outputs = pipeline.complete(
        prepared_by(pipeline, GOLDEN), ring_of(GOLDEN), Entropy(bytes.fromhex(GOLDEN["seed"])), GOLDEN["partitions"]
    )
    assert as_json(outputs) == GOLDEN["outputs"]


@pytest.mark.parametrize("at", range(len(MESSAGES)))
def test_every_frozen_entry_still_opens_to_number_and_name(at):
    assert opened(MESSAGES[at]["value"], ring_of(GOLDEN)) == GOLDEN["opened"][at]


def test_the_name_behind_a_token_is_sealed_and_nothing_else_is_named():
    told = [orjson.loads(one["number"]) for one in GOLDEN["opened"]]
    names = [(one.get("sender"), one.get("campaign")) for one in told]
    assert sorted(map(str, names)) == sorted(
        map(str, [("ACME", None), ("+4915199999999", None), (None, "spring sale: 50 %"), (None, None), (None, None)])
    )
    for message, one in zip(MESSAGES, told, strict=True):
        clear = orjson.loads(message["value"])
        assert not {"sender", "campaign", "number"} & clear.keys()
        assert all(name not in message["key"] for name in one.values())


def freeze(name):
    """Write a new file of exemplars; fails if there is one of that name."""

    def key(*parts):
        return hashlib.sha256("|".join(("scopes", *parts)).encode()).digest()

    scoped = [
        {"scope": "sender"}, {"scope": "sender", "recipient": "+4915199999999"}, {"scope": "account"},
        {"scope": "campaign", "campaign_id": "spring sale: 50 %"}, {"scope": "campaign", "campaign_id": "spring"},
    ]  # fmt: skip
    values = [
        r.preference(record_id=f"p-{at}", **{"channel": "sms", "class": "marketing"}, **one)
        for at, one in enumerate(scoped)
    ]
    golden = {
        "policy": r.DEFAULT_POLICY, "token_version": 2, "token_key": key("token").hex(), "seed": key("seed").hex(),
        "stream": "traffic", "partition": 1, "offset": 0, "partitions": 4, "now_s": r.NOW_S,
        "values": [r.raw(value).decode() for value in values],
    }  # fmt: skip
    pipeline = pipeline_of(golden)
    prepared = prepared_by(pipeline, golden)
    golden["epochs"] = [[*ref, 1, key("epoch", *ref).hex(), until] for ref, (until, _) in prepared.needs.epochs.items()]
    golden["persons"] = []
    ring = ring_of(golden)
    golden["outputs"] = as_json(pipeline.complete(prepared, ring, Entropy(bytes.fromhex(golden["seed"])), 4))
    messages = [message for output in golden["outputs"] for message in output["messages"]]
    golden["opened"] = [opened(message["value"], ring) for message in messages if is_sealed(message)]
    with (FOLDER / name).open("xb") as file:
        file.write(orjson.dumps(golden, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    freeze(sys.argv[1])
