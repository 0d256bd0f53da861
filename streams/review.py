"""Near-miss opt-outs: what waits for a decision, and what a decision does (REG-3).

Rules of this file:
- A decision is a record without sealed parts in the partition of what it resolves:
  {"action":"opted_out"|"dismissed","privacy":{…},"reason":R,"resolves":{"offset":O,"partition":P},"sealed":[],"v":1}
- An opt-out comes first: what the pipeline decides on the same message, had it said STOP and nothing else. So scope,
  class, channels and revoke-all are those of the keyword, at the time of the message. Then the near miss is resolved.
  A run that was killed in between has opted the person out, and the near miss is still listed; deciding again writes
  the same opt-out and does no harm.
- Either is for whoever may open the near miss (operator, dpo), and stands in `audit` before it is done, with the
  places and nobody's sid or token.
- What a near miss holds is opened by the Revealer only. Its number goes nowhere but sealed into `suppressions`.
"""

import re
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

import orjson

from processors.pipeline import Inbox
from processors.screen.suppression import Change
from schemas.errors import InputInvalid, RevealDenied
from schemas.fields import NO_REASON, is_reason
from schemas.outbound import Message, Output
from streams.deployment import Deployment
from streams.keys.reveal import Revealed, State
from streams.log.protocol import Log, Stored
from streams.optout import write
from streams.state.reviews import STREAM, Decision, Near, OpenReviews, Place

Choice = Literal["opt-out", "dismiss"]
CHOICES: Final[tuple[Choice, ...]] = ("opt-out", "dismiss")
_DECISIONS: Final[dict[Choice, Decision]] = {"opt-out": "opted_out", "dismiss": "dismissed"}
_AT_ONCE: Final = 500
_DAY_MS: Final = 86_400_000
_PLACE = re.compile(r"([0-9]{1,9})/([0-9]{1,18})")


def place_of(text: str) -> Place:
    """Return the place that a text such as `2/118` names. Raises InputInvalid."""
    found = _PLACE.fullmatch(text.strip())
    if found is None:
        raise InputInvalid("a PLACE is partition and offset as review list shows them, such as 2/118")
    return Place(int(found[1]), int(found[2]))


async def near_misses(log: Log, *, everything: bool = False) -> list[Near]:
    """Return what is undecided and opens still, the oldest first; `everything`: also what was decided or has died.

    By clear envelopes only, in 0.1 kB each. Blocks. Raises LogUnusable for what is no such record.
    """
    reviews = OpenReviews(log, keep_decided=everything)
    await reviews.catch_up()
    reviews.readable()
    if not everything:
        reviews.forget_dead(time.time())
    return sorted(reviews, key=lambda near: (near.clock.day, near.clock.due_s, near.place))


class Shown(NamedTuple):
    """What opening a near miss gave: the state, and the text if it opened and was stored."""

    state: State
    text: str | None

    def __repr__(self) -> str:
        return f"Shown({self.state.value})"


class Done(NamedTuple):
    """What came of a decision: how many near misses were resolved, and the places of those that were not, and why."""

    resolved: int
    left: list[tuple[Place, str]]


class Review:
    """Shows and decides near misses of one deployment, for a reason. Raises InputInvalid if that is none."""

    def __init__(self, deployment: Deployment, reason: str) -> None:
        if not is_reason(reason):
            raise InputInvalid(NO_REASON)
        self._deployment = deployment
        self._log = deployment.log
        self._reason = reason
        self._who = deployment.who()
        self._revealer = deployment.revealer()

    async def texts(self, these: Sequence[Near]) -> list[Shown]:
        """Return what each says, in order, opened and logged to `audit`. Blocks. Raises RevealDenied."""
        self.permit()
        opened = await self._opened(these)
        return [Shown(one.state, one.fields.get("content")) for one in opened]

    async def decide(self, places: Iterable[Place], choice: Choice) -> Done:
        """Take near misses off the list, durable on return; `opt-out` writes the opt-outs that they were, before.

        What does not open (it is destroyed, or the account another's) cannot be opted out, and stays. Blocks. Raises
        InputInvalid if a place holds nothing undecided, then nothing is done; RevealDenied; what log and keys raise.
        """
        self.permit()
        reviews = OpenReviews(self._log)
        await reviews.catch_up()
        chosen: list[Near] = []
        for place in dict.fromkeys(places):
            near = reviews.get(place)
            if near is None:
                raise InputInvalid("nothing undecided lies there; see review list", **place._asdict())
            self.permit(near.clock.account)
            chosen.append(near)
        done = Done(0, [])
        for at in range(0, len(chosen), _AT_ONCE):
            few = chosen[at : at + _AT_ONCE]
            some = await self._some(few, choice)
            done = Done(done.resolved + some.resolved, done.left + some.left)
        return done

    async def _some(self, few: Sequence[Near], choice: Choice) -> Done:
        left: list[tuple[Place, str]] = []
        changes: list[Change] = []
        now_s = int(time.time())
        if choice == "opt-out":
            few, changes, left = await self._as_opt_outs(few, now_s)
        if few:
            await self._audit(few, choice)
            if changes:
                await self._opt_out(changes, now_s)
            await self._resolve(few, _DECISIONS[choice], now_s)
        return Done(len(few), left)

    async def _as_opt_outs(
        self, these: Sequence[Near], now_s: int
    ) -> tuple[list[Near], list[Change], list[tuple[Place, str]]]:
        """Return those that can be opt-outs, their opt-outs at the times that stand afterwards, and what cannot be."""
        tail = self._deployment.suppressions()
        await tail.catch_up()
        self._deployment.settled()
        pipeline, registries = self._deployment.pipeline, self._deployment.registries()
        fit: list[Near] = []
        changes: list[Change] = []
        left: list[tuple[Place, str]] = []
        for near, one in zip(these, await self._opened(these), strict=True):
            if one.state is not State.REVEALED:
                left.append((near.place, one.reason or one.state.value))
                continue
            overlay = pipeline.prepare(_as_stop(near, one.fields), tail.view, registries, now_s).overlay
            if not overlay.changes:
                left.append((near.place, "nobody's by the policy of now"))
                continue
            fit.append(near)
            changes += overlay.changes
            tail.view.merge(overlay)  # the next one's may be the same person's
        return fit, changes, left

    async def _opt_out(self, changes: Sequence[Change], now_s: int) -> None:
        """Append opt-outs, durable on return."""
        keys, _ = self._deployment.keys()
        try:
            await write(self._deployment, self._deployment.pipeline, keys, changes, now_s)
        finally:
            keys.close()

    def permit(self, account: str | None = None) -> None:
        """Return if this process may open and decide near misses of an account (None: of any). Raises RevealDenied."""
        if not self._who.may_open(STREAM, account):
            raise RevealDenied(
                "only an operator or the privacy officer, for the account concerned, may open and decide near misses;"
                " ask for a grant in the roles file",
                stream=STREAM,
            )

    async def _opened(self, these: Sequence[Near]) -> list[Revealed]:
        """Return each opened, in order, or why not; logged before."""
        stored: dict[Place, Stored] = {}
        for partition in {near.place.partition for near in these}:
            wanted = deque(sorted(near.place.offset for near in these if near.place.partition == partition))
            while wanted:
                page = await self._log.read(STREAM, partition, wanted[0], _AT_ONCE)
                stored.update((Place(partition, one.offset), one) for one in page)
                if not page or page[0].offset > wanted[0]:
                    place = Place(partition, wanted[0])
                    raise InputInvalid("a near miss has just been cut off the log; see review list", **place._asdict())
                while wanted and wanted[0] <= page[-1].offset:
                    wanted.popleft()
        return await self._revealer.reveal([stored[near.place] for near in these], self._reason)

    async def _audit(self, few: Sequence[Near], choice: Choice) -> None:
        await self._deployment.auditor().write(
            "review_decide",
            role=self._who.role_for(STREAM),
            reason=self._reason,
            stream=STREAM,
            decision=_DECISIONS[choice],
            count=len(few),
            records=[list(near.place) for near in few],
        )

    async def _resolve(self, few: Sequence[Near], decision: Decision, now_s: int) -> None:
        by_partition: dict[int, list[Message]] = {}
        for near in few:
            template = self._deployment.planner.output(STREAM, near.clock.account, now_s)
            head, tail = template.envelope(action=decision, reason=self._reason, resolves=near.place._asdict())
            message = Message(now_s * 1000 // _DAY_MS * _DAY_MS, None, template.headers, head + tail)
            by_partition.setdefault(near.place.partition, []).append(message)
        await self._log.append([Output(STREAM, *output) for output in by_partition.items()])


def _as_stop(near: Near, fields: dict[str, Any]) -> Inbox:
    """Return the inbound message of a near miss as a gateway would have sent it, had it said STOP."""
    names = ("occurred_at", "sender", "recipient", "country", "campaign_id")
    told = {name: fields[name] for name in names if name in fields}
    whose = {"v": 1, "type": "cdr", "channel": "sms", "direction": "mo", "record_id": "review", "content": "STOP"}
    return Inbox(STREAM, *near.place, [orjson.dumps({**whose, "account_id": near.clock.account, **told})])
