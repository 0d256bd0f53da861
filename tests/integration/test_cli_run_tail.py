"""`run` and `tail` as their users meet them, and a person's STOP from the gateway's file to the refusal."""

import json
import signal

import pytest

from schemas.catalog import CATALOG, INPUTS
from tests.support.commands import SHORT_LEASE, Place, ago, eventually, one_line
from tests.support.records import DEFAULT_POLICY, OTHER, PERSON, preference, reply, sms_cdr, sms_request, voice_cdr

CODES = {"twilio": 21610, "telnyx": 40300, "plivo": 200, "vonage": 9, "sinch": 257, "infobip": 2050}
READABLE = [name for name in CATALOG if name not in INPUTS]
PRIVACY = {"role", "controller", "processor", "legal_basis", "purposes", "data_class", "policy", "jurisdiction",
           "transfer", "expires_at"}  # fmt: skip


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


def requests(count, first=0):
    return [
        sms_request(record_id=f"q{n}", recipient=f"+1415555{n:04}", occurred_at=ago())
        for n in range(first, first + count)
    ]


def ids(lines):
    return [line["value"]["record_id"] for line in lines]


# --- tail: what it shows -----------------------------------------------------------------------------------------


def test_a_line_of_json_has_exactly_its_fields(place):
    place.publish(*requests(1), sms_cdr(record_id="c1", occurred_at=ago()), preference(occurred_at=ago()))
    place.work()
    fields = {"stream", "partition", "offset", "timestamp", "key", "headers", "value"}
    for stream in ("verdicts", "cleared", "cdr.pii", "cdr.anonymous", "content", "suppressions"):
        (line,) = place.tail(stream)
        assert set(line) == fields, stream
        assert (line["stream"], line["offset"]) == (stream, 0)
        assert line["partition"] in range(4)
        assert line["timestamp"].endswith("Z")
        assert len(line["timestamp"]) == len("2026-11-21T12:00:00Z")
        assert set(line["headers"]) == {"role", "class", "policy"}
        assert set(line["value"]["privacy"]) - {"anonymous_from"} == PRIVACY
        assert (line["key"] is not None) == (stream == "suppressions")
        (line,) = place.tail(stream, "--reveal", "--reason", "X")
        assert set(line) == fields | {"reveal"}
        assert set(line["reveal"]) == {"state", "fields", "withheld"}


def test_json_is_one_object_a_line_on_standard_output_and_nothing_else_anywhere(place):
    place.publish(*requests(3))
    place.work()
    done = place.run("tail", "verdicts", "--json")
    assert (done.status, done.err, len(done.lines)) == (0, "", 3)


def test_without_reveal_nothing_sealed_is_shown_and_nothing_is_noted(place):
    words = "Ring me at the blue door"
    place.publish(
        sms_request(recipient=PERSON, content=words, occurred_at=ago()),
        voice_cdr(recipient=PERSON, sender=OTHER, transcript=words, occurred_at=ago()),
        reply(f"stop {words}", occurred_at=ago()),
        preference(sender=PERSON, occurred_at=ago()),
        b'{"broken": "' + words.encode(),
    )
    place.work()
    shown = "".join(place.call("tail", stream, "--from-beginning").out for stream in READABLE)
    assert shown.count('"box"') == 9
    assert not any(secret in shown for secret in (words, PERSON[1:], PERSON[-8:], OTHER[1:], OTHER[-8:]))
    assert place.ends("audit") == 0
    # nor the token of who opted out, which is the person in other letters
    (stored,) = place.stored("suppressions")
    token = stored.key.decode().split("|")[0].split(".")[1]
    assert len(token) == 32
    assert token not in shown


@pytest.mark.parametrize("stream", INPUTS)
def test_clear_traffic_cannot_be_shown(place, stream):
    place.publish(*requests(1), sms_cdr(occurred_at=ago()))
    done = place.call("tail", stream, "--from-beginning")
    assert (done.status, done.out) == (2, "")
    assert "is not one that it takes" in done.err


@pytest.mark.parametrize("stream", READABLE)
def test_an_empty_stream_prints_nothing(place, stream):
    place.publish(b"")
    place.work()
    opens = [("--reveal", "--reason", "X")] if "dpo" in CATALOG[stream].readers else []
    for more in ((), ("--json",), ("--from-beginning",), *opens):
        assert place.call("tail", stream, *more) == (0, "", "")


def test_where_there_is_no_log_it_says_so_and_makes_none(place):
    assert "there is no log here yet" in one_line(place.call("tail", "verdicts"))
    assert not place.data.exists()


def test_reveal_needs_a_reason(place):
    place.publish(*requests(1))
    place.work()
    assert "--reveal needs --reason" in one_line(place.call("tail", "cleared", "--reveal"))


# --- tail: how much ----------------------------------------------------------------------------------------------


def test_the_last_ten_are_shown_wherever_they_lie(place):
    # Given thirty old records in every partition, and one new in the last
    place.publish(*requests(120))
    place.work()
    first = place.call("tail", "verdicts", "--json").lines
    assert len(first) == 10
    assert len({line["partition"] for line in first}) == 4
    ends = dict.fromkeys(range(4), 0)
    for line in place.tail("verdicts"):
        ends[line["partition"]] = line["offset"] + 1
    for partition in range(4):  # what is shown of a partition is its end
        offsets = [line["offset"] for line in first if line["partition"] == partition]
        assert offsets == list(range(ends[partition] - len(offsets), ends[partition]))
    place.publish(*requests(1, first=500))
    place.work()
    assert "q500" in ids(place.call("tail", "verdicts", "--json").lines)


def test_fewer_than_ten_are_all_shown(place):
    place.publish(*requests(7))
    place.work()
    assert sorted(ids(place.call("tail", "verdicts", "--json").lines)) == [f"q{n}" for n in range(7)]


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (3, 3), (25, 25), (10**12, 120)])
def test_max_is_at_most_so_many(place, count, shown):
    place.publish(*requests(120))
    place.work()
    for more in ((), ("--from-beginning",)):
        lines = place.call("tail", "verdicts", "--json", "--max", count, *more).lines
        assert len(lines) == len(set(ids(lines))) == shown


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "ten", ""])
def test_less_than_one_is_wrong_usage(place, count):
    done = place.call("tail", "verdicts", "--max", count)
    assert (done.status, done.out) == (2, "")
    assert "argument --max" in done.err


def test_from_the_beginning_a_partition_comes_in_its_order_and_a_page_border_loses_nothing(place):
    person = {"recipient": PERSON, "occurred_at": ago()}
    place.publish(*[sms_request(record_id=f"q{n}", **person) for n in range(1203)])
    place.work()
    assert ids(place.tail("verdicts")) == [f"q{n}" for n in range(1203)]
    assert ids(place.tail("verdicts", "--max", 600)) == [f"q{n}" for n in range(600)]


def test_a_reader_that_goes_away_is_no_error_worth_a_word(place):
    place.publish(*requests(2000))
    place.work()
    process = place.start("tail", "verdicts", "--from-beginning", "--json")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 1
    assert place.told(process) == ""


# --- tail: following ---------------------------------------------------------------------------------------------


def test_following_shows_what_comes_until_it_is_interrupted(place):
    place.publish(*requests(2))
    place.work()
    with (place.folder / "out").open("wb") as out:
        following = place.start("tail", "cleared", "--follow", "--json", "--reveal", "--reason", "WATCH", out=out)

    def shown():
        return [json.loads(line) for line in (place.folder / "out").read_bytes().splitlines()]

    eventually(lambda: len(shown()) == 2, "what was there")
    place.publish(*requests(3, first=10))
    place.work()
    eventually(lambda: len(shown()) == 5, "what came")
    following.send_signal(signal.SIGINT)
    done = place.ended(following)
    assert (done.status, done.err) == (130, "")
    assert sorted(ids(shown())) == ["q0", "q1", "q10", "q11", "q12"]
    assert {line["reveal"]["state"] for line in shown()} == {"revealed"}


def test_following_the_audit_with_reveal_does_not_feed_on_itself(place):
    place.publish(*requests(1))
    place.work()
    place.tail("cleared", "--reveal", "--reason", "ONCE")
    with (place.folder / "out").open("wb") as out:
        following = place.start("tail", "audit", "--follow", "--json", "--reveal", "--reason", "WATCH", out=out)
    eventually(lambda: (place.folder / "out").read_bytes().count(b"\n") == 1, "the entry")
    place.tail("cleared", "--reveal", "--reason", "TWICE")
    eventually(lambda: (place.folder / "out").read_bytes().count(b"\n") == 2, "the next entry")
    following.send_signal(signal.SIGINT)
    assert place.ended(following).status == 130
    assert [value["reason"] for value in place.values("audit")] == ["ONCE", "TWICE"]


def test_without_follow_it_ends_at_the_end_seen_at_its_start(place):
    # Given a reader that is slow to begin, and records that come after it has looked where the end is
    place.publish(*requests(3))
    place.work()
    late = f"""
import subprocess
from streams.log.sqlite import SqliteLog
ends = SqliteLog.end_offsets
async def before(self, stream):
    found = await ends(self, stream)
    if stream == "verdicts":
        subprocess.run({place._line(("publish", place.file(*requests(3, first=10))), None)!r}, stderr=-3)
        subprocess.run({place._line(("run", "--until-idle"), None)!r}, stderr=-3)
    return found
SqliteLog.end_offsets = before
"""
    done = place.run("tail", "verdicts", "--from-beginning", "--json", sabotage=late)
    assert sorted(ids(done.lines)) == ["q0", "q1", "q2"]
    assert len(place.tail("verdicts")) == 6


# --- a person says STOP ------------------------------------------------------------------------------------------


def asked(place, record_id, **fields):
    """Publish one request, run, and return its verdict."""
    place.publish(sms_request(**{"record_id": record_id, "recipient": PERSON, "occurred_at": ago(), **fields}))
    place.work()
    (value,) = (value for value in place.values("verdicts") if value["record_id"] == record_id)
    return value


def said(place, text, **fields):
    """Publish an inbound text of the person to the account, and run."""
    place.publish(reply(text, **{"record_id": "m", "occurred_at": ago(0), **fields}))
    assert place.work() == 1


def test_a_stop_is_heard_a_start_lifts_it_and_a_near_miss_waits_for_a_human(place):
    # Given somebody who may be written to
    before = asked(place, "q1")
    assert (before["verdict"], before["reason"], before["codes"]) == ("cleared", None, {})
    # When they say something that is nearly a STOP, nothing changes, but it is there to be decided
    said(place, "pls stop this", record_id="near")
    assert asked(place, "q2")["verdict"] == "cleared"
    assert place.ends("suppressions") == 0
    (review,) = place.opened("review")
    assert (review["record_id"], review["content"], review["sender"]) == ("near", "pls stop this", PERSON)
    # When they say STOP, the account may not write nor call, for whatever purpose; others may
    said(place, "  Stop!\n")
    refused = asked(place, "q3", purpose="otp")
    assert (refused["verdict"], refused["reason"], refused["clause"], refused["codes"]) == (
        "refused", "opted_out", "KAL-5", CODES
    )  # fmt: skip
    call = asked(place, "q4", channel="voice", content=...)
    assert (call["verdict"], call["reason"]) == ("refused", "opted_out")
    assert asked(place, "q5", account_id="other")["verdict"] == "cleared"
    assert asked(place, "q6", recipient=OTHER)["verdict"] == "cleared"
    # and neither the refusal nor the opt-out shows who it was
    assert PERSON[1:] not in json.dumps([place.values("verdicts"), place.tail("suppressions")])
    assert place.opened("suppressions") == [{"number": PERSON}] * 2
    # When they say YES nothing is lifted; when they say START it is
    said(place, "YES")
    assert asked(place, "q7")["verdict"] == "refused"
    said(place, "start", occurred_at=ago(-1))
    assert asked(place, "q8")["verdict"] == "cleared"
    assert [place.ends("suppressions"), place.ends("review")] == [4, 1]


def test_a_start_of_another_account_lifts_nothing(place):
    said(place, "STOP")
    said(place, "START", account_id="other", occurred_at=ago(-1))
    assert asked(place, "q1")["reason"] == "opted_out"


def test_a_stop_in_the_same_file_acts_from_the_next_record_on(place):
    person = {"recipient": PERSON, "occurred_at": ago()}
    place.publish(
        sms_request(record_id="before", **person),
        reply("STOP", occurred_at=ago()),
        sms_request(record_id="after", **person),
    )
    place.work()
    assert place.verdicts() == {"before": ("cleared", None), "after": ("refused", "opted_out")}


def test_a_stop_of_yesterday_is_remembered_by_a_worker_of_today_and_by_screen(place):
    said(place, "STOP")
    for _ in range(2):
        assert place.call("run", "--until-idle").status == 0
    screen = ("screen", PERSON, "--account", "acme", "--channel", "sms", "--purpose", "otp")
    (answer,) = place.call(*screen).lines
    assert (answer["verdict"], answer["reason"], answer["codes"]) == ("refused", "opted_out", CODES)
    place.call("optout", "remove", PERSON, "--account", "acme")
    (answer,) = place.call(*screen).lines
    assert answer["verdict"] == "cleared"


def test_a_preference_acts_in_its_class_and_scope(place):
    place.publish(
        preference(**{"class": "marketing", "scope": "sender", "recipient": "ACME", "occurred_at": ago()})
    )  # fmt: skip
    place.work()
    assert asked(place, "q1", purpose="marketing")["reason"] == "opted_out"
    assert asked(place, "q2", purpose="marketing", sender="OTHER")["verdict"] == "cleared"
    assert asked(place, "q3", purpose="otp")["verdict"] == "cleared"


def test_an_opt_out_given_on_the_command_line_is_heard_by_a_worker_that_runs(place):
    # Given a worker that runs, and somebody who may be written to
    running = place.start("run")
    place.publish(sms_request(record_id="q0", recipient=PERSON, occurred_at=ago()))
    eventually(lambda: place.committed() == 1, "it works")
    # When they opt out
    assert place.call("optout", "add", "-", "--account", "acme", data=PERSON.encode()).status == 0
    # Then what is asked from then on is refused
    place.publish(sms_request(record_id="q1", recipient=PERSON, occurred_at=ago()))
    eventually(lambda: place.committed() == 2, "the next is done")
    assert place.verdicts() == {"q0": ("cleared", None), "q1": ("refused", "opted_out")}
    # and when it is lifted, cleared again
    assert place.call("optout", "remove", PERSON, "--account", "acme").status == 0
    place.publish(sms_request(record_id="q2", recipient=PERSON, occurred_at=ago()))
    eventually(lambda: place.committed() == 3, "the last is done")
    running.send_signal(signal.SIGTERM)
    assert place.ended(running).status == 0
    assert place.verdicts()["q2"] == ("cleared", None)


def test_a_keyword_of_the_policys_own_acts_too(place):
    place.policy(DEFAULT_POLICY + '[screening.extra_keywords]\nopt_out = ["BASTA"]\nclause = "REG-3"\n')
    said(place, "basta")
    assert asked(place, "q1")["reason"] == "opted_out"


# --- run: wrong usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "-1", "many", "257", "1.5"])
def test_a_wrong_number_of_workers_is_wrong_usage(place, workers):
    done = place.call("run", "--workers", workers)
    assert (done.status, done.out) == (2, "")
    assert not place.data.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"partitions": 0}, {"batch_records": 0}, {"lease_s": 0}, {"lease_s": -1}, {"key_lease_s": 0},
        {"partitions": "four"}, {"colour": "blue"}, {"lease_s": 1e9},
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_one_line(place, settings):
    place.configure(**settings)
    line = one_line(place.call("run", "--until-idle"))
    assert "the configuration file is not valid" in line
    assert next(iter(settings)) in line
    assert not place.data.exists()
