"""`streamveil subject …`: what a person asks for, or the law: access, erasure, restriction, objection, legal hold."""

import argparse
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from schemas.errors import InputInvalid
from streams.cli import subject_access
from streams.cli.common import bar, number, print_json, print_table, say
from streams.cli.desk import account_of, add_person, add_received, at_desk, clocks, received_s, say_whom
from streams.cli.times import instant_s

if TYPE_CHECKING:
    from streams.keys.ledger import Request
    from streams.officer.office import Office
    from streams.officer.restrict import Done


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `subject`."""
    noun = subparsers.add_parser("subject", help="answer a person's request, or put them under legal hold")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="VERB")
    subject_access.add_verbs(verbs)
    erasing = verbs.add_parser("erase", help="destroy what seals a person's data; returns once it is in effect")
    erasing.set_defaults(run=_erase)
    objecting = verbs.add_parser("object", help="never market to this person again")
    objecting.set_defaults(run=_object)
    restricting = verbs.add_parser("restrict", help="open a person's data to the privacy officer only; no marketing")
    restricting.set_defaults(run=_restrict)
    lifting = verbs.add_parser("unrestrict", help="end a restriction, and what it had refused")
    lifting.set_defaults(run=_unrestrict)
    for verb in (erasing, objecting, restricting, lifting):
        add_received(verb)
    holding = verbs.add_parser("hold", help="keep a person's data beyond its time, until released")
    add_period(holding)
    holding.set_defaults(run=_hold)
    releasing = verbs.add_parser("release", help="end a legal hold, and destroy what only it had kept")
    add_choice(releasing)
    releasing.set_defaults(run=_release)
    for verb in (erasing, objecting, restricting, lifting, holding, releasing):
        add_person(verb)
        verb.add_argument("--json", action="store_true", help="one JSON object")
    requests = verbs.add_parser("requests", help="requests by due time; note that accounts were told, or how one ended")
    requests.add_argument("--all", action="store_true", help="closed ones too")
    doing = requests.add_mutually_exclusive_group()
    doing.add_argument("--told", metavar="REQUEST", help="its accounts, or the one given, were told now")
    doing.add_argument("--close", metavar="REQUEST", help="it has ended, with --outcome")
    requests.add_argument("--account", metavar="A", help="with --told: this account")
    requests.add_argument("--outcome", choices=("done", "refused"), help="with --close: how")
    requests.add_argument("--json", action="store_true", help="one JSON object a request")
    requests.set_defaults(run=_requests)


def add_period(verb: argparse.ArgumentParser) -> None:
    """Add the period of a hold."""
    verb.add_argument("--from", dest="from_", metavar="T", help="communications from this day on; default: all")
    verb.add_argument("--to", metavar="T", help="communications before this instant; default: all to come too")


def add_choice(verb: argparse.ArgumentParser) -> None:
    """Add what says which of several holds."""
    verb.add_argument("--hold", metavar="ID", help="which one; else that of the same REASON")


def period(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """Return the period of a hold, Unix s. Raises InputInvalid."""
    return (
        None if args.from_ is None else instant_s(args.from_),
        None if args.to is None else instant_s(args.to),
    )


# --- verbs --------------------------------------------------------------------------------------------------------


def _erase(args: argparse.Namespace) -> int:
    from processors.retention import instant

    whose, came_s, account = number(args.number), received_s(args), account_of(args)

    async def work(office: "Office") -> None:
        from streams.officer.erase import erase

        with bar("records looked at", None) as advance:
            done = await erase(office, whose, account, args.reason, came_s, _waiting, advance)
        until = None if done.backups_until_s is None else instant(done.backups_until_s)
        if args.json:
            print_json(
                {"owner": done.owner, "erased": done.secrets, "sequence": done.sequence, "opt_outs": "stand",
                 "backups_until": until, "held": [{"hold": mark.id, "reason": mark.reason} for mark in done.held],
                 **clocks(done.request)}
            )  # fmt: skip
        else:
            print(f"erased: person secrets destroyed in {_data_of(done.owner)}: {done.secrets}")
            print("what they sealed before this line opens nowhere any more; what is sealed from now on opens as ever")
            for mark in done.held:
                print(
                    f"copies under hold {mark.id} ({mark.reason}), of another person, keep the number until its release"
                )
            print("opt-outs of this person stand; see optout check")
            print("what lies in quarantine is under nobody's name, for at most 7 days; see quarantine list")
            if until is not None:
                print(f"an older copy of the key store can open it, with the key service, until {until} at the latest")
        say_whom(done.request)

    return at_desk(args, work)


def _object(args: argparse.Namespace) -> int:
    from streams.officer import restrict

    def said(done: "Done") -> str:
        by = "every account" if args.account is None else f"account {account_of(args)}"
        return f"marketing to this person by {by} is refused; {done.opt_outs} entries written"

    return _at_request(args, restrict.object_, said)


def _restrict(args: argparse.Namespace) -> int:
    from streams.officer import restrict

    def said(done: "Done") -> str:
        how = "restricted" if done.marks else "was restricted already"
        return f"{how}: it opens to the privacy officer only, and marketing is refused; {done.opt_outs} entries written"

    return _at_request(args, restrict.restrict, said)


def _unrestrict(args: argparse.Namespace) -> int:
    from streams.officer import restrict

    def said(done: "Done") -> str:
        if not done.marks:
            return "no restriction was in force; nothing was done"
        return f"the restriction is ended; {done.opt_outs} entries lifted, what else refuses marketing stands"

    return _at_request(args, restrict.unrestrict, said)


def _at_request(
    args: argparse.Namespace,
    do: "Callable[[Office, str, str | None, str, int], Awaitable[Done]]",
    said: "Callable[[Done], str]",
) -> int:
    """Do what a person asked for, and say what came of it."""
    whose, came_s = number(args.number), received_s(args)

    async def work(office: "Office") -> None:
        done = await do(office, whose, account_of(args), args.reason, came_s)
        if args.json:
            print_json({"marks": done.marks, "opt_outs": done.opt_outs, **clocks(done.request)})
        else:
            print(said(done))
        say_whom(done.request)

    return at_desk(args, work)


def _hold(args: argparse.Namespace) -> int:
    whose, account, within = number(args.number), account_of(args), period(args)

    async def work(office: "Office") -> None:
        from schemas.fields import PLATFORM
        from streams.officer.holds import hold_person

        with bar("records read", None) as advance:
            person = office.person(whose, account)
            kept = await hold_person(office, person, account or PLATFORM, args.reason, within, advance)
        if args.json:
            print_json({"hold": kept.mark.id, "records": kept.records})
        else:
            print(f"hold {kept.mark.id} is in force; {kept.records:,} records copied")

    return at_desk(args, work)


def _release(args: argparse.Namespace) -> int:
    whose, account = number(args.number), account_of(args)

    async def work(office: "Office") -> None:
        from schemas.fields import PLATFORM
        from streams.officer.holds import release_person

        person = office.person(whose, account)
        print_released(args, await release_person(office, person, account or PLATFORM, args.reason, args.hold))

    return at_desk(args, work)


def print_released(args: argparse.Namespace, count: int) -> None:
    """Say what came of a release."""
    if args.json:
        print_json({"released": count})
    elif count:
        print("released: its copies are destroyed; what has not reached its own end lives on until then")
    else:
        print("no such hold is in force; nothing was done")


def _requests(args: argparse.Namespace) -> int:
    if (args.close is None) != (args.outcome is None):
        raise InputInvalid("--close and --outcome go together")
    if args.account is not None and args.told is None:
        raise InputInvalid("--account goes with --told")

    async def work(office: "Office") -> None:
        from streams.officer import requests

        if args.told is not None:
            found = [await requests.tell(office, args.told, account_of(args))]
        elif args.close is not None:
            found = [await requests.close(office, args.close, args.outcome)]
        else:
            found = requests.listed(office.deployment.store.ledger, closed=args.all)
        _print_requests(args, found)

    return at_desk(args, work)


def _print_requests(args: argparse.Namespace, found: "list[Request]") -> None:
    from processors.retention import instant

    now_s = time.time()
    if args.json:
        for request in found:
            print_json(
                {"kind": request.kind, "owner": request.owner, "reason": request.reason, "outcome": request.outcome,
                 "overdue": _is_overdue(request, now_s), **clocks(request)}
            )  # fmt: skip
        return
    if not found:
        print("no request is open")
        return
    rows = []
    for request in found:
        due_s = None if request.closed_s is not None else request.next_due_s
        left = ["closed"] if due_s is None else [f"tell {account}" for account in request.untold]
        left += [] if request.ended else [request.outcome or "open"]
        due = None if due_s is None else instant(due_s) + (" OVERDUE" if _is_overdue(request, now_s) else "")
        rows.append((request.id[:12], request.kind, request.owner, request.reason, instant(request.received_s), due,
                     ", ".join(left)))  # fmt: skip
    print_table(("REQUEST", "KIND", "DATA OF", "REASON", "RECEIVED", "NEXT DUE", "WHAT IS LEFT"), rows)


# --- words --------------------------------------------------------------------------------------------------------


def _waiting(processes: list[str]) -> None:
    names = ", ".join(name.rpartition("-")[0] for name in processes)
    say(f"streamveil: waiting until {names} has taken note, or its key lease has run out")


def _data_of(owner: str) -> str:
    from schemas.fields import PLATFORM

    return "the platform's own data" if owner == PLATFORM else f"the data of account {owner}"


def _is_overdue(request: "Request", now_s: float) -> bool:
    return request.closed_s is None and request.is_overdue(now_s)
