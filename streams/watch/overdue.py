"""What should have been done by now: destructions whose instant has passed, people's requests whose clock ran out."""

from datetime import UTC, datetime, timedelta

from streams.keys.store import KeyStore
from streams.watch.watch import Overdue

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
