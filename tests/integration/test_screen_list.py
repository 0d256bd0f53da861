"""`streamveil screen --file`: a campaign's list before it is sent, CSV in and CSV out."""

import csv
import errno
import io
import json
import os
import signal
import time
import tracemalloc
from datetime import UTC, datetime, timedelta

import pytest

from schemas.errors import InputInvalid
from streams.cli.common import new_file
from streams.screening import ADDED, CHUNK_ROWS, MAX_LINE, Question, Screening
from tests.support.commands import SHORT_LEASE, Place, one_line
from tests.support.records import DEFAULT_POLICY, OTHER, PERSON

GERMAN, BRITISH = "+4915112345679", "+447700900123"
QUIET = '[screening.quiet_hours]\nstart = "21:00"\nend = "08:00"\ncountries = ["US"]\nclause = "REG-3"\n'
ACME = '[[account]]\nid = "acme"\ndefault_region = "DE"\nclause = "INF-2"\n'
WORDS = ("--account", "acme", "--channel", "sms", "--purpose", "marketing")


@pytest.fixture
def place(tmp_path):
    """A deployment with one opt-out: that of PERSON."""
    made = Place(tmp_path, **SHORT_LEASE)
    assert made.call("optout", "add", PERSON).status == 0
    yield made
    made.close()


def screened(place, data, *words, status=0):
    """Return what came of a list: standard output as it is, and standard error."""
    file = place.folder / "list.csv"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    done = place.call("screen", "--file", file, *WORDS, *words)
    assert done.status == status, done.err
    return done


def rows(text):
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def reasons(place, data, *words):
    return [row["reason"] for row in rows(screened(place, data, *words).out)]


# --- the list -------------------------------------------------------------------------------------------------------


def test_a_list_comes_out_as_it_went_in_with_the_verdicts_behind_each_row(place):
    given = f'ref;Number;note\r\n1;{PERSON};"said ""stop"""\r\n2; {GERMAN} ;Müller\r\n'
    done = screened(place, given)
    assert done.out == (
        "ref;Number;note;verdict;reason;clause;defer_until;exemption\r\n"
        f'1;{PERSON};"said ""stop""";refused;opted_out;KAL-5;;\r\n'
        f"2; {GERMAN} ;Müller;cleared;;;;\r\n"
    )
    assert done.err == "screened 2: 1 cleared, 1 refused\n  opted_out  1\n"


def test_numbers_without_a_header_get_one(place):
    done = screened(place, f'{PERSON}\n\n{GERMAN}\nher "work", {OTHER}')
    assert [row[:3] for row in csv.reader(io.StringIO(done.out))] == [
        ["number", "verdict", "reason"],
        [PERSON, "refused", "opted_out"],
        ["", "refused", "no_recipient"],
        [GERMAN, "cleared", ""],
        [f'her "work", {OTHER}', "refused", "recipient_not_normalised"],
    ]


def test_an_empty_list_is_a_header(place):
    assert screened(place, b"").out == "number,verdict,reason,clause,defer_until,exemption\n"
    assert screened(place, "number,x\n").out == "number,x,verdict,reason,clause,defer_until,exemption\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("phone;name\n{}", "none of them is `number`"),
        ("phone\n{}", "none of them is `number`"),
        ("number,verdict\n{},x", "has a column verdict already"),
        ("number,Number\n{},x", "twice"),
        ("number,country,x,COUNTRY\n{},DE,x,DE", "twice"),
        ("\ufeffnumber\n{}".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_header_that_does_not_do_is_said_and_nothing_is_written(place, given, said):
    given = given if isinstance(given, bytes) else given.format(PERSON)
    done = screened(place, given, "--out", place.folder / "out.csv", status=1)
    assert said in one_line(done)
    assert PERSON[-6:] not in done.err
    assert not (place.folder / "out.csv").exists()


def test_a_broken_row_is_refused_whole_and_the_rest_goes_on(place):
    broken = [f'1,"{OTHER}', f"1,{OTHER},x", "1", f'1,{OTHER}"x"y,"', f"1,{OTHER}\rx", "x" * (MAX_LINE + 1)]
    given = "\n".join(["ref,number", *broken, f"2,{GERMAN}", "", f"3,{PERSON}"])
    found = rows(screened(place, given).out)
    assert [(row["verdict"], row["reason"]) for row in found] == [
        *[("refused", "not_understood")] * len(broken),
        ("cleared", ""), ("refused", "no_recipient"), ("refused", "opted_out"),
    ]  # fmt: skip
    assert [(row["ref"], row["number"]) for row in found[: len(broken)]] == [(text, "") for text in broken]
    assert all(None not in row and None not in row.values() for row in found)


def test_an_out_that_names_no_file_does_not_put_the_list_on_standard_output(place):
    done = screened(place, f"number\n{PERSON}\n", "--out", "", status=1)
    assert done.out == ""
    assert "FILE cannot be written" in done.err


def test_what_is_no_utf8_goes_out_as_it_came_in(place):
    given = b"name,number\nM\xfcller,%b\nM\xfcller,+49\xff151\n" % GERMAN.encode()
    (place.folder / "list.csv").write_bytes(given)
    done = place.call("screen", "--file", place.folder / "list.csv", *WORDS, "--out", place.folder / "out.csv")
    assert done.status == 0
    lines = (place.folder / "out.csv").read_bytes().split(b"\n")
    assert lines[1] == b"M\xfcller,%b,cleared,,,," % GERMAN.encode()
    assert lines[2] == b"M\xfcller,+49\xff151,refused,recipient_not_normalised,CAL-3,,"


# --- columns --------------------------------------------------------------------------------------------------------


def test_the_columns_of_a_row_go_before_what_is_asked_of_all(place):
    for words in (("--account", "acme", "--sender", "NEWS"), ("--account", "acme", "--campaign", "summer")):
        assert place.call("optout", "add", OTHER, *words).status == 0
    given = (
        "number,sender,campaign,child\n"
        f"{OTHER},NEWS,,\n{OTHER},OTHER,,\n{OTHER},,summer,no\n{OTHER},,winter,0\n{GERMAN},,,TRUE\n{OTHER},,,\n"
    )
    assert reasons(place, given) == ["opted_out", "", "opted_out", "", "child", ""]
    assert reasons(place, given, "--sender", "NEWS") == [
        "opted_out",
        "",
        "opted_out",
        "opted_out",
        "child",
        "opted_out",
    ]
    assert reasons(place, given, "--child") == ["child"] * 6


def test_a_national_number_is_read_as_of_the_account_or_the_rows_country(place):
    given = f"number,country\n0{PERSON[3:]},\n0{PERSON[3:]},de\n0{PERSON[3:]},FR\n"
    assert reasons(place, given)[1:] == ["opted_out", reasons(place, given)[2]]
    assert reasons(place, given)[0] != "opted_out"
    place.policy(f"{DEFAULT_POLICY}\n{ACME}")
    assert reasons(place, given) == ["opted_out"] * 3


@pytest.mark.parametrize("row", ["{},x,,,", "{},,x,,", "{},USA,,,", "{},,,,maybe", "{},,,%s," % ("c" * 129)])
def test_a_value_that_a_request_could_not_have_is_not_understood(place, row):
    given = f"number,country,time_zone,campaign,child\n{row.format(GERMAN)}\n{GERMAN},DE,Europe/Berlin,c,no\n"
    assert reasons(place, given) == ["not_understood", ""]


def test_quiet_hours_say_when_to_send_and_follow_the_rows_time_zone(place):
    place.policy(f"{DEFAULT_POLICY}\n{QUIET}")
    given = "number,time_zone\n+12125550100,\n+12125550100,Pacific/Auckland\n"
    found = rows(screened(place, given, "--at", "2026-11-21T04:00:00Z").out)
    assert [(row["reason"], row["defer_until"]) for row in found] == [
        ("quiet_hours", "2026-11-21T13:00:00Z"), ("", ""),
    ]  # fmt: skip
    assert found[0]["clause"] == "REG-3"
    done = place.call(
        "screen", "+12125550100", *WORDS, "--at", "2026-11-21T04:00:00Z", "--time-zone", "Pacific/Auckland"
    )
    assert done.lines[0]["verdict"] == "cleared"
    assert "--time-zone takes" in one_line(place.call("screen", PERSON, *WORDS, "--time-zone", "Mars/Phobos"))


# --- one function ---------------------------------------------------------------------------------------------------


def test_a_row_a_json_line_and_a_number_alone_get_one_answer(place):
    numbers = [PERSON, GERMAN, OTHER, BRITISH, "", "911", "12345", "somebody", "anna@example.com", "0151 12345678"]
    given = "\n".join(["number", *numbers]) + "\n"
    table = rows(screened(place, given).out)
    lines = screened(place, given, "--json").lines
    assert [line.pop("row") for line in lines] == list(range(1, len(numbers) + 1))
    for number, row, line in zip(numbers, table, lines, strict=True):
        (alone,) = place.call("screen", "-", *WORDS, data=number.encode()).lines
        assert {**alone, "not_after": None} == {**line, "not_after": None}
        assert (row["verdict"], row["reason"] or None) == (line["verdict"], line["reason"])
        assert row["clause"] == (line["rules"][-1]["clause"] if line["reason"] else "")
        assert row["number"] == number
        assert not number or number not in json.dumps(line)


def test_every_rule_that_was_asked_is_listed_in_order_with_its_clause(place):
    (line,) = place.call("screen", GERMAN, *WORDS).lines
    assert (line["verdict"], line["exemption"], line["confirmation"]) == ("cleared", None, False)
    assert all(set(rule) == {"rule", "clause", "outcome"} and rule["clause"] for rule in line["rules"])
    (line,) = place.call("screen", PERSON, *WORDS).lines
    assert line["rules"][-1] == {"rule": "suppression", "clause": "KAL-5", "outcome": "refuse"}
    assert line["confirmation"] is True  # it was given this minute
    (line,) = place.call(
        "screen", PERSON, *WORDS, "--at", f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%XZ}"
    ).lines
    assert (line["reason"], line["confirmation"]) == ("opted_out", False)


def test_a_row_of_an_exemption_says_which(place):
    (place.folder / "us.txt").write_text("212,5550100\n")
    assert place.call("registry", "load", "us-dnc", place.folder / "us.txt").status == 0
    words = ("--account", "acme", "--kind", "consent", "--given", "2026-01-01", "--until", "2030-01-01",
             "--evidence", "E-1")  # fmt: skip
    assert place.call("exemption", "add", "+12125550100", *words).status == 0
    done = screened(place, "number\n+12125550100\n+12125550101\n")
    assert [(row["verdict"], row["exemption"]) for row in rows(done.out)] == [("cleared", "consent"), ("cleared", "")]
    assert "cleared by an exemption  1\n" in done.err
    assert reasons(place, "number\n+12125550100\n", "--at", "2030-01-02T15:00:00Z") == ["registry_too_old"]


# --- where it goes --------------------------------------------------------------------------------------------------


def test_the_list_goes_to_a_new_file_that_nobody_else_reads(place):
    out = place.folder / "out.csv"
    done = screened(place, f"number\n{PERSON}\n", "--out", out)
    assert done.out == ""
    assert out.read_text().splitlines()[1] == f"{PERSON},refused,opted_out,KAL-5,,"
    assert out.stat().st_mode & 0o777 == 0o600
    assert "exists" in one_line(screened(place, f"number\n{PERSON}\n", "--out", out, status=1))
    assert "without --json" in one_line(screened(place, "x", "--out", place.folder / "no", "--json", status=1))
    assert "--out is for the list" in one_line(place.call("screen", PERSON, *WORDS, "--out", place.folder / "no"))


KILLED = """
import os, signal
from streams import screening
csv = screening.Screening.csv

def killed(self, file, advance):
    for count, chunk in enumerate(csv(self, file, advance)):
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk

screening.Screening.csv = killed
"""


def test_a_run_that_is_killed_leaves_no_list_that_looks_whole(place):
    # Given a list of more than two chunks
    given, out = place.folder / "list.csv", place.folder / "out.csv"
    given.write_text("number\n" + f"{GERMAN}\n" * (2 * CHUNK_ROWS))
    words = ("screen", "--file", given, *WORDS, "--out", out)
    # When it is screened by a process that is killed half-way
    assert place.run(*words, sabotage=KILLED).status == -signal.SIGKILL
    # Then there is no list, and what was written of it is private and is not taken for one
    part = place.folder / "out.csv.part"
    assert not out.exists()
    assert part.stat().st_mode & 0o777 == 0o600
    assert "delete FILE.part" in one_line(place.call(*words))
    assert not out.exists()
    # and without it the same command makes the list
    part.unlink()
    assert place.call(*words).status == 0
    assert len(rows(out.read_text())) == 2 * CHUNK_ROWS
    assert not part.exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_while_a_list_is_made_is_not_lost(tmp_path, monkeypatch, links):
    def without(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:  # as on some file systems
        monkeypatch.setattr(os, "link", without)
    out = tmp_path / "out.csv"
    with pytest.raises(InputInvalid, match="exists"), new_file(str(out)):
        out.write_text("theirs")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.csv", "theirs")]
    out.unlink()
    with new_file(str(out)) as file:
        file.write("mine")
        assert not out.exists()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.csv", "mine")]


@pytest.mark.parametrize("name", ["", "folder/", "none/out.csv"])
def test_a_name_that_can_be_no_file_is_refused_before_anything_is_done(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputInvalid, match="cannot be written"), new_file(name):
        raise AssertionError
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_list_may_come_from_standard_input(place):
    done = place.call("screen", "--file", "-", *WORDS, data=f"number\n{PERSON}".encode())
    assert done.out.splitlines()[1:] == [f"{PERSON},refused,opted_out,KAL-5,,"]


def test_no_number_is_in_anything_but_the_list(place):
    canary = "+493012345987"
    given = (
        f'number,sender,country\n{canary},{canary},DE\n"{canary}\n{canary},{canary},{canary}\n{canary},x,Y,{canary}\n'
    )
    (place.folder / "list.csv").write_text(given)
    for words in ((), ("--json",), ("--out", place.folder / "out.csv")):
        done = place.run("screen", "--file", place.folder / "list.csv", *WORDS, *words)
        assert done.status == 0
        assert canary[1:] not in done.err
        assert words == () or canary[1:] not in done.out
    assert place.ends("audit") == 0
    for file in place.files():
        assert canary[1:].encode() not in file.read_bytes(), file
    assert canary not in repr(Question(canary, canary, canary, canary))


def test_a_long_list_is_read_as_it_is_written_and_no_row_is_lost(place):
    # Given more rows than a chunk or a block holds, and a file that counts how much was asked for at once
    count = 20_000
    numbers = [f"+1212{n:07}" for n in range(2_000_000, 2_000_000 + count)]
    given = "number,n\n" + "".join(f"{number},{n}\n" for n, number in enumerate(numbers))

    class File(io.BytesIO):
        largest = 0

        def read(self, size=-1):
            self.largest = max(self.largest, size)
            assert size > 0
            return super().read(size)

    async def screen(deployment):
        file, seen = File(given.encode()), []
        screening = Screening(deployment, Question("acme", "sms", "marketing"), int(time.time()))
        await screening.ready()
        first = next(chunks := screening.csv(file, seen.append))
        assert file.tell() < len(given)
        return first + b"".join(chunks), sum(seen), screening.counts

    out, seen, counts = place.within(screen)
    assert [row["n"] for row in rows(out.decode())] == [str(n) for n in range(count)]
    assert (seen, counts.total()) == (len(given), count)
    assert ADDED == ("verdict", "reason", "clause", "defer_until", "exemption")


def test_a_line_without_an_end_takes_no_memory(place):
    class Endless(io.RawIOBase):
        """40 MB of ones, and a row behind."""

        left = 40 << 20

        def read(self, size=-1):
            self.left -= size
            return b"1" * size if self.left > 0 else f"\n{PERSON}".encode() if self.left > -size else b""

    async def screen(deployment):
        screening = Screening(deployment, Question("acme", "sms", "marketing"), int(time.time()))
        await screening.ready()
        tracemalloc.start()
        try:
            sizes = [len(chunk) for chunk in screening.csv(Endless(), lambda _: None)]
            return sum(sizes), tracemalloc.get_traced_memory()[1], screening.counts
        finally:
            tracemalloc.stop()

    size, peak, counts = place.within(screen)
    assert size < 2 * MAX_LINE * 4
    assert peak < 8 << 20
    assert counts == {"not_understood": 1, "opted_out": 1}
