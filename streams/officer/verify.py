"""Checks an evidence report as an outside auditor would: from its folder and a public key, nothing else (CAL-13).

Rules of this file:
- Offline: no configuration, no key store, no log. What it needs to know of a report is in `processors.evidence`.
- The folder may be anybody's: whatever the bytes, a check fails with its findings, or one clear error is raised.
  Files are read line by line, and no line, no file that is read whole, and no list grows without a bound.
- What is not listed in the signed manifest is not there; what is listed and is not needed is a finding too.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, BinaryIO, Final, Literal, NamedTuple

import msgspec
import pybase64
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from processors.evidence import (
    Body,
    Chains,
    Tally,
    checkpoint_of,
    encode,
    entry_of,
    expected,
    fingerprint,
    is_signed,
    is_within,
    verifies,
)
from schemas.errors import InputInvalid

MANIFEST: Final = "manifest.json"
KEY: Final = "key.pem"
AUDIT: Final = "audit.ndjson"
CHECKPOINTS: Final = "checkpoints.ndjson"
LAST: Final = "checkpoint.json"
POLICY: Final = "policy.toml"
POLICIES: Final = "policies.json"
KEYS: Final = "keys.ndjson"
DESTRUCTIONS: Final = "destructions.ndjson"
RETENTION: Final = "retention.ndjson"
REVEALS: Final = "reveals.json"
REQUESTS: Final = "requests.json"
HOLDS: Final = "holds.json"
EXCEPTIONS: Final = "exceptions.json"
PAGE: Final = "report.html"
FILES: Final = (
    KEY, LAST, CHECKPOINTS, AUDIT, POLICY, POLICIES, KEYS, DESTRUCTIONS, RETENTION, REVEALS, REQUESTS, HOLDS,
    EXCEPTIONS, PAGE,
)  # fmt: skip
"""The files of a report beside its manifest, each with a SHA-256 in there."""

REPORT: Final = "report"
MAX_SMALL_BYTES: Final = 4_000_000
"""Of a file that is read whole."""
MAX_LINE_BYTES: Final = 16_000_000
MAX_HEADS: Final = 5_000_000
"""Heads in all checkpoints of a report; a year of a busy deployment has a tenth of that."""
SHOWN: Final = 20
"""Findings of one check that are shown; of more, the number is."""
_CHUNK_BYTES = 1 << 20

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Instant = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
_ENTRY = re.compile(rb'\{"partition":([0-9]{1,4}),"offset":([0-9]{1,16}),"entry":([^\n]*)\}\n')
_OTHER = re.compile(rb'\{"partition":([0-9]{1,4}),"offset":([0-9]{1,16}),"base64":"([A-Za-z0-9+/=]*)"\}\n')


class FileSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the manifest says of a file: size in bytes, SHA-256."""

    bytes: _Count
    sha256: _Digest


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """What is signed of a report. `begin`, `end`: offsets of the audit stream, by partition, between which it is."""

    v: Literal[1]
    store: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z_-]{1,64}$")]
    from_: _Instant
    to: _Instant
    made_at: _Instant
    begin: tuple[_Count, ...]
    end: tuple[_Count, ...]
    key: _Digest
    files: dict[str, FileSum]


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest with its signature: manifest.json."""

    manifest: Manifest
    signature: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{128}$")]


class Check(NamedTuple):
    """One check: what it says, what is wrong (nothing: passed), and with the first one what the report is about."""

    what: str
    findings: tuple[str, ...] = ()
    about: Mapping[str, str] = MappingProxyType({})

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


class _Wrong:
    """Collects what is wrong, the first of it, and how much there was."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, text: object) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(str(text))

    def check(self, what: str) -> Check:
        more = self.count - len(self.shown)
        return Check(what, tuple(self.shown + ([f"and {more} more"] if more else [])))


# --- lines of audit.ndjson ---------------------------------------------------------------------------------------


def audit_line(partition: int, offset: int, value: bytes) -> bytes:
    """Return the line of a value: an entry's bytes as they are, anything else as base64."""
    if b"\n" not in value and entry_of(value) is not None:
        return b'{"partition":%d,"offset":%d,"entry":%b}\n' % (partition, offset, value)
    return b'{"partition":%d,"offset":%d,"base64":"%b"}\n' % (partition, offset, pybase64.b64encode(value))


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, each with its end. Raises InputInvalid for one of more than 16 MB."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise InputInvalid("a line of this file is longer than any that a report has")
        yield line


def _value_of(line: bytes) -> tuple[int, int, bytes] | None:
    """Return partition, offset and value of a line, or None if it is not as `audit_line` writes it."""
    found = _ENTRY.fullmatch(line)
    if found is not None:
        value = found[3]
    else:
        found = _OTHER.fullmatch(line)
        if found is None:
            return None
        try:
            value = pybase64.b64decode(found[3], validate=True)
        except ValueError:
            return None
    partition, offset = int(found[1]), int(found[2])
    return (partition, offset, value) if audit_line(partition, offset, value) == line else None


# --- reading -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file. Raises InputInvalid for anything else."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputInvalid(f"{path.name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputInvalid(f"{path.name} is no plain file")
    with os.fdopen(handle, "rb") as file:
        yield file


def _small(path: Path) -> bytes:
    """Return what a small file holds. Raises InputInvalid."""
    with _opened(path) as file:
        content = file.read(MAX_SMALL_BYTES + 1)
    if len(content) > MAX_SMALL_BYTES:
        raise InputInvalid(f"{path.name} is bigger than it can be")
    return content


def _public_key(path: Path) -> Ed25519PublicKey:
    """Return the public key of a PEM file. Raises InputInvalid."""
    try:
        key = load_pem_public_key(_small(path))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputInvalid(f"{path.name} is no Ed25519 public key in PEM")
    return key


# --- the checks --------------------------------------------------------------------------------------------------


def verify(folder: Path, key_path: Path | None = None, after_path: Path | None = None) -> list[Check]:
    """Return the checks of a report's folder, passed and failed, in order; the first names window and key.

    `key_path`: the public key as the auditor got it; without it the report's own is taken, which proves only that the
    folder is as whoever made it left it. `after_path`: the checkpoint.json of an earlier report: this one must go on
    from there. Reads files, offline; memory does not grow with the number of entries, but by some hundred bytes
    with that of writers. Raises InputInvalid if there is no manifest or key to begin with.
    """
    if not folder.is_dir():
        raise InputInvalid("FOLDER is no folder of an evidence report")
    key = _public_key(key_path or folder / KEY)
    text = _small(folder / MANIFEST)
    try:
        signed = msgspec.json.decode(text, type=Signed)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise InputInvalid(f"{MANIFEST} is not the manifest of an evidence report") from None
    report = _Report(folder, key, signed.manifest)
    checks = [report.signature(text, signed, given=key_path is not None), report.files()]
    for part in (report.checkpoints, report.entries):
        try:
            checks += part()
        except InputInvalid as error:  # a file that is not there, or no line ends
            checks.append(Check("the rest of the report can be read", (str(error),)))
    if after_path is not None:
        checks.append(report.after(_small(after_path)))
    return checks


class _Report:
    """A report's folder, its manifest and the key that it should be signed with."""

    def __init__(self, folder: Path, key: Ed25519PublicKey, manifest: Manifest) -> None:
        self._folder, self._key, self._manifest = folder, key, manifest
        self._bodies: list[Body] = []
        self._digests: set[str] = set()

    def signature(self, text: bytes, signed: Signed, *, given: bool) -> Check:
        wrong = _Wrong()
        if not is_signed(self._key, REPORT, encode(signed.manifest), signed.signature):
            wrong.add("the manifest is not signed by this key")
        if encode(signed) + b"\n" != text:
            wrong.add("the manifest is not written in the one way there is")
        if signed.manifest.key != fingerprint(self._key):
            wrong.add("the manifest names another key")
        manifest = signed.manifest
        if manifest.made_at < manifest.to:
            wrong.add("the report was made before its window was over: what happened since is not in it")
        if manifest.to <= manifest.from_:
            wrong.add("its window holds nothing")
        whose = "" if given else " (the report's own: compare it with one that you got in another way)"
        about = {"from": manifest.from_, "to": manifest.to, "made_at": manifest.made_at, "store": manifest.store}
        window = f"{manifest.from_} to {manifest.to}, made at {manifest.made_at}, of key store {manifest.store}"
        what = f"the manifest ({window}) is signed by the key {fingerprint(self._key)}{whose}"
        return wrong.check(what)._replace(about=about | {"key": fingerprint(self._key)})

    def files(self) -> Check:
        wrong = _Wrong()
        listed = self._manifest.files
        for name in sorted(set(FILES) ^ set(listed)):
            wrong.add(f"{name} is not listed" if name in FILES else "a file is listed that no report has")
        for path in self._folder.iterdir():
            if path.name != MANIFEST and path.name not in FILES:
                wrong.add("there is a file that is not listed")
        for name in FILES:
            if name not in listed:
                continue
            try:
                with _opened(self._folder / name) as file:
                    digest, size = sha256(), 0
                    while chunk := file.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        size += len(chunk)
            except InputInvalid as error:
                wrong.add(error.message)
                continue
            if (size, digest.hexdigest()) != (listed[name].bytes, listed[name].sha256):
                wrong.add(f"{name} is not the file that was signed")
        return wrong.check(f"the {len(FILES)} files are those that were signed, and there are no others")

    def checkpoints(self) -> list[Check]:
        signatures, chain, recorded = _Wrong(), _Wrong(), _Wrong()
        heads = 0
        with _opened(self._folder / CHECKPOINTS) as file:
            for number, line in enumerate(lines_of(file), 1):
                found = checkpoint_of(line) if line.endswith(b"\n") else None
                if found is None or not verifies(self._key, found):
                    signatures.add(f"line {number}: no checkpoint signed by this key")
                    continue
                heads += len(found.checkpoint.heads) + 1
                if heads > MAX_HEADS:
                    raise InputInvalid(f"{CHECKPOINTS} holds more than any report")
                self._link(found.checkpoint, number, chain, recorded)
        last = checkpoint_of(_small(self._folder / LAST))
        if last is None or not self._bodies or last.checkpoint != self._bodies[-1] or not verifies(self._key, last):
            chain.add(f"{LAST} is not the last checkpoint")
        self._ancestry(chain)
        self._bounds(chain)
        return [
            signatures.check(f"{len(self._bodies)} checkpoints are signed by the key"),
            chain.check("each checkpoint names one before it, and they cover the time of the report"),
            recorded.check("no checkpoint has found anything wrong"),
        ]

    def _link(self, body: Body, number: int, chain: _Wrong, recorded: _Wrong) -> None:
        """Look at a checkpoint beside those before it."""
        first = self._bodies[0] if self._bodies else body
        if body.store != self._manifest.store:
            chain.add(f"line {number}: of another deployment")
        if self._bodies and body.number < self._bodies[-1].number:
            chain.add(f"line {number}: out of order")
        if body.number > first.number and self._digests.isdisjoint(body.previous):
            chain.add(f"line {number}: names none of those before it")
        for finding in body.findings:
            recorded.add(f"{body.at} {finding}")
        if body.more_findings:
            recorded.add(f"{body.at} and {body.more_findings} more")
        self._bodies.append(body)
        self._digests.add(body.digest)

    def _ancestry(self, chain: _Wrong) -> None:
        """Look whether the last checkpoint goes back to each: one put beside them would say nothing of the entries."""
        named = {self._bodies[-1].digest} if self._bodies else set()
        for body in reversed(self._bodies):
            if body.digest in named:
                named.update(body.previous)
            else:
                chain.add(f"checkpoint {body.number} of {body.at}: the last one does not go back to it")

    def _bounds(self, chain: _Wrong) -> None:
        """Look at where the report begins and ends."""
        manifest = self._manifest
        if not self._bodies:
            return
        last = self._bodies[-1]
        if last.upto != manifest.end or last.at < manifest.to:
            chain.add("the last checkpoint does not cover the end of the report")
        if any(manifest.begin):
            starts = [body for body in self._bodies if body.upto == manifest.begin]
            if not any(body.at <= manifest.from_ for body in starts):
                chain.add("no checkpoint covers what was before the report")
        elif self._bodies[0].previous and not any(body.at <= manifest.from_ for body in self._bodies):
            chain.add("the first checkpoints are missing")

    def entries(self) -> list[Check]:
        manifest = self._manifest
        places, sums = _Wrong(), _Wrong()
        wanted = expected(self._bodies, manifest.begin)
        chains = Chains(manifest.begin, wanted.wanted, wanted.known, wanted.covering)
        made = {name: sha256() for name in (DESTRUCTIONS, RETENTION)}
        tally = Tally(manifest.from_, manifest.to, made[DESTRUCTIONS].update, made[RETENTION].update)
        before = (0, -1)
        with _opened(self._folder / AUDIT) as file:
            for number, line in enumerate(lines_of(file), 1):
                found = _value_of(line)
                if found is None:
                    places.add(f"line {number}: not a line that a report has")
                    continue
                partition, offset, value = found
                if (partition, offset) <= before or not self._is_inside(partition, offset):
                    places.add(f"line {number}: not in its place")
                before = (partition, offset)
                entry = chains.add(partition, offset, value)
                if entry is not None:
                    tally.add(partition, offset, entry, value)
        chains.finish(wanted.listed)
        for finding in chains.findings.kept:
            places.add(finding)
        places.count += chains.findings.count - len(chains.findings.kept)
        digests = {name: one.hexdigest() for name, one in made.items()}
        digests[REVEALS] = sha256(encode(tally.summary()) + b"\n").hexdigest()
        for name, digest in digests.items():
            if name in manifest.files and manifest.files[name].sha256 != digest:
                sums.add(f"{name} does not follow from the entries")
        return [
            places.check(
                f"{chains.entries} audit entries are complete, unchanged and in order, by chain and checkpoint"
            ),
            sums.check("what is said of reveals, destructions and retention follows from the entries"),
        ]

    def _is_inside(self, partition: int, offset: int) -> bool:
        begin, end = self._manifest.begin, self._manifest.end
        return partition < min(len(begin), len(end)) and begin[partition] <= offset < end[partition]

    def after(self, document: bytes) -> Check:
        """Look whether the report goes on from an earlier checkpoint: names it, and has all the entries it covers."""
        what = "the report goes on from the earlier checkpoint"
        found = checkpoint_of(document)
        if found is None or not verifies(self._key, found):
            return Check(what, ("the earlier file is no checkpoint signed by this key",))
        body = found.checkpoint
        if body.store != self._manifest.store:
            return Check(what, ("the earlier checkpoint is of another deployment",))
        if not self._bodies:
            return Check(what, ("the report has no checkpoints",))
        known = body.digest in self._digests
        if known and is_within(body, self._manifest.begin):  # then its heads and its count were looked for
            return Check(what)
        if known or body.number < self._bodies[0].number:
            return Check(what, (f"the report begins after what it covers; ask for a report from {body.at}",))
        if body.number > self._bodies[-1].number:
            return Check(what, ("the checkpoint is newer than this report: verify a later report with it",))
        return Check(what, ("the log does not have it any more: it was rolled back, or its past was written anew",))
