import argparse
import json
import os
import stat
import threading
import time

import pytest

from processors.screen.registry import BitmapRegistry
from schemas.errors import InputInvalid, RegistryInvalid
from streams.cli import registry as command
from streams.state.registries import Registries, load

LISTED, OTHER = "+14155550100", "+12125550199"
FIELDS = {"country": "US", "calling_code": "1", "as_of_s": 1_790_000_000, "now_s": 1_790_000_500}


def write(path, *numbers, end="\n"):
    path.write_bytes("".join(f"{n[2:5]},{n[5:]}{end}" for n in numbers).encode())
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "registries"


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "list.txt", LISTED)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def everything_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- load and serve ----------------------------------------------------------------------------------------


def test_what_was_loaded_is_served(folder, tmp_path, file):
    # Given two files, one with the other line end and a blank line
    second = write(tmp_path / "more.txt", OTHER, end="\r\n\r\n")
    # When
    header = load(folder, "us-dnc", [file, second], **FIELDS)
    registries = Registries(folder)
    # Then
    assert (header.count, header.as_of, header.loaded_at) == (2, 1_790_000_000, 1_790_000_500)
    assert registries.names() == ["us-dnc"]
    assert registries.get("us-dnc").header == header
    assert registries.as_of("us-dnc") == 1_790_000_000
    assert registries.lists("us-dnc", LISTED)
    assert registries.lists("us-dnc", OTHER)
    assert not registries.lists("us-dnc", "+14155550101")


def test_a_registry_that_is_not_loaded_has_no_age_and_lists_everybody(folder):
    registries = Registries(folder)  # which need not exist
    assert registries.names() == []
    assert registries.get("us-dnc") is None
    assert registries.as_of("us-dnc") is None
    assert registries.lists("us-dnc", LISTED)


def test_files_are_private_whatever_the_umask(folder, file):
    before = os.umask(0)
    try:
        load(folder, "us-dnc", [file], **FIELDS)
    finally:
        os.umask(before)
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert (mode(folder), mode(folder.parent), mode(folder / "us-dnc.bitmap")) == (0o700, 0o700, 0o600)


def test_a_leftover_of_a_killed_load_is_replaced_and_private(folder, file):
    # Given what a load that was killed while writing leaves, with another mode
    folder.mkdir(parents=True)
    leftover = folder / ".us-dnc.bitmap.new"
    leftover.write_bytes(b"half" * 2_000_000)
    leftover.chmod(0o644)
    assert Registries(folder).names() == []
    # When / Then
    load(folder, "us-dnc", [file], **FIELDS)
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert mode(folder / "us-dnc.bitmap") == 0o600
    assert Registries(folder).lists("us-dnc", LISTED)


def test_a_swap_while_open_is_seen_by_the_next_refresh(folder, tmp_path, file):
    # Given a registry in use
    load(folder, "us-dnc", [file], **FIELDS)
    registries = Registries(folder)
    registries.refresh(100.0)
    old = registries.get("us-dnc")
    # When it is replaced by a list without the number
    load(folder, "us-dnc", [write(tmp_path / "new.txt", OTHER)], **FIELDS)
    # Then the old one answers until the refresh, which comes at most once a second
    registries.refresh(100.9)
    assert registries.get("us-dnc") is old
    assert registries.lists("us-dnc", LISTED)
    registries.refresh(101.0)
    assert not registries.lists("us-dnc", LISTED)
    assert registries.lists("us-dnc", OTHER)
    # And whoever still holds the old map reads it unchanged
    assert old.lists(LISTED)
    assert not old.lists(OTHER)


def test_a_refresh_without_a_change_keeps_what_is_open(folder, file):
    load(folder, "us-dnc", [file], **FIELDS)
    registries = Registries(folder)
    before = registries.get("us-dnc")
    registries.refresh(1.0)
    registries.refresh(5.0)
    assert registries.get("us-dnc") is before


def test_a_removed_registry_is_not_loaded_after_the_refresh(folder, file):
    load(folder, "us-dnc", [file], **FIELDS)
    registries = Registries(folder)
    (folder / "us-dnc.bitmap").unlink()
    registries.refresh(1.0)
    assert registries.names() == []


def test_loads_at_the_same_time_leave_one_whole_file(folder, tmp_path):
    lists = [write(tmp_path / f"{i}.txt", f"+1212555{i:04}") for i in range(4)]
    threads = [threading.Thread(target=load, args=(folder, "us-dnc", [path]), kwargs=FIELDS) for path in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert Registries(folder).get("us-dnc").header.count == 1


# --- what is refused leaves the version before serving -----------------------------------------------------


def test_a_broken_line_changes_nothing_and_is_named(folder, tmp_path, file):
    # Given a registry, and two files of which the second has a broken line
    load(folder, "us-dnc", [file], **FIELDS)
    before = (folder / "us-dnc.bitmap").read_bytes()
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"212,5550199\n415-5550100\n")
    # When
    with pytest.raises(RegistryInvalid) as refused:
        load(folder, "us-dnc", [write(tmp_path / "good.txt", OTHER), broken], **FIELDS)
    # Then
    assert refused.value.where == {"file": str(broken), "line": 2}
    assert "5550" not in str(refused.value)
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert (folder / "us-dnc.bitmap").read_bytes() == before


def test_an_empty_list_changes_nothing(folder, tmp_path, file):
    load(folder, "us-dnc", [file], **FIELDS)
    with pytest.raises(RegistryInvalid, match="no number"):
        load(folder, "us-dnc", [write(tmp_path / "empty.txt")], **FIELDS)
    assert Registries(folder).lists("us-dnc", LISTED)


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InputInvalid) as refused:
            load(folder, "us-dnc", [path], **FIELDS)
        assert refused.value.where == {"file": str(path)}
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "../us-dnc", ".hidden", "a/b", "x" * 65])
def test_a_name_that_could_leave_the_folder_is_refused(folder, file, name):
    with pytest.raises(InputInvalid):
        load(folder, name, [file], **FIELDS)


def test_a_full_disk_changes_nothing_and_leaves_nothing(folder, tmp_path, file, monkeypatch):
    load(folder, "us-dnc", [file], **FIELDS)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryInvalid, match="still serves"):
        load(folder, "us-dnc", [write(tmp_path / "new.txt", OTHER)], **FIELDS)
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert Registries(folder).lists("us-dnc", LISTED)


@pytest.mark.parametrize("content", [b"", b"junk", b"SVBITMAP" + bytes(100)])
def test_a_corrupt_bitmap_is_refused_with_its_file_and_what_to_do(folder, content):
    folder.mkdir(parents=True)
    (folder / "us-dnc.bitmap").write_bytes(content)
    with pytest.raises(RegistryInvalid, match="load the registry again") as refused:
        Registries(folder)
    assert refused.value.where == {"file": str(folder / "us-dnc.bitmap")}


def test_a_bitmap_that_goes_corrupt_is_refused_on_every_refresh_until_it_is_loaded_again(folder, file):
    load(folder, "us-dnc", [file], **FIELDS)
    registries = Registries(folder)
    beside = folder / "beside"
    beside.write_bytes((folder / "us-dnc.bitmap").read_bytes()[:-1])
    beside.replace(folder / "us-dnc.bitmap")
    for moment in (1.0, 1.1):
        with pytest.raises(RegistryInvalid):
            registries.refresh(moment)
    load(folder, "us-dnc", [file], **FIELDS)
    registries.refresh(1.2)
    assert registries.lists("us-dnc", LISTED)


def test_a_bitmap_under_another_name_is_refused(folder, file):
    load(folder, "us-dnc", [file], **FIELDS)
    (folder / "us-dnc.bitmap").rename(folder / "fr-bloctel.bitmap")
    with pytest.raises(RegistryInvalid, match="another registry"):
        Registries(folder)


def test_every_byte_read_is_told_to_the_progress(folder, file):
    told = []
    load(folder, "us-dnc", [file, file], **FIELDS, progress=told.append)
    assert sum(told) == 2 * file.stat().st_size


def test_a_bitmap_is_readable_without_the_folder(folder, file):
    load(folder, "us-dnc", [file], **FIELDS)
    assert BitmapRegistry((folder / "us-dnc.bitmap").read_bytes()).lists(LISTED)


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def streamveil(tmp_path, monkeypatch, capsys):
    """Run the noun in a fresh folder with the default policy; returns exit code and standard output."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())

    def run(*words):
        args = parser.parse_args(["registry", *map(str, words)])
        args.config, args.log = "streamveil.toml", None
        code = args.run(args)
        captured = capsys.readouterr()
        assert captured.err == ""  # no bar where there is no terminal
        return code, captured.out

    return run


def status(streamveil):
    code, out = streamveil("status", "--json")
    assert code == 0
    (line,) = out.splitlines()
    return json.loads(line)


def days_ago(days):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86_400))


def test_status_of_a_registry_that_is_not_loaded(streamveil):
    assert status(streamveil) == {
        "name": "us-dnc",
        "country": "US",
        "as_of": None,
        "age_days": None,
        "count": None,
        "max_age_days": 31,
        "state": "not loaded",
    }


def test_load_then_status_tells_date_age_count_and_state(streamveil, file):
    as_of = days_ago(3)
    code, out = streamveil("load", "us-dnc", file, "--as-of", as_of)
    assert (code, out) == (0, f"us-dnc: 1 numbers loaded, as of {as_of}, fresh\n")
    row = status(streamveil)
    assert (row["as_of"], row["age_days"], row["count"], row["state"]) == (as_of, 3.0, 1, "fresh")


def test_without_a_date_the_age_counts_from_now(streamveil, file):
    streamveil("load", "us-dnc", file)
    assert status(streamveil)["age_days"] == 0.0


def test_a_list_of_an_old_date_is_loaded_and_stale(streamveil, file):
    assert "stale" in streamveil("load", "us-dnc", file, "--as-of", days_ago(32))[1]
    assert status(streamveil)["state"] == "stale"


@pytest.mark.parametrize(
    ("given", "as_of"),
    [
        ("2026-01-02", "2026-01-02T00:00:00Z"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("2026-01-02t03:04:05.9+05:30", "2026-01-01T21:34:05Z"),
    ],
)
def test_the_date_may_be_a_day_or_an_instant_of_any_offset(streamveil, file, given, as_of):
    streamveil("load", "us-dnc", file, "--as-of", given)
    assert status(streamveil)["as_of"] == as_of


@pytest.mark.parametrize(
    "given", ["", "yesterday", "2026-02-30", "2026-01-02T03:04:05", "20260102", "2026-W01-1", "1790000000"]
)
def test_anything_else_is_no_date(streamveil, file, given):
    with pytest.raises(InputInvalid, match="a time "):
        streamveil("load", "us-dnc", file, "--as-of", given)


def test_a_list_of_the_future_is_refused_as_it_would_never_be_too_old(streamveil, file):
    with pytest.raises(InputInvalid, match="future"):
        streamveil("load", "us-dnc", file, "--as-of", days_ago(-2))


def test_a_name_that_the_policy_does_not_list_is_refused_with_those_it_lists(streamveil, file):
    with pytest.raises(InputInvalid, match="it lists: us-dnc"):
        streamveil("load", "uk-tps", file)


def test_status_for_people_is_a_table(streamveil, file):
    streamveil("load", "us-dnc", file)
    code, out = streamveil("status")
    title, row = out.splitlines()
    assert code == 0
    assert title.split()[:2] == ["NAME", "COUNTRY"]
    assert row.split()[:2] == ["us-dnc", "US"]
    assert row.endswith("fresh")


def test_no_output_or_error_holds_a_number(streamveil, tmp_path, file):
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"415,5550100,x\n")
    shown = streamveil("load", "us-dnc", file)[1] + streamveil("status")[1]
    with pytest.raises(RegistryInvalid) as refused:
        streamveil("load", "us-dnc", broken)
    assert "5550100" not in shown + str(refused.value)
