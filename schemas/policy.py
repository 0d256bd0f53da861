"""The policy language: a TOML document of rules, each citing a clause of CLAUSES.md, and what it answers.

Rules of this file: text in, frozen values out; nothing is read, not even the clock. A document that is wrong,
or that contradicts itself, is refused with the line of the fault and with what is allowed. No message shows a
telephone number. The arithmetic of instants is in processors/retention.py; here are only calendar dates.
"""

import re
import tomllib
from calendar import monthrange
from collections.abc import Iterator, Sequence
from datetime import date, time, timedelta
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo

import msgspec
from phonenumbers import SUPPORTED_REGIONS

from schemas.errors import PolicyInvalid
from schemas.fields import PLATFORM, is_account, is_code
from schemas.inbound import Channel, Purpose, SuppressionClass, SuppressionScope
from schemas.languages import is_assent, languages

CLAUSES = frozenset(
    f"{family}-{number}"
    for family, count in (("INF", 15), ("KAL", 9), ("CAL", 14), ("REG", 5))
    for number in range(1, count + 1)
)
"""Every clause a rule may cite."""

UNTIL_LIFTED = "until lifted"
NEVER = ("never", "never stored")
MAX_EXEMPT_MONTHS = 60
"""No exemption, be it by consent, lasts longer than this after it was given."""

Role = Literal["controller", "processor"]
DataClass = Literal[
    "content", "traffic", "anonymous", "usage", "suppression", "unclassified", "audit", "held", "behavioural",
    "account", "account_individual", "support", "contact_list", "identity_verification", "documents",
]  # fmt: skip
REQUIRED_CLASSES = ("content", "traffic", "anonymous", "usage", "suppression", "unclassified", "audit")
"""Data classes that need exactly one processing rule; the others may have one."""

After = Literal["end of day", "end of month", "end of year", "event"]
ExemptionKind = Literal["consent", "purchase", "inquiry"]
"""What an exemption rests on; of several in force the first of these is named."""
Event = Literal["communication", "creation", "termination", "relationship_end"]


class _Form(NamedTuple):
    pattern: str
    words: str


_NAME = _Form(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z", "1 to 64 letters, digits, '_', '.', '-'")
_WORD = _Form(r"^[a-z][a-z0-9_]{0,39}\Z", "1 to 40 small letters, digits, '_'")
_PLACE = _Form(r"^[A-Z]{2}(-[A-Z0-9]{1,3})?\Z", "a jurisdiction such as 'EU', 'CH', 'US-CA'")
_COUNTRY = _Form(r"^[A-Z]{2}\Z", "an ISO 3166-1 alpha-2 code such as 'DE'")
_E164 = _Form(r"^\+[1-9][0-9]{6,14}\Z", "an E.164 number: '+', country code, 7 to 15 digits in all")
_CALLING = _Form(r"^[1-9][0-9]{0,3}\Z", "a country calling code without '+', such as '1'")
_CLOCK = _Form(r"^([01][0-9]|2[0-3]):[0-5][0-9]\Z", "a local time in quotes such as '21:00'")
_REFERENCE = _Form(r"^[A-Za-z0-9][A-Za-z0-9 _./-]{0,79}\Z", "1 to 80 letters, digits, ' ', '_', '.', '/', '-'")
_LANGUAGE = _Form(r"^[a-z]{2,3}\Z", "an ISO 639 code of a language that ships keywords, such as 'fr'")
_KEYWORD = _Form(r"^(?=.*\w)\S+( \S+){0,7}\Z", "a message of 1 to 8 words, 40 characters in all")
_FORMS = (_LANGUAGE, _KEYWORD, _NAME, _WORD, _PLACE, _COUNTRY, _E164, _CALLING, _CLOCK, _REFERENCE)

Name = Annotated[str, msgspec.Meta(pattern=_NAME.pattern)]
Word = Annotated[str, msgspec.Meta(pattern=_WORD.pattern)]
Jurisdiction = Annotated[str, msgspec.Meta(pattern=_PLACE.pattern)]
Country = Annotated[str, msgspec.Meta(pattern=_COUNTRY.pattern)]
Number = Annotated[str, msgspec.Meta(pattern=_E164.pattern)]
CallingCode = Annotated[str, msgspec.Meta(pattern=_CALLING.pattern)]
Clock = Annotated[str, msgspec.Meta(pattern=_CLOCK.pattern)]
Reference = Annotated[str, msgspec.Meta(pattern=_REFERENCE.pattern)]
Increment = Annotated[int, msgspec.Meta(ge=1, le=3600)]
Minutes = Annotated[int, msgspec.Meta(ge=1, le=1440)]
MarketingMinutes = Annotated[int, msgspec.Meta(ge=1, le=15)]
Days = Annotated[int, msgspec.Meta(ge=1, le=366)]
Months = Annotated[int, msgspec.Meta(ge=0, le=MAX_EXEMPT_MONTHS)]
Words = Annotated[tuple[Word, ...], msgspec.Meta(min_length=1)]
Channels = Annotated[tuple[Channel, ...], msgspec.Meta(min_length=1)]
Language = Annotated[str, msgspec.Meta(pattern=_LANGUAGE.pattern)]
Countries = Annotated[tuple[Country, ...], msgspec.Meta(min_length=1)]
Keyword = Annotated[str, msgspec.Meta(pattern=_KEYWORD.pattern, max_length=40)]


# --- how long: periods and dates ----------------------------------------------------------------------------


class Period(msgspec.Struct, frozen=True):
    """A number of calendar days, months or years."""

    count: int
    unit: Literal["days", "months", "years"]

    def after(self, day: date) -> date:
        """Return the date one period after a date, clamped to the end of the month and to the year 9999."""
        if self.unit == "days":
            return date.fromordinal(min(day.toordinal() + self.count, date.max.toordinal()))
        months = self.count * (12 if self.unit == "years" else 1)
        year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
        if year > date.max.year:
            return date.max
        return date(year, month + 1, min(day.day, monthrange(year, month + 1)[1]))


_KEEP = re.compile(r"([1-9][0-9]{0,3}) (day|month|year)s?")
_UNITS: dict[str, Literal["days", "months", "years"]] = {"day": "days", "month": "months", "year": "years"}


@lru_cache(maxsize=256)
def parse_keep(text: str) -> Period | None:
    """Return the period of a text such as `12 months`; None: until lifted. Raises ValueError if neither."""
    if text == UNTIL_LIFTED:
        return None
    match = _KEEP.fullmatch(text)
    if match is None:
        raise ValueError("keep must be '<1 to 9999> days', 'months' or 'years', or 'until lifted'")
    return Period(int(match[1]), _UNITS[match[2]])


@lru_cache(maxsize=256)
def parse_content_keep(text: str) -> int | None:
    """Return the days that content is kept; None: never stored. Raises ValueError if it is neither."""
    if text in NEVER:
        return None
    match = _KEEP.fullmatch(text)
    if match is None or match[2] != "day":
        raise ValueError("content is kept '<1 to 9999> days' or 'never'")
    return int(match[1])


# --- the document -------------------------------------------------------------------------------------------


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the document."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Platform(_Table, frozen=True, kw_only=True):
    """The company that runs this: its name as controller or processor, and where it is."""

    name: Name = PLATFORM
    jurisdiction: Jurisdiction | None = None


class Processing(_Table, frozen=True, kw_only=True):
    """The platform's role for a data class, on which legal basis, for which purposes (INF-1, INF-3)."""

    data_class: DataClass
    role: Role
    legal_basis: Word
    purposes: Words
    clause: str


class Retention(_Table, frozen=True, kw_only=True):
    """How long a data class is kept, counted from the event or from the end of its day, month or year."""

    data_class: DataClass
    keep: str
    after: After
    event: Event
    clause: str

    @property
    def period(self) -> Period | None:
        """The period; None: until lifted."""
        return parse_keep(self.keep)

    def dead_on(self, day: date) -> date | None:
        """Return the first date on which it is dead, for an event on `day`; None: no deadline.

        Both dates are of the policy's time zone. With `after = "event"` it dies in the course of that date.
        """
        period = self.period
        if period is None:
            return None
        start = day
        if self.after == "end of month":
            start = day.replace(day=monthrange(day.year, day.month)[1])
        elif self.after == "end of year":
            start = day.replace(month=12, day=31)
        if self.after != "event":
            start = date.fromordinal(min(start.toordinal() + 1, date.max.toordinal()))
        return period.after(start)


class Content(_Table, frozen=True, kw_only=True):
    """How long content is kept where the account says nothing: days after the day of the communication."""

    keep: str
    clause: str


class Coarsening(_Table, frozen=True, kw_only=True):
    """How exact the time of an anonymous record is."""

    time: Literal["hour", "day"]
    clause: str


class Billing(_Table, frozen=True, kw_only=True):
    """The billing increment of voice, in seconds, where the account has none."""

    voice_increment_s: Increment
    clause: str


class OptoutBlocks(_Table, frozen=True, kw_only=True):
    """The purposes that an opt-out of each class blocks."""

    all: tuple[Purpose, ...] = get_args(Purpose)
    marketing: tuple[Purpose, ...] = ("marketing",)
    service: tuple[Purpose, ...] = ("service", "transactional")
    clause: str


class KeywordRule(_Table, frozen=True, kw_only=True):
    """What a keyword such as STOP does: scope, class and channels of the opt-out."""

    scope: SuppressionScope = "account"
    class_: SuppressionClass = msgspec.field(default="all", name="class")
    channels: Channels = ("sms", "voice")
    clause: str


class RevokeAll(_Table, frozen=True, kw_only=True):
    """From when on a keyword revokes everything: account scope, class all, every channel (47 CFR 64.1200(a)(10)).

    `from`: the first such date, in the policy's time zone. Whom it covers is told by the person's number.
    """

    from_: date = msgspec.field(name="from")
    countries: Countries
    clause: str


class ExtraKeywords(_Table, frozen=True, kw_only=True):
    """Whole-message keywords beyond the built-in ones."""

    opt_out: tuple[Keyword, ...] = ()
    opt_in: tuple[Keyword, ...] = ()
    clause: str


class Languages(_Table, frozen=True, kw_only=True):
    """The languages whose keywords act, each a data file of schemas/keywords; English always does."""

    codes: Annotated[tuple[Language, ...], msgspec.Meta(min_length=1)]
    clause: str


class RegistryRule(_Table, frozen=True, kw_only=True):
    """A Do-Not-Call list. Older than `max_age_days` refuses marketing; so does a missing `required` one."""

    name: Name
    country: Country
    calling_code: CallingCode
    channels: Channels
    max_age_days: Days
    required: bool = False
    clause: str


class ExemptionTerms(_Table, frozen=True, kw_only=True):
    """For how many months a purchase or an inquiry lets an account market to a country's listed numbers.

    0: it does not. Consents last as long as each says, and at most `MAX_EXEMPT_MONTHS`.
    """

    country: Country
    purchase_months: Months
    inquiry_months: Months
    clause: str


class QuietHours(_Table, frozen=True, kw_only=True):
    """When marketing is refused: local times `HH:MM` at the recipient; `end` is the first minute allowed."""

    start: Clock
    end: Clock
    countries: Countries
    clause: str

    @property
    def start_time(self) -> time:
        """The first quiet minute, local time."""
        return time.fromisoformat(self.start)

    @property
    def end_time(self) -> time:
        """The first minute that is no longer quiet, local time."""
        return time.fromisoformat(self.end)


class NotAfterMinutes(_Table, frozen=True, kw_only=True):
    """How long after its verdict a cleared request may still go out, in minutes per purpose."""

    marketing: MarketingMinutes = 15
    transactional: Minutes = 60
    otp: Minutes = 10
    service: Minutes = 60
    clause: str


class Screening(_Table, frozen=True, kw_only=True):
    """What may vary in screening; the order of the rules, and children, are fixed."""

    optout_blocks: OptoutBlocks = OptoutBlocks(clause="KAL-5")
    keyword: KeywordRule = KeywordRule(clause="REG-3")
    languages: Languages | None = None
    extra_keywords: ExtraKeywords | None = None
    revoke_all: RevokeAll | None = None
    registry: tuple[RegistryRule, ...] = ()
    exemption: tuple[ExemptionTerms, ...] = ()
    quiet_hours: QuietHours | None = None
    not_after_minutes: NotAfterMinutes = NotAfterMinutes(clause="REG-3")


class Accounts(_Table, frozen=True, kw_only=True):
    """Whether an account that is not listed is served."""

    any: bool
    clause: str = "CAL-2"


class RoleOverride(_Table, frozen=True, kw_only=True):
    """Another role of the platform for a data class, by agreement: `from` ≤ day < `until` (KAL-1)."""

    data_class: DataClass
    role: Role
    agreement: Reference
    from_: date = msgspec.field(name="from")
    until: date | None = None
    clause: str

    def covers(self, day: date) -> bool:
        """Return whether the agreement holds on a day."""
        return self.from_ <= day and (self.until is None or day < self.until)

    def overlaps(self, other: "RoleOverride") -> bool:
        """Return whether both speak about one day of one data class."""
        return (
            self.data_class == other.data_class
            and (other.until is None or self.from_ < other.until)
            and (self.until is None or other.from_ < self.until)
        )


class Account(_Table, frozen=True, kw_only=True, dict=True):
    """An account: what it instructs where that differs from the policy.

    `content` and `voice_increment_s` None: the policy's (`Policy.content_days`, `Policy.increment_s`).
    `countries` None: all (CAL-11). `acts_as`: its own role towards its end users. `role`: agreements (KAL-1).
    """

    id: str
    name: Reference | None = None
    content: str | None = None
    own_numbers: tuple[Number, ...] = ()
    countries: tuple[Country, ...] | None = None
    voice_increment_s: Increment | None = None
    default_region: Country | None = None
    jurisdiction: Jurisdiction | None = None
    acts_as: Role = "controller"
    role: tuple[RoleOverride, ...] = ()
    clause: str | None = None

    @cached_property
    def own(self) -> frozenset[str]:
        """The account's own numbers (E.164), which are no person's."""
        return frozenset(self.own_numbers)


class Policy(_Table, frozen=True, kw_only=True, dict=True):
    """A valid policy. Made by `parse_policy` only, so that a policy in hand is one without contradictions."""

    version: Literal[1]
    name: Name
    revision: Name | Annotated[int, msgspec.Meta(ge=0)]
    timezone: str = "UTC"
    platform: Platform = Platform()
    adequate: tuple[Jurisdiction, ...] = ()
    processing: tuple[Processing, ...]
    retention: tuple[Retention, ...]
    content: Content
    coarsening: Coarsening
    billing: Billing
    screening: Screening = Screening()
    accounts: Accounts
    listed: tuple[Account, ...] = msgspec.field(default=(), name="account")

    def __repr__(self) -> str:
        return f"Policy({self.id})"

    @property
    def id(self) -> str:
        """`name/revision`, as it stands in the records made under it."""
        return f"{self.name}/{self.revision}"

    @property
    def rule_count(self) -> int:
        """How many rules it has: tables that cite a clause."""
        return sum(1 for _ in _cited((), self))

    @cached_property
    def zone(self) -> ZoneInfo:
        """The time zone in which months and years are counted."""
        return ZoneInfo(self.timezone)

    @cached_property
    def _processing(self) -> dict[str, Processing]:
        return {rule.data_class: rule for rule in self.processing}

    @cached_property
    def _retention(self) -> dict[str, Retention]:
        return {rule.data_class: rule for rule in self.retention}

    @cached_property
    def _accounts(self) -> dict[str, Account]:
        return {account.id: account for account in self.listed}

    @cached_property
    def _registries(self) -> dict[str, tuple[RegistryRule, ...]]:
        return {
            channel: tuple(rule for rule in self.screening.registry if channel in rule.channels)
            for channel in get_args(Channel)
        }

    def account(self, account_id: str) -> Account | None:
        """Return an account, unlisted ones with the policy's defaults; None: it is not to be served. O(1)."""
        found = self._accounts.get(account_id)
        if found is None and self.accounts.any and account_id != PLATFORM and is_account(account_id):
            return Account(id=account_id)
        return found

    def content_days(self, account: Account) -> int | None:
        """Return for how many days after its day an account's content is kept; None: never stored (INF-2)."""
        return parse_content_keep(account.content or self.content.keep)

    def increment_s(self, account: Account) -> int:
        """Return an account's billing increment of voice, in seconds."""
        return account.voice_increment_s or self.billing.voice_increment_s

    def blocked_by(self, class_: str) -> tuple[Purpose, ...]:
        """Return the purposes that an opt-out of a class blocks (KAL-5)."""
        purposes: tuple[Purpose, ...] = getattr(self.screening.optout_blocks, class_)
        return purposes

    @cached_property
    def _not_after_s(self) -> dict[str, int]:
        rule = self.screening.not_after_minutes
        return {purpose: getattr(rule, purpose) * 60 for purpose in get_args(Purpose)}

    def not_after_s(self, purpose: str) -> int:
        """Return for how many seconds after its verdict a cleared request of a purpose may go out."""
        return self._not_after_s[purpose]

    def registries(self, channel: str) -> tuple[RegistryRule, ...]:
        """Return the registries asked on a channel, in the order of the document."""
        return self._registries[channel]

    def exemption_terms(self, country: str) -> ExemptionTerms | None:
        """Return the terms of a country's exemptions; None: a purchase or an inquiry gives none there."""
        return next((terms for terms in self.screening.exemption if terms.country == country), None)

    def revokes_all(self, country: str | None, day: date) -> bool:
        """Return whether a keyword of somebody in a country revokes everything on a day; unknown country: it does."""
        rule = self.screening.revoke_all
        return rule is not None and day >= rule.from_ and (country is None or country in rule.countries)

    def languages(self) -> tuple[str, ...]:
        """Return the codes of the languages whose keywords act beside English."""
        rule = self.screening.languages
        return () if rule is None else rule.codes

    def extra_keywords(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the opt-out and the opt-in keywords beyond the built-in ones."""
        extra = self.screening.extra_keywords
        return ((), ()) if extra is None else (extra.opt_out, extra.opt_in)

    def processing_of(self, data_class: str) -> Processing:
        """Return the processing rule of a data class. Raises PolicyInvalid if the policy has none."""
        rule = self._processing.get(data_class)
        if rule is None:
            raise PolicyInvalid(f"the policy has no processing rule for {data_class}; add one", policy=self.id)
        return rule

    def retention_of(self, data_class: str) -> Retention | None:
        """Return the retention rule of a data class; None: the policy has none."""
        return self._retention.get(data_class)

    def role_of(self, account_id: str, data_class: str, day: date) -> Role:
        """Return the platform's role for an account's data of a class on a day, agreements included (KAL-1).

        Raises PolicyInvalid if the policy has no rule for the class.
        """
        listed = self._accounts.get(account_id)
        if listed is not None:
            for override in listed.role:
                if override.data_class == data_class and override.covers(day):
                    return override.role
        return self.processing_of(data_class).role


# --- reading and refusing -----------------------------------------------------------------------------------

Path = tuple[str | int, ...]


class _Refused(Exception):  # carries a path to parse_policy, which knows the line
    def __init__(self, path: Path, message: str) -> None:
        self.path = path
        self.message = message


_ERROR_LINE = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)
_ERROR_PATH = re.compile(r"(.*?)(?: - at `(?:key in )?\$(.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|(\[\.\.\.\])")
_FIELD = re.compile(r"field `(.*)`")


def parse_policy(text: str, source: str) -> Policy:
    """Return the policy of a TOML text; `source` is its file or pack name for messages.

    Raises PolicyInvalid with one line of what is wrong and what is allowed, and `file` and `line` (from 1).
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _ERROR_LINE.fullmatch(str(error))
        line = int(match[2]) if match and match[2] else text.rstrip("\n").count("\n") + 1
        message = _printable(match[1] if match else str(error))
        raise PolicyInvalid(f"not valid TOML: {message}", file=source, line=line) from None
    except RecursionError:
        raise PolicyInvalid("not valid TOML: nested too deeply", file=source, line=1) from None
    try:
        policy = _convert(document)
        for check in _CHECKS:
            check(policy)
    except _Refused as refused:
        line = Locator(text).line(refused.path)
        raise PolicyInvalid(refused.message, file=source, line=line) from None
    return policy


def _printable(message: str) -> str:
    """Return a parser's message on one line, and without anything that could be a number."""
    return re.sub(r"\d{7,}", "…", " ".join(message.split()))


def _convert(document: dict[str, Any]) -> Policy:
    try:
        return msgspec.convert(document, Policy)
    except msgspec.ValidationError as error:
        match = _ERROR_PATH.fullmatch(str(error))
        what, where = (match[1], match[2] or "") if match else (str(error), "")
        path = _path_of(where)
        raise _refusal(path, what) from None


def _path_of(where: str) -> Path:
    steps: list[str | int] = []
    for name, index, unknown in _STEP.findall(where):
        if unknown:
            break
        steps.append(name or int(index))
    return tuple(steps)


def _refusal(path: Path, what: str) -> _Refused:
    """Return msgspec's complaint in words that say what is allowed, and never the value itself."""
    kind = _kind_at(path)
    field = _FIELD.search(what)
    if field and "unknown" in what and isinstance(kind, msgspec.inspect.StructType):
        shown = f" '{field[1]}'" if is_code(field[1]) else ""
        allowed = ", ".join(sorted(known.encode_name for known in kind.fields))
        return _Refused((*path, field[1]), f"unknown key{shown}; allowed: {allowed}")
    if field and "missing" in what:
        return _Refused(path, f"'{field[1]}' is missing; add it")
    name = next((step for step in reversed(path) if isinstance(step, str)), "the document")
    if isinstance(kind, msgspec.inspect.LiteralType):
        allowed = ", ".join(repr(value) for value in kind.values)
        return _Refused(path, f"'{name}' must be one of {allowed}")
    for form in _FORMS:
        if repr(form.pattern) in what:
            return _Refused(path, f"'{name}' must be {form.words}")
    return _Refused(path, f"'{name}' is wrong: {_printable(what[:1].lower() + what[1:])}")


def _kind_at(path: Path) -> msgspec.inspect.Type:
    kind = _bare(msgspec.inspect.type_info(Policy))
    for step in path:
        if isinstance(kind, msgspec.inspect.VarTupleType):
            kind = _bare(kind.item_type)
        elif isinstance(kind, msgspec.inspect.StructType):
            kind = _bare(next(field.type for field in kind.fields if field.encode_name == step))
    return kind


def _bare(kind: msgspec.inspect.Type) -> msgspec.inspect.Type:
    if isinstance(kind, msgspec.inspect.UnionType):
        return kind.types[0]
    return kind


def _cited(path: Path, value: object) -> Iterator[tuple[Path, str]]:
    """Yield path and clause of every table that cites one."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _cited((*path, index), item)
    elif isinstance(value, _Table):
        clause = getattr(value, "clause", None)
        if clause is not None:
            yield path, clause
        kinds = zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
        for attribute, name in kinds:
            yield from _cited((*path, name), getattr(value, attribute))


def _check_clauses(policy: Policy) -> None:
    for path, clause in _cited((), policy):
        if clause not in CLAUSES:
            allowed = "INF-1 to INF-15, KAL-1 to KAL-9, CAL-1 to CAL-14 or REG-1 to REG-5"
            raise _Refused((*path, "clause"), f"'clause' must be one of {allowed}")


def _check_zone(policy: Policy) -> None:
    try:
        ZoneInfo(policy.timezone)
    except (KeyError, ValueError, OSError):
        raise _Refused(("timezone",), "'timezone' must be an IANA time zone such as 'Europe/Berlin'") from None


def _check_once(rules: Sequence[Processing | Retention], table: str) -> None:
    seen: set[str] = set()
    for index, rule in enumerate(rules):
        if rule.data_class in seen:
            message = f"a second {table} rule for {rule.data_class}; one rule for each data class"
            raise _Refused((table, index, "data_class"), message)
        seen.add(rule.data_class)


def _check_processing(policy: Policy) -> None:
    _check_once(policy.processing, "processing")
    for data_class in REQUIRED_CLASSES:
        if all(rule.data_class != data_class for rule in policy.processing):
            raise _Refused(("processing",), f"no processing rule for {data_class}; add one")


def _check_retention(policy: Policy) -> None:
    _check_once(policy.retention, "retention")
    for index, rule in enumerate(policy.retention):
        try:
            parse_keep(rule.keep)
        except ValueError as error:
            raise _Refused(("retention", index, "keep"), str(error)) from None
        if rule.data_class == "content":
            raise _Refused(("retention", index, "data_class"), "content is kept as [content] and accounts say")
        if rule.data_class == "suppression" and rule.keep != UNTIL_LIFTED:
            raise _Refused(("retention", index, "keep"), f"opt-outs are kept {UNTIL_LIFTED!r}: they outlive all else")
    for data_class, afters in _KEYED.items():
        found = [(index, rule) for index, rule in enumerate(policy.retention) if rule.data_class == data_class]
        if not found:
            raise _Refused(("retention",), f"no retention rule for {data_class}; add one")
        index, rule = found[0]
        if rule.event != "communication":
            raise _Refused(("retention", index, "event"), f"{data_class} is kept from its 'communication'")
        if rule.period is None:
            raise _Refused(("retention", index, "keep"), f"{data_class} must end; give days, months or years")
        if rule.after not in afters:
            allowed = " or ".join(repr(after) for after in afters)
            raise _Refused(("retention", index, "after"), f"for {data_class} 'after' must be {allowed}")
    _check_order(policy)


_KEYED: dict[str, tuple[str, ...]] = {
    "traffic": ("end of month", "end of year"),  # one key a month, so one deadline a month
    "anonymous": ("end of day", "end of month", "end of year"),  # an exact deadline would tell the exact time
}


def _check_order(policy: Policy) -> None:
    rules = {rule.data_class: (index, rule) for index, rule in enumerate(policy.retention)}
    (_, traffic), (index, anonymous) = rules["traffic"], rules["anonymous"]
    for offset in range(4 * 366):  # every date of a leap cycle
        day = date(2024, 1, 1) + timedelta(days=offset)
        personal, remaining = traffic.dead_on(day), anonymous.dead_on(day)
        if personal and remaining and remaining < personal:
            message = "anonymous records would die before their traffic data; keep them as long or longer"
            raise _Refused(("retention", index, "keep"), message)


def _check_content(policy: Policy) -> None:
    keeps: list[tuple[Path, str | None]] = [(("content", "keep"), policy.content.keep)]
    keeps += [(("account", index, "content"), rule.content) for index, rule in enumerate(policy.listed)]
    for path, keep in keeps:
        try:
            parse_content_keep(policy.content.keep if keep is None else keep)
        except ValueError as error:
            raise _Refused(path, str(error)) from None


def _check_screening(policy: Policy) -> None:
    names: set[str] = set()
    for index, registry in enumerate(policy.screening.registry):
        path = ("screening", "registry", index)
        if registry.name in names:
            raise _Refused((*path, "name"), "a second registry of this name; names must differ")
        names.add(registry.name)
        if registry.clause == "REG-2" and registry.max_age_days > 31:
            raise _Refused((*path, "max_age_days"), "'max_age_days' is at most 31 under REG-2")
        _check_countries((*path, "country"), (registry.country,))
    for index, code in enumerate(policy.languages()):
        if code not in languages():
            where = ("screening", "languages", "codes", index)
            raise _Refused(where, f"no keywords ship for this language; those that do: {', '.join(languages())}")
    opt_out, opt_in = policy.extra_keywords()
    for index, word in enumerate(opt_in):
        if is_assent(word) or word.strip().casefold() in {known.casefold() for known in opt_out}:
            where = ("screening", "extra_keywords", "opt_in", index)
            raise _Refused(where, "an opt-in keyword must not be YES, GO or their like, nor an opt-out keyword")
    quiet = policy.screening.quiet_hours
    if quiet is not None:
        if quiet.start == quiet.end:
            raise _Refused(("screening", "quiet_hours", "end"), "quiet hours must not start and end at one time")
        _check_countries(("screening", "quiet_hours", "countries"), quiet.countries)


def _check_countries(path: Path, countries: tuple[str, ...]) -> None:
    for index, country in enumerate(countries):
        if country not in SUPPORTED_REGIONS:
            name = next(step for step in reversed(path) if isinstance(step, str))
            where = (*path, index) if name == "countries" else path
            raise _Refused(where, f"'{name}' must be {_COUNTRY.words}, of a country with telephone numbers")


def _check_accounts(policy: Policy) -> None:
    if not policy.accounts.any and not policy.listed:
        raise _Refused(("accounts", "any"), "no account is served: list accounts, or set any = true")
    seen: set[str] = set()
    for index, rule in enumerate(policy.listed):
        path = ("account", index)
        if rule.id == PLATFORM or not is_account(rule.id):
            raise _Refused((*path, "id"), f"'id' must be {_NAME.words}, and not 'platform'")
        if rule.id in seen:
            raise _Refused((*path, "id"), "a second account of this id; list each account once")
        seen.add(rule.id)
        _check_countries((*path, "countries"), rule.countries or ())
        if rule.default_region is not None:
            _check_countries((*path, "default_region"), (rule.default_region,))
        for number, override in enumerate(rule.role):
            if override.until is not None and override.from_ >= override.until:
                raise _Refused((*path, "role", number, "until"), "'until' must be later than 'from'")
            if any(override.overlaps(earlier) for earlier in rule.role[:number]):
                message = f"two agreements on {override.data_class} for the same days; let one end before the other"
                raise _Refused((*path, "role", number, "from"), message)


_CHECKS = (
    _check_clauses,
    _check_zone,
    _check_processing,
    _check_retention,
    _check_content,
    _check_screening,
    _check_accounts,
)


# --- which line a key stands on -----------------------------------------------------------------------------

_TOKEN = re.compile(
    r'(?P<string>"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\')'
    r"|(?P<skip>[ \t\r\n]+|#[^\n]*)|(?P<mark>[\[\]{}=,])|(?P<bare>[^\s\[\]{}=,#\"']+)",
    re.DOTALL,
)


class Locator:
    """Maps a key path such as `("retention", 1, "keep")` to its line, in a text that tomllib accepts."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []
        line = 1
        for match in _TOKEN.finditer(text):
            if match.lastgroup != "skip":
                self._tokens.append((str(match.lastgroup), match[0], line))
            line += match[0].count("\n")
        self._next = 0
        self._lines: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}
        table: Path = ()
        while self._next < len(self._tokens):
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)

    def line(self, path: Path) -> int:
        """Return the line (from 1) of a path, or of the nearest table around it; 1 if there is none."""
        while path:
            if path in self._lines:
                return self._lines[path]
            path = path[:-1]
        return 1

    def _peek(self, ahead: int = 0) -> str:
        place = self._next + ahead
        return self._tokens[place][1] if place < len(self._tokens) else ""

    def _mark(self, path: Path, line: int) -> None:
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], line)

    def _header(self) -> Path:
        line = self._tokens[self._next][2]
        array = self._peek(1) == "["
        self._next += 2 if array else 1
        path: Path = ()
        names = self._key("]")
        for depth, name in enumerate(names):
            path = (*path, name)
            if path in self._counts and not (array and depth == len(names) - 1):
                path = (*path, self._counts[path] - 1)
        self._next += 1 if array else 0
        if array:
            self._counts[path] = self._counts.get(path, 0) + 1
            path = (*path, self._counts[path] - 1)
        self._mark(path, line)
        return path

    def _key(self, end: str) -> list[str]:
        """Return the names of a dotted key, and go past the mark that ends it."""
        names: list[str] = []
        while self._peek() != end:
            kind, text, _ = self._tokens[self._next]
            names += [text[1:-1]] if kind == "string" else [name for name in text.split(".") if name]
            self._next += 1
        self._next += 1
        return names

    def _pair(self, table: Path) -> None:
        line = self._tokens[self._next][2]
        path = (*table, *self._key("="))
        self._mark(path, line)
        self._value(path)

    def _value(self, path: Path) -> None:
        _, opening, line = self._tokens[self._next]
        self._next += 1
        if opening == "[":
            index = 0
            while self._peek() != "]":
                self._mark((*path, index), self._tokens[self._next][2])
                self._value((*path, index))
                self._next += self._peek() == ","
                index += 1
            self._next += 1
        elif opening == "{":
            while self._peek() != "}":
                self._pair(path)
                self._next += self._peek() == ","
            self._next += 1
        elif self._next < len(self._tokens):  # a date and a time, apart by a space, are one value
            kind, _, following = self._tokens[self._next]
            self._next += kind == "bare" and following == line


# --- in plain words -----------------------------------------------------------------------------------------


class Sentence(NamedTuple):
    """One rule in plain words, and the clause it serves."""

    text: str
    clause: str

    def __str__(self) -> str:
        return f"{self.text} ({self.clause})."


_WORDS: dict[str, str] = {
    "content": "Content (what was said)",
    "traffic": "Traffic data with numbers",
    "anonymous": "Anonymous records",
    "usage": "Usage data",
    "suppression": "Opt-outs",
    "unclassified": "Records that could not be understood",
    "audit": "Audit records",
    "held": "Records under legal hold",
    "behavioural": "Behavioural analytics",
    "account": "Account data",
    "account_individual": "Account data of individuals",
    "support": "Support data",
    "contact_list": "Contact lists",
    "identity_verification": "Identity checks",
    "documents": "Documents",
}
_EVENTS = {
    "communication": "the communication",
    "creation": "it was made",
    "termination": "the agreement's termination",
    "relationship_end": "the end of the relationship",
}


def _listed(items: tuple[str, ...]) -> str:
    texts = [item.replace("_", " ") for item in items] or ["nothing"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _kept(days: int | None) -> str:
    return "is never stored" if days is None else f"is kept {_days(days)} after the day of the communication"


def _days(count: int) -> str:
    return f"{count} day" if count == 1 else f"{count} days"


def explain(policy: Policy) -> list[str]:
    """Return the policy in plain words for a privacy officer; each sentence ends with its clause."""
    return [str(sentence) for sentence in sentences(policy)]


def sentences(policy: Policy) -> Iterator[Sentence]:
    """Yield the policy in plain words, one sentence a rule, with its clause."""
    yield from _roles_in_words(policy)
    yield from _life_in_words(policy)
    yield from _screening_in_words(policy)
    if policy.accounts.any:
        yield Sentence("Any account is served, listed or not", policy.accounts.clause)
    else:
        yield Sentence("Only listed accounts are served; records of others are quarantined", policy.accounts.clause)
    for rule in policy.listed:
        yield from _account_in_words(rule)


def _roles_in_words(policy: Policy) -> Iterator[Sentence]:
    name = policy.platform.name
    for rule in policy.processing:
        what, why = _WORDS[rule.data_class], _listed(rule.purposes)
        basis = rule.legal_basis.replace("_", " ")
        yield Sentence(f"{what}: {name} is {rule.role}, for {why}, on the basis of {basis}", rule.clause)
    if policy.platform.jurisdiction is not None:
        yield Sentence(f"{name} is in {policy.platform.jurisdiction}", "INF-15")
    if policy.adequate:
        yield Sentence(f"Transfers between {_listed(policy.adequate)} need no further mechanism", "CAL-8")


def _life_in_words(policy: Policy) -> Iterator[Sentence]:
    yield Sentence(f"{_WORDS['content']} {_kept(parse_content_keep(policy.content.keep))}", policy.content.clause)
    for rule in policy.retention:
        what = _WORDS[rule.data_class]
        if rule.period is None:
            yield Sentence(f"{what}: kept until lifted", rule.clause)
            continue
        start = _EVENTS[rule.event]
        if rule.after != "event":
            joint = "in which" if rule.event == "creation" else "of"
            start = f"the {rule.after.replace('end of', 'end of the')} {joint} {start}"
        yield Sentence(f"{what}: destroyed {rule.keep} after {start}", rule.clause)
    traffic = policy.retention_of("traffic")
    if traffic is not None:
        yield Sentence(f"Months and years are counted in {policy.timezone}", traffic.clause)
    yield Sentence(f"Anonymous records tell the time to the {policy.coarsening.time}", policy.coarsening.clause)
    yield Sentence(f"Calls are billed in units of {policy.billing.voice_increment_s} s", policy.billing.clause)


def _screening_in_words(policy: Policy) -> Iterator[Sentence]:
    screening = policy.screening
    yield Sentence("A person marked a child is never marketed to", "REG-5")
    clause = screening.optout_blocks.clause
    for class_ in get_args(SuppressionClass):
        yield Sentence(f"An opt-out of class {class_} blocks {_listed(policy.blocked_by(class_))}", clause)
    keyword = screening.keyword
    effect = f"at {keyword.scope} scope, class {keyword.class_}, for {_listed(keyword.channels)}"
    yield Sentence(f"A keyword such as STOP opts out {effect}", keyword.clause)
    if screening.languages is not None:
        codes = screening.languages.codes
        yield Sentence(f"Keywords act in English and in {_listed(codes)}", screening.languages.clause)
    revoke = screening.revoke_all
    if revoke is not None:
        where = f"in {_listed(revoke.countries)}"
        yield Sentence(f"From {revoke.from_} on a keyword {where} opts out of everything of the account", revoke.clause)
    extra = screening.extra_keywords
    if extra is not None:
        for does, words in (("opt out", extra.opt_out), ("opt in", extra.opt_in)):
            if words:
                yield Sentence(f"These messages also {does}: {', '.join(words)}", extra.clause)
    for rule in screening.registry:
        where = f"Marketing by {_listed(rule.channels)} to {rule.country} (+{rule.calling_code})"
        missing = "all of it is refused" if rule.required else "it is not screened by this list"
        yield Sentence(f"{where} is refused to numbers in registry {rule.name}", rule.clause)
        yield Sentence(f"{where} is refused while {rule.name} is older than {_days(rule.max_age_days)}", rule.clause)
        yield Sentence(f"{where}: while {rule.name} is not loaded, {missing}", rule.clause)
    for terms in screening.exemption:
        yield Sentence(
            f"In {terms.country} a purchase lifts registry and quiet hours for {terms.purchase_months} months, an"
            f" inquiry for {terms.inquiry_months}, a written consent as long as it says; none lifts a person's opt-out",
            terms.clause,
        )
    quiet = screening.quiet_hours
    if quiet is not None:
        when = f"from {quiet.start} to {quiet.end} at the recipient's place"
        yield Sentence(f"No marketing {when} in {_listed(quiet.countries)}", quiet.clause)
    limits = tuple(f"{policy.not_after_s(purpose) // 60} min for {purpose}" for purpose in get_args(Purpose))
    yield Sentence(f"A cleared request may be sent within {_listed(limits)}", screening.not_after_minutes.clause)


def _account_in_words(rule: Account) -> Iterator[Sentence]:
    who = f"Account {rule.id}"
    yield Sentence(f"{who} is served, and acts as {rule.acts_as} towards its end users", rule.clause or "CAL-2")
    if rule.content is not None:
        yield Sentence(f"{who}: content {_kept(parse_content_keep(rule.content))}", rule.clause or "INF-2")
    if rule.countries is not None:
        yield Sentence(f"{who} sends to {_listed(rule.countries)} only", rule.clause or "CAL-11")
    if rule.own_numbers:
        yield Sentence(f"{who}: its own numbers, no person's: {len(rule.own_numbers)}", rule.clause or "KAL-3")
    if rule.voice_increment_s is not None:
        yield Sentence(f"{who}: calls are billed in units of {rule.voice_increment_s} s", rule.clause or "INF-3")
    if rule.default_region is not None:
        yield Sentence(f"{who}: national numbers are read as of {rule.default_region}", rule.clause or "KAL-3")
    if rule.jurisdiction is not None:
        yield Sentence(f"{who} is in {rule.jurisdiction}", rule.clause or "INF-15")
    for override in rule.role:
        until = "" if override.until is None else f" until before {override.until}"
        what = f"{who}, {override.data_class.replace('_', ' ')} data"
        since = f"from {override.from_}{until}, by agreement {override.agreement}"
        yield Sentence(f"{what}: the platform is {override.role} {since}", override.clause)
