"""What a person is told that asks what is held about them, through the command line, on real files."""

import json
import stat
import time
from datetime import UTC, datetime
from html.parser import HTMLParser
from unittest import mock

import pytest

from processors.keyring import EpochRef
from schemas.errors import LogBusy
from schemas.fields import PLATFORM
from schemas.outbound import Message, Output
from streams.keys.audit import Auditor
from streams.officer.access import PERSONAL, Report
from streams.officer.office import Finder, office
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import DEFAULT_POLICY, OTHER, PERSON, preference, reply, sms_cdr, sms_request, voice_cdr
from tests.support.records import account as account_of

STRANGER = "+14155550188"
SPELLED = "+49 (151) 1234-5678"
DIGITS = PERSON[1:]


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


@pytest.fixture
def full(place):
    """A deployment in which PERSON was written to, called, has called OTHER, opted out, and was not understood."""
    now = ago()
    place.publish(
        sms_request(record_id="q1", occurred_at=now),
        sms_cdr(record_id="s1", occurred_at=now),
        sms_cdr(record_id="s2", account_id="bank", occurred_at=now),
        voice_cdr(record_id="v1", sender=OTHER, client_ip="192.0.2.7", display_name="Other Person", location="Bonn",
                  country="DE", mnc="01", mcc="262", occurred_at=now),
        voice_cdr(record_id="v2", sender=PERSON, recipient=OTHER, client_ip="192.0.2.9", display_name="Myself",
                  location="Elsewhere", attributes={"note": "of the other"}, country="US", occurred_at=now),
        reply("stop it", record_id="m1", occurred_at=now),
        sms_cdr(record_id="x1", recipient=STRANGER, sender=OTHER, occurred_at=now),
        preference(record_id="p1", occurred_at=now),
        json.dumps({"v": 1, "to": SPELLED, "text": "whose?"}).encode(),
        b"not json either " + STRANGER.encode(),
    )  # fmt: skip
    assert place.work() == 10
    return place


def access(place, *more, number=PERSON):
    """Return the items of an access report, by section."""
    done = place.call("subject", "access", number, "--reason", "CASE-1", "--json", *more)
    assert done.status == 0, done.err
    return by_section(done.lines)


def by_section(items):
    found = {}
    for item in items:
        found.setdefault(item.pop("item"), []).append(item)
    assert len(found["report"]) == len(found["summary"]) == 1
    return found


def by_id(items):
    return {one["fields"]["record_id"]: one for one in items}


def audit(place):
    return [json.loads(one.value) for one in place.stored("audit")]


# --- what is told -------------------------------------------------------------------------------------------------


def test_access_shows_all_that_the_platform_controls_and_says_about_each_what_it_must(full):
    # When
    found = access(full)
    # Then
    records = by_id(found["record"])
    assert set(records) == {"s1", "s2", "v1", "v2", "m1"}
    assert {one["stream"] for one in found["record"]} == {"cdr.pii"}
    s1 = records["s1"]
    assert s1["fields"]["recipient"] == PERSON
    assert s1["fields"]["sender"] == "ACME"
    assert (s1["withheld"], s1["corrections"]) == ([], [])
    assert s1["category"] == "traffic"
    assert s1["purposes"] == ["routing", "security_and_fraud", "billing", "interconnect"]
    assert s1["legal_basis"] == "legitimate_interests"
    assert (s1["role"], s1["controller"]) == ("controller", "platform")
    assert s1["recipients"] == ["support", "fraud", "lawful", "dpo"]
    assert s1["source"] == {"account": "acme", "direction": "mt"}
    assert s1["transfer"] == "scc-module-1"
    assert s1["kept_until"] > s1["day"]
    assert found["report"][0]["subject"] == PERSON
    assert found["summary"][0]["records"] == 5
    assert found["summary"][0]["nothing_is_held"] is False
    processing = {one["stream"]: one["records"] for one in found["processing"]}
    assert processing == {"cdr.pii": 5, "suppressions": 1, "quarantine": 1}


def test_nobody_else_is_in_a_report(full):
    done = full.call("subject", "access", PERSON, "--reason", "CASE-1", "--json")
    for alien in (OTHER, OTHER[1:], "Other Person", "192.0.2.7", "Elsewhere", "of the other", STRANGER, "x1"):
        assert alien not in done.out, alien


def test_each_of_two_people_is_shown_their_own_and_what_both_know(full):
    records = by_id(access(full)["record"])
    called, calling = records["v1"], records["v2"]
    assert called["fields"]["location"] == "Bonn"
    assert called["fields"]["country"] == "DE"
    assert called["withheld"] == ["client_ip", "display_name", "sender"]
    # and the other way round
    assert calling["fields"]["sender"] == PERSON
    assert (calling["fields"]["client_ip"], calling["fields"]["display_name"]) == ("192.0.2.9", "Myself")
    assert (calling["fields"]["duration_s"], calling["fields"]["channel"]) == (61, "voice")
    assert calling["withheld"] == ["attributes", "country", "location", "recipient"]
    mirrored = by_id(access(full, number=OTHER)["record"])
    assert mirrored["v1"]["withheld"] == ["country", "location", "mcc", "mnc", "recipient"]
    assert mirrored["v2"]["withheld"] == called["withheld"]


@pytest.mark.parametrize(
    "spelled",
    [OTHER, OTHER[1:], OTHER[2:], f"({OTHER[2:5]}) 555-{OTHER[-4:]}", f"call {OTHER[2:5]}.555{OTHER[-4:]} back"],
)
def test_an_attribute_that_names_the_other_party_is_withheld_in_any_spelling(place, spelled):
    # Given a call with what somebody noted about it, in a value and in a name
    assert Finder(OTHER).found(spelled)
    attributes = {"note": spelled, "of": "the day", OTHER: "x"}
    place.publish(
        voice_cdr(record_id="v1", sender=OTHER, attributes=attributes, occurred_at=ago()),
        sms_cdr(record_id="s1", attributes=attributes, occurred_at=ago()),
    )
    assert place.work() == 2
    # Then the person is shown the rest, and told what is withheld
    records = by_id(access(place)["record"])
    assert records["v1"]["fields"]["attributes"] == {"of": "the day"}
    assert records["v1"]["withheld"] == ["attributes", "attributes.note", "sender"]
    # and where nobody else is in the record, all of it
    assert records["s1"]["fields"]["attributes"] == attributes
    # and a correction is looked at like the record
    given = json.dumps({"attributes": {"later": spelled, "kept": "yes"}}).encode()
    done = place.call("subject", "rectify", PERSON, "--reason", "C", "--correction", place.file(given))
    assert done.status == 0, done.err
    assert by_id(access(place)["record"])["v1"]["corrections"] == [{"attributes": {"kept": "yes"}}]


def test_where_the_other_partys_number_is_gone_no_attribute_that_may_be_one_is_shown(place):
    attributes = {"note": "call (415) 555-0102", "of": "2026"}
    place.publish(voice_cdr(record_id="v1", sender=OTHER, attributes=attributes, occurred_at=ago()))
    assert place.work() == 1
    assert place.call("subject", "erase", OTHER, "--reason", "CASE-1").status == 0
    (record,) = access(place)["record"]
    assert record["fields"]["attributes"] == {"of": "2026"}


def test_what_accounts_hold_is_counted_and_handed_on_to_them(full):
    # Given a request that came yesterday
    done = full.call("subject", "access", PERSON, "--reason", "CASE-1", "--json", "--received", ago(3600))
    # When
    accounts = {one["account"]: one["records"] for one in by_section(done.lines)["account"]}
    # Then
    assert accounts == {"acme": {"content": 2, "review": 1, "cleared": 1}, "bank": {"content": 1}}
    assert "acme, bank" in done.err
    (request,) = full.call("subject", "requests", "--json").lines
    assert (request["kind"], request["owner"], request["reason"]) == ("access", PLATFORM, "CASE-1")
    assert set(request["notify"]) == {"acme", "bank"}


def test_the_report_for_an_account_holds_that_accounts_data_and_no_other(full):
    found = access(full, "--account", "acme")
    assert {one["stream"] for one in found["record"]} == {"content", "review"}
    # what must not be sent any more does not open
    assert found["not_shown"] == [{"stream": "cleared", "reason": "opted_out", "records": 1}]
    assert {one["source"]["account"] for one in found["record"]} == {"acme"}
    assert {one["role"] for one in found["record"]} == {"processor"}
    texts = [one["fields"]["content"] for one in found["record"]]
    assert sorted(texts) == ["Your parcel is here", "stop it", "stop it"]
    assert not {"opt_out", "quarantined", "account", "hold"} & set(found)
    assert access(full, "--account", "bank", number=STRANGER)["summary"][0]["nothing_is_held"] is True


def test_what_an_agreement_has_the_platform_control_is_in_its_own_report(place):
    # Given two accounts of whose traffic and content somebody else than usual decides (KAL-1)
    def by_agreement(account, data_class, role):
        return account_of(
            account,
            f'[[account.role]]\ndata_class = "{data_class}"\nrole = "{role}"\nagreement = "MSA-1"\nfrom = 2020-01-01\n'
            'clause = "KAL-1"\n',
        )

    place.policy(
        DEFAULT_POLICY + by_agreement("acme", "content", "controller") + by_agreement("bank", "traffic", "processor")
    )
    place.publish(
        sms_cdr(record_id="s1", occurred_at=ago()), sms_cdr(record_id="s2", account_id="bank", occurred_at=ago())
    )
    place.work()
    # When
    found = access(place)
    # Then
    assert {(one["stream"], one["source"]["account"]) for one in found["record"]} == {
        ("content", "acme"), ("cdr.pii", "acme"),
    }  # fmt: skip
    assert {one["account"]: one["records"] for one in found["account"]} == {
        "bank": {"cdr.pii": 1, "content": 1},
    }  # fmt: skip
    bank = access(place, "--account", "bank")
    assert {one["stream"] for one in bank["record"]} == {"content", "cdr.pii"}
    assert {one["role"] for one in bank["record"]} == {"processor"}


def test_opt_outs_are_told_whether_they_stand_or_not(full):
    full.call("optout", "add", PERSON, "--account", "bank", "--sender", "+14155550123", "--channel", "sms")
    full.call("optout", "add", PERSON, "--channel", "voice", "--authority", "officer", "--reason", "CASE-0")
    full.call("optout", "remove", PERSON, "--account", "acme", "--channel", "sms")
    told = {(one["scope"], one["channel"]): one for one in access(full)["opt_out"]}
    assert {place: one["stands"] for place, one in told.items()} == {
        ("account:acme", "sms"): False, ("platform", "voice"): True, ("sender:bank:…", "sms"): True,
    }  # fmt: skip
    assert told["platform", "voice"]["reason"] == "CASE-0"
    assert told["platform", "voice"]["authority"] == "officer"
    assert told["platform", "voice"]["kept_until"] is None


def test_what_nobody_understood_is_named_if_the_number_is_in_it_and_not_shown(full):
    done = full.call("subject", "access", PERSON, "--reason", "CASE-1", "--json")
    (one,) = by_section(done.lines)["quarantined"]
    assert one["reason"] == "missing_field:type" or one["reason"].startswith(("missing", "unknown", "bad"))
    assert (one["stream"], one["source"]) == ("quarantine", {"stream": "traffic"})
    assert one["kept_until"] > ago()
    assert "whose?" not in done.out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f'"{PERSON}"', True), ("0151/1234 56-78", True), ("0049.151.12345678", True), ("１５１１２３４５６７８", True),
        ("1 5 1 1 2 3 4 5 6 7 8", True), ("\0".join(PERSON), True),
        ("15112345679", False), ("1511234567", False), ("", False),
    ],
)  # fmt: skip
def test_a_number_is_found_however_it_is_spelled(text, found):
    assert Finder(PERSON).found(text) is found
    assert Finder("+9991234567").found("tel 9991234567")  # of no country
    assert Finder("Jo@Example.org".lower()).found(f"to={text} JO@example.ORG")


def test_what_cannot_be_searched_is_counted(full):
    # Given a record in quarantine that is not as it was sealed
    stored = full.stored("quarantine")[0]
    value = json.loads(stored.value)
    box = value["sealed"][0]["box"]
    value["sealed"][0]["box"] = ("B" if box[0] == "A" else "A") + box[1:]
    tampered = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()

    async def add(deployment):
        for one in (tampered, b"garbage"):
            await deployment.log.append([Output("quarantine", 0, [Message(0, None, (), one)])])

    full.within(add)
    # When
    found = access(full)
    # Then
    assert found["not_searched"] == [{"stream": "quarantine", "reason": "corrupt", "records": 2}]
    assert found["summary"][0]["not_searched"] == 2
    # and they do not make a stranger's report look as if something was held
    assert access(full, number="+14155550199")["summary"][0]["nothing_is_held"] is True


def test_records_that_are_destroyed_are_counted_with_the_reason(full):
    month = json.loads(full.stored("cdr.pii")[0].value)["month"]

    async def destroy(deployment):
        return deployment.store.destroy_epoch(EpochRef("pii", PLATFORM, month))

    full.within(destroy)
    found = access(full)
    assert "record" not in found
    assert found["not_shown"] == [{"stream": "cdr.pii", "reason": "destroyed", "records": 5}]
    assert found["summary"][0]["nothing_is_held"] is False


def test_restricted_data_is_shown_to_the_officer_and_the_restriction_is_told(full):
    assert full.call("subject", "restrict", PERSON, "--reason", "CASE-7").status == 0
    found = access(full)
    assert [one["reason"] for one in found["restriction"]] == ["CASE-7"]
    assert len(found["record"]) == 5


def test_records_under_legal_hold_are_counted_with_the_case(full):
    assert full.call("subject", "hold", OTHER, "--reason", "COURT-1").status == 0
    assert full.call("subject", "hold", PERSON, "--reason", "COURT-2").status == 0
    holds = {one["reason"]: one["records"] for one in access(full)["hold"]}
    # the two calls that both were part of are in both holds
    assert holds == {"COURT-1": 2, "COURT-2": 5}
    assert full.call("subject", "release", PERSON, "--reason", "COURT-2").status == 0
    assert {one["reason"] for one in access(full)["hold"]} == {"COURT-1"}


def test_a_copy_that_names_nobody_counts_if_its_hold_names_the_person(full):
    assert full.call("subject", "hold", PERSON, "--account", "acme", "--reason", "COURT-3").status == 0
    assert [(one["reason"], one["records"]) for one in access(full)["hold"]] == [("COURT-3", 3)]
    # of anybody else it cannot be told
    found = access(full, number=OTHER)
    assert "hold" not in found
    assert found["not_searched"] == [{"stream": "held", "reason": "it names nobody", "records": 2}]


def test_who_opened_the_data_in_the_past_12_months_is_told(full):
    # Given
    unseen = access(full, number=STRANGER)
    assert ("reveal" in unseen, unseen["summary"][0]["last_opened"]) == (False, None)
    full.tail("cdr.pii", "--reveal", "--reason", "FRAUD-9")
    # When
    found = access(full)
    told = found["reveal"]
    # Then, without what this report opens itself
    assert found["summary"][0]["last_opened"] == max(one["at"] for one in told)
    fraud = [one for one in told if one["reason"] == "FRAUD-9"]
    assert fraud
    assert {(one["action"], one["role"], one["stream"]) for one in fraud} == {("reveal", "dpo", "cdr.pii")}
    assert {one["principal"] for one in fraud} == {audit(full)[0]["principal"]}
    assert "CASE-1" not in {one["reason"] for one in told}
    assert "CASE-1" in {one["reason"] for one in access(full)["reveal"]}


def test_what_is_no_audit_entry_stops_no_report_and_is_counted_if_it_names_the_person(full):
    # Given what was written to audit past this program, with the sids of the person in it or not
    full.tail("cdr.pii", "--reveal", "--reason", "FRAUD-9")
    entry = audit(full)[-1]
    access(full)
    (sid,) = next(one["sids"] for one in audit(full) if one["action"] == "access")
    wrong = [
        b"no entry " + sid.encode(),
        json.dumps([sid]).encode(),
        json.dumps({"sids": [sid]}).encode(),
        json.dumps({**entry, "at": 5}).encode(),
        json.dumps({**entry, "sids": 7, "why": sid}).encode(),
        json.dumps({**entry, "sids": [[sid]]}).encode(),
        b"\xff not json and of nobody",
    ]

    async def write(deployment):
        now_ms = int(time.time()) * 1000
        await deployment.log.append([Output("audit", 0, [Message(now_ms, None, (), one) for one in wrong])])

    full.within(write)
    # Then
    found = access(full, number=PERSON)
    assert {one["reason"] for one in found["reveal"]} >= {"FRAUD-9"}
    counted = {one["stream"]: (one["reason"], one["records"]) for one in found["not_searched"]}
    assert counted["audit"] == ("corrupt", 6)


def test_what_was_opened_longer_ago_than_12_months_is_not_told(full):
    full.tail("cdr.pii", "--reveal", "--reason", "FRAUD-9")
    begin_s = int(time.time())

    async def report(deployment, now_s):
        items = Report(office(deployment), PERSON, account=None, reason="CASE-1", kind="access", now_s=now_s).items()
        return {one.fields["reason"] async for one in items if one.section == "reveal"}

    days = 366 if datetime.fromtimestamp(begin_s, UTC).year % 4 == 3 else 365
    assert "FRAUD-9" in full.within(lambda deployment: report(deployment, begin_s + (days - 2) * 86_400))
    assert full.within(lambda deployment: report(deployment, begin_s + (days + 2) * 86_400)) == set()


def test_somebody_unknown_is_told_that_nothing_is_held(full):
    done = full.call("subject", "access", "+14155550199", "--reason", "CASE-1")
    assert done.status == 0
    assert "nothing is held yes" in " ".join(done.out.split())
    found = access(full, number="+14155550199")
    assert set(found) == {"report", "summary"}
    assert found["summary"][0]["nothing_is_held"] is True


def test_somebody_known_under_an_older_token_key_is_found(full):
    async def rotate(deployment):
        store = deployment.store
        store.add_token_key()
        store.hold_tokens(2)
        store.switch_tokens(2)

    full.within(rotate)
    assert len(access(full)["record"]) == 5


# --- who may ask, and what is noted -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["12345", "ACME", "", "+4915", "nobody at all"])
def test_a_number_that_is_nobodys_is_refused_without_repeating_it(full, wrong):
    before = len(audit(full))
    line = one_line(full.call("subject", "access", "-", "--reason", "CASE-1", data=wrong.encode()))
    assert "nobody's" in line
    assert not wrong or wrong not in line
    assert len(audit(full)) == before


def test_a_reason_that_spells_out_the_number_is_refused(full):
    line = one_line(full.call("subject", "access", PERSON, "--reason", DIGITS))
    assert DIGITS not in line


def test_only_the_privacy_officer_of_all_accounts_may_ask(full):
    full.tail("cdr.pii", "--reveal", "--reason", "X-1")
    me = audit(full)[0]["principal"]
    before = len(audit(full))
    for role, accounts in (("support", '["*"]'), ("dpo", '["acme"]')):
        (full.folder / "roles.toml").write_text(f'[[grant]]\nuser = "{me}"\nrole = "{role}"\naccounts = {accounts}\n')
        full.configure(**SHORT_LEASE, roles="roles.toml")
        for verb in ("access", "export"):
            assert "privacy officer" in one_line(full.call("subject", verb, PERSON, "--reason", "CASE-1"))
    assert len(audit(full)) == before


def test_the_request_is_noted_by_sid_before_anything_opens(full):
    access(full)
    entries = audit(full)
    # and what is opened together is one entry: the person's records, then what is searched
    assert [(entry["action"], entry.get("stream")) for entry in entries] == [
        ("access", None), ("reveal", "cdr.pii"), *[("reveal", "quarantine")] * (len(entries) - 2),
    ]  # fmt: skip
    assert entries[0]["reason"] == "CASE-1"
    assert entries[0]["sids"]
    assert set(entries[0]["sids"]) <= set(entries[1]["sids"]) | set(entries[0]["sids"])
    everything = b"".join(one.value for one in full.stored("audit"))
    for secret in (PERSON, DIGITS, OTHER, "Myself"):
        assert secret.encode() not in everything


def test_more_records_than_are_opened_at_once_are_all_shown(full):
    with mock.patch("streams.officer.access._OPENED_AT_ONCE", 2):
        assert set(by_id(access(full)["record"])) == {"s1", "s2", "v1", "v2", "m1"}
    entries = [len(entry["records"]) for entry in audit(full) if entry.get("stream") == "cdr.pii"]
    assert entries == [2, 2, 1]


def test_if_the_request_cannot_be_noted_nothing_opens(full, tmp_path):
    page = tmp_path / "page.html"
    with mock.patch.object(Auditor, "write", side_effect=LogBusy):
        done = full.call("subject", "access", PERSON, "--reason", "CASE-1", "--page", page)
    assert one_line(done)
    assert done.out == ""
    assert not page.exists()


def test_a_report_that_breaks_off_leaves_no_file_and_no_summary(full, tmp_path):
    page = tmp_path / "page.html"
    real = Auditor.write
    calls = []

    async def breaking(self, action, **fields):
        calls.append(action)
        if len(calls) == 3:
            raise LogBusy
        await real(self, action, **fields)

    with mock.patch.object(Auditor, "write", breaking):
        done = full.call("subject", "access", PERSON, "--reason", "CASE-1", "--json", "--page", page)
    assert one_line(done)
    assert done.lines
    assert "summary" not in {line["item"] for line in done.lines}
    assert not page.exists()
    assert full.call("subject", "requests", "--all", "--json").out == ""


# --- how it looks -------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_file_that_fetches_nothing_and_runs_nothing(full, tmp_path):
    # Given a record with a page's worst in it
    evil = '<script src="https://evil.example">alert(1)</script><img onerror=x>\x1b[2J"\''
    full.publish(sms_cdr(record_id="e1", display_name=None, attributes={"a": evil}, occurred_at=ago()))
    full.work()
    full.tail("cdr.pii", "--reveal", "--reason", "FRAUD-9")
    page = tmp_path / "page.html"
    # When
    done = full.call("subject", "access", PERSON, "--reason", "CASE-1", "--page", page)
    # Then
    assert (done.status, done.out) == (0, "")
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    text = page.read_text()
    seen = Seen()
    seen.feed(text)
    assert seen.tags == {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "h3",
        "p",
        "dl",
        "dt",
        "dd",
    }
    assert seen.attributes == {"lang", "charset", "http-equiv", "content", "name"}
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "").replace("https://evil.example", "")
    assert "\x1b" not in text
    told = "".join(seen.text)
    assert '<script src="https://evil.example">' in told  # as text
    for fact in (PERSON, "Who opened this data", "legitimate_interests", "Held for others", "bank"):
        assert fact in told
    # and it never takes the place of another
    assert "exists" in one_line(full.call("subject", "access", PERSON, "--reason", "CASE-1", "--page", page))
    assert page.read_text() == text


def test_a_text_cannot_move_the_cursor_and_keeps_its_lines(place):
    place.publish(sms_cdr(attributes={"a": "\x1b[2J\r\nRECORDS\n\x9b31m"}, occurred_at=ago()))
    place.work()
    done = place.call("subject", "access", PERSON, "--reason", "CASE-1")
    assert done.status == 0
    assert not [one for one in done.out if not one.isprintable() and one != "\n"]
    assert done.out.count("\nRECORDS\n") == 1
    assert f"What platform holds about {PERSON}" in done.out


# --- taking it along ----------------------------------------------------------------------------------------------


def test_an_export_holds_the_persons_communications_as_one_document_or_a_line_each(full, tmp_path):
    # When
    document = full.call("subject", "export", PERSON, "--reason", "CASE-2")
    lines = full.call("subject", "export", PERSON, "--reason", "CASE-2", "--json")
    out = tmp_path / "export.json"
    filed = full.call("subject", "export", PERSON, "--reason", "CASE-2", "--out", out)
    # Then
    whole = json.loads(document.out)
    assert set(whole) == {"report", "record", "processing", "summary"}
    assert {one["fields"]["record_id"] for one in whole["record"]} == {"s1", "s2", "v1", "v2", "m1"}
    assert OTHER not in document.out
    found = by_section(lines.lines)
    assert found["record"] == whole["record"]
    assert (filed.status, filed.out) == (0, "")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert json.loads(out.read_text())["record"] == whole["record"]
    assert {one["kind"] for one in full.call("subject", "requests", "--all", "--json").lines} == {"export"}


def test_an_export_of_nobody_is_a_document_too(full):
    whole = json.loads(full.call("subject", "export", "+14155550199", "--reason", "CASE-2").out)
    assert set(whole) == {"report", "summary"}
    assert whole["summary"]["records"] == 0


def test_an_accounts_export_holds_what_was_said(full):
    whole = json.loads(full.call("subject", "export", PERSON, "--account", "bank", "--reason", "CASE-2").out)
    assert [one["fields"]["content"] for one in whole["record"]] == ["Your parcel is here"]


def test_a_report_says_how_many_records_it_reads_and_reads_as_many(full):
    async def counted(deployment):
        report = Report(
            office(deployment), PERSON, account=None, reason="CASE-1", kind="access", now_s=int(time.time())
        )
        read = []
        size = await report.size()
        async for _ in report.items(read.append):
            pass
        return size, sum(read)

    size, read = full.within(counted)
    ends = sum(full.ends(stream) for stream in (*PERSONAL, "quarantine", "held"))
    assert size == read == ends
