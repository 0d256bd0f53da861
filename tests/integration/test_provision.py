"""`streamveil streams` and its Python calls, on brokers of their own: what they make, mend, refuse and say."""

import asyncio
import json
import re
import shutil
import ssl
import threading
import time
from argparse import Namespace
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from deploy.kafka.broker import LOOPBACK, Authority, Cluster
from schemas.catalog import CATALOG, INPUTS, ROLES
from streams.config import load, packs_available
from streams.log import provision
from streams.log.provision import Action, retention_ms
from tests.support.commands import Place, eventually, one_line

HOUR_MS = 3_600_000
CLEANING = {"log.retention.check.interval.ms": "200", "log.initial.task.delay.ms": "200"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("broker"), settings=CLEANING) as one:
        yield one


@pytest.fixture(scope="module")
def admin(cluster):
    return AdminClient(cluster.client())


class OnKafka(Place):
    """A deployment on the brokers, with a prefix of its own."""

    def __init__(self, folder, cluster, prefix, **settings):
        super().__init__(folder)
        self.cluster = cluster
        self.prefix = prefix
        self.url = cluster.url
        self.credentials = folder / "credentials"
        self.configure_kafka(**settings)

    def configure_kafka(self, username=None, password_file=None, top="", **settings):
        """Write the configuration anew; `settings` replace or add lines of `[kafka]`."""
        lines = self.cluster.config_toml(username, password_file).splitlines()
        kept = [line for line in lines if line.partition(" ")[0] not in settings]
        kept += [f"{name} = {json.dumps(value)}" for name, value in {"prefix": self.prefix, **settings}.items()]
        self.config.write_text("\n".join([top, *kept, ""]))

    def apply(self, *words):
        done = self.call("streams", "apply", *words)
        assert done.status == 0, done.err
        return done

    def show(self):
        done = self.call("streams", "show", "--json")
        assert (done.status, done.err) == (0, "")
        return done.lines

    @property
    def loaded(self):
        return load(Namespace(config=str(self.config), log=self.url))


@pytest.fixture
def make(cluster, tmp_path, request):
    """Return a function that makes a deployment; prefixes tell tests apart."""
    made = []

    def make(name="one", cluster=cluster, **settings):
        folder = tmp_path / name
        folder.mkdir()
        short = re.sub(r"[^a-z]+", "-", request.node.name.removeprefix("test_"))[:60].strip("-")
        made.append(OnKafka(folder, cluster, f"{short}-{name}.", **settings))
        return made[-1]

    yield make
    for place in made:
        place.close()


def done(futures):
    for future in futures.values():
        future.result(30)


def set_on_topic(admin, topic, **settings):
    entries = [
        ConfigEntry(name.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
        for name, value in settings.items()
    ]
    done(admin.incremental_alter_configs([ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)]))


def settings_of(admin, topic):
    ((_, future),) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).items()
    return {one.name: one.value for one in future.result(30).values()}


def acls_of(admin, principal):
    return set(admin.describe_acls(AclBindingFilter("ANY", None, "ANY", principal, None, "ANY", "ANY")).result(30))


def binding(kind, name, pattern, user, operation, permission="ALLOW"):
    return AclBinding(kind, name, pattern, f"User:{user}", "*", operation, permission)


def produced(client, topic, value, timestamp_ms=0):
    """Write one message to partition 0, and return the error, or None once it is durable."""
    outcome = []
    client.produce(
        topic, value, partition=0, timestamp=timestamp_ms, on_delivery=lambda error, _: outcome.append(error)
    )
    client.flush(30)
    return outcome[0]


def first(cluster, topic):
    """Return the first message that partition 0 of a topic still has, or None if it is empty."""
    consumer = Consumer(cluster.client() | {"group.id": "test", "enable.auto.commit": False})
    try:
        place, message = TopicPartition(topic, 0), None
        while message is None:  # it may be deleted between the two looks
            begin, end = consumer.get_watermark_offsets(place, timeout=30)
            if begin == end:
                return None
            place.offset = begin
            consumer.assign([place])
            message = consumer.poll(5)
        assert message.error() is None
        return message
    finally:
        consumer.close()


# --- apply --------------------------------------------------------------------------------------------------


def test_apply_makes_what_the_catalog_wants_and_changes_nothing_the_second_time(make, admin):
    # Given brokers that know nothing of a deployment
    place = make()
    assert {one["action"] for one in place.show()} == {"create"}

    # When streams are applied / Then every difference that was shown is said to be mended
    before = place.show()
    first_time = place.apply("--credentials", place.credentials)
    assert first_time.out.splitlines()[-1] == f"{len(before)} changes"
    assert place.show() == []
    assert place.call("streams", "show").out == "everything is as the catalog wants it\n"

    # and the brokers have it
    wanted = provision.plan(CATALOG, place.loaded.policy, place.loaded.kafka, 4)
    topics = admin.list_topics(timeout=30).topics
    for name, topic in wanted.topics.items():
        assert len(topics[name].partitions) == 4
        assert settings_of(admin, name).items() >= topic.settings.items()
    for user in wanted.users.values():
        assert len(acls_of(admin, f"User:{user}")) == sum(acl.principal == f"User:{user}" for acl in wanted.acls)

    # When it is done again / Then nothing happens
    again = place.apply("--credentials", place.credentials)
    assert (again.out, again.err) == ("nothing to change\n", "")


def test_passwords_are_in_files_for_the_owners_eyes_and_nowhere_else_and_open_the_door(make, cluster):
    place = make()
    said = place.run("streams", "apply", "--credentials", place.credentials)
    assert said.status == 0, said.err
    assert place.credentials.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in place.credentials.iterdir()} == {f"{role}.password" for role in ROLES}
    passwords = {path.read_text() for path in place.credentials.iterdir()}
    assert len(passwords) == len(ROLES)
    for path in place.credentials.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_text().strip() not in said.out + said.err
    user = f"{place.prefix}billing"
    secret = (place.credentials / "billing.password").read_text().strip()
    client = AdminClient(cluster.client() | {"sasl.username": user, "sasl.password": secret})
    seen = {name for name in client.list_topics(timeout=30).topics if name.startswith(place.prefix)}
    assert seen == {place.prefix + "cdr.anonymous", place.prefix + "billing.deltas"}


def test_users_are_made_only_where_their_passwords_can_go(make):
    # When there is no folder for passwords / Then all but users is made
    place = make()
    said = place.apply()
    assert said.err == f"{len(ROLES)} users missing: give --credentials DIR to make them\n"
    assert [one["kind"] for one in place.show()] == ["user"] * len(ROLES)
    assert place.apply().out == "nothing to change\n"

    # When a file is in the way, as after a run that was killed, or of another deployment / Then nobody is made
    place.credentials.mkdir(mode=0o700)
    (place.credentials / "sre.password").write_text("of another deployment")
    assert "sre.password" in one_line(place.call("streams", "apply", "--credentials", place.credentials))
    assert [path.name for path in place.credentials.iterdir()] == ["sre.password"]
    assert len(place.show()) == len(ROLES)

    # When it is gone / Then users are made, and those that there are keep their passwords
    (place.credentials / "sre.password").unlink()
    place.apply("--credentials", place.credentials)
    assert place.show() == []
    elsewhere = place.folder / "elsewhere"
    assert place.apply("--credentials", elsewhere).out == "nothing to change\n"
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("what", ["open", "file", "nowhere"])
def test_a_folder_that_others_look_into_or_that_is_none_takes_no_password(make, what):
    place = make(what)
    folder = {"open": place.credentials, "file": place.config, "nowhere": place.config / "below"}[what]
    if what == "open":
        folder.mkdir(mode=0o755)
    one_line(place.call("streams", "apply", "--credentials", folder))
    assert "topic" in {one["kind"] for one in place.show()}


def test_apply_may_be_called_where_an_event_loop_runs(make):
    place = make()

    async def inside():
        return provision.apply(place.loaded), provision.show(place.loaded)

    changes, left = asyncio.run(inside())
    assert {one.action for one in changes} == {Action.CREATE}
    assert {one.kind for one in left} == {"user"}


# --- drift --------------------------------------------------------------------------------------------------


def test_drift_is_shown_as_a_difference_and_mended_but_what_is_not_ours_is_left(make, admin):
    # Given a deployment of which somebody changed a lot
    place = make()
    place.apply("--credentials", place.credentials)
    prefix = place.prefix
    set_on_topic(admin, f"{prefix}verdicts", retention_ms="1000", preallocate="true")
    done(admin.delete_topics([f"{prefix}review"]))
    lost = binding("TOPIC", f"{prefix}traffic", "LITERAL", f"{prefix}worker", "READ")
    gained = binding("TOPIC", f"{prefix}cdr.pii", "LITERAL", f"{prefix}billing", "READ")
    denied = binding("TOPIC", f"{prefix}content", "LITERAL", f"{prefix}account", "READ", "DENY")
    strange = binding("TOPIC", f"{prefix}tr", "PREFIXED", "mallory", "READ")
    ((_, future),) = admin.delete_acls([AclBindingFilter(*lost._to_tuple())]).items()
    future.result(30)
    done(admin.create_acls([gained, denied, strange]))

    # When it is shown / Then there is a line for each
    expected = {
        ("create", "topic", f"{prefix}review", None),
        ("alter", "setting", f"{prefix}verdicts", "retention.ms"),
        ("leave", "setting", f"{prefix}verdicts", "preallocate"),
        ("create", "acl", f"{prefix}worker", f"read topic {prefix}traffic"),
        ("delete", "acl", f"{prefix}billing", f"read topic {prefix}cdr.pii"),
        ("leave", "acl", f"{prefix}account", f"read topic {prefix}content (denied)"),
        ("leave", "acl", "mallory", f"read topic {prefix}tr*"),
    }
    keys = ("action", "kind", "name", "setting")
    eventually(lambda: {tuple(one[key] for key in keys) for one in place.show()} == expected, "the drift")
    lines = place.call("streams", "show").out.splitlines()
    week = retention_ms(CATALOG["verdicts"], place.loaded.policy)
    assert f"~ setting {prefix}verdicts retention.ms: 1000 → {week}" in lines
    assert f"- acl {prefix}billing read topic {prefix}cdr.pii" in lines
    assert f"? setting {prefix}verdicts preallocate: true → not set  (apply leaves this alone)" in lines
    assert len(lines) == len(expected)

    # When it is applied / Then ours is as before, and the rest stays and is still shown
    said = place.apply()
    assert said.out.splitlines()[-1] == "4 changes"
    assert said.err == "3 differences left for you to look at: `streamveil streams show`\n"
    assert {one["action"] for one in place.show()} == {"leave"}
    assert gained not in acls_of(admin, gained.principal)
    assert strange in acls_of(admin, "User:mallory")
    assert denied in acls_of(admin, denied.principal)
    done(admin.delete_acls([AclBindingFilter(*strange._to_tuple())]))


def test_retention_is_not_shrunk_and_nothing_else_is_changed_then(make, admin):
    # Given a topic that keeps records longer than wanted, and another difference
    place = make()
    place.apply()
    set_on_topic(admin, f"{place.prefix}cleared", retention_ms=str(48 * HOUR_MS))
    set_on_topic(admin, f"{place.prefix}audit", segment_bytes="1048576")
    eventually(lambda: "refuse" in {one["action"] for one in place.show()}, "the drift")

    # When streams are applied / Then it is refused in one line, and the other difference stays too
    said = one_line(place.call("streams", "apply"))
    assert "shrink retention.ms" in said
    assert str(48 * HOUR_MS) in said
    assert settings_of(admin, f"{place.prefix}audit")["segment.bytes"] == "1048576"


def test_a_policy_that_keeps_content_longer_grows_it_and_one_that_keeps_it_shorter_is_refused(make, admin):
    place = make()
    place.apply()
    default = (provision.retention_ms(CATALOG["content"], place.loaded.policy)) // (24 * HOUR_MS)
    longer = packs_available()["default"].replace('keep = "30 days"', 'keep = "90 days"')
    (place.folder / "longer.toml").write_text(longer)
    place.configure_kafka(top='policy = "longer.toml"')
    assert place.apply().out.splitlines()[-1] == "2 changes"  # segments are longer too
    assert settings_of(admin, f"{place.prefix}content")["retention.ms"] == str(91 * 24 * HOUR_MS)
    place.configure_kafka()
    assert default == 31
    assert "shrink" in one_line(place.call("streams", "apply"))


def test_partitions_and_replicas_are_not_changed(make, admin):
    place = make()
    place.apply()
    place.configure_kafka(top="partitions = 8")
    assert "partitions" in one_line(place.call("streams", "apply"))
    assert {one["setting"] for one in place.show()} == {"partitions", None}  # and users
    place.configure_kafka(replication=3, min_insync=1)
    assert "replication" in one_line(place.call("streams", "apply"))
    topics = admin.list_topics(timeout=30).topics
    assert {len(topics[place.prefix + name].partitions) for name in CATALOG} == {4}


def test_more_replicas_than_brokers_are_refused_before_anything_is_made(make):
    place = make(replication=3, min_insync=2)
    said = one_line(place.call("streams", "apply", "--credentials", place.credentials))
    assert "replication is 3" in said
    assert "brokers=1" in said
    assert {one["action"] for one in place.show()} == {"create"}
    assert not place.credentials.exists()


# --- what a topic does --------------------------------------------------------------------------------------


def test_a_cdr_of_nine_months_ago_is_not_deleted_unread(make, cluster, admin):
    # Given the streams, and a topic that is cleaned in the same way but stamped by whoever writes
    place = make()
    place.apply()
    topic, control = f"{place.prefix}traffic.cdr", f"{place.prefix}control"
    kept_ms = settings_of(admin, topic)["retention.ms"]
    done(admin.create_topics([NewTopic(control, 1, 1, config={"retention.ms": kept_ms, "file.delete.delay.ms": "0"})]))
    producer = Producer(cluster.client())
    nine_months_ago_ms = int((datetime.now(UTC) - timedelta(days=274)).timestamp() * 1000)

    # When a record of nine months ago arrives in both
    before_ms = time.time_ns() // 1_000_000
    for name in (topic, control):
        eventually(lambda name=name: produced(producer, name, b"cdr", nine_months_ago_ms) is None, "the topic")

    # Then the brokers delete it in one, which shows that they clean, and keep it in the other, stamped now
    eventually(lambda: first(cluster, control) is None, "the cleaning")
    message = first(cluster, topic)
    kind, stamp_ms = message.timestamp()
    assert kind == 2  # LogAppendTime
    assert stamp_ms >= before_ms
    assert message.value() == b"cdr"


def test_outputs_take_times_of_the_past_and_of_two_days_ahead_and_none_beyond(make, cluster):
    place = make()
    place.apply()
    producer = Producer(cluster.client())
    now_ms = time.time_ns() // 1_000_000
    outputs = [place.prefix + name for name in CATALOG if name not in INPUTS]
    for topic in outputs:
        key = {} if "suppressions" not in topic else {"key": b"k"}
        for ahead_h in (0, 40, 48 + 24 - 1):
            outcome = []
            producer.produce(
                topic, b"v", partition=0, timestamp=now_ms + ahead_h * HOUR_MS, **key,
                on_delivery=lambda error, _, outcome=outcome: outcome.append(error),
            )  # fmt: skip
            producer.flush(30)
            assert outcome == [None], (topic, ahead_h)
    assert produced(producer, place.prefix + "cdr.pii", b"v", now_ms - 270 * 24 * HOUR_MS) is None
    assert produced(producer, place.prefix + "cdr.anonymous", b"v", now_ms - 3600 * 24 * HOUR_MS) is None
    late = first(cluster, place.prefix + "cdr.pii")
    assert late.timestamp() == (1, now_ms)  # CreateTime, as written
    refused = produced(producer, place.prefix + "cdr.pii", b"v", now_ms + 80 * HOUR_MS)
    assert refused.name() == "INVALID_TIMESTAMP"


@pytest.mark.parametrize(("stream", "fits", "too_large"), [("traffic", 4, 5), ("cdr.pii", 7, 9)])
def test_a_record_may_be_as_large_as_ours_get_and_sealed_ones_larger(make, cluster, stream, fits, too_large):
    place = make(stream.replace(".", "-"))
    place.apply()
    producer = Producer(cluster.client() | {"message.max.bytes": 16 * 2**20})
    assert produced(producer, place.prefix + stream, bytes(fits * 2**20)) is None
    assert produced(producer, place.prefix + stream, bytes(too_large * 2**20)).name() == "MSG_SIZE_TOO_LARGE"


# --- who may, and what goes wrong ---------------------------------------------------------------------------


def test_only_an_administrator_provisions_and_sees_what_differs(make):
    place = make()
    place.apply("--credentials", place.credentials)
    for role in ("worker", "sre", "dpo"):
        place.configure_kafka(place.prefix + role, place.credentials / f"{role}.password")
        for verb in ("show", "apply"):
            said = place.run("streams", verb)
            assert "use an administrator" in one_line(said)
            assert said.out == ""


def test_an_administrator_needs_a_few_rights_and_need_not_be_a_super_user(make, admin):
    place = make()
    user, path = f"{place.prefix}deployer", place.folder / "deployer.password"
    path.write_text("of the deployer")
    path.chmod(0o600)
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    done(admin.alter_user_scram_credentials([UserScramCredentialUpsertion(user, info, path.read_bytes())]))
    rights = [binding("BROKER", "kafka-cluster", "LITERAL", user, operation) for operation in ("DESCRIBE", "ALTER")]
    rights += [
        binding("TOPIC", place.prefix, "PREFIXED", user, operation)
        for operation in ("CREATE", "DESCRIBE", "ALTER_CONFIGS")
    ]
    done(admin.create_acls(rights))
    place.configure_kafka(user, path)
    place.apply("--credentials", place.credentials)
    shown = place.show()
    assert {(one["action"], one["name"]) for one in shown} == {("leave", user)}  # its own rights on our topics
    set_on_topic(admin, f"{place.prefix}audit", segment_bytes="1048576")
    eventually(lambda: len(place.show()) > len(shown), "the drift")
    assert place.apply().out.splitlines()[-1] == "1 change"
    # When one of them is missing / Then that is said, and not that everything is missing
    done(admin.delete_acls([AclBindingFilter(*rights[0]._to_tuple()), AclBindingFilter(*rights[1]._to_tuple())]))
    assert "use an administrator" in one_line(place.call("streams", "show"))


def wrong_password(place, _):
    path = place.folder / "wrong.password"
    path.write_text("wrong")
    path.chmod(0o600)
    place.configure_kafka(password_file=path)


def open_password(place, cluster):
    path = shutil.copy(cluster.admin[1], place.folder / "open.password")
    path.chmod(0o644)
    place.configure_kafka(password_file=path)


def missing_password(place, _):
    place.configure_kafka(password_file=place.folder / "missing.password")


def unknown_user(place, _):
    place.configure_kafka(username="nobody")


def wrong_authority(place, _):
    (place.folder / "other").mkdir()
    place.configure_kafka(ca_file=str(Authority(place.folder / "other").path))


def missing_authority(place, _):
    place.configure_kafka(ca_file=str(place.folder / "missing.pem"))


def no_tls(place, _):
    place.config.write_text(f'[kafka]\nplaintext = true\nprefix = "{place.prefix}"\n')


def no_broker(place, _):
    place.url = f"kafka://{LOOPBACK}:1"


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (wrong_password, "refuse user and password"),
        (unknown_user, "refuse user and password"),
        (open_password, "chmod 600"),
        (missing_password, "cannot be read"),
        (wrong_authority, "certificate is not accepted"),
        (missing_authority, "ca_file cannot be read"),
        (no_tls, "no broker answers"),
        (no_broker, "no broker answers"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("verb", ["apply", "show"])
def test_brokers_that_cannot_be_used_are_one_clear_line(make, cluster, broken, says, verb):
    place = make("x")
    broken(place, cluster)
    said = place.run("streams", verb)
    assert says in one_line(said)
    assert said.out == ""


@pytest.mark.parametrize("valid", [True, False])
def test_a_certificate_that_has_expired_is_not_accepted(make, cluster, tmp_path, valid):
    # Given somebody in front of the brokers with a certificate of the right authority, valid or of last week
    place = make("valid" if valid else "expired")
    ends = datetime.now(UTC) + timedelta(days=7 if valid else -7)
    certificate = tmp_path / "front.pem"
    certificate.write_bytes(Authority(cluster.folder).issue("front", ends=ends))
    with Front(cluster, certificate) as port:
        place.url = f"kafka://{LOOPBACK}:{port}"
        said = place.run("streams", "show", "--json")
    # Then who is valid is believed, and who is not is not told a password
    if valid:
        assert said.status == 0, said.err
        assert {one["action"] for one in said.lines} == {"create"}
    else:
        assert "certificate has expired" in one_line(said)


class Front:
    """Ends TLS with a certificate, and passes on to the first broker; gives its port."""

    def __init__(self, cluster, certificate):
        self.cluster = cluster
        self.certificate = certificate
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self):
        self.thread.start()
        self.server = asyncio.run_coroutine_threadsafe(self.serve(), self.loop).result(30)
        return self.server.sockets[0].getsockname()[1]

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self.end(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.loop.close()

    async def serve(self):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate)
        return await asyncio.start_server(self.passed_on, LOOPBACK, 0, ssl=context)

    async def end(self):
        self.server.close()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.sleep(0)

    async def passed_on(self, reader, writer):
        trusted = ssl.create_default_context(cafile=str(self.cluster.ca_path))
        other_reader, other_writer = await asyncio.open_connection(LOOPBACK, self.cluster.ports[0].client, ssl=trusted)

        async def copy(source, target):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()

        both = [asyncio.ensure_future(copy(*ends)) for ends in ((reader, other_writer), (other_reader, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            other_writer.transport.abort()
            writer.transport.abort()


def test_brokers_without_security_get_topics_only(tmp_path, make):
    with Cluster(tmp_path / "plain", secured=False) as plain:
        place = make(cluster=plain)
        changes = place.apply("--credentials", place.credentials)
        assert changes.out.splitlines()[-1] == f"{len(CATALOG)} changes"
        assert place.show() == []
        assert place.apply().out == "nothing to change\n"
        assert not list(place.credentials.glob("*"))


# --- on SQLite ----------------------------------------------------------------------------------------------


def test_on_sqlite_the_catalog_is_shown_and_nothing_is_applied(tmp_path):
    place = Place(tmp_path)
    shown = place.call("streams", "show")
    assert shown.status == 0
    assert len(shown.out.splitlines()) == 1 + len(CATALOG)
    assert "on Kafka only" in shown.err
    assert shown.err.count("\n") == 1
    rows = place.call("streams", "show", "--json").lines
    assert [row["stream"] for row in rows] == list(CATALOG)
    assert rows[0]["read_by"] == ["worker"]
    assert rows[0]["lives"] == "24 hours"
    assert "on Kafka only" in one_line(place.call("streams", "apply"))
    assert not place.data.exists()


def test_a_wrong_verb_is_wrong_usage(tmp_path):
    assert Place(tmp_path).call("streams", "destroy").status == 2


def test_an_unclear_answer_of_the_brokers_is_one_line():
    class Odd:
        def result(self, _):
            raise KafkaException(_error_of("_FAIL"))

    def _error_of(name):
        from confluent_kafka import KafkaError

        return KafkaError(getattr(KafkaError, name), "line one\nline two")

    with pytest.raises(provision.LogUnusable, match="line one line two"):
        provision._Brokers._result(Odd())
