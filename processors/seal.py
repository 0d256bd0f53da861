"""Seal: plaintexts → sealed values, and the entropy of one attempt.

32 fresh bytes from the operating system per attempt, given in by the shell, are expanded into three separate
streams (nonces, salt, shuffle); they are never derived from input, never reused, never stored.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import NamedTuple, TypeVar

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pybase64 import b64encode

from processors.keyring import CipherGroup, EpochKey, KeyRing, PersonRef, PersonSecret
from processors.plan import Template
from schemas.outbound import Message
from schemas.sealed import (
    NO_PERSON,
    NONCE_BYTES,
    PAD_BYTES,
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
_SID_SIZE, _SEAL_ID_SIZE = _SID_CHARS.to_bytes(4, "big"), SEAL_ID_BYTES.to_bytes(4, "big")
OTHER = "other"
"""The group of the part that another person's record holds of their own."""
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


class Job(msgspec.Struct, frozen=True, gc=False):
    """One value to be sealed: its template, its plaintext as JSON, and whose secret it takes (None: nobody's).

    `own`: what another person's record holds of their own, for a part under their secret; None: there is one part.
    `head`: that of the clear envelope, where it is not the template's.
    """

    template: Template
    person: PersonRef | None
    plaintext: bytes
    head: bytes | None = None
    other: PersonRef | None = None
    own: bytes | None = None

    def __repr__(self) -> str:
        return "Job()"


class Way(NamedTuple):
    """What all one-part values of a template have in common, rendered once a batch."""

    sealer: "Sealer"
    ciphers: dict[str, AESGCM]
    aad_start: bytes  # up to the seal id
    aad_middle: bytes  # between the two sids
    before_box: bytes
    after_box: bytes  # up to the sid
    after_sid: bytes
    around: Callable[[bytes], tuple[bytes, bytes]]  # an envelope's own head → its `aad_middle` and `before_box`
    write: Callable[[Message], None]


class Sealer:
    """Seals values of one stream, account and epoch key: everything constant is rendered once."""

    __slots__ = ("_account", "_ciphers", "_entropy", "_epoch", "_info", "_key_frame", "_salt", "_stream")

    def __init__(self, ring: KeyRing, entropy: Entropy, stream: str, account: str, epoch: EpochKey) -> None:
        self._ciphers = ring.ciphers.setdefault(CipherGroup(epoch.id, account), {})
        self._entropy = entropy
        self._epoch = epoch
        self._stream = stream
        self._account = account
        self._info = key_info(epoch.id, account)
        self._key_frame = framed(str(epoch.id).encode())
        self._salt = "salt:" + entropy.salt.hex()

    def way(self, template: Template, write: Callable[[Message], None]) -> Way:
        """Return how one-part values of a template are sealed: as by `several`, with all that is constant rendered."""
        key_frame, tail = self._key_frame, template.tail
        part = part_head(template.group, str(self._epoch.id))
        fixed_size = len(part) + _SID_CHARS + len(b'"}') + len(tail)

        def around(head: bytes) -> tuple[bytes, bytes]:
            size = (len(head) + fixed_size).to_bytes(4, "big")
            return b"".join((key_frame, size, head, part)), head + b'{"box":"'

        aad_start = aad_head(self._stream, self._epoch.id.owner, self._account, template.group) + _SEAL_ID_SIZE
        after_box, after_sid = b'",' + part[1:], b'"}' + tail
        return Way(self, self._ciphers, aad_start, *around(template.head), after_box, after_sid, around, write)

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
            cipher = self._ciphers.get(text) or self.derive(text, secret)
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

    def derive(self, sid: str, secret: bytes) -> AESGCM:
        """Return the cipher for a secret that was not used in this group yet, and keep it."""
        cipher = self._ciphers[sid] = record_key(self._epoch.key, secret, self._info)
        return cipher


def seal_each(
    jobs: Iterable[Job],
    persons: Mapping[PersonRef, PersonSecret],
    entropy: Entropy,
    way_of: Callable[[Template], Way | None],
) -> None:
    """Seal each job and write it where its template's way leads; a template without a way is left out.

    The one loop that every value of a person passes, twice a CDR: hence the many locals.
    """
    ways: dict[Template, Way | None] = {}
    draws, join, base64, padding = entropy.draws, b"".join, b64encode, PADDING
    for job in jobs:
        template = job.template
        try:
            way = ways[template]
        except KeyError:
            way = ways[template] = way_of(template)
        if way is None:
            continue
        sealer, ciphers, aad_start, aad_middle, before_box, after_box, after_sid, around, write = way
        plaintext, head = job.plaintext, job.head
        if job.own is None and job.person is not None:
            if head is not None:
                aad_middle, before_box = around(head)
            text, secret = persons[job.person]
            cipher = ciphers.get(text) or sealer.derive(text, secret)
            sid = text.encode()
            seal_id, nonce = next(draws)
            aad = join((aad_start, seal_id, _SID_SIZE, sid, aad_middle, sid, after_sid))
            ciphertext = cipher.encrypt(nonce, plaintext + padding[len(plaintext) % PAD_BYTES], aad)
            value = join((before_box, base64(join((seal_id, nonce, ciphertext))), after_box, sid, after_sid))
        else:
            parts = [(template.group, None if job.person is None else persons[job.person], plaintext)]
            if job.own is not None:
                parts.append((OTHER, None if job.other is None else persons[job.other], job.own))
            value = sealer.several(template.head if head is None else head, template.tail, parts)
        write(Message(template.at_ms, None, template.headers, value))
