"""Whatever happens in whatever order, a snapshot with a tail says what the rules say: told in words by `model`."""

from hypothesis import given
from hypothesis import strategies as st

from processors.screen.entries import Meta, Records, Snapshot, merge
from processors.screen.suppression import (
    MAX_AHEAD_S,
    Change,
    Overlay,
    Rule,
    Suppressions,
    fold,
    parse_key,
    record_key,
)
from schemas.catalog import partition_for
from tests.support.records import TOKENS, examples

NOW_S = 1000
NUMBERS = [f"+4915112345{number:03}" for number in range(4)]
EVERYBODY = [TOKENS.of(number) for number in NUMBERS]
RULES = st.builds(
    Rule,
    st.sampled_from(["platform", "account:a", "account:b", f"sender:a:{'0' * 32}", "campaign:a:x|y:z"]),
    st.sampled_from(["all", "marketing", "service"]),
    st.sampled_from(["sms", "voice"]),
    st.sampled_from(["person", "officer"]),
)
CHANGES = st.builds(
    lambda number, rule, out, event_s: Change(TOKENS.of(number), rule, out, event_s, number, None),
    st.sampled_from(NUMBERS),
    st.one_of(st.just(Rule("platform", "all", "sms", "person")), RULES),
    st.booleans(),
    st.one_of(st.integers(NOW_S - 20, NOW_S + 2 * MAX_AHEAD_S), st.sampled_from([-5, 0, NOW_S, NOW_S + 10**11])),
)
STEPS = st.one_of(
    st.tuples(st.just("batch"), st.lists(CHANGES, min_size=1, max_size=8)),
    st.sampled_from([("snapshot", None), ("adopt", None), ("read", None), ("compact", None)]),
)


class World:
    """A log of two partitions, a worker that writes it, a reader that follows it, and snapshots of it."""

    def __init__(self):
        self.log = [[], []]  # [(offset, key, event_s)]
        self.ends = [0, 0]
        self.snapshot = None
        self.worker, self.reader = Suppressions(), Suppressions()
        self.read_to = {id(self.worker): [0, 0], id(self.reader): [0, 0]}
        self.model = {}

    def batch(self, changes):
        self.read(self.worker)
        overlay = Overlay(self.worker)
        for change in changes:
            overlay.apply(change, NOW_S)
            self._told(change)
        for change in overlay.changes:
            partition = partition_for(change.token, 2)
            self.log[partition].append((self.ends[partition], record_key(1, change), change.event_s))
            self.ends[partition] += 1
        self.worker.merge(overlay)

    def _told(self, change):
        """An opt-out counts at once, at the latest of its times; an opt-in lifts it if it is later than all of them."""
        event_s = min(change.event_s, NOW_S + MAX_AHEAD_S)
        entry = change.token, change.rule
        if change.out:
            self.model[entry] = max(event_s, self.model.get(entry, event_s))
        elif entry in self.model and event_s > self.model[entry]:
            del self.model[entry]

    def read(self, view):
        at = self.read_to.setdefault(id(view), [0, 0])
        for partition in (0, 1):
            for offset, key, event_s in self.log[partition]:
                if offset >= at[partition]:
                    _, token, rule, out = parse_key(key)
                    view.apply(token, rule, out=out, event_s=event_s, place=(partition, offset))
            at[partition] = self.ends[partition]

    def take_snapshot(self, _):
        begins = (0, 0) if self.snapshot is None else self.snapshot.offsets
        new = Records(1)
        for partition in (0, 1):
            for offset, key, event_s in self.log[partition]:
                if offset >= begins[partition]:
                    assert new.add(key, lambda at=event_s: at)
        meta = Meta(
            stream="suppressions", version=1, store="", log="", offsets=tuple(self.ends), witnesses=(None, None)
        )
        parts = []
        head, _ = merge(self.snapshot, new, meta, fold, lambda data: parts.append(bytes(data)))
        self.snapshot = Snapshot(memoryview(head + b"".join(parts)))
        self.snapshot.check()

    def adopt(self, _):
        """Both take the newest snapshot over, the worker right after it has merged a batch and not read it back."""
        if self.snapshot is None:
            return
        self.read(self.reader)
        self.reader.adopt(self.snapshot)
        if all(at >= offset for at, offset in zip(self.read_to[id(self.worker)], self.snapshot.offsets, strict=True)):
            self.worker.adopt(self.snapshot)

    def compact(self, _):
        for partition in (0, 1):
            newest = {key: offset for offset, key, _ in self.log[partition]}
            self.log[partition] = [one for one in self.log[partition] if newest[one[1]] == one[0]]

    def standing(self, view):
        return {
            (token, rule): state.event_s
            for token in EVERYBODY
            for rule, state in (view.get(token) or {}).items()
            if state.out
        }

    def agreed(self):
        late = Suppressions()
        if self.snapshot is not None:
            late.adopt(self.snapshot)
            self.read_to[id(late)] = list(self.snapshot.offsets)
        else:
            self.read_to[id(late)] = [0, 0]
        self.read(late)
        self.read(self.reader)
        assert self.standing(self.worker) == self.model
        assert self.standing(self.reader) == self.model
        assert self.standing(late) == self.model


@examples(300)
@given(st.lists(STEPS, max_size=14))
def test_a_snapshot_and_its_tail_say_what_the_rules_say_at_every_moment(steps):
    world = World()
    acts = {
        "batch": world.batch,
        "snapshot": world.take_snapshot,
        "adopt": world.adopt,
        "read": lambda _: world.read(world.worker),
        "compact": world.compact,
    }
    for act, what in steps:
        acts[act](what)
        world.agreed()
