"""`streamveil demo`: the whole pipeline on generated traffic, and a summary to look at."""

import argparse
import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from streams.cli.common import bar, print_json, say
from streams.config import load

if TYPE_CHECKING:
    from rich.console import Console

    from streams.demo.demo import Summary

DEFAULT_CONFIG = "streamveil.toml"
RECORDS = 24_000
WIDTH = 110
"""Columns of the summary where standard output is no terminal."""


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `demo`."""
    demo = subparsers.add_parser(
        "demo",
        help="run the whole pipeline on generated traffic and show where every record ended",
        description="Works in ./streamveil-demo, made anew at each run; with --log or --config, in that deployment, "
        "which must be empty, under the demo's policy. On Kafka the streams are made if they are missing.",
    )
    demo.add_argument("--records", type=_count, default=RECORDS, metavar="N", help=f"how many ({RECORDS:,})")
    demo.add_argument("--seed", type=int, default=1, metavar="S", help="same seed, same traffic (1)")
    demo.add_argument("--json", action="store_true", help="the summary as one JSON object")
    demo.add_argument(
        "--compare", action="store_true", help="run the same on SQLite too, and fail if a count is not the same"
    )
    demo.set_defaults(run=_run)


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 10_000_000:
        raise ValueError
    return count


def _run(args: argparse.Namespace) -> int:
    import msgspec

    from streams.demo.demo import make_folder, policy, run

    if args.log is None and args.config == DEFAULT_CONFIG:
        args.config = str(make_folder())
    config = load(args)._replace(policy=policy(), policy_source="demo")
    if config.kafka is not None:
        from streams.log.provision import apply

        apply(config)
    now_s = int(time.time())
    summary = asyncio.run(run(config, args.records, args.seed, now_s, _phase))
    other = _on_sqlite(args.records, args.seed, now_s) if args.compare else None
    commands = _next_commands(args, [one.reason for one in summary.refused])
    if args.json:
        print_json({**msgspec.to_builtins(summary), "next": commands})
    else:
        _show(summary, commands)
    same = other is None or _same(summary, other)
    return 0 if summary.adds_up and same else 1


def _on_sqlite(records: int, seed: int, now_s: int) -> "Summary":
    """Run the demo in a deployment on SQLite that is gone afterwards."""
    from streams.demo.demo import make_folder, run

    with tempfile.TemporaryDirectory(prefix="streamveil-demo-") as folder:
        config = load(argparse.Namespace(config=str(make_folder(Path(folder) / "demo")), log=None))
        return asyncio.run(run(config, records, seed, now_s, _phase))


def _same(summary: "Summary", other: "Summary") -> bool:
    """Say on standard error whether two runs came to the same, and return it."""
    from streams.demo.demo import compare

    checks = list(compare(summary, other))
    unlike = [f"{one.rule}: {one.expected:,} on SQLite, {one.found:,} here" for one in checks if not one.holds]
    if unlike:
        say(f"streamveil: {len(unlike)} of {len(checks)} counts differ from SQLite's: {'; '.join(unlike[:3])}")
    else:
        say(f"the same as on SQLite: all {len(checks)} counts by outcome, reason and stream")
    return not unlike


@contextmanager
def _phase(what: str, records: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while a phase goes on, and a line when it is over, on standard error."""
    started = time.perf_counter()
    with bar(what, records) as advance:
        yield advance
    say(f"{what} {records:,} records: {time.perf_counter() - started:.1f} s")


def _next_commands(args: argparse.Namespace, refused: list[str]) -> dict[str, str]:
    """Return who might look at what next, as commands that can be pasted; `refused`: the reasons there were."""
    where = [] if args.config == DEFAULT_CONFIG else ["--config", args.config]
    where += ["--log", args.log] if args.log else []

    def command(*words: str) -> str:
        return f"{_program()} {shlex.join(['tail', *words, *where])}"

    verdicts = command("verdicts", "--from-beginning", "--json")
    if refused:
        verdicts += f" | grep -m 3 {'opted_out' if 'opted_out' in refused else refused[0]}"
    return {
        "billing": command("cdr.anonymous", "--max", "3"),
        "the privacy officer": command("cdr.pii", "--max", "2", "--reveal", "--reason", "DEMO-1"),
        "a refused gateway": verdicts,
    }


def _program() -> str:
    """Return how this program was started, as a shell takes it."""
    typed = sys.argv[0]
    name = os.path.basename(typed)  # noqa: PTH119 — of what was typed, not of a path of ours
    if name.endswith(".py"):
        return f"{shlex.quote(sys.executable)} -m streams.cli"
    return name if shutil.which(name) == typed else shlex.quote(typed)


# --- the summary --------------------------------------------------------------------------------------------


def _show(summary: "Summary", commands: dict[str, str]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    _show_ends(console, summary)
    _show_refused(console, summary)
    _show_deaths(console, summary)
    speed = summary.speed
    for name, what in (("publish", "published"), ("run", "screened, sealed, split and committed")):
        console.print(f"{what}: [bold]{speed[name].records_per_s:,}[/] records/s ({speed[name].seconds:.1f} s)")
    print("\nwhere the files are")
    for what, path in summary.files.items():
        print(f"  {what}: {_relative(path)}")
    print("\nwhat to try next")
    for who, command in commands.items():
        print(f"  what {who} sees\n    {command}")


def _show_ends(console: "Console", summary: "Summary") -> None:
    made = ", ".join(f"{count:,} {kind}" for kind, count in summary.made.items())
    console.print(f"\n[bold]{summary.records:,} records came in[/] (seed {summary.seed}): {made}\n")
    rows = [(one.kind, one.came_in, one.emit, one.refuse, one.quarantine, one.expired) for one in summary.ends]
    totals = ("all", *(sum(int(row[at]) for row in rows) for at in range(1, 6)))
    titles = ("type", "came in", "emitted", "refused", "quarantined", "expired")
    _table(console, "where each one ended", titles, [*rows, totals], numbers=range(1, 6))
    console.print(f"emitted without the personal part, which was past its deadline: {summary.anonymous_only:,}")
    broken = [check for check in summary.checks if not check.holds]
    held = len(summary.checks) - len(broken)
    word = "[bold green]yes[/]" if summary.adds_up else "[bold red]NO[/]"
    console.print(f"adds up: {word} ({held} of {len(summary.checks)} counts agree with what the log holds)")
    for check in broken:
        console.print(f"  {check.rule}: expected {check.expected:,}, found {check.found:,}")
    console.print()


def _show_refused(console: "Console", summary: "Summary") -> None:
    rows = [
        (one.reason, one.clause, one.count, " ".join(map(str, one.codes.values())) or "-") for one in summary.refused
    ]
    _table(console, "refusals by reason", ("reason", "clause", "records", "codes"), rows, numbers=(2,))
    vendors = next((one.codes for one in summary.refused if one.codes), {})
    console.print(f"codes as gateways know them from {', '.join(vendors)}\n" if vendors else "")
    _table(console, "quarantine", ("reason", "records"), summary.quarantined.items(), numbers=(1,))
    console.print()


def _show_deaths(console: "Console", summary: "Summary") -> None:
    rows = [
        (
            one.stream,
            one.records,
            "-" if one.keys is None else one.keys,
            _short(one.soonest),
            _short(one.latest),
            one.rule,
        )
        for one in summary.deaths
    ]
    titles = ("stream", "records", "keys", "first dies", "last dies", "because")
    _table(console, "what dies when (UTC); sealed streams with their keys", titles, rows, numbers=(1, 2))
    console.print()


def _relative(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _short(instant: str | None) -> str:
    """Return the date of a midnight, date and time of another instant."""
    if instant is None:
        return "-"
    return instant[:10] if instant.endswith("T00:00:00Z") else instant[:16].replace("T", " ")


def _table(
    console: "Console",
    title: str,
    titles: tuple[str, ...],
    rows: Iterable[tuple[object, ...]],
    *,
    numbers: Container[int],
) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for at, name in enumerate(titles):
        table.add_column(name, justify="right" if at in numbers else "left", overflow="fold", no_wrap=name != "because")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console.print(table)
