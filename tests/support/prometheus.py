"""A real Prometheus and promtool from Debian's package, unpacked into a cache folder; no service is started."""

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

CACHE = Path.home() / ".cache" / "streamveil-tests" / "prometheus"
NEEDED = "these tests need Prometheus: apt-get install prometheus"
PATIENCE_S = 60.0
_NUMBERS = itertools.count(random.Random(os.getpid()).randrange(20_000))


class Programs(NamedTuple):
    """Where the programs are."""

    prometheus: str
    promtool: str


@cache
def programs() -> Programs:
    """Return both programs: those on the path, else unpacked from the package. Fails with one line if neither is."""
    for folder in (None, f"{CACHE}/usr/bin"):
        found = [shutil.which(name, path=folder) for name in Programs._fields]
        if all(found):
            return Programs(*found)
    try:
        _unpack()
    except (OSError, subprocess.SubprocessError) as error:
        raise AssertionError(f"{NEEDED} ({_told(error)})") from None
    return Programs(*(f"{CACHE}/usr/bin/{name}" for name in Programs._fields))


def _unpack() -> None:
    """Download the package of this machine's Debian, and put what is in it into the cache, whole."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as name:
        folder = Path(name)
        try:
            _run("apt-get", "download", "prometheus", folder=folder)
        except subprocess.CalledProcessError:  # no lists, or old ones
            _run("apt-get", "update", folder=folder)
            _run("apt-get", "download", "prometheus", folder=folder)
        (package,) = folder.glob("prometheus_*.deb")
        _run("dpkg", "-x", str(package), str(folder / "whole"), folder=folder)
        with contextlib.suppress(OSError):  # another test run was quicker
            (folder / "whole").rename(CACHE)


def _run(*command: str, folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


def _told(error: Exception) -> str:
    output = getattr(error, "stderr", None) or b""
    return (output.decode(errors="replace").strip().splitlines() or [str(error)])[-1]


def free_port() -> int:
    """Return a port of the loopback that nobody listens on, another one each time.

    None of those that the system gives to connections, 32,768 and on: one of them could take it before it is bound,
    or while a server that has it is stopped.
    """
    for number in _NUMBERS:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port := 10_000 + number % 20_000))
            return port
    raise AssertionError


class Prometheus:
    """A server that runs; asks its API."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> dict:
        """Return `data` of an answer of the API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def query(self, expression: str) -> list[dict]:
        """Return the series of an instant query."""
        return self.get("query", query=expression)["result"]


@contextlib.contextmanager
def running(folder: Path, config: Path) -> Iterator[Prometheus]:
    """Run a server with a configuration file on a free port; it is stopped at the end whatever happens."""
    port = free_port()
    command = [
        programs().prometheus, f"--config.file={config}", f"--storage.tsdb.path={folder}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with (folder.parent / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(port)
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                urllib.request.urlopen(f"{server.url}/-/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder.parent / "prometheus.log").read_text()
                assert time.monotonic() < deadline_s, "Prometheus did not become ready"
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
