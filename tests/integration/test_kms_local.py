"""The local-file KMS: private, durable, whole files; a missing, loose, damaged or wrong key is refused.

Its generations, its counter, and the rotation of its root key, killed at any point.
"""

import errno
import multiprocessing
import os
import time
from itertools import count
from pathlib import Path

import pytest

from schemas.errors import Fatal, KeysBusy, KeysFull, KeysUnusable, KmsRefuses, Retriable
from streams.keys import kms_local
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


def waits(message: str):
    return pytest.raises(KmsRefuses, match=message)


def files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def test_what_one_process_wraps_another_unwraps(kms, folder):
    wrapped = {day: kms.wrap(day, b"secret" * 5) for day in (DAY, NEVER)}
    again = LocalKms.open(folder, STORE)
    assert [again.unwrap(day, blob) for day, blob in wrapped.items()] == [b"secret" * 5] * 2
    assert again.check == kms.check
    assert again.names() == [DAY, NEVER]
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
    with waits("do not belong together"):
        other.unwrap(DAY, blob)
    other.destroy(DAY)
    other.raise_counter(7)
    assert (kms.names(), other.names()) == ([DAY], [])
    assert (kms.counter(), other.counter()) == (0, 7)
    assert kms.unwrap(DAY, blob) == b"x"


def test_a_kek_moved_to_another_day_or_altered_does_not_open(kms, folder):
    blob = kms.wrap(DAY, b"x")
    path = folder / f"{STORE}.{DAY}.kek"
    kek = path.read_bytes()
    (folder / f"{STORE}.2027-12-02.kek").touch(0o600)
    (folder / f"{STORE}.2027-12-02.kek").write_bytes(kek)
    with waits("damaged, or of another root key"):
        kms.unwrap("2027-12-02", blob)
    for content in (kek[:-1] + bytes([kek[-1] ^ 1]), b"", kek[1:]):
        path.write_bytes(content)
        for call in (lambda: kms.unwrap(DAY, blob), lambda: kms.wrap(DAY, b"x")):
            with waits("damaged, or of another root key"):
                call()
    path.write_bytes(kek)
    assert kms.unwrap(DAY, blob) == b"x"


@pytest.mark.parametrize("what", ["kek", "root"])
def test_a_missing_key_is_waited_for_and_back_in_use_when_it_is_restored(kms, folder, what):
    blob = kms.wrap(DAY, b"x")
    path = folder / (f"{STORE}.root" if what == "root" else f"{STORE}.{DAY}.kek")
    path.rename(folder / "away")
    with waits("key missing; restore it") as caught:
        kms.unwrap(DAY, blob)
    assert isinstance(caught.value, Retriable)
    (folder / "away").rename(path)
    assert kms.unwrap(DAY, blob) == b"x"
    folder.rename(folder.with_name("unmounted"))
    for call in (lambda: kms.unwrap(DAY, blob), lambda: kms.wrap(DAY, b"x"), kms.names, lambda: kms.raise_counter(1)):
        with waits("missing"):
            call()
    folder.with_name("unmounted").rename(folder)
    assert kms.unwrap(DAY, blob) == b"x"


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
    with waits("key-encryption key missing") as caught:
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


@pytest.mark.parametrize(
    "name", ["../x", "2027-1-1", "", "never/", f"{DAY}\n", f"{DAY}.1", f"{DAY}.02", f"{DAY}.10000"]
)
def test_only_a_day_and_its_generation_name_a_file(kms, name):
    for call in (lambda: kms.wrap(name, b"x"), lambda: kms.unwrap(name, b"x"), lambda: kms.destroy(name)):
        with pytest.raises(ValueError):
            call()
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
    assert len(kms.names()) == 28
    assert len(list(folder.iterdir())) == 30


# --- generations and what is destroyed -------------------------------------------------------------------------


def test_generations_of_a_day_are_keys_of_their_own_in_order(kms):
    names = [DAY, f"{DAY}.2", f"{DAY}.10", f"{NEVER}.3"]
    wrapped = {name: kms.wrap(name, name.encode()) for name in reversed(names)}
    assert kms.names() == names
    assert [kms.unwrap(name, wrapped[name]) for name in names] == [name.encode() for name in names]
    with waits("do not belong together"):
        kms.unwrap(DAY, wrapped[f"{DAY}.2"])
    kms.destroy(DAY)
    assert kms.names() == names[1:]
    assert kms.unwrap(f"{DAY}.2", wrapped[f"{DAY}.2"]) == f"{DAY}.2".encode()


def test_what_was_destroyed_is_never_made_again_nor_anything_before_it(kms, folder):
    kms.wrap(f"{DAY}.2", b"x")
    kms.destroy(f"{DAY}.2")
    for one in (kms, LocalKms.open(folder, STORE)):
        for name in (DAY, f"{DAY}.2"):
            with waits("destroyed; it is not made again") as caught:
                one.wrap(name, b"x")
            assert caught.value.where == {"day": name}
    assert kms.names() == []
    kms.wrap(f"{DAY}.3", b"x")
    kms.wrap("2027-12-02", b"x")
    kms.destroy("2027-12-30")
    with waits("destroyed"):
        kms.wrap("2027-12-30", b"x")
    kms.raise_counter(9)
    with waits("destroyed"):
        kms.wrap(DAY, b"x")


def test_what_is_remembered_of_the_destroyed_is_one_short_line_a_day(kms, folder):
    path = folder / f"{STORE}.counter"
    empty = len(path.read_bytes())
    for number in range(1, 30):
        for name in (f"2027-12-{number:02}", f"2027-12-{number:02}.2", f"2027-12-{number:02}.3"):
            kms.wrap(name, b"x")
            kms.destroy(name)
    assert len(path.read_bytes()) - empty == 29 * 13


def test_a_draft_that_a_killed_process_left_does_not_outlive_its_key(kms, folder):
    kms.wrap(DAY, b"x")
    kek = (folder / f"{STORE}.{DAY}.kek").read_bytes()
    draft = folder / f".{STORE}.{DAY}.kek.0123456789abcdef"
    draft.touch(0o600)
    draft.write_bytes(kek)
    os.link(draft, folder / "hard-link")
    kms.destroy(DAY)
    assert kek[20:40] not in files(folder)
    assert not draft.exists()


# --- the counter -----------------------------------------------------------------------------------------------


def test_the_counter_only_rises_and_is_the_same_for_every_process(kms, folder):
    other = LocalKms.open(folder, STORE)
    assert kms.counter() == 0
    for value, counter in ((3, 3), (2, 3), (0, 3), (2**40, 2**40)):
        other.raise_counter(value)
        assert kms.counter() == LocalKms.open(folder, STORE).counter() == counter
    kms.destroy(DAY)
    assert kms.counter() == 2**40


def test_a_lost_counter_is_refused_and_made_anew_only_when_it_is_raised(kms, folder):
    kms.raise_counter(5)
    (folder / f"{STORE}.counter").unlink()
    with refused("counter is lost: the key store may be an old one; run: streamveil keys reconcile"):
        kms.counter()
    kms.raise_counter(4)
    assert kms.counter() == 4


@pytest.mark.parametrize("content", [b"", b"streamveil-counter 1\n", b"streamveil-counter 2\n5\n", b"\xff", b"x" * 30])
def test_a_damaged_counter_is_refused_and_left_as_it_is(kms, folder, content):
    path = folder / f"{STORE}.counter"
    path.write_bytes(content)
    for call in (kms.counter, lambda: kms.raise_counter(9), lambda: kms.wrap(DAY, b"x"), lambda: kms.destroy(DAY)):
        with refused("counter is damaged; restore it"):
            call()
    assert path.read_bytes() == content


def _raise_in_a_process(folder: Path, barrier) -> None:
    kms = LocalKms.open(folder, STORE)
    barrier.wait(30)
    for value in range(1, 101):
        kms.raise_counter(value)
        kms.destroy(f"2027-{value % 12 + 1:02}-{value % 28 + 1:02}")


def test_processes_that_race_for_the_counter_lose_nothing(kms, folder):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_raise_in_a_process, args=(folder, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert kms.counter() == 100
    days = {f"2027-{value % 12 + 1:02}-{value % 28 + 1:02}" for value in range(1, 101)}
    assert {line.split()[0] for line in (folder / f"{STORE}.counter").read_text().splitlines()[2:]} == days


def test_a_folder_that_is_held_for_long_is_an_error_and_reading_goes_on(kms, folder, monkeypatch):
    blob = kms.wrap(DAY, b"x")
    monkeypatch.setattr(kms_local, "_LOCK_S", 0.05)
    with LocalKms.open(folder, STORE)._locked():
        for call in (lambda: kms.raise_counter(1), lambda: kms.wrap("2027-12-02", b"x"), kms.rotate_root):
            with pytest.raises(KeysBusy, match="another process"):
                call()
        assert kms.unwrap(DAY, blob) == b"x"
        assert kms.counter() == 0
    kms.raise_counter(1)
    assert kms.counter() == 1


# --- rotation of the root key ----------------------------------------------------------------------------------


def keys_at_rest(folder: Path) -> list[bytes]:
    root = (folder / f"{STORE}.root").read_bytes().splitlines()
    return [bytes.fromhex(line.split()[1].decode()) for line in root[1:]]


def test_a_rotated_root_key_opens_everything_and_the_old_one_is_nowhere(kms, folder):
    wrapped = {name: kms.wrap(name, name.encode()) for name in (DAY, f"{DAY}.2", NEVER)}
    (old,), before, check = keys_at_rest(folder), files(folder), kms.check
    keks = [(folder / f"{STORE}.{name}.kek").read_bytes() for name in kms.names()]
    other = LocalKms.open(folder, STORE)
    kms.rotate_root()
    assert kms.check != check
    assert kms.trusts(kms.check)
    assert kms.trusts(check)
    assert not kms.trusts(b"x" * 16)
    for one in (kms, other, LocalKms.open(folder, STORE)):
        assert [one.unwrap(name, blob) for name, blob in wrapped.items()] == [name.encode() for name in wrapped]
    assert old in bytes.fromhex(before.split(b"key ")[1].split()[0].decode())
    assert old.hex().encode() not in files(folder)
    assert not [kek for kek in keks if kek[20:] in files(folder)]
    # And what another process makes is under the new one
    late = other.wrap("2027-12-30", b"late")
    kms.rotate_root()
    assert LocalKms.open(folder, STORE).unwrap("2027-12-30", late) == b"late"
    assert all(kms.trusts(one) for one in (check, other.check, kms.check))


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_rotation_killed_at_any_point_is_finished_by_calling_again_and_nothing_waits(kms, folder, monkeypatch):
    wrapped = {name: kms.wrap(name, name.encode()) for name in (DAY, f"{DAY}.2", NEVER)}
    for step in count(1):
        done = 0

        def counted(call, step=step):
            def wrapper(*args, **options):
                nonlocal done
                done += 1
                if done == step:
                    raise Killed
                return call(*args, **options)

            return wrapper

        before = kms.check
        with monkeypatch.context() as patch:
            for name in ("_overwrite", "sync_folder", "secrets.token_bytes", "os.fsync"):
                whole = f"streams.keys.kms_local.{name}"
                module, _, last = name.rpartition(".")
                patch.setattr(whole, counted(getattr(getattr(kms_local, module) if module else kms_local, last)))
            try:
                kms.rotate_root()
                break
            except Killed:
                pass
        fresh = LocalKms.open(folder, STORE)
        for one in (kms, fresh):
            assert [one.unwrap(name, blob) for name, blob in wrapped.items()] == [name.encode() for name in wrapped]
        assert fresh.trusts(before)
        made = fresh.wrap(f"2027-11-{step % 28 + 1:02}", b"made")
        fresh.rotate_root()
        assert len([line for line in (folder / f"{STORE}.root").read_bytes().splitlines() if line[:3] == b"old"]) == 0
        assert kms.unwrap(f"2027-11-{step % 28 + 1:02}", made) == b"made"
        assert fresh.trusts(before)
        for path in folder.glob(f"{STORE}.2027-11-*"):
            path.unlink()
    assert step > 15
    assert not list(folder.glob(".*"))


def _read_in_a_process(folder: Path, wrapped: dict[str, bytes], ready, stop) -> None:
    kms = LocalKms.open(folder, STORE)
    ready.set()
    done = 0
    while not stop.is_set() or not done:
        for name, blob in wrapped.items():
            assert kms.unwrap(name, blob) == name.encode()
        kms.wrap(f"2027-11-{done % 28 + 1:02}", b"x")
        done += 1


def test_other_processes_read_and_make_keys_while_the_root_is_rotated_again_and_again(kms, folder):
    wrapped = {name: kms.wrap(name, name.encode()) for name in (DAY, f"{DAY}.2", NEVER)}
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=_read_in_a_process, args=(folder, wrapped, ready, stop))
    process.start()
    assert ready.wait(30)
    ends_s = time.monotonic() + 1.5
    while time.monotonic() < ends_s:
        kms.rotate_root()
    stop.set()
    process.join(60)
    assert process.exitcode == 0
    kms.rotate_root()
    assert [kms.unwrap(name, blob) for name, blob in wrapped.items()] == [name.encode() for name in wrapped]


def test_a_root_key_of_version_1_gets_its_counter_at_open(kms, folder):
    blob = kms.wrap(DAY, b"x")
    (key,) = keys_at_rest(folder)
    (folder / f"{STORE}.root").write_bytes(b"streamveil-root 1\n" + key)
    (folder / f"{STORE}.counter").unlink()
    again = LocalKms.open(folder, STORE)
    assert (again.unwrap(DAY, blob), again.counter(), again.check) == (b"x", 0, kms.check)
    (folder / f"{STORE}.counter").unlink()
    with pytest.raises(Fatal, match="counter is lost"):
        LocalKms.open(folder, STORE).counter()
