"""The snapshot of a stream's entries: one buffer, looked up without unpacking it, and merged block by block.

    head      4096 bytes: magic, place and digest of `meta`
    rows      sorted by token: the rest of the token (its first `lead` bytes are the bucket), rule (u16 or u32),
              event time (u32); the entries of one person are neighbours
    buckets   u32 each: how many rows lie before the bucket, and at last how many there are
    filter    a bit for the first bits of each token: so most of those who have no entry cost one read
    rules     where each rule begins (u64), then the rules: JSON arrays scope, class, channel, authority, era
    meta      JSON: what it is of, how far it goes, counts, widths, digest of all from the rows to here

Rules of this file:
- Whole tokens are compared: a person without an entry has none here either.
- Only what stands is kept: an entry that was lifted folds like one that there never was, now and later.
- An event time is exact: it is the row's, plus 2^32 times the rule's era, which is 0 from 1970 to 2106.
- Numbers are little-endian. A merge takes memory for one block, the buckets and the filter of it, and what is new.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from struct import Struct
from typing import Any, Final, NamedTuple, NewType

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from processors.screen.suppression import Fold, Rule, State, parse_key

MAGIC: Final = b"SVENTRY\x01"
HEAD_BYTES: Final = 4096
TOKEN_BYTES: Final = 16
BLOCKS: Final = 256
"""A block is what begins with one byte: 200,000 rows of 50 million."""
FILTER_BITS_A_ROW: Final = 8
"""At least so many, so that 9 of 10 of those who have no entry end at the filter."""
MAX_CACHED_RULES: Final = 65_536
_MANY: Final = 1 << 20
_FEW: Final = 4096
_ERA: Final = 1 << 32
_DIGEST_PIECE: Final = 1 << 22
_HEAD: Final = Struct("<8sQQ32s")
_first_four = Struct(">I").unpack_from

Bytes = npt.NDArray[np.uint8]
Write = Callable[[bytes | memoryview], object]
RuleKey = NewType("RuleKey", bytes)
"""A rule and an era as a snapshot holds them."""


class Damaged(ValueError):
    """It is no snapshot, or not a whole one."""


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot is of. `offsets`: per partition, all before is in it; `witnesses`: the last record read there."""

    stream: str
    version: int  # of the token key
    store: str  # the key store's id
    log: str  # the log's id, if it has one
    offsets: tuple[int, ...]
    witnesses: tuple[tuple[int, str] | None, ...]  # its offset, and a digest of it
    rows: int = 0
    lead: int = 1  # bytes of a token that its bucket says
    rule_bytes: int = 2
    filter_bits: int = 3  # the filter has two to the power of this
    rules: int = 0
    rule_text_bytes: int = 0
    digest: str = ""

    @property
    def row_bytes(self) -> int:
        """How long a row is."""
        return TOKEN_BYTES - self.lead + self.rule_bytes + 4

    @property
    def sections(self) -> tuple[int, int, int, int, int, int]:
        """Where rows, buckets, filter, rule places and rule texts begin, and where the last one ends."""
        lengths = (
            self.rows * self.row_bytes,
            ((1 << 8 * self.lead) + 1) * 4,
            (1 << self.filter_bits) // 8,
            (self.rules + 1) * 8,
            self.rule_text_bytes,
        )
        places = [HEAD_BYTES]
        for length in lengths:
            places.append(_aligned(places[-1] + length))
        return tuple(places)  # type: ignore[return-value]  # there are six


class Snapshot:
    """The entries of one token key, up to some offset of each partition; any number of processes may share it."""

    def __init__(self, buffer: memoryview) -> None:
        """Take a whole snapshot, such as a memory map. Raises Damaged; that all is as it was written says `check`."""
        self._buffer = buffer
        self.meta = _meta(buffer)
        rows, buckets, bits, places, texts, end = self.meta.sections
        self._rows = buffer[rows : rows + self.meta.rows * self.meta.row_bytes]
        self._buckets = buffer[buckets : buckets + ((1 << 8 * self.meta.lead) + 1) * 4].cast("I")
        self._places = buffer[places : places + (self.meta.rules + 1) * 8].cast("Q")
        self._texts = buffer[texts:end]
        self.bits: memoryview | bytes = buffer[bits : bits + (1 << self.meta.filter_bits) // 8]
        self.shift = 32 - self.meta.filter_bits
        """The first four bytes of a token, shifted by this, are its place among the `bits`."""
        self._lead = self.meta.lead
        self._lead_shift = 32 - 8 * self.meta.lead
        self._row_bytes = self.meta.row_bytes
        self._tail = Struct("<HI" if self.meta.rule_bytes == 2 else "<II").unpack_from
        self._rules: dict[int, tuple[Rule, int]] = {}

    def __repr__(self) -> str:
        return f"Snapshot({self.meta.stream}, {self.meta.rows})"

    def __len__(self) -> int:
        return self.meta.rows

    @property
    def offsets(self) -> tuple[int, ...]:
        """Per partition, the offset before which all is in it."""
        return self.meta.offsets

    def check(self) -> None:
        """Return if all of it is as it was written; reads all of it, and lets other threads run. Raises Damaged."""
        digest, (_, _, _, _, _, end) = hashlib.sha256(), self.meta.sections
        for at in range(HEAD_BYTES, end, _DIGEST_PIECE):
            digest.update(self._buffer[at : min(at + _DIGEST_PIECE, end)])
        if digest.hexdigest() != self.meta.digest:
            raise Damaged("the digest is another one")

    def get(self, token: bytes) -> dict[Rule, State] | None:
        """Return the entries of a person, or None; does not block, unless the page is not in memory."""
        place = _first_four(token)[0] >> self.shift
        if not self.bits[place >> 3] >> (place & 7) & 1:
            return None
        return self.find(token)

    def find(self, token: bytes) -> dict[Rule, State] | None:
        """Return as `get` does, of somebody who has passed the filter."""
        found = self._find(token)
        if found is None:
            return None
        states = {}
        for _, number, event_s in found:
            rule, era = self._rules.get(number) or self._rule(number)
            states[rule] = State(True, event_s + era)
        return states

    def row_of(self, token: bytes, rule: Rule) -> int | None:
        """Return which row an entry is, from 0; None: it is none of these."""
        for row, number, _ in self._find(token) or ():
            if (self._rules.get(number) or self._rule(number))[0] == rule:
                return row
        return None

    def _find(self, token: bytes) -> list[tuple[int, int, int]] | None:
        """Return the row, rule number and event time of each entry of a person."""
        width, lead, buckets = self._row_bytes, self._lead, self._buckets
        bucket = _first_four(token)[0] >> self._lead_shift
        first = buckets[bucket]
        block = self._rows[first * width : buckets[bucket + 1] * width].tobytes()
        rest = token[lead:]
        at = block.find(rest)
        while at > 0 and at % width:
            at = block.find(rest, at + 1)
        if at < 0:
            return None
        found, tail, rest_bytes = [], self._tail, len(rest)
        while block.startswith(rest, at):
            number, event_s = tail(block, at + rest_bytes)
            found.append((first + at // width, number, event_s))
            at += width
        return found

    def _rule(self, number: int) -> tuple[Rule, int]:
        *rule, era = orjson.loads(self.rule_key(number))
        if len(self._rules) >= MAX_CACHED_RULES:
            self._rules.clear()
        made = self._rules[number] = (Rule(*rule), era * _ERA)
        return made

    def rule_key(self, number: int) -> RuleKey:
        """Return a rule as it is written here."""
        return RuleKey(self._texts[self._places[number] : self._places[number + 1]].tobytes())

    # --- for a merge ------------------------------------------------------------------------------------------

    def rules_in_use(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the rules that entries have, sorted."""
        used = np.zeros(self.meta.rules + 1, np.int64)
        for block in range(BLOCKS):
            used += np.bincount(self._numbers(self._block(block)[1]), minlength=len(used))
        return np.flatnonzero(used)

    def columns(self, block: int) -> tuple[Bytes, npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Return the whole tokens, rule numbers and event times of a block's rows, in order."""
        lead, each = self._lead, 1 << 8 * (self._lead - 1)
        counts, rows = self._block(block)
        tokens = np.empty((len(rows), TOKEN_BYTES), np.uint8)
        tokens[:, lead:] = rows[:, : TOKEN_BYTES - lead]
        heads = np.repeat(np.arange(block * each, (block + 1) * each, dtype=">u4"), np.diff(counts))
        tokens[:, :lead] = heads.view(np.uint8).reshape(-1, 4)[:, 4 - lead :]
        return tokens, self._numbers(rows), np.ascontiguousarray(rows[:, -4:]).view("<u4").ravel()

    def _block(self, block: int) -> tuple[npt.NDArray[np.uint32], Bytes]:
        """Return how many rows lie before each bucket of a block and before the next one, and the rows."""
        each = 1 << 8 * (self._lead - 1)
        counts = np.frombuffer(self._buckets, np.uint32)[block * each : (block + 1) * each + 1]
        rows = np.frombuffer(self._rows, np.uint8).reshape(-1, self._row_bytes)
        return counts, rows[int(counts[0]) : int(counts[-1])]

    def _numbers(self, rows: Bytes) -> npt.NDArray[np.int64]:
        """Return the rule numbers of rows."""
        rule_bytes = self.meta.rule_bytes
        column = np.ascontiguousarray(rows[:, -4 - rule_bytes : -4])
        return column.view(f"<u{rule_bytes}").ravel().astype(np.int64)


class Records:
    """Records of a stream, in log order, in about 29 bytes each: what a merge folds into a snapshot."""

    def __init__(self, version: int) -> None:
        """Take the token key's version whose records count."""
        self.version = version
        self._prefix = b"%d." % version
        self.tokens = bytearray()
        self.rules = array("I")
        self.outs = bytearray()
        self.events_s = array("q")
        self.table: dict[Rule, int] = {}
        self._known: dict[bytes, tuple[int, bool]] = {}

    def __len__(self) -> int:
        return len(self.outs)

    def add(self, key: bytes, event_s: Callable[[], int]) -> bool:
        """Take a record by its key; return False if it is of another token key. Raises ValueError if it is no record.

        `event_s` is asked only of a record that counts.
        """
        head, _, rest = key.partition(b"|")
        known = self._known.get(rest)
        if known is None or not head.startswith(self._prefix):
            version, _, rule, out = parse_key(key)
            if version != self.version:
                return False
            known = self._known[rest] = (self.table.setdefault(rule, len(self.table)), out)
        token = bytes.fromhex(head.partition(b".")[2].decode())
        if len(token) != TOKEN_BYTES:
            raise ValueError("a token has 16 bytes")
        at_s = event_s()
        self.tokens += token
        self.rules.append(known[0])
        self.outs.append(known[1])
        self.events_s.append(at_s)
        return True

    def sorted(self) -> "_Sorted":
        """Return the records by token, then as they came."""
        tokens = np.frombuffer(self.tokens, np.uint8).reshape(-1, TOKEN_BYTES)
        order = _by_token(tokens)
        return _Sorted(
            tokens[order],
            np.frombuffer(self.rules, np.uint32).astype(np.int64)[order],
            np.frombuffer(self.outs, np.uint8)[order].astype(bool),
            np.frombuffer(self.events_s, np.int64)[order],
        )


class _Sorted(NamedTuple):
    tokens: Bytes
    rules: npt.NDArray[np.int64]
    outs: npt.NDArray[np.bool_]
    events_s: npt.NDArray[np.int64]

    def slice(self, first: int, last: int) -> "_Sorted":
        """Return some of them."""
        return _Sorted(
            self.tokens[first:last], self.rules[first:last], self.outs[first:last], self.events_s[first:last]
        )


class _Rules:
    """The rules of a new snapshot: those of the old one that are in use, and those that come."""

    def __init__(self, old: Snapshot | None) -> None:
        self.numbers: dict[bytes, int] = {}
        self._bases: dict[Rule, int] = {}
        self.rules: list[Rule] = []
        self._base_of: list[int] = []
        self._eras: list[int] = []
        self.moved = np.zeros(0, np.int64)  # old number → number
        if old is not None:
            used = old.rules_in_use()
            self.moved = np.zeros(old.meta.rules, np.int64)
            for number in used:
                self.moved[number] = self._number(old.rule_key(int(number)))

    def __len__(self) -> int:
        return len(self.numbers)

    def base(self, rule: Rule) -> int:
        """Return the number of a rule, whatever the era."""
        return self._bases.setdefault(rule, len(self._bases))

    def number(self, rule: Rule, era: int) -> int:
        """Return the number of a rule in an era."""
        return self._number(orjson.dumps([*rule, era]))

    def _number(self, key: bytes) -> int:
        known = self.numbers.get(key)
        if known is None:
            *rule, era = orjson.loads(key)
            known = self.numbers[key] = len(self.numbers)
            self.rules.append(Rule(*rule))
            self._base_of.append(self.base(self.rules[-1]))
            self._eras.append(era)
        return known

    def taken_apart(
        self, numbers: npt.NDArray[np.int64], events_s: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return bases and whole event times of rows."""
        bases, eras = np.array(self._base_of, np.int64), np.array(self._eras, np.int64)
        return bases[numbers], events_s.astype(np.int64) + eras[numbers] * _ERA

    def numbered(
        self, bases: npt.NDArray[np.int64], events_s: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Return the rule numbers and event times of rows."""
        eras = events_s >> 32
        pairs, inverse = np.unique(np.stack((bases, eras), 1), axis=0, return_inverse=True)
        rules = list(self._bases)
        numbers = np.array([self.number(rules[base], int(era)) for base, era in pairs], np.int64)
        return numbers[inverse.ravel()], (events_s & (_ERA - 1)).astype(np.uint32)


def merge(
    old: Snapshot | None, new: Records, meta: Meta, fold: Fold, write: Write, pause: Callable[[], None] = lambda: None,
    *, after_s: int | None = None,
) -> tuple[bytes, Meta]:  # fmt: skip
    """Write a snapshot of the old one's entries and the records after it; return its head and what it is of.

    `write` takes it from the end of the head on; the head, which comes last, makes it one. `meta` says what it is of.
    `pause` is called between blocks, and may raise. With `after_s` only entries of a later instant (Unix s) are kept.
    """
    rules, came = _Rules(old), new.sorted()
    bases = np.array([rules.base(rule) for rule in new.table] or [0], np.int64)
    came = came._replace(rules=bases[came.rules])
    edges = np.searchsorted(came.tokens[:, 0], np.arange(BLOCKS + 1))
    most = len(came.outs) + (0 if old is None else len(old))
    eras = len(np.unique(came.events_s >> 32))
    writer = _Writer(write, most, most_rules=len(rules) + len(new.table) * eras)
    for block, (first, last) in enumerate(pairwise(edges)):
        pause()
        part = came.slice(int(first), int(last))
        tokens, numbers, events_s = _block(old, block, rules, part, fold)
        if after_s is not None:
            kept = rules.taken_apart(numbers, events_s)[1] > after_s
            tokens, numbers, events_s = tokens[kept], numbers[kept], events_s[kept]
        writer.block(block, tokens, numbers, events_s)
    return writer.finish(meta, rules)


def build(columns: Iterator[tuple[Bytes, npt.NDArray[np.int64], npt.NDArray[np.uint32]]], table: list[Rule],
          most: int, meta: Meta, write: Write) -> tuple[bytes, Meta]:  # fmt: skip
    """Write a snapshot of entries that are sorted already, block by block: token, index into `table`, event time.

    For benchmarks, which have no log of 50 million records to read.
    """
    rules = _Rules(None)
    for rule in table:
        rules.number(rule, 0)
    writer = _Writer(write, most, most_rules=len(table))
    for block, (tokens, numbers, events_s) in enumerate(columns):
        writer.block(block, tokens, numbers, events_s)
    return writer.finish(meta, rules)


def _block(
    old: Snapshot | None, block: int, rules: _Rules, came: _Sorted, fold: Fold
) -> tuple[Bytes, npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Return the columns of a block after the records that came."""
    if old is None:
        tokens, numbers, events_s = np.empty((0, TOKEN_BYTES), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.uint32)
    else:
        tokens, numbers, events_s = old.columns(block)
        numbers = rules.moved[numbers]
    if not len(came.outs):
        return tokens, numbers, events_s
    touched = _touched(tokens, came.tokens)
    states = np.concatenate((tokens[touched], came.tokens))
    before, whole_s = rules.taken_apart(numbers[touched], events_s[touched])
    base = np.concatenate((before, came.rules))
    outs = np.concatenate((np.ones(len(touched), bool), came.outs))
    at_s = np.concatenate((whole_s, came.events_s))
    stand, stand_s = _folded(states, base, outs, at_s, fold)
    fresh, fresh_rules = states[stand], base[stand]
    fresh_numbers, fresh_s = rules.numbered(fresh_rules, stand_s)
    left = np.delete(tokens, touched, 0)
    places = np.searchsorted(_high(left), _high(fresh))
    return (
        np.insert(left, places, fresh, 0),
        np.insert(np.delete(numbers, touched), places, fresh_numbers),
        np.insert(np.delete(events_s, touched), places, fresh_s),
    )


def _touched(tokens: Bytes, came: Bytes) -> npt.NDArray[np.int64]:
    """Return which rows are of a person of whom something came, or whose token begins like theirs: no harm is done."""
    high, changed = _high(tokens), _high(came)
    at = np.searchsorted(changed, high)
    at[at == len(changed)] = 0
    return np.flatnonzero(changed[at] == high)


def _folded(
    tokens: Bytes, bases: npt.NDArray[np.int64], outs: npt.NDArray[np.bool_], events_s: npt.NDArray[np.int64],
    fold: Fold,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:  # fmt: skip
    """Return, sorted by token, one place of each entry that stands after all records, in order, and its event time."""
    order = _by_token(tokens, bases)
    alike = np.all(tokens[order[1:]] == tokens[order[:-1]], 1) & (bases[order[1:]] == bases[order[:-1]])
    begins = np.concatenate(([0], np.flatnonzero(~alike) + 1))
    lengths = np.diff(np.concatenate((begins, [len(order)])))
    last = order[begins]
    stands, at_s = outs[last].copy(), events_s[last].copy()
    for entry in np.flatnonzero(lengths > 1):
        state: State | None = None
        for place in order[begins[entry] : begins[entry] + lengths[entry]]:
            state = fold(state, out=bool(outs[place]), event_s=int(events_s[place]))
        stands[entry] = state is not None and state.out
        at_s[entry] = 0 if state is None else state.event_s
    return last[stands], at_s[stands]


class _Writer:
    """Writes rows block by block, and all that leads to them behind."""

    def __init__(self, write: Write, most: int, most_rules: int) -> None:
        self._write = write
        self._digest = hashlib.sha256()
        self._written = HEAD_BYTES
        self._lead = 1 if most < _FEW else 2 if most < _MANY else 3
        self._rule_bytes = 2 if most_rules <= 1 << 16 else 4
        self._filter_bits = min(32, max(11, (FILTER_BITS_A_ROW * most - 1).bit_length()))
        self._counts = np.zeros((1 << 8 * self._lead) + 1, np.uint32)
        self._bits = np.zeros((1 << self._filter_bits) // 8, np.uint8)
        self._rows = 0

    def _put(self, data: bytes | memoryview) -> None:
        self._write(data)
        self._digest.update(data)
        self._written += len(data)

    def _align(self) -> None:
        self._put(bytes(_aligned(self._written) - self._written))

    def block(
        self, block: int, tokens: Bytes, numbers: npt.NDArray[np.int64], events_s: npt.NDArray[np.uint32]
    ) -> None:
        """Write the rows of a block."""
        count, lead, rule_bytes = len(tokens), self._lead, self._rule_bytes
        rest = TOKEN_BYTES - lead
        rows = np.empty((count, rest + rule_bytes + 4), np.uint8)
        rows[:, :rest] = tokens[:, lead:]
        rows[:, rest : rest + rule_bytes] = numbers.astype(f"<u{rule_bytes}").view(np.uint8).reshape(count, rule_bytes)
        rows[:, rest + rule_bytes :] = events_s.astype("<u4").view(np.uint8).reshape(count, 4)
        self._put(rows.tobytes())
        first = _four(tokens)
        each = 1 << 8 * (lead - 1)
        in_block = np.bincount((first >> (32 - 8 * lead)) - block * each, minlength=each)
        self._counts[block * each + 1 : (block + 1) * each + 1] = self._rows + np.cumsum(in_block)
        self._rows += count
        wide = (1 << self._filter_bits) // BLOCKS
        flags = np.zeros(wide, bool)
        flags[(first >> (32 - self._filter_bits)) - block * wide] = True
        self._bits[block * wide // 8 : (block + 1) * wide // 8] = np.packbits(flags, bitorder="little")

    def finish(self, meta: Meta, rules: _Rules) -> tuple[bytes, Meta]:
        """Write what leads to the rows, and return the head and what the snapshot is of."""
        self._align()
        self._put(self._counts.data.cast("B"))
        self._align()
        self._put(self._bits.data)
        self._align()
        lengths = [len(key) for key in rules.numbers]
        self._put(np.concatenate(([0], np.cumsum(lengths))).astype("<u8").tobytes())
        self._align()
        self._put(b"".join(rules.numbers))
        self._align()
        made = msgspec.structs.replace(
            meta, rows=self._rows, lead=self._lead, rule_bytes=self._rule_bytes, filter_bits=self._filter_bits,
            rules=len(rules), rule_text_bytes=sum(lengths), digest=self._digest.hexdigest(),
        )  # fmt: skip
        told = msgspec.json.encode(made)
        self._write(told)
        head = _HEAD.pack(MAGIC, self._written, len(told), hashlib.sha256(told).digest())
        return head.ljust(HEAD_BYTES, b"\0"), made


def _meta(buffer: memoryview) -> Meta:
    """Return what a buffer says that it is of. Raises Damaged."""
    if len(buffer) < HEAD_BYTES:
        raise Damaged("it is cut short")
    magic, at, length, digest = _HEAD.unpack_from(buffer)
    told = buffer[at : at + length]
    if magic != MAGIC or len(buffer) != at + length or hashlib.sha256(told).digest() != digest:
        raise Damaged("it is no snapshot, or cut short")
    try:
        meta = msgspec.json.decode(told, type=Meta)
    except msgspec.MsgspecError:
        raise Damaged("it is of another version of the program") from None
    if meta.sections[-1] != at:
        raise Damaged("it is not as long as it says")
    return meta


def _aligned(at: int) -> int:
    return -(-at // 8) * 8


def _four(tokens: Bytes) -> npt.NDArray[np.int64]:
    """Return the first four bytes of tokens as numbers."""
    return np.ascontiguousarray(tokens[:, :4]).view(">u4").ravel().astype(np.int64)


def _high(tokens: Bytes) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of tokens as numbers."""
    return np.ascontiguousarray(tokens[:, :8]).view(">u8").ravel().astype(np.uint64)


def _by_token(tokens: Bytes, then: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
    """Return the order of tokens, then of something else, then as they are."""
    low = np.ascontiguousarray(tokens[:, 8:]).view(">u8").ravel().astype(np.uint64)
    keys: tuple[Any, ...] = (low, _high(tokens))
    return np.lexsort(keys if then is None else (then, *keys))
