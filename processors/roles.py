"""Roles: who is controller and who processor of an output, and the `privacy` object and headers that say so.

Rules of this file: pure, from policy, account, data class and day; no personal data comes near. The role is
the platform's (INF-1, KAL-1, CAL-1); the transfer mechanism follows from the roles of both parties (CAL-8).
"""

from datetime import date
from typing import NamedTuple

from schemas.policy import Account, Policy, Role

MODULES: dict[tuple[Role, Role], str] = {
    ("controller", "controller"): "scc-module-1",
    ("controller", "processor"): "scc-module-2",
    ("processor", "processor"): "scc-module-3",
    ("processor", "controller"): "scc-module-4",
}
"""Standard contractual clauses by the roles of who sends the data and who gets it (CAL-8)."""


class Tags(NamedTuple):
    """What an output says about itself; `role` is the platform's, `processor` None where there is none."""

    role: str
    controller: str
    processor: str | None
    legal_basis: str
    purposes: tuple[str, ...]
    data_class: str
    policy: str
    jurisdiction: str | None
    transfer: str


def tags(policy: Policy, account_id: str, data_class: str, day: date, *, to_account: bool = False) -> Tags:
    """Return the tags of an account's data of a class on a day. `to_account`: the stream goes back to it.

    An account the policy does not know has the policy's rules and an unknown jurisdiction. Raises
    PolicyInvalid if the policy has no rule for the class. A few µs: keep the result for a batch.
    """
    rule = policy.processing_of(data_class)
    role = policy.role_of(account_id, data_class, day)
    platform = policy.platform.name
    processed = role == "processor"
    return Tags(
        role=role,
        controller=account_id if processed else platform,
        processor=platform if processed else None,
        legal_basis=rule.legal_basis,
        purposes=rule.purposes,
        data_class=data_class,
        policy=policy.id,
        jurisdiction=policy.platform.jurisdiction,
        transfer=_transfer(policy, policy.account(account_id), role, to_account=to_account),
    )


def _transfer(policy: Policy, account: Account | None, role: Role, *, to_account: bool) -> str:
    """Return the mechanism; `none` only where it is known that none is needed."""
    here, there = policy.platform.jurisdiction, account and account.jurisdiction
    if here and there and (here == there or {here, there} <= set(policy.adequate)):
        return "none"
    theirs: Role = account.acts_as if account else "controller"
    if to_account:
        return MODULES[role, theirs]
    if role == "controller":
        return MODULES["controller", "controller"]  # what a controller gets, it gets as from one
    return MODULES[theirs, role]


def privacy_object(tags: Tags, expires_at: str | None, anonymous_from: str | None = None) -> dict[str, object]:
    """Return the `privacy` object of an output; `anonymous_from` only stands where it is given.

    Both instants are RFC 3339 in UTC; `expires_at` None: no deadline.
    """
    privacy: dict[str, object] = {**tags._asdict(), "expires_at": expires_at}
    if anonymous_from is not None:
        privacy["anonymous_from"] = anonymous_from
    return privacy


def headers(tags: Tags) -> tuple[tuple[str, bytes], ...]:
    """Return the record headers: role, data class and policy."""
    return (
        ("role", tags.role.encode()),
        ("class", tags.data_class.encode()),
        ("policy", tags.policy.encode()),
    )
