"""Legal holds: what one covers is copied into `held`, under a key of its own, before anything of it can die (INF-7).

Rules of this file:
- A hold is a mark in the ledger: of a person, in the data of the platform or of an account, or of an account; for the
  communications of a period if it has one, by whole UTC days. Its copies are sealed under EpochRef("held", platform,
  id of the hold), whole, under no person's secret: they live until the hold is released, and die with that key.
- `preserve` copies what holds cover and have no copy of yet. It runs when a hold is made and in every retention run
  before anything dies. What was dead by the clock when the hold was made is not brought back; a job that is late may
  still copy what has died since.
- Nothing counts as copied before its copy was read back, opened and compared. A record that does not open, and was
  not destroyed, stops everything: who calls must destroy nothing then.
- A correction of a record is a record too, and is copied as one: its copy `corrects` what it corrects.
- Progress is noted after the copies; what a run that was killed had copied beyond that is found in `held`, and not
  copied again.
"""

import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

import orjson

from processors.keyring import EpochRef, Needs
from processors.plan import Template
from processors.retention import DAY_S, instant
from processors.seal import ENTROPY_BYTES, Entropy, Sealer
from schemas.catalog import Domain
from schemas.errors import InputInvalid, KeysUnusable, LogUnusable
from schemas.fields import PLATFORM
from schemas.outbound import Message, Output
from schemas.sealed import KeyId, Sealed, take_apart
from streams.deployment import Deployment
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.ledger import AT_WILL, Mark
from streams.keys.reveal import Revealed, State, open_sealed
from streams.keys.roles import OFFICER
from streams.keys.store import Gone, KeyStore
from streams.log.protocol import Log, Stored
from streams.officer.office import Office, Person, check_name
from streams.officer.requests import case
from streams.officer.scan import Wanted, decided, naming, of_account, scan

STREAM: Final = "held"
COVERED: Final = ("cdr.pii", "content", "review")
"""The streams whose records a hold keeps."""
_GROUP: Final = "held"
_ROLE: Final = "officer"
_PAGE: Final = 500
"""Records copied, read back and noted at once."""
_ID_DIGITS: Final = 6
"""So much of an id must be given at least."""

Advance = Callable[[int], None]
"""Told of records read."""


class Preserved(NamedTuple):
    """What came of a run: records copied now, and holds in force."""

    records: int
    holds: int


class Kept(NamedTuple):
    """A hold that was made: its mark, and how many records it has copied so far."""

    mark: Mark
    records: int


def unseen(_: int) -> None:
    """Tell nobody."""


# --- making and ending --------------------------------------------------------------------------------------------


async def hold_person(
    office: Office, person: Person, owner: str, reason: str, period: tuple[int | None, int | None], advance: Advance
) -> Kept:
    """Put a person's data of an owner (the platform or an account) under hold, and return it with all of it copied.

    `period`: from and to before which, Unix s. The same hold again goes on with what there is. The hold is in force
    even if copying fails: nothing is destroyed until it was done. Blocks. Raises InputInvalid, and what keeps it from
    being noted or copied.
    """
    case(reason, person)
    return await _hold(office, owner, person, reason, period, advance)


async def hold_account(
    office: Office, account: str, reason: str, period: tuple[int | None, int | None], advance: Advance
) -> Kept:
    """Put the communications of an account under hold; as `hold_person`."""
    check_name(account)
    case(reason)
    return await _hold(office, account, None, reason, period, advance)


async def _hold(
    office: Office,
    owner: str,
    person: Person | None,
    reason: str,
    period: tuple[int | None, int | None],
    advance: Advance,
) -> Kept:
    from_s, to_s = period
    if from_s is not None and to_s is not None and from_s >= to_s:
        raise InputInvalid("the period ends before it begins")
    deployment = office.deployment
    now_s = int(time.time())
    deployment.planner.output(STREAM, "", now_s)  # a policy without a rule for held data says so now
    found = person_holds(office, person, owner) if person is not None else account_holds(office, owner)
    mark = next((one for one in found if (one.reason, one.from_s, one.to_s) == (reason, *period)), None)
    if mark is None:
        mark = Mark(
            secrets.token_hex(16), "hold", owner, () if person is None else person.tokens, reason, now_s, *period
        )
        await office.auditor.write(
            "hold",
            role=OFFICER,
            reason=reason,
            hold=mark.id,
            owner=owner,
            sids=[] if person is None else sorted(office.sids(person, owner)),
            period=[None if at_s is None else instant(at_s) for at_s in period],
        )
        deployment.store.ledger.add_mark(mark, None if person is None else person.value)
    elif person is not None and deployment.store.ledger.number_of(mark.id) is None:  # a backup has lost it
        deployment.store.ledger.add_mark(mark, person.value)
        deployment.store.ledger.retoken(mark.id, person.tokens)
    preserved = await _preserve(deployment, [mark], now_s, advance)
    return Kept(mark, preserved)


def person_holds(office: Office, person: Person, owner: str) -> list[Mark]:
    """Return the holds in force of a person in an owner's data. Blocks on the key store."""
    marks = office.deployment.store.ledger.marks("hold")
    return [mark for mark in marks if mark.owner == owner and set(mark.tokens) & set(person.tokens)]


def account_holds(office: Office, account: str) -> list[Mark]:
    """Return the holds in force of an account. Blocks on the key store."""
    return [mark for mark in office.deployment.store.ledger.marks("hold") if not mark.tokens and mark.owner == account]


async def release_person(office: Office, person: Person, owner: str, reason: str, hold: str | None) -> int:
    """End a hold of a person in an owner's data, and destroy its copies; return how many holds that were: 0 or 1.

    The one that is named by `hold` (its id, or its first six digits or more), else the one whose case reference is the
    reason: another's hold is never guessed. No copy of the key store brings its copies back; what is not dead by then
    lives on to its own instant. Killed half-way, releasing again finishes it. Audited, before anything is destroyed.
    Blocks. Raises InputInvalid if no hold in force is of that case, or several are, among others.
    """
    case(reason, person)
    return await _release(office, _chosen(person_holds(office, person, owner), reason, hold), reason)


async def release_account(
    office: Office,
    account: str,
    reason: str | None,
    hold: str | None,
    period: tuple[int | None, int | None] = (None, None),
) -> int:
    """End a hold of an account, of this period if one is given; else as `release_person`.

    `reason` None: the only one in force is meant, and its own case reference is noted.
    """
    check_name(account)
    if reason is not None:
        case(reason)
    found = account_holds(office, account)
    if period != (None, None):
        found = [mark for mark in found if (mark.from_s, mark.to_s) == period]
    mark = _chosen(found, reason, hold)
    return await _release(office, mark, reason or ("" if mark is None else mark.reason))


async def _release(office: Office, mark: Mark | None, reason: str) -> int:
    store = office.deployment.store
    if mark is not None:
        ref = _ref(mark)
        await office.auditor.write(
            "release", role=OFFICER, reason=reason, hold=mark.id, destroyed={"sids": [], "epochs": ["/".join(ref)]}
        )
        store.destroy_epoch(ref)
        store.ledger.end_mark(mark.id, int(time.time()))
        store.ledger.drop_progress(_job(mark, ""))
    if AT_WILL in store.stale_days():  # also what a release that was killed has left
        store.rewrap(AT_WILL)
    if mark is not None:  # an entry after the destruction tells a restored store that the log knows of it
        await office.auditor.write("released", role=OFFICER, reason=reason, hold=mark.id)
    return int(mark is not None)


def _chosen(found: Sequence[Mark], reason: str | None, hold: str | None) -> Mark | None:
    """Return which of the holds in force is meant; None: there is none in force. Raises InputInvalid.

    A release is for good, so a hold is meant only if it is named by `hold`, or by its case (`reason`), or if no case
    is given and it is the only one.
    """
    if hold is not None:
        named = [mark for mark in found if len(hold) >= _ID_DIGITS and mark.id.startswith(hold)]
        if len(named) != 1:
            raise InputInvalid("--hold names none of the holds in force, or more than one; give its whole id")
        return named[0]
    meant = [mark for mark in found if reason in (None, mark.reason)]
    if len(meant) != 1 and found:
        what = "there are several" if meant else "no hold of this case"
        raise InputInvalid(f"{what}; in force: {listed(meant or found)}; name it with --hold")
    return meant[0] if meant else None


def listed(marks: Iterable[Mark]) -> str:
    """Return holds as a message names them: id and case reference."""
    return ", ".join(f"{mark.id} ({mark.reason})" for mark in marks)


async def standing_in_the_way(office: Office, person: Person, owner: str, advance: Advance) -> Mark | None:
    """Return a hold in force that covers something that an erasure of the person would destroy, if there is one.

    A hold of the person in that owner's data; or one of an account, with a record of theirs from its period, which
    is looked for only if there are such holds. Blocks.
    """
    mine = person_holds(office, person, owner)
    if mine:
        return mine[0]
    marks = [mark for mark in office.deployment.store.ledger.marks("hold") if not mark.tokens]
    marks = [mark for mark in marks if owner in (PLATFORM, mark.owner)]
    async for mark in _covering(office, person, owner, marks, advance):
        return mark
    return None


async def of_others(office: Office, person: Person, owner: str, advance: Advance) -> list[Mark]:
    """Return the holds in force of others that cover a record of the person: their copies hold the person's number.

    Looked for by the person's secrets of that owner, so to be called before they are destroyed; a copy whose original
    is gone is not found. Reads the streams only if others are under hold. Blocks.
    """
    marks = [mark for mark in office.deployment.store.ledger.marks("hold") if mark.tokens]
    marks = [mark for mark in marks if not set(mark.tokens) & set(person.tokens)]
    return [mark async for mark in _covering(office, person, owner, marks, advance)]


async def _covering(
    office: Office, person: Person, owner: str, marks: Sequence[Mark], advance: Advance
) -> AsyncIterator[Mark]:
    """Yield those of some holds that cover a record of the person under the owner's secrets, each once."""
    deployment = office.deployment
    left = list(marks)
    for stream in COVERED:
        if not left:
            return
        ends = await decided(deployment.log, stream)
        # who is in what lies before these ends had a secret before it was sealed, so all of it is asked for now
        theirs = naming(office.sids(person, owner))
        wants = []
        for mark in left:
            sids = _sids_of(deployment.store, mark)
            wants.append((mark, sids, _broadly(mark, sids)))
        async for page in scan(deployment.log, stream, theirs, ends=ends, advance=advance):
            for stored in page:
                for mark, sids, wanted in wants:
                    if mark in left and wanted(stored) and _covers(mark, _sealed(stored), sids):
                        left.remove(mark)
                        yield mark


def _sids_of(store: KeyStore, mark: Mark) -> set[str]:
    """Return the sids, of the owner, that the person under hold had when it was made or since; of an account, none."""
    known = store.persons_of(mark.tokens, mark.at_s) if mark.tokens else ()
    return {one.sid for one in known if one.owner == mark.owner}


# --- copying ------------------------------------------------------------------------------------------------------


async def preserve(deployment: Deployment, *, now_s: int, advance: Advance = unseen) -> Preserved:
    """Copy what holds in force cover and have no copy of yet into `held`, durable and compared on return.

    To be called before anything is destroyed or cut; if it raises, destroy and cut nothing. `now_s` is the time of
    the run (Unix s). Safe to be killed, and on two machines at once (a record may then be copied twice). Blocks, for as
    long as it takes to read what was written since the last run, and what was ever written for a hold that is new.
    """
    records, done = 0, None
    while done != (marks := deployment.store.ledger.marks("hold")):  # one was made, or got other tokens, meanwhile
        records += await _preserve(deployment, marks, now_s, advance)
        done = marks
    return Preserved(records, len(marks))


async def _preserve(deployment: Deployment, marks: Sequence[Mark], now_s: int, advance: Advance) -> int:
    if not marks:
        return 0
    keys, lease = deployment.keys(rotating=True)  # copies do not depend on any token key
    try:
        return sum([await _Copier(deployment, keys, lease, mark, now_s).run(advance) for mark in marks])
    finally:
        keys.close()


class _Released(Exception):
    pass


class _Copier:
    """One hold, one run."""

    def __init__(self, deployment: Deployment, keys: KeyCache, lease: KeyLease, mark: Mark, now_s: int) -> None:
        self.deployment = deployment
        self.log: Log = deployment.log
        self.store = deployment.store
        self.ledger = deployment.store.ledger
        self.auditor = deployment.auditor()
        self.keys = keys
        self.lease = lease
        self.mark = mark
        self.now_s = now_s
        self.written_s = int(time.time())
        self.ref = _ref(mark)
        self.there: set[tuple[str, int, int]] = set()
        self.copied = 0

    async def run(self, advance: Advance) -> int:
        try:
            await self._find_copies()
            for stream in COVERED:
                await self._stream(stream, advance)
            await self._note_copies(await self.log.end_offsets(STREAM))
        except _Released:
            if self._in_force() is not None:
                raise KeysUnusable(
                    "the key of a legal hold in force is destroyed, so nothing can be copied for it and nothing dies:"
                    " make the hold again, and release this one",
                    hold=self.mark.id,
                ) from None
        return self.copied

    def _in_force(self) -> Mark | None:
        """Return the hold as it is now, with the tokens of every token key there is."""
        return next((mark for mark in self.ledger.marks("hold") if mark.id == self.mark.id), None)

    async def _find_copies(self) -> None:
        """Find the copies that a run that was killed may have made without noting them."""
        noted = [self.ledger.progress(_job(self.mark, STREAM, p)) for p in range(self.log.partitions)]
        ends = await decided(self.log, STREAM)
        if all(offset is None for offset in noted):
            await self._note_copies(ends)
            return
        begins = [end if offset is None else offset for offset, end in zip(noted, ends, strict=True)]
        async for page in scan(self.log, STREAM, _of_hold(self.mark), begins=begins, ends=ends):
            self.there.update(_source(stored) for stored in page)

    async def _note_copies(self, ends: Sequence[int]) -> None:
        for partition, end in enumerate(ends):
            self.ledger.set_progress(_job(self.mark, STREAM, partition), end)

    async def _stream(self, stream: str, advance: Advance) -> None:
        begins = [self.ledger.progress(_job(self.mark, stream, p)) or 0 for p in range(self.log.partitions)]
        ends = await decided(self.log, stream)
        # who is in what lies before these ends had a secret, under a token of the mark, before it was sealed: so the
        # mark is read and all of its secrets are asked for now; what died since the hold was made is copied too
        mark = self._in_force()
        if mark is None:
            raise _Released
        sids = _sids_of(self.store, mark)
        async for page in scan(self.log, stream, _broadly(mark, sids), begins=begins, ends=ends, advance=advance):
            for at in range(0, len(page), _PAGE):
                some = page[at : at + _PAGE]
                await self._copy(some, sids)
                self.ledger.set_progress(_job(mark, stream, some[-1].partition), some[-1].offset + 1)
        for partition, end in enumerate(ends):
            self.ledger.set_progress(_job(mark, stream, partition), end)

    async def _copy(self, messages: Sequence[Stored], sids: Collection[str]) -> None:
        """Copy those of the messages, all of one partition, that the hold covers; they are in `held` on return."""
        rows = [(stored, _sealed(stored)) for stored in messages if _place(stored) not in self.there]
        rows = [(stored, sealed) for stored, sealed in rows if _covers(self.mark, sealed, sids)]
        if not rows:
            return
        await self._audit(rows)
        opened = self._open(rows)
        if not opened:
            return
        partition = messages[0].partition
        before = await self.log.end_offsets(STREAM)
        if self.lease.due():
            self.lease.renew()
        ring = self.keys.fetch(Needs({self.ref: (None, len(opened))}, {}), self.now_s)
        epoch = ring.epochs.get(self.ref)
        if epoch is None:
            raise _Released
        entropy = Entropy(os.urandom(ENTROPY_BYTES))
        written = []
        for stored, sealed, fields in opened:
            template = self.deployment.planner.output(STREAM, sealed.account, self.written_s)
            sealer = Sealer(ring, entropy, STREAM, sealed.account, epoch)
            plaintext = orjson.dumps(fields)
            value = sealer.several(*self._envelope(template, stored, sealed), ((_GROUP, None, plaintext),), bare=True)
            written.append(Message(self.written_s * 1000, None, template.headers, value))
        self.keys.guard(self.deployment.margin_s)()
        await self.log.append([Output(STREAM, partition, written)])
        await self._compare(partition, before[partition], {_place(stored): fields for stored, _, fields in opened})
        self.copied += len(opened)

    async def _audit(self, rows: Sequence[tuple[Stored, Sealed]]) -> None:
        sids = dict.fromkeys(part.sid for _, sealed in rows for part in sealed.parts)
        await self.auditor.write(
            "preserve",
            role=_ROLE,
            reason=self.mark.reason,
            hold=self.mark.id,
            stream=rows[0][0].stream,
            records=[[stored.partition, stored.offset] for stored, _ in rows],
            sids=[sid for sid in sids if len(sid) == 32],
        )

    def _open(self, rows: Sequence[tuple[Stored, Sealed]]) -> list[tuple[Stored, Sealed, dict[str, object]]]:
        """Return what opens as it was when the hold was made, without what was destroyed. Raises KeysUnusable."""
        as_of_s = self.mark.at_s
        results = self._opened(rows, as_of_s)
        opened = []
        for (stored, sealed), result in zip(rows, results, strict=True):
            if result.state is State.REVEALED:
                opened.append((stored, sealed, result.fields))
            elif result.state is not State.DESTROYED:
                raise KeysUnusable(
                    f"a record under legal hold does not open ({result.state.value}); nothing is destroyed before it"
                    " does: restore log and key store as they belong together, or release the hold",
                    hold=self.mark.id, **_where(stored),
                )  # fmt: skip
        return opened

    def _opened(self, rows: Sequence[tuple[Stored, Sealed]], as_of_s: int) -> list[Revealed]:
        parts = [part for _, sealed in rows for part in sealed.parts]
        epochs = self.store.open_epochs(_key_ids(part.key for part in parts), as_of_s)
        persons = self.store.open_persons({part.sid for part in parts if len(part.sid) == 32}, as_of_s)
        return [open_sealed(stored.stream, sealed, epochs, persons, instant(as_of_s)) for stored, sealed in rows]

    def _envelope(self, template: Template, stored: Stored, sealed: Sealed) -> tuple[bytes, bytes]:
        corrects = sealed.fields.get("corrects")
        return template.envelope(
            account_id=sealed.account or None,
            hold=self.mark.id,
            **_where(stored),
            day=datetime.fromtimestamp(stored.timestamp_ms // 1000, UTC).date().isoformat(),
            **({} if corrects is None else {"corrects": corrects}),
        )

    async def _compare(self, partition: int, begin: int, fields: dict[tuple[str, int, int], dict[str, object]]) -> None:
        """Read the copies back with keys from the store, and compare. Raises KeysUnusable if one is not as it was."""
        begins, ends = [0] * self.log.partitions, [0] * self.log.partitions
        begins[partition], ends[partition] = begin, (await decided(self.log, STREAM))[partition]
        found: set[tuple[str, int, int]] = set()
        async for page in scan(self.log, STREAM, _of_hold(self.mark), begins=begins, ends=ends):
            rows = [(stored, _sealed(stored)) for stored in page if _source(stored) in fields]
            if (
                Gone.DESTROYED
                in self.store.open_epochs(
                    _key_ids(part.key for _, sealed in rows for part in sealed.parts), self.now_s
                ).values()
            ):
                raise _Released
            for (stored, _), result in zip(rows, self._opened(rows, self.now_s), strict=True):
                if result.state is State.REVEALED and result.fields == fields[_source(stored)]:
                    found.add(_source(stored))
        if found != set(fields):
            raise KeysUnusable(
                "copies of records under legal hold cannot be read back as they were; nothing is destroyed before",
                hold=self.mark.id, stream=STREAM, partition=partition,
            )  # fmt: skip


# --- what is covered ----------------------------------------------------------------------------------------------


def _ref(mark: Mark) -> EpochRef:
    return EpochRef(Domain.HELD.value, PLATFORM, mark.id)


def _job(mark: Mark, stream: str, partition: int | None = None) -> str:
    """Return the name under which it is noted how far a hold's copies go, or how all of its names begin."""
    return f"hold/{mark.id}/{stream}" if partition is None else f"hold/{mark.id}/{stream}/{partition}"


def _broadly(mark: Mark, sids: Collection[str]) -> Wanted:
    """Return what wants all that a hold covers, and maybe more, by what stands clear."""
    if not mark.tokens:
        return of_account(mark.owner, mark.from_s, mark.to_s)
    named = naming(sids)
    from_ms = None if mark.from_s is None else mark.from_s // DAY_S * DAY_S * 1000
    to_ms = None if mark.to_s is None else mark.to_s * 1000

    def wanted(stored: Stored) -> bool:
        at_ms = stored.timestamp_ms
        return (from_ms is None or at_ms >= from_ms) and (to_ms is None or at_ms < to_ms) and named(stored)

    return wanted


def _covers(mark: Mark, sealed: Sealed, sids: Collection[str]) -> bool:
    """Return whether a hold covers a record of its period: it is of the person or account, and was alive then."""
    expires_at = (sealed.fields.get("privacy") or {}).get("expires_at")
    if isinstance(expires_at, str) and expires_at <= instant(mark.at_s):
        return False
    if mark.tokens:
        return any(part.sid in sids for part in sealed.parts)
    return sealed.account == mark.owner


def _of_hold(mark: Mark) -> Wanted:
    """Return what wants the copies of a hold in `held`."""
    named = b'"hold":"' + mark.id.encode() + b'"'
    return lambda stored: named in stored.value


def _sealed(stored: Stored) -> Sealed:
    try:
        return take_apart(stored.value)
    except ValueError:
        raise LogUnusable(
            "a record under legal hold cannot be read; nothing is destroyed before: restore the log from a backup",
            **_where(stored),
        ) from None


def _source(stored: Stored) -> tuple[str, int, int]:
    """Return the place that a copy in `held` was copied from."""
    fields = orjson.loads(stored.value)
    return fields["stream"], fields["partition"], fields["offset"]


def _place(stored: Stored) -> tuple[str, int, int]:
    return stored.stream, stored.partition, stored.offset


def _where(stored: Stored) -> dict[str, str | int]:
    return {"stream": stored.stream, "partition": stored.partition, "offset": stored.offset}


def _key_ids(names: Iterable[str]) -> set[KeyId]:
    ids = set()
    for name in set(names):
        try:
            ids.add(KeyId.parse(name))
        except ValueError:  # `open_sealed` says that the record is corrupt
            continue
    return ids
