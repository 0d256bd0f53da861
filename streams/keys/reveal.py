"""The one library through which anything sealed opens: authorised, logged to `audit` by sid, never from a cache.

The audit entry is written before anything opens; if it cannot be written, nothing opens. Destroyed, absent and
corrupt are decided by tombstones and the clock, never by a failed tag.
"""

import binascii
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import orjson

from processors.pipeline import render_verdict
from processors.plan import Planner
from processors.retention import instant
from processors.screen.suppression import Tokens, covering_scopes
from processors.screen.verdict import GATEWAY_CODES, Subject, Verdict, suppressed
from schemas.catalog import CATALOG, partition_for
from schemas.errors import InputInvalid, RevealDenied
from schemas.fields import REASON, PrivacyClass, classes_of, normalise
from schemas.inbound import Cdr, Preference, Request
from schemas.outbound import Message, Output
from schemas.sealed import NO_PERSON, KeyId, Part, Sealed, aad_head, key_info, open_box, record_key, take_apart
from streams.keys.roles import Principal
from streams.keys.store import Gone, KeyStore
from streams.log.protocol import Log, Stored
from streams.state.suppressions import SuppressionTail

CLEARED = "cleared"
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


class Revealed(NamedTuple):
    """One record after an attempt to open it. `fields` is personal data; `reason` says why it was denied."""

    state: State
    fields: dict[str, Any]
    withheld: tuple[str, ...] = ()
    reason: str | None = None

    def __repr__(self) -> str:
        return f"Revealed({self.state.value})"


class Revealer:
    """Opens records for one principal. Not thread-safe; blocks on log and key store."""

    def __init__(
        self,
        log: Log,
        store: KeyStore,
        planner: Planner,
        principal: Principal,
        clock: Callable[[], float] = time.time,
        on_denied: Callable[[Mapping[str, int]], None] = lambda _: None,
    ) -> None:
        """Take what to open with, and whom to tell how many messages were denied, by reason."""
        self._log = log
        self._store = store
        self._planner = planner
        self._principal = principal
        self._clock = clock
        self._on_denied = on_denied
        self._tail = SuppressionTail(log)
        token_key = store.token_key()
        self._tokens = Tokens(token_key.version, token_key.key)

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
        `too_late` or `opted_out` (or `blocked_by_officer`), and its second verdict is in `verdicts` on return. What
        is `revealed` may be sent now, until `not_after`; do not keep it. Blocks; 1,000 messages a call are a good size.
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
        if not REASON.fullmatch(reason):
            raise InputInvalid("the reason must be a code or case reference: at most 40 letters, digits, - _ /")
        now_s = int(self._clock())
        taken: list[Sealed | None] = []
        allowed: list[bool] = []
        granted: dict[tuple[str, str], bool] = {}
        for stream in dict.fromkeys(message.stream for message in messages):
            if not self._principal.may_open(stream, None):
                self._on_denied({"not_granted": 1})
                raise RevealDenied(
                    "this principal may not open this stream; ask for a grant in the roles file", stream=stream
                )
            if stream == CLEARED:
                await self._tail.catch_up()
        if all(_domain_of(message.stream) is None for message in messages):
            return [Revealed(State.REVEALED, {})] * len(messages), {}
        for message in messages:
            try:
                found = take_apart(message.value)
            except ValueError:
                taken.append(None)
                allowed.append(False)
            else:
                taken.append(found)
                asked = (message.stream, found.account)
                if asked not in granted:
                    granted[asked] = self._principal.may_open(message.stream, found.account or None)
                allowed.append(granted[asked])
        await self._audit(messages, taken, allowed, reason, action, now_s)
        parts = [part for sealed, may in zip(taken, allowed, strict=True) if sealed and may for part in sealed.parts]
        epochs = self._store.open_epochs(_key_ids(parts), now_s)
        persons = self._store.open_persons({part.sid for part in parts if _SID.fullmatch(part.sid)})
        now_at = instant(now_s)
        results: list[Revealed] = []
        refusals: dict[int, list[Message]] = {}
        for message, sealed, may in zip(messages, taken, allowed, strict=True):
            if sealed is None:
                result = Revealed(State.CORRUPT, {})
            elif not may:
                result = Revealed(State.DENIED, {}, (), "not_granted_for_account")
            else:
                result = _open(message.stream, sealed, epochs, persons, now_at)
                if message.stream == CLEARED and result.state is _REVEALED:
                    why = self._forbidden(sealed, result.fields, now_s)
                    if why is not None:
                        result = Revealed(State.DENIED, {}, (), why.reason)
                        refusals.setdefault(message.partition, []).append(self._second_verdict(sealed, why, now_s))
            results.append(result)
        self._on_denied(Counter(one.reason for one in results if one.reason is not None))
        return results, refusals

    def _forbidden(self, sealed: Sealed, fields: Mapping[str, Any], now_s: int) -> Verdict | None:
        """Return the refusal of an opened request that must not be sent any more, if so."""
        if instant(now_s) > sealed.fields["not_after"]:
            return Verdict("too_late", "REG-3")
        account_id = sealed.account
        plan = self._planner.plan(account_id, now_s)
        if plan is None:
            return Verdict("account_unknown", "CAL-2")
        region = plan.account.default_region or fields.get("country")
        party = normalise(fields["recipient"], region)
        if not party.is_person or party.value in plan.account.own:
            return None
        token = self._tokens.of(party.value)
        if self._tail.view.get(token) is None:
            return None
        sender = normalise(fields["sender"], region).value
        scopes = covering_scopes(account_id, sender, fields.get("campaign_id"), self._tokens)
        channel, purpose = sealed.fields["channel"], sealed.fields["purpose"]
        subject = Subject(account_id, party, token, channel, purpose, None, False, None, scopes)
        found = suppressed(subject, self._tail.view, self._planner.policy)
        return None if found is None else Verdict(found, "KAL-5", GATEWAY_CODES)

    def _second_verdict(self, sealed: Sealed, why: Verdict, now_s: int) -> Message:
        envelope = sealed.fields
        template = self._planner.output("verdicts", sealed.account, now_s)
        value = render_verdict(
            template, envelope["record_id"], envelope["channel"], envelope["purpose"], why, now_s, second=True
        )
        return Message(now_s * 1000, None, template.headers, value)

    async def _audit(
        self,
        messages: Sequence[Stored],
        taken: Sequence[Sealed | None],
        allowed: Sequence[bool],
        reason: str,
        action: str,
        now_s: int,
    ) -> None:
        """Write one entry per stream: who, when, why, which records, which people by sid."""
        if not messages:
            return
        template = self._planner.output("audit", "", now_s)
        outputs = []
        partition = partition_for(self._principal.name.encode(), self._log.partitions)
        for stream in dict.fromkeys(message.stream for message in messages):
            rows = [row for row in zip(messages, taken, allowed, strict=True) if row[0].stream == stream]
            sids = dict.fromkeys(part.sid for _, sealed, may in rows if sealed and may for part in sealed.parts)
            entry = {
                "v": 1,
                "at": instant(now_s),
                "action": action,
                "principal": self._principal.name,
                "role": self._principal.role_for(stream),
                "stream": stream,
                "reason": reason,
                "records": [[message.partition, message.offset] for message, _, _ in rows],
                "denied": sum(not may for _, _, may in rows),
                "sids": [sid for sid in sids if _SID.fullmatch(sid)],
                "privacy": orjson.Fragment(template.privacy),
            }
            outputs.append(
                Output("audit", partition, [Message(now_s * 1000, None, template.headers, orjson.dumps(entry))])
            )
        await self._log.append(outputs)


def _key_ids(parts: Iterable[Part]) -> set[KeyId]:
    ids = set()
    for text in {part.key for part in parts}:
        try:
            ids.add(KeyId.parse(text))
        except ValueError:
            continue
    return ids


def _open(
    stream: str,
    sealed: Sealed,
    epochs: Mapping[KeyId, Any],
    persons: Mapping[str, Any],
    now_at: str,
) -> Revealed:
    """Return one record opened under keys fetched for it, or the state that says why not."""
    expires_at = (sealed.fields.get("privacy") or {}).get("expires_at")
    if isinstance(expires_at, str) and expires_at <= now_at:
        return Revealed(State.DESTROYED, {})
    if not sealed.parts and "resolves" not in sealed.fields:  # only a resolution of quarantine seals nothing
        return Revealed(State.CORRUPT, {})
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
