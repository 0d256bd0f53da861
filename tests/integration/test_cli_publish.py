import asyncio
import fcntl
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from schemas.catalog import TRAFFIC, TRAFFIC_CDR, partition_for
from streams.cli.main import main
from streams.log.sqlite import SqliteLog
from streams.publish import CHUNK_RECORDS, route

CANARY = "+14155550177"
MAPPING = """
[file]
delimiter = ","
header = true

[constants]
type = "cdr"
channel = "voice"
account_id = "acme"
direction = "mt"

[fields]
record_id = { line = true, prefix = "row-" }
occurred_at = { column = "at", layout = "rfc3339" }
sender = "from"
recipient = "to"
"""
# Runs the real command, and kills its own process with -9 near the append number argv[1], argv[2] ms later.
KILLED = """
import os, signal, sys, threading, time
from streams.cli.main import main
from streams.log.sqlite import SqliteLog

at, late_ms, count, append = int(sys.argv[1]), float(sys.argv[2]), 0, SqliteLog.append

def kill():
    time.sleep(late_ms / 1000)
    os.kill(os.getpid(), signal.SIGKILL)

async def counted(self, *args):
    global count
    await append(self, *args)
    count += 1
    if count == at:
        threading.Thread(target=kill).start() if late_ms else kill()

SqliteLog.append = counted
sys.exit(main(sys.argv[3:]))
"""


def record(number, **fields):
    common = {"v": 1, "type": "request", "channel": "sms", "record_id": f"r{number}", "account_id": "acme",
              "direction": "mt", "occurred_at": "2026-11-21T12:00:00Z", "sender": "ACME",
              "recipient": f"+1415555{number % 10_000:04}", "purpose": "otp"}  # fmt: skip
    return {**common, **fields}


def ndjson(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


@pytest.fixture
def log_path(tmp_path):
    return tmp_path / "data" / "log.db"


@pytest.fixture
def publish(log_path):
    def run(*args):
        return main(["publish", *map(str, args), "--log", f"sqlite:///{log_path}"])

    return run


def command(log_path, *args, **options):
    line = [sys.executable, "-m", "streams.cli", "publish", *map(str, args), "--log", f"sqlite:///{log_path}"]
    return subprocess.run(line, capture_output=True, check=False, timeout=60, **options)


def stored(log_path):
    """Return stream → messages, in the order of partitions and offsets."""

    async def read():
        log = SqliteLog.open(log_path, create=False)
        found = {}
        for stream in (TRAFFIC, TRAFFIC_CDR):
            found[stream] = []
            for partition, end in enumerate(await log.end_offsets(stream)):
                at = 0
                while at < end:
                    page = await log.read(stream, partition, at, 5000)
                    found[stream] += page
                    at = page[-1].offset + 1
        await log.close()
        return found

    return asyncio.run(read())


def ids(log_path):
    return Counter(json.loads(one.value)["record_id"] for found in stored(log_path).values() for one in found)


# --- where records go ----------------------------------------------------------------------------------------


def test_who_is_waiting_goes_to_traffic_and_finished_communications_to_traffic_cdr(tmp_path, log_path, publish):
    # Given one record of each kind, about one person
    person = "+14155550123"
    mo = {"direction": "mo", "sender": person, "recipient": "12345", "purpose": None}
    lines = [
        record(1, recipient="1 (415) 555-0123"),
        record(2, type="cdr", recipient="(415) 555-0123", country="US"),
        record(3, type="cdr", **mo),
        record(4, type="preference", action="opt_out", **(mo | {"direction": "mt"})),
        {"v": 1, "type": "invoice"},
    ]
    # When
    assert publish(ndjson(tmp_path / "in.ndjson", lines)) == 0
    # Then each lies, byte for byte, in the partition of that person
    found = stored(log_path)
    assert [json.loads(one.value) for one in found[TRAFFIC_CDR]] == [lines[1]]
    waiting = [one for one in found[TRAFFIC] if one.key is not None]
    assert [json.loads(one.value)["record_id"] for one in waiting] == ["r1", "r3", "r4"]
    assert {one.key for one in (*waiting, *found[TRAFFIC_CDR])} == {person.encode()}
    assert {one.partition for one in (*waiting, *found[TRAFFIC_CDR])} == {partition_for(person.encode(), 4)}
    unknown = [one for one in found[TRAFFIC] if one.key is None]
    assert [one.value for one in unknown] == [json.dumps(lines[4]).encode()]
    assert unknown[0].partition == partition_for(unknown[0].value, 4)


@pytest.mark.parametrize(
    "value", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"sender":5}', b'{"sender":"\\ud800","direction":"mo"}', b"nan"]
)
def test_what_is_no_record_has_a_place_too(value):
    assert route(value).stream == TRAFFIC
    assert route(value).key is None


def test_publishing_needs_no_key_and_makes_none(tmp_path, publish):
    publish(ndjson(tmp_path / "in.ndjson", [record(1)]))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "in.ndjson", "log-traffic.db", "log.db"]


# --- what cannot be parsed -----------------------------------------------------------------------------------


def test_a_line_that_cannot_be_parsed_is_published_as_it_is_and_reported_by_number(tmp_path, log_path, publish, capsys):
    # Given
    file = tmp_path / "in.ndjson"
    file.write_bytes(json.dumps(record(1)).encode() + b"\r\n\n" + f"{{{CANARY}".encode() + b"\xff\r\n[1]\n")
    # When
    assert publish(file, "--json") == 0
    # Then
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"{file}:3: not_json; published as opaque for quarantine",
        f"{file}:4: not_json; published as opaque for quarantine",
    ]
    assert json.loads(told.out) == {
        "file": str(file), "resumed_at_line": None, "published": 3, "requests": 1, "cdrs": 0, "preferences": 0,
        "unrecognised": 0, "opaque": 2,
    }  # fmt: skip
    opaque = [one for one in stored(log_path)[TRAFFIC] if one.key is None]
    assert {one.value for one in opaque} == {f"{{{CANARY}".encode() + b"\xff", b"[1]"}


def test_after_a_hundred_lines_the_rest_is_counted(tmp_path, log_path, publish, capsys):
    file = tmp_path / "in.ndjson"
    file.write_text("x\n" * 140)
    assert publish(file) == 0
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert lines[99:] == [
        f"{file}:100: not_json; published as opaque for quarantine",
        f"{file}: 40 lines more could not be parsed; published as opaque for quarantine",
        f"{file}: 140 published (140 opaque)",
    ]
    assert sum(map(len, stored(log_path).values())) == 140


def test_a_record_of_two_megabytes_passes_through_whole(tmp_path, log_path, publish):
    big = json.dumps(record(1, content="x" * 2_000_000)).encode()
    file = tmp_path / "in.ndjson"
    file.write_bytes(big + b"\n" + json.dumps(record(2)).encode())
    assert publish(file) == 0
    assert {one.value for one in stored(log_path)[TRAFFIC]} == {big, json.dumps(record(2)).encode()}


# --- resuming --------------------------------------------------------------------------------------------------


def killed(log_path, at, late_ms, *args):
    """Run the command until it kills itself, or ends before that; return its exit status."""
    line = [sys.executable, "-c", KILLED, str(at), str(late_ms), "publish", *map(str, args)]
    return subprocess.run(
        [*line, "--log", f"sqlite:///{log_path}"], capture_output=True, check=False, timeout=60
    ).returncode


def test_killed_again_and_again_each_record_is_published_once(tmp_path, log_path):
    # Given
    count = 12 * CHUNK_RECORDS + 5
    file = ndjson(tmp_path / "in.ndjson", map(record, range(count)))
    points = random.Random(20261121)
    # When: killed at once after the first append, then at random moments, then left alone
    assert killed(log_path, 1, 0, file) == -9
    for _ in range(4):
        killed(log_path, points.randint(1, 2), points.random() * 8, file)
    last = command(log_path, file, "--json")
    # Then
    assert last.returncode == 0
    assert b"resuming at line" in last.stderr
    published = ids(log_path)
    assert published == Counter(f"r{number}" for number in range(count))
    assert json.loads(last.stdout)["resumed_at_line"] - 1 + json.loads(last.stdout)["published"] == count


def test_a_mapped_file_is_gone_on_with_behind_its_header(tmp_path, log_path):
    # Given records that are named after their lines, one of them over two lines
    mapping, file = tmp_path / "map.toml", tmp_path / "calls.csv"
    mapping.write_text(MAPPING)
    rows = [f"2026-11-21T12:00:00Z,+1415555{n % 10_000:04},+442079460000\n" for n in range(CHUNK_RECORDS + 100)]
    rows[3] = '"2026-11-21T12:00:00Z","+14155550003","+44207\n946"\n'
    file.write_text("at,from,to\n" + "".join(rows))
    # When
    assert killed(log_path, 1, 0, file, "--map", mapping) == -9
    again = command(log_path, file, "--map", mapping)
    # Then
    assert again.returncode == 0
    assert f"resuming at line {CHUNK_RECORDS + 3}".encode() in again.stderr
    assert set(ids(log_path)) == {f"row-{line}" for line in range(2, len(rows) + 3) if line != 6}


def test_a_file_that_changed_before_the_point_of_interruption_is_refused(tmp_path, log_path, publish, capsys):
    # Given
    records = [record(number) for number in range(CHUNK_RECORDS + 10)]
    file = ndjson(tmp_path / "in.ndjson", records)
    assert killed(log_path, 1, 0, file) == -9
    before = ids(log_path)
    # When
    ndjson(file, [record(CHUNK_RECORDS + 99), *records[1:]])
    # Then
    assert publish(file) == 1
    told = capsys.readouterr().err
    assert "the file has changed since publishing it was interrupted" in told
    assert "--restart" in told
    assert ids(log_path) == before
    # and also if it is shorter now
    ndjson(file, records[:5])
    assert publish(file) == 1
    # but not if it was asked for
    assert publish(file, "--restart") == 0
    assert sum(ids(log_path).values()) == CHUNK_RECORDS + 5


def test_a_file_that_only_grew_is_gone_on_with(tmp_path, log_path, publish):
    records = [record(number) for number in range(CHUNK_RECORDS + 10)]
    file = ndjson(tmp_path / "in.ndjson", records[:-5])
    assert killed(log_path, 1, 0, file) == -9
    ndjson(file, records)
    assert publish(file) == 0
    assert ids(log_path) == Counter(one["record_id"] for one in records)


def test_a_finished_file_is_new_traffic_when_it_is_published_again(tmp_path, log_path, publish):
    file = ndjson(tmp_path / "in.ndjson", [record(1)])
    assert [publish(file), publish(file)] == [0, 0]
    assert ids(log_path) == {"r1": 2}


def test_a_file_is_published_by_one_process_at_a_time(tmp_path, publish, capsys):
    file = ndjson(tmp_path / "in.ndjson", [record(1)])
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert publish(file) == 1
    assert "is being published by another process" in capsys.readouterr().err


# --- standard input --------------------------------------------------------------------------------------------


def test_standard_input_is_published(log_path):
    done = command(log_path, "-", "--format", "ndjson", "--json", input=json.dumps(record(1)).encode())
    assert done.returncode == 0
    assert json.loads(done.stdout)["published"] == 1
    assert ids(log_path) == {"r1": 1}


def test_what_has_arrived_is_published_while_more_is_waited_for(log_path):
    # Given a gateway that writes one record and keeps the pipe open
    line = [sys.executable, "-m", "streams.cli", "publish", "-", "--format", "ndjson"]
    with subprocess.Popen(
        [*line, "--log", f"sqlite:///{log_path}"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdin.write(json.dumps(record(1)).encode() + b"\n")
        process.stdin.flush()
        # Then it is in the log before the pipe is closed
        deadline = time.monotonic() + 50
        while time.monotonic() < deadline and not (log_path.exists() and _waits(log_path)):
            time.sleep(0.02)
        assert ids(log_path) == {"r1": 1}
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(50) == 0


def _waits(log_path):
    try:
        return any(stored(log_path).values())
    except Exception:  # it is being made this moment
        return False


# --- usage -----------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_file_is_not_repeated_and_nothing_is_published(tmp_path, log_path, publish, capsys):
    file = ndjson(tmp_path / "in.ndjson", [record(1)])
    for args in ([file, CANARY], [file, "--map", CANARY], [file, "--format", CANARY], [file, "--restart=" + CANARY]):
        try:
            status = publish(*args)
        except SystemExit as wrong_usage:
            status = wrong_usage.code
        assert status in (1, 2)
    told = capsys.readouterr()
    assert CANARY not in told.out + told.err
    assert not log_path.exists()


def test_a_file_whose_format_cannot_be_told_is_refused_with_the_choices(tmp_path, publish, capsys):
    file = tmp_path / "calls.txt"
    file.write_text("x")
    assert publish(file) == 1
    assert "pass --format ndjson|asterisk" in capsys.readouterr().err


def test_a_folder_is_one_clear_line(tmp_path, publish, capsys):
    folder = tmp_path / "in.ndjson"
    folder.mkdir()
    assert publish(folder) == 1
    assert capsys.readouterr().err == f"streamveil: cannot be read: Is a directory (file={folder})\n"


def test_an_empty_file_publishes_nothing(tmp_path, log_path, publish):
    file = Path(tmp_path / "in.ndjson")
    file.touch()
    assert publish(file) == 0
    assert not any(stored(log_path).values())
