"""`streamveil run`: the workers."""

import argparse
import asyncio
import sys
from collections import Counter

from processors.pipeline import Outcome
from schemas.errors import Fenced
from streams.cli.common import say
from streams.config import load


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `run`."""
    run = subparsers.add_parser("run", help="run workers over the traffic streams")
    run.add_argument("--workers", type=int, default=1, metavar="N", choices=range(1, 257), help="processes (1)")
    run.add_argument("--until-idle", action="store_true", help="end when every input partition is at its end")
    run.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from streams.worker.supervisor import FENCED_STATUS, is_supervised, is_watched, run_many, run_one

    config = load(args)
    same = ["--config", args.config] + (["--log", args.log] if args.log else [])
    if args.workers == 1 and (config.watch is None or is_watched(config)):
        try:
            beside = None if is_supervised() else same
            _say(asyncio.run(run_one(config, until_idle=args.until_idle, config_args=beside)))
        except Fenced as error:
            if not is_supervised():
                raise
            say(f"streamveil: {error}")
            return FENCED_STATUS
    else:
        asyncio.run(run_many(config, args.workers, same, until_idle=args.until_idle))
    return 0


def _say(outcomes: Counter[Outcome]) -> None:
    """Write how the records ended, a line per end and reason, to standard error."""
    ends = Counter((outcome.end.value, outcome.reason or "") for outcome in outcomes.elements())
    sys.stderr.write(f"streamveil: {outcomes.total():,} records\n")
    for (end, reason), count in sorted(ends.items()):
        sys.stderr.write(f"  {count:>12,} {end} {reason}".rstrip() + "\n")
