"""The audit stream: chains of entries, their heads in the key store, and the signed checkpoints over both."""

import asyncio
import json
from hashlib import sha256

import pytest

from processors.evidence import NO_ENTRY, Chains, Code, expected, verifies
from schemas.errors import KeysBusy, LogBusy
from streams.keys.audit import Auditor
from streams.log.sqlite import SqliteLog
from streams.officer import evidence
from tests.support.audit import edit_audit
from tests.support.commands import SHORT_LEASE, Place, ago, one_line
from tests.support.records import sms_cdr


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    made.publish(sms_cdr(record_id="a1", occurred_at=ago()), sms_cdr(record_id="a2", occurred_at=ago()))
    assert made.work() == 2
    yield made
    made.close()


def auditor(deployment, name="ana"):
    return Auditor(deployment.log, deployment.store.ledger, deployment.planner, name)


def write(place, *names, **fields):
    """Write an entry for each of the names, by one writer."""

    async def inside(deployment):
        one = auditor(deployment)
        for name in names:
            await one.write(name, reason="CASE-1", **fields)

    place.within(inside)


def found(place):
    """Return what following all chains of the log comes to."""

    async def inside(deployment):
        heads = {(one.writer, one.seq): one.digest for one in deployment.store.ledger.heads()}
        chains = Chains([0] * deployment.log.partitions, heads)
        for partition, end in enumerate(await deployment.log.end_offsets("audit")):
            for stored in await deployment.log.read("audit", partition, 0, end):
                chains.add(partition, stored.offset, stored.value)
        chains.finish()
        return [one.code for one in chains.findings.kept]

    return place.within(inside)


def heads(place):
    async def inside(deployment):
        return deployment.store.ledger.heads()

    return place.within(inside)


def checkpoint(place):
    return place.within(evidence.checkpoint)


def codes(made):
    return [one.code for one in made.checkpoint.findings]


# --- chains ------------------------------------------------------------------------------------------------------


def test_the_entries_of_a_writer_are_a_chain_and_its_head_is_in_the_key_store(place):
    write(place, "one", "two", "three")
    values = [stored.value for stored in place.stored("audit")]
    entries = [json.loads(value) for value in values]
    assert [entry["seq"] for entry in entries] == [1, 2, 3]
    assert len({entry["writer"] for entry in entries}) == 1
    digests = [sha256(value).hexdigest() for value in values]
    assert [entry["prev"] for entry in entries] == [NO_ENTRY, *digests[:2]]
    (head,) = heads(place)
    assert (head.writer, head.seq, head.digest) == (entries[0]["writer"], 3, digests[2])
    assert found(place) == []


def test_every_process_and_every_auditor_has_a_chain_of_its_own(place):
    write(place, "one")
    write(place, "two")
    assert len({one["writer"] for one in place.values("audit")}) == 2
    assert [one["seq"] for one in place.values("audit")] == [1, 1]
    assert len(heads(place)) == 2


def test_tasks_that_write_at_once_keep_one_chain(place):
    async def inside(deployment):
        one = auditor(deployment)
        await asyncio.gather(*(one.write(f"n{at}") for at in range(20)))

    place.within(inside)
    assert sorted(one["seq"] for one in place.values("audit")) == list(range(1, 21))
    assert found(place) == []


def broken(deployment, *, written):
    """Have the next append fail, after it wrote or before."""
    append = deployment.log.append

    async def fails(outputs):
        deployment.log.append = append
        if written:
            await append(outputs)
        raise LogBusy

    deployment.log.append = fails


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_after_an_append_that_failed_a_new_chain_begins_whether_or_not_it_was_written(place, written, before):
    async def inside(deployment):
        one = auditor(deployment)
        for _ in range(before):
            await one.write("before")
        for _ in range(2):  # twice in a row
            broken(deployment, written=written)
            with pytest.raises(LogBusy):
                await one.write("lost")
        await one.write("after")
        await one.write("after")

    place.within(inside)
    assert found(place) == []
    entries = place.values("audit")
    assert [entry["action"] for entry in entries].count("lost") == (2 if written else 0)
    assert [entry["seq"] for entry in entries if entry["action"] == "after"] == [1, 2]
    first = next(entry for entry in entries if entry["action"] == "after")
    if before:
        assert first["after"] == {"writer": entries[0]["writer"], "seq": before}
    assert "after" not in entries[-1]
    assert codes(checkpoint(place)) == []


def test_an_append_that_was_cancelled_counts_as_one_that_failed(place):
    async def inside(deployment):
        one = auditor(deployment)
        await one.write("before")
        append, stuck = deployment.log.append, asyncio.Event()

        async def hangs(outputs):
            await append(outputs)
            stuck.set()
            await asyncio.Event().wait()

        deployment.log.append = hangs
        task = asyncio.create_task(one.write("lost"))
        await stuck.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        deployment.log.append = append
        await one.write("after")

    place.within(inside)
    assert len({one["writer"] for one in place.values("audit")}) == 2
    assert found(place) == []


def test_a_chain_that_its_writer_had_given_up_may_not_go_on(place):
    async def inside(deployment):
        old, new = auditor(deployment), auditor(deployment)
        await old.write("one")
        new._after = {"writer": old._writer, "seq": 1}
        await new.write("instead")
        await old.write("may be there")
        await old.write("cannot be there")

    place.within(inside)
    assert found(place) == [Code.WENT_ON]


def test_an_entry_is_durable_before_its_head_and_without_a_head_nobody_goes_on(place):
    async def inside(deployment):
        one, ledger = auditor(deployment), deployment.store.ledger
        put, seen = ledger.put_head, []

        def fails(_):
            seen.append(place.row("SELECT count(*) FROM rows WHERE stream='audit'"))
            raise KeysBusy

        ledger.put_head = fails
        with pytest.raises(KeysBusy):
            await one.write("one")
        assert seen == [(1,)]
        ledger.put_head = put
        await one.write("two")

    place.within(inside)
    # the entry is there, so the chain goes on behind it
    assert [one["seq"] for one in place.values("audit")] == [1, 2]
    assert found(place) == []


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_every_head_that_is_new_and_the_key_store_forgets_them(place):
    write(place, "one", "two")
    write(place, "three")
    wanted = {(one.writer, one.seq, one.digest) for one in heads(place)}
    made = checkpoint(place)
    assert set(made.checkpoint.heads) == wanted
    assert (codes(made), made.checkpoint.entries, made.checkpoint.number) == ([], 3, 1)
    assert made.checkpoint.previous == ()
    # what is left is the head of the checkpoint's own entry
    (own,) = heads(place)
    entry = place.values("audit")[-1]
    assert (own.writer, entry["action"]) == (entry["writer"], "checkpoint")


def test_a_checkpoint_names_the_one_before_it_and_covers_what_came_since(place):
    write(place, "one")
    first = checkpoint(place)
    write(place, "two")
    second = checkpoint(place)
    assert second.checkpoint.previous == (first.checkpoint.digest,)
    assert second.checkpoint.since == first.checkpoint.upto
    assert second.checkpoint.number == 2
    assert second.checkpoint.entries == 2  # and the checkpoint's own
    assert codes(second) == []


def test_where_there_is_nothing_new_there_is_no_new_checkpoint_for_a_day(place, monkeypatch):
    write(place, "one")
    first = checkpoint(place)
    ends = place.ends("audit")
    assert checkpoint(place) == first
    assert place.ends("audit") == ends
    now = evidence.time.time
    monkeypatch.setattr(evidence.time, "time", lambda: now() + evidence.DAY_S + 2)
    assert checkpoint(place).checkpoint.number == 2


def test_a_checkpoint_is_signed_with_a_key_that_is_made_once(place):
    async def inside(deployment):
        keys = [await evidence.signing_key(deployment.store) for _ in range(2)]
        return await evidence.checkpoint(deployment), [key.public_key() for key in keys]

    write(place, "one")
    made, (key, again) = place.within(inside)
    assert key.public_bytes_raw() == again.public_bytes_raw()
    assert verifies(key, made)
    other = made.checkpoint.__class__(
        **{**{n: getattr(made.checkpoint, n) for n in made.checkpoint.__struct_fields__}, "entries": 9}
    )
    assert not verifies(key, type(made)(other, made.signature))


def test_two_checkpoints_at_once_do_no_harm_and_the_next_one_names_both(place):
    write(place, "one")

    async def both(deployment):
        one, other = evidence.checkpoint(deployment), evidence.checkpoint(deployment)
        return await asyncio.gather(one, other)

    place.within(lambda deployment: evidence.signing_key(deployment.store))
    made = place.within(both)
    write(place, "two")
    third = checkpoint(place)
    unnamed = {one.checkpoint.digest for one in made} - {d for one in made for d in one.checkpoint.previous}
    assert set(third.checkpoint.previous) == unnamed
    assert codes(third) == []


@pytest.mark.parametrize("step", ["drop_head", "put_secret"])
def test_killed_half_way_the_next_checkpoint_finds_nothing_wrong(place, step):
    write(place, "one", "two")
    checkpoint(place)
    write(place, "three")

    async def killed(deployment):
        class Killed(Exception):
            pass

        def dies(*_):
            raise Killed

        setattr(deployment.store.ledger if step == "drop_head" else deployment.store, step, dies)
        with pytest.raises(Killed):
            await evidence.checkpoint(deployment)

    place.within(killed)
    write(place, "four")
    made = checkpoint(place)
    assert codes(made) == []
    assert len(made.checkpoint.previous) == 1  # the one that nobody noted, which names the first


def test_a_head_that_comes_after_the_checkpoint_that_has_it_is_no_finding(place):
    write(place, "one")
    (late,) = heads(place)
    checkpoint(place)
    for _ in range(2):  # however late it comes

        async def put(deployment):
            deployment.store.ledger.put_head(late)

        place.within(put)
        write(place, "more")
        assert codes(checkpoint(place)) == []
    assert late.writer not in {one.writer for one in heads(place)}


def test_many_heads_are_cut_into_several_checkpoints(place, monkeypatch):
    monkeypatch.setattr(evidence, "MAX_HEADS", 2)
    for at in range(5):
        write(place, f"n{at}")
    last = checkpoint(place)
    made = [value["checkpoint"] for value in place.values("audit") if value["action"] == "checkpoint"]
    assert [len(one["heads"]) for one in made] == [2, 2, 1]
    assert last.checkpoint.number == 3
    assert [one["upto"] == one["since"] for one in made] == [True, True, False]
    write(place, "more")
    assert codes(checkpoint(place)) == []


# --- a log that was edited by hand -------------------------------------------------------------------------------


def changed(values):
    return [values[0], values[1].replace(b"CASE-1", b"CASE-2"), *values[2:]]


EDITS = {
    "an entry changed": (changed, {Code.CHANGED}),
    "an entry taken out": (lambda values: [values[0], *values[2:]], {Code.MISSING}),
    "the last entry changed": (lambda values: [*values[:-1], values[-1].replace(b"CASE-1", b"CASE-2")], {Code.CHANGED}),
    "the tail cut off": (lambda values: values[:-1], {Code.MISSING}),
    "two entries the other way round": (
        lambda values: [values[0], values[2], values[1], *values[3:]],
        {Code.MISSING, Code.OUT_OF_ORDER},
    ),
    "an entry twice": (lambda values: [*values[:2], values[1], *values[2:]], {Code.OUT_OF_ORDER}),
    "something else put in": (lambda values: [*values, b"{}"], {Code.NOT_AN_ENTRY}),
    "nothing left of one": (lambda values: [*values[:-1], b""], {Code.NOT_AN_ENTRY, Code.MISSING}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_whatever_is_edited_in_the_log_the_next_checkpoint_says_so_once_and_goes_on(place, edit):
    change, wanted = EDITS[edit]
    write(place, "one", "two", "three", "four")
    edit_audit(place, change)
    made = checkpoint(place)
    assert set(codes(made)) == wanted
    # it is signed and durable, and the next one has nothing to add
    (noted,) = (value["checkpoint"] for value in place.values("audit") if value and value.get("checkpoint"))
    assert {one["code"] for one in noted["findings"]} == wanted
    write(place, "five")
    assert codes(checkpoint(place)) == []


def test_a_log_rolled_back_to_before_a_checkpoint_is_seen_by_the_next_one(place):
    write(place, "one")
    write(place, "two", "three")
    checkpoint(place)
    edit_audit(place, lambda values: values[:1])
    write(place, "in its place")
    assert Code.SHORTER in codes(checkpoint(place))
    write(place, "more")
    assert codes(checkpoint(place)) == []


def test_the_beginning_of_a_chain_cannot_be_taken_out_before_the_next_checkpoint(place):
    """Its head is in the key store and its last entry in the log; the checkpoint before knows nothing of it."""
    write(place, "one")
    checkpoint(place)
    write(place, "many", "many", "last")
    edit_audit(place, lambda values: [value for value in values if b'"action":"many"' not in value])
    assert [one["action"] for one in place.values("audit") if one["action"] != "checkpoint"] == ["one", "last"]
    assert codes(checkpoint(place)) == [Code.MISSING]
    write(place, "five")
    assert codes(checkpoint(place)) == []


def test_a_process_that_opened_nothing_for_several_checkpoints_goes_on_without_a_finding(place):
    async def inside(deployment):
        made, one = [], auditor(deployment)
        await one.write("one")
        for name in ("two", "three", "four"):
            await auditor(deployment).write(name)
            made.append(await evidence.checkpoint(deployment))
        await one.write("two")
        made.append(await evidence.checkpoint(deployment))
        return [code for each in made for code in codes(each)]

    assert place.within(inside) == []


def test_an_emptied_audit_is_seen(place):
    write(place, "one")
    checkpoint(place)
    edit_audit(place, lambda _: [])
    assert {Code.NO_CHECKPOINT, Code.MISSING} <= set(codes(checkpoint(place)))


def test_a_checkpoint_that_nobody_signed_counts_for_nothing(place):
    write(place, "one")
    checkpoint(place)

    async def forge(deployment):
        fields = json.loads((await deployment.log.read("audit", *await _last(deployment), 1))[0].value)
        fields["checkpoint"]["entries"] = 99
        await auditor(deployment).write("checkpoint", checkpoint=fields["checkpoint"], signature=fields["signature"])

    async def _last(deployment):
        ends = await deployment.log.end_offsets("audit")
        for partition, end in enumerate(ends):
            for stored in await deployment.log.read("audit", partition, 0, end):
                if b'"action":"checkpoint"' in stored.value:
                    return partition, stored.offset
        raise AssertionError

    place.within(forge)
    made = checkpoint(place)
    assert codes(made) == [Code.SIGNATURE]
    assert len(made.checkpoint.previous) == 1


def test_an_edited_log_stops_nobody_from_opening(place):
    """Who can edit the log could else stop the traffic; checkpoints, reports and alerts say so instead."""
    write(place, "one", "two", "three", "four")
    edit_audit(place, changed)
    assert place.opened("cdr.pii")
    assert found(place) == [Code.CHANGED]


def test_if_the_log_cannot_be_read_there_is_no_checkpoint(place, monkeypatch):
    write(place, "one")

    async def blind(*_):
        raise LogBusy

    monkeypatch.setattr(SqliteLog, "read", blind)
    with pytest.raises(LogBusy):
        checkpoint(place)
    monkeypatch.undo()
    assert [one["action"] for one in place.values("audit")] == ["one"]


# --- what checkpoints say together -------------------------------------------------------------------------------


def test_an_entry_that_was_put_in_behind_a_checkpoint_is_known_to_none(place):
    write(place, "one")
    made = checkpoint(place)
    bodies = [made.checkpoint]
    said = expected(bodies, [0, 0, 0, 0])
    chains = Chains([0, 0, 0, 0], said.wanted, said.known)
    first = place.stored("audit")[0]
    chains.add(0, 0, first.value)
    chains.add(0, 1, json.dumps({**json.loads(first.value), "writer": "ab" * 16}).encode())
    chains.finish(said.listed)
    assert [(one.code, one.writer) for one in chains.findings.kept] == [(Code.UNLISTED, "ab" * 16)]


def test_retention_runs_write_checkpoints(place):
    """H6a's job calls `evidence.checkpoint`; here it is seen that the command does."""
    write(place, "one")
    done = place.call("retention", "run", "--json")
    assert done.status == 0, one_line(done)
    assert "checkpoint" in {value["action"] for value in place.values("audit")}
