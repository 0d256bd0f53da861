"""What officers' work leaves in the key store: restrictions and holds, requests with their clocks, how far a job got.

Rules of this file: one class for every key store, in SQL that all of them speak. A person stands in it by tokens, and
by the number only in a `secret` of the store; a reason is a code or case reference. Calls block and raise as those of
the store do.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import orjson

AT_WILL = "9999-12-31"
"""The destruction day of keys that somebody ends: those of holds, and the numbers of marks.

A day of their own, so that re-wrapping it makes no backup useless for anything else.
"""
MarkKind = Literal["restriction", "hold"]
RequestKind = Literal["access", "erase", "restrict", "unrestrict", "hold", "release", "export", "rectify", "object"]


ENDS = ("done", "refused")
"""The outcomes with which a request ends for good."""


class Mark(NamedTuple):
    """A restriction or a legal hold. Of a person (`tokens`), or for a hold of an account and a period.

    `owner` is whose data it is about: the platform's or an account's. `from_s` and `to_s` bound the communications
    of an account's hold, Unix s, the end excluded; None: no bound. `ended_s` None: in force.
    """

    id: str  # 32 hex digits
    kind: MarkKind
    owner: str
    tokens: tuple[bytes, ...]
    reason: str
    at_s: int
    from_s: int | None = None
    to_s: int | None = None
    ended_s: int | None = None

    def __repr__(self) -> str:
        return f"Mark({self.kind}, {self.id})"


class Request(NamedTuple):
    """A person's request, which has clocks (CAL-4): the accounts told by `notice_due_s`, done by `due_s`; Unix s.

    `notify`: account -> when it was told; None: not yet. `closed_s` None: open.
    """

    id: str  # 32 hex digits
    kind: RequestKind
    owner: str
    reason: str
    received_s: int
    notice_due_s: int
    due_s: int
    notify: Mapping[str, int | None]
    closed_s: int | None = None
    outcome: str | None = None  # done, refused:held, ...: a code

    @property
    def untold(self) -> list[str]:
        """The accounts that are still to be told, in order."""
        return sorted(account for account, told_s in self.notify.items() if told_s is None)

    @property
    def ended(self) -> bool:
        """Whether it has come to an end for good, whoever is still to be told."""
        return self.outcome in ENDS

    @property
    def next_due_s(self) -> int | None:
        """When the next of its clocks runs out, Unix s; None: nothing is left to be done."""
        clocks = [self.notice_due_s] if self.untold else []
        if not self.ended:
            clocks.append(self.due_s)
        return min(clocks, default=None)

    def is_overdue(self, now_s: float) -> bool:
        """Return whether one of its clocks has run out."""
        return self.next_due_s is not None and self.next_due_s <= now_s


class Head(NamedTuple):
    """The last audit entry of a writer: sequence number from 1, and the SHA-256 of its value (64 hex digits)."""

    writer: str
    seq: int
    digest: str
    at_s: int


class Ledger(Protocol):
    """The officers' tables of a key store."""

    def add_mark(self, mark: Mark, number: str | None) -> None:
        """Keep a mark; the person's number is kept sealed, for a rotation of the token key."""

    def end_mark(self, mark_id: str, at_s: int) -> None:
        """End a mark: tokens and number are deleted, the rest stays for evidence; idempotent."""

    def marks(self, kind: MarkKind, *, ended: bool = False) -> list[Mark]:
        """Return the marks in force, or with `ended` all there ever were, by when they were made."""

    def number_of(self, mark_id: str) -> str | None:
        """Return the number of a person's mark in force."""

    def retoken(self, mark_id: str, tokens: Sequence[bytes]) -> None:
        """Give a person's mark the tokens of all token keys there are."""

    def put_request(self, request: Request) -> None:
        """Keep a request, or what has become of it."""

    def requests(self, *, closed: bool = False) -> list[Request]:
        """Return the open requests, or with `closed` all, soonest due first."""

    def add_correction(self, stream: str, partition: int, offset: int, at_offset: int) -> None:
        """Note that the record at `offset` is corrected by the one at `at_offset` of the same partition."""

    def corrections(self, stream: str, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        """Return, of records by (partition, offset), the offsets of their corrections, oldest first."""

    def progress(self, name: str) -> int | None:
        """Return how far a job got, if it ever said."""

    def progresses(self, prefix: str) -> dict[str, int]:
        """Return how far the jobs got whose names begin so, by name."""

    def set_progress(self, name: str, value: int) -> None:
        """Keep how far a job got."""

    def drop_progress(self, prefix: str) -> None:
        """Forget how far the jobs got whose names begin so."""

    def put_head(self, head: Head) -> None:
        """Keep the head of a writer's audit chain, durable on return; an older one never replaces a newer."""

    def heads(self) -> list[Head]:
        """Return the heads of all audit chains that are not dropped, by writer."""

    def drop_head(self, writer: str, seq: int) -> None:
        """Forget the head of a chain that has ended, if it still is this one: a checkpoint has it now."""


class Tables(Protocol):
    """What the ledger needs of the store that it is part of (streams/keys/sql.py)."""

    def reading(self) -> AbstractContextManager[int]:
        """Return a transaction that reads."""

    def writing(self) -> AbstractContextManager[int]:
        """Return a transaction that writes."""

    def run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement inside a transaction, and return its rows."""

    def secret(self, name: str) -> bytes | None:
        """Return a small secret."""

    def put_secret(self, name: str, value: bytes, day: str) -> None:
        """Keep a small secret."""

    def drop_secret(self, name: str) -> None:
        """Delete a small secret."""


LEDGER_TABLES = """
CREATE TABLE marks (id {text} PRIMARY KEY, kind {text} NOT NULL, owner {text} NOT NULL, reason {text} NOT NULL,
    at_s {int} NOT NULL, from_s {int}, to_s {int}, ended_s {int});
CREATE TABLE mark_tokens (mark_id {text} NOT NULL, place {int} NOT NULL, token {bytes} NOT NULL,
    PRIMARY KEY (mark_id, place));
CREATE INDEX mark_tokens_token ON mark_tokens (token);
CREATE TABLE requests (id {text} PRIMARY KEY, kind {text} NOT NULL, owner {text} NOT NULL, reason {text} NOT NULL,
    received_s {int} NOT NULL, notice_due_s {int} NOT NULL, due_s {int} NOT NULL, notify {text} NOT NULL,
    closed_s {int}, outcome {text});
CREATE TABLE corrections (stream {text} NOT NULL, part {int} NOT NULL, place {int} NOT NULL, at_place {int} NOT NULL,
    PRIMARY KEY (stream, part, place, at_place));
CREATE TABLE progress (name {text} PRIMARY KEY, value {int} NOT NULL);
CREATE TABLE heads (writer {text} PRIMARY KEY, seq {int} NOT NULL, digest {text} NOT NULL, at_s {int} NOT NULL);
"""

_PLACES = 300  # in one IN list


class SqlLedger:
    """The officers' tables of a key store (`Ledger`)."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add_mark(self, mark: Mark, number: str | None) -> None:
        """Keep a mark, and first the number, sealed; calling again changes nothing."""
        if number is not None:
            self._tables.put_secret(_number_name(mark.id), number.encode(), AT_WILL)
        with self._tables.writing():
            self._tables.run(
                "INSERT INTO marks VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (mark.id, mark.kind, mark.owner, mark.reason, mark.at_s, mark.from_s, mark.to_s, mark.ended_s),
            )
            self._put_tokens(mark.id, mark.tokens)

    def end_mark(self, mark_id: str, at_s: int) -> None:
        """End a mark, then delete its number; idempotent, and finished by calling again."""
        with self._tables.writing():
            self._tables.run("UPDATE marks SET ended_s = ? WHERE id = ? AND ended_s IS NULL", (at_s, mark_id))
            self._tables.run("DELETE FROM mark_tokens WHERE mark_id = ?", (mark_id,))
        self._tables.drop_secret(_number_name(mark_id))

    def marks(self, kind: MarkKind, *, ended: bool = False) -> list[Mark]:
        """Return the marks in force, or all there ever were, by when they were made."""
        with self._tables.reading():
            rows = self._tables.run(
                "SELECT id, owner, reason, at_s, from_s, to_s, ended_s FROM marks WHERE kind = ? "
                f"{'' if ended else 'AND ended_s IS NULL'} ORDER BY at_s, id",
                (kind,),
            )
            tokens: dict[str, list[bytes]] = {}
            for mark_id, token in self._tables.run("SELECT mark_id, token FROM mark_tokens ORDER BY mark_id, place"):
                tokens.setdefault(mark_id, []).append(token)
        return [
            Mark(mark_id, kind, owner, tuple(tokens.get(mark_id, ())), reason, *rest)
            for mark_id, owner, reason, *rest in rows
        ]

    def number_of(self, mark_id: str) -> str | None:
        """Return the number of a person's mark in force."""
        number = self._tables.secret(_number_name(mark_id))
        return None if number is None else number.decode()

    def retoken(self, mark_id: str, tokens: Sequence[bytes]) -> None:
        """Give a person's mark in force the tokens of all token keys there are."""
        with self._tables.writing():
            if self._tables.run("SELECT 1 FROM marks WHERE id = ? AND ended_s IS NULL", (mark_id,)):
                self._tables.run("DELETE FROM mark_tokens WHERE mark_id = ?", (mark_id,))
                self._put_tokens(mark_id, tokens)

    def _put_tokens(self, mark_id: str, tokens: Sequence[bytes]) -> None:
        for place, token in enumerate(tokens):
            self._tables.run("INSERT INTO mark_tokens VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (mark_id, place, token))

    def put_request(self, request: Request) -> None:
        """Keep a request, or what has become of it."""
        with self._tables.writing():
            self._tables.run(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "kind = excluded.kind, owner = excluded.owner, reason = excluded.reason, "
                "received_s = excluded.received_s, notice_due_s = excluded.notice_due_s, due_s = excluded.due_s, "
                "notify = excluded.notify, closed_s = excluded.closed_s, outcome = excluded.outcome",
                (*request[:7], orjson.dumps(dict(request.notify)).decode(), request.closed_s, request.outcome),
            )

    def requests(self, *, closed: bool = False) -> list[Request]:
        """Return the open requests, or all, soonest due first."""
        with self._tables.reading():
            rows = self._tables.run(
                "SELECT id, kind, owner, reason, received_s, notice_due_s, due_s, notify, closed_s, outcome "
                f"FROM requests {'' if closed else 'WHERE closed_s IS NULL'} ORDER BY due_s, received_s, id"
            )
        return [
            Request._make((*head, orjson.loads(notify), closed_s, outcome)) for *head, notify, closed_s, outcome in rows
        ]

    def add_correction(self, stream: str, partition: int, offset: int, at_offset: int) -> None:
        """Note that a record is corrected by another of its partition; idempotent."""
        with self._tables.writing():
            self._tables.run(
                "INSERT INTO corrections VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (stream, partition, offset, at_offset),
            )

    def corrections(self, stream: str, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        """Return the offsets of the corrections of those records that have any, oldest first."""
        found: dict[tuple[int, int], list[int]] = {}
        asked = list(places)
        with self._tables.reading():
            if not self._tables.run("SELECT 1 FROM corrections WHERE stream = ? LIMIT 1", (stream,)):
                return found
            for start in range(0, len(asked), _PLACES):
                some = asked[start : start + _PLACES]
                values = ",".join(["(?, ?)"] * len(some))
                for part, place, at_place in self._tables.run(
                    f"WITH asked (a, b) AS (VALUES {values}) SELECT part, place, at_place FROM asked "
                    "JOIN corrections ON part = a AND place = b WHERE stream = ? ORDER BY at_place",
                    (*(number for one in some for number in one), stream),
                ):
                    found.setdefault((part, place), []).append(at_place)
        return found

    def progress(self, name: str) -> int | None:
        """Return how far a job got, if it ever said."""
        with self._tables.reading():
            rows = self._tables.run("SELECT value FROM progress WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def progresses(self, prefix: str) -> dict[str, int]:
        """Return how far the jobs got whose names begin so, by name."""
        with self._tables.reading():
            query = "SELECT name, value FROM progress WHERE substr(name, 1, ?) = ? ORDER BY name"
            return {name: value for name, value in self._tables.run(query, (len(prefix), prefix))}  # noqa: C416 — typed rows

    def set_progress(self, name: str, value: int) -> None:
        """Keep how far a job got."""
        with self._tables.writing():
            self._tables.run(
                "INSERT INTO progress VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (name, value),
            )

    def drop_progress(self, prefix: str) -> None:
        """Forget how far the jobs got whose names begin so."""
        with self._tables.writing():
            self._tables.run("DELETE FROM progress WHERE substr(name, 1, ?) = ?", (len(prefix), prefix))

    def put_head(self, head: Head) -> None:
        """Keep the head of a writer's audit chain, durable on return; an older one never replaces a newer."""
        with self._tables.writing():
            self._tables.run(
                "INSERT INTO heads VALUES (?, ?, ?, ?) ON CONFLICT (writer) DO UPDATE SET seq = excluded.seq, "
                "digest = excluded.digest, at_s = excluded.at_s WHERE heads.seq < excluded.seq",
                head,
            )

    def heads(self) -> list[Head]:
        """Return the heads of all audit chains that are not dropped, by writer."""
        with self._tables.reading():
            rows = self._tables.run("SELECT writer, seq, digest, at_s FROM heads ORDER BY writer")
        return [Head(*row) for row in rows]

    def drop_head(self, writer: str, seq: int) -> None:
        """Forget the head of a chain that has ended, if it still is this one."""
        with self._tables.writing():
            self._tables.run("DELETE FROM heads WHERE writer = ? AND seq = ?", (writer, seq))


def _number_name(mark_id: str) -> str:
    return f"mark/{mark_id}"
