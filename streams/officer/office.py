"""The privacy officer's desk: who may sit at it, and how a number becomes a person.

Rules of this file:
- Only a principal with the role dpo for all accounts gets an `Office`; nothing of officers' work runs without one.
- A person is known by the tokens of all token keys there are, so that a rotation under way hides nobody.
- An account is known by the policy, or by what was ever kept for it: a mistyped one is an error, and no success.
- No number in an error, and none in a `repr`.
"""

import re
import time
import unicodedata
from typing import Final, NamedTuple

from processors.screen.suppression import Tokens
from schemas.errors import InputInvalid
from schemas.fields import PLATFORM, Kind, is_account, normalise
from streams.deployment import Deployment
from streams.keys.audit import Auditor
from streams.keys.ledger import MarkKind
from streams.keys.roles import Principal, only_officer
from streams.keys.store import Known
from streams.officer.scan import of_account, scan
from streams.rows import MIN_DIGITS, national

SCHEDULE: Final = "offboard/"
"""How the names begin under which the ledger keeps when accounts leave."""
_MARKS: Final[tuple[MarkKind, ...]] = ("hold", "restriction")
_SEPARATORS = re.compile(r"[\s().\-/\u2010-\u2015]+")
_DIGITS = re.compile(rf"[0-9]{{{MIN_DIGITS},}}")


class Person(NamedTuple):
    """A person: the number in its normal form, and its tokens: the current key's first, then the others'."""

    value: str
    tokens: tuple[bytes, ...]

    def __repr__(self) -> str:
        return "Person()"


class Office:
    """What officers' work needs: the deployment, who does it, and what logs it. Made by `office`."""

    __slots__ = ("auditor", "deployment", "who")

    def __init__(self, deployment: Deployment, who: Principal, auditor: Auditor) -> None:
        self.deployment = deployment
        self.who = who
        self.auditor = auditor

    def person(self, number: str, account: str | None = None) -> Person:
        """Return who a number is, read in the region of the account if one is given. Blocks on the key store.

        Raises InputInvalid, without repeating anything, for a number that is nobody's or an account that cannot be one.
        """
        listed = None
        if account is not None:
            check_name(account)
            listed = self.deployment.config.policy.account(account)
        party = normalise(number, listed.default_region if listed else None)
        if not party.is_person or party.kind is Kind.UNKNOWN or (listed and party.value in listed.own):
            raise InputInvalid(
                "the number is nobody's: give an E.164 number, such as one that begins with + and a country code"
            )
        keys = self.deployment.store.token_keys()
        return Person(
            party.value, tuple(Tokens(key.version, key.key).of(party.value) for key in (keys.current, *keys.others))
        )

    def sids(self, person: Person, owner: str | None = None) -> dict[str, Known]:
        """Return the secrets that a person has, by sid; of one owner (the platform or an account) if it is given.

        Blocks on the key store.
        """
        known = self.deployment.store.persons_of(person.tokens)
        return {one.sid: one for one in known if owner is None or one.owner == owner}


class Finder:
    """Finds a person's number or address in a text of any kind: any spelling of the national number."""

    __slots__ = ("_needle",)

    def __init__(self, value: str) -> None:
        self._needle = value.lower()
        if value.startswith("+"):
            self._needle = national(value) or value[1:]

    def __repr__(self) -> str:
        return "Finder()"

    def found(self, text: str) -> bool:
        """Return whether the text may hold the number; digits that only look like it are found too."""
        plain = _plain(text)
        return self._needle in plain or self._needle in _SEPARATORS.sub("", plain)


def may_hold_a_number(text: str) -> bool:
    """Return whether somebody's number may be in a text: seven digits with nothing but separators between."""
    return _DIGITS.search(_SEPARATORS.sub("", _plain(text))) is not None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text.replace("\0", "")).lower()


def check_name(account: str) -> None:
    """Raise InputInvalid unless an account can have this name."""
    if account == PLATFORM or not is_account(account):
        raise InputInvalid("the account is not a name that an account can have")


async def check_account(deployment: Deployment, account: str) -> None:
    """Raise InputInvalid unless an account is in the policy, or keys, a mark, a schedule or call records are its.

    One that the policy does not list (any more) may still have data. One that it would serve if it came
    (`accounts.any`) and that never came is none. Blocks; for one without keys, as long as it takes to read `cdr.pii`.
    """
    check_name(account)
    store = deployment.store
    if not (
        any(listed.id == account for listed in deployment.config.policy.listed)
        or any(key.owner == account for key in store.status(int(time.time())))
        or store.ledger.progress(SCHEDULE + account) is not None
        or any(mark.owner == account for kind in _MARKS for mark in store.ledger.marks(kind, ended=True))
        or any(store.sids_of(account))
    ):
        async for _ in scan(deployment.log, "cdr.pii", of_account(account)):  # of calls it may have no keys
            return
        raise InputInvalid("no such account: neither in the policy nor with keys or records; see keys status")


def office(deployment: Deployment) -> Office:
    """Return the officer's desk for the user this process runs as. Raises RevealDenied unless that is the dpo."""
    who = deployment.who()
    only_officer(who)
    return Office(deployment, who, deployment.auditor())
