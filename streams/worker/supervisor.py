"""Runs workers: one in this process, or several as child processes that are stopped and restarted together.

Beside them runs `retention run`, as a child process too, at the start and then each quarter of an hour. That it fails
is a line and a metric, and never the end of a worker. Whoever is to be watched (`[watch] listen`) runs as a child too,
be it one only: the parent serves what the children count, also when one of them hangs.
"""

import asyncio
import os
import random
import signal
import sys
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import orjson

from processors.pipeline import Outcome
from schemas.errors import Action, Fatal, Retriable, StreamveilError, action_for
from streams.config import Config
from streams.deployment import Deployment, worker_slot
from streams.keys.opening import store_exists
from streams.state.reviews import OpenReviews
from streams.watch.overdue import LOOK_EVERY_S, overdue
from streams.watch.watch import FOLDER_VARIABLE, Watch, Watched
from streams.worker.selftest import selftest
from streams.worker.worker import Worker

_TELL_EVERY_S = 5.0
_REOPEN_S = 1.0
_STOPS = (signal.SIGTERM, signal.SIGINT)
FENCED_STATUS = 75
"""How a child ends that was fenced: its place is to be taken."""
_SUPERVISED = "STREAMVEIL_SUPERVISED"
_STOPPED = (-signal.SIGTERM, -signal.SIGINT, 130)
"""How a child ends that was stopped before it could listen."""


RETENTION_EVERY_S = 900
RETENTION_NICE = 10
_START_S, _JITTER_S = 5.0, 60.0
"""A run begins so long at most after the start, and after a quarter of an hour, that not all machines begin at once."""


async def run_one(
    config: Config,
    *,
    until_idle: bool,
    on_batch: Callable[[list[Outcome]], None] | None = None,
    config_args: list[str] | None = None,
) -> Counter[Outcome]:
    """Run one worker in this process until SIGTERM, SIGINT or (with `until_idle`) the end of the input.

    With `config_args`, those of the command line that name the configuration, retention runs beside it, unless it is
    `until_idle`. Returns how many records ended in which outcome. Raises Fatal errors of start-up, self-test and
    worker.
    """
    tell = _teller()
    watch = _watch(config)
    async with _stopped_by_signals() as stopping, AsyncExitStack() as parts:
        if config_args is not None and not until_idle:
            await parts.enter_async_context(_retention(config, config_args, stopping, Watched()))
        while not stopping.is_set():
            try:
                worker = await _opened(parts, config, stopping, on_batch, tell, watch)
            except StreamveilError as error:
                if action_for(error) is not Action.WAIT:
                    raise
                watch.waits(error)
                tell(error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), _REOPEN_S)
            else:
                await worker.run(until_idle=until_idle)
                return worker.outcomes
    return Counter()


async def _opened(
    parts: AsyncExitStack,
    config: Config,
    stopping: asyncio.Event,
    on_batch: Callable[[list[Outcome]], None] | None,
    on_wait: Callable[[StreamveilError], None],
    watch: Watch,
) -> Worker:
    """Return a worker after its self-test; its log and keys stay open as long as `parts`. Raises: nothing is open.

    No call waits for other processes as long as a lease: a worker that waits keeps its partitions.
    """
    async with AsyncExitStack() as opened:
        deployment = await opened.enter_async_context(Deployment.open(config, busy_s=config.lease_s / 2))
        deployment.store.kms = watch.of_kms(deployment.store.kms)
        registries = deployment.registries()
        selftest(config.policy, registries, int(time.time()))
        cache, lease = deployment.keys()
        worker_id = opened.enter_context(worker_slot(config))
        await opened.enter_async_context(_overdue_told(deployment, watch))
        await parts.enter_async_context(opened.pop_all())
    return Worker(
        deployment.log,
        deployment.log.consumer(worker_id),
        deployment.pipeline,
        cache,
        lease,
        registries,
        deployment.suppressions(waits=False),
        deployment.exemptions(waits=False),
        refresh=deployment.refresh_tokens,
        margin_s=deployment.margin_s,
        batch_records=config.batch_records,
        on_batch=on_batch,
        on_wait=on_wait,
        watch=watch,
        stopping=stopping,
    )


@asynccontextmanager
async def _overdue_told(deployment: Deployment, watch: Watch) -> AsyncIterator[None]:
    """Tell, once a minute while the block runs, what is overdue; what cannot be seen now is seen next time."""
    reviews = OpenReviews(deployment.log)

    async def look() -> None:
        while True:
            now_s = int(time.time())
            with suppress(Retriable):
                watch.overdue(overdue(deployment.store, now_s))
            with suppress(StreamveilError):  # a worker goes on without them; that nobody looks is told too
                await reviews.catch_up()
                reviews.forget_dead(now_s)
                watch.reviews(reviews.clocks(now_s), reviews.died(now_s))
            await asyncio.sleep(LOOK_EVERY_S)

    looking = asyncio.create_task(look()) if watch.on else None
    try:
        yield
    finally:
        if looking is not None:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking


def is_watched(config: Config) -> bool:
    """Return whether this process is a worker whose metrics another one serves."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return folder is not None and Path(folder).parent == config.watch_path.absolute()


def _watch(config: Config) -> Watch:
    """Return what this process tells about its work."""
    if not is_watched(config):
        return Watch()
    from streams.watch.metrics import Metrics  # noqa: PLC0415 — takes a quarter of a second, for who is watched only

    return Metrics()


@contextmanager
def _served(config: Config, count: int) -> Iterator[Watched]:
    """Serve the workers' metrics, if the configuration says where."""
    if config.watch is None:
        yield Watched()
        return
    from streams.watch.http import Expected, serving  # noqa: PLC0415 — as above

    with serving(config.watch, config.watch_path, Expected(count, config.key_lease_s)) as watched:
        yield watched


async def run_many(config: Config, count: int, config_args: list[str], *, until_idle: bool) -> None:
    """Run `count` workers as child processes; SIGTERM and SIGINT go to all.

    One that was fenced or killed is replaced. Raises Fatal if one ends with another error, when all have ended.
    """
    command = [sys.executable, "-m", "streams.cli", "run", "--workers", "1", *config_args]
    if until_idle:
        command.append("--until-idle")
    with _served(config, count) as watched:
        async with _stopped_by_signals() as stopping, AsyncExitStack() as parts:
            if not until_idle:
                await parts.enter_async_context(_retention(config, config_args, stopping, watched))
            environment = {**os.environ, **watched.variables, _SUPERVISED: "1"}

            async def start() -> Process:
                return await asyncio.create_subprocess_exec(*command, env=environment)

            failed = await asyncio.gather(*(_kept(start, stopping, watched) for _ in range(count)))
    if any(failed):
        raise Fatal("a worker ended with an error and the others were stopped; see its line above")


async def _kept(start: Callable[[], Awaitable[Process]], stopping: asyncio.Event, watched: Watched) -> bool:
    """Keep one worker running, and return whether it failed; then all others are stopped."""
    while True:
        child = await start()
        status = await _ended(child, stopping)
        watched.ended(child.pid)
        if status == 0 or (stopping.is_set() and status in _STOPPED):
            return False
        if stopping.is_set() or not (status == FENCED_STATUS or status < 0):
            stopping.set()
            return True
        sys.stderr.write("streamveil: a worker was fenced or killed and is replaced\n")
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _REOPEN_S)
        if stopping.is_set():
            return False


async def _ended(child: Process, stopping: asyncio.Event) -> int:
    """Wait for a child's end, tell it to stop when all are to, and return its status."""
    ending, told = asyncio.create_task(child.wait()), asyncio.create_task(stopping.wait())
    await asyncio.wait((ending, told), return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not ending.done():
        with suppress(ProcessLookupError):
            child.terminate()
    return await ending


@asynccontextmanager
async def _retention(
    config: Config, config_args: list[str], stopping: asyncio.Event, watched: Watched
) -> AsyncIterator[None]:
    """Have retention run while the block does, if the configuration does not turn that off."""
    running = asyncio.create_task(_retention_runs(config, config_args, stopping, watched))
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def _retention_runs(config: Config, config_args: list[str], stopping: asyncio.Event, watched: Watched) -> None:
    command = [sys.executable, "-m", "streams.cli", "retention", "run", "--json", *config_args]
    pause_s = random.uniform(0, _START_S)  # noqa: S311 — no secret
    while config.retention_scheduled:
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), pause_s)
        if stopping.is_set():
            return
        pause_s = _START_S
        with suppress(StreamveilError):  # the run itself says what is wrong
            if not store_exists(config):
                continue  # no worker has made one yet
        outcome, why = await _retention_run(command)
        watched.retention_ran(outcome)
        if outcome == "failed":
            sys.stderr.write(f"streamveil: retention run: {why}\n")
        pause_s = RETENTION_EVERY_S - time.time() % RETENTION_EVERY_S + random.uniform(0, _JITTER_S)  # noqa: S311


async def _retention_run(command: list[str]) -> tuple[str, str]:
    """Return how one run ended, and why if it failed; ends the child if it is cancelled."""
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    try:
        child = await asyncio.create_subprocess_exec(*command, stdin=nothing, stdout=pipe, stderr=pipe)
    except OSError as error:
        return "failed", f"no process can be started: {error.strerror}"
    try:
        with suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, child.pid, RETENTION_NICE)
        said, errors = await child.communicate()
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                child.terminate()
            await child.wait()
    try:
        report = orjson.loads(said)
        skipped = [f"{one['what']}: {one['why']}" for one in report["skipped"]]
        failed = bool(report["failed"])
    except (ValueError, KeyError, TypeError):
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        return "failed", lines[-1].removeprefix("streamveil: ") if lines else "it was killed"
    if failed or child.returncode:
        return "failed", skipped[0] if skipped else "it ended with an error"
    return ("partial" if skipped else "done"), ""


def is_supervised() -> bool:
    """Return whether this process is a worker that another one replaces if it is fenced."""
    return _SUPERVISED in os.environ


@asynccontextmanager
async def _stopped_by_signals() -> AsyncIterator[asyncio.Event]:
    """Yield an event that SIGTERM and SIGINT set."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for stop in _STOPS:
        loop.add_signal_handler(stop, stopping.set)
    try:
        yield stopping
    finally:
        for stop in _STOPS:
            loop.remove_signal_handler(stop)


def _teller() -> Callable[[StreamveilError], None]:
    """Return a callback that says on standard error, at most every few seconds, what is being waited for."""
    told_s = 0.0

    def tell(error: StreamveilError) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= _TELL_EVERY_S or told_s == 0.0:
            told_s = now_s
            sys.stderr.write(f"streamveil: waiting: {error}\n")

    return tell
