"""The worker: poll → prepare → fetch → complete → commit, until told to stop.

What is done about an error says the table in schemas/errors.py. A batch that waits is dropped from memory and polled
again, so it is prepared anew against the views of that moment. Nothing is cleared while `suppressions` cannot be read
to its high watermark. What leaves is looked at once more just before the commit: sealed where it must be.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from processors.keyring import Needs
from processors.pipeline import Inbox, Outcome, Pipeline
from processors.screen.registry import RegistryView, freshness
from processors.seal import ENTROPY_BYTES, Entropy
from schemas.errors import Action, Fenced, Retriable, StreamveilError, TokensChange, action_for
from schemas.policy import Policy
from streams.keys.cache import KeyCache, KeyLease
from streams.log.protocol import Batch, Consumer, Log
from streams.state.entries import EntryTail
from streams.state.registries import Registries
from streams.watch.overdue import registries_seen
from streams.watch.unread import Unread
from streams.watch.watch import Moment, Stages, Watch, Work
from streams.worker.selftest import check_leaving

POLL_S = 0.25
IDLE_POLL_S = 0.02
READ_S = 1.0
"""So long opt-outs are read between two polls, so that the partitions stay whoever reads them."""
FORGET_EVERY_S = 5.0
"""Committed clear traffic is deleted from disk at least this often while a worker runs (bound: 60 s)."""
LOOK_EVERY_S = 5.0
"""What waits in the inputs, and what else only a look can tell, is looked at so often while somebody watches."""
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
        suppressions: EntryTail,
        exemptions: EntryTail,
        *,
        refresh: Callable[[], Pipeline],
        margin_s: float = 0.0,
        batch_records: int,
        on_batch: Callable[[list[Outcome]], None] | None = None,
        on_wait: Callable[[StreamveilError], None] | None = None,
        watch: Watch | None = None,
        stopping: asyncio.Event | None = None,
    ) -> None:
        """Take the parts. `refresh` returns the pipeline of the current token key, or raises TokensChange.

        `margin_s` before the end of the key lease no commit begins any more.
        """
        self._log = log
        self._consumer = consumer
        self._pipeline = pipeline
        self._keys = keys
        self._lease = lease
        self._registries = registries
        self._batch_records = batch_records
        self._on_batch = on_batch
        self._on_wait = on_wait
        self._watch = watch or Watch()
        self._refresh = refresh
        self._settled_at: int | None = None  # the destruction sequence at which the pipeline was that of the token key
        self._margin_s = margin_s
        self._suppressions = suppressions
        self._exemptions = exemptions
        self._unread = Unread(log, consumer)
        self._looked_s = -LOOK_EVERY_S
        self._forgotten_s = 0.0
        self.outcomes: Counter[Outcome] = Counter()
        self.stopping = stopping or asyncio.Event()

    def stop(self) -> None:
        """Ask the worker to end after the batch under way; safe in a signal handler."""
        self.stopping.set()

    async def run(self, *, until_idle: bool = False) -> None:
        """Work until `stop`, or with `until_idle` until every input partition is at its end.

        On return all is committed or untouched, clear traffic that was committed is gone from disk, and the
        partitions are free. Raises what the table of errors does not say to wait for (Fenced among it).
        """
        waits = 0
        self._watch.up()
        try:
            while not self.stopping.is_set():
                try:
                    worked = await self._step(IDLE_POLL_S if until_idle else POLL_S)
                    if until_idle and not worked and await self._consumer.at_end():
                        break
                    waits = 0
                except StreamveilError as error:
                    if action_for(error) is not Action.WAIT:
                        raise
                    self._watch.waits(error)
                    if self._on_wait is not None:
                        self._on_wait(error)
                    await self._pause(_BACKOFF_S[min(waits, len(_BACKOFF_S) - 1)])
                    waits += 1
            await self._forget_all()
        except Fenced:
            self._watch.fenced()
            raise
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
        self._watch.reached(Moment.POLLED)
        await self._look()
        self._renew()
        await self._catch_up()
        if batch is not None:
            await self._process(batch)
        self._watch.reached(Moment.PROGRESS)
        return batch is not None

    def _renew(self) -> None:
        """Keep the lease, and the pipeline that of the current token key. Raises TokensChange during a rotation.

        A renewal that failed half-way may have taken note of a rotation: what counts is the sequence of the lease.
        """
        if self._lease.due():
            self._lease.renew()
            self._watch.reached(Moment.LEASE_RENEWED)
        if self._settled_at != self._lease.sequence:
            pipeline = self._refresh()
            if pipeline is not self._pipeline:  # its entries have been read beside those of the key before
                self._pipeline = pipeline
                self._suppressions.follow(pipeline.tokens.version)
                self._exemptions.follow(pipeline.tokens.version)
            self._settled_at = self._lease.sequence

    async def _catch_up(self) -> None:
        """Read opt-outs and exemptions to their high watermarks. Raises Retriable if that cannot be done now."""
        try:
            await self._suppressions.catch_up(READ_S)
            await self._exemptions.catch_up(READ_S)
        except Retriable:
            if self._watch.on:
                with suppress(Retriable):
                    stream = self._suppressions.stream
                    ends, stable = await self._log.end_offsets(stream), await self._log.stable_offsets(stream)
                    self._watch.behind(sum(ends) - sum(stable))
            raise
        self._watch.reached(Moment.CAUGHT_UP)

    async def _process(self, batch: Batch) -> None:
        self._registries.refresh(time.monotonic())
        now_s = int(time.time())
        values = [message.value for message in batch.messages]
        inbox = Inbox(batch.stream, batch.partition, batch.offset, values, batch.offsets)
        began_s = time.perf_counter()
        pipeline = self._pipeline
        prepared = pipeline.prepare(inbox, self._suppressions.view, self._registries, now_s, self._exemptions.view)
        prepared_s = time.perf_counter()
        missed = self._missed(prepared.needs)
        fetch_s = time.perf_counter()
        ring = self._keys.fetch(prepared.needs, now_s)
        fetched_s = time.perf_counter()
        entropy = Entropy(os.urandom(ENTROPY_BYTES))
        outputs = pipeline.complete(prepared, ring, entropy, self._log.partitions)
        completed_s = time.perf_counter()
        check_leaving(outputs, self._watch)
        self._renew()
        if pipeline is not self._pipeline:
            raise TokensChange
        commit_s = time.perf_counter()
        await self._consumer.commit(batch, outputs, self._keys.guard(self._margin_s))
        stages_s = Stages(
            prepared_s - began_s, fetched_s - fetch_s, completed_s - fetched_s, time.perf_counter() - commit_s
        )
        self._suppressions.view.merge(prepared.overlay)
        outcomes = Counter(prepared.outcomes)
        self.outcomes.update(outcomes)
        asked = (len(prepared.needs.epochs), len(prepared.needs.persons))
        self._watch.committed(Work(batch, outputs, outcomes, stages_s, asked, missed))
        if self._on_batch is not None:
            self._on_batch(prepared.outcomes)

    def _missed(self, needs: Needs) -> tuple[int, int]:
        """Return how many epoch keys and person secrets of a batch are not in memory, if somebody wants to know."""
        if not self._watch.on:
            return 0, 0
        epochs, persons = self._keys.ring.epochs, self._keys.ring.persons  # too many to go through for each batch
        return sum(ref not in epochs for ref in needs.epochs), sum(ref not in persons for ref in needs.persons)

    async def _look(self) -> None:
        """Tell, every few seconds, what only a look can tell. What cannot be seen now is seen next time."""
        now_s = time.monotonic()
        if not self._watch.on or now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        self._watch.keeps(self._keys.ring)
        for tail in (self._suppressions, self._exemptions):
            self._watch.snapshot(tail.stream, tail.snapshot_s, len(tail.view))
        self._watch.unfit(unfit(self._pipeline.policy, self._registries, time.time()))
        self._watch.registries(registries_seen(self._pipeline.policy, self._registries, self._registries.damaged()))
        with suppress(Retriable):
            for stream, (lags, oldest_s) in (await self._unread.look()).items():
                self._watch.unread(stream, lags, oldest_s)

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


def unfit(policy: Policy, registries: RegistryView, now_s: float) -> int:
    """Return how many registries of a policy are required and missing, or too old to be used."""
    found = [(rule, registries.get(rule.name)) for rule in policy.screening.registry]
    return sum(
        rule.required if registry is None else freshness(rule.max_age_days, registry.as_of_s, now_s) == "stale"
        for rule, registry in found
    )
