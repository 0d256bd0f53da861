"""Opens the parts of a configured deployment: log, key store, pipeline, registries, and who is asking."""

import os
import socket
import time
from types import TracebackType

from processors.pipeline import Pipeline
from processors.plan import Planner
from processors.screen.suppression import Tokens
from schemas.errors import InputInvalid
from streams.config import Config
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.reveal import Revealer
from streams.keys.roles import principal
from streams.keys.sqlite import SqliteKeyStore
from streams.log.sqlite import SqliteLog
from streams.state.registries import Registries


class Deployment:
    """Log and key store of one configuration, opened; a context manager that closes them. Opening blocks."""

    def __init__(self, config: Config, *, create: bool = True) -> None:
        """Open, or with `create` make, the log and the key store.

        Raises InputInvalid if there is none and `create` is off, and LogUnusable or KeysUnusable.
        """
        if not create and not config.log_path.exists():
            raise InputInvalid("there is no log here yet; publish something first", log=str(config.log_path))
        self.config = config
        self.log = SqliteLog.open(config.log_path, partitions=config.partitions)
        try:
            self.store = SqliteKeyStore.open(config.keys_path, config.kms_dir)
        except BaseException:
            self.log.close_now()
            raise
        self.planner = Planner(config.policy)
        token_key = self.store.token_key()
        self.pipeline = Pipeline(self.planner, Tokens(token_key.version, token_key.key))

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close both; idempotent."""
        self.log.close_now()
        self.store.close()

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
        return Revealer(self.log, self.store, self.planner, who)


def process_id() -> str:
    """Return a name for this process that no other process alive has: host, pid, start."""
    return f"{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
