"""Objection to marketing, and restriction of a person's data (REG-1, Art. 18 and 21; KAL-8).

Rules of this file:
- What refuses marketing is an opt-out of an officer's authority, which no keyword, form or gateway lifts.
- A restriction is a mark in the ledger, which the Revealer asks about, and such an opt-out. Both end together, and
  nothing else does: an opt-out that stood before, or that anybody has given since, is not the restriction's and stays.
  Whose it is says the reason of its latest record: that of a restriction names the restriction.
"""

import secrets
import time
from typing import Final, NamedTuple

import orjson

from processors.screen.suppression import parse_key
from schemas.catalog import partition_for
from schemas.fields import PLATFORM
from streams.keys.ledger import Mark, Request, RequestKind
from streams.keys.roles import OFFICER
from streams.officer.erase import accounts_of
from streams.officer.office import Office, Person
from streams.officer.requests import DONE, case, note
from streams.officer.scan import scan
from streams.optout import CHANNELS, Entry, OptOuts
from streams.state.entries import SUPPRESSIONS

STREAM: Final = SUPPRESSIONS.stream
_CLASS: Final = "marketing"
_AUTHORITY: Final = "officer"
_OURS: Final = "restriction/"
_ID_DIGITS: Final = 40 - len(_OURS)
"""A reason has 40 characters at most."""


class Done(NamedTuple):
    """What came of it: restrictions made or ended, opt-outs written or lifted, and the request as it was kept."""

    marks: int
    opt_outs: int
    request: Request


async def object_(office: Office, number: str, account: str | None, reason: str, received_s: int) -> Done:
    """Have a person never marketed to again, by any account or by the one given, on any channel.

    In force for every batch that is prepared after it returns. Idempotent. Raises InputInvalid and what keeps the
    opt-outs from being written. Blocks.
    """
    person = office.person(number, account)
    case(reason, person)
    await _audit(office, "object", person, account, reason)
    written = await _refuse_marketing(office, person, account, reason, anew=True)
    return Done(0, written, _note(office, "object", person, account, reason, received_s))


async def restrict(office: Office, number: str, account: str | None, reason: str, received_s: int) -> Done:
    """Restrict a person's data of the platform, or of an account: it opens to the privacy officer only (REG-1).

    Marketing by anybody, or by that account, is refused meanwhile. Also for what is sealed later. Idempotent: one that
    was killed is finished by running it again. Raises as `object_`. Blocks.
    """
    person = office.person(number, account)
    case(reason, person)
    owner = account or PLATFORM
    marks = restrictions(office, person, owner)
    made = not marks
    mark = (
        Mark(secrets.token_hex(16), "restriction", owner, person.tokens, reason, int(time.time())) if made else marks[0]
    )
    await _audit(office, "restrict", person, account, reason, restriction=mark.id)
    if made or office.deployment.store.ledger.number_of(mark.id) is None:  # a backup may have lost it
        office.deployment.store.ledger.add_mark(mark, person.value)
        office.deployment.store.ledger.retoken(mark.id, person.tokens)
    written = 0
    if _is_served(office, account):
        written = await _refuse_marketing(office, person, account, _reason_of(mark), anew=False)
    return Done(int(made), written, _note(office, "restrict", person, account, reason, received_s))


async def unrestrict(office: Office, number: str, account: str | None, reason: str, received_s: int) -> Done:
    """End a restriction, and exactly what it had refused. Idempotent. Raises as `object_`. Blocks."""
    person = office.person(number, account)
    case(reason, person)
    marks = restrictions(office, person, account or PLATFORM)
    lifted = 0
    for mark in marks:
        await _audit(office, "unrestrict", person, account, reason, restriction=mark.id)
        if _is_served(office, account):
            lifted += await _lift(office, person, account, _reason_of(mark))
        office.deployment.store.ledger.end_mark(mark.id, int(time.time()))
        # its number was destroyed: an entry after that tells a restored store that the log knows of it
        await office.auditor.write("unrestricted", role=OFFICER, reason=reason, restriction=mark.id)
    return Done(len(marks), lifted, _note(office, "unrestrict", person, account, reason, received_s))


def restrictions(office: Office, person: Person, owner: str) -> list[Mark]:
    """Return the restrictions in force of a person in an owner's data. Blocks on the key store."""
    marks = office.deployment.store.ledger.marks("restriction")
    return [mark for mark in marks if mark.owner == owner and set(mark.tokens) & set(person.tokens)]


def _is_served(office: Office, account: str | None) -> bool:
    """Return whether an account, or anybody at all, can market: traffic of one that is not served goes nowhere."""
    return account is None or office.deployment.config.policy.account(account) is not None


def _reason_of(mark: Mark) -> str:
    """Return the reason of the opt-outs that belong to a restriction."""
    return _OURS + mark.id[:_ID_DIGITS]


async def _refuse_marketing(office: Office, person: Person, account: str | None, reason: str, *, anew: bool) -> int:
    """Write the officer's opt-out from marketing, and return how many records that took.

    Where one stands it is written again only with `anew`, and if it is a restriction's, which then does not own it.
    """
    opt_outs, now_s = OptOuts(office.deployment), int(time.time())
    await opt_outs.catch_up()
    entry = _entry(person, account, reason)
    standing = await _standing(office, opt_outs, entry, now_s)
    missing = [channel for channel in CHANNELS if _is_missing(standing.get(channel), anew=anew)]
    return await opt_outs.add([entry._replace(channel=channel) for channel in missing], now_s)


def _is_missing(reason: str | None, *, anew: bool) -> bool:
    return reason is None or (anew and reason.startswith(_OURS))


async def _lift(office: Office, person: Person, account: str | None, reason: str) -> int:
    """Lift those of the officer's opt-outs from marketing whose latest record has this reason; return how many."""
    opt_outs, now_s = OptOuts(office.deployment), int(time.time())
    await opt_outs.catch_up()
    entry = _entry(person, account, reason)
    standing = await _standing(office, opt_outs, entry, now_s)
    ours = [channel for channel in CHANNELS if standing.get(channel) == reason]
    return sum([await opt_outs.remove(entry._replace(channel=channel), now_s) for channel in ours])


def _entry(person: Person, account: str | None, reason: str) -> Entry:
    return Entry(person.value, account or "", class_=_CLASS, authority=_AUTHORITY, reason=reason)


async def _standing(office: Office, opt_outs: OptOuts, entry: Entry, now_s: int) -> dict[str, str]:
    """Return channel → reason of the latest record, of the entries that stand. Reads one partition of the stream."""
    log = office.deployment.log
    changes = {change.rule: change for change in opt_outs.changes(entry, now_s)}
    (token,) = {change.token for change in changes.values()}
    begins, ends = [0] * log.partitions, [0] * log.partitions
    partition = partition_for(token, log.partitions)
    ends[partition] = (await log.end_offsets(STREAM))[partition]
    found: dict[str, str] = {}
    mine = token.hex().encode()
    async for page in scan(log, STREAM, lambda stored: mine in (stored.key or b""), begins=begins, ends=ends):
        for stored in page:
            _, of, rule, out = parse_key(stored.key or b"")
            if of == token and rule in changes:
                if out:
                    found[rule.channel] = orjson.loads(stored.value).get("reason") or ""
                else:
                    found.pop(rule.channel, None)
    return found


async def _audit(office: Office, action: str, person: Person, account: str | None, reason: str, **fields: str) -> None:
    owner = account or PLATFORM
    sids = sorted(office.sids(person, owner))
    await office.auditor.write(action, role=OFFICER, reason=reason, owner=owner, sids=sids, **fields)


def _note(
    office: Office, kind: RequestKind, person: Person, account: str | None, reason: str, received_s: int
) -> Request:
    notify = accounts_of(office, person) if account is None else []
    return note(office, kind, person, account or PLATFORM, reason, received_s, notify, DONE)
