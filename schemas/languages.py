"""The languages of keywords: one data file each under schemas/keywords, and the source of every word (REG-3).

Rules of this file: a word without a source is refused, and so is an opt-in that begins with a word of assent in any
language: YES says many things, and one of them is not "send me marketing again". What ships with the program is read
once; nothing else is.
"""

import tomllib
from functools import lru_cache
from importlib import resources
from typing import Annotated, Final
from unicodedata import category, normalize

import msgspec

from schemas.errors import PolicyInvalid

ALWAYS: Final = "en"
"""The language whose keywords act under every policy."""

ASSENT: Final = frozenset({
    *("yes", "y", "yeah", "yep", "yup", "ok", "okay", "oke", "okej", "go", "sure", "fine"),
    *("accept", "accepted", "agree", "agreed"),
    *("oui", "ouais", "daccord", "accord", "si", "vale", "claro", "acepto", "sim", "aceito", "certo", "va"),
    *("ja", "jawohl", "gerne", "jo", "joo", "jep", "jah", "akkoord", "kylla", "tak", "dobrze", "ano", "igen"),
    *("da", "evet", "tamam", "nai", "так", "да", "ок", "نعم", "ايوه", "כן", "はい", "是", "好", "ya", "iya", "ndiyo"),
    *("oo", "opo", "हाँ", "हा", "हां", "vang", "dung"),
})  # fmt: skip
"""First words, without accents and in small letters, of messages that agree to something."""

Words = dict[Annotated[str, msgspec.Meta(min_length=1, max_length=40)], tuple[str, ...]]
"""Each word, in capital letters, with the names of its sources."""


class Language(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keywords of a language.

    `opt_out` and `opt_in` act as a whole message. `near` are phrases that send a message to review wherever they stand
    in it. `everyday` names those of `opt_out` that ordinary messages are full of: they act as a whole message, and
    neither within another one nor misspelt do they send it to review.
    """

    name: str
    sources: dict[str, str]
    opt_out: Words
    opt_in: Words = {}
    near: Words = {}
    everyday: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def languages() -> tuple[str, ...]:
    """Return the ISO 639 codes of the languages that ship, sorted."""
    names = (entry.name for entry in (resources.files("schemas") / "keywords").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


@lru_cache(maxsize=64)
def language(code: str) -> Language:
    """Return a language's keywords. Raises PolicyInvalid if none of that code ships."""
    if code not in languages():
        raise PolicyInvalid(f"no keywords ship for this language; those that do: {', '.join(languages())}")
    text = (resources.files("schemas") / "keywords" / f"{code}.toml").read_text(encoding="utf-8")
    return parse_language(text, f"schemas/keywords/{code}.toml")


def parse_language(text: str, source: str) -> Language:
    """Return the keywords of a TOML text. Raises PolicyInvalid, naming the file `source` and what is wrong."""
    try:
        found = msgspec.convert(tomllib.loads(text), Language)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise PolicyInvalid(f"not a keyword file: {error}", file=source) from None
    fault = _fault(found)
    if fault is not None:
        raise PolicyInvalid(fault, file=source)
    return found


def _fault(found: Language) -> str | None:
    tables = (found.opt_out, found.opt_in, found.near)
    cited = {name for table in tables for names in table.values() for name in names}
    if any(not names for table in tables for names in table.values()):
        return "a word without a source; name one, or leave the word out"
    if cited != set(found.sources):
        return "the sources named by the words and those in [sources] differ"
    if found.opt_in.keys() & found.opt_out.keys():
        return "a word both opts in and opts out"
    if any(is_assent(word) for word in found.opt_in):
        return "an opt-in may not begin with a word of assent such as YES or GO"
    if not set(found.everyday) <= found.opt_out.keys():
        return "'everyday' names a word that is not in [opt_out]"
    if any(word != word.upper() for table in tables for word in table):
        return "words stand in capital letters"
    if any(plain(word) not in table for table in tables for word in table):
        return "a word with accents needs the same word without them beside it"
    return None


def is_assent(word: str) -> bool:
    """Return whether a message begins by agreeing to something, in any language: it may never lift an opt-out."""
    letters = plain(word).casefold().replace("'", "").replace("’", "")
    words = "".join(char if char.isalnum() or category(char) == "Mc" else " " for char in letters).split()
    return bool(words) and words[0] in ASSENT


def plain(text: str) -> str:
    """Return a text without the accents of its Latin letters, composed (NFKC) otherwise."""
    parts = []
    for char in normalize("NFKC", text):
        split = normalize("NFD", char)
        parts.append(split[0] if split[0].isascii() else char)
    return "".join(parts)
