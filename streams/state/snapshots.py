"""The snapshots of a machine: a folder (0700) with one file (0600) for each stream and token key, mapped by everybody.

Rules of this file:
- A file appears whole or not at all: it is written beside, synced and renamed; who has the one before goes on with it.
- One process at a time makes one. It is a child of whoever found that it takes one, so that nobody's work stands still.
- What is damaged, or not of this key store, is not used and goes: it is made anew from the log.
"""

import fcntl
import hashlib
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from processors.screen.entries import HEAD_BYTES, Damaged, Meta, Snapshot, Write
from schemas.errors import LogFull
from streams.files import Stamp, open_file, replacing, stamp
from streams.log.protocol import Log, Stored

SUFFIX: Final = ".entries"
LOOK_S: Final = 1.0
"""So often a process looks whether there is a newer snapshot."""
AGAIN_S: Final = 5.0
"""So long after a child has ended none is started for the same snapshot."""

_NAME: Final = re.compile(rf"\.?([a-z.]+)-([0-9]+){re.escape(SUFFIX)}(?:\.new)?")

_Key = tuple[str, int]  # stream and version of the token key


class Child(Protocol):
    """A process that makes a snapshot, such as `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Return its status once it has ended."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self) -> int:
        """Wait for its end."""


class Snapshots:
    """The snapshots of one key store in one folder, which need not exist."""

    def __init__(self, folder: Path, store_id: str, start: Callable[[str, int], Child] | None = None) -> None:
        """Take the folder, the key store's id, and what starts a process that makes the snapshot of a stream."""
        self.folder = folder
        self.store_id = store_id
        self._start = start
        self._children: dict[_Key, Child] = {}
        self._ended_s: dict[_Key, float] = {}
        self._threads: ThreadPoolExecutor | None = None

    def path(self, stream: str, version: int) -> Path:
        """Return where a snapshot is, or would be."""
        return self.folder / f"{stream}-{version}{SUFFIX}"

    def stamp(self, stream: str, version: int) -> Stamp | None:
        """Return what tells one file from the next; None if there is none."""
        try:
            return stamp(self.path(stream, version).stat())
        except OSError:
            return None

    def open(self, stream: str, version: int) -> Snapshot | None:
        """Return the snapshot, mapped and read once to verify it; None if there is none that is fit. Blocks."""
        path, seen = self.path(stream, version), None
        try:
            with open_file(path) as file:
                seen = stamp(os.fstat(file.fileno()))
                if not seen[2]:
                    raise Damaged("it is empty")
                mapped = mmap.mmap(file.fileno(), seen[2], access=mmap.ACCESS_READ)
            snapshot = Snapshot(memoryview(mapped))
            meta = snapshot.meta
            if (meta.stream, meta.version, meta.store) != (stream, version, self.store_id):
                raise Damaged("it is of something else")
            mapped.madvise(mmap.MADV_SEQUENTIAL)  # a disk reads ahead further
            snapshot.check()
            mapped.madvise(mmap.MADV_NORMAL)
        except OSError:
            return None  # this process cannot read it now; others may
        except Damaged:
            if self.stamp(stream, version) == seen:
                self.discard(stream, version)
            return None
        return snapshot

    def opening(self, stream: str, version: int) -> "Future[Snapshot | None]":
        """Begin to `open` in a thread, which stops nobody's work."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "snapshot")
        return self._threads.submit(self.open, stream, version)

    def discard(self, stream: str, version: int) -> None:
        """Delete a snapshot; whoever has it mapped keeps it."""
        with suppress(OSError):
            self.path(stream, version).unlink(missing_ok=True)

    def discard_before(self, stream: str, version: int) -> None:
        """Delete the snapshots of older token keys, and what somebody left who was killed while making one."""
        for (of, older), child in self._children.items():
            if of == stream and older < version and child.poll() is None:
                child.terminate()  # or it would come afterwards
        for path in self.folder.glob(f"*{stream}-*{SUFFIX}*"):
            named = _NAME.fullmatch(path.name)
            if named is not None and named[1] == stream and int(named[2]) < version:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    # --- making one -------------------------------------------------------------------------------------------

    def gather(self, stream: str, version: int) -> None:
        """Have a child make a newer snapshot, unless one is at it, here or in another process. Does not block.

        Raises LogFull if this computer refuses.
        """
        key = (stream, version)
        child = self._children.get(key)
        if child is not None:
            if child.poll() is None:
                return
            del self._children[key]
            self._ended_s[key] = time.monotonic()
        if time.monotonic() - self._ended_s.get(key, -AGAIN_S) < AGAIN_S or self._start is None:
            return
        with self.locked(stream, version) as mine:
            pass
        if mine:
            try:
                self._children[key] = self._start(stream, version)
            except OSError as error:
                raise LogFull(f"no process can be started to make a snapshot: {error.strerror}") from None

    @contextmanager
    def locked(self, stream: str, version: int) -> Iterator[bool]:
        """Keep others from making this snapshot while the block runs; yields False if another process is at it.

        Raises LogFull if the disk refuses.
        """
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            handle = os.open(self.folder / f".{stream}-{version}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LogFull(f"no snapshot can be made: {error.strerror}", folder=str(self.folder)) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(handle)

    def write(self, stream: str, version: int, make: Callable[[Write], tuple[bytes, Meta]]) -> None:
        """Put a snapshot in place of the one before, durable on return. Raises LogFull if the disk refuses. Blocks."""
        final = self.path(stream, version)
        try:
            with replacing(final) as file:
                file.write(bytes(HEAD_BYTES))
                head, _ = make(file.write)
                file.flush()
                os.pwrite(file.fileno(), head, 0)
        except OSError as error:
            raise LogFull(f"a snapshot cannot be written: {error.strerror}", file=str(final)) from None

    def close(self) -> None:
        """End the children; idempotent."""
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
            child.wait()
        self._children.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None


def witness(stored: Stored) -> tuple[int, str]:
    """Return what tells a record from any other at its place: its offset, and a digest."""
    digest = hashlib.blake2b(stored.key or b"", digest_size=8)
    digest.update(stored.value)
    return stored.offset, digest.hexdigest()


async def fits(log: Log, meta: Meta) -> bool:
    """Return whether a snapshot is of this log, as it is: not of another one, nor of one that was put back since.

    Of each partition the last record that was read is looked at, unless a newer one has taken its place. Blocks.
    """
    ends = await log.end_offsets(meta.stream)
    if meta.log != log.log_id or len(meta.offsets) != len(ends):
        return False
    if any(offset > end for offset, end in zip(meta.offsets, ends, strict=True)):
        return False
    for partition, seen in enumerate(meta.witnesses):
        if seen is None:
            continue
        page = await log.read(meta.stream, partition, seen[0], 1)
        if page and page[0].offset == seen[0] and witness(page[0]) != tuple(seen):
            return False
    return True
