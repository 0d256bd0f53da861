"""`streamveil retention calendar`: what dies when."""

import argparse
import time
from typing import TYPE_CHECKING

from streams.cli.common import print_json, print_table
from streams.cli.times import instant_s
from streams.config import Config, load

if TYPE_CHECKING:
    from schemas.policy import Policy, Retention


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `retention`."""
    noun = subparsers.add_parser("retention", help="what dies when")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="calendar")
    calendar = verbs.add_parser("calendar", help="each rule with its instant for a communication of now; each key")
    calendar.add_argument("--now", metavar="T", help="as seen at this instant; nothing is destroyed")
    calendar.add_argument("--json", action="store_true", help="one JSON object a rule, then one a key")
    calendar.set_defaults(run=_calendar)


def _calendar(args: argparse.Namespace) -> int:
    from processors.retention import instant

    config = load(args)
    now_s = int(time.time()) if args.now is None else instant_s(args.now)
    rules, keys = _rules(config.policy, now_s), _keys(config, now_s)
    if args.json:
        for rule in rules:
            print_json(rule)
        for key in keys:
            print_json(key)
        return 0
    print(f"A communication of {instant(now_s)} under policy {config.policy.id}:\n")
    print_table(("WHAT", "KEPT", "DIES AT", "CLAUSE"), [tuple(rule.values()) for rule in rules])
    if keys:
        print("\nKeys alive, soonest first:\n")
        print_table([name.upper().replace("_", " ") for name in keys[0]], [tuple(key.values()) for key in keys])
    return 0


def _rules(policy: "Policy", now_s: int) -> list[dict[str, str | None]]:
    """Return what each rule says of a communication of now: what, how long in words, instant, clause."""
    from datetime import UTC, datetime

    from processors.plan import Planner
    from processors.retention import content_expires_s, deadline, instant
    from schemas.catalog import CATALOG, INPUTS, Domain
    from schemas.policy import parse_content_keep

    rows: list[dict[str, str | None]] = []

    def row(what: str, kept: str, dies_s: int | None, clause: str) -> None:
        dies_at = None if dies_s is None else instant(dies_s)
        rows.append({"what": what, "kept": kept, "dies_at": dies_at, "clause": clause})

    at = datetime.fromtimestamp(now_s, UTC)
    for rule in policy.retention:
        ends = deadline(rule, at, policy.zone) if rule.event in ("communication", "creation") else None
        row(rule.data_class, _in_words(rule), None if ends is None else int(ends.timestamp()), rule.clause)
    contents = [("content", policy.content.keep, policy.content.clause)]
    contents += [
        (f"content of account {account.id}", account.content, account.clause or policy.content.clause)
        for account in policy.listed
        if account.content is not None
    ]
    for what, keep, clause in contents:
        days = parse_content_keep(keep)
        kept = "never stored" if days is None else f"{keep} after the day of the communication"
        row(what, kept, None if days is None else content_expires_s(now_s, days), clause)
    planner = Planner(policy)
    for stream in CATALOG.values():
        if stream.max_hours is None:
            continue
        days, hours = divmod(stream.max_hours, 24)
        kept = f"{days} days" if days > 1 and not hours else f"{stream.max_hours} hours"
        dies_s = planner.output(stream.name, "", now_s).deadline_s
        if stream.name in INPUTS:
            dies_s, kept = now_s + stream.max_hours * 3600, f"{kept} at most; deleted once it is processed"
        elif stream.domain is Domain.REVIEW:
            review_days = min(days, parse_content_keep(policy.content.keep) or days)
            dies_s, kept = content_expires_s(now_s, review_days), f"{kept} at most; no longer than the content"
        row(f"stream {stream.name}", kept, dies_s, policy.processing_of(stream.data_class).clause)
    return sorted(rows, key=lambda found: (found["dies_at"] is None, found["dies_at"] or ""))


def _in_words(rule: "Retention") -> str:
    if rule.period is None:
        return rule.keep
    event = rule.event.replace("_", " ")
    return (
        f"{rule.keep} after the {event}" if rule.after == "event" else f"{rule.keep} after the {rule.after} of {event}"
    )


def _keys(config: Config, now_s: int) -> list[dict[str, str | int | None]]:
    """Return the epoch keys alive at `now_s` with their deadlines, soonest first; none without a key store."""
    from processors.retention import instant
    from streams.keys.sqlite import SqliteKeyStore

    if not config.keys_path.exists():
        return []
    store = SqliteKeyStore.open(config.keys_path, config.kms_dir, create=False)
    try:
        alive = [key for key in store.status(now_s) if key.state == "alive"]
    finally:
        store.close()
    alive.sort(key=lambda key: (key.deadline_s is None, key.deadline_s))
    return [
        {
            "domain": key.domain,
            "owner": key.owner,
            "epoch": key.epoch,
            "versions": key.versions,
            "dies_at": None if key.deadline_s is None else instant(key.deadline_s),
        }
        for key in alive
    ]
