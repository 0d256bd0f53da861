"""The worker: poll → prepare → fetch → complete → commit, until told to stop.

A batch that cannot go on (Retriable) is dropped from memory and polled again, so it is prepared anew against the
views of that moment. Nothing is cleared while `suppressions` cannot be read to its high watermark.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from processors.pipeline import Inbox, Outcome, Pipeline
from processors.seal import ENTROPY_BYTES, Entropy
from schemas.errors import Retriable
from streams.keys.cache import KeyCache, KeyLease
from streams.log.protocol import Batch, Consumer, Log
from streams.state.registries import Registries
from streams.state.suppressions import SuppressionTail

POLL_S = 0.25
IDLE_POLL_S = 0.02
FORGET_EVERY_S = 5.0
"""Committed clear traffic is deleted from disk at least this often while a worker runs (bound: 60 s)."""
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Worker:
    """Moves records from the input streams to the outputs, each exactly once."""

    def __init__(
        self,
        log: Log,
        consumer: Consumer,
        pipeline: Pipeline,
        keys: KeyCache,
        lease: KeyLease,
        registries: Registries,
        *,
        batch_records: int,
        on_batch: Callable[[list[Outcome]], None] | None = None,
        on_wait: Callable[[Retriable], None] | None = None,
        stopping: asyncio.Event | None = None,
    ) -> None:
        self._log = log
        self._consumer = consumer
        self._pipeline = pipeline
        self._keys = keys
        self._lease = lease
        self._registries = registries
        self._batch_records = batch_records
        self._on_batch = on_batch
        self._on_wait = on_wait
        self._tail = SuppressionTail(log)
        self._forgotten_s = 0.0
        self.outcomes: Counter[Outcome] = Counter()
        self.stopping = stopping or asyncio.Event()

    def stop(self) -> None:
        """Ask the worker to end after the batch under way; safe in a signal handler."""
        self.stopping.set()

    async def run(self, *, until_idle: bool = False) -> None:
        """Work until `stop`, or with `until_idle` until every input partition is at its end.

        On return all is committed or untouched, clear traffic that was committed is gone from disk, and the
        partitions are free. Raises Fatal errors (Fenced among them); Retriable ones are waited out.
        """
        waits = 0
        try:
            while not self.stopping.is_set():
                try:
                    worked = await self._step(IDLE_POLL_S if until_idle else POLL_S)
                    if until_idle and not worked and await self._consumer.at_end():
                        break
                    waits = 0
                except Retriable as error:
                    if self._on_wait is not None:
                        self._on_wait(error)
                    await self._pause(_BACKOFF_S[min(waits, len(_BACKOFF_S) - 1)])
                    waits += 1
            await self._forget_all()
        finally:  # what cannot be given back now runs out by itself
            with suppress(Retriable):
                await self._consumer.close()
            with suppress(Retriable):
                self._keys.close()

    async def _step(self, timeout_s: float) -> bool:
        """Do one batch, or wait a moment for one; return whether there was one."""
        await asyncio.sleep(0)  # nothing else here lets the loop see a signal while there is work
        await self._forget()
        batch = await self._consumer.poll(self._batch_records, timeout_s)  # keeps the partitions even without keys
        if self._lease.due():
            self._lease.renew()
        await self._tail.catch_up()
        if batch is not None:
            await self._process(batch)
        return batch is not None

    async def _process(self, batch: Batch) -> None:
        self._registries.refresh(time.monotonic())
        now_s = int(time.time())
        inbox = Inbox(batch.stream, batch.partition, batch.offset, [message.value for message in batch.messages])
        prepared = self._pipeline.prepare(inbox, self._tail.view, self._registries, now_s)
        ring = self._keys.fetch(prepared.needs, now_s)
        entropy = Entropy(os.urandom(ENTROPY_BYTES))
        outputs = self._pipeline.complete(prepared, ring, entropy, self._log.partitions)
        if self._lease.due():
            self._lease.renew()
        await self._consumer.commit(batch, outputs, self._keys.guard())
        self._tail.view.merge(prepared.overlay)
        self.outcomes.update(prepared.outcomes)
        if self._on_batch is not None:
            self._on_batch(prepared.outcomes)

    async def _forget(self) -> None:
        now_s = time.monotonic()
        if now_s - self._forgotten_s >= FORGET_EVERY_S:
            self._forgotten_s = now_s
            await self._consumer.forget_consumed()

    async def _forget_all(self) -> None:
        """Delete committed clear traffic before the end; a reader in the way is waited for, up to a few seconds."""
        for pause_s in (*_BACKOFF_S, None):
            try:
                await self._consumer.forget_consumed()
            except Retriable:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
            else:
                return

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return
