"""The implementations that are held to the contract suites."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from streams.log.protocol import Log
from streams.log.sqlite import SqliteLog


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


_LOGS: dict[str, Callable[[Path], Logs]] = {"sqlite": SqliteLogs}


@pytest.fixture(params=_LOGS)
def log_factory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Logs]:
    """Yield each implementation of the log in turn, empty."""
    logs = _LOGS[request.param](tmp_path)
    yield logs
    logs.close()
