"""Opens the key store that a configuration names, with its key management service."""

from streams.config import Config
from streams.keys.kms_local import LocalKms
from streams.keys.sqlite import SqliteKeyStore
from streams.keys.store import KeyStore, KmsMaker


def kms_of(config: Config) -> KmsMaker:
    """Return what opens the key management service of a configuration."""
    vault = config.vault
    if vault is not None:
        from streams.keys.kms_vault import VaultKms  # noqa: PLC0415 — for who uses one only

        return lambda store_id, create: (VaultKms.create if create else VaultKms.open)(vault, store_id)
    return lambda store_id, create: (LocalKms.create if create else LocalKms.open)(config.kms_dir, store_id)


def open_store(config: Config, *, create: bool = False, busy_s: float = 10.0, outdated: bool = False) -> KeyStore:
    """Return the key store; with `create` it is made if there is none. `outdated`: also one that a backup brought back.

    Blocks on disk or network, here and in each call up to `busy_s` on other processes.
    """
    if config.postgres is not None:
        from streams.keys.postgres import PostgresKeyStore  # noqa: PLC0415 — for who uses one only

        return PostgresKeyStore.open(
            config.postgres, kms_of(config), create=create, busy_timeout_s=busy_s, outdated=outdated
        )
    return SqliteKeyStore.open(
        config.keys_path, kms_of(config), create=create, busy_timeout_s=busy_s, outdated=outdated
    )


def store_exists(config: Config) -> bool:
    """Return whether there is a key store, whatever its state. Blocks."""
    if config.postgres is not None:
        from streams.keys.postgres import exists  # noqa: PLC0415 — for who uses one only

        return exists(config.postgres)
    return config.keys_path.exists()
