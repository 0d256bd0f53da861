"""Files that are read without waiting for what is none, and written so that they are there whole or not at all."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import BinaryIO

Stamp = tuple[int, int, int]
"""What tells one version of a file from the next: inode, modification time in ns, size in bytes."""

_NO_FILE = "it is no file"


def stamp(status: os.stat_result) -> Stamp:
    """Return the stamp of a file."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def open_file(path: Path, *, pipe: bool = False) -> BufferedReader:
    """Open a file to read. A folder, socket, device or pipe raises OSError at once, and blocks nobody.

    With `pipe` a pipe is read too if somebody writes into it; this waits for the first byte.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise (OSError(errno.EINVAL, _NO_FILE) if error.errno == errno.ENXIO else error) from None  # a socket
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode) and not (pipe and stat.S_ISFIFO(mode)):
            raise OSError(errno.EINVAL, _NO_FILE)
        os.set_blocking(handle, True)
        file = os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise
    if stat.S_ISFIFO(mode) and not file.peek(1):
        file.close()
        raise OSError(errno.ENODATA, "it is a pipe that nobody writes into")
    return file


def read_text(path: Path, encoding: str = "utf-8", *, pipe: bool = False) -> str:
    """Return the text of a file, opened as by `open_file`. Raises OSError and UnicodeDecodeError."""
    with TextIOWrapper(open_file(path, pipe=pipe), encoding) as file:
        return file.read()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file (0600) that takes the place of `path` when the block ends, durable then. Raises OSError.

    It lies beside it until then, and goes on any error. One that a killed process left is replaced, so there is one
    writer at a time: whoever calls this has a lock.
    """
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o600)
            yield file
            file.flush()
            os.fsync(handle)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
