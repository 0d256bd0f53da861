"""The key store of one deployment on a PostgreSQL server, shared by processes on several machines.

Rules of this file:
- Who writes holds an advisory lock to the end of the transaction: shared by those that add people, exclusive for what
  destroys, re-wraps or mints. Rows are locked in the order of month, owner and token.
- People are partitioned by month of communication. A month's partition is made by whoever needs it first, and dropped
  with the last day on which something in it dies; what dies before is deleted.
- A table is read from end to end by pages, so that no statement takes long. `IS TRUE` keeps a condition from an index.
- The server's clock is the store's, not those of the machines.
- What was deleted or overwritten stays in dead rows, in the write-ahead log and in backups until PostgreSQL has used
  the space again. It is wrapped, and nothing opens it once its day is over or was re-wrapped.
"""

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, Self

from schemas.errors import KeysBusy, KeysUnusable
from schemas.sealed import MAX_SEALS_PER_KEY
from streams.config import Postgres
from streams.keys.postgres_line import SCHEMA, Ids, Line
from streams.keys.sql import SCHEMA_VERSION, STEP, TABLES, Mode, Row, SqlKeyStore, check_version, chunks, first_rows
from streams.keys.store import KmsMaker

_TYPES: Final = {"text": 'text COLLATE "C"', "bytes": "bytea", "int": "bigint", "real": "double precision"}
_PERSONS: Final = """
CREATE TABLE persons (owner {text} NOT NULL, token {bytes} NOT NULL, month {text} NOT NULL, sid {bytes} NOT NULL,
    kek {text} NOT NULL, wrapped {bytes} NOT NULL, token_version {int} NOT NULL,
    PRIMARY KEY (token, owner, month)) PARTITION BY LIST (month);
CREATE INDEX persons_sid ON persons (sid);
CREATE INDEX persons_kek ON persons (kek);
CREATE INDEX persons_token_version ON persons (token_version);
"""
MIGRATIONS: Final = ((SCHEMA_VERSION, (TABLES + _PERSONS).format(**_TYPES)),)
"""The version that each leads to, in order, and its statements: one transaction each."""

_KEYS_LOCK: Final = 1
_TABLES_LOCK: Final = 2
_BEGIN: Final = {
    Mode.READ: "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    Mode.SHARE: f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock_shared({_KEYS_LOCK})",
    Mode.EXCLUSIVE: f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock({_KEYS_LOCK})",
}
_BEGIN_TABLES: Final = f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock({_TABLES_LOCK})"
_PERSON: Final = "owner, token, month, sid, kek, wrapped"
_MONTH: Final = re.compile(r"[0-9]{4}-[0-9]{2}")
_PAGES: Final = 256
"""Pages that are read or cleaned in one transaction: 2 MiB, about 10,000 people."""
_DROP_WAIT_MS: Final = 1000
_VACUUM: Final = "autovacuum_vacuum_scale_factor = 0.02"  # of dead rows little is kept; a backup has less to carry


class PostgresKeyStore(SqlKeyStore):
    """The keys of one deployment (`KeyStore`). One instance may be shared by threads; calls then take turns."""

    def __init__(self, line: Line, clock: Callable[[], float], max_seals: int) -> None:
        super().__init__(clock, max_seals)
        self._line = line

    @classmethod
    def open(
        cls,
        settings: Postgres,
        kms: KmsMaker,
        *,
        create: bool = True,
        clock: Callable[[], float] = time.time,
        busy_timeout_s: float = 10.0,
        max_seals: int = MAX_SEALS_PER_KEY,
        outdated: bool = False,
    ) -> Self:
        """Return the key store of a database; if there is none, make it with its root key and token key.

        An older version is brought up to date first. Blocks on the server, and up to `busy_timeout_s` on other
        processes, in this and every other call. `clock` is this machine's, and only bounds how long wrapping keys stay
        in memory. `outdated`: open also what a backup brought back.
        """
        line = Line(settings, busy_timeout_s)
        store = cls(line, clock, max_seals)
        try:
            _migrate(line, kms, create=create)
            store._attach(kms, outdated=outdated)
        except BaseException:
            line.close()
            raise
        return store

    # --- what the database fills in --------------------------------------------------------------------------

    @contextmanager
    def _begun(self, mode: Mode) -> Iterator[None]:
        with self._line.transaction(_BEGIN[mode]):
            yield

    def _run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        cursor = self._line.execute(translated(query), values)
        return cursor.fetchall() if cursor.description else []

    def _run_many(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._line.execute_many(translated(query), rows)

    def _now_s(self) -> float:
        now_s: float = self._run("SELECT extract(epoch FROM clock_timestamp())::float8")[0][0]
        return now_s

    def _find_persons(self, owner: str, month: str, tokens: list[bytes]) -> list[tuple[bytes, bytes, str, bytes]]:
        query = "SELECT token, sid, kek, wrapped FROM persons WHERE owner = ? AND month = ? AND token = ANY(?::bytea[])"
        return self._run(query, (owner, month, Ids(tokens)))

    def _find_tokens(self, tokens: list[bytes]) -> list[Row]:
        return self._run(f"SELECT {_PERSON} FROM persons WHERE token = ANY(?::bytea[])", (tokens,))

    def _find_sids(self, sids: list[bytes]) -> list[Row]:
        return self._run(f"SELECT {_PERSON} FROM persons WHERE sid = ANY(?::bytea[])", (sids,))

    def _add_persons(self, rows: list[Row], token_version: int) -> Collection[Row]:
        rows = sorted(rows, key=_place)
        self._make_partitions({row[2] for row in rows})
        query = (
            f"INSERT INTO persons ({_PERSON}, token_version) SELECT *, ? FROM "
            "unnest(?::text[], ?::bytea[], ?::text[], ?::bytea[], ?::text[], ?::bytea[]) ON CONFLICT DO NOTHING"
        )
        columns = map(list, zip(*rows, strict=True))
        added = self._line.execute(translated(query), (token_version, *columns)).rowcount
        if added == len(rows):
            return ()
        ours = {row[3] for row in self._find_sids([row[3] for row in rows])}
        return [row for row in rows if row[3] not in ours]

    def _move_persons(self, moves: list[tuple[str, bytes, Row]]) -> None:
        months = self._partitions()
        for month, group in groupby(sorted(moves, key=lambda move: _place(move[2])), key=lambda move: move[2][2]):
            if month in months:
                keks, wrapped, rows = zip(*group, strict=True)
                self._run(
                    f"UPDATE {_partition(month)} AS p SET kek = n.kek, wrapped = n.wrapped "
                    "FROM unnest(?::bytea[], ?::text[], ?::bytea[]) AS n (sid, kek, wrapped) "
                    "WHERE p.sid = n.sid AND (p.kek < n.kek) IS TRUE",
                    ([row[3] for row in rows], list(keks), list(wrapped)),
                )

    def _forget_persons(self, rows: Collection[Row]) -> None:
        months = self._partitions()
        for month, group in groupby(sorted(rows, key=_place), key=itemgetter(2)):
            if month in months:
                sids = [row[3] for row in group]
                self._run(f"DELETE FROM {_partition(month)} WHERE sid = ANY(?::bytea[])", (sids,))

    def _persons_under(self, keks: list[str]) -> Iterator[list[Row]]:
        under = "kek = ANY(?::text[])"
        with self._transaction(Mode.READ):
            months = self._partitions()
        for month in months:
            while self._any(month, under, keks):  # again only if an operator's VACUUM FULL moved rows meanwhile
                for pages in self._pages(month):
                    query = f"SELECT {_PERSON} FROM persons WHERE {pages} AND ({under}) IS TRUE"
                    for chunk in chunks(self._look(query, (month, keks)), STEP):
                        yield list(chunk)

    def _sids_of(self, owner: str) -> Iterator[list[bytes]]:
        with self._transaction(Mode.READ):
            months = self._partitions()
        for month in months:
            for pages in self._pages(month):
                rows = self._look(f"SELECT sid FROM persons WHERE {pages} AND (owner = ?) IS TRUE", (month, owner))
                for chunk in chunks(rows, STEP):
                    yield [bytes(sid) for (sid,) in chunk]

    def _bury_persons(self, day: str) -> int:
        under, bounds = "kek > ? AND kek < ?", (f"{day}.", f"{day}/")  # the character after the dot
        buried = 0
        with self._transaction(Mode.READ):
            months = self._partitions()
        for month in months:
            if not self._any(month, "(kek > ? OR kek < ?)", bounds[1], bounds[0]):
                count = sum(
                    self._look(f"SELECT count(*) FROM persons WHERE {pages} AND ({under}) IS TRUE", (month, *bounds))[
                        0
                    ][0]
                    for pages in self._pages(month)
                )
                if self._drop(month, *bounds):
                    buried += count
                    continue
            if self._any(month, under, *bounds):
                for pages in self._pages(month):
                    with self._transaction(Mode.SHARE):
                        query = f"DELETE FROM persons WHERE {pages} AND ({under}) IS TRUE"
                        buried += self._line.execute(translated(query), (month, *bounds)).rowcount
        return buried

    def _has_persons(self, keks: list[str]) -> bool:
        query = "SELECT min(kek) FROM persons WHERE kek >= ? AND kek <= ?"  # a place in the index, whatever was counted
        return any(self._run(query, (kek, kek)) != [(None,)] for kek in keks)

    def _has_tokens(self, version: int) -> bool:
        query = "SELECT min(token_version) FROM persons WHERE token_version >= ?"
        return self._look(query, (version,)) == [(version,)]

    def _settle(self) -> None:
        """Nothing: dead rows and the write-ahead log are the server's; a re-wrap makes them useless."""

    def _close(self) -> None:
        self._line.close()

    # --- partitions ------------------------------------------------------------------------------------------

    def _make_partitions(self, months: set[str]) -> None:
        """Make the partitions that do not exist; inside a transaction that writes, beside others that do the same."""
        if months.issubset(self._partitions()):  # and none goes meanwhile, for that is done alone
            return
        self._run("SELECT pg_advisory_xact_lock(?)", (_TABLES_LOCK,))
        for month in sorted(months.difference(self._partitions())):
            table = _partition(month)
            self._run(f"CREATE TABLE {table} (LIKE persons) WITH ({_VACUUM})")
            self._run(f"ALTER TABLE persons ATTACH PARTITION {table} FOR VALUES IN ('{month}')")

    def _partitions(self) -> list[str]:
        """Return the months that have a partition; inside a transaction."""
        query = "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'persons'::regclass"
        return sorted(_month(name) for (name,) in self._run(query))

    def _any(self, month: str, condition: str, *values: Any) -> bool:
        """Return whether a month has a row of which a condition on its generation is true: one look at the index."""
        return self._look(f"SELECT 1 FROM persons WHERE month = ? AND {condition} LIMIT 1", (month, *values)) != []

    def _pages(self, month: str) -> Iterator[str]:
        """Yield conditions on rows, each true for those of some pages of a month's partition; `?` is the month."""
        query = "SELECT pg_relation_size(to_regclass(?)) / current_setting('block_size')::int"
        pages = self._look(query, (_partition(month),))[0][0] or 0
        for first in range(0, pages, _PAGES):
            yield f"month = ? AND ctid >= '({first},0)' AND ctid < '({first + _PAGES},0)'"

    def _look(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the rows of one statement that reads, in a transaction of its own."""
        with self._transaction(Mode.READ):
            return self._run(query, values)

    def _drop(self, month: str, low: str, high: str) -> bool:
        """Drop a month's partition if all rows in it are under generations between these; return whether it is gone.

        Not if somebody reads the table for longer than a second, as a backup does: others would queue up behind us.
        """
        try:
            with self._transaction(Mode.EXCLUSIVE):
                self._run(f"SET LOCAL lock_timeout = {_DROP_WAIT_MS}")
                query = "SELECT 1 FROM persons WHERE month = ? AND (kek > ? OR kek < ?) LIMIT 1"
                if self._run(query, (month, high, low)):
                    return False
                self._run(f"DROP TABLE IF EXISTS {_partition(month)}")
        except KeysBusy:
            return False
        return True


def exists(settings: Postgres) -> bool:
    """Return whether a database holds a key store, whatever its state. Blocks on the server."""
    line = Line(settings, settings.timeout_s)
    try:
        with line.transaction(_BEGIN[Mode.READ]):
            query = "SELECT 1 FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = %s LIMIT 1"
            return line.execute(query, (SCHEMA,)).fetchone() is not None
    finally:
        line.close()


def _migrate(line: Line, kms: KmsMaker, *, create: bool) -> None:
    """Bring the tables of a database up to date, in one transaction a step; with `create` make them, and the root key.

    Raises KeysUnusable if there is no key store, or it is of a newer version, or not whole.
    """
    for number, statements in MIGRATIONS:
        with line.transaction(_BEGIN_TABLES):
            version = _version(line)
            if version is not None and version >= number:
                continue
            if version is None and not create:
                raise KeysUnusable("there is no key store in this database: check [postgres]", server=line.place)
            if line.execute("SELECT to_regnamespace(%s)", (SCHEMA,)).fetchone() == (None,):
                line.script(f"CREATE SCHEMA {SCHEMA}")
            line.script(statements)
            if version is None:
                store_id = secrets.token_hex(16)
                made = kms(store_id, True)  # first: without a store it is harmless, the other way round is not
                try:
                    for query, values in first_rows(made, store_id):
                        line.execute(translated(query), values)
                finally:
                    made.close()
            line.execute("UPDATE meta SET value = %s WHERE name = 'schema'", (str(number),))
    with line.transaction(_BEGIN[Mode.READ]):
        check_version({"schema": _version(line)})
        query = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = %s"
        if not set(line.execute(query, (SCHEMA,))) >= COLUMNS:
            raise KeysUnusable(
                "the key store lacks a table or column; restore it from its backup",
                server=line.place,
            )


def _version(line: Line) -> int | None:
    """Return the version of the tables in a database, None if there are none; inside a transaction."""
    query = "SELECT 1 FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = %s AND relname = 'meta'"
    if line.execute(query, (SCHEMA,)).fetchone() is None:
        return None
    row = line.execute(f"SELECT value FROM {SCHEMA}.meta WHERE name = 'schema'").fetchone()
    return int(row[0]) if row and row[0].isdecimal() else 0


def _columns(statements: str) -> Iterator[tuple[str, str]]:
    """Yield (table, column) of the tables that statements make."""
    for table, body in re.findall(r"CREATE TABLE (\w+) \((.*?)\)[^()]*;", statements, re.DOTALL):
        for column in re.split(r",\s*(?![^()]*\))", body):
            name = column.split()[0]
            if name != "PRIMARY":
                yield table, name


COLUMNS: Final = frozenset(column for _, statements in MIGRATIONS for column in _columns(statements))


@lru_cache(maxsize=256)
def translated(query: str) -> str:
    """Return a statement in the driver's placeholders; `?::TYPE` goes in binary: for arrays a tenth of the work."""
    return query.replace("%", "%%").replace("?::", "%b::").replace("?", "%s")


def _place(row: Row) -> tuple[str, str, bytes]:
    """Return where a row stands in the order in which rows are locked."""
    return row[2], row[0], row[1]


def _partition(month: str) -> str:
    """Return the name of a month's partition. Raises ValueError if the text is no month."""
    if not _MONTH.fullmatch(month):
        raise ValueError("not a month")
    return f"persons_{month.replace('-', '_')}"


def _month(table: str) -> str:
    return table.removeprefix("persons_").replace("_", "-")
