"""The contract of the log: every implementation passes this suite unchanged (see conftest.py)."""

import asyncio
import functools

import pytest

from schemas.errors import Fenced, KeysChanged
from streams.log.protocol import Bookmark, Message, Output

HEADERS = (("role", b"controller"), ("policy", b"default/1"))


def run(test):
    """Run an async test to its end."""

    @functools.wraps(test)
    def wrapped(**fixtures):
        asyncio.run(test(**fixtures))

    return wrapped


def messages(*values, key=b"k"):
    return [Message(1_700_000_000_000 + at, key, HEADERS, value) for at, value in enumerate(values)]


def nothing():
    """Object to nothing."""


async def everything(log, stream):
    """Return all committed messages of a stream, partition by partition."""
    found = []
    for partition, begin in enumerate(await log.begin_offsets(stream)):
        page = await log.read(stream, partition, begin, 7)
        while page:
            found += page
            page = await log.read(stream, partition, page[-1].offset + 1, 7)
    return found


async def values(log, stream):
    return [stored.value for stored in await everything(log, stream)]


async def polled(logs, consumer, max_records=1000):
    batch = await consumer.poll(max_records, logs.poll_s)
    assert batch is not None
    return batch


def echo(batch, stream="verdicts"):
    """Return outputs that repeat a batch."""
    return [Output(stream, batch.partition, batch.messages)]


# --- append and read -----------------------------------------------------------------------------------------


@run
async def test_what_was_appended_is_read_by_every_handle(log_factory):
    log, other = log_factory.open(), log_factory.open()

    await log.append([Output("verdicts", 1, messages(b"a", b"b")), Output("audit", 0, messages(b"c"))])

    assert await values(log, "verdicts") == await values(other, "verdicts") == [b"a", b"b"]
    assert await values(other, "audit") == [b"c"]
    assert await other.read("verdicts", 0, 0, 10) == []


@run
async def test_a_message_comes_back_as_it_was_written(log_factory):
    log = log_factory.open()
    written = [
        Message(0, None, (), b""),
        Message(1_700_000_000_123, b"", HEADERS, b"\x00\xff\x95\n" * 5),
        Message(1, b"\x00\xff", (("empty", b""), ("twice", b"1"), ("twice", b"2"), ("ž", b"\x00")), b"\x00"),
        Message(4_000_000_000_000, b"k", HEADERS, b"x" * 300_000),
        Message(2, None, (*HEADERS,), b"\x00\x00"),
    ]

    await log.append([Output("cdr.pii", 3, written)])
    await log.append([Output("traffic", 3, written)])

    for stream in ("cdr.pii", "traffic"):
        found = await everything(log, stream)
        assert [Message(*one[3:]) for one in found] == written
        assert {one[:2] for one in found} == {(stream, 3)}


@run
async def test_a_batch_holds_the_messages_as_they_were_published(log_factory):
    log = log_factory.open()
    written = [Message(5, None, (), b""), Message(6, b"\x00", HEADERS, b"\xff")]
    await log.append([Output("traffic", 2, written)])

    batch = await polled(log_factory, log.consumer("w"))

    assert batch[:2] == ("traffic", 2)
    assert list(batch.messages) == written


@run
async def test_order_within_a_partition_is_the_order_of_writing(log_factory):
    log, other = log_factory.open(), log_factory.open()
    expected = []
    for at in range(30):
        piece = [b"%d/%d" % (at, one) for one in range(at % 5)]
        await (log, other)[at % 2].append([Output("content", 2, messages(*piece))])
        expected += piece

    assert await values(log, "content") == expected


@run
async def test_more_messages_than_a_stored_row_holds_stay_in_order(log_factory):
    log = log_factory.open()
    expected = [b"%d" % at for at in range(2_500)]
    await log.append([Output("traffic", 0, messages(*expected))])

    consumer = log.consumer("w")
    found = []
    while batch := await consumer.poll(700, log_factory.poll_s):
        assert 0 < len(batch.messages) <= 700
        found += [message.value for message in batch.messages]
        await consumer.commit(batch, [], nothing)

    assert found == expected


@run
async def test_offsets_of_one_append_follow_each_other_and_rise_over_appends(log_factory):
    log = log_factory.open()
    await log.append([Output("audit", 1, messages(b"a", b"b", b"c"))])
    await log.append([Output("audit", 1, messages(b"d"))])

    offsets = [stored.offset for stored in await everything(log, "audit")]

    assert offsets[:3] == list(range(offsets[0], offsets[0] + 3))
    assert offsets[3] > offsets[2]
    assert (await log.begin_offsets("audit"))[1] <= offsets[0]
    assert (await log.end_offsets("audit"))[1] > offsets[3]


@run
async def test_a_stream_without_messages_begins_and_ends_at_the_same_offsets(log_factory):
    log = log_factory.open()

    for stream in ("traffic", "held"):
        assert len(await log.begin_offsets(stream)) == log.partitions
        assert await log.begin_offsets(stream) == await log.end_offsets(stream)
        assert await everything(log, stream) == []


@run
async def test_read_gives_no_more_than_the_limit_and_starts_at_the_offset(log_factory):
    log = log_factory.open()
    await log.append([Output("review", 0, messages(b"a", b"b", b"c", b"d"))])
    first = (await log.read("review", 0, 0, 1))[0].offset

    assert [one.value for one in await log.read("review", 0, first + 1, 2)] == [b"b", b"c"]
    assert await log.read("review", 0, first, 0) == []


@run
async def test_an_append_that_fails_writes_nothing(log_factory):
    log = log_factory.open()
    good = Output("verdicts", 0, messages(b"a"))

    for bad in (Output("verdicts", log.partitions, messages(b"b")), Output("verdicts", -1, messages(b"b"))):
        with pytest.raises(ValueError):
            await log.append([good, bad])
    with pytest.raises(ValueError):
        await log.append([good, Output("traffic", 0, messages(b"b"))])

    assert await values(log, "verdicts") == []
    assert await values(log, "traffic") == []


# --- bookmarks -----------------------------------------------------------------------------------------------


@run
async def test_a_bookmark_is_written_moved_and_deleted_with_the_messages(log_factory):
    log, other = log_factory.open(), log_factory.open()
    assert await log.bookmark("file") is None

    await log.append([Output("traffic.cdr", 0, messages(b"a"))], ("file", Bookmark(10, 1, "d1")))
    assert await other.bookmark("file") == Bookmark(10, 1, "d1")
    await log.append([Output("traffic.cdr", 1, messages(b"b"))], ("file", Bookmark(20, 2, "d2")))
    await log.append([], ("another", Bookmark(5, 5, "x")))
    assert await other.bookmark("file") == Bookmark(20, 2, "d2")
    await log.append([Output("traffic", 1, messages(b"c"))], ("file", None))

    assert await other.bookmark("file") is None
    assert await other.bookmark("another") == Bookmark(5, 5, "x")
    assert await values(log, "traffic.cdr") == [b"a", b"b"]


@run
async def test_a_bookmark_does_not_move_when_the_messages_are_not_written(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))], ("file", Bookmark(1, 1, "d1")))
    unwritable = Message(0, None, (), object())

    with pytest.raises(Exception):  # noqa: B017 (each implementation has its own words for what is no bytes)
        await log.append(
            [Output("traffic", 0, messages(b"b")), Output("traffic", 1, [unwritable])],
            ("file", Bookmark(2, 2, "d2")),
        )

    assert await log.bookmark("file") == Bookmark(1, 1, "d1")
    assert await values(log, "traffic") == [b"a"]


# --- consuming -----------------------------------------------------------------------------------------------


@run
async def test_a_batch_that_was_not_committed_comes_again(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a", b"b"))])
    consumer = log.consumer("w")

    first = await polled(log_factory, consumer)
    again = await polled(log_factory, consumer)

    assert again == first


@run
async def test_a_batch_that_was_committed_is_visible_and_does_not_come_again(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a", b"b"))])
    consumer = log.consumer("w")

    batch = await polled(log_factory, consumer)
    await consumer.commit(batch, [*echo(batch), Output("audit", 3, messages(b"x"))], nothing)

    assert await values(other, "verdicts") == [b"a", b"b"]
    assert await values(other, "audit") == [b"x"]
    assert await consumer.poll(1000, log_factory.poll_s) is None


@run
async def test_a_batch_may_be_committed_without_outputs(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    consumer = log.consumer("w")

    await consumer.commit(await polled(log_factory, consumer), [], nothing)

    assert await consumer.at_end()


@run
async def test_nothing_is_visible_before_the_commit(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    consumer = log.consumer("w")
    batch = await polled(log_factory, consumer)
    called = []

    await consumer.commit(batch, echo(batch), lambda: called.append(True))

    assert called == [True]
    assert await values(other, "verdicts") == [b"a"]


@run
async def test_a_check_that_objects_leaves_nothing_and_the_batch_comes_again(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    consumer = log.consumer("w")
    batch = await polled(log_factory, consumer)

    def objects():
        raise KeysChanged

    with pytest.raises(KeysChanged):
        await consumer.commit(batch, echo(batch), objects)

    assert await values(log, "verdicts") == await values(other, "verdicts") == []
    assert not await consumer.at_end()
    again = await polled(log_factory, consumer)
    assert again.messages == batch.messages
    await consumer.commit(again, echo(again), nothing)
    assert await values(other, "verdicts") == [b"a"]


@run
async def test_a_commit_whose_outputs_cannot_be_written_leaves_nothing(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    consumer = log.consumer("w")
    batch = await polled(log_factory, consumer)

    with pytest.raises(ValueError):
        await consumer.commit(batch, [*echo(batch), Output("audit", log.partitions, messages(b"x"))], nothing)

    assert await values(log, "verdicts") == []
    assert not await consumer.at_end()


@run
async def test_an_input_stream_is_no_output(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    consumer = log.consumer("w")
    batch = await polled(log_factory, consumer)

    with pytest.raises(ValueError):
        await consumer.commit(batch, echo(batch, "traffic.cdr"), nothing)

    assert await values(log, "traffic.cdr") == []


@run
async def test_a_batch_that_is_not_the_next_one_is_fenced(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a", b"b"))])
    consumer = log.consumer("w")
    batch = await polled(log_factory, consumer)
    await consumer.commit(batch, echo(batch), nothing)

    with pytest.raises(Fenced):
        await consumer.commit(batch, echo(batch), nothing)

    assert await values(log, "verdicts") == [b"a", b"b"]


@run
async def test_traffic_is_polled_before_cdrs(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic.cdr", partition, messages(b"late")) for partition in range(4)])
    await log.append([Output("traffic", partition, messages(b"now")) for partition in range(4)])
    consumer = log.consumer("w")
    streams = []

    while batch := await consumer.poll(1000, log_factory.poll_s):
        streams.append(batch.stream)
        await consumer.commit(batch, [], nothing)
        if len(streams) == 6:  # somebody opts out while the night's file is under way
            await log.append([Output("traffic", 1, messages(b"stop"))])

    assert streams == ["traffic"] * 4 + ["traffic.cdr"] * 2 + ["traffic"] + ["traffic.cdr"] * 2


@run
async def test_no_partition_is_starved_by_another(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", partition, messages(*[b"x"] * 20)) for partition in range(4)])
    consumer = log.consumer("w")
    served = []

    for _ in range(8):
        batch = await polled(log_factory, consumer, max_records=5)
        served.append(batch.partition)
        await consumer.commit(batch, [], nothing)

    assert sorted(served) == [0, 0, 1, 1, 2, 2, 3, 3]


@run
async def test_a_restart_goes_on_at_the_committed_offset(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a", b"b", b"c"))])
    consumer = log.consumer("w")
    batch = await polled(log_factory, consumer, max_records=2)
    await consumer.commit(batch, echo(batch), nothing)
    await consumer.close()
    await log.close()

    log = log_factory.open()
    batch = await polled(log_factory, log.consumer("w"))

    assert [message.value for message in batch.messages] == [b"c"]


@run
async def test_at_end_is_true_once_everything_is_committed_by_whichever_worker(log_factory):
    log, other = log_factory.open(), log_factory.open()
    consumer, watcher = log.consumer("a"), other.consumer("b")
    assert await watcher.at_end()

    await log.append([Output("traffic", 0, messages(b"a")), Output("traffic.cdr", 1, messages(b"b"))])
    ends = [await watcher.at_end()]
    while batch := await consumer.poll(1000, log_factory.poll_s):
        await consumer.commit(batch, [], nothing)
        ends.append(await watcher.at_end())

    assert ends == [False, False, True]


# --- several consumers ---------------------------------------------------------------------------------------


@run
async def test_two_consumers_share_the_partitions_and_each_message_is_committed_once(log_factory):
    log, other = log_factory.open(), log_factory.open()
    consumers = {"a": log.consumer("a"), "b": other.consumer("b")}
    expected = sorted(b"%d/%d" % (partition, at) for partition in range(4) for at in range(60))
    for stream, half in (("traffic", 0), ("traffic.cdr", 1)):
        outputs = [
            Output(stream, p, messages(*[b"%d/%d" % (p, at) for at in range(60) if at % 2 == half])) for p in range(4)
        ]
        await log.append(outputs)
    served = {"a": set(), "b": set()}

    while not await consumers["a"].at_end():
        for name, consumer in consumers.items():
            batch = await consumer.poll(4, log_factory.poll_s)
            if batch is not None:
                served[name].add(batch.partition)
                await consumer.commit(batch, echo(batch), nothing)
        log_factory.heartbeats_due()

    assert sorted(await values(log, "verdicts")) == expected
    assert all(served.values())


@run
async def test_the_partitions_of_a_closed_consumer_are_taken_at_once(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", partition, messages(b"%d" % partition)) for partition in range(4)])
    leaving, staying = log.consumer("a"), other.consumer("b")
    batch = await polled(log_factory, leaving)
    assert await staying.poll(1000, log_factory.poll_s) is None

    await leaving.close()
    await leaving.close()
    while taken := await staying.poll(1000, log_factory.poll_s):
        await staying.commit(taken, echo(taken), nothing)

    assert sorted(await values(log, "verdicts")) == [b"0", b"1", b"2", b"3"]
    with pytest.raises(Fenced):
        await leaving.commit(batch, echo(batch), nothing)
    with pytest.raises(ValueError):
        await leaving.poll(1000, 0)


@run
async def test_a_zombie_is_fenced_once_its_partition_is_claimed(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    zombie, heir = log.consumer("zombie"), other.consumer("heir")
    held = await polled(log_factory, zombie)

    log_factory.leases_run_out()
    taken = await polled(log_factory, heir)
    assert taken.messages == held.messages
    with pytest.raises(Fenced):  # already before the heir commits
        await zombie.commit(held, [Output("verdicts", 0, messages(b"zombie"))], nothing)
    await heir.commit(taken, echo(taken), nothing)
    with pytest.raises(Fenced):
        await zombie.commit(held, [Output("verdicts", 0, messages(b"zombie"))], nothing)

    assert await values(log, "verdicts") == [b"a"]


@run
async def test_a_consumer_that_takes_the_id_of_another_fences_it(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    before, after = log.consumer("w"), other.consumer("w")
    held = await polled(log_factory, before)

    taken = await polled(log_factory, after)

    assert taken.messages == held.messages
    with pytest.raises(Fenced):
        await before.commit(held, echo(held), nothing)
    await after.commit(taken, echo(taken), nothing)
    assert await values(log, "verdicts") == [b"a"]


@run
async def test_a_consumer_that_polls_keeps_its_partitions_for_longer_than_a_lease(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])
    steady, hopeful = log.consumer("steady"), other.consumer("hopeful")
    batch = await polled(log_factory, steady)

    for _ in range(10):
        log_factory.heartbeats_due()
        batch = await polled(log_factory, steady)
    assert await hopeful.poll(1000, log_factory.poll_s) is None

    await steady.commit(batch, echo(batch), nothing)
    assert await values(log, "verdicts") == [b"a"]


# --- forgetting ----------------------------------------------------------------------------------------------


@run
async def test_forgetting_keeps_what_is_not_committed(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a", b"b", b"c")), Output("traffic", 1, messages(b"d"))])
    consumer = log.consumer("w")
    batch = await polled(log_factory, consumer, max_records=2)
    await consumer.commit(batch, echo(batch), nothing)
    end = await log.end_offsets("traffic")

    await other.consumer("another").forget_consumed()
    await consumer.forget_consumed()
    await log.append([Output("traffic", 0, messages(b"e"))])

    assert (await log.end_offsets("traffic"))[1:] == end[1:]
    left = []
    while batch := await consumer.poll(1000, log_factory.poll_s):
        left += [message.value for message in batch.messages]
        await consumer.commit(batch, echo(batch), nothing)
    assert sorted(left) == [b"c", b"d", b"e"]
    assert sorted(await values(log, "verdicts")) == [b"a", b"b", b"c", b"d", b"e"]


# --- cutting -------------------------------------------------------------------------------------------------


@run
async def test_what_was_cut_off_is_read_by_nobody_and_a_reader_goes_on_at_the_new_beginning(log_factory):
    log, other = log_factory.open(), log_factory.open()
    for piece in (b"a", b"b", b"c"):
        await log.append([Output("content", 1, messages(piece, piece.upper())), Output("content", 2, messages(piece))])
    old = await log.begin_offsets("content")
    third = (await everything(log, "content"))[4]

    begins = await other.cut("content", [0, third.offset, 0, 0])

    assert begins == await log.begin_offsets("content") == [old[0], third.offset, old[2], old[3]]
    for one in (log, other):
        assert await values(one, "content") == [b"c", b"C", b"a", b"b", b"c"]
        assert [stored.value for stored in await one.read("content", 1, old[1], 10)] == [b"c", b"C"]


@run
async def test_a_cut_never_takes_a_message_at_or_behind_its_offset(log_factory):
    log = log_factory.open()
    await log.append([Output("content", 0, messages(*[b"%d" % at for at in range(2_500)]))])
    fifteenth = (await log.read("content", 0, 0, 2000))[1500]

    begins = await log.cut("content", [fifteenth.offset, 0, 0, 0])

    left = await values(log, "content")
    assert begins[0] <= fifteenth.offset
    assert left == [b"%d" % at for at in range(2_500 - len(left), 2_500)]
    assert 1_000 <= len(left) < 2_500


@run
async def test_cutting_again_or_before_the_beginning_changes_nothing(log_factory):
    log = log_factory.open()
    await log.append([Output("audit", 1, messages(b"a"))])
    await log.append([Output("audit", 1, messages(b"b"))])
    at = (await everything(log, "audit"))[1].offset

    begins = await log.cut("audit", [0, at, 0, 0])

    assert await log.cut("audit", [0, at, 0, 0]) == begins
    assert await log.cut("audit", [0, 0, 0, 0]) == begins
    assert await values(log, "audit") == [b"b"]


@run
async def test_a_stream_may_be_cut_to_its_end_and_goes_on_from_there(log_factory):
    log, other = log_factory.open(), log_factory.open()
    await log.append([Output("review", 0, messages(b"a", b"b"))])
    ends = await log.end_offsets("review")

    assert await log.cut("review", ends) == ends
    await other.append([Output("review", 0, messages(b"c"))])

    (found,) = await everything(log, "review")
    assert found.value == b"c"
    assert found.offset >= ends[0]


@run
async def test_an_input_stream_is_not_cut(log_factory):
    log = log_factory.open()
    await log.append([Output("traffic", 0, messages(b"a"))])

    for stream in ("traffic", "traffic.cdr"):
        with pytest.raises(ValueError, match="input"):
            await log.cut(stream, [1, 1, 1, 1])

    assert await values(log, "traffic") == [b"a"]


@run
async def test_closing_twice_is_closing(log_factory):
    log = log_factory.open()

    await log.close()
    await log.close()
