"""The standard streams of a command, made such that what goes wrong with them is said, in one line.

Rules of this file:
- A standard stream that whoever started the command closed stays free: no file of ours takes its place.
- Standard output that cannot be written is an error of its own, not one of the log or the key store; then what the
  command has done is done, and only its report is lost.
"""

import io
import os
import sys
from typing import Any

from schemas.errors import Fatal


class OutputFails(Fatal):
    """Standard output cannot be written."""


class _Output(io.FileIO):
    """The descriptor of standard output. Once it cannot be written, what comes goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            _drop_output()
            raise OutputFails(
                f"standard output cannot be written: {error.strerror}; the command may have done its work all the same"
            ) from None


def prepare() -> None:
    """Make the standard streams such; to be called first of all. Raises OutputFails if standard output is closed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 — for as long as the process lives
    if sys.stdout is None:
        raise OutputFails("standard output is closed; nothing was done")
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        whole = sys.stdout
        raw = _Output(whole.fileno(), "wb", closefd=False)
        sys.stdout = io.TextIOWrapper(
            raw if whole.write_through else io.BufferedWriter(raw),  # as the interpreter does
            encoding=whole.encoding,
            errors=whole.errors,
            line_buffering=whole.line_buffering,
            write_through=whole.write_through,
        )


def finish() -> None:
    """Write what standard output still holds, or let it go nowhere, else the interpreter complains at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OutputFails:
        pass  # it is dropped already
    except OSError:
        _drop_output()


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
