"""`streamveil streams`: have the brokers as the catalog of streams wants them, or see what differs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from streams.cli.common import print_json, print_table, say
from streams.config import load

if TYPE_CHECKING:
    from schemas.catalog import Stream
    from schemas.policy import Policy
    from streams.log.provision import Difference


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `streams`."""
    noun = subparsers.add_parser("streams", help="topics, retention, users and rights on Kafka")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="apply|show")
    apply = verbs.add_parser("apply", help="make topics, settings, rights and users as the catalog wants them")
    apply.add_argument(
        "--credentials",
        metavar="DIR",
        type=Path,
        help="make the users that are missing, each with a new password in the file DIR/ROLE.password",
    )
    apply.set_defaults(run=_apply)
    show = verbs.add_parser("show", help="what differs from what the catalog wants; on SQLite, the catalog")
    show.add_argument("--json", action="store_true", help="one JSON object a difference, or a stream on SQLite")
    show.set_defaults(run=_show)


def _apply(args: argparse.Namespace) -> int:
    from streams.log.provision import apply, show

    config = load(args)
    changes = apply(config, credentials=args.credentials)
    for change in changes:
        print(_line(change))
    print(f"{_counted(len(changes), 'change')}" if changes else "nothing to change")
    left = show(config)
    users = sum(one.kind == "user" for one in left)
    if users:
        say(f"{_counted(users, 'user')} missing: give --credentials DIR to make them")
    if len(left) > users:
        say(f"{_counted(len(left) - users, 'difference')} left for you to look at: `streamveil streams show`")
    return 0


def _show(args: argparse.Namespace) -> int:
    config = load(args)
    if config.kafka is None:
        _catalog(config.policy, as_json=args.json)
        return 0
    from streams.log.provision import show

    found = show(config)
    for one in found:
        if args.json:
            print_json(one._asdict())
        else:
            print(_line(one))
    if not found and not args.json:
        print("everything is as the catalog wants it")
    return 0


_MARKS = {"create": "+", "delete": "-", "alter": "~", "refuse": "!", "leave": "?"}
_WHY = {"refuse": "  (apply refuses to change this)", "leave": "  (apply leaves this alone)"}


def _line(one: "Difference") -> str:
    what = " ".join(text for text in (one.kind, one.name, one.setting) if text)
    values = "" if one.found is None else f": {one.found} → {one.wanted or 'not set'}"
    return f"{_MARKS[one.action]} {what}{values}{_WHY.get(one.action, '')}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _catalog(policy: "Policy", *, as_json: bool) -> None:
    """Print the table of streams."""
    from schemas.catalog import CATALOG

    rows = [
        {
            "stream": row.name,
            "holds": row.holds,
            "lives": _life(row, policy),
            "written_by": row.writers,
            "read_by": row.readers,
            "followed_by": row.followers,
        }
        for row in CATALOG.values()
    ]
    if as_json:
        for one in rows:
            print_json(one)
        return
    cells = [[", ".join(cell) or "-" if isinstance(cell, tuple) else cell for cell in one.values()] for one in rows]
    print_table([name.upper().replace("_", " ") for name in rows[0]], cells)
    say("streams are provisioned on Kafka only: this log on SQLite makes its own")


def _life(row: "Stream", policy: "Policy") -> str:
    if row.max_hours is not None:
        return f"{row.max_hours} hours" if row.max_hours <= 24 else f"{row.max_hours // 24} days"
    if row.data_class == "content":
        return "as the account instructs"
    rule = policy.retention_of(row.data_class)
    if rule is None:
        return "until released"
    return rule.keep if rule.period is None else f"{rule.keep} after {rule.after} of {rule.event}".replace("_", " ")
