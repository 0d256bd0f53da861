"""Opt-out and opt-in keywords in inbound SMS (REG-3): the whole message only; near misses go to a human.

Which words: those of schemas/keywords, a file for each language, and a policy's own; a word listed as both opts out.
Folding: NFKC, casefold, one letter I with and without a dot, invisible characters dropped, white space and punctuation
trimmed at both ends, inner white space one blank. A message that then equals a keyword acts. Near, which changes
nothing until an operator decides, is a short message that holds an opt-out word or is one edit away from one, and any
message with a phrase such as "don't text". YES and its like never lift anything. What this finds and what it misses is
measured in docs/keywords.md.
"""

import re
import unicodedata
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from schemas.errors import PolicyInvalid
from schemas.languages import ALWAYS, is_assent, language

MAX_MESSAGE: Final = 480
"""Characters, three parts of an SMS; a longer message (padding aside) asks for nothing, and is not folded."""
MAX_SHORT: Final = 64
MAX_WORDS: Final = 8
"""A keyword, and a message that is near for holding one, has at most this many characters and words after folding."""
MIN_TYPO: Final = 4
"""Keywords shorter than this have too many real words one edit away."""

_OUTER_ASCII = "".join(char for char in map(chr, range(128)) if not char.isalnum())
_OUTER_CATEGORIES = frozenset({"Cc", "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Zl", "Zp", "Zs"})
"""What is trimmed: white space and punctuation; of ASCII, all but letters and digits."""
_VARIATION = "\ufe0e\ufe0f"
"""How an emoji is to be drawn."""


class Match(StrEnum):
    """What an inbound message asks for."""

    OPT_OUT = "opt_out"
    OPT_IN = "opt_in"
    NEAR = "near"
    NONE = "none"


class Keywords:
    """The keywords of English, of other languages, and of a policy. Raises PolicyInvalid for what can never be one."""

    __slots__ = ("_asks", "_exact", "_phrase", "_typos")

    def __init__(self, languages: Iterable[str] = (), opt_out: Iterable[str] = (), opt_in: Iterable[str] = ()) -> None:
        """Take languages by their codes (English is one of them anyway) and a policy's extra words."""
        files = [language(code) for code in dict.fromkeys((ALWAYS, *languages))]
        extra = {_keyword(word) for word in opt_out}
        ins = {_keyword(word) for words in (*(file.opt_in for file in files), opt_in) for word in words}
        if any(map(is_assent, ins)):
            raise PolicyInvalid("an opt-in keyword may not begin with a word of assent such as YES or GO: remove it")
        outs = {_keyword(word) for file in files for word in file.opt_out}
        everyday = {_keyword(word) for file in files for word in file.everyday}
        self._exact = dict.fromkeys(ins, Match.OPT_IN) | dict.fromkeys(outs | extra, Match.OPT_OUT)
        near = (outs - everyday) | extra
        self._phrase = _any_of(near)
        self._asks = _any_of({_keyword(phrase) for file in files for phrase in file.near})
        self._typos: dict[int, list[str]] = {}
        for word in sorted(near):
            for length in (len(word) - 1, len(word), len(word) + 1) if len(word) >= MIN_TYPO else ():
                self._typos.setdefault(length, []).append(word)

    def match(self, text: str | None) -> Match:
        """Return what a message asks for. Never raises; some µs, and far less for long texts."""
        if not text:
            return Match.NONE
        text = text.strip(_OUTER_ASCII)
        if len(text) > MAX_MESSAGE:
            return Match.NONE
        folded = " ".join(_folded(text).split())
        if len(folded) <= MAX_SHORT and folded.count(" ") < MAX_WORDS:
            found = self._exact.get(folded)
            if found is not None:
                return found
            if self._phrase.search(folded) or self._misspelt(folded):
                return Match.NEAR
        return Match.NEAR if self._asks.search(folded) else Match.NONE

    def _misspelt(self, folded: str) -> bool:
        return any(_one_edit(folded, word) for word in self._typos.get(len(folded), ()))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return what finds any of the words, standing apart, in a folded message; their apostrophes may be left out."""
    longest_first = sorted(words, key=len, reverse=True)
    any_word = "|".join(re.escape(word).replace("'", "['’]?") for word in longest_first)
    return re.compile(rf"(?<!\w)(?<!\w-)(?:{any_word})(?!\w|-\w)")


def _folded(text: str) -> str:
    """Return the text folded and trimmed; ASCII text comes trimmed. Inner white space stays."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.replace("i\u0307", "i").replace("ı", "i")
    text = "".join(char for char in text if char not in _VARIATION and unicodedata.category(char) != "Cf")
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
