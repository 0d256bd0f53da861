"""The privacy officer's desk: who may sit at it, and how a number becomes a person.

Rules of this file:
- Only a principal with the role dpo for all accounts gets an `Office`; nothing of officers' work runs without one.
- A person is known by the tokens of all token keys there are, so that a rotation under way hides nobody.
- No number in an error, and none in a `repr`.
"""

from typing import Final, NamedTuple

from processors.screen.suppression import Tokens
from schemas.errors import InputInvalid
from schemas.fields import PLATFORM, Kind, is_account, normalise
from streams.deployment import Deployment
from streams.keys.audit import Auditor
from streams.keys.roles import Principal, only_officer
from streams.keys.store import Known

ROLE: Final = "dpo"


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

        An account that the policy does not list (any more) may still have data, so it is no error. Raises
        InputInvalid, without repeating anything, for a number that is nobody's or an account that cannot be one.
        """
        policy = self.deployment.config.policy
        listed = None
        if account is not None:
            if account == PLATFORM or not is_account(account):
                raise InputInvalid("the account is not a name that an account can have")
            listed = policy.account(account)
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


def office(deployment: Deployment) -> Office:
    """Return the officer's desk for the user this process runs as. Raises RevealDenied unless that is the dpo."""
    who = deployment.who()
    only_officer(who)
    return Office(deployment, who, deployment.auditor())
