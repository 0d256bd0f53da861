"""The key-encryption keys: how many there are and may be, what an older backup still opens, and their rotation."""

from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from processors.plan import Planner
from processors.retention import DAY_S
from schemas.policy import Policy
from streams.config import Config
from streams.deployment import Deployment
from streams.keys.ledger import AT_WILL
from streams.keys.store import NEVER, KeyStore, TokenKeys
from streams.officer import holds, retention
from streams.officer.office import office
from streams.officer.rotation import Rotated, drop_old_tokens, rotate_tokens

LATE_DAYS = 3660
"""No record is older that leaves anything behind (INF-5)."""


class Stale(NamedTuple):
    """A destruction day under which something was destroyed early: an older backup opens it until `until_s`."""

    day: str
    since_s: int
    until_s: int


class Inventory(NamedTuple):
    """What there is beside the epoch keys.

    `keks`: alive, all generations. `days`: destruction days that have one. `most_days`: so many this policy can make.
    `rewrap_s` and `waiting_s`: so long at most a backup opens what was destroyed early, and what the service can undo.
    """

    sequence: int
    counter: int
    keks: int
    days: tuple[str, ...]
    most_days: int
    tokens: TokenKeys
    leases: int
    lost: tuple[str, ...]  # KEKs that keys are under and the service lacks
    stale: tuple[Stale, ...]
    rewrap_s: int
    waiting_s: int


def inventory(config: Config, store: KeyStore, now_s: int) -> Inventory:
    """Return what `keys status` shows beside the epoch keys. Blocks on the store and its key management service."""
    names = store.kms.names()
    waiting_s = store.kms.waiting_period_s
    return Inventory(
        store.sequence(),
        store.kms.counter(),
        len(names),
        tuple(sorted({day_of(name) for name in names})),
        len(destruction_days(config.policy, now_s)),
        store.token_keys(),
        len(store.leases()),
        tuple(store.lost()),
        tuple(
            Stale(day, since_s, since_s + config.rewrap_s + waiting_s)
            for day, since_s in sorted(store.stale_days().items())
        ),
        config.rewrap_s,
        waiting_s,
    )


def day_of(kek: str) -> str:
    """Return the destruction day of a KEK's name, be it `DAY`, `DAY.2` or another generation."""
    return kek.partition(".")[0]


def destruction_days(policy: Policy, now_s: int) -> set[str]:
    """Return the destruction days that keys of this policy, made up to now, can be under: so many KEKs at most.

    A day has one more while it is re-wrapped.
    """
    accounts = {account.content: account.id for account in policy.listed}
    if policy.accounts.any:
        accounts.setdefault(None, "any")
    ahead = behind = 2  # times up to 48 h ahead are taken
    while behind > -LATE_DAYS and any(at_s > now_s for at_s in _deadlines(Planner(policy), accounts, now_s, behind)):
        behind -= 31
    planner = Planner(policy)
    deadlines_s: set[int] = set()
    for day in range(behind, ahead + 1):
        deadlines_s |= _deadlines(planner, accounts, now_s, day)
    for stream in ("cleared", "quarantine"):
        for ago in range(8):
            deadlines_s.add(planner.output(stream, "", now_s - ago * DAY_S).deadline_s or 0)
    days = {_date(deadline_s - 1) for deadline_s in deadlines_s if deadline_s > now_s}
    return {*days, AT_WILL, NEVER}


def _deadlines(planner: Planner, accounts: Mapping[str | None, str], now_s: int, day: int) -> set[int]:
    """Return when what is sealed for communications of a day, counted from today, dies; Unix s."""
    found: set[int] = set()
    for account in accounts.values():
        plan = planner.plan(account, now_s + day * DAY_S)
        if plan is not None:
            found |= {plan.moment.pii_expires_s, plan.content_expires_s, plan.review_expires_s}
            found.update(plan.circle.deadlines_s.values())
    return found


def _date(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).date().isoformat()


def rewrap_all(deployment: Deployment, now_s: int, advance: Callable[[int], None] = lambda _: None) -> int:
    """Re-wrap every day alive under a new KEK and wrapping key; return the rows moved. Blocks; workers go on.

    `advance` is told of rows. Killed half-way, calling again does all of it again, which harms nothing.
    """
    store = deployment.store
    over = set(store.due_days(now_s))
    rows = 0
    for day in sorted({day_of(name) for name in store.kms.names()} - over):
        moved = store.rewrap(day)
        rows += moved
        advance(moved)
    return rows


PARTS = ("root", "wrapping", "token")


class Renewed(NamedTuple):
    """What `rotate` did; None: not asked for. `destroyed`: versions of older token keys."""

    root: bool
    rewrapped: int | None
    token: Rotated | None
    destroyed: tuple[int, ...]


async def rotate(
    deployment: Deployment,
    parts: Collection[str],
    now_s: int,
    advance: Callable[[int], None],
    on_wait: Callable[[list[str]], None],
) -> Renewed:
    """Rotate `root`, `wrapping` and `token`, those of them that are asked for; none: all. Audited. Workers go on.

    Nothing that is sealed is sealed anew. Killed half-way, calling again finishes it. Raises RevealDenied to all but
    the privacy officer, and as `rotate_tokens` and the store do. What the root and wrapping keys of before wrapped
    opens by no copy of them from then on, so older backups of the store do not open what was moved either.
    """
    auditor, kms = office(deployment).auditor, deployment.store.kms
    parts = set(parts or PARTS) - (set() if parts or kms.has_root else {"root"})
    await auditor.write("rotate", parts=sorted(parts))
    if "root" in parts:
        deployment.store.rotate_root()
    token = await rotate_tokens(deployment, advance=advance, on_wait=on_wait) if "token" in parts else None
    dropped = await drop_old_tokens(deployment)
    rewrapped = rewrap_all(deployment, now_s, advance) if "wrapping" in parts else None
    await auditor.write("rotated", parts=sorted(parts), rewrapped=rewrapped)
    return Renewed("root" in parts, rewrapped, token, tuple(dropped))


async def destroy_due(deployment: Deployment, now_s: int, *, dry: bool) -> retention.Died:
    """Destroy the keys that are due, after what a legal hold covers was kept; `dry`: only say which. Blocks.

    The part of a retention run that is about keys: no log is cut. Raises RevealDenied ahead of the clock (`permit`),
    and what keeps held records from being kept; then nothing was destroyed.
    """
    retention.permit(deployment, now_s, dry=dry)
    if not dry:
        await holds.preserve(deployment, now_s=now_s)
    died = await retention.destroy_due(deployment, now_s, dry=dry)
    if not dry and any(died):  # an entry after the destruction tells a restored store that the log knows of it
        await deployment.auditor().write("destroyed", epochs=died.epochs, persons=died.persons, days=list(died.days))
    return died
