"""Rotates the token key: every opt-out is written anew under another key, and nobody's opt-out is lost on the way.

    add a key ─▶ copy ─▶ copy what came meanwhile ─▶ hold ─▶ leases drained ─▶ copy the rest ─▶ switch ─▶
                 workers go on with the old key      workers wait              people's marks           … with the new

Rules of this file:
- The copy is a difference: what the entries of the new key lack to stand as those of the old one do. So each step may
  be killed and done again, and what is copied twice changes nothing.
- Numbers come from the sealed part of each entry, opened through the `Revealer`: authorised and logged. The old key is
  not needed.
- In doubt an entry gets wider: one whose sender or campaign is known by its token only, and not sealed beside the
  number, becomes an opt-out from the account, which no lift of the narrow one lifts.
- The audit entry `token_switch` is written when the copy is whole and before the switch: whoever finds it knows that
  the entries of the new key are all there are (`reconcile`).
- Two at once do no harm: each write, the hold and the switch are only done while the version that is copied from is
  current and the key that is copied to is waiting; the slower one ends with TokensChange.
- A mark whose number is lost (`nameless`) covers nobody under a new key: while one is in force nothing is rotated.
- Exemptions are copied beside the opt-outs (`exempted`); one that does not open is left behind, and counted.
- The old entries stay in the log until it is cut; they say nothing without their key. The old key stays as long as
  people's secrets are known under it: their months'.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import orjson

from processors.pipeline import Pipeline
from processors.screen.suppression import Change, Rule, State, Tokens, fold, parse_key, retokened
from schemas.errors import InputInvalid, KeysUnusable, LogBusy, LogUnusable, TokensChange
from streams.deployment import Deployment
from streams.keys import reveal
from streams.keys.ledger import Mark
from streams.keys.store import KeyStore, TokenKey
from streams.log.protocol import Stored
from streams.officer.exempted import ExemptionCopy
from streams.officer.leases import ROTATED, drained, rotating, unheard
from streams.optout import write
from streams.state.entries import SUPPRESSIONS

STREAM: Final = SUPPRESSIONS.stream
SWITCH: Final = "token_switch"
REASON: Final = "token-rotation"
_PAGE: Final = 1000
_SMALL: Final = 1000
"""Workers are made to wait once a pass over what came meanwhile was as small as this, or after `_PASSES`."""
_PASSES: Final = 5
_UNDECIDED_S: Final = 120.0
"""So long a transaction that somebody left open is waited for; brokers end one after a minute at most."""
_LOOK_S: Final = 0.05

_Entry = tuple[bytes, Rule]


class Rotated(NamedTuple):
    """What a rotation came to: the new version, opt-outs written under it, and how many of those had to be widened."""

    version: int
    written: int
    widened: int
    waited_s: float  # so long nothing was cleared
    exemptions: int  # written under it too
    dropped: int  # exemptions that did not open


class Copied(NamedTuple):
    """What a copy wrote."""

    written: int
    widened: int


class Copy:
    """Writes the opt-outs of one token key under another. Memory: as a worker's view, for both keys."""

    def __init__(self, deployment: Deployment, version: int, key: TokenKey, *, current: int | None = None) -> None:
        """Take the version to copy from, whose key is not needed, and the key to copy to.

        `current`: the version that is current meanwhile, if it is not the one to copy from.
        """
        self._deployment = deployment
        self._log = deployment.log
        self._version = version
        self._current = version if current is None else current
        self._changing = False  # as of when the pass under way began
        self._tokens = Tokens(*key)
        self._pipeline = Pipeline(deployment.planner, self._tokens)
        self._revealer = deployment.revealer()
        self._next: list[int] | None = None
        self._old: dict[_Entry, State] = {}
        self._new: dict[_Entry, tuple[State, str | None]] = {}
        self._wide: set[_Entry] = set()

    async def run(self, advance: Callable[[int], None] = lambda _: None) -> Copied:
        """Read on to the end of the stream, and write what the new key's entries lack; durable on return.

        `advance` is told of entries written. Raises RevealDenied; KeysUnusable if an entry does not open, for an
        opt-out would be lost; LogBusy if something before the end stays undecided; TokensChange if another process
        got ahead with a rotation.
        """
        self._changing = self._deployment.store.token_keys().changing
        begins = self._next or await self._log.begin_offsets(STREAM)
        ends = await self._log.end_offsets(STREAM)
        latest: dict[bytes, tuple[int, int]] = {}
        async for page in self._pages(begins, ends):
            for stored in page:
                self._fold(stored, latest)
        self._next = ends
        written = widened = 0
        for out in (True, False):  # who is out under a wider entry must be known before anything is lifted
            async for page in self._pages(begins, ends):
                wanted = [stored for stored in page if self._is_wanted(stored, latest, out=out)]
                if not wanted:
                    continue
                changes, wide = await self._changes(wanted)
                await self._write(changes)
                written, widened = written + len(changes), widened + wide
                advance(len(changes))
        return Copied(written, widened)

    def _fold(self, stored: Stored, latest: dict[bytes, tuple[int, int]]) -> None:
        """Take a record into the states of its key's entries."""
        version, token, rule, out, event_s, reason = _told(stored)
        entry = (token, rule)
        if version == self._tokens.version:
            state = fold(self._new[entry][0] if entry in self._new else None, out=out, event_s=event_s)
            if state is not None:
                self._new[entry] = (state, reason)
        elif version == self._version:
            latest[stored.key or b""] = (stored.partition, stored.offset)
            state = fold(self._old.get(entry), out=out, event_s=event_s)
            if state is not None:
                self._old[entry] = state

    def _is_wanted(self, stored: Stored, latest: Mapping[bytes, tuple[int, int]], *, out: bool) -> bool:
        """Return whether a record is the one that made an entry of the old key what it is."""
        if latest.get(stored.key or b"") != (stored.partition, stored.offset):
            return False
        _, token, rule, is_out = parse_key(stored.key or b"")
        state = self._old.get((token, rule))
        if state is None or state.out is not is_out or is_out is not out:
            return False
        return out or bool(self._new)  # a lift has nothing to lift where nothing was copied before

    async def _changes(self, wanted: Sequence[Stored]) -> tuple[list[Change], int]:
        """Return what the new key's entries lack to stand as these do, and how many of them are widened."""
        changes: list[Change] = []
        widened = 0
        opened = await self._revealer.reveal(wanted, REASON)
        for stored, result in zip(wanted, opened, strict=True):
            if result.state is not reveal.State.REVEALED:
                raise KeysUnusable(
                    f"an opt-out does not open ({result.state.value}), and would be lost; the token key stays",
                    stream=STREAM, partition=stored.partition, offset=stored.offset,
                )  # fmt: skip
            _, token, rule, *_, reason = _told(stored)
            number = result.fields["number"]
            named = result.fields.get(rule.scope.partition(":")[0])
            scope, is_wide = retokened(rule.scope, named, self._tokens)
            entry = (self._tokens.of(number), rule._replace(scope=scope))
            if is_wide:
                self._wide.add(entry)
            state = self._old[token, rule]
            lacking = list(_lacking(self._new.get(entry), state, reason, wide=entry in self._wide))
            changes += [
                Change(*entry, one.out, one.event_s, number, reason, None if is_wide else named) for one in lacking
            ]
            if lacking:
                self._new[entry] = (lacking[-1], reason)
                widened += is_wide
        return changes, widened

    async def _write(self, changes: Sequence[Change]) -> None:
        """Write changes under a key lease of their own. Raises TokensChange."""
        if not changes:
            return
        with rotating(self._deployment, self._current, changing=self._changing) as keys:
            await write(self._deployment, self._pipeline, keys, changes, int(time.time()))

    async def _pages(self, begins: Sequence[int], ends: Sequence[int]) -> AsyncIterator[list[Stored]]:
        """Yield all records from `begins` to `ends`. Raises LogBusy if some stay undecided."""
        for partition, (at, end) in enumerate(zip(begins, ends, strict=True)):
            offset = at
            while offset < end and (page := await self._read(partition, offset, end)):
                yield page
                offset = page[-1].offset + 1

    async def _read(self, partition: int, offset: int, end: int) -> list[Stored]:
        deadline_s = time.monotonic() + _UNDECIDED_S
        while True:
            try:
                page = await self._log.read(STREAM, partition, offset, _PAGE, end)
                return [stored for stored in page if stored.offset < end]
            except LogBusy:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(_LOOK_S)


def _told(stored: Stored) -> tuple[int, bytes, Rule, bool, int, str | None]:
    """Return version, token, rule, direction, event time (Unix s) and reason of a record. Raises LogUnusable."""
    try:
        version, token, rule, out = parse_key(stored.key or b"")
        fields = orjson.loads(stored.value)
        event_s = int(datetime.fromisoformat(fields["event_at"]).timestamp())
        return version, token, rule, out, event_s, fields.get("reason")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LogUnusable(
            "a record of the suppressions stream cannot be read; the token key stays",
            stream=STREAM, partition=stored.partition, offset=stored.offset,
        ) from None  # fmt: skip


def _lacking(new: tuple[State, str | None] | None, old: State, reason: str | None, *, wide: bool) -> Iterable[State]:
    """Yield the records that make an entry of the new key stand as that of the old one does.

    An entry that is wider than what it was copied from is never lifted, nor is its event time taken back.
    """
    state, why = new or (None, None)
    if old.out:
        later = state is not None and state.out and state.event_s > old.event_s
        if later and wide:
            return
        if later and state is not None:  # it was lifted and given again with an earlier event time
            yield State(out=False, event_s=state.event_s + 1)
        if later or state != old or why != reason:
            yield old
    elif state is not None and state.out and not wide:
        yield State(out=False, event_s=max(old.event_s, state.event_s + 1))


async def rotate_tokens(
    deployment: Deployment,
    *,
    advance: Callable[[int], None] = lambda _: None,
    on_wait: Callable[[list[str]], None] = unheard,
) -> Rotated:
    """Rotate the token key; killed half-way, calling again finishes it. Blocks on log and key store.

    No stream is re-encrypted and no worker stops; clearing waits from the hold to the switch, which is no longer than
    the key lease of a process that does not answer. `on_wait` is told of those.
    """
    store, auditor = deployment.store, deployment.auditor()
    refuse_nameless(store)
    before = store.token_keys()
    key = store.add_token_key()
    copy = Copy(deployment, before.current.version, key)
    exempted = ExemptionCopy(deployment, before.current.version, key, reason=REASON)
    done, moved = await copy.run(advance), await exempted.run(advance)
    written, widened = done
    exemptions, dropped = moved
    for _ in range(_PASSES):
        if before.changing or done.written + moved.written < _SMALL:
            break
        done, moved = await copy.run(advance), await exempted.run(advance)
        written, widened = written + done.written, widened + done.widened
        exemptions, dropped = exemptions + moved.written, dropped + moved.dropped
    if store.token_keys().current != before.current:
        raise TokensChange(ROTATED)
    began_s = time.monotonic()
    await drained(store, store.hold_tokens(key.version), on_wait=on_wait)
    # its append also waits for whoever is still writing to the file of a log
    await auditor.write("token_hold", token_version=key.version)
    done, moved = await copy.run(advance), await exempted.run(advance)
    retoken_marks(deployment)
    await auditor.write(SWITCH, token_version=key.version, entries=written + done.written)
    store.switch_tokens(key.version)
    waited_s = time.monotonic() - began_s
    retoken_marks(deployment)
    await auditor.write("token_rotated", token_version=key.version)
    exemptions, dropped = exemptions + moved.written, dropped + moved.dropped
    return Rotated(key.version, written + done.written, widened + done.widened, waited_s, exemptions, dropped)


def retoken_marks(deployment: Deployment) -> None:
    """Give every restriction and hold of a person, but the `nameless`, the tokens of all token keys; idempotent."""
    store = deployment.store
    keys = store.token_keys()
    hashes = [Tokens(*key) for key in (keys.current, *keys.others)]
    for mark in (*store.ledger.marks("restriction"), *store.ledger.marks("hold")):
        number = store.ledger.number_of(mark.id)
        if number is not None:
            tokens = tuple(each.of(number) for each in hashes)
            if tokens != mark.tokens:
                store.ledger.retoken(mark.id, tokens)


def nameless(store: KeyStore) -> list[Mark]:
    """Return the holds and restrictions in force of people whose number a backup has lost. Blocks.

    They cover who has a token that they have, and get no other, until they are made again.
    """
    marks = (*store.ledger.marks("restriction"), *store.ledger.marks("hold"))
    return [mark for mark in marks if mark.tokens and store.ledger.number_of(mark.id) is None]


def refuse_nameless(store: KeyStore) -> None:
    """Raise InputInvalid, naming them, if there are marks that a new token key would not cover. Blocks."""
    found = nameless(store)
    if found:
        named = ", ".join(f"{mark.kind} {mark.id} (case {mark.reason})" for mark in found)
        raise InputInvalid(
            f"the numbers of {named} are lost, so under a new token key they would cover nobody: make each again with"
            " the same number, case and period, then rotate"
        )


async def drop_old_tokens(deployment: Deployment) -> list[int]:
    """Destroy the older token keys under which nobody's secret is known any more; return their versions. Blocks.

    None while a mark is `nameless`: it is found by its old tokens alone.
    """
    retoken_marks(deployment)
    store = deployment.store
    if nameless(store):
        return []
    keys = store.token_keys()
    dropped = []
    for key in keys.others:
        if key.version < keys.current.version:
            try:
                store.destroy_token_key(key.version)
            except ValueError:
                continue
            await deployment.auditor().write("destroy_token_key", token_version=key.version)
            dropped.append(key.version)
    if dropped:
        retoken_marks(deployment)
    return dropped
