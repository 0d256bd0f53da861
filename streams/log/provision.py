"""Topics, users and access rights on Kafka: what the catalog of streams wants, what there is, and how to get there.

Rules of this file:
- `plan` and `differences` are pure. What is wanted of a stream stands in the catalog and the policy, nowhere else.
- Nothing is ever taken from data: no retention shrinks, partitions and replicas stay, no topic is deleted.
- Rights are taken away only from our own users, and only on what bears our prefix. A denial stays: somebody meant it.
- A password is in its file before its user is made, and in no message.
"""

import logging
import os
import re
import secrets
import socket
import ssl
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import date, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaException
from confluent_kafka import admin as _admin

from schemas.catalog import CATALOG, CUT, CUTTER, INPUTS, ROLES, WATCHER, Stamp, Stream
from schemas.errors import InputInvalid, LogBusy, LogUnusable, StreamveilError
from schemas.policy import Account, Policy
from streams.config import Config, Kafka
from streams.log.connection import password, tls_context

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
FOREVER: Final = -1
CLEANING_MS: Final = 10 * 60_000
"""Brokers look for dead segments each 5 minutes by default, and delete their files a minute later."""
ZONE_DAYS: Final = 2
"""So much later than midnight UTC of the last day a deadline in another time zone can be."""
AHEAD_MS: Final = 72 * HOUR_MS
"""Records may be of 48 hours ahead; brokers refuse more than one hour by default."""
INPUT_BYTES: Final = 4 * 1024 * 1024 + 64 * 1024
OUTPUT_BYTES: Final = 8 * 1024 * 1024
"""A sealed record is larger than the one that came in."""

WORKERS: Final = "workers"
PUBLISH: Final = "publish."
APPEND: Final = "append."
_RESERVED: Final = re.compile(rf"(?:^|[.-])({'|'.join((*ROLES, WORKERS, 'publish', 'append'))})\.")

_TIMEOUT_S: Final = 30.0
_SETTLING_S: Final = 30.0
_CONNECT_S: Final = 10.0
_REASON_S: Final = 1.0
_ITERATIONS: Final = 8192


# --- what is wanted -----------------------------------------------------------------------------------------


class Acl(NamedTuple):
    """A right, in the words of Kafka: resource `TOPIC`, `GROUP`, …; pattern `LITERAL` or `PREFIXED`."""

    principal: str
    operation: str
    resource: str
    name: str
    pattern: str = "LITERAL"
    host: str = "*"
    permission: str = "ALLOW"

    def __str__(self) -> str:
        what = self.operation.lower().replace("_", " ") + " " + self.resource.lower().replace("_", " ")
        where = f"{self.name}*" if self.pattern == "PREFIXED" else self.name
        limits = [] if self.host == "*" else [f"from {self.host}"]
        limits += [] if self.permission == "ALLOW" else ["denied"]
        return f"{what} {where}" + (f" ({', '.join(limits)})" if limits else "")


class Topic(NamedTuple):
    """A topic: its partitions, the number of their replicas, and its settings as text."""

    partitions: int
    replicas: int
    settings: Mapping[str, str]


class Plan(NamedTuple):
    """The wanted state. `users` and `acls` are empty for brokers without security."""

    topics: Mapping[str, Topic]
    acls: frozenset[Acl]
    users: Mapping[str, str]  # role → user
    prefix: str


def plan(catalog: Mapping[str, Stream], policy: Policy, kafka: Kafka, partitions: int) -> Plan:
    """Return the wanted state of the brokers. Pure. Raises InputInvalid for a prefix that others could be meant by."""
    clash = _RESERVED.search(kafka.prefix)
    if clash is not None:
        raise InputInvalid(f"[kafka] prefix must not hold '{clash[1]}.': rights of a deployment without it would match")
    topics = {
        kafka.prefix + row.name: Topic(partitions, kafka.replication, _settings(row, policy, kafka))
        for row in catalog.values()
    }
    if kafka.username is None:
        return Plan(topics, frozenset(), {}, kafka.prefix)
    users = {role: kafka.prefix + role for role in ROLES}
    return Plan(topics, frozenset(_acls(catalog, kafka.prefix, users)), users, kafka.prefix)


def segment_ms(row: Stream, policy: Policy) -> int:
    """Return after how long a new segment begins: a stream dies by whole segments, so a 24th of its life."""
    if row.compacted:
        return DAY_MS
    life_ms = _life_ms(row, policy)
    return 7 * DAY_MS if life_ms == FOREVER else min(max(life_ms // 24, HOUR_MS), 7 * DAY_MS)


def retention_ms(row: Stream, policy: Policy) -> int:
    """Return how long after its timestamp a record stays at least, in milliseconds, or FOREVER.

    Of what is sealed that is as long as any key of it lives. What is clear is gone when its hours are over, segment
    and cleaning included.
    """
    life_ms = _life_ms(row, policy)
    return life_ms - segment_ms(row, policy) - CLEANING_MS if row.stamp is Stamp.ARRIVAL else life_ms


def _life_ms(row: Stream, policy: Policy) -> int:
    """Return the longest time from a record's timestamp to its deadline, or FOREVER."""
    if row.max_hours is not None:
        return row.max_hours * HOUR_MS + (DAY_MS if row.stamp is Stamp.DAY else 0)
    if row.data_class == "content":
        served = [*policy.listed, *([Account(id="any")] if policy.accounts.any else [])]
        return (max(policy.content_days(account) or 0 for account in served) + 1) * DAY_MS
    rule = policy.retention_of(row.data_class)
    if rule is None:
        return FOREVER
    longest = 0
    for offset in range(4 * 366):  # every date of a leap cycle
        day = date(2024, 1, 1) + timedelta(days=offset)
        dead_on = rule.dead_on(day)
        if dead_on is None:
            return FOREVER
        longest = max(longest, (dead_on - day).days)
    return (longest + ZONE_DAYS) * DAY_MS


def _settings(row: Stream, policy: Policy, kafka: Kafka) -> dict[str, str]:
    arrival = row.stamp is Stamp.ARRIVAL
    settings: dict[str, object] = {
        "cleanup.policy": "compact" if row.compacted else "delete",
        "compression.type": "producer",
        "file.delete.delay.ms": 60_000,
        "max.message.bytes": INPUT_BYTES if row.name in INPUTS else OUTPUT_BYTES,
        "message.timestamp.before.max.ms": 2**63 - 1,
        "message.timestamp.type": "LogAppendTime" if arrival else "CreateTime",
        "min.insync.replicas": kafka.min_insync,
        "retention.bytes": FOREVER,
        "retention.ms": retention_ms(row, policy),
        "segment.bytes": (1 << 28) if row.max_hours is not None else 1 << 30,
        "segment.ms": segment_ms(row, policy),
        "unclean.leader.election.enable": "false",
    }
    if not arrival:
        settings["message.timestamp.after.max.ms"] = AHEAD_MS
    if row.compacted:
        settings["delete.retention.ms"] = 7 * DAY_MS
        settings["max.compaction.lag.ms"] = DAY_MS
        settings["min.cleanable.dirty.ratio"] = "0.2"
    return {name: str(value) for name, value in sorted(settings.items())}


def _acls(catalog: Mapping[str, Stream], prefix: str, users: Mapping[str, str]) -> Iterator[Acl]:
    """Yield every right. In Kafka, who may read or write may describe, and who may write may do so idempotently.

    A worker sees the ends of every stream, so that it makes no key store beside a log that has outputs.
    """
    groups: list[tuple[str, str]] = [(prefix + WORKERS, "LITERAL"), (prefix + PUBLISH, "PREFIXED")]
    transactions = [prefix + f"{WORKERS}.", prefix + PUBLISH]
    for role, user in users.items():
        who = f"User:{user}"
        rows = list(catalog.values())
        reads = [row for row in rows if role in (*row.readers, *row.followers)]
        writes = [row for row in rows if role in row.writers]
        yield from (Acl(who, "READ", "TOPIC", prefix + row.name) for row in reads)
        yield from (Acl(who, "WRITE", "TOPIC", prefix + row.name) for row in writes)
        if role == CUTTER:
            yield from (Acl(who, "DELETE", "TOPIC", prefix + row.name) for row in rows if row.name in CUT)
        if role == "worker":
            yield from (Acl(who, "DESCRIBE", "TOPIC", prefix + row.name) for row in rows if row not in reads + writes)
            yield from (Acl(who, "DESCRIBE_CONFIGS", "TOPIC", prefix + row.name) for row in rows)
            yield Acl(who, "READ", "GROUP", prefix + WORKERS)
            yield Acl(who, "WRITE", "TRANSACTIONAL_ID", prefix + f"{WORKERS}.", "PREFIXED")
        elif reads:
            groups.append((prefix + f"{role}.", "PREFIXED"))
            yield Acl(who, "READ", "GROUP", *groups[-1])
        if any(row.name in INPUTS for row in writes):
            yield Acl(who, "READ", "GROUP", prefix + PUBLISH, "PREFIXED")
            yield Acl(who, "WRITE", "TRANSACTIONAL_ID", prefix + PUBLISH, "PREFIXED")
        if writes:
            transactions.append(prefix + f"{APPEND}{user}.")
            yield Acl(who, "WRITE", "TRANSACTIONAL_ID", transactions[-1], "PREFIXED")
    watcher = f"User:{users[WATCHER]}"
    for row in catalog.values():
        yield Acl(watcher, "DESCRIBE", "TOPIC", prefix + row.name)
        yield Acl(watcher, "DESCRIBE_CONFIGS", "TOPIC", prefix + row.name)
    yield from (Acl(watcher, "DESCRIBE", "GROUP", *group) for group in groups)
    yield from (Acl(watcher, "DESCRIBE", "TRANSACTIONAL_ID", name, "PREFIXED") for name in transactions)


# --- what differs -------------------------------------------------------------------------------------------


class Action(StrEnum):
    """What `apply` does about a difference."""

    CREATE = "create"
    ALTER = "alter"
    DELETE = "delete"
    REFUSE = "refuse"  # and does nothing else either
    LEAVE = "leave"  # not ours to undo; look at it


class Difference(NamedTuple):
    """One thing that is not as wanted. `name`: of the topic or user; `setting`: what of it, or which right."""

    action: Action
    kind: str  # topic, setting, acl, user
    name: str
    setting: str | None = None
    found: str | None = None
    wanted: str | None = None


class FoundTopic(NamedTuple):
    """A topic as it is: `settings` are those in force, `own` the names of those that were set on the topic itself."""

    partitions: int
    replicas: frozenset[int]
    settings: Mapping[str, str]
    own: frozenset[str]


class Found(NamedTuple):
    """The state of the brokers: our topics, all rights, those of our users that exist."""

    topics: Mapping[str, FoundTopic]
    acls: frozenset[Acl]
    users: frozenset[str]


def differences(wanted: Plan, found: Found) -> list[Difference]:
    """Return what is not as wanted, in the order in which it is mended. Pure."""
    listed: list[Difference] = []
    for name, topic in wanted.topics.items():
        is_there = found.topics.get(name)
        if is_there is None:
            listed.append(Difference(Action.CREATE, "topic", name))
        else:
            listed += _of_topic(name, topic, is_there)
    missing, surplus, foreign = _of_acls(wanted, found.acls)
    for action, acls in ((Action.CREATE, missing), (Action.DELETE, surplus), (Action.LEAVE, foreign)):
        listed += [_difference(action, acl) for acl in acls]
    listed += [Difference(Action.CREATE, "user", user) for user in wanted.users.values() if user not in found.users]
    return listed


def _difference(action: Action, acl: Acl) -> Difference:
    return Difference(action, "acl", acl.principal.removeprefix("User:"), str(acl))


def _of_topic(name: str, wanted: Topic, found: FoundTopic) -> Iterator[Difference]:
    if found.partitions != wanted.partitions:
        yield _unlike(Action.REFUSE, name, "partitions", found.partitions, wanted.partitions)
    if found.replicas != {wanted.replicas}:
        replicas = "/".join(map(str, sorted(found.replicas)))
        yield _unlike(Action.REFUSE, name, "replication", replicas, wanted.replicas)
    shrinks = _kept_ms(wanted.settings) < _kept_ms(found.settings)
    for setting, value in wanted.settings.items():
        is_set = found.settings.get(setting)
        if is_set != value or setting not in found.own:
            refuse = shrinks and setting in ("retention.ms", "cleanup.policy") and is_set != value
            shown = is_set if setting in found.own else f"{is_set} by default"
            yield _unlike(Action.REFUSE if refuse else Action.ALTER, name, setting, shown, value)
    for setting in sorted(found.own - set(wanted.settings)):
        yield _unlike(Action.LEAVE, name, setting, found.settings[setting], None)


def _unlike(action: Action, name: str, setting: str, found: object, wanted: object) -> Difference:
    return Difference(action, "setting", name, setting, str(found), None if wanted is None else str(wanted))


def _kept_ms(settings: Mapping[str, str]) -> float:
    """Return how long a topic with these settings keeps a record."""
    kept_ms = int(settings.get("retention.ms", FOREVER))
    return float("inf") if kept_ms < 0 or "delete" not in settings.get("cleanup.policy", "delete") else kept_ms


def _of_acls(wanted: Plan, found: frozenset[Acl]) -> tuple[list[Acl], list[Acl], list[Acl]]:
    """Return the rights that are missing, those of ours to take away, and those that others have on our streams."""
    if not wanted.users:
        return [], [], []
    ours = {f"User:{user}" for user in wanted.users.values()}
    surplus, foreign = [], []
    for acl in sorted(found - wanted.acls):
        is_ours = acl.principal in ours
        if is_ours and acl.permission == "ALLOW" and _bears(acl, wanted.prefix):
            surplus.append(acl)
        elif is_ours or any(_touches(acl, right) for right in wanted.acls):
            foreign.append(acl)
    return sorted(wanted.acls - found), surplus, foreign


def _bears(acl: Acl, prefix: str) -> bool:
    return acl.resource in ("TOPIC", "GROUP", "TRANSACTIONAL_ID") and acl.name.startswith(prefix) and acl.name != "*"


def _touches(acl: Acl, right: Acl) -> bool:
    """Return whether a right says something about the resource of one that is wanted."""
    if acl.resource != right.resource:
        return False
    return (
        acl.name in ("*", right.name)
        or (acl.pattern == "PREFIXED" and right.name.startswith(acl.name))
        or (right.pattern == "PREFIXED" and acl.name.startswith(right.name))
    )


# --- apply and show -----------------------------------------------------------------------------------------


def show(config: Config) -> list[Difference]:
    """Return what differs between the brokers and what the configuration wants. Blocks on the network.

    Raises InputInvalid for a log that is not on Kafka, LogBusy or LogUnusable.
    """
    kafka, wanted = _wanted(config)
    return differences(wanted, _Brokers(kafka, "DESCRIBE").found(wanted))


def apply(config: Config, *, credentials: Path | None = None) -> list[Difference]:
    """Make the brokers as the configuration wants them, and return what was changed; visible on return. Blocks.

    Users that are missing are made only with `credentials`: a folder that gets a file ROLE.password for each. Raises
    InputInvalid, and has changed nothing then, if the way there would shrink retention or change partitions or
    replicas, if there are fewer brokers than replicas, or a file of a password is in the way; LogBusy or LogUnusable.
    """
    kafka, wanted = _wanted(config)
    brokers = _Brokers(kafka, "DESCRIBE", "ALTER")
    found = brokers.found(wanted)
    todo = [one for one in differences(wanted, found) if one.action is not Action.LEAVE]
    if credentials is None:
        todo = [one for one in todo if one.kind != "user"]
    refused = [one for one in todo if one.action is Action.REFUSE]
    if refused:
        raise _refusal(refused)
    created = {one.name: wanted.topics[one.name] for one in todo if one.kind == "topic"}
    if created and kafka.replication > brokers.count:
        raise InputInvalid(
            f"[kafka] replication is {kafka.replication}, and there are fewer brokers: start more, or choose less;"
            " nothing was changed",
            brokers=brokers.count,
        )
    altered: dict[str, dict[str, str]] = {}
    for one in todo:
        if one.kind == "setting" and one.setting is not None and one.wanted is not None:
            altered.setdefault(one.name, {})[one.setting] = one.wanted
    roles = [role for role, user in wanted.users.items() if any(one[1:3] == ("user", user) for one in todo)]
    passwords = _new_files(credentials, roles) if credentials is not None else {}
    missing, surplus, _ = _of_acls(wanted, found.acls)
    brokers.create_topics(created, dry=True)
    brokers.alter_topics(altered, dry=True)
    brokers.create_acls(missing)
    brokers.delete_acls(surplus)
    brokers.create_topics(created)
    brokers.alter_topics(altered)
    brokers.create_users({wanted.users[role]: _written(path) for role, path in passwords.items()})
    if todo:
        _settle(brokers, wanted, with_users=credentials is not None)
    return todo


def _wanted(config: Config) -> tuple[Kafka, Plan]:
    if config.kafka is None:
        raise InputInvalid("streams are provisioned on Kafka only: a log on SQLite makes its own")
    return config.kafka, plan(CATALOG, config.policy, config.kafka, config.partitions)


def _refusal(refused: Sequence[Difference]) -> InputInvalid:
    first = refused[0]
    more = f" (and {len(refused) - 1} more, see `streamveil streams show`)" if len(refused) > 1 else ""
    change = f"{first.setting} of {first.name} from {first.found} to {first.wanted}{more}"
    if first.setting in ("partitions", "replication"):
        return InputInvalid(
            f"this would change {change}, which stays as it was made: configure what is there; nothing was changed"
        )
    return InputInvalid(
        f"this would shrink {change}, and data could die early: if that is meant, lower it with Kafka's own tool first;"
        " nothing was changed"
    )


def _settle(brokers: "_Brokers", wanted: Plan, *, with_users: bool) -> None:
    """Wait until the brokers show what was changed."""
    deadline = time.monotonic() + _SETTLING_S
    while any(
        one.action is not Action.LEAVE and (with_users or one.kind != "user")
        for one in differences(wanted, brokers.found(wanted))
    ):
        if time.monotonic() > deadline:
            raise LogBusy("the brokers took the changes and do not show them yet: see `streamveil streams show`")
        time.sleep(0.1)


def _new_files(folder: Path, roles: Sequence[str]) -> dict[str, Path]:
    """Return where the passwords of roles go; makes the folder. Raises InputInvalid if something is in the way."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise InputInvalid(f"the folder for passwords cannot be used: {error.strerror}", folder=str(folder)) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputInvalid("others may look into the folder for passwords: chmod 700 it", folder=str(folder))
    paths = {role: folder / f"{role}.password" for role in roles}
    for path in paths.values():
        if os.path.lexists(path):
            raise InputInvalid(
                "this file has a password of a user that does not exist: move it away, or choose another folder (one"
                " for each prefix); nothing was changed",
                file=str(path),
            )
    return paths


def _written(path: Path) -> bytes:
    """Return a new password that is in its file, durably."""
    secret = secrets.token_urlsafe(32).encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret + b"\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise InputInvalid(f"the password cannot be written: {error.strerror}", file=str(path)) from None
    return secret


# --- the brokers --------------------------------------------------------------------------------------------

_SILENT = logging.getLogger("streams.log.provision.librdkafka")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False

_kafka: Any = _admin
"""Its type stubs do not export what it exports."""
_ANYTHING = _kafka.AclBindingFilter("ANY", None, "ANY", None, None, "ANY", "ANY")
_NOT_ALLOWED = "the user of [kafka] may not provision streams: use an administrator of the brokers"
_OLD = "the brokers do not speak this version of the protocol: use Apache Kafka 4"
_BUSY: Final = frozenset(
    {"_TRANSPORT", "_ALL_BROKERS_DOWN", "_TIMED_OUT", "_RESOLVE", "TOPIC_ALREADY_EXISTS", "UNKNOWN_TOPIC_OR_PART"}
)
_UNUSABLE: Final[Mapping[str, str]] = {
    "CLUSTER_AUTHORIZATION_FAILED": _NOT_ALLOWED,
    "TOPIC_AUTHORIZATION_FAILED": _NOT_ALLOWED,
    "SECURITY_DISABLED": "the brokers let every user do everything: set authorizer.class.name on them first",
    "INVALID_REPLICATION_FACTOR": "[kafka] replication is more than there are brokers: start more, or choose less",
    "UNSUPPORTED_VERSION": _OLD,
    "_UNSUPPORTED_FEATURE": _OLD,
}


class _Brokers:
    """What is asked of the brokers, each call blocking; raises LogBusy or LogUnusable with one line."""

    def __init__(self, kafka: Kafka, *operations: str) -> None:
        """Connect as a user who may do these operations to the cluster.

        That is asked first: librdkafka 2.16 says of a user who may not that there are no rights, and breaks the
        process's memory when such a user asks for others.
        """
        conf: dict[str, object] = {
            "bootstrap.servers": ",".join(kafka.servers),
            "client.id": "streamveil",
            "log_level": 0,
            "error_cb": self._hear,
        }
        if kafka.username is not None:
            conf |= {
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": kafka.username,
                "sasl.password": password(kafka),
            }
            if kafka.ca_path is not None:
                tls_context(kafka)
                conf["ssl.ca.location"] = str(kafka.ca_path)
        self._kafka = kafka
        self._heard: set[str] = set()
        self._client = _kafka.AdminClient(conf, logger=_SILENT)
        cluster = self._connected()
        if not set(operations) <= {_name(one) for one in cluster.authorized_operations or ()}:
            raise LogUnusable(_NOT_ALLOWED)
        self.count: int = len(cluster.nodes)

    def _hear(self, error: Any) -> None:
        self._heard.add(error.name())

    def _connected(self) -> Any:
        """Return what the cluster says of itself and of this user."""
        asked = self._client.describe_cluster(include_authorized_operations=True, request_timeout=_TIMEOUT_S)
        deadline = time.monotonic() + _CONNECT_S
        while not asked.done():
            self._client.poll(0.05)
            if "_AUTHENTICATION" in self._heard:
                raise LogUnusable("the brokers refuse user and password of [kafka]: check password_file")
            if "_ALL_BROKERS_DOWN" in self._heard:
                deadline = min(deadline, time.monotonic() + _REASON_S)
                self._heard.remove("_ALL_BROKERS_DOWN")  # why may be told only after that
            if "_SSL" in self._heard or time.monotonic() > deadline:
                raise self._no_connection()
        return self._result(asked)

    def _no_connection(self) -> StreamveilError:
        if self._kafka.username is not None:
            for server in self._kafka.servers:
                why = _bad_certificate(server, tls_context(self._kafka))
                if why is not None:
                    return LogUnusable(
                        f"the brokers' TLS certificate is not accepted: {why}; check ca_file", log=server
                    )
        return LogBusy(
            "no broker answers: are they running, is the address right, and do they speak TLS or plaintext as you do?",
            log=",".join(self._kafka.servers),
        )

    def found(self, wanted: Plan) -> Found:
        """Return the state of the brokers in what a plan is about."""
        acls: frozenset[Acl] = frozenset()
        users: frozenset[str] = frozenset()
        if wanted.users:
            listed = self._result(self._client.describe_acls(_ANYTHING, request_timeout=_TIMEOUT_S))
            acls = frozenset(map(_acl, listed))
            users = frozenset(self._users(list(wanted.users.values())))
        topics = self._metadata().topics
        there = {name: topics[name] for name in wanted.topics if name in topics and topics[name].partitions}
        settings = self._described(there)
        return Found(
            {
                name: FoundTopic(
                    len(topic.partitions),
                    frozenset(len(partition.replicas) for partition in topic.partitions.values()),
                    {one.name: one.value or "" for one in settings[name].values()},
                    frozenset(
                        one.name
                        for one in settings[name].values()
                        if one.source == _kafka.ConfigSource.DYNAMIC_TOPIC_CONFIG.value
                    ),
                )
                for name, topic in there.items()
            },
            acls,
            users,
        )

    def create_topics(self, topics: Mapping[str, Topic], *, dry: bool = False) -> None:
        """Create topics; `dry`: only ask whether that would do."""
        if topics:
            made = [
                _kafka.NewTopic(name, topic.partitions, topic.replicas, config=dict(topic.settings))
                for name, topic in topics.items()
            ]
            self._results(self._client.create_topics(made, validate_only=dry, request_timeout=_TIMEOUT_S))

    def alter_topics(self, settings: Mapping[str, Mapping[str, str]], *, dry: bool = False) -> None:
        """Set settings of topics; `dry`: only ask whether that would do."""
        if settings:
            resources = [
                _kafka.ConfigResource(
                    _kafka.ResourceType.TOPIC,
                    name,
                    incremental_configs=[
                        _kafka.ConfigEntry(setting, value, incremental_operation=_kafka.AlterConfigOpType.SET)
                        for setting, value in values.items()
                    ],
                )
                for name, values in settings.items()
            ]
            self._results(
                self._client.incremental_alter_configs(resources, validate_only=dry, request_timeout=_TIMEOUT_S)
            )

    def create_acls(self, acls: Sequence[Acl]) -> None:
        """Give rights."""
        if acls:
            made = [_kafka.AclBinding(*_for_kafka(acl)) for acl in acls]
            self._results(self._client.create_acls(made, request_timeout=_TIMEOUT_S))

    def delete_acls(self, acls: Sequence[Acl]) -> None:
        """Take rights away."""
        if acls:
            exactly = [_kafka.AclBindingFilter(*_for_kafka(acl)) for acl in acls]
            self._results(self._client.delete_acls(exactly, request_timeout=_TIMEOUT_S))

    def create_users(self, passwords: Mapping[str, bytes]) -> None:
        """Make users with passwords."""
        if passwords:
            info = _kafka.ScramCredentialInfo(_kafka.ScramMechanism.SCRAM_SHA_512, _ITERATIONS)
            made = [_kafka.UserScramCredentialUpsertion(user, info, secret) for user, secret in passwords.items()]
            self._results(self._client.alter_user_scram_credentials(made, request_timeout=_TIMEOUT_S))

    def _users(self, users: list[str]) -> Iterator[str]:
        """Yield those of the users who have a password of the kind that we use."""
        asked = self._client.describe_user_scram_credentials(users, request_timeout=_TIMEOUT_S)
        for user, future in asked.items():
            try:
                described = self._result(future, absent="RESOURCE_NOT_FOUND")
            except _Absent:
                continue
            if any(one.mechanism is _kafka.ScramMechanism.SCRAM_SHA_512 for one in described.scram_credential_infos):
                yield user

    def _described(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        resources = [_kafka.ConfigResource(_kafka.ResourceType.TOPIC, name) for name in names]
        if not resources:
            return {}
        asked = self._client.describe_configs(resources, request_timeout=_TIMEOUT_S)
        return {resource.name: self._result(future) for resource, future in asked.items()}

    def _metadata(self) -> Any:
        try:
            return self._client.list_topics(timeout=_TIMEOUT_S)
        except KafkaException as error:
            raise _error(error) from None

    def _results(self, futures: Mapping[Any, "Future[Any]"]) -> None:
        for future in futures.values():
            self._result(future)

    @staticmethod
    def _result(future: "Future[Any]", absent: str | None = None) -> Any:
        try:
            return future.result(_TIMEOUT_S * 2)
        except KafkaException as error:
            if error.args[0].name() == absent:
                raise _Absent from None
            raise _error(error) from None
        except TimeoutError:
            raise LogBusy("the brokers do not answer") from None


class _Absent(Exception):
    """There is no such thing on the brokers."""


def _bad_certificate(server: str, context: ssl.SSLContext) -> str | None:
    """Return what is wrong with a broker's certificate, which librdkafka does not say; None: nothing, or none came."""
    host, port = server.rsplit(":", 1)
    host = host.strip("[]")
    try:
        with (
            socket.create_connection((host, int(port)), _CONNECT_S) as connected,
            context.wrap_socket(connected, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return str(error.verify_message)
    except OSError:
        return None


def _error(error: KafkaException) -> StreamveilError:
    """Return the error that one of librdkafka stands for."""
    found = error.args[0]
    code = found.name()
    if code in _UNUSABLE:
        return LogUnusable(_UNUSABLE[code])
    text = " ".join(found.str().split())[:200]
    if code in _BUSY or found.retriable():
        return LogBusy(f"the brokers cannot do this now: {text}")
    return LogUnusable(f"the brokers refuse this: {text}")


def _acl(binding: Any) -> Acl:
    """Return a right as the brokers list it."""
    return Acl(
        binding.principal,
        _name(binding.operation),
        _name(binding.restype),
        binding.name,
        _name(binding.resource_pattern_type),
        binding.host,
        _name(binding.permission_type),
    )


def _name(member: Any) -> str:
    return str(member.name)


def _for_kafka(acl: Acl) -> tuple[str, str, str, str, str, str, str]:
    """Return a right in the order that Kafka's client has."""
    return acl.resource, acl.name, acl.pattern, acl.principal, acl.host, acl.operation, acl.permission
