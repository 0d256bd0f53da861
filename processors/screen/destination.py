"""What the digits of a destination say: whose number it may be, and whether it may be sent to at all (CAL-11).

Rules of this file: the phone-number library's data decide, in patterns made once per calling code; where digits do
not tell the region, every region that shares the calling code is named. Premium-rate ranges and emergency numbers are
forbidden for every purpose: so is a number that begins like one and is longer, for networks drop what follows.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, PhoneMetadata, country_code_for_region

from schemas.fields import Kind, Party

NOWHERE: Final = "001"
"""What the library calls the region of calling codes that belong to no country."""

_NEVER: Final = {"1": r"9(?:00|11)", "44": r"9"}
"""Calling code to how forbidden national numbers begin, whatever their length: all of 900 and 911, and all of 09."""
_SETTLED = ("fixed_line", "mobile")
_UNSETTLED = ("toll_free", "shared_cost", "personal_number", "voip", "pager", "uan", "voicemail")
_FORBIDDEN = ("never", "premium", "longer")
_ANYWHERE_DIGITS = 3
"""Up to so many digits, what is an emergency number anywhere is one everywhere: handsets take it for one."""
_EVERYWHERE = ("112", "911", "999")
"""Emergency numbers that are looked for behind any calling code."""
_DIALLED = re.compile(r"[^\w+]*(\+?[0-9\s().\-/]+)(?=\W|$|(?:x|ext|p|w)\W*[0-9])", re.IGNORECASE).match
"""What is dialled first: before a pause, an extension, or whatever else a gateway may drop."""
_NUMBER, _EMAIL = Kind.NUMBER, Kind.EMAIL


class Place(NamedTuple):
    """What digits say: whether they are never sent to, and in which regions (ISO 3166-1 alpha-2) they may be."""

    forbidden: bool
    regions: frozenset[str]


ANYWHERE: Final = Place(forbidden=False, regions=frozenset())
"""Nothing is known of where it is."""
_BARRED: Final = Place(forbidden=True, regions=frozenset())


class _Plan(NamedTuple):
    """One calling code: the pattern of its national numbers, and the place that each of its groups stands for."""

    match: Callable[[str, int], re.Match[str] | None]
    end: int  # of the calling code in an E.164 number
    places: Mapping[str | None, Place]


_NO_PLAN: Final = _Plan(re.compile("(?!)").match, 0, {None: ANYWHERE})


def place_of(party: Party, country: str | None) -> Place:
    """Return the place of a destination; `country`: what the record says, which short numbers need. About 1 µs.

    Without regions for what is no number.
    """
    kind = party.kind
    if kind is _NUMBER:
        return place_of_number(party.value)
    if kind is _EMAIL:
        return ANYWHERE
    found = _DIALLED(party.value.partition("@")[0])
    if found is not None and len(found[1]) <= _MAX_DIALLED and _is_barred(found[1], country):
        return _BARRED
    return ANYWHERE


_MAX_DIALLED = 32


def place_of_number(number: str) -> Place:
    """Return the place of an E.164 number. Under 1 µs; milliseconds for the first of a calling code."""
    match, end, places = _plan_of(number[1:4])
    found = match(number, end)
    return places[None if found is None else found.lastgroup]


@lru_cache(maxsize=1024)
def _plan_of(start: str) -> _Plan:
    """Return the plan of numbers that start with three digits; its calling code is told by them."""
    for code in (start[:1], start[:2], start):
        regions = COUNTRY_CODE_TO_REGION_CODE.get(int(code)) if code.isdecimal() and code[0] != "0" else None
        if regions:
            return _plan(code, regions)
    return _NO_PLAN


@lru_cache(maxsize=256)
def _plan(code: str, regions: tuple[str, ...]) -> _Plan:
    known = [
        (region, PhoneMetadata.metadata_for_nongeo_region(int(code)) if region == NOWHERE
         else PhoneMetadata.metadata_for_region(region))
        for region in regions
    ]  # fmt: skip
    metadata = [(region, data) for region, data in known if data is not None]
    whole: dict[str, str] = {}
    if code in _NEVER:
        whole["never"] = _NEVER[code]
    premium = _patterns([data for _, data in metadata], ("premium_rate",))
    if premium:
        whole["premium"] = rf"(?:{premium})\Z"
    for region, data in metadata:
        settled = _patterns([data], _SETTLED)
        if settled and region != NOWHERE:
            whole[region] = rf"(?:{settled})\Z"
    unsettled = _patterns([data for _, data in metadata], _UNSETTLED)
    if unsettled:
        whole["unsettled"] = rf"(?:{unsettled})\Z"
    if premium:
        whole["longer"] = premium
    everywhere = frozenset(regions) - {NOWHERE}
    places: dict[str | None, Place] = {name: Place(name in _FORBIDDEN, everywhere) for name in whole}
    places |= {region: Place(forbidden=False, regions=frozenset({region})) for region in everywhere}
    places[None] = Place(forbidden=False, regions=everywhere)
    pattern = "|".join(f"(?P<{name}>{text})" for name, text in whole.items()) or "(?!)"
    return _Plan(re.compile(pattern).match, 1 + len(code), places)


def _patterns(metadata: list[PhoneMetadata], kinds: tuple[str, ...]) -> str:
    found = [getattr(data, kind) for data in metadata for kind in kinds]
    texts = [one.national_number_pattern for one in found if one is not None]
    return "|".join(f"(?:{text})" for text in dict.fromkeys(filter(None, texts)))


# --- short numbers ------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _is_barred(dialled: str, country: str | None) -> bool:
    """Return whether what would be dialled is an emergency number, or a short number at a premium rate."""
    digits = re.sub(r"[^0-9]", "", dialled)
    if len(digits) <= _ANYWHERE_DIGITS and any(_is_short(region, "emergency", digits) for region in _short_regions()):
        return True
    if country is not None:
        if _is_short(country, "emergency", digits) or _is_short(country, "premium_rate", digits):
            return True
        if _is_premium(f"+{country_code_for_region(country)}{digits}"):
            return True
    is_international = dialled.startswith("+") or digits.startswith("00")
    international = digits.removeprefix("00") if is_international else digits
    for end in (1, 2, 3):
        regions = COUNTRY_CODE_TO_REGION_CODE.get(int(international[:end] or "0"), ())
        if is_international or country in regions:
            rest = international[end:]
            for short in (rest, rest.removeprefix("0")):  # with a trunk prefix, or without
                if short in _EVERYWHERE or any(_is_short(region, "emergency", short) for region in regions):
                    return True
    return False


def _is_premium(number: str) -> bool:
    match, end, _ = _plan_of(number[1:4])
    found = match(number, end)
    return found is not None and found.lastgroup == "premium"


@lru_cache(maxsize=1)
def _short_regions() -> tuple[str, ...]:
    return tuple(sorted({region for regions in COUNTRY_CODE_TO_REGION_CODE.values() for region in regions}))


@lru_cache(maxsize=1024)
def _short_pattern(region: str, kind: str) -> re.Pattern[str] | None:
    data = PhoneMetadata.short_metadata_for_region(region)
    found = None if data is None else getattr(data, kind)
    text = None if found is None else found.national_number_pattern
    return re.compile(text) if text else None


def _is_short(region: str, kind: str, digits: str) -> bool:
    pattern = _short_pattern(region, kind)
    return pattern is not None and pattern.fullmatch(digits) is not None
