"""Exemptions given by an account: one, or a whole file of them, into `exemptions`, and their withdrawal.

Rules of this file:
- An exemption is the account's data. It is sealed under the account's key of the month in which it ends, and the
  account's secret of the person, so that what ends the account's data ends it too.
- What is written last counts. So nothing is written where an exemption of the kind stands that lasts as long or longer:
  loading a file again changes nothing, and the order of its lines does not matter.
- A withdrawal is a record, and needs no key; it can be written for somebody whose keys are gone.
- Only an operator or the privacy officer writes, for accounts that are theirs; it stands in `audit` before it is
  written: how many, of which account, kind and channel, and nobody's token.
- An error names the column that is wrong, never what stood in it.
"""

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, get_args

import orjson

from processors.exemption import (
    AUTHORITY,
    CONSENT,
    DATA_CLASS,
    EXEMPT,
    KINDS,
    STREAM,
    Exemption,
    exempting,
    longest_s,
    withdrawing,
)  # fmt: skip
from processors.keyring import EpochRef, Needs, PersonRef
from processors.plan import Template
from processors.retention import instant
from processors.screen.suppression import MAX_AHEAD_S, Change, Rule, parse_key, record_key
from processors.seal import ENTROPY_BYTES, Entropy, Sealer
from schemas.catalog import partition_for
from schemas.errors import KeysUnusable, LogUnusable, PolicyInvalid, RevealDenied
from schemas.fields import NO_REASON, Kind, Party, is_account, is_reason, normalise
from schemas.inbound import Channel
from schemas.outbound import Message, Output
from schemas.policy import MAX_EXEMPT_MONTHS, Account
from streams.deployment import Deployment
from streams.keys.cache import KeyCache
from streams.log.protocol import Log, Stored
from streams.rows import LINE, NOT_A_LINE, Line, Loaded, RowInvalid, instant_s, pages, spells_out

CHANNELS: Final = get_args(Channel)
COLUMNS: Final = ("number", "account", "kind", "given", "evidence", "until", "channel")
NEEDED: Final = COLUMNS[:5]
CHUNK_LINES: Final = 5000
_PAGE: Final = 5000
_WRONG: Final = {
    LINE: NOT_A_LINE,
    "number": "the number is nobody's telephone number: give an E.164 number, such as one that begins with + and a"
    " country code",
    "account": "the account is missing, or is not one that the policy serves",
    "kind": f"the kind is one of {', '.join(KINDS)}",
    "given": "say when it was given, which is not to come: RFC 3339 (2026-11-21T14:00:00Z) or a date (2026-11-21)",
    "evidence": "the evidence is a reference to what proves it: at most 40 letters, digits, - _ /, and no number alone",
    "until": "until when is RFC 3339 (2027-11-21T14:00:00Z) or a date (2027-11-21), still to come",
    "channel": f"the channel is one of {', '.join(CHANNELS)}, or left out for both",
    "reason": NO_REASON,
}


class Entry(NamedTuple):
    """An exemption as it was asked for; "" is not given. `given`, `until`: RFC 3339 or a date."""

    number: str = ""
    account: str = ""
    kind: str = ""
    given: str = ""
    evidence: str = ""
    until: str = ""
    channel: str = ""
    reason: str = ""

    def __repr__(self) -> str:
        return "Entry()"


class Standing(NamedTuple):
    """What the latest record of an exemption says. Instants are RFC 3339; `reason`: why it was withdrawn, if so."""

    kind: str
    channel: str
    state: str  # in force, expired, withdrawn
    expires: str
    given: str
    evidence: str
    reason: str | None


class Kept(NamedTuple):
    """The latest record of an exemption, its rule and its clear envelope."""

    stored: Stored
    rule: Rule
    fields: Mapping[str, Any]

    def __repr__(self) -> str:
        return "Kept()"

    def state(self, now_s: int) -> str:
        """Return whether it is in force, expired or withdrawn."""
        if self.fields["action"] != EXEMPT:
            return "withdrawn"
        return "in force" if self.fields["expires_at"] > instant(now_s) else "expired"


class Exemptions:
    """The exemptions of one deployment, as of the last `catch_up`."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._policy = deployment.config.policy
        self._tokens = deployment.pipeline.tokens
        self._tail = deployment.exemptions()

    async def catch_up(self) -> None:
        """Read the stream to its end. Blocks. Raises TokensChange while the token key is rotated."""
        await self._tail.catch_up()
        self._deployment.settled()

    async def add(self, entry: Entry, now_s: int) -> int:
        """Write an exemption, one record per channel, durable on return; return how many.

        None where one of that kind stands that lasts as long. Raises RowInvalid, RevealDenied, and PolicyInvalid if the
        policy has no rule for such data.
        """
        return await self._write(self._checked(entry, now_s), now_s)

    async def remove(self, entry: Entry, now_s: int) -> int:
        """Withdraw what is in force of an account and number, of the kind and channel that are given, if they are.

        Returns how many that were. Blocks; reads one partition. Raises RowInvalid and RevealDenied.
        """
        if entry.reason and not is_reason(entry.reason):
            raise _wrong("reason")
        party = self._asked(entry)
        if entry.reason and spells_out(entry.reason, party):
            raise _wrong("reason")
        found = await self._kept(entry, party)
        theirs = [one for one in found if one.state(now_s) == "in force"]
        await _withdraw(self._deployment, theirs, entry.reason or None, now_s)
        return len(theirs)

    async def standing(self, entry: Entry, now_s: int) -> list[Standing]:
        """Return the exemptions of an account and number that the stream knows of, by kind and channel.

        Blocks; reads one partition. Raises RowInvalid and RevealDenied.
        """
        found = await self._kept(entry, self._asked(entry))
        return sorted(
            Standing(
                one.rule.class_,
                one.rule.channel,
                one.state(now_s),
                one.fields["expires_at"],
                one.fields["given_at"],
                one.fields["evidence"],
                one.fields["reason"],
            )
            for one in found
        )

    async def load(
        self, lines: Iterable[bytes], now_s: int, advance: Callable[[int], None], bad: Callable[[int, str], None]
    ) -> Loaded:
        """Write the exemptions of a CSV file with a header (`COLUMNS`), and return what came of it. Blocks.

        `bad` is told of each line (from 1, and its column) that is not understood; all others are written. `advance` is
        told of bytes read. Raises InputInvalid if the header is none, RevealDenied at an account that is not this
        user's to write for, and PolicyInvalid; lines before may have been written, and loading it all again does no
        harm.
        """
        read = written = wrong = 0
        for page in pages(lines, COLUMNS, NEEDED, CHUNK_LINES, advance):
            exemptions: list[Exemption] = []
            for line in page:
                read += 1
                try:
                    exemptions += self._checked(_entry(line), now_s)
                except RowInvalid as error:
                    wrong += 1
                    bad(line.number, error.column)
            written += await self._write(exemptions, now_s)
        return Loaded(read, written, wrong)

    # --- what is asked for ----------------------------------------------------------------------------------------

    def _checked(self, entry: Entry, now_s: int) -> list[Exemption]:
        """Return an entry's exemptions, one per channel. Raises RowInvalid."""
        account = self._policy.account(entry.account)
        if account is None:
            raise _wrong("account")
        party = self._party(entry, account)
        if entry.kind not in KINDS:
            raise _wrong("kind")
        if entry.channel not in ("", *CHANNELS):
            raise _wrong("channel")
        if not is_reason(entry.evidence) or spells_out(entry.evidence, party):
            raise _wrong("evidence")
        given_s = _instant_s(entry.given, "given")
        if given_s > now_s + MAX_AHEAD_S:
            raise _wrong("given")
        expires_s = self._expires_s(entry, party, given_s, now_s)
        token = self._tokens.of(party.value)
        return [
            Exemption(
                key_of(self._tokens.version, token, entry.account, entry.kind, channel), entry.account, entry.kind,
                given_s, expires_s, entry.evidence, token, party.value,
            )
            for channel in ([entry.channel] if entry.channel else CHANNELS)
        ]  # fmt: skip

    def _expires_s(self, entry: Entry, party: Party, given_s: int, now_s: int) -> int:
        """Return when an exemption ends. Raises RowInvalid if that is not allowed, or past."""
        longest = longest_s(self._policy, entry.kind, party.value, given_s)
        if longest is None:
            raise RowInvalid(
                "kind",
                f"where this number is, or may be, a {entry.kind} exempts from nothing: the policy has no terms for it"
                " ([[screening.exemption]]); a consent would",
            )
        expires_s = _instant_s(entry.until, "until") if entry.until else longest
        if expires_s > longest:
            most = f", {MAX_EXEMPT_MONTHS} months after it was given" if entry.kind == CONSENT else ""
            raise RowInvalid("until", f"this {entry.kind} lasts until {instant(longest)} at most{most}")
        if expires_s <= now_s:
            raise RowInvalid("until" if entry.until else "given", f"it ended on {instant(expires_s)}")
        return expires_s

    def _asked(self, entry: Entry) -> Party:
        """Return whom it is about, for whoever may know. Raises RowInvalid and RevealDenied."""
        party = self._party(entry, self._policy.account(entry.account))
        if entry.kind not in ("", *KINDS):
            raise _wrong("kind")
        if entry.channel not in ("", *CHANNELS):
            raise _wrong("channel")
        permit(self._deployment, {entry.account})
        return party

    def _party(self, entry: Entry, account: Account | None) -> Party:
        """Return the person, whose number is read as the account's are; the account may be gone from the policy."""
        if not is_account(entry.account):
            raise _wrong("account")
        party = normalise(entry.number, account.default_region if account else None)
        if party.kind is not Kind.NUMBER or not party.is_person or (account and party.value in account.own):
            raise _wrong("number")
        if spells_out(entry.account, party):
            raise _wrong("account")
        return party

    async def _kept(self, entry: Entry, party: Party) -> list[Kept]:
        token = self._tokens.of(party.value)
        partition = partition_for(token, self._deployment.log.partitions)
        found = await kept(self._deployment.log, partition, self._tokens.version, entry.account, {token})
        return [one for one in found if entry.kind in ("", one.rule.class_) and entry.channel in ("", one.rule.channel)]

    # --- what is written ------------------------------------------------------------------------------------------

    async def _write(self, exemptions: Sequence[Exemption], now_s: int) -> int:
        """Write those that last longer than what stands, durable and in the view on return; return how many."""
        lasting: dict[bytes, Exemption] = {}
        for one in exemptions:
            before = lasting.get(one.entry)
            if one.expires_s > (self._until_s(one) if before is None else before.expires_s):
                lasting[one.entry] = one
        if not exemptions:
            return 0
        deployment, new = self._deployment, list(lasting.values())
        for account in {one.account for one in exemptions}:
            self._owned(account, now_s)
        who = permit(deployment, {one.account for one in exemptions})
        if new:
            counts = Counter((one.account, one.kind, _channel(one.entry)) for one in new)
            await _audit(deployment, "exempt", counts, who, None, references=len({one.evidence for one in new}))
            keys, _ = deployment.keys()
            try:
                await write(deployment, keys, new, now_s)
            finally:
                keys.close()
            await self._tail.catch_up()
        return len(new)

    def _owned(self, account: str, now_s: int) -> None:
        """Return if exemptions of an account are its own data, as all here takes for granted. Raises PolicyInvalid."""
        today = datetime.fromtimestamp(now_s, UTC).date()
        if self._policy.role_of(account, DATA_CLASS, today) != "processor":
            raise PolicyInvalid(
                f"exemptions are an account's own data: the policy must make the platform {DATA_CLASS}'s processor",
                policy=self._policy.id,
            )

    def _until_s(self, one: Exemption) -> int:
        """Return until when an exemption of the same kind stands; 0: none does."""
        entries = self._tail.view.get(one.token)
        state = entries.get(_rule(one)) if entries else None
        return state.event_s if state is not None and state.out else 0


def key_of(version: int, token: bytes, account: str, kind: str, channel: str) -> bytes:
    """Return the key of an exemption's record."""
    rule = Rule(f"account:{account}", kind, channel, AUTHORITY)
    return record_key(version, Change(token, rule, True, 0, "", None))


def _rule(one: Exemption) -> Rule:
    return Rule(f"account:{one.account}", one.kind, _channel(one.entry), AUTHORITY)


def _channel(entry: bytes) -> str:
    return entry.rsplit(b"|", 3)[1].decode()


def _wrong(column: str) -> RowInvalid:
    return RowInvalid(column, _WRONG[column])


def _instant_s(text: str, column: str) -> int:
    try:
        return instant_s(text)
    except (ValueError, OverflowError):
        raise _wrong(column) from None


def _entry(line: Line) -> Entry:
    if line.given is None:
        raise _wrong(LINE)
    return Entry(**line.given)


def permit(deployment: Deployment, accounts: Collection[str]) -> str | None:
    """Return the role in which this process may write and look up exemptions of these accounts.

    Reads files. Raises RevealDenied unless it is an operator's or the privacy officer's, for each of them.
    """
    who = deployment.who()
    if not all(who.may_open(STREAM, account) for account in accounts):
        raise RevealDenied(
            "only an operator of the account or the privacy officer may do this; ask for a grant in the roles file",
            stream=STREAM,
        )
    return who.role_for(STREAM)


async def _audit(
    deployment: Deployment,
    action: str,
    counts: Mapping[tuple[str, str, str], int],
    role: str | None,
    reason: str | None,
    **more: object,
) -> None:
    """Write what is about to be done, durable on return: `entries`: how many of each account, kind and channel."""
    entries = [
        {"account": account, "kind": kind, "channel": channel, "count": count}
        for (account, kind, channel), count in sorted(counts.items())
    ]
    await deployment.auditor().write(
        action, role=role, reason=reason, stream=STREAM, count=sum(counts.values()), entries=entries, **more
    )


async def write(deployment: Deployment, keys: KeyCache, exemptions: Sequence[Exemption], now_s: int) -> None:
    """Seal and append exemptions, durable on return, under the key lease of `keys`.

    Raises PolicyInvalid if the policy has no rule for such data; KeysUnusable if a key that is needed was destroyed;
    and LeaseExpired or KeysChanged, also if the lease ended while the log was writing: writing them again does no harm.
    """
    planner = deployment.planner
    month = planner.calendar.moment(now_s).month_epoch
    made: dict[tuple[str, str], Template] = {}
    templates: list[Template] = []
    seals: Counter[EpochRef] = Counter()
    deadlines_s: dict[EpochRef, int | None] = {}
    persons: dict[PersonRef, int] = {}
    people: list[PersonRef] = []
    for one in exemptions:
        slot = (one.account, planner.calendar.moment(one.expires_s - 1).month_epoch)
        template = made.get(slot)
        if template is None:
            template = made[slot] = planner.until(STREAM, one.account, now_s, one.expires_s)
        ref, deadline_s = template.ref, template.deadline_s
        if ref is None or deadline_s is None:
            raise ValueError("exemptions are sealed, and end")
        person = PersonRef(ref.owner, one.token, month)
        seals[ref] += 1
        deadlines_s[ref] = deadline_s
        persons[person] = max(deadline_s, persons.get(person, 0))
        templates.append(template)
        people.append(person)
    ring = keys.fetch(Needs({ref: (deadlines_s[ref], count) for ref, count in seals.items()}, persons), now_s)
    entropy = Entropy(os.urandom(ENTROPY_BYTES))
    sealers: dict[Template, Sealer] = {}
    for (account, _), template in made.items():
        epoch = None if template.ref is None else ring.epochs.get(template.ref)
        if epoch is None:
            raise KeysUnusable(
                f"the key of account {account} for exemptions that end in {template.ref and template.ref.epoch} was"
                " destroyed when the account left; give exemptions that end in another month"
            )
        sealers[template] = Sealer(ring, entropy, STREAM, account, epoch)
    outputs: dict[int, list[Message]] = {}
    for one, template, person in zip(exemptions, templates, people, strict=True):
        sealed = exempting(template, sealers[template], ring.persons[person], one, now_s)
        outputs.setdefault(partition_for(one.token, deployment.log.partitions), []).append(sealed)
    check = keys.guard(deployment.margin_s)
    check()
    await deployment.log.append([Output(STREAM, *output) for output in outputs.items()])
    check()


# --- what there is, and its end -------------------------------------------------------------------------------


async def kept(
    log: Log, partition: int, version: int, account: str | None = None, tokens: Collection[bytes] | None = None
) -> list[Kept]:
    """Return the latest record of each exemption of a partition, under this token key or a newer one.

    Of an account and of people, if they are given. Blocks; memory: about 1 kB for each that is returned. Raises
    LogUnusable for what is no such record, and LogBusy while it is not decided what is in the log.
    """
    latest: dict[bytes, Stored] = {}
    marks = None if tokens is None else tuple(f".{token.hex()}|" for token in tokens)
    scope = None if account is None else f"|account:{account}|".encode()
    async for page in records(log, partition):
        for stored in page:
            key = stored.key or b""
            if scope is not None and scope not in key:
                continue
            if marks is not None and not any(mark.encode() in key for mark in marks):
                continue
            latest[key.rpartition(b"|")[0]] = stored
    found = []
    for stored in latest.values():
        try:
            of, token, rule, _ = parse_key(stored.key or b"")
            fields = orjson.loads(stored.value)
            one = Kept(stored, rule, {name: fields[name] for name in _TOLD} | {"reason": fields.get("reason")})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LogUnusable(
                "a record of the exemptions stream cannot be read; restore the log from a backup",
                stream=STREAM, partition=partition, offset=stored.offset,
            ) from None  # fmt: skip
        if of >= version and (tokens is None or token in tokens):
            found.append(one)
    return found


_TOLD: Final = ("account_id", "action", "evidence", "expires_at", "given_at", "kind", "privacy")


async def records(log: Log, partition: int) -> AsyncIterator[list[Stored]]:
    """Yield the records of a partition of the stream, page by page. Blocks."""
    at = (await log.begin_offsets(STREAM))[partition]
    end = (await log.end_offsets(STREAM))[partition]
    while at < end and (page := await log.read(STREAM, partition, at, _PAGE, end)):
        yield page
        at = page[-1].offset + 1


async def withdraw(
    deployment: Deployment, account: str, tokens: Collection[bytes] | None, reason: str | None, now_s: int
) -> int:
    """Withdraw an account's exemptions that are in force: of the person with these tokens, or all; return how many.

    Durable on return, and audited before; for whoever may end them by other means, so nobody is asked here. Idempotent.
    Blocks; reads the stream, or the partitions in which the person's are. Raises Retriable errors.
    """
    log, version = deployment.log, deployment.store.token_keys().current.version
    homes = range(log.partitions) if tokens is None else sorted({partition_for(one, log.partitions) for one in tokens})
    count = 0
    for partition in homes:
        found = await kept(log, partition, version, account, tokens)
        standing = [one for one in found if one.state(now_s) == "in force"]
        await _withdraw(deployment, standing, reason, now_s)
        count += len(standing)
    return count


async def _withdraw(deployment: Deployment, standing: Sequence[Kept], reason: str | None, now_s: int) -> None:
    """Write the withdrawals of exemptions, audited first, under a key lease, for which a token rotation waits."""
    for at in range(0, len(standing), CHUNK_LINES):
        few = standing[at : at + CHUNK_LINES]
        counts = Counter((one.fields["account_id"], one.rule.class_, one.rule.channel) for one in few)
        role = deployment.who().role_for(STREAM)
        await _audit(deployment, "unexempt", counts, role, reason)
        keys, _ = deployment.keys()
        try:
            outputs: dict[int, list[Message]] = {}
            for one in few:
                message = withdrawing(one.stored.key or b"", one.fields, one.stored.headers, reason, now_s)
                outputs.setdefault(one.stored.partition, []).append(message)
            check = keys.guard(deployment.margin_s)
            check()
            await deployment.log.append([Output(STREAM, *output) for output in outputs.items()])
            check()
        finally:
            keys.close()
