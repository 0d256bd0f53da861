"""The local-file KMS: private, durable, whole files; a missing, loose, damaged or wrong key is refused."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from schemas.errors import KeysFull, KeysUnusable
from streams.keys.kms_local import LocalKms
from streams.keys.store import NEVER

STORE = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2
DAY = "2027-12-01"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "kms"


@pytest.fixture
def kms(folder) -> LocalKms:
    return LocalKms.create(folder, STORE)


def refused(message: str):
    return pytest.raises(KeysUnusable, match=message)


def test_what_one_process_wraps_another_unwraps(kms, folder):
    wrapped = {day: kms.wrap(day, b"secret" * 5) for day in (DAY, NEVER)}
    again = LocalKms.open(folder, STORE)
    assert [again.unwrap(day, blob) for day, blob in wrapped.items()] == [b"secret" * 5] * 2
    assert again.check == kms.check
    assert again.days() == [DAY, NEVER]
    assert (kms.calls, again.calls) == (2, 2)


def test_wrapping_is_never_the_same_twice_and_shows_nothing(kms):
    first, second = kms.wrap(DAY, b"secret" * 5), kms.wrap(DAY, b"secret" * 5)
    assert first != second
    assert b"secret" not in first


def test_stores_share_a_folder_and_open_nothing_of_each_other(kms, folder):
    other = LocalKms.create(folder, OTHER)
    blob = kms.wrap(DAY, b"x")
    other.wrap(DAY, b"y")
    assert other.check != kms.check
    with refused("do not belong together"):
        other.unwrap(DAY, blob)
    other.destroy(DAY)
    assert (kms.days(), other.days()) == ([DAY], [])
    assert kms.unwrap(DAY, blob) == b"x"


def test_a_kek_moved_to_another_day_or_altered_does_not_open(kms, folder):
    blob = kms.wrap(DAY, b"x")
    path = folder / f"{STORE}.{DAY}.kek"
    kek = path.read_bytes()
    (folder / f"{STORE}.2027-12-02.kek").touch(0o600)
    (folder / f"{STORE}.2027-12-02.kek").write_bytes(kek)
    with refused("do not belong together"):
        kms.unwrap("2027-12-02", blob)
    path.write_bytes(kek[:-1] + bytes([kek[-1] ^ 1]))
    with refused("do not belong together"):
        kms.unwrap(DAY, blob)
    path.write_bytes(b"")
    with refused("damaged"):
        kms.unwrap(DAY, blob)


def test_a_destroyed_kek_is_gone_for_every_process_at_once(kms, folder):
    blob = kms.wrap(DAY, b"x")
    other = LocalKms.open(folder, STORE)
    assert other.unwrap(DAY, blob) == b"x"
    path = folder / f"{STORE}.{DAY}.kek"
    shadow = folder / "hard-link"
    os.link(path, shadow)
    before = path.read_bytes()
    kms.destroy(DAY)
    kms.destroy(DAY)
    with refused("key-encryption key missing") as caught:
        other.unwrap(DAY, blob)
    assert caught.value.where["day"] == DAY
    assert not path.exists()
    assert len(shadow.read_bytes()) == len(before)
    assert not {before[at : at + 16] for at in range(len(before) - 16)} & {
        shadow.read_bytes()[at : at + 16] for at in range(len(before) - 16)
    }


def test_everything_is_private_from_the_start(kms, folder):
    mask = os.umask(0)
    try:
        kms.wrap(DAY, b"x")
        LocalKms.create(folder.parent / "second", OTHER)
    finally:
        os.umask(mask)
    for place in (folder, folder.parent / "second"):
        assert place.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_root_key_or_kek_open_to_others_is_refused(kms, folder, mode):
    blob = kms.wrap(DAY, b"x")
    for name, call in (
        (f"{STORE}.root", lambda: LocalKms.open(folder, STORE)),
        (f"{STORE}.{DAY}.kek", lambda: kms.unwrap(DAY, blob)),
    ):
        (folder / name).chmod(mode)
        with refused("open to other users; run: chmod 600"):
            call()
        (folder / name).chmod(0o600)
        call()


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o711])
@pytest.mark.usefixtures("kms")
def test_a_folder_open_to_others_is_refused(folder, mode):
    folder.chmod(mode)
    for call in (LocalKms.open, LocalKms.create):
        with refused("run: chmod 700"):
            call(folder, STORE)


@pytest.mark.usefixtures("kms")
def test_what_another_user_owns_is_refused(folder, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with refused("belongs to another user"):
        LocalKms.open(folder, STORE)


@pytest.mark.usefixtures("kms")
def test_links_and_special_files_are_refused(folder):
    root = folder / f"{STORE}.root"
    root.rename(folder / "real")
    root.symlink_to(folder / "real")
    with refused("must not be a link"):
        LocalKms.open(folder, STORE)
    root.unlink()
    root.mkdir(mode=0o700)
    with refused("regular file"):
        LocalKms.open(folder, STORE)
    root.rmdir()
    os.mkfifo(root, 0o600)
    with refused("regular file"):
        LocalKms.open(folder, STORE)
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    with refused("not a link"):
        LocalKms.open(linked, STORE)


def test_a_missing_root_key_is_named_and_not_made(folder, tmp_path):
    with refused("root key missing beside an existing key store; restore it from its own backup") as caught:
        LocalKms.open(folder, STORE)
    assert caught.value.where["path"] == str(folder / f"{STORE}.root")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[1:], lambda _: b""])
@pytest.mark.usefixtures("kms")
def test_a_root_key_of_the_wrong_length_is_refused(folder, change):
    root = folder / f"{STORE}.root"
    root.write_bytes(change(root.read_bytes()))
    with refused("root key damaged"):
        LocalKms.open(folder, STORE)


@pytest.mark.usefixtures("kms")
def test_an_unreadable_root_key_is_refused_with_the_reason(folder, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("streams.keys.kms_local.os.open", denied)
    with refused("Permission denied"):
        LocalKms.open(folder, STORE)


@pytest.mark.usefixtures("kms")
def test_a_root_key_is_never_overwritten(folder):
    before = (folder / f"{STORE}.root").read_bytes()
    with refused("exists already"):
        LocalKms.create(folder, STORE)
    assert (folder / f"{STORE}.root").read_bytes() == before


def test_a_full_disk_makes_nothing_and_is_retriable(kms, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    before = sorted(folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("streams.keys.kms_local.os.fsync", full)
        with pytest.raises(KeysFull):
            kms.wrap(DAY, b"x")
    assert sorted(folder.iterdir()) == before
    assert kms.unwrap(DAY, kms.wrap(DAY, b"x")) == b"x"


@pytest.mark.parametrize("day", ["../x", "2027-1-1", "", "never/", "2027-12-01\n"])
def test_only_a_day_names_a_file(kms, day):
    with pytest.raises(ValueError):
        kms.wrap(day, b"x")
    with pytest.raises(ValueError):
        LocalKms.open(Path(), "../" + STORE)


def _wrap_in_a_process(folder: Path, number: int, barrier, results) -> None:
    kms = LocalKms.open(folder, STORE)
    barrier.wait(30)
    results.put([kms.wrap(f"2027-12-{day:02}", bytes([number]) * 32) for day in range(1, 29)])


def test_processes_that_race_for_a_kek_get_the_same_one(kms, folder):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_wrap_in_a_process, args=(folder, n, barrier, results)) for n in (1, 2)]
    for process in processes:
        process.start()
    wrapped = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results.close()
    results.join_thread()
    opened = [[kms.unwrap(f"2027-12-{day:02}", blob) for day, blob in enumerate(one, 1)] for one in wrapped]
    assert sorted(opened) == [[bytes([number]) * 32] * 28 for number in (1, 2)]
    assert len(kms.days()) == 28
    assert len(list(folder.iterdir())) == 29
