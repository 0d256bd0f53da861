"""The key store of one deployment: one SQLite file of its own, shared by all processes on a machine.

Rules of this file:
- Every secret is wrapped by the random wrapping key of its destruction day, and that one by the KMS. The AAD names the
  row, so that no two rows can be swapped and no deadline moved.
- A wrapped key is destroyed by overwriting it in place. Rows of `epoch_keys` and `persons` are only appended, never
  resized (hence the fixed widths), and not deleted while their KEK lives: secure_delete zeroes a deleted cell, but
  when SQLite balances pages it leaves stale copies of cells that moved (measured: 1 in 10,000 survived a DELETE).
- A transaction reads the destruction sequence first; keys cached in memory are dropped when it moved.
- The store appears whole or not at all: it is built under another name and linked into place.
"""

import os
import secrets
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from processors.keyring import EpochKey, EpochRef, Needs, PersonRef, PersonSecret
from schemas.errors import KeysBusy, KeysFull, KeysUnusable
from schemas.sealed import MAX_SEALS_PER_KEY, NONCE_BYTES, SECRET_BYTES, KeyId, framed
from streams.keys.kms_local import LocalKms, check_private, os_error, sync_folder
from streams.keys.store import NEVER, Fetched, Gone, KeyStatus, TokenKey

SCHEMA_VERSION = 1
SEAL_BLOCK = 2**20
"""Seals reserved at a time, so that a process writes here once in a million seals of an epoch."""

_FOREVER = NEVER.ljust(10)  # every day in this file has ten characters
_SID_BYTES = 16
_WRAPPED_BYTES = NONCE_BYTES + SECRET_BYTES + 16
_PERSON_DRAW = struct.Struct(f"{_SID_BYTES}s{SECRET_BYTES}s{NONCE_BYTES}s")
_CHUNK = 500  # values in one IN list
_MAX_CIPHERS = 1024  # wrapping keys held in memory
_STALE_LEASE_S = 86_400.0

_SCHEMA = """
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
_OVERWRITE_PERSON = f"token = randomblob(16), sid = randomblob({_SID_BYTES}), wrapped = randomblob({_WRAPPED_BYTES})"


class SqliteKeyStore:
    """The keys of one deployment (`KeyStore`). One instance may be shared by threads; calls then take turns."""

    def __init__(
        self, db: sqlite3.Connection, path: Path, kms_folder: Path, clock: Callable[[], float], max_seals: int
    ) -> None:
        self._db = db
        self._path = path
        self._clock = clock
        self._max_seals = max_seals
        self._lock = threading.Lock()
        self._sequence = -1
        self._ciphers: dict[str, AESGCM] = {}  # destruction day → wrapping key
        meta = _read_meta(db, path)
        self.store_id: str = meta["store_id"]
        self.kms = LocalKms.open(kms_folder, self.store_id)
        if not secrets.compare_digest(self.kms.check, meta["root_check"]):
            raise KeysUnusable(
                "the root key is not the one of this key store; restore the right one from its backup",
                path=str(kms_folder),
            )

    def __repr__(self) -> str:
        return f"SqliteKeyStore({self.store_id})"

    @classmethod
    def open(
        cls,
        path: Path,
        kms_folder: Path,
        *,
        create: bool = True,
        clock: Callable[[], float] = time.time,
        busy_timeout_s: float = 10.0,
        max_seals: int = MAX_SEALS_PER_KEY,
    ) -> Self:
        """Return the key store at a path; if there is none, make it with its root key and token key.

        Blocks on the disk, and up to `busy_timeout_s` on other processes, in this and every other call.
        """
        with _translated(path):
            if create and not os.path.lexists(path):
                _create(path, kms_folder)
            try:
                check_private(path.lstat(), path, "600")
            except FileNotFoundError as error:
                raise KeysUnusable("there is no key store here; check the path", path=str(path)) from error
            except OSError as error:
                raise os_error(error, path) from error
            db = _connect(path, busy_timeout_s)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return cls(db, path, kms_folder, clock, max_seals)
            except BaseException:
                db.close()
                raise

    def close(self) -> None:
        """Free the file and forget the wrapping keys; idempotent."""
        with self._lock:
            self._ciphers.clear()
            self._db.close()

    # --- keys for sealing ------------------------------------------------------------------------------------

    def token_key(self) -> TokenKey:
        """Return the newest token key, made together with the store."""
        with self._transaction("DEFERRED"):
            row = self._db.execute("SELECT version, wrapped FROM token_keys ORDER BY version DESC LIMIT 1").fetchone()
            if row is None:
                raise KeysUnusable("the key store has no token key; restore it from its backup", path=str(self._path))
            version, wrapped = row
            return TokenKey(version, _opened(self._cipher(_FOREVER), wrapped, _token_aad(version)))

    def fetch(self, needs: Needs, now_s: int) -> Fetched:
        """Get or create what is needed, as `KeyStore.fetch`; takes the write lock only to create or to reserve.

        A person whose deadline is at or before `now_s` is left out. A secret whose day is over is dead: its sid gets a
        tombstone and the person a new secret.
        """
        today = _day(now_s)
        days = {ref: _day(deadline) for ref, deadline in needs.persons.items() if _alive(deadline, now_s)}
        with self._transaction("DEFERRED") as sequence:
            persons, _ = self._known_persons(days)
        missing = {ref: day for ref, day in days.items() if ref not in persons}
        epochs: dict[EpochRef, EpochKey] = {}
        granted: dict[EpochRef, int] = {}
        if missing or needs.epochs:
            with self._transaction("IMMEDIATE"):  # the first sequence stays: it is the one all of this is true for
                persons |= self._create_persons(missing, today)
                for epoch_ref, (deadline_s, seals) in needs.epochs.items():
                    self._reserve(epoch_ref, deadline_s, seals, now_s, epochs, granted)
        return Fetched(epochs, granted, persons, sequence)

    def _known_persons(
        self, days: Mapping[PersonRef, str]
    ) -> tuple[dict[PersonRef, PersonSecret], list[tuple[PersonRef, bytes, str, bytes]]]:
        """Return the secrets kept to their day at least, and the rows of those that are not: ref, sid, day, wrapped."""
        groups: dict[tuple[str, str], dict[bytes, tuple[PersonRef, str]]] = {}
        for ref, wanted in days.items():
            groups.setdefault((ref.owner, ref.month), {})[ref.token] = ref, wanted
        persons: dict[PersonRef, PersonSecret] = {}
        short: list[tuple[PersonRef, bytes, str, bytes]] = []
        for (owner, month), refs in groups.items():
            head = _person_aad_head(owner, month)
            for chunk in _chunks(list(refs)):
                query = (
                    "SELECT token, sid, day, wrapped FROM persons "
                    f"WHERE owner = ? AND month = ? AND token IN ({_marks(chunk)})"
                )
                for token, sid, day, wrapped in self._db.execute(query, (owner, month, *chunk)):
                    ref, wanted = refs[token]
                    if day >= wanted:
                        cipher = self._ciphers.get(day) or self._cipher(day)
                        persons[ref] = PersonSecret(sid.hex(), _opened(cipher, wrapped, head + sid + token))
                    else:
                        short.append((ref, sid, day, wrapped))
        return persons, short

    def _person(self, ref: PersonRef, sid: bytes, day: str, wrapped: bytes) -> PersonSecret:
        return PersonSecret(sid.hex(), _opened(self._cipher(day), wrapped, _person_aad(ref, sid)))

    def _create_persons(self, missing: Mapping[PersonRef, str], today: str) -> dict[PersonRef, PersonSecret]:
        """Return a secret for each, kept to its day at least: the winner's, re-wrapped or new."""
        persons, short = self._known_persons(missing)
        rewrapped: list[tuple[str, bytes, bytes]] = []
        dead: list[bytes] = []
        for ref, sid, day, wrapped in short:
            if day < today:
                dead.append(sid)
                continue
            persons[ref] = self._person(ref, sid, day, wrapped)
            later = self._cipher(missing[ref], make=True)
            again = _sealed(later, persons[ref].secret, _person_aad(ref, sid))
            rewrapped.append((missing[ref], again, sid))
        self._bury_persons(dead)
        self._db.executemany("UPDATE persons SET day = ?, wrapped = ? WHERE sid = ?", rewrapped)
        made: list[tuple[str, bytes, str, bytes, str, bytes]] = []
        new = [ref for ref in missing if ref not in persons]
        draws = _PERSON_DRAW.iter_unpack(os.urandom(_PERSON_DRAW.size * len(new)))  # one call of the system for all
        for ref, (sid, secret, nonce) in zip(new, draws, strict=True):
            day = missing[ref]
            cipher = self._ciphers.get(day) or self._cipher(day, make=True)
            wrapped = nonce + cipher.encrypt(nonce, secret, _person_aad(ref, sid))
            made.append((ref.owner, ref.token, ref.month, sid, day, wrapped))
            persons[ref] = PersonSecret(sid.hex(), secret)
        self._db.executemany("INSERT INTO persons VALUES (?, ?, ?, ?, ?, ?)", made)
        return persons

    def _reserve(
        self,
        ref: EpochRef,
        deadline_s: int | None,
        seals: int,
        now_s: int,
        epochs: dict[EpochRef, EpochKey],
        granted: dict[EpochRef, int],
    ) -> None:
        """Put the epoch's key and a block of seals into `epochs` and `granted`, unless it is dead."""
        if seals > self._max_seals:
            raise ValueError("more seals asked for than one key may give")
        if not _alive(deadline_s, now_s) or self._has_tombstone(ref):
            return
        row = self._db.execute(
            "SELECT version, deadline_s, day, wrapped, seals FROM epoch_keys "
            "WHERE domain = ? AND owner = ? AND epoch = ? ORDER BY version DESC LIMIT 1",
            ref,
        ).fetchone()
        version, used = 0, self._max_seals
        if row is not None:
            version, deadline_s, day, wrapped = row[:4]
            used = int(row[4])
            if not _alive(deadline_s, now_s):
                return
        if row is not None and used + seals <= self._max_seals:
            key_id = KeyId(*ref, version)
            key = _opened(self._cipher(day), wrapped, _epoch_aad(key_id, deadline_s))
        else:
            key_id, key, used, day = KeyId(*ref, version + 1), os.urandom(SECRET_BYTES), 0, _day(deadline_s)
            wrapped = _sealed(self._cipher(day, make=True), key, _epoch_aad(key_id, deadline_s))
            self._db.execute(
                "INSERT INTO epoch_keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*key_id, day, deadline_s, wrapped, _count(0)),
            )
        granted[ref] = min(max(seals, SEAL_BLOCK), self._max_seals - used)
        self._db.execute(
            "UPDATE epoch_keys SET seals = ? WHERE domain = ? AND owner = ? AND epoch = ? AND version = ?",
            (_count(used + granted[ref]), *key_id),
        )
        epochs[ref] = EpochKey(key_id, key, deadline_s)

    # --- leases ----------------------------------------------------------------------------------------------

    def renew_lease(self, process_id: str, expires_s: float, seen_sequence: int) -> int:
        """Extend a lease to `expires_s` (Unix s), durable on return; return the current destruction sequence."""
        with self._transaction("IMMEDIATE") as sequence:
            self._db.execute(
                "INSERT INTO leases VALUES (?, ?, ?) "
                "ON CONFLICT (process_id) DO UPDATE SET expires_s = excluded.expires_s, seen = excluded.seen",
                (process_id, expires_s, seen_sequence),
            )
            self._db.execute("DELETE FROM leases WHERE expires_s < ?", (expires_s - _STALE_LEASE_S,))
        return sequence

    def drop_lease(self, process_id: str) -> None:
        """End a process's lease at once; idempotent."""
        with self._transaction("IMMEDIATE"):
            self._db.execute("DELETE FROM leases WHERE process_id = ?", (process_id,))

    def leases(self, now_s: float) -> Mapping[str, int]:
        """Return process id → destruction sequence seen, of the leases alive at `now_s`."""
        with self._transaction("DEFERRED"):
            return dict(self._db.execute("SELECT process_id, seen FROM leases WHERE expires_s > ?", (now_s,)))

    # --- keys for opening ------------------------------------------------------------------------------------

    def open_epochs(self, ids: Iterable[KeyId], now_s: int) -> dict[KeyId, EpochKey | Gone]:
        """Return the keys named, each alive at `now_s`, or why it is gone."""
        found: dict[KeyId, EpochKey | Gone] = {}
        with self._transaction("DEFERRED"):
            for key_id in ids:
                row = self._db.execute(
                    "SELECT deadline_s, day, wrapped FROM epoch_keys "
                    "WHERE domain = ? AND owner = ? AND epoch = ? AND version = ?",
                    key_id,
                ).fetchone()
                if self._has_tombstone(EpochRef(*key_id[:3])) or (row and not _alive(row[0], now_s)):
                    found[key_id] = Gone.DESTROYED
                elif row is None:
                    found[key_id] = Gone.ABSENT
                else:
                    deadline_s, day, wrapped = row
                    key = _opened(self._cipher(day), wrapped, _epoch_aad(key_id, deadline_s))
                    found[key_id] = EpochKey(key_id, key, deadline_s)
        return found

    def open_persons(self, sids: Iterable[str]) -> dict[str, PersonSecret | Gone]:
        """Return the secrets named by sid, or why each is gone; one whose day is over by the clock is destroyed."""
        found: dict[str, PersonSecret | Gone] = dict.fromkeys(sids, Gone.ABSENT)
        today = _day(int(self._clock()))
        with self._transaction("DEFERRED"):
            for chunk in _chunks([sid for text in found if (sid := _sid(text))]):
                query = f"SELECT owner, token, month, sid, day, wrapped FROM persons WHERE sid IN ({_marks(chunk)})"
                for owner, token, month, sid, day, wrapped in self._db.execute(query, chunk):
                    text = sid.hex()
                    if day < today:
                        found[text] = Gone.DESTROYED
                        continue
                    cipher = self._ciphers.get(day) or self._cipher(day)
                    aad = _person_aad_head(owner, month) + sid + token
                    found[text] = PersonSecret(text, _opened(cipher, wrapped, aad))
                query = f"SELECT sid FROM sid_tombstones WHERE sid IN ({_marks(chunk)})"
                for (sid,) in self._db.execute(query, chunk):
                    found[sid.hex()] = Gone.DESTROYED
        return found

    # --- destruction -----------------------------------------------------------------------------------------

    def destroy_epoch(self, ref: EpochRef) -> int:
        """Destroy all versions of an epoch key, leave a tombstone, and return the new destruction sequence.

        On return no file of the store holds them, wrapped or not. May raise KeysBusy when they are destroyed but
        still in the write-ahead file; calling again finishes it.
        """
        with self._transaction("IMMEDIATE") as sequence:
            self._db.execute(
                "UPDATE epoch_keys SET wrapped = randomblob(?) WHERE domain = ? AND owner = ? AND epoch = ?",
                (_WRAPPED_BYTES, *ref),
            )
            self._db.execute("INSERT OR IGNORE INTO epoch_tombstones VALUES (?, ?, ?, ?)", (*ref, int(self._clock())))
            self._bump(sequence)
        self._truncate()
        return sequence + 1

    def destroy_person(self, owner: str, token: bytes) -> int:
        """Destroy an owner's secrets of a person and what maps to their sids, and return the new sequence.

        The sids get tombstones. Durability and KeysBusy as `destroy_epoch`.
        """
        with self._transaction("IMMEDIATE") as sequence:
            rows = self._db.execute("SELECT sid FROM persons WHERE owner = ? AND token = ?", (owner, token))
            self._bury_persons([sid for (sid,) in rows.fetchall()])
            self._bump(sequence)
        self._truncate()
        return sequence + 1

    def _bury_persons(self, sids: list[bytes]) -> None:
        """Tombstone the sids and overwrite their rows in place; what is left of a row names nobody."""
        at_s = int(self._clock())
        self._db.executemany("INSERT OR IGNORE INTO sid_tombstones VALUES (?, ?)", [(sid, at_s) for sid in sids])
        self._db.executemany(f"UPDATE persons SET {_OVERWRITE_PERSON} WHERE sid = ?", [(sid,) for sid in sids])

    def _bump(self, sequence: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE name = 'destruction_seq'", (sequence + 1,))

    def _truncate(self) -> None:
        with self._lock, _translated(self._path):
            busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise KeysBusy("destroyed, but a reader keeps the write-ahead file; destroy again to finish")

    def _has_tombstone(self, ref: EpochRef) -> bool:
        query = "SELECT 1 FROM epoch_tombstones WHERE domain = ? AND owner = ? AND epoch = ?"
        return self._db.execute(query, ref).fetchone() is not None

    def status(self, now_s: int) -> list[KeyStatus]:
        """Return the epoch keys, tombstones included, by domain, owner and epoch."""
        with self._transaction("DEFERRED"):
            query = "SELECT domain, owner, epoch, count(*), max(deadline_s) FROM epoch_keys GROUP BY 1, 2, 3"
            rows = {EpochRef(*row[:3]): (row[3], row[4]) for row in self._db.execute(query)}
            dead = {EpochRef(*row) for row in self._db.execute("SELECT domain, owner, epoch FROM epoch_tombstones")}
        lines = []
        for ref in sorted(rows.keys() | dead):
            versions, deadline_s = rows.get(ref, (0, None))
            if ref in dead:
                lines.append(KeyStatus(*ref, 0, deadline_s, "destroyed"))
            else:
                lines.append(KeyStatus(*ref, versions, deadline_s, "alive" if _alive(deadline_s, now_s) else "due"))
        return lines

    # --- below all of them -----------------------------------------------------------------------------------

    def _cipher(self, day: str, *, make: bool = False) -> AESGCM:
        """Return the wrapping key of a day; inside a transaction. `make`: create it if it does not exist."""
        cipher = self._ciphers.get(day)
        if cipher is None:
            row = self._db.execute("SELECT wrapped FROM wrapping_keys WHERE day = ?", (day,)).fetchone()
            if row is not None:
                key = self.kms.unwrap(day.rstrip(), row[0])
            elif make:
                key = secrets.token_bytes(SECRET_BYTES)
                self._db.execute("INSERT INTO wrapping_keys VALUES (?, ?)", (day, self.kms.wrap(day.rstrip(), key)))
            else:
                raise KeysUnusable("wrapping key missing; restore the key store from its backup", day=day.rstrip())
            if len(self._ciphers) >= _MAX_CIPHERS:
                self._ciphers.clear()
            cipher = self._ciphers[day] = AESGCM(key)
        return cipher

    @contextmanager
    def _transaction(self, mode: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[int]:
        """Run one transaction, rolled back on any error; gives the destruction sequence at its start."""
        with self._lock, _translated(self._path):
            self._db.execute(f"BEGIN {mode}")
            try:
                (sequence,) = self._db.execute("SELECT value FROM meta WHERE name = 'destruction_seq'").fetchone()
                if sequence != self._sequence:
                    self._ciphers.clear()
                    self._sequence = sequence
                yield sequence
                self._db.execute("COMMIT")
            except BaseException:
                self._ciphers.clear()  # it may hold a wrapping key that was not written
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise


def _create(path: Path, kms_folder: Path) -> None:
    """Make a whole key store appear at a path, with its root key and token key; or find that another process did."""
    store_id = secrets.token_hex(16)
    draft = path.with_name(f".{path.name}.{store_id}")
    if os.path.lexists(f"{path}-wal") and not os.path.lexists(path):
        raise KeysUnusable("key store missing beside its write-ahead file; restore it from its backup", path=str(path))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kms = LocalKms.create(kms_folder, store_id)  # first: without a store it is harmless, the other way round is not
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        with closing(_connect(draft, 0)) as db:
            day_key, token_key = secrets.token_bytes(SECRET_BYTES), secrets.token_bytes(SECRET_BYTES)
            db.executescript(f"BEGIN; {_SCHEMA}")
            db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [
                    ("schema", SCHEMA_VERSION),
                    ("store_id", store_id),
                    ("root_check", kms.check),
                    ("destruction_seq", 0),
                ],
            )
            db.execute("INSERT INTO wrapping_keys VALUES (?, ?)", (_FOREVER, kms.wrap(NEVER, day_key)))
            wrapped = _sealed(AESGCM(day_key), token_key, _token_aad(1))
            db.execute("INSERT INTO token_keys VALUES (1, ?)", (wrapped,))
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL")
        with suppress(FileExistsError):
            os.link(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise os_error(error, path) from error
    finally:
        for leftover in (draft, *(draft.with_name(draft.name + end) for end in ("-journal", "-wal", "-shm"))):
            leftover.unlink(missing_ok=True)


def _connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode=rw"
    db = sqlite3.connect(uri, uri=True, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("synchronous = FULL", "secure_delete = ON", "temp_store = MEMORY", "cache_size = -32768"):
            db.execute(f"PRAGMA {pragma}")
    except BaseException:
        db.close()
        raise
    return db


def _read_meta(db: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """Return the meta table. Raises KeysUnusable if the file is no key store that this version understands."""
    try:
        meta = dict(db.execute("SELECT name, value FROM meta"))
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_ERROR:  # anything but: no such table
            raise
        meta = {}
    if "schema" not in meta:
        raise KeysUnusable("this file is not a key store; check the path", path=str(path))
    if meta["schema"] != SCHEMA_VERSION:
        raise KeysUnusable(
            "the key store was made by another version of the program; use that one",
            path=str(path),
            schema=meta["schema"],
        )
    return meta


_PROBLEMS = {
    sqlite3.SQLITE_CORRUPT: "the key store is corrupt; restore it from its backup",
    sqlite3.SQLITE_NOTADB: "the key store is corrupt, or no key store; restore it from its backup",
    sqlite3.SQLITE_READONLY: "the key store cannot be written; check the owner and mode of file and folder",
    sqlite3.SQLITE_CANTOPEN: "the key store cannot be opened; check the owner and mode of file and folder",
    sqlite3.SQLITE_PERM: "the key store cannot be opened; check the owner and mode of file and folder",
    sqlite3.SQLITE_IOERR: "the disk of the key store fails; check the disk",
}


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours; what is none of them is a bug and stays as it is.

    The statements are right, so SQLite finds one wrong, or a text that is none, only where the file was damaged.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise KeysUnusable(_PROBLEMS[sqlite3.SQLITE_CORRUPT], path=str(path)) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)  # errors of the Python module itself have none
        primary = code & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise KeysBusy(path=str(path)) from error
        if primary == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE:
            raise KeysFull(path=str(path)) from error
        if primary in _PROBLEMS:
            raise KeysUnusable(_PROBLEMS[primary], path=str(path)) from error
        if isinstance(error, sqlite3.OperationalError):
            raise KeysUnusable(_PROBLEMS[sqlite3.SQLITE_CORRUPT], path=str(path)) from error
        raise


def _alive(deadline_s: int | None, now_s: int) -> bool:
    return deadline_s is None or deadline_s > now_s


@lru_cache(maxsize=4096)
def _day(deadline_s: int | None) -> str:
    """Return the destruction day of a deadline, its UTC date. Days compare as text; `_FOREVER` is after them all."""
    return _FOREVER if deadline_s is None else datetime.fromtimestamp(deadline_s, UTC).date().isoformat()


def _count(seals: int) -> str:
    return f"{seals:010d}"


def _sid(text: str) -> bytes | None:
    """Return the bytes of a sid, or None if the text is none (a salt, for instance)."""
    try:
        sid = bytes.fromhex(text)
    except ValueError:
        return None
    return sid if sid.hex() == text and len(sid) == _SID_BYTES else None


def _chunks(values: list[bytes]) -> Iterator[list[bytes]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def _marks(values: Sequence[bytes]) -> str:
    return ",".join("?" * len(values))


def _token_aad(version: int) -> bytes:
    return framed(b"token", b"%d" % version)


def _epoch_aad(key_id: KeyId, deadline_s: int | None) -> bytes:
    deadline = b"" if deadline_s is None else b"%d" % deadline_s
    return framed(b"epoch", *(str(part).encode() for part in key_id), deadline)


def _person_aad(ref: PersonRef, sid: bytes) -> bytes:
    return _person_aad_head(ref.owner, ref.month) + sid + ref.token  # sids have one length


@lru_cache(maxsize=4096)
def _person_aad_head(owner: str, month: str) -> bytes:
    return framed(b"person", owner.encode(), month.encode())


def _sealed(cipher: AESGCM, key: bytes, aad: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, key, aad)


def _opened(cipher: AESGCM, wrapped: bytes, aad: bytes) -> bytes:
    try:
        return cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad)
    except (InvalidTag, ValueError) as error:
        raise KeysUnusable("a row of the key store was altered or damaged; restore it from its backup") from error
