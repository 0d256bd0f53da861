"""How a report about a person is written out: lines of JSON, one JSON document, a text, a page.

Rules of this file: each item is written when it comes and then forgotten. What stands in a record was written by
strangers: on a page it is escaped, in a text it cannot move the cursor. The page is one file without script, cookie,
picture or link, and its own header forbids a browser to fetch anything (KAL-9).
"""

import html
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import orjson

from streams.officer.access import Item

Write = Callable[[str], object]
"""Takes a piece of text."""

_DIRECTIONS: Final = {"mt": "outbound", "mo": "inbound"}
_TITLES: Final = {
    "restriction": ("Restrictions", "This data is opened by nobody but the privacy officer."),
    "record": (
        "Records",
        "What is held about the person, opened. What is the other party's own is not shown: they are a person too.",
    ),
    "opt_out": ("Opt-outs", "Each holds the number, and nothing else about the person, so that it is respected."),
    "exemption": (
        "Exemptions",
        "Why a company may advertise to the number although a list of people who want none has it.",
    ),
    "quarantined": (
        "Records that could not be understood",
        "They hold the digits of the number. Whose data else is in them cannot be told, so they are not shown.",
    ),
    "hold": ("Legal holds", "Copies of records about the person that the law requires to be kept for now."),
    "reveal": ("Who opened this data", "In the past 12 months, up to the beginning of this report."),
    "processing": ("What is done with this data", "By kind of record."),
    "not_shown": ("Not shown", "Records about the person that do not open any more, and why."),
    "not_searched": ("Not searched", "Records of which nobody can tell whether they are about the person, and why."),
    "account": ("Held for others", "Companies for which the platform only carries out what they instruct."),
    "summary": ("In short", ""),
}


class Writer(Protocol):
    """Writes a report item by item."""

    def put(self, item: Item) -> None:
        """Write one item."""

    def end(self) -> None:
        """Write what closes the report, after its last item."""


class Lines:
    """One JSON object a line; `item` says which section it is of."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def put(self, item: Item) -> None:
        """Write one line."""
        self._write(orjson.dumps({"item": item.section, **item.fields}).decode() + "\n")

    def end(self) -> None:
        """Write nothing: the last line is the summary."""


class Document:
    """One JSON document: the report's head, each section as a list, the summary."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._section = ""

    def put(self, item: Item) -> None:
        """Write one item; items of one section come one after the other."""
        text = orjson.dumps(item.fields).decode()
        if item.section in ("report", "summary"):
            self._close()
            self._write(f'{"{" if item.section == "report" else ","}\n"{item.section}":{text}')
        elif item.section == self._section:
            self._write(f",\n{text}")
        else:
            self._close()
            self._section = item.section
            self._write(f',\n"{item.section}":[\n{text}')

    def _close(self) -> None:
        if self._section:
            self._write("]")
            self._section = ""

    def end(self) -> None:
        """Close the document."""
        self._write("}\n")


class Text:
    """A text to read in a terminal."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._section = ""

    def put(self, item: Item) -> None:
        """Write one item under the heading of its section."""
        if item.section == "report":
            self._write(f"{_plain(_headline(item.fields))}\n")
        elif item.section != self._section:
            title, note = _TITLES[item.section]
            self._write(f"\n{title.upper()}\n{note}\n" if note else f"\n{title.upper()}\n")
        self._section = item.section
        heading, rows = _told(item)
        if heading:
            self._write(f"\n  {_plain(heading)}\n")
        width = max((len(_plain(label)) for label, _ in rows), default=0)
        for label, value in rows:
            self._write(f"    {_plain(label):<{width}}  {_plain(value)}\n")

    def end(self) -> None:
        """Write nothing: the summary was last."""


class Page:
    """One self-contained HTML page: no script, no cookie, nothing to fetch."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._section = ""

    def put(self, item: Item) -> None:
        """Write one item under the heading of its section."""
        if item.section == "report":
            title = _escaped(_headline(item.fields))
            self._write(_PAGE_HEAD.replace("TITLE", title))
        elif item.section != self._section:
            title, note = _TITLES[item.section]
            self._write(f"<h2>{title}</h2>\n" + (f"<p>{note}</p>\n" if note else ""))
        self._section = item.section
        heading, rows = _told(item)
        if heading:
            self._write(f"<h3>{_escaped(heading)}</h3>\n")
        cells = "".join(f"<dt>{_escaped(label)}</dt><dd>{_escaped(value)}</dd>\n" for label, value in rows)
        self._write(f"<dl>\n{cells}</dl>\n")

    def end(self) -> None:
        """Close the page."""
        self._write("</main>\n</body>\n</html>\n")


_PAGE_HEAD: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<meta name="robots" content="noindex">
<title>TITLE</title>
<style>
body { font: 16px/1.5 sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h2 { border-bottom: 1px solid; margin-top: 2.5rem; }
h3 { margin-bottom: 0.25rem; }
dl { display: grid; gap: 0.1rem 1rem; grid-template-columns: 14rem 1fr; margin: 0 0 1rem; }
dt { font-weight: bold; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
@media print { h3, dl { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>TITLE</h1>
"""


def _escaped(text: str) -> str:
    """Return a text as it may stand on a page; control characters, which no page may have, are replaced."""
    return html.escape(
        "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text)
    )


def _plain(text: str) -> str:
    """Return a text for a terminal: on one line, and nothing in it that a terminal would act on."""
    return "".join(one if one.isprintable() else " " if one.isspace() else "\N{REPLACEMENT CHARACTER}" for one in text)


def _headline(fields: Mapping[str, Any]) -> str:
    whose = fields["platform"] if fields["about"] == "platform" else f"{fields['about']} (account)"
    return f"What {whose} holds about {fields['subject']}"


def _told(item: Item) -> tuple[str, list[tuple[str, str]]]:
    """Return how an item is told: a heading, if it has one, and rows of a label and a text."""
    fields = dict(item.fields)
    if item.section == "record":
        return _record(fields)
    if item.section == "report":
        told = ("at", "about", "policy", "reason")
        return "", [(_label(name), _value(fields[name])) for name in told]
    heading = ""
    if item.section == "account":
        heading = fields.pop("account")
        fields["records"] = fields["records"] or "none that is in the streams now"
    elif item.section in ("processing", "not_shown", "not_searched"):
        heading = fields.pop("stream")
    elif item.section in ("quarantined", "reveal"):
        heading = fields.pop("at")
    elif item.section == "opt_out":
        heading = f"{fields.pop('class')} by {fields.pop('channel')}"
    elif item.section == "exemption":
        heading = f"{fields.pop('account')}: {fields.pop('kind')}, by {fields.pop('channel')}"
    return heading, [(_label(name), _value(value)) for name, value in fields.items()]


def _record(fields: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    source = fields.pop("source")
    way = _DIRECTIONS.get(source["direction"])
    heading = f"{fields.pop('day')}  {fields.pop('stream')}  {source['account']}" + (f"  {way}" if way else "")
    rows = [(name, _value(value)) for name, value in fields.pop("fields").items()]
    for correction in fields.pop("corrections"):
        rows += [(f"corrected: {name}", _value(value)) for name, value in correction.items()]
    place = f"{fields.pop('partition')}/{fields.pop('offset')}"
    rows += [(_label(name), _value(value)) for name, value in fields.items() if value not in ([], None)]
    return heading, [*rows, ("source", f"gateway of {source['account']}"), ("place", place)]


def _label(name: str) -> str:
    return name.replace("_", " ")


def _value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(one)}" for name, one in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "-"
    return str(value)
