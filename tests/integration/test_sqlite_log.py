"""What only the SQLite log promises: its files, their modes and bytes, its errors, several processes at once."""

import asyncio
import multiprocessing
import os
import random
import re
import sqlite3
import stat
from contextlib import suppress

import pytest

from schemas.errors import Fenced, LogBusy, LogFull, LogUnusable
from streams.log import sqlite
from streams.log.protocol import Bookmark, Message, Output
from streams.log.sqlite import SqliteLog
from streams.state.entries import SUPPRESSIONS, EntryTail

CANARY = re.compile(rb"<canary \d{6}>")
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "log.db"


@pytest.fixture
def opened():
    """Return `SqliteLog.open` of logs that are closed after the test."""
    logs = []

    def open_log(*args, **options):
        logs.append(SqliteLog.open(*args, **options))
        return logs[-1]

    yield open_log
    for log in logs:
        asyncio.run(log.close())


def canary(number):
    return b"<canary %06d>" % number


def messages(*values):
    return [Message(1_700_000_000_000, b"k", (("h", b"x"),), value) for value in values]


def nothing():
    """Object to nothing."""


def in_files(path, *, clear):
    """Return the canaries in the bytes of the files of clear input, or in those of all others."""
    files = [file for file in path.parent.iterdir() if ("-traffic.db" in file.name) == clear]
    assert len(files) == 3  # with WAL and shared memory
    return {found for file in files for found in CANARY.findall(file.read_bytes())}


async def append(log, stream, *values, partition=0):
    await log.append([Output(stream, partition, messages(*values))])


async def drain(consumer, max_records=1000):
    """Commit whatever there is, repeated into `verdicts`; return the number of messages."""
    count = 0
    while batch := await consumer.poll(max_records, 0):
        await consumer.commit(batch, [Output("verdicts", batch.partition, batch.messages)], nothing)
        count += len(batch.messages)
    return count


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_file_is_for_the_owner_alone_whatever_the_umask(opened, path, umask):
    async def scenario():
        log = opened(path)
        await append(log, "traffic", b"a")
        await append(log, "audit", b"b")
        return {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    before = os.umask(umask)
    try:
        modes = asyncio.run(scenario())
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert modes == {name + more: 0o600 for name in ("log.db", "log-traffic.db") for more in ("", "-wal", "-shm")}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_clear_input_that_others_may_read_is_refused(opened, path, mode, suffix):
    holder = opened(path)  # keeps the WAL there
    asyncio.run(append(holder, "traffic", b"a"))
    exposed = path.with_name(f"log-traffic.db{suffix}")
    exposed.chmod(mode)

    with pytest.raises(LogUnusable, match="chmod 600") as caught:
        opened(path)

    assert "\n" not in str(caught.value)
    exposed.chmod(0o600)
    opened(path)


def test_clear_input_is_never_in_the_main_files(opened, path):
    async def scenario():
        log = opened(path)
        consumer = log.consumer("w")
        await append(log, "traffic", canary(1))
        await append(log, "traffic.cdr", canary(2))
        batch = await consumer.poll(10, 0)
        await consumer.commit(batch, [], nothing)

    asyncio.run(scenario())

    assert in_files(path, clear=True) == {canary(1), canary(2)}
    assert in_files(path, clear=False) == set()


def test_an_existing_log_keeps_its_partition_count(opened, path):
    assert opened(path, partitions=3).partitions == 3
    assert opened(path, partitions=8).partitions == 3


def test_offsets_have_no_gaps(opened, path):
    async def scenario():
        log = opened(path)
        for size in (1, 5, 2300, 1):
            await append(log, "audit", *[b"x"] * size)
        assert (await log.end_offsets("audit")) == [2307, 0, 0, 0]
        return [stored.offset for stored in await log.read("audit", 0, 0, 10_000)]

    assert asyncio.run(scenario()) == list(range(2307))


def test_a_row_never_grows_past_what_sqlite_can_hold(opened, path, monkeypatch):
    monkeypatch.setattr(sqlite, "ROW_BYTES", 1000)
    monkeypatch.setattr(sqlite, "TAKE_BYTES", 3000)
    written = [bytes([at]) * size for at, size in enumerate((1, 600, 600, 5000, 0, 999, 10, 10, 900))]

    async def scenario():
        log = opened(path)
        await append(log, "traffic", *written)
        consumer, found = log.consumer("w"), []
        while batch := await consumer.poll(1000, 0):
            found.append([message.value for message in batch.messages])
            await consumer.commit(batch, [], nothing)
        return found

    found = asyncio.run(scenario())

    assert [value for batch in found for value in batch] == written
    assert len(found) > 1  # what is held in memory at once is bounded, too


def test_a_batch_ends_with_a_stored_row_unless_its_first_row_is_longer(opened, path):
    async def scenario():
        log = opened(path)
        for size in (4, 4, 4):
            await append(log, "traffic", *[b"x"] * size)
        consumer, sizes = log.consumer("w"), []
        for limit in (3, 6, 6):
            batch = await consumer.poll(limit, 0)
            sizes.append(len(batch.messages))
            await consumer.commit(batch, [], nothing)
        return sizes

    assert asyncio.run(scenario()) == [3, 5, 4]


def test_a_batch_that_is_not_committed_keeps_its_partition_while_others_join(opened, path):
    now = [0.0]

    async def scenario():
        log = opened(path, clock=lambda: now[0])
        await append(log, "traffic", b"a", partition=3)  # the partition that is given away first
        busy, joining = log.consumer("busy"), log.consumer("joining")
        batch = await busy.poll(10, 0)
        assert await joining.poll(10, 0) is None
        now[0] += 2
        assert await busy.poll(10, 0) == batch
        assert await joining.poll(10, 0) is None
        await busy.commit(batch, [], nothing)

    asyncio.run(scenario())


# --- forgetting ----------------------------------------------------------------------------------------------


def test_no_byte_of_consumed_input_is_on_disk_after_forgetting(opened, path):
    async def scenario():
        log, other = opened(path), opened(path)
        for at in range(40):
            await append(log, "traffic", canary(at), canary(1000 + at) * 3000, partition=at % 4)
        assert len(in_files(path, clear=True)) == 80
        consumer = other.consumer("w")
        assert await drain(consumer) == 80
        assert await consumer.forget_consumed() == 80
        assert await consumer.forget_consumed() == 0
        assert in_files(path, clear=True) == set()
        assert path.with_name("log-traffic.db-wal").stat().st_size == 0
        assert await log.begin_offsets("traffic") == await log.end_offsets("traffic") == [20] * 4

    asyncio.run(scenario())


def test_a_row_that_is_partly_consumed_is_cut_to_its_remainder(opened, path):
    async def scenario():
        log = opened(path)
        await append(log, "traffic", *[canary(at) for at in range(100)])
        consumer = log.consumer("w")
        await consumer.commit(await consumer.poll(30, 0), [], nothing)
        assert await consumer.forget_consumed() == 30
        assert in_files(path, clear=True) == {canary(at) for at in range(30, 100)}
        assert await log.begin_offsets("traffic") == [30, 0, 0, 0]
        assert [one.offset for one in await log.read("traffic", 0, 0, 2)] == [30, 31]
        batch = await consumer.poll(1000, 0)
        assert [message.value for message in batch.messages] == [canary(at) for at in range(30, 100)]

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", [26, 56])
def test_pages_that_sqlite_rearranged_keep_no_copy_of_consumed_input(opened, path, seed):
    """The seeds are ones at which rows without a page of zeros in front leave copies behind."""
    chance = random.Random(seed)

    async def scenario():
        log = opened(path)
        consumer, unread, number = log.consumer("w"), set(), 0
        for _ in range(12):
            for _ in range(chance.randint(0, 12)):
                values = []
                for _ in range(chance.choice((1, 1, 1, 2, 5))):
                    number += 1
                    unread.add(canary(number))
                    values.append(canary(number) * chance.choice((1, 2, 8, 8, 30, 60)))
                stream = chance.choice(("traffic", "traffic.cdr"))
                batch = [Message(1, CANARY.match(value)[0], (), value) for value in values]
                await log.append([Output(stream, chance.randrange(4), batch)])
            for _ in range(chance.randint(0, 14)):
                batch = await consumer.poll(chance.choice((1, 3, 10, 100)), 0)
                if batch is not None:
                    await consumer.commit(batch, [], nothing)
                    unread -= {CANARY.match(message.value)[0] for message in batch.messages}
            await consumer.forget_consumed()
            assert in_files(path, clear=True) == unread

    asyncio.run(scenario())


def test_a_cut_waits_until_a_reader_is_out_of_its_way(opened, path, monkeypatch):
    monkeypatch.setattr(sqlite, "CHECKPOINT_WAIT_MS", 1)

    async def scenario():
        log = opened(path)
        await append(log, "content", canary(1))
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM rows").fetchall()

        async def leaves():  # begins once the cut has met the reader and waits
            reader.execute("ROLLBACK")
            reader.close()

        begins, _ = await asyncio.gather(log.cut("content", [1, 0, 0, 0]), leaves())
        assert begins[0] == 1
        assert canary(1) not in path.with_name("log.db-wal").read_bytes()

    asyncio.run(scenario())


def test_a_reader_that_blocks_the_checkpoint_delays_only_the_last_step(opened, path, monkeypatch):
    monkeypatch.setattr(sqlite, "CHECKPOINT_WAIT_MS", 1)

    async def scenario():
        log = opened(path)
        await append(log, "traffic", canary(1))
        consumer = log.consumer("w")
        await drain(consumer)
        reader = sqlite3.connect(path.with_name("log-traffic.db"), isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM rows").fetchall()
        with pytest.raises(LogBusy):
            await consumer.forget_consumed()
        reader.execute("ROLLBACK")
        reader.close()
        assert await consumer.forget_consumed() == 0

    asyncio.run(scenario())

    assert in_files(path, clear=True) == set()


# --- errors --------------------------------------------------------------------------------------------------


def one_line(error):
    return "\n" not in str(error) and ":" in error.message


@pytest.mark.parametrize("stream", ["verdicts", "audit", "cdr.anonymous", "suppressions"])
def test_what_was_cut_off_and_stood_clear_is_in_no_file(opened, path, stream):
    # Given rows of one message, of many, and longer than a page
    log = opened(path, partitions=1)
    for at in range(60):
        values = [
            b"<canary %06d>" % (100 * at + one) + b"." * (90_000 if at % 20 == 0 else 50) for one in range(at + 1)
        ]
        asyncio.run(log.append([Output(stream, 0, [Message(at, values[0][:15], (), value) for value in values])]))
    last = asyncio.run(log.end_offsets(stream))[0] - 60

    # When all but the last row is cut off, while another handle is open
    other = opened(path)
    begins = asyncio.run(log.cut(stream, [last]))

    # Then nothing of it is left but what SQLite moved within its pages, and the rest is whole
    left = asyncio.run(other.read(stream, 0, 0, 1000))
    assert begins == [last]
    assert len(left) == 60
    kept = {one.value[:15] for one in left}
    found = {hit for file in path.parent.iterdir() for hit in CANARY.findall(file.read_bytes())}
    assert kept <= found
    assert len(found - kept) <= 2
    assert path.with_name("log.db-wal").stat().st_size == 0


def test_others_write_while_a_long_cut_goes_on(opened, path, monkeypatch):
    monkeypatch.setattr(sqlite, "CUT_ROWS", 1)
    log, other = opened(path, partitions=1), opened(path)
    for at in range(40):
        asyncio.run(log.append([Output("content", 0, [Message(at, None, (), b"old")])]))
    drop, written = log._main.drop, []

    def dropped(*place):
        gone = drop(*place)
        other._main.db.execute("BEGIN IMMEDIATE")
        other._main.insert(Output("content", 0, [Message(0, None, (), b"new")]))
        other._main.db.execute("COMMIT")
        written.append(gone)
        return gone

    monkeypatch.setattr(log._main, "drop", dropped)
    asyncio.run(log.cut("content", [40]))
    assert sum(written) == 40
    assert [one.value for one in asyncio.run(other.read("content", 0, 0, 100))] == [b"new"] * len(written)


def test_a_reader_of_opt_outs_goes_on_over_what_was_cut_off(opened, path):
    # Given a reader that has seen the first of three
    log, other = opened(path, partitions=1), opened(path)
    tail = EntryTail(other, SUPPRESSIONS, 1)

    def give(token):
        key = f"1.{token:032x}|platform|all|sms|person|out".encode()
        value = b'{"event_at":"2026-11-21T10:00:00Z"}'
        asyncio.run(log.append([Output("suppressions", 0, [Message(0, key, (), value)])]))

    give(1)
    assert asyncio.run(tail.catch_up()) == 1
    for token in (2, 3):
        give(token)
    # When the first two are cut off / Then it takes the third, and keeps what it knows
    asyncio.run(log.cut("suppressions", [2]))
    assert asyncio.run(tail.catch_up()) == 1
    assert [tail.view.get(bytes.fromhex(f"{token:032x}")) is not None for token in (1, 2, 3)] == [True, False, True]


def test_a_log_that_is_not_there_is_made_only_on_request(opened, path):
    with pytest.raises(LogUnusable, match="no log here"):
        opened(path, create=False)

    assert not path.parent.exists()
    opened(path)
    opened(path, create=False)


@pytest.mark.parametrize("name", ["log.db", "log-traffic.db"])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(opened, path, name):
    asyncio.run(opened(path).close())
    path.with_name(name).write_bytes(b"no database " * 1000)

    with pytest.raises(LogUnusable) as caught:
        opened(path)

    assert one_line(caught.value)
    assert path.with_name(name).read_bytes() == b"no database " * 1000


def test_a_database_of_somebody_else_is_refused_and_left_as_it_is(opened, path):
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (x)")
    other.execute(f"PRAGMA user_version={sqlite.SCHEMA_VERSION}")
    other.close()
    before = path.read_bytes()

    with pytest.raises(LogUnusable, match="not a log") as caught:
        opened(path)

    assert one_line(caught.value)
    assert path.read_bytes() == before


def test_a_damaged_file_is_reported_as_such(opened, path):
    async def scenario():
        log = opened(path)
        for at in range(50):
            await append(log, "audit", b"x" * 20_000, b"%d" % at)
        await log.close()
        whole = path.read_bytes()
        page = sqlite.MAIN_PAGE_BYTES
        path.write_bytes(whole[:page] + b"\xff" * (len(whole) - page))
        await opened(path).read("audit", 0, 0, 1000)

    with pytest.raises(LogUnusable) as caught:
        asyncio.run(scenario())

    assert one_line(caught.value)


def test_a_damaged_row_is_reported_without_its_bytes(opened, path):
    async def scenario():
        log = opened(path)
        await append(log, "traffic", canary(1))
        log._traffic.db.execute("UPDATE rows SET body=?", (canary(2) * 4,))
        await log.consumer("w").poll(10, 0)

    with pytest.raises(LogUnusable) as caught:
        asyncio.run(scenario())

    assert one_line(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("table", ["log.db", "log-traffic.db"])
def test_a_log_of_another_version_is_refused(opened, path, table):
    asyncio.run(opened(path).close())
    file = sqlite3.connect(path.with_name(table))
    file.execute(f"PRAGMA user_version={sqlite.SCHEMA_VERSION + 1}")
    file.close()

    with pytest.raises(LogUnusable, match="another version"):
        opened(path)


@pytest.mark.parametrize(("lost", "message"), [("log-traffic.db", "missing"), ("log.db", "log is missing")])
def test_half_a_log_is_refused(opened, path, lost, message):
    async def scenario():
        log = opened(path)
        await append(log, "traffic", b"a")
        await log.close()

    asyncio.run(scenario())
    path.with_name(lost).unlink()

    for _ in range(2):
        with pytest.raises(LogUnusable, match=message):
            opened(path)


def test_the_clear_input_of_another_log_is_refused(opened, path, tmp_path):
    asyncio.run(opened(path).close())
    asyncio.run(opened(tmp_path / "log.db").close())
    (tmp_path / "log-traffic.db").replace(path.with_name("log-traffic.db"))

    with pytest.raises(LogUnusable, match="not of this log"):
        opened(path)


def test_a_log_whose_making_was_cut_short_is_made_to_the_end(opened, path):
    asyncio.run(opened(path).close())
    path.write_bytes(b"")

    log = opened(path)

    assert asyncio.run(log.consumer("w").at_end())


def test_unread_input_that_is_missing_is_reported(opened, path):
    async def scenario():
        log = opened(path)
        await append(log, "traffic", b"a", b"b")
        await append(log, "traffic", b"c")
        log._traffic.db.execute("DELETE FROM rows WHERE next_offset=2")
        await log.consumer("w").poll(10, 0)

    with pytest.raises(LogUnusable, match="missing") as caught:
        asyncio.run(scenario())

    assert caught.value.where == {"stream": "traffic", "partition": 0, "offset": 0}


@pytest.mark.parametrize("part", ["main", "traffic"])
def test_a_full_disk_writes_nothing_and_goes_on_once_there_is_space(opened, path, part):
    async def scenario():
        log = opened(path)
        consumer = log.consumer("w")
        await append(log, "traffic", b"a")
        batch = await consumer.poll(10, 0)
        big = Output("audit", 0, messages(b"x" * 500_000))
        calls = {
            "main": lambda: consumer.commit(batch, [Output("verdicts", 0, batch.messages), big], nothing),
            "traffic": lambda: log.append([Output("traffic", 0, big.messages)], ("f", Bookmark(1, 1, "d"))),
        }
        db = {"main": log._main, "traffic": log._traffic}[part].db
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages}")

        with pytest.raises(LogFull):
            await calls[part]()

        assert await log.end_offsets("verdicts") == [0] * 4
        assert await log.end_offsets("traffic") == [1, 0, 0, 0]
        assert await log.bookmark("f") is None
        assert not await consumer.at_end()
        db.execute("PRAGMA max_page_count=1000000")
        await calls[part]()
        assert await log.end_offsets("audit") == [part == "main", 0, 0, 0]
        assert await log.end_offsets("traffic") == [1 + (part == "traffic"), 0, 0, 0]

    asyncio.run(scenario())


# --- several processes ---------------------------------------------------------------------------------------


def _hold_locks(path, held, done):
    files = [sqlite3.connect(path.with_name(name)) for name in ("log.db", "log-traffic.db")]
    for file in files:
        file.execute("BEGIN IMMEDIATE")
    held.set()
    done.wait()
    for file in files:
        file.close()


def test_a_log_that_another_process_holds_is_busy_and_nothing_has_happened(opened, path):
    log = opened(path, busy_s=0.02)
    held, done = SPAWN.Event(), SPAWN.Event()

    async def scenario():
        consumer = log.consumer("w")
        await append(log, "traffic", b"a")
        batch = await consumer.poll(10, 0)
        other = SPAWN.Process(target=_hold_locks, args=(path, held, done))
        other.start()
        held.wait()
        for stream in ("traffic", "audit"):
            with pytest.raises(LogBusy):
                await append(log, stream, b"b")
        with pytest.raises(LogBusy):
            await consumer.commit(batch, [Output("verdicts", 0, batch.messages)], nothing)
        with pytest.raises(LogBusy):
            await log.consumer("new").poll(10, 0)
        done.set()
        other.join()
        assert await drain(consumer) == 1
        assert await log.end_offsets("traffic") == [1, 0, 0, 0]

    asyncio.run(scenario())


def _die_before_commit(path):
    async def scenario():
        log = SqliteLog.open(path)
        consumer = log.consumer("w")
        batch = await consumer.poll(10, 0)
        outputs = [Output("verdicts", 0, batch.messages)]
        await consumer.commit(batch, outputs, lambda: os.kill(os.getpid(), 9))

    asyncio.run(scenario())


def test_a_process_killed_at_the_last_moment_before_the_commit_leaves_nothing(opened, path):
    async def scenario():
        log = opened(path)
        await append(log, "traffic", b"a")
        process = SPAWN.Process(target=_die_before_commit, args=(path,))
        process.start()
        process.join()
        assert process.exitcode == -9
        assert await log.end_offsets("verdicts") == [0] * 4
        assert await drain(log.consumer("w")) == 1
        assert [one.value for one in await log.read("verdicts", 0, 0, 10)] == [b"a"]

    asyncio.run(scenario())


def _publish(path, name, count):
    async def scenario():
        log = SqliteLog.open(path)
        mark = Bookmark(0, 0, "")
        for at in range(count):
            outputs = [
                Output(stream, partition, messages(b"%s/%s/%d/%d" % (name, stream.encode(), partition, at)))
                for stream in ("traffic", "traffic.cdr")
                for partition in range(4)
            ]
            mark = Bookmark(at, at, "")
            await log.append(outputs, (name.decode(), mark))
        await log.close()

    asyncio.run(scenario())


def _consume(path, name, total):
    async def scenario():
        log = SqliteLog.open(path, lease_s=0.5)
        consumer = log.consumer(name)
        while sum([*await log.end_offsets("traffic"), *await log.end_offsets("traffic.cdr")]) < total or (
            not await consumer.at_end()
        ):
            batch = await consumer.poll(20, 0.02)
            if batch is None:
                continue
            try:
                await consumer.commit(batch, [Output("verdicts", batch.partition, batch.messages)], nothing)
            except Fenced:  # this process was slow; as a supervisor would, start anew
                consumer = log.consumer(name)
            with suppress(LogBusy):  # three others read: as the worker does, the next round tries again
                await consumer.forget_consumed()
        await consumer.close()
        await log.close()

    asyncio.run(scenario())


def test_processes_that_open_publish_and_consume_at_once_reconcile(opened, path):
    count = 40
    total = 2 * count * 8
    publishers = [(_publish, (path, name, count)) for name in (b"p1", b"p2")]
    consumers = [(_consume, (path, name, total)) for name in ("w1", "w2")]
    processes = [SPAWN.Process(target=target, args=args) for target, args in publishers + consumers]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    async def found():
        log = opened(path, create=False)
        assert await log.bookmark("p2") == Bookmark(count - 1, count - 1, "")
        ends = await log.end_offsets("verdicts")
        assert sum(ends) == total
        await log.consumer("last").forget_consumed()
        assert await log.begin_offsets("traffic") == await log.end_offsets("traffic")
        return [one.value for p in range(4) for one in await log.read("verdicts", p, 0, ends[p])]

    values = asyncio.run(found())

    assert [process.exitcode for process in processes] == [0] * 4
    assert len(set(values)) == total
    for name in (b"p1", b"p2"):  # order per publisher, stream and partition
        for stream in (b"traffic", b"traffic.cdr"):
            for partition in range(4):
                head = b"%s/%s/%d/" % (name, stream, partition)
                order = [int(value.rsplit(b"/", 1)[1]) for value in values if value.startswith(head)]
                assert order == list(range(count))
