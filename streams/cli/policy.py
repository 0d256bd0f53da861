"""`streamveil policy show|check`: a policy in plain words, and whether a document is a valid one."""

import argparse
from pathlib import Path
from typing import Any

import orjson

from schemas.policy import sentences
from streams.config import load, read_policy


def show(args: argparse.Namespace) -> int:
    """Print a policy in plain words, a rule a line: the one named, or the one in force."""
    if args.policy:
        policy, source = read_policy(args.policy, Path())
    else:
        config = load(args)
        policy, source = config.policy, config.policy_source
    if not args.json:
        _print(f"Policy {policy.id}, from {source}\n")
    for sentence in sentences(policy):
        if args.json:
            _print_json({"policy": policy.id, "clause": sentence.clause, "text": sentence.text})
        else:
            _print(f"  {sentence}")
    return 0


def check(args: argparse.Namespace) -> int:
    """Print that a policy is valid; a bad one raises PolicyInvalid with its line."""
    policy, _ = read_policy(args.policy, Path())
    if args.json:
        _print_json({"file": args.policy, "valid": True, "policy": policy.id, "rules": policy.rule_count})
    else:
        _print(f"{args.policy}: valid, policy {policy.id}, {policy.rule_count} rules")
    return 0


def _print(line: str) -> None:
    print(line)


def _print_json(value: dict[str, object]) -> None:
    _print(orjson.dumps(value).decode())


def add(subparsers: Any) -> None:
    """Register the noun `policy` with an argparse subparsers object."""
    noun = subparsers.add_parser("policy", help="explain or check a policy")
    verbs = noun.add_subparsers(dest="verb", required=True, metavar="show|check")
    shown = verbs.add_parser("show", help="explain a policy in plain words, with the clause of each rule")
    shown.add_argument("policy", nargs="?", metavar="NAME|FILE", help="default: the policy in force")
    checked = verbs.add_parser("check", help="say whether a policy is valid, and if not, what and where")
    checked.add_argument("policy", metavar="FILE", help="a file, or the name of a pack")
    for parser, run in ((shown, show), (checked, check)):
        parser.add_argument("--json", action="store_true", help="one JSON object a line")
        parser.set_defaults(run=run)
