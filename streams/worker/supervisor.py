"""Runs workers: one in this process, or several as child processes that are stopped and restarted together."""

import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from processors.pipeline import Outcome
from schemas.errors import Fatal, Retriable
from streams.config import Config
from streams.deployment import Deployment, process_id
from streams.worker.selftest import selftest
from streams.worker.worker import Worker

_TELL_EVERY_S = 5.0
_STOPS = (signal.SIGTERM, signal.SIGINT)


async def run_one(
    config: Config, *, until_idle: bool, on_batch: Callable[[list[Outcome]], None] | None = None
) -> Counter[Outcome]:
    """Run one worker in this process until SIGTERM, SIGINT or (with `until_idle`) the end of the input.

    Returns how many records ended in which outcome. Raises Fatal errors of start-up, self-test and worker.
    """
    async with Deployment.open(config) as deployment:
        registries = deployment.registries()
        selftest(config.policy, registries, int(time.time()))
        cache, lease = deployment.keys()
        worker = Worker(
            deployment.log,
            deployment.log.consumer(process_id()),
            deployment.pipeline,
            cache,
            lease,
            registries,
            batch_records=config.batch_records,
            on_batch=on_batch,
            on_wait=_teller(),
        )
        loop = asyncio.get_running_loop()
        for stop in _STOPS:
            loop.add_signal_handler(stop, worker.stop)
        try:
            await worker.run(until_idle=until_idle)
        finally:
            for stop in _STOPS:
                loop.remove_signal_handler(stop)
        return worker.outcomes


async def run_many(count: int, config_args: list[str], *, until_idle: bool) -> None:
    """Run `count` workers as child processes; SIGTERM and SIGINT go to all. Raises Fatal if one of them fails."""
    command = [sys.executable, "-m", "streams.cli", "run", "--workers", "1", *config_args]
    if until_idle:
        command.append("--until-idle")
    children = [await asyncio.create_subprocess_exec(*command) for _ in range(count)]
    loop = asyncio.get_running_loop()

    def stop_all() -> None:
        for child in children:
            with suppress(ProcessLookupError):
                child.terminate()

    for stop in _STOPS:
        loop.add_signal_handler(stop, stop_all)
    waiting = {asyncio.ensure_future(child.wait()) for child in children}
    failed = 0
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if any(task.result() != 0 for task in done):
            failed += 1
            stop_all()
    if failed:
        raise Fatal("a worker ended with an error and the others were stopped; see its line above")


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
