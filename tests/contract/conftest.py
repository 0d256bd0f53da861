"""The implementations that are held to the contract suites."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from streams.config import Kafka
from streams.keys.sql import SqlKeyStore
from streams.log.kafka import KafkaLog
from streams.log.protocol import Log
from streams.log.sqlite import SqliteLog
from tests.support.kafka import make_topics
from tests.support.keys import SqliteKeyStores

LEASE_S = 3.0
"""Of partitions, on Kafka."""


class Logs(Protocol):
    """One deployment's log, as the contract suite needs it; a new implementation adds one of these."""

    poll_s: float
    """How long a poll has to wait until it may say that there is nothing."""

    def open(self) -> Log:
        """Return one more handle on the same log, as another process would get it."""

    def heartbeats_due(self) -> None:
        """Let so much time pass that consumers share the partitions anew at their next poll, and keep theirs."""

    def close(self) -> None:
        """Close all handles; the test is over."""

    def leases_run_out(self) -> None:
        """Let so much time pass that the partitions of a consumer that does not poll are free."""


class SqliteLogs:
    """The SQLite log in a folder of its own, with leases on a clock that is moved by hand."""

    poll_s = 0.0

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log" / "log.db"
        self._now = 1_800_000_000.0
        self._opened: list[Log] = []

    def open(self) -> Log:
        self._opened.append(SqliteLog.open(self._path, lease_s=10, clock=lambda: self._now))
        return self._opened[-1]

    def close(self) -> None:
        for log in self._opened:
            asyncio.run(log.close())

    def heartbeats_due(self) -> None:
        self._now += 2

    def leases_run_out(self) -> None:
        self._now += 10


class KafkaLogs:
    """The log on a real broker, under a topic prefix of its own; leases run out in real time."""

    poll_s = 4.0

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._opened: list[Log] = []
        self._run = asyncio.run
        asyncio.run = self._run_and_close

    def _run_and_close(self, test: Coroutine[Any, Any, None]) -> None:
        """Run a test, and close its logs in the event loop that they live in."""

        async def both() -> None:
            try:
                await test
            finally:
                for log in self._opened:
                    await log.close()

        self._run(both())

    def open(self) -> Log:
        self._opened.append(KafkaLog(self._settings, partitions=4, lease_s=LEASE_S))
        return self._opened[-1]

    def close(self) -> None:
        asyncio.run = self._run

    def heartbeats_due(self) -> None:
        time.sleep(LEASE_S / 10)

    def leases_run_out(self) -> None:
        time.sleep(1.7 * LEASE_S)


def kafka_logs(request: pytest.FixtureRequest) -> Logs:
    """Return the log on the broker that all tests share, with topics that take whatever the contract writes."""
    settings = request.getfixturevalue("kafka")
    unbounded = {"message.timestamp.after.max.ms": str(2**62), "retention.ms": "-1"}
    make_topics(request.getfixturevalue("broker"), settings.prefix, 4, unbounded)
    return KafkaLogs(settings)


_LOGS: dict[str, Callable[[pytest.FixtureRequest], Logs]] = {
    "sqlite": lambda request: SqliteLogs(request.getfixturevalue("tmp_path")),
    "kafka": kafka_logs,
}


@pytest.fixture(params=_LOGS)
def log_factory(request: pytest.FixtureRequest) -> Iterator[Logs]:
    """Yield each implementation of the log in turn, empty."""
    logs = _LOGS[request.param](request)
    yield logs
    logs.close()


class KeyStores(Protocol):
    """One deployment's key store, as the contract suite needs it; a new implementation adds one of these.

    Instants of the suite lie in the year 2100: after those of any store that has a clock of its own.
    """

    kms_folder: Path
    """Of the local key management service that the stores are opened with, whatever database they are on."""

    def open(self, **options: Any) -> SqlKeyStore:
        """Return one more handle on the same store, as another process would get it; options as of its `open`."""

    def opener(self) -> Callable[[], SqlKeyStore]:
        """Return what opens, or makes, the store in another process; it can be pickled."""

    def elapse(self, duration_s: float) -> None:
        """Let time pass by the store's clock."""

    def run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement on the database, beside the store."""

    def close(self) -> None:
        """Close all handles; the test is over."""


_KEY_STORES: dict[str, Callable[[pytest.FixtureRequest], KeyStores]] = {
    "sqlite": lambda request: SqliteKeyStores(request.getfixturevalue("tmp_path")),
    "postgres": lambda request: request.getfixturevalue("postgres_stores"),
}


@pytest.fixture(params=_KEY_STORES)
def deployment(request: pytest.FixtureRequest) -> Iterator[KeyStores]:
    """Yield each implementation of the key store in turn, not made yet."""
    stores = _KEY_STORES[request.param](request)
    yield stores
    stores.close()
