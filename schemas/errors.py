"""The errors of the program, and the one table that says what is done about each.

Rules of this file: no error ever holds a record, a number, a token or a text; the class docstring is the
default message; whoever raises names what an operator needs to find the place (stream, partition, offset).
"""

import re
from enum import StrEnum

_DIGITS = re.compile(r"[0-9](?:[ ()]*[0-9]){6}")
_SPELT = re.compile(r"[0-9](?:[ .()-]*[0-9]){6}")


def _harmless(value: str | int) -> str:
    """Return a place as it may be shown: in a path, seven digits may be a number that was typed by mistake.

    What has a colon is the address of a server, whose digits have points and dashes between.
    """
    if isinstance(value, int):
        return str(value)
    return "/".join("…" if (_DIGITS if ":" in part else _SPELT).search(part) else part for part in value.split("/"))


class StreamveilError(Exception):
    """Something went wrong."""

    def __init__(self, message: str | None = None, **where: str | int) -> None:
        """Take a one-line message that says what to do, and the place as keywords (never record content)."""
        self.message = message or (type(self).__doc__ or "").splitlines()[0]
        self.where = where
        super().__init__(self.message)

    def __str__(self) -> str:
        place = " ".join(f"{key}={_harmless(value)}" for key, value in self.where.items())
        return f"{self.message} ({place})" if place else self.message


class Retriable(StreamveilError):
    """Not possible now; the batch waits and is prepared anew."""


class Fatal(StreamveilError):
    """The process cannot go on safely and ends."""


class Poison(StreamveilError):
    """A record cannot be understood; it is sealed into quarantine. `reason` is a fixed code."""

    def __init__(self, reason: str, **where: str | int) -> None:
        """Take the reason code that the quarantine record will carry."""
        self.reason = reason
        super().__init__(f"record cannot be understood: {reason}", **where)


class LogBusy(Retriable):
    """The log is locked by another process."""


class Gathering(LogBusy):
    """The entries of a stream are being gathered into a snapshot; nothing is cleared before it is there."""


class LogFull(Retriable):
    """The disk of the log is full; free some space."""


class KeysBusy(Retriable):
    """The key store is locked by another process."""


class KeysFull(Retriable):
    """The disk of the key store is full; free some space."""


class KmsUnavailable(Retriable):
    """The key management service does not answer, or asks to wait; nothing is sealed without it."""


class KmsRefuses(Retriable):
    """The key management service refuses, or lacks a key; nothing is sealed or opened without it."""


class TokensChange(Retriable):
    """The token key is being rotated; nothing is cleared until that is through."""


class KeysChanged(Retriable):
    """A key was destroyed, or passed its deadline, while the batch was under way."""


class LeaseExpired(Retriable):
    """The key lease ran out before the commit; the batch is prepared anew under a new lease."""


class Unsealed(Retriable):
    """Something would have left clear that must be sealed; it was not written. Report this line."""


class Fenced(Fatal):
    """Another worker took this partition over; this one must end."""


class LogUnusable(Fatal):
    """The log cannot be used."""


class KeysUnusable(Fatal):
    """The key store or its key management service cannot be used."""


class PolicyInvalid(Fatal):
    """The policy is not valid."""


class RegistryInvalid(Fatal):
    """A registry file is not valid."""


class InputInvalid(Fatal):
    """A file or argument given to a command is not valid."""


class UnderHold(Fatal):
    """Under legal hold; nothing was erased."""


class RevealDenied(Fatal):
    """Not open to this principal; nothing was opened."""


class Action(StrEnum):
    """What is done about an error: WAIT and END by the worker and whoever starts it, QUARANTINE by `prepare`."""

    WAIT = "wait"  # keep the batch, back off, prepare it anew
    QUARANTINE = "quarantine"  # seal the record away, go on
    END = "end"  # exit 1 with one line


ACTIONS: dict[type[BaseException], Action] = {
    Retriable: Action.WAIT,
    Poison: Action.QUARANTINE,
    Fatal: Action.END,
}
"""The one table. An error that is in none of these classes is a bug of the program: `END`."""


def action_for(error: BaseException) -> Action:
    """Return what is to be done about an error, from `ACTIONS`; unknown kinds end the process."""
    for kind, action in ACTIONS.items():
        if isinstance(error, kind):
            return action
    return Action.END
