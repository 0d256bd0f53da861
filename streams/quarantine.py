"""The quarantine: what is open in it, and what becomes of it.

Rules of this file:
- A resolution is a record without sealed parts in the partition of what it resolves:
  {"action":"replayed"|"discarded","privacy":{…},"reason":R,"resolves":{"offset":O,"partition":P},"sealed":[],"v":1}
- `replay` appends the bytes to the stream they came from, then resolves. The append carries a bookmark that names
  the entry. So a run that was killed in between is seen by the next one, which only resolves: nothing is replayed
  twice, unless two processes replay the same entry at the same moment.
- Either is for whoever may open quarantine (operator, dpo), and stands in `audit` before it is done, with the places.
- What an entry holds is opened by the Revealer only, and goes nowhere but back into its stream.
"""

import binascii
import time
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import orjson

from processors.retention import instant
from schemas.catalog import INPUTS
from schemas.errors import InputInvalid, LogUnusable, RevealDenied
from schemas.fields import NO_REASON, is_reason
from schemas.outbound import Message, Output
from streams.deployment import Deployment
from streams.keys.reveal import Revealed, State
from streams.log.protocol import Bookmark, Log, Stored
from streams.publish import route

STREAM: Final = "quarantine"
_PAGE: Final = 500
_OPENED_AT_ONCE: Final = 20
"""Records may be of 2 MB and more."""
_AUDITED: Final = 1000

Action = Literal["replayed", "discarded"]


class Place(NamedTuple):
    """A stream, partition and offset."""

    stream: str
    partition: int
    offset: int


class Entry(NamedTuple):
    """A record in quarantine that is not resolved: where it lies and came from, why, and until when it opens."""

    place: Place
    source: Place
    reason: str
    expires_at: str

    def is_destroyed(self, now_s: float) -> bool:
        """Return whether its time is over, by the clock."""
        return self.expires_at <= instant(int(now_s))


async def entries(log: Log) -> list[Entry]:
    """Return what is not resolved, by partition and offset. Blocks. Raises LogUnusable for what is no such record."""
    found: dict[tuple[int, int], Entry] = {}
    ends = await log.end_offsets(STREAM)
    for partition, begin in enumerate(await log.begin_offsets(STREAM)):
        at = begin
        while at < ends[partition] and (page := await log.read(STREAM, partition, at, _PAGE, ends[partition])):
            for stored in page:
                try:
                    _fold(found, stored)
                except (ValueError, KeyError, TypeError):
                    raise LogUnusable(
                        "a record of the quarantine stream cannot be read; restore the log from a backup",
                        stream=STREAM, partition=partition, offset=stored.offset,
                    ) from None  # fmt: skip
            at = page[-1].offset + 1
    return [found[place] for place in sorted(found)]


def _fold(found: dict[tuple[int, int], Entry], stored: Stored) -> None:
    fields = orjson.loads(stored.value)
    resolved = fields.get("resolves")
    if resolved is not None:
        found.pop((resolved["partition"], resolved["offset"]), None)
        return
    found[stored.partition, stored.offset] = Entry(
        Place(STREAM, stored.partition, stored.offset),
        Place(fields["stream"], fields["partition"], fields["offset"]),
        fields["reason"],
        fields["privacy"]["expires_at"],
    )


def select(found: Sequence[Entry], place: Place) -> list[Entry]:
    """Return the entry that lies, or that came from, there. Raises InputInvalid if there is none open."""
    chosen = [entry for entry in found if place in (entry.place, entry.source)]
    if not chosen:
        raise InputInvalid("nothing open in quarantine lies, or came from, there; see quarantine list")
    return chosen


class Quarantine:
    """Replays and discards entries of one deployment, for a reason. Raises InputInvalid if that is none."""

    def __init__(self, deployment: Deployment, reason: str) -> None:
        if not is_reason(reason):
            raise InputInvalid(NO_REASON)
        self._deployment = deployment
        self._log = deployment.log
        self._reason = reason
        self._revealer = deployment.revealer()
        self._role = deployment.who().role_for(STREAM)

    async def discard(self, chosen: Sequence[Entry]) -> int:
        """Resolve entries without replaying them, durable on return, and return how many; they stay sealed.

        Blocks. Raises RevealDenied.
        """
        self._permit()
        await self._audit("discard", chosen)
        for entry in chosen:
            await self._resolve(entry, "replayed" if await self._was_replayed(entry) else "discarded")
        return len(chosen)

    async def replay(self, chosen: Sequence[Entry]) -> dict[State, int]:
        """Send entries back to the streams they came from, durable on return; return how many by what came of them.

        What does not open stays as it is. Blocks. Raises RevealDenied.
        """
        self._permit()
        counts: dict[State, int] = {}
        for at in range(0, len(chosen), _OPENED_AT_ONCE):
            few = chosen[at : at + _OPENED_AT_ONCE]
            opened = await self._revealer.reveal([await self._read(entry) for entry in few], self._reason)
            revealed = [one for one, result in zip(few, opened, strict=True) if result.state is State.REVEALED]
            await self._audit("replay", revealed)
            for entry, result in zip(few, opened, strict=True):
                if result.state is State.REVEALED:
                    await self._send_back(entry, _bytes(result))
                    await self._resolve(entry, "replayed")
                counts[result.state] = counts.get(result.state, 0) + 1
        return counts

    def _permit(self) -> None:
        """Return if this process may resolve what is in quarantine. Raises RevealDenied."""
        if self._role is None:
            raise RevealDenied(
                "only an operator or the privacy officer may resolve what is in quarantine; ask for a grant in the"
                " roles file",
                stream=STREAM,
            )

    async def _audit(self, action: str, these: Sequence[Entry]) -> None:
        """Write what is about to be done, durable on return: at most `_AUDITED` places in one entry."""
        for at in range(0, len(these), _AUDITED):
            few = these[at : at + _AUDITED]
            await self._deployment.auditor().write(
                action,
                role=self._role,
                reason=self._reason,
                stream=STREAM,
                count=len(few),
                records=[[one.place.partition, one.place.offset] for one in few],
            )

    async def _read(self, entry: Entry) -> Stored:
        for stored in await self._log.read(STREAM, entry.place.partition, entry.place.offset, 1):
            if stored.offset == entry.place.offset:
                return stored
        raise InputInvalid("this entry has just been cut off the log; see quarantine list", **entry.place._asdict())

    async def _send_back(self, entry: Entry, value: bytes) -> None:
        if await self._was_replayed(entry):
            return
        to = route(value)
        stream = entry.source.stream if entry.source.stream in INPUTS else to.stream
        message = Message(time.time_ns() // 1_000_000, to.key, (), value)
        output = Output(stream, to.partition(value, self._log.partitions), [message])
        await self._log.append([output], (_bookmark_name(entry), Bookmark(entry.place.offset, 0, "")))

    async def _was_replayed(self, entry: Entry) -> bool:
        """Return whether a run that was killed before it could resolve the entry had sent it back."""
        bookmark = await self._log.bookmark(_bookmark_name(entry))
        return bookmark is not None and bookmark.position == entry.place.offset

    async def _resolve(self, entry: Entry, action: Action) -> None:
        now_s = int(time.time())
        template = self._deployment.planner.output(STREAM, "", now_s)
        _, partition, offset = entry.place
        head, tail = template.envelope(
            action=action, reason=self._reason, resolves={"partition": partition, "offset": offset}
        )
        message = Message(now_s * 1000, None, template.headers, head + tail)
        await self._log.append([Output(STREAM, partition, [message])])


def _bookmark_name(entry: Entry) -> str:
    """Return the name of the bookmark that says which entry of the partition was sent back last."""
    return f"quarantine/{entry.place.partition}"


def _bytes(opened: Revealed) -> bytes:
    """Return the record as it came in, for the Revealer gives text where it can."""
    text = opened.fields.get("record")
    return binascii.a2b_base64(opened.fields["record_base64"]) if text is None else str(text).encode()
