"""`VaultKms` on a real server: what the policy allows, what an outage does, and that it passes without a restart."""

import http.server
import json
import random
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pybreaker
import pytest

from deploy.kafka.broker import Authority
from processors.keyring import EpochRef, Needs, PersonRef
from schemas.errors import KeysUnusable, KmsRefuses, KmsUnavailable
from schemas.fields import PLATFORM
from streams.config import Vault, _VaultTable, load
from streams.keys import kms_vault
from streams.keys.kms_vault import ATTEMPTS, BREAK_AFTER, TOMBSTONES, VaultKms, _SteadyStorage
from streams.keys.sqlite import SqliteKeyStore
from tests.support.commands import Place, ago, eventually, one_line
from tests.support.prometheus import free_port
from tests.support.proxy import Proxy
from tests.support.records import sms_cdr
from tests.support.vault import write_secret

DAY, NEXT = "2027-01-15", "2027-01-16"
KEY = bytes(range(32))
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0


@pytest.fixture
def store_id():
    return secrets.token_hex(16)


@pytest.fixture
def opened():
    """Close what is put into this list."""
    all_of_them = []
    yield all_of_them
    for kms in all_of_them:
        kms.close()


@pytest.fixture
def kms(vault, tmp_path, store_id, opened):
    opened.append(VaultKms.create(vault.settings(tmp_path), store_id))
    return opened[-1]


@pytest.fixture
def impatient(monkeypatch):
    """Let refusals and breaks be over soon."""
    monkeypatch.setattr(kms_vault, "REFUSED_S", 0.05)
    monkeypatch.setattr(kms_vault, "RELOGIN_S", 0.05)
    monkeypatch.setattr(kms_vault, "BREAK_S", 0.2)


def transit(store_id, name=DAY):
    return f"transit/keys/streamveil-{store_id}-{name}"


def soon(call):
    """Return what a call returns as soon as it is neither unavailable nor refused, as a worker waits for it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except (KmsUnavailable, KmsRefuses):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def unavailable(call):
    """Return why a call is unavailable."""
    with pytest.raises(KmsUnavailable) as caught:
        call()
    return caught.value.where.get("cause")


# --- the policy that ships ----------------------------------------------------------------------------------


def test_the_policy_lets_nobody_make_a_key_by_encrypting_or_take_one_out(vault, kms, store_id):
    kms.wrap(DAY, KEY)
    ours = {"X-Vault-Token": kms._login.token}
    plain = {"plaintext": "AAAA"}
    forbidden = [
        ("POST", f"transit/encrypt/streamveil-{store_id}-{NEXT}", plain),
        ("POST", transit(store_id, NEXT), {"exportable": True}),
        ("POST", transit(store_id, NEXT), {"allow_plaintext_backup": True}),
        ("POST", f"{transit(store_id)}/config", {"exportable": True}),
        ("POST", f"{transit(store_id)}/config", {"allow_plaintext_backup": True}),
        ("GET", f"transit/export/encryption-key/streamveil-{store_id}-{DAY}", None),
        ("GET", f"transit/backup/streamveil-{store_id}-{DAY}", None),
        ("POST", "transit/encrypt/of-others", plain),
        ("POST", "transit/keys/of-others", {}),
        ("DELETE", f"secret/data/streamveil-{store_id}", None),
        ("DELETE", f"secret/metadata/streamveil-{store_id}", None),
        ("GET", "secret/data/of-others", None),
        ("GET", "sys/mounts", None),
        ("POST", "auth/token/create", {}),
    ]
    found = [vault.admin.request(method, f"/v1/{path}", json=body, headers=ours) for method, path, body in forbidden]
    assert [answer.status_code for answer in found] == [403] * len(forbidden)
    assert kms.names() == [DAY]


def test_a_key_is_of_the_server_alone(vault, kms, store_id):
    kms.wrap(DAY, KEY)
    key = vault.ask("GET", transit(store_id))["data"]
    traits = ("type", "exportable", "derived", "allow_plaintext_backup", "deletion_allowed", "supports_encryption")
    assert [key[trait] for trait in traits] == ["aes256-gcm96", False, False, False, False, True]


def test_what_is_wrapped_is_bound_to_its_store_and_name_beyond_the_key_itself(vault, kms, store_id):
    text = kms.wrap(DAY, KEY).decode()
    for bound, status in ((kms._bound(DAY), 200), (kms._bound(NEXT), 400), (None, 400)):
        body = {"ciphertext": text} | ({"associated_data": bound} if bound else {})
        path = f"/v1/transit/decrypt/streamveil-{store_id}-{DAY}"
        assert vault.admin.post(path, json=body).status_code == status


@pytest.mark.parametrize(
    "trait", [{"exportable": True}, {"allow_plaintext_backup": True}, {"type": "chacha20-poly1305"}]
)
def test_a_key_that_another_made_is_not_used(vault, kms, store_id, trait):
    vault.ask("POST", transit(store_id), trait)
    with pytest.raises(KmsRefuses, match="not as Streamveil makes them"):
        kms.wrap(DAY, KEY)


def test_what_is_destroyed_is_gone_from_the_server_and_not_made_again_by_a_permissive_token(
    vault, kms, store_id, tmp_path, opened
):
    wrapped = kms.wrap(DAY, KEY)
    kms.destroy(DAY)
    assert vault.ask("GET", transit(store_id)) == {"errors": []}
    root = write_secret(tmp_path / "root", vault.admin.headers["X-Vault-Token"])
    settings = vault.settings(tmp_path, token_path=root, role_id=None, secret_id_path=None)
    opened.append(VaultKms.open(settings, store_id))
    for call in (lambda: opened[-1].wrap(DAY, KEY), lambda: opened[-1].unwrap(DAY, wrapped)):
        with pytest.raises(KmsRefuses):
            call()
    assert vault.ask("GET", transit(store_id)) == {"errors": []}


def test_a_destruction_that_stopped_half_way_is_finished_by_calling_again(kms, monkeypatch):
    wrapped = kms.wrap(DAY, KEY)

    def killed(*_):
        raise KmsUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(kms, "_delete", killed)
        with pytest.raises(KmsUnavailable):
            kms.destroy(DAY)
    with pytest.raises(KmsRefuses, match="destroyed"):
        kms.wrap(DAY, KEY)
    assert kms.unwrap(DAY, wrapped) == KEY
    kms.destroy(DAY)
    assert kms.names() == []


def test_a_key_made_while_it_was_destroyed_is_deleted_again(vault, kms, store_id, tmp_path, opened, monkeypatch):
    other = VaultKms.open(vault.settings(tmp_path), store_id)
    opened.append(other)
    ask = kms._ask

    def destroyed_meanwhile(method, path, body=None):
        if method == "POST" and path == transit(store_id):
            other.destroy(DAY)
        return ask(method, path, body)

    monkeypatch.setattr(kms, "_ask", destroyed_meanwhile)
    with pytest.raises(KmsRefuses, match="destroyed"):
        kms.wrap(DAY, KEY)
    assert kms.names() == []


def test_a_server_that_deletes_nothing_is_not_believed(kms, monkeypatch):
    kms.wrap(DAY, KEY)
    ask = kms._ask

    def idle(method, path, body=None):
        return kms_vault._Answer(204, {}) if method == "DELETE" else ask(method, path, body)

    monkeypatch.setattr(kms, "_ask", idle)
    with pytest.raises(KmsRefuses, match="still there"):
        kms.destroy(DAY)
    monkeypatch.undo()
    kms.destroy(DAY)
    assert kms.names() == []


@pytest.mark.usefixtures("impatient")
def test_keys_deleted_behind_our_back_are_refused_and_open_when_they_are_restored(vault, kms, store_id, tmp_path):
    wrapped = kms.wrap(DAY, KEY)
    vault.kill()
    backup = shutil.copytree(vault.folder / "storage", tmp_path / "backup")
    vault.heal()
    vault.ask("POST", f"{transit(store_id)}/config", {"deletion_allowed": True})
    vault.ask("DELETE", transit(store_id))
    soon(kms.names)
    with pytest.raises(KmsRefuses):
        kms.unwrap(DAY, wrapped)
    vault.kill()
    shutil.rmtree(vault.folder / "storage")
    shutil.copytree(backup, vault.folder / "storage")
    vault.heal()
    assert soon(lambda: kms.unwrap(DAY, wrapped)) == KEY


def test_days_long_over_are_remembered_as_one_date(vault, tmp_path, store_id, opened):
    today = datetime(2027, 6, 15, tzinfo=UTC)
    kms = VaultKms.create(vault.settings(tmp_path), store_id, today.timestamp)
    opened.append(kms)
    days = [(today + timedelta(days=ahead)).date().isoformat() for ahead in range(-TOMBSTONES, 4)]
    kms.wrap(days[-1], KEY)
    kms.wrap(f"{days[20]}.2", KEY)
    for day in days[:-1]:
        kms.destroy(day)
    entry = vault.ask("GET", f"secret/data/streamveil-{store_id}")["data"]["data"]
    assert entry["through"] == days[19]
    assert set(entry["destroyed"]) == set(days[20:-1])
    for day in ("2020-01-01", *days[:-1], f"{days[0]}.9"):
        with pytest.raises(KmsRefuses, match="destroyed"):
            kms.wrap(day, KEY)
    for name in (days[-1], f"{days[20]}.3", "2027-12-31"):
        assert kms.unwrap(name, kms.wrap(name, KEY)) == KEY


# --- who we are ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_a_token_that_ended_stops_everything_and_a_new_one_in_its_file_is_enough(vault, tmp_path, store_id, opened):
    kms = VaultKms.create(vault.by_token(tmp_path), store_id)
    opened.append(kms)
    wrapped = kms.wrap(DAY, KEY)
    vault.ask("POST", "auth/token/revoke", {"token": (tmp_path / "token").read_text()})
    for call in (lambda: kms.unwrap(DAY, wrapped), lambda: kms.wrap(NEXT, KEY), kms.names, kms.counter):
        with pytest.raises(KmsRefuses, match="check token and policy"):
            call()
    write_secret(tmp_path / "token", vault.token())
    assert soon(lambda: kms.unwrap(DAY, wrapped)) == KEY
    assert kms.names() == [DAY]


def test_a_login_is_renewed_before_it_ends_and_made_anew_when_it_cannot_last(vault, kms):
    vault.ask("POST", "auth/approle/role/streamveil", {"token_ttl": "3s", "token_max_ttl": "5s"})
    try:
        kms._login = None
        kms.counter()
        first = kms._login
        assert 1.5 < first.renew_at - first.at < 2.5
        kms._login = first._replace(renew_at=time.monotonic())  # earlier than need be: nothing has ended by then
        kms.counter()
        assert (kms._login.token, kms._login.at > first.at) == (first.token, True)
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:  # never refused, over the end of the first and of the longest life
            kms.counter()
            time.sleep(0.05)
        assert kms._login.token != first.token
    finally:
        vault.ask("POST", "auth/approle/role/streamveil", {"token_ttl": "1h", "token_max_ttl": 0})


@pytest.mark.usefixtures("impatient")
def test_a_login_that_was_revoked_is_made_anew(vault, kms):
    wrapped = kms.wrap(DAY, KEY)
    vault.ask("POST", "auth/token/revoke", {"token": kms._login.token})
    time.sleep(0.1)
    assert kms.unwrap(DAY, wrapped) == KEY


@pytest.mark.usefixtures("impatient")
def test_a_login_that_is_refused_is_not_repeated_at_once_and_a_good_one_is_enough(
    vault, tmp_path, store_id, opened, monkeypatch
):
    settings = vault.settings(tmp_path)
    opened.append(VaultKms.create(settings, store_id))
    write_secret(settings.secret_id_path, "00000000-0000-0000-0000-000000000000")
    kms = VaultKms(settings, store_id)
    opened.append(kms)
    monkeypatch.setattr(kms_vault, "REFUSED_S", 60)
    for _ in range(5):
        with pytest.raises(KmsRefuses, match="refuses the login"):
            kms.counter()
    assert kms.calls == 1
    monkeypatch.setattr(kms_vault, "REFUSED_S", 0.05)
    write_secret(settings.secret_id_path, vault.made.secret_id)
    assert soon(kms.counter) == 0


def test_a_login_of_our_own_ends_with_us(vault, kms):
    token = kms._login.token
    lookup = lambda: vault.admin.post("/v1/auth/token/lookup", json={"token": token}).status_code  # noqa: E731
    assert lookup() == 200
    kms.close()
    assert lookup() in (403, 404)


def test_a_secret_in_a_file_that_others_may_read_or_that_is_none_is_refused_until_it_is_right(
    vault, tmp_path, store_id, opened
):
    kms = VaultKms.create(vault.by_token(tmp_path), store_id)
    opened.append(kms)
    path = tmp_path / "token"
    good = path.read_text()
    path.chmod(0o640)
    with pytest.raises(KmsRefuses, match="chmod 600"):
        kms.counter()
    path.unlink()
    with pytest.raises(KmsRefuses, match="missing"):
        kms.counter()
    path.symlink_to(write_secret(tmp_path / "elsewhere", good))
    with pytest.raises(KmsRefuses):
        kms.counter()
    for text in ("", "two words", "ü", "line\nline"):
        write_secret(path, text)
        with pytest.raises(KmsRefuses) as caught:
            kms.counter()
        assert not text or text not in str(caught.value)
    write_secret(path, f"{good}\n")
    assert kms.counter() == 0


def test_a_wrong_policy_is_refused_asked_for_once_and_passes_when_it_is_right(
    vault, tmp_path, store_id, opened, monkeypatch
):
    opened.append(VaultKms.create(vault.settings(tmp_path), store_id))
    wrapped = opened[0].wrap(DAY, KEY)
    vault.ask("PUT", "sys/policies/acl/narrow", {"policy": 'path "secret/data/*" { capabilities = ["read"] }'})
    path = write_secret(tmp_path / "narrow", vault.token("narrow"))
    kms = VaultKms.open(vault.settings(tmp_path, token_path=path, role_id=None, secret_id_path=None), store_id)
    opened.append(kms)
    monkeypatch.setattr(kms_vault, "REFUSED_S", 60)
    before = kms.calls
    for _ in range(10):
        with pytest.raises(KmsRefuses, match="forbids to unwrap"):
            kms.unwrap(DAY, wrapped)
    assert kms.calls == before + 1
    for call in (lambda: kms.wrap(NEXT, KEY), lambda: kms.destroy(DAY), kms.names, lambda: kms.raise_counter(1)):
        with pytest.raises(KmsRefuses, match="forbids"):
            call()
    kms._refusals.clear()
    ours = vault.ask("GET", "sys/policies/acl/streamveil")["data"]["policy"]
    vault.ask("PUT", "sys/policies/acl/narrow", {"policy": ours})
    assert soon(lambda: kms.unwrap(DAY, wrapped)) == KEY


# --- the wrong place ----------------------------------------------------------------------------------------


def test_a_store_is_not_opened_beside_another_transit_engine(vault, kms, store_id, tmp_path, opened):
    opened.append(VaultKms.open(vault.settings(tmp_path, mount="transit-of-others"), store_id))
    assert not opened[-1].trusts(kms.check)


def test_an_engine_that_is_missing_or_of_the_wrong_version_is_refused_at_the_beginning(vault, tmp_path, store_id):
    root = write_secret(tmp_path / "root", vault.admin.headers["X-Vault-Token"])
    settings = vault.settings(tmp_path, token_path=root, role_id=None, secret_id_path=None)
    if "kv1/" not in vault.ask("GET", "sys/mounts")["data"]:
        vault.ask("POST", "sys/mounts/kv1", {"type": "kv", "options": {"version": "1"}})
    with pytest.raises(KeysUnusable, match="version 2"):
        VaultKms.create(settings._replace(counter_mount="kv1"), store_id)
    for wrong in ({"mount": "nowhere"}, {"counter_mount": "nowhere"}):
        with pytest.raises(KmsRefuses):
            VaultKms.create(settings._replace(**wrong), store_id)
    assert vault.ask("LIST", "secret/metadata").get("data", {}).get("keys", []).count(f"streamveil-{store_id}") == 0


def test_an_entry_that_was_deleted_stops_what_needs_it_until_it_is_undeleted(vault, kms, store_id, tmp_path):
    kms.raise_counter(4)
    vault.ask("DELETE", f"secret/data/streamveil-{store_id}")
    for call in (kms.counter, lambda: kms.raise_counter(5), lambda: kms.wrap(DAY, KEY), lambda: kms.destroy(DAY)):
        with pytest.raises(KmsRefuses, match="entry of this store is gone"):
            call()
    for again in (VaultKms.open, VaultKms.create):
        with pytest.raises(KeysUnusable):
            again(vault.settings(tmp_path), store_id)
    vault.ask("POST", f"secret/undelete/streamveil-{store_id}", {"versions": [2]})
    assert kms.counter() == 4


def test_an_entry_that_somebody_changed_is_not_believed(vault, kms, store_id):
    place = f"secret/data/streamveil-{store_id}"
    good = vault.ask("GET", place)["data"]["data"]
    for wrong in ({}, good | {"format": 2}, good | {"counter": "0"}, good | {"more": 1}, good | {"destroyed": [DAY]}):
        vault.ask("POST", place, {"data": wrong})
        with pytest.raises(KmsRefuses, match="not as it was written"):
            kms.counter()
    vault.ask("POST", place, {"data": good})
    assert kms.counter() == 0


def test_the_root_is_rotated_at_the_server_and_nothing_stops(vault, kms):
    wrapped = kms.wrap(DAY, KEY)
    with pytest.raises(KeysUnusable, match="operator rotate"):
        kms.rotate_root()
    vault.ask("POST", "sys/rotate")
    assert kms.unwrap(DAY, wrapped) == KEY
    assert kms.unwrap(NEXT, kms.wrap(NEXT, KEY)) == KEY


# --- outages ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_a_sealed_server_is_waited_for(vault, kms):
    wrapped = kms.wrap(DAY, KEY)
    vault.seal()
    assert unavailable(lambda: kms.unwrap(DAY, wrapped)) == "sealed"
    assert unavailable(lambda: kms.wrap(NEXT, KEY)) == "sealed"
    vault.unseal()
    assert soon(lambda: kms.unwrap(DAY, wrapped)) == KEY


@pytest.mark.usefixtures("impatient")
def test_a_server_that_was_killed_is_waited_for_and_one_that_starts_sealed_too(vault, kms, tmp_path, store_id):
    wrapped = kms.wrap(DAY, KEY)
    vault.kill()
    assert unavailable(lambda: kms.unwrap(DAY, wrapped)) == "connect"
    assert unavailable(lambda: VaultKms.open(vault.settings(tmp_path), store_id)) == "connect"
    vault.start()
    eventually(lambda: unavailable(kms.counter) == "sealed", "the next answer after a break")
    vault.unseal()
    assert soon(lambda: kms.unwrap(DAY, wrapped)) == KEY


def test_a_server_that_hangs_costs_the_time_out_and_then_nothing_until_it_is_asked_again(
    vault, kms, tmp_path, store_id, opened
):
    patient = VaultKms.open(vault.settings(tmp_path, timeout_s=0.4), store_id)
    opened.append(patient)
    wrapped = kms.wrap(DAY, KEY)
    vault.stop()
    causes, took_s = [], []
    for _ in range(BREAK_AFTER + 1):
        started = time.monotonic()
        causes.append(unavailable(lambda: patient.unwrap(DAY, wrapped)))
        took_s += [time.monotonic() - started] * (causes[-1] != "not_asked")
    assert min(took_s) < 0.6  # the machine may be busy at one time or another
    assert causes[-1] == "not_asked" != causes[0]
    assert set(causes) <= {"timeout", "connect", "not_asked"}
    calls, started = patient.calls, time.monotonic()
    for _ in range(100):
        assert unavailable(lambda: patient.unwrap(DAY, wrapped)) == "not_asked"
    assert (patient.calls, time.monotonic() - started < 100 * 0.04) == (calls, True)
    vault.go_on()
    assert soon(lambda: patient.unwrap(DAY, wrapped)) == KEY


def test_after_a_break_one_request_finds_out_and_a_failure_breaks_again(vault, tmp_path, store_id, opened):
    kms = VaultKms.create(vault.settings(tmp_path, timeout_s=0.3), store_id)
    opened.append(kms)
    vault.stop()
    causes = [unavailable(kms.counter) for _ in range(BREAK_AFTER + 1)]
    assert causes[-1] == "not_asked"
    calls = kms.calls
    kms._breaker._state_storage._at -= kms_vault.BREAK_S  # it is over
    assert unavailable(kms.counter) == "connect"
    assert unavailable(kms.counter) == "not_asked"
    assert kms.calls == calls + 1


def test_a_clock_that_is_set_back_keeps_no_break_open():
    storage = _SteadyStorage(pybreaker.STATE_OPEN)
    assert storage.opened_at is None
    begun = datetime.now(UTC)
    storage.opened_at = begun + timedelta(days=1)
    a_moment = timedelta(seconds=1)
    assert begun - a_moment < storage.opened_at < datetime.now(UTC) + a_moment


@contextmanager
def proxied(vault, tmp_path, store_id, **changes):
    """Yield a client behind a proxy, and the proxy."""
    port = free_port()
    with Proxy(port, vault.port, random.Random(1)) as proxy:
        kms = VaultKms.create(vault.settings(tmp_path, address=f"https://127.0.0.1:{port}", **changes), store_id)
        try:
            yield kms, proxy
        finally:
            proxy.heal()
            kms.close()


@pytest.mark.usefixtures("impatient")
def test_a_slow_network_is_borne_up_to_the_time_out(vault, tmp_path, store_id):
    with proxied(vault, tmp_path, store_id, timeout_s=2.0) as (kms, proxy):
        wrapped = kms.wrap(DAY, KEY)
        proxy.slow(0.1)
        assert kms.unwrap(DAY, wrapped) == KEY
        proxy.slow(1.2)
        started = time.monotonic()
        assert unavailable(lambda: kms.wrap(NEXT, KEY)) in ("timeout", "connect")
        assert time.monotonic() - started < 2 * 2.0
        proxy.heal()
        assert soon(lambda: kms.unwrap(DAY, wrapped)) == KEY


def test_a_torn_connection_is_made_again_within_the_same_operation(vault, tmp_path, store_id):
    with proxied(vault, tmp_path, store_id) as (kms, proxy):
        wrapped = kms.wrap(DAY, KEY)
        for _ in range(5):
            assert proxy.tear() == 1
            assert kms.unwrap(DAY, wrapped) == KEY


@pytest.mark.usefixtures("impatient")
def test_a_connection_on_which_nothing_comes_any_more_costs_one_operation_nothing_but_time(vault, tmp_path, store_id):
    with proxied(vault, tmp_path, store_id) as (kms, proxy):
        wrapped = kms.wrap(DAY, KEY)
        proxy.stall({link.port for link in proxy._links})
        assert kms.unwrap(DAY, wrapped) == KEY


def test_what_was_written_without_an_answer_is_not_written_twice(vault, tmp_path, store_id):
    with proxied(vault, tmp_path, store_id) as (kms, _):
        understood, lost = kms._understood, []

        def loses_the_first_answer_to_a_write(response, content):
            if response.request.method == "POST" and "/secret/data/" in str(response.url) and not lost:
                lost.append(response)
                raise kms._unavailable("broken")
            return understood(response, content)

        kms._understood = loses_the_first_answer_to_a_write
        kms.raise_counter(9)
        assert len(lost) == 1
        assert kms.counter() == 9
        assert vault.ask("GET", f"secret/data/streamveil-{store_id}")["data"]["metadata"]["version"] == 2
        lost.clear()
        other = VaultKms(kms._settings, secrets.token_hex(16))
        other._understood = loses_the_first_answer_to_a_write
        with other._opening():
            other._found()
        other.close()
        assert (len(lost), len(other.check)) == (1, 16)


def test_a_server_that_throttles_is_left_alone_as_long_as_it_asks_for(vault, kms):
    wrapped = kms.wrap(DAY, KEY)
    vault.ask("POST", "sys/quotas/rate-limit/narrow", {"path": "transit", "rate": 1, "interval": "2s"})
    try:
        assert kms.unwrap(DAY, wrapped) == KEY
        assert unavailable(lambda: kms.unwrap(DAY, wrapped)) == "throttled"
        calls = kms.calls
        assert unavailable(lambda: kms.unwrap(DAY, wrapped)) == "throttled"
        assert kms.calls == calls
        assert soon(lambda: kms.unwrap(DAY, wrapped)) == KEY
    finally:
        vault.ask("DELETE", "sys/quotas/rate-limit/narrow")


# --- somebody else answers ----------------------------------------------------------------------------------


class Told(NamedTuple):
    method: str
    path: str
    headers: dict
    body: bytes


@contextmanager
def somebody(*answers):
    """Yield an address where each request gets the next answer (status, headers, body), and what was asked there."""
    told, left = [], list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            told.append(Told(self.command, self.path, dict(self.headers), body))
            status, headers, content = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_LIST = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", told
        finally:
            server.shutdown()
            thread.join()


def client_of(address, tmp_path, **changes):
    path = write_secret(tmp_path / "token", "TOKEN-CANARY")
    base = Vault(address, "transit", "secret", "streamveil-", None, path, None, None, None, 2.0)
    return VaultKms(base._replace(**changes), "0" * 32)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ((200, {}, b"<html>welcome</html>"), "answer"),
        ((404, {}, b"<html>not found</html>"), "answer"),
        ((403, {}, b""), "answer"),
        ((200, {}, b"[]"), "answer"),
        ((200, {}, b'{"data": {"plaintext": 5}}'), "answer"),
        ((200, {}, b'{"data": {"plaintext": "not base 64!"}}'), "answer"),
        ((200, {}, b'{"data": null}'), "answer"),
        ((200, {}, b'{"data": {"plaintext": "AAAA"}}' + b" " * kms_vault.ANSWER_BYTES), "answer"),
        ((200, {"content-encoding": "gzip"}, b"not gzip"), "broken"),
        ((302, {"location": "http://127.0.0.1:9/"}, b""), "redirect"),
        ((307, {"location": "http://127.0.0.1:9/"}, b""), "redirect"),
        ((429, {}, b"{}"), "throttled"),
        ((500, {}, b"{}"), "failing"),
        ((502, {}, b"<html>"), "failing"),
        ((503, {}, b'{"errors": ["Vault is sealed"]}'), "sealed"),
        ((473, {}, b""), "failing"),
        ((412, {}, b""), "failing"),
    ],
)
def test_what_is_not_the_servers_own_answer_is_none(tmp_path, answer, cause):
    with somebody(answer) as (address, told):
        kms = client_of(address, tmp_path)
        with pytest.raises(KmsUnavailable) as caught:
            kms.unwrap(DAY, b"vault:v1:Q0FOQVJZ")
        assert caught.value.where["cause"] == cause
        assert len(told) == (ATTEMPTS if cause in ("failing", "broken") else 1)
        assert not any(canary in f"{caught.value!r} {caught.value}" for canary in ("CANARY", "Q0FOQVJZ"))
        kms.close()


@pytest.mark.parametrize("body", [b'{"errors": []}', b'{"errors": ["no handler for route"]}'])
def test_only_the_servers_own_nothing_means_that_there_is_no_key(tmp_path, body):
    with somebody((404, {}, body)) as (address, _):
        kms = client_of(address, tmp_path)
        if body == b'{"errors": []}':
            assert kms.names() == []
        else:
            with pytest.raises(KmsRefuses):
                kms.names()
        kms.close()


def test_a_server_that_wraps_what_does_not_open_is_not_believed(tmp_path):
    def said(data):
        return (200, {}, json.dumps({"data": data}).encode())

    entry = {"format": 1, "check": "", "counter": 0, "destroyed": {}, "through": ""}
    made = {"type": "aes256-gcm96", "exportable": False, "derived": False, "allow_plaintext_backup": False}
    answers = [
        said({"data": entry, "metadata": {"version": 1}}),
        said(made),
        said({"ciphertext": "vault:v1:AAAA"}),
        said({"plaintext": "AAAA"}),
    ]
    with somebody(*answers) as (address, told):
        kms = client_of(address, tmp_path)
        assert unavailable(lambda: kms.wrap(DAY, KEY)) == "answer"
        assert [one.method for one in told] == ["GET", "GET", "POST", "POST"]
        kms.close()


def test_every_request_says_who_asks_and_in_which_namespace_and_nothing_stands_in_the_url(tmp_path):
    with somebody((404, {}, b'{"errors": []}')) as (address, told):
        kms = client_of(address, tmp_path, namespace="team/a")
        assert kms.names() == []
        with pytest.raises(KmsRefuses):
            kms.unwrap(DAY, b"vault:v1:Q0FOQVJZ")
        kms.close()
    for one in told:
        assert one.headers["X-Vault-Namespace"] == "team/a"
        assert one.headers["X-Vault-Token"] == "TOKEN-CANARY"
        assert one.headers["X-Vault-Request"] == "true"
        assert not any(part in one.path for part in ("?", "CANARY", "Q0FOQVJZ"))


def test_a_login_that_may_have_arrived_is_not_sent_twice(tmp_path):
    with somebody((500, {}, b"{}")) as (address, told):
        secret = write_secret(tmp_path / "secret-id", "SECRET-CANARY")
        kms = client_of(address, tmp_path, token_path=None, role_id="role", secret_id_path=secret)
        assert unavailable(kms.counter) == "failing"
        assert [one.path for one in told] == ["/v1/auth/approle/login"]
        kms.close()


def test_no_proxy_of_the_environment_sees_the_token(tmp_path, monkeypatch):
    with somebody((200, {}, b"{}")) as (proxy, seen), somebody((404, {}, b'{"errors": []}')) as (address, told):
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        kms = client_of(address, tmp_path)
        assert kms.names() == []
        kms.close()
        assert (len(seen), len(told)) == (0, 1)


# --- TLS ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_a_server_of_another_authority_gets_no_token_and_the_right_authority_is_enough(
    vault, tmp_path, store_id, opened
):
    (tmp_path / "stranger").mkdir()
    stranger = Authority(tmp_path / "stranger")
    ca_path = write_secret(tmp_path / "ca.pem", stranger.path.read_text())
    opened.append(VaultKms.create(vault.settings(tmp_path), store_id))
    wrong = VaultKms(vault.settings(tmp_path, ca_path=ca_path), store_id)
    opened.append(wrong)
    assert unavailable(wrong.counter) == "tls"
    write_secret(ca_path, vault.ca_path.read_text())
    assert soon(wrong.counter) == 0
    ca_path.unlink()
    wrong._disconnect()
    with pytest.raises(KmsUnavailable, match="certificate authority"):
        wrong.counter()


def test_a_server_that_speaks_old_tls_only_gets_no_token(vault, tmp_path, store_id):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(vault.folder / "server.pem")
    heard = []
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection, pytest.raises(ssl.SSLError):
                heard.append(context.wrap_socket(connection, server_side=True))

        thread = threading.Thread(target=serve)
        thread.start()
        kms = VaultKms(vault.settings(tmp_path, address=f"https://127.0.0.1:{server.getsockname()[1]}"), store_id)
        assert unavailable(kms.counter) == "tls"
        thread.join()
        kms.close()
    assert heard == []


# --- with a key store ---------------------------------------------------------------------------------------


def needs(now_s, batch, days):
    epochs = {EpochRef("content", f"a{day}", "x"): (now_s + day * 86_400, 1000) for day in range(1, days + 1)}
    people = {PersonRef(PLATFORM, (batch * 500 + n).to_bytes(16, "big"), "2027-01"): now_s + 86_400 for n in range(500)}
    return Needs(epochs, people)


def test_calls_depend_on_the_days_alive_and_not_on_the_traffic(vault, tmp_path, opened):
    now_s, days = int(time.time()), 30
    settings = vault.settings(tmp_path)

    def maker(store_id, create):
        return (VaultKms.create if create else VaultKms.open)(settings, store_id)

    path = tmp_path / "keys" / "keys.db"
    store = SqliteKeyStore.open(path, maker, create=True)
    opened.append(store)
    store.fetch(needs(now_s, 0, days), now_s)
    made = store.kms.calls
    for batch in range(1, 21):
        store.fetch(needs(now_s, batch, days), now_s)
    assert store.kms.calls == made  # 10,000 more people: not one
    assert made <= 10 + 8 * (days + 2)
    again = SqliteKeyStore.open(path, maker)
    opened.append(again)
    for batch in range(5):
        assert len(again.fetch(needs(now_s, batch, days), now_s).epochs) == days
    assert again.kms.calls <= 6 + days + 2
    assert store.kms.names() == again.kms.names()
    assert len(store.kms.names()) <= days + 2


@pytest.fixture
def place(vault, tmp_path):
    made = Place(tmp_path, lease_s=4.0)
    with made.config.open("a") as file:
        file.write(vault.table(vault.settings(tmp_path)))
    yield made
    made.close()


def cdrs(first, count, days_ago=0):
    return [
        sms_cdr(record_id=f"c{n}", recipient=f"+1415555{n:04}", occurred_at=ago(30 + 86_400 * days_ago))
        for n in range(first, first + count)
    ]


def test_a_worker_waits_while_the_service_is_away_loses_nothing_and_goes_on(vault, place):
    place.publish(*cdrs(0, 20))
    worker = place.start("run")
    eventually(lambda: place.committed() == 20, "the first records")
    vault.kill()
    place.publish(*cdrs(20, 20))  # of the same days: the keys are at hand
    eventually(lambda: place.committed() == 40, "records that need no new key")
    place.publish(*cdrs(40, 20, days_ago=3))
    eventually(lambda: "key management service does not answer" in place.told(worker), "the worker says that it waits")
    time.sleep(1)
    assert (place.committed(), worker.poll()) == (40, None)
    vault.start()
    time.sleep(0.5)
    assert (place.committed(), worker.poll()) == (40, None)
    vault.unseal()
    eventually(lambda: place.committed() == 60, "the rest")
    worker.terminate()
    assert place.ended(worker).status == 0
    assert len(place.values("cdr.anonymous")) == 60
    found = place.opened("cdr.pii")
    assert sorted(one["record_id"] for one in found) == sorted(f"c{n}" for n in range(60))


def test_a_worker_that_starts_without_the_service_waits_for_it(vault, place):
    place.publish(*cdrs(0, 5))
    place.work()
    place.publish(*cdrs(5, 5))
    vault.kill()
    worker = place.start("run", "--until-idle")
    eventually(lambda: "key management service does not answer" in place.told(worker), "the worker says that it waits")
    assert worker.poll() is None
    vault.heal()
    assert place.ended(worker).status == 0
    assert place.committed() == 10


def test_a_command_without_the_service_says_one_line_and_does_nothing(vault, place):
    place.publish(*cdrs(0, 1))
    place.work()
    vault.kill()
    said = one_line(place.call("optout", "check", "+14155550000"))
    assert "key management service does not answer" in said
    assert vault.made.secret_id not in said


# --- the set-up script --------------------------------------------------------------------------------------


def set_up(vault, tmp_path, *more):
    token = write_secret(tmp_path / "admin-token", vault.admin.headers["X-Vault-Token"])
    command = [sys.executable, "-m", "deploy.vault.setup", "--address", vault.address, "--ca-file", vault.ca_path]
    command += ["--token-file", token, "--secret-id-file", tmp_path / "made-secret-id", *more]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_the_set_up_script_makes_a_server_ready_and_prints_the_configuration(vault, tmp_path, store_id, opened):
    names = ("--mount", "keys/sms", "--counter-mount", "kv/sms", "--prefix", "sv-", "--role", "sms")
    for _ in range(2):
        done = set_up(vault, tmp_path, *names)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made-secret-id").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "made-secret-id").read_text() not in done.stdout
    (tmp_path / "streamveil.toml").write_text(done.stdout)
    config = load(SimpleNamespace(config=str(tmp_path / "streamveil.toml"), log=None))
    kms = VaultKms.create(config.vault, store_id)
    opened.append(kms)
    assert kms.unwrap(DAY, kms.wrap(DAY, KEY)) == KEY
    kms.raise_counter(1)
    kms.destroy(DAY)
    assert kms.names() == []
    with pytest.raises(KmsRefuses, match="forbids"):
        VaultKms.create(config.vault._replace(mount="transit"), secrets.token_hex(16))


def test_the_set_up_script_says_in_one_line_what_is_wrong_and_changes_no_engine(vault, tmp_path):
    for wrong, why in ((("--mount", "secret"), "another engine"), (("--counter-mount", "transit"), "no key-value")):
        done = set_up(vault, tmp_path, *wrong)
        assert (done.returncode, done.stdout) == (1, "")
        assert why in done.stderr
        assert done.stderr.count("\n") == 1
    write_secret(tmp_path / "admin-token-2", "nobody")
    done = set_up(vault, tmp_path, "--token-file", tmp_path / "admin-token-2")
    assert done.returncode == 1
    assert "nobody" not in done.stderr


def test_the_page_about_it_shows_a_configuration_that_loads_and_every_setting(tmp_path):
    page = (ROOT / "docs" / "vault.md").read_text()
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "streamveil.toml").write_text(shown)
    assert load(SimpleNamespace(config=str(tmp_path / "streamveil.toml"), log=None)).vault is not None
    for name in _VaultTable.__struct_fields__:
        assert f"| `{name}` |" in page, name
    for cause in ("connect", "timeout", "tls", "sealed", "throttled", "failing", "not_asked", "answer", "redirect"):
        assert f"`{cause}`" in page, cause
