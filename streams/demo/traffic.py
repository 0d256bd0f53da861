"""Traffic for the demo: what a small CPaaS company sees, made from a seed.

Rules of this file: pure; neither clock nor disk. Same records, seed and policy: same traffic but for its instants,
which are counted from the hour that is given. Numbers are of ranges reserved for fiction where a country has one,
else of ranges that cannot exist (national part from 0). Nothing here depends on what the pipeline makes of it.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from typing import Any, Final, NamedTuple

import orjson

HOUR_S: Final = 3600
DAY_S: Final = 86_400
REQUESTS_FROM_S: Final = 6 * HOUR_S
"""Requests, replies and preferences are of the six hours before the hour given, in order."""
CDRS_FROM_S: Final = 72 * HOUR_S
"""CDRs are of the three days before it, most of them recent."""

Record = dict[str, Any]


class Traffic(NamedTuple):
    """Generated traffic: records in order, how many of each kind, and the lines `areacode,number` of a US registry."""

    values: list[bytes]
    made: Counter[str]
    registry: list[str]

    def __repr__(self) -> str:
        return f"Traffic({len(self.values)})"


# --- the world ----------------------------------------------------------------------------------------------


class Operator(NamedTuple):
    """A mobile network, and what it charges in EUR: for an SMS segment, and for a second of voice."""

    mcc: str
    mnc: str
    sms: Decimal
    second: Decimal


class Country(NamedTuple):
    """A country: its people's number, how many numbers there are, how many people we know, operators, places."""

    number: Callable[[int], str]
    capacity: int
    people: int
    operators: tuple[Operator, ...]
    places: tuple[str, ...]


class Person(NamedTuple):
    """Somebody with a telephone."""

    number: str
    country: str
    operator: Operator
    place: str
    name: str
    child: bool

    def __repr__(self) -> str:
        return f"Person({self.country})"


class Account(NamedTuple):
    """A customer: how it signs, the numbers it owns, where its recipients are (weights), what it writes (weights)."""

    brand: str
    short_code: str
    own: tuple[str, ...]
    countries: Mapping[str, int]
    purposes: Mapping[str, int]
    route: str


def _operators(mcc: str, *rates: tuple[str, str, str]) -> tuple[Operator, ...]:
    return tuple(Operator(mcc, mnc, Decimal(sms), Decimal(second)) for mnc, sms, second in rates)


_US_AREAS = (
    201, 203, 205, 206, 207, 208, 209, 210, 212, 213, 214, 215, 216, 217, 218, 219, 224, 225, 228, 229, 231, 234, 239,
    240, 248, 251, 253, 254, 256, 260, 262, 267, 269, 270, 276, 281, 301, 302, 303, 304, 305, 307, 308, 309, 310, 312,
    313, 314, 315, 316, 317, 318, 319, 320, 321, 323, 330, 334, 336, 337, 347, 352, 360, 361, 386, 401, 402, 404, 405,
)  # fmt: skip
_AU_FICTION = (
    570006, 570110, 570156, 570157, 570158, 570159, 570313, 570737, 571266, 571491, 571804, 572549, 572665, 572983,
    573087, 573770, 574118, 574632, 575254, 575789, 576398, 576801, 577426, 577644, 578148, 578888, 578957, 579212,
    579455, 579760,
)  # fmt: skip

COUNTRIES: Final[Mapping[str, Country]] = {
    "US": Country(
        lambda i: f"+1{_US_AREAS[i // 100]}55501{i % 100:02}", 100 * len(_US_AREAS), 3000,
        (*_operators("310", ("260", "0.0075", "0.0002"), ("410", "0.0079", "0.0002")),
         *_operators("311", ("480", "0.0083", "0.00022"))),
        ("New York", "Chicago", "Seattle", "Mobile"),
    ),
    "GB": Country(
        lambda i: f"+447700900{i:03}", 1000, 800,
        _operators("234", ("10", "0.0392", "0.0003"), ("15", "0.0401", "0.00031"), ("30", "0.0388", "0.0003")),
        ("London", "Leeds", "Reading"),
    ),
    "DE": Country(
        lambda i: f"+49{(1713920000, 17604069000)[i // 100] + i % 100}", 200, 200,
        _operators("262", ("01", "0.0741", "0.00035"), ("02", "0.0752", "0.00035"), ("03", "0.0729", "0.00034")),
        ("Berlin", "Essen", "Halle"),
    ),
    "FR": Country(
        lambda i: f"+3363998{i:04}", 10_000, 1200,
        _operators("208", ("01", "0.0583", "0.0004"), ("10", "0.0571", "0.0004"), ("20", "0.0577", "0.00041")),
        ("Paris", "Nice", "Tours"),
    ),
    "ES": Country(
        lambda i: f"+3400000{i:04}", 10_000, 900,
        _operators("214", ("01", "0.0614", "0.00038"), ("03", "0.0602", "0.00038"), ("07", "0.0609", "0.00037")),
        ("Madrid", "Soria"),
    ),
    "BR": Country(
        lambda i: f"+550090000{i:04}", 10_000, 900,
        _operators("724", ("02", "0.0232", "0.0006"), ("05", "0.0241", "0.0006"), ("11", "0.0247", "0.00062")),
        ("Recife", "Natal"),
    ),
    "IN": Country(
        lambda i: f"+91000000{i:04}", 10_000, 1500,
        _operators("405", ("854", "0.0311", "0.00045"), ("861", "0.0311", "0.00045")),
        ("Pune", "Delhi", "Agra"),
    ),
    "SG": Country(
        lambda i: f"+650000{i:04}", 10_000, 300,
        _operators("525", ("01", "0.0358", "0.00052"), ("03", "0.0362", "0.00052")),
        ("Singapore",),
    ),
    "AU": Country(
        lambda i: f"+61491{_AU_FICTION[i]}", len(_AU_FICTION), len(_AU_FICTION),
        _operators("505", ("01", "0.0410", "0.0005"), ("02", "0.0399", "0.0005")),
        ("Perth", "Orange"),
    ),
    "KE": Country(
        lambda i: f"+25400000{i:04}", 10_000, 400,
        _operators("639", ("02", "0.0189", "0.0011"), ("03", "0.0221", "0.0012")),
        ("Nairobi", "Thika"),
    ),
}  # fmt: skip

ACCOUNTS: Final[Mapping[str, Account]] = {
    "harbor-bank": Account(
        "HarborBank", "42270", ("+12025550100", "+12025550101"),
        {"US": 55, "GB": 20, "DE": 8, "SG": 9, "AU": 8},
        {"otp": 58, "transactional": 30, "service": 12}, "direct-1",
    ),
    "linden-retail": Account(
        "LINDEN", "54633", ("+493023125010",),
        {"US": 34, "DE": 18, "FR": 17, "GB": 16, "ES": 15},
        {"marketing": 72, "transactional": 28}, "bulk-3",
    ),
    "medico-care": Account(
        "MedicoCare", "63342", ("+442079460018",),
        {"GB": 62, "US": 30, "AU": 8},
        {"service": 62, "transactional": 38}, "direct-2",
    ),
    "swift-ride": Account(
        "SwiftRide", "79438", ("+12025550140", "+442079460140", "+33199000140"),
        {"US": 42, "GB": 18, "FR": 14, "DE": 10, "ES": 7, "BR": 4, "IN": 3, "KE": 2},
        {"transactional": 50, "otp": 28, "service": 22}, "direct-2",
    ),
    "open-contact": Account(
        "OpenContact", "67366", ("+12025550180", "+33199000180"),
        {"US": 30, "IN": 30, "BR": 18, "KE": 12, "SG": 10},
        {"marketing": 62, "otp": 38}, "bulk-3",
    ),
}  # fmt: skip
"""The accounts of policy.toml, beside it."""

UNLISTED_ACCOUNT: Final = "bygone-tenant"
VOICE_INCREMENT_S: Final = {"swift-ride": 1}
"""Billing increments that differ from a minute."""
_WEIGHT: Final = {"harbor-bank": 27, "linden-retail": 28, "medico-care": 13, "swift-ride": 20, "open-contact": 12}

_FIRST = ("Ada", "Bruno", "Chloe", "Diego", "Esther", "Femi", "Greta", "Hassan", "Ines", "Jonas", "Kavya", "Luca")
_LAST = ("Abara", "Brandt", "Costa", "Dubois", "Evans", "Fischer", "Garcia", "Haddad", "Iyer", "Jansen", "Kimani")
_SHOPS = ("winter coats", "garden tools", "running shoes", "kitchenware", "school bags", "headphones")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_OTP = (
    "{code} is your {brand} code. It expires in 10 minutes. Never share it with anyone.",
    "Your {brand} login code: {code}. Did not ask for it? Ignore this message.",
)
_TEXTS: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("harbor-bank", "otp"): _OTP,
    ("harbor-bank", "transactional"): (
        "{brand}: {amount} was paid with your card ending {last}. Not you, {name}? Reply NO.",
        "{brand}: a transfer of {amount} has arrived. Reference {ref}.",
    ),
    ("harbor-bank", "service"): ("{brand}: maintenance on {day} from {hour}:00 to {hour}:45. Cards work as usual.",),
    ("linden-retail", "marketing"): (
        "{brand}: {percent}% off {shop} until {day}, {name}! Show this text at the till. Reply STOP to opt out.",
        "New at {brand}: {shop}. Members save {percent}%. Reply STOP to opt out.",
        "{brand} – nur bis {day}: {percent} % auf alles für {name}. Abmelden mit STOP.",
    ),
    ("linden-retail", "transactional"): (
        "{brand}: hello {name}, your order {ref} has shipped and should arrive on {day}.",
        "{brand}: your parcel {ref} waits for you at the shop until {day}.",
    ),
    ("medico-care", "service"): (
        "{brand}: reminder for {name}: your appointment is on {day} at {hour}:15. Reply CHANGE to move it.",
        "{brand}: the practice is closed on {day}. In an emergency call your local number.",
    ),
    ("medico-care", "transactional"): ("{brand}: {name}, your results {ref} are ready. Log in to read them.",),
    ("swift-ride", "otp"): _OTP,
    ("swift-ride", "transactional"): (
        "{brand}: {name}, your driver arrives soon. Plate {ref} {last}.",
        "{brand}: your ride cost {amount}. Receipt {ref}. Thank you, {name}.",
    ),
    ("swift-ride", "service"): ("{brand}: you left something in the car on {day}. Reference {ref}.",),
    ("open-contact", "marketing"): (
        "{brand}: {name}, {percent}% more data for the same price until {day}. Reply STOP to opt out.",
        "{brand}: your next month is on us. Call before {day}, {hour}:00. Reply STOP to opt out.",
    ),
    ("open-contact", "otp"): _OTP,
}
_CAMPAIGNS: Final = ("welcome-2", "season-7", "loyalty-4")
_ANSWERS: Final = (
    "Yes, that works", "ok thanks", "Running 10 minutes late, sorry", "Who is this?", "See you on {day}",
    "Can we make it {hour}:30 instead?", "Merci beaucoup", "Danke, bis {day}", "👍", "Wrong number, I think",
    "Call me back please", "It is the blue door, second floor",
)  # fmt: skip
_OPT_OUTS: Final = ("STOP", "Stop.", "stop", "ARRET", "STOP!", "Unsubscribe")
_OPT_IN: Final = "START"
_NEAR_STOPS: Final = ("please stop", "STOPP", "stop texting me {brand}", "how do I unsubscribe?")
_PREFERENCES: Final = {  # scope/class: weight
    "account/all": 40, "account/marketing": 25, "campaign/marketing": 15, "sender/service": 10, "platform/all": 10,
}  # fmt: skip
_SMS_STATUS: Final = {"delivered": 930, "undelivered": 40, "expired": 20, "rejected": 10}
_CALL_STATUS: Final = {"answered": 720, "no-answer": 170, "busy": 70, "failed": 40}
_CAUSE: Final = {"answered": "16", "no-answer": "19", "busy": "17", "failed": "41"}
_ERROR: Final = {"undelivered": "27", "expired": "31", "rejected": "69"}

KINDS: Final[Mapping[str, float]] = {
    "SMS request": 0.44,
    "voice request": 0.01,
    "SMS CDR": 0.375,
    "voice CDR": 0.125,
    "inbound SMS": 0.03,
    "preference": 0.01,
    "broken": 0.01,
}
"""What is made, and in which share."""


def generate(records: int, seed: int, hour_s: int) -> Traffic:
    """Return `records` records, instants counted from `hour_s`, a full hour in Unix seconds. About 30 µs a record."""
    return _Generator(records, seed, hour_s).run()


class _Generator:
    """One run; draws everything from one random source, in order."""

    def __init__(self, records: int, seed: int, hour_s: int) -> None:
        self._rng = Random(seed)  # noqa: S311 — invented traffic, not keys
        self._records = records
        self._hour_s = hour_s
        self._people = {code: self._population(code, country) for code, country in COUNTRIES.items()}
        self._opted_out: list[tuple[str, Person]] = []
        self._recent: dict[str, deque[bytes]] = {kind: deque(maxlen=200) for kind in KINDS}
        self._broken = 0
        self._at = 0  # records made so far
        self._make: dict[str, Callable[[], Record | bytes]] = {
            "SMS request": self._sms_request,
            "voice request": self._voice_request,
            "SMS CDR": self._sms_cdr,
            "voice CDR": self._voice_cdr,
            "inbound SMS": self._inbound,
            "preference": self._preference,
            "broken": self._break,
        }

    def run(self) -> Traffic:
        """Make everything."""
        registry = [f"{one.number[2:5]},{one.number[5:]}" for one in self._people["US"] if self._rng.random() < 0.06]
        values = []
        kinds = self._kinds()
        for self._at, kind in enumerate(kinds):
            recent = self._recent[kind]
            if recent and self._rng.random() < 0.004:  # a gateway sends it again, as it was
                values.append(self._rng.choice(recent))
                continue
            made = self._make[kind]()
            value = made if isinstance(made, bytes) else orjson.dumps(made)
            recent.append(value)
            values.append(value)
        return Traffic(values, Counter(kinds), registry)

    def _kinds(self) -> list[str]:
        """Return the kind of each record: exact shares, at random places; requests make up for rounding."""
        counts = {kind: int(self._records * share) for kind, share in KINDS.items()}
        counts["SMS request"] += self._records - sum(counts.values())
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        self._rng.shuffle(kinds)
        return kinds

    def _population(self, code: str, country: Country) -> Sequence[Person]:
        rng = self._rng
        return [
            Person(
                country.number(at),
                code,
                rng.choice(country.operators),
                rng.choice(country.places),
                f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
                rng.random() < 0.02,
            )
            for at in rng.sample(range(country.capacity), country.people)
        ]

    # --- choosing ---------------------------------------------------------------------------------------------

    def _weighted(self, weights: Mapping[str, int]) -> str:
        return self._rng.choices(list(weights), list(weights.values()))[0]

    def _person(self, account_id: str) -> Person:
        """Return somebody the account has to do with; some are met far more often than others."""
        people = self._people[self._weighted(ACCOUNTS[account_id].countries)]
        return people[int(len(people) * self._rng.random() ** 2)]

    def _text(self, templates: Sequence[str], account_id: str, person: Person) -> str:
        rng = self._rng
        return rng.choice(templates).format(
            brand=ACCOUNTS[account_id].brand,
            name=person.name.split()[0],
            code=f"{rng.randrange(10**6):06}",
            ref=f"{rng.choice('ABCDEFGH')}{rng.randrange(10**4):04}",
            day=rng.choice(_DAYS),
            hour=rng.randrange(9, 18),
            percent=rng.randrange(10, 60, 5),
            shop=rng.choice(_SHOPS),
            amount=f"{rng.randrange(5, 900)}.{rng.randrange(100):02} EUR",
            last=rng.randrange(1000, 10_000),
        )

    def _record_id(self, prefix: str) -> str:
        return f"{prefix}-{self._at:06}-{self._rng.getrandbits(32):08x}"

    def _sender(self, account_id: str, person: Person) -> str:
        """Return what the account signs with: a short code in the US, its name elsewhere."""
        account = ACCOUNTS[account_id]
        return account.short_code if person.country == "US" else account.brand

    # --- instants, in Unix seconds -----------------------------------------------------------------------------

    def _live_s(self) -> int:
        """Return the time of what happens now: the six hours before the hour, in order."""
        return self._hour_s - REQUESTS_FROM_S + REQUESTS_FROM_S * self._at // self._records

    def _cdr_s(self) -> int:
        """Return the time of a CDR: recent; or late: 10 to 12 days, months, or over 11 years."""
        rng = self._rng
        drawn = rng.random()
        if drawn < 0.005:
            this_month = datetime.fromtimestamp(self._hour_s, UTC).month
            return self._months_ago(11 * 12 + this_month + rng.randrange(24))
        if drawn < 0.02:
            return self._months_ago(rng.randrange(13, 21))  # the personal part is past its deadline
        if drawn < 0.03:
            return self._months_ago(rng.randrange(2, 12))  # it is not, but any content is
        if drawn < 0.05:
            return self._hour_s - rng.randrange(10 * DAY_S, 12 * DAY_S)
        return self._hour_s - 1 - int(CDRS_FROM_S * rng.random() ** 2)

    def _months_ago(self, months: int) -> int:
        now = datetime.fromtimestamp(self._hour_s, UTC)
        year, month = divmod(now.year * 12 + now.month - 1 - months, 12)
        first = datetime(year, month + 1, 1, tzinfo=UTC)
        return int(first.timestamp()) + self._rng.randrange(28 * DAY_S)

    # --- records ------------------------------------------------------------------------------------------------

    def _common(self, kind: str, channel: str, account_id: str, person: Person, at_s: int) -> Record:
        """Return what every record has, as to a person; `mt`."""
        rng = self._rng
        record = {
            "v": 1, "type": kind, "channel": channel, "record_id": self._record_id(f"{kind[:3]}-{channel}"),
            "account_id": account_id, "direction": "mt", "occurred_at": _instant(at_s, rng.randrange(1000)),
            "sender": self._sender(account_id, person), "recipient": person.number, "country": person.country,
        }  # fmt: skip
        if person.country == "US" and rng.random() < 0.01:  # as people write it
            number = person.number
            record["recipient"] = f"({number[2:5]}) {number[5:8]}-{number[8:]}"
        if person.child:
            record["child"] = True
        if rng.random() < 0.15:
            record["attributes"] = {"order_ref": f"R{rng.randrange(10**5):05}", "template": f"t-{rng.randrange(40)}"}
        return record

    def _wanted(self) -> tuple[str, Person, str]:
        """Return account, person and purpose of an outbound communication; now and then to who has opted out."""
        rng = self._rng
        if self._opted_out and rng.random() < 0.03:
            account_id, person = rng.choice(self._opted_out)
        else:
            account_id = self._weighted(_WEIGHT)
            person = self._person(account_id)
        return account_id, person, self._weighted(ACCOUNTS[account_id].purposes)

    def _sms_request(self) -> Record:
        account_id, person, purpose = self._wanted()
        record = self._common("request", "sms", account_id, person, self._live_s())
        record |= {"purpose": purpose, "content": self._text(_TEXTS[account_id, purpose], account_id, person)}
        if purpose == "marketing":
            record["campaign_id"] = f"{account_id}/{self._rng.choice(_CAMPAIGNS)}"
        return record

    def _voice_request(self) -> Record:
        account_id, person, purpose = self._wanted()
        record = self._common("request", "voice", account_id, person, self._live_s())
        return record | {"purpose": purpose, "sender": ACCOUNTS[account_id].own[0]}

    def _carried(self, record: Record, account_id: str, person: Person) -> None:
        """Add what the network says."""
        rng = self._rng
        record |= {"mcc": person.operator.mcc, "mnc": person.operator.mnc, "route": ACCOUNTS[account_id].route}
        if rng.random() < 0.12:
            record["client_ip"] = f"{rng.choice(('192.0.2', '198.51.100', '203.0.113'))}.{rng.randrange(1, 255)}"
        if rng.random() < 0.10:
            record["location"] = f"{person.place}, {person.country}, cell {rng.randrange(100, 999)}"

    def _sms_cdr(self) -> Record:
        account_id, person, purpose = self._wanted()
        record = self._common("cdr", "sms", account_id, person, self._cdr_s())
        self._carried(record, account_id, person)
        status = self._weighted(_SMS_STATUS)
        content = self._text(_TEXTS[account_id, purpose], account_id, person)
        record |= {"purpose": purpose, "status": status, "content": content, **_shape(content)}
        record["price"] = _price(person.operator.sms * (record["segments"] if status != "rejected" else 0))
        if status in _ERROR:
            record["error_code"] = _ERROR[status]
        if purpose == "marketing":
            record["campaign_id"] = f"{account_id}/{self._rng.choice(_CAMPAIGNS)}"
        return record

    def _voice_cdr(self) -> Record:
        rng = self._rng
        account_id = self._weighted({"swift-ride": 50, "open-contact": 25, "harbor-bank": 15, "medico-care": 10})
        person = self._person(account_id)
        at_s = self._cdr_s()
        record = self._common("cdr", "voice", account_id, person, at_s)
        self._carried(record, account_id, person)
        self._caller(record, account_id, person)
        status = self._weighted(_CALL_STATUS)
        rings_s = rng.randrange(3, 25)
        talks_s = 1 + int(rng.expovariate(1 / 95)) if status == "answered" else 0
        increment_s = VOICE_INCREMENT_S.get(account_id, 60)
        billable_s = -(-talks_s // increment_s) * increment_s
        record |= {
            "purpose": "service" if account_id != "open-contact" else "marketing", "status": status,
            "duration_s": talks_s, "billable_s": billable_s, "hangup_cause": _CAUSE[status],
            "price": _price(person.operator.second * billable_s),
        }  # fmt: skip
        if talks_s:
            record["answered_at"] = _instant(at_s + rings_s, rng.randrange(1000))
            if rng.random() < 0.3:
                record["recording_ref"] = f"rec://{account_id}/{rng.getrandbits(64):016x}.opus"
            if rng.random() < 0.08:
                record["transcript"] = f"Agent: good day. {person.name}: {self._text(_ANSWERS, account_id, person)}."
        return record

    def _caller(self, record: Record, account_id: str, person: Person) -> None:
        """Let the account's own number call the person, or somebody else through it, or the person call in."""
        rng = self._rng
        drawn = rng.random()
        own = rng.choice(ACCOUNTS[account_id].own)
        if account_id == "swift-ride" and drawn < 0.6:
            others = self._people[person.country]
            other = others[rng.randrange(len(others))]
            record |= {"sender": other.number, "display_name": other.name}
        elif drawn < 0.8:
            record |= {"sender": own, "display_name": ACCOUNTS[account_id].brand}
        else:
            record |= {"direction": "mo", "sender": person.number, "recipient": own}
            if rng.random() < 0.1:
                record["sender"] = "anonymous"
            elif rng.random() < 0.5:
                record["display_name"] = person.name

    def _inbound(self) -> Record:
        rng = self._rng
        account_id = self._weighted(_WEIGHT)
        person = self._person(account_id)
        drawn = rng.random()
        if drawn < 0.16:
            content = rng.choice(_OPT_OUTS)
            self._opted_out.append((account_id, person))
        elif drawn < 0.21 and self._opted_out:
            content = _OPT_IN
            account_id, person = rng.choice(self._opted_out)
        elif drawn < 0.30:
            content = self._text(_NEAR_STOPS, account_id, person)
        else:
            content = self._text(_ANSWERS, account_id, person)
        record = self._common("cdr", "sms", account_id, person, self._live_s())
        self._carried(record, account_id, person)
        return record | {
            "direction": "mo", "sender": record["recipient"], "recipient": record["sender"],
            "status": "received", "content": content, **_shape(content),
        }  # fmt: skip

    def _preference(self) -> Record:
        rng = self._rng
        out = not self._opted_out or rng.random() < 0.75
        account_id = self._weighted(_WEIGHT)
        person = self._person(account_id)
        if out:
            self._opted_out.append((account_id, person))
        else:
            account_id, person = rng.choice(self._opted_out)
        scope, class_ = self._weighted(_PREFERENCES).split("/")
        record = self._common("preference", "sms", account_id, person, self._live_s())
        record |= {
            "direction": "mo", "sender": record["recipient"], "recipient": record["sender"],
            "action": "opt_out" if out else "opt_in", "scope": scope, "class": class_,
        }  # fmt: skip
        if scope == "campaign":
            record["campaign_id"] = f"{account_id}/{rng.choice(_CAMPAIGNS)}"
        return record

    # --- what goes wrong ----------------------------------------------------------------------------------------

    def _break(self) -> Record | bytes:
        """Return a record that is broken in one way or another, each in turn."""
        account_id = self._weighted(_WEIGHT)
        person = self._person(account_id)
        record = self._common("request", "sms", account_id, person, self._live_s())
        record |= {"purpose": "transactional", "content": self._text(_ANSWERS, account_id, person)}
        self._broken += 1
        way = BROKEN[self._broken % len(BROKEN)]
        if way == "not JSON":
            return f"ERR 504 upstream timed out sending to {person.number}".encode()
        if way == "not text":
            return bytes([0xFF]) + self._rng.randbytes(60)
        if way == "truncated":
            whole = orjson.dumps(record)
            return whole[: len(whole) * 3 // 5]
        if way == "no recipient":
            del record["recipient"]
        else:
            record |= _FAULTS[way] if way != "three days ahead" else {
                "occurred_at": _instant(self._hour_s + 3 * DAY_S + HOUR_S, 0)
            }  # fmt: skip
        return record


_FAULTS: Final[Mapping[str, Record]] = {
    "unknown field": {"campaing_id": "season-7"},
    "other version": {"v": 2},
    "negative price": {"price": {"amount": "-0.0075", "currency": "EUR"}},
    "unlisted account": {"account_id": UNLISTED_ACCOUNT},
    "impossible date": {"occurred_at": "2026-02-30T12:00:00Z"},
}
BROKEN: Final = ("not JSON", "not text", "truncated", "no recipient", "three days ahead", *_FAULTS)
"""The ways in which broken records are broken."""


def _instant(at_s: int, milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z"


def _shape(content: str) -> Record:
    """Return segments and encoding: 160 or 70 characters a message, a few less where there are several."""
    encoding, alone, each = ("GSM-7", 160, 153) if content.isascii() else ("UCS-2", 70, 67)
    return {"segments": 1 if len(content) <= alone else -(-len(content) // each), "encoding": encoding}


def _price(amount: Decimal) -> Record:
    return {"amount": f"{amount:f}", "currency": "EUR"}
