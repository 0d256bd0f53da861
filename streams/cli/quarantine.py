"""`streamveil quarantine list|replay|discard`: records that could not be understood."""

import argparse
import asyncio
import time
from typing import TYPE_CHECKING

from schemas.catalog import INPUTS
from schemas.errors import InputInvalid
from streams.cli.common import print_json, print_table, say
from streams.config import load

if TYPE_CHECKING:
    from streams.log.protocol import Log
    from streams.quarantine import Entry


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `quarantine`."""
    noun = subparsers.add_parser("quarantine", help="records that could not be understood: list, replay, discard")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="list|replay|discard")
    listing = verbs.add_parser("list", help="show what is not resolved; nothing of its content")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    listing.set_defaults(run=_list)
    replaying = verbs.add_parser("replay", help="send records back to the stream they came from; logged to audit")
    replaying.set_defaults(run=_replay)
    discarding = verbs.add_parser("discard", help="take records off the list; they stay sealed and die in time; logged")
    discarding.set_defaults(run=_discard)
    for verb in (replaying, discarding):
        verb.add_argument("--all", action="store_true", help="everything that is not resolved")
        verb.add_argument(
            "--stream",
            choices=("quarantine", *INPUTS),
            default="quarantine",
            help="whose partition and offset: where it lies (quarantine, the default) or came from",
        )
        verb.add_argument("--partition", type=int, metavar="P")
        verb.add_argument("--offset", type=int, metavar="N")
        verb.add_argument("--reason", metavar="REASON", required=True, help="a code or case reference")


def _list(args: argparse.Namespace) -> int:
    return asyncio.run(_show(args))


async def _show(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment
    from streams.quarantine import entries

    async with Deployment.open(load(args), create=False) as deployment:
        found = await entries(deployment.log)
    now_s = time.time()
    if args.json:
        for entry in found:
            print_json(
                {
                    "partition": entry.place.partition,
                    "offset": entry.place.offset,
                    "reason": entry.reason,
                    "source": entry.source._asdict(),
                    "expires_at": entry.expires_at,
                    "state": _state(entry, now_s),
                }
            )
    elif found:
        titles = ("PARTITION", "OFFSET", "REASON", "CAME FROM", "EXPIRES AT", "STATE")
        rows = [
            (entry.place.partition, entry.place.offset, entry.reason,
             f"{entry.source.stream}/{entry.source.partition}@{entry.source.offset}", entry.expires_at,
             _state(entry, now_s))
            for entry in found
        ]  # fmt: skip
        print_table(titles, rows)
    else:
        print("nothing is in quarantine that is not resolved")
    return 0


def _state(entry: "Entry", now_s: float) -> str:
    return "destroyed" if entry.is_destroyed(now_s) else "open"


def _replay(args: argparse.Namespace) -> int:
    return asyncio.run(_send_back(args))


async def _send_back(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment
    from streams.keys.reveal import State
    from streams.quarantine import Quarantine

    async with Deployment.open(load(args), create=False) as deployment:
        quarantine = Quarantine(deployment, args.reason)
        counts = await quarantine.replay(await _chosen(args, deployment.log))
    replayed = counts.pop(State.REVEALED, 0)
    lost = ", ".join(f"{count} {state.value}" for state, count in counts.items())
    if lost and not args.all:
        raise InputInvalid(f"it does not open any more ({lost}), so it cannot be replayed; discard it")
    print(f"replayed: {replayed}")
    if lost:
        say(f"cannot be replayed any more: {lost}; discard them")
    return 0


def _discard(args: argparse.Namespace) -> int:
    return asyncio.run(_drop(args))


async def _drop(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment
    from streams.quarantine import Quarantine

    async with Deployment.open(load(args), create=False) as deployment:
        quarantine = Quarantine(deployment, args.reason)
        count = await quarantine.discard(await _chosen(args, deployment.log))
    print(f"discarded: {count}")
    return 0


async def _chosen(args: argparse.Namespace, log: "Log") -> "list[Entry]":
    """Return the entries that the selectors name. Raises InputInvalid if they name none."""
    from streams.quarantine import Place, entries, select

    one = args.partition is not None and args.offset is not None
    if one == args.all or (args.partition is None) != (args.offset is None):
        raise InputInvalid("say which: --partition P --offset N as the list shows them (with --stream S, those of S), "
                           "or --all")  # fmt: skip
    found = await entries(log)
    return found if args.all else select(found, Place(args.stream, args.partition, args.offset))
