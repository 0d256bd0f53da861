"""Privacy classes and the bounded types of values: codes, parties (numbers and addresses), money, instants.

Every field of an inbound record carries exactly one `PrivacyClass`; sealing and splitting are derived from it
(processors/split.py). Nothing here does I/O.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, get_type_hints
from urllib.parse import unquote
from zoneinfo import available_timezones

import msgspec
import phonenumbers

PLATFORM = "platform"
"""The owner of what the platform controls; no account may have this name."""

MAX_RECORD_BYTES = 1_000_000
"""A larger inbound record is quarantined unread."""


class PrivacyClass(StrEnum):
    """What a field tells, and therefore where it may go (CAL-14, KAL-3; one class a field)."""

    SHAPE = "shape"  # version and type: how to read the record; sealed with it
    ACCOUNT = "account"  # the customer; clear
    IDENTIFIER = "identifier"  # names one record or campaign; clear in verdicts, never anonymous
    TRAFFIC = "traffic"  # traffic data that billing does not need; only in the sealed record
    BILLING = "billing"  # coarse by nature; may stand in the anonymous record
    TIME = "time"  # an exact instant; only coarsened in the anonymous record
    DURATION = "duration"  # exact seconds; only as billable units in the anonymous record
    PRICE = "price"  # exact money; may stand in the anonymous record
    SENDER = "sender"  # personal data of the sending party
    RECIPIENT = "recipient"  # personal data of the receiving party
    PERSON = "person"  # personal data of the primary person
    CONTENT = "content"  # what was said


def field_class(privacy: PrivacyClass, **bounds: Any) -> msgspec.Meta:
    """Return the `Annotated` metadata that gives a field its class, and its bounds (those of `msgspec.Meta`)."""
    return msgspec.Meta(extra={"privacy": privacy}, **bounds)


class Classified(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A record in which a field without a privacy class cannot be defined."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in cls.__annotations__:
            _class_of(cls, name, cls.__annotations__[name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _class_of(owner: type, name: str, annotation: object) -> PrivacyClass:
    for meta in getattr(annotation, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.extra and "privacy" in meta.extra:
            return PrivacyClass(meta.extra["privacy"])
    raise TypeError(f"field {owner.__name__}.{name} has no privacy class: annotate it with field_class(…)")


def classes_of(*structs: type[Classified]) -> dict[str, PrivacyClass]:
    """Return field → privacy class over record types, which must agree where they share a field."""
    table: dict[str, PrivacyClass] = {}
    for struct in structs:
        for name, annotation in get_type_hints(struct, include_extras=True).items():
            if name.startswith("_"):
                continue
            found = _class_of(struct, name, annotation)
            if table.setdefault(name, found) is not found:
                raise TypeError(f"field {name} has two privacy classes")
    return table


def values_of(names: Iterable[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Return the getter of these fields of a record, as a tuple.

    Compiled: attributes read by name in one expression take half the time of `operator.attrgetter` (a CDR has twenty).
    """
    fields = "".join(f"record.{name}, " for name in names if name.isidentifier())
    getter: Callable[[Any], tuple[Any, ...]] = eval(f"lambda record: ({fields})")  # noqa: S307 — names of our schema
    return getter


# --- codes: short values that may stand in the clear -------------------------------------------------------

_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,31}")
_DIGIT_RUN = re.compile(r"[0-9](?:[._:/-]*[0-9]){6}")
_ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@lru_cache(maxsize=4096)
def is_code(text: str) -> bool:
    """Return whether a text is a code: 1 to 32 characters, no blank, no run of seven digits that could be a number."""
    return _CODE.fullmatch(text) is not None and _DIGIT_RUN.search(text) is None


@lru_cache(maxsize=4096)
def is_account(text: str) -> bool:
    """Return whether a text can name an account: 1 to 64 letters, digits, `_`, `.`, `-`."""
    return _ACCOUNT.fullmatch(text) is not None


def is_record_id(text: str) -> bool:
    """Return whether a text can be a record id: 1 to 128 printable ASCII characters."""
    return 0 < len(text) <= 128 and text.isascii() and text.isprintable()


@lru_cache(maxsize=1)
def _time_zones() -> frozenset[str]:
    return frozenset(available_timezones()) - _NO_ZONES


_NO_ZONES = frozenset({"Factory", "localtime"})
"""Names that computers know and that say nothing."""


def is_time_zone(text: str) -> bool:
    """Return whether a text is the IANA name of a time zone, such as `America/Boise`. The first call reads the disk."""
    return text in _time_zones()


REASON = re.compile(r"[A-Za-z0-9_/-]{1,40}")
"""The letters of a reason: a code or case reference, never free text (the fixed command line)."""

_DIGITS_ONLY = re.compile(r"[_/-]*(?:[0-9][_/-]*){7,}")


def is_reason(text: str) -> bool:
    """Return whether a text is a reason: a code or case reference of 1 to 40 letters, digits, `-`, `_`, `/`.

    Seven digits or more with nothing but separators between are none: reasons stand in the clear, and that could be
    somebody's number. A letter makes a reference of it (`CASE-2026-117`, `INC0012345`).
    """
    return REASON.fullmatch(text) is not None and _DIGITS_ONLY.fullmatch(text) is None


NO_REASON: Final = "the reason must be a code or case reference: at most 40 letters, digits, - _ /, and no number alone"
"""What to say of a text that is none."""


# --- parties ------------------------------------------------------------------------------------------------


class Kind(StrEnum):
    """What a sender or recipient is."""

    NUMBER = "number"  # E.164
    EMAIL = "email"
    SIP = "sip"
    SHORT_CODE = "short_code"
    ALPHANUMERIC = "alphanumeric"
    UNKNOWN = "unknown"  # somebody, but not an address we can normalise
    NOBODY = "nobody"  # withheld or empty


PERSONAL_KINDS = frozenset({Kind.NUMBER, Kind.EMAIL, Kind.SIP, Kind.UNKNOWN})


class Party(msgspec.Struct, frozen=True, gc=False):
    """A normalised sender or recipient; `value` is personal data unless the kind says otherwise.

    `is_person`: a human may stand behind it; an account's own numbers are taken out by the policy.
    """

    kind: Kind
    value: str
    is_person: bool

    def __repr__(self) -> str:
        return f"Party({self.kind.value})"


def _party(kind: Kind, value: str) -> Party:
    return Party(kind, value, kind in PERSONAL_KINDS)


_E164 = re.compile(r"\+[1-9][0-9]{6,14}").fullmatch
_START = re.compile(r"\+[1-9][0-9]{2}").fullmatch
_RECENT = 50_000
_NUMBER = Kind.NUMBER  # Python 3.11 takes 0.09 µs to find a member of an enumeration
_ALIKE_EVERYWHERE = (Kind.NUMBER, Kind.ALPHANUMERIC, Kind.EMAIL)
_recent: dict[str, Party] = {}

NOBODY = _party(Kind.NOBODY, "")
_WITHHELD = frozenset(
    {"anonymous", "unknown", "restricted", "private", "withheld", "unavailable", "<unknown>", "s", "h", "i", "t"}
)
_ALPHANUMERIC = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9 !\"#$%&'()*+,./:;<=>?_-]{1,11}")
_EMAIL = re.compile(r"[^@\s<>\"]{1,64}@[^@\s<>\"]{1,255}")
_IN_BRACKETS = re.compile(r"[^<>]*<([^<>]+)>(?:;.*)?")
_SCHEMES = ("sip:", "sips:", "tel:", "mailto:")
_HOST = re.compile(r"(?=[^;]*[A-Za-z])[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+(?:[:;?].*)?").fullmatch
_PORT = re.compile(r":[0-9]*$")
_CONTEXT = re.compile(r";phone-context=(\+[0-9().\-]+)")
_SEPARATORS = re.compile(r"[\s().\-/\[\]_~\u00b7\u2010-\u2015\u2053\u2212\u223c\u30fb\u30fc]+")
_TRUNK_ZERO = re.compile(r"\(\s*0\s*\)")
_EXTENSION = re.compile(r"(?:[\s,]*(?:extension|extn?\.?|x|доб\.?)[\s.:]*|,+|#)[0-9]{1,7}#?$", re.IGNORECASE)
_PLUSES = re.compile(r"^\++")
_ALIKE = str.maketrans({"\u2795": "+", "\ufe0f": None, "\u20e3": None, "\u3002": "."})
"""What looks like something of ASCII and is not made it by NFKC: a heavy plus, the parts of a keycap, a full stop."""


def normalise(raw: str, region: str | None = None) -> Party:
    """Return the party behind an address as a gateway wrote it; same person, same result.

    `region` (ISO 3166-1 alpha-2) reads national numbers; without one, digits that are a possible international
    number are taken as one. Letters are never read as digits: a name would become somebody's number. Never raises. A
    well-formed `+…` costs 0.2 µs if it was seen lately, else 0.8; anything else goes through the phone-number library
    once (36 µs and more) and then through a bounded cache.
    """
    known = _recent.get(raw)
    if known is not None:
        return known
    start = raw[:4]
    if (_well_formed.get(start) or _form(start))(raw):
        party = Party(_NUMBER, raw, True)  # by place: a keyword takes half as long again
    else:
        party = _normalise_slowly(raw, region)
        if not is_normal(raw, party):
            return party
    if len(_recent) >= _RECENT:
        _recent.clear()
    _recent[raw] = party
    return party


def is_normal(raw: str, party: Party) -> bool:
    """Return whether an address is its own normal form, in which it means the same party in every region."""
    return party.value == raw and party.kind in _ALIKE_EVERYWHERE


_well_formed: dict[str, Callable[[str], object]] = {}
"""First four characters of a number to what matches those in E.164 that surely have no trunk prefix; 900 at most."""


def _form(start: str) -> Callable[[str], object]:
    """Return what matches the numbers in E.164 that begin so; milliseconds once a start, a moment for any other text.

    No national prefix may stand behind the calling code, as in +44 0 20…: such a number goes to the library.
    """
    if not _START(start):
        return _E164  # which it does not match
    code, prefix = start[1:], ""
    for digits in (1, 2, 3):
        if int(start[1 : digits + 1]) in phonenumbers.COUNTRY_CODE_TO_REGION_CODE:
            code = start[1 : digits + 1]
            region = phonenumbers.region_code_for_country_code(int(code))
            metadata = phonenumbers.PhoneMetadata.metadata_for_region_or_calling_code(int(code), region)
            prefix = (metadata and metadata.national_prefix_for_parsing) or ""
            break
    no_prefix = f"(?!(?:{prefix})(?<!^\\+{code}))" if prefix else ""  # the library's pattern may match nothing at all
    found = _well_formed[start] = re.compile(rf"(?=\+[0-9]{{7,15}}\Z)\+{code}{no_prefix}[0-9]*").fullmatch
    return found


@lru_cache(maxsize=16384)
def _normalise_slowly(raw: str, region: str | None) -> Party:
    text = _plain(raw)
    if not text or text.lower() in _WITHHELD:
        return NOBODY
    bracketed = _IN_BRACKETS.fullmatch(text)
    if bracketed is not None:
        text = bracketed[1].strip()
    scheme = next((scheme for scheme in _SCHEMES if text[:7].lower().startswith(scheme)), "")
    if scheme:
        text = _plain(unquote(text[len(scheme) :], errors="replace"))
    if not text or text.lower() in _WITHHELD:
        return NOBODY
    if scheme in ("sip:", "sips:") and ("@" in text or _HOST(text)):
        return _sip(text, region)
    if _EMAIL.fullmatch(text):
        return _party(Kind.EMAIL, _email(text))
    number = _number(text, region)
    if number is not None:
        return number
    if scheme == "tel:" and ";" in text:  # its parameters say no more
        return _normalise_slowly(text.partition(";")[0], region)
    compact = _PLUSES.sub("+", _SEPARATORS.sub("", text))
    if _is_digits(compact) and len(compact) <= 6:
        return _party(Kind.SHORT_CODE, compact)
    if _ALPHANUMERIC.fullmatch(text) and sum(map(str.isdigit, text)) < 7:
        return _party(Kind.ALPHANUMERIC, text)
    if _E164(compact):
        return _party(Kind.NUMBER, compact)
    if _is_digits(compact.removeprefix("+")):
        return _party(Kind.UNKNOWN, compact)
    return _party(Kind.UNKNOWN, _plain(text.lower())) if text else NOBODY


def _plain(text: str) -> str:
    """Return a text in compatible characters, digits as ASCII, nothing invisible in it, and no blank at its ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_ALIKE)
        text = "".join(
            str(unicodedata.decimal(char)) if char.isdecimal() else char
            for char in text
            if char.isascii() or unicodedata.category(char) != "Cf"
        )
        text = unicodedata.normalize("NFKC", text)
    return text.strip()


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _email(text: str) -> str:
    """Return an e-mail address in small letters, the labels of its domain as the DNS has them."""
    local, _, domain = text.lower().rpartition("@")
    labels = domain.rstrip(".").split(".")
    return f"{local}@{'.'.join(map(_label, labels))}"


def _label(label: str) -> str:
    if label.isascii():
        return label
    try:
        return f"xn--{unicodedata.normalize('NFKC', label).encode('punycode').decode()}"
    except UnicodeError:
        return label


def _sip(text: str, region: str | None) -> Party:
    """Return the party of a SIP address: that of the number in front of its `@`, else user and host."""
    user, at, host = text.partition("@")
    if not at:
        user, host = "", user
        found = _number(host, region)
    else:
        found = _number(user, region)
    if found is not None:
        return found
    host = _PORT.sub("", re.split(r"[;?]", host, maxsplit=1)[0])
    name = user.partition(";")[0].partition(":")[0]
    return _party(Kind.SIP, _email(f"{name.strip()}@{host.strip()}") if at else host.lower())


def _number(text: str, region: str | None) -> Party | None:
    context = _CONTEXT.search(text)
    text = _EXTENSION.sub("", text.partition(";")[0])
    if context is not None and not text.lstrip().startswith("+"):
        text = context[1] + text
    compact = _PLUSES.sub("+", _SEPARATORS.sub("", text))
    if not _is_digits(digits := compact.removeprefix("+")) or len(digits) < 7:
        return None
    spellings = [compact]
    if _TRUNK_ZERO.search(text):  # where the zero is no trunk prefix, it may still stand there by habit
        spellings.append(_PLUSES.sub("+", _SEPARATORS.sub("", _TRUNK_ZERO.sub("", text, count=1))))
    possible: Party | None = None
    for candidate, assumed in (reading for spelling in spellings for reading in _readings(spelling, region)):
        try:
            parsed = phonenumbers.parse(candidate, assumed)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(parsed):
            return _party(Kind.NUMBER, phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164))
        if possible is None:
            possible = _unassigned(candidate, parsed, sure=compact.startswith(("+", "00")) and assumed is None)
    return possible


def _unassigned(candidate: str, parsed: phonenumbers.PhoneNumber, *, sure: bool) -> Party | None:
    """Return the party of a number that nobody can have; `sure`: it is written as an international one.

    One in E.164 stays as it stands: taking a zero off could make it somebody's. None: it cannot be a number.
    """
    possible = phonenumbers.is_possible_number_with_reason(parsed) == phonenumbers.ValidationResult.IS_POSSIBLE
    if not (sure or possible):
        return None
    if _E164(candidate):
        return _party(Kind.NUMBER, candidate)
    return (
        None
        if not possible
        else _party(Kind.NUMBER, phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164))
    )


def _readings(compact: str, region: str | None) -> Iterable[tuple[str, str | None]]:
    """Yield the ways to read digits, likeliest first; without `+` or region only ten digits and more."""
    if compact.startswith("+"):
        yield "+" + compact[1:].removeprefix("00"), None
        return
    if compact.startswith("00"):
        yield "+" + compact[2:], None
    if region:
        yield compact, region
    if not compact.startswith("0") and len(compact) >= 10:
        yield "+" + compact, None


# --- money ---------------------------------------------------------------------------------------------------

_AMOUNT = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


@lru_cache(maxsize=8192)
def canonical_amount(text: str) -> str | None:
    """Return an amount as plain digits without needless zeros, or None if it is not 0 or more and in range.

    Range: below 10^9 with at most 9 decimals (finer than any published carrier price).
    """
    if not _AMOUNT.fullmatch(text):
        return None
    amount = Decimal(text)
    return f"{amount.normalize():f}" if amount else "0"
