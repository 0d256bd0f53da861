"""Opens the parts of a configured deployment: log, key store, pipeline, registries, and who is asking."""

import fcntl
import hashlib
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from processors.pipeline import Pipeline
from processors.plan import Planner
from processors.screen.suppression import Tokens
from schemas.catalog import CATALOG
from schemas.errors import InputInvalid, KeysUnusable, LogUnusable
from streams.config import Config
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.reveal import Revealer
from streams.keys.roles import principal
from streams.keys.sqlite import SqliteKeyStore
from streams.keys.store import KeyStore
from streams.log.kafka import KafkaLog
from streams.log.protocol import Log
from streams.log.sqlite import SqliteLog
from streams.state.registries import Registries
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
        token_key = store.token_key()
        self.tokens = Tokens(token_key.version, token_key.key)
        self.pipeline = Pipeline(self.planner, self.tokens)

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config, *, create: bool = True, busy_s: float = BUSY_S) -> AsyncIterator["Deployment"]:
        """Open, or with `create` make, the log and the key store, and close both at the end.

        Raises InputInvalid if there is none and `create` is off, and LogUnusable or KeysUnusable.
        """
        if not create and config.log_path is not None and not config.log_path.exists():
            raise InputInvalid("there is no log here yet; publish something first", log=str(config.log_path))
        if not create and config.kafka is not None and not config.keys_path.exists():
            raise InputInvalid("there is no key store here; set `data` to its folder", file=str(config.keys_path))
        log = await open_log(config, busy_s=busy_s)
        try:
            if not config.keys_path.exists() and await _has_outputs(log):
                raise KeysUnusable(
                    "the key store is missing beside a log that has outputs: restore it from its backup;"
                    " a new one would open nothing and know of no opt-out",
                    file=str(config.keys_path),
                )
            store = SqliteKeyStore.open(config.keys_path, config.kms_dir, busy_timeout_s=busy_s)
            try:
                yield cls(config, log, store)
            finally:
                store.close()
        finally:
            await log.close()

    def registries(self) -> Registries:
        """Return the loaded registries."""
        return Registries(self.config.registries_dir)

    def keys(self) -> tuple[KeyCache, KeyLease]:
        """Return a key cache and its lease, for a process that seals."""
        lease = KeyLease(self.store, process_id(), self.config.key_lease_s)
        lease.renew()
        return KeyCache(self.store, lease), lease

    def revealer(self) -> Revealer:
        """Return the library that opens sealed records, for the user this process runs as."""
        who = principal(self.config.roles_path, self.config.keys_path)
        return Revealer(self.log, self.store, self.planner, who, on_denied=partial(denied, self.config.watch_path))


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
