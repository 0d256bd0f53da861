"""`streamveil keys status|rotate|destroy-due|reconcile`: which keys there are, until when, and their upkeep."""

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from schemas.errors import InputInvalid
from streams.cli.common import bar, print_json, print_table, say
from streams.cli.times import instant_s
from streams.config import Config, load

if TYPE_CHECKING:
    from streams.officer.reconcile import Reconciled
    from streams.officer.retention import Died
    from streams.officer.upkeep import Inventory, Renewed


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `keys`."""
    noun = subparsers.add_parser("keys", help="the keys of this deployment")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="status|rotate|destroy-due|reconcile")
    status = verbs.add_parser("status", help="epoch keys with their deadlines, destruction days, what backups open")
    status.add_argument("--json", action="store_true", help="one JSON object a key, then a summary")
    status.set_defaults(run=_status)
    rotate = verbs.add_parser("rotate", help="new root, wrapping and token keys; workers go on")
    rotate.add_argument("parts", nargs="*", metavar="root|wrapping|token", help="default: all three")
    rotate.add_argument("--json", action="store_true", help="one JSON object")
    rotate.set_defaults(run=_rotate)
    due = verbs.add_parser("destroy-due", help="destroy the keys that are due; retention run cuts the logs too")
    due.add_argument("--now", metavar="T", help="as of this instant; ahead of the clock only say what would go")
    due.add_argument("--yes", action="store_true", help="destroy as of --now; local-file KMS, 13 months at most")
    due.add_argument("--json", action="store_true", help="one JSON object")
    due.set_defaults(run=_destroy_due)
    reconcile = verbs.add_parser("reconcile", help="bring a key store from a backup up to date, from the audit stream")
    reconcile.add_argument("--yes", action="store_true", help="also if the audit stream may not name all destructions")
    reconcile.add_argument("--json", action="store_true", help="one JSON object")
    reconcile.set_defaults(run=_reconcile)


def _status(args: argparse.Namespace) -> int:
    from processors.retention import instant
    from streams.keys.opening import open_store
    from streams.officer.upkeep import inventory

    config = load(args)
    store = open_store(config)
    try:
        now_s = int(time.time())
        rows = [
            {
                "domain": key.domain,
                "owner": key.owner,
                "epoch": key.epoch,
                "versions": key.versions,
                "deadline": None if key.deadline_s is None else instant(key.deadline_s),
                "state": key.state,
            }
            for key in store.status(now_s)
        ]
        store_id, found = store.store_id, inventory(config, store, now_s)
    finally:
        store.close()
    if args.json:
        for row in rows:
            print_json(row)
        print_json({"summary": _summary(store_id, found)})
        return 0
    if rows:
        print_table([name.upper() for name in rows[0]], [tuple(row.values()) for row in rows])
    print(f"store {store_id}: {len(rows)} epochs, {found.leases} leases alive")
    _say(found)
    return 0


def _summary(store_id: str, found: "Inventory") -> dict[str, object]:
    from processors.retention import instant

    return {
        "store": store_id,
        "sequence": found.sequence,
        "counter": found.counter,
        "keks": found.keks,
        "destruction_days": found.days,
        "most_destruction_days": found.most_days,
        "token_key": found.tokens.current.version,
        "other_token_keys": [key.version for key in found.tokens.others],
        "token_rotation": found.tokens.changing,
        "leases": found.leases,
        "lost_keks": found.lost,
        "rewrap_window_s": found.rewrap_s,
        "kms_waiting_period_s": found.waiting_s,
        "backups_open": [
            {"day": one.day, "since": instant(one.since_s), "until": instant(one.until_s)} for one in found.stale
        ],
    }


def _say(found: "Inventory") -> None:
    """Print what there is beside the epoch keys."""
    from processors.retention import instant

    print(
        f"{found.keks} key-encryption keys alive, of {len(found.days)} destruction days; this policy makes at most"
        f" {found.most_days} days, each with one key, and one more while it is re-wrapped"
    )
    older = ", ".join(str(key.version) for key in found.tokens.others) or "none"
    print(f"token key version {found.tokens.current.version}; others: {older}")
    if found.tokens.changing:
        print("the token key is being rotated and nothing is cleared: if no keys rotate is running, run it again")
    print(f"destruction sequence {found.sequence}; counter of the key management service {found.counter}")
    print(
        f"a backup opens what was destroyed before its day until the day is re-wrapped: {found.rewrap_s // 3600} h at"
        f" most; the key management service can undo a deletion for {found.waiting_s // 3600} h"
    )
    for kek in found.lost:
        print(f"key-encryption key {kek} is gone: nothing under it opens; restore it, unless it was destroyed")
    if not found.stale:
        print("no backup opens anything that was destroyed")
    for one in found.stale:
        print(
            f"backups from before {instant(one.since_s)} open what was destroyed under {one.day}: until"
            f" {instant(one.until_s)}, or retention run --rewrap"
        )


def _rotate(args: argparse.Namespace) -> int:
    from streams.officer.upkeep import PARTS

    if not set(args.parts) <= set(PARTS):
        raise InputInvalid(f"keys rotate takes any of {', '.join(PARTS)}; none is all")
    done = asyncio.run(_rotated(load(args), args.parts))
    if args.json:
        print_json({**done._asdict(), "token": None if done.token is None else done.token._asdict()})
        return 0
    if done.root:
        print("root: rotated")
    elif not args.parts:
        print("root: the key management service's own; its operators rotate it")
    if done.rewrapped is not None:
        print(f"wrapping: {done.rewrapped:,} keys moved under new key-encryption keys")
    if done.token is not None:
        print(
            f"token: version {done.token.version}; {done.token.written:,} opt-outs written anew,"
            f" {done.token.widened:,} of them widened to the account; nothing was cleared"
            f" for {done.token.waited_s:.1f} s"
        )
        if done.token.exemptions or done.token.dropped:
            print(
                f"{done.token.exemptions:,} exemptions written anew; {done.token.dropped:,} that do not open any more"
                " are in force no longer"
            )
    if done.destroyed:
        print(f"token keys under which nobody is known any more, destroyed: {', '.join(map(str, done.destroyed))}")
    say("take a new backup of the key store: older ones do not open what was moved")
    return 0


async def _rotated(config: Config, parts: Sequence[str]) -> "Renewed":
    from streams.deployment import Deployment
    from streams.officer.upkeep import rotate

    async with Deployment.open(config, create=False) as deployment:
        with bar("keys and opt-outs", None) as advance:
            return await rotate(deployment, parts, int(time.time()), advance, _waiting)


def _waiting(processes: list[str]) -> None:
    say(f"waiting for {', '.join(processes)} to take note, or for their key leases to run out")


def _destroy_due(args: argparse.Namespace) -> int:
    from processors.retention import instant
    from streams.officer.retention import moment

    config = load(args)
    asked_s = None if args.now is None else instant_s(args.now)
    now_s, dry = moment(config, asked_s, int(time.time()), yes=args.yes)
    died = asyncio.run(_destroyed(config, now_s, dry=dry))
    if args.json:
        print_json({"now": instant(now_s), "dry": dry, **died._asdict()})
        return 0
    would = "would be" if dry else "were"
    persons = "all" if dry else f"{died.persons:,}"
    print(
        f"as of {instant(now_s)}: {died.epochs:,} epochs {would} destroyed, and {len(died.days)} destruction days with"
        f" {persons} secrets of people under them"
    )
    return 0


async def _destroyed(config: Config, now_s: int, *, dry: bool) -> "Died":
    from streams.deployment import Deployment
    from streams.officer.upkeep import destroy_due

    async with Deployment.open(config, create=False) as deployment:
        return await destroy_due(deployment, now_s, dry=dry)


def _reconcile(args: argparse.Namespace) -> int:
    done = asyncio.run(_reconciled(load(args), incomplete=args.yes))
    if args.json:
        marks = {"missing": done.missing, "nameless": done.nameless}
        print_json({**done._asdict(), **{name: [mark._asdict() for mark in them] for name, them in marks.items()}})
        return 0
    print(
        f"up to date: {done.sids:,} secrets of people and {done.epochs:,} epochs are destroyed, {done.ended:,} holds"
        f" and restrictions ended, {done.opt_outs:,} opt-outs written anew"
    )
    for mark in done.missing:
        say(f"the backup does not have {mark.kind} {mark.id}, case {mark.reason}: make it again")
    for mark in done.nameless:
        say(
            f"{mark.kind} {mark.id}, case {mark.reason}, is in force, but its number is lost: make it again, with the"
            " same number, case and period; until then no token key is rotated"
        )
    for hold in done.successors:
        say(f"hold {hold} goes on for one whose copies are lost: retention run copies what still lives")
    if done.given_up:
        epochs = ", ".join(sorted({"/".join(name.split("/")[::2]) for name in done.given_up}))
        say(
            f"given up: {epochs}. What was sealed under these epochs opens no more, and nothing is sealed under them"
            " again: records of their time get no personal part, or no content, until the epoch is over"
        )
    say("run retention run now, and take a new backup of the key store")
    return 0


async def _reconciled(config: Config, *, incomplete: bool) -> "Reconciled":
    from streams.deployment import Deployment
    from streams.officer.reconcile import reconcile

    async with Deployment.open(config, create=False, outdated=True) as deployment:
        with bar("audit entries", None) as advance:
            return await reconcile(deployment, int(time.time()), incomplete=incomplete, advance=advance)
