"""The log in two SQLite files: sealed and anonymous streams in one, clear input in the other.

    PATH               outputs, committed input offsets, workers and leases; never clear input
    STEM-traffic.db    `traffic`, `traffic.cdr` and the bookmarks of publishing: clear, 0600, `secure_delete`

Rules of this file:
- One transaction, one file: `append` of input and its bookmark in the traffic file, `commit` in the main file.
  Nothing needs both at once: committed offsets only grow, so whoever reads them before deleting input errs on
  the side of keeping it.
- A stored row holds up to `ROW_MESSAGES` messages of one partition by column (headers once each), named by
  the offset behind its last message, so that cutting off its beginning does not rename it.
- `secure_delete` wipes deleted cells and freed pages, but not the copies that a b-tree page keeps when SQLite
  moves its cells to a sibling. So a clear row begins with a page of zeros: nothing else of it stays in a b-tree
  page, and the messages lie in overflow pages, which belong to one row only.
- One lease per partition number covers that partition of both input streams. Claiming raises its epoch; a
  commit states worker and epoch, and whoever is not the holder any more is fenced.
- SQLite calls are synchronous: a call blocks its thread for milliseconds, and up to `busy_s` while another
  process holds the file. An object is used from the thread that opened it; any number of objects and
  processes may share a log.
"""

import asyncio
import errno
import fcntl
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import msgspec

from schemas.catalog import CATALOG, INPUTS
from schemas.errors import Fenced, LogBusy, LogFull, LogUnusable
from streams.log.protocol import Batch, Bookmark, Headers, Message, Output, Stored

SCHEMA_VERSION = 1
ROW_MESSAGES = 1000
ROW_BYTES = 4_000_000
"""A row is cut in halves until its values are at most this big, or it holds one message."""
TAKE_BYTES = 32_000_000
"""What is read at once ends with the row that passes this, whatever number of messages was asked for."""
MAIN_PAGE_BYTES = 32_768
"""Rows are long: large pages take less time than SQLite's default of 4096."""
CLEAR_PAGE_BYTES = 4096
"""Every row body of the clear file begins with so many zeros; see the rules above."""
IDLE_S = 0.03
CHECKPOINT_WAIT_MS = 1000
"""How long a checkpoint waits for readers; the next call of `forget_consumed` tries again, `cut` does so itself."""
CUT_WAIT_S = 15.0
"""How long `cut` waits for readers in all before it raises LogBusy."""
_CUT_PAUSE_S = 0.05
CUT_ROWS = 50
"""So many rows are cut off in one transaction: others wait for it no longer than for a commit."""

_MAIN_ID, _TRAFFIC_ID = 0x53_56_4C_4D, 0x53_56_4C_54  # application_id: "SVLM", "SVLT"
_BOTH_SQL = """
CREATE TABLE log (id TEXT NOT NULL, partitions INTEGER NOT NULL);
CREATE TABLE rows (stream TEXT, partition INTEGER, next_offset INTEGER, count INTEGER, body BLOB);
CREATE UNIQUE INDEX rows_place ON rows (stream, partition, next_offset);
CREATE TABLE ends (stream TEXT, partition INTEGER, next_offset INTEGER, PRIMARY KEY (stream, partition));
"""
_MAIN_SQL = """
CREATE TABLE committed (stream TEXT, partition INTEGER, next_offset INTEGER, PRIMARY KEY (stream, partition));
CREATE TABLE workers (id TEXT PRIMARY KEY, alive_until REAL);
CREATE TABLE leases (partition INTEGER PRIMARY KEY, epoch INTEGER, worker_id TEXT, expires_at REAL);
"""
_TRAFFIC_SQL = """
CREATE TABLE bookmarks (name TEXT PRIMARY KEY, position INTEGER, line INTEGER, digest TEXT);
"""

_UNUSABLE = {
    sqlite3.SQLITE_CORRUPT: "the log file is damaged: restore it from a backup",
    sqlite3.SQLITE_NOTADB: "this file is not a log: check --log, or restore it from a backup",
    sqlite3.SQLITE_CANTOPEN: "the log file cannot be opened: check its path and owner",
    sqlite3.SQLITE_PERM: "the log file cannot be opened: check its path and owner",
    sqlite3.SQLITE_READONLY: "the log file cannot be written: check its owner, mode and file system",
    sqlite3.SQLITE_IOERR: "the disk of the log reports an error: check the disk",
}


# --- rows: a list of messages by column --------------------------------------------------------------------

_Columns = tuple[list[int], list[bytes | None], list[bytes], list[int], list[Headers]]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Columns).decode


def _body(messages: Sequence[Message], *, clear: bool) -> bytes:
    """Return the messages as one row body; about 0.2 µs a message when few header objects repeat."""
    headers = [message.headers for message in messages]
    slots: dict[Headers, int] = {}
    slot_of = {at: slots.setdefault(one, len(slots)) for at, one in {id(one): one for one in headers}.items()}
    which = [slot_of[id(one)] for one in headers] if len(slots) > 1 else []
    times = [message.timestamp_ms for message in messages]
    keys = [message.key for message in messages]
    values = [message.value for message in messages]
    zeros = bytes(CLEAR_PAGE_BYTES if clear else 0)
    return zeros + _encode((times, keys, values, which, list(slots)))


def _messages(body: bytes) -> list[Message]:
    """Return the messages of a row body. Raises msgspec.MsgspecError if it is none."""
    times, keys, values, which, table = _decode(body.lstrip(b"\0"))  # an array of five begins with 0x95
    headers = [table[slot] for slot in which] if which else table * len(times)
    return list(map(Message, times, keys, headers, values))


def _cut(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield the messages in pieces that are fit for a row."""
    for start in range(0, len(messages), ROW_MESSAGES):
        yield from _halved(messages[start : start + ROW_MESSAGES])


def _halved(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    if len(messages) == 1 or sum([len(message.value) for message in messages]) <= ROW_BYTES:
        yield messages
    else:
        middle = len(messages) // 2
        yield from _halved(messages[:middle])
        yield from _halved(messages[middle:])


# --- one file ----------------------------------------------------------------------------------------------


class _File:
    """One SQLite file with rows and end offsets; errors of SQLite leave it as errors of the program."""

    def __init__(self, path: Path, busy_s: float) -> None:
        """Connect to an existing file, without looking into it. Raises LogUnusable."""
        self.path = path
        with self.guarded():
            self.db = sqlite3.connect(f"{path.as_uri()}?mode=rw", busy_s, isolation_level=None, uri=True)
            self.db.execute("PRAGMA synchronous=FULL")
            self.db.execute("PRAGMA temp_store=MEMORY")

    def unusable(self, message: str) -> LogUnusable:
        return LogUnusable(message, file=str(self.path))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what SQLite raises into LogBusy, LogFull or LogUnusable; what it does not know is a bug."""
        try:
            yield
        except sqlite3.Error as error:
            extended = getattr(error, "sqlite_errorcode", 0)  # errors of the Python module itself have none
            code = extended & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise LogBusy(file=str(self.path)) from error
            if code == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_SHMSIZE:
                raise LogFull(file=str(self.path)) from error
            if code in _UNUSABLE:
                raise self.unusable(_UNUSABLE[code]) from error
            if isinstance(error, sqlite3.OperationalError):  # the statements are right, so the file is not
                raise self.unusable(_UNUSABLE[sqlite3.SQLITE_CORRUPT]) from error
            raise
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.unusable(_UNUSABLE[sqlite3.SQLITE_CORRUPT]) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock; commit durably at the end, or roll back on any exception."""
        with self.guarded():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has rolled back by itself on some errors
                    self.db.execute("ROLLBACK")
                raise

    def make(self, sql: str, application_id: int, log_id: str, partitions: int) -> None:
        """Make the tables of an empty file, all or nothing."""
        with self.guarded():
            page_bytes = MAIN_PAGE_BYTES if application_id == _MAIN_ID else CLEAR_PAGE_BYTES
            self.db.execute(f"PRAGMA page_size={page_bytes}")
            self.db.execute("PRAGMA journal_mode=WAL")
        with self.transaction() as db:
            for statement in (_BOTH_SQL + sql).split(";"):
                db.execute(statement)
            db.execute("INSERT INTO log VALUES (?, ?)", (log_id, partitions))
            if application_id == _MAIN_ID:
                places = [(stream, partition) for stream in INPUTS for partition in range(partitions)]
                db.executemany("INSERT INTO committed VALUES (?, ?, 0)", places)
                db.executemany("INSERT INTO leases VALUES (?, 0, NULL, 0)", [(p,) for p in range(partitions)])
            db.execute(f"PRAGMA application_id={application_id}")
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def identity(self, application_id: int) -> tuple[str, int] | None:
        """Return log id and partition count, or None if the file is empty. Raises LogUnusable if not ours."""
        with self.guarded():
            found, version, tables = self.db.execute(
                "SELECT (SELECT application_id FROM pragma_application_id), "
                "(SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_schema)"
            ).fetchone()
            if not tables:
                return None
            if found != application_id:
                raise self.unusable(_UNUSABLE[sqlite3.SQLITE_NOTADB])
            if version != SCHEMA_VERSION:
                raise self.unusable(
                    "the log was made by another version of the program: use that version, or start a new log"
                )
            log_id, partitions = self.db.execute("SELECT id, partitions FROM log").fetchone()
            return log_id, partitions

    def insert(self, output: Output) -> None:
        """Add messages behind the end of a partition; inside a transaction."""
        stream, partition, messages = output
        if not messages:
            return
        place = (stream, partition)
        found = self.db.execute("SELECT next_offset FROM ends WHERE stream=? AND partition=?", place).fetchone()
        end = found[0] if found else 0
        for piece in _cut(messages):
            end += len(piece)
            self.db.execute(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?)",
                (*place, end, len(piece), _body(piece, clear=stream in INPUTS)),
            )
        self.db.execute("INSERT OR REPLACE INTO ends VALUES (?, ?, ?)", (*place, end))

    def take(self, stream: str, partition: int, offset: int, limit: int, *, whole: bool) -> tuple[int, list[Message]]:
        """Return the offset of the first message there is from `offset` on, and up to `limit` messages.

        `whole` rows only, unless the first alone is more than the limit.
        """
        first, taken, size = offset, list[Message](), 0
        query = (
            "SELECT next_offset - count, count, body FROM rows "
            "WHERE stream=? AND partition=? AND next_offset>? ORDER BY next_offset"
        )
        with self.guarded(), closing(self.db.execute(query, (stream, partition, offset))) as rows:
            for start, count, body in rows:
                skip = max(0, offset - start)
                if not taken:
                    first = start + skip
                elif whole and len(taken) + count > limit:
                    break
                taken += _messages(body)[skip : skip + limit - len(taken)]
                size += len(body)
                if len(taken) >= limit or size > TAKE_BYTES:
                    break
        return first, taken

    def offsets(self, table: str, stream: str, partitions: int) -> list[int]:
        """Return next_offset per partition from `ends` or `committed`; 0 where nothing was written."""
        found = [0] * partitions
        with self.guarded():
            rows = self.db.execute(f"SELECT partition, next_offset FROM {table} WHERE stream=?", (stream,))
            for partition, next_offset in rows.fetchall():
                found[partition] = next_offset
        return found

    def begins(self, stream: str, partitions: int) -> list[int]:
        """Return the offset of the first message there is, per partition; its end where there is none."""
        query = "SELECT next_offset - count FROM rows WHERE stream=? AND partition=? ORDER BY next_offset LIMIT 1"
        begins = self.offsets("ends", stream, partitions)
        with self.guarded():
            for partition in range(partitions):
                for (begin,) in self.db.execute(query, (stream, partition)).fetchall():
                    begins[partition] = begin
        return begins

    def forget(self, stream: str, partition: int, offset: int) -> None:
        """Delete the messages of a partition before `offset`; inside a transaction."""
        place = (stream, partition, offset)
        self.db.execute("DELETE FROM rows WHERE stream=? AND partition=? AND next_offset<=?", place)
        rows = self.db.execute(
            "SELECT rowid, next_offset - count, body FROM rows "
            "WHERE stream=? AND partition=? AND next_offset>? ORDER BY next_offset LIMIT 1",
            place,
        ).fetchall()
        for row_id, start, body in rows:
            if start < offset:
                rest = _messages(body)[offset - start :]
                update = "UPDATE rows SET count=?, body=? WHERE rowid=?"
                self.db.execute(update, (len(rest), _body(rest, clear=True), row_id))

    def drop(self, stream: str, partition: int, offset: int) -> int:
        """Delete up to `CUT_ROWS` of the oldest rows that end at or before `offset`; return how many that were."""
        query = (
            "DELETE FROM rows WHERE rowid IN (SELECT rowid FROM rows "
            "WHERE stream=? AND partition=? AND next_offset<=? ORDER BY next_offset LIMIT ?)"
        )
        with self.transaction() as db:
            return db.execute(query, (stream, partition, offset, CUT_ROWS)).rowcount

    def truncate_wal(self) -> None:
        """Move the WAL into the file and cut it to nothing. Raises LogBusy if somebody reads for over a second."""
        with self.guarded():
            (before_ms,) = self.db.execute("PRAGMA busy_timeout").fetchone()
            self.db.execute(f"PRAGMA busy_timeout={min(before_ms, CHECKPOINT_WAIT_MS)}")
            try:
                (busy, _, _) = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self.db.execute(f"PRAGMA busy_timeout={before_ms}")
        if busy:
            raise LogBusy("a reader keeps what was deleted in the WAL; trying again", file=str(self.path))


@contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make or open files in a folder, which is made (0700) if missing."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _touch(path: Path) -> None:
    """Make a file if it is missing, with mode 0600 from its first instant; SQLite gives its WAL the same."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _refuse_readable(path: Path) -> None:
    """Raise LogUnusable if anybody but the owner may read clear input."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        file = path.with_name(name)
        if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise LogUnusable("others may read the file of clear input: chmod 600 it", file=str(file))


# --- the log -----------------------------------------------------------------------------------------------


class SqliteLog:
    """The log of one deployment in two SQLite files; see `streams.log.protocol.Log`."""

    def __init__(
        self, main: _File, traffic: _File, partitions: int, lease_s: float, clock: Callable[[], float]
    ) -> None:
        """Take both open files; use `open`."""
        self.partitions = partitions
        self.lease_s = lease_s
        self.clock = clock
        self._main = main
        self._traffic = traffic

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        partitions: int = 4,
        create: bool = True,
        lease_s: float = 10.0,
        busy_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> "SqliteLog":
        """Return the log at `path`, made if missing and `create`; an existing one keeps its partition count.

        `clock` gives Unix seconds, the same for all processes. Blocks while another process opens the log.
        Raises LogUnusable, LogBusy, LogFull.
        """
        if partitions < 1:
            raise ValueError("a log has at least one partition")
        path = path.absolute()
        if not create and not path.exists():
            raise LogUnusable("there is no log here: publish first, or check --log", file=str(path))
        try:
            with _folder_locked(path.parent):
                main, traffic, partitions = _open_both(path, partitions, busy_s)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LogFull(file=str(path)) from error
            raise LogUnusable(_UNUSABLE[sqlite3.SQLITE_CANTOPEN], file=str(path)) from error
        return cls(main, traffic, partitions, lease_s, clock)

    @property
    def log_id(self) -> str:
        """The id that both files have."""
        known = self._main.identity(_MAIN_ID)
        return known[0] if known else ""

    def _file(self, stream: str) -> _File:
        return self._traffic if stream in INPUTS else self._main

    def _checked(self, outputs: Sequence[Output]) -> None:
        if any(not 0 <= output.partition < self.partitions for output in outputs):
            raise ValueError("no such partition")

    async def append(self, outputs: Sequence[Output], bookmark: tuple[str, Bookmark | None] | None = None) -> None:
        """Write all outputs, and the named bookmark (None deletes it), or nothing; durable on return.

        Raises ValueError if input streams are mixed with others, or a bookmark stands beside others.
        """
        self._checked(outputs)
        files = {self._file(output.stream) for output in outputs}
        if bookmark is not None:
            files.add(self._traffic)
        if len(files) > 1:
            raise ValueError("input streams and bookmarks are not appended together with other streams")
        for file in files:
            with file.transaction() as db:
                for output in outputs:
                    file.insert(output)
                if bookmark is not None:
                    name, mark = bookmark
                    db.execute("DELETE FROM bookmarks WHERE name=?", (name,))
                    if mark is not None:
                        db.execute("INSERT INTO bookmarks VALUES (?, ?, ?, ?)", (name, *mark))

    async def bookmark(self, name: str) -> Bookmark | None:
        """Return a bookmark that was written with `append`, if any."""
        with self._traffic.guarded():
            found = self._traffic.db.execute(
                "SELECT position, line, digest FROM bookmarks WHERE name=?", (name,)
            ).fetchone()
        return Bookmark(*found) if found else None

    async def read(self, stream: str, partition: int, offset: int, limit: int, until: int = 0) -> list[Stored]:  # noqa: ARG002
        """Return up to `limit` committed messages from `offset` on, in order; empty at the end."""
        if limit <= 0:
            return []
        first, messages = self._file(stream).take(stream, partition, offset, limit, whole=False)
        return [
            Stored(stream, partition, at, one.timestamp_ms, one.key, one.headers, one.value)
            for at, one in enumerate(messages, first)
        ]

    async def begin_offsets(self, stream: str) -> list[int]:
        """Return the first offset that can still be read, per partition."""
        return self._file(stream).begins(stream, self.partitions)

    async def end_offsets(self, stream: str) -> list[int]:
        """Return the offset after the last written message (the high watermark), per partition."""
        return self._file(stream).offsets("ends", stream, self.partitions)

    async def stable_offsets(self, stream: str) -> list[int]:
        """Return the same as `end_offsets`: nothing is written before it is committed."""
        return await self.end_offsets(stream)

    async def cut(self, stream: str, offsets: Sequence[int]) -> list[int]:
        """Delete what lies before these offsets, one per partition, and return the new `begin_offsets`.

        Whole rows only, a few in each transaction, and in between as much time for others. What stands in the clear
        there is overwritten, tokens among it; what is sealed is as good as that, for its keys are dead. Raises
        LogBusy if somebody reads for over `CUT_WAIT_S`: the rows are gone then, but the WAL keeps their bytes.
        """
        if stream in INPUTS:
            raise ValueError("an input stream is cut by those who consume it")
        row = CATALOG[stream]
        clear = row.domain is None or row.compacted
        with self._main.guarded():
            self._main.db.execute(f"PRAGMA secure_delete={'ON' if clear else 'FAST'}")
        gone = 0
        for partition, offset in enumerate(offsets):
            while True:
                began_s = time.monotonic()
                rows = self._main.drop(stream, partition, offset)
                gone += rows
                if rows < CUT_ROWS:
                    break
                await asyncio.sleep(time.monotonic() - began_s)
        deadline_s = time.monotonic() + CUT_WAIT_S
        while gone:
            try:
                self._main.truncate_wal()
                break
            except LogBusy:
                if time.monotonic() > deadline_s:
                    raise
            await asyncio.sleep(_CUT_PAUSE_S)
        return await self.begin_offsets(stream)

    def consumer(self, worker_id: str) -> "SqliteConsumer":
        """Return a consumer of the input streams; one with an earlier one's id takes over from it at once."""
        return SqliteConsumer(self, worker_id)

    async def close(self) -> None:
        """Free what is held; idempotent."""
        for file in (self._main, self._traffic):
            file.db.close()


def _open_both(path: Path, partitions: int, busy_s: float) -> tuple[_File, _File, int]:
    """Return both files, made if they are not there, and the partition count; under the folder's lock.

    The traffic file is made first. So a main file without it has lost unread input, and a traffic file in use
    without its main file has lost what was committed: neither is opened.
    """
    clear_path = path.with_name(f"{path.stem}-traffic.db")
    with ExitStack() as on_error:
        main = _connected(path, busy_s, on_error)
        ours = main.identity(_MAIN_ID)
        if ours and not clear_path.exists():
            raise main.unusable("its file of clear input is missing: put it back, or start a new log elsewhere")
        _refuse_readable(clear_path)
        traffic = _connected(clear_path, busy_s, on_error)
        theirs = traffic.identity(_TRAFFIC_ID)
        if not ours and theirs and any(any(traffic.offsets("ends", one, theirs[1])) for one in INPUTS):
            raise main.unusable("the log is missing beside its clear input: restore it from a backup")
        if not ours:
            if not theirs:
                theirs = (secrets.token_hex(16), partitions)
                traffic.make(_TRAFFIC_SQL, _TRAFFIC_ID, *theirs)
            ours = theirs
            main.make(_MAIN_SQL, _MAIN_ID, *ours)
        if ours != theirs:
            raise traffic.unusable("the file of clear input is not of this log: put the right one back")
        with traffic.guarded():
            traffic.db.execute("PRAGMA secure_delete=ON")
        on_error.pop_all()
    return main, traffic, ours[1]


def _connected(path: Path, busy_s: float, on_error: ExitStack) -> _File:
    _touch(path)
    file = _File(path, busy_s)
    on_error.callback(file.db.close)
    return file


# --- consuming ---------------------------------------------------------------------------------------------


class SqliteConsumer:
    """One worker's side of the exactly-once contract; see `streams.log.protocol.Consumer`.

    A worker is alive for `lease_s` after its last heartbeat; heartbeats, renewals, claims and releases happen
    together, in one transaction, in a `poll` at least `lease_s`/5 after the last, or when there is nothing to
    do and a partition to be had. A batch that is not committed keeps its partition from being released.
    """

    def __init__(self, log: SqliteLog, worker_id: str) -> None:
        """Take the log; nothing is claimed before the first `poll`."""
        self._log = log
        self._main = log._main  # noqa: SLF001 — two halves of one module
        self._traffic = log._traffic  # noqa: SLF001 — the consumer is the other half of the log
        self._worker_id = worker_id
        self._held: dict[int, int] = {}  # partition → lease epoch
        self._outstanding: int | None = None  # the partition of a batch that is not committed yet
        self._last = dict.fromkeys(INPUTS, -1)  # the partition served last
        self._beat_at: float | None = None  # None: before the first
        self._closed = False

    async def poll(self, max_records: int, timeout_s: float) -> Batch | None:
        """Return the next batch of one input partition, `traffic` first, or None after the time-out.

        A batch that was polled and not committed comes again. Raises ValueError after `close`.
        """
        if self._closed:
            raise ValueError("the consumer is closed")
        deadline = time.monotonic() + timeout_s
        while True:
            batch = self._next(max_records)
            left_s = deadline - time.monotonic()
            if batch is not None or left_s <= 0:
                return batch
            await asyncio.sleep(min(IDLE_S, left_s))

    def _next(self, max_records: int) -> Batch | None:
        now = self._log.clock()
        if self._beat_at is None or now >= self._beat_at:
            self._balance(now)
        batch = self._first_waiting(max_records)
        if batch is None and self._could_claim(now):
            self._balance(now)
            batch = self._first_waiting(max_records)
        self._outstanding = batch.partition if batch else None
        return batch

    def _first_waiting(self, max_records: int) -> Batch | None:
        for stream in INPUTS:
            committed = self._main.offsets("committed", stream, self._log.partitions)
            ends = self._traffic.offsets("ends", stream, self._log.partitions)
            waiting = [partition for partition in self._held if committed[partition] < ends[partition]]
            last = self._last[stream]
            for partition in sorted(waiting, key=lambda one: (one <= last, one)):
                offset = committed[partition]
                first, messages = self._traffic.take(stream, partition, offset, max_records, whole=True)
                if messages and first == offset:
                    self._last[stream] = partition
                    end = offset + len(messages)
                    return Batch(stream, partition, offset, end, self._held[partition], messages, range(offset, end))
                if self._main.offsets("committed", stream, self._log.partitions)[partition] == offset:
                    raise LogUnusable(
                        "unread input is missing: its two files are not of one moment, restore both",
                        stream=stream, partition=partition, offset=offset,
                    )  # fmt: skip
        return None

    def _could_claim(self, now: float) -> bool:
        with self._main.guarded():
            free, others = self._main.db.execute(
                "SELECT (SELECT count(*) FROM leases WHERE worker_id IS NULL OR expires_at<=?1), "
                "(SELECT count(*) FROM workers WHERE alive_until>?1 AND id<>?2)",
                (now, self._worker_id),
            ).fetchone()
        return bool(free and len(self._held) < -(-self._log.partitions // (others + 1)))

    def _balance(self, now: float) -> None:
        """Say that this worker lives, and hold its fair share of the partitions: release, claim, renew."""
        until = now + self._log.lease_s
        with self._main.transaction() as db:
            if self._beat_at is None:
                db.execute("UPDATE leases SET worker_id=NULL WHERE worker_id=?", (self._worker_id,))
            db.execute("DELETE FROM workers WHERE alive_until<=?", (now,))
            db.execute("INSERT OR REPLACE INTO workers VALUES (?, ?)", (self._worker_id, until))
            (live,) = db.execute("SELECT count(*) FROM workers").fetchone()
            mine = db.execute(
                "SELECT partition, epoch FROM leases WHERE worker_id=? ORDER BY partition DESC",
                (self._worker_id,),
            )
            held = {partition: epoch for partition, epoch in mine if self._held.get(partition) == epoch}
            share = -(-self._log.partitions // live)
            surplus = [one for one in held if one != self._outstanding][: max(0, len(held) - share)]
            for partition in surplus:
                db.execute("UPDATE leases SET worker_id=NULL WHERE partition=?", (partition,))
                del held[partition]
            db.executemany("UPDATE leases SET expires_at=? WHERE partition=?", [(until, one) for one in held])
            claimed = db.execute(
                "UPDATE leases SET epoch=epoch+1, worker_id=?, expires_at=? WHERE partition IN ("
                "SELECT partition FROM leases WHERE worker_id IS NULL OR expires_at<=? "
                "ORDER BY partition LIMIT ?) "
                "RETURNING partition, epoch",
                (self._worker_id, until, now, max(0, share - len(held))),
            )
            held.update(claimed.fetchall())
        self._held = held
        self._beat_at = now + self._log.lease_s / 5

    async def commit(self, batch: Batch, outputs: Sequence[Output], check: Callable[[], None]) -> None:
        """Write all outputs and the batch's offsets, or nothing; durable on return, and visible to whoever reads after.

        `check` is called at the last moment before the commit; if it raises, nothing is written. Raises
        Fenced when the lease was lost or the batch is not the next one.
        """
        self._log._checked(outputs)  # noqa: SLF001 — as above
        if any(output.stream in INPUTS for output in outputs):
            raise ValueError("an input stream is no output")
        place = (batch.stream, batch.partition)
        with self._main.transaction() as db:
            holder = db.execute(
                "SELECT 1 FROM leases WHERE partition=? AND epoch=? AND worker_id=?",
                (batch.partition, batch.lease, self._worker_id),
            ).fetchone()
            moved = db.execute(
                "UPDATE committed SET next_offset=? WHERE stream=? AND partition=? AND next_offset=?",
                (batch.next_offset, *place, batch.offset),
            ).rowcount
            if not (holder and moved):
                raise Fenced(stream=batch.stream, partition=batch.partition, offset=batch.offset)
            for output in outputs:
                self._main.insert(output)
            check()
        if self._outstanding == batch.partition:
            self._outstanding = None

    async def committed_offsets(self, stream: str) -> list[int]:
        """Return the next offset to be committed of an input stream, per partition, by whichever worker."""
        return self._main.offsets("committed", stream, self._log.partitions)

    async def at_end(self) -> bool:
        """Return whether everything written to the input streams so far is committed, by whichever worker."""
        ends = [self._traffic.offsets("ends", stream, self._log.partitions) for stream in INPUTS]
        return ends == [await self.committed_offsets(stream) for stream in INPUTS]

    async def forget_consumed(self) -> int:
        """Delete clear input that is committed, so that no file holds it; return the number of messages.

        Overwrites rows and freed pages, then empties the WAL. Raises LogBusy if somebody reads for over a second:
        the rows are gone then, but the WAL keeps their bytes until a call succeeds.
        """
        done = self._consumed()
        gone = 0
        if done:
            with self._traffic.transaction():
                done = self._consumed()  # another worker may have been quicker
                for (stream, partition), (begin, offset) in done.items():
                    self._traffic.forget(stream, partition, offset)
                    gone += offset - begin
        self._traffic.truncate_wal()
        return gone

    def _consumed(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Return (stream, partition) → (first offset stored, next offset to be read), where they differ."""
        partitions = self._log.partitions
        return {
            (stream, partition): span
            for stream in INPUTS
            for partition, span in enumerate(
                zip(
                    self._traffic.begins(stream, partitions),
                    self._main.offsets("committed", stream, partitions),
                    strict=True,
                )
            )
            if span[0] < span[1]
        }

    async def close(self) -> None:
        """Give the partitions back at once; idempotent."""
        if self._closed:
            return
        with self._main.transaction() as db:
            for partition, epoch in self._held.items():
                db.execute(
                    "UPDATE leases SET worker_id=NULL WHERE partition=? AND epoch=? AND worker_id=?",
                    (partition, epoch, self._worker_id),
                )
            db.execute(
                "DELETE FROM workers WHERE id=?1 AND NOT EXISTS (SELECT 1 FROM leases WHERE worker_id=?1)",
                (self._worker_id,),
            )
        self._held = {}
        self._closed = True
