"""The whole program on a real broker through the command line, under the streams that `streams apply` makes."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from aiokafka import AIOKafkaConsumer

from streams.config import load
from streams.log.connection import Place, tls_context
from streams.log.provision import apply
from tests.support.commands import Place as Deployed
from tests.support.commands import ago, eventually
from tests.support.kafka import config_file
from tests.support.records import raw, reply, sms_cdr, sms_request, voice_cdr

HOUR_MS = 3_600_000


class KafkaDeployed(Deployed):
    """A deployment whose log is on the shared broker, under a prefix of its own."""

    def __init__(self, folder: Path, broker, prefix: str) -> None:
        super().__init__(folder)
        self.broker, self.prefix = broker, prefix
        self.data = folder / "streamveil-data"
        self.url = broker.url
        self.configured()
        apply(self.loaded())

    def configured(self, **top: object) -> None:
        """Write the configuration anew; `top`: settings of its top level."""
        head = "".join(f"{name} = {json.dumps(value)}\n" for name, value in {"lease_s": 3.0, **top}.items())
        config_file(self.folder, self.broker, self.prefix, head)

    def loaded(self):
        return load(SimpleNamespace(config=str(self.config), log=None))


@pytest.fixture
def place(tmp_path, broker, prefix):
    made = KafkaDeployed(tmp_path, broker, prefix)
    yield made
    made.close()


def test_every_kind_of_record_comes_out_as_on_sqlite(place):
    person = "+14155550101"
    records = [
        sms_request(record_id="q1", recipient=person, purpose="marketing", occurred_at=ago()),
        sms_cdr(record_id="c1", recipient=person, content="words", occurred_at=ago()),
        voice_cdr(record_id="v1", recipient=person, occurred_at=ago()),
        reply("STOP", record_id="s1", sender=person, occurred_at=ago()),
        sms_request(record_id="q2", recipient=person, purpose="marketing", occurred_at=ago()),
        b"{broken",
    ]
    assert place.run("publish", place.file(*records)).status == 0
    done = place.run("run", "--until-idle")
    assert (done.status, done.records) == (0, 6), done.err

    assert place.verdicts() == {"q1": ("cleared", None), "q2": ("refused", "opted_out")}
    assert Counter(one["record_id"] for one in place.opened("cdr.pii")) == Counter(["c1", "v1", "s1"])
    assert {one["content"] for one in place.opened("content")} == {"words", "STOP"}
    assert len(place.values("cdr.anonymous")) == 3
    assert [one["record"] for one in place.opened("quarantine")] == ["{broken"]


def test_a_record_above_a_megabyte_is_quarantined_whole_and_the_others_go_on(place):
    big = raw(sms_cdr(record_id="big", content="x" * 3_500_000))
    nearly = sms_cdr(record_id="nearly", content="é" * 400_000)
    records = [sms_cdr(record_id="a"), big, nearly, sms_cdr(record_id="b")]
    assert place.run("publish", place.file(*records)).status == 0
    done = place.run("run", "--until-idle")
    assert (done.status, done.records) == (0, 4), done.err

    assert {one["record_id"] for one in place.opened("cdr.pii")} >= {"a", "b"}
    quarantined = place.opened("quarantine")
    assert big.decode() in [one["record"] for one in quarantined]
    assert len(quarantined) + len(place.opened("cdr.pii")) == 4


def test_anonymous_records_have_no_key_a_coarse_time_and_one_partition_a_batch(place):
    records = [sms_cdr(record_id=f"r{n}", recipient=f"+1415555{n:04}", occurred_at=ago(n * 60)) for n in range(300)]
    assert place.run("publish", place.file(*records)).status == 0
    assert place.run("run", "--until-idle").status == 0

    found = asyncio.run(every_message(place, "cdr.anonymous"))
    assert sum(map(len, found.values())) == 300
    for messages in found.values():
        assert {message.key for message in messages} <= {None}
        assert {message.timestamp % HOUR_MS for message in messages} <= {0}
        assert {name for message in messages for name, _ in message.headers} == {"role", "class", "policy"}
    personal = asyncio.run(every_message(place, "cdr.pii"))
    assert {message.timestamp % (24 * HOUR_MS) for some in personal.values() for message in some} == {0}


async def every_message(place, stream):
    """Return what an ordinary reader finds in a stream, by partition."""
    kafka = place.loaded().kafka
    consumer = AIOKafkaConsumer(
        bootstrap_servers=",".join(kafka.servers), security_protocol="SASL_SSL", ssl_context=tls_context(kafka),
        sasl_mechanism="SCRAM-SHA-512", sasl_plain_username=kafka.username,
        sasl_plain_password=kafka.password_path.read_text(), auto_offset_reset="earliest",
        isolation_level="read_committed",
    )  # fmt: skip
    await consumer.start()
    consumer.assign([Place(kafka.prefix + stream, partition) for partition in range(4)])
    found = {}
    while page := await consumer.getmany(timeout_ms=1500):
        for where, messages in page.items():
            found.setdefault(where.partition, []).extend(messages)
    await consumer.stop()
    return found


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost_or_done_twice(place):
    records = [sms_request(record_id=f"r{n:04}", recipient=f"+1415555{n:04}", occurred_at=ago()) for n in range(2000)]
    place.configured(batch_records=40)
    run = place.start("run", "--workers", "2")
    eventually(lambda: len(children(run.pid)) == 2, "two workers")
    assert place.run("publish", place.file(*records)).status == 0
    eventually(lambda: len(place.verdicts()) > 100, "some verdicts")
    before = children(run.pid)
    os.kill(before[0], signal.SIGKILL)

    eventually(lambda: len(place.verdicts()) == 2000, "all verdicts")

    assert "a worker was fenced or killed and is replaced" in place.told(run)
    eventually(lambda: len(children(run.pid)) == 2 and children(run.pid) != before, "another worker")
    run.terminate()
    assert place.ended(run).status == 0, place.told(run)
    assert Counter(one["record_id"] for one in place.values("verdicts")) == Counter(f"r{n:04}" for n in range(2000))


def test_a_worker_that_is_stopped_hands_its_partitions_over_at_once(place):
    place.configured(lease_s=300.0)  # nobody waits for that
    records = [sms_request(record_id=f"r{n}", recipient=f"+1415555{n:04}", occurred_at=ago()) for n in range(400)]
    first = place.start("run")
    eventually((place.data / "worker-0.lock").exists, "the first worker")
    second = place.start("run")
    eventually((place.data / "worker-1.lock").exists, "the second worker")
    assert place.run("publish", place.file(*records[:200])).status == 0
    eventually(lambda: len(place.verdicts()) == 200, "the first half")
    first.terminate()
    assert place.ended(first).status == 0
    assert place.run("publish", place.file(*records[200:])).status == 0
    eventually(lambda: len(place.verdicts()) == 400, "the second half")
    second.terminate()
    assert place.ended(second).status == 0


def test_tail_gives_the_newest_records_although_offsets_have_gaps(place):
    for n in range(6):  # each in a transaction of its own
        assert place.run("publish", place.file(sms_request(record_id=f"r{n}", recipient="+14155550101"))).status == 0
        assert place.run("run", "--until-idle").status == 0

    shown = [line["value"]["record_id"] for line in place.run("tail", "verdicts", "--max", "2", "--json").lines]

    assert shown == ["r4", "r5"]


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_configuration_without_a_user_is_refused_in_one_line(place):
    place.config.write_text("")
    done = place.run("run")
    assert done.status == 1
    assert "username and password_file" in done.err
    assert len(done.err.splitlines()) == 1


# --- each role with its own user and no more rights than the catalog gives ---------------------------------------


@pytest.fixture
def roles(place):
    """Return a function that runs a command as the user of a role."""
    passwords = place.folder / "passwords"
    apply(place.loaded(), credentials=passwords)

    def command(role, *words):
        config = place.config.read_text()
        admin = place.loaded().kafka
        own = config.replace(f'username = "{admin.username}"', f'username = "{place.prefix}{role}"')
        own = own.replace(str(admin.password_path), str(passwords / f"{role}.password"))
        assert own.count(role) >= 2
        path = place.folder / f"{role}.toml"
        path.write_text(own)
        with mock.patch.object(place, "config", path):
            return place.run(*words)

    return command


def test_every_role_can_do_its_work_with_its_own_user(place, roles):
    person = "+14155550101"
    records = [
        sms_request(record_id="q1", recipient=person, purpose="marketing", occurred_at=ago()),
        sms_cdr(record_id="c1", recipient=person, content="words", occurred_at=ago()),
        b"{broken",
    ]
    steps = [
        ("gateway", "publish", place.file(*records)),
        ("worker", "run", "--until-idle"),
        ("gateway", "tail", "verdicts", "--from-beginning", "--json"),
        ("billing", "tail", "cdr.anonymous", "--from-beginning", "--json"),
        ("dpo", "tail", "cdr.pii", "--from-beginning", "--json", "--reveal", "--reason", "CASE-1"),
        ("support", "tail", "cdr.pii", "--from-beginning", "--json", "--reveal", "--reason", "CASE-2"),
        ("operator", "quarantine", "list", "--json"),
        ("operator", "quarantine", "replay", "--all", "--reason", "CASE-3"),
        ("officer", "optout", "add", person),
        ("gateway", "publish", place.file(sms_request(record_id="q2", recipient=person, purpose="marketing"))),
        ("worker", "run", "--until-idle", "--workers", 2),
        ("gateway", "tail", "verdicts", "--from-beginning", "--json"),
    ]
    outputs = []
    for role, *words in steps:
        done = roles(role, *words)
        assert done.status == 0, (role, words, done.err)
        outputs.append(done.out)

    assert json.loads(outputs[4])["reveal"]["fields"]["record_id"] == "c1"
    assert json.loads(outputs[5])["reveal"]["state"] == "revealed"
    verdicts = [json.loads(line)["value"] for line in outputs[-1].splitlines()]
    assert {one["record_id"]: one["verdict"] for one in verdicts} == {"q1": "cleared", "q2": "refused"}


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("billing", ("tail", "cdr.pii", "--from-beginning")),
        ("gateway", ("tail", "cdr.pii", "--from-beginning")),
        ("gateway", ("run", "--until-idle")),
        ("support", ("tail", "content", "--from-beginning")),
        ("sre", ("optout", "add", "+14155550101")),
        ("billing", ("optout", "add", "+14155550101")),
    ],
)
def test_what_a_role_may_not_do_is_refused_in_one_line(roles, role, words):
    done = roles(role, *words)

    assert done.status == 1
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert "do not allow this to the user" in done.err


def test_a_retention_run_destroys_what_is_due_and_cuts_what_is_sealed(place):
    # Given a record in each sealed stream
    records = [
        sms_request(record_id="q1", occurred_at=ago()),
        sms_cdr(record_id="c1", content="words", occurred_at=ago()),
    ]
    assert place.run("publish", place.file(*records)).status == 0
    assert place.run("run", "--until-idle").status == 0
    later = f"{time.gmtime().tm_year + 1}-{time.strftime('%m')}-28T00:00:00Z"
    # When a run is made ahead of the clock
    done = place.run("retention", "run", "--json", "--now", later, "--yes")
    assert done.status == 0, done.err
    (report,) = done.lines
    # Then what died by then is cut off its topic, and opt-outs and what lives longer are not
    cut = {one["stream"]: one for one in report["cut"]}
    assert set(cut) == {"cleared", "content"}
    for stream, one in cut.items():
        assert place.stored(stream) == []
        assert place.within(lambda deployment, name=stream: deployment.log.begin_offsets(name)) == one["to"]
    assert len(place.stored("cdr.pii")) == 1
    assert report["skipped"] == []
    # Then another run has nothing to do
    again = place.run("retention", "run", "--json", "--now", later, "--yes")
    assert [again.lines[0][name] for name in ("epochs", "cut", "failed")] == [0, [], False]


def test_what_a_worker_may_not_cut_is_said_and_an_officer_cuts_it(place, roles):
    assert (
        roles("gateway", "publish", place.file(sms_request(occurred_at=ago()), sms_cdr(occurred_at=ago()))).status == 0
    )
    assert roles("worker", "run", "--until-idle").status == 0
    for role, skipped in (("worker", {"cleared", "content", "cdr.pii", "checkpoint"}), ("officer", set())):
        done = roles(role, "retention", "run", "--json")
        assert done.status == 0, done.err
        report = json.loads(done.out)
        assert not report["failed"]
        assert {one["what"] for one in report["skipped"]} == skipped
        assert all("do not allow this to the user" in one["why"] for one in report["skipped"])


def test_an_officer_answers_requests_holds_rotates_and_proves_with_the_officers_user(place, roles):
    # Given two people, one of whom is held
    erased, held = "+14155550101", "+14155550102"
    records = [
        sms_cdr(record_id=f"{number[-1]}-{at}", recipient=number, content="words", occurred_at=ago())
        for at in range(20)
        for number in (erased, held)
    ]

    def ok(*words, role="officer"):
        done = roles(role, *words)
        assert done.status == 0, (words, done.err)
        return done

    def opened():
        found = ok("tail", "cdr.pii", "--from-beginning", "--json", "--reveal", "--reason", "T-1").lines
        return Counter(
            (one["reveal"]["state"], one["reveal"]["fields"].get("record_id", "?")[0])
            for one in found
            if "corrects" not in one["value"]
        )

    ok("publish", place.file(*records), role="gateway")
    ok("run", "--until-idle", role="worker")
    # When an officer does what there is to do, with the rights of an officer
    assert ok("subject", "hold", held, "--reason", "H-1", "--json").lines[0]["records"] == 20
    report = ok("subject", "access", erased, "--reason", "C-1", "--json").lines
    assert sum(one["item"] == "record" for one in report) == 20
    ok("subject", "rectify", erased, "--set", "country=HR", "--reason", "C-2")
    ok("subject", "object", held, "--reason", "C-3")
    refused = roles("officer", "subject", "erase", held, "--reason", "C-4")
    assert (refused.status, "H-1" in refused.err) == (1, True)
    assert ok("subject", "erase", erased, "--reason", "C-5", "--json").lines[0]["erased"] == 1
    # Then what was committed before is gone, what is committed later opens
    assert opened() == {("destroyed", "?"): 20, ("revealed", "2"): 20}
    ok("publish", place.file(sms_cdr(record_id="later", recipient=erased, occurred_at=ago())), role="gateway")
    ok("run", "--until-idle", role="worker")
    assert opened()["revealed", "l"] == 1
    # And the token key is rotated, opt-outs with it
    ok("keys", "rotate", "token")
    request = sms_request(record_id="q", recipient=held, purpose="marketing", occurred_at=ago(0))
    ok("publish", place.file(request), role="gateway")
    ok("run", "--until-idle", role="worker")
    (verdict,) = ok("tail", "verdicts", "--from-beginning", "--json", role="gateway").lines
    assert verdict["value"]["reason"] == "blocked_by_officer"
    # And the hold is released, and all of it proved
    ok("subject", "release", held, "--reason", "H-1")
    copies = ok("tail", "held", "--from-beginning", "--json", "--reveal", "--reason", "T-2").lines
    assert {one["reveal"]["state"] for one in copies} == {"destroyed"}
    ok("retention", "run")
    folder = place.folder / "evidence"
    ok("evidence", "report", "--from", "2026-01-01", "--to", "2099-01-01", "--out", folder)
    assert "complete, unchanged and in order" in ok("evidence", "verify", folder).out
