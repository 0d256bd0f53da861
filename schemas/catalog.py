"""THE table of streams: record type, partition rule, key domain, life, readers and writers.

Topics, retention, ACLs and docs derive from it. A stream is a Kafka topic in production, a table of the embedded
SQLite log by default. Partition counts are equal and fixed at creation.
"""

import zlib
from enum import StrEnum
from typing import NamedTuple


class Partitioning(StrEnum):
    """Which partition an output goes to."""

    SAME = "same as input"
    TOKEN = "by token"  # noqa: S105 — a partition rule, not a password
    ACCOUNT = "by account"
    RANDOM = "one at random per batch"
    KEY = "by input key"


class Domain(StrEnum):
    """A key domain: what kind of data an epoch key covers."""

    TRANSIT = "transit"  # account × hour
    CONTENT = "content"  # account × day
    PII = "pii"  # platform × month
    SUPPRESSION = "suppression"  # platform, one epoch; no person secret
    REVIEW = "review"  # account × day
    QUARANTINE = "quarantine"  # platform × day


class Stream(NamedTuple):
    """One row: name, what it holds, partition rule, key domain, rule of its life (`hours` or a data class)."""

    name: str
    holds: str
    partitioning: Partitioning
    domain: Domain | None
    max_hours: int | None  # None: the policy's retention rule for `data_class` gives the deadline of each record
    data_class: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    compacted: bool = False


_S, _P = Stream, Partitioning
TRAFFIC = "traffic"
TRAFFIC_CDR = "traffic.cdr"

# fmt: off
CATALOG: dict[str, Stream] = {
    stream.name: stream
    for stream in (
        _S(TRAFFIC, "requests, all inbound, preferences; clear", _P.KEY, None, 24, "traffic",
           ("gateway",), ("worker",)),
        _S(TRAFFIC_CDR, "finished communications; clear", _P.KEY, None, 24, "traffic",
           ("gateway",), ("worker",)),
        _S("verdicts", "per request: cleared or refused, reason, vendor codes", _P.SAME, None, 7 * 24, "usage",
           ("worker", "egress"), ("gateway", "dpo")),
        _S("cleared", "requests that may go out", _P.SAME, Domain.TRANSIT, 24, "content",
           ("worker",), ("egress", "dpo")),
        _S("content", "text, recording reference, transcript of CDRs", _P.SAME, Domain.CONTENT, None, "content",
           ("worker",), ("account", "dpo")),
        _S("cdr.pii", "the whole CDR", _P.SAME, Domain.PII, None, "traffic",
           ("worker",), ("support", "fraud", "lawful", "dpo")),
        _S("cdr.anonymous", "what remains when nothing personal does", _P.RANDOM, None, None, "anonymous",
           ("worker",), ("billing", "dpo")),
        _S("billing.deltas", "per committed batch: pre-aggregated cells", _P.ACCOUNT, None, 35 * 24, "anonymous",
           ("worker",), ("billing",)),
        _S("suppressions", "opt-outs, opt-ins, officer blocks", _P.TOKEN, Domain.SUPPRESSION, None, "suppression",
           ("worker", "officer"), ("worker", "egress", "dpo"), compacted=True),
        _S("review", "near-miss opt-outs", _P.SAME, Domain.REVIEW, 30 * 24, "content",
           ("worker",), ("operator", "dpo")),
        _S("held", "records under legal hold, re-sealed", _P.SAME, None, None, "held",
           ("officer",), ("dpo",)),
        _S("quarantine", "records that could not be understood, whole", _P.SAME, Domain.QUARANTINE, 7 * 24,
           "unclassified", ("worker", "operator"), ("operator", "dpo")),
        _S("audit", "reveals, key events, erasures, holds", _P.SAME, None, None, "audit",
           ("worker", "egress", "account", "support", "fraud", "lawful", "operator", "officer", "dpo"), ("dpo",)),
    )
}
# fmt: on

INPUTS = (TRAFFIC, TRAFFIC_CDR)
"""The input streams, in the order in which workers poll them."""


def partition_for(key: bytes, partitions: int) -> int:
    """Return the partition of a key (0 to `partitions` - 1); the command line and the workers share it."""
    return zlib.crc32(key) % partitions
