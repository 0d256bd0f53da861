"""Gateway formats: what each layout becomes, and that nothing but a valid record or Poison comes out of any bytes."""

import io
import traceback
from pathlib import Path

import msgspec
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import schemas.inbound
from processors.gateways import base as base_module
from processors.gateways import guess_format, open_format, split_records
from schemas.errors import InputInvalid, Poison
from schemas.fields import MAX_RECORD_BYTES

ROOT = Path(__file__).parents[2]
MAPPINGS = ROOT / "deploy" / "mappings"
SAMPLES = ROOT.parent / "shared" / "samples"
DECODER = msgspec.json.Decoder(schemas.inbound.Inbound)


def records(fmt, data, encoding="utf-8"):
    """Convert a whole file, as `publish` does; Poison reasons stand in the place of their records."""
    raw = data if isinstance(data, bytes) else data.encode(encoding)
    out, header = [], fmt.header_lines
    for line, _, record in split_records(io.BytesIO(raw), quoted=fmt.quoted):
        if header:
            fmt.header(record)
            header -= 1
            continue
        try:
            values = fmt.convert(record, line)
        except Poison as error:
            out.append(error.reason)
            continue
        for value in values:
            DECODER.decode(value)
            out.append(orjson.loads(value))
    return out


def mapped(mapping, data, encoding="utf-8"):
    return records(open_format("mapped", mapping, "m.toml"), data, encoding)


def one(found):
    assert len(found) == 1
    return found[0]


# --- cutting a file into records ------------------------------------------------------------------------------


def cut(data, *, quoted, **start):
    return list(split_records(io.BytesIO(data), quoted=quoted, **start))


@pytest.mark.parametrize("quoted", [True, False])
def test_lines_end_in_lf_or_crlf_and_the_last_need_not(quoted):
    assert cut(b"a\r\nb\n\nc", quoted=quoted) == [(1, 3, b"a"), (2, 5, b"b"), (3, 6, b""), (4, 7, b"c")]


def test_a_byte_order_mark_is_dropped_at_the_start_only():
    mark = b"\xef\xbb\xbf"
    assert cut(mark + b"a\n" + mark + b"b\n", quoted=False) == [(1, 5, b"a"), (2, 10, mark + b"b")]
    assert cut(mark + b"b\n", quoted=False, line=2, position=5) == [(2, 10, mark + b"b")]


def test_a_quoted_record_goes_on_over_lines_and_has_the_number_of_its_first():
    data = b'1,"a\r\nb"\n2,"c ""d"" e"\n3,x\n'
    assert [(line, raw) for line, _, raw in cut(data, quoted=True)] == [
        (1, b'1,"a\r\nb"'),
        (3, b'2,"c ""d"" e"'),
        (4, b"3,x"),
    ]
    assert len(cut(data, quoted=False)) == 4


def test_an_open_quote_is_given_up_past_the_largest_record_and_the_rest_is_read():
    filler = b"x" * 99_999 + b"\n"
    data = b'1,"open\n' + filler * 11 + b"2,b\n"
    found = cut(data, quoted=True)
    assert [line for line, _, _ in found] == [1, 12, 13]
    assert MAX_RECORD_BYTES < len(found[0][2]) < MAX_RECORD_BYTES + 100_000
    assert found[-1][2] == b"2,b"


def test_an_open_quote_at_the_end_is_a_record_of_its_own():
    assert cut(b'a\n"b\nc', quoted=True) == [(1, 2, b"a"), (2, 6, b'"b\nc')]


def test_pieces_of_one_line_keep_its_number():
    assert [line for line, _, _ in split_records([b"aa", b"bb\n", b"c\n"], quoted=False)] == [1, 1, 2]


LINES = st.lists(st.sampled_from([b"a", b'"', b"\r\n", b"\n", b"\xef\xbb\xbf", b","]), max_size=40).map(b"".join)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LINES, st.booleans())
def test_resuming_at_any_record_gives_the_same_tail(data, quoted):
    whole = cut(data, quoted=quoted)
    assert b"".join(raw for _, _, raw in whole).count(b'"') == data.count(b'"')
    for at, (_, position, _) in enumerate(whole):
        file = io.BytesIO(data)
        file.seek(position)
        line = 1 + data[:position].count(b"\n")
        assert list(split_records(file, quoted=quoted, line=line, position=position)) == whole[at + 1 :]
    assert not data or whole[-1][1] == len(data)


# --- ndjson ---------------------------------------------------------------------------------------------------


def test_ndjson_passes_an_object_through_byte_for_byte_and_skips_blank_lines():
    fmt = open_format("ndjson", None, "-")
    raw = b' {"v" : 1, "x": "\xc3\xa9"} '
    assert fmt.convert(raw, 1) == [raw]
    assert fmt.convert(b"  ", 2) == []
    fmt.header(b"ignored")


@pytest.mark.parametrize("raw", [b"[]", b"1", b"{", b'{"a":"\xff"}', b'{"a":"\\ud800"}', b"null", b"\x00"])
def test_ndjson_that_is_no_object_is_poison(raw):
    with pytest.raises(Poison) as error:
        open_format("ndjson", None, "-").convert(raw, 1)
    assert error.value.reason == "not_json"


@pytest.mark.parametrize("name", ["ndjson", "asterisk", "mapped"])
def test_a_record_past_the_largest_is_poison_unread(name):
    fmt = open_format(name, PLAIN if name == "mapped" else None, "-")
    with pytest.raises(Poison) as error:
        fmt.convert(b"x" * (MAX_RECORD_BYTES + 1), 1)
    assert error.value.reason == "too_large"


# --- Asterisk -------------------------------------------------------------------------------------------------

CALL = {
    "accountcode": '"acme"', "src": '"+15550100001"', "dst": '"+15550100002"', "dcontext": '"from-internal"',
    "clid": '"""Ada, ""the"" L"" <+15550100001>"', "channel": '"SIP/100-1"', "dstchannel": '"SIP/200-2"',
    "lastapp": '"Dial"', "lastdata": '"SIP/200,20"', "start": '"2026-11-20 10:00:00"',
    "answer": '"2026-11-20 10:00:05"', "end": '"2026-11-20 10:01:00"', "duration": "60", "billsec": "55",
    "disposition": '"ANSWERED"', "amaflags": '"DOCUMENTATION"', "uniqueid": '"1795000000.7"', "userfield": '"gold"',
    "peeraccount": '"peer"', "linkedid": '"1795000000.6"', "sequence": "3",
}  # fmt: skip
BASE = list(CALL)[:16]
NEWER = ["peeraccount", "linkedid", "sequence"]
CUSTOM = [*list(CALL)[4:5], *list(CALL)[1:4], *list(CALL)[5:16], "accountcode", "uniqueid", "userfield", "sequence"]


def row(names, **changes):
    return ",".join((CALL | changes)[name] for name in names)


def master(names=None, settings=None, **changes):
    fmt = open_format("asterisk", settings, "asterisk.toml")
    return one(records(fmt, row(names or list(CALL), **changes) + "\n"))


def test_a_master_csv_row_becomes_a_voice_cdr():
    assert master() == {
        "v": 1,
        "type": "cdr",
        "channel": "voice",
        "record_id": "1795000000.7",
        "account_id": "acme",
        "direction": "mt",
        "occurred_at": "2026-11-20T10:00:00Z",
        "answered_at": "2026-11-20T10:00:05Z",
        "sender": "+15550100001",
        "recipient": "+15550100002",
        "status": "answered",
        "duration_s": 60,
        "billable_s": 55,
        "display_name": 'Ada, "the" L',
        "attributes": {
            "dcontext": "from-internal",
            "channel": "SIP/100-1",
            "dstchannel": "SIP/200-2",
            "lastapp": "Dial",
            "lastdata": "SIP/200,20",
            "amaflags": "DOCUMENTATION",
            "userfield": "gold",
            "peeraccount": "peer",
            "linkedid": "1795000000.6",
            "sequence": "3",
        },
    }


@pytest.mark.parametrize(
    ("names", "has_id", "extra"),
    [
        (BASE, False, set()),
        ([*BASE, "uniqueid"], True, set()),
        ([*BASE, "userfield"], False, {"userfield"}),
        ([*BASE, "uniqueid", "userfield"], True, {"userfield"}),
        ([*BASE, *NEWER], False, set(NEWER)),
        ([*BASE, "uniqueid", *NEWER], True, set(NEWER)),
        ([*BASE, "userfield", *NEWER], False, {"userfield", *NEWER}),
        ([*BASE, "uniqueid", "userfield", *NEWER], True, {"userfield", *NEWER}),
    ],
)
def test_master_csv_has_16_to_21_columns_by_its_configuration(names, has_id, extra):
    found = master(names)
    assert (found["record_id"] == "1795000000.7") is has_id
    assert set(found["attributes"]) & {"userfield", *NEWER} == extra
    for name in extra:
        assert found["attributes"][name] == CALL[name].strip('"')


def test_columns_state_what_follows_the_sixteen():
    names = [*BASE, "userfield", "uniqueid"]
    assert master(names, 'columns = ["userfield", "uniqueid"]')["record_id"] == "1795000000.7"
    assert master([*BASE, "uniqueid"], 'columns = ["userfield", "uniqueid"]') == "columns"


@pytest.mark.parametrize("names", [BASE[:15], [*CALL, "src"]])
def test_another_number_of_columns_is_poison(names):
    assert master(names) == "columns"


def test_without_a_unique_id_the_record_id_is_a_digest_of_the_row():
    first, again, other = master(BASE), master(BASE), master(BASE, duration="61")
    assert first["record_id"] == again["record_id"] != other["record_id"]
    assert len(first["record_id"]) == len("asterisk-") + 24


@pytest.mark.parametrize("custom_columns", [CUSTOM, CUSTOM[:-1]])
def test_the_sample_layout_of_cdr_custom_gives_the_same_record(custom_columns):
    quoted = {name: f'"{CALL[name]}"' for name in ("duration", "billsec")}
    found = one(records(open_format("asterisk-custom", None, "-"), row(custom_columns, **quoted)))
    names = [*BASE, "uniqueid", "userfield"]
    expected = master(names)
    if len(custom_columns) == 19:
        expected["attributes"]["sequence"] = "3"
    assert found == expected


def test_a_high_resolution_duration_is_cut_to_seconds():
    assert master(duration='"60.987654"')["duration_s"] == 60


@pytest.mark.parametrize("name", ["duration", "billsec"])
@pytest.mark.parametrize("text", ["", '"x"', "-1", '"1e3"', '"١٢"', "9999999999"])
def test_a_duration_that_is_none_is_poison(name, text):
    assert master(**{name: text}) == "bad_number"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("ANSWERED", "answered"),
        ("NO ANSWER", "no_answer"),
        ("BUSY", "busy"),
        ("FAILED", "failed"),
        ("CONGESTION", "congestion"),
    ],
)
def test_a_disposition_becomes_a_status_code(text, status):
    assert master(disposition=f'"{text}"')["status"] == status


def test_an_unknown_disposition_is_poison_and_never_a_status():
    assert master(disposition='"+15550100009"') == "bad_status"


def test_an_unanswered_call_has_no_answer_time():
    for empty in ("", '""'):
        assert "answered_at" not in master(answer=empty)


def test_empty_parties_are_nobody():
    found = master(src='""', dst='""')
    assert (found["sender"], found["recipient"]) == ("anonymous", "anonymous")


@pytest.mark.parametrize(
    ("clid", "name"),
    [
        ('"""Ada"" <100>"', "Ada"),
        ('"Ada <100>"', "Ada"),
        ('""" "" <100>"', None),
        ('"<100>"', None),
        ('"Ada"', "Ada"),
        ('"+15550100001"', None),
        ('""', None),
    ],
)
def test_the_name_of_a_caller_id_is_the_display_name(clid, name):
    assert master(clid=clid).get("display_name") == name


def test_the_account_is_the_constant_or_the_account_code_or_asterisk():
    assert master(settings='account_id = "zeta"')["account_id"] == "zeta"
    assert master(settings='account_id = "zeta"')["attributes"]["accountcode"] == "acme"
    assert master(accountcode='""')["account_id"] == "asterisk"
    assert master(accountcode='"a b"') == "bad_value:account_id"


def test_direction_and_route_come_from_the_context():
    settings = 'route = "dcontext"\ndirections = { "from-trunk" = "mo" }'
    found = master(settings=settings, dcontext='"from-trunk"')
    assert (found["direction"], found["route"]) == ("mo", "from-trunk")
    assert master(settings=settings)["direction"] == "mt"
    assert master(settings='direction = "mo"\nroute = "north"')["route"] == "north"
    assert master(settings=settings, dcontext='"to-5550100001"') == "bad_value:route"


def test_national_numbers_are_read_by_the_default_region():
    found = master(settings='default_region = "GB"', src='"020 7946 0018"', dst='"100"')
    assert (found["sender"], found["recipient"]) == ("+442079460018", "100")


@pytest.mark.parametrize(
    ("local", "utc"),
    [
        ("2026-07-01 12:00:00", "2026-07-01T11:00:00Z"),
        ("2026-10-25 01:30:00", "2026-10-25T00:30:00Z"),  # twice: the first
        ("2026-03-29 01:30:00", None),  # never
        ("2026-03-29 02:00:00", "2026-03-29T01:00:00Z"),
        ("2026-02-30 10:00:00", None),
        ("2026-11-20 10:00:60", None),
        ("2026-11-20T10:00:00", None),
        ("2026-W47-5 10:00:00", None),
        ("0001-01-01 00:00:00", "0001-01-01T00:01:15Z"),
        ("", None),
    ],
)
def test_local_times_follow_the_zone_with_gap_and_fold(local, utc):
    found = master(settings='timezone = "Europe/London"', start=f'"{local}"')
    assert found == "bad_time" if utc is None else found["occurred_at"] == utc


def test_a_row_may_hold_line_ends_quotes_commas_and_other_scripts():
    found = master(lastdata='"a,b\r\n""c"" \u202eשלום 😀\x00"')
    assert found["attributes"]["lastdata"] == 'a,b\r\n"c" \u202eשלום 😀\x00'


@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", b"\xc3"])
def test_bytes_that_are_no_text_are_poison(bad):
    raw = row(list(CALL)).encode().replace(b"gold", bad)
    assert records(open_format("asterisk", None, "-"), raw) == ["bad_encoding"]


def test_a_latin_1_file_is_read_as_such():
    raw = row(list(CALL), userfield='"Zoë"').encode("latin-1")
    found = one(records(open_format("asterisk", 'encoding = "latin-1"', "-"), raw))
    assert found["attributes"]["userfield"] == "Zoë"


def test_an_open_quote_is_poison():
    assert master(userfield='"gold') == "quotes"


# --- mapped files ---------------------------------------------------------------------------------------------

PLAIN = """
[file]
header = false
columns = ["id", "when", "from", "to", "text"]
[constants]
channel = "sms"
account_id = "acme"
direction = "mt"
[fields]
record_id = "id"
occurred_at = { column = "when", layout = "rfc3339" }
sender = "from"
recipient = "to"
content = "text"
"""
VOICE = """
[file]
header = false
columns = ["id", "when", "long", "cost", "a", "b"]
[constants]
channel = "voice"
account_id = "acme"
direction = "mt"
sender = "+15550100000"
recipient = "+15550100001"
[fields]
record_id = "id"
occurred_at = { column = "when", layout = "epoch" }
duration_s = { column = "long", unit = "s" }
price = { amount = "cost", currency = "EUR" }
location = { columns = ["a", "b"], join = ";" }
attributes = { alpha = "a", beta = "b" }
"""
SMS_ROW = "r1,2026-11-20T10:00:00+01:00,+15550100000,+15550100001,hello"
VOICE_ROW = ["v1", "1795000000", "60", "0.0120", "x", "y"]


def voice(mapping=VOICE, **cells):
    at = ["id", "when", "long", "cost", "a", "b"]
    return one(mapped(mapping, ",".join(cells.get(name, VOICE_ROW[i]) for i, name in enumerate(at))))


def test_a_mapped_row_becomes_a_record():
    assert one(mapped(PLAIN, SMS_ROW)) == {
        "v": 1,
        "type": "cdr",
        "channel": "sms",
        "account_id": "acme",
        "direction": "mt",
        "record_id": "r1",
        "occurred_at": "2026-11-20T09:00:00Z",
        "sender": "+15550100000",
        "recipient": "+15550100001",
        "content": "hello",
    }


def test_quoted_cells_hold_commas_quotes_and_line_ends_and_crlf_ends_a_row():
    data = SMS_ROW.replace("hello", '"a, ""b""\nc"') + "\r\n" + SMS_ROW
    assert [found["content"] for found in mapped(PLAIN, data)] == ['a, "b"\nc', "hello"]


def test_without_quoting_a_quote_is_a_character_like_any_other():
    mapping = PLAIN.replace("[constants]", 'quote = false\ndelimiter = "|"\n[constants]')
    data = SMS_ROW.replace(",", "|").replace("hello", 'say "hi, \r x')
    assert one(mapped(mapping, data))["content"] == 'say "hi, \r x'


def test_spaces_behind_a_delimiter_are_dropped_on_request():
    data = SMS_ROW.replace(",", ", ")
    for quote in ("true", "false"):
        mapping = PLAIN.replace("[constants]", f"skip_initial_space = true\nquote = {quote}\n[constants]")
        assert one(mapped(mapping, data))["sender"] == "+15550100000"


@pytest.mark.parametrize(("encoding", "text"), [("latin-1", "café"), ("cp1252", "10 €")])
def test_other_encodings_are_read_as_stated(encoding, text):
    mapping = PLAIN.replace("[constants]", f'encoding = "{encoding}"\n[constants]')
    assert one(mapped(mapping, SMS_ROW.replace("hello", text), encoding))["content"] == text
    assert one(mapped(PLAIN, SMS_ROW.replace("hello", text), encoding)) == "bad_encoding"


@pytest.mark.parametrize("data", ["a,b\n", SMS_ROW + ",more\n"])
def test_a_row_of_another_width_is_poison(data):
    assert mapped(PLAIN, data) == ["columns"]


def test_header_names_find_the_columns_in_any_order():
    mapping = PLAIN.replace("header = false", "header = true").replace(
        'columns = ["id", "when", "from", "to", "text"]', ""
    )
    data = "\ufefftext,to, from ,when,id,other\nhello,+15550100001,+15550100000,2026-11-20T09:00:00Z,r1,\n"
    assert mapped(mapping, data) == mapped(PLAIN, SMS_ROW)
    for header, word in (("id,when,from,to,Mr Secret", "no column 'text'"), ("id,when,from,to,text,to", "two columns")):
        with pytest.raises(InputInvalid) as error:
            mapped(mapping, header + "\n")
        assert word in str(error.value)
        assert "m.toml" in str(error.value)
        assert "Secret" not in str(error.value)
    with pytest.raises(InputInvalid, match="header of the data file cannot be read"):
        mapped(mapping, b"\xff\n")


@pytest.mark.parametrize(
    ("unit", "text", "seconds"),
    [
        ("s", "60", 60),
        ("s", "60.2", 61),
        ("s", " 7 ", 7),
        ("ms", "1500", 2),
        ("ms", "2000", 2),
        ("min", "1.5", 90),
        ("min", "0.01", 1),
        ("hh:mm:ss", "01:02:03", 3723),
        ("hh:mm:ss", "100:00:00", 360_000),
        ("hh:mm:ss", "1:60:00", "bad_number"),
        ("s", "-6", "bad_number"),
        ("s", "1e3", "bad_number"),
        ("s", "nan", "bad_number"),
        ("s", "١", "bad_number"),
        ("min", "99999", "bad_value:duration_s"),
        ("s", "", None),
    ],
)
def test_durations_become_whole_seconds(unit, text, seconds):
    found = voice(VOICE.replace('unit = "s"', f'unit = "{unit}"'), long=text)
    assert (found if isinstance(found, str) else found.get("duration_s")) == seconds


def test_a_negative_duration_is_none_where_the_mapping_says_so():
    mapping = VOICE.replace('unit = "s"', 'unit = "s", negative = "zero"')
    assert [voice(mapping, long=text).get("duration_s") for text in ("-6", "6", "")] == [0, 6, None]
    assert voice(mapping, long="-x") == "bad_number"


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("0.0120", "0.012"),
        ("5", "5"),
        ("", None),
        ("-1", "bad_number"),
        ("1e2", "bad_number"),
        ("0.1234567891", "bad_number"),
    ],
)
def test_prices_are_decimals(text, amount):
    found = voice(cost=text)
    if isinstance(found, dict):
        assert found.get("price", {"amount": None})["amount"] == amount
    else:
        assert found == amount


def test_joined_columns_and_attributes_are_left_out_when_empty():
    assert voice()["location"] == "x;y"
    found = voice(a="")
    assert "location" not in found
    assert found["attributes"] == {"beta": "y"}
    assert "attributes" not in voice(a="", b="")


@pytest.mark.parametrize(
    ("layout", "text", "utc"),
    [
        ("epoch", "1795000000", "2026-11-18T11:06:40Z"),
        ("epoch", "1795000000.5", "2026-11-18T11:06:40.500000Z"),
        ("epoch_ms", "1795000000000", "2026-11-18T11:06:40Z"),
        ("rfc3339", "2026-11-18t10:26:40z", "2026-11-18T10:26:40Z"),
        ("rfc3339", "2026-11-18 10:26:40.123456789-01:00", "2026-11-18T11:26:40.123456Z"),
        ("rfc3339", "2026-11-18T10:26:40", None),
        ("%d.%m.%y %H:%M", "18.11.26 10:26", "2026-11-18T10:26:00Z"),
        ("%Y%m%d%H%M%S %z", "20261118102640 +0200", "2026-11-18T08:26:40Z"),
        ("%d %b %Y", "18 Nov 2026", "2026-11-18T00:00:00Z"),
        ("%d %b %Y", "31 Feb 2026", None),
        ("epoch", "999999999999999", None),
        ("epoch", "1_795_000_000", None),
        ("epoch", "", "missing_field:occurred_at"),
    ],
)
def test_times_are_read_by_their_layout(layout, text, utc):
    found = voice(VOICE.replace('layout = "epoch"', f'layout = "{layout}"'), when=text)
    assert (found if isinstance(found, str) else found["occurred_at"]) == (utc or "bad_time")


@pytest.mark.parametrize(("text", "found"), [("2026-10-25 02:30:00", "00:30"), ("2026-03-29 02:30:00", None)])
def test_local_times_of_a_mapping_follow_their_zone(text, found):
    layout = 'layout = "%Y-%m-%d %H:%M:%S", timezone = "Europe/Berlin"'
    record = voice(VOICE.replace('layout = "epoch"', layout), when=text)
    assert record == "bad_time" if found is None else record["occurred_at"] == f"2026-10-25T{found}:00Z"


def test_whole_days_are_added_to_every_time():
    mapping = VOICE.replace(
        "[fields]", '[time]\nshift_days = 2\n[fields]\nanswered_at = { column = "a", layout = "epoch" }'
    )
    found = voice(mapping, a="1795000010")
    assert (found["occurred_at"], found["answered_at"]) == ("2026-11-20T11:06:40Z", "2026-11-20T11:06:50Z")
    assert voice(mapping.replace("shift_days = 2", "shift_days = -999999"), a="1795000010") == "bad_time"


def test_a_field_may_be_for_one_channel_only():
    mapping = VOICE.replace('channel = "voice"\n', "").replace(
        "[fields]", '[fields]\nchannel = { column = "id", values = { c = "voice", t = "sms" } }'
    )
    assert voice(mapping, id="t") == "field_of_other_channel"
    mapping = mapping.replace('unit = "s"', 'unit = "s", only = "voice"')
    assert "duration_s" not in voice(mapping, id="t")
    assert voice(mapping, id="c")["duration_s"] == 60
    assert voice(mapping, id="x") == "bad_value"


def test_flags_and_counts():
    fields = 'child = { column = "from", true = ["Y"], false = ["N"] }\nsegments = "to"'
    mapping = PLAIN.replace('sender = "from"\nrecipient = "to"', fields).replace(
        "[fields]", 'sender = "Acme"\nrecipient = "+15550100001"\n[fields]'
    )
    found = one(mapped(mapping, "r,2026-11-20T10:00:00Z,Y,2,x"))
    assert (found["child"], found["segments"]) == (True, 2)
    assert one(mapped(mapping, "r,2026-11-20T10:00:00Z,maybe,2,x")) == "bad_value"


def test_requests_and_preferences_are_mapped_too():
    request = PLAIN.replace("[fields]", 'type = "request"\npurpose = "marketing"\n[fields]')
    assert one(mapped(request, SMS_ROW))["purpose"] == "marketing"
    preference = PLAIN.replace("[fields]", 'type = "preference"\naction = "opt_out"\nclass = "marketing"\n[fields]')
    found = one(mapped(preference.replace('content = "text"', ""), SMS_ROW))
    assert (found["type"], found["class"]) == ("preference", "marketing")


def test_national_numbers_become_e164_and_the_rest_stays():
    mapping = PLAIN + '[numbers]\nregion = "US"\n'
    data = SMS_ROW.replace("+15550100000", "(212) 555-0123").replace("+15550100001", "Acme Ltd")
    found = one(mapped(mapping, data))
    assert (found["sender"], found["recipient"]) == ("+12125550123", "Acme Ltd")
    assert one(mapped(mapping, SMS_ROW.replace("+15550100000", "")))["sender"] == "anonymous"


def test_parties_put_the_person_on_the_right_side():
    mapping = (
        PLAIN.replace('sender = "from"\nrecipient = "to"', "")
        .replace('direction = "mt"\n', "")
        .replace("[fields]", '[fields]\ndirection = { column = "from", values = { in = "mo", out = "mt" } }')
        + '[numbers]\nparties = { person = "to", own = "+15550100000" }\n'
    )
    for way, sides in (("out", ("+15550100000", "+15550100007")), ("in", ("+15550100007", "+15550100000"))):
        found = one(mapped(mapping, f"r,2026-11-20T10:00:00Z,{way},+15550100007,x"))
        assert (found["sender"], found["recipient"]) == sides


def test_generated_numbers_fill_what_is_not_there_and_depend_on_the_line_only():
    generated = 'generated = { field = "sender", prefix = "+1555010", digits = 4, seed = 7 }'
    mapping = PLAIN + f"[numbers]\n{generated}\n"
    empty = SMS_ROW.replace("+15550100000", "")
    first, second, given_one = mapped(mapping, f"{empty}\n{empty}\n{SMS_ROW}\n")
    assert given_one["sender"] == "+15550100000"
    assert first["sender"] != second["sender"]
    assert all(len(found["sender"]) == 12 and found["sender"].startswith("+1555010") for found in (first, second))
    assert mapped(mapping, f"{SMS_ROW}\n{empty}\n")[1]["sender"] == second["sender"]
    assert one(mapped(mapping.replace("seed = 7", "seed = 8"), empty))["sender"] != first["sender"]


def test_blank_lines_give_nothing():
    assert mapped(PLAIN, "\n \n" + SMS_ROW + "\n\r\n") == mapped(PLAIN, SMS_ROW)


# --- the mappings that ship -----------------------------------------------------------------------------------


def shipped(name, data, change=("", "")):
    mapping = (MAPPINGS / f"{name}.toml").read_text()
    assert change[0] in mapping
    return mapped(mapping.replace(*change), data)


BANDICOOT = """interaction,direction,correspondent_id,datetime,call_duration,latitude,longitude
call,in,5550100008,2013-12-16 05:31:30,42,42.1372,-71.0216
text,out,5550100003,2013-12-16 05:44:30,0,,
"""


def test_bandicoot_calls_and_texts():
    call, text = shipped("bandicoot", BANDICOOT)
    assert (call["channel"], call["direction"], call["sender"], call["recipient"]) == (
        "voice", "mo", "5550100008", "+15550100000",
    )  # fmt: skip
    assert (call["duration_s"], call["location"], call["record_id"]) == (42, "42.1372,-71.0216", "bandicoot-2")
    assert (text["channel"], text["direction"], text["recipient"]) == ("sms", "mt", "5550100003")
    assert call["occurred_at"] == "2013-12-16T05:31:30Z"
    assert not {"duration_s", "location"} & set(text)
    shifted = shipped("bandicoot", BANDICOOT, ("# shift_days", "shift_days"))
    assert shifted[0]["occurred_at"] == "2026-11-01T05:31:30Z"


def test_cdr_stats_calls():
    data = (
        "5550100001, ada1, 5550100002, 88, 78, 17, 0a-1b, 1336101842\n"
        "5550100001, ada1, 5550100002, 2, -6, 15, 2c, 1336101843\n"
    )
    first, second = shipped("cdr-stats", data)
    assert (first["sender"], first["recipient"], first["display_name"]) == ("5550100001", "5550100002", "ada1")
    assert (first["duration_s"], first["billable_s"], first["hangup_cause"]) == (88, 78, "17")
    assert (first["record_id"], first["occurred_at"]) == ("0a-1b", "2012-05-04T03:24:02Z")
    assert second["billable_s"] == 0


def test_uci_texts_between_generated_numbers_on_a_stated_date():
    data = 'Label\tSMS\nham\tsay "hi, there\nspam\tWIN "now"!\n'
    first, second = shipped("uci-sms", data)
    assert (first["content"], second["content"]) == ('say "hi, there', 'WIN "now"!')
    assert (first["attributes"], second["attributes"]) == ({"label": "ham"}, {"label": "spam"})
    assert first["occurred_at"] == second["occurred_at"] == "2026-11-01T12:00:00Z"
    numbers = {first["sender"], first["recipient"], second["sender"], second["recipient"]}
    assert len(numbers) == 4
    assert all(number.startswith("+155501") for number in numbers)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the public samples are not here")
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("bandicoot", "bandicoot_calls_texts.csv", 500),
        ("cdr-stats", "cdr_stats_calls.txt", 100),
        ("uci-sms", "uci_sms_spam_collection.tsv", 5574),
    ],
)
def test_every_line_of_the_public_samples_converts(name, file, count):
    found = shipped(name, (SAMPLES / file).read_bytes())
    assert len(found) == count
    assert not [reason for reason in found if isinstance(reason, str)]


# --- mistakes of the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[file]", "[file"), ["not valid TOML", "line"]),
        (("header = false", 'header = "no"'), ["file.header", "bool"]),
        (("header = false", "heather = false"), ["file.heather", "allowed", "delimiter"]),
        (("[file]", "[fiel]\nx = 1\n[file]"), ["fiel", "allowed", "constants"]),
        (("[file]", '[file]\ndelimiter = ",,"'), ["file.delimiter", "one ASCII character"]),
        (("[file]", '[file]\nencoding = "utf-16"'), ["file.encoding", "utf-8, latin-1, cp1252"]),
        (("header = false", "header = true"), ["file.columns", "header = false"]),
        (('channel = "sms"', 'channel = "mms"'), ["constants.channel", "sms, voice"]),
        (('channel = "sms"', 'channel = "voice"'), ["fields.content", "not possible with channel = voice"]),
        (('channel = "sms"', 'type = "bill"'), ["constants.type", "cdr, preference, request"]),
        (('channel = "sms"', 'type = "request"\nchannel = "sms"'), ["purpose", "is missing"]),
        (('channel = "sms"', 'type = "preference"\naction = "opt_out"'), ["fields.content", "allowed"]),
        (('account_id = "acme"', ""), ["account_id", "is missing"]),
        (('account_id = "acme"', 'account_id = "a b"'), ["constants.account_id", "letters"]),
        (('account_id = "acme"', "account_id = 5"), ["constants.account_id", "str"]),
        (('account_id = "acme"', 'account_id = "acme"\ncountry = "usa"'), ["constants.country", "capital letters"]),
        (('account_id = "acme"', 'account_id = "acme"\nprice = "5"'), ["constants.price", "allowed"]),
        (('account_id = "acme"', 'account_id = "acme"\nsender = "A"'), ["fields.sender", "[constants]"]),
        (('sender = "from"', 'sendr = "from"'), ["fields.sendr", "allowed", "sender"]),
        (('sender = "from"', 'sender = "form"'), ["fields.sender", "no column 'form'"]),
        (('sender = "from"', "sender = 3"), ["fields.sender", "object"]),
        (('sender = "from"', "sender = { only = 'fax', column = 'from' }"), ["fields.sender.only", "sms, voice"]),
        (('sender = "from"', "sender = {}"), ["fields.sender", "column or columns"]),
        (('record_id = "id"', "record_id = {}"), ["fields.record_id", "line = true"]),
        (('content = "text"', "attributes = 'text'"), ["fields.attributes", "attribute = column"]),
        (('content = "text"', 'price = { amount = "text", currency = "euro" }'), ["fields.price", "capital letters"]),
        (('content = "text"', 'price = "text"'), ["fields.price.column", "amount, currency"]),
        (('layout = "rfc3339"', 'layout = "%H:%M"'), ["fields.occurred_at", "epoch, epoch_ms, rfc3339"]),
        (('layout = "rfc3339"', 'layout = "%Q"'), ["fields.occurred_at", "epoch, epoch_ms, rfc3339"]),
        (('layout = "rfc3339"', 'layout = "%Y-%m-%d %I:%M"'), ["fields.occurred_at", "strptime"]),
        (('layout = "rfc3339"', 'timezone = "Mars/Olympus"'), ["fields.occurred_at", "IANA"]),
        (('layout = "rfc3339"', 'timezone = "../etc/passwd"'), ["fields.occurred_at", "IANA"]),
        (("[constants]", "[numbers]\nregion = 'us'\n[constants]"), ["numbers.region", "capital letters"]),
        (("[constants]", "[numbers]\ngenerated = { field = 'to', prefix = '+1555010', digits = 4 }\n[constants]"),
         ["numbers.generated.field", "sender, recipient"]),
        (("[constants]", "[numbers]\ngenerated = { field = 'sender', prefix = '1555', digits = 4 }\n[constants]"),
         ["numbers.generated.prefix"]),
        (("[constants]", "[numbers]\nparties = { person = 'to', own = '+15550100000' }\n[constants]"),
         ["numbers.parties", "recipient"]),
        (("[constants]", "[time]\ndate = '2026-11-01T12:00:00Z'\n[constants]"), ["time.date", "fields.occurred_at"]),
        (("[constants]", "[time]\nshift_days = 0.5\n[constants]"), ["time.shift_days", "int"]),
        (("[constants]", "[time]\ndate = '2026-11-01'\n[constants]"), ["time.date"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_mapping_names_the_key_and_what_is_allowed(change, words):
    assert change[0] in PLAIN
    with pytest.raises(InputInvalid) as error:
        open_format("mapped", PLAIN.replace(change[0], change[1], 1), "m.toml")
    message = str(error.value)
    assert [word for word in [*words, "file=m.toml"] if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('timezone = "Nowhere"', ["timezone", "IANA"]),
        ('time_zone = "UTC"', ["time_zone", "allowed", "timezone"]),
        ('columns = ["uniqueid", "foo"]', ["columns", "userfield"]),
        ('direction = "out"', ["direction", "mt, mo"]),
        ('directions = { a = "out" }', ["directions.a", "mt, mo"]),
        ('route = "5550100001"', ["route", "dcontext"]),
        ('account_id = "a b"', ["account_id", "letters"]),
        ('default_region = "USA"', ["default_region", "capital letters"]),
    ],
)
def test_a_mistake_in_asterisk_settings_names_the_key_and_what_is_allowed(settings, words):
    with pytest.raises(InputInvalid) as error:
        open_format("asterisk", settings, "a.toml")
    assert [word for word in [*words, "file=a.toml"] if word not in str(error.value)] == []


def test_formats_that_cannot_be_opened_say_why():
    for name, mapping, words in (
        ("csv", None, "ndjson, asterisk, asterisk-custom, mapped"),
        ("mapped", None, "--map"),
        ("ndjson", PLAIN, "takes no mapping"),
        ("asterisk-custom", 'columns = ["uniqueid"]', "columns"),
    ):
        with pytest.raises(InputInvalid, match=words):
            open_format(name, mapping, "x")


def test_the_format_is_guessed_from_name_and_mapping():
    assert guess_format("/in/a.JSONL", has_mapping=False) == "ndjson"
    assert guess_format("a.ndjson", has_mapping=True) == "ndjson"
    assert guess_format("/var/log/asterisk/cdr-csv/Master.csv", has_mapping=True) == "asterisk"
    assert guess_format("/var/log/asterisk/cdr-custom/Master.csv", has_mapping=False) == "asterisk-custom"
    assert guess_format("calls.csv", has_mapping=True) == "mapped"
    for name in ("calls.csv", "-", "json"):
        with pytest.raises(InputInvalid, match="--format"):
            guess_format(name, has_mapping=False)


# --- any bytes --------------------------------------------------------------------------------------------------

FORMATS = {
    "asterisk": lambda: open_format("asterisk", 'timezone = "Europe/London"\ndefault_region = "GB"', "-"),
    "asterisk-custom": lambda: open_format("asterisk-custom", 'route = "dcontext"', "-"),
    "plain": lambda: open_format("mapped", PLAIN + '[numbers]\nregion = "US"', "-"),
    "voice": lambda: open_format("mapped", VOICE.replace("header", 'encoding = "latin-1"\nheader'), "-"),
    "ndjson": lambda: open_format("ndjson", None, "-"),
}
GOOD = [
    row(list(CALL)).encode(), row(BASE).encode(), row(CUSTOM).encode(), SMS_ROW.encode(), ",".join(VOICE_ROW).encode(),
]  # fmt: skip


@st.composite
def damaged(draw):
    """A good row of some layout with bytes put in, taken out and replaced; or any bytes."""
    raw = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 12))] = draw(
            st.one_of(st.binary(max_size=8), st.text(max_size=4).map(str.encode))
        )
    return bytes(raw)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=st.one_of(damaged(), st.binary(max_size=200)))
def test_any_bytes_give_valid_records_or_poison_and_errors_never_hold_them(name, raw):
    fmt = FORMATS[name]()
    try:
        values = fmt.convert(raw, 1)
    except Poison as error:
        poison = error
    else:
        poison = None
    if poison is not None:
        shown = [line for line in traceback.format_exception(poison) if not line.startswith(("Traceback", "  File"))]
        assert shown == [f"schemas.errors.Poison: record cannot be understood: {poison.reason}\n"]
        return
    assert len(values) == (1 if raw.strip() else 0)
    for value in values:
        if name == "ndjson":
            assert value == raw
        else:
            DECODER.decode(value)


def test_a_converter_never_lets_out_what_the_schema_refuses():
    with pytest.raises(Poison) as error:
        base_module.finished({"v": 1, "type": "cdr", "sender": "+15550100001"})
    assert "5550100001" not in str(error.value)


def test_no_object_of_a_format_shows_a_row():
    fmt = FORMATS["plain"]()
    fmt.convert(SMS_ROW.encode(), 1)
    assert "hello" not in repr(vars(fmt))
