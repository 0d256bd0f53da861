"""What the commands of the privacy officer share: the desk, whose data, when a request came, whom to tell of it."""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from schemas.errors import InputInvalid
from streams.cli.common import plain, say
from streams.cli.times import instant_s
from streams.config import load

if TYPE_CHECKING:
    from streams.keys.ledger import Request
    from streams.officer.office import Office

_LONGEST_AGO_S = 366 * 86_400


def add_person(verb: argparse.ArgumentParser) -> None:
    """Add whose data a command is about, and why."""
    verb.add_argument("number", metavar="NUMBER", help="the person's number, or - for standard input")
    verb.add_argument("--account", metavar="A", help="in the data of this account; default: in the platform's own")
    verb.add_argument("--reason", metavar="REASON", required=True, help="a code or case reference; logged")


def add_received(verb: argparse.ArgumentParser) -> None:
    """Add when a request came."""
    verb.add_argument("--received", metavar="T", help="when the request came; its clocks run from then; default: now")


def at_desk(args: argparse.Namespace, work: "Callable[[Office], Awaitable[None]]") -> int:
    """Do some work as the privacy officer, and return the exit status. Raises RevealDenied to anybody else.

    The account that the command is about, if there is one, must be known: else InputInvalid, and nothing is done.
    """
    from streams.deployment import Deployment
    from streams.officer.office import check_account, office

    async def inside() -> None:
        async with Deployment.open(load(args), create=False) as deployment:
            desk, account = office(deployment), account_of(args)
            if account is not None:
                await check_account(deployment, account)
            await work(desk)

    asyncio.run(inside())
    return 0


def account_of(args: argparse.Namespace) -> str | None:
    """Return the account that was given."""
    return None if args.account is None else plain(args.account)


def received_s(args: argparse.Namespace) -> int:
    """Return when a request came, Unix s. Raises InputInvalid."""
    now_s = int(time.time())
    came_s = now_s if args.received is None else instant_s(args.received)
    if came_s > now_s:
        raise InputInvalid("--received is ahead of the clock")
    if came_s < now_s - _LONGEST_AGO_S:
        raise InputInvalid("--received is more than a year ago; give when the request came")
    return came_s


def clocks(request: "Request") -> dict[str, object]:
    """Return a request's clocks, for JSON."""
    from processors.retention import instant

    def at(when_s: int | None) -> str | None:
        return None if when_s is None else instant(when_s)

    return {
        "request": request.id,
        "received_at": at(request.received_s),
        "notify": {account: at(told_s) for account, told_s in request.notify.items()},
        "notice_due_at": at(request.notice_due_s),
        "due_at": at(request.due_s),
        "closed_at": at(request.closed_s),
    }


def say_whom(request: "Request") -> None:
    """Say on standard error which accounts are to be told of a request."""
    from processors.retention import instant

    if request.untold:
        accounts = ", ".join(request.untold)
        say(f"tell by {instant(request.notice_due_s)}: {accounts}; then subject requests --told {request.id[:12]}")
