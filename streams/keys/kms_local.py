"""The key management service of the embedded default: files in a folder of its own, beside the log's folder.

    STORE_ID.root       the root key; during its rotation the one before too; what earlier ones were named by
    STORE_ID.NAME.kek   a key-encryption key, wrapped by the root key; NAME is a destruction day and its generation
    STORE_ID.counter    the destruction counter, and by day the last generation destroyed: one line a day for good

Rules: the folder is 0700, files are 0600, owned by this user and no symlinks; anything looser is refused. A file
appears and changes whole or not at all, and is durable before it is used; what it held before is overwritten. Several
stores may share a folder. Nothing is cached, so that a destroyed KEK is gone, and a rotated root key in use, for every
process at once. Who changes anything holds a lock on the folder; who reads does not, but asks again under the lock
before it says that something is missing or damaged. Back this folder up apart from the key store.
"""

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from schemas.errors import KeysBusy, KeysFull, KeysUnusable, KmsRefuses, StreamveilError
from schemas.sealed import NONCE_BYTES, framed
from streams.files import sync_folder
from streams.keys.store import NEVER

KEY_BYTES = 32
_ROOT_HEADER = b"streamveil-root 2\n"
_ROOT_HEADER_1 = b"streamveil-root 1\n"  # then 32 bytes, and no counter beside it
_KEK_HEADER = b"streamveil-kek 1\n"
_COUNTER_HEADER = "streamveil-counter 1"
_NAME = re.compile(rf"([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}|{NEVER})(?:\.([2-9]|[1-9][0-9]{{1,3}}))?")
_STORE_ID = re.compile(r"[0-9a-f]{32}")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LOCK_S = 10.0
_T = TypeVar("_T")


class _Root(NamedTuple):
    """The root key, the one before while it is being replaced, and what earlier ones were named by."""

    key: bytes
    old: bytes | None = None
    was: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        return "Root()"


class _State(NamedTuple):
    """The destruction counter, and by day the last generation destroyed."""

    counter: int
    gone: dict[str, int]


class LocalKms:
    """One store's root key and KEKs (`Kms`). `calls` counts wrap and unwrap; `check` names the root key."""

    waiting_period_s = 0
    has_root = True

    def __init__(self, folder: Path, store_id: str) -> None:
        self.calls = 0
        self._folder = folder
        self._store_id = store_id
        self._root_path = _root_path(folder, store_id)
        self._counter_path = folder / f"{store_id}.counter"
        self.check = self._check_of(self._surely(self._root).key)

    def __repr__(self) -> str:
        return f"LocalKms({self._store_id})"

    @classmethod
    def create(cls, folder: Path, store_id: str) -> "LocalKms":
        """Make the root key and the counter of a new key store, durable on return, and the folder if need be.

        Raises KeysUnusable if this store has a root key already, or the folder is not private; KeysFull.
        """
        path = _root_path(folder, store_id)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_folder(folder)
            if os.path.lexists(path) or not _write_new(path, _root_text(_Root(secrets.token_bytes(KEY_BYTES)))):
                raise KeysUnusable("a root key of this store exists already; nothing was made", path=str(path))
            sync_folder(folder.parent)
        except OSError as error:
            raise os_error(error, path) from error
        made = cls(folder, store_id)
        made.raise_counter(0)
        return made

    @classmethod
    def open(cls, folder: Path, store_id: str) -> "LocalKms":
        """Open an existing key store's service. Raises KeysUnusable if its root key is missing, loose or damaged."""
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
        if content.startswith(_ROOT_HEADER_1):
            _upgrade(folder, store_id)
        try:
            return cls(folder, store_id)
        except KmsRefuses as error:
            raise KeysUnusable("root key damaged; restore it from its own backup", path=str(path)) from error

    def trusts(self, check: bytes) -> bool:
        """Return whether a value names the root key, or one that it was rotated from."""
        root = self._surely(self._root)
        keys = [root.key] if root.old is None else [root.key, root.old]
        return any(secrets.compare_digest(check, known) for known in (*map(self._check_of, keys), *root.was))

    def wrap(self, name: str, plaintext: bytes) -> bytes:
        """Return nonce and ciphertext under a KEK, which is made, durable, if it does not exist.

        Raises KmsRefuses if it was destroyed.
        """
        self.calls += 1
        path = self._kek_path(name)
        if os.path.lexists(path):
            with suppress(KmsRefuses):  # it may have been replaced under our eyes
                return self._sealed(self._kek(name), name, plaintext)
        with self._locked():
            kek = self._kek(name) if os.path.lexists(path) else self._new_kek(name)
        return self._sealed(kek, name, plaintext)

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """Return what was wrapped. Raises KmsRefuses if the KEK is missing, or is not the one that wrapped it."""
        self.calls += 1
        return self._surely(lambda: self._opened(self._kek(name), name, wrapped))

    def destroy(self, name: str) -> None:
        """Overwrite and delete a KEK, and note that it is never made again, durable on return; idempotent."""
        path, (day, number) = self._kek_path(name), _parts(name)
        with self._locked():
            state = self._state()
            if state is None:  # a new one would forget what was destroyed
                raise self._lost()
            if state.gone.get(day, 0) < number:
                self._put_state(_State(state.counter, state.gone | {day: number}))
            self._sweep()
            _shred(path)

    def names(self) -> list[str]:
        """Return the names of the KEKs there are, in order; `NEVER` is last."""
        start, end = f"{self._store_id}.", ".kek"
        with _translated(self._folder):
            found = [entry.name for entry in os.scandir(self._folder)]
        names = [name.removeprefix(start).removesuffix(end) for name in found if name.startswith(start)]
        return sorted((name for name in names if f"{start}{name}{end}" in found and _NAME.fullmatch(name)), key=_parts)

    def last_destroyed(self, day: str) -> int:
        """Return the highest generation of a day that was destroyed; 0: none."""
        state = self._state()
        return 0 if state is None else state.gone.get(day, 0)

    def rotate_root(self) -> None:
        """Make a new root key and wrap every KEK by it; killed half-way, calling again finishes that rotation."""
        with self._locked():
            self._sweep()
            root = self._root()
            if root.old is None:
                root = _Root(secrets.token_bytes(KEY_BYTES), root.key, root.was)
                self._put(self._root_path, _root_text(root))
            for name in self.names():
                key = self._kek_bytes(name)
                self._put(self._kek_path(name), self._kek_text(root.key, name, key))
            root = _Root(root.key, None, (*root.was, self._check_of(root.old or root.key)))
            self._put(self._root_path, _root_text(root))
        self.check = self._check_of(root.key)

    def counter(self) -> int:
        """Return the destruction counter. Raises KeysUnusable if it is lost."""
        state = self._state()
        if state is None:
            raise self._lost()
        return state.counter

    def _lost(self) -> KeysUnusable:
        return KeysUnusable(
            "the destruction counter is lost: the key store may be an old one; run: streamveil keys reconcile",
            path=str(self._counter_path),
        )

    def raise_counter(self, value: int) -> None:
        """Raise the counter to at least `value`, durable on return; one that is lost is made anew."""
        with self._locked():
            state = self._state()
            if state is None or state.counter < value:
                self._put_state(_State(value, {} if state is None else state.gone))

    def close(self) -> None:
        """Do nothing: nothing is held."""

    # --- files -----------------------------------------------------------------------------------------------

    def _kek_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError("not the name of a key-encryption key")
        return self._folder / f"{self._store_id}.{name}.kek"

    def _kek(self, name: str) -> AESGCM:
        return AESGCM(self._kek_bytes(name))

    def _kek_bytes(self, name: str) -> bytes:
        """Return a KEK. Raises KmsRefuses if it is missing, damaged or of another root key."""
        path = self._kek_path(name)
        root = self._root()
        with _translated(path, "key-encryption key missing; restore it unless it was destroyed", name):
            content = _read(path)
        if content.startswith(_KEK_HEADER):
            for key in (root.key, root.old):
                with suppress(KmsRefuses):
                    if key is not None:
                        return self._opened(AESGCM(key), name, content[len(_KEK_HEADER) :])
        raise KmsRefuses("key-encryption key damaged, or of another root key; restore it from its own backup", day=name)

    def _new_kek(self, name: str) -> AESGCM:
        """Return a KEK made here; under the lock."""
        day, number = _parts(name)
        state = self._state()
        if state is not None and state.gone.get(day, 0) >= number:
            raise KmsRefuses("key-encryption key destroyed; it is not made again", day=name)
        key = secrets.token_bytes(KEY_BYTES)
        self._put(self._kek_path(name), self._kek_text(self._root().key, name, key))
        return AESGCM(key)

    def _kek_text(self, root: bytes, name: str, key: bytes) -> bytes:
        return _KEK_HEADER + self._sealed(AESGCM(root), name, key)

    def _sealed(self, cipher: AESGCM, name: str, plaintext: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + cipher.encrypt(nonce, plaintext, framed(self._store_id.encode(), name.encode()))

    def _opened(self, cipher: AESGCM, name: str, sealed: bytes) -> bytes:
        aad = framed(self._store_id.encode(), name.encode())
        try:
            return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
        except (InvalidTag, ValueError) as error:
            raise KmsRefuses(
                "key-encryption key and key store do not belong together; restore both from matching backups", day=name
            ) from error

    def _root(self) -> _Root:
        with _translated(self._root_path, "root key missing; restore it from its own backup"):
            content = _read(self._root_path)
        root = _parsed_root(content)
        if root is None:
            raise KmsRefuses("root key damaged; restore it from its own backup", path=str(self._root_path))
        return root

    def _check_of(self, root: bytes) -> bytes:
        return HKDF(SHA256(), 16, None, framed(b"root check", self._store_id.encode())).derive(root)

    def _state(self) -> _State | None:
        """Return what the counter's file says; None: there is no such file. Raises KeysUnusable if it is damaged."""
        path = self._counter_path
        with _translated(path):
            try:
                header, counter, *lines = _read(path).decode("ascii").splitlines()
                days = [line.split(" ") for line in lines]
                if header == _COUNTER_HEADER:
                    return _State(int(counter), {day: int(number) for day, number in days})
            except FileNotFoundError:
                return None
            except ValueError:
                pass
        raise KeysUnusable("the destruction counter is damaged; restore it from its own backup", path=str(path))

    def _put_state(self, state: _State) -> None:
        lines = [_COUNTER_HEADER, str(state.counter), *(f"{day} {last}" for day, last in sorted(state.gone.items()))]
        self._put(self._counter_path, "".join(f"{line}\n" for line in lines).encode(), secret=False)

    def _put(self, path: Path, content: bytes, *, secret: bool = True) -> None:
        with _translated(path):
            _replace(path, content, secret=secret)

    def _sweep(self) -> None:
        """Remove what a process left that was killed while it wrote; under the lock."""
        with _translated(self._folder):
            for draft in self._folder.glob(f".{self._store_id}.*"):
                _shred(draft)

    def _surely(self, read: Callable[[], _T]) -> _T:
        """Return what is read, if need be under the lock: a file may have been replaced under our eyes."""
        with suppress(KmsRefuses):
            return read()
        with self._locked():
            return read()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be alone among those that change anything in the folder. Raises KeysBusy after 10 s."""
        with _translated(self._folder, "key folder missing; check that its disk is there"):
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            give_up_s = time.monotonic() + _LOCK_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up_s:
                        raise KeysBusy("another process holds the key folder", path=str(self._folder)) from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)


def check_private(info: os.stat_result, path: Path, chmod: str) -> None:
    """Raise KeysUnusable if a file or folder is not ours alone; `chmod` is the mode to tell the operator."""
    if stat.S_ISLNK(info.st_mode) or not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise KeysUnusable("key material must not be a link or a special file; put the real one here", path=str(path))
    if info.st_uid != os.geteuid():
        raise KeysUnusable("key material belongs to another user; run as its owner", path=str(path))
    if info.st_mode & 0o077:
        raise KeysUnusable(f"key material is open to other users; run: chmod {chmod}", path=str(path))


def _root_path(folder: Path, store_id: str) -> Path:
    if not _STORE_ID.fullmatch(store_id):
        raise ValueError("not a store id")
    return folder / f"{store_id}.root"


def _root_text(root: _Root) -> bytes:
    """Return the lines of a root key's file."""
    lines = [("key", root.key), *([("old", root.old)] if root.old is not None else []), *(("was", w) for w in root.was)]
    return _ROOT_HEADER + "".join(f"{word} {value.hex()}\n" for word, value in lines).encode()


def _parsed_root(content: bytes) -> _Root | None:
    """Return what the file says, or None if it is not as it was written."""
    try:
        lines = [line.split(" ") for line in content.removeprefix(_ROOT_HEADER).decode("ascii").splitlines()]
        values = [(word, bytes.fromhex(value)) for word, value in lines]
        (key,) = [value for word, value in values if word == "key"]
        old = next((value for word, value in values if word == "old"), None)
        root = _Root(key, old, tuple(value for word, value in values if word == "was"))
    except ValueError:
        return None
    whole = all(len(one) == KEY_BYTES for one in (key, old or key)) and _root_text(root) == content
    return root if whole else None


def _upgrade(folder: Path, store_id: str) -> None:
    """Write a root key of version 1 anew, after the counter, which was not there then."""
    path = _root_path(folder, store_id)
    with _translated(path):
        root = _Root(_read(path).removeprefix(_ROOT_HEADER_1))
        if len(root.key) != KEY_BYTES:
            raise KeysUnusable("root key damaged; restore it from its own backup", path=str(path))
        _write_new(folder / f"{store_id}.counter", f"{_COUNTER_HEADER}\n0\n".encode())
        _replace(path, _root_text(root))


def _parts(name: str) -> tuple[str, int]:
    """Return day and generation of a KEK's name."""
    day, _, number = name.partition(".")
    return day, int(number or 1)


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
        return os.read(descriptor, info.st_size)
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


def _replace(path: Path, content: bytes, *, secret: bool = True) -> None:
    """Make a file have a new content, whole and durable; `secret`: overwrite what it had. Raises OSError."""
    before = None
    if secret:
        with suppress(FileNotFoundError):
            before = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, _CREATE, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
        if before is not None:
            _overwrite(before)
    finally:
        draft.unlink(missing_ok=True)
        if before is not None:
            os.close(before)


def _overwrite(descriptor: int) -> None:
    os.pwrite(descriptor, secrets.token_bytes(os.fstat(descriptor).st_size), 0)
    os.fsync(descriptor)


def _shred(path: Path) -> None:
    """Overwrite and delete a file, durable; nothing if there is none. Raises what it means if that fails."""
    with _translated(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            _overwrite(descriptor)
        finally:
            os.close(descriptor)
        path.unlink()
        sync_folder(path.parent)


@contextmanager
def _translated(
    path: Path, missing: str = "key folder missing; check that its disk is there", day: str = ""
) -> Iterator[None]:
    """Turn errors of the operating system into ours; a file that is not there may come back."""
    try:
        yield
    except FileNotFoundError as error:
        where = {"path": str(path)} | ({"day": day} if day else {})
        raise KmsRefuses(missing, **where) from error
    except OSError as error:
        raise os_error(error, path) from error


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
