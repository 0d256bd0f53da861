"""Signs what the audit stream holds, and makes the report that an outside auditor checks without trusting us (CAL-13).

Rules of this file:
- A checkpoint looks at what came since the last one and at every head that the key store has; what is wrong is in it,
  signed, and it is written all the same. It stops nobody: who could edit the log could else stop the traffic.
- Order of a checkpoint: entry in the log, heads dropped from the key store, then the note where it lies. Killed in
  between, the next one looks at the same again. Two at once are no harm: the next one names both.
- A report is a folder that is there whole or not at all. It names nobody: people by sid, cases by reference.
- What `verify` can work out from the entries is made by the code that it uses: `processors.evidence`.
"""

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from processors.evidence import (
    CHECKPOINT,
    Body,
    Chains,
    Checkpoint,
    Code,
    Tally,
    checkpoint_in,
    encode,
    entry_of,
    expected,
    fingerprint,
    sign,
    verifies,
)
from processors.retention import instant
from schemas.catalog import partition_for
from schemas.errors import InputInvalid, LogUnusable
from streams.config import packs_available
from streams.deployment import Deployment
from streams.keys.ledger import Mark, Request
from streams.keys.roles import OFFICER
from streams.keys.store import KeyStore
from streams.log.protocol import Log, Stored
from streams.officer.office import Office, office
from streams.officer.report_page import page
from streams.officer.scan import everything, scan
from streams.officer.verify import (
    AUDIT,
    CHECKPOINTS,
    DESTRUCTIONS,
    EXCEPTIONS,
    HOLDS,
    KEY,
    KEYS,
    LAST,
    MANIFEST,
    PAGE,
    POLICIES,
    POLICY,
    REQUESTS,
    RETENTION,
    REVEALS,
    FileSum,
    Manifest,
    Signed,
    audit_line,
)  # fmt: skip

STREAM: Final = "audit"
SIGNING_KEY: Final = "evidence/signing"
LAST_CHECKPOINT: Final = "evidence/checkpoint"
MAX_HEADS: Final = 4000
"""Heads in one checkpoint: an entry of half a megabyte at most, for Kafka takes one."""
NOTED: Final = 100
"""Findings in one checkpoint."""
DAY_S: Final = 86_400
SLACK_S: Final = 300
"""So far the clocks of those who write entries may be apart."""
_FIRST_KEY_S = 0.5
_GONE = "a checkpoint was taken out of the log while the report was made"
_MARGINS_S = (2 * DAY_S, 60 * DAY_S, None)
"""So far before and after a window checkpoints are looked for; None: in the whole log."""


# --- the key -----------------------------------------------------------------------------------------------------


async def signing_key(store: KeyStore) -> Ed25519PrivateKey:
    """Return the key that signs checkpoints and reports; it is made, and kept in the key store, on first use."""
    found = store.secret(SIGNING_KEY)
    if found is None:
        store.put_secret(SIGNING_KEY, Ed25519PrivateKey.generate().private_bytes_raw())
        await asyncio.sleep(_FIRST_KEY_S)  # another process may have made one at the same moment: the later one stays
        found = store.secret(SIGNING_KEY)
    return Ed25519PrivateKey.from_private_bytes(found or b"")


async def public_key(deployment: Deployment) -> Ed25519PublicKey:
    """Return the public key that checks reports. Raises RevealDenied where there is none yet: the dpo has it made."""
    if deployment.store.secret(SIGNING_KEY) is None:
        office(deployment)
    return (await signing_key(deployment.store)).public_key()


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Return a public key as PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


# --- checkpoints -------------------------------------------------------------------------------------------------


class _Note(msgspec.Struct, frozen=True):
    """Where the last checkpoint lies: at or after `offset` in its partition."""

    digest: str
    number: int
    partition: int
    offset: int


async def checkpoint(deployment: Deployment) -> Checkpoint:
    """Return a signed checkpoint of the audit stream, durable in it, with what was found wrong since the last one.

    Verifies every head that the key store has, and every chain of entries, against the log. Where there is nothing
    new but checkpoints, for a day at most, the last one is returned and nothing is written. Blocks; takes as long as
    reading what came since the last one.
    """
    log, store = deployment.log, deployment.store
    key = await signing_key(store)
    raw = store.secret(LAST_CHECKPOINT)
    note = None if raw is None else msgspec.json.decode(raw, type=_Note)
    last = None if note is None else await _find(log, note)
    heads = store.ledger.heads()  # before the ends: what a head is of is in the log by then
    begins, ends = await log.begin_offsets(STREAM), await log.stable_offsets(STREAM)
    look = _Look(key, store.store_id, last, begins, ends, {(one.writer, one.seq): one.digest for one in heads})
    if note is not None and last is None:
        look.chains.findings.add(Code.NO_CHECKPOINT)
        look.seen[note.digest] = (note.number, ())
    async for stored in _entries(log, look.since, ends):
        look.take(stored)
    if look.unexplained:  # all of the log is read: this is rare
        async for stored in _entries(log, begins, look.since):
            look.explain(stored)
    now_s = int(time.time())
    if last is not None and look.is_quiet and instant(now_s - DAY_S) < last.checkpoint.at:
        return last
    made = look.finish(now_s)
    for one in made:
        await deployment.auditor().write(
            CHECKPOINT, checkpoint=orjson.Fragment(encode(one.checkpoint)), signature=one.signature
        )
    for head in heads:
        store.ledger.drop_head(head.writer, head.seq)
    partition = partition_for(deployment.who().name.encode(), log.partitions)
    body = made[-1].checkpoint
    store.put_secret(LAST_CHECKPOINT, encode(_Note(body.digest, body.number, partition, ends[partition])))
    return made[-1]


async def _find(log: Log, note: _Note) -> Checkpoint | None:
    """Return the checkpoint of a note, or None if it is not in the log."""
    ends = await log.stable_offsets(STREAM)
    begins = list(ends)
    if note.partition < len(begins):
        begins[note.partition] = min(note.offset, ends[note.partition])
    async for stored in _entries(log, begins, ends):
        found = _checkpoint_in(stored)
        if found is not None and found.checkpoint.digest == note.digest:
            return found if len(found.checkpoint.upto) == len(ends) else None
    return None


async def _entries(
    log: Log, begins: Sequence[int], ends: Sequence[int], advance: Callable[[int], None] = lambda _: None
) -> AsyncIterator[Stored]:
    """Yield the entries of the audit stream between these offsets, partition by partition."""
    async for found in scan(log, STREAM, everything, begins=begins, ends=ends, advance=advance):
        for stored in found:
            yield stored


def _checkpoint_in(stored: Stored) -> Checkpoint | None:
    if b'"action":"checkpoint"' not in stored.value:
        return None
    entry = entry_of(stored.value)
    return None if entry is None else checkpoint_in(entry)


class _Look:
    """One look at what came since the last checkpoint."""

    def __init__(
        self,
        key: Ed25519PrivateKey,
        store_id: str,
        last: Checkpoint | None,
        begins: Sequence[int],
        ends: Sequence[int],
        wanted: dict[tuple[str, int], str],
    ) -> None:
        self._key, self._store_id, self._last, self._ends = key, store_id, last, ends
        upto = begins if last is None else last.checkpoint.upto
        self.since = [max(begin, min(at, end)) for begin, at, end in zip(begins, upto, ends, strict=True)]
        self.seen: dict[str, tuple[int, tuple[str, ...]]] = {}
        """The checkpoints that lie here: digest → number and those that it names."""
        self.chains = Chains(self.since, wanted, () if last is None else last.checkpoint.heads)
        self._only_checkpoints = True
        self._covered = dict[str, int]()
        if last is not None:
            self._cover(last)
            for partition, (at, end) in enumerate(zip(upto, ends, strict=True)):
                if end < at:
                    self.chains.findings.add(Code.SHORTER, partition=partition, offset=end)

    def _cover(self, one: Checkpoint) -> None:
        """Take note of the heads that a checkpoint has: a process may tell the key store of its head only now."""
        for writer, seq, _ in one.checkpoint.heads:
            self._covered[writer] = max(seq, self._covered.get(writer, 0))

    def take(self, stored: Stored) -> None:
        """Look at the next entry."""
        entry = self.chains.add(stored.partition, stored.offset, stored.value)
        if entry is None or entry.action != CHECKPOINT:
            self._only_checkpoints = False
            return
        found = checkpoint_in(entry)
        if found is None or not verifies(self._key.public_key(), found):
            self.chains.findings.add(Code.SIGNATURE, partition=stored.partition, offset=stored.offset)
            return
        self.seen[found.checkpoint.digest] = (found.checkpoint.number, found.checkpoint.previous)
        self._cover(found)

    @property
    def unexplained(self) -> dict[tuple[str, int], str]:
        """What must be in the log, and is neither in this part of it nor in a checkpoint of it.

        Heads of the key store; what chains go on from that the last checkpoint does not know: a process that has
        opened nothing for long, or entries that were taken out.
        """
        wanted = self.chains.wanted
        while self.chains.before:
            wanted.setdefault(*self.chains.before.popitem())
        for writer, seq in [place for place in wanted if place[1] <= self._covered.get(place[0], 0)]:
            del wanted[writer, seq]
        return wanted

    def explain(self, stored: Stored) -> None:
        """Look at an entry of before the last checkpoint, for the sake of what is unexplained."""
        entry = entry_of(stored.value)
        if entry is None:
            return
        place = (entry.writer, entry.seq)
        if self.chains.wanted.get(place) == sha256(stored.value).hexdigest():
            del self.chains.wanted[place]

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing new but checkpoints, and nothing wrong."""
        return self._only_checkpoints and not self.chains.findings.count and not self.unexplained

    def finish(self, now_s: int) -> list[Checkpoint]:
        """Return the checkpoints to be written, in order; the last covers everything."""
        self.chains.finish()
        findings = self.chains.findings
        heads = self.chains.heads()
        named = {digest for _, previous in self.seen.values() for digest in previous}
        previous = tuple(sorted(self.seen.keys() - named))
        number = max((number for number, _ in self.seen.values()), default=0)
        if not previous and self._last is not None:  # it is seen, unless the log was cut right behind it
            previous, number = (self._last.checkpoint.digest,), self._last.checkpoint.number
        made: list[Checkpoint] = []
        parts = [heads[at : at + MAX_HEADS] for at in range(0, len(heads), MAX_HEADS)] or [[]]
        for part in parts:
            whole = part is parts[-1]
            number += 1
            body = Body(
                v=1,
                number=number,
                at=instant(now_s),
                store=self._store_id,
                previous=previous,
                since=tuple(self.since),
                upto=tuple(self._ends if whole else self.since),
                entries=self.chains.entries if whole else 0,
                heads=tuple(part),
                findings=tuple(findings.kept[:NOTED]) if whole else (),
                more_findings=max(0, findings.count - NOTED) if whole else 0,
            )
            made.append(Checkpoint(body, sign(self._key, CHECKPOINT, encode(body))))
            previous = (body.digest,)
        return made


# --- the report --------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """A report that was made: folder, window, the fingerprint of its key, entries in it, and what is wrong, by kind."""

    folder: Path
    window: tuple[str, str]
    key: str
    entries: int
    exceptions: dict[str, int]


async def report(
    office: Office, from_s: int, to_s: int, folder: Path, advance: Callable[[int], None] = lambda _: None
) -> Report:
    """Write the evidence of a window, Unix s with the end excluded, into a new folder (0700), and return what it is.

    A window that is not over ends with this second. The folder is there whole or not at all. Blocks; reads the audit
    stream of the window, and as much again to find its beginning. `advance` is told of entries. Raises InputInvalid
    if the folder is there or the window is empty.
    """
    deployment, now_s = office.deployment, int(time.time())
    to_s = min(to_s, now_s + 1)
    if from_s >= to_s:
        raise InputInvalid("--from must be before --to, and before now")
    _refuse_existing(folder)
    window = (instant(from_s), instant(to_s))
    await office.auditor.write("evidence", role=OFFICER, **{"from": window[0], "to": window[1]})
    if to_s > now_s:  # what is said of a second is said when it is over
        await asyncio.sleep(min(1.0, max(0.0, to_s - time.time())))
        now_s = to_s
    part = await _part(deployment, from_s, to_s, now_s)
    with _new_folder(folder) as inside:
        made = await _Maker(office, inside, window, now_s).write(part, advance)
    return made._replace(folder=folder)


class _Part(NamedTuple):
    """The part of the log that a report is about: from `begin` to `end`, with its checkpoints, oldest first."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    checkpoints: list[Checkpoint]


class _Seen(NamedTuple):
    number: int
    at: str
    previous: tuple[str, ...]
    since: tuple[int, ...]
    upto: tuple[int, ...]
    place: tuple[int, int]
    digest: str


async def _part(deployment: Deployment, from_s: int, to_s: int, now_s: int) -> _Part:
    """Return the part of the log between the checkpoint before the one before a window and the first one after it.

    That one is made if the window reaches to now, or nobody has made one since its end.
    """
    log = deployment.log
    last: str | None = None
    if to_s + SLACK_S >= now_s:
        last = (await checkpoint(deployment)).checkpoint.digest
    key = (await signing_key(deployment.store)).public_key()
    for margin_s in _MARGINS_S:
        seen = await _checkpoints(log, key, from_s, None if last else to_s, margin_s)
        end = last or _first_after(seen, instant(to_s + SLACK_S))
        if end is None:
            if margin_s is not None:
                continue
            last = end = (await checkpoint(deployment)).checkpoint.digest
            seen = await _checkpoints(log, key, from_s, None, None)
        if end not in seen:
            raise LogUnusable(_GONE, stream=STREAM)
        line = _ancestors(seen, end)
        start = _start(line, instant(from_s))
        if start is None and margin_s is not None:
            continue
        return await _bounded(log, seen[end], line, start)
    raise AssertionError("the last margin has no bound")


def _first_after(seen: dict[str, _Seen], at: str) -> str | None:
    """Return the oldest checkpoint that was made at an instant or later."""
    later = [(one.at, digest) for digest, one in seen.items() if one.at >= at]
    return min(later)[1] if later else None


def _ancestors(seen: dict[str, _Seen], end: str) -> list[_Seen]:
    """Return a checkpoint and all that it goes back to, as far as they were seen, oldest first."""
    found, todo = set[str](), [end]
    while todo:
        digest = todo.pop()
        if digest in seen and digest not in found:
            found.add(digest)
            todo += seen[digest].previous
    return sorted((seen[digest] for digest in found), key=lambda one: (one.number, one.at, one.upto))


def _start(line: list[_Seen], from_at: str) -> _Seen | None:
    """Return where a report begins: the newest checkpoint before all that the base, and each one after it, covers.

    The base is the last one before the window: what it covers is in the report whole, for clocks may be apart. None:
    there is none.
    """
    before = list(takewhile(lambda one: one.at < from_at, line))
    if not before:
        return None
    floor = list(map(min, zip(*(one.since for one in line[len(before) - 1 :]), strict=True)))
    for one in reversed(before[:-1]):
        if one.since != one.upto and all(map(int.__le__, one.upto, floor)):  # not one of the parts that many heads make
            return one
    return None


async def _bounded(log: Log, end: _Seen, line: list[_Seen], start: _Seen | None) -> _Part:
    """Return the part that ends with a checkpoint and begins with another; None: with the log."""
    begins = await log.begin_offsets(STREAM)
    upto = begins if start is None else start.upto
    begin = tuple(min(max(pair), last) for *pair, last in zip(begins, upto, end.upto, strict=True))
    chosen = [await _again(log, one) for one in line if start is None or one.number >= start.number]
    return _Part(begin, end.upto, chosen)


async def _again(log: Log, seen: _Seen) -> Checkpoint:
    """Return a checkpoint that was seen: of all that are looked at, few are kept. Raises LogUnusable if it is gone."""
    stored = await log.read(STREAM, *seen.place, 1)
    found = _checkpoint_in(stored[0]) if stored else None
    if found is None or found.checkpoint.digest != seen.digest:
        raise LogUnusable(_GONE, stream=STREAM)
    return found


async def _checkpoints(
    log: Log, key: Ed25519PublicKey, from_s: int, to_s: int | None, margin_s: int | None
) -> dict[str, _Seen]:
    """Return the checkpoints that lie in a window and as much around it, by digest; `to_s` None: to the end."""
    begins, ends = await log.begin_offsets(STREAM), await log.stable_offsets(STREAM)
    if margin_s is not None:
        pairs = list(enumerate(zip(begins, ends, strict=True)))
        begins = [await _at(log, partition, *pair, from_s - margin_s) for partition, pair in pairs]
        if to_s is not None:
            ends = [await _at(log, partition, *pair, to_s + margin_s) for partition, pair in pairs]
    seen: dict[str, _Seen] = {}
    async for stored in _entries(log, begins, ends):
        found = _checkpoint_in(stored)
        if found is not None and verifies(key, found):
            body = found.checkpoint
            place = (stored.partition, stored.offset)
            seen[body.digest] = _Seen(body.number, body.at, body.previous, body.since, body.upto, place, body.digest)
    return seen


async def _at(log: Log, partition: int, begin: int, end: int, at_s: int) -> int:
    """Return an offset of a partition before which all was written before an instant, found by halving."""
    while begin < end:
        middle = (begin + end) // 2
        found = await log.read(STREAM, partition, middle, 1)
        if found and found[0].timestamp_ms < at_s * 1000:
            begin = middle + 1
        else:
            end = middle
    return begin


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise InputInvalid("the folder of the report is there already; name another with --out")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder (0700) that is there under its name only when all that is in it was written."""
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        aside.mkdir(mode=0o700)
    except OSError as error:
        raise InputInvalid(f"the folder of the report cannot be made: {error.strerror}") from None
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError as error:  # two at once: the first one stays
            _refuse_existing(folder)
            raise InputInvalid(f"the folder of the report cannot be named: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class _Maker:
    """Writes the files of one report."""

    def __init__(self, office: Office, folder: Path, window: tuple[str, str], now_s: int) -> None:
        self._deployment = office.deployment
        self._folder, self._window, self._now_s = folder, window, now_s
        self._sums: dict[str, FileSum] = {}
        self._wrong: dict[str, list[Any]] = {}

    @contextmanager
    def _file(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """Write a new file (0600) and keep its sum."""
        digest, size = sha256(), 0
        handle = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:

            def write(content: bytes) -> None:
                nonlocal size
                file.write(content)
                digest.update(content)
                size += len(content)

            yield write
        self._sums[name] = FileSum(size, digest.hexdigest())

    def _json(self, name: str, value: object) -> None:
        with self._file(name) as write:
            write(encode(value) + b"\n")

    async def write(self, part: _Part, advance: Callable[[int], None]) -> Report:
        """Write everything, the manifest last."""
        store = self._deployment.store
        key = await signing_key(store)
        with self._file(KEY) as write:
            write(public_pem(key.public_key()))
        bodies = self._checkpoints(part)
        tally, entries = await self._entries(part, bodies, advance)
        summary = tally.summary()
        self._json(REVEALS, summary)
        policy = self._policies(summary["policies"])
        keys = self._keys(store)
        requests, holds = self._requests(store), self._holds(store)
        self._json(EXCEPTIONS, self._wrong)
        shown = {
            "window": self._window, "made_at": instant(self._now_s), "store": store.store_id,
            "key": fingerprint(key.public_key()), "entries": entries, "checkpoints": len(bodies), "policy": policy,
            "summary": summary, "keys": keys, "requests": requests, "holds": holds, "exceptions": self._wrong,
        }  # fmt: skip
        with self._file(PAGE) as write:
            write(page(shown).encode())
        manifest = Manifest(
            v=1,
            store=store.store_id,
            from_=self._window[0],
            to=self._window[1],
            made_at=instant(self._now_s),
            begin=part.begin,
            end=part.end,
            key=fingerprint(key.public_key()),
            files=dict(self._sums),
        )
        self._json(MANIFEST, Signed(manifest, sign(key, "report", encode(manifest))))
        counts = {kind: len(found) for kind, found in self._wrong.items() if found}
        return Report(self._folder, self._window, fingerprint(key.public_key()), entries, counts)

    def _checkpoints(self, part: _Part) -> list[Body]:
        """Write the checkpoints, and the last one once more, for whoever keeps it."""
        with self._file(CHECKPOINTS) as write:
            for one in part.checkpoints:
                write(encode(one) + b"\n")
        self._json(LAST, part.checkpoints[-1])
        bodies = [one.checkpoint for one in part.checkpoints]
        self._wrong["found_by_checkpoints"] = [
            {"at": body.at, "number": body.number, **msgspec.to_builtins(finding)}
            for body in bodies
            for finding in body.findings
        ]
        return bodies

    async def _entries(self, part: _Part, bodies: list[Body], advance: Callable[[int], None]) -> tuple[Tally, int]:
        """Write the entries, and of them the destructions and retention runs of the window."""
        said = expected(bodies, part.begin)
        chains = Chains(part.begin, said.wanted, said.known, said.covering)
        with self._file(AUDIT) as write, self._file(DESTRUCTIONS) as gone, self._file(RETENTION) as runs:
            tally = Tally(*self._window, gone, runs)
            async for stored in _entries(self._deployment.log, part.begin, part.end, advance):
                write(audit_line(stored.partition, stored.offset, stored.value))
                entry = chains.add(stored.partition, stored.offset, stored.value)
                if entry is not None:
                    tally.add(stored.partition, stored.offset, entry, stored.value)
        chains.finish(said.listed)
        self._wrong["chains"] = list(map(msgspec.to_builtins, chains.findings.kept))
        if more := chains.findings.count - len(chains.findings.kept):
            self._wrong["chains"].append({"code": "more", "count": more})
        return tally, chains.entries

    def _policies(self, seen: dict[str, int]) -> dict[str, Any]:
        """Write the policy in force, and which policies the entries of the window were written under."""
        config = self._deployment.config
        pack = config.policy_source.removeprefix("pack ")
        text = packs_available().get(pack) if config.policy_source != pack else None
        content = Path(config.policy_source).read_bytes() if text is None else text.encode()
        with self._file(POLICY) as write:
            write(content)
        policy = {
            "in_force": {"name": config.policy.name, "revision": config.policy.revision},
            "sha256": sha256(content).hexdigest(),
            "entries_by_policy": seen,
        }
        self._json(POLICIES, policy)
        return policy

    def _keys(self, store: KeyStore) -> dict[str, int]:
        """Write the inventory of epoch keys, and return how many there are by state."""
        counts: dict[str, int] = {}
        with self._file(KEYS) as write:
            for one in store.status(self._now_s):
                deadline = None if one.deadline_s is None else instant(one.deadline_s)
                line = {
                    "domain": one.domain, "owner": one.owner, "epoch": one.epoch, "versions": one.versions,
                    "deadline": deadline, "state": one.state,
                }  # fmt: skip
                write(encode(line) + b"\n")
                counts[one.state] = counts.get(one.state, 0) + 1
        self._wrong["keys_due"] = [{"count": counts["due"]}] if counts.get("due") else []
        return dict(sorted(counts.items()))

    def _requests(self, store: KeyStore) -> list[dict[str, Any]]:
        """Write the requests that were open in the window, with their clocks (CAL-4)."""
        found = [
            _request(one, self._now_s)
            for one in store.ledger.requests(closed=True)
            if instant(one.received_s) < self._window[1]
            and (one.closed_s is None or instant(one.closed_s) >= self._window[0])
        ]
        self._json(REQUESTS, found)
        self._wrong["requests_overdue"] = [{"id": one["id"], "due": one["due"]} for one in found if one["overdue"]]
        self._wrong["requests_refused"] = [
            {"id": one["id"], "outcome": one["outcome"]} for one in found if str(one["outcome"]).startswith("refused")
        ]
        return found

    def _holds(self, store: KeyStore) -> list[dict[str, Any]]:
        """Write the holds and restrictions that were in force in the window, by id and case (INF-7)."""
        marks = [*store.ledger.marks("hold", ended=True), *store.ledger.marks("restriction", ended=True)]
        found = [
            _mark(one)
            for one in marks
            if instant(one.at_s) < self._window[1] and (one.ended_s is None or instant(one.ended_s) >= self._window[0])
        ]
        self._json(HOLDS, found)
        return found


def _instant(at_s: int | None) -> str | None:
    return None if at_s is None else instant(at_s)


def _request(one: Request, now_s: int) -> dict[str, Any]:
    end_s = now_s if one.closed_s is None else one.closed_s
    return {
        "id": one.id, "kind": one.kind, "owner": one.owner, "case": one.reason, "received": instant(one.received_s),
        "notice_due": instant(one.notice_due_s), "due": instant(one.due_s), "closed": _instant(one.closed_s),
        "outcome": one.outcome, "notified": {name: _instant(at_s) for name, at_s in sorted(one.notify.items())},
        "overdue": end_s > one.due_s
        or any((now_s if at_s is None else at_s) > one.notice_due_s for at_s in one.notify.values()),
    }  # fmt: skip


def _mark(one: Mark) -> dict[str, Any]:
    return {
        "id": one.id, "kind": one.kind, "owner": one.owner, "case": one.reason, "made": instant(one.at_s),
        "from": _instant(one.from_s), "to": _instant(one.to_s),
        "ended": _instant(one.ended_s),
    }  # fmt: skip
