"""The registries of a deployment: a folder (0700) of bitmap files (0600), each mapped and swapped whole.

A load parses everything first, then writes beside, syncs and renames: whatever fails, the version before
still serves. A process that has an old version mapped answers from it until its next `refresh`.
"""

import fcntl
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from processors.screen.registry import BitmapBuilder, BitmapRegistry, Header, parse_us
from schemas.errors import InputInvalid, RegistryInvalid

SUFFIX: Final = ".bitmap"
REFRESH_S: Final = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_READ_BYTES = 1 << 20

_Version = tuple[int, int, int]  # inode, modification time in ns, size


class _Open(NamedTuple):
    version: _Version
    registry: BitmapRegistry


class Registries:
    """Every registry that is loaded, read-only. Opening one reads its file once, to verify it."""

    def __init__(self, folder: Path) -> None:
        """Open what is in the folder, which need not exist. Raises RegistryInvalid as `refresh`."""
        self._folder = folder
        self._open: dict[str, _Open] = {}
        self._checked_s: float | None = None
        self._scan()

    def __repr__(self) -> str:
        return f"Registries({', '.join(self.names())})"

    def get(self, name: str) -> BitmapRegistry | None:
        """Return a registry, or None if it is not loaded. Never blocks."""
        found = self._open.get(name)
        return found and found.registry

    def names(self) -> list[str]:
        """Return the names of what is loaded, sorted."""
        return sorted(self._open)

    def lists(self, name: str, number: str) -> bool:
        """Return whether a registry lists an E.164 number; one that is not loaded lists everybody."""
        found = self._open.get(name)
        return found is None or found.registry.lists(number)

    def as_of(self, name: str) -> int | None:
        """Return a registry's own date in Unix seconds, or None if it is not loaded."""
        found = self._open.get(name)
        return found and found.registry.as_of_s

    def refresh(self, monotonic_s: float) -> None:
        """Open what was loaded since, close what is gone; looks at the disk at most once a second.

        Raises RegistryInvalid if a file is damaged, on every call until it is mended.
        """
        if self._checked_s is None or not 0 <= monotonic_s - self._checked_s < REFRESH_S:
            self._scan()
            self._checked_s = monotonic_s

    def _scan(self) -> None:
        found: dict[str, _Open] = {}
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            try:
                known = self._open.get(name)
                found[name] = known if known and known.version == _version(path.stat()) else _map(path, name)
            except FileNotFoundError:
                continue  # removed this moment: not loaded
            except OSError as error:
                raise RegistryInvalid(f"cannot be read: {error.strerror}", file=str(path)) from None
            except RegistryInvalid as error:
                raise RegistryInvalid(error.message, file=str(path)) from None
        self._open = found


def _version(status: os.stat_result) -> _Version:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _map(path: Path, name: str) -> _Open:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not status.st_size:
            raise RegistryInvalid("truncated; load the registry again")
        view = memoryview(mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ))
    registry = BitmapRegistry(view)
    if registry.name != name:
        raise RegistryInvalid("the file was made for another registry; load the registry again")
    return _Open(_version(status), registry)


def load(
    folder: Path,
    name: str,
    files: Iterable[Path],
    *,
    country: str,
    calling_code: str,
    as_of_s: int,
    now_s: int,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> Header:
    """Make the files together the registry `name`, durable on return, and return its header. Blocks (disk).

    All or nothing. `progress` is told, now and then, how many bytes more were read. Raises RegistryInvalid
    (with file and line, or because the disk refuses), and InputInvalid if a file cannot be read.
    """
    if not _NAME.fullmatch(name):
        raise InputInvalid("a registry's name has 1 to 64 letters, digits, `_`, `.`, `-`")
    builder = BitmapBuilder()
    for file in files:
        builder.add(parse_us(_lines(file, progress), str(file)))
    header, chunks = builder.finish(
        name=name, country=country, calling_code=calling_code, as_of_s=as_of_s, loaded_at_s=now_s
    )
    final, beside = folder / f"{name}{SUFFIX}", folder / f".{name}{SUFFIX}.new"
    try:
        with _locked(folder) as folder_fd:
            try:
                descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                with os.fdopen(descriptor, "wb") as out:
                    os.fchmod(descriptor, 0o600)
                    out.writelines(chunks)
                    out.flush()
                    os.fsync(descriptor)
                beside.replace(final)
                os.fsync(folder_fd)
            finally:
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise RegistryInvalid(
            f"cannot be written: {error.strerror}; what was loaded before still serves", file=str(final)
        ) from None
    return header


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Make the folder, private, and keep other loads out of it meanwhile; blocks while one is writing."""
    for missing in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
        missing.mkdir(0o700, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _lines(path: Path, progress: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while lines := file.readlines(_READ_BYTES):
                yield from lines
                progress(sum(map(len, lines)))
    except OSError as error:
        raise InputInvalid(f"cannot be read: {error.strerror}", file=str(path)) from None
