"""The SQLite key store's own rules: its file, its locks, what its files still hold, and stores of version 1."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from processors.keyring import EpochRef, Needs, PersonRef
from schemas.errors import Fatal, KeysBusy, KeysFull, KeysUnusable, KmsRefuses, Retriable
from schemas.fields import PLATFORM
from schemas.sealed import KeyId
from streams.keys import sqlite as module
from streams.keys.ledger import AT_WILL
from streams.keys.sql import SEAL_BLOCK
from streams.keys.store import NEVER, Buried, Gone
from streams.keys.wrapping import epoch_aad, person_aad, token_aad, wrap
from tests.support.keys import (
    DAY,
    LATER,
    LATER_DAY,
    MONTH,
    NOW,
    PII,
    TODAY,
    SqliteKeyStores,
    epoch,
    local_kms,
    person,
    persons,
)

MIDNIGHT = NOW - NOW % DAY + DAY
TABLE = "persons_2100_01"


@pytest.fixture
def deployment(tmp_path) -> Iterator[SqliteKeyStores]:
    made = SqliteKeyStores(tmp_path)
    yield made
    made.close()


def on_disk(deployment: SqliteKeyStores) -> bytes:
    """All bytes that the store has on disk: the file, its write-ahead file, its index, whatever else lies there."""
    return b"".join(path.read_bytes() for path in sorted(deployment.path.parent.iterdir()))


@contextmanager
def writing(deployment: SqliteKeyStores) -> Iterator[None]:
    """Hold the write lock of the store, as another process would."""
    db = sqlite3.connect(deployment.path, isolation_level=None)
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
    finally:
        db.close()


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(KeysUnusable, match=message) as caught:
        call()
    assert isinstance(caught.value, Fatal)
    assert "\n" not in str(caught.value)


# --- locks --------------------------------------------------------------------------------------------------


def test_secrets_of_known_persons_are_read_while_another_process_writes(deployment):
    store = deployment.open(busy_timeout_s=0)
    known = store.fetch(persons([person(1)]), NOW).persons
    with writing(deployment):
        assert store.fetch(persons([person(1)]), NOW).persons == known
        with pytest.raises(KeysBusy):
            store.fetch(persons([person(2)]), NOW)


def test_a_locked_store_is_waited_for_and_nothing_has_happened(deployment):
    store = deployment.open(busy_timeout_s=0)
    calls = [
        lambda: store.fetch(epoch(PII), NOW),
        lambda: store.renew_lease("a", 30, 0),
        lambda: store.destroy_persons(PLATFORM, [b"x"]),
        lambda: store.rewrap(NEVER),
    ]
    with writing(deployment):
        for call in calls:
            with pytest.raises(KeysBusy) as caught:
                call()
            assert isinstance(caught.value, Retriable)
    assert store.fetch(epoch(PII), NOW).epochs[PII].id.version == 1
    assert (store.leases(), store.sequence()) == ({}, 0)


def test_a_full_disk_is_waited_for_and_nothing_has_happened(deployment):
    store = deployment.open()
    known = store.fetch(persons([person(0)]), NOW).persons
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    many = persons(person(n) for n in range(2000))
    with pytest.raises(KeysFull) as caught:
        store.fetch(many, NOW)
    assert isinstance(caught.value, Retriable)
    assert store.fetch(persons([person(0)]), NOW).persons == known
    store._db.execute("PRAGMA max_page_count = 100000")
    assert len(store.fetch(many, NOW).persons) == 2000


def test_a_destruction_that_a_reader_holds_up_says_so_and_can_be_finished(deployment):
    store = deployment.open(busy_timeout_s=0)
    sid = store.fetch(persons([person(1)]), NOW).persons[person(1)].sid
    blob = deployment.run(f"SELECT wrapped FROM {TABLE}")[0][0]
    reader = sqlite3.connect(deployment.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM meta").fetchall()
    with pytest.raises(KeysBusy, match="again"):
        store.destroy_persons(PLATFORM, [person(1).token])
    assert store.open_persons([sid], NOW) == {sid: Gone.DESTROYED}
    assert store.kms.counter() == 1
    reader.close()
    store.destroy_persons(PLATFORM, [person(1).token])
    assert blob not in on_disk(deployment)


def test_wrapping_keys_are_used_from_memory_for_15_minutes(deployment):
    store = deployment.open()
    store.fetch(persons([person(1)]), NOW)
    asked = store.kms.calls
    for minutes, calls in ((14, 0), (2, 1), (14, 0), (-20, 1)):  # a clock moved back ends it too
        deployment.elapse(60 * minutes)
        store.fetch(persons([person(1)]), NOW)
        asked += calls
        assert store.kms.calls == asked


# --- what rows say ------------------------------------------------------------------------------------------


SWAP_SECRETS = f"UPDATE {TABLE} SET wrapped = (SELECT wrapped FROM {TABLE} AS p WHERE p.rowid = 3 - {TABLE}.rowid)"
MOVE_PERSON = f"UPDATE {TABLE} SET token = x'00' WHERE rowid = 1"
MOVE_OWNER = f"UPDATE {TABLE} SET owner = 'acme' WHERE rowid = 1"
MOVE_MONTH = f"ALTER TABLE {TABLE} RENAME TO persons_2100_02"


@pytest.mark.parametrize("alteration", [SWAP_SECRETS, MOVE_PERSON, MOVE_OWNER, MOVE_MONTH])
def test_secrets_swapped_between_persons_or_moved_do_not_unwrap(deployment, alteration):
    store = deployment.open()
    found = store.fetch(persons([person(1), person(2)]), NOW).persons
    deployment.run(alteration)
    with pytest.raises(KeysUnusable, match="altered or damaged"):
        store.open_persons([found[person(1)].sid, found[person(2)].sid], NOW)


@pytest.mark.parametrize("month", ["2100", "2100-01; DROP TABLE meta", "2100-1", "x", "2100-01\n"])
def test_nothing_but_a_month_names_a_table(deployment, month):
    store = deployment.open()
    with pytest.raises(ValueError):
        store.fetch(persons([person(1, month=month)]), NOW)
    assert store.fetch(persons([person(1)]), NOW).sequence == 0


def test_rows_with_keys_never_move_shrink_or_go_so_that_no_page_keeps_a_stale_copy(deployment):
    store = deployment.open()
    shape = f"""
        SELECT 'person', rowid, length(owner || kek || tokens), length(token), length(sid), length(wrapped) FROM {TABLE}
        UNION ALL
        SELECT 'epoch', rowid, length(domain || owner || epoch || kek), length(seals), version, length(wrapped)
        FROM epoch_keys
        UNION ALL SELECT 'token', rowid, length(state), length(kek), version, length(wrapped) FROM token_keys
        UNION ALL SELECT 'secret', rowid, length(name), length(kek), 0, length(wrapped) FROM secrets"""
    store.fetch(Needs({PII: (LATER, 10)}, persons([person(1), person(2), person(3)]).persons), NOW)
    store.fetch(persons([person(4)], MIDNIGHT), NOW)
    store.put_secret("a", b"1")
    store.add_token_key()
    before = deployment.run(shape)
    store.fetch(persons([person(1)], None), NOW)
    store.fetch(epoch(PII, LATER, 10 * SEAL_BLOCK), NOW)  # more digits
    for day in (LATER_DAY, NEVER):
        store.rewrap(day)
    store.put_secret("a", bytes(1000))
    store.drop_secret("a")
    store.put_secret("longer name", b"2")
    store.hold_tokens(2)
    store.switch_tokens(2)
    store.destroy_persons(PLATFORM, [person(2).token])
    store.destroy_epoch(PII)
    store.bury_day(TODAY, MIDNIGHT)
    assert deployment.run(shape) == before
    store.destroy_persons(PLATFORM, [person(1).token, person(3).token])
    store.destroy_token_key(1)
    assert deployment.run(shape) == before


# --- what is left on disk -----------------------------------------------------------------------------------


def scattered(count: int) -> list[PersonRef]:
    """People whose tokens lie all over the index, so that pages split and cells move."""
    return [person(n * 2**97 + n * 7919, owner) for n in range(count) for owner in (PLATFORM, "a-longer-account")]


def test_no_file_holds_a_destroyed_secret_wrapped_or_not_nor_its_mapping(deployment):
    # Given persons added, re-wrapped and mixed over many commits
    store = deployment.open()
    everyone = scattered(900)
    for start in range(0, len(everyone), 90):
        store.fetch(persons(everyone[start : start + 90], NOW + 30 * DAY), NOW)
    wrapped = f"SELECT token, wrapped FROM {TABLE}"
    early = deployment.run(wrapped)
    store.fetch(persons(everyone[::3], None), NOW)
    store.fetch(persons(everyone[1::3]), NOW)
    now = deployment.run(wrapped)
    secrets = {ref: found.secret for ref, found in store.fetch(persons(everyone, NOW + DAY), NOW).persons.items()}
    # When half of them are erased
    erased = {ref.token for ref in everyone[::4]}
    for token in erased:
        for owner in (PLATFORM, "a-longer-account"):
            store.destroy_persons(owner, [token])
    # Then their wrapped secrets are in neither the database nor the write-ahead file, and the others' are
    files = on_disk(deployment)
    assert not [1 for token, blob in [*early, *now] if token in erased and blob in files]
    assert not [1 for token, blob in now if token not in erased and blob not in files]
    assert not [1 for ref, secret in secrets.items() if secret in files]
    assert not [1 for (token,) in deployment.run(f"SELECT token FROM {TABLE}") if token in erased]


def test_no_file_holds_a_destroyed_epoch_key_wrapped_or_not(deployment):
    store = deployment.open()
    refs = [EpochRef("content", f"account-{n * 7919 % 400}", TODAY) for n in range(400)]
    for _ in range(3):
        for ref in refs:
            store.fetch(epoch(ref, LATER, SEAL_BLOCK), NOW)
    wrapped = dict(deployment.run("SELECT owner, wrapped FROM epoch_keys"))
    for ref in refs[::2]:
        store.destroy_epoch(ref)
    files = on_disk(deployment)
    assert not [1 for ref in refs[::2] if wrapped[ref.owner] in files]
    assert not [1 for ref in refs[1::2] if wrapped[ref.owner] not in files]


@pytest.mark.parametrize("beside", ["the living", "the dead"])
def test_no_file_holds_anything_of_a_buried_day(deployment, beside, monkeypatch):
    # Given people who die with today, beside others of their month or alone in it, and more than one step of them
    monkeypatch.setattr(module, "STEP", 500)
    store = deployment.open()
    everyone = scattered(900)
    dying = everyone[::2] if beside == "the living" else everyone
    for start in range(0, len(everyone), 90):
        batch = {ref: MIDNIGHT for ref in everyone[start : start + 90] if ref in set(dying)}
        store.fetch(Needs({}, batch), NOW)
        if beside == "the living":
            store.fetch(persons(everyone[start + 1 : start + 90 : 2]), NOW)
    epochs = [EpochRef("content", f"account-{n}", TODAY) for n in range(200)]
    store.fetch(Needs(dict.fromkeys(epochs, (MIDNIGHT, 1)), {}), NOW)
    before = deployment.run(
        f"SELECT kek, wrapped, sid FROM {TABLE} UNION ALL SELECT kek, wrapped, NULL FROM epoch_keys"
    )
    # When their day is buried
    assert store.bury_day(TODAY, MIDNIGHT) == Buried(200, len(dying))
    # Then no file has a wrapped key of theirs, and it has all others
    files = on_disk(deployment)
    assert not [1 for kek, blob, _ in before if kek.startswith(TODAY) and blob in files]
    assert not [1 for kek, blob, _ in before if not kek.startswith(TODAY) and blob not in files]
    # And a month of the dead has no table any more
    tables = deployment.run("SELECT name FROM sqlite_master WHERE name GLOB 'persons_[0-9]*' AND type = 'table'")
    assert tables == ([(TABLE,)] if beside == "the living" else [])
    if beside == "the dead":
        assert not [1 for _, _, sid in before if sid is not None and sid in files]
        assert deployment.run("SELECT count(*) FROM person_days") == [(0,)]


def test_no_file_holds_what_was_wrapped_before_a_rewrap_or_a_dropped_secret(deployment):
    store = deployment.open()
    store.fetch(Needs({PII: (LATER, 1)}, persons(scattered(300)).persons), NOW)
    store.put_secret("a", b"1")
    store.put_secret("b", b"2")
    everything = (
        f"SELECT wrapped FROM {TABLE} UNION ALL SELECT wrapped FROM epoch_keys UNION ALL SELECT wrapped FROM secrets "
        "UNION ALL SELECT wrapped FROM token_keys UNION ALL SELECT wrapped FROM wrapping_keys"
    )
    before = deployment.run(everything)
    for day in (LATER_DAY, NEVER):
        store.rewrap(day)
    now = deployment.run(everything)
    files = on_disk(deployment)
    assert (len(before), len(now)) == (606, 606)
    assert not [1 for (blob,) in before if blob in files]
    assert not [1 for (blob,) in now if blob not in files]
    (gone,) = deployment.run("SELECT wrapped FROM secrets ORDER BY rowid LIMIT 1")
    store.drop_secret("a")
    assert gone[0] not in on_disk(deployment)
    assert store.secret("b") == b"2"


# --- copies made before -------------------------------------------------------------------------------------


def copied(deployment: SqliteKeyStores, to: Path) -> Path:
    """Copy the store's file as a backup would: whole, with what is in its write-ahead file."""
    to.mkdir(mode=0o700)
    with sqlite3.connect(deployment.path) as source, sqlite3.connect(to / "keys.db") as target:
        source.backup(target)
    source.close()
    target.close()
    (to / "keys.db").chmod(0o600)
    return to / "keys.db"


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in its place", "elsewhere"])
def test_a_copy_made_before_opens_nothing_that_was_destroyed_once_the_day_is_rewrapped(deployment, tmp_path, elsewhere):
    store = deployment.open()
    found = store.fetch(Needs({PII: (LATER, 1)}, persons([person(1), person(2)]).persons), NOW)
    store.put_secret("number", b"+14155550101")
    copy = copied(deployment, tmp_path / "backup")
    # Given a person, an epoch and a secret destroyed since: until the re-wrap the copy still opens them
    sid = store.destroy_persons(PLATFORM, [person(1).token]).sids[0]
    store.destroy_epoch(PII)
    store.drop_secret("number")
    deployment.path, place = copy, deployment.path
    refused(deployment.open, "older than the last destruction")
    assert deployment.open(outdated=True).open_persons([sid], NOW)[sid] == found.persons[person(1)]
    # When their days are re-wrapped
    for day in store.stale_days():
        store.rewrap(day)
    assert (
        store.open_persons([found.persons[person(2)].sid], NOW)[found.persons[person(2)].sid]
        == found.persons[person(2)]
    )
    # Then nothing in the copy can be opened, wherever it lies
    if not elsewhere:
        store.close()
        for path in place.parent.iterdir():
            path.unlink()
        shutil.copy(copy, place)
        deployment.path = place
    refused(deployment.open, "older than the last destruction")
    old = deployment.open(outdated=True)
    for call in (
        lambda: old.open_persons([sid], NOW),
        lambda: old.open_epochs([KeyId(*PII, 1)], NOW),
        lambda: old.secret("number"),
        old.token_keys,
    ):
        with pytest.raises(KmsRefuses, match="key-encryption key missing"):
            call()


def test_a_copy_from_before_the_first_key_of_a_day_goes_on_after_a_rewrap_of_that_day(deployment, tmp_path):
    # Given a copy from before a day, of which somebody was erased and which was re-wrapped since
    store = deployment.open()
    copy = copied(deployment, tmp_path / "backup")
    store.fetch(Needs({PII: (LATER, 1)}, persons([person(1), person(2)]).persons), NOW)
    store.destroy_persons(PLATFORM, [person(1).token])
    store.rewrap(LATER_DAY)
    store.close()
    # When it is put in the place of the store, and brought up to date
    for path in deployment.path.parent.iterdir():
        path.unlink()
    shutil.copy(copy, deployment.path)
    old = deployment.open(outdated=True)
    assert old.lost() == []
    old.catch_up()
    old.close()
    # Then what comes is sealed
    store = deployment.open()
    made = store.fetch(Needs({PII: (LATER, 1)}, persons([person(5)]).persons), NOW)
    assert (set(made.epochs), set(made.persons)) == ({PII}, {person(5)})
    assert store.rewrap(LATER_DAY) == 2
    assert store.kms.names() == [f"{LATER_DAY}.3", NEVER]


def test_a_copy_from_between_two_releases_opens_nothing_of_the_second(deployment, tmp_path, monkeypatch):
    # Given a release that was killed before the KEK of before went, a copy made then, and another release
    class Killed(BaseException):
        pass

    def killed(_):
        raise Killed

    first, second = EpochRef("held", PLATFORM, "a" * 32), EpochRef("held", PLATFORM, "b" * 32)
    store = deployment.open()
    store.fetch(Needs({first: (None, 1), second: (None, 1)}, {}), NOW)
    store.destroy_epoch(first)
    with monkeypatch.context() as patch:
        patch.setattr(store.kms, "destroy", killed)
        with pytest.raises(Killed):
            store.rewrap(AT_WILL)
    copy = copied(deployment, tmp_path / "backup")
    store.destroy_epoch(second)
    store.rewrap(AT_WILL)
    assert store.stale_days() == {}
    # Then the copy does not open what was released, even around the check of its age
    deployment.path = copy
    with pytest.raises(KmsRefuses, match="key-encryption key missing"):
        deployment.open(outdated=True).open_epochs([KeyId(*second, 1)], NOW)


def test_a_token_key_stays_while_the_last_of_many_people_is_known_under_it(deployment, monkeypatch):
    monkeypatch.setattr(module, "_LOOKED", 3)
    store = deployment.open()
    store.fetch(persons([person(n) for n in range(9)]), NOW)
    version = store.add_token_key().version
    store.hold_tokens(version)
    store.switch_tokens(version)
    assert store._has_tokens(1)
    deployment.run("UPDATE persons_2100_01 SET tokens = '0002' WHERE rowid < 9")
    assert store._has_tokens(1)
    with pytest.raises(ValueError, match="still known"):
        store.destroy_token_key(1)
    deployment.run("UPDATE persons_2100_01 SET tokens = '0002' WHERE rowid = 9")
    assert not store._has_tokens(1)
    store.destroy_token_key(1)
    assert store.token_keys().others == ()


def test_a_copy_made_before_a_day_was_buried_opens_nothing_of_it(deployment, tmp_path):
    store = deployment.open()
    found = store.fetch(Needs({PII: (MIDNIGHT, 1)}, persons([person(1)], MIDNIGHT).persons), NOW)
    copy = copied(deployment, tmp_path / "backup")
    store.bury_day(TODAY, MIDNIGHT)
    deployment.path = copy
    refused(deployment.open, "older than the last destruction")
    old = deployment.open(outdated=True)
    with pytest.raises(KmsRefuses):  # even for somebody whose clock still says today
        old.open_epochs([found.epochs[PII].id], NOW)
    assert old.open_epochs([found.epochs[PII].id], MIDNIGHT) == {found.epochs[PII].id: Gone.DESTROYED}


# --- the file itself ----------------------------------------------------------------------------------------


def test_files_are_private_and_a_looser_or_foreign_or_linked_one_is_refused(deployment, monkeypatch):
    deployment.open().fetch(persons([person(1)]), NOW)
    assert {path.stat().st_mode & 0o777 for path in deployment.path.parent.iterdir()} == {0o600}
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: 12345)
        refused(deployment.open, "belongs to another user")
    deployment.path.chmod(0o640)
    refused(deployment.open, "run: chmod 600")
    deployment.path.chmod(0o600)
    deployment.path.rename(deployment.path.with_name("elsewhere.db"))
    deployment.path.symlink_to("elsewhere.db")
    refused(deployment.open, "must not be a link")


def test_a_store_missing_beside_its_write_ahead_file_is_not_made_anew(deployment):
    deployment.open().close()
    deployment.path.rename(deployment.path.with_name("lost"))
    Path(f"{deployment.path}-wal").touch()
    refused(deployment.open, "missing beside its write-ahead file")
    assert not deployment.path.exists()


def test_a_creation_that_failed_half_way_does_not_block_the_next(deployment, monkeypatch):
    def fails(*_):
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("streams.keys.sqlite.os.link", fails)
        with pytest.raises(KeysFull):
            deployment.open()
    assert not deployment.path.exists()
    assert not list(deployment.path.parent.iterdir())
    assert deployment.open().token_keys().current.version == 1


@pytest.mark.parametrize("content", [b"", b"not a database" * 500], ids=["empty", "noise"])
def test_a_file_that_is_no_key_store_is_refused_and_left_as_it_is(deployment, content):
    deployment.path.parent.mkdir()
    deployment.path.write_bytes(content)
    deployment.path.chmod(0o600)
    refused(deployment.open, "no key store|not a key store")
    assert deployment.path.read_bytes() == content
    assert not deployment.kms_folder.exists()


def test_a_corrupt_store_is_an_error_that_says_so(deployment):
    store = deployment.open()
    store.fetch(persons(person(n) for n in range(2000)), NOW)
    store.close()
    content = bytearray(deployment.path.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    deployment.path.write_bytes(bytes(content))
    refused(lambda: deployment.open().fetch(persons(person(n) for n in range(2000)), NOW), "corrupt; restore")


# --- version 1 ----------------------------------------------------------------------------------------------

VERSION_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value NOT NULL);
CREATE TABLE wrapping_keys (day TEXT PRIMARY KEY, wrapped BLOB NOT NULL);
CREATE TABLE token_keys (version INTEGER PRIMARY KEY, wrapped BLOB NOT NULL);
CREATE TABLE epoch_keys (domain TEXT NOT NULL, owner TEXT NOT NULL, epoch TEXT NOT NULL, version INTEGER NOT NULL,
    day TEXT NOT NULL, deadline_s INTEGER, wrapped BLOB NOT NULL, seals TEXT NOT NULL,
    UNIQUE (domain, owner, epoch, version));
CREATE TABLE persons (owner TEXT NOT NULL, token BLOB NOT NULL, month TEXT NOT NULL, sid BLOB NOT NULL UNIQUE,
    day TEXT NOT NULL, wrapped BLOB NOT NULL, UNIQUE (owner, token, month));
CREATE TABLE epoch_tombstones (domain TEXT NOT NULL, owner TEXT NOT NULL, epoch TEXT NOT NULL, at_s INTEGER NOT NULL,
    PRIMARY KEY (domain, owner, epoch)) WITHOUT ROWID;
CREATE TABLE sid_tombstones (sid BLOB PRIMARY KEY, at_s INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (process_id TEXT PRIMARY KEY, expires_s REAL NOT NULL, seen INTEGER NOT NULL);
"""


def of_version_1(deployment: SqliteKeyStores) -> None:
    """Make a store as version 1 did, with an epoch alive, one destroyed, one tombstoned unmade, and two people."""
    store_id, day_key, forever_key = "ab" * 16, b"d" * 32, b"f" * 32
    kms = local_kms(deployment.kms_folder)(store_id, True)
    deployment.path.parent.mkdir(mode=0o700)
    deployment.path.touch(0o600)
    dead = EpochRef("pii", PLATFORM, "2099-12")
    with sqlite3.connect(deployment.path) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(VERSION_1)
        meta = {"schema": 1, "store_id": store_id, "root_check": kms.check, "destruction_seq": 3}
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        keys = {"never     ": kms.wrap(NEVER, forever_key), LATER_DAY: kms.wrap(LATER_DAY, day_key)}
        db.executemany("INSERT INTO wrapping_keys VALUES (?, ?)", keys.items())
        token = wrap(AESGCM(forever_key), b"t" * 32, token_aad(1))
        db.execute("INSERT INTO token_keys VALUES (1, ?)", (token,))
        wrapped = wrap(AESGCM(day_key), b"e" * 32, epoch_aad(KeyId(*PII, 1), LATER))
        for ref, blob in ((PII, wrapped), (dead, bytes(60))):
            row = (*ref, 1, LATER_DAY, LATER, blob, "0000000007")
            db.execute("INSERT INTO epoch_keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        for ref in (dead, EpochRef("pii", PLATFORM, "2099-11")):
            db.execute("INSERT INTO epoch_tombstones VALUES (?, ?, ?, ?)", (*ref, NOW))
        for number, month in ((1, MONTH), (2, "2099-12")):
            ref, sid = person(number, month=month), bytes([number]) * 16
            secret = wrap(AESGCM(day_key), bytes([number]) * 32, person_aad(ref, sid))
            row = (ref.owner, ref.token, month, sid, LATER_DAY, secret)
            db.execute("INSERT INTO persons VALUES (?, ?, ?, ?, ?, ?)", row)
        db.execute("INSERT INTO sid_tombstones VALUES (?, ?)", (b"\x09" * 16, NOW))
    db.close()
    # version 1 of the key management service: the root key in another form, and no counter
    root = deployment.kms_folder / f"{store_id}.root"
    key = bytes.fromhex(root.read_bytes().splitlines()[1].split()[1].decode())
    root.write_bytes(b"streamveil-root 1\n" + key)
    (deployment.kms_folder / f"{store_id}.counter").unlink()


def check_migrated(deployment: SqliteKeyStores) -> None:
    store = deployment.open()
    assert (store.sequence(), store.kms.counter(), store.token_keys().current) == (3, 3, (1, b"t" * 32))
    sids = {number: bytes([number]).hex() * 16 for number in (1, 2, 9)}
    opened = store.open_persons(sids.values(), NOW)
    assert opened == {sids[n]: (sids[n], bytes([n]) * 32) for n in (1, 2)} | {sids[9]: Gone.DESTROYED}
    needs = Needs({PII: (LATER, 1)}, {person(1): LATER, person(2, month="2099-12"): LATER})
    found = store.fetch(needs, NOW)
    assert [one.sid for one in found.persons.values()] == [sids[1], sids[2]]
    assert (found.epochs[PII].key, found.granted[PII]) == (b"e" * 32, SEAL_BLOCK)
    assert [(line.epoch, line.state) for line in store.status(NOW)] == [
        ("2099-11", "destroyed"),
        ("2099-12", "destroyed"),
        (MONTH, "alive"),
    ]
    assert store.rewrap(LATER_DAY) == 3
    assert store.open_persons(sids.values(), NOW) == opened
    assert store.bury_day(LATER_DAY, LATER + DAY) == Buried(1, 2)


def test_a_store_of_version_1_is_brought_up_to_date_at_open(deployment):
    of_version_1(deployment)
    before = deployment.run("SELECT wrapped FROM persons")
    store = deployment.open()
    tables = {name for (name,) in deployment.run("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {TABLE, "persons_2099_12", "person_days"} <= tables
    assert not {name for name in tables if name.startswith("old_")} | ({"persons"} & tables)
    assert [blob for (blob,) in before if blob not in on_disk(deployment)] == []
    store.close()
    check_migrated(deployment)


def test_a_migration_killed_half_way_has_not_happened(deployment, monkeypatch):
    of_version_1(deployment)
    whole = module._FROM_VERSION_1
    monkeypatch.setattr(module, "_FROM_VERSION_1", whole + "SELECT no_such_column FROM meta;")
    refused(deployment.open, "corrupt")
    assert ("schema", 1) in deployment.run("SELECT name, value FROM meta")
    monkeypatch.undo()
    check_migrated(deployment)


def test_a_version_1_store_that_lacks_a_table_is_refused_and_left_as_it_is(deployment):
    of_version_1(deployment)
    deployment.run("DROP TABLE sid_tombstones")
    before = deployment.run("SELECT name FROM sqlite_master ORDER BY name")
    refused(deployment.open, "restore it from its backup")
    assert deployment.run("SELECT name FROM sqlite_master ORDER BY name") == before
