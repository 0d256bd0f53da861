"""Reads what an operator keeps in a file of its own: a password, a token."""

import stat
from pathlib import Path

from schemas.errors import Fatal


def read_secret(path: Path, what: str, error: type[Fatal]) -> str:
    """Return the text of a file that is its owner's alone, without white space around it. Blocks on the disk.

    Raises `error`, which names the secret as `what` ("the brokers' password") and never its value.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise error(f"the file with {what} cannot be read", file=str(path)) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise error(f"others may read the file with {what}: chmod 600 it", file=str(path))
    if not text:
        raise error(f"the file with {what} is empty", file=str(path))
    return text
