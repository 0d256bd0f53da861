"""The files of Do-Not-Call lists: plain, .gz, or .zip with each of its members, whatever they are called.

Read as a stream, in chunks; a pipe too, if somebody writes into it. Refused: what is encrypted, an archive in an
archive, and what grows out of all proportion.
"""

import gzip
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, BinaryIO, Final

from schemas.errors import InputInvalid, RegistryInvalid
from streams.files import open_file

CHUNK_BYTES: Final = 1 << 22
INFLATION: Final = 200
"""How many times its compressed size a file may have; lists have 3 to 20 times."""
SMALL_BYTES: Final = 1 << 24
"""Up to this size a file may have grown by more."""
_ZIP, _EMPTY_ZIP, _GZIP = b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b"
_AHEAD: Final = timedelta(hours=14)
"""The times in a zip file are local ones of a place it does not name: taken as of the zone that is furthest ahead."""

Progress = Callable[[int], None]


def contents(path: Path, progress: Progress) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield what to call each part of a file, and its chunks, which are to be read before the next part.

    `progress` is told how many bytes more of the file were read. Raises InputInvalid if it cannot be read, and
    RegistryInvalid if it is an archive that is damaged or refused; so does reading the chunks.
    """
    name = str(path)
    with _errors(name), open_file(path, pipe=True) as file:
        head = file.peek(4)[:4]
        if head.startswith((_ZIP, _EMPTY_ZIP)):
            yield from _zipped(name, file, progress)
        elif head.startswith(_GZIP):
            yield name, _unzipped(name, file, progress)
        else:
            yield name, _plain(name, file, progress)


def dated_s(paths: Iterable[Path]) -> int:
    """Return the oldest modification time of the files and of what is in them, in Unix seconds.

    Raises InputInvalid if one cannot be read or has none, and RegistryInvalid for a damaged archive.
    """
    return min(min(_dates(path)) for path in paths)


def _dates(path: Path) -> Iterator[int]:
    name = str(path)
    with _errors(name):
        status = path.stat()
    if stat.S_ISFIFO(status.st_mode):
        raise InputInvalid("a pipe has no date; give that of the list with --as-of", file=name)
    with _errors(name), open_file(path) as file:
        yield int(os.fstat(file.fileno()).st_mtime)
        head = file.peek(8)[:8]
        if head.startswith(_GZIP) and len(head) == 8 and any(head[4:]):
            yield int.from_bytes(head[4:], "little")
        elif head.startswith((_ZIP, _EMPTY_ZIP)):
            with zipfile.ZipFile(file) as archive:
                for member in _members(archive):
                    try:
                        local = datetime(*member.date_time, tzinfo=UTC)
                    except ValueError:
                        raise InputInvalid(
                            "the archive does not say how old it is; give the date of the list with --as-of", file=name
                        ) from None
                    yield int((local - _AHEAD).timestamp())


@contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, NotImplementedError, ValueError, OverflowError):
        raise RegistryInvalid("the archive is damaged", file=name) from None
    except OSError as error:
        raise InputInvalid(f"cannot be read: {error.strerror}", file=name) from None


def _plain(name: str, file: BinaryIO, progress: Progress) -> Iterator[bytes]:
    with _errors(name):
        while chunk := file.read(CHUNK_BYTES):
            progress(len(chunk))
            yield chunk


def _unzipped(name: str, file: BinaryIO, progress: Progress) -> Iterator[bytes]:
    told = 0
    with _errors(name), gzip.GzipFile(fileobj=file) as inner:
        for chunk in _inflated(name, inner, os.fstat(file.fileno()).st_size):
            progress(file.tell() - told)
            told = file.tell()
            yield chunk


def _zipped(name: str, file: BinaryIO, progress: Progress) -> Iterator[tuple[str, Iterator[bytes]]]:
    with zipfile.ZipFile(file) as archive:
        members = _members(archive)
        if not members:
            raise RegistryInvalid("the archive holds no file", file=name)
        if sum(member.compress_size for member in members) > os.fstat(file.fileno()).st_size:
            raise RegistryInvalid("the archive is damaged: its files overlap", file=name)
        for member in members:
            inner = f"{name}/{''.join(letter if letter.isprintable() else '?' for letter in member.filename)}"
            if member.flag_bits & 1:
                raise RegistryInvalid("the archive is encrypted; give the files themselves", file=inner)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise RegistryInvalid("the archive is compressed in a way that is not known", file=inner)
            yield inner, _member(inner, archive, member, progress)


def _member(name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo, progress: Progress) -> Iterator[bytes]:
    with _errors(name), archive.open(member) as inner:
        for chunk in _inflated(name, inner, member.compress_size):
            progress(len(chunk) * member.compress_size // max(1, member.file_size))
            yield chunk


def _inflated(name: str, inner: IO[bytes] | gzip.GzipFile, compressed_bytes: int) -> Iterator[bytes]:
    """Yield what is in a part of an archive. Raises RegistryInvalid for an archive in it, and for a bomb."""
    size = 0
    while chunk := inner.read(CHUNK_BYTES):
        if not size and chunk.startswith((_ZIP, _EMPTY_ZIP, _GZIP)):
            raise RegistryInvalid("an archive in an archive; give the inner one", file=name)
        size += len(chunk)
        if size > max(SMALL_BYTES, INFLATION * compressed_bytes):
            raise RegistryInvalid(f"grows to more than {INFLATION} times its size: no list", file=name)
        yield chunk


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if not member.filename.endswith("/")]
