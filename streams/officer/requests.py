"""People's requests and their clocks (CAL-4): accounts told within 24 hours, done within 15 days.

Rules of this file:
- A request names no person: its kind, whose data it is about, a case reference, the accounts to be told, and clocks.
- It is closed once it has come to an end and every account is told; until then each clock runs by itself.
- What a person asks again goes on with the request that is open: same kind, owner and case. That it is the same person
  shows in the request's id, a hash under the person's token, and nowhere else.
- Clocks count from when the request was received, which may be before anybody wrote it down.
"""

import re
import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, get_args

from schemas.errors import InputInvalid
from schemas.fields import is_reason
from streams.keys.ledger import ENDS, Ledger, Request, RequestKind
from streams.keys.roles import OFFICER
from streams.officer.office import Finder, Office, Person

NOTICE_S: Final = 24 * 3600
DUE_S: Final = 15 * 86_400
DONE: Final = "done"
UNDER_HOLD: Final = "refused:held"
"""Refused for as long as a legal hold is in force; the clock runs on."""
_CHANGES_NOTHING: Final[frozenset[RequestKind]] = frozenset({"access", "export"})
_PREFIX = re.compile(r"[0-9a-f]{6,32}")


def case(reason: str, person: Person | None = None) -> None:
    """Raise InputInvalid unless a reason is a code or case reference, without the person's number in any spelling."""
    if not is_reason(reason):
        raise InputInvalid(
            "the reason must be a code or case reference: at most 40 letters, digits, - _ /, not 7 digits alone"
        )
    if person is not None and Finder(person.value).found(reason.replace("_", "-")):
        raise InputInvalid("the reason must be a code or case reference, and not the person's number")


def note(
    office: Office,
    kind: RequestKind,
    person: Person,
    owner: str,
    reason: str,
    received_s: int,
    notify: Sequence[str],
    outcome: str,
) -> Request:
    """Return a person's request, kept with its clocks; it stays open unless it is done and there is nobody to tell.

    The open one of the same kind, owner and case goes on: its clocks run from the earlier of both, and who was told
    stays told. To know and to take along changes nothing, so an account that a request of the same case names already
    is not told of it once more.

    `owner`: the platform or an account, whose data it is about. `received_s`: Unix s, not ahead of the clock.
    `notify`: the accounts to be told (INF-9). `outcome`: `DONE`, or a code of why it is not. Blocks on the key store.
    """
    now_s = int(time.time())
    received_s = min(received_s, now_s)
    ledger = office.deployment.store.ledger
    of_case = [one for one in ledger.requests(closed=True) if (one.owner, one.reason) == (owner, reason)]
    theirs = {_id(person, each, owner, reason, n) for each in get_args(RequestKind) for n in range(len(of_case))}
    of_case = [one for one in of_case if one.id in theirs]
    goes_on = next((one for one in of_case if one.kind == kind and one.closed_s is None), None)
    if kind in _CHANGES_NOTHING:
        asked = {account for one in of_case for account in one.notify}
        notify = [account for account in notify if account not in asked]
    if goes_on is not None:
        received_s = min(received_s, goes_on.received_s)
        told = {**dict.fromkeys(notify), **goes_on.notify}
        request = goes_on._replace(
            received_s=received_s, notice_due_s=received_s + NOTICE_S, due_s=received_s + DUE_S, notify=told,
            outcome=outcome,
        )  # fmt: skip
        return _keep(office, request, now_s)
    request = Request(
        id=_id(person, kind, owner, reason, sum(one.kind == kind for one in of_case)),
        kind=kind,
        owner=owner,
        reason=reason,
        received_s=received_s,
        notice_due_s=received_s + NOTICE_S,
        due_s=received_s + DUE_S,
        notify=dict.fromkeys(notify),
        outcome=outcome,
    )
    return _keep(office, request, now_s)


def _id(person: Person, kind: RequestKind, owner: str, reason: str, number: int) -> str:
    """Return the id of a person's request, the `number`th of its kind, owner and case from 0: 32 hex digits."""
    text = "|".join((kind, owner, reason, str(number)))
    return blake2b(text.encode(), key=person.tokens[0], digest_size=16).hexdigest()


async def tell(office: Office, name: str, account: str | None) -> Request:
    """Note that an account, or all accounts of a request, were told now; return the request. Audited.

    Raises InputInvalid if there is no such open request, or the account is none of those to be told. Blocks.
    """
    now_s = int(time.time())
    request = find(office.deployment.store.ledger, name)
    if account is not None and account not in request.notify:
        raise InputInvalid("this account is none of those to be told")
    told = [one for one, at_s in request.notify.items() if at_s is None and account in (None, one)]
    if not told:
        return request
    await office.auditor.write("told", role=OFFICER, reason=request.reason, request=request.id, accounts=told)
    notify = {one: now_s if one in told else at_s for one, at_s in request.notify.items()}
    return _keep(office, request._replace(notify=notify), now_s)


async def close(office: Office, name: str, outcome: str) -> Request:
    """End a request, done or refused for good (`ENDS`), and return it; open while an account is to be told. Audited.

    Raises InputInvalid if there is no such open request. Blocks.
    """
    if outcome not in ENDS:
        raise InputInvalid(f"a request ends as {' or '.join(ENDS)}")
    request = find(office.deployment.store.ledger, name)
    await office.auditor.write("close", role=OFFICER, reason=request.reason, request=request.id, outcome=outcome)
    return _keep(office, request._replace(outcome=outcome), int(time.time()))


def find(ledger: Ledger, name: str) -> Request:
    """Return the open request of an id, or of its first six digits or more. Raises InputInvalid. Blocks."""
    if not _PREFIX.fullmatch(name):
        raise InputInvalid("REQUEST is its id, or the first six or more of its hexadecimal digits")
    found = [request for request in ledger.requests() if request.id.startswith(name)]
    if len(found) != 1:
        why = "more than one open request begins so" if found else "no open request has this id"
        raise InputInvalid(f"{why}; see subject requests")
    return found[0]


def overdue(ledger: Ledger, now_s: int) -> int:
    """Return how many requests are overdue: not done, or an account not told, in time. Blocks on the key store."""
    return sum(request.is_overdue(now_s) for request in ledger.requests())


def listed(ledger: Ledger, *, closed: bool) -> list[Request]:
    """Return the open requests, or with `closed` all, by when their next clock runs out, closed ones last. Blocks."""

    def due(request: Request) -> tuple[bool, int]:
        closed = request.closed_s is not None
        return closed, request.due_s if closed else request.next_due_s or request.due_s

    return sorted(ledger.requests(closed=closed), key=due)


def _keep(office: Office, request: Request, now_s: int) -> Request:
    """Keep a request, closed if nothing is left to be done."""
    if request.ended and not request.untold:
        request = request._replace(closed_s=now_s)
    office.deployment.store.ledger.put_request(request)
    return request
