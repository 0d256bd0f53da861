"""The whole program with its keys on a real PostgreSQL and a real Vault: workers, requests, rotation, evidence."""

import contextlib
import json
import threading

import pytest

from tests.support.commands import Place, ago, eventually
from tests.support.records import sms_cdr, sms_request

ERASED, OTHER = "+14155550101", "+14155550102"


@pytest.fixture
def place(postgres, vault, tmp_path):
    made = Place(tmp_path, lease_s=4.0)
    names = {"password_path": "password_file", "ca_path": "ca_file"}
    rows = {names.get(key, key): value for key, value in postgres._asdict().items() if value is not None}
    with made.config.open("a") as file:
        file.write(
            "[postgres]\n" + "".join(f"{key} = {json.dumps(value, default=str)}\n" for key, value in rows.items())
        )
        file.write(vault.table(vault.settings(tmp_path)))
    yield made
    made.close()


def cdrs(name, count, number):
    return [sms_cdr(record_id=f"{name}-{at}", recipient=number, occurred_at=ago()) for at in range(count)]


def ok(place, *words):
    done = place.run(*words)
    assert done.status == 0, (words, done.err)
    return done


def states(place):
    found = ok(place, "tail", "cdr.pii", "--from-beginning", "--json", "--reveal", "--reason", "T-1").lines
    return {one["offset"] + 1000 * one["partition"]: (one["reveal"]["state"], one["reveal"]["fields"].get("record_id"))
            for one in found}  # fmt: skip


def test_what_is_committed_before_an_erasure_is_gone_and_after_it_opens_while_workers_work(place):
    # Given two workers, and traffic of two people that never stops
    worker = place.start("run", "--workers", 2)
    stop = threading.Event()

    def publish():
        at = 0
        while not stop.is_set():
            place.publish(*cdrs(f"e{at}", 20, ERASED), *cdrs(f"o{at}", 20, OTHER))
            at += 1
            stop.wait(0.2)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        eventually(lambda: place.committed() >= 200, "some work")
        before = set(states(place))
        # When one is erased
        erased = ok(place, "subject", "erase", ERASED, "--reason", "C-1", "--json").lines[0]
        after = {at for at, (state, _) in states(place).items() if state == "revealed"} - before
        eventually(lambda: place.committed() >= 600, "more work")
    finally:
        stop.set()
        publisher.join()
        worker.terminate()
    assert place.ended(worker).status == 0
    assert erased["erased"] == 1
    assert ok(place, "run", "--until-idle").status == 0
    # Then of what was there before, the other's opens alone; and whatever came after the acknowledgement opens
    found = states(place)
    assert {name[0] for at, (state, name) in found.items() if at in before and state == "revealed"} == {"o"}
    dead = {at for at, (state, _) in found.items() if state == "destroyed"}
    assert dead >= {at for at in before if found[at][1] is None}
    assert not dead & after
    assert any(name and name[0] == "e" for state, name in found.values() if state == "revealed")
    assert {state for state, _ in found.values()} == {"destroyed", "revealed"}


def test_keys_are_rotated_and_re_wrapped_while_a_worker_works_and_nothing_is_lost(place):
    place.publish(*cdrs("a", 50, ERASED), *cdrs("b", 50, OTHER))
    assert ok(place, "run", "--until-idle").records == 100
    ok(place, "optout", "add", OTHER)
    worker = place.start("run")
    ok(place, "subject", "erase", ERASED, "--reason", "C-1")
    said = ok(place, "keys", "rotate").out
    assert "its operators rotate it" in said
    ok(place, "retention", "run", "--rewrap")
    place.publish(*cdrs("c", 50, ERASED), sms_request(record_id="q", recipient=OTHER, occurred_at=ago(0)))
    eventually(lambda: place.committed() >= 151, "the rest")
    worker.terminate()
    assert place.ended(worker).status == 0
    found = list(states(place).values())
    assert sum(state == "destroyed" for state, _ in found) == 50
    assert {name[0] for state, name in found if state == "revealed"} == {"b", "c"}
    assert place.verdicts() == {"q": ("refused", "opted_out")}
    status = ok(place, "keys", "status", "--json").lines[-1]["summary"]
    assert status["sequence"] == status["counter"]
    folder = place.folder / "evidence"
    ok(place, "evidence", "report", "--from", "2026-01-01", "--to", "2099-01-01", "--out", folder)
    assert "complete, unchanged and in order" in ok(place, "evidence", "verify", folder).out


def test_an_outage_of_either_service_stops_commands_in_one_line_and_workers_not_for_good(place, vault, postgres_server):
    place.publish(*cdrs("a", 5, OTHER))
    assert ok(place, "run", "--until-idle").records == 5
    for service in (vault_stopped(vault), postgres_server.suspended()):
        with service:
            done = place.run("subject", "erase", OTHER, "--reason", "C-1")
            assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1), done.err
            assert OTHER not in done.err
        place.publish(*cdrs("b", 5, OTHER))
        assert ok(place, "run", "--until-idle").records == 5
    assert {state for state, _ in states(place).values()} == {"revealed"}


@contextlib.contextmanager
def vault_stopped(vault):
    vault.stop()
    try:
        yield
    finally:
        vault.go_on()
