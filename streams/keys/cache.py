"""A worker's side of the keys: its lease, and the bounded ring of keys it seals with.

Rules of this file: nothing kept here outlives its deadline, a moved destruction sequence, the lease, or 15 minutes.
The guard is what the log's commit calls at its last moment. Renew the lease between commits, never during one: a
renewal says that nothing sealed under older destructions will be committed any more.
"""

import math
import time
from collections.abc import Callable, Collection
from itertools import chain, islice
from typing import TypeVar

from processors.keyring import EpochRef, KeyRing, Needs, PersonRef
from schemas.errors import KeysChanged, LeaseExpired
from streams.keys.store import Fetched, KeyStore
from streams.keys.wrapping import KEPT_S

RENEW_AFTER_S = 1.0
_DAY_S = 86_400
_K = TypeVar("_K")


def up_s() -> float:
    """Return how long this machine is up, asleep or not, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class KeyLease:
    """A process's right to seal: valid from before a renewal for `duration_s`, by both clocks of this process.

    The store counts from when it got the renewal, by its own clock, so it never thinks that a lease has ended while the
    process still thinks that it holds, as long as both run alike for `duration_s`. `clock` may be set back or forth;
    `steady` (s, from any instant on) is not, and goes on while the machine sleeps.
    """

    def __init__(
        self,
        store: KeyStore,
        process_id: str,
        duration_s: float = 30.0,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = up_s,
    ) -> None:
        self.sequence = -1
        """The destruction sequence as last read; -1 before the first renewal."""
        self.clock = clock
        self._steady = steady
        self._store = store
        self._process_id = process_id
        self._duration_s = duration_s
        self._renewed_steady_s = -math.inf
        self._renewed_s = math.inf
        self._expires_s = -math.inf

    def renew(self) -> None:
        """Extend the lease, and read the destruction sequence: if it moved, guards handed out earlier refuse.

        Blocks on the key store. If it raises (`KeysBusy`, `KeysFull`), the lease runs out when it would have; the
        sequence may have moved all the same.
        """
        now_s, steady_s = self.clock(), self._steady()
        sequence = self._store.renew_lease(self._process_id, self._duration_s, self.sequence)
        if sequence != self.sequence:  # from here on every guard refuses what is older, so the store may know at once
            self.sequence = sequence
            self._store.renew_lease(self._process_id, self._duration_s, sequence)
        self._renewed_s, self._expires_s, self._renewed_steady_s = now_s, now_s + self._duration_s, steady_s

    def valid(self, margin_s: float = 0) -> bool:
        """Return whether the lease holds now and for `margin_s`; a clock moved back before the last renewal ends it."""
        left = self._steady() < self._renewed_steady_s + self._duration_s - margin_s
        return left and self._renewed_s <= self.clock() < self._expires_s - margin_s

    def due(self, now_s: float | None = None) -> bool:
        """Return whether it is time to renew: a second after the last renewal, or the clock was moved back."""
        now_s = self.clock() if now_s is None else now_s
        late = self._steady() >= self._renewed_steady_s + RENEW_AFTER_S
        return late or not self._renewed_s <= now_s < self._renewed_s + RENEW_AFTER_S

    def drop(self) -> None:
        """End the lease here and in the store; idempotent."""
        self._renewed_s, self._expires_s = math.inf, -math.inf
        self._store.drop_lease(self._process_id)


class KeyCache:
    """The keys of the batches at hand. `ring` stays the same object; its contents change in `fetch` only.

    Bounds are passed by one batch at most: entries that the batch at hand needs are never dropped.
    """

    def __init__(
        self,
        store: KeyStore,
        lease: KeyLease,
        max_persons: int = 50_000,
        max_ciphers: int = 100_000,
        max_epochs: int = 20_000,
    ) -> None:
        self.ring = KeyRing()
        self._store = store
        self._lease = lease
        self._max_persons = max_persons
        self._max_ciphers = max_ciphers
        self._max_epochs = max_epochs
        self._sequence: int | None = None  # what the ring is true for; None: it is empty
        self._seals: dict[EpochRef, int] = {}  # still reserved
        self._kept_until_s: dict[PersonRef, float] = {}  # end of the day to which the store keeps a secret at least
        self._since_s = 0  # when the first of what is in the ring was fetched
        self._next_death_s = math.inf  # nothing in the ring dies before
        self._batch_deadline_s = math.inf

    def __repr__(self) -> str:
        return f"KeyCache({self.ring})"

    def fetch(self, needs: Needs, now_s: int) -> KeyRing:
        """Return the ring with all that is needed and alive; asks the store for what is missing, in one call.

        Blocks only if something is missing. Raises what the store raises; the ring then lacks what was missing.
        """
        if self._sequence is not None and (
            self._lease.sequence > self._sequence or not self._since_s <= now_s < self._since_s + KEPT_S
        ):
            self._forget()
        if now_s >= self._next_death_s:
            self._bury(now_s)
        missing = self._missing(needs, now_s)
        while missing.epochs or missing.persons:
            for ref in missing.epochs:  # what the store leaves out from now on is dead
                self.ring.epochs.pop(ref, None)
                self._seals.pop(ref, None)
            got = self._store.fetch(missing, now_s)
            if self._sequence is None:
                self._since_s = now_s
            if self._sequence in (None, got.sequence):
                self._keep(got, missing)
                break
            self._forget()  # a destruction came between: what was kept may be gone
            missing = self._missing(needs, now_s)
        self._trim(needs)
        self._batch_deadline_s = math.inf
        for ref, (_, seals) in needs.epochs.items():
            if ref in self.ring.epochs:
                self._seals[ref] -= seals
                self._batch_deadline_s = min(self._batch_deadline_s, _instant(self.ring.epochs[ref].deadline_s))
        return self.ring

    def guard(self, margin_s: float = 0) -> Callable[[], None]:
        """Return the check for the commit of the batch last fetched for: raises LeaseExpired or KeysChanged.

        `margin_s`: how long after the check the commit may still take effect; the lease has to hold for so long.
        """
        lease, sequence, deadline_s = self._lease, self._sequence, self._batch_deadline_s

        def check() -> None:
            if not lease.valid(margin_s):
                raise LeaseExpired
            if (sequence is not None and lease.sequence > sequence) or lease.clock() >= deadline_s:
                raise KeysChanged

        return check

    def close(self) -> None:
        """Forget all keys and drop the lease; idempotent."""
        self._forget()
        self._lease.drop()

    def _missing(self, needs: Needs, now_s: int) -> Needs:
        """Return what has to be asked for: not there, seals used up, or not kept for long enough."""
        seals, kept_until_s = self._seals, self._kept_until_s
        wanted_s = {  # few deadlines, many people
            deadline_s: _day_end(deadline_s) if deadline_s > now_s else 0 for deadline_s in set(needs.persons.values())
        }
        return Needs(
            {
                ref: need
                for ref, need in needs.epochs.items()
                if seals.get(ref, -1) < need[1] and _instant(need[0]) > now_s
            },
            {
                ref: deadline_s
                for ref, deadline_s in needs.persons.items()
                if kept_until_s.get(ref, 0) < wanted_s[deadline_s]
            },
        )

    def _keep(self, got: Fetched, asked: Needs) -> None:
        self._sequence = got.sequence
        self.ring.epochs |= got.epochs
        self._seals |= got.granted
        self.ring.persons |= got.persons
        ends_s = {ref: _day_end(asked.persons[ref]) for ref in got.persons}
        self._kept_until_s |= ends_s
        deadlines_s = (_instant(epoch.deadline_s) for epoch in got.epochs.values())
        self._next_death_s = min(chain(deadlines_s, ends_s.values(), (self._next_death_s,)))

    def _bury(self, now_s: int) -> None:
        """Drop what is dead at `now_s`, and find out when the next death is."""
        ring = self.ring
        for epoch_ref in [ref for ref, epoch in ring.epochs.items() if _instant(epoch.deadline_s) <= now_s]:
            del ring.epochs[epoch_ref], self._seals[epoch_ref]
        for person_ref in [ref for ref, end_s in self._kept_until_s.items() if end_s <= now_s]:
            del ring.persons[person_ref], self._kept_until_s[person_ref]
        alive = {epoch.id for epoch in ring.epochs.values()}
        for group in [group for group in ring.ciphers if group.epoch not in alive]:
            del ring.ciphers[group]
        deadlines_s = (_instant(epoch.deadline_s) for epoch in ring.epochs.values())
        self._next_death_s = min(chain(deadlines_s, self._kept_until_s.values()), default=math.inf)

    def _trim(self, needs: Needs) -> None:
        """Bring what has passed its bound down to half of it, oldest first; O(1) per entry ever added."""
        ring = self.ring
        for epoch_ref in _oldest(ring.epochs, self._max_epochs, needs.epochs):
            del ring.epochs[epoch_ref], self._seals[epoch_ref]
        for person_ref in _oldest(ring.persons, self._max_persons, needs.persons):
            del ring.persons[person_ref], self._kept_until_s[person_ref]
        ciphers = sum(map(len, ring.ciphers.values()))
        if ciphers > self._max_ciphers:
            for held in ring.ciphers.values():  # the same share of each group
                for sid in list(islice(held, len(held) - len(held) * self._max_ciphers // (2 * ciphers))):
                    del held[sid]

    def _forget(self) -> None:
        for entries in (
            self.ring.epochs,
            self.ring.persons,
            self.ring.ciphers,
            self._seals,
            self._kept_until_s,
        ):
            entries.clear()
        self._sequence = None
        self._next_death_s = math.inf


def _instant(deadline_s: int | None) -> float:
    return math.inf if deadline_s is None else deadline_s


def _day_end(deadline_s: int | None) -> float:
    """Return the first midnight (UTC) at or after a deadline: the store keeps person secrets by whole days."""
    return math.inf if deadline_s is None else -(-deadline_s // _DAY_S) * _DAY_S


def _oldest(entries: Collection[_K], limit: int, keep: Collection[_K]) -> list[_K]:
    """Return what to drop: nothing up to the limit, else all but the newest half of it and what is to be kept."""
    if len(entries) <= limit:
        return []
    return [key for key in islice(entries, len(entries) - limit // 2) if key not in keep]
