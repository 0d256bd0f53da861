"""Erasure: a person's secrets of one owner are destroyed, and nothing sealed before opens any more (CAL-6, REG-1).

Rules of this file:
- What is destroyed is in `audit` before it is, by sid; an erasure that was killed is finished by running it again.
- It is effective when it is acknowledged: by then no process alive can commit what it sealed under a destroyed secret
  (the lease protocol), and whatever was under way in the log has come to its end. What is committed later is sealed
  under a new secret and opens.
- An account's exemptions of the person are withdrawn first: what stands clear in them would act on without its proof.
- Opt-outs stand (INF-8). A legal hold of theirs stands in the way, and what is held of others, in whose records they
  may be, is kept first (INF-7): such copies keep their number until that hold is released, and the answer says so.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from schemas.errors import UnderHold
from schemas.fields import PLATFORM
from streams.exemptions import withdraw
from streams.keys.ledger import Mark, Request
from streams.keys.roles import OFFICER
from streams.officer.again import again
from streams.officer.holds import Advance, of_others, preserve, standing_in_the_way
from streams.officer.leases import drained
from streams.officer.office import Office, Person
from streams.officer.requests import DONE, UNDER_HOLD, case, note


class Erased(NamedTuple):
    """An erasure that is done.

    `secrets`: how many were destroyed, one per month of communication. `request`: the request as it was kept, with
    the accounts to be told (INF-9). `backups_until_s`: until then at most (Unix s) a copy of the key store made before
    can open it, together with the key management service; None: nothing was destroyed that one could open. `held`: the
    holds of others in whose copies the person's number stays until they are released (INF-7).
    """

    owner: str
    secrets: int
    sequence: int
    request: Request
    backups_until_s: int | None
    held: list[Mark]


async def erase(
    office: Office,
    number: str,
    account: str | None,
    reason: str,
    received_s: int,
    on_wait: Callable[[list[str]], None],
    advance: Advance,
) -> Erased:
    """Destroy what seals a person's data of the platform, or of an account, and return once that is in effect.

    Idempotent; nobody that is known: nothing destroyed. `received_s`: when it was asked for, Unix s. `on_wait` is told
    the processes waited for: each at most for its key lease. `advance` is told of records looked at, if there are
    holds. Blocks. Raises UnderHold, naming the hold, and InputInvalid; and Retriable errors: not acknowledged
    then, run it again.
    """
    owner = account or PLATFORM
    person = office.person(number, account)
    case(reason, person)
    notify = accounts_of(office, person) if account is None else []
    hold = await standing_in_the_way(office, person, owner, advance)
    if hold is not None:
        request = note(office, "erase", person, owner, reason, received_s, notify, UNDER_HOLD)
        raise UnderHold(
            f"under legal hold {hold.id}, case {hold.reason}: nothing was erased; request {request.id} stays open",
        )
    await preserve(office.deployment, now_s=int(time.time()), advance=advance)
    held = await of_others(office, person, owner, advance)
    store, auditor = office.deployment.store, office.auditor
    known = office.sids(person, owner)
    await auditor.write(
        "erase", role=OFFICER, reason=reason, owner=owner, destroyed={"sids": sorted(known), "epochs": []}
    )
    gone: set[str] = set()
    while True:
        if account is not None:
            await withdraw(office.deployment, account, person.tokens, reason, int(time.time()))
        destroyed = await again(partial(store.destroy_persons, owner, person.tokens))
        gone.update(destroyed.sids)
        await drained(store, destroyed.sequence, on_wait=on_wait)
        now = office.person(number, account)
        if now.tokens == person.tokens:
            break
        person = now  # a rotation of the token key came between
    await auditor.write(
        "erased",
        role=OFFICER,
        reason=reason,
        owner=owner,
        sequence=destroyed.sequence,
        held=[mark.id for mark in held],
        destroyed={"sids": sorted(gone - set(known)), "epochs": []},
    )
    request = note(office, "erase", person, owner, reason, received_s, notify, DONE)
    days = {one.day for one in known.values()}
    stale = [at_s for day, at_s in store.stale_days().items() if day in days]
    until_s = max(stale) + office.deployment.config.rewrap_s + store.kms.waiting_period_s if stale else None
    return Erased(owner, len(gone), destroyed.sequence, request, until_s, held)


def accounts_of(office: Office, person: Person) -> list[str]:
    """Return the accounts that have data of a person, in order (INF-9). Blocks on the key store."""
    return sorted({known.owner for known in office.sids(person).values()} - {PLATFORM})
