"""The table of streams, what it means on Kafka, and how that is told apart from what is there."""

import re
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from processors.exemption import months_later_s
from processors.plan import Planner
from schemas.catalog import BOOKMARKED, CATALOG, CUT, CUTTER, INPUTS, ROLES, TRAFFIC, WATCHER, Domain
from schemas.errors import InputInvalid
from schemas.policy import MAX_EXEMPT_MONTHS, parse_policy
from streams.config import Kafka, packs_available
from streams.log.provision import (
    CLEANING_MS,
    DAY_MS,
    FOREVER,
    HOUR_MS,
    Acl,
    Action,
    Difference,
    Found,
    FoundTopic,
    differences,
    plan,
    retention_ms,
    segment_ms,
)

KAFKA = Kafka(("127.0.0.1:9092",), "admin", Path("admin.password"), None, "eu.", 3, 2, 20, 10_000)
PAGE = (Path(__file__).parents[2] / "docs" / "kafka.md").read_text(encoding="utf-8")
ROWS = list(CATALOG.values())
DEFAULT = packs_available()["default"]
SEALED = [row for row in ROWS if row.domain is not None]


def policy_of(text=DEFAULT, **replaced):
    for old, new in replaced.values():
        assert old in text
        text = text.replace(old, new)
    return parse_policy(text, "test")


def account(name, **settings):
    lines = "".join(f"{key} = {value!r}\n" for key, value in settings.items())
    return f'\n[[account]]\nid = "{name}"\n{lines}'


POLICIES = {
    "default": policy_of(),
    "infobip": policy_of(packs_available()["infobip"]),
    "auckland": policy_of(zone=('timezone = "UTC"', 'timezone = "Pacific/Auckland"')),
    "honolulu, by day, by year": policy_of(
        zone=('timezone = "UTC"', 'timezone = "Pacific/Honolulu"'),
        coarse=('time = "hour"', 'time = "day"'),
        pii=('keep = "12 months"\nafter = "end of month"', 'keep = "13 months"\nafter = "end of year"'),
    ),
    "accounts": policy_of(
        DEFAULT + account("acme", content="400 days") + account("beta", content="never") + account("gamma")
    ),
}
EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)


def wanted(policy=POLICIES["default"], kafka=KAFKA, partitions=4):
    return plan(CATALOG, policy, kafka, partitions)


def as_wanted(plan_):
    """Return brokers that are just as wanted."""
    topics = {
        name: FoundTopic(topic.partitions, frozenset({topic.replicas}), dict(topic.settings), frozenset(topic.settings))
        for name, topic in plan_.topics.items()
    }
    return Found(topics, plan_.acls, frozenset(plan_.users.values()))


def with_topic(found, name, **changes):
    return found._replace(topics={**found.topics, name: found.topics[name]._replace(**changes)})


def with_setting(found, name, **changes):
    settings = {key.replace("_", "."): value for key, value in changes.items()}
    topic = found.topics[name]
    return with_topic(found, name, settings={**topic.settings, **settings}, own=topic.own | set(settings))


# --- the table ----------------------------------------------------------------------------------------------


def test_the_roles_are_those_of_the_table_and_the_one_who_watches():
    used = set(chain.from_iterable((*row.writers, *row.readers, *row.followers) for row in ROWS))
    assert used | {WATCHER} == set(ROLES)
    assert WATCHER not in used
    assert len(set(ROLES)) == len(ROLES)


def test_whoever_may_open_what_is_sealed_can_write_that_down_first():
    for row in SEALED:
        assert set(row.readers) <= set(CATALOG["audit"].writers), row.name


def test_nobody_but_workers_reads_what_is_clear():
    for name in INPUTS:
        assert (CATALOG[name].readers, CATALOG[name].followers) == (("worker",), ())


def test_nobody_but_the_privacy_officer_reads_both_the_anonymous_record_and_its_twin():
    both = set(CATALOG["cdr.anonymous"].readers) & set(CATALOG["cdr.pii"].readers)
    assert both == {"dpo"}


def test_whoever_cuts_reads_what_it_cuts_and_nothing_that_is_kept_apart_from_it():
    follows = {row.name for row in ROWS if CUTTER in row.followers}
    assert set(CUT) < follows
    assert not follows & {"cdr.anonymous", "billing.deltas", "verdicts", *INPUTS}
    assert not {"audit", "suppressions"} & set(CUT)


def test_billing_reads_nothing_sealed():
    assert not [row.name for row in SEALED if "billing" in (*row.readers, *row.followers)]


def test_whoever_keeps_bookmarks_may_read_the_stream_that_has_them_as_offsets():
    publishers = set(chain.from_iterable(CATALOG[name].writers for name in INPUTS))
    row = CATALOG[BOOKMARKED]
    assert publishers <= {*row.readers, *row.followers}
    assert row.domain is None


# --- how long -----------------------------------------------------------------------------------------------


def instants():
    """Return Unix seconds all over four years, at all times of the day."""
    return range(1_704_067_200, 1_704_067_200 + 4 * 366 * 86_400, 37 * 3600 + 61)


@cache
def longest_ms(name):
    """Return per output stream the longest time from timestamp to deadline, as the pipeline stamps and tags records."""
    planner, found = Planner(POLICIES[name]), {}

    def note(stream, stamp_ms, deadline_s):
        life_ms = None if deadline_s is None else deadline_s * 1000 - stamp_ms
        found[stream] = max(found.get(stream, 0), life_ms) if life_ms is not None else None

    for now_s in instants():
        for account_id in ("acme", "other"):
            made = planner.plan(account_id, now_s)
            note("content", made.moment.day_ms, made.content_expires_s)
            note("review", made.moment.day_ms, made.review_expires_s)
            note("cdr.pii", made.moment.day_ms, made.pii.deadline_s)
            note("cdr.anonymous", made.moment.coarse_ms, made.anonymous.deadline_s)
        ends_s = months_later_s(now_s, MAX_EXEMPT_MONTHS)
        note("exemptions", now_s * 1000, planner.until("exemptions", "acme", now_s, ends_s).deadline_s)
        for stream in ("verdicts", "cleared", "billing.deltas", "suppressions", "quarantine", "audit"):
            note(stream, now_s * 1000, planner.output(stream, "", now_s).deadline_s)
        note("held", now_s * 1000, planner.calendar.created_deadline_s("held", now_s))
    return found


@EVERY_POLICY
@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in INPUTS], ids=lambda row: row.name)
def test_no_broker_deletes_a_record_before_its_deadline_or_long_after(name, row):
    policy = POLICIES[name]
    kept_ms, longest = retention_ms(row, policy), longest_ms(name)[row.name]
    if longest is None:
        assert kept_ms == FOREVER
    else:
        assert longest <= kept_ms <= longest + 3 * DAY_MS
        assert segment_ms(row, policy) <= max(kept_ms // 24, HOUR_MS)


@EVERY_POLICY
@pytest.mark.parametrize("stream", INPUTS)
def test_clear_traffic_is_gone_after_its_hours_segment_and_cleaning_included(name, stream):
    row, policy = CATALOG[stream], POLICIES[name]
    kept_ms, segment = retention_ms(row, policy), segment_ms(row, policy)
    assert kept_ms + segment + CLEANING_MS == row.max_hours * HOUR_MS == DAY_MS
    assert segment == HOUR_MS
    # and what nobody has read for six hours, which alerts, stays for long
    assert kept_ms > 22 * HOUR_MS


def test_the_policy_in_force_decides_how_long_content_stays():
    content = CATALOG["content"]
    assert retention_ms(content, POLICIES["default"]) == 31 * DAY_MS
    assert retention_ms(content, POLICIES["accounts"]) == 401 * DAY_MS
    served = policy_of(DEFAULT.replace("any = true", "any = false") + account("acme", content="2 days"))
    assert retention_ms(content, served) == 3 * DAY_MS
    never = policy_of(DEFAULT.replace("any = true", "any = false") + account("acme", content="never"))
    assert retention_ms(content, never) == DAY_MS


def test_a_personal_record_stays_for_thirteen_months_and_slack_and_an_anonymous_one_for_eleven_years():
    days = {name: retention_ms(CATALOG[name], POLICIES["default"]) // DAY_MS for name in ("cdr.pii", "cdr.anonymous")}
    assert days == {"cdr.pii": 31 + 366 + 2, "cdr.anonymous": 366 + 3653 + 2 - 1}


# --- topics -------------------------------------------------------------------------------------------------


def test_every_stream_is_a_topic_of_equally_many_partitions():
    topics = wanted(partitions=6).topics
    assert set(topics) == {f"eu.{name}" for name in CATALOG}
    assert {(topic.partitions, topic.replicas) for topic in topics.values()} == {(6, 3)}
    for topic in topics.values():
        assert topic.settings["min.insync.replicas"] == "2"
        assert topic.settings["unclean.leader.election.enable"] == "false"
        assert topic.settings["compression.type"] == "producer"
        assert topic.settings["retention.bytes"] == "-1"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_inputs_are_stamped_on_arrival_and_outputs_keep_their_coarse_times(row):
    settings = wanted().topics[f"eu.{row.name}"].settings
    if row.name in INPUTS:
        assert settings["message.timestamp.type"] == "LogAppendTime"
        assert int(settings["max.message.bytes"]) > 4 * 2**20
    else:
        assert settings["message.timestamp.type"] == "CreateTime"
        assert int(settings["message.timestamp.after.max.ms"]) >= 72 * HOUR_MS
        assert int(settings["message.timestamp.before.max.ms"]) == 2**63 - 1
        assert int(settings["max.message.bytes"]) == 8 * 2**20


def test_opt_outs_alone_are_compacted_and_never_deleted():
    for row in ROWS:
        settings = wanted().topics[f"eu.{row.name}"].settings
        assert settings["cleanup.policy"] == ("compact" if row.domain is Domain.SUPPRESSION else "delete")
    settings = wanted().topics["eu.suppressions"].settings
    assert settings["retention.ms"] == "-1"
    assert int(settings["max.compaction.lag.ms"]) == int(settings["segment.ms"]) == DAY_MS


@pytest.mark.parametrize("prefix", ["billing.", "eu.workers.", "eu-append.", "publish.eu."])
def test_a_prefix_that_rights_of_another_deployment_would_match_is_refused(prefix):
    with pytest.raises(InputInvalid, match="prefix"):
        wanted(kafka=KAFKA._replace(prefix=prefix))


@pytest.mark.parametrize("prefix", ["", "billing-", "eu.", "accounts.", "eu-1.north."])
def test_other_prefixes_are_taken(prefix):
    assert f"{prefix}traffic" in wanted(kafka=KAFKA._replace(prefix=prefix)).topics


# --- users and rights ---------------------------------------------------------------------------------------


def test_each_role_is_a_user_with_the_prefix_of_the_deployment():
    assert wanted().users == {role: f"eu.{role}" for role in ROLES}
    assert {acl.principal for acl in wanted().acls} == {f"User:eu.{role}" for role in ROLES}


def test_without_security_there_are_topics_only():
    plain = wanted(kafka=KAFKA._replace(username=None, password_path=None))
    assert (plain.acls, plain.users) == (frozenset(), {})
    assert len(plain.topics) == len(CATALOG)


def test_rights_on_streams_are_those_of_the_table():
    for row in ROWS:
        rights = {
            (acl.principal.removeprefix("User:eu."), acl.operation)
            for acl in wanted().acls
            if (acl.resource, acl.name) == ("TOPIC", f"eu.{row.name}")
        }
        for role in ROLES:
            assert ((role, "READ") in rights) == (role in (*row.readers, *row.followers))
            assert ((role, "WRITE") in rights) == (role in row.writers)
        assert {role for role, kind in rights if kind == "DELETE"} == ({CUTTER} if row.name in CUT else set())
        others = {right for right in rights if right[1] not in ("READ", "WRITE", "DELETE")}
        assert others <= {(role, kind) for role in ("worker", WATCHER) for kind in ("DESCRIBE", "DESCRIBE_CONFIGS")}


def test_every_right_bears_the_prefix_and_nobody_administers():
    for acl in wanted().acls:
        assert acl.name.startswith("eu.")
        assert acl.resource in ("TOPIC", "GROUP", "TRANSACTIONAL_ID")
        assert acl.operation in ("READ", "WRITE", "DESCRIBE", "DESCRIBE_CONFIGS", "DELETE")


def test_who_watches_reads_and_writes_nothing():
    mine = {acl.operation for acl in wanted().acls if acl.principal == f"User:eu.{WATCHER}"}
    assert mine == {"DESCRIBE", "DESCRIBE_CONFIGS"}


def test_no_right_of_one_deployment_matches_anything_of_another():
    one, other = (wanted(kafka=KAFKA._replace(prefix=prefix)).acls for prefix in ("", "eu."))
    for acl in one:
        assert not [right for right in other if acl.resource == right.resource and _covers(acl, right.name)]


def _covers(acl, name):
    return name == acl.name or (acl.pattern == "PREFIXED" and name.startswith(acl.name))


# --- differences --------------------------------------------------------------------------------------------


def test_brokers_that_are_as_wanted_do_not_differ():
    assert differences(wanted(), as_wanted(wanted())) == []


def test_on_empty_brokers_everything_is_missing():
    found = differences(wanted(), Found({}, frozenset(), frozenset()))
    assert {one.action for one in found} == {Action.CREATE}
    kinds = [one.kind for one in found]
    assert {kind: kinds.count(kind) for kind in ("topic", "acl", "user")} == {
        "topic": len(CATALOG),
        "acl": len(wanted().acls),
        "user": len(ROLES),
    }


def test_a_setting_that_is_of_the_broker_only_is_set_on_the_topic():
    found = as_wanted(wanted())
    own = found.topics["eu.audit"].own - {"compression.type"}
    (one,) = differences(wanted(), with_topic(found, "eu.audit", own=own))
    assert one == Difference(Action.ALTER, "setting", "eu.audit", "compression.type", "producer by default", "producer")


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({"retention_ms": "1000"}, Action.ALTER),
        ({"retention_ms": str(10**15)}, Action.REFUSE),
        ({"retention_ms": "-1"}, Action.REFUSE),
        ({"segment_ms": "1000"}, Action.ALTER),
        ({"retention_bytes": "5"}, Action.ALTER),
        ({"cleanup_policy": "compact"}, Action.REFUSE),
        ({"follower_replication_throttled_replicas": "*"}, Action.LEAVE),
    ],
)
def test_what_would_let_data_die_early_is_refused_and_what_is_not_ours_is_left(changes, action):
    (one,) = differences(wanted(), with_setting(as_wanted(wanted()), "eu.cdr.pii", **changes))
    assert (one.action, one.name) == (action, "eu.cdr.pii")


def test_retention_that_is_off_is_not_turned_on_for_opt_outs():
    # Given a topic of opt-outs that somebody lets die / Then apply makes it live, which takes nothing away
    found = with_setting(as_wanted(wanted()), "eu.suppressions", cleanup_policy="delete", retention_ms="1000")
    assert {one.action for one in differences(wanted(), found)} == {Action.ALTER}


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"partitions": 5}, "partitions"),
        ({"replicas": frozenset({1})}, "replication"),
        ({"replicas": frozenset({2, 3})}, "replication"),
    ],
)
def test_partitions_and_replicas_stay_as_they_were_made(changes, setting):
    (one,) = differences(wanted(), with_topic(as_wanted(wanted()), f"eu.{TRAFFIC}", **changes))
    assert (one.action, one.setting) == (Action.REFUSE, setting)


@pytest.mark.parametrize(
    ("acl", "action"),
    [
        (Acl("User:eu.billing", "READ", "TOPIC", "eu.cdr.pii"), Action.DELETE),
        (Acl("User:eu.billing", "READ", "TOPIC", "eu.", "PREFIXED"), Action.DELETE),
        (Acl("User:eu.worker", "READ", "TOPIC", "eu.traffic", host="10.0.0.1"), Action.DELETE),
        (Acl("User:eu.gateway", "ALL", "GROUP", "eu.workers"), Action.DELETE),
        (Acl("User:eu.worker", "READ", "TOPIC", "eu.traffic", permission="DENY"), Action.LEAVE),
        (Acl("User:eu.worker", "ALTER", "BROKER", "kafka-cluster"), Action.LEAVE),
        (Acl("User:eu.billing", "READ", "TOPIC", "*"), Action.LEAVE),
        (Acl("User:eu.billing", "READ", "TOPIC", "us.traffic"), Action.LEAVE),
        (Acl("User:mallory", "READ", "TOPIC", "eu.traffic"), Action.LEAVE),
        (Acl("User:mallory", "READ", "TOPIC", "*"), Action.LEAVE),
        (Acl("User:mallory", "READ", "TOPIC", "e", "PREFIXED"), Action.LEAVE),
        (Acl("User:*", "READ", "GROUP", "eu.publish.x"), Action.LEAVE),
        (Acl("User:eu.west.worker", "READ", "TOPIC", "eu.west.traffic"), None),
        (Acl("User:mallory", "READ", "TOPIC", "payroll"), None),
    ],
)
def test_rights_of_ours_that_are_too_many_go_and_those_of_others_are_shown(acl, action):
    found = as_wanted(wanted())
    shown = differences(wanted(), found._replace(acls=found.acls | {acl}))
    assert [one.action for one in shown] == ([] if action is None else [action])


# --- the operator's page ------------------------------------------------------------------------------------


def named(cell):
    """Return the streams that a cell of the page names."""
    names = {name for name in re.findall(r"`([a-z.]+)`", cell) if name in CATALOG}
    return set(CATALOG) - names if cell.strip().startswith("all but") else names


def test_the_page_about_kafka_has_the_rights_of_every_role():
    rows = [line.split("|")[1:5] for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 6]
    told = {
        role: (reads, writes, groups) for who, reads, writes, groups in rows for role in re.findall(r"`(\w+)`", who)
    }
    assert set(told) == set(ROLES)
    for role, (reads, writes, groups) in told.items():
        assert named(reads) == {row.name for row in ROWS if role in (*row.readers, *row.followers)}, role
        assert named(writes) == {row.name for row in ROWS if role in row.writers}, role
        publishes = any(role in CATALOG[name].writers for name in INPUTS)
        assert ("`publish.…`" in groups) == publishes, role


def test_the_page_about_kafka_has_the_retention_that_topics_get():
    policy = POLICIES["default"]
    minutes = retention_ms(CATALOG[TRAFFIC], policy) // 60_000
    assert PAGE.count(f"{minutes // 60} h {minutes % 60} min") >= 3
    for name in ("cdr.pii", "cdr.anonymous", "verdicts", "quarantine", "review", "billing.deltas"):
        row = next(line for line in PAGE.splitlines() if re.match(rf"\| .*`{name}`.* \| (when|midnight|hour)", line))
        assert f"{retention_ms(CATALOG[name], policy) // DAY_MS} days" in row, name
