"""The audit stream of a SQLite log, and evidence reports, changed by hand as somebody could who owns the files."""

import contextlib
import sqlite3
from hashlib import sha256
from pathlib import Path

import msgspec
import orjson

from processors.evidence import (
    CHECKPOINT,
    NO_ENTRY,
    Body,
    Checkpoint,
    Tally,
    encode,
    entry_of,
    fingerprint,
    sign,
)
from schemas.outbound import Message
from streams.log.sqlite import _body, _messages
from streams.officer.evidence import public_pem, signing_key
from streams.officer.verify import (
    AUDIT,
    CHECKPOINTS,
    DESTRUCTIONS,
    FILES,
    KEY,
    LAST,
    MANIFEST,
    REPORT,
    RETENTION,
    REVEALS,
    FileSum,
    Manifest,
    Signed,
    audit_line,
)

STORE = "5" * 32


def edit_audit(place, change) -> None:
    """Have `change` (values of a partition → values that are there instead) made to every partition of `audit`."""
    with contextlib.closing(sqlite3.connect(place.log_path)) as db, db:
        found = db.execute("SELECT DISTINCT partition FROM rows WHERE stream='audit'").fetchall()
        for (partition,) in found:
            rows = db.execute(
                "SELECT body FROM rows WHERE stream='audit' AND partition=? ORDER BY next_offset", (partition,)
            ).fetchall()
            messages = [one for (body,) in rows for one in _messages(body)]
            values = change([one.value for one in messages])
            first = messages[0]
            kept = [Message(first.timestamp_ms, None, first.headers, value) for value in values]
            db.execute("DELETE FROM rows WHERE stream='audit' AND partition=?", (partition,))
            for at, message in enumerate(kept, 1):
                body = _body([message], clear=False)
                db.execute("INSERT INTO rows VALUES ('audit', ?, ?, 1, ?)", (partition, at, body))
            db.execute("UPDATE ends SET next_offset=? WHERE stream='audit' AND partition=?", (len(kept), partition))


def cut_partition(place) -> None:
    """Take everything out of the partition of `audit` in which the newest checkpoint lies."""
    with contextlib.closing(sqlite3.connect(place.log_path)) as db, db:
        rows = db.execute("SELECT partition, body FROM rows WHERE stream='audit' ORDER BY next_offset").fetchall()
        last = [p for p, body in rows for one in _messages(body) if b'"action":"checkpoint"' in one.value][-1]
        db.execute("DELETE FROM rows WHERE stream='audit' AND partition=?", (last,))
        db.execute("UPDATE ends SET next_offset=0 WHERE stream='audit' AND partition=?", (last,))


class Forger:
    """Makes or changes files of an evidence report and signs them: what somebody can do who has the key store."""

    def __init__(self, key) -> None:
        self._key = key

    @classmethod
    async def of(cls, deployment) -> "Forger":
        return cls(await signing_key(deployment.store))

    def write(self, folder: Path, name: str, content: bytes) -> None:
        """Have a file hold this, and the manifest list it so, signed."""
        (folder / name).write_bytes(content)
        signed = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Signed)
        files = signed.manifest.files | {name: FileSum(len(content), sha256(content).hexdigest())}
        self.say(folder, files=files)

    def say(self, folder: Path, **fields) -> None:
        """Have the manifest say this, signed."""
        signed = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Signed)
        self._sign(folder, msgspec.structs.replace(signed.manifest, **fields))

    def _sign(self, folder: Path, manifest: Manifest) -> None:
        (folder / MANIFEST).write_bytes(encode(Signed(manifest, sign(self._key, REPORT, encode(manifest)))) + b"\n")

    def checkpoint(self, number, at, previous, since, upto, entries, heads) -> Checkpoint:
        """Return a checkpoint of one partition, as the deployment would have signed it."""
        body = Body(
            v=1, number=number, at=at, store=STORE, previous=tuple(one.checkpoint.digest for one in previous),
            since=(since,), upto=(upto,), entries=entries, heads=tuple(sorted(heads)), findings=(),
        )  # fmt: skip
        return Checkpoint(body, sign(self._key, CHECKPOINT, encode(body)))

    def report(self, folder: Path, window, begin: int, values, checkpoints) -> Path:
        """Make a folder with the report of one partition: these entries from `begin` on, these checkpoints."""
        folder.mkdir()
        said = {DESTRUCTIONS: b"", RETENTION: b""}
        tally = Tally(*window, lambda _: None, lambda _: None)
        lines = []
        for offset, value in enumerate(values, begin):
            lines.append(audit_line(0, offset, value))
            tally.add(0, offset, entry_of(value), value)
        said[AUDIT] = b"".join(lines)
        said[CHECKPOINTS] = b"".join(encode(one) + b"\n" for one in checkpoints)
        said[LAST] = encode(checkpoints[-1]) + b"\n"
        said[REVEALS] = encode(tally.summary()) + b"\n"
        said[KEY] = public_pem(self._key.public_key())
        files = {}
        for name in FILES:
            content = said.get(name, b"{}\n")
            (folder / name).write_bytes(content)
            files[name] = FileSum(len(content), sha256(content).hexdigest())
        last = checkpoints[-1].checkpoint
        self._sign(
            folder,
            Manifest(
                v=1, store=STORE, from_=window[0], to=window[1], made_at=max(window[1], last.at), begin=(begin,),
                end=last.upto, key=fingerprint(self._key.public_key()), files=files,
            ),
        )  # fmt: skip
        return folder


class Writer:
    """Writes the entries of one chain into a list that stands for a partition."""

    def __init__(self, name: str) -> None:
        self.name = sha256(name.encode()).hexdigest()[:32]
        self.seq, self.digest = 0, NO_ENTRY

    def write(self, log: list[bytes], at: str, action: str = "reveal", **fields) -> None:
        """Write the next entry."""
        self.seq += 1
        entry = {"v": 1, "at": at, "action": action, "principal": "ana", "role": "dpo", "reason": "CASE-1"}
        log.append(orjson.dumps(entry | fields | {"writer": self.name, "seq": self.seq, "prev": self.digest}))
        self.digest = sha256(log[-1]).hexdigest()

    def note(self, log: list[bytes], made: Checkpoint) -> None:
        """Write a checkpoint's entry."""
        text = orjson.Fragment(encode(made.checkpoint))
        self.write(log, made.checkpoint.at, CHECKPOINT, checkpoint=text, signature=made.signature)

    @property
    def head(self) -> tuple[str, int, str]:
        """The head of the chain."""
        return self.name, self.seq, self.digest
