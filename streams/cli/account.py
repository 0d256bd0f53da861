"""`streamveil account hold|release|offboard`: an account under legal hold, and one whose agreement has ended."""

import argparse
import time
from typing import TYPE_CHECKING

from schemas.errors import InputInvalid
from streams.cli.common import bar, plain, print_json, print_table
from streams.cli.desk import at_desk
from streams.cli.subject import add_choice, add_period, period, print_released
from streams.cli.times import instant_s

if TYPE_CHECKING:
    from streams.officer.offboard import Leaving, Offboarded
    from streams.officer.office import Office

NOT_STATED = "not-stated"
"""The case reference of an account's hold that was given none."""


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `account`."""
    noun = subparsers.add_parser("account", help="put an account under legal hold, or end its keys when it leaves")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="VERB")
    holding = verbs.add_parser("hold", help="keep an account's communications beyond their time, until released")
    holding.set_defaults(run=_hold)
    releasing = verbs.add_parser("release", help="end a legal hold, and destroy what only it had kept")
    add_choice(releasing)
    releasing.set_defaults(run=_release)
    holding.add_argument("--reason", metavar="REASON", default=NOT_STATED, help="a code or case reference; logged")
    releasing.add_argument("--reason", metavar="REASON", help="that of the hold; default: the only one in force")
    for verb in (holding, releasing):
        add_period(verb)
        verb.add_argument("account", metavar="ACCOUNT")
        verb.add_argument("--json", action="store_true", help="one JSON object")
    leaving = verbs.add_parser("offboard", help="destroy an account's keys when its agreement ends (CAL-7); or list")
    leaving.add_argument("account", metavar="ACCOUNT", nargs="?", help="without it: the accounts that left or will")
    when = leaving.add_mutually_exclusive_group()
    when.add_argument("--terminated", metavar="T", help="when the agreement ends or ended")
    when.add_argument("--cancel", action="store_true", help="it stays: what is not destroyed yet lives on")
    leaving.add_argument("--dry", action="store_true", help="only say what would die now")
    leaving.add_argument("--json", action="store_true", help="one JSON object an account")
    leaving.set_defaults(run=_offboard)


def _hold(args: argparse.Namespace) -> int:
    account, within = plain(args.account), period(args)

    async def work(office: "Office") -> None:
        from streams.officer.holds import hold_account

        with bar("records read", None) as advance:
            kept = await hold_account(office, account, args.reason, within, advance)
        if args.json:
            print_json({"hold": kept.mark.id, "records": kept.records})
        else:
            print(f"hold {kept.mark.id} is in force; {kept.records:,} records copied")

    return at_desk(args, work)


def _release(args: argparse.Namespace) -> int:
    account, within = plain(args.account), period(args)

    async def work(office: "Office") -> None:
        from streams.officer.holds import release_account

        print_released(args, await release_account(office, account, args.reason, args.hold, within))

    return at_desk(args, work)


def _offboard(args: argparse.Namespace) -> int:
    given = args.terminated is not None or args.cancel
    if given != (args.account is not None):
        raise InputInvalid("account offboard takes ACCOUNT and --terminated or --cancel, or nothing to list")
    terminated_s = None if args.terminated is None else instant_s(args.terminated)
    account = None if args.account is None else plain(args.account)

    async def work(office: "Office") -> None:
        from streams.officer import offboard

        if account is None:
            _print_leaving(args, offboard.schedule(office.deployment))
        elif terminated_s is None:
            was = await offboard.cancel(office.deployment, account)
            if args.json:
                print_json({"account": account, "cancelled": was})
            else:
                print(f"{account} {'stays' if was else 'was not leaving'}")
        else:
            now_s = int(time.time())
            done = await offboard.offboard(office.deployment, account, terminated_s, now_s, dry=args.dry)
            _print_offboarded(args, done)

    return at_desk(args, work)


def _print_leaving(args: argparse.Namespace, found: "list[Leaving]") -> None:
    rows = [one.as_json() for one in found]
    if args.json:
        for row in rows:
            print_json(row)
    elif rows:
        print_table([name.upper().replace("_", " ") for name in rows[0]], [tuple(row.values()) for row in rows])


def _print_offboarded(args: argparse.Namespace, done: "Offboarded") -> None:
    row = done.leaving.as_json()
    if args.json:
        print_json({**row, "dry": args.dry, "epochs": done.epochs, "persons": done.persons})
        return
    verb = "would be destroyed now" if args.dry else "are destroyed"
    print(f"{done.epochs:,} epoch keys and {done.persons:,} people's secrets of {row['account']} {verb}")
    print(f"content and near misses die at {row['terminated_at']}, all else that it owns at {row['numbers_die_at']}")
    print("what the platform controls dies at its own instant; see retention calendar")
