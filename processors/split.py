"""Split: which field of a record goes into which output, derived from the privacy classes and nothing else.

A `Layout` is compiled once from the class table. `take` separates the content from a record just decoded; what is
left renders as it is, as the whole sealed record. The anonymous record's type does not have the other fields.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec.structs import force_setattr

from processors.retention import instant
from schemas.fields import PrivacyClass as P
from schemas.fields import canonical_amount, values_of
from schemas.inbound import Cdr, Communication, Request

Render = Callable[[Any], bytes]
"""Record as `take` left it → JSON object of some of its fields, absent ones left out."""

ANONYMOUS = frozenset({P.ACCOUNT, P.BILLING, P.PRICE})
"""Classes that may stand in the anonymous record as they are."""

_encode = msgspec.json.Encoder().encode


class Layout:
    """The compiled split of one record type under one class table."""

    __slots__ = (
        "_content", "_content_names", "_content_values", "_nothing", "anonymous", "clear", "other", "whole",
    )  # fmt: skip

    def __init__(self, struct: type[Communication], classes: Mapping[str, P], *, with_content: bool) -> None:
        names = [name for name in struct.__struct_fields__ if name != "v"]
        self._content_names = [name for name in names if classes[name] is P.CONTENT and not with_content]
        sealed = [name for name in names if name not in self._content_names]
        self._content_values = values_of(self._content_names)
        optional = [(name, Any, None) for name in self._content_names]
        self._content = msgspec.defstruct(
            "Content", [("record_id", str), *optional], omit_defaults=True, frozen=True, gc=False
        )
        self._nothing = (None,) * len(self._content_names)
        kind = str(struct.__struct_config__.tag)
        self.whole: Render = _encode
        self.other: dict[str, tuple[Render, Render]] = {}
        for direction, theirs in (("mt", P.SENDER), ("mo", P.RECIPIENT)):
            own = [name for name in sealed if classes[name] is theirs]
            rest = [name for name in sealed if classes[name] is not theirs]
            self.other[direction] = (_renderer("primary", rest, kind), _renderer("other", own, kind))
        clear = [name for name in names if classes[name] in ANONYMOUS and name != "price"]
        priced = classes["price"] in ANONYMOUS
        self.clear = values_of([*clear, *(["price"] if priced else [])])
        """Return the values of a record that may stand in the anonymous record; not checked yet (`check_clear`)."""
        self.anonymous = _anonymous(clear, priced=priced)

    def take(self, record: Communication, at: str) -> bytes | None:
        """Write a record's instants as RFC 3339 UTC to the second, take its content out and return that as JSON.

        Works in place on a record just decoded, which nobody else has seen yet; None: nothing was said.
        """
        force_setattr(record, "occurred_at", at)
        if record.answered_at is not None:
            force_setattr(record, "answered_at", instant(int(record.answered_at.timestamp() // 1)))
        values = self._content_values(record)
        if values == self._nothing:
            return None
        content = _encode(self._content(record.record_id, *values))
        for name in self._content_names:
            force_setattr(record, name, None)
        for value in values:
            if value is not None and value != "":
                return content
        return None


def _renderer(title: str, names: list[str], kind: str) -> Render:
    struct = msgspec.defstruct(
        title.capitalize(),
        [("type", str), ("v", int), *[(name, Any, None) for name in names]],
        omit_defaults=True,
        frozen=True,
        gc=False,
    )
    get = values_of(names)
    return lambda record: _encode(struct(kind, record.v, *get(record)))


def _anonymous(names: list[str], *, priced: bool) -> Callable[[tuple[Any, ...], int | None, str, bytes], bytes]:
    """Return the renderer of the anonymous record: (clear values, billable units, coarse instant, privacy JSON)."""
    struct = msgspec.defstruct(
        "Anonymous",
        [
            *[(name, Any) for name in names],
            ("price", Any),
            ("billable_units", int | None),
            ("occurred_at" if "occurred_at" not in names else "coarse_at", str),
            ("privacy", msgspec.Raw),
            ("v", int, 1),
        ],
        frozen=True,
        gc=False,
    )

    def render(clear: tuple[Any, ...], units: int | None, coarse: str, privacy: bytes) -> bytes:
        price = None
        values = list(clear)
        if priced:
            paid = values.pop()
            if paid is not None:
                price = {"amount": canonical_amount(paid.amount), "currency": paid.currency}
        return _encode(struct(*values, price, units, coarse, msgspec.Raw(privacy)))

    return render


def billable_units(record: Communication, increment_s: int) -> int | None:
    """Return the call's length in started billing increments, or None if it has none (SMS, or not measured)."""
    seconds = record.billable_s if record.billable_s is not None else record.duration_s
    return None if seconds is None else -(-seconds // increment_s)


def layouts(classes: Mapping[str, P]) -> tuple[Layout, Layout]:
    """Return the layouts of CDRs (content apart) and requests (content inside) under a class table."""
    return Layout(Cdr, classes, with_content=False), Layout(Request, classes, with_content=True)
