"""Opt-outs given on the command line: one entry, or a whole file of them, into and out of `suppressions`.

Rules of this file:
- What is written is what a worker would write for a preference: same tokens, same keys, sealed in the same way.
- A lift is a record: `remove` writes an opt-in of exactly the entry that stands, and nothing where none stands.
- A block, an entry of the authority `officer`, is the privacy officer's to make and to lift; it stands in `audit`
  before it is written: how many, of which scope, class and channel, and nobody's token.
- An error names the column that is wrong, never what stood in it.
"""

import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, get_args

import orjson

from processors.keyring import Needs
from processors.pipeline import Pipeline, seal_change
from processors.plan import Template
from processors.retention import instant
from processors.screen.suppression import (
    MAX_AHEAD_S,
    TOKEN_MARK,
    Beneath,
    Change,
    Overlay,
    Rule,
    hidden,
    parse_key,
    scope_id,
)
from processors.seal import ENTROPY_BYTES, Entropy, Sealer
from schemas.catalog import partition_for
from schemas.errors import InputInvalid, KeysUnusable
from schemas.fields import NO_REASON, Kind, Party, is_account, is_reason, is_record_id, normalise
from schemas.inbound import Channel, SuppressionClass
from schemas.outbound import Message, Output
from streams.deployment import Deployment
from streams.keys.cache import KeyCache
from streams.keys.reveal import State
from streams.keys.roles import OFFICER, only_officer
from streams.log.protocol import Stored
from streams.rows import LINE, NOT_A_LINE, Line, Loaded, RowInvalid, pages, spells_out
from streams.state.entries import MANY, SUPPRESSIONS

STREAM: Final = SUPPRESSIONS.stream
CLASSES: Final = get_args(SuppressionClass)
CHANNELS: Final = get_args(Channel)
_BLOCKS: Final = "officer"
AUTHORITIES: Final = ("person", _BLOCKS)
COLUMNS: Final = ("number", "account", "sender", "campaign", "class", "channel", "authority", "reason", "event_at")
CHUNK_LINES: Final = 5000
_PAGE: Final = 1000
_TOKEN = re.compile(r"(token:[0-9a-f]+\.[0-9]+:)([0-9a-f]{32})")
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d))?")
_WRONG: Final = {
    LINE: NOT_A_LINE,
    "number": "the number is nobody's: give an E.164 number, such as one that begins with + and a country code",
    "account": "the account is not one that the policy serves, or is missing beside a sender or campaign",
    "sender": "give either a sender or a campaign; a sender by its token only where it was exported",
    "campaign": "a campaign has 1 to 128 printable ASCII characters, and not the person's number; by its token only"
    " where it was exported",
    "class": f"the class is one of {', '.join(CLASSES)}",
    "channel": f"the channel is one of {', '.join(CHANNELS)}, or left out for both",
    "authority": f"the authority is one of {', '.join(AUTHORITIES)}",
    "reason": NO_REASON,
    "event_at": "a time is RFC 3339 (2026-11-21T14:00:00Z) or a date (2026-11-21)",
}


class EntryInvalid(RowInvalid):
    """An entry is not valid; `column` says where."""

    def __init__(self, column: str) -> None:
        """Take the column (a key of `_WRONG`)."""
        super().__init__(column, _WRONG[column])


class Entry(NamedTuple):
    """An opt-out as it was asked for; "" is not given. `event_at`: RFC 3339 or a date; "" is now."""

    number: str
    account: str = ""
    sender: str = ""
    campaign: str = ""
    class_: str = "all"
    channel: str = ""
    authority: str = "person"
    reason: str = ""
    event_at: str = ""

    def __repr__(self) -> str:
        return "Entry()"


class Standing(NamedTuple):
    """An opt-out that stands: its rule, a sender's token cut out, and since when (RFC 3339)."""

    scope: str
    class_: str
    channel: str
    authority: str
    since: str


class OptOuts:
    """The opt-outs of one deployment, as of the last `catch_up`."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._policy = deployment.config.policy
        self._tokens = deployment.pipeline.tokens
        self._tail = deployment.suppressions()
        # how an export names a sender, of whom only the token is known: good for this token key only
        self._token_prefix = f"token:{deployment.store.store_id[:8]}.{self._tokens.version}:"

    async def catch_up(self) -> None:
        """Read the stream to its end. Blocks. Raises TokensChange while the token key is rotated."""
        await self._tail.catch_up()
        self._deployment.settled()

    async def add(self, entries: Sequence[Entry], now_s: int) -> int:
        """Write the opt-outs, one record per channel, durable on return; return how many.

        Raises EntryInvalid, and RevealDenied for a block of whoever is not the privacy officer.
        """
        changes = [change for entry in entries for change in self.changes(entry, now_s)]
        return await self._apply(changes, now_s)

    async def remove(self, entry: Entry, now_s: int) -> int:
        """Lift exactly these opt-outs; return how many stood and were lifted.

        Raises EntryInvalid, InputInvalid, and RevealDenied for a block and whoever is not the privacy officer.
        """
        lifts = []
        asked = self.changes(entry, now_s)
        self._permit(asked)
        for change in asked:
            state = (self._tail.view.get(change.token) or {}).get(change.rule)
            if state is None or not state.out:
                continue
            # it is seen to stand, so this comes after it, within the same second too
            event_s = max(now_s, state.event_s + 1)
            if event_s > now_s + MAX_AHEAD_S:
                raise InputInvalid(f"this opt-out is of {instant(state.event_s)}, ahead of the clock; lift it then")
            lifts.append(change._replace(out=False, event_s=event_s))
        return await self._apply(lifts, now_s)

    def standing(self, entry: Entry) -> list[Standing]:
        """Return the person's opt-outs that stand: all, or of the account, sender, campaign, … that are given.

        With an account, its own and those of the platform, which bind it too. Raises EntryInvalid.
        """
        party = self._party(entry, listed=False)
        scopes = self._scopes(entry, party)
        found = []
        for rule, state in (self._tail.view.get(self._tokens.of(party.value)) or {}).items():
            if (
                state.out
                and (scopes is None or rule.scope in scopes or rule.scope.startswith(self._within(entry)))
                and entry.class_ in ("", rule.class_)
                and entry.channel in ("", rule.channel)
                and entry.authority in ("", rule.authority)
            ):
                shown = _shown(rule.scope)
                found.append(Standing(shown, rule.class_, rule.channel, rule.authority, instant(state.event_s)))
        return sorted(found)

    def changes(self, entry: Entry, now_s: int) -> list[Change]:
        """Return the opt-outs of an entry, one per channel, not yet written. Raises EntryInvalid."""
        party = self._party(entry, listed=True)
        scope, named = self._scope(entry, party) or ("platform", None)
        if entry.class_ not in CLASSES:
            raise EntryInvalid("class")
        if entry.channel not in ("", *CHANNELS):
            raise EntryInvalid("channel")
        if entry.authority not in AUTHORITIES:
            raise EntryInvalid("authority")
        if entry.reason and (not is_reason(entry.reason) or spells_out(entry.reason, party)):
            raise EntryInvalid("reason")
        event_s = _event_s(entry.event_at) if entry.event_at else now_s
        token = self._tokens.of(party.value)
        return [
            Change(token, Rule(scope, entry.class_, channel, entry.authority), True, event_s, party.value,
                   entry.reason or None, named)
            for channel in ([entry.channel] if entry.channel else CHANNELS)
        ]  # fmt: skip

    def _party(self, entry: Entry, *, listed: bool) -> Party:
        """Return the person, whose number is read as the account's are."""
        account = self._policy.account(entry.account) if entry.account else None
        if entry.account and (not is_account(entry.account) or (listed and account is None)):
            raise EntryInvalid("account")
        party = normalise(entry.number, account.default_region if account else None)
        if not party.is_person or party.kind is Kind.UNKNOWN or (account and party.value in account.own):
            raise EntryInvalid("number")
        return party

    def _scopes(self, entry: Entry, party: Party) -> list[str] | None:
        """Return the scopes that cover what is given, the narrowest last; None: nothing is given."""
        found = self._scope(entry, party)
        return None if found is None else ["platform", f"account:{entry.account}", found[0]]

    def _scope(self, entry: Entry, party: Party) -> tuple[str, str | None] | None:
        """Return the narrowest scope given, with the sender or campaign that it names by its token, if that is known.

        None: nothing is given.
        """
        if not entry.account:
            if entry.sender or entry.campaign:
                raise EntryInvalid("account")
            return None
        if spells_out(entry.account, party):
            raise EntryInvalid("account")
        if entry.sender and entry.campaign:
            raise EntryInvalid("sender")
        for column, name, mark in (("sender", entry.sender, ""), ("campaign", entry.campaign, TOKEN_MARK)):
            token = _TOKEN.fullmatch(name)
            if token is not None:
                if token[1] != self._token_prefix:
                    raise EntryInvalid(column)
                return f"{column}:{entry.account}:{mark}{token[2]}", None
        if entry.sender:
            account = self._policy.account(entry.account)
            sender = normalise(entry.sender, account.default_region if account else None)
            if sender.kind is Kind.NOBODY:
                raise EntryInvalid("sender")
            return scope_id("sender", entry.account, sender.value, None, self._tokens), sender.value
        if entry.campaign:
            if not is_record_id(entry.campaign) or spells_out(entry.campaign, party):
                raise EntryInvalid("campaign")
            scope = scope_id("campaign", entry.account, "", entry.campaign, self._tokens)
            return scope, hidden(scope, "", entry.campaign)
        return scope_id("account", entry.account, "", None, self._tokens), None

    @staticmethod
    def _within(entry: Entry) -> tuple[str, ...]:
        """Return how the narrower scopes of an account begin; none if it was asked about one of them."""
        if entry.sender or entry.campaign:
            return ()
        return f"sender:{entry.account}:", f"campaign:{entry.account}:"

    async def _apply(self, changes: Sequence[Change], now_s: int) -> int:
        """Append what takes effect over the view, and take it over; return how many records that was."""
        self._permit(changes)
        overlay = Overlay(self._tail.view)
        for change in changes:
            overlay.apply(change, now_s)
        if overlay.changes:
            await self._audit([change for change in overlay.changes if change.rule.authority == _BLOCKS])
            await self._append(overlay.changes, now_s)
            self._tail.view.merge(overlay)
        return len(overlay.changes)

    def _permit(self, changes: Iterable[Change]) -> None:
        """Return if this process may make these changes. Reads files. Raises RevealDenied."""
        if any(change.rule.authority == _BLOCKS for change in changes):
            only_officer(self._deployment.who())

    async def _audit(self, blocks: Sequence[Change]) -> None:
        """Write one entry for blocks that are made, and one for those that are lifted, durable on return.

        `entries`: `{"scope": KIND, "class": …, "channel": …, "count": N}`; `reason`: that of them all, if it is one.
        """
        for action, out in (("block", True), ("unblock", False)):
            these = [change for change in blocks if change.out is out]
            if not these:
                continue
            kinds = Counter((one.rule.scope.partition(":")[0], one.rule.class_, one.rule.channel) for one in these)
            reasons = {one.reason for one in these}
            await self._deployment.auditor().write(
                action,
                role=OFFICER,
                reason=reasons.pop() if len(reasons) == 1 else None,
                stream=STREAM,
                count=len(these),
                entries=[
                    {"scope": scope, "class": class_, "channel": channel, "count": count}
                    for (scope, class_, channel), count in sorted(kinds.items())
                ],
            )

    async def _append(self, changes: Sequence[Change], now_s: int) -> None:
        """Seal and append, under a key lease of its own."""
        keys, _ = self._deployment.keys()
        try:
            await write(self._deployment, self._deployment.pipeline, keys, changes, now_s)
        finally:
            keys.close()

    # --- whole files ------------------------------------------------------------------------------------------

    async def load(
        self, lines: Iterable[bytes], now_s: int, advance: Callable[[int], None], bad: Callable[[int, str], None]
    ) -> Loaded:
        """Write the opt-outs of a CSV file with a header, and return what came of it. Blocks.

        `bad` is told of each line (number from 1, column or reason code) that is not understood; all others are
        written. `advance` is told of bytes read. Raises InputInvalid if the header is none, and RevealDenied at a
        block if this is not the privacy officer: lines before it may have been written, and loading it all again does
        no harm.
        """
        read = written = wrong = 0
        for page in pages(lines, COLUMNS, COLUMNS[:1], CHUNK_LINES, advance):
            changes: list[Change] = []
            for line in page:
                read += 1
                try:
                    changes += self.changes(_entry(line), now_s)
                except EntryInvalid as error:
                    wrong += 1
                    bad(line.number, error.column)
            written += await self._apply(changes, now_s)
            if len(self._tail.view) > MANY:  # what is in a snapshot leaves memory
                await self._tail.catch_up()
        return Loaded(read, written, wrong)

    async def size(self) -> int:
        """Return how many records `rows` would read now."""
        log = self._deployment.log
        return sum(await log.end_offsets(STREAM)) - sum(await log.begin_offsets(STREAM))

    async def rows(
        self, reason: str, advance: Callable[[int], None] = lambda _: None
    ) -> AsyncIterator[list[list[str]]]:
        """Yield all opt-outs that stand as CSV rows of `COLUMNS`, page by page, opened and logged to `audit`.

        Read to the end first; `advance` is told of records read. Raises InputInvalid for a reason that is none,
        RevealDenied, and KeysUnusable if an opt-out does not open: an export that lacks one would lose it.
        """
        if not is_reason(reason):
            raise EntryInvalid("reason")
        await self.catch_up()
        revealer = self._deployment.revealer()
        async for page in self._standing(advance):
            opened = await revealer.reveal([stored for stored, _, _ in page], reason)
            rows = []
            for (stored, rule, event_s), result in zip(page, opened, strict=True):
                if result.state is not State.REVEALED:
                    raise KeysUnusable(
                        f"an opt-out does not open ({result.state.value}); nothing was exported",
                        stream=STREAM, partition=stored.partition, offset=stored.offset,
                    )  # fmt: skip
                why = orjson.loads(stored.value).get("reason") or ""
                cells = self._scope_cells(rule.scope)
                rows.append([result.fields["number"], *cells, *rule[1:], why, instant(event_s)])
            yield rows

    async def _standing(self, advance: Callable[[int], None]) -> AsyncIterator[list[tuple[Stored, Rule, int]]]:
        """Yield the latest record of each opt-out that stands, with its rule and event time (Unix s), page by page.

        From the end of each partition to its beginning: the first that is met is the latest. Memory: a bit for each
        entry of the snapshot, and what has changed since.
        """
        log, view, known = self._deployment.log, self._tail.view, _Met(self._tail.view.snapshot)
        begins, ends = await log.begin_offsets(STREAM), await log.end_offsets(STREAM)
        found: list[tuple[Stored, Rule, int]] = []
        for partition, (begin, last) in enumerate(zip(begins, ends, strict=True)):
            end = last
            while end > begin:
                at = max(begin, end - _PAGE)
                for stored in reversed(await log.read(STREAM, partition, at, _PAGE, end)):
                    version, token, rule, out = parse_key(stored.key or b"")
                    if stored.offset >= end or version != self._tokens.version or not out:
                        continue
                    state = (view.get(token) or {}).get(rule)
                    if state is not None and state.out and known.is_first(token, rule):
                        found.append((stored, rule, state.event_s))
                advance(end - at)
                end = at
                if len(found) >= _PAGE:
                    yield found[:_PAGE]
                    del found[:_PAGE]
        if found:
            yield found

    def _scope_cells(self, scope: str) -> tuple[str, str, str]:
        """Return the cells account, sender and campaign of a scope."""
        kind, _, rest = scope.partition(":")
        account, _, name = rest.partition(":")
        if kind == "sender" or name.startswith(TOKEN_MARK):
            name = self._token_prefix + name.removeprefix(TOKEN_MARK)
        return account, name if kind == "sender" else "", name if kind == "campaign" else ""


class _Met:
    """Which entries have been met: one bit for each of a snapshot, and the others by name."""

    def __init__(self, snapshot: Beneath | None) -> None:
        self._snapshot = snapshot
        self._bits = bytearray(0 if snapshot is None else -(-len(snapshot) // 8))
        self._others: set[tuple[bytes, Rule]] = set()

    def is_first(self, token: bytes, rule: Rule) -> bool:
        """Note an entry, and return whether it had not been met before."""
        row = None if self._snapshot is None else self._snapshot.row_of(token, rule)
        if row is not None:
            is_new = not self._bits[row >> 3] >> (row & 7) & 1
            self._bits[row >> 3] |= 1 << (row & 7)
            return is_new
        if (token, rule) in self._others:
            return False
        self._others.add((token, rule))
        return True


async def write(
    deployment: Deployment, pipeline: Pipeline, keys: KeyCache, changes: Sequence[Change], now_s: int
) -> None:
    """Seal and append changes, durable on return, under the key lease of `keys` and the tokens of the pipeline.

    Raises LeaseExpired or KeysChanged also if the lease ended while the log was writing: a rotation of the token key
    may not have seen the records then. Writing them again does no harm.
    """
    template = pipeline.planner.output(STREAM, "", now_s)
    if template.ref is None:
        raise ValueError("opt-outs are sealed")
    ring = keys.fetch(Needs({template.ref: (template.deadline_s, len(changes))}, {}), now_s)
    epoch = ring.epochs.get(template.ref)
    if epoch is None:
        raise KeysUnusable("the key of opt-outs was destroyed; none can be written")
    entropy = Entropy(os.urandom(ENTROPY_BYTES))
    sealers: dict[Template, Sealer] = {}

    def sealer(of: Template) -> Sealer:
        found = sealers.get(of)
        if found is None:
            found = sealers[of] = Sealer(ring, entropy, of.stream, of.account, epoch)
        return found

    outputs: dict[int, list[Message]] = {}
    for change in changes:
        message = seal_change(pipeline, sealer, change, now_s)
        outputs.setdefault(partition_for(change.token, deployment.log.partitions), []).append(message)
    check = keys.guard(deployment.margin_s)
    check()
    await deployment.log.append([Output(STREAM, *output) for output in outputs.items()])
    check()


def _entry(line: Line) -> Entry:
    """Return the entry of a line. Raises EntryInvalid."""
    if line.given is None:
        raise EntryInvalid(LINE)
    given = dict(line.given)
    if "class" in given:
        given["class_"] = given.pop("class")
    return Entry(given.pop("number", ""), **given)


def _shown(scope: str) -> str:
    """Return a scope as it may be shown: without a sender's token."""
    kind, _, rest = scope.partition(":")
    return f"sender:{rest.split(':')[0]}:…" if kind == "sender" else scope


def _event_s(text: str) -> int:
    """Return the Unix seconds of an RFC 3339 instant or a date (its first UTC second). Raises EntryInvalid."""
    try:
        if not _INSTANT.fullmatch(text):
            raise ValueError("another layout")
        at = datetime.fromisoformat(text.upper())
        return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise EntryInvalid("event_at") from None
