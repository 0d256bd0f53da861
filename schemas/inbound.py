"""Inbound records, version 1: request, cdr, preference. JSON, one object a record.

Sizes: at most `MAX_RECORD_BYTES`; every text is bounded; `attributes` at most 64 entries. Instants are RFC 3339
with an offset. Money is decimal. A field that is not listed here is never forwarded.
"""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from schemas.fields import Classified, PrivacyClass, field_class

Channel = Literal["sms", "voice"]
Direction = Literal["mt", "mo"]
Purpose = Literal["marketing", "transactional", "otp", "service"]
SuppressionScope = Literal["sender", "campaign", "account", "platform"]
SuppressionClass = Literal["all", "marketing", "service"]
SuppressionAction = Literal["opt_out", "opt_in"]

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=604_800)]
Segments = Annotated[int, msgspec.Meta(ge=0, le=255)]
Text64 = Annotated[str, msgspec.Meta(max_length=64)]
Text128 = Annotated[str, msgspec.Meta(max_length=128)]
Text256 = Annotated[str, msgspec.Meta(max_length=256)]
Text320 = Annotated[str, msgspec.Meta(max_length=320)]
Text1024 = Annotated[str, msgspec.Meta(max_length=1024)]
Text2048 = Annotated[str, msgspec.Meta(max_length=2048)]
Attributes = Annotated[dict[str, str], msgspec.Meta(max_length=64)]

_P = PrivacyClass


class Price(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What the communication costs: `amount` ≥ 0 as decimal digits in a text, never a float; ISO 4217 `currency`."""

    amount: Text64
    currency: Text64


class Common(Classified, frozen=True, kw_only=True, gc=False, tag_field="type"):
    """What every record carries. `sender` and `recipient` are as the gateway wrote them."""

    v: Annotated[Literal[1], field_class(_P.SHAPE)]
    channel: Annotated[Channel, field_class(_P.BILLING)]
    record_id: Annotated[str, field_class(_P.IDENTIFIER)]
    account_id: Annotated[str, field_class(_P.ACCOUNT)]
    direction: Annotated[Direction, field_class(_P.BILLING)]
    occurred_at: Annotated[Instant, field_class(_P.TIME)]
    sender: Annotated[Text320, field_class(_P.SENDER)]
    recipient: Annotated[Text320, field_class(_P.RECIPIENT)]
    country: Annotated[str | None, field_class(_P.BILLING)] = None
    mcc: Annotated[str | None, field_class(_P.BILLING)] = None
    mnc: Annotated[str | None, field_class(_P.BILLING)] = None
    route: Annotated[str | None, field_class(_P.BILLING)] = None
    status: Annotated[str | None, field_class(_P.BILLING)] = None
    error_code: Annotated[Text128 | None, field_class(_P.TRAFFIC)] = None
    price: Annotated[Price | None, field_class(_P.PRICE)] = None
    campaign_id: Annotated[Text128 | None, field_class(_P.IDENTIFIER)] = None
    client_ip: Annotated[Text64 | None, field_class(_P.SENDER)] = None
    location: Annotated[Text1024 | None, field_class(_P.PERSON)] = None
    display_name: Annotated[Text256 | None, field_class(_P.SENDER)] = None
    child: Annotated[bool | None, field_class(_P.PERSON)] = None
    attributes: Annotated[Attributes | None, field_class(_P.PERSON)] = None


class Communication(Common, frozen=True, kw_only=True, gc=False):
    """A request or a CDR: one SMS or one call, with its content where the gateway has it."""

    content: Annotated[str | None, field_class(_P.CONTENT)] = None
    segments: Annotated[Segments | None, field_class(_P.BILLING)] = None
    encoding: Annotated[Text128 | None, field_class(_P.TRAFFIC)] = None
    answered_at: Annotated[Instant | None, field_class(_P.TIME)] = None
    duration_s: Annotated[Seconds | None, field_class(_P.DURATION)] = None
    billable_s: Annotated[Seconds | None, field_class(_P.DURATION)] = None
    hangup_cause: Annotated[Text128 | None, field_class(_P.TRAFFIC)] = None
    recording_ref: Annotated[Text2048 | None, field_class(_P.CONTENT)] = None
    transcript: Annotated[str | None, field_class(_P.CONTENT)] = None


class Request(Communication, frozen=True, kw_only=True, gc=False, tag="request"):
    """A communication about to be sent: it gets a verdict."""

    purpose: Annotated[Purpose, field_class(_P.BILLING)]
    time_zone: Annotated[Text64 | None, field_class(_P.PERSON)] = None


class Cdr(Communication, frozen=True, kw_only=True, gc=False, tag="cdr"):
    """A communication that happened; an inbound message is a `Cdr` with direction `mo`."""

    purpose: Annotated[Purpose | None, field_class(_P.BILLING)] = None


class Preference(Common, frozen=True, kw_only=True, gc=False, tag="preference"):
    """An opt-out or opt-in by `sender`, the person; `recipient` is the sender id it is about."""

    action: Annotated[SuppressionAction, field_class(_P.SHAPE)]
    scope: Annotated[SuppressionScope, field_class(_P.SHAPE)] = "account"
    class_: Annotated[SuppressionClass, field_class(_P.SHAPE)] = msgspec.field(default="all", name="class")
    purpose: Annotated[Purpose | None, field_class(_P.BILLING)] = None


Inbound = Request | Cdr | Preference

SMS_FIELDS = ("content", "segments", "encoding")
VOICE_FIELDS = ("answered_at", "duration_s", "billable_s", "hangup_cause", "recording_ref", "transcript")
CODE_FIELDS = ("route", "status")
"""Free texts that may stand in the anonymous record, so they must be codes (`schemas.fields.is_code`)."""
