"""The registries of a deployment: a folder (0700) of registry files (0600), each mapped and swapped whole.

A load parses everything first, then writes beside, syncs and renames: whatever fails, the version before still serves.
A process maps each file, so that all processes of a machine share its pages. A new version is opened and verified in a
thread while the one before goes on answering, and swapped in by a later `refresh`; if it is damaged, there is no swap.
"""

import fcntl
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from processors.screen.lists import FORMATS, ListFormat
from processors.screen.registry import DAY_S, Header, RegistryFile
from processors.screen.registry_build import RegistryBuilder
from schemas.errors import InputInvalid, RegistryInvalid
from streams.files import Stamp, open_file, replacing, stamp
from streams.state.listfiles import contents, dated_s

SUFFIX: Final = ".bitmap"
REFRESH_S: Final = 1.0
RETIRE_S: Final = 60.0
"""How long a version that was swapped out is kept for batches that hold it, before a thread unmaps it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_STILL = "what was loaded before still serves"


class Registries:
    """Every registry that is loaded, read-only: a `RegistryView`. Opening it reads each file once, to verify it."""

    def __init__(self, folder: Path) -> None:
        """Open what is in the folder, which need not exist. Raises RegistryInvalid if it or a file cannot be read."""
        self._folder = folder
        self._serving: dict[str, RegistryFile] = {}
        self._versions: dict[str, Stamp] = {}
        self._damaged: dict[str, Stamp] = {}
        self._opening: _Opening | None = None
        self._retired: list[tuple[float, RegistryFile]] = []
        self._checked_s: float | None = None
        for name, path in _files_known(folder):
            with suppress(FileNotFoundError):  # removed this moment: not loaded
                self._versions[name], self._serving[name] = _map(path, name)

    def __repr__(self) -> str:
        return f"Registries({', '.join(self.names())})"

    def get(self, name: str) -> RegistryFile | None:
        """Return a registry, or None if it is not loaded. Never blocks; it stays valid after a swap."""
        return self._serving.get(name)

    def names(self) -> list[str]:
        """Return the names of what is loaded, sorted."""
        return sorted(self._serving)

    def damaged(self) -> list[str]:
        """Return the names of registries of which a newer version is damaged, so that it does not serve; sorted."""
        return sorted(self._damaged)

    def refresh(self, monotonic_s: float) -> None:
        """Swap in what was loaded since, and drop what is gone; looks at the folder at most once a second.

        Never blocks and raises nothing. A new version serves from the first refresh after a thread has verified it.
        While the folder cannot be read, what serves goes on.
        """
        if self._checked_s is not None and 0 <= monotonic_s - self._checked_s < REFRESH_S:
            return
        self._checked_s = monotonic_s
        try:
            found = _versions(self._folder)
        except OSError:
            return
        serving = {name: registry for name, registry in self._serving.items() if name in found}
        if self._opening is not None and self._opening.done.is_set():
            for name, (version, registry) in self._opening.opened.items():
                if registry is None:
                    self._damaged[name] = version
                elif name in found:
                    serving[name], self._versions[name] = registry, version
            self._opening = None
        self._retire(serving, monotonic_s)
        self._serving = serving
        self._versions = {name: version for name, version in self._versions.items() if name in serving}
        self._damaged = {
            name: version
            for name, version in self._damaged.items()
            if found.get(name) == version and self._versions.get(name) != version
        }
        changed = [
            name
            for name, version in found.items()
            if version not in (self._versions.get(name), self._damaged.get(name))
        ]
        if changed and self._opening is None:
            self._opening = _Opening(self._folder, changed)

    def _retire(self, serving: dict[str, RegistryFile], monotonic_s: float) -> None:
        """Keep what no longer serves for a while; then unmap it in a thread, for that takes tens of milliseconds."""
        gone = [registry for name, registry in self._serving.items() if serving.get(name) is not registry]
        self._retired += [(monotonic_s, registry) for registry in gone]
        old = [entry for entry in self._retired if not 0 <= monotonic_s - entry[0] < RETIRE_S]
        if old:
            self._retired = [entry for entry in self._retired if entry not in old]
            threading.Thread(target=old.clear, daemon=True).start()


class _Opening:
    """A thread that opens and verifies files. Once `done`, `opened` says of each what was found; None: damaged."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.done = threading.Event()
        self.opened: dict[str, tuple[Stamp, RegistryFile | None]] = {}
        self._folder = folder
        self._names = names
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            for name in self._names:
                path = self._folder / f"{name}{SUFFIX}"
                with suppress(OSError):  # removed this moment, or looked at again
                    version = stamp(path.stat())
                    try:
                        self.opened[name] = _map(path, name)
                    except RegistryInvalid:
                        self.opened[name] = version, None
        finally:
            self.done.set()


def survey(folder: Path) -> dict[str, RegistryFile | RegistryInvalid]:
    """Return each registry that is loaded, by name, or what is wrong with its file; reads each file once.

    Blocks on the disk. Raises RegistryInvalid if the folder cannot be read.
    """
    found: dict[str, RegistryFile | RegistryInvalid] = {}
    for name, path in _files_known(folder):
        with suppress(FileNotFoundError):  # removed this moment: not loaded
            try:
                found[name] = _map(path, name)[1]
            except RegistryInvalid as error:
                found[name] = error
    return found


def _files_known(folder: Path) -> list[tuple[str, Path]]:
    """Return names and files. Raises RegistryInvalid if it is not known what is loaded: all might be."""
    try:
        return _files(folder)
    except OSError as error:
        raise RegistryInvalid(f"cannot be read: {error.strerror}", file=str(folder)) from None


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Return names and files; none if there is no folder. Raises OSError, which `Path.glob` would pass over."""
    try:
        found = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    here = [path for path in found if path.name.endswith(SUFFIX) and not path.name.startswith(".")]
    return [(path.name.removesuffix(SUFFIX), path) for path in here]


def _versions(folder: Path) -> dict[str, Stamp]:
    found = {}
    for name, path in _files(folder):
        with suppress(FileNotFoundError):  # removed this moment: not loaded
            found[name] = stamp(path.stat())
    return found


def _map(path: Path, name: str) -> tuple[Stamp, RegistryFile]:
    """Return a verified registry. Raises RegistryInvalid with the file, and FileNotFoundError."""
    try:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            if not status.st_size:
                raise RegistryInvalid("truncated; load the registry again")
            view = memoryview(mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ))
        registry = RegistryFile(view)
        if registry.name != name:
            raise RegistryInvalid("the file was made for another registry; load the registry again")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RegistryInvalid(f"cannot be read: {error.strerror}", file=str(path)) from None
    except RegistryInvalid as error:
        raise RegistryInvalid(error.message, file=str(path)) from None
    return stamp(status), registry


# --- loading ------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What a load is told: whose list it is, how it is read, its date, and what is meant though it looks wrong."""

    country: str
    calling_code: str
    now_s: int
    as_of_s: int | None = None  # None: the oldest modification time of the files
    form: ListFormat | None = None  # None: as the name says
    older: bool = False
    smaller: bool = False


class Changed(NamedTuple):
    """What change lists did: numbers `added`, and listed `already`; `deleted`, and `unlisted` before."""

    header: Header
    added: int
    already: int
    deleted: int
    unlisted: int


Progress = Callable[[int], None]


def load(
    folder: Path, name: str, files: Iterable[Path], terms: Terms, progress: Progress = lambda _bytes: None
) -> Header:
    """Make the files together the registry `name`, durable on return, and return its header. Blocks (disk).

    All or nothing. `progress` is told, now and then, how many bytes more were read. Raises RegistryInvalid (with file
    and line, or because the disk refuses), and InputInvalid if a file cannot be read, or if the list is older, or
    less than half as long, than the one that serves, unless the terms say so.
    """
    form, files = _form(name, terms), list(files)
    as_of_s = _as_of_s(files, terms)
    builder = RegistryBuilder()
    for file in files:
        _read(form, file, builder.add, progress)
    with _locked(folder):
        serving = None
        with suppress(RegistryInvalid, FileNotFoundError):  # what is damaged is replaced
            serving = _map(folder / f"{name}{SUFFIX}", name)[1].header
        return _finish(folder, name, builder, as_of_s, terms, serving)


def change(
    folder: Path,
    name: str,
    *,
    add: Iterable[Path],
    delete: Iterable[Path],
    terms: Terms,
    progress: Progress = lambda _bytes: None,
) -> Changed:
    """Apply change lists to the registry that serves, durable on return; say what they did. Blocks (disk).

    Deletions come first: a number that is in both lists stays listed. Else as `load`; raises RegistryInvalid too if
    nothing is loaded, or what is loaded is damaged.
    """
    form, adds, deletes = _form(name, terms), list(add), list(delete)
    as_of_s = _as_of_s([*adds, *deletes], terms)
    with _locked(folder):
        try:
            serving = _map(folder / f"{name}{SUFFIX}", name)[1]
        except FileNotFoundError:
            raise RegistryInvalid("there is nothing to change: load the whole list first") from None
        builder, given, before = RegistryBuilder(serving), [0, 0], serving.count
        counts = [before]
        for at, lists in enumerate((deletes, adds)):
            collected = RegistryBuilder()  # so that a number that is given twice counts once
            for file in lists:
                _read(form, file, collected.add, progress)
            given[at] = collected.count()
            for numbers in collected.numbers():
                (builder.remove, builder.add)[at](numbers)
            counts.append(builder.count())
        deleted, added = counts[0] - counts[1], counts[2] - counts[1]
        header = _finish(folder, name, builder, as_of_s, terms, serving.header)
        return Changed(header, added, given[1] - added, deleted, given[0] - deleted)


def _form(name: str, terms: Terms) -> ListFormat:
    if not _NAME.fullmatch(name):
        raise InputInvalid("a registry's name has 1 to 64 letters, digits, `_`, `.`, `-`")
    form = terms.form or FORMATS.get(name)
    if form is None:
        known = ", ".join(sorted(FORMATS))
        raise InputInvalid(f"how this list is written is not known by its name, only of {known}: give --map FILE")
    code = form.calling_code()
    if code is not None and code != terms.calling_code:
        raise InputInvalid("the numbers of this format are of another calling code than the policy says")
    return form


def _as_of_s(files: Sequence[Path], terms: Terms) -> int:
    if not files:
        raise InputInvalid("give at least one FILE")
    as_of_s = dated_s(files) if terms.as_of_s is None else terms.as_of_s
    if as_of_s > terms.now_s + DAY_S:
        raise InputInvalid("the date of the list lies in the future; give its own with --as-of")
    return as_of_s


def _read(form: ListFormat, file: Path, take: Callable[..., None], progress: Progress) -> None:
    for member, chunks in contents(file, progress):
        for numbers in form.read(chunks, member):
            take(numbers)


def _finish(
    folder: Path,
    name: str,
    builder: RegistryBuilder,
    as_of_s: int,
    terms: Terms,
    serving: Header | None,
) -> Header:
    """Write what was collected in place of what serves, unless that looks wrong."""
    built = builder.finish(name=name, country=terms.country, as_of_s=as_of_s, loaded_at_s=terms.now_s)
    if serving is not None:
        if as_of_s < serving.as_of and not terms.older:
            raise InputInvalid(f"the list is older than the one loaded; {_STILL}; --older if that is meant")
        if built.header.count * 2 < serving.count and not terms.smaller:
            raise InputInvalid(f"the list has not half the numbers of the one loaded; {_STILL}; --smaller if meant")
    final = folder / f"{name}{SUFFIX}"
    try:
        with replacing(final) as out:
            out.writelines(built.chunks())
    except OSError as error:
        raise RegistryInvalid(f"cannot be written: {error.strerror}; {_STILL}", file=str(final)) from None
    return built.header


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder, private, and keep other loads out of it meanwhile; blocks while one is writing."""
    try:
        for missing in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
            missing.mkdir(0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RegistryInvalid(f"cannot be written: {error.strerror}", file=str(folder)) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
