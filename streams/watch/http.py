"""`/metrics`, `/healthz` and `/readyz` of one `streamveil run`, for all its workers.

Served by the process that starts the workers, in a thread of its own, so that it answers when a worker hangs. It holds
no record and no key, sets no cookie, asks for no password and writes no access log: listen on loopback or on a
network for operators only.

    /metrics    Prometheus text format
    /healthz    200 `ok` as long as this process lives
    /readyz     200 `ok`, or 503 and one word per reason:
        workers       fewer are at work than were asked for: starting, or waiting for what the error line says
        log           a worker has had no answer from the log for `LATE_S`
        suppressions  a worker has not read `suppressions` to its end for `LATE_S`, so it clears nothing
        keys          a worker's key lease has run out, so it seals nothing
        registries    the policy asks for one that is missing or too old, so marketing to its country is refused
        stuck         a worker has neither committed a batch nor found none to do for `STUCK_S`
        unsealed      something was found clear that must be sealed; its batch waits
        retention     something should have been destroyed more than `OVERDUE_S` ago and is still there
"""

import os
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.samples import Sample

from schemas.errors import InputInvalid
from streams.watch.metrics import INSTANTS, OLDEST_DUE, UNFIT, UNSEALED, UP, Known, served_registry
from streams.watch.watch import FOLDER_VARIABLE, Moment, Watched

LATE_S = 15.0
STUCK_S = 60.0
OVERDUE_S = 3600.0
_TEXT = "text/plain; charset=utf-8"
_FOLDER = re.compile(r"(.+)\.([0-9]+)\.[^.]+")
_TRIES = 5
_T = TypeVar("_T")


class Expected(NamedTuple):
    """What readiness is measured by: how many workers there should be, and how long a key lease lasts."""

    workers: int
    key_lease_s: float


def unready(samples: Iterable[Sample], expected: Expected, now_s: float) -> list[str]:
    """Return why not all is ready, a word each, in the order of the list above; empty: it is."""
    total: dict[str, float] = {}
    for sample in samples:
        total[sample.name] = total.get(sample.name, 0.0) + sample.value
    late_s = {moment: now_s - total.get(row.name, 0.0) for moment, row in INSTANTS.items()}
    reasons = {
        "workers": total.get(UP.name, 0.0) < expected.workers,
        "log": late_s[Moment.POLLED] > LATE_S,
        "suppressions": late_s[Moment.CAUGHT_UP] > LATE_S,
        "keys": late_s[Moment.LEASE_RENEWED] >= expected.key_lease_s,
        "registries": total.get(UNFIT.name, 0.0) > 0,
        "stuck": late_s[Moment.PROGRESS] > STUCK_S,
        "unsealed": total.get(UNSEALED.name, 0.0) > 0,
        "retention": now_s - total.get(OLDEST_DUE.name, 0.0) > OVERDUE_S,
    }
    return [reason for reason, is_so in reasons.items() if is_so]


class Served(Watched):
    """The folder that the workers of one `run` write their metrics into (0700), and what is served from it."""

    def __init__(self, folder: Path, expected: Expected) -> None:
        self._folder = folder
        self._expected = expected
        self._known = Known(expected.workers)
        self._registry = served_registry(folder, self._known)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that make a worker write into the folder."""
        return {FOLDER_VARIABLE: str(self._folder)}

    def ended(self, pid: int) -> None:
        """Have a worker that ended count no more in what is true now; what it counted stays."""
        mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]

    def retention_ran(self, outcome: str) -> None:
        """Take note that a retention run ended: done, partial or failed."""
        self._known.retention[outcome] += 1

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body for a path. Never raises for what a worker is writing at the moment."""
        if path == "/healthz":
            return 200, _TEXT, b"ok\n"
        if path == "/metrics":
            return 200, CONTENT_TYPE_PLAIN_0_0_4, _settled(self._registry, generate_latest)
        if path == "/readyz":
            samples = _settled(self._registry, _samples)
            reasons = unready(samples, self._expected, time.time())
            return (503 if reasons else 200), _TEXT, (" ".join(reasons or ["ok"]) + "\n").encode()
        return 404, _TEXT, b"there are /metrics, /healthz and /readyz\n"


def _samples(registry: CollectorRegistry) -> list[Sample]:
    return [sample for metric in registry.collect() for sample in metric.samples]


def _settled(registry: CollectorRegistry, read: Callable[[CollectorRegistry], _T]) -> _T:
    """Return what is read from the files of the workers, again if one is just being made. Blocks for milliseconds."""
    for _ in range(_TRIES - 1):
        try:
            return read(registry)
        except (struct.error, ValueError, RuntimeError, OSError):  # a file without its first bytes, or gone
            time.sleep(0.02)
    return read(registry)


@contextmanager
def serving(listen: tuple[str, int], parent: Path, expected: Expected) -> Iterator[Served]:
    """Serve while the block runs; the workers' folder is made below `parent` (0700) and removed at the end.

    Folders that a process of this machine left behind when it was killed are removed too. Raises InputInvalid if the
    address cannot be listened on.
    """
    folder = _made(parent)
    try:
        watched = Served(folder, expected)
        with _server(listen, watched) as server:
            thread = threading.Thread(target=server.serve_forever, name="watch", daemon=True)
            thread.start()
            try:
                yield watched
            finally:
                server.shutdown()
                thread.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made(parent: Path) -> Path:
    """Return a new folder, after removing those of processes that live no more."""
    host = socket.gethostname()
    parent = parent.absolute()
    for missing in [path for path in (parent, *parent.parents) if not path.exists()][::-1]:
        missing.mkdir(0o700, exist_ok=True)
    for old in parent.iterdir():
        found = _FOLDER.fullmatch(old.name)
        if found is not None and found[1] == host and not _lives(int(found[2])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{host}.{os.getpid()}.", dir=parent))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _server(listen: tuple[str, int], watched: Served) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET; says nothing of itself and logs nothing."""

        timeout = 10
        server_version, sys_version = "streamveil", ""

        def do_GET(self) -> None:
            status, kind, body = watched.answer(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET

        def handle_error(self, *_: object) -> None:
            """Say nothing of a client that went away."""

    try:
        return Server(listen, Handler)
    except OSError as error:
        raise InputInvalid(
            f"[watch] listen cannot be listened on: {error.strerror}; is another `run` at work?",
            address=f"{listen[0]}:{listen[1]}",
        ) from None
