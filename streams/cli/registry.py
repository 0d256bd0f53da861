"""`streamveil registry load|status`: bring in a Do-Not-Call list, and see how old the loaded ones are."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from processors.screen.registry import DAY_S, BitmapRegistry, age_s, freshness
from schemas.errors import InputInvalid
from schemas.policy import Policy, RegistryRule
from streams.cli.times import instant_s

US_CALLING_CODE = "1"


class Row(msgspec.Struct, frozen=True):
    """One registry of the policy; what is None is not known as long as it is not loaded."""

    name: str
    country: str
    as_of: str | None
    age_days: float | None
    count: int | None
    max_age_days: int
    state: str  # fresh, stale, not loaded


def load(args: argparse.Namespace) -> int:
    """Load files as a registry that the policy lists, all or nothing."""
    from streams import config as deployment
    from streams.state import registries as store

    config = deployment.load(args)
    rule = _rule(config.policy, args.name)
    now_s = int(time.time())
    as_of_s = now_s if args.as_of is None else instant_s(args.as_of)
    if as_of_s > now_s + DAY_S:
        raise InputInvalid("--as-of lies in the future; give the date of the list")
    with _progress(args.files) as progress:
        header = store.load(
            config.registries_dir,
            rule.name,
            args.files,
            country=rule.country,
            calling_code=rule.calling_code,
            as_of_s=as_of_s,
            now_s=now_s,
            progress=progress,
        )
    state = freshness(rule.max_age_days, as_of_s, now_s)
    sys.stdout.write(f"{header.name}: {header.count} numbers loaded, as of {_rfc3339(as_of_s)}, {state}\n")
    return 0


def status(args: argparse.Namespace) -> int:
    """Print every registry of the policy, loaded or not, and whether it may be used."""
    from streams import config as deployment
    from streams.state.registries import Registries

    config = deployment.load(args)
    registries, now_s = Registries(config.registries_dir), int(time.time())
    rows = [_row(rule, registries.get(rule.name), now_s) for rule in _rules(config.policy).values()]
    if args.json:
        sys.stdout.writelines(msgspec.json.encode(row).decode() + "\n" for row in rows)
    elif rows:
        sys.stdout.write(_table(rows))
    else:
        sys.stdout.write("the policy lists no registry\n")
    return 0


def _rules(policy: Policy) -> dict[str, RegistryRule]:
    return {rule.name: rule for rule in policy.screening.registry}


def _rule(policy: Policy, name: str) -> RegistryRule:
    rules = _rules(policy)
    if name not in rules:
        listed = ", ".join(sorted(rules)) or "none"
        raise InputInvalid(f"the policy lists no registry of this name; it lists: {listed}")
    if rules[name].calling_code != US_CALLING_CODE:
        raise InputInvalid("only lists of calling code 1 can be loaded, in the format areacode,number")
    return rules[name]


def _row(rule: RegistryRule, found: BitmapRegistry | None, now_s: int) -> Row:
    if found is None:
        return Row(rule.name, rule.country, None, None, None, rule.max_age_days, "not loaded")
    return Row(
        name=rule.name,
        country=rule.country,
        as_of=_rfc3339(found.as_of_s),
        age_days=round(age_s(found.as_of_s, now_s) / DAY_S, 1),
        count=found.header.count,
        max_age_days=rule.max_age_days,
        state=freshness(rule.max_age_days, found.as_of_s, now_s),
    )


def _table(rows: Sequence[Row]) -> str:
    titles = ("NAME", "COUNTRY", "AS OF", "AGE (DAYS)", "NUMBERS", "MAX AGE", "STATE")
    cells = [
        titles,
        *(tuple("-" if cell is None else str(cell) for cell in msgspec.structs.astuple(row)) for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in cells)


def _rfc3339(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def _progress(files: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    """Yield what to tell of bytes read: a bar on standard error if that is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import Progress

    total = sum(file.stat().st_size for file in files if file.is_file())
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda read: bar.advance(task, read)


def add(subparsers: Any) -> None:
    """Register the noun `registry` with an argparse subparsers object."""
    noun = subparsers.add_parser("registry", help="load Do-Not-Call lists, and see how old they are")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="load|status")
    loading = verbs.add_parser("load", help="replace a registry by the numbers of these files, all or nothing")
    loading.add_argument("name", metavar="NAME", help="as the policy lists it, such as us-dnc")
    loading.add_argument("files", metavar="FILE", nargs="+", type=Path, help="lines of areacode,number")
    loading.add_argument(
        "--as-of",
        metavar="T",
        help="date or RFC 3339 instant of the list, from which its age counts; default: now",
    )
    loading.set_defaults(run=load)
    showing = verbs.add_parser("status", help="date, age, size and state of every registry of the policy")
    showing.add_argument("--json", action="store_true", help="one JSON object a line")
    showing.set_defaults(run=status)
