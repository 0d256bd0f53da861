"""What a key store is: epoch keys, person secrets, token keys, tombstones and leases. One contract suite for all.

Every call blocks (disk, network) and is safe from several processes, on several machines if the store is a server.
All raise `KeysBusy`, `KeysFull`, `KmsUnavailable` or `KmsRefuses` (Retriable: nothing has happened, or what has is
finished by calling again) and `KeysUnusable` (Fatal; the message says what to do).

A `Kms` holds the key-encryption keys (KEK) of each destruction day. The store keeps one random wrapping key per day,
wrapped by that KEK, and wraps epoch keys and person secrets with it, so that KMS calls do not grow with traffic. A day
has generations: `rewrap` makes a new KEK and a new wrapping key, moves what is alive under them, and destroys the old
KEK, so that no copy of the store made before opens what was destroyed since.

The destruction day of a deadline is the UTC date of the second before it: what dies at a midnight is under the day
that ends with it. A day is over, and its KEKs go, at the midnight that ends it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from processors.keyring import EpochKey, EpochRef, Needs, PersonRef, PersonSecret
from schemas.sealed import KeyId
from streams.keys.ledger import Ledger

NEVER = "never"
"""The destruction day of keys without a deadline."""


class Gone(Enum):
    """Why a key is not there: decided by tombstones and the clock, never by a failed tag."""

    DESTROYED = "destroyed"
    ABSENT = "absent"


class TokenKey(NamedTuple):
    """A key under which numbers become tokens: version from 1, 32 bytes."""

    version: int
    key: bytes

    def __repr__(self) -> str:
        return f"TokenKey({self.version})"


class TokenKeys(NamedTuple):
    """The token keys there are.

    `current`: for all that is written and looked up now. `others`: older ones, under whose tokens people are still
    known, and the one that a rotation under way will switch to. `changing`: nothing may be sealed or cleared until
    the rotation is through.
    """

    current: TokenKey
    others: tuple[TokenKey, ...]
    changing: bool


class Fetched(NamedTuple):
    """What `fetch` got, and the destruction sequence it is true for.

    A dead or tombstoned epoch is not in `epochs`. `granted` is the number of seals reserved per epoch key, at
    least what was asked for.
    """

    epochs: dict[EpochRef, EpochKey]
    granted: dict[EpochRef, int]
    persons: dict[PersonRef, PersonSecret]
    sequence: int


class Known(NamedTuple):
    """A person secret that exists: whose it is, the month it is of, its sid, and the day it dies with."""

    owner: str
    month: str
    sid: str
    day: str


class Destroyed(NamedTuple):
    """What a destruction came to: the new destruction sequence, and the sids that are tombstoned now."""

    sequence: int
    sids: tuple[str, ...]


class Buried(NamedTuple):
    """What went with a destruction day: epoch key versions and person secrets."""

    epochs: int
    persons: int


class KeyStatus(NamedTuple):
    """One line of `keys status`: domain, owner, epoch, versions alive, deadline (Unix s), state."""

    domain: str
    owner: str
    epoch: str
    versions: int
    deadline_s: int | None
    state: str  # alive, due, destroyed


class Kms(Protocol):
    """A key management service.

    A KEK is named by its destruction day (`YYYY-MM-DD` or `NEVER`) and generation: `DAY` is the first, `DAY.2` the
    second, and so on.
    """

    @property
    def calls(self) -> int:
        """Requests that went to the service since it was opened."""

    @property
    def check(self) -> bytes:
        """What names the service's root of trust; a store keeps it to notice that it was opened beside another."""

    @property
    def waiting_period_s(self) -> int:
        """So long the service can still undo a deletion; 0: it cannot."""

    def trusts(self, check: bytes) -> bool:
        """Return whether `check` names this service, before or after a rotation of its root that is under way."""

    def wrap(self, name: str, plaintext: bytes) -> bytes:
        """Return the plaintext (at most 4096 bytes) wrapped under a KEK, which is made, durable, if it does not exist.

        What is destroyed is never made again by this.
        """

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """Return what was wrapped. Raises KmsRefuses if the KEK is missing, or is not the one that wrapped it."""

    def destroy(self, name: str) -> None:
        """Delete a KEK for good; idempotent."""

    def names(self) -> list[str]:
        """Return the names of the KEKs there are, in order."""

    def last_destroyed(self, day: str) -> int:
        """Return the highest generation of a day that was destroyed; 0: none, or the day has long been over."""

    @property
    def has_root(self) -> bool:
        """Whether `rotate_root` is this service's to do; else its operators rotate what is below the KEKs."""

    def rotate_root(self) -> None:
        """Replace what the KEKs themselves are wrapped by; killed half-way, calling again finishes it."""

    def counter(self) -> int:
        """Return the destruction counter of the store, kept here so that no backup of the store takes it back."""

    def raise_counter(self, value: int) -> None:
        """Raise the counter to at least `value`, durable on return; it never falls."""

    def close(self) -> None:
        """Free what is held; idempotent."""


KmsMaker = Callable[[str, bool], Kms]
"""Store id, and whether the store is being made (its root of trust is made with it) → its service."""


class KeyStore(Protocol):
    """The keys of one deployment."""

    store_id: str
    kms: Kms

    @property
    def ledger(self) -> Ledger:
        """The officers' tables."""

    def sequence(self) -> int:
        """Return the destruction sequence: it grows with each destruction, re-wrap and change of token key."""

    def now_s(self) -> float:
        """Return the time by the store's clock, Unix s; on a server it is the server's."""

    # --- sealing ----------------------------------------------------------------------------------------------

    def token_keys(self) -> TokenKeys:
        """Return the token keys; the first was made together with the store."""

    def fetch(self, needs: Needs, now_s: int) -> Fetched:
        """Get or create all keys and secrets that are needed; what was created is durable on return.

        The loser of a race gets the winner's secret. An epoch whose deadline is at or before `now_s`, or that has a
        tombstone, is left out and never minted again. When an epoch key version would pass `MAX_SEALS_PER_KEY`, a
        new version is minted. Epoch deadlines are fixed when the key is first minted.
        """

    def renew_lease(self, process_id: str, duration_s: float, seen_sequence: int) -> int:
        """Extend a process's key lease to `duration_s` from now, by the store's clock, and return the sequence.

        `seen_sequence` tells the store which destructions the process has taken note of.
        """

    def drop_lease(self, process_id: str) -> None:
        """End a process's lease at once; idempotent."""

    def leases(self) -> Mapping[str, int]:
        """Return process id → destruction sequence seen, of the leases alive by the store's clock."""

    # --- opening ----------------------------------------------------------------------------------------------

    def open_epochs(self, ids: Iterable[KeyId], now_s: int) -> dict[KeyId, EpochKey | Gone]:
        """Return the keys named, each alive at `now_s`, or why it is gone. Never from a cache."""

    def open_persons(self, sids: Iterable[str], now_s: int) -> dict[str, PersonSecret | Gone]:
        """Return the secrets named by sid (32 hex digits), each alive at `now_s`, or why it is gone.

        Never from a cache.
        """

    def persons_of(self, tokens: Sequence[bytes], as_of_s: int | None = None) -> list[Known]:
        """Return the secrets of a person, known by these tokens (one per token key), by owner and month.

        Those whose day was not over at `as_of_s` (Unix s), by default now.
        """

    def restricted(self, sids: Iterable[str]) -> set[str]:
        """Return those of the sids whose person's data is restricted, for the owner of the secret (REG-1, Art. 18)."""

    # --- destruction ------------------------------------------------------------------------------------------

    def destroy_epoch(self, ref: EpochRef) -> int:
        """Delete all versions of an epoch key, leave a tombstone, and return the new destruction sequence.

        Also where the store never had that epoch. On return the KMS counter is at least that sequence.
        """

    def destroy_persons(self, owner: str, tokens: Sequence[bytes]) -> Destroyed:
        """Delete an owner's secrets of a person, known by these tokens, whatever the month.

        The mapping from the person to their sids goes too; the sids keep a tombstone. Counter as `destroy_epoch`.
        """

    def destroy_sids(self, sids: Iterable[str]) -> Destroyed:
        """Delete secrets named by sid; one that is not there gets its tombstone all the same."""

    def due_epochs(self, now_s: int) -> list[tuple[EpochRef, int]]:
        """Return the epochs whose deadline (Unix s) is at or before `now_s` and whose keys are still there, by it."""

    def sids_of(self, owner: str) -> Iterator[list[str]]:
        """Yield the sids of all secrets of an owner, some thousand at a time, which may be destroyed in between.

        Reads through everybody's: seconds per million.
        """

    def due_days(self, now_s: int) -> list[str]:
        """Return the destruction days that are over at `now_s` and not buried yet, oldest first."""

    def bury_day(self, day: str, now_s: int) -> Buried:
        """Delete all that is wrapped under a day that is over at `now_s`, then its KEKs; idempotent.

        Killed half-way, calling again finishes it. Epochs get a tombstone; sids need none, for what they sealed is
        under epochs that are dead. Raises ValueError for `NEVER` and for a day that is not over; `AT_WILL` may be given
        up where the service lacks its KEK.
        """

    def rewrap(self, day: str) -> int:
        """Move what is alive under a day to a new generation, destroy the old KEK; return the rows moved.

        What was destroyed before the call opens by no older copy of the store after it, even if the call had to finish
        a re-wrap that was killed. Works in steps that hold no lock for long. Nobody has to stop.
        """

    def stale_days(self) -> dict[str, int]:
        """Return days under which something was destroyed before its day → Unix s of the first such destruction.

        An older copy of the store can open that until the day is re-wrapped.
        """

    def lost(self) -> list[str]:
        """Return the KEKs that keys of the store are under and the service lacks, in order: those open no more.

        So it is after a KEK was deleted behind the store's back, and in a copy of the store from before a re-wrap.
        """

    # --- upkeep -----------------------------------------------------------------------------------------------

    def rotate_root(self) -> None:
        """Rotate the root of the KMS and take note of it; killed half-way, calling again finishes it."""

    def add_token_key(self) -> TokenKey:
        """Make the token key that a rotation will switch to, or return the one that is waiting for that."""

    def hold_tokens(self, version: int) -> int:
        """Begin the switch to the token key of this version, which is waiting: `changing` is set.

        The destruction sequence moves, and is returned. Idempotent. Raises TokensChange if that key is not waiting:
        another process has rotated meanwhile.
        """

    def switch_tokens(self, version: int) -> int:
        """End the switch: the waiting token key is current, `changing` is off, the sequence moves. Idempotent.

        Raises TokensChange if the key of this version is neither waiting, after `hold_tokens`, nor current.
        """

    def destroy_token_key(self, version: int) -> None:
        """Delete an older token key that no person is known under any more. Raises ValueError otherwise."""

    def secret(self, name: str) -> bytes | None:
        """Return a small secret kept beside the keys (at most 1024 bytes)."""

    def put_secret(self, name: str, value: bytes, day: str = NEVER) -> None:
        """Keep a small secret, wrapped under a day; replaces one of the same name."""

    def drop_secret(self, name: str) -> None:
        """Delete a small secret; idempotent."""

    def status(self, now_s: int) -> list[KeyStatus]:
        """Return the epoch keys, tombstones included, by domain, owner and epoch."""

    def catch_up(self) -> None:
        """Raise an outdated store's sequence to the KMS counter, after its destructions were done again."""

    def close(self) -> None:
        """Free what is held; idempotent."""
