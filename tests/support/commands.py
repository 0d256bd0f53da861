"""The whole program through its command line, on a deployment of its own: `Place`.

`run` and `start` make a process, `call` does the same in this one and is quicker. A sabotaged command is the real one
after a few lines of Python that slow it, stop it or break it at a point that cannot be hit from outside.
"""

import asyncio
import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from streams.cli.main import main
from streams.config import load
from streams.deployment import Deployment
from tests.support.records import raw

PATIENCE_S = 60.0
"""How long a test waits for what must come; nothing is measured by it."""
SHORT_LEASE = {"lease_s": 0.6}
_SABOTAGED = "import sys\n{code}\nfrom streams.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"


class Done(NamedTuple):
    """How a command ended: status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict]:
        """The JSON objects of standard output."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def records(self) -> int:
        """The number of records that `run` says it worked on, all workers together."""
        counts = [line for line in self.err.splitlines() if line.endswith(" records")]
        return sum(int(line.split()[1].replace(",", "")) for line in counts)


def ago(seconds: float = 30) -> str:
    """Return the instant so many seconds ago, as records have it."""
    return datetime.fromtimestamp(time.time() - seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def eventually(is_so: Callable[[], object], what: str) -> object:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)
    return found


class Place:
    """A folder with a deployment in `data/`, its key service beside it, and files to publish beside that."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.log_path = self.data / "log.db"
        self.url = f"sqlite:///{self.log_path}"
        self.config = folder / "streamveil.toml"
        self.aside = folder
        """Where input files and standard errors go."""
        self._files = 0
        self._processes: dict[subprocess.Popen, Path] = {}  # → its standard error
        self.configure(**settings)

    def configure(self, **settings: object) -> None:
        """Write the configuration anew."""
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        self.config.write_text(text)

    def policy(self, text: str) -> None:
        """Have a policy of its own."""
        (self.folder / "policy.toml").write_text(text)
        with self.config.open("a") as file:
            file.write('policy = "policy.toml"\n')

    # --- commands -----------------------------------------------------------------------------------------------

    def _words(self, words: tuple[object, ...]) -> list[str]:
        return [*map(str, words), "--log", self.url, "--config", str(self.config)]

    def _line(self, words: tuple[object, ...], sabotage: str | None) -> list[str]:
        program = ["-m", "streams.cli"] if sabotage is None else ["-c", _SABOTAGED.format(code=sabotage)]
        return [sys.executable, *program, *self._words(words)]

    def run(self, *words: object, sabotage: str | None = None, data: bytes = b"") -> Done:
        """Run a command to its end in a process of its own."""
        done = subprocess.run(
            self._line(words, sabotage), input=data, capture_output=True, check=False, timeout=PATIENCE_S,
            cwd=self.folder,
        )  # fmt: skip
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *words: object, sabotage: str | None = None, out: object = subprocess.PIPE) -> subprocess.Popen:
        """Start a command; `ended` waits for its end, and `close` kills what is left. `out`: a file for its output."""
        self._files += 1
        path = self.aside / f"err-{self._files}.txt"
        with path.open("wb") as err:
            process = subprocess.Popen(
                self._line(words, sabotage), stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        self._processes[process] = path
        return process

    def told(self, process: subprocess.Popen) -> str:
        """Return what a process has written to standard error so far."""
        return self._processes[process].read_text()

    def ended(self, process: subprocess.Popen) -> Done:
        """Wait for a process's end."""
        out, _ = process.communicate(timeout=PATIENCE_S)
        return Done(process.returncode, (out or b"").decode(), self.told(process))

    def call(self, *words: object, data: bytes = b"") -> Done:
        """Run a command to its end in this process."""
        streams = [io.TextIOWrapper(io.BytesIO(content), "utf-8") for content in (data, b"", b"")]
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, "stdin", streams[0]))
            stack.enter_context(contextlib.redirect_stdout(streams[1]))
            stack.enter_context(contextlib.redirect_stderr(streams[2]))
            try:
                status = main(self._words(words))
            except SystemExit as wrong_usage:
                status = wrong_usage.code
        for stream in streams[1:]:
            stream.flush()
        return Done(status, *(stream.buffer.getvalue().decode() for stream in streams[1:]))

    # --- what tests do all the time -----------------------------------------------------------------------------

    def file(self, *records: object) -> Path:
        """Return a new file of records, a line each."""
        self._files += 1
        path = self.aside / f"in-{self._files}.ndjson"
        path.write_bytes(b"".join(raw(one) + b"\n" for one in records))
        return path

    def publish(self, *records: object) -> None:
        done = self.call("publish", self.file(*records))
        assert done.status == 0, done.err

    def work(self) -> int:
        """Run a worker until it is idle, and return how many records it worked on."""
        done = self.call("run", "--until-idle")
        assert done.status == 0, done.err
        return done.records

    def tail(self, stream: str, *more: object) -> list[dict]:
        """Return all records of a stream, as the command line shows them."""
        done = self.call("tail", stream, "--from-beginning", "--json", *more)
        assert done.status == 0, done.err
        return done.lines

    def values(self, stream: str) -> list[dict]:
        return [line["value"] for line in self.tail(stream)]

    def opened(self, stream: str) -> list[dict]:
        """Return the fields of all records of a stream, every one of which must open."""
        reveals = [line["reveal"] for line in self.tail(stream, "--reveal", "--reason", "TEST-1")]
        assert {one["state"] for one in reveals} <= {"revealed"}
        return [one["fields"] for one in reveals]

    def verdicts(self) -> dict[str, tuple[str, str | None]]:
        """Return record id → verdict and reason, after seeing that no id has two."""
        found = self.values("verdicts")
        assert len({one["record_id"] for one in found}) == len(found)
        return {one["record_id"]: (one["verdict"], one["reason"]) for one in found}

    def ends(self, stream: str) -> int:
        """Return how many messages a stream has ever had."""
        return sum(self.within(lambda deployment: deployment.log.end_offsets(stream)))

    def within(self, work: Callable, **options: object):
        """Return what the coroutine `work(deployment)` returns."""

        async def inside():
            config = load(SimpleNamespace(config=str(self.config), log=self.url))
            async with Deployment.open(config, **options) as deployment:
                return await work(deployment)

        return asyncio.run(inside())

    def key_leases(self) -> list[str]:
        """Return the processes whose leases of keys have not run out."""

        async def alive(deployment):
            return list(deployment.store.leases())

        return self.within(alive)

    def stored(self, stream: str) -> list:
        """Return all messages of a stream with their places."""

        async def read(deployment):
            log = deployment.log
            begins, ends = await log.begin_offsets(stream), await log.end_offsets(stream)
            pages = [await log.read(stream, p, begins[p], ends[p] - begins[p]) for p in range(len(ends))]
            return [one for page in pages for one in page]

        return self.within(read)

    def row(self, query: str, name: str = "log.db") -> tuple:
        """Return the one row of a query on a file of the deployment; None while there is no such table."""
        with contextlib.closing(sqlite3.connect(f"file:{self.data / name}?mode=ro", uri=True)) as db:
            try:
                return db.execute(query).fetchone()
            except sqlite3.OperationalError:
                return (None,)

    def committed(self) -> int:
        """Return how many input records are committed; 0 before there is a log."""
        if not self.log_path.exists():
            return 0
        (found,) = self.row("SELECT sum(next_offset) FROM committed")
        return found or 0

    def clear_files(self) -> list[Path]:
        """Return the files that clear input may be in."""
        return sorted(self.data.glob("log-traffic.db*"))

    def files(self) -> list[Path]:
        """Return every file of the deployment but registries: log, keys and key service."""
        folders = (self.data, self.folder / "streamveil-kms")
        found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return [path for path in found if "registries" not in path.parts]

    def close(self) -> None:
        """Kill what is still running, with its children."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def is_stopped(process: subprocess.Popen) -> bool:
    """Return whether a process has been stopped by SIGSTOP."""
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    assert process.poll() is None
    return state == "T"


def one_line(done: Done) -> str:
    """Return the one line that a command that failed has written."""
    assert done.status == 1
    assert done.err.startswith("streamveil: ")
    assert done.err.count("\n") == 1, done.err
    return done.err
