"""Seal: plaintexts → sealed values, and the entropy of one attempt.

32 fresh bytes from the operating system per attempt, given in by the shell, are expanded into three separate
streams (nonces, salt, shuffle); they are never derived from input, never reused, never stored.
"""

import struct
from collections.abc import Sequence
from typing import TypeVar

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from processors.keyring import EpochKey, KeyRing, PersonSecret
from schemas.sealed import (
    NO_PERSON,
    NONCE_BYTES,
    SALT_BYTES,
    SEAL_ID_BYTES,
    aad_head,
    assemble,
    framed,
    part_head,
    seal_box,
)

ENTROPY_BYTES = 32
_DRAW_BYTES = SEAL_ID_BYTES + NONCE_BYTES
_CHUNK = 1024
_T = TypeVar("_T")


class _Stream:
    """An AES-256-CTR keystream under a key derived from the seed for one purpose."""

    __slots__ = ("_encryptor",)

    def __init__(self, seed: bytes, purpose: bytes) -> None:
        key = HKDF(SHA256(), 32, None, b"streamveil entropy " + purpose).derive(seed)
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def take(self, size: int) -> bytes:
        return self._encryptor.update(bytes(size))


class Entropy:
    """The randomness of one attempt; the same seed gives the same bytes."""

    __slots__ = ("_drawn", "_nonces", "_shuffle", "_used", "salt")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != ENTROPY_BYTES:
            raise ValueError("a seed has 32 bytes")
        self._nonces = _Stream(seed, b"nonce")
        self._shuffle = _Stream(seed, b"shuffle")
        self.salt = _Stream(seed, b"salt").take(SALT_BYTES)
        self._drawn = b""
        self._used = 0

    def draw(self) -> bytes:
        """Return 28 bytes never returned before: seal id ‖ nonce."""
        at = self._used
        if at == len(self._drawn):
            self._drawn = self._nonces.take(_DRAW_BYTES * _CHUNK)
            at = 0
        self._used = at + _DRAW_BYTES
        return self._drawn[at : at + _DRAW_BYTES]

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        """Return the items in a random order (by 64-bit random keys; each order as likely to within 2^-40)."""
        keys = struct.unpack(f"{len(items)}Q", self._shuffle.take(8 * len(items)))
        return [items[at] for at in sorted(range(len(items)), key=keys.__getitem__)]

    def below(self, bound: int) -> int:
        """Return a random number from 0 to `bound` - 1."""
        return int.from_bytes(self._shuffle.take(8), "big") % bound


class Sealer:
    """Seals values of one stream, account and epoch key: everything constant is rendered once."""

    __slots__ = ("_account", "_entropy", "_epoch", "_groups", "_key_frame", "_owner", "_ring", "_salt", "_stream")

    def __init__(self, ring: KeyRing, entropy: Entropy, stream: str, account: str, epoch: EpochKey) -> None:
        self._ring = ring
        self._entropy = entropy
        self._epoch = epoch
        self._stream = stream
        self._owner = epoch.id.owner
        self._account = account
        self._key_frame = framed(str(epoch.id).encode())
        self._salt = "salt:" + entropy.salt.hex()
        self._groups: dict[str, tuple[bytes, bytes]] = {}

    def _constants(self, group: str) -> tuple[bytes, bytes]:
        found = self._groups.get(group)
        if found is None:
            head = aad_head(self._stream, self._owner, self._account, group)
            found = self._groups[group] = (head, part_head(group, str(self._epoch.id)))
        return found

    def one(
        self, head: bytes, tail: bytes, group: str, person: PersonSecret | None, plaintext: bytes, *, bare: bool = False
    ) -> bytes:
        """Return the sealed value of a record with one part, under a person secret or else the batch's salt.

        `bare` takes neither: for the domain whose entries must outlive the person's secrets.
        """
        cipher, sid = self._cipher(person, bare=bare)
        aad, part = self._constants(group)
        part = part + sid + b'"}'
        box = seal_box(cipher, aad, sid, self._key_frame, head + part + tail, plaintext, self._entropy.draw())
        return b"".join((head, b'{"box":"', box, b'",', part[1:], tail))

    def several(
        self, head: bytes, tail: bytes, parts: Sequence[tuple[str, PersonSecret | None, bytes]]
    ) -> bytes:
        """Return the sealed value of a record with several parts, each (group, person, plaintext)."""
        prepared = []
        for group, person, plaintext in parts:
            cipher, sid = self._cipher(person)
            aad, part = self._constants(group)
            prepared.append((cipher, sid, aad, part + sid + b'"}', plaintext))
        envelope = head + b",".join([part for _, _, _, part, _ in prepared]) + tail
        boxes = [
            (part, seal_box(cipher, aad, sid, self._key_frame, envelope, plaintext, self._entropy.draw()))
            for cipher, sid, aad, part, plaintext in prepared
        ]
        return assemble(head, boxes, tail)

    def _cipher(self, person: PersonSecret | None, *, bare: bool = False) -> tuple[AESGCM, bytes]:
        if person is not None:
            sid, secret = person
        elif bare:
            sid, secret = NO_PERSON, b""
        else:
            sid, secret = self._salt, self._entropy.salt
        return self._ring.cipher(self._epoch, sid, secret, self._account), sid.encode()
