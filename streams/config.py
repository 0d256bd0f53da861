"""The configuration of a deployment: one TOML file, command-line overrides, and where things lie on disk."""

import re
import tomllib
from argparse import Namespace
from importlib import resources
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from schemas.errors import InputInvalid
from schemas.policy import Policy, parse_policy
from streams.files import read_text

DEFAULT_LOG = "sqlite:///streamveil-data/log.db"
SQLITE = "sqlite:///"
KAFKA = "kafka://"
DATA = "streamveil-data"
SQLITE_LEASE_S, KAFKA_LEASE_S = 5.0, 10.0  # brokers refuse less than six seconds by default
_URL = re.compile(r"https://[A-Za-z0-9._\[\]:-]+/?|http://(127\.0\.0\.1|\[::1\]|localhost)(:[0-9]{1,5})?/?")
_SERVER = re.compile(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}")

_Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
_Lease = Annotated[float, msgspec.Meta(gt=0, le=3600)]
_Mount = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9/_-]{0,100}$")]
_Prefix = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9][a-z0-9._-]*[.-])?$", max_length=100)]


class _KafkaTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of the table `[kafka]`."""

    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    plaintext: bool = False
    prefix: _Prefix = ""
    replication: Annotated[int, msgspec.Meta(ge=1, le=15)] = 3
    min_insync: Annotated[int, msgspec.Meta(ge=1, le=15)] = 2
    commit_every_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 50
    transaction_timeout_ms: Annotated[int, msgspec.Meta(ge=1000, le=60_000)] = 10_000


class _PostgresTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of the table `[postgres]`: the key store on a server."""

    host: str  # a name, an address, or the folder of a Unix socket
    database: str
    username: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 5432
    password_file: str | None = None
    ca_file: str | None = None
    plaintext: bool = False
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5.0


class _VaultTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of the table `[vault]`: the key management service of a Vault or OpenBao."""

    address: str  # https://HOST:PORT
    mount: _Mount = "transit"
    counter_mount: _Mount = "secret"  # key-value engine, version 2: the destruction counter
    prefix: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{0,40}$")] = "streamveil-"
    namespace: str | None = None
    token_file: str | None = None
    role_id: str | None = None
    secret_id_file: str | None = None
    ca_file: str | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 2.0


class _RetentionTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of the table `[retention]`."""

    scheduled: bool = True
    rewrap_hours: Annotated[int, msgspec.Meta(ge=1, le=24 * 7)] = 24


class _WatchTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of the table `[watch]`."""

    listen: str | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of `streamveil.toml`; paths are relative to the file's folder."""

    log: str | None = None
    data: str | None = None
    policy: str = "default"
    roles: str | None = None
    kms: str | None = None
    partitions: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    batch_records: _Count = 4000
    lease_s: _Lease | None = None
    key_lease_s: _Lease = 30.0
    kafka: _KafkaTable = _KafkaTable()
    postgres: _PostgresTable | None = None
    vault: _VaultTable | None = None
    retention: _RetentionTable = _RetentionTable()
    watch: _WatchTable = _WatchTable()


class Kafka(NamedTuple):
    """How to reach the brokers, and as whom; `repr` shows no password, for none is in it."""

    servers: tuple[str, ...]  # HOST:PORT each
    username: str | None  # None: plaintext, without TLS and without a user
    password_path: Path | None
    ca_path: Path | None  # None: the certificate authorities of the operating system
    prefix: str  # of topics, groups and transactional ids
    replication: int
    min_insync: int
    commit_every_ms: int  # how long the first record of a batch waits for more
    transaction_timeout_ms: int  # so long a writer that stalls can keep readers of its partitions waiting


class Postgres(NamedTuple):
    """Where the key store is, and who this process is to it."""

    host: str
    port: int
    database: str
    username: str
    password_path: Path | None
    ca_path: Path | None  # None: the certificate authorities of the operating system
    plaintext: bool  # without TLS; a Unix socket never has it
    timeout_s: float


class Vault(NamedTuple):
    """Where the key management service is, and who this process is to it."""

    address: str
    mount: str
    counter_mount: str
    prefix: str  # of the names of keys
    namespace: str | None
    token_path: Path | None  # or else role id and secret id
    role_id: str | None
    secret_id_path: Path | None
    ca_path: Path | None
    timeout_s: float


class Config(NamedTuple):
    """A deployment: its policy, its log (one of `log_path` and `kafka`), and its folders."""

    policy: Policy
    policy_source: str
    folder: Path  # key store, registries, and the log if it is on SQLite
    log_path: Path | None
    kafka: Kafka | None
    kms_dir: Path
    roles_path: Path | None
    partitions: int
    batch_records: int
    lease_s: float  # of partitions: so long another worker waits for those of one that was killed
    key_lease_s: float
    postgres: Postgres | None  # None: the key store is the file `keys_path`
    vault: Vault | None  # None: the key management service is the folder `kms_dir`
    retention_scheduled: bool  # `run` buries what is due by itself
    rewrap_s: int  # so long at most a copy of the key store opens what was destroyed before its day
    watch: tuple[str, int] | None  # host and port to serve metrics on; None: nobody watches

    @property
    def keys_path(self) -> Path:
        """The key store's file."""
        return self.folder / "keys.db"

    @property
    def registries_dir(self) -> Path:
        """The folder of the loaded registries."""
        return self.folder / "registries"

    @property
    def entries_dir(self) -> Path:
        """The folder of the snapshots of opt-outs and exemptions."""
        return self.folder / "entries"

    @property
    def watch_path(self) -> Path:
        """The folder of the workers' metrics, in one folder per `run`."""
        return self.folder / "watch"


def load(args: Namespace) -> Config:
    """Return the configuration that `--config` and `--log` name. Reads files. Raises InputInvalid, PolicyInvalid."""
    path = Path(args.config)
    settings = _read(path, required=args.config != "streamveil.toml")
    base = path.parent
    url = args.log or settings.log or DEFAULT_LOG
    log_path, kafka = None, None
    if url.startswith(KAFKA):
        kafka = _kafka(url, settings.kafka, base)
        folder = base / (settings.data or DATA)
    else:
        log_path = _log_path(url, Path() if args.log or not settings.log else base)
        folder = log_path.parent
        if settings.data:
            raise InputInvalid("`data` is for logs on Kafka: on SQLite everything lies in the log's folder")
    if kafka is not None and settings.key_lease_s * 1000 < 2 * kafka.transaction_timeout_ms:
        raise InputInvalid(
            "key_lease_s must be at least twice [kafka] transaction_timeout_ms: brokers may take a commit on so late,"
            " and nothing is committed that could come after its key lease"
        )
    policy, source = read_policy(settings.policy, base)
    return Config(
        policy=policy,
        policy_source=source,
        folder=folder,
        log_path=log_path,
        kafka=kafka,
        kms_dir=base / settings.kms if settings.kms else folder.absolute().parent / "streamveil-kms",
        roles_path=base / settings.roles if settings.roles else None,
        partitions=settings.partitions,
        batch_records=settings.batch_records,
        lease_s=settings.lease_s or (SQLITE_LEASE_S if kafka is None else KAFKA_LEASE_S),
        key_lease_s=settings.key_lease_s,
        postgres=_postgres(settings.postgres, base),
        vault=_vault(settings.vault, base),
        retention_scheduled=settings.retention.scheduled,
        rewrap_s=settings.retention.rewrap_hours * 3600,
        watch=_listen(settings.watch.listen),
    )


def read_policy(name: str, base: Path) -> tuple[Policy, str]:
    """Return a policy, by pack name or file path, and where it came from."""
    packs = packs_available()
    if name in packs:
        return parse_policy(packs[name], f"pack {name}"), f"pack {name}"
    path = base / name
    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputInvalid(
            f"the policy is neither a pack ({', '.join(sorted(packs))}) nor a file that can be read", file=str(path)
        ) from None
    return parse_policy(text, str(path)), str(path)


def packs_available() -> dict[str, str]:
    """Return the policy packs that ship with the program: name → TOML text."""
    folder = resources.files("schemas") / "policies"
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }


def _read(path: Path, *, required: bool) -> _File:
    try:
        return msgspec.convert(tomllib.loads(read_text(path)), _File)
    except FileNotFoundError:
        if required:
            raise InputInvalid("there is no such configuration file", file=str(path)) from None
        return _File()
    except (OSError, UnicodeDecodeError):
        raise InputInvalid("the configuration file cannot be read", file=str(path)) from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InputInvalid(f"the configuration file is not valid: {error}", file=str(path)) from None


def _log_path(url: str, base: Path) -> Path:
    if url.startswith(SQLITE) and len(url) > len(SQLITE):
        path = base / url.removeprefix(SQLITE)
        return path / "log.db" if path.is_dir() or url.endswith("/") else path
    raise InputInvalid("the log must be sqlite:///PATH or kafka://HOST:PORT[,HOST:PORT…]")


def _listen(address: str | None) -> tuple[str, int] | None:
    """Return host and port of `[watch] listen`. Raises InputInvalid."""
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    if not _SERVER.fullmatch(address) or not 0 < int(port) < 65536:
        raise InputInvalid("[watch] listen must be HOST:PORT, such as 127.0.0.1:9464")
    return host.strip("[]"), int(port)


def _postgres(table: _PostgresTable | None, base: Path) -> Postgres | None:
    """Return where the key store's server is. Raises InputInvalid."""
    if table is None:
        return None
    if table.plaintext and table.ca_file:
        raise InputInvalid("[postgres] names a certificate authority and plaintext: leave out one of them")
    return Postgres(
        table.host,
        table.port,
        table.database,
        table.username,
        base / table.password_file if table.password_file else None,
        base / table.ca_file if table.ca_file else None,
        table.plaintext,
        table.timeout_s,
    )


def _vault(table: _VaultTable | None, base: Path) -> Vault | None:
    """Return where the key management service is. Raises InputInvalid."""
    if table is None:
        return None
    if not _URL.fullmatch(table.address):
        raise InputInvalid("[vault] address must be https://HOST:PORT; http is for 127.0.0.1 only")
    if bool(table.token_file) == bool(table.role_id and table.secret_id_file):
        raise InputInvalid("[vault] needs either token_file, or role_id and secret_id_file")
    return Vault(
        table.address.rstrip("/"),
        table.mount.strip("/"),
        table.counter_mount.strip("/"),
        table.prefix,
        table.namespace,
        base / table.token_file if table.token_file else None,
        table.role_id,
        base / table.secret_id_file if table.secret_id_file else None,
        base / table.ca_file if table.ca_file else None,
        table.timeout_s,
    )


def _kafka(url: str, table: _KafkaTable, base: Path) -> Kafka:
    """Return the brokers that a URL names, and who this process is to them. Raises InputInvalid."""
    servers = tuple(url.removeprefix(KAFKA).rstrip("/").split(","))
    if not all(_SERVER.fullmatch(server) for server in servers):
        raise InputInvalid("the log must be kafka://HOST:PORT[,HOST:PORT…]: user and password belong into [kafka]")
    if table.plaintext and (table.username or table.password_file or table.ca_file):
        raise InputInvalid("[kafka] names a user and plaintext: a password is never sent without TLS")
    if not table.plaintext and not (table.username and table.password_file):
        raise InputInvalid(
            "a log on Kafka needs [kafka] username and password_file (and ca_file, if the brokers' certificate"
            " authority is not the system's) in the configuration; plaintext = true is for benchmarks only"
        )
    if table.min_insync > table.replication:
        raise InputInvalid("[kafka] min_insync is more than replication: nothing could be written")
    return Kafka(
        servers=servers,
        username=table.username,
        password_path=base / table.password_file if table.password_file else None,
        ca_path=base / table.ca_file if table.ca_file else None,
        prefix=table.prefix,
        replication=table.replication,
        min_insync=table.min_insync,
        commit_every_ms=table.commit_every_ms,
        transaction_timeout_ms=table.transaction_timeout_ms,
    )
