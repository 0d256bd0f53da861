"""Opt-out and opt-in keywords in inbound SMS (REG-3): the whole message only; near misses go to a human.

Folding: NFKC, casefold, white space and punctuation trimmed at both ends, inner white space one blank. A
message that then equals a keyword acts. A short message that holds an opt-out word, or is one edit away from
one, is NEAR: it changes nothing until an operator decides. YES and GO never lift anything.
"""

import re
import unicodedata
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from schemas.errors import PolicyInvalid

OPT_OUT: Final = (
    *("STOP", "STOPALL", "STOP ALL", "UNSUBSCRIBE", "UNSUB", "CANCEL", "END", "QUIT", "REVOKE"),
    *("OPTOUT", "OPT OUT", "OPT-OUT", "REMOVE", "ARRET", "ARRÊT", "TD"),
)
OPT_IN: Final = ("START", "UNSTOP")
NEVER_OPT_IN: Final = frozenset({"yes", "go"})

MAX_MESSAGE: Final = 160
"""Characters; a longer message (padding aside) is never a keyword and is not folded."""
MAX_SHORT: Final = 64
MAX_WORDS: Final = 8
"""A near miss, and a keyword, has at most this many characters and words after folding."""
MIN_TYPO: Final = 4
"""Keywords shorter than this have too many real words one edit away."""

_OUTER_ASCII = "".join(char for char in map(chr, range(128)) if not char.isalnum())
_OUTER_CATEGORIES = frozenset({"Cc", "Cf", "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Zl", "Zp", "Zs"})
"""What is trimmed: white space, punctuation, invisible characters; of ASCII, all but letters and digits."""


class Match(StrEnum):
    """What an inbound message asks for."""

    OPT_OUT = "opt_out"
    OPT_IN = "opt_in"
    NEAR = "near"
    NONE = "none"


class Keywords:
    """The defaults and a policy's extra words. Raises PolicyInvalid for a word that can never be one."""

    __slots__ = ("_exact", "_phrase", "_typos")

    def __init__(self, opt_out: Iterable[str] = (), opt_in: Iterable[str] = ()) -> None:
        """Take the extra words; a word in both lists opts out."""
        outs = {_keyword(word) for word in (*OPT_OUT, *opt_out)}
        ins = {_keyword(word) for word in (*OPT_IN, *opt_in)}
        if ins & NEVER_OPT_IN:
            raise PolicyInvalid("YES and GO may not be opt-in keywords: remove them")
        self._exact = dict.fromkeys(ins, Match.OPT_IN) | dict.fromkeys(outs, Match.OPT_OUT)
        any_word = "|".join(sorted(map(re.escape, outs), key=len, reverse=True))
        self._phrase = re.compile(rf"(?<!\w)(?<!\w-)(?:{any_word})(?!\w|-\w)")
        self._typos: dict[int, list[str]] = {}
        for word in sorted(outs):
            for length in (len(word) - 1, len(word), len(word) + 1) if len(word) >= MIN_TYPO else ():
                self._typos.setdefault(length, []).append(word)

    def match(self, text: str | None) -> Match:
        """Return what a message asks for. Never raises; about 1 µs, and far less for long texts."""
        if not text:
            return Match.NONE
        text = text.strip(_OUTER_ASCII)
        if len(text) > MAX_MESSAGE:
            return Match.NONE
        words = _folded(text).split(None, MAX_WORDS)
        if len(words) > MAX_WORDS or len(folded := " ".join(words)) > MAX_SHORT:
            return Match.NONE
        return self._exact.get(folded) or (Match.NEAR if self._near(folded) else Match.NONE)

    def _near(self, folded: str) -> bool:
        if self._phrase.search(folded):
            return True
        typos = self._typos.get(len(folded))
        return typos is not None and any(_one_edit(folded, word) for word in typos)


def _folded(text: str) -> str:
    """Return the text folded and trimmed; ASCII text comes trimmed. Inner white space stays."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    start, end = 0, len(text)
    while start < end and _is_outer(text[start]):
        start += 1
    while end > start and _is_outer(text[end - 1]):
        end -= 1
    return text[start:end]


def _is_outer(char: str) -> bool:
    return char in _OUTER_ASCII or unicodedata.category(char) in _OUTER_CATEGORIES


def _keyword(word: str) -> str:
    words = _folded(word.strip(_OUTER_ASCII)).split()
    folded = " ".join(words)
    if not 0 < len(folded) <= MAX_SHORT or len(words) > MAX_WORDS:
        raise PolicyInvalid(f"a keyword needs 1 to {MAX_WORDS} words and at most {MAX_SHORT} characters")
    return folded


def _one_edit(left: str, right: str) -> bool:
    """Return whether two texts differ by one letter added, dropped, changed or swapped with the next."""
    same = 0
    while same < len(left) and same < len(right) and left[same] == right[same]:
        same += 1
    rest, other = left[same:], right[same:]
    return (
        rest[1:] == other[1:]
        or rest == other[1:]
        or rest[1:] == other
        or (rest[:2] == other[1::-1] and rest[2:] == other[2:])
    )
