"""The page of an evidence report: one file that shows without a network, a script or a cookie (KAL-9)."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

ROWS: Final = 500
"""Rows of one table; the files beside the page have all."""
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Evidence report</title>
<style>
body {font: 16px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222}
table {border-collapse: collapse; margin: .5rem 0 1.5rem}
th, td {text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ccc; vertical-align: top}
.wrong {color: #a00} code {word-break: break-all}
</style></head><body>
"""


_NOTE = (
    "<p>This page says what the files beside it hold. What proves anything is those files and their signature: "
    "<code>streamveil evidence verify FOLDER --key FILE</code>.</p>"
)


def page(shown: Mapping[str, Any]) -> str:
    """Return the page of what a report holds, as `streams.officer.evidence` puts it together."""
    summary, wrong = shown["summary"], shown["exceptions"]
    bad = sum(map(len, wrong.values()))
    begin, end = shown["window"]
    parts = [
        _HEAD,
        f"<h1>Evidence, {_text(begin)} to {_text(end)}</h1>",
        _table(
            ("", ""),
            [
                ("Made", shown["made_at"]),
                ("Key store", shown["store"]),
                ("Signed by", shown["key"]),
                ("Policy in force", f"{shown['policy']['in_force']['name']}/{shown['policy']['in_force']['revision']}"),
                ("SHA-256 of policy.toml", shown["policy"]["sha256"]),
                ("Audit entries", shown["entries"]),
                ("Checkpoints", shown["checkpoints"]),
            ],
        ),
        _NOTE,
        f'<h2 class="wrong">Exceptions: {bad}</h2>' if bad else "<h2>Exceptions: none</h2>",
        _table(("kind", "what"), [(kind, _plain(one)) for kind, found in wrong.items() for one in found]),
        "<h2>What was opened</h2>",
        _table(
            ("action", "role", "stream", "entries", "records", "denied"),
            [tuple(one.values()) for one in summary["reveals"]],
        ),
        "<h2>Actions</h2>",
        _table(("action", "entries"), summary["actions"].items()),
        "<h2>Requests</h2>",
        _dicts(shown["requests"]),
        "<h2>Holds and restrictions</h2>",
        _dicts(shown["holds"]),
        "<h2>Epoch keys</h2>",
        _table(("state", "keys"), shown["keys"].items()),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _dicts(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(tuple(rows[0]), [tuple(row.values()) for row in rows]) if rows else "<p>None.</p>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    found = list(rows)
    if not found:
        return ""
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(_plain(cell))}</td>" for cell in row) + "</tr>" for row in found[:ROWS]
    )
    more = f"<p>And {len(found) - ROWS} more.</p>" if len(found) > ROWS else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _plain(cell: object) -> str:
    if isinstance(cell, Mapping):
        return ", ".join(f"{name}: {_plain(value)}" for name, value in cell.items())
    return "–" if cell is None else str(cell)


def _text(value: object) -> str:
    return escape(str(value), quote=True)
