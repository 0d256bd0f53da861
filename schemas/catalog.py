"""THE table of streams: record type, partition rule, key domain, life, readers and writers.

Topics, retention, ACLs and docs derive from it. A stream is a Kafka topic in production, a table of the embedded
SQLite log by default. Partition counts are equal and fixed at creation.

`readers` may open what is sealed (the roles file grants it); `followers` read it as it lies and open nothing.
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


class Stamp(StrEnum):
    """What the timestamp of a message in the log says; lives on Kafka are counted from it."""

    ARRIVAL = "when the broker took it"  # a CDR of nine months ago lives as long as one of now
    WRITING = "when it was made"
    HOUR = "the hour, or day, of the communication"  # as coarse as the policy says
    DAY = "the day of the communication"


class Domain(StrEnum):
    """A key domain: what kind of data an epoch key covers."""

    TRANSIT = "transit"  # account × hour
    CONTENT = "content"  # account × day
    PII = "pii"  # platform × month
    SUPPRESSION = "suppression"  # platform, one epoch; no person secret
    REVIEW = "review"  # account × day
    QUARANTINE = "quarantine"  # platform × day
    HELD = "held"  # platform, one epoch per hold; no person secret
    EXEMPTION = "exemption"  # account × month in which it ends


class Stream(NamedTuple):
    """One row: what it holds, partition rule, key domain, rule of its life (hours or a data class), who uses it."""

    name: str
    holds: str
    partitioning: Partitioning
    domain: Domain | None
    max_hours: int | None  # None: the policy's retention rule for `data_class` gives the deadline of each record
    data_class: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    stamp: Stamp = Stamp.WRITING
    followers: tuple[str, ...] = ()
    compacted: bool = False


_S, _P, _T = Stream, Partitioning, Stamp
TRAFFIC = "traffic"
TRAFFIC_CDR = "traffic.cdr"
BOOKMARKED = "verdicts"
"""On Kafka how far a file is published is an offset of this stream, for a broker lets only readers commit offsets."""
EXEMPT_HOURS = 1860 * 24
"""The longest that an exemption lasts (`policy.MAX_EXEMPT_MONTHS`), to the end of its last month, when its key dies."""

# fmt: off
CATALOG: dict[str, Stream] = {
    stream.name: stream
    for stream in (
        _S(TRAFFIC, "requests, all inbound, preferences; clear", _P.KEY, None, 24, "traffic",
           ("gateway", "operator"), ("worker",), _T.ARRIVAL),  # operators: what they replay from quarantine
        _S(TRAFFIC_CDR, "finished communications; clear", _P.KEY, None, 24, "traffic",
           ("gateway", "operator"), ("worker",), _T.ARRIVAL),
        _S(BOOKMARKED, "per request: cleared or refused, reason, vendor codes", _P.SAME, None, 7 * 24, "usage",
           ("worker", "egress"), ("gateway", "dpo"), followers=("operator",)),
        _S("cleared", "requests that may go out", _P.SAME, Domain.TRANSIT, 24, "content",
           ("worker",), ("egress", "dpo"), followers=("officer",)),
        _S("content", "text, recording reference, transcript of CDRs", _P.SAME, Domain.CONTENT, None, "content",
           ("worker", "officer"), ("account", "dpo"), _T.DAY, followers=("officer",)),  # officers: what they correct
        _S("cdr.pii", "the whole CDR", _P.SAME, Domain.PII, None, "traffic",
           ("worker", "officer"), ("support", "fraud", "lawful", "dpo"), _T.DAY, followers=("officer",)),
        _S("cdr.anonymous", "what remains when nothing personal does", _P.RANDOM, None, None, "anonymous",
           ("worker",), ("billing", "dpo"), _T.HOUR),
        _S("billing.deltas", "per committed batch: pre-aggregated cells", _P.ACCOUNT, None, 35 * 24, "anonymous",
           ("worker",), ("billing",)),
        _S("suppressions", "opt-outs, opt-ins, officer blocks", _P.TOKEN, Domain.SUPPRESSION, None, "suppression",
           ("worker", "officer", "operator"), ("worker", "egress", "dpo"), followers=("officer", "operator"),
           compacted=True),  # operators: the opt-out that a near miss was meant as
        _S("exemptions", "why an account may market to a listed number; never above an opt-out", _P.TOKEN,
           Domain.EXEMPTION, EXEMPT_HOURS, "contact_list",
           ("officer", "operator"), ("operator", "dpo"), followers=("worker", "officer", "egress")),
        _S("review", "near-miss opt-outs", _P.SAME, Domain.REVIEW, 30 * 24, "content",
           ("worker", "operator"), ("operator", "dpo"), _T.DAY,
           followers=("officer", "worker")),  # workers: whose clock has run out
        _S("held", "records under legal hold, re-sealed", _P.SAME, Domain.HELD, None, "held",
           ("officer",), ("dpo",), followers=("officer",)),
        _S("quarantine", "records that could not be understood, whole", _P.SAME, Domain.QUARANTINE, 7 * 24,
           "unclassified", ("worker", "operator"), ("operator", "dpo"), followers=("officer",)),
        _S("audit", "reveals, key events, erasures, holds", _P.SAME, None, None, "audit",
           ("worker", "egress", "account", "support", "fraud", "lawful", "operator", "officer", "dpo"), ("dpo",),
           followers=("officer",)),
    )
}
# fmt: on

INPUTS = (TRAFFIC, TRAFFIC_CDR)
"""The input streams, in the order in which workers poll them."""

CUTTER = "officer"
"""The role that cuts dead records off on Kafka. Who may do that may delete the topic too: the brokers know no less."""
CUT = tuple(row.name for row in CATALOG.values() if row.domain is not None and not row.compacted)
"""What it may cut there: nothing but what is sealed, which it could make unreadable anyway."""

WATCHER = "sre"
"""The role that sees how the streams are doing, and nothing that is in them."""
ROLES = (
    "gateway", "worker", "officer", "operator", "egress", "account", "billing", "support", "fraud", "lawful", "dpo",
    WATCHER,
)  # fmt: skip
"""Everybody the broker knows: the writers, readers and followers of the table, and the watcher."""


def partition_for(key: bytes, partitions: int) -> int:
    """Return the partition of a key (0 to `partitions` - 1); the command line and the workers share it."""
    return zlib.crc32(key) % partitions
