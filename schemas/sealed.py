"""The grammar of a sealed value, version 1: what a value with ciphertext in it looks like, and its AAD.

A value is one JSON object with sorted keys and no white space. Its clear envelope is the same object without the
`box` of each part, and is authenticated by every part:

    {"account_id":…, …, "privacy":{…}, "sealed":[{"box":BOX,"group":G,"key":K,"sid":S}, …], "v":1}

    K   = DOMAIN "/" OWNER "/" EPOCH "/" VERSION        the epoch key, e.g. pii/platform/2026-11/1
    S   = 32 hex digits (the person secret's id), or "salt:" and 32 hex digits where no person is concerned,
          or "-" where the domain takes neither
    BOX = base64(seal id, 16 bytes ‖ nonce, 12 bytes ‖ AES-256-GCM ciphertext and 16-byte tag); all parts of a value
          have one seal id, so that none opens in another value
    plaintext = JSON ‖ 0x80 ‖ 0x00…, padded to a multiple of 32 bytes (ISO/IEC 7816-4)

    record key = HKDF-SHA-256(epoch key ‖ person secret or salt, info = DOMAIN, OWNER, ACCOUNT, EPOCH, VERSION)
    AAD = (version, stream, OWNER, ACCOUNT, G, seal id, S, K, clear envelope), each behind its 4-byte length
"""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec
import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pybase64 import b64decode, b64encode, b64encode_as_string

VERSION = 1
SEAL_ID_BYTES = 16
NONCE_BYTES = 12
SECRET_BYTES = 32
SALT_BYTES = 16
PAD_BYTES = 32
MAX_SEALS_PER_KEY = 2**31
"""Seals under one epoch key version, and therefore under any record key derived from it (NIST SP 800-38D, 8.3)."""

NO_PERSON = "-"
PADDING = [b"\x80" + bytes(PAD_BYTES - 1 - used) for used in range(PAD_BYTES)]


class KeyId(NamedTuple):
    """Names one epoch key: domain, owner (an account, or the platform), epoch, version from 1."""

    domain: str
    owner: str
    epoch: str
    version: int

    def __str__(self) -> str:
        return f"{self.domain}/{self.owner}/{self.epoch}/{self.version}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "KeyId":
        """Return the key id of a text. Raises ValueError if it is none."""
        domain, owner, epoch, version = text.split("/")
        if not (domain and owner and epoch and version.isascii() and version.isdigit()):
            raise ValueError("not a key id")
        return KeyId(domain, owner, epoch, int(version))


class Part(msgspec.Struct, frozen=True, gc=False):
    """One ciphertext of a value: field group, epoch key, sid (or salt), and the box as it stands."""

    group: str
    key: str
    sid: str
    box: str


class Sealed(msgspec.Struct, frozen=True, gc=False):
    """A value taken apart: its account, its parts and the exact bytes of its clear envelope."""

    account: str
    parts: tuple[Part, ...]
    envelope: bytes
    fields: Mapping[str, Any]


@lru_cache(maxsize=4096)
def key_info(key_id: KeyId, account: str) -> bytes:
    """Return the HKDF info of the record keys of an epoch key and an account."""
    return framed(
        *(str(part).encode() for part in (key_id.domain, key_id.owner, account, key_id.epoch, key_id.version))
    )


def record_key(epoch_key: bytes, secret: bytes, info: bytes) -> AESGCM:
    """Return the cipher of the record key for 32-byte `epoch_key` and a person secret, salt or nothing; `key_info`."""
    return AESGCM(hkdf(epoch_key + secret, info))


# HMAC (RFC 2104) hashes a block of the key XOR 0x36 before the message, and one of the key XOR 0x5c before that hash.
_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))
_NO_SALT_INNER, _NO_SALT_OUTER = bytes(64).translate(_INNER), bytes(64).translate(_OUTER)
_KEY_TO_BLOCK = bytes(32)


def hkdf(secret: bytes, info: bytes) -> bytes:
    """Return the first 32 bytes of HKDF-SHA-256 (RFC 5869) without salt; half the time of OpenSSL's general one."""
    extracted = sha256(_NO_SALT_OUTER + sha256(_NO_SALT_INNER + secret).digest()).digest() + _KEY_TO_BLOCK
    return sha256(extracted.translate(_OUTER) + sha256(extracted.translate(_INNER) + info + b"\x01").digest()).digest()


def framed(*parts: bytes) -> bytes:
    """Return the parts, each behind its length as 4 bytes big-endian, so that no two lists give the same bytes."""
    return b"".join([len(part).to_bytes(4, "big") + part for part in parts])


@lru_cache(maxsize=4096)
def aad_head(stream: str, owner: str, account: str, group: str) -> bytes:
    """Return the constant beginning of the AAD of all values of one stream, owner, account and field group."""
    return framed(b"%d" % VERSION, stream.encode(), owner.encode(), account.encode(), group.encode())


@lru_cache(maxsize=4096)
def key_frame(key: str) -> bytes:
    """Return an epoch key's id as it stands in the AAD."""
    return framed(key.encode())


def pad(plaintext: bytes) -> bytes:
    """Return the plaintext padded to the next multiple of 32 bytes (at least one byte is added)."""
    return plaintext + PADDING[len(plaintext) % PAD_BYTES]


def unpad(padded: bytes) -> bytes:
    """Return what was padded. Raises ValueError if the padding is not ours."""
    end = len(padded.rstrip(b"\0")) - 1
    if end < 0 or padded[end] != 0x80 or len(padded) - end > PAD_BYTES:
        raise ValueError("bad padding")
    return padded[:end]


def aad(head: bytes, seal_id: bytes, sid: bytes, key_frame: bytes, envelope: bytes) -> bytes:
    """Return the AAD of one part: `aad_head(…)`, seal id, sid, `framed(key id)`, clear envelope."""
    size = len(envelope).to_bytes(4, "big")
    return b"".join((head, b"\0\0\0\x10", seal_id, len(sid).to_bytes(4, "big"), sid, key_frame, size, envelope))


def seal_box(
    cipher: AESGCM, head: bytes, sid: bytes, key_frame: bytes, envelope: bytes, plaintext: bytes, entropy: bytes
) -> bytes:
    """Return the base64 box of one part. `entropy` is 28 fresh bytes: seal id ‖ nonce; never use them twice."""
    bound = aad(head, entropy[:SEAL_ID_BYTES], sid, key_frame, envelope)
    ciphertext = cipher.encrypt(entropy[SEAL_ID_BYTES:], pad(plaintext), bound)
    return b64encode(entropy + ciphertext)


def open_box(cipher: AESGCM, head: bytes, part: Part, envelope: bytes) -> bytes:
    """Return the plaintext of a part. Raises ValueError if one bit of part or envelope is not as it was sealed."""
    try:
        box = b64decode(part.box, validate=True)
        if b64encode_as_string(box[-(len(box) % 3 or 3) :]) != part.box[-4:]:  # only its end can be written in two ways
            raise ValueError("not the one way to write these bytes")
        seal_id, nonce = box[:SEAL_ID_BYTES], box[SEAL_ID_BYTES : SEAL_ID_BYTES + NONCE_BYTES]
        bound = aad(head, seal_id, part.sid.encode(), key_frame(part.key), envelope)
        return unpad(cipher.decrypt(nonce, box[SEAL_ID_BYTES + NONCE_BYTES :], bound))
    except (InvalidTag, ValueError) as error:
        raise ValueError("sealed part does not open") from error


def part_head(group: str, key: str) -> bytes:
    """Return the clear side of a part up to its sid, as it stands in the envelope; sid and `"}` follow."""
    return f'{{"group":"{group}","key":"{key}","sid":"'.encode()


def split_envelope(fields: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Return the clear envelope before and after the parts, for a value with these clear fields."""
    whole = orjson.dumps({**fields, "sealed": [], "v": VERSION}, option=orjson.OPT_SORT_KEYS)
    at = whole.index(b'"sealed":[') + len(b'"sealed":[')
    return whole[:at], whole[at:]


def take_apart(value: bytes) -> Sealed:
    """Return a value's parts and clear envelope. Raises ValueError if it is not a sealed value of version 1."""
    try:
        fields = orjson.loads(value)
        if fields["v"] != VERSION:
            raise ValueError("not a sealed value of this version")
        parts = []
        for part in fields["sealed"]:
            group, key, sid, box = part["group"], part["key"], part["sid"], part.pop("box")
            if len(part) != 3 or not type(group) is type(key) is type(sid) is type(box) is str:
                raise ValueError("not a sealed part")
            parts.append(Part(group, key, sid, box))
        if len(parts) > 1 and len({b64decode(part.box[:24])[:SEAL_ID_BYTES] for part in parts}) > 1:
            raise ValueError("parts of different values")
        account = fields.get("account_id") or ""
        if not isinstance(account, str) or not isinstance(fields.get("privacy", {}), dict):
            raise TypeError("not the envelope of a sealed value")
        envelope = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError("not a sealed value of version 1") from error
    del fields["sealed"]
    return Sealed(account, tuple(parts), envelope, fields)
