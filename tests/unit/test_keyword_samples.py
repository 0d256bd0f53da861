"""The figures of docs/keywords.md are those of the code, on texts that nobody here wrote."""

import re
from pathlib import Path

import pytest

from processors.screen.keywords import Keywords, Match
from schemas.languages import languages
from tests.support import uci

DOCS = (Path(__file__).parents[2] / "docs" / "keywords.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(not uci.SAMPLES.exists(), reason="the shared samples are not here")


def test_the_documented_table_is_what_the_matcher_does():
    assert uci.table() in DOCS


def test_the_documented_counts_of_texts_are_right():
    texts = uci.texts()
    people = sum(text.ham for text in texts)
    assert f"{len(texts):,} real English\ntexts, {people:,} of people to people and {len(texts) - people}" in DOCS
    assert f"the {uci.read_texts()} texts of people" in DOCS
    near = uci.figures()["to review, English"].picked
    assert f"{near} texts, {near / len(texts) * 1000:.1f} in 1,000" in DOCS


def test_every_text_that_goes_anywhere_was_judged():
    known = uci.labels()
    assert set(known.values()) == {"opt_out", "doubtful", "other"}
    keywords = Keywords(languages())
    for text in uci.texts():
        if keywords.match(text.body) is not Match.NONE:
            assert text.line in known


def test_every_label_is_of_a_text_and_nobody_advertising_is_taken_to_ask():
    texts = {text.line: text for text in uci.texts()}
    for line, asks in uci.labels().items():
        assert asks == "other" or texts[line].ham
    assert len(uci.labels()) == len(uci.LABELS.read_text(encoding="utf-8").splitlines()) - 1  # none twice


def test_an_advertisement_that_tells_how_to_opt_out_does_nothing():
    telling = [text for text in uci.texts() if not text.ham and re.search(r"\bstop\b", text.body, re.IGNORECASE)]
    assert len(telling) > 50
    keywords = Keywords(languages())
    assert {keywords.match(text.body) for text in telling} == {Match.NONE}
