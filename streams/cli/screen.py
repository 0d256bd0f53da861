"""`streamveil screen`: what the verdict on a request would be, and which rules were asked; a campaign's list as CSV."""

import argparse
import asyncio
import sys
import time
from typing import TYPE_CHECKING, get_args

from schemas.errors import InputInvalid
from schemas.inbound import Channel, Purpose
from streams.cli.common import STDIN, bar, new_file, number, opened, plain, print_json, say, size_bytes
from streams.cli.times import instant_s
from streams.config import load

if TYPE_CHECKING:
    from streams.screening import Screening


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `screen`."""
    noun = subparsers.add_parser(
        "screen", help="say whether a request may go out, and which rules decide; or screen a campaign's list"
    )
    who = noun.add_mutually_exclusive_group(required=True)
    who.add_argument("number", metavar="NUMBER", nargs="?", help="the recipient, or - for standard input")
    who.add_argument("--file", metavar="F", help="a number a line, or CSV with a column number; comes out as CSV with "
                                                 "the verdicts; - for standard input")  # fmt: skip
    noun.add_argument("--account", metavar="A", required=True, help="who sends")
    noun.add_argument("--channel", choices=get_args(Channel), required=True)
    noun.add_argument("--purpose", choices=get_args(Purpose), required=True)
    noun.add_argument("--sender", metavar="S", help="sender of the message")
    noun.add_argument("--campaign", metavar="C", help="campaign of the message")
    noun.add_argument("--country", metavar="CC", help="destination, as two capital letters")
    noun.add_argument("--time-zone", metavar="Z", help="where the recipient is, such as America/Boise")
    noun.add_argument("--child", action="store_true", help="the recipient is marked a minor")
    noun.add_argument("--at", metavar="T", help="ask for quiet hours and ages at this instant; lists are those of now")
    noun.add_argument("--out", metavar="FILE", help="with --file: a new file for the list; default: standard output")
    noun.add_argument("--json", action="store_true", help="with --file: one JSON object a row, without the row; a "
                                                          "NUMBER's answer is JSON anyway")  # fmt: skip
    noun.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.out is not None and (args.file is None or args.json):
        raise InputInvalid("--out is for the list that --file gives: use it without --json")
    return asyncio.run(_screen(args))


async def _screen(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment
    from streams.screening import Question, Screening

    now_s = int(time.time()) if args.at is None else instant_s(args.at)
    one = None if args.number is None else number(args.number)
    sender, campaign, zone = (
        None if given is None else plain(given) for given in (args.sender, args.campaign, args.time_zone)
    )
    question = Question(
        plain(args.account), args.channel, args.purpose, sender, campaign, args.country, zone, args.child
    )
    async with Deployment.open(load(args), create=False) as deployment:
        screening = Screening(deployment, question, now_s)
        await screening.ready()
        if one is not None:
            print_json(screening.one(one))
        else:
            _list(args, screening)
    return 0


def _list(args: argparse.Namespace, screening: "Screening") -> None:
    """Write the verdicts on a list, and with CSV a summary to standard error."""
    with opened(args.file) as file, bar("screening", size_bytes(args.file)) as advance:
        if args.json:
            for answer in screening.answers(file, advance):
                print_json(answer)
            return
        with new_file(STDIN if args.out is None else args.out) as out:
            out.flush()
            for chunk in screening.csv(file, advance):
                out.buffer.write(chunk)
            out.flush()
    counts = screening.counts
    cleared = counts.pop(None, 0)
    sys.stdout.flush()
    say(f"screened {cleared + counts.total():,}: {cleared:,} cleared, {counts.total():,} refused")
    if screening.exempt:
        say(f"  cleared by an exemption  {screening.exempt:,}")
    for reason, count in counts.most_common():
        say(f"  {reason}  {count:,}")
