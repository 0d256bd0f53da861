"""A connection to the PostgreSQL server of a key store: how to get in, what its errors mean, and what never leaves.

Rules of this file:
- Errors of the driver quote values and rows, so none of them is passed on, chained or logged: an error of ours says
  what to do and where the server is.
- Nothing waits for ever: not for a connection, not for an answer, not for another process's lock; and the server ends a
  transaction whose owner has stopped, so that no suspended process holds a lock.
- What was committed is on the disk of the server, and of its synchronous standby if it has one.
"""

import os
import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from struct import Struct
from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.adapt import Dumper
from psycopg.pq import Format, TransactionStatus

from schemas.errors import KeysBusy, KeysFull, KeysUnusable, StreamveilError
from streams.config import Postgres
from streams.secretfile import read_secret

_RV = TypeVar("_RV")
Row = tuple[Any, ...]

MIN_VERSION: Final = 150_000
SCHEMA: Final = "streamveil"
_INTERVAL_S: Final = 0.1
_BYTEA: Final = 17
_BYTEA_ARRAY: Final = 1001
_ARRAY: Final = Struct(">iiIii")
_ID_BYTES: Final = (16).to_bytes(4, "big")
_LOST: Final = "the key store's server does not answer, or the connection to it was lost"
_REFUSALS: Final = (  # what libpq and servers say when they refuse a connection → what is to be done
    ("root certificate file", "[postgres] ca_file cannot be read as PEM certificates: check the file"),
    ("certificate verify failed", "the server's certificate has ended, or is not of [postgres] ca_file's authority"),
    ("does not match host name", "the server's certificate is for another name than [postgres] host"),
    ("does not support SSL", "the key store's server has no TLS: set it up there"),
    ("authentication method requirement", "the key store's server does not take passwords by SCRAM: set that up there"),
    ("pg_hba.conf", "the key store's server does not let this user in from here: check its pg_hba.conf"),
    ("password", "the key store's server refuses this user: check [postgres] username and password_file"),
    ("authentication failed", "the key store's server refuses this user: see its pg_hba.conf"),
    ("permission denied for database", "this user may not use the database: GRANT CONNECT, see docs/postgresql.md"),
    ("database", "the key store's server has no such database: check [postgres] database"),
    ("role", "the key store's server refuses this user: check [postgres] username"),
)  # fmt: skip
_PASSING: Final = (  # what servers say when they refuse for a while
    ("too many", "the key store's server has no connection to spare"),
    ("connection slots", "the key store's server has no connection to spare"),
    ("read-only", "the key store's server takes no writes now: it is a standby, or read-only"),
    ("database system is", _LOST),
)
_QUOTED: Final = re.compile(r'"[^"]*"|\'[^\']*\'')
_STATES: Final[dict[str, tuple[type[StreamveilError], str]]] = {  # SQLSTATE, or how it begins; the longest that fits
    "08": (KeysBusy, _LOST),
    "25006": (KeysBusy, "the key store's server takes no writes now: it is a standby, or read-only"),
    "23": (KeysBusy, "another process was quicker"),
    "25P": (KeysBusy, _LOST),
    "3F": (KeysUnusable, "this user lacks a right on the key store: GRANT it, see docs/postgresql.md"),
    "40": (KeysBusy, "another process holds the key store"),
    "42": (KeysUnusable, "the key store is not whole, or another program changed it: restore it from its backup"),
    "42501": (KeysUnusable, "this user lacks a right on the key store: GRANT it, see docs/postgresql.md"),
    "53": (KeysBusy, "the key store's server has no connection or no memory to spare"),
    "53100": (KeysFull, "the disk of the key store's server is full; free some space"),
    "55": (KeysBusy, "another process holds the key store"),
    "57": (KeysBusy, _LOST),
    "57014": (KeysBusy, "the key store's server takes too long"),
    "58": (KeysUnusable, "the disk of the key store's server fails: see the server's log"),
    "XX": (KeysUnusable, "the key store's server finds its data damaged: see the server's log"),
}
_SETTINGS: Final = """\
SELECT set_config(name, value, false) FROM (VALUES ('search_path', '{schema}'), ('lock_timeout', '{lock_ms}'),
    ('statement_timeout', '{statement_ms}'), ('idle_in_transaction_session_timeout', '{idle_ms}'), ('jit', 'off'),
    ('enable_seqscan', 'off'), ('enable_hashjoin', 'off'), ('enable_mergejoin', 'off'),
    ('enable_material', 'off'),
    ('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END)) AS wanted (name, value);
SELECT current_setting('server_version_num')::int, current_setting('fsync')"""
"""What does not depend on the server: above all plans, for of a month that has just begun it has no statistics."""


class Ids(list[bytes]):
    """Tokens or sids, 16 bytes each, as the value of a `bytea[]`."""


class _IdsDumper(Dumper):
    """Puts the array together at once; the driver does so value by value, which takes ten times as long."""

    format = Format.BINARY
    oid = _BYTEA_ARRAY

    def dump(self, obj: Ids) -> bytes:
        # dimensions, whether there are nulls, type; then count and first index, and a length before each value
        return _ARRAY.pack(1, 0, _BYTEA, len(obj), 1) + _ID_BYTES.join((b"", *obj))


class _Connection(psycopg.Connection[Row]):
    """A connection on which no call waits longer than `patience_s`: OperationalError, and it is of no use any more."""

    patience_s: float

    def wait(self, gen: PQGen[_RV], interval: float = _INTERVAL_S, timeout: float | None = None) -> _RV:
        """As psycopg does it, but not for ever."""
        return super().wait(gen, interval, self.patience_s if timeout is None else timeout)


class Line:
    """A connection, made when it is first used and anew when it was lost. For one thread at a time."""

    def __init__(self, settings: Postgres, busy_s: float) -> None:
        """Name the server; nothing is connected yet. `busy_s`: so long a statement waits for other processes."""
        self.place = f"{settings.host}:{settings.port}/{settings.database}"
        self._settings = settings
        self._busy_s = busy_s
        self._connection: _Connection | None = None

    def __repr__(self) -> str:
        return f"Line({self.place})"

    def close(self) -> None:
        """Let go of the connection; idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextmanager
    def transaction(self, begin: str) -> Iterator[Row]:
        """Run constant statements that begin a transaction; give the last one's row; commit, or roll back on errors.

        Beginning is one round trip, and so is the commit. A connection that died unused is replaced. Errors of the
        server become ours: KeysBusy, KeysFull, KeysUnusable.
        """
        with self.translated():
            try:
                row = self._begin(begin)
                yield row
                self._run("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn errors of the driver into ours, and let go of a connection that is lost."""
        try:
            yield
        except psycopg.Error as error:
            ours = _ours(error, self.place)
            if isinstance(ours, KeysBusy) and not isinstance(error, psycopg.errors.LockNotAvailable):
                self.close()
        else:
            return
        raise ours from None

    def execute(self, query: str, values: Sequence[Any] = ()) -> psycopg.Cursor[Row]:
        """Run one statement with `%s` for each value, in binary both ways."""
        return self._connected().execute(query, values, binary=True)

    def execute_many(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement for each row, all in one round trip."""
        with self._connected().cursor() as cursor:
            cursor.executemany(query, rows)

    def script(self, statements: str) -> None:
        """Run constant statements inside a transaction."""
        self._run(statements)

    def _begin(self, statements: str) -> Row:
        old = self._connection
        try:
            return self._run(statements)
        except psycopg.OperationalError:
            if old is None or not old.broken:
                raise
        self.close()
        return self._run(statements)

    def _run(self, statements: str) -> Row:
        """Run constant statements in one round trip; return the last one's row, if it has any."""
        cursor = self._connected().execute(statements, prepare=False)
        while cursor.nextset():
            pass
        return (cursor.fetchone() or ()) if cursor.description else ()

    def _roll_back(self) -> None:
        connection = self._connection
        if connection is None:
            return
        with suppress(psycopg.Error):
            connection.rollback()
        if connection.pgconn.transaction_status != TransactionStatus.IDLE:
            self.close()

    def _connected(self) -> _Connection:
        if self._connection is None:
            settings = self._settings
            connection = _Connection.connect(autocommit=True, **_parameters(settings))
            try:
                connection.adapters.register_dumper(Ids, _IdsDumper)
                connection.patience_s = self._busy_s + 2 * settings.timeout_s
                cursor = connection.execute(
                    _SETTINGS.format(
                        schema=SCHEMA,
                        lock_ms=max(1, round(self._busy_s * 1000)),
                        statement_ms=round((self._busy_s + settings.timeout_s) * 1000),
                        idle_ms=round(2 * settings.timeout_s * 1000),
                    ),
                    prepare=False,
                )
                cursor.nextset()
                version, fsync = cursor.fetchone() or (0, "")
                if version < MIN_VERSION:
                    raise KeysUnusable("the key store needs PostgreSQL 15 or newer", server=self.place)
                if fsync != "on":
                    raise KeysUnusable("the key store's server has fsync off, so nothing lasts there: turn it on")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


def _parameters(settings: Postgres) -> dict[str, Any]:
    """Return what libpq is told. Raises KeysUnusable if the file of the password cannot be used."""
    wanted: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "dbname": settings.database,
        "user": settings.username,
        "application_name": "streamveil",
        "connect_timeout": max(2, round(settings.timeout_s)),
        "tcp_user_timeout": round(settings.timeout_s * 1000),
        "target_session_attrs": "read-write",  # of several hosts, the one that is not a standby
        "gssencmode": "disable",
        "passfile": f"{os.devnull}/none",  # nobody's ~/.pgpass
        "client_encoding": "UTF8",
    }
    if settings.password_path is not None:
        wanted["password"] = read_secret(settings.password_path, "the key store's password", KeysUnusable)
    if settings.host.startswith("/"):
        return wanted
    if settings.plaintext:
        return wanted | {"sslmode": "disable", "require_auth": "scram-sha-256"}  # the password is never sent
    authorities = settings.ca_path or ssl.get_default_verify_paths().cafile or "system"
    return wanted | {"sslmode": "verify-full", "sslrootcert": str(authorities), "ssl_min_protocol_version": "TLSv1.2"}


def _ours(error: psycopg.Error, place: str) -> StreamveilError:
    """Return our error for one of the driver's; nothing that it quotes is in it."""
    state = error.sqlstate
    if state is not None:
        known = max((begin for begin in _STATES if state.startswith(begin)), key=len, default=None)
        kind, message = _STATES[known] if known else (KeysUnusable, "the key store's server refuses: see its log")
        return kind(message, server=place, state=state)
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return KeysUnusable(f"the driver of the key store refuses a value: {type(error).__name__}", server=place)
    said = _QUOTED.sub("", str(error))
    for signs, kind in ((_PASSING, KeysBusy), (_REFUSALS, KeysUnusable)):
        for sign, message in signs:
            if sign in said:
                return kind(message, server=place)
    return KeysBusy(_LOST, server=place)
