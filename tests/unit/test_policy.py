import argparse
import re
import tomllib
from datetime import date, time

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import PolicyInvalid
from schemas.policy import (
    CLAUSES,
    Locator,
    Period,
    Policy,
    _cited,
    explain,
    parse_content_keep,
    parse_keep,
    parse_policy,
    sentences,
)
from streams.cli import policy as command
from streams.config import packs_available

PACKS = packs_available()
DEFAULT = PACKS["default"]
ACCOUNT = """
[[account]]
id = "acme"
name = "Acme Ltd"
content = "never stored"
own_numbers = ["+4930901820", "+4930901821"]
countries = ["DE", "FR"]
voice_increment_s = 1
default_region = "DE"
jurisdiction = "EU"
acts_as = "processor"

[[account.role]]
data_class = "content"
role = "controller"
agreement = "MSA-17/2026"
from = 2026-01-01
until = 2026-07-01
clause = "KAL-1"
"""


def policy_with(*pairs, add=""):
    """The default policy with (old, new) replaced, once each, and text added."""
    text = DEFAULT
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    return text + add


def refusal(text):
    with pytest.raises(PolicyInvalid) as caught:
        parse_policy(text, "p.toml")
    return caught.value


# --- the packs ----------------------------------------------------------------------------------------------


def test_the_packs_ship_with_the_program():
    assert {"default", "infobip"} <= set(PACKS)


@pytest.mark.parametrize("pack", PACKS)
def test_every_pack_is_valid(pack):
    assert parse_policy(PACKS[pack], pack).name == pack


@pytest.mark.parametrize("pack", PACKS)
def test_every_clause_a_pack_cites_exists(pack):
    cited = re.findall(r'^clause = "(.*)"', PACKS[pack], re.MULTILINE)
    assert cited
    assert set(cited) <= CLAUSES


def test_the_clauses_are_those_of_the_four_families():
    assert len(CLAUSES) == 15 + 9 + 14 + 5
    assert {"INF-15", "KAL-9", "CAL-14", "REG-5"} <= CLAUSES
    assert not {"INF-0", "INF-16", "KAL-10", "CAL-15", "REG-6"} & CLAUSES


def test_the_default_policy_is_the_one_of_the_design():
    policy = parse_policy(DEFAULT, "default")
    account = policy.account("anyone")
    assert policy.id == "default/1"
    assert policy.timezone == "UTC"
    assert policy.content_days(account) == 30
    assert policy.increment_s(account) == 60
    assert policy.coarsening.time == "hour"
    assert policy.screening.quiet_hours is None
    assert [rule.name for rule in policy.registries("voice")] == ["us-dnc", "ca-dncl", "uk-tps", "sg-dnc-voice"]
    assert [rule.name for rule in policy.registries("sms")] == ["us-dnc", "sg-dnc-text"]
    assert not any(rule.required for rule in policy.screening.registry)
    roles = {c: policy.role_of("anyone", c, date(2026, 1, 1)) for c in ("content", "traffic", "anonymous", "audit")}
    assert roles == {"content": "processor", "traffic": "controller", "anonymous": "controller", "audit": "controller"}


def test_the_infobip_pack_says_what_inf_3_and_inf_6_say():
    policy = parse_policy(PACKS["infobip"], "infobip")
    purposes = ("routing", "security_and_fraud", "billing", "interconnect")
    assert policy.processing_of("traffic").purposes == purposes
    kept = {rule.data_class: (rule.keep, rule.event) for rule in policy.retention if rule.clause == "INF-6"}
    assert kept == {
        "usage": ("3 years", "creation"),
        "behavioural": ("25 months", "creation"),
        "account": ("12 months", "relationship_end"),
        "account_individual": ("7 years", "relationship_end"),
        "support": ("7 years", "creation"),
    }
    assert policy.screening.quiet_hours.start_time == time(21)
    assert policy.screening.quiet_hours.end_time == time(8)


# --- explaining ---------------------------------------------------------------------------------------------


def test_the_default_policy_in_plain_words():
    words = explain(parse_policy(DEFAULT, "default"))
    for sentence in (
        "Content (what was said): platform is processor, for delivery, on the basis of customer instructions (INF-1).",
        "Content (what was said) is kept 30 days after the day of the communication (INF-2).",
        "Traffic data with numbers: destroyed 12 months after the end of the month of the communication (INF-4).",
        "Anonymous records: destroyed 10 years after the end of the year of the communication (INF-5).",
        "Opt-outs: kept until lifted (INF-8).",
        "Months and years are counted in UTC (INF-4).",
        "Anonymous records tell the time to the hour (KAL-6).",
        "An opt-out of class service blocks service and transactional (KAL-5).",
        "A keyword such as STOP opts out at account scope, class all, for sms and voice (REG-3).",
        "Keywords act in English and in fr (REG-3).",
        "Marketing by sms and voice to US (+1) is refused while us-dnc is older than 31 days (REG-2).",
        "Any account is served, listed or not (CAL-2).",
    ):
        assert sentence in words


@pytest.mark.parametrize("text", [*PACKS.values(), policy_with(add=ACCOUNT)])
def test_every_sentence_ends_with_its_clause(text):
    for sentence in explain(parse_policy(text, "p")):
        assert re.fullmatch(r"[^\n]+ \((INF|KAL|CAL|REG)-\d+\)\.", sentence)
        assert sentence.rsplit("(", 1)[1].removesuffix(").") in CLAUSES


def test_an_account_is_explained_without_its_numbers():
    words = "\n".join(explain(parse_policy(policy_with(add=ACCOUNT), "p")))
    assert "Account acme: content is never stored (INF-2)." in words
    assert "Account acme: its own numbers, no person's: 2 (KAL-3)." in words
    assert (
        "Account acme, content data: the platform is controller from 2026-01-01 until before 2026-07-01, "
        "by agreement MSA-17/2026 (KAL-1)." in words
    )
    assert "4930901" not in words


# --- accounts -----------------------------------------------------------------------------------------------


def test_a_listed_account_has_its_own_instructions():
    policy = parse_policy(policy_with(add=ACCOUNT), "p")
    acme = policy.account("acme")
    assert policy.content_days(acme) is None
    assert policy.increment_s(acme) == 1
    assert acme.own == {"+4930901820", "+4930901821"}
    assert acme.countries == ("DE", "FR")
    assert acme.acts_as == "processor"


def test_an_unlisted_account_is_served_only_if_any_is():
    open_policy = parse_policy(policy_with(add=ACCOUNT), "p")
    closed = parse_policy(policy_with(("any = true", "any = false"), add=ACCOUNT), "p")
    assert open_policy.account("other").countries is None
    assert closed.account("other") is None
    assert closed.account("acme") is not None


@pytest.mark.parametrize("name", ["platform", "", "a b", "x" * 65, "über"])
def test_a_name_that_can_be_no_account_is_never_served(name):
    assert parse_policy(DEFAULT, "p").account(name) is None


def test_a_repr_shows_no_number():
    policy = parse_policy(policy_with(add=ACCOUNT), "p")
    assert "4930901" not in f"{policy!r}{policy.account('acme')!r}{policy.listed!r}{policy.screening!r}"


def test_an_agreement_changes_the_role_from_its_first_day_to_before_its_last():
    policy = parse_policy(policy_with(add=ACCOUNT), "p")
    days = [date(2025, 12, 31), date(2026, 1, 1), date(2026, 6, 30), date(2026, 7, 1)]
    roles = [policy.role_of("acme", "content", day) for day in days]
    assert roles == ["processor", "controller", "controller", "processor"]
    assert policy.role_of("acme", "traffic", date(2026, 1, 1)) == "controller"
    assert policy.role_of("other", "content", date(2026, 1, 1)) == "processor"


def test_agreements_that_meet_but_do_not_overlap_are_valid():
    follows = '\n[[account.role]]\ndata_class = "content"\nrole = "controller"\nagreement = "B"\n'
    text = policy_with(add=ACCOUNT + follows + 'from = 2026-07-01\nclause = "KAL-1"\n')
    assert parse_policy(text, "p").role_of("acme", "content", date(2030, 1, 1)) == "controller"


def test_a_class_without_a_rule_has_no_role():
    with pytest.raises(PolicyInvalid, match="support"):
        parse_policy(DEFAULT, "p").role_of("acme", "support", date(2026, 1, 1))


# --- answers ------------------------------------------------------------------------------------------------


def test_screening_answers_come_from_the_document():
    text = policy_with(
        ("marketing = 15", "marketing = 5"),
        ('service = ["service", "transactional"]', 'service = ["service"]'),
        ('channels = ["sms", "voice"]\nmax', 'channels = ["voice"]\nmax'),
        add='[screening.extra_keywords]\nopt_out = ["BASTA", "नहीं"]\nopt_in = ["AGAIN"]\nclause = "REG-3"\n',
    )
    policy = parse_policy(text, "p")
    assert policy.not_after_s("marketing") == 300
    assert policy.not_after_s("otp") == 600
    assert policy.blocked_by("service") == ("service",)
    assert [rule.name for rule in policy.registries("sms")] == ["sg-dnc-text"]
    assert len(policy.registries("voice")) == 4
    assert policy.extra_keywords() == (("BASTA", "नहीं"), ("AGAIN",))


def test_what_screening_leaves_out_has_defaults():
    text = DEFAULT[: DEFAULT.index("[screening.optout_blocks]")]
    policy = parse_policy(text, "p")
    assert set(policy.blocked_by("all")) == {"marketing", "transactional", "otp", "service"}
    assert policy.screening.keyword.channels == ("sms", "voice")
    assert policy.not_after_s("marketing") == 900
    assert policy.registries("sms") == ()
    assert policy.extra_keywords() == ((), ())
    assert policy.languages() == ()


def test_keep_is_a_count_of_days_months_or_years():
    assert parse_keep("12 months") == Period(12, "months")
    assert parse_keep("1 day") == Period(1, "days")
    assert parse_keep("until lifted") is None
    assert parse_content_keep("30 days") == 30
    assert parse_content_keep("never") is None
    assert parse_content_keep("never stored") is None


@pytest.mark.parametrize("text", ["", "0 days", "-1 days", "12", "months", "12 weeks", "1.5 years", "12  months",
                                  "99999 days", "12 months ", "never", "١٢ months"])  # fmt: skip
def test_a_keep_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="keep must be"):
        parse_keep(text)


def test_content_is_kept_in_days_only():
    with pytest.raises(ValueError, match="content is kept"):
        parse_content_keep("2 months")


# --- refusing: what is wrong, what is allowed, and the line (marked HERE) --------------------------------------

TRAFFIC_KEEP = 'keep = "12 months"'
ROLE = '\n[[account.role]]\ndata_class = "content"\nrole = "controller"\nagreement = "B"\nclause = "KAL-1"\n'
REGISTRY = """
[[screening.registry]]
name = "us-dnc" # HERE
country = "US"
calling_code = "1"
channels = ["sms"]
max_age_days = 31
clause = "REG-2"
"""
QUIET = '[screening.quiet_hours]\nstart = "21:00"\nend = "08:00"\ncountries = ["US"]\nclause = "REG-3"\n'
WRONG = {
    "TOML that does not parse": (policy_with(("revision = 1", "revision = # HERE")), "not valid TOML"),
    "a key set twice": (policy_with(("revision = 1", 'revision = 1\nname = "x" # HERE')), "not valid TOML"),
    "an open string at the end": (policy_with(add='x = """ # HERE'), "not valid TOML"),
    "an unknown key": (policy_with(("timezone", 'colour = "red" # HERE\ntimezone')), "unknown key 'colour'; allowed: "),
    "an unknown key in a rule": (policy_with((TRAFFIC_KEEP, "kept = 1 # HERE\nkeep = '1 day'")), "allowed: after, "),
    "an unknown table": (policy_with(("[coarsening]", "[colours] # HERE\na = 1\n[coarsening]")), "allowed: "),
    "an unknown version": (policy_with(("version = 1", "version = 2 # HERE")), "'version' must be one of 1"),
    "a wrong type": (policy_with(("any = true", 'any = "yes" # HERE')), "`bool`"),
    "a wrong type in a list": (policy_with(('["delivery"]', '[\n"delivery",\n7, # HERE\n]')), "`str`"),
    "an empty list": (policy_with(('["delivery"]', "[] # HERE")), "length >= 1"),
    "a data class of no meaning": (policy_with(('data_class = "usage"', 'data_class = "x" # HERE')), "'behavioural'"),
    "a role of no meaning": (policy_with(('role = "processor"', 'role = "owner" # HERE')), "'controller', 'processor'"),
    "a rule without a clause": (
        policy_with(("[billing]", "[billing] # HERE"), ('60\nclause = "INF-3"', "60")),
        "'clause' is missing",
    ),
    "a clause that does not exist": (
        policy_with(('clause = "INF-4"', 'clause = "INF-16" # HERE')),
        "'clause' must be one of INF-1 to INF-15",
    ),
    "an account's clause that does not exist": (
        policy_with(add=ACCOUNT.replace('name = "Acme Ltd"', 'clause = "X-1" # HERE')),
        "'clause' must be",
    ),
    "a time zone that does not exist": (policy_with(('"UTC"', '"Mars/Base" # HERE')), "IANA"),
    "a time zone that is a path": (policy_with(('"UTC"', '"../UTC" # HERE')), "IANA"),
    "a time zone that is a folder": (policy_with(('"UTC"', '"America" # HERE')), "IANA"),
    "two processing rules for a class": (
        policy_with(('data_class = "usage"', 'data_class = "traffic" # HERE')),
        "a second processing rule for traffic",
    ),
    "no processing rule for a required class": (
        policy_with(("[[processing]]", "[[processing]] # HERE"), ('data_class = "usage"', 'data_class = "support"')),
        "no processing rule for usage",
    ),
    "two retention rules for a class": (
        policy_with(('data_class = "suppression"\nkeep', 'data_class = "traffic" # HERE\nkeep')),
        "a second retention rule for traffic",
    ),
    "no retention rule for traffic": (
        policy_with(("[[retention]]", "[[retention]] # HERE"), ('"traffic"\nkeep', '"support"\nkeep')),
        "no retention rule for traffic",
    ),
    "a retention rule for content": (
        policy_with(('data_class = "suppression"\nkeep', 'data_class = "content" # HERE\nkeep')),
        "[content]",
    ),
    "a keep that does not parse": (policy_with((TRAFFIC_KEEP, 'keep = "a year" # HERE')), "keep must be"),
    "traffic data for ever": (policy_with((TRAFFIC_KEEP, 'keep = "until lifted" # HERE')), "must end"),
    "traffic data that dies by the record": (
        policy_with(('after = "end of month"', 'after = "event" # HERE')),
        "'end of month' or 'end of year'",
    ),
    "traffic data from another event": (
        policy_with(('event = "communication"', 'event = "termination" # HERE')),
        "'communication'",
    ),
    "anonymous records that tell the exact time": (
        policy_with(('after = "end of year"', 'after = "event" # HERE')),
        "'end of day' or 'end of month' or 'end of year'",
    ),
    "anonymous records that die first": (
        policy_with(('keep = "10 years"', 'keep = "1 month" # HERE')),
        "would die before",
    ),
    "anonymous records that die first in leap years only": (
        policy_with(
            ('keep = "10 years"', 'keep = "365 days" # HERE'), ('after = "end of year"', 'after = "end of month"')
        ),
        "would die before",
    ),
    "anonymous records that die first in one year of four": (
        policy_with(
            (TRAFFIC_KEEP, 'keep = "2 months"'),
            ('after = "end of month"', 'after = "end of year"'),
            ('keep = "10 years"', 'keep = "59 days" # HERE'),
        ),
        "would die before",
    ),
    "opt-outs that end": (
        policy_with(('keep = "until lifted"', 'keep = "10 years" # HERE')),
        "opt-outs are kept 'until lifted'",
    ),
    "content kept in months": (policy_with(('keep = "30 days"', 'keep = "2 months" # HERE')), "content is kept"),
    "an account's content kept for ever": (
        policy_with(add=ACCOUNT.replace('content = "never stored"', 'content = "ever" # HERE')),
        "content is kept",
    ),
    "an empty content instruction": (
        policy_with(add=ACCOUNT.replace('content = "never stored"', 'content = "" # HERE')),
        "content is kept",
    ),
    "marketing sent late": (policy_with(("marketing = 15", "marketing = 16 # HERE")), "<= 15"),
    "two registries of a name": (policy_with(add=REGISTRY), "a second registry"),
    "a registry older than REG-2 allows": (
        policy_with(("max_age_days = 31", "max_age_days = 32 # HERE")),
        "at most 31 under REG-2",
    ),
    "a registry of no country": (policy_with(('country = "US"', 'country = "UK" # HERE')), "alpha-2"),
    "a calling code with a plus": (policy_with(('"1"', '"+1" # HERE')), "without '+'"),
    "quiet hours of no length": (
        policy_with(add=QUIET.replace('end = "08:00"', 'end = "21:00" # HERE')),
        "must not start and end",
    ),
    "quiet hours past midnight": (policy_with(add=QUIET.replace('"21:00"', '"24:00" # HERE')), "local time"),
    "quiet hours as a TOML time": (policy_with(add=QUIET.replace('"21:00"', "21:00:00 # HERE")), "`str`"),
    "an opt-in keyword that is YES": (
        policy_with(add='[screening.extra_keywords]\nclause = "REG-3"\nopt_in = [\n"AGAIN",\n"Yes", # HERE\n]\n'),
        "must not be YES",
    ),
    "an opt-in keyword that is YES elsewhere": (
        policy_with(add='[screening.extra_keywords]\nclause = "REG-3"\nopt_in = [\n"Ja, gerne", # HERE\n]\n'),
        "must not be YES",
    ),
    "a language without keywords": (
        policy_with(('codes = ["fr"]', 'codes = ["fr",\n"xx", # HERE\n]')),
        "those that do: de, en, es, fr",
    ),
    "a keyword without a letter": (
        policy_with(add='[screening.extra_keywords]\nclause = "REG-3"\nopt_out = ["..."] # HERE\n'),
        "1 to 8 words",
    ),
    "no account at all": (policy_with(("any = true", "any = false # HERE")), "no account is served"),
    "a second account of an id": (policy_with(add=ACCOUNT + '[[account]]\nid = "acme" # HERE\n'), "a second account"),
    "an account named platform": (policy_with(add='[[account]]\nid = "platform" # HERE\n'), "not 'platform'"),
    "an account of no possible name": (policy_with(add='[[account]]\nid = "a/b" # HERE\n'), "letters, digits"),
    "an own number not in E.164": (
        policy_with(add=ACCOUNT.replace('["+4930901820", ', '[\n"+4930901820",\n"030 901820", # HERE\n')),
        "E.164",
    ),
    "an allowed country that is none": (policy_with(add=ACCOUNT.replace('"FR"]', '\n"XX"] # HERE')), "alpha-2"),
    "a default region that is none": (
        policy_with(add=ACCOUNT.replace('default_region = "DE"', 'default_region = "EU" # HERE')),
        "'default_region'",
    ),
    "an agreement that ends first": (
        policy_with(add=ACCOUNT.replace("until = 2026-07-01", "until = 2026-01-01 # HERE")),
        "later than 'from'",
    ),
    "an agreement without a date": (policy_with(add=ACCOUNT.replace("2026-01-01", "'soon' # HERE")), "date"),
    "two agreements on the same days": (
        policy_with(add=ACCOUNT + ROLE + "from = 2026-06-30 # HERE\n"),
        "two agreements on content",
    ),
    "an agreement within an open one": (
        policy_with(add=ACCOUNT.replace("until = 2026-07-01\n", "") + ROLE + "from = 2099-01-01 # HERE\n"),
        "two agreements on content",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_policy_is_refused_with_the_line_and_what_is_allowed(case):
    text, said = WRONG[case]
    error = refusal(text)
    here = [number for number, line in enumerate(text.splitlines(), 1) if "# HERE" in line]
    assert [error.where["line"]] == here
    assert error.where["file"] == "p.toml"
    assert said in error.message
    assert "\n" not in str(error)
    assert error.__cause__ is None


def test_a_missing_table_is_named():
    error = refusal(DEFAULT[: DEFAULT.index("[coarsening]")])
    assert "'coarsening' is missing" in error.message
    assert error.where["line"] == 1


@pytest.mark.parametrize(
    "place",
    [
        ('["+4930901820", "+4930901821"]', '["4930901820"]'),
        ('["+4930901820", "+4930901821"]', "[4930901820]"),
        ('["+4930901820", "+4930901821"]', '"+4930901820"'),
        ('id = "acme"', 'id = "+4930901820"'),
        ('acts_as = "processor"', 'acts_as = "+4930901820"'),
        ('acts_as = "processor"', '"+4930901820" = 1'),
        ('acts_as = "processor"', "4930901820 = 1"),
        ('content = "never stored"', 'content = "4930901820"'),
        ('jurisdiction = "EU"', 'jurisdiction = "4930901820"'),
        ('acts_as = "processor"', "4930901820 = 1\n4930901820 = 2"),
        ('acts_as = "processor"', "acts_as = 4930901820x"),
        ('acts_as = "processor"', "acts_as = { 4930901820 = 1, 4930901820 = 2 }"),
        ('acts_as = "processor"', "[x.4930901820]\n[x.4930901820]"),
    ],
)
def test_a_refusal_never_shows_a_number(place):
    assert "901820" not in str(refusal(policy_with(add=ACCOUNT.replace(*place))))


def test_nesting_without_end_is_refused():
    assert "TOML" in str(refusal("a = " + "[" * 100_000))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_policy_is_valid_or_refused_with_a_line_of_it(data):
    lines = policy_with(add=ACCOUNT).splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(lines) - 1))
        lines[where] = data.draw(st.sampled_from(["", lines[where] * 2, lines[where][:-1], "x = [", *lines]))
    try:
        policy = parse_policy("\n".join(lines), "p")
    except PolicyInvalid as error:
        refused = error
    else:
        assert isinstance(policy, Policy)
        return
    assert 1 <= refused.where["line"] <= len(lines)
    assert "901820" not in str(refused)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused_without_another_error(text):
    refusal(text)


# --- lines --------------------------------------------------------------------------------------------------

TRICKY = '''
"a b" = 1                       # a comment with [brackets] = { and "quotes"
c.d.e = """
[not.a.header]
f = 2 """
g = [ 1, # one
  [ 2,
    "]" ], { h = 3, i.j = 4 } ]
k = 2026-01-01 10:00:00
l = \'\'\'a'\'\'\'
[m.n]
o = "\\"#"
[[p]]
q = 1
[p.r]
s = 1
[[p.t]]
u = 1
[[p]]
[[p.t]]
[[p.t]]
u = 2
v = "a""" # b"
'''.replace('"a""" # b"', '"""a"""" # b')


def test_a_locator_finds_every_key():
    tomllib.loads(TRICKY)
    locator = Locator(TRICKY)
    for path, line in {
        ("a b",): 2,
        ("c", "d", "e"): 3,
        ("g",): 6,
        ("g", 0): 6,
        ("g", 1): 7,
        ("g", 1, 1): 8,
        ("g", 2, "h"): 8,
        ("g", 2, "i", "j"): 8,
        ("k",): 9,
        ("l",): 10,
        ("m",): 11,
        ("m", "n", "o"): 12,
        ("p",): 13,
        ("p", 0, "q"): 14,
        ("p", 0, "r"): 15,
        ("p", 0, "r", "s"): 16,
        ("p", 0, "t", 0, "u"): 18,
        ("p", 1): 19,
        ("p", 1, "t", 0): 20,
        ("p", 1, "t", 1, "u"): 22,
        ("p", 1, "t", 1, "v"): 23,
        ("p", 1, "t", 1, "absent"): 21,
        ("absent", 7): 1,
    }.items():
        assert locator.line(path) == line, path


@pytest.mark.parametrize("pack", PACKS)
def test_a_locator_finds_every_clause_of_a_pack(pack):
    lines = PACKS[pack].splitlines()
    locator = Locator(PACKS[pack])
    written = 0
    for path, clause in _cited((), parse_policy(PACKS[pack], pack)):
        written += 1
        assert lines[locator.line((*path, "clause")) - 1] == f'clause = "{clause}"'
    assert written == PACKS[pack].count("\nclause = ")


def test_a_locator_counts_windows_lines():
    text = policy_with(("any = true", "any = 3 # HERE"))
    assert refusal(text).where["line"] == refusal(text.replace("\n", "\r\n")).where["line"]


# --- the command --------------------------------------------------------------------------------------------


def run(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="streamveil.toml")
    parser.add_argument("--log")
    command.add(parser.add_subparsers())
    args = parser.parse_args(["policy", *words])
    return args.run(args)


def test_check_names_file_policy_and_number_of_rules(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(DEFAULT, encoding="utf-8")
    assert run("check", str(path)) == 0
    rules = DEFAULT.count("\nclause = ")
    assert capsys.readouterr().out == f"{path}: valid, policy default/1, {rules} rules\n"


def test_check_of_a_bad_policy_raises_with_the_line(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(policy_with(("any = true", "any = 1")), encoding="utf-8")
    with pytest.raises(PolicyInvalid, match="line="):
        run("check", str(path))
    assert capsys.readouterr().out == ""


def test_show_explains_a_pack(capsys):
    assert run("show", "infobip") == 0
    out = capsys.readouterr().out
    assert "Policy infobip/1" in out
    assert "(INF-4)." in out


def test_show_without_a_name_explains_the_policy_in_force(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("show") == 0
    assert "Policy default/1" in capsys.readouterr().out


def test_show_as_json_is_one_object_a_line(capsys):
    assert run("show", "default", "--json") == 0
    rows = [orjson.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = list(sentences(parse_policy(DEFAULT, "default")))
    assert [(row["text"], row["clause"]) for row in rows] == expected
    assert {row["policy"] for row in rows} == {"default/1"}
