"""The plan for an account's records of one quarter of an hour: everything about their outputs that is constant.

Owners and key epochs, deadlines, privacy objects, headers and envelopes depend on the policy, the account and the
time only, so they are rendered once and looked up per record.
"""

from copy import copy
from datetime import UTC, date, datetime

import orjson

from processors.keyring import EpochRef, PersonRef
from processors.retention import DAY_S, Calendar, Moment, content_expires_s, instant
from processors.roles import Tags, headers, privacy_object, tags
from processors.screen.suppression import Tokens
from processors.screen.verdict import Memo
from schemas.catalog import CATALOG, Domain
from schemas.fields import PLATFORM, Party, is_normal, normalise
from schemas.outbound import Headers
from schemas.policy import Account, Policy
from schemas.sealed import split_envelope

MAX_PLANS = 8192
MAX_CIRCLES = 256
MAX_MET = 65_536
MIN_DIGITS = 8
"""Characters of the shortest address that a record id is searched for."""
REVIEW_DAYS = 30
_SLOT_S = 900
_HOUR_S = 3600


class Template:
    """The constant parts of one stream's values of an account: key epoch, owner, deadline, headers, privacy object.

    Those that a plan holds also have the circle they are about, and group, log timestamp and clear envelope (all but
    the parts) of each value.
    """

    __slots__ = (
        "account", "at_ms", "circle", "deadline_s", "group", "head", "headers", "owner", "privacy", "ref", "stream",
        "tail",
    )  # fmt: skip

    circle: "Circle"
    group: str
    at_ms: int
    head: bytes
    tail: bytes

    def __init__(
        self, stream: str, account: str, ref: EpochRef | None, deadline_s: int | None, tag: Tags, privacy: bytes
    ) -> None:
        self.stream = stream
        self.account = account
        self.ref = ref
        self.owner = "" if ref is None else ref.owner
        self.deadline_s = deadline_s
        self.headers: Headers = headers(tag)
        self.privacy = privacy

    def envelope(self, **fields: object) -> tuple[bytes, bytes]:
        """Return head and tail of the clear envelope with these fields beside `privacy`."""
        return split_envelope({**fields, "privacy": orjson.Fragment(self.privacy)})

    def about(self, circle: "Circle", group: str, at_ms: int, head: bytes = b"", tail: bytes = b"") -> "Template":
        """Return this template for a circle: with what its values have in common beyond the stream and the account."""
        one = copy(self)
        one.circle, one.group, one.at_ms, one.head, one.tail = circle, group, at_ms, head, tail
        return one


class Met:
    """A party as an account's records of one month know it: if it is a person, the token and the secrets by owner.

    `digits`: those of a person's number, which a record id must not spell out. `memo`: what screening knows of it.
    """

    __slots__ = ("account", "digits", "memo", "party", "platform", "token")

    def __init__(self, party: Party, token: bytes | None, account_id: str, month: str) -> None:
        self.party = party
        self.memo: Memo | None = None
        self.digits = party.value[1:] if party.is_person and len(party.value) >= MIN_DIGITS else ""
        self.token = token
        self.account = None if token is None else PersonRef(account_id, token, month)
        self.platform = None if token is None else PersonRef(PLATFORM, token, month)

    def __repr__(self) -> str:
        return "Met()"

    def ref(self, template: Template) -> PersonRef | None:
        """Return the secret that seals a template's values about this party, or None if it is no person."""
        return self.platform if template.owner == PLATFORM else self.account


class Circle:
    """Whom an account's records of one month were about lately, and until when secrets are needed, by owner.

    `met` is by address in its normal form.
    """

    __slots__ = ("account_id", "deadlines_s", "met", "month")

    def __init__(self, account_id: str, month: str) -> None:
        self.account_id = account_id
        self.month = month
        self.met: dict[str, Met] = {}
        self.deadlines_s: dict[str, int] = {}

    def keep_until(self, owner: str, deadline_s: int) -> None:
        """Have an owner's secrets kept at least until `deadline_s`."""
        self.deadlines_s[owner] = max(deadline_s, self.deadlines_s.get(owner, deadline_s))


class Plan:
    """One account, one quarter of an hour. `content` is None where the account has its content never stored."""

    __slots__ = (
        "account", "anonymous", "circle", "content", "content_expires_s", "increment_s", "moment", "period", "pii",
        "review", "review_expires_s",
    )  # fmt: skip

    account: Account
    moment: Moment
    period: str  # account, coarse instant, deadlines: with equal clear values, equal anonymous records
    content_expires_s: int
    review_expires_s: int
    pii: Template
    content: Template | None
    review: Template
    anonymous: Template
    circle: Circle
    increment_s: int


class Planner:
    """Makes plans from a policy and keeps the recent ones."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calendar = Calendar(policy)
        self._plans: dict[tuple[str, int], Plan | None] = {}
        self._days: dict[tuple[str, str, str, int], Plan] = {}
        self._met = 0
        self._circles: dict[tuple[str, str], Circle] = {}
        self._outputs: dict[tuple[str, str, int], Template] = {}

    def plan(self, account_id: str, ts: int) -> Plan | None:
        """Return the plan for a record of an account at Unix second `ts`, or None if the policy does not list it."""
        slot = (account_id, ts // _SLOT_S)
        try:
            return self._plans[slot]
        except KeyError:
            pass
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        account = self.policy.account(account_id)
        made = self._plans[slot] = None if account is None else self._make(account_id, account, ts)
        return made

    def meet(self, plan: Plan, raw: str, country: str | None, tokens: Tokens) -> Met:
        """Return the party behind an address as a gateway wrote it, in a record of `country`.

        Remembered by normal form until too many are, so that `plan.circle.met.get(raw)` is the same, only sooner.
        """
        circle = plan.circle
        party = normalise(raw, plan.account.default_region or country)
        known = circle.met.get(party.value)
        if known is not None and known.party == party:
            return known
        token = tokens.of(party.value) if party.is_person and party.value not in plan.account.own else None
        met = Met(party, token, circle.account_id, circle.month)
        if is_normal(raw, party):
            if self._met >= MAX_MET:
                for full in self._circles.values():
                    full.met.clear()
                self._met = 0
            self._met += 1
            circle.met[raw] = met
        return met

    def output(self, stream: str, account_id: str, now_s: int) -> Template:
        """Return the template of a stream whose life counts from now: verdicts, cleared, quarantine, suppressions."""
        row = CATALOG[stream]
        slot = (stream, account_id, now_s // (_HOUR_S if row.domain is Domain.TRANSIT else DAY_S))
        found = self._outputs.get(slot)
        if found is None:
            if len(self._outputs) >= MAX_PLANS:
                self._outputs.clear()
            found = self._outputs[slot] = self._output(stream, account_id, now_s)
        return found

    def until(self, stream: str, account_id: str, now_s: int, ends_s: int) -> Template:
        """Return the template of a stream whose records say themselves when they end: at Unix second `ends_s`.

        Their key is the owner's, of the month in which that is, and dies with it. Made anew: keep it for a batch.
        Raises PolicyInvalid if the policy has no rule for the stream's data class.
        """
        row, moment = CATALOG[stream], self.calendar.moment(ends_s - 1)
        if row.domain is None:
            raise ValueError("what is not sealed has no key")
        tag = tags(self.policy, account_id, row.data_class, _day(now_s))
        ref = EpochRef(row.domain.value, _owner(tag, account_id), moment.month_epoch)
        return self._template(stream, account_id, ref, moment.month_end_s, tag)

    def _output(self, stream: str, account_id: str, now_s: int) -> Template:
        row = CATALOG[stream]
        moment = self.calendar.moment(now_s)
        unit_s = _HOUR_S if row.domain is Domain.TRANSIT else DAY_S
        deadline_s: int | None
        if row.max_hours is not None:
            deadline_s = now_s // unit_s * unit_s + row.max_hours * _HOUR_S
        else:
            deadline_s = self.calendar.created_deadline_s(row.data_class, now_s)
        tag = tags(self.policy, account_id, row.data_class, _day(now_s), to_account=stream == "verdicts")
        owner = PLATFORM
        if row.domain is Domain.TRANSIT:
            owner = _owner(tag, account_id)
        epoch = {
            Domain.TRANSIT: moment.hour_epoch,
            Domain.QUARANTINE: moment.day_epoch,
            Domain.SUPPRESSION: "-",
        }.get(row.domain or Domain.PII, "")
        ref = EpochRef(row.domain.value, owner, epoch) if row.domain is not None else None
        return self._template(stream, account_id, ref, deadline_s, tag)

    def _make(self, account_id: str, account: Account, ts: int) -> Plan:
        """Return the plan of a slot: that of its day, at its moment."""
        moment = self.calendar.moment(ts)
        day = (account_id, moment.day_epoch, moment.month_epoch, moment.anonymous_expires_s)
        whole_day = self._days.get(day)
        if whole_day is None:
            if len(self._days) >= MAX_PLANS:
                self._days.clear()
            whole_day = self._days[day] = self._make_day(account_id, account, ts)
        plan = copy(whole_day)
        plan.moment = moment
        plan.period = f"{moment.coarse}|{account_id}|{moment.pii_expires_s}|{moment.anonymous_expires_s}"
        return plan

    def _make_day(self, account_id: str, account: Account, ts: int) -> Plan:
        moment = self.calendar.moment(ts)
        keep_days = self.policy.content_days(account)
        plan = Plan()
        plan.account = account
        plan.increment_s = self.policy.increment_s(account)
        traffic = tags(self.policy, account_id, "traffic", _day(ts))
        content = tags(self.policy, account_id, "content", _day(ts))
        anonymous = tags(self.policy, account_id, "anonymous", _day(ts))
        pii_owner = _owner(traffic, account_id)
        plan.circle = self._circle(account_id, moment.month_epoch)
        plan.circle.keep_until(pii_owner, moment.pii_expires_s)
        plan.circle.keep_until(_owner(content, account_id), self.calendar.account_secret_deadline_s(ts, keep_days))
        for owner in (PLATFORM, account_id):  # transit is sealed for whoever owns it on the day of the verdict
            plan.circle.keep_until(owner, self.calendar.account_secret_deadline_s(ts, None))
        pii_ref = EpochRef(Domain.PII, pii_owner, moment.month_epoch)
        pii = self._template("cdr.pii", account_id, pii_ref, moment.pii_expires_s, traffic)
        envelope = pii.envelope(account_id=account_id, month=moment.month_epoch)
        plan.pii = pii.about(plan.circle, "primary", moment.day_ms, *envelope)
        owner = _owner(content, account_id)
        plan.content = None
        plan.content_expires_s = 0
        if keep_days is not None:
            ref = EpochRef(Domain.CONTENT, owner, moment.day_epoch)
            plan.content_expires_s = content_expires_s(ts, keep_days)
            kept = self._template("content", account_id, ref, plan.content_expires_s, content)
            envelope = kept.envelope(account_id=account_id, day=moment.day_epoch)
            plan.content = kept.about(plan.circle, "content", moment.day_ms, *envelope)
        review_days = REVIEW_DAYS if keep_days is None else min(keep_days, REVIEW_DAYS)
        review_ref = EpochRef(Domain.REVIEW, owner, moment.day_epoch)
        plan.review_expires_s = content_expires_s(ts, review_days)
        review = self._template("review", account_id, review_ref, plan.review_expires_s, content)
        envelope = review.envelope(account_id=account_id, day=moment.day_epoch)
        plan.review = review.about(plan.circle, "review", moment.day_ms, *envelope)
        plan.anonymous = self._template(
            "cdr.anonymous",
            account_id,
            None,
            moment.anonymous_expires_s,
            anonymous,
            anonymous_from=instant(moment.pii_expires_s),
        )
        return plan

    def _circle(self, account_id: str, month: str) -> Circle:
        found = self._circles.get((account_id, month))
        if found is None:
            if len(self._circles) >= MAX_CIRCLES:
                self._circles.clear()
                self._days.clear()
                self._plans.clear()
            found = self._circles[account_id, month] = Circle(account_id, month)
        return found

    def _template(
        self,
        stream: str,
        account_id: str,
        ref: EpochRef | None,
        deadline_s: int | None,
        tag: Tags,
        *,
        anonymous_from: str | None = None,
    ) -> Template:
        expires_at = None if deadline_s is None else instant(deadline_s)
        privacy = orjson.dumps(privacy_object(tag, expires_at, anonymous_from), option=orjson.OPT_SORT_KEYS)
        return Template(stream, account_id, ref, deadline_s, tag, privacy)


def _owner(tag: Tags, account_id: str) -> str:
    """Return who owns the keys: the platform for what it controls, the account for what it processes for it."""
    return PLATFORM if tag.role == "controller" else account_id


def _day(ts: int) -> date:
    return datetime.fromtimestamp(min(max(ts, -(10**10)), 10**11), UTC).date()
