"""The pipeline in two pure steps: `prepare` decides and splits, `complete` seals. Read this first.

    batch ─▶ prepare(batch, view, planner, now) ─▶ Prepared ── needs ─▶ [the shell fetches keys]
                                                       └─▶ complete(prepared, ring, entropy) ─▶ outputs

`prepare` folds the records in order over a copy-on-write overlay of the suppressions, so that a STOP acts from the
next record on. It renders at once what a record leaves and lets it go before the next: the records of a batch then
use the same memory one after the other, which the processor has at hand (measured: a tenth of the time). Neither step
does I/O or reads a clock; same input, keys, time and entropy give the same bytes. A batch that waited or was aborted
is prepared anew. Every input offset ends in exactly one `Outcome`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import orjson

from processors.decode import check_clear, decode_shape, parties, timestamp
from processors.keyring import KeyRing, Needs, PersonRef
from processors.plan import Circle, Met, Plan, Planner, Template
from processors.retention import instant
from processors.screen.keywords import Keywords, Match
from processors.screen.registry import RegistryView
from processors.screen.revocation import keyword_rules
from processors.screen.suppression import (
    Change,
    Overlay,
    Rule,
    Suppressions,
    Tokens,
    View,
    covering_scopes,
    hidden,
    record_key,
    scope_id,
)
from processors.screen.verdict import NOBODY, REASONS, Bound, Memo, Screen, Subject, Verdict
from processors.seal import Entropy, Job, Sealer, Way, seal_each
from processors.split import Layout, billable_units, layouts
from schemas.catalog import partition_for
from schemas.errors import KeysChanged, Poison
from schemas.fields import Kind, PrivacyClass, classes_of
from schemas.inbound import Cdr, Communication, Inbound, Preference, Request
from schemas.outbound import Headers, Message, Output

UNKNOWN_ACCOUNT = ""
MAX_RENDERED = 4096
_NO_ID, _AFTER_ID = b'"","sealed":[', b',"sealed":['
_NUMBER = Kind.NUMBER  # Python 3.11 takes 0.09 µs to find a member of an enumeration
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
    offset: int  # of the first
    values: Sequence[bytes]
    offsets: Sequence[int] | None = None  # of each, if they do not just follow the first

    def place_of(self, index: int) -> int:
        """Return the offset of a value."""
        return self.offset + index if self.offsets is None else self.offsets[index]

    def __repr__(self) -> str:
        return f"Inbox({self.stream}/{self.partition}@{self.offset})"


class Prepared(NamedTuple):
    """What `prepare` decided. `overlay` is merged into the view after the commit, and only then."""

    inbox: Inbox
    now_s: int
    outcomes: list[Outcome]
    needs: Needs
    overlay: Overlay
    cdrs: list[Job]  # for `cdr.pii` and `content`, record by record
    anonymous: list[Message]
    verdicts: list[Message]
    requests: list[Job]  # those that are cleared
    reviews: list[Job]
    quarantined: list[tuple[int, str]]

    def __repr__(self) -> str:
        return f"Prepared({self.inbox.stream}/{self.inbox.partition}@{self.inbox.offset})"


class Pipeline:
    """The compiled policy and layouts that both steps share; what it keeps says nothing of any batch."""

    def __init__(self, planner: Planner, tokens: Tokens, classes: dict[str, PrivacyClass] | None = None) -> None:
        self.planner = planner
        self.policy = planner.policy
        self.tokens = tokens
        self.bound = Bound(self.policy)
        self.keywords = Keywords(self.policy.languages(), *self.policy.extra_keywords())
        self.cdr, self.request = layouts(classes or classes_of(Request, Cdr, Preference))
        self.rendered: dict[_Clear, Message] = {}
        """Anonymous records of late, by all that they depend on: equal ones are rendered once."""

    # --- step one ---------------------------------------------------------------------------------------------

    def prepare(
        self, inbox: Inbox, view: Suppressions, registries: RegistryView, now_s: int, exemptions: View = NOBODY
    ) -> Prepared:
        """Decide what becomes of each record, and say which keys that needs. Never raises for what a record holds."""
        return _Preparation(self, inbox, view, registries, now_s, exemptions).run()

    # --- step two ---------------------------------------------------------------------------------------------

    def complete(
        self, prepared: Prepared, ring: KeyRing, entropy: Entropy, partitions: int, *, shuffle: bool = True
    ) -> list[Output]:
        """Seal and split what was decided. A part whose epoch is not in the ring has died and is left out.

        `shuffle=False` keeps the anonymous records in input order: only for showing what the shuffle does.
        """
        return _Completion(self, prepared, ring, entropy, partitions).run(shuffle=shuffle)


class _Terms(NamedTuple):
    """What the outputs of many requests share: verdict headers, verdict after the id, envelope up to the id."""

    headers: Headers
    verdict: bytes
    head: bytes


_Clear = tuple[str, int | None, tuple[Any, ...]]
"""All that an anonymous record depends on: the plan's period, billable units, and the values that may stand in it."""


class _Preparation:
    """One run of `prepare`: the state that its records share."""

    def __init__(
        self,
        pipeline: Pipeline,
        inbox: Inbox,
        view: Suppressions,
        registries: RegistryView,
        now_s: int,
        exemptions: View,
    ) -> None:
        self.pipeline = pipeline
        self.policy = pipeline.policy
        self.planner = pipeline.planner
        self.tokens = pipeline.tokens
        self.layout = pipeline.cdr
        self.now_s = now_s
        self.cleared: dict[Circle, Template] = {}
        self.terms: dict[tuple[object, ...], _Terms] = {}
        self.rendered = pipeline.rendered
        self.serial, self.changed = view.serial, view.changed
        self.prepared = Prepared(inbox, now_s, [], Needs({}, {}), Overlay(view), [], [], [], [], [], [])
        self.screen = Screen(self.policy, registries, self.prepared.overlay, exemptions, now_s, pipeline.bound)
        self.handlers: dict[type, Callable[..., Outcome]] = {
            Request: self._request,
            Cdr: self._cdr,
            Preference: self._preference,
        }

    def run(self) -> Prepared:
        inbox = self.prepared.inbox
        outcomes = self.prepared.outcomes
        handlers = self.handlers
        plan_of, meet, tokens = self.planner.plan, self.planner.meet, self.tokens
        now_s = self.now_s
        for index, value in enumerate(inbox.values):
            record = None
            try:
                record = decode_shape(value)
                ts = timestamp(record, now_s)
                plan = plan_of(record.account_id, ts)
                if plan is None:
                    raise Poison("account_unknown")
                met = plan.circle.met
                sender, recipient = record.sender, record.recipient
                primary, other = parties(
                    record,
                    met.get(sender) or meet(plan, sender, record.country, tokens),
                    met.get(recipient) or meet(plan, recipient, record.country, tokens),
                )
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

    def _cdr(self, record: Cdr, plan: Plan, ts: int, primary: Met, other: Met) -> Outcome:
        now_s = self.now_s
        moment = plan.moment
        if moment.anonymous_expires_s <= now_s:
            return _EXPIRED
        layout = self.layout
        units = None if record.channel == "sms" else billable_units(record, plan.increment_s)
        clear = (plan.period, units, layout.clear(record))
        anonymous = self.rendered.get(clear) or self._anonymous(clear, record, plan)
        text = record.content
        content = layout.take(record, moment.hour_epoch + _SECONDS[ts % 3600])
        pii = _job(plan.pii, layout, record, primary, other) if moment.pii_expires_s > now_s else None
        if text is not None and primary.token is not None and record.direction == "mo":
            self._keyword(text, record, plan, ts, primary, other)
        prepared = self.prepared
        if pii is not None:
            prepared.cdrs.append(pii)
        kept = plan.content
        if content is not None and kept is not None and plan.content_expires_s > now_s:
            prepared.cdrs.append(Job(kept, primary.ref(kept), content))
        prepared.anonymous.append(anonymous)
        return _EMIT_ANONYMOUS_ONLY if pii is None else _EMIT_CDR

    def _anonymous(self, clear: _Clear, record: Cdr, plan: Plan) -> Message:
        """Return the anonymous record of these values. Raises Poison if one of them may not stand in it."""
        check_clear(record)
        _, units, values = clear
        if len(self.rendered) >= MAX_RENDERED:
            self.rendered.clear()
        value = self.layout.anonymous(values, units, plan.moment.coarse, plan.anonymous.privacy)
        message = self.rendered[clear] = Message(plan.moment.coarse_ms, None, plan.anonymous.headers, value)
        return message

    def _keyword(self, text: str, record: Cdr, plan: Plan, ts: int, primary: Met, other: Met) -> None:
        """Act on an inbound text that is a keyword as a whole; send a near miss to review."""
        match = self.pipeline.keywords.match(text)
        if match is Match.NONE:
            return
        if match is Match.NEAR:
            if plan.review_expires_s > self.now_s:
                fields = {"record_id": record.record_id, "occurred_at": record.occurred_at,
                          "sender": record.sender, "recipient": record.recipient}  # fmt: skip
                if record.country is not None:  # what the opt-out would depend on, should it be one
                    fields["country"] = record.country
                if record.campaign_id is not None:
                    fields["campaign_id"] = record.campaign_id
                if plan.content is not None:
                    fields["content"] = text
                self.prepared.reviews.append(Job(plan.review, primary.ref(plan.review), _encode(fields)))
            return
        rules = keyword_rules(
            self.policy, primary.party, ts, record.account_id, other.party.value, record.campaign_id, self.tokens
        )
        for rule in rules:
            self._change(rule, record, primary, other, "keyword", ts, out=match is Match.OPT_OUT)

    def _preference(self, record: Preference, _plan: Plan, ts: int, primary: Met, other: Met) -> Outcome:
        if primary.token is None:
            raise Poison("bad_value:sender")
        check_clear(record)
        rule = Rule(self._scope(record.scope, record, other), record.class_, record.channel, "person")
        counts = self._change(rule, record, primary, other, "preference", ts, out=record.action == "opt_out")
        return _EMIT_PREFERENCE if counts else _LIFTS_NOTHING

    def _change(self, rule: Rule, record: Inbound, person: Met, other: Met, reason: str, ts: int, *, out: bool) -> bool:
        """Fold an opt-out or opt-in of a person into the overlay, and return whether it changes anything."""
        if person.token is None:
            raise ValueError("only a person opts out")
        named = hidden(rule.scope, other.party.value, record.campaign_id)
        change = Change(person.token, rule, out, ts, person.party.value, reason, named)
        return self.prepared.overlay.apply(change, self.now_s)

    def _request(self, record: Request, plan: Plan, ts: int, primary: Met, other: Met) -> Outcome:
        check_clear(record)
        now_s = self.now_s
        account_id = record.account_id
        token = primary.token
        overlay = self.prepared.overlay
        party, memo = primary.party, primary.memo
        if memo is None and party.kind is _NUMBER:
            memo = primary.memo = Memo(party, record.country)
        scopes: tuple[str, ...] = ()
        # what is kept with the person costs nothing to look at; anything else is a read of memory that is far away
        if token is not None and (
            memo is None or memo.clean != self.serial or token in overlay.changed or token in self.changed
        ):
            if overlay.get(token):  # scopes that need hashing are built only for who has opted out of something
                scopes = covering_scopes(account_id, other.party.value, record.campaign_id, self.tokens)
            elif memo is not None:
                memo.clean = self.serial
        subject = Subject(
            account_id,
            party,
            token,
            record.channel,
            record.purpose,
            record.country,
            record.child is True,
            ts,
            scopes,
            record.time_zone,
            memo,
        )
        decided = self.screen.verdict(subject, plan.account)
        terms = self._terms(record, decided)
        # the record id stands first in the verdict and last in the envelope: the rest is constant
        record_id = orjson.dumps(record.record_id)
        answer = Message(now_s * 1000, None, terms.headers, b"".join((b'{"record_id":', record_id, terms.verdict)))
        if decided.reason is not None:
            self.prepared.verdicts.append(answer)
            return _REFUSALS[decided.reason]
        template = self.cleared.get(plan.circle) or self._cleared(plan.circle)
        self.pipeline.request.take(record, plan.moment.hour_epoch + _SECONDS[ts % 3600])
        head = b"".join((terms.head, record_id, _AFTER_ID))
        job = _job(template, self.pipeline.request, record, primary, other, head)
        self.prepared.verdicts.append(answer)
        self.prepared.requests.append(job)
        return _EMIT_REQUEST

    def _cleared(self, circle: Circle) -> Template:
        """Return how requests of a circle are sealed in this batch."""
        template = self.planner.output("cleared", circle.account_id, self.now_s)
        _, tail = template.envelope()
        made = self.cleared[circle] = template.about(circle, "primary", self.now_s * 1000, tail=tail)
        return made

    def _terms(self, record: Request, decided: Verdict) -> _Terms:
        """Return what all requests of one account, channel, purpose and verdict share in their outputs."""
        key = (
            record.account_id, record.channel, record.purpose,
            decided.reason, decided.not_after_s, decided.defer_until_s, decided.exemption, decided.confirmation,
        )  # fmt: skip
        terms = self.terms.get(key)
        if terms is not None:
            return terms
        now_s = self.now_s
        answer = self.planner.output("verdicts", record.account_id, now_s)
        rendered = render_verdict(answer, "", record.channel, record.purpose, decided, now_s)
        head, _ = self.planner.output("cleared", record.account_id, now_s).envelope(
            account_id=record.account_id,
            channel=record.channel,
            **({} if decided.exemption is None else {"exemption": decided.exemption}),
            not_after=instant(decided.not_after_s or now_s),
            purpose=record.purpose,
            record_id="",
        )
        terms = _Terms(answer.headers, rendered.removeprefix(b'{"record_id":""'), head.removesuffix(_NO_ID))
        self.terms[key] = terms
        return terms

    def _scope(self, scope: str, record: Inbound, other: Met) -> str:
        return scope_id(scope, record.account_id, other.party.value, record.campaign_id, self.tokens)

    def _needs(self) -> None:
        """Fill in which secrets and keys the outputs will take, and how many seals under each key."""
        prepared = self.prepared
        refs: defaultdict[Template, list[PersonRef | None]] = defaultdict(list)
        for job in chain(prepared.cdrs, prepared.requests, prepared.reviews):
            refs[job.template].append(job.person)
            if job.other is not None:
                refs[job.template].append(job.other)
        epochs, persons = prepared.needs
        # accounts share the platform's secrets: the longest life counts, so it is written last
        for template in sorted(refs, key=_secrets_deadline_s):
            deadline_s = _secrets_deadline_s(template)
            persons.update(dict.fromkeys([ref for ref in refs[template] if ref is not None], deadline_s))
        seals = [(template, len(parts)) for template, parts in refs.items()]
        seals += [
            (self.planner.output("suppressions", _account_of(change.rule), self.now_s), 1)
            for change in prepared.overlay.changes
        ]
        if prepared.quarantined:
            template = self.planner.output("quarantine", UNKNOWN_ACCOUNT, self.now_s)
            seals.append((template, len(prepared.quarantined)))
        for template, count in seals:
            if template.ref is not None:
                epochs[template.ref] = (template.deadline_s, epochs.get(template.ref, (None, 0))[1] + count)


def _secrets_deadline_s(template: Template) -> int:
    """Return until when the person secrets that a template takes are needed."""
    return template.circle.deadlines_s[template.owner]


def _job(
    template: Template, layout: Layout, record: Communication, primary: Met, other: Met, head: bytes | None = None
) -> Job:
    """Return how a whole record is sealed: where another person is in it, in two parts."""
    if other.token is None:
        return Job(template, primary.ref(template), layout.whole(record), head)
    rest, own = layout.other[record.direction]
    return Job(template, primary.ref(template), rest(record), head, other.ref(template), own(record))


_EMIT_CDR = Outcome("cdr", End.EMIT, None)
_EMIT_ANONYMOUS_ONLY = Outcome("cdr", End.EMIT, "personal_part_expired")
_EXPIRED = Outcome("cdr", End.EXPIRED, "older_than_everything")
_EMIT_REQUEST = Outcome("request", End.EMIT, None)
_EMIT_PREFERENCE = Outcome("preference", End.EMIT, None)
_LIFTS_NOTHING = Outcome("preference", End.EMIT, "lifts_nothing")
_REFUSALS = {reason: Outcome("request", End.REFUSE, reason) for reason in REASONS}


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
        self.messages: dict[str, list[Message]] = {
            stream: [] for stream in ("verdicts", "cleared", "content", "cdr.pii", "review", "quarantine")
        }

    def run(self, *, shuffle: bool) -> list[Output]:
        prepared, messages = self.prepared, self.messages
        messages["verdicts"] = prepared.verdicts
        seal_each(chain(prepared.cdrs, prepared.requests), self.ring.persons, self.entropy, self._way)
        self._reviews()
        self._quarantined()
        partition = prepared.inbox.partition
        outputs = [Output(stream, partition, written) for stream, written in messages.items() if written]
        if prepared.anonymous:
            mixed = self.entropy.shuffled(prepared.anonymous) if shuffle else prepared.anonymous
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
        """Return the sealer of a template whose epoch began less than its life ago.

        Raises KeysChanged if its key was destroyed all the same: by a clock that was ahead. The next epoch has another.
        """
        sealer = self._sealer(template)
        if sealer is None:
            raise KeysChanged(
                "the key for what is new is destroyed already: was a clock ahead?", stream=template.stream
            )
        return sealer

    def _way(self, template: Template) -> Way | None:
        """Return how a template's values are sealed and written; None: its epoch is dead."""
        sealer = self._alive(template) if template.stream == "cleared" else self._sealer(template)
        return None if sealer is None else sealer.way(template, self.messages[template.stream].append)

    def _reviews(self) -> None:
        for job in self.prepared.reviews:
            template = job.template
            sealer = self._sealer(template)
            if sealer is not None:
                person = None if job.person is None else self.ring.persons[job.person]
                value = sealer.several(template.head, template.tail, ((template.group, person, job.plaintext),))
                self.messages["review"].append(Message(template.at_ms, None, template.headers, value))

    def _quarantined(self) -> None:
        inbox = self.prepared.inbox
        for index, reason in self.prepared.quarantined:
            template = self.planner.output("quarantine", UNKNOWN_ACCOUNT, self.prepared.now_s)
            envelope = template.envelope(
                reason=reason, stream=inbox.stream, partition=inbox.partition, offset=inbox.place_of(index)
            )
            value = self._alive(template).several(*envelope, (("record", None, inbox.values[index]),))
            self.messages["quarantine"].append(Message(self.now_ms, None, template.headers, value))

    def _suppressions(self) -> list[Output]:
        by_partition: dict[int, list[Message]] = {}
        for change in self.prepared.overlay.changes:
            message = seal_change(self.pipeline, self._alive, change, self.prepared.now_s)
            by_partition.setdefault(partition_for(change.token, self.partitions), []).append(message)
        return [Output("suppressions", partition, messages) for partition, messages in by_partition.items()]


def _account_of(rule: Rule) -> str:
    return rule.scope.split(":")[1] if ":" in rule.scope else UNKNOWN_ACCOUNT


def seal_change(pipeline: Pipeline, sealer_of: Callable[[Template], Sealer], change: Change, now_s: int) -> Message:
    """Return the `suppressions` message of a change; the number stands in the sealed part and nowhere else.

    So does a sender or campaign of which the key has the token: a rotation of the token key needs both.
    """
    template = pipeline.planner.output("suppressions", _account_of(change.rule), now_s)
    key = record_key(pipeline.tokens.version, change)
    head, tail = template.envelope(
        account_id=template.account or None,
        action="opt_out" if change.out else "opt_in",
        entry=key.decode(),
        event_at=instant(change.event_s),
        reason=change.reason,
    )
    told = {"number": change.number}
    if change.named is not None:
        told[change.rule.scope.partition(":")[0]] = change.named
    value = sealer_of(template).several(head, tail, (("number", None, _encode(told)),), bare=True)
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
    """Return a verdict as JSON: id, cleared or refused, reason, clause, vendor codes, instants; no number, no text.

    `exemption` and `confirmation` stand in it only where there is one.
    """
    told: dict[str, object] = {} if decided.exemption is None else {"exemption": decided.exemption}
    if decided.confirmation:
        told["confirmation"] = True
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
            **told,
            "privacy": orjson.Fragment(template.privacy),
        }
    )
