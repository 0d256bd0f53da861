"""What a key store is: epoch keys, person secrets, token key, tombstones and leases. One contract suite for all.

Every call blocks (disk, network) and is safe from several processes. All raise `KeysBusy` or `KeysFull`
(Retriable: nothing has happened) and `KeysUnusable` (Fatal; the message says what to do).

A `Kms` holds one key-encryption key (KEK) per destruction day. The store keeps one random wrapping key per day,
wrapped by that KEK, and wraps epoch keys and person secrets with it, so that KMS calls do not grow with traffic.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple, Protocol

from processors.keyring import EpochKey, EpochRef, Needs, PersonRef, PersonSecret
from schemas.sealed import KeyId

NEVER = "never"
"""The destruction day of keys without a deadline."""


class Gone(Enum):
    """Why a key is not there: decided by tombstones and the clock, never by a failed tag."""

    DESTROYED = "destroyed"
    ABSENT = "absent"


class TokenKey(NamedTuple):
    """The key under which numbers become tokens: version from 1, 32 bytes."""

    version: int
    key: bytes

    def __repr__(self) -> str:
        return f"TokenKey({self.version})"


class Fetched(NamedTuple):
    """What `fetch` got, and the destruction sequence it is true for.

    A dead or tombstoned epoch is not in `epochs`. `granted` is the number of seals reserved per epoch key, at
    least what was asked for.
    """

    epochs: dict[EpochRef, EpochKey]
    granted: dict[EpochRef, int]
    persons: dict[PersonRef, PersonSecret]
    sequence: int


class KeyStatus(NamedTuple):
    """One line of `keys status`: domain, owner, epoch, versions alive, deadline (Unix s), state."""

    domain: str
    owner: str
    epoch: str
    versions: int
    deadline_s: int | None
    state: str  # alive, due, destroyed


class Kms(Protocol):
    """A key management service with one KEK per destruction day (`YYYY-MM-DD` or `NEVER`)."""

    def wrap(self, day: str, plaintext: bytes) -> bytes:
        """Return the plaintext wrapped under the day's KEK, which is made durable first if it does not exist."""

    def unwrap(self, day: str, wrapped: bytes) -> bytes:
        """Return what was wrapped. Raises KeysUnusable if the KEK is missing, or is not the one that wrapped it."""

    def destroy(self, day: str) -> None:
        """Delete the day's KEK for good; idempotent."""

    def days(self) -> list[str]:
        """Return the days that have a KEK, in order."""


class KeyStore(Protocol):
    """The keys of one deployment."""

    store_id: str

    def token_key(self) -> TokenKey:
        """Return the newest token key, made together with the store."""

    def fetch(self, needs: Needs, now_s: int) -> Fetched:
        """Get or create all keys and secrets that are needed; what was created is durable on return.

        The loser of a race gets the winner's secret. An epoch whose deadline is at or before `now_s`, or that has a
        tombstone, is left out and never minted again. When an epoch key version would pass `MAX_SEALS_PER_KEY`, a
        new version is minted. Epoch deadlines are fixed when the key is first minted.
        """

    def renew_lease(self, process_id: str, expires_s: float, seen_sequence: int) -> int:
        """Extend a process's key lease to `expires_s` (Unix s) and return the current destruction sequence.

        `seen_sequence` tells the store which destructions the process has taken note of.
        """

    def drop_lease(self, process_id: str) -> None:
        """End a process's lease at once; idempotent."""

    def leases(self, now_s: float) -> Mapping[str, int]:
        """Return process id → destruction sequence seen, of the leases alive at `now_s`."""

    def open_epochs(self, ids: Iterable[KeyId], now_s: int) -> dict[KeyId, EpochKey | Gone]:
        """Return the keys named, each alive at `now_s`, or why it is gone. Never from a cache."""

    def open_persons(self, sids: Iterable[str]) -> dict[str, PersonSecret | Gone]:
        """Return the secrets named by sid (32 hex digits), or why each is gone. Never from a cache."""

    def destroy_epoch(self, ref: EpochRef) -> int:
        """Delete all versions of an epoch key, leave a tombstone, and return the new destruction sequence."""

    def destroy_person(self, owner: str, token: bytes) -> int:
        """Delete an owner's secrets of a person and return the new destruction sequence.

        The mapping from the person to their sids goes too; the sids keep a tombstone.
        """

    def status(self, now_s: int) -> list[KeyStatus]:
        """Return the epoch keys, tombstones included, by domain, owner and epoch."""

    def close(self) -> None:
        """Free what is held; idempotent."""
