"""Rectification: a sealed correction beside the record, which stays as it is (INF-11, KAL-8, CAL-4).

Rules of this file:
- A correction is a record of the same stream and partition, with one part of group `correction` under the same epoch
  and the same secret of the person, so that it dies with what it corrects:
  {"account_id":A, "corrects":OFFSET, "month"|"day":…, "privacy":{…}, "sealed":[one part], "v":1}
  The key store knows which record has which corrections; the Revealer shows them with it.
- A person corrects what is their own: the primary person all but the other party's fields, the other party only those.
  What names or places a record (id, account, type, channel, direction) is nobody's to correct.
- Saying the same again writes nothing. Killed between log and key store, the next run finds what is in the log.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, get_type_hints

import msgspec
import orjson

from processors.decode import decode
from processors.keyring import EpochRef, Needs, PersonSecret
from processors.retention import instant
from processors.seal import ENTROPY_BYTES, Entropy, Sealer
from schemas.catalog import CATALOG, Domain
from schemas.errors import InputInvalid, LogBusy, Poison
from schemas.fields import MAX_RECORD_BYTES, PLATFORM, PrivacyClass, classes_of
from schemas.inbound import VOICE_FIELDS, Cdr
from schemas.outbound import Message, Output
from schemas.sealed import KeyId, Part, Sealed, split_envelope, take_apart
from streams.keys.ledger import Request
from streams.keys.reveal import CORRECTS, NOT_OPENED, Revealed, State
from streams.keys.roles import OFFICER
from streams.log.protocol import Stored
from streams.officer.access import hidden
from streams.officer.office import Office, Person
from streams.officer.requests import DONE, case, note
from streams.officer.scan import naming, scan
from streams.quarantine import Place

STREAMS: Final = tuple(name for name, row in CATALOG.items() if row.domain in (Domain.CONTENT, Domain.PII))
"""The streams in which a person's communications are kept."""
GROUP: Final = "correction"
_P = PrivacyClass
_CLASSES = classes_of(Cdr)
_TYPES = get_type_hints(Cdr, include_extras=True)
FIELDS: Final = tuple(
    name
    for name, privacy in _CLASSES.items()
    if privacy not in (_P.SHAPE, _P.ACCOUNT) and name not in ("record_id", "direction", "channel")
)
"""The fields that can be corrected."""
_CONTENT = frozenset(name for name in FIELDS if _CLASSES[name] is _P.CONTENT)
_OWN_SIDE = {"mt": _P.SENDER, "mo": _P.RECIPIENT}
"""Direction → the class of fields that are the other party's own."""
_AT_ONCE = 200


class Rectified(NamedTuple):
    """What came of a correction: records corrected, those that said so already, and those that do not open, by why."""

    corrected: int
    unchanged: int
    not_opened: dict[str, int]
    request: Request | None  # as it is kept, with its clocks (CAL-4); None: there was nothing to correct


class _Change(NamedTuple):
    """A correction to be written: of what, under which part's keys, what it says."""

    stored: Stored
    sealed: Sealed
    part: Part
    fields: dict[str, Any]

    def __repr__(self) -> str:
        return "_Change()"


def corrections_of(assignments: Sequence[str], document: bytes | None) -> dict[str, Any]:
    """Return the corrected fields that FIELD=VALUE arguments and a JSON object give; `document` None: there is none.

    A VALUE is text, or JSON where the field is no text. Raises InputInvalid, which repeats nothing of it.
    """
    given: dict[str, Any] = {}
    if document is not None:
        try:
            given = orjson.loads(document)
        except ValueError:
            given = {}
        if not isinstance(given, dict) or not given or len(document) > MAX_RECORD_BYTES:
            raise InputInvalid("the correction must be one JSON object of fields and what they should say")
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign or name in given:
            raise InputInvalid("--set takes FIELD=VALUE, each field once")
        given[name] = text
    if not given:
        raise InputInvalid("say what is right: --set FIELD=VALUE, or --correction FILE")
    if not given.keys() <= set(FIELDS):
        raise InputInvalid(f"a field that is none, or is not to be corrected; fields are {', '.join(sorted(FIELDS))}")
    texts = {assignment.partition("=")[0] for assignment in assignments}
    return {name: _typed(name, value, text=name in texts) for name, value in given.items()}


def _typed(name: str, value: Any, *, text: bool) -> Any:
    """Return a value as records hold it. Raises InputInvalid."""
    for plain in (value, _json(value)) if text else (value,):
        try:
            typed = msgspec.convert(plain, _TYPES[name])
        except msgspec.ValidationError:
            continue
        return instant(int(typed.timestamp() // 1)) if isinstance(typed, datetime) else plain
    raise InputInvalid("a value is not one that its field can have", field=name)


def _json(text: str) -> Any:
    """Return what a text says as JSON, or itself."""
    try:
        return orjson.loads(text)
    except ValueError:
        return text


def place_of(text: str) -> Place:
    """Return the place that STREAM/PARTITION/OFFSET names. Raises InputInvalid."""
    stream, _, rest = text.partition("/")
    partition, _, offset = rest.partition("/")
    if stream not in STREAMS or not all(one.isascii() and one.isdigit() for one in (partition, offset)):
        raise InputInvalid(f"a record is STREAM/PARTITION/OFFSET as an access report shows it, of {', '.join(STREAMS)}")
    return Place(stream, int(partition), int(offset))


class Rectification:
    """One request to correct a person's data: the platform's, or an account's."""

    def __init__(
        self, office: Office, number: str, *, account: str | None, reason: str, received_s: int | None = None
    ) -> None:
        """Take whose data it is about, and when the request came (Unix s; None: now). Raises InputInvalid."""
        self._office = office
        self._log = office.deployment.log
        self._ledger = office.deployment.store.ledger
        self._person: Person = office.person(number, account)
        case(reason, self._person)
        self._owner = account or PLATFORM
        self._reason = reason
        known = office.sids(self._person)
        self._mine = {sid for sid, one in known.items() if one.owner == self._owner}
        owners = {one.owner for one in known.values()} - {PLATFORM}
        self._accounts = sorted(owners) if self._owner == PLATFORM else []  # who process data about the person (INF-9)
        self._received_s = int(time.time()) if received_s is None else received_s

    def __repr__(self) -> str:
        return "Rectification()"

    async def apply(
        self, fields: Mapping[str, Any], places: Sequence[Place], advance: Callable[[int], None] = lambda _: None
    ) -> Rectified:
        """Correct the records at these places, or, where none is named, each record of theirs that has such a field.

        `fields`: from `corrections_of`. A named record takes them all; another those that it has. Logged to `audit`
        with places, sids and names of fields, before anything is written; durable on return. Blocks. Raises
        InputInvalid for a place that holds no record of theirs and for a value that no record can have, before
        anything is written.
        """
        found = await self._find(places, advance)
        revealer = self._office.deployment.revealer()
        corrected, unchanged = 0, 0
        not_opened = Counter[str]()
        at_once = len(places) or _AT_ONCE
        for at in range(0, len(found), at_once):
            messages = [await self._read(place) for place in found[at : at + at_once]]
            changes = []
            for stored, opened in zip(messages, await revealer.reveal(messages, self._reason), strict=True):
                if opened.state is not State.REVEALED:
                    not_opened[opened.reason or opened.state.value] += 1
                elif (change := self._change(stored, opened, fields, named=bool(places))) is None:
                    continue
                elif change.fields:
                    changes.append(change)
                else:
                    unchanged += 1
            written = await self._write(changes) if changes else 0
            corrected += written
            if written < len(changes):
                not_opened[State.DESTROYED.value] += len(changes) - written
        request = None
        if corrected or (unchanged and not self._is_noted()):  # one that was killed wrote, and noted nothing
            request = note(
                self._office, "rectify", self._person, self._owner, self._reason, self._received_s, self._accounts, DONE
            )
        return Rectified(corrected, unchanged, dict(not_opened), request)

    def _is_noted(self) -> bool:
        """Return whether there is a request of this case already."""
        mine = ("rectify", self._owner, self._reason)
        return any((one.kind, one.owner, one.reason) == mine for one in self._ledger.requests(closed=True))

    async def _find(self, places: Sequence[Place], advance: Callable[[int], None]) -> list[Place]:
        """Return where the person's records lie, of those named if any are; and note corrections that nobody knows of.

        Raises InputInvalid if one of those named is not theirs.
        """
        found: list[Place] = []
        for stream in STREAMS if self._mine else ():
            begins = None
            if places:
                named = [place for place in places if place.stream == stream]
                begins = await self._log.end_offsets(stream)
                for place in named:
                    if place.partition < len(begins):
                        begins[place.partition] = min(begins[place.partition], place.offset)
            async for page in scan(self._log, stream, naming(self._mine), begins=begins, advance=advance):
                for stored in page:
                    place = Place(stream, stored.partition, stored.offset)
                    corrected = self._corrected_by(stored)
                    if corrected is None:
                        found.append(place)
                    elif corrected >= 0:
                        self._note(place._replace(offset=corrected), stored.offset)
        if not places:
            return found
        if not set(places) <= set(found):
            raise InputInvalid("no record of this person lies at one of the places named; see subject access")
        return sorted(set(places))

    def _corrected_by(self, stored: Stored) -> int | None:
        """Return the offset that a correction corrects; None: it is a record, -1: it is neither."""
        try:
            sealed = take_apart(stored.value)
        except ValueError:
            return -1
        if not any(part.sid in self._mine for part in sealed.parts):
            return -1
        if CORRECTS not in sealed.fields:
            return None
        offset = sealed.fields[CORRECTS]
        return offset if isinstance(offset, int) and 0 <= offset < stored.offset else -1

    def _note(self, place: Place, at_offset: int) -> None:
        """Have the key store know of a correction, if it does not."""
        where = (place.partition, place.offset)
        if at_offset not in self._ledger.corrections(place.stream, [where]).get(where, ()):
            self._ledger.add_correction(*place, at_offset)

    async def _read(self, place: Place) -> Stored:
        for stored in await self._log.read(place.stream, place.partition, place.offset, 1):
            if stored.offset == place.offset:
                return stored
        raise LogBusy("a record was just cut off the log", **place._asdict())

    def _change(self, stored: Stored, opened: Revealed, fields: Mapping[str, Any], *, named: bool) -> _Change | None:
        """Return the correction of a record, without fields if it says so already; None: it is about no field of it.

        `named`: all fields are meant, whether the record has them or not. Raises InputInvalid.
        """
        sealed = take_apart(stored.value)
        now = dict(opened.fields)
        for correction in opened.corrections:
            now.update({name: value for name, value in correction.items() if name != NOT_OPENED})
        part, theirs = self._part(sealed, opened.fields.get("direction"))
        kept = _CONTENT if stored.stream == "content" else set(FIELDS) - _CONTENT
        wanted = dict(fields)
        if not named:
            wanted = {name: value for name, value in fields.items() if name in now and name in theirs & kept}
        if not wanted:
            return None
        if not wanted.keys() <= theirs & kept:
            raise InputInvalid("a field that this record does not keep, or that is the other party's", **_place(stored))
        _check(sealed.account, now, wanted, stored)
        return _Change(stored, sealed, part, {n: value for n, value in wanted.items() if now.get(n) != value})

    def _part(self, sealed: Sealed, direction: object) -> tuple[Part, set[str]]:
        """Return the part under whose keys the person's correction goes, and the names that are theirs to correct."""
        mine = [part for part in sealed.parts if part.sid in self._mine]
        part = next((one for one in mine if one.group != "other"), mine[0])
        theirs = set(FIELDS) - hidden(sealed, direction, self._mine)
        if part.group == "other":
            theirs &= {name for name in FIELDS if _CLASSES[name] is _OWN_SIDE.get(str(direction))}
        return part, theirs

    async def _write(self, changes: Sequence[_Change]) -> int:
        """Seal and append corrections of a few records, and have the key store know of them; return how many."""
        for stream in dict.fromkeys(change.stored.stream for change in changes):
            here = [change for change in changes if change.stored.stream == stream]
            await self._office.auditor.write(
                "rectify",
                role=OFFICER,
                reason=self._reason,
                owner=self._owner,
                stream=stream,
                records=[[change.stored.partition, change.stored.offset] for change in here],
                sids=sorted({change.part.sid for change in here}),
                fields=sorted({name for change in here for name in change.fields}),
            )
        ends = {stream: await self._log.end_offsets(stream) for stream in {change.stored.stream for change in changes}}
        sealed = await self._append(changes)
        for change, value in sealed:
            stream, partition, offset = change.stored[:3]
            at = await self._landed(stream, partition, ends[stream][partition], value)
            self._ledger.add_correction(stream, partition, offset, at)
        return len(sealed)

    async def _append(self, changes: Sequence[_Change]) -> list[tuple[_Change, bytes]]:
        """Seal and append corrections under a key lease of their own; what has died meanwhile is left out."""
        deployment = self._office.deployment
        now_s = int(time.time())
        keys, _ = deployment.keys()
        try:
            needs: dict[EpochRef, tuple[int | None, int]] = {}
            for change in changes:
                ref = _ref(change.part)
                _, count = needs.get(ref, (None, 0))
                needs[ref] = (_deadline_s(change.sealed), count + 1)
            ring = keys.fetch(Needs(needs, {}), now_s)
            persons = deployment.store.open_persons({change.part.sid for change in changes}, now_s)
            entropy = Entropy(os.urandom(ENTROPY_BYTES))
            outputs: dict[tuple[str, int], list[Message]] = {}
            written = []
            for change in changes:
                epoch, person = ring.epochs.get(_ref(change.part)), persons.get(change.part.sid)
                if epoch is None or not isinstance(person, PersonSecret):
                    continue
                stored = change.stored
                head, tail = split_envelope(_envelope(change))
                sealer = Sealer(ring, entropy, stored.stream, change.sealed.account, epoch)
                value = sealer.several(head, tail, ((GROUP, person, orjson.dumps(change.fields)),))
                message = Message(stored.timestamp_ms, None, stored.headers, value)
                outputs.setdefault((stored.stream, stored.partition), []).append(message)
                written.append((change, value))
            keys.guard(deployment.margin_s)()
            if outputs:
                await self._log.append([Output(*place, messages) for place, messages in outputs.items()])
            return written
        finally:
            keys.close()

    async def _landed(self, stream: str, partition: int, begin: int, value: bytes) -> int:
        """Return the offset at which a value that was just appended lies, from `begin` on."""
        end = (await self._log.end_offsets(stream))[partition]
        at = begin
        while at < end and (page := await self._log.read(stream, partition, at, _AT_ONCE, end)):
            for stored in page:
                if stored.value == value:
                    return stored.offset
            at = page[-1].offset + 1
        raise LogBusy("a correction was written and cannot be seen yet; run this again", stream=stream)


def _place(stored: Stored) -> dict[str, str | int]:
    return {"stream": stored.stream, "partition": stored.partition, "offset": stored.offset}


def _check(account: str, now: Mapping[str, Any], wanted: Mapping[str, Any], stored: Stored) -> None:
    """Raise InputInvalid if a record would not be valid with what is wanted."""
    is_voice = any(name in VOICE_FIELDS for name in now)
    minimal = {
        "v": 1, "type": "cdr", "channel": "voice" if is_voice else "sms", "record_id": "-", "account_id": account,
        "direction": "mt", "occurred_at": instant(0), "sender": "", "recipient": "",
    }  # fmt: skip
    merged = {**minimal, **now, **wanted, "type": "cdr"}
    try:
        decode(orjson.dumps(merged))
    except Poison as poison:
        raise InputInvalid(f"the record would not be valid then: {poison.reason}", **_place(stored)) from None


def _ref(part: Part) -> EpochRef:
    key = KeyId.parse(part.key)
    return EpochRef(key.domain, key.owner, key.epoch)


def _deadline_s(sealed: Sealed) -> int | None:
    expires_at = sealed.fields["privacy"]["expires_at"]
    return None if expires_at is None else int(datetime.fromisoformat(expires_at).timestamp())


def _envelope(change: _Change) -> dict[str, object]:
    fields = change.sealed.fields
    kept = {name: fields[name] for name in ("account_id", "month", "day", "privacy") if name in fields}
    return {**kept, CORRECTS: change.stored.offset}
