"""A real server for tests of the key management service: Vault's core with transit, kv and AppRole, on loopback.

The program is built once from the Go modules that `vault_server/go.mod` pins, into a cache folder. It is never skipped:
without Go those tests fail and say what to install. One server serves the whole run; what a test kills, seals or stops
is whole again for the next one.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import httpx
import pytest

from deploy.kafka.broker import Authority
from deploy.vault.setup import Made, Names, set_up
from streams.config import Vault
from tests.support.prometheus import free_port

SOURCE = Path(__file__).resolve().parent / "vault_server"
LOOPBACK = "127.0.0.1"
START_S = 30.0


def program() -> Path:
    """Return the server's program. Builds it the first time: blocks for minutes."""
    go = shutil.which("go")
    assert go is not None, "Go is needed, once, to build the server of these tests (Debian: golang-go)"
    files = sorted(path for path in SOURCE.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamveil"
    built = root / f"vault-{digest}"
    if built.exists():
        return built
    root.mkdir(parents=True, exist_ok=True)
    with (root / "vault.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            draft = root / f".vault-{uuid.uuid4().hex}"
            command = [go, "build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o", str(draft), "."]
            done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            draft.rename(built)
    return built


class Server:
    """One server in a folder of its own; `with Server(folder) as server:` is up, unsealed and set up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        authority = Authority(folder)
        self.ca_path = authority.path
        self._pem = folder / "server.pem"
        self._pem.write_bytes(authority.issue("localhost"))
        self.port = free_port()
        self.address = f"https://{LOOPBACK}:{self.port}"
        self._process: subprocess.Popen | None = None
        self._waker: subprocess.Popen | None = None
        self.admin = httpx.Client(
            base_url=self.address, verify=ssl.create_default_context(cafile=self.ca_path), trust_env=False, timeout=10
        )
        self._share = ""
        self.made: Made

    def __enter__(self) -> Self:
        self.start()
        born = self.ask("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self._share = born["keys_base64"][0]
        self.admin.headers["X-Vault-Token"] = born["root_token"]
        self.unseal()
        self.made = set_up(self.admin, Names())
        return self

    def __exit__(self, *_: object) -> None:
        self.admin.close()
        self.kill()

    # --- what can be done to it ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; it is sealed, as any such server."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program(), str(self.port), self.folder / "storage", self._pem, self._pem],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout.readline() == b"ready\n", (self.folder / "server.log").read_text()[-2000:]

    def kill(self) -> None:
        """End the process at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.go_on()

    def stop(self) -> None:
        """Suspend the process, until `go_on` or our own end: connections are accepted, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)
        script = f"read _; kill -CONT {self._process.pid} 2> {os.devnull}"
        self._waker = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE)

    def go_on(self) -> None:
        """Let a suspended process go on."""
        waker, self._waker = self._waker, None
        if waker is not None:
            waker.communicate()

    def seal(self) -> None:
        self.ask("PUT", "sys/seal")

    def unseal(self) -> None:
        self.ask("PUT", "sys/unseal", {"key": self._share})
        deadline = time.monotonic() + START_S
        while self.admin.get("/v1/sys/health").status_code != 200:
            assert time.monotonic() < deadline, "the server does not become active"
            time.sleep(0.02)

    def heal(self) -> None:
        """Be up and unsealed again, whatever was done."""
        if self._process is None:
            self.start()
        self.go_on()
        if self.ask("GET", "sys/seal-status")["sealed"]:
            self.unseal()

    def ask(self, method: str, path: str, body: object = None) -> dict:
        """Return what the server says to its administrator; what is not there is empty."""
        answer = self.admin.request(method, f"/v1/{path}", json=body)
        assert answer.status_code < 300 or (answer.status_code == 404 and method in ("GET", "LIST")), answer.text
        return answer.json() if answer.content else {}

    # --- who talks to it ----------------------------------------------------------------------------------------

    def token(self, policy: str = "streamveil", ttl: str = "1h") -> str:
        """Return a new token."""
        made = self.ask("POST", "auth/token/create", {"policies": [policy], "ttl": ttl, "no_default_policy": True})
        return made["auth"]["client_token"]

    def settings(self, folder: Path, **changes: object) -> Vault:
        """Return the configuration of a client that logs in by AppRole; its secret id lies in the folder."""
        secret = write_secret(folder / "secret-id", self.made.secret_id)
        settings = Vault(
            self.address, "transit", "secret", "streamveil-", None, None, self.made.role_id, secret, self.ca_path, 2.0
        )
        return settings._replace(**changes)

    def by_token(self, folder: Path, **changes: object) -> Vault:
        """Return the configuration of a client with a token in the file `token` of the folder."""
        path = write_secret(folder / "token", self.token())
        return self.settings(folder, token_path=path, role_id=None, secret_id_path=None, **changes)

    def table(self, settings: Vault) -> str:
        """Return a configuration as the table `[vault]` of a file."""
        names = {"token_path": "token_file", "secret_id_path": "secret_id_file", "ca_path": "ca_file"}
        rows = {names.get(key, key): value for key, value in settings._asdict().items() if value is not None}
        lines = (f"{key} = {json.dumps(value, default=str)}\n" for key, value in rows.items())
        return "[vault]\n" + "".join(lines)


def write_secret(path: Path, text: str) -> Path:
    """Write a file for the owner's eyes, whole."""
    draft = path.with_name(path.name + ".new")
    draft.touch(0o600)
    draft.write_text(text)
    draft.rename(path)
    return path


@pytest.fixture(scope="session")
def _one_vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("vault") / "server") as server:
        yield server


@pytest.fixture
def vault(_one_vault: Server) -> Iterator[Server]:
    """Yield the server that all tests share, up and unsealed."""
    _one_vault.heal()
    yield _one_vault
    _one_vault.heal()
