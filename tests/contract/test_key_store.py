"""What every key store promises (streams/keys/store.py), and the SQLite file's own rules."""

import multiprocessing
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from processors.keyring import EpochRef, Needs, PersonRef, PersonSecret
from schemas.errors import Fatal, KeysBusy, KeysFull, KeysUnusable, Retriable
from schemas.fields import PLATFORM
from schemas.sealed import KeyId
from streams.keys.sqlite import SEAL_BLOCK, SqliteKeyStore
from streams.keys.store import Gone

NOW = 1_800_000_000  # 2027-01-15T08:00:00Z
DAY = 86_400
LATER = NOW + 300 * DAY
PII = EpochRef("pii", PLATFORM, "2027-01")
FOREVER = EpochRef("suppression", PLATFORM, "-")


class Deployment:
    """Opens the same store again and again, as processes do."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data" / "keys.db"
        self.kms_folder = folder / "kms"
        self.now = float(NOW)
        self.stores: list[SqliteKeyStore] = []

    def open(self, **options) -> SqliteKeyStore:
        options = {"clock": lambda: self.now, "busy_timeout_s": 5.0} | options
        self.stores.append(SqliteKeyStore.open(self.path, self.kms_folder, **options))
        return self.stores[-1]

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def files(self) -> bytes:
        """All bytes that the store has on disk."""
        return b"".join(path.read_bytes() for path in sorted(self.path.parent.iterdir()))


@pytest.fixture(params=[Deployment], ids=["sqlite"])
def deployment(request, tmp_path) -> Iterator[Deployment]:
    made = request.param(tmp_path)
    yield made
    made.close()


def person(number: int, owner: str = PLATFORM, month: str = "2027-01") -> PersonRef:
    return PersonRef(owner, number.to_bytes(16, "big"), month)


def persons(refs, deadline_s: int | None = LATER) -> Needs:
    return Needs({}, dict.fromkeys(refs, deadline_s))


def epoch(ref: EpochRef, deadline_s: int | None = LATER, seals: int = 10) -> Needs:
    return Needs({ref: (deadline_s, seals)}, {})


# --- get or create ------------------------------------------------------------------------------------------


def test_a_secret_is_the_same_for_every_instance_and_opens_by_its_sid(deployment):
    refs = [person(number, owner) for number in range(700) for owner in (PLATFORM, "acme")]
    first = deployment.open().fetch(persons(refs), NOW)
    other = deployment.open()
    again = other.fetch(persons(refs), NOW)
    assert again.persons == first.persons
    assert len(first.persons) == 1400
    assert other.open_persons([found.sid for found in first.persons.values()]) == {
        found.sid: found for found in first.persons.values()
    }


def test_sids_and_secrets_are_unique_by_owner_person_and_month(deployment):
    refs = [person(n, owner, month) for n in range(20) for owner in (PLATFORM, "a") for month in ("2027-01", "2027-02")]
    found = deployment.open().fetch(persons(refs), NOW).persons.values()
    assert len({one.sid for one in found}) == len({one.secret for one in found}) == len(refs)
    assert all(len(one.sid) == 32 and len(one.secret) == 32 for one in found)


def test_an_epoch_key_and_the_token_key_are_the_same_for_every_instance(deployment):
    first, second = deployment.open(), deployment.open()
    key = first.fetch(epoch(PII), NOW).epochs[PII]
    assert second.fetch(epoch(PII), NOW).epochs[PII] == key
    assert second.open_epochs([key.id], NOW) == {key.id: key}
    assert first.token_key() == second.token_key()
    assert (first.token_key().version, len(first.token_key().key), first.store_id) == (1, 32, second.store_id)


def test_secrets_of_known_persons_are_read_while_another_process_writes(deployment):
    store = deployment.open(busy_timeout_s=0)
    known = store.fetch(persons([person(1)]), NOW).persons
    with writer(deployment):
        assert store.fetch(persons([person(1)]), NOW).persons == known
        with pytest.raises(KeysBusy):
            store.fetch(persons([person(2)]), NOW)


def _fetch_in_a_process(folder: Path, barrier, results) -> None:
    deployment = Deployment(folder)
    barrier.wait(30)
    store = deployment.open()
    barrier.wait(30)
    found = store.fetch(Needs({PII: (LATER, 5)}, persons(person(n) for n in range(500)).persons), NOW)
    results.put(
        (
            store.store_id,
            store.token_key().key,
            found.epochs[PII].key,
            [(ref.token, *one) for ref, one in sorted(found.persons.items(), key=lambda item: item[0].token)],
        )
    )
    deployment.close()


def test_two_processes_that_race_make_one_store_and_the_same_secrets(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_fetch_in_a_process, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results.close()
    results.join_thread()
    assert first == second
    assert len(first[3]) == 500


def test_a_failed_fetch_leaves_nothing_behind_and_the_next_one_works(deployment, monkeypatch):
    store = deployment.open()

    def fails(*_):
        raise KeysFull

    with monkeypatch.context() as patch:
        patch.setattr(store, "_reserve", fails)
        with pytest.raises(KeysFull):
            store.fetch(Needs({PII: (LATER, 1)}, persons([person(1)]).persons), NOW)
    assert rows(deployment, "SELECT count(*) FROM persons") == [(0,)]
    found = store.fetch(persons([person(1)]), NOW).persons
    assert deployment.open().fetch(persons([person(1)]), NOW).persons == found


# --- deadlines ----------------------------------------------------------------------------------------------


def test_an_epoch_is_refused_from_its_deadline_on_and_never_minted_again(deployment):
    store = deployment.open()
    key = store.fetch(epoch(PII, NOW + 10), NOW).epochs[PII]
    assert store.open_epochs([key.id], NOW + 9) == {key.id: key}
    assert store.open_epochs([key.id], NOW + 10) == {key.id: Gone.DESTROYED}
    assert store.fetch(epoch(PII, NOW + 10), NOW + 10).epochs == {}
    # When another policy asks for a later deadline, the one of the first minting stays
    assert store.fetch(epoch(PII, NOW + 999), NOW + 10).epochs == {}
    assert store.fetch(epoch(PII, NOW + 999), NOW + 9).epochs == {PII: key}
    assert [line.versions for line in store.status(NOW)] == [1]


def test_an_epoch_already_dead_when_first_asked_for_is_not_minted(deployment):
    store = deployment.open()
    assert store.fetch(epoch(PII, NOW), NOW).epochs == {}
    assert store.status(NOW) == []


def test_an_epoch_without_deadline_stays(deployment):
    store = deployment.open()
    key = store.fetch(epoch(FOREVER, None), NOW).epochs[FOREVER]
    assert key.deadline_s is None
    assert store.open_epochs([key.id], NOW * 4) == {key.id: key}


def test_a_person_asked_for_past_the_deadline_gets_no_secret(deployment):
    store = deployment.open()
    assert store.fetch(persons([person(1)], NOW), NOW).persons == {}
    assert rows(deployment, "SELECT count(*) FROM persons") == [(0,)]


@pytest.mark.parametrize("later", [NOW + 40 * DAY, None], ids=["date", "never"])
def test_a_secret_needed_for_longer_is_kept_and_wrapped_under_the_later_day(deployment, later):
    store = deployment.open()
    first = store.fetch(persons([person(1)], NOW + DAY), NOW).persons[person(1)]
    assert store.fetch(persons([person(1)], later), NOW).persons[person(1)] == first
    assert store.fetch(persons([person(1)], NOW + DAY), NOW).persons[person(1)] == first
    deployment.now = NOW + 39 * DAY
    store.kms.destroy("2027-01-16")
    assert deployment.open().open_persons([first.sid]) == {first.sid: first}


def test_a_secret_whose_day_is_over_is_destroyed_and_the_person_gets_a_new_one(deployment):
    store = deployment.open()
    old = store.fetch(persons([person(1)], NOW + 10), NOW).persons[person(1)]
    deployment.now = NOW + DAY
    assert store.open_persons([old.sid]) == {old.sid: Gone.DESTROYED}
    new = store.fetch(persons([person(1)]), NOW + DAY).persons[person(1)]
    assert new.sid != old.sid
    assert new.secret != old.secret
    assert store.open_persons([old.sid, new.sid]) == {old.sid: Gone.DESTROYED, new.sid: new}


# --- destruction --------------------------------------------------------------------------------------------


def test_a_destroyed_epoch_is_gone_in_all_versions_and_never_minted_again(deployment):
    store, other = deployment.open(max_seals=10), deployment.open(max_seals=10)
    ids = [store.fetch(epoch(PII, LATER, 10), NOW).epochs[PII].id for _ in range(2)]
    assert [key_id.version for key_id in ids] == [1, 2]
    assert store.destroy_epoch(PII) == 1
    for one in (store, other):
        assert one.open_epochs(ids, NOW) == dict.fromkeys(ids, Gone.DESTROYED)
        found = one.fetch(epoch(PII), NOW)
        assert (found.epochs, found.granted, found.sequence) == ({}, {}, 1)
    assert [(line.epoch, line.versions, line.state) for line in store.status(NOW)] == [("2027-01", 0, "destroyed")]


def test_an_epoch_can_be_destroyed_before_it_was_minted(deployment):
    store = deployment.open()
    store.destroy_epoch(PII)
    assert store.fetch(epoch(PII), NOW).epochs == {}
    assert store.open_epochs([KeyId(*PII, 1)], NOW) == {KeyId(*PII, 1): Gone.DESTROYED}


def test_destroyed_and_absent_are_told_apart_by_tombstones(deployment):
    store = deployment.open()
    key = store.fetch(epoch(PII), NOW).epochs[PII]
    absent = [KeyId(*PII, 2), KeyId("pii", PLATFORM, "1999-01", 1)]
    assert store.open_epochs([key.id, *absent], NOW) == {key.id: key} | dict.fromkeys(absent, Gone.ABSENT)
    sids = ["0" * 32, "salt:" + "0" * 32, "-", "", "A" * 32, "é"]
    assert store.open_persons(sids) == dict.fromkeys(sids, Gone.ABSENT)


def test_an_erased_person_starts_anew_and_nobody_else_is_touched(deployment):
    store, other = deployment.open(), deployment.open()
    months = [person(1, month=month) for month in ("2027-01", "2027-02")]
    bystanders = [person(2), person(1, "acme")]
    before = store.fetch(persons([*months, *bystanders]), NOW).persons
    assert store.destroy_person(PLATFORM, months[0].token) == 1
    opened = other.open_persons([one.sid for one in before.values()])
    assert [opened[before[ref].sid] for ref in months] == [Gone.DESTROYED] * 2
    assert [opened[before[ref].sid] for ref in bystanders] == [before[ref] for ref in bystanders]
    after = other.fetch(persons([*months, *bystanders]), NOW).persons
    assert [after[ref] == before[ref] for ref in [*months, *bystanders]] == [False, False, True, True]
    assert not {after[ref].sid for ref in months} & {before[ref].sid for ref in months}


def test_every_destruction_moves_the_sequence_for_all(deployment):
    store, other = deployment.open(), deployment.open()
    assert other.fetch(persons([person(1)]), NOW).sequence == 0
    assert [store.destroy_epoch(PII), store.destroy_person(PLATFORM, b"nobody"), store.destroy_epoch(PII)] == [1, 2, 3]
    assert other.fetch(persons([person(1)]), NOW).sequence == 3
    assert other.renew_lease("worker", NOW + 30, 0) == 3


def test_status_names_what_is_alive_due_and_destroyed(deployment):
    store = deployment.open()
    due, dead = EpochRef("content", "acme", "2027-01-15"), EpochRef("transit", "acme", "2027-01-15T08")
    for ref, deadline_s in ((due, NOW + 5), (dead, LATER), (FOREVER, None)):
        store.fetch(epoch(ref, deadline_s), NOW)
    store.destroy_epoch(dead)
    assert [(line.domain, line.deadline_s, line.state) for line in store.status(NOW + 5)] == [
        ("content", NOW + 5, "due"),
        ("suppression", None, "alive"),
        ("transit", LATER, "destroyed"),
    ]


# --- seals and leases ---------------------------------------------------------------------------------------


def test_seals_are_reserved_in_blocks_and_never_twice(deployment):
    store, other = deployment.open(), deployment.open()
    assert store.fetch(epoch(PII, LATER, 3), NOW).granted == {PII: SEAL_BLOCK}
    assert other.fetch(epoch(PII, LATER, SEAL_BLOCK + 1), NOW).granted == {PII: SEAL_BLOCK + 1}
    assert rows(deployment, "SELECT CAST(seals AS INTEGER) FROM epoch_keys") == [(2 * SEAL_BLOCK + 1,)]


def test_a_key_that_would_pass_its_seals_gets_a_new_version_and_the_old_one_still_opens(deployment):
    limit = 2 * SEAL_BLOCK
    store = deployment.open(max_seals=limit)
    first = store.fetch(epoch(PII, LATER, SEAL_BLOCK + 5), NOW)
    second = store.fetch(epoch(PII, LATER, SEAL_BLOCK - 5), NOW)  # exactly what is left
    third = store.fetch(epoch(PII, LATER + DAY, 1), NOW)
    assert [found.epochs[PII].id.version for found in (first, second, third)] == [1, 1, 2]
    assert first.granted[PII] + second.granted[PII] == limit
    assert third.epochs[PII].key != first.epochs[PII].key
    assert third.epochs[PII].deadline_s == LATER
    ids = [found.epochs[PII].id for found in (first, third)]
    assert all(not isinstance(key, Gone) for key in deployment.open().open_epochs(ids, NOW).values())
    with pytest.raises(ValueError):
        store.fetch(epoch(PII, LATER, limit + 1), NOW)


def test_leases_end_by_time_or_when_dropped(deployment):
    store, other = deployment.open(), deployment.open()
    store.renew_lease("a", NOW + 30, 0)
    store.renew_lease("b", NOW + 10, 0)
    other.destroy_epoch(PII)
    store.renew_lease("a", NOW + 31, 1)
    assert other.leases(NOW) == {"a": 1, "b": 0}
    assert other.leases(NOW + 10) == {"a": 1}
    store.drop_lease("a")
    store.drop_lease("a")
    assert other.leases(NOW) == {"b": 0}


# --- the file itself ----------------------------------------------------------------------------------------


def rows(deployment: Deployment, query: str) -> list[tuple]:
    db = sqlite3.connect(deployment.path)
    try:
        with db:
            return db.execute(query).fetchall()
    finally:
        db.close()


class writer:  # noqa: N801 — reads as a statement of the test
    """Holds the write lock of the store, as another process would."""

    def __init__(self, deployment: Deployment) -> None:
        self.db = sqlite3.connect(deployment.path, isolation_level=None)

    def __enter__(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_) -> None:
        self.db.close()


SWAP_SECRETS = """UPDATE persons SET wrapped = (SELECT wrapped FROM persons AS p WHERE p.rowid = 3 - persons.rowid)"""
MOVE_PERSON = "UPDATE persons SET token = x'00' WHERE rowid = 1"
MOVE_OWNER = "UPDATE persons SET owner = 'acme' WHERE rowid = 1"
MOVE_MONTH = "UPDATE persons SET month = '2027-02' WHERE rowid = 1"
MOVE_DEADLINE = "UPDATE epoch_keys SET deadline_s = deadline_s + 1"
SWAP_EPOCHS = (
    "UPDATE epoch_keys SET wrapped = (SELECT wrapped FROM epoch_keys AS e WHERE e.rowid = 3 - epoch_keys.rowid)"
)


@pytest.mark.parametrize("alteration", [SWAP_SECRETS, MOVE_PERSON, MOVE_OWNER, MOVE_MONTH])
def test_secrets_swapped_between_persons_or_moved_do_not_unwrap(deployment, alteration):
    store = deployment.open()
    found = store.fetch(persons([person(1), person(2)]), NOW).persons
    rows(deployment, alteration)
    with pytest.raises(KeysUnusable, match="altered or damaged"):
        store.open_persons([found[person(1)].sid, found[person(2)].sid])


@pytest.mark.parametrize("alteration", [SWAP_EPOCHS, MOVE_DEADLINE], ids=["swapped", "prolonged"])
def test_epoch_keys_swapped_or_given_another_deadline_do_not_unwrap(deployment, alteration):
    store, other = deployment.open(), EpochRef("pii", PLATFORM, "2027-02")
    ids = [store.fetch(epoch(ref), NOW).epochs[ref].id for ref in (PII, other)]
    rows(deployment, alteration)
    with pytest.raises(KeysUnusable, match="altered or damaged"):
        store.open_epochs(ids, NOW)
    with pytest.raises(KeysUnusable, match="altered or damaged"):
        store.fetch(epoch(PII), NOW)


def test_no_file_holds_a_destroyed_secret_wrapped_or_not_nor_its_mapping(deployment):
    # Given persons added, re-wrapped and mixed over many commits, so that pages split and cells move
    store = deployment.open()
    everyone = [person(n * 2**97 + n * 7919, owner) for n in range(900) for owner in (PLATFORM, "a-longer-account")]
    for start in range(0, len(everyone), 90):
        store.fetch(persons(everyone[start : start + 90], NOW + 30 * DAY), NOW)
    wrapped = "SELECT token, wrapped FROM persons"
    early = rows(deployment, wrapped)
    store.fetch(persons(everyone[::3], None), NOW)
    store.fetch(persons(everyone[1::3]), NOW)
    now = rows(deployment, wrapped)
    secrets = {ref: found.secret for ref, found in store.fetch(persons(everyone, NOW + DAY), NOW).persons.items()}
    # When half of them are erased
    erased = {ref.token for ref in everyone[::4]}
    for token in erased:
        for owner in (PLATFORM, "a-longer-account"):
            store.destroy_person(owner, token)
    # Then their wrapped secrets are in neither the database nor the write-ahead file, and the others' are
    on_disk = deployment.files()
    assert not [1 for token, blob in [*early, *now] if token in erased and blob in on_disk]
    assert not [1 for token, blob in now if token not in erased and blob not in on_disk]
    assert not [1 for ref, secret in secrets.items() if secret in on_disk]
    assert not [1 for (token,) in rows(deployment, "SELECT token FROM persons") if token in erased]


def test_rows_with_secrets_never_move_shrink_or_go_so_that_no_page_keeps_a_stale_copy(deployment):
    store = deployment.open()
    shape = """
        SELECT 'person', rowid, length(owner || month || day), length(token), length(sid), length(wrapped) FROM persons
        UNION ALL
        SELECT 'epoch', rowid, length(domain || owner || epoch || day), length(seals), version, length(wrapped)
        FROM epoch_keys"""
    store.fetch(Needs({PII: (LATER, 10)}, persons([person(1), person(2)]).persons), NOW)
    before = rows(deployment, shape)
    store.fetch(persons([person(1)], None), NOW)
    store.fetch(epoch(PII, LATER, 10 * SEAL_BLOCK), NOW)  # more digits
    store.destroy_person(PLATFORM, person(1).token)
    store.destroy_epoch(PII)
    assert rows(deployment, shape) == before


def test_no_file_holds_a_destroyed_epoch_key_wrapped_or_not(deployment):
    store = deployment.open()
    refs = [EpochRef("content", f"account-{n * 7919 % 400}", "2027-01-15") for n in range(400)]
    for _ in range(3):
        for ref in refs:
            store.fetch(epoch(ref, LATER, SEAL_BLOCK), NOW)
    wrapped = dict(rows(deployment, "SELECT owner, wrapped FROM epoch_keys"))
    for ref in refs[::2]:
        store.destroy_epoch(ref)
    on_disk = deployment.files()
    assert not [1 for ref in refs[::2] if wrapped[ref.owner] in on_disk]
    assert not [1 for ref in refs[1::2] if wrapped[ref.owner] not in on_disk]


def test_a_destruction_that_a_reader_holds_up_says_so_and_can_be_finished(deployment):
    store = deployment.open(busy_timeout_s=0)
    sid = store.fetch(persons([person(1)]), NOW).persons[person(1)].sid
    blob = rows(deployment, "SELECT wrapped FROM persons")[0][0]
    reader = sqlite3.connect(deployment.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM meta").fetchall()
    with pytest.raises(KeysBusy, match="again"):
        store.destroy_person(PLATFORM, person(1).token)
    assert store.open_persons([sid]) == {sid: Gone.DESTROYED}
    reader.close()
    store.destroy_person(PLATFORM, person(1).token)
    assert blob not in deployment.files()


def test_kms_calls_do_not_grow_with_persons(deployment):
    store = deployment.open()
    store.fetch(persons(person(n) for n in range(1000)), NOW)
    store.fetch(persons(person(n) for n in range(2000)), NOW)
    assert store.kms.calls == 1


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


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(KeysUnusable, match=message) as caught:
        call()
    assert isinstance(caught.value, Fatal)
    assert "\n" not in str(caught.value)


def test_a_missing_store_is_made_only_when_asked_for(deployment):
    refused(lambda: deployment.open(create=False), "no key store here")
    assert not deployment.path.exists()
    assert not deployment.kms_folder.exists()


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
    assert deployment.open().token_key().version == 1


def test_without_its_root_key_a_store_does_not_open_and_nothing_is_made(deployment):
    store = deployment.open()
    root = deployment.kms_folder / f"{store.store_id}.root"
    root.rename(root.with_name("taken-away"))
    before = sorted(deployment.kms_folder.iterdir())
    refused(deployment.open, "root key missing beside an existing key store; restore it")
    assert sorted(deployment.kms_folder.iterdir()) == before


def test_another_store_s_root_key_is_found_at_open(deployment, tmp_path):
    store, other = deployment.open(), Deployment(tmp_path / "other")
    theirs = other.kms_folder / f"{other.open().store_id}.root"
    (deployment.kms_folder / f"{store.store_id}.root").write_bytes(theirs.read_bytes())
    other.close()
    refused(deployment.open, "not the one of this key store")


def test_a_missing_kek_is_an_error_that_names_the_day(deployment):
    sid = deployment.open().fetch(persons([person(1)], NOW + DAY), NOW).persons[person(1)].sid
    store = deployment.open()
    store.kms.destroy("2027-01-16")
    refused(lambda: store.open_persons([sid]), "key-encryption key missing")
    with pytest.raises(KeysUnusable) as caught:
        store.open_persons([sid])
    assert caught.value.where["day"] == "2027-01-16"


def test_a_locked_store_is_waited_for_and_nothing_has_happened(deployment):
    store = deployment.open(busy_timeout_s=0)
    calls = [
        lambda: store.fetch(epoch(PII), NOW),
        lambda: store.renew_lease("a", NOW, 0),
        lambda: store.destroy_person(PLATFORM, b"x"),
    ]
    with writer(deployment):
        for call in calls:
            with pytest.raises(KeysBusy) as caught:
                call()
            assert isinstance(caught.value, Retriable)
    assert store.fetch(epoch(PII), NOW).epochs[PII].id.version == 1
    assert store.leases(0) == {}


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


@pytest.mark.parametrize("content", [b"", b"not a database" * 500], ids=["empty", "noise"])
def test_a_file_that_is_no_key_store_is_refused_and_left_as_it_is(deployment, content):
    deployment.path.parent.mkdir()
    deployment.path.write_bytes(content)
    deployment.path.chmod(0o600)
    refused(deployment.open, "no key store|not a key store")
    assert not deployment.kms_folder.exists()


def test_a_corrupt_store_is_an_error_that_says_so(deployment):
    store = deployment.open()
    store.fetch(persons(person(n) for n in range(2000)), NOW)
    store.close()
    content = bytearray(deployment.path.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    deployment.path.write_bytes(bytes(content))
    refused(lambda: deployment.open().fetch(persons(person(n) for n in range(2000)), NOW), "corrupt; restore")


def test_a_store_of_a_newer_version_is_refused(deployment):
    deployment.open().close()
    rows(deployment, "UPDATE meta SET value = 2 WHERE name = 'schema'")
    refused(deployment.open, "another version")


def test_no_repr_or_error_shows_a_secret(deployment):
    store = deployment.open()
    found = store.fetch(persons([person(7)]), NOW)
    assert isinstance(found.persons[person(7)], PersonSecret)
    for text in (repr(store), repr(store.kms), repr(found.persons[person(7)]), repr(store.token_key())):
        assert found.persons[person(7)].secret.hex() not in text
        assert "\\x" not in text
