"""The command line itself: standard streams, wrong usage, and arguments that may be somebody's number."""

import subprocess
import sys

import pytest

from schemas.errors import KeysBusy
from streams.cli import keys
from tests.support.commands import SHORT_LEASE, Place, one_line
from tests.support.records import PERSON, sms_request

DIGITS = PERSON[1:]


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    made.publish(sms_request())
    made.work()
    yield made
    made.close()


def shell(place, line, **variables):
    """Run `streamveil …` in a shell, for what only a shell does: (status, standard output, standard error)."""
    command = f'streamveil() {{ "{sys.executable}" -m streams.cli "$@" --log "{place.url}"; }}; set -o pipefail; {line}'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, check=False, timeout=60, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path)), **variables},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# --- standard streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["optout check - <&-", "publish --format ndjson - <&-", "optout import - <&-"])
def test_a_closed_standard_input_is_said_in_one_line(place, line):
    status, out, err = shell(place, f"streamveil {line}")
    assert (status, out) == (1, "")
    assert err == "streamveil: standard input is closed, and - is to be read from it\n"


def test_with_a_closed_standard_output_nothing_is_done(place):
    status, _, err = shell(place, f"streamveil optout add {PERSON} >&-")
    assert (status, err) == (1, "streamveil: standard output is closed; nothing was done\n")
    assert place.ends("suppressions") == 0


def test_a_closed_standard_error_does_not_put_errors_into_the_output(place):
    assert shell(place, "streamveil keys rotate nothing 2>&-") == (1, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["keys status", "keys status --json", "tail verdicts", "--help"])
def test_an_output_that_cannot_be_written_is_not_taken_for_the_log(place, words, unbuffered):
    line = "streamveil() { %s; }; streamveil > /dev/full"
    program = f'"{sys.executable}" -m streams.cli {words}' + ("" if words == "--help" else f' --log "{place.url}"')
    status, _, err = shell(place, line % program, PYTHONUNBUFFERED=unbuffered)
    assert status == 1
    assert err.startswith("streamveil: standard output cannot be written: No space left on device;")
    assert err.count("\n") == 1


def test_a_reader_that_ends_early_is_no_error_to_be_told(place):
    for unbuffered in ("", "1"):
        status, _, err = shell(place, "streamveil tail verdicts | true", PYTHONUNBUFFERED=unbuffered)
        assert (status, err) in ((0, ""), (1, ""))


# --- a number on standard input ------------------------------------------------------------------------------------


def test_one_number_is_read_from_standard_input_whatever_is_around_it(place):
    for data in (PERSON, f"{PERSON}\n", f"\n  {PERSON}\r\n\n", f"\ufeff{PERSON}\n"):
        done = place.call("optout", "add", "-", data=data.encode())
        assert done.status == 0, done.err
    (found,) = place.call("optout", "check", PERSON, "--json").lines
    assert found["opted_out"] is True


def test_a_second_number_on_standard_input_is_not_left_out_silently(place):
    done = place.call("optout", "add", "-", data=f"{PERSON}\n\n+14155550109\n".encode())
    assert "more than one line" in one_line(done)
    assert place.ends("suppressions") == 0


# --- wrong usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "usage", "told"),
    [
        (("keys", "status", "--jsno"), "usage: streamveil keys status ", "takes no option --jsno; see --help"),
        (("keys", "status", f"--jsno={DIGITS}"), "usage: streamveil keys status ", "takes no option --jsno; see"),
        (("keys", "status", f"--{DIGITS}"), "usage: streamveil keys status ", "no more arguments than the usage shows"),
        (("keys", "status", PERSON), "usage: streamveil keys status ", "no more arguments than the usage shows"),
        (("optout", "check", PERSON, PERSON), "usage: streamveil optout check ", "no more arguments than the usage"),
        (("optout", "check"), "usage: streamveil optout check ", "arguments are required: NUMBER"),
        (("keys", PERSON), "usage: streamveil keys ", "the value is not one that it takes"),
        ((PERSON,), "usage: streamveil [-h]", "the value is not one that it takes"),
    ],
)
def test_wrong_usage_shows_the_usage_of_the_command_at_fault_and_nothing_that_may_be_a_number(
    place, words, usage, told
):
    done = place.call(*words)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(usage)
    assert told in done.err.splitlines()[-1]
    assert DIGITS not in done.err


@pytest.mark.parametrize("option", ["--config", "--log"])
@pytest.mark.parametrize("form", ["{}", "sqlite:///{}", "sqlite:////{}/log.db", "/{}/streamveil.toml"])
def test_a_number_that_slipped_into_an_option_is_not_repeated(place, option, form):
    for spelling in (PERSON, "+1 415 555 0101", "+1-415-555-0101"):
        told = shell(place, f"'{sys.executable}' -m streams.cli keys status {option} '{form.format(spelling)}'")
        assert told[0] == 1
        assert spelling not in told[2]
        assert "internal error" not in told[2]


# --- errors that pass ------------------------------------------------------------------------------------------------


def test_an_error_that_passes_says_to_give_the_command_again_and_does_not_deny_what_was_done(place, monkeypatch):
    def busy(_):
        raise KeysBusy("destroyed, but a reader keeps the write-ahead file; destroy again to finish")

    monkeypatch.setattr(keys, "load", busy)
    line = one_line(place.call("keys", "status"))
    assert "nothing was done" not in line
    assert line.endswith("destroy again to finish; it stopped there: give the command again once that is over\n")
