"""Suppressions: who asked not to be contacted, by scope, class, channel and authority.

The rules (DESIGN.md, Screening): log order decides; an opt-out always takes effect; an opt-in lifts only the very
entry it names, and only if it is later than the opt-out by offset and by event time; event times more than five
minutes ahead are clamped. An entry's record key ends in `out` or `in`, so that compaction keeps the newest of
both and can never leave an opt-in that did not count in place of the opt-out it failed to lift (ADR 0002).
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from struct import Struct
from typing import Final, NamedTuple, Protocol

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


class Fold(Protocol):
    """How the next record of an entry, in log order, changes its state; None: there is none."""

    def __call__(self, state: State | None, *, out: bool, event_s: int) -> State | None:
        """Return the state afterwards."""


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


def latest(state: State | None, *, out: bool, event_s: int) -> State:  # noqa: ARG001 — as `fold`
    """Return the state of an exemption after the next record in log order: what was written last."""
    return State(out=out, event_s=event_s)


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
        self.changes.append(change if after.event_s == change.event_s else change._replace(event_s=after.event_s))
        return True


class Beneath(Protocol):
    """Entries that do not change, complete up to `offsets`: a snapshot. Whose bit is not set has none."""

    bits: memoryview | bytes
    shift: int

    @property
    def offsets(self) -> Sequence[int]:
        """Per partition of the stream, the offset before which all is in it."""

    def __len__(self) -> int:
        """Return how many entries there are."""

    def find(self, token: bytes) -> Entries | None:
        """Return the entries of a person, or None."""

    def row_of(self, token: bytes, rule: Rule) -> int | None:
        """Return which one an entry is, from 0; None: it is none of these."""


_Place = tuple[int, int]
_AHEAD: Final[_Place] = (0, 1 << 62)
"""The place of what was merged and not read back yet: behind every snapshot."""
_serials: Final = count(1)
_first_four: Final = Struct(">I").unpack_from


def _nobody(_token: bytes) -> None:
    return None


class Suppressions:
    """The entries that one process knows: a snapshot, if there is one, and over it whoever has changed since.

    Of somebody who has changed all entries are in `changed`, so that a look-up reads one of both. `serial` names the
    snapshot in this process: who had no entries under it has none, unless they have changed. `fold` says how a record
    changes a state.
    """

    __slots__ = ("_bits", "_find", "_fold", "_places", "_shift", "changed", "serial", "snapshot")

    def __init__(self, fold: Fold = fold) -> None:
        self._fold = fold
        self.serial = next(_serials)
        self.changed: dict[bytes, dict[Rule, State]] = {}
        self._places: dict[bytes, _Place] = {}
        self.snapshot: Beneath | None = None
        self._bits: memoryview | bytes | None = None
        self._shift = 32
        self._find: Callable[[bytes], Entries | None] = _nobody

    def __len__(self) -> int:
        """Return how many people have changed since the snapshot."""
        return len(self.changed)

    def get(self, token: bytes) -> Entries | None:
        """Return the entries of a person, or None; does not block, unless a page of the snapshot is not in memory."""
        found = self.changed.get(token)
        if found is not None:
            return found
        bits = self._bits
        if bits is None:
            return None
        place = _first_four(token)[0] >> self._shift
        return self._find(token) if bits[place >> 3] >> (place & 7) & 1 else None

    def apply(self, token: bytes, rule: Rule, *, out: bool, event_s: int, place: _Place = (0, 0)) -> None:
        """Fold in one record of the stream, in log order; `place` is its partition and offset."""
        mine = self.changed.get(token)
        known = self.get(token) if mine is None else mine
        before = known.get(rule) if known else None
        after = self._fold(before, out=out, event_s=event_s)
        if mine is None:
            if after is None or after == before:
                return
            mine = self.changed[token] = dict(known or {})
        self._places[token] = place
        if after is not None:
            mine[rule] = after

    def merge(self, overlay: Overlay) -> None:
        """Take over what a committed batch changed; reading the same records back changes nothing more."""
        self.changed.update(overlay.changed)
        self._places.update(dict.fromkeys(overlay.changed, _AHEAD))

    def adopt(self, snapshot: Beneath) -> None:
        """Look people up in this snapshot from now on, and let go whoever has not changed after it.

        All before its offsets must have been read. Nobody's entries change by that.
        """
        offsets = snapshot.offsets
        for token in [one for one, (partition, offset) in self._places.items() if offset < offsets[partition]]:
            del self._places[token], self.changed[token]
        self.snapshot, self._find = snapshot, snapshot.find
        self._bits, self._shift = snapshot.bits, snapshot.shift
        self.serial = next(_serials)


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
