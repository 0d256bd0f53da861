"""The configuration of a deployment: one TOML file, command-line overrides, and where things lie on disk."""

import tomllib
from argparse import Namespace
from importlib import resources
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from schemas.errors import InputInvalid
from schemas.policy import Policy, parse_policy

DEFAULT_LOG = "sqlite:///streamveil-data/log.db"
SQLITE = "sqlite:///"
KAFKA = "kafka://"

_Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
_Lease = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of `streamveil.toml`; paths are relative to the file's folder."""

    log: str | None = None
    policy: str = "default"
    roles: str | None = None
    kms: str | None = None
    partitions: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    batch_records: _Count = 2000
    lease_s: _Lease = 5.0  # of partitions: so long another worker waits for those of one that was killed
    key_lease_s: _Lease = 30.0


class Config(NamedTuple):
    """A deployment: its policy, its log, and its folders."""

    policy: Policy
    policy_source: str
    log_path: Path
    kms_dir: Path
    roles_path: Path | None
    partitions: int
    batch_records: int
    lease_s: float
    key_lease_s: float

    @property
    def folder(self) -> Path:
        """The log's folder, in which the key store and the registries lie too."""
        return self.log_path.parent

    @property
    def keys_path(self) -> Path:
        """The key store's file."""
        return self.folder / "keys.db"

    @property
    def registries_dir(self) -> Path:
        """The folder of the loaded registries."""
        return self.folder / "registries"


def load(args: Namespace) -> Config:
    """Return the configuration that `--config` and `--log` name. Reads files. Raises InputInvalid, PolicyInvalid."""
    path = Path(args.config)
    settings = _read(path, required=args.config != "streamveil.toml")
    base = path.parent
    url = args.log or settings.log or DEFAULT_LOG
    log_path = _log_path(url, Path() if args.log or not settings.log else base)
    policy, source = read_policy(settings.policy, base)
    kms_dir = base / settings.kms if settings.kms else log_path.absolute().parent.parent / "streamveil-kms"
    return Config(
        policy=policy,
        policy_source=source,
        log_path=log_path,
        kms_dir=kms_dir,
        roles_path=base / settings.roles if settings.roles else None,
        partitions=settings.partitions,
        batch_records=settings.batch_records,
        lease_s=settings.lease_s,
        key_lease_s=settings.key_lease_s,
    )


def read_policy(name: str, base: Path) -> tuple[Policy, str]:
    """Return a policy, by pack name or file path, and where it came from."""
    packs = packs_available()
    if name in packs:
        return parse_policy(packs[name], f"pack {name}"), f"pack {name}"
    path = base / name
    try:
        text = path.read_text(encoding="utf-8-sig")
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
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File)
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
    if url.startswith(KAFKA):
        raise InputInvalid("logs on Kafka are not built into this version; use sqlite:///PATH")
    raise InputInvalid("the log must be sqlite:///PATH")
