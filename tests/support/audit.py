"""The audit stream of a SQLite log, and evidence reports, changed by hand as somebody could who owns the files."""

import contextlib
import sqlite3
from hashlib import sha256
from pathlib import Path

import msgspec

from processors.evidence import encode, sign
from schemas.outbound import Message
from streams.log.sqlite import _body, _messages
from streams.officer.evidence import signing_key
from streams.officer.verify import MANIFEST, REPORT, FileSum, Signed


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


class Forger:
    """Changes files of an evidence report and signs it anew: what somebody can do who has the key store."""

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
        manifest = msgspec.structs.replace(signed.manifest, files=files)
        anew = Signed(manifest, sign(self._key, REPORT, encode(manifest)))
        (folder / MANIFEST).write_bytes(encode(anew) + b"\n")
