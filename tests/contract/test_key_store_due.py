"""What retention runs and offboarding ask of every key store: what is due, whose secrets there are, schedules."""

from processors.keyring import EpochRef, Needs
from schemas.fields import PLATFORM
from tests.support.keys import DAY, NOW, PII, epoch, person, persons

HOUR = EpochRef("transit", "acme", "2100-01-15T10")
NEXT = EpochRef("transit", "acme", "2100-01-15T11")
ALWAYS = EpochRef("suppression", PLATFORM, "-")


def test_an_epoch_is_due_from_its_deadline_on_until_its_keys_are_gone(deployment):
    store = deployment.open()
    store.fetch(Needs({HOUR: (NOW + 3600, 1), NEXT: (NOW + 7200, 1), ALWAYS: (None, 1)}, {}), NOW)
    other = deployment.open()
    assert other.due_epochs(NOW + 3599) == []
    assert other.due_epochs(NOW + 3600) == [(HOUR, NOW + 3600)]
    assert other.due_epochs(NOW + 99 * DAY) == [(HOUR, NOW + 3600), (NEXT, NOW + 7200)]
    store.destroy_epoch(HOUR)
    assert other.due_epochs(NOW + 99 * DAY) == [(NEXT, NOW + 7200)]
    for day in other.due_days(NOW + 9 * DAY):
        other.bury_day(day, NOW + 9 * DAY)
    assert other.due_epochs(NOW + 99 * DAY) == []


def test_an_epoch_that_dies_at_a_midnight_is_due_then_and_not_before(deployment):
    store, midnight = deployment.open(), NOW - NOW % DAY + DAY
    store.fetch(Needs({PII: (midnight, 1)}, {}), NOW)
    assert store.due_epochs(midnight - 1) == []
    assert store.due_epochs(midnight) == [(PII, midnight)]


def test_the_secrets_of_an_owner_are_all_found_and_may_be_destroyed_on_the_way(deployment):
    store = deployment.open()
    mine = [person(number, "acme", month) for number in range(300) for month in ("2100-01", "2100-02")]
    others = [person(number, owner) for number in range(300) for owner in (PLATFORM, "acme2")]
    store.fetch(epoch(PII), NOW)
    found = store.fetch(persons([*mine, *others]), NOW).persons
    wanted = {found[ref].sid for ref in mine}
    assert {sid for sids in store.sids_of("acme") for sid in sids} == wanted
    for sids in store.sids_of("acme"):
        deployment.open().destroy_sids(sids)
    assert list(store.sids_of("acme")) == list(store.sids_of("nobody")) == []
    assert sum(len(sids) for sids in store.sids_of("acme2")) == 300


def test_what_jobs_have_noted_is_listed_by_how_its_names_begin(deployment):
    ledger = deployment.open().ledger
    for name, value in (("offboard/a", 5), ("offboard/b_", 0), ("offboarded/a", 7), ("hold/1", 2)):
        ledger.set_progress(name, value)
    assert deployment.open().ledger.progresses("offboard/") == {"offboard/a": 5, "offboard/b_": 0}
    assert ledger.progresses("nothing") == {}
