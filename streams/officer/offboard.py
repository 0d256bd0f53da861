"""Offboarding of an account whose agreement has ended (CAL-7): its keys die on schedule, by its own hand and owner.

Rules of this file:
- What is sealed for the account is keyed by it: content and near misses die at the termination; its personal CDRs,
  where the platform is its processor, and its secrets of people, which say with whom it spoke, `NUMBERS_KEPT_DAYS`
  days later. Requests on their way out die within a day by themselves.
- Exemptions end with the agreement: they are withdrawn then, and do not open any more once the secrets of people are
  gone. The keys of the months in which they would have ended stay until then, so that an account that comes back can
  have others.
- What the platform controls stays to its own instant (INF-4, INF-5): it is no data of the account.
- The schedule stays until it is cancelled: what is sealed for the account later, such as a late CDR, dies at the next
  look.
- Whatever is destroyed stands in `audit` before; what a legal hold covers is kept before that.
"""

from functools import partial
from typing import Final, NamedTuple

from processors.keyring import EpochRef
from processors.retention import DAY_S, instant
from schemas.catalog import Domain
from schemas.errors import InputInvalid, LogUnusable
from streams.deployment import Deployment
from streams.exemptions import withdraw
from streams.officer import holds
from streams.officer.again import again
from streams.officer.office import SCHEDULE, check_name

NUMBERS_KEPT_DAYS: Final = 20
"""Days from termination to the end of number-related data (CAL-7)."""
AT_ONCE: Final = frozenset({Domain.CONTENT.value, Domain.REVIEW.value})
"""Domains of customer data that end with the agreement."""
_CANCELLED: Final = 0
_LEFT: Final = "offboarded"
_BATCH: Final = 1000
_LOOKED: Final = "offboard-looked/"
"""On which day people's secrets of an account that left were looked for last, by account."""
_WITHDRAWN: Final = "offboard-withdrawn/"
"""For which termination (Unix s) an account's exemptions were withdrawn, by account."""


class Leaving(NamedTuple):
    """An account on its way out: when the agreement ends or ended, and when the last of its keys dies; Unix s."""

    account: str
    terminated_s: int

    @property
    def numbers_die_s(self) -> int:
        """When number-related data dies."""
        return self.terminated_s + NUMBERS_KEPT_DAYS * DAY_S

    def as_json(self) -> dict[str, str]:
        """Return it as one JSON object."""
        return {
            "account": self.account,
            "terminated_at": instant(self.terminated_s),
            "numbers_die_at": instant(self.numbers_die_s),
        }


class Offboarded(NamedTuple):
    """What `offboard` came to: the schedule, and what was destroyed at once: epochs, and secrets of people."""

    leaving: Leaving
    epochs: int
    persons: int


async def offboard(
    deployment: Deployment, account: str, terminated_s: int, now_s: int, *, dry: bool = False
) -> Offboarded:
    """Schedule the end of an account's keys, in place of an earlier schedule, and do at once what is due. Audited.

    `dry`: only say what would be destroyed (of people's secrets, whether there are any).

    What a legal hold covers is kept first; if that cannot be done, that error is raised and nothing is destroyed, but
    the schedule stands. Blocks. Raises InputInvalid for what cannot be an account, or no time of a termination.
    """
    check_name(account)
    if terminated_s <= 0:
        raise InputInvalid("the time of the termination is before any agreement")
    leaving = Leaving(account, terminated_s)
    if dry:
        return Offboarded(leaving, *(await _destroy(deployment, leaving, now_s, dry=True)))
    await deployment.auditor().write(
        "offboard",
        account=account,
        terminated_at=instant(terminated_s),
        numbers_die_at=instant(leaving.numbers_die_s),
        clause="CAL-7",
    )
    deployment.store.ledger.set_progress(SCHEDULE + account, terminated_s)
    if terminated_s <= now_s:
        await holds.preserve(deployment, now_s=now_s)
    await _withdraw(deployment, leaving, now_s)
    return Offboarded(leaving, *await _destroy(deployment, leaving, now_s, dry=False))


async def cancel(deployment: Deployment, account: str) -> bool:
    """End an account's schedule, for it stays or has come back; return whether there was one. Audited. Blocks.

    What was destroyed stays so, and an epoch that is dead is not sealed under again: content of a day that died is not
    stored, and comes back with the next day. Raises InputInvalid for what cannot be an account.
    """
    check_name(account)
    if not any(leaving.account == account for leaving in schedule(deployment)):
        return False
    await deployment.auditor().write("offboard", account=account, terminated_at=None, clause="CAL-7")
    deployment.store.ledger.set_progress(SCHEDULE + account, _CANCELLED)
    return True


def reschedule(deployment: Deployment, account: str, terminated_s: int | None) -> None:
    """Have an account's schedule be as the audit stream has it (Unix s; None: cancelled), without an entry. Blocks.

    For a key store that a backup brought back: nothing is destroyed here.
    """
    ledger = deployment.store.ledger
    if terminated_s is not None or ledger.progress(SCHEDULE + account) is not None:
        ledger.set_progress(SCHEDULE + account, _CANCELLED if terminated_s is None else terminated_s)


def schedule(deployment: Deployment) -> list[Leaving]:
    """Return the accounts that were offboarded or will be, soonest first. Blocks."""
    found = deployment.store.ledger.progresses(SCHEDULE)
    leaving = [Leaving(name.removeprefix(SCHEDULE), at_s) for name, at_s in found.items() if at_s != _CANCELLED]
    return sorted(leaving, key=lambda one: (one.terminated_s, one.account))


class Due(NamedTuple):
    """What a look came to: the accounts that had anything to destroy, and those whose exemptions stand, and why."""

    accounts: tuple[str, ...]
    exempt: dict[str, str]


async def due(deployment: Deployment, now_s: int, *, dry: bool) -> Due:
    """Destroy what is due of accounts that left, or with `dry` only look. Blocks.

    Holds are the caller's to keep first. Who may not write `exemptions` on Kafka, as a worker, leaves those to who may.
    """
    accounts, exempt = [], {}
    for leaving in schedule(deployment):
        try:
            if not dry:
                await _withdraw(deployment, leaving, now_s)
        except LogUnusable as error:
            exempt[leaving.account] = str(error)
        if any(await _destroy(deployment, leaving, now_s, dry=dry)):
            accounts.append(leaving.account)
    return Due(tuple(accounts), exempt)


async def _withdraw(deployment: Deployment, leaving: Leaving, now_s: int) -> None:
    """Withdraw all exemptions of an account that left, once for each termination: what stands clear in them acts."""
    ledger, done = deployment.store.ledger, _WITHDRAWN + leaving.account
    if leaving.terminated_s <= now_s and ledger.progress(done) != leaving.terminated_s:
        await withdraw(deployment, leaving.account, None, _LEFT, now_s)
        ledger.set_progress(done, leaving.terminated_s)


async def _destroy(deployment: Deployment, leaving: Leaving, now_s: int, *, dry: bool) -> tuple[int, int]:
    """Destroy what is due of one account; return how many epochs and secrets of people."""
    if leaving.terminated_s > now_s:
        return 0, 0
    store, auditor = deployment.store, deployment.auditor()
    everything = leaving.numbers_die_s <= now_s
    alive = [
        EpochRef(key.domain, key.owner, key.epoch)
        for key in store.status(now_s)
        if key.owner == leaving.account and key.state != "destroyed" and key.domain != Domain.EXEMPTION
    ]
    refs = [ref for ref in alive if ref.domain in AT_ONCE or (everything and ref.domain != Domain.TRANSIT)]
    today, looked = now_s // DAY_S, _LOOKED + leaving.account
    if everything and not alive and store.ledger.progress(looked) == today:
        return 0, 0  # nobody's secret is made without an epoch, and to look for them all takes a while
    if dry:
        return len(refs), len(next(iter(store.sids_of(leaving.account)), ())) if everything else 0
    for at in range(0, len(refs), _BATCH):
        named = ["/".join(ref) for ref in refs[at : at + _BATCH]]
        await auditor.write("destroy", destroyed={"epochs": named}, why="offboarded", account=leaving.account)
        for ref in refs[at : at + _BATCH]:
            await again(partial(store.destroy_epoch, ref))
    persons, before = 0, -1
    while everything and persons > before:  # until a look finds nobody: what came late may have brought some again
        before = persons
        for sids in store.sids_of(leaving.account):
            await auditor.write("destroy", destroyed={"sids": sids}, why="offboarded", account=leaving.account)
            await again(partial(store.destroy_sids, sids))
            persons += len(sids)
    if everything:
        store.ledger.set_progress(looked, today)
    if refs or persons:  # an entry after the destruction tells a restored store that the log knows of it
        await auditor.write("offboarded", account=leaving.account, epochs=len(refs), persons=persons)
    return len(refs), persons
