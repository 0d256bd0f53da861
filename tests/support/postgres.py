"""A real PostgreSQL for tests: one server for the whole run, and a database with a user of its own for each test.

Rules of this file:
- The programs are those of this machine, else Debian's packages unpacked into a cache folder. Never skipped: without
  either the tests fail and say what to install.
- The server is as in production where it matters: `fsync` on, TLS on loopback, passwords as SCRAM.
- It refuses to run as root, so root gives it to `nobody`. It ends with the process that started it, however that
  ends; the folder that a killed run leaves is removed by the next.
"""

import contextlib
import ctypes
import fcntl
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import psycopg
import pytest

from deploy.kafka.broker import Authority
from streams.config import Postgres
from streams.keys.postgres import PostgresKeyStore
from streams.keys.postgres_line import SCHEMA
from streams.keys.sql import SqlKeyStore
from streams.keys.store import KmsMaker
from tests.support.keys import local_kms
from tests.support.prometheus import free_port

ROOT = os.geteuid() == 0
CACHE = (Path("/var/cache") if ROOT else Path.home() / ".cache") / "streamveil-tests" / "postgresql"
NEEDED = "these tests need PostgreSQL: apt-get install postgresql"
PROGRAMS = ("postgres", "initdb", "pg_dump", "psql")
ADMIN = "postgres"
HOST = "127.0.0.1"
PATIENCE_S = 60.0
SETTINGS = {
    "listen_addresses": HOST,
    "max_connections": "200",
    "shared_buffers": "64MB",
    "ssl": "on",
    "ssl_cert_file": "server.pem",
    "ssl_key_file": "server.pem",
    "password_encryption": "scram-sha-256",
    "timezone": "GMT",
    "log_timezone": "GMT",
    "lc_messages": "C",
    "max_wal_size": "256MB",
}
_HBA = "local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n"
_PREFIX = "streamveil-postgres-"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Programs(NamedTuple):
    """The folder of the programs, and the one with libraries that this machine lacks."""

    folder: Path
    libraries: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """What to run them with."""
        return {"PATH": os.defpath, "LC_ALL": "C"} | (
            {"LD_LIBRARY_PATH": str(self.libraries)} if self.libraries else {}
        )


@cache
def programs() -> Programs:
    """Return the programs of the newest server there is. Blocks to fetch them; fails with one line if it cannot."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: int(one.parent.name), reverse=True)
    for folder in folders:
        if all((folder / name).exists() for name in PROGRAMS):
            return Programs(folder, None)
    if not CACHE.exists():
        try:
            unpack(CACHE)
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or b""
            told = (output.decode(errors="replace").strip().splitlines() or [str(error)])[-1]
            raise AssertionError(f"{NEEDED} ({told})") from None
    return unpacked(CACHE)


def unpacked(folder: Path) -> Programs:
    """Return the programs of packages that were unpacked into a folder."""
    (server,) = folder.glob("usr/lib/postgresql/*/bin")
    (library,) = folder.glob("usr/lib/*-linux-*")
    return Programs(server, library)


def unpack(target: Path, *options: str) -> None:
    """Download PostgreSQL's packages of this machine's Debian with all they need that it lacks, and unpack them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        try:
            names = _packages(folder, *options)
            _run("apt-get", *options, "download", *names, folder=folder)
        except subprocess.CalledProcessError:  # no lists, or old ones
            _run("apt-get", "update", folder=folder)
            names = _packages(folder, *options)
            _run("apt-get", *options, "download", *names, folder=folder)
        whole = folder / "whole"
        for package in folder.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(whole), folder=folder)
        whole.chmod(0o755)
        target.parent.chmod(0o755)
        with contextlib.suppress(OSError):  # another test run was quicker
            whole.rename(target)


def _packages(folder: Path, *options: str) -> list[str]:
    plan = _run("apt-get", *options, "-s", "install", "--no-install-recommends", "postgresql", folder=folder)
    return sorted(set(re.findall(r"^Inst (\S+)", plan, re.MULTILINE)))


def _run(*command: str, folder: Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300).stdout.decode()


class Server:
    """A server in a folder of its own, below a temporary folder that its user may reach. As a context it runs."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self.ca_path = folder / "ca.pem"
        self.settings = settings
        self._programs = programs()
        self._owner = pwd.getpwnam("nobody") if ROOT else None
        self._process: subprocess.Popen[bytes] | None = None
        self.password = secrets.token_hex(16)

    def __enter__(self) -> Self:
        if not self.data.exists():
            self._make()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make(self) -> None:
        authority = Authority(self.folder)
        password = self.folder / "admin-password"
        password.touch(mode=0o600)
        password.write_text(self.password)
        self.data.mkdir(mode=0o700)
        self._give(self.folder, password, self.data)
        self.run(
            "initdb", "-D", str(self.data), "-U", ADMIN, "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync",
            "--encoding=UTF8", "--locale=C", "--data-checksums",
        )  # fmt: skip
        password.unlink()
        pem = self.data / "server.pem"
        pem.touch(mode=0o600)
        pem.write_bytes(authority.issue("localhost"))
        self._give(pem)
        (self.data / "pg_hba.conf").write_text(_HBA)

    def _give(self, *paths: Path) -> None:
        if self._owner is not None:
            for path in paths:
                os.chown(path, self._owner.pw_uid, self._owner.pw_gid)

    def run(self, program: str, *arguments: str, **environment: str) -> bytes:
        """Run one of the programs as the server's user and return its output. Raises AssertionError with its errors."""
        done = subprocess.run(
            [str(self._programs.folder / program), *arguments],
            capture_output=True,
            env=self._programs.environment | environment,
            cwd=self.folder,
            timeout=300,
            check=False,
            **self._as_owner(),
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def _as_owner(self) -> dict:
        if self._owner is None:
            return {}
        return {"user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}

    def start(self) -> None:
        """Start, and return once it answers."""
        libc = ctypes.CDLL(None)
        sockets = self.folder / "s"
        sockets.mkdir(exist_ok=True)
        self._give(sockets)
        settings = SETTINGS | {"port": str(self.port), "unix_socket_directories": str(sockets)} | self.settings
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._programs.folder / "postgres"), "-D", str(self.data),
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._programs.environment, cwd=self.folder,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(_DIE_WITH_PARENT, signal.SIGQUIT),  # noqa: PLW1509 — one C call
                **self._as_owner(),
            )  # fmt: skip
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.admin().close()
            except psycopg.OperationalError:
                assert self._process.poll() is None, self.log()[-4000:]
                assert time.monotonic() < deadline_s, "PostgreSQL did not become ready"
                time.sleep(0.05)
            else:
                return

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop at once, connections or not; SIGQUIT: as a machine that loses power does. Idempotent."""
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let every process of the server sleep meanwhile: connections stay, and nothing answers."""
        everyone = self.pids()
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in everyone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def pids(self) -> list[int]:
        """Return the process ids of the server and its children."""
        assert self._process is not None
        parent = self._process.pid
        return [parent, *map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]

    def log(self) -> str:
        """Return what the server has logged."""
        return (self.folder / "server.log").read_text(errors="replace")

    def admin(self, database: str = ADMIN) -> psycopg.Connection:
        """Return a connection of the super user, which commits by itself."""
        return psycopg.connect(
            host=str(self.folder / "s"), port=self.port, dbname=database, user=ADMIN, password=self.password,
            autocommit=True, connect_timeout=5,
        )  # fmt: skip

    def new_database(self, folder: Path) -> Postgres:
        """Return the configuration of a new database and its owner, whose password file is put into a folder."""
        name = f"t{uuid.uuid4().hex[:16]}"
        word = secrets.token_hex(16)
        with self.admin() as admin:
            admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{word}'")
            admin.execute(f"CREATE DATABASE {name} OWNER {name} TEMPLATE template0")
        password = folder / f"{name}.password"
        password.touch(mode=0o600)
        password.write_text(word + "\n")
        return Postgres(HOST, self.port, name, name, password, self.ca_path, plaintext=False, timeout_s=5.0)

    def drop_database(self, settings: Postgres) -> None:
        """Drop a database that `new_database` made, whoever is connected, and its owner."""
        with self.admin() as admin:
            admin.execute(f"DROP DATABASE IF EXISTS {settings.database} WITH (FORCE)")
            admin.execute(f"DROP ROLE IF EXISTS {settings.username}")


@contextlib.contextmanager
def new_server(**settings: str) -> Iterator[Server]:
    """Run a server of one's own; afterwards nothing of it is left."""
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    with (folder / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        folder.chmod(0o755)
        try:
            with Server(folder, **settings) as server:
                yield server
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the folders of runs that were killed: nobody holds the lock any more."""
    for held in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/held"):
        with contextlib.suppress(OSError), held.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _let_end(held.parent / "data")
            shutil.rmtree(held.parent, ignore_errors=True)


def _let_end(data: Path) -> None:
    """Let a server whose run was killed while it was suspended take note of that."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pid = int((data / "postmaster.pid").read_text().split()[0])
        if str(data).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """Yield the server that all tests share; it is stopped and deleted with the last of them."""
    with new_server() as server:
        yield server


@pytest.fixture
def postgres(postgres_server: Server, tmp_path: Path) -> Iterator[Postgres]:
    """Yield the configuration of an empty database that nobody else has; it is dropped when the test is over."""
    settings = postgres_server.new_database(tmp_path)
    yield settings
    postgres_server.drop_database(settings)


def _open(settings: Postgres, kms: KmsMaker) -> SqlKeyStore:
    return PostgresKeyStore.open(settings, kms)


class PostgresKeyStores:
    """The key store in a database of its own; time passes by the server's clock."""

    def __init__(self, settings: Postgres, folder: Path) -> None:
        self.settings = settings
        self.kms_folder = folder / "kms"
        self.stores: list[PostgresKeyStore] = []

    def open(self, **options: Any) -> PostgresKeyStore:
        options = {"busy_timeout_s": 5.0} | options
        self.stores.append(PostgresKeyStore.open(self.settings, local_kms(self.kms_folder), **options))
        return self.stores[-1]

    def opener(self) -> Callable[[], SqlKeyStore]:
        return partial(_open, self.settings, local_kms(self.kms_folder))

    def elapse(self, duration_s: float) -> None:
        time.sleep(duration_s)

    def run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with connect(self.settings) as beside:
            cursor = beside.execute(query.replace("?", "%s"), values, binary=True)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        for store in self.stores:
            store.close()


def connect(settings: Postgres) -> psycopg.Connection:
    """Return a connection beside the store, as the same user, which commits by itself."""
    assert settings.password_path is not None
    return psycopg.connect(
        host=settings.host, port=settings.port, dbname=settings.database, user=settings.username, autocommit=True,
        password=settings.password_path.read_text().strip(), sslmode="verify-full", sslrootcert=str(settings.ca_path),
        options=f"-c search_path={SCHEMA}",
    )  # fmt: skip


@pytest.fixture
def postgres_stores(postgres: Postgres, tmp_path: Path) -> Iterator[PostgresKeyStores]:
    """Yield a key store in a database of its own, not made yet."""
    stores = PostgresKeyStores(postgres, tmp_path)
    yield stores
    stores.close()
