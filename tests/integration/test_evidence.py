"""Evidence reports on real files: what they hold, whom they name (nobody), what `verify` finds in those that lie."""

import json
import os
import re
import shutil
import stat
import time
from copy import copy
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from processors.evidence import encode
from schemas.errors import InputInvalid
from schemas.fields import normalise
from streams.keys.audit import Auditor
from streams.keys.ledger import Mark, Request
from streams.officer import evidence
from streams.officer.office import office
from streams.officer.verify import FILES, MANIFEST, verify
from tests.support.audit import Forger, Writer, cut_partition, edit_audit
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import OTHER, PERSON, sms_cdr, sms_request, voice_cdr

LAST_WEEK, NEXT_WEEK = (f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%d}" for days in (-7, 7))
"""A window with all that happens here, also when midnight comes while the tests run."""
DAY_S = 86_400


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    made.publish(
        voice_cdr(record_id="v1", recipient=PERSON, sender=OTHER, occurred_at=ago()),
        sms_cdr(record_id="s1", recipient=PERSON, occurred_at=ago()),
        sms_request(record_id="q1", recipient=PERSON, occurred_at=ago()),
    )
    assert made.work() == 3
    for case in ("CASE-1", "CASE-2"):
        made.tail("cdr.pii", "--reveal", "--reason", case)
    yield made
    made.close()


def report(place, name="evidence", since=LAST_WEEK, until=NEXT_WEEK):
    """Return the folder of a new report."""
    folder = place.folder / name
    done = place.call("evidence", "report", "--from", since, "--to", until, "--out", folder)
    assert done.status == 0, done.err
    return folder


def key_of(place):
    done = place.call("evidence", "key")
    assert done.status == 0, done.err
    path = place.folder / "key.pem"
    path.write_text(done.out)
    return path


def wrong(folder, *more):
    """Return what `verify` finds, by check, of those that failed."""
    return {check.what: check.findings for check in verify(folder, *more) if not check.passed}


def read(folder, name):
    return json.loads((folder / name).read_text())


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- what a report holds -----------------------------------------------------------------------------------------


def test_a_report_of_an_untouched_deployment_verifies_with_its_key_and_nothing_else(place):
    folder, key = report(place), key_of(place)
    done = place.call("evidence", "verify", folder, "--key", key)
    assert done.status == 0
    assert all(line.startswith("ok  ") for line in done.out.splitlines())
    assert len(done.out.splitlines()) == 7
    checks = [json.loads(line) for line in place.call("evidence", "verify", folder, "--json").out.splitlines()]
    assert all(check["passed"] and check["findings"] == [] for check in checks)


def test_verify_says_what_the_report_is_about(place):
    folder = report(place)
    manifest = read(folder, MANIFEST)["manifest"]
    assert manifest["from"] == f"{LAST_WEEK}T00:00:00Z"
    assert manifest["to"] <= manifest["made_at"] < f"{NEXT_WEEK}T00:00:00Z"
    first = place.call("evidence", "verify", folder).out.splitlines()[0]
    found = place.call("evidence", "verify", folder, "--json").lines
    for name in ("from", "to", "made_at", "store", "key"):
        assert manifest[name] in first
        assert found[0][name] == manifest[name]
        assert name not in found[1]


def test_the_report_of_a_window_that_is_not_over_says_where_it_ends(place):
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", place.folder / "x")
    assert f"the report ends at {read(place.folder / 'x', MANIFEST)['manifest']['to']}" in done.err
    past = place.call("evidence", "report", "--from", "2020-01-01", "--to", LAST_WEEK, "--out", place.folder / "y")
    assert (past.status, past.err) == (0, "")


@pytest.mark.parametrize(
    ("fields", "finding"),
    [
        ({"to": "2099-01-01T00:00:00Z"}, "before its window was over"),
        ({"from_": "2099-01-01T00:00:00Z"}, "its window holds nothing"),
    ],
)
def test_a_signed_report_of_a_window_that_it_cannot_be_of_is_found(place, fields, finding):
    folder = report(place)
    place.within(Forger.of).say(folder, **fields)
    assert any(finding in one for all_ in wrong(folder).values() for one in all_)


def test_what_a_manifest_says_prints_nothing_but_what_it_may_be(place):
    folder = report(place)
    place.within(Forger.of).say(folder, store="x\nok  all is well\x1b[2J")
    one_line(place.call("evidence", "verify", folder))


def test_verify_needs_no_configuration_no_store_and_no_log(place, tmp_path):
    folder, key = report(place), key_of(place)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(folder, elsewhere / "report")
    shutil.move(key, elsewhere / "key.pem")
    shutil.rmtree(place.data)
    shutil.rmtree(place.folder / "streamveil-kms")
    place.config.unlink()
    done = place.run("evidence", "verify", elsewhere / "report", "--key", elsewhere / "key.pem")
    assert (done.status, done.err) == (0, "")
    assert not place.data.exists()


def test_a_report_is_for_the_owner_of_the_folder_alone_and_never_overwrites_one(place):
    folder = report(place)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *FILES}
    before = (folder / MANIFEST).read_bytes()
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", folder)
    assert "is there already" in one_line(done)
    assert (folder / MANIFEST).read_bytes() == before


def test_by_default_the_folder_is_named_by_the_window(place, monkeypatch):
    monkeypatch.chdir(place.folder)
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--json")
    assert done.lines[0]["folder"] == f"evidence-{LAST_WEEK}-{NEXT_WEEK}"
    assert done.lines[0]["exceptions"] == {}
    assert wrong(place.folder / f"evidence-{LAST_WEEK}-{NEXT_WEEK}") == {}


def test_of_two_reports_into_one_folder_the_first_stays_and_the_other_is_one_line(place, monkeypatch):
    made = evidence.page

    def meanwhile(shown):
        (place.folder / "x").mkdir()
        (place.folder / "x" / "first").touch()
        return made(shown)

    monkeypatch.setattr(evidence, "page", meanwhile)
    before = {path.name for path in place.folder.iterdir()}
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", place.folder / "x")
    assert "is there already" in one_line(done)
    assert {path.name for path in place.folder.iterdir()} - before == {"x"}
    assert [path.name for path in (place.folder / "x").iterdir()] == ["first"]


def test_a_report_that_fails_leaves_nothing_behind(place, monkeypatch):
    def fails(_):
        raise InputInvalid("no page")

    monkeypatch.setattr(evidence, "page", fails)
    before = sorted(place.folder.iterdir())
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", place.folder / "x")
    one_line(done)
    assert sorted(place.folder.iterdir()) == before


@pytest.mark.parametrize("window", [(NEXT_WEEK, LAST_WEEK), (LAST_WEEK, LAST_WEEK), (NEXT_WEEK, "2099-01-01")])
def test_a_window_that_holds_nothing_is_refused(place, window):
    since, until = window
    done = place.call("evidence", "report", "--from", since, "--to", until, "--out", place.folder / "x")
    assert "--from must be before --to" in one_line(done)


def test_only_the_privacy_officer_gets_a_report(place):
    place.configure(roles="roles.toml", **SHORT_LEASE)
    (place.folder / "roles.toml").write_text('[[grant]]\nuser = "somebody"\nrole = "support"\naccounts = ["*"]\n')
    ends = place.ends("audit")
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", place.folder / "x")
    assert "only the privacy officer" in one_line(done)
    assert not (place.folder / "x").exists()
    assert place.ends("audit") == ends


def test_the_entries_are_in_it_byte_for_byte_and_the_report_is_one_of_them(place):
    folder = report(place)
    stored = {(one.partition, one.offset): one.value for one in place.stored("audit")}
    found = {}
    for line in (folder / "audit.ndjson").read_bytes().splitlines():
        match = re.fullmatch(rb'\{"partition":(\d+),"offset":(\d+),"entry":(.*)\}', line)
        found[int(match[1]), int(match[2])] = match[3]
    assert found.items() <= stored.items()
    left = [json.loads(value)["action"] for place_, value in stored.items() if place_ not in found]
    assert left == ["checkpoint"]  # which covers the others
    assert "evidence" in {json.loads(value)["action"] for value in found.values()}


def test_what_was_opened_is_counted_by_role_and_stream(place):
    summary = read(report(place), "reveals.json")
    (row,) = summary["reveals"]
    assert (row["action"], row["role"], row["stream"], row["denied"]) == ("reveal", "dpo", "cdr.pii", 0)
    assert row["records"] == 4
    assert summary["actions"] == {"evidence": 1, "reveal": row["entries"]}
    assert sum(summary["policies"].values()) == row["entries"] + 1


def test_what_was_destroyed_is_listed_with_its_reason(place):
    async def destroy(deployment):
        sids = ["ab" * 16]
        destroyed = {"sids": sids, "epochs": ["pii/platform/2020-01"]}
        await deployment.auditor().write("erase", role="dpo", reason="CASE-3", destroyed=destroyed)
        await deployment.auditor().write("retention", counts={"epochs": 1})

    place.within(destroy)
    folder = report(place)
    (line,) = lines(folder, "destructions.ndjson")
    assert line["destroyed"] == {"sids": ["ab" * 16], "epochs": ["pii/platform/2020-01"]}
    assert (line["action"], line["reason"]) == ("erase", "CASE-3")
    (run,) = lines(folder, "retention.ndjson")
    assert run["counts"] == {"epochs": 1}


def test_requests_holds_keys_and_policy_are_in_it_and_what_is_overdue_is_an_exception(place):
    now_s = int(time.time())

    async def note(deployment):
        ledger = deployment.store.ledger
        late = Request(
            "aa" * 16,
            "erase",
            "platform",
            "CASE-5",
            now_s - 20 * DAY_S,
            now_s - 19 * DAY_S,
            now_s - 5 * DAY_S,
            {"acme": None},
        )
        held = Request(
            "bb" * 16, "erase", "platform", "CASE-6", now_s, now_s + DAY_S, now_s + 15 * DAY_S, {}, None, "refused:held"
        )
        before = Request(
            "cc" * 16, "access", "platform", "CASE-7", now_s - 90 * DAY_S, now_s, now_s, {}, now_s - 60 * DAY_S, "done"
        )
        for request in (late, held, before):
            ledger.put_request(request)
        token = deployment.tokens.of(normalise(PERSON).value)
        ledger.add_mark(Mark("dd" * 16, "hold", "platform", (token,), "CASE-8", now_s), PERSON)

    place.within(note)
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", place.folder / "x")
    assert "requests_overdue: 1" in done.err
    folder = place.folder / "x"
    assert [(one["id"], one["overdue"]) for one in read(folder, "requests.json")] == [
        ("aa" * 16, True), ("bb" * 16, False)
    ]  # fmt: skip
    exceptions = read(folder, "exceptions.json")
    assert [one["id"] for one in exceptions["requests_overdue"]] == ["aa" * 16]
    assert [one["id"] for one in exceptions["requests_refused"]] == ["bb" * 16]
    (hold,) = read(folder, "holds.json")
    assert (hold["id"], hold["case"], hold["ended"]) == ("dd" * 16, "CASE-8", None)
    assert {"pii", "content"} <= {one["domain"] for one in lines(folder, "keys.ndjson")}
    assert (folder / "policy.toml").read_bytes() == (
        next(
            path for path in (place.folder.cwd() / "schemas/policies").iterdir() if path.name == "default.toml"
        ).read_bytes()
    )
    assert wrong(folder) == {}


def test_a_report_names_nobody(place):
    place.call("optout", "add", PERSON, "--reason", "CASE-9")
    folder = report(place)
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    for number in (PERSON, OTHER):
        assert number[1:].encode() not in content
        token = place.within(lambda deployment, one=number: _token(deployment, one))
        assert token.hex().encode() not in content
    assert b"Your parcel" not in content


async def _token(deployment, number):
    return deployment.tokens.of(normalise(number).value)


def test_the_page_shows_without_network_script_or_cookie(place):
    page = (report(place) / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<img|<link|<iframe|https?://|url\(|cookie|\son[a-z]+=", page)
    assert "Exceptions: none" in page
    assert "cdr.pii" in page


def test_what_stands_in_the_page_is_escaped():
    from streams.officer.report_page import page

    empty = {"reveals": [{"a": "<script>x"}], "actions": {"<b>": 1}}
    shown = {
        "window": ("a", "b"), "made_at": "c", "store": "d", "key": "e", "entries": 1, "checkpoints": 1, "keys": {},
        "policy": {"in_force": {"name": "<i>", "revision": 1}, "sha256": "f"}, "summary": empty,
        "requests": [{"id": "<u>"}], "holds": [], "exceptions": {"chains": [{"code": "<s>"}]},
    }  # fmt: skip
    text = page(shown)
    assert not re.search(r"<(script|b|i|u|s)>", text)
    assert 'class="wrong">Exceptions: 1' in text


@pytest.mark.parametrize(("every", "first"), [(1, 10), (13, 30), (13, 36)])
def test_a_window_of_the_past_holds_the_entries_of_that_time_and_what_covers_them(place, monkeypatch, every, first):
    """Reports of one month after the other, with checkpoints in between."""
    begin_s = int(time.time()) - 40 * DAY_S
    clock = [begin_s]
    monkeypatch.setattr(evidence.time, "time", lambda: clock[0])

    async def write(deployment, day):
        deployment._auditor = auditor_at(deployment, lambda: clock[0])
        await deployment.auditor().write(f"day-{day}", reason="CASE-1")
        if day % every == 0:
            await evidence.checkpoint(deployment)

    edit_audit(place, lambda _: [])  # what the fixture opened is of today
    place.within(_forget_heads)
    for day in range(40):
        clock[0] = begin_s + day * DAY_S
        place.within(lambda deployment, day=day: write(deployment, day))

    async def make(deployment):
        desk = office(deployment)
        from_s = begin_s + first * DAY_S - 60
        return await evidence.report(desk, from_s, from_s + 2 * DAY_S, place.folder / "past")

    made = place.within(make)
    actions = read(made.folder, "reveals.json")["actions"]
    assert {f"day-{first}", f"day-{first + 1}"} <= set(actions)
    assert not {f"day-{first - 1}", f"day-{first + 2}"} & set(actions)
    kept = {json.loads(line)["entry"]["action"] for line in (made.folder / "audit.ndjson").read_text().splitlines()}
    assert "day-3" not in kept
    assert every > 1 or "day-20" not in kept
    assert wrong(made.folder) == {}
    assert len(lines(made.folder, "checkpoints.ndjson")) < 8


def auditor_at(deployment, clock):
    return Auditor(deployment.log, deployment.store.ledger, deployment.planner, deployment.who().name, clock)


async def _forget_heads(deployment):
    for head in deployment.store.ledger.heads():
        deployment.store.ledger.drop_head(head.writer, head.seq)


# --- changed by somebody without the key -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_one_changed_byte_in_any_file_is_found(place, name):
    folder = report(place)
    path = folder / name
    content = path.read_bytes()
    spots = range(0, len(content), max(1, len(content) // 40))
    for at in [*spots, len(content) - 1]:
        if not content:
            continue
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            assert wrong(folder), (name, at)
        except InputInvalid:
            assert name in (MANIFEST, "key.pem")
    path.write_bytes(content + b"\n")
    assert name == "key.pem" or wrong(folder)
    path.write_bytes(content)
    assert wrong(folder) == {}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_and_one_that_was_put_in(place, name):
    folder = report(place)
    key = key_of(place)
    (folder / name).rename(place.folder / "aside")
    assert any("were signed" in what for what in wrong(folder, key))
    (place.folder / "aside").rename(folder / name)
    (folder / "more.txt").write_text("x")
    assert any("not listed" in found for all_ in wrong(folder, key).values() for found in all_)


def test_what_is_no_plain_file_is_not_read(place):
    folder, key = report(place), key_of(place)
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")):
        path = folder / "audit.ndjson"
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        make(path)
        assert wrong(folder, key)


def test_another_key_does_not_verify(place, tmp_path):
    folder = report(place)
    (tmp_path / "other").mkdir()
    other = Place(tmp_path / "other", **SHORT_LEASE)
    other.work()
    found = wrong(folder, key_of(other))
    assert any("not signed by this key" in one for all_ in found.values() for one in all_)
    assert place.call("evidence", "verify", folder, "--key", key_of(other)).status == 1


@pytest.mark.parametrize("words", [("verify", "nowhere"), ("verify", ".")])
def test_what_is_no_report_is_one_line(place, words):
    one_line(place.run("evidence", *words))


# --- made by somebody who has the key ----------------------------------------------------------------------------


FORGERIES = {
    "an entry removed": lambda found: found[:1] + found[2:],
    "the first entry removed": lambda found: found[1:],
    "the last entry removed": lambda found: found[:-1],
    "two entries the other way round": lambda found: [found[1], found[0], *found[2:]],
    "an entry twice": lambda found: [found[0], *found],
    "an entry twice, with a difference": lambda found: [found[0], found[0].replace(b"CASE-1", b"CASE-0"), *found[1:]],
    "an entry changed": lambda found: [found[0].replace(b"CASE-1", b"CASE-0"), *found[1:]],
    "an entry put in": lambda found: [*found, re.sub(rb'"writer":"..', b'"writer":"00', found[0])],
    "no entries at all": lambda _: [],
    "no JSON": lambda found: [*found, b"\n"],
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_signed_report_whose_entries_were_tampered_with_is_found(place, forgery):
    folder = report(place)
    forger = place.within(Forger.of)
    content = (folder / "audit.ndjson").read_bytes()
    forger.write(folder, "audit.ndjson", b"".join(FORGERIES[forgery](content.splitlines(keepends=True))))
    found = wrong(folder, key_of(place))
    assert found
    assert not any("were signed" in what or "manifest" in what for what in found)  # for they are


def test_a_signed_report_whose_figures_do_not_follow_from_its_entries_is_found(place):
    folder = report(place)
    forger = place.within(Forger.of)
    summary = read(folder, "reveals.json")
    summary["reveals"] = []
    forger.write(folder, "reveals.json", json.dumps(summary).encode())
    assert list(wrong(folder)) == ["what is said of reveals, destructions and retention follows from the entries"]


def test_a_checkpoint_taken_out_of_a_signed_report_is_found(place):
    for at in range(4):
        place.tail("cdr.pii", "--reveal", "--reason", f"N-{at}")
        place.within(evidence.checkpoint)
    folder = report(place)
    forger = place.within(Forger.of)
    content = (folder / "checkpoints.ndjson").read_bytes().splitlines(keepends=True)
    assert len(content) == 5
    forger.write(folder, "checkpoints.ndjson", b"".join(content[:1] + content[2:]))
    assert "each checkpoint names one before it, and they cover the time of the report" in wrong(folder)
    for kept in (content[:1] + content[2:], content[1:], content[:-1], content[::-1], []):
        forger.write(folder, "checkpoints.ndjson", b"".join(kept))
        assert wrong(folder), len(kept)
    forger.write(folder, "checkpoints.ndjson", b"".join(content))
    assert wrong(folder) == {}


# --- edited in the log -------------------------------------------------------------------------------------------


def test_an_edited_log_is_said_to_be_so_by_the_report_and_by_verify(place):
    edit_audit(place, lambda values: [value.replace(b"CASE-1", b"CASE-0") for value in values])
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", place.folder / "x")
    assert done.status == 0
    assert "exceptions, found_by_checkpoints: 1" in done.err
    folder = place.folder / "x"
    (found,) = read(folder, "exceptions.json")["found_by_checkpoints"]
    assert found["code"] == "changed_entry"
    assert "changed_entry" in (folder / "report.html").read_text()
    ((what, (finding,)),) = wrong(folder).items()
    assert what == "no checkpoint has found anything wrong"
    assert "changed_entry" in finding
    assert place.call("evidence", "verify", folder).status == 1


def test_an_entry_edited_after_a_checkpoint_had_it_is_found_by_the_report(place):
    place.within(evidence.checkpoint)
    edit_audit(place, lambda values: [value.replace(b"CASE-2", b"CASE-0") for value in values])
    folder = report(place)
    assert {one["code"] for one in read(folder, "exceptions.json")["chains"]} == {"changed_entry"}
    assert wrong(folder)


def test_what_a_checkpoint_found_is_said_though_it_is_the_first_that_is_left(place):
    """A partition was emptied, with the checkpoint before in it: the next one begins anew and is all there is."""
    place.within(evidence.checkpoint)
    cut_partition(place)
    made = place.within(evidence.checkpoint)
    assert (made.checkpoint.number, bool(made.checkpoint.previous)) == (2, True)
    wanted = [one.code for one in made.checkpoint.findings]
    assert wanted
    folder = report(place)
    assert [one["code"] for one in read(folder, "exceptions.json")["found_by_checkpoints"]] == wanted
    found = wrong(folder)["no checkpoint has found anything wrong"]
    assert [one.split()[1].rstrip(":") for one in found] == wanted


def test_what_the_first_checkpoint_of_an_emptied_log_found_is_said(place):
    edit_audit(place, lambda _: [])
    made = place.within(evidence.checkpoint)
    assert not any(made.checkpoint.upto)
    assert made.checkpoint.findings
    assert "no checkpoint has found anything wrong" in wrong(report(place))


def test_many_heads_cut_into_several_checkpoints_are_without_a_fault_wherever_a_report_begins(place, monkeypatch):
    monkeypatch.setattr(evidence, "MAX_HEADS", 2)
    now = evidence.time.time
    kept, since = [], []
    for hours in range(0, 12, 3):
        monkeypatch.setattr(evidence.time, "time", lambda hours=hours: now() + hours * 3600)
        for at in range(5):
            place.tail("cdr.pii", "--reveal", "--reason", f"H-{hours}-{at}")
        made = place.within(evidence.checkpoint)
        (place.folder / f"kept-{hours}").write_bytes(evidence.encode(made))
        kept.append(place.folder / f"kept-{hours}")
        since.append(made.checkpoint.at)
    for name, (file, at) in enumerate(zip(kept, since, strict=True)):
        folder = report(place, f"report-{name}", at, "2099-01-01")
        assert len(lines(folder, "checkpoints.ndjson")) > 3
        assert wrong(folder, None, file) == {}


def test_of_checkpoints_that_are_looked_at_only_their_place_is_kept(place):
    made = place.within(evidence.checkpoint)

    async def seen(deployment):
        key = (await evidence.signing_key(deployment.store)).public_key()
        return await evidence._checkpoints(deployment.log, key, 0, None, None)

    ((digest, one),) = place.within(seen).items()
    assert digest == made.checkpoint.digest
    assert {type(field) for field in one} == {int, str, tuple}


@pytest.mark.parametrize("look_again", [True, False])
def test_a_checkpoint_that_goes_while_the_report_is_made_stops_it(place, monkeypatch, look_again):
    look = evidence._checkpoints

    async def then_edit(*args):
        found = await look(*args)
        if args[-1] is not None and look_again:
            return found
        edit_audit(place, lambda values: [value.replace(b'"checkpoint"', b'"checkpoinT"') for value in values])
        return found

    monkeypatch.setattr(evidence, "_checkpoints", then_edit)
    done = place.call("evidence", "report", "--from", LAST_WEEK, "--to", NEXT_WEEK, "--out", place.folder / "x")
    assert "was taken out of the log" in one_line(done)
    assert not (place.folder / "x").exists()


def test_a_log_that_is_cut_off_is_found_by_the_report(place):
    place.within(evidence.checkpoint)
    edit_audit(place, lambda values: values[:1])
    place.tail("cdr.pii", "--reveal", "--reason", "LATER")
    assert wrong(report(place))


# --- a past written anew, by somebody who has the key and the log ------------------------------------------------


class Fork:
    """A log with three openings and a checkpoint, then five that somebody regrets and the checkpoint of an auditor.

    `kept` is what the auditor keeps. In the other past there was one opening, and checkpoints with the same numbers.
    """

    window = ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")

    def __init__(self, folder):
        self.folder = folder
        self.forger = Forger(Ed25519PrivateKey.generate())
        self.early, self.notes, self.late, self.instead = map(Writer, ("early", "notes", "late", "instead"))
        self.log = []
        for day in (1, 2, 3):
            self.early.write(self.log, f"2026-10-0{day}T00:00:00Z")
        self.first = self.checkpoint(1, "2026-10-05T00:00:00Z", [], 0, 3, [self.early.head])
        self.notes.note(self.log, self.first)
        self.other, noted = list(self.log), copy(self.notes)
        for day in range(5):
            self.late.write(self.log, f"2026-10-1{day}T00:00:00Z")
        self.second = self.checkpoint(2, "2026-10-20T00:00:00Z", [self.first], 3, 9, [self.late.head, self.notes.head])
        self.notes.note(self.log, self.second)
        self.kept = folder / "kept.json"
        self.kept.write_bytes(encode(self.second) + b"\n")
        self.instead.write(self.other, "2026-10-12T00:00:00Z")
        self.anew = self.checkpoint(2, "2026-10-20T00:00:00Z", [self.first], 3, 5, [self.instead.head, noted.head])
        noted.note(self.other, self.anew)
        self.instead.write(self.other, "2026-11-03T00:00:00Z")
        self.noted = noted

    def checkpoint(self, number, at, previous, since, upto, heads):
        return self.forger.checkpoint(number, at, previous, since, upto, upto - since, heads)

    def third(self, previous):
        heads = [self.instead.head, self.noted.head]
        return self.checkpoint(3, "2026-12-01T00:00:00Z", previous, 5, 7, heads)

    def report(self, begin, values, checkpoints):
        return self.forger.report(self.folder / "forged", self.window, begin, values, checkpoints)


FORKS = {
    # name: (what the third checkpoint names, where the report begins, the checkpoints in it; what is wrong)
    "put beside the others": (["anew"], 5, ["first", "second", "anew"], "does not go back to it"),
    "named too, and begun after it": (
        ["anew", "second"],
        5,
        ["first", "second", "anew"],
        "ask for a report from 2026-1",
    ),
    "named too, and begun before it": (["anew", "second"], 3, ["first", "second", "anew"], "missing_entry"),
    "left out": (["anew"], 5, ["first", "anew"], "written anew"),
}


@pytest.mark.parametrize("fork", FORKS)
def test_a_checkpoint_of_the_past_that_was_does_not_make_the_past_that_was_not_true(tmp_path, fork):
    named, begin, kept, wanted = FORKS[fork]
    made = Fork(tmp_path)
    third = made.third([getattr(made, name) for name in named])
    folder = made.report(begin, made.other[begin:7], [*(getattr(made, name) for name in kept), third])
    found = wrong(folder, None, made.kept)
    assert [one for all_ in found.values() for one in all_ if wanted in one], found
    assert "SHA-256" not in str(found)
    assert not any("manifest" in what or "were signed" in what or "signed by" in what for what in found)


def test_the_past_that_was_verifies(tmp_path):
    made = Fork(tmp_path)
    made.late.write(made.log, "2026-11-03T00:00:00Z")
    third = made.checkpoint(3, "2026-12-01T00:00:00Z", [made.second], 9, 11, [made.late.head, made.notes.head])
    folder = made.report(3, made.log[3:11], [made.first, made.second, third])
    assert wrong(folder, None, made.kept) == {}


def test_the_beginning_of_a_chain_cannot_be_dropped_while_its_head_stays(tmp_path):
    """Nothing before it is known, so only the number of entries that the checkpoint covers tells."""
    made = Fork(tmp_path)
    third = made.checkpoint(3, "2026-12-01T00:00:00Z", [made.second], 9, 10, [made.notes.head])
    folder = made.report(3, made.log[3:10], [made.first, made.second, third])
    assert wrong(folder, None, made.kept) == {}
    lines_ = (folder / "audit.ndjson").read_bytes().splitlines(keepends=True)
    for at in range(1, 5):
        made.forger.write(folder, "audit.ndjson", b"".join([lines_[0], *lines_[at + 1 :]]))
        assert ("wrong_count: checkpoint 2",) in wrong(folder, None, made.kept).values()


# --- after an earlier report -------------------------------------------------------------------------------------


def test_a_report_goes_on_from_the_checkpoint_of_an_earlier_one(place):
    first = report(place, "first")
    place.tail("cdr.pii", "--reveal", "--reason", "LATER")
    second = report(place, "second")
    assert wrong(second, None, first / "checkpoint.json") == {}
    checks = verify(second, key_of(place), first / "checkpoint.json")
    assert len(checks) == 8
    # and from its own
    assert wrong(second, None, second / "checkpoint.json") == {}
    done = place.call("evidence", "verify", second, "--after", first / "checkpoint.json")
    assert done.status == 0


def test_a_log_rolled_back_to_before_an_earlier_report_and_signed_anew_is_found(place):
    """Log, key store and all as they were before: whoever has everything can do that."""
    backup = place.folder / "backup"
    shutil.copytree(place.data, backup)
    key = key_of(place)
    first = report(place, "first")
    signing = place.within(lambda deployment: evidence.signing_key(deployment.store))
    shutil.rmtree(place.data)
    shutil.copytree(backup, place.data)

    async def same_key(deployment):
        deployment.store.put_secret(evidence.SIGNING_KEY, signing.private_bytes_raw())

    place.within(same_key)
    place.tail("cdr.pii", "--reveal", "--reason", "INSTEAD")
    second = report(place, "second")
    assert wrong(second, key) == {}  # by itself it is without a fault
    found = wrong(second, key, first / "checkpoint.json")
    assert found == {
        "the report goes on from the earlier checkpoint": (
            "the log does not have it any more: it was rolled back, or its past was written anew",
        )
    }
    assert place.call("evidence", "verify", second, "--after", first / "checkpoint.json").status == 1


def test_a_past_that_was_written_anew_is_found(place):
    first = report(place, "first")
    edit_audit(place, lambda values: [value.replace(b"CASE-1", b"CASE-0") for value in values])
    second = report(place, "second")
    assert wrong(second, None, first / "checkpoint.json")


def test_the_earlier_file_must_be_a_checkpoint_of_this_deployment_by_this_key(place, tmp_path):
    folder = report(place)
    for content in (
        b"",
        b"{}",
        b"x" * 100,
        (folder / MANIFEST).read_bytes(),
        (folder / "checkpoint.json").read_bytes().replace(b"1", b"2", 1),
    ):
        (tmp_path / "file").write_bytes(content)
        assert wrong(folder, None, tmp_path / "file") == {
            "the report goes on from the earlier checkpoint": ("the earlier file is no checkpoint signed by this key",)
        }


def test_a_report_that_begins_after_the_checkpoint_says_from_when_to_ask(place, monkeypatch):
    first = report(place, "first")
    now = evidence.time.time
    for hours in (2, 4, 6, 8):
        monkeypatch.setattr(evidence.time, "time", lambda hours=hours: now() + hours * 3600)
        place.tail("cdr.pii", "--reveal", "--reason", f"H-{hours}")
        place.within(evidence.checkpoint)
    since = datetime.fromtimestamp(now() + 7 * 3600, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    later = report(place, "later", since, "2099-01-01")
    assert wrong(later) == {}
    ((finding,),) = wrong(later, None, first / "checkpoint.json").values()
    asked = re.search(r"ask for a report from (\S+)$", finding)[1]
    asked_for = report(place, "asked-for", asked, "2099-01-01")
    assert wrong(asked_for, None, first / "checkpoint.json") == {}


def test_a_checkpoint_that_is_newer_than_the_report_is_said_to_be_so_and_nobody_is_accused(place):
    first = report(place, "first")
    place.tail("cdr.pii", "--reveal", "--reason", "LATER")
    second = report(place, "second")
    assert wrong(first, None, second / "checkpoint.json") == {
        "the report goes on from the earlier checkpoint": (
            "the checkpoint is newer than this report: verify a later report with it",
        )
    }


# --- the key -----------------------------------------------------------------------------------------------------


def test_the_key_is_made_for_the_privacy_officer_only_and_shown_to_everybody(place):
    place.configure(roles="roles.toml", **SHORT_LEASE)
    roles = place.folder / "roles.toml"
    roles.write_text('[[grant]]\nuser = "somebody"\nrole = "support"\naccounts = ["*"]\n')
    assert "only the privacy officer" in one_line(place.call("evidence", "key"))
    assert place.within(_signing) is None
    roles.unlink()
    place.configure(**SHORT_LEASE)
    made = place.call("evidence", "key")
    assert made.status == 0
    roles.write_text('[[grant]]\nuser = "somebody"\nrole = "support"\naccounts = ["*"]\n')
    place.configure(roles="roles.toml", **SHORT_LEASE)
    assert place.call("evidence", "key").out == made.out


async def _signing(deployment):
    return deployment.store.secret(evidence.SIGNING_KEY)


def test_the_key_is_the_same_each_time_and_its_private_half_leaves_the_store_nowhere(place):
    one, other = place.call("evidence", "key"), place.call("evidence", "key", "--json")
    assert one.out == other.lines[0]["pem"]
    assert other.lines[0]["fingerprint"] in one.err
    folder = report(place)
    assert (folder / "key.pem").read_text() == one.out
    private = place.within(lambda deployment: evidence.signing_key(deployment.store)).private_bytes_raw()
    for path in [*folder.iterdir(), *place.files()]:
        content = path.read_bytes()
        assert private not in content
        assert private.hex().encode() not in content
