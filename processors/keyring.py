"""What a batch needs from the key store, and the ring of keys it gets: plain values, no I/O.

`prepare` collects a `Needs`; the shell fetches it in one call (streams/keys/cache.py) into a `KeyRing`; `complete`
only looks up.
"""

from typing import NamedTuple

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from schemas.sealed import KeyId


class EpochRef(NamedTuple):
    """Which epoch key: domain, owner (an account id or `PLATFORM`), epoch (`2026-11`, `2026-11-21`, …, or `-`)."""

    domain: str
    owner: str
    epoch: str


class PersonRef(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """Which person secret: owner, 16-byte token of the person, month of the communication (`2026-11`)."""

    owner: str
    token: bytes
    month: str

    def __repr__(self) -> str:
        return "PersonRef()"


class EpochKey(NamedTuple):
    """An epoch key: its id, 32 bytes, and the instant (Unix seconds) from which it is dead; None: no deadline."""

    id: KeyId
    key: bytes
    deadline_s: int | None

    def __repr__(self) -> str:
        return f"EpochKey({self.id})"


class PersonSecret(NamedTuple):
    """A person secret: its random id (32 hex digits) and 32 bytes."""

    sid: str
    secret: bytes

    def __repr__(self) -> str:
        return "PersonSecret()"


class CipherGroup(NamedTuple):
    """Whose record ciphers differ by nothing but the person: those of one epoch key and one account."""

    epoch: KeyId
    account: str


class Needs(NamedTuple):
    """What a batch needs. Values: deadline in Unix seconds (epochs: None for none), and the number of seals."""

    epochs: dict[EpochRef, tuple[int | None, int]]
    persons: dict[PersonRef, int]


class KeyRing:
    """Keys and secrets in memory, with the record ciphers derived from them.

    `epochs` lacks an epoch that is dead: nothing is sealed under it any more. `ciphers` are kept by group and then
    by sid (or salt). Bounded by its owner (the cache).
    """

    __slots__ = ("ciphers", "epochs", "persons")

    def __init__(self) -> None:
        self.epochs: dict[EpochRef, EpochKey] = {}
        self.persons: dict[PersonRef, PersonSecret] = {}
        self.ciphers: dict[CipherGroup, dict[str, AESGCM]] = {}

    def __repr__(self) -> str:
        return f"KeyRing({len(self.epochs)} epochs, {len(self.persons)} persons)"
