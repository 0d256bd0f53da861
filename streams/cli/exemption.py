"""`streamveil exemption add|remove|check|import`: why an account may market to a number that a registry lists."""

import argparse
import asyncio
import time
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, get_args

from schemas.inbound import Channel
from schemas.policy import ExemptionKind
from streams.cli.common import bar, caught_up, number, opened, plain, print_json, print_table, say, size_bytes, skipping

if TYPE_CHECKING:
    from streams.exemptions import Entry, Exemptions

_TITLES = ("KIND", "CHANNEL", "STATE", "GIVEN", "EXPIRES", "EVIDENCE")


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `exemption`."""
    noun = subparsers.add_parser("exemption", help="why an account may market to a number that a registry lists")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="add|remove|check|import")
    adding = verbs.add_parser("add", help="record a consent, a purchase or an inquiry")
    adding.set_defaults(run=_add)
    removing = verbs.add_parser("remove", help="withdraw what is in force")
    removing.set_defaults(run=_remove)
    checking = verbs.add_parser("check", help="show what is known of a person, and whether it is in force")
    checking.set_defaults(run=_check)
    for verb in (adding, removing, checking):
        verb.add_argument("number", metavar="NUMBER", help="the person's number, or - for standard input")
        verb.add_argument("--account", metavar="A", required=True, help="whose exemption it is")
        verb.add_argument(
            "--kind", choices=get_args(ExemptionKind), default="", required=verb is adding, help="what it rests on"
        )
        verb.add_argument("--channel", choices=get_args(Channel), default="", help="default: both")
    adding.add_argument("--given", metavar="T", required=True, help="when: RFC 3339 or a date")
    adding.add_argument("--evidence", metavar="REF", required=True, help="a reference to what proves it")
    adding.add_argument("--until", metavar="T", default="", help="default: as long as the rules allow")
    removing.add_argument("--reason", metavar="REASON", default="", help="a code or case reference")
    checking.add_argument("--json", action="store_true", help="one JSON object a line")
    loading = verbs.add_parser("import", help="record all in a CSV file with a header")
    loading.add_argument("file", metavar="FILE", help="columns: number, account, kind, given, evidence, until, channel")
    loading.add_argument("--json", action="store_true", help="the summary as one JSON object")
    loading.set_defaults(run=_import)


def _entry(args: argparse.Namespace) -> "Entry":
    from streams.exemptions import Entry

    told = {name: plain(getattr(args, name, "")) for name in Entry._fields if name != "number"}
    return Entry(number(args.number), **told)


def _opened(args: argparse.Namespace, *, create: bool = False) -> "AbstractAsyncContextManager[Exemptions]":
    """Open the deployment, or with `create` make one, and give its exemptions, read to their end."""
    from streams.exemptions import Exemptions

    return caught_up(args, Exemptions, create=create)


def _add(args: argparse.Namespace) -> int:
    async def run() -> int:
        entry = _entry(args)
        async with _opened(args, create=True) as exemptions:
            return await exemptions.add(entry, int(time.time()))

    count = asyncio.run(run())
    print(f"exempt: {count} entries written" if count else "one that lasts as long stands; nothing was written")
    return 0


def _remove(args: argparse.Namespace) -> int:
    async def run() -> int:
        entry = _entry(args)
        async with _opened(args) as exemptions:
            return await exemptions.remove(entry, int(time.time()))

    count = asyncio.run(run())
    print(f"withdrawn: {count} entries" if count else "no such exemption is in force; nothing was written")
    return 0


def _check(args: argparse.Namespace) -> int:
    async def run() -> int:
        entry = _entry(args)
        async with _opened(args) as exemptions:
            found = await exemptions.standing(entry, int(time.time()))
        if args.json:
            for one in found:
                print_json(one._asdict())
        elif found:
            rows = [(one.kind, one.channel, one.state, one.given, one.expires, one.evidence) for one in found]
            print_table(_TITLES, rows)
        else:
            say("no exemption is known")
        return 0

    return asyncio.run(run())


def _import(args: argparse.Namespace) -> int:
    async def run() -> int:
        with opened(args.file) as file:
            async with _opened(args, create=True) as exemptions:
                with bar("exemptions", size_bytes(args.file)) as advance, skipping() as bad:
                    loaded = await exemptions.load(file, int(time.time()), advance, bad)
        if args.json:
            print_json(loaded._asdict())
        else:
            say(f"{loaded.lines:,} lines read, {loaded.written:,} exemptions written, {loaded.bad:,} lines skipped")
        return 0

    return asyncio.run(run())
