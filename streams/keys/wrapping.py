"""How keys are wrapped: under which day and generation, with what AAD, and the ciphers held for it.

Rules of this file: a wrapped key is nonce ‖ AES-256-GCM ciphertext and tag under the wrapping key of a generation. The
AAD names the row, so that no two rows can be swapped and no deadline moved. Text that names a day or a generation has
one width, so that a row never changes its size, and sorts by time.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from processors.keyring import PersonRef
from schemas.errors import KeysUnusable
from schemas.sealed import NONCE_BYTES, SECRET_BYTES, KeyId, framed
from streams.keys.store import NEVER

FOREVER = NEVER.ljust(10)
"""The day `NEVER` as it stands in rows; it sorts after all others."""
GONE = "0000-00-00.0000"
"""What stands in a row instead of a generation when its key is destroyed; it sorts before all others."""
SID_BYTES = 16
WRAPPED_BYTES = NONCE_BYTES + SECRET_BYTES + 16
KEPT_S = 900.0
"""So long a wrapping key is used from memory: a service that is told to stop us does so within this."""

_DAY_WIDTH = 10
_MAX_CIPHERS = 1024
_SEALED_SECRET_BYTES = 1024 + 2
MAX_SECRET_BYTES = _SEALED_SECRET_BYTES - 2


class Ciphers:
    """The wrapping keys in memory: at most 1024, all forgotten 15 minutes after the first of them came.

    `newest` says which generation of a day is the newest; it is true for one destruction sequence only.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.newest: dict[str, str] = {}  # day → generation
        self.held: dict[str, AESGCM] = {}  # generation → wrapping key
        self._clock = clock
        self._since_s = clock()

    def __repr__(self) -> str:
        return f"Ciphers({len(self.held)})"

    def put(self, kek: str, cipher: AESGCM) -> AESGCM:
        """Hold a wrapping key, and return it."""
        if len(self.held) >= _MAX_CIPHERS:
            self.clear()
        if not self.held:
            self._since_s = self._clock()
        self.held[kek] = cipher
        return cipher

    def tick(self) -> None:
        """Forget all if their time is over; a clock that was moved back ends it too."""
        if self.held and not self._since_s <= self._clock() < self._since_s + KEPT_S:
            self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.held.clear()
        self.newest.clear()


# --- days and generations ------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def day_of(deadline_s: int | None) -> str:
    """Return the destruction day of a deadline: the UTC date of the second before it. Days compare as text."""
    return FOREVER if deadline_s is None else today(deadline_s - 1)


def today(now_s: float) -> str:
    """Return the UTC date of an instant; a day before it is over."""
    return datetime.fromtimestamp(int(now_s), UTC).date().isoformat()


def generation(day: str, number: int) -> str:
    """Return what rows say of a generation, `2027-12-01.0001`; numbers from 1 to 9999."""
    if not 1 <= number <= 9999:
        raise ValueError("a day has at most 9999 generations")
    return f"{day.ljust(_DAY_WIDTH)}.{number:04d}"


def day_in(kek: str) -> str:
    """Return the day of a generation, as wide as in rows."""
    return kek[:_DAY_WIDTH]


def next_generation(kek: str) -> str:
    """Return the generation after one."""
    return generation(day_in(kek), int(kek[_DAY_WIDTH + 1 :]) + 1)


def kms_name(kek: str) -> str:
    """Return what the key management service calls a generation: `DAY`, `DAY.2`, and so on."""
    day, number = day_in(kek).rstrip(), int(kek[_DAY_WIDTH + 1 :])
    return day if number == 1 else f"{day}.{number}"


def kms_generation(name: str) -> str:
    """Return which generation a name of the key management service names."""
    day, _, number = name.partition(".")
    return generation(day, int(number or 1))


# --- wrapping ------------------------------------------------------------------------------------------------


def wrap(cipher: AESGCM, key: bytes, aad: bytes) -> bytes:
    """Return a key wrapped, under a fresh nonce."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, key, aad)


def unwrap(cipher: AESGCM, wrapped: bytes, aad: bytes) -> bytes:
    """Return a key that was wrapped. Raises KeysUnusable if the row is not as it was written."""
    try:
        return cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad)
    except (InvalidTag, ValueError) as error:
        raise KeysUnusable("a row of the key store was altered or damaged; restore it from its backup") from error


def padded(value: bytes) -> bytes:
    """Return a small secret as wide as all of them. Raises ValueError if it is longer than 1024 bytes."""
    if len(value) > MAX_SECRET_BYTES:
        raise ValueError("a secret of at most 1024 bytes")
    return (len(value).to_bytes(2, "big") + value).ljust(_SEALED_SECRET_BYTES, b"\0")


def unpadded(value: bytes) -> bytes:
    """Return what `padded` was given."""
    return value[2 : 2 + int.from_bytes(value[:2], "big")]


def token_aad(version: int) -> bytes:
    """Return the AAD of a token key."""
    return framed(b"token", b"%d" % version)


def secret_aad(name: bytes) -> bytes:
    """Return the AAD of a small secret."""
    return framed(b"secret", name)


def epoch_aad(key_id: KeyId, deadline_s: int | None) -> bytes:
    """Return the AAD of an epoch key."""
    deadline = b"" if deadline_s is None else b"%d" % deadline_s
    return framed(b"epoch", *(str(part).encode() for part in key_id), deadline)


def person_aad(ref: PersonRef, sid: bytes) -> bytes:
    """Return the AAD of a person secret."""
    return person_aad_head(ref.owner, ref.month) + sid + ref.token  # sids have one length


@lru_cache(maxsize=4096)
def person_aad_head(owner: str, month: str) -> bytes:
    """Return the part of a person secret's AAD that many share; sid and token follow it."""
    return framed(b"person", owner.encode(), month.encode())


# --- sids ----------------------------------------------------------------------------------------------------


def sid_bytes(text: str) -> bytes | None:
    """Return the bytes of a sid, or None if the text is none (a salt, for instance)."""
    try:
        sid = bytes.fromhex(text)
    except ValueError:
        return None
    return sid if sid.hex() == text and len(sid) == SID_BYTES else None


TokenState = Literal["current", "waiting", "earlier", "deleted"]
"""What a token key is, in seven letters each: a row never changes its size."""
