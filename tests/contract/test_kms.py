"""What every key management service promises (`streams/keys/store.py: Kms`)."""

import base64
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from schemas.errors import KeysUnusable, KmsRefuses, Retriable
from streams.keys.kms_local import LocalKms
from streams.keys.kms_vault import VaultKms
from streams.keys.store import NEVER, Kms
from tests.support.vault import Server

DAY, NEXT = "2027-01-15", "2027-01-16"
KEY = bytes(range(32))


class Services(Protocol):
    """One service, as this suite needs it; a new implementation adds one of these."""

    def create(self, store_id: str) -> Kms:
        """Return the service for a new store."""

    def open(self, store_id: str) -> Kms:
        """Return it for an existing store, as another process would get it."""

    def close(self) -> None:
        """Close all."""


class _Opened:
    """Makes and opens by two functions, and closes what they returned."""

    def __init__(self, create: Callable[[str], Kms], reopen: Callable[[str], Kms]) -> None:
        self._create, self._open = create, reopen
        self._all: list[Kms] = []

    def create(self, store_id: str) -> Kms:
        self._all.append(self._create(store_id))
        return self._all[-1]

    def open(self, store_id: str) -> Kms:
        self._all.append(self._open(store_id))
        return self._all[-1]

    def close(self) -> None:
        for kms in self._all:
            kms.close()
            kms.close()


def _local(folder: Path, _: pytest.FixtureRequest) -> Services:
    return _Opened(lambda one: LocalKms.create(folder / "kms", one), lambda one: LocalKms.open(folder / "kms", one))


def _vault(folder: Path, request: pytest.FixtureRequest) -> Services:
    server: Server = request.getfixturevalue("vault")
    settings = server.settings(folder)
    return _Opened(lambda one: VaultKms.create(settings, one), lambda one: VaultKms.open(settings, one))


_SERVICES = {"local": _local, "vault": _vault}


@pytest.fixture(params=_SERVICES)
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    found = _SERVICES[request.param](tmp_path, request)
    yield found
    found.close()


@pytest.fixture
def store_id() -> str:
    return secrets.token_hex(16)


# --- wrapping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plaintext", [b"", KEY, bytes(4096)], ids=len)
def test_what_is_wrapped_opens_for_every_instance(services, store_id, plaintext):
    kms = services.create(store_id)
    wrapped = kms.wrap(DAY, plaintext)
    assert kms.unwrap(DAY, wrapped) == plaintext
    assert services.open(store_id).unwrap(DAY, wrapped) == plaintext


def test_the_same_is_never_wrapped_to_the_same(services, store_id):
    kms = services.create(store_id)
    assert len({kms.wrap(DAY, KEY) for _ in range(5)}) == 5


def test_what_is_wrapped_opens_under_no_other_day_generation_or_store(services, store_id):
    kms, stranger = services.create(store_id), services.create(secrets.token_hex(16))
    for one in (kms, stranger):
        for name in (DAY, f"{DAY}.2", NEXT, NEVER):
            one.wrap(name, KEY)
    wrapped = kms.wrap(DAY, KEY)
    for one, name in [(kms, f"{DAY}.2"), (kms, NEXT), (kms, NEVER), (stranger, DAY)]:
        with pytest.raises(KmsRefuses):
            one.unwrap(name, wrapped)


def test_what_is_changed_or_was_never_wrapped_does_not_open(services, store_id):
    kms = services.create(store_id)
    wrapped = kms.wrap(DAY, KEY)
    changed = bytearray(wrapped)
    changed[-8] = ord("A") if changed[-8] != ord("A") else ord("B")
    for wrong in (bytes(changed), wrapped[:-5], wrapped + b"x", b"", b"vault:v1:", bytes(60), b"\xff" * 89):
        with pytest.raises(KmsRefuses):
            kms.unwrap(DAY, wrong)


def test_a_key_that_was_never_made_opens_nothing_and_is_not_made_by_that(services, store_id):
    kms = services.create(store_id)
    wrapped = kms.wrap(DAY, KEY)
    with pytest.raises(KmsRefuses):
        kms.unwrap(NEXT, wrapped)
    assert kms.names() == [DAY]


@pytest.mark.parametrize(
    "name",
    ["", "never.1", "2027-1-15", "2027-01-15.1", "2027-01-15.02", "2027-01-15-2", "never-2", f"{DAY}.2/x", "../x"],
)
def test_a_name_that_is_none_is_a_mistake_of_the_caller(services, store_id, name):
    kms = services.create(store_id)
    for call in (lambda: kms.wrap(name, KEY), lambda: kms.unwrap(name, KEY), lambda: kms.destroy(name)):
        with pytest.raises(ValueError):
            call()
    assert kms.names() == []


def test_a_key_made_by_many_at_once_is_one_key(services, store_id):
    services.create(store_id)
    wrapped: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: wrapped.append(services.open(store_id).wrap(DAY, KEY))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [services.open(store_id).unwrap(DAY, one) for one in wrapped] == [KEY] * 4


# --- destruction --------------------------------------------------------------------------------------------


def test_what_is_destroyed_opens_for_nobody_and_is_never_made_again(services, store_id):
    kms, other = services.create(store_id), services.open(store_id)
    wrapped = kms.wrap(DAY, KEY)
    assert other.unwrap(DAY, wrapped) == KEY
    kms.destroy(DAY)
    for one in (kms, other, services.open(store_id)):
        with pytest.raises(KmsRefuses):
            one.unwrap(DAY, wrapped)
        with pytest.raises(KmsRefuses):
            one.wrap(DAY, KEY)
    assert kms.names() == []


def test_destroying_one_generation_leaves_the_next_and_all_other_days(services, store_id):
    kms = services.create(store_id)
    wrapped = {name: kms.wrap(name, KEY) for name in (DAY, f"{DAY}.2", f"{DAY}.10", NEXT, NEVER)}
    kms.destroy(DAY)
    assert kms.names() == [f"{DAY}.2", f"{DAY}.10", NEXT, NEVER]
    assert all(kms.unwrap(name, wrapped[name]) == KEY for name in kms.names())
    assert kms.unwrap(f"{DAY}.3", kms.wrap(f"{DAY}.3", KEY)) == KEY


def test_a_generation_before_one_that_was_destroyed_is_not_made_any_more(services, store_id):
    kms = services.create(store_id)
    kms.destroy(f"{DAY}.3")
    for name in (DAY, f"{DAY}.2", f"{DAY}.3"):
        with pytest.raises(KmsRefuses):
            kms.wrap(name, KEY)
    kms.wrap(f"{DAY}.4", KEY)
    assert kms.names() == [f"{DAY}.4"]


def test_the_service_tells_up_to_which_generation_a_day_was_destroyed(services, store_id):
    kms = services.create(store_id)
    for name in (DAY, f"{DAY}.2", f"{DAY}.3", NEVER, f"{NEVER}.2"):
        kms.wrap(name, KEY)
    kms.destroy(DAY)
    kms.destroy(f"{DAY}.2")
    kms.destroy(NEVER)
    kms.destroy(f"{NEXT}.10")  # before it was ever made
    found = [services.open(store_id).last_destroyed(day) for day in (DAY, NEXT, NEVER, "2027-01-17")]
    assert found == [2, 10, 1, 0]
    kms.destroy(DAY)
    assert kms.last_destroyed(DAY) == 2


def test_destroying_twice_and_what_never_was_is_the_same_as_once(services, store_id):
    kms = services.create(store_id)
    kms.wrap(NEXT, KEY)
    for _ in range(2):
        kms.destroy(DAY)
        kms.destroy(NEXT)
    for name in (DAY, NEXT):
        with pytest.raises(KmsRefuses):
            kms.wrap(name, KEY)
    assert kms.names() == []


def test_names_are_those_of_this_store_by_day_and_generation(services, store_id):
    kms, stranger = services.create(store_id), services.create(secrets.token_hex(16))
    assert kms.names() == []
    for name in (NEVER, f"{NEXT}.2", f"{DAY}.10", f"{DAY}.9", DAY, f"{NEVER}.2"):
        kms.wrap(name, KEY)
    stranger.wrap("2026-01-01", KEY)
    assert kms.names() == [DAY, f"{DAY}.9", f"{DAY}.10", f"{NEXT}.2", NEVER, f"{NEVER}.2"]
    assert stranger.names() == ["2026-01-01"]


# --- counter and root ---------------------------------------------------------------------------------------


def test_the_counter_only_ever_grows_for_every_instance_and_store_of_its_own(services, store_id):
    kms, stranger = services.create(store_id), services.create(secrets.token_hex(16))
    assert kms.counter() == 0
    for value, counter in [(5, 5), (3, 5), (0, 5), (6, 6), (6, 6)]:
        kms.raise_counter(value)
        assert (kms.counter(), services.open(store_id).counter(), stranger.counter()) == (counter, counter, 0)


def test_a_destruction_leaves_the_counter_and_the_counter_leaves_destructions(services, store_id):
    kms = services.create(store_id)
    kms.raise_counter(7)
    kms.destroy(DAY)
    kms.raise_counter(8)
    assert services.open(store_id).counter() == 8
    with pytest.raises(KmsRefuses):
        services.open(store_id).wrap(DAY, KEY)


def test_the_highest_of_counters_raised_at_once_stays(services, store_id):
    services.create(store_id)
    opened = [services.open(store_id) for _ in range(4)]

    def climb(kms: Kms, first: int) -> None:
        for value in range(first, 40, 4):
            kms.raise_counter(value)
            kms.destroy(f"2027-02-{value % 28 + 1:02}")

    threads = [threading.Thread(target=climb, args=(kms, first)) for first, kms in enumerate(opened)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert services.open(store_id).counter() == 39
    for day in range(1, 29):
        with pytest.raises(KmsRefuses):
            services.open(store_id).wrap(f"2027-02-{day:02}", KEY)


def test_a_store_is_known_by_its_own_service_only(services, store_id):
    kms, stranger = services.create(store_id), services.create(secrets.token_hex(16))
    again = services.open(store_id)
    assert again.trusts(kms.check)
    assert again.check == kms.check
    assert not kms.trusts(stranger.check)
    assert not kms.trusts(b"")


def test_a_service_that_does_not_know_the_store_is_not_opened(services, store_id):
    services.create(secrets.token_hex(16))
    with pytest.raises(KeysUnusable):
        services.open(store_id)


def test_a_store_is_made_once(services, store_id):
    kms = services.create(store_id)
    wrapped = kms.wrap(DAY, KEY)
    kms.raise_counter(3)
    with pytest.raises(KeysUnusable):
        services.create(store_id)
    assert (services.open(store_id).counter(), kms.unwrap(DAY, wrapped)) == (3, KEY)


# --- what it says -------------------------------------------------------------------------------------------


def test_calls_count_what_was_asked_of_the_service(services, store_id):
    kms = services.create(store_id)
    wrapped = kms.wrap(DAY, KEY)
    before = kms.calls
    for _ in range(3):
        kms.unwrap(DAY, wrapped)
    assert kms.calls == before + 3


def test_neither_repr_nor_error_shows_a_key_or_what_it_wrapped(services, store_id):
    kms = services.create(store_id)
    wrapped = kms.wrap(DAY, b"PLAINTEXT-CANARY")
    said = [repr(kms)]
    for call in (
        lambda: kms.unwrap(NEXT, wrapped),
        lambda: kms.unwrap(DAY, wrapped[:-5]),
        lambda: kms.unwrap(DAY, KEY),
    ):
        with pytest.raises(Retriable) as caught:
            call()
        said.append(f"{caught.value} {caught.value!r} {caught.value.where}")
    kms.destroy(DAY)
    with pytest.raises(Retriable) as caught:
        kms.wrap(DAY, b"PLAINTEXT-CANARY")
    said.append(f"{caught.value} {caught.value!r}")
    needles = ["CANARY", base64.b64encode(b"PLAINTEXT-CANARY").decode()[:16], wrapped[-20:-6].decode("latin1")]
    needles += [KEY.hex(), wrapped.hex(), repr(wrapped)[2:-1]]
    assert not [needle for needle in needles if needle in " ".join(said)]
