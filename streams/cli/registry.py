"""`streamveil registry load|change|status`: bring in a Do-Not-Call list, and see how old the loaded ones are."""

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from processors.screen.registry import DAY_S, RegistryFile, age_s, freshness
from schemas.errors import InputInvalid, RegistryInvalid
from schemas.policy import Policy, RegistryRule
from streams.cli.common import bar, print_table, say, size_bytes
from streams.cli.times import instant_s
from streams.files import read_text

if TYPE_CHECKING:
    from streams.state.registries import Terms


class Row(msgspec.Struct, frozen=True):
    """One registry of the policy; what is None is not known as long as it is not loaded."""

    name: str
    country: str
    as_of: str | None
    age_days: float | None
    count: int | None
    encoding: str | None
    size_bytes: int | None
    max_age_days: int
    state: str  # fresh, stale, not loaded, damaged


def load(args: argparse.Namespace) -> int:
    """Load files as a registry that the policy lists, all or nothing."""
    from streams import config as deployment
    from streams.state import registries as store

    config = deployment.load(args)
    rule = _rule(config.policy, args.name)
    terms = _terms(args, rule)
    with bar("loading", _total(args.files)) as progress:
        header = store.load(config.registries_dir, rule.name, args.files, terms, progress)
    state = freshness(rule.max_age_days, header.as_of, terms.now_s)
    print(f"{header.name}: {header.count} numbers loaded, as of {_rfc3339(header.as_of)}, {state}")
    return 0


def change(args: argparse.Namespace) -> int:
    """Apply change lists to a registry that is loaded, all or nothing."""
    from streams import config as deployment
    from streams.state import registries as store

    config = deployment.load(args)
    rule = _rule(config.policy, args.name)
    terms = _terms(args, rule)
    with bar("changing", _total([*args.add, *args.delete])) as progress:
        done = store.change(config.registries_dir, rule.name, add=args.add, delete=args.delete, terms=terms,
                            progress=progress)  # fmt: skip
    state = freshness(rule.max_age_days, done.header.as_of, terms.now_s)
    print(f"{rule.name}: {done.added} added, {done.already} were listed already; "
          f"{done.deleted} deleted, {done.unlisted} were not listed")  # fmt: skip
    print(f"{rule.name}: {done.header.count} numbers, as of {_rfc3339(done.header.as_of)}, {state}")
    return 0


def status(args: argparse.Namespace) -> int:
    """Print every registry of the policy, loaded or not, and whether it may be used; 1 if any file is damaged.

    Each damaged file has a line on standard error, be it of the policy or not: no worker starts on it.
    """
    from streams import config as deployment
    from streams.state.registries import survey

    config = deployment.load(args)
    found, now_s = survey(config.registries_dir), int(time.time())
    damaged = [one for one in found.values() if isinstance(one, RegistryInvalid)]
    rows = [_row(rule, found.get(rule.name), now_s) for rule in _rules(config.policy).values()]
    if args.json:
        for row in rows:
            print(msgspec.json.encode(row).decode())
    elif rows:
        print_table(
            ("NAME", "COUNTRY", "AS OF", "AGE (DAYS)", "NUMBERS", "ENCODING", "BYTES", "MAX AGE", "STATE"),
            map(msgspec.structs.astuple, rows),
        )
    else:
        print("the policy lists no registry")
    for error in damaged:
        say(f"streamveil: {error}")
    return 1 if damaged else 0


def _rules(policy: Policy) -> dict[str, RegistryRule]:
    return {rule.name: rule for rule in policy.screening.registry}


def _rule(policy: Policy, name: str) -> RegistryRule:
    rules = _rules(policy)
    if name not in rules:
        listed = ", ".join(sorted(rules)) or "none"
        raise InputInvalid(f"the policy lists no registry of this name; it lists: {listed}")
    return rules[name]


def _terms(args: argparse.Namespace, rule: RegistryRule) -> "Terms":
    from processors.screen.lists import mapped
    from streams.state.registries import Terms

    form = None
    if args.map is not None:
        try:
            form = mapped(read_text(args.map, pipe=True), str(args.map))
        except OSError as error:
            raise InputInvalid(f"cannot be read: {error.strerror}", file=str(args.map)) from None
        except UnicodeDecodeError:
            raise InputInvalid("not UTF-8", file=str(args.map)) from None
    return Terms(
        country=rule.country,
        calling_code=rule.calling_code,
        now_s=int(time.time()),
        as_of_s=None if args.as_of is None else instant_s(args.as_of),
        form=form,
        older=args.older,
        smaller=args.smaller,
    )


def _row(rule: RegistryRule, found: RegistryFile | RegistryInvalid | None, now_s: int) -> Row:
    if not isinstance(found, RegistryFile):
        state = "not loaded" if found is None else "damaged"
        return Row(rule.name, rule.country, None, None, None, None, None, rule.max_age_days, state)
    return Row(
        name=rule.name,
        country=rule.country,
        as_of=_rfc3339(found.as_of_s),
        age_days=round(age_s(found.as_of_s, now_s) / DAY_S, 1),
        count=found.count,
        encoding=found.encoding,
        size_bytes=found.size_bytes,
        max_age_days=rule.max_age_days,
        state=freshness(rule.max_age_days, found.as_of_s, now_s),
    )


def _total(files: Sequence[Path]) -> int:
    return sum(size_bytes(str(file)) or 0 for file in files)


def _rfc3339(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def add(subparsers: Any) -> None:
    """Register the noun `registry` with an argparse subparsers object."""
    noun = subparsers.add_parser("registry", help="load Do-Not-Call lists, and see how old they are")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="load|change|status")
    loading = verbs.add_parser("load", help="replace a registry by the numbers of these files, all or nothing")
    changing = verbs.add_parser("change", help="add and delete the numbers of change lists, all or nothing")
    for verb in (loading, changing):
        verb.add_argument("name", metavar="NAME", help="as the policy lists it, such as us-dnc")
    loading.add_argument("files", metavar="FILE", nargs="+", type=Path, help="the whole list: plain, .zip or .gz")
    changing.add_argument("--add", metavar="FILE", nargs="+", type=Path, default=[], help="numbers to add")
    changing.add_argument("--delete", metavar="FILE", nargs="+", type=Path, default=[], help="numbers to delete, first")
    for verb in (loading, changing):
        verb.add_argument("--map", metavar="FILE", type=Path, help="how the lines are to be read (docs/registries.md); "
                          "us-dnc and ca-dncl are known")  # fmt: skip
        verb.add_argument("--as-of", metavar="T", help="date or RFC 3339 instant of the list, from which its age "
                          "counts; default: the oldest modification time of the files")  # fmt: skip
        verb.add_argument("--older", action="store_true", help="even if the list is older than the one loaded")
        verb.add_argument("--smaller", action="store_true", help="even if less than half of the numbers remain")
    loading.set_defaults(run=load)
    changing.set_defaults(run=change)
    showing = verbs.add_parser("status", help="date, age, size and state of every registry of the policy")
    showing.add_argument("--json", action="store_true", help="one JSON object a line")
    showing.set_defaults(run=status)
