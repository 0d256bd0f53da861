"""The worker's key lease and key cache: bounded, never past a deadline, a destruction or the lease."""

import pytest

from processors.keyring import CipherGroup, EpochKey, EpochRef, Needs, PersonRef, PersonSecret
from schemas.errors import KeysBusy, KeysChanged, LeaseExpired
from schemas.fields import PLATFORM
from schemas.sealed import KeyId, key_info, record_key
from streams.keys.cache import KeyCache, KeyLease
from streams.keys.store import Fetched

NOW = 1_800_000_000  # 2027-01-15T08:00:00Z
DAY = 86_400
MIDNIGHT = NOW - NOW % DAY + DAY
PII = EpochRef("pii", PLATFORM, "2027-01")
TRANSIT = EpochRef("transit", "acme", "2027-01-15T08")


class FakeStore:
    """Just enough of a key store: counts what is asked, keys are made of their names."""

    def __init__(self) -> None:
        self.sequence = 0
        self.block = 100
        self.asked: list[Needs] = []
        self.leases: dict[str, tuple[float, int]] = {}
        self.dead: set[EpochRef] = set()
        self.busy = False
        self.during_fetch = lambda: None

    def fetch(self, needs: Needs, now_s: int) -> Fetched:
        if self.busy:
            raise KeysBusy
        self.asked.append(needs)
        epochs = {
            ref: EpochKey(KeyId(*ref, 1 + self.sequence), b"k" * 32, deadline_s)
            for ref, (deadline_s, _) in needs.epochs.items()
            if ref not in self.dead and (deadline_s is None or deadline_s > now_s)
        }
        granted = {ref: max(needs.epochs[ref][1], self.block) for ref in epochs}
        persons = {ref: PersonSecret(f"{self.sequence}-{hash(ref)}", b"s" * 32) for ref in needs.persons}
        found = Fetched(epochs, granted, persons, self.sequence)
        self.during_fetch()
        return found

    def renew_lease(self, process_id: str, duration_s: float, seen_sequence: int) -> int:
        if self.busy:
            raise KeysBusy
        self.leases[process_id] = (duration_s, seen_sequence)
        return self.sequence

    def drop_lease(self, process_id: str) -> None:
        self.leases.pop(process_id, None)


class World:
    def __init__(self, **bounds) -> None:
        self.now = float(NOW)
        self.up = 100.0
        self.store = FakeStore()
        self.lease = KeyLease(self.store, "worker-1", 30.0, lambda: self.now, lambda: self.up)
        self.cache = KeyCache(self.store, self.lease, **bounds)

    def fetch(self, epochs=(), persons=(), deadline_s: int | None = NOW + 99 * DAY, seals: int = 1):
        needs = Needs(dict.fromkeys(epochs, (deadline_s, seals)), dict.fromkeys(persons, deadline_s))
        return self.cache.fetch(needs, int(self.now))


@pytest.fixture
def world() -> World:
    made = World()
    made.lease.renew()
    return made


def person(number: int) -> PersonRef:
    return PersonRef(PLATFORM, number.to_bytes(16, "big"), "2027-01")


def derive(ring, ref: EpochRef, sid: str = "sid") -> None:
    epoch = ring.epochs[ref]
    held = ring.ciphers.setdefault(CipherGroup(epoch.id, "acme"), {})
    held[sid] = record_key(epoch.key, b"s" * 32, key_info(epoch.id, "acme"))


# --- the lease ----------------------------------------------------------------------------------------------


def test_a_lease_is_valid_from_its_renewal_to_its_end_and_not_before():
    world = World()
    assert not world.lease.valid()
    assert world.lease.due(NOW)
    world.lease.renew()
    assert world.lease.valid()
    assert world.store.leases == {"worker-1": (30.0, 0)}
    world.now = NOW + 29.9
    assert world.lease.valid()
    world.now = NOW + 30
    assert not world.lease.valid()


def test_a_lease_ends_as_counted_from_before_the_renewing_call(world):
    slow = world.store.renew_lease

    def takes_20_s(*args):
        world.now += 20
        return slow(*args)

    world.store.renew_lease = takes_20_s
    world.lease.renew()
    world.now = NOW + 29
    assert world.lease.valid()
    world.now = NOW + 30
    assert not world.lease.valid()


def test_a_clock_moved_back_ends_the_lease_until_it_is_renewed(world):
    world.now = NOW - 0.1
    assert not world.lease.valid()
    assert world.lease.due(world.now)
    assert world.lease.due()
    world.lease.renew()
    assert world.lease.valid()


def test_a_clock_moved_back_to_just_after_the_renewal_does_not_make_the_lease_longer(world):
    world.now, world.up = NOW + 0.5, 100 + 25.0
    assert world.lease.due()
    assert world.lease.valid(4.9)
    assert not world.lease.valid(5)
    world.up = 100 + 30.0
    assert not world.lease.valid()
    world.lease.renew()
    assert world.lease.valid()
    assert not world.lease.due()


def test_a_lease_is_due_a_second_after_its_renewal(world):
    assert not world.lease.due(NOW)
    assert not world.lease.due(NOW + 0.9)
    assert world.lease.due(NOW + 1)


def test_a_renewal_that_fails_leaves_the_lease_to_run_out(world):
    world.store.busy = True
    world.now = NOW + 10
    with pytest.raises(KeysBusy):
        world.lease.renew()
    assert world.lease.valid()
    world.now = NOW + 30
    assert not world.lease.valid()


def test_a_renewal_reports_a_destruction_and_tells_the_store_that_it_is_known(world):
    world.lease.renew()
    assert world.lease.sequence == 0
    world.store.sequence = 3
    world.lease.renew()
    assert world.lease.sequence == 3
    assert world.store.leases["worker-1"][1] == 3


def test_closing_forgets_all_keys_and_drops_the_lease(world):
    ring = world.fetch([PII], [person(1)])
    world.cache.close()
    world.cache.close()
    assert (ring.epochs, ring.persons, ring.ciphers) == ({}, {}, {})
    assert world.store.leases == {}
    assert not world.lease.valid()


# --- the cache ----------------------------------------------------------------------------------------------


def test_the_store_is_asked_only_for_what_is_missing(world):
    first = world.fetch([PII], [person(1), person(2)])
    again = world.fetch([PII], [person(2), person(1)])
    assert again is first is world.cache.ring
    assert len(world.store.asked) == 1
    world.fetch([PII, TRANSIT], [person(2), person(3)])
    assert list(world.store.asked[1].epochs) == [TRANSIT]
    assert list(world.store.asked[1].persons) == [person(3)]


def test_reserved_seals_are_used_up_and_reserved_again(world):
    for _ in range(4):
        world.fetch([PII], seals=25)
    assert len(world.store.asked) == 1
    world.fetch([PII], seals=1)
    assert len(world.store.asked) == 2


def test_an_epoch_leaves_the_ring_at_its_deadline_with_its_ciphers(world):
    ring = world.fetch([TRANSIT], deadline_s=NOW + 60)
    world.fetch([PII])
    for ref in (PII, TRANSIT):
        derive(ring, ref)
    world.now = NOW + 60
    world.fetch([TRANSIT], deadline_s=NOW + 60)
    assert list(ring.epochs) == [PII]
    assert list(ring.ciphers) == [CipherGroup(ring.epochs[PII].id, "acme")]
    assert len(world.store.asked) == 2


def test_a_person_needed_past_the_day_the_secret_is_kept_to_is_asked_for_again(world):
    world.fetch(persons=[person(1)], deadline_s=NOW + 10)
    world.fetch(persons=[person(1)], deadline_s=MIDNIGHT)
    assert len(world.store.asked) == 1
    world.fetch(persons=[person(1)], deadline_s=MIDNIGHT + 1)
    assert len(world.store.asked) == 2
    world.fetch(persons=[person(1)], deadline_s=MIDNIGHT + DAY)
    assert len(world.store.asked) == 2


def test_a_person_leaves_the_ring_when_the_day_is_over(world):
    world.now = MIDNIGHT - 60
    ring = world.fetch(persons=[person(1)], deadline_s=MIDNIGHT - 50)
    world.now = MIDNIGHT
    world.fetch(persons=[person(2)])
    assert list(ring.persons) == [person(2)]


def test_an_epoch_that_the_store_leaves_out_leaves_the_ring(world):
    world.fetch([PII], seals=100)
    world.store.dead.add(PII)
    assert world.fetch([PII]).epochs == {}


def test_a_moved_sequence_clears_everything_and_fetches_anew(world):
    ring = world.fetch([PII], [person(1), person(2)])
    derive(ring, PII)
    world.store.sequence = 1
    world.lease.renew()
    world.fetch([PII], [person(1)])
    assert (ring.epochs[PII].id.version, list(ring.persons), ring.ciphers) == (2, [person(1)], {})


def test_a_destruction_seen_while_fetching_clears_what_was_kept_too(world):
    world.fetch([PII], [person(1)])
    world.store.sequence = 1  # not seen by the lease yet
    ring = world.fetch([PII], [person(1), person(2)])
    assert ring.epochs[PII].id.version == 2
    assert {found.sid[0] for found in ring.persons.values()} == {"1"}


def test_nothing_is_used_from_memory_for_longer_than_15_minutes_after_the_first_of_it_came(world):
    ring = world.fetch([PII], [person(1)])
    derive(ring, PII)
    world.now = NOW + 899
    world.fetch([PII], [person(1), person(2)])
    assert [list(asked.persons) for asked in world.store.asked] == [[person(1)], [person(2)]]
    world.now = NOW + 900
    world.fetch([PII], [person(2)])
    assert (list(world.store.asked[2].epochs), list(ring.persons), ring.ciphers) == ([PII], [person(2)], {})
    world.now = NOW + 1799
    world.fetch([PII], [person(2)])
    assert len(world.store.asked) == 3
    world.now = NOW + 100  # a clock moved back ends it too
    world.fetch([PII], [person(2)])
    assert len(world.store.asked) == 4


def test_a_store_that_cannot_be_asked_leaves_the_cache_usable(world):
    world.fetch([PII], [person(1)])
    world.store.busy = True
    with pytest.raises(KeysBusy):
        world.fetch([TRANSIT], [person(2)])
    world.store.busy = False
    ring = world.fetch([PII, TRANSIT], [person(1), person(2)])
    assert (len(ring.epochs), len(ring.persons)) == (2, 2)


def test_bounds_hold_and_the_batch_at_hand_is_never_dropped():
    world = World(max_persons=100, max_ciphers=50, max_epochs=10)
    for start in range(0, 2000, 30):
        batch = [person(number) for number in range(start, start + 30)]
        refs = [EpochRef("content", f"a{number}", "2027-01-15") for number in range(start, start + 30, 10)]
        ring = world.fetch(refs, [person(0), *batch])
        assert {person(0), *batch} <= ring.persons.keys()
        assert set(refs) <= ring.epochs.keys()
        assert len(ring.persons) <= 100 + 31
        assert len(ring.epochs) <= 10 + 3
        assert sum(map(len, ring.ciphers.values())) <= 50 + 30
        for one in batch:
            derive(ring, refs[0], ring.persons[one].sid)
    assert len(world.cache._kept_until_s) == len(ring.persons)
    assert len(world.cache._seals) == len(ring.epochs)


def test_a_batch_larger_than_the_bounds_still_gets_all_it_needs():
    world = World(max_persons=10, max_epochs=1)
    ring = world.fetch([PII, TRANSIT], [person(number) for number in range(50)])
    assert (len(ring.epochs), len(ring.persons)) == (2, 50)


# --- the guard ----------------------------------------------------------------------------------------------


def test_a_guard_lets_a_commit_pass_while_nothing_changed(world):
    world.fetch([PII], [person(1)])
    world.cache.guard()()
    world.lease.renew()
    world.cache.guard()()


def test_a_guard_refuses_without_a_valid_lease(world):
    world.fetch([PII])
    guard = world.cache.guard()
    world.now = NOW + 30
    with pytest.raises(LeaseExpired):
        guard()
    world.lease.renew()
    guard()


def test_a_guard_with_a_margin_refuses_when_the_lease_may_run_out_before_the_commit_takes_effect(world):
    world.fetch([PII])
    world.now = NOW + 19.9
    world.cache.guard(10)()
    world.now = NOW + 20
    world.cache.guard()()
    with pytest.raises(LeaseExpired):
        world.cache.guard(10)()


def test_a_guard_refuses_after_a_destruction_that_the_lease_has_seen(world):
    world.fetch([PII], [person(1)])
    guard = world.cache.guard()
    world.store.sequence = 1
    world.lease.renew()
    with pytest.raises(KeysChanged):
        guard()
    world.fetch([PII], [person(1)])
    world.cache.guard()()
    with pytest.raises(KeysChanged):
        guard()


def test_a_guard_passes_a_batch_fetched_after_a_destruction_that_the_lease_has_not_seen(world):
    world.store.sequence = 1
    world.fetch([PII])
    world.cache.guard()()


def test_a_guard_refuses_from_the_deadline_of_any_epoch_of_the_batch(world):
    world.fetch([PII])
    before = world.cache.guard()
    world.fetch([TRANSIT], deadline_s=NOW + 5)
    world.fetch([PII, TRANSIT], deadline_s=NOW + 5)
    guard = world.cache.guard()
    world.now = NOW + 4.9
    guard()
    world.now = NOW + 5
    with pytest.raises(KeysChanged):
        guard()
    before()
    world.fetch([PII])
    world.cache.guard()()


def test_no_repr_shows_a_key(world):
    world.fetch([PII], [person(1)])
    assert repr(world.cache) == "KeyCache(KeyRing(1 epochs, 1 persons))"
