"""The command line: nouns and verbs, one clear line per error, exit 1 for errors and 2 for wrong usage."""

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from schemas.errors import Retriable, StreamveilError
from streams.cli import standard

NOUNS = (
    "demo", "publish", "run", "tail", "screen", "optout", "exemption", "review", "registry", "quarantine", "keys",
    "retention", "policy", "streams", "subject", "account", "evidence",
)  # fmt: skip
_OPTION = re.compile(r"--[a-z]+(-[a-z]+)*")
_SAFE = (
    "the following arguments are required:",
    "one of the arguments",
    "not allowed with argument",
    "expected one argument",
    "expected at least one argument",
)


_OURS = "this command takes "
_ROOT = Path(__file__).parents[2]
_PACKAGES = ("schemas", "processors", "streams")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors never repeat what was typed: an argument may be somebody's number."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and let whoever does not know an argument say so: its usage is the one that helps."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(_surplus(rest))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print usage and one line, and exit 2."""
        known = message.startswith(_OURS) or any(safe in message for safe in _SAFE)
        text = message if known else _anonymised(message)
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {text}\n")


def _surplus(rest: Sequence[str]) -> str:
    """Return what to say of arguments that a command does not take; of what was typed, options' names only."""
    names = [name for name in (one.partition("=")[0] for one in rest) if _OPTION.fullmatch(name)]
    if names:
        return f"{_OURS}no option {' or '.join(dict.fromkeys(names))}; see --help"
    return f"{_OURS}no more arguments than the usage shows; see --help"


def _anonymised(message: str) -> str:
    if message.startswith("argument ") and ": " in message:
        return f"{message.split(': ', 1)[0]}: the value is not one that it takes; see --help"
    return f"{_OURS}other arguments; see --help"


def parser() -> Parser:
    """Return the parser of the whole command line."""
    main_parser = Parser(
        prog="streamveil", description="Privacy middleware for SMS and voice traffic.", allow_abbrev=False
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", default="streamveil.toml", metavar="FILE", help="configuration file")
    common.add_argument("--log", metavar="URL", help="sqlite:///PATH")
    nouns = main_parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for noun in NOUNS:
        import_module(f"streams.cli.{noun}").add(nouns)
    for leaf in _leaves(main_parser):
        for action in common._actions:  # noqa: SLF001 — argparse has no other way to share options with leaves
            leaf._add_action(action)  # noqa: SLF001 — as above
    return main_parser


def _leaves(node: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers below a node that have no sub-commands: those that run something."""
    children: dict[str, argparse.ArgumentParser] = {}
    for action in node._actions:  # noqa: SLF001 — as above
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 — as above
            children |= action.choices
    return [leaf for child in children.values() for leaf in _leaves(child)] or [node]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for an error (one line on standard error), 2 for wrong usage."""
    try:
        standard.prepare()
        args = _parsed(argv)
        status = int(args.run(args))
        sys.stdout.flush()
    except Retriable as error:
        print(f"streamveil: {error}; it stopped there: give the command again once that is over", file=sys.stderr)
        return 1
    except StreamveilError as error:
        print(f"streamveil: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # its message and its traceback may hold what was worked on
        print(f"streamveil: {_where(error)}", file=sys.stderr)
        return 1
    finally:
        standard.finish()
    return status


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return parser().parse_args(argv)
    except SystemExit:
        sys.stdout.flush()  # the help
        raise


def _where(error: Exception) -> str:
    """Return a line about what nobody foresaw: which exception, and where; nothing of what it says."""
    place = "an unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if any(path.is_relative_to(_ROOT / package) for package in _PACKAGES):
            place = f"{path.relative_to(_ROOT)}:{frame.lineno}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: check disk, owner and mode of the files named by --log and --config ({place})"
    return f"internal error, please report this line: {type(error).__name__} at {place}"


if __name__ == "__main__":
    sys.exit(main())
