"""The log on a real broker, beyond the contract: transactions, fencing, membership, and what a wrong set-up says."""

import asyncio
import functools
import time
from contextlib import suppress

import pytest
from aiokafka import AIOKafkaConsumer
from confluent_kafka import TopicPartition as Part
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from deploy.kafka.broker import Authority
from schemas.errors import Fenced, KeysChanged, LogBusy, LogUnusable
from streams.config import Kafka
from streams.log.connection import Connection, Place, patient, tls_context
from streams.log.fencing import Offsets, Writer
from streams.log.kafka import KafkaLog
from streams.log.protocol import Bookmark, Message, Output
from streams.state.entries import SUPPRESSIONS, EntryTail
from tests.support.kafka import make_topics

LEASE_S = 3.0
WRONG = "not the password"


def run(test):
    """Run an async test to its end, and close the logs it opened."""

    @functools.wraps(test)
    def wrapped(**fixtures):
        async def whole():
            try:
                await test(**fixtures)
            finally:
                for log in fixtures["opened"]:
                    await log.close()

        asyncio.run(whole())

    return wrapped


@pytest.fixture
def opened():
    """Return the list of the logs that a test opens; they are closed when it is over."""
    return []


@pytest.fixture
def topics(broker, kafka):
    """Return the configuration of a log whose topics are there."""
    make_topics(broker, kafka.prefix, 2, {"retention.ms": "-1"})
    return kafka


def opened_log(opened, settings, lease_s=LEASE_S):
    opened.append(KafkaLog(settings, partitions=2, lease_s=lease_s))
    return opened[-1]


def messages(*values):
    return [Message(1_700_000_000_000, b"k", (), value) for value in values]


async def values(log, stream, partition=0):
    return [one.value for one in await log.read(stream, partition, 0, 1000)]


async def everything(settings, topic):
    """Return what a reader sees that does not ask for committed messages only."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=",".join(settings.servers), security_protocol="SASL_SSL", ssl_context=tls_context(settings),
        sasl_mechanism="SCRAM-SHA-512", sasl_plain_username=settings.username,
        sasl_plain_password=settings.password_path.read_text(), auto_offset_reset="earliest",
    )  # fmt: skip
    await consumer.start()
    consumer.assign([Place(topic, 0)])
    found = []
    while page := await consumer.getmany(timeout_ms=1500):
        found += [one.value for some in page.values() for one in some]
    await consumer.stop()
    return found


def nothing():
    """Object to nothing."""


# --- transactions as this client and this broker do them -----------------------------------------------------------


@run
async def test_what_was_aborted_is_on_the_broker_and_never_read(opened, topics):
    log = opened_log(opened, topics)
    place = Place(await log.topic("verdicts"), 0)
    writer = Writer(log.connection, f"{topics.prefix}a")
    await writer.fence()

    def objects():
        raise KeysChanged

    await writer.write({place: messages(b"one")}, None)
    with pytest.raises(KeysChanged):
        await writer.write({place: messages(b"aborted", b"too")}, None, objects)
    await writer.write({place: messages(b"two")}, None)

    assert await values(log, "verdicts") == [b"one", b"two"]
    assert await everything(topics, place.topic) == [b"one", b"aborted", b"too", b"two"]


@run
async def test_of_two_writers_with_one_id_the_older_is_refused_at_any_step(opened, topics):
    log = opened_log(opened, topics)
    place = Place(await log.topic("verdicts"), 0)
    for step in ("_fill", "_end"):
        older, newer = (Writer(log.connection, f"{topics.prefix}{step}") for _ in range(2))
        await older.fence()
        if step == "_end":  # everything is written but the decision

            async def overtaken(*, commit, end=older._end, newer=newer):
                await newer.fence()
                await end(commit=commit)

            older._end = overtaken
        else:
            await newer.fence()

        with pytest.raises(Fenced):
            await older.write({place: messages(b"zombie")}, Offsets(f"{topics.prefix}workers", {place: (1, "")}))

        assert not older.usable
        await newer.write({place: messages(step.encode())}, None)
    assert await values(log, "verdicts") == [b"_fill", b"_end"]


@run
async def test_transactions_of_several_writers_in_one_partition_do_not_hide_each_other(opened, topics):
    log = opened_log(opened, topics)
    place = Place(await log.topic("verdicts"), 0)
    writers = [Writer(log.connection, f"{topics.prefix}{number}") for number in range(3)]
    expected = []
    for number, writer in enumerate(writers):
        await writer.fence()
        writer._deadline_s = time.monotonic() + 10
        await writer._fill({place: messages(b"%d" % number)}, None)
    for number, writer in enumerate(writers):
        await writer._end(commit=number != 1)
        expected += [] if number == 1 else [b"%d" % number]
    await writers[1].write({place: messages(b"later")}, None)

    assert await values(log, "verdicts") == [*expected, b"later"]


@run
async def test_offsets_that_an_open_transaction_may_move_are_not_told(opened, topics):
    log = opened_log(opened, topics)
    place = Place(await log.topic("traffic"), 0)
    group = f"{topics.prefix}workers"
    writer = Writer(log.connection, f"{topics.prefix}w")
    await writer.fence()
    writer._deadline_s = time.monotonic() + 10
    await writer._fill({}, Offsets(group, {place: (5, "")}))

    with pytest.raises(LogBusy):
        await log.connection.committed(group, [place])
    await writer._end(commit=True)

    assert await patient(log.connection.committed)(group, [place]) == {place: (5, "")}


# --- opt-outs ----------------------------------------------------------------------------------------------------


@run
async def test_opt_outs_that_are_written_and_not_committed_stop_clearing_until_they_are_decided(opened, topics):
    log = opened_log(opened, topics)
    place = Place(await log.topic("suppressions"), 1)
    tail = EntryTail(log, SUPPRESSIONS, 1)
    assert await tail.catch_up() == 0
    writer = Writer(log.connection, f"{topics.prefix}stalls")
    await writer.fence()
    writer._deadline_s = time.monotonic() + 10
    await writer._fill({place: messages(b"x")}, None)

    with pytest.raises(LogBusy, match="opt-outs were written and not committed"):
        await tail.catch_up()
    await writer._end(commit=False)

    assert await tail.catch_up() == 0


@run
async def test_a_writer_that_stalls_is_ended_by_its_time_out_and_fenced(opened, topics):
    log = opened_log(opened, topics._replace(transaction_timeout_ms=1000))
    place = Place(await log.topic("suppressions"), 0)
    writer = Writer(log.connection, f"{topics.prefix}stalls")
    await writer.fence()
    writer._deadline_s = time.monotonic() + 10
    await writer._fill({place: messages(b"x")}, None)
    tail = EntryTail(log, SUPPRESSIONS, 1)

    deadline_s = time.monotonic() + 30
    while True:
        try:
            assert await tail.catch_up() == 0
            break
        except LogBusy:
            assert time.monotonic() < deadline_s
    with pytest.raises(Fenced):
        await writer._end(commit=True)


# --- consuming ---------------------------------------------------------------------------------------------------


@run
async def test_the_first_message_of_a_batch_waits_for_more(opened, topics):
    log = opened_log(opened, topics._replace(commit_every_ms=4000))
    consumer = log.consumer("w")
    assert await consumer.poll(1000, 2.0) is None  # it has joined

    async def publish():
        for value in (b"a", b"b", b"c"):
            await log.append([Output("traffic", 0, messages(value))])

    batch, _ = await asyncio.gather(consumer.poll(1000, 40.0), publish())

    assert [message.value for message in batch.messages] == [b"a", b"b", b"c"]
    assert len(set(batch.offsets)) == 3
    assert batch.offsets[0] < batch.next_offset > batch.offsets[-1]


@run
async def test_a_full_batch_does_not_wait(opened, topics):
    log = opened_log(opened, topics._replace(commit_every_ms=600_000))
    await log.append([Output("traffic", 0, messages(*[b"x"] * 10))])
    consumer = log.consumer("w")

    began_s = time.monotonic()
    batch = await consumer.poll(10, 50.0)

    assert len(batch.messages) == 10
    assert time.monotonic() - began_s < 50


@run
async def test_a_worker_that_died_and_is_back_in_time_gets_its_partitions_at_once(opened, topics):
    log, other = opened_log(opened, topics, 60.0), opened_log(opened, topics, 60.0)
    await log.append([Output("traffic", 0, messages(b"a"))])
    dies = log.consumer("slot-0")
    held = await dies.poll(10, 20.0)
    dies._membership._coordinator._coordination_task.cancel()  # no farewell
    dies._membership._coordinator._heartbeat_task.cancel()
    await dies._membership._client.close()

    again = await other.consumer("slot-0").poll(10, 20.0)

    assert again.messages == held.messages
    with pytest.raises(Fenced):
        await dies.commit(held, [], nothing)


@run
async def test_a_batch_under_way_is_committed_before_its_partition_is_handed_over(opened, topics):
    log, other = opened_log(opened, topics), opened_log(opened, topics)
    for partition in range(2):
        await log.append([Output("traffic", partition, messages(b"a", b"b"))])
    first, second = log.consumer("a"), other.consumer("b")
    served = []
    batch = await first.poll(1, 20.0)
    joining = asyncio.create_task(second.poll(1, 30.0))
    await asyncio.sleep(2)
    assert not joining.done()
    await first.commit(batch, [Output("verdicts", 0, batch.messages)], nothing)
    served.append(batch.partition)
    taken = await joining
    assert taken is not None
    await second.commit(taken, [Output("verdicts", 0, taken.messages)], nothing)
    deadline_s = time.monotonic() + 40
    while not await first.at_end():
        assert time.monotonic() < deadline_s
        for consumer in (first, second):
            batch = await consumer.poll(1, 0.5)
            if batch is not None:
                await consumer.commit(batch, [Output("verdicts", 0, batch.messages)], nothing)

    assert sorted(await values(log, "verdicts")) == [b"a", b"a", b"b", b"b"]


@run
async def test_a_batch_that_takes_too_long_is_handed_over_and_done_by_another(opened, topics, monkeypatch):
    monkeypatch.setattr("streams.log.kafka.HANDOVER_S", 1.0)
    log, other = opened_log(opened, topics), opened_log(opened, topics)
    await log.append([Output("traffic", 0, messages(b"a"))])
    slow, quick = log.consumer("z-slow"), other.consumer("a-quick")  # who comes first by name gets partition 0
    batch = await slow.poll(10, 20.0)
    taken = await quick.poll(10, 30.0)

    assert taken.messages == batch.messages
    with pytest.raises(LogBusy, match="handed over"):
        await slow.commit(batch, [Output("verdicts", 0, batch.messages)], nothing)
    await quick.commit(taken, [Output("verdicts", 0, taken.messages)], nothing)
    assert await slow.poll(10, 1.0) is None
    assert await values(log, "verdicts") == [b"a"]


@run
async def test_it_is_not_the_end_while_input_is_written_and_not_committed(opened, topics):
    log = opened_log(opened, topics)
    place = Place(await log.topic("traffic"), 1)
    writer = Writer(log.connection, f"{topics.prefix}gateway")
    await writer.fence()
    writer._deadline_s = time.monotonic() + 10
    consumer = log.consumer("w")
    assert await consumer.at_end()

    await writer._fill({place: messages(b"x")}, None)
    assert not await consumer.at_end()
    await writer._end(commit=False)

    assert await consumer.poll(10, 2.0) is None
    assert await consumer.at_end()


@run
async def test_input_that_was_deleted_unread_is_counted_and_work_goes_on_behind_it(opened, topics, broker):
    log = opened_log(opened, topics)
    await log.append([Output("traffic", 0, messages(b"a", b"b", b"c", b"d"))])
    consumer = log.consumer("w")
    batch = await consumer.poll(1, 20.0)
    await consumer.commit(batch, [], nothing)
    await consumer.close()
    admin = AdminClient(broker.client())
    for done in admin.delete_records([Part(f"{topics.prefix}traffic", 0, 3)]).values():
        done.result()

    later = log.consumer("w2")
    batch = await later.poll(10, 20.0)

    assert [message.value for message in batch.messages] == [b"d"]
    assert later.missed == 2


@run
async def test_a_bookmark_of_a_publisher_that_died_in_the_middle_is_the_one_before(opened, topics):
    log, other = opened_log(opened, topics), opened_log(opened, topics)
    before = Bookmark(10, 2, "digest")
    await log.append([Output("traffic", 0, messages(b"a"))], ("file", before))
    dying = log._writers[f"{topics.prefix}publish.file"]
    dying._deadline_s = time.monotonic() + 10
    place = Place(await log.topic("traffic"), 0)
    await dying._fill({place: messages(b"half")}, await log._bookmark_offsets("file", Bookmark(20, 3, "later")))

    assert await other.bookmark("file") == before
    await other.append([Output("traffic", 0, messages(b"b"))], ("file", None))

    assert await other.bookmark("file") is None
    assert await values(other, "traffic") == [b"a", b"b"]


@run
async def test_a_record_of_four_megabytes_comes_through(opened, broker, kafka):
    make_topics(broker, kafka.prefix, 2, {"max.message.bytes": "9000000", "retention.ms": "-1"})
    log = opened_log(opened, kafka)
    big = b"x" * 4_000_000
    await log.append([Output("traffic", 0, messages(b"a", big, b"b"))])
    consumer = log.consumer("w")
    found = []
    while len(found) < 3:
        batch = await consumer.poll(10, 20.0)
        found += [message.value for message in batch.messages]
        await consumer.commit(batch, [Output("quarantine", 0, batch.messages)], nothing)

    assert found == [b"a", big, b"b"] == await values(log, "quarantine")


# --- a wrong set-up ----------------------------------------------------------------------------------------------


async def refused(settings, error, words):
    connection = Connection(settings)
    with pytest.raises(error, match=words) as said:
        await connection.client()
    await connection.close()
    text = str(said.value)
    assert "\n" not in text
    assert WRONG not in text


@run
async def test_each_way_to_be_turned_away_is_said_in_one_line(opened, kafka, tmp_path):
    assert not opened
    wrong = tmp_path / "password"
    wrong.write_text(WRONG)
    wrong.chmod(0o600)
    await refused(kafka._replace(password_path=wrong), LogUnusable, "refuse user and password")
    (tmp_path / "stranger").mkdir()
    await refused(
        kafka._replace(ca_path=Authority(tmp_path / "stranger").path), LogUnusable, "certificate is not accepted"
    )
    await refused(kafka._replace(ca_path=wrong), LogUnusable, "cannot be read as PEM")
    await refused(kafka._replace(username=None), LogBusy, "no broker answers")
    await refused(kafka._replace(servers=("127.0.0.1:1",)), LogBusy, "no broker answers")
    wrong.chmod(0o644)
    await refused(kafka._replace(password_path=wrong), LogUnusable, "chmod 600")
    wrong.write_text("")
    wrong.chmod(0o600)
    await refused(kafka._replace(password_path=wrong), LogUnusable, "is empty")
    await refused(kafka._replace(password_path=tmp_path), LogUnusable, "cannot be read")


@run
async def test_a_user_who_may_not_join_the_workers_hears_it_at_the_next_poll(opened, topics, broker, tmp_path):
    user, password_file = _stranger(broker, topics.prefix, tmp_path)
    admin = AdminClient(broker.client())
    rights = [("TOPIC", "READ"), ("TOPIC", "DESCRIBE"), ("GROUP", "DESCRIBE"), ("TRANSACTIONAL_ID", "WRITE")]
    acls = [
        AclBinding(
            ResourceType[kind], topics.prefix, ResourcePatternType.PREFIXED, f"User:{user}", "*",
            AclOperation[operation], AclPermissionType.ALLOW,
        )
        for kind, operation in rights
    ]  # fmt: skip
    for done in admin.create_acls(acls).values():
        done.result()
    log = opened_log(opened, topics._replace(username=user, password_path=password_file))
    consumer = log.consumer("w")

    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:  # until the broker knows the user
        with suppress(LogBusy, LogUnusable):
            await log.connection.client()
            break

    async def polls():
        while time.monotonic() < deadline_s:
            with suppress(LogBusy):
                await consumer.poll(10, 0.2)

    with pytest.raises(LogUnusable, match="do not allow this to the user"):
        await polls()


def _stranger(broker, prefix, folder):
    """Return a new user without rights, and the file with the password."""
    admin = AdminClient(broker.client())
    user, password_file = f"{prefix}stranger", folder / "stranger.password"
    password_file.write_text("quite secret")
    password_file.chmod(0o600)
    mechanism = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion(user, mechanism, b"quite secret")
    for done in admin.alter_user_scram_credentials([change]).values():
        done.result()
    return user, password_file


@run
async def test_streams_that_are_missing_or_have_other_partitions_are_refused_with_what_to_do(opened, kafka, broker):
    log = opened_log(opened, kafka)
    with pytest.raises(LogUnusable, match="run `streamveil streams apply` first"):
        await log.read("verdicts", 0, 0, 1)
    make_topics(broker, kafka.prefix, 3, {})
    log = opened_log(opened, kafka)
    with pytest.raises(LogUnusable, match="has 3 partitions on the brokers"):
        await log.read("verdicts", 0, 0, 1)


def test_a_configuration_never_shows_a_password(kafka: Kafka):
    assert kafka.password_path.read_text().strip() not in repr(kafka)
