"""The PostgreSQL key store on a real server: how it gets in, what goes wrong there, what its copies can open.

Most tests share a server; those that break one have their own.
"""

import contextlib
import itertools
import multiprocessing
import random
import shutil
import signal
import subprocess
import threading
import time
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deploy.kafka.broker import Authority
from processors.keyring import Needs, PersonRef
from schemas.errors import KeysBusy, KeysFull, KeysUnusable, KmsRefuses
from schemas.fields import PLATFORM
from streams.keys import postgres as module
from streams.keys import sql
from streams.keys.postgres import PostgresKeyStore, exists
from streams.keys.sql import Mode
from streams.keys.store import Gone
from streams.keys.wrapping import person_aad, unwrap
from tests.support.commands import PATIENCE_S, eventually
from tests.support.keys import DAY, LATER, LATER_DAY, MONTH, NOW, PII, epoch, local_kms, person, persons
from tests.support.postgres import PostgresKeyStores, connect, new_server

CANARY = "+14155550199"


@pytest.fixture
def server(tmp_path):
    """A server that a test may break, and the key store on it."""
    with new_server() as one:
        stores = PostgresKeyStores(one.new_database(tmp_path)._replace(timeout_s=0.5), tmp_path)
        yield one, stores
        stores.close()


def patient(call):
    """Return what a call returns as soon as nothing is in its way, as a worker waits for it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except (KeysBusy, KmsRefuses):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def hang_up(admin, database):
    """End every connection to a database, and wait until each has ended."""
    others = "FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'"
    admin.execute(f"SELECT pg_terminate_backend(pid) {others}", (database,))
    eventually(lambda: admin.execute(f"SELECT count(*) {others}", (database,)).fetchone() == (0,), "they have ended")


def told(error: BaseException) -> str:
    """All that anybody may see of an error."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))


# --- getting in ---------------------------------------------------------------------------------------------


def test_who_cannot_get_in_is_told_what_to_do_and_no_password(postgres, postgres_server, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Authority(other)
    wrong, loose, empty = tmp_path / "wrong", tmp_path / "loose", tmp_path / "empty"
    for path, text in ((wrong, CANARY), (loose, CANARY), (empty, "")):
        path.touch(mode=0o600)
        path.write_text(text)
    loose.chmod(0o640)
    cases = [
        ({"password_path": wrong}, "refuses this user.*password_file"),
        ({"password_path": None}, "refuses this user.*password_file"),
        ({"username": "nobody"}, "refuses this user.*username"),
        ({"database": "nowhere"}, "no such database: check .postgres. database"),
        ({"ca_path": other / "ca.pem"}, "not of .postgres. ca_file's authority"),
        ({"ca_path": None}, "not of .postgres. ca_file's authority"),
        ({"ca_path": tmp_path / "none.pem"}, "ca_file cannot be read"),
        ({"password_path": loose}, "chmod 600"),
        ({"password_path": empty}, "is empty"),
        ({"password_path": tmp_path / "none"}, "cannot be read"),
    ]
    for change, message in cases:
        for call in (exists, lambda settings: PostgresKeyStore.open(settings, local_kms(tmp_path / "kms"))):
            with pytest.raises(KeysUnusable, match=message) as caught:
                call(postgres._replace(**change))
            assert CANARY not in told(caught.value)
            assert postgres_server.password not in told(caught.value)


def test_a_certificate_for_another_name_is_refused(tmp_path):
    with new_server(listen_addresses="127.0.0.1,127.0.0.2") as one:
        (one.data / "pg_hba.conf").write_text("host all all 127.0.0.0/8 scram-sha-256\n")
        settings = one.new_database(tmp_path)
        with pytest.raises(KeysUnusable, match=r"for another name than .postgres. host"):
            exists(settings._replace(host="127.0.0.2"))


def test_a_server_without_tls_is_refused_unless_the_configuration_says_plaintext(tmp_path):
    with new_server() as one:
        settings = one.new_database(tmp_path)
        one.stop()
        one.settings["ssl"] = "off"
        one.start()
        with pytest.raises(KeysUnusable, match="has no TLS"):
            exists(settings)
        assert not exists(settings._replace(plaintext=True, ca_path=None))


def test_a_password_never_goes_over_a_plaintext_connection(tmp_path):
    with new_server() as one:
        settings = one.new_database(tmp_path)._replace(plaintext=True, ca_path=None)
        (one.data / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 password\n")
        with one.admin() as admin:
            admin.execute("SELECT pg_reload_conf()")

        def refused():
            try:
                exists(settings)
            except KeysUnusable as error:
                return str(error)

        assert "does not take passwords by SCRAM" in eventually(refused, "the server has read its rules anew")


@pytest.mark.parametrize(("how", "encrypted"), [("tls", True), ("plaintext", False), ("socket", False)])
def test_it_comes_in_by_tls_or_plaintext_or_a_unix_socket(how, encrypted, postgres_stores, postgres_server):
    stores = postgres_stores
    if how == "plaintext":
        stores.settings = stores.settings._replace(plaintext=True, ca_path=None)
    if how == "socket":
        stores.settings = stores.settings._replace(host=str(postgres_server.folder / "s"), ca_path=None)
    store = stores.open()
    with store._transaction(Mode.READ):
        found = store._run("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    assert found == [(encrypted,)]
    assert store.fetch(persons([person(1)]), NOW).persons


def test_there_is_a_store_or_there_is_none(postgres_stores):
    stores = postgres_stores
    assert not exists(stores.settings)
    with pytest.raises(KeysUnusable, match="no key store in this database"):
        stores.open(create=False)
    stores.open()
    assert exists(stores.settings)
    stores.run("DROP TABLE meta")
    assert exists(stores.settings)
    with pytest.raises(KeysUnusable, match="restore it"):
        stores.open()


def test_a_server_whose_disk_may_forget_is_refused(tmp_path):
    with new_server(fsync="off") as one, pytest.raises(KeysUnusable, match="fsync off"):
        exists(one.new_database(tmp_path))


def test_users_of_a_shared_role_work_together_and_others_have_no_right(postgres_stores, postgres_server, tmp_path):
    stores = postgres_stores
    owner, database = stores.settings.username, stores.settings.database
    password = tmp_path / "word"
    password.touch(mode=0o600)
    password.write_text("word")
    users = [f"{owner}{name}" for name in ("worker", "officer", "stranger")]
    with postgres_server.admin() as admin:
        for user in users:
            admin.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'word'")
        for user in users[:2]:
            admin.execute(f"GRANT {owner} TO {user}")
            admin.execute(f"ALTER ROLE {user} IN DATABASE {database} SET role = {owner}")
    try:
        worker, officer, stranger = (stores.settings._replace(username=user, password_path=password) for user in users)
        kms = local_kms(stores.kms_folder)
        with (
            contextlib.closing(PostgresKeyStore.open(worker, kms)) as first,
            contextlib.closing(PostgresKeyStore.open(officer, kms)) as second,
        ):
            made = first.fetch(persons([person(1)]), NOW).persons
            assert second.fetch(persons([person(1)]), NOW).persons == made
            second.fetch(persons([person(1, month="2100-05")]), NOW)
            assert first.fetch(persons([person(2, month="2100-05")]), NOW).persons
            assert first.bury_day(LATER_DAY, LATER + DAY).persons == 3
        with pytest.raises(KeysUnusable, match="lacks a right"):
            PostgresKeyStore.open(stranger, kms)
        with postgres_server.admin() as admin:
            admin.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        with pytest.raises(KeysUnusable, match="may not use the database"):
            PostgresKeyStore.open(stranger, kms)
        PostgresKeyStore.open(officer, kms).close()
    finally:
        with postgres_server.admin() as admin:
            for user in users:
                admin.execute(f"DROP ROLE {user}")


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_server_that_stops_answering_is_waited_for_and_then_gone_on_with(server):
    one, stores = server
    store = stores.open(busy_timeout_s=0.5)
    known = store.fetch(persons([person(1)]), NOW).persons
    with one.suspended():
        for _ in range(2):
            began_s = time.monotonic()
            with pytest.raises(KeysBusy, match="does not answer"):
                store.fetch(persons([person(1), person(2)]), NOW)
            assert time.monotonic() - began_s < PATIENCE_S
    assert patient(lambda: store.fetch(persons([person(1)]), NOW)).persons == known


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_server_that_was_stopped_or_lost_power_is_found_again_with_all_it_acknowledged(how, server):
    one, stores = server
    store = stores.open()
    known = store.fetch(persons(person(n) for n in range(3000)), NOW).persons
    one.stop(how)
    with pytest.raises(KeysBusy, match="does not answer"):
        store.fetch(persons([person(1)]), NOW)
    one.start()
    assert store.fetch(persons(person(n) for n in range(3000)), NOW).persons == known


def test_a_connection_that_died_unused_is_replaced_without_a_word(postgres_stores, postgres_server):
    store = postgres_stores.open()
    known = store.fetch(persons([person(1)]), NOW).persons
    with postgres_server.admin() as admin:
        hang_up(admin, postgres_stores.settings.database)
    assert store.fetch(persons([person(1)]), NOW).persons == known


def test_a_server_that_takes_no_writes_is_waited_for(postgres_stores, postgres_server):
    store = postgres_stores.open()
    name = postgres_stores.settings.database
    with postgres_server.admin() as admin:
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        hang_up(admin, name)
        for call in (lambda: store.fetch(persons([person(1)]), NOW), lambda: store.renew_lease("w", 30, 0)):
            with pytest.raises(KeysBusy, match="takes no writes now"):
                call()
        admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    assert store.fetch(persons([person(1)]), NOW).persons


def test_what_no_standby_has_confirmed_is_not_returned(server):
    one, stores = server
    store = stores.open(busy_timeout_s=0.5)
    store.fetch(persons([person(0)]), NOW)
    with one.admin() as admin:
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        admin.execute("SELECT pg_reload_conf()")
        numbers = itertools.count(1)

        def unconfirmed():
            one = persons([person(next(numbers))])
            try:
                store.fetch(one, NOW)
            except KeysBusy:
                return one

        asked = eventually(unconfirmed, "the server waits for a standby")
        admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        admin.execute("SELECT pg_reload_conf()")
    found = patient(lambda: store.fetch(asked, NOW)).persons
    assert stores.open().fetch(asked, NOW).persons == found


def test_a_database_that_commits_without_waiting_for_its_disk_is_made_to_wait(postgres_stores, postgres_server):
    with postgres_server.admin() as admin:
        admin.execute(f"ALTER DATABASE {postgres_stores.settings.database} SET synchronous_commit = off")
    store = postgres_stores.open()
    with store._transaction(Mode.READ):
        assert store._run("SELECT current_setting('synchronous_commit')") == [("on",)]


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        ("53100", KeysFull, "disk of the key store's server is full"),
        ("53200", KeysBusy, "no memory to spare"),
        ("40P01", KeysBusy, "another process"),
        ("40001", KeysBusy, "another process"),
        ("57014", KeysBusy, "takes too long"),
        ("25006", KeysBusy, "takes no writes"),
        ("23505", KeysBusy, "another process was quicker"),
        ("42501", KeysUnusable, "lacks a right"),
        ("58030", KeysUnusable, "disk of the key store's server fails"),
        ("XX001", KeysUnusable, "damaged"),
        ("P0001", KeysUnusable, "refuses: see its log"),
    ],
)
def test_an_error_says_what_to_do_and_nothing_of_the_row(state, kind, message, postgres_stores):
    store = postgres_stores.open()
    store.fetch(persons([person(0)]), NOW)
    postgres_stores.run(
        f"""CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        RAISE EXCEPTION 'no {CANARY}' USING ERRCODE = '{state}', DETAIL = 'Key (token)=({CANARY})'; END $$"""
    )
    postgres_stores.run("CREATE TRIGGER fails BEFORE INSERT ON persons FOR EACH ROW EXECUTE FUNCTION fails()")
    with pytest.raises(kind, match=message) as caught:
        store.fetch(persons([person(1)]), NOW)
    assert CANARY not in told(caught.value)
    assert person(1).token.hex() not in told(caught.value)
    postgres_stores.run("DROP TRIGGER fails ON persons")
    assert len(store.fetch(persons([person(0), person(1)]), NOW).persons) == 2


def test_the_server_s_log_holds_no_token_after_an_error(postgres_stores, postgres_server):
    store = postgres_stores.open(busy_timeout_s=0.2)
    ref = PersonRef(PLATFORM, random.Random(7).randbytes(16), MONTH)
    store.fetch(persons([person(0)]), NOW)
    with connect(postgres_stores.settings) as beside:
        beside.execute("BEGIN; LOCK TABLE persons")
        with pytest.raises(KeysBusy):
            store.fetch(persons([ref]), NOW)
    assert "canceling statement due to lock timeout" in postgres_server.log()
    assert ref.token.hex() not in postgres_server.log()


def test_known_people_are_read_while_another_process_destroys(postgres_stores):
    store, other = postgres_stores.open(busy_timeout_s=0.2), postgres_stores.open()
    known = store.fetch(persons([person(1)]), NOW).persons
    with other._transaction(Mode.EXCLUSIVE):
        assert store.fetch(persons([person(1)]), NOW).persons == known
        with pytest.raises(KeysBusy, match="another process holds the key store"):
            store.fetch(persons([person(2)]), NOW)
    assert store.fetch(persons([person(2)]), NOW).persons


def test_a_process_that_is_suspended_in_a_transaction_holds_nobody_up_for_long(postgres_stores):
    postgres_stores.settings = postgres_stores.settings._replace(timeout_s=0.5)
    suspended, officer = postgres_stores.open(), postgres_stores.open()

    def stop_and_go_on() -> None:
        with suspended._transaction(Mode.SHARE):
            began_s = time.monotonic()
            assert patient(lambda: officer.destroy_epoch(PII)) == 1
            assert 0.5 < time.monotonic() - began_s < PATIENCE_S

    with pytest.raises(KeysBusy):
        stop_and_go_on()
    assert suspended.sequence() == 1


# --- migrations ---------------------------------------------------------------------------------------------


def _two_versions(monkeypatch, statement: str) -> None:
    steps = (*module.MIGRATIONS, (sql.SCHEMA_VERSION + 1, statement))
    monkeypatch.setattr(module, "MIGRATIONS", steps)
    monkeypatch.setattr(sql, "SCHEMA_VERSION", sql.SCHEMA_VERSION + 1)


def test_an_older_store_is_brought_up_to_date_by_the_first_of_several_that_open_it(postgres_stores, monkeypatch):
    known = postgres_stores.open().fetch(persons([person(1)]), NOW).persons
    _two_versions(monkeypatch, "ALTER TABLE leases ADD COLUMN host text")
    opened: list[PostgresKeyStore] = []
    threads = [threading.Thread(target=lambda: opened.append(postgres_stores.open(create=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [one.fetch(persons([person(1)]), NOW).persons for one in opened] == [known] * 4
    assert postgres_stores.run("SELECT value FROM meta WHERE name = 'schema'") == [("3",)]


def test_a_new_store_takes_every_step(postgres_stores, monkeypatch):
    _two_versions(monkeypatch, "ALTER TABLE leases ADD COLUMN host text")
    postgres_stores.open()
    assert postgres_stores.run("SELECT count(host) FROM leases") == [(0,)]


def test_a_step_that_fails_changes_nothing(postgres_stores, monkeypatch):
    postgres_stores.open()
    with monkeypatch.context() as patched:
        _two_versions(patched, "ALTER TABLE leases ADD COLUMN host text; SELECT 1 FROM nothing")
        with pytest.raises(KeysUnusable, match="restore it"):
            postgres_stores.open()
    assert postgres_stores.run("SELECT value FROM meta WHERE name = 'schema'") == [("2",)]
    assert postgres_stores.open().sequence() == 0


# --- partitions ---------------------------------------------------------------------------------------------


def _months(stores: PostgresKeyStores) -> list[str]:
    rows = stores.run("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'persons'::regclass")
    return sorted(name for (name,) in rows)


def test_a_month_s_partition_goes_with_its_last_day_and_not_before(postgres_stores):
    store = postgres_stores.open()
    store.fetch(persons([person(n) for n in range(20)]), NOW)
    store.fetch(persons([person(n, "acme") for n in range(5)], NOW + 40 * DAY), NOW)
    store.fetch(persons([person(n, month="2100-02") for n in range(7)], LATER + 30 * DAY), NOW)
    first, second, third = store.due_days(LATER + 60 * DAY)
    assert store.bury_day(first, LATER + 60 * DAY).persons == 5
    assert _months(postgres_stores) == ["persons_2100_01", "persons_2100_02"]
    assert store.bury_day(second, LATER + 60 * DAY).persons == 20
    assert _months(postgres_stores) == ["persons_2100_02"]
    assert store.bury_day(third, LATER + 60 * DAY).persons == 7
    assert _months(postgres_stores) == []


def test_a_backup_that_runs_does_not_keep_a_month_from_dying(postgres_stores):
    store = postgres_stores.open()
    store.fetch(persons([person(n) for n in range(20)]), NOW)
    with connect(postgres_stores.settings) as backup:
        backup.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert backup.execute("SELECT count(*) FROM persons").fetchone() == (20,)
        assert store.bury_day(LATER_DAY, LATER + DAY).persons == 20
        backup.execute("COMMIT")
    assert _months(postgres_stores) == ["persons_2100_01"]
    assert postgres_stores.run("SELECT count(*) FROM persons") == [(0,)]
    assert store.bury_day(LATER_DAY, LATER + DAY).persons == 0
    assert _months(postgres_stores) == []


def test_two_machines_may_bury_and_rewrap_the_same_day_at_once(postgres_stores):
    store = postgres_stores.open()
    known = store.fetch(persons([person(n) for n in range(12_000)]), NOW).persons
    failures: list[BaseException] = []

    def again(call) -> None:
        one = postgres_stores.open()
        try:
            patient(lambda: call(one))
        except BaseException as error:
            failures.append(error)
            raise

    for call in (lambda one: one.rewrap(LATER_DAY), lambda one: one.bury_day(LATER_DAY, LATER + DAY)):
        threads = [threading.Thread(target=again, args=(call,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        if known:
            assert store.fetch(persons([person(n) for n in range(12_000)]), NOW).persons == known
            known = {}
    assert postgres_stores.run("SELECT count(*) FROM persons") == [(0,)]


def test_a_burial_misses_nobody_whom_a_rewrap_moves_meanwhile(postgres_stores, monkeypatch):
    # Given a month with several pages of people of a day, and somebody who stays
    store, other = postgres_stores.open(), postgres_stores.open()
    store.fetch(persons([person(n) for n in range(3000)]), NOW)
    store.fetch(persons([person(9001)], LATER + 40 * DAY), NOW)
    monkeypatch.setattr(module, "_PAGES", 8)
    real, moved = store._pages, []

    def pages(month):
        for number, some in enumerate(real(month)):
            yield some
            if number == 2 and not moved:  # to pages that were cleaned already, or are behind the last
                moved.append(other.rewrap(LATER_DAY))

    monkeypatch.setattr(store, "_pages", pages)
    # When the day is buried while it is re-wrapped
    persons_buried = store.bury_day(LATER_DAY, LATER + 2 * DAY).persons
    # Then nothing of it is left
    assert moved[0] > 0
    assert persons_buried == 3000
    assert postgres_stores.run("SELECT left(kek, 10), count(*) FROM persons GROUP BY 1") == [("2100-12-07", 1)]
    assert store.lost() == []


def test_whether_anybody_is_known_under_a_token_key_is_one_look_at_the_index(postgres_stores, monkeypatch):
    store = postgres_stores.open()
    store.fetch(persons([person(n) for n in range(5000)]), NOW)
    postgres_stores.run("ANALYZE persons")  # all are under version 1, so reading on would find one at once
    asked, run = [], store._run
    monkeypatch.setattr(store, "_run", lambda query, values=(): (asked.append((query, values)), run(query, values))[1])
    assert [store._has_tokens(version) for version in (1, 2)] == [True, False]
    plans = []
    with connect(postgres_stores.settings) as server:
        for query, values in asked:
            if "token_version" in query:
                rows = server.execute("EXPLAIN " + module.translated(query), values).fetchall()
                plans.append("\n".join(line for (line,) in rows))
    assert len(plans) == 2
    for plan in plans:
        assert "token_version" in plan
        assert "Index Only Scan" in plan or "Index Scan" in plan
        assert "Seq Scan" not in plan


# --- several machines ---------------------------------------------------------------------------------------


def _machine(settings, kms_folder: Path, offset_s: float, seed: int, results) -> None:
    """A process on a machine whose clock is wrong."""
    right = time.time
    time.time = lambda: right() + offset_s
    store = PostgresKeyStore.open(settings, local_kms(kms_folder))
    store.renew_lease(f"machine-{seed}", 30, 0)
    order = [person(n, month=month) for n in range(3000) for month in (MONTH, "2100-02")]
    random.Random(seed).shuffle(order)
    found = {}
    for start in range(0, len(order), 500):
        found |= store.fetch(persons(order[start : start + 500]), NOW).persons
    results.put((seed, sorted((ref.month, ref.token, *one) for ref, one in found.items()), sorted(store.leases())))
    store.close()


def test_machines_whose_clocks_are_apart_get_the_same_secrets_and_see_each_other_s_leases(postgres_stores):
    store = postgres_stores.open()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    machines = [
        context.Process(
            target=_machine, args=(postgres_stores.settings, postgres_stores.kms_folder, offset_s, seed, results)
        )
        for seed, offset_s in enumerate((-2 * DAY, 0, 2 * DAY))
    ]
    for machine in machines:
        machine.start()
    found = [results.get(timeout=60) for _ in machines]
    for machine in machines:
        machine.join(60)
        assert machine.exitcode == 0
    results.close()
    results.join_thread()
    assert found[0][1] == found[1][1] == found[2][1]
    assert len(found[0][1]) == 6000
    assert sorted(store.leases()) == ["machine-0", "machine-1", "machine-2"]
    assert postgres_stores.run("SELECT count(*) FROM persons") == [(6000,)]


# --- copies -------------------------------------------------------------------------------------------------


def _opens(store: PostgresKeyStore, sid: str) -> bool:
    try:
        return not isinstance(store.open_persons([sid], NOW)[sid], Gone)
    except KmsRefuses:
        return False


def _erased(stores: PostgresKeyStores) -> tuple[PostgresKeyStore, str, str]:
    """A store with an epoch, and people of whom number 1 is to be erased: her sid and another's."""
    store = stores.open()
    found = store.fetch(Needs({PII: (LATER, 5)}, persons(person(n) for n in range(50)).persons), NOW).persons
    return store, found[person(1)].sid, found[person(2)].sid


def _destroyed(store: PostgresKeyStore) -> None:
    store.destroy_persons(PLATFORM, [person(1).token])
    for day in store.stale_days():
        store.rewrap(day)


def test_a_dump_from_before_an_erasure_refuses_to_open_and_opens_nothing_destroyed(server, tmp_path):
    one, stores = server
    store, erased, other = _erased(stores)
    dump = one.run("pg_dump", "-h", str(one.folder / "s"), "-p", str(one.port), "-U", "postgres",
                   stores.settings.database, PGPASSWORD=one.password)  # fmt: skip
    store.destroy_persons(PLATFORM, [person(1).token])
    copy = PostgresKeyStores(one.new_database(tmp_path), tmp_path)
    file = one.folder / "dump.sql"
    file.write_bytes(dump.replace(stores.settings.username.encode(), copy.settings.username.encode()))
    one.run("psql", "-q", "-v", "ON_ERROR_STOP=1", "-h", str(one.folder / "s"), "-p", str(one.port), "-U", "postgres",
            "-d", copy.settings.database, "-f", str(file), PGPASSWORD=one.password)  # fmt: skip
    with pytest.raises(KeysUnusable, match=r"older than the last destruction.*streamveil keys reconcile"):
        copy.open()
    old = copy.open(outdated=True)
    assert _opens(old, erased)  # the window that is open until the day is re-wrapped
    for day in store.stale_days():
        store.rewrap(day)
    assert _opens(store, other)
    assert not _opens(store, erased)
    fresh = copy.open(outdated=True)
    assert not _opens(fresh, erased)
    copy.close()


def test_a_copy_of_the_stopped_server_from_before_an_erasure_and_a_death_opens_nothing_destroyed(server):
    one, stores = server
    store, erased, other = _erased(stores)
    key = store.fetch(epoch(PII), NOW).epochs[PII]
    one.stop()
    kept = one.folder / "kept"
    subprocess.run(["cp", "-a", str(one.data), str(kept)], check=True)
    one.start()
    _destroyed(store)
    assert _opens(store, other)
    store.bury_day(LATER_DAY, LATER + DAY)
    store.close()
    one.stop()
    shutil.rmtree(one.data)
    kept.rename(one.data)
    one.start()
    with pytest.raises(KeysUnusable, match="streamveil keys reconcile"):
        stores.open()
    old = stores.open(outdated=True)
    assert not _opens(old, erased)
    assert not _opens(old, other)
    with pytest.raises(KmsRefuses):
        old.open_epochs([key.id], NOW)
    assert old.open_epochs([key.id], LATER) == {key.id: Gone.DESTROYED}


def test_no_byte_of_the_server_s_files_opens_what_was_destroyed_and_rewrapped(server):
    one, stores = server
    store, erased, _ = _erased(stores)
    rows = stores.run("SELECT sid, kek, wrapped FROM persons WHERE sid = ?", (bytes.fromhex(erased),))
    ((sid, kek, wrapped),) = rows
    ((key_wrapped,),) = stores.run("SELECT wrapped FROM wrapping_keys WHERE kek = ?", (kek,))
    secret = store.open_persons([erased], NOW)[erased].secret
    day_key = store.kms.unwrap(LATER_DAY, key_wrapped)
    assert unwrap(AESGCM(day_key), wrapped, person_aad(person(1), sid)) == secret  # it did open, with what was there
    _destroyed(store)
    one.stop()
    files = {path: path.read_bytes() for path in one.data.rglob("*") if path.is_file()}
    assert any(wrapped in content for content in files.values())  # dead rows and the write-ahead log have it still
    for path, content in files.items():
        assert secret not in content, path
        assert day_key not in content, path
    one.start()
    wanted = {key_wrapped} | {row[0] for row in stores.run("SELECT wrapped FROM wrapping_keys")}
    for name in [*store.kms.names(), LATER_DAY]:
        for blob in wanted:
            with contextlib.suppress(KmsRefuses, KeysUnusable):
                assert store.kms.unwrap(name, blob) != day_key
