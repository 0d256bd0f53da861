"""What every key store promises (streams/keys/store.py)."""

import multiprocessing
from collections.abc import Callable
from itertools import count

import pytest

from processors.keyring import EpochRef, Needs, PersonSecret
from schemas.errors import KeysBusy, KeysFull, KeysUnusable, KmsRefuses, KmsUnavailable, TokensChange
from schemas.fields import PLATFORM
from schemas.sealed import KeyId
from streams.keys.kms_local import LocalKms
from streams.keys.ledger import AT_WILL, Mark
from streams.keys.sql import SEAL_BLOCK, SqlKeyStore
from streams.keys.store import NEVER, Buried, Destroyed, Gone
from tests.support.keys import (
    DAY,
    FOREVER,
    LATER,
    LATER_DAY,
    MONTH,
    NOW,
    PII,
    TODAY,
    epoch,
    person,
    persons,
)

MIDNIGHT = NOW - NOW % DAY + DAY
NEXT_MONTH = "2100-02"


def token(number: int) -> list[bytes]:
    return [person(number).token]


class Killed(BaseException):
    """Stands for SIGKILL: nothing but the database's own rollback runs after it."""


def killed_at(step: int, store: SqlKeyStore, monkeypatch) -> Callable[[Callable[[], object]], bool]:
    """Return what calls something, and kills the store before its transaction or change in the KMS number `step`.

    It returns whether it came to that.
    """
    done = 0

    def counted(call):
        def wrapper(*args):
            nonlocal done
            done += 1
            if done == step:
                raise Killed
            return call(*args)

        return wrapper

    def run(call: Callable[[], object]) -> bool:
        try:
            call()
        except Killed:
            return True
        return False

    for name in ("_transaction", "_settle"):
        monkeypatch.setattr(store, name, counted(getattr(store, name)))
    for name in ("wrap", "destroy", "raise_counter"):
        monkeypatch.setattr(store.kms, name, counted(getattr(store.kms, name)))
    return run


# --- get or create ------------------------------------------------------------------------------------------


def test_a_secret_is_the_same_for_every_instance_and_opens_by_its_sid(deployment):
    refs = [person(number, owner) for number in range(700) for owner in (PLATFORM, "acme")]
    first = deployment.open().fetch(persons(refs), NOW)
    other = deployment.open()
    again = other.fetch(persons(refs), NOW)
    assert again.persons == first.persons
    assert len(first.persons) == 1400
    assert other.open_persons([found.sid for found in first.persons.values()], NOW) == {
        found.sid: found for found in first.persons.values()
    }


def test_sids_and_secrets_are_unique_by_owner_person_and_month(deployment):
    refs = [person(n, owner, month) for n in range(20) for owner in (PLATFORM, "a") for month in (MONTH, NEXT_MONTH)]
    store = deployment.open()
    found = store.fetch(persons(refs), NOW).persons
    assert len({one.sid for one in found.values()}) == len({one.secret for one in found.values()}) == len(refs)
    assert all(len(one.sid) == 32 and len(one.secret) == 32 for one in found.values())
    assert store.open_persons([one.sid for one in found.values()], NOW) == {one.sid: one for one in found.values()}


def test_an_epoch_key_and_the_token_key_are_the_same_for_every_instance(deployment):
    first, second = deployment.open(), deployment.open()
    key = first.fetch(epoch(PII), NOW).epochs[PII]
    assert second.fetch(epoch(PII), NOW).epochs[PII] == key
    assert second.open_epochs([key.id], NOW) == {key.id: key}
    tokens = first.token_keys()
    assert second.token_keys() == tokens
    assert (tokens.current.version, len(tokens.current.key), tokens.others, tokens.changing) == (1, 32, (), False)
    assert first.store_id == second.store_id


def test_many_epochs_are_minted_and_found_in_one_call(deployment):
    store = deployment.open()
    refs = [EpochRef("transit", f"account-{number}", "2100-01-01T08") for number in range(1200)]
    needs = Needs(dict.fromkeys(refs, (NOW + DAY, 5)), {})
    made = store.fetch(needs, NOW)
    assert (len(made.epochs), set(made.granted.values())) == (1200, {SEAL_BLOCK})
    assert deployment.open().fetch(needs, NOW).epochs == made.epochs
    assert store.open_epochs([key.id for key in made.epochs.values()], NOW) == {
        key.id: key for key in made.epochs.values()
    }


def _fetch_in_a_process(opener, barrier, results) -> None:
    barrier.wait(30)
    store = opener()
    barrier.wait(30)
    found = store.fetch(Needs({PII: (LATER, 5)}, persons(person(n) for n in range(500)).persons), NOW)
    results.put(
        (
            store.store_id,
            store.token_keys().current.key,
            found.epochs[PII].key,
            [(ref.token, *one) for ref, one in sorted(found.persons.items(), key=lambda item: item[0].token)],
        )
    )
    store.close()


def test_two_processes_that_race_make_one_store_and_the_same_secrets(deployment):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_fetch_in_a_process, args=(deployment.opener(), barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results.close()
    results.join_thread()
    assert first == second
    assert len(first[3]) == 500


def test_a_failed_fetch_leaves_nothing_behind_and_the_next_one_works(deployment, monkeypatch):
    store = deployment.open()

    def fails(*_):
        raise KeysFull

    with monkeypatch.context() as patch:
        patch.setattr(store, "_reserve", fails)
        with pytest.raises(KeysFull):
            store.fetch(Needs({PII: (LATER, 1)}, persons([person(1)]).persons), NOW)
    assert store.persons_of(token(1)) == []
    found = store.fetch(persons([person(1)]), NOW).persons
    assert deployment.open().fetch(persons([person(1)]), NOW).persons == found


def test_a_person_is_found_by_any_of_their_tokens_in_every_month_and_with_every_owner(deployment):
    store = deployment.open()
    refs = [person(1), person(2, "acme"), person(2, month=NEXT_MONTH), person(3)]
    found = store.fetch(persons(refs), NOW).persons
    known = store.persons_of(token(1) + token(2))
    assert [(one.owner, one.month, one.day) for one in known] == [
        ("acme", MONTH, LATER_DAY),
        (PLATFORM, MONTH, LATER_DAY),
        (PLATFORM, NEXT_MONTH, LATER_DAY),
    ]
    assert [one.sid for one in known] == [found[ref].sid for ref in (refs[1], refs[0], refs[2])]
    store.fetch(persons([person(3)], None), NOW)
    assert [one.day for one in store.persons_of(token(3))] == [NEVER]
    assert store.persons_of([]) == store.persons_of(token(9)) == []


# --- deadlines ----------------------------------------------------------------------------------------------


def test_an_epoch_is_refused_from_its_deadline_on_and_never_minted_again(deployment):
    store = deployment.open()
    key = store.fetch(epoch(PII, NOW + 10), NOW).epochs[PII]
    assert store.open_epochs([key.id], NOW + 9) == {key.id: key}
    assert store.open_epochs([key.id], NOW + 10) == {key.id: Gone.DESTROYED}
    assert store.fetch(epoch(PII, NOW + 10), NOW + 10).epochs == {}
    # When another policy asks for a later deadline, the one of the first minting stays
    assert store.fetch(epoch(PII, NOW + 999), NOW + 10).epochs == {}
    assert store.fetch(epoch(PII, NOW + 999), NOW + 9).epochs == {PII: key}
    assert [line.versions for line in store.status(NOW)] == [1]


def test_an_epoch_already_dead_when_first_asked_for_is_not_minted(deployment):
    store = deployment.open()
    assert store.fetch(epoch(PII, NOW), NOW).epochs == {}
    assert store.status(NOW) == []


def test_an_epoch_without_deadline_stays(deployment):
    store = deployment.open()
    key = store.fetch(epoch(FOREVER, None), NOW).epochs[FOREVER]
    assert key.deadline_s is None
    assert store.open_epochs([key.id], NOW * 2) == {key.id: key}


def test_a_person_asked_for_past_the_deadline_gets_no_secret(deployment):
    store = deployment.open()
    assert store.fetch(persons([person(1)], NOW), NOW).persons == {}
    assert store.persons_of(token(1)) == []


@pytest.mark.parametrize("later", [NOW + 40 * DAY, None], ids=["date", "never"])
def test_a_secret_needed_for_longer_is_kept_and_wrapped_under_the_later_day(deployment, later):
    store = deployment.open()
    first = store.fetch(persons([person(1)], NOW + DAY), NOW).persons[person(1)]
    assert store.fetch(persons([person(1)], later), NOW).persons[person(1)] == first
    assert store.fetch(persons([person(1)], NOW + DAY), NOW).persons[person(1)] == first
    store.kms.destroy("2100-01-02")
    assert deployment.open().open_persons([first.sid], NOW + 39 * DAY) == {first.sid: first}


def test_a_secret_whose_day_is_over_is_destroyed_and_the_person_gets_a_new_one(deployment):
    store = deployment.open()
    old = store.fetch(persons([person(1)], NOW + 10), NOW).persons[person(1)]
    assert store.open_persons([old.sid], NOW + DAY) == {old.sid: Gone.DESTROYED}
    new = store.fetch(persons([person(1)]), NOW + DAY).persons[person(1)]
    assert new.sid != old.sid
    assert new.secret != old.secret
    assert store.open_persons([old.sid, new.sid], NOW + DAY) == {old.sid: Gone.DESTROYED, new.sid: new}


@pytest.mark.parametrize(
    ("deadline_s", "day"), [(MIDNIGHT - 1, TODAY), (MIDNIGHT, TODAY), (MIDNIGHT + 1, "2100-01-02")]
)
def test_what_dies_at_a_midnight_is_under_the_day_that_ends_then(deployment, deadline_s, day):
    store = deployment.open()
    end_s = MIDNIGHT if day == TODAY else MIDNIGHT + DAY
    found = store.fetch(Needs({PII: (deadline_s, 1)}, {person(1): deadline_s}), NOW)
    secret = found.persons[person(1)]
    assert [one.day for one in store.persons_of(token(1))] == [day]
    assert store.open_persons([secret.sid], end_s - 1) == {secret.sid: secret}
    assert store.open_persons([secret.sid], end_s) == {secret.sid: Gone.DESTROYED}
    assert store.open_epochs([found.epochs[PII].id], deadline_s - 1) == {found.epochs[PII].id: found.epochs[PII]}
    assert (store.due_days(end_s - 1), store.due_days(end_s)) == ([], [day])


# --- destruction --------------------------------------------------------------------------------------------


def test_a_destroyed_epoch_is_gone_in_all_versions_and_never_minted_again(deployment):
    store, other = deployment.open(max_seals=10), deployment.open(max_seals=10)
    ids = [store.fetch(epoch(PII, LATER, 10), NOW).epochs[PII].id for _ in range(2)]
    assert [key_id.version for key_id in ids] == [1, 2]
    assert store.destroy_epoch(PII) == 1
    for one in (store, other):
        assert one.open_epochs(ids, NOW) == dict.fromkeys(ids, Gone.DESTROYED)
        found = one.fetch(epoch(PII), NOW)
        assert (found.epochs, found.granted, found.sequence) == ({}, {}, 1)
    assert [(line.epoch, line.versions, line.state) for line in store.status(NOW)] == [(MONTH, 0, "destroyed")]


def test_an_epoch_can_be_destroyed_before_it_was_minted_and_twice(deployment):
    store = deployment.open()
    store.destroy_epoch(PII)
    store.destroy_epoch(PII)
    assert store.fetch(epoch(PII), NOW).epochs == {}
    assert store.open_epochs([KeyId(*PII, 1)], NOW) == {KeyId(*PII, 1): Gone.DESTROYED}
    assert [line.state for line in store.status(NOW)] == ["destroyed"]


def test_destroyed_and_absent_are_told_apart_by_tombstones(deployment):
    store = deployment.open()
    key = store.fetch(epoch(PII), NOW).epochs[PII]
    absent = [KeyId(*PII, 2), KeyId("pii", PLATFORM, "1999-01", 1)]
    assert store.open_epochs([key.id, *absent], NOW) == {key.id: key} | dict.fromkeys(absent, Gone.ABSENT)
    sids = ["0" * 32, "salt:" + "0" * 32, "-", "", "A" * 32, "é"]
    assert store.open_persons(sids, NOW) == dict.fromkeys(sids, Gone.ABSENT)


def test_an_erased_person_starts_anew_and_nobody_else_is_touched(deployment):
    store, other = deployment.open(), deployment.open()
    months = [person(1, month=month) for month in (MONTH, NEXT_MONTH)]
    bystanders = [person(2), person(1, "acme")]
    before = store.fetch(persons([*months, *bystanders]), NOW).persons
    gone = store.destroy_persons(PLATFORM, token(1))
    assert gone == Destroyed(1, tuple(sorted(before[ref].sid for ref in months)))
    opened = other.open_persons([one.sid for one in before.values()], NOW)
    assert [opened[before[ref].sid] for ref in months] == [Gone.DESTROYED] * 2
    assert [opened[before[ref].sid] for ref in bystanders] == [before[ref] for ref in bystanders]
    assert [one.owner for one in other.persons_of(token(1))] == ["acme"]
    after = other.fetch(persons([*months, *bystanders]), NOW).persons
    assert [after[ref] == before[ref] for ref in [*months, *bystanders]] == [False, False, True, True]
    assert not {after[ref].sid for ref in months} & {before[ref].sid for ref in months}


def test_a_person_is_erased_under_all_tokens_they_are_known_by(deployment):
    store = deployment.open()
    found = store.fetch(persons([person(1), person(2), person(3)]), NOW).persons
    assert len(store.destroy_persons(PLATFORM, token(1) + token(2)).sids) == 2
    assert store.open_persons([found[person(3)].sid], NOW) == {found[person(3)].sid: found[person(3)]}
    assert store.destroy_persons(PLATFORM, token(1) + token(2)) == Destroyed(2, ())


def test_a_sid_is_destroyed_by_name_whether_or_not_it_is_there(deployment):
    store, other = deployment.open(), deployment.open()
    found = store.fetch(persons([person(1), person(2)]), NOW).persons
    unknown = "ab" * 16
    gone = store.destroy_sids([unknown, found[person(1)].sid, "no sid"])
    assert gone == Destroyed(1, tuple(sorted([unknown, found[person(1)].sid])))
    assert other.open_persons([unknown, found[person(1)].sid, found[person(2)].sid], NOW) == {
        unknown: Gone.DESTROYED,
        found[person(1)].sid: Gone.DESTROYED,
        found[person(2)].sid: found[person(2)],
    }
    assert other.persons_of(token(1)) == []
    assert store.destroy_sids([unknown]) == Destroyed(2, (unknown,))


def test_every_destruction_moves_the_sequence_for_all_and_then_the_counter(deployment):
    store, other = deployment.open(), deployment.open()
    assert other.fetch(persons([person(1)]), NOW).sequence == 0
    destructions = [
        lambda: store.destroy_epoch(PII),
        lambda: store.destroy_persons(PLATFORM, [b"nobody"]).sequence,
        lambda: store.destroy_sids([]).sequence,
        lambda: store.destroy_epoch(PII),
    ]
    for number, destroy in enumerate(destructions, 1):
        assert destroy() == number == store.kms.counter()
    assert other.fetch(persons([person(1)]), NOW).sequence == other.sequence() == 4
    assert other.renew_lease("worker", 30, 0) == 4


def test_a_destruction_without_its_counter_is_an_error_and_calling_again_finishes_it(deployment, monkeypatch):
    store = deployment.open()
    sid = store.fetch(persons([person(1)]), NOW).persons[person(1)].sid

    def away(_):
        raise KmsUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(store.kms, "raise_counter", away)
        with pytest.raises(KmsUnavailable):
            store.destroy_persons(PLATFORM, token(1))
    assert store.open_persons([sid], NOW) == {sid: Gone.DESTROYED}
    assert store.destroy_persons(PLATFORM, token(1)).sequence == store.kms.counter() == 2


def test_status_names_what_is_alive_due_and_destroyed(deployment):
    store = deployment.open()
    due, dead = EpochRef("content", "acme", TODAY), EpochRef("transit", "acme", TODAY + "T08")
    for ref, deadline_s in ((due, NOW + 5), (dead, LATER), (FOREVER, None)):
        store.fetch(epoch(ref, deadline_s), NOW)
    store.destroy_epoch(dead)
    assert [(line.domain, line.deadline_s, line.state) for line in store.status(NOW + 5)] == [
        ("content", NOW + 5, "due"),
        ("suppression", None, "alive"),
        ("transit", LATER, "destroyed"),
    ]


# --- burial -------------------------------------------------------------------------------------------------


def a_full_store(store: SqlKeyStore):
    """Fill a store: two epochs and 30 people die today, one epoch and as many people later; return what is in it."""
    dying = Needs(
        {EpochRef("content", f"a{n}", TODAY): (MIDNIGHT, 5) for n in range(2)},
        {person(n, owner): MIDNIGHT for n in range(10) for owner in ("a0", "a1", PLATFORM)},
    )
    living = Needs({PII: (LATER, 5)}, {person(n, "a2"): LATER for n in range(30)})
    return store.fetch(dying, NOW), store.fetch(living, NOW)


def test_a_buried_day_is_gone_with_its_keks_and_all_else_stays(deployment):
    store, other = deployment.open(), deployment.open()
    dying, living = a_full_store(store)
    assert store.due_days(MIDNIGHT - 1) == []
    assert store.due_days(MIDNIGHT) == [TODAY]
    assert store.bury_day(TODAY, MIDNIGHT) == Buried(2, 30)
    assert store.due_days(MIDNIGHT) == []
    assert store.kms.names() == [LATER_DAY, NEVER]
    assert store.sequence() == store.kms.counter() == 1
    assert store.stale_days() == {}
    for one in (store, other, deployment.open()):
        ids = [key.id for key in dying.epochs.values()]
        assert one.open_epochs(ids, NOW) == dict.fromkeys(ids, Gone.DESTROYED)
        assert one.fetch(Needs(dict.fromkeys(dying.epochs, (LATER, 1)), {}), NOW).epochs == {}
        sids = [found.sid for found in dying.persons.values()]
        assert set(one.open_persons(sids, NOW).values()) == {Gone.ABSENT}
        again = one.fetch(Needs({PII: (LATER, 5)}, dict.fromkeys(living.persons, LATER)), NOW)
        assert (again.epochs, again.persons) == (living.epochs, living.persons)
    assert [line.state for line in store.status(NOW)] == ["destroyed", "destroyed", "alive"]
    # And once more is nothing
    assert store.bury_day(TODAY, MIDNIGHT) == Buried(0, 0)
    assert store.sequence() == 1


def those_who_die(store: SqlKeyStore, day: str, end_s: int):
    """Fill a day with an epoch and ten people, half of them beside others who live, half in a month of the dead."""
    mixed = {person(n, "a"): end_s for n in range(5)}
    alone = {person(n, "a", "2099-12"): end_s for n in range(5)}
    return store.fetch(Needs({EpochRef("content", "a", day): (end_s, 1)}, mixed | alone), end_s - DAY)


def test_a_day_that_another_run_buries_at_any_point_meanwhile_is_buried(deployment, monkeypatch):
    stays = deployment.open().fetch(persons(person(n) for n in range(30)), NOW).persons
    for step in count(1):
        day, end_s = f"2100-01-{step:02}", MIDNIGHT + (step - 1) * DAY
        store, other = deployment.open(), deployment.open()
        dying = those_who_die(store, day, end_s)
        begun, left = store._begun, [step]

        def then_buried(mode, begun=begun, left=left, other=other, day=day, end_s=end_s):
            left[0] -= 1
            if left[0] == 0:
                other.bury_day(day, end_s)
            return begun(mode)

        with monkeypatch.context() as patch:
            patch.setattr(store, "_begun", then_buried)
            store.bury_day(day, end_s)
        if left[0] > 0:
            break
        store = deployment.open()
        assert (store.due_days(end_s), store.kms.names()) == ([], [LATER_DAY, NEVER])
        assert set(store.open_persons([one.sid for one in dying.persons.values()], NOW).values()) == {Gone.ABSENT}
        assert store.fetch(persons(stays), NOW).persons == stays
    assert step > 5


def test_a_burial_killed_at_any_point_is_still_due_and_finished_by_calling_again(deployment, monkeypatch):
    stays = deployment.open().fetch(persons(person(n) for n in range(30)), NOW).persons
    for step in count(1):
        day, end_s = f"2100-01-{step:02}", MIDNIGHT + (step - 1) * DAY
        store, victim = deployment.open(), deployment.open()
        dying = those_who_die(store, day, end_s)
        with monkeypatch.context() as patch:
            killed = killed_at(step, victim, patch)
            if not killed(lambda end_s=end_s, day=day, victim=victim: victim.bury_day(day, end_s)):
                break
        assert store.due_days(end_s) == ([day] if day in store.kms.names() else [])
        store.bury_day(day, end_s)
        store = deployment.open()
        assert (store.due_days(end_s), store.kms.names()) == ([], [LATER_DAY, NEVER])
        assert store.kms.counter() == store.sequence()
        ids = [key.id for key in dying.epochs.values()]
        assert store.open_epochs(ids, NOW) == dict.fromkeys(ids, Gone.DESTROYED)
        assert set(store.open_persons([one.sid for one in dying.persons.values()], NOW).values()) == {Gone.ABSENT}
        assert store.fetch(persons(stays), NOW).persons == stays
    assert step > 6


def test_a_month_whose_people_are_all_dead_is_gone_and_can_begin_again(deployment):
    store = deployment.open()
    store.fetch(Needs({}, {person(n, month="2099-12"): MIDNIGHT for n in range(30)}), NOW)
    store.fetch(persons([person(1)]), NOW)
    assert store.bury_day(TODAY, MIDNIGHT) == Buried(0, 30)
    assert [one.month for one in store.persons_of(token(1))] == [MONTH]
    late = store.fetch(persons([person(1, month="2099-12")]), MIDNIGHT).persons
    assert deployment.open().fetch(persons([person(1, month="2099-12")]), MIDNIGHT).persons == late


def test_a_secret_kept_for_longer_is_not_buried_with_its_first_day(deployment):
    store = deployment.open()
    first = store.fetch(persons([person(1), person(2)], MIDNIGHT), NOW).persons
    store.fetch(persons([person(1)]), NOW)
    assert store.bury_day(TODAY, MIDNIGHT) == Buried(0, 1)
    sid = first[person(1)].sid
    assert deployment.open().open_persons([sid], MIDNIGHT) == {sid: first[person(1)]}


def test_a_kek_that_the_store_knows_nothing_of_is_due_and_buried_too(deployment):
    store = deployment.open()
    store.kms.wrap("2099-12-30", b"of a process that was killed")
    assert store.due_days(NOW) == ["2099-12-30"]
    assert store.bury_day("2099-12-30", NOW) == Buried(0, 0)
    assert store.kms.names() == [NEVER]


@pytest.mark.parametrize("day", [TODAY, LATER_DAY, NEVER, "", "2099-12-3", "2099-12-31\n", "2099-12-31.2", "x" * 10])
def test_nothing_but_a_day_that_is_over_is_buried(deployment, day):
    store = deployment.open()
    found = store.fetch(persons([person(1)], MIDNIGHT), NOW).persons[person(1)]
    with pytest.raises(ValueError):
        store.bury_day(day, MIDNIGHT - 1)
    assert store.open_persons([found.sid], NOW) == {found.sid: found}


def test_a_day_that_was_buried_before_its_time_begins_anew_under_another_kek(deployment):
    store, other = deployment.open(), deployment.open()
    dead = store.fetch(persons([person(1)], MIDNIGHT), NOW).persons[person(1)]
    store.bury_day(TODAY, MIDNIGHT)
    assert store.kms.names() == [NEVER]
    for one in (store, other):
        made = one.fetch(persons([person(1), person(2)], MIDNIGHT), NOW).persons
        assert made[person(1)].sid != dead.sid
    assert store.kms.names() == [f"{TODAY}.2", NEVER]
    assert other.open_persons([made[person(2)].sid], NOW) == {made[person(2)].sid: made[person(2)]}
    other.bury_day(TODAY, MIDNIGHT)
    assert (other.kms.names(), store.persons_of(token(2))) == ([NEVER], [])
    store.fetch(persons([person(3)], MIDNIGHT), NOW)
    assert store.kms.names() == [f"{TODAY}.3", NEVER]


def test_a_day_begins_after_all_of_it_that_the_service_destroyed(deployment):
    # Given a store that a backup brought back: the service destroyed generations that it never heard of
    store, other = deployment.open(), deployment.open()
    for day in (LATER_DAY, NEVER, AT_WILL):
        for name in (day, f"{day}.2"):
            store.kms.wrap(name, b"of the store that there was")
    for day in (LATER_DAY, AT_WILL):
        store.kms.destroy(day)
    # Then people, epochs and secrets of that day go on
    made = store.fetch(Needs({PII: (LATER, 1)}, persons([person(1)]).persons), NOW)
    store.put_secret("name", b"value", AT_WILL)
    again = other.fetch(Needs({PII: (LATER, 1)}, persons([person(1)]).persons), NOW)
    assert (again.epochs, again.persons, other.secret("name")) == (made.epochs, made.persons, b"value")
    keks = [kek for (kek,) in deployment.run("SELECT kek FROM wrapping_keys ORDER BY kek")]
    assert keks == [f"{LATER_DAY}.0002", f"{AT_WILL}.0002", f"{NEVER.ljust(10)}.0001"]


@pytest.mark.parametrize("needs", [persons([person(1)], MIDNIGHT), epoch(PII, MIDNIGHT)], ids=["person", "epoch"])
@pytest.mark.parametrize("at", ["wrap", "_begin_day"])
def test_a_day_that_is_buried_while_it_is_begun_begins_after_that(deployment, monkeypatch, needs, at):
    store, other = deployment.open(), deployment.open()
    owner = store.kms if at == "wrap" else store
    real, buried = getattr(owner, at), []

    def then_buried(*args):
        done = real(*args)
        if not buried:  # nobody waits for us meanwhile
            buried.append(other.bury_day(TODAY, MIDNIGHT))
        return done

    monkeypatch.setattr(owner, at, then_buried)
    made = store.fetch(needs, NOW)
    assert (buried, store.kms.names()) == ([Buried(0, 0)], [f"{TODAY}.2", NEVER])
    again = deployment.open().fetch(needs, NOW)
    assert (again.epochs, again.persons) == (made.epochs, made.persons)
    assert again.epochs or again.persons


def test_a_day_that_is_buried_whenever_it_is_begun_is_busy(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open()
    real = store._begin_day
    monkeypatch.setattr(store, "_begin_day", lambda day: (real(day), other.bury_day(TODAY, MIDNIGHT)))
    with pytest.raises(KeysBusy, match="buries"):
        store.fetch(persons([person(1)], MIDNIGHT), NOW)


def test_who_comes_while_a_day_is_buried_is_buried_with_it(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open()
    a_full_store(store)
    real, came = store._bury_persons, []

    def then_somebody_comes(day):
        count = real(day)
        if not came:
            came.extend(other.fetch(persons([person(77, "a3")], MIDNIGHT), NOW).persons.values())
        return count

    monkeypatch.setattr(store, "_bury_persons", then_somebody_comes)
    assert store.bury_day(TODAY, MIDNIGHT) == Buried(2, 31)
    for one in (other, deployment.open()):
        assert one.open_persons([came[0].sid], NOW) == {came[0].sid: Gone.ABSENT}
        assert one.fetch(persons([person(77, "a3")], MIDNIGHT), NOW).persons[person(77, "a3")].sid != came[0].sid
    assert store.kms.names() == [f"{TODAY}.2", LATER_DAY, NEVER]


def test_the_time_is_that_of_the_store(deployment):
    store = deployment.open()
    before = store.now_s()
    deployment.elapse(1.5)
    assert 1.5 <= store.now_s() - before < 60


# --- re-wrap ------------------------------------------------------------------------------------------------


def everything(store: SqlKeyStore):
    """Return all that can be had of a store filled by `a_full_store`."""
    known = [one.sid for n in range(30) for one in store.persons_of(token(n))]
    ids = [KeyId(line.domain, line.owner, line.epoch, 1) for line in store.status(NOW)]
    return store.token_keys(), store.secret("name"), store.open_persons(known, NOW), store.open_epochs(ids, NOW)


@pytest.mark.parametrize("day", [LATER_DAY, NEVER])
def test_a_rewrap_changes_nothing_but_the_keks(deployment, day):
    store, warm = deployment.open(), deployment.open()
    a_full_store(store)
    store.put_secret("name", b"value")
    store.fetch(epoch(FOREVER, None), NOW)
    before = everything(warm)
    assert store.rewrap(day) == (31 if day == LATER_DAY else 3)
    kept = {LATER_DAY: [TODAY, f"{LATER_DAY}.2", NEVER], NEVER: [TODAY, LATER_DAY, f"{NEVER}.2"]}[day]
    assert store.kms.names() == kept
    assert everything(store) == everything(warm) == everything(deployment.open()) == before
    assert store.rewrap(day) == (31 if day == LATER_DAY else 3)
    assert store.kms.names() == [name.replace(".2", ".3") for name in kept]
    assert store.sequence() == store.kms.counter()
    assert everything(warm) == before


def test_what_was_destroyed_is_not_moved(deployment):
    store = deployment.open()
    a_full_store(store)
    store.destroy_persons("a2", token(3))
    store.destroy_epoch(PII)
    assert store.rewrap(LATER_DAY) == 29
    assert store.bury_day(LATER_DAY, LATER + DAY) == Buried(0, 29)


def test_a_rewrap_killed_at_any_point_is_finished_by_calling_again(deployment, monkeypatch):
    a_full_store(deployment.open())
    for step in count(1):
        victim, store = deployment.open(), deployment.open()
        store.destroy_persons("a2", token(step))
        before = everything(store)
        with monkeypatch.context() as patch:
            killed = killed_at(step, victim, patch)
            if not killed(lambda victim=victim: victim.rewrap(LATER_DAY)):
                break
        assert everything(store) == everything(deployment.open()) == before
        store.fetch(persons([person(step, "a3")]), NOW)
        before = everything(store)
        store.rewrap(LATER_DAY)
        assert store.stale_days() == {}
        store = deployment.open()
        assert len([name for name in store.kms.names() if name.startswith(LATER_DAY)]) == 1
        assert everything(store) == before
    assert step > 10


def meanwhile(store: SqlKeyStore, act: Callable[[], object], monkeypatch) -> None:
    """Do something once after a re-wrap has read its first rows, and before it moves them."""
    read = store._persons_under

    def slowly(keks):
        for number, rows in enumerate(read(keks)):
            if number == 0:
                act()
            yield rows

    monkeypatch.setattr(store, "_persons_under", slowly)


def test_what_comes_while_a_day_is_rewrapped_is_under_the_new_generation(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open()
    a_full_store(store)
    other.fetch(persons([person(98, "a3")]), NOW)  # it knows the day's newest generation, until that changes
    made = {}
    needs = Needs({EpochRef("pii", PLATFORM, "2100-02"): (LATER, 1)}, {person(n): LATER for n in range(50)})
    meanwhile(store, lambda: made.update(other.fetch(needs, NOW)._asdict()), monkeypatch)
    assert store.rewrap(LATER_DAY) == 32
    assert store.kms.names() == [TODAY, f"{LATER_DAY}.2", NEVER]
    opened = deployment.open().open_persons([one.sid for one in made["persons"].values()], NOW)
    assert opened == {one.sid: one for one in made["persons"].values()}


def test_what_is_erased_or_prolonged_while_its_day_is_rewrapped_stays_so(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open()
    _, living = a_full_store(store)
    erased, prolonged = living.persons[person(1, "a2")], living.persons[person(2, "a2")]

    def act():
        other.destroy_persons("a2", token(1))
        other.destroy_epoch(PII)
        other.fetch(persons([person(2, "a2")], None), NOW)

    meanwhile(store, act, monkeypatch)
    store.rewrap(LATER_DAY)
    fresh = deployment.open()
    assert fresh.open_persons([erased.sid, prolonged.sid], NOW) == {
        erased.sid: Gone.DESTROYED,
        prolonged.sid: prolonged,
    }
    assert [one.day for one in fresh.persons_of(token(2)) if one.owner == "a2"] == [NEVER]
    key_id = living.epochs[PII].id
    assert fresh.open_epochs([key_id], NOW) == {key_id: Gone.DESTROYED}


def test_two_rewraps_of_a_day_at_once_do_no_harm(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open()
    a_full_store(store)
    before = everything(store)
    meanwhile(store, lambda: other.rewrap(LATER_DAY), monkeypatch)
    store.rewrap(LATER_DAY)
    assert store.kms.names() == [TODAY, f"{LATER_DAY}.2", NEVER]
    assert everything(deployment.open()) == before


def test_a_day_that_is_unknown_or_over_is_not_rewrapped(deployment, monkeypatch):
    store = deployment.open()
    a_full_store(store)
    names = store.kms.names()
    assert store.rewrap("2100-05-05") == 0
    monkeypatch.setattr(store, "_now_s", lambda: float(MIDNIGHT))
    assert store.rewrap(TODAY) == 0
    assert (store.kms.names(), store.sequence()) == (names, 0)


def test_a_day_is_stale_from_a_destruction_before_its_day_until_it_is_rewrapped(deployment):
    store = deployment.open()
    a_full_store(store)
    assert store.stale_days() == {}
    store.destroy_persons("a2", token(3))
    first = store.stale_days()
    assert list(first) == [LATER_DAY]
    deployment.elapse(1.1)
    store.destroy_epoch(PII)
    store.destroy_sids([store.persons_of(token(4))[0].sid])
    assert deployment.open().stale_days() == first | store.stale_days()
    assert store.stale_days()[LATER_DAY] == first[LATER_DAY]
    store.put_secret("name", b"value")
    store.drop_secret("name")
    assert sorted(store.stale_days()) == [TODAY, LATER_DAY, NEVER]
    for day in (TODAY, LATER_DAY, NEVER):
        store.rewrap(day)
    assert store.stale_days() == {}


def test_a_rewrap_that_finishes_another_covers_what_was_destroyed_since(deployment, monkeypatch):
    # Given a re-wrap that was killed before the KEK of before was destroyed, and a destruction after it
    store, victim = deployment.open(), deployment.open()
    a_full_store(store)
    store.destroy_persons("a2", token(1))

    def killed(_):
        raise Killed

    monkeypatch.setattr(victim.kms, "destroy", killed)
    with pytest.raises(Killed):
        victim.rewrap(LATER_DAY)
    assert store.kms.names() == [TODAY, LATER_DAY, f"{LATER_DAY}.2", NEVER]
    store.destroy_persons("a2", token(2))
    # When the day is re-wrapped once
    assert store.rewrap(LATER_DAY) == 29
    # Then no generation is left under which either ever was
    assert (store.kms.names(), store.stale_days()) == ([TODAY, f"{LATER_DAY}.3", NEVER], {})


def test_a_generation_that_rows_are_still_under_does_not_go(deployment, monkeypatch):
    store = deployment.open()
    a_full_store(store)
    before = everything(store)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_persons_under", lambda _: iter(()))
        with pytest.raises(KeysBusy, match="re-wrap again"):
            store.rewrap(LATER_DAY)
    assert everything(deployment.open()) == before
    assert store.rewrap(LATER_DAY) == 30  # the epoch is there already
    assert everything(deployment.open()) == before
    assert store.kms.names() == [TODAY, f"{LATER_DAY}.2", NEVER]


def test_a_destruction_after_a_row_was_moved_keeps_its_day_stale(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open()
    a_full_store(store)
    read, people = store._persons_under, iter((3, 4))

    def then_erased(keks):
        yield from read(keks)
        other.destroy_persons("a2", token(next(people)))  # the row is under the new generation by now

    monkeypatch.setattr(store, "_persons_under", then_erased)
    store.rewrap(LATER_DAY)
    assert list(store.stale_days()) == [LATER_DAY]
    monkeypatch.undo()
    store.rewrap(LATER_DAY)
    assert store.stale_days() == {}


# --- seals and leases ---------------------------------------------------------------------------------------


def test_seals_are_reserved_in_blocks_and_never_twice(deployment):
    store, other = deployment.open(), deployment.open()
    assert store.fetch(epoch(PII, LATER, 3), NOW).granted == {PII: SEAL_BLOCK}
    assert other.fetch(epoch(PII, LATER, SEAL_BLOCK + 1), NOW).granted == {PII: SEAL_BLOCK + 1}
    assert deployment.run("SELECT CAST(seals AS INTEGER) FROM epoch_keys") == [(2 * SEAL_BLOCK + 1,)]


def test_a_key_that_would_pass_its_seals_gets_a_new_version_and_the_old_one_still_opens(deployment):
    limit = 2 * SEAL_BLOCK
    store = deployment.open(max_seals=limit)
    first = store.fetch(epoch(PII, LATER, SEAL_BLOCK + 5), NOW)
    second = store.fetch(epoch(PII, LATER, SEAL_BLOCK - 5), NOW)  # exactly what is left
    third = store.fetch(epoch(PII, LATER + DAY, 1), NOW)
    assert [found.epochs[PII].id.version for found in (first, second, third)] == [1, 1, 2]
    assert first.granted[PII] + second.granted[PII] == limit
    assert third.epochs[PII].key != first.epochs[PII].key
    assert third.epochs[PII].deadline_s == LATER
    ids = [found.epochs[PII].id for found in (first, third)]
    assert all(not isinstance(key, Gone) for key in deployment.open().open_epochs(ids, NOW).values())
    with pytest.raises(ValueError):
        store.fetch(epoch(PII, LATER, limit + 1), NOW)


def test_leases_end_by_the_store_s_clock_or_when_dropped(deployment):
    store, other = deployment.open(), deployment.open()
    assert store.renew_lease("a", 60, 0) == 0
    store.renew_lease("b", 2, 0)
    other.destroy_epoch(PII)
    assert store.renew_lease("a", 60, 1) == 1
    assert other.leases() == {"a": 1, "b": 0}
    deployment.elapse(2.1)
    assert other.leases() == {"a": 1}
    store.renew_lease("b", 60, 1)
    assert other.leases() == {"a": 1, "b": 1}
    store.drop_lease("a")
    store.drop_lease("a")
    assert other.leases() == {"b": 1}


# --- restrictions -------------------------------------------------------------------------------------------


def test_the_restricted_are_those_of_a_mark_in_force_of_the_secret_s_owner(deployment):
    store, other = deployment.open(), deployment.open()
    refs = [person(1), person(1, month=NEXT_MONTH), person(1, "acme"), person(2)]
    sids = {ref: found.sid for ref, found in store.fetch(persons(refs), NOW).persons.items()}
    asked = [*sids.values(), "salt:" + "0" * 32, "-"]
    assert store.restricted(asked) == set()
    store.ledger.add_mark(Mark("0" * 32, "restriction", PLATFORM, tuple(token(7) + token(1)), "R-1", NOW), None)
    store.ledger.add_mark(Mark("1" * 32, "hold", PLATFORM, tuple(token(2)), "R-2", NOW), None)
    assert other.restricted(asked) == {sids[refs[0]], sids[refs[1]]}
    assert other.restricted([]) == set()
    store.ledger.end_mark("0" * 32, NOW)
    assert other.restricted(asked) == set()


# --- token keys ---------------------------------------------------------------------------------------------


def test_a_token_rotation_adds_holds_switches_and_each_step_is_idempotent(deployment):
    store, other = deployment.open(), deployment.open()
    first = store.token_keys().current
    for version in (1, 2):
        with pytest.raises(TokensChange):
            store.hold_tokens(version)
    assert store.switch_tokens(1) == 0
    added = store.add_token_key()
    assert (added.version, len(added.key), other.add_token_key()) == (2, 32, added)
    assert other.token_keys() == (first, (added,), False)
    assert store.sequence() == 0
    with pytest.raises(TokensChange):
        store.switch_tokens(2)  # nobody was made to wait
    assert store.hold_tokens(2) == other.hold_tokens(2) == 1 == store.kms.counter()
    assert other.token_keys() == (first, (added,), True)
    assert store.switch_tokens(2) == other.switch_tokens(2) == 2 == store.kms.counter()
    assert other.token_keys() == deployment.open().token_keys() == (added, (first,), False)
    third = store.add_token_key()
    assert (third.version, third.key not in (first.key, added.key)) == (3, True)


def test_whoever_was_overtaken_by_another_rotation_neither_holds_nor_switches(deployment):
    store = deployment.open()
    store.add_token_key()
    store.hold_tokens(2)
    store.switch_tokens(2)
    store.add_token_key()
    for late in (store.hold_tokens, store.switch_tokens):
        with pytest.raises(TokensChange):
            late(1)
    with pytest.raises(TokensChange):
        store.hold_tokens(2)
    assert store.switch_tokens(2) == 2
    assert not store.token_keys().changing
    store.hold_tokens(3)
    for late in (store.hold_tokens, store.switch_tokens):
        with pytest.raises(TokensChange):
            late(1)
    assert store.token_keys().current.version == 2


def test_an_older_token_key_is_destroyed_when_nobody_is_known_under_it(deployment):
    store, other = deployment.open(), deployment.open()
    store.fetch(persons([person(1)], MIDNIGHT), NOW)
    store.add_token_key()
    for version in (1, 2, 3):
        with pytest.raises(ValueError, match="not an older"):
            store.destroy_token_key(version)
    store.hold_tokens(2)
    store.switch_tokens(2)
    store.fetch(persons([person(2)]), NOW)
    with pytest.raises(ValueError, match="still known"):
        store.destroy_token_key(1)
    store.bury_day(TODAY, MIDNIGHT)
    store.destroy_token_key(1)
    store.destroy_token_key(1)
    assert other.token_keys() == (store.token_keys().current, (), False)
    assert other.token_keys().current.version == 2
    assert list(store.stale_days()) == [NEVER]
    assert store.sequence() == store.kms.counter() == 4
    assert store.add_token_key().version == 3


def test_an_erased_person_does_not_keep_a_token_key(deployment):
    store = deployment.open()
    store.fetch(persons([person(1), person(2)]), NOW)
    store.add_token_key()
    store.hold_tokens(2)
    store.switch_tokens(2)
    store.destroy_persons(PLATFORM, token(1) + token(2))
    store.destroy_token_key(1)
    assert store.token_keys().others == ()


# --- small secrets ------------------------------------------------------------------------------------------


def test_a_small_secret_is_kept_replaced_and_dropped(deployment):
    store, other = deployment.open(), deployment.open()
    assert store.secret("a") is None
    for value in (b"", b"\0\0", bytes(range(256)) * 4, b"x"):
        store.put_secret("a", value)
        store.put_secret("b", b"other")
        assert (other.secret("a"), other.secret("b")) == (value, b"other")
    with pytest.raises(ValueError):
        store.put_secret("a", bytes(1025))
    assert store.sequence() == 0
    store.drop_secret("a")
    store.drop_secret("a")
    assert (other.secret("a"), other.secret("b"), store.sequence(), store.kms.counter()) == (None, b"other", 1, 1)


def test_the_rows_of_dropped_secrets_are_used_again(deployment):
    store = deployment.open()
    for number in range(20):
        store.put_secret(f"mark/{number}", b"+14155550101")
        store.put_secret("stays", b"%d" % number)
        store.drop_secret(f"mark/{number}")
    assert deployment.run("SELECT count(*) FROM secrets") == [(2,)]
    assert store.secret("stays") == b"19"


# --- the key management service -----------------------------------------------------------------------------


def test_kms_calls_do_not_grow_with_people(deployment):
    store = deployment.open()
    store.fetch(persons(person(n) for n in range(1000)), NOW)
    store.fetch(persons(person(n) for n in range(2000)), NOW)
    store.fetch(epoch(PII), NOW)
    assert store.kms.calls == 1


def test_while_the_kms_is_away_known_days_go_on_and_a_new_one_waits(deployment, monkeypatch):
    store = deployment.open()
    known = store.fetch(persons([person(1)]), NOW).persons

    def away(*_):
        raise KmsUnavailable

    with monkeypatch.context() as patch:
        for call in ("wrap", "unwrap"):
            patch.setattr(store.kms, call, away)
        assert store.fetch(persons([person(1)]), NOW).persons == known
        for number in range(2):
            with pytest.raises(KmsUnavailable):
                store.fetch(persons([person(2)], LATER + DAY), NOW)
            store.destroy_epoch(EpochRef("content", "acme", f"{number}"))  # now nothing is held in memory
            with pytest.raises(KmsUnavailable):
                store.fetch(persons([person(1)]), NOW)
    assert store.fetch(persons([person(1)]), NOW).persons == known
    assert store.persons_of(token(2)) == []
    assert len(store.fetch(persons([person(2)], LATER + DAY), NOW).persons) == 1


def test_no_lock_is_held_while_the_kms_is_asked(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open(busy_timeout_s=0.2)
    other.fetch(persons([person(1)]), NOW)
    asked = []
    for name in ("wrap", "unwrap"):
        call = getattr(store.kms, name)

        def slowly(*args, call=call, name=name):
            other.renew_lease("worker", 30, 0)
            other.fetch(persons([person(2 + len(asked))]), NOW)
            asked.append(name)
            return call(*args)

        monkeypatch.setattr(store.kms, name, slowly)
    store.fetch(Needs({PII: (LATER, 1)}, persons([person(8)]).persons | persons([person(9)], LATER + DAY).persons), NOW)
    store.rewrap(LATER_DAY)
    assert asked[:3] == ["unwrap", "wrap", "wrap"]


def test_a_missing_kek_is_waited_for_and_named(deployment):
    sid = deployment.open().fetch(persons([person(1)], NOW + DAY), NOW).persons[person(1)].sid
    store = deployment.open()
    (kek,) = deployment.kms_folder.glob("*.2100-01-02.kek")
    kek.rename(kek.with_suffix(".away"))
    for _ in range(2):
        with pytest.raises(KmsRefuses, match="key-encryption key missing") as caught:
            store.open_persons([sid], NOW)
        assert caught.value.where["day"] == "2100-01-02"
    kek.with_suffix(".away").rename(kek)
    assert isinstance(store.open_persons([sid], NOW)[sid], PersonSecret)


def test_keks_that_keys_are_under_and_the_service_lacks_are_lost(deployment):
    store = deployment.open()
    a_full_store(store)
    assert store.lost() == []
    store.rewrap(LATER_DAY)
    store.kms.wrap("2100-05-05", b"of nothing")
    assert store.lost() == []
    for name in (f"{LATER_DAY}.2", TODAY):
        store.kms.destroy(name)
    assert deployment.open().lost() == [TODAY, f"{LATER_DAY}.2"]


def test_a_rotated_root_is_noted_and_a_kill_before_that_does_no_harm(deployment, monkeypatch):
    store, other = deployment.open(), deployment.open()
    before = store.fetch(persons([person(1)]), NOW).persons
    check = store.kms.check
    with monkeypatch.context() as patch:
        assert killed_at(1, store, patch)(store.rotate_root)
    assert deployment.run("SELECT value FROM meta WHERE name = 'root_check'") == [(check.hex(),)]
    third = deployment.open()
    assert third.kms.check != check
    assert deployment.run("SELECT value FROM meta WHERE name = 'root_check'") == [(third.kms.check.hex(),)]
    store.rotate_root()
    for one in (store, other, third, deployment.open()):
        assert one.fetch(persons([person(1)]), NOW).persons == before
        one.fetch(persons([person(2)], LATER + 9 * DAY), NOW)


def test_another_store_s_root_key_is_found_at_open(deployment, tmp_path):
    store = deployment.open()
    LocalKms.create(tmp_path / "other", "ab" * 16)
    theirs = tmp_path / "other" / ("ab" * 16 + ".root")
    (deployment.kms_folder / f"{store.store_id}.root").write_bytes(theirs.read_bytes())
    refused(deployment.open, "not the one of this key store")


def test_without_its_root_key_a_store_does_not_open_and_nothing_is_made(deployment):
    store = deployment.open()
    root = deployment.kms_folder / f"{store.store_id}.root"
    root.rename(root.with_name("taken-away"))
    before = sorted(deployment.kms_folder.iterdir())
    refused(deployment.open, "root key missing beside an existing key store; restore it")
    assert sorted(deployment.kms_folder.iterdir()) == before


# --- restored from a backup ---------------------------------------------------------------------------------


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(KeysUnusable, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_store_older_than_the_last_destruction_is_refused_until_it_caught_up(deployment):
    store = deployment.open()
    store.destroy_epoch(PII)
    store.kms.raise_counter(5)
    refused(deployment.open, "older than the last destruction: .* run: streamveil keys reconcile")
    old = deployment.open(outdated=True)
    assert old.destroy_epoch(PII) == 2
    refused(deployment.open, "older than the last destruction")
    old.catch_up()
    assert old.sequence() == deployment.open().sequence() == 5
    old.catch_up()
    assert old.destroy_epoch(PII) == 6 == deployment.open().kms.counter()


def test_a_lost_counter_is_refused_like_an_old_store(deployment):
    store = deployment.open()
    store.destroy_epoch(PII)
    (deployment.kms_folder / f"{store.store_id}.counter").unlink()
    refused(deployment.open, "counter is lost.* run: streamveil keys reconcile")
    old = deployment.open(outdated=True)
    old.catch_up()
    assert deployment.open().kms.counter() == 1


def test_a_kill_between_a_destruction_and_its_counter_is_made_good_at_open(deployment, monkeypatch):
    store = deployment.open()
    with monkeypatch.context() as patch:
        assert killed_at(2, store, patch)(lambda: store.destroy_epoch(PII))
    assert (store.sequence(), store.kms.counter()) == (1, 0)
    deployment.open()
    assert store.kms.counter() == 1


def test_a_store_that_goes_back_in_time_while_it_is_open_is_found_out(deployment):
    store = deployment.open()
    store.destroy_epoch(PII)
    store.sequence()
    deployment.run("UPDATE meta SET value = '0' WHERE name = 'destruction_seq'")
    refused(store.sequence, "went back in time")


# --- what is altered or of another version ------------------------------------------------------------------


@pytest.mark.parametrize("change", ["deadline_s = deadline_s + 1", "epoch = '2100-03'", "version = 2"])
def test_an_epoch_key_given_another_deadline_or_name_does_not_unwrap(deployment, change):
    store = deployment.open()
    store.fetch(epoch(PII), NOW)
    deployment.run(f"UPDATE epoch_keys SET {change}")
    ids = [KeyId("pii", PLATFORM, name, version) for name in (MONTH, "2100-03") for version in (1, 2)]
    refused(lambda: store.open_epochs(ids, NOW), "altered or damaged")


def test_swapped_epoch_keys_do_not_unwrap(deployment):
    store, other = deployment.open(), EpochRef("pii", PLATFORM, NEXT_MONTH)
    store.fetch(Needs({PII: (LATER, 1), other: (LATER, 1)}, {}), NOW)
    (one, two) = deployment.run("SELECT wrapped FROM epoch_keys ORDER BY epoch")
    for epoch_name, blob in ((MONTH, two[0]), (NEXT_MONTH, one[0])):
        deployment.run("UPDATE epoch_keys SET wrapped = ? WHERE epoch = ?", (blob, epoch_name))
    refused(lambda: store.open_epochs([KeyId(*PII, 1)], NOW), "altered or damaged")
    refused(lambda: store.fetch(epoch(PII), NOW), "altered or damaged")


def test_a_small_secret_under_another_name_does_not_unwrap(deployment):
    store = deployment.open()
    store.put_secret("a", b"1")
    store.put_secret("b", b"2")
    ((name,),) = deployment.run("SELECT name FROM secrets ORDER BY name DESC LIMIT 1")
    deployment.run(
        "UPDATE secrets SET wrapped = (SELECT wrapped FROM secrets WHERE name <> ?) WHERE name = ?", (name,) * 2
    )
    with pytest.raises(KeysUnusable, match="altered or damaged"):
        [store.secret(one) for one in ("a", "b")]


def test_a_store_of_a_newer_version_is_refused(deployment):
    deployment.open().close()
    deployment.run("UPDATE meta SET value = '3' WHERE name = 'schema'")
    refused(deployment.open, "another version")


@pytest.mark.parametrize("damage", ["DROP TABLE stale", "ALTER TABLE token_keys DROP COLUMN state"])
def test_a_store_that_lacks_a_table_or_column_is_refused(deployment, damage):
    deployment.open().close()
    deployment.run(damage)
    refused(deployment.open, "lacks a table or column; restore it")


def test_a_missing_store_is_made_only_when_asked_for(deployment):
    refused(lambda: deployment.open(create=False), "no key store")
    assert not deployment.kms_folder.exists()


def test_no_repr_or_error_shows_a_secret(deployment):
    store = deployment.open()
    found = store.fetch(persons([person(7)]), NOW)
    store.put_secret("name", found.persons[person(7)].secret)
    shown = (store, store.kms, store.ledger, store._ciphers, found.persons[person(7)], store.token_keys())
    for text in map(repr, shown):
        assert found.persons[person(7)].secret.hex() not in text
        assert "\\x" not in text
