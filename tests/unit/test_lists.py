"""What the files of Do-Not-Call lists mean: fast and slow agree, and a broken line is named but never shown."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.screen import lists
from processors.screen.lists import FORMATS, mapped
from schemas.errors import InputInvalid, RegistryInvalid

SHIPPED = Path(__file__).parents[2] / "deploy" / "mappings" / "registries"
COLUMNS = '[file]\ndelimiter = ";"\nquote = true\n[number]\nregion = "GB"\ncolumns = [3, 2]\n'


def numbers(form, data, size=1 << 22):
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    return [number for part in form.read(chunks, "list.txt") for number in part.tolist()]


def shipped(name):
    return mapped((SHIPPED / f"{name}.toml").read_text(), name)


def mapping(text):
    return mapped(text, "map.toml")


# --- the United States, and Canada as lines -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["us-dnc", "ca-dncl"])
def test_lines_of_area_code_and_number_are_read_with_either_line_end(name):
    data = b"415,5550100\n\r\n212,5550199\r\n\n  \n201,0000000"
    assert sorted(numbers(FORMATS[name], data)) == [12_010_000_000, 12_125_550_199, 14_155_550_100]


@pytest.mark.parametrize(
    "line",
    [
        *(b"4155550100", b"415,555010", b"415,55501000", b"41,55501000", b"415;5550100", b"415,555-100"),
        *(b" 415,5550100", b"415,5550100 ", b"area,number", b"4_5,5550100", b"\xff\xfe4,1", b"+15,5550100"),
        *("４15,5550100".encode(), b"415,5550100,", b"415,5550100\r", b"415,555\r\r0100", b"\xef\xbb\xbf415,5550100"),
        *(b"015,555010a", b"415,5550100\x1a", b"\0"),
    ],
)
@pytest.mark.parametrize("copies", [1, 40])
def test_any_other_line_is_refused_with_its_number_and_without_its_text(line, copies):
    # Given it once, or so often that lines of its length are read together
    data = b"415,5550100\n\n" + (line + b"\n") * copies + b"212,5550199\n" * 40
    if line.endswith(b"\r"):
        line = line[:-1]
    if line == b"415,5550100":
        assert len(numbers(FORMATS["us-dnc"], data)) == 41 + copies
        return
    for size in (1 << 22, 5):
        with pytest.raises(RegistryInvalid) as refused:
            numbers(FORMATS["us-dnc"], data, size)
        assert refused.value.where == {"file": "list.txt", "line": 3}
        assert "555" not in str(refused.value)


def test_the_first_of_several_broken_lines_is_named_wherever_it_is():
    good = b"415,5550100\n" * 1000
    for before in (0, 1, 999, 5000):
        data = b"415,5550100\n" * before + b"415,555010x\n" + good + b"x\n" + good
        for size in (1 << 22, 1000):
            with pytest.raises(RegistryInvalid) as refused:
                numbers(FORMATS["us-dnc"], data, size)
            assert refused.value.where["line"] == before + 1


@pytest.mark.parametrize("name", ["us-dnc", "ca-dncl"])
def test_an_odd_area_code_does_not_let_a_broken_line_before_it_pass(name):
    # Canada has numbers of 7 digits: what is behind the area code must not be taken for one
    good = b"416,5550100\n" * 40
    with pytest.raises(RegistryInvalid) as refused:
        numbers(FORMATS[name], b"016,5550101\n" + good + b"x16,5550102\n" + good)
    assert refused.value.where["line"] == 1


def test_a_byte_order_mark_is_dropped_at_the_start_only():
    assert numbers(FORMATS["us-dnc"], b"\xef\xbb\xbf415,5550100\n", 1) == [14_155_550_100]
    assert numbers(FORMATS["ca-dncl"], b"\xef\xbb\xbf\n416,5550100\n", 2) == [14_165_550_100]


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory():
    def endless():
        for at in range(100):
            assert at < 99, "read on"
            yield b"4" * 10_000

    with pytest.raises(RegistryInvalid, match="no end"):
        list(FORMATS["us-dnc"].read(endless(), "list.txt"))


def test_a_number_of_another_country_of_the_plan_is_kept():
    assert numbers(FORMATS["us-dnc"], b"416,5550100\n") == [14_165_550_100]


def test_an_empty_file_has_no_number():
    for name in FORMATS:
        for data in (b"", b"\n", b"  \n\n"):
            assert numbers(FORMATS[name], data) == []


# --- Canada as XML ------------------------------------------------------------------------------------------

XML = b"""<?xml version="1.0" encoding="UTF-8"?>
<list type='full' level='all' val=''>
<ac val='416'>
<ph val='1234567'/> <ph val="1234568" /><ph  val = '1234569'/>
</ac>
<ac val="905"><ph val='1234567'/></ac>
<ac val='506'>
</ac>
</list>
"""


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 22])
def test_area_codes_and_numbers_in_tags_are_read_in_chunks_of_any_size(size):
    found = [14_161_234_567, 14_161_234_568, 14_161_234_569, 19_051_234_567]
    assert numbers(FORMATS["ca-dncl"], XML, size) == found
    assert numbers(FORMATS["ca-dncl"], b"\xef\xbb\xbf\r\n" + XML.split(b"\n", 1)[1], size) == found
    assert numbers(FORMATS["ca-dncl"], b"<ac val='416'><ph val='1234567'/></ac>", size) == found[:1]


def test_a_list_tag_that_is_closed_at_once_may_stand_before_the_numbers():
    data = b"<list type='full' level='ac' val='416' /> <ac val='416'>\n<ph val='1234567' />\n</ac> </list>"
    assert numbers(FORMATS["ca-dncl"], data) == [14_161_234_567]
    assert numbers(FORMATS["ca-dncl"], data.removesuffix(b"</list>")) == [14_161_234_567]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"<!DOCTYPE list [<!ENTITY a 'x'>]>\n<list></list>", 1),
        (b"<list>\n<!-- 416 --></list>", 2),
        (b"<list>\n\n<ph val='1234567'/></list>", 3),  # outside of an area code
        (b"<list>\n<ac val='416'>\n<ph val='123456'/></ac></list>", 3),
        (b"<list>\n<ac val='416'>\n<ph val='&#49;234567'/></ac></list>", 3),
        (b"<list>\n<ac val='416'>\n<ph val='1234567'/>\n<ph val='12345678'/></ac></list>", 4),
        (b"<list>\n<ac val='416'>\n<ph val='1234567'>1</ph></ac></list>", 3),
        (b"<list>\n<ac val='416'>\n<ph val='1234567\"/></ac></list>", 3),
        (b"<list>\n<ac val='41'></ac></list>", 2),
        (b"<list>\n<ac val='416'>\n<ac val='417'></ac></ac></list>", 3),
        (b"<list>\n<ac val='416'>\n</list>", 3),
        (b"<list>\n</ac></list>", 2),
        (b"<list>\n<del val='416'/></list>", 2),
        (b"<list>\n<?xml version='1.0'?></list>", 2),
        (b"<list></list>\n<list></list>", 2),
        (b"</list>", 1),
        (b"<list></list>\n<ac val='416'></ac>", 2),
        (b"<list>\n416,1234567\n</list>", 2),
        # cut short
        (b"<list>\n<ac val='416'>\n<ph val='1234567'/>\n", 4),
        (b"<list>\n<ac val='416'>\n<ph val='1234567'/></ac>", 3),
        (b"<list>\n<ac val='416'>\n<ph val='12345", 3),
        (b"<list " + b"a" * 200_000, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [3, 1 << 22])
def test_anything_else_in_tags_is_refused_with_its_line(text, line, size):
    with pytest.raises(RegistryInvalid) as refused:
        numbers(FORMATS["ca-dncl"], text, size)
    assert refused.value.where == {"file": "list.txt", "line": line}
    assert "12345" not in str(refused.value)


# --- mappings -----------------------------------------------------------------------------------------------


def test_the_download_of_the_united_kingdom_with_spaces():
    data = b"01635 506160\r\n0207 3787244\r\n0191 5657153\r\n07860 338653\r\n01697  72345\r\n"
    found = [441_635_506_160, 442_073_787_244, 441_915_657_153, 447_860_338_653, 44_169_772_345]
    for copies in (1, 40):
        assert sorted(numbers(shipped("uk-tps-5-7"), data * copies)) == sorted(found * copies)
    for line in (b"01635 50616", b"01635 5061x0", b"0163 5506 160", b"01635", b"      506160"):
        with pytest.raises(RegistryInvalid):
            numbers(shipped("uk-tps-5-7"), line + b"\r\n")


def test_the_download_of_the_united_kingdom_without_spaces():
    data = b"01635506160 \r\n02073787244 \r\n0169772345  \r\n447860338653\r\n"
    with pytest.raises(RegistryInvalid) as refused:
        numbers(shipped("uk-tps-12"), data)
    assert refused.value.where["line"] == 4
    found = numbers(shipped("uk-tps-12"), data[:42] * 20)
    assert sorted(found) == sorted([441_635_506_160, 442_073_787_244, 44_169_772_345] * 20)


def test_the_column_of_singapore():
    assert numbers(shipped("sg-dnc"), b"91234567\r\n61234567\n") == [6_591_234_567, 6_561_234_567]
    assert numbers(shipped("sg-dnc"), b'"91234567"\r\n' * 40) == [6_591_234_567] * 40
    for line in (b"9123456", b"912345678", b"+6591234567", b"9123 4567", b"18001234567"):
        with pytest.raises(RegistryInvalid) as refused:
            numbers(shipped("sg-dnc"), b"91234567\n" + line + b"\n")
        assert refused.value.where["line"] == 2


def test_columns_are_joined_in_the_order_of_the_mapping_and_may_stand_in_quotes():
    data = b'x;3787244;0207\n"a;""b";"3787244";207;more\n x y ; 3787244 ;0207 ;;\n'
    for copies in (1, 40):
        assert numbers(mapping(COLUMNS), data * copies) == [442_073_787_244] * 3 * copies
    for line in (b"x;3787244", b'x;"3787244;0207', b'"x"y;3787244;0207', b"x;;0207;", b"x;37872 44;0207"):
        with pytest.raises(RegistryInvalid):
            numbers(mapping(COLUMNS), line + b"\n")


def test_header_lines_are_passed_over_and_counted():
    form = mapping('[file]\nheader_lines = 2\ndelimiter = ","\n[number]\nregion = "SG"\ncolumns = [1]\n')
    for size in (1, 10, 1 << 22):
        assert numbers(form, b"a\n\n91234567\n", size) == [6_591_234_567]
        with pytest.raises(RegistryInvalid) as refused:
            numbers(form, b"91234567\n91234567\n91234567\nx\n", size)
        assert refused.value.where["line"] == 4


@pytest.mark.parametrize(
    ("region", "written", "found"),
    [
        ("GB", "02073787244", 442_073_787_244),
        ("GB", "2073787244", 442_073_787_244),
        ("GB", "08001111", 448_001_111),
        ("GB", "002073787244", None),
        ("GB", "442073787244", None),
        ("US", "14155550100", 14_155_550_100),  # 1 is the national prefix, and the number too long with it
        ("US", "4155550100", 14_155_550_100),
        ("US", "1155550100", 11_155_550_100),
        ("US", "5550100", None),
        ("US", "0155550100", None),
        ("RU", "88001234567", 78_001_234_567),
        ("RU", "8001234567", 78_001_234_567),
        ("IT", "0612345678", 390_612_345_678),  # 0 is part of the number
        ("HU", "0612345678", 3_612_345_678),
        ("SG", "91234567", 6_591_234_567),
        ("FR", "0123456789", 33_123_456_789),
    ],
)
def test_national_numbers_become_whole_ones_by_the_rules_of_the_country(region, written, found):
    form = mapping(f'[file]\ndelimiter = ","\n[number]\nregion = "{region}"\ncolumns = [1]\n')
    for copies in (1, 40):
        data = f"{written}\r\n".encode() * copies
        if found is None:
            with pytest.raises(RegistryInvalid):
                numbers(form, data)
        else:
            assert numbers(form, data) == [found] * copies


def test_whole_numbers_may_have_a_plus_or_two_zeros():
    form = mapping('[file]\ndelimiter = ","\n[number]\ninternational = true\ncolumns = [1]\n')
    data = b"+442073787244\n00442073787244\n442073787244\n4915112345678  \n"
    assert form.region is None
    for copies in (1, 40):
        found = numbers(form, data * copies)
        assert sorted(found) == sorted([442_073_787_244] * 3 * copies + [4_915_112_345_678] * copies)
    for line in (b"0442073787244", b"123456", b"+", b"1234567890123456", b"++442073787244"):
        with pytest.raises(RegistryInvalid):
            numbers(form, line + b"\n")


KINDS = {
    "us": FORMATS["us-dnc"],
    "5+7": shipped("uk-tps-5-7"),
    "12": shipped("uk-tps-12"),
    "sg": shipped("sg-dnc"),
    "columns": mapping(COLUMNS),
    "any": mapping("[number]\ninternational = true\npositions = [[1, 12]]\n"),
    "any column": mapping('[file]\ndelimiter = ","\n[number]\ninternational = true\ncolumns = [2, 1]\n'),
    "it": mapping('[number]\nregion = "IT"\npositions = [[2, 8], [9, 14]]\npadding = "."\n'),
    "ru": mapping('[file]\ndelimiter = ";"\n[number]\nregion = "RU"\ncolumns = [2]\n'),
}
digits = st.text("0123456789", max_size=13)
cell = st.builds(
    lambda before, text, after: " " * before + text + " " * after, st.integers(0, 2), digits, st.integers(0, 2)
)
shaped = st.builds(
    lambda cells, by: by.join(cells), st.lists(cell, min_size=1, max_size=4), st.sampled_from([",", ";", " "])
)
exact = st.builds(lambda a, b: f"{a:03},{b:07}", st.integers(0, 999), st.integers(0, 9_999_999))
uk = st.builds(lambda a, b: f"0{a}".ljust(5) + f"{b}".rjust(7), st.integers(100, 9999), st.integers(100_000, 9_999_999))
any_text = st.text('0123456789 ,;.+"\r\tx', max_size=20)
line = st.one_of(exact, uk, shaped, cell, any_text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(line, st.sampled_from(["\n", "\r\n"]), st.sampled_from([1, 3, 40])), max_size=6),
    shuffled=st.randoms(use_true_random=False),
    size=st.sampled_from([17, 200, 1 << 20]),
)
def test_many_lines_at_once_mean_what_each_means_alone(kind, rows, shuffled, size):
    # Given lines of which some occur so often that they are read together
    several = [(text + end).encode() for text, end, copies in rows for _ in range(copies)]
    shuffled.shuffle(several)
    # When each is read alone
    one = KINDS[kind].read.__self__.one if kind != "ca" else None
    alone = [one(text) for text in several]
    broken = [at for at, number in enumerate(alone) if number < 0]
    # Then together they are the same numbers, or the first broken line is named
    data = b"".join(several)
    if broken:
        with pytest.raises(RegistryInvalid) as refused:
            numbers(KINDS[kind], data, size)
        assert refused.value.where["line"] == broken[0] + 1
    else:
        assert sorted(numbers(KINDS[kind], data, size)) == sorted(filter(None, alone))


def test_lines_of_one_length_are_read_together_and_odd_ones_alone(monkeypatch):
    # Given a list of which the slow way would be felt
    alone = []
    monkeypatch.setattr(lists._Lines, "one", lambda self, text: alone.append(text) or self._plan.one(b"4155550100"))
    for data in (b"415,5550100\n" * 5000, b"415,5550100\r\n" * 5000, b"415,5550100\r\n415,5550100\n" * 2500):
        assert len(numbers(FORMATS["us-dnc"], data)) == 5000
    for name, data in (
        ("uk-tps-5-7", b"01635 506160\r\n0207 3787244\r\n01697  72345\r\n"),
        ("uk-tps-12", b"01635506160 \r\n0169772345  \r\n1635506160  \r\n"),
        ("sg-dnc", b"91234567\n61234567\r\n"),
    ):
        assert len(numbers(shipped(name), data * 500)) == 500 * data.count(b"\n")
    assert len(numbers(mapping(COLUMNS), b"a;3787244;0207\nbc;3787244;0207;\n" * 500)) == 1000
    assert alone == []
    assert len(numbers(FORMATS["us-dnc"], b"415,5550100\n" * 5000 + b"\n")) == 5001
    assert alone == [b"\n"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "number"),
        ("[number]\n", "columns or positions"),
        ('[number]\nregion = "GB"\n', "columns or positions"),
        ('[number]\nregion = "UK"\npositions = [[1, 12]]\n', "number.region"),
        ("[number]\npositions = [[1, 12]]\n", "region or international"),
        ('[number]\nregion = "GB"\ninternational = true\npositions = [[1, 12]]\n', "region or international"),
        ("[number]\ninternational = true\nlengths = [9]\npositions = [[1, 12]]\n", "number.lengths"),
        ('[number]\nregion = "GB"\npositions = [[2, 1]]\n', "number.positions"),
        ('[number]\nregion = "GB"\npositions = [[0, 1]]\n', "number.positions"),
        ('[number]\nregion = "GB"\npositions = [[1, 19]]\n', "number.positions"),
        ('[number]\nregion = "GB"\npositions = [[1, 12]]\npadding = "0"\n', "number.padding"),
        ('[number]\nregion = "GB"\npositions = [[1, 12]]\npadding = ""\n', "number.padding"),
        ('[number]\nregion = "GB"\ncolumns = [1]\n', "file.delimiter"),
        ('[file]\ndelimiter = ","\n[number]\nregion = "GB"\npositions = [[1, 12]]\n', "file.delimiter"),
        ('[file]\ndelimiter = "ab"\n[number]\nregion = "GB"\ncolumns = [1]\n', "file.delimiter"),
        ('[file]\ndelimiter = "1"\n[number]\nregion = "GB"\ncolumns = [1]\n', "file.delimiter"),
        ('[number]\nregion = "GB"\ncolumns = [0]\n', "number.columns"),
        ('[number]\nregion = "GB"\npositions = [[1, 12]]\nmore = 1\n', "number.more"),
        ("[number\n", "TOML"),
    ],
)
def test_a_mapping_that_is_wrong_is_refused_with_its_key(text, key):
    with pytest.raises(InputInvalid, match=key) as refused:
        mapping(text)
    assert refused.value.where == {"file": "map.toml"}


def test_lengths_without_which_no_number_would_be_left_are_those_that_e164_allows():
    form = mapping('[file]\ndelimiter = ","\n[number]\nregion = "GB"\ncolumns = [1]\nlengths = [4, 13, 14]\n')
    assert numbers(form, b"2345678901234\n") == [442_345_678_901_234]
    for written in (b"2345", b"23456789012345"):
        with pytest.raises(RegistryInvalid):
            numbers(form, written + b"\n")


def test_numbers_are_arrays_without_a_python_object_each():
    (found,) = FORMATS["us-dnc"].read([b"415,5550100\n" * 100], "list.txt")
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.int64
