"""The pipeline in two pure steps: `prepare` decides, `complete` seals and splits. Read this first.

    batch ─▶ prepare(batch, view, planner, now) ─▶ Prepared ── needs ─▶ [the shell fetches keys]
                                                       └─▶ complete(prepared, ring, entropy) ─▶ outputs

`prepare` folds the records in order over a copy-on-write overlay of the suppressions, so that a STOP acts from the
next record on. Neither step does I/O or reads a clock; same input, keys, time and entropy give the same bytes.
A batch that waited or was aborted is prepared anew. Every input offset ends in exactly one `Outcome`.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import msgspec
import orjson

from processors.decode import decode, parties, timestamp
from processors.keyring import PLATFORM, EpochRef, KeyRing, Needs, PersonRef, PersonSecret
from processors.plan import Plan, Planner, Template
from processors.screen.keywords import Keywords, Match
from processors.screen.quiet_hours import QuietHours
from processors.screen.suppression import Change, Overlay, Rule, Tokens, View, record_key
from processors.screen.verdict import RegistryView, Subject, Verdict, verdict
from processors.seal import Entropy, Sealer
from processors.split import billable_units, layouts
from schemas.catalog import partition_for
from schemas.errors import Poison
from schemas.fields import Party, PrivacyClass, classes_of
from schemas.inbound import Cdr, Inbound, Preference, Request
from schemas.outbound import Message, Output

UNKNOWN_ACCOUNT = ""
_encode = msgspec.json.Encoder().encode
_SECONDS = tuple(f":{s // 60:02}:{s % 60:02}Z" for s in range(3600))


class End(StrEnum):
    """How a record ends."""

    EMIT = "emit"
    REFUSE = "refuse"
    QUARANTINE = "quarantine"
    EXPIRED = "expired"


class Outcome(NamedTuple):
    """How one input offset ended: what kind of record it was, the end, and its reason code if it has one."""

    kind: str  # request, cdr, preference, unreadable
    end: End
    reason: str | None


class Inbox(NamedTuple):
    """The input of one attempt: where the batch comes from, and its values, in order."""

    stream: str
    partition: int
    offset: int
    values: Sequence[bytes]


class _Communication(NamedTuple):
    """A record that will be sealed: its plan, exact instant, and the secrets of the people in it."""

    record: Request | Cdr
    plan: Plan
    at: str
    persons: tuple[PersonRef | None, PersonRef | None]  # of the platform's copy (or the only one): primary, other
    content_person: PersonRef | None
    verdict: Verdict | None


class Prepared(NamedTuple):
    """What `prepare` decided. `overlay` is merged into the view after the commit, and only then."""

    inbox: Inbox
    now_s: int
    outcomes: list[Outcome]
    needs: Needs
    overlay: Overlay
    cdrs: list[_Communication]
    requests: list[_Communication]
    reviews: list[_Communication]
    quarantined: list[tuple[int, str]]

    def __repr__(self) -> str:
        return f"Prepared({self.inbox.stream}/{self.inbox.partition}@{self.inbox.offset})"


class Pipeline:
    """The compiled policy and layouts that both steps share; holds no state of any batch."""

    def __init__(self, planner: Planner, tokens: Tokens, classes: dict[str, PrivacyClass] | None = None) -> None:
        self.planner = planner
        self.policy = planner.policy
        self.tokens = tokens
        self.keywords = Keywords(*planner.policy.extra_keywords())
        self.cdr, self.request = layouts(classes or classes_of(Request, Cdr, Preference))

    # --- step one ---------------------------------------------------------------------------------------------

    def prepare(self, inbox: Inbox, view: View, registries: RegistryView, now_s: int) -> Prepared:
        """Decide what becomes of each record, and say which keys that needs. Never raises for what a record holds."""
        return _Preparation(self, inbox, view, registries, now_s).run()

    # --- step two ---------------------------------------------------------------------------------------------

    def complete(
        self, prepared: Prepared, ring: KeyRing, entropy: Entropy, partitions: int, *, shuffle: bool = True
    ) -> list[Output]:
        """Seal and split what was decided. A part whose epoch is not in the ring has died and is left out.

        `shuffle=False` keeps the anonymous records in input order: only for showing what the shuffle does.
        """
        return _Completion(self, prepared, ring, entropy, partitions).run(shuffle=shuffle)


class _Preparation:
    """One run of `prepare`: the state that its records share."""

    def __init__(
        self, pipeline: Pipeline, inbox: Inbox, view: View, registries: RegistryView, now_s: int
    ) -> None:
        self.pipeline = pipeline
        self.policy = pipeline.policy
        self.planner = pipeline.planner
        self.token = lru_cache(maxsize=None)(pipeline.tokens.of)
        self.registries = registries
        self.now_s = now_s
        hours = self.policy.screening.quiet_hours
        self.quiet = None if hours is None else QuietHours(hours.start_time, hours.end_time, now_s)
        self.epochs: dict[EpochRef, tuple[int | None, int]] = {}
        self.persons: dict[PersonRef, int | None] = {}
        self.prepared = Prepared(
            inbox, now_s, [], Needs(self.epochs, self.persons), Overlay(view), [], [], [], []
        )
        self.handlers: dict[type, Callable[..., Outcome]] = {
            Request: self._request,
            Cdr: self._cdr,
            Preference: self._preference,
        }

    def run(self) -> Prepared:
        outcomes = self.prepared.outcomes
        handlers = self.handlers
        for index, value in enumerate(self.prepared.inbox.values):
            kind = "unreadable"
            try:
                record = decode(value)
                kind = record.__struct_config__.tag
                ts = timestamp(record, self.now_s)
                plan = self.planner.plan(record.account_id, ts)
                if plan is None:
                    raise Poison("account_unknown")
                primary, other = parties(record, plan.account.default_region)
                outcomes.append(handlers[type(record)](record, plan, ts, primary, other))
            except Poison as poison:
                self._quarantine(index, str(kind), poison.reason)
            except Exception:  # a bug of ours meets one record: it is kept, sealed, and the rest goes on
                self._quarantine(index, str(kind), "internal_error")
        for change in self.prepared.overlay.changes:
            template = self.planner.output("suppressions", _account_of(change.rule), self.now_s)
            self._need_epoch(template)
        return self.prepared

    def _quarantine(self, index: int, kind: str, reason: str) -> None:
        self._need_epoch(self.planner.output("quarantine", UNKNOWN_ACCOUNT, self.now_s))
        self.prepared.quarantined.append((index, reason))
        self.prepared.outcomes.append(Outcome(kind, End.QUARANTINE, reason))

    def _cdr(self, record: Cdr, plan: Plan, ts: int, primary: Party, other: Party) -> Outcome:
        now_s = self.now_s
        moment = plan.moment
        if moment.anonymous_expires_s <= now_s:
            return Outcome("cdr", End.EXPIRED, "older_than_everything")
        ours = self._token_of(plan, primary)
        theirs = self._token_of(plan, other)
        persons: tuple[PersonRef | None, PersonRef | None] = (None, None)
        content_person = None
        if moment.pii_expires_s > now_s:
            self._need_epoch(plan.pii, 1 if theirs is None else 2)
            persons = (self._need_person(plan.pii, ours, plan), self._need_person(plan.pii, theirs, plan))
        if plan.content is not None and (plan.content.deadline_s or 0) > now_s and has_content(record):
            self._need_epoch(plan.content)
            content_person = self._need_person(plan.content, ours, plan)
        item = _Communication(record, plan, self._exact(plan, ts), persons, content_person, None)
        self.prepared.cdrs.append(item)
        if record.direction == "mo" and record.channel == "sms" and ours is not None:
            self._keyword(record, plan, ts, primary, other, ours, item)
        return _EMIT_CDR if moment.pii_expires_s > now_s else _EMIT_ANONYMOUS_ONLY

    def _keyword(
        self, record: Cdr, plan: Plan, ts: int, primary: Party, other: Party, token: bytes, item: _Communication
    ) -> None:
        match = self.pipeline.keywords.match(record.content)
        if match is Match.NONE:
            return
        if match is Match.NEAR:
            if (plan.review.deadline_s or 0) > self.now_s:
                self._need_epoch(plan.review)
                person = self._need_person(plan.review, token, plan)
                self.prepared.reviews.append(item._replace(content_person=person))
            return
        keyword = self.policy.screening.keyword
        scope = self._scope(keyword.scope, record, other)
        for channel in keyword.channels:
            rule = Rule(scope, keyword.class_, channel, "person")
            change = Change(token, rule, match is Match.OPT_OUT, ts, primary.value, "keyword")
            self.prepared.overlay.apply(change, self.now_s)

    def _preference(self, record: Preference, plan: Plan, ts: int, primary: Party, other: Party) -> Outcome:
        token = self._token_of(plan, primary)
        if token is None:
            raise Poison("bad_value:sender")
        rule = Rule(self._scope(record.scope, record, other), record.class_, record.channel, "person")
        change = Change(token, rule, record.action == "opt_out", ts, primary.value, "preference")
        effective = self.prepared.overlay.apply(change, self.now_s)
        return _EMIT_PREFERENCE if effective else Outcome("preference", End.EMIT, "lifts_nothing")

    def _request(self, record: Request, plan: Plan, ts: int, primary: Party, other: Party) -> Outcome:
        now_s = self.now_s
        token = self._token_of(plan, primary)
        subject = Subject(
            record.account_id,
            primary,
            token is not None,
            token or b"",
            record.channel,
            record.purpose,
            self._scope("sender", record, other),
            f"campaign:{record.account_id}:{record.campaign_id}" if record.campaign_id else None,
            record.country,
            bool(record.child),
            ts,
        )
        decided = verdict(
            subject, self.prepared.overlay, self.registries, self.policy, plan.account, self.quiet, now_s
        )
        persons: tuple[PersonRef | None, PersonRef | None] = (None, None)
        if decided.reason is None:
            template = self.planner.output("cleared", record.account_id, now_s)
            theirs = self._token_of(plan, other)
            self._need_epoch(template, 1 if theirs is None else 2)
            persons = (self._need_person(template, token, plan), self._need_person(template, theirs, plan))
        self.prepared.requests.append(
            _Communication(record, plan, self._exact(plan, ts), persons, None, decided)
        )
        if decided.reason is None:
            return _EMIT_REQUEST
        return Outcome("request", End.REFUSE, decided.reason)

    def _scope(self, scope: str, record: Inbound, other: Party) -> str:
        """Return the full scope of a suppression: a sender is named by its token, for it may be a number."""
        account = record.account_id
        if scope == "account":
            return f"account:{account}"
        if scope == "sender":
            return f"sender:{account}:{self.token(other.value).hex()}"
        if scope == "campaign":
            return f"campaign:{account}:{record.campaign_id}"
        return "platform"

    def _token_of(self, plan: Plan, party: Party) -> bytes | None:
        """Return the person's token, or None if no person is behind the party for this account."""
        if not party.is_person or party.value in plan.account.own:
            return None
        return self.token(party.value)

    def _need_epoch(self, template: Template, seals: int = 1) -> None:
        ref = template.ref
        if ref is None:
            raise ValueError("this stream seals nothing")
        deadline, count = self.epochs.get(ref, (template.deadline_s, 0))
        self.epochs[ref] = (deadline, count + seals)

    def _need_person(self, template: Template, token: bytes | None, plan: Plan) -> PersonRef | None:
        if token is None or template.ref is None:
            return None
        owner = template.ref.owner
        ref = PersonRef(owner, token, plan.moment.month_epoch)
        self.persons[ref] = plan.pii_deadline_s if owner == PLATFORM else plan.account_deadline_s
        return ref

    def _exact(self, plan: Plan, ts: int) -> str:
        return plan.moment.hour_epoch + _SECONDS[ts % 3600]


_EMIT_CDR = Outcome("cdr", End.EMIT, None)
_EMIT_ANONYMOUS_ONLY = Outcome("cdr", End.EMIT, "personal_part_expired")
_EMIT_REQUEST = Outcome("request", End.EMIT, None)
_EMIT_PREFERENCE = Outcome("preference", End.EMIT, None)


def has_content(record: Request | Cdr) -> bool:
    """Return whether anything was said: text, recording or transcript, not empty."""
    return bool(record.content or record.recording_ref or record.transcript)


class _Completion:
    """One run of `complete`."""

    def __init__(
        self, pipeline: Pipeline, prepared: Prepared, ring: KeyRing, entropy: Entropy, partitions: int
    ) -> None:
        self.pipeline = pipeline
        self.prepared = prepared
        self.ring = ring
        self.entropy = entropy
        self.partitions = partitions
        self.now_ms = prepared.now_s * 1000
        self.sealers: dict[Template, Sealer | None] = {}

    def run(self, *, shuffle: bool) -> list[Output]:
        pii, content, anonymous = self._cdrs()
        verdicts, cleared = self._requests()
        same = {
            "verdicts": verdicts,
            "cleared": cleared,
            "content": content,
            "cdr.pii": pii,
            "review": self._reviews(),
            "quarantine": self._quarantined(),
        }
        partition = self.prepared.inbox.partition
        outputs = [Output(stream, partition, messages) for stream, messages in same.items() if messages]
        if anonymous:
            mixed = self.entropy.shuffled(anonymous) if shuffle else anonymous
            outputs.append(Output("cdr.anonymous", self.entropy.below(self.partitions), mixed))
        return outputs + self._suppressions()

    def _sealer(self, template: Template) -> Sealer | None:
        """Return the sealer of a template, or None if its epoch is dead: looked up once a batch."""
        try:
            return self.sealers[template]
        except KeyError:
            pass
        epoch = None if template.ref is None else self.ring.epochs.get(template.ref)
        made = None
        if epoch is not None:
            made = Sealer(self.ring, self.entropy, template.stream, template.account, epoch)
        self.sealers[template] = made
        return made

    def _person(self, ref: PersonRef | None) -> PersonSecret | None:
        return None if ref is None else self.ring.persons[ref]

    def _cdrs(self) -> tuple[list[Message], list[Message], list[Message]]:
        pii: list[Message] = []
        content: list[Message] = []
        anonymous: list[Message] = []
        layout = self.pipeline.cdr
        now_s = self.prepared.now_s
        for record, plan, at, persons, content_person, _ in self.prepared.cdrs:
            moment = plan.moment
            if moment.pii_expires_s > now_s and (sealer := self._sealer(plan.pii)) is not None:
                value = self._whole(sealer, plan.pii_envelope, record, at, persons)
                pii.append(Message(moment.day_ms, None, plan.pii.headers, value))
            template = plan.content
            if (
                template is not None
                and has_content(record)
                and (template.deadline_s or 0) > now_s
                and (sealer := self._sealer(template)) is not None
            ):
                head, tail = plan.content_envelope
                value = sealer.one(head, tail, "content", self._person(content_person), layout.content(record, at))
                content.append(Message(moment.day_ms, None, template.headers, value))
            units = billable_units(record, plan.increment_s) if record.channel == "voice" else None
            rendered = layout.anonymous(record, units, moment.coarse, plan.anonymous.privacy)
            anonymous.append(Message(moment.coarse_ms, None, plan.anonymous.headers, rendered))
        return pii, content, anonymous

    def _whole(
        self,
        sealer: Sealer,
        envelope: tuple[bytes, bytes],
        record: Request | Cdr,
        at: str,
        persons: tuple[PersonRef | None, PersonRef | None],
    ) -> bytes:
        """Return a whole record sealed: one part, or two where another party is a person of their own."""
        layout = self.pipeline.cdr if isinstance(record, Cdr) else self.pipeline.request
        head, tail = envelope
        primary, other = persons
        if other is None:
            return sealer.one(head, tail, "primary", self._person(primary), layout.whole(record, at))
        rest, own = layout.other[record.direction]
        return sealer.several(
            head,
            tail,
            [
                ("primary", self._person(primary), rest(record, at)),
                ("other", self._person(other), own(record, at)),
            ],
        )

    def _requests(self) -> tuple[list[Message], list[Message]]:
        verdicts: list[Message] = []
        cleared: list[Message] = []
        now_s, now_ms = self.prepared.now_s, self.now_ms
        planner = self.pipeline.planner
        for record, _plan, at, persons, _, decided in self.prepared.requests:
            if decided is None:
                raise ValueError("a request has a verdict")
            template = planner.output("verdicts", record.account_id, now_s)
            value = render_verdict(planner, template, record.record_id, record.channel, record.purpose, decided, now_s)
            verdicts.append(Message(now_ms, None, template.headers, value))
            if decided.reason is not None:
                continue
            template = planner.output("cleared", record.account_id, now_s)
            sealer = self._sealer(template)
            if sealer is None:
                raise ValueError("a transit key of this hour is alive")
            head, tail = template.envelope(
                account_id=record.account_id,
                channel=record.channel,
                not_after=planner.calendar.instant(decided.not_after_s or now_s),
                purpose=record.purpose,
                record_id=record.record_id,
            )
            value = self._whole(sealer, (head, tail), record, at, persons)
            cleared.append(Message(now_ms, None, template.headers, value))
        return verdicts, cleared

    def _reviews(self) -> list[Message]:
        messages = []
        for record, plan, at, _, person, _ in self.prepared.reviews:
            sealer = self._sealer(plan.review)
            if sealer is None:
                continue
            head, tail = plan.review_envelope
            fields = {"record_id": record.record_id, "sender": record.sender, "recipient": record.recipient,
                      "occurred_at": at}  # fmt: skip
            if plan.content is not None:
                fields["content"] = record.content or ""
            value = sealer.one(head, tail, "review", self._person(person), _encode(fields))
            messages.append(Message(plan.moment.day_ms, None, plan.review.headers, value))
        return messages

    def _quarantined(self) -> list[Message]:
        if not self.prepared.quarantined:
            return []
        inbox = self.prepared.inbox
        template = self.pipeline.planner.output("quarantine", UNKNOWN_ACCOUNT, self.prepared.now_s)
        sealer = self._sealer(template)
        if sealer is None:
            raise ValueError("a quarantine key of this day is alive")
        messages = []
        for index, reason in self.prepared.quarantined:
            head, tail = template.envelope(
                reason=reason, stream=inbox.stream, partition=inbox.partition, offset=inbox.offset + index
            )
            value = sealer.one(head, tail, "record", None, inbox.values[index])
            messages.append(Message(self.now_ms, None, template.headers, value))
        return messages

    def _suppressions(self) -> list[Output]:
        by_partition: dict[int, list[Message]] = {}
        for change in self.prepared.overlay.changes:
            message = seal_change(
                self.pipeline, self._sealer, change, self.prepared.now_s
            )
            partition = partition_for(change.token, self.partitions)
            by_partition.setdefault(partition, []).append(message)
        return [Output("suppressions", partition, messages) for partition, messages in by_partition.items()]


def _account_of(rule: Rule) -> str:
    return rule.scope.split(":")[1] if ":" in rule.scope else UNKNOWN_ACCOUNT


def seal_change(
    pipeline: Pipeline, sealer_of: Callable[[Template], Sealer | None], change: Change, now_s: int
) -> Message:
    """Return the `suppressions` message of a change; the number stands in the sealed part and nowhere else."""
    template = pipeline.planner.output("suppressions", _account_of(change.rule), now_s)
    sealer = sealer_of(template)
    if sealer is None:
        raise ValueError("the suppression key is alive")
    key = record_key(pipeline.tokens.version, change)
    calendar = pipeline.planner.calendar
    head, tail = template.envelope(
        action="opt_out" if change.out else "opt_in",
        entry=key.decode(),
        event_at=calendar.instant(change.event_s),
        reason=change.reason,
    )
    value = sealer.one(head, tail, "number", None, _encode({"number": change.number}), bare=True)
    return Message(now_s * 1000, key, template.headers, value)


def render_verdict(
    planner: Planner,
    template: Template,
    record_id: str,
    channel: str,
    purpose: str,
    decided: Verdict,
    now_s: int,
    *,
    second: bool = False,
) -> bytes:
    """Return a verdict as JSON: id, cleared or refused, reason, clause, vendor codes, instants; no number, no text."""
    instant = planner.calendar.instant
    return orjson.dumps(
        {
            "v": 1,
            "record_id": record_id,
            "account_id": template.account,
            "channel": channel,
            "purpose": purpose,
            "verdict": "cleared" if decided.reason is None else "refused",
            "reason": decided.reason,
            "clause": decided.clause,
            "codes": decided.codes or {},
            "decided_at": instant(now_s),
            "not_after": None if decided.not_after_s is None else instant(decided.not_after_s),
            "defer_until": None if decided.defer_until_s is None else instant(decided.defer_until_s),
            "second": second,
            "privacy": orjson.Fragment(template.privacy),
        }
    )
