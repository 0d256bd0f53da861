"""What a worker tells about its work, batch by batch: `Watch` keeps nothing, `streams.watch.metrics.Metrics` counts.

A worker tells places, numbers, durations and reason codes; nothing of any record.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from processors.keyring import KeyRing
from processors.pipeline import Outcome
from streams.keys.store import Kms
from streams.log.protocol import Batch, Output

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that makes a worker's metrics go into a folder; a name of prometheus-client's."""


class Moment(StrEnum):
    """What a worker does again and again; the last time it did is told."""

    POLLED = "polled"  # the log answered
    CAUGHT_UP = "suppressions_caught_up"  # `suppressions` was read to its high watermark
    LEASE_RENEWED = "key_lease_renewed"
    PROGRESS = "progress"  # a batch was committed, or there was none


class Stages(NamedTuple):
    """How long one batch took, in seconds."""

    prepare: float
    fetch: float
    complete: float
    commit: float


class Work(NamedTuple):
    """One committed batch. `asked` and `missed`: how many keys and secrets it took, and how many were not in memory."""

    batch: Batch
    outputs: Sequence[Output]
    outcomes: Counter[Outcome]
    stages_s: Stages
    asked: tuple[int, int]  # epoch keys, person secrets
    missed: tuple[int, int]


class Overdue(NamedTuple):
    """What should have been done by now; see `streams.watch.overdue`.

    `destructions`: epochs and days whose instant passed a while ago. `oldest_s`: the instant (Unix s) of the oldest
    that is to be destroyed, late or not; None: there is none. `requests`: of people, overdue. `keks`: alive.
    """

    destructions: int
    oldest_s: int | None
    requests: int
    keks: int


class Reviews(NamedTuple):
    """How many near-miss opt-outs are undecided, how many of these are due soon, and how many are overdue."""

    undecided: int
    due_soon: int
    overdue: int


class RegistrySeen(NamedTuple):
    """One registry of the policy, as a worker has it; `as_of_s`: the list's own date (Unix s), None: not loaded.

    `damaged`: a file of it could not be read; the one before serves, if there is one.
    """

    name: str
    as_of_s: int | None
    max_age_s: int
    required: bool
    damaged: bool


class Watch:
    """The watch of a worker that nobody watches."""

    on = False
    """Whether anything is made of what is told."""

    def up(self) -> None:
        """Take note that the worker has passed its self-test and starts to work."""

    def reached(self, moment: Moment) -> None:
        """Take note that a moment was reached now."""

    def committed(self, work: Work) -> None:
        """Count a batch that was committed now."""

    def checked(self, streams: Sequence[str], unsealed: Mapping[str, int]) -> None:
        """Count the outputs whose seal was checked, by stream, and those that lack it."""

    def waits(self, error: Exception) -> None:
        """Count a batch that waits because of an error."""

    def fenced(self) -> None:
        """Count a worker that ends because another took over."""

    def unread(self, stream: str, lags: Sequence[int], oldest_s: float | None) -> None:
        """Take note of the records not committed yet, per partition, and the oldest one's arrival (Unix s)."""

    def behind(self, records: int) -> None:
        """Take note of how many records of `suppressions` could not be read."""

    def snapshot(self, stream: str, written_s: float | None, changed: int) -> None:
        """Take note of when the snapshot in use of a stream was written (Unix s), and how many have changed since."""

    def unfit(self, registries: int) -> None:
        """Take note of how many registries that the policy asks for are missing or too old."""

    def registries(self, seen: Sequence[RegistrySeen]) -> None:
        """Take note of the registries that the policy asks for."""

    def keeps(self, ring: KeyRing) -> None:
        """Take note of how many keys are in memory."""

    def of_kms(self, kms: Kms) -> Kms:
        """Return the key management service, its calls counted."""
        return kms

    def overdue(self, found: Overdue) -> None:
        """Take note of what should have been done by now, and how many key-encryption keys there are."""

    def reviews(self, found: Reviews, died: int) -> None:
        """Take note of the near-miss opt-outs that wait for a decision, looked at now.

        `died`: how many died undecided in the last 24 hours.
        """


class Watched:
    """What the process that starts workers does for their metrics; this one does nothing."""

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that workers are started with."""
        return {}

    def ended(self, pid: int) -> None:
        """Take note that a worker ended."""

    def retention_ran(self, outcome: str) -> None:
        """Take note that a retention run ended: done, partial or failed."""


def denied(watched: Path, reasons: Mapping[str, int]) -> None:
    """Count sealed records that were not opened, by reason, in every `run` at work on this deployment.

    `watched`: `Config.watch_path`. Whoever opens need not be a worker, and may live for a moment only; where nobody
    watches on this machine, nothing is done or imported. Blocks on the disk.
    """
    if reasons and any(watched.glob("*/")):
        from streams.watch.metrics import count_denied  # noqa: PLC0415 — takes a quarter of a second

        count_denied(watched, reasons)
