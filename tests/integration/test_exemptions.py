"""Exemptions on real files: what they lift and never lift, who may give them, and every way in which they end."""

import os
import pwd
import time
from datetime import UTC, datetime, timedelta

import orjson
import pytest

from processors.exemption import months_later_s
from processors.keyring import EpochRef
from processors.retention import instant
from streams.exemptions import CHUNK_LINES
from tests.support.commands import SHORT_LEASE, Place, eventually, one_line
from tests.support.records import DEFAULT_POLICY, PERSON, account, found_in, haystack, sms_cdr, sms_request

LISTED, OTHER, FREE = "+14155550123", "+14155550177", "+14155550188"
ME = pwd.getpwuid(os.getuid()).pw_name
NOW = datetime.now(UTC)
GIVEN = (NOW - timedelta(10)).date().isoformat()
ENDS = instant(months_later_s(int(datetime.fromisoformat(GIVEN).replace(tzinfo=UTC).timestamp()), 18))
OLD = (NOW - timedelta(365)).date().isoformat()
QUIET = """
[screening.quiet_hours]
start = "00:00"
end = "23:59"
countries = ["US"]
clause = "REG-3"
"""
_RULE = DEFAULT_POLICY[DEFAULT_POLICY.index('[[processing]]\ndata_class = "contact_list"') :].partition("[content]")[0]


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path, **SHORT_LEASE)
    numbers = tmp_path / "us.txt"
    numbers.write_text("".join(f"{number[2:5]},{number[5:]}\n" for number in (LISTED, OTHER)))
    done = made.call("registry", "load", "us-dnc", numbers, "--as-of", NOW.date().isoformat())
    assert done.status == 0, done.err
    yield made
    made.close()


def grant(place, role, *accounts):
    text = f'[[grant]]\nuser = "{ME}"\nrole = "{role}"\naccounts = {list(accounts)}\n'.replace("'", '"')
    (place.folder / "roles.toml").write_text(text)
    place.configure(roles="roles.toml", **SHORT_LEASE)


def give(place, number=LISTED, *more, kind="purchase", account="acme", given=GIVEN, evidence="ORDER-7", status=0):
    done = place.call("exemption", "add", number, "--account", account, "--kind", kind, "--given", given,
                      "--evidence", evidence, *more)  # fmt: skip
    assert done.status == status, done.err
    return done


def check(place, number=LISTED, account="acme"):
    done = place.call("exemption", "check", number, "--account", account, "--json")
    assert done.status == 0, done.err
    return done.lines


def states(place, *who):
    return {(one["kind"], one["channel"]): one["state"] for one in check(place, *who)}


def screened(place, number=LISTED, *more, channel="sms", account="acme"):
    done = place.call("screen", number, "--account", account, "--channel", channel, "--purpose", "marketing", *more)
    assert done.status == 0, done.err
    (answer,) = done.lines
    return answer["verdict"], answer["reason"], answer["exemption"]


def actions(place, *names):
    return [one for one in place.values("audit") if one["action"] in names]


REFUSED, EXEMPT = ("refused", "on_registry", None), ("cleared", None, "purchase")


# --- what it lifts, and what it never lifts ---------------------------------------------------------------------


def test_an_exemption_lifts_a_registry_for_its_account_number_and_channel_only(place):
    give(place, LISTED, "--channel", "sms")
    assert screened(place) == EXEMPT
    assert screened(place, channel="voice") == REFUSED
    assert screened(place, account="other") == REFUSED
    assert screened(place, OTHER) == REFUSED


def test_without_a_channel_it_is_for_both(place):
    give(place)
    assert screened(place) == screened(place, channel="voice") == EXEMPT


def test_an_exemption_ends_at_its_instant(place):
    give(place)
    assert screened(place, LISTED, "--at", ENDS)[1:] == ("registry_too_old", None)
    last = instant(int(datetime.fromisoformat(ENDS).timestamp()) - 1)
    assert screened(place, LISTED, "--at", last) == EXEMPT


def test_a_consent_lifts_quiet_hours(place):
    place.policy(DEFAULT_POLICY + QUIET)
    at = ("--at", NOW.replace(hour=18, minute=0).isoformat(timespec="seconds"))
    give(place, OTHER)
    assert screened(place, FREE, *at)[1] == "quiet_hours"
    give(place, FREE, kind="consent")
    assert screened(place, FREE, *at) == ("cleared", None, "consent")


def test_an_opt_out_beats_an_exemption(place):
    give(place)
    assert place.call("optout", "add", LISTED, "--account", "acme").status == 0
    verdict, reason, _ = screened(place)
    assert (verdict, reason) == ("refused", "opted_out")


def test_a_worker_takes_up_what_is_given_and_withdrawn_without_a_restart(place):
    ask = {"purpose": "marketing", "recipient": LISTED}
    worker = place.start("run", "--workers", "1")
    try:

        def answered(record_id):
            place.publish(sms_request(record_id=record_id, occurred_at=instant(int(time.time())), **ask))
            return eventually(lambda: place.verdicts().get(record_id), record_id)

        assert answered("a-1") == ("refused", "on_registry")
        give(place)
        assert answered("a-2") == ("cleared", None)
        assert place.call("exemption", "remove", LISTED, "--account", "acme").status == 0
        assert answered("a-3") == ("refused", "on_registry")
    finally:
        worker.terminate()
        place.ended(worker)
    (second,) = [one for one in place.values("verdicts") if one["record_id"] == "a-2"]
    assert second["exemption"] == "purchase"


def test_a_request_that_an_exemption_cleared_says_so_and_is_not_sent_once_it_is_withdrawn(place):
    # Given a request to a listed number that an exemption cleared, and one to a number that is not listed
    give(place)
    ask = {"purpose": "marketing", "occurred_at": instant(int(time.time()))}
    place.publish(
        sms_request(record_id="a", recipient=LISTED, **ask), sms_request(record_id="b", recipient=FREE, **ask)
    )
    place.work()
    assert {one["record_id"]: one.get("exemption") for one in place.values("cleared")} == {"a": "purchase", "b": None}

    async def send(deployment):
        log = deployment.log
        found = [one for p in range(log.partitions) for one in await log.read("cleared", p, 0, 10)]
        opened = await deployment.revealer().open_batch(found)
        return {orjson.loads(one.value)["record_id"]: said.reason for one, said in zip(found, opened, strict=True)}

    assert place.within(send) == {"a": None, "b": None}
    # When it is withdrawn before they are sent / Then the first is not
    assert place.call("exemption", "remove", LISTED, "--account", "acme").status == 0
    assert place.within(send) == {"a": "exemption_ended", "b": None}
    (second,) = [one for one in place.values("verdicts") if one["second"]]
    assert (second["record_id"], second["reason"], second["clause"]) == ("a", "exemption_ended", "CAL-3")


# --- giving and withdrawing ---------------------------------------------------------------------------------------


def test_check_says_what_is_known(place):
    give(place, LISTED, "--channel", "sms")
    assert check(place) == [{
        "kind": "purchase", "channel": "sms", "state": "in force", "expires": ENDS,
        "given": f"{GIVEN}T00:00:00Z", "evidence": "ORDER-7", "reason": None,
    }]  # fmt: skip
    assert check(place, OTHER) == check(place, LISTED, "other") == []


def test_a_withdrawal_ends_what_is_in_force_and_keeps_saying_what_it_was(place):
    give(place)
    give(place, LISTED, "--channel", "sms", kind="consent", evidence="FORM-1")
    removed = place.call("exemption", "remove", LISTED, "--account", "acme", "--kind", "purchase", "--channel", "sms",
                         "--reason", "T-9")  # fmt: skip
    assert removed.out == "withdrawn: 1 entries\n"
    assert states(place) == {
        ("consent", "sms"): "in force", ("purchase", "sms"): "withdrawn", ("purchase", "voice"): "in force"
    }  # fmt: skip
    (gone,) = [one for one in check(place) if one["state"] == "withdrawn"]
    assert (gone["evidence"], gone["reason"], gone["expires"]) == ("ORDER-7", "T-9", ENDS)
    assert place.call("exemption", "remove", LISTED, "--account", "acme").out == "withdrawn: 2 entries\n"
    again = place.call("exemption", "remove", LISTED, "--account", "acme")
    assert (again.status, again.out) == (0, "no such exemption is in force; nothing was written\n")
    assert screened(place) == REFUSED


def test_what_was_withdrawn_can_be_given_again(place):
    give(place)
    place.call("exemption", "remove", LISTED, "--account", "acme")
    give(place, evidence="ORDER-8")
    assert set(states(place).values()) == {"in force"}
    assert screened(place) == EXEMPT


def test_what_ends_sooner_never_takes_the_place_of_what_lasts_longer(place):
    give(place)
    before = place.ends("exemptions")
    sooner = give(place, LISTED, given=(NOW - timedelta(40)).date().isoformat(), evidence="ORDER-1")
    assert sooner.out == "one that lasts as long stands; nothing was written\n"
    assert place.ends("exemptions") == before
    assert {one["evidence"] for one in check(place)} == {"ORDER-7"}
    give(place, LISTED, given=(NOW - timedelta(1)).date().isoformat(), evidence="ORDER-9")
    assert {one["evidence"] for one in check(place)} == {"ORDER-9"}


@pytest.mark.parametrize(
    ("changes", "more", "word"),
    [
        ({"number": "12345"}, (), "E.164"),
        ({"number": "ann@example.org"}, (), "E.164"),
        ({"account": "no such/account"}, (), "account"),
        ({"evidence": "the form of Ann"}, (), "evidence"),
        ({"evidence": LISTED[1:]}, (), "evidence"),
        ({"evidence": f"X{LISTED[1:]}"}, (), "evidence"),
        ({"evidence": f"CALL-{LISTED[2:5]}-{LISTED[5:]}"}, (), "evidence"),
        ({"given": "tomorrow"}, (), "given"),
        ({"given": "0001-01-01T00:00:00+23:59"}, (), "given"),  # of the year 0, in UTC
        ({"given": (NOW + timedelta(2)).date().isoformat()}, (), "to come"),
        ({"given": "2020-01-01"}, (), "it ended on 2021-07-01T00:00:00Z"),
        ({"kind": "inquiry", "given": OLD}, (), "it ended on"),
        ({"number": PERSON}, (), "no terms"),
        ({}, ("--until", "2060-01-01"), f"this purchase lasts until {ENDS} at most"),
        ({"kind": "consent"}, ("--until", "2060-01-01"), "60 months after it was given"),
        ({"kind": "consent"}, ("--until", GIVEN), "it ended on"),
        ({}, ("--until", "soon"), "until"),
        ({"kind": "consent"}, ("--until", "9999-12-31T23:59:59-23:59"), "until"),
    ],
)
def test_what_cannot_be_is_refused_with_a_line_that_says_why_and_no_number(place, changes, more, word):
    done = give(place, changes.pop("number", LISTED), *more, **changes, status=1)
    assert word in one_line(done)
    assert not found_in(haystack(done.err.encode()), [LISTED, PERSON])
    assert not place.log_path.exists() or place.ends("exemptions") == 0


def test_a_number_comes_from_standard_input_too(place):
    words = ("--account", "acme", "--kind", "consent", "--given", GIVEN, "--evidence", "F-1")
    assert place.call("exemption", "add", "-", *words, data=LISTED.encode()).status == 0
    assert len(check(place)) == 2


def test_a_number_is_read_as_the_accounts_are(place):
    place.policy(DEFAULT_POLICY + account("acme", 'default_region = "US"'))
    give(place, "(415) 555-0123")
    assert len(check(place, LISTED)) == 2


def test_a_policy_without_the_rule_writes_none_and_goes_on_with_all_else(place):
    place.policy(DEFAULT_POLICY.replace(_RULE, ""))
    assert "no processing rule for contact_list; add one" in one_line(give(place, status=1))
    place.publish(sms_request(purpose="marketing", recipient=LISTED))
    assert place.work() == 1
    assert place.call("retention", "calendar").status == 0
    assert place.call("retention", "run").status == 0


def test_a_policy_that_makes_the_platform_its_controller_writes_none(place):
    place.policy(DEFAULT_POLICY.replace(_RULE, _RULE.replace('"processor"', '"controller"')))
    assert "an account's own data" in one_line(give(place, status=1))


# --- who may, and what is told ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "accounts", "allowed"),
    [("operator", ["*"], True), ("operator", ["acme"], True), ("dpo", ["*"], True), ("operator", ["other"], False),
     ("support", ["*"], False), ("egress", ["*"], False)],
)  # fmt: skip
def test_an_operator_of_the_account_and_the_officer_may_and_nobody_else(place, role, accounts, allowed):
    give(place, OTHER)
    grant(place, role, *accounts)
    status = 0 if allowed else 1
    before = place.ends("exemptions")
    done = give(place, status=status)
    removed = place.call("exemption", "remove", OTHER, "--account", "acme")
    checked = place.call("exemption", "check", OTHER, "--account", "acme")
    assert (removed.status, checked.status) == (status, status)
    assert place.ends("exemptions") == before + (4 if allowed else 0)
    if not allowed:
        assert all(
            "operator of the account or the privacy officer" in one_line(one) for one in (done, removed, checked)
        )


def test_the_audit_says_how_many_of_which_account_and_kind_and_nothing_of_the_person(place):
    give(place)
    place.call("exemption", "remove", LISTED, "--account", "acme", "--channel", "voice", "--reason", "T-2")
    made, lifted = actions(place, "exempt", "unexempt")
    assert (made["count"], made["references"], made["role"]) == (2, 1, "dpo")
    assert made["entries"] == [
        {"account": "acme", "kind": "purchase", "channel": channel, "count": 1} for channel in ("sms", "voice")
    ]
    assert (lifted["count"], lifted["reason"]) == (1, "T-2")
    keys = [stored.key for stored in place.stored("exemptions")]
    tokens = {key.split(b"|")[0].split(b".")[1] for key in keys}
    entries = b"".join(orjson.dumps(one) for one in (made, lifted))
    assert not any(token in entries for token in tokens)
    assert not found_in(haystack(entries), [LISTED])


def test_no_file_and_no_tail_shows_the_number_or_the_token(place):
    give(place)
    place.call("exemption", "remove", LISTED, "--account", "acme", "--channel", "sms")
    token = place.stored("exemptions")[0].key.split(b"|")[0].split(b".")[1].decode()
    shown = orjson.dumps(place.tail("exemptions"))
    assert token.encode() not in shown
    assert not found_in(haystack(shown, place.log_path.read_bytes()), [LISTED])
    assert {tuple(one.items()) for one in place.opened("exemptions")} == {(("number", LISTED),), ()}


# --- files --------------------------------------------------------------------------------------------------------


def load(place, *lines, status=0):
    path = place.aside / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    done = place.call("exemption", "import", path, "--json")
    assert done.status == status, done.err
    return done


HEADER = "number,account,kind,given,evidence,until,channel"


def test_a_file_is_written_and_what_is_not_understood_is_told_by_line_and_column(place):
    done = load(
        place,
        HEADER,
        f"{LISTED},acme,purchase,{GIVEN},ORDER-1,,",
        "",
        f"{OTHER},acme,consent,{GIVEN},FORM-1,,sms",
        f"{OTHER},acme,gift,{GIVEN},FORM-1,,sms",
        f"{OTHER},acme,consent,{GIVEN}",
        f"nobody,acme,consent,{GIVEN},FORM-1,,",
        f"{OTHER},,consent,{GIVEN},FORM-1,,",
        f"{OTHER},acme,consent,{GIVEN},FORM-1,2060-01-01,",
        f"{PERSON},acme,inquiry,{GIVEN},FORM-1,,",
        f'{OTHER},acme,"consent,{GIVEN},FORM-1,,',
        f"{OTHER},acme,consent,,FORM-1,,",
        f"{OTHER},acme,consent,{GIVEN},,,",
        f"{OTHER},acme,consent,{GIVEN},FORM-1,,fax",
    )
    assert done.lines == [{"lines": 12, "written": 3, "bad": 10}]
    told = [line.removesuffix(" not understood; skipped") for line in done.err.splitlines()]
    assert told == [
        "line 5: kind", "line 6: line", "line 7: number", "line 8: account", "line 9: until", "line 10: kind",
        "line 11: line", "line 12: given", "line 13: evidence", "line 14: channel",
    ]  # fmt: skip
    assert not found_in(haystack(done.err.encode()), [OTHER, PERSON])
    assert screened(place) == EXEMPT
    assert screened(place, OTHER) == ("cleared", None, "consent")
    assert screened(place, OTHER, channel="voice") == REFUSED


def test_columns_may_be_left_out_and_come_in_any_order(place):
    assert load(place, "\ufeffEvidence,given,kind,account,number", f"ORDER-1,{GIVEN},purchase,acme,{LISTED}").lines == [
        {"lines": 1, "written": 2, "bad": 0}
    ]


@pytest.mark.parametrize("header", ["", "number,account,kind,given", f"{HEADER},more", f"{HEADER},kind", LISTED])
def test_a_file_without_its_header_writes_nothing(place, header):
    done = load(place, header, f"{LISTED},acme,purchase,{GIVEN},ORDER-1,,", status=1)
    assert "the first line must name the columns: number, account, kind, given, evidence" in one_line(done)
    assert not found_in(haystack(done.err.encode()), [LISTED])


def test_loading_a_file_again_writes_nothing_and_the_order_of_lines_does_not_matter(place):
    newer = (NOW - timedelta(1)).date().isoformat()
    lines = [HEADER, *(f"{LISTED},acme,purchase,{given},ORDER-{given},,sms" for given in (newer, GIVEN))]
    assert load(place, *lines).lines[0]["written"] == 1
    assert check(place)[0]["evidence"] == f"ORDER-{newer}"
    assert load(place, *lines).lines[0]["written"] == 0
    assert load(place, HEADER, *reversed(lines[1:])).lines[0]["written"] == 0
    assert check(place)[0]["evidence"] == f"ORDER-{newer}"


def test_many_lines_of_several_accounts_and_months_are_all_written(place):
    count = CHUNK_LINES + 10
    lines = [
        f"+1415{2_000_000 + one},acct-{one % 3},{'purchase' if one % 2 else 'consent'},{GIVEN},ORDER-{one},,voice"
        for one in range(count)
    ]
    assert load(place, HEADER, *lines).lines == [{"lines": count, "written": count, "bad": 0}]
    assert states(place, f"+1415{2_000_000 + count - 1}", f"acct-{(count - 1) % 3}") == {
        ("purchase", "voice"): "in force"
    }
    owners = {key.split(b"|")[1] for key in (stored.key for stored in place.stored("exemptions"))}
    assert owners == {b"account:acct-0", b"account:acct-1", b"account:acct-2"}


# --- every way in which they end ----------------------------------------------------------------------------------


def test_a_rotation_of_the_token_key_takes_along_what_is_in_force(place):
    give(place)
    give(place, OTHER, kind="consent")
    place.call("exemption", "remove", OTHER, "--account", "acme", "--channel", "sms")
    rotated = place.call("keys", "rotate", "token", "--json")
    assert rotated.status == 0, rotated.err
    token = rotated.lines[0]["token"]
    assert (token["exemptions"], token["dropped"]) == (3, 0)
    assert states(place) == {("purchase", "sms"): "in force", ("purchase", "voice"): "in force"}
    assert states(place, OTHER) == {("consent", "voice"): "in force"}
    assert {one["evidence"] for one in check(place)} == {"ORDER-7"}
    assert screened(place) == EXEMPT
    assert screened(place, OTHER) == REFUSED
    # and once more, with what was withdrawn since
    place.call("exemption", "remove", LISTED, "--account", "acme", "--channel", "sms")
    assert place.call("keys", "rotate", "token", "--json").lines[0]["token"]["exemptions"] == 2
    assert states(place) == {("purchase", "voice"): "in force"}


def test_what_was_withdrawn_while_a_rotation_was_under_way_does_not_come_back(place):
    # Given a rotation that was killed after its first copy, and a withdrawal since
    give(place)

    async def killed(deployment):
        from streams.officer.exempted import ExemptionCopy

        store = deployment.store
        copy = ExemptionCopy(deployment, store.token_keys().current.version, store.add_token_key(), reason="T-1")
        return await copy.run()

    assert place.within(killed).written == 2
    place.call("exemption", "remove", LISTED, "--account", "acme", "--channel", "sms")
    # When it is done again / Then what was copied is not copied twice, and what was withdrawn is withdrawn
    assert place.call("keys", "rotate", "token", "--json").lines[0]["token"]["exemptions"] == 0
    assert states(place) == {("purchase", "sms"): "withdrawn", ("purchase", "voice"): "in force"}
    assert screened(place) == REFUSED
    assert screened(place, channel="voice") == EXEMPT


def test_an_exemption_that_does_not_open_is_left_behind_by_a_rotation_and_counted(place):
    give(place)
    give(place, OTHER)

    async def lose(deployment):
        epochs = [key for key in deployment.store.status(int(time.time())) if key.domain == "exemption"]
        deployment.store.destroy_epoch(EpochRef(epochs[0].domain, epochs[0].owner, epochs[0].epoch))

    place.within(lose)
    done = place.call("keys", "rotate", "token")
    assert "0 exemptions written anew; 4 that do not open any more are in force no longer" in done.out
    assert check(place) == []
    assert screened(place) == REFUSED


def test_a_backup_of_before_a_rotation_leaves_behind_what_it_cannot_open(place):
    give(place)
    files = {path: path.read_bytes() for path in place.data.glob("keys.db*")}
    assert place.call("keys", "rotate", "token").status == 0
    assert screened(place) == EXEMPT
    for path in place.data.glob("keys.db*"):
        path.unlink()
    for path, content in files.items():
        path.write_bytes(content)
        path.chmod(0o600)
    done = place.call("keys", "reconcile")
    assert done.status == 0, done.err
    assert check(place) == []
    assert screened(place) == REFUSED
    give(place)
    assert screened(place) == EXEMPT


def test_an_accounts_erasure_withdraws_its_exemptions_of_the_person_and_nothing_of_others(place):
    give(place)
    give(place, OTHER)
    give(place, account="other")
    erased = place.call("subject", "erase", LISTED, "--account", "acme", "--reason", "CASE-1")
    assert erased.status == 0, erased.err
    assert set(states(place).values()) == {"withdrawn"}
    assert screened(place) == REFUSED
    assert screened(place, OTHER) == screened(place, account="other") == EXEMPT
    reveals = [line["reveal"] for line in place.tail("exemptions", "--reveal", "--reason", "T-1")]
    assert [one["state"] for one in reveals].count("destroyed") == 2
    assert LISTED not in str([one["fields"] for one in reveals if one["state"] == "destroyed"])


def test_the_platforms_erasure_leaves_an_accounts_exemption(place):
    give(place)
    assert place.call("subject", "erase", LISTED, "--reason", "CASE-1").status == 0
    assert screened(place) == EXEMPT


def test_an_account_that_leaves_has_none_any_more_and_can_have_others_when_it_comes_back(place):
    give(place)
    give(place, account="other")
    gone = instant(int(time.time()) - 30 * 86_400)
    done = place.call("account", "offboard", "acme", "--terminated", gone)
    assert done.status == 0, done.err
    assert set(states(place).values()) == {"withdrawn"}
    assert screened(place) == REFUSED
    assert screened(place, account="other") == EXEMPT
    opened = [line["reveal"]["state"] for line in place.tail("exemptions", "--reveal", "--reason", "T-1")]
    assert sorted(opened) == ["destroyed", "destroyed", "revealed", "revealed", "revealed", "revealed"]
    assert place.call("account", "offboard", "acme", "--cancel").status == 0
    give(place)
    assert screened(place) == EXEMPT


def test_access_shows_an_account_its_own_and_the_platform_who_has_some(place):
    give(place)
    give(place, account="other")
    place.publish(sms_cdr(recipient=LISTED))
    place.work()
    done = place.call("subject", "access", LISTED, "--account", "acme", "--reason", "CASE-1", "--json")
    assert done.status == 0, done.err
    found = [one for one in done.lines if one["item"] == "exemption"]
    assert [(one["account"], one["kind"], one["channel"], one["in_force"], one["evidence"]) for one in found] == [
        ("acme", "purchase", channel, True, "ORDER-7") for channel in ("sms", "voice")
    ]
    assert done.lines[-1]["exemptions"] == 2
    whole = place.call("subject", "access", LISTED, "--reason", "CASE-1", "--json")
    counted = {one["account"]: one["records"] for one in whole.lines if one["item"] == "account"}
    assert counted["acme"]["exemptions"] == counted["other"]["exemptions"] == 2
    assert not [one for one in whole.lines if one["item"] == "exemption"]
    assert "Exemptions".upper() in place.call("subject", "access", LISTED, "--account", "acme", "--reason", "C-1").out


def test_the_clock_destroys_what_has_ended_and_cuts_it_off(place):
    give(place, LISTED, kind="inquiry", given=(NOW - timedelta(1)).date().isoformat())
    keys = [one for one in place.call("keys", "status", "--json").lines if one.get("domain") == "exemption"]
    assert [(one["owner"], one["state"]) for one in keys] == [("acme", "alive")]
    ahead = (NOW + timedelta(150)).isoformat(timespec="seconds")
    done = place.call("retention", "run", "--now", ahead, "--yes", "--json")
    assert done.status == 0, done.err
    cuts = {one["stream"]: one["records"] for one in done.lines[0]["cut"]}
    assert cuts["exemptions"] == 2
    assert place.stored("exemptions") == []
    assert check(place) == []


def test_what_still_has_its_month_is_not_cut(place):
    give(place)
    before = place.stored("exemptions")
    assert place.call("retention", "run").status == 0
    assert place.stored("exemptions") == before
