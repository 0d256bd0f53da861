"""Suppressions: who asked not to be contacted, by scope, class, channel and authority.

The rules (DESIGN.md, Screening): log order decides; an opt-out always takes effect; an opt-in lifts only the very
entry it names, and only if it is later than the opt-out by offset and by event time; event times more than five
minutes ahead are clamped. An entry's record key ends in `out` or `in`, so that compaction keeps the newest of
both and can never leave an opt-in that did not count in place of the opt-out it failed to lift (ADR 0002).
"""

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from schemas.fields import is_code

MAX_AHEAD_S = 300
TOKEN_MARK = "~"  # noqa: S105 — a mark, not a password
"""Stands before the token of a campaign whose id is no code."""
_NAMED_BY_TOKEN = re.compile(TOKEN_MARK + r"[0-9a-f]{32}").fullmatch


class Tokens:
    """The keyed hash that turns a normalised number into a 16-byte token. A token is personal data."""

    __slots__ = ("_hash", "version")

    def __init__(self, version: int, key: bytes) -> None:
        self.version = version
        self._hash = hashlib.blake2b(key=key, digest_size=16)

    def __repr__(self) -> str:
        return f"Tokens({self.version})"

    def of(self, value: str) -> bytes:
        """Return the 16-byte token of a normalised number or address."""
        keyed = self._hash.copy()
        keyed.update(value.encode())
        return keyed.digest()


class Rule(NamedTuple):
    """What an entry is about. Scope: `platform`, `account:A`, `sender:A:token`, `campaign:A:C`."""

    scope: str
    class_: str  # all, marketing, service
    channel: str  # sms, voice
    authority: str  # person, officer

    def __repr__(self) -> str:
        return f"Rule({self.class_}, {self.channel}, {self.authority})"


class State(NamedTuple):
    """An entry's state: opted out or not, and the event time (Unix s) that decided it."""

    out: bool
    event_s: int


Entries = Mapping[Rule, State]
"""All entries of one person."""


class View(Protocol):
    """A readable set of suppressions, complete up to some offset of every partition."""

    def get(self, token: bytes) -> Entries | None:
        """Return the entries of a person, or None; does not block."""


class Change(NamedTuple):
    """One record for the `suppressions` stream; `number` and `named` may be personal data and leave only sealed."""

    token: bytes
    rule: Rule
    out: bool
    event_s: int
    number: str
    reason: str | None
    named: str | None = None  # the sender or campaign that the scope names by its token; None: none, or not known

    def __repr__(self) -> str:
        return "Change()"


def fold(state: State | None, *, out: bool, event_s: int) -> State | None:
    """Return the state of an entry after the next record in log order."""
    if out:
        standing = state.event_s if state is not None and state.out else event_s
        return State(out=True, event_s=max(standing, event_s))
    if state is not None and state.out and event_s > state.event_s:
        return State(out=False, event_s=event_s)
    return state


class Overlay:
    """A copy-on-write layer over a view: what the records of one batch, not yet committed, have changed."""

    __slots__ = ("_base", "changed", "changes")

    def __init__(self, base: View) -> None:
        self._base = base
        self.changed: dict[bytes, dict[Rule, State]] = {}
        self.changes: list[Change] = []

    def get(self, token: bytes) -> Entries | None:
        """Return the entries of a person with the batch's own changes."""
        return self.changed.get(token) or self._base.get(token)

    def apply(self, change: Change, now_s: int) -> bool:
        """Fold a change in and note it for the stream; return False for an opt-in that lifts nothing.

        An opt-out is always noted, at the event time that stands afterwards; an opt-in only where it counts.
        """
        event_s = min(change.event_s, now_s + MAX_AHEAD_S)
        before = (self.get(change.token) or {}).get(change.rule)
        after = fold(before, out=change.out, event_s=event_s)
        if after is None or (after == before and not change.out):
            return False
        entries = self.changed.get(change.token)
        if entries is None:
            entries = self.changed[change.token] = dict(self._base.get(change.token) or {})
        entries[change.rule] = after
        self.changes.append(change._replace(event_s=after.event_s))
        return True


class Suppressions:
    """The suppressions in memory: token → entries. The base view of one process."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[bytes, dict[Rule, State]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, token: bytes) -> Entries | None:
        """Return the entries of a person, or None; does not block."""
        return self._entries.get(token)

    def apply(self, token: bytes, rule: Rule, *, out: bool, event_s: int) -> None:
        """Fold in one record of the stream, in log order."""
        entries = self._entries.get(token)
        state = fold(entries.get(rule) if entries else None, out=out, event_s=event_s)
        if state is not None:
            self._entries.setdefault(token, {})[rule] = state

    def merge(self, overlay: Overlay) -> None:
        """Take over what a committed batch changed; reading the same records back changes nothing more."""
        self._entries.update(overlay.changed)


def scope_id(scope: str, account: str, sender: str, campaign: str | None, tokens: Tokens) -> str:
    """Return a rule's full scope; a sender, which may be a number, is named by its token.

    So is a campaign whose id is no code, for then it may hold anything.
    """
    if scope == "account":
        return f"account:{account}"
    if scope == "sender":
        return f"sender:{account}:{tokens.of(sender).hex()}"
    if scope == "campaign":
        known = campaign is not None and (is_code(campaign) or _NAMED_BY_TOKEN(campaign))
        return f"campaign:{account}:{campaign if known else TOKEN_MARK + tokens.of(campaign or '').hex()}"
    return "platform"


def hidden(scope: str, sender: str, campaign: str | None) -> str | None:
    """Return the sender or campaign that a full scope names by its token only; None if it names none so."""
    kind, _, rest = scope.partition(":")
    if kind == "sender":
        return sender
    if kind == "campaign" and rest.partition(":")[2].startswith(TOKEN_MARK):
        return campaign or ""
    return None


def retokened(scope: str, named: str | None, tokens: Tokens) -> tuple[str, bool]:
    """Return a full scope under another token key, and whether it had to be widened to the account.

    `named` is what `hidden` returned when the entry was written. Where it is not known, the entry must cover
    whatever it may have been: an opt-out never gets narrower.
    """
    kind, _, rest = scope.partition(":")
    account, _, name = rest.partition(":")
    if kind != "sender" and not name.startswith(TOKEN_MARK):
        return scope, False
    if named is None:
        return f"account:{account}", True
    return scope_id(kind, account, named, named, tokens), False


def covering_scopes(account: str, sender: str, campaign: str | None, tokens: Tokens) -> tuple[str, ...]:
    """Return the full scopes that cover a request of an account from a sender, in a campaign if any."""
    names = ("platform", "account", "sender", "campaign") if campaign else ("platform", "account", "sender")
    return tuple(scope_id(name, account, sender, campaign, tokens) for name in names)


def record_key(token_version: int, change: Change) -> bytes:
    """Return the key of a change in the `suppressions` stream."""
    end = "out" if change.out else "in"
    return "|".join((f"{token_version}.{change.token.hex()}", *change.rule, end)).encode()


def parse_key(key: bytes) -> tuple[int, bytes, Rule, bool]:
    """Return token version, token, rule and whether it is an opt-out. Raises ValueError if it is no such key."""
    head, rest = key.decode().split("|", 1)
    scope, class_, channel, authority, end = rest.rsplit("|", 4)
    version, token = head.split(".")
    if end not in ("out", "in"):
        raise ValueError("not a suppression key")
    return int(version), bytes.fromhex(token), Rule(scope, class_, channel, authority), end == "out"
