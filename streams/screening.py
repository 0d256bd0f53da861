"""Verdicts before anything is sent: one number with every rule asked, or a campaign's list, row by row.

Rules of this file:
- It asks the function that workers ask, with the lists of now; nothing is written, and no number leaves it but in the
  row that it came in.
- A row goes out as it came in, with the verdict behind it. A row that does not fit its header, or holds a value that a
  request could not have, is refused as `not_understood`, stands whole in the first cell, and does not stop the rest.
- No cell spans lines, so that a stray quote cannot swallow the rest of a list.
- Memory is bounded: a chunk of rows, and one line of some 256 kB.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from operator import itemgetter
from typing import Any, BinaryIO, Final, NamedTuple

from processors.retention import instant
from processors.screen.suppression import covering_scopes
from processors.screen.verdict import Asked, Screen, Subject, Verdict
from schemas.errors import InputInvalid
from schemas.fields import is_time_zone, normalise
from streams.deployment import Deployment

NUMBER: Final = "number"
OPTIONAL: Final = ("country", "time_zone", "campaign", "sender", "child")
"""Columns that are looked at if they are there; an empty cell is as if the column were not."""
ADDED: Final = ("verdict", "reason", "clause", "defer_until", "exemption")
NOT_UNDERSTOOD: Final = "not_understood"
MAX_LINE: Final = 65_536
"""Characters; a longer row is not understood."""
_BLOCK_BYTES: Final = 1 << 18
_TOO_LONG_BYTES: Final = 4 * (MAX_LINE + 1)
CHUNK_ROWS: Final = 5000
_COUNTRY = re.compile(r"[A-Z]{2}")
_CHILD: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MAX = {"sender": 320, "campaign": 128, NUMBER: 320}
"""Characters, as a request may have."""
_RECENT: Final = 4096
"""So many combinations of a row's own columns are remembered."""
_DELIMITERS: Final = ",;\t"
_UTF16: Final = ("\udcff\udcfe", "\udcfe\udcff")


class Question(NamedTuple):
    """What is asked of every number alike; a row's own columns go before it."""

    account: str
    channel: str
    purpose: str
    sender: str | None = None
    campaign: str | None = None
    country: str | None = None
    time_zone: str | None = None
    child: bool = False

    def __repr__(self) -> str:
        return "Question()"


class Screening:
    """The question of one command, put to the function that workers use, as of one moment."""

    def __init__(self, deployment: Deployment, question: Question, now_s: int) -> None:
        """Take the question and the moment (Unix s). Raises InputInvalid if no request could ask it."""
        policy = deployment.config.policy
        account = policy.account(question.account)
        if account is None:
            raise InputInvalid("the policy does not serve this account; see policy show")
        if question.country is not None and not _COUNTRY.fullmatch(question.country):
            raise InputInvalid("--country takes two capital letters, such as US")
        if question.time_zone is not None and not is_time_zone(question.time_zone):
            raise InputInvalid("--time-zone takes an IANA name, such as America/Boise")
        for name, value in (("sender", question.sender), ("campaign", question.campaign)):
            if value is not None and len(value) > _MAX[name]:
                raise InputInvalid(f"--{name} takes at most {_MAX[name]} characters")
        self._deployment = deployment
        self._question = question
        self._account = account
        self._now_s = now_s
        self._tokens = deployment.pipeline.tokens
        self.counts: Counter[str | None] = Counter()
        """Rows by reason; None: cleared."""
        self.exempt = 0
        """Rows that were cleared because of an exemption."""

    async def ready(self) -> None:
        """Read opt-outs, exemptions and registries. Blocks. Raises TokensChange while the token key is rotated."""
        deployment = self._deployment
        suppressions, exemptions = deployment.suppressions(), deployment.exemptions()
        await suppressions.catch_up()
        await exemptions.catch_up()
        deployment.settled()
        policy, registries = deployment.config.policy, deployment.registries()
        self._screen = Screen(policy, registries, suppressions.view, exemptions.view, self._now_s)

    def one(self, number: str) -> dict[str, Any]:
        """Return the verdict on a number, and every rule asked in order, as JSON fields; the number is not among them.

        About 10 µs.
        """
        return self._told(self._subjects(self._question)(number))

    # --- lists --------------------------------------------------------------------------------------------------

    def answers(self, file: BinaryIO, advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        """Yield the answer of each row, with its number from 1 in `row`; not understood: no rule was asked."""
        table = _Table(file, advance)
        ask = self._asker(table)
        for row, (_, cells) in enumerate(table.rows(), 1):
            subject = None if cells is None else ask(cells)
            yield {"row": row, **self._told(subject)}

    def csv(self, file: BinaryIO, advance: Callable[[int], None]) -> Iterator[bytes]:
        """Yield the list with the columns `ADDED`, in chunks, the header first; about 8 µs a row of E.164 numbers.

        `advance` is told of bytes read. Raises InputInvalid if the first line is a header without a column `number`,
        or with one of ours.
        """
        table = _Table(file, advance)
        names = table.header if table.header is not None else NUMBER
        yield self._encoded([names + table.delimiter + table.delimiter.join(ADDED)], table)
        ends: dict[tuple[str | None, str | None, int | None, str | None], str] = {}
        ask, account, counts = self._asker(table), self._account, self.counts
        verdict = self._screen.verdict
        broken = _behind(table.delimiter, Verdict(NOT_UNDERSTOOD))
        rows = table.rows()
        while chunk := list(islice(rows, CHUNK_ROWS)):
            out = []
            for text, cells in chunk:
                subject = None if cells is None else ask(cells)
                if subject is None:
                    counts[NOT_UNDERSTOOD] += 1
                    out.append(table.whole(text) + broken)
                    continue
                decided = verdict(subject, account)
                what = (decided.reason, decided.clause, decided.defer_until_s, decided.exemption)
                end = ends.get(what)
                if end is None:
                    if len(ends) >= CHUNK_ROWS:
                        ends.clear()
                    end = ends[what] = _behind(table.delimiter, decided)
                counts[decided.reason] += 1
                if decided.exemption is not None and decided.reason is None:
                    self.exempt += 1
                out.append(text + end)
            yield self._encoded(out, table)

    @staticmethod
    def _encoded(lines: list[str], table: "_Table") -> bytes:
        return (table.line_end.join(lines) + table.line_end).encode("utf-8", "surrogateescape")

    # --- one row ------------------------------------------------------------------------------------------------

    def _asker(self, table: "_Table") -> Callable[[list[str]], Subject | None]:
        """Return what gives the subject that a row's cells ask about, or None if no request could."""
        at, names = table.number, [name for name, _ in table.columns]
        of_all = self._subjects(self._question)
        pick = itemgetter(*(place for _, place in table.columns), at, at)  # two at least, so that it gives a tuple
        asked: dict[tuple[str, ...], Callable[[str], Subject] | None] = {}

        def ask(cells: list[str]) -> Subject | None:
            number = cells[at].strip()
            if not number.isascii():
                number = _text(number)
            if len(number) > _MAX[NUMBER]:
                return None
            if not names:
                return of_all(number)
            key = pick(cells)[:-2]
            try:
                subject_of = asked[key]
            except KeyError:
                given = {name: _text(text).strip() for name, text in zip(names, key, strict=True)}
                question = self._of_row({name: cell for name, cell in given.items() if cell})
                if len(asked) >= _RECENT:
                    asked.clear()
                subject_of = asked[key] = None if question is None else self._subjects(question)
            return None if subject_of is None else subject_of(number)

        return ask

    def _of_row(self, given: dict[str, str]) -> Question | None:
        """Return the question with a row's own columns, or None if no request could ask it."""
        child = _CHILD.get(given["child"].lower()) if "child" in given else False
        country, zone = given.get("country", "").upper(), given.get("time_zone")
        if (
            child is None
            or (country and not _COUNTRY.fullmatch(country))
            or (zone is not None and not is_time_zone(zone))
            or any(len(given.get(name, "")) > _MAX[name] for name in ("sender", "campaign"))
        ):
            return None
        question = self._question
        return Question(
            question.account,
            question.channel,
            question.purpose,
            given.get("sender") or question.sender,
            given.get("campaign") or question.campaign,
            country or question.country,
            zone or question.time_zone,
            child or question.child,
        )

    def _subjects(self, asked: Question) -> Callable[[str], Subject]:
        """Return what gives the subject of a number."""
        account_id, own, of = self._account.id, self._account.own, self._tokens.of
        region = self._account.default_region or asked.country
        sender = "" if asked.sender is None else normalise(asked.sender, region).value
        scopes = covering_scopes(account_id, sender, asked.campaign, self._tokens)
        _, channel, purpose, _, _, country, zone, child = asked

        def subject(number: str) -> Subject:
            party = normalise(number, region)
            value = party.value
            token = of(value) if party.is_person and value not in own else None
            return Subject(account_id, party, token, channel, purpose, country, child, None, scopes, zone)

        return subject

    def _told(self, subject: Subject | None) -> dict[str, Any]:
        trace: list[Asked] = []
        decided = Verdict(NOT_UNDERSTOOD) if subject is None else self._screen.verdict(subject, self._account, trace)
        return {
            "verdict": _outcome(decided),
            "reason": decided.reason,
            "rules": [asked._asdict() for asked in trace],
            "codes": decided.codes or {},
            "not_after": _at(decided.not_after_s),
            "defer_until": _at(decided.defer_until_s),
            "exemption": decided.exemption,
            "confirmation": decided.confirmation,
        }


def _outcome(decided: Verdict) -> str:
    return "cleared" if decided.reason is None else "refused"


def _at(at_s: int | None) -> str | None:
    return None if at_s is None else instant(at_s)


def _behind(delimiter: str, decided: Verdict) -> str:
    """Return what stands behind a row: the cells `ADDED`, all of them codes and instants."""
    cells = (
        _outcome(decided), decided.reason, decided.clause, _at(decided.defer_until_s), decided.exemption,
    )  # fmt: skip
    return "".join(delimiter + (cell or "") for cell in cells)


def _text(cell: str) -> str:
    """Return a cell with what was no UTF-8 in it replaced."""
    return cell if cell.isascii() else cell.encode("utf-8", "replace").decode()


# --- the list as it lies ------------------------------------------------------------------------------------------


class _Table:
    """The rows of an open file: CSV with a header that has a column `number`, else a number a line."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        """Read the first line. Raises InputInvalid if it is a header that does not do."""
        self._lines = _lines(file, advance)
        first = next(self._lines, None)
        text = first or ""
        if text.startswith(_UTF16):
            raise InputInvalid("FILE is UTF-16; save it as UTF-8")
        self.line_end = "\r\n" if text.endswith("\r") else "\n"
        text = text.removeprefix("\ufeff").removesuffix("\r")
        self.header: str | None = None
        self.delimiter = ","
        self.number, self.width = 0, 1
        self.columns: list[tuple[str, int]] = []
        names: list[str] = []
        for delimiter in _DELIMITERS:
            names = [name.strip().lower() for name in _cells(text, delimiter) or ()]
            if NUMBER in names:
                self.header, self.delimiter = text, delimiter
                break
        else:
            if _only_names(text):
                raise InputInvalid("the first line names columns, and none of them is `number`: name it so")
            self._lines = self._lines if first is None else chain((text,), self._lines)
            return
        if names.count(NUMBER) > 1 or any(names.count(name) > 1 for name in OPTIONAL):
            raise InputInvalid("a column that is looked at stands in the first line twice")
        ours = [name for name in ADDED if name in names]
        if ours:
            raise InputInvalid(
                f"the first line has a column {ours[0]} already: rename it, for one of ours comes behind"
            )
        self.number, self.width = names.index(NUMBER), len(names)
        self.columns = [(name, names.index(name)) for name in OPTIONAL if name in names]

    def rows(self) -> Iterator[tuple[str, list[str] | None]]:
        """Yield each row's text as it goes out, and its cells; None: it does not fit the header."""
        delimiter, width, has_header = self.delimiter, self.width, self.header is not None
        for line in self._lines:
            text = line.removesuffix("\r")
            if not has_header:
                yield _cell(text), (None if len(text) > MAX_LINE else [text])
                continue
            if '"' not in text and "\r" not in text:
                cells: list[str] | None = text.split(delimiter)
            else:
                cells = _cells(text, delimiter)
            if cells is not None and len(cells) == width and len(text) <= MAX_LINE:
                yield text, cells
            elif not text.strip():
                yield delimiter * (width - 1), [""] * width
            else:
                yield text, None

    def whole(self, text: str) -> str:
        """Return a row of which nothing is understood: all of it in the first cell, the others empty."""
        if self.header is None:
            return text
        return '"' + text.replace('"', '""') + '"' + self.delimiter * (self.width - 1)


def _lines(file: BinaryIO, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield the lines of a file, a return at their ends still there; of a longer one some more than `MAX_LINE`.

    What is no UTF-8 goes out as it came in.
    """
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        advance(len(block))
        whole, found, last = (rest + block).rpartition(b"\n")
        if found:
            yield from whole.decode("utf-8", "surrogateescape").split("\n")
        rest = last[:_TOO_LONG_BYTES]
    if rest:
        yield rest.decode("utf-8", "surrogateescape")


def _cells(text: str, delimiter: str) -> list[str] | None:
    """Return the cells of a line, or None if it is not one of CSV."""
    try:
        return next(csv.reader((text,), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None


def _cell(text: str) -> str:
    """Return a text as one cell."""
    return '"' + text.replace('"', '""') + '"' if any(char in text for char in ',"\r') else text


def _only_names(text: str) -> bool:
    """Return whether a first line names columns: words, and no digit or address among them."""
    return any(map(str.isalpha, text)) and not any(char.isdigit() or char == "@" for char in text)
