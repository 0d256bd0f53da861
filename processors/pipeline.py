"""The pipeline in two pure steps: `prepare` decides, `complete` seals and splits. Read this first.

    batch ─▶ prepare(batch, view, planner, now) ─▶ Prepared ── needs ─▶ [the shell fetches keys]
                                                       └─▶ complete(prepared, ring, entropy) ─▶ outputs

`prepare` folds the records in order over a copy-on-write overlay of the suppressions, so that a STOP acts from the
next record on. Neither step does I/O or reads a clock; same input, keys, time and entropy give the same bytes.
A batch that waited or was aborted is prepared anew. Every input offset ends in exactly one `Outcome`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

import msgspec
import orjson

from processors.decode import check_clear, decode_shape, parties, timestamp
from processors.keyring import KeyRing, Needs, PersonRef
from processors.plan import Circle, Person, Plan, Planner, Template
from processors.retention import instant
from processors.screen.keywords import Keywords, Match
from processors.screen.quiet_hours import QuietHours
from processors.screen.suppression import Change, Overlay, Rule, Tokens, View, covering_scopes, record_key, scope_id
from processors.screen.verdict import REASONS, RegistryView, Subject, Verdict, verdict
from processors.seal import Entropy, Frame, OnePart, Sealer
from processors.split import Clear, Layout, billable_units, layouts
from schemas.catalog import partition_for
from schemas.errors import Poison
from schemas.fields import Party, PrivacyClass, classes_of
from schemas.inbound import Cdr, Inbound, Preference, Request
from schemas.outbound import Headers, Message, Output

UNKNOWN_ACCOUNT = ""
_NO_ID, _AFTER_ID = b'"","sealed":[', b',"sealed":['
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

    def __repr__(self) -> str:
        return f"Inbox({self.stream}/{self.partition}@{self.offset})"


class _Decided(msgspec.Struct, frozen=True, gc=False):
    """What was decided about one record, which it holds; shows nothing of it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _Cdr(_Decided, frozen=True, gc=False):
    """A CDR to be sealed and split: its plan, whose secrets seal it, and its content as JSON (None: not kept)."""

    record: Cdr
    plan: Plan
    clear: Clear
    personal: bool  # the sealed record is still to be kept
    primary: PersonRef | None
    other: PersonRef | None
    content: bytes | None
    content_person: PersonRef | None


class _Request(_Decided, frozen=True, gc=False):
    """A request with its verdict, and whose secrets seal it if it is cleared."""

    record: Request
    verdict: Verdict
    circle: Circle
    template: Template | None  # of `cleared`, if it is
    primary: PersonRef | None
    other: PersonRef | None


class _Review(_Decided, frozen=True, gc=False):
    """A near miss for review: its fields as JSON, and whose secret seals them."""

    plan: Plan
    person: PersonRef
    fields: bytes


class Prepared(NamedTuple):
    """What `prepare` decided. `overlay` is merged into the view after the commit, and only then."""

    inbox: Inbox
    now_s: int
    outcomes: list[Outcome]
    needs: Needs
    overlay: Overlay
    cdrs: list[_Cdr]
    requests: list[_Request]
    reviews: list[_Review]
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

    def __init__(self, pipeline: Pipeline, inbox: Inbox, view: View, registries: RegistryView, now_s: int) -> None:
        self.pipeline = pipeline
        self.policy = pipeline.policy
        self.planner = pipeline.planner
        self.registries = registries
        self.now_s = now_s
        hours = self.policy.screening.quiet_hours
        self.quiet = None if hours is None else QuietHours(hours.start_time, hours.end_time, now_s)
        self.cleared: dict[str, Template] = {}
        self.prepared = Prepared(inbox, now_s, [], Needs({}, {}), Overlay(view), [], [], [], [])
        self.handlers: dict[type, Callable[..., Outcome]] = {
            Request: self._request,
            Cdr: self._cdr,
            Preference: self._preference,
        }

    def run(self) -> Prepared:
        inbox = self.prepared.inbox
        outcomes = self.prepared.outcomes
        handlers = self.handlers
        plan_of = self.planner.plan
        now_s = self.now_s
        for index, value in enumerate(inbox.values):
            record = None
            try:
                record = decode_shape(value)
                ts = timestamp(record, now_s)
                plan = plan_of(record.account_id, ts)
                if plan is None:
                    raise Poison("account_unknown")
                primary, other = parties(record, plan.account.default_region)
                outcomes.append(handlers[type(record)](record, plan, ts, primary, other))
            except Poison as poison:
                self._quarantine(index, record, poison.reason)
            except Exception:  # a bug of ours meets one record: it is kept, sealed, and the rest goes on
                self._quarantine(index, record, "internal_error")
        self._needs()
        return self.prepared

    def _quarantine(self, index: int, record: Inbound | None, reason: str) -> None:
        self.prepared.quarantined.append((index, reason))
        kind = "unreadable" if record is None else str(record.__struct_config__.tag)
        self.prepared.outcomes.append(Outcome(kind, End.QUARANTINE, reason))

    def _cdr(self, record: Cdr, plan: Plan, ts: int, primary: Party, other: Party) -> Outcome:
        now_s = self.now_s
        moment = plan.moment
        if moment.anonymous_expires_s <= now_s:
            return _EXPIRED
        layout = self.pipeline.cdr
        clear = layout.clear(record)
        text = record.content
        content = layout.take(record, moment.hour_epoch + _SECONDS[ts % 3600])
        ours = self._meet(plan, primary) if primary.is_person else None
        theirs = self._meet(plan, other) if other.is_person else None
        primary_ref = other_ref = content_ref = None
        personal = moment.pii_expires_s > now_s
        if personal:
            if ours is not None:
                primary_ref = ours.ref(plan.pii)
            if theirs is not None:
                other_ref = theirs.ref(plan.pii)
        if content is not None:
            if plan.content is None or plan.content_expires_s <= now_s:
                content = None
            elif ours is not None:
                content_ref = ours.ref(plan.content)
        if text is not None and ours is not None and record.direction == "mo":
            self._keyword(text, record, plan, ts, primary, other, ours)
        self.prepared.cdrs.append(_Cdr(record, plan, clear, personal, primary_ref, other_ref, content, content_ref))
        return _EMIT_CDR if personal else _EMIT_ANONYMOUS_ONLY

    def _keyword(self, text: str, record: Cdr, plan: Plan, ts: int, primary: Party, other: Party, ours: Person) -> None:
        """Act on an inbound text that is a keyword as a whole; send a near miss to review."""
        match = self.pipeline.keywords.match(text)
        if match is Match.NONE:
            return
        if match is Match.NEAR:
            if plan.review_expires_s > self.now_s:
                fields = {"record_id": record.record_id, "occurred_at": record.occurred_at,
                          "sender": record.sender, "recipient": record.recipient}  # fmt: skip
                if plan.content is not None:
                    fields["content"] = text
                self.prepared.reviews.append(_Review(plan, ours.ref(plan.review), _encode(fields)))
            return
        keyword = self.policy.screening.keyword
        scope = self._scope(keyword.scope, record, other)
        for channel in keyword.channels:
            rule = Rule(scope, keyword.class_, channel, "person")
            change = Change(ours.token, rule, match is Match.OPT_OUT, ts, primary.value, "keyword")
            self.prepared.overlay.apply(change, self.now_s)

    def _preference(self, record: Preference, plan: Plan, ts: int, primary: Party, other: Party) -> Outcome:
        ours = self._meet(plan, primary) if primary.is_person else None
        if ours is None:
            raise Poison("bad_value:sender")
        check_clear(record)
        rule = Rule(self._scope(record.scope, record, other), record.class_, record.channel, "person")
        change = Change(ours.token, rule, record.action == "opt_out", ts, primary.value, "preference")
        return _EMIT_PREFERENCE if self.prepared.overlay.apply(change, self.now_s) else _LIFTS_NOTHING

    def _request(self, record: Request, plan: Plan, ts: int, primary: Party, other: Party) -> Outcome:
        check_clear(record)
        now_s = self.now_s
        account_id = record.account_id
        ours = self._meet(plan, primary) if primary.is_person else None
        token = None if ours is None else ours.token
        overlay = self.prepared.overlay
        subject = Subject(
            account_id,
            primary,
            token,
            record.channel,
            record.purpose,
            record.country,
            record.child is True,
            ts,
            # scopes that need hashing are built only for a person who has opted out of something
            covering_scopes(account_id, other.value, record.campaign_id, self.pipeline.tokens)
            if token is not None and overlay.get(token)
            else (),
        )
        decided = verdict(subject, overlay, self.registries, self.policy, plan.account, self.quiet, now_s)
        if decided.reason is not None:
            self.prepared.requests.append(_Request(record, decided, plan.circle, None, None, None))
            return _REFUSALS[decided.reason]
        self.pipeline.request.take(record, plan.moment.hour_epoch + _SECONDS[ts % 3600])
        template = self.cleared.get(account_id)
        if template is None:
            template = self.cleared[account_id] = self.planner.output("cleared", account_id, now_s)
        theirs = self._meet(plan, other) if other.is_person else None
        primary_ref = None if ours is None else ours.ref(template)
        other_ref = None if theirs is None else theirs.ref(template)
        self.prepared.requests.append(_Request(record, decided, plan.circle, template, primary_ref, other_ref))
        return _EMIT_REQUEST

    def _scope(self, scope: str, record: Inbound, other: Party) -> str:
        return scope_id(scope, record.account_id, other.value, record.campaign_id, self.pipeline.tokens)

    def _meet(self, plan: Plan, party: Party) -> Person | None:
        """Return who is behind a party that may be a person, or None if it is the account's own number."""
        value = party.value
        if value in plan.own:
            return None
        return plan.circle.people.get(value) or self.planner.meet(plan.circle, value, self.pipeline.tokens)

    def _needs(self) -> None:
        """Fill in which secrets and keys the outputs will take, and an upper bound of the seals under each key."""
        prepared = self.prepared
        persons = prepared.needs.persons
        seals: Counter[Template] = Counter()
        asked = chain(
            ((item.plan.circle, (item.primary, item.other, item.content_person)) for item in prepared.cdrs),
            ((item.circle, (item.primary, item.other)) for item in prepared.requests),
            ((item.plan.circle, (item.person,)) for item in prepared.reviews),
        )
        for circle, refs in asked:
            for ref in refs:
                if ref is not None:  # accounts share the platform's secrets: the longest life counts
                    deadline_s = circle.deadlines_s[ref.owner]
                    if persons.setdefault(ref, deadline_s) < deadline_s:
                        persons[ref] = deadline_s
        for plan, count in Counter([item.plan for item in prepared.cdrs if item.personal]).items():
            seals[plan.pii] += 2 * count
        for plan, count in Counter([item.plan for item in prepared.cdrs if item.content is not None]).items():
            if plan.content is not None:
                seals[plan.content] += count
        for request in prepared.requests:
            if request.template is not None:
                seals[request.template] += 2
        for review in prepared.reviews:
            seals[review.plan.review] += 1
        for change in prepared.overlay.changes:
            seals[self.planner.output("suppressions", _account_of(change.rule), self.now_s)] += 1
        if prepared.quarantined:
            seals[self.planner.output("quarantine", UNKNOWN_ACCOUNT, self.now_s)] = len(prepared.quarantined)
        epochs = prepared.needs.epochs
        for template, count in seals.items():
            if template.ref is not None:
                epochs[template.ref] = (template.deadline_s, epochs.get(template.ref, (None, 0))[1] + count)


_EMIT_CDR = Outcome("cdr", End.EMIT, None)
_EMIT_ANONYMOUS_ONLY = Outcome("cdr", End.EMIT, "personal_part_expired")
_EXPIRED = Outcome("cdr", End.EXPIRED, "older_than_everything")
_EMIT_REQUEST = Outcome("request", End.EMIT, None)
_EMIT_PREFERENCE = Outcome("preference", End.EMIT, None)
_LIFTS_NOTHING = Outcome("preference", End.EMIT, "lifts_nothing")
_REFUSALS = {reason: Outcome("request", End.REFUSE, reason) for reason in REASONS}


class _Terms(NamedTuple):
    """What the outputs of many requests share: verdict headers, verdict after the id, envelope around the id."""

    headers: Headers
    verdict: bytes
    head: bytes
    tail: bytes


class _Completion:
    """One run of `complete`."""

    def __init__(
        self, pipeline: Pipeline, prepared: Prepared, ring: KeyRing, entropy: Entropy, partitions: int
    ) -> None:
        self.pipeline = pipeline
        self.planner = pipeline.planner
        self.prepared = prepared
        self.ring = ring
        self.entropy = entropy
        self.partitions = partitions
        self.now_ms = prepared.now_s * 1000
        self.sealers: dict[Template, Sealer | None] = {}
        self.one_parts: dict[Template, tuple[OnePart, Frame] | None] = {}

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
        if template not in self.sealers:
            epoch = None if template.ref is None else self.ring.epochs.get(template.ref)
            self.sealers[template] = (
                None if epoch is None else Sealer(self.ring, self.entropy, template.stream, template.account, epoch)
            )
        return self.sealers[template]

    def _alive(self, template: Template) -> Sealer:
        """Return the sealer of a template whose epoch began less than its life ago, so it cannot be dead."""
        sealer = self._sealer(template)
        if sealer is None:
            raise ValueError(f"the key of {template.stream} is missing from the ring")
        return sealer

    def _one_part(self, template: Template, envelope: tuple[bytes, bytes], group: str) -> tuple[OnePart, Frame] | None:
        """Return what seals a template's one-part values, and the frame of this envelope; None: its epoch is dead."""
        if template not in self.one_parts:
            sealer = self._sealer(template)
            head, tail = envelope
            if sealer is None:
                self.one_parts[template] = None
            else:
                one_part = sealer.one_part(tail, group)
                self.one_parts[template] = (one_part, one_part.frame(head))
        return self.one_parts[template]

    def _cdrs(self) -> tuple[list[Message], list[Message], list[Message]]:
        pii: list[Message] = []
        content: list[Message] = []
        anonymous: list[Message] = []
        layout = self.pipeline.cdr
        whole = layout.whole
        persons = self.ring.persons
        rendered: dict[tuple[str, Clear, int | None], Message] = {}
        known = self.one_parts
        for item in self.prepared.cdrs:
            record, plan = item.record, item.plan
            day_ms = plan.moment.day_ms
            if item.personal:
                template = plan.pii
                found = known[template] if template in known else self._one_part(template, plan.pii_envelope, "primary")
                if found is not None:
                    if item.other is None:
                        one_part, frame = found
                        value = one_part.seal(
                            frame, None if item.primary is None else persons[item.primary], whole(record)
                        )
                    else:
                        value = self._apart(template, plan.pii_envelope, layout, item)
                    pii.append(Message(day_ms, None, template.headers, value))
            if item.content is not None and plan.content is not None:
                template = plan.content
                envelope = plan.content_envelope
                found = known[template] if template in known else self._one_part(template, envelope, "content")
                if found is not None:
                    one_part, frame = found
                    person = None if item.content_person is None else persons[item.content_person]
                    content.append(Message(day_ms, None, template.headers, one_part.seal(frame, person, item.content)))
            units = billable_units(record, plan.increment_s) if record.channel == "voice" else None
            key = (plan.period, item.clear, units)
            message = rendered.get(key)
            if message is None:
                value = layout.anonymous(item.clear, units, plan.moment.coarse, plan.anonymous.privacy)
                message = Message(plan.moment.coarse_ms, None, plan.anonymous.headers, value)
                rendered[key] = message
            anonymous.append(message)
        return pii, content, anonymous

    def _apart(self, template: Template, envelope: tuple[bytes, bytes], layout: Layout, item: _Cdr | _Request) -> bytes:
        """Return a record of two persons sealed in two parts, each under the secret of whom it is about."""
        persons = self.ring.persons
        rest, own = layout.other[item.record.direction]
        primary = None if item.primary is None else persons[item.primary]
        other = None if item.other is None else persons[item.other]
        parts = (("primary", primary, rest(item.record)), ("other", other, own(item.record)))
        return self._alive(template).several(*envelope, parts)

    def _requests(self) -> tuple[list[Message], list[Message]]:
        verdicts: list[Message] = []
        cleared: list[Message] = []
        layout, persons = self.pipeline.request, self.ring.persons
        rendered: dict[tuple[str, str, str, str | None, int | None, int | None], _Terms] = {}
        for item in self.prepared.requests:
            record, decided, template = item.record, item.verdict, item.template
            key = (
                record.account_id, record.channel, record.purpose,
                decided.reason, decided.not_after_s, decided.defer_until_s,
            )  # fmt: skip
            terms = rendered.get(key)
            if terms is None:
                terms = rendered[key] = self._terms(record, decided, template)
            # the record id stands first in the verdict and last in the envelope: the rest is constant
            record_id = orjson.dumps(record.record_id)
            value = b"".join((b'{"record_id":', record_id, terms.verdict))
            verdicts.append(Message(self.now_ms, None, terms.headers, value))
            if template is None:
                continue
            head = b"".join((terms.head, record_id, _AFTER_ID))
            if item.other is None:
                found = self._one_part(template, (head, terms.tail), "primary")
                if found is None:
                    raise ValueError("the key of cleared is missing from the ring")
                one_part, _ = found
                person = None if item.primary is None else persons[item.primary]
                value = one_part.seal(one_part.frame(head), person, layout.whole(record))
            else:
                value = self._apart(template, (head, terms.tail), layout, item)
            cleared.append(Message(self.now_ms, None, template.headers, value))
        return verdicts, cleared

    def _terms(self, record: Request, decided: Verdict, template: Template | None) -> "_Terms":
        """Return what all requests of one account, channel, purpose and verdict share in their outputs."""
        now_s = self.prepared.now_s
        answer = self.planner.output("verdicts", record.account_id, now_s)
        verdict_rest = render_verdict(answer, "", record.channel, record.purpose, decided, now_s)
        head = tail = b""
        if template is not None:
            head, tail = template.envelope(
                account_id=record.account_id,
                channel=record.channel,
                not_after=instant(decided.not_after_s or now_s),
                purpose=record.purpose,
                record_id="",
            )
        return _Terms(answer.headers, verdict_rest.removeprefix(b'{"record_id":""'), head.removesuffix(_NO_ID), tail)

    def _reviews(self) -> list[Message]:
        messages = []
        for item in self.prepared.reviews:
            sealer = self._sealer(item.plan.review)
            if sealer is not None:
                person = self.ring.persons[item.person]
                value = sealer.several(*item.plan.review_envelope, (("review", person, item.fields),))
                messages.append(Message(item.plan.moment.day_ms, None, item.plan.review.headers, value))
        return messages

    def _quarantined(self) -> list[Message]:
        messages = []
        inbox = self.prepared.inbox
        for index, reason in self.prepared.quarantined:
            template = self.planner.output("quarantine", UNKNOWN_ACCOUNT, self.prepared.now_s)
            envelope = template.envelope(
                reason=reason, stream=inbox.stream, partition=inbox.partition, offset=inbox.offset + index
            )
            value = self._alive(template).several(*envelope, (("record", None, inbox.values[index]),))
            messages.append(Message(self.now_ms, None, template.headers, value))
        return messages

    def _suppressions(self) -> list[Output]:
        by_partition: dict[int, list[Message]] = {}
        for change in self.prepared.overlay.changes:
            message = seal_change(self.pipeline, self._alive, change, self.prepared.now_s)
            by_partition.setdefault(partition_for(change.token, self.partitions), []).append(message)
        return [Output("suppressions", partition, messages) for partition, messages in by_partition.items()]


def _account_of(rule: Rule) -> str:
    return rule.scope.split(":")[1] if ":" in rule.scope else UNKNOWN_ACCOUNT


def seal_change(pipeline: Pipeline, sealer_of: Callable[[Template], Sealer], change: Change, now_s: int) -> Message:
    """Return the `suppressions` message of a change; the number stands in the sealed part and nowhere else."""
    template = pipeline.planner.output("suppressions", _account_of(change.rule), now_s)
    key = record_key(pipeline.tokens.version, change)
    head, tail = template.envelope(
        account_id=template.account or None,
        action="opt_out" if change.out else "opt_in",
        entry=key.decode(),
        event_at=instant(change.event_s),
        reason=change.reason,
    )
    number = _encode({"number": change.number})
    value = sealer_of(template).several(head, tail, (("number", None, number),), bare=True)
    return Message(now_s * 1000, key, template.headers, value)


def render_verdict(
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
    return orjson.dumps(
        {
            "record_id": record_id,
            "v": 1,
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
