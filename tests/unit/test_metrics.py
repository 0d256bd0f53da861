"""The metrics: one table with its documentation, counts that are right, readiness, alerts that fire and do not fire."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.samples import Sample

from processors.decode import FIELDS
from schemas.catalog import CATALOG
from schemas.errors import KeysBusy, KeysUnusable, Retriable, Unsealed
from schemas.outbound import Message, Output
from streams.log.protocol import Batch
from streams.state.entries import KEPT
from streams.watch.http import Expected, Served, unready
from streams.watch.metrics import DENIALS, TABLE, Known, Metrics, documentation, served_registry
from streams.watch.overdue import registries_seen
from streams.watch.watch import Moment, Overdue, RegistrySeen, Reviews, Stages, Watch, Work, denied
from streams.worker.selftest import _CLEAR, check_leaving
from streams.worker.worker import unfit
from tests.support.prometheus import programs
from tests.support.records import DAY_S, Lists, policy_of, preference, reply, run, sms_cdr, sms_request, voice_cdr

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
TESTS = ALERTS.with_name("alerts.test.yml")
DASHBOARD = ROOT / "deploy" / "grafana" / "operations.json"
RUNBOOK = ROOT / "docs" / "runbook.md"
SUFFIXES = ("_bucket", "_sum", "_count")


def everything():
    """One run of the pipeline whose outputs are in every stream that it writes."""
    return run([
        sms_request(), sms_request(recipient=""), sms_cdr(), voice_cdr(), reply("stop it now"), reply("STOP"),
        preference(), b"no record",
    ])  # fmt: skip


def value(registry, name, **labels):
    return registry.get_sample_value(name, labels)


def alerts():
    """Alert → the text of its rule."""
    found = re.split(r"^ +- alert: (\w+)\n", ALERTS.read_text(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_documentation_is_what_the_table_says():
    assert (ROOT / "docs" / "metrics.md").read_text() == documentation()


def test_every_metric_has_a_name_a_unit_and_a_meaning_of_its_own():
    assert len({row.name for row in TABLE}) == len({row.meaning for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert re.fullmatch(r"streamveil_[a-z_]+", row.name)
        assert row.name.endswith("_total") == (row.kind == "counter")
        assert row.unit
        assert row.meaning.endswith(".")


def test_no_label_can_hold_anything_of_a_record():
    # Given the labels there are: the streams', the table's own words, a partition's number and a version
    labels = {label for row in TABLE for label in row.labels}
    assert labels == {
        "type", "outcome", "reason", "stream", "error", "stage", "partition", "kind", "operation", "version",
        "registry",
    }  # fmt: skip
    # Then none is a field of a record but its type, and what is not listed beforehand is open for a stated reason
    assert labels & FIELDS == {"type"}
    assert {row.name for row in TABLE if row.open and row.labels != ("registry",)} == {
        "streamveil_lag_records", "streamveil_build_info",
    }  # fmt: skip
    assert all(row.series or row.open for row in TABLE if row.labels)


def test_every_series_of_a_closed_set_is_there_before_anything_happens():
    registry, kept = CollectorRegistry(), CollectorRegistry()
    Metrics(registry)
    kept.register(Known(1))
    for row in TABLE:
        for values in row.series:
            if row.kind == "counter" and row.labels != ("reason",):
                where = kept if row.name == "streamveil_retention_runs_total" else registry
                assert value(where, row.name, **dict(zip(row.labels, values, strict=True))) == 0


# --- what is counted ----------------------------------------------------------------------------------------------


def committed(metrics, done, *, stream="traffic", arrivals_ms=None, asked=(3, 5), missed=(1, 2)):
    arrivals_ms = arrivals_ms or [0] * len(done.outcomes)
    messages = [Message(at, None, (), b"") for at in arrivals_ms]
    batch = Batch(stream, 0, 0, len(messages), 1, messages, range(len(messages)))
    stages_s = Stages(0.0015, 0.25, 0.003, 9.0)
    metrics.committed(Work(batch, done.outputs, Counter(done.outcomes), stages_s, asked, missed))


def test_each_record_is_counted_once_under_how_it_ended():
    registry = CollectorRegistry()
    metrics, done = Metrics(registry), everything()
    before = {sample.name: sample.labels for metric in registry.collect() for sample in metric.samples}
    committed(metrics, done)
    committed(metrics, done)
    samples = [s for metric in registry.collect() for s in metric.samples if s.name == "streamveil_records_total"]
    counted = {(s.labels["type"], s.labels["outcome"], s.labels["reason"]): s.value for s in samples if s.value}
    assert counted == {
        (kind, end.value, reason or ""): 2 * count for (kind, end, reason), count in Counter(done.outcomes).items()
    }
    assert sum(counted.values()) == 2 * len(done.outcomes)
    assert counted["request", "refuse", "no_recipient"] == 2
    # Then the table knew each of these series beforehand
    assert "streamveil_records_total" in before
    assert set(counted) <= set(TABLE[0].series)


def test_clear_inputs_sealed_values_and_key_lookups_are_counted_by_stream_and_kind():
    registry = CollectorRegistry()
    metrics, done = Metrics(registry), everything()
    committed(metrics, done, stream="traffic.cdr")
    assert value(registry, "streamveil_clear_inputs_total", stream="traffic.cdr") == len(done.outcomes)
    assert value(registry, "streamveil_clear_inputs_total", stream="traffic") == 0
    for stream in ("cleared", "content", "cdr.pii", "suppressions", "review", "quarantine"):
        assert value(registry, "streamveil_sealed_values_total", stream=stream) == len(done.of(stream)) > 0
    assert value(registry, "streamveil_sealed_values_total", stream="cdr.anonymous") is None
    for kind, outcome, count in (("epochs", "hit", 2), ("epochs", "miss", 1), ("persons", "hit", 3)):
        assert value(registry, "streamveil_key_lookups_total", kind=kind, outcome=outcome) == count


def test_the_time_from_arrival_to_commit_is_that_of_every_record(monkeypatch):
    # Given records that came at any time before, and one whose clock is ahead
    monkeypatch.setattr("streams.watch.metrics.time.time", lambda: 1_000_000.0)
    ages_s = [0.004, 0.01, 0.0249, 0.14, 0.15, 0.16, 5.5, 70_000.0, 99_999.0, -3.0]
    done = run([b"x"] * len(ages_s))
    registry, oracle = CollectorRegistry(), CollectorRegistry()
    arrivals_ms = [round((1_000_000 - age) * 1000) for age in ages_s]
    committed(Metrics(registry), done, arrivals_ms=arrivals_ms)
    # Then the histogram is the one that observing each alone gives
    row = next(row for row in TABLE if row.name == "streamveil_arrival_to_commit_seconds")
    alone = Histogram(row.name, "one by one", ["stream"], registry=oracle, buckets=row.buckets)
    for arrival_ms in arrivals_ms:
        alone.labels("traffic").observe(max(0, 1_000_000_000 - arrival_ms) / 1000)
    for bound in (*map(str, map(float, row.buckets)), "+Inf"):
        labels = {"stream": "traffic", "le": bound}
        assert value(registry, f"{row.name}_bucket", **labels) == value(oracle, f"{row.name}_bucket", **labels), bound
    assert value(registry, f"{row.name}_sum", stream="traffic") == pytest.approx(
        value(oracle, f"{row.name}_sum", stream="traffic")
    )


def test_the_calls_of_the_key_management_service_are_counted_by_their_outcome():
    class Kms:
        check, calls, waiting_period_s, has_root = b"c", 7, 30, True

        def wrap(self, day, plaintext):
            return day.encode() + plaintext

        def unwrap(self, day, _wrapped):
            raise {"busy": KeysBusy, "gone": KeysUnusable}[day]

        def destroy(self, day):
            pass

        def names(self):
            return ["never"]

        def trusts(self, check):
            return check == self.check

        def counter(self):
            return 5

        def raise_counter(self, value):
            assert value == 6

        rotate_root = close = counter

    registry = CollectorRegistry()
    kms = Metrics(registry).of_kms(Kms())
    assert (kms.wrap("d", b"k"), kms.names(), kms.counter()) == (b"dk", ["never"], 5)
    assert (kms.check, kms.calls, kms.waiting_period_s, kms.trusts(b"c")) == (b"c", 7, 30, True)
    kms.raise_counter(6)
    kms.rotate_root()
    kms.close()
    for day in ("busy", "gone", "gone"):
        with pytest.raises((KeysBusy, KeysUnusable)):
            kms.unwrap(day, b"")
    counted = {
        (operation, outcome): value(registry, "streamveil_kms_calls_total", operation=operation, outcome=outcome)
        for operation in ("wrap", "unwrap", "destroy", "names", "rotate_root", "counter", "raise_counter")
        for outcome in ("ok", "retriable", "failed")
    }
    assert {at: count for at, count in counted.items() if count} == {
        ("wrap", "ok"): 1, ("names", "ok"): 1, ("unwrap", "retriable"): 1, ("unwrap", "failed"): 2,
        ("counter", "ok"): 1, ("raise_counter", "ok"): 1, ("rotate_root", "ok"): 1,
    }  # fmt: skip


def test_an_error_or_outcome_that_the_table_does_not_know_is_counted_all_the_same():
    class Unheard(Retriable):
        """New."""

    registry = CollectorRegistry()
    Metrics(registry).waits(Unheard())
    assert value(registry, "streamveil_retries_total", error="Unheard") == 1


def _deny(folder, times, together):
    denied(folder, {"too_late": 1})  # all is imported before they begin
    together.wait()
    for _ in range(times):
        denied(folder, {"not_granted_for_account": 2, "too_late": 1})


def test_denied_openings_of_any_process_are_counted_in_every_run_at_work(tmp_path):
    # Given two runs, and a folder where nobody watches
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    registries = [served_registry(folder, Known(1)) for folder in folders]
    assert [value(registry, "streamveil_openings_denied_total", reason=reason) for registry in registries
            for reason in DENIALS] == [0] * 2 * len(DENIALS)  # fmt: skip
    # When several processes are denied at once
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    processes = [context.Process(target=_deny, args=(tmp_path, 300, together)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    denied(tmp_path / "nowhere", {"too_late": 1})
    # Then none is lost
    for registry in registries:
        assert value(registry, "streamveil_openings_denied_total", reason="not_granted_for_account") == 1200
        assert value(registry, "streamveil_openings_denied_total", reason="too_late") == 602


def test_a_registry_is_unfit_if_it_is_required_and_missing_or_too_old():
    rule = '[[screening.registry]]\nname = "{}"\ncountry = "US"\ncalling_code = "1"\nchannels = ["voice"]\n'
    rule += 'max_age_days = 31\nrequired = {}\nclause = "REG-2"\n'
    policy = policy_of(rule.format("a", "true") + rule.format("b", "false"))
    ours = {one.name for one in policy.screening.registry} - {"a", "b"}
    fresh = {name.replace("-", "_"): (100 * DAY_S, ()) for name in ours}
    now_s = 100 * DAY_S
    assert unfit(policy, Lists(**fresh, a=(now_s, ())), now_s) == 0
    assert unfit(policy, Lists(**fresh), now_s) == 1
    assert unfit(policy, Lists(**fresh, a=(now_s, ()), b=(now_s - 31 * DAY_S, ())), now_s) == 0
    assert unfit(policy, Lists(**fresh, a=(now_s, ()), b=(now_s - 31 * DAY_S - 1, ())), now_s) == 1


WORKER = """
import sys
from streams.watch.metrics import Metrics
from streams.watch.watch import Moment
metrics = Metrics()
metrics.up()
metrics.fenced()
metrics.behind(int(sys.argv[1]))
print("counted", flush=True)
sys.stdin.read()
"""


def test_a_worker_that_ended_counts_in_what_was_and_no_more_in_what_is(tmp_path):
    # Given two workers of one run
    served = Served(tmp_path, Expected(2, 30.0))
    environment = {**os.environ, **served.variables, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(number)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) for number in (3, 7)
    ]  # fmt: skip
    assert [worker.stdout.readline() for worker in workers] == ["counted\n"] * 2

    def told():
        text = served.answer("/metrics")[2].decode()
        names = ("workers", "workers_wanted", "fenced_total", "suppressions_behind_records")
        return [float(re.search(rf"^streamveil_{name} (.+)$", text, re.MULTILINE)[1]) for name in names]

    assert told() == [2, 2, 2, 7]
    assert served.answer("/readyz")[0] == 200
    # When the one that is further behind ends
    workers[1].communicate()
    served.ended(workers[1].pid)
    # Then what it counted stays
    assert told() == [1, 2, 2, 3]
    assert served.answer("/readyz")[::2] == (503, b"workers\n")
    workers[0].communicate()
    served.ended(workers[0].pid)
    assert served.answer("/readyz")[2].split()[0] == b"workers"


def test_retention_runs_are_counted_by_the_process_that_starts_them(tmp_path):
    served = Served(tmp_path, Expected(1, 30.0))
    for outcome in ("done", "done", "failed"):
        served.retention_ran(outcome)
    text = served.answer("/metrics")[2].decode()
    found = re.findall(r'^streamveil_retention_runs_total\{outcome="(\w+)"\} (.+)$', text, re.MULTILINE)
    assert found == [("done", "2.0"), ("partial", "0.0"), ("failed", "1.0")]


def test_what_is_overdue_is_shown_and_where_nothing_is_due_the_time_of_the_look(monkeypatch):
    registry, name = CollectorRegistry(), "streamveil_oldest_destruction_due_timestamp_seconds"
    metrics = Metrics(registry)
    metrics.overdue(Overdue(3, 1_000, 2, 40))
    assert value(registry, name) == 1_000
    assert value(registry, "streamveil_destructions_overdue") == 3
    assert value(registry, "streamveil_requests_overdue") == 2
    assert value(registry, "streamveil_keks") == 40
    monkeypatch.setattr("streams.watch.metrics.time.time", lambda: 5_000.0)
    metrics.overdue(Overdue(0, None, 0, 40))
    assert value(registry, name) == 5_000


def test_each_registry_of_the_policy_is_told_by_its_own_date_and_limit():
    # Given two lists of the policy, one required, one not loaded
    rule = '[[screening.registry]]\nname = "{}"\ncountry = "US"\ncalling_code = "1"\nchannels = ["voice"]\n'
    rule += 'max_age_days = {}\nrequired = {}\nclause = "REG-2"\n'
    policy = policy_of(rule.format("a", 21, "true") + rule.format("b", 28, "false"))
    seen = {one.name: one for one in registries_seen(policy, Lists(a=(5_000, ())), ["b"])}
    assert seen["a"] == RegistrySeen("a", 5_000, 21 * DAY_S, required=True, damaged=False)
    assert seen["b"] == RegistrySeen("b", None, 28 * DAY_S, required=False, damaged=True)
    assert set(seen) == {one.name for one in policy.screening.registry}
    # Then each has a series of its own, and what is not loaded is of 1970
    registry = CollectorRegistry()
    Metrics(registry).registries([seen["a"], seen["b"]])
    for name, told in {"a": (5_000, 21 * DAY_S, 1, 0), "b": (0, 28 * DAY_S, 0, 1)}.items():
        metrics = ("as_of_timestamp_seconds", "max_age_seconds", "required", "damaged")
        found = (registry.get_sample_value(f"streamveil_registry_{metric}", {"registry": name}) for metric in metrics)
        assert tuple(found) == told


def test_the_snapshots_of_entries_are_told_by_stream():
    registry = CollectorRegistry()
    metrics = Metrics(registry)

    def told():
        return {
            stream: tuple(value(registry, f"streamveil_snapshot_{name}", stream=stream)
                          for name in ("timestamp_seconds", "changed_people"))
            for stream in KEPT
        }  # fmt: skip

    assert told() == {"suppressions": (0, 0), "exemptions": (0, 0)}
    metrics.snapshot("suppressions", 5_000.0, 7)
    metrics.snapshot("exemptions", None, 3)
    assert told() == {"suppressions": (5_000, 7), "exemptions": (0, 3)}
    # and no more once it is used no more
    metrics.snapshot("suppressions", None, 0)
    assert told() == {"suppressions": (0, 0), "exemptions": (0, 3)}


def test_near_misses_are_told_with_the_time_of_the_look(monkeypatch):
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    monkeypatch.setattr("streams.watch.metrics.time.time", lambda: 5_000.0)
    metrics.reviews(Reviews(9, 3, 2), 1)
    names = ("undecided", "due_soon", "overdue", "died_undecided", "seen_timestamp_seconds")
    assert [value(registry, f"streamveil_reviews_{name}") for name in names] == [9, 3, 2, 1, 5_000]


# --- the look before the commit -----------------------------------------------------------------------------------


class Seen(Watch):
    """Keeps what a check told."""

    def __init__(self):
        self.streams, self.unsealed = [], {}

    def checked(self, streams, unsealed):
        self.streams, self.unsealed = list(streams), dict(unsealed)


def test_what_the_pipeline_makes_may_leave():
    seen = Seen()
    check_leaving(everything().outputs, seen)
    assert set(seen.streams) == set(_CLEAR)
    assert seen.unsealed == {}


def changed(name):
    def change(fields):
        fields[name] = "+447700900123"

    return change


SPOILT = {
    "a field more": changed("recipient"),
    "another field more": changed("content"),
    "no ciphertext": lambda fields: fields.pop("sealed") and fields,
    "no parts": lambda fields: fields.update(sealed=[]),
    "text for ciphertext": lambda fields: fields["sealed"][0].update(box="+447700900123"),
    "clear text for ciphertext": lambda fields: fields["sealed"][0].update(box='{"recipient":"+447700900123"}' * 9),
    "a short box": lambda fields: fields["sealed"][0].update(box="QUJD"),
    "a key of another domain": lambda fields: fields["sealed"][0].update(key="other/platform/2026-11/1"),
    "a clear field in a part": lambda fields: fields["sealed"][0].update(number="+447700900123"),
}


@pytest.mark.parametrize(
    ("stream", "how"),
    [
        (stream, how)
        for stream in _CLEAR
        for how in SPOILT
        if how.endswith("field more") or CATALOG[stream].domain is not None
    ],
)
def test_what_is_not_sealed_as_its_stream_must_be_does_not_leave(stream, how):
    output = next(one for one in everything().outputs if one.stream == stream)
    fields = orjson.loads(output.messages[-1].value)
    SPOILT[how](fields)
    spoilt = Output(stream, 0, [*output.messages[:-1], Message(0, None, (), orjson.dumps(fields))])
    seen = Seen()
    with pytest.raises(Unsealed) as caught:
        check_leaving([spoilt], seen)
    assert seen.unsealed == {stream: 1}
    assert "447700" not in str(caught.value)


@pytest.mark.parametrize(("stream", "leaves"), [("cdr.pii", b"not json"), ("cdr.pii", b"[]"), ("nowhere", b"{}")])
def test_what_is_no_value_of_a_known_stream_does_not_leave(stream, leaves):
    with pytest.raises(Unsealed):
        check_leaving([Output(stream, 0, [Message(0, None, (), leaves)])], Seen())


# --- readiness ----------------------------------------------------------------------------------------------------

NOW_S = 5_000_000.0
EXPECTED = Expected(workers=2, key_lease_s=30.0)


def samples(**changes):
    """The samples of a deployment where all is well, with some of them changed; None: left out."""
    found = {"workers": 2.0, "registries_unfit": 0.0, "unsealed_values_total": 0.0,
             "oldest_destruction_due_timestamp_seconds": NOW_S - 60,
             **{f"{moment}_timestamp_seconds": NOW_S - 1 for moment in Moment}}  # fmt: skip
    found |= changes
    return [Sample(f"streamveil_{name}", {}, number) for name, number in found.items() if number is not None]


UNREADY = [
    ({}, []),
    ({"workers": 1.0}, ["workers"]),
    ({"polled_timestamp_seconds": NOW_S - 16}, ["log"]),
    ({"polled_timestamp_seconds": NOW_S - 14}, []),
    ({"suppressions_caught_up_timestamp_seconds": NOW_S - 16}, ["suppressions"]),
    ({"key_lease_renewed_timestamp_seconds": NOW_S - 29}, []),
    ({"key_lease_renewed_timestamp_seconds": NOW_S - 30}, ["keys"]),
    ({"registries_unfit": 1.0}, ["registries"]),
    ({"progress_timestamp_seconds": NOW_S - 61}, ["stuck"]),
    ({"unsealed_values_total": 1.0}, ["unsealed"]),
    ({"oldest_destruction_due_timestamp_seconds": NOW_S - 3599}, []),
    ({"oldest_destruction_due_timestamp_seconds": NOW_S - 3601}, ["retention"]),
    ({"workers": None, "progress_timestamp_seconds": None}, ["workers", "stuck"]),
]


@pytest.mark.parametrize(("changes", "reasons"), UNREADY)
def test_readiness_says_in_a_word_what_is_missing(changes, reasons):
    assert unready(samples(**changes), EXPECTED, NOW_S) == reasons


def test_every_reason_is_tested_and_stands_in_the_runbook():
    worst = samples(workers=0.0, registries_unfit=1.0, unsealed_values_total=1.0)
    words = unready(worst, EXPECTED, NOW_S + 9999)
    table = RUNBOOK.read_text().partition("| reason |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == words
    assert {word for _, reasons in UNREADY for word in reasons} == set(words)


# --- dashboard and alerts -----------------------------------------------------------------------------------------


def named(text):
    """The metrics that a text names."""
    found = set(re.findall(r"\bstreamveil_[a-z_]+", text))
    return {next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name) for name in found}


def test_dashboard_and_alerts_name_every_metric_and_no_other():
    shown, alerted = named(DASHBOARD.read_text()), named(ALERTS.read_text())
    assert shown == {row.name for row in TABLE}
    assert alerted <= shown


def test_the_panels_of_the_dashboard_have_an_id_a_place_and_a_title_of_their_own():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    for key in (
        lambda one: one["id"],
        lambda one: one["title"],
        lambda one: (one["gridPos"]["x"], one["gridPos"]["y"]),
    ):
        assert len({key(panel) for panel in panels}) == len(panels)


def test_every_alert_has_a_section_in_the_runbook_and_every_section_an_alert():
    sections = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == list(alerts())
    for name, rule in alerts().items():
        assert f"runbook: docs/runbook.md#{name.lower()}\n" in rule
        assert re.search(r"severity: (page|warn)}", rule)


def test_every_alert_is_tested_where_it_fires_and_where_it_does_not():
    tests = re.findall(r"^  - name: (\w+) (fires|does not fire)$", TESTS.read_text(), re.MULTILINE)
    assert set(tests) == {(name, how) for name in alerts() for how in ("fires", "does not fire")}
    firing = re.findall(r"alertname: (\w+)\n.*\n +exp_alerts:\n +- exp_labels", TESTS.read_text())
    quiet = re.findall(r"alertname: (\w+), .*exp_alerts: \[\]", TESTS.read_text())
    assert set(firing) == set(quiet) == set(alerts())


@pytest.mark.parametrize(
    "words", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts.test.yml")], ids=lambda words: words[0]
)
def test_promtool_finds_the_rules_right(words):
    done = subprocess.run(
        [programs().promtool, *words], cwd=ALERTS.parent, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
