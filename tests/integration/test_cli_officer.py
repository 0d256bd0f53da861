import asyncio
import json
import os
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from processors.pipeline import Inbox
from processors.screen.suppression import Suppressions
from processors.seal import ENTROPY_BYTES, Entropy
from schemas.catalog import TRAFFIC
from streams import quarantine
from streams.cli.main import main
from streams.config import load, packs_available
from streams.deployment import Deployment

PERSON, OTHER, CANARY = "+14155550101", "+14155550102", "+14155550177"
CODES = {"twilio": 21610, "telnyx": 40300, "plivo": 200, "vonage": 9, "sinch": 257, "infobip": 2050}


def request(recipient, **fields):
    common = {"v": 1, "type": "request", "channel": "sms", "record_id": "r1", "account_id": "acme", "direction": "mt",
              "occurred_at": "2026-11-21T12:00:00Z", "sender": "ACME", "recipient": recipient,
              "purpose": "otp"}  # fmt: skip
    return json.dumps({**common, **fields})


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/data/log.db"


@pytest.fixture
def call(url, capsys):
    """Run a command in this process: (exit status, JSON lines or text of standard output, standard error)."""

    def run(*args):
        try:
            status = main([*map(str, args), "--log", url])
        except SystemExit as ended:
            status = ended.code
        told = capsys.readouterr()
        lines = told.out.splitlines()
        if lines and all(line.startswith("{") for line in lines):
            lines = list(map(json.loads, lines))
        return SimpleNamespace(status=status, out=lines, err=told.err)

    return run


@pytest.fixture
def log(call, tmp_path):
    """A log with one request in it, of nobody that the tests are about."""
    file = tmp_path / "start.ndjson"
    file.write_text(request("+12125550100"))
    assert call("publish", file).status == 0


def within(url, work):
    """Return what `work(deployment)` returns."""

    async def run():
        async with Deployment.open(load(SimpleNamespace(config="streamveil.toml", log=url))) as deployment:
            return await work(deployment)

    return asyncio.run(run())


def ends(url, stream):
    async def read(deployment):
        return sum(await deployment.log.end_offsets(stream))

    return within(url, read)


def screen(call, number, *, account="acme", channel="sms", purpose="marketing", **more):
    options = [part for name, value in more.items() for part in (f"--{name}", value)]
    done = call("screen", number, "--account", account, "--channel", channel, "--purpose", purpose, *options)
    assert done.status == 0, done.err
    (answer,) = done.out
    return answer


# --- opting out and in -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("log")
def test_who_is_opted_out_is_refused_with_the_codes_that_gateways_know(call):
    # Given
    assert screen(call, PERSON)["verdict"] == "cleared"
    # When
    assert call("optout", "add", PERSON, "--account", "acme", "--reason", "CASE-1").status == 0
    # Then
    answer = screen(call, PERSON)
    assert (answer["verdict"], answer["reason"], answer["codes"]) == ("refused", "opted_out", CODES)
    assert answer["rules"][-1] == {"rule": "suppression", "clause": "KAL-5", "outcome": "refuse"}
    assert screen(call, PERSON, channel="voice", purpose="otp")["verdict"] == "refused"
    assert screen(call, PERSON, account="other")["verdict"] == "cleared"
    assert screen(call, OTHER)["verdict"] == "cleared"


@pytest.mark.parametrize(
    ("scope", "refused", "cleared"),
    [
        ((), {"account": "any"}, None),
        (("--account", "acme", "--sender", "ACME"), {"sender": "ACME"}, {"sender": "OTHER"}),
        (("--account", "acme", "--sender", "+12125550111"), {"sender": "1 212 555 0111"}, {}),
        (("--account", "acme", "--campaign", "a|b:c"), {"campaign": "a|b:c"}, {"campaign": "other"}),
        (("--class", "marketing"), {"purpose": "marketing"}, {"purpose": "otp"}),
        (("--channel", "voice"), {"channel": "voice"}, {"channel": "sms"}),
    ],
)
def test_an_opt_out_acts_in_its_scope_class_and_channel_only(call, scope, refused, cleared):
    assert call("optout", "add", PERSON, *scope).status == 0
    assert screen(call, PERSON, **refused)["verdict"] == "refused"
    assert cleared is None or screen(call, PERSON, **cleared)["verdict"] == "cleared"


def test_an_opt_in_of_another_scope_lifts_nothing(call, url):
    call("optout", "add", PERSON, "--account", "acme")
    before = ends(url, "suppressions")
    for other in ((), ("--account", "acme", "--sender", "ACME"), ("--account", "other"),
                  ("--account", "acme", "--authority", "officer"),
                  ("--account", "acme", "--class", "marketing")):  # fmt: skip
        done = call("optout", "remove", PERSON, *other)
        assert (done.status, done.out) == (0, ["no such opt-out stands; nothing was written"])
    assert ends(url, "suppressions") == before
    assert screen(call, PERSON)["verdict"] == "refused"


def test_an_opt_out_is_lifted_within_the_same_second_and_can_be_given_again(call):
    call("optout", "add", PERSON, "--account", "acme")
    assert call("optout", "remove", PERSON, "--account", "acme", "--channel", "sms").out == ["lifted: 1 entries"]
    assert screen(call, PERSON)["verdict"] == "cleared"
    assert screen(call, PERSON, channel="voice")["verdict"] == "refused"
    call("optout", "add", PERSON, "--account", "acme")
    assert screen(call, PERSON)["verdict"] == "refused"


def test_a_person_cannot_lift_what_an_officer_blocked(call):
    call("optout", "add", PERSON, "--authority", "officer")
    call("optout", "remove", PERSON)
    assert screen(call, PERSON)["reason"] == "blocked_by_officer"


def test_a_worker_refuses_who_was_opted_out_on_the_command_line(call, tmp_path):
    call("optout", "add", "1 415 555-0101", "--account", "acme")
    file = tmp_path / "in.ndjson"
    file.write_text(request(PERSON, occurred_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())))
    call("publish", file)
    assert call("run", "--until-idle").status == 0
    (verdict,) = call("tail", "verdicts", "--json").out
    assert verdict["value"]["reason"] == "opted_out"


def test_check_shows_what_stands_and_no_token(call):
    # Given
    call("optout", "add", PERSON, "--account", "acme", "--sender", "ACME", "--channel", "sms")
    call("optout", "add", PERSON, "--channel", "voice", "--class", "marketing", "--authority", "officer")
    call("optout", "add", OTHER)
    # When
    (found,) = call("optout", "check", PERSON, "--json").out
    # Then
    assert found["opted_out"] is True
    assert [{**entry, "since": len(entry["since"])} for entry in found["entries"]] == [
        {"scope": "platform", "class": "marketing", "channel": "voice", "authority": "officer", "since": 20},
        {"scope": "sender:acme:…", "class": "all", "channel": "sms", "authority": "person", "since": 20},
    ]
    assert call("optout", "check", CANARY, "--json").out == [{"opted_out": False, "entries": []}]
    assert call("optout", "check", CANARY).out == ["not opted out"]
    (others,) = call("optout", "check", PERSON, "--json", "--account", "other").out
    assert [entry["scope"] for entry in others["entries"]] == ["platform"]
    assert PERSON[-7:] not in str(call("optout", "check", PERSON).out)


NOT_UNDERSTOOD = [
    ("add", "not a number " + CANARY + "5551234567"),
    ("add", ""),
    ("add", "12345"),
    ("add", "ACME"),
    ("add", CANARY, "--sender", "ACME"),
    ("add", CANARY, "--account", "a b"),
    ("add", CANARY, "--account", "acme", "--campaign", CANARY),
    ("add", CANARY, "--account", CANARY[1:]),
    ("add", CANARY, "--reason", CANARY[1:]),
    ("add", CANARY, "--reason", "he asked us to"),
    ("add", CANARY, "--class", CANARY),
    ("add", CANARY, CANARY),
    ("add", CANARY, "--account", "acme", "--sender", "A", "--campaign", "C"),
    ("add", CANARY, "--account", "acme", "--sender", "token:0.1:" + "0" * 32),
    ("remove", CANARY, "--channel", CANARY),
    ("check", "\udcff" + CANARY[1:8]),
    (CANARY,),
    ("import", CANARY),
    ("export", CANARY + "/x", "--reason", "R"),
    ("export", "x", "--reason", CANARY),
]


@pytest.mark.usefixtures("log")
def test_what_is_not_understood_is_one_line_that_repeats_nothing(call, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in NOT_UNDERSTOOD:
        done = call("optout", *args)
        assert done.status in (1, 2), args
        assert done.status == 2 or done.err.count("\n") == 1, args
        assert CANARY[1:] not in str(done.out) + done.err, args
    assert not (tmp_path / "x").exists()
    assert ends(url, "suppressions") == 0


def test_an_account_that_the_policy_does_not_serve_is_no_scope(call, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(packs_available()["default"].replace("any = true", "any = false")
                      + '\n[[account]]\nid = "acme"\nown_numbers = ["+14155550100"]\n')  # fmt: skip
    config = tmp_path / "streamveil.toml"
    config.write_text('policy = "policy.toml"\n')
    assert call("optout", "add", PERSON, "--account", "acme", "--config", config).status == 0
    assert call("optout", "add", PERSON, "--account", "acmee", "--config", config).status == 1
    assert call("optout", "add", "+14155550100", "--account", "acme", "--config", config).status == 1
    done = call("screen", PERSON, "--account", "acmee", "--channel", "sms", "--purpose", "otp", "--config", config)
    assert (done.status, done.out) == (1, [])
    assert "does not serve this account" in done.err


def test_a_number_is_read_from_standard_input(call, url):
    line = [sys.executable, "-m", "streams.cli", "optout", "add", "-", "--log", url]
    given = b"\xef\xbb\xbf" + PERSON.encode() + b"\n\n"
    done = subprocess.run(line, input=given, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert PERSON.encode()[-7:] not in done.stdout
    assert screen(call, PERSON)["verdict"] == "refused"


def test_nothing_is_looked_up_in_a_log_that_does_not_exist(call, tmp_path):
    for args in (("optout", "check", PERSON), ("optout", "remove", PERSON), ("quarantine", "list"),
                 ("optout", "export", tmp_path / "x.csv", "--reason", "R"),
                 ("screen", PERSON, "--account", "a", "--channel", "sms", "--purpose", "otp"),
                 ("keys", "status")):  # fmt: skip
        done = call(*args)
        assert done.status == 1
        assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- import and export ---------------------------------------------------------------------------------------


def test_a_file_is_imported_but_for_the_lines_that_are_wrong(call, tmp_path, monkeypatch):
    # Given chunks of two lines
    monkeypatch.setattr("streams.optout.CHUNK_LINES", 2)
    file = tmp_path / "in.csv"
    good = f"{PERSON},acme,,,marketing,sms,officer,CASE/1,2026-01-02T03:04:05+01:00\n{OTHER},,,,,,,,\n"
    bad = [f"{CANARY},a b,,,,,,,", "nobody at all here,,,,,,,,", f'"{CANARY},,,,,,,,', f"{CANARY},,,", f"{CANARY}\xff"]
    bad += [f"{CANARY},,S,,,,,,", f"{CANARY},,,,,,,,yesterday", f"{CANARY},,,,,,,no reason,", f"{CANARY},,,,x,,,,"]
    header = "\ufeffNumber, account,sender,campaign,class,channel,authority,reason,event_at\r\n"
    file.write_bytes((header + "\r\n" + good).encode() + "\n".join(bad).encode("latin-1"))
    # When
    done = call("optout", "import", file, "--json")
    # Then
    assert (done.status, done.out) == (0, [{"lines": 11, "written": 3, "bad": 9}])
    wrong = ["account", "number", "line", "line", "line", "account", "event_at", "reason", "class"]
    assert done.err.splitlines() == [f"line {at}: {what} not understood; skipped" for at, what in enumerate(wrong, 5)]
    (found,) = call("optout", "check", PERSON, "--json").out
    assert [entry["since"] for entry in found["entries"]] == ["2026-01-02T02:04:05Z"]
    assert screen(call, OTHER, channel="voice")["verdict"] == "refused"
    assert screen(call, CANARY)["verdict"] == "cleared"


@pytest.mark.parametrize("header", ["", CANARY, "number,nummer", "number,number", '"number', "account"])
def test_a_file_without_a_header_is_refused_and_not_repeated(call, tmp_path, header, url):
    file = tmp_path / "in.csv"
    file.write_text(f"{header}\n{CANARY}\n")
    done = call("optout", "import", file)
    assert done.status == 1
    assert "the first line must name the columns" in done.err
    assert CANARY not in done.err
    assert ends(url, "suppressions") == 0


def test_what_is_exported_can_be_imported_elsewhere(call, tmp_path):
    # Given
    call("optout", "add", PERSON, "--account", "acme", "--class", "service", "--reason", "CASE-1")
    call("optout", "add", PERSON, "--account", "acme", "--campaign", "autumn-1", "--channel", "sms")
    call("optout", "add", PERSON, "--account", "acme", "--channel", "voice")
    call("optout", "add", "a.person@example.org", "--authority", "officer")
    call("optout", "add", OTHER, "--account", "acme")
    call("optout", "remove", OTHER, "--account", "acme")
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    # When
    assert call("optout", "export", first, "--reason", "MOVE-1").status == 0
    elsewhere = f"sqlite:///{tmp_path}/else/where/log.db"
    assert main(["optout", "import", str(first), "--log", elsewhere]) == 0
    assert main(["optout", "export", str(second), "--reason", "MOVE-1", "--log", elsewhere]) == 0
    # Then
    rows = first.read_text().splitlines()
    assert rows[0] == "number,account,sender,campaign,class,channel,authority,reason,event_at"
    assert sorted(row.rsplit(",", 1)[0] for row in rows[1:]) == sorted([
        f"{PERSON},acme,,,service,sms,person,CASE-1",
        f"{PERSON},acme,,,service,voice,person,CASE-1",
        f"{PERSON},acme,,autumn-1,all,sms,person,",
        f"{PERSON},acme,,,all,voice,person,",
        "a.person@example.org,,,,all,sms,officer,",
        "a.person@example.org,,,,all,voice,officer,",
    ])  # fmt: skip
    assert sorted(second.read_text().splitlines()) == sorted(rows)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (first, second)} == {0o600}
    # and the officer's block and the export are in the audit
    audited = [line["value"] for line in call("tail", "audit", "--json").out]
    assert [(entry["action"], entry["reason"]) for entry in audited] == [("block", None), ("reveal", "MOVE-1")]


def test_an_export_says_how_far_it_is(call, tmp_path, monkeypatch):
    # Given four records of opt-outs, one of them lifted again by a fifth, and a bar that remembers
    for words in ((PERSON,), (OTHER, "--channel", "sms"), (CANARY, "--channel", "voice")):
        call("optout", "add", *words)
    call("optout", "remove", OTHER, "--channel", "sms")
    shown = []

    @contextmanager
    def remembering(what, total):
        shown.append((what, total))
        yield shown.append

    monkeypatch.setattr("streams.cli.optout.bar", remembering)
    # When
    assert call("optout", "export", tmp_path / "out.csv", "--reason", "MOVE-1").status == 0
    # Then it knew how much there was, and told of each of them
    (what, total), *steps = shown
    assert (what, total, sum(steps)) == ("opt-outs", 5, 5)


def test_a_sender_known_by_its_token_only_goes_back_to_where_it_came_from_and_nowhere_else(call, tmp_path, capsys):
    call("optout", "add", PERSON, "--account", "acme", "--sender", "ACME", "--channel", "sms")
    file = tmp_path / "out.csv"
    call("optout", "export", file, "--reason", "R")
    call("optout", "remove", PERSON, "--account", "acme", "--sender", "ACME")
    assert screen(call, PERSON, sender="ACME")["verdict"] == "cleared"
    assert call("optout", "import", file, "--json").out == [{"lines": 1, "written": 1, "bad": 0}]
    assert screen(call, PERSON, sender="ACME")["verdict"] == "refused"
    elsewhere = f"sqlite:///{tmp_path}/else/where/log.db"
    assert main(["optout", "import", str(file), "--log", elsewhere, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"] == 1


@pytest.mark.usefixtures("log")
def test_an_export_never_overwrites_and_leaves_nothing_when_it_is_denied(call, tmp_path):
    file = tmp_path / "out.csv"
    file.write_text("mine")
    assert "FILE exists" in call("optout", "export", file, "--reason", "R").err
    assert file.read_text() == "mine"
    call("optout", "add", PERSON)
    (tmp_path / "roles.toml").write_text("")
    config = tmp_path / "streamveil.toml"
    config.write_text('roles = "roles.toml"\n')
    done = call("optout", "export", tmp_path / "new.csv", "--reason", "R", "--config", config)
    assert done.status == 1
    assert "may not open this stream" in done.err
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.usefixtures("log")
def test_an_export_needs_a_reason(call):
    assert call("optout", "export", "-").status == 2


# --- screening -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("log")
def test_the_answer_is_one_json_object_without_the_number(call):
    answer = screen(call, PERSON, purpose="otp", at="2026-11-21T12:00:00Z")
    assert answer == {
        "verdict": "cleared", "reason": None, "codes": {}, "not_after": "2026-11-21T12:10:00Z", "defer_until": None,
        "exemption": None, "confirmation": False,
        "rules": [
            {"rule": "request_age", "clause": "INF-3", "outcome": "not applicable"},
            {"rule": "recipient", "clause": "CAL-2", "outcome": "pass"},
            {"rule": "destination", "clause": "CAL-11", "outcome": "pass"},
            {"rule": "child", "clause": "REG-5", "outcome": "not applicable"},
            {"rule": "recipient_normalised", "clause": "CAL-3", "outcome": "not applicable"},
            {"rule": "suppression", "clause": "KAL-5", "outcome": "pass"},
            {"rule": "registry", "clause": "CAL-3", "outcome": "not applicable"},
            {"rule": "quiet_hours", "clause": "REG-3", "outcome": "not applicable"},
        ],
    }  # fmt: skip


@pytest.mark.usefixtures("log")
def test_the_instant_moves_quiet_hours_and_the_age_of_a_registry_but_no_list(call, tmp_path):
    config = tmp_path / "streamveil.toml"
    config.write_text('policy = "infobip"\n')
    numbers = tmp_path / "list.txt"
    numbers.write_text("212,5550199\n")
    call("registry", "load", "us-dnc", numbers, "--as-of", "2026-11-01", "--config", config)
    call("optout", "add", OTHER)
    # at noon in New York it is not quiet; at midnight it is, and the answer says until when
    noon, midnight = "2026-11-21T17:00:00Z", "2026-11-21T05:00:00Z"
    assert screen(call, "+12125550100", at=noon, config=str(config))["verdict"] == "cleared"
    quiet = screen(call, "+12125550100", at=midnight, config=str(config))
    assert (quiet["reason"], quiet["defer_until"]) == ("quiet_hours", "2026-11-21T13:00:00Z")
    # the list is too old a month later, and not before its date
    old = screen(call, "+12125550100", at="2026-12-21T17:00:00Z", config=str(config))
    assert old["reason"] == "registry_too_old"
    assert screen(call, "+12125550199", at="2020-01-01T17:00:00Z", config=str(config))["reason"] == "on_registry"
    # and an opt-out of today is one at any instant
    assert screen(call, OTHER, at="2020-01-01T17:00:00Z", config=str(config))["reason"] == "opted_out"


@pytest.mark.usefixtures("log")
def test_a_child_is_never_marketed_to(call):
    done = call("screen", PERSON, "--account", "acme", "--channel", "sms", "--purpose", "marketing", "--child")
    assert done.out[0]["reason"] == "child"


@pytest.mark.parametrize(
    "text",
    [
        f"{PERSON}\r\n\r\n14155550102\nno\xffone",
        f'\ufeffname,Number\nx,{PERSON}\n\n"y",14155550102\nz,no\xffone',
    ],
)
def test_a_file_gives_an_answer_a_row(call, tmp_path, text):
    call("optout", "add", PERSON)
    file = tmp_path / "in.csv"
    file.write_text(text)
    done = call("screen", "--file", file, "--account", "acme", "--channel", "sms", "--purpose", "marketing", "--json")
    assert done.status == 0
    assert [(line["row"], line["reason"]) for line in done.out] == [
        (1, "opted_out"), (2, "no_recipient"), (3, None), (4, "recipient_not_normalised"),
    ]  # fmt: skip
    assert not any(part in str(done.out) + done.err for part in (PERSON[-7:], "5550102"))


WRONG_SCREENS = [
    (CANARY, "--account", "a", "--channel", "sms", "--purpose", "otp", "--country", "us"),
    (CANARY,),
    (CANARY, "--account", "a", "--channel", "sms", "--purpose", CANARY),
    (CANARY, "--account", "a", "--channel", "sms", "--purpose", "otp", "--file", CANARY),
    (CANARY, "--account", CANARY, "--channel", "sms", "--purpose", "otp"),
    (CANARY, "--account", "a", "--channel", "sms", "--purpose", "otp", "--at", CANARY),
    ("--file", CANARY, "--account", "a", "--channel", "sms", "--purpose", "otp"),
    (CANARY, CANARY, "--account", "a", "--channel", "sms", "--purpose", "otp"),
]


@pytest.mark.usefixtures("log")
def test_screen_repeats_nothing_of_wrong_usage(call):
    for args in WRONG_SCREENS:
        done = call("screen", *args)
        assert done.status in (1, 2), args
        assert CANARY[1:] not in str(done.out) + done.err, args


# --- quarantine ------------------------------------------------------------------------------------------------


@pytest.fixture
def quarantined(call, tmp_path):
    """Three records in quarantine: text, bytes that are no text, and JSON of an unknown type."""
    file = tmp_path / "bad.ndjson"
    file.write_bytes(f"text {CANARY}\n".encode() + b"\xff\x00\xfe\n" + b'{"v":1,"type":"invoice"}\n')
    call("publish", file)
    assert call("run", "--until-idle").status == 0
    return [b"text " + CANARY.encode(), b"\xff\x00\xfe", b'{"v":1,"type":"invoice"}']


def waiting(url):
    async def read(deployment):
        log = deployment.log
        begins, ends = await log.begin_offsets(TRAFFIC), await log.end_offsets(TRAFFIC)
        pages = [await log.read(TRAFFIC, p, begins[p], ends[p] - begins[p]) for p in range(len(ends))]
        return sorted(one.value for page in pages for one in page)

    return within(url, read)


@pytest.mark.usefixtures("quarantined")
def test_the_list_says_where_and_why_and_nothing_of_the_content(call):
    lines = call("quarantine", "list", "--json").out
    assert sorted(line["reason"] for line in lines) == ["bad_value:type", "not_json", "not_json"]
    for line in lines:
        assert set(line) == {"partition", "offset", "reason", "source", "expires_at", "state"}
        assert (line["source"]["stream"], line["state"]) == (TRAFFIC, "open")
    assert len(call("quarantine", "list").out) == 4
    assert CANARY not in str(lines)


def test_what_is_replayed_goes_back_as_it_was_and_is_off_the_list(call, url, quarantined):
    # When
    assert call("quarantine", "replay", "--all", "--reason", "FIXED-1").out == ["replayed: 3"]
    # Then
    assert waiting(url) == sorted(quarantined)
    assert call("quarantine", "list", "--json").out == []
    # and each opening is in the audit, and the resolutions can be read
    audited = call("tail", "audit", "--json").out
    assert [line["value"]["action"] for line in audited] == ["reveal", "replay"]
    for line in audited:
        assert line["value"]["reason"] == "FIXED-1"
        assert len(line["value"]["records"]) == 3
    resolved = call("tail", "quarantine", "--from-beginning", "--json", "--reveal", "--reason", "LOOK").out[-1]
    assert resolved["value"]["action"] == "replayed"
    assert resolved["reveal"] == {"state": "revealed", "fields": {}, "withheld": []}
    # and a worker that still cannot read them puts them back
    call("run", "--until-idle")
    assert len(call("quarantine", "list", "--json").out) == 3


@pytest.mark.usefixtures("quarantined")
def test_one_record_is_named_by_where_it_lies_or_where_it_came_from(call, url):
    first, second, third = call("quarantine", "list", "--json").out
    by_place = ("--partition", first["partition"], "--offset", first["offset"])
    assert call("quarantine", "discard", *by_place, "--reason", "JUNK").out == ["discarded: 1"]
    source = second["source"]
    by_source = ("--stream", TRAFFIC, "--partition", source["partition"], "--offset", source["offset"])
    assert call("quarantine", "replay", *by_source, "--reason", "FIXED").out == ["replayed: 1"]
    assert call("quarantine", "list", "--json").out == [third]
    assert len(waiting(url)) == 1
    again = call("quarantine", "replay", *by_source, "--reason", "FIXED")
    assert again.status == 1
    assert "nothing open in quarantine" in again.err


@pytest.mark.parametrize("verb", ["replay", "discard"])
def test_a_replay_that_was_killed_before_it_was_noted_is_not_repeated(call, url, quarantined, monkeypatch, verb):
    # Given a replay that ends between sending back and noting it
    resolve = quarantine.Quarantine._resolve

    async def end(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quarantine.Quarantine, "_resolve", end)
    assert call("quarantine", "replay", "--all", "--reason", "R").status == 130
    monkeypatch.setattr(quarantine.Quarantine, "_resolve", resolve)
    assert len(waiting(url)) == 1
    assert len(call("quarantine", "list", "--json").out) == 3
    # When
    assert call("quarantine", verb, "--all", "--reason", "R").status == 0
    # Then
    assert waiting(url) == sorted(quarantined) if verb == "replay" else len(waiting(url)) == 1
    notes = [line["value"].get("action") for line in call("tail", "quarantine", "--from-beginning", "--json").out]
    assert sorted(filter(None, notes)) == (["replayed"] * 3 if verb == "replay" else ["discarded"] * 2 + ["replayed"])


@pytest.mark.usefixtures("log")
def test_what_is_past_its_seven_days_cannot_be_replayed_and_says_so(call, url):
    # Given a record that was quarantined nine days ago
    async def long_ago(deployment):
        now_s = int(time.time()) - 9 * 86_400
        inbox = Inbox(TRAFFIC, 0, 7, [b"x"])
        prepared = deployment.pipeline.prepare(inbox, Suppressions(), deployment.registries(), now_s)
        keys, _ = deployment.keys()
        ring = keys.fetch(prepared.needs, now_s)
        outputs = deployment.pipeline.complete(prepared, ring, Entropy(os.urandom(ENTROPY_BYTES)), 4)
        await deployment.log.append(outputs)
        keys.close()

    within(url, long_ago)
    before = ends(url, TRAFFIC)
    # Then
    (line,) = call("quarantine", "list", "--json").out
    assert line["state"] == "destroyed"
    one = call("quarantine", "replay", "--stream", TRAFFIC, "--partition", 0, "--offset", 7, "--reason", "R")
    assert one.status == 1
    assert "cannot be replayed" in one.err
    every = call("quarantine", "replay", "--all", "--reason", "R")
    assert (every.status, every.out) == (0, ["replayed: 0"])
    assert "1 destroyed" in every.err
    assert ends(url, TRAFFIC) == before
    assert call("quarantine", "discard", "--all", "--reason", "R").out == ["discarded: 1"]


WRONG_SELECTORS = [
    ("replay", "--all"),
    ("replay", "--reason", "R"),
    ("replay", "--all", "--partition", "0", "--offset", "0", "--reason", "R"),
    ("replay", "--all", "--offset", "0", "--reason", "R"),
    ("discard", "--partition", "0", "--reason", "R"),
    ("discard", "--partition", CANARY, "--offset", "0", "--reason", "R"),
    ("discard", "--stream", CANARY, "--all", "--reason", "R"),
    ("replay", "--all", "--reason", f"called {CANARY}"),
    ("discard", CANARY),
]


@pytest.mark.usefixtures("quarantined")
def test_quarantine_takes_exactly_one_selector_and_a_reason(call):
    for args in WRONG_SELECTORS:
        done = call("quarantine", *args)
        assert done.status in (1, 2), args
        assert CANARY not in done.err, args
    assert len(call("quarantine", "list", "--json").out) == 3


# --- keys and retention ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quarantined")
def test_keys_status_shows_each_epoch_and_a_summary(call):
    *keys, last = call("keys", "status", "--json").out
    assert [(key["domain"], key["owner"], key["versions"], key["state"]) for key in keys] == [
        ("quarantine", "platform", 1, "alive")
    ]
    assert set(keys[0]) == {"domain", "owner", "epoch", "versions", "deadline", "state"}
    assert {"store", "destruction_days", "leases"} < set(last["summary"])
    day_before = datetime.fromisoformat(keys[0]["deadline"]) - timedelta(seconds=1)
    assert day_before.date().isoformat() in last["summary"]["destruction_days"]
    assert last["summary"]["leases"] == 0
    assert call("keys", "status").out[0].split() == ["DOMAIN", "OWNER", "EPOCH", "VERSIONS", "DEADLINE", "STATE"]


def test_the_calendar_gives_the_instants_of_a_communication_of_now(call, tmp_path):
    lines = call("retention", "calendar", "--json", "--now", "2026-11-21T14:30:00Z").out
    dies = {line["what"]: (line["dies_at"], line["clause"]) for line in lines}
    assert dies["traffic"] == ("2027-12-01T00:00:00Z", "INF-4")
    assert dies["anonymous"] == ("2037-01-01T00:00:00Z", "INF-5")
    assert dies["content"] == ("2026-12-22T00:00:00Z", "INF-2")
    assert dies["suppression"] == (None, "INF-8")
    assert dies["stream verdicts"][0] == dies["stream quarantine"][0] == "2026-11-28T00:00:00Z"
    assert dies["stream cleared"][0] == "2026-11-22T14:00:00Z"
    assert [line["dies_at"] or "9" for line in lines] == sorted(line["dies_at"] or "9" for line in lines)
    assert list(tmp_path.iterdir()) == []  # asking makes no key store


@pytest.mark.usefixtures("quarantined")
def test_the_calendar_lists_the_keys_that_are_alive_soonest_first(call):
    call("optout", "add", PERSON)
    keys = [line for line in call("retention", "calendar", "--json").out if "domain" in line]
    assert [key["domain"] for key in keys] == ["quarantine", "suppression"]
    later = [line for line in call("retention", "calendar", "--json", "--now", "2099-01-01").out if "domain" in line]
    assert [key["domain"] for key in later] == ["suppression"]


def test_an_account_with_an_instruction_of_its_own_has_its_own_line(call, tmp_path):
    (tmp_path / "policy.toml").write_text(packs_available()["default"] + '\n[[account]]\nid = "a"\ncontent = "never"\n')
    (tmp_path / "streamveil.toml").write_text('policy = "policy.toml"\n')
    lines = call("retention", "calendar", "--json", "--config", tmp_path / "streamveil.toml").out
    (found,) = [line for line in lines if line["what"] == "content of account a"]
    assert (found["kept"], found["dies_at"]) == ("never stored", None)
