"""Access and export: what is held about a person, piece by piece (KAL-8, CAL-5, INF-9, INF-13).

Rules of this file:
- Everything sealed is opened by the Revealer: authorised, and logged before it opens. The request itself is logged
  before that.
- Nothing is gathered: what is kept is counts, and some hundred records that are opened at once, which are handed out
  before the next. The last item is `summary`; a report without it is not whole.
- The other party of a communication is a person too. Of a record with two people in it, each is shown what is their
  own and what both know: that it took place, when, for how long, through whom (`hidden`).
- What cannot be shown is counted, with the reason.
"""

import binascii
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple

import orjson

from processors.evidence import entry_of
from processors.retention import instant
from processors.screen.suppression import Rule, parse_key
from processors.screen.suppression import State as Standing
from schemas.catalog import CATALOG, Domain, partition_for
from schemas.fields import PLATFORM, PrivacyClass, classes_of
from schemas.inbound import Cdr
from schemas.sealed import Sealed, take_apart
from streams.keys.ledger import Mark, MarkKind, Request
from streams.keys.reveal import CORRECTS, Revealed, Revealer, State
from streams.keys.roles import OFFICER
from streams.log.protocol import Stored
from streams.officer.office import Finder, Office, Person, may_hold_a_number
from streams.officer.requests import DONE, case, note
from streams.officer.scan import decided, everything, naming, scan
from streams.state.entries import EXEMPTIONS, SUPPRESSIONS, Kept

Kind = Literal["access", "export"]

PERSONAL: Final = tuple(
    name for name, row in CATALOG.items() if row.domain in (Domain.TRANSIT, Domain.CONTENT, Domain.PII, Domain.REVIEW)
)
"""The streams that are sealed under people's secrets."""
AUDIT, HELD, QUARANTINE = "audit", "held", "quarantine"
_OPENED_AT_ONCE = 500
_LARGE_AT_ONCE = 50
"""Records in quarantine may be of a megabyte and more."""
_SID = re.compile(r"[0-9a-f]{32}").fullmatch
_P = PrivacyClass
_CLASSES = classes_of(Cdr)
_SIDES = {"mt": (_P.RECIPIENT, _P.SENDER), "mo": (_P.SENDER, _P.RECIPIENT)}
"""Direction → the class of fields that are the primary person's, and the other party's."""
_ATTRIBUTES = "attributes"
_WHEREABOUTS = frozenset({"country", "mcc", "mnc", "route"})
"""Where the primary person's number is: not for the other party."""
_TELLING = frozenset({_P.SENDER, _P.RECIPIENT, _P.PERSON, _P.CONTENT})
_ANSWERS: Final = "this account decides about these records, so it answers for them; the platform hands the request on"


class Item(NamedTuple):
    """One piece of a report: which section it belongs to, and what it says; `fields` may be personal data."""

    section: str
    fields: dict[str, Any]

    def __repr__(self) -> str:
        return f"Item({self.section})"


class Purpose(NamedTuple):
    """What is done with a kind of record: the part of its `privacy` that all of its kind share."""

    stream: str
    category: str
    role: str
    controller: str
    processor: str | None
    legal_basis: str
    purposes: tuple[str, ...]
    jurisdiction: str | None
    transfer: str

    @classmethod
    def of(cls, stream: str, privacy: Mapping[str, Any]) -> "Purpose":
        """Return the purpose that a record's `privacy` states."""
        return cls(
            stream,
            privacy["data_class"],
            privacy["role"],
            privacy["controller"],
            privacy["processor"],
            privacy["legal_basis"],
            tuple(privacy["purposes"]),
            privacy["jurisdiction"],
            privacy["transfer"],
        )

    def told(self) -> dict[str, Any]:
        """Return it as a report says it, with who may read such records."""
        return {**self._asdict(), "purposes": list(self.purposes), "recipients": list(CATALOG[self.stream].readers)}


def hidden(sealed: Sealed, direction: object, sids: Collection[str]) -> frozenset[str]:
    """Return the fields of a record that are not shown to the person with these sids: those of somebody else.

    The primary person is shown all but the other party's own fields. The other party is shown all but the primary's
    own fields, what is told of the primary (place, child, attributes), where their number is, and what was said.
    Nothing is hidden where the other end is no person.
    """
    if not any(_SID(part.sid) and part.sid not in sids for part in sealed.parts):
        return frozenset()
    sides = _SIDES.get(str(direction))
    if sides is None:
        return _named(_TELLING)
    primary, other = sides
    if any(part.sid in sids for part in sealed.parts if part.group != "other"):
        return _named({other})
    return _named({primary, _P.PERSON, _P.CONTENT}) | _WHEREABOUTS


def _named(classes: Collection[PrivacyClass]) -> frozenset[str]:
    return frozenset(name for name, privacy in _CLASSES.items() if privacy in classes)


def marks_of(office: Office, kind: MarkKind, person: Person, owner: str | None = None) -> list[Mark]:
    """Return the restrictions or holds in force that name a person; of one owner if it is given. Blocks."""
    tokens = set(person.tokens)
    return [
        mark
        for mark in office.deployment.store.ledger.marks(kind)
        if tokens.intersection(mark.tokens) and owner in (None, mark.owner)
    ]


def _names_other(opened: Revealed) -> Callable[[str], bool]:
    """Return what tells whether a text names the other party of a record, in any spelling of the number.

    The other party itself is shown no attributes at all. Where its number does not open any more, any digits that
    could be a number do.
    """
    name = "recipient" if opened.fields.get("direction") == "mo" else "sender"
    values = [one[name] for one in (opened.fields, *opened.corrections) if isinstance(one.get(name), str)]
    if not values:
        return may_hold_a_number
    finders = [Finder(value) for value in values]
    return lambda text: any(finder.found(text) for finder in finders)


def _texts(opened: Revealed) -> list[str]:
    """Return what an opened record says: as it is, and with JSON's escapes read."""
    fields = opened.fields
    if "record_base64" in fields:
        return [binascii.a2b_base64(fields["record_base64"]).decode("latin-1")]
    if "record" not in fields:
        return [orjson.dumps(fields).decode()]
    try:
        return [fields["record"], orjson.dumps(orjson.loads(fields["record"])).decode()]
    except ValueError:
        return [fields["record"]]


def _nothing(_: int) -> None:
    pass


class Report:
    """One request of a person for what is held: about the platform's data, or an account's. Use `items` once."""

    def __init__(
        self,
        office: Office,
        number: str,
        *,
        account: str | None,
        reason: str,
        kind: Kind,
        now_s: int,
        received_s: int | None = None,
    ) -> None:
        """Take whose request it is, and when it came (Unix s; None: now). Raises InputInvalid."""
        self._office = office
        self._log = office.deployment.log
        self._person = office.person(number, account)
        case(reason, self._person)
        self._owner = account or PLATFORM
        self._reason = reason
        self._kind = kind
        self._now_s = now_s
        self._received_s = now_s if received_s is None else received_s
        self._advance: Callable[[int], None] = _nothing
        self._revealer: Revealer | None = None
        self._owners = {sid: known.owner for sid, known in office.sids(self._person).items()}
        self._mine = {sid for sid, owner in self._owners.items() if owner == self._owner}
        self._processing: dict[Purpose, list[Any]] = {}  # records, latest instant
        self._unshown: Counter[tuple[str, str]] = Counter()  # stream, why
        self._unsearched: Counter[tuple[str, str]] = Counter()
        self._elsewhere: dict[str, Counter[str]] = {  # account → stream → records
            owner: Counter() for owner in sorted({*self._owners.values()} - {PLATFORM})
        }
        self._shown: Counter[str] = Counter()
        self._last_opened: str | None = None
        self.accounts = tuple(self._elsewhere) if self._owner == PLATFORM else ()
        """The accounts that process data about the person, which the platform tells of the request (INF-9)."""
        self.request: Request | None = None
        """The request as it is kept, with its clocks, once all of the report was handed out (CAL-4)."""

    def __repr__(self) -> str:
        return f"Report({self._kind})"

    async def size(self) -> int:
        """Return how many records `items` will read, about: what `advance` adds up to."""
        streams = [name for name in self._streams() if name not in PERSONAL or self._searched()]
        ends = [await self._log.end_offsets(name) for name in streams]
        begins = [await self._log.begin_offsets(name) for name in streams]
        return sum(map(sum, ends)) - sum(map(sum, begins))

    def _streams(self) -> tuple[str, ...]:
        if self._kind == "export":
            return PERSONAL
        return (*PERSONAL, QUARANTINE, HELD, AUDIT) if self._owner == PLATFORM else (*PERSONAL, AUDIT)

    def _searched(self) -> set[str]:
        """Return the sids that are looked for: of the platform's report all, to count what accounts hold (INF-9)."""
        return set(self._owners) if self._owner == PLATFORM and self._kind == "access" else self._mine

    async def items(self, advance: Callable[[int], None] = _nothing) -> AsyncIterator[Item]:
        """Yield what is held, as it is found; `advance` is told of records read. Blocks on log and key store.

        Raises RevealDenied, what the log and the key store raise, and what keeps the audit entry from being written:
        then nothing was opened.
        """
        self._advance = advance
        audited = await decided(self._log, AUDIT)  # what this report opens is not part of it
        await self._office.auditor.write(
            self._kind, role=OFFICER, reason=self._reason, owner=self._owner, sids=sorted(self._mine)
        )
        self._revealer = self._office.deployment.revealer()
        yield self._head()
        if self._kind == "access":
            for item in self._marks():
                yield item
        async for item in self._records():
            yield item
        if self._kind == "access":
            async for item in self._exemptions():
                yield item
            if self._owner == PLATFORM:
                async for item in self._opt_outs():
                    yield item
                async for item in self._quarantined():
                    yield item
                async for item in self._held():
                    yield item
            async for item in self._reveals(audited):
                yield item
        for item in self._ending():
            yield item
        self.request = note(
            self._office, self._kind, self._person, self._owner, self._reason, self._received_s, self.accounts, DONE
        )

    def _put(self, section: str, **fields: Any) -> Item:
        self._shown[section] += 1
        return Item(section, fields)

    def _head(self) -> Item:
        policy = self._office.deployment.config.policy
        return Item(
            "report",
            {
                "v": 1,
                "kind": self._kind,
                "at": instant(self._now_s),
                "subject": self._person.value,
                "about": self._owner,
                "platform": policy.platform.name,
                "policy": policy.id,
                "reason": self._reason,
            },
        )

    def _marks(self) -> list[Item]:
        """Return the restrictions in force."""
        found = marks_of(self._office, "restriction", self._person, self._owner)
        return [self._put("restriction", since=instant(mark.at_s), reason=mark.reason) for mark in found]

    # --- what is sealed under the person's secrets ------------------------------------------------------------

    async def _records(self) -> AsyncIterator[Item]:
        searched = self._searched()
        if not searched:
            return
        for stream in PERSONAL:
            found: list[Stored] = []  # one audit entry for many records, from however many pages
            async for page in scan(self._log, stream, naming(searched), advance=self._advance):
                found += page
                while len(found) >= _OPENED_AT_ONCE:
                    for item in await self._opened(stream, found[:_OPENED_AT_ONCE]):
                        yield item
                    del found[:_OPENED_AT_ONCE]
            for item in await self._opened(stream, found):
                yield item

    async def _opened(self, stream: str, page: Sequence[Stored]) -> list[Item]:
        """Return those of some records that are shown, and count the others."""
        mine: list[tuple[Stored, Sealed]] = []
        for stored in page:
            try:
                sealed = take_apart(stored.value)
            except ValueError:
                self._unshown[stream, State.CORRUPT.value] += 1
                continue
            if CORRECTS in sealed.fields:  # it is shown beside what it corrects
                continue
            sids = {part.sid for part in sealed.parts}
            if sids & self._mine:
                mine.append((stored, sealed))
            for owner in {self._owners[sid] for sid in sids & self._owners.keys()} & self._elsewhere.keys():
                self._elsewhere[owner][stream] += 1
        items = []
        opened = await self._reveal([stored for stored, _ in mine])
        for (stored, sealed), result in zip(mine, opened, strict=True):
            if result.state is State.REVEALED:
                items.append(self._record(stored, sealed, result))
            else:
                self._unshown[stream, result.reason or result.state.value] += 1
        return items

    async def _reveal(self, messages: Sequence[Stored]) -> list[Revealed]:
        if self._revealer is None:
            raise ValueError("nothing opens before the request is in the audit stream")
        return await self._revealer.reveal(messages, self._reason) if messages else []

    def _record(self, stored: Stored, sealed: Sealed, opened: Revealed) -> Item:
        direction = opened.fields.get("direction")
        unseen = hidden(sealed, direction, self._mine)
        fields = _seen(opened.fields, unseen)
        corrections = [shown for one in opened.corrections if (shown := _seen(one, unseen))]
        withheld = {*opened.withheld, *(unseen & opened.fields.keys())}
        if unseen:
            names_other = _names_other(opened)
            for shown in (fields, *corrections):
                withheld |= _without_others(shown, names_other)
        privacy = sealed.fields["privacy"]
        purpose = Purpose.of(stored.stream, privacy)
        self._count(purpose, privacy["expires_at"])
        return self._put(
            "record",
            stream=stored.stream,
            partition=stored.partition,
            offset=stored.offset,
            day=instant(stored.timestamp_ms // 1000)[:10],
            fields=fields,
            corrections=corrections,
            withheld=sorted(withheld),
            source={"account": sealed.account, "direction": direction},
            kept_until=privacy["expires_at"],
            **{name: value for name, value in purpose.told().items() if name != "stream"},
        )

    def _count(self, purpose: Purpose, expires_at: str | None) -> None:
        entry = self._processing.setdefault(purpose, [0, expires_at])
        entry[0] += 1
        entry[1] = None if None in (entry[1], expires_at) else max(entry[1], expires_at)

    # --- what is sealed under no person's secret --------------------------------------------------------------

    async def _opt_outs(self) -> AsyncIterator[Item]:
        """Yield the person's entries of `suppressions`: each holds the number, and nothing else about them (INF-8)."""
        async for rule, state, value in self._entries(SUPPRESSIONS):
            purpose = Purpose.of(SUPPRESSIONS.stream, value["privacy"])
            self._count(purpose, value["privacy"]["expires_at"])
            yield self._put(
                "opt_out",
                scope=_scope(rule.scope),
                **{"class": rule.class_},
                channel=rule.channel,
                authority=rule.authority,
                stands=state.out,
                since=instant(state.event_s),
                reason=value.get("reason"),
                kept_until=value["privacy"]["expires_at"],
            )

    async def _exemptions(self) -> AsyncIterator[Item]:
        """Yield what an account has said of the person to be exempt from lists; the platform counts what accounts have.

        Beside the number, which is what was asked about, all of it stands clear.
        """
        async for rule, state, value in self._entries(EXEMPTIONS):
            account, privacy = value["account_id"], value["privacy"]
            if account != self._owner:
                if self._owner == PLATFORM:
                    self._elsewhere.setdefault(account, Counter())[EXEMPTIONS.stream] += 1
                continue
            self._count(Purpose.of(EXEMPTIONS.stream, privacy), privacy["expires_at"])
            yield self._put(
                "exemption",
                account=account,
                kind=rule.class_,
                channel=rule.channel,
                in_force=state.out and state.event_s > self._now_s,
                withdrawn=not state.out,
                given=value["given_at"],
                expires=value["expires_at"],
                evidence=value["evidence"],
                kept_until=privacy["expires_at"],
            )

    async def _entries(self, kept: Kept) -> AsyncIterator[tuple[Rule, Standing, dict[str, Any]]]:
        """Yield the person's entries of a stream: rule, state, and the newest record's clear envelope."""
        token = self._person.tokens[0]  # whatever is under another token key is also under the current one
        begins, ends = await self._log.begin_offsets(kept.stream), await self._log.end_offsets(kept.stream)
        home = partition_for(token, self._log.partitions)
        begins = [begin if one == home else ends[one] for one, begin in enumerate(begins)]
        mark = f".{token.hex()}|".encode()
        states: dict[Rule, Standing | None] = {}
        newest: dict[Rule, dict[str, Any]] = {}
        theirs = lambda stored: mark in (stored.key or b"")  # noqa: E731 — one line, used once
        async for page in scan(self._log, kept.stream, theirs, begins=begins, ends=ends):
            for stored in page:
                _, _, rule, out = parse_key(stored.key or b"")
                newest[rule] = value = orjson.loads(stored.value)
                at_s = int(datetime.fromisoformat(value[kept.instant]).timestamp())
                states[rule] = kept.fold(states.get(rule), out=out, event_s=at_s)
        for rule, state in states.items():
            if state is not None:
                yield rule, state, newest[rule]

    async def _quarantined(self) -> AsyncIterator[Item]:
        """Yield the places of records that nobody could understand and that hold the number. Their text is not shown.

        Whose data else is in such a record cannot be told, so only where it lies is said.
        """
        finder = Finder(self._person.value)
        async for stored, sealed, opened in self._each(QUARANTINE, _LARGE_AT_ONCE):
            if opened.state is not State.REVEALED:
                self._not_searched(QUARANTINE, opened)
            elif any(map(finder.found, _texts(opened))):
                privacy = sealed.fields["privacy"]
                self._count(Purpose.of(QUARANTINE, privacy), privacy["expires_at"])
                yield self._put(
                    "quarantined",
                    stream=QUARANTINE,
                    partition=stored.partition,
                    offset=stored.offset,
                    at=instant(stored.timestamp_ms // 1000),
                    reason=sealed.fields.get("reason"),
                    source={"stream": sealed.fields.get("stream")},
                    kept_until=privacy["expires_at"],
                )

    async def _held(self) -> AsyncIterator[Item]:
        """Yield the legal holds with how many records about the person each has set aside (INF-7).

        They are copies; what is still in its own stream is shown from there. All copies of a hold of the person count,
        and of another hold those with the number in them.
        """
        finder = Finder(self._person.value)
        holds = {mark.id: mark for mark in self._office.deployment.store.ledger.marks("hold")}
        counts = Counter({mark.id: 0 for mark in marks_of(self._office, "hold", self._person)})
        theirs = frozenset(counts)
        async for _, sealed, opened in self._each(HELD, _OPENED_AT_ONCE):
            hold = str(sealed.fields.get("hold"))
            if opened.state is not State.REVEALED:
                self._not_searched(HELD, opened)
            elif hold in theirs or any(map(finder.found, _texts(opened))):
                counts[hold] += 1
                privacy = sealed.fields["privacy"]
                self._count(Purpose.of(HELD, privacy), privacy["expires_at"])
            elif "recipient" not in opened.fields:
                self._unsearched[HELD, "it names nobody"] += 1
        for hold, count in counts.items():
            mark = holds.get(hold)
            yield self._put(
                "hold",
                reason=None if mark is None else mark.reason,
                since=None if mark is None else instant(mark.at_s),
                records=count,
                why="kept because the law, an authority or a court requires it; destroyed on release",
            )

    def _not_searched(self, stream: str, opened: Revealed) -> None:
        """Count a record that did not open; one that is destroyed is held by nobody."""
        if opened.state is not State.DESTROYED:
            self._unsearched[stream, opened.reason or opened.state.value] += 1

    async def _each(self, stream: str, at_once: int) -> AsyncIterator[tuple[Stored, Sealed, Revealed]]:
        """Yield all sealed records of a stream, opened."""
        pages = scan(self._log, stream, everything, page_records=at_once, advance=self._advance)
        async for page in pages:
            taken = []
            for stored in page:
                try:
                    sealed = take_apart(stored.value)
                except ValueError:
                    self._unsearched[stream, State.CORRUPT.value] += 1
                    continue
                if sealed.parts:
                    taken.append((stored, sealed))
            opened = await self._reveal([stored for stored, _ in taken])
            for (stored, sealed), result in zip(taken, opened, strict=True):
                yield stored, sealed, result

    # --- who has looked ---------------------------------------------------------------------------------------

    async def _reveals(self, ends: Sequence[int]) -> AsyncIterator[Item]:
        """Yield who has opened the person's records in the past 12 months, and why (INF-13).

        What names the person and is no entry is counted: nobody can tell whether it says that they were opened.
        """
        sids = [sid.encode() for sid in self._mine]
        since_ms = _year_before(self._now_s) * 1000

        def names(stored: Stored) -> bool:
            return stored.timestamp_ms >= since_ms and any(sid in stored.value for sid in sids)

        async for page in scan(self._log, AUDIT, names, ends=ends, advance=self._advance):
            for stored in page:
                entry, about = entry_of(stored.value), _sids(stored.value)
                if entry is None or about is None:
                    self._unsearched[AUDIT, State.CORRUPT.value] += 1
                elif not self._mine.isdisjoint(about):
                    self._last_opened = max(self._last_opened or "", entry.at)
                    yield self._put(
                        "reveal",
                        at=entry.at,
                        action=entry.action,
                        role=entry.role,
                        principal=entry.principal,
                        stream=entry.stream if isinstance(entry.stream, str) else None,
                        reason=entry.reason,
                    )

    def _ending(self) -> list[Item]:
        """Return what was counted on the way."""
        items = [
            Item("processing", {**purpose.told(), "records": count, "kept_until": until})
            for purpose, (count, until) in self._processing.items()
        ]
        for section, counted in (("not_shown", self._unshown), ("not_searched", self._unsearched)):
            items += [
                Item(section, {"stream": stream, "reason": why, "records": count})
                for (stream, why), count in sorted(counted.items())
            ]
        if self._owner == PLATFORM and self._kind == "access":
            items += [
                Item("account", {"account": account, "records": dict(counts), "answer": _ANSWERS})
                for account, counts in self._elsewhere.items()
            ]
        found = sum(self._shown.values()) + sum(self._unshown.values()) + len(self.accounts)
        summary: dict[str, Any] = {"records": self._shown["record"], "not_shown": sum(self._unshown.values())}
        if self._kind == "access":
            sections = ("opt_out", "exemption", "restriction", "hold", "reveal")
            summary |= {f"{section}s": self._shown[section] for section in sections}
            summary |= {"quarantined": self._shown["quarantined"], "not_searched": sum(self._unsearched.values())}
            summary["last_opened"] = self._last_opened
        told = {"accounts": list(self.accounts), "nothing_is_held": not found}
        return [*items, Item("summary", {**summary, **told})]


def _seen(fields: Mapping[str, Any], unseen: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in unseen}


def _without_others(shown: dict[str, Any], names_other: Callable[[str], bool]) -> set[str]:
    """Take the attributes that name the other party out of what is shown, and return what was taken out, by name."""
    attributes = shown.get(_ATTRIBUTES)
    if not isinstance(attributes, dict):
        return set()
    kept = {name: value for name, value in attributes.items() if not names_other(f"{name}\n{value}")}
    if len(kept) == len(attributes):
        return set()
    shown[_ATTRIBUTES] = kept
    gone = attributes.keys() - kept.keys()
    return {_ATTRIBUTES if names_other(name) else f"{_ATTRIBUTES}.{name}" for name in gone}


def _sids(value: bytes) -> list[str] | None:
    """Return whose records an audit entry is about, by sid; None: it is not as entries are."""
    try:
        sids = orjson.loads(value).get("sids") or []
    except (ValueError, AttributeError):
        return None
    return sids if isinstance(sids, list) and all(isinstance(sid, str) for sid in sids) else None


def _scope(scope: str) -> str:
    """Return a scope as it may be shown: without tokens."""
    kind, _, rest = scope.partition(":")
    account, _, name = rest.partition(":")
    return f"{kind}:{account}:…" if kind == "sender" or name.startswith("~") else scope


def _year_before(now_s: int) -> int:
    """Return Unix seconds of the same UTC date and time a year before; of 29 February, of the 28th."""
    now = datetime.fromtimestamp(now_s, UTC)
    day = min(now.day, 28) if now.month == 2 else now.day
    return int(now.replace(year=now.year - 1, day=day).timestamp())
