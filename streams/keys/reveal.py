"""The one library through which anything sealed opens: authorised, logged to `audit` by sid, never from a cache.

Rules of this file:
- One audit entry per batch and stream is written before anything opens; if it cannot be written, nothing opens.
- Destroyed, absent and corrupt are decided by tombstones and the clock, never by a failed tag.
- What is about a person whose data is restricted opens for the privacy officer only (REG-1).
- What may be sent is asked again at the moment of sending: opt-outs always, exemptions where the verdict rested on one.
- A correction is a record of its own, beside the one that it corrects and in the same partition (INF-11): its clear
  envelope names that one's offset as `corrects`, its one part is of the group `correction`. It is opened with it.
"""

import asyncio
import binascii
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import orjson

from processors.exemption import WITHDRAWN
from processors.pipeline import render_verdict
from processors.plan import Planner
from processors.retention import instant
from processors.screen.suppression import Tokens, View, covering_scopes
from processors.screen.verdict import NOBODY, Subject, Verdict, blocked_by, in_force, suppressed
from schemas.catalog import CATALOG
from schemas.errors import InputInvalid, RevealDenied, TokensChange
from schemas.fields import NO_REASON, PrivacyClass, classes_of, is_reason, normalise
from schemas.inbound import Cdr, Preference, Request
from schemas.outbound import Message, Output
from schemas.sealed import NO_PERSON, KeyId, Part, Sealed, aad_head, key_info, open_box, record_key, take_apart
from streams.keys.audit import Auditor
from streams.keys.roles import OFFICER, Principal
from streams.keys.store import Gone, KeyStore
from streams.log.protocol import Log, Stored
from streams.state.entries import EXEMPTIONS, SUPPRESSIONS, EntryTail

CLEARED = "cleared"
CORRECTS = "corrects"
"""Field of a correction's clear envelope: the offset of the record that it corrects."""
EXEMPTION = "exemption"
"""Field of the clear envelope of a `cleared` record: the kind of exemption without which it would have been refused."""
NOT_OPENED = "not_opened"
"""What stands in place of a correction's fields if it did not open: the state that says why."""
_RESTRICTED = Verdict("restricted", "REG-1")
_EXEMPTION_ENDED = Verdict("exemption_ended", "CAL-3")
_SALT = "salt:"
_SID = re.compile(r"[0-9a-f]{32}")
_CLASSES = classes_of(Request, Cdr, Preference)
_OTHERS_CLASS = {"mt": PrivacyClass.SENDER, "mo": PrivacyClass.RECIPIENT}


class State(StrEnum):
    """What came of opening a record."""

    REVEALED = "revealed"
    DESTROYED = "destroyed"
    ABSENT = "absent"
    DENIED = "denied"
    CORRUPT = "corrupt"


_REVEALED, _ABSENT = State.REVEALED, Gone.ABSENT  # Python 3.11 takes 0.09 µs to find a member of an enumeration


class Revealed(msgspec.Struct, frozen=True, gc=False):
    """One record after an attempt to open it. `fields` is personal data; `reason` says why it was denied.

    `corrections`: the fields of its corrections, oldest first; of one that did not open `{NOT_OPENED: state}`.
    """

    state: State
    fields: dict[str, Any]
    withheld: tuple[str, ...] = ()
    reason: str | None = None
    corrections: tuple[dict[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"Revealed({self.state.value})"


class _Asked(msgspec.Struct, frozen=True, gc=False):
    """A message, its value taken apart (None: it cannot be), why it is not opened, and its corrections."""

    message: Stored
    sealed: Sealed | None
    denied: str | None
    corrections: tuple["_Asked", ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is to be opened of it."""
        return self.sealed.parts if self.sealed is not None and self.denied is None else ()


class _Seen(NamedTuple):
    """What is known at the moment of sending: tokens, and opt-outs and exemptions under them."""

    tokens: Tokens
    opt_outs: View
    exemptions: View


class Revealer:
    """Opens records for one principal. Not thread-safe; blocks on log and key store."""

    def __init__(
        self,
        log: Log,
        store: KeyStore,
        planner: Planner,
        principal: Principal,
        auditor: Auditor,
        clock: Callable[[], float] = time.time,
        on_denied: Callable[[Mapping[str, int]], None] = lambda _: None,
        suppressions: EntryTail | None = None,
        exemptions: EntryTail | None = None,
    ) -> None:
        """Take what to open with, and whom to tell how many messages were denied, by reason.

        Without `suppressions` or `exemptions` it reads the whole stream by itself; exemptions only once it has to.
        """
        self._log = log
        self._store = store
        self._planner = planner
        self._principal = principal
        self._auditor = auditor
        self._clock = clock
        self._on_denied = on_denied
        self._tokens = Tokens(*store.token_keys().current)
        self._tail = suppressions or EntryTail(log, SUPPRESSIONS, self._tokens.version)
        self._exemptions = exemptions or EntryTail(log, EXEMPTIONS, self._tokens.version)
        self._follow()
        self._turn = asyncio.Lock()

    async def reveal(self, messages: Sequence[Stored], reason: str) -> list[Revealed]:
        """Return each message opened, or why not, in order; one audit entry per stream, written first.

        In a stream that holds nothing sealed there is nothing to open and nothing to log.

        Raises RevealDenied if the principal may not open the stream at all, InputInvalid for a reason that is not a
        code or case reference, and whatever keeps the audit entry from being written.
        """
        results, _ = await self._reveal(messages, reason, "reveal")
        return results

    async def open_batch(self, messages: Sequence[Stored], reason: str = "egress") -> list[Revealed]:
        """Return requests of the `cleared` stream opened for sending: the egress gateway's call.

        A request past its `not_after`, or whose recipient has opted out since, is `denied` with the reason
        `too_late` or `opted_out` (or `blocked_by_officer`), and its second verdict is in `verdicts` on return; so is
        one that was cleared by an exemption, if none is in force any more: `exemption_ended`. What is `revealed` may be
        sent now, until `not_after`; do not keep it. Blocks; 1,000 messages a call are a good size.
        """
        if any(message.stream != CLEARED for message in messages):
            raise InputInvalid("open_batch takes messages of the stream cleared only")
        results, refusals = await self._reveal(messages, reason, "open_batch")
        if refusals:
            await self._log.append([Output("verdicts", partition, batch) for partition, batch in refusals.items()])
        return results

    async def _reveal(
        self, messages: Sequence[Stored], reason: str, action: str
    ) -> tuple[list[Revealed], dict[int, list[Message]]]:
        """Return each message opened, or why not, and by partition the second verdicts of what must not be sent."""
        if not is_reason(reason):
            raise InputInvalid(NO_REASON)
        for stream in dict.fromkeys(message.stream for message in messages):
            self.permit(stream)
        if all(_domain_of(message.stream) is None for message in messages):
            return [Revealed(State.REVEALED, {})] * len(messages), {}
        asked = self._taken(messages)
        cleared = [one.sealed for one in asked if one.message.stream == CLEARED]
        seen = await self._see(cleared) if cleared else None
        asked = self._unless_restricted(await self._with_corrections(asked))
        await self._audit(asked, reason, action)
        now_s = int(self._clock())  # after all that may have taken time
        parts = [part for one in asked for each in (one, *one.corrections) for part in each.parts]
        epochs = self._store.open_epochs(_key_ids(parts), now_s)
        persons = self._store.open_persons(_sids(parts), now_s)
        now_at = instant(now_s)
        results: list[Revealed] = []
        refusals: dict[int, list[Message]] = {}
        for one in asked:
            message, sealed = one.message, one.sealed
            result = _open(one, epochs, persons, now_at)
            if message.stream == CLEARED and sealed is not None:
                why = _RESTRICTED if one.denied == _RESTRICTED.reason else None
                if result.state is _REVEALED and seen is not None:
                    why = self._forbidden(sealed, result.fields, now_s, seen)
                if why is not None:
                    result = Revealed(State.DENIED, {}, (), why.reason)
                    refusals.setdefault(message.partition, []).append(self._second_verdict(sealed, why, now_s))
            elif result.state is _REVEALED and one.corrections:
                opened = [(each, _open(each, epochs, persons, now_at)) for each in one.corrections]
                corrections = tuple(_correction(one, *each) for each in opened)
                result = msgspec.structs.replace(result, corrections=corrections)
            results.append(result)
        self._on_denied(Counter(one.reason for one in results if one.reason is not None))
        return results, refusals

    def permit(self, stream: str) -> None:
        """Return if this principal may open records of a stream, some account's at least. Raises RevealDenied."""
        if not self._principal.may_open(stream, None):
            self._on_denied({"not_granted": 1})
            raise RevealDenied(
                "this principal may not open this stream; ask for a grant in the roles file", stream=stream
            )

    async def _see(self, cleared: Iterable[Sealed | None]) -> _Seen:
        """Read opt-outs to their end, and exemptions if a verdict rested on one. Raises TokensChange and LogBusy.

        The token key is asked for after reading: what was read then is under the key that is current, or is also. One
        call at a time reads; what it returns stays whole while another begins anew.
        """
        exempt = any(sealed is not None and EXEMPTION in sealed.fields for sealed in cleared)
        async with self._turn:
            while True:
                await self._tail.catch_up()
                if exempt:
                    await self._exemptions.catch_up()
                keys = self._store.token_keys()
                if keys.changing:
                    raise TokensChange
                if keys.current.version == self._tokens.version:
                    return _Seen(self._tokens, self._tail.view, self._exemptions.view if exempt else NOBODY)
                self._tokens = Tokens(*keys.current)
                self._follow()

    def _follow(self) -> None:
        """Have both tails show what is under the token key of `_tokens`."""
        self._tail.follow(self._tokens.version)
        self._exemptions.follow(self._tokens.version)

    def _taken(self, messages: Sequence[Stored]) -> list[_Asked]:
        """Return the messages taken apart, each with why the grants of this principal do not open it, if so."""
        granted: dict[tuple[str, str], bool] = {}
        asked = []
        for message in messages:
            try:
                sealed = take_apart(message.value)
            except ValueError:
                asked.append(_Asked(message, None, None))
                continue
            whose = (message.stream, sealed.account)
            if whose not in granted:
                granted[whose] = self._principal.may_open(message.stream, sealed.account or None)
            asked.append(_Asked(message, sealed, None if granted[whose] else "not_granted_for_account"))
        return asked

    async def _with_corrections(self, asked: list[_Asked]) -> list[_Asked]:
        """Return what is asked for with the corrections there are of it; requests that wait to be sent have none."""
        found: dict[tuple[str, int, int], list[int]] = {}
        streams = {one.message.stream for one in asked if one.parts and one.message.stream != CLEARED}
        for stream in streams:
            places = [(one.message.partition, one.message.offset) for one in asked if one.message.stream == stream]
            for place, offsets in self._store.ledger.corrections(stream, places).items():
                found[stream, *place] = offsets
        if not found:
            return asked
        for number, one in enumerate(asked):
            here = (one.message.stream, one.message.partition, one.message.offset)
            stored = [await self._correction(one.message, offset) for offset in found.get(here, ())]
            asked[number] = msgspec.structs.replace(one, corrections=tuple(self._taken(stored)))
        return asked

    async def _correction(self, of: Stored, offset: int) -> Stored:
        """Return the correction that lies at an offset of a message's partition; without a value if there is none."""
        for stored in await self._log.read(of.stream, of.partition, offset, 1):
            if stored.offset == offset:
                return stored
        return of._replace(offset=offset, value=b"")

    def _unless_restricted(self, asked: list[_Asked]) -> list[_Asked]:
        """Return what is asked for, denied where a part is of a restricted person and this is not the officer."""
        restricted = self._store.restricted({part.sid for one in asked for part in one.parts})
        if not restricted:
            return asked
        return [
            msgspec.structs.replace(one, denied=_RESTRICTED.reason)
            if not restricted.isdisjoint(part.sid for part in one.parts) and not self._is_officer_for(one.sealed)
            else one
            for one in asked
        ]

    def _is_officer_for(self, sealed: Sealed | None) -> bool:
        """Return whether this principal is the privacy officer for a record's account."""
        account = sealed.account if sealed is not None else ""
        return any(
            grant.role == OFFICER and ("*" in grant.accounts or account in grant.accounts)
            for grant in self._principal.grants
        )

    def _forbidden(self, sealed: Sealed, fields: Mapping[str, Any], now_s: int, seen: _Seen) -> Verdict | None:
        """Return the refusal of an opened request that must not be sent any more, if so."""
        if instant(now_s) > sealed.fields["not_after"]:
            return Verdict("too_late", "REG-3")
        account_id = sealed.account
        plan = self._planner.plan(account_id, now_s)
        if plan is None:
            return Verdict("account_unknown", "CAL-2")
        region = plan.account.default_region or fields.get("country")
        party = normalise(fields["recipient"], region)
        token, channel, found = None, sealed.fields["channel"], None
        if party.is_person and party.value not in plan.account.own:
            token = seen.tokens.of(party.value)
        if token is not None and seen.opt_outs.get(token) is not None:
            sender = normalise(fields["sender"], region).value
            scopes = covering_scopes(account_id, sender, fields.get("campaign_id"), seen.tokens)
            subject = Subject(account_id, party, token, channel, sealed.fields["purpose"], None, False, None, scopes)
            found = suppressed(subject, seen.opt_outs, blocked_by(self._planner.policy), now_s)
        if found is None and EXEMPTION in sealed.fields:
            exemptions = None if token is None else seen.exemptions.get(token)
            if not in_force(exemptions or {}, account_id, channel, now_s):
                return _EXEMPTION_ENDED
        return found

    def _second_verdict(self, sealed: Sealed, why: Verdict, now_s: int) -> Message:
        envelope = sealed.fields
        template = self._planner.output("verdicts", sealed.account, now_s)
        value = render_verdict(
            template, envelope["record_id"], envelope["channel"], envelope["purpose"], why, now_s, second=True
        )
        return Message(now_s * 1000, None, template.headers, value)

    async def _audit(self, asked: Sequence[_Asked], reason: str, action: str) -> None:
        """Write one entry per stream: who, when, why, which records, which people by sid."""
        for stream in dict.fromkeys(one.message.stream for one in asked):
            here = [one for one in asked if one.message.stream == stream]
            each = [every for one in here for every in ((one, *one.corrections) if one.denied is None else (one,))]
            sids = _sids(part for one in each for part in one.parts)
            await self._auditor.write(
                action,
                role=self._principal.role_for(stream),
                reason=reason,
                stream=stream,
                records=[[one.message.partition, one.message.offset] for one in each],
                denied=sum(one.denied is not None for one in here),
                sids=list(sids),
            )


def _sids(parts: Iterable[Part]) -> Collection[str]:
    """Return the sids of the people that parts are about, each once, in order."""
    return {part.sid: None for part in parts if _SID.fullmatch(part.sid)}.keys()


def _key_ids(parts: Iterable[Part]) -> set[KeyId]:
    ids = set()
    for text in {part.key for part in parts}:
        try:
            ids.add(KeyId.parse(text))
        except ValueError:
            continue
    return ids


def _open(one: _Asked, epochs: Mapping[KeyId, Any], persons: Mapping[str, Any], now_at: str) -> Revealed:
    """Return what comes of opening what is asked for."""
    if one.sealed is None:
        return Revealed(State.CORRUPT, {})
    if one.denied is not None:
        return Revealed(State.DENIED, {}, (), one.denied)
    return open_sealed(one.message.stream, one.sealed, epochs, persons, now_at)


def _correction(of: _Asked, one: _Asked, opened: Revealed) -> dict[str, Any]:
    """Return a correction's fields, or what says why it did not open; it must say itself what it corrects."""
    if of.sealed is None or one.sealed is None:
        return {NOT_OPENED: State.CORRUPT.value}
    if one.sealed.fields.get(CORRECTS) != of.message.offset or one.sealed.account != of.sealed.account:
        return {NOT_OPENED: State.CORRUPT.value}
    return opened.fields if opened.state is _REVEALED else {NOT_OPENED: opened.state.value}


def open_sealed(
    stream: str,
    sealed: Sealed,
    epochs: Mapping[KeyId, Any],
    persons: Mapping[str, Any],
    now_at: str,
) -> Revealed:
    """Return one record opened under keys fetched for it, or the state that says why not, as of `now_at`.

    `epochs` and `persons` are what `open_epochs` and `open_persons` of the key store gave. Who asks is not looked at
    and nothing is noted: for the Revealer, and for a legal hold's copy, which opens to nobody.
    """
    expires_at = (sealed.fields.get("privacy") or {}).get("expires_at")
    if isinstance(expires_at, str) and expires_at <= now_at:
        return Revealed(State.DESTROYED, {})
    if not sealed.parts and "resolves" not in sealed.fields and sealed.fields.get("action") != WITHDRAWN:
        return Revealed(State.CORRUPT, {})  # only what resolves something, or withdraws an exemption, seals nothing
    fields: dict[str, Any] = {}
    withheld: tuple[str, ...] = ()
    for part in sealed.parts:
        try:
            key_id = KeyId.parse(part.key)
        except ValueError:
            return Revealed(State.CORRUPT, {})
        epoch = epochs.get(key_id, _ABSENT)
        secret = _secret(part.sid, persons)
        if isinstance(epoch, Gone):
            return Revealed(State(epoch.value), {})
        if isinstance(secret, Gone):
            if part.group == "other":
                withheld = _others_fields(fields.get("direction"))
                continue
            return Revealed(State(secret.value), {})
        if secret is None or key_id.domain != _domain_of(stream):
            return Revealed(State.CORRUPT, {})
        cipher = record_key(epoch.key, secret, key_info(key_id, sealed.account))
        head = aad_head(stream, key_id.owner, sealed.account, part.group)
        try:
            plaintext = open_box(cipher, head, part, sealed.envelope)
        except ValueError:
            return Revealed(State.CORRUPT, {})
        fields.update(_fields(part.group, plaintext))
    return Revealed(_REVEALED, fields, withheld)


def _secret(sid: str, persons: Mapping[str, Any]) -> bytes | Gone | None:
    """Return what goes beside the epoch key: a person's secret, the batch's salt, or nothing; None: malformed."""
    found = persons.get(sid)
    if found is not None:
        return found if isinstance(found, Gone) else bytes(found.secret)
    if sid == NO_PERSON:
        return b""
    if sid.startswith(_SALT):
        try:
            return bytes.fromhex(sid.removeprefix(_SALT))
        except ValueError:
            return None
    return Gone.ABSENT if _SID.fullmatch(sid) else None


@lru_cache(maxsize=64)
def _domain_of(stream: str) -> str | None:
    row = CATALOG.get(stream)
    return row.domain.value if row is not None and row.domain is not None else None


def _others_fields(direction: object) -> tuple[str, ...]:
    theirs = _OTHERS_CLASS.get(str(direction))
    return tuple(name for name, privacy in _CLASSES.items() if privacy is theirs)


def _fields(group: str, plaintext: bytes) -> dict[str, Any]:
    """Return a part's fields; a quarantined record is text where it is UTF-8, else base64."""
    if group != "record":
        fields: dict[str, Any] = orjson.loads(plaintext)
        return fields
    try:
        return {"record": plaintext.decode()}
    except UnicodeDecodeError:
        return {"record_base64": binascii.b2a_base64(plaintext, newline=False).decode()}
