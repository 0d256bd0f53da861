"""The verdict: whether a request may go out, as a pure function of subject, views, registries, policy and now.

The order of the rules is the order of `Screen.verdict` (docs/screening.md); each rule that is asked can be listed with
its clause. An exemption lifts registries and quiet hours, and is asked for only where one of them would refuse; it
never lifts a person's opt-out. What holds for all verdicts of one moment is worked out once, in `Screen`; what holds
for one person and registries as they are, once in the person's `Memo`.
"""

from collections.abc import Callable, Container, Mapping
from itertools import count
from typing import NamedTuple, get_args

import msgspec

from processors.screen.destination import Place, place_of
from processors.screen.quiet_hours import QuietHours, zones_for
from processors.screen.registry import Registry, RegistryView, freshness
from processors.screen.suppression import Entries, View
from schemas.fields import Kind, Party
from schemas.inbound import Channel, Purpose, SuppressionClass
from schemas.policy import Account, ExemptionKind, Policy, RegistryRule

GATEWAY_CODES = {"twilio": 21610, "telnyx": 40300, "plivo": 200, "vonage": 9, "sinch": 257, "infobip": 2050}
"""What gateways already know for «this person is not to be contacted», by vendor."""

REQUEST_MAX_AGE_S = 24 * 3600
"""An older request is refused: whoever waited for it has stopped waiting (DESIGN.md, traffic lives at most 24 h)."""
CONFIRMATION_S = 300
"""An opt-out may be confirmed by one text within five minutes (47 CFR 64.1200(a)(12))."""
EXEMPTION_KINDS = get_args(ExemptionKind)


class Memo:
    """What was found out about one person, and under what it holds; whoever knows a person keeps it for the next time.

    `serial`, `country`: of which registries, and in a record of which country, `answers` are. `clean`: under which
    serial of the opt-outs (`Suppressions.serial`) there were none. It keeps no registry and no snapshot.
    """

    __slots__ = ("against", "answers", "clean", "country", "place", "serial", "zones")

    place: Place
    answers: "tuple[Answer, ...]"
    against: bool  # whether one of the answers is a reason

    def __init__(self, party: Party, country: str | None) -> None:
        """Take the party, and the country of the record if the party is no number: numbers tell by themselves."""
        self.place = place_of(party, country)
        self.zones: tuple[str, ...] | None = None
        self.serial = 0
        self.clean = 0
        self.country: str | None = None

    def __repr__(self) -> str:
        return "Memo()"


class Subject(msgspec.Struct, frozen=True, gc=False):
    """What a verdict is asked about. `token` None: no person; `scopes`: the suppression scopes that cover it.

    `time_zone`: where the account says the person is (IANA); `memo`: what is known of this party, if anything is.
    """

    account_id: str
    party: Party
    token: bytes | None
    channel: str
    purpose: str
    country: str | None
    child: bool
    requested_s: int | None
    scopes: tuple[str, ...]
    time_zone: str | None = None
    memo: Memo | None = None

    def __repr__(self) -> str:
        return f"Subject({self.channel}, {self.purpose})"


class Asked(NamedTuple):
    """One rule that was asked: its name, clause and what came of it."""

    rule: str
    clause: str
    outcome: str  # pass, refuse, not applicable, not loaded, exempt: KIND


class Answer(NamedTuple):
    """What one registry says of one person; `reason` None: it has nothing against it."""

    rule: RegistryRule
    reason: str | None
    outcome: str  # pass, refuse, not loaded


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """Cleared (`reason` None) or refused. `not_after_s`: Unix s until which a cleared request may be sent.

    `exemption`: the kind that lifted a rule. `confirmation`: refused for an opt-out so recent that the gateway may
    still send its one confirmation of that opt-out, and nothing else.
    """

    reason: str | None
    clause: str | None = None
    codes: Mapping[str, int] | None = None
    not_after_s: int | None = None
    defer_until_s: int | None = None
    exemption: str | None = None
    confirmation: bool = False

    @property
    def cleared(self) -> bool:
        """Whether the request may go out."""
        return self.reason is None


Trace = list[Asked] | None
_NUMBER, _NOBODY = Kind.NUMBER, Kind.NOBODY  # Python 3.11 takes 0.09 µs to find a member of an enumeration
_ADDRESSES = (Kind.NUMBER, Kind.EMAIL, Kind.SIP)
PASS, REFUSE, NOT_APPLICABLE, NOT_LOADED = "pass", "refuse", "not applicable", "not loaded"
EXEMPT = "exempt: "
"""Stands before the kind of exemption that lifted a rule."""

REASONS = (
    "request_expired",
    "no_recipient",
    "destination_forbidden",
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


class _Exemption(NamedTuple):
    """What lifts a rule: the kind that is named, and when the last of those in force ends (Unix s)."""

    kind: str
    ends_s: int


class _List(NamedTuple):
    """A registry that is asked on a channel. `lists` None: it says the same, `otherwise`, of whomever it is asked."""

    country: str
    prefix: str
    registry: Registry | None
    lists: Callable[[str], bool] | None
    listed: Answer
    otherwise: Answer


class _Lists(NamedTuple):
    """The registries of a channel as they are; `serial`: of this state of them, never used for another."""

    serial: int
    lists: tuple[_List, ...]


_serials = count(1)


class Bound:
    """A policy's registries as they were last seen, so that what they said still holds while they are the same."""

    __slots__ = ("_by_channel", "_policy")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._by_channel = {channel: _Lists(0, ()) for channel in get_args(Channel)}

    def at(self, registries: RegistryView, now_s: int) -> dict[str, _Lists]:
        """Return the registries by channel, as they are at `now_s`; what was swapped or got too old is another."""
        for channel, before in self._by_channel.items():
            lists = tuple(_list(rule, registries.get(rule.name), now_s) for rule in self._policy.registries(channel))
            same = len(lists) == len(before.lists) and all(
                one.registry is other.registry and one.otherwise == other.otherwise
                for one, other in zip(lists, before.lists, strict=True)
            )
            if not (same and before.serial):
                self._by_channel[channel] = _Lists(next(_serials), lists)
        return dict(self._by_channel)


def _list(rule: RegistryRule, registry: Registry | None, now_s: int) -> _List:
    listed = Answer(rule, "on_registry", REFUSE)
    lists = None
    if registry is None:
        otherwise = Answer(rule, "registry_missing", REFUSE) if rule.required else Answer(rule, None, NOT_LOADED)
    elif freshness(rule.max_age_days, registry.as_of_s, now_s) == "stale":
        otherwise = Answer(rule, "registry_too_old", REFUSE)
    else:
        lists, otherwise = registry.lists, Answer(rule, None, PASS)
    return _List(rule.country, "+" + rule.calling_code, registry, lists, listed, otherwise)


class Screen:
    """All that the verdicts of one moment share. Made once a batch, or once a command; holds no verdict."""

    __slots__ = (
        "_allowed", "_blocked", "_cleared", "_exemptions", "_hours", "_lists", "_made", "_marketing_until_s", "_now_s",
        "_oldest_s", "_quiet", "_suppressions",
    )  # fmt: skip

    def __init__(
        self,
        policy: Policy,
        registries: RegistryView,
        suppressions: View,
        exemptions: View,
        now_s: int,
        bound: Bound | None = None,
    ) -> None:
        """Take the policy, the views, and the moment in Unix s.

        `bound`: one and the same for all screens of a policy lets a `Memo` outlive the screen. What registry changes
        after this is seen by the next screen.
        """
        hours = policy.screening.quiet_hours
        self._suppressions = suppressions
        self._exemptions = exemptions
        self._now_s = now_s
        self._oldest_s = now_s - REQUEST_MAX_AGE_S
        self._blocked = blocked_by(policy)
        self._cleared = {
            purpose: Verdict(None, not_after_s=now_s + policy.not_after_s(purpose)) for purpose in get_args(Purpose)
        }
        self._marketing_until_s = now_s + policy.not_after_s("marketing")
        self._lists = (bound or Bound(policy)).at(registries, now_s)
        self._hours = hours
        self._quiet = None if hours is None else QuietHours(hours.start_time, hours.end_time, now_s)
        self._allowed: dict[str, frozenset[str]] = {}
        self._made: dict[tuple[int | None, _Exemption | None], Verdict] = {}

    def verdict(self, subject: Subject, account: Account, trace: Trace = None) -> Verdict:
        """Return the verdict on a request. `trace`, if given, collects every rule asked, in order. About 1 µs."""
        purpose, party = subject.purpose, subject.party
        marketing = purpose == "marketing"
        requested_s = subject.requested_s
        if requested_s is not None and requested_s < self._oldest_s:
            return _refuse("request_expired", "request_age", "INF-3", trace)
        if trace is not None:
            trace.append(Asked("request_age", "INF-3", NOT_APPLICABLE if requested_s is None else PASS))
        kind = party.kind
        if kind is _NOBODY:
            return _refuse("no_recipient", "recipient", "CAL-2", trace)
        memo = subject.memo
        if memo is None:
            memo = Memo(party, subject.country)
        place = memo.place
        if trace is not None:
            trace.append(Asked("recipient", "CAL-2", PASS))
        if place.forbidden:
            return _refuse("destination_forbidden", "destination", "CAL-11", trace)
        if trace is not None:
            trace.append(Asked("destination", "CAL-11", PASS))
        if account.countries is not None:
            if not self._allows(account, subject, place.regions):
                return _refuse("country_not_allowed", "country_allow_list", "CAL-11", trace)
            if trace is not None:
                trace.append(Asked("country_allow_list", "CAL-11", PASS))
        if marketing:
            if subject.child:
                return _refuse("child", "child", "REG-5", trace)
            if trace is not None:
                trace.append(Asked("child", "REG-5", PASS))
            if kind is not _NUMBER and kind not in _ADDRESSES:
                return _refuse("recipient_not_normalised", "recipient_normalised", "CAL-3", trace)
            if trace is not None:
                trace.append(Asked("recipient_normalised", "CAL-3", PASS))
        elif trace is not None:
            trace += (
                Asked("child", "REG-5", NOT_APPLICABLE),
                Asked("recipient_normalised", "CAL-3", NOT_APPLICABLE),
            )
        if subject.scopes and subject.token is not None:
            found = suppressed(subject, self._suppressions, self._blocked, self._now_s)
            if found is not None:
                if trace is not None:
                    trace.append(Asked("suppression", "KAL-5", REFUSE))
                return found
        if trace is not None:
            trace.append(Asked("suppression", "KAL-5", PASS))
        if not marketing:
            if trace is not None:
                trace += (Asked("registry", "CAL-3", NOT_APPLICABLE), Asked("quiet_hours", "REG-3", NOT_APPLICABLE))
            return self._cleared[purpose]
        return self._marketing(subject, memo, trace)

    def _marketing(self, subject: Subject, memo: Memo, trace: Trace) -> Verdict:
        """Return the verdict of the rules that hold for marketing only, and that an exemption lifts."""
        party, country, regions = subject.party, subject.country, memo.place.regions
        exemption = None
        if party.kind is _NUMBER:
            lists = self._lists[subject.channel]
            if memo.serial != lists.serial or memo.country != country:
                memo.answers = _answers(party.value, country, regions, lists)
                memo.against = any(answer.reason is not None for answer in memo.answers)
                memo.serial, memo.country = lists.serial, country
            if memo.against:
                exemption = self._exemption(subject)
            if memo.against or trace is not None:
                for rule, reason, outcome in memo.answers:
                    if reason is not None and exemption is None:
                        codes = GATEWAY_CODES if reason == "on_registry" else None
                        return _refuse(reason, f"registry {rule.name}", rule.clause, trace, codes=codes)
                    if trace is not None:
                        said = outcome if reason is None or exemption is None else f"{EXEMPT}{exemption.kind}"
                        trace.append(Asked(f"registry {rule.name}", rule.clause, said))
        hours, quiet = self._hours, self._quiet
        if hours is None or quiet is None or (country not in hours.countries and regions.isdisjoint(hours.countries)):
            return self._cleared["marketing"] if exemption is None else self._until(None, exemption)
        zones = self._zones(subject, memo)
        is_quiet, starts_s = quiet.state(zones)
        if not is_quiet:
            if trace is not None:
                trace.append(Asked("quiet_hours", hours.clause, PASS))
            return self._until(starts_s, exemption)
        exemption = exemption or self._exemption(subject)
        if exemption is None:
            defer_until_s = quiet.ends_s(zones)
            return _refuse("quiet_hours", "quiet_hours", hours.clause, trace, defer_until_s=defer_until_s)
        if trace is not None:
            trace.append(Asked("quiet_hours", hours.clause, f"{EXEMPT}{exemption.kind}"))
        return self._until(None, exemption)

    def _zones(self, subject: Subject, memo: Memo) -> tuple[str, ...]:
        """Return the time zones in which somebody may be: the account's word, else what the number allows."""
        if subject.time_zone is not None:
            return (subject.time_zone,)
        if memo.zones is None:
            memo.zones = zones_for(subject.party.value)
        return memo.zones

    def _until(self, quiet_s: int | None, exemption: _Exemption | None) -> Verdict:
        """Return that marketing is cleared: never past the start of quiet hours, nor past the end of what lifts a rule.

        One verdict for equal ones.
        """
        made = self._made.get((quiet_s, exemption))
        if made is None:
            until_s = self._marketing_until_s if quiet_s is None else min(self._marketing_until_s, quiet_s)
            kind = None
            if exemption is not None:
                kind, until_s = exemption.kind, min(until_s, exemption.ends_s - 1)
            made = self._made[quiet_s, exemption] = Verdict(None, not_after_s=until_s, exemption=kind)
        return made

    def _exemption(self, subject: Subject) -> _Exemption | None:
        """Return the exemption in force for an account and person on a channel, or None."""
        if subject.token is None:
            return None
        entries = self._exemptions.get(subject.token)
        if entries is None:
            return None
        ends_s = in_force(entries, subject.account_id, subject.channel, self._now_s)
        return next((_Exemption(kind, max(ends_s.values())) for kind in EXEMPTION_KINDS if kind in ends_s), None)

    def _allows(self, account: Account, subject: Subject, regions: frozenset[str]) -> bool:
        """Return whether the destination is in an account's allow list, by its record and by its digits (CAL-11).

        A country that cannot be told is not; where the digits leave several, the record may tell which.
        """
        allowed = self._allowed.get(account.id)
        if allowed is None:
            allowed = self._allowed[account.id] = frozenset(account.countries or ())
        country = subject.country
        if country is not None and country not in allowed:
            return False
        if subject.party.kind is not _NUMBER:
            return country is not None
        return (country in regions and len(regions) > 1) or (bool(regions) and regions <= allowed)


def _answers(number: str, country: str | None, regions: frozenset[str], lists: _Lists) -> tuple[Answer, ...]:
    """Return what the registries say of an E.164 number, in the order of the policy.

    A registry is asked if the number may be in its country, or the record says so: neither may hide it.
    """
    return tuple(
        [
            one.listed if one.lists is not None and one.lists(number) else one.otherwise
            for one in lists.lists
            if (one.country in regions or one.country == country) and number.startswith(one.prefix)
        ]
    )


class _Nobody:
    """A view without entries: as exemptions, the stricter one."""

    __slots__ = ()

    def get(self, token: bytes) -> Entries | None:  # noqa: ARG002 — of nobody
        """Return None: there are no entries."""
        return None


NOBODY: View = _Nobody()
"""A view without entries."""


def _refuse(
    reason: str,
    rule: str,
    clause: str,
    trace: Trace,
    *,
    codes: Mapping[str, int] | None = None,
    defer_until_s: int | None = None,
) -> Verdict:
    if trace is not None:
        trace.append(Asked(rule, clause, REFUSE))
    return Verdict(reason, clause, codes, None, defer_until_s)


def in_force(exemptions: Entries, account_id: str, channel: str, now_s: int) -> dict[str, int]:
    """Return the exemptions of a person that lift rules for an account on a channel: kind → when it ends (Unix s)."""
    scope = f"account:{account_id}"
    return {
        rule.class_: state.event_s
        for rule, state in exemptions.items()
        if state.out and now_s < state.event_s and rule.channel == channel and rule.scope == scope
    }


def suppressed(subject: Subject, view: View, blocked: Mapping[str, Container[str]], now_s: int) -> Verdict | None:
    """Return the refusal if an opt-out or officer block of this person forbids this purpose on this channel.

    `blocked`: the purposes that an opt-out of each class blocks. An opt-out beats a block, but where both stand there
    is nothing to confirm.
    """
    if subject.token is None or not subject.scopes:
        return None
    entries = view.get(subject.token)
    if entries is None:
        return None
    by_officer, opted_out_s = False, None
    for rule, state in entries.items():
        if not state.out or rule.channel != subject.channel or rule.scope not in subject.scopes:
            continue
        if subject.purpose not in blocked[rule.class_]:
            continue
        if rule.authority != "person":
            by_officer = True
        elif opted_out_s is None or state.event_s > opted_out_s:
            opted_out_s = state.event_s
    if opted_out_s is None:
        return Verdict("blocked_by_officer", "KAL-5", GATEWAY_CODES) if by_officer else None
    recent = subject.channel == "sms" and not by_officer and now_s - opted_out_s <= CONFIRMATION_S
    return Verdict("opted_out", "KAL-5", GATEWAY_CODES, confirmation=recent)


def blocked_by(policy: Policy) -> dict[str, frozenset[str]]:
    """Return the purposes that an opt-out of each class blocks, by class (KAL-5)."""
    return {class_: frozenset(policy.blocked_by(class_)) for class_ in get_args(SuppressionClass)}
