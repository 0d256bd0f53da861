"""Brings a key store that a backup brought back up to date: what was destroyed since is destroyed again.

Rules of this file:
- What was destroyed stands in the audit stream, which is in the log and newer than the backup. If that stream is not
  whole, or ends before the last destruction that the key management service counted, nothing is done: the log was
  brought back too, and what it does not name would open again.
- The store stays closed to all others until everything is done again; killed half-way, calling again finishes it.
  Destroying again moves the destruction sequence, so the counter is raised first, out of its reach.
- Opt-outs are under the token key of the log, not of the backup: where that key is lost, they are written anew from
  their sealed numbers, as a rotation does.
- What the backup cannot know is said: holds and restrictions made since are to be made again.
- A hold or restriction in force stays in force, whatever is lost: its tokens are right. Without its number it covers
  nobody under a new token key, which is said; a hold whose copies are lost goes on as a successor that copies anew.
"""

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, date, datetime, time, timedelta
from hashlib import sha256
from time import time as clock
from typing import Final, NamedTuple

import orjson

from processors.evidence import Chains, Findings
from processors.keyring import EpochRef
from processors.retention import instant
from schemas.catalog import Domain
from schemas.errors import KeysUnusable
from streams.deployment import Deployment
from streams.keys.ledger import AT_WILL, Mark, MarkKind
from streams.keys.roles import OFFICER
from streams.keys.store import KeyStore
from streams.officer import offboard
from streams.officer.exempted import ExemptionCopy
from streams.officer.office import Office, office
from streams.officer.rotation import REASON, SWITCH, Copy, nameless, retoken_marks
from streams.officer.upkeep import day_of

AUDIT: Final = "audit"
_PAGE: Final = 1000
_BATCH: Final = 1000
_LOST: Final = "reconcile/token"
_BEGUN: Final = "reconcile"
_SPARE: Final = 1000
"""Destructions that nothing names: of token keys, and what a rotation takes."""


class Missing(NamedTuple):
    """A hold or restriction that must be made again: made since the backup, or in force and its number is lost."""

    kind: MarkKind
    id: str
    reason: str


class Reconciled(NamedTuple):
    """What was done again: sids and epochs destroyed, marks ended, opt-outs written; and what is missing.

    `missing`: marks made since the backup. `nameless`: marks in force whose number is lost; no token key is rotated
    until they are made again. `successors`: ids of holds that copy anew what they cover. `given_up`: epochs that were
    alive and lost, `DOMAIN/OWNER/EPOCH`: nothing is sealed under them again.
    """

    sids: int
    epochs: int
    ended: int
    opt_outs: int
    missing: tuple[Missing, ...]
    nameless: tuple[Missing, ...]
    successors: tuple[str, ...]
    given_up: tuple[str, ...]


class _Past:
    """What the audit stream says was done, as far as a key store keeps it."""

    def __init__(self) -> None:
        self.sids: dict[str, None] = {}
        self.epochs: dict[EpochRef, None] = {}
        self.days: set[str] = set()
        self.made: dict[str, Missing] = {}
        self.ended: dict[str, int] = {}  # id of a mark -> Unix s
        self.leaving: dict[str, tuple[str, int | None]] = {}  # account -> as of when, end of its agreement (Unix s)
        self.token_version = 0  # the newest whose entries in the log are whole
        self.sequence = 0  # destructions that were over when an entry was written
        self.raised: dict[int, int] = {}  # a reconciliation that never came to its end: counter it set -> before

    def add(self, value: bytes) -> None:
        """Take an entry. Raises ValueError or another error of a malformed one."""
        entry = orjson.loads(value)
        action = entry["action"]
        destroyed = entry.get("destroyed") or {}
        self.sids.update(dict.fromkeys(map(_sid, destroyed.get("sids", ()))))
        self.epochs.update(dict.fromkeys(map(_epoch, destroyed.get("epochs", ()))))
        self.days.update(map(_day, entry.get("days", ()) if action == "destroy" else ()))
        self.sequence = max(self.sequence, int(entry.get("sequence", 0)))
        if action == _BEGUN:
            self.raised[int(entry["raised"])] = int(entry["counter"])
        elif action == SWITCH:
            self.token_version = max(self.token_version, int(entry["token_version"]))
        elif action in ("hold", "restrict"):
            kind: MarkKind = "hold" if action == "hold" else "restriction"
            mark_id = _sid(entry[kind])
            self.made[mark_id] = Missing(kind, mark_id, str(entry["reason"]))
        elif action in ("release", "unrestrict"):
            mark_id = _sid(entry["hold" if action == "release" else "restriction"])
            self.ended[mark_id] = _unix_s(entry["at"])
        elif action == "offboard":
            account, at, ended_at = str(entry["account"]), str(entry["at"]), entry["terminated_at"]
            if at >= self.leaving.get(account, ("", None))[0]:
                self.leaving[account] = at, None if ended_at is None else _unix_s(ended_at)

    def needed(self, counter: int) -> int:
        """Return up to which destruction the stream must go, if the key management service counts so many."""
        while counter in self.raised:
            counter = self.raised[counter]
        return counter


def _sid(text: str) -> str:
    if len(bytes.fromhex(text)) != 16:
        raise ValueError("no id")
    return text


def _unix_s(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def _day(text: str) -> str:
    return date.fromisoformat(text).isoformat()


def _epoch(text: str) -> EpochRef:
    domain, owner, epoch = text.split("/")
    return EpochRef(domain, owner, epoch)


async def reconcile(
    deployment: Deployment, now_s: int, *, incomplete: bool = False, advance: Callable[[int], None] = lambda _: None
) -> Reconciled:
    """Destroy again what was destroyed since the backup, and let the store be used. Audited; idempotent. Blocks.

    `deployment` was opened with `outdated`. `incomplete`: go on although the audit stream may not name everything.
    `advance` is told of audit entries read. Memory: a few hundred bytes for everything that was ever destroyed early
    and each epoch that died. Raises RevealDenied to all but the privacy officer, and KeysUnusable if the audit stream
    does not tell for sure what was destroyed.
    """
    desk = office(deployment)
    auditor, store = desk.auditor, deployment.store
    past, findings = await _read(deployment, advance)
    counter = _counter(store, past, incomplete=incomplete)
    lost = {day_of(kek) for kek in store.lost()} - set(store.due_days(now_s))
    if not incomplete:
        _refuse_unless_whole(past, findings, counter)
        copies = {ref for ref in _alive(store, now_s) - past.epochs.keys() if ref.domain == Domain.HELD}
        _refuse_what_is_lost(lost - past.days - (set() if copies else {AT_WILL}))
    standing = {mark.id for kind in _KINDS for mark in store.ledger.marks(kind)}
    raised = counter + len(past.sids) + len(past.epochs) + len(lost) + _SPARE
    await auditor.write(_BEGUN, counter=past.needed(counter), raised=raised, findings=findings.count, lost=sorted(lost))
    store.kms.raise_counter(raised)
    _give_up(store, lost & past.days, now_s)
    alive = _alive(store, now_s)
    _give_up(store, lost - past.days, now_s)
    given_up = tuple(sorted("/".join(ref) for ref in alive - _alive(store, now_s) - past.epochs.keys()))
    ending = [mark_id for mark_id in past.ended if mark_id in standing]
    for mark_id in ending:
        store.ledger.end_mark(mark_id, past.ended[mark_id])
    for account, (_, terminated_s) in past.leaving.items():
        offboard.reschedule(deployment, account, terminated_s)
    sids, epochs = _destroy_sids(store, list(past.sids)), _destroy_epochs(store, list(past.epochs), now_s)
    opt_outs = await _retoken(deployment, past.token_version)
    retoken_marks(deployment)
    successors = tuple([await _succeed(desk, mark) for mark in _without_copies(store, now_s)])
    there = {mark.id for kind in _KINDS for mark in store.ledger.marks(kind, ended=True)}
    missing = tuple(mark for mark_id, mark in past.made.items() if mark_id not in there and mark_id not in past.ended)
    without = tuple(Missing(mark.kind, mark.id, mark.reason) for mark in nameless(store))
    store.catch_up()
    await auditor.write(
        "reconciled",
        sids=sids,
        epochs=epochs,
        ended=ending,
        opt_outs=opt_outs,
        missing=[mark.id for mark in missing],
        nameless=[mark.id for mark in without],
        successors=successors,
        incomplete=incomplete,
    )
    return Reconciled(sids, epochs, len(ending), opt_outs, missing, without, successors, given_up)


_KINDS: Final[tuple[MarkKind, ...]] = ("hold", "restriction")


async def _read(deployment: Deployment, advance: Callable[[int], None]) -> tuple[_Past, Findings]:
    """Return what the audit stream says, and what is wrong with it."""
    log, past = deployment.log, _Past()
    begins, ends = await log.begin_offsets(AUDIT), await log.end_offsets(AUDIT)
    heads = {(head.writer, head.seq): head.digest for head in deployment.store.ledger.heads()}
    chains = Chains(begins, heads)
    for partition, end in enumerate(ends):
        at = begins[partition]
        while at < end and (page := await log.read(AUDIT, partition, at, _PAGE, end)):
            for stored in page:
                chains.add(partition, stored.offset, stored.value)
                try:
                    past.add(stored.value)
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise KeysUnusable(
                        "an entry of the audit stream cannot be read, so it cannot be told what was destroyed since the"
                        " backup: nothing was done",
                        stream=AUDIT, partition=partition, offset=stored.offset,
                    ) from None  # fmt: skip
            at = page[-1].offset + 1
            advance(len(page))
    chains.finish()
    return past, chains.findings


def _counter(store: KeyStore, past: _Past, *, incomplete: bool) -> int:
    """Return the destruction counter of the key management service, or without it how far the audit stream goes.

    Raises KeysUnusable if it is lost, unless `incomplete`.
    """
    try:
        return store.kms.counter()
    except KeysUnusable as error:
        if incomplete:
            return max(past.sequence, store.sequence())
        raise KeysUnusable(
            "the destruction counter of the key management service is lost, so nothing tells whether the audit stream"
            " goes as far as the last destruction: nothing was done; restore the counter, or go on with what the stream"
            " names: --yes"
        ) from error


def _refuse_unless_whole(past: _Past, findings: Findings, counter: int) -> None:
    if findings.count:
        raise KeysUnusable(
            f"the audit stream is not whole ({findings.kept[0]}), so it may not name all that was destroyed since the"
            " backup: nothing was done; restore the log, or go on with what it names: --yes"
        )
    needed = past.needed(counter)
    if past.sequence < needed:
        raise KeysUnusable(
            f"the audit stream ends at destruction {past.sequence} of {needed}: was the log brought back by a backup"
            " too? Nothing was done; restore the log, or go on with what it names: --yes"
        )


def _refuse_what_is_lost(days: Collection[str]) -> None:
    if days:
        raise KeysUnusable(
            f"what is under {', '.join(sorted(days))} opens no more: the backup is from before a re-wrap, or the"
            " key-encryption key was deleted. Nothing was done; restore a newer backup, or lose what is under it: --yes"
        )


def _alive(store: KeyStore, now_s: int) -> set[EpochRef]:
    """Return the epochs whose keys the store has."""
    return {EpochRef(key.domain, key.owner, key.epoch) for key in store.status(now_s) if key.state == "alive"}


def _give_up(store: KeyStore, days: Collection[str], now_s: int) -> None:
    """Leave a tombstone of all that is under days whose KEK is lost."""
    for day in sorted(days):
        store.bury_day(day, now_s if day == AT_WILL else _end_s(day))


def _without_copies(store: KeyStore, now_s: int) -> list[Mark]:
    """Return the holds in force under whose epoch nothing can be kept any more."""
    gone = {key.epoch for key in store.status(now_s) if key.domain == Domain.HELD and key.state == "destroyed"}
    return [mark for mark in store.ledger.marks("hold") if mark.id in gone]


async def _succeed(desk: Office, mark: Mark) -> str:
    """Put a hold of the same kind in the place of one whose copies are lost, and return its id; idempotent. Audited."""
    ledger, store = desk.deployment.store.ledger, desk.deployment.store
    made = mark._replace(id=sha256(bytes.fromhex(mark.id)).hexdigest()[:32])
    ledger.add_mark(made, ledger.number_of(mark.id))
    await desk.auditor.write(
        "hold",
        role=OFFICER,
        reason=made.reason,
        hold=made.id,
        instead_of=mark.id,
        owner=made.owner,
        sids=sorted(one.sid for one in store.persons_of(made.tokens) if one.owner == made.owner) if made.tokens else [],
        period=[None if at_s is None else instant(at_s) for at_s in (made.from_s, made.to_s)],
    )
    ledger.end_mark(mark.id, int(clock()))
    return made.id


def _end_s(day: str) -> int:
    """Return the first second after a day, Unix s."""
    return int(datetime.combine(date.fromisoformat(day) + timedelta(1), time(), UTC).timestamp())


def _destroy_sids(store: KeyStore, sids: Sequence[str]) -> int:
    """Destroy these secrets, whether they are there again or not; return how many that were."""
    for at in range(0, len(sids), _BATCH):
        store.destroy_sids(sids[at : at + _BATCH])
    return len(sids)


def _destroy_epochs(store: KeyStore, refs: Sequence[EpochRef], now_s: int) -> int:
    """Destroy what is not destroyed of these, nor dead by the clock; return how many that were.

    What the store does not know gets its tombstone too, so that it is never made again.
    """
    states = {EpochRef(key.domain, key.owner, key.epoch): key.state for key in store.status(now_s)}
    again = [ref for ref in refs if states.get(ref) not in ("destroyed", "due")]
    for ref in again:
        store.destroy_epoch(ref)
    return len(again)


async def _retoken(deployment: Deployment, version: int) -> int:
    """Have the opt-outs stand under a token key that there is; return how many entries that took.

    `version`: that of the log. If the backup is from during the rotation to it, it only has to be switched to.
    """
    store = deployment.store
    keys = store.token_keys()
    lost = store.ledger.progress(_LOST)
    if lost is None:
        if keys.current.version >= version and not keys.changing:
            return 0
        if any(key.version == version for key in keys.others):
            store.hold_tokens(version)
            store.switch_tokens(version)
            return 0
        if keys.current.version >= version:  # the rotation that was under way never came to its switch
            return 0
        lost = version
        store.ledger.set_progress(_LOST, lost)
    key = store.add_token_key()
    while key.version <= lost:  # its entries are under another key of this version
        store.hold_tokens(key.version)
        store.switch_tokens(key.version)
        key = store.add_token_key()
    current = store.token_keys().current.version
    written = await Copy(deployment, lost, key, current=current).run()
    await ExemptionCopy(deployment, lost, key, reason=REASON, current=current).run()
    await deployment.auditor().write(SWITCH, token_version=key.version, entries=written.written)
    store.hold_tokens(key.version)
    store.switch_tokens(key.version)
    store.ledger.drop_progress(_LOST)
    return written.written
