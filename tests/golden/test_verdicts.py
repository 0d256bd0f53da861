"""Frozen verdicts: each reason, exemption and confirmation is written for ever as it was once.

`verdicts_v1.json` holds requests, what they were screened against, and every byte of their verdicts, and what a request
with a time zone says when it is opened. No test writes it; `python -m tests.golden.test_verdicts` does, once, and never
overwrites it.
"""

from pathlib import Path

import orjson

from processors.screen.suppression import Rule, Suppressions, latest
from processors.screen.verdict import REASONS
from schemas.policy import parse_policy
from tests.support import records as r

NOW_S = r.NOW_S + 12_600  # half past seven in the morning in Vancouver
FILE = Path(__file__).parent / "verdicts_v1.json"
GOLDEN = orjson.loads(FILE.read_bytes()) if __name__ != "__main__" else {}


def written(golden):
    """What the pipeline makes of the frozen requests: the verdicts as they stand, and the cleared requests opened."""
    views = []
    for name, how in (("opt_outs", {}), ("exemptions", {"fold": latest})):
        view = Suppressions(**how)
        for number, rule, event_s in golden[name]:
            view.apply(r.TOKENS.of(number), Rule(*rule), out=True, event_s=event_s)
        views.append(view)
    lists = r.Lists(**{name: (as_of_s, set(numbers)) for name, as_of_s, numbers in golden["lists"]})
    done = r.run(
        [value.encode() for value in golden["values"]],
        policy=parse_policy(golden["policy"], "golden"), view=views[0], exemptions=views[1], registries=lists,
        now_s=golden["now_s"],
    )  # fmt: skip
    opened = [groups["primary"] for groups in done.opened("cleared")]
    return [message.value.decode() for message in done.of("verdicts")], opened


def test_the_frozen_requests_still_get_the_frozen_verdicts():
    verdicts, opened = written(GOLDEN)
    assert verdicts == GOLDEN["verdicts"]
    assert opened == GOLDEN["opened"]


def test_there_is_a_verdict_of_every_reason_and_of_each_new_field():
    found = [orjson.loads(value) for value in GOLDEN["verdicts"]]
    assert {value["reason"] for value in found} == {*REASONS, None}
    assert {value.get("exemption") for value in found} == {"consent", "purchase", "inquiry", None}
    assert [value["record_id"] for value in found if "confirmation" in value] == ["opted-out-now"]
    assert [value for value in GOLDEN["opened"] if "time_zone" in value]


def freeze():
    """Write the file; fails if there is one."""
    us, other = "+14155550123", "+14155550124"

    def asked(record_id, recipient=us, **fields):
        return r.sms_request(**{"purpose": "marketing", **fields}, record_id=record_id, recipient=recipient)

    quiet = '[screening.quiet_hours]\nstart = "21:00"\nend = "08:00"\ncountries = ["GB", "CA"]\nclause = "REG-3"\n'
    required = r.DEFAULT_POLICY.replace(
        'channels = ["sms"]\nmax_age_days = 21\nrequired = false',
        'channels = ["sms"]\nmax_age_days = 21\nrequired = true',
    )
    quiet += (
        '[[screening.registry]]\nname = "uk-text"\ncountry = "GB"\ncalling_code = "44"\nchannels = ["sms"]\n'
        'max_age_days = 28\nclause = "CAL-3"\n'
    )
    values = [
        asked("expired", occurred_at="2026-11-19T00:00:00Z"),
        asked("nobody", ""),
        asked("premium", "+19005550199", purpose="service"),
        asked("emergency", "911", purpose="otp"),
        asked("country", "+33612345678", account_id="abroad"),
        asked("child", child=True),
        asked("no-number", "12345"),
        asked("opted-out", other),
        asked("opted-out-now", r.PERSON, purpose="service"),
        asked("blocked", "+4915112345679", purpose="service"),
        asked("missing", "+6581234567"),
        asked("too-old", "+442079460958"),
        asked("listed"),
        asked("quiet", "+16045550123"),
        asked("day", "+14165550123"),
        asked("here", "+16045550123", time_zone="America/Toronto"),
        asked("consent", "+14155550125"),
        asked("purchase", "+14155550126"),
        asked("inquiry", "+16045550124"),
        asked("service", purpose="service"),
    ]
    day, until_s = r.NOW_S - r.DAY_S, r.NOW_S + r.DAY_S
    golden = {
        "policy": f"{required}\n{quiet}{r.account('abroad', 'countries = [' + chr(34) + 'DE' + chr(34) + ']')}",
        "now_s": NOW_S,
        "opt_outs": [
            [other, ["account:acme", "all", "sms", "person"], day],
            [r.PERSON, ["platform", "all", "sms", "person"], NOW_S - 299],
            ["+4915112345679", ["platform", "all", "sms", "officer"], NOW_S],
        ],
        "exemptions": [
            [number, ["account:acme", kind, "sms", "account"], until_s]
            for number, kind in (
                ("+14155550125", "consent"),
                ("+14155550126", "purchase"),
                ("+16045550124", "inquiry"),
                (other, "consent"),
            )
        ],
        "lists": [
            ["us_dnc", day, [us, "+14155550125", "+14155550126", other]],
            ["uk_text", r.NOW_S - 40 * r.DAY_S, []],
        ],
        "values": [r.raw(value).decode() for value in values],
    }
    golden["verdicts"], golden["opened"] = written(golden)
    with FILE.open("xb") as file:
        file.write(orjson.dumps(golden, option=orjson.OPT_INDENT_2) + b"\n")


if __name__ == "__main__":
    freeze()
