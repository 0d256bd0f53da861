"""The key management service of the embedded default: files in a folder of its own, beside the log's folder.

    STORE_ID.root      the root key: a header line and 32 random bytes; made only together with a new key store
    STORE_ID.DAY.kek   the key-encryption key of a destruction day, wrapped by the root key

Rules: the folder is 0700, files are 0600, owned by this user and no symlinks; anything looser is refused. A file
appears whole or not at all, and is durable before it is used. Several stores may share a folder. No key is cached,
so that a destroyed KEK is gone for every process at once. Back this folder up apart from the key store.
"""

import errno
import os
import re
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from schemas.errors import KeysFull, KeysUnusable, StreamveilError
from schemas.sealed import NONCE_BYTES, framed
from streams.keys.store import NEVER

KEY_BYTES = 32
_ROOT_HEADER = b"streamveil-root 1\n"
_KEK_HEADER = b"streamveil-kek 1\n"
_DAY = re.compile(rf"[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}|{NEVER}")
_STORE_ID = re.compile(r"[0-9a-f]{32}")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class LocalKms:
    """One store's root key and KEKs. `calls` counts wrap and unwrap; `check` is the value that names the root key."""

    def __init__(self, folder: Path, store_id: str, root: bytes) -> None:
        self.calls = 0
        self.check = HKDF(SHA256(), 16, None, framed(b"root check", store_id.encode())).derive(root)
        self._folder = folder
        self._store_id = store_id
        self._root = AESGCM(root)

    def __repr__(self) -> str:
        return f"LocalKms({self._store_id})"

    @classmethod
    def create(cls, folder: Path, store_id: str) -> "LocalKms":
        """Make the root key of a new key store, durable on return, and the folder if need be.

        Raises KeysUnusable if this store has a root key already, or the folder is not private; KeysFull.
        """
        path = _root_path(folder, store_id)
        root = secrets.token_bytes(KEY_BYTES)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_folder(folder)
            if not _write_new(path, _ROOT_HEADER + root):
                raise KeysUnusable("a root key of this store exists already; nothing was made", path=str(path))
            sync_folder(folder.parent)
        except OSError as error:
            raise os_error(error, path) from error
        return cls(folder, store_id, root)

    @classmethod
    def open(cls, folder: Path, store_id: str) -> "LocalKms":
        """Read the root key of an existing key store. Raises KeysUnusable if it is missing, loose or damaged."""
        path = _root_path(folder, store_id)
        try:
            _check_folder(folder)
            content = _read(path)
        except FileNotFoundError as error:
            raise KeysUnusable(
                "root key missing beside an existing key store; restore it from its own backup, or nothing opens",
                path=str(path),
            ) from error
        except OSError as error:
            raise os_error(error, path) from error
        root = content.removeprefix(_ROOT_HEADER)
        if root == content or len(root) != KEY_BYTES:
            raise KeysUnusable("root key damaged; restore it from its own backup", path=str(path))
        return cls(folder, store_id, root)

    def wrap(self, day: str, plaintext: bytes) -> bytes:
        """Return nonce and ciphertext under the day's KEK, which is made, durable, if it does not exist."""
        self.calls += 1
        kek = self._kek(day) or self._new_kek(day)
        return self._sealed(kek, day, plaintext)

    def unwrap(self, day: str, wrapped: bytes) -> bytes:
        """Return what was wrapped. Raises KeysUnusable if the KEK is missing, or is not the one that wrapped it."""
        self.calls += 1
        kek = self._kek(day)
        if kek is None:
            raise KeysUnusable(
                "key-encryption key missing; restore it unless its day was destroyed",
                day=day,
                store=self._store_id,
            )
        return self._opened(kek, day, wrapped)

    def destroy(self, day: str) -> None:
        """Overwrite and delete the day's KEK, durable on return; idempotent."""
        path = self._kek_path(day)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(os.fstat(descriptor).st_size))
                file.flush()
                os.fsync(descriptor)
            path.unlink()
            sync_folder(self._folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise os_error(error, path) from error

    def days(self) -> list[str]:
        """Return the days that have a KEK, in order; `NEVER` is last."""
        try:
            names = [path.name.split(".") for path in self._folder.glob(f"{self._store_id}.*.kek")]
        except OSError as error:
            raise os_error(error, self._folder) from error
        return sorted(parts[1] for parts in names if len(parts) == 3 and _DAY.fullmatch(parts[1]))

    def _kek_path(self, day: str) -> Path:
        if not _DAY.fullmatch(day):
            raise ValueError("not a destruction day")
        return self._folder / f"{self._store_id}.{day}.kek"

    def _kek(self, day: str) -> AESGCM | None:
        path = self._kek_path(day)
        try:
            content = _read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise os_error(error, path) from error
        if not content.startswith(_KEK_HEADER):
            raise KeysUnusable("key-encryption key damaged; restore it from its own backup", path=str(path))
        return AESGCM(self._opened(self._root, day, content[len(_KEK_HEADER) :]))

    def _new_kek(self, day: str) -> AESGCM:
        """Return the day's KEK, made here or by the process that was faster."""
        path = self._kek_path(day)
        key = secrets.token_bytes(KEY_BYTES)
        try:
            made = _write_new(path, _KEK_HEADER + self._sealed(self._root, day, key))
        except OSError as error:
            raise os_error(error, path) from error
        kek = AESGCM(key) if made else self._kek(day)
        if kek is None:
            raise KeysUnusable("key-encryption key destroyed while it was made", day=day, store=self._store_id)
        return kek

    def _sealed(self, cipher: AESGCM, day: str, plaintext: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + cipher.encrypt(nonce, plaintext, framed(self._store_id.encode(), day.encode()))

    def _opened(self, cipher: AESGCM, day: str, sealed: bytes) -> bytes:
        aad = framed(self._store_id.encode(), day.encode())
        try:
            return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
        except (InvalidTag, ValueError) as error:
            raise KeysUnusable(
                "key-encryption key and key store do not belong together; restore both from matching backups",
                day=day,
                store=self._store_id,
            ) from error


def check_private(info: os.stat_result, path: Path, chmod: str) -> None:
    """Raise KeysUnusable if a file or folder is not ours alone; `chmod` is the mode to tell the operator."""
    if stat.S_ISLNK(info.st_mode) or not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise KeysUnusable("key material must not be a link or a special file; put the real one here", path=str(path))
    if info.st_uid != os.geteuid():
        raise KeysUnusable("key material belongs to another user; run as its owner", path=str(path))
    if info.st_mode & 0o077:
        raise KeysUnusable(f"key material is open to other users; run: chmod {chmod}", path=str(path))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root_path(folder: Path, store_id: str) -> Path:
    if not _STORE_ID.fullmatch(store_id):
        raise ValueError("not a store id")
    return folder / f"{store_id}.root"


def _check_folder(folder: Path) -> None:
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise KeysUnusable("the key folder must be a folder of its own, not a link", path=str(folder))
    check_private(info, folder, "700")


def _read(path: Path) -> bytes:
    descriptor = os.open(path, _READ)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise KeysUnusable("key material must be a regular file", path=str(path))
        check_private(info, path, "600")
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _write_new(path: Path, content: bytes) -> bool:
    """Make a file appear whole; False if another made it first. Either way it is durable on return."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(draft, _CREATE, 0o600), "wb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.link(draft, path)
            made = True
        except FileExistsError:
            made = False
        finally:
            draft.unlink()
    sync_folder(path.parent)
    return made


def os_error(error: OSError, path: Path) -> StreamveilError:
    """Return what an operating-system error at key material means to an operator."""
    if error.errno in _NO_ROOM:
        return KeysFull(path=str(path))
    if error.errno == errno.ELOOP:
        return KeysUnusable("key material must not be a link; put the real file here", path=str(path))
    reason = os.strerror(error.errno) if error.errno else "input/output error"
    return KeysUnusable(
        f"key material cannot be read or written: {reason}; check the disk and its owner", path=str(path)
    )
