"""Who may do what on the brokers, tried for real: every role, on every stream of two deployments, with its password."""

import asyncio
import contextlib
import logging
import ssl
import time
from itertools import chain

import pytest
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
    ScramMechanism,
    UserScramCredentialDeletion,
)

from deploy.kafka.broker import Authority, Cluster
from schemas.catalog import BOOKMARKED, CATALOG, CUT, CUTTER, INPUTS, ROLES, TRAFFIC, WATCHER
from schemas.errors import LogUnusable
from streams.log import provision
from streams.log.kafka import KafkaLog
from tests.integration.test_provision import OnKafka
from tests.support.commands import PATIENCE_S, eventually

NORTH, SOUTH = "north.", "south."
REFUSED = "refused"
REFUSALS = {
    f"{what}_AUTHORIZATION_FAILED" for what in ("TOPIC", "GROUP", "TRANSACTIONAL_ID", "CLUSTER")
}  # and nothing else counts as being kept out
STARTING = {"NOT_COORDINATOR", "COORDINATOR_NOT_AVAILABLE", "COORDINATOR_LOAD_IN_PROGRESS"}
TOPICS = [prefix + name for prefix in (NORTH, SOUTH) for name in CATALOG]
QUIET = logging.getLogger("tests.kafka")
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Brokers that ask connected clients for their password anew, each few seconds."""
    with Cluster(tmp_path_factory.mktemp("broker"), settings={"connections.max.reauth.ms": "3000"}) as one:
        yield one


@pytest.fixture(scope="module")
def places(cluster, tmp_path_factory):
    """Two deployments on one cluster, with a record in each stream."""
    made = {}
    producer = Producer(cluster.client(), logger=QUIET)
    for prefix in (NORTH, SOUTH):
        made[prefix] = OnKafka(tmp_path_factory.mktemp("place"), cluster, prefix)
        provision.apply(made[prefix].loaded, credentials=made[prefix].credentials)
    for topic in TOPICS:
        producer.produce(topic, b"first", key=b"k", partition=0)
    assert producer.flush(PATIENCE_S) == 0
    return made


@pytest.fixture(scope="module")
def admin(cluster):
    return AdminClient(cluster.client(), logger=QUIET)


def error_of(error):
    return error.args[0] if isinstance(error, KafkaException) else error


def outcome(error):
    """Return None for success, or that it was refused; anything else is a fault of the test."""
    if error is None:
        return None
    assert error_of(error).name() in REFUSALS, error
    return REFUSED


def outcome_of_code(code):
    return outcome(KafkaError(code) if code else None)


def outcome_of(future):
    return outcome(future.exception(PATIENCE_S))


class Attacker:
    """A role of a deployment, with its password, over TLS. Each method tries, and returns what came of it."""

    def __init__(self, cluster, place, role):
        self.role = role
        self.user = place.prefix + role
        secret = (place.credentials / f"{role}.password").read_text().strip()
        self.conf = cluster.client() | {"sasl.username": self.user, "sasl.password": secret}
        self.admin = AdminClient(self.conf, logger=QUIET)

    def consumer(self, group, **more):
        return Consumer(
            self.conf | {"group.id": group, "enable.auto.commit": False, "enable.partition.eof": False, **more},
            logger=QUIET,
        )

    def producer(self, **more):
        return Producer(self.conf | {name.replace("_", "."): value for name, value in more.items()}, logger=QUIET)

    def send(self, request):
        """Send a request as it is, whatever the client thinks of it, and return the answer."""

        async def sent():
            client = AIOKafkaClient(
                bootstrap_servers=self.conf["bootstrap.servers"],
                security_protocol="SASL_SSL",
                ssl_context=ssl.create_default_context(cafile=self.conf["ssl.ca.location"]),
                sasl_mechanism="SCRAM-SHA-512",
                sasl_plain_username=self.user,
                sasl_plain_password=self.conf["sasl.password"],
            )
            await client.bootstrap()
            try:
                return await client.send(client.get_random_node(), request)
            finally:
                for connection in client._conns.values():
                    connection._writer.transport.abort()
                await client.close()

        return asyncio.run(sent())

    def read(self, topics):
        answer = self.send(FetchRequest(100, 1, 1_000_000, 0, [(topic, [(0, 0, 100_000)]) for topic in topics]))
        found = {}
        for topic, ((_, code, *_, records),) in answer.topics:
            found[topic] = outcome_of_code(code)
            assert (b"first" in bytes(records or b"")) == (code == 0), topic
        return found

    def write(self, topics):
        batch = DefaultRecordBatchBuilder(
            magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1,
            batch_size=1000,
        )  # fmt: skip
        batch.append(0, int(time.time() * 1000), b"k", b"attack", [])
        records = bytes(batch.build())
        answer = self.send(ProduceRequest(None, -1, 10_000, [(topic, [(0, records)]) for topic in topics]))
        return {topic: outcome_of_code(code) for topic, ((_, code, *_),) in answer.topics}

    def describe(self, topics):
        return {
            topic: outcome(self.admin.list_topics(topic, timeout=PATIENCE_S).topics[topic].error) for topic in topics
        }

    def describe_configs(self, topics):
        asked = self.admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic) for topic in topics])
        return {resource.name: outcome_of(future) for resource, future in asked.items()}

    def delete(self, topics):
        return {topic: outcome_of(future) for topic, future in self.admin.delete_topics(topics).items()}

    def grow(self, topics):
        asked = self.admin.create_partitions([NewPartitions(topic, 9) for topic in topics])
        return {topic: outcome_of(future) for topic, future in asked.items()}

    def alter(self, topics):
        entry = ConfigEntry("retention.ms", "1", incremental_operation=AlterConfigOpType.SET)
        asked = self.admin.incremental_alter_configs(
            [ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry]) for topic in topics]
        )
        return {resource.name: outcome_of(future) for resource, future in asked.items()}

    def cut(self, topics):
        asked = self.admin.delete_records([TopicPartition(topic, 0, 0) for topic in topics])  # takes nothing away
        return {place.topic: outcome_of(future) for place, future in asked.items()}

    def commit(self, groups):
        mine = [row.name for row in CATALOG.values() if self.role in (*row.readers, *row.followers)]
        at = [TopicPartition(NORTH + (mine or [TRAFFIC])[0], 0, 1)]

        return self.with_groups(
            groups, lambda group: self.admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, at)])
        )

    def look(self, groups):
        return self.with_groups(
            groups, lambda group: self.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])
        )

    def with_groups(self, groups, ask):
        def answered(group):
            future = ask(group)[group]
            errors = [future.exception(PATIENCE_S)]
            if errors == [None]:
                errors = [place.error for place in future.result().topic_partitions] or [None]
            if any(error is not None and error_of(error).name() in STARTING for error in errors):
                return None
            (result,) = {outcome(error) for error in errors}
            return [result]

        return {group: eventually(lambda group=group: answered(group), "an answer")[0] for group in groups}

    def transact(self, ids):
        found = {}
        for name in ids:
            producer = self.producer(transactional_id=name)
            try:
                producer.init_transactions(PATIENCE_S)
            except KafkaException as error:
                found[name] = outcome(error)
            else:
                found[name] = None
        return found

    def administer(self):
        right = AclBinding("TOPIC", NORTH + TRAFFIC, "LITERAL", f"User:{self.user}", "*", "ALL", "ALLOW")
        return {
            "create": outcome_of(self.admin.create_topics([NewTopic(NORTH + "mine", 1, 1)])[NORTH + "mine"]),
            "grant": outcome_of(self.admin.create_acls([right])[right]),
        }


def expected(allowed, names):
    return {name: None if name in allowed else REFUSED for name in names}


def streams_of(role, *columns):
    return {NORTH + row.name for row in CATALOG.values() if any(role in getattr(row, column) for column in columns)}


@pytest.fixture(params=ROLES)
def attacker(request, cluster, places):
    return Attacker(cluster, places[NORTH], request.param)


@pytest.fixture
def as_role(cluster, places):
    return lambda role, prefix=NORTH: Attacker(cluster, places[prefix], role)


# --- the attack table ---------------------------------------------------------------------------------------


def test_every_role_reads_and_writes_exactly_the_streams_that_the_catalog_says(attacker):
    role = attacker.role
    reads, writes = streams_of(role, "readers", "followers"), streams_of(role, "writers")
    everything = {NORTH + name for name in CATALOG} if role in ("worker", WATCHER) else set()
    assert attacker.read(TOPICS) == expected(reads, TOPICS)
    assert attacker.write(TOPICS) == expected(writes, TOPICS)
    assert attacker.describe(TOPICS) == expected(reads | writes | everything, TOPICS)
    assert attacker.describe_configs(TOPICS) == expected(everything, TOPICS)


def test_no_role_deletes_grows_or_alters_a_stream_or_administers_and_officers_alone_cut_what_is_sealed(attacker):
    mine = {NORTH + name for name in CUT} if attacker.role == CUTTER else set()
    others = [topic for topic in TOPICS if topic not in mine]
    assert attacker.delete(others) == expected((), others)
    assert attacker.cut(TOPICS) == expected(mine, TOPICS)
    assert attacker.grow(TOPICS) == expected((), TOPICS)
    assert attacker.alter(TOPICS) == expected((), TOPICS)
    assert attacker.administer() == expected((), ("create", "grant"))


def test_every_role_has_its_own_groups_and_no_others(attacker):
    role = attacker.role
    readers = {one for one in ROLES if one != "worker" and streams_of(one, "readers", "followers")}
    groups = {f"{NORTH}{one}.app": {one} & readers for one in ROLES}
    groups[f"{NORTH}workers"] = {"worker"}
    groups[f"{NORTH}publish.x"] = {one for name in INPUTS for one in CATALOG[name].writers}
    groups |= {name: set() for name in (f"{SOUTH}workers", f"{SOUTH}{role}.app", f"{role}.app", "stranger")}
    mine = {group for group, users in groups.items() if role in users}
    seen = {group for group, users in groups.items() if users} if role == WATCHER else mine
    assert attacker.commit(groups) == expected(mine, groups)
    assert attacker.look(groups) == expected(seen, groups)


def test_every_role_that_writes_has_its_own_transactions_and_no_others(attacker):
    role, other = attacker.role, ROLES[ROLES.index(attacker.role) - 1]
    publishers = {one for name in INPUTS for one in CATALOG[name].writers}
    ids = {
        f"{NORTH}workers.traffic.0": {"worker"},
        f"{NORTH}publish.x": publishers,
        f"{NORTH}append.{NORTH}{role}.x": {role} if streams_of(role, "writers") else set(),
        f"{NORTH}append.{NORTH}{other}.x": set(),
        f"{SOUTH}append.{SOUTH}{role}.x": set(),
    }
    assert attacker.transact(ids) == expected({name for name, users in ids.items() if role in users}, ids)


def test_gateways_of_different_prefixes_do_not_see_each_others_verdicts(as_role):
    verdicts = [NORTH + "verdicts", SOUTH + "verdicts"]
    assert as_role("gateway", NORTH).read(verdicts) == {verdicts[0]: None, verdicts[1]: REFUSED}
    assert as_role("gateway", SOUTH).read(verdicts) == {verdicts[0]: REFUSED, verdicts[1]: None}


# --- what the rights are enough for -------------------------------------------------------------------------


def test_a_worker_commits_outputs_and_offsets_in_one_transaction(as_role):
    worker = as_role("worker")
    consumer = worker.consumer(NORTH + "workers", **{"auto.offset.reset": "earliest"})
    consumer.subscribe([NORTH + name for name in INPUTS])
    with contextlib.closing(consumer):
        message = eventually(lambda: consumer.poll(1), "a record")
        assert message.error() is None
        producer = worker.producer(transactional_id=f"{NORTH}workers.traffic.{message.partition()}")
        producer.init_transactions(PATIENCE_S)
        producer.begin_transaction()
        for name in streams_of("worker", "writers"):
            producer.produce(name, b"out", key=b"k", partition=0)
        producer.send_offsets_to_transaction(
            [TopicPartition(message.topic(), message.partition(), message.offset() + 1)],
            consumer.consumer_group_metadata(),
            PATIENCE_S,
        )
        producer.commit_transaction(PATIENCE_S)


@pytest.mark.parametrize("role", ["gateway", "operator"])
def test_whoever_publishes_keeps_bookmarks_as_offsets_of_verdicts_and_of_no_stream_that_is_clear(as_role, role):
    publisher = as_role(role)
    with contextlib.closing(publisher.consumer(NORTH + "publish.file")) as consumer:
        group = consumer.consumer_group_metadata()
    producer = publisher.producer(transactional_id=NORTH + "publish.file")
    producer.init_transactions(PATIENCE_S)
    for stream in (BOOKMARKED, TRAFFIC):
        producer.begin_transaction()
        for name in INPUTS:
            producer.produce(NORTH + name, b"in", key=b"k", partition=0)
        at = [TopicPartition(NORTH + stream, 0, 7)]
        if stream == BOOKMARKED:
            producer.send_offsets_to_transaction(at, group, PATIENCE_S)
            producer.commit_transaction(PATIENCE_S)
        else:
            with pytest.raises(KafkaException) as refused:
                producer.send_offsets_to_transaction(at, group, PATIENCE_S)
            assert outcome(refused.value) == REFUSED
            producer.abort_transaction(PATIENCE_S)


@pytest.mark.parametrize("role", ["worker", "gateway", "officer"])
def test_no_right_on_the_cluster_is_needed_to_write_idempotently(as_role, role):
    producer, outcomes = as_role(role).producer(enable_idempotence=True), []
    stream = min(streams_of(role, "writers"))
    producer.produce(stream, b"v", key=b"k", partition=0, on_delivery=lambda error, _: outcomes.append(error))
    assert producer.flush(PATIENCE_S) == 0
    assert outcomes == [None]


@pytest.mark.parametrize("role", sorted(set(chain.from_iterable(row.readers for row in CATALOG.values())) - {"worker"}))
def test_every_reader_may_share_its_streams_in_a_group_of_its_own(as_role, role):
    attacker = as_role(role)
    consumer = attacker.consumer(f"{NORTH}{role}.shared", **{"auto.offset.reset": "earliest"})
    consumer.subscribe(sorted(streams_of(role, "readers")))
    with contextlib.closing(consumer):
        message = eventually(lambda: consumer.poll(1), "a record")
        assert message.error() is None
        consumer.commit(message, asynchronous=False)


@pytest.mark.parametrize("role", ["worker", "dpo", "officer"])
def test_an_officer_alone_cuts_dead_records_off(cluster, places, role):
    # Given records in a partition that no other test looks at
    place = places[NORTH]
    producer = Producer(cluster.client(), logger=QUIET)
    for _ in range(3):
        producer.produce(NORTH + "held", b"dead", key=b"k", partition=1)
    assert producer.flush(PATIENCE_S) == 0
    secret = place.credentials / f"{role}.password"
    settings = place.loaded.kafka._replace(username=NORTH + role, password_path=secret)

    async def cut():
        log = KafkaLog(settings, partitions=place.loaded.partitions, lease_s=10)
        try:
            ends = await log.end_offsets("held")
            await log.cut("held", [0, ends[1] - 1, *[0] * (len(ends) - 2)])
            return (await log.begin_offsets("held"))[1], ends[1]
        finally:
            await log.close()

    if role == "officer":
        begin, end = asyncio.run(cut())
        assert begin == end - 1 > 1
    else:
        with pytest.raises(LogUnusable, match="do not allow this"):
            asyncio.run(cut())


# --- who gets no connection at all --------------------------------------------------------------------------


def assert_kept_out(conf, why):
    """See that a client never gets to ask anything, and hears why."""
    heard = []
    client = AdminClient(conf | {"error_cb": heard.append}, logger=QUIET)

    def is_told():
        with pytest.raises(KafkaException):
            client.list_topics(timeout=0.5)
        client.poll(0)
        return why in {error.name() for error in heard}

    eventually(is_told, why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sasl.password": "wrong"}, "_AUTHENTICATION"),
        ({"sasl.username": SOUTH + "gateway"}, "_AUTHENTICATION"),  # the same role, of another deployment
        ({"sasl.username": NORTH + "nobody"}, "_AUTHENTICATION"),
        ({"sasl.mechanism": "PLAIN"}, "_AUTHENTICATION"),
        ({"security.protocol": "SSL"}, "_ALL_BROKERS_DOWN"),
        ({"security.protocol": "SASL_PLAINTEXT"}, "_ALL_BROKERS_DOWN"),
        ({"security.protocol": "PLAINTEXT"}, "_ALL_BROKERS_DOWN"),
    ],
    ids=lambda value: ", ".join(value.values()) if isinstance(value, dict) else "",
)
def test_without_the_right_password_or_without_tls_there_is_no_connection(as_role, changes, why):
    assert_kept_out(as_role("gateway").conf | changes, why)


def test_a_client_does_not_believe_brokers_of_another_authority(as_role, tmp_path):
    assert_kept_out(as_role("gateway").conf | {"ssl.ca.location": str(Authority(tmp_path).path)}, "_SSL")


def test_a_right_that_is_taken_away_ends_with_the_next_use_of_an_open_connection(as_role, admin, places):
    # Given an egress gateway at work
    topic, egress = SOUTH + "cleared", as_role("egress", SOUTH)
    consumer = egress.consumer(f"{SOUTH}egress.app")
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    with contextlib.closing(consumer):
        assert eventually(lambda: consumer.poll(1), "a record").error() is None
        # When its right is taken away / Then it reads no more, over the connection that it has
        right = AclBindingFilter("TOPIC", topic, "LITERAL", f"User:{SOUTH}egress", "*", "READ", "ALLOW")
        assert len(admin.delete_acls([right])[right].result(PATIENCE_S)) == 1
        message = eventually(lambda: consumer.poll(1), "the refusal")
        assert outcome(message.error()) == REFUSED
    # and that it lacks the right is shown, and mended by the next apply
    (shown,) = provision.show(places[SOUTH].loaded)
    assert (shown.name, shown.setting) == (f"{SOUTH}egress", f"read topic {topic}")
    provision.apply(places[SOUTH].loaded)
    assert provision.show(places[SOUTH].loaded) == []
    assert as_role("egress", SOUTH).read([topic]) == {topic: None}


def test_a_user_that_is_taken_away_is_put_out_of_open_connections_and_gets_no_new_one(as_role, admin, places):
    # Given a user who is connected
    support, heard = as_role("support", SOUTH), []
    client = AdminClient(support.conf | {"error_cb": heard.append}, logger=QUIET)
    assert client.list_topics(SOUTH + "cdr.pii", timeout=PATIENCE_S).topics[SOUTH + "cdr.pii"].error is None
    # When the user is taken away
    gone = UserScramCredentialDeletion(f"{SOUTH}support", ScramMechanism.SCRAM_SHA_512)
    admin.alter_user_scram_credentials([gone])[f"{SOUTH}support"].result(PATIENCE_S)

    # Then the open connection ends when the brokers next ask for the password, and no new one begins
    def is_out():
        client.poll(0)
        try:
            client.list_topics(SOUTH + "cdr.pii", timeout=1)
        except KafkaException:
            return "_AUTHENTICATION" in {error.name() for error in heard}
        return False

    eventually(is_out, "the end of the connection")
    assert_kept_out(support.conf, "_AUTHENTICATION")

    # and the next apply makes the user anew, with another password, once the old file is out of the way
    (shown,) = provision.show(places[SOUTH].loaded)
    assert (shown.kind, shown.name) == ("user", f"{SOUTH}support")
    path = places[SOUTH].credentials / "support.password"
    old = path.read_text()
    path.unlink()
    provision.apply(places[SOUTH].loaded, credentials=places[SOUTH].credentials)
    assert path.read_text() != old
    assert as_role("support", SOUTH).read([SOUTH + "cdr.pii"]) == {SOUTH + "cdr.pii": None}
