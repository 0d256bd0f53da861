"""What the audit stream must look like, and what is signed of it: chains of entries, checkpoints, what they add up to.

Rules of this file:
- Pure: bytes in, findings out. What writes checkpoints, what makes a report and what checks one share it.
- It reads what an attacker may have written: whatever the bytes, there is a finding or a value, no other exception.
- An entry counts as the exact bytes of its value. A chain is the entries of one writer: numbered from 1, in one
  partition, each with the SHA-256 of the one before.
- A checkpoint covers `since` to `upto` of each partition and has the head of every chain with an entry there, so that
  from then on none can be taken out, changed, put in or moved without the key. It names the checkpoints before it.
  It says how many entries it covers too: a chain that began long before has its beginning elsewhere.
- Signed bytes begin with what they are, so that no signature serves for something else.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from hashlib import sha256
from itertools import accumulate
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeGuard

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NO_ENTRY: Final = "0" * 64
"""What stands for the digest of the entry before the first."""
MAX_FINDINGS: Final = 1000
"""So many findings are kept; of more, the number is."""
MAX_WRITERS: Final = 2_000_000
"""Chains that are followed at once, about 300 bytes each; a deployment has one for every process that ever opened."""
MAX_GROUPS: Final = 10_000
MAX_CHARS: Final = 200
CHECKPOINT: Final = "checkpoint"

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Writer = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
_Signature = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{128}$")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Seq = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_CHARS)]
_Code = Annotated[str, msgspec.Meta(pattern="^[a-z_]{1,40}$")]
_Instant = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]

encode = msgspec.json.Encoder(order="sorted").encode
"""The one way to write what is signed: sorted keys, no white space."""
_MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)


class Code(StrEnum):
    """What can be wrong with a log of audit entries."""

    NOT_AN_ENTRY = "not_an_entry"
    MISSING = "missing_entry"  # one that must be there is not
    CHANGED = "changed_entry"  # its digest is not the one that the next entry, or a head, has
    OUT_OF_ORDER = "out_of_order"  # a number that was there before: moved, or written again
    ELSEWHERE = "other_partition"
    WENT_ON = "went_on"  # a chain that its writer had given up has more entries
    UNLISTED = "unlisted_entry"  # covered by a checkpoint that does not know of it
    SHORTER = "log_shorter"  # the log ends before what a checkpoint covers
    NO_CHECKPOINT = "missing_checkpoint"
    SIGNATURE = "wrong_signature"
    TOO_MANY = "too_many_writers"
    COUNT = "wrong_count"  # a checkpoint covers more or fewer entries than there are


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Something wrong, and where; it holds nothing of an entry but its place in log or chain."""

    code: _Code
    writer: _Writer | None = None
    seq: _Count | None = None
    partition: _Count | None = None
    offset: _Count | None = None
    checkpoint: _Count | None = None

    def __str__(self) -> str:
        where = ", ".join(
            f"{name} {value}" for name in self.__struct_fields__[1:] if (value := getattr(self, name)) is not None
        )
        return f"{self.code}: {where}" if where else self.code


class _After(msgspec.Struct, frozen=True):
    writer: _Writer
    seq: _Seq


class Entry(msgspec.Struct, frozen=True):
    """An audit entry. What only some actions have is of any type, and looked at where it is used."""

    v: Literal[1]
    at: _Instant
    action: _Text
    principal: str
    writer: _Writer
    seq: _Seq
    prev: _Digest
    role: _Text | None = None
    reason: str | None = None
    after: _After | None = None
    stream: Any = None
    records: Any = None
    denied: Any = None
    destroyed: Any = None
    days: Any = None
    privacy: Any = None
    checkpoint: msgspec.Raw = msgspec.Raw()
    signature: Any = None


_entry_decoder = msgspec.json.Decoder(Entry)


def entry_of(value: bytes) -> Entry | None:
    """Return the entry that a value is, or None."""
    try:
        return _entry_decoder.decode(value)
    except _MALFORMED:
        return None


# --- checkpoints -------------------------------------------------------------------------------------------------

Head = tuple[_Writer, _Seq, _Digest]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is signed of a checkpoint. `since` and `upto`: offsets by partition; `heads`: writer, number, digest."""

    v: Literal[1]
    number: _Seq
    at: _Instant
    store: _Text
    previous: tuple[_Digest, ...]
    since: tuple[_Count, ...]
    upto: tuple[_Count, ...]
    entries: _Count
    heads: tuple[Head, ...]
    findings: tuple[Finding, ...]
    more_findings: _Count = 0

    @property
    def digest(self) -> str:
        """What names this checkpoint: the SHA-256 of its signed text, 64 hex digits."""
        return sha256(encode(self)).hexdigest()


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint as it stands in an audit entry, in a report, and in the file that an auditor keeps."""

    checkpoint: Body
    signature: _Signature


_checkpoint_decoder = msgspec.json.Decoder(Checkpoint)


def checkpoint_of(document: bytes) -> Checkpoint | None:
    """Return the checkpoint that these bytes are, or None; a byte more or less is none. Not verified yet."""
    try:
        found = _checkpoint_decoder.decode(document)
    except _MALFORMED:
        return None
    same = len(found.checkpoint.since) == len(found.checkpoint.upto) and encode(found) == document.removesuffix(b"\n")
    return found if same else None


def checkpoint_in(entry: Entry) -> Checkpoint | None:
    """Return the checkpoint that an audit entry holds, or None. Not verified yet."""
    if entry.action != CHECKPOINT:
        return None
    try:
        body = msgspec.json.decode(bytes(entry.checkpoint), type=Body)
        return msgspec.convert({"checkpoint": msgspec.to_builtins(body), "signature": entry.signature}, Checkpoint)
    except _MALFORMED:
        return None


def _signed(kind: str, text: bytes) -> bytes:
    return b"streamveil " + kind.encode() + b" 1\0" + text


def sign(key: Ed25519PrivateKey, kind: str, text: bytes) -> str:
    """Return the Ed25519 signature of a text of this kind, 128 hex digits."""
    return key.sign(_signed(kind, text)).hex()


def is_signed(key: Ed25519PublicKey, kind: str, text: bytes, signature: str) -> bool:
    """Return whether a signature is that of the key, for a text of this kind."""
    try:
        key.verify(bytes.fromhex(signature), _signed(kind, text))
    except (InvalidSignature, ValueError):
        return False
    return True


def verifies(key: Ed25519PublicKey, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is signed by the key."""
    return is_signed(key, CHECKPOINT, encode(checkpoint.checkpoint), checkpoint.signature)


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return what a public key is known by: SHA-256 of its 32 bytes, 64 hex digits."""
    return sha256(key.public_bytes_raw()).hexdigest()


# --- chains ------------------------------------------------------------------------------------------------------


class Findings:
    """Findings, the first thousand of them, and how many there were."""

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.count = 0

    def add(self, code: Code, **where: Any) -> None:
        """Add one."""
        self.count += 1
        if len(self.kept) < MAX_FINDINGS:
            self.kept.append(Finding(code.value, **where))


class _Last(NamedTuple):
    partition: int | None  # None: known from a checkpoint
    seq: int
    digest: str


class Chains:
    """Follows the chains of a part of the log, entry by entry, in the order of each partition.

    `begin`: the offsets at which that part begins; where it is 0, every chain must begin with its first entry.
    `wanted`: (writer, number) → digest of entries that must be in it. `known`: heads of chains as they were before.
    `covering`: checkpoints of which all that they cover is in it.
    Memory: a few hundred bytes for each writer and each entry wanted.
    """

    def __init__(
        self,
        begin: Sequence[int],
        wanted: Mapping[tuple[str, int], str],
        known: Iterable[Head] = (),
        covering: Sequence[Body] = (),
    ) -> None:
        self.findings = Findings()
        self.entries = 0
        self._begin = begin
        self.wanted = dict(wanted)
        """Entries that must be in it and were not seen yet."""
        self.before: dict[tuple[str, int], str] = {}
        """Entries that must be before it, in a chain that nothing is known of: (writer, number) → digest."""
        self._counts = _Counts(covering)
        self._last = {writer: _Last(None, seq, digest) for writer, seq, digest in known}
        self._after: list[tuple[_After, str]] = []

    def add(self, partition: int, offset: int, value: bytes) -> Entry | None:
        """Follow the next value of a partition and return the entry that it is, or None."""
        self.entries += 1
        self._counts.add(partition, offset)
        where: dict[str, Any] = {"partition": partition, "offset": offset}
        entry = entry_of(value)
        if entry is None:
            self.findings.add(Code.NOT_AN_ENTRY, **where)
            return None
        where |= {"writer": entry.writer, "seq": entry.seq}
        digest = sha256(value).hexdigest()
        if self.wanted.pop((entry.writer, entry.seq), digest) != digest:
            self.findings.add(Code.CHANGED, **where)
        last = self._last.get(entry.writer)
        if last is None:
            if len(self._last) >= MAX_WRITERS:
                self.findings.add(Code.TOO_MANY, **where)
                return entry
            self._first(entry, partition, where)
        elif last.partition not in (None, partition):
            self.findings.add(Code.ELSEWHERE, **where)
        elif entry.seq <= last.seq:
            self.findings.add(Code.OUT_OF_ORDER, **where)
            return entry
        elif entry.seq > last.seq + 1:
            self.findings.add(Code.MISSING, **where | {"seq": last.seq + 1})
        elif entry.prev != last.digest:
            self.findings.add(Code.CHANGED, **where | {"seq": last.seq})
        self._last[entry.writer] = _Last(partition, entry.seq, digest)
        return entry

    def _first(self, entry: Entry, partition: int, where: dict[str, Any]) -> None:
        """Look at the first entry of a chain that there is here."""
        if entry.seq > 1:
            if partition < len(self._begin) and self._begin[partition] == 0:
                self.findings.add(Code.MISSING, **where | {"seq": 1})
            else:
                self.before[entry.writer, entry.seq - 1] = entry.prev
        elif entry.prev != NO_ENTRY:
            self.findings.add(Code.CHANGED, **where)
        if entry.seq == 1 and entry.after is not None:
            self._after.append((entry.after, entry.writer))

    def heads(self) -> list[Head]:
        """Return the last entry seen of each chain that had one here, by writer."""
        return sorted((w, last.seq, last.digest) for w, last in self._last.items() if last.partition is not None)

    def finish(self, listed: Mapping[str, int] | None = None) -> None:
        """Look at what only the end shows: chains given up that went on, entries wanted that never came, their count.

        `listed`: writer → the newest number that a checkpoint covering all this has of it.
        """
        whole = all(offset == 0 for offset in self._begin)
        for after, writer in self._after:
            last = self._last.get(after.writer)
            if last is None:
                if whole:
                    self.findings.add(Code.MISSING, writer=after.writer, seq=after.seq)
            elif last.seq < after.seq:
                self.findings.add(Code.MISSING, writer=after.writer, seq=last.seq + 1)
            elif last.seq > after.seq + 1 and after.writer != writer:
                self.findings.add(Code.WENT_ON, writer=after.writer, seq=after.seq + 2)
        for writer, seq in sorted(self.wanted):
            self.findings.add(Code.MISSING, writer=writer, seq=seq)
        for number in self._counts.wrong():
            self.findings.add(Code.COUNT, checkpoint=number)
        if listed is not None:
            for writer, seq, _ in self.heads():
                if seq > listed.get(writer, 0):
                    self.findings.add(Code.UNLISTED, writer=writer, seq=listed.get(writer, 0) + 1)


class _Counts:
    """Counts entries between the offsets at which checkpoints begin and end; memory does not grow with entries."""

    def __init__(self, bodies: Sequence[Body]) -> None:
        self._bodies = bodies
        ends = zip(*(one for body in bodies for one in (body.since, body.upto)), strict=True)
        self._bounds = [sorted(set(offsets)) for offsets in ends]
        self._counts = [[0] * (len(bounds) + 1) for bounds in self._bounds]

    def add(self, partition: int, offset: int) -> None:
        if partition < len(self._bounds):
            self._counts[partition][bisect_right(self._bounds[partition], offset)] += 1

    def wrong(self) -> Iterator[int]:
        """Yield the numbers of the checkpoints that say another count."""
        before = [list(accumulate(counts)) for counts in self._counts]
        for body in self._bodies:
            found = 0
            for partition, (since, upto) in enumerate(zip(body.since, body.upto, strict=True)):
                bounds, sums = self._bounds[partition], before[partition]
                found += sums[bisect_left(bounds, upto)] - sums[bisect_left(bounds, since)]
            if found != body.entries:
                yield body.number


class Expected(NamedTuple):
    """What checkpoints say of the part of a log that begins at `begin`; arguments of `Chains` and `Chains.finish`."""

    wanted: dict[tuple[str, int], str]
    listed: dict[str, int]
    known: tuple[Head, ...]
    covering: tuple[Body, ...]


def is_within(body: Body, begin: Sequence[int]) -> bool:
    """Return whether all that a checkpoint covers is at or behind these offsets, so that it can be looked for there."""
    return len(body.since) == len(begin) and all(map(int.__ge__, body.since, begin))


def expected(checkpoints: Iterable[Body], begin: Sequence[int]) -> Expected:
    """Return what must stand in the log from `begin` on, by all checkpoints that cover something of it."""
    wanted, listed, known = dict[tuple[str, int], str](), dict[str, int](), tuple[Head, ...]()
    covering: list[Body] = []
    for one in checkpoints:
        inside = is_within(one, begin)
        if inside:
            covering.append(one)
        for writer, seq, digest in one.heads:
            listed[writer] = max(seq, listed.get(writer, 0))
            if inside:
                wanted[writer, seq] = digest
        if one.upto == tuple(begin) and not inside:  # one that is inside has heads of what follows: a part of many
            known += one.heads
    return Expected(wanted, listed, known, tuple(covering))


# --- what they add up to -----------------------------------------------------------------------------------------


class Tally:
    """What the entries of a window, `[from, to)` as RFC 3339 UTC, add up to: the same from log and from report.

    `destroyed` and `retention` are given the lines of destructions.ndjson and retention.ndjson as they come.
    """

    def __init__(
        self, from_at: str, to_at: str, destroyed: Callable[[bytes], object], retention: Callable[[bytes], object]
    ) -> None:
        self._from, self._to = from_at, to_at
        self._destroyed, self._retention = destroyed, retention
        self.actions: Counter[str] = Counter()
        self.policies: Counter[str] = Counter()
        self._opened: dict[tuple[str, str, str], list[int]] = {}

    def add(self, partition: int, offset: int, entry: Entry, value: bytes) -> None:
        """Count an entry if it is of the window."""
        if not self._from <= entry.at < self._to:
            return
        _count(self.actions, entry.action)
        if isinstance(entry.privacy, dict) and _is_text(policy := entry.privacy.get("policy")):
            _count(self.policies, policy)
        if _is_text(entry.stream) and isinstance(entry.records, list):
            group = (entry.action, entry.role or "-", entry.stream)
            if group not in self._opened and len(self._opened) >= MAX_GROUPS:
                group = ("-", "-", "-")
            counts = self._opened.setdefault(group, [0, 0, 0])
            counts[0] += 1
            counts[1] += len(entry.records)
            counts[2] += (
                entry.denied if isinstance(entry.denied, int) and 0 <= entry.denied <= len(entry.records) else 0
            )
        if entry.destroyed is not None or entry.days is not None:
            line: dict[str, Any] = {
                "partition": partition, "offset": offset, "at": entry.at, "action": entry.action, "role": entry.role,
                "reason": entry.reason, "destroyed": entry.destroyed, "days": entry.days,
            }  # fmt: skip
            try:
                self._destroyed(encode(line) + b"\n")
            except OverflowError:  # a number that no program of ours writes
                self._destroyed(encode(line | {"destroyed": None, "days": None}) + b"\n")
        if entry.action == "retention":
            self._retention(value.replace(b"\n", b" ") + b"\n")

    def summary(self) -> dict[str, Any]:
        """Return what reveals.json says: entries by action, and what was asked to be opened by role and stream."""
        return {
            "actions": dict(sorted(self.actions.items())),
            "policies": dict(sorted(self.policies.items())),
            "reveals": [
                {"action": action, "role": role, "stream": stream, "entries": n, "records": records, "denied": denied}
                for (action, role, stream), (n, records, denied) in sorted(self._opened.items())
            ],
        }


def _is_text(value: object) -> TypeGuard[str]:
    """Return whether a value is a text of at most 200 characters."""
    return isinstance(value, str) and len(value) <= MAX_CHARS


def _count(counter: Counter[str], name: str) -> None:
    counter[name if name in counter or len(counter) < MAX_GROUPS else "-"] += 1
