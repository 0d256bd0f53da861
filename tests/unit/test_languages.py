import re
from pathlib import Path

import pytest

from processors.screen.keywords import Keywords
from schemas.errors import PolicyInvalid
from schemas.languages import ASSENT, is_assent, language, languages, parse_language, plain
from streams.config import packs_available

DOCS = Path(__file__).parents[2] / "docs" / "keywords.md"

GOOD = """
name = "Some"
everyday = ["AÑO"]
[sources]
law = "Law 1"
[opt_out]
"AÑO" = ["law"]
"ANO" = ["law"]
[near]
"NO MÁS" = ["law"]
"NO MAS" = ["law"]
"""


def test_english_and_french_and_others_ship():
    assert {"de", "en", "es", "fr", "it", "nl", "pt", "sv"} <= set(languages())


@pytest.mark.parametrize("code", languages())
def test_every_word_that_ships_names_who_published_it(code):
    found = language(code)
    for table in (found.opt_out, found.opt_in, found.near):
        for sources in table.values():
            assert sources
            assert all(len(found.sources[name]) > 30 for name in sources)
    Keywords([code])


def test_no_language_but_english_lets_a_word_lift_an_opt_out():  # no published one was found that only does that
    assert {code for code in languages() if language(code).opt_in} == {"en"}


@pytest.mark.parametrize("pack", packs_available())
def test_the_packs_that_name_languages_name_french(pack):
    assert 'codes = ["fr"]' in packs_available()[pack]


def test_every_word_and_language_is_in_the_documentation():
    text = DOCS.read_text(encoding="utf-8")
    for code in languages():
        row = re.search(rf"^\| `{code}` \|.*$", text, re.MULTILINE)
        assert row is not None, code
        for word in (*language(code).opt_out, *language(code).opt_in):
            assert f"`{word}`" in row[0], (code, word)


def test_a_good_file_is_read():
    found = parse_language(GOOD, "x.toml")
    assert found.name == "Some"
    assert found.opt_out == {"AÑO": ("law",), "ANO": ("law",)}
    assert found.opt_in == {}
    assert found.everyday == ("AÑO",)


WRONG = {
    "no TOML": ("[sources", "[[sources", "not a keyword file"),
    "an unknown key": ("name =", "nom =", "not a keyword file"),
    "a word without a source": ('"ANO" = ["law"]', '"ANO" = []', "without a source"),
    "a source that is not there": ('"ANO" = ["law"]', '"ANO" = ["rule"]', "differ"),
    "a source of nothing": ('law = "Law 1"', 'law = "Law 1"\nother = "Law 2"', "differ"),
    "no plain spelling beside an accent": ('"ANO" = ["law"]\n', "", "without them"),
    "no plain spelling of a phrase": ('"NO MAS" = ["law"]\n', "", "without them"),
    "small letters": ('"ANO" = ["law"]', '"ano" = ["law"]', "capital letters"),
    "an everyday word that is none": ('everyday = ["AÑO"]', 'everyday = ["SI"]', "'everyday'"),
    "in and out": ("[near]", '[opt_in]\n"ANO" = ["law"]\n[near]', "both"),
    "assent": ("[near]", '[opt_in]\n"SÍ POR FAVOR" = ["law"]\n"SI POR FAVOR" = ["law"]\n[near]', "assent"),
    "an empty word": ('"ANO" = ["law"]', '"ANO" = ["law"]\n"" = ["law"]', "not a keyword file"),
    "a long word": ('"ANO" = ["law"]', f'"ANO" = ["law"]\n"{"A" * 41}" = ["law"]', "not a keyword file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_and_named(case):
    old, new, said = WRONG[case]
    assert GOOD.count(old) == 1
    with pytest.raises(PolicyInvalid) as caught:
        parse_language(GOOD.replace(old, new), "x.toml")
    assert said in caught.value.message
    assert caught.value.where["file"] == "x.toml"


def test_words_of_assent_are_kept_as_they_are_compared():
    for word in ASSENT:
        assert is_assent(word)
        assert is_assent(f" {word.upper()}, please!")
    for text in ("", "!!", "START", "no", "yesterday", "si-fi".replace("-", ""), "2 yes"):
        assert not is_assent(text)


def test_accents_of_latin_letters_are_dropped_and_no_others():
    assert plain("ARRÊT") == plain("ARRE\u0302T") == "ARRET"
    assert plain("はい ガ й ñ ß") == "はい ガ й n ß"
