"""Writes the `audit` stream: who did what, when and why, one hash chain per writer.

Rules of this file:
- An entry is durable when `write` returns. Whoever opens or destroys something writes first; if that raises, nothing
  is opened or destroyed.
- People stand in it by sid only, reasons by code or case reference. Whatever destroys something names it:
  `destroyed={"sids": […], "epochs": ["DOMAIN/OWNER/EPOCH", …]}`.
- A writer is one `Auditor`: a random id, its entries counted from 1, each with the SHA-256 of the one before. The log
  comes first, then the head in the key store: a head behind the log is a process that was killed in between; a log
  behind its head has lost something.
- An append that failed may have been written all the same (Kafka: the answer was lost). Nobody can tell, so its number
  is never used again: the chain ends there, with one entry more or not, and a new one begins, whose first entry says
  after which entry, the last that is known to be durable (`after`).
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import orjson

from processors.evidence import NO_ENTRY
from processors.plan import Planner
from processors.retention import instant
from schemas.catalog import partition_for
from schemas.outbound import Message, Output
from streams.keys.ledger import Head, Ledger
from streams.log.protocol import Log


class Auditor:
    """Writes audit entries as one principal; may be shared by the tasks of one event loop. Blocks on log and ledger."""

    def __init__(
        self,
        log: Log,
        ledger: Ledger,
        planner: Planner,
        principal: str,
        clock: Callable[[], float] = time.time,
        *,
        sequence: Callable[[], int] = lambda: 0,
    ) -> None:
        """Take where to write, and whose name stands in every entry. Nothing is written yet.

        `sequence` returns the destruction sequence of the key store: each entry has it as it was before, so that
        whoever reads the stream can tell whether it goes as far as the last destruction (`keys reconcile`).
        """
        self._log = log
        self._sequence = sequence
        self._ledger = ledger
        self._planner = planner
        self._principal = principal
        self._clock = clock
        self._turn = asyncio.Lock()
        self._after: dict[str, str | int] | None = None
        self._begin()

    def _begin(self) -> None:
        """Start a chain."""
        self._writer = secrets.token_hex(16)
        self._seq, self._digest = 0, NO_ENTRY

    async def write(self, action: str, *, role: str | None = None, reason: str | None = None, **fields: Any) -> None:
        """Append one entry to `audit`, durable on return, with `fields` beside who, when and why (CAL-10, INF-13).

        Raises whatever keeps the entry, or the head of its chain, from being written: then do not go on.
        """
        async with self._turn:
            now_s = int(self._clock())
            template = self._planner.output("audit", "", now_s)
            seq = self._seq + 1
            entry = {
                "v": 1,
                "at": instant(now_s),
                "action": action,
                "principal": self._principal,
                "role": role,
                "reason": reason,
                "sequence": self._sequence(),
                **fields,
                "writer": self._writer,
                "seq": seq,
                "prev": self._digest,
                **({"after": self._after} if self._after is not None and seq == 1 else {}),
                "privacy": orjson.Fragment(template.privacy),
            }
            value = orjson.dumps(entry)
            partition = partition_for(self._principal.encode(), self._log.partitions)
            message = Message(now_s * 1000, None, template.headers, value)
            try:
                await self._log.append([Output("audit", partition, [message])])
            except BaseException:  # a cancelled append may have been written too
                if self._seq:
                    self._after = {"writer": self._writer, "seq": self._seq}
                self._begin()
                raise
            self._seq, self._digest = seq, sha256(value).hexdigest()
            self._ledger.put_head(Head(self._writer, seq, self._digest, now_s))
