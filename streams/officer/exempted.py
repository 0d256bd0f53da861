"""Copies exemptions under another token key, while that is rotated.

Rules of this file:
- The copy is a difference, as that of opt-outs (`rotation.Copy`): what the entries of the new key lack to stand as
  those of the old one do. So it may be killed and done again.
- The number comes from the sealed part, opened through the `Revealer`: authorised and logged. An exemption that does
  not open is left behind, for without it less is cleared; how many those are is told.
- What has ended is left behind too, and a withdrawal is copied only of what was copied.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import orjson

from processors.exemption import EXEMPT, STREAM, Exemption, withdrawing
from processors.screen.suppression import State, Tokens, parse_key
from schemas.catalog import partition_for
from schemas.errors import LogUnusable
from schemas.outbound import Message, Output
from streams.deployment import Deployment
from streams.exemptions import key_of, write
from streams.keys import reveal
from streams.keys.store import TokenKey
from streams.log.protocol import Stored
from streams.officer.leases import rotating
from streams.officer.scan import decided, everything, scan

_PAGE: Final = 1000

_Place = tuple[int, int]


class Moved(NamedTuple):
    """What a copy came to: exemptions written, and those left behind because they do not open."""

    written: int
    dropped: int


class _Old(NamedTuple):
    """What an entry of the old key is, and where its latest exemption and its latest record lie."""

    state: State
    exempted: _Place | None
    latest: _Place


class ExemptionCopy:
    """Writes the exemptions of one token key under another. Memory: some hundred bytes for each, of both keys."""

    def __init__(
        self, deployment: Deployment, version: int, key: TokenKey, *, reason: str, current: int | None = None
    ) -> None:
        """Take the version to copy from, whose key is not needed, and the key to copy to.

        `reason`: what opening them is logged with. `current`: the version that is current meanwhile, if it is not the
        one to copy from.
        """
        self._deployment = deployment
        self._version = version
        self._current = version if current is None else current
        self._changing = False
        self._tokens = Tokens(*key)
        self._reason = reason
        self._revealer = deployment.revealer()
        self._next: list[int] | None = None
        self._old: dict[bytes, _Old] = {}  # keys without their ends
        self._new: dict[bytes, State] = {}
        self._copies: dict[bytes, tuple[bytes, bytes]] = {}  # entry of the old key → new token, key of its exemption

    async def run(self, advance: Callable[[int], None] = lambda _: None) -> Moved:
        """Read on to the end of the stream, and write what the new key's entries lack; durable on return.

        `advance` is told of entries written. Blocks. Raises RevealDenied; PolicyInvalid if the policy has no rule for
        such data any more; LogBusy if something stays undecided; TokensChange if another process got ahead.
        """
        log = self._deployment.log
        self._changing = self._deployment.store.token_keys().changing
        begins = self._next or await log.begin_offsets(STREAM)
        ends = await decided(log, STREAM)
        async for page in scan(log, STREAM, everything, begins=begins, ends=ends, page_records=_PAGE):
            for stored in page:
                self._fold(stored)
        self._next = ends
        written = dropped = 0
        async for page in scan(log, STREAM, everything, begins=begins, ends=ends, page_records=_PAGE):
            now_s = int(time.time())
            here = [one for one in map(self._latest, page) if one is not None]
            lifted = [stored for stored, old in here if not old.state.out and _place(stored) == old.latest]
            wanted = [(stored, old) for stored, old in here if self._is_wanted(stored, old, now_s)]
            gone = self._withdrawals(lifted, now_s)
            opened = await self._revealer.reveal([stored for stored, _ in wanted], self._reason) if wanted else []
            exemptions: list[Exemption] = []
            for (stored, old), result in zip(wanted, opened, strict=True):
                if result.state is not reveal.State.REVEALED:
                    dropped += old.state.out
                    continue
                one = self._copied(stored, result.fields["number"])
                if old.state.out and self._new.get(_stem(one.entry)) != old.state:
                    exemptions.append(one)
                    self._new[_stem(one.entry)] = old.state
                elif not old.state.out:
                    gone += self._withdrawals([stored], now_s)
            await self._write(exemptions, gone, now_s)
            written += len(exemptions)
            advance(len(exemptions))
        return Moved(written, dropped)

    def _fold(self, stored: Stored) -> None:
        """Take a record into the states of its key's entries."""
        version, out, expires_s, _ = _told(stored)
        stem, state = _stem(stored.key or b""), State(out, expires_s)
        if version == self._tokens.version:
            self._new[stem] = state
        elif version == self._version:
            before = self._old.get(stem)
            exempted = _place(stored) if out else before and before.exempted
            self._old[stem] = _Old(state, exempted, _place(stored))

    def _latest(self, stored: Stored) -> tuple[Stored, _Old] | None:
        """Return a record with its entry, if it is one of those that say what that is."""
        old = self._old.get(_stem(stored.key or b""))
        return (stored, old) if old is not None and _place(stored) in (old.exempted, old.latest) else None

    def _is_wanted(self, stored: Stored, old: _Old, now_s: int) -> bool:
        """Return whether an exemption must be opened: it is in force, or was withdrawn after it was copied."""
        if _place(stored) != old.exempted or old.state.event_s <= now_s:
            return False
        return old.state.out or (bool(self._new) and _stem(stored.key or b"") not in self._copies)

    def _copied(self, stored: Stored, number: str) -> Exemption:
        """Return the exemption of the new key."""
        *_, fields = _told(stored)
        _, _, rule, _ = parse_key(stored.key or b"")
        account, token = fields["account_id"], self._tokens.of(number)
        entry = key_of(self._tokens.version, token, account, rule.class_, rule.channel)
        self._copies[_stem(stored.key or b"")] = token, entry
        given_s, expires_s = _unix_s(fields["given_at"]), _unix_s(fields["expires_at"])
        return Exemption(entry, account, rule.class_, given_s, expires_s, fields["evidence"], token, number)

    def _withdrawals(self, lifted: Sequence[Stored], now_s: int) -> list[tuple[bytes, Message]]:
        """Return what withdraws the copies of these, each with its token, where a copy stands."""
        found = []
        for stored in lifted:
            token, entry = self._copies.get(_stem(stored.key or b""), (b"", b""))
            state = self._new.get(_stem(entry))
            if state is not None and state.out:
                self._new[_stem(entry)] = state._replace(out=False)
                *_, fields = _told(stored)
                message = withdrawing(entry, fields, stored.headers, fields.get("reason"), now_s)
                found.append((token, message))
        return found

    async def _write(self, exemptions: Sequence[Exemption], gone: Sequence[tuple[bytes, Message]], now_s: int) -> None:
        if not exemptions and not gone:
            return
        deployment = self._deployment
        with rotating(deployment, self._current, changing=self._changing) as keys:
            if exemptions:
                await write(deployment, keys, exemptions, now_s)
            if gone:
                outputs: dict[int, list[Message]] = {}
                for token, message in gone:
                    outputs.setdefault(partition_for(token, deployment.log.partitions), []).append(message)
                check = keys.guard(deployment.margin_s)
                check()
                await deployment.log.append([Output(STREAM, *output) for output in outputs.items()])
                check()


def _place(stored: Stored) -> _Place:
    return stored.partition, stored.offset


def _stem(key: bytes) -> bytes:
    """Return the key of an entry without its end."""
    return key.rpartition(b"|")[0]


def _unix_s(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def _told(stored: Stored) -> tuple[int, bool, int, Mapping[str, Any]]:
    """Return version, direction, expiry (Unix s) and clear envelope of a record. Raises LogUnusable."""
    try:
        version, _, _, out = parse_key(stored.key or b"")
        fields = orjson.loads(stored.value)
        if out is not (fields["action"] == EXEMPT):
            raise ValueError("key and value disagree")
        return version, out, _unix_s(fields["expires_at"]), fields
    except (ValueError, KeyError, TypeError):
        raise LogUnusable(
            "a record of the exemptions stream cannot be read; the token key stays",
            stream=STREAM, partition=stored.partition, offset=stored.offset,
        ) from None  # fmt: skip
