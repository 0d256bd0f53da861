"""What the keyword matcher does with the UCI texts: `python -m tests.support.uci` prints the table of docs/keywords.md.

`uci_labels.tsv` says by line number what a text asks for, as somebody who read it judged: `opt_out`, `doubtful` or
`other`. Judged are all texts that the matcher sends anywhere, and all of people (`ham`) that hold one of the words of
WIDE; what has no label asks for nothing. Of advertisements (`spam`) all are taken to ask for nothing: whoever writes
"Reply STOP to …" does not opt out. No text is copied.
"""

import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from processors.screen.keywords import Keywords, Match
from schemas.languages import language, languages

SAMPLES = Path(__file__).parents[3] / "shared" / "samples" / "uci_sms_spam_collection.tsv"
LABELS = Path(__file__).with_name("uci_labels.tsv")

WIDE = re.compile(
    r"\b(?:stop\w*|unsub\w*|cancel\w*|quit\w*|revoke\w*|opt.?out|remove\w*|no more|leave me|take me off|not interested"
    r"|enough|(?:n.?t|not|dun|never) (?:text|txt|call|contact|message|msg|bother|disturb)|wrong (?:number|person|no)"
    r"|who(?:'?s| is| are| r) (?:this|dis|tis|you|u)|how (?:did|do) (?:you|u) (?:get|have) my|my number|lose|delete"
    r"|block|bother\w*|harass\w*|spam\w*|report you|disturb\w*|go away|get lost|shut up|fuck off|piss off|unwanted"
    r"|any ?more|again|mistake|not me)\b",
    re.IGNORECASE,
)
"""Texts of people with one of these were read, to find the requests that the matcher misses."""

_WORDS = "|".join(word for word in language("en").opt_out if " " not in word and "-" not in word)
FIRST_WORD = re.compile(rf"\W*(?:{_WORDS})\b", re.IGNORECASE)
ANY_WORD = re.compile(rf"\b(?:{_WORDS})\b", re.IGNORECASE)


class Text(NamedTuple):
    line: int
    ham: bool
    body: str
    asks: str  # opt_out, doubtful, other


class Found(NamedTuple):
    """Of the texts that a rule picks out: how many, how many of them ask to opt out or perhaps do; and how many not."""

    picked: int
    asking: int
    doubtful: int
    other: int


def labels() -> dict[int, str]:
    with LABELS.open(encoding="utf-8", newline="") as file:
        return {int(row["line"]): row["asks"] for row in csv.DictReader(file, delimiter="\t")}


def texts() -> list[Text]:
    known = labels()
    found = []
    for line, row in enumerate(SAMPLES.read_text(encoding="utf-8").split("\n"), 1):
        label, _, body = row.partition("\t")
        if line > 1 and row:
            found.append(Text(line, label == "ham", body, known.get(line, "other")))
    return found


def found(all_texts: Sequence[Text], rule: Callable[[str], object]) -> Found:
    picked = [text.asks for text in all_texts if rule(text.body)]
    return Found(len(picked), picked.count("opt_out"), picked.count("doubtful"), picked.count("other"))


def figures() -> dict[str, Found]:
    """Return what each rule picks out, by the words of the documentation's table."""
    all_texts = texts()
    keywords, everywhere = Keywords(), Keywords(languages())
    return {
        "act: whole message, English": found(all_texts, lambda text: keywords.match(text) in _ACTS),
        "act: whole message, all languages": found(all_texts, lambda text: everywhere.match(text) in _ACTS),
        "to review, English": found(all_texts, lambda text: keywords.match(text) is Match.NEAR),
        "to review, all languages": found(all_texts, lambda text: everywhere.match(text) is Match.NEAR),
        "nothing happens": found(all_texts, lambda text: keywords.match(text) is Match.NONE),
        "if the first word acted": found(all_texts, FIRST_WORD.match),
        "if any word acted": found(all_texts, ANY_WORD.search),
    }


_ACTS = (Match.OPT_OUT, Match.OPT_IN)


def table() -> str:
    """Return the figures as docs/keywords.md shows them."""
    lines = ["| what | texts | ask to opt out | perhaps | do not |", "|---|---|---|---|---|"]
    for name, (picked, asking, doubtful, other) in figures().items():
        lines.append(f"| {name} | {picked:,} | {asking:,} | {doubtful:,} | {other:,} |")
    return "\n".join(lines) + "\n"


def read_texts() -> int:
    """Return how many texts were read for requests that the matcher misses."""
    return sum(text.ham and bool(WIDE.search(text.body)) for text in texts())


if __name__ == "__main__":
    sys.stdout.write(f"{table()}texts: {len(texts()):,}; read: {read_texts():,}\n")
