"""Each stage alone, with the baseline of doing the least that any implementation must."""

import os

import msgspec
import orjson
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.common import BATCH, KINDS, Bench, batch, best_us, report
from processors.decode import decode, parties, timestamp
from processors.keyring import EpochKey, KeyRing, PersonRef, PersonSecret
from processors.screen.suppression import Tokens
from processors.screen.verdict import NOBODY, Memo, Screen, Subject
from processors.seal import Entropy, Job, Sealer, seal_each
from schemas.fields import normalise
from schemas.inbound import Inbound
from schemas.sealed import KeyId


def main() -> None:
    bench = Bench()
    rows = []

    def add(stage: str, run, baseline: str, base) -> None:
        us, median = best_us(run, BATCH)
        base_us, _ = best_us(base, BATCH)
        rows.append({"stage": stage, "us": us, "median_us": median, "baseline": baseline, "baseline_us": base_us})

    for kind in KINDS:
        values = batch(kind, 1000)
        bare = msgspec.json.Decoder(Inbound).decode
        add(
            f"decode {kind}",
            lambda v=values: [decode(x) for x in v],
            "orjson.loads",
            lambda v=values: [orjson.loads(x) for x in v],
        )
        rows[-1]["typed_decode_us"] = best_us(lambda v=values: [bare(x) for x in v], BATCH)[0]
    values = batch("sms cdr", 1000)
    records = [decode(x) for x in values]
    planner, tokens = bench.pipeline.planner, Tokens(1, os.urandom(32))

    def met(record):
        plan = planner.plan(record.account_id, bench.now_s)
        known = plan.circle.met
        return parties(
            record,
            known.get(record.sender) or planner.meet(plan, record.sender, record.country, tokens),
            known.get(record.recipient) or planner.meet(plan, record.recipient, record.country, tokens),
        )

    add(
        "parties and instant",
        lambda: [(met(record), timestamp(record, bench.now_s)) for record in records],
        "attribute access",
        lambda: [(record.sender, record.recipient, record.occurred_at) for record in records],
    )
    add("token, warm", lambda: [tokens.of(record.recipient) for record in records], "hash(str)",
        lambda: [hash(record.recipient) for record in records])  # fmt: skip
    account = bench.pipeline.policy.account("acme-retail")
    subjects = [
        Subject("acme-retail", normalise(record.recipient), tokens.of(record.recipient), "sms", "marketing", "US", False,
                bench.now_s, ("platform", "account:acme-retail"), None, Memo(normalise(record.recipient), "US"))
        for record in records
    ]  # fmt: skip
    screen = Screen(bench.pipeline.policy, bench.registries, bench.view, NOBODY, bench.now_s)
    add(
        "verdict, marketing",
        lambda: [screen.verdict(subject, account) for subject in subjects],
        "one dict lookup",
        lambda: [bench.view.get(subject.token) for subject in subjects],
    )
    entropy = Entropy(os.urandom(32))
    epoch = EpochKey(KeyId("pii", "platform", "2026-11", 1), os.urandom(32), None)
    person = PersonSecret(os.urandom(16).hex(), os.urandom(32))
    template = bench.pipeline.planner.plan("acme-retail", bench.now_s).pii
    sealer = Sealer(KeyRing(), entropy, "cdr.pii", "acme-retail", epoch)
    ref = PersonRef("platform", bytes(16), "2026-11")
    plaintext = os.urandom(430)
    jobs = [Job(template, ref, plaintext)] * BATCH
    cipher, nonce, aad = AESGCM(os.urandom(32)), os.urandom(12), os.urandom(600)
    add(
        "seal 430 bytes, warm",
        lambda: seal_each(jobs, {ref: person}, entropy, lambda one: sealer.way(one, lambda _message: None)),
        "AES-256-GCM alone",
        lambda: [cipher.encrypt(nonce, plaintext, aad) for _ in range(BATCH)],
    )
    layout = bench.pipeline.cdr
    add("split: whole record", lambda: [layout.whole(record) for record in records], "orjson.dumps of the loaded record",
        lambda loaded=[orjson.loads(x) for x in values]: [orjson.dumps(x) for x in loaded])  # fmt: skip
    report(rows)


if __name__ == "__main__":
    main()
