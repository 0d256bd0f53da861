"""The key store of one deployment: one SQLite file of its own, shared by all processes on a machine.

Rules of this file:
- What it shares with other databases is in streams/keys/sql.py. Shared and exclusive transactions are the same here:
  SQLite has one writer.
- People have a table per month. A wrapped key is destroyed by overwriting it in place. Rows with wrapped keys are only
  appended, never resized (hence the fixed widths), and not deleted while something beside them lives: secure_delete
  zeroes a deleted cell, but when SQLite balances pages it leaves stale copies of cells that moved (measured: 1 in
  10,000 survived a DELETE). When all in a month's table are dead, its rows are deleted in steps, and then the table.
- `person_days` names the generations that have ever had rows in a month's table, so that no scan is for nothing.
- The store appears whole or not at all: it is built under another name and linked into place.
"""

import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from schemas.errors import KeysBusy, KeysFull, KeysUnusable
from schemas.sealed import MAX_SEALS_PER_KEY
from streams.files import sync_folder
from streams.keys.kms_local import check_private, os_error
from streams.keys.sql import STEP, TABLES, Mode, Row, SqlKeyStore, check_version, chunks, first_rows, marks
from streams.keys.store import KmsMaker
from streams.keys.wrapping import FOREVER, GONE, SID_BYTES, WRAPPED_BYTES, generation

_TYPES = {"text": "TEXT", "bytes": "BLOB", "int": "INTEGER", "real": "REAL"}
_SCHEMA = (
    TABLES.format(**_TYPES)
    + "CREATE TABLE person_days (month TEXT NOT NULL, kek TEXT NOT NULL, PRIMARY KEY (month, kek))"
)
_MONTH_TABLE = """
CREATE TABLE {0} (owner TEXT NOT NULL, token BLOB NOT NULL, sid BLOB NOT NULL, kek TEXT NOT NULL,
    wrapped BLOB NOT NULL, tokens TEXT NOT NULL);
CREATE UNIQUE INDEX {0}_person ON {0} (token, owner);
CREATE UNIQUE INDEX {0}_sid ON {0} (sid);
"""
_MONTH = re.compile(r"[0-9]{4}-[0-9]{2}")
_PREFIX = "persons_"
_LOOKED = 50_000
"""Rows that are looked at in one transaction, about 10 ms."""
_OVERWRITE = (
    f"token = randomblob(16), sid = randomblob({SID_BYTES}), wrapped = randomblob({WRAPPED_BYTES}), "
    f"kek = '{GONE}', tokens = '0000'"
)


class SqliteKeyStore(SqlKeyStore):
    """The keys of one deployment (`KeyStore`). One instance may be shared by threads; calls then take turns."""

    def __init__(self, db: sqlite3.Connection, path: Path, clock: Callable[[], float], max_seals: int) -> None:
        super().__init__(clock, max_seals)
        self._db = db
        self._path = path
        self._tables: dict[str, str] | None = None  # month → table, as this transaction sees them

    @classmethod
    def open(
        cls,
        path: Path,
        kms: KmsMaker,
        *,
        create: bool = True,
        clock: Callable[[], float] = time.time,
        busy_timeout_s: float = 10.0,
        max_seals: int = MAX_SEALS_PER_KEY,
        outdated: bool = False,
    ) -> Self:
        """Return the key store at a path; if there is none, make it with its root key and token key.

        A store of the version before is brought up to date. `outdated`: open it even if it is older than the last
        destruction. Blocks on disk, key management service, and up to `busy_timeout_s` on other processes, in this and
        every other call.
        """
        with _translated(path):
            if create and not os.path.lexists(path):
                _create(path, kms)
            try:
                check_private(path.lstat(), path, "600")
            except FileNotFoundError as error:
                raise KeysUnusable("there is no key store here; check the path", path=str(path)) from error
            except OSError as error:
                raise os_error(error, path) from error
            db = _connect(path, busy_timeout_s)
            try:
                _check(db, path)
                db.execute("PRAGMA journal_mode = WAL")
                store = cls(db, path, clock, max_seals)
                store._attach(kms, outdated=outdated)
            except BaseException:
                db.close()
                raise
            return store

    @contextmanager
    def _begun(self, mode: Mode) -> Iterator[None]:
        with _translated(self._path):
            self._db.execute("BEGIN" if mode is Mode.READ else "BEGIN IMMEDIATE")
            self._tables = None
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._db.execute(query, values).fetchall()

    def _run_many(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        self._db.executemany(query, rows)

    def _now_s(self) -> float:
        return self._clock()

    # --- people ----------------------------------------------------------------------------------------------

    def _months(self) -> dict[str, str]:
        """Return month → table; inside a transaction."""
        if self._tables is None:
            query = f"SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB '{_PREFIX}[0-9]*'"
            self._tables = {name.removeprefix(_PREFIX).replace("_", "-"): name for (name,) in self._run(query)}
        return self._tables

    def _month_table(self, month: str) -> str:
        """Return the table of a month, made if it is not there; inside a transaction that writes."""
        if not _MONTH.fullmatch(month):
            raise ValueError("not a month")
        table = self._months().get(month)
        if table is None:
            table = self._months()[month] = _PREFIX + month.replace("-", "_")
            for statement in _statements(_MONTH_TABLE.format(table)):
                self._run(statement)
        return table

    def _find_persons(self, owner: str, month: str, tokens: list[bytes]) -> Iterable[tuple[bytes, bytes, str, bytes]]:
        table = self._months().get(month)
        if table is not None:
            for chunk in chunks(tokens):
                query = f"SELECT token, sid, kek, wrapped FROM {table} WHERE owner = ? AND token IN ({marks(chunk)})"
                yield from self._db.execute(query, (owner, *chunk))

    def _find_tokens(self, tokens: list[bytes]) -> list[Row]:
        return self._find("token", tokens)

    def _find_sids(self, sids: list[bytes]) -> list[Row]:
        return self._find("sid", sids)

    def _find(self, column: str, values: list[bytes]) -> list[Row]:
        found: list[Row] = []
        for month, table in self._months().items():
            for chunk in chunks(values):
                query = f"SELECT owner, token, ?, sid, kek, wrapped FROM {table} WHERE {column} IN ({marks(chunk)})"
                found += self._db.execute(query, (month, *chunk))
        return found

    def _add_persons(self, rows: list[Row], token_version: int) -> Collection[Row]:
        tokens = f"{token_version:04d}"
        for month, some in _by_month(rows):
            self._note_days(month, {row[4] for row in some})
            self._db.executemany(
                f"INSERT INTO {self._month_table(month)} VALUES (?, ?, ?, ?, ?, ?)",
                [(owner, token, sid, kek, wrapped, tokens) for owner, token, _, sid, kek, wrapped in some],
            )
        return ()  # the lock was had before anybody looked

    def _note_days(self, month: str, keks: Iterable[str]) -> None:
        self._run_many("INSERT OR IGNORE INTO person_days VALUES (?, ?)", [(month, kek) for kek in keks])

    def _move_persons(self, moves: list[tuple[str, bytes, Row]]) -> None:
        places = {(row[2], kek) for kek, _, row in moves}
        for month in {month for month, _ in places} & self._months().keys():
            self._note_days(month, [kek for of, kek in places if of == month])
            self._run_many(
                f"UPDATE {self._months()[month]} SET kek = ?, wrapped = ? WHERE sid = ? AND kek < ?",
                [(kek, wrapped, row[3], kek) for kek, wrapped, row in moves if row[2] == month],
            )

    def _forget_persons(self, rows: Collection[Row]) -> None:
        for month, some in _by_month(rows):
            query = f"UPDATE {self._months()[month]} SET {_OVERWRITE} WHERE sid = ?"
            self._db.executemany(query, [(row[3],) for row in some])

    def _persons_under(self, keks: list[str]) -> Iterator[list[Row]]:
        with self._transaction(Mode.READ):
            query = f"SELECT DISTINCT month FROM person_days WHERE kek IN ({marks(keks)})"
            months = [month for (month,) in self._run(query, keks)]
        for month in months:
            last = 0
            while True:
                with self._transaction(Mode.READ):
                    table = self._months().get(month)
                    rows = (
                        []
                        if table is None
                        else self._run(
                            f"SELECT rowid, owner, token, ?, sid, kek, wrapped FROM {table} "
                            f"WHERE rowid > ? AND kek IN ({marks(keks)}) ORDER BY rowid LIMIT {STEP}",
                            (month, last, *keks),
                        )
                    )
                if not rows:
                    break
                last = rows[-1][0]
                yield [row[1:] for row in rows]

    def _sids_of(self, owner: str) -> Iterator[list[bytes]]:
        with self._transaction(Mode.READ):
            months = list(self._months())
        for month in months:
            last = 0
            while True:
                with self._transaction(Mode.READ):
                    table = self._months().get(month)
                    query = (
                        f"SELECT rowid, sid FROM {table} WHERE rowid > ? AND owner = ? AND kek <> ? "
                        f"ORDER BY rowid LIMIT {STEP}"
                    )
                    rows = [] if table is None else self._run(query, (last, owner, GONE))
                if not rows:
                    break
                last = rows[-1][0]
                yield [sid for _, sid in rows]

    def _bury_persons(self, day: str) -> int:
        low, high = f"{day}.", f"{day}/"  # around the generations of the day
        with self._transaction(Mode.READ):
            months = self._run("SELECT DISTINCT month FROM person_days WHERE kek > ? AND kek < ?", (low, high))
        return sum(self._bury_month(month, low, high) for (month,) in months)

    def _bury_month(self, month: str, low: str, high: str) -> int:
        """Overwrite what is under a day in a month's table; if nothing of another day is in it, delete it all."""
        with self._transaction(Mode.READ):
            table = self._months().get(month)
            query = "SELECT 1 FROM person_days WHERE month = ? AND (kek > ? OR kek < ?) LIMIT 1"
            live = self._run(query, (month, high, low))
        change = f"UPDATE {table} SET {_OVERWRITE}" if live else f"DELETE FROM {table}"
        buried, last, above = 0, 0, low if live else ""
        while True:
            with self._transaction(Mode.READ):
                query = f"SELECT rowid, kek FROM {table} WHERE rowid > ? AND kek > ? AND kek < ? ORDER BY rowid LIMIT ?"
                there = month in self._months()  # until another run has deleted it
                rows = self._run(query, (last, above, high, STEP)) if there else []
            if not rows:
                break
            with self._transaction(Mode.EXCLUSIVE):
                if month in self._months():
                    self._run_many(f"{change} WHERE rowid = ? AND kek < ?", [(rowid, high) for rowid, _ in rows])
                    buried += sum(kek > low for _, kek in rows)
            last = rows[-1][0]
        with self._transaction(Mode.EXCLUSIVE):
            table = self._months().get(month)
            if table is not None and not live and not self._run(f"SELECT 1 FROM {table} LIMIT 1"):
                self._run(f"DROP TABLE {table}")
                self._run("DELETE FROM person_days WHERE month = ?", (month,))
            self._run("DELETE FROM person_days WHERE month = ? AND kek > ? AND kek < ?", (month, low, high))
        return buried

    def _has_persons(self, keks: list[str]) -> bool:
        under = f"kek IN ({marks(keks)})"
        months = self._run(f"SELECT DISTINCT month FROM person_days WHERE {under}", keks)
        tables = [self._months()[month] for (month,) in months if month in self._months()]
        return any(self._run(f"SELECT 1 FROM {table} WHERE {under} LIMIT 1", keks) for table in tables)

    def _has_tokens(self, version: int) -> bool:
        with self._transaction(Mode.READ):
            months = list(self._months())
        return any(self._month_has_tokens(month, f"{version:04d}") for month in months)

    def _month_has_tokens(self, month: str, version: str) -> bool:
        last = 0
        while True:
            with self._transaction(Mode.READ):
                table = self._months().get(month)
                if table is None:
                    return False
                query = f"SELECT max(rowid), max(tokens = ?) FROM (SELECT rowid, tokens FROM {table} "
                query += f"WHERE rowid > ? ORDER BY rowid LIMIT {_LOOKED})"
                ((last, found),) = self._run(query, (version, last))
            if last is None or found:
                return bool(found)

    def _settle(self) -> None:
        with self._lock, _translated(self._path):
            busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise KeysBusy("destroyed, but a reader keeps the write-ahead file; destroy again to finish")

    def _close(self) -> None:
        self._db.close()


def _by_month(rows: Iterable[Row]) -> Iterable[tuple[str, list[Row]]]:
    months: dict[str, list[Row]] = {}
    for row in rows:
        months.setdefault(row[2], []).append(row)
    return months.items()


def _statements(script: str) -> list[str]:
    return [statement for statement in script.split(";") if statement.strip()]


def _create(path: Path, open_kms: KmsMaker) -> None:
    """Make a whole key store appear at a path, with its root key and token key; or find that another process did."""
    store_id = secrets.token_hex(16)
    draft = path.with_name(f".{path.name}.{store_id}")
    if os.path.lexists(f"{path}-wal") and not os.path.lexists(path):
        raise KeysUnusable("key store missing beside its write-ahead file; restore it from its backup", path=str(path))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kms = open_kms(store_id, True)  # first: without a store it is harmless, the other way round is not
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        with closing(kms), closing(_connect(draft, 0)) as db:
            db.execute("BEGIN")
            for statement in _statements(_SCHEMA):
                db.execute(statement)
            for query, values in first_rows(kms, store_id):
                db.execute(query, values)
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


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Bring a store of version 1 up to date. Raises KeysUnusable if the file is no whole store of this version."""
    meta = _read_meta(db)
    if meta.get("schema") == 1:
        _migrate(db)
        meta = _read_meta(db)
    check_version(meta)
    with closing(sqlite3.connect(":memory:")) as whole:
        whole.executescript(_SCHEMA)
        if _columns(whole) - _columns(db):
            raise KeysUnusable("the key store lacks a table or column; restore it from its backup", path=str(path))


def _read_meta(db: sqlite3.Connection) -> dict[str, Any]:
    """Return the meta table; empty if there is none."""
    try:
        return dict(db.execute("SELECT name, value FROM meta"))
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_ERROR:  # anything but: no such table
            raise
        return {}


def _columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    query = "SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c WHERE m.type = 'table'"
    return set(db.execute(query))


_VERSION_1 = ("meta", "wrapping_keys", "token_keys", "epoch_keys", "persons", "sid_tombstones", "leases")
_FROM_VERSION_1 = f"""
INSERT INTO meta SELECT name, CASE name WHEN 'schema' THEN '2' WHEN 'root_check' THEN lower(hex(value))
    ELSE CAST(value AS TEXT) END FROM old_meta;
INSERT INTO meta VALUES ('tokens_changing', '0');
INSERT INTO wrapping_keys SELECT day || '.0001', wrapped FROM old_wrapping_keys;
INSERT INTO token_keys SELECT version, iif(version = (SELECT max(version) FROM old_token_keys), 'current', 'earlier'),
    '{generation(FOREVER, 1)}', wrapped FROM old_token_keys;
INSERT INTO epoch_keys SELECT domain, owner, epoch, version, iif(at_s IS NULL, day || '.0001', '{GONE}'), deadline_s,
    wrapped, seals FROM old_epoch_keys LEFT JOIN epoch_tombstones USING (domain, owner, epoch);
INSERT INTO epoch_keys SELECT domain, owner, epoch, 0, '{GONE}', NULL, randomblob({WRAPPED_BYTES}), '0000000000'
    FROM epoch_tombstones LEFT JOIN old_epoch_keys USING (domain, owner, epoch) WHERE version IS NULL;
INSERT INTO sid_tombstones SELECT sid, at_s FROM old_sid_tombstones;
INSERT INTO person_days SELECT DISTINCT month, day || '.0001' FROM old_persons;
DROP TABLE epoch_tombstones;
"""


def _migrate(db: sqlite3.Connection) -> None:
    """Bring a store of version 1 to version 2, in one transaction; nothing if another process did.

    Its days stay: there, what dies at a midnight is under the day that begins with it, and its secrets a day longer.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        if _read_meta(db).get("schema") == 1:
            for table in _VERSION_1:
                db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
            for statement in _statements(_SCHEMA + ";" + _FROM_VERSION_1):
                db.execute(statement)
            for (month,) in db.execute("SELECT DISTINCT month FROM old_persons").fetchall():
                table = _PREFIX + month.replace("-", "_")
                for statement in _statements(_MONTH_TABLE.format(table)):
                    db.execute(statement)
                db.execute(
                    f"INSERT INTO {table} SELECT owner, token, sid, day || '.0001', wrapped, "
                    "(SELECT printf('%04d', max(version)) FROM token_keys) FROM old_persons WHERE month = ?",
                    (month,),
                )
            for table in _VERSION_1:
                db.execute(f"DROP TABLE old_{table}")
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


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
