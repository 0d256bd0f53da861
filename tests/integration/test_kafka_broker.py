"""The broker of `deploy/kafka`: it comes up secured, says what is missing, and leaves nothing behind."""

import contextlib
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

import streams.cli.demo
from deploy.kafka import broker as module
from deploy.kafka.broker import LOOPBACK, NODE_CN, Authority, BrokerError, Cluster, Ports, jars
from streams.cli.main import main
from tests.support.commands import PATIENCE_S, eventually

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "kafka" / "broker.py"


def gets_in(properties: dict) -> bool:
    """Return that somebody gets in so, as soon as that is so."""
    return bool(eventually(lambda: answers(properties), "an answer of the broker"))


def answers(properties: dict) -> bool:
    """Return whether somebody gets in so, and is answered at once."""
    admin = AdminClient({"log_level": 0} | properties)  # kept by a name: what it does ends with it
    try:
        return bool(admin.describe_cluster(request_timeout=3).result().nodes)
    except KafkaException:
        return False


def make_topic(cluster: Cluster, name: str) -> None:
    admin = AdminClient(cluster.client())
    admin.create_topics([NewTopic(name, 1, min(3, cluster.nodes))])[name].result()


def topics(cluster: Cluster) -> dict:
    return AdminClient(cluster.client()).list_topics(timeout=PATIENCE_S).topics


def command(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str, *words: object, **environment: str) -> subprocess.Popen:
    """Start Python on code of a test, with the checkout on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(folder: Path) -> list[str]:
    """Return the command lines of processes that have to do with a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if str(folder) in line and path.parent.name != str(os.getpid()) else []
    return found


def tools(folder: Path, **scripts: str) -> str:
    """Return a PATH on which nothing is but these programs: name → shell script, or the real one if that is empty."""
    folder.mkdir()
    for name, script in scripts.items():
        if script:
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o700)
        else:
            (folder / name).symlink_to(shutil.which(name))
    return str(folder)


# --- started and stopped ----------------------------------------------------------------------------------------


def test_a_daemon_outlives_its_command_keeps_its_data_and_is_gone_when_stopped(tmp_path):
    folder = tmp_path / "kafka"
    try:
        # when it is started twice
        first = command("start", "--folder", folder)
        assert first.returncode == 0, first.stderr
        cluster = Cluster.at(folder)
        pid, url, known = cluster.pid(0), cluster.url, cluster.cluster_id
        again = command("start", "--folder", folder)
        # then the second start finds the first one's node, and says the same
        assert again.returncode == 0, again.stderr
        assert (Cluster.at(folder).pid(0), again.stdout) == (pid, first.stdout)
        assert all(word in first.stdout for word in (url, known, cluster.version, "streams apply --credentials"))
        assert f'log = "{url}"' in (folder / "streamveil.toml").read_text()
        assert command("status", "--folder", folder).returncode == 0
        make_topic(cluster, "kept")

        # when it is stopped twice
        for _ in range(2):
            done = command("stop", "--folder", folder)
            assert done.returncode == 0, done.stderr
        # then nothing of it runs
        assert (cluster.pid(0), processes(folder)) == (None, [])
        assert command("status", "--folder", folder).returncode == 1

        # when it comes back, it is the same cluster in the same place, with its data
        cluster.start()
        assert (cluster.url, cluster.cluster_id) == (url, known)
        assert "kept" in topics(cluster)
        cluster.stop()
    finally:
        Cluster.at(folder).stop()
    assert processes(folder) == []


def test_it_is_gone_when_the_process_that_started_it_was_killed(tmp_path):
    code = """
import sys, time
from pathlib import Path
from deploy.kafka.broker import Cluster
Cluster(Path(sys.argv[1]), quick=True).start()
print("up", flush=True)
time.sleep(600)
"""
    folder = tmp_path / "kafka"
    with python(code, folder) as parent:
        try:
            assert parent.stdout.readline() == "up\n", parent.stderr.read()
            cluster = Cluster.at(folder)
            assert cluster.running
        finally:
            parent.kill()
    eventually(lambda: not cluster.running and not processes(folder), "the end of a broker without a parent")


def test_two_processes_may_start_the_same_broker_at_once(tmp_path):
    code = """
import sys
from pathlib import Path
from deploy.kafka.broker import Cluster
cluster = Cluster(Path(sys.argv[1]), quick=True, daemon=True)
cluster.start()
print(cluster.cluster_id, cluster.url, cluster.pid(0))
"""
    folder = tmp_path / "kafka"
    try:
        starting = [python(code, folder) for _ in range(2)]
        said = [one.communicate() for one in starting]
        assert [one.returncode for one in starting] == [0, 0], said
        assert said[0][0] == said[1][0]
    finally:
        Cluster.at(folder).stop()


def test_two_processes_fetch_the_jars_once(tmp_path):
    # Given a Maven that takes its time and counts how often it was asked
    asked = tmp_path / "asked"
    path = tools(
        tmp_path / "bin",
        mvn=f"""
        echo x >> {asked}
        for word; do case $word in -DoutputDirectory=*) to=${{word#*=}};; esac; done
        /bin/sleep 0.3; /bin/cp -r {jars()} $to""",
    )
    code = "from deploy.kafka.broker import jars; print(jars())"
    fetching = [python(code, PATH=path, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    said = [one.communicate() for one in fetching]
    assert [one.returncode for one in fetching] == [0, 0], said
    found = Path(said[0][0].strip())
    assert said[0] == said[1]
    assert {jar.name for jar in found.iterdir()} == {jar.name for jar in jars().iterdir()}
    assert asked.read_text() == "x\n"


def test_what_runs_is_what_is_pinned():
    pinned = module.pinned_version()
    assert [jar.name for jar in jars().glob("kafka_*.jar")] == [f"kafka_2.13-{pinned}.jar"]
    assert {jar.stem.rpartition("-")[2] for jar in jars().glob("kafka-*.jar")} == {pinned}


def test_a_port_that_somebody_took_meanwhile_is_no_failure_of_a_new_broker(tmp_path, monkeypatch):
    # Given somebody who is quicker to bind the port chosen first
    free = module._free_ports
    with socket.create_server((LOOPBACK, 0)) as taken:
        found = [[Ports(taken.getsockname()[1], *free(1)[0][1:])], free(1)]
        monkeypatch.setattr(module, "_free_ports", lambda _: found.pop(0))
        with Cluster(tmp_path / "kafka", quick=True) as cluster:
            assert cluster.ports[0].client != taken.getsockname()[1]
            assert gets_in(cluster.client())
        # but one that has clients comes back where they look for it, or says why it cannot
        with socket.create_server((LOOPBACK, cluster.ports[0].client)), pytest.raises(BrokerError, match="is taken"):
            cluster.start()
    assert processes(tmp_path) == []


# --- what is missing, in one line -------------------------------------------------------------------------------

OLD_JAVA = "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2"


@pytest.mark.parametrize(
    ("scripts", "said"),
    [
        ({"mvn": ""}, "java 17 or newer is needed; install a Java runtime"),
        ({"mvn": "", "java": OLD_JAVA}, "java 17 or newer is needed; install a Java runtime"),
        ({"java": ""}, "mvn is needed, once, to fetch the broker; install Maven"),
        ({"java": "", "mvn": "echo no network; exit 1"}, "Maven could not fetch the broker; see "),
    ],
    ids=["no java", "old java", "no maven", "no network"],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, scripts, said):
    path = tools(tmp_path / "bin", **scripts)
    done = command("start", "--folder", tmp_path / "kafka", PATH=path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"broker: {said}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "kafka").exists()


def test_maven_says_in_its_log_why_it_failed(tmp_path):
    path = tools(tmp_path / "bin", java="", mvn="echo no network; exit 1")
    done = command("start", "--folder", tmp_path / "kafka", PATH=path, XDG_CACHE_HOME=str(tmp_path))
    assert "no network" in Path(done.stderr.strip().rpartition("see ")[2]).read_text()


def test_without_maven_a_broker_that_was_fetched_before_is_found(tmp_path):
    done = command("stop", "--folder", tmp_path, PATH=tools(tmp_path / "bin"))
    assert done.stderr == f"broker: there is no broker in {tmp_path}\n"
    code = "from deploy.kafka.broker import jars; print(jars())"
    with python(code, PATH=str(tmp_path / "bin")) as finding:
        assert finding.stdout.read() == f"{jars()}\n"


def test_a_broker_that_does_not_come_up_names_its_log_and_leaves_nothing(tmp_path):
    folder = tmp_path / "kafka"
    with pytest.raises(BrokerError) as raised:
        Cluster(folder, settings={"listeners": "CLIENT://nowhere"}).start()
    told = Path(str(raised.value).rpartition("see ")[2])
    assert "listeners" in told.read_text()
    assert processes(folder) == []


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BrokerError, match="holds something else"):
        Cluster(tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_cluster_of_another_kind_is_not_taken_for_this_one(broker):
    for other in ({"secured": False}, {"nodes": 3}):
        with pytest.raises(BrokerError, match="remove it, or name another folder"):
            Cluster(broker.folder, **other)


# --- secured ----------------------------------------------------------------------------------------------------


def test_only_the_right_password_over_tls_gets_in(broker):
    right = broker.client()
    assert gets_in(right)
    assert not answers(right | {"sasl.password": "wrong"})
    assert not answers(right | {"sasl.username": "nobody"})
    assert not answers(right | {"security.protocol": "SASL_PLAINTEXT"})
    assert not answers({"bootstrap.servers": broker.servers})


def test_a_client_that_trusts_another_authority_does_not_talk_to_it(broker, tmp_path):
    assert not answers(broker.client() | {"ssl.ca.location": str(Authority(tmp_path).path)})


def test_controllers_listen_to_nobody_but_nodes(broker, tmp_path):
    def talk(certificate: Path | None) -> bytes:
        context = ssl.create_default_context(cafile=broker.ca_path)
        if certificate:
            context.load_cert_chain(certificate)
        with (
            socket.create_connection((LOOPBACK, broker.ports[0].controller)) as plain,
            context.wrap_socket(plain, server_hostname=LOOPBACK) as secured,
        ):
            secured.settimeout(PATIENCE_S)
            secured.sendall(bytes.fromhex("0000000a 0012 0000 00000007 ffff"))  # ApiVersions, request 7
            return secured.recv(8)[4:]

    forged = tmp_path / "forged.pem"
    forged.write_bytes(Authority(tmp_path).issue(NODE_CN))
    assert talk(broker.folder / "node-0" / "node.pem") == bytes.fromhex("00000007")
    for certificate in (None, forged):
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            talk(certificate)


def test_it_listens_on_loopback_only(broker):
    for port in (broker.ports[0].client, broker.ports[0].controller):
        socket.create_connection((LOOPBACK, port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))


def test_passwords_and_keys_are_their_owners_alone(broker):
    password = broker.admin[1].read_bytes()
    private = password, b"PRIVATE KEY"
    assert stat.S_IMODE(broker.folder.stat().st_mode) == 0o700
    assert not [line for line in processes(broker.folder) if password.decode() in line]
    holders = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in broker.folder.rglob("*")
        if path.is_file() and any(secret in path.read_bytes() for secret in private)
    }
    assert holders == dict.fromkeys(("admin-password", "ca-key.pem", "node.pem", "server.properties"), 0o600)


# --- the demo -----------------------------------------------------------------------------------------------------


def test_the_demo_on_kafka_comes_to_the_same_as_on_sqlite_and_leaves_things_as_they_were(tmp_path):
    folder = tmp_path / "kafka"
    asked = ("demo", "--folder", folder, "--records", 600, "--seed", 3)
    try:
        # when no broker runs, it is started and stopped
        done = command(*asked)
        assert done.returncode == 0, done.stderr
        cluster = Cluster.at(folder)
        assert f"Apache Kafka {cluster.version}, cluster {cluster.cluster_id}" in done.stdout
        assert "adds up: yes" in done.stdout
        assert "the same as on SQLite: all" in done.stderr
        assert processes(folder) == []

        # when one runs, it stays, and what the demo before has left is replaced
        assert command("start", "--folder", folder).returncode == 0
        left = {name.partition(".")[0] for name in topics(cluster) if name.startswith("demo-")}
        assert command(*asked).returncode == 0
        assert cluster.running
        found = {name.partition(".")[0] for name in topics(cluster) if name.startswith("demo-")}
        assert (len(left), len(found), left & found) == (1, 1, set())
    finally:
        Cluster.at(folder).stop()


def test_a_count_that_differs_from_sqlites_fails_the_demo_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    on_sqlite = streams.cli.demo._on_sqlite

    def one_less_refused(*asked):
        summary = on_sqlite(*asked)
        less = [msgspec.structs.replace(summary.refused[0], count=summary.refused[0].count - 1), *summary.refused[1:]]
        return msgspec.structs.replace(summary, refused=less)

    monkeypatch.setattr(streams.cli.demo, "_on_sqlite", one_less_refused)
    assert main(["demo", "--records", "300", "--compare"]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("streamveil: ")]
    assert len(told) == 1
    assert re.fullmatch(
        r"streamveil: 1 of \d+ counts differ from SQLite's: refused \S+: \d+ on SQLite, \d+ here", told[0]
    )


# --- several nodes ----------------------------------------------------------------------------------------------


def test_nodes_of_a_cluster_are_killed_suspended_and_come_back_one_by_one(tmp_path):
    with Cluster(tmp_path / "kafka", nodes=3, proxied=True, quick=True) as cluster:
        make_topic(cluster, "copied")
        eventually(lambda: len(topics(cluster)["copied"].partitions[0].isrs) == 3, "three copies in sync")

        # behind a proxy, clients are told the proxy's addresses
        behind = cluster.client() | {"bootstrap.servers": f"{LOOPBACK}:{cluster.ports[0].behind_proxy}"}
        told = AdminClient(behind).list_topics(timeout=PATIENCE_S).brokers.values()
        assert {one.port for one in told} == {ports.proxy for ports in cluster.ports}

        cluster.kill(0)
        assert (cluster.pid(0), answers(cluster.client(0))) == (None, False)
        assert gets_in(cluster.client())
        cluster.start_node(0)
        assert gets_in(cluster.client(0))

        pid = cluster.pid(1)
        cluster.suspend(1)
        assert (cluster.pid(1), answers(cluster.client(1))) == (pid, False)
        cluster.resume(1)
        assert gets_in(cluster.client(1))

        cluster.stop_node(2)
        assert cluster.pid(2) is None
        cluster.suspend(1)
    # one that was killed, one suspended, one stopped: nothing is left
    assert processes(tmp_path) == []
