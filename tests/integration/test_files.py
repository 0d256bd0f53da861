"""What is no file blocks nobody, wherever one is expected; and a file is there whole or not at all."""

import os
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from schemas.errors import InputInvalid, RegistryInvalid
from streams.files import open_file, replacing
from streams.state import registries
from streams.state.registries import Registries, Terms, load
from streams.state.snapshots import Snapshots
from tests.support.commands import PATIENCE_S, SHORT_LEASE, Place, eventually, one_line
from tests.support.records import PERSON

LINE = b"415,5550100\n"
TERMS = Terms(country="US", calling_code="1", as_of_s=1_790_000_000, now_s=1_790_000_500)


def bind(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


NO_FILES = {
    "pipe": os.mkfifo,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": os.mkdir,
}
no_file = pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)


def at_once(call):
    """Return what a call raised; one that blocks is left behind."""
    raised = []

    def run():
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it blocks"
    return raised[0] if raised else None


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    yield made
    made.close()


# --- reading --------------------------------------------------------------------------------------------------------


@no_file
@pytest.mark.parametrize("pipe", [False, True])
def test_what_is_no_file_is_refused_at_once(tmp_path, make, pipe):
    make(tmp_path / "x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    error = at_once(lambda: open_file(tmp_path / "x", pipe=pipe))
    assert isinstance(error, OSError)
    assert error.strerror in ("it is no file", "it is a pipe that nobody writes into", "Is a directory")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_pipe_that_somebody_writes_into_is_read_where_one_may_be(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writing = os.open(path, os.O_RDWR)
    os.write(writing, LINE)
    with open_file(path, pipe=True) as file:
        os.close(writing)
        assert file.read() == LINE
    # and one that was handed over open, as `<(…)` of a shell; it is waited for where its writer is slow
    reading, writing = os.pipe()
    os.write(writing, LINE)
    with open_file(f"/dev/fd/{reading}", pipe=True) as file:
        assert os.get_blocking(file.fileno())
        os.close(writing)
        assert file.read() == LINE
    os.close(reading)


@no_file
def test_a_command_says_in_one_line_that_what_it_was_given_is_no_file(place, make):
    # Given something else in the place of each file that a command reads
    wrong, right = place.folder / "x", place.folder / "list.txt"
    make(wrong)
    right.write_bytes(LINE)
    as_of = ("--as-of", datetime.now(UTC).date().isoformat())
    assert place.call("registry", "load", "us-dnc", right, *as_of).status == 0
    assert place.call("optout", "add", PERSON).status == 0

    def refused(*words):
        done = []
        assert at_once(lambda: done.append(place.call(*words))) is None
        said = one_line(done[0])
        return "internal error" not in said and ("read" in said or "--as-of" in said)

    # When / Then each command ends with one line
    assert refused("registry", "load", "us-dnc", wrong)
    assert refused("registry", "load", "us-dnc", wrong, *as_of)
    assert refused("registry", "load", "us-dnc", right, "--map", wrong, *as_of)
    assert refused("registry", "change", "us-dnc", "--add", wrong, *as_of)
    assert refused("publish", right, "--format", "mapped", "--map", wrong)
    assert refused("screen", "--file", wrong, "--account", "acme", "--channel", "sms", "--purpose", "marketing")
    assert refused("optout", "import", wrong)
    assert refused("exemption", "import", wrong)
    place.configure(policy="x")
    assert refused("policy", "show")
    place.config = wrong
    assert refused("policy", "show")


def test_a_list_comes_through_a_pipe_that_is_meant(place):
    words = ("registry", "load", "us-dnc", "/dev/stdin")
    assert "--as-of" in one_line(place.run(*words, data=LINE))
    done = place.run(*words, "--as-of", datetime.now(UTC).date().isoformat(), data=LINE)
    assert "1 numbers loaded" in done.out, done.err
    done = place.run("optout", "import", "/dev/stdin", data=f"number\n{PERSON}\n".encode())
    assert done.status == 0, done.err
    assert "1 lines read" in done.err


# --- the registries' folder -----------------------------------------------------------------------------------------


@no_file
def test_a_registry_that_is_no_file_is_damaged_and_the_one_before_serves(tmp_path, make):
    # Given a registry that serves
    folder, file = tmp_path / "registries", tmp_path / "list.txt"
    file.write_bytes(LINE)
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    old = found.get("us-dnc")
    # When something else takes the place of its file
    (folder / "us-dnc.bitmap").unlink()
    make(folder / "us-dnc.bitmap")
    ticks = iter(range(1, 1_000_000))

    def is_damaged():
        found.refresh(registries.REFRESH_S * next(ticks))
        return found.damaged() == ["us-dnc"]

    # Then workers go on with the one before, none starts, status says it, and a load puts it right if it can
    eventually(is_damaged, "damaged")
    assert found.get("us-dnc") is old
    assert isinstance(at_once(lambda: Registries(folder)), RegistryInvalid)
    (wrong,) = registries.survey(folder).values()
    assert wrong.message in ("cannot be read: it is no file", "cannot be read: Is a directory")
    error = at_once(lambda: load(folder, "us-dnc", [file], TERMS))
    assert isinstance(error, RegistryInvalid) if make is os.mkdir else error is None


@no_file
def test_a_load_that_finds_something_else_where_it_writes_is_not_kept_waiting(tmp_path, make):
    folder, file = tmp_path / "registries", tmp_path / "list.txt"
    folder.mkdir()
    file.write_bytes(LINE)
    make(folder / ".us-dnc.bitmap.new")
    error = at_once(lambda: load(folder, "us-dnc", [file], TERMS))
    if make is os.mkdir:
        assert isinstance(error, RegistryInvalid)
    else:
        assert error is None
        assert [path.name for path in folder.iterdir()] == ["us-dnc.bitmap"]


@no_file
def test_a_snapshot_that_is_no_file_is_none(tmp_path, make):
    snapshots = Snapshots(tmp_path, "store")
    make(snapshots.path("suppressions", 1))
    found = []
    assert at_once(lambda: found.append(snapshots.open("suppressions", 1))) is None
    assert found == [None]


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")
    with suppress(InputInvalid), replacing(path) as file:
        file.write(b"half")
        file.flush()
        raise InputInvalid
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("x", "before")]
    before = os.umask(0o777)
    try:
        with replacing(path) as file:
            file.write(b"after")
            assert path.read_text() == "before"
    finally:
        os.umask(before)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("x", "after")]
    assert path.stat().st_mode & 0o777 == 0o600
