"""Corrections: sealed beside the record, which stays as it is, shown with it, and dead when it dies."""

import json
from unittest import mock

import pytest

from processors.keyring import EpochRef
from schemas.errors import LogBusy
from schemas.fields import PLATFORM
from schemas.sealed import take_apart
from streams.keys.audit import Auditor
from streams.log.sqlite import SqliteLog
from streams.officer.rectify import FIELDS
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import OTHER, PERSON, sms_cdr, voice_cdr

WRONG, RIGHT = "Jon Smiht", "John Smith"


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


@pytest.fixture
def full(place):
    """PERSON was written to, has called OTHER under a wrong name, and was called by OTHER."""
    now = ago()
    place.publish(
        sms_cdr(record_id="s1", attributes={"name": WRONG}, occurred_at=now),
        voice_cdr(record_id="v1", sender=PERSON, recipient=OTHER, display_name=WRONG, location="Elsewhere",
                  occurred_at=now),
        voice_cdr(record_id="v2", sender=OTHER, recipient=PERSON, display_name="Other", location="Bonn",
                  occurred_at=now),
    )  # fmt: skip
    assert place.work() == 3
    return place


def rectify(place, *more, number=PERSON, data=b"", json_=True):
    return place.call(
        "subject", "rectify", number, "--reason", "CASE-3", *(["--json"] if json_ else []), *more, data=data
    )


def counts(done):
    assert done.status == 0, done.err
    (line,) = done.lines
    return line["corrected"], line["unchanged"], line["not_opened"]


def shown(place, number=PERSON, *more):
    """Return the records of an access report by record id."""
    done = place.call("subject", "access", number, "--reason", "CASE-4", "--json", *more)
    assert done.status == 0, done.err
    return {line["fields"]["record_id"]: line for line in done.lines if line["item"] == "record"}


def originals(place, stream="cdr.pii"):
    return {(one.partition, one.offset): one for one in place.stored(stream)}


def where(place, record_id, stream="cdr.pii"):
    """Return a record's place as the command line takes it."""
    for line in place.tail(stream, "--reveal", "--reason", "TEST-1"):
        if line["reveal"]["fields"].get("record_id") == record_id:
            return f"{stream}/{line['partition']}/{line['offset']}"
    raise AssertionError("no such record")


def corrections(place, stream="cdr.pii"):
    found = [(one, take_apart(one.value)) for one in place.stored(stream)]
    return [(stored, sealed) for stored, sealed in found if "corrects" in sealed.fields]


# --- what is written ----------------------------------------------------------------------------------------------


def test_a_correction_stands_beside_the_record_and_changes_no_byte_of_it(full):
    # Given
    before = originals(full)
    # When
    assert counts(rectify(full, "--set", f"display_name={RIGHT}")) == (1, 0, {})
    # Then
    after = originals(full)
    assert {place: after[place].value for place in before} == {place: one.value for place, one in before.items()}
    assert len(after) == len(before) + 1
    record = shown(full)["v1"]
    assert record["fields"]["display_name"] == WRONG
    assert record["corrections"] == [{"display_name": RIGHT}]
    assert shown(full)["s1"]["corrections"] == shown(full)["v2"]["corrections"] == []
    # and it is not a record of its own
    assert set(shown(full)) == {"s1", "v1", "v2"}


def test_a_correction_is_sealed_as_the_record_is_and_says_nothing_in_the_clear(full):
    rectify(full, "--set", f"display_name={RIGHT}")
    ((stored, sealed),) = corrections(full)
    corrected = originals(full)[stored.partition, sealed.fields["corrects"]]
    of = take_apart(corrected.value)
    (part,) = sealed.parts
    theirs = {one.group: one for one in of.parts}["other"]  # PERSON was the caller
    assert (part.group, part.key, part.sid) == ("correction", theirs.key, theirs.sid)
    assert set(sealed.fields) == {"account_id", "corrects", "month", "privacy", "v"}
    assert {name: of.fields[name] for name in ("account_id", "month", "privacy")} == {
        name: sealed.fields[name] for name in ("account_id", "month", "privacy")
    }
    assert (stored.timestamp_ms, stored.headers, stored.key) == (corrected.timestamp_ms, corrected.headers, None)
    for text in (RIGHT, PERSON, "display_name"):
        assert text.encode() not in stored.value


def test_what_is_shown_of_a_record_shows_its_correction_too(full):
    rectify(full, "--set", f"display_name={RIGHT}")
    lines = full.tail("cdr.pii", "--reveal", "--reason", "TEST-1")
    (line,) = [one for one in lines if one["reveal"]["fields"].get("record_id") == "v1"]
    assert line["reveal"]["corrections"] == [{"display_name": RIGHT}]


def test_every_record_that_has_the_field_is_corrected_and_no_other(full):
    assert counts(rectify(full, "--set", "duration_s=62")) == (1, 0, {})  # v2: in v1 PERSON is the other party
    assert shown(full)["v2"]["corrections"] == [{"duration_s": 62}]
    assert counts(rectify(full, "--set", 'attributes={"name": "John Smith"}', "--set", "location=Berlin")) == (2, 0, {})
    assert shown(full)["s1"]["corrections"] == [{"attributes": {"name": RIGHT}}]
    assert shown(full)["v2"]["corrections"] == [{"duration_s": 62}, {"location": "Berlin"}]


def test_a_named_record_alone_is_corrected_and_takes_what_was_missing(full):
    place = where(full, "s1")
    assert counts(rectify(full, "--record", place, "--set", "location=Bonn")) == (1, 0, {})
    assert shown(full)["s1"]["corrections"] == [{"location": "Bonn"}]
    assert shown(full)["v2"]["corrections"] == []


def test_an_accounts_data_is_corrected_apart(full):
    text = "Your parcel is late"
    assert counts(rectify(full, "--account", "acme", "--set", f"content={text}")) == (1, 0, {})
    assert shown(full, PERSON, "--account", "acme")["s1"]["corrections"] == [{"content": text}]
    assert corrections(full) == []
    ((stored, sealed),) = corrections(full, "content")
    corrected = originals(full, "content")[stored.partition, sealed.fields["corrects"]]
    assert sealed.fields["day"] == take_apart(corrected.value).fields["day"]
    assert sealed.parts[0].key.startswith("content/acme/")


def test_a_correction_may_come_from_a_file_or_standard_input(full):
    fields = json.dumps({"display_name": RIGHT}).encode()
    (full.folder / "fields.json").write_bytes(fields)
    assert counts(rectify(full, "--correction", full.folder / "fields.json")) == (1, 0, {})
    other = json.dumps({"display_name": "J. Smith"}).encode()
    assert counts(rectify(full, "--correction", "-", number="-", data=PERSON.encode() + b"\n" + other)) == (1, 0, {})
    assert shown(full)["v1"]["corrections"] == [{"display_name": RIGHT}, {"display_name": "J. Smith"}]


def test_an_instant_is_kept_as_records_have_it(full):
    done = rectify(full, "--record", where(full, "s1"), "--set", "occurred_at=2026-11-21T13:00:00.5+01:00")
    assert counts(done) == (1, 0, {})
    assert shown(full)["s1"]["corrections"] == [{"occurred_at": "2026-11-21T12:00:00Z"}]


# --- again, and half-way ------------------------------------------------------------------------------------------


def test_saying_the_same_again_writes_nothing(full):
    assert counts(rectify(full, "--set", f"display_name={RIGHT}")) == (1, 0, {})
    ends = full.ends("cdr.pii")
    assert counts(rectify(full, "--set", f"display_name={RIGHT}")) == (0, 1, {})
    assert counts(rectify(full, "--set", f"display_name={RIGHT}", "--record", where(full, "v1"))) == (0, 1, {})
    assert full.ends("cdr.pii") == ends
    # what a record says itself is no news either
    assert counts(rectify(full, "--set", "location=Bonn")) == (0, 1, {})
    # and back to what it said is one
    assert counts(rectify(full, "--set", f"display_name={WRONG}")) == (1, 0, {})


def test_a_correction_that_was_written_and_not_noted_is_found_by_the_next_run(full):
    # Given a run that is killed between log and key store
    with mock.patch("streams.officer.rectify.Rectification._landed", side_effect=LogBusy):
        assert one_line(rectify(full, "--set", f"display_name={RIGHT}"))
    assert shown(full)["v1"]["corrections"] == []
    ends = full.ends("cdr.pii")
    # When
    assert counts(rectify(full, "--set", f"display_name={RIGHT}")) == (0, 1, {})
    # Then
    assert full.ends("cdr.pii") == ends
    assert shown(full)["v1"]["corrections"] == [{"display_name": RIGHT}]


def test_a_correction_is_found_where_it_landed_among_what_others_write(full):
    real = SqliteLog.append
    other = full.stored("cdr.pii")[0]

    async def crowded(self, outputs, bookmark=None):
        for output in outputs:
            if output.stream == "cdr.pii":
                await real(self, [output._replace(messages=[message_of(other)])])
        await real(self, outputs, bookmark)

    with mock.patch.object(SqliteLog, "append", crowded):
        assert counts(rectify(full, "--set", f"display_name={RIGHT}")) == (1, 0, {})
    assert shown(full)["v1"]["corrections"] == [{"display_name": RIGHT}]


def message_of(stored):
    from schemas.outbound import Message

    return Message(stored.timestamp_ms, stored.key, stored.headers, stored.value)


# --- whose it is --------------------------------------------------------------------------------------------------


def test_the_other_partys_fields_are_not_theirs_to_correct(full):
    called, calling = where(full, "v2"), where(full, "v1")
    for place, field in (
        (called, "sender=+4915100000000"), (called, "display_name=x"), (calling, "recipient=+4915100000000"),
        (calling, "location=x"), (calling, "duration_s=1"),
    ):  # fmt: skip
        line = one_line(rectify(full, "--record", place, "--set", field))
        assert "other party" in line
        assert "+49151" not in line
    assert corrections(full) == []


def test_somebody_elses_record_is_not_to_be_corrected(full):
    line = one_line(rectify(full, "--record", where(full, "s1"), "--set", "location=x", number=OTHER))
    assert "no record of this person" in line
    line = one_line(rectify(full, "--account", "acme", "--record", where(full, "s1"), "--set", "location=x"))
    assert "no record of this person" in line
    for nowhere in ("cdr.pii/0/999", "cdr.pii/99/0"):
        assert "no record of this person" in one_line(rectify(full, "--record", nowhere, "--set", "location=x"))
    assert corrections(full) == []


def test_the_other_party_does_not_see_what_a_person_corrected_of_their_own(full):
    rectify(full, "--set", f"display_name={RIGHT}")
    done = full.call("subject", "access", OTHER, "--reason", "CASE-4", "--json")
    assert RIGHT not in done.out


def test_nobody_to_correct_is_no_error(full):
    assert counts(rectify(full, "--set", "location=x", number="+14155550199")) == (0, 0, {})
    assert "nothing was written" in rectify(full, "--set", "country=DE", json_=False).out


def test_what_wrote_nothing_opens_no_request(full):
    assert rectify(full, "--set", "location=x", number="+14155550199").lines[0]["request"] is None
    assert full.call("subject", "requests", "--all", "--json").lines == []
    # nor does saying the same again
    for _ in range(2):
        rectify(full, "--set", f"location={RIGHT}")
    assert len(full.call("subject", "requests", "--all", "--json").lines) == 1


def test_one_that_was_killed_before_its_request_was_noted_is_noted_by_the_next_run(full):
    code = "import os\nfrom streams.officer import rectify\nrectify.note = lambda *a, **k: os._exit(9)"
    words = ("subject", "rectify", PERSON, "--reason", "CASE-3", "--set", f"location={RIGHT}")
    assert full.run(*words, sabotage=code).status == 9
    assert full.call(*words).status == 0
    (request,) = full.call("subject", "requests", "--all", "--json").lines
    assert (request["kind"], request["outcome"]) == ("rectify", "done")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ("--set", "record_id=x"), ("--set", "account_id=x"), ("--set", "type=request"), ("--set", "v=2"),
        ("--set", "direction=mo"), ("--set", "channel=sms"), ("--set", "number=+4915112345678"), ("--set", "x"),
        ("--set", "=x"), ("--set", "location=a", "--set", "location=b"), (),
    ],
)  # fmt: skip
def test_what_is_no_field_to_correct_is_refused_without_repeating_it(full, given):
    line = one_line(rectify(full, *given))
    assert "+49151" not in line
    assert corrections(full) == []


@pytest.mark.parametrize(
    "given",
    ["duration_s=-1", "duration_s=long", "country=Germany", "child=perhaps", "price=3", "occurred_at=yesterday",
     "route=+4915112345678", 'attributes={"a": 1}', "mnc=1234"],
)  # fmt: skip
def test_a_value_that_no_record_can_have_is_refused_without_repeating_it(full, given):
    line = one_line(rectify(full, "--record", where(full, "v2"), "--set", given))
    assert given.partition("=")[2] not in line
    assert corrections(full) == []


@pytest.mark.parametrize(
    "document", [b"", b"[]", b"{}", b"null", b'{"location": 1}', b'{"a": "b"}', b'{"location"', b"\xff"]
)
def test_a_correction_that_is_no_object_of_fields_is_refused(full, document):
    assert one_line(rectify(full, "--correction", "-", data=document))
    assert corrections(full) == []


def test_fields_of_the_other_channel_or_of_another_stream_are_refused(full):
    sms = where(full, "s1")
    for given in ("duration_s=5", "content=x", "transcript=x"):
        assert one_line(rectify(full, "--record", sms, "--set", given))
    content = where(full, "s1", "content")
    assert one_line(rectify(full, "--account", "acme", "--record", content, "--set", "location=x"))
    assert one_line(rectify(full, "--account", "acme", "--record", content, "--set", "transcript=x"))
    for nowhere in ("verdicts/0/0", "cdr.pii", "cdr.pii/0", "cdr.pii/x/0", "cdr.pii/0/-1", PERSON):
        line = one_line(rectify(full, "--record", nowhere, "--set", "location=x"))
        assert PERSON not in line
    assert corrections(full) == corrections(full, "content") == []


def test_every_field_of_a_communication_can_be_corrected_but_what_names_and_places_it():
    assert set(FIELDS) == {
        "occurred_at", "sender", "recipient", "country", "mcc", "mnc", "route", "status", "error_code", "price",
        "campaign_id", "client_ip", "location", "display_name", "child", "attributes", "content", "segments",
        "encoding",
        "answered_at", "duration_s", "billable_s", "hangup_cause", "recording_ref", "transcript", "purpose",
    }  # fmt: skip


# --- what is noted, and how it dies -------------------------------------------------------------------------------


def test_a_correction_is_noted_with_places_sids_and_names_of_fields_only(full):
    rectify(full, "--set", f"display_name={RIGHT}")
    entries = [json.loads(one.value) for one in full.stored("audit")]
    (entry,) = [one for one in entries if one["action"] == "rectify"]
    ((stored, sealed),) = corrections(full)
    assert (entry["reason"], entry["role"], entry["owner"], entry["stream"]) == ("CASE-3", "dpo", PLATFORM, "cdr.pii")
    assert entry["fields"] == ["display_name"]
    assert entry["records"] == [[stored.partition, sealed.fields["corrects"]]]
    assert entry["sids"] == [sealed.parts[0].sid]
    for secret in (RIGHT, WRONG, PERSON):
        assert secret.encode() not in b"".join(one.value for one in full.stored("audit"))
    (request,) = full.call("subject", "requests", "--all", "--json").lines
    assert (request["kind"], request["owner"], request["outcome"]) == ("rectify", PLATFORM, "done")


def test_if_it_cannot_be_noted_nothing_is_written(full):
    real = Auditor.write

    async def broken(self, action, **fields):
        if action == "rectify":
            raise LogBusy
        await real(self, action, **fields)

    with mock.patch.object(Auditor, "write", broken):
        assert one_line(rectify(full, "--set", f"display_name={RIGHT}"))
    assert corrections(full) == []


def test_an_erasure_of_the_person_destroys_the_correction_too(full):
    rectify(full, "--set", f"display_name={RIGHT}")
    ((stored, _),) = corrections(full)
    assert full.call("subject", "erase", PERSON, "--reason", "CASE-5").status == 0
    lines = full.tail("cdr.pii", "--reveal", "--reason", "TEST-1")
    states = {(line["partition"], line["offset"]): line["reveal"] for line in lines}
    assert states[stored.partition, stored.offset]["state"] == "destroyed"
    assert RIGHT not in json.dumps(lines)
    assert counts(rectify(full, "--set", f"display_name={RIGHT}")) == (0, 0, {})


def test_a_correction_dies_with_the_month_and_none_is_written_after(full):
    rectify(full, "--set", f"display_name={RIGHT}")
    ((_, sealed),) = corrections(full)

    async def destroy(deployment):
        deployment.store.destroy_epoch(EpochRef("pii", PLATFORM, sealed.fields["month"]))

    full.within(destroy)
    lines = full.tail("cdr.pii", "--reveal", "--reason", "TEST-1")
    assert {line["reveal"]["state"] for line in lines} == {"destroyed"}
    ends = full.ends("cdr.pii")
    assert counts(rectify(full, "--set", "location=x")) == (0, 0, {"destroyed": 3})
    assert full.ends("cdr.pii") == ends


def test_only_the_privacy_officer_corrects(full):
    full.tail("cdr.pii", "--reveal", "--reason", "X-1")
    me = json.loads(full.stored("audit")[0].value)["principal"]
    (full.folder / "roles.toml").write_text(f'[[grant]]\nuser = "{me}"\nrole = "support"\naccounts = ["*"]\n')
    full.configure(**SHORT_LEASE, roles="roles.toml")
    assert "privacy officer" in one_line(rectify(full, "--set", f"display_name={RIGHT}"))
    assert corrections(full) == []
