"""`streamveil subject access|export|rectify`: what is held about a person, to read, to take along, to correct."""

import argparse
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from streams.cli.common import bar, new_file, number, opened, plain, print_json
from streams.cli.desk import account_of, add_person, add_received, at_desk, clocks, received_s, say_whom

if TYPE_CHECKING:
    from streams.officer.access import Kind
    from streams.officer.office import Office
    from streams.officer.written import Writer


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `access`, `export` and `rectify` below `subject`."""
    accessing = verbs.add_parser("access", help="everything held about a person, and who has opened it")
    accessing.add_argument("--page", metavar="FILE", help="a page to read, in a new file (0600)")
    accessing.set_defaults(run=_access)
    exporting = verbs.add_parser("export", help="what a person's communications hold, for a machine to read")
    exporting.add_argument("--out", metavar="FILE", help="into a new file (0600); default: standard output")
    exporting.set_defaults(run=_export)
    rectifying = verbs.add_parser("rectify", help="add a sealed correction beside records, which stay as they are")
    rectifying.add_argument("--set", dest="assignments", action="append", default=[], metavar="FIELD=VALUE",
                            help="what is right; others on this machine may see it: better --correction")  # fmt: skip
    rectifying.add_argument("--correction", metavar="FILE", help="a JSON object of fields, or - for standard input")
    rectifying.add_argument("--record", dest="records", action="append", default=[],
                            metavar="STREAM/PARTITION/OFFSET",
                            help="this record; default: each of the person's that has such a field")  # fmt: skip
    rectifying.set_defaults(run=_rectify)
    for verb in (accessing, exporting, rectifying):
        add_person(verb)
        add_received(verb)
    accessing.add_argument("--json", action="store_true", help="one JSON object an item")
    exporting.add_argument("--json", action="store_true", help="one JSON object an item; default: one document")
    rectifying.add_argument("--json", action="store_true", help="one JSON object")


def _access(args: argparse.Namespace) -> int:
    return at_desk(args, lambda office: _report(args, office, "access", args.page))


def _export(args: argparse.Namespace) -> int:
    return at_desk(args, lambda office: _report(args, office, "export", args.out))


async def _report(args: argparse.Namespace, office: "Office", kind: "Kind", file: str | None) -> None:
    """Write a report, item by item, to where it was asked for."""
    from streams.officer.access import Report
    from streams.officer.written import Document, Lines, Page, Text

    report = Report(
        office, number(args.number), account=account_of(args), reason=args.reason, kind=kind, now_s=int(time.time()),
        received_s=received_s(args),
    )  # fmt: skip
    with ExitStack() as stack:
        writers: list[Writer] = []
        if kind == "export":
            write = (stack.enter_context(new_file(file)) if file else sys.stdout).write
            writers.append(Lines(write) if args.json else Document(write))
        else:
            if file:
                writers.append(Page(stack.enter_context(new_file(file)).write))
            if args.json or not file:
                writers.append((Lines if args.json else Text)(sys.stdout.write))
        advance = stack.enter_context(bar("records read", await report.size()))
        async for item in report.items(advance):
            for writer in writers:
                writer.put(item)
        for writer in writers:
            writer.end()
        sys.stdout.flush()
    if report.request is not None:
        say_whom(report.request)


def _rectify(args: argparse.Namespace) -> int:
    return at_desk(args, lambda office: _correct(args, office))


async def _correct(args: argparse.Namespace, office: "Office") -> None:
    from streams.officer.rectify import Rectification, corrections_of, place_of

    whose, document = number(args.number, alone=args.correction != "-"), None
    if args.correction is not None:
        with opened(args.correction) as file:
            document = file.read()
    fields = corrections_of([plain(one) for one in args.assignments], document)
    places = [place_of(plain(one)) for one in args.records]
    work = Rectification(office, whose, account=account_of(args), reason=args.reason, received_s=received_s(args))
    with bar("records read", None) as advance:
        done = await work.apply(fields, places, advance)
    if args.json:
        counts = {"corrected": done.corrected, "unchanged": done.unchanged, "not_opened": done.not_opened}
        print_json({**counts, **({"request": None} if done.request is None else clocks(done.request))})
    elif done.corrected or done.unchanged:
        print(f"corrected: {done.corrected} records; {done.unchanged} said so already")
    else:
        print("no record of this person has such a field; nothing was written")
    if done.not_opened and not args.json:
        print("not corrected: " + ", ".join(f"{count} {why}" for why, count in done.not_opened.items()))
    if done.request is not None:
        say_whom(done.request)
