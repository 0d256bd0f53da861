"""`streamveil review list|decide`: near-miss opt-outs, each with a clock."""

import argparse
import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from schemas.errors import InputInvalid
from schemas.fields import NO_REASON, is_reason
from streams.cli.common import STDIN, opened, print_json, print_table, say
from streams.config import load

if TYPE_CHECKING:
    from streams.review import Shown
    from streams.state.reviews import Near, Place

_PAGE = 500
_DAY_S = 86_400


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `review`."""
    noun = subparsers.add_parser("review", help="near-miss opt-outs: list them with their due dates, decide")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="list|decide")
    listing = verbs.add_parser("list", help="show what is undecided, the oldest first; nothing of its content")
    listing.add_argument("--all", action="store_true", help="also what was decided, or died undecided, and lies there")
    listing.add_argument("--reveal", action="store_true", help="open the texts this user may open; logged to audit")
    listing.add_argument("--reason", metavar="REASON", help="why: a code or case reference, needed with --reveal")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    listing.set_defaults(run=_list)
    deciding = verbs.add_parser("decide", help="opt the person out as STOP would have, or dismiss it; logged to audit")
    deciding.add_argument("place", metavar="PLACE", help="as the list shows it, or - for standard input, one a line")
    deciding.add_argument("choice", choices=("opt-out", "dismiss"), metavar="opt-out|dismiss")
    deciding.add_argument("--reason", metavar="REASON", required=True, help="a code or case reference; logged")
    deciding.set_defaults(run=_decide)


def _list(args: argparse.Namespace) -> int:
    if args.reveal and not is_reason(args.reason or ""):
        raise InputInvalid(f"--reveal needs --reason: {NO_REASON}")
    return asyncio.run(_show(args))


async def _show(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment, reading
    from streams.review import Review, near_misses

    config, now_s = load(args), time.time()
    rows: list[tuple[Near, Shown | None]] = []

    def take(page: "list[tuple[Near, Shown | None]]") -> None:
        if not args.json:
            rows.extend(page)
            return
        for near, shown in page:
            print_json(_fields(near, shown, now_s))

    if args.reveal:
        async with Deployment.open(config, create=False) as deployment:
            review = Review(deployment, args.reason)
            review.permit()
            found = await near_misses(deployment.log, everything=args.all)
            for at in range(0, len(found), _PAGE):
                page = found[at : at + _PAGE]
                take(list(zip(page, await review.texts(page), strict=True)))
    else:  # keys are for whoever opens
        async with reading(config) as log:
            take([(near, None) for near in await near_misses(log, everything=args.all)])
    if rows:
        titles = ("PLACE", "ACCOUNT", "DAY", "DUE", "DAYS LEFT", "STATE", *(("TEXT",) if args.reveal else ()))
        print_table(titles, (_cells(near, shown, now_s) for near, shown in rows))
    elif not args.json:
        print("nothing is in review that is not decided")
    return 0


def _state(near: "Near", now_s: float) -> str:
    if near.decision is not None:
        return near.decision
    if near.clock.expires_s <= now_s:
        return "destroyed"
    return "overdue" if near.clock.due_s <= now_s else "undecided"


def _fields(near: "Near", shown: "Shown | None", now_s: float) -> dict[str, Any]:
    from processors.retention import instant

    fields: dict[str, Any] = {
        "place": str(near.place),
        "account": near.clock.account,
        "day": near.clock.day,
        "due_at": instant(near.clock.due_s),
        "days_left": _days_left(near, now_s),
        "overdue": _state(near, now_s) == "overdue",
        "state": _state(near, now_s),
        "expires_at": instant(near.clock.expires_s),
    }
    return fields if shown is None else {**fields, "reveal": shown.state.value, "text": shown.text}


def _days_left(near: "Near", now_s: float) -> int | None:
    """Return whole days until it is due, below 0 once it is overdue; None: it is decided."""
    return None if near.decision is not None else int((near.clock.due_s - now_s) // _DAY_S)


def _cells(near: "Near", shown: "Shown | None", now_s: float) -> tuple[object, ...]:
    from processors.retention import instant

    due = instant(near.clock.due_s - 1)[:10]  # the last day
    cells = (near.place, near.clock.account, near.clock.day, due, _days_left(near, now_s), _state(near, now_s))
    if shown is None:
        return cells
    text = f"({shown.state.value})" if shown.text is None else _printable(shown.text)
    return (*cells, text)


def _printable(text: str) -> str:
    """Return a text as a terminal may have it: what would move its cursor or turn its letters stands as a dot."""
    return "".join(char if char.isprintable() else "·" for char in text)


def _decide(args: argparse.Namespace) -> int:
    return asyncio.run(_settle(args))


async def _settle(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment
    from streams.review import Review

    places = list(_places(args.place))
    async with Deployment.open(load(args), create=False) as deployment:
        done = await Review(deployment, args.reason).decide(places, args.choice)
    if done.left and args.place != STDIN:
        raise InputInvalid(f"this near miss cannot be an opt-out ({done.left[0][1]}); dismiss it")
    print(f"{'opted out' if args.choice == 'opt-out' else 'dismissed'}: {done.resolved}")
    for place, why in done.left:
        say(f"{place} cannot be an opt-out ({why}); dismiss it")
    return 0


def _places(argument: str) -> "Iterator[Place]":
    from streams.review import place_of

    if argument != STDIN:
        yield place_of(argument)
        return
    with opened(argument) as lines:
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if text:
                yield place_of(text)
