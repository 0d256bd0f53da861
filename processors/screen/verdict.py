"""The verdict: whether a request may go out, as a pure function of subject, view, registries, plan and now.

The order of the rules is the order of `verdict`; each rule that is asked can be listed with its clause. Exemptions
lift registry and quiet hours, never a person's own opt-out.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, Protocol

import msgspec
import phonenumbers

from processors.screen.quiet_hours import QuietHours
from processors.screen.suppression import View
from schemas.fields import Kind, Party
from schemas.policy import Account, Policy

GATEWAY_CODES = {"twilio": 21610, "telnyx": 40300, "plivo": 200, "vonage": 9, "sinch": 257, "infobip": 2050}
"""What gateways already know for «this person is not to be contacted», by vendor."""

REQUEST_MAX_AGE_S = 24 * 3600
"""An older request is refused: whoever waited for it has stopped waiting (DESIGN.md, traffic lives at most 24 h)."""


class RegistryView(Protocol):
    """The registries in force."""

    def lists(self, name: str, number: str) -> bool:
        """Return whether the registry lists an E.164 number."""

    def as_of(self, name: str) -> int | None:
        """Return the list's own date in Unix seconds, or None if the registry is not loaded."""


class Subject(msgspec.Struct, frozen=True, gc=False):
    """What a verdict is asked about. `token` None: no person; `scopes`: the suppression scopes that cover it."""

    account_id: str
    party: Party
    token: bytes | None
    channel: str
    purpose: str
    country: str | None
    child: bool
    requested_s: int | None
    scopes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Subject({self.channel}, {self.purpose})"


class Asked(NamedTuple):
    """One rule that was asked: its name, clause and what came of it."""

    rule: str
    clause: str
    outcome: str  # pass, refuse, not applicable, not loaded


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """Cleared (`reason` None) or refused. `not_after_s`: Unix s until which a cleared request may be sent."""

    reason: str | None
    clause: str | None = None
    codes: Mapping[str, int] | None = None
    not_after_s: int | None = None
    defer_until_s: int | None = None

    @property
    def cleared(self) -> bool:
        """Whether the request may go out."""
        return self.reason is None


Trace = list[Asked] | None
_NUMBER, _NOBODY = Kind.NUMBER, Kind.NOBODY  # Python 3.11 takes 0.09 µs to find a member of an enumeration
_ADDRESSES = (Kind.NUMBER, Kind.EMAIL, Kind.SIP)
PASS, NOT_APPLICABLE = "pass", "not applicable"

REASONS = (
    "request_expired",
    "no_recipient",
    "country_not_allowed",
    "child",
    "recipient_not_normalised",
    "opted_out",
    "blocked_by_officer",
    "registry_missing",
    "registry_too_old",
    "on_registry",
    "quiet_hours",
)
"""Every reason for a refusal, in the order in which the rules are asked."""


def verdict(
    subject: Subject,
    view: View,
    registries: RegistryView,
    policy: Policy,
    account: Account,
    quiet: QuietHours | None,
    now_s: int,
    trace: Trace = None,
) -> Verdict:
    """Return the verdict on a request. `trace`, if given, collects every rule asked, in order. About 1 µs."""
    marketing = subject.purpose == "marketing"
    requested_s = subject.requested_s
    if requested_s is not None and now_s - requested_s > REQUEST_MAX_AGE_S:
        return _refuse("request_expired", "INF-3", trace)
    if subject.party.kind is _NOBODY:
        return _refuse("no_recipient", "CAL-2", trace)
    if account.countries is not None:
        if not _country_allowed(subject, frozenset(account.countries)):
            return _refuse("country_not_allowed", "CAL-11", trace)
        if trace is not None:
            trace.append(Asked("country_allow_list", "CAL-11", PASS))
    if marketing and subject.child:
        return _refuse("child", "REG-5", trace)
    if trace is not None:
        trace.append(Asked("child", "REG-5", PASS if marketing else NOT_APPLICABLE))
    if marketing and subject.party.kind not in _ADDRESSES:
        return _refuse("recipient_not_normalised", "CAL-3", trace)
    found = suppressed(subject, view, policy)
    if found is not None:
        return _refuse(found, "KAL-5", trace, codes=GATEWAY_CODES)
    if trace is not None:
        trace.append(Asked("suppression", "KAL-5", PASS))
    if not marketing:
        if trace is not None:
            trace.append(Asked("registry", "CAL-3", NOT_APPLICABLE))
        return Verdict(None, not_after_s=now_s + policy.not_after_s(subject.purpose))
    for rule in policy.registries(subject.channel):
        number = subject.party.value
        if subject.party.kind is not _NUMBER or not number.startswith("+" + rule.calling_code):
            continue
        if subject.country is not None and subject.country != rule.country:
            continue
        as_of = registries.as_of(rule.name)
        if as_of is None:
            if rule.required:
                return _refuse("registry_missing", rule.clause, trace)
            _note(trace, f"registry {rule.name}", rule.clause, "not loaded")
            continue
        if max(0, now_s - as_of) > rule.max_age_days * 86_400:
            return _refuse("registry_too_old", rule.clause, trace)
        if registries.lists(rule.name, number):
            return _refuse("on_registry", rule.clause, trace, codes=GATEWAY_CODES)
        _note(trace, f"registry {rule.name}", rule.clause)
    not_after_s = now_s + policy.not_after_s("marketing")
    hours = policy.screening.quiet_hours
    if quiet is not None and hours is not None and _in_countries(subject, hours.countries):
        is_quiet, starts_s = quiet.state(subject.party.value)
        if is_quiet:
            return _refuse("quiet_hours", hours.clause, trace, defer_until_s=quiet.ends_s(subject.party.value))
        not_after_s = min(not_after_s, starts_s)
        _note(trace, "quiet_hours", hours.clause)
    return Verdict(None, not_after_s=not_after_s)


def _note(trace: Trace, rule: str, clause: str, outcome: str = PASS) -> None:
    if trace is not None:
        trace.append(Asked(rule, clause, outcome))


def _refuse(
    reason: str,
    clause: str,
    trace: Trace,
    *,
    codes: Mapping[str, int] | None = None,
    defer_until_s: int | None = None,
) -> Verdict:
    _note(trace, reason, clause, "refuse")
    return Verdict(reason, clause, codes, None, defer_until_s)


def suppressed(subject: Subject, view: View, policy: Policy) -> str | None:
    """Return the reason if an opt-out or officer block of this person forbids this purpose on this channel."""
    if subject.token is None or not subject.scopes:
        return None
    entries = view.get(subject.token)
    if entries is None:
        return None
    reason = None
    for rule, state in entries.items():
        if not state.out or rule.channel != subject.channel or rule.scope not in subject.scopes:
            continue
        if subject.purpose not in policy.blocked_by(rule.class_):
            continue
        if rule.authority == "person":
            return "opted_out"
        reason = "blocked_by_officer"
    return reason


def _country_allowed(subject: Subject, allowed: frozenset[str]) -> bool:
    """Return whether the destination is in the allow list; a country that cannot be told is not."""
    if subject.country is not None:
        return subject.country in allowed
    if subject.party.kind is not _NUMBER:
        return False
    regions = regions_of(subject.party.value[1:4])
    return bool(regions) and regions <= allowed


def _in_countries(subject: Subject, countries: tuple[str, ...] | list[str]) -> bool:
    """Return whether the destination is, or may be, in one of the countries."""
    if subject.country is not None:
        return subject.country in countries
    return subject.party.kind is _NUMBER and not regions_of(subject.party.value[1:4]).isdisjoint(countries)


@lru_cache(maxsize=1024)
def regions_of(first_digits: str) -> frozenset[str]:
    """Return the regions (ISO 3166-1 alpha-2) that share the calling code at the start of three digits."""
    for length in (1, 2, 3):
        regions = phonenumbers.COUNTRY_CODE_TO_REGION_CODE.get(int(first_digits[:length] or "0"))
        if regions:
            return frozenset(regions)
    return frozenset()
