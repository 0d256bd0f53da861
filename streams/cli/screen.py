"""`streamveil screen`: what the verdict on a request would be, and which rules were asked."""

import argparse
import asyncio
import csv
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, get_args

from schemas.errors import InputInvalid
from schemas.fields import normalise
from schemas.inbound import Channel, Purpose
from streams.cli.common import number, opened, plain, print_json
from streams.cli.times import instant_s
from streams.config import load

if TYPE_CHECKING:
    from streams.deployment import Deployment

_COUNTRY = re.compile(r"[A-Z]{2}")


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `screen`."""
    noun = subparsers.add_parser("screen", help="say whether a request may go out, and which rules decide; one JSON "
                                                "object a number")  # fmt: skip
    who = noun.add_mutually_exclusive_group(required=True)
    who.add_argument("number", metavar="NUMBER", nargs="?", help="the recipient, or - for standard input")
    who.add_argument("--file", metavar="F", help="a number a line, or CSV with a column number; - for standard input")
    noun.add_argument("--account", metavar="A", required=True, help="who sends")
    noun.add_argument("--channel", choices=get_args(Channel), required=True)
    noun.add_argument("--purpose", choices=get_args(Purpose), required=True)
    noun.add_argument("--sender", metavar="S", help="sender of the message")
    noun.add_argument("--campaign", metavar="C", help="campaign of the message")
    noun.add_argument("--country", metavar="CC", help="destination, as two capital letters")
    noun.add_argument("--child", action="store_true", help="the recipient is marked a minor")
    noun.add_argument("--at", metavar="T", help="ask for quiet hours and ages at this instant; lists are those of now")
    noun.add_argument("--json", action="store_true", help="has no effect: the answer is JSON")
    noun.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    return asyncio.run(_screen(args))


async def _screen(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment

    now_s = int(time.time()) if args.at is None else instant_s(args.at)
    one = None if args.number is None else number(args.number)
    async with Deployment.open(load(args), create=False) as deployment:
        screening = _Screening(args, deployment, now_s)
        await screening.tail.catch_up()
        deployment.settled()
        if one is not None:
            print_json(screening.answer(one))
            return 0
        with opened(args.file) as file:
            for row, text in enumerate(_numbers(file), 1):
                print_json({"row": row, **screening.answer(text)})
    return 0


class _Screening:
    """The questions of one command, all but the number, put to the function that the workers use."""

    def __init__(self, args: argparse.Namespace, deployment: "Deployment", now_s: int) -> None:
        from processors.screen.quiet_hours import QuietHours
        from processors.screen.suppression import covering_scopes
        from streams.state.suppressions import SuppressionTail

        policy = deployment.config.policy
        account = policy.account(plain(args.account))
        if account is None:
            raise InputInvalid("the policy does not serve this account; see policy show")
        if args.country is not None and not _COUNTRY.fullmatch(args.country):
            raise InputInvalid("--country takes two capital letters, such as US")
        hours = policy.screening.quiet_hours
        self._args = args
        self._policy = policy
        self._account = account
        self._region = account.default_region or args.country
        self._registries = deployment.registries()
        self._tokens = deployment.pipeline.tokens
        self._quiet = None if hours is None else QuietHours(hours.start_time, hours.end_time, now_s)
        self._now_s = now_s
        self.tail = SuppressionTail(deployment.log, self._tokens.version)
        sender = "" if args.sender is None else normalise(plain(args.sender), self._region).value
        campaign = None if args.campaign is None else plain(args.campaign)
        self._scopes = covering_scopes(account.id, sender, campaign, self._tokens)

    def answer(self, text: str) -> dict[str, Any]:
        """Return the verdict on a number, as JSON fields; the number is not among them."""
        from processors.retention import instant
        from processors.screen.verdict import Asked, Subject, verdict

        party = normalise(text, self._region)
        known = party.is_person and party.value not in self._account.own
        args, trace = self._args, list[Asked]()
        subject = Subject(
            account_id=self._account.id,
            party=party,
            token=self._tokens.of(party.value) if known else None,
            channel=args.channel,
            purpose=args.purpose,
            country=args.country,
            child=args.child,
            requested_s=None,
            scopes=self._scopes,
        )
        decided = verdict(
            subject, self.tail.view, self._registries, self._policy, self._account, self._quiet, self._now_s, trace
        )
        return {
            "verdict": "cleared" if decided.reason is None else "refused",
            "reason": decided.reason,
            "rules": [asked._asdict() for asked in trace],
            "codes": decided.codes or {},
            "not_after": None if decided.not_after_s is None else instant(decided.not_after_s),
            "defer_until": None if decided.defer_until_s is None else instant(decided.defer_until_s),
        }


def _numbers(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the number of each row, "" where there is none: a number a line, or the column `number` of CSV."""
    column = None
    for at, line in enumerate(lines):
        text = line.decode("utf-8-sig" if at == 0 else "utf-8", "replace").rstrip("\r\n")
        if at == 0:
            names = [name.strip().lower() for name in _cells(text)]
            if "number" in names:
                column = names.index("number")
                continue
        if column is None:
            yield text
        else:
            cells = _cells(text)
            yield cells[column] if column < len(cells) else ""


def _cells(text: str) -> list[str]:
    try:
        return next(csv.reader((text,)), [])
    except csv.Error:
        return []
