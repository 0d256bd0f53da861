"""`streamveil retention calendar` and `run`: what dies when, and that it does."""

import argparse
import asyncio
import time
from typing import TYPE_CHECKING

from streams.cli.common import bar, print_json, print_table
from streams.cli.times import instant_s
from streams.config import Config, load

if TYPE_CHECKING:
    from schemas.policy import Policy, Retention
    from streams.officer.retention import Report


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `retention`."""
    noun = subparsers.add_parser("retention", help="what dies when")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="calendar|run")
    calendar = verbs.add_parser("calendar", help="each rule with its instant for a communication of now; each key")
    calendar.add_argument("--now", metavar="T", help="as seen at this instant; nothing is destroyed")
    calendar.add_argument("--json", action="store_true", help="one JSON object a rule, then one a key")
    calendar.set_defaults(run=_calendar)
    run = verbs.add_parser("run", help="destroy what is due, re-wrap, and cut the logs; safe at any time")
    run.add_argument("--now", metavar="T", help="as of this instant; ahead of the clock only say what would go")
    run.add_argument("--yes", action="store_true", help="destroy as of --now; local-file KMS, 13 months at most")
    run.add_argument("--rewrap", action="store_true", help="re-wrap at once whatever an older backup could open")
    run.add_argument("--json", action="store_true", help="one JSON object")
    run.set_defaults(run=_run)


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


def _run(args: argparse.Namespace) -> int:
    from streams.deployment import Deployment
    from streams.officer import retention

    config = load(args)
    asked_s = None if args.now is None else instant_s(args.now)
    now_s, dry = retention.moment(config, asked_s, int(time.time()), yes=args.yes)

    async def run() -> "Report":
        async with Deployment.open(config, create=False) as deployment:
            with bar("records looked at", None) as advance:
                return await retention.run(deployment, now_s, dry=dry, rewrap=args.rewrap, advance=advance)

    report = asyncio.run(run())
    if args.json:
        print_json(report.as_json())
    else:
        _say(report)
    return 1 if report.failed else 0


def _say(report: "Report") -> None:
    from processors.retention import instant

    as_of = instant(report.at_s)
    print(f"Dry run: what would go as of {as_of}; nothing did.\n" if report.dry else f"What went as of {as_of}:\n")
    rows: list[tuple[str, str]] = [
        ("records kept for legal holds", "first" if report.dry else f"{report.held:,}"),
        ("epoch keys", f"{report.died.epochs:,}"),
        ("destruction days", ", ".join(report.died.days) or "0"),
        ("people's secrets of these days", "all" if report.dry else f"{report.died.persons:,}"),
        ("accounts that left", ", ".join(report.offboarded) or "0"),
        ("days re-wrapped", ", ".join(report.rewrapped) or "0"),
    ]
    for cut in report.cuts:
        moves = [f"{begin}→{end}" for begin, end in zip(cut.begins, cut.ends, strict=True)]
        rows.append((f"stream {cut.stream}", f"{cut.records:,} records cut off ({', '.join(moves)})"))
    rows += [(f"skipped: {one.what}", one.why) for one in report.skipped]
    print_table(("WHAT", "HOW MUCH"), rows)


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
        if stream.max_hours is None or stream.domain is Domain.EXEMPTION:  # which say themselves when they end
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
    from streams.keys.opening import open_store, store_exists

    if not store_exists(config):
        return []
    store = open_store(config)
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
