"""Key stores for tests: what to ask them for, and the local key management service beside them."""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from processors.keyring import EpochRef, Needs, PersonRef
from schemas.fields import PLATFORM
from streams.keys.kms_local import LocalKms
from streams.keys.sql import SqlKeyStore
from streams.keys.sqlite import SqliteKeyStore
from streams.keys.store import Kms, KmsMaker

NOW = 4_102_473_600  # 2100-01-01T08:00:00Z
DAY = 86_400
TODAY = "2100-01-01"
MONTH = "2100-01"
LATER = NOW + 300 * DAY
LATER_DAY = "2100-10-28"
PII = EpochRef("pii", PLATFORM, MONTH)
FOREVER = EpochRef("suppression", PLATFORM, "-")


def _open(folder: Path, store_id: str, create: bool) -> Kms:
    return (LocalKms.create if create else LocalKms.open)(folder, store_id)


def local_kms(folder: Path) -> KmsMaker:
    """Return what makes or opens the local service in a folder; it can be pickled."""
    return partial(_open, folder)


def person(number: int, owner: str = PLATFORM, month: str = MONTH) -> PersonRef:
    """Return one of many people."""
    return PersonRef(owner, number.to_bytes(16, "big"), month)


def persons(refs: Iterable[PersonRef], deadline_s: int | None = LATER) -> Needs:
    """Return the need of secrets, up to a deadline."""
    return Needs({}, dict.fromkeys(refs, deadline_s))  # type: ignore[arg-type]


def epoch(ref: EpochRef, deadline_s: int | None = LATER, seals: int = 10) -> Needs:
    """Return the need of an epoch key, up to a deadline."""
    return Needs({ref: (deadline_s, seals)}, {})


def _open_sqlite(path: Path, kms: KmsMaker) -> SqlKeyStore:
    return SqliteKeyStore.open(path, kms)


class SqliteKeyStores:
    """The SQLite key store in a folder of its own, with a clock that is moved by hand."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data" / "keys.db"
        self.kms_folder = folder / "kms"
        self.now = float(NOW)
        self.stores: list[SqlKeyStore] = []

    def open(self, **options: Any) -> SqlKeyStore:
        options = {"clock": lambda: self.now, "busy_timeout_s": 5.0} | options
        self.stores.append(SqliteKeyStore.open(self.path, local_kms(self.kms_folder), **options))
        return self.stores[-1]

    def opener(self) -> Callable[[], SqlKeyStore]:
        return partial(_open_sqlite, self.path, local_kms(self.kms_folder))

    def elapse(self, duration_s: float) -> None:
        self.now += duration_s

    def run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        db = sqlite3.connect(self.path)
        try:
            with db:
                return db.execute(query, values).fetchall()
        finally:
            db.close()

    def close(self) -> None:
        for store in self.stores:
            store.close()
