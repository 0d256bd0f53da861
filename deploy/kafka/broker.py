"""An Apache Kafka on this machine, for development, tests and benchmarks: one node or several, loopback only.

    python deploy/kafka/broker.py start|stop|status [--folder F] [--plaintext] [--nodes N]
    python deploy/kafka/broker.py demo [--folder F] [--records N] [--seed S]

Rules of this file:
- What runs is what `pom.xml` pins, copied once by Maven into a cache folder. Java 17 or newer and `mvn` are needed.
- A cluster lives in one folder (0700) with everything that belongs to it: data, logs, certificates, password.
- Secured, clients come in with TLS and SCRAM-SHA-512, and so do the nodes among themselves; controllers take the
  nodes' certificates only. Both are issued by an authority that the cluster makes for itself. Nobody but the super
  user may do anything until an ACL says so. Plaintext is for benchmarks.
- A node holds a lock on its file `running` as long as it lives, and its process id stands in there. So whether it
  runs never depends on a process id alone, nor on who asks.
- Nodes of a `Cluster` are killed by the kernel when the process that started them is gone, unless it is a daemon.
"""

import argparse
import base64
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple, Self
from xml.etree import ElementTree as ET

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HERE: Final = Path(__file__).resolve().parent
FOLDER: Final = Path("streamveil-kafka")
ADMIN: Final = "admin"
LOOPBACK: Final = "127.0.0.1"
NODE_CN: Final = "streamveil-node"
JAVA_VERSION: Final = 17
HEAP: Final = ("-Xms128m", "-Xmx512m", "-XX:+UseSerialGC")
QUICK: Final = ("-XX:TieredStopAtLevel=1",)
"""Compile once, soon and not much: 3 s of CPU instead of 5 until a node is up."""
START_S: Final = 120.0
STOP_S: Final = 15.0

_MARK = "cluster.json"
_JAVA_MISSING = f"java {JAVA_VERSION} or newer is needed; install a Java runtime (Debian: openjdk-17-jre-headless)"
_MAVEN_MISSING = "mvn is needed, once, to fetch the broker; install Maven (Debian: maven)"
_ATTEMPTS = 5
_NO_SETTINGS: Mapping[str, str] = MappingProxyType({})

_LAUNCH = """\
import ctypes, fcntl, os, sys, time
held, parent, *command = sys.argv[1:]
os.umask(0o077)
file = os.open(held, os.O_RDWR | os.O_CREAT, 0o600)
for attempt in range(100):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        time.sleep(0.02)
else:
    sys.exit("it runs already")
os.truncate(file, 0)
os.write(file, b"%d\\n" % os.getpid())
os.set_inheritable(file, True)
if parent != "0" and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(parent):
        sys.exit("its parent is gone")
os.execv(command[0], command)
"""
"""Become a node: take the lock on the file `running`, die with the parent unless that is 0, and turn into Java."""

_launcher = ThreadPoolExecutor(1, "broker")
"""The kernel's "parent" is a thread, so nodes are started by one that lives as long as the process."""


class BrokerError(Exception):
    """The cluster cannot be what was asked for; one line that says what to do."""


class _PortTakenError(Exception):
    """Somebody else was quicker to bind one of the ports."""


class Ports(NamedTuple):
    """Where a node listens, on loopback; at `behind_proxy` if the cluster is proxied, at `proxy` never."""

    client: int
    controller: int
    behind_proxy: int
    proxy: int


# --- the broker's jars ---------------------------------------------------------------------------------------


def pinned_version() -> str:
    """Return the version of Apache Kafka that `pom.xml` pins."""
    version = ET.parse(HERE / "pom.xml").findtext("properties/kafka.version")  # noqa: S314 — a file of ours
    if not version:
        raise BrokerError(f"{HERE / 'pom.xml'} names no kafka.version")
    return version


def jars() -> Path:
    """Return the folder with the jars that `pom.xml` pins. Fetches them the first time: blocks for seconds or minutes.

    Raises BrokerError if Maven is missing or fails.
    """
    pom = HERE / "pom.xml"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamveil"
    folder = root / f"kafka-{pinned_version()}-{hashlib.sha256(pom.read_bytes()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    maven = shutil.which("mvn")
    if maven is None:
        raise BrokerError(_MAVEN_MISSING)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / "kafka.lock"):
        if folder.is_dir():
            return folder
        draft, log = root / f".{folder.name}", root / "maven.log"
        shutil.rmtree(draft, ignore_errors=True)
        command = [maven, "-B", "-f", str(pom), "dependency:copy-dependencies"]
        with log.open("wb") as output:
            done = subprocess.run(  # noqa: S603 — Maven, as found on the path
                [*command, "-DincludeScope=runtime", f"-DoutputDirectory={draft}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=root,
                check=False,
            )
        if done.returncode != 0 or not draft.is_dir():
            raise BrokerError(f"Maven could not fetch the broker; see {log}")
        draft.rename(folder)
    return folder


def _java() -> str:
    """Return the path of a Java that is new enough. Raises BrokerError."""
    java = shutil.which("java")
    if java is None:
        raise BrokerError(_JAVA_MISSING)
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)  # noqa: S603 — as above
    found = re.search(r'version "(\d+)', said.stderr)
    if found is None or int(found[1]) < JAVA_VERSION:
        raise BrokerError(f"{_JAVA_MISSING}; {java} is {f'version {found[1]}' if found else 'none'}")
    return java


# --- certificates --------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that is known to its own cluster only; its key lies beside its certificate (0600)."""

    def __init__(self, folder: Path) -> None:
        """Read the authority of a folder, or make one."""
        self.path = folder / "ca.pem"
        key_path = folder / "ca-key.pem"
        if not self.path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "streamveil throw-away authority")])
            now = datetime.now(UTC)
            signed = (
                _builder(name, name, key.public_key(), key.public_key(), now, now + timedelta(days=3650))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(signs_certificates=True), critical=True)
                .sign(key, hashes.SHA256())
            )
            _write(key_path, _pem(key))
            _write(self.path, signed.public_bytes(serialization.Encoding.PEM))
        self._key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        self._certificate = x509.load_pem_x509_certificate(self.path.read_bytes())

    def issue(self, common_name: str, *, ends: datetime | None = None) -> bytes:
        """Return PEM of a new key and its certificate for loopback; valid for 90 days, or up to `ends`."""
        ends = ends or datetime.now(UTC) + timedelta(days=90)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        places = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(LOOPBACK))]
        ours = self._certificate
        begins = min(datetime.now(UTC), ends - timedelta(days=1))
        signed = (
            _builder(name, ours.subject, key.public_key(), ours.public_key(), begins, ends)  # type: ignore[arg-type]
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(places), critical=False)
            .sign(self._key, hashes.SHA256())  # type: ignore[arg-type]
        )
        return _pem(key) + signed.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    begins: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - timedelta(hours=1))
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# --- the cluster ---------------------------------------------------------------------------------------------


class Cluster:
    """Nodes of Apache Kafka in KRaft mode, each broker and controller at once, in one folder.

    `settings` are further broker properties, the same for every node. With `proxied`, a client that comes in at
    `behind_proxy` of a node is told to come back to `proxy`, where the caller listens and passes on. A `quick` one is
    up in two thirds of the time and then slower at its work: for tests, not for benchmarks. A daemon outlives the
    process that starts it. As a context it is started and stopped.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 1,
        secured: bool = True,
        settings: Mapping[str, str] = _NO_SETTINGS,
        proxied: bool = False,
        quick: bool = False,
        daemon: bool = False,
    ) -> None:
        """Describe a cluster, and start nothing. Raises BrokerError if the folder holds a different one."""
        self.folder = folder.absolute()
        self.nodes = nodes
        self.secured = secured
        self.cluster_id = ""
        self.ports: list[Ports] = []
        self._settings = dict(settings)
        self._proxied = proxied
        self._quick = quick
        self._daemon = daemon
        self._started: list[subprocess.Popen[bytes]] = []
        self._logged: dict[int, int] = {}  # bytes of a node's log from before it was started
        self._read()

    @classmethod
    def at(cls, folder: Path, *, daemon: bool = False) -> Self:
        """Return the cluster of a folder, running or not. Raises BrokerError if there is none."""
        try:
            kept = json.loads((folder / _MARK).read_bytes())
            return cls(folder, nodes=len(kept["ports"]), secured=kept["secured"], daemon=daemon)
        except (OSError, ValueError, KeyError):
            raise BrokerError(f"there is no broker in {folder}") from None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- what it is

    @property
    def servers(self) -> str:
        """HOST:PORT of every node, comma-separated."""
        return ",".join(f"{LOOPBACK}:{one.client}" for one in self.ports)

    @property
    def url(self) -> str:
        """What `--log` takes."""
        return f"kafka://{self.servers}"

    @property
    def version(self) -> str:
        """The version of Apache Kafka that runs, by the name of its jar."""
        return next(jars().glob("kafka_2.13-*.jar")).stem.removeprefix("kafka_2.13-")

    @property
    def ca_path(self) -> Path:
        """PEM of the authority that issued the nodes' certificates."""
        return self.folder / "ca.pem"

    @property
    def admin(self) -> tuple[str, Path]:
        """The super user's name, and the file with the password (0600)."""
        return ADMIN, self.folder / "admin-password"

    def config_toml(self, username: str | None = None, password_file: Path | None = None) -> str:
        """Return the lines `log = …` and `[kafka] …` of a streamveil.toml, for the super user or whom is named."""
        name, password = self.admin
        lines = [f'log = "{self.url}"', "", "[kafka]"]
        if self.secured:
            lines += [
                f'username = "{username or name}"',
                f'password_file = "{password_file or password}"',
                f'ca_file = "{self.ca_path}"',
            ]
        else:
            lines += ["plaintext = true"]
        lines += [f"replication = {min(3, self.nodes)}", f"min_insync = {self._min_insync}"]
        return "".join(f"{line}\n" for line in lines)

    def client(self, node: int | None = None) -> dict[str, str | int | float | bool]:
        """Return the properties with which librdkafka gets in as the super user; of one node, or of all."""
        properties: dict[str, str | int | float | bool] = {
            "bootstrap.servers": self.servers if node is None else f"{LOOPBACK}:{self.ports[node].client}",
            "log_level": 0,
        }
        if self.secured:
            name, password = self.admin
            properties |= {
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": name,
                "sasl.password": password.read_text(encoding="ascii"),
                "ssl.ca.location": str(self.ca_path),
            }
        return properties

    def log_path(self, node: int) -> Path:
        """Return the log of a node."""
        return self._node(node) / "broker.log"

    def pid(self, node: int) -> int | None:
        """Return the process id of a node, None if it does not run. A node that is suspended does run."""
        return _holder(self._node(node) / "running")

    @property
    def running(self) -> bool:
        """Whether every node runs."""
        return bool(self.ports) and all(self.pid(node) for node in range(self.nodes))

    # --- all nodes

    def start(self) -> None:
        """Start what does not run, and return once all nodes answer. Blocks for seconds. Raises BrokerError."""
        java, libraries = _java(), jars()
        self._make_folder()
        with _locked(self.folder / "lock"):
            self._read()
            for _ in range(_ATTEMPTS):
                fresh = not (self.folder / _MARK).exists()
                if fresh:
                    self._make(java, libraries)
                try:
                    for node in range(self.nodes):
                        self._launch(node, java, libraries)
                    for node in range(self.nodes):
                        self._await(node, self.nodes)
                except _PortTakenError as taken:
                    self._end_started()
                    if not fresh:
                        raise BrokerError(f"{taken}; stop what holds it, or remove {self.folder}") from None
                    (self.folder / _MARK).unlink()
                except BaseException:
                    self._end_started()
                    raise
                else:
                    return
            raise BrokerError("no free ports were found on loopback; stop other programs")

    def stop(self) -> None:
        """Stop every node, suspended ones too, and return once none is left; the data stays. Never raises for state."""
        if (self.folder / "lock").exists():
            with _locked(self.folder / "lock"):
                self._stop(range(self.nodes))
        self._end_started()

    # --- one node, from 0

    def start_node(self, node: int, *, wait: bool = True) -> None:
        """Start a node that does not run, and return once it is one of the cluster's. Raises BrokerError."""
        java, libraries = _java(), jars()
        try:
            self._launch(node, java, libraries)
            if wait:
                self._await(node, 1)
        except _PortTakenError as taken:
            raise BrokerError(str(taken)) from None

    def stop_node(self, node: int) -> None:
        """Have a node end in good order, and return once it has. Blocks for seconds."""
        self._stop([node])

    def kill(self, node: int) -> None:
        """End a node with SIGKILL, and return once it is gone."""
        self._stop([node], at_once=True)

    def suspend(self, node: int) -> None:
        """Keep a node from running on (SIGSTOP); its connections stay open."""
        self._signal(node, signal.SIGSTOP)

    def resume(self, node: int) -> None:
        """Let a suspended node run on."""
        self._signal(node, signal.SIGCONT)

    # --- inside

    @property
    def _min_insync(self) -> int:
        return 2 if self.nodes > 2 else 1

    def _node(self, node: int) -> Path:
        return self.folder / f"node-{node}"

    def _read(self) -> None:
        try:
            kept = json.loads((self.folder / _MARK).read_bytes())
        except FileNotFoundError:
            return
        if (len(kept["ports"]), kept["secured"]) != (self.nodes, self.secured):
            what = f"{len(kept['ports'])} node(s), {'secured' if kept['secured'] else 'plaintext'}"
            raise BrokerError(f"{self.folder} holds a cluster of {what}; remove it, or name another folder")
        self.cluster_id = kept["cluster_id"]
        self.ports = [Ports(*one) for one in kept["ports"]]

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.folder.iterdir()) and not (self.folder / "lock").exists():
                raise BrokerError(f"{self.folder} holds something else; name another folder")
            self.folder.chmod(0o700)
        except OSError as error:
            raise BrokerError(f"{self.folder} cannot be made: {error.strerror}") from None

    def _make(self, java: str, libraries: Path) -> None:
        """Format the storage of a new cluster on ports that are free just now."""
        self.cluster_id = _new_id()
        self.ports = _free_ports(self.nodes)
        if self.secured:
            _write(self.admin[1], secrets.token_urlsafe(32).encode())
            Authority(self.folder)
        formatting = [self._format(node, java, libraries) for node in range(self.nodes)]
        statuses = [one.wait() for one in formatting]
        if any(statuses):
            raise BrokerError(f"the broker's storage cannot be formatted; see {self._node(0) / 'format.log'}")
        for node in range(self.nodes):
            for name in ("format", "format.log"):  # they hold the password, and what it is checked against
                (self._node(node) / name).unlink()
        kept = {"cluster_id": self.cluster_id, "secured": self.secured, "ports": self.ports}
        _write(self.folder / _MARK, json.dumps(kept).encode())

    def _format(self, node: int, java: str, libraries: Path) -> subprocess.Popen[bytes]:
        folder = self._node(node)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)
        self._write_properties(node)
        words = ["format", "--cluster-id", self.cluster_id, "--config", str(folder / "server.properties")]
        if self.secured:
            password = self.admin[1].read_text(encoding="ascii")
            words += ["--add-scram", f"SCRAM-SHA-512=[name={ADMIN},password={password}]"]
        arguments = folder / "format"
        _write(arguments, "\n".join(words).encode())  # a file, for the password must not stand in the process table
        options = [*HEAP, *QUICK, "-XX:-UsePerfData", f"-Djava.io.tmpdir={folder / 'tmp'}"]
        command = [java, *options, "-cp", f"{libraries}/*", "kafka.tools.StorageTool", f"@{arguments}"]
        with (folder / "format.log").open("wb") as said:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)  # noqa: S603

    def _write_properties(self, node: int) -> None:
        voters = ",".join(f"{at}@{LOOPBACK}:{ports.controller}" for at, ports in enumerate(self.ports))
        ports, folder = self.ports[node], self._node(node)
        client, controller = ("SASL_SSL", "SSL") if self.secured else ("PLAINTEXT", "PLAINTEXT")
        doors, told = {"CLIENT": ports.client}, {"CLIENT": ports.client}
        if self._proxied:
            doors["PROXIED"], told["PROXIED"] = ports.behind_proxy, ports.proxy
        copies, in_sync = str(min(3, self.nodes)), str(self._min_insync)
        properties = {
            "process.roles": "broker,controller",
            "node.id": str(node),
            "controller.quorum.voters": voters,
            "listeners": _listeners(doors | {"CONTROLLER": ports.controller}),
            "advertised.listeners": _listeners(told),
            "listener.security.protocol.map": ",".join(
                [f"CONTROLLER:{controller}", *(f"{door}:{client}" for door in doors)]
            ),
            "inter.broker.listener.name": "CLIENT",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(folder / "data"),
            "auto.create.topics.enable": "false",
            "unclean.leader.election.enable": "false",
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": copies,
            "offsets.topic.num.partitions": "8",
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": "8",
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": in_sync,
            "group.initial.rebalance.delay.ms": "0",
            "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),  # of 512 MB of heap, for it is taken at once
        }
        if self.secured:
            certificate = folder / "node.pem"
            _write(certificate, Authority(self.folder).issue(NODE_CN))
            password = self.admin[1].read_text(encoding="ascii")
            module = "org.apache.kafka.common.security.scram.ScramLoginModule"
            login = f'{module} required username="{ADMIN}" password="{password}";'  # as which the nodes meet
            properties |= {
                "sasl.enabled.mechanisms": "SCRAM-SHA-512",
                "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
                **{f"listener.name.{door.lower()}.scram-sha-512.sasl.jaas.config": login for door in doors},
                "listener.name.controller.ssl.client.auth": "required",
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(certificate),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self.ca_path),
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "allow.everyone.if.no.acl.found": "false",
                "super.users": f"User:{ADMIN};User:CN={NODE_CN}",
            }
        lines = (f"{name}={value}" for name, value in (properties | self._settings).items())
        _write(folder / "server.properties", "".join(f"{line}\n" for line in lines).encode())

    def _launch(self, node: int, java: str, libraries: Path) -> None:
        """Start a node if it does not run; it has its lock on return, or has ended."""
        if self.pid(node):
            return
        folder, log = self._node(node), self.log_path(node)
        self._logged[node] = log.stat().st_size if log.exists() else 0
        self._write_properties(node)
        shutil.rmtree(folder / "tmp", ignore_errors=True)  # native libraries that a killed node has left
        (folder / "tmp").mkdir()
        options = [
            *HEAP,
            *(QUICK if self._quick else ()),
            "-XX:+ExitOnOutOfMemoryError",
            "-XX:-UsePerfData",
            f"-Djava.io.tmpdir={folder / 'tmp'}",
            f"-Dbroker.log={log}",
            f"-Dlog4j2.configurationFile={HERE / 'log4j2.properties'}",
        ]
        broker = [java, *options, "-cp", f"{libraries}/*", "kafka.Kafka", str(folder / "server.properties")]
        parent = 0 if self._daemon else os.getpid()
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(folder / "running"), str(parent)]
        with (folder / "console.log").open("ab") as console:
            process = _launcher.submit(
                subprocess.Popen,
                [*launch, *broker],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            ).result()
        self._started.append(process)
        while process.poll() is None and self.pid(node) is None:
            time.sleep(0.005)

    def _await(self, node: int, together: int) -> None:
        """Return once a node answers as one of at least so many."""
        until = time.monotonic() + START_S
        admin = AdminClient(self.client(node) | {"reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 100})
        log = self.log_path(node)
        while time.monotonic() < until:
            if self.pid(node) is None:
                said = log.read_bytes()[self._logged.get(node, 0) :] if log.exists() else b""
                if b"Address already in use" in said:
                    raise _PortTakenError(f"a port of {', '.join(map(str, self.ports[node]))} is taken")
                raise BrokerError(f"the broker has ended; see {log if said else log.with_name('console.log')}")
            with contextlib.suppress(KafkaException):
                answer = admin.describe_cluster(request_timeout=0.5).result()
                known = {one.id for one in answer.nodes}
                if answer.cluster_id == self.cluster_id and node in known and len(known) >= together:
                    return
        raise BrokerError(f"the broker does not answer after {START_S:.0f} s; see {log}")

    def _stop(self, nodes: Iterator[int] | list[int] | range, *, at_once: bool = False) -> None:
        left = [node for node in nodes if self.pid(node)]
        for node in left:
            self._signal(node, signal.SIGKILL if at_once else signal.SIGTERM)
            self._signal(node, signal.SIGCONT)
        until = time.monotonic() + STOP_S
        while left := [node for node in left if self.pid(node)]:
            if time.monotonic() > until:
                for node in left:
                    self._signal(node, signal.SIGKILL)
            time.sleep(0.01)
        self._started = [process for process in self._started if process.poll() is None]

    def _end_started(self) -> None:
        """End what this object started and is still there, also if its folder is gone."""
        for process in self._started:
            process.kill()
            process.wait()
        self._started.clear()

    def _signal(self, node: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if pid := self.pid(node):
                os.kill(pid, number)


def _listeners(ports: Mapping[str, int]) -> str:
    return ",".join(f"{name}://{LOOPBACK}:{port}" for name, port in ports.items())


def _new_id() -> str:
    """Return a random cluster id: 16 bytes in URL-safe base64, and nothing that looks like an option."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")


def _free_ports(nodes: int) -> list[Ports]:
    """Return ports that nobody has bound just now, none of which an outgoing connection is ever given."""
    try:
        below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except OSError:
        below = 32_768
    found: list[int] = []
    for port in random.SystemRandom().sample(range(max(1024, below // 2), below), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            found.append(port)
        if len(found) == nodes * len(Ports._fields):
            return [Ports(*found[at::nodes]) for at in range(nodes)]
    raise BrokerError("no free ports were found on loopback; stop other programs")


def _holder(path: Path) -> int | None:
    """Return the process id in a file on which its process holds the lock; None if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if text := os.pread(descriptor, 20, 0).strip():
                    return int(text)
            else:
                return None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; blocks until whoever holds it lets go or ends."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    """Write a file whole, for the owner's eyes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


# --- the command line ----------------------------------------------------------------------------------------


def main() -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(description="An Apache Kafka on this machine, on loopback.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, what in (
        ("start", _start, "start it, and say how to connect"),
        ("stop", _stop, "stop it; its data stays"),
        ("status", _status, "say where it is; exit 1 if it does not run"),
        ("demo", _demo, "run the demo on it, and compare with SQLite; start it if need be, and stop what was started"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--folder", type=Path, default=FOLDER, help=f"where it lives (./{FOLDER})")
        command.set_defaults(run=run)
        if name == "start":
            command.add_argument("--nodes", type=int, default=1, choices=range(1, 10), metavar="N", help="how many (1)")
            command.add_argument("--plaintext", action="store_true", help="no TLS, users or ACLs: for benchmarks only")
        if name == "demo":
            command.add_argument("--records", help="as of `streamveil demo`")
            command.add_argument("--seed", help="as of `streamveil demo`")
    args = parser.parse_args()
    try:
        return int(args.run(args))
    except BrokerError as error:
        print(f"broker: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _start(args: argparse.Namespace) -> int:
    cluster = Cluster(args.folder, nodes=args.nodes, secured=not args.plaintext, daemon=True)
    cluster.start()
    config = args.folder / "streamveil.toml"
    if not config.exists():
        _write(config, f"# Written by deploy/kafka/broker.py, for the super user.\n{cluster.config_toml()}".encode())
    credentials = f" --credentials {args.folder / 'credentials'}" if cluster.secured else ""
    script = f"python {os.path.relpath(__file__)} stop --folder {args.folder}"
    stop = "make kafka-stop" if args.folder == FOLDER else script
    print(f"""{_about(cluster)}

next:
  export PATH="{Path(sys.executable).parent}:$PATH"
  streamveil streams apply{credentials} --config {config}
  streamveil publish FILE --config {config}
  streamveil run --config {config}
stop it:
  {stop}""")
    return 0


def _stop(args: argparse.Namespace) -> int:
    cluster = Cluster.at(args.folder)
    cluster.stop()
    print(f"stopped; its data stays in {args.folder}; to remove it: rm -r {args.folder}")
    return 0


def _status(args: argparse.Namespace) -> int:
    cluster = Cluster.at(args.folder)
    print(_about(cluster))
    return 0 if cluster.running else 1


def _demo(args: argparse.Namespace) -> int:
    cluster = Cluster.at(args.folder) if (args.folder / _MARK).exists() else Cluster(args.folder)
    running = cluster.running
    try:
        cluster.start()
        print(_about(cluster), flush=True)
        config = _demo_config(cluster, args.folder / "demo")
        options = [f"--{name}={value}" for name in ("records", "seed") if (value := getattr(args, name))]
        streamveil = Path(sys.executable).with_name("streamveil")
        command = [str(streamveil), "demo", "--compare", "--config", str(config), *options]
        status = subprocess.run(command, check=False).returncode  # noqa: S603 — the program of this checkout
    finally:
        if not running:
            cluster.stop()
    if not running:
        print("\nthe broker was started for this and is stopped; `make kafka` brings it back, with what is in it")
    return status


def _demo_config(cluster: Cluster, folder: Path) -> Path:
    """Return the configuration of a new, empty deployment; that of the demo before, and its topics, are removed."""
    config = folder / "streamveil.toml"
    if config.exists():
        _remove(cluster, tomllib.loads(config.read_text(encoding="utf-8"))["kafka"]["prefix"])
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    prefix = f"demo-{secrets.token_hex(4)}."
    _write(config, f'{cluster.config_toml()}prefix = "{prefix}"\n'.encode())
    return config


def _remove(cluster: Cluster, prefix: str) -> None:
    """Delete the topics under a prefix."""
    admin = AdminClient(cluster.client())
    topics = [name for name in admin.list_topics(timeout=30).topics if name.startswith(prefix)]
    for gone in admin.delete_topics(topics).values() if topics else ():
        gone.result()


def _about(cluster: Cluster) -> str:
    """Return what runs, where, and how to get in."""
    lines = [f"Apache Kafka {cluster.version}, cluster {cluster.cluster_id}, in {cluster.folder}"]
    for node, ports in enumerate(cluster.ports):
        pid = cluster.pid(node)
        lines.append(f"  node {node}: {LOOPBACK}:{ports.client}, {f'process {pid}' if pid else 'does not run'}")
    lines.append(f"  log = {cluster.url}")
    if cluster.secured:
        name, password = cluster.admin
        lines.append(f"  TLS and SCRAM-SHA-512; super user {name}, password in {password}, authority {cluster.ca_path}")
    else:
        lines.append("  plaintext: everybody on this machine may read and write everything")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
