"""Split: which field of a record goes into which output, derived from the privacy classes and nothing else.

A `Layout` is compiled once from the class table. Whatever the classes do not allow in an output cannot get there:
the output's record type does not have the field.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

import msgspec

from schemas.fields import PrivacyClass as P
from schemas.fields import canonical_amount
from schemas.inbound import Cdr, Communication, Price, Request

Render = Callable[[Any, str], bytes]
"""(record, `occurred_at` in RFC 3339 UTC to the second) → JSON object."""

ANONYMOUS = frozenset({P.ACCOUNT, P.BILLING, P.PRICE})
"""Classes that may stand in the anonymous record as they are."""

_encode = msgspec.json.Encoder().encode


class Layout:
    """The compiled split of one record type under one class table."""

    __slots__ = ("anonymous", "anonymous_names", "content", "content_of", "other", "whole")

    def __init__(self, struct: type[Communication], classes: Mapping[str, P], *, with_content: bool) -> None:
        names = [name for name in struct.__struct_fields__ if name != "v"]
        content = [name for name in names if classes[name] is P.CONTENT]
        sealed = [name for name in names if with_content or classes[name] is not P.CONTENT]
        kind = str(struct.__struct_config__.tag)
        self.content_of = _getter(content)
        self.content = _renderer("content", ["record_id", *content], kind)
        self.whole = _renderer("whole", sealed, kind)
        self.other: dict[str, tuple[Render, Render]] = {}
        for direction, theirs in (("mt", P.SENDER), ("mo", P.RECIPIENT)):
            own = [name for name in sealed if classes[name] is theirs]
            rest = [name for name in sealed if classes[name] is not theirs]
            self.other[direction] = (_renderer("primary", rest, kind), _renderer("other", own, kind))
        self.anonymous_names = tuple(
            name for name in names if classes[name] in ANONYMOUS and name != "price"
        )
        self.anonymous = _anonymous(self.anonymous_names, priced=classes["price"] in ANONYMOUS)


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda record: tuple(getattr(record, name) for name in names)


def _renderer(title: str, names: list[str], kind: str) -> Render:
    """Return a function that renders some fields of a record as JSON, absent ones left out."""
    timed = "occurred_at" in names
    plain = [name for name in names if name != "occurred_at"]
    fields: list[Any] = [("type", str)]
    fields += [("occurred_at", str)] if timed else []
    fields += [(name, Any, None) for name in plain]
    struct = msgspec.defstruct(
        title.capitalize(), fields, omit_defaults=True, frozen=True, rename={"class_": "class"}.get, gc=False
    )
    get = _getter(plain)
    answered = plain.index("answered_at") if "answered_at" in plain else None

    def render(record: Any, at: str) -> bytes:
        values = get(record)
        if answered is not None and values[answered] is not None:
            values = (*values[:answered], _utc(values[answered]), *values[answered + 1 :])
        return _encode(struct(kind, at, *values) if timed else struct(kind, *values))

    return render


def _utc(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _anonymous(names: tuple[str, ...], *, priced: bool) -> Callable[[Any, int | None, str, bytes], bytes]:
    """Return the renderer of the anonymous record: (record, billable units, coarse instant, privacy JSON)."""
    struct = msgspec.defstruct(
        "Anonymous",
        [
            *[(name, Any) for name in names],
            ("billable_units", int | None),
            ("price", Any),
            ("occurred_at" if "occurred_at" not in names else "coarse_at", str),
            ("privacy", msgspec.Raw),
            ("v", int, 1),
        ],
        frozen=True,
        gc=False,
    )
    get = _getter(list(names))

    def render(record: Any, units: int | None, coarse: str, privacy: bytes) -> bytes:
        price = _price(record.price) if priced and record.price is not None else None
        return _encode(struct(*get(record), units, price, coarse, msgspec.Raw(privacy)))

    return render


def _price(price: Price) -> dict[str, str | None]:
    return {"amount": canonical_amount(price.amount), "currency": price.currency}


def billable_units(record: Communication, increment_s: int) -> int | None:
    """Return the call's length in started billing increments, or None if it has none (SMS, or not measured)."""
    seconds = record.billable_s if record.billable_s is not None else record.duration_s
    return None if seconds is None else -(-seconds // increment_s)


def layouts(classes: Mapping[str, P]) -> tuple[Layout, Layout]:
    """Return the layouts of CDRs (content apart) and requests (content inside) under a class table."""
    return Layout(Cdr, classes, with_content=False), Layout(Request, classes, with_content=True)
