"""`streamveil demo` as a user runs it: it adds up, says so, shows nobody's data, and what it prints next works."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest

import streams.cli.demo
import streams.demo.demo
from processors.pipeline import End
from streams.cli.main import main
from streams.demo.demo import FOLDER, MARKER
from streams.demo.traffic import ACCOUNTS, HOUR_S, generate

ROOT = Path(__file__).parents[2]
RECORDS = 1500
SEED = 5
ASKED = ("--records", str(RECORDS), "--seed", str(SEED))


def streamveil(cwd: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "streams.cli", *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def counts(summary: dict) -> dict:
    """Return what of a summary is the same at any time: no instants, no keys of so many days, no speed."""
    same = ("records", "seed", "made", "ends", "anonymous_only", "refused", "quarantined", "checks", "adds_up")
    return {name: summary[name] for name in same} | {
        "streams": {death["stream"]: death["records"] for death in summary["deaths"]}
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run it twice in one folder: as people see it, then as JSON."""
    cwd = tmp_path_factory.mktemp("user")
    seen = streamveil(cwd, "demo", *ASKED)
    asked = streamveil(cwd, "demo", *ASKED, "--json")
    return SimpleNamespace(cwd=cwd, seen=seen, asked=asked, summary=json.loads(asked.stdout or "{}"))


# --- the summary ----------------------------------------------------------------------------------------------


def test_it_ends_well_and_says_that_it_adds_up(ran):
    assert (ran.seen.returncode, ran.asked.returncode) == (0, 0), ran.seen.stderr + ran.asked.stderr
    assert "adds up: yes" in ran.seen.stdout


def test_json_is_one_object_on_one_line_and_nothing_else(ran):
    assert ran.asked.stdout.count("\n") == 1
    assert ran.summary["adds_up"] is True
    assert ran.summary["records"] == RECORDS


def test_every_record_ended_once_and_the_log_holds_as_many(ran):
    ends = {end["kind"]: end for end in ran.summary["ends"]}
    held = counts(ran.summary)["streams"]
    for end in ends.values():
        assert end["came_in"] == end["emit"] + end["refuse"] + end["quarantine"] + end["expired"]
    assert sum(end["came_in"] for end in ends.values()) == RECORDS == sum(ran.summary["made"].values())
    assert held["verdicts"] == ends["request"]["emit"] + ends["request"]["refuse"]
    assert held["cleared"] == ends["request"]["emit"]
    assert held["cdr.anonymous"] == ends["cdr"]["emit"]
    assert held["cdr.pii"] == ends["cdr"]["emit"] - ran.summary["anonymous_only"]
    assert held["quarantine"] == sum(ran.summary["quarantined"].values())
    assert sum(one["count"] for one in ran.summary["refused"]) == ends["request"]["refuse"]


def test_refusals_for_opt_outs_carry_the_codes_that_gateways_know(ran):
    codes = {one["reason"]: one["codes"] for one in ran.summary["refused"]}
    assert codes["opted_out"]["twilio"] == 21610
    assert "21610" in ran.seen.stdout


def test_it_says_when_each_stream_dies(ran):
    deaths = {death["stream"]: death for death in ran.summary["deaths"]}
    assert deaths["cdr.pii"]["latest"].endswith("-01T00:00:00Z")
    assert deaths["cdr.anonymous"]["latest"].endswith("-01-01T00:00:00Z")
    assert deaths["suppressions"]["latest"] is None
    for death in deaths.values():
        assert (death["soonest"] or "") <= (death["latest"] or "")
        assert (death["keys"] is None) == (death["stream"] in ("verdicts", "cdr.anonymous"))
        assert death["stream"] in ran.seen.stdout


def test_the_same_seed_ends_in_the_same_counts(ran, tmp_path):
    again = json.loads(streamveil(tmp_path, "demo", *ASKED, "--json").stdout)
    assert counts(again) == counts(ran.summary)


def test_neither_summary_nor_notes_show_anybodys_number_or_text(ran):
    brands = {account.brand for account in ACCOUNTS.values()}
    traffic = generate(RECORDS, SEED, int(time.time()) // HOUR_S * HOUR_S)
    secrets: set[str] = set()
    for value in traffic.values:
        try:
            record = orjson.loads(value)
        except orjson.JSONDecodeError:
            continue
        fields = ("content", "transcript", "display_name", "client_ip", "location", "recording_ref", "record_id")
        secrets |= {record[field] for field in fields if field in record}
        parties = (record.get("sender", ""), record.get("recipient", ""))
        secrets |= {party.removeprefix("+") for party in parties if party[:1] in "+("} - {""}
    secrets |= {line.replace(",", "") for line in traffic.registry}
    shown = f"{ran.seen.stdout}{ran.seen.stderr}{ran.asked.stdout}{ran.asked.stderr}"
    assert len(secrets) > RECORDS
    assert [len(secret) for secret in secrets - brands if secret in shown] == []


# --- what to try next -----------------------------------------------------------------------------------------


def paste(cwd: Path, command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, shell=True, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("who", "shows"),
    [("billing", '"billable_units"'), ("the privacy officer", '"revealed"'), ("a refused gateway", "21610")],
)
def test_each_command_it_prints_runs_as_it_stands_and_shows_something(ran, who, shows):
    command = ran.summary["next"][who]
    assert command in ran.seen.stdout
    result = paste(ran.cwd, command)
    assert (result.returncode, result.stderr) == (0, "")
    assert shows in result.stdout


def test_what_billing_sees_names_nobody(ran):
    result = paste(ran.cwd, ran.summary["next"]["billing"])
    assert '"recipient"' not in result.stdout
    assert '"record_id"' not in result.stdout


def test_the_program_is_named_as_it_was_started(monkeypatch):
    for typed, shown in ((".venv/bin/streamveil", ".venv/bin/streamveil"), ("/a b/streamveil", "'/a b/streamveil'")):
        monkeypatch.setattr(sys, "argv", [typed, "demo"])
        assert streams.cli.demo._program() == shown


# --- where it runs --------------------------------------------------------------------------------------------


def test_log_keys_and_key_service_lie_apart_as_in_any_deployment(ran):
    folder = ran.cwd / FOLDER
    assert (folder / "data" / "log.db").is_file()
    assert (folder / "data" / "keys.db").is_file()
    assert (folder / "streamveil-kms").is_dir()
    assert (folder / "policy.toml").is_file()


def test_the_registry_file_with_its_numbers_is_not_left_behind(ran):
    registry = generate(RECORDS, SEED, 0).registry
    for path in ran.cwd.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(line.encode() in content for line in registry[:20]), path.name


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "link"])
def test_what_no_demo_has_made_is_not_deleted(tmp_path, monkeypatch, capsys, what):
    # Given something of the user's under the demo's name
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "work.txt").write_text("work")
    (kept / MARKER).write_text("") if what == "link" else None
    if what == "file":
        FOLDER.write_text("work")
    elif what == "link":
        FOLDER.symlink_to(kept)
    elif what == "folder":
        kept.rename(FOLDER)
        kept = FOLDER
    else:
        FOLDER.mkdir()
    # When a demo is run, it refuses in one line
    assert main(["demo", "--records", "10"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    # Then all is as it was
    assert (kept / "work.txt").read_text() == "work"
    assert FOLDER.exists()
    assert not (tmp_path / FOLDER / "data").exists()


def test_a_log_that_holds_records_is_refused_and_stays_as_it_is(ran):
    before = (ran.cwd / FOLDER / "data" / "log.db").read_bytes()
    result = streamveil(ran.cwd, "demo", "--log", f"sqlite:///{FOLDER}/data/log.db", *ASKED)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert (ran.cwd / FOLDER / "data" / "log.db").read_bytes() == before


def test_a_registry_that_is_loaded_is_not_replaced(tmp_path):
    # Given a deployment without traffic, but with a list
    list_file = tmp_path / "list.txt"
    list_file.write_text("212,5550123\n")
    log = ("--log", "sqlite:///own/log.db")
    assert streamveil(tmp_path, "registry", "load", "us-dnc", str(list_file), *log).returncode == 0
    # Then no demo runs in it
    assert streamveil(tmp_path, "demo", *ASKED, *log).returncode == 1


def test_on_a_log_of_its_own_it_runs_under_the_same_policy_and_prints_that_log(ran, tmp_path):
    log = "sqlite:///some where/log.db"
    result = streamveil(tmp_path, "demo", *ASKED, "--json", "--log", log)
    summary = json.loads(result.stdout)
    assert counts(summary) == counts(ran.summary)
    assert not (tmp_path / FOLDER).exists()
    for command in summary["next"].values():
        pasted = paste(tmp_path, command)
        assert pasted.returncode == 0
        assert pasted.stdout


# --- when it does not add up ----------------------------------------------------------------------------------


def test_a_lost_record_is_told_and_fails(tmp_path, monkeypatch, capsys):
    # Given a worker that reports one record less than it was given
    run_one = streams.demo.demo.run_one

    async def forgetful(*args, **options):
        outcomes = await run_one(*args, **options)
        one = next(outcome for outcome in outcomes if outcome.end is End.EMIT and outcome.kind == "request")
        outcomes[one] -= 1
        return outcomes

    monkeypatch.setattr(streams.demo.demo, "run_one", forgetful)
    monkeypatch.chdir(tmp_path)
    # When the demo is run, then it says so and fails
    assert main(["demo", "--records", "60"]) == 1
    shown = capsys.readouterr().out
    assert "adds up: NO" in shown
    came_in, ended = re.search(r"request: came in = ended: expected (\d+), found (\d+)", shown).groups()
    assert int(came_in) == int(ended) + 1


def test_a_run_too_short_for_an_opt_out_prints_commands_that_work_too(tmp_path):
    summary = json.loads(streamveil(tmp_path, "demo", "--records", "20", "--json").stdout)
    assert "opted_out" not in [one["reason"] for one in summary["refused"]]
    assert all(paste(tmp_path, command).stdout for command in summary["next"].values())


def test_wrong_counts_are_wrong_usage(capsys):
    for count in ("0", "-5", "many", "10000001"):
        with pytest.raises(SystemExit, match="2"):
            main(["demo", "--records", count])
        assert count not in capsys.readouterr().err.splitlines()[-1].split(" ")
