"""`streamveil evidence report|verify|key`: what an outside auditor gets, and how they check it."""

import argparse
import asyncio
import sys
from pathlib import Path

from streams.cli.common import bar, print_json, say
from streams.cli.times import instant_s
from streams.config import load


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `evidence`."""
    noun = subparsers.add_parser("evidence", help="signed reports for an outside auditor")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="report|verify|key")
    report = verbs.add_parser("report", help="write what happened in a window into a new folder (0700), signed")
    report.add_argument("--from", dest="from_", required=True, metavar="T", help="an RFC 3339 instant or a date")
    report.add_argument("--to", required=True, metavar="T", help="the first instant that is not in it")
    report.add_argument("--out", metavar="FOLDER", help="that does not exist; default: evidence-FROM-TO")
    report.add_argument("--json", action="store_true", help="one JSON object")
    report.set_defaults(run=_report)
    verify = verbs.add_parser("verify", help="check a report, offline; exit 1 if anything is wrong")
    verify.add_argument("folder", metavar="FOLDER", help="of the report")
    verify.add_argument("--key", metavar="FILE", help="the public key (PEM), got in another way than the report")
    verify.add_argument("--after", metavar="FILE", help="checkpoint.json of an earlier report")
    verify.add_argument("--json", action="store_true", help="one JSON object a check")
    verify.set_defaults(run=_verify)
    key = verbs.add_parser("key", help="print the public key that checks reports")
    key.add_argument("--json", action="store_true", help="one JSON object")
    key.set_defaults(run=_key)


def _report(args: argparse.Namespace) -> int:
    from processors.retention import instant
    from streams.deployment import Deployment
    from streams.officer import evidence
    from streams.officer.office import office

    from_s, to_s = instant_s(args.from_), instant_s(args.to)
    names = [instant(at_s).removesuffix("T00:00:00Z").replace(":", "") for at_s in (from_s, to_s)]
    folder = Path(args.out or f"evidence-{names[0]}-{names[1]}")

    async def make() -> evidence.Report:
        async with Deployment.open(load(args), create=False) as deployment:
            desk = office(deployment)
            with bar("audit entries", None) as advance:
                return await evidence.report(desk, from_s, to_s, folder, advance)

    made = asyncio.run(make())
    if args.json:
        found = {"folder": str(made.folder), "from": made.window[0], "to": made.window[1], "key": made.key}
        print_json(found | {"entries": made.entries, "exceptions": made.exceptions})
        return 0
    print(f"{made.folder}: {made.entries} audit entries, signed by the key {made.key}")
    if made.window[1] != instant(to_s):
        say(f"--to is not over: the report ends at {made.window[1]}")
    for kind, count in made.exceptions.items():
        say(f"exceptions, {kind}: {count}; see exceptions.json")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from streams.officer.verify import verify

    paths = [None if name is None else Path(name) for name in (args.key, args.after)]
    checks = verify(Path(args.folder), *paths)
    for check in checks:
        if args.json:
            found = {"check": check.what, "passed": check.passed, "findings": list(check.findings)}
            print_json(found | dict(check.about))
            continue
        print(f"{'ok' if check.passed else 'WRONG'}  {check.what}")
        for finding in check.findings:
            print(f"       {finding}")
    return 0 if all(check.passed for check in checks) else 1


def _key(args: argparse.Namespace) -> int:
    from processors.evidence import fingerprint
    from streams.deployment import Deployment
    from streams.officer import evidence

    async def get() -> tuple[bytes, str]:
        async with Deployment.open(load(args), create=False) as deployment:
            key = await evidence.public_key(deployment)
            return evidence.public_pem(key), fingerprint(key)

    pem, name = asyncio.run(get())
    if args.json:
        print_json({"pem": pem.decode(), "fingerprint": name})
        return 0
    sys.stdout.write(pem.decode())
    say(f"fingerprint: {name}")
    return 0
