import pytest
from hypothesis import given
from hypothesis import strategies as st

from processors.screen.keywords import MAX_MESSAGE, Keywords, Match
from schemas.errors import PolicyInvalid
from schemas.languages import language, languages

KEYWORDS = Keywords()
EVERYWHERE = Keywords(languages())
OPT_OUT, OPT_IN = tuple(language("en").opt_out), tuple(language("en").opt_in)
EVERY_OPT_OUT = sorted({word for code in languages() for word in language(code).opt_out})


def full_width(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


SPELLINGS = {
    "as listed": lambda word: word,
    "lower": str.lower,
    "title": str.title,
    "full width": full_width,
    "exclaimed": lambda word: word + "!!!",
    "quoted": lambda word: f"“{word}”.",
    "ascii quoted": lambda word: f'"{word}"',
    "padded": lambda word: f" \t{word} \r\n",
    "inner runs": lambda word: word.replace(" ", " \u00a0\t "),
    "decomposed": lambda word: word.replace("Ê", "E\u0302"),
    "soft hyphens": "\u00ad".join,
    "directed": lambda word: f"\u202b\u200f{word}\u202c",
    "zero width inside": "\u200c".join,
    "Turkish capitals": lambda word: word.replace("I", "İ"),
    "Turkish small letters": lambda word: word.lower().replace("i", "ı"),
    "presentation of an emoji": lambda word: f"{word}\ufe0f",
    "NUL and byte order mark": lambda word: f"\ufeff{word}\0",
    "no-break and zero width": lambda word: f"\u00a0\u200b{word}\u200e",
    "starred": lambda word: f"*{word}*",
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("word", EVERY_OPT_OUT)
def test_every_opt_out_keyword_is_understood_in_every_spelling(word, spell):
    assert EVERYWHERE.match(spell(word)) is Match.OPT_OUT


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("word", OPT_IN)
def test_every_opt_in_keyword_is_understood_in_every_spelling(word, spell):
    assert KEYWORDS.match(spell(word)) is Match.OPT_IN


def test_the_keywords_of_the_clause_act_under_every_policy():
    for word in ("stop", "quit", "end", "revoke", "opt out", "cancel", "unsubscribe"):  # 47 CFR 64.1200(a)(10)
        assert KEYWORDS.match(word) is Match.OPT_OUT


@pytest.mark.parametrize("word", OPT_OUT)
def test_a_keyword_inside_a_message_never_acts(word):
    for text in (f"{word} it", f"please {word}", f"a {word} b", f"{word} {word} {word}", f"{word}\U0001f6d1"):
        assert KEYWORDS.match(text) is not Match.OPT_OUT


@pytest.mark.parametrize("word", OPT_IN)
def test_an_opt_in_inside_a_message_does_nothing(word):
    assert KEYWORDS.match(f"please {word}") is Match.NONE


@pytest.mark.parametrize(
    "text",
    [
        *("PLEASE STOP", "stop texting me", "can you stop this, please?", "Unsubscribe me", "opt out please"),
        *("STOPP", "unsubscrbe", "SOTP", "STO P", "ST0P", "un stop", "STOP \U0001f6d1", "opt–out", "Stop it. Now!"),
        *(
            "STOP.STOP",
            "pls, opt-out",
            "cancel my messages",
            "ＰＬＥＡＳＥ　ＳＴＯＰ",
            "S\u200dT\u200dO\u200dP \U0001f6d1",
        ),
    ],
)
def test_a_short_message_that_asks_to_stop_is_a_near_miss(text):
    assert KEYWORDS.match(text) is Match.NEAR


@pytest.mark.parametrize(
    "text",
    [
        *("", None, " ", "...", "\0", "ok", "thanks!", "yes", "YES", "go", "GO!", "y", "1", "\U0001f44d", "\ud800"),
        *("a non-stop show", "stopping by later", "unstoppable", "weekend", "tdx", "e-n-d-s", "stop_it"),
        "I will be at the stop near the end of the road at noon",
        "please stop " + "x" * 60, "text me", "I can't call", "leave me a loan", "wrong numbers",
        "and", "TV", "bend",
    ],
)  # fmt: skip
def test_other_messages_are_none(text):
    assert KEYWORDS.match(text) is Match.NONE


@pytest.mark.parametrize(("words", "expected"), [(8, Match.NEAR), (9, Match.NONE)])
def test_a_near_miss_has_at_most_eight_words(words, expected):
    assert KEYWORDS.match(" ".join(["stop", *["a"] * (words - 1)])) is expected


@pytest.mark.parametrize(("length", "expected"), [(64, Match.NEAR), (65, Match.NONE)])
def test_a_near_miss_has_at_most_64_characters(length, expected):
    assert KEYWORDS.match("stop " + "x" * (length - 5)) is expected


@pytest.mark.parametrize("asked", ["don't text", "don’t text", "DONT TEXT", "do  not\u00a0contact", "Leave me alone!"])
def test_a_plain_request_in_a_long_message_is_a_near_miss(asked):
    around = "I never gave you my number and have nothing else to say to anybody of yours. "
    assert KEYWORDS.match(f"{around}Please {asked} me again, thanks. {around}") is Match.NEAR
    assert KEYWORDS.match(around) is Match.NONE


def test_padding_does_not_make_a_keyword_long():
    assert KEYWORDS.match("stop" + " \r\n!" * 1000) is Match.OPT_OUT


@pytest.mark.parametrize(("length", "expected"), [(MAX_MESSAGE, Match.NEAR), (MAX_MESSAGE + 1, Match.NONE)])
def test_a_request_in_a_message_of_more_than_three_parts_is_not_looked_for(length, expected):
    assert KEYWORDS.match("don't text me ".ljust(length, "x") + " !") is expected


def test_a_long_message_is_none_without_being_folded():
    assert KEYWORDS.match("stop " * MAX_MESSAGE) is Match.NONE
    assert KEYWORDS.match("x" * 1_000_000) is Match.NONE


def test_extra_keywords_of_a_policy_count_beside_the_defaults():
    # Given
    keywords = Keywords(opt_out=["*Aus*", "kein Interesse", "\U0001f6d1"], opt_in=["Wieder her"])
    # Then
    assert keywords.match("AUS!") is Match.OPT_OUT
    assert keywords.match("Kein  Interesse.") is Match.OPT_OUT
    assert keywords.match("wieder  her!") is Match.OPT_IN
    assert keywords.match("STOP") is Match.OPT_OUT
    assert keywords.match("ich habe kein interesse") is Match.NEAR
    assert keywords.match("bitte \U0001f6d1 jetzt") is Match.NEAR
    assert keywords.match("\U0001f6d1\ufe0f") is Match.OPT_OUT
    assert KEYWORDS.match("AUS") is Match.NONE


def test_a_word_in_both_lists_opts_out():
    assert Keywords(opt_out=["START"]).match("start") is Match.OPT_OUT
    assert Keywords(opt_in=["STOP"]).match("stop") is Match.OPT_OUT


ASSENT = [
    *(
        "YES",
        "yes!",
        "Go",
        "ｙｅｓ",
        "*Yes* please",
        "Y",
        "OK!!",
        "oui",
        "Sí",
        "si\u0301",
        "sì",
        "Ja gerne",
        "d'accord",
        "tak",
    ),
    *("D’ACCORD", "ДА", "evet", "はい", "はい。", "نعم", "כן", "Áno", "JÁ"),
]


@pytest.mark.parametrize("word", ASSENT)
def test_yes_and_go_cannot_be_made_opt_ins_in_any_language(word):
    with pytest.raises(PolicyInvalid):
        Keywords(opt_in=[word])


@pytest.mark.parametrize("code", languages())
def test_assent_lifts_nothing_in_any_language(code):
    keywords = Keywords([code])
    assert all(keywords.match(word) is Match.NONE for word in ASSENT)


# --- languages ----------------------------------------------------------------------------------------------


def test_a_language_acts_only_where_the_policy_names_it():
    for code in languages():
        if code != "en":
            for word in language(code).opt_out:
                assert KEYWORDS.match(word) is not Match.OPT_OUT
                assert Keywords([code]).match(word) is Match.OPT_OUT


@pytest.mark.parametrize("code", languages())
def test_english_acts_beside_every_language(code):
    keywords = Keywords([code])
    assert {keywords.match(word) for word in OPT_OUT} == {Match.OPT_OUT}
    assert {keywords.match(word) for word in OPT_IN} == {Match.OPT_IN}


def test_an_everyday_word_acts_alone_and_is_no_near_miss_among_others():
    keywords = Keywords(["nl", "pt", "es"])
    for word in ("Uit!", "sair", "ALTO"):
        assert keywords.match(word) is Match.OPT_OUT
    for text in ("ik ga uit eten", "vou sair agora", "habla más alto", "vair", "salto"):
        assert keywords.match(text) is Match.NONE
    assert keywords.match("dadme de baja") is Match.NEAR
    assert Keywords(["nl"], opt_out=["uit"]).match("ik ga uit eten") is Match.NEAR  # the policy asked for it


def test_a_word_that_opts_in_here_and_out_there_opts_out(monkeypatch):
    one = language("fr")
    monkeypatch.setattr("processors.screen.keywords.language", {
        "en": language("en"),
        "xx": type(one)(name="X", sources={"s": "S"}, opt_out={"START": ("s",)}),
        "yy": type(one)(name="Y", sources={"s": "S"}, opt_out={"A": ("s",)}, opt_in={"STOP": ("s",), "B": ("s",)}),
    }.__getitem__)  # fmt: skip
    keywords = Keywords(["xx", "yy"])
    assert keywords.match("start") is Match.OPT_OUT
    assert keywords.match("stop") is Match.OPT_OUT
    assert keywords.match("b") is Match.OPT_IN


@pytest.mark.parametrize("code", ["xx", "", "../en", "EN"])
def test_a_language_that_does_not_ship_is_refused(code):
    with pytest.raises(PolicyInvalid, match="no keywords ship"):
        Keywords([code])


@pytest.mark.parametrize("word", ["", "!!!", " ", "\u200b", "a b c d e f g h i", "x" * 65])
def test_a_keyword_that_no_message_could_be_is_refused(word):
    with pytest.raises(PolicyInvalid):
        Keywords(opt_out=[word])


def test_the_repr_of_keywords_shows_no_text():
    assert "aus" not in repr(Keywords(opt_out=["aus"])).lower()


@given(st.text(max_size=200))
def test_any_text_has_a_match_and_padding_changes_nothing(text):
    assert KEYWORDS.match(text) in Match
    if len(text) <= 80:
        assert KEYWORDS.match(f"  {text}\r\n") is KEYWORDS.match(text)


@given(st.sampled_from([w for w in OPT_OUT if len(w) >= 4]), st.data())
def test_one_edit_of_a_keyword_of_four_letters_never_passes_unseen(word, data):
    # Given one letter dropped, doubled or replaced by one that is in no keyword
    at = data.draw(st.integers(0, len(word) - 1))
    typo = data.draw(
        st.sampled_from(
            [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word[:at] + "x" + word[at + 1 :]]
        )
    )
    # Then it acts (another keyword) or goes to a human
    assert KEYWORDS.match(typo) in {Match.NEAR, Match.OPT_OUT}
