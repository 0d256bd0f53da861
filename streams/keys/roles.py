"""Who may open what: principals, roles and grants. Default deny.

Without a roles file, the operating-system user who owns the key store is the DPO and nobody else may open
anything. A roles file replaces this:

    [[grant]]
    user = "egress-1"        # operating-system user
    role = "egress"          # a reader in the catalog of streams
    accounts = ["acme"]      # or ["*"]

The privacy officer is who has the role dpo for all accounts; what cannot be undone is theirs to do.
"""

import os
import pwd
import tomllib
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from schemas.catalog import CATALOG
from schemas.errors import InputInvalid, RevealDenied

OFFICER: Final = "dpo"
ROLES = frozenset(role for row in CATALOG.values() for role in (*row.readers, *row.writers))


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One grant: a user has a role for some accounts (`*`: all)."""

    user: str
    role: str
    accounts: tuple[str, ...]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    grant: tuple[Grant, ...] = ()


class Principal(NamedTuple):
    """A user with the grants that are theirs."""

    name: str
    grants: tuple[Grant, ...]

    def may_open(self, stream: str, account: str | None) -> bool:
        """Return whether a grant lets this principal read a stream, for an account (None: for any at all)."""
        return any(
            account is None or "*" in grant.accounts or account in grant.accounts
            for grant in self.grants
            if grant.role in CATALOG[stream].readers
        )

    @property
    def is_officer(self) -> bool:
        """Whether this is the privacy officer."""
        return any(grant.role == OFFICER and "*" in grant.accounts for grant in self.grants)

    def role_for(self, stream: str) -> str | None:
        """Return the first role that lets this principal read the stream."""
        return next((grant.role for grant in self.grants if grant.role in CATALOG[stream].readers), None)


def only_officer(who: Principal) -> None:
    """Return if this is the privacy officer. Raises RevealDenied otherwise."""
    if not who.is_officer:
        raise RevealDenied(
            "only the privacy officer (role dpo for all accounts) may do this; ask for a grant in the roles file"
        )


def principal(roles_path: Path | None, keys_path: Path) -> Principal:
    """Return the principal of this process, from the roles file or the owner of the key store. Reads files."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid-{uid}"
    if roles_path is None:
        owns = keys_path.exists() and keys_path.stat().st_uid == uid
        return Principal(name, (Grant(name, OFFICER, ("*",)),) if owns else ())
    try:
        file = msgspec.convert(tomllib.loads(roles_path.read_text(encoding="utf-8")), _File)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError):
        raise InputInvalid(
            "the roles file cannot be read as [[grant]] tables of user, role and accounts; nothing is opened",
            file=str(roles_path),
        ) from None
    unknown = sorted({grant.role for grant in file.grant} - ROLES)
    if unknown:
        raise InputInvalid(
            f"the roles file names a role that does not exist; roles are {', '.join(sorted(ROLES))}",
            file=str(roles_path),
        )
    return Principal(name, tuple(grant for grant in file.grant if grant.user == name))
