"""A real Prometheus scrapes a running pipeline: every query of the dashboard and of the alerts finds its data."""

import json
import math
import re
import signal
import time

import pytest

from streams.watch.watch import denied
from tests.integration.test_watch import Watched, cdr, request
from tests.support.commands import eventually
from tests.support.prometheus import running
from tests.support.records import reply
from tests.unit.test_metrics import ALERTS, DASHBOARD, alerts

CONFIG = """
global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: streamveil
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
QUERIES = [
    (panel["title"], target["expr"])
    for panel in json.loads(DASHBOARD.read_text())["panels"]
    for target in panel["targets"]
]
SELECTOR = re.compile(r"\b(?:streamveil[a-z_:]*|up)(?:\{[^}]*\})?")


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """A Prometheus that has scraped two workers while traffic of every kind came in."""
    folder = tmp_path_factory.mktemp("scraped")
    (folder / "deployment").mkdir()
    place = Watched(folder / "deployment")
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(rules=ALERTS, port=place.port))
    try:
        process = place.start("run", "--workers", 2)
        eventually(place.ready, "the workers are ready")
        with running(folder / "data", config) as prometheus:
            for turn in range(8):
                numbers = range(100 * turn, 100 * turn + 20)
                place.publish(
                    *map(request, numbers), *map(cdr, numbers), request(1, recipient=""), request(2, purpose="fun"),
                    reply("STOP", record_id=f"s{turn}"), b"no record",
                )  # fmt: skip
                time.sleep(1)  # it is scraped meanwhile
            eventually(lambda: _sum(prometheus, "streamveil_records_total") == 8 * 44, "all is scraped")
            yield place, prometheus
        process.send_signal(signal.SIGTERM)
        assert place.ended(process).status == 0
    finally:
        place.close()


def _sum(prometheus, metric):
    return sum(float(series["value"][1]) for series in prometheus.query(metric))


def test_the_target_is_up_and_what_is_scraped_is_what_was_committed(scraped):
    place, prometheus = scraped
    (target,) = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert _sum(prometheus, "streamveil_records_total") == place.committed()
    assert prometheus.query("streamveil_workers")[0]["value"][1] == "2"


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title} {at}" for at, (title, _) in enumerate(QUERIES)])
def test_every_query_of_the_dashboard_returns_data(scraped, title, query):
    _, prometheus = scraped
    found = prometheus.query(query.replace("$__rate_interval", "5m"))
    assert any(math.isfinite(float(series["value"][1])) for series in found), title


@pytest.mark.parametrize("name", alerts())
def test_every_alert_sees_its_series_and_does_not_fire(scraped, name):
    _, prometheus = scraped
    # Given the rule as the server has it / Then it was evaluated without fault, and nothing is wrong
    rules = {rule["name"]: rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    rule = rules[name]
    assert (rule["health"], rule["state"], rule["alerts"]) == ("ok", "inactive", [])
    # Then each of the series that it looks at is there
    selectors = SELECTOR.findall(rule["query"])
    assert selectors
    for selector in selectors:
        assert prometheus.query(selector), selector


def test_an_alert_fires_when_its_cause_is_there(scraped):
    # Given that a record is denied twelve times to somebody without a grant
    place, prometheus = scraped
    denied(place.data / "watch", {"not_granted": 12})
    # Then the alert goes off, with the labels that its text needs
    firing = eventually(
        lambda: [one for one in prometheus.get("alerts")["alerts"] if one["state"] == "firing"], "it fires"
    )
    assert [(one["labels"]["alertname"], one["labels"]["reason"]) for one in firing] == [
        ("StreamveilOpeningsDenied", "not_granted")
    ]
    assert firing[0]["annotations"]["summary"].endswith(": not_granted")
