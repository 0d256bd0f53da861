"""Runs workers: one in this process, or several as child processes that are stopped and restarted together."""

import asyncio
import signal
import sys
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from processors.pipeline import Outcome
from schemas.errors import Fatal, Retriable
from streams.config import Config
from streams.deployment import Deployment, process_id
from streams.worker.selftest import selftest
from streams.worker.worker import Worker

_TELL_EVERY_S = 5.0
_REOPEN_S = 1.0
_STOPS = (signal.SIGTERM, signal.SIGINT)
_STOPPED = (-signal.SIGTERM, -signal.SIGINT, 130)
"""How a child ends that was stopped before it could listen."""


async def run_one(
    config: Config, *, until_idle: bool, on_batch: Callable[[list[Outcome]], None] | None = None
) -> Counter[Outcome]:
    """Run one worker in this process until SIGTERM, SIGINT or (with `until_idle`) the end of the input.

    Returns how many records ended in which outcome. Raises Fatal errors of start-up, self-test and worker.
    """
    tell = _teller()
    async with _stopped_by_signals() as stopping, AsyncExitStack() as parts:
        while not stopping.is_set():
            try:
                worker = await _opened(parts, config, stopping, on_batch, tell)
            except Retriable as error:
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
    on_wait: Callable[[Retriable], None],
) -> Worker:
    """Return a worker after its self-test; its log and keys stay open as long as `parts`. Raises: nothing is open.

    No call waits for other processes as long as a lease: a worker that waits keeps its partitions.
    """
    async with AsyncExitStack() as opened:
        deployment = await opened.enter_async_context(Deployment.open(config, busy_s=config.lease_s / 2))
        registries = deployment.registries()
        selftest(config.policy, registries, int(time.time()))
        cache, lease = deployment.keys()
        await parts.enter_async_context(opened.pop_all())
    return Worker(
        deployment.log,
        deployment.log.consumer(process_id()),
        deployment.pipeline,
        cache,
        lease,
        registries,
        batch_records=config.batch_records,
        on_batch=on_batch,
        on_wait=on_wait,
        stopping=stopping,
    )


async def run_many(count: int, config_args: list[str], *, until_idle: bool) -> None:
    """Run `count` workers as child processes; SIGTERM and SIGINT go to all. Raises Fatal if one of them fails."""
    command = [sys.executable, "-m", "streams.cli", "run", "--workers", "1", *config_args]
    if until_idle:
        command.append("--until-idle")
    async with _stopped_by_signals() as stopping:
        children = [await asyncio.create_subprocess_exec(*command) for _ in range(count)]
        stopper = asyncio.create_task(_stop_all(children, stopping))
        failed = await asyncio.gather(*(_failed(child, stopping) for child in children))
        stopper.cancel()
    if any(failed):
        raise Fatal("a worker ended with an error and the others were stopped; see its line above")


async def _stop_all(children: list[Process], stopping: asyncio.Event) -> None:
    await stopping.wait()
    for child in children:
        with suppress(ProcessLookupError):
            child.terminate()


async def _failed(child: Process, stopping: asyncio.Event) -> bool:
    """Wait for a child's end, and return whether it failed; then all others are stopped."""
    status = await child.wait()
    if status == 0 or (stopping.is_set() and status in _STOPPED):
        return False
    stopping.set()
    return True


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


def _teller() -> Callable[[Retriable], None]:
    """Return a callback that says on standard error, at most every few seconds, what is being waited for."""
    told_s = 0.0

    def tell(error: Retriable) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= _TELL_EVERY_S or told_s == 0.0:
            told_s = now_s
            sys.stderr.write(f"streamveil: waiting: {error}\n")

    return tell
