"""What is due dies: held records are kept first, then keys, wrapped rows and their KEKs go, then the logs are cut.

Rules of this file:
- Nothing dies before all that a hold covers is kept (INF-7). If that cannot be done, nothing dies in this run.
- Whatever is destroyed stands in `audit` before. Keys go first: from then on nothing opens, whatever the logs hold.
- A log is cut to the first record that is still live. What has no instant of its own is live; in doubt it stays.
- Every step may be repeated, or done on two machines at once, and no lock is held for long. So a run that was killed
  is finished by the next one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from functools import partial
from typing import Final, NamedTuple

import orjson

from processors.retention import DAY_S, instant
from processors.screen.suppression import parse_key
from schemas.catalog import CATALOG, CUT, INPUTS
from schemas.errors import InputInvalid, LogUnusable, Retriable, StreamveilError
from schemas.policy import Period
from streams.config import Config
from streams.deployment import Deployment
from streams.keys.wrapping import day_of
from streams.log.protocol import Log, Stored
from streams.officer import evidence, holds, offboard, rotation
from streams.officer.again import again
from streams.officer.office import office
from streams.state import entries

SUPPRESSIONS: Final = entries.SUPPRESSIONS.stream
AHEAD: Final = Period(13, "months")
"""So far ahead of the clock `--now` may destroy: what is sealed under INF-4 today is dead then."""
SLACK_S: Final = 60
"""So little behind the clock `--now` is taken for now: it was, when it was typed."""
AUDITED: Final = 1000
"""Epochs or sids in one audit entry at most."""
PAGE: Final = 5000
CUT_EVERY: Final = 500_000
"""A cut is made after so many dead records at the latest, so that a run that is killed has done something."""
CANDIDATES: Final = 100_000
"""So many opt-outs are looked at in one day, whether a newer record has taken their place."""
_LEAD_S: Final = 1800
_HELD: Final = "held"
_TOLD: Final = "retention/told"
_LOOKED: Final = "retention/suppressions"
_EXPIRES = b'"expires_at":"'
_INSTANT_CHARS: Final = len("2026-11-21T00:00:00Z")
_HOLD = b'"hold":"'
_HOLD_CHARS: Final = 32

Dead = Callable[[Stored], bool]


class Died(NamedTuple):
    """What went: epochs, person secrets that went with their day, and days whose KEKs are gone."""

    epochs: int
    persons: int
    days: tuple[str, ...]


class Cut(NamedTuple):
    """How far a stream is cut off, or in a dry run would be: first offsets before and after, one per partition."""

    stream: str
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def records(self) -> int:
        """How many offsets that is: on Kafka marks of transactions are counted too."""
        return sum(self.ends) - sum(self.begins)


class Skipped(NamedTuple):
    """What was not done, and why: one line."""

    what: str
    why: str


class Report(NamedTuple):
    """What a run did, or with `dry` would do, as of `at_s` (Unix s). `rewrapped`: day → rows moved."""

    at_s: int
    dry: bool
    held: int  # records kept for holds
    died: Died
    offboarded: tuple[str, ...]
    rewrapped: dict[str, int]
    cuts: tuple[Cut, ...]
    skipped: tuple[Skipped, ...]
    failed: bool  # what was skipped is more than what this user may not do, or `audit` was altered

    def as_json(self) -> dict[str, object]:
        """Return it as one JSON object."""
        return {
            "now": instant(self.at_s),
            "dry": self.dry,
            "held": self.held,
            "epochs": self.died.epochs,
            "persons": self.died.persons,
            "days": list(self.died.days),
            "offboarded": list(self.offboarded),
            "rewrapped": self.rewrapped,
            "cut": [
                {"stream": cut.stream, "records": cut.records, "from": list(cut.begins), "to": list(cut.ends)}
                for cut in self.cuts
            ],
            "skipped": [one._asdict() for one in self.skipped],
            "failed": self.failed,
        }

    @property
    def idle(self) -> bool:
        """Whether there was nothing to do."""
        return not (self.held or any(self.died) or self.offboarded or self.rewrapped or self.cuts or self.skipped)


async def run(
    deployment: Deployment,
    now_s: int,
    *,
    dry: bool,
    rewrap: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Report:
    """Destroy what is due at `now_s` and cut the logs; `dry`: only say what would go. Audited. Blocks.

    `rewrap`: re-wrap every stale day now, not only those whose window ends. `advance` is told of records read.
    Raises RevealDenied as `permit` does, and what the key store and the log raise, before anything is half done that
    calling again would not finish.
    """
    permit(deployment, now_s, dry=dry)
    now_s = by_the_store(deployment, now_s)
    skipped: list[Skipped] = []
    held = 0
    if not dry:
        try:
            held = (await holds.preserve(deployment, now_s=now_s, advance=advance)).records
        except StreamveilError as error:
            skipped.append(Skipped("everything", f"what is under legal hold could not be kept first: {error}"))
            died = Died(0, 0, ())
            report = Report(now_s, dry, 0, died, (), {}, (), tuple(skipped), failed=True)
            await _tell(deployment, report)
            return report
    left = await offboard.due(deployment, now_s, dry=dry)
    skipped += [Skipped(f"exemptions of {account}", f"not withdrawn: {why}") for account, why in left.exempt.items()]
    died = await destroy_due(deployment, now_s, dry=dry)
    rewrapped = await _rewrap(deployment, now_s, dry=dry, every=rewrap)
    cuts, uncut, failed = await _cut_all(deployment, now_s, dry, advance)
    skipped += uncut
    report = Report(now_s, dry, held, died, left.accounts, rewrapped, tuple(cuts), tuple(skipped), failed)
    if not dry:
        try:
            await rotation.drop_old_tokens(deployment)
        except Retriable as error:
            report = report._replace(skipped=(*report.skipped, Skipped("token keys", str(error))))
        await _tell(deployment, report)
        try:
            body = (await evidence.checkpoint(deployment)).checkpoint
        except (Retriable, LogUnusable) as error:
            report = report._replace(skipped=(*report.skipped, Skipped("checkpoint", str(error))))
        else:
            if found := len(body.findings) + body.more_findings:
                wrong = Skipped("audit", f"checkpoint {body.number} has {found} findings; see evidence report")
                report = report._replace(skipped=(*report.skipped, wrong), failed=True)
    return report


def moment(config: Config, asked_s: int | None, clock_s: int, *, yes: bool) -> tuple[int, bool]:
    """Return as of when to destroy (Unix s), and whether only to say what would go.

    `asked_s`: what `--now` says. Ahead of the clock it is a dry run; with `yes` it destroys, on the local-file key
    management service only, and at most 13 months ahead. Raises InputInvalid otherwise, and for what is past.
    """
    if asked_s is None or clock_s - SLACK_S <= asked_s <= clock_s:
        return clock_s, False
    if asked_s < clock_s:
        raise InputInvalid("--now is behind the clock: what was due then is due now, so leave it out")
    if yes and config.vault is not None:
        raise InputInvalid("--now ahead of the clock destroys with the local-file key management service only")
    if yes and _date(asked_s) > AHEAD.after(_date(clock_s)):
        raise InputInvalid("--now is more than 13 months ahead of the clock; nothing was destroyed")
    return asked_s, not yes


def permit(deployment: Deployment, now_s: int, *, dry: bool) -> None:
    """Return if this process may destroy as of `now_s`: what is due by the clock, anybody; ahead of it, the officer.

    Reads files. Raises RevealDenied.
    """
    if not dry and now_s > time.time():
        office(deployment)


def by_the_store(deployment: Deployment, now_s: int) -> int:
    """Return `now_s`, but no later than the store's clock if it was taken from this machine's, which may be ahead."""
    return min(now_s, int(deployment.store.now_s())) if now_s <= time.time() else now_s


def _date(at_s: int) -> date:
    return datetime.fromtimestamp(at_s, UTC).date()


# --- keys ---------------------------------------------------------------------------------------------------


async def destroy_due(deployment: Deployment, now_s: int, *, dry: bool) -> Died:
    """Destroy the epochs whose deadline is at or before `now_s`, and bury the days that are over. Audited. Blocks.

    Holds are the caller's to keep first. An epoch of a day that is over goes with its day.
    """
    store, now_s = deployment.store, by_the_store(deployment, now_s)
    due = store.due_epochs(now_s)
    days = store.due_days(now_s)
    if dry:
        return Died(len(due), 0, tuple(days))
    auditor, over, persons = deployment.auditor(), set(days), 0
    for batch in in_batches(["/".join(ref) for ref, _ in due]):
        await auditor.write("destroy", destroyed={"epochs": batch}, why="deadline")
    for ref, deadline_s in due:
        if day_of(deadline_s) not in over:
            await again(partial(store.destroy_epoch, ref))
    if days:
        await auditor.write("destroy", days=days, why="deadline")
    for day in days:
        persons += (await again(partial(store.bury_day, day, now_s))).persons
    return Died(len(due), persons, tuple(days))


def in_batches(found: list[str]) -> Iterator[list[str]]:
    """Yield the names of what is to be destroyed, so many at a time as fit an audit entry."""
    for at in range(0, len(found), AUDITED):
        yield found[at : at + AUDITED]


async def _rewrap(deployment: Deployment, now_s: int, *, dry: bool, every: bool) -> dict[str, int]:
    """Re-wrap the days under which something was destroyed early, before an older copy of the store had its window."""
    store, window_s = deployment.store, deployment.config.rewrap_s
    over = set(store.due_days(now_s))
    lead_s = min(_LEAD_S, window_s // 2)
    days = [
        day
        for day, at_s in sorted(store.stale_days().items())
        if day not in over and (every or now_s - at_s >= window_s - lead_s)
    ]
    return {day: 0 if dry else await again(partial(store.rewrap, day)) for day in days}


# --- logs ---------------------------------------------------------------------------------------------------


async def _cut_all(
    deployment: Deployment, now_s: int, dry: bool, advance: Callable[[int], None]
) -> tuple[list[Cut], list[Skipped], bool]:
    """Cut every stream that can be; return how far, what was skipped, and whether by more than missing rights."""
    cuts, skipped, failed = [], [], False
    on_kafka = deployment.config.kafka is not None
    for stream in CUT if on_kafka else [name for name in CATALOG if name not in INPUTS]:
        try:
            if stream == SUPPRESSIONS:
                found = await _cut_suppressions(deployment, now_s, dry)
            else:
                found = await _cut(deployment.log, stream, _dead(deployment, stream, now_s), dry, advance)
        except Retriable as error:
            skipped.append(Skipped(stream, f"not cut now: {error}"))
            failed = True
        except LogUnusable as error:
            if not on_kafka:
                raise
            skipped.append(Skipped(stream, f"not cut: {error}; retention.ms of the topic is the backstop"))
        else:
            cuts += [found] if found.records else []
    return cuts, skipped, failed


async def _cut(log: Log, stream: str, dead: Dead, dry: bool, advance: Callable[[int], None]) -> Cut:
    """Cut a stream to its first live record, in bounded memory."""
    begins, ends = await log.begin_offsets(stream), await log.end_offsets(stream)
    reached = list(begins)
    for partition, end in enumerate(ends):
        at, cut_at = begins[partition], begins[partition]
        live = False
        while at < end and not live:
            page = await log.read(stream, partition, at, min(PAGE, end - at), end)
            advance(len(page))
            first = next((stored.offset for stored in page if stored.offset >= end or not dead(stored)), None)
            live = first is not None
            at = first if first is not None else (page[-1].offset + 1 if page else end)
            if not dry and at - cut_at >= CUT_EVERY:
                await log.cut(stream, _only(begins, partition, at))
                cut_at = at
        reached[partition] = at
    if dry or reached == begins:
        return Cut(stream, tuple(begins), tuple(reached))
    return Cut(stream, tuple(begins), tuple(await log.cut(stream, reached)))


def _only(begins: Sequence[int], partition: int, offset: int) -> list[int]:
    return [offset if at == partition else begin for at, begin in enumerate(begins)]


def _dead(deployment: Deployment, stream: str, now_s: int) -> Dead:
    """Return what tells whether a record of a stream is dead."""
    now_at = instant(now_s).encode()
    if stream != _HELD:
        return lambda stored: _expired(stored.value, now_at)
    released = {
        mark.id.encode()
        for mark in deployment.store.ledger.marks("hold", ended=True)
        if mark.ended_s is not None and mark.ended_s <= now_s
    }

    def dead(stored: Stored) -> bool:
        at = stored.value.find(_HOLD) + len(_HOLD)
        return stored.value[at : at + _HOLD_CHARS] in released or _expired(stored.value, now_at)

    return dead


def _expired(value: bytes, now_at: bytes) -> bool:
    """Return whether the instant in a value's `privacy` is past; about 0.3 µs. What has none is live."""
    at = value.find(_EXPIRES)
    if at < 0:
        return False
    if value.find(_EXPIRES, at + 1) >= 0:  # an exemption ends before its month does
        try:
            found = orjson.loads(value)["privacy"]["expires_at"]
        except (ValueError, KeyError, TypeError):
            return False
        return isinstance(found, str) and found.encode() <= now_at
    at += len(_EXPIRES)
    end = at + _INSTANT_CHARS
    return value[end : end + 1] == b'"' and value[at:end] <= now_at


async def _cut_suppressions(deployment: Deployment, now_s: int, dry: bool) -> Cut:
    """Cut off opt-outs of token keys that are not in use any more, and those whose entry has a newer record.

    Once a day, for it may read the whole stream. The brokers of Kafka compact by the same rule.
    """
    log, store, keys = deployment.log, deployment.store, deployment.store.token_keys()
    begins, ends = await log.begin_offsets(SUPPRESSIONS), await log.end_offsets(SUPPRESSIONS)
    unchanged = Cut(SUPPRESSIONS, tuple(begins), tuple(begins))
    today = now_s // DAY_S
    if keys.changing or (not dry and store.ledger.progress(_LOOKED) == today):
        return unchanged
    reached = [
        await _first_standing(log, partition, begin, end, keys.current.version)
        for partition, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    if dry:
        return Cut(SUPPRESSIONS, tuple(begins), tuple(reached))
    found = (
        unchanged
        if reached == begins
        else Cut(SUPPRESSIONS, tuple(begins), tuple(await log.cut(SUPPRESSIONS, reached)))
    )
    store.ledger.set_progress(_LOOKED, today)
    return found


async def _first_standing(log: Log, partition: int, begin: int, end: int, version: int) -> int:
    """Return the offset of the first record that counts, or where to go on if the first `CANDIDATES` keys do not."""
    standing: dict[bytes, int] = {}  # key → its latest record, in the order of these
    at, until = begin, end  # only keys of records before `until` are candidates
    while at < end and (standing or until == end):
        page = await log.read(SUPPRESSIONS, partition, at, min(PAGE, end - at), end)
        for stored in page:
            key = stored.key or b""
            standing.pop(key, None)
            if stored.offset < until and not _is_older(key, version):
                standing[key] = stored.offset
        at = page[-1].offset + 1 if page else end
        if until == end and len(standing) >= CANDIDATES:
            until = at
    return next(iter(standing.values()), until)


def _is_older(key: bytes, version: int) -> bool:
    """Return whether a record is of a token key that was replaced; what is no key of an opt-out is not."""
    try:
        return parse_key(key)[0] < version
    except ValueError:
        return False


# --- what is told ---------------------------------------------------------------------------------------------


async def _tell(deployment: Deployment, report: Report) -> None:
    """Write what a run did to `audit`; a run that had nothing to do once a day."""
    ledger, today = deployment.store.ledger, report.at_s // DAY_S
    if report.idle and ledger.progress(_TOLD) == today:
        return
    await deployment.auditor().write(
        "retention",
        now=instant(report.at_s),
        epochs=report.died.epochs,
        persons=report.died.persons,
        days=list(report.died.days),
        held=report.held,
        offboarded=list(report.offboarded),
        rewrapped=report.rewrapped,
        cut={cut.stream: cut.records for cut in report.cuts},
        skipped=[one.what for one in report.skipped],
        failed=report.failed,
    )
    ledger.set_progress(_TOLD, today)
