"""Opens the parts of a configured deployment: log, key store, pipeline, registries, and who is asking."""

import fcntl
import hashlib
import itertools
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

from processors.pipeline import Pipeline
from processors.plan import Planner
from processors.screen.suppression import Tokens
from schemas.catalog import CATALOG
from schemas.errors import InputInvalid, KeysUnusable, LogUnusable, Retriable, TokensChange
from streams.config import Config
from streams.keys.audit import Auditor
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.opening import open_store, store_exists
from streams.keys.reveal import Revealer
from streams.keys.roles import Principal, principal
from streams.keys.store import KeyStore
from streams.log.kafka import KafkaLog
from streams.log.protocol import Log
from streams.log.sqlite import SqliteLog
from streams.state.entries import EXEMPTIONS, SUPPRESSIONS, EntryTail, Kept
from streams.state.registries import Registries
from streams.state.snapshots import Child, Snapshots
from streams.watch.watch import denied

BUSY_S = 10.0
"""How long a call waits for another process that holds the log or the key store."""


async def open_log(config: Config, *, busy_s: float = BUSY_S) -> Log:
    """Return the log of a configuration; on SQLite made if there is none, on Kafka not connected yet.

    Raises LogUnusable.
    """
    if config.kafka is not None:
        return KafkaLog(config.kafka, partitions=config.partitions, lease_s=config.lease_s)
    if config.log_path is None:
        raise ValueError("a configuration names one log")
    return SqliteLog.open(config.log_path, partitions=config.partitions, lease_s=config.lease_s, busy_s=busy_s)


@asynccontextmanager
async def reading(config: Config) -> AsyncIterator[Log]:
    """Open the log alone, for whoever needs no key. Raises InputInvalid if there is none."""
    if config.log_path is not None and not config.log_path.exists():
        raise InputInvalid("there is no log here yet; publish something first", log=str(config.log_path))
    log = await open_log(config)
    try:
        yield log
    finally:
        await log.close()


async def _has_outputs(log: Log) -> bool:
    """Return whether workers ever wrote anything. Raises KeysUnusable to whoever may not see that."""
    try:
        ends = [await log.end_offsets(row.name) for row in CATALOG.values() if "worker" in row.writers]
    except LogUnusable as error:
        raise KeysUnusable(
            f"there is no key store here, and only workers may make one: set `data` to its folder ({error})"
        ) from None
    return any(map(any, ends))


class Deployment:
    """Log, key store and pipeline of one configuration; `async with Deployment.open(config) as deployment:`."""

    def __init__(self, config: Config, log: Log, store: KeyStore) -> None:
        self.config = config
        self.log = log
        self.store = store
        self.planner = Planner(config.policy)
        self._auditor: Auditor | None = None
        self.tokens = Tokens(*store.token_keys().current)
        self.pipeline = Pipeline(self.planner, self.tokens)
        self._snapshots = Snapshots(config.entries_dir, store.store_id, partial(_gathering, config, store.store_id))

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: Config, *, create: bool = True, busy_s: float = BUSY_S, outdated: bool = False
    ) -> AsyncIterator["Deployment"]:
        """Open, or with `create` make, the log and the key store, and close both at the end.

        `outdated`: also a key store that a backup brought back, which is to be reconciled. Raises InputInvalid if
        there is none and `create` is off, and LogUnusable or KeysUnusable.
        """
        if not create and config.log_path is not None and not config.log_path.exists():
            raise InputInvalid("there is no log here yet; publish something first", log=str(config.log_path))
        known = store_exists(config)
        if not create and config.kafka is not None and not known:
            raise InputInvalid("there is no key store here; set `data` to its folder", file=str(config.keys_path))
        log = await open_log(config, busy_s=busy_s)
        try:
            if not known and await _has_outputs(log):
                raise KeysUnusable(
                    "the key store is missing beside a log that has outputs: restore it from its backup;"
                    " a new one would open nothing and know of no opt-out",
                    file=str(config.keys_path),
                )
            store = open_store(config, create=not outdated, busy_s=busy_s, outdated=outdated)
            try:
                deployment = cls(config, log, store)
                try:
                    yield deployment
                finally:
                    deployment._snapshots.close()
            finally:
                store.close()
        finally:
            await log.close()

    def registries(self) -> Registries:
        """Return the loaded registries."""
        return Registries(self.config.registries_dir)

    def suppressions(self, *, waits: bool = True) -> EntryTail:
        """Return the opt-outs and blocks of everybody, under the token key of `tokens`; nothing is read yet.

        While a first snapshot of many is made, it `waits`, and says so on standard error; or else it raises Gathering.
        """
        return self._entries(SUPPRESSIONS, waits=waits)

    def exemptions(self, *, waits: bool = True) -> EntryTail:
        """Return the exemptions of everybody, as `suppressions`."""
        return self._entries(EXEMPTIONS, waits=waits)

    def _entries(self, kept: Kept, *, waits: bool) -> EntryTail:
        return EntryTail(self.log, kept, self.tokens.version, self._snapshots, told=_say if waits else None)

    def keys(self, *, rotating: bool = False) -> tuple[KeyCache, KeyLease]:
        """Return a key cache and its lease, for a process that seals. Raises TokensChange, but not to who rotates.

        Under the lease the token key stays current: a rotation waits until the lease has run out or taken note.
        """
        lease = KeyLease(self.store, process_id(), self.config.key_lease_s)
        try:
            lease.renew()
            if not rotating:
                self.settled()
        except BaseException:
            with suppress(Retriable):  # it runs out by itself
                lease.drop()
            raise
        return KeyCache(self.store, lease), lease

    @property
    def margin_s(self) -> float:
        """So long before the end of its key lease a process must have begun to commit.

        Brokers may take a commit on so much later; the file of a log takes it at once.
        """
        return 0.0 if self.config.kafka is None else self.config.kafka.transaction_timeout_ms / 1000

    def settled(self) -> None:
        """Return if tokens and pipeline are those of the current token key. Blocks; raises TokensChange otherwise."""
        keys = self.store.token_keys()
        if keys.changing or keys.current.version != self.tokens.version:
            raise TokensChange

    def refresh_tokens(self) -> Pipeline:
        """Return the pipeline of the current token key: another one after a rotation. Blocks; raises TokensChange."""
        keys = self.store.token_keys()
        if keys.changing:
            raise TokensChange
        if keys.current.version != self.tokens.version:
            self.tokens = Tokens(*keys.current)
            self.planner = Planner(self.config.policy)  # the one before knows people by the token of before
            self.pipeline = Pipeline(self.planner, self.tokens)
        return self.pipeline

    def revealer(self) -> Revealer:
        """Return the library that opens sealed records, for the user this process runs as."""
        told = partial(denied, self.config.watch_path)
        return Revealer(
            self.log,
            self.store,
            self.planner,
            self.who(),
            self.auditor(),
            on_denied=told,
            suppressions=self.suppressions(waits=False),
            exemptions=self.exemptions(waits=False),
        )

    def who(self) -> Principal:
        """Return the user this process runs as, with the grants that are theirs. Reads files."""
        config = self.config
        return principal(config.roles_path, config.keys_path if config.postgres is None else config.folder)

    def auditor(self) -> Auditor:
        """Return what writes this process's audit entries: one chain."""
        if self._auditor is None:
            name = self.who().name
            self._auditor = Auditor(self.log, self.store.ledger, self.planner, name, sequence=self.store.sequence)
        return self._auditor


def _gathering(config: Config, store_id: str, stream: str, version: int) -> Child:
    """Start a child that makes the snapshot of a stream's entries under a token key. Does not block."""
    child = subprocess.Popen((sys.executable, "-m", "streams.gather"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    if child.stdin is not None:
        with suppress(BrokenPipeError):
            child.stdin.write(pickle.dumps((config, store_id, stream, version, os.getpid())))
            child.stdin.close()
    return child


def _say(what: str) -> None:
    sys.stderr.write(f"streamveil: waiting: {what}\n")


@contextmanager
def worker_slot(config: Config) -> Iterator[str]:
    """Yield a name for a worker of this machine that no other process alive has: the first one that is free.

    A worker that was killed and is started again has the same name, and gets its partitions back at once.
    """
    folder = config.folder.resolve()
    for number in itertools.count():
        slot = os.open(folder / f"worker-{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(slot)
            continue
        try:
            where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
            yield f"{socket.gethostname()}-{where}-{number}"
        finally:
            os.close(slot)
        return


def process_id() -> str:
    """Return a name for this process that no other process alive has: host, pid, start."""
    return f"{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
