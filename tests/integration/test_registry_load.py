import argparse
import gzip
import io
import json
import os
import stat
import threading
import time
import zipfile
from pathlib import Path

import pytest

from processors.screen.lists import mapped
from processors.screen.registry import RegistryFile
from schemas.errors import InputInvalid, RegistryInvalid
from streams.cli import registry as command
from streams.cli.main import main
from streams.state import listfiles, registries
from streams.state.registries import Registries, Terms, change, load

SHIPPED = Path(__file__).parents[2] / "deploy" / "mappings" / "registries"
LISTED, OTHER = "+14155550100", "+12125550199"
TERMS = Terms(country="US", calling_code="1", as_of_s=1_790_000_000, now_s=1_790_000_500)
DAY_S = 86_400
WAIT_S = 20.0


def text(*numbers, end="\n"):
    return "".join(f"{n[2:5]},{n[5:]}{end}" for n in numbers).encode()


def write(path, *numbers, end="\n"):
    path.write_bytes(text(*numbers, end=end))
    return path


def many(count, first=0):
    return [f"+1415{number:07}" for number in range(first, first + count)]


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


def lists(folder, number):
    return Registries(folder).get("us-dnc").lists(number)


def refreshed(registries, until, monotonic_s=0.0):
    """Refresh, as a worker does between batches, until something is so."""
    ends_s = time.monotonic() + WAIT_S
    while not until():
        assert time.monotonic() < ends_s, "no refresh did it"
        monotonic_s += registries_s
        registries.refresh(monotonic_s)
        time.sleep(0.001)


registries_s = registries.REFRESH_S


# --- load and serve ----------------------------------------------------------------------------------------


def test_what_was_loaded_is_served(folder, tmp_path, file):
    # Given two files, one with the other line end and a blank line
    second = write(tmp_path / "more.txt", OTHER, end="\r\n\r\n")
    # When
    header = load(folder, "us-dnc", [file, second], TERMS)
    found = Registries(folder)
    # Then
    assert (header.count, header.as_of, header.loaded_at) == (2, 1_790_000_000, 1_790_000_500)
    assert found.names() == ["us-dnc"]
    assert found.damaged() == []
    registry = found.get("us-dnc")
    assert (registry.header, registry.count, registry.as_of_s) == (header, 2, 1_790_000_000)
    assert [registry.lists(number) for number in (LISTED, OTHER, "+14155550101")] == [True, True, False]


def test_a_registry_that_is_not_loaded_is_none(folder):
    found = Registries(folder)  # which need not exist
    assert found.names() == []
    assert found.get("us-dnc") is None
    found.refresh(1.0)
    assert found.get("us-dnc") is None


def test_files_are_private_whatever_the_umask(folder, file):
    before = os.umask(0)
    try:
        load(folder, "us-dnc", [file], TERMS)
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
    load(folder, "us-dnc", [file], TERMS)
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert mode(folder / "us-dnc.bitmap") == 0o600
    assert lists(folder, LISTED)


def test_a_file_is_readable_without_the_folder(folder, file):
    load(folder, "us-dnc", [file], TERMS)
    assert RegistryFile((folder / "us-dnc.bitmap").read_bytes()).lists(LISTED)


def test_every_byte_read_is_told_to_the_progress(folder, file):
    told = []
    load(folder, "us-dnc", [file, file], TERMS, told.append)
    assert sum(told) == 2 * file.stat().st_size


def test_loads_at_the_same_time_leave_one_whole_file(folder, tmp_path):
    files = [write(tmp_path / f"{i}.txt", f"+1212555{i:04}") for i in range(4)]
    threads = [threading.Thread(target=load, args=(folder, "us-dnc", [path], TERMS)) for path in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert Registries(folder).get("us-dnc").count == 1


def test_changes_at_the_same_time_are_all_applied(folder, tmp_path, file):
    load(folder, "us-dnc", [file], TERMS)
    files = [write(tmp_path / f"{i}.txt", f"+1212555{i:04}") for i in range(4)]
    threads = [
        threading.Thread(target=change, args=(folder, "us-dnc"), kwargs={"add": [path], "delete": [], "terms": TERMS})
        for path in files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Registries(folder).get("us-dnc").count == 5


# --- swapped whole while it is used -------------------------------------------------------------------------


def test_a_new_version_serves_after_a_refresh_and_the_old_one_until_then(folder, tmp_path, file):
    # Given a registry in use
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    found.refresh(100.0)
    old = found.get("us-dnc")
    # When it is replaced by a list without the number
    load(folder, "us-dnc", [write(tmp_path / "new.txt", OTHER)], TERMS)
    # Then the old one answers until a refresh, of which at most one a second looks at the disk
    found.refresh(100.9)
    assert found._opening is None
    assert found.get("us-dnc") is old
    refreshed(found, lambda: found.get("us-dnc") is not old, 100.0)
    assert not found.get("us-dnc").lists(LISTED)
    assert found.get("us-dnc").lists(OTHER)
    # And whoever still holds the old map reads it unchanged
    assert old.lists(LISTED)
    assert not old.lists(OTHER)


def test_a_refresh_does_not_wait_for_the_new_version_to_be_verified(folder, tmp_path, file, monkeypatch):
    # Given that verifying takes until it is let go
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    old, go, verify = found.get("us-dnc"), threading.Event(), registries.RegistryFile

    def slow(view):
        assert go.wait(WAIT_S)
        return verify(view)

    monkeypatch.setattr(registries, "RegistryFile", slow)
    load_other = write(tmp_path / "new.txt", OTHER)
    monkeypatch.setattr(registries, "_map", registries._map)
    go.set()
    load(folder, "us-dnc", [load_other], TERMS)
    go.clear()
    # When / Then refreshes come back, and the old one answers
    for second in range(1, 5):
        found.refresh(float(second))
        assert found.get("us-dnc") is old
        assert old.lists(LISTED)
    # until it is verified
    go.set()
    refreshed(found, lambda: found.get("us-dnc") is not old, 5.0)
    assert found.get("us-dnc").lists(OTHER)


def test_a_verdict_is_right_at_every_moment_of_many_swaps(folder, tmp_path):
    # Given two lists, each with a number the other lacks, and both with a third
    both = "+13125550123"
    files = [write(tmp_path / "0.txt", LISTED, both), write(tmp_path / "1.txt", OTHER, both)]
    load(folder, "us-dnc", [files[0]], TERMS)
    found = Registries(folder)
    # When one is loaded after the other while a process asks
    seen, moment = set(), 0.0
    for turn in range(6):
        load(folder, "us-dnc", [files[(turn + 1) % 2]], TERMS)
        before = found.get("us-dnc")
        ends_s = time.monotonic() + WAIT_S
        while found.get("us-dnc") is before:
            assert time.monotonic() < ends_s
            moment += registries_s
            found.refresh(moment)
            registry = found.get("us-dnc")
            # Then each answer is that of one whole version
            answers = (registry.lists(LISTED), registry.lists(OTHER), registry.lists(both))
            assert answers in {(True, False, True), (False, True, True)}
            seen.add(answers)
    assert len(seen) == 2


def test_what_was_swapped_out_is_let_go_after_a_while(folder, tmp_path, file):
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    old = found.get("us-dnc")
    load(folder, "us-dnc", [write(tmp_path / "new.txt", OTHER)], TERMS)
    refreshed(found, lambda: found.get("us-dnc") is not old)
    assert [registry for _, registry in found._retired] == [old]
    found.refresh(1000.0 + registries.RETIRE_S)
    assert found._retired == []
    assert old.lists(LISTED)  # whoever holds it still can


def test_a_refresh_without_a_change_keeps_what_is_open(folder, file):
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    before = found.get("us-dnc")
    for moment in (1.0, 5.0, 9.0):
        found.refresh(moment)
        assert found._opening is None
    assert found.get("us-dnc") is before


def test_a_registry_that_is_loaded_later_is_found(folder, file):
    found = Registries(folder)
    load(folder, "us-dnc", [file], TERMS)
    refreshed(found, lambda: found.get("us-dnc") is not None)
    assert found.get("us-dnc").lists(LISTED)


def test_a_removed_registry_is_not_loaded_after_the_refresh(folder, file):
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    (folder / "us-dnc.bitmap").unlink()
    found.refresh(1.0)
    assert found.names() == []
    # and is again once it is back
    load(folder, "us-dnc", [file], TERMS)
    refreshed(found, lambda: found.names() == ["us-dnc"], 1.0)


def replace(folder, content, name="us-dnc"):
    beside = folder / "beside"
    beside.write_bytes(content)
    beside.replace(folder / f"{name}.bitmap")


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda _: b"", lambda content: b"x" + content[1:]])
def test_a_damaged_new_version_is_said_and_the_old_one_goes_on_serving(folder, file, damage):
    # Given a registry in use
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    old = found.get("us-dnc")
    # When its file is replaced by a damaged one
    replace(folder, damage((folder / "us-dnc.bitmap").read_bytes()))
    refreshed(found, lambda: found.damaged() == ["us-dnc"])
    # Then the old one serves, and the damaged one is not looked at again and again
    assert found.get("us-dnc") is old
    assert old.lists(LISTED)
    found.refresh(10_000.0)
    assert found._opening is None
    assert found.damaged() == ["us-dnc"]
    # until it is loaded again
    load(folder, "us-dnc", [file], TERMS)
    refreshed(found, lambda: found.damaged() == [] and found.get("us-dnc") is not old, 10_000.0)
    assert found.get("us-dnc").lists(LISTED)


def test_a_damaged_version_that_goes_away_is_damaged_no_more(folder, file):
    found = Registries(folder)
    load(folder, "us-dnc", [file], TERMS)
    replace(folder, b"junk")
    refreshed(found, lambda: found.damaged() == ["us-dnc"])
    assert found.get("us-dnc") is None
    (folder / "us-dnc.bitmap").unlink()
    found.refresh(20_000.0)
    assert found.damaged() == []


@pytest.mark.parametrize("content", [b"", b"junk", b"SVBITMAP" + bytes(100), b"SVBITMAP\1\0" + bytes(100)])
def test_a_damaged_or_old_file_ends_the_start_and_says_what_to_do(folder, content):
    folder.mkdir(parents=True)
    (folder / "us-dnc.bitmap").write_bytes(content)
    with pytest.raises(RegistryInvalid, match="load the registry again") as refused:
        Registries(folder)
    assert refused.value.where == {"file": str(folder / "us-dnc.bitmap")}


def test_a_folder_that_cannot_be_read_is_not_one_without_registries(folder, file, tmp_path):
    # Given a registry that serves
    load(folder, "us-dnc", [file], TERMS)
    found = Registries(folder)
    # When its folder cannot be read any more
    folder.rename(tmp_path / "aside")
    folder.write_text("no folder")
    found.refresh(1.0)
    # Then it goes on serving, and no process starts as if nothing were loaded
    assert found.names() == ["us-dnc"]
    with pytest.raises(RegistryInvalid) as refused:
        Registries(folder)
    assert refused.value.where["file"] == str(folder)


def test_a_file_under_another_name_is_refused(folder, file):
    load(folder, "us-dnc", [file], TERMS)
    (folder / "us-dnc.bitmap").rename(folder / "fr-bloctel.bitmap")
    with pytest.raises(RegistryInvalid, match="another registry"):
        Registries(folder)


# --- what is refused leaves the version before serving -----------------------------------------------------


def test_a_broken_line_changes_nothing_and_is_named(folder, tmp_path, file):
    # Given a registry, and two files of which the second has a broken line
    load(folder, "us-dnc", [file], TERMS)
    before = (folder / "us-dnc.bitmap").read_bytes()
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"212,5550199\n415-5550100\n")
    # When
    with pytest.raises(RegistryInvalid) as refused:
        load(folder, "us-dnc", [write(tmp_path / "good.txt", OTHER), broken], TERMS)
    # Then
    assert refused.value.where == {"file": str(broken), "line": 2}
    assert "5550" not in str(refused.value)
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert (folder / "us-dnc.bitmap").read_bytes() == before
    for lists_of in ({"add": [broken], "delete": []}, {"add": [], "delete": [broken]}):
        with pytest.raises(RegistryInvalid) as refused:
            change(folder, "us-dnc", **lists_of, terms=TERMS)
        assert refused.value.where == {"file": str(broken), "line": 2}
        assert (folder / "us-dnc.bitmap").read_bytes() == before


def test_an_empty_list_changes_nothing(folder, tmp_path, file):
    load(folder, "us-dnc", [file], TERMS)
    with pytest.raises(RegistryInvalid, match="no number"):
        load(folder, "us-dnc", [write(tmp_path / "empty.txt")], TERMS)
    assert lists(folder, LISTED)


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        for terms in (TERMS, TERMS._replace(as_of_s=None)):
            with pytest.raises(InputInvalid) as refused:
                load(folder, "us-dnc", [path], terms)
            assert refused.value.where == {"file": str(path)}
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "../us-dnc", ".hidden", "a/b", "x" * 65])
def test_a_name_that_could_leave_the_folder_is_refused(folder, file, name):
    with pytest.raises(InputInvalid, match="name has"):
        load(folder, name, [file], TERMS)


def test_a_full_disk_changes_nothing_and_leaves_nothing(folder, tmp_path, file, monkeypatch):
    load(folder, "us-dnc", [file], TERMS)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryInvalid, match="still serves"):
        load(folder, "us-dnc", [write(tmp_path / "new.txt", OTHER)], TERMS)
    assert everything_in(folder) == ["us-dnc.bitmap"]
    assert lists(folder, LISTED)


def test_a_list_older_than_the_one_that_serves_is_refused_unless_it_is_meant(folder, tmp_path, file):
    load(folder, "us-dnc", [file], TERMS)
    older, other = TERMS._replace(as_of_s=TERMS.as_of_s - 1), write(tmp_path / "new.txt", OTHER)
    for act in (
        lambda terms: load(folder, "us-dnc", [other], terms),
        lambda terms: change(folder, "us-dnc", add=[other], delete=[], terms=terms),
    ):
        with pytest.raises(InputInvalid, match="--older"):
            act(older)
        assert not lists(folder, OTHER)
    change(folder, "us-dnc", add=[other], delete=[], terms=older._replace(older=True))
    assert lists(folder, OTHER)
    assert Registries(folder).get("us-dnc").as_of_s == older.as_of_s
    load(folder, "us-dnc", [file], older._replace(older=True, smaller=True))
    assert not lists(folder, OTHER)


def test_a_list_of_less_than_half_the_numbers_is_refused_unless_it_is_meant(folder, tmp_path):
    load(folder, "us-dnc", [write(tmp_path / "10.txt", *many(10))], TERMS)
    with pytest.raises(InputInvalid, match="--smaller"):
        load(folder, "us-dnc", [write(tmp_path / "4.txt", *many(4))], TERMS)
    with pytest.raises(InputInvalid, match="--smaller"):
        change(folder, "us-dnc", add=[], delete=[write(tmp_path / "6.txt", *many(6))], terms=TERMS)
    assert Registries(folder).get("us-dnc").count == 10
    load(folder, "us-dnc", [write(tmp_path / "5.txt", *many(5))], TERMS)
    load(folder, "us-dnc", [tmp_path / "4.txt"], TERMS)
    load(folder, "us-dnc", [write(tmp_path / "1.txt", *many(1))], TERMS._replace(smaller=True))
    assert Registries(folder).get("us-dnc").count == 1


def test_a_damaged_registry_is_replaced_by_a_whole_list(folder, file):
    load(folder, "us-dnc", [file], TERMS)
    replace(folder, b"junk")
    load(folder, "us-dnc", [file], TERMS)
    assert lists(folder, LISTED)


# --- change lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
def test_changes_are_applied_and_what_did_nothing_is_counted(folder, tmp_path, scattered):
    # Given a list in either encoding
    extra = [] if scattered else many(200_000, 10_000)
    load(folder, "us-dnc", [write(tmp_path / "all.txt", LISTED, OTHER, *many(4), *extra)], TERMS)
    # When numbers are added, of which one is listed and one is given twice, and deleted, of which one is not listed
    new = ["+13125550100", "+13125550101"]
    added = write(tmp_path / "add.txt", *new, OTHER, new[0])
    deleted = write(tmp_path / "delete.txt", LISTED, "+19995550100", LISTED)
    terms = TERMS._replace(as_of_s=TERMS.as_of_s + DAY_S)
    done = change(folder, "us-dnc", add=[added], delete=[deleted], terms=terms)
    # Then
    assert (done.added, done.already, done.deleted, done.unlisted) == (2, 1, 1, 1)
    registry = Registries(folder).get("us-dnc")
    assert registry.encoding == ("buckets" if scattered else "pages")
    assert (registry.count, registry.as_of_s) == (7 + len(extra), terms.as_of_s)
    assert all(registry.lists(number) for number in (*new, OTHER, *many(4), *extra))
    assert not registry.lists(LISTED)
    assert not registry.lists("+19995550100")


def test_a_number_that_is_both_added_and_deleted_stays_listed(folder, tmp_path, file):
    load(folder, "us-dnc", [file], TERMS)
    both = write(tmp_path / "both.txt", LISTED, OTHER)
    change(folder, "us-dnc", add=[both], delete=[both], terms=TERMS)
    assert lists(folder, LISTED)
    assert lists(folder, OTHER)


def test_there_is_nothing_to_change_before_a_whole_list_is_loaded(folder, file):
    with pytest.raises(RegistryInvalid, match="whole list first"):
        change(folder, "us-dnc", add=[file], delete=[], terms=TERMS)
    load(folder, "us-dnc", [file], TERMS)
    replace(folder, b"junk")
    with pytest.raises(RegistryInvalid, match="load the registry again"):
        change(folder, "us-dnc", add=[file], delete=[], terms=TERMS)
    with pytest.raises(InputInvalid, match="at least one FILE"):
        change(folder, "us-dnc", add=[], delete=[], terms=TERMS)


# --- formats and archives -----------------------------------------------------------------------------------


def test_any_other_list_needs_a_mapping_of_the_calling_code_of_the_policy(folder, tmp_path):
    path = tmp_path / "tps.txt"
    path.write_bytes(b"01635 506160\r\n0207 3787244\r\n")
    terms = Terms(country="GB", calling_code="44", as_of_s=1_790_000_000, now_s=1_790_000_500)
    with pytest.raises(InputInvalid, match="give --map FILE"):
        load(folder, "uk-tps", [path], terms)
    form = mapped((SHIPPED / "uk-tps-5-7.toml").read_text(), "uk-tps-5-7.toml")
    load(folder, "uk-tps", [path], terms._replace(form=form))
    assert Registries(folder).get("uk-tps").lists("+441635506160")
    with pytest.raises(InputInvalid, match="another calling code"):
        load(folder, "uk-tps", [path], terms._replace(form=mapped((SHIPPED / "sg-dnc.toml").read_text(), "x")))
    with pytest.raises(InputInvalid, match="another calling code"):
        load(folder, "us-dnc", [path], terms)


def zipped(path, *, stored=False, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 11, 1, 12, 0, 0)), content, compress_type=archive.compression)
    return path


@pytest.mark.parametrize("stored", [False, True])
def test_a_zip_file_is_read_member_by_member_whatever_it_is_called(folder, tmp_path, stored):
    told = []
    path = zipped(tmp_path / "list", stored=stored, a=text(*many(20_000)), b=text(LISTED, OTHER, end="\r\n"))
    load(folder, "us-dnc", [path], TERMS, told.append)
    assert Registries(folder).get("us-dnc").count == 20_002
    assert 0.5 * path.stat().st_size < sum(told) <= path.stat().st_size


def test_a_broken_line_in_a_zip_file_is_named_with_its_member(folder, tmp_path):
    path = zipped(tmp_path / "list.zip", good=text(LISTED), bad=text(LISTED, OTHER) + b"x\n")
    with pytest.raises(RegistryInvalid) as refused:
        load(folder, "us-dnc", [path], TERMS)
    assert refused.value.where == {"file": f"{path}/bad", "line": 3}


def test_a_gz_file_is_read_as_a_stream(folder, tmp_path):
    told, path = [], tmp_path / "list"
    path.write_bytes(gzip.compress(text(*many(500))) + gzip.compress(text(LISTED)))
    load(folder, "us-dnc", [path], TERMS, told.append)
    assert Registries(folder).get("us-dnc").count == 501
    assert sum(told) == path.stat().st_size


def encrypted(path):
    content = bytearray(zipped(path, a=text(LISTED)).read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def nested(path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a", text(LISTED))
    zipped(path, list=inner.getvalue())


def overlapping(path):
    content = bytearray(zipped(path, stored=True, a=text(LISTED), b=text(LISTED)).read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = (1 << 20).to_bytes(4, "little") * 2
    path.write_bytes(content)


def nameless(path):
    content = bytearray(zipped(path, a=text(LISTED)).read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 28] = 0  # length of the name
    del content[at + 46]
    content[content.index(b"PK\x05\x06") + 12] -= 1  # size of the directory
    path.write_bytes(content)


def misnamed(path):
    content = bytearray(zipped(path, a=text(LISTED)).read_bytes())
    content[7] |= 8  # the name is UTF-8, says the file
    content[30] = 0xED
    path.write_bytes(content)


def other_method(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", text(LISTED))


ARCHIVES = {
    "encrypted": (encrypted, "encrypted"),
    "nested": (nested, "archive in an archive"),
    "gz in zip": (lambda path: zipped(path, a=gzip.compress(text(LISTED))), "archive in an archive"),
    "gz in gz": (lambda path: path.write_bytes(gzip.compress(gzip.compress(text(LISTED)))), "archive in an archive"),
    "bomb": (lambda path: zipped(path, a=b"\n" * (1 << 20)), "no list"),
    "gz bomb": (lambda path: path.write_bytes(gzip.compress(b"\n" * (1 << 20))), "no list"),
    "empty": (zipped, "no file"),
    "overlapping": (overlapping, "overlap"),
    "another method": (other_method, "not known"),
    "nameless": (nameless, "damaged"),
    "misnamed": (misnamed, "damaged"),
    "cut zip": (lambda path: path.write_bytes(zipped(path, a=text(*many(100))).read_bytes()[:-30]), "damaged"),
    "cut gz": (lambda path: path.write_bytes(gzip.compress(text(*many(100)))[:-12]), "damaged"),
    "flipped gz": (lambda path: path.write_bytes(gzip.compress(text(*many(100)))[:-6] + b"\0" * 6), "damaged"),
    "flipped zip": (
        lambda path: path.write_bytes(
            zipped(path, stored=True, a=text(LISTED)).read_bytes().replace(b"5550100", b"5550101")
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_is_damaged_or_no_plain_one_is_refused(folder, tmp_path, file, kind, monkeypatch):
    monkeypatch.setattr(listfiles, "SMALL_BYTES", 1 << 16)
    load(folder, "us-dnc", [file], TERMS)
    before = (folder / "us-dnc.bitmap").read_bytes()
    make, said = ARCHIVES[kind]
    path = tmp_path / "list.zip"
    make(path)
    with pytest.raises(RegistryInvalid, match=said) as refused:
        load(folder, "us-dnc", [path], TERMS)
    assert str(path) in refused.value.where["file"]
    assert (folder / "us-dnc.bitmap").read_bytes() == before


# --- the date of a list -------------------------------------------------------------------------------------


def test_without_a_date_the_oldest_modification_time_counts(folder, tmp_path, file):
    terms = TERMS._replace(as_of_s=None)
    new, old = write(tmp_path / "new.txt", OTHER), file
    os.utime(new, (1_789_990_000, 1_789_990_000))
    os.utime(old, (1_780_000_000, 1_780_000_000))
    assert load(folder, "us-dnc", [new, old], terms).as_of == 1_780_000_000
    # in a zip file that of its members, whose times are local ones of nobody knows where
    path = zipped(tmp_path / "list.zip", a=text(LISTED, OTHER))
    os.utime(path, (1_795_000_000, 1_795_000_000))
    noon_s = 1_793_534_400
    later = terms._replace(now_s=1_796_000_000)
    assert load(folder, "us-dnc", [path], later).as_of == noon_s - 14 * 3600
    # in a gz file the one it names
    path = tmp_path / "list.gz"
    path.write_bytes(gzip.compress(text(LISTED, OTHER), mtime=1_794_000_000))
    assert load(folder, "us-dnc", [path], later._replace(now_s=1_900_000_000)).as_of == 1_794_000_000


def test_a_date_that_lies_ahead_or_is_none_is_refused(folder, tmp_path, file):
    os.utime(file, (TERMS.now_s + 2 * DAY_S, TERMS.now_s + 2 * DAY_S))
    with pytest.raises(InputInvalid, match=r"future.*--as-of"):
        load(folder, "us-dnc", [file], TERMS._replace(as_of_s=None))
    path = tmp_path / "list.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a", (1980, 0, 0, 0, 0, 0)), text(LISTED))
    with pytest.raises(InputInvalid, match="--as-of"):
        load(folder, "us-dnc", [path], TERMS._replace(as_of_s=None))
    load(folder, "us-dnc", [path], TERMS)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDWR), "wb"), pytest.raises(InputInvalid, match="--as-of"):
        load(folder, "us-dnc", [pipe], TERMS._replace(as_of_s=None))


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


def status(streamveil, name="us-dnc"):
    code, out = streamveil("status", "--json")
    assert code == 0
    return next(row for row in map(json.loads, out.splitlines()) if row["name"] == name)


def days_ago(days):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * DAY_S))


def test_status_lists_every_registry_of_the_policy_loaded_or_not(streamveil):
    rows = [json.loads(line) for line in streamveil("status", "--json")[1].splitlines()]
    assert [(row["name"], row["country"], row["max_age_days"]) for row in rows] == [
        ("us-dnc", "US", 31), ("ca-dncl", "CA", 31), ("uk-tps", "GB", 28), ("sg-dnc-voice", "SG", 21),
        ("sg-dnc-text", "SG", 21),
    ]  # fmt: skip
    assert rows[0] == {
        "name": "us-dnc", "country": "US", "as_of": None, "age_days": None, "count": None, "encoding": None,
        "size_bytes": None, "max_age_days": 31, "state": "not loaded",
    }  # fmt: skip


def test_load_then_status_tells_date_age_count_size_and_state(streamveil, tmp_path, file):
    as_of = days_ago(3)
    code, out = streamveil("load", "us-dnc", file, "--as-of", as_of)
    assert (code, out) == (0, f"us-dnc: 1 numbers loaded, as of {as_of}, fresh\n")
    row = status(streamveil)
    assert (row["as_of"], row["age_days"], row["count"], row["state"]) == (as_of, 3.0, 1, "fresh")
    (path,) = tmp_path.rglob("us-dnc.bitmap")
    assert (row["encoding"], row["size_bytes"]) == ("buckets", path.stat().st_size)


@pytest.mark.parametrize(
    ("name", "content", "mapping", "number"),
    [
        ("ca-dncl", b"<list><ac val='416'><ph val='1234567'/></ac></list>", None, "+14161234567"),
        ("ca-dncl", b"416,1234567\r\n", None, "+14161234567"),
        ("uk-tps", b"0207 3787244\r\n", "uk-tps-5-7", "+442073787244"),
        ("uk-tps", b"02073787244 \r\n", "uk-tps-12", "+442073787244"),
        ("sg-dnc-voice", b"91234567\r\n", "sg-dnc", "+6591234567"),
        ("sg-dnc-text", b"91234567\n", "sg-dnc", "+6591234567"),
    ],
)
def test_every_list_of_the_policy_can_be_loaded_as_it_is_given_out(
    streamveil, tmp_path, name, content, mapping, number
):
    path = tmp_path / "given.out"
    path.write_bytes(content)
    if mapping:
        with pytest.raises(InputInvalid, match="--map"):
            streamveil("load", name, path)
    words = ("--map", SHIPPED / f"{mapping}.toml") if mapping else ()
    assert "1 numbers loaded" in streamveil("load", name, path, *words)[1]
    (where,) = tmp_path.rglob(f"{name}.bitmap")
    assert RegistryFile(where.read_bytes()).lists(number)
    assert status(streamveil, name)["count"] == 1


def test_a_mapping_overrides_what_is_known_by_name_and_a_wrong_one_is_named(streamveil, tmp_path):
    path, mapping = tmp_path / "list.txt", tmp_path / "map.toml"
    path.write_bytes(b"4155550100\n")
    mapping.write_text('[number]\nregion = "US"\npositions = [[1, 10]]\n')
    assert "1 numbers" in streamveil("load", "us-dnc", path, "--map", mapping)[1]
    mapping.write_bytes(b"\xff")
    for wrong in (mapping, tmp_path / "none.toml"):
        with pytest.raises(InputInvalid) as refused:
            streamveil("load", "us-dnc", path, "--map", wrong)
        assert refused.value.where == {"file": str(wrong)}


def test_changes_are_told(streamveil, tmp_path, file):
    streamveil("load", "us-dnc", file, "--as-of", days_ago(2))
    as_of = days_ago(1)
    code, out = streamveil("change", "us-dnc", "--delete", write(tmp_path / "delete.txt", "+19995550100"),
                           "--add", write(tmp_path / "add.txt", OTHER, LISTED), "--as-of", as_of)  # fmt: skip
    assert code == 0
    assert out.splitlines() == [
        "us-dnc: 1 added, 1 were listed already; 0 deleted, 1 were not listed",
        f"us-dnc: 2 numbers, as of {as_of}, fresh",
    ]
    assert status(streamveil)["age_days"] == 1.0


def test_the_flags_that_say_what_is_meant_are_those_that_the_errors_name(streamveil, tmp_path):
    path = write(tmp_path / "list.txt", *many(10))
    streamveil("load", "us-dnc", path, "--as-of", days_ago(1))
    write(path, *many(2))
    with pytest.raises(InputInvalid, match="--smaller"):
        streamveil("load", "us-dnc", path)
    with pytest.raises(InputInvalid, match="--older"):
        streamveil("load", "us-dnc", path, "--smaller", "--as-of", days_ago(2))
    assert "2 numbers" in streamveil("load", "us-dnc", path, "--smaller", "--older", "--as-of", days_ago(2))[1]


def test_without_a_date_the_age_is_that_of_the_file_and_not_of_the_load(streamveil, file):
    at_s = int(time.time()) - 5 * DAY_S
    os.utime(file, (at_s, at_s))
    streamveil("load", "us-dnc", file)
    assert status(streamveil)["age_days"] == 5.0


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
    for verb in (("load", "fr-bloctel", file), ("change", "fr-bloctel", "--add", file)):
        with pytest.raises(InputInvalid, match="it lists: ca-dncl, sg-dnc-text, sg-dnc-voice, uk-tps, us-dnc"):
            streamveil(*verb)


def test_status_shows_all_and_says_which_are_damaged(tmp_path, monkeypatch, capsys):
    # Given three registries of the policy that are loaded, two of them damaged since, and a damaged file beside them
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "streamveil-data" / "registries", write(tmp_path / "list.txt", LISTED)
    for name in ("us-dnc", "ca-dncl", "uk-tps"):
        assert main(["registry", "load", "us-dnc", str(file)]) == 0
        (folder / "us-dnc.bitmap").rename(folder / f"{name}.bitmap")
    assert main(["registry", "load", "us-dnc", str(file)]) == 0
    (folder / "ca-dncl.bitmap").write_bytes(b"junk")
    (folder / f"{LISTED}.bitmap").write_bytes(b"")
    capsys.readouterr()
    # When / Then all are shown, each damaged one has a line of its own, and the status says so
    assert main(["registry", "status", "--json"]) == 1
    told = capsys.readouterr()
    rows = {row["name"]: row for row in map(json.loads, told.out.splitlines())}
    assert {name: row["state"] for name, row in rows.items()} == {
        "us-dnc": "fresh", "ca-dncl": "damaged", "uk-tps": "damaged", "sg-dnc-voice": "not loaded",
        "sg-dnc-text": "not loaded",
    }  # fmt: skip
    assert rows["ca-dncl"] | {"state": "not loaded"} == rows["sg-dnc-text"] | {
        "name": "ca-dncl", "country": "CA", "max_age_days": 31
    }  # fmt: skip
    lines = told.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("streamveil: ") and line.count(".bitmap)") + line.count("…)") == 1 for line in lines)
    assert LISTED[1:] not in told.out + told.err
    # and for people it is a table, behind which the lines stand
    assert main(["registry", "status"]) == 1
    told = capsys.readouterr()
    assert [line.split()[-1] for line in told.out.splitlines()][1:4] == ["fresh", "damaged", "damaged"]
    assert told.err.splitlines() == lines
    # and once all are sound again it is well
    for name in ("ca-dncl", "uk-tps", LISTED):
        (folder / f"{name}.bitmap").unlink()
    assert main(["registry", "status"]) == 0
    assert capsys.readouterr().err == ""


def test_status_for_people_is_a_table(streamveil, file):
    streamveil("load", "us-dnc", file)
    code, out = streamveil("status")
    title, row, *more = out.splitlines()
    assert code == 0
    assert title.split()[:2] == ["NAME", "COUNTRY"]
    assert row.split()[:2] == ["us-dnc", "US"]
    assert row.endswith("fresh")
    assert len(more) == 4


def test_no_output_or_error_holds_a_number(streamveil, tmp_path, file):
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"415,5550100,x\n")
    shown = streamveil("load", "us-dnc", file)[1] + streamveil("status")[1]
    shown += streamveil("change", "us-dnc", "--add", file)[1]
    for verb in (("load", "us-dnc", broken), ("change", "us-dnc", "--add", broken)):
        with pytest.raises(RegistryInvalid) as refused:
            streamveil(*verb)
        shown += str(refused.value)
    assert "5550100" not in shown
