"""Canaries on disk: unique values in every personal and content field of every input format, through the command line.

They are looked for, in every spelling, in every file of the deployment and in everything that the commands print. And
each is opened through `--reveal` where it belongs, so that losing data does not pass for keeping it.
"""

import base64
import json
from typing import NamedTuple

import pytest

from schemas.catalog import CATALOG, INPUTS
from tests.support.commands import Place, ago, one_line
from tests.support.records import haystack, preference, record, reply, spellings

PREFIX_BYTES = 8
READABLE = [name for name in CATALOG if name not in INPUTS]
CLOCK = "03:17:41"
"""The time of day of all CDRs: no exact instant stands in the clear."""
LONG_AGO = ago(20 * 86_400)[:10]


class Canary(NamedTuple):
    """A value, and the stream whose sealed part holds it."""

    text: str
    stream: str


class Gateways:
    """The files that gateways write: everything in them that may not stay, and where it belongs."""

    def __init__(self) -> None:
        self.canaries: list[Canary] = [Canary(CLOCK, "cdr.pii")]
        self.ids: set[str] = set()
        self._count = 0

    def text(self, stream):
        self._count += 1
        return self._planted(f"Zorro{self._count:03}kw{self._count * 7919 % 1000:03}", stream)

    def number(self, stream):
        self._count += 1
        return self._planted(f"+1415{5_550_000 + 37 * self._count}", stream)

    def address(self, stream):
        self._count += 1
        return self._planted(f"198.51.100.{100 + self._count}", stream)

    def _planted(self, text, stream):
        self.canaries.append(Canary(text, stream))
        return text

    def person(self, stream):
        return {
            "client_ip": self.address(stream), "location": self.text(stream), "display_name": self.text(stream),
            "attributes": {self.text(stream): self.text(stream)}, "campaign_id": self.text(stream),
            "error_code": self.text(stream), "child": False,
        }  # fmt: skip

    def both(self, stream):
        return {"sender": self.number(stream), "recipient": self.number(stream), **self.person(stream)}

    def ndjson(self):
        """Records of every kind, and lines that are none."""
        sms = {"content": self.text("cleared"), "encoding": self.text("cleared")}
        said = {"recording_ref": f"s3://{self.text('cleared')}.wav", "transcript": self.text("cleared")}
        recorded = [{"recording_ref": self.text("content"), "transcript": self.text("content")} for _ in range(2)]
        call = {"duration_s": 61, "answered_at": f"{LONG_AGO}T{CLOCK}Z", "hangup_cause": self.text("cdr.pii")}
        then = {"occurred_at": f"{LONG_AGO}T{CLOCK}Z"}
        now = {"occurred_at": ago()}
        mo = {"direction": "mo"}
        near, stop, wish = self.number("review"), self.number("suppressions"), self.number("suppressions")
        records = [
            record("request", **now, purpose="otp", **self.both("cleared"), **sms, record_id="q1"),
            record("request", **now, purpose="otp", channel="voice", **self.both("cleared"), **said, record_id="q2"),
            record("cdr", **then, **self.both("cdr.pii"), content=self.text("content"), record_id="q3"),
            record("cdr", **then, **mo, **self.both("cdr.pii"), content=self.text("content"), record_id="q4"),
            record("cdr", **then, channel="voice", **self.both("cdr.pii"), **call, **recorded[0], record_id="q5"),
            record("cdr", **then, **mo, channel="voice", **self.both("cdr.pii"), **recorded[1], record_id="q6"),
            reply(f"stop {self.text('review')}", **now, sender=near, record_id="q7"),
            reply("STOP", **now, sender=stop, record_id="q8"),
            # what else stands in a preference is kept nowhere
            preference(**now, sender=wish, **Gateways().person("nowhere"), record_id="q9"),
            record("cdr", **then, **self.both("quarantine"), unknown=self.text("quarantine"), record_id="q10"),
            f"{self.text('quarantine')} {self.number('quarantine')}".encode(),
            b"\xff\xfe" + self.number("quarantine base64").encode(),
        ]  # fmt: skip
        return b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in _with_ends(records))

    def asterisk(self, *, custom):
        """A row of every column; the account code is the customer's and is not secret."""
        cells = {
            name: self.text("cdr.pii")
            for name in ("dcontext", "channel", "dstchannel", "lastapp", "lastdata", "userfield")
        }
        cells |= {
            "accountcode": "acme", "src": self.number("cdr.pii"), "dst": self.number("cdr.pii"),
            "clid": f'"{self.text("cdr.pii")}" <{self.number("nowhere")}>', "start": f"{LONG_AGO} {CLOCK}",
            "answer": f"{LONG_AGO} {CLOCK}", "end": f"{LONG_AGO} 03:18:42", "duration": "61", "billsec": "61",
            "disposition": "ANSWERED", "amaflags": "DOCUMENTATION", "uniqueid": f"{self.text('cdr.pii')}",
            "peeraccount": self.text("cdr.pii"), "linkedid": self.text("cdr.pii"), "sequence": "7",
        }  # fmt: skip
        if custom:
            names = (
                "clid", "src", "dst", "dcontext", "channel", "dstchannel", "lastapp", "lastdata", "start", "answer",
                "end", "duration", "billsec", "disposition", "amaflags", "accountcode", "uniqueid", "userfield",
                "sequence",
            )  # fmt: skip
            self.canaries = [one for one in self.canaries if one.text not in (cells["peeraccount"], cells["linkedid"])]
        else:
            names = ("accountcode", "src", "dst", "dcontext", "clid", "channel", "dstchannel", "lastapp", "lastdata",
                     "start", "answer", "end", "duration", "billsec", "disposition", "amaflags", "uniqueid",
                     "userfield", "peeraccount", "linkedid", "sequence")  # fmt: skip
        broken = f'"{self.text("quarantine")}",{self.number("quarantine")}\n'
        return (",".join(_quoted(cells[name]) for name in names) + "\n" + broken).encode()

    def mapped(self):
        """Rows of an SMS, of a call, and of one that is not understood."""
        rows = [["kind", "at", "from", "to", "name", "ip", "place", "note", "text", "id"]]
        for kind in ("sms", "voice", self.text("quarantine")):
            stream = "cdr.pii" if kind in ("sms", "voice") else "quarantine"
            said = "content" if kind == "sms" else "cdr.pii" if kind == "voice" else "quarantine"
            self.ids.add(record_id := self.text(stream))
            rows.append([
                kind, f"{LONG_AGO} {CLOCK}", self.number(stream), self.number(stream), self.text(stream),
                self.address(stream), self.text(stream), self.text(stream), self.text(said), record_id,
            ])  # fmt: skip
        return "".join(",".join(map(_quoted, row)) + "\n" for row in rows).encode()


MAPPING = """
[file]
delimiter = ","

[constants]
type = "cdr"
account_id = "acme"
direction = "mt"

[fields]
record_id = { column = "id" }
channel = { column = "kind", values = { sms = "sms", voice = "voice" } }
occurred_at = { column = "at" }
sender = "from"
recipient = "to"
display_name = "name"
client_ip = "ip"
location = "place"
content = { column = "text", only = "sms" }
hangup_cause = { column = "text", only = "voice" }
attributes = { remark = "note" }
"""


def _with_ends(records):
    for one in records:
        yield one
        yield b"\n"


def _quoted(cell):
    return '"' + cell.replace('"', '""') + '"'


def found(haystacks, canaries):
    """Return (canary, where) of the canaries that stand in one of the texts, in any spelling. One pass a text."""
    begins: dict[bytes, list[tuple[bytes, str]]] = {}
    for canary in canaries:
        for spelling in spellings(canary):
            begins.setdefault(spelling[:PREFIX_BYTES], []).append((spelling, canary))
    hits = set()
    for name, content in haystacks.items():
        hay = haystack(content)
        for at in range(len(hay) - PREFIX_BYTES + 1):
            for spelling, canary in begins.get(hay[at : at + PREFIX_BYTES], ()):
                if hay.startswith(spelling, at):
                    hits.add((canary, name))
    return sorted(hits)


def on_disk(place):
    return {path.name: path.read_bytes() for path in place.files()}


class Shown:
    """Runs commands, the two that meet clear data in processes of their own, and keeps everything that they print."""

    def __init__(self, place):
        self.place = place
        self.texts: dict[str, bytes] = {}

    def __call__(self, *words, status=0, data=b""):
        run = self.place.run if words[0] in ("publish", "run") else self.place.call
        done = run(*words, data=data)
        assert done.status == status, (words[0], done.err)
        self.texts[f"{len(self.texts)} {words[0]} {words[1] if len(words) > 1 else ''}"] = (
            f"{done.out}\n{done.err}".encode()
        )
        return done


def publish(place, command, gateways):
    """Publish a file of every format."""
    (place.folder / "cdr-custom").mkdir()
    (place.folder / "map.toml").write_text(MAPPING)
    files = {
        "in.ndjson": gateways.ndjson(),
        "Master.csv": gateways.asterisk(custom=False),
        "cdr-custom/Master.csv": gateways.asterisk(custom=True),
        "calls.csv": gateways.mapped(),
    }
    for name, content in files.items():
        (place.folder / name).write_bytes(content)
        more = ("--map", place.folder / "map.toml") if name == "calls.csv" else ()
        command("publish", place.folder / name, *more)
    return files


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Everything published and run, with what was on disk before and after, and what was shown."""
    place = Place(tmp_path_factory.mktemp("canary"))
    shown, gateways = Shown(place), Gateways()
    files = publish(place, shown, gateways)
    before = on_disk(place)
    shown("run", "--until-idle")
    cli = Gateways()
    cli._count = 500
    asked = cli.number("suppressions")
    shown("optout", "add", "-", "--account", "acme", data=asked.encode())
    shown("optout", "check", "-", data=asked.encode())
    shown("screen", "-", "--account", "acme", "--channel", "sms", "--purpose", "otp", data=asked.encode())
    shown("optout", "check", asked)
    for stream in READABLE:
        shown("tail", stream, "--from-beginning")
        shown("tail", stream, "--from-beginning", "--json")
    for words in (("quarantine", "list"), ("keys", "status"), ("retention", "calendar"), ("registry", "status")):
        shown(*words)
    canaries = gateways.canaries
    return place, shown, canaries, gateways.ids, [one.text for one in cli.canaries if one.text != CLOCK], files, before


def test_a_canary_is_found_in_whatever_spelling(ran):
    _, _, canaries, _, typed, _, _ = ran
    for text in ("+14155550177", "Zorro001kw919"):
        for spelling in spellings(text):
            assert found({"x": b"<" + spelling + b">"}, [text]), spelling
    assert found({"x": b"call 415-555 01.77 now"}, ["+14155550177"])
    texts = [one.text for one in canaries] + typed
    assert len(texts) == len(set(texts)) > 120


def test_before_the_run_all_of_them_are_in_the_traffic_file_and_nowhere_else(ran):
    _, _, canaries, _, _, files, before = ran
    wanted = {one.text for one in canaries} - {CLOCK}
    assert {text for text, _ in found(files, wanted)} == wanted
    hits = found(before, wanted)
    assert {name for _, name in hits} == {"log-traffic.db"}
    # Asterisk's own file is the only place of the number inside a caller id, which is the caller's again
    kept = {one.text for one in canaries if one.stream != "nowhere"} - {CLOCK}
    assert {text for text, _ in hits} == kept


def test_after_the_run_none_is_in_any_file(ran):
    place, _, canaries, _, typed, _, _ = ran
    assert found(on_disk(place), [one.text for one in canaries] + typed) == []


def test_nothing_that_a_command_shows_holds_one(ran):
    _, shown, canaries, _, typed, _, _ = ran
    assert len(shown.texts) > 30
    assert found(shown.texts, [one.text for one in canaries] + typed) == []


def test_each_is_revealed_where_it_belongs_and_nowhere_else(ran):
    place, _, canaries, ids, typed, _, _ = ran
    opened = {stream: json.dumps(place.opened(stream)) for stream in READABLE if "dpo" in CATALOG[stream].readers}
    where = {stream: {one.text for one in canaries if one.text in text} for stream, text in opened.items()}
    review = {one.text for one in canaries if one.stream == "review"}
    assert set(READABLE) - opened.keys() == {"billing.deltas"}
    for stream in opened:
        belongs = {one.text for one in canaries if one.stream == stream}
        assert belongs <= where[stream], stream
    # a near miss and a STOP are CDRs as well, and so are whole in cdr.pii and content
    stops = {one.text for one in canaries if one.stream == "suppressions"}
    assert where["cdr.pii"] - {one.text for one in canaries if one.stream == "cdr.pii"} <= review | stops
    assert where["content"] - {one.text for one in canaries if one.stream == "content"} <= review | ids
    assert set(typed) <= {text for text in typed if text in opened["suppressions"]}
    for stream in ("verdicts", "cdr.anonymous", "audit", "held"):
        assert where[stream] == set()
    # what is no text is opened byte for byte
    (binary,) = (one for one in place.opened("quarantine") if "record_base64" in one)
    assert b"\xff\xfe" in base64.b64decode(binary["record_base64"])
    # and opening left nothing behind
    assert found(on_disk(place), [one.text for one in canaries] + typed) == []


@pytest.mark.parametrize("field", ["location", "recipient", "occurred_at"])
def test_a_field_of_a_wrong_class_would_be_found_on_disk(tmp_path, field):
    # Given a table in which one field is of the class that may stand in the clear
    place, gateways = Place(tmp_path), Gateways()
    publish(place, place.call, gateways)
    table = f"""
import processors.pipeline as p
import streams.worker.worker as w
from schemas.fields import PrivacyClass
w.check_leaving = lambda *_: None  # which would hold some of it back
of = p.classes_of
p.classes_of = lambda *structs: of(*structs) | {{{field!r}: PrivacyClass.BILLING}}
"""
    # Then the search finds it, wherever such a field is planted
    place.run("run", "--until-idle", sabotage=table)
    assert found(on_disk(place), [one.text for one in gateways.canaries])


# --- errors ------------------------------------------------------------------------------------------------------

NUMBER, WORDS = "+14155550177", "Zorro secret words"
WRONG = [
    (NUMBER,), ("run", NUMBER), ("run", "--workers", NUMBER), ("tail", NUMBER), ("tail", "verdicts", NUMBER),
    ("tail", "verdicts", "--max", WORDS), ("tail", "cdr.pii", "--reveal", "--reason", f"call {NUMBER}"),
    ("publish", NUMBER), ("publish", "--format", NUMBER, "x"), ("publish", "--map", NUMBER, "x"),
    ("optout", "add", f"{NUMBER} {WORDS}", "--account", NUMBER), ("optout", NUMBER),
    ("optout", "add", WORDS), ("optout", "add", NUMBER, "--class", WORDS), ("optout", "add", NUMBER, "--reason", WORDS),
    ("optout", "import", NUMBER), ("optout", "export", "-", "--reason", f"for {NUMBER}"),
    ("screen", NUMBER), ("screen", NUMBER, "--account", WORDS, "--channel", NUMBER, "--purpose", "otp"),
    ("registry", "load", NUMBER, NUMBER), ("registry", NUMBER), ("quarantine", "replay", NUMBER),
    ("quarantine", "discard", "--all", "--reason", f"{NUMBER} {WORDS}"), ("keys", NUMBER), ("policy", NUMBER),
    ("retention", "calendar", "--now", NUMBER), ("demo", NUMBER), ("--help-me", NUMBER),
    ("review", NUMBER), ("review", "list", "--reveal", "--reason", f"for {NUMBER}"),
    ("review", "decide", NUMBER, "dismiss", "--reason", "C-1"), ("review", "decide", "0/0", WORDS, "--reason", "C-1"),
    ("review", "decide", "0/0", "dismiss", "--reason", f"for {NUMBER}"),
    ("screen", "--file", NUMBER, "--account", "a", "--channel", "sms", "--purpose", "otp", "--time-zone", WORDS),
]  # fmt: skip


def test_wrong_usage_repeats_nothing_that_was_typed(tmp_path):
    place = Place(tmp_path)
    place.publish(record("request", purpose="otp"))
    for words in WRONG:
        done = place.call(*words)
        assert done.status in (1, 2), words
        assert found({"told": f"{done.out}\n{done.err}".encode()}, [NUMBER, WORDS]) == [], words
        assert "Traceback" not in done.err


BAD_FILES = {
    "in.ndjson": f'{{"sender":"{NUMBER}","content":"{WORDS}"\n[1]\n'.encode() + b"\xff" + NUMBER.encode() + b"\n",
    "Master.csv": f'"{WORDS}","{NUMBER}"\n"{NUMBER}"",\n'.encode(),
    "calls.csv": f"at,{NUMBER},{WORDS}\n{NUMBER}\n".encode(),
    "binary.ndjson": bytes(range(256)) * 20 + NUMBER.encode(),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_reported_by_name_and_line_only(tmp_path, name):
    place, texts = Place(tmp_path), {}
    (tmp_path / name).write_bytes(BAD_FILES[name])
    (tmp_path / "map.toml").write_text(MAPPING)
    more = ("--map", tmp_path / "map.toml") if name == "calls.csv" else ()
    told = place.call("publish", tmp_path / name, *more)
    texts["publish"] = (told.out + told.err).encode()
    texts["as a mapping"] = place.call("publish", "--map", tmp_path / name, tmp_path / name).err.encode()
    texts["as a policy"] = place.call("policy", "check", tmp_path / name).err.encode()
    texts["as opt-outs"] = place.call("optout", "import", tmp_path / name).err.encode()
    texts["as a registry"] = place.call("registry", "load", "us-dnc", tmp_path / name).err.encode()
    listed = ("screen", "--file", tmp_path / name, "--account", "acme", "--channel", "sms", "--purpose", "otp")
    texts["as numbers"] = place.call(*listed, "--json").out.encode()
    texts["as a list"] = place.call(*listed, "--out", tmp_path / "screened.csv").err.encode()
    texts["run"] = place.call("run", "--until-idle").err.encode()
    assert all(b"Traceback" not in text for text in texts.values())
    assert found(texts | on_disk(place), [NUMBER, WORDS]) == []


RAISES = """
def wrong(*args, **options):
    raise {error}({text!r})
import {module} as module
module.{name} = wrong
"""


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("run", "processors.pipeline", "Pipeline.complete"),
        ("run", "processors.pipeline", "Pipeline.prepare"),
        ("run", "streams.log.sqlite", "SqliteConsumer.commit"),
        ("run", "streams.keys.cache", "KeyCache.fetch"),
        ("publish", "streams.publish", "route"),
        ("tail", "streams.keys.reveal", "take_apart"),
    ],
)
@pytest.mark.parametrize("error", ["KeyError", "ValueError"])
def test_a_bug_is_one_line_that_says_where_and_nothing_of_what_it_was_about(tmp_path, command, module, name, error):
    # Given an error that quotes what it was about, as those of libraries do
    place = Place(tmp_path)
    file = place.file(record("request", purpose="otp", occurred_at=ago(), recipient=NUMBER, content=WORDS))
    place.publish(json.loads(file.read_bytes()))
    if command == "tail":
        place.work()
    words = {
        "run": ("run", "--until-idle"),
        "publish": ("publish", file),
        "tail": ("tail", "cleared", "--reveal", "--reason", "X", "--json"),
    }[command]
    done = place.run(*words, sabotage=RAISES.format(error=error, text=f"{NUMBER} {WORDS}", module=module, name=name))
    # Then
    told = done.err.removeprefix(f"{file}: ") if command == "publish" else done.err
    if (command, error) == ("tail", "ValueError"):  # that is what it raises for a value that is not one
        assert (done.status, '"state":"corrupt"' in done.out) == (0, True)
    else:
        assert f"internal error, please report this line: {error} at " in one_line(done._replace(err=told))
    assert found({"told": (done.out + done.err).encode()}, [NUMBER, WORDS]) == []
    # and nothing is lost by it
    if command == "run":
        assert place.work() == 1
