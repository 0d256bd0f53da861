"""What should have been done by now: destructions, people's requests, Do-Not-Call lists that are to be loaded.

Near misses have their clock in `streams.state.reviews`.
"""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from processors.retention import DAY_S
from processors.screen.registry import RegistryView
from schemas.policy import Policy
from streams.keys.store import KeyStore
from streams.watch.watch import Overdue, RegistrySeen

LOOK_EVERY_S = 60.0
LATE_S = 15 * 60
"""A destruction is overdue so long after its instant: the next scheduled run should have done it."""


def overdue(store: KeyStore, now_s: int) -> Overdue:
    """Return what is overdue at `now_s`. Blocks on the key store and its key management service (one call or two).

    Raises what they raise.
    """
    instants = [at_s for _, at_s in store.due_epochs(now_s)]
    instants += [_over_s(day) for day in store.due_days(now_s)]
    return Overdue(
        destructions=sum(at_s + LATE_S < now_s for at_s in instants),
        oldest_s=min(instants, default=None),
        requests=sum(request.is_overdue(now_s) for request in store.ledger.requests()),
        keks=len(store.kms.names()),
    )


def _over_s(day: str) -> int:
    """Return when a day is over, Unix s."""
    midnight = datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=1)
    return int(midnight.timestamp())


def registries_seen(policy: Policy, registries: RegistryView, damaged: Collection[str]) -> list[RegistrySeen]:
    """Return each registry that a policy names, as this process has it."""
    return [
        RegistrySeen(
            rule.name,
            None if (found := registries.get(rule.name)) is None else found.as_of_s,
            rule.max_age_days * DAY_S,
            rule.required,
            rule.name in damaged,
        )
        for rule in policy.screening.registry
    ]
