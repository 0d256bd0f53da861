"""A real broker for tests: one secured node for the whole run, and a topic prefix of its own for each test.

It is started by the first test that asks for it, and never skipped: without Java or Maven those tests fail and say
what to install. Tests that kill or suspend nodes start a `Cluster` of their own.
"""

import contextlib
import gc
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from deploy.kafka.broker import Cluster
from schemas.catalog import CATALOG
from streams import config
from streams.config import Kafka

SETTINGS = {
    "group.min.session.timeout.ms": "500",  # so that a lease that runs out is no long wait
    "group.max.size": "100",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
    "log.segment.delete.delay.ms": "1000",
    "log.retention.check.interval.ms": "1000",
    "log.cleaner.backoff.ms": "300",
}

BROKERS = frozenset({"broker", "cluster", "clusters", "log_factory"})
"""Fixtures that are brokers, or may be."""


def _meets_brokers(item: pytest.Item) -> bool:
    return not BROKERS.isdisjoint(getattr(item, "fixturenames", ()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests with brokers leave connections unclosed: aiokafka drops one that is interrupted while it is made."""
    for item in items:
        if _meets_brokers(item):
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Have them collected before the next test, which may not."""
    if _meets_brokers(item):
        gc.collect()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield the broker that all tests share; it is stopped with the last of them."""
    with Cluster(tmp_path_factory.mktemp("kafka") / "broker", settings=SETTINGS, quick=True) as cluster:
        yield cluster


@pytest.fixture
def prefix(broker: Cluster) -> Iterator[str]:
    """Yield a prefix of topics that nobody else has; the topics under it are deleted when the test is over."""
    ours = f"t{uuid.uuid4().hex[:12]}."
    yield ours
    remove_topics(broker, ours)


@pytest.fixture
def kafka(broker: Cluster, prefix: str) -> Kafka:
    """Return the configuration of a log on the shared broker, as its super user, under a prefix of its own."""
    return settings(broker, prefix)


def settings(cluster: Cluster, prefix: str, **table: object) -> Kafka:
    """Return the configuration of a log on a cluster, for its super user; `table`: other keys of `[kafka]`."""
    table = tomllib.loads(cluster.config_toml())["kafka"] | {"prefix": prefix, "commit_every_ms": 0} | table
    return config._kafka(cluster.url, msgspec.convert(table, config._KafkaTable), Path())


def config_file(folder: Path, cluster: Cluster, prefix: str, head: str = "", tail: str = "") -> Path:
    """Write a streamveil.toml for a log on a cluster; `head`: lines of the top level, `tail`: more of `[kafka]`."""
    path = folder / "streamveil.toml"
    path.write_text(f'{head}\n{cluster.config_toml()}prefix = "{prefix}"\n{tail}\n', encoding="utf-8")
    return path


def make_topics(cluster: Cluster, prefix: str, partitions: int, settings: dict[str, str]) -> None:
    """Make a bare topic for each stream, for tests that are not about provisioning."""
    admin = AdminClient(cluster.client())
    topics = [NewTopic(prefix + stream, partitions, 1, config=settings) for stream in CATALOG]
    for made in admin.create_topics(topics).values():
        made.result()


def remove_topics(cluster: Cluster, prefix: str) -> None:
    """Delete every topic under a prefix, as far as there are any."""
    admin = AdminClient(cluster.client())
    names = [name for name in admin.list_topics(timeout=30).topics if name.startswith(prefix)]
    for gone in admin.delete_topics(names).values() if names else ():
        with contextlib.suppress(KafkaException):
            gone.result()
