"""Seal: plaintexts → sealed values, and the entropy of one attempt.

32 fresh bytes from the operating system per attempt, given in by the shell, are expanded into three separate
streams (nonces, salt, shuffle); they are never derived from input, never reused, never stored.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple, TypeVar

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pybase64 import b64encode

from processors.keyring import EpochKey, KeyRing, PersonSecret
from schemas.sealed import (
    NO_PERSON,
    NONCE_BYTES,
    PADDING,
    SALT_BYTES,
    SEAL_ID_BYTES,
    aad_head,
    framed,
    key_info,
    part_head,
    record_key,
    seal_box,
)

ENTROPY_BYTES = 32
_DRAW = struct.Struct(f"{SEAL_ID_BYTES}s{NONCE_BYTES}s")
_DRAWS = 1024
_SID_CHARS = 32
_SID_SIZE = _SID_CHARS.to_bytes(4, "big")
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
    """The randomness of one attempt; the same seed gives the same bytes. `draws` never gives a pair twice."""

    __slots__ = ("_shuffle", "draws", "salt")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != ENTROPY_BYTES:
            raise ValueError("a seed has 32 bytes")
        nonces = _Stream(seed, b"nonce")
        self._shuffle = _Stream(seed, b"shuffle")
        self.salt = _Stream(seed, b"salt").take(SALT_BYTES)
        chunks = map(nonces.take, repeat(_DRAW.size * _DRAWS))
        self.draws: Iterator[tuple[bytes, bytes]] = chain.from_iterable(map(_DRAW.iter_unpack, chunks))
        """Pairs of a seal id and a nonce, without end."""

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        """Return the items in a random order (by 64-bit random keys; each order as likely to within 2^-40)."""
        keys = struct.unpack(f"{len(items)}Q", self._shuffle.take(8 * len(items)))
        return [items[at] for at in sorted(range(len(items)), key=keys.__getitem__)]

    def below(self, bound: int) -> int:
        """Return a random number from 0 to `bound` - 1."""
        return int.from_bytes(self._shuffle.take(8), "big") % bound


Frame = tuple[bytes, bytes]
"""What of a value comes before the sid in the AAD, and before the box in the value."""


class OnePart(NamedTuple):
    """How values of one part are sealed: `seal(frame(envelope head), person or None for the salt, plaintext)`."""

    frame: Callable[[bytes], Frame]
    seal: Callable[[Frame, PersonSecret | None, bytes], bytes]


class Sealer:
    """Seals values of one stream, account and epoch key: everything constant is rendered once."""

    __slots__ = ("_account", "_entropy", "_epoch", "_info", "_key_frame", "_name", "_ring", "_salt", "_stream")

    def __init__(self, ring: KeyRing, entropy: Entropy, stream: str, account: str, epoch: EpochKey) -> None:
        self._ring = ring
        self._entropy = entropy
        self._epoch = epoch
        self._stream = stream
        self._account = account
        self._name = f"{epoch.id}|{account}"
        self._info = key_info(epoch.id, account)
        self._key_frame = framed(str(epoch.id).encode())
        self._salt = "salt:" + entropy.salt.hex()

    def one_part(self, tail: bytes, group: str) -> OnePart:
        """Return how values of one part are sealed: as by `several`, with all that is constant rendered once.

        `tail` is the envelope's (`schemas.sealed.split_envelope`); a head may be constant or each record's own.
        """
        part = part_head(group, str(self._epoch.id))
        after_box, after_sid = b'",' + part[1:], b'"}' + tail
        fixed_size = len(part) + _SID_CHARS + len(after_sid)
        key_frame = self._key_frame
        aad_start = aad_head(self._stream, self._epoch.id.owner, self._account, group) + b"\0\0\0\x10"
        name, ciphers, draws = self._name, self._ring.ciphers, self._entropy.draws
        join, base64, padding = b"".join, b64encode, PADDING

        def frame(head: bytes) -> Frame:
            size = (len(head) + fixed_size).to_bytes(4, "big")
            return join((key_frame, size, head, part)), head + b'{"box":"'

        def seal(frame: Frame, person: PersonSecret | None, plaintext: bytes) -> bytes:
            aad_middle, before_box = frame
            if person is None:
                return self.several(before_box[: -len(b'{"box":"')], tail, ((group, None, plaintext),))
            text, secret = person
            cipher = ciphers.get((name, text)) or self._derive(text, secret)
            sid = text.encode()
            seal_id, nonce = next(draws)
            aad = join((aad_start, seal_id, _SID_SIZE, sid, aad_middle, sid, after_sid))
            ciphertext = cipher.encrypt(nonce, plaintext + padding[len(plaintext) % 32], aad)
            return join((before_box, base64(seal_id + nonce + ciphertext), after_box, sid, after_sid))

        return OnePart(frame, seal)

    def several(
        self,
        head: bytes,
        tail: bytes,
        parts: Sequence[tuple[str, PersonSecret | None, bytes]],
        *,
        bare: bool = False,
    ) -> bytes:
        """Return the sealed value of a record with several parts, each (group, person, plaintext).

        `bare` takes neither secret nor salt: for the domain whose entries must outlive the person's secrets.
        """
        key = str(self._epoch.id)
        prepared = []
        for group, person, plaintext in parts:
            if person is not None:
                text, secret = person.sid, person.secret
            else:
                text, secret = (NO_PERSON, b"") if bare else (self._salt, self._entropy.salt)
            cipher = self._ring.ciphers.get((self._name, text)) or self._derive(text, secret)
            sid = text.encode()
            prepared.append((cipher, sid, group, part_head(group, key) + sid + b'"}', plaintext))
        envelope = head + b",".join([clear for _, _, _, clear, _ in prepared]) + tail
        sealed = []
        seal_id, nonce = next(self._entropy.draws)  # one seal id a value, so that no part fits into another value
        for cipher, sid, group, clear, plaintext in prepared:
            aad = aad_head(self._stream, self._epoch.id.owner, self._account, group)
            box = seal_box(cipher, aad, sid, self._key_frame, envelope, plaintext, seal_id + nonce)
            sealed.append(b'{"box":"' + box + b'",' + clear[1:])
            nonce = next(self._entropy.draws)[1]
        return head + b",".join(sealed) + tail

    def _derive(self, sid: str, secret: bytes) -> AESGCM:
        cipher = self._ring.ciphers[self._name, sid] = record_key(self._epoch.key, secret, self._info)
        return cipher
