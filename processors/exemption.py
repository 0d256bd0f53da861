"""Exemptions: why an account may market to a number that a registry lists, until when, and the record that says so.

Rules of this file:
- A purchase or an inquiry counts for as long as the country of the number lets it (`[[screening.exemption]]`). Where
  digits do not tell the country, every one that they may be of must let it, and the shortest time counts.
- A consent counts as long as it says, and at most `MAX_EXEMPT_MONTHS` after it was given.
- The record's key is that of an entry (`record_key`). Its number stands in the sealed part and nowhere else; a
  withdrawal names nobody, so it has no sealed part, and can be written for somebody whose keys are gone.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, get_args

import orjson

from processors.keyring import PersonSecret
from processors.plan import Template
from processors.retention import instant
from processors.screen.destination import place_of_number
from processors.seal import Sealer
from schemas.outbound import Headers, Message
from schemas.policy import MAX_EXEMPT_MONTHS, ExemptionKind, Period, Policy
from schemas.sealed import split_envelope

STREAM: Final = "exemptions"
DATA_CLASS: Final = "contact_list"
KINDS = CONSENT, PURCHASE, INQUIRY = get_args(ExemptionKind)
AUTHORITY: Final = "account"
"""Who an exemption comes from, in its rule."""
_MONTHS: Final = {PURCHASE: "purchase_months", INQUIRY: "inquiry_months"}
_GROUP: Final = "number"
EXEMPT, WITHDRAWN = "exempt", "withdrawn"
_OUT, _IN = b"|out", b"|in"
_KEPT: Final = ("account_id", "evidence", "expires_at", "given_at", "kind", "privacy")
"""What a withdrawal repeats of the exemption."""


class Exemption(NamedTuple):
    """An exemption to be written. `entry`: the record's key; instants in Unix s; `number` leaves only sealed."""

    entry: bytes
    account: str
    kind: str
    given_s: int
    expires_s: int
    evidence: str
    token: bytes
    number: str

    def __repr__(self) -> str:
        return "Exemption()"


def longest_s(policy: Policy, kind: str, number: str, given_s: int) -> int | None:
    """Return until when (Unix s) an exemption of a kind may last that was given for an E.164 number.

    None: a kind that counts for nothing where the number is, or may be. Microseconds.
    """
    months: int | None = MAX_EXEMPT_MONTHS
    if kind != CONSENT:
        terms = [policy.exemption_terms(region) for region in place_of_number(number).regions]
        months = min((0 if one is None else getattr(one, _MONTHS[kind]) for one in terms), default=0)
    return months_later_s(given_s, months) if months else None


def months_later_s(at_s: int, months: int) -> int:
    """Return the same time of day so many calendar months later, in UTC; of a day that there is not, the last."""
    at = datetime.fromtimestamp(at_s, UTC)
    return int(datetime.combine(Period(months, "months").after(at.date()), at.timetz()).timestamp())


def exempting(template: Template, sealer: Sealer, person: PersonSecret, one: Exemption, now_s: int) -> Message:
    """Return the `exemptions` message of an exemption; about 10 µs."""
    head, tail = template.envelope(
        account_id=one.account,
        action=EXEMPT,
        entry=one.entry.decode(),
        evidence=one.evidence,
        expires_at=instant(one.expires_s),
        given_at=instant(one.given_s),
        kind=one.kind,
    )
    value = sealer.several(head, tail, ((_GROUP, person, orjson.dumps({"number": one.number})),))
    return Message(now_s * 1000, one.entry, template.headers, value)


def withdrawing(entry: bytes, fields: Mapping[str, Any], headers: Headers, reason: str | None, now_s: int) -> Message:
    """Return the message that withdraws an exemption, of which key, clear envelope and headers are given.

    It says of itself what the exemption said: it dies with it.
    """
    key = entry.removesuffix(_OUT) + _IN
    told = {name: fields[name] for name in _KEPT}
    head, tail = split_envelope({**told, "action": WITHDRAWN, "entry": key.decode(), "reason": reason})
    return Message(now_s * 1000, key, headers, head + tail)
