"""`streamveil optout add|remove|check|import|export`: people who asked not to be contacted."""

import argparse
import asyncio
import csv
import time
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, get_args

from schemas.inbound import Channel, SuppressionClass
from streams.cli.common import (
    bar,
    caught_up,
    new_file,
    number,
    opened,
    plain,
    print_json,
    print_table,
    say,
    size_bytes,
    skipping,
)
from streams.config import load

if TYPE_CHECKING:
    from streams.optout import Entry, OptOuts


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `optout`."""
    noun = subparsers.add_parser("optout", help="record, lift and look up opt-outs")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="add|remove|check|import|export")
    adding = verbs.add_parser("add", help="opt a person out")
    adding.set_defaults(run=_add, default_class="all", default_authority="person")
    removing = verbs.add_parser("remove", help="lift exactly this opt-out")
    removing.set_defaults(run=_remove, default_class="all", default_authority="person")
    checking = verbs.add_parser("check", help="show the opt-outs of a person that stand")
    checking.add_argument("--json", action="store_true", help="one JSON object")
    checking.set_defaults(run=_check, default_class="", default_authority="")
    for verb in (adding, removing, checking):
        verb.add_argument("number", metavar="NUMBER", help="the person's number, or - for standard input")
        verb.add_argument("--account", metavar="A", default="", help="by this account; default: by anybody")
        narrower = verb.add_mutually_exclusive_group()
        narrower.add_argument("--sender", metavar="S", default="", help="from this sender of the account")
        narrower.add_argument("--campaign", metavar="C", default="", help="in this campaign of the account")
        verb.add_argument("--class", dest="class_", choices=get_args(SuppressionClass))
        verb.add_argument("--channel", choices=get_args(Channel), default="", help="default: both")
        verb.add_argument("--authority", choices=("person", "officer"))
        verb.add_argument("--reason", metavar="REASON", default="", help="a code or case reference")
    loading = verbs.add_parser("import", help="opt out everybody in a CSV file with a header")
    loading.add_argument("file", metavar="FILE", help="columns: number and, if need be, those of an export")
    loading.add_argument("--json", action="store_true", help="the summary as one JSON object")
    loading.set_defaults(run=_import)
    exporting = verbs.add_parser("export", help="write the opt-outs that stand to a new CSV file (0600)")
    exporting.add_argument("file", metavar="FILE", help="a file that does not exist, or - for standard output")
    exporting.add_argument("--reason", metavar="REASON", required=True, help="a code or case reference; logged")
    exporting.set_defaults(run=_export)


def _opened(args: argparse.Namespace, *, create: bool = False) -> "AbstractAsyncContextManager[OptOuts]":
    """Open the deployment, or with `create` make one, and give its opt-outs, read to their end."""
    from streams.optout import OptOuts

    return caught_up(args, OptOuts, create=create)


def _add(args: argparse.Namespace) -> int:
    return asyncio.run(_change(args, out=True))


def _remove(args: argparse.Namespace) -> int:
    return asyncio.run(_change(args, out=False))


async def _change(args: argparse.Namespace, *, out: bool) -> int:
    entry, now_s = _entry(args), int(time.time())
    async with _opened(args, create=out) as opt_outs:
        if out:
            count = await opt_outs.add([entry], now_s)
            print(f"opted out: {count} entries written")
        else:
            count = await opt_outs.remove(entry, now_s)
            print(f"lifted: {count} entries" if count else "no such opt-out stands; nothing was written")
    return 0


def _check(args: argparse.Namespace) -> int:
    return asyncio.run(_show(args))


async def _show(args: argparse.Namespace) -> int:
    entry = _entry(args)
    async with _opened(args) as opt_outs:
        entries = [
            {"scope": one.scope, "class": one.class_, "channel": one.channel, "authority": one.authority,
             "since": one.since}
            for one in opt_outs.standing(entry)
        ]  # fmt: skip
    if args.json:
        print_json({"opted_out": bool(entries), "entries": entries})
    elif entries:
        print_table([name.upper() for name in entries[0]], [tuple(one.values()) for one in entries])
    else:
        print("not opted out")
    return 0


def _entry(args: argparse.Namespace) -> "Entry":
    from streams.optout import Entry

    return Entry(
        number=number(args.number),
        account=plain(args.account),
        sender=plain(args.sender),
        campaign=plain(args.campaign),
        class_=args.class_ or args.default_class,
        channel=args.channel,
        authority=args.authority or args.default_authority,
        reason=args.reason,
    )


def _import(args: argparse.Namespace) -> int:
    return asyncio.run(_load(args))


async def _load(args: argparse.Namespace) -> int:
    with opened(args.file) as file:
        async with _opened(args, create=True) as opt_outs:
            with bar("opt-outs", size_bytes(args.file)) as advance, skipping() as bad:
                loaded = await opt_outs.load(file, int(time.time()), advance, bad)
    if args.json:
        print_json(loaded._asdict())
    else:
        say(f"{loaded.lines:,} lines read, {loaded.written:,} opt-outs written, {loaded.bad:,} lines skipped")
    return 0


def _export(args: argparse.Namespace) -> int:
    return asyncio.run(_write(args))


async def _write(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment
    from streams.optout import COLUMNS, OptOuts

    count = 0
    async with Deployment.open(load(args), create=False) as deployment:
        opt_outs = OptOuts(deployment)
        with new_file(args.file) as file, bar("opt-outs", await opt_outs.size()) as advance:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            async for rows in opt_outs.rows(args.reason, advance):
                writer.writerows(rows)
                count += len(rows)
    say(f"{count:,} opt-outs exported")
    return 0
